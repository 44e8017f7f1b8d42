"""Registers of a PCI device as a table: where they are, who may change which bits, what they mean.

The access types are those of hardware manuals; see for example PCI Express Base Specification 4.0,
section 7.4 "Configuration Register Types".
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from guestio.addr import check_int
from guestio.errors import DeviceError

if TYPE_CHECKING:
    from guestio.pci.device import PciDevice

_WIDTHS: Final = (1, 2, 4, 8)
_Hook = TypeVar("_Hook", bound=Callable[..., Any])


class Access(enum.Enum):
    """What a driver may do to bits of a register. The device itself may do anything."""

    RO = "read"
    """Read; what is written is ignored."""
    RW = "read and write"
    """Read and write."""
    WO = "write"
    """Write; they read as 0."""
    W1C = "read, write 1 to clear"
    """Read; a one that is written clears its bit, a zero leaves it alone: events."""


class Field:
    """Bits of a register; made by :meth:`Register.field`, in the body of a device's class.

    The device reads and sets them as an attribute, as a number from 0 on; a driver sees them in
    their register.

    Attributes:
        name: The attribute.
        register: What they are bits of.
        low: The lowest bit.
        bits: How many.
        access: What a driver may do.
        reset: Their value after a reset.
        doc: What they mean.
    """

    def __init__(
        self, register: Register, low: int, bits: int, access: Access, reset: int, doc: str
    ) -> None:
        self.register: Final = register
        self.low: Final = low
        self.bits: Final = bits
        self.access: Final = access
        self.reset: Final = reset
        self.doc: Final = doc
        self.name = ""

    @property
    def mask(self) -> int:
        """Its bits in the register."""
        return (1 << self.bits) - 1 << self.low

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, device: None, owner: type) -> Field: ...
    @overload
    def __get__(self, device: PciDevice, owner: type) -> int: ...
    def __get__(self, device: PciDevice | None, owner: type) -> Field | int:
        if device is None:
            return self
        return (device.register_file.value(self.register) & self.mask) >> self.low

    def __set__(self, device: PciDevice, value: int) -> None:
        number = _checked(self.name, value, self.bits)
        file = device.register_file
        rest = file.value(self.register) & ~self.mask
        file.set_value(self.register, rest | number << self.low)


class Register:
    """A register of a device, as an attribute of its class.

    In the device it is a number, which it reads and sets as it likes; a driver sees it in a BAR and
    may do what ``access`` says. Every reset of the function sets it to ``reset``, before
    `PciDevice.reset` is called. ::

        class Timer(PciDevice):
            vendor_id, device_id, bars = 0x1234, 0x0003, {0: Bar(4096)}

            control = Register(0x00, access=Access.RO, doc="What it does.")
            enabled = control.field(0, access=Access.RW, doc="Whether it runs.")
            version = control.field(8, 8, reset=1)
            period = Register(0x08, 8, reset=1000, doc="Nanoseconds.")

            @control.on_write
            def control_changed(self, value: int) -> None:
                print("runs" if self.enabled else "stopped")

    Args:
        offset: Where it is in the BAR, a multiple of ``width``.
        width: Its bytes: 1, 2, 4 or 8.
        bar: Which BAR.
        access: What a driver may do to its bits, those in fields apart.
        reset: Its value after a reset, apart from its fields.
        doc: What it is.

    Raises:
        TypeError, ValueError: A number is none, or out of range.

    Attributes:
        name: The attribute.
        fields: Its fields, in the order in which they were declared.

    Threads: setting and reading a register are the loop's, as is all that a driver does. Another
    thread may set a whole register; a field shares its register with what the driver writes.
    """

    def __init__(
        self,
        offset: int,
        width: int = 4,
        *,
        bar: int = 0,
        access: Access = Access.RW,
        reset: int = 0,
        doc: str = "",
    ) -> None:
        if check_int(width, "width") not in _WIDTHS:
            raise ValueError(f"width {width} of a register is not 1, 2, 4 or 8 bytes")
        if check_int(offset, "offset") < 0 or offset % width:
            raise ValueError(
                f"offset {offset:#x} of a register is no multiple of its {width} bytes"
            )
        if not isinstance(access, Access):
            raise TypeError(f"access must be a guestio Access, not {access!r}")
        self.offset: Final = offset
        self.width: Final = width
        self.bar: Final = check_int(bar, "bar")
        self.access: Final = access
        self.doc: Final = doc
        self.fields: list[Field] = []
        self.name = ""
        self._reset = _checked("reset", reset, 8 * width)
        self._written: Callable[[Any, int], object] | None = None
        self._reading: Callable[[Any], int] | None = None

    def __repr__(self) -> str:
        return f"<Register {self.name or '?'} at BAR {self.bar} {self.offset:#x}+{self.width}>"

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @property
    def end(self) -> int:
        """The offset behind it."""
        return self.offset + self.width

    @property
    def reset(self) -> int:
        """Its value after a reset, with those of its fields."""
        value = self._reset
        for each in self.fields:
            value = value & ~each.mask | each.reset << each.low
        return value

    def bits(self, access: Access) -> int:
        """The bits with which a driver may do that."""
        whole = (1 << 8 * self.width) - 1
        found = whole if self.access == access else 0
        for each in self.fields:
            found = found | each.mask if each.access == access else found & ~each.mask
        return found

    def field(
        self,
        low: int,
        bits: int = 1,
        *,
        access: Access | None = None,
        reset: int = 0,
        doc: str = "",
    ) -> Field:
        """Name bits of the register, as a further attribute of the class.

        Args:
            low: The lowest bit.
            bits: How many.
            access: What a driver may do to them; None for what it may do to the register.
            reset: Their value after a reset.
            doc: What they mean.

        Raises:
            TypeError, ValueError: They are not in the register, or in another field already, or the
                value does not fit.
        """
        if access is not None and not isinstance(access, Access):
            raise TypeError(f"access must be a guestio Access, not {access!r}")
        if (
            check_int(low, "low") < 0
            or check_int(bits, "bits") < 1
            or (low + bits > 8 * self.width)
        ):
            raise ValueError(f"bits {low}+{bits} are not in a register of {8 * self.width} bits")
        number = _checked("reset", reset, bits)
        made = Field(self, low, bits, self.access if access is None else access, number, doc)
        if any(each.mask & made.mask for each in self.fields):
            raise ValueError(f"bits {low}+{bits} of a register are in another of its fields")
        self.fields.append(made)
        return made

    def on_write(self, hook: _Hook) -> _Hook:
        """Have a method called after each write of a driver, ``hook(device, value)``.

        ``value`` is what the register is then. A write of a part of it is a write, too: a register
        of 64 bits is often written in halves.

        A subclass of the device's class may override the method.

        Raises:
            TypeError: That cannot be called.
            ValueError: There is such a method already.
        """
        if not callable(hook):
            raise TypeError(f"on_write is given a method, not {hook!r}")
        if self._written is not None:
            raise ValueError(f"{self!r} has an on_write method already")
        self._written = hook
        return hook

    def on_read(self, hook: _Hook) -> _Hook:
        """Have a method tell the value when a driver reads, ``hook(device) -> int``.

        The register becomes that. A read of a part of it is a read, too. Bits that read as 0 by
        their access type still do.

        Raises:
            TypeError: That cannot be called.
            ValueError: There is such a method already.
        """
        if not callable(hook):
            raise TypeError(f"on_read is given a method, not {hook!r}")
        if self._reading is not None:
            raise ValueError(f"{self!r} has an on_read method already")
        self._reading = hook
        return hook

    @overload
    def __get__(self, device: None, owner: type) -> Register: ...
    @overload
    def __get__(self, device: PciDevice, owner: type) -> int: ...
    def __get__(self, device: PciDevice | None, owner: type) -> Register | int:
        return self if device is None else device.register_file.value(self)

    def __set__(self, device: PciDevice, value: int) -> None:
        device.register_file.set_value(self, value)


class RegisterTable:
    """The registers that a class declares, those of its bases included; by BAR and offset.

    Raises:
        DeviceError: Two of them overlap, or a field or a method belongs to none.

    Attributes:
        registers: By BAR and offset.
        masks: Of each, the bits that a driver sees, that it writes, and that it clears with ones.
    """

    def __init__(
        self,
        registers: Iterable[Register],
        overriding: Mapping[int, Callable[..., Any]] | None = None,
    ) -> None:
        self._overriding = overriding or {}
        self.registers: Final = sorted(registers, key=lambda each: (each.bar, each.offset))
        for one, other in zip(self.registers, self.registers[1:], strict=False):
            if one.bar == other.bar and one.end > other.offset:
                raise DeviceError(f"{one!r} and {other!r} overlap")
        self.masks: Final = {
            each: (
                ~each.bits(Access.WO),
                each.bits(Access.RW) | each.bits(Access.WO),
                each.bits(Access.W1C),
            )
            for each in self.registers
        }
        self._ends: dict[int, tuple[list[int], list[Register]]] = {}
        for each in self.registers:
            ends, found = self._ends.setdefault(each.bar, ([], []))
            ends.append(each.end)
            found.append(each)

    @classmethod
    def of(cls, owner: type) -> RegisterTable:
        """That of a class."""
        named = {
            name: value for base in reversed(owner.__mro__) for name, value in vars(base).items()
        }
        found = [each for each in named.values() if isinstance(each, Register)]
        for each in named.values():
            if isinstance(each, Field) and each.register not in found:
                raise DeviceError(f"{each.register!r} was replaced, but not its field {each.name}")
        overriding: dict[int, Callable[..., Any]] = {}
        for base in owner.__mro__:
            for each in vars(base).values():
                if not isinstance(each, Register):
                    continue
                for hook in (each._written, each._reading):
                    name = getattr(hook, "__name__", "")
                    if hook is None or not any(
                        vars(one).get(name) is hook for one in owner.__mro__
                    ):
                        continue
                    if each in found:
                        overriding[id(hook)] = getattr(owner, name)
                    elif named[name] is hook:
                        raise DeviceError(f"{each!r} was replaced, but not its method {name}")
        return cls(found, overriding)

    def method(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A register's method, or what overrides it in a subclass."""
        return self._overriding.get(id(hook), hook)

    def touched(self, bar: int, offset: int, size: int) -> Sequence[Register]:
        """Registers that a range overlaps, in order."""
        ends, registers = self._ends.get(bar, ((), ()))
        first = last = bisect_right(ends, offset)
        while last < len(registers) and registers[last].offset < offset + size:
            last += 1
        return registers[first:last]


