"""A stop ends what belonged to it: translations, misses, and what is known of them."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from guestio._core.virtio.chain import Chain
from guestio.addr import Permissions
from guestio.vhost_user.inflight import InflightRegion
from guestio.vhost_user.iotlb_service import MissAction, MissAnswer
from guestio.vhost_user.messages import (
    FrontendRequest as F,
)
from guestio.vhost_user.messages import (
    IotlbMessage,
    VringAddr,
    VringFd,
    VringState,
)
from guestio.vhost_user.translator import PATIENCE
from tests.kit.rings import PAGE, WRITE, Desc
from tests.kit.serving import (
    FAILED,
    OK,
    WAIT,
    Driver,
    Later,
    Mirror,
    Serving,
    lasting,
    nothing_left,
    until,
    warnings_of,
)
from tests.kit.waiting import Waiting, begin, mirrored

RW = Permissions.READ_WRITE

ELSEWHERE = 0x180000
"""Guest memory that stands in for the buffers once a driver has mapped it there."""


@pytest.fixture
def behind(serving: Serving) -> Iterator[Driver]:
    """Two queues behind an IOMMU."""
    with Driver(serving.path, queues=2, iommu=True) as made:
        yield made


def stop_all(driver: Driver) -> None:
    for index in list(driver.handles):
        driver.stop(index)


ENDS: dict[str, Callable[[Driver], object]] = {
    "stop": stop_all,
    "stop, then status 0": lambda driver: (stop_all(driver), driver.frontend.set_status(0)),
    "status 0, then stop": lambda driver: (driver.frontend.set_status(0), stop_all(driver)),
    "reset": lambda driver: driver.frontend.reset_device(),
}


def remap(driver: Driver, index: int, number: int) -> int:
    """Move a request's two pages without a word to the back-end; where they are now."""
    driver.frontend.iotlb.mappings.set_mapping(
        driver.at(driver.buffer(index, number)), ELSEWHERE, 2 * PAGE, RW
    )
    return ELSEWHERE


def again(driver: Driver, index: int) -> None:
    """Run a queue's second request, of 4 bytes, at the addresses of the first one."""
    ring, place = driver.rings[index], driver.at(driver.buffer(index, 0))
    ring.offer(ring.put_chain(0, Desc(place, 4), Desc(place + PAGE, 5, WRITE)))
    driver.handles[index].kick()
    driver.wait(index, 1)


def again_without_misses(driver: Driver, index: int) -> None:
    """As :func:`again`, with a front-end that refuses every miss from now on.

    Misses are not counted: on a busy machine one that was answered may be repeated late.
    """
    driver.frontend.iotlb.miss_hook = lambda message: MissAnswer(MissAction.REFUSE)
    status = driver.buffer(index, 0) + PAGE + 4
    driver.memory.write(status, b"\xee")
    again(driver, index)
    assert driver.memory.read(status, 1) == bytes([OK])


def used(driver: Driver, index: int) -> int:
    return driver.rings[index].used_idx


