"""A back-end that judges its front-end: what it sends, when, and what its driver does with rings.

It goes on after a broken rule where it can: what was wrong is noted, the message has no effect, and
an acknowledgement that was asked for says failure. A ring that is broken is not served any more.

Source: QEMU docs/interop/vhost-user.rst; virtio 1.4 chapters 2, 3 and 6.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeAlias

from guestio.addr import ADDRESS_SPACE, Permissions
from guestio.errors import (
    BackingError,
    GuestioError,
    InvalidAddressError,
    ProtocolError,
    RegionError,
)
from guestio.faults.frontend.demands import Book
from guestio.faults.frontend.devices import JudgedDevice
from guestio.faults.frontend.reach import PAGE, Miss, MissingError, Reach
from guestio.faults.frontend.ring import BrokenRingError, JudgedRing
from guestio.peer.foreign import Eventfd, check_channel, check_memory, close_foreign
from guestio.vhost_user.channel import Channel, Message, PeerGoneError
from guestio.vhost_user.dirty_log import SharedLog
from guestio.vhost_user.memory import SharedMemory
from guestio.vhost_user.messages import (
    HEADER_SIZE,
    LOG_PAGE,
    MAX_PAYLOAD_SIZE,
    MAX_TABLE_REGIONS,
    U64,
    VERSION,
    VERSION_MASK,
    VHOST_F_LOG_ALL,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VHOST_VRING_F_LOG,
    VIRTIO_F_ACCESS_PLATFORM,
    BackendRequest,
    Config,
    Empty,
    FrontendRequest,
    Header,
    Inflight,
    IotlbMessage,
    IotlbType,
    Log,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    SingleMemoryRegion,
    StateTransfer,
    VringAddr,
    VringState,
    encode_ack,
    encode_iotlb,
    encode_message,
    request_name,
)
from guestio.virtio.device import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_VERSION_1,
    Status,
)
from guestio.virtio.layout import ALIGNMENTS, MAX_QUEUE_SIZE, RingLayout

_F = FrontendRequest
_P = ProtocolFeature

OFFERED_PROTOCOL: Final = (
    _P.MQ
    | _P.LOG_SHMFD
    | _P.REPLY_ACK
    | _P.BACKEND_REQ
    | _P.CONFIG
    | _P.RESET_DEVICE
    | _P.CONFIGURE_MEM_SLOTS
    | _P.STATUS
)
"""Protocol features that a judge offers."""
SLOTS: Final = 64
"""Memory regions that it takes."""

_PROTOCOL_BIT: Final = 1 << VHOST_USER_F_PROTOCOL_FEATURES
_LOG_BIT: Final = 1 << VHOST_F_LOG_ALL
_PLATFORM_BIT: Final = 1 << VIRTIO_F_ACCESS_PLATFORM
_VERSION_1: Final = 1 << VIRTIO_F_VERSION_1
_NO_FD: Final = 1 << 8
_AT_A_TIME: Final = 256
"""Messages that are handled before rings are served and the time is looked at."""
_INDEX: Final = 0xFF
_DRIVER_STATUS: Final = 0xFF & ~Status.NEEDS_RESET & ~0x30
"""Bits that exist and that a driver sets: 16 and 32 do not exist."""

_NEEDED: Final[dict[int, ProtocolFeature]] = {
    _F.GET_QUEUE_NUM: _P.MQ,
    _F.SET_LOG_BASE: _P.LOG_SHMFD,
    _F.SET_BACKEND_REQ_FD: _P.BACKEND_REQ,
    _F.GET_CONFIG: _P.CONFIG,
    _F.SET_CONFIG: _P.CONFIG,
    _F.RESET_DEVICE: _P.RESET_DEVICE,
    _F.GET_MAX_MEM_SLOTS: _P.CONFIGURE_MEM_SLOTS,
    _F.ADD_MEM_REG: _P.CONFIGURE_MEM_SLOTS,
    _F.REM_MEM_REG: _P.CONFIGURE_MEM_SLOTS,
    _F.SET_STATUS: _P.STATUS,
    _F.GET_STATUS: _P.STATUS,
}
_ALWAYS: Final = frozenset(
    {
        _F.GET_FEATURES,
        _F.SET_FEATURES,
        _F.SET_OWNER,
        _F.RESET_OWNER,
        _F.SET_MEM_TABLE,
        _F.SET_LOG_FD,
        _F.SET_VRING_NUM,
        _F.SET_VRING_ADDR,
        _F.SET_VRING_BASE,
        _F.GET_VRING_BASE,
        _F.SET_VRING_KICK,
        _F.SET_VRING_CALL,
        _F.SET_VRING_ERR,
        _F.GET_PROTOCOL_FEATURES,
        _F.SET_PROTOCOL_FEATURES,
        _F.SET_VRING_ENABLE,
        _F.IOTLB_MSG,
    }
)
"""Requests that need no protocol feature here; SET_VRING_ENABLE and IOTLB_MSG are judged apart."""

_PAYLOADS: Final[dict[int, type[Payload]]] = {
    _F.GET_FEATURES: Empty,
    _F.SET_FEATURES: U64,
    _F.SET_OWNER: Empty,
    _F.RESET_OWNER: Empty,
    _F.SET_MEM_TABLE: MemoryTable,
    _F.SET_LOG_BASE: Log,
    _F.SET_LOG_FD: Empty,
    _F.SET_VRING_NUM: VringState,
    _F.SET_VRING_ADDR: VringAddr,
    _F.SET_VRING_BASE: VringState,
    _F.GET_VRING_BASE: VringState,
    _F.SET_VRING_KICK: U64,
    _F.SET_VRING_CALL: U64,
    _F.SET_VRING_ERR: U64,
    _F.GET_PROTOCOL_FEATURES: Empty,
    _F.SET_PROTOCOL_FEATURES: U64,
    _F.GET_QUEUE_NUM: Empty,
    _F.SET_VRING_ENABLE: VringState,
    _F.SEND_RARP: U64,
    _F.NET_SET_MTU: U64,
    _F.SET_BACKEND_REQ_FD: Empty,
    _F.IOTLB_MSG: IotlbMessage,
    _F.SET_VRING_ENDIAN: VringState,
    _F.GET_CONFIG: Config,
    _F.SET_CONFIG: Config,
    _F.GET_INFLIGHT_FD: Inflight,
    _F.SET_INFLIGHT_FD: Inflight,
    _F.RESET_DEVICE: Empty,
    _F.VRING_KICK: VringState,
    _F.GET_MAX_MEM_SLOTS: Empty,
    _F.ADD_MEM_REG: SingleMemoryRegion,
    _F.REM_MEM_REG: SingleMemoryRegion,
    _F.SET_STATUS: U64,
    _F.GET_STATUS: Empty,
    _F.SET_DEVICE_STATE_FD: StateTransfer,
    _F.CHECK_DEVICE_STATE: Empty,
}
_DESCRIPTORS: Final[dict[int, tuple[int, ...]]] = {
    _F.SET_LOG_BASE: (1,),
    _F.SET_LOG_FD: (1,),
    _F.SET_VRING_KICK: (0, 1),
    _F.SET_VRING_CALL: (0, 1),
    _F.SET_VRING_ERR: (0, 1),
    _F.SET_BACKEND_REQ_FD: (1,),
    _F.ADD_MEM_REG: (1,),
    _F.REM_MEM_REG: (0, 1),
}
"""How many descriptors come; none with requests that are not listed, a table's own count aside."""


