"""DMA_MAP and DMA_UNMAP, whatever the device does with memory."""

from __future__ import annotations

import os
from functools import partial
from typing import Final

from guestio.faults.report import Severity
from guestio.faults.vfio_user.catalogue import hostile, register, vfio
from guestio.faults.vfio_user.trial import PAGE, VfioTrial
from guestio.vfio_user.messages import DMA_MAP, DMA_UNMAP, UNMAP_ALL, Command

_MAP: Final = vfio("DMA_MAP")
_UNMAP: Final = vfio("DMA_UNMAP")
_HIGH: Final = 1 << 40


@register("dma.map", _MAP, "Memory with a file can be mapped and unmapped.")
def _map(t: VfioTrial) -> None:
    t.begin()
    fd = t.memfd(16 * PAGE)
    t.maps(0, 16 * PAGE, fd)
    t.unmaps(0, 16 * PAGE)


@register("dma.map-again", _MAP, "Memory that was unmapped can be mapped again, and elsewhere.")
def _again(t: VfioTrial) -> None:
    t.begin()
    fd = t.memfd(16 * PAGE)
    for address in (0, _HIGH, 0):
        t.maps(address, 16 * PAGE, fd)
        t.unmaps(address, 16 * PAGE)


@register("dma.no-file", _MAP, "Memory without a file can be mapped; it is reached by messages.")
def _no_file(t: VfioTrial) -> None:
    t.begin()
    t.maps(0xF0000, 16 * PAGE)
    t.unmaps(0xF0000, 16 * PAGE)


@register("dma.read-only", _MAP, "Memory can be mapped for reading alone.")
def _read_only(t: VfioTrial) -> None:
    t.begin()
    t.maps(0, PAGE, t.memfd(PAGE), flags=1)
    t.unmaps(0, PAGE)


@register("dma.offset", _MAP, "A part of a file can be mapped.")
def _offset(t: VfioTrial) -> None:
    t.begin()
    t.maps(_HIGH, 2 * PAGE, t.memfd(8 * PAGE), offset=4 * PAGE)
    t.unmaps(_HIGH, 2 * PAGE)


@register("dma.same-file", _MAP, "One file can be mapped many times.")
def _same_file(t: VfioTrial) -> None:
    t.begin()
    fd = t.memfd(PAGE)
    for at in range(64):
        t.maps(_HIGH + at * 2 * PAGE, PAGE, fd)
    for at in range(64):
        t.unmaps(_HIGH + at * 2 * PAGE, PAGE)


@register("dma.neighbors", _MAP, "Mappings may adjoin, and are unmapped one by one.")
def _neighbors(t: VfioTrial) -> None:
    t.begin()
    fd = t.memfd(2 * PAGE)
    t.maps(0, PAGE, fd)
    t.maps(PAGE, PAGE, fd, offset=PAGE)
    t.unmaps(0, PAGE)
    t.maps(0, PAGE, fd)
    t.unmaps(PAGE, PAGE)
    t.unmaps(0, PAGE)


@register("dma.high", _MAP, "Memory may lie at high addresses.")
def _high(t: VfioTrial) -> None:
    t.begin()
    address = (1 << 47) - 2 * PAGE
    t.maps(address, PAGE, t.memfd(PAGE))
    t.unmaps(address, PAGE)


@register("dma.unmap-all", _UNMAP, "Everything can be unmapped at once.")
def _all(t: VfioTrial) -> None:
    t.begin()
    fd = t.memfd(4 * PAGE)
    for at in range(4):
        t.maps(at << 20, PAGE, fd, offset=at * PAGE)
    t.unmaps(0, 0, UNMAP_ALL)
    for at in range(4):
        t.maps(at << 20, PAGE, fd, offset=at * PAGE)
    t.unmaps(0, 0, UNMAP_ALL)


@register("dma.unmap-answer", _UNMAP, "The answer to an unmap has no bytes, or repeats it.")
def _unmap_answer(t: VfioTrial) -> None:
    t.begin()
    t.maps(0, PAGE, t.memfd(PAGE))
    answer = t.unmap(0, PAGE)
    t.expect(not answer.failed, f"failed with error {answer.error}")
    t.expect(
        len(answer.payload) in (0, DMA_UNMAP.size), f"the answer has {len(answer.payload)} bytes"
    )


@register(
    "dma.unmap-nothing",
    _UNMAP,
    "An unmap of what is not mapped is answered, and the connection goes on.",
)
def _nothing(t: VfioTrial) -> None:
    t.begin()
    t.unmap(_HIGH, PAGE)
    t.info()


@register(
    "dma.unmap-wide",
    _UNMAP,
    "An unmap of a range takes all mappings in it, as QEMU unmaps whole address spaces.",
    severity=Severity.SHOULD,
)
def _wide(t: VfioTrial) -> None:
    t.begin()
    fd = t.memfd(2 * PAGE)
    t.maps(0, PAGE, fd)
    t.maps(4 * PAGE, PAGE, fd, offset=PAGE)
    answer = t.unmap(0, 1 << 32)
    t.expect(not answer.failed, f"failed with error {answer.error}")
    t.maps(0, PAGE, fd)
    t.maps(4 * PAGE, PAGE, fd)


