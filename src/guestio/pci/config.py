"""The configuration space of a PCI function: registers, and which of their bits a driver sets.

Source: PCI Local Bus Specification 3.0, section 6.1; linux/pci_regs.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from guestio.errors import DeviceError
from guestio.pci.capabilities import (
    BarWindow,
    Capability,
    Layout,
    MsiX,
    PciExpress,
    PowerManagement,
)

if TYPE_CHECKING:
    from guestio.pci.device import Bar, PciDevice

SIZE: Final = 256
EXTENDED_SIZE: Final = 4096

COMMAND: Final = 0x04
STATUS: Final = 0x06
_BARS: Final = 0x10
_FIRST_CAPABILITY: Final = 0x40
_FIRST_EXTENDED: Final = 0x100
_CAPABILITIES_POINTER: Final = 0x34

COMMAND_IO: Final = 1 << 0
COMMAND_MEMORY: Final = 1 << 1
COMMAND_MASTER: Final = 1 << 2
COMMAND_INTX_DISABLE: Final = 1 << 10
_COMMAND_WRITABLE: Final = 0x0547  # I/O, memory, master, parity, SERR, INTx disable
_STATUS_CAPABILITIES: Final = 1 << 4
_STATUS_CLEARED: Final = 0xF900


class ConfigSpace:
    """The configuration space of a function, with a header of type 0.

    Bytes that belong to no register read as 0 and ignore what is written.

    Args:
        device: What it describes.
        bars: Its BARs by their index, that of MSI-X included.
        capabilities: What it can do.
        interrupt_pin: 1 for INTA, 0 for none.

    Raises:
        DeviceError: The capabilities do not fit.

    Attributes:
        size: Bytes.
        window: Where a `BarWindow` is, or None.
    """

    def __init__(
        self,
        device: PciDevice,
        bars: dict[int, Bar],
        capabilities: Iterable[Capability],
        interrupt_pin: int,
    ) -> None:
        capabilities = list(capabilities)
        express = any(isinstance(each, PciExpress) for each in capabilities)
        self.size: Final = EXTENDED_SIZE if express else SIZE
        self._initial = bytearray(self.size)
        self._writable = bytearray(self.size)
        self._cleared = bytearray(self.size)
        self._place_header(device, interrupt_pin)
        for index, bar in bars.items():
            self._place_bar(index, bar)
        self._express: int | None = None
        self._power: int | None = None
        self._msix: int | None = None
        self.window: int | None = None
        self._place_capabilities([each for each in capabilities if not each.extended])
        self._place_extended([each for each in capabilities if each.extended])
        self._data = bytearray(self._initial)

    def _place_header(self, device: PciDevice, interrupt_pin: int) -> None:
        subsystem_vendor = device.subsystem_vendor_id
        subsystem = device.subsystem_id
        struct.pack_into(
            "<HHHHI",
            self._initial,
            0,
            device.vendor_id,
            device.device_id,
            0,
            0,
            device.revision | device.class_code << 8,
        )
        struct.pack_into(
            "<HH",
            self._initial,
            0x2C,
            device.vendor_id if subsystem_vendor is None else subsystem_vendor,
            device.device_id if subsystem is None else subsystem,
        )
        self._initial[0x3D] = interrupt_pin
        struct.pack_into("<HH", self._writable, COMMAND, _COMMAND_WRITABLE, 0)
        struct.pack_into("<HH", self._cleared, COMMAND, 0, _STATUS_CLEARED)
        # Cache line size, latency timer, interrupt line: for software to note.
        self._writable[0x0C] = self._writable[0x0D] = self._writable[0x3C] = 0xFF

    def _place_bar(self, index: int, bar: Bar) -> None:
        at = _BARS + 4 * index
        flags = 1 if bar.io else (4 if bar.wide else 0) | (8 if bar.prefetchable else 0)
        struct.pack_into("<I", self._initial, at, flags)
        mask = -bar.size & (2**64 - 1 if bar.wide else 2**32 - 1)
        struct.pack_into("<Q" if bar.wide else "<I", self._writable, at, mask)

    def _place_capabilities(self, capabilities: list[Capability]) -> None:
        at, pointer = _FIRST_CAPABILITY, _CAPABILITIES_POINTER
        for each in capabilities:
            layout = _layout(each)
            if at + 2 + len(layout.data) > SIZE:
                raise DeviceError(f"the capabilities do not fit into {SIZE} bytes: {each} is over")
            self._initial[pointer] = at
            self._initial[at] = each.number
            self._put(at + 2, layout.data, layout.writable, layout.cleared)
            if isinstance(each, PciExpress):
                self._express = at
            elif isinstance(each, PowerManagement):
                self._power = at
            elif isinstance(each, MsiX):
                self._msix = at
            elif isinstance(each, BarWindow):
                self.window = at
            pointer = at + 1
            at = (at + 2 + len(layout.data) + 3) & ~3
        if capabilities:
            self._initial[STATUS] |= _STATUS_CAPABILITIES

    def _place_extended(self, capabilities: list[Capability]) -> None:
        if capabilities and self.size != EXTENDED_SIZE:
            raise DeviceError(f"{capabilities[0]} needs a PciExpress capability")
        at = _FIRST_EXTENDED
        for number, each in enumerate(capabilities):
            layout = _layout(each)
            end = (at + 4 + len(layout.data) + 3) & ~3
            if end > self.size:
                raise DeviceError(f"the extended capabilities do not fit: {each} is over")
            following = end if number + 1 < len(capabilities) else 0
            struct.pack_into(
                "<I", self._initial, at, each.number | each.version << 16 | following << 20
            )
            self._put(at + 4, layout.data, layout.writable, layout.cleared)
            at = end

    def _put(self, at: int, data: bytes, writable: bytes, cleared: bytes) -> None:
        self._initial[at : at + len(data)] = data
        self._writable[at : at + len(writable)] = writable
        self._cleared[at : at + len(cleared)] = cleared

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the space, which the range does not leave."""
        return bytes(self._data[offset : offset + size])

    def write(self, offset: int, data: bytes) -> bool:
        """Write what may be written of a range, which does not leave the space.

        Returns:
            Whether that asks for a function level reset.
        """
        for at, value in enumerate(data, offset):
            mask, cleared = self._writable[at], self._cleared[at]
            self._data[at] = (self._data[at] & ~mask & ~(value & cleared)) | (value & mask)
        if self._express is None:
            return False
        # The bit that asks for a reset reads as 0, so it is looked for in what was written.
        high = self._express + PciExpress.CONTROL + 1 - offset
        return 0 <= high < len(data) and bool(data[high] & PciExpress.FUNCTION_RESET >> 8)

    def reset(self) -> None:
        """Set every register to what it is at first."""
        self._data[:] = self._initial

    @property
    def command(self) -> int:
        """The command register."""
        return int.from_bytes(self._data[COMMAND : COMMAND + 2], "little")

    @property
    def bus_master(self) -> bool:
        """Whether the function may access memory: its driver allows it, and it has power."""
        return bool(self.command & COMMAND_MASTER) and self.power_state == 0

    @property
    def msix_enabled(self) -> bool:
        """Whether the driver has switched MSI-X on."""
        return self._msix is not None and bool(self._data[self._msix + 3] & 0x80)

    def window_data(self, offset: int, size: int) -> int | None:
        """Where the data of the `BarWindow` is, if a range overlaps it."""
        if self.window is None:
            return None
        at = self.window + BarWindow.PLACE + 8
        return at if offset < at + 4 and at < offset + size else None

    def window_target(self) -> tuple[int, int, int]:
        """BAR, offset and length that the driver wrote to the `BarWindow`."""
        assert self.window is not None
        at, length = struct.unpack_from("<II", self._data, self.window + BarWindow.PLACE)
        return self._data[self.window + BarWindow.BAR], at, length

    def set_window_data(self, data: bytes) -> None:
        """Show what was read through the `BarWindow`."""
        assert self.window is not None
        at = self.window + BarWindow.PLACE + 8
        self._data[at : at + len(data)] = data

    @property
    def power_state(self) -> int:
        """0 for D0 to 3 for D3hot."""
        if self._power is None:
            return 0
        return self._data[self._power + PowerManagement.CONTROL] & 3


def _layout(capability: Capability) -> Layout:
    """What a capability says of itself.

    Raises:
        DeviceError: That cannot be.
    """
    layout = capability.layout()
    if not isinstance(layout, Layout):
        raise DeviceError(f"{capability}.layout() is no Layout, but {layout!r}")
    data, writable, cleared = layout
    if max(len(writable), len(cleared)) > len(data):
        raise DeviceError(f"{capability} has {len(data)} bytes, and says of more what a driver may")
    if any(set_by & cleared_by for set_by, cleared_by in zip(writable, cleared, strict=False)):
        raise DeviceError(f"{capability} has bits that a driver writes and, by writing, clears")
    return layout
