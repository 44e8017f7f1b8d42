"""A survey is what counting part by part gives, of mappings and of dirty pages."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestio._core.iommu.intervals import IntervalMap, follow
from guestio.addr import Permissions
from guestio.errors import InvalidAddressError
from guestio.memory import AtomicBitmap

SPACE = 1 << 64
PARTS = 8
starts = st.one_of(
    st.integers(0, 400), st.integers(SPACE - 400, SPACE - 1), st.integers(0, SPACE - 1)
)
mappings = st.lists(st.tuples(starts, st.integers(1, 90), starts, st.integers(0, 3)), max_size=60)
windows = st.one_of(
    st.just((0, SPACE)),
    st.tuples(st.integers(0, 300), st.integers(1, 60).map(lambda n: n * PARTS)),
    st.integers(1, 50).map(lambda n: (SPACE - n * PARTS, n * PARTS)),
)


def filled(drawn: list[tuple[int, int, int, int]], **options: Any) -> IntervalMap:
    made = IntervalMap(**options)
    for start, length, target, perm in drawn:
        made.overwrite(start, min(length, SPACE - start), target, Permissions(perm))
    return made


def counted(table: IntervalMap, start: int, size: int, most: int) -> list[int]:
    """A row of a survey, by way of what overlaps the part."""
    row = [0] * 6
    for first, length, target, perm in table.overlapping(start, size):
        low, high = max(first, start), min(first + length, start + size)
        if row[0] == most:
            row[2] = start + size - low
            break
        if not row[0]:
            row[4], row[5] = low, (target + low - first) % SPACE
        row[0] += 1
        row[1] += high - low
        row[3] |= 1 << int(perm)
    return row


@settings(max_examples=150, deadline=None)
@given(mappings, windows, st.integers(1, 5), st.booleans())
def test_a_survey_is_what_overlaps_each_part(
    drawn: list[tuple[int, int, int, int]], window: tuple[int, int], most: int, merge: bool
) -> None:
    table = filled(drawn, merge=merge)
    start, length = window
    rows, extent = table.survey(start, length, PARTS, most)
    size = length // PARTS
    assert rows.tolist() == [counted(table, start + i * size, size, most) for i in range(PARTS)]
    everything = table.overlapping(0, SPACE)
    if everything:
        assert extent == (everything[0][0], everything[-1][0] + everything[-1][1] - 1)
    else:
        assert extent is None
    assert (table.hits, table.misses) == (0, 0)


def test_many_parts_are_those_of_one_look() -> None:
    table = IntervalMap(merge=False)
    for i in range(3000):
        table.add(i * 3 << 12, 4096, i << 12, Permissions(i % 4))
    rows, _ = table.survey(0, 1 << 26, 1024, 64)
    size = (1 << 26) // 1024
    assert rows.tolist() == [counted(table, i * size, size, 64) for i in range(1024)]
    assert rows[:, 0].sum() == 3000


def test_a_follower_shows_what_it_follows() -> None:
    source, table = filled([(0, 64, 7, 3)]), IntervalMap()
    follow(table, source)
    assert table.survey(0, 128, 2, 1)[0][0].tolist() == [1, 64, 0, 8, 0, 7]
    follow(table, None)
    assert table.survey(0, 128, 2, 1)[1] is None


@pytest.mark.parametrize(
    ("start", "length", "parts", "most"),
    [
        (0, 0, 2, 1),
        (0, 8, 1, 1),
        (0, 9, 2, 1),
        (0, 8, 3, 1),
        (0, 8, 2, 0),
        (0, 8, 0, 1),
        (SPACE - 4, 8, 2, 1),
        (-1, 8, 2, 1),
        (0, 8, 2.0, 1),
    ],
)
def test_what_has_no_parts_is_refused(start: int, length: int, parts: Any, most: int) -> None:
    with pytest.raises((ValueError, TypeError)):
        IntervalMap().survey(start, length, parts, most)


def test_changes_meanwhile_tear_nothing() -> None:
    """A survey while another thread maps and unmaps: each row is of some moment."""
    table, over = IntervalMap(merge=False), threading.Event()

    def change() -> None:
        while not over.is_set():
            for i in range(64):
                table.add(i << 12, 4096, i << 12, Permissions.READ)
            table.clear()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(300):
            rows, _ = table.survey(0, 64 << 12, 64, 4)
            for i, row in enumerate(rows.tolist()):
                assert row in ([0] * 6, [1, 4096, 0, 2, i << 12, i << 12])
    finally:
        over.set()
        thread.join()
    table.check()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 3000),
    st.integers(1, 70),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 200)), max_size=12),
    st.integers(0, 3000),
    st.integers(1, 300),
    st.integers(1, 12),
)
def test_dirty_pages_are_counted_by_part(
    size: int, page: int, marked: list[tuple[int, int]], start: int, part: int, parts: int
) -> None:
    bitmap = AtomicBitmap(size, page)
    for at, length in marked:
        bitmap.set_range(at, length)
    counts = bitmap.counts(start, part * parts, parts)
    assert counts.dtype == np.uint64
    assert counts.tolist() == [
        len(bitmap.dirty_pages(start + i * part, part)) for i in range(parts)
    ]


def test_dirty_pages_of_the_whole_space() -> None:
    bitmap = AtomicBitmap(1 << 20)
    bitmap.set_range(4096, 8192)
    for parts in (1, 2, 1024):
        assert bitmap.counts(0, SPACE, parts).tolist() == [2, *[0] * (parts - 1)]
    assert AtomicBitmap(0).counts(0, 8, 2).tolist() == [0, 0]
    for length, parts in ((0, 1), (9, 2), (8, 0), (SPACE + 1, 1)):
        with pytest.raises((ValueError, InvalidAddressError)):
            bitmap.counts(0, length, parts)
