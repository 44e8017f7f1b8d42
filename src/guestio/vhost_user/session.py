"""The back-end's side of the vhost-user protocol, without any I/O.

A `Session` is fed received messages, in order, and returns what to send back. It decides what the
protocol lets it decide: which features may be negotiated, whether a message may come now, whether
its numbers make sense, whether and how it is answered. What it means for a device is done by a
`SessionHandler`, which therefore sees valid arguments only.

Three ways a message can be wrong:

* *Malformed* (wrong payload size, wrong number of fds, a reply where a request belongs): the peer
  does not speak the protocol; `ProtocolError`, close the connection.
* *Refused* (feature never offered, no such ring, overlapping region, or the handler raised a
  `GuestioError`): where the front-end requested an acknowledgement it gets a non-zero one and the
  connection lives. Without one it would go on as if it had worked, so: `ProtocolError`. Nothing
  has changed in either case. Requests with a reply of their own cannot be refused, except
  GET_CONFIG (empty reply), IOTLB_MSG, SET_DEVICE_STATE_FD and CHECK_DEVICE_STATE (non-zero reply)
  and GET_INFLIGHT_FD (region of 0 bytes).
* *Unknown or not supported*: its fds are closed. If an acknowledgement was requested it gets a
  non-zero one ("MUST respond ... indicating success or failure"). Otherwise it is ignored and
  counted, because closing is for "exceptional circumstances" only; except for requests known to
  have a reply of their own, which would leave the front-end waiting for ever: `ProtocolError`.

Acknowledgements follow the section "VHOST_USER_PROTOCOL_F_REPLY_ACK": NEED_REPLY counts if
REPLY_ACK had been negotiated when the message came, or is by the message itself (User-mode Linux
waits for that answer), and changes nothing for messages that have their own reply. IOTLB_MSG is
one of those ("reply payload: u64"): it is always answered.

The front-end may repeat itself: QEMU negotiates again with other features each time a boot loader
hands over to a kernel, and stops and starts rings freely. Memory survives all that, also
RESET_DEVICE; QEMU does not send it again.

Not safe for several threads at once; handler methods are called in the thread of `handle()`.

Source: QEMU docs/interop/vhost-user.rst; what QEMU sends: hw/virtio/vhost-user.c, vhost.c.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Final

from guestio.addr import ADDRESS_SPACE
from guestio.errors import GuestioError, ProtocolError
from guestio.ratelog import one_line
from guestio.vhost_user.handler import (
    AnnounceHandler,
    InflightHandler,
    LogHandler,
    SessionHandler,
    StateHandler,
)
from guestio.vhost_user.messages import (
    STATE_NO_FD,
    U64,
    VHOST_F_LOG_ALL,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VHOST_VRING_F_LOG,
    VIRTIO_F_ACCESS_PLATFORM,
    Config,
    Empty,
    FrontendRequest,
    Inflight,
    IotlbMessage,
    IotlbType,
    Log,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    SingleMemoryRegion,
    StateDirection,
    StatePhase,
    StateTransfer,
    VringAddr,
    VringFd,
    VringState,
    encode_ack,
    encode_message,
    request_name,
)
from guestio.virtio.device import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from guestio.vhost_user.channel import Message

SUPPORTED_PROTOCOL_FEATURES: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
"""Protocol features every handler may offer.

One that is an `InflightHandler` as well may offer `INFLIGHT_FEATURES` besides, one that is a
`LogHandler` LOG_SHMFD, a `StateHandler` DEVICE_STATE, an `AnnounceHandler` RARP.
"""

INFLIGHT_FEATURES: Final = (
    ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.GET_VRING_BASE_INFLIGHT
    | ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN
)
"""Protocol features about the region for requests in flight.

