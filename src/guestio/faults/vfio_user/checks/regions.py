"""What the device has: regions, and accesses to them."""

from __future__ import annotations

import mmap
from functools import partial
from typing import Final

from guestio.faults.base_trial import QUIET
from guestio.faults.vfio_user.catalogue import hostile, register, vfio
from guestio.faults.vfio_user.trial import VfioTrial
from guestio.vfio_user.messages import (
    CAP_SPARSE_MMAP,
    CONFIG_REGION,
    DEVICE_INFO,
    FEATURE,
    INFO_CAP,
    IO_FD,
    MULTI_COUNT,
    MULTI_WRITE,
    REGION_ACCESS,
    REGION_INFO,
    REGION_IO_FDS,
    SPARSE_AREA,
    SPARSE_COUNT,
    Command,
    DeviceFlag,
    HeaderFlag,
    RegionFlag,
)

_INFO: Final = vfio("DEVICE_GET_INFO")
_REGION: Final = vfio("DEVICE_GET_REGION_INFO")
_READ: Final = vfio("REGION_READ")
_WRITE: Final = vfio("REGION_WRITE")
_MULTI: Final = vfio("REGION_WRITE_MULTI")
_LINE: Final = 0x3C
"""The interrupt line register: any value may be written, and the device makes nothing of it."""


@register("info.answer", _INFO, "The device says how long its answer is.")
def _answer(t: VfioTrial) -> None:
    t.begin()
    info = t.info()
    t.expect(info.argsz >= DEVICE_INFO.size, f"argsz is {info.argsz}")


@register("info.pci", _INFO, "The device is a PCI device.")
def _pci(t: VfioTrial) -> None:
    t.begin()
    flags = t.info().flags
    t.expect(flags & DeviceFlag.PCI, f"flags are {flags:#x}")


@register("info.counts", _INFO, "A PCI device has at least 9 regions and 3 kinds of interrupts.")
def _counts(t: VfioTrial) -> None:
    t.begin()
    info = t.info()
    t.expect(info.regions >= CONFIG_REGION + 1, f"{info.regions} regions")
    t.expect(info.irqs >= 3, f"{info.irqs} kinds of interrupts")


@register("info.constant", _INFO, "The device says the same each time.")
def _constant(t: VfioTrial) -> None:
    t.begin()
    first = t.info()
    regions = [t.region(index) for index in range(first.regions)]
    t.expect(t.info() == first, "says something else the second time")
    t.expect([t.region(index) for index in range(first.regions)] == regions, "a region has changed")


@hostile("info.short", _INFO, "A question that is too short is refused.")
def _short(t: VfioTrial) -> None:
    t.begin()
    t.refused(Command.DEVICE_GET_INFO, bytes(4), why="of 4 bytes")


@hostile("info.argsz", _INFO, "A question with no room for its answer is refused.")
def _argsz(t: VfioTrial) -> None:
    t.begin()
    t.refused(Command.DEVICE_GET_INFO, DEVICE_INFO.pack(4, 0, 0, 0), why="with an argsz of 4")


@register("region.each", _REGION, "Each region that the device has is told of, by its number.")
def _each(t: VfioTrial) -> None:
    t.begin()
    for index in range(t.info().regions):
        info = t.region(index)
        t.expect(info.region == index, f"region {index} is told as {info.region}")
        t.expect(info.argsz >= REGION_INFO.size, f"region {index}: argsz is {info.argsz}")


@register(
    "region.flags", _REGION, "A region has no flags that do not exist; an empty one has none."
)
def _flags(t: VfioTrial) -> None:
    t.begin()
    for index in range(t.info().regions):
        info = t.region(index)
        t.expect(not info.flags & ~0xF, f"region {index}: flags {info.flags:#x}")
        access = RegionFlag.READ | RegionFlag.WRITE
        t.expect(
            not info.size or info.flags & access, f"region {index} can be neither read nor written"
        )


@register(
    "region.config", _REGION, "Configuration space has 256 or 4096 bytes, to read and to write."
)
def _config(t: VfioTrial) -> None:
    t.begin()
    info = t.region(CONFIG_REGION)
    t.expect(info.size in (256, 4096), f"configuration space has {info.size} bytes")
    both = RegionFlag.READ | RegionFlag.WRITE
    t.expect(info.flags & both == both, f"its flags are {info.flags:#x}")


