"""A connection to the control socket that ends once its client stalls."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from guestio.budgets import CONTROL_CONNECTIONS, CONTROL_REQUEST_SECONDS

STREAMS = frozenset({"/events", "/record"})
"""What is answered by a stream."""

LOOK_SECONDS = 0.5
"""Seconds between looks at a connection."""


class GuardedProtocol(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, with limits on time and on the number of connections.

    A client has CONTROL_REQUEST_SECONDS for each step: to send a whole request, to be answered,
    and to take what it is sent. A stream of events or statuses lasts as long as it is taken.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._since = self._stuck_since = self.loop.time()
        self._guard = self.loop.call_later(LOOK_SECONDS, self._look)
        # Those that were aborted are there until the loop gets to it.
        others: list[Any] = [
            each
            for each in self.connections
            if each is not self and not each.transport.is_closing()
        ]
        if len(others) >= CONTROL_CONNECTIONS:
            # Streams last; all else should have been over long ago.
            oldest = min(others, key=lambda each: (each.streaming, each._since))
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._guard.cancel()
        super().connection_lost(exc)

    @property
    def streaming(self) -> bool:
        """Whether an answer is sent that goes on as long as it is taken."""
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete and self.scope["path"] in STREAMS

    def _look(self) -> None:
        """End the connection if its client has had enough time."""
        if self.transport.is_closing():
            return
        now = self.loop.time()
        if self.cycle is not None and self.cycle.response_complete:
            # Waiting for the next request: uvicorn limits how long, up to its first byte.
            if self.timeout_keep_alive_task is not None:
                self._since = now
        elif self.streaming and not self.flow.write_paused:
            self._since = now
        if now - self._since >= CONTROL_REQUEST_SECONDS:
            self.transport.abort()
            return
        self._guard = self.loop.call_later(LOOK_SECONDS, self._look)
