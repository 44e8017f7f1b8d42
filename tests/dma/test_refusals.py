"""Misuse: a clear exception each time, and nothing changed."""

import os

import numpy as np
import pytest

from guestio import Backing, BackingError, GuestioError, MemoryRegionOverlapError, RegionError
from guestio.dma import DmaError, DmaMapRequest, MappingType, RegionManager
from guestio.testing.targets import FailAfter, RecordingTarget
from tests.kit.dma import PAGE


@pytest.fixture
def target() -> RecordingTarget:
    return RecordingTarget()


@pytest.fixture
def ram(manager: RegionManager, backing: Backing, target: RecordingTarget):
    manager.add_target(target)
    region = manager.new_region("ram", 0x10000, 16 * PAGE)
    region.map()
    region.add_mapping(4 * PAGE, 4 * PAGE, backing)
    target.events.clear()
    return region


@pytest.mark.parametrize(
    ("offset", "size"),
    [(4, 4), (3, 2), (7, 2), (5, 1), (3, 6), (0, 16), (4, 1), (7, 1)],
)
def test_mappings_that_overlap(ram, backing, target, offset, size):
    with pytest.raises(MemoryRegionOverlapError, match=r"0x4000\+0x4000"):
        ram.add_mapping(offset * PAGE, size * PAGE, backing)
    assert len(ram.mappings) == 1
    assert target.events == []


@pytest.mark.parametrize(("offset", "size"), [(3, 1), (8, 1), (0, 4), (8, 8)])
def test_mappings_that_only_touch(ram, backing, target, offset, size):
    ram.add_mapping(offset * PAGE, size * PAGE, backing)
    assert len(target.events) == 1


@pytest.mark.parametrize(("offset", "size"), [(4, 1), (4, 3), (5, 3), (6, 10), (0, 5), (5, 1)])
def test_removals_that_cut(ram, target, offset, size):
    with pytest.raises(RegionError, match="cut"):
        ram.remove_mappings(offset * PAGE, size * PAGE)
    assert len(ram.mappings) == 1
    assert target.events == []


@pytest.mark.parametrize(("offset", "size", "count"), [(0, 4, 0), (8, 8, 0), (0, 16, 1), (4, 4, 1)])
def test_removals_that_do_not(ram, target, offset, size, count):
    assert ram.remove_mappings(offset * PAGE, size * PAGE) == count
    assert len(target.events) == count


@pytest.mark.parametrize(
    ("start", "size"), [(1, PAGE), (PAGE, 1), (PAGE, PAGE + 8), (0x800, PAGE), (PAGE, 0x800)]
)
def test_what_is_not_aligned(manager, ram, backing, start, size):
    with pytest.raises(ValueError, match="aligned to pages of 0x1000"):
        manager.new_region("r", start, size)
    with pytest.raises(ValueError, match="aligned"):
        ram.add_mapping(start, size, backing)
    with pytest.raises(ValueError, match="aligned"):
        ram.remove_mappings(start, size)
    if start % PAGE:
        with pytest.raises(ValueError, match="aligned"):
            ram.add_mapping(0, PAGE, backing, start)
        with pytest.raises(ValueError, match="aligned"):
            ram.move(start)


@pytest.mark.parametrize("bad", [True, 1.0, "0", None, b"0"])
def test_what_is_no_number(manager, ram, backing, bad):
    for call in (
        lambda: manager.new_region("r", bad, PAGE),
        lambda: manager.new_region("r", 0, bad),
        lambda: manager.new_region("r", 0, PAGE, bad),
        lambda: ram.add_mapping(bad, PAGE, backing),
        lambda: ram.add_mapping(0, bad, backing),
        lambda: ram.add_mapping(0, PAGE, backing, bad),
        lambda: ram.remove_mappings(bad, PAGE),
        lambda: ram.move(bad),
    ):
        with pytest.raises(TypeError, match="integer"):
            call()


@pytest.mark.parametrize("priority", [-1, 256, 2**64])
def test_priorities_that_do_not_exist(manager, priority):
    with pytest.raises(ValueError, match="priority"):
        manager.new_region("r", 0, PAGE, priority)


