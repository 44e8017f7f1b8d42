"""Every shipped device on a transport of its own in the tests: no device knows what carries it."""

from __future__ import annotations

import gc
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from guestio import virtio
from guestio.errors import GuestioError
from guestio.guest.dma import IommuMode
from guestio.iommu import Iotlb
from guestio.memory import GuestRegionCollection
from guestio.testing import BlkError, Driver, ScriptedGuest
from guestio.vhost_user.frontend import FrontendQueue
from guestio.vhost_user.messages import ProtocolFeature
from guestio.virtio import (
    BlockDevice,
    Chain,
    ConsoleDevice,
    Device,
    DeviceHost,
    DeviceId,
    EntropyDevice,
    InputDevice,
    NetDevice,
)
from guestio.virtio.host import Transport
from guestio.virtio.iommu import VirtioIommu
from guestio.virtio.layout import RingLayout
from guestio.virtio.translator import Translator
from tests.kit.in_process import PAGE, PLATFORM, InProcess, Tables
from tests.kit.iommu_driver import attach, map_, unmap
from tests.kit.net_driver import Mirror, frame
from tests.kit.serving import WAIT, nothing_left, until
from tests.kit.virtio_pci import PciPlug

MODES: list[IommuMode] = ["off", "static", "strict"]


class Plug:
    """The driver's end of the transport, as the drivers of the test kit expect one."""

    protocol_features = ProtocolFeature.STATUS
    failure = None

    def __init__(self, device: Device, *, queue_threads: bool = False) -> None:
        self.features = self.config_changes = 0
        self._changed = threading.Condition()
        self._never = os.eventfd(0)
        self.wire = InProcess(device, self._note_change, queue_threads=queue_threads)
        self.offered = self.wire.offered
        self.iotlb = Pages(self.wire.iommu)
        self.set_memory = self.wire.set_memory
        self.set_status = self.wire.set_status
        self._queues: dict[int, FrontendQueue] = {}

    def _note_change(self) -> None:
        with self._changed:
            self.config_changes += 1
            self._changed.notify_all()

    @property
    def iommu(self) -> bool:
        return bool(self.features & PLATFORM)

    def negotiate(self, wanted: int) -> None:
        self.set_features(self.offered & wanted)

    def set_features(self, features: int) -> None:
        self.wire.set_features(features)
        self.features = features

    def start_queue(self, index: int, layout: RingLayout, *, base: int = 0) -> FrontendQueue:
        queue = self._queues[index] = FrontendQueue(index, kick=True, call=True)
        assert queue.kick_fd is not None
        assert queue.call_fd is not None
        assert queue.err_fd is not None
        self.wire.start(index, layout, base, queue.kick_fd, queue.call_fd, queue.err_fd)
        return queue

    def stop_queue(self, index: int) -> int:
        base = self.wire.stop(index)
        self._queues.pop(index).close()
        return base

    def queue_count(self) -> int:
        return len(self.wire.host.queues)

    def get_config(self, offset: int, size: int) -> bytes:
        return self.wire.call(lambda: self.wire.host.read_config(offset, size))

    def set_config(self, offset: int, data: bytes) -> None:
        self.wire.call(lambda: self.wire.host.write_config(offset, data))

    def wait_config_change(self, timeout: float, *, seen: int = 0) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.config_changes != seen, timeout)

    def fileno(self) -> int:
        return self._never

    def close(self) -> None:
        self.wire.close()
        while self._queues:
            self._queues.popitem()[1].close()
        if self._never >= 0:
            os.close(self._never)
            self._never = -1


class Pages:
    """The IOMMU as the drivers of the test kit use it."""

    answer = "thread"
    memory: GuestRegionCollection | None = None

    def __init__(self, tables: Tables) -> None:
        self.mappings: Iotlb = tables.mappings
        self.map, self.unmap = tables.map, tables.unmap

    def push(self, iova: int) -> None:
        """Have the device ask."""


def plugged(device: Device, wire: str, **options: Any) -> Any:
    if wire == "pci":
        return PciPlug(device, **options)
    return Plug(device, queue_threads=wire == "queue threads", **options)


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=["one thread", "queue threads", "pci"])
def wire(request: pytest.FixtureRequest) -> Any:
    """What is between driver and device."""
    return request.param


