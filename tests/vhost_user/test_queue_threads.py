"""Queues with threads of their own: at the same time, changed under load, and gone in the end."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from guestio._core.virtio.chain import Chain
from guestio.addr import Permissions
from guestio.errors import DeviceError
from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from guestio.vhost_user import Frontend
from guestio.vhost_user.frontend import FrontendQueue
from guestio.vhost_user.iotlb_service import MissAction, MissAnswer
from guestio.vhost_user.messages import FrontendRequest, IotlbMessage, VringAddr
from tests.kit.rings import PAGE, WRITE, Desc
from tests.kit.serving import (
    BUFFERS,
    FAILED,
    IOVA,
    OK,
    VERSION_1,
    WAIT,
    Driver,
    Load,
    Mirror,
    Serving,
    errors_of,
    nothing_left,
    until,
    warnings_of,
)

QUEUES = 3


class Meeting(Mirror):
    """Requests that say MEET wait until as many are being served as the barrier is for.

    Those that say POOL are served by other threads, and what says BUSY until it is told to stop.
    """

    def __init__(self, queues: int = QUEUES) -> None:
        super().__init__(queues)
        self.barrier = threading.Barrier(queues, timeout=WAIT)
        self.threads: dict[int, set[str]] = {index: set() for index in range(queues)}
        self.pool: ThreadPoolExecutor | None = None
        self.overlap: set[int] = set()
        self._busy: set[int] = set()

    def process(self, queue: int, chain: Chain) -> int | Future[int]:
        # One at a time for each queue, as a device is promised.
        if queue in self._busy:
            self.overlap.add(queue)
        self._busy.add(queue)
        self.threads[queue].add(threading.current_thread().name)
        try:
            word = chain.readable.read()[:4]
            if word == b"MEET":
                self.barrier.wait()
            if self.pool is not None and word == b"POOL":
                return self.pool.submit(super().process, queue, chain)  # type: ignore[arg-type]
            return super().process(queue, chain)
        finally:
            self._busy.discard(queue)


@pytest.fixture
def device() -> Meeting:
    return Meeting()


@pytest.fixture
def serving(device: Meeting, tmp_path: Path) -> Iterator[Serving]:
    with Serving(device, tmp_path / "socket", queue_threads=True, miss_timeout=2.0) as made:
        yield made
        device.go_on.set()


@pytest.fixture
def driver(serving: Serving) -> Iterator[Driver]:
    with Driver(serving.path, queues=QUEUES) as made:
        yield made


def mirrored(source: bytes) -> tuple[int, bytes]:
    """Status and answer of a request that was served."""
    return OK, source[::-1]


def queue_threads() -> list[str]:
    """The threads that serve queues."""
    return sorted(each.name for each in threading.enumerate() if "queue" in each.name)


class TestAtTheSameTime:
    def test_requests_that_wait_for_each_other(self, device: Meeting, driver: Driver) -> None:
        for lap in range(20):
            numbers = [driver.submit(index, b"MEET %d" % lap) for index in range(QUEUES)]
            for index, number in enumerate(numbers):
                driver.wait(index, number)
        assert {index: len(names) for index, names in device.threads.items()} == {0: 1, 1: 1, 2: 1}
        assert len(set().union(*device.threads.values())) == QUEUES

    def test_a_busy_queue_delays_no_other(self, device: Meeting, driver: Driver) -> None:
        number = driver.submit(0, b"WAIT")
        assert device.entered.wait(WAIT)
        for _ in range(5):
            assert driver.run(1, b"text") == mirrored(b"text")
            driver.frontend.sync()
        assert driver.stop(1) == 5
        driver.start(1, 5)
        assert driver.run(1, b"text") == mirrored(b"text")
        assert not driver.done(0, number)
        device.go_on.set()
        driver.wait(0, number)

    def test_without_threads_it_would(self, device: Meeting, tmp_path: Path) -> None:
        with (
            Serving(device, tmp_path / "other") as serving,
            Driver(serving.path, queues=2) as driver,
        ):
            driver.submit(0, b"WAIT")
            assert device.entered.wait(WAIT)
            number = driver.submit(1, b"text")
            assert not driver.handles[1].wait_call(0.02)
            device.go_on.set()
            driver.wait(1, number)

    def test_one_request_of_a_queue_at_a_time(self, device: Meeting, driver: Driver) -> None:
        loads = [Load(driver, index) for index in range(QUEUES)]
        for _ in range(60):
            for load in loads:
                load.submit(5)
                load.reap()
        for load in loads:
            load.finish()
        assert device.overlap == set()

    def test_statistics_add_up(self, serving: Serving, driver: Driver, device: Meeting) -> None:
        device.error = DeviceError("no")
        loads = [Load(driver, index, seed=index) for index in range(QUEUES)]
        for lap in range(80):
            for load in loads:
                load.submit(4, b"RAISE" if lap % 4 == 0 else b"")
                load.reap()
        for load in loads:
            load.finish()
        assert serving.stats.requests == sum(load.done for load in loads)
        assert serving.stats.failed_requests == sum(load.failed for load in loads) > 20


class TestStart:
    def test_requests_that_were_announced_before_the_kick_fd_came(
        self, driver: Driver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The eventfd counts already when the back-end learns of it."""
        made = FrontendQueue.__init__

        def made_and_kicked(queue: FrontendQueue, *args: object, **options: object) -> None:
            made(queue, *args, **options)  # type: ignore[arg-type]
            queue.kick()

        monkeypatch.setattr(FrontendQueue, "__init__", made_and_kicked)
        for _ in range(50):
            base = driver.stop(0)
            number = driver.prepare(0, b"text")
            driver.start(0, base)
            driver.wait(0, number)


