"""What a PCI device is, whatever wire its driver is behind."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from guestio.addr import check_int
from guestio.errors import DeviceError
from guestio.memory import Backing
from guestio.pci.capabilities import (
    EXTENDED_SEVERAL,
    MAX_MSIX_VECTORS,
    SEVERAL,
    BarWindow,
    Capability,
    Msi,
    MsiX,
)
from guestio.pci.registers import Field, Register, RegisterFile, RegisterTable

if TYPE_CHECKING:
    from guestio.pci.host import PciHost
    from guestio.pci.virtio_pci import VirtioPci

BARS = 6
"""BARs of a function."""
_PAGE = 4096
NO_VENDOR = 0xFFFF
"""What is read where no function is."""


@dataclass(frozen=True)
class Bar:
    """A base address register: a window that the driver sees the device's registers through.

    Attributes:
        size: Bytes, a power of two: 16 at least, of an I/O BAR 4 to 256.
        wide: Whether its address has 64 bits; it takes the next BAR's place too then.
        prefetchable: Whether reads have no side effects.
        io: Whether it is in I/O space.
        width: Bytes of an access at most; wider ones reach the device as several. 1, 2, 4 or 8.
        memory: Memory of a file that the driver reads and writes without the device: the client
            maps it if it can. It has ``size`` bytes; None for none.
        areas: Parts of ``memory`` that are reached so, as ``(offset, size)`` in whole pages; the
            rest goes to the device. Without any, all of it is.
    """

    size: int
    wide: bool = False
    prefetchable: bool = False
    io: bool = False
    width: int = 4
    memory: Backing | None = None
    areas: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        size = check_int(self.size, "size")
        least, most = (4, 256) if self.io else (16, 1 << 62 if self.wide else 1 << 31)
        if not least <= size <= most or size & (size - 1):
            raise ValueError(f"size {size:#x} of a BAR is no power of two in {least}..{most:#x}")
        if self.io and (self.wide or self.prefetchable or self.memory is not None):
            raise ValueError("a BAR in I/O space is neither wide nor prefetchable nor memory")
        if self.width not in (1, 2, 4, 8):
            raise ValueError(f"width {self.width} is not 1, 2, 4 or 8")
        if self.io and self.width == 8:
            raise ValueError("an access to I/O space has 4 bytes at most, not a width of 8")
        if self.memory is not None:
            _check_memory(self.memory, size)
        if self.areas and self.memory is None:
            raise ValueError("areas are parts of the memory of a BAR, which has none")
        end = 0
        for at, length in self.areas:
            check_int(at, "the offset of an area")
            check_int(length, "the size of an area")
            if at < end or length <= 0 or at % _PAGE or length % _PAGE or at + length > size:
                raise ValueError(
                    f"areas {list(self.areas)} are not whole pages within {size:#x} bytes, "
                    "ascending and disjoint"
                )
            end = at + length

    def explain(self) -> str:
        """What it is, as text."""
        if self.io:
            return f"{self.size:#x} bytes of I/O space"
        words = ["64-bit" if self.wide else "32-bit"]
        words += ["prefetchable"] if self.prefetchable else []
        shared = ", memory that the driver maps" if self.memory is not None else ""
        return f"{self.size:#x} bytes, {' '.join(words)}{shared}"

    def mapped(self, offset: int, size: int) -> bool:
        """Whether a range is in memory that the driver reaches without the device."""
        if self.memory is None:
            return False
        areas = self.areas or ((0, self.size),)
        return any(at <= offset and offset + size <= at + length for at, length in areas)

    def overlaps_memory(self, offset: int, size: int) -> bool:
        """Whether some of a range is."""
        if self.memory is None:
            return False
        areas = self.areas or ((0, self.size),)
        return any(at < offset + size and offset < at + length for at, length in areas)


def _check_memory(memory: object, size: int) -> None:
    if not isinstance(memory, Backing):
        raise TypeError(f"memory of a BAR is a guestio Backing, not {memory!r}")
    if memory.fd is None or memory.file_offset is None or memory.size != size:
        raise ValueError(f"memory of a BAR is that of a file, of {size:#x} bytes")
    if not memory.writable:
        raise ValueError("memory of a BAR can be written: drivers write to it")
    if memory.file_offset % _PAGE:
        raise ValueError(
            f"memory of a BAR begins at {memory.file_offset:#x} of its file, where no page does: "
            "no client could map it"
        )


class PciDevice(ABC):
    """A PCI function: registers behind BARs, interrupts, and DMA through its host.

    A subclass says what it is in class attributes, or sets them before it is served. Its registers
    are attributes too (:class:`Register`), or it answers accesses in :meth:`read` and
    :meth:`write`. All methods are called in the thread of the event loop, one at a time.

    Attributes:
        vendor_id: The vendor, 16 bits.
        device_id: The device, 16 bits.
        class_code: Class, subclass and programming interface, 24 bits.
        revision: 8 bits.
        subsystem_vendor_id: None for ``vendor_id``.
        subsystem_id: None for ``device_id``.
        bars: Its BARs by index, 0 to 5.
        interrupts: How many interrupt vectors it has. Without a capability for them, they are those
            of MSI-X, in a BAR of its own, the first that is free; and INTx is offered, too. With an
            `MsiX` of its own that has as many at least; messages of `Msi` may be fewer, and
            vectors share them then.
        msix: False for no MSI-X unless ``capabilities`` say so: with INTx alone, as with MSI, a
            device can be unplugged from QEMU 11.1, which MSI-X makes abort.
        capabilities: What it can do besides.
    """

    vendor_id: int
    device_id: int
    class_code: int = 0xFF0000
    revision: int = 0
    subsystem_vendor_id: int | None = None
    subsystem_id: int | None = None
    bars: Mapping[int, Bar] = {}
    interrupts: int = 0
    msix: bool = True
    capabilities: Sequence[Capability] = ()
    _table: ClassVar[RegisterTable] = RegisterTable(())

    def __init_subclass__(cls, **options: Any) -> None:
        """Gather the registers.

        Raises:
            DeviceError: Two of them overlap, or one is called like a part of this class.
        """
        super().__init_subclass__(**options)
        taken = {*dir(PciDevice), *PciDevice.__annotations__}
        for name, value in vars(cls).items():
            if isinstance(value, Register | Field) and name in taken:
                raise DeviceError(f"{cls.__name__}.{name}: a register cannot be called that")
        cls._table = RegisterTable.of(cls)

    @property
    def virtio(self) -> VirtioPci | None:
        """The virtio device that it is, or hides; None of any other device."""
        return None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.vendor_id:04x}:{self.device_id:04x}>"

    def attached(self, host: PciHost) -> None:
        """Learn the host: memory, interrupts, descriptors and timers. Called once, at first."""

    def read(self, bar: int, offset: int, size: int) -> int:
        """Read a register; the value, of which ``size`` bytes are given to the driver.

        An exception is logged, and the driver reads ones. By default it is what each
        :class:`Register` there says, and 0 where there is none.

        Args:
            bar: Which BAR.
            offset: Where in it, a multiple of ``size``.
            size: 1, 2, 4 or 8 bytes, up to the BAR's width.
        """
        return self.register_file.read(bar, offset, size)

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Write a register. An exception is logged. By default each :class:`Register` is."""
        self.register_file.write(bar, offset, size, value)

    @cached_property
    def register_file(self) -> RegisterFile:
        """The values of its registers."""
        return RegisterFile(self, self._table)

    def explain(self) -> str:
        """What it is, as text: numbers, BARs, interrupts, and its registers with their values.

        Raises:
            TypeError, ValueError, DeviceError: It is not described as a device should be.
        """
        check_device(self)
        bars, capabilities = complete(self)
        number = f"{self.vendor_id:04x}:{self.device_id:04x}"
        lines = [
            f"{type(self).__name__}: PCI function {number}, class {self.class_code:06x}",
            *(f"BAR {number}: {bar.explain()}" for number, bar in sorted(bars.items())),
            f"interrupts: {self.interrupts}",
            *(f"capability: {each}" for each in capabilities),
        ]
        if self._table.registers:
            lines.append(self.register_file.explain())
        return "\n".join(lines)

    def reset(self) -> None:
        """Become as at first: the driver, the machine, or the end of a connection asks for it.

        Memory that the device holds must be let go of. Each :class:`Register` has
        its value after a reset already.
        """

    def memory_changed(self) -> None:
        """Learn that DMA leads elsewhere: `PciHost.memory` has another ``reachable`` now.

        Bus mastering was switched on or off, a client came or went, or memory of another file is
        among what the client has mapped. For devices that keep what ``reachable`` says; accesses by
        `PciHost.memory` follow by themselves. After bus mastering was switched off, the device must
        not access memory any more once this returns. By default nothing happens.
        """

    def revoked(self, address: int, size: int) -> None:
        """Let go of a range of memory that the client unmapped ``revoke_after`` ago.

        Accesses that are still under way when this returns are cut off: they read zeroes, and what
        they write is lost. By default nothing happens.
        """


