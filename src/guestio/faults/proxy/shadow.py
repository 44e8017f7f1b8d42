"""What a proxy knows of a connection, from the front-end's messages: as a back-end would know it.

The messages are judged by the same :class:`~guestio.vhost_user.session.Session` that judges them
for a back-end; this is what it drives.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Final

from guestio._core.iommu.address_space import AddressSpace
from guestio._core.virtio.split import area_bytes
from guestio.addr import ADDRESS_SPACE, Permissions
from guestio.control.explain import explain_iotlb, explain_range
from guestio.control.schema import Explanation, Survey
from guestio.control.survey import survey_memory, survey_of
from guestio.errors import GuestioError, ProtocolError
from guestio.faults.proxy.own_rings import OwnRings
from guestio.faults.proxy.queue import ProxyQueue, RingPlace
from guestio.iommu import Iotlb
from guestio.peer.foreign import close_foreign
from guestio.ratelog import LOG
from guestio.trace import What, event
from guestio.vhost_user.channel import Message
from guestio.vhost_user.memory import SharedMemory
from guestio.vhost_user.messages import (
    VHOST_F_LOG_ALL,
    VHOST_USER_F_PROTOCOL_FEATURES,
    FrontendRequest,
    Inflight,
    IotlbMessage,
    IotlbType,
    Log,
    MemoryRegion,
    ProtocolFeature,
    VringAddr,
    VringState,
)
from guestio.vhost_user.session import MAX_QUEUES, Session
from guestio.vhost_user.translator import MAX_TRANSLATIONS
from guestio.virtio.device import (
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
)

log = logging.getLogger("guestio.proxy")

VIRTIO_F_RING_PACKED: Final = 34
"""Bit number of the feature that makes rings packed (virtio 1.4, section 6)."""

HIDDEN: Final = ProtocolFeature.PAGEFAULT | ProtocolFeature.XEN_MMAP | ProtocolFeature.GPA_ADDRESSES
"""Protocol features that a proxy keeps from the front-end.

