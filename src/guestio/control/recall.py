"""Changes of translations, recorded while anyone asks what an address leads to."""

from __future__ import annotations

import time

from guestio.budgets import CONTROL_RECALL_SECONDS
from guestio.trace import Group, Tracing


class Recall:
    """Has translations recorded from the first question about an address on, for a limited time.

    They are by far the most frequent events that a question may be about, and not worth their
    cost while there is none. For one thread.
    """

    def __init__(self) -> None:
        self._tracing: Tracing | None = None
        self._since = self._asked = 0.0

    def ask(self) -> float:
        """Record from now on, if that is not so already; for how many seconds it has been."""
        self._asked = time.monotonic()
        if self._tracing is None:
            self._tracing, self._since = Tracing(Group.TRANSLATIONS), self._asked
        return self._asked - self._since

    def look(self) -> None:
        """Record no more if the last question was long ago."""
        if time.monotonic() - self._asked >= CONTROL_RECALL_SECONDS:
            self.close()

    def close(self) -> None:
        """Record no more. Calling it again does nothing."""
        if self._tracing is not None:
            self._tracing.close()
            self._tracing = None
