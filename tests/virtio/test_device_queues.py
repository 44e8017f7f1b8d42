"""Queues that belong to the device: it takes buffers when it wants to, from whatever thread.

Everything goes through a real socket: the device is served by a back-end, its driver is the test.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from guestio._core.virtio.chain import Chain
from guestio.addr import Permissions
from guestio.errors import DeviceError
from guestio.guest.dma import IommuMode
from guestio.testing import Driver as ShippedDriver
from guestio.testing import serving as serving_device
from guestio.vhost_user.iotlb_service import MissAction, MissAnswer
from guestio.virtio.device import Device, DeviceId
from guestio.virtio.host import DeviceHost
from guestio.virtio.loop import EventLoop
from guestio.virtio.statistics import Statistics
from tests.kit.rings import PAGE, WRITE, Desc
from tests.kit.serving import (
    OK,
    SLACK,
    WAIT,
    Driver,
    Serving,
    nothing_left,
    promptly,
    until,
    warnings_of,
)

RECEIVE, TRANSMIT, ASKED = 0, 1, 2


class Port(Device):
    """A queue to send on, a queue to take from, and one that is asked as ever.

    Attributes:
        hosts: What :meth:`attached` was given.
        ended: What :meth:`stopping` is to do.
    """

    device_id = DeviceId.CONSOLE
    num_queues = 3
    device_queues = (RECEIVE, TRANSMIT)

    def __init__(self) -> None:
        self.hosts: list[DeviceHost] = []
        self.ended: Callable[[int], object] = lambda _: None

    def attached(self, host: DeviceHost) -> None:
        self.hosts.append(host)

    @property
    def host(self) -> DeviceHost:
        return self.hosts[0]

    def process(self, queue: int, chain: Chain) -> int:
        source = chain.readable.read()
        chain.writable.write(source[::-1] + bytes([OK]))
        return len(source) + 1

    def stopping(self, queue: int) -> None:
        self.ended(queue)


class Guest(Driver):
    """A driver that gives buffers to write, and buffers with data."""

    def __init__(self, serving: Serving, mode: str = "off", **options: Any) -> None:
        self.mode = mode
        options.setdefault("queues", 3)
        super().__init__(serving.path, iommu=mode != "off", map_all=mode == "static", **options)
        self.frontend.iotlb.granularity = PAGE

    def _put(self, index: int, length: int, flags: int, *, announce: bool) -> int:
        ring = self.rings[index]
        number = ring.offered
        place = self.buffer(index, number)
        if self.mode == "strict":
            perm = Permissions.WRITE if flags & WRITE else Permissions.READ
            self.frontend.iotlb.map(self.at(place), place, PAGE, perm)
        ring.offer(ring.put_chain(number % self.size, Desc(self.at(place), length, flags)))
        if announce:
            self.handles[index].kick()
        return number

    def post(self, index: int = RECEIVE, room: int = 64, *, announce: bool = True) -> int:
        """Give a buffer to write; its number."""
        self.memory.write(self.buffer(index, self.rings[index].offered), bytes(room))
        return self._put(index, room, WRITE, announce=announce)

    def give(self, data: bytes, index: int = TRANSMIT) -> int:
        """Give data to read; its number."""
        self.memory.write(self.buffer(index, self.rings[index].offered), data)
        return self._put(index, len(data), 0, announce=True)

    def unmap(self, index: int, number: int) -> None:
        """Revoke the translation of a buffer."""
        if self.mode == "strict":
            self.frontend.iotlb.unmap((self.at(self.buffer(index, number)), PAGE))

    def used(self, index: int = RECEIVE) -> int:
        """How many buffers came back."""
        return self.rings[index].used_idx

    def got(self, number: int, index: int = RECEIVE) -> bytes:
        """What the device wrote to the buffer that came back as the ``number``-th."""
        self.wait(index, number)
        head, written = self.rings[index].used_entry(number)
        place = self.buffer(index, (number & ~(self.size - 1)) + head)
        self.unmap(index, (number & ~(self.size - 1)) + head)
        return self.memory.read(place, written) if written else b""


@pytest.fixture
def port() -> Port:
    return Port()


@pytest.fixture(params=[False, True], ids=["one thread", "queue threads"])
def serving(port: Port, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Serving]:
    with Serving(port, tmp_path / "socket", queue_threads=request.param) as made:
        yield made


@pytest.fixture(params=["off", "static", "strict"])
def guest(serving: Serving, request: pytest.FixtureRequest) -> Iterator[Guest]:
    with Guest(serving, request.param) as made:
        yield made


@pytest.fixture
def plain(serving: Serving) -> Iterator[Guest]:
    with Guest(serving) as made:
        yield made


def in_loop(port: Port, function: Callable[[], Any]) -> Any:
    """What a function returns in the loop's thread, or raises there."""
    outcome: list[Callable[[], Any]] = []

    def call() -> None:
        try:
            value = function()
        except BaseException as error:
            raised = error

            def again() -> None:
                raise raised

            outcome.append(again)
        else:
            outcome.append(lambda: value)

    port.host.call_soon_threadsafe(call)
    until(lambda: outcome, "the loop did not call back")
    return outcome[0]()


def here(port: Port, function: Callable[[], Any]) -> Any:
    return function()


def taken(port: Port, index: int = TRANSMIT) -> Chain:
    """Take a buffer that is there or about to be."""
    found: list[Chain] = []

    def look() -> bool:
        chain = port.host.queue(index).take()
        found.extend([] if chain is None else [chain])
        return bool(found)

    until(look, "there is no buffer")
    return found[0]


