"""Addresses, ranges and permissions: pure values that every room shares.

An address is a plain ``int`` in ``[0, 2**64)``. Ranges are half-open and ``2**64`` is a legal end,
so the last byte of an address space can be used like any other. The NewTypes say which address
space a number belongs to; at run time they cost nothing.
"""

from __future__ import annotations

import enum
import math
import operator
import threading
from typing import NamedTuple, NewType, SupportsFloat, SupportsIndex

from guestio.errors import InvalidAddressError

Gpa = NewType("Gpa", int)
"""Guest physical address."""
Iova = NewType("Iova", int)
"""I/O virtual address: what a device behind an IOMMU uses."""
Hva = NewType("Hva", int)
"""Host virtual address in this process."""
Vua = NewType("Vua", int)
"""Virtual address in the front-end's process."""

ADDRESS_SPACE = 1 << 64
"""Size of every address space here; the largest legal range end."""


class Permissions(enum.IntFlag):
    """What an access does, or what a mapping grants.

    As an access: ``NONE`` checks only whether something is mapped.
    """

    NONE = 0
    READ = 1
    WRITE = 2
    READ_WRITE = 3

    def allows(self, access: Permissions) -> bool:
        """Whether a grant of ``self`` covers ``access`` (``NONE`` is always covered)."""
        return self & access == access


class Ordering(enum.IntEnum):
    """Memory ordering of an atomic access, with the meaning of the C11 memory model."""

    RELAXED = 0
    ACQUIRE = 2
    RELEASE = 3
    ACQ_REL = 4
    SEQ_CST = 5


class IovaRange(NamedTuple):
    """``length`` bytes of I/O virtual addresses from ``base``."""

    base: int
    length: int

    def __repr__(self) -> str:
        return f"IovaRange({self.base:#x}, {self.length:#x})"


class MappedRange(NamedTuple):
    """``length`` bytes of the underlying address space from ``base``."""

    base: int
    length: int

    def __repr__(self) -> str:
        return f"MappedRange({self.base:#x}, {self.length:#x})"


def shown(number: int, form: str = "d") -> str:
    """A number for an error message, in the form of ``format``; a gigantic one by its size."""
    bits = number.bit_length()
    return format(number, form) if bits <= 128 else f"of {bits} bits"


def check_int(value: SupportsIndex, name: str) -> int:
    """Return ``value`` as an int; booleans and floats are refused.

    Raises:
        TypeError: ``value`` is not an integer.
    """
    if value.__class__ is int:
        return value
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not a boolean")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None


def check_address(value: SupportsIndex, name: str = "addr") -> int:
    """Return ``value`` as an address in ``[0, 2**64)``.

    Raises:
        TypeError: not an integer.
        ValueError: out of range.
    """
    number = check_int(value, name)
    if not 0 <= number < ADDRESS_SPACE:
        raise ValueError(f"{name} {shown(number, '#x')} is not in [0, 2**64)")
    return number


def check_access(value: SupportsIndex) -> Permissions:
    """Return ``value`` as permissions.

    Raises:
        TypeError: not an integer.
        ValueError: it has bits that are no permission.
    """
    number = check_int(value, "access")
    if not 0 <= number <= Permissions.READ_WRITE:
        raise ValueError(f"access {shown(number)} is not a combination of READ and WRITE")
    return Permissions(number)


def check_range(
    start: SupportsIndex,
    length: SupportsIndex,
    *,
    name: str = "addr",
    length_name: str = "length",
    empty: bool = True,
) -> tuple[int, int]:
    """Return ``(start, length)`` as ints whose sum is at most ``2**64``.

    Args:
        start: First address.
        length: Bytes.
        name: What to call ``start`` in an error.
        length_name: What to call ``length``.
        empty: Whether a length of 0 is acceptable.

    Raises:
        TypeError: not integers.
        ValueError: out of range, or empty where that is not acceptable.
        InvalidAddressError: the sum passes ``2**64``; it is a ValueError too.
    """
    first, size = check_address(start, name), check_int(length, length_name)
    if size < 0 or (size == 0 and not empty):
        raise ValueError(
            f"{length_name} {shown(size)} must be {'>= 0' if empty else 'greater than 0'}"
        )
    if first + size > ADDRESS_SPACE:
        raise InvalidAddressError(first, size, None, f"{name} + {length_name} passes 2**64")
    return first, size


def check_flag(value: bool | int, name: str) -> bool:
    """Return ``value``, true or false, as a bool; 0 and 1 will do, and numpy's.

    Raises:
        TypeError: neither a boolean nor an integer.
        ValueError: another integer.
    """
    if value is True or value is False:
        return value
    number = int(value) if type(value).__name__ in {"bool", "bool_"} else check_int(value, name)
    if number not in {0, 1}:
        raise ValueError(f"{name} {shown(number)} is neither 0 nor 1")
    return bool(number)


def check_seconds(
    value: SupportsFloat, name: str, most: float = threading.TIMEOUT_MAX, *, zero: bool = True
) -> float:
    """Return ``value`` as a time in seconds that can be waited for.

    Args:
        value: What was given.
        name: What to call it in an error.
        most: The longest; by default what a thread can wait.
        zero: Whether no time at all is acceptable.

    Raises:
        TypeError: not a number; booleans and text are refused.
        ValueError: negative, not finite, or too long.
    """
    if isinstance(value, bool | str | bytes | type) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not 0 <= seconds <= most or (not seconds and not zero):
        above = "from 0" if zero else "above 0"
        raise ValueError(f"{name} {seconds:g} is not {above} to {most:.0f} seconds")
    return seconds


def checked_add(addr: SupportsIndex, offset: SupportsIndex) -> int | None:
    """``addr + offset``, or None if that leaves ``[0, 2**64)``."""
    total = check_int(addr, "addr") + check_int(offset, "offset")
    return total if 0 <= total < ADDRESS_SPACE else None


def checked_sub(addr: SupportsIndex, offset: SupportsIndex) -> int | None:
    """``addr - offset``, or None if that leaves ``[0, 2**64)``."""
    return checked_add(addr, -check_int(offset, "offset"))


def overflowing_add(addr: SupportsIndex, offset: SupportsIndex) -> tuple[int, bool]:
    """``addr + offset`` modulo ``2**64``, and whether it left the address space."""
    total = check_int(addr, "addr") + check_int(offset, "offset")
    return total % ADDRESS_SPACE, not 0 <= total < ADDRESS_SPACE


def overflowing_sub(addr: SupportsIndex, offset: SupportsIndex) -> tuple[int, bool]:
    """``addr - offset`` modulo ``2**64``, and whether it left the address space."""
    return overflowing_add(addr, -check_int(offset, "offset"))


def align_down(addr: SupportsIndex, alignment: SupportsIndex) -> int:
    """``addr`` rounded down to a multiple of ``alignment``, a power of two."""
    return check_address(addr) & ~(_power_of_two(alignment) - 1)


def align_up(addr: SupportsIndex, alignment: SupportsIndex) -> int | None:
    """``addr`` rounded up to a multiple of ``alignment``, or None if that passes the last address.

    Raises:
        ValueError: ``alignment`` is not a power of two.
    """
    at = check_address(addr)
    return checked_add(at, -at % _power_of_two(alignment))


def _power_of_two(alignment: SupportsIndex) -> int:
    size = check_int(alignment, "alignment")
    if size <= 0 or size & (size - 1):
        raise ValueError(f"alignment {size} is not a power of two")
    return size
