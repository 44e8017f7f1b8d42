"""Maps of so many entries that their tree has three levels and more, emptied from every side.

A tree goes wrong where a node empties, joins its neighbor or takes over its bounds. Those are rare
in a map of a few hundred entries; the process dies of them in a map of a few thousand.
"""

import numpy as np
import pytest

from guestio import Iotlb, IotlbFails, Permissions
from guestio.iommu import AddMapResult, BasicMemoryMapper, MappingInfo
from guestio.virtio.iommu import VirtioIommu
from tests.kit.iommu_driver import OK, attach, map_, send, send_all, unmap

PAGE = 4096
PAGES = 5000
R, RW = Permissions.READ, Permissions.READ_WRITE


def filled(order=range(PAGES)):
    """A map in which every other page is mapped, so that nothing merges."""
    iotlb = Iotlb()
    for page in order:
        iotlb.set_mapping(page * 2 * PAGE, page * PAGE, PAGE, RW)
    iotlb._map.check()
    assert len(iotlb) == len(order)
    return iotlb


ORDERS = {
    "ascending": range(PAGES),
    "descending": range(PAGES - 1, -1, -1),
    "random": np.random.default_rng(3).permutation(PAGES).tolist(),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_one_invalidation_empties_a_large_map(order):
    iotlb = filled(order)
    iotlb.invalidate_mapping(0, PAGES * 2 * PAGE)
    iotlb._map.check()
    assert len(iotlb) == 0


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_what_is_below_can_be_looked_at_and_mapped_after_the_lowest_are_gone(order):
    iotlb = filled(order)
    for page in range(PAGES - 10):
        iotlb.invalidate_mapping(page * 2 * PAGE, PAGE)
        if page % 97 == 0:
            iotlb._map.check()
            for lower in range(0, page, 61):
                with pytest.raises(IotlbFails):
                    iotlb.lookup(lower * 2 * PAGE, 1, R)
            assert iotlb.lookup((page + 1) * 2 * PAGE, 1, R) == [((page + 1) * PAGE, 1)]
    for lower in range(0, PAGES - 10, 7):
        iotlb.set_mapping(lower * 2 * PAGE, 1 << 40, PAGE, RW)
        assert iotlb.lookup(lower * 2 * PAGE, 1, R) == [(1 << 40, 1)]
    iotlb._map.check()


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_one_mapping_replaces_many(order):
    iotlb = filled(order)
    iotlb.set_mapping(0, 0, (PAGES - 3) * 2 * PAGE, RW)
    iotlb._map.check()
    assert len(iotlb) == 4
    assert iotlb.lookup(0, (PAGES - 3) * 2 * PAGE, RW) == [(0, (PAGES - 3) * 2 * PAGE)]


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_batches_of_lookups_after_the_lowest_are_gone(order):
    iotlb = filled(order)
    starts = np.arange(PAGES, dtype=np.uint64) * np.uint64(2 * PAGE)
    for left in (4000, 2500, 900, 64, 3):
        iotlb.invalidate_mapping(0, (PAGES - left) * 2 * PAGE)
        iotlb._map.check()
        targets, status = iotlb.lookup_many(starts, 1, R)
        assert status.tolist() == [1] * (PAGES - left) + [0] * left
        assert targets[PAGES - left :].tolist() == [
            page * PAGE for page in range(PAGES - left, PAGES)
        ]


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_a_memory_mapper_that_is_emptied_from_below(order):
    mapper = BasicMemoryMapper()
    for page in order:
        added = mapper.add_map(MappingInfo(page * 2 * PAGE, page * PAGE, PAGE, RW))
        assert added is AddMapResult.OK
    for page in range(PAGES - 10):
        mapper.remove_map(page * 2 * PAGE, PAGE)
        if page % 89 == 0:
            added = mapper.add_map(MappingInfo(page // 2 * 2 * PAGE, 0, PAGE, RW))
            assert added is AddMapResult.OK
            mapper.remove_map(page // 2 * 2 * PAGE, PAGE)
    mapper.remove_map(0, PAGES * 2 * PAGE)
    assert mapper.add_map(MappingInfo(0, 0, PAGES * 2 * PAGE, RW)) is AddMapResult.OK


def test_a_guest_that_maps_a_lot_and_unmaps_it_at_once():
    iommu = VirtioIommu(endpoints=[8])
    send_all(iommu, attach(8, 1))
    for page in range(PAGES):
        start = page * 2 * PAGE
        assert send(iommu, map_(1, start, start + PAGE - 1, page * PAGE)) is OK
    assert send(iommu, unmap(1, 0, PAGES * 2 * PAGE - 1)) is OK
    assert send(iommu, map_(1, 0, PAGES * 2 * PAGE - 1, 0)) is OK
    assert send(iommu, unmap(1, 0, 2**64 - 1)) is OK
