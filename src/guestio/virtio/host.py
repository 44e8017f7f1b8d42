"""A device with its queues, features, status and configuration, for any transport.

A transport sets the host up for one driver after the other, and the device uses it to speak first:
it takes buffers, sends data, watches descriptors and sets timers.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import reprlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol

from guestio._core.iommu.address_space import AddressSpace
from guestio._core.memory.vector import RegionTable
from guestio._core.virtio.chain import Quota
from guestio._core.virtio.inflight import InflightQueue
from guestio._core.virtio.split import SplitRing
from guestio.addr import check_address, check_int, shown
from guestio.budgets import COPY_GRACE, OUTSTANDING_PIECES, PERSIST_TIMEOUT, TURN_BYTES
from guestio.errors import DeviceError, GuestioError, naming
from guestio.iommu.events import Event
from guestio.memory import GuestRegionCollection
from guestio.ratelog import LOG
from guestio.trace import What, event, new_origin
from guestio.virtio import saved
from guestio.virtio.calls import LoopCalls
from guestio.virtio.device import (
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_IN_ORDER,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_RING_RESET,
    VIRTIO_F_VERSION_1,
    Device,
    Status,
)
from guestio.virtio.layout import RingLayout
from guestio.virtio.loop import EventLoop, LoopThread
from guestio.virtio.queue import DeviceQueue
from guestio.virtio.statistics import Statistics
from guestio.virtio.translator import PhysicalTranslator, Translator

log = logging.getLogger("guestio.virtio")

PERSIST_LOOK = 0.1
"""Seconds between looks whether the server is to stop, while a device writes out what it has."""


class Transport(Protocol):
    """What a host asks of the wire that sets it up."""

    @property
    def tracked(self) -> bool:
        """Whether requests in flight are noted, for a successor after a crash."""
        ...

    def ring_layout(self, index: int, *, event_idx: bool) -> RingLayout | None:
        """Where a ring is, in the addresses of the host's memory; None if that is not set up.

        Raises:
            GuestioError: It is nowhere that the device can reach; the queue is broken then.
        """
        ...

    def inflight_notes(self, index: int, size: int) -> InflightQueue | None:
        """Where to note which requests of a queue are in flight, or None."""
        ...

    def config_changed(self) -> None:
        """Tell the driver that the configuration space has changed. In the loop's thread."""
        ...


class _NoTransport:
    """Between two drivers: no queue is set up."""

    tracked = False

    def ring_layout(self, index: int, *, event_idx: bool) -> RingLayout | None:
        return None

    def inflight_notes(self, index: int, size: int) -> InflightQueue | None:
        return None

    def config_changed(self) -> None:
        """Do nothing: a driver reads the configuration space when it begins."""


