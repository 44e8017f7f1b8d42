"""Objects as bytes: which types have a layout of their own, and how it is read and written."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any, TypeGuard, TypeVar, cast

import numpy as np

T = TypeVar("T")

_CTYPES = (ctypes.Structure, ctypes.Union, ctypes.Array, ctypes._SimpleCData)
# Reading one of these would follow an address that the guest chose.
_POINTERS = "OPzZX"


def size_of(kind: type[Any] | np.dtype[Any]) -> int:
    """Bytes of an object of a ctypes type or a numpy dtype.

    Raises:
        TypeError: ``kind`` is neither, or holds pointers.
    """
    if _is_ctypes(kind):
        _check_plain(kind)
        return ctypes.sizeof(kind)
    return _dtype(kind).itemsize


def from_bytes(kind: type[T] | np.dtype[Any], data: bytes) -> T:
    """The object of ``kind`` that these bytes are; raises as :func:`size_of`."""
    if _is_ctypes(kind):
        _check_plain(kind)
        return cast("T", kind.from_buffer_copy(data))
    return cast("T", np.frombuffer(data, _dtype(kind))[0])


def to_bytes(value: object) -> bytes:
    """The bytes of a ctypes object or a numpy scalar.

    Raises:
        TypeError: It is neither, or holds pointers.
    """
    if isinstance(value, _CTYPES):
        _check_plain(type(value))
        return bytes(cast("Any", value))
    if isinstance(value, np.generic):
        _dtype(value.dtype)
        return value.tobytes()
    raise TypeError(f"{type(value).__name__} has no layout; use a ctypes object or a numpy scalar")


def _is_ctypes(kind: object) -> TypeGuard[Any]:
    return isinstance(kind, type) and issubclass(kind, _CTYPES)


def _dtype(kind: object) -> np.dtype[Any]:
    try:
        # None would be taken for float64.
        dtype: np.dtype[Any] = np.dtype(cast("Any", "no dtype" if kind is None else kind))
    except TypeError:
        raise TypeError(f"{kind!r} is neither a ctypes type nor a numpy dtype") from None
    if dtype.hasobject:
        raise TypeError(f"{dtype} holds Python objects")
    return dtype


@lru_cache(maxsize=512)
def _check_plain(kind: Any) -> None:
    """Refuse a type with a pointer anywhere in it."""
    if issubclass(kind, ctypes.Array):
        _check_plain(kind._type_)
    elif issubclass(kind, ctypes._SimpleCData):
        if kind._type_ in _POINTERS:
            raise TypeError(f"{kind.__name__} is a pointer, which means nothing in a guest")
    elif issubclass(kind, (ctypes.Structure, ctypes.Union)):
        for base in kind.__mro__:
            for field in vars(base).get("_fields_", ()):
                _check_plain(field[1])
    else:
        raise TypeError(f"{kind.__name__} is a pointer, which means nothing in a guest")
