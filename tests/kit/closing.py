"""Descriptors of peers are closed in threads; who counts descriptors waits for those."""

from __future__ import annotations

import time

from guestio._core.base.syscalls import close_aside


def closing() -> int:
    """Descriptors in this process whose closing is not finished."""
    return close_aside([], 0, 1)


def settled_closes() -> None:
    """Wait until none is being closed."""
    deadline = time.monotonic() + 30
    while closing():
        assert time.monotonic() < deadline, "a descriptor takes for ever to close"
        time.sleep(0.001)
