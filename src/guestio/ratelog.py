"""Log lines that a guest, a peer or a device may cause any number of times.

The first few of a kind are logged at once, and then only counted until the interval is over; the
count is logged then. There is one limit for the whole process, so that whoever connects anew does
not begin anew.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

from guestio.budgets import LOG_BURST, LOG_INTERVAL, LOG_LINES

Kind = tuple[logging.Logger, int, str]


class RateLimitedLog:
    """Logs a bounded number of lines in each interval, and how many more there were.

    Args:
        burst: Lines of one kind (the same logger, level and format) in an interval.
        lines: Lines of all kinds in an interval, without the counts at its end.
        interval: Seconds.

    Threads: any may call any method.
    """

    def __init__(
        self, burst: int = LOG_BURST, lines: int = LOG_LINES, interval: float = LOG_INTERVAL
    ) -> None:
        self._burst, self._lines, self._interval = burst, lines, interval
        self._lock = threading.Lock()
        self._until = 0.0
        self._shown: Counter[Kind] = Counter()
        self._hidden: Counter[Kind] = Counter()
        self._first_hidden: dict[Kind, str] = {}
        self._watchers: list[Callable[[float], None]] = []

    def report(
        self,
        logger: logging.Logger,
        level: int,
        message: str,
        *args: object,
        trace: bool = False,
    ) -> None:
        """Log a line, or only count it.

        Args:
            logger: Where to log.
            level: How important it is.
            message: The format; lines with the same one are of one kind.
            args: What to put into it.
            trace: Whether to add the exception that is being handled.
        """
        kind = (logger, level, message)
        watchers: list[Callable[[float], None]] = []
        first = False
        over: list[tuple[Kind, int, str]] = []
        with self._lock:
            now = time.monotonic()
            if now >= self._until:
                over = self._begin(now)
            shown = self._shown[kind] < self._burst and self._shown.total() < self._lines
            if shown:
                self._shown[kind] += 1
            else:
                if not self._hidden:
                    watchers = list(self._watchers)
                first = kind not in self._hidden
                self._hidden[kind] += 1
            left = self._until - now
        self._log_counts(over)
        if shown:
            logger.log(level, message, *args, exc_info=trace)
        elif first:
            # As text: an argument may be an error whose frames keep memory mapped.
            text = _text(message, args)
            with self._lock:
                if kind in self._hidden:
                    self._first_hidden[kind] = text
        for watcher in watchers:
            watcher(left)

    def flush(self) -> None:
        """Log how many lines were only counted, and begin a new interval."""
        with self._lock:
            over = self._begin(time.monotonic())
        self._log_counts(over)

    def watch(self, watcher: Callable[[float], None]) -> None:
        """Have somebody told that lines are only counted from now on, who will call :meth:`flush`.

        Args:
            watcher: Called from any thread with the seconds that the interval still has.
        """
        with self._lock:
            self._watchers.append(watcher)

    def unwatch(self, watcher: Callable[[float], None]) -> None:
        """Undo :meth:`watch`."""
        with self._lock:
            self._watchers.remove(watcher)

    def _begin(self, now: float) -> list[tuple[Kind, int, str]]:
        first = self._first_hidden
        over = [(kind, count, first.get(kind, kind[2])) for kind, count in self._hidden.items()]
        first.clear()
        self._until = now + self._interval
        self._shown.clear()
        self._hidden.clear()
        return over

    def _log_counts(self, over: list[tuple[Kind, int, str]]) -> None:
        for (logger, level, _), count, first in over:
            logger.log(level, "%d more lines like this were not logged: %s", count, first)


def _text(message: str, args: tuple[object, ...]) -> str:
    """A line as it would have been logged."""
    try:
        return message % args if args else message
    except Exception:
        return message


LOG = RateLimitedLog()
"""The limit of this process."""
