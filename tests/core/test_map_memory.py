"""Memory of a large map: taken as it grows, and given back as it shrinks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from guestio import Iotlb, Permissions
from guestio._core.base import variant

pytestmark = pytest.mark.skipif(
    "asan" in variant.NAME, reason="the sanitizer keeps memory that was given back for a while"
)

RW = Permissions.READ_WRITE
PAGE = 4096
STRIDE = 2 * PAGE
ENTRIES = 300_000
KEPT = 100
MIB = 1 << 20
GOING = np.random.default_rng(2).permutation(np.arange(KEPT, ENTRIES))


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def fill(iotlb: Iotlb, order: np.ndarray) -> None:
    for page in order:
        start = int(page) * STRIDE
        iotlb.set_mapping(start, 3 * start, PAGE, RW)


def cut_at_once(iotlb: Iotlb) -> None:
    iotlb.invalidate_mapping(KEPT * STRIDE, 1 << 40)


def cut_one_by_one(iotlb: Iotlb) -> None:
    for page in GOING:
        iotlb.invalidate_mapping(int(page) * STRIDE, PAGE)


@pytest.mark.parametrize("shrink", [cut_at_once, cut_one_by_one])
def test_a_map_that_shrinks_gives_memory_back(shrink: Callable[[Iotlb], None]) -> None:
    iotlb = Iotlb()
    before = resident()
    fill(iotlb, np.arange(ENTRIES))
    grown = resident() - before
    assert grown >= 10 * MIB

    shrink(iotlb)

    assert resident() - before < grown / 2
    assert len(iotlb) == KEPT
    iotlb._map.check()
    for page in range(KEPT):
        (found,) = iotlb.lookup(page * STRIDE + 5, 7, RW)
        assert found.base == 3 * page * STRIDE + 5


def test_a_map_that_is_cleared_gives_memory_back_and_serves_on() -> None:
    iotlb = Iotlb()
    before = resident()
    fill(iotlb, np.random.default_rng(1).permutation(ENTRIES))
    grown = resident() - before

    iotlb.invalidate_all()

    assert resident() - before < grown / 4
    iotlb._map.check()
    assert len(iotlb) == 0
    fill(iotlb, np.arange(KEPT))
    iotlb._map.check()
    assert len(iotlb) == KEPT


def test_a_map_that_keeps_changing_takes_no_more() -> None:
    iotlb = Iotlb()
    fill(iotlb, np.arange(ENTRIES))
    rng = np.random.default_rng(3)
    gaps = rng.choice(ENTRIES, 20_000, replace=False) * STRIDE + PAGE + 64
    sizes = []
    for _ in range(6):
        for gap in gaps:
            iotlb.set_mapping(int(gap), 0, 16, RW)
        for gap in gaps:
            iotlb.invalidate_mapping(int(gap), 16)
        sizes.append(resident())
    iotlb._map.check()
    assert sizes[-1] - sizes[0] < 4 * MIB


def test_a_bounded_map_whose_entries_come_and_go_takes_no_more() -> None:
    """As a device's behind an IOMMU whose driver maps and unmaps each request's memory."""
    iotlb = Iotlb(64)
    before = resident()
    for start in range(0, 400_000 * PAGE, PAGE):
        iotlb.set_mapping(start, 0, PAGE, RW)
        iotlb.invalidate_mapping(start, PAGE)
    iotlb._map.check()
    assert resident() - before < MIB
    assert iotlb.evictions == 0
