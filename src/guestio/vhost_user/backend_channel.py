"""The channel on which a back-end speaks first: IOTLB misses, and changes of the configuration.

The socket, what the front-end has not read yet, and the order of the messages are kept here alone.
Acknowledgements tell nothing but their kind and their order, so a message is made and sent in one
step, under :attr:`BackendChannel.lock`.

Source: QEMU docs/interop/vhost-user.rst, "Back-end communication" and "Back-end message types".
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from guestio.budgets import MAX_BACKLOG, SEND_RETRY
from guestio.errors import GuestioError
from guestio.ratelog import LOG
from guestio.vhost_user.channel import Channel, ConnectionLostError, Message, PeerGoneError
from guestio.vhost_user.messages import BackendRequest, decode_ack, encode_message
from guestio.virtio.loop import EventLoop
from guestio.virtio.statistics import Statistics

log = logging.getLogger("guestio.vhost_user")

MESSAGES_AT_A_TIME = 64
"""Replies handled one by one per wake-up, so that queues are not starved."""


class IotlbSender(Protocol):
    """Who sends IOTLB messages on a channel."""

    def channel_opened(self, acknowledged: bool) -> None:
        """Start over: acknowledgements of what was sent before do not come any more."""
        ...

    def may_send_directly(self, fd: int) -> None:
        """Send on a descriptor from now on, without :meth:`BackendChannel.send`; not if it is -1.

        Called with the channel's lock held.
        """
        ...

    def take_acknowledgements(self, fd: int) -> bool:
        """Take a run of acknowledgements; False if there is none, or something else after it."""
        ...

    def acknowledge(self, value: int) -> None:
        """Take one acknowledgement."""
        ...


class BackendChannel:
    """A back-end's channel to its front-end, from its connection on; there may be no socket yet.

    :attr:`lock` and :meth:`send` are for any thread; the rest is for the loop's.

    Args:
        loop: Calls back when replies arrive, and when to try to send again.
        statistics: Where to count.
        may_announce: Whether the front-end may be told now that the configuration space has
            changed. Called in the loop's thread, with no lock held.

    Attributes:
        lock: Held while IOTLB messages are made and sent, so that they are sent in the order in
            which their acknowledgements are expected.
    """

    def __init__(
        self, loop: EventLoop, statistics: Statistics, may_announce: Callable[[], bool]
    ) -> None:
        self.lock = threading.Lock()
        self._loop = loop
        self._stats = statistics
        self._may_announce = may_announce
        self._iotlb: IotlbSender | None = None
        self._channel: Channel | None = None
        self._acknowledged = False
        self._lost = False
        # A change that the front-end has not been told of, and one whose answer is to come.
        self._config_stale = self._config_told = False

    def attach(self, iotlb: IotlbSender) -> None:
        """Name who sends IOTLB messages and is given the acknowledgements of these."""
        self._iotlb = iotlb

    def open(self, fd: int, *, acknowledged: bool) -> None:
        """Take the socket to send on; it replaces an earlier one.

        Args:
            fd: The socket, which is the channel's from here on.
            acknowledged: Whether the front-end acknowledges what it is asked to (REPLY_ACK).

        Raises:
            ProtocolError: It is no such socket.
        """
        channel = Channel.from_fd(fd)
        with self.lock:
            self._close()
            self._channel, self._acknowledged = channel, acknowledged
            self._config_stale |= self._config_told
            self._config_told = False
            self._allow(channel.fileno())
            self._loop.add_reader(channel.fileno(), self._receive)
        if self._iotlb is not None:
            self._iotlb.channel_opened(acknowledged)
        self.announce()

    def close(self) -> None:
        """Close the socket. Calling it again does nothing."""
        with self.lock:
            self._close()
        self._loop.clear_timer((self, "flush"))

    def _close(self) -> None:
        """Close the socket. The lock is held here, so that no thread is sending."""
        self._lost = False
        self._allow(-1)
        if self._channel is not None:
            self._loop.remove_reader(self._channel.fileno())
            self._channel.close()
            self._channel = None

    def _allow(self, fd: int) -> None:
        if self._iotlb is not None:
            self._iotlb.may_send_directly(fd)

    def send(self, messages: bytes) -> None:
        """Send IOTLB messages, all at once: a socket's buffer holds few small ones but a large one.

        They are dropped if there is no socket, or if the front-end has not read for long: those
        who ask will ask again, and give up in the end. The lock is held here.
        """
        if self._channel is not None and self._channel.backlog <= MAX_BACKLOG:
            self._post(self._channel, messages)

    def _post(self, channel: Channel, messages: bytes) -> None:
        if self._lost:
            return
        try:
            if not channel.post(messages):
                # Nothing must be sent in between.
                self._allow(-1)
                self._loop.call_soon_threadsafe(self._wait_for_reader)
        except GuestioError as error:
            self._lose(error)

    def config_changed(self) -> None:
        """Tell the front-end that the configuration space has changed, once it may be told.

        Changes that come before it has dealt with one are told together, so that a front-end that
        does not read causes one message, or, if it does not acknowledge, no more than its socket
        holds.
        """
        self._config_stale = True
        self.announce()

    def announce(self) -> None:
        """Tell the front-end of a change that it has not been told of, if it may be told now."""
        if not self._config_stale or not self._may_announce():
            return
        with self.lock:
            channel = self._channel
            if channel is None or self._lost or channel.backlog or self._config_told:
                return
            self._config_stale, self._config_told = False, self._acknowledged
            self._stats.config_changes += 1
            self._post(
                channel,
                encode_message(BackendRequest.CONFIG_CHANGE_MSG, need_reply=self._acknowledged),
            )

    def _receive(self) -> None:
        channel = self._channel
        if channel is None:
            return
        try:
            if not (
                channel.at_rest
                and self._iotlb is not None
                and self._iotlb.take_acknowledgements(channel.fileno())
            ):
                # Incomplete, the end of the stream, or something else.
                self._receive_one_by_one(channel)
        except GuestioError as error:
            with self.lock:
                self._lose(error)

    def _receive_one_by_one(self, channel: Channel) -> None:
        for _ in range(MESSAGES_AT_A_TIME):
            if self._channel is not channel:
                return
            message = channel.recv()
            if message is None:
                return
            with message:
                self._take_reply(message)
        self._loop.call_soon_threadsafe(self._receive)

    def _take_reply(self, message: Message) -> None:
        if self._config_told and message.request == BackendRequest.CONFIG_CHANGE_MSG:
            request = BackendRequest.CONFIG_CHANGE_MSG
            if value := decode_ack(message.header, message.payload, request):
                LOG.report(
                    log,
                    logging.WARNING,
                    "the front-end refused to look at the changed configuration space: %d",
                    value,
                )
            # Without a running queue the front-end may have ignored it, as QEMU does.
            self._config_told, self._config_stale = (
                False,
                (self._config_stale or not self._may_announce()),
            )
            self.announce()
            return
        value = decode_ack(message.header, message.payload, BackendRequest.IOTLB_MSG)
        if self._iotlb is not None:
            self._iotlb.acknowledge(value)

    def _wait_for_reader(self) -> None:
        self._loop.set_timer((self, "flush"), time.monotonic() + SEND_RETRY, self._send_backlog)

    def _send_backlog(self) -> None:
        """Send what a front-end has not taken yet, as far as it does now."""
        with self.lock:
            if self._channel is None or self._lost:
                return
            try:
                done = self._channel.flush()
            except GuestioError as error:
                self._lose(error)
                return
            if done:
                self._allow(self._channel.fileno())
        if done:
            self.announce()
        else:
            self._wait_for_reader()

    def _lose(self, error: GuestioError) -> None:
        """Use the socket no more; closing it is for the loop's thread. The lock is held here."""
        if self._channel is None or self._lost:
            return
        if not isinstance(error, PeerGoneError) or isinstance(error, ConnectionLostError):
            LOG.report(log, logging.ERROR, "the back-end channel is of no use any more: %s", error)
        self._lost = True
        self._loop.call_soon_threadsafe(self._close_lost)

    def _close_lost(self) -> None:
        with self.lock:
            if self._lost:
                self._close()