class TestChanges:
    """Each while another queue is in the middle of a request, and under load."""

    def test_a_queue_that_is_busy_is_waited_for(self, device: Meeting, driver: Driver) -> None:
        number = driver.submit(0, b"WAIT")
        assert device.entered.wait(WAIT)
        stopping = threading.Thread(target=driver.stop, args=(0,))
        stopping.start()
        stopping.join(0.05)
        assert stopping.is_alive()
        device.go_on.set()
        stopping.join(WAIT)
        assert not stopping.is_alive()
        assert driver.done(0, number)

    @pytest.mark.parametrize("table", [False, True], ids=["region", "table"])
    def test_memory(self, driver: Driver, table: bool) -> None:
        extra = Backing.memfd(PAGE)
        both = GuestRegionCollection.from_regions([*driver.memory, MmapRegion(1 << 32, extra)])
        loads = [Load(driver, index) for index in range(QUEUES)]
        for _ in range(25):
            for memory in (both, driver.memory):
                for load in loads:
                    load.submit(6)
                driver.frontend.set_memory(memory, slots=not table)
                for load in loads:
                    load.reap()
        for load in loads:
            load.finish()
        assert [load.failed for load in loads] == [0] * QUEUES
        del both
        extra.close()

    def test_reset(self, device: Meeting, driver: Driver) -> None:
        for lap in range(15):
            loads = [Load(driver, index, seed=lap) for index in range(QUEUES)]
            for load in loads:
                load.submit(20)
            driver.frontend.reset_device()
            for load in loads:
                load.reap()
            used = [ring.used_idx for ring in driver.rings.values()]
            seen = len(device.seen)
            assert seen == sum(used), "what was begun was finished"
            device.seen.clear()
            for index in range(QUEUES):
                driver.add_queue(index)
        assert device.resets == 15
        assert driver.run(0, b"text") == mirrored(b"text")

    def test_translations_are_taken_away(self, serving: Serving) -> None:
        with Driver(serving.path, queues=QUEUES, iommu=True, pipeline=8) as driver:
            rng = random.Random(1)
            loads = [Load(driver, index) for index in range(QUEUES)]
            for _ in range(60):
                for load in loads:
                    load.submit(rng.randrange(8))
                    load.reap()
                load = rng.choice(loads)
                driver.frontend.iotlb.invalidate(
                    *((driver.at(load.place(rng.randrange(32))), 2 * PAGE) for _ in range(4))
                )
                if rng.random() < 0.1:
                    driver.frontend.iotlb.invalidate((0, 1 << 64))
            for load in loads:
                load.finish()
            assert [load.failed for load in loads] == [0] * QUEUES
            assert serving.stats.iotlb_misses > 60

    def test_a_revocation_waits_for_a_busy_queue(self, device: Meeting, serving: Serving) -> None:
        with Driver(serving.path, queues=2, iommu=True) as driver:
            number = driver.submit(0, b"WAIT")
            assert device.entered.wait(WAIT)
            page = driver.at(driver.buffer(0, number))
            revoking = threading.Thread(
                target=driver.frontend.iotlb.unmap, args=((page, 2 * PAGE),)
            )
            revoking.start()
            revoking.join(0.05)
            assert revoking.is_alive()
            device.go_on.set()
            revoking.join(WAIT)
            assert not revoking.is_alive()
            driver.wait(0, number)
            assert driver.result(0, number, 4) == mirrored(b"WAIT")