def check_device(device: object) -> PciDevice:
    """A device whose description is sound.

    Raises:
        TypeError: It is no PciDevice, or something is no number.
        ValueError: A number is out of range.
        DeviceError: It contradicts itself.
    """
    if not isinstance(device, PciDevice):
        hint = ": make one of it" if isinstance(device, type) else ""
        raise TypeError(f"device must be a guestio PciDevice, not {device!r}{hint}")
    name = type(device).__name__
    for attribute, bits in (
        ("vendor_id", 16),
        ("device_id", 16),
        ("class_code", 24),
        ("revision", 8),
        ("subsystem_vendor_id", 16),
        ("subsystem_id", 16),
    ):
        if not hasattr(device, attribute):
            raise TypeError(f"{name}.{attribute} is missing")
        value = getattr(device, attribute)
        if value is None and attribute.startswith("subsystem"):
            continue
        if not 0 <= check_int(value, f"{name}.{attribute}") < 1 << bits:
            raise ValueError(f"{name}.{attribute} {value:#x} does not fit {bits} bits")
    if device.vendor_id == NO_VENDOR:
        raise ValueError(f"{name}.vendor_id {NO_VENDOR:#x} says that there is no function")
    if not 0 <= check_int(device.interrupts, f"{name}.interrupts") <= MAX_MSIX_VECTORS:
        raise ValueError(f"{name}.interrupts {device.interrupts} is not in 0..{MAX_MSIX_VECTORS}")
    if not isinstance(device.bars, Mapping):
        raise TypeError(f"{name}.bars is {device.bars!r}, not a mapping such as {{0: Bar(4096)}}")
    if not isinstance(device.capabilities, Sequence):
        raise TypeError(f"{name}.capabilities is {device.capabilities!r}, not a list of them")
    given: Sequence[object] = device.capabilities
    for each in given:
        if not isinstance(each, Capability):
            hint = ": make one of it" if isinstance(each, type) else ""
            raise TypeError(f"{name}.capabilities has {each!r}, not a Capability{hint}")
        _check_numbers(f"{name}.capabilities: {type(each).__name__}", each)
    for index, bar in device.bars.items():
        if not 0 <= check_int(index, f"{name}.bars") < BARS:
            raise ValueError(f"{name}.bars has {index}; a function has BARs 0 to {BARS - 1}")
        if not isinstance(bar, Bar):
            raise TypeError(f"{name}.bars[{index}] is {bar!r}, not a Bar")
        if bar.wide and (index + 1 in device.bars or index + 1 == BARS):
            raise DeviceError(f"{name}.bars[{index}] is wide, and takes the place of the next one")
    for register in device._table.registers:
        place = device.bars.get(register.bar)
        if place is None or register.end > place.size:
            raise DeviceError(f"{name} has no room for {register!r}: see {name}.bars")
        if place.overlaps_memory(register.offset, register.width):
            raise DeviceError(f"{register!r} of {name} is in memory that the driver maps")
    return device


