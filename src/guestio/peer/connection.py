"""One peer from its connection to its disconnection: messages in, answers out, an orderly end."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Generic, TypeVar

from guestio.budgets import HALF_MESSAGE_TIMEOUT, SEND_RETRY, TURN_SECONDS
from guestio.errors import ProtocolError
from guestio.peer.channel import Channel, ConnectionLostError, Header, Message, PeerGoneError
from guestio.ratelog import LOG
from guestio.virtio.loop import EventLoop

MESSAGES_AT_A_TIME = 64
"""Messages handled per wake-up, so that queues and other descriptors are not starved."""

H = TypeVar("H", bound=Header)


class PeerConnection(ABC, Generic[H]):
    """Reads a peer's messages in an event loop and sends what answers them.

    A peer that does not read its answers is read from no more until it does; one that leaves half a
    message, or breaks the protocol, is disconnected.

    Args:
        channel: The connection; owned from here on.
        loop: Calls back when there is something to do.
        log: Where problems are reported.

    Attributes:
        closed: Whether the peer is gone and everything of it released.
        unclean: Whether something of it could not be released, or an error may refer to it.
        heard: Whether it has sent a whole message.
        since: When it connected (monotonic time).
    """

    peer_name = "peer"
    """What the other side is called in log lines."""

    def __init__(self, channel: Channel[H], loop: EventLoop, log: logging.Logger) -> None:
        self.closed = self.unclean = False
        self.heard = False
        self.since: Final = time.monotonic()
        self._half_since: float | None = None
        self._receiving_soon = False
        self._channel = channel
        self._loop = loop
        self._log = log

    @abstractmethod
    def _handle(self, message: Message[H]) -> tuple[bytes | None, Sequence[int]]:
        """Obey a message; the answer, if there is one now, and the descriptors to send with it.

        Raises:
            ProtocolError: The peer must be disconnected.
        """

    @abstractmethod
    def _count_protocol_error(self) -> None:
        """Count a peer that broke the protocol."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back. Calling it again does nothing."""

    def _may_read(self) -> bool:
        """Whether the next message may be read now; if not, reading goes on by :meth:`_resume`."""
        return True

    def _next(self) -> Message[H] | None:
        """The next message to handle, or None if it has not arrived; raises as `Channel.recv`."""
        return self._channel.recv()

    def _start(self) -> None:
        """Read from now on. The last step of a constructor: nothing calls back what failed."""
        self._loop.add_reader(self._channel.fileno(), self._receive)

    def _receive(self) -> None:
        if self.closed:
            return
        until = time.monotonic() + TURN_SECONDS
        try:
            for _ in range(MESSAGES_AT_A_TIME):
                if not self._may_read():
                    return
                message = self._next()
                if message is None:
                    self._watch_half_message()
                    return
                self.heard = True
                self._half_since = None
                reply, fds = self._handle(message)
                if self.closed or (reply is not None and not self._send(reply, fds)):
                    return
                if time.monotonic() >= until:
                    break
            self._receive_soon()
        except ConnectionLostError as error:
            LOG.report(self._log, logging.ERROR, "%s disconnected: %s", self.peer_name, error)
            self.close()
        except PeerGoneError:
            self.close()
        except ProtocolError as error:
            self.disconnect(str(error))

    def _receive_soon(self) -> None:
        """Go on with what has arrived when the loop's others have had their turn."""
        # Once: callbacks of others would wait behind as many as there were turns.
        if not self._receiving_soon:
            self._receiving_soon = True
            self._loop.call_soon_threadsafe(self._receive_now)

    def _receive_now(self) -> None:
        self._receiving_soon = False
        self._receive()

    def _send(self, reply: bytes, fds: Sequence[int] = ()) -> bool:
        """Send an answer; False if the peer has to read first, and nothing is read until then."""
        sent = self._channel.post(reply, fds)
        if not sent:
            self._wait_for_reader()
        return sent

    def _resume(self) -> None:
        """Go on reading, from a callback of the loop."""
        self._loop.add_reader(self._channel.fileno(), self._receive)
        # The channel may have read ahead.
        self._receive_soon()

    def disconnect(self, reason: str) -> None:
        """End the connection to a peer that broke the protocol."""
        self._count_protocol_error()
        LOG.report(self._log, logging.ERROR, "%s disconnected: %s", self.peer_name, reason)
        self.close()

    def _wait_for_reader(self) -> None:
        """Read nothing more from a peer until it has taken what it was sent."""
        if self._channel.backlog:
            self._loop.remove_reader(self._channel.fileno())
            self._loop.set_timer((self, "flush"), time.monotonic() + SEND_RETRY, self._send_backlog)

    def _send_backlog(self) -> None:
        if self.closed:
            return
        try:
            if self._channel.flush():
                self._resume()
            else:
                self._wait_for_reader()
        except PeerGoneError:
            self.close()
        except ProtocolError as error:
            self.disconnect(str(error))

    def _watch_half_message(self) -> None:
        """Give a peer a while for the rest of a message."""
        if not self._channel.unfinished:
            self._half_since = None
        elif self._half_since is None:
            self._half_since = time.monotonic()
            self._loop.set_timer(
                (self, "half"), self._half_since + HALF_MESSAGE_TIMEOUT, self._give_up_half
            )

    def _give_up_half(self) -> None:
        since, now = self._half_since, time.monotonic()
        if self.closed or since is None:
            return
        if now - since < HALF_MESSAGE_TIMEOUT:
            # Another message was begun since.
            self._loop.set_timer((self, "half"), since + HALF_MESSAGE_TIMEOUT, self._give_up_half)
            return
        self.disconnect(f"the rest of a message did not come within {HALF_MESSAGE_TIMEOUT} s")

    def _hang_up(self) -> None:
        self._loop.remove_reader(self._channel.fileno())
        self._loop.clear_timer((self, "flush"))
        self._loop.clear_timer((self, "half"))
        self._channel.close()

    def _release(self, steps: Iterable[Callable[[], object]], what: str) -> None:
        """Take all steps of an end, whatever one raises.

        Raises:
            KeyboardInterrupt, SystemExit: One of them raised it; the others were taken.
        """
        interrupt: BaseException | None = None
        for step in steps:
            # One that fails (for want of memory, say) must not keep the others from being taken.
            try:
                step()
            except BaseException as error:
                self.unclean = True
                if isinstance(error, (KeyboardInterrupt, SystemExit)):
                    interrupt = error
                    continue
                LOG.report(
                    self._log, logging.ERROR, "%s was not released as usual", what, trace=True
                )
        if interrupt is not None:
            raise interrupt
