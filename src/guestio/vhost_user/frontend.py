"""A vhost-user front-end: what a VMM does with a device in another process.

A :class:`Frontend` connects to a back-end, negotiates, shares guest memory, starts and stops rings.
Its :attr:`~Frontend.iotlb` is the IOMMU in front of the device. It knows nothing of the device.

Everything may be called from any thread. Every wait is bounded by ``timeout``; after a failure of
the connection every call raises what broke it.

Source: QEMU docs/interop/vhost-user.rst; how QEMU behaves where that leaves a choice:
hw/virtio/vhost-user.c and vhost.c.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, Self, SupportsIndex

from guestio.addr import check_int, check_seconds
from guestio.budgets import FRONTEND_STATE
from guestio.dma import Journal
from guestio.errors import GuestioError, InvalidAddressError, ProtocolError
from guestio.memory import Backing, DirtyLog, GuestRegionCollection, MmapRegion
from guestio.vhost_user.device_state import StatePipe, read_state, write_state
from guestio.vhost_user.iotlb_service import IotlbService
from guestio.vhost_user.messages import (
    LOG_PAGE,
    MAX_PAYLOAD_SIZE,
    MAX_TABLE_REGIONS,
    STATE_NO_FD,
    U64,
    VHOST_F_LOG_ALL,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VHOST_VRING_F_LOG,
    VIRTIO_F_ACCESS_PLATFORM,
    Config,
    FrontendRequest,
    Inflight,
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
    encode_message,
    request_name,
)
from guestio.vhost_user.request_channel import NoAnswerError, RefusedError, RequestChannel

if TYPE_CHECKING:
    from guestio.virtio.layout import RingLayout

PROTOCOL_FEATURES: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.DEVICE_STATE
    | ProtocolFeature.RARP
)
"""Protocol features a :class:`Frontend` uses unless told otherwise.

It can use INFLIGHT_SHMFD too. A back-end with which that was negotiated may insist on being given
a region, so only ask for it to use :meth:`Frontend.get_inflight`.
"""

__all__ = [
    "PROTOCOL_FEATURES",
    "Frontend",
    "FrontendQueue",
    "NoAnswerError",
    "RefusedError",
]

_F = FrontendRequest
_USABLE: Final = PROTOCOL_FEATURES | ProtocolFeature.INFLIGHT_SHMFD
_LOG_BIT: Final = 1 << VHOST_F_LOG_ALL
_PROTOCOL_BIT: Final = 1 << VHOST_USER_F_PROTOCOL_FEATURES
_PLATFORM_BIT: Final = 1 << VIRTIO_F_ACCESS_PLATFORM
_LAST_INDEX: Final = 0xFFFF
_U32_MAX: Final = 0xFFFF_FFFF
_U64_MAX: Final = (1 << 64) - 1
_CONNECT_PAUSE: Final = 0.01


class FrontendQueue:
    """A started ring and its eventfds, which it owns; made by :meth:`Frontend.start_queue`.

    Attributes:
        index: Number of the ring.
        kick_fd: Written to notify the device; None if it polls.
        call_fd: Becomes readable when buffers were used; None if the driver polls.
        err_fd: Becomes readable when the device found the ring broken.
    """

    def __init__(self, index: int, *, kick: bool, call: bool) -> None:
        self.index = index
        self.kick_fd: int | None = None
        self.call_fd: int | None = None
        self.err_fd: int | None = None
        try:
            self.kick_fd = _eventfd() if kick else None
            self.call_fd = _eventfd() if call else None
            self.err_fd = _eventfd()
        except BaseException:
            self.close()
            raise

    def kick(self) -> None:
        """Notify the device of buffers; nothing if it polls."""
        if self.kick_fd is not None:
            os.eventfd_write(self.kick_fd, 1)

    def clear_call(self) -> bool:
        """Take back a notification; whether there was one."""
        return self.call_fd is not None and _take(self.call_fd)

    def failed(self) -> bool:
        """Whether the device reported the ring broken since this was last asked."""
        return self.err_fd is not None and _take(self.err_fd)

    def wait_call(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds for a notification and take it; whether one came."""
        if self.call_fd is None:
            raise ValueError(f"queue {self.index} was started without a call eventfd: poll it")
        poller = select.poll()
        poller.register(self.call_fd, select.POLLIN)
        return bool(poller.poll(timeout * 1000)) and self.clear_call()

    def close(self) -> None:
        """Close the eventfds. May be called again."""
        fds = (self.kick_fd, self.call_fd, self.err_fd)
        self.kick_fd = self.call_fd = self.err_fd = None
        for fd in fds:
            if fd is not None:
                os.close(fd)