class DeviceHost(LoopCalls):
    """A device and what a transport drives of it.

    A device is handed its host by `Device.attached`, and uses :meth:`queue`,
    :meth:`config_changed`, :meth:`add_reader`, :meth:`remove_reader`, :meth:`call_later` and
    :meth:`call_soon_threadsafe`. The rest is for transports.

    A transport makes a host, tells the device (`Device.attached`), and for each driver

    1. connects: :meth:`connect`, with itself and a translator;
    2. tells what was negotiated: :meth:`set_features`; the host does not check that it was offered;
    3. gives the driver's memory: :meth:`set_memory`, which may come again at any time;
    4. starts queues: :meth:`start_over`, then ``queue.set_base``, ``set_call``, ``set_err``,
       ``set_kick`` and ``enable(True)``, with eventfds that the queue owns from then on. The queue
       asks :meth:`Transport.ring_layout` where its ring is once it is announced something;
    5. stops them: :meth:`stop` says where to go on, for a later ``set_base``. Before a ring's
       layout changes while its queue runs: :meth:`move`. When the driver resets the device:
       :meth:`reset`;
    6. lets go: all steps of :meth:`disconnect`. Memory may be unmapped after them.

    While a driver is served, a revocation of a translation takes it out of the translator's
    ``iotlb``, waits for its users (``iotlb.drain``) for ``stop_timeout`` seconds, has
    :meth:`give_up` fail the requests that still use it, and waits once more. All this is called in
    the loop's thread; nothing else may run the loop. ``tests/kit/in_process.py`` is a whole
    transport.

    Args:
        device: What is hosted.
        loop: Serves it.
        statistics: Where to count.
        stop_timeout: Seconds that a stop waits for requests that the device holds.
        poll_us: Microseconds to look out for a request before sleeping.
        queue_threads: Whether to serve each queue in a thread of its own.
        failed: Called with what a callback in such a thread raised.
        origin: Its number in records of tracepoints; None for a new one.

    Attributes:
        device: What is hosted.
        queues: Its queues.
        features: Feature bits that were negotiated; a reset of the device leaves them, and the
            device is told again.
        status: Device status, `Status` bits.
        translator: Requests translations.
        threaded: Whether each queue is served in a thread of its own.
        has_successor: Whether another device may go on with the queues after a crash: requests that
            are not noted are published in the order of the ring then, so that the used index says
            where to go on. For the transport to set.
        ending: Whether the server is to stop, which ends a wait for the device's medium. For the
            transport to set.
        origin: Its number in records of tracepoints.
        ring_format: Given the index of a queue, says what makes its rings, with the arguments of
            `SplitRing`. For a device to set when it is attached, if it is to test its driver.
        seen_translator: Given a driver's translator, says which one queues are to use. For the
            same.
    """

    def __init__(
        self,
        device: Device,
        loop: EventLoop,
        statistics: Statistics,
        *,
        stop_timeout: float,
        poll_us: int = 0,
        queue_threads: bool = False,
        failed: Callable[[BaseException], None] | None = None,
        origin: int | None = None,
    ) -> None:
        self.device = device
        self.origin = new_origin() if origin is None else origin
        self.statistics = statistics
        self.error_status = device.error_status
        self.stop_timeout = stop_timeout
        self.poll_seconds = poll_us / 1e6
        self.threaded = queue_threads
        self.translator: Translator = PhysicalTranslator()
        self.features = 0
        self._told: int | None = None
        self.status = 0
        self.has_successor = True
        self.ending: Callable[[], bool] = bool
        self.ring_format: Callable[[int], Callable[..., SplitRing]] = _honest_format
        self.seen_translator: Callable[[Translator], Translator] = _as_it_is
        super().__init__(type(device).__name__, loop)
        self._transport: Transport = _NoTransport()
        self._space = AddressSpace(RegionTable([]))
        self._quota = Quota(OUTSTANDING_PIECES)
        self._out_of_time = False
        # Whether a queue was started since the device was last told that all have stopped.
        self._ran = False
        # What the device knew when it was reset, if its driver may go on all the same.
        self._kept: bytes | None = None
        self._config_told = False
        self._changes: list[None] = []
        self._threads: list[LoopThread] = []
        _check_device_queues(device)
        with contextlib.ExitStack() as undo:
            for index in range(device.num_queues if queue_threads else 0):
                thread = LoopThread(f"guestio-queue-{index}", failed or _log_failure)
                undo.callback(thread.close)
                self._threads.append(thread)
            self.queues = [
                DeviceQueue(index, self, self._threads[index].loop if queue_threads else loop)
                for index in range(device.num_queues)
            ]
            undo.pop_all()

    def __repr__(self) -> str:
        return (
            f"<DeviceHost of {type(self.device).__name__}: status {Status(self.status)!r}, "
            f"features {self.features:#x}, {len(self.queues)} queues>"
        )

    # What the device uses.

    def queue(self, index: int) -> DeviceQueue:
        """A queue of the device, also while it does not run.

        Raises:
            DeviceError: The device has no such queue.
        """
        try:
            if 0 <= index < len(self.queues):
                return self.queues[index]
        except TypeError:
            raise TypeError(
                f"{self._owner} calls queue with {reprlib.repr(index)}, which is no index"
            ) from None
        raise DeviceError(f"{self._owner} has {len(self.queues)} queues, not a queue {index}")

    def config_changed(self) -> None:
        """Tell the driver that the configuration space has changed. From any thread.

        A driver whose queues do not run yet is told once one does. Changes that come before the
        driver has dealt with one are told together.
        """
        if not self._config_told:
            self._config_told = True
            self._loop.call_soon_threadsafe(self._tell_config_changed)

    def _tell_config_changed(self) -> None:
        # Before it is told: what changes meanwhile is told again.
        self._config_told = False
        self._transport.config_changed()

    # What a transport drives.

    def connect(self, transport: Transport, translator: Translator) -> None:
        """Serve a driver; the host is as after a reset."""
        self._transport, self.translator = transport, self.seen_translator(translator)

    def disconnect(self) -> list[Callable[[], object]]:
        """The steps that end serving a driver, to be called in their order, whatever one raises."""
        until = time.monotonic() + self.stop_timeout

        def forget() -> None:
            self._transport, self.translator = _NoTransport(), PhysicalTranslator()
            self._space = AddressSpace(RegionTable([]))
            self.features = self.status = 0
            self._out_of_time = self._ran = False
            self._kept = None

        def stop(queue: DeviceQueue) -> Callable[[], object]:
            return lambda: queue.reset(until)

        return [
            lambda: self.announce_stop(self.queues),
            *(stop(queue) for queue in self.queues),
            forget,
            self._reset_device,
        ]

    def close(self) -> None:
        """End the threads of queues, once no driver is served. Calling it again does nothing."""
        for thread in self._threads:
            thread.close()

    def set_features(self, features: int) -> None:
        """Tell the device what was negotiated, unless it was told since its last reset.

        Raises:
            GuestioError: The device refuses it; nothing changed.
        """
        if features != self._told:
            self.call_device("negotiated", features)
            self._told = features
        self.features = features

    def change_memory(self, space: AddressSpace) -> None:
        """Use other memory; rings and translations are looked up again. All queues are detached.

        To be called within :meth:`detached`; :meth:`set_memory` is simpler.
        """
        self._space = space

    def set_memory(
        self, memory: GuestRegionCollection, translator: Translator | None = None
    ) -> None:
        """Use a driver's memory, and another translator; all queues are detached meanwhile.

        Args:
            memory: All of the driver's memory that the device may reach.
            translator: Requests translations from now on, and knows them: its ``iotlb`` is in front
                of the memory. None for the one of before.
        """
        with self.detached():
            if translator is not None:
                self.translator = translator
            iotlb = self.translator.iotlb
            self._space = AddressSpace(memory._space.regions, None if iotlb is None else iotlb._map)

    def replace_memory(self, space: AddressSpace) -> None:
        """Go on in other memory that shows the same translations, without stopping any queue.

        Requests that were taken keep the memory that they have, and its leases.
        """
        self._space = space
        for queue in self.queues:
            queue.rebind(space)

    @property
    def space(self) -> AddressSpace:
        """The driver's memory as queues reach it."""
        return self._space

    @property
    def tracked(self) -> bool:
        """Whether requests in flight are noted, for a successor after a crash."""
        return self._transport.tracked

    @contextlib.contextmanager
    def detached(self) -> Iterator[None]:
        """Nothing of the driver's memory is in use, in any thread, inside this context."""
        until = self.announce_stop(self.queues)
        with self.changing_queues(), contextlib.ExitStack() as locks:
            for queue in self.queues:
                locks.enter_context(queue.lock)
                queue.detach(until)
            yield

    @contextlib.contextmanager
    def changing_queues(self) -> Iterator[None]:
        """Note that the device may be waited for inside this context, with locks held."""
        self._changes.append(None)
        try:
            yield
        finally:
            self._changes.pop()

    @property
    def changing(self) -> bool:
        """Whether a thread stops or changes queues: the device is not to wait for their locks."""
        return bool(self._changes)

    def stop(self, index: int) -> int:
        """Stop a queue; where to begin when it is started again, by whichever device.

        With the last one, also if it was reset before, the device makes what it acknowledged
        visible to another host.
        """
        queue = self.queues[index]
        base = queue.stop(self.announce_stop([queue]))
        if self._ran and not self.live:
            self._ran = False
            self._persist()
        return base

    def _persist(self) -> None:
        """Have the device make what it acknowledged visible to another host."""
        try:
            over = self.call_device("stopped")
        except GuestioError as error:
            # The queues have stopped all the same.
            self.log.report("%s.stopped: %s", type(self.device).__name__, error)
            return
        if not isinstance(over, Event):
            return
        until = time.monotonic() + PERSIST_TIMEOUT
        while not over.wait(PERSIST_LOOK):
            if self.ending() or time.monotonic() >= until:
                self.log.report(
                    "%s: what it acknowledged is not on the medium yet; its guest must not go on "
                    "at another host",
                    type(self.device).__name__,
                )
                return

    def move(self, index: int) -> None:
        """Make a queue's ring anew before its next use: the transport has another layout."""
        queue = self.queues[index]
        queue.detach(self.announce_stop([queue]))

    @property
    def live(self) -> bool:
        """Whether the driver may announce requests on any queue."""
        return any(queue.live for queue in self.queues)

    def reset(self, *, keep_base: bool = False) -> None:
        """Stop all queues, forget their set-up, and reset the device.

        Args:
            keep_base: Whether to remember where queues stopped, and what the device knew: it may be
                no more than a pause.

        Raises:
            DeviceError: The device's ``reset`` raised; the queues are reset all the same.
        """
        event(What.RESET, origin=self.origin)
        until = self.announce_stop(self.queues)
        for queue in self.queues:
            queue.reset(until, keep_base=keep_base)
        self.status = 0
        if not keep_base:
            self._kept = None
        elif self._told is not None:
            self._kept = self._keep()
        self._reset_device()

    def _keep(self) -> bytes | None:
        """What the device knows of its driver; None if that is nothing, or cannot be told."""
        if getattr(self.device.save, "__func__", None) is Device.save:
            return None
        try:
            return self._save()
        except GuestioError as error:
            self.log.report(
                "%s forgets its driver, who may go on: %s", type(self.device).__name__, error
            )
            return None

    def _save(self) -> bytes:
        state = self.call_device("save")
        name = type(self.device).__name__
        if not isinstance(state, (bytes, bytearray)):
            raise DeviceError(f"{name}.save returned {reprlib.repr(state)}; return bytes")
        if len(state) > self.device.max_state:
            raise DeviceError(
                f"{name}.save returned {len(state)} bytes; its max_state is {self.device.max_state}"
            )
        return bytes(state)

    def save(self) -> bytes:
        """The device's state as it travels, once no queue runs; that of before, if it was reset.

        Raises:
            GuestioError: The device cannot tell it.
        """
        state = self._save() if self._kept is None else self._kept
        return saved.wrap(self.device, state)

    def restore(self, state: bytes) -> None:
        """Have the device go on as another one did, while no queue runs; see :meth:`save`.

        Raises:
            GuestioError: It is no state of this device's. It is as before if that was seen by what
                it is wrapped in, else reset.
        """
        self._restore(saved.unwrap(self.device, state))

    def _restore(self, state: bytes) -> None:
        self._kept = None
        self._reset_device()
        try:
            self.call_device("restore", state)
        except GuestioError:
            self._reset_device()
            raise

    def begin_at(self, index: int, base: int) -> None:
        """Say where a queue begins when it is started.

        If the device was reset by a status of 0, that tells whether its driver goes on: one that
        begins anew begins at 0. QEMU sets this status also when it only pauses its guest, or when
        a migration fails after that.
        """
        queue = self.queues[index]
        kept = self._kept
        if kept is not None and (base or queue.base):
            self._kept = None
            if base:
                try:
                    self._restore(kept)
                except GuestioError as error:
                    self.log.report("the device forgot its driver, who goes on: %s", error)
        queue.set_base(base)

    def _reset_device(self) -> None:
        self._told = None
        try:
            over = self.call_device("reset")
        except GuestioError as error:
            # The queues are reset all the same.
            self.log.report("the device was not reset: %s", error)
            return
        limit = self.stop_timeout + COPY_GRACE
        if isinstance(over, Event) and not over.wait(limit):
            self.log.report(
                "%s.reset: what the driver gave the device is still in use after %g s",
                type(self.device).__name__,
                limit,
            )

    def start_over(self) -> None:
        """Give the device its whole time again: a queue is set up anew.

        A device that was reset is told what is negotiated, if its transport has not done so: not
        every front-end repeats the features.

        Raises:
            GuestioError: The device refuses them.
        """
        self._out_of_time = False
        self._ran = True
        if self._told is None and self.features:
            self.set_features(self.features)

    def announce_stop(self, queues: Sequence[DeviceQueue]) -> float:
        """Have the device finish what it holds of some queues; until when to wait for it.

        A front-end stops its queues one by one. A device that used up its time for one of them
        gets a tenth for each of the others.
        """
        until = time.monotonic() + self.stop_timeout * (0.1 if self._out_of_time else 1)
        for queue in queues:
            queue.announce_stop()
        for queue in queues:
            queue.await_turn()
        return until

    def given_up(self) -> None:
        """Note that the device did not answer requests in the time that a stop may take."""
        self._out_of_time = True

    def give_up(self, iova: int, size: int) -> None:
        """Fail the requests that the device holds and that use a range of addresses."""
        for queue in self.queues:
            queue.give_up(iova, size)

    def read_config(self, offset: int, size: int) -> bytes:
        """Bytes of the configuration space; beyond its end they are 0.

        Raises:
            GuestioError: The device raised it, or returned no bytes.
        """
        config = check_config(self.device, self.call_device("config"))
        return config[offset : offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """Hand the device what the driver wrote to the configuration space.

        Raises:
            GuestioError: The device refuses it.
        """
        self.call_device("write_config", offset, data)

    def call_device(self, name: str, *args: object) -> object:
        """Call a method of the device.

        Raises:
            DeviceError: It raised an exception that is not guestio's; that is logged.
        """
        try:
            return getattr(self.device, name)(*args)
        except (GuestioError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            called, kind = f"{type(self.device).__name__}.{name}", type(error).__name__
            self.log.report("%s raised", called, trace=True)
        # Outside of the handler: the device's error would be this one's context.
        raise DeviceError(f"{called} raised {kind}")

    # What queues use.

    def make_ring(self, queue: DeviceQueue) -> SplitRing | None:
        """The ring of a queue, where the transport says it is; None if it is not set up."""
        event_idx = bool(self.features >> VIRTIO_F_EVENT_IDX & 1)
        layout = self._transport.ring_layout(queue.index, event_idx=event_idx)
        if layout is None:
            return None
        inflight = self._transport.inflight_notes(queue.index, layout.size)
        return self.ring_format(queue.index)(
            self._space,
            layout.size,
            layout.desc,
            layout.avail,
            layout.used,
            event_idx=event_idx,
            indirect=bool(self.features >> VIRTIO_F_INDIRECT_DESC & 1),
            base=queue.base,
            ordered=bool(self.features >> VIRTIO_F_IN_ORDER & 1)
            or (self.has_successor and inflight is None),
            inflight=inflight,
            batch_bytes=TURN_BYTES,
            quota=self._quota,
        )

    def broken(self, queue: DeviceQueue, error: GuestioError) -> None:
        """Report a queue that its driver ruined; the others go on. From any thread."""
        LOG.report(log, logging.ERROR, "queue %d stopped: %s", queue.index, error)
        self._loop.call_soon_threadsafe(self._need_reset)

    def _need_reset(self) -> None:
        self.statistics.queue_errors += 1
        self.status |= Status.NEEDS_RESET

    def wake(self, indices: Iterable[int]) -> None:
        """Have queues served: what they lacked may be there."""
        for index in indices:
            self.queues[index].resume()

    @property
    def quota(self) -> Quota:
        """Limits the memory of requests that the device holds."""
        return self._quota

    @property
    def outstanding(self) -> int:
        """Requests that the device holds."""
        return sum(queue.outstanding for queue in self.queues)


def _check_device_queues(device: Device) -> None:
    name = f"{type(device).__name__}.device_queues"
    try:
        indices = list(device.device_queues)
    except TypeError:
        raise TypeError(f"{name} must be a collection of queue indices") from None
    for index in indices:
        if not 0 <= check_int(index, name) < device.num_queues:
            raise ValueError(f"{name} has {index}; the device has {device.num_queues} queues")


def _honest_format(_index: int) -> Callable[..., SplitRing]:
    return SplitRing


def _as_it_is(translator: Translator) -> Translator:
    return translator


def _log_failure(error: BaseException) -> None:
    LOG.report(log, logging.ERROR, "a queue's thread failed", trace=error)


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


def check_device(device: object, most_queues: int) -> Device:
    """A device that a transport can serve.

    Args:
        device: The device.
        most_queues: How many queues the transport has for one.

    Raises:
        TypeError: It is no device, lacks its type, or a number is none.
        ValueError: A number is out of its range.
        DeviceError: Its ``config()`` returned no bytes.
        DeviceMethodError: Its ``config()`` raised something that is no `GuestioError`.
    """
    if not isinstance(device, Device):
        hint = ": make one of it" if isinstance(device, type) else ""
        raise TypeError(f"device must be a guestio Device, not {device!r}{hint}")
    name = type(device).__name__
    device_id: Any = getattr(device, "device_id", None)
    if device_id is None:
        raise TypeError(f"{name}.device_id is missing: the type of the device")
    check_int(device_id, f"{name}.device_id")
    if not 1 <= check_int(device.num_queues, "num_queues") <= most_queues:
        raise ValueError(f"num_queues {device.num_queues} is not in 1..{most_queues}")
    if device.error_status is not None and not (
        0 <= check_int(device.error_status, f"{name}.error_status") <= 255
    ):
        raise ValueError(
            f"{name}.error_status {shown(device.error_status)} is not in 0..255, nor None"
        )
    check_address(device.offered_features, f"{name}.features")
    if not 0 <= check_int(device.state_version, f"{name}.state_version") < 1 << 32:
        raise ValueError(f"{name}.state_version {shown(device.state_version)} is not in 0..2**32-1")
    if check_int(device.max_state, f"{name}.max_state") < 0:
        raise ValueError(f"{name}.max_state {shown(device.max_state)} is negative")
    with naming(device, "config"):
        config = device.config()
    check_config(device, config)
    _check_processes(device)
    return device


def transport_features(
    *, iommu: str, indirect: str, in_order: bool = False, ring_reset: bool = False
) -> int:
    """The features that a transport offers beside its device's.

    Args:
        iommu: ``"auto"`` or ``"off"``: whether the device may be behind an IOMMU.
        indirect: ``"on"``, ``"off"``, or ``"auto"``, which is on where no IOMMU may be.
        in_order: Whether to offer VIRTIO_F_IN_ORDER.
        ring_reset: Whether to offer VIRTIO_F_RING_RESET.

    Raises:
        ValueError: A word is none of these.
    """
    if iommu not in ("auto", "off"):
        raise ValueError(f"iommu {iommu!r} is neither 'auto' nor 'off'")
    if indirect not in ("auto", "on", "off"):
        raise ValueError(f"indirect {indirect!r} is neither 'auto' nor 'on' nor 'off'")
    offered = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_EVENT_IDX
    if iommu == "auto":
        offered |= 1 << VIRTIO_F_ACCESS_PLATFORM
    if indirect == "on" or (indirect == "auto" and iommu == "off"):
        offered |= 1 << VIRTIO_F_INDIRECT_DESC
    if in_order:
        offered |= 1 << VIRTIO_F_IN_ORDER
    if ring_reset:
        offered |= 1 << VIRTIO_F_RING_RESET
    return offered


def statistics_of(device: Device) -> Statistics:
    """Counters that include what the device counts by itself."""
    return Statistics(device_failures=functools.partial(_failures, device))


def _check_processes(device: Device) -> None:
    """Refuse a device that has a queue for `Device.process`, and does not provide that."""
    if getattr(device.process, "__func__", None) is not Device.process:
        return
    owned = device.device_queues
    if isinstance(owned, Collection):
        for index in range(device.num_queues):
            if index not in owned:
                raise TypeError(
                    f"{type(device).__name__} has no process method for the requests of queue "
                    f"{index}, which is not in its device_queues"
                )


def _failures(device: Device) -> int:
    """What a device counts, or 0 if it does not."""
    try:
        return operator.index(device.failures)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        name = type(device).__name__
        LOG.report(log, logging.ERROR, "%s.failures is no number", name, trace=True)
        return 0
