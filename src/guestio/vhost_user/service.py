"""One front-end as a back-end serves it: its memory, its queues, its translations, its device.

The front-end is answered in the thread that runs the poller. Its queues are served in the same
thread, or each in one of its own.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import reprlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from guestio._core.iommu.address_space import AddressSpace
from guestio._core.virtio.chain import Quota
from guestio._core.virtio.ring import SplitRing
from guestio.budgets import (
    HALF_MESSAGE_TIMEOUT,
    OUTSTANDING_PIECES,
    SEND_RETRY,
    TURN_BYTES,
    TURN_SECONDS,
)
from guestio.errors import DeviceError, GuestioError, ProtocolError
from guestio.ratelog import LOG
from guestio.vhost_user.channel import Channel, ConnectionLostError, PeerGoneError
from guestio.vhost_user.foreign import close_foreign
from guestio.vhost_user.inflight import InflightRegion
from guestio.vhost_user.memory import SharedMemory
from guestio.vhost_user.messages import (
    ConfigFlag,
    Inflight,
    IotlbMessage,
    MemoryRegion,
    ProtocolFeature,
    VringAddr,
)
from guestio.vhost_user.poller import Poller, PollerThread
from guestio.vhost_user.session import SUPPORTED_PROTOCOL_FEATURES, Session
from guestio.vhost_user.statistics import Bursts, Statistics
from guestio.vhost_user.translations import Translations
from guestio.vhost_user.virtqueue import COPY_GRACE, QueueHost, Virtqueue
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
"""Messages that are dealt with before somebody else has a turn."""


class Service:
    """A front-end from its connection to its disconnection.

    A :class:`SessionHandler` and an :class:`InflightHandler`.

    Args:
        channel: The connection; owned from here on.
        device: What it is connected to.
        poller: Calls back when there is something to do.
        statistics: Where to count.
        offered: Features of the transport to offer beside the device's own.
        miss_timeout: Seconds a front-end may take to answer an IOTLB miss.
        track_dirty: Whether to mark the pages that the device writes.
        stop_timeout: Seconds that a stop waits for requests that the device holds.
        poll_us: Microseconds to look out for a request before sleeping.
        queue_threads: Whether to serve each queue in a thread of its own.

    Attributes:
        closed: Whether the front-end is gone and everything of it released.
        unclean: Whether something of it could not be released, or an error may refer to it.
        heard: Whether it has sent a whole message.
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
        stop_timeout: float,
        poll_us: int,
        queue_threads: bool,
    ) -> None:
        self.closed = self.unclean = False
        self.heard = False
        self._half_since: float | None = None
        self._channel = channel
        self._device = device
        self._poller = poller
        self._stats = statistics
        self._shared = SharedMemory(track_dirty=track_dirty)
        self._translations = Translations(poller, statistics, self._wake_all, miss_timeout)
        self._space = AddressSpace(self._shared.table)
        self._quota = Quota(OUTSTANDING_PIECES)
        self._inflight: InflightRegion | None = None
        self._status = 0
        self._negotiated = 0
        self._bursts = Bursts()
        self._stop_timeout = stop_timeout
        self._out_of_time = False
        self._threads: list[PollerThread] = []
        with contextlib.ExitStack() as undo:
            for index in range(device.num_queues if queue_threads else 0):
                thread = PollerThread(f"guestio-queue-{index}", self._thread_failed)
                undo.callback(thread.close)
                self._threads.append(thread)
            host = QueueHost(
                device,
                device.error_status,
                statistics,
                self._bursts,
                self._translations,
                make_ring=self._make_ring,
                tracked=lambda: self._inflight is not None,
                broken=self._broken,
                given_up=self._given_up,
                intake=None if queue_threads else self._translations.intake,
                poll_seconds=poll_us / 1e6,
            )
            self._queues = [
                Virtqueue(index, host, self._threads[index].poller if queue_threads else poller)
                for index in range(device.num_queues)
            ]
            self.features = device.features | offered
            self.protocol_features = int(
                SUPPORTED_PROTOCOL_FEATURES | ProtocolFeature.INFLIGHT_SHMFD
            )
            self.num_queues = device.num_queues
            self.max_mem_slots = MAX_MEM_SLOTS
            self._session = Session(self)
            poller.add(channel.fileno(), self._receive)
            poller.waiter = self._wait
            statistics.device_holds = functools.partial(_outstanding, self._queues)
            undo.pop_all()

    def _wait(self, epoll: int, seconds: float) -> list[int]:
        fds, outcomes = self._translations.wait(epoll, seconds)
        for index, outcome in outcomes:
            self._queues[index].go_on(outcome)
        return fds

    def _receive(self) -> None:
        if self.closed:
            return
        until = time.monotonic() + TURN_SECONDS
        try:
            for _ in range(TURN):
                if self.translating and self._translations.receive(self._channel):
                    self._wait_for_reader()
                    return
                message = self._channel.recv()
                if message is None:
                    self._watch_half_message()
                    return
                self.heard = True
                self._half_since = None
                reply = self._session.handle(message)
                self._report_refusal()
                if reply is not None and not self._channel.post(reply, self._session.reply_fds):
                    self._wait_for_reader()
                    return
                if time.monotonic() >= until:
                    break
            self._poller.again(self._receive)
        except ConnectionLostError as error:
            LOG.report(log, logging.ERROR, "front-end disconnected: %s", error)
            self.close()
        except PeerGoneError:
            self.close()
        except ProtocolError as error:
            self.disconnect(str(error))

    def disconnect(self, reason: str) -> None:
        """End the connection to a front-end that broke the protocol."""
        self._stats.protocol_errors += 1
        LOG.report(log, logging.ERROR, "front-end disconnected: %s", reason)
        self.close()

    def _wait_for_reader(self) -> None:
        """Read nothing more from a front-end until it has taken what it was sent."""
        if self._channel.backlog:
            self._poller.remove(self._channel.fileno())
            self._poller.set_timer(
                (self, "flush"), time.monotonic() + SEND_RETRY, self._send_backlog
            )

    def _send_backlog(self) -> None:
        if self.closed:
            return
        try:
            if self._channel.flush():
                self._poller.add(self._channel.fileno(), self._receive)
                self._poller.again(self._receive)
            else:
                self._wait_for_reader()
        except PeerGoneError:
            self.close()
        except ProtocolError as error:
            self.disconnect(str(error))

    def _watch_half_message(self) -> None:
        """Give a front-end a while for the rest of a message."""
        if not self._channel.unfinished:
            self._half_since = None
        elif self._half_since is None:
            self._half_since = time.monotonic()
            self._poller.set_timer(
                (self, "half"), self._half_since + HALF_MESSAGE_TIMEOUT, self._give_up_half
            )

    def _give_up_half(self) -> None:
        since, now = self._half_since, time.monotonic()
        if self.closed or since is None:
            return
        if now - since < HALF_MESSAGE_TIMEOUT:
            # Another message was begun since.
            self._poller.set_timer((self, "half"), since + HALF_MESSAGE_TIMEOUT, self._give_up_half)
            return
        self.disconnect(f"the rest of a message did not come within {HALF_MESSAGE_TIMEOUT} s")

    def _report_refusal(self) -> None:
        """Log what the front-end was refused, and let go of it: a traceback keeps memory mapped."""
        error, self._session.last_refusal = self._session.last_refusal, None
        if error is not None:
            self._bursts.report("the front-end was refused: %s", error)

    def close(self) -> None:
        """Give everything back. Calling it again does nothing."""
        if self.closed:
            return
        self.closed = True
        self._poller.waiter = None
        until = time.monotonic() + self._stop_timeout
        interrupt: BaseException | None = None
        steps: list[Callable[[], object]] = [
            lambda: self._announce_stop(self._queues),
            self._hang_up,
            *(functools.partial(queue.reset, until) for queue in self._queues),
            *(thread.close for thread in self._threads),
            self._translations.close,
            lambda: self._set_inflight(None),
            self._count,
            self._let_go_of_memory,
            self._reset_device,
        ]
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
                    log,
                    logging.ERROR,
                    "front-end %d was not released as usual",
                    self._stats.connections,
                    trace=True,
                )
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
        if interrupt is not None:
            raise interrupt

    def _call_device(self, name: str, *args: object) -> object:
        """Call a method of the device.

        Raises:
            DeviceError: It raised what is not of guestio.
        """
        try:
            return getattr(self._device, name)(*args)
        except (GuestioError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            called, kind = f"{type(self._device).__name__}.{name}", type(error).__name__
            self._bursts.report("%s raised", called, trace=True)
        # Outside of the handler: the device's error would be this one's context.
        raise DeviceError(f"{called} raised {kind}")

    def _reset_device(self) -> None:
        try:
            self._call_device("reset")
        except GuestioError as error:
            # The front-end's queues are reset all the same.
            self._bursts.report("the device was not reset: %s", error)

    def _hang_up(self) -> None:
        self._poller.remove(self._channel.fileno())
        self._poller.clear_timer((self, "flush"))
        self._poller.clear_timer((self, "half"))
        self._channel.close()
        self._session.last_refusal = None
        self._stats.device_holds = int

    def _let_go_of_memory(self) -> None:
        self._shared = SharedMemory()
        self._space = AddressSpace(self._shared.table)

    def _count(self) -> None:
        self._stats.iotlb_hits += self._translations.iotlb.hits
        for region in self._shared.memory:
            if region.bitmap is not None:
                self._stats.dirty_pages += region.bitmap.count()

    def _thread_failed(self, error: BaseException) -> None:
        """A mistake in a queue's thread is dealt with like one in ours, once for a front-end."""
        # An error that its own traceback refers to would stay, and what its frames refer to.
        errors = [error]

        def fail() -> None:
            if not self.closed:
                raise errors.pop()

        self._poller.again(fail)

    def _reset_queues(self, *, keep_base: bool = False) -> None:
        until = self._announce_stop(self._queues)
        for queue in self._queues:
            queue.reset(until, keep_base=keep_base)
        self._forget_translations()

    def _forget_translations(self) -> None:
        if not any(queue.live for queue in self._queues):
            self._translations.forget_all()

    def _announce_stop(self, queues: Sequence[Virtqueue]) -> float:
        """Have the device finish what it holds of some queues; until when to wait for it.

        A front-end stops its queues one by one. The device had its time when it failed to use it
        for one of them, and gets a tenth for each of the others.
        """
        until = time.monotonic() + self._stop_timeout * (0.1 if self._out_of_time else 1)
        for queue in queues:
            queue.announce_stop()
        for queue in queues:
            queue.await_turn()
        return until

    def _given_up(self) -> None:
        self._out_of_time = True

    @contextlib.contextmanager
    def _queues_detached(self) -> Iterator[None]:
        """Nothing of the front-end's memory is in use, in no thread, inside this context."""
        until = self._announce_stop(self._queues)
        with contextlib.ExitStack() as locks:
            for queue in self._queues:
                locks.enter_context(queue.lock)
                queue.detach(until)
            yield

    @property
    def translating(self) -> bool:
        """Whether the driver's addresses are I/O virtual."""
        return bool(self._negotiated >> VIRTIO_F_ACCESS_PLATFORM & 1)

    def set_features(self, features: int) -> None:
        """See :class:`SessionHandler`."""
        if features == self._negotiated:
            return
        self._call_device("negotiated", features)
        self._negotiated = features
        self._translations.serve(self._channel if self.translating else None)
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
        with self._queues_detached():
            self._shared = shared
            self._translations.change_memory(shared)
            iotlb = self._translations.iotlb if self.translating else None
            self._space = AddressSpace(shared.table, iotlb)

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
        with self._queues_detached():
            old, self._inflight = self._inflight, region
            if old is not None:
                old.close()

    def set_vring_num(self, index: int, num: int) -> None:
        """See :class:`SessionHandler`."""
        self._queues[index].set_num(num)

    def set_vring_addr(self, index: int, address: VringAddr) -> None:
        """See :class:`SessionHandler`."""
        queue = self._queues[index]
        queue.set_address(address, self._announce_stop([queue]))

    def set_vring_base(self, index: int, base: int) -> None:
        """See :class:`SessionHandler`."""
        self._queues[index].set_base(base)

    def get_vring_base(self, index: int) -> int:
        """See :class:`SessionHandler`."""
        queue = self._queues[index]
        queue.stop(self._announce_stop([queue]))
        self._forget_translations()
        return queue.base

    def set_vring_enable(self, index: int, enable: bool) -> None:
        """See :class:`SessionHandler`."""
        self._queues[index].enable(enable)

    def set_vring_kick(self, index: int, fd: int | None) -> None:
        """See :class:`SessionHandler`."""
        try:
            self._forget_translations()
            self._out_of_time = False
        except BaseException:
            close_foreign([] if fd is None else [fd])
            raise
        self._queues[index].set_kick(fd)

    def set_vring_call(self, index: int, fd: int | None) -> None:
        """See :class:`SessionHandler`."""
        self._queues[index].set_call(fd)

    def set_vring_err(self, index: int, fd: int | None) -> None:
        """See :class:`SessionHandler`."""
        self._queues[index].set_err(fd)

    def get_config(self, offset: int, size: int) -> bytes:
        """See :class:`SessionHandler`."""
        config = check_config(self._device, self._call_device("config"))
        return config[offset : offset + size].ljust(size, b"\0")

    def set_config(self, offset: int, data: bytes, flags: int) -> None:
        """See :class:`SessionHandler`."""
        if flags & ConfigFlag.LIVE_MIGRATION:
            raise DeviceError("migration of this device's state is not supported")
        self._call_device("write_config", offset, data)

    def get_status(self) -> int:
        """See :class:`SessionHandler`."""
        return self._status

    def set_status(self, status: int) -> None:
        """See :class:`SessionHandler`.

        QEMU sets 0 at each stop, also when it only pauses the guest (`vhost_user_reset_status`),
        so what is in flight is not forgotten. Up to version 7.2 it does so before it asks where the
        queues stopped, so that is not forgotten either.
        """
        if status == 0:
            self._reset(keep_base=True)
        self._status = status

    def reset_device(self) -> None:
        """See :class:`SessionHandler`."""
        self._reset()
        if self._inflight is not None:
            for index in range(min(len(self._queues), self._inflight.description.num_queues)):
                self._inflight.queue(index).forget()

    def _reset(self, *, keep_base: bool = False) -> None:
        self._reset_queues(keep_base=keep_base)
        self._status = 0
        self._reset_device()

    def iotlb(self, message: IotlbMessage) -> None:
        """See :class:`SessionHandler`."""
        iova, size = message.iova, message.size
        if self._translations.apply(message, self._stop_timeout):
            return
        for queue in self._queues:
            queue.give_up(iova, size)
        if not self._translations.unused(iova, size, COPY_GRACE):
            raise DeviceError(
                f"the memory at {iova:#x}+{size:#x} is still in use: the device has not come back "
                "from a system call or from process"
            )

    def _wake_all(self, indices: Iterable[int]) -> None:
        for index in indices:
            self._queues[index].wake()

    def _make_ring(self, queue: Virtqueue) -> SplitRing | None:
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
        inflight = None if self._inflight is None else self._inflight.queue(queue.index)
        if inflight is not None and inflight.size < num:
            # QEMU 10.0.13 gives drivers 1024 entries and asks to track as many as its option says.
            # Without notes requests are shown in order, so that nothing is lost either.
            self._bursts.report(
                "queue %d of %d entries: its requests are not tracked, the region for requests in "
                "flight has room for %d",
                queue.index,
                num,
                inflight.size,
            )
            inflight = None
        return SplitRing(
            self._space,
            num,
            desc,
            avail,
            used,
            event_idx=event_idx,
            indirect=bool(self._negotiated >> VIRTIO_F_INDIRECT_DESC & 1),
            base=queue.base,
            ordered=inflight is None,
            inflight=inflight,
            turn_bytes=TURN_BYTES,
            quota=self._quota,
        )

    def _broken(self, queue: Virtqueue, error: GuestioError) -> None:
        """Report a queue that its driver ruined; the others go on. From any thread."""
        LOG.report(log, logging.ERROR, "queue %d stopped: %s", queue.index, error)
        self._poller.again(self._need_reset)

    def _need_reset(self) -> None:
        self._stats.queue_errors += 1
        self._status |= Status.NEEDS_RESET

    def set_backend_channel(self, fd: int) -> None:
        """See :class:`SessionHandler`."""
        self._translations.set_acknowledged(
            bool(self._session.protocol_features & ProtocolFeature.REPLY_ACK)
        )
        self._translations.set_channel(fd)


def _outstanding(queues: Sequence[Virtqueue]) -> int:
    return sum(queue.outstanding for queue in queues)


def check_config(device: Device, config: object) -> bytes:
    """What ``device.config()`` returned, if that is a configuration space.

    Raises:
        DeviceError: It is not.
    """
    if not isinstance(config, (bytes, bytearray)):
        raise DeviceError(
            f"{type(device).__name__}.config returned {reprlib.repr(config)}; return bytes"
        )
    return bytes(config)
