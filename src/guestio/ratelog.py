"""Log lines that a guest, a peer or a device may cause any number of times.

The first few of a kind are logged at once, and then only counted until the interval is over; the
count is logged then. There is one limit for the whole process: a peer that connects again gets no
new one.

What foreign code says, an exception's text above all, goes into a line through :func:`one_line`: it
may raise when it is asked, hold line breaks, or be megabytes long.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable

from guestio.budgets import (
    LOG_BURST,
    LOG_CAUSES,
    LOG_FRAMES,
    LOG_INTERVAL,
    LOG_LINES,
    LOG_TEXT,
    LOG_TRACE,
)

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
        trace: bool | BaseException = False,
    ) -> None:
        """Log a line, or only count it.

        Args:
            logger: Where to log.
            level: How important it is.
            message: The format; lines with the same one are of one kind.
            args: What to put into it, exceptions for example; see :func:`one_line`.
            trace: An exception whose traceback is added; True for the one that is being handled.
        """
        args = tuple(one_line(arg) for arg in args)
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
            _log(logger, level, message, args, trace)
        elif first:
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
        """Call ``watcher`` when lines are only counted from now on; it must see to a :meth:`flush`.

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


def one_line(value: object) -> object:
    """What may be logged of a value of foreign code: one line of at most LOG_TEXT characters.

    Returns:
        A number as it is, since formats may want one; of all else its text. If its ``str()``
        raises, that is the name of its type.
    """
    if type(value) in (int, float):
        return value
    try:
        text = value if isinstance(value, str) else str(value)
        # Of a subclass, which may do anything.
        text = str.__str__(text)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        text = f"({type(value).__name__}, whose str() raised {type(error).__name__})"
    size, text = len(text), text[:LOG_TEXT]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)[
            :LOG_TEXT
        ]
    return text if size <= LOG_TEXT else f"{text}... ({size} characters)"


def _log(
    logger: logging.Logger,
    level: int,
    message: str,
    args: tuple[object, ...],
    trace: bool | BaseException,
) -> None:
    """Log a line; with the traceback of an exception, as bounded text.

    Neither an exception nor its frames get into the record: they may keep guest memory mapped.
    """
    if trace is False:
        logger.log(level, message, *args)
    elif logger.isEnabledFor(level):
        record = logger.makeRecord(logger.name, level, __file__, 0, message, args, None)
        record.exc_text = _traceback(sys.exception() if trace is True else trace)
        logger.handle(record)


def _traceback(error: BaseException | None) -> str:
    """An exception's last frames, and those of what caused it, as :mod:`traceback` shows them."""
    chain: list[tuple[BaseException, str]] = []
    link = ""
    while error is not None and len(chain) < LOG_CAUSES and all(error is not e for e, _ in chain):
        chain.append((error, link))
        if error.__cause__ is not None:
            error, link = error.__cause__, "\n\nThis caused:\n\n"
        elif error.__suppress_context__:
            break
        else:
            error, link = error.__context__, "\n\nWhile this was handled came:\n\n"
    text = "".join(f"{_frames(error)}{link}" for error, link in reversed(chain))
    # The end names the exception that was raised last.
    return text if len(text) <= LOG_TRACE else f"... {text[-LOG_TRACE:]}"


def _frames(error: BaseException) -> str:
    try:
        frames = "".join(traceback.format_tb(error.__traceback__, -LOG_FRAMES))
    except Exception:
        # A loader of foreign code may be asked for the lines.
        frames = ""
    return f"Traceback (last calls):\n{frames}{type(error).__name__}: {one_line(error)}"


def _text(message: str, args: tuple[object, ...]) -> str:
    """A line as it would have been logged."""
    try:
        return message % args if args else message
    except Exception:
        return message


LOG = RateLimitedLog()
"""The limit of this process."""