@register("dma.many", _MAP, "Hundreds of mappings can be made, and are gone after an unmap of all.")
def _many(t: VfioTrial) -> None:
    t.begin()
    fd = t.memfd(PAGE)
    most = min(int(t.link.capabilities.get("max_dma_maps", 65535)), 500)
    for at in range(most):
        t.maps(_HIGH + at * 2 * PAGE, PAGE, fd)
    t.unmaps(0, 0, UNMAP_ALL)


@register("dma.next-client", _MAP, "The next client begins without mappings.")
def _next_client(t: VfioTrial) -> None:
    t.begin()
    fd = t.memfd(PAGE)
    t.maps(0, PAGE, fd)
    t.reconnect()
    t.maps(0, PAGE, fd)
    t.unmaps(0, PAGE)


def _bad_map(
    t: VfioTrial, address: int, size: int, flags: int, argsz: int, with_fd: bool, why: str
) -> None:
    t.begin()
    payload = DMA_MAP.pack(argsz, flags, 0, address, size)
    t.refused(Command.DMA_MAP, payload, [t.memfd(16 * PAGE)] if with_fd else [], why=why)


_WHOLE: Final = DMA_MAP.size
for _name, _text, _address, _size, _flags, _argsz, _fd in (
    ("empty", "Memory of no bytes is refused.", 0, 0, 3, _WHOLE, False),
    ("wraps", "Memory that passes 2**64 is refused.", (1 << 64) - PAGE, 2 * PAGE, 3, _WHOLE, True),
    ("flags", "Flags that do not exist are refused.", 0, PAGE, 0xF0, _WHOLE, True),
    ("argsz", "An argsz that is too small is refused.", 0, PAGE, 3, 8, True),
):
    hostile(f"dma.bad-{_name}", _MAP, _text)(
        partial(
            _bad_map,
            address=_address,
            size=_size,
            flags=_flags,
            argsz=_argsz,
            with_fd=_fd,
            why=f"({_name})",
        )
    )


@hostile("dma.bad-short", _MAP, "A map without all of its numbers is refused.")
def _short(t: VfioTrial) -> None:
    t.begin()
    t.refused(Command.DMA_MAP, bytes(16), why="of 16 bytes")


@hostile("dma.bad-unmap-short", _UNMAP, "An unmap without all of its numbers is refused.")
def _unmap_short(t: VfioTrial) -> None:
    t.begin()
    t.refused(Command.DMA_UNMAP, bytes(16), why="of 16 bytes")


@hostile("dma.bad-unmap-all", _UNMAP, "An unmap of everything that also has an address is refused.")
def _bad_all(t: VfioTrial) -> None:
    t.begin()
    payload = DMA_UNMAP.pack(DMA_UNMAP.size, UNMAP_ALL, PAGE, PAGE)
    t.refused(Command.DMA_UNMAP, payload, why="of all and of a page")


@hostile("dma.overlap", _MAP, "Memory where some is mapped already harms nothing.")
def _overlap(t: VfioTrial) -> None:
    t.begin()
    fd = t.memfd(4 * PAGE)
    t.maps(0, 2 * PAGE, fd)
    answer = t.map(PAGE, 2 * PAGE, fd)
    t.info()
    if answer.failed:
        t.reject(f"refused with error {answer.error}")


@hostile("dma.split", _UNMAP, "An unmap of a part of a mapping harms nothing.")
def _split(t: VfioTrial) -> None:
    t.begin()
    t.maps(0, 4 * PAGE, t.memfd(4 * PAGE))
    answer = t.unmap(PAGE, PAGE)
    t.info()
    if answer.failed:
        t.reject(f"refused with error {answer.error}")


@hostile("dma.other-descriptor", _MAP, "A pipe or an eventfd in place of memory harms nothing.")
def _other(t: VfioTrial) -> None:
    t.begin()
    reader, writer = os.pipe()
    refused = 0
    for fd in (t.own(reader), t.own(writer), t.eventfd()):
        refused += t.map(0, PAGE, fd).failed
        t.unmap(0, PAGE)
    t.info()
    if refused:
        t.reject("refused")


@hostile("dma.two-files", _MAP, "Two files for one mapping harm nothing.")
def _two(t: VfioTrial) -> None:
    t.begin()
    payload = DMA_MAP.pack(DMA_MAP.size, 3, 0, 0, PAGE)
    answer = t.link.ask(Command.DMA_MAP, payload, [t.memfd(PAGE), t.memfd(PAGE)])
    t.info()
    if answer.failed:
        t.reject(f"refused with error {answer.error}")


@hostile("dma.beyond-file", _MAP, "Memory beyond the end of its file harms nothing.")
def _beyond(t: VfioTrial) -> None:
    t.begin()
    answer = t.map(0, 1 << 20, t.memfd(PAGE))
    t.info()
    if answer.failed:
        t.reject(f"refused with error {answer.error}")


@hostile("dma.cut", _MAP, "A file that is cut after it was mapped harms nothing.")
def _cut(t: VfioTrial) -> None:
    t.begin(master=True)
    fd = t.memfd(16 * PAGE)
    t.maps(0, 16 * PAGE, fd)
    os.ftruncate(fd, 0)
    t.info()
    t.unmap(0, 16 * PAGE)


@hostile("dma.read-only-file", _MAP, "A file that is read-only, mapped for writing, harms nothing.")
def _read_only_file(t: VfioTrial) -> None:
    t.begin()
    fd = t.memfd(PAGE)
    only = t.own(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
    answer = t.map(0, PAGE, only)
    t.info()
    if answer.failed:
        t.reject(f"refused with error {answer.error}")
