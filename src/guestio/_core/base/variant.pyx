"""Which build of the core this is: tests must not take one for another."""

from guestio._core.base cimport capacity

cdef extern from *:
    """
    #ifdef GUESTIO_CHECKS
    enum { CHECKED = 1 };
    #else
    enum { CHECKED = 0 };
    #endif
    #if defined(__clang__)
    #define GUESTIO_COMPILER __VERSION__
    #elif defined(__GNUC__)
    #define GUESTIO_COMPILER "GCC " __VERSION__
    #else
    #define GUESTIO_COMPILER "unknown"
    #endif
    """
    const char *GUESTIO_CORE
    const char *GUESTIO_COMPILER
    bint CHECKED

NAME: str = GUESTIO_CORE.decode()
COMPILER: str = GUESTIO_COMPILER.decode()
CHECKS: bool = bool(CHECKED)
CAPACITIES: dict[str, int] = {
    "TREE_FANOUT": capacity.TREE_FANOUT,
    "EVICTION_KEPT": capacity.EVICTION_KEPT,
    "EVICTION_STALE": capacity.EVICTION_STALE,
    "HOLD_GIL_UP_TO": capacity.HOLD_GIL_UP_TO,
    "IOV_BATCH": capacity.IOV_BATCH,
    "MISS_SLOTS": capacity.MISS_SLOTS,
    "READ_AHEAD": capacity.READ_AHEAD,
    "RING_LOOK_WORK": capacity.RING_LOOK_WORK,
    "RING_PUBLISH_EACH": capacity.RING_PUBLISH_EACH,
    "LOOP_REQUESTS": capacity.LOOP_REQUESTS,
    "LOAD_ANSWERS": capacity.LOAD_ANSWERS,
}
