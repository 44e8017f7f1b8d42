"""What DMA targets are told, in which order, and what becomes of calls that fail."""

import errno
import mmap

import pytest

from guestio import Backing, GuestioError, InvalidAddressError, MmapRegion
from guestio.dma import DmaError, DmaMapRequest, MappingType, RegionManager
from guestio.testing.host_iommu import SimulatedHostIommu
from guestio.testing.targets import DmaEvent, FailAfter, RecordingTarget, ReplacingTarget
from tests.kit.dma import PAGE, holds, mapped, region_at, unmapped

RAM, DEVICE = MappingType.RAM, MappingType.DEVICE
TOP = 1 << 64


@pytest.fixture
def ram(manager: RegionManager, backing: Backing):
    """A mapped region of three pages with a mapping each."""
    with region_at(manager, 0, 0x10000, kind=RAM) as region:
        for offset in (0, PAGE, 2 * PAGE):
            region.add_mapping(offset, PAGE, backing, offset)
        region.map()
        yield region


THREE = [(0, PAGE), (PAGE, 2 * PAGE), (2 * PAGE, 3 * PAGE)]


def test_the_order_of_replay_updates_and_unmaps(manager, ram, backing):
    target = RecordingTarget()
    handle = manager.add_target(target)
    ram.add_mapping(3 * PAGE, PAGE, backing)
    ram.remove_mappings(PAGE, PAGE)
    ram.unmap()
    ram.map()
    handle.close()
    kept = [(0, PAGE), (2 * PAGE, 3 * PAGE), (3 * PAGE, 4 * PAGE)]
    assert target.events == [
        *mapped(*THREE, (3 * PAGE, 4 * PAGE)),
        *unmapped((PAGE, 2 * PAGE)),
        *unmapped(*kept),
        *mapped(*kept),
        *unmapped(*kept),
    ]


@pytest.mark.parametrize("interface", ["type1", "iommufd"])
def test_a_missing_host_address_is_refused(interface):
    target = SimulatedHostIommu(interface)
    with pytest.raises(DmaError, match="host address"):
        target.map_dma(DmaMapRequest(0, PAGE, host_address=None, kind=RAM))
    assert target.mappings() == []


@pytest.mark.parametrize(
    ("start", "size"),
    [(TOP - PAGE, 2 * PAGE), (TOP, PAGE), (-PAGE, PAGE), (0, -PAGE), (0, TOP + PAGE), (0, 0)],
)
def test_ranges_that_wrap_are_refused(manager, backing, start, size):
    ram = manager.new_region("ram", 0, 0x10000)
    for call in (
        lambda: manager.new_region("r", start, size),
        lambda: ram.add_mapping(start, size, backing),
        lambda: ram.remove_mappings(start, size),
    ):
        with pytest.raises(ValueError, match=r"2\*\*64|size"):
            call()
    assert ram.mappings == ()
    assert manager.regions == (ram,)


@pytest.mark.parametrize(
    ("offset", "size", "skip"),
    [
        (0xF000, 2 * PAGE, 0),
        (PAGE, 0x10000, 0),
        (0x10000, PAGE, 0),
        (0, 2 * PAGE, 0x3F000),
        (0, PAGE, 0x40000),
        (0, PAGE, TOP - PAGE),
        (0, PAGE, TOP),
        (0, PAGE, -PAGE),
    ],
)
def test_mappings_beyond_region_or_memory_are_refused(manager, backing, offset, size, skip):
    target = RecordingTarget()
    ram = manager.new_region("ram", 0, 0x10000)
    ram.map()
    with manager.add_target(target), pytest.raises(ValueError):
        ram.add_mapping(offset, size, backing, skip)
    assert ram.mappings == ()
    assert target.events == []


@pytest.mark.parametrize("start", [TOP - PAGE, TOP, -PAGE, 1])
def test_a_region_cannot_be_moved_out_of_the_address_space(manager, ram, start):
    with pytest.raises(ValueError):
        ram.move(start)
    assert ram.start == 0


def test_the_last_page_of_the_address_space_is_usable(manager, backing):
    target = RecordingTarget()
    with manager.add_target(target):
        top = manager.new_region("top", TOP - PAGE, PAGE)
        top.add_mapping(0, PAGE, backing)
        top.map()
        assert target.events == mapped((TOP - PAGE, TOP))
        assert target.held[TOP - PAGE].end == TOP
        with pytest.raises(InvalidAddressError):
            manager.new_region("beyond", TOP - PAGE, 2 * PAGE)
        top.close()
    assert target.held == {}


