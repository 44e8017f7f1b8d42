"""Guest memory as this process sees it: slices, gathered vectors, and the way to them.

A :class:`RegionTable` knows where guest addresses are in this process, an :class:`AddressSpace`
puts a translation in front of it, and both end in an :class:`IoVector`: the host memory behind a
range of addresses, held against revocation until it is closed. All copying, atomic access, file
I/O and dirty marking is done here and nowhere else.

Guest memory changes under our hands at any time. It is read once into private memory before it is
judged, aligned accesses of up to 8 bytes are single instructions, and a page that its owner took
away is an error for the access that met it.
"""

from cpython.buffer cimport (
    PyBUF_CONTIG, PyBUF_CONTIG_RO, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals, PyErr_NoMemory
from cpython.pyport cimport PY_SSIZE_T_MAX
from libc.errno cimport EINTR, errno
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset

from guestio._core.border cimport as_access, as_address, as_size, as_span

import os

from guestio.addr import Ordering, Permissions, check_int
from guestio.errors import (
    InvalidAddressError,
    IotlbFails,
    MemoryVanishedError,
    MisalignedError,
    PermissionDeniedError,
)

cdef extern from * nogil:
    """
    #define _GNU_SOURCE
    #include <string.h>
    #include <sys/uio.h>

    #define MOVE(type) \\
        __atomic_store_n((type *)to, __atomic_load_n((const type *)from, __ATOMIC_RELAXED), \\
                         __ATOMIC_RELAXED)

    /* Small copies go in the largest aligned units, so that no aligned value is ever torn. */
    static void copy_bytes(void *dst, const void *src, size_t n)
    {
        char *to = dst;
        const char *from = src;
        if (n > 8) {
            memcpy(to, from, n);
            return;
        }
        while (n) {
            uintptr_t both = (uintptr_t)to | (uintptr_t)from;
            size_t unit;
            if (n >= 8 && !(both & 7)) {
                unit = 8, MOVE(uint64_t);
            } else if (n >= 4 && !(both & 3)) {
                unit = 4, MOVE(uint32_t);
            } else if (n >= 2 && !(both & 1)) {
                unit = 2, MOVE(uint16_t);
            } else {
                unit = 1, MOVE(uint8_t);
            }
            to += unit, from += unit, n -= unit;
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
    """
    void copy_bytes(void *, const void *, size_t)
    u64 load_atomic(void *, int width, int order)
    void store_atomic(void *, u64 value, int width, int order)
    bint exchange_atomic(void *, u64 *expected, u64 value, int width)
    Py_ssize_t preadv(int, iovec *, int, long)
    Py_ssize_t pwritev(int, iovec *, int, long)
    Py_ssize_t readv(int, iovec *, int)
    Py_ssize_t writev(int, iovec *, int)

cdef enum:
    READ = 1
    WRITE = 2
    RELAXED = 0
    ACQUIRE = 2
    RELEASE = 3
    ACQ_REL = 4
    SEQ_CST = 5
    IOV_BATCH = 1024       # IOV_MAX of Linux
    HOLD_GIL_UP_TO = 16384 # a copy of this size costs less than handing the GIL over


cdef int as_width(object width) except -1:
    number = check_int(width, "width")
    if number not in (1, 2, 4, 8):
        raise ValueError(f"width {number} is not 1, 2, 4 or 8 bytes")
    return number


cdef int as_load_order(object ordering) except -1:
    if ordering not in (RELAXED, ACQUIRE, SEQ_CST):
        raise ValueError(f"{Ordering(ordering).name} is not an ordering for a load")
    return ordering


cdef int as_store_order(object ordering) except -1:
    if ordering not in (RELAXED, RELEASE, SEQ_CST):
        raise ValueError(f"{Ordering(ordering).name} is not an ordering for a store")
    return ordering


cdef u64 as_value(object value, int width) except? <u64>-1:
    number = check_int(value, "value")
    if number < 0 or number >> (8 * width):
        raise ValueError(f"value {number} does not fit in {width} unsigned bytes")
    return number


cdef class VolatileSlice:
    """A contiguous piece of guest memory in this process.

    It offers the buffer protocol; what is written through a buffer is not dirty-tracked, what is
    written through the methods is. Offsets are bytes from the start of the slice. A slice keeps
    its memory alive. Slices come from regions and memories, not from a constructor.

    Attributes:
        bitmap: The bitmap that writes are marked in, or None.
        second: Another bitmap that writes are marked in, or None.
    """

    def __init__(self):
        raise TypeError("slices come from regions and memories, or from VolatileSlice.over()")

    @staticmethod
    def over(buffer):
        """A slice over any writable buffer of this process, without dirty tracking."""
        cdef VolatileSlice made = VolatileSlice.__new__(VolatileSlice)
        view = memoryview(buffer).cast("B")
        cdef Py_buffer raw
        PyObject_GetBuffer(view, &raw, PyBUF_CONTIG)
        made.owner, made.ptr, made.size, made.writable = view, <u8 *>raw.buf, raw.len, True
        PyBuffer_Release(&raw)
        return made

    cdef VolatileSlice part(self, size_t at, size_t length):
        cdef VolatileSlice made = VolatileSlice.__new__(VolatileSlice)
        made.mapping, made.owner, made.spot = self.mapping, self.owner, self.spot
        made.ptr, made.size, made.writable = self.ptr + at, length, self.writable
        made.bitmap, made.bitmap_at = self.bitmap, self.bitmap_at + at
        made.second, made.second_at = self.second, self.second_at + at
        return made

    cdef size_t end_of(self, object at, object length) except? <size_t>-1:
        """Check a range of the slice and return where it ends."""
        cdef Span span
        as_span(at, length, &span, True)
        cdef u64 end = span.first if span.empty else span.last + 1
        if end > self.size or (not span.empty and span.last == <u64>-1):
            raise InvalidAddressError(
                span.first, length, None, f"the slice is {self.size:#x} bytes long"
            )
        return end

    cdef int check_there(self, size_t at, size_t length, int access) except -1:
        if self.mapping is not None and self.mapping.ptr is NULL:
            raise ValueError("the memory of this slice is closed")
        if access & WRITE and not self.writable:
            raise PermissionDeniedError(at, length, Permissions.WRITE, "the memory is read-only")
        if self.spot is not NULL and length:
            if self.spot.vanished < <uintptr_t>self.ptr + at + length:
                raise MemoryVanishedError(
                    at, length, Permissions(access), "the file behind the memory was truncated"
                )
        return 0

    def __len__(self):
        return self.size

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

    def __releasebuffer__(self, Py_buffer *buffer):
        if self.mapping is not None:
            self.mapping.exports -= 1

    def subslice(self, offset, length):
        """The piece ``[offset, offset + length)``.

        Raises:
            InvalidAddressError: It leaves the slice.
        """
        cdef size_t end = self.end_of(offset, length)
        return self.part(offset, end - <size_t>offset)

    def offset(self, count):
        """What remains after the first ``count`` bytes."""
        self.end_of(count, 0)
        return self.part(count, self.size - <size_t>count)

    def split_at(self, middle):
        """The first ``middle`` bytes and the rest, as two slices."""
        self.end_of(middle, 0)
        return self.part(0, middle), self.part(middle, self.size - <size_t>middle)

    def with_bitmap(self, AtomicBitmap bitmap, offset=0):
        """The same memory, marked in another bitmap, the slice's first byte being ``offset``."""
        cdef VolatileSlice made = self.part(0, self.size)
        made.bitmap, made.bitmap_at = bitmap, as_address(offset, "offset")
        made.second = None
        return made

    def read(self, offset=0, length=None):
        """A copy of ``length`` bytes at ``offset``; None for all that follows."""
        self.end_of(offset, 0)
        if length is None:
            length = self.size - <size_t>offset
        with IoVector.of_slices([self.subslice(offset, length)], READ) as vector:
            return vector.read()

    def readinto(self, offset, buffer):
        """Fill ``buffer`` from ``offset`` on."""
        view = memoryview(buffer).cast("B")
        with IoVector.of_slices([self.subslice(offset, len(view))], READ) as vector:
            vector.readinto(view)

    def write(self, offset, data):
        """Copy all of ``data`` to ``offset``."""
        view = memoryview(data).cast("B")
        with IoVector.of_slices([self.subslice(offset, len(view))], WRITE) as vector:
            vector.write(view)

    def fill(self, offset, length, value):
        """Set ``length`` bytes to ``value``."""
        with IoVector.of_slices([self.subslice(offset, length)], WRITE) as vector:
            vector.fill(value)

    def copy_to(self, VolatileSlice other):
        """Copy as many bytes as both have to the start of another slice; overlap is allowed.

        Returns:
            The number of bytes.
        """
        cdef size_t n = min(self.size, other.size)
        cdef bytes between
        if not n:
            return 0
        between = self.read(0, n)
        other.write(0, between)
        return n

    def load(self, offset, width, ordering=SEQ_CST):
        """One atomic load of an unsigned, native-endian integer.

        Raises:
            MisalignedError: The memory is not aligned to ``width``.
        """
        with IoVector.of_slices([self.subslice(offset, as_width(width))], READ) as vector:
            return vector.load(width, ordering)

    def store(self, offset, value, width, ordering=SEQ_CST):
        """One atomic store of an unsigned, native-endian integer."""
        with IoVector.of_slices([self.subslice(offset, as_width(width))], WRITE) as vector:
            vector.store(value, width, ordering)

    def compare_exchange(self, offset, expected, new, width):
        """Atomically put ``new`` where ``expected`` is; ``(whether it was, what was seen)``."""
        with IoVector.of_slices([self.subslice(offset, as_width(width))], READ | WRITE) as vector:
            return vector.compare_exchange(expected, new, width)


cdef class RegionTable:
    """Where guest physical addresses are in this process; never changes once made.

    Args:
        regions: ``(start, mapping, offset, size, writable, bitmap)`` each, ascending and disjoint:
            ``size`` bytes of ``mapping`` from ``offset`` appear at ``start``.
    """

    def __cinit__(self, list regions):
        cdef HostMapping mapping
        cdef int i
        cdef size_t n = max(len(regions), 1)
        self.mappings, self.bitmaps = [], []
        self.first = <u64 *>realloc(NULL, n * sizeof(u64))
        self.last = <u64 *>realloc(NULL, n * sizeof(u64))
        self.host = <u8 **>realloc(NULL, n * sizeof(u8 *))
        self.origin = <Origin *>realloc(NULL, n * sizeof(Origin))
        if not (self.first and self.last and self.host and self.origin):
            PyErr_NoMemory()
        for i, (start, mapping, offset, size, writable, bitmap) in enumerate(regions):
            if mapping.ptr is NULL or offset + size > mapping.size:
                raise ValueError(f"region {start:#x}+{size:#x} leaves its mapping")
            self.first[i], self.last[i] = start, start + size - 1
            self.host[i] = mapping.ptr + <size_t>offset
            self.origin[i].spot = mapping.spot
            self.origin[i].bitmap = <void *>bitmap if bitmap is not None else NULL
            self.origin[i].offset, self.origin[i].second = 0, NULL
            self.origin[i].second_offset = 0
            self.origin[i].writable = writable and mapping.writable
            self.mappings.append(mapping)
            self.bitmaps.append(bitmap)
            # A table is a user of the memory: a mapping under it must not be closed.
            mapping.exports += 1
            self.count += 1

    def __dealloc__(self):
        cdef HostMapping mapping
        if self.mappings is not None:
            for mapping in self.mappings:
                mapping.exports -= 1
        free(self.first)
        free(self.last)
        free(self.host)
        free(self.origin)

    cdef int find(self, u64 addr) noexcept nogil:
        """Index of the region that holds ``addr``, or -1. O(log n)."""
        cdef int low = 0, high = self.count, middle
        while low < high:
            middle = (low + high) // 2
            if self.first[middle] <= addr:
                low = middle + 1
            else:
                high = middle
        return low - 1 if low and addr <= self.last[low - 1] else -1


cdef class IoVector:
    """The host memory behind a range of addresses, ready to be read, written or handed to a file.

    It is a context manager; until it is closed, a revocation of the translation that it came from
    waits. If memory ended or refused the access somewhere, the vector holds what comes before and
    ``stop`` says why. Offsets are bytes from the start of the range. One thread at a time.

    Attributes:
        start: First address of the range.
        total: Bytes held.
        count: Fragments they are in.
        access: What the memory was opened for, as a number of ``Permissions``.
        stop: 0, or why it holds less than was asked for: 1 no memory, 2 read-only.
        stop_addr: The address that was refused.
        stop_target: The same address behind the translation.
    """

    @staticmethod
    def of_slices(list slices, int access):
        """A vector over slices, in their order. Fragments are addressed by their position."""
        cdef IoVector made = IoVector()
        cdef VolatileSlice piece
        cdef Origin origin
        made.access, made.slices_held = access, slices
        for piece in slices:
            piece.check_there(0, piece.size, access)
            origin.spot, origin.writable = piece.spot, piece.writable
            origin.bitmap = <void *>piece.bitmap if piece.bitmap is not None else NULL
            origin.second = <void *>piece.second if piece.second is not None else NULL
            origin.offset, origin.second_offset = piece.bitmap_at, piece.second_at
            made.push(piece.ptr, piece.size, made.total, &origin)
        return made

    def __dealloc__(self):
        self.release()
        free(self.vec)
        free(self.origin)
        free(self.addr)
        free(self.lease)

    cdef int push(self, void *base, size_t size, u64 addr, const Origin *origin) except -1:
        cdef int room
        cdef void *grown
        if not size:
            return 0
        if self.count == self.capacity:
            room = self.capacity * 2 + 4
            grown = realloc(self.vec, room * sizeof(iovec))
            if grown is NULL:
                PyErr_NoMemory()
            self.vec = <iovec *>grown
            grown = realloc(self.origin, room * sizeof(Origin))
            if grown is NULL:
                PyErr_NoMemory()
            self.origin = <Origin *>grown
            grown = realloc(self.addr, room * sizeof(u64))
            if grown is NULL:
                PyErr_NoMemory()
            self.addr = <u64 *>grown
            self.capacity = room
        self.vec[self.count].iov_base, self.vec[self.count].iov_len = base, size
        self.origin[self.count] = origin[0]
        self.addr[self.count] = addr
        self.count += 1
        self.total += size
        return 0

    cdef int push_lease(self, Leases leases, u64 first, u64 last) except -1:
        cdef void *grown
        if self.lease_count == self.lease_capacity:
            grown = realloc(self.lease, (self.lease_capacity * 2 + 4) * sizeof(int))
            if grown is NULL:
                PyErr_NoMemory()
            self.lease = <int *>grown
            self.lease_capacity = self.lease_capacity * 2 + 4
        self.leases = leases
        self.lease[self.lease_count] = leases.enter(first, last)
        self.lease_count += 1
        return 0

    cdef u64 append_region(
        self, RegionTable table, u64 addr, u64 target, u64 length, int access,
        AtomicBitmap second, bint mark_regions,
    ) except? <u64>-1:
        """Append the memory behind ``[target, target + length)``, as far as it goes.

        Returns the bytes appended; `stop` is set if they are fewer than asked for.
        """
        cdef u64 done = 0, inside, n
        cdef Origin origin
        cdef int i = table.find(target)
        self.table, self.second = table, second
        while done < length:
            if i < 0 or i >= table.count or table.first[i] > target + done:
                self.stop = STOP_HOLE
            elif access & WRITE and not table.origin[i].writable:
                self.stop = STOP_READ_ONLY
            if self.stop:
                self.stop_addr, self.stop_target = addr + done, target + done
                break
            inside = target + done - table.first[i]
            n = min(length - done, table.last[i] - (target + done) + 1)
            origin = table.origin[i]
            origin.offset = inside
            if not mark_regions:
                origin.bitmap = NULL
            if second is not None:
                origin.second, origin.second_offset = <void *>second, addr + done
            self.push(table.host[i] + inside, n, addr + done, &origin)
            done += n
            i += 1
            if target + done == 0 and done < length:
                i = table.count
        return done

    cdef void rewind(self, int count, u64 total, int leases) noexcept:
        """Forget what was appended since the given state."""
        while self.lease_count > leases:
            self.lease_count -= 1
            self.leases.leave(self.lease[self.lease_count])
        self.count, self.total, self.stop = count, total, STOP_NONE

    cdef void release(self) noexcept:
        self.rewind(0, 0, 0)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def hold(self, guard):
        """Leave this context manager when the vector is closed."""
        self.guard = guard

    def close(self):
        """Give the translation back; the vector is empty afterwards."""
        self.release()
        guard, self.guard = self.guard, None
        if guard is not None:
            guard.__exit__(None, None, None)

    def __len__(self):
        return self.total

    def fragments(self):
        """``(address, length)`` of each fragment, in order."""
        return [(self.addr[i], self.vec[i].iov_len) for i in range(self.count)]

    def slices(self):
        """The fragments as :class:`VolatileSlice`; they do not hold the translation."""
        cdef list made = []
        cdef VolatileSlice piece
        cdef int i
        for i in range(self.count):
            if self.slices_held is not None:
                made.append(self.slices_held[i])
                continue
            piece = VolatileSlice.__new__(VolatileSlice)
            piece.mapping = self.table.mappings[self.mapping_of(i)]
            piece.owner, piece.spot = self.table, self.origin[i].spot
            piece.ptr, piece.size = <u8 *>self.vec[i].iov_base, self.vec[i].iov_len
            piece.writable = bool(self.access & WRITE) and self.origin[i].writable
            if self.origin[i].bitmap is not NULL:
                piece.bitmap = <AtomicBitmap>self.origin[i].bitmap
            piece.bitmap_at = self.origin[i].offset
            if self.origin[i].second is not NULL:
                piece.second = <AtomicBitmap>self.origin[i].second
            piece.second_at = self.origin[i].second_offset
            made.append(piece)
        return made

    cdef int mapping_of(self, int fragment):
        cdef int i
        for i in range(self.table.count):
            if self.table.origin[i].spot is self.origin[fragment].spot:
                return i
        return 0

    cdef bint vanished(self, u64 start, u64 count) noexcept nogil:
        """Whether a window touches memory whose file is gone."""
        cdef int i = 0
        cdef u64 n
        while count and i < self.count:
            if start >= self.vec[i].iov_len:
                start -= self.vec[i].iov_len
            else:
                n = min(self.vec[i].iov_len - start, count)
                if self.origin[i].spot is not NULL and self.origin[i].spot.vanished < (
                    <uintptr_t>self.vec[i].iov_base + start + n
                ):
                    return True
                count -= n
                start = 0
            i += 1
        return False

    cdef void mark(self, u64 start, u64 count) noexcept nogil:
        """Record a window as written."""
        cdef int i = 0
        cdef u64 n
        while count and i < self.count:
            if start >= self.vec[i].iov_len:
                start -= self.vec[i].iov_len
            else:
                n = min(self.vec[i].iov_len - start, count)
                if self.origin[i].bitmap is not NULL:
                    (<AtomicBitmap>self.origin[i].bitmap).mark(self.origin[i].offset + start, n)
                if self.origin[i].second is not NULL:
                    (<AtomicBitmap>self.origin[i].second).mark(
                        self.origin[i].second_offset + start, n
                    )
                count -= n
                start = 0
            i += 1

    cdef u64 transfer(self, u8 *buffer, u64 start, u64 count, bint to_guest) noexcept nogil:
        """Copy between a private buffer and a window; NULL stands for zeroes."""
        cdef int i = 0
        cdef u64 n, done = 0
        cdef u8 *at
        while done < count and i < self.count:
            if start >= self.vec[i].iov_len:
                start -= self.vec[i].iov_len
            else:
                n = min(self.vec[i].iov_len - start, count - done)
                at = <u8 *>self.vec[i].iov_base + start
                if to_guest:
                    copy_bytes(at, buffer + done, n)
                else:
                    copy_bytes(buffer + done, at, n)
                done += n
                start = 0
            i += 1
        return done

    cdef object gone(self, u64 start):
        return MemoryVanishedError(
            self.start + start, self.total, Permissions(self.access),
            "the file behind the memory was truncated by its owner",
        )

    cdef int check_window(self, object start, object count, u64 *at, u64 *length) except -1:
        cdef Span span
        as_span(start, self.total - start if count is None else count, &span, True)
        at[0] = span.first
        length[0] = 0 if span.empty else span.last - span.first + 1
        if span.first > self.total or length[0] > self.total - span.first:
            raise InvalidAddressError(
                span.first, length[0], Permissions(self.access),
                f"the vector holds {self.total:#x} bytes",
            )
        return 0

    cdef int check_writable(self) except -1:
        if not self.access & WRITE:
            raise PermissionDeniedError(
                self.start, self.total, Permissions.WRITE, "it was opened for reading only"
            )
        return 0

    def read(self, start=0, count=None):
        """A copy of a window as bytes; None for all that follows ``start``.

        Raises:
            MemoryVanishedError: The file behind the memory is gone.
            InvalidAddressError: The window leaves the vector.
        """
        cdef u64 at, length
        self.check_window(start, count, &at, &length)
        cdef bytes data = PyBytes_FromStringAndSize(NULL, length)
        self.copy_out(<u8 *>PyBytes_AS_STRING(data), at, length)
        return data

    cdef int copy_out(self, u8 *buffer, u64 at, u64 length) except -1:
        if length > HOLD_GIL_UP_TO:
            with nogil:
                self.transfer(buffer, at, length, False)
        else:
            self.transfer(buffer, at, length, False)
        if self.vanished(at, length):
            raise self.gone(at)
        return 0

    def readinto(self, buffer, start=0):
        """Fill ``buffer`` from a window of its size."""
        cdef u64 at, length
        cdef Py_buffer view
        PyObject_GetBuffer(buffer, &view, PyBUF_CONTIG)
        try:
            self.check_window(start, view.len, &at, &length)
            self.copy_out(<u8 *>view.buf, at, length)
        finally:
            PyBuffer_Release(&view)

    def write(self, data, start=0):
        """Copy all of ``data`` to ``start`` and mark it dirty."""
        cdef u64 at, length
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_CONTIG_RO)
        try:
            self.check_writable()
            self.check_window(start, view.len, &at, &length)
            if length > HOLD_GIL_UP_TO:
                with nogil:
                    self.transfer(<u8 *>view.buf, at, length, True)
            else:
                self.transfer(<u8 *>view.buf, at, length, True)
        finally:
            PyBuffer_Release(&view)
        self.finish_write(at, length)

    cdef int finish_write(self, u64 at, u64 length) except -1:
        self.mark(at, length)
        if self.vanished(at, length):
            raise self.gone(at)
        return 0

    def fill(self, value, start=0, count=None):
        """Set every byte of a window to ``value`` and mark it dirty."""
        cdef u64 at, length, n, done = 0, skip
        cdef int byte = as_value(value, 1), i = 0
        self.check_writable()
        self.check_window(start, count, &at, &length)
        skip = at
        while done < length and i < self.count:
            if skip >= self.vec[i].iov_len:
                skip -= self.vec[i].iov_len
            else:
                n = min(self.vec[i].iov_len - skip, length - done)
                memset(<u8 *>self.vec[i].iov_base + skip, byte, n)
                done += n
                skip = 0
            i += 1
        self.finish_write(at, length)

    cdef void *atomic_at(self, int width) except NULL:
        if self.total != <u64>width or self.count != 1:
            raise MisalignedError(
                self.start, width, Permissions(self.access),
                "an atomic access must lie within one region, contiguously",
            )
        if <uintptr_t>self.vec[0].iov_base % width:
            raise MisalignedError(
                self.start, width, Permissions(self.access), f"it is not aligned to {width} bytes"
            )
        return self.vec[0].iov_base

    def load(self, width, ordering=SEQ_CST):
        """One atomic load; the vector must be one aligned fragment of ``width`` bytes."""
        cdef int size = as_width(width), order = as_load_order(ordering)
        cdef u64 value = load_atomic(self.atomic_at(size), size, order)
        if self.vanished(0, size):
            raise self.gone(0)
        return value

    def store(self, value, width, ordering=SEQ_CST):
        """One atomic store; the vector must be one aligned fragment of ``width`` bytes."""
        cdef int size = as_width(width), order = as_store_order(ordering)
        cdef u64 number = as_value(value, size)
        self.check_writable()
        store_atomic(self.atomic_at(size), number, size, order)
        self.finish_write(0, size)

    def compare_exchange(self, expected, new, width):
        """Atomically put ``new`` where ``expected`` is, sequentially consistent.

        Returns:
            ``(done, seen)``: whether it was put there, and the value found.
        """
        cdef int size = as_width(width)
        cdef u64 seen = as_value(expected, size), value = as_value(new, size)
        cdef bint done
        self.check_writable()
        done = exchange_atomic(self.atomic_at(size), &seen, value, size)
        if done:
            self.finish_write(0, size)
        elif self.vanished(0, size):
            raise self.gone(0)
        return done, seen

    cdef int window_batch(self, u64 start, u64 count, iovec *batch) noexcept nogil:
        """Fill ``batch`` with the start of a window; the number of entries."""
        cdef int i = 0, used = 0
        cdef u64 n
        while count and i < self.count and used < IOV_BATCH:
            if start >= self.vec[i].iov_len:
                start -= self.vec[i].iov_len
            else:
                n = min(self.vec[i].iov_len - start, count)
                batch[used].iov_base = <u8 *>self.vec[i].iov_base + start
                batch[used].iov_len = n
                used += 1
                count -= n
                start = 0
            i += 1
        return used

    def from_file(self, int fd, file_offset=None, start=0, count=None, *, bint once=False):
        """Read from a file straight into a window (preadv, or readv where the offset is None).

        Args:
            fd: File descriptor.
            file_offset: Where in the file, or None for its own position (pipes, sockets).
            start: First byte of the window.
            count: Bytes at most; None for all that follows.
            once: Return after one successful call, as a stream wants it.

        Returns:
            The bytes read; fewer than ``count`` at the end of the file. They are marked dirty.

        Raises:
            OSError: The call failed; EFAULT where the memory's own file was truncated. Without an
                offset only if nothing was read before.
        """
        self.check_writable()
        return self.move_file(fd, file_offset, start, count, once, True)

    def to_file(self, int fd, file_offset=None, start=0, count=None, *, bint once=False):
        """Write a window straight to a file (pwritev, or writev where the offset is None).

        Args, returns and raises as :meth:`from_file`.
        """
        return self.move_file(fd, file_offset, start, count, once, False)

    cdef object move_file(
        self, int fd, object file_offset, object start, object count, bint once, bint to_guest
    ):
        cdef iovec batch[IOV_BATCH]
        cdef u64 at, length, done = 0
        cdef long offset = -1
        cdef Py_ssize_t moved
        cdef int n, error
        self.check_window(start, count, &at, &length)
        if file_offset is not None:
            offset = <long>as_size(file_offset, "file_offset")
        while done < length:
            n = self.window_batch(at + done, length - done, batch)
            with nogil:
                if to_guest:
                    moved = preadv(fd, batch, n, offset + <long>done) if offset >= 0 \
                        else readv(fd, batch, n)
                else:
                    moved = pwritev(fd, batch, n, offset + <long>done) if offset >= 0 \
                        else writev(fd, batch, n)
                error = errno
            if moved < 0:
                if error == EINTR:
                    PyErr_CheckSignals()
                    continue
                if to_guest:
                    # How much arrived before the failure is unknown.
                    self.mark(at, length)
                if done and offset < 0:
                    break
                raise os_error(error)
            if to_guest:
                self.mark(at + done, moved)
            done += moved
            if not moved or once:
                break
        return done


