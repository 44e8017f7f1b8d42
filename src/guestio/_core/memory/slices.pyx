"""Slices: contiguous pieces of guest memory as this process sees them."""

from cpython.buffer cimport (
    PyBUF_CONTIG, PyBUF_CONTIG_RO, PyBUF_FORMAT, PyBUF_ND, PyBuffer_FillInfo,
    PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.pyport cimport PY_SSIZE_T_MAX
from libc.stdint cimport uintptr_t
from libc.string cimport memmove, memset

from guestio._core.base.naming cimport publish_type
from guestio._core.base.checks cimport Span, as_span, u8, u64
from guestio._core.base.capacity cimport HOLD_GIL_UP_TO
from guestio._core.base.atomics cimport (
    READ, WRITE, copy_from_guest, copy_to_guest, exchange_atomic, load_atomic, store_atomic,
)

import guestio.addr  # named in full where a default is, for that is how signatures find it
from guestio.addr import Ordering, Permissions, check_int
from guestio.errors import (
    InvalidAddressError,
    MemoryVanishedError,
    MisalignedError,
    PartialAccessError,
    PermissionDeniedError,
)

cdef enum:
    RELAXED = 0
    ACQUIRE = 2
    RELEASE = 3
    SEQ_CST = 5


cdef int as_width(object width) except -1:
    number = check_int(width, "width")
    if number not in (1, 2, 4, 8):
        raise ValueError(f"width {number} is not 1, 2, 4 or 8 bytes")
    return number


cdef int as_load_order(object ordering) except -1:
    number = check_int(ordering, "ordering")
    if number not in (RELAXED, ACQUIRE, SEQ_CST):
        raise ValueError(f"{Ordering(number).name} is not an ordering for a load")
    return number


cdef int as_store_order(object ordering) except -1:
    number = check_int(ordering, "ordering")
    if number not in (RELAXED, RELEASE, SEQ_CST):
        raise ValueError(f"{Ordering(number).name} is not an ordering for a store")
    return number


cdef u64 as_value(object value, int width) except? <u64>-1:
    number = check_int(value, "value")
    if number < 0 or number >> (8 * width):
        raise ValueError(f"value {number} does not fit in {width} unsigned bytes")
    return number


cdef class Loan:
    """How many buffers that may be written are out, of the slices of one piece of memory."""


cdef class VolatileSlice:
    """A contiguous piece of guest memory in this process.

    It offers the buffer protocol. What is written through the methods is marked dirty at once;
    what is written through a buffer (memoryview, numpy array) is when the buffer is released: then
    all of the slice counts as written. If the slice is part of a request or of a vector, it also
    does when that is completed or closed, so that the mark is there before the request is
    published as complete. What is written later, through a buffer that is kept, the writer marks. Offsets are
    bytes from the start of the slice. A slice keeps its memory alive. Slices come from regions and
    memories, not from a constructor.

    Accesses follow the rules of :class:`~guestio.GuestMemory`: 0 bytes always succeed, an access
    that begins outside raises :class:`~guestio.InvalidAddressError`, an exact one that ends
    outside moves what it can and raises :class:`~guestio.PartialAccessError`. If the file behind
    the memory was truncated they raise :class:`~guestio.MemoryVanishedError`.

    Attributes:
        bitmap: The bitmap that writes are marked in, or None.
        second: Another bitmap that writes are marked in, or None.
    """

    def __init__(self, *args, **kwargs):
        raise TypeError("slices come from regions and memories, or from VolatileSlice.over()")

    @staticmethod
    def over(buffer):
        """A slice over any contiguous buffer of this process, without dirty tracking."""
        cdef VolatileSlice made = VolatileSlice.__new__(VolatileSlice)
        cdef Py_buffer raw
        view = memoryview(buffer).cast("B")
        PyObject_GetBuffer(view, &raw, PyBUF_CONTIG_RO)
        made.owner, made.ptr, made.size = view, <u8 *>raw.buf, raw.len
        made.writable = not raw.readonly
        PyBuffer_Release(&raw)
        return made

    cdef VolatileSlice part(self, size_t at, size_t length):
        cdef VolatileSlice made = VolatileSlice.__new__(VolatileSlice)
        made.mapping, made.owner, made.spot = self.mapping, self.owner, self.spot
        made.ptr, made.size, made.writable = self.ptr + at, length, self.writable
        made.bitmap, made.bitmap_at = self.bitmap, self.bitmap_at + at
        made.second, made.second_at = self.second, self.second_at + at
        made.loan = self.loan
        return made

    cdef size_t end_of(self, object at, object length) except? <size_t>-1:
        """Check a range of the slice and return where it ends."""
        cdef Span span
        as_span(at, length, &span, True)
        if (span.first > self.size) if span.empty else (span.last >= self.size):
            raise InvalidAddressError(
                span.first, length, None, f"the slice is {self.size:#x} bytes long"
            )
        return span.first if span.empty else span.last + 1

    cdef size_t clip(self, object offset, object length, int access, size_t *at) except? <size_t>-1:
        """How many bytes of a range there are; 0 only if none were requested."""
        cdef Span span
        as_span(offset, length, &span, True)
        at[0] = 0
        if span.empty:
            return 0
        self.check_open(span.first, length, access)
        if span.last - span.first >= <u64>PY_SSIZE_T_MAX:
            raise InvalidAddressError(
                span.first, length, Permissions(access), "more than a process can address"
            )
        if span.first >= self.size:
            raise InvalidAddressError(
                span.first, length, Permissions(access),
                f"the slice is {self.size:#x} bytes long",
            )
        at[0] = span.first
        return min(span.last - span.first, self.size - 1 - span.first) + 1

    cdef int check_open(self, u64 at, object length, int access) except -1:
        if self.mapping is not None and self.mapping.ptr is NULL:
            raise ValueError("the memory of this slice is closed")
        if access & WRITE and not self.writable:
            raise PermissionDeniedError(at, length, Permissions.WRITE, "the memory is read-only")
        return 0

    cdef int check_there(self, size_t at, size_t length, int access) except -1:
        """Raise if the file behind these bytes was found to be gone."""
        if self.spot is not NULL and length:
            if self.spot.vanished < <uintptr_t>self.ptr + at + length:
                raise MemoryVanishedError(
                    at, length, Permissions(access),
                    "the file behind the memory was truncated by its owner",
                )
        return 0

    cdef void mark(self, size_t at, size_t length) noexcept:
        if self.bitmap is not None:
            self.bitmap.mark(self.bitmap_at + at, length)
        if self.second is not None:
            self.second.mark(self.second_at + at, length)

    cdef int finish_write(self, size_t at, size_t length) except -1:
        self.mark(at, length)
        return self.check_there(at, length, WRITE)

    def __len__(self):
        return self.size

    def __bool__(self):
        """True, also for an empty slice."""
        return True

    def __repr__(self):
        return f"<VolatileSlice of {self.size} bytes, {'writable' if self.writable else 'read-only'}>"

    @property
    def host_address(self):
        """Where the slice is in this process."""
        return <size_t>self.ptr

    @property
    def readonly(self):
        """Whether writing is refused."""
        return not self.writable

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if self.mapping is not None:
            if self.mapping.ptr is NULL:
                raise BufferError("the memory of this slice is closed")
            self.mapping.exports += 1
        try:
            PyBuffer_FillInfo(buffer, self, self.ptr, self.size, not self.writable, flags)
        except BaseException:
            if self.mapping is not None:
                self.mapping.exports -= 1
            raise
        # A memoryview writes without having asked for that. What asks for bytes only, does not.
        if self.writable and flags & ~PyBUF_ND:
            buffer.internal = <void *>self
            if self.loan is not None:
                self.loan.buffers += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        if buffer.internal is not NULL:
            self.mark(0, self.size)
            if self.loan is not None:
                self.loan.buffers -= 1
        if self.mapping is not None:
            self.mapping.exports -= 1

    def subslice(self, offset, length):
        """The piece ``[offset, offset + length)``, which may be empty.

        Raises:
            InvalidAddressError: It leaves the slice.
        """
        cdef size_t end = self.end_of(offset, length)
        return self.part(offset, end - <size_t>offset)

    def offset(self, count):
        """What remains after the first ``count`` bytes; raises as :meth:`subslice`."""
        self.end_of(count, 0)
        return self.part(count, self.size - <size_t>count)

    def split_at(self, middle):
        """The first ``middle`` bytes and the rest, as two slices; raises as :meth:`subslice`."""
        self.end_of(middle, 0)
        return self.part(0, middle), self.part(middle, self.size - <size_t>middle)

    def with_bitmap(self, AtomicBitmap bitmap, offset=0):
        """The same memory, marked in another bitmap, the slice's first byte being ``offset``.

        Raises:
            InvalidAddressError: ``offset`` and the slice's length sum to more than ``2**64``.
        """
        cdef VolatileSlice made = self.part(0, self.size)
        cdef Span span
        as_span(offset, self.size, &span, True)
        made.bitmap, made.bitmap_at = bitmap, span.first
        made.second = None
        return made

    cdef size_t copy_out(self, object offset, u8 *buffer, object length) except? <size_t>-1:
        cdef size_t at, n = self.clip(offset, length, READ, &at)
        if n > HOLD_GIL_UP_TO:
            with nogil:
                copy_from_guest(buffer, self.ptr + at, n)
        else:
            copy_from_guest(buffer, self.ptr + at, n)
        self.check_there(at, n, READ)
        return n

    cdef size_t copy_in(self, object offset, const u8 *buffer, object length) except? <size_t>-1:
        cdef size_t at, n = self.clip(offset, length, WRITE, &at)
        if n > HOLD_GIL_UP_TO:
            with nogil:
                copy_to_guest(self.ptr + at, buffer, n)
        else:
            copy_to_guest(self.ptr + at, buffer, n)
        self.finish_write(at, n)
        return n

    def read(self, offset=0, length=None):
        """A copy of exactly ``length`` bytes at ``offset``; None for all that follows."""
        cdef size_t at, n
        if length is None:
            self.end_of(offset, 0)
            length = self.size - <size_t>offset
        n = self.clip(offset, length, READ, &at)
        check_whole(n, offset, length, READ)
        cdef bytes data = PyBytes_FromStringAndSize(NULL, n)
        self.copy_out(offset, <u8 *>PyBytes_AS_STRING(data), length)
        return data

    def read_some(self, offset, buffer):
        """Fill ``buffer`` from ``offset`` on as far as the slice goes; the number of bytes."""
        return read_into(self, offset, buffer, False)

    def readinto(self, offset, buffer):
        """Fill ``buffer`` from ``offset`` on, exactly."""
        read_into(self, offset, buffer, True)

    def write(self, offset, data):
        """Copy all of ``data`` to ``offset``."""
        write_from(self, offset, data, True)

    def write_some(self, offset, data):
        """Copy as much of ``data`` to ``offset`` as there is room for; the number of bytes."""
        return write_from(self, offset, data, False)

    def fill(self, offset, length, value):
        """Set exactly ``length`` bytes to ``value``."""
        cdef int byte = as_value(value, 1)
        cdef size_t at, n = self.clip(offset, length, WRITE, &at)
        if n:  # a slice of nothing has no address
            with nogil:
                memset(self.ptr + at, byte, n)
        self.finish_write(at, n)
        check_whole(n, offset, length, WRITE)

    def copy_to(self, other):
        """Copy as much as both have, from the start of this to the start of the other.

        Args:
            other: Another slice, which may overlap, or a writable buffer of elements; then whole
                elements are copied.

        Returns:
            Bytes copied to a slice, elements copied to a buffer.
        """
        cdef Py_buffer view
        cdef size_t n
        if isinstance(other, VolatileSlice):
            return copy_between(self, <VolatileSlice>other)
        PyObject_GetBuffer(other, &view, PyBUF_CONTIG | PyBUF_FORMAT)
        try:
            n = whole_elements(self.size, &view)
            self.copy_out(0, <u8 *>view.buf, n)
            return n // max(view.itemsize, 1)
        finally:
            PyBuffer_Release(&view)

    def copy_from(self, source):
        """Copy as many whole elements of a buffer as fit to the start of the slice.

        Returns:
            The number of elements.
        """
        cdef Py_buffer view
        cdef size_t n
        PyObject_GetBuffer(source, &view, PyBUF_CONTIG_RO | PyBUF_FORMAT)
        try:
            n = whole_elements(self.size, &view)
            self.copy_in(0, <u8 *>view.buf, n)
            return n // max(view.itemsize, 1)
        finally:
            PyBuffer_Release(&view)

    cdef u8 *atomic_at(self, object offset, int width, int access, size_t *at) except NULL:
        at[0] = self.end_of(offset, width) - width
        self.check_open(at[0], width, access)
        if <uintptr_t>(self.ptr + at[0]) % width:
            raise MisalignedError(
                at[0], width, Permissions(access), f"it is not aligned to {width} bytes"
            )
        return self.ptr + at[0]

    def load(self, offset, width, ordering=guestio.addr.Ordering.SEQ_CST):
        """One atomic load of an unsigned, native-endian integer.

        Raises:
            MisalignedError: The memory is not aligned to ``width``.
            InvalidAddressError: It leaves the slice.
        """
        cdef int size = as_width(width), order = as_load_order(ordering)
        cdef size_t at
        cdef u64 value = load_atomic(self.atomic_at(offset, size, READ, &at), size, order)
        self.check_there(at, size, READ)
        return value

    def store(self, offset, value, width, ordering=guestio.addr.Ordering.SEQ_CST):
        """One atomic store of an unsigned, native-endian integer; raises as :meth:`load`."""
        cdef int size = as_width(width), order = as_store_order(ordering)
        cdef u64 number = as_value(value, size)
        cdef size_t at
        store_atomic(self.atomic_at(offset, size, WRITE, &at), number, size, order)
        self.finish_write(at, size)

    def compare_exchange(self, offset, expected, new, width):
        """Atomically put ``new`` where ``expected`` is; ``(whether it was, what was seen)``."""
        cdef int size = as_width(width)
        cdef u64 seen = as_value(expected, size), value = as_value(new, size)
        cdef size_t at
        cdef bint done = exchange_atomic(
            self.atomic_at(offset, size, READ | WRITE, &at), &seen, value, size
        )
        if done:
            self.finish_write(at, size)
        else:
            self.check_there(at, size, READ)
        return done, seen


cdef size_t read_into(
    VolatileSlice source, object offset, object buffer, bint whole
) except? <size_t>-1:
    """Fill a buffer as far as the slice goes, or exactly if ``whole``; the number of bytes."""
    cdef Py_buffer view
    cdef size_t n
    PyObject_GetBuffer(buffer, &view, PyBUF_CONTIG)
    try:
        n = source.copy_out(offset, <u8 *>view.buf, view.len)
        if whole:
            check_whole(n, offset, view.len, READ)
        return n
    finally:
        PyBuffer_Release(&view)


cdef size_t write_from(
    VolatileSlice target, object offset, object data, bint whole
) except? <size_t>-1:
    """Copy from a buffer as far as the slice goes, or all if ``whole``; the number of bytes."""
    cdef Py_buffer view
    cdef size_t n
    PyObject_GetBuffer(data, &view, PyBUF_CONTIG_RO)
    try:
        n = target.copy_in(offset, <u8 *>view.buf, view.len)
        if whole:
            check_whole(n, offset, view.len, WRITE)
        return n
    finally:
        PyBuffer_Release(&view)


cdef int check_whole(size_t done, object offset, object length, int access) except -1:
    if done != length:
        raise PartialAccessError(
            offset, length, Permissions(access), done, "the slice ends there"
        )
    return 0


cdef size_t whole_elements(size_t room, const Py_buffer *view) noexcept:
    """The bytes of as many whole elements of a buffer as fit."""
    cdef size_t item = max(view.itemsize, 1)
    return min(room, <size_t>view.len) // item * item


cdef size_t copy_between(VolatileSlice source, VolatileSlice target) except? <size_t>-1:
    cdef size_t n = min(source.size, target.size)
    cdef u64 small = 0
    if not n:
        return 0
    source.check_open(0, n, READ)
    target.check_open(0, n, WRITE)
    if n <= sizeof(small):
        copy_from_guest(&small, source.ptr, n)
        copy_to_guest(target.ptr, &small, n)
    else:
        with nogil:
            memmove(target.ptr, source.ptr, n)
    target.finish_write(0, n)
    source.check_there(0, n, READ)
    return n


publish_type(VolatileSlice, "guestio.memory.VolatileSlice", "VolatileSlice(*args, **kwargs)\n--\n\n")
