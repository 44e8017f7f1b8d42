"""A dirty log in memory that another process shares, one bit for each page of 4096 bytes.

The layout is vhost's (QEMU docs/interop/vhost-user.rst, "Migration"): bit ``page % 8`` of byte
``page / 8``, counted from address 0. The other process takes bits away at any time, and may
truncate the file behind the log; see :mod:`guestio._core.memory.mapping`.

A :class:`~guestio._core.memory.bitmap.AtomicBitmap` that has a log marks in it whatever is marked
in the bitmap. Marks are made with the GIL held, and so is the log replaced: no mark is under way in
the old one when :meth:`DirtyLog.use` returns.
"""

import numpy as np

cimport cython
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy

from guestio._core.base.capacity cimport GUESTIO_ASSERT
from guestio._core.base.checks cimport Span, as_size, as_span, u8, u64
from guestio._core.base.naming cimport publish_type
from guestio._core.memory.mapping cimport HostMapping

cdef extern from * nogil:
    """
    #include <stdint.h>

    static inline void set_bits(uint8_t *byte, uint8_t bits)
    {
        if ((__atomic_load_n(byte, __ATOMIC_RELAXED) & bits) != bits)
            __atomic_fetch_or(byte, bits, __ATOMIC_RELEASE);
    }
    static inline uint8_t take_byte(uint8_t *byte)
    {
        if (!__atomic_load_n(byte, __ATOMIC_RELAXED))
            return 0;
        return __atomic_exchange_n(byte, 0, __ATOMIC_ACQ_REL);
    }
    static inline uint64_t look_at_word(const uint8_t *word)
    {
        return __atomic_load_n((const uint64_t *)word, __ATOMIC_RELAXED);
    }
    #define lowest_bit(bits) __builtin_ctz(bits)
    """
    void set_bits(u8 *byte, u8 bits)
    u8 take_byte(u8 *byte)
    u64 look_at_word(const u8 *word)
    u64 lowest_bit(unsigned int bits)

cdef enum:
    TAKE_AT_ONCE = 512    # page numbers, at least those of a word

no_log.at, no_log.pages, no_log.lost, no_log.enabled = NULL, 0, 0, False


cdef void mark_log(LogTarget *log, u64 start, u64 length) noexcept nogil:
    """Mark the pages that a range of addresses touches, as far as the log has room for them.

    Needs the GIL, which keeps the log there. Does nothing if logging is off.
    """
    cdef u64 first, last, at, end
    cdef unsigned int bits
    if not log.enabled or not length:
        return
    first, last = start >> LOG_PAGE_SHIFT, start + (length - 1)
    last = <u64>-1 >> LOG_PAGE_SHIFT if last < start else last >> LOG_PAGE_SHIFT
    if last >= log.pages:
        log.lost += 1
        if first >= log.pages:
            return
        last = log.pages - 1
    GUESTIO_ASSERT(first <= last and last < log.pages)
    write_before_look()
    at, end = first >> 3, last >> 3
    if at == end:
        # Nearly always.
        bits = (0xFFu << (first & 7)) & (0xFFu >> (7 - (last & 7)))
        set_bits(&log.at[at], <u8>bits)
        return
    while at <= end:
        bits = 0xFF
        if at == first >> 3:
            bits &= 0xFFu << (first & 7)
        if at == end:
            bits &= 0xFFu >> (7 - (last & 7))
        set_bits(&log.at[at], <u8>bits)
        at += 1


