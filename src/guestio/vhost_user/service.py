"""One front-end as a back-end serves it: its memory, its rings, its translations, its device.

Everything happens in one thread, the one that runs the poller. A queue that lacks a translation
is parked, asks for all that it lacks at once, and goes on when the answers are there; meanwhile
everybody else is served. Nothing waits inside, so a front-end can always be answered.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from guestio._core.access import AddressSpace
from guestio._core.misses import Misses
from guestio._core.questions import touched
from guestio._core.chain import Chain
from guestio._core.ring import SplitRing
from guestio.addr import IovaRange, check_int
from guestio.errors import DeviceError, GuestioError, ProtocolError
from guestio.vhost_user.channel import Channel, PeerGoneError
from guestio.vhost_user.memory import SharedMemory
from guestio.vhost_user.messages import (
    ConfigFlag,
    IotlbMessage,
    MemoryRegion,
    ProtocolFeature,
    VringAddr,
)
from guestio.vhost_user.poller import Poller
from guestio.vhost_user.session import SUPPORTED_PROTOCOL_FEATURES, Session
from guestio.vhost_user.statistics import Statistics
from guestio.vhost_user.translations import Translations
from guestio.virtio.device import (
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    Device,
    Status,
)

log = logging.getLogger("guestio.vhost_user")

MAX_MEM_SLOTS = 509
"""Memory regions at most, as many as QEMU's default for KVM."""

TURN = 64
"""Requests of a queue, or messages, that are served before somebody else has a turn."""

POLL_INTERVAL = 0.001
"""Seconds between looks at a ring whose front-end gave no kick fd."""

SPIN = 50e-6
"""Seconds that a queue is watched before everybody else has a turn."""

PATIENCE = 4
"""Times the limit for one answer that a request may wait for translations in all: a front-end that
answers every question, but never with what was asked for, must not keep it for ever."""

MAX_REFUSED = 4096
"""Refused pages that are remembered for a queue."""
_ONE = struct.pack("=Q", 1)

Missing: TypeAlias = Misses | list[tuple[IovaRange, int]]
"""Ranges that lack a translation, and the access that each is needed for."""


@dataclass(eq=False)
class _Queue:
    """A virtqueue as the front-end set it up."""

    index: int
    num: int = 0
    address: VringAddr | None = None
    base: int = 0
    enabled: bool = False
    started: bool = False
    polled: bool = False
    broken: bool = False
    watch_until: float = 0.0
    parked_at: float | None = None
    kick: int | None = None
    call: int | None = None
    err: int | None = None
    ring: SplitRing | None = None


