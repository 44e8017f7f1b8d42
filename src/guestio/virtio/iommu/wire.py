"""What a virtio-iommu and its driver say to each other, as bytes (virtio 1.3, section 5.13)."""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, Self

F_INPUT_RANGE: Final = 1 << 0
F_DOMAIN_RANGE: Final = 1 << 1
F_MAP_UNMAP: Final = 1 << 2
F_BYPASS: Final = 1 << 3
F_PROBE: Final = 1 << 4
F_MMIO: Final = 1 << 5
F_BYPASS_CONFIG: Final = 1 << 6
"""Feature bits (section 5.13.3)."""

ATTACH_F_BYPASS: Final = 1 << 0
MAP_F_READ: Final = 1 << 0
MAP_F_WRITE: Final = 1 << 1
MAP_F_MMIO: Final = 1 << 2

RESV_MEM_RESERVED: Final = 0
RESV_MEM_MSI: Final = 1
"""Subtypes of reserved memory (section 5.13.6.8.1)."""

FAULT_F_READ: Final = 1 << 0
FAULT_F_WRITE: Final = 1 << 1
FAULT_F_ADDRESS: Final = 1 << 8
"""Flags of a fault record (section 5.13.6.9)."""

TAIL_BYTES: Final = 4
"""Size of ``struct virtio_iommu_req_tail``, the end of every answer."""


class RequestType(enum.IntEnum):
    """``VIRTIO_IOMMU_T_*`` (section 5.13.6)."""

    ATTACH = 1
    DETACH = 2
    MAP = 3
    UNMAP = 4
    PROBE = 5


class Status(enum.IntEnum):
    """``VIRTIO_IOMMU_S_*`` (section 5.13.6)."""

    OK = 0
    IOERR = 1
    UNSUPP = 2
    DEVERR = 3
    INVAL = 4
    RANGE = 5
    NOENT = 6
    FAULT = 7
    NOMEM = 8


class FaultReason(enum.IntEnum):
    """``VIRTIO_IOMMU_FAULT_R_*`` (section 5.13.6.9)."""

    UNKNOWN = 0
    DOMAIN = 1
    MAPPING = 2


class Attach(NamedTuple):
    """``struct virtio_iommu_req_attach``."""

    domain: int
    endpoint: int
    flags: int
    reserved: bytes


class Detach(NamedTuple):
    """``struct virtio_iommu_req_detach`` without its reserved field, which is ignored."""

    domain: int
    endpoint: int


class Map(NamedTuple):
    """``struct virtio_iommu_req_map``; ``virt_end`` is inclusive."""

    domain: int
    virt_start: int
    virt_end: int
    phys_start: int
    flags: int


class Unmap(NamedTuple):
    """``struct virtio_iommu_req_unmap``; ``virt_end`` is inclusive."""

    domain: int
    virt_start: int
    virt_end: int
    reserved: bytes


class Probe(NamedTuple):
    """``struct virtio_iommu_req_probe`` without its reserved field, which is ignored."""

    endpoint: int


Request = Attach | Detach | Map | Unmap | Probe

# Each begins with struct virtio_iommu_req_head: u8 type, u8 reserved[3], which is ignored.
_LAYOUT: Final[dict[int, tuple[struct.Struct, type[Request]]]] = {
    RequestType.ATTACH: (struct.Struct("<4xIII4s"), Attach),
    RequestType.DETACH: (struct.Struct("<4xII8x"), Detach),
    RequestType.MAP: (struct.Struct("<4xIQQQI"), Map),
    RequestType.UNMAP: (struct.Struct("<4xIQQ4s"), Unmap),
    RequestType.PROBE: (struct.Struct("<4xI64x"), Probe),
}
LONGEST_REQUEST: Final = max(layout.size for layout, _ in _LAYOUT.values())
"""Bytes of a request beyond which nothing is looked at."""

MAP_BYTES: Final = _LAYOUT[RequestType.MAP][0].size
"""Bytes of a MAP."""