# What a log gives back when it goes, its mapping, must still be there then.
@cython.no_gc_clear
cdef class DirtyLog:
    """A dirty log, which may be switched on and off and replaced while memory is written.

    It begins without memory, and off. A bitmap made with it (``AtomicBitmap(log=...)``) marks in it.

    The other side of a log, which is told what was written, is an object of this class as well:
    :meth:`take` exchanges the bits for 0.

    Attributes:
        lost: Marks since :meth:`use` or since it was set to 0 that the log had no room for, or that
            were made while it was on without memory.

    Threads: from any.
    """

    def use(self, HostMapping mapping not None, offset, size):
        """Mark in other memory from now on; once this returns the memory of before is not touched.

        Args:
            mapping: The memory, which cannot be closed until it is replaced or :meth:`clear` is
                called.
            offset: Where in the mapping the log begins, in bytes. It need not be aligned.
            size: Bytes, greater than 0; nothing is marked outside.

        Raises:
            ValueError: The log leaves the mapping, or that is closed or read-only.
        """
        cdef u64 start = as_size(offset, "offset"), length = as_size(size, "size")
        if mapping.ptr is NULL or not mapping.writable:
            raise ValueError("the memory of a dirty log must be mapped, and writable")
        if not length or start > mapping.size or length > mapping.size - start:
            raise ValueError(
                f"a log of {length:#x} bytes at {start:#x} is not within {mapping.size:#x} bytes"
            )
        mapping.tables += 1
        before, self.mapping = self.mapping, mapping
        self.target.at, self.target.pages = mapping.ptr + start, 8 * length
        self.target.lost = 0
        if before is not None:
            (<HostMapping>before).tables -= 1

    def clear(self):
        """Be without memory. Logging stays on if it was."""
        self.let_go()

    cdef int let_go(self) except -1:
        cdef HostMapping before = self.mapping
        self.target.at, self.target.pages, self.mapping = NULL, 0, None
        if before is not None:
            before.tables -= 1
        return 0

    def __dealloc__(self):
        if self.mapping is not None:
            self.mapping.tables -= 1

    @property
    def enabled(self):
        """Whether writes are marked."""
        return self.target.enabled

    @enabled.setter
    def enabled(self, bint value):
        self.target.enabled = value

    @property
    def size(self):
        """Bytes of the log; 0 without memory."""
        return self.target.pages >> 3

    @property
    def lost(self):
        return self.target.lost

    @lost.setter
    def lost(self, value):
        self.target.lost = as_size(value, "lost")

    @property
    def vanished(self):
        """Whether the memory was found to be truncated: what was marked there is lost."""
        cdef size_t gone
        if self.mapping is None or self.mapping.spot is NULL:
            return False
        gone = self.mapping.spot.vanished
        return gone < <uintptr_t>self.target.at + (self.target.pages >> 3)

    def mark(self, start, length):
        """Mark every page that a range of addresses touches, if logging is on. O(pages / 8)."""
        cdef Span span
        as_span(start, length, &span, True)
        if not span.empty:
            # Two calls, as a length of 2**64 does not fit one.
            mark_log(&self.target, span.first, span.last - span.first)
            mark_log(&self.target, span.last, 1)

    def take(self):
        """The pages that are marked, ascending, which are not marked any more.

        A page that is written meanwhile is told by this call or the next, never by none.

        Returns:
            A ``uint64`` array of page numbers.

        Cost: O(pages / 64 + pages found) at memory speed; the GIL is released.
        """
        cdef u64 found[TAKE_AT_ONCE]
        cdef u64[::1] view
        cdef HostMapping mapping = self.mapping
        cdef u8 *log = self.target.at
        cdef u64 at = 0, size = self.target.pages >> 3
        cdef size_t count = 0
        cdef list parts = []
        if mapping is None:
            return np.zeros(0, np.uint64)
        mapping.tables += 1
        try:
            while at < size:
                with nogil:
                    count = take_some(log, size, &at, found)
                if count:
                    part = np.empty(count, np.uint64)
                    view = part
                    memcpy(&view[0], found, count * sizeof(u64))
                    parts.append(part)
                    count = 0
            return np.concatenate(parts) if parts else np.zeros(0, np.uint64)
        except BaseException:
            # Nothing that was taken may be lost.
            for at in range(count):
                set_bits(&log[found[at] >> 3], <u8>(1 << (found[at] & 7)))
            for part in parts:
                view = part
                for at in range(<u64>view.shape[0]):
                    set_bits(&log[view[at] >> 3], <u8>(1 << (view[at] & 7)))
            raise
        finally:
            mapping.tables -= 1

    def __repr__(self):
        state = "on" if self.target.enabled else "off"
        return f"<DirtyLog of {self.size:#x} bytes: {state}>"


cdef size_t take_some(u8 *log, u64 size, u64 *at, u64 *found) noexcept nogil:
    """Take the pages from byte ``at`` on while there is room for their numbers; how many."""
    cdef size_t count = 0
    cdef unsigned int bits
    while at[0] < size and count + 8 <= TAKE_AT_ONCE:
        if not (<uintptr_t>(log + at[0]) & 7) and size - at[0] >= 8 and (
            not look_at_word(log + at[0])
        ):
            at[0] += 8
            continue
        bits = take_byte(log + at[0])
        while bits:
            found[count] = 8 * at[0] + lowest_bit(bits)
            count += 1
            bits &= bits - 1
        at[0] += 1
    return count


publish_type(DirtyLog, "guestio.memory.DirtyLog", "DirtyLog()\n--\n\n")