class TestMisses:
    def test_of_all_queues_at_once(self, serving: Serving) -> None:
        with Driver(serving.path, queues=QUEUES, iommu=True) as driver:
            rng = random.Random(2)
            driver.frontend.iotlb.miss_hook = lambda _: MissAnswer(
                MissAction.ANSWER, rng.choice((0, 0, 0, 0.003))
            )
            loads = [Load(driver, index) for index in range(QUEUES)]
            for _ in range(12):
                for load in loads:
                    load.submit(8)
                for load in loads:
                    load.finish()
                driver.frontend.iotlb.invalidate((0, 1 << 64))
            assert [load.failed for load in loads] == [0] * QUEUES

    def test_that_are_refused_or_never_answered(self, serving: Serving) -> None:
        with Driver(serving.path, queues=QUEUES, iommu=True) as driver:
            for index in range(QUEUES):
                driver.run(index, b"warm")
            lost, refused = driver.at(0x180000), driver.at(0x190000)
            driver.frontend.iotlb.miss_hook = lambda message: MissAnswer(
                {lost: MissAction.IGNORE, refused: MissAction.REFUSE}.get(
                    message.iova, MissAction.ANSWER
                )
            )
            for index, place in ((0, lost), (1, refused)):
                ring = driver.rings[index]
                status = driver.at(driver.buffer(index, 0) + PAGE)
                ring.offer(ring.put_chain(40, Desc(place, 8), Desc(status, 1, WRITE)))
                driver.handles[index].kick()
            assert driver.run(2, b"text") == mirrored(b"text")
            for index in (0, 1):
                driver.wait(index, 1)
                assert driver.memory.read(driver.buffer(index, 0) + PAGE, 1) == bytes([FAILED])
            stats = serving.stats
            assert (stats.failed_requests, stats.iotlb_timeouts, stats.iotlb_refused) == (2, 1, 2)

    def test_forbidden_accesses_of_all_queues(self, serving: Serving) -> None:
        with Driver(serving.path, queues=QUEUES, iommu=True) as driver:
            page = driver.at(0x180000)
            driver.frontend.iotlb.unmap((page, PAGE))
            driver.frontend.iotlb.map(page, 0x180000, PAGE, Permissions.READ)
            for index in range(QUEUES):
                assert driver.run(index, b"warm") == mirrored(b"warm")
                driver.run_raw(index, Desc(page, 4), Desc(driver.at(BUFFERS), 5, WRITE))
            for _ in range(5):
                for index in range(QUEUES):
                    ring = driver.rings[index]
                    ring.offer(
                        ring.put_chain(40, Desc(driver.at(BUFFERS), 4), Desc(page, 5, WRITE))
                    )
                    driver.handles[index].kick()
                for index in range(QUEUES):
                    driver.wait(index, driver.rings[index].offered - 1)
            assert serving.stats.failed_requests == 15
            assert serving.stats.access_fails == 15
            until(lambda: driver.frontend.iotlb.counts.access_fails == 15)


