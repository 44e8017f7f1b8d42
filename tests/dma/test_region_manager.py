"""A region manager and its targets: what each call tells them, and what a failure leaves.

Where OpenVMM unmaps a whole region at once, each mapping is unmapped here. OpenVMM lets a replay
that fails half-way leave its mappings behind, and remembers the parameters of a failed enable;
neither happens here.
"""

import pytest

from guestio import Backing, MemoryRegionOverlapError
from guestio.dma import DmaError, MappingType, Region, RegionManager
from guestio.testing.targets import FailAfter, RecordingTarget
from tests.kit.dma import PAGE, holds, mapped, region_at, unmapped

FOUR = 0x4000
REPLAYED = [(0, 0x4000), (0x8000, 0xC000)]


@pytest.fixture
def two_maps(manager: RegionManager, backing: Backing):
    """A region 0..0x10000 with maps 0..0x4000 and 0x8000..0xC000, mapped; RAM."""
    with region_at(manager, 0, 0x10000, kind=MappingType.RAM) as region:
        region.add_mapping(0, FOUR, backing)
        region.add_mapping(0x8000, FOUR, backing, FOUR)
        region.map()
        yield region


def test_overlapping_regions_are_refused(manager: RegionManager):
    high = region_at(manager, 0x1000, 0x3000, 1)
    with pytest.raises(MemoryRegionOverlapError):
        region_at(manager, 0x2000, 0x4000, 0)
    low = region_at(manager, 0x1000, 0x3000, 0)
    high.close()
    for end in (0x4000, 0x3000):
        with pytest.raises(MemoryRegionOverlapError):
            region_at(manager, 0x2000, end, 1)
    around = region_at(manager, 0, 0x10000, 1)
    low.close()
    with pytest.raises(MemoryRegionOverlapError):
        region_at(manager, 0, 0x20000, 0)
    inside = region_at(manager, 0x1000, 0x8000, 0)
    assert manager.regions == (around, inside)


@pytest.mark.parametrize(
    ("start", "end", "fits"),
    [(0x1000, 0x3000, True), (0x1000, 0x2000, False), (0, 0x3000, False), (0x3000, 0x4000, True)],
)
def test_overlaps_of_equal_priority_must_be_identical(manager, start, end, fits):
    region_at(manager, 0x1000, 0x3000, 7)
    if fits:
        region_at(manager, start, end, 7)
    else:
        with pytest.raises(MemoryRegionOverlapError, match="priority 7"):
            region_at(manager, start, end, 7)


def test_a_new_target_is_told_of_all_mappings(manager: RegionManager, two_maps: Region):
    target = RecordingTarget()
    with manager.add_target(target):
        assert target.events == mapped(*REPLAYED)


def test_targets_follow_while_a_region_is_mapped(manager: RegionManager, backing: Backing):
    target = RecordingTarget()
    with region_at(manager, 0, 0x10000) as region, manager.add_target(target):
        region.map()
        region.add_mapping(0, FOUR, backing)
        assert target.events == mapped((0, FOUR))
        assert region.remove_mappings(0, FOUR) == 1
        assert target.events == mapped((0, FOUR)) + unmapped((0, FOUR))


def test_private_memory_is_mapped_by_its_host_address(manager: RegionManager, private: Backing):
    target = RecordingTarget()
    with region_at(manager, 0, 0x10000) as region:
        region.map()
        region.add_mapping(0, FOUR, private)
        with manager.add_target(target):
            region.add_mapping(0x8000, FOUR, private, FOUR)
            assert target.events == mapped(*REPLAYED)
            assert [(r.fd, r.file_offset) for r in target.held.values()] == [(None, 0)] * 2
            assert target.held[0x8000].host_address == private.host_address + FOUR


def test_a_target_that_needs_files_refuses_private_memory(manager: RegionManager, private: Backing):
    target = RecordingTarget()
    # Even of a region that is not mapped: it could be at any time.
    with region_at(manager, 0, 0x10000) as region:
        region.add_mapping(0, FOUR, private)
        with pytest.raises(DmaError, match="has no file"):
            manager.add_target(target, needs_fd=True)
    assert target.events == []
    assert manager.targets == ()


def test_private_memory_is_refused_while_a_target_needs_files(
    manager: RegionManager, private: Backing, backing: Backing
):
    target = RecordingTarget()
    with region_at(manager, 0, 0x10000) as region:
        region.map()
        region.add_mapping(0, FOUR, backing)
        with manager.add_target(target, needs_fd=True):
            region.add_mapping(FOUR, FOUR, backing, FOUR)
            assert target.held[FOUR].file_offset == FOUR
            with pytest.raises(DmaError, match="has no file"):
                region.add_mapping(0x8000, FOUR, private)
            assert target.events == mapped((0, FOUR), (FOUR, 2 * FOUR))
        region.add_mapping(0x8000, FOUR, private)


def test_unmapping_a_region_unmaps_all_its_mappings(manager: RegionManager, two_maps: Region):
    target = RecordingTarget()
    with manager.add_target(target):
        target.events.clear()
        two_maps.unmap()
        assert target.events == unmapped(*REPLAYED)
        assert not two_maps.active
        assert len(two_maps.mappings) == 2