def send(port: Port, data: bytes) -> None:
    until(lambda: port.host.queue(RECEIVE).send(data), "there is no buffer to send in")


def refusal(port: Port, data: bytes) -> list[str]:
    """Why data cannot be sent; nothing if there is no buffer yet."""
    try:
        assert port.host.queue(RECEIVE).send(data) is False
    except DeviceError as error:
        return [str(error)]
    return []


@pytest.mark.parametrize("where", [here, in_loop])
class TestOfBothThreads:
    def test_data_is_sent(self, port: Port, guest: Guest, where: Callable[..., Any]) -> None:
        numbers = [guest.post() for _ in range(3)]
        for number, data in zip(numbers, (b"one", b"", b"three" * 12), strict=True):
            until(lambda data=data: where(port, lambda: port.host.queue(RECEIVE).send(data)))
            assert guest.got(number) == data
        assert where(port, lambda: port.host.queue(RECEIVE).send(b"x")) is False

    def test_data_is_taken(self, port: Port, guest: Guest, where: Callable[..., Any]) -> None:
        queue = port.host.queue(TRANSMIT)
        for number, data in enumerate([b"one", b"two" * 100, b"3"]):
            assert where(port, queue.take) is None
            guest.give(data)
            found: list[Chain] = []

            def look(found: list[Chain] = found) -> bool:
                chain = where(port, queue.take)
                found.extend([] if chain is None else [chain])
                return bool(found)

            until(look)
            assert found[0].readable.read() == data
            assert guest.used(TRANSMIT) == number
            assert where(port, lambda found=found: queue.complete(found[0])) is True
            assert guest.got(number, TRANSMIT) == b""

    def test_the_driver_is_notified(
        self, port: Port, plain: Guest, where: Callable[..., Any]
    ) -> None:
        for number in range(3):
            plain.post()
            until(lambda: where(port, lambda: port.host.queue(RECEIVE).send(b"x")))
            plain.wait(RECEIVE, number)
            assert plain.handles[RECEIVE].wait_call(WAIT)