With the last two a ring may be stopped with requests in flight, if they are noted in the region,
which then goes with the guest. None has to be: rings are stopped as they are without these
features, so that the region has what no index could tell, and nothing else.
"""

MAX_QUEUES: Final = 256
"""Most rings; SET_VRING_KICK has 8 bits for the index."""

MAX_QUEUE_SIZE: Final = 32768
"""Most entries of a ring (virtio 1.3 section 2.7)."""

_PROTOCOL_FEATURES_BIT: Final = 1 << VHOST_USER_F_PROTOCOL_FEATURES
_ACCESS_PLATFORM_BIT: Final = 1 << VIRTIO_F_ACCESS_PLATFORM
_LOG_ALL_BIT: Final = 1 << VHOST_F_LOG_ALL
_RING_LOG_BIT: Final = 1 << VHOST_VRING_F_LOG
# The bits that say how this connection works, not what the driver may use.
_WIRE_BITS: Final = _PROTOCOL_FEATURES_BIT | _LOG_ALL_BIT
# QEMU's simple devices settle the rings' features with the driver whatever the back-end offers
# (hw/virtio/vhost-user-rng.c, `vu_rng_get_features`), so these are understood in any case.
_GRANTED_BITS: Final = 1 << VIRTIO_F_INDIRECT_DESC | 1 << VIRTIO_F_EVENT_IDX
_REPLY_ACK: Final = int(ProtocolFeature.REPLY_ACK)
_REFUSED: Final = 1

_F = FrontendRequest
_UNSUPPORTED_WITH_REPLY: Final = frozenset(
    {
        _F.CREATE_CRYPTO_SESSION,
        _F.POSTCOPY_ADVISE,
        _F.POSTCOPY_END,
        _F.GET_SHARED_OBJECT,
        _F.GET_SHMEM_CONFIG,
    }
)


@dataclass(slots=True)
class Vring:
    """What a session knows of a ring.

    Attributes:
        num: Entries; 0 before SET_VRING_NUM.
        address: None before SET_VRING_ADDR.
        base: Next available index as last set or stopped at.
        kicked: Whether a kick fd, or polling, was set since the ring was stopped.
        enabled: Whether the ring is enabled.
    """

    num: int = 0
    address: VringAddr | None = None
    base: int = 0
    kicked: bool = False
    enabled: bool = False

    @property
    def started(self) -> bool:
        """Whether a kick can make the device process the ring."""
        return self.kicked and self.num > 0 and self.address is not None


@dataclass(frozen=True, slots=True)
class _Rule:
    """How one request is served.

    `payload` decodes it; `act` does it and returns the message's own reply, if it has one
    (`replies`); `fds` are the numbers of fds allowed; `feature` must have been negotiated.
    """

    payload: type[Payload]
    act: Callable[[Session, Any, Message], bytes | None]
    fds: tuple[int, ...] | Callable[[Any], tuple[int, ...]] = (0,)
    feature: int = 0
    replies: bool = False


def _ring_fds(payload: VringFd) -> tuple[int, ...]:
    return (1,) if payload.has_fd else (0,)


def _table_fds(payload: MemoryTable) -> tuple[int, ...]:
    return (len(payload.regions),)


_IOTLB_DONE: Final = encode_ack(_F.IOTLB_MSG, 0)
_IOTLB_REFUSED: Final = encode_ack(_F.IOTLB_MSG, _REFUSED)


class Session:
    """One front-end's connection, from its first message to its last.

    Attributes:
        features: Virtio features negotiated last, None before the first SET_FEATURES.
        logging: Whether pages that are written are to be marked in the dirty log (VHOST_F_LOG_ALL).
        protocol_features: `ProtocolFeature` bits negotiated last.
        regions: Guest memory as told by the front-end, ascending by guest address.
        vrings: Every ring's state.
        ignored: Unknown messages that were ignored.
        last_refusal: Why a message was last refused with an acknowledgement; for a log.
        reply_fds: What to send with the reply that :meth:`handle` returned last; the fds stay the
            handler's.

    Args:
        handler: Does the work.

    Raises:
        ValueError: The handler offers what cannot be offered.
    """

    def __init__(self, handler: SessionHandler) -> None:
        _check_handler(handler)
        self._handler = handler
        self.features: int | None = None
        self.logging = False
        self.protocol_features = 0
        self.regions: tuple[MemoryRegion, ...] = ()
        self.vrings = tuple(Vring() for _ in range(handler.num_queues))
        self.ignored = 0
        self.last_refusal: GuestioError | None = None
        self.reply_fds: tuple[int, ...] = ()
        self._may_enable = False

    @classmethod
    def knows(cls, request: int) -> bool:
        """Whether there is a rule for a request: whether :meth:`handle` can do what it says."""
        return request in cls._RULES

    @classmethod
    def has_reply(cls, request: int) -> bool:
        """Whether a request is answered by a reply of its own, rather than by an acknowledgement.

        That of IOTLB_MSG other back-ends send only where NEED_REPLY asks for it.
        """
        rule = cls._RULES.get(request)
        return request in _UNSUPPORTED_WITH_REPLY if rule is None else rule.replies

    @property
    def access_platform(self) -> bool:
        """Whether an IOMMU is in front of the device (VIRTIO_F_ACCESS_PLATFORM negotiated)."""
        return bool((self.features or 0) & _ACCESS_PLATFORM_BIT)

    def handle(self, message: Message) -> bytes | None:
        """Act on one message and return the reply to send, if any; with `reply_fds`.

        The message and all its fds are used up.

        Raises:
            ProtocolError: The connection must be closed.
        """
        self.reply_fds = ()
        with message:
            request = message.request
            if message.header.is_reply:
                raise ProtocolError(f"{request_name(request)} came as a reply; we asked nothing")
            acknowledge = self._acknowledges(message)
            rule = self._RULES.get(request)
            if rule is None:
                return self._unsupported(request, acknowledge)
            payload = rule.payload.decode(message.payload)
            allowed = rule.fds if isinstance(rule.fds, tuple) else rule.fds(payload)
            if message.fd_count not in allowed:
                raise ProtocolError(
                    f"{request_name(request)} carries {message.fd_count} fds, not "
                    f"{' or '.join(map(str, allowed))}"
                )
            try:
                self._check_negotiated(request, rule.feature)
                reply = rule.act(self, payload, message)
            except GuestioError as error:
                if acknowledge and not rule.replies:
                    self.last_refusal = error
                    return encode_ack(request, _REFUSED)
                raise ProtocolError(
                    f"{request_name(request)} refused: {one_line(error)}"
                ) from error
            # Looked at again: the message may be the one that negotiates REPLY_ACK.
            if reply is None and (acknowledge or self._acknowledges(message)):
                return encode_ack(request, 0)
            return reply

    def _acknowledges(self, message: Message) -> bool:
        return message.header.need_reply and bool(self.protocol_features & _REPLY_ACK)

    def _unsupported(self, request: int, acknowledge: bool) -> bytes | None:
        if request in _UNSUPPORTED_WITH_REPLY:
            raise ProtocolError(f"{request_name(request)} belongs to a feature we did not offer")
        if acknowledge:
            self.last_refusal = ProtocolError(f"{request_name(request)} is not supported")
            return encode_ack(request, _REFUSED)
        self.ignored += 1
        return None

    def _check_negotiated(self, request: int, feature: int) -> None:
        if feature and not self.protocol_features & feature:
            raise ProtocolError(
                f"{request_name(request)} needs protocol feature "
                f"{ProtocolFeature(feature).name}, which was not negotiated"
            )

    @property
    def _offered(self) -> int:
        """Every bit that SET_FEATURES may have because it was offered."""
        log = self._handler.protocol_features & ProtocolFeature.LOG_SHMFD
        return self._handler.features | _PROTOCOL_FEATURES_BIT | (_LOG_ALL_BIT if log else 0)

    def _get_features(self, _: Empty, __: Message) -> bytes:
        return encode_ack(_F.GET_FEATURES, self._offered)

    def _set_features(self, payload: U64, _: Message) -> None:
        if extra := payload.value & ~(self._offered | _GRANTED_BITS):
            raise ProtocolError(f"features {extra:#x} were never offered")
        features = payload.value & ~_WIRE_BITS
        if features != self.features and any(ring.started for ring in self.vrings):
            raise ProtocolError("features cannot change while a ring is started")
        self._handler.set_features(features)
        self.features = features
        self._set_logging(bool(payload.value & _LOG_ALL_BIT))
        self._may_enable = bool(payload.value & _PROTOCOL_FEATURES_BIT)
        if not self._may_enable:
            # "the back-end must enable all rings immediately" (section "Ring states")
            self._enable_all(enable=True)

    def _set_logging(self, enable: bool) -> None:
        if enable != self.logging:
            assert isinstance(self._handler, LogHandler)  # the bit was offered
            self._handler.set_logging(enable)
            self.logging = enable

    def _set_log_base(self, payload: Log, message: Message) -> bytes:
        assert isinstance(self._handler, LogHandler)  # _check_handler has seen to it
        if not payload.size or payload.offset + payload.size > ADDRESS_SPACE:
            raise ProtocolError(
                f"a dirty log of {payload.size:#x} bytes at offset {payload.offset:#x} is empty or "
                "passes 2**64"
            )
        self._handler.set_log(payload, message.take_fd())
        # QEMU takes any reply for a success; a log that is refused ends the connection.
        return encode_ack(_F.SET_LOG_BASE, 0)

    def _set_log_fd(self, _: Empty, __: Message) -> None:
        """Close the eventfd: a front-end that has it signaled for each mark finds out sooner."""

    def _get_protocol_features(self, _: Empty, __: Message) -> bytes:
        return encode_ack(_F.GET_PROTOCOL_FEATURES, self._handler.protocol_features)

    def _set_protocol_features(self, payload: U64, _: Message) -> None:
        if extra := payload.value & ~self._handler.protocol_features:
            raise ProtocolError(f"protocol features {extra:#x} were never offered")
        self.protocol_features = payload.value
        # QEMU's network front-end enables rings before its first SET_FEATURES.
        if self.features is None:
            self._may_enable = True

    def _set_owner(self, _: Empty, __: Message) -> None:
        """Nothing to do: the connection is the session."""

    def _reset_owner(self, _: Empty, __: Message) -> None:
        # "either ignore this message, or use it to disable all rings"
        self._enable_all(enable=False)

    def _set_mem_table(self, payload: MemoryTable, message: Message) -> None:
        self._check_regions(payload.regions)
        self._handler.set_memory_table(list(zip(payload.regions, message.take_fds(), strict=True)))
        self.regions = _sorted(payload.regions)

    def _get_max_mem_slots(self, _: Empty, __: Message) -> bytes:
        return encode_ack(_F.GET_MAX_MEM_SLOTS, self._handler.max_mem_slots)

    def _add_mem_reg(self, payload: SingleMemoryRegion, message: Message) -> None:
        regions = (*self.regions, payload.region)
        self._check_regions(regions)
        self._handler.add_memory_region(payload.region, message.take_fd())
        self.regions = _sorted(regions)

    def _rem_mem_reg(self, payload: SingleMemoryRegion, _: Message) -> None:
        # "identified by its guest address, user address and size. The mmap offset is ignored."
        wanted = _identity(payload.region)
        region = next((known for known in self.regions if _identity(known) == wanted), None)
        if region is None:
            raise ProtocolError(f"there is no memory region {_show(payload.region)} to remove")
        self._handler.remove_memory_region(region)
        self.regions = tuple(known for known in self.regions if known is not region)

    def _check_regions(self, regions: Sequence[MemoryRegion]) -> None:
        slots = self._handler.max_mem_slots
        if len(regions) > slots:
            raise ProtocolError(f"{len(regions)} memory regions, there are {slots} slots")
        for region in regions:
            if not region.size or any(
                start + region.size > ADDRESS_SPACE
                for start in (region.guest_addr, region.user_addr, region.mmap_offset)
            ):
                raise ProtocolError(f"memory region {_show(region)} is empty or passes 2**64")
        _check_disjoint("guest", sorted((r.guest_addr, r.size) for r in regions))
        _check_disjoint("user", sorted((r.user_addr, r.size) for r in regions))

    def _vring(self, index: int) -> Vring:
        if index >= len(self.vrings):
            raise ProtocolError(f"there is no ring {index}, the device has {len(self.vrings)}")
        return self.vrings[index]

    def _get_queue_num(self, _: Empty, __: Message) -> bytes:
        return encode_ack(_F.GET_QUEUE_NUM, self._handler.num_queues)

    def _set_vring_num(self, payload: VringState, _: Message) -> None:
        ring, num = self._vring(payload.index), payload.num
        if not 0 < num <= MAX_QUEUE_SIZE or num & (num - 1):
            raise ProtocolError(
                f"ring {payload.index} of {num} entries: must be a power of two up to "
                f"{MAX_QUEUE_SIZE}"
            )
        if ring.started and num != ring.num:
            raise ProtocolError(f"ring {payload.index} is started: its size cannot change")
        if ring.address is not None:
            _check_address(ring.address, num)
        # Set before the handler is called, which may make the ring at once.
        before, ring.num = ring.num, num
        try:
            self._handler.set_vring_num(payload.index, num)
        except BaseException:
            ring.num = before
            raise

    def _set_vring_addr(self, payload: VringAddr, _: Message) -> None:
        ring = self._vring(payload.index)
        logs = self.protocol_features & ProtocolFeature.LOG_SHMFD
        if extra := payload.flags & ~(_RING_LOG_BIT if logs else 0):
            raise ProtocolError(f"ring flags {extra:#x}: that was not negotiated")
        _check_address(payload, ring.num or 1)
        before, ring.address = ring.address, payload
        if before is not None and before.flags != payload.flags and before.parts == payload.parts:
            # Logging is switched, which needs no ring to be stopped: with VHOST_F_LOG_ALL the used
            # ring is marked in any case, where it was found.
            return
        try:
            self._handler.set_vring_addr(payload.index, payload)
        except BaseException:
            ring.address = before
            raise

    def _set_vring_base(self, payload: VringState, _: Message) -> None:
        ring = self._vring(payload.index)
        if payload.num > 0xFFFF:
            raise ProtocolError(f"ring base {payload.num:#x} does not fit 16 bits")
        if ring.started and payload.num != ring.base:
            raise ProtocolError(f"ring {payload.index} is started: its base cannot change")
        self._handler.set_vring_base(payload.index, payload.num)
        ring.base = payload.num

    def _get_vring_base(self, payload: VringState, message: Message) -> bytes:
        ring = self._vring(payload.index)
        base = self._handler.get_vring_base(payload.index)
        ring.base, ring.kicked = base, False
        return encode_message(message.request, VringState(payload.index, base), reply=True)

    def _set_vring_kick(self, payload: VringFd, message: Message) -> None:
        ring = self._vring(payload.index)
        self._handler.set_vring_kick(payload.index, _optional_fd(payload, message))
        ring.kicked = True

    def _set_vring_call(self, payload: VringFd, message: Message) -> None:
        self._vring(payload.index)
        self._handler.set_vring_call(payload.index, _optional_fd(payload, message))

    def _set_vring_err(self, payload: VringFd, message: Message) -> None:
        self._vring(payload.index)
        self._handler.set_vring_err(payload.index, _optional_fd(payload, message))

    def _set_vring_enable(self, payload: VringState, _: Message) -> None:
        ring = self._vring(payload.index)
        if not self._may_enable:
            raise ProtocolError("SET_VRING_ENABLE needs VHOST_USER_F_PROTOCOL_FEATURES negotiated")
        if payload.num > 1:
            raise ProtocolError(f"SET_VRING_ENABLE with {payload.num}, must be 0 or 1")
        self._handler.set_vring_enable(payload.index, payload.num == 1)
        ring.enabled = payload.num == 1

    def _enable_all(self, *, enable: bool) -> None:
        for index, ring in enumerate(self.vrings):
            if ring.enabled != enable:
                self._handler.set_vring_enable(index, enable)
                ring.enabled = enable

    def _set_backend_req_fd(self, _: Empty, message: Message) -> None:
        self._handler.set_backend_channel(message.take_fd())

    def _iotlb_msg(self, payload: IotlbMessage, _: Message) -> bytes:
        try:
            self._handler.iotlb(self._check_iotlb(payload))
        except GuestioError as error:
            self.last_refusal = error
            return _IOTLB_REFUSED
        return _IOTLB_DONE

    def _check_iotlb(self, message: IotlbMessage) -> IotlbMessage:
        iova, size, uaddr, perm, kind = message
        if kind == IotlbType.INVALIDATE:
            # QEMU computes mask + 1 in 64 bits, so the whole space arrives as 0 bytes from 0.
            if iova == 0 and size == 0:
                return message._replace(size=ADDRESS_SPACE)
        elif kind != IotlbType.UPDATE:
            raise ProtocolError(f"a front-end does not send IOTLB messages of type {kind}")
        elif not self.access_platform:
            raise ProtocolError("IOTLB update without VIRTIO_F_ACCESS_PLATFORM negotiated")
        elif perm > 3 or uaddr + size > ADDRESS_SPACE:
            raise ProtocolError(f"IOTLB update to {uaddr:#x}+{size:#x} with permissions {perm:#x}")
        if not size or iova + size > ADDRESS_SPACE:
            raise ProtocolError(f"IOTLB range {iova:#x}+{size:#x} is empty or passes 2**64")
        return message

    def _get_config(self, payload: Config, _: Message) -> bytes:
        try:
            self._check_negotiated(_F.GET_CONFIG, ProtocolFeature.CONFIG)
            data = self._handler.get_config(payload.offset, payload.size)
        except GuestioError as error:
            # "uses zero length of payload to indicate an error"
            self.last_refusal = error
            return encode_message(_F.GET_CONFIG, reply=True)
        if len(data) != payload.size:
            raise ValueError(f"get_config returned {len(data)} bytes for {payload.size}")
        answer = Config(payload.offset, data, payload.flags)
        return encode_message(_F.GET_CONFIG, answer, reply=True)

    def _set_config(self, payload: Config, _: Message) -> None:
        self._handler.set_config(payload.offset, payload.payload, payload.flags)

    def _get_inflight(self, payload: Inflight, _: Message) -> bytes:
        try:
            handler = self._inflight_handler(payload)
            region, fd = handler.get_inflight(payload.num_queues, payload.queue_size)
        except GuestioError as error:
            # libvhost-user says so, and QEMU then goes on without (`vhost_user_get_inflight_fd`).
            self.last_refusal = error
            region = replace(payload, mmap_size=0, mmap_offset=0)
        else:
            self.reply_fds = (fd,)
        return encode_message(_F.GET_INFLIGHT_FD, region, reply=True)

    def _set_inflight(self, payload: Inflight, message: Message) -> None:
        self._inflight_handler(payload).set_inflight(payload, message.take_fd())

    def _inflight_handler(self, payload: Inflight) -> InflightHandler:
        queues, size = payload.num_queues, payload.queue_size
        if any(ring.started for ring in self.vrings):
            raise ProtocolError("a ring is started: what tracks its requests cannot change")
        if not 1 <= queues <= len(self.vrings) or not 1 <= size <= MAX_QUEUE_SIZE:
            raise ProtocolError(
                f"tracking of {queues} rings of {size} entries, the device has {len(self.vrings)}"
            )
        assert isinstance(self._handler, InflightHandler)  # _check_handler has seen to it
        return self._handler

    def _set_device_state(self, payload: StateTransfer, _: Message) -> bytes:
        """Answer with a file of the handler's own; the one that came is closed.

        "The back-end may create a different transfer channel [...] the front-end must then discard
        its channel and use the one provided". A pipe of the front-end's could be waited for.
        """
        try:
            self._check_negotiated(_F.SET_DEVICE_STATE_FD, ProtocolFeature.DEVICE_STATE)
            handler = self._handler
            assert isinstance(handler, StateHandler)  # _check_handler has seen to it
            if any(ring.started for ring in self.vrings):
                raise ProtocolError("a ring is started: the device's state is not at rest")
            if payload.phase != StatePhase.STOPPED:
                raise ProtocolError(f"a device's state is to go in phase {payload.phase}")
            if payload.direction == StateDirection.SAVE:
                fd = handler.save_state()
            elif payload.direction == StateDirection.LOAD:
                fd = handler.load_state()
            else:
                raise ProtocolError(f"a device's state is to go in direction {payload.direction}")
        except GuestioError as error:
            self.last_refusal = error
            return encode_ack(_F.SET_DEVICE_STATE_FD, _REFUSED | STATE_NO_FD)
        self.reply_fds = (fd,)
        return encode_ack(_F.SET_DEVICE_STATE_FD, 0)

    def _check_device_state(self, _: Empty, __: Message) -> bytes:
        try:
            self._check_negotiated(_F.CHECK_DEVICE_STATE, ProtocolFeature.DEVICE_STATE)
            assert isinstance(self._handler, StateHandler)  # _check_handler has seen to it
            if any(ring.started for ring in self.vrings):
                raise ProtocolError("a ring is started: the device's state cannot be replaced")
            self._handler.check_state()
        except GuestioError as error:
            self.last_refusal = error
            return encode_ack(_F.CHECK_DEVICE_STATE, _REFUSED)
        return encode_ack(_F.CHECK_DEVICE_STATE, 0)

    def _send_rarp(self, payload: U64, _: Message) -> None:
        assert isinstance(self._handler, AnnounceHandler)  # _check_handler has seen to it
        # "The first 6 bytes of the payload contain the mac address of the guest"
        self._handler.send_rarp(payload.encode()[:6])

    def _get_status(self, _: Empty, __: Message) -> bytes:
        return encode_ack(_F.GET_STATUS, self._handler.get_status())

    def _set_status(self, payload: U64, _: Message) -> None:
        if payload.value > 0xFF:
            raise ProtocolError(f"device status {payload.value:#x} does not fit 8 bits")
        self._handler.set_status(payload.value)
        if payload.value == 0:
            self._forget_rings()

    def _reset_device(self, _: Empty, __: Message) -> None:
        self._handler.reset_device()
        self._forget_rings()

    def _forget_rings(self) -> None:
        self.vrings = tuple(Vring() for _ in self.vrings)

    _RULES: ClassVar[dict[int, _Rule]] = {
        _F.GET_FEATURES: _Rule(Empty, _get_features, replies=True),
        _F.SET_FEATURES: _Rule(U64, _set_features),
        _F.SET_OWNER: _Rule(Empty, _set_owner),
        _F.RESET_OWNER: _Rule(Empty, _reset_owner),
        _F.SET_MEM_TABLE: _Rule(MemoryTable, _set_mem_table, fds=_table_fds),
        _F.SET_VRING_NUM: _Rule(VringState, _set_vring_num),
        _F.SET_VRING_ADDR: _Rule(VringAddr, _set_vring_addr),
        _F.SET_VRING_BASE: _Rule(VringState, _set_vring_base),
        _F.GET_VRING_BASE: _Rule(VringState, _get_vring_base, replies=True),
        _F.GET_VRING_BASE_SKIP_DRAIN: _Rule(
            VringState,
            _get_vring_base,
            feature=ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN,
            replies=True,
        ),
        _F.SET_VRING_KICK: _Rule(VringFd, _set_vring_kick, fds=_ring_fds),
        _F.SET_VRING_CALL: _Rule(VringFd, _set_vring_call, fds=_ring_fds),
        _F.SET_VRING_ERR: _Rule(VringFd, _set_vring_err, fds=_ring_fds),
        _F.SET_LOG_BASE: _Rule(
            Log, _set_log_base, fds=(1,), feature=ProtocolFeature.LOG_SHMFD, replies=True
        ),
        _F.SET_LOG_FD: _Rule(Empty, _set_log_fd, fds=(1,)),
        _F.GET_PROTOCOL_FEATURES: _Rule(Empty, _get_protocol_features, replies=True),
        _F.SET_PROTOCOL_FEATURES: _Rule(U64, _set_protocol_features),
        _F.GET_QUEUE_NUM: _Rule(Empty, _get_queue_num, replies=True),
        _F.SET_VRING_ENABLE: _Rule(VringState, _set_vring_enable),
        _F.SET_BACKEND_REQ_FD: _Rule(
            Empty, _set_backend_req_fd, fds=(1,), feature=ProtocolFeature.BACKEND_REQ
        ),
        _F.IOTLB_MSG: _Rule(IotlbMessage, _iotlb_msg, replies=True),
        _F.GET_CONFIG: _Rule(Config, _get_config, replies=True),
        _F.SET_CONFIG: _Rule(Config, _set_config, feature=ProtocolFeature.CONFIG),
        _F.GET_INFLIGHT_FD: _Rule(
            Inflight, _get_inflight, feature=ProtocolFeature.INFLIGHT_SHMFD, replies=True
        ),
        _F.SET_INFLIGHT_FD: _Rule(
            Inflight, _set_inflight, fds=(1,), feature=ProtocolFeature.INFLIGHT_SHMFD
        ),
        _F.RESET_DEVICE: _Rule(Empty, _reset_device, feature=ProtocolFeature.RESET_DEVICE),
        _F.GET_MAX_MEM_SLOTS: _Rule(
            Empty, _get_max_mem_slots, feature=ProtocolFeature.CONFIGURE_MEM_SLOTS, replies=True
        ),
        _F.ADD_MEM_REG: _Rule(
            SingleMemoryRegion, _add_mem_reg, fds=(1,), feature=ProtocolFeature.CONFIGURE_MEM_SLOTS
        ),
        # "the back-end MAY accept messages with one file descriptor ... MUST close it"
        _F.REM_MEM_REG: _Rule(
            SingleMemoryRegion,
            _rem_mem_reg,
            fds=(0, 1),
            feature=ProtocolFeature.CONFIGURE_MEM_SLOTS,
        ),
        _F.SET_DEVICE_STATE_FD: _Rule(StateTransfer, _set_device_state, fds=(1,), replies=True),
        _F.CHECK_DEVICE_STATE: _Rule(Empty, _check_device_state, replies=True),
        _F.SEND_RARP: _Rule(U64, _send_rarp, feature=ProtocolFeature.RARP),
        _F.SET_STATUS: _Rule(U64, _set_status, feature=ProtocolFeature.STATUS),
        _F.GET_STATUS: _Rule(Empty, _get_status, feature=ProtocolFeature.STATUS, replies=True),
    }


def _check_handler(handler: SessionHandler) -> None:
    if not 1 <= handler.num_queues <= MAX_QUEUES:
        raise ValueError(f"num_queues {handler.num_queues} is not in 1..{MAX_QUEUES}")
    if handler.max_mem_slots < 1:
        raise ValueError(f"max_mem_slots {handler.max_mem_slots} must be at least 1")
    supported = int(SUPPORTED_PROTOCOL_FEATURES)
    if isinstance(handler, InflightHandler):
        supported |= INFLIGHT_FEATURES
    if isinstance(handler, LogHandler):
        supported |= ProtocolFeature.LOG_SHMFD
    if isinstance(handler, StateHandler):
        supported |= ProtocolFeature.DEVICE_STATE
    if isinstance(handler, AnnounceHandler):
        supported |= ProtocolFeature.RARP
    if extra := handler.protocol_features & ~supported:
        raise ValueError(f"protocol features {extra:#x} are not supported by the session")
    if handler.features & _WIRE_BITS or not 0 <= handler.features < ADDRESS_SPACE:
        raise ValueError(f"features {handler.features:#x} contain bits a device cannot offer")


def _optional_fd(payload: VringFd, message: Message) -> int | None:
    return message.take_fd() if payload.has_fd else None


def _check_address(address: VringAddr, num: int) -> None:
    """Alignment and sizes of a split ring's parts: virtio 1.3 section 2.7."""
    for start, alignment, size in (
        (address.desc, 16, 16 * num),
        (address.avail, 2, 6 + 2 * num),
        (address.used, 4, 6 + 8 * num),
    ):
        if start % alignment or start + size > ADDRESS_SPACE:
            raise ProtocolError(
                f"ring {address.index}: part at {start:#x} is not aligned to {alignment} or its "
                f"{size} bytes pass 2**64"
            )


def _check_disjoint(space: str, ranges: Iterable[tuple[int, int]]) -> None:
    for (start, size), (following, _) in pairwise(ranges):
        if start + size > following:
            raise ProtocolError(
                f"memory regions overlap in {space} addresses: {start:#x}+{size:#x} reaches "
                f"{following:#x}"
            )


def _sorted(regions: Iterable[MemoryRegion]) -> tuple[MemoryRegion, ...]:
    return tuple(sorted(regions, key=lambda region: region.guest_addr))


def _identity(region: MemoryRegion) -> tuple[int, int, int]:
    return region.guest_addr, region.size, region.user_addr


def _show(region: MemoryRegion) -> str:
    return (
        f"guest {region.guest_addr:#x}+{region.size:#x} user {region.user_addr:#x} "
        f"offset {region.mmap_offset:#x}"
    )
