"""Two assigned devices under a real kernel: what one reaches of the other, and of memory."""

import os

import pytest

from guestio import Backing
from guestio.dma import DmaError, DmaMapRequest, MappingType, RegionManager
from guestio.testing.targets import RecordingTarget
from tests.vfio_lab.in_guest.conftest import Lab, bytes_of
from tests.vfio_lab.script import MSI, PAGE

BAR_AT = 0x100000000
SIZE = 1 << 20


def new_bar(manager: RegionManager, lab: Lab, start: int = BAR_AT):
    bar = manager.new_region("bar", start, SIZE, kind=MappingType.DEVICE)
    bar.add_mapping(0, SIZE, lab.bar)
    return bar


def test_one_device_writes_into_the_other_and_faults_once_that_is_unmapped(lab, manager):
    bar = new_bar(manager, lab)
    bar.map()
    with manager.add_target(lab.target) as handle:  # replayed
        assert handle.stats().failed == ()
        lab.device_writes(BAR_AT + 0x5008, b"from edu")
        assert bytes_of(lab.bar).read(0x5008, 8) == b"from edu"
        bytes_of(lab.bar).write(0xFF000, b"from bar")
        assert lab.device_reads(BAR_AT + 0xFF000, 8) == b"from bar"
        bar.unmap()
        lab.device_writes(BAR_AT + 0x5008, b"too late")
        assert bytes_of(lab.bar).read(0x5008, 8) == b"from edu"
        assert lab.device_reads(BAR_AT + 0xFF000, 8) is None
        bar.map()  # live
        lab.device_writes(BAR_AT + 0x5008, b"once more")
        assert bytes_of(lab.bar).read(0x5008, 9) == b"once more"
    lab.device_writes(BAR_AT + 0x5008, b"deregistered")
    assert bytes_of(lab.bar).read(0x5008, 9) == b"once more"


def test_a_bar_moves(lab, manager):
    bar = new_bar(manager, lab)
    bar.map()
    with manager.add_target(lab.target):
        bytes_of(lab.bar).write(0, b"the device")
        for there, here in (
            (BAR_AT, BAR_AT + 4 * SIZE),
            (BAR_AT + 4 * SIZE, BAR_AT + 4 * SIZE + PAGE),
        ):
            bar.move(here)
            assert lab.device_reads(here, 10) == b"the device"
            if there + SIZE <= here:
                assert lab.device_reads(there, 10) is None


def test_what_a_device_may_only_read_it_cannot_write(lab, manager, memory):
    ram = manager.new_region("ram", 0, 16 * PAGE)
    ram.add_mapping(0, 16 * PAGE, memory)
    ram.map()
    bytes_of(memory).write(0, b"original")
    with manager.add_target(lab.target):
        ram.map(writable=False)
        lab.device_writes(0, b"changed!")
        assert lab.device_reads(0, 8) == b"original"
        ram.map(writable=True)
        lab.device_writes(0, b"changed!")
        assert bytes_of(memory).read(0, 8) == b"changed!"


def test_a_rom_shadows_memory_and_goes_again(lab, manager, memory):
    ram = manager.new_region("ram", 0xC0000, 4 * PAGE, 0)
    rom = manager.new_region("rom", 0xC0000, 4 * PAGE, 1)
    for region, skip, text in ((ram, 0, b"memory"), (rom, 4 * PAGE, b"shadow")):
        region.add_mapping(PAGE, PAGE, memory, skip)
        bytes_of(memory).write(skip, text)
    ram.map()
    with manager.add_target(lab.target):
        assert lab.device_reads(0xC1000, 6) == b"memory"
        rom.map()
        assert lab.device_reads(0xC1000, 6) == b"shadow"
        rom.close()
        assert lab.device_reads(0xC1000, 6) == b"memory"


