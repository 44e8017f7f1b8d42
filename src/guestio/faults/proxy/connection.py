"""One front-end and one back-end, and everything that passes between them."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from guestio.addr import ADDRESS_SPACE
from guestio.budgets import PROXY_CONNECT_RETRY, PROXY_CONNECT_SECONDS
from guestio.control.schema import Explanation
from guestio.control.status import Seen, budget, iotlb_status, status_names
from guestio.errors import GuestioError, ProtocolError
from guestio.faults.misbehavior.wire import open_extra, struck_answer, told
from guestio.faults.proxy.addon import ProxyMessage, Sender
from guestio.faults.proxy.exchange import Exchange, Pending
from guestio.faults.proxy.own_rings import HIDDEN as NOT_RELAYED
from guestio.faults.proxy.own_rings import HIDDEN_FEATURES, OwnRings, pages
from guestio.faults.proxy.shadow import HIDDEN, Shadow
from guestio.faults.proxy.side import Side
from guestio.peer.foreign import close_foreign, close_socket
from guestio.ratelog import LOG
from guestio.trace import What, event
from guestio.vhost_user.channel import Channel, Message
from guestio.vhost_user.messages import (
    U64,
    VHOST_F_LOG_ALL,
    VHOST_USER_F_PROTOCOL_FEATURES,
    BackendRequest,
    Config,
    FrontendRequest,
    Header,
    HeaderFlag,
    IotlbMessage,
    IotlbType,
    ProtocolFeature,
    VringAddr,
    VringFd,
    VringState,
    request_name,
)
from guestio.vhost_user.session import Session
from guestio.vhost_user.translator import MAX_TRANSLATIONS
from guestio.virtio.features import feature_names

if TYPE_CHECKING:
    from guestio.faults.proxy.server import Proxy

log = logging.getLogger("guestio.proxy")

_F = FrontendRequest
_B = BackendRequest
_REPLY_ACK: Final = int(ProtocolFeature.REPLY_ACK)
_HAS_FDS: Final = frozenset({_F.GET_INFLIGHT_FD, _F.SET_DEVICE_STATE_FD, _F.GET_SHARED_OBJECT})
"""Requests whose reply may have descriptors."""
_OTHER_REPLIES: Final = frozenset(
    {
        _F.GET_VRING_BASE,
        _F.GET_VRING_BASE_SKIP_DRAIN,
        _F.GET_CONFIG,
        _F.GET_INFLIGHT_FD,
        _F.CREATE_CRYPTO_SESSION,
        _F.GET_SHMEM_CONFIG,
        _F.SET_LOG_BASE,
    }
)
"""Requests whose reply is not one number, or has had no payload in some back-end."""
_WIRE_BITS: Final = 1 << VHOST_USER_F_PROTOCOL_FEATURES | 1 << VHOST_F_LOG_ALL


def backend_name(request: int) -> str:
    """The name of a back-end's request, as the specification has it."""
    return f"BACKEND_{request_name(request, _B)}"


