"""Which pages have been written: one bit a page, set and harvested atomically."""

import numpy as np

cimport cython
from cpython.exc cimport PyErr_NoMemory
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy

from guestio._core.base.naming cimport publish_type
from guestio._core.base.checks cimport Span, as_address, as_size, as_span, u64
from guestio._core.base.capacity cimport GUESTIO_ASSERT, HARVEST_WORDS
from guestio._core.trace.tracepoints cimport (
    LIFE, TraceRecord, WHAT_HARVEST, trace, trace_record, tracing,
)
from guestio._core.memory.dirty_log cimport DirtyLog, mark_log, no_log

from guestio.errors import InvalidAddressError

cdef extern from * nogil:
    """
    #include <string.h>

    /* Most writes hit pages that are dirty already, so a set bit is only looked at. The barrier
       keeps that look after the write: else a harvest in between could take the bit and still
       read the page as it was before. */
    #define write_before_look() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    static inline void set_bits(uint64_t *word, uint64_t bits)
    {
        if ((__atomic_load_n(word, __ATOMIC_RELAXED) & bits) != bits)
            __atomic_fetch_or(word, bits, __ATOMIC_RELEASE);
    }
    static inline void clear_bits(uint64_t *word, uint64_t bits)
    {
        if (__atomic_load_n(word, __ATOMIC_RELAXED) & bits)
            __atomic_fetch_and(word, ~bits, __ATOMIC_ACQUIRE);
    }
    static inline uint64_t peek_word(const uint64_t *word)
    {
        return __atomic_load_n(word, __ATOMIC_ACQUIRE);
    }
    static inline uint64_t take_bits(uint64_t *word, uint64_t bits)
    {
        if (!(__atomic_load_n(word, __ATOMIC_RELAXED) & bits))
            return 0;
        return __atomic_fetch_and(word, ~bits, __ATOMIC_ACQ_REL) & bits;
    }

    /* Take whole words; a clean cache line costs one look. */
    static void take_words(uint64_t *word, uint64_t *taken, size_t n)
    {
        size_t i = 0;
        for (; i + 8 <= n; i += 8) {
            uint64_t any = 0;
            for (int k = 0; k < 8; k++)
                any |= __atomic_load_n(&word[i + k], __ATOMIC_RELAXED);
            if (!any) {
                memset(&taken[i], 0, 64);
                continue;
            }
            for (int k = 0; k < 8; k++)
                taken[i + k] = take_bits(&word[i + k], ~(uint64_t)0);
        }
        for (; i < n; i++)
            taken[i] = take_bits(&word[i], ~(uint64_t)0);
    }

    static void peek_words(const uint64_t *word, uint64_t *seen, size_t n)
    {
        for (size_t i = 0; i < n; i++)
            seen[i] = __atomic_load_n(&word[i], __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
    }

    /* Most of memory is clean: eight words at a time are passed over while it is. */
    static inline size_t pass_clean(const uint64_t *seen, size_t i, size_t n)
    {
        while (i + 8 <= n && !(seen[i] | seen[i + 1] | seen[i + 2] | seen[i + 3] | seen[i + 4]
                               | seen[i + 5] | seen[i + 6] | seen[i + 7]))
            i += 8;
        return i;
    }

    static uint64_t list_pages(const uint64_t *seen, size_t n, uint64_t first, uint64_t *page)
    {
        uint64_t *at = page;
        for (size_t i = 0; i < n; i++) {
            i = pass_clean(seen, i, n);
            if (i == n)
                break;
            for (uint64_t bits = seen[i]; bits; bits &= bits - 1)
                *at++ = first + 64 * i + (uint64_t)__builtin_ctzll(bits);
        }
        return (uint64_t)(at - page);
    }

    /* As list_pages, in groups of pages: each group once, ascending, across calls by `next`, the
       first group that was not listed yet. */
    static uint64_t list_groups(const uint64_t *seen, size_t n, uint64_t first, uint64_t pages,
                                uint64_t *next, uint64_t *group)
    {
        uint64_t *at = group;
        for (size_t i = 0; i < n; i++) {
            i = pass_clean(seen, i, n);
            if (i == n)
                break;
            uint64_t bits = seen[i], word = first + 64 * i;
            while (bits) {
                uint64_t number = (word + (uint64_t)__builtin_ctzll(bits)) / pages;
                if (number >= *next) {
                    *at++ = number;
                    *next = number + 1;
                }
                /* The rest of the group says nothing new. */
                uint64_t left = (number + 1) * pages - word;
                if (left >= 64)
                    break;
                bits &= ~(uint64_t)0 << left;
            }
        }
        return (uint64_t)(at - group);
    }
    #define count_bits(bits) __builtin_popcountll(bits)
    #define lowest_bit(bits) __builtin_ctzll(bits)
    """
    void set_bits(u64 *word, u64 bits)
    void clear_bits(u64 *word, u64 bits)
    u64 peek_word(const u64 *word)
    u64 take_bits(u64 *word, u64 bits)
    void write_before_look()
    void take_words(u64 *word, u64 *taken, size_t n)
    void peek_words(const u64 *word, u64 *seen, size_t n)
    u64 list_pages(const u64 *seen, size_t n, u64 first, u64 *page)
    u64 list_groups(
        const u64 *seen, size_t n, u64 first, u64 pages, u64 *next, u64 *group
    )
    int count_bits(u64 bits)
    int lowest_bit(u64 bits)


