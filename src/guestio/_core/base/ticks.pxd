"""The monotonic clock, read cheaply many times in a row.

Between two readings of the clock, time is counted by the processor's time-stamp counter, where the
kernel itself counts time with it: it has checked that it runs evenly, and the same on all
processors. Elsewhere each reading is one of the clock.

For threads that hold the GIL. Each module that uses this has a state of its own.
"""

cdef extern from * nogil:
    """
    #ifndef GUESTIO_TICKS
    #define GUESTIO_TICKS
    #include <fcntl.h>
    #include <stdint.h>
    #include <string.h>
    #include <time.h>
    #include <unistd.h>

    enum {
        TICKS_CLOSE = 1 << 15,  /* that the counter may advance while the clock is read */
        TICKS_BITS = 24         /* of those after which the clock is read again, and the rate is */
    };

    static struct {
        int even;               /* whether the kernel counts with it */
        uint64_t ns, at;        /* the latest reading of the clock, and the counter's */
        uint64_t base_ns, base; /* what the rate is counted from */
        uint64_t rate;          /* ns per tick, times 2**32; 0: not known yet */
    } ticks;

    static inline uint64_t ticks_clock(void)
    {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    }

    #if defined(__x86_64__)
    static inline uint64_t ticks_read(void) { return __builtin_ia32_rdtsc(); }

    static void ticks_begin(void)
    {
        char name[8] = {0};
        int fd = open("/sys/devices/system/clocksource/clocksource0/current_clocksource",
                      O_RDONLY | O_CLOEXEC);
        if (fd >= 0) {
            ticks.even = read(fd, name, sizeof name - 1) == 4 && !memcmp(name, "tsc\\n", 4);
            close(fd);
        }
    }
    #else
    static inline uint64_t ticks_read(void) { return 0; }
    static void ticks_begin(void) {}
    #endif

    static __attribute__((noinline)) void ticks_rate(uint64_t ns, uint64_t at)
    {
        uint64_t passed = ns - ticks.base_ns, counted = at - ticks.base;
        /* Not over a suspension, in which one of them may have stood still. */
        if (!(passed >> 32) && !(counted >> 32))
            ticks.rate = (passed << 32) / counted;
        ticks.base_ns = ns;
        ticks.base = at;
    }

    /* The clock, in ns. */
    static inline uint64_t ticks_exact(void)
    {
        uint64_t before, at, ns;
        if (!ticks.even)
            return ticks_clock();
        before = ticks_read();
        ns = ticks_clock();
        at = ticks_read();
        /* Unless this thread was interrupted in between. */
        if (at - before < TICKS_CLOSE) {
            ticks.ns = ns;
            ticks.at = at;
            if ((at - ticks.base) >> TICKS_BITS)
                ticks_rate(ns, at);
        }
        return ns;
    }

    /* The same to some ns, without reading the clock if it was read within the last milliseconds. */
    static inline uint64_t ticks_soon(void)
    {
        uint64_t passed;
        if (!ticks.rate)
            return ticks_exact();
        passed = ticks_read() - ticks.at;
        if (passed >> TICKS_BITS)
            return ticks_exact();
        return ticks.ns + (passed * ticks.rate >> 32);
    }
    #endif
    """
    void ticks_begin()
    unsigned long ticks_exact()
    unsigned long ticks_soon()
