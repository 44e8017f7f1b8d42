"""A lock of a queue that is served without a pause and must be changed all the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PASS_PAUSE = 0.0002
"""Seconds between looks whether another thread has taken the lock."""

ENTER_LOOK = 0.01
"""Seconds between looks whether queues are being stopped, for a device that takes a buffer."""


class QueueLock:
    """Held while a queue is served or changed; a thread that changes the queue is let in.

    A thread that serves a queue without a pause would take a plain lock again before a waiting one
    wakes up. The loop comes before threads of the device's.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._counting = threading.Lock()
        self._wanted = 0
        self._loop_waits = False

    def acquire(self, seconds: float = -1) -> bool:
        """Take the lock to change the queue, again if it is taken; whether that came in time."""
        if self._lock.acquire(blocking=False):
            return True
        with self._counting:
            self._wanted += 1
        try:
            return self._lock.acquire(timeout=seconds)
        finally:
            with self._counting:
                self._wanted -= 1

    def acquire_to_serve(self) -> None:
        """Take the lock to serve the queue, after threads that wait to change it."""
        while self._wanted:
            time.sleep(PASS_PAUSE)
        if self._lock.acquire(blocking=False):
            return
        self._loop_waits = True
        try:
            self._lock.acquire()
        finally:
            self._loop_waits = False

    def acquire_for_device(self, refused: Callable[[], bool]) -> bool:
        """Take the lock after all others that wait for it; False once ``refused()`` is true."""
        # For a while only: this thread may hold the lock that the others wait for.
        until = time.monotonic() + ENTER_LOOK
        while (self._wanted or self._loop_waits) and time.monotonic() < until:
            time.sleep(PASS_PAUSE)
        while not self._lock.acquire(timeout=ENTER_LOOK):
            if refused():
                return False
        return True

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()
