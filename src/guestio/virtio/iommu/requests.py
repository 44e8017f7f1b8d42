"""Requests that may have to wait, and the order they are kept in.

A request is a generator: it yields events to wait for and returns its answer. Each names what it
touches (domains, endpoints, targets); a request waits for all earlier ones that touch something of
the same, and for no other. While it runs, no other request touches those things, so it needs no
lock and may call targets and clients.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Hashable
from typing import Any, TypeVar

from guestio.errors import DeviceError
from guestio.iommu.events import Event, all_of
from guestio.ratelog import LOG
from guestio.virtio.iommu.wire import Status, tail

_log = logging.getLogger(__name__)

T = TypeVar("T")
Steps = Generator[list[Event], None, bytes]
Keys = Callable[[], "set[Hashable] | None"]
"""What a request touches, as it is now; None for everything."""


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

    def submit(self, keys: Keys, steps: Steps, *, raises: bool = False) -> Pending:
        """Run a request, or have it run later.

        Args:
            keys: What it touches.
            steps: The request.
            raises: Whether an exception is the answer; otherwise it is logged, and the answer is a
                device error.

        Returns:
            Its answer; there already unless it has to wait.
        """
        job = _Job(keys, steps, raises)
        with self._lock:
            self._jobs.append(job)
        self._run_ready()
        return job.pending

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
        """Forget the requests that have not begun."""
        with self._lock:
            dropped = [job for job in self._jobs if not job.started]
            self._jobs = [job for job in self._jobs if job.started]
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
                keys = job.claimed if job.started else job.keys()
                if not job.started and (not busy if keys is None else busy.isdisjoint(keys)):
                    job.started, job.claimed = True, keys
                    return job
                if keys is None:
                    return None
                busy |= keys
        return None

    def _advance(self, job: _Job) -> None:
        try:
            events = next(job.steps)
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
                combined.add_callback(lambda: self._resume(job))

    def _resume(self, job: _Job) -> None:
        self._advance(job)
        self._run_ready()

    def _finish(self, job: _Job, answer: bytes, error: BaseException | None = None) -> None:
        with self._lock:
            self._jobs.remove(job)
        job.pending.finish(answer, error)