class TestTaking:
    def test_the_callback_says_that_there_are_buffers(self, port: Port, guest: Guest) -> None:
        came: list[bytes] = []
        threads = set()

        def look() -> None:
            threads.add(threading.current_thread().name)
            while (chain := port.host.queue(TRANSMIT).take()) is not None:
                came.append(chain.readable.read())
                port.host.queue(TRANSMIT).complete(chain)

        port.host.queue(TRANSMIT).on_available(look)
        for count in range(1, 80):
            guest.give(b"%d" % count)
            if count % 7 == 0:
                until(lambda count=count: len(came) == count)
                until(lambda count=count: guest.used(TRANSMIT) == count)
                for number in range(count - 7, count):
                    guest.unmap(TRANSMIT, number)
        until(lambda: len(came) == 79)
        assert came == [b"%d" % count for count in range(1, 80)]
        assert len(threads) == 1
        assert "pytest" not in threads.pop()

    def test_the_callback_may_be_set_when_buffers_are_there(self, port: Port, guest: Guest) -> None:
        guest.give(b"x")
        called = threading.Event()
        port.host.queue(TRANSMIT).on_available(called.set)
        assert called.wait(WAIT)
        called.clear()
        port.host.queue(TRANSMIT).on_available(None)
        guest.give(b"y")
        guest.frontend.sync()
        assert not called.is_set()

    def test_nothing_is_taken_by_itself(self, port: Port, guest: Guest) -> None:
        for _ in range(20):
            guest.give(b"x")
        assert guest.run(ASKED, b"other") == (OK, b"rehto") if guest.mode != "strict" else True
        assert guest.used(TRANSMIT) == 0
        assert port.host.outstanding == 0

    def test_of_a_queue_that_does_not_run(self, port: Port, serving: Serving) -> None:
        for queue in map(port.host.queue, (RECEIVE, TRANSMIT)):
            assert queue.take() is None
            assert queue.send(b"x") is False

    def test_of_a_disabled_queue(self, port: Port, plain: Guest) -> None:
        plain.post()
        chain = taken(port, RECEIVE)
        plain.post()
        plain.frontend.enable_queue(RECEIVE, enable=False)
        queue = port.host.queue(RECEIVE)
        assert queue.take() is None
        chain.writable.write(b"late")
        assert queue.complete(chain, 4) is True
        plain.frontend.sync()
        assert plain.used() == 0, "a disabled queue is left alone"
        plain.frontend.enable_queue(RECEIVE, enable=True)
        assert plain.got(0) == b"late"
        send(port, b"next")
        assert plain.got(1) == b"next"

    def test_buffers_whose_memory_is_not_there_are_failed(self, port: Port, plain: Guest) -> None:
        queue, ring = port.host.queue(RECEIVE), plain.rings[RECEIVE]
        for _ in range(3):
            for _ in range(plain.size):
                ring.offer(ring.put_chain(ring.offered % plain.size, Desc(1 << 40, 16, WRITE)))
            plain.handles[RECEIVE].kick()
            until(lambda: queue.take() is None and plain.used() == ring.offered)
            assert {ring.used_entry(number)[1] for number in range(plain.size)} == {0}
        assert port.host.statistics.failed_requests == 3 * plain.size
        number = plain.post()
        send(port, b"well")
        assert plain.got(number) == b"well"

    def test_of_a_broken_ring(self, port: Port, plain: Guest) -> None:
        plain.post()
        chain = taken(port, RECEIVE)
        plain.rings[RECEIVE].set_avail_idx(40000)
        queue = port.host.queue(RECEIVE)
        assert queue.take() is None
        until(plain.handles[RECEIVE].failed)
        assert queue.take() is None
        assert queue.send(b"x") is False
        assert queue.complete(chain, 0) is False
        assert plain.run(ASKED, b"fine") == (OK, b"enif")
        assert "stuck" in repr(queue)

    def test_more_than_the_device_may_hold(
        self, port: Port, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("guestio.virtio.host.OUTSTANDING_PIECES", 100)
        held: list[Chain] = []
        with Serving(port, tmp_path / "socket") as serving, Guest(serving) as guest:
            queue = port.host.queue(RECEIVE)

            def hold() -> None:
                while (chain := queue.take()) is not None:
                    held.append(chain)

            queue.on_available(hold)
            for _ in range(30):
                guest.post()
            until(lambda: held)
            guest.frontend.sync()
            most = len(held)
            assert most < 30
            for done in range(30):
                until(lambda done=done: len(held) > done)
                assert len(held) <= most + done
                assert queue.complete(held[done], 0) is True
            until(lambda: guest.used() == 30)


class TestCompleting:
    def test_several_are_seen_at_once(self, port: Port, plain: Guest) -> None:
        ring = plain.rings[RECEIVE]
        seen = set()
        for _ in range(40):
            start = plain.used()
            for _ in range(8):
                plain.post()
            chains = [taken(port, RECEIVE) for _ in range(8)]
            done = threading.Event()

            def complete(chains: list[Chain] = chains, done: threading.Event = done) -> None:
                queue = port.host.queue(RECEIVE)
                assert queue.complete_all((chain, 0) for chain in chains) == 8
                done.set()

            thread = threading.Thread(target=complete)
            thread.start()
            while not done.is_set():
                seen.add((ring.used_idx - start) & 0xFFFF)
            thread.join()
            until(lambda start=start: (plain.used() - start) & 0xFFFF == 8)
        assert seen <= {0, 8}

    def test_all_or_none(self, port: Port, plain: Guest) -> None:
        plain.post()
        plain.post()
        queue = port.host.queue(RECEIVE)
        first, second = taken(port, RECEIVE), taken(port, RECEIVE)
        with pytest.raises(DeviceError, match="room for 64 bytes"):
            queue.complete_all([(first, 1), (second, 65)])
        assert plain.used() == 0
        assert port.host.outstanding == 2
        assert queue.complete_all([(first, 1), (second, 64), (first, 1)]) == 2
        until(lambda: plain.used() == 2)

    @pytest.mark.parametrize("written", [-1, 65, None, "1", 1.5, True, 1 << 80])
    def test_nonsense_is_refused_and_the_buffer_still_held(
        self, port: Port, plain: Guest, written: Any
    ) -> None:
        plain.post()
        chain = taken(port, RECEIVE)
        queue = port.host.queue(RECEIVE)
        with pytest.raises(DeviceError, match="Port completes a buffer of queue 0"):
            queue.complete(chain, written)
        assert plain.used() == 0
        chain.writable.write(b"still")
        assert queue.complete(chain, 5) is True
        assert plain.got(0) == b"still"

    def test_what_is_no_buffer(self, port: Port, plain: Guest) -> None:
        with pytest.raises(TypeError, match="Port completes 3"):
            port.host.queue(RECEIVE).complete(3)  # type: ignore[arg-type]

    def test_twice(self, port: Port, plain: Guest, caplog: pytest.LogCaptureFixture) -> None:
        plain.post()
        chain = taken(port, RECEIVE)
        queue = port.host.queue(RECEIVE)
        assert queue.complete(chain, 0) is True
        assert queue.complete(chain, 5) is False
        assert any("Port completes a buffer that it does" in line for line in warnings_of(caplog))
        plain.wait(RECEIVE, 0)
        plain.post()
        send(port, b"next")
        assert plain.got(1) == b"next"
        assert plain.used() == 2

    def test_on_another_queue(self, port: Port, plain: Guest) -> None:
        plain.post()
        chain = taken(port, RECEIVE)
        assert port.host.queue(TRANSMIT).complete(chain, 0) is False
        assert port.host.queue(RECEIVE).complete(chain, 0) is True

    def test_after_a_stop(
        self, port: Port, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with (
            Serving(port, tmp_path / "socket", stop_timeout=0.1) as serving,
            Guest(serving) as guest,
        ):
            guest.post()
            chain = taken(port, RECEIVE)
            assert guest.stop(RECEIVE) == 1
            assert guest.rings[RECEIVE].used_entry(0) == (0, 0)
            assert guest.used() == 1
            assert port.host.queue(RECEIVE).complete(chain, 64) is False
            assert any("Port completes a buffer that it" in line for line in warnings_of(caplog))
            assert any("that Port has not answered" in line for line in warnings_of(caplog))
            guest.start(RECEIVE, 1)
            guest.post()
            send(port, b"again")
            assert guest.got(1) == b"again"

    def test_while_a_call_moves_its_memory(self, port: Port, guest: Guest) -> None:
        """A system call that writes to the buffer ends before the driver gets it."""
        reading, writing = os.pipe()
        number = guest.post(room=8)
        chain = taken(port, RECEIVE)
        thread = threading.Thread(target=lambda: chain.writable.from_file(reading, count=8))
        thread.start()
        until(chain.in_use)
        assert port.host.queue(RECEIVE).complete(chain, 8) is True
        time.sleep(0.05)
        assert guest.used() == 0
        os.write(writing, b"finally!")
        thread.join(WAIT)
        assert guest.got(number) == b"finally!"
        os.close(reading)
        os.close(writing)


class TestSending:
    def test_more_than_fits(self, port: Port, guest: Guest) -> None:
        number = guest.post(room=10)
        refusals: list[str] = []
        until(lambda: refusals.extend(refusal(port, b"x" * 11)) or refusals)
        assert refusals == ["Port sends 11 bytes on queue 0, whose next buffer has room for 10"]
        assert port.host.outstanding == 0
        assert guest.used() == 0
        send(port, b"x" * 10)
        assert guest.got(number) == b"x" * 10

    def test_to_a_buffer_without_room(self, port: Port, plain: Guest) -> None:
        plain.give(b"readable", RECEIVE)
        until(lambda: refusal(port, b"x"))
        assert plain.used() == 0

    @pytest.mark.parametrize("data", [bytearray(b"abcd"), memoryview(b"abcd")])
    def test_any_bytes(self, port: Port, plain: Guest, data: Any) -> None:
        plain.post()
        send(port, data)
        assert plain.got(0) == b"abcd"

    @pytest.mark.parametrize("data", ["text", None, 5])
    def test_what_are_no_bytes(self, port: Port, plain: Guest, data: Any) -> None:
        plain.post()
        with pytest.raises(TypeError):
            port.host.queue(RECEIVE).send(data)
        assert port.host.outstanding == 0

    def test_from_many_threads(self, port: Port, guest: Guest) -> None:
        """Each message comes once, each thread's in order, while the loop does other things."""
        queue, count = port.host.queue(RECEIVE), 60
        sent = 0
        received: list[bytes] = []

        def work(name: int) -> None:
            for number in range(count):
                until(lambda number=number: queue.send(b"%d.%d" % (name, number)))

        with ThreadPoolExecutor(3) as pool:
            calls = [pool.submit(work, name) for name in range(3)]
            for _ in range(8):
                guest.post()
                sent += 1
            while len(received) < 3 * count:
                received.append(guest.got(len(received)))
                if sent < 3 * count:
                    guest.post()
                    sent += 1
            for call in calls:
                call.result(WAIT)
        for name in range(3):
            mine = [data for data in received if data.startswith(b"%d." % name)]
            assert mine == [b"%d.%d" % (name, number) for number in range(count)]

    def test_a_thread_that_sends_without_pause_keeps_nothing_waiting(
        self, port: Port, plain: Guest
    ) -> None:
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                port.host.queue(RECEIVE).send(b"x")

        with ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(work) for _ in range(2)]
            try:
                began = time.monotonic()
                for _ in range(5):
                    plain.post()
                    assert plain.run(ASKED, b"go") == (OK, b"og")
                    base = plain.stop(RECEIVE)
                    plain.start(RECEIVE, base)
                assert time.monotonic() - began < 10 * SLACK
            finally:
                stop.set()
            for call in calls:
                call.result(WAIT)


class TestForeignQueues:
    def test_a_queue_that_is_not_the_devices(self, port: Port, plain: Guest) -> None:
        queue = port.host.queue(ASKED)
        for call in (queue.take, lambda: queue.send(b"x"), lambda: queue.on_available(None)):
            with pytest.raises(DeviceError, match=r"Port calls .* of queue 2, which is not in its"):
                call()
        with pytest.raises(DeviceError, match="not in its device_queues"):
            queue.complete(None)  # type: ignore[arg-type]
        assert plain.run(ASKED, b"fine") == (OK, b"enif")

    def test_a_queue_that_is_not_there(self, port: Port, serving: Serving) -> None:
        for index in (-1, 3, 1 << 70):
            with pytest.raises(DeviceError, match="Port has 3 queues"):
                port.host.queue(index)

    @pytest.mark.parametrize(
        ("queues", "error"),
        [((3,), ValueError), ((-1,), ValueError), (5, TypeError), (("0",), TypeError)],
    )
    def test_device_queues_that_are_none(
        self, tmp_path: Path, queues: Any, error: type[Exception]
    ) -> None:
        class Wrong(Port):
            device_queues = queues

        with nothing_left(), pytest.raises(error, match=r"Wrong\.device_queues"):
            Serving(Wrong(), tmp_path / "socket")

    def test_attached_once(self, port: Port, serving: Serving) -> None:
        for _ in range(2):
            with Guest(serving):
                pass
            serving.let_go()
        assert len(port.hosts) == 1


class TestStops:
    def test_buffers_that_wait_delay_nothing(self, port: Port, tmp_path: Path) -> None:
        with Serving(port, tmp_path / "socket", stop_timeout=100.0) as serving:
            with Guest(serving, "strict") as guest:
                numbers = [guest.post() for _ in range(32)]
                send(port, b"first")
                assert guest.got(0) == b"first"
                began = time.monotonic()
                # Of a buffer that was translated, and of the others.
                for number in numbers[1:8]:
                    guest.unmap(RECEIVE, number)
                assert guest.stop(RECEIVE) == 1
                assert port.host.queue(RECEIVE).take() is None
            serving.let_go()
            assert time.monotonic() - began < 10 * SLACK

    def test_what_is_completed_during_a_stop_is_not_lost(self, port: Port, tmp_path: Path) -> None:
        with (
            Serving(port, tmp_path / "socket", stop_timeout=100.0) as serving,
            Guest(serving) as guest,
        ):
            queue = port.host.queue(RECEIVE)
            guest.post()
            guest.post()
            chain = taken(port, RECEIVE)
            stopping = threading.Event()
            port.ended = lambda _: stopping.set()
            taken_meanwhile: list[Chain | None] = []

            def work() -> None:
                assert stopping.wait(WAIT)
                time.sleep(0.05)
                # The stop holds the queue while it waits for this thread.
                taken_meanwhile.append(queue.take())
                assert queue.send(b"x") is False
                chain.writable.write(b"in time")
                assert queue.complete(chain, 7) is True

            with ThreadPoolExecutor(1) as pool:
                call = pool.submit(work)
                began = time.monotonic()
                assert guest.stop(RECEIVE) == 1
                assert time.monotonic() - began < 10 * SLACK
                call.result(WAIT)
            assert taken_meanwhile == [None]
            assert guest.got(0) == b"in time"
            guest.start(RECEIVE, 1)
            guest.handles[RECEIVE].kick()
            send(port, b"later")
            assert guest.got(1) == b"later"

    def test_another_queue_changes_while_a_stop_waits(self, port: Port, tmp_path: Path) -> None:
        """Memory changes with all queues held; the thread that is waited for takes of another."""
        with (
            Serving(port, tmp_path / "socket", stop_timeout=100.0) as serving,
            Guest(serving) as guest,
        ):
            guest.give(b"data")
            guest.post()
            chain = taken(port, TRANSMIT)
            stopping = threading.Event()
            port.ended = lambda _: stopping.set()

            def work() -> None:
                assert stopping.wait(WAIT)
                time.sleep(0.05)
                port.host.queue(RECEIVE).take()
                assert port.host.queue(TRANSMIT).complete(chain) is True

            with ThreadPoolExecutor(1) as pool:
                call = pool.submit(work)
                began = time.monotonic()
                guest.frontend.set_memory(guest.memory, slots=False)
                assert time.monotonic() - began < 10 * SLACK
                call.result(WAIT)
            until(lambda: guest.used(TRANSMIT) == 1)

    @pytest.mark.parametrize("where", ["stop", "reset", "disconnect"])
    def test_what_is_held_is_given_back_after_a_while(
        self, port: Port, tmp_path: Path, where: str
    ) -> None:
        with (
            nothing_left(),
            Serving(port, tmp_path / "socket", stop_timeout=0.2) as serving,
            Guest(serving) as guest,
        ):
            queue = port.host.queue(RECEIVE)
            guest.post()
            chain = taken(port, RECEIVE)
            with promptly(1.0):
                if where == "stop":
                    assert guest.stop(RECEIVE) == 1
                elif where == "reset":
                    guest.frontend.reset_device()
                else:
                    guest.frontend.close()
                    serving.let_go()
            assert guest.rings[RECEIVE].used_entry(0) == (0, 0)
            assert len(chain.writable) == 0
            assert queue.complete(chain, 0) is False
            assert port.host.outstanding == 0
            del chain

    def test_a_stop_in_which_the_device_completes(self, port: Port, tmp_path: Path) -> None:
        with (
            Serving(port, tmp_path / "socket", stop_timeout=100.0) as serving,
            Guest(serving) as guest,
        ):
            guest.post()
            chain = taken(port, RECEIVE)
            chain.writable.write(b"hasty")

            def end(index: int) -> None:
                if index == RECEIVE:
                    assert port.host.queue(RECEIVE).complete(chain, 5)

            port.ended = end
            assert guest.stop(RECEIVE) == 1
            assert guest.got(0) == b"hasty"

    def test_nothing_is_taken_while_the_queue_is_let_go(self, port: Port, tmp_path: Path) -> None:
        """Not by the device's own answer to what fails, in the thread that stops the queue."""
        found: list[Chain | None] = []

        def fail(queue: int, chain: Chain) -> int:
            found.append(port.host.queue(queue).take())
            return 0

        port.fail = fail  # type: ignore[method-assign]
        with (
            Serving(port, tmp_path / "socket", stop_timeout=0.05) as serving,
            Guest(serving) as guest,
        ):
            guest.post()
            guest.post()
            taken(port, RECEIVE)
            guest.frontend.set_memory(guest.memory, slots=False)
            assert found == [None]
            assert port.host.outstanding == 0
            send(port, b"still there")
            assert guest.got(1) == b"still there"

    def test_a_socket_that_is_closed_already(self, port: Port, serving: Serving) -> None:
        ours, theirs = socket.socketpair()
        port.host.add_reader(ours, lambda: None)
        ours.close()
        theirs.close()
        port.host.remove_reader(ours)

    def test_what_a_crash_left_is_taken_again(self, port: Port, tmp_path: Path) -> None:
        """Requests in flight are noted; the next back-end takes them one after the other."""
        with Serving(port, tmp_path / "one", stop_timeout=0.1) as first:
            guest = Guest(first, inflight=True)
            for number in range(6):
                guest.give(b"%d" % number)
            chains = [taken(port) for _ in range(5)]
            assert port.host.queue(TRANSMIT).complete(chains[2])
            until(lambda: guest.used(TRANSMIT) == 1)
            kept = guest.memory.read(0x30000 + 0x1000 * TRANSMIT, 0x400)
            region = guest.region
            assert region is not None
            notes = os.pread(region[1], region[0].mmap_size, 0)
        # As if the first had been killed: what its stop did is undone.
        guest.memory.write(0x30000 + 0x1000 * TRANSMIT, kept)
        os.pwrite(region[1], notes, 0)
        other = Port()
        with Serving(other, tmp_path / "two") as second:
            guest.reconnect(second.path)
            came = []
            for _ in range(5):
                chain = taken(other)
                came.append(chain.readable.read())
                assert other.host.outstanding == 1
                assert other.host.queue(TRANSMIT).complete(chain)
            assert other.host.queue(TRANSMIT).take() is None
            assert sorted(came) == [b"0", b"1", b"3", b"4", b"5"]
            until(lambda: guest.used(TRANSMIT) == 6)
            guest.close()


class TestTranslations:
    def test_a_buffer_is_translated_when_it_is_taken(self, port: Port, serving: Serving) -> None:
        with Guest(serving, "strict") as guest:
            asked: list[int] = []

            def note(miss: Any) -> MissAnswer:
                asked.append(miss.iova)
                return MissAnswer()

            guest.post()
            guest.frontend.sync()
            guest.frontend.iotlb.miss_hook = note
            number = guest.post()
            guest.frontend.sync()
            time.sleep(0.02)
            assert guest.at(guest.buffer(RECEIVE, number)) not in asked
            available = threading.Event()
            port.host.queue(RECEIVE).on_available(available.set)
            assert available.wait(WAIT)
            send(port, b"x")
            assert guest.at(guest.buffer(RECEIVE, 0)) in asked

    def test_the_callback_says_that_a_translation_came(self, port: Port, serving: Serving) -> None:
        with Guest(serving, "strict") as guest:
            guest.frontend.iotlb.miss_hook = lambda miss: MissAnswer(delay=0.05)
            sent: list[bytes] = []

            def try_again() -> None:
                if not sent and port.host.queue(RECEIVE).send(b"patience"):
                    sent.append(b"patience")

            port.host.queue(RECEIVE).on_available(try_again)
            number = guest.post()
            assert guest.got(number) == b"patience"

    @pytest.mark.parametrize("answer", [MissAction.REFUSE, MissAction.IGNORE])
    def test_a_refused_buffer_fails_and_the_next_is_taken(
        self, port: Port, tmp_path: Path, answer: MissAction, caplog: pytest.LogCaptureFixture
    ) -> None:
        with (
            Serving(port, tmp_path / "socket", miss_timeout=2.0) as serving,
            Guest(serving, "strict") as guest,
        ):
            bad = guest.at(guest.buffer(RECEIVE, 0))
            guest.frontend.iotlb.miss_hook = lambda miss: (
                MissAnswer(answer) if miss.iova == bad else MissAnswer()
            )
            guest.post()
            guest.post()
            until(lambda: port.host.queue(RECEIVE).send(b"good"))
            assert guest.got(1) == b"good"
            assert guest.rings[RECEIVE].used_entry(0) == (0, 0)
            assert serving.stats.failed_requests == 1
            assert any("queue 0: request refused" in line for line in warnings_of(caplog))

    def test_a_ring_that_came_takes_no_time_from_its_first_buffer(
        self, port: Port, serving: Serving
    ) -> None:
        """The device may take it much later; its wait does not count from the ring's on."""
        with Guest(serving, "strict") as guest:
            queue = port.host.queue(RECEIVE)
            number = guest.post()
            until(lambda: serving.stats.iotlb_misses)
            until(lambda: queue._stalled_at is None)
            send(port, b"late")
            assert guest.got(number) == b"late"
            assert serving.stats.failed_requests == 0

    def test_a_revocation_takes_what_is_held_too_long(self, port: Port, tmp_path: Path) -> None:
        with (
            Serving(port, tmp_path / "socket", stop_timeout=0.2) as serving,
            Guest(serving, "strict") as guest,
        ):
            guest.post()
            chain = taken(port, RECEIVE)
            guest.unmap(RECEIVE, 0)
            assert len(chain.writable) == 0
            assert port.host.queue(RECEIVE).complete(chain, 3) is False
            guest.wait(RECEIVE, 0)
            assert guest.rings[RECEIVE].used_entry(0) == (0, 0)

    def test_a_revocation_waits_for_what_is_held(self, port: Port, tmp_path: Path) -> None:
        with (
            Serving(port, tmp_path / "socket", stop_timeout=100.0) as serving,
            Guest(serving, "strict") as guest,
            ThreadPoolExecutor(1) as pool,
        ):
            guest.post()
            chain = taken(port, RECEIVE)
            gone = pool.submit(guest.unmap, RECEIVE, 0)
            time.sleep(0.05)
            assert not gone.done()
            chain.writable.write(b"held")
            assert port.host.queue(RECEIVE).complete(chain, 4) is True
            gone.result(WAIT)
            assert guest.memory.read(guest.buffer(RECEIVE, 0), 4) == b"held"

    def test_translations_that_go_at_any_time(self, port: Port, serving: Serving) -> None:
        """Invalidations of the ring and the buffers while two threads take and complete."""
        with Guest(serving, "strict") as guest, ThreadPoolExecutor(2) as pool:
            stop = threading.Event()
            sent = [0, 0]

            def work(which: int) -> None:
                while not stop.is_set():
                    sent[which] += port.host.queue(RECEIVE).send(b"data %d" % which)

            layout = guest.layout(RECEIVE)
            calls = [pool.submit(work, which) for which in range(2)]
            try:
                for number in range(60):
                    guest.post()
                    if number % 3 == 0:
                        for at in (layout.used, layout.avail, layout.desc):
                            guest.frontend.iotlb.invalidate((at, PAGE))
                    assert guest.got(number).startswith(b"data ")
            finally:
                stop.set()
            for call in calls:
                call.result(WAIT)
            assert sum(sent) == 60


class TestCallbacks:
    def test_one_that_raises_is_reported(
        self, port: Port, plain: Guest, caplog: pytest.LogCaptureFixture
    ) -> None:
        calls: list[None] = []

        def fail() -> None:
            calls.append(None)
            while port.host.queue(TRANSMIT).take() is not None:
                pass
            raise RuntimeError("by mistake")

        port.host.queue(TRANSMIT).on_available(fail)
        plain.give(b"x")
        until(lambda: calls)
        count = len(calls)
        plain.give(b"y")
        until(lambda: len(calls) > count)
        assert plain.run(ASKED, b"fine") == (OK, b"enif")
        assert any(
            "queue 1: the on_available callback of Port raised RuntimeError: by mistake" in line
            for line in warnings_of(caplog)
        )

    def test_what_cannot_be_called(self, port: Port, serving: Serving) -> None:
        host: Any = port.host
        for call in (
            lambda: host.queue(RECEIVE).on_available(3),
            lambda: host.call_soon_threadsafe(None),
            lambda: host.call_later(1, "x"),
            lambda: host.add_reader(0, None),
        ):
            with pytest.raises(TypeError, match="callback must be callable"):
                call()

    def test_a_reader(self, port: Port, serving: Serving) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            came: list[bytes] = []
            port.host.add_reader(ours, lambda: came.append(ours.recv(10)))
            for data in (b"one", b"two"):
                theirs.send(data)
                until(lambda data=data: came and came[-1] == data)
            # The same descriptor again: the callback is another one now.
            port.host.add_reader(ours.fileno(), lambda: came.append(ours.recv(10).upper()))
            theirs.send(b"three")
            until(lambda: came[-1] == b"THREE")
            port.host.remove_reader(ours)
            port.host.remove_reader(ours)
            theirs.send(b"four")
            in_loop(port, lambda: None)
            assert came[-1] == b"THREE"

    def test_a_reader_that_raises_is_not_called_again(
        self, port: Port, serving: Serving, caplog: pytest.LogCaptureFixture
    ) -> None:
        event = os.eventfd(1, os.EFD_NONBLOCK)
        calls: list[None] = []

        def fail() -> None:
            calls.append(None)
            raise ZeroDivisionError

        try:
            port.host.add_reader(event, fail)
            until(lambda: calls)
            for _ in range(5):
                in_loop(port, lambda: None)
            assert len(calls) == 1
            name = f"the reader of descriptor {event} of Port raised ZeroDivisionError"
            assert any(name in line for line in warnings_of(caplog))
            port.host.add_reader(event, lambda: calls.append(os.eventfd_read(event)))
            until(lambda: len(calls) == 2)
        finally:
            port.host.remove_reader(event)
            os.close(event)

    def test_a_reader_of_what_cannot_be_read(
        self, port: Port, plain: Guest, tmp_path: Path
    ) -> None:
        event = os.eventfd(0)
        os.close(event)
        closed = socket.socket()
        closed.close()
        file = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
        try:
            for fd in (event, closed, file, -1):
                with pytest.raises(OSError):
                    port.host.add_reader(fd, lambda: None)
        finally:
            os.close(file)
        assert plain.run(ASKED, b"fine") == (OK, b"enif")

    def test_a_descriptor_that_was_closed_and_is_the_transports_now(
        self, port: Port, serving: Serving
    ) -> None:
        """A device's stale number must not take a kick away from another queue."""
        stale = [os.eventfd(0) for _ in range(64)]
        for fd in stale:
            port.host.add_reader(fd, lambda: None)
        for fd in stale:
            os.close(fd)
        with Guest(serving) as guest:
            theirs = [fd for fd in stale if not _is_free(fd)]
            assert theirs, "the front-end's descriptors have other numbers"
            refused = 0
            for fd in theirs:
                try:
                    port.host.add_reader(fd, lambda: None)
                except DeviceError as error:
                    assert "its transport's" in str(error)  # noqa: PT017 - some are of the test
                    refused += 1
                except OSError:
                    pass
                port.host.remove_reader(fd)
            assert refused
            for index in range(3):
                guest.handles[index].kick()
            assert guest.run(ASKED, b"fine") == (OK, b"enif")

    @pytest.mark.parametrize("where", [here, in_loop])
    def test_timers(self, port: Port, serving: Serving, where: Callable[..., Any]) -> None:
        came: list[int] = []
        began = time.monotonic()

        def arm() -> None:
            for number in (3, 1, 2, 0):
                port.host.call_later(0.2 * number, lambda number=number: came.append(number))
            port.host.call_later(WAIT, lambda: came.append(99)).cancel()
            port.host.call_later(-5, lambda: came.append(-5))

        where(port, arm)
        until(lambda: len(came) == 5)
        assert sorted(came) == [-5, 0, 1, 2, 3]
        assert [each for each in came if each > 0] == [1, 2, 3]
        assert time.monotonic() - began >= 0.6

    def test_timers_of_many_threads_are_all_called(self, port: Port, serving: Serving) -> None:
        """No timer is forgotten because the loop was looking at the others."""
        came: list[None] = []

        def arm() -> None:
            for number in range(300):
                port.host.call_later(0.0001 * (number % 5), lambda: came.append(None))

        with ThreadPoolExecutor(4) as pool:
            for call in [pool.submit(arm) for _ in range(4)]:
                call.result(WAIT)
        until(lambda: len(came) == 1200)

    @pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 1e300])
    def test_times_that_are_none(self, port: Port, serving: Serving, seconds: float) -> None:
        with pytest.raises(ValueError, match="seconds"):
            port.host.call_later(seconds, lambda: None)

    def test_callbacks_that_raise(
        self, port: Port, plain: Guest, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail() -> None:
            raise RuntimeError("oh")

        port.host.call_soon_threadsafe(fail)
        port.host.call_later(0, fail)
        for what in ("a callback", "a timer"):
            line = f"{what} of Port raised RuntimeError: oh"
            until(lambda line=line: any(line in each for each in warnings_of(caplog)))
        assert plain.run(ASKED, b"fine") == (OK, b"enif")

    def test_callbacks_are_called_between_drivers(self, port: Port, serving: Serving) -> None:
        with Guest(serving):
            pass
        serving.let_go()
        assert in_loop(port, lambda: port.host.queue(RECEIVE).take()) is None


def _is_free(fd: int) -> bool:
    """Whether no descriptor has this number."""
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False


class _Wire:
    """A transport that only notes what it is told."""

    tracked = False

    def __init__(self) -> None:
        self.changes = 0

    def ring_layout(self, index: int, *, event_idx: bool) -> None:
        return None

    def inflight_notes(self, index: int, size: int) -> None:
        return None

    def config_changed(self) -> None:
        self.changes += 1


def test_a_changed_configuration_is_told_in_the_loop() -> None:
    loop = EventLoop()
    with contextlib.closing(loop):
        port, wire = Port(), _Wire()
        host = DeviceHost(port, loop, Statistics(), stop_timeout=1)
        host.config_changed()
        loop.run_once()
        host.connect(wire, host.translator)
        host.config_changed()
        assert wire.changes == 0
        loop.run_once()
        assert wire.changes == 1


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda host: host.queue("0"), "Port calls queue with '0', which is no index"),
        (lambda host: host.queue(0.0), "Port calls queue with 0.0, which is no index"),
        (lambda host: host.call_later("x", print), "Port calls call_later with 'x'"),
        (lambda host: host.add_reader("x", print), "Port calls add_reader with 'x'"),
    ],
)
def test_arguments_of_the_wrong_type_are_named(
    port: Port, tmp_path: Path, call: Callable[[Any], object], said: str
) -> None:
    with Serving(port, tmp_path / "socket"), pytest.raises(TypeError, match=said):
        call(port.host)


