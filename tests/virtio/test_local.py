"""Devices whose driver is in the same process: no wire, and the same rules as over one."""

from __future__ import annotations

import gc
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from guestio import GuestRegionCollection, QueueError
from guestio._core.virtio.chain import Chain
from guestio.errors import DeviceError, InvalidAddressError
from guestio.virtio import Device, DeviceHost
from guestio.virtio.driver import DriverQueue
from guestio.virtio.iommu import EndpointQueue, VirtioIommu
from guestio.virtio.layout import RingLayout
from guestio.virtio.local import LocalTransport
from guestio.virtio.rng import EntropyDevice
from tests.kit.iommu_driver import PAGE, attach, detach, map_, pend, send_all, unmap
from tests.kit.serving import WAIT, nothing_left, until

SIZE = 16
ASKED, SPOKEN = 0, 1
FAILED = 0xEE


class Port(Device):
    """Answers with what it was sent, backwards, and speaks first on its other queue."""

    device_id = 3
    num_queues = 2
    device_queues = (SPOKEN,)
    error_status = FAILED

    def __init__(self) -> None:
        self.hosts: list[DeviceHost] = []
        self.later: list[tuple[Chain, Future[int]]] = []
        self.stopped: list[int] = []

    def attached(self, host: DeviceHost) -> None:
        self.hosts.append(host)

    def process(self, queue: int, chain: Chain) -> int | Future[int]:
        source = chain.readable.read()
        if source.startswith(b"LATE"):
            self.later.append((chain, Future()))
            return self.later[-1][1]
        if source.startswith(b"RAISE"):
            raise ZeroDivisionError
        chain.writable.write(source[::-1])
        return len(source)

    def stopping(self, queue: int) -> None:
        self.stopped.append(queue)


class Rig:
    """A device, its transport, and the driver of its queues."""

    def __init__(self, device: Device, queues: int = 2, **options: Any) -> None:
        self.memory = GuestRegionCollection.from_ranges([(0, 0x80000)])
        self.device = device
        self.notified: list[int] = []
        self.interrupt: Callable[[int], object] = self.notified.append
        self.layouts = {n: RingLayout.contiguous(n * PAGE, SIZE) for n in range(queues)}
        self.drivers = [DriverQueue(self.memory, self.layouts[n]) for n in range(queues)]
        self.transport = LocalTransport(
            device,
            self.memory,
            self.layouts,
            lambda queue: self.interrupt(queue),
            **options,
        )
        self.next = 0x20000

    def ask(self, source: bytes, room: int = 64) -> int:
        """Begin a request; where it is."""
        at, self.next = self.next, self.next + 0x200
        self.memory.write(at, source)
        self.drivers[ASKED].add([(at, len(source))], [(at + 0x100, room)], at)
        self.drivers[ASKED].publish()
        return at

    def post(self, room: int = 64) -> None:
        at, self.next = self.next, self.next + 0x200
        self.drivers[SPOKEN].add([], [(at + 0x100, room)], at)
        self.drivers[SPOKEN].publish()

    def got(self, queue: int = ASKED) -> list[bytes]:
        return [
            self.memory.read(done.token + 0x100, done.written)
            for done in self.drivers[queue].collect()
        ]

    @property
    def ready(self) -> bool:
        return bool(select.select([self.transport], [], [], 0)[0])

    def serve_when_ready(self) -> None:
        assert select.select([self.transport], [], [], WAIT)[0]
        self.transport.serve()

    def close(self) -> None:
        self.transport.close()
        for driver in self.drivers:
            driver.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(Port(), stop_timeout=0.05)
    yield made
    made.close()


def test_requests(rig: Rig) -> None:
    assert not rig.ready
    for _ in range(3 * SIZE):
        rig.ask(b"hello")
        assert rig.transport.serve() is False
        assert rig.got() == [b"olleh"]
    assert ASKED in rig.notified
    assert not rig.ready


def test_answers_that_come_later_overtake_each_other(rig: Rig) -> None:
    rig.ask(b"LATE 1")
    rig.ask(b"LATE 2")
    rig.ask(b"now")
    rig.transport.serve()
    assert rig.got() == [b"won"]
    (_, first), (chain, second) = rig.device.later
    chain.writable.write(b"two")
    thread = threading.Thread(target=second.set_result, args=(3,))
    thread.start()
    rig.serve_when_ready()
    thread.join()
    assert rig.got() == [b"two"]
    # In the thread that serves, too: nothing else tells it to look.
    assert not rig.ready
    first.set_result(0)
    rig.serve_when_ready()
    assert rig.got() == [b""]
    assert rig.transport.statistics.outstanding == 0


