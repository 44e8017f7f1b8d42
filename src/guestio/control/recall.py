"""Events that are recorded only while questions are asked that they answer."""

from __future__ import annotations

import time
from typing import Final

from guestio.budgets import CONTROL_HEAT_SECONDS, CONTROL_RECALL_SECONDS
from guestio.trace import Group, Tracing

HEAT: Final = Group.REQUESTS | Group.BUFFERS
"""What says which addresses requests use."""


class Recall:
    """Has events recorded from the first question that needs them on, for a limited time.

    Those of translations and requests are by far the most frequent ones, and not worth their cost
    while nothing is asked. For one thread.
    """

    def __init__(self) -> None:
        self._changes = _Recorded(Group.TRANSLATIONS, CONTROL_RECALL_SECONDS)
        self._uses = _Recorded(HEAT, CONTROL_HEAT_SECONDS)

    def ask(self) -> float:
        """Record changes of translations; for how many seconds that has been so."""
        return self._changes.ask()

    def ask_uses(self) -> float:
        """Record the buffers of requests; for how many seconds that has been so."""
        return self._uses.ask()

    def look(self) -> None:
        """Record no more what was asked about long ago."""
        self._changes.look()
        self._uses.look()

    def close(self) -> None:
        """Record no more. Calling it again does nothing."""
        self._changes.close()
        self._uses.close()


class _Recorded:
    """Groups of events, recorded for so many seconds after the last question."""

    def __init__(self, groups: Group, seconds: float) -> None:
        self._groups, self._seconds = groups, seconds
        self._tracing: Tracing | None = None
        self._since = self._asked = 0.0

    def ask(self) -> float:
        self._asked = time.monotonic()
        if self._tracing is None:
            self._tracing, self._since = Tracing(self._groups), self._asked
        return self._asked - self._since

    def look(self) -> None:
        if time.monotonic() - self._asked >= self._seconds:
            self.close()

    def close(self) -> None:
        if self._tracing is not None:
            self._tracing.close()
            self._tracing = None
