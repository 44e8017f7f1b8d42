"""Requests that take time: what is served meanwhile, how they may end, and who waits for them."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from guestio._core.virtio.chain import Chain
from guestio.errors import DeviceError
from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from guestio.vhost_user.iotlb_service import MissAction, MissAnswer
from guestio.vhost_user.messages import FrontendRequest, MemoryTable, VringAddr
from tests.kit.rings import PAGE, WRITE, Desc
from tests.kit.serving import (
    BUFFERS,
    FAILED,
    OK,
    WAIT,
    Driver,
    Later,
    Serving,
    errors_of,
    nothing_left,
    until,
    warnings_of,
)
from tests.kit.waiting import GLANCE, Waiting, begin, mirrored

EXTRA = 0x4000_0000
"""Guest address of a second region."""


@pytest.fixture
def driver(serving: Serving) -> Iterator[Driver]:
    with Driver(serving.path, queues=2) as made:
        yield made


@pytest.fixture(params=[False, True], ids=["in order", "noted"])
def either(serving: Serving, request: pytest.FixtureRequest) -> Iterator[Driver]:
    """A driver without and with a region for requests in flight."""
    with Driver(serving.path, queues=2, inflight=request.param) as made:
        yield made


class TestMeanwhile:
    def test_others_are_served(self, device: Later, driver: Driver) -> None:
        (slow,) = begin(driver, device, b"LATE")
        quick = driver.submit(0, b"quick")
        for _ in range(3):
            assert driver.run(1, b"other queue") == mirrored(b"other queue")
        until(lambda: (0, b"quick") in device.seen)
        device.finish(b"LATE")
        driver.wait(0, quick)
        assert driver.result(0, slow, 4) == mirrored(b"LATE")
        assert driver.result(0, quick, 5) == mirrored(b"quick")

    @pytest.mark.parametrize("done", list(itertools.permutations(range(3))))
    def test_in_which_order_they_are_shown(
        self, device: Later, either: Driver, done: tuple[int, ...]
    ) -> None:
        sources = [b"LATE %d" % i for i in range(3)]
        numbers = begin(either, device, *sources)
        ring = either.rings[0]
        finished = []
        for i in done:
            device.finish(sources[i])
            finished.append(i)
            ready = next(n for n in range(4) if n not in finished)
            shown = len(finished) if either.region else ready
            until(lambda shown=shown: ring.used_idx == shown)
            # It has had every occasion to show more than that.
            assert either.run(1, b"meanwhile") == mirrored(b"meanwhile")
            either.frontend.sync()
            assert ring.used_idx == shown
        order = list(done) if either.region else [0, 1, 2]
        assert [ring.used_entry(n) for n in range(3)] == [(2 * i, 7) for i in order]
        for number, source in zip(numbers, sources, strict=True):
            assert either.result(0, number, 6) == mirrored(source)

    def test_with_notes_those_behind_are_shown_first(self, device: Later, serving: Serving) -> None:
        with Driver(serving.path, inflight=True) as driver:
            begin(driver, device, b"LATE")
            for i in range(31):
                number = driver.submit(0, b"quick %d" % i)
                until(lambda i=i: driver.rings[0].used_idx == i + 1)
                assert driver.rings[0].used_entry(i)[0] == 2 * number
            device.finish(b"LATE")
            driver.wait(0, 31)
            assert driver.rings[0].used_entry(31) == (0, 5)

    def test_the_driver_is_called_when_they_are_shown(self, device: Later, driver: Driver) -> None:
        handle = driver.handles[0]
        begin(driver, device, b"LATE 0", b"LATE 1")
        handle.clear_call()
        device.finish(b"LATE 1")
        driver.run(1, b"meanwhile")
        driver.frontend.sync()
        assert not handle.wait_call(0), "there is nothing to see yet"
        device.finish(b"LATE 0")
        assert handle.wait_call(WAIT)
        assert driver.rings[0].used_idx == 2

    def test_a_full_ring(self, device: Later, serving: Serving) -> None:
        with Driver(serving.path, size=8) as driver:
            sources = [b"LATE %d" % i for i in range(4)]
            for lap in range(3):
                numbers = begin(driver, device, *sources)
                for source in reversed(sources):
                    device.finish(source)
                driver.wait(0, numbers[-1])
                assert driver.rings[0].used_idx == 4 * (lap + 1)

    def test_one_request_answers_another(self, device: Later, either: Driver) -> None:
        """In the queue's own thread, or in that of another queue."""
        for queue in (0, 1):
            (slow,) = begin(either, device, b"LATE")
            either.submit(queue, b"FINISHLATE")
            either.wait(0, slow)
            assert either.result(0, slow, 4) == mirrored(b"LATE")
            until(lambda: either.done(0, either.rings[0].offered - 1))

    def test_from_many_threads(self, device: Later, either: Driver, serving: Serving) -> None:
        with ThreadPoolExecutor(8) as pool:
            for lap in range(8):
                sources = [b"LATE %d.%d" % (lap, i) for i in range(24)]
                numbers = begin(either, device, *sources)
                list(pool.map(device.finish, sources))
                either.wait(0, numbers[-1])
                for number, source in zip(numbers, sources, strict=True):
                    assert either.result(0, number, len(source)) == mirrored(source)
        assert (serving.stats.requests, serving.stats.failed_requests) == (8 * 24, 0)