def test_a_device_that_speaks_first(rig: Rig) -> None:
    (host,) = rig.device.hosts
    queue = host.queue(SPOKEN)
    assert not queue.send(b"too early")
    rig.post()
    rig.post(2)
    rig.transport.serve()
    assert queue.send(b"first")
    with pytest.raises(DeviceError, match="room for 2"):
        queue.send(b"too long")
    assert rig.got(SPOKEN) == [b"first"]
    thread = threading.Thread(target=queue.send, args=(b"2.",))
    thread.start()
    thread.join()
    assert rig.got(SPOKEN) == [b"2."]
    rig.transport.serve()
    assert SPOKEN in rig.notified


def test_readers_timers_and_calls_of_the_device(rig: Rig) -> None:
    (host,) = rig.device.hosts
    called: list[str] = []
    reading, writing = os.pipe()
    host.add_reader(reading, lambda: called.append(os.read(reading, 9).decode()))
    assert rig.transport.timeout() is None
    host.call_soon_threadsafe(lambda: called.append("soon"))
    rig.serve_when_ready()
    assert called == ["soon"]
    os.write(writing, b"pipe")
    rig.serve_when_ready()
    assert called == ["soon", "pipe"]
    host.call_later(0.05, lambda: called.append("timer"))
    deadline = time.monotonic() + WAIT
    while "timer" not in called:
        assert time.monotonic() < deadline
        select.select([rig.transport], [], [], rig.transport.timeout())
        rig.transport.serve()
    assert called == ["soon", "pipe", "timer"]
    assert rig.transport.timeout() is None
    host.remove_reader(reading)
    os.close(reading)
    os.close(writing)


def test_mistakes_of_the_device_end_as_over_a_wire(rig: Rig) -> None:
    at = rig.ask(b"RAISE", 1)
    rig.transport.serve()
    assert rig.got() == [bytes([FAILED])]
    assert rig.memory.read(at + 0x100, 1) == bytes([FAILED])
    assert rig.transport.statistics.failed_requests == 1


def test_a_broken_ring_leaves_the_other_alone(rig: Rig) -> None:
    rig.memory.write(rig.layouts[ASKED].avail + 2, b"\xff\x7f")
    rig.post()
    for _ in range(2):
        with pytest.raises(QueueError):
            rig.transport.serve()
    assert rig.device.hosts[0].queue(SPOKEN).send(b"fine")
    assert rig.got(SPOKEN) == [b"fine"]


def test_a_busy_driver_does_not_keep_the_loop(rig: Rig) -> None:
    def again(queue: int) -> None:
        rig.got()
        rig.next = 0x20000
        rig.ask(b"again")

    rig.interrupt = again
    again(ASKED)
    assert rig.transport.serve() is True
    assert rig.ready


def test_what_the_notified_driver_raises_comes_through(rig: Rig) -> None:
    rig.interrupt = lambda queue: 1 / 0
    rig.ask(b"one")
    with pytest.raises(ZeroDivisionError):
        rig.transport.serve()
    rig.interrupt = rig.notified.append
    rig.ask(b"two")
    rig.transport.serve()
    assert rig.got() == [b"eno", b"owt"]


def test_close_fails_what_the_device_holds(rig: Rig) -> None:
    rig.ask(b"LATE", 1)
    rig.transport.serve()
    ((chain, answer),) = rig.device.later
    rig.transport.close()
    rig.transport.close()
    assert rig.got() == [bytes([FAILED])]
    assert answer.cancelled()
    assert set(rig.device.stopped) == {ASKED, SPOKEN}
    with pytest.raises(InvalidAddressError):
        chain.writable.write(b"x")
    rig.ask(b"one more")
    assert rig.transport.serve() is False
    assert rig.got() == []


def test_other_memory(rig: Rig) -> None:
    rig.ask(b"before")
    rig.transport.serve()
    rig.post()
    other = GuestRegionCollection.from_ranges([(0, 0x80000)])
    other.write(0, rig.memory.read(0, 0x80000))
    rig.transport.change_memory(other)
    rig.transport.serve()
    assert rig.device.hosts[0].queue(SPOKEN).send(b"there")
    (done,) = DriverQueueView(other, rig.layouts[SPOKEN]).collect()
    assert other.read(done, 5) == b"there"
    assert rig.got(SPOKEN) == []


class DriverQueueView:
    """Reads where the buffers are that came back, without owning the ring."""

    def __init__(self, memory: GuestRegionCollection, layout: RingLayout) -> None:
        self.memory, self.layout = memory, layout

    def collect(self) -> list[int]:
        read = self.memory.read
        count = int.from_bytes(read(self.layout.used + 2, 2), "little")
        heads = [
            int.from_bytes(read(self.layout.used + 4 + 8 * n, 4), "little") for n in range(count)
        ]
        return [int.from_bytes(read(self.layout.desc + 16 * head, 8), "little") for head in heads]


def test_nothing_is_left() -> None:
    with nothing_left():
        rig = Rig(Port())
        rig.ask(b"one")
        rig.transport.serve()
        rig.close()
        with pytest.raises(TypeError):
            LocalTransport(Port(), rig.memory, {}, None)
        with pytest.raises(DeviceError):
            LocalTransport(Port(), rig.memory, {9: rig.layouts[0]}, print)
        del rig


