"""Behind an IOMMU, with a region for requests in flight: what lacks a translation is not overtaken.

And nothing is lost or done twice, whichever side stops, goes away or is killed meanwhile, also if a
back-end goes on that is not given the region.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from guestio.addr import Permissions
from guestio.vhost_user.iotlb_service import MissAction, MissAnswer, MissHook
from guestio.vhost_user.messages import FrontendRequest, IotlbMessage, ProtocolFeature
from guestio.vhost_user.translator import PATIENCE
from tests.kit.rings import PAGE, WRITE, Desc
from tests.kit.serving import (
    BUFFERS,
    FAILED,
    OK,
    WAIT,
    Driver,
    Later,
    Load,
    Mirror,
    Serving,
    errors_of,
    nothing_left,
    until,
)

ROOT = Path(__file__).parents[2]
TIMEOUT = 1.0
HOLE = 0x180000
"""Guest addresses from here on have translations of their own."""


@pytest.fixture
def impatient(device: Later, tmp_path: Path) -> Iterator[Serving]:
    """A back-end that waits only for a short while for an answer."""
    with Serving(device, tmp_path / "socket", miss_timeout=TIMEOUT) as made:
        yield made


class Held(Driver):
    """A driver of which some pages are translated only when the test says so."""

    def __init__(self, path: Path, **options: object) -> None:
        super().__init__(path, iommu=True, inflight=True, **options)  # type: ignore[arg-type]
        self.run(0, b"warm")
        self.actions: dict[int, MissAnswer] = {}
        self._heads: list[int] = []
        self.frontend.iotlb.miss_hook = self.hook

    @property
    def hook(self) -> MissHook:
        """What decides about misses."""
        return lambda message: self.actions.get(message.iova, MissAnswer())

    def lack(self, number: int, action: MissAction, delay: float = 0.0) -> int:
        """Say how a page of the test's is answered for; its guest address."""
        place = HOLE + number * PAGE
        self.actions[self.at(place)] = MissAnswer(action, delay)
        return place

    def read_from(self, place: int, head: int, data: bytes = b"held") -> int:
        """Begin a request that reads there; its answer is kept near its head."""
        ring = self.rings[0]
        number = ring.offered
        self.memory.write(place, data)
        answer = self.answer(head)
        self.memory.write(answer, bytes(len(data) + 1))
        ring.offer(
            ring.put_chain(
                head,
                Desc(self.at(place), len(data)),
                Desc(self.at(answer), len(data) + 1, WRITE),
            )
        )
        self.handles[0].kick()
        return number

    def answer(self, head: int) -> int:
        """Where a request of :meth:`read_from` writes: in a page that is known."""
        return self.buffer(0, 0) + PAGE + 64 * (head - 32)

    def known(self, number: int) -> int:
        """A page whose translation is told at once; its guest address."""
        return HOLE + (64 + number) * PAGE

    def drop_notes(self) -> None:
        """Do without the region from the next back-end on."""
        assert self.region is not None
        os.close(self.region[1])
        self.region = None
        self._protocol &= ~ProtocolFeature.INFLIGHT_SHMFD

    def heads(self) -> list[int]:
        """What was shown, in that order, after the first request."""
        ring = self.rings[0]
        for i in range(1 + len(self._heads), ring.used_idx):
            self._heads.append(ring.used_entry(i)[0])
        return self._heads

    def warm(self, count: int) -> None:
        """Run requests that lack nothing, one after the other."""
        ring, place = self.rings[0], self.buffer(0, 0)
        for _ in range(count):
            before = self.heads().count(60)
            self.memory.write(place, b"warm")
            ring.offer(
                ring.put_chain(60, Desc(self.at(place), 4), Desc(self.at(place) + PAGE, 5, WRITE))
            )
            self.handles[0].kick()
            until(lambda before=before: self.heads().count(60) > before)