class Ending(Later):
    """Answers each request with the next of its futures."""

    def __init__(self) -> None:
        super().__init__()
        self.next: Callable[[], Future[int]] | None = None

    def process(self, queue: int, chain):  # type: ignore[no-untyped-def]
        return super().process(queue, chain) if self.next is None else self.next()


def result(value: object) -> Callable[[Future[int]], None]:
    return lambda future: future.set_result(value)  # type: ignore[arg-type]


def error(value: BaseException) -> Callable[[Future[int]], None]:
    return lambda future: future.set_exception(value)


FAILURES = {
    "refused": error(DeviceError("the disk is on fire")),
    "raised": error(RuntimeError("the disk is on fire")),
    "ended": error(SystemExit(3)),
    "interrupted": error(KeyboardInterrupt()),
    "cancelled": lambda future: future.cancel(),
    "too many": result(6),
    "far too many": result(1 << 70),
    "negative": result(-1),
    "nothing": result(None),
    "text": result("5"),
    "fraction": result(1.0),
    "truth": result(True),
}


class TestEnds:
    @pytest.mark.parametrize("end", FAILURES.values(), ids=FAILURES.keys())
    @pytest.mark.parametrize("early", [False, True], ids=["later", "at once"])
    def test_that_fail_the_request(
        self, tmp_path: Path, end: Callable[[Future[int]], None], early: bool
    ) -> None:
        device = Ending()
        with Serving(device, tmp_path / "socket") as serving, Driver(serving.path) as driver:
            promised: Future[int] = Future()
            if early:
                end(promised)
            device.next = lambda: promised
            number = driver.submit(0, b"text", 4)
            if not early:
                driver.frontend.sync()
                end(promised)
            driver.wait(0, number)
            assert driver.rings[0].used_entry(number) == (2 * number, 0)
            assert serving.stats.failed_requests == 1
            device.next = None
            assert driver.run(0, b"next") == mirrored(b"next")
            assert driver.handles[0].failed() is False
            promised = Future()

    def test_a_failure_is_told_the_driver(self, device: Later, either: Driver) -> None:
        (number,) = begin(either, device, b"LATE")
        device.fail = _failing  # type: ignore[method-assign]
        device.promised(b"LATE").set_exception(DeviceError("no"))
        either.wait(0, number)
        assert either.rings[0].used_entry(number) == (0, 5)
        assert either.result(0, number, 4)[0] == FAILED

    @pytest.mark.parametrize("failure", [DeviceError("no"), RuntimeError("no")])
    def test_a_device_that_fails_to_fail(
        self, device: Later, driver: Driver, failure: Exception
    ) -> None:
        device.fail_error = failure
        (number,) = begin(driver, device, b"LATE")
        device.promised(b"LATE").set_exception(DeviceError("no"))
        driver.wait(0, number)
        assert driver.rings[0].used_entry(number) == (0, 0)
        assert driver.run(0, b"next") == mirrored(b"next")

    def test_done_already_by_the_hundred(self, serving: Serving, device: Later) -> None:
        done: Future[int] = Future()
        done.set_result(0)
        device.process = lambda *_: done  # type: ignore[method-assign]
        with Driver(serving.path, size=256) as driver:
            numbers = [driver.prepare(0, b"text") for _ in range(120)]
            driver.handles[0].kick()
            driver.wait(0, numbers[-1])

    def test_numbers_of_another_library(self, device: Later, driver: Driver) -> None:
        """At once or late, they are numbers."""
        number = driver.submit(0, b"RETURN__import__('numpy').int64(3)")
        driver.wait(0, number)
        assert driver.rings[0].used_entry(number) == (2 * number, 3)
        (number,) = begin(driver, device, b"LATE")
        device.promised(b"LATE").set_result(np.int64(2))  # type: ignore[arg-type]
        driver.wait(0, number)
        assert driver.rings[0].used_entry(number) == (2 * number, 2)

    def test_a_device_that_leaves_while_it_fails(self, device: Later, driver: Driver) -> None:
        """Its thread is its own; the queue can be stopped, and goes on."""

        def leave(queue: int, chain: object) -> int:
            raise SystemExit(3)

        (number,) = begin(driver, device, b"LATE")
        device.fail = leave  # type: ignore[method-assign]
        with pytest.raises(SystemExit):
            device.promised(b"LATE").set_exception(RuntimeError("no"))
        assert driver.stop(0) == 1
        assert driver.rings[0].used_entry(number) == (2 * number, 0)
        driver.start(0, 1)
        assert driver.run(0, b"next") == mirrored(b"next")

    def test_a_device_that_keeps_its_promise(self, device: Later, serving: Serving) -> None:
        """What was promised and is done keeps nothing of the front-end's memory."""
        with nothing_left():
            driver = Driver(serving.path)
            begin(driver, device, b"LATE")
            promised = device.promised(b"LATE")
            promised.set_result(0)
            driver.wait(0, 0)
            driver.close()
        assert promised.done()

    def test_nothing_is_written_where_nothing_may_be(self, device: Later, driver: Driver) -> None:
        ring = driver.rings[0]
        driver.memory.write(BUFFERS, b"LATE")
        ring.offer(ring.put_chain(0, Desc(BUFFERS, 4)))
        driver.handles[0].kick()
        device.expect(b"LATE")
        device.promised(b"LATE").set_result(1)
        driver.wait(0, 0)
        assert ring.used_entry(0) == (0, 0)

    def test_a_late_failure_is_logged(
        self, device: Later, driver: Driver, caplog: pytest.LogCaptureFixture
    ) -> None:
        begin(driver, device, b"LATE")
        device.promised(b"LATE").set_exception(DeviceError("the disk is on fire"))
        driver.wait(0, 0)
        assert warnings_of(caplog) == [
            (
                "queue 0: request failed: the future of Later.process ended with DeviceError: "
                "the disk is on fire"
            )
        ]
        assert errors_of(caplog) == []

    def test_requests_with_faults_among_them(self, device: Later, serving: Serving) -> None:
        with Driver(serving.path, iommu=True) as driver:
            hole = 0x6000_0000
            driver.frontend.iotlb.miss_hook = lambda message: MissAnswer(
                MissAction.REFUSE if message.iova == hole else MissAction.ANSWER
            )
            (first,) = begin(driver, device, b"LATE 1")
            ring = driver.rings[0]
            head = ring.put_chain(40, Desc(hole, 8), Desc(driver.at(BUFFERS) + PAGE - 1, 1, WRITE))
            ring.offer(head)
            driver.handles[0].kick()
            (third,) = begin(driver, device, b"LATE 3")
            until(lambda: serving.stats.failed_requests == 1)
            assert ring.used_idx == 0
            device.finish(b"LATE 3")
            device.finish(b"LATE 1")
            driver.wait(0, third)
            assert [ring.used_entry(i) for i in range(3)] == [(0, 7), (40, 0), (4, 7)]
            assert driver.memory.read(BUFFERS + PAGE - 1, 1) == bytes([FAILED])
            assert driver.result(0, first, 6) == mirrored(b"LATE 1")
            assert driver.result(0, third, 6) == mirrored(b"LATE 3")


