"""Gathered guest memory: the host memory behind a range of addresses, held while it is used.

A :class:`RegionTable` knows where guest physical addresses are in this process. An
:class:`IoVector` lists the pieces behind a range, keeps the leases on their translation until it
is closed, and does all copying, atomic access, file I/O and dirty marking on them.

A page that its owner took away is an error for the access that met it.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_CONTIG, PyBUF_CONTIG_RO, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals, PyErr_NoMemory
from libc.errno cimport EFAULT, EINTR, errno
from libc.limits cimport LONG_MAX
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memset

from guestio._core.base.naming cimport publish_type
from guestio._core.base.checks cimport (
    Span, as_access, as_address, as_fd, as_size, as_span, u8, u64,
)
from guestio._core.base.capacity cimport HOLD_GIL_UP_TO, IOV_BATCH, VECTOR_INSIDE
from guestio._core.memory.dirty_log cimport (
    LOG_PAGE_SHIFT, LogTarget, log_page, write_before_look,
)
from guestio._core.memory.mapping cimport HostMapping, holes, met_holes
from guestio._core.base.atomics cimport (
    READ, WRITE, copy_from_guest, copy_to_guest, exchange_atomic, load_atomic, store_atomic,
    touch_pages,
)
from guestio._core.memory.slices cimport (
    Loan, VolatileSlice, as_load_order, as_store_order, as_value, as_width,
)

import os

import guestio.addr
from guestio.addr import Permissions
from guestio.errors import (
    InvalidAddressError,
    MemoryVanishedError,
    MisalignedError,
    PermissionDeniedError,
)

cdef extern from "Python.h":
    void PyObject_GC_UnTrack(object)

cdef extern from "<sys/uio.h>" nogil:
    Py_ssize_t preadv(int, iovec *, int, long)
    Py_ssize_t pwritev(int, iovec *, int, long)
    Py_ssize_t readv(int, iovec *, int)
    Py_ssize_t writev(int, iovec *, int)


cdef inline bint follows(const Origin *origin, u64 offset) noexcept nogil:
    """Whether the fragment after one is marked in the same bitmap alone, from an offset on."""
    return origin[1].bitmap == origin.bitmap and origin[1].offset == offset and (
        origin.second is NULL and origin[1].second is NULL
    )


# What is given back when these go, mappings and leases, must still be there then.
@cython.no_gc_clear
cdef class RegionTable:
    """Where guest physical addresses are in this process; never changes once made.

    Args:
        regions: ``(start, mapping, offset, size, writable, bitmap, owner)`` each, ascending and
            disjoint: ``size`` bytes of ``mapping`` from ``offset`` appear at ``start``. The owner
            is what errors name.
    """

    def __cinit__(self, list regions):
        cdef HostMapping mapping
        cdef int i
        cdef size_t n = max(len(regions), 1)
        self.mappings, self.bitmaps, self.owners = [], [], []
        # A collector that breaks a cycle through here must not empty what __dealloc__ gives back.
        PyObject_GC_UnTrack(self.mappings)
        self.first = <u64 *>realloc(NULL, n * sizeof(u64))
        self.last = <u64 *>realloc(NULL, n * sizeof(u64))
        self.host = <u8 **>realloc(NULL, n * sizeof(u8 *))
        self.origin = <Origin *>realloc(NULL, n * sizeof(Origin))
        if not (self.first and self.last and self.host and self.origin):
            PyErr_NoMemory()
        for i, (start, mapping, offset, size, writable, bitmap, owner) in enumerate(regions):
            if mapping.ptr is NULL:
                raise ValueError(f"the memory of the region at {start:#x} is closed")
            if offset + size > mapping.size:
                raise ValueError(f"region {start:#x}+{size:#x} leaves its mapping")
            self.first[i], self.last[i] = start, start + size - 1
            self.host[i] = mapping.ptr + <size_t>offset
            self.origin[i].spot, self.origin[i].region = mapping.spot, i
            self.origin[i].bitmap = <void *>bitmap if bitmap is not None else NULL
            self.origin[i].offset, self.origin[i].second = 0, NULL
            self.origin[i].second_offset = 0
            self.origin[i].writable = writable and mapping.writable
            self.mappings.append(mapping)
            self.bitmaps.append(bitmap)
            self.owners.append(owner)
            # A table is a user of the memory: a mapping under it must not be closed.
            mapping.tables += 1
            self.count = i + 1

    def __dealloc__(self):
        cdef HostMapping mapping
        if self.mappings is not None:
            for mapping in self.mappings:
                mapping.tables -= 1
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


@cython.no_gc_clear
cdef class IoVector:
    """The host memory behind a range of addresses, ready to be read, written or handed to a file.

    It is a context manager; until it is closed, a revocation of the translation that it came from
    waits. If memory ended or refused the access somewhere, the vector holds what comes before and
    ``stop`` says why. Offsets are bytes from the start of the range.

    What is written through the buffer of one of its slices is marked dirty when the vector is
    closed, and once more when the buffer is released.

    Threads: calls may overlap. One that is moving data when another closes the vector finishes
    with memory that is kept for it, translation included; then all of it is given back.

    Attributes:
        start: First address of the range.
        total: Bytes held.
        count: Fragments they are in.
        access: What the memory was opened for, as a number of ``Permissions``.
        stop: 0, or why it holds less than requested: 1 no memory, 2 read-only.
        stop_addr: The address that was refused.
        stop_target: The same address behind the translation.
    """

    def __cinit__(self):
        self.vec, self.origin, self.addr = self.vec_inside, self.origin_inside, self.addr_inside
        self.lease, self.capacity, self.lease_capacity = self.lease_inside, VECTOR_INSIDE, VECTOR_INSIDE

    @staticmethod
    def of_slices(slices, access):
        """A vector over slices, in their order. Fragments are addressed by their position."""
        cdef IoVector made = IoVector()
        cdef VolatileSlice piece
        cdef Origin origin
        # A list of its own: what the caller does to theirs must not free the memory. One entry
        # to a fragment, so none for an empty slice.
        made.access, made.slices_held = as_access(access), []
        for piece in list(slices):
            if piece is None:
                raise TypeError("None is not a slice")
            piece.check_open(0, piece.size, made.access)
            piece.check_there(0, piece.size, made.access)
            if piece.size:
                made.slices_held.append(piece)
            origin.spot, origin.writable, origin.region = piece.spot, piece.writable, -1
            origin.bitmap = <void *>piece.bitmap if piece.bitmap is not None else NULL
            origin.second = <void *>piece.second if piece.second is not None else NULL
            origin.offset, origin.second_offset = piece.bitmap_at, piece.second_at
            made.push(piece.ptr, piece.size, made.total, &origin)
        return made

    def __dealloc__(self):
        self.release()
        if self.vec is not self.vec_inside:
            free(self.vec)
            free(self.origin)
            free(self.addr)
        if self.lease is not self.lease_inside:
            free(self.lease)

    cdef int adopt(self, RegionTable table, AtomicBitmap second) except -1:
        """Say in which memory the fragments that follow are.

        Not a part of :meth:`append_region`: the memory of before may go here, and with it any code
        may run, so that no pointer into a translation may be held meanwhile.
        """
        if self.table is table and self.second is second:
            return 0
        if self.count:
            raise RuntimeError("the memory of a vector was replaced while it was being filled")
        # They go once this refers to the new ones.
        old, old_second = self.table, self.second
        self.table, self.second = table, second
        return 0

    cdef int push(self, void *base, size_t size, u64 addr, const Origin *origin) except -1:
        if not size:
            return 0
        if self.count == self.capacity:
            self.grow()
        self.vec[self.count].iov_base, self.vec[self.count].iov_len = base, size
        self.origin[self.count] = origin[0]
        self.addr[self.count] = addr
        self.count += 1
        self.total += size
        return 0

    cdef int grow(self) except -1:
        cdef int room = self.capacity * 2
        cdef iovec *vec = <iovec *>malloc(room * sizeof(iovec))
        cdef Origin *origin = <Origin *>malloc(room * sizeof(Origin))
        cdef u64 *addr = <u64 *>malloc(room * sizeof(u64))
        if vec is NULL or origin is NULL or addr is NULL:
            free(vec)
            free(origin)
            free(addr)
            PyErr_NoMemory()
        memcpy(vec, self.vec, self.count * sizeof(iovec))
        memcpy(origin, self.origin, self.count * sizeof(Origin))
        memcpy(addr, self.addr, self.count * sizeof(u64))
        if self.vec is not self.vec_inside:
            free(self.vec)
            free(self.origin)
            free(self.addr)
        self.vec, self.origin, self.addr, self.capacity = vec, origin, addr, room
        return 0

    cdef int push_lease(self, Leases leases, u64 first, u64 last) except -1:
        cdef int room = self.lease_capacity * 2
        cdef int *grown
        if self.lease_count == self.lease_capacity:
            grown = <int *>malloc(room * sizeof(int))
            if grown is NULL:
                PyErr_NoMemory()
            memcpy(grown, self.lease, self.lease_count * sizeof(int))
            if self.lease is not self.lease_inside:
                free(self.lease)
            self.lease, self.lease_capacity = grown, room
        self.leases = leases
        self.lease[self.lease_count] = leases.enter(first, last)
        self.lease_count += 1
        return 0

    cdef u64 append_region(
        self, u64 addr, u64 target, u64 length, int access, bint mark_regions,
    ) except? <u64>-1:
        """Append the memory behind ``[target, target + length)``, as far as it goes.

        Returns the bytes appended; `stop` is set if they are fewer than requested. No Python
        object is made here and none goes, unless there is no memory.
        """
        cdef RegionTable table = self.table
        cdef u64 done = 0, inside, n
        cdef Origin origin
        cdef int i = table.find(target)
        while done < length:
            if i < 0 or i >= table.count or table.first[i] > target + done:
                self.stop = STOP_HOLE
            elif access & WRITE and not table.origin[i].writable:
                self.stop = STOP_READ_ONLY
            if self.stop:
                self.stop_addr, self.stop_target = addr + done, target + done
                self.stop_index = i if self.stop == STOP_READ_ONLY else -1
                break
            inside = target + done - table.first[i]
            n = min(length - done, table.last[i] - (target + done) + 1)
            origin = table.origin[i]
            origin.offset = inside
            if not mark_regions:
                origin.bitmap = NULL
            if self.second is not None:
                origin.second, origin.second_offset = <void *>self.second, addr + done
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
        """Give the translation back and be empty, ready for another range."""
        if self.users:
            self.closing, self.total = True, 0
            return
        if self.loans is not None:
            self.mark_loans()
        self.rewind(0, 0, 0)

    cdef int mark_loans(self) except -1:
        """Mark what may have been written through buffers of the slices that were given away."""
        cdef u64 at = 0
        cdef int i
        cdef list loans = self.loans
        self.loans = None
        for i in range(min(self.count, <int>len(loans))):
            if (<Loan>loans[i]).buffers:
                self.mark(at, self.vec[i].iov_len)
            at += self.vec[i].iov_len
        return 0

    cdef void enter(self) noexcept nogil:
        """Keep the memory until :meth:`leave`, even if the vector is closed. Needs the GIL."""
        self.users += 1

    cdef int leave(self) except -1:
        self.users -= 1
        if self.closing and not self.users:
            self.closing = False
            self.put_stamp()
            self.finish_close()
        return 0

    cdef int put_stamp(self) except -1:
        """Write the last byte that was asked for, after the last call that might have written it."""
        cdef u64 size = 0
        cdef int i
        cdef u8 value = <u8>(self.stamp - 1)
        if not self.stamp:
            return 0
        self.stamp = 0
        for i in range(self.count):
            size += self.vec[i].iov_len
        if size:
            self.transfer(&value, size - 1, 1, True)
            self.mark(size - 1, 1)
        return 0

    cdef IoVector last_byte(self):
        """The last byte of a vector that is not empty, without leases of its own."""
        cdef IoVector made = IoVector()
        cdef int last = self.count - 1
        cdef size_t skip = self.vec[last].iov_len - 1
        cdef Origin origin = self.origin[last]
        origin.offset += skip
        origin.second_offset += skip
        made.access, made.start = self.access, self.addr[last] + skip
        made.table, made.second = self.table, self.second
        made.slices_held = None if self.slices_held is None else [self.slices_held[last]]
        made.push(<u8 *>self.vec[last].iov_base + skip, 1, made.start, &origin)
        return made

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def hold(self, guard):
        """Leave this context manager when the vector is closed or goes away.

        Raises:
            TypeError: It is none.
        """
        cdef Held held = Held()
        if not hasattr(type(guard), "__exit__"):
            raise TypeError(f"guard must be a context manager, not {type(guard).__name__}")
        held.guard = guard
        before, self.guard = self.guard, held

    def close(self):
        """Give the translation and the memory back; the vector is empty afterwards.

        If another thread is moving data, that happens when it has finished; the vector shows
        itself as empty from now on.
        """
        if self.users:
            self.closing, self.total = True, 0
        else:
            self.finish_close()

    cdef int finish_close(self) except -1:
        self.release()
        # These go, and any code may run with it, once this refers to them no more.
        held, self.guard = self.guard, None
        slices_held, self.slices_held = self.slices_held, None
        table, second, self.table, self.second = self.table, self.second, None, None
        if held is not None:
            (<Held>held).close()
        return 0

    def __len__(self):
        return self.total

    def __bool__(self):
        """True, also for a vector of no bytes."""
        return True

    def __repr__(self):
        cdef str kind = (None, "to read", "to write", "to read and write")[self.access & 3]
        return f"<IoVector of {self.total} bytes {kind} at {self.start:#x}, in {self.count} pieces>"

    @property
    def stop_region(self):
        """The owner of the region that refused the access, or None."""
        return self.table.owners[self.stop_index] if self.stop and self.stop_index >= 0 else None

    def fragments(self):
        """``(address, length)`` of each fragment, in order."""
        if self.closing:
            return []
        return [(self.addr[i], self.vec[i].iov_len) for i in range(self.count)]

    def slices(self):
        """The fragments as :class:`VolatileSlice`; they do not hold the translation."""
        cdef list made = []
        cdef VolatileSlice piece
        cdef int i
        if self.closing:
            return made
        if self.loans is None and self.access & WRITE:
            self.loans = [Loan() for i in range(self.count)]
        for i in range(self.count):
            if self.slices_held is not None:
                piece = self.slices_held[i]
                piece = piece.part(0, piece.size)
                if self.loans is not None:
                    piece.loan = self.loans[i]
                made.append(piece)
                continue
            piece = VolatileSlice.__new__(VolatileSlice)
            piece.loan = None if self.loans is None else self.loans[i]
            piece.mapping = self.table.mappings[self.origin[i].region]
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

    cdef bint vanished(self, u64 start, u64 count) noexcept nogil:
        """Whether a window touches memory whose file is gone.

        To be called after the access: what stands in for a page can be read once it is known.
        """
        cdef int i = 0
        cdef u64 n
        if not met_holes(&holes):
            return False
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
        cdef u64 n, at
        while count and i < self.count:
            if start >= self.vec[i].iov_len:
                start -= self.vec[i].iov_len
            else:
                if self.origin[i].bitmap is not NULL and takes_marks(self.origin[i].bitmap):
                    if self.origin[i].second is NULL and logs_alone(self.origin[i].bitmap):
                        i = self.log_pieces(i, start, &count)
                        start = 0
                        continue
                    n = min(self.vec[i].iov_len - start, count)
                    at = self.origin[i].offset + start
                    # Pieces of large requests often follow each other: they are marked at once.
                    while n < count and i + 1 < self.count and follows(&self.origin[i], at + n):
                        i += 1
                        n += min(self.vec[i].iov_len, count - n)
                    (<AtomicBitmap>self.origin[i].bitmap).mark(at, n)
                else:
                    n = min(self.vec[i].iov_len - start, count)
                if self.origin[i].second is not NULL:
                    (<AtomicBitmap>self.origin[i].second).mark(
                        self.origin[i].second_offset + start, n
                    )
                count -= n
                start = 0
            i += 1

    cdef int log_pieces(self, int i, u64 start, u64 *count) noexcept nogil:
        """Record a window that begins in a fragment as written, as far as fragments are marked in
        the same bitmap, and that only in its dirty log; the fragment after those.

        Requests have a fragment for each page. So what is the same for all of them is looked at
        once, and all of the writes were made before the first of the bits is looked at.
        """
        cdef Origin *origin = &self.origin[i]
        cdef Origin *end = &self.origin[self.count]
        cdef iovec *vec = &self.vec[i]
        cdef void *bitmap = origin.bitmap
        cdef LogTarget *log = (<AtomicBitmap>bitmap).target
        cdef u8 *bits = log.at
        cdef u64 base = (<AtomicBitmap>bitmap).log_start, size = log.pages << LOG_PAGE_SHIFT
        # Bytes of the bitmap that the log has room for.
        cdef u64 room = 0 if size < base else min((<AtomicBitmap>bitmap).byte_size, size - base)
        cdef u64 at, n, left = count[0]
        write_before_look()
        while True:
            n = min(vec.iov_len - start, left)
            at = origin.offset + start
            if at + n <= room and not ((base + at) ^ (base + at + n - 1)) >> LOG_PAGE_SHIFT:
                log_page(bits, (base + at) >> LOG_PAGE_SHIFT)
            else:
                (<AtomicBitmap>bitmap).mark(at, n)
            left -= n
            start = 0
            origin += 1
            vec += 1
            if not left or origin == end or origin.bitmap is not bitmap or (
                origin.second is not NULL
            ):
                break
        count[0] = left
        return <int>(origin - self.origin)

    cdef bint is_marked_with(self, u64 first, u64 last) noexcept nogil:
        """Whether whatever marks the byte at one offset marks that at another and all between.

        So it is if they are in a page of a dirty log, and marked nowhere else.
        """
        cdef u64 base
        if not self.count or last >= self.vec[0].iov_len or self.origin[0].second is not NULL:
            return False
        if self.origin[0].bitmap is NULL:
            return True
        base = (<AtomicBitmap>self.origin[0].bitmap).log_start + self.origin[0].offset
        return logs_alone(self.origin[0].bitmap) and (
            (base + first) >> LOG_PAGE_SHIFT == (base + last) >> LOG_PAGE_SHIFT
        )

    cdef u64 transfer(self, u8 *buffer, u64 start, u64 count, bint to_guest) noexcept nogil:
        """Copy between a private buffer and a window; the number of bytes."""
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
                    copy_to_guest(at, buffer + done, n)
                else:
                    copy_from_guest(buffer + done, at, n)
                done += n
                start = 0
            i += 1
        return done

    cdef object gone(self, u64 start, u64 count):
        """The error of an access to a window whose file is gone in part."""
        cdef int i = 0
        cdef u64 n, skip
        cdef uintptr_t base
        while i < self.count and start >= self.vec[i].iov_len:
            start -= self.vec[i].iov_len
            i += 1
        while i < self.count and count:
            n = min(self.vec[i].iov_len - start, count)
            base = <uintptr_t>self.vec[i].iov_base
            if self.origin[i].spot is not NULL and self.origin[i].spot.vanished < base + start + n:
                skip = max(self.origin[i].spot.vanished, base + start) - base
                # Python code runs from here on, and another thread may close the vector.
                lost, target, region = self.addr[i] + skip, self.target_of(i, skip), self.region_of(i)
                return MemoryVanishedError(
                    lost, count - (skip - start), Permissions(self.access),
                    "the file behind the memory was truncated by its owner",
                    target=target, region=region,
                )
            count -= n
            start = 0
            i += 1
        return None

    cdef object target_of(self, int i, u64 skip):
        """The physical address of a byte of a fragment, if another address led there."""
        cdef u64 target
        cdef int region = self.origin[i].region
        if region < 0:
            return None
        target = self.table.first[region] + (<u8 *>self.vec[i].iov_base - self.table.host[region])
        return None if target == self.addr[i] else target + skip

    cdef object region_of(self, int i):
        cdef int region = self.origin[i].region
        return self.table.owners[region] if region >= 0 else None

    cdef int check_window(self, object start, object count, u64 *at, u64 *length) except -1:
        cdef Span span
        at[0], length[0] = as_address(start, "start"), 0
        if at[0] <= self.total and count is None:
            length[0] = self.total - at[0]
            return 0
        as_span(start, 0 if count is None else count, &span, True)
        if span.empty and count is not None:
            at[0] = 0
            return 0
        if span.first > self.total or (not span.empty and span.last >= self.total):
            raise InvalidAddressError(
                span.first, count or 0, Permissions(self.access),
                f"the vector holds {self.total:#x} bytes",
            )
        length[0] = span.last - span.first + 1
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
        if length <= HOLD_GIL_UP_TO:
            self.transfer(buffer, at, length, False)
            if self.vanished(at, length):
                raise self.gone(at, length)
            return 0
        self.enter()
        try:
            with nogil:
                self.transfer(buffer, at, length, False)
            if self.vanished(at, length):
                raise self.gone(at, length)
        finally:
            self.leave()
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
            self.copy_in(<u8 *>view.buf, at, length)
        finally:
            PyBuffer_Release(&view)

    cdef int copy_in(self, const u8 *buffer, u64 at, u64 length) except -1:
        if length <= HOLD_GIL_UP_TO:
            self.transfer(<u8 *>buffer, at, length, True)
            return self.finish_write(at, length)
        self.enter()
        try:
            with nogil:
                self.transfer(<u8 *>buffer, at, length, True)
            return self.finish_write(at, length)
        finally:
            self.leave()

    cdef int finish_write(self, u64 at, u64 length) except -1:
        self.mark(at, length)
        if self.vanished(at, length):
            raise self.gone(at, length)
        return 0

    def fill(self, value, start=0, count=None):
        """Set every byte of a window to ``value`` and mark it dirty."""
        cdef u64 at, length
        cdef int byte = as_value(value, 1)
        self.check_writable()
        self.check_window(start, count, &at, &length)
        self.enter()
        try:
            with nogil:
                self.set_bytes(byte, at, length)
            self.finish_write(at, length)
        finally:
            self.leave()

    cdef void set_bytes(self, int byte, u64 start, u64 count) noexcept nogil:
        cdef int i = 0
        cdef u64 n
        while count and i < self.count:
            if start >= self.vec[i].iov_len:
                start -= self.vec[i].iov_len
            else:
                n = min(self.vec[i].iov_len - start, count)
                memset(<u8 *>self.vec[i].iov_base + start, byte, n)
                count -= n
                start = 0
            i += 1

    cdef void *atomic_at(self, int width) except NULL:
        if self.total != <u64>width or self.count != 1:
            raise MisalignedError(
                self.start, width, Permissions(self.access),
                "an atomic access must lie within one region, contiguously",
            )
        if <uintptr_t>self.vec[0].iov_base % width:
            target, region = self.target_of(0, 0), self.region_of(0)
            raise MisalignedError(
                self.start, width, Permissions(self.access), f"it is not aligned to {width} bytes",
                target=target, region=region,
            )
        return self.vec[0].iov_base

    def load(self, width, ordering=guestio.addr.Ordering.SEQ_CST):
        """One atomic load; the vector must be one aligned fragment of ``width`` bytes."""
        cdef int size = as_width(width), order = as_load_order(ordering)
        cdef u64 value = load_atomic(self.atomic_at(size), size, order)
        if self.vanished(0, size):
            raise self.gone(0, size)
        return value

    def store(self, value, width, ordering=guestio.addr.Ordering.SEQ_CST):
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
            raise self.gone(0, size)
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

    def from_file(self, fd, file_offset=None, start=0, count=None, *, bint once=False):
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
            MemoryVanishedError: The file behind the memory itself was truncated. It is an OSError
                (EFAULT) too.
            OSError: The call failed. Without an offset only if nothing was read before.
        """
        self.check_writable()
        return self.move_file(fd, file_offset, start, count, once, True)

    def to_file(self, fd, file_offset=None, start=0, count=None, *, bint once=False):
        """Write a window straight to a file (pwritev, or writev where the offset is None).

        Args, returns and raises as :meth:`from_file`.
        """
        return self.move_file(fd, file_offset, start, count, once, False)

    cdef object move_file(
        self, object fd, object file_offset, object start, object count, bint once, bint to_guest
    ):
        self.enter()
        try:
            return self.move_window(fd, file_offset, start, count, once, to_guest)
        finally:
            self.leave()

    cdef object move_window(
        self, object fd, object file_offset, object start, object count, bint once, bint to_guest
    ):
        cdef iovec batch[IOV_BATCH]
        cdef u64 at, length, done = 0
        cdef int file = as_fd(fd), n, error
        cdef long offset = -1
        cdef Py_ssize_t moved
        self.check_window(start, count, &at, &length)
        if file_offset is not None:
            offset = <long>as_size(file_offset, "file_offset")
            if <u64>(LONG_MAX - offset) < length:
                raise ValueError(f"file_offset {offset:#x} + {length:#x} passes 2**63")
        if self.vanished(at, length):
            # What stands in for the pages that are gone is not to be read or written as if it were.
            raise self.gone(at, length)
        while done < length:
            n = self.window_batch(at + done, length - done, batch)
            with nogil:
                if to_guest:
                    moved = preadv(file, batch, n, offset + <long>done) if offset >= 0 \
                        else readv(file, batch, n)
                else:
                    moved = pwritev(file, batch, n, offset + <long>done) if offset >= 0 \
                        else writev(file, batch, n)
                error = errno
            if moved < 0:
                if error == EINTR:
                    PyErr_CheckSignals()
                    if not self.closing:
                        continue
                if to_guest:
                    # How much arrived before the failure is unknown.
                    self.mark(at + done, length - done)
                if done and offset < 0:
                    break
                raise self.move_error(error, at + done, length - done)
            if to_guest:
                self.mark(at + done, moved)
            if self.vanished(at + done, moved):
                raise self.gone(at + done, moved)
            done += moved
            if not moved or once or self.closing:
                break
        return done

    cdef object move_error(self, int number, u64 at, u64 length):
        """The error of a failed transfer; the kernel reports vanished memory as a bad address."""
        cdef int i = 0
        cdef u64 n, start = at, left = length
        if number == EFAULT:
            with nogil:
                while left and i < self.count:
                    if start >= self.vec[i].iov_len:
                        start -= self.vec[i].iov_len
                    else:
                        n = min(self.vec[i].iov_len - start, left)
                        touch_pages(<u8 *>self.vec[i].iov_base + start, n)
                        left -= n
                        start = 0
                    i += 1
            if self.vanished(at, length):
                return self.gone(at, length)
        return OSError(number, os.strerror(number))


cdef class Held:
    """Exits another context manager exactly once."""

    def close(self):
        guard, self.guard = self.guard, None
        if guard is not None:
            guard.__exit__(None, None, None)

    def __del__(self):
        self.close()


publish_type(IoVector, "guestio.memory.IoVector", "IoVector()\n--\n\n")
