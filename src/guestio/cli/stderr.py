"""The log of a server command on standard error, which never makes the server wait.

Standard error may be a pipe whose reader has stopped, or may not be open at all. Lines go through a
bounded queue to a thread of their own; what finds no room there is counted and told later.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import time
from logging.handlers import QueueHandler, QueueListener
from queue import Full, Queue

from guestio.budgets import LOG_QUEUE

FORMAT = "%(asctime)s %(levelname)s %(message)s"
_OWN = "guestio.cli"


def open_standard_descriptors() -> None:
    """Open the null device for each of descriptors 0 to 2 that is closed.

    Otherwise an image or a socket would get the number, and whatever a library prints would be
    written into a guest's disk.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest number that is free is the one that is missing.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            mode = "w" if fd else "r"
            setattr(sys, name, open(fd, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - the process keeps it


class _Handler(QueueHandler):
    """Passes records on, or counts them."""

    def __init__(self, records: Queue[logging.LogRecord | None]) -> None:
        super().__init__(records)
        self._records = records
        self._lost = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        """Pass a record on if there is room; called with the handler's lock held."""
        try:
            if self._lost:
                text = f"{self._lost} lines were lost: standard error was not read"
                self._records.put_nowait(_record(record.name, logging.WARNING, text))
                self._lost = 0
            self._records.put_nowait(record)
        except Full:
            self._lost += 1


class _Formatter(logging.Formatter):
    """One line a record; a command's own lines as they are."""

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage() if record.name == _OWN else super().format(record)


class StderrLog:
    """Logs to standard error, one line a record, whatever the terminal's width."""

    def __init__(self, level: int = logging.INFO) -> None:
        self._records: Queue[logging.LogRecord | None] = Queue(LOG_QUEUE)
        stream = logging.StreamHandler(sys.stderr)
        stream.setFormatter(_Formatter(FORMAT))
        QueueListener(self._records, stream).start()
        self._handler = _Handler(self._records)
        # Text and traceback only; `basicConfig` would give it a format of its own.
        self._handler.setFormatter(logging.Formatter())
        logging.basicConfig(level=level, handlers=[self._handler])

    def say(self, line: str) -> None:
        """Print a line of the command itself."""
        self._handler.handle(_record(_OWN, logging.INFO, line))

    def drain(self, seconds: float) -> bool:
        """Wait for what has been logged to be written.

        Args:
            seconds: For a reader that does not read. While standard error could take a line it is
                our own thread that is waited for, which a busy machine may not let run: five times
                as long.

        Returns:
            Whether it was. If not, a normal end of the process would wait for it, too, or fail.
        """
        records, began = self._records, time.monotonic()
        with records.all_tasks_done:
            while records.unfinished_tasks:
                waited = time.monotonic() - began
                if waited >= 5 * seconds or (waited >= seconds and not _can_take_a_line()):
                    return False
                records.all_tasks_done.wait(seconds / 4)
        try:
            # What a full disk did not take stays in the stream's buffer.
            sys.stderr.flush()
        except OSError:
            return False
        return True


def _can_take_a_line() -> bool:
    """Whether a write to standard error would not wait for its reader."""
    look = select.poll()
    look.register(2, select.POLLOUT)
    return bool(look.poll(0))


def _record(name: str, level: int, text: str) -> logging.LogRecord:
    return logging.LogRecord(name, level, "", 0, "%s", (text,), None)