class TestTranslations:
    @pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
    def test_are_forgotten(self, behind: Driver, end: Callable[[Driver], object]) -> None:
        """A front-end forwards no invalidation while the queues stand still."""
        old = behind.buffer(0, 0)
        assert behind.run(0, b"before") == mirrored(b"before")
        asked = behind.frontend.iotlb.counts.misses
        end(behind)
        new = remap(behind, 0, 0)
        behind.memory.write(old, bytes(PAGE))
        behind.memory.write(new, b"afterwards")
        # The next request uses the same addresses, which lead elsewhere.
        ring = behind.rings[0]
        before = behind.memory.read(old, 2 * PAGE)
        behind.start(0, used(behind, 0))
        number = ring.offered
        ring.offer(
            ring.put_chain(0, Desc(behind.at(old), 10), Desc(behind.at(old) + PAGE, 11, WRITE))
        )
        behind.handles[0].kick()
        behind.wait(0, number)
        assert behind.memory.read(new + PAGE, 11) == b"afterwards"[::-1] + bytes([OK])
        assert behind.memory.read(old, 2 * PAGE) == before
        assert behind.frontend.iotlb.counts.misses >= asked + 2

    def test_that_arrive_during_the_stop_are_not_believed(self, behind: Driver) -> None:
        """An answer that was under way, for one; what it says may be over by the next start."""
        assert behind.run(0, b"before") == mirrored(b"before")
        stop_all(behind)
        place = behind.buffer(0, 0)
        assert behind.frontend.iotlb.push(behind.at(place))
        assert behind.frontend.iotlb.push(behind.at(place) + PAGE)
        new = remap(behind, 0, 0)
        behind.memory.write(new, b"text")
        before = behind.memory.read(place, 2 * PAGE)
        behind.start(0, 1)
        again(behind, 0)
        assert behind.memory.read(new + PAGE, 5) == b"txet" + bytes([OK])
        assert behind.memory.read(place, 2 * PAGE) == before

    def test_that_are_told_a_running_queue_are_kept(self, behind: Driver) -> None:
        """The start of a second queue does not have the first one ask anew."""
        behind.stop(1)
        assert behind.run(0, b"before") == mirrored(b"before")
        behind.start(1)
        again_without_misses(behind, 0)

    def test_of_a_running_queue_outlive_the_stop_of_another(self, behind: Driver) -> None:
        """While one runs, invalidations are forwarded, and its ring must be there when it stops."""
        assert behind.run(1, b"other") == mirrored(b"other")
        behind.stop(0)
        again_without_misses(behind, 1)

    def test_in_use_by_another_queue_are_waited_for(self, device: Later, behind: Driver) -> None:
        """Another queue's stop neither waits for a request nor lets its memory be taken away."""
        (number,) = begin(behind, device, b"LATE", queue=1)
        behind.stop(0)
        page = behind.at(behind.buffer(1, number)) + PAGE
        revoking = Waiting(lambda: behind.frontend.iotlb.unmap((page, PAGE)))
        assert revoking.waits()
        device.finish(b"LATE")
        revoking.end()
        behind.wait(1, number)
        assert behind.result(1, number, 4) == mirrored(b"LATE")

    def test_that_were_refused_may_be_asked_for_again(self, behind: Driver) -> None:
        """What a stopped queue was refused is not held against the next start."""
        assert behind.run(0, b"before") == mirrored(b"before")
        wanted = behind.at(behind.buffer(0, 1))
        asked: list[int] = []
        disabled = threading.Event()

        def refuse(message: IotlbMessage) -> MissAnswer:
            if message.iova != wanted:
                return MissAnswer()
            asked.append(message.iova)
            if asked == [wanted]:
                return MissAnswer(MissAction.IGNORE)
            # When it is asked again, the answer is waited for.
            assert disabled.wait(WAIT)
            return MissAnswer(MissAction.REFUSE)

        service = behind.frontend.iotlb
        service.miss_hook = refuse
        behind.submit(0, b"text")
        until(lambda: service.counts.ignored)
        # From here on the queue is not served, so the refusal has no effect.
        behind.frontend.enable_queue(0, enable=False)
        disabled.set()
        until(lambda: service.counts.refused)
        behind.frontend.sync()
        base = behind.stop(0)
        service.miss_hook = None
        behind.start(0, base)
        behind.handles[0].kick()
        behind.wait(0, 1)
        assert behind.result(0, 1, 4) == mirrored(b"text")

    def test_that_are_refused_after_the_stop_may_be_asked_for_again(self, behind: Driver) -> None:
        """A miss ends with the stop of the queue that requested it, whatever the answer is."""
        assert behind.run(0, b"before") == mirrored(b"before")
        assert behind.run(1, b"before") == mirrored(b"before")
        wanted, other = (behind.at(behind.buffer(queue, 1)) for queue in (0, 1))
        asked: list[int] = []
        stopped = threading.Event()

        def refuse(message: IotlbMessage) -> MissAnswer:
            if message.iova not in (wanted, other):
                return MissAnswer()
            asked.append(message.iova)
            if asked == [wanted]:
                return MissAnswer(MissAction.IGNORE)
            # When it is asked again, the answer is waited for.
            assert stopped.wait(WAIT)
            return MissAnswer(MissAction.REFUSE)

        service = behind.frontend.iotlb
        service.miss_hook = refuse
        behind.submit(0, b"text")
        until(lambda: len(asked) == 2)
        base = behind.stop(0)
        stopped.set()
        # Refusals are read in their order, so once this one had its effect, the first was read.
        assert behind.run(1, b"text")[0] == FAILED
        service.miss_hook = None
        behind.start(0, base)
        behind.handles[0].kick()
        behind.wait(0, 1)
        assert behind.result(0, 1, 4) == mirrored(b"text")

    def test_are_waited_for_anew_by_the_next_start(self, device: Later, tmp_path: Path) -> None:
        """What a queue waited for before it stopped is not added to what it waits for now."""
        limit = 1.0
        with (
            Serving(device, tmp_path / "socket", miss_timeout=limit) as serving,
            Driver(serving.path, iommu=True) as driver,
        ):
            service = driver.frontend.iotlb
            service.miss_hook = lambda message: MissAnswer(MissAction.IGNORE)
            driver.submit(0, b"text")
            until(lambda: service.counts.ignored)
            begun = time.monotonic()
            base = driver.stop(0)
            until(lambda: time.monotonic() > begun + PATIENCE * limit)
            service.miss_hook = None
            driver.start(0, base)
            driver.handles[0].kick()
            driver.wait(0, 0)
            assert driver.result(0, 0, 4) == mirrored(b"text")