class Service:
    """A front-end from its connection to its disconnection; a :class:`SessionHandler`.

    Args:
        channel: The connection; owned from here on.
        device: What it is connected to.
        poller: Calls back when there is something to do.
        statistics: Where to count.
        offered: Features of the transport to offer beside the device's own.
        miss_timeout: Seconds a front-end may take to answer an IOTLB miss.
        track_dirty: Whether to mark the pages that the device writes.
        poll_us: Microseconds to look out for a request before sleeping.

    Attributes:
        closed: Whether the front-end is gone and everything of it released.
    """

    def __init__(
        self,
        channel: Channel,
        device: Device,
        poller: Poller,
        statistics: Statistics,
        *,
        offered: int,
        miss_timeout: float,
        track_dirty: bool,
        poll_us: int,
    ) -> None:
        self._poll_seconds = poll_us / 1e6
        self._patience = PATIENCE * miss_timeout
        self.closed = False
        self._channel = channel
        self._device = device
        self._poller = poller
        self._stats = statistics
        self._shared = SharedMemory(track_dirty=track_dirty)
        self._translations = Translations(poller, statistics, self._wake_all, miss_timeout)
        self._space = AddressSpace(self._shared.table)
        self._queues = [_Queue(index) for index in range(device.num_queues)]
        self._ready: deque[_Queue] = deque()
        self._status = 0
        self._negotiated = 0
        self._bursts = _Bursts()
        self.features = device.features | offered
        self.protocol_features = int(SUPPORTED_PROTOCOL_FEATURES)
        self.num_queues = device.num_queues
        self.max_mem_slots = MAX_MEM_SLOTS
        self._session = Session(self)
        poller.add(channel.fileno(), self._receive)

    def _receive(self) -> None:
        if self.closed:
            return
        try:
            for _ in range(TURN):
                if self.translating and self._translations.receive(self._channel):
                    return
                message = self._channel.recv()
                if message is None:
                    return
                reply = self._session.handle(message)
                self._report_refusal()
                if reply is not None:
                    self._channel.send(reply)
            self._poller.again(self._receive)
        except PeerGoneError:
            self.close()
        except ProtocolError as error:
            self._stats.protocol_errors += 1
            log.error("front-end disconnected: %s", str(error))  # noqa: TRY400 - the peer's fault
            self.close()

    def _report_refusal(self) -> None:
        """Log what the front-end was refused, and let go of it: a traceback keeps memory mapped."""
        error, self._session.last_refusal = self._session.last_refusal, None
        if error is not None:
            self._bursts.report("the front-end was refused: %s", str(error))

    def close(self) -> None:
        """Give everything back. Calling it again does nothing."""
        if self.closed:
            return
        self.closed = True
        self._poller.remove(self._channel.fileno())
        self._channel.close()
        self._translations.close()
        self._forget_queues()
        self._session.last_refusal = None
        self._stats.iotlb_hits += self._translations.iotlb.hits
        self._count_dirty()
        self._shared = SharedMemory()
        self._space = AddressSpace(self._shared.table)
        self._bursts.flush()
        try:
            self._device.reset()
        except Exception:
            log.exception("the device could not be reset")
        stats = self._stats
        log.info(
            "front-end %d gone; so far: requests=%d failed=%d iotlb_misses=%d "
            "iotlb_invalidations=%d refused=%d",
            stats.connections,
            stats.requests,
            stats.failed_requests,
            stats.iotlb_misses,
            stats.iotlb_invalidations,
            stats.iotlb_refused,
        )

    def _count_dirty(self) -> None:
        for region in self._shared.memory:
            if region.bitmap is not None:
                self._stats.dirty_pages += region.bitmap.count()

    def _forget_queues(self) -> None:
        for index, queue in enumerate(self._queues):
            self._stop(queue)
            self._set_fd(queue, "call", None)
            self._set_fd(queue, "err", None)
            self._queues[index] = _Queue(index)

    @property
    def translating(self) -> bool:
        """Whether the driver's addresses are I/O virtual."""
        return bool(self._negotiated >> VIRTIO_F_ACCESS_PLATFORM & 1)

    def set_features(self, features: int) -> None:
        """See :class:`SessionHandler`."""
        if features == self._negotiated:
            return
        self._device.negotiated(features)
        self._negotiated = features
        self._translations.serve(self._channel if self.translating else None)
        self._change_memory(self._shared)

    def set_memory_table(self, regions: Sequence[tuple[MemoryRegion, int]]) -> None:
        """See :class:`SessionHandler`."""
        try:
            shared = self._shared.replaced(regions)
        finally:
            for _, fd in regions:
                os.close(fd)
        self._change_memory(shared)

    def add_memory_region(self, region: MemoryRegion, fd: int) -> None:
        """See :class:`SessionHandler`."""
        try:
            shared = self._shared.adding(region, fd)
        finally:
            os.close(fd)
        self._change_memory(shared)

    def remove_memory_region(self, region: MemoryRegion) -> None:
        """See :class:`SessionHandler`."""
        self._change_memory(self._shared.removing(region))

    def _change_memory(self, shared: SharedMemory) -> None:
        """Use other memory; rings and translations are looked up again."""
        self._shared = shared
        self._translations.change_memory(shared)
        iotlb = self._translations.iotlb if self.translating else None
        self._space = AddressSpace(shared.table, iotlb)
        for queue in self._queues:
            self._detach(queue)

    def set_vring_num(self, index: int, num: int) -> None:
        """See :class:`SessionHandler`."""
        queue = self._queues[index]
        queue.num = num
        if queue.enabled and queue.started:
            self._wake(queue)

    def set_vring_addr(self, index: int, address: VringAddr) -> None:
        """See :class:`SessionHandler`."""
        self._queues[index].address = address
        self._detach(self._queues[index])

    def set_vring_base(self, index: int, base: int) -> None:
        """See :class:`SessionHandler`."""
        self._queues[index].base = base

    def get_vring_base(self, index: int) -> int:
        """See :class:`SessionHandler`."""
        self._stop(self._queues[index])
        return self._queues[index].base

    def set_vring_enable(self, index: int, enable: bool) -> None:
        """See :class:`SessionHandler`."""
        queue = self._queues[index]
        queue.enabled = enable
        if enable and queue.started:
            self._wake(queue)

    def _detach(self, queue: _Queue) -> None:
        """Let go of a ring's memory; it is set up again, where it stopped, before its next use.

        Completions that cannot be shown any more are taken back, and done again then.
        """
        if queue.ring is not None:
            with contextlib.suppress(GuestioError):
                if queue.ring.publish():
                    _signal(queue.call)
            queue.base = (queue.ring.next_avail - queue.ring.unpublished) & 0xFFFF
        queue.ring, queue.broken = None, False
        if queue.enabled and queue.started:
            self._wake(queue)

    def _stop(self, queue: _Queue) -> None:
        queue.started = False
        self._detach(queue)
        queue.parked_at = None
        self._translations.forget(queue.index)
        self._poller.clear_timer(queue)
        self._set_fd(queue, "kick", None)

    def set_vring_kick(self, index: int, fd: int | None) -> None:
        """See :class:`SessionHandler`."""
        queue = self._queues[index]
        self._set_fd(queue, "kick", fd)
        queue.polled = fd is None
        if fd is None:
            queue.started = True
            self._wake(queue)

    def set_vring_call(self, index: int, fd: int | None) -> None:
        """See :class:`SessionHandler`."""
        self._set_fd(self._queues[index], "call", fd)

    def set_vring_err(self, index: int, fd: int | None) -> None:
        """See :class:`SessionHandler`."""
        self._set_fd(self._queues[index], "err", fd)

    def _set_fd(self, queue: _Queue, name: str, fd: int | None) -> None:
        """Replace one of a queue's eventfds. A kick is noticed by its edge and never read."""
        old: int | None = getattr(queue, name)
        setattr(queue, name, None)
        if old is not None:
            self._poller.remove(old)
            if name == "kick":
                _drain(old)
            os.close(old)
        if fd is None:
            return
        try:
            os.set_blocking(fd, False)
            if name == "kick":
                self._poller.add(fd, lambda: self._kicked(queue), edge=True)
        except OSError as error:
            os.close(fd)
            raise ProtocolError(
                f"the {name} fd of queue {queue.index} is unusable: {error.strerror}"
            ) from error
        setattr(queue, name, fd)

    def get_config(self, offset: int, size: int) -> bytes:
        """See :class:`SessionHandler`."""
        return self._device.config()[offset : offset + size].ljust(size, b"\0")

    def set_config(self, offset: int, data: bytes, flags: int) -> None:
        """See :class:`SessionHandler`."""
        if flags & ConfigFlag.LIVE_MIGRATION:
            raise DeviceError("migration of this device's state is not supported")
        self._device.write_config(offset, data)

    def get_status(self) -> int:
        """See :class:`SessionHandler`."""
        return self._status

    def set_status(self, status: int) -> None:
        """See :class:`SessionHandler`."""
        if status == 0:
            self.reset_device()
        self._status = status

    def reset_device(self) -> None:
        """See :class:`SessionHandler`."""
        self._forget_queues()
        self._status = 0
        self._device.reset()

    def iotlb(self, message: IotlbMessage) -> None:
        """See :class:`SessionHandler`."""
        self._translations.apply(message)

    def _wake_all(self, indices: Iterable[int]) -> None:
        for index in indices:
            self._wake(self._queues[index])

    def _wake(self, queue: _Queue) -> None:
        if queue not in self._ready:
            self._ready.append(queue)
            self._poller.again(self._run_ready)

    def _run_ready(self) -> None:
        if self._ready:
            self._run(self._ready.popleft())

    def _kicked(self, queue: _Queue) -> None:
        queue.started = True
        self._run(queue)

    def _run(self, queue: _Queue) -> None:
        """Serve a queue for one turn."""
        if self.closed or queue.broken or not (queue.enabled and queue.started):
            return
        try:
            if queue.ring is None:
                queue.ring = self._make_ring(queue)
            if queue.ring is not None:
                self._serve(queue, queue.ring)
        except GuestioError as error:
            self._break(queue, error)

    def _make_ring(self, queue: _Queue) -> SplitRing | None:
        address, num = queue.address, queue.num
        if address is None or not num:
            return None
        event_idx = bool(self._negotiated >> VIRTIO_F_EVENT_IDX & 1)
        areas = (
            (address.desc, 16 * num),
            (address.avail, 4 + 2 * num + 2 * event_idx),
            (address.used, 4 + 8 * num + 2 * event_idx),
        )
        desc, avail, used = (
            addr if self.translating else self._shared.guest_address(addr, size)
            for addr, size in areas
        )
        return SplitRing(
            self._space,
            num,
            desc,
            avail,
            used,
            event_idx=event_idx,
            indirect=bool(self._negotiated >> VIRTIO_F_INDIRECT_DESC & 1),
            base=queue.base,
        )

    def _break(self, queue: _Queue, error: GuestioError) -> None:
        """Report a queue that its driver ruined; the others go on."""
        queue.broken = True
        self._stats.queue_errors += 1
        self._status |= Status.NEEDS_RESET
        log.error("queue %d stopped: %s", queue.index, str(error))
        _signal(queue.err)

    def _serve(self, queue: _Queue, ring: SplitRing) -> None:
        """Serve a queue until there is nothing to do, or until others have a turn."""
        for _ in range(TURN):
            served = self._serve_once(queue, ring)
            if served is None:
                return
            if served == TURN:
                break
            if not self._watching(queue, served):
                self._rest(queue, ring)
                return
            # Those who watch other queues have their turn too.
            if self._ready or not ring.spin(SPIN, self._poller.fileno()):
                break
        self._wake(queue)

    def _serve_once(self, queue: _Queue, ring: SplitRing) -> int | None:
        """Serve what is available; how many requests, or None if the queue is parked."""
        if not self._publish(queue, ring):
            return None
        ring.disable_kicks()
        missing: Missing
        served = 0
        if self._device.server is None:
            chains, missing = ring.pop(TURN)
        else:
            chains, missing, served = ring.serve(self._device.server, TURN)
            self._stats.requests += served
        for chain in chains:
            ring.complete(chain, self._process(queue, chain))
        served += len(chains)
        if served:
            queue.parked_at = None
            if not self._publish(queue, ring):
                return None
        if missing:
            self._park(queue, ring, missing)
            return None
        queue.parked_at = None
        self._translations.refused(queue.index).clear()
        return served

    def _watching(self, queue: _Queue, served: int) -> bool:
        """Whether to look out for the next request before asking to be woken for it."""
        if not self._poll_seconds:
            return False
        now = time.monotonic()
        if served:
            queue.watch_until = now + self._poll_seconds
        return now < queue.watch_until

    def _rest(self, queue: _Queue, ring: SplitRing) -> None:
        """Have the queue woken by its driver."""
        if ring.enable_kicks() is not False:
            self._wake(queue)
        elif queue.polled:
            due = time.monotonic() + POLL_INTERVAL
            self._poller.set_timer(queue, due, lambda: self._run(queue))

    def _process(self, queue: _Queue, chain: Chain) -> int:
        self._stats.requests += 1
        try:
            if chain.fault is None:
                return _plausible(self._device.process(queue.index, chain), chain)
            self._bursts.report("queue %d: request refused: %s", queue.index, chain.fault)
        except GuestioError as error:
            self._bursts.report("queue %d: request failed: %s", queue.index, str(error))
        except Exception:
            self._bursts.report(
                "queue %d: the device failed; its request is refused", queue.index, trace=True
            )
        self._stats.failed_requests += 1
        try:
            return _plausible(self._device.fail(queue.index, chain), chain)
        except GuestioError:
            return 0
        except Exception:
            self._bursts.report(
                "queue %d: the device failed to fail a request", queue.index, trace=True
            )
            return 0

    def _publish(self, queue: _Queue, ring: SplitRing) -> bool:
        """Show completions; False, and parked, if the used ring is out of reach."""
        notify = ring.publish()
        if notify is None:
            self._park(queue, ring, ring.missing())
            return False
        if notify:
            _signal(queue.call)
        return True

    def _park(self, queue: _Queue, ring: SplitRing, missing: Missing) -> None:
        """Ask for what a queue lacks; a request that lacks what was refused fails instead."""
        now = time.monotonic()
        if queue.parked_at is None:
            queue.parked_at = now
        if not self._give_up(queue, ring, late=now - queue.parked_at >= self._patience):
            self._translations.ask(queue.index, missing)

    def _give_up(self, queue: _Queue, ring: SplitRing, *, late: bool) -> bool:
        """Deal with a refusal that concerns the ring itself or the request at its head.

        Args:
            queue: The queue.
            ring: Its ring.
            late: Whether it has waited long enough for whatever it lacks.

        Returns:
            Whether there is nothing to ask for now.
        """
        refused = self._translations.refused(queue.index)
        if not refused and not late:
            return False
        missing = ring.missing()
        if missing and (late or touched(missing, refused)):
            self._bursts.report("queue %d: its ring has no translation", queue.index)
            refused.clear()
            queue.started, queue.parked_at = False, None
            return True
        chains, missing = ring.pop(1)
        lost = touched(missing, refused)
        if missing and not late:
            if not lost:
                return False
            # What else it lacks may still come, the place of its status among it.
            if self._translations.awaited(queue.index):
                return True
        refused -= lost
        if len(refused) > MAX_REFUSED:
            refused.clear()
        chain = chains[0] if chains else ring.pop_faulty()
        if chain is not None:
            self._translations.report_access_fails(chain.access_fails)
            ring.complete(chain, self._process(queue, chain))
        queue.parked_at = None
        self._wake(queue)
        return True

    def set_backend_channel(self, fd: int) -> None:
        """See :class:`SessionHandler`."""
        self._translations.acknowledged = bool(
            self._session.protocol_features & ProtocolFeature.REPLY_ACK
        )
        self._translations.set_channel(fd)


