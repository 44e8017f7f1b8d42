"""A virtio device as a PCI function, by the PCI transport of virtio 1.x without its legacy part.

Source: virtio 1.4 section 4.1 "Virtio Over PCI Bus"; linux/virtio_pci.h.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from guestio._core.base.syscalls import notify_eventfd
from guestio._core.iommu.address_space import AddressSpace
from guestio._core.memory.vector import RegionTable
from guestio._core.pci.doorbell import EventfdDoorbell
from guestio._core.virtio.split import area_bytes
from guestio.addr import IovaRange, check_int, check_seconds
from guestio.budgets import BUS_LOOK, BUS_PATIENCE, LONGEST_TIMEOUT, STOP_TIMEOUT
from guestio.errors import GuestioError, QueueError, naming
from guestio.iommu import Iotlb
from guestio.memory.backing import close_fd
from guestio.pci.capabilities import BarWindow, Capability, Layout, PciExpress, PowerManagement
from guestio.pci.device import Bar, PciDevice
from guestio.virtio.device import VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1, Device, DeviceId, Status
from guestio.virtio.host import DeviceHost, check_device, statistics_of, transport_features
from guestio.virtio.layout import RingLayout, check_size
from guestio.virtio.local import Bell
from guestio.virtio.translator import Miss, Page

if TYPE_CHECKING:
    from guestio._core.virtio.inflight import InflightQueue
    from guestio.pci.host import PciHost
    from guestio.pci.interrupts import Trigger
    from guestio.virtio.loop import EventLoop

VENDOR: Final = 0x1AF4
FIRST_ID: Final = 0x1040
"""A device's identifier is this and its type (section 4.1.2.1)."""
MOST_TYPES: Final = 0x40
MAX_QUEUES: Final = 256
NO_VECTOR: Final = 0xFFFF

PAGE: Final = 4096
COMMON: Final = 0
ISR: Final = PAGE
CONFIG: Final = 2 * PAGE
NOTIFY_STEP: Final = 4
"""Bytes between the places where two queues are notified."""

_COMMON_LAYOUT: Final = struct.Struct("<IIIIHHBBHHHHHQQQHH")
"""``struct virtio_pci_common_cfg`` up to ``queue_reset`` (section 4.1.4.3)."""
_GENERATION: Final = 0x15

_INTERRUPTS: Final = ("msix", "intx")

ISR_QUEUE: Final = 1
ISR_CONFIG: Final = 2

_CLASSES: Final[dict[int, int]] = {
    DeviceId.NET: 0x020000,
    DeviceId.BLOCK: 0x010000,
    DeviceId.CONSOLE: 0x078000,
    DeviceId.INPUT: 0x098000,
    DeviceId.IOMMU: 0x080600,
}
"""Class codes by type; a driver goes by vendor and device alone."""

_WRITABLE_STATUS: Final = (
    Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK | Status.FEATURES_OK | Status.FAILED
)


@dataclass(frozen=True)
class VirtioCapability(Capability):
    """Says where a part of the transport is (section 4.1.4).

    Attributes:
        kind: 1 for the common configuration, 2 for notifications, 3 for the ISR status, 4 for the
            device's own configuration.
        offset: Where it is in BAR 0.
        length: Its bytes.
        more: What is behind that, for notifications.
    """

    number = 0x09
    kind: int
    offset: int
    length: int
    more: bytes = b""

    def layout(self) -> Layout:
        """See :class:`Capability`."""
        size = 16 + len(self.more)
        head = struct.pack("<BBBB2xII", size, self.kind, 0, 0, self.offset, self.length)
        return Layout(head + self.more)


class _Call(Bell):
    """An eventfd that a queue signals and the event loop reads."""

    def __init__(self, loop: EventLoop, callback: Callable[[], object]) -> None:
        super().__init__()
        self._loop, self._callback = loop, callback
        try:
            loop.add_reader(self.fileno(), self._read)
        except BaseException:
            super().close()
            raise

    def _read(self) -> None:
        if self.has_rung():
            self._callback()

    def close(self) -> None:
        self._loop.remove_reader(self.fileno())
        super().close()


