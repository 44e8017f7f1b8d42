"""What an IOTLB lets its users do, and that no public name leads around it.

A translation that is taken away without a wait for its users breaks L1.
"""

from __future__ import annotations

import inspect

import pytest

from guestio import GuestRegionCollection, Iommu, IommuMemory, Iotlb, Permissions
from guestio._core.iommu.address_space import AddressSpace
from guestio._core.iommu.intervals import IntervalMap
from guestio.virtio import EntropyDevice, SplitRing
from guestio.virtio.iommu import VirtioIommu
from guestio.virtio.layout import RingLayout
from guestio.virtio.local import LocalTransport
from tests.kit.iommu_driver import PAGE, attach, map_, send_all

R, RW = Permissions.READ, Permissions.READ_WRITE
COUNTERS = {"capacity", "hits", "misses", "access_fails", "evictions", "invalidations"}
METHODS = {
    *("set_mapping", "invalidate_mapping", "invalidate_all", "lookup", "lookup_many", "guard"),
    *("drain", "check_drain", "pin", "unpin", "stats", "explain"),
}


def public(owner: object) -> set[str]:
    return {name for name in dir(owner) if not name.startswith("_")}


def test_an_iotlb_has_only_what_is_documented() -> None:
    assert not isinstance(Iotlb(), IntervalMap)
    assert public(Iotlb()) == COUNTERS | METHODS
    for name in METHODS:
        assert inspect.getdoc(getattr(Iotlb, name))
        assert inspect.signature(getattr(Iotlb, name)) is not None


def test_an_address_in_an_iotlb() -> None:
    iotlb = Iotlb(4)
    assert 0 not in iotlb
    iotlb.set_mapping(PAGE, 0, PAGE, Permissions.NONE)
    iotlb.set_mapping(2**64 - PAGE, 0, PAGE, R)
    inside = PAGE, 2 * PAGE - 1, 2**64 - PAGE, 2**64 - 1
    outside = 0, PAGE - 1, 2 * PAGE, 2**64 - PAGE - 1
    assert all(at in iotlb for at in inside)
    assert not any(at in iotlb for at in outside)
    assert iotlb.stats()[2:] == (0, 0, 0, 0, 0)
    for wrong in (-1, 2**64):
        with pytest.raises(ValueError, match="addr"):
            wrong in iotlb  # noqa: B015 - the test for it is what is tested
    with pytest.raises(TypeError):
        "x" in iotlb  # type: ignore[operator]  # noqa: B015 - see above


def test_a_face_of_a_map_shows_it_and_counts_with_it() -> None:
    """As that of a transport in the same process, whose rings have the map already."""
    first = Iotlb()
    second = Iotlb._of(first._map)
    first.set_mapping(PAGE, 0, PAGE, RW)
    assert list(second) == list(first)
    with second.guard(PAGE, 1, R), pytest.raises(RuntimeError, match="itself"):
        first.invalidate_all()
    assert first.stats() == second.stats()
    with pytest.raises(TypeError):
        Iotlb._of(None)  # type: ignore[arg-type]


class Tables(Iommu):
    """An IOMMU of a user's own."""

    def __init__(self) -> None:
        self._iotlb = Iotlb()

    @property
    def iotlb(self) -> Iotlb:
        return self._iotlb


def reached(root: object) -> dict[int, object]:
    """All objects of guestio that public attributes lead to, by id; no method is called."""
    found: dict[int, object] = {}
    waiting = [root]
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, dict):
            waiting += [*thing.keys(), *thing.values()]
        elif isinstance(thing, (list, tuple, set)):
            waiting += thing
        if id(thing) in found or not type(thing).__module__.startswith(("guestio", __name__)):
            continue
        found[id(thing)] = thing
        for name in public(thing):
            value = getattr(thing, name, None)
            if not callable(value) or type(value).__module__.startswith("guestio"):
                waiting.append(value)
    return found


def check_no_way_around(root: object, used: Iotlb, ways: int) -> None:
    """While this thread uses a translation, no IOTLB within reach takes it away."""
    things = list(reached(root).values())
    assert not [thing for thing in things if isinstance(thing, IntervalMap)]
    iotlbs = [thing for thing in things if isinstance(thing, Iotlb)]
    assert len(iotlbs) == ways
    before = list(used)
    assert before
    with used.guard(PAGE, 1, R):
        for iotlb in iotlbs:
            for change in (
                iotlb.invalidate_all,
                lambda iotlb=iotlb: iotlb.invalidate_mapping(0, 2**64),
                lambda iotlb=iotlb: iotlb.set_mapping(0, 7 * PAGE, 2**64, Permissions.NONE),
            ):
                with pytest.raises(RuntimeError):
                    change()
    assert list(used) == before


def test_no_public_name_of_memory_or_a_ring_leads_around_the_wait() -> None:
    tables = Tables()
    tables.iotlb.set_mapping(PAGE, 0, PAGE, RW)
    memory = IommuMemory(GuestRegionCollection.from_ranges([(0, 0x10000)]), tables)
    ring = SplitRing(memory._space, 4, 0, 0x100, 0x200)
    assert isinstance(ring.space, AddressSpace)
    check_no_way_around([memory, ring], tables.iotlb, 1)


def test_no_public_name_of_an_endpoint_or_its_device_leads_around_the_wait() -> None:
    iommu = VirtioIommu()
    for number in (8, 9):
        iommu.add_endpoint(number)
    send_all(iommu, attach(8, 1), attach(9, 1), map_(1, PAGE, 2 * PAGE - 1, 0))
    endpoint = iommu.endpoint(8)
    memory = endpoint.memory(GuestRegionCollection.from_ranges([(0, 0x10000)]))
    device = EntropyDevice()
    layout = RingLayout.contiguous(PAGE, 4)
    transport = LocalTransport(device, memory, {0: layout}, lambda _: None)
    try:
        # Those of both endpoints, and the one of the device's translator.
        check_no_way_around([iommu, endpoint, memory, transport], endpoint.iotlb, 3)
    finally:
        transport.close()
        device.close()