@pytest.mark.parametrize("n", range(4))
def test_adding_a_target_is_all_or_nothing(manager, ram, backing, n):
    target = FailAfter(n)
    if n == 3:
        manager.add_target(target).close()
    else:
        with pytest.raises(DmaError) as caught:
            manager.add_target(target)
        assert (caught.value.start, caught.value.size) == (n * PAGE, PAGE)
    assert target.events == mapped(*THREE[:n]) + unmapped(
        *(THREE[:n] if n == 3 else THREE[n - 1 :: -1] if n else [])
    )
    assert target.held == {}
    assert manager.targets == ()


def test_a_replay_that_cannot_be_undone_keeps_the_memory(manager, ram, backing):
    target = FailAfter(1, calls=("map", "unmap"), times=3)
    with pytest.raises(DmaError) as caught:
        manager.add_target(target)
    assert any("undoing" in note for note in caught.value.__notes__)
    (handle,) = manager.targets
    assert handle.broken
    with pytest.raises(DmaError):
        ram.close()
    assert ram.closed
    with pytest.raises(BufferError):
        backing.close()
    handle.close()
    backing.close()
    assert target.held == {}


def test_unmaps_are_per_mapping(manager, ram):
    target = RecordingTarget()
    with manager.add_target(target):
        target.events.clear()
        ram.unmap()
        assert target.events == unmapped(*THREE)


def test_page_sizes_that_are_refused():
    assert RegionManager()._page_size == mmap.PAGESIZE > 0
    for bad in (0, -1, 3000, True, 4096.0):
        with pytest.raises((TypeError, ValueError)):
            RegionManager(page_size=bad)


def test_every_target_is_told_each_range_once(manager, ram, backing):
    """Replay in order, add and remove, disable, deregister: each call exactly once."""
    first, second = RecordingTarget(), RecordingTarget()
    one = manager.add_target(first)
    two = manager.add_target(second)
    ram.remove_mappings(0, 2 * PAGE)
    one.close()
    ram.add_mapping(0, PAGE, backing)
    two.close()
    assert first.events == [*mapped(*THREE), *unmapped(*THREE[:2]), *unmapped(THREE[2])]
    assert second.events == [
        *mapped(*THREE),
        *unmapped(*THREE[:2]),
        *mapped(THREE[0]),
        *unmapped(THREE[2], THREE[0]),
    ]


@pytest.mark.parametrize("n", range(3))
def test_a_failed_map_restores_the_regions_below(manager, ram, backing, n):
    target = FailAfter(3 + n, times=1)
    with manager.add_target(target), region_at(manager, 0, 0x10000, 1, RAM) as rom:
        for offset in (0, PAGE, 2 * PAGE):
            rom.add_mapping(offset, PAGE, backing, 0x8000 + offset)
        before = holds(target)
        with pytest.raises(DmaError):
            rom.map()
        assert ram.active
        assert not rom.active
        assert not rom.mapped
        assert holds(target) == before == set(manager.mappings())
        rom.map()
        assert rom.active
        assert not ram.active
        assert holds(target) == set(manager.mappings()) != before


def test_a_failed_unmap_quarantines_the_memory(manager, ram, backing):
    bad, good = FailAfter(1, calls=("unmap",), times=1), RecordingTarget()
    handle = manager.add_target(bad)
    with manager.add_target(good):
        with pytest.raises(DmaError) as caught:
            ram.unmap()
        assert (caught.value.operation, caught.value.start) == ("unmap", PAGE)
        assert not ram.active
        assert good.held == {}
        assert list(bad.held) == [PAGE]
        assert str(handle.broken) == str(caught.value)
        (stuck,) = handle.stats().quarantined
        assert stuck.start == PAGE
        assert handle.diff().stale == (stuck,)
        # It gets nothing new while what it holds is in doubt.
        ram.map()
        assert list(bad.held) == [PAGE]
        assert len(handle.diff().missing) == 2
        bad.failures = 0
        with pytest.raises(DmaError):
            ram.close()
        assert ram.closed
        with pytest.raises(BufferError):
            backing.close()
        assert not handle.retry()
        assert not handle.broken
        assert bad.held == {}
    backing.close()
    handle.close()