def _failing(queue: int, chain) -> int:  # type: ignore[no-untyped-def]
    chain.writable.write(bytes([FAILED]), chain.writable.total - 1)
    return int(chain.writable.total)


def again(driver: Driver) -> None:
    """Say once more where the ring is."""
    layout = driver.layout(0)
    addresses = [driver.frontend.user_address(a) for a in (layout.desc, layout.used, layout.avail)]
    driver.frontend.request(FrontendRequest.SET_VRING_ADDR, VringAddr(0, 0, *addresses))


CHANGES: dict[str, Callable[[Driver], object]] = {
    "memory table": lambda driver: driver.frontend.set_memory(driver.memory, slots=False),
    "memory added": lambda driver: _add_region(driver),
    "ring address": again,
}
ENDS: dict[str, Callable[[Driver], object]] = {
    "stop": lambda driver: driver.stop(0),
    "reset": lambda driver: driver.frontend.reset_device(),
    "status": lambda driver: driver.frontend.set_status(0),
    "no memory": lambda driver: driver.frontend.request(
        FrontendRequest.SET_MEM_TABLE, MemoryTable(())
    ),
}


def _add_region(driver: Driver) -> None:
    extra = Backing.memfd(PAGE)
    both = GuestRegionCollection.from_regions([*driver.memory, MmapRegion(EXTRA, extra)])
    driver.frontend.set_memory(both)
    driver.frontend.set_memory(driver.memory)
    del both
    extra.close()