def _check_numbers(what: str, each: Capability) -> None:
    numbers: list[tuple[str, int, int]] = [("number", 0, 16 if each.extended else 8)]
    if each.extended:
        numbers.append(("version", 1, 4))
    for attribute, least, bits in numbers:
        value = getattr(each, attribute, None)
        if value is None:
            raise TypeError(f"{what}.{attribute} is missing")
        if not least <= check_int(value, f"{what}.{attribute}") < 1 << bits:
            raise ValueError(
                f"{what}.{attribute} {value:#x} is not in {least}..{(1 << bits) - 1:#x}"
            )


def complete(device: PciDevice) -> tuple[dict[int, Bar], list[Capability]]:
    """A device's BARs and capabilities, with those for its interrupts.

    Raises:
        DeviceError: Capabilities contradict each other, the interrupts or the registers; there is
            no BAR left for MSI-X, or the one it names has no room for it.
    """
    bars, capabilities = dict(device.bars), list(device.capabilities)
    name = type(device).__name__
    _check_single(name, capabilities)
    messages = [each for each in capabilities if isinstance(each, Msi | MsiX)]
    if device.interrupts and device.msix and not messages:
        capabilities.append(MsiX(device.interrupts))
    for each in messages:
        if not device.interrupts:
            raise DeviceError(f"{name} has {each} and no interrupts: set {name}.interrupts")
        if isinstance(each, MsiX) and each.vectors < device.interrupts:
            raise DeviceError(
                f"{name}.interrupts is {device.interrupts}, and {each} has {each.vectors} vectors: "
                "the others would be lost"
            )
    for place, capability in enumerate(capabilities):
        if isinstance(capability, MsiX):
            capabilities[place] = _place_msix(device, bars, capability)
    return bars, capabilities


