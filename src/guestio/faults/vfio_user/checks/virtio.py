"""A virtio device's PCI transport: its structures and registers, without a queue.

Source: virtio 1.4 section 4.1.
"""

from __future__ import annotations

import time
from typing import Final

from guestio.faults.catalogue import virtio
from guestio.faults.report import Severity
from guestio.faults.vfio_user.catalogue import hostile, register
from guestio.faults.vfio_user.trial import CAP_VENDOR, VfioTrial
from guestio.vfio_user.messages import Command
from guestio.virtio.device import Status

_CAPS: Final = virtio("4.1.4")
_COMMON: Final = virtio("4.1.4.3")
_COMMON_DEVICE: Final = virtio("4.1.4.3.1")
_DEVICES: Final = ("virtio",)
COMMON, NOTIFY, ISR, DEVICE, WINDOW = 1, 2, 3, 4, 5
_SELECT, _OFFERED, _GUEST_SELECT, _ACCEPTED = 0, 4, 8, 12
_QUEUES, _STATUS, _GENERATION, _QUEUE = 0x12, 0x14, 0x15, 0x16
_SIZE, _ENABLE, _NOTIFY_OFF = 0x18, 0x1C, 0x1E


class _Function:
    """A virtio function's registers."""

    def __init__(self, t: VfioTrial) -> None:
        self.t = t
        t.begin()
        self.places: dict[int, tuple[int, int, int, int]] = {}
        for identifier, at in t.capabilities():
            if identifier != CAP_VENDOR:
                continue
            kind, bar = t.number(at + 3, 1), t.number(at + 4, 1)
            offset, length = t.number(at + 8, 4), t.number(at + 12, 4)
            self.places.setdefault(kind, (at, bar, offset, length))
        t.write_config(4, 6, 2)

    def place(self, kind: int) -> tuple[int, int, int, int]:
        self.t.expect(kind in self.places, f"there is no structure of type {kind}")
        return self.places[kind]

    def read(self, offset: int, count: int) -> int:
        _, bar, start, _ = self.place(COMMON)
        return int.from_bytes(self.t.link.read(bar, start + offset, count), "little")

    def write(self, offset: int, value: int, count: int) -> None:
        _, bar, start, _ = self.place(COMMON)
        self.t.link.write(bar, start + offset, value.to_bytes(count, "little"))

    def offered(self) -> int:
        found = 0
        for word in range(2):
            self.write(_SELECT, word, 4)
            found |= self.read(_OFFERED, 4) << 32 * word
        return found

    def accept(self, features: int) -> None:
        for word in range(2):
            self.write(_GUEST_SELECT, word, 4)
            self.write(_ACCEPTED, features >> 32 * word & 0xFFFFFFFF, 4)

    def reset(self) -> None:
        self.write(_STATUS, 0, 1)
        deadline = time.monotonic() + self.t.patience
        while self.read(_STATUS, 1):
            self.t.expect(time.monotonic() < deadline, "the device status does not become 0")

    def begin(self) -> None:
        self.reset()
        self.write(_STATUS, Status.ACKNOWLEDGE | Status.DRIVER, 1)


@register("virtio.ids", virtio("4.1.2.1"), "Vendor and device are virtio's.", devices=_DEVICES)
def _ids(t: VfioTrial) -> None:
    t.begin()
    vendor, device = t.number(0, 2), t.number(2, 2)
    t.expect(vendor == 0x1AF4, f"the vendor is {vendor:#x}")
    t.expect(0x1000 <= device <= 0x107F, f"the device is {device:#x}")


@register(
    "virtio.structures",
    virtio("4.1.4.3.1"),
    "There are structures for common, notification and ISR registers.",
    devices=_DEVICES,
)
def _structures(t: VfioTrial) -> None:
    function = _Function(t)
    for kind in (COMMON, NOTIFY, ISR):
        function.place(kind)


@register("virtio.window", virtio("4.1.4.9.1"), "There is a window for access.", devices=_DEVICES)
def _window(t: VfioTrial) -> None:
    _Function(t).place(WINDOW)


@register("virtio.places", _CAPS, "Structures lie in BARs that exist, aligned.", devices=_DEVICES)
def _places(t: VfioTrial) -> None:
    function = _Function(t)
    for kind, (_, bar, offset, length) in function.places.items():
        if kind not in (COMMON, NOTIFY, ISR, DEVICE):
            continue
        size = t.region(bar).size if bar < 6 else 0
        t.expect(
            offset + length <= size,
            f"structure {kind} is at {offset:#x}+{length:#x} of BAR {bar}, which has {size:#x}",
        )
        alignment = {COMMON: 4, NOTIFY: 2, ISR: 1, DEVICE: 4}[kind]
        t.expect(not offset % alignment, f"structure {kind} is at {offset:#x}")


@register("virtio.version-1", virtio("6.2"), "VIRTIO_F_VERSION_1 is offered.", devices=_DEVICES)
def _version_1(t: VfioTrial) -> None:
    features = _Function(t).offered()
    t.expect(features >> 32 & 1, f"features are {features:#x}")


@register(
    "virtio.select-beyond",
    _COMMON_DEVICE,
    "Of features beyond those that it has, the device offers none.",
    devices=_DEVICES,
)
def _select(t: VfioTrial) -> None:
    function = _Function(t)
    function.write(_SELECT, 0x7FFFFFFF, 4)
    found = function.read(_OFFERED, 4)
    t.expect(not found, f"offers {found:#x}")


