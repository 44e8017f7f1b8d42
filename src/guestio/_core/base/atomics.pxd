"""Touching guest memory: copies that never tear a small value, and atomic access.

Guest memory changes under our hands at any time; it is read once, into private memory, before it
is judged.
"""

from guestio._core.base.checks cimport u64

cdef extern from * nogil:
    """
    #ifndef GUESTIO_RAW
    #define GUESTIO_RAW
    #include <stdint.h>
    #include <string.h>

    /* The largest naturally aligned unit that is due next on the guest's side. */
    static inline size_t unit_at(uintptr_t guest, size_t n)
    {
        size_t unit = 8;
        while (unit > n || guest & (unit - 1))
            unit /= 2;
        return unit;
    }

    static inline uint64_t load_unit(const void *p, size_t unit)
    {
        switch (unit) {
        case 1: return __atomic_load_n((const uint8_t *)p, __ATOMIC_RELAXED);
        case 2: return __atomic_load_n((const uint16_t *)p, __ATOMIC_RELAXED);
        case 4: return __atomic_load_n((const uint32_t *)p, __ATOMIC_RELAXED);
        default: return __atomic_load_n((const uint64_t *)p, __ATOMIC_RELAXED);
        }
    }

    static inline void store_unit(void *p, uint64_t value, size_t unit)
    {
        switch (unit) {
        case 1: __atomic_store_n((uint8_t *)p, (uint8_t)value, __ATOMIC_RELAXED); break;
        case 2: __atomic_store_n((uint16_t *)p, (uint16_t)value, __ATOMIC_RELAXED); break;
        case 4: __atomic_store_n((uint32_t *)p, (uint32_t)value, __ATOMIC_RELAXED); break;
        default: __atomic_store_n((uint64_t *)p, value, __ATOMIC_RELAXED); break;
        }
    }

    /* Copies of up to 8 bytes go in the largest units that the guest's address is aligned to,
       whatever the alignment of the private side, so that no aligned value is ever torn. */
    static void copy_from_guest(void *to, const void *guest, size_t n)
    {
        if (n > 8) {
            memcpy(to, guest, n);
            return;
        }
        while (n) {
            size_t unit = unit_at((uintptr_t)guest, n);
            uint64_t value = load_unit(guest, unit);
            memcpy(to, &value, unit);
            to = (char *)to + unit, guest = (const char *)guest + unit, n -= unit;
        }
    }

    static void copy_to_guest(void *guest, const void *from, size_t n)
    {
        if (n > 8) {
            memcpy(guest, from, n);
            return;
        }
        while (n) {
            size_t unit = unit_at((uintptr_t)guest, n);
            uint64_t value = 0;
            memcpy(&value, from, unit);
            store_unit(guest, value, unit);
            guest = (char *)guest + unit, from = (const char *)from + unit, n -= unit;
        }
    }

    /* Read a byte of every page, so that those whose file is gone are found out. */
    static void touch_pages(const void *guest, size_t n)
    {
        const char *at = guest, *end = at + n;
        while (at < end) {
            load_unit(at, 1);
            at = (const char *)(((uintptr_t)at | 4095) + 1);
        }
    }

    #define BY_WIDTH(p, width, op) \\
        switch (width) { \\
        case 1: { uint8_t *at = p; op(uint8_t); break; } \\
        case 2: { uint16_t *at = p; op(uint16_t); break; } \\
        case 4: { uint32_t *at = p; op(uint32_t); break; } \\
        default: { uint64_t *at = p; op(uint64_t); break; } \\
        }

    static uint64_t load_atomic(void *p, int width, int order)
    {
        uint64_t value = 0;
    #define LOAD(type) \\
        value = order == __ATOMIC_RELAXED ? __atomic_load_n(at, __ATOMIC_RELAXED) \\
              : order == __ATOMIC_ACQUIRE ? __atomic_load_n(at, __ATOMIC_ACQUIRE) \\
              : __atomic_load_n(at, __ATOMIC_SEQ_CST)
        BY_WIDTH(p, width, LOAD)
        return value;
    }

    static void store_atomic(void *p, uint64_t value, int width, int order)
    {
    #define STORE(type) \\
        if (order == __ATOMIC_RELAXED) __atomic_store_n(at, (type)value, __ATOMIC_RELAXED); \\
        else if (order == __ATOMIC_RELEASE) __atomic_store_n(at, (type)value, __ATOMIC_RELEASE); \\
        else __atomic_store_n(at, (type)value, __ATOMIC_SEQ_CST)
        BY_WIDTH(p, width, STORE)
    }

    static int exchange_atomic(void *p, uint64_t *expected, uint64_t value, int width)
    {
        int done = 0;
    #define EXCHANGE(type) \\
        type seen = (type)*expected; \\
        done = __atomic_compare_exchange_n(at, &seen, (type)value, 0, __ATOMIC_SEQ_CST, \\
                                           __ATOMIC_SEQ_CST); \\
        *expected = seen
        BY_WIDTH(p, width, EXCHANGE)
        return done;
    }
    #endif
    """
    void copy_from_guest(void *to, const void *guest, size_t n)
    void copy_to_guest(void *guest, const void *source, size_t n)
    void touch_pages(const void *guest, size_t n)
    u64 load_atomic(void *, int width, int order)
    void store_atomic(void *, u64 value, int width, int order)
    bint exchange_atomic(void *, u64 *expected, u64 value, int width)


cdef enum:
    READ = 1
    WRITE = 2
