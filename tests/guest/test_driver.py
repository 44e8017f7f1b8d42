"""The driver of any device, without a virtual machine: against devices that are served for real."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from guestio.errors import DeviceError, GuestioError, QueueError
from guestio.testing import Driver, Shape
from guestio.testing import serving as shipped_serving
from guestio.vhost_user import Frontend
from guestio.vhost_user.channel import PeerGoneError
from guestio.vhost_user.iotlb_service import MissAction, MissAnswer
from guestio.vhost_user.request_channel import NoAnswerError, RefusedError
from guestio.virtio import Chain, Device, DeviceHost, DeviceId
from tests.kit.serving import WAIT, Serving, nothing_left

MODES = ["off", "static", "strict"]


class Post(Device):
    """A post office: what is sent on queue 1 arrives in the buffers of queue 0; 2 answers."""

    device_id = DeviceId.CONSOLE
    num_queues = 3
    device_queues = (0, 1)
    features = 0b101

    def __init__(self) -> None:
        self.name = b"post office"
        self.waiting: list[bytes] = []
        self.taken: list[Chain] = []
        self.silent = False

    def attached(self, host: DeviceHost) -> None:
        self.host = host
        host.queue(0).on_available(self.deliver)
        host.queue(1).on_available(self.collect)

    def collect(self) -> None:
        while not self.silent and (chain := self.host.queue(1).take()) is not None:
            self.waiting.append(chain.readable.read())
            self.host.queue(1).complete(chain)
        self.deliver()

    def deliver(self) -> None:
        while self.waiting and self.host.queue(0).send(self.waiting[0]):
            del self.waiting[0]

    def process(self, queue: int, chain: Chain) -> int:
        data = chain.readable.read()[::-1]
        chain.writable.write(data)
        return len(data)

    def config(self) -> bytes:
        return self.name

    def write_config(self, offset: int, data: bytes) -> None:
        if offset:
            raise DeviceError("the name is written as a whole")
        self.name = data


@pytest.fixture
def post() -> Post:
    return Post()


@pytest.fixture
def serving(post: Post, tmp_path: Path) -> Iterator[Serving]:
    with Serving(post, tmp_path / "socket") as made:
        yield made


@pytest.fixture(params=MODES)
def driver(serving: Serving, request: pytest.FixtureRequest) -> Iterator[Driver]:
    with Driver(serving.path, iommu=request.param) as made:
        yield made


class TestBuffers:
    def test_what_is_sent_arrives(self, driver: Driver) -> None:
        for text in (b"one", b"two" * 3000, b"3"):
            there = driver.post(10000)
            sent = driver.send(text, queue=1)
            got = driver.receive()
            assert got is there
            assert (got.data, got.written, got.done) == (text, len(text), True)
            assert driver.receive(1) is sent
            assert (sent.data, sent.written) == (b"", 0)

    def test_requests(self, driver: Driver) -> None:
        rng = random.Random(1)
        free = driver._pages.free
        for length in (1, 100, 4096, 5000, 70000):
            data = rng.randbytes(length)
            assert driver.request(data, length, queue=2) == data[::-1]
            assert driver.request(data, length + 10, 2) == data[::-1]
        assert driver._pages.free == free

    def test_any_shape(self, driver: Driver) -> None:
        rng = random.Random(2)
        for _ in range(40):
            data = rng.randbytes(rng.randrange(1, 9000))
            shape = Shape.random(rng, len(data), len(data))
            assert driver.request(data, len(data), 2, shape=shape) == data[::-1]

    def test_used_buffers_come_in_their_order(self, driver: Driver) -> None:
        buffers = [driver.post(16) for _ in range(40)]
        for number in range(40):
            driver.send(b"%d" % number, 1)
            if number % 9 == 0:
                driver.poll(1)
        assert [driver.receive() for _ in range(40)] == buffers
        assert [each.data for each in buffers] == [b"%d" % number for number in range(40)]
        assert driver.in_flight() == 0

    def test_what_was_waited_for_is_not_received_again(self, driver: Driver) -> None:
        first, second = driver.submit(b"ab", 2, 2), driver.submit(b"cd", 2, 2)
        assert driver.wait(second).data == b"dc"
        assert driver.wait(second).data == b"dc"
        assert driver.receive(2) is first
        with pytest.raises(DeviceError, match="queue 2: the device has no buffer"):
            driver.receive(2)

    def test_the_device_sees_what_is_published(self, driver: Driver, post: Post) -> None:
        first = driver.submit(b"ab", 2, 2, publish=False)
        driver.frontend.sync()
        time.sleep(0.02)
        assert driver.poll(2) == []
        assert driver.in_flight(2) == 0
        driver.publish(2)
        assert driver.wait(first).data == b"ba"

    def test_a_full_queue(self, serving: Serving, post: Post) -> None:
        post.silent = True
        with Driver(serving.path, queue_size=4, indirect=False) as driver:
            free = driver._pages.free
            for _ in range(4):
                driver.send(b"x", 1)
            with pytest.raises(QueueError, match="1 descriptors are needed, 0 are free"):
                driver.send(b"x", 1)
            assert driver._pages.free == free - 4
            post.silent = False
            post.host.call_soon_threadsafe(post.collect)
            for _ in range(4):
                driver.receive(1)
            driver.send(b"x", 1)

    def test_of_more_than_one_thread(self, driver: Driver) -> None:
        def ask(queue: int) -> None:
            for number in range(50):
                if queue == 2:
                    assert driver.request(b"%d" % number, 8, 2) == (b"%d" % number)[::-1]
                else:
                    driver.post(8)
                    driver.send(b"%d" % number, 1)
                    assert driver.receive().data == b"%d" % number
                    driver.poll(1)

        with ThreadPoolExecutor(2) as pool:
            for call in [pool.submit(ask, queue) for queue in (0, 2)]:
                call.result(30)

    @pytest.mark.parametrize(
        "options",
        [
            {"polling": True},
            {"answer": "caller"},
            {"event_idx": False, "indirect": False},
            {"contiguous": True},
            {"reuse_iovas": False, "granularity": None},
            {"queue_size": 1024},
        ],
        ids=str,
    )
    def test_options(self, serving: Serving, options: dict[str, Any]) -> None:
        for mode in MODES:
            with Driver(serving.path, iommu=mode, **options) as driver:  # type: ignore[arg-type]
                data = b"0123456789" * 1000
                assert driver.request(data, len(data), 2) == data[::-1]


class TestTimes:
    def test_a_device_that_does_not_answer(self, driver: Driver, post: Post) -> None:
        driver.post(10)
        with pytest.raises(NoAnswerError, match=r"queue 0: .* any of 1 requests for 0.05 s"):
            driver.receive(timeout=0.05)
        post.silent = True
        sent = driver.send(b"x", 1)
        with pytest.raises(NoAnswerError, match="queue 1"):
            driver.wait(sent, timeout=0)
        post.silent = False
        post.host.call_soon_threadsafe(post.collect)
        assert driver.wait(sent).done
        assert driver.receive().data == b"x"

    def test_the_drivers_own_limit(self, serving: Serving) -> None:
        with Driver(serving.path, timeout=0.05) as driver:
            driver.post(10)
            with pytest.raises(NoAnswerError, match=r"for 0.05 s"):
                driver.receive()
            with pytest.raises(NoAnswerError, match=r"configuration for 0.05 s"):
                driver.wait_config_change()

    def test_a_back_end_that_goes_away(self, post: Post, tmp_path: Path) -> None:
        with Serving(post, tmp_path / "socket") as serving:
            driver = Driver(serving.path)
            driver.post(10)
            serving.backend.stop()
            with pytest.raises(PeerGoneError):
                driver.receive()
        driver.close()

    def test_a_translation_that_does_not_come(self, post: Post, tmp_path: Path) -> None:
        with (
            Serving(post, tmp_path / "socket", miss_timeout=1.0) as serving,
            Driver(serving.path, iommu="strict") as driver,
        ):
            assert driver.request(b"fine", 4, 2) == b"enif"
            driver.frontend.iotlb.miss_hook = lambda _: MissAnswer(MissAction.IGNORE)
            with pytest.raises(GuestioError):
                driver.request(b"lost", 4, 2, timeout=30)
                raise DeviceError("it failed without an answer, as this device's type has none")


class TestSetUp:
    def test_features(self, serving: Serving, post: Post) -> None:
        with Driver(serving.path) as driver:
            assert driver.features & 0xFFFFFF == 0b101
            assert driver.features >> 32 & 1
        with Driver(serving.path, features=0b100) as driver:
            assert driver.features & 0xFFFFFF == 0b100

    def test_queues(self, serving: Serving) -> None:
        with Driver(serving.path) as driver:
            assert driver.queues == 3
            assert "3 queues" in repr(driver)
        with Driver(serving.path, queues=1) as driver:
            assert driver.queues == 1
            with pytest.raises(ValueError, match="the driver uses 1 queues, not a queue 1"):
                driver.post(1, 1)
        with nothing_left(), pytest.raises(DeviceError, match="3 queues, not 4"):
            Driver(serving.path, queues=4)

    def test_a_device_without_an_iommu(self, post: Post, tmp_path: Path) -> None:
        with (
            Serving(post, tmp_path / "socket", iommu="off") as serving,
            nothing_left(),
            pytest.raises(DeviceError, match="VIRTIO_F_ACCESS_PLATFORM"),
        ):
            Driver(serving.path, iommu="strict")

    def test_again_and_again(self, driver: Driver) -> None:
        free = driver._pages.free
        for number in range(5):
            driver.post(16)
            driver.post(16)
            driver.send(b"%d" % number, 1)
            assert driver.receive().data == b"%d" % number
            driver.pause()
            driver.resume()
            driver.send(b"after", 1)
            assert driver.receive().data == b"after"
            driver.post(16)
            driver.reset()
            assert driver.in_flight() == 0
            assert driver._pages.free == free
        assert driver.request(b"fine", 4, 2) == b"enif"

    @pytest.mark.parametrize("mode", MODES)
    def test_nothing_is_left(self, serving: Serving, mode: Any) -> None:
        with nothing_left():
            with Driver(Frontend(serving.path), iommu=mode) as driver:
                driver.post(100)
                kept = [driver.post(100)]
                driver.send(b"x", 1)
                driver.receive()
            driver.close()
            serving.let_go()
        assert kept[0].done is False, "the test has it still, and no memory of the guest"

    @pytest.mark.parametrize(
        "options",
        [
            {"queues": -1},
            {"queues": "1"},
            {"iommu": "on"},
            {"features": "net"},
            {"timeout": -1},
            {"memory_size": 4096},
            {"queue_size": 3},
        ],
        ids=str,
    )
    def test_wrong_arguments(self, serving: Serving, options: dict[str, Any]) -> None:
        with nothing_left(), pytest.raises((TypeError, ValueError)):
            Driver(serving.path, **options)

    def test_wrong_buffers(self, serving: Serving) -> None:
        with Driver(serving.path) as driver:
            free = driver._pages.free
            for size in (0, -1, "1", 1 << 40):
                with pytest.raises((TypeError, ValueError, DeviceError)):
                    driver.post(size)  # type: ignore[arg-type]
            for data in ("text", b"", None):
                with pytest.raises((TypeError, ValueError)):
                    driver.send(data)  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                driver.post(1, "0")  # type: ignore[arg-type]
            assert driver._pages.free == free


class TestConfiguration:
    def test_it_is_read_and_written(self, driver: Driver) -> None:
        assert driver.config(0, 11) == b"post office"
        assert driver.config(5, 8) == b"office\0\0"
        driver.write_config(0, b"name")
        assert driver.config(size=4) == b"name"
        with pytest.raises(RefusedError):
            driver.write_config(1, b"x")

    def test_its_changes_are_seen(self, driver: Driver, post: Post) -> None:
        assert driver.config(0, 4) == b"post"

        def change() -> None:
            post.name = b"mail office"
            post.host.config_changed()

        timer = threading.Timer(0.02, change)
        timer.start()
        driver.wait_config_change()
        assert driver.config(0, 4) == b"mail"
        with pytest.raises(NoAnswerError):
            driver.wait_config_change(0.01)
        timer.join()


class Unplugged(Device):
    device_id = 61

    def process(self, queue: int, chain: Chain) -> int:
        raise SystemExit("sensor unplugged")


def test_what_ended_the_back_end_is_the_cause_of_what_its_driver_raised() -> None:
    with (
        pytest.raises(PeerGoneError) as caught,
        shipped_serving(Unplugged()) as path,
        Driver(path, timeout=WAIT) as driver,
    ):
        driver.request(b"", 4)
    cause = caught.value.__cause__
    assert isinstance(cause, SystemExit)
    assert cause.code == "sensor unplugged"
