"""What a check works with whatever it examines: verdicts, and what is gone when it ends."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final, NoReturn, Self

from guestio.faults.outcomes import FailError, RejectError, SkipError

QUIET: Final = 0.1
"""Seconds after which something that must not happen is taken not to happen."""


class BaseTrial(ABC):
    """One run of one check.

    Everything that it opens is closed by :meth:`close`. Its methods raise the errors of
    :mod:`guestio.faults.outcomes`, which end the check.

    Args:
        patience: Seconds that an answer may take.
        seed: Of everything random.

    Attributes:
        patience: Seconds that an answer may take.
        random: Random numbers of this check's own.
    """

    def __init__(self, patience: float, seed: str) -> None:
        self.patience = patience
        # Not for secrets: a run must be repeatable.
        self.random = random.Random(seed)  # noqa: S311 - as said
        self._open = contextlib.ExitStack()

    def close(self) -> None:
        """Close every connection and give everything back. May be called again."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def probe(self) -> None:
        """Make an honest request, which must be served."""

    # Verdicts

    @staticmethod
    def fail(reason: str) -> NoReturn:
        """End the check with FAIL."""
        raise FailError(reason)

    @staticmethod
    def reject(reason: str) -> NoReturn:
        """End the check with REJECT."""
        raise RejectError(reason)

    @staticmethod
    def skip(reason: str) -> NoReturn:
        """End the check with SKIP."""
        raise SkipError(reason)

    @staticmethod
    def expect(condition: object, reason: str) -> None:
        """End the check with FAIL unless the condition holds."""
        if not condition:
            raise FailError(reason)

    # What is gone when the check ends

    def eventfd(self) -> int:
        """An eventfd for as long as the check runs."""
        return self.own(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    def own(self, fd: int) -> int:
        """Close a descriptor when the check ends."""
        self._open.callback(os.close, fd)
        return fd

    def duplicate(self, fd: int) -> int:
        """Another descriptor of the same file."""
        return self.own(os.dup(fd))

    def on_close(self, call: Callable[[], object]) -> None:
        """Have something done when the check ends, before what was opened earlier is closed."""
        self._open.callback(call)

    def memfd(self, size: int) -> int:
        """A file in memory."""
        fd = self.own(os.memfd_create("guestio-check"))
        os.ftruncate(fd, size)
        return fd

    def socket_pair(self) -> tuple[socket.socket, socket.socket]:
        """Two connected stream sockets."""
        pair = socket.socketpair()
        for each in pair:
            self._open.callback(each.close)
        return pair