cdef object os_error(int number):
    return OSError(number, os.strerror(number))


cdef class AddressSpace:
    """What a device can reach: physical memory, seen directly or through an IOTLB.

    Args:
        regions: Physical memory.
        iotlb: The translation in front of it, or None if addresses are physical.
        bitmap: Where writes are marked by the address that was used, or None.
        mark_regions: Whether writes are marked in the regions' own bitmaps.
    """

    def __init__(
        self, RegionTable regions not None, IntervalMap iotlb=None, AtomicBitmap bitmap=None,
        *, bint mark_regions=True,
    ):
        self.regions, self.iotlb = regions, iotlb
        self.bitmap, self.mark_regions = bitmap, mark_regions

    cdef int translate(
        self, IoVector out, u64 addr, u64 length, int access, list misses, list refused
    ) except -1:
        """Append the memory behind a range to ``out``, with a lease on its translation.

        Returns False if it could not be translated: what is missing or forbidden was then added
        to the lists and ``out`` is as it was.
        """
        cdef u64 size
        if self.iotlb is None:
            self.append_physical(out, addr, addr, length, access)
            return True
        try:
            ranges = self.iotlb.lookup(addr, length, access)
        except IotlbFails as fails:
            misses.extend(fails.misses)
            refused.extend(fails.access_fails)
            return False
        out.push_lease(self.iotlb.leases, addr, addr + (length - 1))
        for base, size in ranges:
            if self.append_physical(out, addr, base, size, access) < size:
                break
            addr += size
        return True

    cdef u64 append_physical(
        self, IoVector out, u64 addr, u64 target, u64 length, int access
    ) except? <u64>-1:
        return out.append_region(
            self.regions, addr, target, length, access, self.bitmap, self.mark_regions
        )

    def gather(self, addr, length, access):
        """Open a range of memory.

        Returns:
            An :class:`IoVector`. Translation is all or nothing; if the memory behind it ends, the
            vector holds what comes before.

        Raises:
            IotlbFails: Some of the range is not mapped, or not for this access.
            TypeError, ValueError: Bad numbers.
        """
        cdef Span span
        cdef IoVector out = IoVector()
        as_span(addr, length, &span, True)
        out.access, out.start = as_access(access), span.first
        if span.empty:
            return out
        if span.last - span.first >= <u64>PY_SSIZE_T_MAX:
            raise ValueError(f"length {length:#x} is more than a process can address")
        misses, refused = [], []
        if not self.translate(out, span.first, span.last - span.first + 1, out.access, misses, refused):
            raise IotlbFails(misses, refused)
        return out

    def gather_ranges(self, addr, list ranges, access):
        """As :meth:`gather`, for targets that were translated elsewhere."""
        cdef IoVector out = IoVector()
        cdef u64 at = as_address(addr), size
        out.access, out.start = as_access(access), at
        for base, size in ranges:
            if self.append_physical(out, at, base, size, out.access) < size:
                break
            at += size
        return out