def test_a_permission_change_has_no_window_if_the_target_can_replace(manager, ram):
    able, unable = ReplacingTarget(), RecordingTarget()
    with manager.add_target(able), manager.add_target(unable):
        able.events.clear()
        unable.events.clear()
        ram.map(writable=False)
        assert able.events == [DmaEvent("replace", start, PAGE) for start in (0, PAGE, 2 * PAGE)]
        # Mapping by mapping, so that only one is out of reach at a time.
        assert unable.events == [
            event for place in THREE for event in (*unmapped(place), *mapped(place))
        ]
        assert not any(r.writable for r in (*able.held.values(), *unable.held.values()))


def test_an_overlay_replaces_what_is_below(manager, ram, backing):
    target = ReplacingTarget()
    with manager.add_target(target), region_at(manager, 0, 0x10000, 1, RAM) as rom:
        rom.add_mapping(PAGE, PAGE, backing, 0x8000, writable=False)
        target.events.clear()
        rom.map()
        assert target.events == [
            *unmapped(THREE[0], THREE[2]),
            DmaEvent("replace", PAGE, PAGE),
        ]
        rom.unmap()
        assert holds(target) == set(manager.mappings())
        assert len(target.held) == 3


def test_private_memory_may_be_disabled_and_keeps_its_contents(manager, private):
    with region_at(manager, 0, 0x10000, kind=RAM) as region:
        region.add_mapping(0, PAGE, private)
        region.map()
        page = MmapRegion(0, private).slice(0, PAGE)
        page.write(0, b"still here")
        region.map(writable=False)
        region.unmap()
        region.map()
        assert page.read(0, 10) == b"still here"
        del page


def test_only_what_a_target_holds_is_unmapped(manager, backing):
    choosy, other = FailAfter(1, times=1), RecordingTarget()
    with region_at(manager, 0, 0x10000, kind=DEVICE) as bar:
        for offset in (0, PAGE, 2 * PAGE):
            bar.add_mapping(offset, PAGE, backing, offset)
        with manager.add_target(choosy) as handle, manager.add_target(other):
            bar.map()
            assert choosy.events == mapped(THREE[0], THREE[2])
            (failed,) = handle.stats().failed
            assert failed.request.start == PAGE
            assert isinstance(failed.error, DmaError)
            assert failed.error.errno == errno.ENOMEM
            assert [r.start for r in handle.diff().missing] == [PAGE]
            assert not handle.broken
            choosy.events.clear()
            bar.unmap()
            assert choosy.events == unmapped(THREE[0], THREE[2])
            assert handle.stats().failed == ()
            assert other.held == {}


def test_a_device_mapping_that_failed_can_be_retried(manager, backing):
    target = FailAfter(0, times=2)
    with region_at(manager, 0, 0x10000, kind=DEVICE) as bar, manager.add_target(target) as handle:
        bar.map()
        bar.add_mapping(0, PAGE, backing)
        assert handle.diff()
        assert [r.start for r in handle.retry().missing] == [0]
        assert len(handle.stats().failed) == 1
        assert not handle.retry()
        assert handle.stats().failed == ()
        assert target.events == mapped((0, PAGE))


def test_every_error_is_one_of_ours(manager, ram, backing):
    """A target may raise anything; it reaches the caller as a DmaError that names the range."""
    target = FailAfter(0, error=lambda *_: OSError(errno.EFAULT, "Bad address"))
    with pytest.raises(GuestioError, match=r"0x0\+0x1000.*Bad address.*EFAULT") as caught:
        manager.add_target(target)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_rom_shadows_a_part_of_ram_that_is_a_region_of_its_own(manager, backing):
    """As docs/dma.md says: a part of one region of RAM cannot be covered, a whole one can."""
    target = RecordingTarget()
    manager.add_target(target)
    below, middle, above = (
        manager.new_region(name, start, PAGE)
        for name, start in (("below", 0), ("middle", PAGE), ("above", 2 * PAGE))
    )
    for part in (below, middle, above):
        part.add_mapping(0, PAGE, backing, part.start)
        part.map()
    rom = manager.new_region("rom", PAGE, PAGE, priority=1)
    rom.add_mapping(0, PAGE, backing, 0x8000, writable=False)
    target.events.clear()
    rom.map()
    assert [r.active for r in (below, middle, above, rom)] == [True, False, True, True]
    assert target.held[PAGE].file_offset == 0x8000
    assert not target.held[PAGE].writable
    rom.unmap()
    assert target.held[PAGE].file_offset == PAGE
    assert {event.start for event in target.events} == {PAGE}, "the RAM around was touched"
