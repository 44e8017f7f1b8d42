"""Capabilities of a PCI function: what they say at first, and what a driver may write to them.

Source: PCI Local Bus Specification 3.0, section 6.7 and appendix H; PCI Express Base Specification
4.0, sections 7.5.3 and 7.9.3; linux/pci_regs.h.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

from guestio.addr import check_int
from guestio.errors import DeviceError

MAX_MSIX_VECTORS = 2048
"""Vectors that an MSI-X table has at most."""
MAX_MSI_VECTORS = 32
"""Vectors of MSI at most."""

SEVERAL: Final = frozenset({0x08, 0x09})
"""Capabilities that a function may have several of: HyperTransport, vendor-specific ones."""
EXTENDED_SEVERAL: Final = frozenset({0x000B, 0x0023})
"""Extended ones: vendor-specific ones."""


class Layout(NamedTuple):
    """Bytes of a capability behind its header.

    Attributes:
        data: What they are after a reset.
        writable: The bits that a driver may write.
        cleared: The bits that a driver clears by writing ones.
    """

    data: bytes
    writable: bytes = b""
    cleared: bytes = b""


class Capability(ABC):
    """A capability of a PCI function.

    Attributes:
        number: Its identifier.
        extended: Whether it is in the extended configuration space, of PCI Express functions.
        version: Of an extended capability.
    """

    number: ClassVar[int]
    extended: ClassVar[bool] = False
    version: ClassVar[int] = 1

    @abstractmethod
    def layout(self) -> Layout:
        """What is behind the header: 2 bytes of a capability, 4 of an extended one."""


@dataclass(frozen=True)
class PciExpress(Capability):
    """A PCI Express endpoint, with function level reset.

    Attributes:
        port_type: 0 for an endpoint, 1 for a legacy one, 9 for an integrated one of the root
            complex.
    """

    number = 0x10
    CONTROL: ClassVar[int] = 8
    """Offset of the device control register in the capability."""
    FUNCTION_RESET: ClassVar[int] = 1 << 15
    """Bit of that register: resets the function."""
    port_type: int = 0

    def __post_init__(self) -> None:
        if check_int(self.port_type, "port_type") not in (0, 1, 9):
            raise ValueError(f"port_type {self.port_type} is no endpoint's: 0, 1 or 9")

    def layout(self) -> Layout:
        """See :class:`Capability`."""
        # Role-based error reporting, function level reset; one lane of 2.5 GT/s.
        data = struct.pack(
            "<HIHHIHH", 2 | self.port_type << 4, 1 << 28 | 1 << 15, 0x2810, 0, 0x11, 0, 0x11
        )
        writable = struct.pack("<HIHHIH", 0, 0, 0x7FFF, 0, 0, 0x0FFB)
        cleared = struct.pack("<HIHH", 0, 0, 0, 0x000F)
        return Layout(data.ljust(58, b"\0"), writable, cleared)


@dataclass(frozen=True)
class MsiX(Capability):
    """MSI-X.

    Attributes:
        vectors: How many, 1 to 2048.
        bar: Which BAR has table and pending bits; None for one of their own, the first that is
            free.
        table: Where in the BAR the table is, 16 bytes a vector; a multiple of 8.
        pba: Where the pending bits are, 8 bytes for 64 vectors; a multiple of 8.
    """

    number = 0x11
    vectors: int
    bar: int | None = None
    table: int = 0
    pba: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= check_int(self.vectors, "vectors") <= MAX_MSIX_VECTORS:
            raise ValueError(f"{self.vectors} MSI-X vectors are not in 1..{MAX_MSIX_VECTORS}")
        if self.bar is not None and not 0 <= check_int(self.bar, "bar") < 6:
            raise ValueError(f"bar {self.bar} of MSI-X is not in 0..5")
        if self.bar is None and (self.table or self.pba is not None):
            raise ValueError("table and pba of MSI-X are places in a BAR: say which, as bar")
        for name, at in (("table", self.table), ("pba", self.pba_offset)):
            if check_int(at, name) < 0 or at % 8 or at >= 1 << 32:
                raise ValueError(f"{name} {at:#x} is not a multiple of 8 below 4 GiB")
        if self.table < self.pba_offset + self.pba_size and self.pba_offset < (
            self.table + self.table_size
        ):
            raise ValueError("table and pending bits of MSI-X overlap")

    @property
    def table_size(self) -> int:
        """Bytes of the table."""
        return 16 * self.vectors

    @property
    def pba_size(self) -> int:
        """Bytes of the pending bits."""
        return (self.vectors + 63) // 64 * 8

    @property
    def pba_offset(self) -> int:
        """Where the pending bits are; unless it is said, in the page behind the table."""
        if self.pba is not None:
            return self.pba
        return (self.table + self.table_size + 4095) // 4096 * 4096

    def overlaps(self, bar: int, offset: int, size: int) -> bool:
        """Whether some of a range of a BAR is in the table or the pending bits."""
        return bar == self.bar and any(
            at < offset + size and offset < at + length
            for at, length in (
                (self.table, self.table_size),
                (self.pba_offset, self.pba_size),
            )
        )

    def layout(self) -> Layout:
        """See :class:`Capability`."""
        if self.bar is None:
            raise DeviceError("the BAR of MSI-X was not chosen")
        data = struct.pack(
            "<HII", self.vectors - 1, self.table | self.bar, self.pba_offset | self.bar
        )
        return Layout(data, struct.pack("<H", 0xC000))


@dataclass(frozen=True)
class Msi(Capability):
    """MSI with 64-bit addresses.

    Attributes:
        vectors: How many: a power of two up to 32.
    """

    number = 0x05
    vectors: int = 1

    def __post_init__(self) -> None:
        vectors = check_int(self.vectors, "vectors")
        if not 1 <= vectors <= MAX_MSI_VECTORS or vectors & (vectors - 1):
            raise ValueError(f"{vectors} MSI vectors are no power of two up to {MAX_MSI_VECTORS}")

    def layout(self) -> Layout:
        """See :class:`Capability`."""
        control = 1 << 7 | (self.vectors.bit_length() - 1) << 1
        return Layout(
            struct.pack("<HQH", control, 0, 0), struct.pack("<HQH", 0x71, 2**64 - 4, 0xFFFF)
        )


@dataclass(frozen=True)
class PowerManagement(Capability):
    """Power states D0 and D3hot.

    In D3hot the device keeps its state, but only its configuration space answers, and it is kept
    from DMA and interrupts.
    """

    number = 0x01
    CONTROL: ClassVar[int] = 4
    """Offset of the control register in the capability; its lowest two bits are the state."""

    def layout(self) -> Layout:
        """See :class:`Capability`."""
        no_soft_reset = 1 << 3
        return Layout(struct.pack("<HHH", 3, no_soft_reset, 0), struct.pack("<HHH", 0, 3, 0))


@dataclass(frozen=True)
class VendorSpecific(Capability):
    """Bytes that a vendor gives a meaning, read-only.

    Attributes:
        data: Up to 252 bytes; their number is put before them.
    """

    number = 0x09
    data: bytes = b""

    def __post_init__(self) -> None:
        if not isinstance(self.data, bytes | bytearray):
            raise TypeError(f"data must be bytes, not {type(self.data).__name__}")
        if len(self.data) > 252:
            raise ValueError(f"{len(self.data)} bytes of a vendor-specific capability, at most 252")

    def layout(self) -> Layout:
        """See :class:`Capability`."""
        return Layout(bytes([3 + len(self.data)]) + self.data)


@dataclass(frozen=True)
class BarWindow(Capability):
    """A window in the configuration space through which BARs are accessed: virtio's, type 5.

    The driver writes a BAR, an offset and a length of 1, 2 or 4 bytes; a read or write of the
    capability's data is one of the BAR then (virtio 1.4, section 4.1.4.9). Firmware uses it while
    BARs have no address that it reaches.
    """

    number = 0x09
    BAR: ClassVar[int] = 4
    """Offset of the BAR's number in the capability, a byte."""
    PLACE: ClassVar[int] = 8
    """Offset of the offset and the length, 32 bits each, and of the data, 4 bytes."""

    def layout(self) -> Layout:
        """See :class:`Capability`."""
        return Layout(
            struct.pack("<BBBB2xIII", 20, 5, 0, 0, 0, 0, 0),
            struct.pack("<BBBB2xIII", 0, 0, 0xFF, 0, 2**32 - 1, 2**32 - 1, 2**32 - 1),
        )


@dataclass(frozen=True)
class SerialNumber(Capability):
    """A serial number of 64 bits; for a PCI Express function.

    Attributes:
        value: The number.
    """

    number = 0x0003
    extended = True
    value: int

    def __post_init__(self) -> None:
        if not 0 <= check_int(self.value, "value") < 1 << 64:
            raise ValueError(f"a serial number of {self.value:#x} does not fit 64 bits")

    def layout(self) -> Layout:
        """See :class:`Capability`."""
        return Layout(struct.pack("<Q", self.value))
