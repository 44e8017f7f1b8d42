"""Things that happen once, for threads, file-descriptor loops and asyncio alike."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any

from guestio.ratelog import LOG

_log = logging.getLogger(__name__)


class Event:
    """Something that happens once and stays so.

    Wait for it with :meth:`wait` in a thread, by :meth:`fileno` in a loop over file descriptors
    (readable from the moment it has happened), or with ``await`` in asyncio. Everything may be
    called from any thread. No lock is held while callbacks run.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._happened = False
        self._callbacks: list[Callable[[], None]] = []
        self._fd = -1

    @property
    def is_set(self) -> bool:
        """Whether it has happened."""
        return self._happened

    def set(self) -> None:
        """Make it happen; callbacks run before this returns. Doing it again does nothing."""
        with self._lock:
            if self._happened:
                return
            self._happened = True
            callbacks, self._callbacks = self._callbacks, []
            fd = self._fd
        if fd >= 0:
            os.eventfd_write(fd, 1)
        for callback in callbacks:
            _run(callback)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has happened.

        Args:
            timeout: Seconds at most; None for no limit.

        Returns:
            Whether it has happened.
        """
        if self._happened:
            return True
        gate = threading.Event()
        self.add_callback(gate.set)
        try:
            return gate.wait(timeout)
        finally:
            self.remove_callback(gate.set)

    def add_callback(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once it has happened, at once if it has.

        It runs in the thread that makes it happen, so it must not wait for that thread. What it
        raises is logged.
        """
        with self._lock:
            if not self._happened:
                self._callbacks.append(callback)
                return
        _run(callback)

    def remove_callback(self, callback: Callable[[], None]) -> None:
        """Do not call ``callback`` any more; it may be running already."""
        with self._lock:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

    def fileno(self) -> int:
        """A descriptor that is readable once it has happened; the event's own, never read it.

        Raises:
            OSError: The process has no descriptor left.
        """
        with self._lock:
            if self._fd < 0:
                self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            fd, happened = self._fd, self._happened
        if happened:
            # The thread that set it may not have seen the descriptor yet.
            os.eventfd_write(fd, 1)
        return fd

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait in asyncio; the value is True."""
        return self._wait_async().__await__()

    async def _wait_async(self) -> Any:
        if not self._happened:
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()

            def finish() -> None:
                if not future.done():
                    future.set_result(None)

            def wake() -> None:
                loop.call_soon_threadsafe(finish)

            self.add_callback(wake)
            try:
                await future
            finally:
                self.remove_callback(wake)
        return True

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'set' if self._happened else 'not set'}>"


def all_of(events: Iterable[Event]) -> Event | None:
    """An event that has happened when all of these have; None if there are none."""
    waiting = list(events)
    if len(waiting) < 2:
        return waiting[0] if waiting else None
    combined = Event()
    lock = threading.Lock()
    left = len(waiting)

    def count() -> None:
        nonlocal left
        with lock:
            left -= 1
            last = not left
        if last:
            combined.set()

    for event in waiting:
        event.add_callback(count)
    return combined


def _run(callback: Callable[[], None]) -> None:
    try:
        callback()
    except Exception:
        LOG.report(_log, logging.ERROR, "a callback of an event failed", trace=True)