@register("virtio.reset", virtio("2.4.1"), "Writing 0 resets the device status.", devices=_DEVICES)
def _reset(t: VfioTrial) -> None:
    function = _Function(t)
    function.begin()
    function.reset()


@register(
    "virtio.features-ok",
    virtio("2.2.2"),
    "A subset of what is offered is accepted.",
    devices=_DEVICES,
)
def _features_ok(t: VfioTrial) -> None:
    function = _Function(t)
    function.begin()
    function.accept(1 << 32)
    function.write(_STATUS, 1 | 2 | 8, 1)
    status = function.read(_STATUS, 1)
    t.expect(status & 8, f"the device status is {status:#x}")


@register(
    "virtio.features-refused",
    virtio("2.2.2"),
    "Features that were not offered are not accepted: FEATURES_OK does not stay.",
    severity=Severity.SHOULD,
    devices=_DEVICES,
)
def _features_refused(t: VfioTrial) -> None:
    function = _Function(t)
    function.begin()
    function.accept(~function.offered() & (1 << 63) | 1 << 32)
    function.write(_STATUS, 1 | 2 | 8, 1)
    t.expect(not function.read(_STATUS, 1) & 8, "FEATURES_OK stays set")


@register("virtio.queues", _COMMON, "The device has queues, of a power of two.", devices=_DEVICES)
def _queues(t: VfioTrial) -> None:
    function = _Function(t)
    function.begin()
    count = function.read(_QUEUES, 2)
    t.expect(1 <= count <= 0xFFFF, f"the device has {count} queues")
    for index in range(min(count, 64)):
        function.write(_QUEUE, index, 2)
        size = function.read(_SIZE, 2)
        t.expect(size <= 32768 and not size & (size - 1), f"queue {index} has {size} entries")


@register(
    "virtio.queue-beyond",
    _COMMON_DEVICE,
    "A queue that does not exist has 0 entries.",
    devices=_DEVICES,
)
def _queue_beyond(t: VfioTrial) -> None:
    function = _Function(t)
    function.begin()
    function.write(_QUEUE, function.read(_QUEUES, 2), 2)
    size = function.read(_SIZE, 2)
    t.expect(not size, f"it has {size} entries")


@register(
    "virtio.queue-disabled",
    _COMMON_DEVICE,
    "After a reset no queue is enabled.",
    devices=_DEVICES,
)
def _disabled(t: VfioTrial) -> None:
    function = _Function(t)
    function.begin()
    for index in range(min(function.read(_QUEUES, 2), 64)):
        function.write(_QUEUE, index, 2)
        t.expect(not function.read(_ENABLE, 2), f"queue {index} is enabled")


@register(
    "virtio.notify-place",
    virtio("4.1.4.4.1"),
    "The notification register of each queue lies in their structure.",
    devices=_DEVICES,
)
def _notify(t: VfioTrial) -> None:
    function = _Function(t)
    function.begin()
    at, _, _, length = function.place(NOTIFY)
    multiplier = t.number(at + 16, 4)
    t.expect(
        multiplier in (0, 2) or not multiplier & 3, f"the multiplier of offsets is {multiplier}"
    )
    for index in range(min(function.read(_QUEUES, 2), 64)):
        function.write(_QUEUE, index, 2)
        offset = function.read(_NOTIFY_OFF, 2) * multiplier
        t.expect(offset + 2 <= length, f"queue {index}: at {offset:#x} of {length:#x}")


@register(
    "virtio.generation",
    virtio("2.5.2"),
    "The configuration's generation stays while nothing changes.",
    devices=_DEVICES,
)
def _generation(t: VfioTrial) -> None:
    function = _Function(t)
    found = {function.read(_GENERATION, 1) for _ in range(5)}
    t.expect(len(found) == 1, f"it was {sorted(found)}")


@register("virtio.isr", virtio("4.1.4.5.1"), "Reading the ISR clears it.", devices=_DEVICES)
def _isr(t: VfioTrial) -> None:
    function = _Function(t)
    function.reset()
    _, bar, offset, _ = function.place(ISR)
    t.link.read(bar, offset, 1)
    found = t.link.read(bar, offset, 1)
    t.expect(found == b"\0", f"it is {found.hex()} after it was read")


@register(
    "virtio.window-reads",
    virtio("4.1.4.9.1"),
    "The window in configuration space reads what the structure has.",
    devices=_DEVICES,
)
def _window_reads(t: VfioTrial) -> None:
    function = _Function(t)
    at, *_ = function.place(WINDOW)
    _, bar, offset, _ = function.place(COMMON)
    t.write_config(at + 4, bar, 1)
    t.write_config(at + 8, offset + _QUEUES, 4)
    t.write_config(at + 12, 2, 4)
    found, expected = t.number(at + 16, 2), function.read(_QUEUES, 2)
    t.expect(found == expected, f"{found} through the window, {expected} in the BAR")


@hostile(
    "virtio.noise", virtio("4.1.4.3"), "Noise in the registers harms nothing.", devices=_DEVICES
)
def _noise(t: VfioTrial) -> None:
    function = _Function(t)
    function.begin()
    _, bar, start, length = function.place(COMMON)
    for _ in range(200):
        count = t.random.choice([1, 2, 4, 8])
        offset = start + t.random.randrange(max(length - count, 1))
        data = t.random.randbytes(count)
        t.link.ask(
            Command.REGION_WRITE,
            offset.to_bytes(8, "little")
            + bar.to_bytes(4, "little")
            + count.to_bytes(4, "little")
            + data,
        )
    function.reset()
