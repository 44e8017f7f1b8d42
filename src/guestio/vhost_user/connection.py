"""One front-end from its connection to its disconnection: messages in, a device's host driven.

The front-end is answered in the loop's thread. Its queues are served in the same thread, or each in
one of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from guestio._core.iommu.address_space import AddressSpace
from guestio._core.vhost_user.miss_table import MAX_OUTSTANDING
from guestio._core.virtio.inflight import InflightQueue
from guestio._core.virtio.split import area_bytes
from guestio.addr import Permissions
from guestio.budgets import COPY_GRACE
from guestio.control.explain import explain_range
from guestio.control.schema import Explanation, Survey
from guestio.control.status import Seen, budget, peer_status
from guestio.control.survey import survey_memory, survey_of
from guestio.errors import DeviceError, ProtocolError, QueueError
from guestio.memory import AtomicBitmap
from guestio.peer.connection import PeerConnection
from guestio.peer.foreign import Eventfd, close_foreign
from guestio.ratelog import LOG
from guestio.trace import What, event
from guestio.vhost_user.backend_channel import BackendChannel
from guestio.vhost_user.channel import Channel, Message
from guestio.vhost_user.device_state import StateFile
from guestio.vhost_user.dirty_log import SharedLog
from guestio.vhost_user.inflight import InflightRegion
from guestio.vhost_user.memory import SharedMemory
from guestio.vhost_user.messages import (
    ConfigFlag,
    Header,
    Inflight,
    IotlbMessage,
    Log,
    MemoryRegion,
    ProtocolFeature,
    VringAddr,
)
from guestio.vhost_user.session import (
    INFLIGHT_FEATURES,
    SUPPORTED_PROTOCOL_FEATURES,
    Session,
)
from guestio.vhost_user.translator import MAX_TRANSLATIONS, VhostUserTranslator
from guestio.virtio.device import VIRTIO_F_ACCESS_PLATFORM, Announcing
from guestio.virtio.host import DeviceHost
from guestio.virtio.layout import RingLayout
from guestio.virtio.loop import EventLoop
from guestio.virtio.saved import HEAD_SIZE, size_of

log = logging.getLogger("guestio.vhost_user")

MAX_MEM_SLOTS = 509
"""Memory regions at most, as many as QEMU's default for KVM."""