def _check_single(name: str, capabilities: Sequence[Capability]) -> None:
    """Refuse a capability of which a function has one, if there are several."""
    found: dict[tuple[bool, int, bool], Capability] = {}
    for each in capabilities:
        window = isinstance(each, BarWindow)
        if each.number in (EXTENDED_SEVERAL if each.extended else SEVERAL) and not window:
            continue
        key = each.extended, each.number, window
        if key in found:
            raise DeviceError(f"{name}.capabilities has both {found[key]} and {each}: one can be")
        found[key] = each


def _place_msix(device: PciDevice, bars: dict[int, Bar], given: MsiX) -> MsiX:
    """MSI-X with the BAR that it is in, which is added to ``bars`` if it has none.

    Raises:
        DeviceError: There is no room for it.
    """
    name = type(device).__name__
    end = max(given.table + given.table_size, given.pba_offset + given.pba_size)
    if given.bar is None:
        taken = {index + 1 for index, bar in bars.items() if bar.wide} | set(bars)
        free = next((index for index in range(BARS) if index not in taken), None)
        if free is None:
            raise DeviceError(f"{name} has no BAR left for MSI-X: place it in one of its own")
        bars[free] = Bar(max(_PAGE, 1 << (end - 1).bit_length()))
        return MsiX(given.vectors, free, given.table, given.pba)
    place = bars.get(given.bar)
    if place is not None and place.io:
        raise DeviceError(f"{name}.bars[{given.bar}] is in I/O space, where MSI-X cannot be")
    if place is None or place.size < end:
        raise DeviceError(f"{name}.bars[{given.bar}] has no room for MSI-X up to {end:#x}")
    for what, at, size in (
        ("table", given.table, given.table_size),
        ("pending bits", given.pba_offset, given.pba_size),
    ):
        if place.overlaps_memory(at, size):
            raise DeviceError(
                f"the {what} of MSI-X, at {at:#x}+{size:#x} of {name}.bars[{given.bar}], would be "
                "in memory that the driver maps: say in the BAR's areas what it may map, or place "
                "it elsewhere"
            )
    for register in device._table.registers:
        if given.overlaps(register.bar, register.offset, register.width):
            raise DeviceError(f"{register!r} of {name} is in the table or pending bits of MSI-X")
    return given
