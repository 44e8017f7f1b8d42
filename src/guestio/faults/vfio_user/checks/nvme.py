"""An NVMe controller: its registers, its admin queue, and what it does with memory.

Source: NVM Express 1.4.
"""

from __future__ import annotations

import mmap
import struct
import time
from typing import Final

from guestio.faults.base_trial import QUIET
from guestio.faults.vfio_user.catalogue import hostile, nvme, pci, register, vfio
from guestio.faults.vfio_user.trial import COMMAND, MEMORY_SPACE, PAGE, VfioTrial
from guestio.vfio_user.messages import REGION_ACCESS, Command

_DEVICES: Final = ("nvme",)
_REGISTERS: Final = nvme("3.1")
_CAP, _VS, _CC, _CSTS, _AQA, _ASQ, _ACQ, _BELLS = 0, 8, 0x14, 0x1C, 0x24, 0x28, 0x30, 0x1000
_ENABLE: Final = 1 | 6 << 16 | 4 << 20
_ENTRIES: Final = 16
BASE: Final = 1 << 20
"""Where the memory is for the device."""
_PAGES: Final = 16
_DATA: Final = 2 * PAGE
"""Where in it the data is; before it are the queues."""
_IDENTIFY: Final = 6


class _Controller:
    """A controller and its admin queue, in memory of ours."""

    def __init__(self, t: VfioTrial, *, enable: bool = True) -> None:
        self.t = t
        t.begin(master=True)
        fd = t.memfd(_PAGES * PAGE)
        self.memory = mmap.mmap(fd, _PAGES * PAGE)
        t.on_close(self.memory.close)
        self.fd = fd
        self.taken = self.sent = 0
        self.set(_CC, 0)
        self.wait_ready(False)
        if enable:
            t.maps(BASE, _PAGES * PAGE, fd)
            self.enable()

    def get(self, offset: int, count: int = 4) -> int:
        return int.from_bytes(self.t.link.read(0, offset, count), "little")

    def set(self, offset: int, value: int, count: int = 4) -> None:
        self.t.link.write(0, offset, value.to_bytes(count, "little"))

    def wait_ready(self, wanted: bool) -> None:
        deadline = time.monotonic() + self.t.patience
        while bool(self.get(_CSTS) & 1) != wanted:
            self.t.expect(
                time.monotonic() < deadline,
                f"CSTS.RDY does not become {int(wanted)} within {self.t.patience:g} s",
            )

    def enable(self) -> None:
        self.set(_AQA, (_ENTRIES - 1) << 16 | _ENTRIES - 1)
        for register_, address in ((_ASQ, BASE), (_ACQ, BASE + PAGE)):
            self.set(register_, address & 0xFFFFFFFF)
            self.set(register_ + 4, address >> 32)
        self.set(_CC, _ENABLE)
        self.wait_ready(True)

    def submit(self, prp: int, *, posted: bool = False) -> None:
        """Have it identify itself, into a page."""
        entry = struct.pack("<BBHI16xQQ", _IDENTIFY, 0, self.sent, 0, prp, 0)
        at = 64 * (self.sent % _ENTRIES)
        self.memory[at : at + 64] = (entry + struct.pack("<I", 1)).ljust(64, b"\0")
        self.sent += 1
        bell = (self.sent % _ENTRIES).to_bytes(4, "little")
        if posted:
            self.t.post(0, _BELLS, bell)
        else:
            self.t.link.write(0, _BELLS, bell)

    def completion(self, seconds: float | None = None) -> int | None:
        """The status of the next command; None if it does not come in time."""
        at = PAGE + 16 * (self.taken % _ENTRIES)
        phase = 1 - self.taken // _ENTRIES % 2
        deadline = time.monotonic() + (self.t.patience if seconds is None else seconds)
        while True:
            _, _, _, word = struct.unpack_from("<IIII", self.memory, at)
            if word >> 16 & 1 == phase:
                self.taken += 1
                stride = 4 << (self.get(_CAP, 8) >> 32 & 0xF)
                self.set(_BELLS + stride, self.taken % _ENTRIES)
                return int(word) >> 17 & 0x7FF
            if time.monotonic() >= deadline:
                return None
            # What it asks for by messages is refused here.
            self.t.info()

    def identify(self, page: int = 0) -> bytes:
        """The page that it fills, which must not fail."""
        at = _DATA + page * PAGE
        self.submit(BASE + at)
        status = self.completion()
        self.t.expect(status is not None, "Identify was not completed in time")
        self.t.expect(status == 0, f"Identify failed with status {status or 0:#x}")
        return self.page(page)

    def page(self, page: int = 0) -> bytes:
        """A page of data."""
        at = _DATA + page * PAGE
        return self.memory[at : at + PAGE]

    def blank(self, page: int = 0) -> None:
        """Fill a page of data."""
        at = _DATA + page * PAGE
        self.memory[at : at + PAGE] = b"\xa5" * PAGE