class Connection(PeerConnection[Header]):
    """A front-end from its connection to its disconnection.

    A :class:`SessionHandler`, an :class:`InflightHandler`, a :class:`LogHandler`, a
    :class:`StateHandler`, an :class:`AnnounceHandler` and a
    :class:`~guestio.virtio.host.Transport`.

    Args:
        channel: The connection; owned from here on.
        host: The device that it is connected to.
        loop: Calls back when there is something to do.
        offered: Features of the transport to offer beside the device's own.
        miss_timeout: Seconds a front-end may take to answer an IOTLB miss.
        track_dirty: Whether to mark the pages that the device writes.
    """

    peer_name = "front-end"
    _channel: Channel

    def __init__(
        self,
        channel: Channel,
        host: DeviceHost,
        loop: EventLoop,
        *,
        offered: int,
        miss_timeout: float,
        track_dirty: bool,
    ) -> None:
        super().__init__(channel, loop, log)
        self._host = host
        self._stats = host.statistics
        self._dirty_log = SharedLog()
        self._shared = SharedMemory(track_dirty=track_dirty, log=self._dirty_log.marks)
        self._inflight: InflightRegion | None = None
        self._state: StateFile | None = None
        self.features = host.device.offered_features | offered
        self.protocol_features = int(
            SUPPORTED_PROTOCOL_FEATURES
            | INFLIGHT_FEATURES
            | ProtocolFeature.LOG_SHMFD
            | ProtocolFeature.DEVICE_STATE
            | (ProtocolFeature.RARP if isinstance(host.device, Announcing) else 0)
        )
        self.num_queues = len(host.queues)
        self.max_mem_slots = MAX_MEM_SLOTS
        self._session = Session(self)
        self._back = BackendChannel(loop, self._stats, self._may_announce_config)
        self._translator = VhostUserTranslator(
            loop, self._back, self._stats, host.wake, self._receive, miss_timeout, host.origin
        )
        host.connect(self, self._translator)
        host.change_memory(AddressSpace(self._shared.table))
        self._start()
        event(What.CONNECTED, origin=host.origin, detail=self._stats.connections)

    def _receive(self) -> None:
        super()._receive()
        if not self.closed:
            self._translator.read_in_core()

    def _may_read(self) -> bool:
        if self.translating and self._translator.receive(self._channel):
            self._wait_for_reader()
            return False
        return True

    def _handle(self, message: Message) -> tuple[bytes | None, Sequence[int]]:
        event(
            What.MESSAGE,
            origin=self._host.origin,
            detail=int(message.header.request),
            length=len(message.payload),
        )
        reply = self._session.handle(message)
        self._report_refusal()
        return reply, self._session.reply_fds

    def _count_protocol_error(self) -> None:
        self._stats.protocol_errors += 1
        event(What.ERROR, origin=self._host.origin)

    def _report_refusal(self) -> None:
        """Log what the front-end was refused, and let go of it: a traceback keeps memory mapped."""
        error, self._session.last_refusal = self._session.last_refusal, None
        if error is not None:
            self._host.log.report("the front-end was refused: %s", error)

    def close(self) -> None:
        """Give everything back. Calling it again does nothing."""
        if self.closed:
            return
        self.closed = True
        announce, *stop_queues, forget, reset_device = self._host.disconnect()
        steps: list[Callable[[], object]] = [
            announce,
            self._hang_up,
            *stop_queues,
            self._translator.close,
            lambda: self._set_inflight(None),
            self._count,
            forget,
            self._let_go_of_memory,
            self._dirty_log.close,
            lambda: self._begin_transfer(None),
            reset_device,
        ]
        try:
            self._release(steps, f"front-end {self._stats.connections}")
        finally:
            event(What.DISCONNECTED, origin=self._host.origin, detail=self._stats.connections)
            self._report_end()

    def _report_end(self) -> None:
        stats = self._stats
        LOG.report(
            log,
            logging.INFO,
            "front-end %d gone; so far: requests=%d failed=%d iotlb_misses=%d "
            "iotlb_invalidations=%d refused=%d",
            stats.connections,
            stats.requests,
            stats.failed_requests,
            stats.iotlb_misses,
            stats.iotlb_invalidations,
            stats.iotlb_refused,
        )

    def _hang_up(self) -> None:
        super()._hang_up()
        self._session.last_refusal = None

    def _let_go_of_memory(self) -> None:
        self._shared = SharedMemory()

    def _count(self) -> None:
        self._stats.iotlb_hits += self._translator.iotlb.hits
        for region in self._shared.memory:
            if region.bitmap is not None:
                self._stats.dirty_pages += region.bitmap.count()

    def _forget_translations(self) -> None:
        if not self._host.live:
            self._translator._forget_all()

    @property
    def translating(self) -> bool:
        """Whether the driver's addresses are I/O virtual."""
        return bool(self._host.features >> VIRTIO_F_ACCESS_PLATFORM & 1)

    def set_features(self, features: int) -> None:
        """See :class:`SessionHandler`."""
        changed = features != self._host.features
        # Also with the bits of before: the device forgot them if it was reset.
        self._host.set_features(features)
        if not changed:
            return
        self._translator.serve(self._channel if self.translating else None)
        self._change_memory(self._shared)

    def set_memory_table(self, regions: Sequence[tuple[MemoryRegion, int]]) -> None:
        """See :class:`SessionHandler`."""
        try:
            shared = self._shared.replaced(regions)
        finally:
            close_foreign(fd for _, fd in regions)
        self._change_memory(shared)

    def add_memory_region(self, region: MemoryRegion, fd: int) -> None:
        """See :class:`SessionHandler`."""
        try:
            shared = self._shared.adding(region, fd)
        finally:
            close_foreign([fd])
        self._change_memory(shared)

    def remove_memory_region(self, region: MemoryRegion) -> None:
        """See :class:`SessionHandler`."""
        self._change_memory(self._shared.removing(region))

    def _change_memory(self, shared: SharedMemory) -> None:
        """Use other memory; rings and translations are looked up again."""
        self._trace_memory(shared)
        with self._host.detached():
            self._shared = shared
            self._translator._change_memory(shared)
            known = self._translator.iotlb._map if self.translating else None
            self._host.change_memory(AddressSpace(shared.table, known))
        self._check_log()

    def _trace_memory(self, shared: SharedMemory) -> None:
        """Write which regions go and which come."""
        before, after = self._shared.regions, shared.regions
        for what, regions in (
            (What.REGION_REMOVED, [region for region in before if region not in after]),
            (What.REGION_ADDED, [region for region in after if region not in before]),
        ):
            for region in regions:
                event(
                    what,
                    origin=self._host.origin,
                    address=region.guest_addr,
                    length=region.size,
                    detail=region.user_addr,
                )

    def set_log(self, log: Log, fd: int) -> None:
        """See :class:`LogHandler`."""
        complete = self._dirty_log.complete
        self._report_log()
        try:
            self._dirty_log.replace(log, fd)
        finally:
            close_foreign([fd])
        if not complete:
            # Some pages were written that the front-end was not told of; which, is not known.
            for region in self._shared.memory:
                self._dirty_log.marks.mark(region.start, region.size)
        self._check_log()

    def set_logging(self, enable: bool) -> None:
        """See :class:`LogHandler`."""
        if enable != self._dirty_log.marks.enabled:
            self._dirty_log.switch(enable=enable)
            state = "on" if enable else "off"
            LOG.report(
                log, logging.INFO, "front-end %d: dirty log %s", self._stats.connections, state
            )
            self._check_log()

    def _check_log(self) -> None:
        """Report a log that is too small; what does not fit is not marked."""
        log, end = self._dirty_log, self._shared.end
        if log.marks.enabled and log.mapped and log.end < end:
            self._host.log.report(
                "the front-end's dirty log ends at guest address %#x, its memory at %#x: pages "
                "behind the log are not marked when they are written",
                log.end,
                end,
            )

    def _report_log(self) -> None:
        """Report a log that is gone."""
        if self._dirty_log.marks.vanished:
            self._host.log.report(
                "the front-end truncated its dirty log: it does not learn of pages that are written"
            )

    def get_inflight(self, num_queues: int, queue_size: int) -> tuple[Inflight, int]:
        """See :class:`InflightHandler`."""
        region = InflightRegion.create(num_queues, queue_size)
        self._set_inflight(region)
        return region.description, region.fd

    def set_inflight(self, inflight: Inflight, fd: int) -> None:
        """See :class:`InflightHandler`."""
        try:
            region = InflightRegion.from_fd(inflight, fd)
        finally:
            close_foreign([fd])
        self._set_inflight(region)

    def _set_inflight(self, region: InflightRegion | None) -> None:
        with self._host.detached():
            old, self._inflight = self._inflight, region
            if old is not None:
                old.close()

    def save_state(self) -> int:
        """See :class:`StateHandler`."""
        return self._begin_transfer(StateFile.to_read(self._host.save()))

    def load_state(self) -> int:
        """See :class:`StateHandler`."""
        return self._begin_transfer(StateFile.to_write(HEAD_SIZE + self._host.device.max_state))

    def _begin_transfer(self, state: StateFile | None) -> int:
        """Use another file from now on; its descriptor."""
        before, self._state = self._state, state
        if before is not None:
            before.close()
        return -1 if state is None else state.fd

    def check_state(self) -> None:
        """See :class:`StateHandler`."""
        state = self._state
        if state is None:
            raise ProtocolError("no transfer of the device's state has begun")
        try:
            if state.writable:
                device = self._host.device
                self._host.restore(state.content(lambda head: size_of(device, head)))
                LOG.report(
                    log,
                    logging.INFO,
                    "front-end %d: %s goes on with a state that was saved",
                    self._stats.connections,
                    type(device).__name__,
                )
        finally:
            self._begin_transfer(None)

    def send_rarp(self, address: bytes) -> None:
        """See :class:`AnnounceHandler`."""
        self._host.call_device("send_rarp", address)

    def set_vring_num(self, index: int, num: int) -> None:
        """See :class:`SessionHandler`."""
        self._host.queues[index].wake()

    def set_vring_addr(self, index: int, address: VringAddr) -> None:
        """See :class:`SessionHandler`."""
        self._host.move(index)

    def set_vring_base(self, index: int, base: int) -> None:
        """See :class:`SessionHandler`."""
        self._host.begin_at(index, base)

    def get_vring_base(self, index: int) -> int:
        """See :class:`SessionHandler`."""
        base = self._host.stop(index)
        # Front-ends give one again before the next start, some of them after the kick. Until then
        # nothing looks at this one any more: libvhost-user and DPDK forget it, too.
        self._host.queues[index].set_call(None)
        self._forget_translations()
        self._report_log()
        return base

    def set_vring_enable(self, index: int, enable: bool) -> None:
        """See :class:`SessionHandler`."""
        self._host.queues[index].enable(enable)

    def set_vring_kick(self, index: int, fd: int | None) -> None:
        """See :class:`SessionHandler`."""
        what = f"kick fd of queue {index}"
        kick = None if fd is None else Eventfd(fd, what)
        try:
            self._forget_translations()
            self._host.start_over()
        except BaseException:
            if kick is not None:
                kick.close()
            raise
        try:
            self._host.queues[index].set_kick(kick)
        except OSError as error:
            raise ProtocolError(f"the {what} is unusable: {error.strerror}") from error
        self._back.announce()

    def set_vring_call(self, index: int, fd: int | None) -> None:
        """See :class:`SessionHandler`."""
        call = None if fd is None else Eventfd.to_notify(fd, f"call fd of queue {index}")
        self._host.queues[index].set_call(call)

    def set_vring_err(self, index: int, fd: int | None) -> None:
        """See :class:`SessionHandler`."""
        err = None if fd is None else Eventfd(fd, f"err fd of queue {index}")
        self._host.queues[index].set_err(err)

    def get_config(self, offset: int, size: int) -> bytes:
        """See :class:`SessionHandler`."""
        return self._host.read_config(offset, size)

    def set_config(self, offset: int, data: bytes, flags: int) -> None:
        """See :class:`SessionHandler`."""
        if flags & ConfigFlag.LIVE_MIGRATION:
            raise DeviceError("migration of this device's state is not supported")
        self._host.write_config(offset, data)

    def get_status(self) -> int:
        """See :class:`SessionHandler`."""
        return self._host.status

    def set_status(self, status: int) -> None:
        """See :class:`SessionHandler`.

        QEMU sets 0 at each stop, also when it only pauses the guest (`vhost_user_reset_status`),
        so what is in flight is not forgotten. Up to version 7.2 it does so before it asks where the
        queues stopped, so that is not forgotten either.
        """
        if status == 0:
            self._reset(keep_base=True)
        self._host.status = status

    def reset_device(self) -> None:
        """See :class:`SessionHandler`."""
        self._reset()
        if self._inflight is not None:
            for index in range(min(self.num_queues, self._inflight.description.num_queues)):
                self._inflight.queue(index).forget()

    def _reset(self, *, keep_base: bool = False) -> None:
        self._host.reset(keep_base=keep_base)
        self._forget_translations()

    def iotlb(self, message: IotlbMessage) -> None:
        """See :class:`SessionHandler`."""
        iova, size = message.iova, message.size
        if self._translator.apply(message, self._host.stop_timeout):
            return
        self._host.give_up(iova, size)
        if not self._translator.unused(iova, size, COPY_GRACE):
            raise DeviceError(
                f"the memory at {iova:#x}+{size:#x} is still in use: the device has not come back "
                "from a system call or from process"
            )

    @property
    def tracked(self) -> bool:
        """See :class:`~guestio.virtio.host.Transport`."""
        return self._inflight is not None

    def ring_layout(self, index: int, *, event_idx: bool) -> RingLayout | None:
        """See :class:`~guestio.virtio.host.Transport`."""
        ring = self._session.vrings[index]
        address, size = ring.address, ring.num
        if address is None or not size:
            return None
        parts = (address.desc, address.avail, address.used)
        if not self.translating:
            sizes = area_bytes(size, event_idx)
            desc, avail, used = map(self._shared.guest_address, parts, sizes)
            parts = (desc, avail, used)
        try:
            return RingLayout(size, *parts)
        except ValueError as error:
            raise QueueError(str(error)) from None

    def inflight_notes(self, index: int, size: int) -> InflightQueue | None:
        """See :class:`~guestio.virtio.host.Transport`."""
        notes = None if self._inflight is None else self._inflight.queue(index)
        if notes is not None and notes.size < size:
            # QEMU 10.0.13 gives drivers 1024 entries and asks to track as many as its option says.
            # Without notes requests are published in order, so that none is lost either.
            self._host.log.report(
                "queue %d of %d entries: its requests are not tracked, the region for requests in "
                "flight has room for %d",
                index,
                size,
                notes.size,
            )
            return None
        return notes

    def config_changed(self) -> None:
        """See :class:`~guestio.virtio.host.Transport`."""
        self._back.config_changed()

    def _may_announce_config(self) -> bool:
        """Whether the front-end may be told now that the configuration space has changed.

        Not while no queue runs: QEMU up to 7.2 then crashes (`vhost_user_blk_handle_config_change`
        has no device yet), later ones ignore it, and none reads the configuration space again when
        a queue starts.
        """
        negotiated = self._session.protocol_features
        needed = ProtocolFeature.BACKEND_REQ | ProtocolFeature.CONFIG
        return negotiated & needed == needed and self._host.live

    def set_backend_channel(self, fd: int) -> None:
        """See :class:`SessionHandler`."""
        acknowledged = bool(self._session.protocol_features & ProtocolFeature.REPLY_ACK)
        self._back.open(fd, acknowledged=acknowledged)

    def seen(self) -> Seen:
        """What is to be seen of the front-end. From any thread, without waiting."""
        if self.closed:
            return Seen()
        shared, translator = self._shared, self._translator
        tracked = [region.bitmap for region in shared.memory if region.bitmap is not None]
        negotiated = ProtocolFeature(self._session.protocol_features)
        return Seen(
            peer=peer_status(
                self._host,
                self._stats.connections,
                self.since,
                [bit.name for bit in ProtocolFeature if bit & negotiated and bit.name],
            ),
            iotlb=translator.seen() if self.translating else None,
            memory=[
                {
                    "address": region.guest_addr,
                    "length_bytes": region.size,
                    "user_address": region.user_addr,
                }
                for region in shared.regions
            ],
            dirty={
                "tracked": shared.tracks_dirty,
                "logging": self._dirty_log.marks.enabled,
                "pages": sum(map(AtomicBitmap.count, tracked)) if shared.tracks_dirty else 0,
                "pages_per_s": 0.0,
            },
            budgets={
                "pending_misses": budget(translator.pending, MAX_OUTSTANDING),
                "iotlb_entries": budget(len(translator.iotlb), MAX_TRANSLATIONS),
            },
        )

    def explain(self, address: int, length: int) -> Explanation:
        """What a range of the driver's addresses leads to. From any thread, without waiting."""
        if self.translating:
            return self._translator.explain(address, length)
        mappings = [
            (region.guest_addr, region.size, region.guest_addr, Permissions.READ_WRITE)
            for region in sorted(self._shared.regions, key=lambda region: region.guest_addr)
            if region.guest_addr < address + length and address < region.guest_addr + region.size
        ]
        return explain_range(address, length, mappings, origin=self._host.origin, translated=False)

    def survey(self, address: int, length: int, parts: int, *, memory: bool) -> Survey:
        """What a range of addresses has, in equal parts. From any thread, without waiting."""
        if self.translating and not memory:
            table = self._translator.iotlb._map
            return survey_of(table, address, length, parts, translated=True)
        regions = [(region.start, region.size, region.bitmap) for region in self._shared.memory]
        if not self._shared.tracks_dirty:
            regions = [(start, size, None) for start, size, _ in regions]
        return survey_memory(regions, address, length, parts)
