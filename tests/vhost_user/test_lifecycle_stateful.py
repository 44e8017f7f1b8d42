"""Queues that are stopped and started in every way, time after time, with requests of every kind.

Whatever happens, each request is shown exactly once, as a success only if its device said so; a
stop tells where to go on; and the next front-end finds a back-end that nothing was left in.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.kit.serving import (
    FAILED,
    OK,
    Driver,
    Later,
    Serving,
    footprint,
    left_since,
    until,
)

QUEUES = 2
STOP_TIMEOUT = 0.01
MOST = 20
"""Requests of a queue that are not looked at yet: fewer than the driver has buffers for."""

queues = st.integers(0, QUEUES - 1)


class Lives(RuleBasedStateMachine):
    """One back-end, one front-end after the other, and what every request must come to."""

    def __init__(self) -> None:
        super().__init__()
        self.serving: Serving | None = None

    @initialize(
        mode=st.fixed_dictionaries({"iommu": st.booleans(), "inflight": st.booleans()}),
        threads=st.booleans(),
    )
    def begin(self, mode: dict[str, Any], threads: bool) -> None:
        gc.collect()
        self.before = footprint()
        self.directory = Path(tempfile.mkdtemp())
        self.device = Later(QUEUES)
        self.ordered = not (mode["iommu"] and mode["inflight"])
        self.serving = Serving(
            self.device,
            self.directory / "socket",
            stop_timeout=STOP_TIMEOUT,
            queue_threads=threads,
        ).__enter__()
        self.driver = Driver(self.serving.path, queues=QUEUES, **mode)
        self.base = [0] * QUEUES
        self.live = [True] * QUEUES
        self.sources: list[dict[int, bytes]] = [{} for _ in range(QUEUES)]
        self.looked_at = [0] * QUEUES
        self.number = 0
        self.answered: set[bytes] = set()

    def look(self, queue: int) -> None:
        """Check every request of a queue that has been shown."""
        ring, pending = self.driver.rings[queue], self.sources[queue]
        heads = Counter(
            ring.used_entry(number)[0] for number in range(self.looked_at[queue], ring.used_idx)
        )
        self.looked_at[queue] = ring.used_idx
        assert set(heads.values()) <= {1}, "a request was shown twice"
        for number, source in list(pending.items()):
            if 2 * number % self.driver.size not in heads:
                continue
            status, answer = self.driver.result(queue, number, len(source))
            if status == OK:
                assert answer == source[::-1]
                assert not source.startswith(b"RETURN")
                if source.startswith(b"LATE"):
                    assert source in self.answered
            else:
                assert status == FAILED
                assert source.startswith((b"RETURN", b"LATE"))
            del pending[number]
            heads.subtract([2 * number % self.driver.size])
        assert not +heads, "something was shown that was not asked for"

    def stopped(self, queue: int) -> None:
        """A queue stopped: nothing of it is under way."""
        self.live[queue] = False
        used = self.driver.rings[queue].used_idx
        self.look(queue)
        if self.ordered:
            assert self.driver.rings[queue].offered == used + len(self.sources[queue])
        self.base[queue] = used
        for source in [each for each in self.device.begun if each.endswith(b"@%d" % queue)]:
            _, promised = self.device.begun[source]
            if promised.done():
                del self.device.begun[source]

    @rule(queue=queues, kind=st.sampled_from([b"text", b"LATE", b"LATE", b"RETURN None #"]))
    def submit(self, queue: int, kind: bytes) -> None:
        """To be served at once, later or never, or to fail."""
        if not self.live[queue] or len(self.sources[queue]) >= MOST:
            return
        self.number += 1
        source = b"%s %d@%d" % (kind, self.number, queue)
        self.sources[queue][self.driver.submit(queue, source)] = source

    @rule(which=st.integers(0, 100), fail=st.booleans())
    def answer(self, which: int, fail: bool) -> None:
        sources = list(self.device.begun)
        if not sources:
            return
        source = sources[which % len(sources)]
        chain, promised = self.device.begun.pop(source)
        # It may be given up at this very moment.
        with contextlib.suppress(Exception):
            if fail:
                promised.set_exception(ValueError("too late"))
                return
            self.answered.add(source)
            chain.writable.write(source[::-1] + bytes([OK]))
            promised.set_result(len(source) + 1)

    @rule(queue=queues)
    def settle(self, queue: int) -> None:
        """Everything is answered in the end."""
        if not self.live[queue]:
            return

        def idle() -> bool:
            for source in [each for each in self.device.begun if each.endswith(b"@%d" % queue)]:
                self.device.begun.pop(source)[1].set_exception(ValueError("none"))
            return self.driver.rings[queue].used_idx == self.driver.rings[queue].offered

        until(idle, f"requests of queue {queue} hang")
        self.look(queue)
        assert not self.sources[queue]

    @rule(queue=queues)
    def stop(self, queue: int) -> None:
        if not self.live[queue]:
            return
        base = self.driver.stop(queue)
        self.stopped(queue)
        if self.ordered:
            assert base == self.base[queue]
        self.base[queue] = base

    @rule(queue=queues)
    def stop_again(self, queue: int) -> None:
        if not self.live[queue]:
            assert self.driver.frontend.stop_queue(queue) in (self.base[queue], 0)

    @rule(queue=queues)
    def start(self, queue: int) -> None:
        if not self.live[queue]:
            self.driver.start(queue, self.base[queue])
            self.driver.handles[queue].kick()
            self.live[queue] = True

    @rule()
    def status_0(self) -> None:
        self.driver.frontend.set_status(0)
        for queue in range(QUEUES):
            if self.live[queue]:
                self.stop(queue)

    @rule()
    def reset_device(self) -> None:
        self.driver.frontend.reset_device()
        self.driver.handles.clear()
        for queue in range(QUEUES):
            if self.live[queue]:
                self.stopped(queue)

    @rule()
    def disconnect(self) -> None:
        assert self.serving is not None
        driver, bases = self.driver, list(self.base)
        driver.frontend.close()
        self.serving.let_go()
        for queue in range(QUEUES):
            if self.live[queue]:
                self.stopped(queue)
                bases[queue] = self.base[queue]
        rings, driver.rings = driver.rings, {}
        driver.handles.clear()
        driver.reconnect(self.serving.path)
        driver.rings = rings
        self.base = bases
        for queue in range(QUEUES):
            self.start(queue)

    def teardown(self) -> None:
        if self.serving is None:
            return
        try:
            self.driver.close()
            self.serving.let_go()
            self.device.give_up()
            self.serving.check_serves()
        finally:
            self.device.give_up()
            self.serving.__exit__()
            shutil.rmtree(self.directory)
            del self.driver
        gc.collect()
        until(lambda: not left_since(self.before), f"left behind: {self.before} {footprint()}")


Lives.TestCase.settings = settings(
    # What is left behind is found out by waiting, so smaller examples would take minutes.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    max_examples=12,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class TestLives(Lives.TestCase):
    """See above."""
