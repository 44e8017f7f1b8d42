"""Capabilities of a process that runs as root: none is kept but what its own files need."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from typing import Final

_VERSION_3: Final = 0x20080522
_DAC_OVERRIDE: Final = 1 << 1
_libc = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    """``struct __user_cap_header_struct`` of linux/capability.h."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    """``struct __user_cap_data_struct``: 32 capabilities; a call has two of them."""

    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def drop(needed: Iterable[tuple[str, int]]) -> None:
    """Drop all capabilities of the calling thread and of those that it starts.

    CAP_DAC_OVERRIDE stays if one of the paths is not root's own, and cannot be used without it.

    Args:
        needed: Paths, and how they will be used, as for `os.access`.

    Raises:
        OSError: The system refuses.
    """
    data = (_Data * 2)()
    _call("capget", data)
    permitted = data[0].permitted
    if not (permitted or data[1].permitted):
        return
    for each in data:
        each.effective = each.inheritable = 0
    # First what is in effect only, to see what works without.
    _call("capset", data)
    works = all(os.access(path, mode, effective_ids=True) for path, mode in needed)
    data[0].permitted = data[0].effective = 0 if works else permitted & _DAC_OVERRIDE
    data[1].permitted = 0
    _call("capset", data)


def _call(name: str, data: ctypes.Array[_Data]) -> None:
    header = _Header(_VERSION_3, 0)
    if getattr(_libc, name)(ctypes.byref(header), data):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
