"""The list of what a translation lacks, as Python sees it."""

import random

import pytest

from guestio import Iotlb, IotlbFails, IovaRange, Permissions
from guestio._core.iommu.address_space import AddressSpace
from guestio._core.iommu.misses import touched
from guestio._core.memory.vector import RegionTable
from guestio._core.virtio.split import SplitRing

R, RW = int(Permissions.READ), int(Permissions.READ_WRITE)


@pytest.fixture
def misses():
    """Those of a ring of 4 of which no area is mapped: its three areas."""
    ring = SplitRing(AddressSpace(RegionTable([]), Iotlb()._map), 4, 0x1000, 0x2000, 0x3000)
    return ring.run_once(None)[1]


EXPECTED = [
    (IovaRange(0x1000, 64), R),
    (IovaRange(0x2000, 12), R),
    (IovaRange(0x3000, 36), RW),
]


def test_it_is_a_sequence(misses):
    listed = list(misses)
    assert sorted(listed) == sorted(EXPECTED)
    assert len(misses) == 3
    assert [misses[i] for i in range(3)] == listed
    assert [misses[i] for i in (-3, -2, -1)] == listed
    assert repr(misses) == f"<Misses {listed}>"


@pytest.mark.parametrize("index", [3, -4, 100])
def test_it_ends(misses, index):
    with pytest.raises(IndexError, match=f"miss {index} of 3"):
        misses[index]


def test_an_access_that_fails_tells_all_that_is_missing_and_all_that_is_forbidden():
    iotlb = Iotlb()
    for page in (1, 5):
        iotlb.set_mapping(page << 12, page << 12, 4096, Permissions.WRITE)
    with pytest.raises(IotlbFails) as caught:
        AddressSpace(RegionTable([]), iotlb._map).gather(0, 7 << 12, R)
    assert caught.value.misses == [(0, 4096), (0x2000, 0x3000), (0x6000, 4096)]
    assert caught.value.access_fails == [(0x1000, 4096), (0x5000, 4096)]


def test_pages_that_huge_ranges_touch():
    """A driver chooses how long a buffer is; what is looked at must not grow with it."""
    known = {(0x5000, R), (0x5000, RW), (1 << 63, R), ((1 << 64) - 4096, R), (0x4000, R)}
    assert touched([(IovaRange(0x5000, (1 << 64) - 0x5000), R)], known) == {
        (0x5000, R),
        (1 << 63, R),
        ((1 << 64) - 4096, R),
    }
    assert touched([(IovaRange(0x4FFF, 1 << 40), R), (IovaRange(0x5001, 1 << 40), RW)], known) == {
        (0x4000, R),
        (0x5000, R),
        (0x5000, RW),
    }


@pytest.mark.parametrize("seed", range(20))
def test_pages_that_ranges_touch_are_the_same_by_either_way(seed):
    rng = random.Random(seed)
    known = {(rng.randrange(40) << 12, rng.choice((R, RW))) for _ in range(rng.randrange(1, 12))}
    missing = [
        (IovaRange(rng.randrange(40 << 12), rng.randrange(1, 20 << 12)), rng.choice((R, RW)))
        for _ in range(4)
    ]
    assert touched(missing, known) == {
        (page, access)
        for page, access in known
        for where, wanted in missing
        if access == wanted and where.base < page + 4096 and page < where.base + where.length
    }


def test_a_range_touches_a_page_with_its_last_byte():
    assert touched([(IovaRange(0, 0x1001), R)], {(0x1000, R)}) == {(0x1000, R)}
