"""Threads for work that takes long, cut into slices so that queues take turns."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import TypeAlias

Work: TypeAlias = Generator[None, None, int]
"""Does a slice each time it is resumed, and returns the result in the end."""


def ranges(offset: int, length: int, most: int) -> Iterator[tuple[int, int]]:
    """A range in pieces of at most ``most`` bytes: ``(offset, length)`` each."""
    end = offset + length
    while offset < end:
        size = min(most, end - offset)
        yield offset, size
        offset += size


class Patience:
    """Until when work that takes long may go on.

    Attributes:
        until: As `time.monotonic`.
    """

    def __init__(self) -> None:
        self.until = math.inf

    @property
    def is_over(self) -> bool:
        """Whether the work is to be given up."""
        return self.until != math.inf and time.monotonic() >= self.until


class SlicedThreads:
    """Threads that work for several queues, for each in turn.

    Work that takes long yields after each slice; then another queue's is gone on with. So what one
    queue asks for keeps another one's work waiting for a slice, however much it is. A queue's own
    work is begun in order.

    Args:
        count: Threads at most, started as there is work.
        name: Their names begin with it.

    Threads: any may call any method.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._change = threading.Condition()
        self._work: dict[int, deque[tuple[Work, Future[int]]]] = {}
        self._turns: deque[int] = deque()
        self._threads: list[threading.Thread] = []
        self._idle = self._running = 0
        self._closed = False
        self._last: Callable[[], None] | None = None

    def submit(self, queue: int, work: Work) -> Future[int]:
        """Have work done for a queue.

        Raises:
            RuntimeError: The threads were closed, or there is none and none can be started.
        """
        future: Future[int] = Future()
        with self._change:
            if self._closed:
                raise RuntimeError("the threads are closed")
            self._put(queue, work, future, first=False)
            if self._idle:
                self._change.notify()
            elif len(self._threads) < self._count:
                thread = threading.Thread(
                    target=self._run, name=f"{self._name}_{len(self._threads)}", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:
                    # For want of threads. The others do it, if there are any.
                    if not self._running:
                        self._work.pop(queue, None)
                        self._turns.clear()
                        raise
                else:
                    self._threads.append(thread)
                    self._running += 1
        return future

    @property
    def waiting(self) -> int:
        """Work that no thread is doing."""
        with self._change:
            return sum(map(len, self._work.values()))

    def _put(self, queue: int, work: Work, future: Future[int], *, first: bool) -> None:
        waiting = self._work.setdefault(queue, deque())
        (waiting.appendleft if first else waiting.append)((work, future))
        if len(waiting) == 1:
            try:
                self._turns.append(queue)
            except MemoryError:
                waiting.clear()
                raise

    def _take(self) -> tuple[int, Work, Future[int]] | None:
        """Wait for work; None once there is none and will be none."""
        with self._change:
            while not self._turns:
                if self._closed:
                    return None
                self._idle += 1
                try:
                    self._change.wait()
                finally:
                    self._idle -= 1
            # Nothing from here on takes memory but the first, so nothing is lost for want of it.
            taken = (queue := self._turns[0], *(waiting := self._work[queue])[0])
            if len(waiting) > 1:
                self._turns.rotate(-1)
            else:
                self._turns.popleft()
            waiting.popleft()
        return taken

    def _run(self) -> None:
        while True:
            # A waiting thread must not keep what it finished last.
            taken = None
            try:
                if (taken := self._take()) is None:
                    break
                self._work_on(*taken)
            except MemoryError as error:
                # It costs what was to be done, and not the thread.
                if taken is not None and not taken[2].done():
                    taken[2].set_exception(error)
        with self._change:
            self._running -= 1
            last = None if self._running else self._last
        if last is not None:
            last()

    def _work_on(self, queue: int, work: Work, future: Future[int]) -> None:
        """Do a slice."""
        if not future.running() and not future.set_running_or_notify_cancel():
            work.close()
            return
        try:
            next(work)
        except StopIteration as finished:
            future.set_result(finished.value)
        except BaseException as error:
            future.set_exception(error)
        else:
            with self._change:
                self._put(queue, work, future, first=True)
                if self._idle:
                    self._change.notify()

    def close(self, timeout: float, last: Callable[[], None] | None = None) -> bool:
        """Finish what was submitted, and take no more.

        Args:
            timeout: Seconds to wait for it at most. The process does not wait for the threads when
                it ends.
            last: Called once everything is done, in the thread that did the last of it.

        Returns:
            Whether everything is done and every thread gone.
        """
        until = time.monotonic() + timeout
        with self._change:
            self._closed = True
            self._last = last if self._running else None
            self._change.notify_all()
            threads = list(self._threads)
            idle = not self._running
        if idle and last is not None:
            last()
        for thread in threads:
            thread.join(max(until - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in threads)