class EndedError(Exception):
    """The judge cannot go on with this front-end; the message is why."""


class _JudgedChannel(Channel):
    """Messages as they are, whatever their version."""

    def _decode_header(self, data: bytes) -> Header:
        request, flags, size = (
            int.from_bytes(data[at : at + 4], "little") for at in range(0, HEADER_SIZE, 4)
        )
        if size > MAX_PAYLOAD_SIZE:
            raise ProtocolError(f"{request_name(request)} announces {size} bytes of payload")
        return Header(request, flags, size)


@dataclass(slots=True)
class _Asked:
    """A miss that was sent, and what became of it."""

    miss: Miss
    since: float
    acknowledged: bool
    invalidated: bool = False


class FrontEndJudge:
    """One connection of a front-end, judged.

    Args:
        connected: Its socket, which belongs to the judge from here on.
        book: Where to note what is seen.
        device: What it is offered.
        iommu: Whether to offer VIRTIO_F_ACCESS_PLATFORM.
        patience: Seconds that an answer and a notification may take.

    Attributes:
        messages: How many came.
        buffers: How many buffers were served.
    """

    def __init__(
        self,
        connected: socket.socket,
        book: Book,
        device: JudgedDevice,
        *,
        iommu: bool,
        patience: float,
    ) -> None:
        self._book, self._device, self._patience = book, device, patience
        self._channel = _JudgedChannel(connected)
        self._back: Channel | None = None
        self._log = SharedLog()
        self._reach = Reach(SharedMemory(log=self._log.marks))
        self._rings = [JudgedRing(i, book, self._reach) for i in range(device.queues)]
        self._offered = device.features | _VERSION_1 | _PROTOCOL_BIT | _LOG_BIT
        self._offered |= 1 << VIRTIO_F_INDIRECT_DESC | 1 << VIRTIO_F_EVENT_IDX
        self._offered |= _PLATFORM_BIT if iommu else 0
        self._features: int | None = None
        self._protocol = 0
        self._asked_features = self._owned = self._may_enable = False
        self._status = 0
        self._asked: dict[Miss, _Asked] = {}
        self._answers: deque[_Asked | None] = deque()
        self._stalled: dict[int, set[Miss]] = {}
        self.messages = self.buffers = 0

    def close(self) -> None:
        """Hang up and give everything back."""
        for ring in self._rings:
            ring.close()
        if self._back is not None:
            self._back.close()
        self._channel.close()
        self._reach.iotlb.invalidate_all()
        self._log.close()

    # The loop's view

    def fds(self) -> list[int]:
        """Descriptors to be waited for."""
        found = [self._channel.fileno()]
        if self._back is not None:
            found.append(self._back.fileno())
        found += [ring.kick.fileno() for ring in self._rings if ring.live and ring.kick is not None]
        return found

    def turn(self) -> None:
        """Handle what has come, serve rings, and look for what should have come.

        Raises:
            PeerGoneError: The front-end has hung up.
            EndedError: It broke the stream of messages.
        """
        self._read_messages()
        self._read_answers()
        for ring in self._rings:
            if ring.live and ring.clear_kick():
                if ring.look():
                    self._book.met("notify.sent")
                ring.late_since = None
                self._serve(ring)
        self._look_for_late()

    def _read_messages(self) -> None:
        try:
            for _ in range(_AT_A_TIME):
                message = self._channel.recv()
                if message is None:
                    return
                with message:
                    self._handle(message)
        except PeerGoneError:
            self._book.met("message.complete")
            raise
        except ProtocolError as error:
            name = "message.complete" if "closed the connection" in str(error) else "message.size"
            if "fds" in str(error):
                name = "message.descriptors"
            self._book.judge(name, False, str(error))
            raise EndedError(str(error)) from None

    def _look_for_late(self) -> None:
        now = time.monotonic()
        for ring in self._rings:
            if not ring.live or ring.index in self._stalled or not ring.look():
                ring.late_since = None
            elif ring.late_since is None:
                ring.late_since = now
            elif now - ring.late_since >= self._patience:
                if ring.kick is not None:
                    self._book.judge(
                        "notify.sent",
                        ring.clear_kick(),
                        f"ring {ring.index}: buffers are available for {self._patience:g} s, and "
                        "there was no notification",
                    )
                ring.late_since = None
                self._serve(ring)
            elif ring.kick is None:
                self._serve(ring)
        for asked in list(self._asked.values()):
            if now - asked.since >= self._patience:
                address, access = asked.miss
                self._book.judge(
                    "iotlb.miss-answered",
                    False,
                    f"a miss of {address:#x} to {access.name} had no answer for "
                    f"{self._patience:g} s",
                )
                self._settle(asked, refused=True, judged=True)

    # Messages

    def _handle(self, message: Message) -> None:
        """Judge a message, act on it, and answer."""
        judge, header = self._book.judge, message.header
        self.messages += 1
        request, name = header.request, request_name(header.request)
        version = header.flags & VERSION_MASK
        judge("message.version", version == VERSION, f"{name} has version {version}")
        judge("message.no-reply-flag", not header.is_reply, f"{name} has the reply flag")
        if not judge("message.known", request in set(_F), f"there is no request {request}"):
            self._acknowledge(message, done=False)
            return
        self._judge_feature(request, name)
        payload = self._decode(message, name)
        self._judge_descriptors(message, payload, name)
        done, reply = False, None
        act = _ACTIONS.get(request)
        if payload is not None and act is not None:
            outcome = act(self, payload, message)
            done = outcome is not False
            reply = outcome if isinstance(outcome, bytes) else None
        if reply is None and request in _REPLYING:
            if act is None:
                raise EndedError(f"{name} is not offered, and waits for a reply")
            reply = _REPLYING[request](message)
        if reply is not None:
            # Whether the reply was asked for does not matter: the request has one.
            self._judge_need_reply(message)
            self._channel.send(reply)
        else:
            self._acknowledge(message, done=done)

    def _judge_need_reply(self, message: Message) -> None:
        if message.header.need_reply:
            self._book.judge(
                "ack.negotiated",
                self._protocol & _P.REPLY_ACK,
                f"{message.header.name} has the need_reply flag without REPLY_ACK",
            )

    def _acknowledge(self, message: Message, *, done: bool) -> None:
        self._judge_need_reply(message)
        if message.header.need_reply and self._protocol & _P.REPLY_ACK:
            self._channel.send(encode_ack(message.request, 0 if done else 1))

    def _judge_feature(self, request: int, name: str) -> None:
        feature = _NEEDED.get(request)
        if feature is not None:
            assert feature.name is not None
            self._book.judge(
                f"protocol.{feature.name}",
                self._protocol & feature,
                f"{name} came without {feature.name}",
            )
        elif request not in _ALWAYS:
            self._book.judge("protocol.other", False, f"{name} is not offered")

    def _decode(self, message: Message, name: str) -> Payload | None:
        kind = _PAYLOADS.get(message.request)
        if kind is None:
            return None
        try:
            payload = kind.decode(message.payload)
        except ProtocolError as error:
            self._book.judge("message.size", False, f"{name}: {error}")
            return None
        self._book.met("message.size")
        return payload

    def _judge_descriptors(self, message: Message, payload: Payload | None, name: str) -> None:
        if isinstance(payload, MemoryTable):
            allowed: tuple[int, ...] = (len(payload.regions),)
        else:
            allowed = _DESCRIPTORS.get(message.request, (0,))
        self._book.judge(
            "message.descriptors",
            message.fd_count in allowed,
            f"{name} comes with {message.fd_count} descriptors, not "
            f"{' or '.join(map(str, allowed))}",
        )

    # Negotiation

    def _get_features(self, _: Empty, __: Message) -> bytes:
        self._asked_features = True
        return encode_ack(_F.GET_FEATURES, self._offered)

    def _set_features(self, payload: U64, _: Message) -> bool:
        judge, value = self._book.judge, payload.value
        judge("features.asked", self._asked_features, "SET_FEATURES came before GET_FEATURES")
        extra = value & ~self._offered
        judge("features.offered", not extra, f"features {extra:#x} were not offered")
        features = value & self._offered & ~_LOG_BIT & ~_PROTOCOL_BIT
        changed = self._features is not None and features != self._features
        if any(ring.started for ring in self._rings):
            judge("features.while-started", not changed, "SET_FEATURES while a ring is started")
        if self._status & Status.FEATURES_OK:
            judge("status.features", not changed, "features change after FEATURES_OK")
        if value & _LOG_BIT:
            judge("log.base-first", self._log.mapped, "logging is switched on without a log")
        self._features = self._device.accepted = features
        self._log.switch(enable=bool(value & _LOG_BIT) and self._log.mapped)
        self._may_enable = bool(value & _PROTOCOL_BIT)
        if not self._may_enable:
            for ring in self._rings:
                ring.enabled = True
        if self._reach.translating != bool(features & _PLATFORM_BIT):
            self._reach.translating = not self._reach.translating
            self._forget_translations()
        return not extra

    def _set_owner(self, _: Empty, __: Message) -> None:
        self._book.judge("owner.once", not self._owned, "SET_OWNER came again")
        self._owned = True

    def _reset_owner(self, _: Empty, __: Message) -> None:
        self._owned = False

    def _get_protocol_features(self, _: Empty, __: Message) -> bytes:
        self._judge_protocol("GET_PROTOCOL_FEATURES")
        return encode_ack(_F.GET_PROTOCOL_FEATURES, OFFERED_PROTOCOL)

    def _judge_protocol(self, name: str) -> None:
        self._book.judge(
            "protocol.offered-bit", self._asked_features, f"{name} came before GET_FEATURES"
        )

    def _set_protocol_features(self, payload: U64, _: Message) -> bool:
        self._judge_protocol("SET_PROTOCOL_FEATURES")
        extra = payload.value & ~OFFERED_PROTOCOL
        self._book.judge("protocol.offered", not extra, f"protocol features {extra:#x}")
        self._protocol = payload.value & OFFERED_PROTOCOL
        if self._features is None:
            self._may_enable = True
        return not extra

    def _get_queue_num(self, _: Empty, __: Message) -> bytes:
        return encode_ack(_F.GET_QUEUE_NUM, len(self._rings))

    # Memory

    def _set_mem_table(self, payload: MemoryTable, message: Message) -> bool:
        regions = payload.regions
        sound = self._book.judge(
            "memory.regions",
            1 <= len(regions) <= MAX_TABLE_REGIONS,
            f"a table of {len(regions)} regions",
        )
        fds = message.fds
        if len(fds) != len(regions):
            return False
        sound &= self._judge_regions(regions)
        for region, fd in zip(regions, fds, strict=True):
            sound &= self._judge_file(region, fd)
        pairs = list(zip(regions, fds, strict=True))
        return sound and self._use_memory(lambda shared: shared.replaced(pairs))

    def _add_mem_reg(self, payload: SingleMemoryRegion, message: Message) -> bool:
        region, present = payload.region, self._reach.shared.regions
        sound = self._book.judge(
            "slots.limit", len(present) < SLOTS, f"region {len(present) + 1} of {SLOTS}"
        )
        sound &= self._judge_regions([*present, region])
        if message.fd_count != 1:
            return False
        (fd,) = message.fds
        sound &= self._judge_file(region, fd)
        return sound and self._use_memory(lambda shared: shared.adding(region, fd))

    def _get_max_mem_slots(self, _: Empty, __: Message) -> bytes:
        return encode_ack(_F.GET_MAX_MEM_SLOTS, SLOTS)

    def _rem_mem_reg(self, payload: SingleMemoryRegion, _: Message) -> bool:
        wanted = payload.region
        identity = (wanted.guest_addr, wanted.size, wanted.user_addr)
        found = next(
            (
                known
                for known in self._reach.shared.regions
                if (known.guest_addr, known.size, known.user_addr) == identity
            ),
            None,
        )
        if not self._book.judge("slots.remove-known", found, f"there is no region {wanted}"):
            return False
        assert found is not None
        inside = range(found.user_addr, found.user_addr + found.size)
        self._book.judge(
            "slots.remove-unused",
            self._reach.translating
            or not any(
                part in inside
                for ring in self._rings
                if ring.started and ring.address is not None
                for part in ring.address.parts
            ),
            f"a started ring lies in {found}",
        )
        return self._use_memory(lambda shared: shared.removing(found))

    def _judge_regions(self, regions: Sequence[MemoryRegion]) -> bool:
        judge = self._book.judge
        sound = True
        for region in regions:
            sound &= judge("memory.not-empty", region.size, f"{region} is empty")
            ends = (region.guest_addr, region.user_addr, region.mmap_offset)
            sound &= judge(
                "memory.addresses",
                all(start + region.size <= ADDRESS_SPACE for start in ends),
                f"{region} passes 2**64",
            )
        for name, starts in (
            ("memory.guest-disjoint", [(r.guest_addr, r.size) for r in regions]),
            ("memory.user-disjoint", [(r.user_addr, r.size) for r in regions]),
        ):
            clash = [
                f"{start:#x}+{size:#x} reaches {following:#x}"
                for (start, size), (following, _) in pairwise(sorted(starts))
                if start + size > following
            ]
            sound &= judge(name, not clash, "; ".join(clash[:2]))
        return sound

    def _judge_file(self, region: MemoryRegion, fd: int) -> bool:
        judge = self._book.judge
        problem = ""
        try:
            check_memory(fd)
        except BackingError as error:
            problem = str(error)
        else:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
                problem = "it is not open for reading and writing"
        if not judge("memory.mappable", not problem, f"{region}: {problem}"):
            return False
        size = os.fstat(fd).st_size
        return judge(
            "memory.in-file",
            region.mmap_offset + region.size <= size,
            f"{region}: its file has {size:#x} bytes",
        )

    def _use_memory(self, change: Callable[[SharedMemory], SharedMemory]) -> bool:
        try:
            self._reach.shared = change(self._reach.shared)
        except (BackingError, RegionError, ValueError) as error:
            self._book.judge("memory.mappable", False, str(error))
            return False
        self._forget_translations()
        for ring in self._rings:
            if ring.started:
                self._place(ring)
        return True

    # Rings

    def _ring(self, index: int) -> JudgedRing | None:
        known = self._book.judge(
            "vring.index",
            index < len(self._rings),
            f"ring {index}, the device has {len(self._rings)}",
        )
        return self._rings[index] if known else None

    def _settled(self, ring: JudgedRing, same: bool, what: str) -> bool:
        """Judge whether something may be set up now."""
        if not ring.started:
            return True
        return self._book.judge(
            "vring.while-started", same, f"{what} of ring {ring.index}, which is started"
        )

    def _set_vring_num(self, payload: VringState, _: Message) -> bool:
        num, ring = payload.num, self._ring(payload.index)
        sound = self._book.judge(
            "vring.size",
            0 < num <= MAX_QUEUE_SIZE and not num & (num - 1),
            f"ring {payload.index} of {num} entries",
        )
        if ring is None or not sound or not self._settled(ring, num == ring.num, "size"):
            return False
        ring.num = num
        return True

    def _set_vring_base(self, payload: VringState, _: Message) -> bool:
        num, ring = payload.num, self._ring(payload.index)
        sound = self._book.judge(
            "vring.base", num <= 0xFFFF, f"ring {payload.index} begins at {num:#x}"
        )
        if ring is None or not sound or not self._settled(ring, num == ring.base, "base"):
            return False
        if ring.stopped_at is not None:
            self._book.judge(
                "vring.base-continues",
                num in (ring.stopped_at, 0),
                f"ring {ring.index} begins at {num}, it stopped at {ring.stopped_at}",
            )
        ring.base = num
        return True

    def _set_vring_addr(self, payload: VringAddr, _: Message) -> bool:
        judge, ring = self._book.judge, self._ring(payload.index)
        known = 1 << VHOST_VRING_F_LOG if self._protocol & _P.LOG_SHMFD else 0
        judge(
            "vring.flags",
            not payload.flags & ~known,
            f"ring {payload.index} has flags {payload.flags:#x}",
        )
        sound = True
        for name, start, alignment in zip(
            ("desc", "avail", "used"),
            (payload.desc, payload.avail, payload.used),
            ALIGNMENTS,
            strict=True,
        ):
            sound &= judge(
                f"vring.aligned-{name}",
                not start % alignment,
                f"ring {payload.index}: {name} at {start:#x}",
            )
        if ring is None or not sound:
            return False
        same = ring.address is not None and ring.address.parts == payload.parts
        if not self._settled(ring, same, "addresses"):
            return False
        ring.address = payload
        return True

    def _get_vring_base(self, payload: VringState, _: Message) -> bytes:
        ring = self._ring(payload.index)
        base = 0
        if ring is not None:
            base = ring.stop()
            self._stalled.pop(ring.index, None)
            if not any(each.started for each in self._rings):
                self._forget_translations()
        return encode_message(_F.GET_VRING_BASE, VringState(payload.index, base), reply=True)

    def _fd_of(self, payload: U64, message: Message, what: str) -> tuple[JudgedRing | None, int]:
        """The ring and the descriptor of a message; -1 if none was to come or came."""
        value = payload.value
        name = message.header.name
        self._book.judge("fd.bits", value <= _INDEX | _NO_FD, f"{name}: {what} of {value:#x}")
        none = bool(value & _NO_FD)
        self._book.judge(
            "fd.flag",
            none == (message.fd_count == 0),
            f"{name}: {message.fd_count} descriptors, the flag for none is {int(none)}",
        )
        ring = self._ring(value & _INDEX)
        return ring, -1 if none or not message.fd_count else message.take_fd()

    def _set_vring_kick(self, payload: U64, message: Message) -> bool:
        ring, fd = self._fd_of(payload, message, "kick")
        kick = None
        if fd >= 0:
            try:
                kick = Eventfd(fd, "kick descriptor")
            except ProtocolError as error:
                self._book.judge("fd.kick", False, str(error))
                return False
            self._book.met("fd.kick")
        if ring is None:
            if kick is not None:
                kick.close()
            return False
        ring.set_kick(kick)
        return ring.started or self._start(ring)

    def _set_vring_call(self, payload: U64, message: Message) -> bool:
        ring, fd = self._fd_of(payload, message, "call")
        call = None
        if fd >= 0:
            try:
                call = Eventfd.to_notify(fd, "call descriptor")
            except ProtocolError as error:
                self._book.judge("fd.call", False, str(error))
                return False
            self._book.met("fd.call")
        if ring is None:
            if call is not None:
                call.close()
            return False
        ring.set_call(call)
        return True

    def _set_vring_err(self, payload: U64, message: Message) -> bool:
        ring, fd = self._fd_of(payload, message, "err")
        err = None
        if fd >= 0:
            try:
                err = Eventfd(fd, "error descriptor")
            except ProtocolError as error:
                self._book.judge("fd.err", False, str(error))
                return False
            self._book.met("fd.err")
        if ring is None:
            if err is not None:
                err.close()
            return False
        ring.set_err(err)
        return True

    def _set_vring_enable(self, payload: VringState, _: Message) -> bool:
        judge = self._book.judge
        sound = judge(
            "vring.enable-negotiated",
            self._may_enable,
            "SET_VRING_ENABLE without protocol features",
        )
        sound &= judge(
            "vring.enable-value",
            payload.num in (0, 1),
            f"ring {payload.index} is enabled with {payload.num}",
        )
        ring = self._ring(payload.index)
        if ring is None or not sound:
            return False
        ring.enabled = payload.num == 1
        if ring.live:
            self._serve(ring)
        return True

    def _start(self, ring: JudgedRing) -> bool:
        """Start a ring: judge what must be there by now."""
        judge, where = self._book.judge, f"ring {ring.index} is started"
        judge("owner.before-rings", self._owned, f"{where} before SET_OWNER")
        features = self._features
        judge("features.before-rings", features is not None, f"{where} before SET_FEATURES")
        if features is not None:
            judge(
                "features.version-1",
                features & _VERSION_1,
                f"{where} with features {features:#x}",
            )
        sound = judge("memory.before-rings", self._reach.shared.regions, f"{where} without memory")
        sound &= judge(
            "vring.complete",
            ring.num and ring.address is not None,
            f"{where} {'without addresses' if ring.num else 'without a size'}",
        )
        if not sound or not self._place(ring):
            return False
        accepted = features or 0
        ring.start(
            event_idx=bool(accepted >> VIRTIO_F_EVENT_IDX & 1),
            indirect=bool(accepted >> VIRTIO_F_INDIRECT_DESC & 1),
        )
        if ring.live:
            # What is there before the first notification is taken as well.
            self._serve(ring)
        return True

    def _place(self, ring: JudgedRing) -> bool:
        """Find a ring's parts in memory."""
        address = ring.address
        assert address is not None
        starts = (address.desc, address.avail, address.used)
        lengths = (
            RingLayout.desc_bytes(ring.num),
            RingLayout.avail_bytes(ring.num) - 2,
            RingLayout.used_bytes(ring.num) - 2,
        )
        parts = sorted(zip(starts, lengths, strict=True))
        clash = any(start + size > following for (start, size), (following, _) in pairwise(parts))
        sound = self._book.judge("vring.disjoint", not clash, f"ring {ring.index}: {address}")
        if not self._reach.translating:
            try:
                desc, avail, used = (
                    self._reach.shared.guest_address(start, length)
                    for start, length in zip(starts, lengths, strict=True)
                )
                starts = desc, avail, used
            except InvalidAddressError as error:
                ring.broken = True
                return self._book.judge("vring.in-memory", False, f"ring {ring.index}: {error}")
            self._book.met("vring.in-memory")
        ring.place(*starts)
        return sound

    def _serve(self, ring: JudgedRing) -> None:
        """Serve a ring until it needs translations, or nothing is left."""
        memory = self._reach.shared.memory

        def serve(taken: object) -> int | None:
            self.buffers += 1
            return self._device.serve(ring.index, taken, memory, self._book)  # type: ignore[arg-type] # a Taken

        try:
            ring.serve(serve)
        except MissingError as error:
            self._ask(ring, error.misses)
        except BrokenRingError:
            ring.broken = True
            ring.report_error()
        else:
            self._stalled.pop(ring.index, None)
            self._reach.denied.clear()

    # Translation

    def _ask(self, ring: JudgedRing, misses: Sequence[Miss]) -> None:
        self._stalled[ring.index] = set(misses)
        assert self._back is not None  # else nothing is missing, but out of reach
        acknowledged = bool(self._protocol & _P.REPLY_ACK)
        now = time.monotonic()
        for miss in misses:
            if miss in self._asked:
                continue
            address, access = miss
            asked = self._asked[miss] = _Asked(miss, now, acknowledged)
            if acknowledged:
                self._answers.append(asked)
            size = PAGE - address % PAGE
            question = IotlbMessage.miss(address, size, int(access))
            try:
                self._back.send(
                    encode_iotlb(BackendRequest.IOTLB_MSG, question, need_reply=acknowledged)
                )
            except GuestioError as error:
                self._drop_back(str(error))
                return

    def _drop_back(self, _reason: str) -> None:
        if self._back is not None:
            self._back.close()
            self._back = None
            self._reach.can_ask = False
        self._answers.clear()
        for asked in list(self._asked.values()):
            self._settle(asked, refused=True)

    def _settle(self, asked: _Asked, *, refused: bool, judged: bool = False) -> None:
        """A miss was answered, or is given up; ``judged`` if that was judged already."""
        self._asked.pop(asked.miss, None)
        if refused:
            self._reach.denied[asked.miss] = judged
        self._retry()

    def _retry(self) -> None:
        """Serve rings for which nothing is asked any more."""
        for index, misses in list(self._stalled.items()):
            if not any(miss in self._asked for miss in misses):
                del self._stalled[index]
                ring = self._rings[index]
                if ring.live:
                    self._serve(ring)

    def _read_answers(self) -> None:
        """Take what the front-end answers on the back-end's channel."""
        judge = self._book.judge
        while self._back is not None:
            try:
                message = self._back.recv()
            except PeerGoneError:
                self._drop_back("the front-end closed it")
                return
            except ProtocolError as error:
                judge("channel.reply", False, str(error))
                self._drop_back(str(error))
                return
            if message is None:
                return
            with message:
                header = message.header
                sound = judge(
                    "channel.reply",
                    header.is_reply
                    and header.request == BackendRequest.IOTLB_MSG
                    and len(message.payload) == 8,
                    f"request {header.request}, flags {header.flags:#x}, "
                    f"{len(message.payload)} bytes",
                )
                if not judge("channel.asked", self._answers, "an answer that nothing asked for"):
                    continue
                asked = self._answers.popleft()
                if asked is None or not sound:
                    continue
                self._answered(asked, U64.decode(message.payload).value)

    def _answered(self, asked: _Asked, value: int) -> None:
        if self._asked.get(asked.miss) is not asked:
            # Its translation has come already, or it was given up.
            self._book.met("iotlb.miss-covered", not value)
            return
        self._book.met("iotlb.miss-answered")
        if value:
            self._settle(asked, refused=True)
            return
        # The translation was sent before the answer, on the other socket.
        self._read_messages()
        if self._asked.get(asked.miss) is not asked:
            self._book.met("iotlb.miss-covered")
            return
        address, access = asked.miss
        covered = self._reach.covers(asked.miss)
        if not asked.invalidated:
            self._book.judge(
                "iotlb.miss-covered",
                covered,
                f"the miss of {address:#x} to {access.name} was acknowledged, and it is not "
                "translated",
            )
        self._settle(asked, refused=not covered and not asked.invalidated, judged=True)

    def _forget_translations(self) -> None:
        self._reach.iotlb.invalidate_all()

    def _set_backend_req_fd(self, _: Empty, message: Message) -> bool:
        if not message.fd_count:
            return False
        fd = message.take_fd()
        try:
            check_channel(fd)
            back = Channel.from_fd(fd)
        except ProtocolError as error:
            with contextlib.suppress(OSError):
                os.fstat(fd)
                close_foreign([fd])
            return self._book.judge("fd.channel", False, str(error))
        self._book.met("fd.channel")
        self._drop_back("replaced")
        self._back = back
        self._reach.can_ask = True
        return True

    def _iotlb_msg(self, payload: IotlbMessage, _: Message) -> bytes:
        return encode_ack(_F.IOTLB_MSG, 0 if self._translate(payload) else 1)

    def _translate(self, payload: IotlbMessage) -> bool:
        judge = self._book.judge
        iova, size, uaddr, perm, kind = payload
        if not judge(
            "iotlb.type",
            kind in (IotlbType.UPDATE, IotlbType.INVALIDATE),
            f"an IOTLB message of type {kind}",
        ):
            return False
        if kind == IotlbType.INVALIDATE and (iova, size) == (0, 0):
            size = ADDRESS_SPACE
        if not judge(
            "iotlb.range",
            size and iova + size <= ADDRESS_SPACE,
            f"{iova:#x}+{size:#x} is empty or passes 2**64",
        ):
            return False
        if kind == IotlbType.INVALIDATE:
            self._reach.iotlb.invalidate_mapping(iova, size)
            for address, _access in self._asked:
                if iova <= address < iova + size:
                    self._asked[address, _access].invalidated = True
            return True
        sound = judge(
            "iotlb.negotiated",
            self._reach.translating,
            "a translation without VIRTIO_F_ACCESS_PLATFORM",
        )
        sound &= judge(
            "iotlb.permission", perm in (1, 2, 3), f"{iova:#x} has permissions {perm:#x}"
        )
        if not sound:
            return False
        try:
            ranges = self._reach.shared.guest_ranges(uaddr, size)
        except InvalidAddressError as error:
            return judge("iotlb.in-memory", False, f"{iova:#x}+{size:#x}: {error}")
        self._book.met("iotlb.in-memory")
        at = iova
        for gpa, length in ranges:
            self._reach.iotlb.set_mapping(at, gpa, length, Permissions(perm))
            at += length
        for asked in list(self._asked.values()):
            if iova <= asked.miss[0] < iova + size and self._reach.covers(asked.miss):
                self._book.met("iotlb.miss-answered")
                self._settle(asked, refused=False)
        return True

    # Configuration, status, reset, log

    def _get_config(self, payload: Config, _: Message) -> bytes:
        self._judge_config(payload)
        data = self._device.config()[payload.offset :][: payload.size].ljust(payload.size, b"\0")
        answer = Config(payload.offset, data, payload.flags)
        return encode_message(_F.GET_CONFIG, answer, reply=True)

    def _judge_config(self, payload: Config) -> None:
        self._book.judge("config.flags", payload.flags in (0, 1), f"flags {payload.flags:#x}")

    def _set_config(self, payload: Config, _: Message) -> bool:
        self._judge_config(payload)
        self._device.judge_config_write(self._book, payload.offset, payload.payload)
        return True

    def _get_status(self, _: Empty, __: Message) -> bytes:
        return encode_ack(_F.GET_STATUS, self._status)

    def _set_status(self, payload: U64, _: Message) -> None:
        judge, value, before = self._book.judge, payload.value, self._status
        judge("status.bits", not value & ~_DRIVER_STATUS, f"device status {value:#x}")
        judge(
            "status.kept",
            not value or value & before == before,
            f"device status {value:#x} after {before:#x}",
        )
        if value & Status.DRIVER_OK:
            judge("status.order", value & Status.FEATURES_OK, f"device status {value:#x}")
        self._status = value & 0xFF
        if not value:
            self._reset()

    def _reset_device(self, _: Empty, __: Message) -> None:
        self._reset()
        self._status = 0

    def _reset(self) -> None:
        for ring in self._rings:
            ring.forget()
        self._stalled.clear()
        self._forget_translations()

    def _set_log_base(self, payload: Log, message: Message) -> bytes:
        if message.fd_count == 1:
            fd = message.take_fd()
            try:
                check_memory(fd)
                size = os.fstat(fd).st_size
                fits = payload.size and payload.offset + payload.size <= size
                problem = "" if fits else f"{payload} in a file of {size:#x} bytes"
                if not problem:
                    self._log.replace(payload, fd)
            except (GuestioError, ValueError) as error:
                problem = str(error)
            finally:
                close_foreign([fd])
            self._book.judge("log.mappable", not problem, problem)
            end = self._reach.shared.end
            covered = 8 * payload.size * LOG_PAGE
            self._book.judge(
                "log.covers", covered >= end, f"the log ends at {covered:#x}, memory at {end:#x}"
            )
        return encode_ack(_F.SET_LOG_BASE, 0)

    def _set_log_fd(self, _: Empty, __: Message) -> None:
        """Close it."""


