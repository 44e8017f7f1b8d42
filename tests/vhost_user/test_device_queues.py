"""Queues that belong to the device: what it takes and gives back, and what it does wrong."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestio.errors import DeviceError
from guestio.memory import MmapRegion
from guestio.virtio.device import Device
from guestio.virtio.host import DeviceHost
from tests.kit.rings import WRITE, Desc
from tests.kit.serving import (
    BUFFERS,
    OK,
    WAIT,
    Driver,
    Mirror,
    Serving,
    nothing_left,
    promptly,
    until,
    warnings_of,
)

PAGE = 0x1000


class Speaker(Mirror):
    """Queue 0 mirrors requests as ever; queue 1 is its own."""

    device_queues = (1,)

    def __init__(self) -> None:
        super().__init__(2)
        self.available = 0
        self.host: DeviceHost | None = None
        self.stops: list[int] = []
        self.at_stop: Callable[[int], object] = self.stops.append

    def attached(self, host: DeviceHost) -> None:
        self.host = host
        host.queue(1).on_available(self.count)

    def count(self) -> None:
        self.available += 1

    def stopping(self, queue: int) -> None:
        self.at_stop(queue)

    @property
    def queue(self):
        assert self.host is not None
        return self.host.queue(1)

    def in_loop(self, call: Callable[[], object]) -> object:
        """Do something in the loop's thread; what it returned or raised."""
        done = threading.Event()
        result: list[object] = []

        def run() -> None:
            try:
                result.append(call())
            except Exception as error:
                result.append(error)
            done.set()

        assert self.host is not None
        self.host.call_soon_threadsafe(run)
        assert done.wait(WAIT)
        return result[0]


@pytest.fixture
def device() -> Speaker:
    return Speaker()


@pytest.fixture(params=[False, True], ids=["one thread", "queue threads"])
def serving(device: Speaker, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Serving]:
    with Serving(device, tmp_path / "s", queue_threads=request.param) as made:
        yield made


@pytest.fixture
def driver(serving: Serving) -> Iterator[Driver]:
    with Driver(serving.path, queues=2) as made:
        yield made


def post(driver: Driver, room: int, number: int = 0, *, kick: bool = True) -> int:
    """Make a buffer available in queue 1."""
    ring = driver.rings[1]
    at = ring.offered
    ring.offer(ring.put_chain(at % 64, Desc(driver.at(BUFFERS + number * PAGE), room, WRITE)))
    if kick:
        driver.handles[1].kick()
    return at


def got(driver: Driver, at: int, number: int = 0) -> bytes:
    driver.wait(1, at)
    return driver.memory.read(BUFFERS + number * PAGE, driver.rings[1].used_entry(at)[1])


@pytest.mark.parametrize("iommu", [False, True], ids=["direct", "iommu"])
def test_take_and_complete(serving: Serving, device: Speaker, iommu: bool) -> None:
    with nothing_left(), Driver(serving.path, queues=2, iommu=iommu) as driver:
        at = post(driver, 64)
        chain = taken(device)
        chain.writable.write(b"here")
        assert device.queue.complete(chain, 4) is True
        assert got(driver, at) == b"here"
    serving.let_go()


def taken(device: Speaker):
    """The next buffer, once it is there."""
    chains: list = []

    def take() -> bool:
        chain = device.queue.take()
        if chain is not None:
            chains.append(chain)
        return chain is not None

    until(take)
    return chains[0]


@pytest.mark.parametrize("where", ["loop", "thread"])
def test_data_arrives(device: Speaker, driver: Driver, where: str) -> None:
    assert device.queue.take() is None
    numbers = [post(driver, 64, number) for number in range(3)]
    chain = taken(device)
    assert chain.writable.total == 64
    chain.writable.write(b"one")
    call = device.in_loop if where == "loop" else lambda act: act()
    assert call(lambda: device.queue.complete(chain, 3)) is True
    assert got(driver, numbers[0], 0) == b"one"
    assert call(lambda: device.queue.send(b"two")) is True
    assert got(driver, numbers[1], 1) == b"two"
    assert call(lambda: device.queue.send(b"")) is True
    assert got(driver, numbers[2], 2) == b""
    assert call(lambda: device.queue.send(b"none left")) is False
    assert driver.run(0, b"other")[0] == OK


def test_buffers_that_are_not_taken_delay_no_stop(
    device: Speaker, driver: Driver, serving: Serving
) -> None:
    for number in range(8):
        post(driver, 64, number)
    until(lambda: device.available)
    serving.backend._host.stop_timeout = 100.0
    with promptly(1.0):
        assert driver.stop(1) == 0
    assert device.queue.take() is None
    assert device.queue.send(b"x") is False
    # They are announced once, and there after a restart.
    driver.start(1)
    until(lambda: device.queue.send(b"again"))
    assert got(driver, 0, 0) == b"again"