class TestWaiting:
    @pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
    def test_for_the_end(
        self, device: Later, either: Driver, end: Callable[[Driver], object]
    ) -> None:
        numbers = begin(either, device, b"LATE 0", b"LATE 1")
        waiting = Waiting(lambda: end(either))
        device.finish(b"LATE 1")
        assert waiting.waits()
        assert device.resets == 0
        device.finish(b"LATE 0")
        waiting.end()
        # All that was done was shown before.
        assert either.rings[0].used_idx == 2
        for number, source in zip(numbers, (b"LATE 0", b"LATE 1"), strict=True):
            assert either.result(0, number, 6) == mirrored(source)

    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
    def test_for_a_change(
        self, device: Later, driver: Driver, change: Callable[[Driver], object]
    ) -> None:
        begin(driver, device, b"LATE 0", b"LATE 1")
        waiting = Waiting(lambda: change(driver))
        device.finish(b"LATE 0")
        assert waiting.waits()
        device.finish(b"LATE 1")
        waiting.end()
        until(lambda: driver.rings[0].used_idx == 2)
        for number, source in enumerate((b"LATE 0", b"LATE 1")):
            assert driver.result(0, number, 6) == mirrored(source)
        assert driver.run(0, b"afterwards") == mirrored(b"afterwards")

    def test_where_it_stopped(self, device: Later, either: Driver) -> None:
        begin(either, device, *(b"LATE %d" % i for i in range(5)))
        either.prepare(0, b"not announced")
        waiting = Waiting(lambda: either.stop(0))
        assert waiting.waits()
        for i in (4, 0, 3, 1, 2):
            device.finish(b"LATE %d" % i)
        base = waiting.end()
        assert isinstance(base, int)
        assert base in (5, 6)
        assert either.rings[0].used_idx == base
        either.start(0, base)
        assert either.run(0, b"afterwards") == mirrored(b"afterwards")

    def test_not_for_other_queues(self, device: Later, driver: Driver) -> None:
        begin(driver, device, b"LATE")
        driver.run(1, b"text")
        assert driver.stop(1) == 1
        device.finish(b"LATE")
        driver.wait(0, 0)

    def test_memory_is_not_there_any_more(self, device: Later, serving: Serving) -> None:
        """What takes time keeps its memory until it is done, and no longer."""
        with nothing_left(), Driver(serving.path) as driver:
            before = _mappings()
            extra = Backing.memfd(PAGE, "extra")
            both = GuestRegionCollection.from_regions([*driver.memory, MmapRegion(EXTRA, extra)])
            driver.frontend.set_memory(both)
            assert _mappings() == before + 2
            ring = driver.rings[0]
            both.write(EXTRA, b"LATE")
            ring.offer(ring.put_chain(0, Desc(EXTRA, 4), Desc(EXTRA + 100, 5, WRITE)))
            driver.handles[0].kick()
            device.expect(b"LATE")
            removing = Waiting(lambda: driver.frontend.set_memory(driver.memory))
            assert removing.waits()
            assert _mappings() == before + 2
            device.finish(b"LATE")
            removing.end()
            until(lambda: _mappings() == before + 1)
            assert both.read(EXTRA + 100, 5) == b"ETAL" + bytes([OK])
            assert ring.used_entry(0) == (0, 5)
            del both, ring, removing
            extra.close()

    @pytest.mark.parametrize("inflight", [False, True])
    def test_for_a_front_end_that_is_gone(
        self, device: Later, serving: Serving, inflight: bool
    ) -> None:
        with nothing_left():
            driver = Driver(serving.path, queues=2, inflight=inflight)
            memory = driver.memory
            begin(driver, device, b"LATE 0", b"LATE 1")
            begin(driver, device, b"LATE 2", queue=1)
            ring = driver.rings[0]
            driver.close()
            device.finish(b"LATE 1")
            device.finish(b"LATE 2")
            connected = serving.connect()
            assert device.resets == 0, "the device is still at it"
            device.finish(b"LATE 0")
            until(lambda: device.resets == 1)
            assert ring.used_idx == 2
            connected.close()
            until(lambda: device.resets == 2)
            del memory, ring
        serving.check_serves()

    def test_for_the_back_end_to_end(self, tmp_path: Path, device: Later) -> None:
        with nothing_left():
            serving = Serving(device, tmp_path / "socket")
            with serving:
                driver = Driver(serving.path)
                begin(driver, device, b"LATE")
                serving.backend.stop()
                finishing = threading.Timer(GLANCE, device.finish, [b"LATE"])
                finishing.start()
            finishing.join()
            assert driver.done(0, 0)
            driver.close()


