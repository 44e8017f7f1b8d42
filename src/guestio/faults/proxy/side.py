"""One socket of a proxy: messages come from it and go to it, each way in their order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from guestio.budgets import HALF_MESSAGE_TIMEOUT, PROXY_MESSAGES, SEND_RETRY, TURN_SECONDS
from guestio.errors import GuestioError
from guestio.peer.connection import MESSAGES_AT_A_TIME
from guestio.peer.foreign import close_foreign
from guestio.vhost_user.channel import Channel, ConnectionLostError, Message, PeerGoneError
from guestio.virtio.loop import EventLoop


@dataclass(slots=True)
class _Unsent:
    due: float
    data: bytes
    fds: list[int]


class Side:
    """Reads messages as long as there is room for them where they go, and sends in order.

    A side whose peer does not read, or leaves half a message, is lost after a time limit.

    Args:
        channel: The socket; owned from here on.
        loop: Calls back.
        name: Of what is at the other end, for messages.
        handle: Called with each message that comes, which it may take descriptors from.
        lost: Called once nothing comes any more, with the reason; None if the peer has hung up.

    Attributes:
        name: As given.
        other: Where messages from here go; nothing is read before it is set.
    """

    def __init__(
        self,
        channel: Channel,
        loop: EventLoop,
        name: str,
        handle: Callable[[Message], object],
        lost: Callable[[str | None], object],
    ) -> None:
        self.name = name
        self.other: Side | None = None
        self._channel = channel
        self._loop = loop
        self._handle = handle
        self._lost = lost
        self._closed = self._reading = self._soon = False
        self._half_since: float | None = None
        self._unsent: deque[_Unsent] = deque()
        self._sending: list[int] = []

    def start(self, other: Side) -> None:
        """Read from now on; messages go to another side, or come from there."""
        self.other = other
        self._resume()

    # Reading.

    def _resume(self) -> None:
        if not self._reading and not self._closed and self.other is not None:
            self._reading = True
            self._loop.add_reader(self._channel.fileno(), self._receive)
            # The channel may have read ahead.
            self._receive_soon()

    def _receive_soon(self) -> None:
        if not self._soon:
            self._soon = True
            self._loop.call_soon_threadsafe(self._receive_now)

    def _receive_now(self) -> None:
        self._soon = False
        if self._reading:
            self._receive()

    def _receive(self) -> None:
        until = time.monotonic() + TURN_SECONDS
        try:
            for _ in range(MESSAGES_AT_A_TIME):
                if self._closed:
                    return
                if not (self.has_room and self.other is not None and self.other.has_room):
                    self._reading = False
                    self._loop.remove_reader(self._channel.fileno())
                    return
                message = self._channel.recv()
                if message is None:
                    self._watch_half_message()
                    return
                self._half_since = None
                with message:
                    self._handle(message)
                if time.monotonic() >= until:
                    break
            self._receive_soon()
        except ConnectionLostError as error:
            self._lost(f"{self.name}: {error}")
        except PeerGoneError:
            self._lost(None)
        except GuestioError as error:
            self._lost(f"{self.name}: {error}")

    def _watch_half_message(self) -> None:
        if not self._channel.unfinished:
            self._half_since = None
        elif self._half_since is None:
            self._half_since = time.monotonic()
            self._loop.set_timer(
                (self, "half"), self._half_since + HALF_MESSAGE_TIMEOUT, self._give_up_half
            )

    def _give_up_half(self) -> None:
        since, now = self._half_since, time.monotonic()
        if self._closed or since is None:
            return
        if now - since < HALF_MESSAGE_TIMEOUT:
            # Another message was begun since.
            self._loop.set_timer((self, "half"), since + HALF_MESSAGE_TIMEOUT, self._give_up_half)
            return
        self._lost(
            f"{self.name}: the rest of a message did not come within {HALF_MESSAGE_TIMEOUT} s"
        )

    # Sending.

    @property
    def has_room(self) -> bool:
        """Whether more may be sent: not much waits to be."""
        return len(self._unsent) < PROXY_MESSAGES and not self._channel.backlog

    def send(self, data: bytes, fds: Sequence[int] = (), delay: float = 0.0) -> None:
        """Send a message behind all that wait.

        Args:
            data: The message.
            fds: Its descriptors; they are this object's from here on.
            delay: Seconds until it is to be sent at the earliest.
        """
        if self._closed:
            close_foreign(fds)
            return
        self._unsent.append(_Unsent(time.monotonic() + delay if delay else 0.0, data, list(fds)))
        if len(self._unsent) == 1 and not self._channel.backlog:
            self._pump()

    def _pump(self) -> None:
        """Send what is due, as far as there is room."""
        full = not self.has_room
        try:
            while not self._closed:
                if self._channel.backlog and not self._channel.flush():
                    self._later(time.monotonic() + SEND_RETRY)
                    return
                self._drop_sent()
                if not self._unsent:
                    break
                next_one = self._unsent[0]
                if next_one.due > time.monotonic():
                    self._later(next_one.due)
                    return
                self._unsent.popleft()
                self._sending = next_one.fds
                self._channel.post(next_one.data, next_one.fds)
        except PeerGoneError:
            # What it sent before is still to be read, unless there is no reading.
            self._drop_sent()
            self._lost(None)
            return
        except GuestioError as error:
            self._lost(f"{self.name}: {error}")
            return
        if full and not self._closed and self.other is not None:
            self._resume()
            self.other._resume()

    def _later(self, when: float) -> None:
        self._loop.set_timer((self, "send"), when, self._pump)

    def _drop_sent(self) -> None:
        sent, self._sending = self._sending, []
        close_foreign(sent)

    def close(self) -> None:
        """Hang up. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        self._reading = False
        self._loop.remove_reader(self._channel.fileno())
        for timer in ("half", "send"):
            self._loop.clear_timer((self, timer))
        self._channel.close()
        self._drop_sent()
        unsent, self._unsent = self._unsent, deque()
        for each in unsent:
            close_foreign(each.fds)