class RegisterFile:
    """The values of a device's registers, and what a driver reads and writes of them.

    Accesses may have any place and size: what belongs to no register reads as 0 and is not written,
    and of a register that is only touched the rest stays as it is.

    Args:
        device: Has the registers; its methods are called.
        table: Its registers.
    """

    def __init__(self, device: PciDevice, table: RegisterTable) -> None:
        self._device = device
        self._table = table
        self._values: dict[Register, int] = {}
        self.reset()

    def reset(self) -> None:
        """Set every register to its value after a reset; no method is called."""
        for each in self._table.registers:
            self._values[each] = each.reset

    def value(self, register: Register) -> int:
        """The value of a register, as its device sees it."""
        return self._values[register]

    def set_value(self, register: Register, value: int) -> None:
        """Set a register, as its device does.

        Raises:
            TypeError, ValueError: That is no number, or does not fit the register.
        """
        self._values[register] = _checked(register.name, value, 8 * register.width)

    def read(self, bar: int, offset: int, size: int) -> int:
        """What a driver reads from a range, little-endian."""
        found = 0
        for each in self._table.touched(bar, offset, size):
            if each._reading is not None:
                self.set_value(each, self._table.method(each._reading)(self._device))
            value = self._values[each] & self._table.masks[each][0]
            at = 8 * (each.offset - offset)
            found |= value << at if at >= 0 else value >> -at
        return found & (1 << 8 * size) - 1

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Write a range as a driver does, then have the registers' methods called, in order."""
        for each in self._table.touched(bar, offset, size):
            at = 8 * (each.offset - offset)
            given, touched = value, (1 << 8 * size) - 1
            given, touched = (x >> at if at >= 0 else x << -at for x in (given, touched))
            _, writable, cleared = self._table.masks[each]
            writable &= touched
            kept = self._values[each] & ~writable & ~(given & touched & cleared)
            self._values[each] = kept | given & writable
            if each._written is not None:
                self._table.method(each._written)(self._device, self._values[each])

    def with_on_write(self, bar: int, offset: int, size: int) -> Register | None:
        """A register in a range that has an `on_write` method, if there is one."""
        found = self._table.touched(bar, offset, size)
        return next((each for each in found if each._written is not None), None)

    def explain(self) -> str:
        """The registers as lines: place, name, access, value after a reset, value now, meaning."""
        lines = [("BAR", "offset", "name", "access", "reset", "now", "")]
        for each in self._table.registers:
            now = self._values[each]
            place = f"{each.offset:#06x}-{each.end - 1:#06x}"
            digits = 2 + 2 * each.width
            values = (f"{each.reset:#0{digits}x}", f"{now:#0{digits}x}")
            lines.append((str(each.bar), place, each.name, each.access.name, *values, each.doc))
            for part in each.fields:
                top = part.low + part.bits - 1
                where = f"  bit {top}" if part.bits == 1 else f"  bits {top}:{part.low}"
                value = (now & part.mask) >> part.low
                values = (f"{part.reset:#x}", f"{value:#x}")
                lines.append(("", where, part.name, part.access.name, *values, part.doc))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _checked(name: str, value: int, bits: int) -> int:
    number = check_int(value, name)
    if not 0 <= number < 1 << bits:
        raise ValueError(f"{name} {number:#x} does not fit {bits} bits")
    return number