SHORT = 0.2
"""Seconds that stops wait here, to keep the tests quick."""


class Silent(Later):
    """Never answers a request that begins with LATE, and notes what it was told about stops."""

    def __init__(self, queues: int = 3) -> None:
        super().__init__(queues)
        self.told: list[tuple[str, int]] = []
        self.on_stop: Callable[[int], None] = lambda queue: None

    def stopping(self, queue: int) -> None:
        self.told.append(("stopping", queue))
        self.on_stop(queue)

    def reset(self) -> None:
        self.told.append(("reset", 0))
        super().reset()


@pytest.fixture
def silent() -> Silent:
    return Silent()


MODES: dict[str, dict[str, Any]] = {
    "in order": {},
    "noted": {"inflight": True},
    "behind an IOMMU": {"iommu": True},
    "noted, behind an IOMMU": {"iommu": True, "inflight": True},
}


@pytest.fixture(params=MODES.values(), ids=MODES.keys())
def mode(request: pytest.FixtureRequest) -> dict[str, Any]:
    options: dict[str, Any] = request.param
    return options


def leave(driver: Driver, serving: Serving) -> None:
    driver.frontend.close()
    serving.let_go()


STOPS: dict[str, Callable[[Driver, Serving], object]] = {
    "reset": lambda driver, serving: driver.frontend.reset_device(),
    "status 0": lambda driver, serving: driver.frontend.set_status(0),
    "disconnect": leave,
    "memory table": lambda driver, serving: driver.frontend.set_memory(driver.memory, slots=False),
    "one queue": lambda driver, serving: driver.stop(0),
}