@contextmanager
def driven(device: Device, mode: IommuMode, wire: str, **options: Any) -> Iterator[Driver]:
    """A driver of a device, of which nothing is left but the device, whatever happens."""
    with (
        closing(device),
        nothing_left(),
        Driver(plugged(device, wire), iommu=mode, **options) as driver,
    ):
        yield driver


def test_every_shipped_device_is_here() -> None:
    shipped = {
        name
        for name in virtio.__all__
        if name.endswith("Device") and issubclass(getattr(virtio, name), Device)
    }
    assert shipped == {
        "BlockDevice",
        "ConsoleDevice",
        "Device",
        "EntropyDevice",
        "InputDevice",
        "NetDevice",
    }


def test_its_parts_are_what_a_host_asks_for() -> None:
    device = EntropyDevice()
    wire = InProcess(device, lambda: None)
    transport: Transport = wire
    translator: Translator = wire.iommu
    assert transport.tracked is False
    assert translator.feed is None
    wire.close()
    device.close()


def test_a_disk(mode: IommuMode, wire: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(1 << 20))
    with (
        nothing_left(),
        closing(BlockDevice(image, num_queues=2)) as device,
        ScriptedGuest(plugged(device, wire), iommu=mode, queues=2, memory_size=1 << 20) as guest,
    ):
        for queue in (0, 1):
            guest.write(8, b"x" * 69632, queue=queue)
            assert guest.read(8, 69632, queue=queue) == b"x" * 69632
        guest.flush()
        if wire != "pci":
            guest.pause()
            guest.resume()
        assert guest.get_id() == b"image"
        with pytest.raises(BlkError):
            guest.read(1 << 20, 512)
        guest.boot(iommu=mode, queues=1)
        assert guest.read(0, 512) == image.read_bytes()[:512]
        for _ in range(60):
            requests = [guest.submit_read(8 * each, 4096) for each in range(16)]
            guest.wait(*requests)
            assert all(each.check().done for each in requests)
        os.truncate(image, 2 << 20)
        device.update_size()
        assert guest.frontend.wait_config_change(WAIT)


def test_random_bytes(mode: IommuMode, wire: str, tmp_path: Path) -> None:
    source = tmp_path / "bytes"
    source.write_bytes(bytes(range(1, 101)))
    with driven(EntropyDevice(source), mode, wire) as driver:
        assert driver.request(b"", 10) == bytes(range(1, 11))
        assert driver.request(b"", 90) == bytes(range(11, 101))
        driver.reset()
        assert driver.request(b"", 2) == b"\1\2"


def test_a_console(mode: IommuMode, wire: str) -> None:
    device = ConsoleDevice(size=(80, 24))
    output: list[bytes] = []
    device.ports[0].on_output(output.append)
    with driven(device, mode, wire) as driver:
        for number in range(3):
            driver.post(64)
            until(lambda number=number: device.ports[0].send(b"in %d" % number) > 0)
            assert driver.receive().data == b"in %d" % number
            driver.wait(driver.send(b"out %d" % number, 1))
            until(lambda number=number: b"".join(output).endswith(b"out %d" % number))
            if wire != "pci":
                # There is no stop from which a queue goes on.
                driver.pause()
                driver.resume()
        device.resize(132, 50)
        driver.wait_config_change()
        assert driver.config(0, 4) == struct.pack("<HH", 132, 50)


def test_a_network_card(mode: IommuMode, wire: str) -> None:
    device = NetDevice(Mirror(), mac="52:54:00:12:34:56")
    with driven(device, mode, wire) as driver:
        assert driver.config(0, 6) == device.mac
        for number in range(20):
            driver.post(2048)
            driver.wait(driver.send(bytes(12) + frame(100 + number), 1))
            got = driver.receive().data
            assert got[12 + 12 :] == frame(100 + number)[12:]
            assert got[12:24] == frame()[6:12] + frame()[:6]
        assert driver.request(struct.pack("<BBB", 0, 0, 1), 1, queue=2) == b"\0"
        device.link = False
        driver.wait_config_change()