def _mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:")


class TestRevocation:
    @pytest.fixture
    def behind(self, serving: Serving) -> Iterator[Driver]:
        with Driver(serving.path, queues=2, iommu=True) as made:
            yield made

    @pytest.mark.parametrize("place", [0, PAGE], ids=["source", "answer"])
    def test_waits_for_the_request(self, device: Later, behind: Driver, place: int) -> None:
        (number,) = begin(behind, device, b"LATE")
        page = behind.at(behind.buffer(0, number)) + place
        revoking = Waiting(lambda: behind.frontend.iotlb.unmap((page, PAGE)))
        assert revoking.waits()
        device.finish(b"LATE")
        revoking.end()
        behind.wait(0, number)
        assert behind.result(0, number, 4) == mirrored(b"LATE")
        assert behind.frontend.iotlb.counts.invalidations == 1

    def test_waits_for_no_other_request(self, device: Later, behind: Driver) -> None:
        first, second = begin(behind, device, b"LATE 0", b"LATE 1")
        unused = behind.at(behind.buffer(0, second + 1))
        behind.frontend.iotlb.unmap((unused, 2 * PAGE))
        revoking = Waiting(
            lambda: behind.frontend.iotlb.unmap((behind.at(behind.buffer(0, second)), PAGE))
        )
        device.finish(b"LATE 1")
        revoking.end()
        assert behind.rings[0].used_idx == 0, "the first one is not done"
        device.finish(b"LATE 0")
        behind.wait(0, second)
        assert behind.result(0, first, 6) == mirrored(b"LATE 0")
        assert behind.result(0, second, 6) == mirrored(b"LATE 1")

    def test_of_a_failed_request(self, device: Later, behind: Driver) -> None:
        (number,) = begin(behind, device, b"LATE")
        page = behind.at(behind.buffer(0, number))
        revoking = Waiting(lambda: behind.frontend.iotlb.unmap((page, 2 * PAGE)))
        assert revoking.waits()
        device.promised(b"LATE").set_exception(DeviceError("no"))
        revoking.end()
        behind.wait(0, number)
        assert behind.rings[0].used_entry(0) == (0, 0)

    def test_of_the_ring_does_not_wait(self, device: Later, behind: Driver) -> None:
        (number,) = begin(behind, device, b"LATE")
        ring = behind.layout(0)
        behind.frontend.iotlb.invalidate((ring.used, PAGE), (ring.desc, PAGE), (ring.avail, PAGE))
        device.finish(b"LATE")
        # It is found again by asking.
        behind.wait(0, number)
        assert behind.result(0, number, 4) == mirrored(b"LATE")

    def test_of_everything_with_many_requests(self, device: Later, behind: Driver) -> None:
        sources = [b"LATE %d" % i for i in range(12)]
        others = [b"LATE other %d" % i for i in range(12)]
        numbers = begin(behind, device, *sources)
        begin(behind, device, *others, queue=1)
        revoking = Waiting(lambda: behind.frontend.iotlb.invalidate((0, 1 << 64)))
        assert revoking.waits()
        for source in [*sources[:-1], *others]:
            device.finish(source)
        assert revoking.waits()
        device.finish(sources[-1])
        revoking.end()
        behind.wait(0, numbers[-1])
        behind.wait(1, 11)
        assert behind.run(0, b"afterwards") == mirrored(b"afterwards")

    def test_while_a_queue_is_stopped(self, device: Later, behind: Driver) -> None:
        """Two wait for the same request, one after the other."""
        (number,) = begin(behind, device, b"LATE")
        page = behind.at(behind.buffer(0, number))
        revoking = Waiting(lambda: behind.frontend.iotlb.unmap((page, PAGE)))
        stopping = Waiting(lambda: behind.stop(0))
        assert revoking.waits()
        assert stopping.waits()
        device.finish(b"LATE")
        revoking.end()
        assert stopping.end() == 1
        assert behind.rings[0].used_idx == 1

    def test_a_late_answer_finds_nothing(self, device: Later, behind: Driver) -> None:
        """Once it is acknowledged, a kept request does not reach the memory any more."""
        (number,) = begin(behind, device, b"LATE")
        chain, promised = device.begun.pop(b"LATE")
        promised.set_result(0)
        behind.frontend.iotlb.unmap((behind.at(behind.buffer(0, number)), 2 * PAGE))
        with pytest.raises(ValueError, match="holds 0x0 bytes"):
            chain.writable.write(b"late")
        assert chain.readable.read() == b""
        assert behind.memory.read(behind.buffer(0, number) + PAGE, 5) == bytes(5)


