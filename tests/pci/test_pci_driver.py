"""The driver of PCI functions that users test their devices with, against real servers."""

from __future__ import annotations

import errno
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from guestio.addr import Permissions
from guestio.dma import ERR, INTX, MSI, MSIX, DmaError
from guestio.errors import AccessError, DeviceError
from guestio.pci import Bar, Msi, MsiX, PciDevice, PciExpress, PciHost, SerialNumber
from guestio.testing import Driver, PciDriver, serving
from guestio.vfio_user import ServerGoneError
from guestio.vfio_user.messages import Command
from guestio.vhost_user.frontend import NoAnswerError
from guestio.virtio import Chain, Device, DeviceId
from tests.kit.serving import nothing_left, until
from tests.kit.vfio_server import Answer, Answering, Asked, HandServer, region_info, usual

PAGE = 4096
ADDRESS, LENGTH, RUN, FIRE = 0, 8, 12, 16


class Copier(PciDevice):
    """Turns bytes of memory round where its driver says, and interrupts when it is told to."""

    vendor_id, device_id = 0x1234, 0x0C0D
    bars = {0: Bar(PAGE, width=8), 2: Bar(64)}  # noqa: RUF012 - never changed
    interrupts = 3
    capabilities = (PciExpress(), MsiX(3), Msi(2), SerialNumber(7))

    def __init__(self) -> None:
        self.host: PciHost
        self.registers: dict[int, int] = {}
        self.fragments: list[int] = []
        self.error = ""
        self.resets = 0
        self.held: Any = None

    def attached(self, host: PciHost) -> None:
        self.host = host

    def reset(self) -> None:
        self.resets += 1
        self.registers.clear()

    def read(self, bar: int, offset: int, size: int) -> int:
        return self.registers.get(offset, 0)

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.registers[offset] = value
        if offset == FIRE:
            self.host.interrupt(value)
        elif offset == RUN:
            at, length = self.registers[ADDRESS], self.registers[LENGTH]
            self.error = ""
            try:
                with self.host.memory.gather(at, length, Permissions.READ) as found:
                    self.fragments = [size for _, size in found.fragments()]
                self.host.memory.write(at, bytes(self.host.memory.read(at, length))[::-1])
            except AccessError as error:
                self.error = str(error)
            self.registers[RUN] = 0


def turn_round(driver: PciDriver, iova: int, length: int) -> None:
    """Have the device do it; what it did can be seen when this returns."""
    driver.bar(0).store(ADDRESS, iova, 8)
    driver.bar(0).store(LENGTH, length, 4)
    driver.bar(0).store(RUN, 1, 4)
    until(lambda: not driver.bar(0).load(RUN, 4))


@pytest.fixture
def device() -> Copier:
    return Copier()


@pytest.fixture
def driver(device: Copier) -> Iterator[PciDriver]:
    with nothing_left(), serving(device) as path, PciDriver(path, timeout=20) as made:
        yield made


class Echo(Device):
    device_id = DeviceId.ENTROPY

    def process(self, queue: int, chain: Chain) -> int:
        chain.writable.write(b"echo")
        return 4


def test_what_is_served_says_how() -> None:
    with serving(Echo()) as path, Driver(path) as virtio:
        assert virtio.request(b"", 4) == b"echo"
    with serving(Echo(), transport="vfio-user") as path, PciDriver(path) as pci:
        assert pci.config.load(0, 2) == 0x1AF4
        assert pci.bus_master
        assert pci.memory_space
    with pytest.raises(TypeError), serving(Copier):  # type: ignore[arg-type]  # a class
        pass
    with pytest.raises(TypeError, match="no poll"), serving(Copier(), poll=1):
        pass


def test_what_ends_a_server_is_told() -> None:
    class Ending(Copier):
        def write(self, bar: int, offset: int, size: int, value: int) -> None:
            raise SystemExit(3)

    with (
        pytest.raises(ServerGoneError) as told,
        serving(Ending()) as path,
        PciDriver(path) as driver,
    ):
        driver.bar(0).store(0, 1, 4)
        driver.bar(0).load(0, 4)
    assert isinstance(told.value.__cause__, SystemExit)


