"""The messages of vfio-user: codes, headers, payloads.

Source: QEMU docs/interop/vfio-user.rst (vfio-user 0.1); linux/vfio.h. Numbers are in the byte order
of the host, which is little-endian here.
"""

from __future__ import annotations

import enum
import errno
import json
import os
import struct
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from guestio.errors import GuestioError, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Mapping

VERSION_MAJOR: Final = 0
VERSION_MINOR: Final = 1
"""The version that is spoken."""

HEADER_SIZE: Final = 16
MAX_FDS: Final = 16
"""Descriptors of one message at most. QEMU's limit, of which it accepts no larger one."""
MAX_DATA: Final = 1 << 16
"""Bytes of data that one message transfers at most (``max_data_xfer_size``). QEMU cuts longer
answers to DMA_READ, and a device answers for each register."""
MAX_PAYLOAD: Final = MAX_DATA + 4096
"""Bytes behind a header at most."""
MAX_VERSION_DATA: Final = 4096
"""Bytes of a client's capabilities at most."""

CONFIG_REGION: Final = 7
REGIONS: Final = 9
"""Regions of a PCI device: six BARs, ROM, configuration space, VGA (linux/vfio.h)."""
IRQ_INDICES: Final = 5
"""Kinds of interrupts of a PCI device: INTx, MSI, MSI-X, error, request."""