class Overtaken(Future[int]):
    """A promise whose answer is looked at only when the test lets it be."""

    def __init__(self) -> None:
        super().__init__()
        self.looked = threading.Event()
        self.go_on = threading.Event()

    def result(self, timeout: float | None = None) -> int:
        self.looked.set()
        assert self.go_on.wait(WAIT)
        return super().result(timeout)


class Promising(Later):
    """Its promises are those of `Overtaken`; what it fails may be answered meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.promise = Overtaken()
        self.while_failing: Callable[[], None] = lambda: None
        self.failed = 0

    def process(self, queue: int, chain: Chain) -> int | Future[int]:
        answer = super().process(queue, chain)
        return self.promise if isinstance(answer, Future) else answer

    def fail(self, queue: int, chain: Chain) -> int:
        self.failed += 1
        self.while_failing()
        return super().fail(queue, chain)


class TestAnswersAmidGivingUp:
    @pytest.mark.parametrize("answer", [0, 10_000, DeviceError("too late")], ids=repr)
    def test_given_up_while_its_answer_is_looked_at(
        self, tmp_path: Path, answer: int | DeviceError
    ) -> None:
        """The stop completes it; whatever the answer is, nothing more is written."""
        device = Promising()
        with (
            Serving(device, tmp_path / "socket", stop_timeout=0.1) as serving,
            Driver(serving.path) as driver,
        ):
            begin(driver, device, b"LATE")
            if isinstance(answer, int):
                call = functools.partial(device.promise.set_result, answer)
            else:
                call = functools.partial(device.promise.set_exception, answer)
            answering = Waiting(call)
            assert device.promise.looked.wait(WAIT)
            assert driver.stop(0) == 1
            place = driver.buffer(0, 0) + PAGE
            assert driver.rings[0].used_idx == 1
            # The driver may use it for anything else now.
            driver.memory.write(place, b"\xa5" * 16)
            device.promise.go_on.set()
            answering.end()
            assert driver.memory.read(place, 16) == b"\xa5" * 16
            driver.start(0, 1)
            assert driver.run(0, b"afterwards") == mirrored(b"afterwards")
            assert driver.rings[0].used_idx == 2, "it is completed twice"

    def test_answered_while_it_is_given_up(self, tmp_path: Path) -> None:
        """The answer completes it, and the stop does not once more."""
        device = Promising()
        device.promise.go_on.set()
        with (
            Serving(device, tmp_path / "socket", stop_timeout=0.1) as serving,
            Driver(serving.path) as driver,
        ):
            begin(driver, device, b"LATE")
            device.while_failing = functools.partial(device.promise.set_result, 5)
            assert driver.stop(0) == 1
            assert device.failed == 1
            assert (driver.rings[0].used_idx, driver.rings[0].used_entry(0)) == (1, (0, 5))
            driver.start(0, 1)
            assert driver.run(0, b"afterwards") == mirrored(b"afterwards")
            assert driver.rings[0].used_idx == 2, "it is completed twice"

    def test_its_memory_is_revoked_while_its_answer_is_looked_at(self, tmp_path: Path) -> None:
        """As with a stop, but the ring is there still when the answer comes."""
        device = Promising()
        with (
            Serving(device, tmp_path / "socket", stop_timeout=0.1) as serving,
            Driver(serving.path, iommu=True) as driver,
        ):
            begin(driver, device, b"LATE")
            answering = Waiting(functools.partial(device.promise.set_result, 5))
            assert device.promise.looked.wait(WAIT)
            driver.frontend.iotlb.unmap((driver.at(driver.buffer(0, 0)), PAGE))
            driver.wait(0, 0)
            device.promise.go_on.set()
            answering.end()
            assert driver.run(0, b"afterwards") == mirrored(b"afterwards")
            assert driver.rings[0].used_idx == 2, "it is completed twice"
