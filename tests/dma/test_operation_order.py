"""Which steps an operation takes, in which order, and what it leaves alone."""

import pytest

from guestio import Backing
from guestio.dma import DmaError, MappingType, RegionManager
from guestio.testing.targets import DmaEvent, FailAfter, RecordingTarget, ReplacingTarget
from tests.kit.dma import PAGE, holds, mapped, unmapped

RAM, DEVICE = MappingType.RAM, MappingType.DEVICE


@pytest.fixture
def target(manager: RegionManager) -> RecordingTarget:
    made = RecordingTarget()
    manager.add_target(made)
    return made


def test_a_moved_region_is_mapped_there_before_it_is_unmapped_here(manager, backing, target):
    bar = manager.new_region("bar", 0x100000, 4 * PAGE)
    bar.add_mapping(0, 2 * PAGE, backing)
    bar.add_mapping(3 * PAGE, PAGE, backing)
    bar.map()
    target.events.clear()
    bar.move(0x200000)
    assert target.events == [
        *mapped((0x200000, 0x202000), (0x203000, 0x204000)),
        *unmapped((0x100000, 0x102000), (0x103000, 0x104000)),
    ]


def test_where_a_moved_region_meets_itself_the_old_place_goes_first(manager, backing, target):
    bar = manager.new_region("bar", 0x100000, 16 * PAGE)
    bar.add_mapping(0, 2 * PAGE, backing)
    bar.add_mapping(8 * PAGE, PAGE, backing)
    bar.map()
    target.events.clear()
    bar.move(0x101000)
    assert target.events == [
        *unmapped((0x100000, 0x102000)),
        *mapped((0x101000, 0x103000), (0x109000, 0x10A000)),
        *unmapped((0x108000, 0x109000)),
    ]


def test_a_range_that_changes_hands_is_exchanged(manager, backing):
    """The third page moves onto the place of the fourth: same range, other memory."""
    target = ReplacingTarget()
    manager.add_target(target)
    bar = manager.new_region("bar", 0, 16 * PAGE)
    bar.add_mapping(2 * PAGE, PAGE, backing, 2 * PAGE)
    bar.add_mapping(3 * PAGE, PAGE, backing, 3 * PAGE)
    bar.map()
    target.events.clear()
    bar.move(PAGE)
    assert target.events == [
        DmaEvent("replace", 3 * PAGE, PAGE),
        *mapped((4 * PAGE, 5 * PAGE)),
        *unmapped((2 * PAGE, 3 * PAGE)),
    ]
    assert holds(target) == set(manager.mappings())


def test_what_a_permission_does_not_change_is_left_alone(manager, backing, target):
    ram = manager.new_region("ram", 0, 16 * PAGE)
    ram.add_mapping(0, PAGE, backing, writable=False)
    ram.add_mapping(PAGE, PAGE, backing)
    ram.map()
    target.events.clear()
    ram.map(writable=False)
    assert target.events == [*unmapped((PAGE, 2 * PAGE)), *mapped((PAGE, 2 * PAGE))]


def test_what_covers_with_the_same_memory_is_left_alone(manager, backing, target):
    ram = manager.new_region("ram", 0, 4 * PAGE, 0)
    alias = manager.new_region("alias", 0, 4 * PAGE, 1)
    for region in (ram, alias):
        region.add_mapping(0, PAGE, backing)
    alias.add_mapping(PAGE, PAGE, backing)
    ram.map()
    target.events.clear()
    alias.map()
    assert target.events == mapped((PAGE, 2 * PAGE))


def test_what_is_covered_gets_no_mappings(manager, backing, target):
    ram = manager.new_region("ram", 0, 4 * PAGE, 0)
    cover = manager.new_region("cover", 0, 4 * PAGE, 1)
    cover.map()
    ram.map()
    ram.add_mapping(0, PAGE, backing)
    assert ram.mapped
    assert not ram.active
    assert target.events == []
    cover.unmap()
    assert target.events == mapped((0, PAGE))
    cover.map()
    ram.remove_mappings(0, PAGE)
    assert target.events == mapped((0, PAGE)) + unmapped((0, PAGE))


def test_a_cover_that_moves_away_uncovers(manager, backing, target):
    ram = manager.new_region("ram", 0, 4 * PAGE, 0)
    ram.add_mapping(0, PAGE, backing)
    cover = manager.new_region("cover", 0, 4 * PAGE, 1)
    cover.add_mapping(2 * PAGE, PAGE, backing)
    ram.map()
    cover.map()
    assert not ram.active
    cover.move(0x100000)
    assert ram.active
    assert cover.active
    assert holds(target) == set(manager.mappings())
    assert len(target.held) == 2
    cover.move(0)
    assert not ram.active
    assert holds(target) == set(manager.mappings())