class TestDevicesThatFail:
    @pytest.mark.parametrize("error", [DeviceError("no"), RuntimeError("no"), MemoryError()])
    def test_a_request(self, device: Meeting, driver: Driver, error: Exception) -> None:
        device.error = error
        numbers = [driver.submit(index, b"RAISE") for index in range(QUEUES)]
        for index, number in enumerate(numbers):
            driver.wait(index, number)
            assert driver.rings[index].used_entry(number) == (0, 0)
            assert driver.run(index, b"text") == mirrored(b"text")

    def test_in_a_queues_thread(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """A mistake outside of a request costs the connection, and nothing after it."""
        device = Mistaken()
        with Serving(device, tmp_path / "socket", queue_threads=True) as serving:
            with Driver(serving.path, queues=2) as driver:
                driver.run(0, b"text")
                device.wrong = True
                driver.submit(1, b"text")
                until(lambda: device.resets == 1)
            device.wrong = False
            assert errors_of(caplog) == ["serving failed"]
            serving.check_serves()
            assert len(queue_threads()) == 2

    def test_in_two_queues_at_once(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """It is one mistake of one connection; the next one does not pay for the rest of it."""
        device = MistakenTogether()
        with (
            Serving(device, tmp_path / "socket", queue_threads=True) as serving,
            Driver(serving.path, queues=2) as driver,
        ):
            for index in range(2):
                driver.run(index, b"text")
            with Frontend(serving.path, timeout=WAIT) as following:
                device.wrong = True
                for index in range(2):
                    driver.submit(index, b"text")
                until(lambda: device.resets == 1)
                device.wrong = False
                following.negotiate(VERSION_1)
            assert errors_of(caplog) == ["serving failed"]

    def test_before_a_connection_is_set_up(self, tmp_path: Path) -> None:
        device = Featureless()
        with Serving(device, tmp_path / "socket", queue_threads=True) as serving:
            device.wrong = True
            with nothing_left(), serving.connect() as connected:
                assert connected.recv(1) == b""
            device.wrong = False
            serving.check_serves()

    @pytest.mark.parametrize("threads", [False, True], ids=["one thread", "queue threads"])
    def test_one_that_leaves_takes_the_back_end_along(self, tmp_path: Path, threads: bool) -> None:
        """A queue that silently is not served any more would be worse."""
        serving = Serving(Leaving(), tmp_path / "socket", queue_threads=threads)
        with serving, Driver(serving.path) as driver:
            driver.submit(0, b"LEAVE")
            until(lambda: not serving.alive)
            error, serving.error = serving.error, None
            assert isinstance(error, SystemExit)

    def test_a_broken_ring_is_alone(self, driver: Driver, serving: Serving) -> None:
        driver.rings[0].set_avail_idx(0x1234)
        driver.handles[0].kick()
        until(lambda: driver.handles[0].failed())
        until(lambda: serving.stats.queue_errors == 1)
        for index in (1, 2):
            assert driver.run(index, b"text") == mirrored(b"text")

    def test_rings_that_break_all_at_once(self, driver: Driver, serving: Serving) -> None:
        for index in range(QUEUES):
            driver.rings[index].set_avail_idx(0x1234)
        for index in range(QUEUES):
            driver.handles[index].kick()
        until(lambda: serving.stats.queue_errors == QUEUES)
        driver.frontend.sync()
        assert driver.frontend.get_status() & 64


class Mistaken(Mirror):
    """A device one of whose attributes cannot be had."""

    wrong = False

    @property
    def server(self) -> None:  # type: ignore[override]
        if self.wrong:
            raise RuntimeError("there is none")


class MistakenTogether(Mistaken):
    """One that fails in two threads at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.barrier = threading.Barrier(2, timeout=WAIT)

    @property
    def server(self) -> None:  # type: ignore[override]
        if self.wrong:
            self.barrier.wait()
        return super().server


class Featureless(Mirror):
    """A device whose features cannot be had."""

    wrong = False

    @property
    def features(self) -> int:  # type: ignore[override]
        if self.wrong:
            raise RuntimeError("there are none")
        return 0b101

    @features.setter
    def features(self, features: int) -> None:
        assert features == 0b101


class Leaving(Mirror):
    """Ends its thread when it is told so."""

    def process(self, queue: int, chain: Chain) -> int | Future[int]:
        if chain.readable.read() == b"LEAVE":
            raise SystemExit(3)
        return super().process(queue, chain)


class TestEnd:
    def test_of_a_connection(self, tmp_path: Path, device: Meeting) -> None:
        with nothing_left(), Serving(device, tmp_path / "socket", queue_threads=True) as serving:
            with nothing_left(), Driver(serving.path, queues=QUEUES) as driver:
                assert len(queue_threads()) == QUEUES
                for index in range(QUEUES):
                    driver.run(index, b"text")
            for _ in range(5):
                serving.check_serves()
            assert len(queue_threads()) == QUEUES
        assert queue_threads() == []

    def test_of_a_connection_in_the_middle(self, tmp_path: Path, device: Meeting) -> None:
        with Serving(device, tmp_path / "socket", queue_threads=True) as serving:
            for lap in range(10):
                with nothing_left():
                    driver = Driver(serving.path, queues=QUEUES)
                    loads = [Load(driver, index, seed=lap) for index in range(QUEUES)]
                    for load in loads:
                        load.submit(20)
                    driver.close()
                    del loads, load, driver
            until(lambda: device.resets == 10)
            serving.check_serves()

    @pytest.mark.parametrize("busy", [False, True])
    def test_of_the_back_end_in_the_middle(
        self, tmp_path: Path, device: Meeting, busy: bool
    ) -> None:
        with nothing_left():
            with Serving(device, tmp_path / "socket", queue_threads=True) as serving:
                driver = Driver(serving.path, queues=QUEUES)
                loads = [Load(driver, index) for index in range(QUEUES)]
                for load in loads:
                    load.submit(25)
                if busy:
                    driver.submit(0, b"WAIT")
                    assert device.entered.wait(WAIT)
                serving.backend.stop()
                device.go_on.set()
            # What is in the used rings is right, and nothing comes any more.
            used = [ring.used_idx for ring in driver.rings.values()]
            if not busy:
                for load in loads:
                    load.reap()
            assert [ring.used_idx for ring in driver.rings.values()] == used
            assert len(device.seen) == sum(used)
            driver.close()
            del loads, load, driver

    def test_from_a_queues_thread(self, tmp_path: Path, device: Meeting) -> None:
        with nothing_left():
            serving = Serving(device, tmp_path / "socket", queue_threads=True)
            device.barrier = threading.Barrier(1, action=serving.backend.stop)
            with serving, Driver(serving.path, queues=2) as driver:
                driver.submit(1, b"MEET")
                until(lambda: not serving.alive)
                assert driver.done(1, 0)


def _again(driver: Driver, index: int) -> None:
    layout = driver.layout(index)
    places = [layout.desc, layout.used, layout.avail]
    if not driver.iommu:
        places = [driver.frontend.user_address(place) for place in places]
    driver.frontend.request(FrontendRequest.SET_VRING_ADDR, VringAddr(index, 0, *places))


def _restart(driver: Driver, index: int) -> None:
    driver.start(index, driver.stop(index))
    driver.handles[index].kick()


def _pause(driver: Driver, index: int) -> None:
    driver.frontend.enable_queue(index, enable=False)
    driver.frontend.enable_queue(index, enable=True)


def _forget(driver: Driver, index: int) -> None:
    if driver.iommu:
        driver.frontend.iotlb.invalidate((IOVA, Driver.SIZE))


def _tell(driver: Driver, index: int) -> None:
    """A translation that was not requested."""
    if driver.iommu:
        place = driver.buffer(index, 3)
        message = IotlbMessage.update(
            driver.at(place), PAGE, driver.frontend.user_address(place), 3
        )
        driver.frontend.request(FrontendRequest.IOTLB_MSG, message)


CONTROLS: list[Callable[[Driver, int], None]] = [
    _again,
    _restart,
    _pause,
    _forget,
    _tell,
    lambda driver, index: driver.frontend.set_memory(driver.memory, slots=False),
    lambda driver, index: driver.frontend.sync(),
]


@pytest.mark.slow
@pytest.mark.parametrize("threads", [False, True], ids=["one thread", "queue threads"])
@pytest.mark.parametrize("iommu", [False, True], ids=["physical", "iommu"])
@pytest.mark.parametrize("inflight", [False, True], ids=["in order", "noted"])
def test_anything_under_load(tmp_path: Path, threads: bool, iommu: bool, inflight: bool) -> None:
    """Random control messages while queues are busy; every answer is right and comes once."""
    rng = random.Random(threads * 4 + iommu * 2 + inflight)
    device = Meeting()
    options = {"queue_threads": threads, "poll_us": rng.choice((0, 50))}
    with (
        nothing_left(),
        ThreadPoolExecutor(2) as device.pool,
        Serving(device, tmp_path / "socket", **options) as serving,
        Driver(serving.path, queues=QUEUES, iommu=iommu, inflight=inflight) as driver,
    ):
        loads = [Load(driver, index, seed=index) for index in range(QUEUES)]
        for _ in range(150):
            for load in loads:
                load.submit(rng.randrange(10), rng.choice((b"", b"POOL")))
                load.reap()
            rng.choice(CONTROLS)(driver, rng.randrange(QUEUES))
            if rng.random() < 0.4:
                load = rng.choice(loads)
                until(lambda load=load: load.reap() or load.done >= load.offered - 8)
        for load in loads:
            load.finish()
        assert min(load.done for load in loads) > 100
        assert [load.failed for load in loads] == [0] * QUEUES
        assert serving.stats.failed_requests == 0
        # Behind an IOMMU, what could not be shown when memory changed is done again.
        done = sum(load.done for load in loads)
        assert done == serving.stats.requests or (iommu and done < serving.stats.requests)
        assert serving.stats.queue_errors == 0
        assert device.overlap == set()
        del loads, load


def test_a_device_that_keeps_a_stop_waiting_is_named(
    device: Meeting,
    driver: Driver,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("guestio.virtio.queue.SLOW_DEVICE", 0.02)
    number = driver.submit(0, b"WAIT")
    assert device.entered.wait(WAIT)
    stopped = threading.Thread(target=driver.stop, args=(0,))
    stopped.start()
    until(lambda: warnings_of(caplog), "it is not reported")
    assert warnings_of(caplog)[0] == (
        "queue 0: Meeting.process has not returned for 0 s; the queue cannot be stopped until it "
        "does"
    )
    device.go_on.set()
    stopped.join(WAIT)
    assert not stopped.is_alive()
    driver.wait(0, number)