class Frontend:
    """The front-end's end of one vhost-user connection.

    Args:
        target: Path of the back-end's socket, or a connected socket, which it owns from here on.
        timeout: Seconds that any one wait for the back-end may take.
        connect_wait: Seconds to go on trying while the path has no listener yet.
        answer: Which thread answers IOTLB misses, see the module: its own, or the caller's.
        granularity: Largest answer to a miss in bytes, a power of two; an answer does not cross a
            multiple of it. None for as much as is mapped in one piece. QEMU answers a page.
        pipeline: IOTLB messages that may be under way to the back-end at a time. QEMU sends the
            next one when the last was acknowledged.

    Attributes:
        iotlb: Translations of the IOMMU in front of the device.
        offered: Virtio features the device offers; 0 before :meth:`negotiate`.
        features: Virtio features negotiated; 0 before.
        protocol_features: Protocol features negotiated.

    Raises:
        OSError: The connection was not possible.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | socket.socket,
        *,
        timeout: float = 10.0,
        connect_wait: float = 0.0,
        answer: Literal["thread", "caller"] = "thread",
        granularity: int | None = 4096,
        pipeline: int = 1,
    ) -> None:
        limit = check_seconds(timeout, "timeout")
        self._exchange = RequestChannel(
            _connect(target, check_seconds(connect_wait, "connect_wait")), limit
        )
        try:
            self.iotlb = IotlbService(
                self._exchange, answer=answer, granularity=granularity, pipeline=pipeline
            )
        except BaseException:
            self._exchange.close()
            raise
        self.offered = 0
        self.features = 0
        self.protocol_features = 0
        self._protocol_bit = 0
        self._offers_log = self._logging = False
        self._log: tuple[DirtyLog, Backing] | None = None
        self._addresses: dict[int, VringAddr] = {}
        self._queues: dict[int, FrontendQueue] = {}

    def __repr__(self) -> str:
        return (
            f"<Frontend: features {self.features:#x} of {self.offered:#x}, "
            f"{len(self._queues)} queues>"
        )

    # The connection

    def request(
        self,
        request: int,
        payload: Payload | bytes = b"",
        fds: Sequence[int] = (),
        *,
        has_reply: bool = False,
    ) -> bytes:
        """Send any request and wait for what answers it.

        Args:
            request: Code of the request, a `FrontendRequest` value or any other.
            payload: A payload value or its bytes.
            fds: File descriptors to send with it; they stay the caller's.
            has_reply: Whether the request has a reply of its own. Otherwise, an acknowledgement is
                asked for if REPLY_ACK was negotiated, and nothing is waited for if not.

        Returns:
            The payload of the reply; empty if there is none.

        Raises:
            RefusedError: The acknowledgement was non-zero; the connection goes on.
            NoAnswerError: No reply came in time; the connection is of no more use.
            ProtocolError, PeerGoneError: The back-end broke the protocol or went away.
        """
        acknowledged = not has_reply and bool(self.protocol_features & ProtocolFeature.REPLY_ACK)
        data = encode_message(request, payload, need_reply=acknowledged)
        expected = self._exchange.send(request, data, fds, has_reply or acknowledged)
        if has_reply:
            return self._exchange.wait(expected[0]).payload
        if acknowledged and (status := self._exchange.wait_ack(expected[0])):
            raise RefusedError(f"the back-end refused {request_name(request)} with {status:#x}")
        return b""

    def _ask(self, request: int) -> int:
        return U64.decode(self.request(request, has_reply=True)).value

    def fileno(self) -> int:
        """The socket, to learn of a hang-up; what arrives on it is read by this object alone."""
        return self._exchange.fileno()

    def sync(self) -> None:
        """Return once the back-end has worked off everything sent before."""
        self._ask(_F.GET_FEATURES)

    @property
    def failure(self) -> GuestioError | None:
        """What broke the connection, or None while it lives."""
        return self._exchange.failure

    def close(self) -> None:
        """End the connection: threads, sockets and eventfds are gone when this returns."""
        self._exchange.shut_down()
        self.iotlb.close()
        self._exchange.close()
        for queue in self._queues.values():
            queue.close()
        self._queues.clear()
        log, self._log = self._log, None
        if log is not None:
            self._drop_log(log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What the back-end offers

    def negotiate(self, wanted: int, protocol: int = PROTOCOL_FEATURES) -> int:
        """Agree on features and become the owner.

        Args:
            wanted: Virtio features the driver can use, without VHOST_USER_F_PROTOCOL_FEATURES.
            protocol: Protocol features to use where offered, out of `PROTOCOL_FEATURES` and
                INFLIGHT_SHMFD.

        Returns:
            The virtio features that both sides have; also in :attr:`features`.

        Raises:
            ProtocolError: An IOMMU is wanted and offered, but not what it needs on the wire.
        """
        wanted = _checked(wanted, "wanted", _U64_MAX)
        protocol = _checked(protocol, "protocol", _U64_MAX)
        if extra := protocol & ~_USABLE:
            raise ValueError(f"protocol features {extra:#x} cannot be used by this front-end")
        offered = self._ask(_F.GET_FEATURES)
        self.offered = offered & ~(_PROTOCOL_BIT | _LOG_BIT)
        self._offers_log = bool(offered & _LOG_BIT)
        self._protocol_bit = offered & _PROTOCOL_BIT
        if self._protocol_bit:
            usable = self._ask(_F.GET_PROTOCOL_FEATURES) & protocol
            self.request(_F.SET_PROTOCOL_FEATURES, U64(usable))
            self.protocol_features = usable
        self.request(_F.SET_OWNER)
        features = self.offered & wanted
        needed = ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK
        if features & _PLATFORM_BIT and self.protocol_features & needed != needed:
            raise ProtocolError("an IOMMU needs protocol features BACKEND_REQ and REPLY_ACK")
        if self.protocol_features & ProtocolFeature.BACKEND_REQ:
            self._open_backend_channel()
        self.set_features(features)
        return features

    def set_features(self, features: int) -> None:
        """Tell the back-end which virtio features are in use, as after a reset of the guest."""
        chosen = _checked(features, "features", _U64_MAX)
        self._tell_features(chosen)
        self.features = chosen

    def _tell_features(self, features: int) -> None:
        log = _LOG_BIT if self._logging else 0
        self.request(_F.SET_FEATURES, U64(features | self._protocol_bit | log))

    @property
    def iommu(self) -> bool:
        """Whether an IOMMU is in front of the device."""
        return bool(self.features & _PLATFORM_BIT)

    def _open_backend_channel(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self.request(_F.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
            except BaseException:
                ours.close()
                raise
        self.iotlb.open(ours)

    def queue_count(self) -> int:
        """How many rings the device has; 1 without MQ."""
        return self._ask(_F.GET_QUEUE_NUM) if self.protocol_features & ProtocolFeature.MQ else 1

    def max_memory_slots(self) -> int:
        """How many memory regions the back-end takes."""
        if self.protocol_features & ProtocolFeature.CONFIGURE_MEM_SLOTS:
            return self._ask(_F.GET_MAX_MEM_SLOTS)
        return MAX_TABLE_REGIONS

    def get_config(self, offset: int, size: int) -> bytes:
        """Read ``size`` bytes of the configuration space.

        Raises:
            RefusedError: The back-end has no such bytes.
        """
        offset = _checked(offset, "offset", _U32_MAX)
        size = _checked(size, "size", MAX_PAYLOAD_SIZE - 12)
        reply = self.request(_F.GET_CONFIG, Config(offset, bytes(size)), has_reply=True)
        if not reply:
            raise RefusedError(f"the back-end refused to read its config at {offset}+{size}")
        config = Config.decode(reply)
        if config.size != size or config.offset != offset:
            raise ProtocolError(
                f"config of {config.offset}+{config.size} came where {offset}+{size} was asked for"
            )
        return config.payload

    def set_config(self, offset: int, data: bytes, flags: int = 0) -> None:
        """Write the configuration space; ``flags`` are `ConfigFlag` bits."""
        offset = _checked(offset, "offset", _U32_MAX)
        self.request(_F.SET_CONFIG, Config(offset, bytes(memoryview(data)), flags))

    @property
    def config_changes(self) -> int:
        """How often the back-end has announced a change of the configuration space."""
        return self.iotlb.config_changes

    def wait_config_change(self, timeout: float, *, seen: int = 0) -> bool:
        """Wait until the back-end has announced a change of the configuration space.

        A back-end of guestio's announces none before a queue was started, then also those of
        before.

        Args:
            timeout: Seconds to wait at most.
            seen: What :attr:`config_changes` was when the configuration was read last.

        Returns:
            Whether there are others than those seen. With ``answer="caller"`` what the back-end
            asks meanwhile is answered.

        Raises:
            ValueError: BACKEND_REQ was not negotiated.
            GuestioError: The connection is broken.
        """
        return self.iotlb.wait_config_change(
            check_int(seen, "seen"), check_seconds(timeout, "timeout")
        )

    def get_status(self) -> int:
        """The virtio device status the back-end has; needs STATUS."""
        return self._ask(_F.GET_STATUS)

    def set_status(self, status: int) -> None:
        """Tell the back-end the virtio device status; needs STATUS."""
        self.request(_F.SET_STATUS, U64(_checked(status, "status", 0xFF)))

    def reset_device(self) -> None:
        """Reset the device and forget all queues; needs RESET_DEVICE."""
        self.request(_F.RESET_DEVICE)
        for queue in self._queues.values():
            queue.close()
        self._queues.clear()
        self._addresses.clear()

    # Requests in flight

    def get_inflight(self, num_queues: int, queue_size: int) -> tuple[Inflight, int]:
        """Have the back-end make a region that tracks requests in flight; needs INFLIGHT_SHMFD.

        The back-end uses it from the next start of a queue on. Keep it, and hand it to the back-end
        that comes next, with :meth:`set_inflight`, before a queue is started there.

        Args:
            num_queues: For how many queues, from the first on.
            queue_size: Entries of the largest of them.

        Returns:
            What the region is, and its file, which is the caller's to close.

        Raises:
            RefusedError: The back-end made none; the connection goes on.
            ProtocolError: The reply makes no sense.
        """
        request = _F.GET_INFLIGHT_FD
        data = encode_message(request, Inflight(0, 0, num_queues, queue_size))
        with self._exchange.ask_for_fds(request, data) as message:
            made = Inflight.decode(message.payload)
            if not made.mmap_size:
                raise RefusedError("the back-end made no region for requests in flight")
            if message.fd_count != 1 or (made.num_queues, made.queue_size) != (
                num_queues,
                queue_size,
            ):
                raise ProtocolError(
                    f"{made} came with {message.fd_count} fds where a region for {num_queues} "
                    f"queues of {queue_size} entries was asked for"
                )
            return made, message.take_fd()

    def set_inflight(self, inflight: Inflight, fd: int) -> None:
        """Give the back-end a region as :meth:`get_inflight` returned it; needs INFLIGHT_SHMFD.

        Args:
            inflight: What it is.
            fd: Its file, which stays the caller's.

        Raises:
            RefusedError: The back-end does not take it.
        """
        self.request(_F.SET_INFLIGHT_FD, inflight, [fd])

    # A device's state

    def save_state(self, most: int = FRONTEND_STATE) -> bytes:
        """Take the device's state, for another back-end to go on with; needs DEVICE_STATE.

        To be called once all queues have stopped. The back-end stays as it is and may be gone on
        with instead.

        Args:
            most: Bytes that it may have.

        Raises:
            RefusedError: The back-end does not tell it.
            ProtocolError: It is longer, or the back-end broke the protocol.
            NoAnswerError: It did not come within ``timeout`` seconds.
        """
        most = check_int(most, "most")
        with contextlib.closing(self._begin_transfer(StateDirection.SAVE)) as pipe:
            state = read_state(pipe.ours, most, time.monotonic() + self._exchange.timeout)
        self._check_state()
        return state

    def load_state(self, state: bytes) -> None:
        """Have the device go on with what :meth:`save_state` returned elsewhere.

        To be called before a queue is started; needs DEVICE_STATE.

        Raises:
            RefusedError: The back-end does not take it: it is another device's, say.
            ProtocolError, NoAnswerError: As for :meth:`save_state`.
        """
        data = bytes(memoryview(state))
        with contextlib.closing(self._begin_transfer(StateDirection.LOAD)) as pipe:
            write_state(pipe.ours, data, time.monotonic() + self._exchange.timeout)
        self._check_state()

    def _begin_transfer(self, direction: StateDirection) -> StatePipe:
        """The channel of a transfer, for the caller to close."""
        self._need(ProtocolFeature.DEVICE_STATE)
        request = _F.SET_DEVICE_STATE_FD
        data = encode_message(request, StateTransfer(direction, StatePhase.STOPPED))
        pipe = StatePipe(loads=direction == StateDirection.LOAD)
        try:
            with self._exchange.ask_for_fds(request, data, [pipe.theirs]) as message:
                value = U64.decode(message.payload).value
                if value & 0xFF:
                    raise RefusedError(f"the back-end refused {request.name} with {value:#x}")
                if message.fd_count != (0 if value & STATE_NO_FD else 1):
                    raise ProtocolError(
                        f"{request.name} was answered with {value:#x} and {message.fd_count} fds"
                    )
                if message.fd_count:
                    pipe.use(message.take_fd())
            pipe.passed()
        except BaseException:
            pipe.close()
            raise
        return pipe

    def _check_state(self) -> None:
        if status := self._ask(_F.CHECK_DEVICE_STATE):
            raise RefusedError(f"the back-end refused the device's state with {status:#x}")

    def _need(self, feature: ProtocolFeature) -> None:
        if not self.protocol_features & feature:
            raise ProtocolError(f"protocol feature {feature.name} was not negotiated")

    def send_rarp(self, address: bytes) -> None:
        """Have the back-end tell its network where a guest's hardware address is; needs RARP.

        As QEMU does when a guest has arrived that does not announce itself.

        Args:
            address: Six bytes.

        Raises:
            RefusedError: The back-end does not do so.
        """
        self._need(ProtocolFeature.RARP)
        data = bytes(memoryview(address))
        if len(data) != 6:
            raise ValueError(f"a hardware address has 6 bytes, not {len(data)}")
        self.request(_F.SEND_RARP, data.ljust(8, b"\0"))

    # The dirty log

    def start_logging(self, size: int | None = None) -> DirtyLog:
        """Have the back-end mark the pages of guest memory that it writes; needs LOG_SHMFD.

        In the order in which QEMU does it when a migration begins; queues go on meanwhile. When it
        is logging already it goes on in a new log, which then has what the old one still had.

        Args:
            size: Bytes of the log; None for as many as the shared memory needs.

        Returns:
            The log: its :meth:`~guestio.memory.DirtyLog.take` tells which pages were written.

        Raises:
            ProtocolError: The back-end does not offer it, or it was not negotiated.
        """
        if not self._offers_log or not self.protocol_features & ProtocolFeature.LOG_SHMFD:
            raise ProtocolError("a dirty log needs protocol feature LOG_SHMFD, and VHOST_F_LOG_ALL")
        if size is None:
            ends = [region.last_addr for region in self.iotlb.memory or ()]
            size = max(ends, default=0) // (8 * LOG_PAGE) + 1
        backing = Backing.memfd(size, "guestio-log", seal=True)
        assert backing.fd is not None  # a memfd has one
        self.request(_F.SET_LOG_BASE, Log(size, 0), [backing.fd], has_reply=True)
        made = DirtyLog()
        made.use(backing._mapping, 0, size)
        before, self._log = self._log, (made, backing)
        made.enabled = True
        if before is not None:
            for page in before[0].take().tolist():
                made.mark(page * LOG_PAGE, 1)
            self._drop_log(before)
        self._switch_logging(enable=True)
        return made

    def stop_logging(self) -> None:
        """Have the back-end mark no pages any more, as QEMU does when a migration is canceled.

        The log keeps what was marked, until another one takes its place.
        """
        if self._logging:
            self._switch_logging(enable=False)

    def _switch_logging(self, *, enable: bool) -> None:
        if enable != self._logging:
            self._logging = enable
            self._tell_features(self.features)
            for address in list(self._addresses.values()):
                self._set_addresses(address)

    def _set_addresses(self, address: VringAddr) -> None:
        """Say where a ring is, and whether writes to it are logged."""
        flags, log = (1 << VHOST_VRING_F_LOG, address.used) if self._logging else (0, 0)
        told = replace(address, flags=flags, log=log)
        self.request(_F.SET_VRING_ADDR, told)
        self._addresses[address.index] = told

    @staticmethod
    def _drop_log(log: tuple[DirtyLog, Backing]) -> None:
        marks, backing = log
        marks.clear()
        backing.close()

    # Memory

    def set_memory(self, memory: GuestRegionCollection, *, slots: bool | None = None) -> None:
        """Share guest memory, replacing what was shared before.

        Args:
            memory: Regions with a file behind each. They must stay as long as they are shared.
            slots: Whether to use one message per region; by default where that is negotiated.

        Raises:
            ValueError: A region has no file.
            RefusedError: The back-end refused; it has what it had before.
        """
        if not isinstance(memory, GuestRegionCollection):
            raise TypeError(f"memory must be a GuestRegionCollection, not {type(memory).__name__}")
        if slots is None:
            slots = bool(self.protocol_features & ProtocolFeature.CONFIGURE_MEM_SLOTS)
        if slots:
            self._set_slots(memory)
        else:
            described = [_describe(region) for region in memory]
            table = MemoryTable(tuple(entry for entry, _ in described))
            self.request(_F.SET_MEM_TABLE, table, [fd for _, fd in described])
        self.iotlb.memory = memory

    def _set_slots(self, memory: GuestRegionCollection) -> None:
        wanted = {_describe(region) for region in memory}
        present = {_describe(region) for region in self.iotlb.memory or ()}
        going = [(False, each) for each in sorted(present - wanted, key=_by_address)]
        coming = [(True, each) for each in sorted(wanted - present, key=_by_address)]
        journal = Journal()
        try:
            # What goes first: its place may be needed.
            for add, described in going + coming:
                self._change_slot(add, described)
                journal.did(partial(self._change_slot, not add, described))
        except RefusedError as error:
            for failure in journal.undo():
                error.add_note(f"while undoing: {failure}")
            raise

    def _change_slot(self, add: bool, described: tuple[MemoryRegion, int]) -> None:
        entry, fd = described
        if add:
            self.request(_F.ADD_MEM_REG, SingleMemoryRegion(entry), [fd])
        else:
            self.request(_F.REM_MEM_REG, SingleMemoryRegion(entry))

    def user_address(self, gpa: int) -> int:
        """Where guest physical memory is in this process.

        Raises:
            InvalidAddressError: It is not shared memory.
        """
        if self.iotlb.memory is None:
            raise InvalidAddressError(gpa, 1, None, "no memory was shared with set_memory()")
        return self.iotlb.memory.host_address(gpa)

    # Queues

    def start_queue(
        self,
        index: int,
        layout: RingLayout,
        *,
        base: int = 0,
        kick: bool = True,
        call: bool = True,
        enable: bool = True,
    ) -> FrontendQueue:
        """Set a ring up and start it.

        Args:
            index: Number of the ring.
            layout: Where it is: I/O virtual addresses with an IOMMU, else guest physical ones.
            base: Available index to begin at, as :meth:`stop_queue` returned it.
            kick: False to have the device poll.
            call: False if the driver polls.
            enable: Whether to enable it as well.

        Raises:
            InvalidAddressError: The ring is not in shared memory.
        """
        index, base = _checked(index, "index", 0xFF), _checked(base, "base", _LAST_INDEX)
        addresses = [layout.desc, layout.used, layout.avail]
        if not self.iommu:
            addresses = [self.user_address(gpa) for gpa in addresses]
        queue = FrontendQueue(index, kick=kick, call=call)
        try:
            self.request(_F.SET_VRING_NUM, VringState(index, layout.size))
            self.request(_F.SET_VRING_BASE, VringState(index, base))
            self._set_addresses(VringAddr(index, 0, *addresses))
            for request, fd in (
                (_F.SET_VRING_ERR, queue.err_fd),
                (_F.SET_VRING_CALL, queue.call_fd),
                (_F.SET_VRING_KICK, queue.kick_fd),
            ):
                fds = [] if fd is None else [fd]
                self.request(request, VringFd(index, has_fd=bool(fds)), fds)
            if enable and self._protocol_bit:
                self.enable_queue(index, enable=True)
        except BaseException:
            queue.close()
            raise
        previous, self._queues[index] = self._queues.get(index), queue
        if previous is not None:
            previous.close()
        return queue

    def enable_queue(self, index: int, *, enable: bool) -> None:
        """Enable or disable a ring."""
        index = _checked(index, "index", 0xFF)
        self.request(_F.SET_VRING_ENABLE, VringState(index, int(enable)))

    def stop_queue(self, index: int) -> int:
        """Stop a ring and return the available index it stopped at; its requests are finished."""
        index = _checked(index, "index", 0xFF)
        reply = self.request(_F.GET_VRING_BASE, VringState(index, 0), has_reply=True)
        state = VringState.decode(reply)
        if state.index != index:
            raise ProtocolError(f"GET_VRING_BASE of ring {index} answered for {state.index}")
        if state.num > _LAST_INDEX:
            raise ProtocolError(f"ring {index} stopped at {state.num:#x}, which is no 16-bit index")
        self._addresses.pop(index, None)
        queue = self._queues.pop(index, None)
        if queue is not None:
            queue.close()
        return state.num


def _checked(value: SupportsIndex, name: str, last: int) -> int:
    number = check_int(value, name)
    if not 0 <= number <= last:
        raise ValueError(f"{name} {number} is not in 0..{last}")
    return number


def _connect(target: str | os.PathLike[str] | socket.socket, wait: float) -> socket.socket:
    if isinstance(target, socket.socket):
        return target
    deadline = time.monotonic() + wait
    while True:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.connect(os.fspath(target))
        except (FileNotFoundError, ConnectionRefusedError):
            made.close()
            if time.monotonic() >= deadline:
                raise
            time.sleep(_CONNECT_PAUSE)
        except BaseException:
            made.close()
            raise
        else:
            return made


def _describe(region: MmapRegion) -> tuple[MemoryRegion, int]:
    """A region as the wire has it, and its fd."""
    place = region.file_offset
    if place is None:
        raise ValueError(f"{region} has no file behind it, so it cannot be shared; use a memfd")
    entry = MemoryRegion(region.start, region.size, region.host_address(), place.start)
    return entry, place.fd


def _by_address(described: tuple[MemoryRegion, int]) -> int:
    return described[0].guest_addr


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def _take(fd: int) -> bool:
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return False
    return True
