"""Requests one way and their answers the other, on one socket of each side."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from guestio.budgets import PROXY_PENDING
from guestio.errors import ProtocolError


@dataclass(slots=True)
class Pending:
    """A request whose answer is to come.

    Attributes:
        request: Its code.
        name: Its name.
        certain: Whether there must be one.
        payload: Of the request.
        ready: The answer if it is not the other side's: it waits for those before it.
        own: Whether the request is the proxy's, and so is the answer.
    """

    request: int
    name: str
    certain: bool
    payload: bytes
    ready: bytes | None = None
    own: bool = False


class Exchange:
    """Which answers are to come, in their order: they say no more than what they answer.

    Args:
        send: Sends an answer that is not the other side's.
    """

    def __init__(self, send: Callable[[bytes, Sequence[int]], object]) -> None:
        self._pending: deque[Pending] = deque()
        self._send = send

    def expect(
        self, request: int, name: str, payload: bytes, *, certain: bool, own: bool = False
    ) -> None:
        """Expect an answer; to the proxy's own request, if that is what it is.

        Raises:
            ProtocolError: Too many are expected.
        """
        if len(self._pending) >= PROXY_PENDING:
            raise ProtocolError(f"{PROXY_PENDING} requests wait for their answers")
        self._pending.append(Pending(request, name, certain, payload, own=own))

    def answer(self, request: int, name: str, reply: bytes) -> None:
        """Answer a request that is not passed on, behind those that are expected before."""
        if len(self._pending) >= PROXY_PENDING:
            raise ProtocolError(f"{PROXY_PENDING} requests wait for their answers")
        self._pending.append(Pending(request, name, True, b"", reply))
        self._send_ready()

    def match(self, request: int) -> tuple[Pending | None, Pending | None]:
        """Find what an answer answers.

        Returns:
            The request, or None; and one before it that should have been answered first, or None.
        """
        skipped = None
        for at, each in enumerate(self._pending):
            if each.ready is None and each.request == request:
                for _ in range(at):
                    before = self._pending.popleft()
                    if before.ready is not None:
                        self._send(before.ready, ())
                    elif before.certain and skipped is None:
                        skipped = before
                return self._pending.popleft(), skipped
        return None, None

    def settle(self) -> None:
        """Send the answers that waited for the one that was matched and passed on last."""
        self._send_ready()

    def _send_ready(self) -> None:
        while self._pending and (ready := self._pending[0].ready) is not None:
            self._pending.popleft()
            self._send(ready, ())
