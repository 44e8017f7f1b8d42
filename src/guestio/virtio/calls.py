"""What a device asks of the event loop that serves it: descriptors, timers, callbacks."""

from __future__ import annotations

import errno
import reprlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from guestio.addr import check_seconds
from guestio.errors import DeviceError
from guestio.virtio.loop import EventLoop, Timer
from guestio.virtio.statistics import RateLimitedLog

if TYPE_CHECKING:
    from _typeshed import HasFileno


class LoopCalls:
    """Calls a device back; what it raises is logged and harms nothing else.

    The names and their meaning are those of asyncio's event loops.

    Args:
        owner: What to call the device in log lines.
        loop: Serves it.

    Attributes:
        channel_class: Given the class of the connections to a driver's peer, says which one to use.
            For a device to set when it is attached, if it is to test what that peer does.
    """

    def __init__(self, owner: str, loop: EventLoop) -> None:
        self.log = RateLimitedLog()
        self.channel_class: Callable[[type], type] = _as_it_is
        self._owner = owner
        self._loop = loop
        self._readers: dict[int, Callable[[], object]] = {}

    def add_reader(self, fd: int | HasFileno, callback: Callable[[], object]) -> None:
        """Call back in the loop's thread whenever a descriptor is readable. From any thread.

        It replaces the callback that the device gave for the same descriptor before. An exception
        that the callback raises is logged, and ends the watch of the descriptor.

        Args:
            fd: The descriptor, or an object with one (a socket).
            callback: Called without arguments, once for each turn in which there is data.

        Raises:
            OSError: The descriptor cannot be waited for: it is closed, or a regular file.
            DeviceError: The transport watches a descriptor of this number: the device closed its
                own without :meth:`remove_reader`. Or the device is served no more.
        """
        number = self._fileno(fd)
        _check_callable(callback)
        present = self._loop.reader(number)
        if present is not None and present is not self._readers.get(number):
            raise DeviceError(
                f"{self._owner} watches descriptor {number}, which is its "
                "transport's: call remove_reader before a descriptor is closed"
            )

        def run() -> None:
            if not self._call_back(callback, f"the reader of descriptor {number}"):
                self._loop.remove_reader(number, run)

        try:
            self._loop.add_reader(number, run)
        except ValueError:
            raise DeviceError(
                f"{self._owner} calls add_reader, but what serves it is closed"
            ) from None
        self._readers[number] = run

    def remove_reader(self, fd: int | HasFileno) -> None:
        """Watch a descriptor no more, before it is closed. Unknown ones are ignored."""
        number = fd if isinstance(fd, int) else fd.fileno()
        run = self._readers.pop(number, None)
        if run is not None:
            self._loop.remove_reader(number, run)

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Timer:
        """Call back once in the loop's thread, in ``seconds``, at once if negative.

        An exception that the callback raises is logged. From any thread.

        Raises:
            ValueError: That is no time, or too long.
        """
        _check_callable(callback)
        try:
            delay = check_seconds(max(seconds, 0.0), "seconds")
        except TypeError:
            raise TypeError(
                f"{self._owner} calls call_later with {reprlib.repr(seconds)}, which is no number "
                "of seconds"
            ) from None
        return self._loop.call_later(delay, lambda: self._call_back(callback, "a timer"))

    def call_soon_threadsafe(self, callback: Callable[[], object]) -> None:
        """Call back once in the loop's thread, soon. From any thread.

        An exception that the callback raises is logged.
        """
        _check_callable(callback)
        self._loop.call_soon_threadsafe(lambda: self._call_back(callback, "a callback"))

    def _fileno(self, fd: int | HasFileno) -> int:
        """A descriptor's number.

        Raises:
            OSError: It is closed.
        """
        try:
            number = fd if isinstance(fd, int) else fd.fileno()
        except AttributeError:
            raise TypeError(
                f"{self._owner} calls add_reader with {reprlib.repr(fd)}, which is no descriptor"
            ) from None
        if number < 0:
            raise OSError(errno.EBADF, f"descriptor {number} cannot be waited for: it is closed")
        return number

    def _call_back(self, callback: Callable[[], object], what: str) -> bool:
        """Call the device back; whether it raised nothing."""
        try:
            callback()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self.log.report(
                "%s of %s raised %s: %s",
                what,
                self._owner,
                type(error).__name__,
                error,
                trace=True,
            )
            return False
        return True


def _as_it_is(channel_class: type) -> type:
    return channel_class


def _check_callable(callback: object) -> None:
    if not callable(callback):
        raise TypeError(f"callback must be callable, not {type(callback).__name__}")
