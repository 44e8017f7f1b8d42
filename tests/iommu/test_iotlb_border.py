"""The IOTLB's border: bad numbers are refused and change nothing."""

import numpy as np
import pytest

from guestio import Iommu, IommuMemory, Iotlb, IotlbFails, Permissions
from guestio._core.intervals import IntervalMap

R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE
NO_INT = [True, False, 1.0, "1", b"1", None, {1: 1}, np.float64(1), np.True_]
NO_U64 = [-1, -(2**63), 2**64 + 1, 2**100]


def calls(iotlb):
    return {
        "set iova": lambda n: iotlb.set_mapping(n, 0, 1, R),
        "set target": lambda n: iotlb.set_mapping(1, n, 1, R),
        "set length": lambda n: iotlb.set_mapping(1, 0, n, R),
        "set perm": lambda n: iotlb.set_mapping(1, 0, 1, n),
        "invalidate iova": lambda n: iotlb.invalidate_mapping(n, 1),
        "invalidate length": lambda n: iotlb.invalidate_mapping(1, n),
        "lookup iova": lambda n: iotlb.lookup(n, 1, R),
        "lookup length": lambda n: iotlb.lookup(1, n, R),
        "lookup access": lambda n: iotlb.lookup(1, 1, n),
        "guard iova": lambda n: iotlb.guard(n, 1, R),
        "guard length": lambda n: iotlb.guard(1, n, R),
        "guard access": lambda n: iotlb.guard(1, 1, n),
        "many access": lambda n: iotlb.lookup_many([1], [1], n),
        "many start": lambda n: iotlb.lookup_many([n], [1], R),
        "many length": lambda n: iotlb.lookup_many([1], [n], R),
        "many one length": lambda n: iotlb.lookup_many([1, 1], n, R),
        "overlapping start": lambda n: iotlb.overlapping(n, 1),
        "overlapping length": lambda n: iotlb.overlapping(1, n),
        "neighbours": iotlb.neighbours,
        "explain iova": lambda n: iotlb.explain(n, 1, R),
        "explain length": lambda n: iotlb.explain(1, n, R),
        "explain access": lambda n: iotlb.explain(1, 1, n),
        "pin start": lambda n: iotlb.pin(n, 1),
        "pin length": lambda n: iotlb.pin(1, n),
        "unpin start": lambda n: iotlb.unpin(n, 1),
        "drain start": lambda n: iotlb.drain(n, 1),
        "drain length": lambda n: iotlb.drain(1, n),
        "check_drain": lambda n: iotlb.check_drain(n, 1),
        "add": lambda n: iotlb.add(n, 1, 0, R),
        "take": lambda n: iotlb.take(n, 1),
        "capacity": lambda n: Iotlb("n" if n is None else n),
    }


@pytest.mark.parametrize("name", calls(Iotlb()))
def test_bad_numbers_are_refused(name):
    iotlb = Iotlb()
    iotlb.set_mapping(0, 0x1000, 0x100, RW)
    before = list(iotlb), iotlb.stats()
    call = calls(iotlb)[name]
    for bad in [*NO_INT, *NO_U64, 2**64]:
        with pytest.raises((TypeError, ValueError)) as caught:
            call(bad)
        assert not isinstance(caught.value, OverflowError)
        if any(bad is one for one in NO_INT):
            assert isinstance(caught.value, TypeError), (bad, caught.value)
    assert (list(iotlb), iotlb.stats()) == before
    assert len(iotlb.leases) == 0
    iotlb.check()


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


def test_memory_behind_an_iommu_checks_like_any_memory():
    class Tables(Iommu):
        iotlb = Iotlb()

    iotlb = Tables.iotlb
    iotlb.set_mapping(0, 0, 0x1000, RW)
    from guestio import GuestRegionCollection

    memory = IommuMemory(GuestRegionCollection.from_ranges([(0, 0x1000)]), Tables())
    for bad in [*NO_INT, *NO_U64, 2**64]:
        for call in (
            lambda n=bad: memory.read(n, 1),
            lambda n=bad: memory.write(n, b"x"),
            lambda n=bad: memory.load(n, 4),
            lambda n=bad: list(memory.slices(n, 1)),
            lambda n=bad: memory.check_range(n, 1),
            lambda n=bad: memory.iommu.translate(n, 1, R),
        ):
            with pytest.raises((TypeError, ValueError)):
                call()
    assert not memory.check_range(0, 2**64)
    assert memory.read(0, 0x1000) == bytes(0x1000)
    with pytest.raises(IotlbFails):
        iotlb.lookup(0x1000, 1, R)