Postcopy has memory appear when it is touched: one more process that has it mapped would make pages
appear that are still to come. With the others memory and addresses are not what a session takes
them for.
"""

_WIRE_BITS: Final = 1 << VHOST_USER_F_PROTOCOL_FEATURES | 1 << VHOST_F_LOG_ALL
_ALL: Final = ADDRESS_SPACE - 1
_F = FrontendRequest
_STOPS: Final = (_F.GET_VRING_BASE, _F.GET_VRING_BASE_SKIP_DRAIN)


class Shadow:
    """The state of a connection that passes; a :class:`~guestio.vhost_user.handler.SessionHandler`.

    Args:
        queue: Finds a queue by its index.
        origin: The server's number in records of tracepoints.
        own: Has the rings that the back-end uses, if they are relayed.

    Attributes:
        session: Judges messages.
        translations: Those that the front-end has told.
        queues: The queues that were spoken of.
        features: What the back-end offers, as far as it was asked.
        protocol_features: The same of the protocol.
        max_mem_slots: Memory slots that the back-end said it has.
        updates, invalidations: How many of them passed.
    """

    num_queues = MAX_QUEUES

    def __init__(
        self, queue: Callable[[int], ProxyQueue], origin: int, own: OwnRings | None = None
    ) -> None:
        self.features = _ALL & ~_WIRE_BITS
        self.protocol_features = 0
        self.max_mem_slots = _ALL
        self.session = Session(self)
        self.protocol_features = _ALL
        self.translations = Iotlb(MAX_TRANSLATIONS)
        self.queues: dict[int, ProxyQueue] = {}
        self.updates = self.invalidations = 0
        self._queue = queue
        self._origin = origin
        self._own = own
        self._shared = self._no_memory()
        self._space = AddressSpace(self._shared.table)
        self._stopping: set[int] = set()

    def _no_memory(self) -> SharedMemory:
        """Only a relay writes: to the used rings of the driver."""
        return SharedMemory(writable=self._own is not None)

    # What passes.

    def see(self, message: Message) -> None:
        """Learn of a front-end's message; its descriptors stay the message's.

        Raises:
            ProtocolError: It breaks a rule, or asks for what a back-end of ours refuses; what is
                known is as before.
        """
        if not Session.knows(message.request):
            return
        copied: list[int] = []
        try:
            for fd in message.fds:
                copied.append(os.dup(fd))  # noqa: PERF401 - closed if the next one fails
            copy: Message = Message(message.header, message.payload, copied)
        except BaseException:
            close_foreign(copied)
            raise
        try:
            self.session.handle(copy)
            if (error := self.session.last_refusal) is not None:
                raise ProtocolError(f"{message.header.name}: {error}")
        finally:
            self.session.last_refusal = None
        if message.request in _STOPS:
            self._stopping.add(VringState.decode(message.payload).index)
        elif message.request != _F.IOTLB_MSG:
            self.settle()

    def stopped(self, index: int, base: int | None) -> None:
        """Learn that the back-end has answered a GET_VRING_BASE."""
        self._stopping.discard(index)
        if base is not None and index < len(self.session.vrings):
            self.session.vrings[index].base = base & 0xFFFF
        self.settle()
        self._forget_translations()

    def settle(self) -> None:
        """Have the rings looked at that are in use now, where they are now."""
        for index, queue in self.queues.items():
            if index in self._stopping:
                continue
            place = self._place(index)
            if place is None:
                queue.leave()
            else:
                queue.watch(self._space, place, self._own)

    def _place(self, index: int) -> RingPlace | None:
        """Where a ring in use is; None for one that is not, or cannot be looked at."""
        ring = self.session.vrings[index]
        features = self.session.features or 0
        address = ring.address
        if not ring.started or address is None:
            return None
        if features >> VIRTIO_F_RING_PACKED & 1:
            LOG.report(log, logging.WARNING, "packed rings are passed on, but not looked at")
            return None
        event_idx = bool(features >> VIRTIO_F_EVENT_IDX & 1)
        parts = (address.desc, address.avail, address.used)
        if not self.translating:
            try:
                desc, avail, used = map(
                    self._shared.guest_address, parts, area_bytes(ring.num, event_idx)
                )
            except GuestioError as error:
                LOG.report(log, logging.WARNING, "ring %d is not looked at: %s", index, error)
                return None
            parts = (desc, avail, used)
        return RingPlace(
            ring.num,
            *parts,
            event_idx=event_idx,
            indirect=bool(features >> VIRTIO_F_INDIRECT_DESC & 1),
            base=ring.base,
        )

    @property
    def translating(self) -> bool:
        """Whether the driver's addresses are I/O virtual."""
        return bool((self.session.features or 0) >> VIRTIO_F_ACCESS_PLATFORM & 1)

    @property
    def regions(self) -> list[MemoryRegion]:
        """The memory that the front-end shares."""
        return self._shared.regions

    def explain(self, address: int, length: int) -> Explanation:
        """What a range of the driver's addresses leads to. From any thread, without waiting."""
        if self.translating:
            return explain_iotlb(
                self.translations, address, length, origin=self._origin, pending=False
            )
        mappings = [
            (region.guest_addr, region.size, region.guest_addr, Permissions.READ_WRITE)
            for region in sorted(self._shared.regions, key=lambda region: region.guest_addr)
            if region.guest_addr < address + length and address < region.guest_addr + region.size
        ]
        return explain_range(address, length, mappings, origin=self._origin, translated=False)

    def survey(self, address: int, length: int, parts: int, *, memory: bool) -> Survey:
        """What a range of addresses has, in equal parts. From any thread, without waiting."""
        if self.translating and not memory:
            return survey_of(self.translations._map, address, length, parts, translated=True)
        regions = [(region.guest_addr, region.size, None) for region in self._shared.regions]
        return survey_memory(regions, address, length, parts)

    def close(self) -> None:
        """Let go of everything. Calling it again does nothing."""
        for queue in self.queues.values():
            queue.leave()
            queue.disconnect()
        self._shared = self._no_memory()
        self._space = AddressSpace(self._shared.table)
        self.translations.invalidate_all()

    def _forget_translations(self) -> None:
        """No front-end tells of translations that go while nothing runs."""
        if not any(queue.watched for queue in self.queues.values()):
            self.translations.invalidate_all()

    def _touched(self, index: int) -> ProxyQueue:
        queue = self.queues.get(index)
        if queue is None:
            queue = self.queues[index] = self._queue(index)
        return queue

    # What a session wants of a back-end.

    def set_features(self, features: int) -> None:
        """See :class:`SessionHandler`."""
        # The session takes them over when this returns.
        self.session.features = features
        self._change_memory(self._shared)

    def set_memory_table(self, regions: Sequence[tuple[MemoryRegion, int]]) -> None:
        """See :class:`SessionHandler`."""
        try:
            self._try(lambda: self._shared.replaced(regions))
        finally:
            close_foreign(fd for _, fd in regions)

    def add_memory_region(self, region: MemoryRegion, fd: int) -> None:
        """See :class:`SessionHandler`."""
        try:
            self._try(lambda: self._shared.adding(region, fd))
        finally:
            close_foreign([fd])

    def remove_memory_region(self, region: MemoryRegion) -> None:
        """See :class:`SessionHandler`."""
        self._change_memory(self._shared.removing(region))

    def _try(self, make: Callable[[], SharedMemory]) -> None:
        """Use other memory; where it cannot be mapped, go on without seeing any."""
        try:
            shared = make()
        except GuestioError as error:
            LOG.report(
                log, logging.WARNING, "guest memory is passed on, but not looked at: %s", error
            )
            shared = self._no_memory()
        self._change_memory(shared)

    def _change_memory(self, shared: SharedMemory) -> None:
        before, after = self._shared.regions, shared.regions
        for what, regions in (
            (What.REGION_REMOVED, [region for region in before if region not in after]),
            (What.REGION_ADDED, [region for region in after if region not in before]),
        ):
            for region in regions:
                event(
                    what,
                    origin=self._origin,
                    address=region.guest_addr,
                    length=region.size,
                    detail=region.user_addr,
                )
        self._shared = shared
        self.translations.invalidate_all()
        self._space = AddressSpace(
            shared.table, self.translations._map if self.translating else None
        )

    def set_vring_num(self, index: int, num: int) -> None:
        """See :class:`SessionHandler`."""
        self._touched(index)

    def set_vring_addr(self, index: int, address: VringAddr) -> None:
        """See :class:`SessionHandler`."""
        self._touched(index)

    def set_vring_base(self, index: int, base: int) -> None:
        """See :class:`SessionHandler`."""
        self._touched(index)

    def get_vring_base(self, index: int) -> int:
        """See :class:`SessionHandler`. What the back-end answers comes by :meth:`stopped`."""
        return self.session.vrings[index].base

    def set_vring_kick(self, index: int, fd: int | None) -> None:
        """See :class:`SessionHandler`. The connection passes it on; see `ProxyQueue.kick`."""
        self._touched(index)
        self._forget_translations()
        _close(fd)

    def set_vring_call(self, index: int, fd: int | None) -> None:
        """See :class:`SessionHandler`."""
        self._touched(index)
        _close(fd)

    def set_vring_err(self, index: int, fd: int | None) -> None:
        """See :class:`SessionHandler`."""
        _close(fd)

    def set_vring_enable(self, index: int, enable: bool) -> None:
        """See :class:`SessionHandler`."""
        if enable or index in self.queues:
            self._touched(index).enabled = enable

    def set_backend_channel(self, fd: int) -> None:
        """See :class:`SessionHandler`. The connection passes it on."""
        _close(fd)

    def get_config(self, offset: int, size: int) -> bytes:
        """See :class:`SessionHandler`. The back-end answers."""
        return bytes(size)

    def set_config(self, offset: int, data: bytes, flags: int) -> None:
        """See :class:`SessionHandler`."""

    def get_status(self) -> int:
        """See :class:`SessionHandler`. The back-end answers."""
        return 0

    def set_status(self, status: int) -> None:
        """See :class:`SessionHandler`."""

    def reset_device(self) -> None:
        """See :class:`SessionHandler`."""

    def iotlb(self, message: IotlbMessage) -> None:
        """See :class:`SessionHandler`."""
        iova, size, uaddr, perm, kind = message
        if kind == IotlbType.INVALIDATE:
            self.invalidations += 1
            if size:
                self.translations.invalidate_mapping(iova, size)
            event(What.INVALIDATE, origin=self._origin, address=iova, length=min(size, _ALL))
            return
        self.updates += 1
        at, target = iova, 0
        for number, (guest_addr, length) in enumerate(self._shared.guest_ranges(uaddr, size)):
            if not number:
                target = guest_addr
            if perm:
                self.translations.set_mapping(at, guest_addr, length, Permissions(perm))
            at += length
        event(
            What.UPDATE,
            origin=self._origin,
            address=iova,
            length=size,
            detail=target,
            access=int(perm),
        )
        for queue in self.queues.values():
            queue.translated()

    def get_inflight(self, num_queues: int, queue_size: int) -> tuple[Inflight, int]:
        """See :class:`InflightHandler`. The back-end answers."""
        return Inflight(0, 0, num_queues, queue_size), -1

    def set_inflight(self, inflight: Inflight, fd: int) -> None:
        """See :class:`InflightHandler`."""
        _close(fd)

    def set_log(self, log: Log, fd: int) -> None:
        """See :class:`LogHandler`."""
        _close(fd)

    def set_logging(self, enable: bool) -> None:
        """See :class:`LogHandler`."""

    def save_state(self) -> int:
        """See :class:`StateHandler`. The back-end answers."""
        return -1

    def load_state(self) -> int:
        """See :class:`StateHandler`. The back-end answers."""
        return -1

    def check_state(self) -> None:
        """See :class:`StateHandler`. The back-end answers."""

    def send_rarp(self, address: bytes) -> None:
        """See :class:`AnnounceHandler`."""


def _close(fd: int | None) -> None:
    if fd is not None:
        close_foreign([fd])
