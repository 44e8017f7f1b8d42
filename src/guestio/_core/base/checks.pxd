"""The border between Python numbers and C ones: each value is checked once, here."""

from cpython.long cimport PyLong_AsUnsignedLongLong, PyLong_CheckExact
from libc.stdint cimport UINT64_MAX, uint8_t, uint32_t, uint64_t

ctypedef uint64_t u64
ctypedef uint32_t u32
ctypedef uint8_t u8


cdef struct Span:
    # Inclusive, so that the last byte of the space is reachable; meaningless when empty.
    u64 first
    u64 last
    bint empty


cdef u64 as_address(object value, str name=*) except? <u64>-1
cdef int as_span(object start, object length, Span *out, bint may_be_empty) except -1
cdef size_t as_size(object value, str name) except? <size_t>-1
cdef double as_seconds(object value, str name, double most) except -1
cdef double as_moment(double value, str name) except? -1
cdef int as_milliseconds(double seconds) noexcept nogil
cdef int as_fd(object value) except -1
cdef int as_access(object value, str name=*) except -1
cdef object span_length(u64 first, u64 last)
cdef object as_u64_array(object values, str name)
