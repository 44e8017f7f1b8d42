"""Landlock: which files and directories can be opened, made or removed, by path (linux/landlock.h).

The C library has no wrappers for its three system calls, whose numbers are those of every
architecture.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from enum import IntFlag
from typing import Final

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_GET_VERSION: Final = 1
_PATH_BENEATH: Final = 1
_ALL_THREADS: Final = 1 << 3
"""LANDLOCK_RESTRICT_SELF_TSYNC, from ABI 8 on."""
_NO_NEW_PRIVS: Final = 38
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Access(IntFlag):
    """What may be done with a file, or in a directory and those below it."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


_FIRST: Final = Access(0x1FFF)
_LATER: Final = {2: Access.REFER, 3: Access.TRUNCATE, 5: Access.IOCTL_DEV}
_OF_FILES: Final = Access.WRITE_FILE | Access.READ_FILE | Access.TRUNCATE
_READ: Final = Access.READ_FILE | Access.READ_DIR
_MAKE: Final = _READ | Access.WRITE_FILE | Access.MAKE_REG | Access.REMOVE_FILE | Access.TRUNCATE
_TCP: Final = 0b11
"""To bind and to connect, of ABI 4."""
_ABSTRACT_SOCKETS: Final = 1
"""Abstract Unix sockets of processes that are not limited, of ABI 6."""


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _Path(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"  # what a packed one is in Python 3.14, which wants it said
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def version() -> int:
    """The ABI that the kernel has; 0 without landlock, or if it is switched off."""
    return max(int(_libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _GET_VERSION)), 0)


def restrict(
    reads: Iterable[str],
    *,
    removes: Iterable[str] = (),
    makes: str | None = None,
    everywhere: bool = False,
) -> None:
    """Limit the calling thread and those that it starts.

    Files that are open stay as they are, and so do memory files and what other processes pass. A
    further call can only allow less.

    Args:
        reads: Files, and directories with all below, that can be read.
        removes: Directories in which files can be removed.
        makes: A directory in which files can be made, written, renamed and removed.
        everywhere: Limit all threads of the process, if the kernel can (ABI 8).

    Raises:
        NotImplementedError: The kernel has no landlock.
        OSError: It refuses.
    """
    abi = version()
    if not abi:
        raise NotImplementedError("the kernel has none, or it is switched off (lsm=)")
    handled = _FIRST
    for since, access in _LATER.items():
        if abi >= since:
            handled |= access
    attributes = _Ruleset(handled, _TCP if abi >= 4 else 0, _ABSTRACT_SOCKETS if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _call(_CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(size), 0)
    try:
        for path in reads:
            _allow(ruleset, path, _READ & handled)
        _allow(ruleset, os.devnull, (Access.READ_FILE | Access.WRITE_FILE) & handled)
        for path in removes:
            _allow(ruleset, path, Access.REMOVE_FILE)
        if makes is not None:
            _allow(ruleset, makes, _MAKE & handled)
        if _libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise _error()
        _call(_RESTRICT_SELF, ruleset, _ALL_THREADS if everywhere and abi >= 8 else 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, access: Access) -> None:
    """Allow it beneath a path, if that is there."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        # Only directories have the rest.
        if not os.path.isdir(path):  # noqa: PTH112 - a path as text
            access &= _OF_FILES
        rule = _Path(access, fd)
        _call(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(fd)


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        raise _error()
    return result


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
