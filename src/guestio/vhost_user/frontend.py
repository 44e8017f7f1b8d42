"""A vhost-user front-end: what a VMM does with a device in another process.

A :class:`Frontend` connects to a back-end, negotiates, shares guest memory, starts and stops rings,
and serves the back-end's questions about I/O translations. It knows nothing of the device.

Translations live in :attr:`Frontend.mappings`, from I/O virtual to guest physical addresses, as in
the IOMMU of a machine. The back-end learns one when it asks (IOTLB miss, answered by an UPDATE with
the address in this process) and forgets it when :meth:`Frontend.unmap` says so.

Who answers misses is chosen once. ``answer="thread"`` has a thread do it whatever the caller is at.
``answer="caller"`` leaves it to :meth:`Frontend.service`; as in QEMU, whose main loop does
everything, no miss is then answered while a request waits for its reply.

Everything may be called from any thread. Every wait is bounded by ``timeout``; after a failure of
the connection every call raises what broke it.

Source: QEMU docs/interop/vhost-user.rst; how QEMU behaves where that leaves a choice:
hw/virtio/vhost-user.c, vhost.c (`vhost_device_iotlb_miss`), vhost-backend.c.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Self, TypeAlias

from guestio.addr import Permissions, check_address
from guestio.errors import GuestioError, InvalidAddressError, ProtocolError
from guestio.iommu import Iotlb
from guestio.memory import GuestRegionCollection, MmapRegion
from guestio.vhost_user.channel import Channel, Message, PeerGoneError
from guestio.vhost_user.connection import Connection, NoAnswerError, Pending, RefusedError
from guestio.vhost_user.messages import (
    MAX_TABLE_REGIONS,
    U64,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VIRTIO_F_ACCESS_PLATFORM,
    BackendRequest,
    Config,
    FrontendRequest,
    IotlbMessage,
    IotlbType,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    SingleMemoryRegion,
    VringAddr,
    VringFd,
    VringState,
    encode_ack,
    encode_iotlb,
    encode_message,
    request_name,
)

if TYPE_CHECKING:
    from guestio.virtio.driver import RingLayout

PROTOCOL_FEATURES: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
"""Protocol features a :class:`Frontend` can use."""

__all__ = [
    "PROTOCOL_FEATURES",
    "Frontend",
    "FrontendQueue",
    "IotlbCounts",
    "MissAction",
    "MissAnswer",
    "MissHook",
    "NoAnswerError",
    "RefusedError",
]

_F = FrontendRequest
_PROTOCOL_BIT: Final = 1 << VHOST_USER_F_PROTOCOL_FEATURES
_PLATFORM_BIT: Final = 1 << VIRTIO_F_ACCESS_PLATFORM
_CONNECT_PAUSE: Final = 0.01
_FAILED: Final = 1


class MissAction(Enum):
    """What to do about an IOTLB miss."""

    ANSWER = "answer"
    """Send the translation, or refuse if there is none that fits."""
    REFUSE = "refuse"
    """Answer non-zero without looking."""
    CLAIM = "claim"
    """Answer 0 without having sent a translation: a lie."""
    IGNORE = "ignore"
    """Never answer."""


class MissAnswer(NamedTuple):
    """How a miss is dealt with: what is done, and after how many seconds."""

    action: MissAction = MissAction.ANSWER
    delay: float = 0.0


MissHook: TypeAlias = Callable[[IotlbMessage], MissAnswer]
"""Decides about each miss; called by whoever serves misses."""


@dataclass(slots=True)
class IotlbCounts:
    """What happened between a front-end and its back-end's IOTLB.

    Attributes:
        misses: Questions received.
        updates: Translations sent.
        invalidations: Invalidations acknowledged.
        access_fails: Forbidden accesses the back-end reported.
        refused: Misses that were answered non-zero.
        ignored: Misses that were not answered, by the hook's wish.
    """

    misses: int = 0
    updates: int = 0
    invalidations: int = 0
    access_fails: int = 0
    refused: int = 0
    ignored: int = 0


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
        connect_wait: Seconds to go on trying while nobody listens on the path yet.
        answer: Who answers IOTLB misses, see the module: a thread, or the caller.
        granularity: Largest answer to a miss in bytes, a power of two; an answer does not cross a
            multiple of it. None for as much as is mapped in one piece. QEMU answers a page.
        pipeline: IOTLB messages that may be under way to the back-end at a time. QEMU sends the
            next one when the last was acknowledged.

    Attributes:
        mappings: What the IOMMU in front of the device translates, I/O virtual to guest physical.
            Change it with :meth:`map` and :meth:`unmap`.
        features: Virtio features negotiated; 0 before.
        protocol_features: Protocol features negotiated.
        counts: Traffic about translations.
        config_changes: How often the back-end announced a change of the configuration space.
        miss_hook: Decides about each miss, for tests; None answers all of them.

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
        if granularity is not None and (granularity < 1 or granularity & (granularity - 1)):
            raise ValueError(f"granularity {granularity} is not a power of two")
        if pipeline < 1:
            raise ValueError(f"pipeline {pipeline} must be at least 1")
        if answer not in {"thread", "caller"}:
            raise ValueError(f"answer {answer!r} is neither 'thread' nor 'caller'")
        self.mappings = Iotlb()
        self.features = 0
        self.protocol_features = 0
        self.counts = IotlbCounts()
        self.config_changes = 0
        self.miss_hook: MissHook | None = None
        self._answer = answer
        self._granule = granularity
        self._pipeline = pipeline
        self._memory: GuestRegionCollection | None = None
        self._protocol_bit = 0
        self._queues: dict[int, FrontendQueue] = {}
        self._mapping = threading.Lock()
        self._serving = threading.Lock()
        self._backend: Channel | None = None
        self._thread: threading.Thread | None = None
        self._stop: int | None = None
        self._stopping = threading.Event()
        self._connection = Connection(_connect(target, connect_wait), timeout)

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
        expected = self._connection.send(request, data, fds, has_reply or acknowledged)
        if has_reply:
            return self._connection.wait(expected[0]).payload
        if acknowledged and (status := self._connection.wait_ack(expected[0])):
            raise RefusedError(f"the back-end refused {request_name(request)} with {status:#x}")
        return b""

    def _ask(self, request: int) -> int:
        return U64.decode(self.request(request, has_reply=True)).value

    def sync(self) -> None:
        """Return once the back-end has worked off everything sent before."""
        self._ask(_F.GET_FEATURES)

    @property
    def failure(self) -> GuestioError | None:
        """What broke the connection, or None while it lives."""
        return self._connection.failure

    def close(self) -> None:
        """End the connection: threads, sockets and eventfds are gone when this returns."""
        self._stopping.set()
        self._connection.shut_down()
        self._stop_serving()
        self._connection.close()
        if self._backend is not None:
            self._backend.close()
            self._backend = None
        for queue in self._queues.values():
            queue.close()
        self._queues.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What the back-end offers

    def negotiate(self, wanted: int, protocol: int = PROTOCOL_FEATURES) -> int:
        """Agree on features and become the owner.

        Args:
            wanted: Virtio features the driver can use, without VHOST_USER_F_PROTOCOL_FEATURES.
            protocol: Protocol features to use where offered, out of `PROTOCOL_FEATURES`.

        Returns:
            The virtio features that both sides have; also in :attr:`features`.

        Raises:
            ProtocolError: An IOMMU is wanted and offered, but not what it needs on the wire.
        """
        if extra := protocol & ~PROTOCOL_FEATURES:
            raise ValueError(f"protocol features {extra:#x} cannot be used by this front-end")
        offered = self._ask(_F.GET_FEATURES)
        self._protocol_bit = offered & _PROTOCOL_BIT
        if self._protocol_bit:
            usable = self._ask(_F.GET_PROTOCOL_FEATURES) & protocol
            self.request(_F.SET_PROTOCOL_FEATURES, U64(usable))
            self.protocol_features = usable
        self.request(_F.SET_OWNER)
        features = offered & wanted & ~_PROTOCOL_BIT
        needed = ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK
        if features & _PLATFORM_BIT and self.protocol_features & needed != needed:
            raise ProtocolError("an IOMMU needs protocol features BACKEND_REQ and REPLY_ACK")
        if self.protocol_features & ProtocolFeature.BACKEND_REQ:
            self._open_backend_channel()
        self.set_features(features)
        return features

    def set_features(self, features: int) -> None:
        """Tell the back-end which virtio features are in use, as after a reset of the guest."""
        self.request(_F.SET_FEATURES, U64(features | self._protocol_bit))
        self.features = features

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
        self._stop_serving()
        if self._backend is not None:
            self._backend.close()
        timeout = self._connection.timeout
        self._backend = Channel(ours, with_fds=False, send_timeout=timeout)
        if self._answer == "thread":
            self._start_serving(self._backend)

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
        self.request(_F.SET_CONFIG, Config(offset, data, flags))

    def get_status(self) -> int:
        """The virtio device status the back-end has; needs STATUS."""
        return self._ask(_F.GET_STATUS)

    def set_status(self, status: int) -> None:
        """Tell the back-end the virtio device status; needs STATUS."""
        self.request(_F.SET_STATUS, U64(status))

    def reset_device(self) -> None:
        """Reset the device and forget all queues; needs RESET_DEVICE."""
        self.request(_F.RESET_DEVICE)
        for queue in self._queues.values():
            queue.close()
        self._queues.clear()

    # Memory

    def set_memory(self, memory: GuestRegionCollection, *, slots: bool | None = None) -> None:
        """Share guest memory, replacing what was shared before.

        Args:
            memory: Regions with a file behind each. They must stay as long as they are shared.
            slots: Whether to use one message per region; by default where that is negotiated.

        Raises:
            ValueError: A region has no file.
        """
        if slots is None:
            slots = bool(self.protocol_features & ProtocolFeature.CONFIGURE_MEM_SLOTS)
        if slots:
            self._set_slots(memory)
        else:
            described = [_describe(region) for region in memory]
            table = MemoryTable(tuple(entry for entry, _ in described))
            self.request(_F.SET_MEM_TABLE, table, [fd for _, fd in described])
        self._memory = memory

    def _set_slots(self, memory: GuestRegionCollection) -> None:
        wanted = {_describe(region) for region in memory}
        present = {_describe(region) for region in self._memory or ()}
        for entry, _ in sorted(present - wanted, key=_by_address):
            self.request(_F.REM_MEM_REG, SingleMemoryRegion(entry))
        for entry, fd in sorted(wanted - present, key=_by_address):
            self.request(_F.ADD_MEM_REG, SingleMemoryRegion(entry), [fd])

    def user_address(self, gpa: int) -> int:
        """Where guest physical memory is in this process.

        Raises:
            InvalidAddressError: It is not shared memory.
        """
        if self._memory is None:
            raise InvalidAddressError(gpa, 1, None, "no memory was shared with set_memory()")
        return self._memory.host_address(gpa)

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
        addresses = [layout.desc, layout.used, layout.avail]
        if not self.iommu:
            addresses = [self.user_address(gpa) for gpa in addresses]
        queue = FrontendQueue(index, kick=kick, call=call)
        try:
            self.request(_F.SET_VRING_NUM, VringState(index, layout.size))
            self.request(_F.SET_VRING_BASE, VringState(index, base))
            self.request(_F.SET_VRING_ADDR, VringAddr(index, 0, *addresses))
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
        self.request(_F.SET_VRING_ENABLE, VringState(index, int(enable)))

    def stop_queue(self, index: int) -> int:
        """Stop a ring and return the available index it stopped at; its requests are finished."""
        reply = self.request(_F.GET_VRING_BASE, VringState(index, 0), has_reply=True)
        state = VringState.decode(reply)
        if state.index != index:
            raise ProtocolError(f"GET_VRING_BASE of ring {index} answered for {state.index}")
        queue = self._queues.pop(index, None)
        if queue is not None:
            queue.close()
        return state.num

    # Translations

    def map(self, iova: int, gpa: int, length: int, perm: Permissions) -> None:
        """Let the device reach guest memory at an I/O virtual address.

        Nothing is sent: the back-end asks when it needs to know. What the range translated to
        before must have been unmapped.
        """
        with self._mapping:
            self.mappings.set_mapping(iova, gpa, length, perm)

    def unmap(self, *ranges: tuple[int, int]) -> None:
        """Take translations of ``(iova, length)`` ranges away, from the back-end too.

        When this returns, the back-end has acknowledged that it does not use them any more.
        """
        with self._mapping:
            for iova, length in ranges:
                self.mappings.invalidate_mapping(iova, length)
        self.invalidate(*ranges)

    def invalidate(self, *ranges: tuple[int, int]) -> None:
        """Have the back-end forget translations; :attr:`mappings` stays, so it may ask again."""
        for at in range(0, len(ranges), self._pipeline):
            chunk = ranges[at : at + self._pipeline]
            expected = self._post([IotlbMessage.invalidate(*each) for each in chunk])
            statuses = [self._connection.wait_ack(each) for each in expected]
            self.counts.invalidations += len(chunk)
            if any(statuses):
                raise RefusedError(f"the back-end refused to forget one of {chunk}: {statuses}")

    def push(self, iova: int) -> bool:
        """Tell the back-end about a translation before it asks, as QEMU does for used rings.

        Returns:
            Whether there is one for ``iova``.
        """
        with self._mapping:
            update = self._update_for(check_address(iova, "iova"), Permissions.NONE)
            expected = self._post([] if update is None else [update])
        for each in expected:
            if self._connection.wait_ack(each):
                raise RefusedError(f"the back-end refused a translation of {iova:#x}")
        return update is not None

    def _post(self, messages: Sequence[IotlbMessage]) -> list[Pending]:
        if not messages:
            return []
        # IOTLB_MSG has a reply of its own, whatever was negotiated; QEMU asks for it all the same.
        data = b"".join(encode_iotlb(_F.IOTLB_MSG, each, need_reply=True) for each in messages)
        return self._connection.send(_F.IOTLB_MSG, data, (), len(messages))

    # Questions of the back-end

    def fileno(self) -> int:
        """The back-end's channel, readable when :meth:`service` has something to do.

        Raises:
            ValueError: There is none.
        """
        if self._backend is None:
            raise ValueError("the back-end has no channel for requests (BACKEND_REQ)")
        return self._backend.fileno()

    def service(self) -> int:
        """Answer what the back-end has asked, without waiting for more.

        Returns:
            How many requests there were.
        """
        with self._serving:
            if self._backend is None:
                return 0
            return self._serve(self._backend)

    def _serve(self, channel: Channel) -> int:
        count = 0
        while batch := self._take_requests(channel):
            count += len(batch)
            self._answer_requests(channel, batch)
        return count

    def _take_requests(self, channel: Channel) -> list[Message]:
        batch: list[Message] = []
        while len(batch) < self._pipeline:
            message = channel.recv()
            if message is None:
                break
            if message.header.is_reply:
                raise ProtocolError("a reply came on the back-end's channel")
            batch.append(message)
        return batch

    def _answer_requests(self, channel: Channel, batch: Sequence[Message]) -> None:
        """Answer requests in their order, a miss once its UPDATE is acknowledged."""
        plans = [self._plan(message) for message in batch]
        # Looking up and sending are one step: an UPDATE must not come after the INVALIDATE that
        # follows a change of the table.
        with self._mapping:
            updates = [
                self._update_for(plan.iova, plan.perm) if isinstance(plan, IotlbMessage) else None
                for plan in plans
            ]
            expected = self._post([update for update in updates if update is not None])
        acknowledged = iter([self._connection.wait_ack(each) for each in expected])
        replies = b""
        for message, plan, update in zip(batch, plans, updates, strict=True):
            status = plan
            if isinstance(plan, IotlbMessage):
                status = _FAILED if update is None else next(acknowledged)
                self.counts.updates += update is not None
                self.counts.refused += status != 0
            if status is not None and message.header.need_reply:
                replies += encode_ack(message.request, int(status != 0))
        if replies:
            channel.send(replies)

    def _plan(self, message: Message) -> IotlbMessage | int | None:
        """What to do about a request: look a miss up, answer with a status, or stay silent."""
        if message.request == BackendRequest.CONFIG_CHANGE_MSG:
            self.config_changes += 1
            return 0
        if message.request != BackendRequest.IOTLB_MSG:
            return _FAILED
        iotlb = IotlbMessage.decode(message.payload)
        if iotlb.type != IotlbType.MISS:
            # QEMU does not act on an ACCESS_FAIL and answers that it failed.
            self.counts.access_fails += iotlb.type == IotlbType.ACCESS_FAIL
            return _FAILED
        self.counts.misses += 1
        action, delay = MissAnswer() if self.miss_hook is None else self.miss_hook(iotlb)
        if delay:
            self._stopping.wait(delay)
        if action is MissAction.ANSWER:
            return iotlb
        if action is MissAction.IGNORE:
            self.counts.ignored += 1
            return None
        self.counts.refused += action is MissAction.REFUSE
        return _FAILED if action is MissAction.REFUSE else 0

    def _update_for(self, iova: int, access: int) -> IotlbMessage | None:
        """The UPDATE that answers a miss, or None without a mapping that allows the access."""
        entries = self.mappings.overlapping(iova, 1)
        if not entries or self._memory is None:
            return None
        start, size, target, perm = entries[0]
        region = self._memory.find_region(target + iova - start)
        if region is None or access & ~perm:
            return None
        # As much as lies in one mapping, one granule and one region around the address.
        first, end = start, start + size
        if self._granule is not None:
            granule = iova & -self._granule
            first, end = max(first, granule), min(end, granule + self._granule)
        first = max(first, start + region.start - target)
        end = min(end, start + region.start + region.size - target)
        user = region.host_address(target + first - start - region.start)
        return IotlbMessage.update(first, end - first, user, int(perm))

    def _start_serving(self, channel: Channel) -> None:
        self._stop = _eventfd()
        self._thread = threading.Thread(
            target=self._serve_until_stopped,
            args=(channel, self._stop),
            name="guestio-iotlb",
            daemon=True,
        )
        self._thread.start()

    def _serve_until_stopped(self, channel: Channel, stop: int) -> None:
        poller = select.poll()
        poller.register(channel.fileno(), select.POLLIN)
        poller.register(stop, select.POLLIN)
        try:
            while stop not in {fd for fd, _ in poller.poll()}:
                with self._serving:
                    self._serve(channel)
        except PeerGoneError:
            return
        except GuestioError as error:
            self._connection.fail(error)

    def _stop_serving(self) -> None:
        if self._thread is not None and self._stop is not None:
            os.eventfd_write(self._stop, 1)
            self._thread.join()
            os.close(self._stop)
            self._thread = self._stop = None


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
