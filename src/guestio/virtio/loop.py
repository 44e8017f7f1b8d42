"""The event loop: descriptors, timers, callbacks, and the queues that the compiled core serves.

One loop runs in one thread. Everything that a device, its queues and its transport do happens in
the loop's callbacks, or in the core while the loop waits.
"""

from __future__ import annotations

import contextlib
import math
import operator
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator

from guestio._core.virtio.loop import CoreLoop
from guestio.budgets import TURN_BYTES, TURN_SECONDS
from guestio.memory.backing import close_fd

Callback = Callable[[], object]


class Timer:
    """A callback at a time, from :meth:`EventLoop.call_later`."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop

    def cancel(self) -> None:
        """Do not call back. May be called again, and from any thread."""
        self._loop.clear_timer(self)


class EventLoop:
    """Calls back when a descriptor is readable, a time has come, or there is more to do.

    Other threads may call everything but :meth:`run_once` and :meth:`close`; signal handlers only
    :meth:`wake`. Callbacks are called in the thread that runs the loop, with no lock held.

    Attributes:
        core: Serves queues while the loop waits. For the loop's own thread.
    """

    def __init__(self) -> None:
        self.core = CoreLoop(round_bytes=TURN_BYTES)
        self._epoll = select.epoll()
        # An epoll descriptor keeps what is only looked at, edges included.
        self._look = select.poll()
        self._look.register(self._epoll, select.POLLIN)
        self._callbacks: dict[int, Callback] = {}
        self._edges: set[int] = set()
        self._left: list[int] = []
        self._timers: dict[Hashable, tuple[float, Callback]] = {}
        self._due = math.inf
        self._soon: deque[Callback] = deque()
        self._thread: int | None = None
        self._in_core = False
        self._wake = -1
        try:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self.add_reader(self._wake, self._woken)
        except BaseException:
            self._epoll.close()
            if self._wake >= 0:
                close_fd(self._wake)
            raise

    def add_reader(self, fd: int, callback: Callback, *, edge: bool = False) -> None:
        """Call back whenever ``fd`` is readable, or with ``edge`` whenever it becomes so again.

        It replaces an earlier callback for ``fd``.

        Raises:
            OSError: The descriptor cannot be waited for.
        """
        events = select.EPOLLIN | (select.EPOLLET if edge else 0)
        # It may be found readable by the thread that waits before this returns.
        self._callbacks[fd] = callback
        (self._edges.add if edge else self._edges.discard)(fd)
        try:
            try:
                self._epoll.register(fd, events)
            except FileExistsError:
                self._epoll.modify(fd, events)
        except BaseException:
            del self._callbacks[fd]
            raise

    def reader(self, fd: int) -> Callback | None:
        """What is called back when ``fd`` is readable, if anything is."""
        return self._callbacks.get(fd)

    def remove_reader(self, fd: int, callback: Callback | None = None) -> None:
        """Stop waiting for ``fd``, before it is closed. Unknown ones are ignored.

        With a callback, only if that is the one which is called back for ``fd``.
        """
        if callback is not None and self._callbacks.get(fd) is not callback:
            return
        if self._callbacks.pop(fd, None) is not None:
            # What is not called back for any more does no harm until it is closed.
            try:  # noqa: SIM105 - `suppress` would need memory
                self._epoll.unregister(fd)
            except (OSError, ValueError):
                pass  # ValueError: the loop is closed.

    def call_soon_threadsafe(self, callback: Callback) -> None:
        """Call back once, after what is ready now has been handled."""
        self._soon.append(callback)
        if self._in_core or threading.get_ident() != self._thread:
            self.wake()

    def call_later(self, seconds: float, callback: Callback) -> Timer:
        """Call back once, in ``seconds``."""
        timer = Timer(self)
        self.set_timer(timer, time.monotonic() + seconds, callback)
        return timer

    @property
    def is_current(self) -> bool:
        """Whether the calling thread is the one that ran the loop last."""
        return threading.get_ident() == self._thread

    @property
    def busy(self) -> bool:
        """Whether callbacks wait."""
        return bool(self._soon)

    def set_timer(self, key: Hashable, when: float, callback: Callback) -> None:
        """Call back once at ``when`` (``time.monotonic``); replaces a timer of the same key."""
        self._timers[key] = (when, callback)
        if threading.get_ident() == self._thread and not self._in_core:
            self._due = min(self._due, when)
        else:
            # The loop's thread may be computing when the next one is due.
            self.call_soon_threadsafe(lambda: self._expect(when))

    def _expect(self, when: float) -> None:
        self._due = min(self._due, when)

    def clear_timer(self, key: Hashable) -> None:
        """Forget a timer, if there is one."""
        self._timers.pop(key, None)

    def fileno(self) -> int:
        """Return a descriptor that is readable while one of those added is."""
        return self._epoll.fileno()

    def wake(self) -> None:
        """Make a waiting :meth:`run_once` return; nothing once closed."""
        while self._wake >= 0:
            # Takes no memory: a loop that is not woken for want of it would sleep on.
            try:
                os.eventfd_write(self._wake, 1)
            except InterruptedError:
                continue
            except BlockingIOError:
                pass  # It cannot count any further, and is readable as it is.
            return

    @contextlib.contextmanager
    def woken_by_signals(self) -> Iterator[None]:
        """Have a signal end a wait even if it arrives just before the wait begins.

        Python runs a signal's handler only between two steps of its own. Without this, a handler
        whose signal comes after the last of them waits for the next event, for ever if there is
        none. Does nothing outside of the main thread, or if others have signals written to a
        descriptor already.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        try:
            if before != -1:
                signal.set_wakeup_fd(before)
            self.add_reader(reading, lambda: _empty(reading))
            yield
        finally:
            self.remove_reader(reading)
            if before == -1:
                signal.set_wakeup_fd(-1)
            close_fd(reading)
            close_fd(writing)

    def run_once(self, longest: float = math.inf) -> None:
        """Wait until something is due and call back for all of it.

        Readers that are not called within TURN_SECONDS are called the next time, before all others,
        after another look at all descriptors.

        Args:
            longest: Seconds to wait at most.
        """
        self._thread = threading.get_ident()
        soon, callbacks = self._soon, self._callbacks
        seconds = 0 if soon else self._patience()
        if longest != math.inf and not 0 <= seconds <= longest:
            seconds = longest
        # What the core calls meanwhile may ask for callbacks, which its wait knows nothing of.
        self._in_core = True
        fds, feeds, outcomes = self.core.wait(self._epoll.fileno(), seconds)
        self._in_core = False
        for feed in feeds:
            feed.callback()
        for queue, outcome in outcomes:
            queue.callback(outcome)
        if self._left:
            # The kernel tells of them in the same order each time.
            rank = {fd: place for place, fd in enumerate(self._left)}
            fds.sort(key=lambda fd: rank.get(fd, len(rank)))
            self._left.clear()
        until = time.monotonic() + TURN_SECONDS
        for fd in fds:
            # A callback before this one may have removed it.
            callback = callbacks.get(fd)
            if callback is None:
                continue
            if time.monotonic() < until:
                callback()
            elif fd in self._edges:
                # The others are found readable again.
                soon.append(callback)
            else:
                self._left.append(fd)
        for _ in range(len(soon)):
            soon.popleft()()
            if time.monotonic() >= until:
                break
        if self._due != math.inf and time.monotonic() >= self._due:
            self._run_timers()

    @property
    def pending(self) -> bool:
        """Whether something is due, so that :meth:`run_once` would not wait."""
        return bool(self._soon or time.monotonic() >= self._due or self._look.poll(0))

    def leave(self) -> None:
        """Detach the loop from the calling thread; another thread may call :meth:`run_once` next.

        Once something is due, :meth:`fileno` is readable; but for timers, see :attr:`next_timer`.
        """
        self._thread = None
        if self._soon or time.monotonic() >= self._due:
            self.wake()

    @property
    def next_timer(self) -> float:
        """When the next timer is due (``time.monotonic``), infinite if there is none."""
        return self._due

    def _patience(self) -> float:
        return -1 if self._due == math.inf else max(self._due - time.monotonic(), 0)

    def _run_timers(self) -> None:
        now = time.monotonic()
        due = [(when, key) for key, (when, _) in list(self._timers.items()) if when <= now]
        for _, key in sorted(due, key=operator.itemgetter(0)):
            # A callback before this one may have cleared it, or set it again for later.
            when, callback = self._timers.get(key, (math.inf, None))
            if callback is not None and when <= now and self._timers.pop(key, None) is not None:
                callback()
        # A cleared timer's time passes without consequence, and is forgotten here.
        self._due = min((when for when, _ in list(self._timers.values())), default=math.inf)

    def _woken(self) -> None:
        os.eventfd_read(self._wake)

    def close(self) -> None:
        """Close the loop's own descriptors. Calling it again does nothing."""
        wake, self._wake = self._wake, -1
        if wake >= 0:
            self._epoll.close()
            close_fd(wake)


def _empty(pipe: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.read(pipe, 4096)


class LoopThread:
    """A thread that runs an event loop of its own.

    Args:
        name: Of the thread.
        failed: Called in that thread with what a callback raised.

    Attributes:
        loop: What it runs.
    """

    def __init__(self, name: str, failed: Callable[[BaseException], None]) -> None:
        self.loop = EventLoop()
        self._failed = failed
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self.loop.close()
            raise

    def _run(self) -> None:
        while not self._stopping:
            try:
                self.loop.run_once()
            except BaseException as error:
                self._failed(error)

    def close(self) -> None:
        """End the thread after the callback that it is in, and wait for it. Idempotent."""
        self._stopping = True
        self.loop.wake()
        self._thread.join()
        self.loop.close()