@pytest.mark.parametrize("share", [True, False])
def test_each_page_is_a_mapping_of_its_own(share: bool) -> None:
    device, data = Copier(), bytes(range(256)) * 40
    with nothing_left(), serving(device) as path, PciDriver(path, share=share) as driver:
        with driver.map(data, offset=0xFF8) as buffer:
            assert (buffer.iova % PAGE, buffer.size, buffer.data) == (0xFF8, len(data), data)
            assert repr(buffer) == f"<DmaBuffer of 10240 bytes at {buffer.iova:#x}: 4 mappings>"
            turn_round(driver, buffer.iova, len(data))
            assert buffer.data == data[::-1]
            buffer.write(b"xyz", 5)
            assert buffer.read(4, 5) == data[::-1][4:5] + b"xyz" + data[::-1][8:9]
            if share:
                # The device meets pieces, as pages are not in a row.
                assert device.fragments == [8, PAGE, PAGE, 10240 - 8 - 2 * PAGE]
        assert driver.served_requests == (0 if share else device_messages(data))
        with driver.map(data, contiguous=True) as buffer:
            turn_round(driver, buffer.iova, len(data))
            assert buffer.data == data[::-1]
            assert "1 mappings" in repr(buffer)
            assert len(device.fragments) == 1 or not share


def device_messages(data: bytes) -> int:
    """DMA_READ for the vector and for the data, DMA_WRITE of it, each in one message."""
    assert len(data) < 1 << 16
    return 3


def test_what_is_unmapped_is_out_of_reach(device: Copier, driver: PciDriver) -> None:
    buffer = driver.map(b"abcd" * 2048)
    turn_round(driver, buffer.iova, 8192)
    assert not device.error
    buffer.unmap()
    buffer.unmap()
    turn_round(driver, buffer.iova, 4)
    assert device.error
    # Neither is it written to; it can be read on.
    assert buffer.data == b"dcba" * 2048
    buffer.close()
    buffer.close()
    with pytest.raises(ValueError, match="closed"):
        buffer.data  # noqa: B018 - the access is what is tested
    # Behind a buffer nothing is mapped, nor before it.
    with driver.map(PAGE), driver.map(PAGE) as middle, driver.map(PAGE):
        for at, length in ((middle.iova, PAGE + 1), (middle.iova - 1, 2)):
            turn_round(driver, at, length)
            assert device.error
            assert not any(middle.data)


def test_memory_that_the_device_may_only_read(device: Copier, driver: PciDriver) -> None:
    with driver.map(b"constant", writable=False) as buffer:
        turn_round(driver, buffer.iova, 8)
        assert device.fragments == [8]
        assert "WRITE" in device.error
        assert buffer.data == b"constant"


def test_an_unmap_waits_for_the_device(device: Copier, driver: PciDriver) -> None:
    buffer = driver.map(PAGE)
    device.held = device.host.memory.gather(buffer.iova, PAGE, Permissions.READ_WRITE)
    gone = threading.Timer(0.2, device.held.close)
    begun = time.monotonic()
    gone.start()
    buffer.unmap()
    assert time.monotonic() - begun > 0.1
    gone.join()


def test_places_of_mappings(device: Copier, driver: PciDriver) -> None:
    last = 2**64 - PAGE
    with driver.map(b"last", iova=last, offset=PAGE - 4) as buffer:
        turn_round(driver, last + PAGE - 4, 4)
        assert buffer.data == b"tsal"
        free = driver._pages.free
        for _ in range(3):
            with pytest.raises(DmaError) as refused:
                driver.map(2 * PAGE, iova=last - PAGE)
            assert refused.value.errno == errno.EEXIST
        # What was mapped of it is mapped no more, and its pages can be had again.
        assert driver._pages.free == free
        driver.map(PAGE, iova=last - PAGE).close()
    for arguments in ({"iova": 8}, {"offset": PAGE}, {"offset": -1}, {"iova": 2**64}):
        with pytest.raises(ValueError, match=r"0x8|offset|leaves|2\*\*64|address"):
            driver.map(1, **arguments)
    with pytest.raises(ValueError, match="a byte at least"):
        driver.map(0)
    with pytest.raises(TypeError):
        driver.map("text")  # type: ignore[arg-type]  # what is tested
    assert driver._pages.free == free + 1
    with pytest.raises(DeviceError, match="out of memory"):
        driver.map(17 << 20)


def test_addresses_are_used_again_or_not() -> None:
    for reuse in (True, False):
        with serving(Copier()) as path, PciDriver(path, reuse_iovas=reuse) as driver:
            with driver.map(10) as first:
                pass
            with driver.map(10) as second:
                pass
            assert (first.iova == second.iova) is reuse