@register(
    "region.capabilities",
    _REGION,
    "Capabilities of a region are in the answer, if there is room, and end.",
)
def _capabilities(t: VfioTrial) -> None:
    t.begin()
    seen = False
    for index in range(t.info().regions):
        info = t.region(index)
        if not info.flags & RegionFlag.CAPS:
            continue
        seen = True
        t.expect(info.argsz > REGION_INFO.size, f"region {index}: argsz is {info.argsz}")
        whole, answer = t.region_answer(index, info.argsz)
        at, data, visited = whole.cap_offset, answer.payload, set[int]()
        while at:
            t.expect(
                at not in visited and at + INFO_CAP.size <= len(data),
                f"region {index}: a capability at {at} of {len(data)} bytes",
            )
            visited.add(at)
            identifier, _, following = INFO_CAP.unpack_from(data, at)
            if identifier == CAP_SPARSE_MMAP:
                _judge_areas(t, index, info.size, data[at + INFO_CAP.size :])
            at = following
    if not seen:
        t.skip("no region has capabilities")


def _judge_areas(t: VfioTrial, index: int, size: int, data: bytes) -> None:
    count, _ = SPARSE_COUNT.unpack_from(data)
    areas = data[SPARSE_COUNT.size :][: count * SPARSE_AREA.size]
    t.expect(len(areas) == count * SPARSE_AREA.size, f"region {index}: {count} areas are missing")
    for offset, length in SPARSE_AREA.iter_unpack(areas):
        t.expect(
            length and offset + length <= size,
            f"region {index}: the area {offset:#x}+{length:#x} of {size:#x}",
        )


@register("region.mapped", _REGION, "A region that can be mapped comes with a file to map.")
def _mapped(t: VfioTrial) -> None:
    t.begin()
    seen = False
    for index in range(t.info().regions):
        info = t.region(index)
        if not info.flags & RegionFlag.MMAP or not info.size:
            continue
        seen = True
        _, answer = t.region_answer(index, info.argsz)
        t.expect(bool(answer.fds), f"region {index} can be mapped, and no file came")
        length = mmap.PAGESIZE
        try:
            mmap.mmap(answer.fds[0], length, offset=info.offset).close()
        except (OSError, ValueError) as error:
            t.fail(f"region {index} cannot be mapped: {error}")
    if not seen:
        t.skip("no region can be mapped")


@hostile("region.unknown", _REGION, "A region that does not exist is refused.")
def _unknown(t: VfioTrial) -> None:
    t.begin()
    for index in (t.info().regions, 0x7FFFFFFF, 0xFFFFFFFF):
        t.refused(
            Command.DEVICE_GET_REGION_INFO,
            REGION_INFO.pack(REGION_INFO.size, 0, index, 0, 0, 0),
            why=f"of region {index}",
        )


@hostile("region.argsz", _REGION, "A question with no room for its answer is refused.")
def _region_argsz(t: VfioTrial) -> None:
    t.begin()
    t.refused(
        Command.DEVICE_GET_REGION_INFO, REGION_INFO.pack(8, 0, 0, 0, 0, 0), why="with an argsz of 8"
    )


@hostile("region.short", _REGION, "A question that is too short is refused.")
def _region_short(t: VfioTrial) -> None:
    t.begin()
    t.refused(Command.DEVICE_GET_REGION_INFO, bytes(8), why="of 8 bytes")


# Reads


@register("read.answer", _READ, "The answer to a read repeats where it was, and has the bytes.")
def _read_answer(t: VfioTrial) -> None:
    t.begin()
    for offset, count in ((0, 4), (2, 2), (0x3D, 1), (0, 64)):
        asked = REGION_ACCESS.pack(offset, CONFIG_REGION, count)
        answer = t.link.do(Command.REGION_READ, asked)
        t.expect(len(answer) == 16 + count, f"{count} bytes: the answer has {len(answer)}")
        t.expect(answer[:16] == asked, f"{count} bytes at {offset}: the answer is to others")


@register("read.parts", _READ, "What is read in one piece is what is read in parts.")
def _parts(t: VfioTrial) -> None:
    t.begin()
    whole = t.config(0, 64)
    for count in (1, 2, 4, 8):
        parts = b"".join(t.config(at, count) for at in range(0, 64, count))
        t.expect(parts == whole, f"read by {count} bytes it is another configuration space")


@register("read.whole", _READ, "Configuration space can be read in one piece.")
def _whole(t: VfioTrial) -> None:
    t.begin()
    size = t.region(CONFIG_REGION).size
    t.expect(len(t.config(0, size)) == size, "it is of another size")


def _bad_read(t: VfioTrial, offset: int, region: int | None, count: int, why: str) -> None:
    t.begin()
    index = t.info().regions if region is None else region
    size = t.region(CONFIG_REGION).size
    payload = REGION_ACCESS.pack((offset + size) % (1 << 64), index, count)
    t.refused(Command.REGION_READ, payload, why=why)


