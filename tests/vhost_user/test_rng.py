"""An entropy device behind its socket: what it fills, and sources that have nothing or end."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from guestio.budgets import ENTROPY_BYTES
from guestio.errors import DeviceError
from guestio.virtio.rng import EntropyDevice
from tests.kit.rings import WRITE, Desc
from tests.kit.serving import (
    BUFFERS,
    Driver,
    Serving,
    nothing_left,
    promptly,
    until,
    warnings_of,
)

CONTENTS = bytes(range(1, 101))


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A pipe with a name, and its end for writing."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    writing = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    yield path, writing
    os.close(writing)


def ask(driver: Driver, room: int, number: int = 0) -> int:
    """Begin a request of so many bytes."""
    ring = driver.rings[0]
    at = ring.offered
    place = BUFFERS + number * 0x20000
    driver.memory.write(place, bytes(room))
    ring.offer(ring.put_chain(at % driver.size, Desc(driver.at(place), room, WRITE)))
    driver.handles[0].kick()
    return at


def answer(driver: Driver, at: int, number: int = 0) -> bytes:
    """What a request was answered with."""
    driver.wait(0, at)
    _, written = driver.rings[0].used_entry(at)
    return driver.memory.read(BUFFERS + number * 0x20000, written)


@pytest.mark.parametrize("iommu", [False, True])
def test_random_bytes(tmp_path: Path, iommu: bool) -> None:
    with nothing_left():
        device = EntropyDevice()
        with (
            Serving(device, tmp_path / "s") as serving,
            Driver(serving.path, iommu=iommu) as driver,
        ):
            first = answer(driver, ask(driver, 64))
            second = answer(driver, ask(driver, 64))
            assert len(first) == len(second) == 64
            assert first != second
            assert len(answer(driver, ask(driver, 2 * ENTROPY_BYTES))) == ENTROPY_BYTES
        device.close()
        device.close()


def test_a_file_begins_again(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(CONTENTS)
    device = EntropyDevice(tmp_path / "source")
    with Serving(device, tmp_path / "s") as serving, Driver(serving.path) as driver:
        got = b""
        while len(got) < 250:
            got += answer(driver, ask(driver, 30))
        assert got[:250] == (CONTENTS * 3)[:250]
    device.close()


@pytest.mark.parametrize("queue_threads", [False, True])
def test_requests_wait_for_a_source_that_has_nothing(
    tmp_path: Path, fifo: tuple[Path, int], queue_threads: bool
) -> None:
    path, writing = fifo
    device = EntropyDevice(path)
    with (
        Serving(device, tmp_path / "s", queue_threads=queue_threads) as serving,
        Driver(serving.path) as driver,
    ):
        first, second = ask(driver, 10, 0), ask(driver, 10, 1)
        until(lambda: serving.stats.outstanding == 2)
        os.write(writing, b"0123456789AB")
        assert answer(driver, first, 0) == b"0123456789"
        assert answer(driver, second, 1) == b"AB"
        third = ask(driver, 10, 2)
        until(lambda: serving.stats.outstanding == 1)
        os.write(writing, b"xyz")
        assert answer(driver, third, 2) == b"xyz"
    device.close()


def test_a_stop_does_not_wait_for_the_source(tmp_path: Path, fifo: tuple[Path, int]) -> None:
    path, writing = fifo
    device = EntropyDevice(path)
    with Serving(device, tmp_path / "s", stop_timeout=60) as serving:
        with Driver(serving.path) as driver:
            asked = ask(driver, 10)
            until(lambda: serving.stats.outstanding == 1)
            with promptly(1.0):
                assert driver.stop(0) == 1
            assert driver.rings[0].used_entry(asked) == (0, 0)
        with Driver(serving.path) as driver:
            asked = ask(driver, 10)
            until(lambda: serving.stats.outstanding == 1)
            os.write(writing, b"again")
            assert answer(driver, asked) == b"again"
    device.close()


def test_a_source_that_ends_fails_requests(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    device = EntropyDevice(path)
    with Serving(device, tmp_path / "s") as serving, Driver(serving.path) as driver:
        assert answer(driver, ask(driver, 10)) == b""
        assert serving.stats.failed_requests == 1
    assert "has no more random bytes" in warnings_of(caplog)[0]
    assert "EntropyDevice.process" in warnings_of(caplog)[0]
    device.close()


def test_requests_without_room(tmp_path: Path) -> None:
    device = EntropyDevice()
    with Serving(device, tmp_path / "s") as serving, Driver(serving.path) as driver:
        assert driver.run_raw(0, Desc(BUFFERS, 10)) == (0, 0)
        head, written = driver.run_raw(0, Desc(BUFFERS, 10), Desc(BUFFERS + 64, 1, WRITE))
        assert (head, written) == (0, 1)
        # Only a part of the buffer is memory.
        assert driver.run_raw(0, Desc(Driver.SIZE - 8, 16, WRITE)) == (0, 0)
        assert serving.stats.failed_requests == 1
    device.close()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("absent", "cannot be opened: No such file"),
        (".", "is a directory"),
        ("empty", "is an empty file"),
        ("nul\0", "cannot be opened: .*embedded null"),
    ],
)
def test_sources_that_are_none(tmp_path: Path, name: str, complaint: str) -> None:
    (tmp_path / "empty").touch()
    with nothing_left(), pytest.raises(DeviceError, match=complaint):
        EntropyDevice(f"{tmp_path}/{name}")


def test_without_a_host_a_request_fails_that_would_wait(fifo: tuple[Path, int]) -> None:
    device = EntropyDevice(fifo[0])
    request = SimpleNamespace(writable=SimpleNamespace(total=10))
    with pytest.raises(DeviceError, match="nothing waits for it"):
        device.process(0, request)  # type: ignore[arg-type]
    device.close()


def test_many_drivers_and_threads(tmp_path: Path) -> None:
    """A device that answers later is asked by two queues' threads at once."""
    fds = os.pipe2(os.O_NONBLOCK)
    path = Path(f"/proc/self/fd/{fds[0]}")
    device = EntropyDevice(path)
    device.num_queues = 2
    with (
        Serving(device, tmp_path / "s", queue_threads=True) as serving,
        Driver(serving.path, queues=2) as driver,
    ):
        stop = threading.Event()

        def feed() -> None:
            while not stop.wait(0.001):
                with contextlib.suppress(BlockingIOError):
                    os.write(fds[1], b"0123456789")

        feeder = threading.Thread(target=feed)
        feeder.start()
        try:
            for round_number in range(100):
                numbers = [driver.submit(index, b"x", 9) for index in (0, 1)]
                for index, number in enumerate(numbers):
                    driver.wait(index, number)
                    assert 1 <= driver.rings[index].used_entry(number)[1] <= 10, round_number
        finally:
            stop.set()
            feeder.join()
    device.close()
    for fd in fds:
        os.close(fd)
