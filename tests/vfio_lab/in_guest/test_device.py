"""An assigned device in Python's hands: configuration, regions, interrupts, reset, closing."""

import os
import select

import pytest

from guestio import Backing, BackingError, DeviceError
from guestio.dma import INTX, MSI, MSIX, DmaMapRequest, VfioType1Target
from tests.vfio_lab.in_guest.conftest import Lab

IDENTIFICATION, LIVENESS, FACTORIAL, STATUS = 0x00, 0x04, 0x08, 0x20
IRQ_STATUS, IRQ_RAISE, IRQ_ACKNOWLEDGE = 0x24, 0x60, 0x64


def signalled(eventfd: int) -> bool:
    ready, _, _ = select.select([eventfd], [], [], 5)
    return bool(ready) and os.eventfd_read(eventfd) == 1


def test_configuration_space(lab: Lab):
    device = lab.edu_device
    assert device.config.load(0, 4) == 0x11E81234
    assert device.config.size == 256
    for attribute in ("bus_master", "memory_space"):
        for on in (False, True):
            setattr(device, attribute, on)
            assert getattr(device, attribute) is on


def test_registers(lab: Lab):
    registers = lab.edu_device.bar(0)
    assert registers.load(IDENTIFICATION, 4) == 0x010000ED
    registers.store(LIVENESS, 0x12345678, 4)
    assert registers.load(LIVENESS, 4) == 0xEDCBA987
    registers.store(FACTORIAL, 5, 4)
    while registers.load(STATUS, 4) & 1:
        pass
    assert registers.load(FACTORIAL, 4) == 120
    for offset, length in ((registers.size, 1), (registers.size - 2, 4), (2**64 - 4, 8)):
        with pytest.raises(ValueError):
            registers.read(offset, length)


def test_regions(lab: Lab):
    assert [lab.other.bar(n).size for n in range(6)] == [256, 0, 1 << 20, 0, 0, 0]
    # Less than a page cannot be mapped: the rest of the page may be another device's.
    assert lab.other.bar(0).areas == ()
    with pytest.raises(ValueError, match="0 areas"):
        lab.other.bar(0).backing()
    (area,) = lab.other.bar(2).areas
    assert (area.offset, area.size) == (0, 1 << 20)
    assert lab.other.rom.size == 0
    with pytest.raises(ValueError):
        lab.other.bar(6)


def test_read_only_view_of_a_bar(lab: Lab):
    with lab.other.bar(2).backing(writable=False) as view:
        assert not view.writable


@pytest.mark.parametrize("kind", [INTX, MSI])
def test_interrupts(lab: Lab, kind: int):
    device, registers = lab.edu_device, lab.edu_device.bar(0)
    info = device.interrupts(kind)
    assert (info.vectors, info.eventfd, info.automasked) == (1, True, kind == INTX)
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    device.enable_interrupts(kind, [eventfd])
    for value in (1, 2):
        registers.store(IRQ_RAISE, value, 4)
        assert signalled(eventfd)
        assert registers.load(IRQ_STATUS, 4) == value
        registers.store(IRQ_ACKNOWLEDGE, value, 4)
        if info.automasked:
            device.unmask_interrupt(kind)
    device.disable_interrupts(kind)
    registers.store(IRQ_RAISE, 4, 4)
    assert not select.select([eventfd], [], [], 0.1)[0]
    registers.store(IRQ_ACKNOWLEDGE, 4, 4)
    os.close(eventfd)


def test_interrupts_that_are_not_there(lab: Lab):
    assert lab.edu_device.interrupts(MSIX).vectors == 0
    with pytest.raises(DeviceError):
        lab.edu_device.enable_interrupts(MSIX, [0])
    with pytest.raises(DeviceError):
        lab.edu_device.interrupts(99)


def test_reset(lab: Lab):
    device = lab.edu_device
    device.memory_space = True
    if not device.can_reset:
        with pytest.raises(DeviceError, match="no reset"):
            device.reset()
        return
    device.bus_master = True
    device.reset()
    assert not device.bus_master


def test_closing(lab: Lab):
    device = lab.edu_device
    device.close()
    device.close()
    assert device.closed
    with pytest.raises(ValueError, match="is closed"):
        device.bar(0).read(0, 4)
    lab.edu_device = lab.target.open_device(device.address)
    assert lab.edu_device.config.load(0, 4) == 0x11E81234


def test_devices_that_cannot_be_opened(lab: Lab):
    with pytest.raises(DeviceError, match="there is no PCI device"):
        lab.target.open_device("0000:99:00.0")
    with pytest.raises(DeviceError, match="there is no PCI device"):
        lab.target.open_device("../../etc")
    with pytest.raises(DeviceError, match="driver_override"):
        lab.target.open_device("0000:00:1f.2")


def test_a_container_without_devices_says_so():
    with VfioType1Target() as target, pytest.raises(DeviceError, match="open a device"):
        target.map_dma(DmaMapRequest(0, 4096, host_address=4096))


def test_memory_that_cannot_be_mapped(lab: Lab):
    with pytest.raises(BackingError):
        Backing.from_fd(lab.edu_device.fileno(), 4096, lab.edu_device.config.offset)