class ProxyConnection:
    """A front-end from its connection to its disconnection.

    Args:
        front: The front-end's socket; owned from here on.
        proxy: What it is a connection of.

    Attributes:
        closed, unclean, heard: As of :class:`~guestio.peer.server.ServedConnection`.
    """

    def __init__(self, front: Channel, proxy: Proxy) -> None:
        self.closed = self.unclean = self.heard = False
        self._proxy = proxy
        self._loop = proxy.loop
        self._since = time.monotonic()
        self._invented = 0
        self._status = 0
        self._front = Side(front, self._loop, "front-end", self._from_front, self._lost)
        self._back: Side | None = None
        # The channel on which the back-end speaks first: towards each of the two.
        self._asked: Side | None = None
        self._asking: Side | None = None
        self._main = Exchange(self._front.send)
        self._second = Exchange(self._answer_back)
        self._own = OwnRings() if proxy.relays else None
        self.shadow = Shadow(proxy.queue, proxy.origin, self._own)
        self._deadline = self._since + PROXY_CONNECT_SECONDS
        event(What.CONNECTED, origin=proxy.origin, detail=proxy.statistics.connections)
        self._reach()

    # Connecting.

    def _reach(self) -> None:
        """Connect to the back-end, or try again until it takes too long."""
        if self.closed:
            return
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(self._proxy.backend)
        except OSError as error:
            sock.close()
            if time.monotonic() >= self._deadline:
                # EAGAIN: more wait there already than it listens for.
                busy = error.errno == errno.EAGAIN
                why = "nothing accepts there" if busy else error.strerror
                self._end(f"no back-end at {self._proxy.backend}: {why}")
                return
            # It is not the front-end's fault that it says nothing.
            self.heard = True
            when = time.monotonic() + PROXY_CONNECT_RETRY
            self._loop.set_timer((self, "reach"), when, self._reach)
            return
        try:
            back = Channel(sock)
        except BaseException:
            close_socket(sock)
            raise
        self._back = Side(back, self._loop, "back-end", self._from_back, self._lost)
        self._back.start(self._front)
        self._front.start(self._back)

    def _open_second(self, theirs: int) -> int:
        """Put a pair of sockets in the place of the front-end's; the end for the back-end.

        Raises:
            ProtocolError: What the front-end has passed is no such socket.
        """
        for side in (self._asked, self._asking):
            if side is not None:
                side.close()
        self._asked = self._asking = None
        channel = Channel.from_fd(theirs, with_fds=True)
        ours, given = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._asked = Side(
            channel, self._loop, "front-end", self._answered_by_front, self._lost_second
        )
        self._asking = Side(
            Channel(ours), self._loop, "back-end", self._asked_by_back, self._lost_second
        )
        self._second = Exchange(self._answer_back)
        self._asked.start(self._asking)
        self._asking.start(self._asked)
        return given.detach()

    def _answer_back(self, data: bytes, fds: Sequence[int]) -> None:
        if self._asking is not None:
            self._asking.send(data, fds)

    # From the front-end.

    def _from_front(self, message: Message) -> None:
        back = self._back
        if back is None:
            return
        self.heard = True
        self._proxy.statistics.messages += 1
        request, name = message.request, message.header.name
        event(
            What.MESSAGE,
            origin=self._proxy.origin,
            detail=int(request),
            length=len(message.payload),
        )
        if self._hangs_up(name):
            return
        certain = Session.has_reply(request) and request != _F.IOTLB_MSG
        if not self._pass_addons(message, name, "front-end", self._main, answered=True):
            return
        if not self._judged(message):
            return
        acknowledged = message.header.need_reply and bool(
            self.shadow.session.protocol_features & _REPLY_ACK
        )
        if certain or acknowledged or request == _F.IOTLB_MSG:
            self._main.expect(request, name, message.payload, certain=certain or acknowledged)
        try:
            fds = self._replaced(message)
        except GuestioError as error:
            self._violated("front-end", f"{name}: {error}")
            fds = message.take_fds()
        if self.closed:
            close_foreign(fds)
            return
        payload = message.payload
        if request == _F.SET_FEATURES and self._invented and len(payload) == 8:
            payload = U64(U64.decode(payload).value & ~self._invented).encode()
        if self._own is not None:
            try:
                payload = self._relayed(self._own, request, payload, fds)
            except GuestioError as error:
                close_foreign(fds)
                self._end(f"front-end: {error}")
                return
        back.send(_encode(message.header, payload), fds)
        if request == _F.VRING_KICK:
            self._look()

    def _judged(self, message: Message) -> bool:
        """Learn of a message; False if it ends the connection."""
        if message.header.is_reply:
            self._violated("front-end", f"a reply to {message.header.name}, which nothing asked")
        else:
            try:
                self.shadow.see(message)
            except ProtocolError as error:
                self._violated("front-end", str(error))
            except GuestioError as error:
                # Our own want of memory or descriptors: what passes does not suffer from it.
                LOG.report(log, logging.WARNING, "%s: %s", message.header.name, error)
        if message.request == _F.SET_STATUS and len(message.payload) == 8:
            self._status = U64.decode(message.payload).value
        return not self.closed

    def _replaced(self, message: Message) -> list[int]:
        """What goes with a message instead of what came with it; the caller's to close.

        Raises:
            GuestioError: What came is not what it should be.
        """
        request = message.request
        if request == _F.SET_BACKEND_REQ_FD and message.fd_count == 1:
            return [self._open_second(message.take_fd())]
        if request in (_F.SET_VRING_KICK, _F.SET_VRING_CALL):
            ring = VringFd.decode(message.payload)
            queue = self._proxy.queue(ring.index)
            fd = message.fds[0] if message.fd_count == 1 else None
            given = queue.set_call(fd) if request == _F.SET_VRING_CALL else queue.set_kick(fd)
            if given is not None:
                return [os.dup(given)]
        return message.take_fds()

    def _relayed(self, own: OwnRings, request: int, payload: bytes, fds: list[int]) -> bytes:
        """A message as a back-end gets it whose rings are the proxy's; descriptors are added.

        Raises:
            ProtocolError: These rings have no place in it.
        """
        if request == _F.SET_MEM_TABLE:
            payload = own.table(payload)
            fds.append(own.file())
        elif request == _F.SET_VRING_ADDR:
            index = VringAddr.decode(payload).index
            payload = own.address(payload)
            if not self._proxy.queue(index).watched:
                # Some back-ends look at their used ring now.
                own.reset(index, self.shadow.session.vrings[index].base)
        return payload

    # From the back-end.

    def _from_back(self, message: Message) -> None:
        request, name = message.request, message.header.name
        self._proxy.statistics.messages += 1
        if not message.header.is_reply:
            self._violated("back-end", f"{name} without the reply flag, on the main channel")
            if not self.closed:
                self._front.send(_encode(message.header, message.payload), message.take_fds())
            return
        asked, skipped = self._main.match(request)
        if skipped is not None:
            self._violated("back-end", f"{skipped.name} was not answered, and {name} is")
        elif asked is None:
            self._violated("back-end", f"a reply to {name}, which nothing asked")
        else:
            self._check_reply(asked, message)
        if self.closed:
            return
        if asked is not None and asked.own:
            self._main.settle()
            return
        if not self._pass_addons(message, name, "back-end", self._main, answered=False):
            self._after_reply(asked, message)
            self._main.settle()
            return
        if request == _F.GET_PROTOCOL_FEATURES and len(message.payload) == 8:
            hidden = HIDDEN if self._own is None else HIDDEN | NOT_RELAYED
            offered = U64.decode(message.payload).value & ~int(hidden)
            message.payload = U64(offered).encode()
        elif self._own is not None and request == _F.GET_FEATURES and len(message.payload) == 8:
            offered = U64.decode(message.payload).value & ~HIDDEN_FEATURES
            message.payload = U64(offered).encode()
        if self._own is not None and request in (_F.GET_VRING_BASE, _F.GET_VRING_BASE_SKIP_DRAIN):
            self._look()  # The caller takes all that the device gave back to be in its ring.
        data, fds = _encode(message.header, message.payload), message.take_fds()
        self._answer_front(self._front, name, request, data, fds)
        self._after_reply(asked, message)
        self._main.settle()

    def _answer_front(
        self, side: Side, name: str, request: int | None, data: bytes, fds: list[int]
    ) -> None:
        """Send an answer to who asked, as far as rules let it."""
        faults = self._proxy.faults
        if faults is None:
            side.send(data, fds)
            return
        if request is not None:
            data, invented = told(faults, request, data)
            self._invented |= invented
        answer = struck_answer(faults, name, data, fds=bool(fds))
        if answer is None or not answer.fds:
            close_foreign(fds)
            fds = []
        elif not fds:
            fds = [open_extra()]
        if answer is not None:
            side.send(answer.data, fds, answer.delay)

    def _check_reply(self, asked: Pending, message: Message) -> None:
        """Judge the reply to a request by what it must look like."""
        size, request = len(message.payload), message.request
        if message.fd_count and request not in _HAS_FDS:
            self._violated(
                "back-end", f"the reply to {asked.name} has {message.fd_count} descriptors"
            )
        elif request in (_F.GET_VRING_BASE, _F.GET_VRING_BASE_SKIP_DRAIN):
            if size != 8:
                self._violated("back-end", f"the reply to {asked.name} has {size} bytes, not 8")
            elif len(asked.payload) == 8 and asked.payload[:4] != message.payload[:4]:
                self._violated("back-end", f"the reply to {asked.name} is about another ring")
        elif request == _F.GET_CONFIG:
            # "uses zero length of payload to indicate an error"
            if size:
                try:
                    said, wanted = Config.decode(message.payload), Config.decode(asked.payload)
                except ProtocolError as error:
                    self._violated("back-end", f"the reply to {asked.name}: {error}")
                    return
                if (said.offset, said.size) != (wanted.offset, wanted.size):
                    self._violated(
                        "back-end",
                        f"{wanted.size} bytes of the configuration space from {wanted.offset} were "
                        f"asked for, {said.size} from {said.offset} came",
                    )
        elif request not in _OTHER_REPLIES and size != 8:
            self._violated("back-end", f"the reply to {asked.name} has {size} bytes, not 8")

    def _after_reply(self, asked: Pending | None, message: Message) -> None:
        """Learn from a reply."""
        if asked is None or self.closed:
            return
        request, payload = message.request, message.payload
        if request in (_F.GET_VRING_BASE, _F.GET_VRING_BASE_SKIP_DRAIN):
            if len(asked.payload) == 8:
                base = VringState.decode(payload).num if len(payload) == 8 else None
                self.shadow.stopped(VringState.decode(asked.payload).index, base)
        elif len(payload) == 8:
            value = U64.decode(payload).value
            if request == _F.GET_FEATURES:
                self.shadow.features = (value | self._invented) & ~_WIRE_BITS
            elif request == _F.GET_PROTOCOL_FEATURES:
                self.shadow.protocol_features = value
            elif request == _F.GET_MAX_MEM_SLOTS:
                self.shadow.max_mem_slots = max(value, 1)

    # On the channel on which the back-end speaks first.

    def _asked_by_back(self, message: Message) -> None:
        name, request = backend_name(message.request), message.request
        side = self._asked
        if side is None:
            return
        self._proxy.statistics.messages += 1
        if self._hangs_up(name):
            return
        if not self._pass_addons(message, name, "back-end", self._second, answered=True):
            return
        if message.header.is_reply:
            self._violated("back-end", f"a reply to {name}, which nothing asked")
        else:
            self._judge_request(name, message)
        if self.closed:
            return
        acknowledged = message.header.need_reply and bool(
            self.shadow.session.protocol_features & _REPLY_ACK
        )
        if (
            self._own is not None
            and request == _B.IOTLB_MSG
            and self._translates(self._own, message, name, acknowledged=acknowledged)
        ):
            return
        own = request == _B.SHARED_OBJECT_LOOKUP
        if own or acknowledged:
            self._second.expect(request, name, message.payload, certain=True)
        side.send(_encode(message.header, message.payload), message.take_fds())
        if request == _B.VRING_CALL:
            self._look()

    def _translates(
        self, own: OwnRings, message: Message, name: str, *, acknowledged: bool
    ) -> bool:
        """Answer a miss about the proxy's rings; False if it is about other memory."""
        back = self._back
        try:
            update = own.translation(IotlbMessage.decode(message.payload).iova)
        except ProtocolError:
            return False
        if update is None or back is None:
            return False
        # "has to acknowledge the request", whether asked to or not.
        self._main.expect(_F.IOTLB_MSG, "IOTLB_MSG", b"", certain=False, own=True)
        back.send(_encode(Header(_F.IOTLB_MSG, 1, 0), update.encode()))
        if acknowledged:
            flags = 1 | int(HeaderFlag.REPLY)
            answer = Header(message.request, flags, 8).encode() + U64(0).encode()
            self._second.answer(message.request, name, answer)
        return True

    def ask(self, missing: Sequence[tuple[int, int, int]]) -> None:
        """Ask the front-end for translations that a relayed ring lacks."""
        if self._asked is None:
            return
        for address, access in pages(missing):
            miss = IotlbMessage(address, 1, 0, access, int(IotlbType.MISS))
            self._asked.send(_encode(Header(_B.IOTLB_MSG, 1, 0), miss.encode()))

    def _judge_request(self, name: str, message: Message) -> None:
        """Judge and count a back-end's request."""
        request, size = message.request, len(message.payload)
        try:
            known = _B(request)
        except ValueError:
            self._violated("back-end", f"{name}: there is no such request")
            return
        negotiated = self.shadow.session.protocol_features
        needed = _NEEDED.get(known, ProtocolFeature(0))
        if int(needed) & ~negotiated:
            self._violated("back-end", f"{name} without {needed.name}, which was not negotiated")
        elif known == _B.IOTLB_MSG:
            try:
                miss = IotlbMessage.decode(message.payload)
            except ProtocolError as error:
                self._violated("back-end", f"{name}: {error}")
                return
            if miss.type not in (IotlbType.MISS, IotlbType.ACCESS_FAIL):
                self._violated("back-end", f"{name} of type {miss.type}, neither a miss nor a fail")
            elif not self.shadow.translating:
                self._violated("back-end", f"{name} without VIRTIO_F_ACCESS_PLATFORM negotiated")
            elif miss.iova + miss.size > ADDRESS_SPACE:
                self._violated("back-end", f"{name} about {miss.iova:#x}+{miss.size:#x}")
            elif miss.type == IotlbType.MISS:
                self._proxy.statistics.iotlb_misses += 1
                event(
                    What.MISS,
                    origin=self._proxy.origin,
                    address=miss.iova,
                    length=miss.size,
                    access=miss.perm & 3,
                )
        elif known in (_B.VRING_CALL, _B.VRING_ERR) and size != 8:
            self._violated("back-end", f"{name} has {size} bytes, not 8")
        elif known == _B.CONFIG_CHANGE_MSG and size:
            self._violated("back-end", f"{name} has {size} bytes, not none")

    def _answered_by_front(self, message: Message) -> None:
        name, request, side = backend_name(message.request), message.request, self._asking
        if side is None:
            return
        self._proxy.statistics.messages += 1
        asked, skipped = self._second.match(request)
        if not message.header.is_reply:
            self._violated("front-end", f"{name} without the reply flag, on the back-end's channel")
        elif skipped is not None:
            self._violated("front-end", f"{skipped.name} was not answered, and {name} is")
        elif asked is None:
            self._violated("front-end", f"a reply to {name}, which nothing asked")
        elif len(message.payload) != 8:
            self._violated(
                "front-end", f"the reply to {name} has {len(message.payload)} bytes, not 8"
            )
        if self.closed:
            return
        if self._pass_addons(message, name, "front-end", self._second, answered=False):
            data, fds = _encode(message.header, message.payload), message.take_fds()
            self._answer_front(side, name, None, data, fds)
        self._second.settle()

    # What is common to all.

    def _hangs_up(self, name: str) -> bool:
        """Whether a rule closes the connection instead of passing a message on; it is closed."""
        faults = self._proxy.faults
        if faults is None or not faults.first(("hang-up",), name, op=name):
            return False
        self._end(f"a rule hangs up at {name}", wrong=False)
        return True

    def _pass_addons(
        self, message: Message, name: str, sender: Sender, exchange: Exchange, *, answered: bool
    ) -> bool:
        """Let addons see a message, and change it; False if it does not go on."""
        addons = self._proxy.addons
        if not addons.sees_messages:
            return True
        shown = ProxyMessage(
            name,
            sender,
            message.request,
            message.payload,
            reply=message.header.is_reply,
            fds=message.fd_count,
        )
        addons.message(shown)
        message.payload = shown.checked()
        if shown._answer is not None and answered:
            flags = 1 | int(HeaderFlag.REPLY)
            header = Header(message.request, flags, len(shown._answer))
            exchange.answer(message.request, name, header.encode() + shown._answer)
            return False
        return not shown._dropped

    def _violated(self, who: str, what: str) -> None:
        """Report a rule that was broken; the connection is closed if it is to be."""
        self._proxy.violated(self, who, what)

    def _look(self) -> None:
        for queue in list(self.shadow.queues.values()):
            queue.look()

    # The end.

    def _lost(self, reason: str | None) -> None:
        """Either side is gone, or of no use."""
        if reason is None:
            self.close()
        else:
            self._end(reason)

    def _lost_second(self, reason: str | None) -> None:
        """A channel on which the back-end speaks first is gone, which ends nothing else."""
        if reason is not None:
            LOG.report(log, logging.WARNING, "the back-end's channel was closed: %s", reason)
        for side in (self._asked, self._asking):
            if side is not None:
                side.close()
        self._asked = self._asking = None

    def _end(self, reason: str, *, wrong: bool = True) -> None:
        if self.closed:
            return
        if wrong:
            self._proxy.statistics.protocol_errors += 1
            event(What.ERROR, origin=self._proxy.origin)
        level = logging.ERROR if wrong else logging.WARNING
        LOG.report(log, level, "front-end %d cut: %s", self._proxy.statistics.connections, reason)
        self.close()

    def disconnect(self, reason: str) -> None:
        """End the connection to a front-end that broke the protocol."""
        self._end(reason)

    def close(self) -> None:
        """Give everything back. Calling it again does nothing."""
        if self.closed:
            return
        self.closed = True
        self._loop.clear_timer((self, "reach"))
        try:
            self.shadow.close()
        except BaseException:
            self.unclean = True
            raise
        finally:
            for side in (self._front, self._back, self._asked, self._asking):
                if side is not None:
                    side.close()
            if self._own is not None:
                self._own.close()
            statistics = self._proxy.statistics
            statistics.gone(self.shadow)
            event(What.DISCONNECTED, origin=self._proxy.origin, detail=statistics.connections)
            LOG.report(
                log,
                logging.INFO,
                "front-end %d gone; so far: messages=%d requests=%d violations=%d",
                statistics.connections,
                statistics.messages,
                statistics.requests,
                statistics.violations,
            )

    # Being watched.

    def seen(self) -> Seen:
        """What is to be seen of both. From any thread, without waiting."""
        if self.closed:
            return Seen()
        shadow = self.shadow
        session = shadow.session
        negotiated = ProtocolFeature(session.protocol_features & int(~ProtocolFeature(0)))
        return Seen(
            peer={
                "number": self._proxy.statistics.connections,
                "connected_s": time.monotonic() - self._since,
                "features": feature_names(session.features or 0, self._proxy.device_id),
                "feature_bits": session.features or 0,
                "protocol_features": [
                    bit.name for bit in ProtocolFeature if bit & negotiated and bit.name
                ],
                "status": status_names(self._status),
            },
            iotlb=iotlb_status(shadow.translations) if shadow.translating else None,
            memory=[
                {
                    "address": region.guest_addr,
                    "length_bytes": region.size,
                    "user_address": region.user_addr,
                }
                for region in shadow.regions
            ],
            budgets={"iotlb_entries": budget(len(shadow.translations), MAX_TRANSLATIONS)},
        )

    def explain(self, address: int, length: int) -> Explanation:
        """What a range of the driver's addresses leads to. From any thread, without waiting."""
        return self.shadow.explain(address, length)


_NEEDED: Final[dict[BackendRequest, ProtocolFeature]] = {
    _B.CONFIG_CHANGE_MSG: ProtocolFeature.CONFIG,
    _B.VRING_HOST_NOTIFIER_MSG: ProtocolFeature.HOST_NOTIFIER,
    _B.VRING_CALL: ProtocolFeature.INBAND_NOTIFICATIONS,
    _B.VRING_ERR: ProtocolFeature.INBAND_NOTIFICATIONS,
    _B.SHARED_OBJECT_ADD: ProtocolFeature.SHARED_OBJECT,
    _B.SHARED_OBJECT_REMOVE: ProtocolFeature.SHARED_OBJECT,
    _B.SHARED_OBJECT_LOOKUP: ProtocolFeature.SHARED_OBJECT,
    _B.SHMEM_MAP: ProtocolFeature.SHMEM,
    _B.SHMEM_UNMAP: ProtocolFeature.SHMEM,
}


def _encode(header: Header, payload: bytes) -> bytes:
    """A message with the header that it came with, but for the size."""
    return Header(header.request, header.flags, len(payload)).encode() + payload
