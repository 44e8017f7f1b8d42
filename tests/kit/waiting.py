"""Requests that take time, and calls that wait for them."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tests.kit.serving import OK, WAIT, Driver, Later

GLANCE = 0.05
"""Seconds after which something that should wait is taken to wait."""


def mirrored(source: bytes) -> tuple[int, bytes]:
    """Status and answer of a request that was served."""
    return OK, source[::-1]


def begin(driver: Driver, device: Later, *sources: bytes, queue: int = 0) -> list[int]:
    """Have requests begun that take time; their numbers."""
    numbers = [driver.submit(queue, source) for source in sources]
    device.expect(*sources)
    return numbers


class Waiting:
    """A call in a thread that should wait for something, and in the end return."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.result: object = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,))
        self._thread.start()

    def _run(self, call: Callable[[], object]) -> None:
        try:
            self.result = call()
        except BaseException as error:
            self.error = error

    def waits(self) -> bool:
        """Whether it has not returned yet."""
        self._thread.join(GLANCE)
        return self._thread.is_alive()

    def end(self) -> object:
        """What it returns."""
        self._thread.join(WAIT)
        assert not self._thread.is_alive(), "it never returns"
        assert self.error is None, self.error
        return self.result