def test_a_registration_that_fails_leaves_the_kernel_empty(lab, manager, memory):
    """Memory below the window for interrupts is mapped, memory in it is refused: all goes."""
    ram = manager.new_region("ram", MSI - 2 * PAGE, 4 * PAGE)
    ram.add_mapping(0, PAGE, memory)
    ram.add_mapping(PAGE, PAGE, memory, PAGE)
    ram.add_mapping(2 * PAGE, PAGE, memory, 2 * PAGE)
    ram.map()
    room = lab.room()
    with pytest.raises(DmaError, match=r"0xfee00000.*EINVAL"):
        manager.add_target(lab.target)
    assert manager.targets == ()
    assert lab.room() == room
    bytes_of(memory).write(0, b"secret")
    assert lab.device_reads(MSI - 2 * PAGE, 6) is None
    # Nothing is left in the way.
    ram.remove_mappings(2 * PAGE, PAGE)
    with manager.add_target(lab.target):
        assert lab.device_reads(MSI - 2 * PAGE, 6) == b"secret"


def test_a_bar_that_cannot_be_mapped_costs_only_itself(lab, manager, memory):
    ram = manager.new_region("ram", 0, 16 * PAGE)
    ram.add_mapping(0, 16 * PAGE, memory)
    ram.map()
    bar = manager.new_region("bar", MSI, SIZE, kind=MappingType.DEVICE)
    bar.add_mapping(0, SIZE, lab.bar)
    bar.map()
    with manager.add_target(lab.target) as handle:
        (failed,) = handle.stats().failed
        assert failed.request.start == MSI
        assert [r.start for r in handle.diff().missing] == [MSI]
        bytes_of(memory).write(0, b"memory")
        assert lab.device_reads(0, 6) == b"memory"
        bar.move(BAR_AT)
        assert not handle.diff()
        bar.unmap()


def test_what_the_kernel_does_not_unmap_stays_in_memory(lab, manager):
    """A mapping is made without the manager, so that its unmapping would cut a mapping."""
    memory = Backing.memfd(4 * PAGE)
    ram = manager.new_region("ram", 0, 4 * PAGE)
    ram.add_mapping(0, PAGE, memory)
    ram.map()
    handle, steady = manager.add_target(lab.target), RecordingTarget()
    manager.add_target(steady)
    lab.target.kernel_unmap(0, PAGE)
    lab.target.kernel_map(0, 2 * PAGE, memory.host_address, True)
    with pytest.raises(DmaError, match="cut") as caught:
        ram.unmap()
    assert caught.value.operation == "unmap"
    assert str(handle.broken) == str(caught.value)
    assert steady.held == {}
    ram.close()
    with pytest.raises(BufferError):
        memory.close()
    bytes_of(memory).write(0, b"kept")
    assert lab.device_reads(0, 4) == b"kept"
    lab.target.kernel_unmap(0, 2 * PAGE)
    lab.target.kernel_map(0, PAGE, memory.host_address, True)
    assert not handle.retry()
    memory.close()
    assert lab.device_reads(0, 4) is None


def test_memory_without_a_file(lab, manager):
    with Backing.anonymous(2 * PAGE) as memory:
        ram = manager.new_region("ram", 0, 2 * PAGE)
        ram.add_mapping(0, 2 * PAGE, memory)
        ram.map()
        with manager.add_target(lab.target):
            lab.device_writes(PAGE, b"anonymous")
            assert bytes_of(memory).read(PAGE, 9) == b"anonymous"
        ram.close()


def test_a_file_open_for_reading_only_is_not_written(lab, memory):
    """The kernel would let the device write through an iommufd; see the limits in the docs."""
    fd = os.open(f"/proc/self/fd/{memory.fd}", os.O_RDONLY)
    request = DmaMapRequest(0, PAGE, fd=fd, host_address=None)
    with pytest.raises(DmaError):
        lab.target.map_dma(request)
    os.close(fd)
    bytes_of(memory).write(0, b"secret")
    assert lab.device_reads(0, 6) is None