def test_what_is_of_the_wrong_type(manager, ram):
    with pytest.raises(TypeError, match="MappingType"):
        manager.new_region("r", 0, PAGE, 0, "ram")
    with pytest.raises(TypeError, match="Backing"):
        ram.add_mapping(0, PAGE, bytearray(PAGE))
    with pytest.raises(TypeError, match="map_dma"):
        manager.add_target(object())


def test_a_target_can_be_added_once(manager, ram, target):
    with pytest.raises(ValueError, match="already"):
        manager.add_target(target)
    assert len(manager.targets) == 1


def test_backings_that_cannot_be_used(ram, tmp_path, target):
    closed = Backing.anonymous(PAGE)
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        ram.add_mapping(0, PAGE, closed)
    with (tmp_path / "short").open("w+b") as file:
        file.truncate(PAGE)
        with pytest.raises(BackingError, match="long"):
            Backing.from_fd(file.fileno(), 2 * PAGE)
    read_end, write_end = os.pipe()
    with pytest.raises(BackingError):
        Backing.from_fd(read_end, PAGE)
    os.close(read_end)
    os.close(write_end)
    with pytest.raises(BackingError):
        Backing.from_fd(write_end, PAGE)
    assert len(ram.mappings) == 1
    assert target.events == []


def test_memory_off_its_page(ram, target):
    with (
        Backing.memfd(4 * PAGE) as file,
        Backing.from_fd(file.fd, PAGE, 8) as odd,
        pytest.raises(ValueError, match="aligned"),
    ):
        ram.add_mapping(0, PAGE, odd)
    assert target.events == []


def test_memory_in_use_cannot_be_closed(ram, backing):
    with pytest.raises(BufferError):
        backing.close()
    ram.unmap()  # still one of its mappings
    with pytest.raises(BufferError):
        backing.close()
    ram.remove_mappings(4 * PAGE, 4 * PAGE)
    backing.close()


def test_a_refused_mapping_does_not_keep_the_memory(ram, target):
    with Backing.memfd(8 * PAGE) as other, pytest.raises(MemoryRegionOverlapError):
        ram.add_mapping(4 * PAGE, PAGE, other)


def test_a_read_only_backing_is_mapped_read_only(ram, backing, target):
    with Backing.from_fd(backing.fd, PAGE, writable=False) as view:
        ram.add_mapping(0, PAGE, view)
        assert not target.held[0x10000].writable
        ram.remove_mappings(0, PAGE)


@pytest.mark.parametrize(
    ("mapping", "region", "effective"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, False)],
)
def test_both_must_allow_writing(manager, backing, target, mapping, region, effective):
    manager.add_target(target)
    ram = manager.new_region("ram", 0, PAGE)
    ram.add_mapping(0, PAGE, backing, writable=mapping)
    ram.map(writable=region)
    assert target.held[0].writable is effective


def test_handles_used_after_close(manager, ram, backing, target):
    handle = manager.targets[0]
    ram.close()
    ram.close()
    assert ram.closed
    assert repr(ram).endswith("closed>")
    for call in (
        lambda: ram.add_mapping(0, PAGE, backing),
        lambda: ram.remove_mappings(0, PAGE),
        ram.map,
        ram.unmap,
        lambda: ram.move(0),
    ):
        with pytest.raises(ValueError, match="region 'ram' is closed"):
            call()
    handle.close()
    handle.close()
    handle.forget()
    assert handle.closed
    with pytest.raises(ValueError, match="closed"):
        handle.retry()
    assert not handle.diff()
    assert handle.stats().mappings == 0
    assert target.held == {}


def test_asking_for_what_is_so_changes_nothing(manager, ram, target):
    ram.map()
    ram.move(ram.start)
    ram.map(writable=True)
    assert target.events == []
    ram.unmap()
    target.events.clear()
    ram.unmap()
    assert target.events == []