for _name, _text, _offset, _region, _count in (
    ("past-end", "A read beyond its region is refused.", 0, CONFIG_REGION, 4),
    ("across-end", "A read that leaves its region is refused.", -2, CONFIG_REGION, 4),
    ("wraps", "A read that passes the last offset is refused.", -4096 - 4, CONFIG_REGION, 8192),
    ("no-region", "A read of a region that does not exist is refused.", -256, None, 4),
    ("huge", "A read of 4 GiB is refused.", -256, CONFIG_REGION, 0xFFFFFFFF),
):
    hostile(f"read.bad-{_name}", _READ, _text)(
        partial(_bad_read, offset=_offset, region=_region, count=_count, why=f"({_name})")
    )


@hostile("read.short", _READ, "A read without all of its numbers is refused.")
def _read_short(t: VfioTrial) -> None:
    t.begin()
    t.refused(Command.REGION_READ, bytes(8), why="of 8 bytes")


@hostile("read.empty-region", _READ, "A read of a region that the device does not have is refused.")
def _empty_region(t: VfioTrial) -> None:
    t.begin()
    for index in range(6):
        if not t.region(index).size:
            t.refused(
                Command.REGION_READ, REGION_ACCESS.pack(0, index, 4), why=f"of empty BAR {index}"
            )
            return
    t.skip("the device has all BARs")


# Writes


@register("write.answer", _WRITE, "A write is answered with where it was and how long, or nothing.")
def _write_answer(t: VfioTrial) -> None:
    t.begin()
    asked = REGION_ACCESS.pack(_LINE, CONFIG_REGION, 1)
    answer = t.link.do(Command.REGION_WRITE, asked + b"\x05")
    t.expect(answer in (b"", asked), f"the answer is {answer.hex()}")


@register("write.effect", _WRITE, "What was written is read.")
def _effect(t: VfioTrial) -> None:
    t.begin()
    for value in (0x5A, 0xA5, 0):
        t.write_config(_LINE, value, 1)
        found = t.number(_LINE, 1)
        t.expect(found == value, f"{value:#x} was written, {found:#x} is read")


@register("write.posted", _WRITE, "A write that wants no answer has its effect, and gets none.")
def _posted(t: VfioTrial) -> None:
    t.begin()
    for value in (0x11, 0x22, 0x33):
        t.post(CONFIG_REGION, _LINE, bytes([value]))
    t.expect(t.number(_LINE, 1) == 0x33, "the last of three posted writes is not what is read")
    t.expect(t.link.quiet(QUIET), "answered a write that wants no answer")


def _bad_write(
    t: VfioTrial, offset: int, region: int | None, count: int, data: bytes, why: str
) -> None:
    t.begin()
    index = t.info().regions if region is None else region
    at = (t.region(CONFIG_REGION).size + offset) % (1 << 64)
    t.refused(Command.REGION_WRITE, REGION_ACCESS.pack(at, index, count) + data, why=why)


for _name, _text, _offset, _region, _count, _data in (
    ("past-end", "A write beyond its region is refused.", 0, CONFIG_REGION, 4, bytes(4)),
    ("across-end", "A write that leaves its region is refused.", -2, CONFIG_REGION, 4, bytes(4)),
    ("wraps", "A write that passes the last offset is refused.", -4098, CONFIG_REGION, 4, bytes(4)),
    ("no-region", "A write to a region that does not exist is refused.", -256, None, 4, bytes(4)),
    (
        "too-short",
        "A write with less data than it says is refused.",
        _LINE - 256,
        CONFIG_REGION,
        8,
        b"\0",
    ),
):
    hostile(f"write.bad-{_name}", _WRITE, _text)(
        partial(
            _bad_write, offset=_offset, region=_region, count=_count, data=_data, why=f"({_name})"
        )
    )


@hostile("write.posted-bad", _WRITE, "A posted write that is refused gets no answer.")
def _posted_bad(t: VfioTrial) -> None:
    t.begin()
    t.post(t.info().regions, 0, b"\0")
    if t.link.closed(QUIET):
        t.reject("closed the connection")
    t.expect(t.link.quiet(0), "answered a write that wants no answer")
    t.alive()


# Several writes in one message


def _multi(*writes: tuple[int, int, bytes], count: int | None = None, size: int = -1) -> bytes:
    return MULTI_COUNT.pack(len(writes) if count is None else count) + b"".join(
        MULTI_WRITE.pack(offset, region, len(data) if size < 0 else size, data.ljust(8, b"\0"))
        for region, offset, data in writes
    )


def _offers_multi(t: VfioTrial) -> None:
    t.begin()
    if not t.link.capabilities.get("write_multiple"):
        t.skip("write_multiple is not offered")


