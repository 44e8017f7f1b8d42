"""Requests that may have to wait, and the order they are kept in.

A request is a generator: it yields events to wait for and returns its answer. Each names what it
touches (domains, endpoints, targets); a request waits for all earlier ones that touch something of
the same, and for no other. While it runs, no other request touches those things, so it needs no
lock and may call targets and clients. A request that waits has done its work at DMA targets and
lets go of them, so that a change of guest memory does not have to wait for a guest's clients.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Generator, Hashable
from typing import Any, TypeVar

from guestio.dma import ReentrantCallError
from guestio.errors import DeviceError
from guestio.iommu.events import Event, all_of
from guestio.ratelog import LOG
from guestio.virtio.iommu.wire import Status, tail

_log = logging.getLogger(__name__)

T = TypeVar("T")
Steps = Generator[list[Event], None, bytes]
Keys = Callable[[], "set[Hashable] | None"]
"""What a request touches, as it is now; None for everything."""


def target_key(target: object) -> Hashable:
    """What a request names that touches a DMA target."""
    return ("target", id(target))


def is_target(key: Hashable) -> bool:
    """Whether it is a key of :func:`target_key`."""
    return isinstance(key, tuple) and key[0] == "target"


class Pending(Event):
    """An answer that is not there yet. As an :class:`~guestio.iommu.Event` it happens with it.

    ``await`` gives the answer.

    Attributes:
        cancelled: The request was never carried out, because the device was reset or closed; its
            answer is empty.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cancelled = False
        self._answer = b""
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether the answer is there."""
        return self.is_set

    def result(self, timeout: float | None = None) -> bytes:
        """Wait for the answer: the device-writable bytes, empty for a zero-length answer.

        Raises:
            TimeoutError: It is not there within ``timeout`` seconds.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"no answer within {timeout} s: what it waits for is still in use")
        if self._error is not None:
            raise self._error
        return self._answer

    async def _wait_async(self) -> Any:
        await super()._wait_async()
        return self.result()

    def finish(self, answer: bytes, error: BaseException | None = None) -> None:
        """Give the answer. For the device."""
        self._answer, self._error = answer, error
        self.set()


class _Job:
    """A request in the queue."""

    def __init__(self, keys: Keys, steps: Steps, raises: bool) -> None:
        self.keys = keys
        self.steps = steps
        self.raises = raises
        self.started = False
        self.claimed: set[Hashable] | None = set()
        self.pending = Pending()


def _nothing() -> Steps:
    yield []
    return b""


class RequestQueue:
    """Runs requests, each as soon as nothing before it is in its way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: list[_Job] = []
        # Threads that carry out a request, with how many, one inside the other.
        self._running: Counter[int] = Counter()

    def submit(
        self, keys: Keys, steps: Steps, *, raises: bool = False, first: bool = False
    ) -> Pending:
        """Run a request, or have it run later.

        Args:
            keys: What it touches.
            steps: The request.
            raises: Whether an exception is the answer; otherwise it is logged, and the answer is a
                device error.
            first: Whether it goes before all requests that have not begun.

        Returns:
            Its answer; there already unless it has to wait.
        """
        job = _Job(keys, steps, raises)
        with self._lock:
            self._jobs.insert(0 if first else len(self._jobs), job)
        self._run_ready()
        return job.pending

    def run(self, keys: Keys, steps: Steps, *, first: bool = False) -> None:
        """Run a request and wait for its end; what it raises comes through.

        Raises:
            ReentrantCallError: This thread is carrying out a request that has to end first: a DMA
                target called back.
        """
        pending = self.submit(keys, steps, raises=True, first=first)
        if not pending.done and threading.get_ident() in self._running and self._withdraw(pending):
            raise ReentrantCallError(
                "a DMA target or client called its virtio-iommu back from inside a call, and the "
                "request that it was called by has to end first; call after that"
            )
        pending.result()

    def _withdraw(self, pending: Pending) -> bool:
        """Take back a request that has not begun; whether it had not."""
        with self._lock:
            job = next((j for j in self._jobs if j.pending is pending and not j.started), None)
            if job is None:
                return False
            self._jobs.remove(job)
        job.steps.close()
        self._run_ready()
        return True

    @property
    def waiting(self) -> int:
        """Requests that have no answer yet."""
        return len(self._jobs)

    def alone(self, work: Callable[[], T]) -> T:
        """Do something while no request runs or waits; those that come meanwhile wait for it.

        Raises:
            DeviceError: There are requests.
        """
        marker = _Job(lambda: None, _nothing(), raises=True)
        marker.started, marker.claimed = True, None
        with self._lock:
            if self._jobs:
                raise DeviceError(f"{len(self._jobs)} requests are being answered; wait for them")
            self._jobs.append(marker)
        try:
            return work()
        finally:
            with self._lock:
                self._jobs.remove(marker)
            self._run_ready()

    def cancel(self) -> None:
        """Forget the driver's requests that have not begun; what others asked for is done."""
        with self._lock:
            dropped = [job for job in self._jobs if not job.started and not job.raises]
            self._jobs = [job for job in self._jobs if job not in dropped]
        for job in dropped:
            job.steps.close()
            job.pending.cancelled = True
            job.pending.finish(b"")

    def _run_ready(self) -> None:
        while (job := self._next()) is not None:
            self._advance(job)

    def _next(self) -> _Job | None:
        """The first request that nothing before it is in the way of; it is begun with this."""
        with self._lock:
            busy: set[Hashable] = set()
            for job in self._jobs:
                if job.started:
                    if job.claimed is None:
                        return None
                    busy |= job.claimed
            for job in self._jobs:
                if job.started:
                    continue
                keys = job.keys()
                if not busy if keys is None else busy.isdisjoint(keys):
                    job.started, job.claimed = True, keys
                    return job
                if keys is None:
                    return None
                busy |= keys
        return None

    def _step(self, job: _Job) -> list[Event]:
        me = threading.get_ident()
        self._running[me] += 1
        try:
            return next(job.steps)
        finally:
            self._running[me] -= 1
            if not self._running[me]:
                del self._running[me]

    def _advance(self, job: _Job) -> None:
        try:
            events = self._step(job)
        except StopIteration as finished:
            self._finish(job, finished.value)
        except BaseException as error:
            # Whatever it was, no request behind it may wait for one that has ended.
            if not job.raises:
                LOG.report(
                    _log,
                    logging.ERROR,
                    "a virtio-iommu request failed; the guest is told of a device error",
                    trace=True,
                )
            self._finish(job, tail(Status.DEVERR), error if job.raises else None)
            if not isinstance(error, Exception):
                self._run_ready()
                raise
        else:
            combined = all_of(events)
            if combined is None:
                self._advance(job)
            else:
                with self._lock:
                    if job.claimed is not None:
                        job.claimed = {key for key in job.claimed if not is_target(key)}
                combined.add_callback(lambda: self._resume(job))

    def _resume(self, job: _Job) -> None:
        self._advance(job)
        self._run_ready()

    def _finish(self, job: _Job, answer: bytes, error: BaseException | None = None) -> None:
        with self._lock:
            self._jobs.remove(job)
        job.pending.finish(answer, error)
