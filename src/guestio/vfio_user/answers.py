"""What a server answers, read by the client's side, without I/O: bytes in, facts out.

Everything is checked here: sizes, counts, chains, ranges. What cannot be is a `ProtocolError`, and
ends the connection.

Source: QEMU docs/interop/vfio-user.rst (vfio-user 0.1); linux/vfio.h.
"""

from __future__ import annotations

import mmap
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from guestio.addr import ADDRESS_SPACE
from guestio.budgets import CLIENT_AREAS, CLIENT_VECTORS
from guestio.dma import MmapArea
from guestio.dma.device import kind_name
from guestio.errors import ProtocolError
from guestio.vfio_user.messages import (
    CAP_SPARSE_MMAP,
    DATAMATCH,
    DEVICE_INFO,
    INFO_CAP,
    IO_FD,
    IRQ_INFO,
    MAX_DATA,
    MAX_FDS,
    REGION_INFO,
    REGION_IO_FDS,
    REGIONS,
    SPARSE_AREA,
    SPARSE_COUNT,
    VERSION_MAJOR,
    VERSION_MINOR,
    DeviceFlag,
    IoFdType,
    IrqFlag,
    RefusalError,
    RegionFlag,
    Version,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MAX_ANSWER: Final = REGION_INFO.size + 256 + SPARSE_AREA.size * CLIENT_AREAS
"""Bytes of an answer about a region at most."""
LEAST_DATA: Final = 8
"""Bytes that a server must take in one message: a register."""


class Limits(NamedTuple):
    """What a server takes.

    Attributes:
        minor: Minor version that is spoken.
        max_fds: Descriptors of one message at most (``max_msg_fds``).
        max_data: Bytes of data in one message at most (``max_data_xfer_size``).
        max_maps: Mappings at a time at most (``max_dma_maps``).
        page_size: What addresses and sizes of mappings are multiples of (``pgsizes``).
        write_multiple: Whether it knows REGION_WRITE_MULTI.
    """

    minor: int
    max_fds: int
    max_data: int
    max_maps: int
    page_size: int
    write_multiple: bool


class RegionFacts(NamedTuple):
    """What a server says about a region.

    Attributes:
        size: Bytes; 0 if there is no such region.
        offset: Where it begins in its file.
        readable: Whether it can be read.
        writable: Whether it can be written.
        mappable: Whether it has a file.
        areas: The parts that can be mapped, in whole pages.
    """

    size: int
    offset: int
    readable: bool
    writable: bool
    mappable: bool
    areas: tuple[MmapArea, ...]


class IrqFacts(NamedTuple):
    """What a server says about a kind of interrupts: how many, and `IrqFlag` bits."""

    vectors: int
    flags: int


class NotifyArea(NamedTuple):
    """A part of a region where writes can be made by signalling an eventfd instead.

    Attributes:
        offset: Where it begins in the region.
        size: Bytes of a write; 0 for any.
        fd_index: Which descriptor of the answer.
        value: The only value that a write may have; None for any, which the device does not learn.
    """

    offset: int
    size: int
    fd_index: int
    value: int | None


def version(payload: bytes) -> Limits:
    """Read the answer to VERSION.

    Raises:
        ProtocolError: It is none, or of a server that cannot be used.
    """
    try:
        said = Version.decode(payload)
    except RefusalError as error:
        raise ProtocolError(f"the server answered VERSION with {error}") from None
    if said.major != VERSION_MAJOR or said.minor > VERSION_MINOR:
        raise ProtocolError(
            f"the server speaks vfio-user {said.major}.{said.minor}, "
            f"not {VERSION_MAJOR}.{VERSION_MINOR} or less"
        )
    names = said.capabilities
    if not isinstance(names.get("write_multiple", False), bool):
        raise ProtocolError(f"write_multiple is {names['write_multiple']!r}")
    if isinstance(twin := names.get("twin_socket"), dict) and twin.get("supported") is True:
        raise ProtocolError("the server wants a twin socket, which was not offered")
    sizes = _number(names, "pgsizes", 4096, 1)
    return Limits(
        said.minor,
        min(_number(names, "max_msg_fds", 1, 0), MAX_FDS),
        min(_number(names, "max_data_xfer_size", 1 << 20, LEAST_DATA), MAX_DATA),
        _number(names, "max_dma_maps", 65535, 0),
        sizes & -sizes,
        names.get("write_multiple") is True,
    )


def _number(names: Mapping[str, object], name: str, default: int, least: int) -> int:
    value = names.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < ADDRESS_SPACE:
        raise ProtocolError(f"the server's {name} is {str(value)[:40]}, at least {least} is needed")
    return value


def device_info(payload: bytes) -> tuple[bool, int, int]:
    """Read the answer to DEVICE_GET_INFO: whether it can be reset, its regions, its interrupts.

    Raises:
        ProtocolError: It is none, or of no PCI device.
    """
    _, flags, regions, irqs = _unpack(DEVICE_INFO, payload, "DEVICE_GET_INFO")
    if not flags & DeviceFlag.PCI:
        raise ProtocolError("the server's device is not a PCI device")
    if regions < REGIONS - 1:
        raise ProtocolError(f"a PCI device with {regions} regions, {REGIONS - 1} are needed")
    return bool(flags & DeviceFlag.RESET), regions, irqs


def region_argsz(payload: bytes, index: int) -> int:
    """How many bytes the whole answer to DEVICE_GET_REGION_INFO has.

    Raises:
        ProtocolError: It is none, of another region, or too long.
    """
    if len(payload) < REGION_INFO.size:
        raise ProtocolError(f"DEVICE_GET_REGION_INFO was answered with {len(payload)} bytes")
    argsz, _, answered, *_ = REGION_INFO.unpack_from(payload)
    if answered != index:
        raise ProtocolError(f"asked for region {index}, the server answered for {answered}")
    if not REGION_INFO.size <= argsz <= MAX_ANSWER:
        raise ProtocolError(f"what the server has to say about region {index} has {argsz} bytes")
    return int(argsz)


def region_info(payload: bytes, index: int) -> RegionFacts:
    """Read the whole answer to DEVICE_GET_REGION_INFO.

    Raises:
        ProtocolError: It is none, or contradicts itself.
    """
    if len(payload) > region_argsz(payload, index):
        raise ProtocolError(f"{len(payload)} bytes about region {index}, fewer were announced")
    _, flags, _, at, size, offset = REGION_INFO.unpack_from(payload)
    mappable = bool(flags & RegionFlag.MMAP) and size > 0
    if size >= 1 << 63 or (mappable and offset + size >= 1 << 63):
        raise ProtocolError(f"region {index} has {size:#x} bytes at {offset:#x} of its file")
    areas = [MmapArea(0, size)] if mappable else []
    if flags & RegionFlag.CAPS:
        for kind, begin in _capabilities(payload, at, index):
            if kind == CAP_SPARSE_MMAP and mappable:
                areas = _sparse(payload, begin + INFO_CAP.size, size, index)
    page = mmap.PAGESIZE
    whole = [MmapArea(area.offset, area.size - area.size % page) for area in areas]
    return RegionFacts(
        size,
        offset,
        bool(flags & RegionFlag.READ),
        bool(flags & RegionFlag.WRITE),
        mappable,
        tuple(area for area in whole if area.size and area.offset % page == 0),
    )


def _capabilities(payload: bytes, at: int, index: int) -> Iterator[tuple[int, int]]:
    """Identifier and place of each capability in a chain, which ascends."""
    least = REGION_INFO.size
    while at:
        if at < least or at + INFO_CAP.size > len(payload):
            raise ProtocolError(f"a capability of region {index} is at {at:#x} of its answer")
        kind, _, following = INFO_CAP.unpack_from(payload, at)
        yield kind, at
        least, at = at + INFO_CAP.size, following


def _sparse(payload: bytes, at: int, size: int, index: int) -> list[MmapArea]:
    if at + SPARSE_COUNT.size > len(payload):
        raise ProtocolError(f"the sparse areas of region {index} leave the answer")
    count, _ = SPARSE_COUNT.unpack_from(payload, at)
    at += SPARSE_COUNT.size
    if count > CLIENT_AREAS or at + count * SPARSE_AREA.size > len(payload):
        raise ProtocolError(f"{count} sparse areas of region {index} leave the answer")
    found = []
    for number in range(count):
        area = MmapArea(*SPARSE_AREA.unpack_from(payload, at + number * SPARSE_AREA.size))
        if area.offset + area.size > size:
            raise ProtocolError(f"sparse {area} leaves region {index} of {size:#x} bytes")
        found.append(area)
    return found


def irq_info(payload: bytes, kind: int) -> IrqFacts:
    """Read the answer to DEVICE_GET_IRQ_INFO.

    Raises:
        ProtocolError: It is none, of another kind, or of more interrupts than any device has.
    """
    _, flags, answered, count = _unpack(IRQ_INFO, payload, "DEVICE_GET_IRQ_INFO")
    if answered != kind:
        raise ProtocolError(f"asked for interrupts {kind}, the server answered for {answered}")
    if count > CLIENT_VECTORS:
        raise ProtocolError(
            f"{count} interrupts of kind {kind_name(kind)}, at most {CLIENT_VECTORS}"
        )
    return IrqFacts(count, flags & int(IrqFlag.EVENTFD | IrqFlag.MASKABLE | IrqFlag.AUTOMASKED))


def io_fds(payload: bytes, index: int, size: int, fds: int) -> list[NotifyArea]:
    """Read the answer to DEVICE_GET_REGION_IO_FDS; ioregionfds in it are left out.

    Args:
        payload: The answer.
        index: The region that was asked for.
        size: Its bytes.
        fds: How many descriptors came.

    Raises:
        ProtocolError: It is none, names other descriptors than came, or leaves the region.
    """
    if len(payload) < REGION_IO_FDS.size:
        raise ProtocolError(f"DEVICE_GET_REGION_IO_FDS was answered with {len(payload)} bytes")
    argsz, flags, answered, count = REGION_IO_FDS.unpack_from(payload)
    entries = payload[REGION_IO_FDS.size :]
    if answered != index or flags:
        raise ProtocolError(f"asked for region {index}, the server answered for {answered}")
    if count > CLIENT_AREAS or argsz != len(payload) or len(entries) != count * IO_FD.size:
        raise ProtocolError(f"{count} descriptors of region {index} in {len(payload)} bytes")
    found = []
    for offset, width, fd_index, kind, how, _, value in IO_FD.iter_unpack(entries):
        if kind != IoFdType.IOEVENTFD:
            continue
        if width not in (0, 1, 2, 4, 8) or offset + max(width, 1) > size or fd_index >= fds:
            raise ProtocolError(
                f"region {index} has an ioeventfd at {offset:#x}+{width:#x} with descriptor "
                f"{fd_index} of {fds}"
            )
        found.append(NotifyArea(offset, width, fd_index, value if how & DATAMATCH else None))
    return found


def _unpack(layout: struct.Struct, payload: bytes, name: str) -> tuple[int, ...]:
    if len(payload) != layout.size:
        raise ProtocolError(f"{name} was answered with {len(payload)} bytes, not {layout.size}")
    return layout.unpack(payload)