def test_a_keyboard(mode: IommuMode, wire: str) -> None:
    device = InputDevice.keyboard()
    with driven(device, mode, wire) as driver:
        for _ in range(8):
            driver.post(8)
        until(lambda: device.tap("KEY_A"))
        events = [struct.unpack("<HHi", driver.receive().data) for _ in range(4)]
        assert events == [(1, 30, 1), (0, 0, 0), (1, 30, 0), (0, 0, 0)]
        driver.wait(driver.send(struct.pack("<HHi", 0x11, 1, 1), 1))
        until(lambda: device.leds["LED_CAPSL"])
        driver.write_config(0, bytes([1, 0]))
        assert driver.config(8, 17) == b"guestio keyboard\0"


def test_a_virtio_iommu(mode: IommuMode, wire: str) -> None:
    """It is a device like any other, and may sit behind an IOMMU itself."""
    device = VirtioIommu(endpoints=[8])
    with driven(device, mode, wire) as driver:
        for _ in range(4):
            driver.post(24, queue=1)
        assert driver.request(attach(8, 1), 4)[0] == 0
        assert driver.request(map_(1, 0x1000, 0x1FFF, 0x5000), 4)[0] == 0
        assert driver.request(attach(9, 1), 4)[0] != 0
        driver.memory.write(0x5000, b"behind it")
        memory = device.endpoint(8).memory(driver.memory)
        assert memory.read(0x1000, 9) == b"behind it"
        with pytest.raises(GuestioError) as caught:
            memory.read(0x9000, 1)
        del memory, caught
        fault = driver.receive(1).data
        assert struct.unpack_from("<Q", fault, 16)[0] == 0x9000
        assert driver.request(unmap(1, 0x1000, 0x1FFF), 4)[0] == 0
    gc.collect()


class Owner(Device):
    """Holds what it is given."""

    device_id = DeviceId.CONSOLE
    device_queues = (0,)

    def attached(self, host: DeviceHost) -> None:
        self.queue = host.queue(0)

    def taken(self) -> Chain:
        found: list[Chain | None] = [None]

        def look() -> bool:
            found[0] = self.queue.take()
            return found[0] is not None

        until(look)
        assert found[0] is not None
        return found[0]


class TestRevocation:
    def test_buffers_that_wait_delay_nothing(self, wire: str) -> None:
        device = Owner()
        with driven(device, "off", wire) as driver:
            driver._options["iommu"] = "strict"
            driver.reset()
            iommu = driver.frontend.wire.iommu  # type: ignore[attr-defined]
            for _ in range(64):
                driver.post(100)
            until(lambda: device.queue.send(b"first"))
            assert driver.receive().data == b"first"
            told = iommu.asked
            mapped = [each for each, _, _ in iommu.mappings if each.length == PAGE]
            began = time.monotonic()
            iommu.unmap(*((each.base, PAGE) for each in mapped[:8]))
            assert time.monotonic() - began < WAIT / 3
            assert iommu.asked == told

    def test_what_is_held_is_given_up_after_a_while(self, wire: str) -> None:
        device = Owner()
        with driven(device, "strict", wire) as driver:
            iommu = driver.frontend.wire.iommu  # type: ignore[attr-defined]
            buffer = driver.post(100)
            chain = device.taken()
            (place,) = chain.writable.fragments()
            assert buffer.placement is not None
            iommu.unmap(*buffer.placement.mapped)
            assert chain.writable.total == 0
            assert place
            assert device.queue.complete(chain, 0) is False
            assert driver.receive().written == 0

    def test_a_page_that_is_not_mapped(self, wire: str) -> None:
        device = Owner()
        with driven(device, "strict", wire) as driver:
            iommu = driver.frontend.wire.iommu  # type: ignore[attr-defined]
            lost, fine = driver.post(100, publish=False), driver.post(100, publish=False)
            assert lost.placement is not None
            iommu.unmap(*lost.placement.mapped)
            driver.publish()
            until(lambda: device.queue.send(b"fine"))
            assert driver.receive() is lost
            assert lost.written == 0
            assert driver.receive() is fine
            assert fine.data == b"fine"