class _Shared:
    """An eventfd that the client has, too: an interrupt or a notification, nothing in between."""

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)

    def fileno(self) -> int:
        """See :class:`~guestio.virtio.queue.Doorbell`."""
        return self._fd

    def close(self) -> None:
        """See :class:`~guestio.virtio.queue.Doorbell`."""
        close_fd(self._fd)


class BusTranslator:
    """Translations of a bus: what the client has mapped is all there is.

    A :class:`~guestio.virtio.translator.Translator`. A client that rearranges its maps takes them
    away for a moment, so what is missing is looked for again for a while.

    Args:
        iotlb: What is mapped.
        loop: Calls back.
        wake: Called with the queues that are to look again.
        ring_lost: Called with a range that a queue cannot do without and that is not mapped; raises
            if that is a ring.
        refused: Called when a queue's access is given up, as what it is to is not mapped for it.
    """

    feed = None
    patience = BUS_PATIENCE

    def __init__(
        self,
        iotlb: Iotlb,
        loop: EventLoop,
        wake: Callable[[Iterable[int]], None],
        ring_lost: Callable[[IovaRange], None],
        refused: Callable[[], None],
    ) -> None:
        self.iotlb = iotlb
        self._count_refused = refused
        self._loop = loop
        self._wake = wake
        self._ring_lost = ring_lost
        self._refused: dict[int, set[Page]] = {}

    def request(self, waiter: int, missing: Iterable[Miss]) -> None:
        """Have the queue look again; see :class:`~guestio.virtio.translator.Translator`."""
        when = time.monotonic() + BUS_LOOK
        self._loop.set_timer((self, waiter), when, lambda: self._wake([waiter]))

    def refused(self, waiter: int) -> set[Page]:
        """Nothing is refused: time decides."""
        return self._refused.setdefault(waiter, set())

    def under_way(self, where: IovaRange, access: int) -> bool:
        """No answer is to come."""
        return False

    def forget(self, waiter: int) -> None:
        """See :class:`~guestio.virtio.translator.Translator`."""
        self._loop.clear_timer((self, waiter))

    def report_failed(self, lacking: list[Miss], forbidden: list[Miss]) -> None:
        """See :class:`~guestio.virtio.translator.Translator`."""
        self._count_refused()
        if not forbidden:
            for where, _ in lacking:
                self._ring_lost(where)


@dataclass
class _Ring:
    """What the driver has set of a queue.

    Attributes:
        size: Entries.
        vector: MSI-X vector of its notifications.
        enabled: Whether it may be used.
        parts: Addresses of descriptor table, available ring and used ring, in 32-bit halves.
        kick: What has the queue served, while it is started.
        call: What the queue signals then, if the event loop reads it.
        trigger: What it signals, if that is the client's.
    """

    size: int
    vector: int = NO_VECTOR
    enabled: bool = False
    parts: list[int] | None = None
    kick: _Shared | None = None
    call: _Call | None = None
    trigger: Trigger | None = None

    def addresses(self) -> tuple[int, int, int]:
        halves = self.parts or [0] * 6
        desc, avail, used = (halves[at] | halves[at + 1] << 32 for at in (0, 2, 4))
        return desc, avail, used

    def layout(self) -> RingLayout:
        return RingLayout(self.size, *self.addresses())