class TestWaiting:
    def test_those_behind_a_slow_translation_wait(self, serving: Serving) -> None:
        with Held(serving.path) as driver:
            place, told = driver.lack(0, MissAction.IGNORE), driver.frontend.iotlb.counts.updates
            driver.read_from(place, 40)
            driver.read_from(driver.known(0), 42)
            driver.read_from(driver.lack(1, MissAction.ANSWER), 44)
            # What they lack is asked for meanwhile.
            until(lambda: driver.frontend.iotlb.counts.updates >= told + 2)
            assert driver.heads() == []
            # Now it comes, without another request.
            _tell(driver, place)
            until(lambda: len(driver.heads()) == 3)
            assert driver.heads() == [40, 42, 44]
            for head in (40, 42, 44):
                assert driver.memory.read(driver.answer(head), 5) == b"dleh" + bytes([OK])
            assert serving.stats.failed_requests == 0

    def test_one_that_never_comes(self, impatient: Serving) -> None:
        with Held(impatient.path) as driver:
            started = time.monotonic()
            driver.read_from(driver.lack(0, MissAction.IGNORE), 40)
            driver.read_from(driver.known(0), 42)
            until(lambda: len(driver.heads()) == 2)
            assert time.monotonic() - started > TIMEOUT / 2
            assert driver.heads() == [40, 42]
            assert driver.memory.read(driver.answer(40) + 4, 1) == bytes([FAILED])
            assert driver.memory.read(driver.answer(42), 5) == b"dleh" + bytes([OK])
            assert impatient.stats.failed_requests == 1
            assert impatient.stats.iotlb_timeouts == 1

    def test_a_refusal_is_for_the_request_that_waits_for_it(self, serving: Serving) -> None:
        with Held(serving.path) as driver:
            slow = driver.lack(1, MissAction.ANSWER, 0.1)
            driver.read_from(driver.lack(0, MissAction.REFUSE), 40)
            driver.read_from(slow, 42)
            driver.read_from(driver.lack(2, MissAction.REFUSE), 44)
            driver.read_from(driver.known(0), 46)
            until(lambda: len(driver.heads()) == 4)
            assert driver.heads() == [40, 42, 44, 46]
            assert serving.stats.failed_requests == 2
            status = [driver.memory.read(driver.answer(h) + 4, 1)[0] for h in driver.heads()]
            assert status == [FAILED, OK, FAILED, OK]

    def test_a_refusal_behind_one_that_waits(self, serving: Serving) -> None:
        with Held(serving.path) as driver:
            # Acknowledged in its turn, but the translation comes much later.
            slow = driver.lack(0, MissAction.CLAIM)
            driver.read_from(slow, 40)
            driver.read_from(driver.lack(1, MissAction.REFUSE), 42)
            until(lambda: serving.stats.iotlb_refused >= 1)
            assert driver.heads() == []
            told = driver.frontend.iotlb.counts.updates
            driver.read_from(driver.lack(2, MissAction.ANSWER), 44)
            until(lambda: driver.frontend.iotlb.counts.updates > told)
            _tell(driver, slow)
            until(lambda: len(driver.heads()) == 3)
            assert driver.heads() == [40, 42, 44]
            status = [driver.memory.read(driver.answer(h) + 4, 1)[0] for h in driver.heads()]
            assert status == [OK, FAILED, OK]
            assert serving.stats.failed_requests == 1

    def test_in_a_ring_that_is_looked_at_now_and_then(self, serving: Serving) -> None:
        """Without a kick fd."""
        with Held(serving.path, queue_options={"kick": False}) as driver:
            place = driver.lack(0, MissAction.IGNORE)
            driver.read_from(place, 40)
            until(lambda: driver.frontend.iotlb.counts.ignored)
            _tell(driver, place)
            until(driver.heads)
            driver.warm(3)
            assert driver.heads() == [40] + [60] * 3

    def test_two_that_lack_the_same_page(self, serving: Serving) -> None:
        with Held(serving.path) as driver:
            place = driver.lack(0, MissAction.REFUSE)
            driver.read_from(place, 40)
            driver.read_from(place, 42)
            until(lambda: len(driver.heads()) == 2)
            assert serving.stats.failed_requests == 2
            driver.actions.clear()
            driver.read_from(place, 40)
            until(lambda: len(driver.heads()) == 3)
            assert driver.memory.read(driver.answer(40), 5) == b"dleh" + bytes([OK])

    def test_all_of_many_that_lack_something_are_asked_for(self, serving: Serving) -> None:
        with Held(serving.path, size=256) as driver:
            ring = driver.rings[0]
            count = 100
            for i in range(count):
                place = driver.lack(i % 120, MissAction.ANSWER)
                driver.memory.write(place, b"%4d" % i)
                answer = BUFFERS + PAGE + 64 + 8 * i
                ring.offer(
                    ring.put_chain(
                        2 * i, Desc(driver.at(place), 4), Desc(driver.at(answer), 5, WRITE)
                    )
                )
            driver.handles[0].kick()
            until(lambda: len(driver.heads()) == count)
            assert sorted(driver.heads()) == list(range(0, 2 * count, 2))
            for i in range(count):
                answer = BUFFERS + PAGE + 64 + 8 * i
                assert driver.memory.read(answer, 5) == (b"%4d" % i)[::-1] + bytes([OK])

    def test_patience_ends_for_the_oldest(self, impatient: Serving) -> None:
        """Every miss is answered, and never with all that was asked for."""
        with Held(impatient.path) as driver:
            started = time.monotonic()
            iotlb = driver.frontend.iotlb
            for i in range(2):
                place = HOLE + i * PAGE
                iotlb.unmap((driver.at(place), PAGE))
                iotlb.map(driver.at(place), place, 2, Permissions.READ_WRITE)
                driver.read_from(place, 40 + 2 * i)
            for count in (1, 2):
                until(lambda count=count: len(driver.heads()) >= count)
                assert time.monotonic() - started > count * PATIENCE * TIMEOUT / 2
            assert driver.heads() == [40, 42]
            assert impatient.stats.failed_requests == 2

    def test_late_answers_and_lacking_ones(self, device: Later, serving: Serving) -> None:
        """A device that takes its time and a front-end that does."""
        with Held(serving.path) as driver:
            driver.read_from(driver.lack(0, MissAction.ANSWER, 0.05), 40)
            number = driver.submit(0, b"LATE")
            device.expect(b"LATE")
            driver.warm(1)
            until(lambda: 40 in driver.heads())
            device.finish(b"LATE")
            until(lambda: len(driver.heads()) == 3)
            assert driver.result(0, number, 4) == (OK, b"ETAL")