def test_a_transport_that_is_dropped_closes_itself() -> None:
    with nothing_left():
        rig = Rig(Port())
        rig.ask(b"LATE")
        rig.transport.serve()
        for driver in rig.drivers:
            driver.close()
        del rig, driver
        gc.collect()


class TestBehindAnEndpoint:
    """A device behind an endpoint of a virtio-iommu follows what the guest maps."""

    RING, RING_IOVA = 0, 0x4000_0000
    DATA, DATA_IOVA = 0x20000, 0x7000_0000

    @pytest.fixture
    def iommu(self) -> VirtioIommu:
        made = VirtioIommu(endpoints=[8])
        send_all(
            made,
            attach(8, 1),
            map_(1, self.RING_IOVA, self.RING_IOVA + PAGE - 1, self.RING),
            map_(1, self.DATA_IOVA, self.DATA_IOVA + PAGE - 1, self.DATA),
        )
        return made

    @pytest.fixture
    def memory(self) -> GuestRegionCollection:
        return GuestRegionCollection.from_ranges([(0, 0x80000)])

    def queue(
        self, device: Device, iommu: VirtioIommu, memory: GuestRegionCollection, **options: Any
    ) -> EndpointQueue:
        return EndpointQueue(
            device,
            0,
            iommu.endpoint(8).memory(memory),
            RingLayout.contiguous(self.RING_IOVA, SIZE),
            lambda: None,
            **options,
        )

    def test_a_source_that_makes_requests_wait(
        self, tmp_path: Any, iommu: VirtioIommu, memory: GuestRegionCollection
    ) -> None:
        os.mkfifo(tmp_path / "fifo")
        writing = os.open(tmp_path / "fifo", os.O_RDWR | os.O_NONBLOCK)
        device = EntropyDevice(tmp_path / "fifo")
        driver = DriverQueue(memory, RingLayout.contiguous(self.RING, SIZE))
        queue = self.queue(device, iommu, memory)
        driver.add([], [(self.DATA_IOVA, 16)])
        driver.publish()
        timer = threading.Timer(0.05, os.write, (writing, b"random"))
        timer.start()
        queue.serve()
        assert [done.written for done in driver.collect()] == [6]
        assert memory.read(self.DATA, 6) == b"random"
        timer.join()
        queue.close()
        device.close()
        driver.close()
        os.close(writing)

    def test_an_unmap_waits_for_a_request_that_is_held(
        self, iommu: VirtioIommu, memory: GuestRegionCollection
    ) -> None:
        device = Port()
        driver = DriverQueue(memory, RingLayout.contiguous(self.RING, SIZE))
        queue = self.queue(device, iommu, memory, answer_timeout=10.0)
        memory.write(self.DATA, b"LATE")
        driver.add([(self.DATA_IOVA, 4)], [(self.DATA_IOVA + 64, 4)])
        driver.publish()
        thread = threading.Thread(target=queue.serve)
        thread.start()
        until(lambda: device.later)
        pending = pend(iommu, unmap(1, self.DATA_IOVA, self.DATA_IOVA + PAGE - 1))
        ((chain, answer),) = device.later
        chain.writable.write(b"done")
        assert not pending.done
        answer.set_result(4)
        assert pending.result(WAIT) == bytes(4)
        thread.join()
        assert [done.written for done in driver.collect()] == [4]
        queue.close()
        driver.close()

    def test_a_detached_endpoint_and_other_memory(
        self, iommu: VirtioIommu, memory: GuestRegionCollection
    ) -> None:
        driver = DriverQueue(memory, RingLayout.contiguous(self.RING, SIZE))
        device = Port()
        queue = self.queue(device, iommu, memory)

        def ask() -> list[int]:
            memory.write(self.DATA, b"abc")
            driver.add([(self.DATA_IOVA, 3)], [(self.DATA_IOVA + 64, 4)])
            driver.publish()
            queue.serve()
            return [done.written for done in driver.collect()]

        assert ask() == [3]
        send_all(iommu, detach(8, 1))
        assert ask() == []
        assert {record.reason.name for record in iommu.event_records()} == {"DOMAIN"}
        send_all(
            iommu,
            attach(8, 1),
            map_(1, self.RING_IOVA, self.RING_IOVA + PAGE - 1, self.RING),
            map_(1, self.DATA_IOVA, self.DATA_IOVA + PAGE - 1, self.DATA),
        )
        assert ask() == [3, 3]
        # The same memory, in another collection: the one before may go.
        again = GuestRegionCollection.from_regions(list(memory))
        queue.change_memory(iommu.endpoint(8).memory(again))
        assert ask() == [3]
        assert iommu.event_records() == []
        queue.close()
        driver.close()
