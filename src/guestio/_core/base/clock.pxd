"""The monotonic clock."""

cdef extern from * nogil:
    """
    #ifndef GUESTIO_CLOCK
    #define GUESTIO_CLOCK
    #include <stdint.h>
    #include <time.h>
    static inline uint64_t now_ns(void)
    {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    }
    static inline double now_seconds(void)
    {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
    }
    #endif
    """
    unsigned long now_ns()
    double now_seconds()
