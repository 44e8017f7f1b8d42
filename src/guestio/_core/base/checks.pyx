"""The border between Python numbers and C ones: each value is checked once, here."""

import numpy as np

from cpython.long cimport PyLong_AsLongAndOverflow
from libc.math cimport INFINITY

from guestio.addr import ADDRESS_SPACE, check_address, check_int, check_range, shown


cdef u64 as_address(object value, str name="addr") except? <u64>-1:
    if PyLong_CheckExact(value):
        try:
            return PyLong_AsUnsignedLongLong(value)
        except OverflowError:
            pass
    return <u64>check_address(value, name)


cdef int as_span(object start, object length, Span *out, bint may_be_empty) except -1:
    """Turn a start and a length into a span; their sum may be 2**64 but not more."""
    cdef u64 first, size
    if PyLong_CheckExact(start) and PyLong_CheckExact(length):
        try:
            first = PyLong_AsUnsignedLongLong(start)
            size = PyLong_AsUnsignedLongLong(length)
            if size and size - 1 <= UINT64_MAX - first:
                out.first, out.last, out.empty = first, first + (size - 1), False
                return 0
        except OverflowError:
            pass
    start, length = check_range(start, length, empty=may_be_empty)
    out.first = start
    out.empty = length == 0
    out.last = out.first if out.empty else <u64>(start + length - 1)
    return 0


cdef size_t as_size(object value, str name) except? <size_t>-1:
    value = check_int(value, name)
    if not 0 <= value < 1 << 63:
        raise ValueError(f"{name} {shown(value)} is not in [0, 2**63)")
    return value


cdef double as_seconds(object value, str name, double most) except -1:
    """A time from 0 to ``most``; the conversion of anything else to an integer is undefined in C."""
    cdef double number
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    try:
        number = value
    except OverflowError:
        number = INFINITY if value > 0 else -INFINITY
    if not 0 <= number <= most:
        upto = "or more" if most == INFINITY else f"to {most:g}"
        raise ValueError(f"{name} must be 0 {upto} seconds, not {number:g}")
    return number


cdef double as_moment(double value, str name) except? -1:
    """A point in time, which may be infinitely far away, but must be one."""
    if value != value:
        raise ValueError(f"{name} must be a time in seconds, not {value}")
    return value


cdef int as_milliseconds(double seconds) noexcept nogil:
    """A time to wait, rounded up, as system calls want it: at most 11 days; 0 if it is over."""
    if not seconds > 0:
        return 0
    return <int>(seconds * 1000 + 0.999) if seconds < 1e6 else 1_000_000_000


cdef int as_access(object value, str name="access") except -1:
    cdef int overflow
    cdef long number
    if isinstance(value, int) and value is not True and value is not False:
        number = PyLong_AsLongAndOverflow(value, &overflow)
    else:
        number = check_int(value, name)
    if not 0 <= number <= 3:
        raise ValueError(f"{name} {shown(int(value))} is not a combination of READ and WRITE")
    return number


cdef object span_length(u64 first, u64 last):
    if last - first == UINT64_MAX:
        return ADDRESS_SPACE
    return last - first + 1


cdef int as_fd(object value) except -1:
    """A number that could be a file descriptor."""
    number = check_int(value, "fd")
    if not 0 <= number < 1 << 31:
        raise ValueError(f"fd {shown(number)} is not a file descriptor")
    return number


cdef object as_u64_array(object values, str name):
    """An array of integers, a list of them or a single one as a contiguous ``uint64`` array."""
    if isinstance(values, np.ndarray):
        if values.ndim > 1:
            raise ValueError(f"{name} must have one dimension, not {values.ndim}")
        if values.dtype.kind not in "ui":
            raise TypeError(f"{name} must be integers that fit in 64 bits, not {values.dtype}")
        if values.dtype.kind == "i" and values.size and values.min() < 0:
            raise ValueError(f"{name} must not be negative")
        return np.ascontiguousarray(values, dtype=np.uint64).reshape(-1)
    if isinstance(values, (str, bytes, bytearray)):
        raise TypeError(f"{name} must be integers, not {type(values).__name__}")
    if isinstance(values, (list, tuple)):
        return np.array([as_address(value, name) for value in values], np.uint64)
    return np.array([as_address(values, name)], np.uint64)