cdef inline u64 word_mask(u64 index, u64 first, u64 last) noexcept nogil:
    """The bits of word ``index`` that stand for pages ``first`` to ``last``, inclusive."""
    cdef u64 mask = <u64>-1
    if index == first >> 6:
        mask &= <u64>-1 << (first & 63)
    if index == last >> 6:
        mask &= <u64>-1 >> (63 - (last & 63))
    return mask


cdef inline bint is_dirty(AtomicBitmap bitmap, u64 page) noexcept:
    """Whether a page is marked; one beyond the bitmap never is."""
    return page < bitmap.pages and peek_word(&bitmap.word[page >> 6]) >> (page & 63) & 1


# What it marks in must still be there for whatever is written while it goes.
@cython.no_gc_clear
cdef class AtomicBitmap:
    """Dirty pages of a range of addresses that begins at 0.

    Args:
        size: Bytes that the bitmap covers; a last, partial page counts as one.
        page_size: Bytes to a bit; greater than 0, not necessarily a power of two.
        log: A dirty log that everything that is marked is marked in as well, while it is on.
        log_start: Address in the log of the bitmap's first byte.
        own: False to keep no bits here: nothing is ever dirty in this bitmap, only in the log.

    Addresses beyond the range are never dirty, and marking them does nothing. Threads: marking,
    testing and harvesting may be done from any thread at any time. A page that is written before
    or while it is harvested is reported by this harvest or the next, never by none.

    Attributes:
        pages: Number of pages, also ``len()``.
        byte_size: Bytes covered.
        page_size: Bytes to a page.
        log: The dirty log, or None.

    Raises:
        InvalidAddressError: The bitmap would end beyond ``2**64`` in the log.
    """

    def __cinit__(
        self, size, page_size=4096, *, DirtyLog log=None, log_start=0, bint own=True
    ):
        cdef u64 unit = as_address(page_size, "page_size")
        cdef u64 covered = as_address(size, "size")
        cdef Span span
        if not unit:
            raise ValueError("page_size must be greater than 0")
        as_span(log_start, covered, &span, True)
        self.own, self.log, self.log_start = own, log, span.first
        self.target = &no_log if log is None else &log.target
        if pthread_rwlock_init(&self.lock, NULL):
            raise MemoryError
        self.page_size = unit
        self.grow(covered)

    def __dealloc__(self):
        free(self.word)
        pthread_rwlock_destroy(&self.lock)

    cdef int grow(self, u64 byte_size) except -1:
        cdef u64 pages = byte_size // self.page_size + (byte_size % self.page_size != 0)
        cdef u64 *word
        if not self.own:
            self.byte_size = byte_size
            return 0
        word = <u64 *>calloc((pages >> 6) + 1, sizeof(u64))
        if word is NULL:
            PyErr_NoMemory()
        # A harvest reads the words without the GIL; it needs no GIL to finish.
        pthread_rwlock_wrlock(&self.lock)
        if self.word is not NULL:
            memcpy(word, self.word, ((self.pages >> 6) + 1) * sizeof(u64))
            free(self.word)
        self.word, self.pages, self.byte_size = word, pages, byte_size
        pthread_rwlock_unlock(&self.lock)
        return 0

    cdef void mark(self, u64 start, u64 length) noexcept nogil:
        """Mark a byte range. The caller holds the GIL, which keeps :meth:`grow` away."""
        cdef u64 first, last, i
        if self.target.enabled and start < self.byte_size:
            mark_log(self.target, self.log_start + start, min(length, self.byte_size - start))
        if not length or not self.pages:
            return
        first = start // self.page_size
        if first >= self.pages:
            return
        last = start + (length - 1)
        last = self.pages - 1 if last < start else min(last // self.page_size, self.pages - 1)
        write_before_look()
        for i in range(first >> 6, (last >> 6) + 1):
            set_bits(&self.word[i], word_mask(i, first, last))

    cdef void clear_pages(self, u64 first, u64 last) noexcept nogil:
        cdef u64 i
        for i in range(first >> 6, (last >> 6) + 1):
            clear_bits(&self.word[i], word_mask(i, first, last))

    cdef int pages_of(self, object start, object length, u64 *first, u64 *last) except -1:
        """Page numbers of a byte range, clipped; False if nothing of it is covered."""
        cdef Span span
        as_span(start, length, &span, True)
        if span.empty or not self.pages or span.first // self.page_size >= self.pages:
            return False
        first[0] = span.first // self.page_size
        last[0] = min(span.last // self.page_size, self.pages - 1)
        return True

    def set_range(self, start, length):
        """Mark every page that ``[start, start + length)`` touches. O(pages / 64)."""
        cdef Span span
        cdef u64 last
        as_span(start, length, &span, True)
        if span.empty or not self.byte_size:
            return
        last = (self.byte_size - 1) // self.page_size
        if span.first // self.page_size <= last:
            # No more of it than its pages hold. A length of 2**64 would not fit; its last byte has
            # no page of its own.
            last *= self.page_size
            last += min(self.page_size - 1, <u64>-1 - last)
            self.mark(span.first, min(min(span.last, last) - span.first, <u64>-2) + 1)

    def reset_range(self, start, length):
        """Clear every page that ``[start, start + length)`` touches. O(pages / 64)."""
        cdef u64 first, last
        if self.pages_of(start, length, &first, &last):
            self.clear_pages(first, last)

    def is_set(self, addr):
        """Whether the page that holds byte ``addr`` is dirty."""
        return is_dirty(self, as_address(addr) // self.page_size)

    def set_bit(self, page):
        """Mark page number ``page``; beyond the end nothing happens."""
        cdef u64 number = as_address(page, "page")
        if self.byte_size and number <= (self.byte_size - 1) // self.page_size:
            self.mark(number * self.page_size, 1)

    def reset_bit(self, page):
        """Clear page number ``page``; beyond the end nothing happens."""
        cdef u64 number = as_address(page, "page")
        if number < self.pages:
            self.clear_pages(number, number)

    def is_bit_set(self, page):
        """Whether page number ``page`` is dirty."""
        return is_dirty(self, as_address(page, "page"))

    def merge(self, start, const u64[::1] words not None, page_size=None):
        """Mark what another bitmap has set, such as one that a kernel has filled.

        Args:
            start: The address that its first bit stands for.
            words: A ``uint64`` array; bit ``i`` of word ``w`` is the page at
                ``start + (64 * w + i) * page_size``. What would be beyond ``2**64`` is nothing.
            page_size: Bytes to one of its bits; by default as here.

        Returns:
            How many bits are set there.

        Cost: O(words + runs of set bits), with the GIL held.
        """
        cdef u64 base = as_address(start, "start")
        cdef u64 unit = self.page_size if page_size is None else as_address(page_size, "page_size")
        cdef u64 found = 0, first = 0, run = 0, bits, at, ones
        cdef size_t i
        if not unit:
            raise ValueError("page_size must be greater than 0")
        for i in range(<size_t>words.shape[0]):
            bits, at = words[i], 64 * <u64>i
            found += count_bits(bits)
            while bits:
                at += lowest_bit(bits)
                bits >>= lowest_bit(bits)
                ones = 64 if bits == <u64>-1 else lowest_bit(~bits)
                if run and first + run != at:
                    self.mark_pages(base, first, run, unit)
                    run = 0
                if not run:
                    first = at
                run += ones
                at += ones
                bits = 0 if ones == 64 else bits >> ones
        if run:
            self.mark_pages(base, first, run, unit)
        return found

    cdef void mark_pages(self, u64 base, u64 first, u64 count, u64 unit) noexcept:
        """Mark pages of another size, counted from ``base``. Plain C: it cannot raise."""
        cdef u64 most = (<u64>-1 - base) // unit, begin, last
        if first > most:
            return
        last = min(first + (count - 1), most)
        begin = base + first * unit
        last = base + last * unit
        last += min(unit - 1, <u64>-1 - last)
        # As in `set_range`: a length of 2**64 would not fit, nor does its last byte matter.
        self.mark(begin, min(last - begin, <u64>-2) + 1)

    def slice_at(self, offset):
        """The bitmap seen from byte ``offset`` on, as a :class:`BitmapSlice`."""
        cdef BitmapSlice made = BitmapSlice.__new__(BitmapSlice)
        made.bitmap, made.offset = self, as_address(offset, "offset")
        return made

    def enlarge(self, extra):
        """Cover ``extra`` more bytes, clean ones. O(pages)."""
        cdef Span span
        as_span(self.byte_size, extra, &span, True)
        if not span.empty:
            if span.last == <u64>-1:
                raise InvalidAddressError(
                    self.byte_size, extra, None, "a bitmap covers less than 2**64 bytes"
                )
            as_span(self.log_start, span.last + 1, &span, True)
            self.grow(span.last - self.log_start + 1)

    def get_and_reset(self):
        """Take all bits and leave the bitmap clean.

        Returns:
            ``uint64`` words; bit ``i`` of word ``w`` is page ``64 * w + i``.

        Cost: O(pages / 64) at memory speed; the GIL is released.
        """
        return self.snapshot(True)

    def peek(self):
        """The words as :meth:`get_and_reset` returns them; the bitmap stays as it is."""
        return self.snapshot(False)

    cdef object snapshot(self, bint clear):
        cdef size_t count = (self.pages + 63) >> 6
        words = np.empty(count, np.uint64)
        cdef u64[::1] view = words
        cdef u64 found = 0
        cdef size_t i
        if count:
            with nogil:
                pthread_rwlock_rdlock(&self.lock)
                if clear:
                    take_words(self.word, &view[0], count)
                else:
                    peek_words(self.word, &view[0], count)
                pthread_rwlock_unlock(&self.lock)
        if clear and tracing & LIFE:
            for i in range(count):
                found += count_bits(view[i])
            self.trace_harvest(0, self.pages, found)
        return words

    cdef void trace_harvest(self, u64 first, u64 pages, u64 found) noexcept:
        """Write that the dirty ones of some pages were taken. Plain C: it cannot raise."""
        cdef TraceRecord record = trace_record(WHAT_HARVEST, 0)
        record.address, record.length = first * self.page_size, pages * self.page_size
        record.detail = found
        trace(&record)

    def reset(self):
        """Clear all bits."""
        if self.pages:
            self.clear_pages(0, self.pages - 1)

    def dirty_pages(self, start=0, length=None, *, bint clear=False, page_size=None):
        """The numbers of the dirty pages that a byte range touches.

        Args:
            start: First byte of the range.
            length: Bytes; None for all that follows.
            clear: Take the bits, atomically, instead of only looking at them.
            page_size: Count in pages of this size instead of the bitmap's own, which must be a
                multiple or a fraction of it.

        Returns:
            A ``uint64`` array, ascending.

        Raises:
            ValueError: Neither page size divides the other; nothing was cleared.

        Cost: O(pages / 64 + pages listed) at memory speed; the GIL is released.
        """
        cdef u64 first = 0, last = 0, begin = as_address(start, "start")
        cdef u64 unit = self.page_size if page_size is None else as_address(page_size, "page_size")
        if not unit or (unit % self.page_size and self.page_size % unit):
            raise ValueError(
                f"pages of {unit} bytes neither divide nor are divided by {self.page_size}"
            )
        if length is None:
            length = (1 << 64) - begin
        if not self.pages_of(start, length, &first, &last):
            return np.zeros(0, np.uint64)
        found = self.pages_in(first, last, clear, max(unit // self.page_size, 1))
        if unit >= self.page_size:
            return found
        parts = np.arange(self.page_size // unit, dtype=np.uint64)
        finer = (found[:, None] * np.uint64(len(parts)) + parts).reshape(-1)
        end = min(begin + length, self.byte_size)
        return finer[(finer >= begin // unit) & (finer <= (end - 1) // unit)]

    cdef object pages_in(self, u64 first, u64 last, bint clear, u64 group):
        """The dirty ones of the pages ``first`` to ``last``, inclusive, in groups of so many."""
        cdef u64 taken[HARVEST_WORDS]
        cdef u64 at = first >> 6, end = (last >> 6) + 1, total = 0, next = 0, begin, stop
        cdef size_t words, room = 0
        cdef u64 *page = NULL
        cdef u64 *grown = NULL
        cdef u64[::1] view
        try:
            with nogil:
                pthread_rwlock_rdlock(&self.lock)
                while at < end:
                    words = min(end - at, <u64>HARVEST_WORDS)
                    if total + 64 * words > room:
                        room = 2 * (total + 64 * words)
                        grown = <u64 *>realloc(page, room * sizeof(u64))
                        if grown is NULL:
                            break
                        page = grown
                    GUESTIO_ASSERT(total + 64 * words <= room)
                    self.take_chunk(at, words, first, last, clear, taken)
                    if group == 1:
                        total += list_pages(taken, words, at << 6, page + total)
                    else:
                        total += list_groups(taken, words, at << 6, group, &next, page + total)
                    at += words
                pthread_rwlock_unlock(&self.lock)
            if grown is NULL:
                PyErr_NoMemory()
            result = np.empty(total, np.uint64)
            if clear and tracing & LIFE:
                self.trace_harvest(first, last - first + 1, total * group)
            if total:
                view = result
                memcpy(&view[0], page, total * sizeof(u64))
            return result
        except BaseException:
            # Nothing that was taken may be lost; of a group it is not known which pages they were.
            for at in range(total if clear else 0):
                begin = max(page[at] * group, first)
                stop = min(page[at] * group + (group - 1), last)
                self.mark(begin * self.page_size, (stop - begin) * self.page_size + 1)
            raise
        finally:
            free(page)

    cdef void take_chunk(
        self, u64 at, size_t words, u64 first, u64 last, bint clear, u64 *taken
    ) noexcept nogil:
        """Take or look at some words, as far as their pages are asked for."""
        cdef size_t head = 0, tail = words
        if not clear:
            peek_words(&self.word[at], taken, words)
            taken[0] &= word_mask(at, first, last)
            taken[words - 1] &= word_mask(at + words - 1, first, last)
        else:
            if at == first >> 6 or words == 1:
                taken[0] = take_bits(&self.word[at], word_mask(at, first, last))
                head = 1
            if head < tail and at + words - 1 == last >> 6:
                tail -= 1
                taken[tail] = take_bits(&self.word[at + tail], word_mask(at + tail, first, last))
            take_words(&self.word[at + head], taken + head, tail - head)

    def counts(self, start, length, parts):
        """How many dirty pages each of equal parts of a byte range touches.

        Args:
            start: First byte of the range.
            length: Bytes, greater than 0; a multiple of ``parts``. What is beyond the bitmap is
                never dirty.
            parts: How many, 1 or more.

        Returns:
            A ``uint64`` array.

        Cost: O(pages / 64 + parts) at memory speed; the GIL is released.
        """
        cdef Span span
        cdef size_t count = as_size(parts, "parts"), part
        cdef u64 size, low, first, last, i, total
        as_span(start, length, &span, False)
        if not count:
            raise ValueError("a range has 1 part or more")
        size = (span.last - span.first) // count + 1
        if (size - 1) + size * (count - 1) != span.last - span.first:
            raise ValueError(f"{length:#x} bytes are not {parts} equal parts")
        found = np.zeros(count, np.uint64)
        cdef u64[::1] view = found
        with nogil:
            pthread_rwlock_rdlock(&self.lock)
            for part in range(count):
                low = span.first + part * size
                first = low // self.page_size
                if first >= self.pages:
                    break
                last = min((low + (size - 1)) // self.page_size, self.pages - 1)
                total = 0
                for i in range(first >> 6, (last >> 6) + 1):
                    total += count_bits(peek_word(&self.word[i]) & word_mask(i, first, last))
                view[part] = total
            pthread_rwlock_unlock(&self.lock)
        return found

    def count(self):
        """How many pages are dirty."""
        cdef u64 i, total = 0
        with nogil:
            pthread_rwlock_rdlock(&self.lock)
            for i in range((self.pages + 63) >> 6):
                total += count_bits(peek_word(&self.word[i]))
            pthread_rwlock_unlock(&self.lock)
        return total

    def copy(self):
        """A snapshot that lives on its own."""
        cdef AtomicBitmap twin = AtomicBitmap(self.byte_size, self.page_size)
        peek_words(self.word, twin.word, (self.pages + 63) >> 6)
        return twin

    def __len__(self):
        return self.pages

    def __repr__(self):
        return (
            f"<AtomicBitmap of {self.byte_size:#x} bytes in pages of {self.page_size}: "
            f"{self.count()} dirty>"
        )

    def __bool__(self):
        """True, whatever it covers: the length is a number of pages."""
        return True


cdef class BitmapSlice:
    """A bitmap whose first byte is somewhere inside another one.

    Addresses past the end of the other bitmap are never dirty. Sums past ``2**64`` are refused,
    so that no unrelated page is ever marked.

    Attributes:
        bitmap: The other bitmap.
        offset: Where in it this one begins, in bytes.
    """

    def __init__(self, *args, **kwargs):
        raise TypeError("slices come from AtomicBitmap.slice_at()")

    def __repr__(self):
        return f"<BitmapSlice at {self.offset:#x} of {self.bitmap!r}>"

    def set_range(self, start, length):
        """Mark every page that ``[start, start + length)`` touches.

        Raises:
            InvalidAddressError: The range passes ``2**64`` in the other bitmap.
        """
        self.bitmap.set_range(self.within(start, length), length)

    def reset_range(self, start, length):
        """Clear every page that ``[start, start + length)`` touches; raises as :meth:`set_range`."""
        self.bitmap.reset_range(self.within(start, length), length)

    def is_set(self, addr):
        """Whether the page that holds byte ``addr`` is dirty; raises as :meth:`set_range`."""
        return self.bitmap.is_set(self.within(addr, 1))

    def slice_at(self, offset):
        """The bitmap seen from byte ``offset`` of this one on."""
        return self.bitmap.slice_at(self.within(offset, 1))

    cdef object within(self, object start, object length):
        cdef Span span
        as_span(start, length, &span, True)
        if span.last > <u64>-1 - self.offset:
            raise InvalidAddressError(
                span.first, length, None, f"it passes 2**64 in a slice at {self.offset:#x}"
            )
        return self.offset + span.first


publish_type(AtomicBitmap, "guestio.memory.AtomicBitmap", "AtomicBitmap(size, page_size=4096, *, log=None, log_start=0, own=True)\n--\n\n")
publish_type(BitmapSlice, "guestio.memory.BitmapSlice", "BitmapSlice(*args, **kwargs)\n--\n\n")