def _tell(driver: Driver, place: int) -> None:
    """Have the back-end told a translation that it did not ask for just now."""
    user = driver.frontend.user_address(place)
    message = IotlbMessage.update(driver.at(place), PAGE, user, Permissions.READ_WRITE)
    driver.frontend.request(FrontendRequest.IOTLB_MSG, message)


class TestStopping:
    @staticmethod
    def hold(driver: Held, numbers: range) -> None:
        """Make requests that lack translations, with others between them and behind."""
        counts = driver.frontend.iotlb.counts
        told = counts.updates
        for i in numbers:
            driver.read_from(driver.lack(i, MissAction.IGNORE), 32 + 4 * i)
            driver.read_from(driver.known(i), 34 + 4 * i)
        until(lambda: counts.ignored >= len(numbers) and counts.updates >= told + len(numbers))

    def test_while_some_wait_and_going_on(self, serving: Serving) -> None:
        with Held(serving.path) as driver:
            self.hold(driver, range(3))
            base = driver.stop(0)
            assert base == driver.rings[0].used_idx == 1
            driver.actions.clear()
            driver.start(0, base)
            driver.handles[0].kick()
            # What was asked before it stopped is not asked again so soon.
            for i in range(3):
                _tell(driver, HOLE + i * PAGE)
            until(lambda: len(driver.heads()) == 6)
            assert driver.heads() == list(range(32, 44, 2))
            driver.warm(1)
            assert serving.stats.failed_requests == 0

    @pytest.mark.parametrize("how", ["status", "base"])
    @pytest.mark.parametrize("done_late", [False, True])
    def test_and_going_on_without_the_notes(
        self, device: Later, tmp_path: Path, how: str, *, done_late: bool
    ) -> None:
        """The index that a stop answers with says all; each request is done, and done once."""
        with (
            nothing_left(),
            Serving(device, tmp_path / "first") as first,
            Serving(Mirror(), tmp_path / "second") as second,
            Held(first.path) as driver,
        ):
            late = [driver.submit(0, b"LATE")] if done_late else []
            if done_late:
                device.expect(b"LATE")
            driver.read_from(driver.known(9), 60)
            until(lambda: driver.heads() == [60])
            self.hold(driver, range(3))
            with ThreadPoolExecutor(1) as elsewhere:
                if how == "status":
                    # As QEMU 7.2 does.
                    stopping = elsewhere.submit(driver.frontend.set_status, 0)
                else:
                    stopping = elsewhere.submit(driver.stop, 0)
                if done_late:
                    device.finish(b"LATE")
                stopping.result(WAIT)
            base = stopping.result() if how == "base" else driver.stop(0)
            assert base == driver.rings[0].used_idx == 2 + len(late)
            done = len(driver.heads())
            driver.actions.clear()
            driver.drop_notes()
            driver.reconnect(second.path, base=base)
            driver.handles[0].kick()
            until(lambda: len(driver.heads()) == done + 6)
            assert driver.heads()[done:] == list(range(32, 44, 2))
            for head in range(32, 44, 2):
                assert driver.memory.read(driver.answer(head), 5) == b"dleh" + bytes([OK])
            assert [source for _, source in device.seen].count(b"held") == 1
            for number in late:
                assert driver.result(0, number, 4) == (OK, b"ETAL")
            driver.warm(1)
            assert first.stats.failed_requests == second.stats.failed_requests == 0

    def test_by_a_reset_forgets_what_is_in_flight(self, serving: Serving) -> None:
        """The driver starts afresh, and what it had asked for is no request any more."""
        with Driver(serving.path, iommu=True, inflight=True) as driver:
            lost = driver.at(HOLE)
            driver.frontend.iotlb.miss_hook = lambda message: MissAnswer(
                MissAction.IGNORE if message.iova == lost else MissAction.ANSWER
            )
            ring = driver.rings[0]
            ring.offer(ring.put_chain(40, Desc(lost, 8), Desc(driver.at(BUFFERS), 1, WRITE)))
            driver.handles[0].kick()
            until(lambda: driver.frontend.iotlb.counts.ignored)
            driver.frontend.reset_device()
            driver.frontend.iotlb.miss_hook = None
            driver.add_queue(0)
            assert driver.run(0, b"fresh") == (OK, b"hserf")
            assert driver.rings[0].used_idx == 1
            assert not driver.handles[0].failed()

    def test_by_a_status_of_0_does_not(self, serving: Serving) -> None:
        """QEMU sets it at each stop, also when the guest is only paused and goes on afterwards.

        See QEMU, hw/virtio/vhost-user.c, `vhost_user_reset_status`.
        """
        with Held(serving.path) as driver:
            driver.read_from(driver.lack(0, MissAction.IGNORE), 40)
            until(lambda: driver.frontend.iotlb.counts.ignored)
            driver.frontend.set_status(0)
            driver.actions.clear()
            driver.start(0, 2)
            until(lambda: driver.heads() == [40])
            assert driver.memory.read(driver.answer(40), 5) == b"dleh" + bytes([OK])

    def test_again_and_again_under_load(self, serving: Serving) -> None:
        with Held(serving.path) as driver:
            rng = random.Random(3)
            load = Load(driver, 0, seed=4)
            driver.frontend.iotlb.miss_hook = lambda _: MissAnswer(
                MissAction.ANSWER, rng.choice((0, 0, 0.002))
            )
            for _ in range(40):
                load.submit(rng.randrange(1, 12))
                page = driver.at(load.place(rng.randrange(load.SLOTS)))
                driver.frontend.iotlb.invalidate((page, 2 * PAGE))
                load.reap()
                if rng.random() < 0.5:
                    driver.start(0, driver.stop(0))
                    driver.handles[0].kick()
                if rng.random() < 0.25:
                    load.finish()
            load.finish()
            assert load.done > 100
            assert load.failed == 0

    def test_another_back_end_in_this_process(self, device: Later, tmp_path: Path) -> None:
        with (
            nothing_left(),
            Serving(device, tmp_path / "first") as first,
            Serving(device, tmp_path / "second") as second,
            Held(first.path) as driver,
        ):
            driver.read_from(driver.lack(0, MissAction.IGNORE), 40)
            driver.read_from(driver.lack(1, MissAction.IGNORE), 42)
            until(lambda: driver.frontend.iotlb.counts.ignored >= 2)
            driver.reconnect(second.path, base=0x1234)
            driver.handles[0].kick()
            until(lambda: len(driver.heads()) == 2)
            assert driver.heads() == [40, 42]
            assert driver.memory.read(driver.answer(42), 5) == b"dleh" + bytes([OK])
            driver.warm(1)