class _Bursts:
    """Logs what a guest may cause any number of times: the first, then a count a second later."""

    def __init__(self) -> None:
        self._until = 0.0
        self._hidden = 0

    def report(self, message: str, *args: object, trace: bool = False) -> None:
        now = time.monotonic()
        if now < self._until:
            self._hidden += 1
            return
        self.flush()
        log.warning(message, *args, exc_info=trace)
        self._until = now + 1.0

    def flush(self) -> None:
        if self._hidden:
            log.warning("%d more requests refused or failed", self._hidden)
            self._hidden = 0


def _plausible(written: int, chain: Chain) -> int:
    """What a device says that it wrote, if that is possible."""
    if not 0 <= check_int(written, "written") <= chain.writable.total:
        raise DeviceError(
            f"the device says it wrote {written} bytes to a request with room for "
            f"{chain.writable.total}"
        )
    return written


def _signal(fd: int | None) -> None:
    """Add one to an eventfd; if that would wait, its owner has enough to do anyway."""
    if fd is not None:
        try:  # noqa: SIM105 - suppress() costs as much as the system call
            os.write(fd, _ONE)
        except OSError:
            pass


def _drain(fd: int) -> None:
    """Take back what an eventfd counted, so that its owner does not see an old kick.

    Without waiting, whatever its owner made of the file description meanwhile.
    """
    with contextlib.suppress(OSError):
        os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT)