@register("nvme.class", nvme("2.1.5"), "The class is that of an NVMe controller.", devices=_DEVICES)
def _class(t: VfioTrial) -> None:
    t.begin()
    found = t.number(8, 4) >> 8
    t.expect(found == 0x010802, f"the class is {found:#x}")


@register(
    "nvme.version",
    _REGISTERS,
    "The controller tells a version, and what it can do.",
    devices=_DEVICES,
)
def _version(t: VfioTrial) -> None:
    controller = _Controller(t, enable=False)
    t.expect(controller.get(_VS) >> 16 == 1, f"the version is {controller.get(_VS):#x}")
    capabilities = controller.get(_CAP, 8)
    t.expect((capabilities & 0xFFFF) >= 1, "queues of one entry at most")
    t.expect(capabilities >> 37 & 1, "does not know NVM commands")


@register("nvme.ready", nvme("3.1.6"), "RDY follows EN, on and off.", devices=_DEVICES)
def _ready(t: VfioTrial) -> None:
    controller = _Controller(t)
    controller.set(_CC, 0)
    controller.wait_ready(False)
    controller.enable()


@register(
    "nvme.identify",
    nvme("5.15"),
    "Identify tells the vendor of the PCI function.",
    devices=_DEVICES,
)
def _identify(t: VfioTrial) -> None:
    data = _Controller(t).identify()
    vendor = t.number(0, 2)
    found = int.from_bytes(data[:2], "little")
    t.expect(found == vendor, f"the vendor is {found:#x}, that of the function {vendor:#x}")


@register("nvme.wraps", nvme("4.1"), "Queues go around.", devices=_DEVICES)
def _wraps(t: VfioTrial) -> None:
    controller = _Controller(t)
    first = controller.identify()
    for number in range(3 * _ENTRIES):
        t.expect(controller.identify() == first, f"command {number} has another answer")


@register(
    "nvme.posted-doorbell",
    vfio("REGION_WRITE"),
    "A doorbell that wants no answer is rung.",
    devices=_DEVICES,
)
def _posted(t: VfioTrial) -> None:
    controller = _Controller(t)
    controller.submit(BASE + _DATA, posted=True)
    t.expect(controller.completion() == 0, "the command was not completed")


@register(
    "nvme.multi-doorbell",
    vfio("REGION_WRITE_MULTI"),
    "A doorbell among several writes in one message is rung.",
    devices=_DEVICES,
)
def _multi(t: VfioTrial) -> None:
    controller = _Controller(t)
    if not t.link.capabilities.get("write_multiple"):
        t.skip("write_multiple is not offered")
    controller.submit(BASE + _DATA, posted=True)
    t.expect(controller.completion() == 0, "the command was not completed")
    entry = struct.pack("<BBHI16xQQI", _IDENTIFY, 0, 1, 0, BASE + _DATA, 0, 1)
    controller.memory[64:128] = entry.ljust(64, b"\0")
    controller.sent += 1
    write = struct.pack("<QII8s", _BELLS, 0, 4, (2).to_bytes(8, "little"))
    t.link.do(Command.REGION_WRITE_MULTI, struct.pack("<Q", 1) + write)
    t.expect(controller.completion() == 0, "the command was not completed")


@register(
    "nvme.interrupt",
    nvme("7.5"),
    "A completion is signaled by an interrupt, if there is an eventfd.",
    devices=_DEVICES,
)
def _interrupt(t: VfioTrial) -> None:
    controller = _Controller(t)
    kind, _ = t.vector()
    fd = t.eventfd()
    t.arm(kind, [fd])
    controller.submit(BASE + _DATA)
    t.expect(t.signaled(fd), "the eventfd was not signaled")


@register(
    "nvme.unmapped-not-written",
    vfio("DMA_UNMAP"),
    "Once an unmap was answered the memory is not written any more.",
    devices=_DEVICES,
)
def _unmapped(t: VfioTrial) -> None:
    controller = _Controller(t, enable=False)
    other = t.memfd(PAGE)
    view = mmap.mmap(other, PAGE)
    t.on_close(view.close)
    t.maps(BASE, _PAGES * PAGE, controller.fd)
    controller.enable()
    for _ in range(10):
        t.maps(1 << 30, PAGE, other)
        view[:] = b"\xa5" * PAGE
        controller.submit(1 << 30)
        t.unmaps(1 << 30, PAGE)
        after = bytes(view)
        # A second command shows that the first was worked on.
        controller.completion()
        controller.identify()
        t.expect(bytes(view) == after, "written after the unmap was answered")