def test_a_buffer_that_is_held_is_given_back_when_time_is_up(
    device: Speaker, driver: Driver, serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    at = post(driver, 64)
    chain = taken(device)
    serving.backend._host.stop_timeout = 0.2
    assert driver.stop(1) == 1
    assert driver.rings[1].used_entry(at) == (at, 0)
    assert 1 in device.stops
    for written in (0, 3, 64, 65, None):
        assert device.queue.complete(chain, written) is False
    assert "completes a buffer that it does not hold" in str(warnings_of(caplog))
    assert "Speaker" in str(warnings_of(caplog))
    driver.start(1)
    again = post(driver, 64)
    until(lambda: device.queue.send(b"on"))
    assert got(driver, again) == b"on"


def test_a_device_gives_its_buffers_back_when_its_queue_stops(
    device: Speaker, driver: Driver, serving: Serving
) -> None:
    at = post(driver, 64)
    chain = taken(device)
    device.at_stop = lambda queue: queue == 1 and device.queue.complete(chain, 0)
    serving.backend._host.stop_timeout = 100.0
    with promptly(1.0):
        assert driver.stop(1) == 1
    assert driver.rings[1].used_entry(at) == (at, 0)


def test_completing_twice(
    device: Speaker, driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = post(driver, 64, 0), post(driver, 64, 1)
    chain = taken(device)
    chain.writable.write(b"once")
    assert device.queue.complete(chain, 4) is True
    for written in (0, 4, 64, -1):
        assert device.queue.complete(chain, written) is False
    assert "Speaker completes a buffer that it does not hold" in warnings_of(caplog)[0]
    assert got(driver, first, 0) == b"once"
    assert device.queue.send(b"next") is True
    assert got(driver, second, 1) == b"next"
    assert driver.run(0, b"other")[0] == OK


@pytest.mark.parametrize("written", [65, -1, None, "3", True, 2**70])
def test_completing_with_nonsense(device: Speaker, driver: Driver, written: object) -> None:
    at = post(driver, 64)
    chain = taken(device)
    with pytest.raises(DeviceError, match="Speaker completes a buffer of queue 1 with"):
        device.queue.complete(chain, written)
    # It is still held.
    chain.writable.write(b"right")
    assert device.queue.complete(chain, 5) is True
    assert got(driver, at) == b"right"


def test_sending_more_than_fits(device: Speaker, driver: Driver) -> None:
    at = post(driver, 8)
    until(lambda: device.available)
    message = "Speaker sends 9 bytes on queue 1, whose next buffer has room for 8"
    with pytest.raises(DeviceError, match=message):
        device.queue.send(b"123456789")
    assert device.queue.send(b"12345678") is True
    assert got(driver, at) == b"12345678"


def test_a_queue_that_is_not_the_devices(device: Speaker, driver: Driver) -> None:
    assert device.host is not None
    other = device.host.queue(0)
    for call in (
        other.take,
        lambda: other.send(b""),
        lambda: other.on_available(None),
        lambda: other.complete(None),  # type: ignore[arg-type]
    ):
        with pytest.raises(DeviceError, match="queue 0, which is not in its device_queues"):
            call()
    for index in (-1, 2, 1 << 70):
        with pytest.raises(DeviceError, match="2 queues, not a queue"):
            device.host.queue(index)


def test_a_callback_that_raises(
    device: Speaker, driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("no buffers, please")

    device.queue.on_available(fail)
    at = post(driver, 64)
    until(lambda: warnings_of(caplog))
    assert (
        "queue 1: the on_available callback of Speaker raised RuntimeError: no buffers, please"
        in warnings_of(caplog)[0]
    )
    assert driver.run(0, b"other")[0] == OK
    assert device.queue.send(b"all the same") is True
    assert got(driver, at) == b"all the same"


@pytest.mark.parametrize("kind", ["timer", "callback", "reader"])
def test_other_callbacks_that_raise(
    device: Speaker, driver: Driver, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    host = device.host
    assert host is not None
    calls = []

    def fail() -> None:
        calls.append(kind)
        raise KeyError(kind)

    reading, writing = os.pipe()
    os.write(writing, b"x")
    if kind == "timer":
        host.call_later(0.01, fail)
    elif kind == "callback":
        host.call_soon_threadsafe(fail)
    else:
        assert device.in_loop(lambda: host.add_reader(reading, fail)) is None
    until(lambda: warnings_of(caplog))
    assert "of Speaker raised KeyError" in warnings_of(caplog)[0]
    assert driver.run(0, b"other")[0] == OK
    # A reader that raised is watched no more, though there is still something to read.
    assert len(calls) == 1
    os.close(reading)
    os.close(writing)


def test_watching_descriptors_that_are_closed(device: Speaker, driver: Driver) -> None:
    host = device.host
    assert host is not None
    reading, writing = os.pipe()
    os.close(reading)
    raised = device.in_loop(lambda: host.add_reader(reading, lambda: None))
    assert isinstance(raised, OSError)
    assert device.in_loop(lambda: host.remove_reader(reading)) is None
    reading, other = os.pipe()
    assert device.in_loop(lambda: host.add_reader(reading, lambda: None)) is None
    os.close(reading)  # without a word
    os.close(other)
    assert driver.run(0, b"on")[0] == OK
    # Its number is another descriptor's by and by.
    again = os.pipe()
    seen: list[bytes] = []
    assert again[0] == reading
    device.in_loop(lambda: host.add_reader(again[0], lambda: seen.append(os.read(again[0], 9))))
    os.write(again[1], b"x")
    until(lambda: seen == [b"x"])
    device.in_loop(lambda: host.remove_reader(again[0]))
    for fd in (*again, writing):
        os.close(fd)
    assert driver.run(0, b"on")[0] == OK


def test_faulty_buffers_are_failed_and_seen_to_be(
    device: Speaker, driver: Driver, serving: Serving
) -> None:
    ring = driver.rings[1]
    for number in range(3):
        ring.offer(ring.put_chain(number, Desc(driver.SIZE, 64, WRITE)))
    last = post(driver, 64)
    until(lambda: device.available)
    until(lambda: device.queue.send(b"good"))
    driver.wait(1, last)
    assert [ring.used_entry(number)[1] for number in range(3)] == [0, 0, 0]
    assert got(driver, last) == b"good"
    assert serving.stats.failed_requests == 3
    assert serving.stats.requests == 4


def test_faulty_buffers_without_end_do_not_keep_the_device(device: Speaker, driver: Driver) -> None:
    stop = threading.Event()
    ring = driver.rings[1]
    device.queue.on_available(lambda: device.queue.take())

    def flood() -> None:
        while not stop.is_set():
            while (ring.offered - ring.used_idx) & 0xFFFF < 60:
                ring.offer(ring.put_chain(ring.offered % 64, Desc(driver.SIZE, 64, WRITE)))
            driver.handles[1].kick()

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        until(lambda: ring.used_idx > 200)
        for _ in range(10):
            driver.frontend.sync()
            assert driver.run(0, b"served")[0] == OK
    finally:
        stop.set()
        thread.join()


def test_a_broken_ring_breaks_its_queue_only(device: Speaker, driver: Driver) -> None:
    ring = driver.rings[1]
    ring.offer(200)
    driver.handles[1].kick()
    until(lambda: device.queue.take() is None and driver.handles[1].failed())
    assert device.queue.send(b"x") is False
    assert driver.run(0, b"other")[0] == OK


def test_buffers_are_there_for_the_next_driver(device: Speaker, serving: Serving) -> None:
    for round_number in range(3):
        with Driver(serving.path, queues=2) as driver:
            at = post(driver, 64)
            until(functools.partial(device.queue.send, b"%d" % round_number))
            assert got(driver, at) == b"%d" % round_number
            post(driver, 64)
            taken(device)  # and never completed
        serving.let_go()
    assert serving.alive


def test_memory_that_changes_while_a_buffer_is_held(device: Speaker, driver: Driver) -> None:
    """The buffer is given back unused, and the queue goes on."""
    at = post(driver, 64)
    chain = taken(device)
    device.at_stop = lambda queue: queue == 1 and device.queue.complete(chain, 0)
    driver.frontend.set_memory(driver.memory.insert_region(MmapRegion.memfd(1 << 30, PAGE)))
    driver.frontend.sync()
    assert driver.rings[1].used_entry(at) == (at, 0)
    assert driver.rings[1].used_idx == 1
    again = post(driver, 64)
    until(lambda: device.queue.send(b"new"))
    assert got(driver, again) == b"new"


def test_many_threads_send(device: Speaker, driver: Driver) -> None:
    for number in range(32):
        post(driver, 64, number, kick=number == 31)
    until(lambda: device.available)
    threads = [
        threading.Thread(target=lambda n=n: [device.queue.send(b"%d" % n) for _ in range(8)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    values = [got(driver, number, number) for number in range(32)]
    assert sorted(values) == sorted([b"%d" % n for n in range(4)] * 8)


def test_a_device_without_process_of_its_own_is_not_served_on_other_queues(
    tmp_path: Path,
) -> None:
    class Silent(Device):
        device_id = 61

    with pytest.raises(TypeError, match="Silent has no process method for the requests of queue 0"):
        Serving(Silent(), tmp_path / "s")
