"""A virtio device as a PCI function: its registers, its lives, and drivers that do as they like.

That every shipped device works so is tested in tests/virtio/test_any_transport.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from guestio.budgets import BUS_PATIENCE
from guestio.guest.dma import IommuMode
from guestio.pci import VirtioPci
from guestio.testing import Driver
from guestio.vfio_user.messages import IrqSet
from guestio.virtio import BlockDevice, Chain, Device, DeviceId, EntropyDevice
from guestio.virtio.device import Status
from guestio.virtio.layout import RingLayout
from tests.kit.serving import WAIT, until
from tests.kit.vfio_client import PAGE, Client, ServingPci, memory_file
from tests.kit.virtio_pci import (
    COMMON,
    CONFIG_REGION,
    DEVICE,
    ISR,
    MSIX,
    NO_VECTOR,
    NOTIFY,
    READY,
    WINDOW,
    PciPlug,
    Transport,
)

VERSION_1 = 1 << 32
BASE = 0x7000_0000
INTX = 0


class Toy(Device):
    """Answers a request with its bytes, backwards; or later, or never."""

    device_id = DeviceId.CONSOLE
    num_queues = 3
    features = 1 << 3 | 1 << 40 - 32

    def __init__(self) -> None:
        self.content = bytearray(b"configuration!!!")
        self.resets = 0
        self.told: list[int] = []
        self.later: Future[int] | None = None
        self.held: list[Chain] = []
        self.host: Any = None

    def attached(self, host: Any) -> None:
        self.host = host

    def config(self) -> bytes:
        return bytes(self.content)

    def write_config(self, offset: int, data: bytes) -> None:
        if offset + len(data) > 8:
            super().write_config(offset, data)
        self.content[offset : offset + len(data)] = data

    def negotiated(self, features: int) -> None:
        self.told.append(features)

    def process(self, queue: int, chain: Chain) -> int | Future[int]:
        if self.later is not None:
            self.held.append(chain)
            return self.later
        data = chain.readable.read(0, chain.readable.total)[::-1]
        chain.writable.write(data)
        return len(data)

    def reset(self) -> None:
        self.resets += 1


class Served:
    """A function that is served, and its registers."""

    def __init__(self, device: Device, path: Path, **options: Any) -> None:
        self.device: Any = device
        self.function = VirtioPci(device, **options)
        self.serving = ServingPci(self.function, path, revoke_after=0.3)
        self.client: Client
        self.transport: Transport

    def errors(self) -> int:
        # Writes are answered before they take effect, reads after.
        self.transport.get("status")
        return self.function.driver_errors


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Served]:
    served = Served(Toy(), tmp_path / "toy.sock")
    with served.serving, served.serving.connect() as served.client:
        served.client.begin()
        served.transport = Transport(served.client)
        yield served
        served.client.read(CONFIG_REGION, 0, 64)  # It still answers.
        assert served.serving.stats.failed_calls == 0
        assert served.serving.stats.protocol_errors == 0


@contextlib.contextmanager
def driven(device: Device, iommu: IommuMode = "off", **options: Any) -> Iterator[Driver]:
    with closing(device), Driver(PciPlug(device, **options), iommu=iommu, queues=1) as driver:  # type: ignore[arg-type]
        yield driver


def front(driver: Driver) -> Any:
    return driver.frontend


def registers(transport: Transport) -> bytes:
    """All registers of the common configuration, but for the generation."""
    found = bytearray(transport.peek(COMMON, 0, transport.parts[COMMON].length))
    found[0x15] = 0
    return bytes(found)


def test_what_it_is(toy: Served) -> None:
    t = toy.transport
    assert (t.config(0, 2), t.config(2, 2), t.config(8, 1)) == (0x1AF4, 0x1043, 1)
    assert t.config(8, 4) >> 8 == 0x078000
    assert set(t.parts) == {COMMON, NOTIFY, ISR, DEVICE, WINDOW}
    size = -toy.client.read(CONFIG_REGION, 0x10, 4)[0] or 0x4000
    assert {part.bar for kind, part in t.parts.items() if kind != WINDOW} == {0}
    spans = sorted((p.offset, p.offset + p.length) for k, p in t.parts.items() if k != WINDOW)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert spans[-1][1] <= size
    assert t.parts[DEVICE].length == 16
    assert t.get("num_queues") == 3
    assert t.multiplier == 4
    assert {t.get_of(queue, "notify_off") for queue in range(3)} == {0, 1, 2}
    assert t.config(t.capabilities[0x11] + 2, 2) == 3  # one vector more than queues
    assert t.offered & VERSION_1
    assert t.offered & 1 << 3


def test_a_device_without_configuration_says_so(tmp_path: Path) -> None:
    device = EntropyDevice()
    with (
        closing(device),
        ServingPci(VirtioPci(device), tmp_path / "rng.sock") as serving,
        serving.connect() as client,
    ):
        assert set(Transport(client.begin()).parts) == {COMMON, NOTIFY, ISR, WINDOW}


def test_common_registers_have_one_width(toy: Served) -> None:
    t = toy.transport
    before = registers(t)
    whole = [*Transport.REGISTERS.values(), *((at, 4) for at in range(0x20, 0x38, 4))]
    tried = 0
    for size in (1, 2, 4):
        for offset in range(0, 0x3C, size):
            if (offset, size) not in whole or offset in (0x04, 0x12, 0x15, 0x1E):
                t.poke(COMMON, offset, b"\x01" * size)
                tried += 1
    assert registers(t) == before
    assert toy.errors() == tried
    for size in (1, 2, 3, 4, 5, 8, 16):
        for offset in range(0x3C - size):
            if not offset <= 0x15 < offset + size:
                assert t.peek(COMMON, offset, size) == before[offset : offset + size]


def test_writes_where_nothing_is(toy: Served) -> None:
    t = toy.transport
    before, size = registers(t), 0x4000
    for offset in (0x3C, 0x800, 0xFFF, 0x1000, 0x1001, size - 4):
        assert toy.client.write(0, offset, b"\1") == 0
        assert toy.client.read(0, offset, 1) == b"\0"
    assert registers(t) == before
    assert toy.errors() == 6


def test_a_queue_that_there_is_not(toy: Served) -> None:
    t = toy.transport
    assert t.accept(VERSION_1)
    for index in (3, 255, 0xFFFF):
        for name in ("size", "enable", "desc", "avail", "used", "vector", "reset"):
            t.set_of(index, name, 1)
        assert t.get_of(index, "size") == 0
        assert t.get_of(index, "enable") == 0
        assert t.get_of(index, "vector") == NO_VECTOR
    assert all(t.get_of(queue, "size") == 256 for queue in range(3))
    assert not t.get("status") & Status.NEEDS_RESET


@pytest.mark.parametrize(
    ("size", "desc", "avail", "used"),
    [
        (0, BASE, BASE, BASE),
        (3, BASE, BASE, BASE),
        (512, BASE, BASE, BASE),
        (0xFFFF, BASE, BASE, BASE),
        (0x8000, BASE, BASE, BASE),
        (256, BASE + 8, BASE, BASE),
        (256, BASE, BASE + 1, BASE),
        (256, BASE, BASE, BASE + 2),
        (256, 2**64 - 16, BASE, BASE),
        (256, BASE, 2**64 - 16, BASE),
        (256, BASE, BASE, 2**64 - 16),
    ],
)
def test_a_queue_that_cannot_be(toy: Served, size: int, desc: int, avail: int, used: int) -> None:
    t = toy.transport
    events = t.enable_msix()
    assert t.accept(VERSION_1)
    t.set("config_vector", 0)
    t.set("select", 1)
    for name, value in (("size", size), ("desc", desc), ("avail", avail), ("used", used)):
        t.set(name, value)
    t.set("enable", 1)
    t.wait(lambda: t.get("status") & Status.NEEDS_RESET)
    assert t.get_of(1, "enable") == 0
    with pytest.raises(BlockingIOError):
        os.eventfd_read(events[0])
    t.set("status", READY | Status.DRIVER_OK)
    t.wait(lambda: readable(events[0]))
    t.notify(1)
    t.reset()
    assert t.get_of(1, "size") == 256
    for fd in events:
        os.close(fd)


def readable(event: int) -> bool:
    try:
        return bool(os.eventfd_read(event))
    except BlockingIOError:
        return False


def test_an_enabled_queue_stays_as_it_is(toy: Served) -> None:
    t = toy.transport
    assert t.accept(VERSION_1)
    layout = RingLayout.contiguous(BASE, 64)
    t.place(1, layout)
    t.place(1, RingLayout.contiguous(BASE + PAGE, 32))
    t.set("enable", 0)
    assert [t.get(name) for name in ("size", "desc", "avail", "used", "enable")] == [
        *(64, layout.desc, layout.avail, layout.used),
        1,
    ]
    assert toy.errors() == 8
    t.reset()
    assert [t.get_of(1, name) for name in ("size", "desc", "enable", "vector")] == [
        *(256, 0, 0, NO_VECTOR)
    ]


def test_features_that_are_refused(toy: Served) -> None:
    t = toy.transport
    assert not t.accept(0)
    assert not t.accept(VERSION_1 | 1 << 2)
    assert not t.accept(VERSION_1 | 1 << 63)
    t.reset()
    t.set("driver_half", 2)
    t.set("driver_features", 1)
    t.set("driver_half", 1)
    t.set("driver_features", 1)
    t.set("status", READY)
    assert t.get("status") == READY & ~Status.FEATURES_OK
    assert toy.device.told == []
    assert t.accept(VERSION_1 | 1 << 3)
    assert toy.device.told == [VERSION_1 | 1 << 3]
    t.set("driver_half", 0)
    t.set("driver_features", 0)
    assert t.get("driver_features") == 1 << 3
    for half in (2, 3, 2**32 - 1):
        t.set("feature_half", half)
        assert t.get("features") == 0


def test_a_device_that_refuses_features(toy: Served) -> None:
    def refuse(features: int) -> None:
        raise RuntimeError("a mistake")

    toy.device.negotiated = refuse
    assert not toy.transport.accept(VERSION_1)
    del toy.device.negotiated
    assert toy.transport.accept(VERSION_1)


def test_status_bits_stay_until_a_reset(toy: Served) -> None:
    t = toy.transport
    t.set("status", Status.ACKNOWLEDGE)
    t.set("status", Status.DRIVER | Status.DRIVER_OK | Status.NEEDS_RESET | 0x30)
    assert t.get("status") == Status.ACKNOWLEDGE | Status.DRIVER
    assert t.accept(VERSION_1)
    t.set("status", READY | Status.DRIVER_OK)
    t.set("status", Status.FAILED)
    assert t.get("status") == READY | Status.DRIVER_OK | Status.FAILED
    resets = toy.device.resets
    t.reset()
    assert toy.device.resets == resets + 1
    assert t.get("status") == 0


def test_vectors_that_there_are_not(toy: Served) -> None:
    t = toy.transport
    for value, shown in ((0, 0), (3, 3), (4, NO_VECTOR), (0xFFFE, NO_VECTOR)):
        t.set("config_vector", value)
        assert t.get("config_vector") == shown
        t.set_of(2, "vector", value)
        assert t.get_of(2, "vector") == shown


def test_notifications_of_queues_that_do_not_run(toy: Served) -> None:
    t = toy.transport
    part = t.parts[NOTIFY]
    for index in range(3):
        t.notify(index)
    assert toy.errors() == 3
    assert toy.client.write(0, part.offset + 4 * 3, b"\3\0") == 0
    assert toy.client.write(0, part.offset + 2, b"\3\0") == 0
    assert toy.errors() == 5
    assert toy.client.read(0, part.offset, 4) == bytes(4)


class TestWindow:
    """The capability by which BARs are accessed through the configuration space."""

    def aim(self, t: Transport, bar: int, offset: int, length: int) -> int:
        at = t.parts[WINDOW].at
        t.write_config(at + 4, 1, bar)
        t.write_config(at + 8, 4, offset)
        t.write_config(at + 12, 4, length)
        return at + 16

    def test_it_reaches_registers(self, toy: Served) -> None:
        t = toy.transport
        data = self.aim(t, 0, 0x12, 2)
        assert t.config(data, 2) == 3
        data = self.aim(t, 0, 0x16, 2)
        t.write_config(data, 2, 2)
        assert t.get("select") == 2
        data = self.aim(t, 0, t.parts[DEVICE].offset, 4)
        assert t.config(data, 4).to_bytes(4, "little") == b"conf"
        t.write_config(data, 4, int.from_bytes(b"CONF", "little"))
        assert toy.device.content[:5] == b"CONFi"

    @pytest.mark.parametrize(
        ("bar", "offset", "length"),
        [
            (0, 0x16, 0),
            (0, 0x16, 3),
            (0, 0x16, 8),
            (0, 0x16, 2**32 - 1),
            (0, 0x15, 2),
            (0, 0x4000, 1),
            (0, 2**32 - 4, 4),
            (5, 0x16, 2),
            (6, 0x16, 2),
            (255, 0x16, 2),
        ],
    )
    def test_what_leads_nowhere(self, toy: Served, bar: int, offset: int, length: int) -> None:
        t = toy.transport
        data = self.aim(t, bar, offset, length)
        before = registers(t)
        assert t.config(data, 4) == 2**32 - 1
        t.write_config(data, 4, 0x02020202)
        assert registers(t) == before

    def test_all_of_the_space_is_read_at_once(self, toy: Served) -> None:
        assert len(toy.client.read(CONFIG_REGION, 0, 4096)) == 4096
        assert toy.errors() == 0


class TestConfiguration:
    def test_it_is_read_and_written(self, toy: Served) -> None:
        t = toy.transport
        assert t.peek(DEVICE, 0, 16) == b"configuration!!!"
        assert t.peek(DEVICE, 5, 3) == b"gur"
        t.poke(DEVICE, 2, b"XY")
        assert t.peek(DEVICE, 0, 6) == b"coXYig"
        t.poke(DEVICE, 8, b"Z")
        assert t.peek(DEVICE, 8, 1) == b"a"
        assert toy.errors() == 1

    def test_a_change_is_another_generation(self, toy: Served) -> None:
        t = toy.transport
        first = t.get("generation")
        assert t.get("generation") == first
        assert t.peek(DEVICE, 0, 4) == b"conf"
        toy.device.content[:] = b"another contents"
        assert t.peek(DEVICE, 4, 4) == b"her "
        assert t.get("generation") != first

    def test_a_change_before_the_driver_is_ready_is_told_then(self, toy: Served) -> None:
        t = toy.transport
        events = t.enable_msix()
        assert t.accept(VERSION_1)
        t.set("config_vector", 2)
        toy.device.host.config_changed()
        t.peek(DEVICE, 0, 1)
        t.peek(DEVICE, 0, 1)
        assert not readable(events[2])
        t.set("status", READY | Status.DRIVER_OK)
        t.wait(lambda: readable(events[2]))
        toy.device.host.config_changed()
        t.wait(lambda: readable(events[2]))
        for fd in events:
            os.close(fd)


class TestPin:
    """Interrupts of a driver that uses no MSI-X."""

    @pytest.fixture
    def pin(self, toy: Served) -> Iterator[int]:
        event = os.eventfd(0, os.EFD_NONBLOCK)
        assert toy.client.triggers(INTX, 0, [event]) == 0
        assert toy.transport.accept(VERSION_1)
        toy.transport.set("status", READY | Status.DRIVER_OK)
        yield event
        os.close(event)

    def test_of_a_device_that_has_nothing_else(self, tmp_path: Path) -> None:
        served = Served(Toy(), tmp_path / "pin.sock", interrupts="intx")
        with served.serving, served.serving.connect() as client:
            client.begin()
            t = served.transport = Transport(client)
            assert 0x11 not in t.capabilities
            event = os.eventfd(0, os.EFD_NONBLOCK)
            assert client.triggers(INTX, 0, [event]) == 0
            assert client.triggers(MSIX, 0, [event]) == errno.EINVAL
            assert t.accept(VERSION_1)
            # A driver that chooses a vector all the same is told that there is none.
            t.set("config_vector", 0)
            t.set_of(0, "vector", 0)
            assert (t.get("config_vector"), t.get_of(0, "vector")) == (NO_VECTOR, NO_VECTOR)
            t.set("status", READY | Status.DRIVER_OK)
            served.device.host.config_changed()
            t.wait(lambda: readable(event))
            assert t.peek(ISR, 0, 1) == b"\2"
            os.close(event)
        with pytest.raises(ValueError, match="msix, intx"):
            VirtioPci(Toy(), interrupts="msi")  # type: ignore[arg-type] # that is the point

    def unmask(self, toy: Served) -> None:
        flags = IrqSet.DATA_NONE | IrqSet.UNMASK
        assert toy.client.set_irqs(flags, INTX, 0, 1) == 0

    def test_the_status_is_cleared_by_reading(self, toy: Served, pin: int) -> None:
        t = toy.transport
        toy.device.host.config_changed()
        t.wait(lambda: readable(pin))
        assert t.peek(ISR, 0, 1) == b"\2"
        assert t.peek(ISR, 0, 1) == b"\0"
        self.unmask(toy)
        assert not readable(pin)

    def test_it_interrupts_until_its_cause_is_read(self, toy: Served, pin: int) -> None:
        t = toy.transport
        toy.device.host.config_changed()
        t.wait(lambda: readable(pin))
        self.unmask(toy)
        assert readable(pin)
        assert t.peek(ISR, 0, 1) == b"\2"
        self.unmask(toy)
        assert not readable(pin)
        toy.device.host.config_changed()
        t.wait(lambda: readable(pin))

    def test_a_reset_takes_it_back(self, toy: Served, pin: int) -> None:
        t = toy.transport
        toy.device.host.config_changed()
        t.wait(lambda: readable(pin))
        t.reset()
        self.unmask(toy)
        assert not readable(pin)
        assert t.peek(ISR, 0, 1) == b"\0"


class TestRings:
    def test_a_driver_without_msix(self) -> None:
        with driven(Toy()) as driver:
            t = front(driver).transport
            t.write_config(t.capabilities[0x11] + 2, 2, 0)
            driver.submit(b"abc", 3)
            t.wait(lambda: t.peek(ISR, 0, 1) == b"\1")
            assert driver.poll()[0].data == b"cba"

    def test_a_queue_without_a_vector_does_not_interrupt(self) -> None:
        with driven(Toy()) as driver:
            t = front(driver).transport
            t.set_of(0, "vector", NO_VECTOR)
            buffer = driver.submit(b"abc", 3)
            until(lambda: driver.poll() or buffer.done)
            assert not readable(front(driver).events[1])
            t.set_of(0, "vector", 2)
            assert not driver._queues[0].ring.enable_interrupts()
            driver.submit(b"abc", 3)
            t.wait(lambda: readable(front(driver).events[2]))

    def served(self, driver: Driver) -> None:
        """Have a request served whose interrupt no test waits for."""
        assert not driver._queues[0].ring.enable_interrupts()
        driver.submit(b"abc", 3)
        until(driver.poll)
        assert not driver._queues[0].ring.enable_interrupts()

    def test_interrupts_go_where_the_client_wants_them(self) -> None:
        with driven(Toy()) as driver:
            plug = front(driver)
            first, client = plug.events[1], plug.client
            while readable(first):
                pass
            self.served(driver)
            assert readable(first)
            # Another eventfd.
            other = os.eventfd(0, os.EFD_NONBLOCK)
            assert client.triggers(2, 1, [other]) == 0
            self.served(driver)
            assert readable(other)
            assert not readable(first)
            # None: it is pending until there is one, and reaches that once.
            assert client.set_irqs(IrqSet.DATA_EVENTFD | IrqSet.TRIGGER, 2, 1, 1) == 0
            self.served(driver)
            plug.transport.get("status")
            assert not readable(other)
            assert client.triggers(2, 1, [first]) == 0
            assert readable(first)
            self.served(driver)
            assert readable(first)
            # Masked.
            assert client.set_irqs(IrqSet.DATA_NONE | IrqSet.MASK, 2, 1, 1) == 0
            self.served(driver)
            plug.transport.get("status")
            assert not readable(first)
            assert client.set_irqs(IrqSet.DATA_NONE | IrqSet.UNMASK, 2, 1, 1) == 0
            assert readable(first)
            # No interrupt while it is no bus master.
            plug.transport.write_config(4, 2, 2)
            assert plug.function._rings[0].trigger is None
            plug.transport.write_config(4, 2, 6)
            self.served(driver)
            assert readable(first)
            os.close(other)

    @pytest.mark.parametrize("iommu", ["off", "strict"])
    def test_bus_mastering_off_stops_it(self, iommu: IommuMode) -> None:
        with driven(Toy(), iommu) as driver:
            t = front(driver).transport
            assert driver.request(b"abc", 3) == b"cba"
            t.write_config(4, 2, 2)
            buffer = driver.submit(b"def", 3)
            # Longer than it would wait for memory that is not mapped.
            time.sleep(1.5 * BUS_PATIENCE)
            assert not t.get("status") & Status.NEEDS_RESET
            assert not buffer.done
            assert not driver.poll()
            t.write_config(4, 2, 6)
            driver.wait(buffer)
            assert buffer.data == b"fed"

    def test_what_the_device_holds_fails_when_bus_mastering_is_off(self) -> None:
        device = Toy()
        with driven(device, stop_timeout=0.1) as driver:
            device.later = Future()
            buffer = driver.submit(b"abc", 3)
            until(lambda: device.held)
            front(driver).transport.write_config(4, 2, 2)
            assert device.held[0].writable.total == 0
            assert device.later.cancelled()
            device.later = None
            front(driver).transport.write_config(4, 2, 6)
            assert driver.wait(buffer).written == 0
            assert driver.request(b"abc", 3) == b"cba"

    def test_function_level_reset(self) -> None:
        device = Toy()
        with driven(device) as driver:
            t = front(driver).transport
            assert driver.request(b"abc", 3) == b"cba"
            t.write_config(t.capabilities[0x10] + 8, 2, 0x8000)
            assert t.get("status") == 0
            assert t.get_of(0, "enable") == 0
            assert t.config(4, 2) == 0
            t.write_config(4, 2, 6)
            t.write_config(t.capabilities[0x11] + 2, 2, 0x8000)
            driver._queues.pop().abandon()
            driver.reset()
            assert driver.request(b"abc", 3) == b"cba"

    def test_a_ring_that_is_unmapped_breaks_its_queue_only(self) -> None:
        device = Toy()
        with driven(device, "strict") as driver:
            plug = front(driver)
            assert driver.request(b"abc", 3) == b"cba"
            layout = driver._queues[0].layout
            page = layout.desc & -PAGE
            plug.client.unmap(page, PAGE)
            plug.transport.notify(0)
            plug.transport.wait(lambda: plug.transport.get("status") & Status.NEEDS_RESET)
            assert plug.wait_config_change(WAIT)
            assert plug.serving.stats.failed_calls == 0
            assert plug.serving.stats.dma_refused
            plug.function.statistics.queue_errors = 1
            driver._queues[0]._handle = None
            plug._queues.pop(0).close()
            driver._queues.pop().abandon()
            driver.reset()
            assert driver.request(b"abc", 3) == b"cba"

    def test_a_ring_that_is_away_for_a_moment_is_waited_for(self) -> None:
        with driven(Toy()) as driver:
            plug = front(driver)
            (start, size), *_ = plug._mapped
            for start, size in plug._mapped:
                plug.client.unmap(start, size)
            buffer = driver.submit(b"abc", 3)
            plug.transport.get("status")
            plug._mapped.clear()
            plug._map_all()
            assert driver.wait(buffer).data == b"cba"
            assert not plug.transport.get("status") & Status.NEEDS_RESET

    def test_a_used_ring_that_may_only_be_read_breaks_it(self) -> None:
        with driven(Toy()) as driver:
            plug = front(driver)
            for start, size in plug._mapped:
                plug.client.unmap(start, size)
            regions = {each.start: each for each in driver.memory}
            for start, size in plug._mapped:
                place = regions[start].file_offset
                assert plug.client.map(start, size, place.fd, place.start, flags=1) == 0
            driver.submit(b"abc", 3)
            plug.transport.wait(lambda: plug.transport.get("status") & Status.NEEDS_RESET)

    def test_memory_of_another_file_reaches_queues_that_run(self) -> None:
        device = Toy()
        with driven(device) as driver:
            plug = front(driver)
            assert driver.request(b"abc", 3) == b"cba"
            device.later = later = Future()
            held = driver.submit(b"late", 4)
            until(lambda: device.held)
            device.later = None
            space = plug.function._space
            fd = memory_file()
            assert plug.client.map(1 << 40, PAGE, fd) == 0
            os.close(fd)
            assert plug.function._space is not space
            # What is held was not waited for, and has its memory.
            assert device.held[0].writable.total == 4
            assert driver.request(b"abc", 3) == b"cba"
            device.held[0].writable.write(b"done")
            later.set_result(4)
            assert driver.wait(held).data == b"done"

    def test_a_request_in_memory_that_is_unmapped_fails_at_the_deadline(self) -> None:
        device = Toy()
        with driven(device, "strict", revoke_after=0.2) as driver:
            plug = front(driver)
            device.later = Future()
            buffer = driver.submit(b"abc", 3)
            until(lambda: device.held)
            assert buffer.placement is not None
            plug.iotlb.unmap(*buffer.placement.mapped)
            assert device.held[0].writable.total == 0
            assert plug.serving.stats.delayed_unmaps >= 1
            assert plug.serving.stats.cut_off == 0
            assert driver.receive().written == 0

    def test_a_system_call_that_goes_on_is_cut_off_and_others_are_not(self) -> None:
        device = Toy()
        with driven(device, "strict", revoke_after=0.2, stop_timeout=0.1) as driver:
            plug = front(driver)
            source, sink = os.pipe()
            device.later = Future()
            # More than a pipe holds.
            buffer = driver.submit(b"abc" * 60000, 3)
            until(lambda: device.held)
            device.later = None
            moving = threading.Thread(target=lambda: device.held[0].readable.to_file(sink))
            moving.start()
            until(lambda: select.select([source], [], [], 0)[0])
            assert buffer.placement is not None
            space = plug.function._space
            plug.iotlb.unmap(*buffer.placement.mapped)
            assert plug.serving.stats.cut_off >= 1
            assert plug.function._space is not space
            # The ring is in the memory that was mapped anew.
            assert driver.request(b"def", 3) == b"fed"
            os.set_blocking(source, False)
            while moving.is_alive():
                with contextlib.suppress(BlockingIOError):
                    os.read(source, 1 << 16)
            moving.join()
            os.close(source)
            os.close(sink)
            until(lambda: driver.poll() or buffer.done)
            assert buffer.written == 0

    def test_a_queue_is_reset_while_the_device_holds_its_request(self) -> None:
        device = Toy()
        with driven(device, stop_timeout=0.1) as driver:
            t = front(driver).transport
            device.later = Future()
            driver.submit(b"abc", 3)
            until(lambda: device.held)
            t.set_of(0, "reset", 1)
            assert t.get_of(0, "enable") == t.get_of(0, "reset") == 0
            assert device.held[0].writable.total == 0
            device.later = None
            assert not t.get("status") & Status.NEEDS_RESET


def test_queues_of_one_device_that_are_set_up_late(tmp_path: Path) -> None:
    """A queue that is enabled after DRIVER_OK is served, as after a reset of it."""
    device = Toy()
    with driven(device) as driver:
        plug = front(driver)
        driver._queues[0].stop()
        driver._queues[0].close()
        driver._queues.clear()
        assert plug.transport.get("status") & Status.DRIVER_OK
        driver._queues.append(
            driver._queue_type(
                plug, driver._dma, 0, 16, driver.memory, polling=False, contiguous=False, timeout=9
            )
        )
        assert driver.request(b"abc", 3) == b"cba"


def test_a_disk_is_used_by_one_client_after_the_other(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(range(256)) * 4096)
    with (
        closing(BlockDevice(image)) as disk,
        ServingPci(VirtioPci(disk), tmp_path / "blk.sock") as serving,
    ):
        for _ in range(3):
            with serving.connect() as client:
                t = Transport(client.begin())
                assert t.accept(VERSION_1)
                t.place(0, RingLayout.contiguous(BASE, 64))
                t.set("status", READY | Status.DRIVER_OK)
                t.notify(0)
        until(lambda: serving.stats.connections == 3)


def test_random_accesses(toy: Served) -> None:
    """Whatever a driver writes, the device serves the next driver."""
    rng = random.Random(5)
    client, t = toy.client, toy.transport
    fd = memory_file()
    assert client.map(BASE, 1 << 20, fd) == 0
    os.close(fd)
    edges = [0, 1, 2, 3, 7, 0xF, 0x10, 0x100, 0xFFFF, BASE, BASE + 16, 2**32 - 1]
    for _ in range(400):
        size = rng.choice([1, 2, 4, 8])
        offset = rng.choice(
            [rng.randrange(0x40), rng.randrange(0x40), 0x1000, 0x3000 + rng.randrange(16), 0x2004]
        )
        value = rng.choice(edges) % (1 << 8 * size)
        if rng.random() < 0.2:
            client.read(0, offset, size)
        else:
            client.write(0, offset, value.to_bytes(size, "little"))
    assert t.accept(VERSION_1)
    assert client.unmap(BASE, 1 << 20) == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"queue_size": 0},
        {"queue_size": 3},
        {"queue_size": 65536},
        {"iommu": "on"},
        {"indirect": True},
        {"stop_timeout": -1},
        {"stop_timeout": 3601},
        {"poll_us": -1},
    ],
)
def test_bad_arguments(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad)).split("_")[0]):
        VirtioPci(Toy(), **bad)


def test_devices_that_cannot_be_pci_functions() -> None:
    toy = Toy()
    toy.device_id = 64  # type: ignore[misc, assignment]
    with pytest.raises(ValueError, match=r"64 is not in 1\.\.63"):
        VirtioPci(toy)
    with pytest.raises(TypeError, match="make one of it"):
        VirtioPci(Toy)  # type: ignore[arg-type]
    toy = Toy()
    toy.num_queues = 257
    with pytest.raises(ValueError, match="257"):
        VirtioPci(toy)