PROGRAM = """
import sys
from guestio.vhost_user import Backend
from tests.kit.serving import Mirror
Backend(Mirror(), sys.argv[1], queue_threads=sys.argv[2] == "threads").serve()
"""


@contextlib.contextmanager
def elsewhere(path: Path, mode: str) -> Iterator[subprocess.Popen[bytes]]:
    """A back-end in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [*sys.path, str(ROOT)])),
    }
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, path, mode], env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait(WAIT)


class TestKilled:
    @pytest.mark.parametrize("mode", ["one", "threads"])
    @pytest.mark.parametrize("seed", range(2))
    def test_another_goes_on(self, tmp_path: Path, mode: str, seed: int) -> None:
        """Killed anywhere under load, with requests that wait; all are answered, each once."""
        rng = random.Random(seed)
        with contextlib.ExitStack() as stack:
            paths = [tmp_path / f"socket {i}" for i in range(4)]
            processes = [stack.enter_context(elsewhere(path, mode)) for path in paths]
            for path in paths:
                until(path.exists)
            driver = stack.enter_context(
                Driver(paths[0], queues=2, iommu=True, inflight=True, connect_wait=WAIT)
            )
            loads = [Load(driver, index, seed=seed + index) for index in range(2)]
            for process, following in zip(processes, paths[1:], strict=False):
                slow = {driver.at(loads[0].place(slot)) for slot in rng.sample(range(32), 4)}
                driver.frontend.iotlb.miss_hook = lambda message, slow=slow: MissAnswer(
                    MissAction.IGNORE if message.iova in slow else MissAction.ANSWER
                )
                enough = [load.done + rng.randrange(20, 60) for load in loads]
                while any(load.done < most for load, most in zip(loads, enough, strict=True)):
                    for load in loads:
                        load.submit(rng.randrange(1, 5))
                        load.reap()
                    if len(loads[0].pending) == Load.SLOTS:
                        break
                process.send_signal(signal.SIGKILL)
                process.wait(WAIT)
                driver.reconnect(following, base=rng.getrandbits(16))
                for index in range(2):
                    driver.handles[index].kick()
            for load in loads:
                load.finish()
            assert sum(load.done for load in loads) > 60
            assert [load.failed for load in loads] == [0, 0]


def test_nothing_is_logged_as_an_error(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    with Held(serving.path) as driver:
        driver.read_from(driver.lack(0, MissAction.REFUSE), 40)
        until(lambda: driver.heads() == [40])
    assert errors_of(caplog) == []
