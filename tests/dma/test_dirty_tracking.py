"""What devices write is marked, at every target or none, also where memory comes and goes."""

import errno
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from guestio import AtomicBitmap, Backing, DeviceError
from guestio.dma import DmaError, MappingType, RegionManager, TrackingDmaTarget, _uapi
from guestio.memory import DirtyLog
from guestio.testing.host_iommu import SimulatedHostIommu
from guestio.testing.targets import RecordingTarget
from tests.kit.dma import PAGE
from tests.kit.fake_dma_log import FakeDmaLogDevice, FakeKernelTarget

HIGH = 1 << 32
COVERED = HIGH + 0x1000000
START = _uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START
REPORT = _uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT


@pytest.fixture
def marks() -> AtomicBitmap:
    return AtomicBitmap(COVERED)


@pytest.fixture(autouse=True)
def fake_ioctl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of fake devices go to them; no other is expected here."""
    devices: dict[int, FakeDmaLogDevice] = {}
    make = FakeDmaLogDevice.__init__

    def remember(self: FakeDmaLogDevice, address: str, *, has_log: bool = True) -> None:
        make(self, address, has_log=has_log)
        devices[self.fileno()] = self

    def ioctl(fd: int, request: int, structure: object) -> int:
        assert request == _uapi.VFIO_DEVICE_FEATURE
        devices[fd].feature(structure)
        return 0

    monkeypatch.setattr(FakeDmaLogDevice, "__init__", remember)
    monkeypatch.setattr(_uapi, "ioctl", ioctl)


class Writer:
    """A tracking target, and a device that writes through it."""

    def __init__(self, target: TrackingDmaTarget, writes: Callable[[int, int], None]) -> None:
        self.target = target
        self.writes = writes


def by_the_iommu() -> Writer:
    host = SimulatedHostIommu("iommufd")
    return Writer(host, lambda iova, length: host.write(iova, b"x" * length))


def by_the_device() -> Writer:
    device = FakeDmaLogDevice("0000:00:01.0")
    return Writer(FakeKernelTarget(device), device.writes)


@pytest.fixture(params=[by_the_iommu, by_the_device])
def writer(request: pytest.FixtureRequest) -> Writer:
    return request.param()


@pytest.fixture
def memory() -> Iterator[Backing]:
    with Backing.memfd(0x800000) as made:
        yield made


@pytest.fixture
def manager(memory: Backing) -> Iterator[RegionManager]:
    with RegionManager() as made:
        yield made


def ram(manager: RegionManager, memory: Backing, start: int, size: int, skip: int = 0):
    region = manager.new_region(f"{start:#x}", start, size)
    region.add_mapping(0, size, memory, skip)
    region.map()
    return region


def dirty(marks: AtomicBitmap) -> list[int]:
    return list(marks.dirty_pages(clear=True))


def test_exactly_what_was_written_is_marked(manager, memory, marks, writer):
    """Mappings of odd sizes, next to each other and apart, on both sides of 4 GiB."""
    places, at = [], 0x10000
    for pages in (1, 2, 63, 64, 65, 127, 129, 513):
        places.append((at, pages))
        at += pages * PAGE + (pages % 2) * 3 * PAGE
    places.append((HIGH + 5 * PAGE, 77))
    for start, pages in places:
        ram(manager, memory, start, pages * PAGE)
    manager.add_target(writer.target)
    writer.writes(0x10000, 1)
    manager.start_dirty_tracking(marks)
    choose = random.Random(1)
    for _round in range(3):
        wanted = {places[0][0] // PAGE, places[-1][0] // PAGE + 76}
        writer.writes(places[0][0], 1)
        writer.writes(places[-1][0] + 77 * PAGE - 1, 1)
        for start, pages in places:
            for page in choose.sample(range(pages), choose.randint(0, min(pages, 40))):
                wanted.add(start // PAGE + page)
                writer.writes(start + page * PAGE + choose.randrange(PAGE - 8), 8)
        assert manager.harvest_dirty() == len(wanted)
        assert dirty(marks) == sorted(wanted)
    assert manager.harvest_dirty() == 0
    assert dirty(marks) == []


def test_larger_pages(manager, memory, writer):
    marks = AtomicBitmap(COVERED, 0x10000)
    ram(manager, memory, 0x100000, 0x400000)
    ram(manager, memory, 0x601000, 0x7F000)  # no whole number of them
    manager.add_target(writer.target)
    manager.start_dirty_tracking(marks)
    for address in (0x100000, 0x10F000, 0x2FF000, 0x601000, 0x67F000):
        writer.writes(address, 8)
    manager.harvest_dirty()
    assert dirty(marks) == [0x10, 0x2F, 0x60, 0x67]


def test_marks_go_into_a_dirty_log_too(manager, memory, writer):
    with Backing.memfd(COVERED // PAGE // 8) as space:
        log = DirtyLog()
        log.use(space._mapping, 0, space.size)
        log.enabled = True
        marks = AtomicBitmap(COVERED, log=log, own=False)
        ram(manager, memory, 0x100000, 0x400000)
        manager.add_target(writer.target)
        manager.start_dirty_tracking(marks)
        writer.writes(0x1FFFFF, 2)
        manager.harvest_dirty()
        assert list(log.take()) == [0x1FF, 0x200]
        log.clear()


def test_what_is_unmapped_keeps_its_marks(manager, memory, marks, writer):
    one = ram(manager, memory, 0x100000, 0x10000)
    two = ram(manager, memory, 0x200000, 0x10000)
    three = ram(manager, memory, 0x300000, 0x10000)
    ram(manager, memory, 0x500000, 0x10000).unmap()
    manager.add_target(writer.target)
    manager.start_dirty_tracking(marks)
    for start in (0x100000, 0x200000, 0x300000):
        writer.writes(start + 3 * PAGE, 1)
    one.unmap()
    assert dirty(marks) == [0x103]
    two.move(0x210000)
    assert dirty(marks) == [0x203]
    # It goes and comes without a way to write it.
    three.map(writable=False)
    assert dirty(marks) == [0x303]
    writer.writes(0x210000, 1)
    two.remove_mappings(0, 0x10000)
    assert dirty(marks)[0] == 0x210
    assert manager.harvest_dirty() == 0


def test_a_target_that_is_closed_leaves_its_marks(manager, memory, marks, writer):
    ram(manager, memory, 0x100000, 0x10000)
    handle = manager.add_target(writer.target)
    manager.start_dirty_tracking(marks)
    writer.writes(0x105000, 1)
    handle.close()
    assert dirty(marks) == [0x105]
    assert manager.harvest_dirty() == 0
    manager.add_target(writer.target)  # it tracks again
    writer.writes(0x106000, 1)
    manager.harvest_dirty()
    assert dirty(marks) == [0x106]


def test_memory_that_comes_while_tracking_is_on(manager, memory, marks, writer):
    ram(manager, memory, 0x100000, 0x10000)
    ram(manager, memory, 0x300000, 0x10000)
    manager.add_target(writer.target)
    manager.start_dirty_tracking(marks)
    ram(manager, memory, 0x200000, 0x10000)
    writer.writes(0x20F000, 1)
    manager.harvest_dirty()
    assert dirty(marks) == [0x20F]


def test_a_device_log_does_not_know_memory_beyond_what_it_was_told(manager, memory, marks):
    """It has everything there count as written, every time, and nothing else."""
    device = FakeDmaLogDevice("0000:00:01.0")
    ram(manager, memory, 0x100000, 0x10000)
    manager.add_target(FakeKernelTarget(device))
    manager.start_dirty_tracking(marks)
    assert device.ranges == [(0x100000, 0x10000)]
    late = ram(manager, memory, 0x110000, 0x2000)
    for _time in range(2):
        manager.harvest_dirty()
        assert dirty(marks) == [0x110, 0x111]
    late.unmap()
    assert dirty(marks) == [0x110, 0x111]


def test_type1_counts_all_that_can_be_written(manager, memory, marks):
    host = SimulatedHostIommu("type1")
    ram(manager, memory, 0x100000, 0x10000)
    read_only = manager.new_region("rom", 0x200000, 0x10000)
    read_only.add_mapping(0, 0x10000, memory, writable=False)
    read_only.map()
    gone = ram(manager, memory, 0x300000, 0x2000)
    bar = host.new_bar(0x10000)
    window = manager.new_region("bar", 0x400000, 0x10000, kind=MappingType.DEVICE)
    window.add_mapping(0, 0x10000, bar.backing)
    window.map()
    handle = manager.add_target(host)
    assert not handle.dirty_support().exact
    manager.start_dirty_tracking(marks)
    for _time in range(2):
        assert manager.harvest_dirty() == 0x12
        assert dirty(marks) == [*range(0x100, 0x110), 0x300, 0x301]
    gone.unmap()
    assert dirty(marks) == [0x300, 0x301]
    window.close()
    bar.close()


def test_what_is_written_before_it_is_on_or_after_it_is_off(manager, memory, marks, writer):
    ram(manager, memory, 0x100000, 0x10000)
    manager.add_target(writer.target)
    for _time in range(2):
        writer.writes(0x100000, 1)
        manager.start_dirty_tracking(marks)
        assert manager.dirty_tracking is marks
        assert manager.harvest_dirty() == 0
        writer.writes(0x101000, 1)
        assert manager.harvest_dirty() == 1
        manager.stop_dirty_tracking()
        manager.stop_dirty_tracking()
        assert manager.dirty_tracking is None
        with pytest.raises(ValueError, match="off"):
            manager.harvest_dirty()
    assert dirty(marks) == [0x101]


@pytest.mark.parametrize("broken", range(3))
def test_all_targets_or_none(manager, memory, marks, broken):
    devices = [FakeDmaLogDevice(f"0000:00:0{n}.0") for n in range(3)]
    devices[broken].refuse[START] = errno.ENOSPC
    ram(manager, memory, 0x100000, 0x10000)
    # Two at one target, one at the other.
    manager.add_target(FakeKernelTarget(*devices[:2]))
    manager.add_target(FakeKernelTarget(devices[2]))
    with pytest.raises(DeviceError, match=rf"0000:00:0{broken}.0 .*0x100000.*No space"):
        manager.start_dirty_tracking(marks)
    assert [device.written for device in devices] == [None] * 3
    assert manager.dirty_tracking is None
    devices[broken].refuse.clear()
    manager.start_dirty_tracking(marks)
    devices[2].writes(0x104000)
    devices[0].writes(0x104000)
    assert manager.harvest_dirty() == 2
    assert dirty(marks) == [0x104]


def test_a_target_that_cannot_is_named_with_what_it_lacks(manager, memory, marks):
    ram(manager, memory, 0x100000, 0x10000)
    able = SimulatedHostIommu("iommufd")
    manager.add_target(able)
    device = FakeDmaLogDevice("0000:00:07.0", has_log=False)
    unable = manager.add_target(FakeKernelTarget(device))
    for text in ("0000:00:07.0", "IOMMU_HW_CAP_DIRTY_TRACKING", "VFIO_DEVICE_FEATURE_DMA_LOGGING"):
        assert text in unable.dirty_support().missing
        with pytest.raises(DeviceError, match=text):
            manager.start_dirty_tracking(marks)
        able.start_dirty_tracking([])  # it was not left on
        able.stop_dirty_tracking()
    unable.close()
    manager.start_dirty_tracking(marks)
    with pytest.raises(DeviceError, match=r"0000:00:07\.0"):
        manager.add_target(FakeKernelTarget(device))
    assert len(manager.targets) == 1


@pytest.mark.parametrize("interface", ["type1", "iommufd"])
def test_a_kernel_that_cannot_track(manager, memory, marks, interface):
    host = SimulatedHostIommu(interface, tracks=False)
    manager.add_target(host)
    with pytest.raises(DeviceError, match=r"simulated: .*VFIO_DEVICE_FEATURE_DMA_LOGGING"):
        manager.start_dirty_tracking(marks)


def test_a_target_that_is_refused_while_tracking_is_on_does_not_track(manager, memory, marks):
    ram(manager, memory, 0x100000, 0x10000)
    manager.start_dirty_tracking(marks)
    host = SimulatedHostIommu("iommufd")
    host.fail_after(0)
    with pytest.raises(DmaError):
        manager.add_target(host)
    host.start_dirty_tracking([])


def test_a_target_without_the_methods(manager, memory, marks, writer):
    ram(manager, memory, 0x100000, 0x10000)
    plain = RecordingTarget()
    handle = manager.add_target(plain)
    assert "start_dirty_tracking" in handle.dirty_support().missing
    with pytest.raises(DeviceError, match="marks_itself"):
        manager.start_dirty_tracking(marks)
    handle.close()
    manager.add_target(plain, marks_itself=True)
    manager.start_dirty_tracking(marks)
    with pytest.raises(DeviceError, match="marks_itself"):
        manager.add_target(RecordingTarget())
    manager.add_target(writer.target)
    writer.writes(0x100000, 1)
    assert manager.harvest_dirty() == 1


def test_memory_beyond_the_bitmap_is_refused_before_anything_changes(manager, memory, writer):
    ram(manager, memory, 0x100000, 0x10000)
    manager.add_target(writer.target)
    with pytest.raises(DmaError, match="0x100000"):
        manager.start_dirty_tracking(AtomicBitmap(0x10F000))
    marks = AtomicBitmap(0x110000)
    manager.start_dirty_tracking(marks)
    with pytest.raises(DmaError, match=r"0x110000\+0x1000.*enlarge"):
        ram(manager, memory, 0x110000, PAGE)
    assert len(manager.mappings()) == 1
    marks.enlarge(PAGE)
    manager.regions[-1].map()
    writer.writes(0x110000, 1)
    manager.harvest_dirty()
    assert dirty(marks)[-1] == 0x110


def test_a_log_that_fails_marks_everything_and_says_so(manager, memory, marks):
    device, other = FakeDmaLogDevice("0000:00:01.0"), SimulatedHostIommu("iommufd")
    region = ram(manager, memory, 0x100000, 0x4000)
    ram(manager, memory, 0x200000, 0x1000)
    manager.add_target(FakeKernelTarget(device))
    manager.add_target(other)
    manager.start_dirty_tracking(marks)
    other.write(0x200000, b"x")
    device.refuse[REPORT] = errno.EIO
    with pytest.raises(
        DmaError, match=r"0000:00:01.0 lost its log.*start tracking again"
    ) as caught:
        manager.harvest_dirty()
    assert any("0x200000" in note for note in caught.value.__notes__)
    assert dirty(marks) == [0x100, 0x101, 0x102, 0x103, 0x200]
    region.unmap()
    assert dirty(marks) == [0x100, 0x101, 0x102, 0x103]
    device.refuse.clear()
    assert manager.harvest_dirty() == 0


def test_a_device_that_is_closed_takes_its_log_along(manager, memory, marks):
    device = FakeDmaLogDevice("0000:00:01.0")
    ram(manager, memory, 0x100000, 0x2000)
    manager.add_target(FakeKernelTarget(device))
    manager.start_dirty_tracking(marks)
    device.writes(0x101000)
    device.close()
    with pytest.raises(DmaError, match="was closed"):
        manager.harvest_dirty()
    assert dirty(marks) == [0x100, 0x101]
    manager.stop_dirty_tracking()


def test_a_target_that_is_gone_takes_its_log_along(manager, memory, marks, writer):
    ram(manager, memory, 0x100000, 0x2000)
    handle = manager.add_target(writer.target)
    manager.start_dirty_tracking(marks)
    handle.forget()
    assert dirty(marks) == [0x100, 0x101]
    assert manager.harvest_dirty() == 0


@pytest.mark.parametrize("interface", ["type1", "iommufd"])
def test_a_kernel_that_does_not_unmap_loses_no_marks(manager, memory, marks, interface):
    host = SimulatedHostIommu(interface)
    region = ram(manager, memory, 0x100000, 0x4000)
    handle = manager.add_target(host)
    manager.start_dirty_tracking(marks)
    host.write(0x102000, b"x")
    host.fail_after(0, errno.EIO, ["unmap"])
    with pytest.raises(DmaError):
        region.unmap()
    dirty(marks)
    # The memory is kept, and devices may still write it.
    host.write(0x103000, b"x")
    manager.harvest_dirty()
    assert 0x103 in dirty(marks)
    host.write(0x101000, b"x")
    handle.retry()
    assert 0x101 in dirty(marks)
    assert host.mappings() == []


def test_a_kernel_that_does_not_tell_before_an_unmap(manager, memory, marks):
    host = SimulatedHostIommu("iommufd")
    region = ram(manager, memory, 0x100000, 0x2000)
    manager.add_target(host)
    manager.start_dirty_tracking(marks)
    host.fail_after(0, errno.ENOMEM, ["read_dirty"])
    region.unmap()
    assert host.mappings() == []
    assert dirty(marks) == [0x100, 0x101]


def test_more_than_a_hundred_thousand_pages(manager, marks):
    device = FakeDmaLogDevice("0000:00:01.0")
    pages = 150_001
    with Backing.memfd(pages * PAGE) as memory:
        ram(manager, memory, 0x100000, pages * PAGE)
        manager.add_target(FakeKernelTarget(device))
        manager.start_dirty_tracking(marks)
        written = np.flatnonzero(np.random.default_rng(2).random(pages) < 0.4) + 0x100
        assert device.written is not None
        device.written |= set(written.tolist())
        assert manager.harvest_dirty() == len(written)
        assert np.array_equal(marks.dirty_pages(clear=True), written)
        manager.close()


def test_misuse(manager, memory, marks, writer):
    ram(manager, memory, 0x100000, 0x2000)
    manager.add_target(writer.target)
    with pytest.raises(TypeError, match="AtomicBitmap"):
        manager.start_dirty_tracking(bytearray(8))
    manager.start_dirty_tracking(marks)
    with pytest.raises(ValueError, match="is on"):
        manager.start_dirty_tracking(marks)
    with pytest.raises(ValueError, match="tracks already"):
        writer.target.start_dirty_tracking([])
    with pytest.raises(TypeError):
        manager.add_target(RecordingTarget(), marks_itself="yes")
