"""The IOTLB's border: bad numbers are refused and change nothing."""

import io

import numpy as np
import pytest

from guestio import (
    AtomicBitmap,
    GuestRegionCollection,
    Iommu,
    IommuMemory,
    Iotlb,
    Permissions,
)
from guestio._core.iommu.intervals import IntervalMap
from tests.kit.edge_cases import cases, check_refusals

R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE


class Tables(Iommu):
    """An IOMMU whose IOTLB always holds everything."""

    def __init__(self, iotlb):
        self._iotlb = iotlb

    @property
    def iotlb(self):
        return self._iotlb


class World:
    """An IOTLB with a mapping and a pin, and memory seen through it."""

    def __init__(self):
        self.iotlb = Iotlb()
        self.iotlb.set_mapping(0, 0x1000, 0x1000, RW)
        self.iotlb.pin(0, 8)
        self.domain = IntervalMap(merge=False)
        self.domain.add(0, 0x1000, 0, RW)
        self.domain.pin(0, 8)
        self.backend = GuestRegionCollection.from_ranges([(0x1000, 0x1000)])
        self.bitmap = AtomicBitmap(0x1000)
        self.iommu = Tables(self.iotlb)
        self.memory = IommuMemory(self.backend, self.iommu, bitmap=self.bitmap)

    def subjects(self):
        return {
            "Iotlb": self.iotlb,
            "IntervalMap": self.domain,
            "Iommu": {"translate": self.iommu.translate},
            "IommuMemory": self.memory,
            "maker": {
                "iotlb": lambda capacity=None: Iotlb(capacity),
                "memory": IommuMemory,
            },
        }

    def state(self):
        return (
            list(self.iotlb),
            list(self.domain),
            len(self.iotlb._map.leases),
            self.iotlb.stats().invalidations,
            self.backend.read(0x1000, 0x1000),
            self.bitmap.count(),
            self.memory.enabled,
        )

    def good(self):
        return {
            **dict.fromkeys(("addr", "iova", "start", "target", "map_to"), 0),
            **dict.fromkeys(("length", "width", "count"), 8),
            **dict.fromkeys(("value", "expected", "new"), 0),
            **dict.fromkeys(("access", "perm"), RW),
            "starts": [0],
            "lengths": [8],
            "data": bytes(8),
            "buffer": bytearray(8),
            "source": io.BytesIO(bytes(8)),
            "sink": io.BytesIO(),
            "kind": "<u8",
            "write_obj.value": np.uint64(0),
            "backend": self.backend,
            "with_replaced_backend.new": self.backend,
            "iommu": self.iommu,
            "capacity": None,
            "drain.timeout": 0,
            "parts": 2,
            "most": 4,
        }


def all_cases():
    return [case for owner, one in World().subjects().items() for case in cases(owner, one)]


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_bad_arguments_are_refused(case):
    world = World()
    check_refusals(case, world.subjects()[case.owner], world.good(), world.state)
    world.iotlb._map.check()
    world.domain.check()
    assert len(world.iotlb._map.leases) == 0


@pytest.mark.parametrize("capacity", [0, -1, 2**63])
def test_capacities_that_make_no_sense(capacity):
    with pytest.raises(ValueError, match="capacity"):
        Iotlb(capacity)


def test_batches_take_what_is_made_of_integers():
    iotlb = Iotlb()
    iotlb.set_mapping(0, 0x1000, 0x100, RW)
    expected = [0x1005, 0x1007]
    for starts in (
        [5, 7],
        (5, 7),
        np.array([5, 7]),
        np.array([5, 7], np.uint8),
        np.array([5, 7], ">u8"),
        np.array([5, 0, 7], np.uint64)[::2],
    ):
        targets, status = iotlb.lookup_many(starts, 4, R)
        assert (targets.tolist(), status.tolist()) == (expected, [0, 0])
    for nothing in ([], np.zeros(0, np.uint64)):
        targets, status = iotlb.lookup_many(nothing, 1, R)
        assert len(targets) == len(status) == 0
    assert iotlb.stats().hits == 12


@pytest.mark.parametrize(
    ("starts", "lengths"),
    [
        ([1.0], 1),
        ([1], [1.5]),
        ([1, 2], [1]),
        ([1], [1, 2]),
        (["a"], 1),
        ([True, False], 1),
        ([1, True], 1),
        ([2**64], 1),
        ([2**63, -1], 1),
        ([-1, 5], 1),
        ([[1, 2], [3]], 1),
        (None, 1),
        ([1], None),
        (np.array([1.0, np.nan]), 1),
        (np.array([1], object), 1),
    ],
)
def test_batches_refuse_everything_else(starts, lengths):
    iotlb = Iotlb()
    with pytest.raises((TypeError, ValueError)):
        iotlb.lookup_many(starts, lengths, R)
    assert iotlb.stats()[2:] == (0, 0, 0, 0, 0)


def test_ranges_of_a_batch_that_leave_the_space_miss():
    iotlb = Iotlb()
    iotlb.set_mapping(0, 0, 2**64, RW)
    top = 2**64 - 1
    _, status = iotlb.lookup_many([top, top, 0, top], [1, 2, top, 0], R)
    assert status.tolist() == [0, 1, 0, 0]


def test_nothing_is_wrong_with_numpy_integers():
    iotlb = Iotlb(np.int64(5))
    iotlb.set_mapping(np.uint64(16), np.uint32(32), np.uint8(64), RW)
    assert iotlb.lookup(np.uint64(20), np.int16(2), R) == [(36, 2)]
    assert iotlb.capacity == 5


def test_unpinning_what_is_not_pinned():
    iotlb = Iotlb(2)
    iotlb.pin(0x1000, 0x1000)
    for span in ((0x1000, 0x800), (0x1000, 0x1001), (0, 0x1000)):
        with pytest.raises(ValueError, match="not pinned"):
            iotlb.unpin(*span)
    iotlb.unpin(0x1000, 0x1000)
    with pytest.raises(ValueError, match="not pinned"):
        iotlb.unpin(0x1000, 0x1000)


def test_strict_maps_refuse_and_change_nothing():
    domain = IntervalMap(merge=False)
    assert domain.add(0x1000, 0x1000, 0, R)
    before = list(domain)
    assert not domain.add(0x1FFF, 0x1000, 0, R)
    assert domain.take(0x1800, 0x1000) is None
    for refused in (lambda: domain.add(0, 0, 0, R), lambda: domain.take(0, 0)):
        with pytest.raises(ValueError, match="greater than 0"):
            refused()
    assert list(domain) == before
    assert domain.take(0, 0x1000) == []
