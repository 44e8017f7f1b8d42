"""Devices that raise, lie, are cancelled or cannot even fail: their drivers see failed requests."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import pickle
import re
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from guestio import budgets
from guestio._core.virtio.chain import Chain
from guestio.errors import DeviceError, DeviceMethodError, GuestioError
from guestio.ratelog import LOG
from guestio.vhost_user import Backend
from guestio.vhost_user.iotlb_service import MissAction, MissAnswer
from guestio.virtio.blk import S_IOERR, T_GET_ID, T_IN, T_OUT, BlockDevice
from guestio.virtio.device import Device, DeviceId
from tests.kit.rings import PAGE, WRITE, Desc
from tests.kit.serving import (
    BUFFERS,
    Driver,
    Later,
    Mirror,
    Serving,
    errors_of,
    nothing_left,
    until,
    warnings_of,
)

ERROR = 0xEE


class NoNumber:
    """Pretends to be a number."""

    def __index__(self) -> int:
        raise ValueError("no number")


class Faulty(Device):
    """Answers each request as it is told to; its type has a status in the last byte.

    Attributes:
        answer: What `process` does with a request.
        failure: What `fail` does, None for what devices do.
    """

    device_id = DeviceId.BLOCK
    error_status = ERROR

    def __init__(self) -> None:
        self.answer: Callable[[Chain], object] = lambda chain: 0
        self.failure: Callable[[Chain], object] | None = None

    def process(self, queue: int, chain: Chain) -> int:
        return self.answer(chain)  # type: ignore[return-value]

    def fail(self, queue: int, chain: Chain) -> int:
        if self.failure is None:
            return super().fail(queue, chain)
        return self.failure(chain)  # type: ignore[return-value]


def fresh(error: BaseException) -> BaseException:
    """Another one like it: a traceback would keep what it met."""
    return type(error)(*error.args)


def raising(error: BaseException) -> Callable[[Chain], object]:
    def fail(chain: Chain) -> object:
        raise fresh(error)

    return fail


NONSENSE = [None, -1, 6, 1 << 70, True, "5", 1.0, float("nan"), NoNumber(), [], object()]


class MuteError(Exception):
    """Cannot say what is wrong."""

    def __str__(self) -> str:
        raise AttributeError("code")


class MuteDeviceError(DeviceError):
    """Cannot say what is wrong."""

    def __str__(self) -> str:
        raise GeneratorExit


ERRORS = [
    DeviceError("no"),
    RuntimeError("no"),
    MemoryError(),
    StopIteration(),
    AssertionError(),
    MuteError(),
    MuteDeviceError(),
    GeneratorExit(),
    asyncio.CancelledError(),
]
NOW: list[Callable[[Chain], object]] = [
    *(raising(error) for error in ERRORS),
    *(lambda chain, value=value: value for value in NONSENSE),
]
LATER: list[Callable[[Future[object]], object]] = [
    *(lambda future, error=error: future.set_exception(fresh(error)) for error in ERRORS),
    lambda future: future.set_exception(SystemExit(3)),
    lambda future: future.set_exception(KeyboardInterrupt()),
    *(lambda future, value=value: future.set_result(value) for value in NONSENSE),
    lambda future: future.cancel(),
]
MODES = {
    "plain": {},
    "noted": {"inflight": True},
    "behind an IOMMU": {"iommu": True},
    "noted, behind an IOMMU": {"iommu": True, "inflight": True},
}


@pytest.fixture
def device() -> Faulty:
    return Faulty()


@pytest.fixture(params=[False, True], ids=["one thread", "queue threads"])
def serving(device: Faulty, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Serving]:
    with Serving(device, tmp_path / "socket", queue_threads=request.param) as made:
        yield made


@pytest.fixture(params=MODES.values(), ids=MODES.keys())
def driver(serving: Serving, request: pytest.FixtureRequest) -> Iterator[Driver]:
    with Driver(serving.path, **request.param) as made:
        yield made


def check_failed(driver: Driver, number: int) -> None:
    """Wait for a request of 4 bytes; nothing but its status may have been written, and an error."""
    driver.wait(0, number)
    assert driver.result(0, number, 4) == (ERROR, bytes(4))
    assert driver.rings[0].used_entry(number) == (2 * number % driver.size, 0)


class TestStatus:
    def test_of_what_fails_at_once(self, device: Faulty, driver: Driver, serving: Serving) -> None:
        for count, answer in enumerate(NOW, 1):
            device.answer = answer
            check_failed(driver, driver.submit(0, b"text"))
            assert serving.stats.failed_requests == count

    def test_of_what_fails_later(self, device: Faulty, driver: Driver, serving: Serving) -> None:
        for count, end in enumerate(LATER, 1):
            promised: Future[object] = Future()
            begun: list[Chain] = []

            def begin(
                chain: Chain,
                begun: list[Chain] = begun,
                promised: Future[object] = promised,
            ) -> object:
                begun.append(chain)
                return promised

            device.answer = begin
            number = driver.submit(0, b"text")
            until(lambda begun=begun: begun)
            driver.frontend.sync()
            end(promised)
            check_failed(driver, number)
            assert serving.stats.failed_requests == count

    def test_where_the_device_cannot_even_fail(self, device: Faulty, driver: Driver) -> None:
        device.answer = raising(DeviceError("no"))
        for failure in NOW:
            device.failure = failure
            check_failed(driver, driver.submit(0, b"text"))
        promised: Future[object] = Future()
        device.answer = lambda chain: promised
        number = driver.submit(0, b"text")
        promised.cancel()
        check_failed(driver, number)

    def test_is_one_byte_at_the_very_end(self, device: Faulty, driver: Driver) -> None:
        """Whatever the answer is split into."""
        device.answer = raising(DeviceError("no"))
        ring, place = driver.rings[0], BUFFERS + 0x20000
        for count, sizes in enumerate(([1], [1, 1], [4, 1, 1], [1, PAGE], [3 * PAGE + 5], [1] * 9)):
            driver.memory.write(place, bytes(8 * PAGE))
            at, descriptors = place, [Desc(driver.at(place + 7 * PAGE), 4)]
            for size in sizes:
                descriptors.append(Desc(driver.at(at), size, WRITE))
                at += size
            driver.run_raw(0, *descriptors)
            total = sum(sizes)
            written = bytes(total - 1) + bytes([ERROR])
            assert driver.memory.read(place, total + PAGE) == written + bytes(PAGE)
            assert ring.used_entry(count) == (0, int(total == 1))

    def test_where_nothing_may_be_written(self, device: Faulty, driver: Driver) -> None:
        device.answer = raising(DeviceError("no"))
        assert driver.run_raw(0, Desc(driver.at(BUFFERS), 4)) == (0, 0)

    @pytest.mark.parametrize("inflight", [False, True])
    def test_that_cannot_be_told_is_not_a_success(
        self,
        device: Faulty,
        serving: Serving,
        inflight: bool,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """What was in the status byte before may mean that all went well: the queue breaks."""
        with Driver(serving.path, iommu=True, inflight=inflight) as driver:
            assert driver.run_raw(0, Desc(driver.at(BUFFERS), 4)) == (0, 0)
            hole = 0x6000_0000
            driver.frontend.iotlb.miss_hook = lambda message: MissAnswer(
                MissAction.REFUSE if message.iova == hole else MissAction.ANSWER
            )
            ring = driver.rings[0]
            ring.offer(ring.put_chain(8, Desc(driver.at(BUFFERS), 4), Desc(hole, 5, WRITE)))
            driver.handles[0].kick()
            until(driver.handles[0].failed)
            assert ring.used_idx == 1
            assert any("byte for its status cannot be reached" in e for e in errors_of(caplog))
            # It is not done, so the successor begins it again.
            assert driver.stop(0) == (2 if inflight else 1)
            driver.frontend.iotlb.miss_hook = None
            driver.frontend.iotlb.map(hole, BUFFERS + 4 * PAGE, PAGE, 3)  # type: ignore[arg-type]
            driver.start(0, 1)
            driver.handles[0].kick()
            driver.wait(0, 1)
            assert ring.used_entry(1) == (8, 0)


class TestWords:
    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            (lambda chain: None, "Faulty.process returned None; return the number of bytes"),
            (lambda chain: True, "Faulty.process returned True; return the number of bytes"),
            (lambda chain: 9, "Faulty.process returned 9, but the request has room for 5 bytes"),
            (
                raising(DeviceError("on fire")),
                "queue 0: request failed: Faulty.process raised DeviceError: on fire",
            ),
            (raising(ValueError("on fire")), "queue 0: request failed: Faulty.process raised"),
        ],
    )
    def test_name_the_method(
        self,
        device: Faulty,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        answer: Callable[[Chain], object],
        said: str,
    ) -> None:
        with Serving(device, tmp_path / "socket") as serving, Driver(serving.path) as driver:
            device.answer = answer
            check_failed(driver, driver.submit(0, b"text"))
            assert said in warnings_of(caplog)[0]

    def test_of_a_late_answer(
        self, device: Faulty, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with Serving(device, tmp_path / "socket") as serving, Driver(serving.path) as driver:
            promised: Future[object] = Future()
            promised.set_result(None)
            device.answer = lambda chain: promised
            check_failed(driver, driver.submit(0, b"text"))
            assert "the future of Faulty.process ended with None; return" in warnings_of(caplog)[0]

    def test_of_a_cancelled_answer(
        self, device: Faulty, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with Serving(device, tmp_path / "socket") as serving, Driver(serving.path) as driver:
            promised: Future[object] = Future()
            promised.cancel()
            device.answer = lambda chain: promised
            check_failed(driver, driver.submit(0, b"text"))
            assert warnings_of(caplog) == [
                "queue 0: request failed: the future of Faulty.process was cancelled"
            ]

    @pytest.mark.parametrize("late", [False, True])
    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (ValueError("x\nINFO forged" + "A" * 5_000_000), "ValueError: x\\nINFO forgedAAA"),
            (DeviceError("x\nINFO forged"), "DeviceError: x\\nINFO forged"),
            (MuteError(), "MuteError: (MuteError, whose str() raised AttributeError)"),
        ],
    )
    def test_of_an_exception(
        self,
        device: Faulty,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        late: bool,
        error: Exception,
        said: str,
    ) -> None:
        """The traceback follows where it helps; nothing is forged or flooded."""

        def work(chain: Chain) -> int:
            raise fresh(error)

        with ThreadPoolExecutor(1) as pool:
            device.answer = (lambda chain: pool.submit(work, chain)) if late else work
            with Serving(device, tmp_path / "socket") as serving, Driver(serving.path) as driver:
                check_failed(driver, driver.submit(0, b"text"))
        (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
        method = "the future of Faulty.process ended with" if late else "Faulty.process raised"
        assert record.getMessage().startswith(f"queue 0: request failed: {method} {said}")
        assert len(record.getMessage()) < 2 * budgets.LOG_TEXT
        if isinstance(error, DeviceError):
            assert record.exc_text is None
        else:
            assert record.exc_text is not None
            assert ", in work" in record.exc_text
            assert len(record.exc_text) < 2 * budgets.LOG_TRACE
            assert "\nINFO" not in record.exc_text


class Deaf(Future[int]):
    """Never says that it is done."""

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        raise asyncio.CancelledError


class Hasty(Future[int]):
    """Says that it is done before it is."""

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        fn(self)


class Stubborn(Future[int]):
    """Cannot be cancelled."""

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        raise ValueError("no callback")

    def cancel(self) -> bool:
        raise GeneratorExit


class TestStrangeFutures:
    @pytest.mark.parametrize("kind", [Deaf, Hasty, Stubborn])
    def test_fail(
        self, device: Faulty, driver: Driver, serving: Serving, kind: type[Future[int]]
    ) -> None:
        made: list[tuple[Chain, Future[int]]] = []

        def begin(chain: Chain) -> object:
            made.append((chain, kind()))
            return made[-1][1]

        device.answer = begin
        for count in (1, 2):
            check_failed(driver, driver.submit(0, b"text"))
            assert serving.stats.failed_requests == count
        assert serving.stats.connections == 1
        # Late answers go nowhere.
        for chain, promised in made:
            if not promised.done():
                promised.set_result(5)
            assert chain.writable.total == 0
        device.answer = lambda chain: 0
        driver.run(0, b"text")
        assert serving.stats.failed_requests == 2


class TestTheEndOfTheProgram:
    """What a device may ask for: the call of `serve` ends with it, and its front-end is let go."""

    @pytest.mark.parametrize("threads", [False, True], ids=["one thread", "queue threads"])
    @pytest.mark.parametrize("where", ["process", "fail", "stopping", "reset", "config"])
    @pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
    @pytest.mark.parametrize("iommu", [False, True])
    def test_is_obeyed(
        self, tmp_path: Path, threads: bool, where: str, error: BaseException, iommu: bool
    ) -> None:
        class Ending(Faulty):
            armed = False

            def end(self, name: str) -> None:
                if name == where and self.armed:
                    raise fresh(error)

            def stopping(self, queue: int) -> None:
                self.end("stopping")

            def reset(self) -> None:
                self.end("reset")

            def config(self) -> bytes:
                self.end("config")
                return b""

        device = Ending()

        def process(chain: Chain) -> object:
            device.end("process")
            raise ValueError("no")

        def fail(chain: Chain) -> object:
            device.end("fail")
            return Device.fail(device, 0, chain)

        device.answer, device.failure = process, fail
        with nothing_left():
            serving = Serving(device, tmp_path / "socket", queue_threads=threads)
            with serving:
                driver = Driver(serving.path, iommu=iommu)
                check_failed(driver, driver.submit(0, b"text"))
                device.armed = True
                if where in ("process", "fail"):
                    driver.prepare(0, b"more")
                    driver.submit(0, b"text")
                elif where in ("stopping", "reset"):
                    driver.frontend.close()
                else:
                    with pytest.raises((GuestioError, OSError)):
                        driver.frontend.get_config(0, 4)
                until(lambda: not serving.alive)
                assert type(serving.error) is type(error)
                serving.error = None
                # What was not answered is not shown as done.
                assert driver.rings[0].used_idx == 1
                assert serving.backend._connection is not None
                assert serving.backend._connection.closed
            driver.close()
            del driver


@pytest.mark.parametrize("error", [GeneratorExit(), asyncio.CancelledError(), MuteDeviceError()])
@pytest.mark.parametrize("where", ["stopping", "reset", "config", "negotiated", "failures"])
def test_other_methods_that_raise_end_nothing(
    tmp_path: Path, where: str, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(Mirror):
        wrong = False

        def raise_in(self, name: str) -> None:
            if name == where and self.wrong:
                raise fresh(error)

        def stopping(self, queue: int) -> None:
            self.raise_in("stopping")

        def reset(self) -> None:
            self.raise_in("reset")

        def config(self) -> bytes:
            self.raise_in("config")
            return super().config()

        def negotiated(self, features: int) -> None:
            self.raise_in("negotiated")

        @property
        def failures(self) -> int:
            self.raise_in("failures")
            return 0

    device = Wrong()
    with Serving(device, tmp_path / "socket") as serving:
        device.wrong = True
        with contextlib.suppress(GuestioError, OSError), Driver(serving.path) as driver:
            driver.run(0, b"text")
            if where == "config":
                with pytest.raises(GuestioError):
                    driver.frontend.get_config(0, 4)
                # Only this was refused.
                driver.run(0, b"more")
            driver.frontend.reset_device()
        serving.let_go()
        assert serving.alive
        if not (isinstance(error, MuteDeviceError) and where in ("reset", "config", "negotiated")):
            assert any(f"Wrong.{where}" in r.getMessage() for r in caplog.records)
        device.wrong = False
        serving.check_serves()
        assert serving.stats.failed_requests == 0


def test_a_forgotten_answer_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guestio.virtio.queue.SLOW_ANSWER", 0.05)
    device = Later()
    with Serving(device, tmp_path / "socket", stop_timeout=0.1) as serving:
        with Driver(serving.path) as driver:
            assert serving.stats.outstanding == 0
            for source in (b"LATE 0", b"LATE 1"):
                driver.submit(0, source)
                device.expect(source)
            until(lambda: serving.stats.outstanding == 2)
            assert "outstanding=2" in str(serving.stats)
            assert pickle.loads(pickle.dumps(serving.stats)).outstanding == 2
            line = re.compile(
                r"queue 0: Later\.process has not answered a request for \d+ s; it holds 2, and "
                r"their driver waits until it completes their futures"
            )
            until(lambda: any(map(line.fullmatch, warnings_of(caplog))))
            until(lambda: len(warnings_of(caplog)) >= 2)
            device.finish(b"LATE 0")
            device.finish(b"LATE 1")
            driver.wait(0, 1)
            until(lambda: serving.stats.outstanding == 0)
            said = len(warnings_of(caplog))
            driver.run(0, b"text")
            time.sleep(0.15)
            assert len(warnings_of(caplog)) == said
            # It is looked at again.
            driver.submit(0, b"LATE 2")
            until(lambda: len(warnings_of(caplog)) > said)
            device.expect(b"LATE 2")
            device.finish(b"LATE 2")
            driver.wait(0, 3)
        serving.let_go()
        assert serving.stats.outstanding == 0


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_a_disk_of_ones_own(tmp_path: Path, mode: dict[str, bool], late: bool) -> None:
    """A subclass that fails for one sector: the driver reads an error there, not the old status."""

    class Spoiled(BlockDevice):
        def process(self, queue: int, chain: Chain) -> int | Future[int]:
            if struct.unpack_from("<Q", chain.readable.read(0, 16), 8)[0] != 3:
                return super().process(queue, chain)
            if not late:
                raise ValueError("this sector is bad")
            promised: Future[int] = Future()
            promised.set_exception(ValueError("this sector is bad"))
            return promised

    image = tmp_path / "image"
    image.write_bytes(b"i" * 8192)
    device = Spoiled(image)
    answers = {T_GET_ID: (b"image".ljust(20, b"\0"), bytes(20)), T_IN: (b"i" * 512, bytes(512))}
    with Serving(device, tmp_path / "socket") as serving, Driver(serving.path, **mode) as driver:
        place = BUFFERS + 0x20000
        for kind, sector, status in itertools.product((T_GET_ID, T_IN), (1, 3, 4), (0, 0x77)):
            good, untouched = answers[kind]
            size = len(good)
            driver.memory.write(place, struct.pack("<IIQ", kind, 0, sector))
            driver.memory.write(place + 0x1000, untouched + bytes([status]))
            driver.run_raw(
                0, Desc(driver.at(place), 16), Desc(driver.at(place + 0x1000), size + 1, WRITE)
            )
            found = driver.memory.read(place + 0x1000, size + 1)
            assert found == (untouched + bytes([S_IOERR]) if sector == 3 else good + b"\0")
        # Nor does a write get past it.
        for sector in (3, 4):
            driver.memory.write(place, struct.pack("<IIQ", T_OUT, 0, sector) + b"w" * 512)
            driver.memory.write(place + 0x1000, b"\x77")
            driver.run_raw(
                0, Desc(driver.at(place), 528), Desc(driver.at(place + 0x1000), 1, WRITE)
            )
            assert driver.memory.read(place + 0x1000, 1) == bytes([S_IOERR if sector == 3 else 0])
        assert image.read_bytes()[3 * 512 :][:1024] == b"i" * 512 + b"w" * 512
    assert device.failures == 0
    device.close()


@pytest.mark.parametrize("without", ["subclass", "attribute"])
def test_a_disk_without_a_server(tmp_path: Path, without: str) -> None:
    """Everything goes through `process`, and failures are counted as ever."""
    seen: list[int] = []

    class Watched(BlockDevice):
        def process(self, queue: int, chain: Chain) -> int | Future[int]:
            seen.append(chain.head)
            return super().process(queue, chain)

    image = tmp_path / "image"
    image.write_bytes(bytes(8192))
    device = (Watched if without == "subclass" else BlockDevice)(image)
    if without == "attribute":
        device.server = None
    with Serving(device, tmp_path / "socket") as serving, Driver(serving.path) as driver:
        place = BUFFERS + 0x20000
        os.truncate(image, 512)
        for sector, status in ((0, 0), (8, S_IOERR)):
            driver.memory.write(place, struct.pack("<IIQ", T_IN, 0, sector))
            driver.run_raw(0, Desc(place, 16), Desc(place + 0x1000, 513, WRITE))
            assert driver.memory.read(place + 0x1200, 1) == bytes([status])
        assert serving.stats.failed_requests == 1
    assert device.failures == device.errors == 1
    assert len(seen) == (2 if without == "subclass" else 0)
    device.close()


class Idle(Device):
    device_id = DeviceId.BLOCK
    num_queues = 2
    device_queues = (0,)


class TestNoDevice:
    """What cannot be served is refused before anything listens."""

    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda: Faulty, "must be a guestio Device, not .*Faulty.*: make one of it"),
            (lambda: None, "must be a guestio Device, not None"),
            (lambda: with_attributes(device_id=None), "Faulty.device_id is missing"),
            (lambda: with_attributes(device_id="sixty"), "Faulty.device_id must be an integer"),
            (Idle, "Idle has no process method .* queue 1, which is not in"),
            (lambda: with_attributes(num_queues=0), "num_queues 0 is not in 1..256"),
            (lambda: with_attributes(num_queues=257), "num_queues 257 is not in 1..256"),
            (lambda: with_attributes(num_queues=True), "num_queues must be an integer"),
            (lambda: with_attributes(error_status=256), "Faulty.error_status 256 is not in 0..255"),
            (lambda: with_attributes(error_status=-1), "Faulty.error_status -1 is not in 0..255"),
            (lambda: with_attributes(error_status="x"), "Faulty.error_status must be an integer"),
            (lambda: with_attributes(features=-1), "Faulty.features"),
            (lambda: with_attributes(features=1 << 64), "Faulty.features"),
            (lambda: with_attributes(features="x"), "Faulty.features must be an integer"),
            (
                lambda: with_attributes(config=lambda: None),
                "Faulty.config returned None; return bytes",
            ),
            (
                lambda: with_attributes(config=lambda: "A" * 5000),
                "Faulty.config returned 'A.{,60}; return bytes",
            ),
        ],
    )
    def test_is_served(self, tmp_path: Path, make: Callable[[], Any], said: str) -> None:
        with pytest.raises((TypeError, ValueError, DeviceError), match=said):
            Backend(make(), tmp_path / "socket")
        assert not (tmp_path / "socket").exists()


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("a"), OSError(2, "gone", "sensor")])
@pytest.mark.parametrize("method", ["config", "attached"])
def test_a_method_that_raises_at_the_start_is_named(
    tmp_path: Path, method: str, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    device = with_attributes(**{method: fail})
    said = f"Faulty.{method} raised {type(error).__name__}: {error}"
    with pytest.raises(DeviceMethodError, match=re.escape(said)) as caught:
        Backend(device, tmp_path / "socket")
    assert caught.value.__cause__ is error
    assert not (tmp_path / "socket").exists()


def with_attributes(**values: Any) -> Device:
    made = Faulty()
    vars(made).update(values)
    return made


def test_statistics_are_readable(device: Faulty, tmp_path: Path) -> None:
    with Serving(device, tmp_path / "socket") as serving, Driver(serving.path) as driver:
        device.answer = raising(DeviceError("no"))
        check_failed(driver, driver.submit(0, b"text"))
        said = str(serving.stats).split()
        assert {"connections=1", "requests=1", "failed_requests=1", "iotlb_misses=0"} <= set(said)


def test_one_that_works_long_in_its_thread_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guestio.virtio.queue.SLOW_DEVICE", 0.02)
    device = Faulty()

    def work(chain: Chain) -> int:
        time.sleep(0.03)
        chain.writable.write(bytes(5))
        return 5

    device.answer = work
    with Serving(device, tmp_path / "socket") as serving, Driver(serving.path) as driver:
        for _ in range(budgets.LOG_BURST + 3):
            driver.run(0, b"slow")
        driver.close()
        serving.let_go()
    LOG.flush()
    lines = warnings_of(caplog)
    assert re.fullmatch(
        r"queue 0: Faulty\.process took \d+ s for 1 requests, and nothing else was served "
        r"meanwhile; have it return a future of what takes long",
        lines[0],
    )
    assert len(lines) == budgets.LOG_BURST + 1
    assert lines[-1].startswith("3 more lines like this")


def _settles(chain: Chain) -> int:
    chain.writable.write(b"done")
    chain.finish(5)
    return 5


def _settles_and_raises(chain: Chain) -> int:
    chain.finish(5)
    raise OSError("after that")


@pytest.mark.parametrize("answer", [_settles, _settles_and_raises])
def test_one_that_settles_its_request_is_named(
    device: Faulty, tmp_path: Path, caplog: pytest.LogCaptureFixture, answer: Callable[[Chain], int]
) -> None:
    device.answer = answer
    with Serving(device, tmp_path / "socket") as serving, Driver(serving.path) as driver:
        for number in range(2):
            assert driver.submit(0, b"1234") == number
            driver.wait(0, number)
        driver.frontend.sync()
        assert serving.stats.connections == 1
        assert serving.stats.failed_requests >= 2
    assert any("Faulty.process called Chain.finish" in line for line in caplog.messages)


def test_one_that_settles_its_request_in_fail(
    device: Faulty, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device.answer, device.failure = _raises, _settles
    with Serving(device, tmp_path / "socket") as serving, Driver(serving.path) as driver:
        driver.wait(0, driver.submit(0, b"1234"))
        driver.frontend.sync()
        assert serving.stats.connections == 1
    assert any("called Chain.finish" in line for line in caplog.messages)


def _raises(chain: Chain) -> int:
    raise OSError("no")


class Slack(Future[int]):
    """Takes its time to be cancelled."""

    cancelled_so_far = 0

    def cancel(self) -> bool:
        type(self).cancelled_so_far += 1
        time.sleep(budgets.CANCEL_SECONDS)
        return super().cancel()


def test_futures_that_are_slow_to_cancel_delay_a_stop_once(
    device: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slack, "cancelled_so_far", 0)
    device.answer = lambda chain: Slack()
    with (
        Serving(device, tmp_path / "socket", stop_timeout=0.05) as serving,
        Driver(serving.path) as driver,
    ):
        numbers = [driver.submit(0, b"1234") for _ in range(20)]
        # A slow batch leaves some of them in the ring for the next one.
        until(lambda: serving.stats.outstanding == 20)
        driver.stop(0)
        driver.wait(0, numbers[-1])
    assert Slack.cancelled_so_far == 1
