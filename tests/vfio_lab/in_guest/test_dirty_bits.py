"""Dirty bits of iommufd's page tables, compared page by page with what was written.

The IOMMU is that of the kernel's own test; from the entries of its page tables upwards all is the
kernel's real code.
"""

import errno
from collections.abc import Iterator

import numpy as np
import pytest

from guestio import AtomicBitmap, Backing, DeviceError, MmapRegion
from guestio.dma import IommufdTarget, RegionManager
from guestio.dma.dirty import DirtyBits, words_for
from tests.vfio_lab.mock_device import APERTURE, APERTURE_END, PAGE, MockDevice

BASE = APERTURE // PAGE


@pytest.fixture
def target() -> Iterator[IommufdTarget]:
    with IommufdTarget() as made:
        yield made


@pytest.fixture
def memory() -> Iterator[Backing]:
    """No two neighbors of its pages are neighbors in the host's memory.

    Of such the IOMMU would make one entry of its page table, whose pages are all written if one is.
    """
    with Backing.memfd(0x1000000) as made:
        view = MmapRegion(0, made).slice()
        # Those that are made one after the other are far apart.
        for first in range(64):
            for page in range(first, made.size // PAGE, 64):
                view.write(page * PAGE, b"x")
        del view
        yield made


@pytest.fixture
def manager(target: IommufdTarget, memory: Backing) -> Iterator[RegionManager]:
    with RegionManager() as made:
        yield made


@pytest.fixture
def marks() -> AtomicBitmap:
    return AtomicBitmap(APERTURE_END)


def ram(manager: RegionManager, memory: Backing, start: int, pages: int):
    region = manager.new_region(f"{start:#x}", start, pages * PAGE)
    for at in range(0, pages * PAGE, memory.size):
        region.add_mapping(at, min(memory.size, pages * PAGE - at), memory)
    region.map()
    return region


def some(pages: int, seed: int, share: float = 0.3) -> np.ndarray:
    return np.random.default_rng(seed).random(pages) < share


def test_odd_ranges_page_by_page(target, manager, memory, marks):
    device = MockDevice(target)
    assert device.table is not None
    handle = manager.add_target(target)
    places, at = [], APERTURE
    for pages in (1, 2, 3, 63, 64, 65, 127, 129, 511, 513, 1500):
        ram(manager, memory, at, pages)
        places.append((at, pages))
        at += (pages + pages % 3) * PAGE
    assert handle.dirty_support().exact
    manager.start_dirty_tracking(marks)
    for seed in range(3):
        wanted = []
        for start, pages in places:
            written = some(pages, seed)
            device.writes(start, written)
            wanted += (np.flatnonzero(written) + start // PAGE).tolist()
        assert manager.harvest_dirty() == len(wanted)
        assert list(marks.dirty_pages(clear=True)) == wanted
    assert manager.harvest_dirty() == 0


def test_more_than_a_hundred_thousand_pages(target, manager, memory, marks):
    device = MockDevice(target)
    pages = 130_001
    ram(manager, memory, APERTURE, pages)
    manager.add_target(target)
    manager.start_dirty_tracking(marks)
    for share in (0.5, 0.001):
        written = some(pages, 1, share)
        device.writes(APERTURE, written)
        assert manager.harvest_dirty() == np.count_nonzero(written)
        found = marks.dirty_pages(clear=True)
        assert np.array_equal(found, np.flatnonzero(written) + BASE)


@pytest.mark.parametrize("page_size", [0x10000, 0x200000])
def test_larger_pages(target, manager, memory, page_size):
    device = MockDevice(target)
    marks = AtomicBitmap(APERTURE_END, page_size)
    # The second consists of no whole number of them.
    places = ((APERTURE, 3 * 512), (APERTURE + 0x800000 + PAGE, 100))
    for start, pages in places:
        ram(manager, memory, start, pages)
    manager.add_target(target)
    manager.start_dirty_tracking(marks)
    wanted = set()
    for start, pages in places:
        written = some(pages, 3, 0.01)
        device.writes(start, written)
        wanted |= {(start + int(page) * PAGE) // page_size for page in np.flatnonzero(written)}
    manager.harvest_dirty()
    assert list(marks.dirty_pages(clear=True)) == sorted(wanted)
    assert manager.harvest_dirty() == 0


def test_memory_in_one_piece_is_marked_at_least_where_it_was_written(target, manager, marks):
    device = MockDevice(target)
    with Backing.memfd(0x400000) as memory:
        MmapRegion(0, memory).slice().fill(0, memory.size, 1)
        ram(manager, memory, APERTURE, 1024)
        handle = manager.add_target(target)
        manager.start_dirty_tracking(marks)
        written = some(1024, 5, 0.05)
        device.writes(APERTURE, written)
        manager.harvest_dirty()
        found = set(marks.dirty_pages(clear=True).tolist())
        assert found >= set((np.flatnonzero(written) + BASE).tolist())
        assert found <= set(range(BASE, BASE + 1024))
        assert manager.harvest_dirty() == 0
        handle.close()
        manager.close()


def test_memory_comes_and_goes(target, manager, memory, marks):
    device = MockDevice(target)
    gone = ram(manager, memory, APERTURE, 10)
    moved = ram(manager, memory, APERTURE + 0x100000, 10)
    manager.add_target(target)
    manager.start_dirty_tracking(marks)
    first = np.arange(10) == 3
    device.writes(APERTURE, first)
    gone.close()
    assert list(marks.dirty_pages(clear=True)) == [BASE + 3]
    device.writes(APERTURE + 0x100000, first)
    moved.move(APERTURE + 0x200000)
    assert list(marks.dirty_pages(clear=True)) == [BASE + 0x103]
    ram(manager, memory, APERTURE, 70)
    assert manager.harvest_dirty() == 0
    device.writes(APERTURE, np.arange(70) == 69)
    device.writes(APERTURE + 0x200000, first)
    manager.harvest_dirty()
    assert list(marks.dirty_pages(clear=True)) == [BASE + 69, BASE + 0x203]


def test_looking_clears_only_if_asked(target, manager, memory, marks):
    device = MockDevice(target)
    ram(manager, memory, APERTURE, 100)
    manager.add_target(target)
    manager.start_dirty_tracking(marks)
    device.writes(APERTURE, np.arange(100) == 77)
    for clear, found in ((False, 1), (False, 1), (True, 1), (True, 0)):
        bits = DirtyBits(APERTURE, PAGE, words_for(100 * PAGE, PAGE))
        target.kernel_read_dirty(bits, 100 * PAGE, clear=clear)
        assert [int(word) for word in bits.words] == [0, found << 13]


def test_the_kernel_stops_at_a_hole_without_a_word(target, manager, memory, marks):
    """Why a read is never of more than one mapping."""
    device = MockDevice(target)
    ram(manager, memory, APERTURE, 10)
    ram(manager, memory, APERTURE + 11 * PAGE, 10)
    manager.add_target(target)
    manager.start_dirty_tracking(marks)
    device.writes(APERTURE + 11 * PAGE, np.arange(10) == 0)
    bits = DirtyBits(APERTURE, PAGE, words_for(21 * PAGE, PAGE))
    target.kernel_read_dirty(bits, 21 * PAGE)
    assert not bits.words.any()
    assert manager.harvest_dirty() == 1


def test_devices_share_what_notes_their_writes(target, manager, memory, marks):
    one, two = MockDevice(target), MockDevice(target)
    assert one.table == two.table
    ram(manager, memory, APERTURE, 10)
    manager.add_target(target)
    manager.start_dirty_tracking(marks)
    late = MockDevice(target)
    for page, device in enumerate((one, two, late)):
        device.writes(APERTURE, np.arange(10) == page)
    manager.harvest_dirty()
    assert list(marks.dirty_pages(clear=True)) == [BASE, BASE + 1, BASE + 2]


def test_a_device_that_joins_first_while_tracking_is_on(target, manager, memory, marks):
    ram(manager, memory, APERTURE, 10)
    manager.add_target(target)
    manager.start_dirty_tracking(marks)
    device = MockDevice(target)
    device.writes(APERTURE, np.arange(10) == 5)
    assert manager.harvest_dirty() == 1
    manager.stop_dirty_tracking()
    with pytest.raises(OSError) as caught:
        device.writes(APERTURE, np.arange(10) == 5)
    assert caught.value.errno == errno.EINVAL


def test_all_targets_or_none(target, manager, memory, marks):
    device = MockDevice(target)
    ram(manager, memory, APERTURE, 10)
    manager.add_target(target)
    with IommufdTarget() as other:
        unable = MockDevice(other, tracks=False)
        assert unable.table is None
        handle = manager.add_target(other)
        with pytest.raises(DeviceError, match=rf"{unable.address}: its IOMMU does not note writes"):
            manager.start_dirty_tracking(marks)
        with pytest.raises(OSError) as caught:
            device.writes(APERTURE, np.arange(10) == 5)
        assert caught.value.errno == errno.EINVAL  # nothing is noted
        handle.close()
    manager.start_dirty_tracking(marks)
    device.writes(APERTURE, np.arange(10) == 5)
    assert manager.harvest_dirty() == 1