class Command(enum.IntEnum):
    """What a message asks for."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


class HeaderFlag(enum.IntFlag):
    """Flags of a header; the lowest four bits are the type."""

    REPLY = 1
    TYPE = 0xF
    NO_REPLY = 1 << 4
    ERROR = 1 << 5


class DmaFlag(enum.IntFlag):
    """Flags of DMA_MAP; they are `Permissions`, too."""

    READ = 1
    WRITE = 2


UNMAP_ALL: Final = 1 << 1
"""Flag of DMA_UNMAP: everything, with an address and a size of 0 (VFIO_DMA_UNMAP_FLAG_ALL)."""


class DeviceFlag(enum.IntFlag):
    """Flags of DEVICE_GET_INFO."""

    RESET = 1
    PCI = 2


class RegionFlag(enum.IntFlag):
    """Flags of DEVICE_GET_REGION_INFO."""

    READ = 1
    WRITE = 2
    MMAP = 4
    CAPS = 8


class IrqFlag(enum.IntFlag):
    """Flags of DEVICE_GET_IRQ_INFO."""

    EVENTFD = 1
    MASKABLE = 2
    AUTOMASKED = 4


class IrqSet(enum.IntFlag):
    """Flags of DEVICE_SET_IRQS: one kind of data, one action."""

    DATA_NONE = 1
    DATA_BOOL = 2
    DATA_EVENTFD = 4
    DATA = 7
    MASK = 8
    UNMASK = 16
    TRIGGER = 32
    ACTION = 56


_ERRNOS: Final = 4096
"""Error numbers of Linux are below (MAX_ERRNO of linux/err.h)."""


class IoFdType(enum.IntEnum):
    """What a descriptor of DEVICE_GET_REGION_IO_FDS is."""

    IOEVENTFD = 0
    IOREGIONFD = 1


DATAMATCH: Final = 1
"""Flag of an ioeventfd: it is for writes of one value only (``KVM_IOEVENTFD_FLAG_DATAMATCH``)."""


class RefusalError(GuestioError):
    """A request that is answered with an error; the connection goes on.

    Attributes:
        number: The errno of the answer; EIO for a number that a peer sent and that is none.
    """

    def __init__(self, number: int, reason: str) -> None:
        self.number = number if 0 < number < _ERRNOS else errno.EIO
        super().__init__(f"{reason} ({os.strerror(self.number)})")


def command_name(command: int) -> str:
    """The name of a command, or its number."""
    try:
        return Command(command).name
    except ValueError:
        return f"command {command}"


class Header(NamedTuple):
    """The 16 bytes before every payload.

    Attributes:
        number: Identifies a message to its sender.
        request: Its `Command`, if known.
        size: Bytes of the payload.
        flags: `HeaderFlag` bits.
        error: The errno of an answer with `HeaderFlag.ERROR`.
    """

    number: int
    request: int
    size: int
    flags: int = 0
    error: int = 0

    @property
    def name(self) -> str:
        """Name of the command."""
        return command_name(self.request)

    @property
    def is_reply(self) -> bool:
        """Whether this answers a message."""
        return self.flags & HeaderFlag.TYPE == HeaderFlag.REPLY

    @property
    def wants_reply(self) -> bool:
        """Whether the sender waits for an answer."""
        return not self.flags & HeaderFlag.NO_REPLY

    def encode(self) -> bytes:
        """The header's bytes."""
        return _HEADER.pack(
            self.number, self.request, HEADER_SIZE + self.size, self.flags, self.error
        )

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read a header.

        Raises:
            ProtocolError: Its size or type cannot be; where the next message begins is unknown.
        """
        number, request, total, flags, error = _HEADER.unpack(data)
        if not HEADER_SIZE <= total <= HEADER_SIZE + MAX_PAYLOAD:
            raise ProtocolError(
                f"{command_name(request)} says that it is {total} bytes long, "
                f"not {HEADER_SIZE} to {HEADER_SIZE + MAX_PAYLOAD}"
            )
        if flags & HeaderFlag.TYPE not in (0, HeaderFlag.REPLY):
            raise ProtocolError(
                f"{command_name(request)} is of type {flags & HeaderFlag.TYPE}: "
                "neither a command nor a reply"
            )
        return cls(number, request, total - HEADER_SIZE, flags, error)

    def reply(self, payload: bytes = b"") -> bytes:
        """An answer to this message."""
        made = Header(self.number, self.request, len(payload), HeaderFlag.REPLY)
        return made.encode() + payload

    def refuse(self, error: int) -> bytes:
        """An answer that says why the request was refused."""
        flags = HeaderFlag.REPLY | HeaderFlag.ERROR
        return Header(self.number, self.request, 0, flags, error).encode()


class Version(NamedTuple):
    """VERSION, both ways.

    Attributes:
        major: Must be the same on both sides.
        minor: The lower one of both sides is spoken.
        capabilities: What the sender can do.
    """

    major: int
    minor: int
    capabilities: Mapping[str, object]

    @property
    def max_data(self) -> int:
        """Bytes of data that the sender takes in one message (``max_data_xfer_size``)."""
        said = self.capabilities.get("max_data_xfer_size")
        return said if isinstance(said, int) and said > 0 else 1 << 20

    @property
    def max_fds(self) -> int:
        """Descriptors that the sender takes with one message (``max_msg_fds``)."""
        said = self.capabilities.get("max_msg_fds")
        return said if isinstance(said, int) and said >= 0 else 1

    def encode(self) -> bytes:
        """The payload."""
        text = json.dumps({"capabilities": dict(self.capabilities)}, separators=(",", ":"))
        return struct.pack("<HH", self.major, self.minor) + text.encode() + b"\0"

    @classmethod
    def decode(cls, payload: bytes) -> Self:
        """Read a payload.

        Raises:
            RefusalError: It is none.
        """
        if not 4 <= len(payload) <= 4 + MAX_VERSION_DATA:
            raise RefusalError(22, f"a VERSION of {len(payload)} bytes")
        major, minor = struct.unpack_from("<HH", payload)
        text = payload[4:].rstrip(b"\0")
        try:
            said = json.loads(text) if text else {}
        except (ValueError, RecursionError):
            raise RefusalError(22, "version data that is not JSON") from None
        capabilities = said.get("capabilities", {}) if isinstance(said, dict) else None
        if not isinstance(capabilities, dict):
            raise RefusalError(22, "version data without capabilities")
        for name in ("max_msg_fds", "max_data_xfer_size", "pgsizes"):
            number = capabilities.get(name, 0)
            if type(number) is not int or number < 0:
                raise RefusalError(22, f"{name} is {str(number)[:40]!r}, not a number from 0 on")
        return cls(major, minor, capabilities)


class DmaMap(NamedTuple):
    """DMA_MAP: memory that the device may reach from now on."""

    argsz: int
    flags: int
    offset: int
    address: int
    size: int


class DmaUnmap(NamedTuple):
    """DMA_UNMAP: memory that it may reach no more."""

    argsz: int
    flags: int
    address: int
    size: int


class DeviceInfo(NamedTuple):
    """DEVICE_GET_INFO, both ways."""

    argsz: int
    flags: int
    regions: int
    irqs: int


class RegionInfo(NamedTuple):
    """DEVICE_GET_REGION_INFO, both ways; capabilities may follow."""

    argsz: int
    flags: int
    region: int
    cap_offset: int
    size: int
    offset: int


class RegionIoFds(NamedTuple):
    """DEVICE_GET_REGION_IO_FDS, both ways."""

    argsz: int
    flags: int
    region: int
    number: int


class IrqInfo(NamedTuple):
    """DEVICE_GET_IRQ_INFO, both ways."""

    argsz: int
    flags: int
    kind: int
    number: int


class SetIrqs(NamedTuple):
    """DEVICE_SET_IRQS; booleans may follow."""

    argsz: int
    flags: int
    kind: int
    start: int
    number: int


class RegionAccess(NamedTuple):
    """REGION_READ and REGION_WRITE, both ways; data may follow."""

    offset: int
    region: int
    length: int


class Feature(NamedTuple):
    """DEVICE_FEATURE; data may follow."""

    argsz: int
    flags: int


_HEADER: Final = struct.Struct("<HHIII")
DMA_MAP: Final = struct.Struct("<IIQQQ")
DMA_UNMAP: Final = struct.Struct("<IIQQ")
DEVICE_INFO: Final = struct.Struct("<IIII")
REGION_INFO: Final = struct.Struct("<IIIIQQ")
REGION_IO_FDS: Final = struct.Struct("<IIII")
IRQ_INFO: Final = struct.Struct("<IIII")
SET_IRQS: Final = struct.Struct("<IIIII")
REGION_ACCESS: Final = struct.Struct("<QII")
DMA_ACCESS: Final = struct.Struct("<QQ")
"""Address and bytes of DMA_READ and DMA_WRITE; data may follow."""
MULTI_COUNT: Final = struct.Struct("<Q")
MULTI_WRITE: Final = struct.Struct("<QII8s")
FEATURE: Final = struct.Struct("<II")
IO_FD: Final = struct.Struct("<QQIIIIQ")
"""Offset, size, index of the descriptor, type, flags, padding, value of an `IoFdType`."""
INFO_CAP: Final = struct.Struct("<HHI")
"""Identifier, version, and where the next one is (``struct vfio_info_cap_header``)."""

_SPARSE_HEAD: Final = struct.Struct("<HHIII")
SPARSE_COUNT: Final = struct.Struct("<II")
SPARSE_AREA: Final = struct.Struct("<QQ")
CAP_SPARSE_MMAP: Final = 1


def sparse_mmap(areas: list[tuple[int, int]]) -> bytes:
    """The capability of a region of which only some areas can be mapped."""
    head = _SPARSE_HEAD.pack(CAP_SPARSE_MMAP, 1, 0, len(areas), 0)
    return head + b"".join(SPARSE_AREA.pack(at, size) for at, size in areas)
