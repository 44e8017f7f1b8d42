"""Which build of the core this is: tests must not take one for another."""

cdef extern from *:
    """
    #ifdef GUESTIO_CHECKS
    enum { CHECKED = 1 };
    #else
    enum { CHECKED = 0 };
    #endif
    """
    const char *GUESTIO_CORE
    bint CHECKED

NAME: str = GUESTIO_CORE.decode()
CHECKS: bool = bool(CHECKED)