def test_interrupts_by_msix(driver: PciDriver) -> None:
    fire = driver.bar(0)
    with pytest.raises(DeviceError, match=r"are off: call start_interrupts\(\)"):
        driver.wait_interrupt()
    driver.start_interrupts()
    control = driver.capability(0x11) + 2
    assert driver.config.load(control, 2) & 0x8000
    assert driver.config.load(4, 2) & 0x400, "the pin is off"
    for vector in (2, 0, 2):
        fire.store(FIRE, vector, 4)
    # Stores are posted: once a load is answered, all before it have been obeyed.
    fire.load(LENGTH, 4)
    assert driver.wait_interrupt(2) == 2
    assert driver.wait_interrupt(0) == 1
    assert [driver.poll_interrupt(vector) for vector in range(3)] == [0, 0, 0]
    with pytest.raises(NoAnswerError, match=r"interrupt 1 of .* within 0.01 s$"):
        driver.wait_interrupt(1, timeout=0.01)
    with pytest.raises(DeviceError, match=r"3 interrupts .* are on, not 3"):
        driver.wait_interrupt(3)
    driver.bus_master = False
    fire.store(FIRE, 1, 4)
    fire.load(LENGTH, 4)
    with pytest.raises(NoAnswerError, match=r"not bus master; call enable\(\)"):
        driver.wait_interrupt(1, timeout=0.01)
    driver.enable()
    assert driver.wait_interrupt(1) == 1, "it was pending"
    driver.stop_interrupts()
    driver.stop_interrupts()
    assert not driver.config.load(control, 2) & 0x8000
    assert not driver.config.load(4, 2) & 0x400
    driver.start_interrupts(vectors=1)
    with pytest.raises(DeviceError, match="1 interrupts"):
        driver.poll_interrupt(1)


def test_interrupts_by_msi_and_by_the_pin(device: Copier, driver: PciDriver) -> None:
    fire = driver.bar(0)
    driver.start_interrupts(MSI)
    control = driver.capability(5) + 2
    assert driver.config.load(control, 2) & 0x71 == 0x11
    # There are fewer messages than vectors: they are shared.
    for vector in (0, 1, 2):
        fire.store(FIRE, vector, 4)
    fire.load(LENGTH, 4)
    assert (driver.wait_interrupt(0), driver.wait_interrupt(1)) == (2, 1)
    for bad in (ERR, 77):
        with pytest.raises(ValueError, match="of kind MSIX, MSI or INTX"):
            driver.start_interrupts(bad)
    with pytest.raises(ValueError, match="4 interrupts of kind MSI, of 2"):
        driver.start_interrupts(MSI, 4)
    # What is refused changes nothing; another kind takes its place.
    fire.store(FIRE, 0, 4)
    assert driver.wait_interrupt() == 1
    driver.start_interrupts(INTX)
    assert not driver.config.load(control, 2) & 1
    fire.store(FIRE, 2, 4)
    assert driver.wait_interrupt() == 1
    # It is masked until the next one is looked for; a level that is still there comes again.
    device.host.set_pin(True)
    assert [driver.wait_interrupt() for _ in range(3)] == [1, 1, 1]
    device.host.set_pin(False)
    driver.poll_interrupt()
    assert driver.poll_interrupt() == 0


def test_a_virtio_function_uses_msix_when_it_is_told_so() -> None:
    with serving(Echo(), transport="vfio-user") as path, PciDriver(path) as driver:
        driver.start_interrupts()
        assert len(driver._interrupt_events) == driver.interrupts(MSIX).vectors == 2


def test_resets(device: Copier, driver: PciDriver) -> None:
    buffer = driver.map(b"stay")
    control = driver.capability(0x11) + 2
    for reset in (driver.reset, driver.function_level_reset):
        driver.start_interrupts()
        driver.bar(0).store(LENGTH, 9, 4)
        before = device.resets
        reset()
        assert device.resets == before + 1
        assert not driver.bus_master
        assert not driver.memory_space
        assert driver.bar(0).load(LENGTH, 4) == 0
        assert not driver.config.load(control, 2) & 0x8000
        with pytest.raises(DeviceError, match="are off"):
            driver.poll_interrupt()
        turn_round(driver, buffer.iova, 4)
        assert device.error, "it is no bus master"
        driver.enable()
        turn_round(driver, buffer.iova, 4)
        assert not device.error, "mappings stay"
    assert buffer.data == b"stay"


