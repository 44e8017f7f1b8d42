"""System calls that still move a request's memory when its device has answered, or is to stop.

Their kernel writes when it likes. Until they return the driver must not get the request back.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from guestio._core.virtio.chain import Chain
from guestio.errors import DeviceError
from guestio.virtio.device import Device, DeviceId
from tests.kit.rings import PAGE
from tests.kit.serving import (
    IOVA,
    Driver,
    Serving,
    promptly,
    until,
    warnings_of,
)
from tests.kit.waiting import Waiting

ERROR = 0xEE
GLANCE = 0.1
"""Seconds after which what should not happen has not happened."""


class Reader(Device):
    """Reads from a pipe into requests that begin with PIPE, and mirrors the others.

    Attributes:
        answers: What is answered to the former, while the pipe is still read from.
        reads: What the reads returned, or raised.
        chains: The requests.
    """

    device_id = DeviceId.BLOCK
    error_status = ERROR

    def __init__(self) -> None:
        self.pipe, self.feed = os.pipe()
        self.answers: list[Callable[[Chain], Any]] = []
        self.reads: list[object] = []
        self.chains: list[Chain] = []
        self._threads: list[threading.Thread] = []

    def process(self, queue: int, chain: Chain) -> int | Future[int]:
        source = chain.readable.read()
        if source.startswith(b"PIPE") and self.answers:
            self.chains.append(chain)
            thread = threading.Thread(target=self._read, args=(chain,))
            self._threads.append(thread)
            thread.start()
            until(chain.in_use)
            return self.answers.pop(0)(chain)  # type: ignore[no-any-return]
        chain.writable.write(source[::-1] + b"\x55")
        return len(source) + 1

    def _read(self, chain: Chain) -> None:
        try:
            # The place of the status, too.
            self.reads.append(chain.writable.from_file(self.pipe))
        except Exception as error:
            self.reads.append(error)

    def release(self, data: bytes = b"EVIL\0") -> None:
        """Have the reads return."""
        done = len(self.reads)
        os.write(self.feed, data)
        until(lambda: len(self.reads) > done)

    def close(self) -> None:
        os.close(self.feed)
        for thread in self._threads:
            thread.join()
        os.close(self.pipe)
        self.chains.clear()


@pytest.fixture
def device() -> Iterator[Reader]:
    made = Reader()
    yield made
    made.close()


@pytest.fixture(params=[False, True], ids=["one thread", "queue threads"])
def serving(device: Reader, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Serving]:
    with Serving(
        device, tmp_path / "socket", queue_threads=request.param, stop_timeout=0.2
    ) as made:
        yield made


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "noted": {"inflight": True},
    "behind an IOMMU": {"iommu": True},
    "noted, behind an IOMMU": {"iommu": True, "inflight": True},
}


@pytest.fixture(params=MODES.values(), ids=MODES.keys())
def driver(serving: Serving, request: pytest.FixtureRequest) -> Iterator[Driver]:
    with Driver(serving.path, **request.param) as made:
        yield made


def later(end: Callable[[Future[Any]], object]) -> Callable[[Chain], Future[int]]:
    def answer(chain: Chain) -> Future[int]:
        promised: Future[int] = Future()
        end(promised)
        return promised

    return answer


def by_another(end: Callable[[Future[Any]], object]) -> Callable[[Chain], Future[int]]:
    """The same in another thread, soon."""

    def answer(chain: Chain) -> Future[int]:
        promised: Future[int] = Future()
        threading.Timer(0.02, end, (promised,)).start()
        return promised

    return answer


def fail(chain: Chain) -> int:
    raise DeviceError("no")


FAILING: dict[str, Callable[[Chain], Any]] = {
    "raises": fail,
    "cancels": later(lambda promised: promised.cancel()),
    "cancels soon": by_another(lambda promised: promised.cancel()),
    "fails later": by_another(lambda promised: promised.set_exception(ValueError("no"))),
}
SUCCEEDING: dict[str, Callable[[Chain], Any]] = {
    "answers": lambda chain: 4,
    "answers later": by_another(lambda promised: promised.set_result(4)),
}


def check_waits(driver: Driver, number: int) -> None:
    """Check that a request is not given back."""
    time.sleep(GLANCE)
    assert not driver.done(0, number)
    driver.frontend.sync()


class TestAnAnswer:
    @pytest.mark.parametrize("answer", FAILING.values(), ids=FAILING.keys())
    def test_that_it_failed_waits(
        self, device: Reader, driver: Driver, answer: Callable[[Chain], Any]
    ) -> None:
        device.answers.append(answer)
        number = driver.submit(0, b"PIPE")
        until(lambda: device.chains)
        check_waits(driver, number)
        device.release()
        driver.wait(0, number)
        # The call has written the status over, after the device failed the request.
        assert driver.result(0, number, 4) == (ERROR, b"EVIL")
        assert driver.rings[0].used_entry(number) == (2 * number, 0)
        assert driver.run(0, b"text") == (0x55, b"txet")

    @pytest.mark.parametrize("answer", SUCCEEDING.values(), ids=SUCCEEDING.keys())
    def test_that_it_is_done_waits(
        self,
        device: Reader,
        driver: Driver,
        answer: Callable[[Chain], Any],
    ) -> None:
        device.answers.append(answer)
        number = driver.submit(0, b"PIPE")
        until(lambda: device.chains)
        check_waits(driver, number)
        device.release(b"good\x11")
        driver.wait(0, number)
        assert driver.result(0, number, 4) == (0x11, b"good")
        assert driver.rings[0].used_entry(number) == (2 * number, 4)

    def test_that_waits_long_is_reported(
        self,
        device: Reader,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("guestio.virtio.queue.SLOW_ANSWER", 0.05)
        with Serving(device, tmp_path / "socket") as serving, Driver(serving.path) as driver:
            device.answers += [lambda chain: 4, lambda chain: 4]
            for _ in range(2):
                number = driver.submit(0, b"PIPE")
                until(lambda: warnings_of(caplog))
                assert warnings_of(caplog)[0] == (
                    "queue 0: 1 requests that Reader.process has answered wait for its system "
                    "calls, which still move their memory after 0 s"
                )
                assert serving.stats.outstanding == 1
                device.release()
                driver.wait(0, number)
                until(lambda: serving.stats.outstanding == 0)
                caplog.clear()

    def test_marks_the_status(self, device: Reader, tmp_path: Path) -> None:
        """What is written over at the end is as dirty as all else."""
        device.answers.append(fail)
        with (
            Serving(device, tmp_path / "socket", track_dirty=True) as serving,
            Driver(serving.path) as driver,
        ):
            number = driver.submit(0, b"PIPE")
            until(lambda: device.chains)
            device.release()
            driver.wait(0, number)
            driver.close()
            serving.let_go()
            assert serving.stats.dirty_pages >= 2

    def test_of_others_is_not_delayed_where_it_may_overtake(
        self, device: Reader, serving: Serving
    ) -> None:
        with Driver(serving.path, inflight=True) as driver:
            device.answers.append(fail)
            first = driver.submit(0, b"PIPE")
            until(lambda: device.chains)
            driver.submit(0, b"text")
            until(lambda: driver.rings[0].used_idx == 1)
            assert driver.result(0, first + 1, 4) == (0x55, b"txet")
            device.release()
            driver.wait(0, first + 1)


def promise(chain: Chain) -> Future[int]:
    return Future()


HELD: dict[str, Callable[[Chain], Any]] = {"never answers": promise, **FAILING, **SUCCEEDING}


class TestAStop:
    @pytest.mark.parametrize("answer", HELD.values(), ids=HELD.keys())
    def test_does_not_show_the_request(
        self,
        device: Reader,
        driver: Driver,
        serving: Serving,
        answer: Callable[[Chain], Any],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        assert driver.run(0, b"text") == (0x55, b"txet")
        device.answers.append(answer)
        number = driver.submit(0, b"PIPE")
        until(lambda: device.chains)
        assert driver.stop(0) == (2 if driver.region is not None else 1)
        assert driver.rings[0].used_idx == 1
        assert warnings_of(caplog)[-1] == (
            "queue 0: 1 requests are not given back to their driver: system calls of "
            "Reader.process still move their memory, and write to it until they return"
        )
        # The next back-end begins with it.
        device.release()
        assert driver.rings[0].used_idx == 1
        driver.start(0, 1)
        driver.handles[0].kick()
        driver.wait(0, number)
        assert driver.result(0, number, 4) == (0x55, b"EPIP")
        assert driver.run(0, b"more") == (0x55, b"erom")

    def test_waits_for_a_call_that_returns_in_time(
        self, device: Reader, serving: Serving, driver: Driver
    ) -> None:
        device.answers.append(later(lambda promised: promised.cancel()))
        number = driver.submit(0, b"PIPE")
        until(lambda: device.chains)
        stopping = Waiting(lambda: driver.stop(0))
        assert stopping.waits()
        device.release()
        assert stopping.end() == 1
        assert driver.result(0, number, 4) == (ERROR, b"EVIL")

    def test_of_the_program_is_not_kept(self, device: Reader, serving: Serving) -> None:
        with Driver(serving.path) as driver:
            device.answers.append(promise)
            driver.submit(0, b"PIPE")
            until(lambda: device.chains)
            with promptly(1.0):
                serving.backend.stop()
                until(lambda: not serving.alive)
            assert driver.rings[0].used_idx == 0

    def test_of_the_front_end_serves_the_next(self, device: Reader, serving: Serving) -> None:
        with Driver(serving.path) as driver:
            device.answers.append(promise)
            driver.submit(0, b"PIPE")
            until(lambda: device.chains)
        serving.let_go()
        with Driver(serving.path) as driver:
            assert driver.run(0, b"text") == (0x55, b"txet")
        device.release()


class TestARevocation:
    @pytest.mark.parametrize("answer", HELD.values(), ids=HELD.keys())
    def test_is_refused_until_then(
        self, device: Reader, serving: Serving, answer: Callable[[Chain], Any]
    ) -> None:
        with Driver(serving.path, iommu=True) as driver:
            device.answers.append(answer)
            number = driver.submit(0, b"PIPE")
            until(lambda: device.chains)
            page = driver.buffer(0, number) + PAGE + IOVA
            with pytest.raises(Exception, match=r"refused|still in use"):
                driver.frontend.iotlb.unmap((page, PAGE))
            assert not driver.done(0, number)
            device.release()
            driver.wait(0, number)

    @pytest.mark.parametrize("answer", SUCCEEDING.values(), ids=SUCCEEDING.keys())
    def test_goes_on_when_the_call_returns(
        self, device: Reader, tmp_path: Path, answer: Callable[[Chain], Any]
    ) -> None:
        """The thread that serves the queue waits for it; the one in the call lets go."""
        with (
            Serving(device, tmp_path / "socket", stop_timeout=30) as serving,
            Driver(serving.path, iommu=True) as driver,
        ):
            device.answers.append(answer)
            number = driver.submit(0, b"PIPE")
            until(lambda: device.chains)
            time.sleep(GLANCE)
            page = driver.buffer(0, number) + PAGE + IOVA
            revoking = Waiting(lambda: driver.frontend.iotlb.unmap((page, PAGE)))
            assert revoking.waits()
            device.release()
            revoking.end()
            driver.wait(0, number)
