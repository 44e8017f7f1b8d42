"""What a device's state is wrapped in while it travels, and how it is read by who receives it.

The wrapping says whose state it is, in which version, and that it is whole: a destination gets it
from a stream that may have been cut, damaged, or meant for another device.
"""

from __future__ import annotations

import binascii
import json
import struct
from collections.abc import Callable
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from guestio.addr import check_int
from guestio.errors import DeviceError

if TYPE_CHECKING:
    from guestio.virtio.device import Device

FORMAT: Final = 1
_MAGIC: Final = b"guestio\n"
_HEAD: Final = struct.Struct("<8sIIIQ16s")  # magic, format, device type, version, size, digest

HEAD_SIZE: Final = _HEAD.size
"""Bytes before the device's own."""

_T = TypeVar("_T")


def wrap(device: Device, state: bytes) -> bytes:
    """A state of a device's as it travels."""
    number = int(device.device_id)
    return _head(number, device.state_version, state) + state


def _head(number: int, version: int, state: bytes) -> bytes:
    head = (_MAGIC, FORMAT, number, version, len(state))
    digest = blake2b(_HEAD.pack(*head, bytes(16)) + state, digest_size=16).digest()
    return _HEAD.pack(*head, digest)


def size_of(device: Device, head: bytes) -> int:
    """How many bytes of state follow a head.

    Raises:
        DeviceError: It is no head, of another format, device type or version, or more follows than
            the device takes.
    """
    name = type(device).__name__
    if not any(head):
        raise DeviceError(f"no state came for {name}")
    if len(head) < _HEAD.size or head[: len(_MAGIC)] != _MAGIC:
        raise DeviceError(f"what came for {name} is no state of a guestio device")
    _, form, number, version, size, _ = _HEAD.unpack(head)
    if form != FORMAT:
        raise DeviceError(f"the state for {name} has format {form}; {FORMAT} is known here")
    if number != device.device_id:
        raise DeviceError(
            f"the state is of a device of type {number}; {name} has type {int(device.device_id)}"
        )
    if version != device.state_version:
        raise DeviceError(
            f"the state is of version {version} of {name}; version {device.state_version} is known "
            "here"
        )
    most = device.max_state
    if size > most:
        raise DeviceError(f"the state for {name} has {size} bytes; it takes {most} at most")
    return int(size)


def unwrap(device: Device, data: bytes) -> bytes:
    """The state in what has traveled; what follows it is not looked at.

    Raises:
        DeviceError: As :func:`size_of`, or it is not whole.
    """
    size = size_of(device, data[: _HEAD.size])
    state = data[_HEAD.size : _HEAD.size + size]
    if len(state) != size or data[: _HEAD.size] != _head(
        int(device.device_id), device.state_version, state
    ):
        raise DeviceError(f"the state for {type(device).__name__} is cut or damaged")
    return state


def pack(**fields: object) -> bytes:
    """A state of named fields, for :class:`Fields`: what JSON has, and bytes as :func:`text`."""
    return json.dumps(fields, separators=(",", ":")).encode()


def text(data: bytes) -> str:
    """Bytes as a text that JSON has."""
    return data.hex()


class Fields:
    """The fields of a state that :func:`pack` made; each is checked when it is taken.

    Args:
        state: What came.

    Raises:
        DeviceError: It is none.
    """

    def __init__(self, state: bytes) -> None:
        try:
            found = json.loads(state)
        except (ValueError, RecursionError) as error:
            raise DeviceError(f"the state cannot be read: {error}") from None
        if not isinstance(found, dict):
            raise DeviceError("the state cannot be read: it has no fields")
        self._fields = cast("dict[str, Any]", found)

    def take(self, name: str, check: Callable[[Any], _T]) -> _T:
        """A field, as a function makes it of what is there.

        Raises:
            DeviceError: It is missing, or the function raised what Python has for wrong values.
        """
        try:
            return check(self._fields[name])
        except KeyError:
            raise DeviceError(f"the state has no {name}") from None
        except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as error:
            raise DeviceError(f"{name} of the state is wrong: {error}") from None


def flag(value: Any) -> bool:
    """A truth value; raises `TypeError` for any other."""
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is not true or false")
    return value


def number(value: Any, most: int) -> int:
    """A number from 0 on; raises `TypeError` or `ValueError` for any other."""
    if isinstance(value, bool) or not 0 <= check_int(value, "number") <= most:
        raise ValueError(f"{value!r} is not in 0..{most}")
    return int(value)


def words(value: Any) -> list[str]:
    """Texts; raises `TypeError` for anything else."""
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise TypeError("no list of texts")
    return value


def data(value: Any, most: int) -> bytes:
    """Bytes that were a :func:`text`; raises `TypeError` or `ValueError` for anything else."""
    if not isinstance(value, str) or len(value) > 2 * most:
        raise ValueError(f"not the text of up to {most} bytes")
    try:
        return bytes.fromhex(value)
    except (ValueError, binascii.Error):
        raise ValueError("not the text of bytes") from None