def test_an_overlay_that_cannot_unmap_what_it_covers_is_undone(manager, backing, target):
    flaky = FailAfter(1, calls=("unmap",), times=1)
    handle = manager.add_target(flaky)
    ram = manager.new_region("ram", 0, 4 * PAGE, 0)
    rom = manager.new_region("rom", 0, 4 * PAGE, 1)
    for region, skip in ((ram, 0), (rom, 4 * PAGE)):
        for offset in (0, PAGE):
            region.add_mapping(offset, PAGE, backing, skip + offset)
    ram.map()
    before = manager.mappings()
    with pytest.raises(DmaError, match="unmap"):
        rom.map()
    assert ram.active
    assert not rom.mapped
    assert manager.mappings() == before
    assert holds(target) == holds(flaky) == set(before)
    assert handle.broken
    assert [request.start for request in handle.diff().stale] == [PAGE]
    assert not handle.retry()
    assert holds(flaky) == set(before)


@pytest.mark.parametrize("call", ["unmap", "remove"])
def test_an_undone_operation_remembers_what_had_failed_before(manager, backing, call):
    """A BAR that could not be mapped is still known as such after an operation was undone."""
    flaky = FailAfter(0, times=1)
    handle = manager.add_target(flaky)
    bar = manager.new_region("bar", 0, 4 * PAGE, 0, DEVICE)
    bar.add_mapping(0, PAGE, backing)
    bar.map()
    (failed,) = handle.stats().failed
    cover = manager.new_region("ram", 0, 4 * PAGE, 1, RAM)
    cover.add_mapping(PAGE, PAGE, backing)
    flaky.failures = 0
    with pytest.raises(DmaError):
        cover.map()
    assert handle.stats().failed == (failed,)
    assert not handle.retry()
    if call == "unmap":
        bar.unmap()
    else:
        bar.remove_mappings(0, PAGE)
    assert flaky.held == {}


def test_a_broken_target_gets_nothing_new_not_by_exchange_either(manager, backing):
    target = FailAfter(0, calls=("unmap",), times=1, replacing=True)
    handle = manager.add_target(target)
    ram = manager.new_region("ram", 0, 4 * PAGE)
    other = manager.new_region("other", 0x100000, 4 * PAGE)
    for region in (ram, other):
        region.add_mapping(0, PAGE, backing)
        region.map()
    with pytest.raises(DmaError):
        other.unmap()
    target.events.clear()
    ram.map(writable=False)
    assert target.events == unmapped((0, PAGE))
    assert not handle.retry()
    assert holds(target) == set(manager.mappings())


def test_a_retry_that_fails_leaves_the_target_as_it_was(manager, backing):
    target = FailAfter(0, calls=("unmap",), times=1)
    handle = manager.add_target(target)
    ram = manager.new_region("ram", 0, 4 * PAGE)
    ram.add_mapping(0, PAGE, backing)
    ram.map()
    with pytest.raises(DmaError):
        ram.unmap()
    for offset in (PAGE, 2 * PAGE, 3 * PAGE):
        ram.add_mapping(offset, PAGE, backing)
    ram.map()
    # The second of what is missing is refused: the first goes again.
    target._calls, target._times, target.failures, target.remaining = {"map"}, 1, 0, 1
    with pytest.raises(DmaError):
        handle.retry()
    assert handle.broken
    assert target.held == {}
    assert len(handle.diff().missing) == 4
    assert not handle.retry()
    assert holds(target) == set(manager.mappings())


def test_a_closed_target_knows_of_no_failures(manager, backing):
    handle = manager.add_target(FailAfter(0))
    bar = manager.new_region("bar", 0, 4 * PAGE, 0, DEVICE)
    bar.add_mapping(0, PAGE, backing)
    bar.map()
    assert len(handle.stats().failed) == 1
    handle.close()
    assert handle.stats().failed == ()


def test_errors_that_are_kept_keep_nothing_else(manager, backing):
    """What a target's failing call had in its hands is not held by the record of the failure."""
    held = Backing.memfd(PAGE)

    class Holding(RecordingTarget):
        def map_dma(self, request):
            view = memoryview(held._mapping)
            raise OSError(len(view), "with a view in hand")

    handle = manager.add_target(Holding())
    bar = manager.new_region("bar", 0, 4 * PAGE, 0, DEVICE)
    bar.add_mapping(0, PAGE, backing)
    bar.map()
    assert len(handle.stats().failed) == 1
    held.close()