def test_a_device_that_is_served_no_more_watches_nothing(port: Port, tmp_path: Path) -> None:
    with Serving(port, tmp_path / "socket"):
        pass
    reading, writing = os.pipe()
    try:
        with pytest.raises(DeviceError, match="Port calls add_reader, but what serves it is clos"):
            port.host.add_reader(reading, print)
    finally:
        os.close(reading)
        os.close(writing)


class Parser(Device):
    """Takes what its driver sends, one buffer a call if it is bad, and stumbles over that."""

    device_id = DeviceId.CONSOLE
    device_queues = (0,)

    def __init__(self, keeps: bool) -> None:
        self.keeps = keeps
        self.got: list[bytes] = []
        self.calls = 0

    def attached(self, host: DeviceHost) -> None:
        self.queue = host.queue(0)
        self.queue.on_available(self.parse)

    def parse(self) -> None:
        self.calls += 1
        while (chain := self.queue.take()) is not None:
            text = chain.readable.read()
            self.queue.complete(chain)
            if text == b"bad":
                raise ValueError("bad event")
            self.got.append(text)
        if self.keeps:
            raise ValueError("nothing more")


@pytest.mark.parametrize("iommu", ["off", "strict"])
@pytest.mark.parametrize("keeps", [False, True])
def test_a_callback_that_raised_is_called_again(
    iommu: IommuMode, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For buffers that come after it, and for those that were there already."""
    monkeypatch.setattr("guestio.virtio.queue.ANNOUNCE_AGAIN", 0.02)
    parser = Parser(keeps)
    with serving_device(parser) as path, ShippedDriver(path, timeout=WAIT, iommu=iommu) as driver:
        for _ in range(3):
            driver.wait(driver.send(b"bad"))
            driver.wait(driver.send(b"one"))
        hidden = [driver.send(text, publish=False) for text in (b"bad", b"two", b"bad", b"three")]
        for each in [*hidden, driver.send(b"four")]:
            driver.wait(each)
        until(lambda: len(parser.got) == 6)
        assert parser.got == [b"one"] * 3 + [b"two", b"three", b"four"]


def test_a_callback_that_always_raises_is_called_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not in a busy loop, although it leaves buffers."""
    monkeypatch.setattr("guestio.virtio.queue.ANNOUNCE_AGAIN", 1000.0)
    parser = Parser(False)

    def fail() -> None:
        parser.calls += 1
        raise ValueError("always")

    parser.parse = fail  # type: ignore[method-assign]
    with serving_device(parser) as path, ShippedDriver(path, timeout=WAIT) as driver:
        driver.send(b"left")
        until(lambda: parser.calls > 0)
        for _ in range(30):
            driver.config(0, 1)
        assert parser.calls <= 3