_Outcome: TypeAlias = bytes | bool | None
_ACTIONS: Final[dict[int, Callable[..., _Outcome]]] = {
    FrontendRequest[name.removeprefix("_").upper()]: act
    for name, act in vars(FrontEndJudge).items()
    if name.removeprefix("_").upper() in _F.__members__
}
"""What is done with a request: the methods named after them."""


def _number(value: int) -> Callable[[Message], bytes]:
    return lambda message: encode_ack(message.request, value)


def _no_base(message: Message) -> bytes:
    index = int.from_bytes(message.payload[:4].ljust(4, b"\0"), "little")
    return encode_message(message.request, VringState(index, 0), reply=True)


_REPLYING: Final[dict[int, Callable[[Message], bytes]]] = {
    _F.GET_FEATURES: _number(0),
    _F.GET_PROTOCOL_FEATURES: _number(0),
    _F.GET_QUEUE_NUM: _number(0),
    _F.GET_STATUS: _number(0),
    _F.SET_LOG_BASE: _number(0),
    _F.IOTLB_MSG: _number(1),
    _F.GET_VRING_BASE: _no_base,
    _F.GET_CONFIG: lambda message: encode_message(message.request, reply=True),
    _F.GET_INFLIGHT_FD: _number(0),
    _F.SET_DEVICE_STATE_FD: _number(1 | 1 << 8),
    _F.CHECK_DEVICE_STATE: _number(1),
    _F.GET_VRING_BASE_SKIP_DRAIN: _no_base,
    _F.POSTCOPY_ADVISE: _number(0),
    _F.POSTCOPY_END: _number(0),
    _F.CREATE_CRYPTO_SESSION: _number(0),
    _F.GET_SHARED_OBJECT: _number(0),
    _F.GET_SHMEM_CONFIG: _number(0),
}
"""What answers a request that has a reply of its own and could not be acted on."""