_CONFIG: Final = struct.Struct("<QQQIIIB3x")
BYPASS_OFFSET: Final = 36
"""Where ``bypass`` is in the configuration space."""
_RESV_MEM: Final = struct.Struct("<HHB3xQQ")
_PROBE_T_RESV_MEM: Final = 1
RESV_MEM_BYTES: Final = _RESV_MEM.size
"""Bytes that one reserved region takes in the answer to a PROBE."""
_FAULT: Final = struct.Struct("<B3xIIIQ")


def parse(request: bytes) -> Request | None:
    """Read a request, or None if its type is unknown or it is too short for its type.

    What follows a whole request is ignored.
    """
    layout = _LAYOUT.get(request[0]) if request else None
    if layout is None or len(request) < layout[0].size:
        return None
    made: Request = layout[1](*layout[0].unpack_from(request))
    return made


def pack(request: Request) -> bytes:
    """A request as a driver writes it: the device-readable part."""
    for kind, (layout, cls) in _LAYOUT.items():
        if isinstance(request, cls):
            packed = bytearray(layout.pack(*request))
            packed[0] = kind
            return bytes(packed)
    raise TypeError(f"{type(request).__name__} is not a request")


def split(requests: bytes) -> Iterator[bytes]:
    """The requests in a row of whole ones.

    Raises:
        ValueError: It is none.
    """
    at = 0
    while at < len(requests):
        layout = _LAYOUT.get(requests[at])
        if layout is None or at + layout[0].size > len(requests):
            raise ValueError(f"no whole request at byte {at}")
        yield requests[at : at + layout[0].size]
        at += layout[0].size


def tail(status: int) -> bytes:
    """``struct virtio_iommu_req_tail``."""
    return bytes((status, 0, 0, 0))


def failure(request: Request, room: int, probe_size: int) -> bytes:
    """The answer to a request that failed for a reason of the device's own.

    Args:
        request: The request.
        room: How many device-writable bytes there are, `TAIL_BYTES` at least.
        probe_size: As in the configuration space.
    """
    before = min(probe_size, room - TAIL_BYTES) if isinstance(request, Probe) else 0
    return bytes(before) + tail(Status.DEVERR)


def pack_config(
    page_size_mask: int,
    input_range: tuple[int, int],
    domain_range: tuple[int, int],
    probe_size: int,
    bypass: bool,
) -> bytes:
    """``struct virtio_iommu_config`` (section 5.13.4); the ranges are inclusive."""
    return _CONFIG.pack(page_size_mask, *input_range, *domain_range, probe_size, bypass)


def pack_reserved(regions: Sequence[tuple[int, int, int]]) -> bytes:
    """RESV_MEM properties for regions ``(first, last, subtype)`` (section 5.13.6.8.1)."""
    return b"".join(
        _RESV_MEM.pack(_PROBE_T_RESV_MEM, _RESV_MEM.size - 4, subtype, first, last)
        for first, last, subtype in regions
    )


class FaultRecord(bytes):
    """``struct virtio_iommu_fault`` (section 5.13.6.9): the bytes for the event queue.

    Its fields can be read as attributes.
    """

    SIZE: Final = _FAULT.size

    @classmethod
    def make(cls, reason: int, flags: int, endpoint: int, address: int) -> Self:
        """A record of its fields."""
        return cls(_FAULT.pack(reason, flags, endpoint, 0, address))

    @property
    def reason(self) -> FaultReason:
        """Why it is reported."""
        return FaultReason(self[0])

    @property
    def flags(self) -> int:
        """``FAULT_F_*``."""
        return int(_FAULT.unpack(self)[1])

    @property
    def endpoint(self) -> int:
        """Whose access it was."""
        return int(_FAULT.unpack(self)[2])

    @property
    def address(self) -> int:
        """First I/O virtual address that could not be accessed."""
        return int(_FAULT.unpack(self)[4])

    def __repr__(self) -> str:
        return (
            f"<FaultRecord {self.reason.name} endpoint {self.endpoint} at {self.address:#x} "
            f"flags {self.flags:#x}>"
        )