@register(
    "nvme.unmapped-fails",
    nvme("4.5"),
    "A command whose memory is not mapped does not succeed.",
    devices=_DEVICES,
)
def _unmapped_fails(t: VfioTrial) -> None:
    controller = _Controller(t)
    controller.submit(1 << 35)
    status = controller.completion()
    if status is None:
        t.expect(controller.get(_CSTS) & 2, "the command is not completed, and CSTS.CFS is 0")
    else:
        t.expect(status, "the command succeeds")


@register(
    "nvme.read-only-kept",
    vfio("DMA_MAP"),
    "Memory that is mapped for reading alone is not written.",
    devices=_DEVICES,
)
def _read_only(t: VfioTrial) -> None:
    controller = _Controller(t)
    other = t.memfd(PAGE)
    view = mmap.mmap(other, PAGE)
    t.on_close(view.close)
    t.maps(1 << 30, PAGE, other, flags=1)
    view[:] = b"\xa5" * PAGE
    controller.submit(1 << 30)
    controller.completion()
    t.expect(bytes(view) == b"\xa5" * PAGE, "the memory was written")


@register(
    "nvme.no-master",
    pci("6.2.2"),
    "Without bus mastering the controller reaches no memory.",
    devices=_DEVICES,
)
def _no_master(t: VfioTrial) -> None:
    controller = _Controller(t)
    controller.blank()
    t.write_config(COMMAND, MEMORY_SPACE, 2)
    controller.submit(BASE + _DATA)
    t.expect(controller.completion(QUIET) is None, "the command was completed")
    t.expect(controller.page() == b"\xa5" * PAGE, "the memory was written")


@register(
    "nvme.reset",
    vfio("DEVICE_RESET"),
    "A reset disables the controller.",
    devices=_DEVICES,
)
def _reset(t: VfioTrial) -> None:
    controller = _Controller(t)
    t.link.do(Command.DEVICE_RESET)
    enabled, ready = controller.get(_CC) & 1, controller.get(_CSTS) & 1
    t.expect(not enabled and not ready, f"CC.EN is {enabled}, CSTS.RDY {ready}")


@register(
    "nvme.after-reset",
    vfio("DEVICE_RESET"),
    "After a reset the controller works again, with the same mappings.",
    devices=_DEVICES,
)
def _after_reset(t: VfioTrial) -> None:
    controller = _Controller(t)
    first = controller.identify()
    t.link.do(Command.DEVICE_RESET)
    t.master()
    controller.memory[: 2 * PAGE] = bytes(2 * PAGE)
    controller.sent = controller.taken = 0
    controller.enable()
    t.expect(controller.identify(1) == first, "Identify has another answer")


@hostile(
    "nvme.bad-doorbell",
    nvme("3.1.24"),
    "A doorbell beyond its queue harms nothing.",
    devices=_DEVICES,
)
def _bad_doorbell(t: VfioTrial) -> None:
    controller = _Controller(t)
    controller.set(_BELLS, 0xFFFF)
    t.info()


@hostile(
    "nvme.no-queue",
    nvme("3.1.24"),
    "Doorbells of queues that do not exist harm nothing.",
    devices=_DEVICES,
)
def _no_queue(t: VfioTrial) -> None:
    controller = _Controller(t)
    size = t.region(0).size
    for offset in range(_BELLS + 8, min(size, _BELLS + 0x400), 4):
        controller.t.link.ask(
            Command.REGION_WRITE, REGION_ACCESS.pack(offset, 0, 4) + bytes([1, 0, 0, 0])
        )
    controller.identify()


@hostile(
    "nvme.bad-queues",
    nvme("3.1.8"),
    "An admin queue where no memory is harms nothing.",
    devices=_DEVICES,
)
def _bad_queues(t: VfioTrial) -> None:
    controller = _Controller(t, enable=False)
    controller.set(_AQA, (_ENTRIES - 1) << 16 | _ENTRIES - 1)
    for register_ in (_ASQ, _ACQ):
        controller.set(register_ + 4, 0x7FFF)
    controller.set(_CC, _ENABLE)
    controller.set(_BELLS, 1)
    t.info()


@hostile("nvme.noise", nvme("4.2"), "Noise for commands harms nothing.", devices=_DEVICES)
def _noise(t: VfioTrial) -> None:
    controller = _Controller(t)
    for _ in range(64):
        at = 64 * (controller.sent % _ENTRIES)
        controller.memory[at : at + 64] = t.random.randbytes(64)
        controller.sent += 1
        controller.set(_BELLS, controller.sent % _ENTRIES)
        controller.completion(0.01)
    t.info()