def test_capabilities(driver: PciDriver) -> None:
    assert [number for number, _ in driver.capabilities()] == [0x10, 0x11, 5]
    assert driver.capabilities(extended=True) == [(3, 0x100)]
    serial = driver.capability(3, extended=True)
    assert driver.config.load(serial + 4, 8) == 7
    for missing in (1, 3):
        with pytest.raises(DeviceError, match=f"no capability {missing:#x}"):
            driver.capability(missing)


def test_a_function_without_any() -> None:
    class Plain(PciDevice):
        vendor_id, device_id = 1, 2

    with serving(Plain()) as path, PciDriver(path, enable=False) as driver:
        assert not driver.bus_master
        assert driver.capabilities() == driver.capabilities(extended=True) == []
        with pytest.raises(DeviceError, match="no capability 0x10"):
            driver.function_level_reset()
        with pytest.raises(DeviceError, match="no interrupts of kind MSI-X"):
            driver.start_interrupts()

    class Express(Plain):
        capabilities = (PciExpress(),)

    with serving(Express()) as path, PciDriver(path) as driver:
        assert driver.capabilities(extended=True) == []
        driver.function_level_reset()


def with_capabilities(following: int) -> dict[int, Answering]:
    """A server's answers: a capability at 0x40, one of MSI-X at 0x50, and what follows that."""

    def config(_: HandServer, asked: Asked) -> Answer | bytes:
        offset, _, count = struct.unpack("<QII", asked.payload[:16])
        bytes_at = {0x34: 0x40, 0x40: 9, 0x41: 0x50, 0x50: 0x11, 0x51: following}
        return asked.payload + bytes(bytes_at.get(at, 0) for at in range(offset, offset + count))

    def regions(server: HandServer, asked: Asked) -> Answer | bytes:
        (index,) = struct.unpack_from("<I", asked.payload, 8)
        return region_info(index, PAGE) if index == 7 else usual(server, asked)

    return {Command.REGION_READ: config, Command.DEVICE_GET_REGION_INFO: regions}


def test_capabilities_in_a_circle() -> None:
    with HandServer(with_capabilities(0x40)) as server, PciDriver(server.other) as driver:
        with pytest.raises(DeviceError, match="0x40 is linked twice"):
            driver.capabilities()
        assert driver.capabilities(extended=True) == []


def test_a_server_that_is_gone_ends_each_wait() -> None:
    with nothing_left():
        with HandServer(with_capabilities(0)) as server, PciDriver(server.other) as driver:
            driver.start_interrupts(vectors=1)
            buffer = driver.map(b"kept")
            gone = threading.Timer(0.1, server.hang_up)
            gone.start()
            with pytest.raises(ServerGoneError, match="closed the connection"):
                driver.wait_interrupt(timeout=20)
            gone.join()
            assert isinstance(driver.failure, ServerGoneError)
            buffer.unmap()
        assert buffer.data == b"kept"
        buffer.close()
        for call in (driver.wait_interrupt, lambda: driver.map(1), driver.enable):
            with pytest.raises(ValueError, match="closed"):
                call()
        driver.close()


def test_a_driver_that_cannot_begin_leaves_nothing() -> None:
    def refuse(*_: object) -> Answer:
        return Answer(b"", errno.EIO)

    with (
        nothing_left(),
        HandServer({Command.REGION_WRITE: refuse}) as server,
        pytest.raises(DeviceError, match="cannot write"),
    ):
        PciDriver(server.other)
    with nothing_left(), pytest.raises(DeviceError, match="no vfio-user server"):
        PciDriver("/nowhere/device.sock")
    with pytest.raises(ValueError, match="memory_size 5"):
        PciDriver("/nowhere/device.sock", memory_size=5)


def test_interrupts_that_are_refused_leave_nothing() -> None:
    def refuse(server: HandServer, asked: Asked) -> Answer | bytes:
        disables = asked.command == Command.DEVICE_SET_IRQS and asked.payload[4] & 1
        return usual(server, asked) if disables else Answer(b"", errno.EBUSY)

    with (
        nothing_left(),
        HandServer(with_capabilities(0)) as server,
        PciDriver(server.other) as driver,
    ):
        for command in (Command.DEVICE_SET_IRQS, Command.REGION_WRITE):
            usually = server.special.get(command, usual)
            server.special[command] = refuse
            with pytest.raises(DeviceError, match="busy"):
                driver.start_interrupts()
            with pytest.raises(DeviceError, match="are off"):
                driver.poll_interrupt()
            assert not driver._interrupt_events
            server.special[command] = usually
        driver.start_interrupts()
