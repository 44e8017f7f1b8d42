"""A clock and threads that only the simulation moves, in place of those that guestio's modules use.

Guestio's modules say `time.monotonic()` and `threading.Condition()`; while a simulation runs, the
names `time` and `threading` in them mean what is here. Everything happens in one thread then, and
what waits lets the simulation choose what happens meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, Final

from guestio.iommu import Iotlb
from guestio.peer import foreign
from guestio.virtio import blk, image
from guestio.virtio.slices import SlicedThreads, Work

_BEGIN: Final = 1000.0
"""What the clock says at first, in seconds."""

_DRAIN_LOOK: Final = 0.01
"""Simulated seconds between looks whether a translation is still in use."""

_OWN: Final = (__package__ + ".", "guestio.ratelog", "guestio.trace")
"""Modules that go on with the real clock: what they do is not part of what is simulated."""


_ACTIVE: Final = threading.Lock()
"""Held while an environment is in use."""


class Clock:
    """Simulated time.

    Attributes:
        now: Seconds, as from `time.monotonic`.
    """

    def __init__(self) -> None:
        self.now = _BEGIN

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += max(seconds, 0.0)


class Threads(SlicedThreads):
    """Threads that work when the simulation says so: a slice for each :meth:`step`."""

    made: Callable[[Threads], object]

    def __init__(self, count: int, name: str) -> None:
        super().__init__(count, name)
        type(self).made(self)

    def submit(self, queue: int, work: Work) -> Future[int]:
        """See :class:`SlicedThreads`."""
        if self._closed:
            raise RuntimeError("the threads are closed")
        future: Future[int] = Future()
        self._put(queue, work, future, first=False)
        return future

    def step(self) -> bool:
        """Do a slice of what is to be done; whether there was anything."""
        if not self.waiting:
            return False
        taken = self._take()
        assert taken is not None  # something waits
        self._work_on(*taken)
        return True

    def close(self, timeout: float, last: Callable[[], None] | None = None) -> bool:
        """See :class:`SlicedThreads`."""
        while self.step():
            pass
        if not self._closed:
            self._closed = True
            if last is not None:
                last()
        return True


class Environment:
    """What takes the place of clock and threads, while :meth:`active`.

    Args:
        idle: Called by what waits, with the seconds it waits at most: lets something happen, or
            that time pass.
        sync: Called in place of `os.fdatasync` by images.

    Attributes:
        clock: The time.
        threads: Those of devices that were made and not forgotten.
    """

    def __init__(self, idle: Callable[[float], object], sync: Callable[[int], None]) -> None:
        self.clock = Clock()
        self.threads: list[Threads] = []
        self._idle = idle
        self._sync = sync

    def sleep(self, seconds: float) -> None:
        """Wait, at least so long."""
        until = self.clock.now + seconds
        while self.clock.now < until:
            self._idle(until - self.clock.now)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Guestio's modules use this environment inside this context.

        Raises:
            RuntimeError: They use another one, here or in another thread.
        """
        if not _ACTIVE.acquire(blocking=False):
            raise RuntimeError("another simulation is running in this process: one at a time")
        with contextlib.ExitStack() as undo:
            undo.callback(_ACTIVE.release)
            for name, module in list(sys.modules.items()):
                if name.startswith("guestio.") and not name.startswith(_OWN):
                    if getattr(module, "time", None) is time:
                        _swap(undo, module, "time", _Time(self))
                    if getattr(module, "threading", None) is threading:
                        _swap(undo, module, "threading", _Threading(self))
            _swap(undo, image, "os", _Os(self._sync))
            _swap(undo, foreign, "close_aside", _close)
            _swap(undo, Iotlb, "drain", self._drain_method())
            kind = type("SimulatedThreads", (Threads,), {"made": staticmethod(self.threads.append)})
            _swap(undo, blk, "SlicedThreads", kind)
            log = logging.getLogger("guestio")
            undo.callback(log.setLevel, log.level)
            # A peer that dies a hundred times a second is no news here.
            log.setLevel(logging.CRITICAL + 1)
            yield

    def _drain_method(self) -> Callable[..., bool]:
        def drain(iotlb: Iotlb, start: int, length: int, timeout: float | None = None) -> bool:
            """See the core's; the time that it waits is simulated."""
            until = self.clock.now + (timeout or 0.0)
            while not iotlb._map.drain(start, length, 0):
                if self.clock.now >= until:
                    return False
                self._idle(min(_DRAIN_LOOK, until - self.clock.now))
            return True

        return drain


def _close(fds: Iterable[int], _grace: float, _most: int) -> int:
    """Close descriptors of the simulation's own peer, which does not have anybody wait."""
    for fd in fds:
        os.close(fd)
    return 0


def _swap(undo: contextlib.ExitStack, owner: Any, name: str, value: object) -> None:
    missing = object()
    before = vars(owner).get(name, missing)
    if before is missing:
        undo.callback(delattr, owner, name)
    else:
        undo.callback(setattr, owner, name, before)
    setattr(owner, name, value)


class _Time:
    """The module `time`, with a simulated clock."""

    def __init__(self, environment: Environment) -> None:
        self.sleep = environment.sleep
        self._clock = environment.clock

    def monotonic(self) -> float:
        return self._clock.now

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class _Os:
    """The module `os`, with a simulated fdatasync(2)."""

    def __init__(self, sync: Callable[[int], None]) -> None:
        self.fdatasync = sync

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


class _Threading:
    """The module `threading`, where nothing waits but in the simulation, and no thread starts."""

    def __init__(self, environment: Environment) -> None:
        class Condition(threading.Condition):
            def wait(self, timeout: float | None = None) -> bool:
                environment._idle(1.0 if timeout is None else timeout)
                return True

        class Event(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                clock = environment.clock
                until = clock.now + (3600.0 if timeout is None else timeout)
                while not self.is_set() and clock.now < until:
                    environment._idle(until - clock.now)
                return self.is_set()

        class Thread(threading.Thread):
            def start(self) -> None:
                # Who starts one and is told this does it without a thread.
                raise RuntimeError("no threads are started in a simulation")

        self.Condition, self.Event, self.Thread = Condition, Event, Thread

    def __getattr__(self, name: str) -> Any:
        return getattr(threading, name)