def test_overlays(manager, backing, target):
    """Who is active, over time; equal priorities: the earlier wins."""
    manager.add_target(target)
    first = manager.new_region("first", 0, 4 * PAGE, 1)
    second = manager.new_region("second", 0, 4 * PAGE, 1)
    small = manager.new_region("small", PAGE, PAGE, 0)
    cover = manager.new_region("cover", 0, 8 * PAGE, 2)
    regions = (first, second, small, cover)

    def active() -> list[str]:
        return [region.name for region in regions if region.active]

    for call, expected in (
        (second.map, ["second"]),
        (first.map, ["first"]),
        (small.map, ["first"]),
        (first.unmap, ["second"]),
        (second.unmap, ["small"]),
        (cover.map, ["cover"]),
        (second.map, ["cover"]),
        (cover.unmap, ["second"]),
        (lambda: cover.move(0x100000), ["second"]),
        (cover.map, ["second", "cover"]),
        (lambda: cover.move(0), ["cover"]),
        (cover.close, ["second"]),
        (second.close, ["small"]),
        (small.close, []),
    ):
        call()
        assert active() == expected


def test_a_region_can_only_move_where_it_could_be_made(manager, ram):
    other = manager.new_region("other", 0x100000, 4 * PAGE)
    with pytest.raises(MemoryRegionOverlapError):
        ram.move(0x100000 - PAGE)
    with pytest.raises(MemoryRegionOverlapError):
        other.move(0x10000)
    ram.move(0x100000 + 4 * PAGE)
    assert ram.start == 0x104000


def test_errors_are_ours(manager):
    with pytest.raises(GuestioError):
        manager.new_region("r", 2**64 - PAGE, 2 * PAGE)


def test_a_request_is_plain_data():
    request = DmaMapRequest(2**64 - PAGE, PAGE, kind=MappingType.DEVICE)
    assert request.end == 2**64
    assert request == DmaMapRequest(2**64 - PAGE, PAGE, kind=MappingType.DEVICE)
    assert len({request, request}) == 1


TOP = 2**64


@pytest.mark.parametrize(
    ("bad", "error", "name"),
    [
        ({"start": -1}, ValueError, "start"),
        ({"start": TOP}, ValueError, "start"),
        ({"start": TOP - PAGE + 1}, ValueError, "start"),
        ({"size": 0}, ValueError, "size"),
        ({"size": -PAGE}, ValueError, "size"),
        ({"size": TOP + 1}, ValueError, "start"),
        ({"host_address": -1}, ValueError, "host_address"),
        ({"host_address": TOP - 1}, ValueError, "host_address"),
        ({"fd": -1}, ValueError, "fd"),
        ({"file_offset": -1}, ValueError, "file_offset"),
        ({"file_offset": TOP}, ValueError, "file_offset"),
        ({"kind": "ram"}, TypeError, "kind"),
        ({"kind": MappingType}, TypeError, "kind"),
        *(
            ({name: value}, TypeError, name)
            for name in ("start", "size", "host_address", "fd", "file_offset")
            for value in (True, 1.0, "1", b"1", np.float64(1), int)
        ),
        ({"start": None}, TypeError, "start"),
        ({"size": None}, TypeError, "size"),
        ({"file_offset": None}, TypeError, "file_offset"),
    ],
    ids=repr,
)
def test_a_request_that_makes_no_sense(bad, error, name):
    with pytest.raises(error, match=name):
        DmaMapRequest(**{"start": PAGE, "size": PAGE, **bad})


def test_a_request_keeps_plain_integers():
    """A numpy sum would wrap, or become a float."""
    top = np.uint64(TOP - PAGE)
    request = DmaMapRequest(top, np.int64(PAGE), np.uint64(PAGE), np.int32(3), np.uint8(0))
    assert request == DmaMapRequest(TOP - PAGE, PAGE, PAGE, 3, 0)
    assert request.end == TOP
    numbers = (request.start, request.size, request.host_address, request.fd, request.file_offset)
    assert [type(number) for number in numbers] == [int] * 5


def test_a_failed_mapping_does_not_keep_the_memory_while_the_error_is_looked_at(manager, ram):
    manager.add_target(FailAfter(1))
    memory = Backing.memfd(PAGE)
    try:
        ram.add_mapping(0, PAGE, memory)
    except DmaError:
        memory.close()
    assert memory.closed
