"""Which pages have been written: one bit a page, set and harvested atomically."""

import numpy as np

from cpython.exc cimport PyErr_NoMemory
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from guestio._core.border cimport Span, as_address, as_size, as_span, u64

cdef extern from * nogil:
    """
    static inline void set_bits(uint64_t *word, uint64_t bits)
    {
        /* Most writes hit pages that are dirty already: look before locking the line. */
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
    #define first_bit(bits) __builtin_ctzll(bits)
    #define count_bits(bits) __builtin_popcountll(bits)
    """
    void set_bits(u64 *word, u64 bits)
    void clear_bits(u64 *word, u64 bits)
    u64 peek_word(const u64 *word)
    u64 take_bits(u64 *word, u64 bits)
    int first_bit(u64 bits)
    int count_bits(u64 bits)


cdef inline u64 word_mask(u64 index, u64 first, u64 last) noexcept nogil:
    """The bits of word ``index`` that stand for pages ``first`` to ``last``, inclusive."""
    cdef u64 mask = <u64>-1
    if index == first >> 6:
        mask &= <u64>-1 << (first & 63)
    if index == last >> 6:
        mask &= <u64>-1 >> (63 - (last & 63))
    return mask


cdef class AtomicBitmap:
    """Dirty pages of a range of addresses that begins at 0.

    Args:
        size: Bytes that the bitmap covers; a last, partial page counts as one.
        page_size: Bytes to a bit; greater than 0, not necessarily a power of two.

    Addresses beyond the range are never dirty, and marking them does nothing. Threads: marking,
    testing and harvesting may be done from any thread at any time.
    """

    def __cinit__(self, size, page_size=4096):
        cdef u64 unit = as_address(page_size, "page_size")
        if not unit:
            raise ValueError("page_size must be greater than 0")
        self.page_size = unit
        self.grow(as_address(size, "size"))

    def __dealloc__(self):
        free(self.word)

    cdef int grow(self, u64 byte_size) except -1:
        cdef u64 pages = byte_size // self.page_size + (byte_size % self.page_size != 0)
        cdef u64 *word = <u64 *>calloc((pages >> 6) + 1, sizeof(u64))
        if word is NULL:
            PyErr_NoMemory()
        if self.word is not NULL:
            memcpy(word, self.word, ((self.pages >> 6) + 1) * sizeof(u64))
            free(self.word)
        self.word, self.pages, self.byte_size = word, pages, byte_size
        return 0

    cdef void mark(self, u64 start, u64 length) noexcept nogil:
        cdef u64 first, last, i
        if not length or not self.pages:
            return
        first = start // self.page_size
        if first >= self.pages:
            return
        last = start + (length - 1)
        last = self.pages - 1 if last < start else min(last // self.page_size, self.pages - 1)
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
        cdef u64 first, last
        if self.pages_of(start, length, &first, &last):
            self.mark(first * self.page_size, (last - first) * self.page_size + 1)

    def reset_range(self, start, length):
        """Clear every page that ``[start, start + length)`` touches. O(pages / 64)."""
        cdef u64 first, last
        if self.pages_of(start, length, &first, &last):
            self.clear_pages(first, last)

    def is_set(self, addr):
        """Whether the page that holds byte ``addr`` is dirty."""
        cdef u64 page = as_address(addr) // self.page_size
        return page < self.pages and bool(peek_word(&self.word[page >> 6]) >> (page & 63) & 1)

    def set_bit(self, page):
        """Mark page number ``page``; beyond the end nothing happens."""
        cdef u64 number = as_address(page, "page")
        if number < self.pages:
            set_bits(&self.word[number >> 6], <u64>1 << (number & 63))

    def reset_bit(self, page):
        """Clear page number ``page``; beyond the end nothing happens."""
        cdef u64 number = as_address(page, "page")
        if number < self.pages:
            clear_bits(&self.word[number >> 6], <u64>1 << (number & 63))

    def is_bit_set(self, page):
        """Whether page number ``page`` is dirty."""
        cdef u64 number = as_address(page, "page")
        return number < self.pages and bool(
            peek_word(&self.word[number >> 6]) >> (number & 63) & 1
        )

    def enlarge(self, extra):
        """Cover ``extra`` more bytes, clean ones. O(pages)."""
        cdef Span span
        as_span(self.byte_size, extra, &span, True)
        if not span.empty:
            self.grow(span.last + 1)

    def get_and_reset(self):
        """Take all bits and leave the bitmap clean.

        Returns:
            ``uint64`` words; bit ``i`` of word ``w`` is page ``64 * w + i``.
        """
        cdef u64 count = (self.pages + 63) >> 6
        words = np.zeros(count, np.uint64)
        cdef u64[::1] view = words
        cdef u64 i
        with nogil:
            for i in range(count):
                view[i] = take_bits(&self.word[i], <u64>-1)
        return words

    def reset(self):
        """Clear all bits."""
        if self.pages:
            self.clear_pages(0, self.pages - 1)

    def dirty_pages(self, start=0, length=None, *, bint clear=False):
        """The numbers of the dirty pages that a byte range touches.

        Args:
            start: First byte of the range.
            length: Bytes; None for all that follows.
            clear: Take the bits, atomically, instead of only looking at them.

        Returns:
            A ``uint64`` array, ascending.

        Cost: O(pages / 64 + dirty pages).
        """
        cdef u64 first = 0, last = 0, i, bits, total = 0, words
        begin = as_address(start, "start")
        if length is None:
            length = (1 << 64) - begin
        if not self.pages_of(start, length, &first, &last):
            return np.zeros(0, np.uint64)
        words = (last >> 6) - (first >> 6) + 1
        snapshot = np.empty(words, np.uint64)
        cdef u64[::1] taken = snapshot
        with nogil:
            for i in range(words):
                bits = word_mask((first >> 6) + i, first, last)
                if clear:
                    taken[i] = take_bits(&self.word[(first >> 6) + i], bits)
                else:
                    taken[i] = peek_word(&self.word[(first >> 6) + i]) & bits
                total += count_bits(taken[i])
        found = np.empty(total, np.uint64)
        if not total:
            return found
        cdef u64[::1] page = found
        cdef u64 at = 0
        with nogil:
            for i in range(words):
                bits = taken[i]
                while bits:
                    page[at] = (((first >> 6) + i) << 6) + first_bit(bits)
                    at += 1
                    bits &= bits - 1
        return found

    def count(self):
        """How many pages are dirty."""
        cdef u64 i, total = 0
        with nogil:
            for i in range((self.pages + 63) >> 6):
                total += count_bits(peek_word(&self.word[i]))
        return total

    def copy(self):
        """A snapshot that lives on its own."""
        cdef AtomicBitmap twin = AtomicBitmap(self.byte_size, self.page_size)
        cdef u64 i
        for i in range((self.pages + 63) >> 6):
            twin.word[i] = peek_word(&self.word[i])
        return twin

    def __len__(self):
        return self.pages