def test_closing_a_target_unmaps_everything(manager: RegionManager, two_maps: Region):
    target = RecordingTarget()
    handle = manager.add_target(target)
    target.events.clear()
    handle.close()
    assert target.events == unmapped(*REPLAYED)
    assert manager.targets == ()


def test_a_region_that_is_not_mapped_reaches_no_target(manager: RegionManager, backing: Backing):
    target = RecordingTarget()
    with region_at(manager, 0, 0x10000) as region:
        region.add_mapping(0, FOUR, backing)
        with manager.add_target(target):
            region.add_mapping(FOUR, FOUR, backing, FOUR)
            assert target.events == []


def test_a_mapping_that_fails_is_not_kept(manager: RegionManager, backing: Backing):
    with region_at(manager, 0, 0x10000, kind=MappingType.RAM) as region:
        region.map()
        with manager.add_target(FailAfter(0)), pytest.raises(DmaError, match="0x4000"):
            region.add_mapping(FOUR, FOUR, backing)
        assert region.mappings == ()
    backing.close()  # no mapping holds it


def test_a_failed_map_is_undone_at_other_targets(manager: RegionManager, backing: Backing):
    good, bad = RecordingTarget(), FailAfter(0)
    with region_at(manager, 0, 0x10000, kind=MappingType.RAM) as region:
        region.add_mapping(0, FOUR, backing)
        with manager.add_target(good), manager.add_target(bad):
            with pytest.raises(DmaError):
                region.map()
            assert good.events == mapped((0, FOUR)) + unmapped((0, FOUR))
            assert bad.events == []


def test_a_failed_map_is_undone_in_reverse_order(manager: RegionManager, backing: Backing):
    target = FailAfter(2)
    with region_at(manager, 0, 0x18000, kind=MappingType.RAM) as region:
        for offset in (0, 0x4000, 0x8000):
            region.add_mapping(offset, FOUR, backing, offset)
        with manager.add_target(target):
            with pytest.raises(DmaError):
                region.map()
            assert not region.active
            assert not region.mapped
            one, two = (0, 0x4000), (0x4000, 0x8000)
            assert target.events == mapped(one, two) + unmapped(two, one)


def test_a_target_whose_replay_fails_is_not_added(manager: RegionManager, two_maps: Region):
    target = FailAfter(1)
    with pytest.raises(DmaError):
        manager.add_target(target)
    assert target.events == mapped((0, FOUR)) + unmapped((0, FOUR))
    assert manager.targets == ()


def test_a_failed_map_does_not_change_writability(manager: RegionManager, backing: Backing):
    target = FailAfter(0, times=1)
    with region_at(manager, 0, 0x10000, kind=MappingType.RAM) as region:
        region.add_mapping(0, FOUR, backing)
        with manager.add_target(target):
            with pytest.raises(DmaError):
                region.map(writable=False)
            assert region.writable
            region.map(writable=False)
            assert target.events == mapped((0, FOUR))
            assert not target.held[0].writable


def test_a_mapping_that_fails_at_the_second_target_is_undone_at_the_first(
    manager: RegionManager, backing: Backing
):
    first, second = RecordingTarget(), FailAfter(0)
    with region_at(manager, 0, 0x10000, kind=MappingType.RAM) as region:
        region.map()
        with manager.add_target(first), manager.add_target(second):
            with pytest.raises(DmaError):
                region.add_mapping(0, PAGE, backing)
            assert first.events == mapped((0, PAGE)) + unmapped((0, PAGE))
            assert region.mappings == ()


def test_a_failed_replay_does_not_affect_the_next_target(manager: RegionManager, two_maps: Region):
    with pytest.raises(DmaError):
        manager.add_target(FailAfter(1))
    target = RecordingTarget()
    with manager.add_target(target):
        assert target.events == mapped(*REPLAYED)


def test_removing_mappings_reaches_every_target(manager: RegionManager, two_maps: Region):
    first, second = RecordingTarget(), RecordingTarget()
    with manager.add_target(first), manager.add_target(second):
        two_maps.remove_mappings(0, 0x8000)
        assert holds(first) == holds(second) == set(manager.mappings())
        assert first.events[-1:] == second.events[-1:] == unmapped((0, FOUR))


@pytest.mark.parametrize("gap", [0, 2 * PAGE])
def test_several_backings_side_by_side(manager: RegionManager, gap: int):
    target = RecordingTarget()
    with (
        Backing.memfd(2 * PAGE) as one,
        Backing.memfd(2 * PAGE) as two,
        region_at(manager, 0, 0x10000, kind=MappingType.RAM) as ram,
        manager.add_target(target),
    ):
        ram.map()
        ram.add_mapping(0, 2 * PAGE, one)
        ram.add_mapping(2 * PAGE + gap, 2 * PAGE, two)
        # Neighbors stay two mappings: each can be removed without touching the other.
        assert target.events == mapped((0, 2 * PAGE), (2 * PAGE + gap, 4 * PAGE + gap))
        ram.remove_mappings(0, 2 * PAGE)
        assert [r.host_address for r in target.held.values()] == [two.host_address]