@register("multi.effect", _MULTI, "Several writes in one message are done in their order.")
def _multi_effect(t: VfioTrial) -> None:
    _offers_multi(t)
    writes = [(CONFIG_REGION, _LINE, bytes([value])) for value in (1, 2, 3)]
    t.link.do(Command.REGION_WRITE_MULTI, _multi(*writes))
    t.expect(t.number(_LINE, 1) == 3, "the last of three writes is not what is read")


@register("multi.posted", _MULTI, "Several writes in a message that wants no answer are done.")
def _multi_posted(t: VfioTrial) -> None:
    _offers_multi(t)
    writes = [(CONFIG_REGION, _LINE, bytes([value])) for value in (7, 8)]
    t.link.message(Command.REGION_WRITE_MULTI, _multi(*writes), flags=HeaderFlag.NO_REPLY)
    t.expect(t.number(_LINE, 1) == 8, "the last of two writes is not what is read")


@hostile("multi.not-offered", _MULTI, "Several writes in one message, not offered, are refused.")
def _multi_not_offered(t: VfioTrial) -> None:
    t.begin()
    if t.link.capabilities.get("write_multiple"):
        t.skip("write_multiple is offered")
    t.refused(Command.REGION_WRITE_MULTI, _multi(), why="without write_multiple")


def _bad_multi(t: VfioTrial, payload: bytes, why: str) -> None:
    _offers_multi(t)
    t.write_config(_LINE, 0x42, 1)
    t.refused(Command.REGION_WRITE_MULTI, payload, why=why)
    t.expect(t.number(_LINE, 1) == 0x42, "was refused, and one of its writes done")


_GOOD: Final = (CONFIG_REGION, _LINE, b"\x01")
for _name, _text, _payload in (
    ("count", "A count that is not that of the writes is refused.", _multi(_GOOD, count=1 << 40)),
    ("cut", "Half a write is refused.", _multi(_GOOD)[:-5]),
    ("size", "A write of more than 8 bytes in it is refused.", _multi(_GOOD, size=9)),
    ("past-end", "One that leaves its region is refused.", _multi((CONFIG_REGION, 4096, b"\0"))),
):
    hostile(f"multi.bad-{_name}", _MULTI, _text)(
        partial(_bad_multi, payload=_payload, why=f"({_name})")
    )


# What few have


@hostile(
    "feature.short", vfio("DEVICE_FEATURE"), "A feature without all of its numbers is refused."
)
def _feature_short(t: VfioTrial) -> None:
    t.begin()
    t.refused(Command.DEVICE_FEATURE, bytes(4), why="of 4 bytes")


@hostile("feature.unknown", vfio("DEVICE_FEATURE"), "A feature that does not exist is refused.")
def _feature_unknown(t: VfioTrial) -> None:
    t.begin()
    t.refused(Command.DEVICE_FEATURE, FEATURE.pack(8, 0xFFFF | 1 << 16), why="0xffff")


@register(
    "io-fds.answer",
    vfio("DEVICE_GET_REGION_IO_FDS"),
    "Descriptors of a region are as many as the answer says; a longer one says its length.",
)
def _io_fds(t: VfioTrial) -> None:
    t.begin()
    index, region = t.accessible()
    asked = REGION_IO_FDS.pack(REGION_IO_FDS.size, 0, index, 0)
    answer = t.link.ask(Command.DEVICE_GET_REGION_IO_FDS, asked)
    if answer.failed:
        t.skip(f"not supported: error {answer.error}")
    argsz, _, _, count = REGION_IO_FDS.unpack_from(answer.payload)
    if argsz > REGION_IO_FDS.size:
        asked = REGION_IO_FDS.pack(argsz, 0, index, 0)
        answer = t.link.ask(Command.DEVICE_GET_REGION_IO_FDS, asked)
        argsz, _, _, count = REGION_IO_FDS.unpack_from(answer.payload)
    entries = answer.payload[REGION_IO_FDS.size :]
    t.expect(len(entries) == count * IO_FD.size, f"{count} entries have {len(entries)} bytes")
    for offset, size, number, *_rest in IO_FD.iter_unpack(entries):
        t.expect(offset + size <= region.size, f"one is at {offset:#x} of {region.size:#x}")
        t.expect(number < len(answer.fds), f"one has descriptor {number} of {len(answer.fds)}")


@hostile(
    "io-fds.no-region",
    vfio("DEVICE_GET_REGION_IO_FDS"),
    "Descriptors of a region that does not exist are refused.",
)
def _io_fds_no_region(t: VfioTrial) -> None:
    t.begin()
    asked = REGION_IO_FDS.pack(4096, 0, t.info().regions, 0)
    t.refused(Command.DEVICE_GET_REGION_IO_FDS, asked, why="of no region")