class TestNoAnswer:
    @pytest.mark.parametrize("threads", [False, True], ids=["one thread", "queue threads"])
    @pytest.mark.parametrize("end", STOPS.values(), ids=STOPS.keys())
    def test_fails_and_goes_nowhere(
        self,
        silent: Silent,
        tmp_path: Path,
        mode: dict[str, Any],
        end: Callable[[Driver, Serving], object],
        threads: bool,
    ) -> None:
        with nothing_left():
            with Serving(
                silent, tmp_path / "socket", queue_threads=threads, stop_timeout=SHORT
            ) as serving:
                driver = Driver(serving.path, queues=3, **mode)
                memory, rings = driver.memory, list(driver.rings.values())
                sources = [b"LATE %d.%d" % (q, i) for q in range(3) for i in range(3)]
                for source in sources:
                    begin(driver, silent, source, queue=source[5] - ord("0"))
                told = len(silent.told)
                # However many queues there are.
                with lasting(0.9 * SHORT, 4 * SHORT + 0.5):
                    end(driver, serving)
                assert ("stopping", 0) in silent.told[told:]
                ended = 1 if end is STOPS["one queue"] else 3
                for queue, ring in enumerate(rings[:ended]):
                    until(lambda ring=ring: ring.used_idx == 3)
                    for number in range(3):
                        assert ring.used_entry(number)[1] == 0
                        assert driver.result(queue, number, 8) == (FAILED, bytes(8))
                # Late answers change nothing, and their memory is out of reach.
                before = memory.read(0, Driver.SIZE)
                for source in sources[: 3 * ended]:
                    chain, promised = silent.begun.pop(source)
                    assert promised.cancelled()
                    assert chain.readable.read() == b""
                    with pytest.raises(ValueError, match="holds 0x0 bytes"):
                        chain.writable.write(b"late")
                    assert chain.tail is None or len(chain.tail) == 0
                assert memory.read(0, Driver.SIZE) == before
                silent.give_up()
                driver.close()
                del chain, promised, memory, rings, ring, driver
                serving.check_serves()
            silent.begun.clear()

    def test_delays_each_stop_by_a_second(self, silent: Silent, tmp_path: Path) -> None:
        """By default; a front-end that stops its queues one by one waits for one of them only."""
        with Serving(silent, tmp_path / "socket") as serving:
            driver = Driver(serving.path, queues=3)
            for queue in range(3):
                begin(driver, silent, b"LATE %d" % queue, queue=queue)
            with lasting(0.9, 2.0):
                with lasting(0.9, 1.5):
                    assert driver.stop(0) == 1
                assert driver.stop(1) == 1
                assert driver.stop(2) == 1
            # The next start has its full time again.
            driver.start(0, 1)
            begin(driver, silent, b"LATE again")
            with lasting(0.9, 1.5):
                serving.backend.stop()
                until(lambda: not serving.alive)
            driver.close()

    def test_ends_with_the_back_end(self, silent: Silent, tmp_path: Path) -> None:
        with nothing_left():
            with Serving(silent, tmp_path / "socket", stop_timeout=SHORT) as serving:
                driver = Driver(serving.path, queues=3)
                for queue in range(3):
                    begin(driver, silent, b"LATE %d" % queue, queue=queue)
                with lasting(0.9 * SHORT, 4 * SHORT + 0.5):
                    serving.backend.stop()
                    until(lambda: not serving.alive)
                assert silent.told[-4:] == [*(("stopping", i) for i in range(3)), ("reset", 0)]
            silent.begun.clear()
            driver.close()

    @pytest.mark.parametrize("change", ["unmap", "move"])
    def test_delays_a_revocation_no_longer(
        self, silent: Silent, tmp_path: Path, change: str
    ) -> None:
        with Serving(silent, tmp_path / "socket", stop_timeout=SHORT) as serving:
            driver = Driver(serving.path, queues=2, iommu=True)
            lost, other = begin(driver, silent, b"LATE 0", b"LATE 1")
            chain, _ = silent.begun[b"LATE 0"]
            page = driver.at(driver.buffer(0, lost)) + PAGE
            service = driver.frontend.iotlb
            with lasting(0.9 * SHORT, 4 * SHORT + 0.5):
                if change == "unmap":
                    service.unmap((page, PAGE))
                else:
                    service.mappings.set_mapping(page, ELSEWHERE, PAGE, RW)
                    service.push(page)
            # The one that used the page has failed; it is out of reach from there.
            assert driver.result(0, lost, 6) == (FAILED, bytes(6))
            with pytest.raises(ValueError, match="holds 0x0 bytes"):
                chain.writable.write(b"late")
            silent.finish(b"LATE 1")
            driver.wait(0, other)
            assert driver.result(0, other, 6) == mirrored(b"LATE 1")
            assert driver.run(1, b"afterwards") == mirrored(b"afterwards")
            driver.close()

    def test_is_reported(
        self, silent: Silent, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with Serving(silent, tmp_path / "socket", stop_timeout=0) as serving:
            driver = Driver(serving.path)
            begin(driver, silent, b"LATE 0", b"LATE 1")
            assert driver.stop(0) == 2
            assert serving.stats.failed_requests == 2
            assert warnings_of(caplog) == [
                (
                    "queue 0: 2 requests fail that Silent.process has not answered in time: "
                    "the queue stops"
                )
            ]
            driver.close()


class TestStopping:
    def test_is_the_device_s_chance(self, silent: Silent, tmp_path: Path) -> None:
        """What it answers then is no failure, and nothing waits for it."""

        def finish(queue: int) -> None:
            for source in [s for s in silent.begun if s[5] == ord("0") + queue]:
                silent.finish(source)

        silent.on_stop = finish
        with Serving(silent, tmp_path / "socket", stop_timeout=1000) as serving:
            driver = Driver(serving.path, queues=2)
            numbers = begin(driver, silent, b"LATE 0", b"LATE 0!")
            (other,) = begin(driver, silent, b"LATE 1", queue=1)
            assert driver.stop(0) == 2
            assert driver.result(0, numbers[1], 7) == mirrored(b"LATE 0!")
            assert not driver.done(1, other)
            driver.frontend.set_status(0)
            assert driver.result(1, other, 6) == mirrored(b"LATE 1")
            assert serving.stats.failed_requests == 0
            driver.close()

    def test_has_the_driver_called_for_what_it_completes(
        self, silent: Silent, tmp_path: Path
    ) -> None:
        silent.on_stop = lambda queue: silent.finish(b"LATE")
        with Serving(silent, tmp_path / "socket") as serving, Driver(serving.path) as driver:
            begin(driver, silent, b"LATE")
            handle = driver.handles[0]
            handle.clear_call()
            driver.frontend.set_status(0)
            assert handle.wait_call(0)
            assert used(driver, 0) == 1
            silent.on_stop = lambda queue: None

    def test_that_raises_is_only_reported(
        self, silent: Silent, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(queue: int) -> None:
            raise RuntimeError("no")

        silent.on_stop = fail
        with Serving(silent, tmp_path / "socket") as serving:
            with Driver(serving.path) as driver:
                assert driver.run(0, b"text") == mirrored(b"text")
                assert driver.stop(0) == 1
            assert warnings_of(caplog)[0] == "queue 0: Silent.stopping failed"
            serving.check_serves()

    def test_frees_a_queue_s_thread(self, silent: Silent, tmp_path: Path) -> None:
        """With queue threads, also a device that waits where it should not can be told."""
        silent.on_stop = lambda queue: silent.go_on.set()
        with Serving(silent, tmp_path / "socket", queue_threads=True) as serving:
            driver = Driver(serving.path)
            driver.submit(0, b"WAIT")
            until(silent.entered.is_set)
            assert driver.stop(0) == 1
            assert driver.result(0, 0, 4) == mirrored(b"WAIT")
            driver.close()

    def test_ends_work_that_has_not_begun(self, tmp_path: Path) -> None:
        """A pool of one thread, that is stuck, has the others in its queue."""
        ran: list[bytes] = []
        stuck = Silent()

        class Pooled(Silent):
            def process(self, queue: int, chain: Chain) -> int | Future[int]:
                return pool.submit(self.work, chain)

            def work(self, chain: Chain) -> int:
                ran.append(chain.readable.read())
                assert stuck.go_on.wait(10)
                return 0

        with ThreadPoolExecutor(1) as pool:
            device = Pooled()
            with Serving(device, tmp_path / "socket", stop_timeout=SHORT) as serving:
                driver = Driver(serving.path)
                for i in range(5):
                    driver.submit(0, b"text %d" % i)
                until(lambda: ran)
                assert driver.stop(0) == 5
                stuck.go_on.set()
                driver.close()
        assert ran == [b"text 0"]


class TestWhereItStopped:
    @pytest.mark.parametrize("inflight", [False, True])
    def test_is_remembered_over_a_status_of_0(self, serving: Serving, inflight: bool) -> None:
        """QEMU up to 7.2 sets it before it asks."""
        with Driver(serving.path, queues=2, inflight=inflight) as driver:
            for _ in range(3):
                driver.run(0, b"text")
            driver.run(1, b"text")
            driver.frontend.set_status(0)
            assert driver.frontend.stop_queue(0) == 3
            driver.frontend.set_status(0)
            assert driver.stop(0) == 3
            driver.start(0, 3)
            driver.handles[0].kick()
            assert driver.run(0, b"more") == mirrored(b"more")
            # Until it is set.
            driver.frontend.set_status(0)
            if not inflight:
                driver.start(1, 0)
                assert driver.stop(1) == 0
            assert driver.stop(0) == 4

    def test_is_forgotten_by_a_reset(self, serving: Serving) -> None:
        with Driver(serving.path) as driver:
            driver.run(0, b"text")
            driver.frontend.reset_device()
            assert driver.stop(0) == 0

    def test_is_before_what_still_waits_for_translations(
        self, device: Later, serving: Serving, tmp_path: Path
    ) -> None:
        """With notes, too: the successor may have none, and goes by the index alone."""
        with Driver(serving.path, iommu=True, inflight=True) as driver:
            driver.run(0, b"before")
            lacking = {driver.at(driver.buffer(0, number)) for number in (1, 2, 3)}
            service = driver.frontend.iotlb
            service.miss_hook = lambda message: MissAnswer(
                MissAction.IGNORE if message.iova in lacking else MissAction.ANSWER
            )
            numbers = [driver.submit(0, b"held %d" % i) for i in range(3)]
            until(lambda: service.counts.ignored >= 3)
            assert driver.stop(0) == 1
            assert used(driver, 0) == 1
            # The notes say the same: nothing is in flight.
            assert driver.region is not None
            about, fd = driver.region
            with InflightRegion.from_fd(about, fd) as region:
                assert region.queue(0).recover(1) == []
            driver.region = None
            os.close(fd)
            with Serving(device, tmp_path / "next") as following:
                driver.reconnect(following.path, 1)
                driver.handles[0].kick()
                driver.wait(0, numbers[-1])
                for i, number in enumerate(numbers):
                    assert driver.result(0, number, 6) == mirrored(b"held %d" % i)
                assert [s for _, s in device.seen if s.startswith(b"held")] == [
                    b"held 0",
                    b"held 1",
                    b"held 2",
                ]
                driver.frontend.close()
                following.let_go()


@pytest.mark.parametrize("tracked", [False, True], ids=["", "noted"])
def test_a_driver_hears_of_what_was_served_before_its_call_descriptor_came(
    tmp_path: Path, tracked: bool
) -> None:
    """QEMU gives the kick first; the descriptor of before the stop is forgotten by then."""
    with (
        Serving(Mirror(), tmp_path / "socket") as serving,
        Driver(serving.path, iommu=True, inflight=tracked) as driver,
    ):
        driver.run(0, b"before")
        request = driver.frontend.request
        base = driver.stop(0)
        number = driver.prepare(0, b"first")
        at = driver.layout(0)
        kick, call = os.eventfd(1), os.eventfd(0, os.EFD_NONBLOCK)
        try:
            request(F.SET_VRING_BASE, VringState(0, base))
            request(F.SET_VRING_ADDR, VringAddr(0, 0, at.desc, at.used, at.avail, 0))
            request(F.SET_VRING_KICK, VringFd(0, has_fd=True), [kick])
            until(lambda: driver.done(0, number))
            request(F.SET_VRING_CALL, VringFd(0, has_fd=True), [call])
            until(lambda: bool(select.select([call], [], [], 0)[0]))
        finally:
            os.close(kick)
            os.close(call)
