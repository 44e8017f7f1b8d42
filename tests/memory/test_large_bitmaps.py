"""Dirty bitmaps beyond the sizes of examples: page numbers past 2^32, long lists, larger pages."""

import numpy as np
import pytest

from guestio import AtomicBitmap

BEYOND = (1 << 32) + 5


@pytest.fixture(scope="module")
def vast():
    """2^33 pages, of which the kernel has to provide only what is marked."""
    return AtomicBitmap(1 << 45)


def test_pages_beyond_2_to_the_32(vast):
    vast.set_range(BEYOND * 4096 + 17, 1)
    vast.set_bit(3)
    around = (BEYOND - 64) * 4096
    assert len(vast) == 1 << 33
    assert vast.is_set(BEYOND * 4096)
    assert vast.is_bit_set(BEYOND)
    assert not vast.is_bit_set(BEYOND - (1 << 32))
    assert vast.dirty_pages(around, 128 * 4096).tolist() == [BEYOND]
    assert vast.dirty_pages(around, 128 * 4096, page_size=1 << 21).tolist() == [BEYOND // 512]
    assert vast.dirty_pages(0, 1 << 20).tolist() == [3]
    assert vast.slice_at(1 << 44).is_set((BEYOND << 12) - (1 << 44))
    vast.reset_range(around, 128 * 4096)
    assert not vast.is_bit_set(BEYOND)
    vast.set_bit(BEYOND)
    assert vast.dirty_pages(around, 128 * 4096, clear=True).tolist() == [BEYOND]
    assert not vast.is_bit_set(BEYOND)
    vast.reset_bit(3)


def test_all_of_it_is_counted_and_listed(vast):
    chosen = [0, 63, 64, (1 << 32) - 1, 1 << 32, BEYOND, (1 << 33) - 1]
    for page in chosen:
        vast.set_bit(page)
    assert vast.count() == len(chosen)
    assert vast.dirty_pages().tolist() == chosen
    assert vast.dirty_pages(page_size=1 << 21).tolist() == sorted({p // 512 for p in chosen})
    assert vast.dirty_pages(clear=True).tolist() == chosen
    assert vast.count() == 0


@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("pages", [131_072, 131_073, 400_000])
def test_a_list_longer_than_was_reckoned_with(pages, clear):
    """The list grows while it is made; what is listed stays."""
    bitmap = AtomicBitmap(pages * 4096)
    bitmap.set_range(0, pages * 4096)
    found = bitmap.dirty_pages(clear=clear)
    assert np.array_equal(found, np.arange(pages, dtype=np.uint64))
    assert bitmap.count() == (0 if clear else pages)


@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("group", [2, 3, 63, 64, 65, 100, 512, 1 << 18])
def test_larger_pages_against_a_set(group, clear):
    rng = np.random.default_rng(group)
    pages = 200_000
    for density in (3, 300, 3000):
        bitmap = AtomicBitmap(pages * 4096)
        chosen = rng.integers(0, pages, density)
        for start in chosen.tolist():
            bitmap.set_range(start * 4096, 4096 * int(rng.integers(1, 200)))
        own = bitmap.dirty_pages()
        first = int(rng.integers(0, pages // 2))
        asked = own[(own >= first) & (own < first + pages // 3)]
        arguments = first * 4096, pages // 3 * 4096
        found = bitmap.dirty_pages(*arguments, page_size=group * 4096, clear=clear)
        assert found.tolist() == sorted({page // group for page in asked.tolist()})
        assert bitmap.count() == len(own) - (len(asked) if clear else 0)


def test_smaller_pages():
    bitmap = AtomicBitmap(10 * 4096 + 100)
    bitmap.set_range(4096, 1)
    bitmap.set_range(10 * 4096, 1)
    assert bitmap.dirty_pages(page_size=1024).tolist() == [4, 5, 6, 7, 40]
    assert bitmap.dirty_pages(5 * 1024, 2048, page_size=1024).tolist() == [5, 6]


def test_marks_at_the_edges_of_words_and_of_the_range():
    for first, length in ((0, 1), (63, 2), (64, 64), (1, 199), (190, 10), (0, 200)):
        bitmap = AtomicBitmap(200, 1)
        bitmap.set_range(first, length)
        wanted = list(range(first, min(first + length, 200)))
        assert bitmap.dirty_pages().tolist() == wanted
        assert bitmap.count() == len(wanted)
        inside = wanted[1:-1]
        bitmap.reset_range(first + 1, max(length - 2, 0))
        assert bitmap.dirty_pages().tolist() == [p for p in wanted if p not in inside]
    bitmap = AtomicBitmap(200, 1)
    bitmap.set_range(150, (1 << 64) - 150)
    assert bitmap.dirty_pages().tolist() == list(range(150, 200))
    bitmap.set_range(200, 5)
    bitmap.set_range(1 << 63, 5)
    assert bitmap.count() == 50
    # A harvest of a part leaves the rest of its words alone.
    assert bitmap.dirty_pages(160, 20, clear=True).tolist() == list(range(160, 180))
    assert bitmap.dirty_pages().tolist() == [*range(150, 160), *range(180, 200)]


def test_enlarging_and_copying_keep_the_marks():
    bitmap = AtomicBitmap(64 * 4096)
    bitmap.set_bit(0)
    bitmap.set_bit(63)
    twin = bitmap.copy()
    bitmap.enlarge(64 * 4096 + 1)
    assert len(bitmap) == 129
    bitmap.set_bit(128)
    assert bitmap.dirty_pages().tolist() == [0, 63, 128]
    assert twin.dirty_pages().tolist() == [0, 63]
    assert bitmap.peek().tolist() == [1 | 1 << 63, 0, 1]
    assert bitmap.get_and_reset().tolist() == [1 | 1 << 63, 0, 1]
    assert bitmap.count() == 0
    assert twin.count() == 2
    # The last word, of which only some pages are covered.
    odd = AtomicBitmap(70 * 4096)
    odd.set_bit(69)
    odd.enlarge(4096)
    assert odd.dirty_pages().tolist() == [69]
    assert twin
    assert AtomicBitmap(0)