class VirtioPci(PciDevice):
    """A virtio device as a PCI function (virtio 1.x; vendor 0x1af4, device 0x1040 + type).

    Its rings and buffers are in what its function reaches by DMA, which behind an IOMMU is what the
    guest's driver has mapped at that moment. It has an MSI-X vector for each queue and one for
    changes of the configuration, and the pin INTA for drivers that use none or with
    ``interrupts="intx"``; function level reset; and VIRTIO_F_RING_RESET.

    Args:
        device: What to serve; it is the caller's to close.
        iommu: ``"auto"`` lets the driver decide whether its addresses are those of an IOMMU
            (VIRTIO_F_ACCESS_PLATFORM), which Linux needs behind one; ``"off"`` does not offer it.
        indirect: Whether to offer VIRTIO_F_INDIRECT_DESC. ``"auto"`` does so only with
            ``iommu="off"``: behind an IOMMU, each request's table costs the guest a map and an
            unmap.
        in_order: Whether to offer VIRTIO_F_IN_ORDER.
        queue_size: Entries that a driver may give each queue at most, a power of two up to 32768.
        stop_timeout: Seconds that a stop waits for requests that the device holds, whether the
            driver resets a queue or the function, switches bus mastering off, or goes, at most
            3600; then they fail.
        poll_us: Microseconds to look out for the next request before sleeping.
        interrupts: ``"msix"``; or ``"intx"`` for the pin alone, with which the device can be
            unplugged from QEMU 11.1, that MSI-X makes abort. Each interrupt by the pin costs a
            message and an answer more.

    Raises:
        TypeError, ValueError, DeviceError: Bad arguments, or the device is not described as one
            should be.

    Attributes:
        device: What is served.
        statistics: What happened to its requests and queues, over all clients.
        driver_errors: What drivers did that no driver should, and that was ignored.
    """

    vendor_id = VENDOR
    revision = 1
    subsystem_vendor_id = VENDOR
    subsystem_id = 0x1100

    def __init__(
        self,
        device: Device,
        *,
        iommu: Literal["auto", "off"] = "auto",
        indirect: Literal["auto", "on", "off"] = "auto",
        in_order: bool = False,
        queue_size: int = 256,
        stop_timeout: float = STOP_TIMEOUT,
        poll_us: int = 0,
        interrupts: Literal["msix", "intx"] = "msix",
    ) -> None:
        self.device = check_device(device, MAX_QUEUES)
        kind = device.device_id
        if not 1 <= kind < MOST_TYPES:
            raise ValueError(
                f"{type(device).__name__}.device_id {kind} is not in 1..{MOST_TYPES - 1}, for "
                "which there are PCI devices"
            )
        check_size(queue_size)
        self._offered = device.offered_features | transport_features(
            iommu=iommu, indirect=indirect, in_order=in_order, ring_reset=True
        )
        self._most = queue_size
        self._stop_timeout = check_seconds(stop_timeout, "stop_timeout", LONGEST_TIMEOUT)
        if check_int(poll_us, "poll_us") < 0:
            raise ValueError(f"poll_us {poll_us} must not be negative")
        self._poll_us = poll_us
        if interrupts not in _INTERRUPTS:
            raise ValueError(f"interrupts {interrupts!r} is none of {', '.join(_INTERRUPTS)}")
        self.msix = interrupts == "msix"
        self.statistics = statistics_of(device)
        self.device_id = FIRST_ID + kind
        self.class_code = _CLASSES.get(kind, 0xFF0000)
        self._vectors = device.num_queues + 1 if self.msix else 0
        self.interrupts = max(self._vectors, 1)
        self._config_bytes = len(device.config())
        self._notify = CONFIG + -(-self._config_bytes // PAGE) * PAGE
        notify_bytes = NOTIFY_STEP * device.num_queues
        self.bars = {0: Bar(1 << (self._notify + notify_bytes - 1).bit_length())}
        parts = [
            VirtioCapability(1, COMMON, _COMMON_LAYOUT.size),
            VirtioCapability(2, self._notify, notify_bytes, struct.pack("<I", NOTIFY_STEP)),
            VirtioCapability(3, ISR, 1),
        ]
        if self._config_bytes:
            parts.append(VirtioCapability(4, CONFIG, self._config_bytes))
        self.capabilities = [*parts, BarWindow(), PowerManagement(), PciExpress()]
        self.driver_errors = 0
        self._space: AddressSpace | None = None
        self._seen_config: bytes | None = None
        self._generation = 0
        self._clear()

    def __repr__(self) -> str:
        return f"<VirtioPci of {self.device!r}>"

    def _clear(self) -> None:
        """Have everything that a driver sets be as after a reset."""
        self._feature_half = self._driver_half = 0
        self._driver_features = [0, 0]
        self._unknown_features = False
        self._config_vector = NO_VECTOR
        self._selected = 0
        self._isr = 0
        self._config_due = False
        self._rings = [_Ring(self._most) for _ in range(self.device.num_queues)]

    @property
    def virtio(self) -> VirtioPci:
        """Itself; see :class:`PciDevice`."""
        return self

    # What a PCI host calls.

    def attached(self, host: PciHost) -> None:
        """See :class:`PciDevice`."""
        self._pci = host
        self._host = DeviceHost(
            self.device,
            host.loop,
            self.statistics,
            stop_timeout=self._stop_timeout,
            poll_us=self._poll_us,
            origin=host.origin,
        )
        # The driver's queues end with this device: no other one goes on with them.
        self._host.has_successor = False
        self.statistics.device_holds = lambda: self._host.outstanding
        self._host.connect(self, self._translator(None))
        host.interrupts.changed = self._route_all
        for index in range(len(self._rings)):
            host.offer_ioeventfd(0, self._place(index))
        with naming(self.device, "attached"):
            self.device.attached(self._host)

    @property
    def host(self) -> DeviceHost:
        """The host of the device that is served, once it is attached."""
        return self._host

    def reset(self) -> None:
        """See :class:`PciDevice`: stop all queues, and forget what the driver has set."""
        for index in range(len(self._rings)):
            self._silence(index)
        self._host.reset()
        self._clear()
        self._pci.set_pin(False)

    def memory_changed(self) -> None:
        """See :class:`PciDevice`: queues follow, and stand still while nothing can be reached."""
        space = self._pci.memory.reachable
        if space is self._space:
            return
        before, self._space = self._space, space
        if before is not None and space is not None and before._map is space._map:
            self._host.replace_memory(space)
            return
        with self._host.detached():
            self._host.translator = self._translator(space)
            self._host.change_memory(AddressSpace(RegionTable([])) if space is None else space)
        self._host.wake(range(len(self._rings)))

    def _translator(self, space: AddressSpace | None) -> BusTranslator:
        iotlb = Iotlb() if space is None or space._map is None else Iotlb._of(space._map)
        return BusTranslator(
            iotlb, self._pci.loop, self._host.wake, self._ring_lost, self._count_refused
        )

    def _count_refused(self) -> None:
        self._pci.memory.refused += 1

    def _ring_lost(self, where: IovaRange) -> None:
        """Break a queue whose ring is not mapped any more.

        Raises:
            QueueError: A range is in a ring in use.
        """
        first, end = where.base, where.base + where.length
        for index, ring in enumerate(self._rings):
            if not ring.enabled:
                continue
            sizes = area_bytes(ring.size, True)
            for start, length in zip(ring.addresses(), sizes, strict=True):
                if start < end and first < start + length:
                    raise QueueError(
                        f"the ring of queue {index} is not mapped any more: {first:#x}+"
                        f"{where.length:#x}"
                    )

    def revoked(self, address: int, size: int) -> None:
        """See :class:`PciDevice`: requests in that memory fail."""
        self._host.give_up(address, size)

    def read(self, bar: int, offset: int, size: int) -> int:
        """See :class:`PciDevice`."""
        if offset < _COMMON_LAYOUT.size:
            data = self._read_common(offset, size)
        elif offset == ISR:
            data = bytes([self._take_isr()])
        elif CONFIG <= offset < CONFIG + self._config_bytes:
            data = self._read_config(offset - CONFIG, size)
        else:
            data = b""
        return int.from_bytes(data, "little")

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        """See :class:`PciDevice`."""
        queue, beside = divmod(offset - self._notify, NOTIFY_STEP)
        if 0 <= queue < len(self._rings) and not beside:
            # Of queues that run it is the doorbell's.
            self._ignore(f"notifies queue {queue}, which does not run")
        elif offset < _COMMON_LAYOUT.size:
            self._write_common(offset, size, value)
        elif CONFIG <= offset < CONFIG + self._config_bytes:
            self._write_config(offset - CONFIG, value.to_bytes(size, "little"))
        else:
            self._ignore(f"writes {size} bytes at {offset:#x} of BAR {bar}, where nothing is")

    def _ignore(self, what: str) -> None:
        self.driver_errors += 1
        self._host.log.report("the driver of %s %s: ignored", type(self.device).__name__, what)

    # Notifications of the driver: a doorbell of the core, while the queue runs.

    def _place(self, index: int) -> int:
        """Where in BAR 0 a queue is notified."""
        return self._notify + NOTIFY_STEP * index

    def _notify_by(self, index: int, kick: _Shared) -> None:
        doorbell = EventfdDoorbell(kick.fileno())
        self._pci.add_doorbell(0, self._place(index), NOTIFY_STEP, doorbell)

    def _silence(self, index: int) -> None:
        """Take the notifications of a queue that is to stop; its kick is closed then."""
        ring = self._rings[index]
        if ring.kick is not None:
            ring.kick = ring.call = ring.trigger = None
            self._pci.remove_doorbell(0, self._place(index))

    # The common configuration (section 4.1.4.3).

    def _ring(self) -> _Ring | None:
        """The queue that is selected, if there is such a one."""
        return self._rings[self._selected] if self._selected < len(self._rings) else None

    def _read_common(self, offset: int, size: int) -> bytes:
        ring = self._ring()
        size_now, vector, enabled, addresses = 0, NO_VECTOR, False, (0, 0, 0)
        if ring is not None:
            size_now, vector, enabled = ring.size, ring.vector, ring.enabled
            addresses = ring.addresses()
        if offset <= _GENERATION < offset + size:
            self._look_at_config()
        driver_half = self._driver_half
        found = _COMMON_LAYOUT.pack(
            self._feature_half,
            self._offered >> 32 * self._feature_half & 2**32 - 1 if self._feature_half < 2 else 0,
            driver_half,
            self._driver_features[driver_half] if driver_half < 2 else 0,
            self._config_vector,
            len(self._rings),
            self._host.status & 0xFF,
            self._generation,
            self._selected,
            size_now,
            vector,
            enabled,
            self._selected if ring is not None else 0,
            *addresses,
            0,
            0,
        )
        return found[offset : offset + size]

    def _write_common(self, offset: int, size: int, value: int) -> None:
        found = self._REGISTERS.get((offset, size))
        if found is not None:
            found(self, value)
        elif 0x20 <= offset < 0x38 and size == 4 and not offset % 4:
            self._set_address((offset - 0x20) // 4, value)
        else:
            self._ignore(
                f"writes {size} bytes at {offset:#x} of the common configuration, where no "
                "writable register of that size is"
            )

    def _set_feature_half(self, value: int) -> None:
        self._feature_half = value

    def _set_driver_half(self, value: int) -> None:
        self._driver_half = value

    def _set_driver_features(self, value: int) -> None:
        if self._host.status & Status.FEATURES_OK:
            self._ignore("changes features after FEATURES_OK")
        elif self._driver_half < 2:
            self._driver_features[self._driver_half] = value
        elif value:
            self._unknown_features = True

    def _set_config_vector(self, value: int) -> None:
        self._config_vector = value if value < self._vectors else NO_VECTOR

    def _set_selected(self, value: int) -> None:
        self._selected = value

    def _set_status(self, value: int) -> None:
        if not value:
            self.reset()
            return
        host, before = self._host, self._host.status
        if before & _WRITABLE_STATUS & ~value:
            self._ignore(f"clears bits of the device status {before:#x} by writing {value:#x}")
        status = before | value & _WRITABLE_STATUS
        new = status & ~before
        if new & Status.FEATURES_OK and not self._accept_features():
            status &= ~Status.FEATURES_OK
        if new & Status.DRIVER_OK and not status & Status.FEATURES_OK:
            self._ignore("sets DRIVER_OK without FEATURES_OK")
            status &= ~Status.DRIVER_OK
        # Whatever was added meanwhile stays.
        host.status |= status
        if status & ~before & Status.DRIVER_OK:
            self._start_all()

    def _accept_features(self) -> bool:
        """Whether the device works with what the driver has accepted (section 3.1.1)."""
        features = self._driver_features[0] | self._driver_features[1] << 32
        unknown = features & ~self._offered
        if unknown or self._unknown_features:
            self._ignore(f"accepts features that were not offered, {unknown:#x}")
            return False
        if not features >> VIRTIO_F_VERSION_1 & 1:
            self._ignore("does not accept VIRTIO_F_VERSION_1")
            return False
        try:
            self._host.set_features(features)
        except GuestioError as error:
            self._host.log.report("features %#x are refused: %s", features, error)
            return False
        return True

    def _set_size(self, value: int) -> None:
        ring = self._changeable("size")
        if ring is not None:
            ring.size = value

    def _set_vector(self, value: int) -> None:
        ring = self._ring()
        if ring is None:
            self._ignore(f"sets the vector of queue {self._selected}, which there is not")
        else:
            ring.vector = value if value < self._vectors else NO_VECTOR
            self._route_all()

    def _set_address(self, half: int, value: int) -> None:
        ring = self._changeable("address")
        if ring is not None:
            ring.parts = ring.parts or [0] * 6
            ring.parts[half] = value

    def _changeable(self, what: str) -> _Ring | None:
        """The queue that is selected, unless its set-up must not be changed now."""
        ring = self._ring()
        if ring is None:
            self._ignore(f"sets the {what} of queue {self._selected}, which there is not")
        elif ring.enabled:
            self._ignore(f"sets the {what} of queue {self._selected}, which is enabled")
        else:
            return ring
        return None

    def _set_enabled(self, value: int) -> None:
        ring = self._ring()
        if ring is None or value != 1:
            self._ignore(f"writes {value} to queue_enable of queue {self._selected}")
        elif not ring.enabled:
            try:
                if ring.size > self._most:
                    raise ValueError(f"a queue of {ring.size} entries: at most {self._most}")
                ring.layout()
            except ValueError as error:
                self.driver_errors += 1
                self._host.broken(self._host.queue(self._selected), QueueError(str(error)))
                self._pci.loop.call_soon_threadsafe(self._tell_broken)
                return
            ring.enabled = True
            if self._host.status & Status.DRIVER_OK:
                self._start(self._selected)

    def _reset_queue(self, value: int) -> None:
        """Stop a queue and forget its set-up (section 4.1.4.3.1)."""
        ring = self._ring()
        if not self._host.features >> VIRTIO_F_RING_RESET & 1 or ring is None or value != 1:
            self._ignore(f"writes {value} to queue_reset of queue {self._selected}")
            return
        queue = self._host.queue(self._selected)
        self._silence(self._selected)
        queue.reset(self._host.announce_stop([queue]))
        self._rings[self._selected] = _Ring(self._most)

    _REGISTERS: Final[dict[tuple[int, int], Callable[[VirtioPci, int], None]]] = {
        (0x00, 4): _set_feature_half,
        (0x08, 4): _set_driver_half,
        (0x0C, 4): _set_driver_features,
        (0x10, 2): _set_config_vector,
        (0x14, 1): _set_status,
        (0x16, 2): _set_selected,
        (0x18, 2): _set_size,
        (0x1A, 2): _set_vector,
        (0x1C, 2): _set_enabled,
        (0x3A, 2): _reset_queue,
    }
    """What is done with a write, by offset and size of the register."""

    # Queues. This is a `Transport`.

    def _start_all(self) -> None:
        for index, ring in enumerate(self._rings):
            if ring.enabled:
                self._start(index)
        if self._host.status & Status.NEEDS_RESET or self._config_due:
            self.config_changed()

    def _start(self, index: int) -> None:
        """Serve an enabled queue: the driver is ready."""
        queue, ring, loop = self._host.queue(index), self._rings[index], self._pci.loop
        try:
            self._host.start_over()
        except GuestioError as error:
            self._host.broken(queue, error)
            loop.call_soon_threadsafe(self._tell_broken)
            return
        queue.set_base(0)
        queue.set_err(_Call(loop, lambda: loop.call_soon_threadsafe(self._tell_broken)))
        kick = _Shared(self._pci.ioeventfd(0, self._place(index)))
        queue.set_kick(kick)
        ring.kick = kick
        self._notify_by(index, kick)
        self._route(index)
        queue.enable(True)
        # The driver may have made buffers available before it was ready, and not notify again.
        notify_eventfd(kick.fileno())

    @property
    def tracked(self) -> bool:
        """See :class:`~guestio.virtio.host.Transport`."""
        return False

    def ring_layout(self, index: int, *, event_idx: bool) -> RingLayout | None:
        """See :class:`~guestio.virtio.host.Transport`."""
        ring = self._rings[index]
        if self._space is None or not ring.enabled or not self._host.status & Status.DRIVER_OK:
            return None
        return ring.layout()

    def inflight_notes(self, index: int, size: int) -> InflightQueue | None:
        """See :class:`~guestio.virtio.host.Transport`."""
        return None

    # Interrupts.

    def config_changed(self) -> None:
        """See :class:`~guestio.virtio.host.Transport`."""
        if not self._host.status & Status.DRIVER_OK:
            self._config_due = True
            return
        self._config_due = False
        self.statistics.config_changes += 1
        self._interrupt(ISR_CONFIG, self._config_vector)

    def _tell_broken(self) -> None:
        """Tell the driver that the device needs a reset (section 2.1.2)."""
        if self._host.status & Status.DRIVER_OK:
            self._interrupt(ISR_CONFIG, self._config_vector)

    def _route_all(self) -> None:
        for index, ring in enumerate(self._rings):
            if ring.kick is not None:
                self._route(index)

    def _route(self, index: int) -> None:
        """Have a queue that runs signal the client itself if it may, and the event loop if not."""
        queue, ring = self._host.queue(index), self._rings[index]
        trigger = None
        if self._pci.config.msix_enabled and ring.vector != NO_VECTOR:
            trigger = self._pci.interrupts.direct(ring.vector)
        if trigger is None:
            if ring.call is None:
                ring.trigger = None
                ring.call = _Call(self._pci.loop, lambda: self._interrupt(ISR_QUEUE, ring.vector))
                queue.set_call(ring.call)
        elif trigger is not ring.trigger:
            before, ring.call, ring.trigger = ring.call, None, trigger
            # Threads of the device signal with the lock held.
            with queue.lock:
                due = before is not None and before.has_rung()
                queue.set_call(_Shared(trigger.fileno()))
            if due:
                trigger.notify()

    def _interrupt(self, cause: int, vector: int) -> None:
        if not self._pci.config.msix_enabled:
            self._isr |= cause
            self._pci.set_pin(True)
        elif vector != NO_VECTOR:
            self._pci.interrupt(vector)

    def _take_isr(self) -> int:
        isr, self._isr = self._isr, 0
        self._pci.set_pin(False)
        return isr

    # The device's own configuration (section 4.1.4.6).

    def _look_at_config(self) -> bytes:
        """The configuration as it is; another generation if it is another one."""
        try:
            config = self._host.read_config(0, self._config_bytes)
        except GuestioError as error:
            self._host.log.report("the configuration cannot be read: %s", error)
            config = b"\xff" * self._config_bytes
        if config != self._seen_config:
            if self._seen_config is not None:
                self._generation = (self._generation + 1) % 256
            self._seen_config = config
        return config

    def _read_config(self, offset: int, size: int) -> bytes:
        return self._look_at_config()[offset : offset + size]

    def _write_config(self, offset: int, data: bytes) -> None:
        try:
            self._host.write_config(offset, data[: self._config_bytes - offset])
        except GuestioError as error:
            self.driver_errors += 1
            self._host.log.report("a write to the configuration is refused: %s", error)
