"""Drops what a server does not need once it has opened what it serves.

Three layers of the kernel's, each of which works without the others: capabilities are dropped, a
system call filter (seccomp) refuses programs, processes, sockets and files that are written, and
landlock limits which files can be opened at all. What is refused fails with EPERM or EACCES, which
Python raises as `PermissionError`: a device that tries sees its own mistake, and is not killed.
"""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal, TypeAlias

from guestio.sandbox import capabilities, landlock, seccomp

log = logging.getLogger("guestio.sandbox")

Mode: TypeAlias = Literal["auto", "off"]
"""Whether a server drops what it does not need: as far as kernel and library allow, or not."""

_LIBRARIES: Final = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo",
    "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/proc/self", "/sys/devices/system/cpu",
)  # fmt: skip
"""What Python and the C library read while a program runs."""

_in_force = False


def in_force() -> bool:
    """Whether this process has dropped what it does not need."""
    return _in_force


class Sandbox:
    """What a server does without from its start on.

    Args:
        connects: Whether it connects to Unix sockets while it serves.
        removes: Paths of the sockets that it removes at its end.
        records: The file of a recording that it writes, in whose directory it makes files.

    Attributes:
        notes: Lines that say what could not be dropped, for the user.

    Threads: :meth:`enter` is for the main thread, and what it does cannot be taken back.
    """

    def __init__(
        self,
        *,
        connects: bool = False,
        removes: Iterable[str | os.PathLike[str]] = (),
        records: str | os.PathLike[str] | None = None,
    ) -> None:
        self.notes: list[str] = []
        self._connects = connects
        self._removing = sorted({_directory(each) for each in removes})
        self._recording = None if records is None else _directory(records)
        self._readable: list[str] = []
        self._filters: seccomp.Filters | None = None

    def enter(self) -> None:
        """Drop it in all threads of the process, as far as the kernel can do that.

        The calling thread, and those that it starts, have all of it. Threads that are there already
        have the system call filter; landlock only from its ABI 8 on.
        """
        global _in_force  # noqa: PLW0603 - it is the process that is limited
        try:
            self._filters = seccomp.Filters()
        except seccomp.MissingError as error:
            self.notes.append(f"the sandbox has no system call filter: {error}")
        wanted = [(each, os.W_OK | os.X_OK) for each in self._removing]
        if self._recording is not None:
            wanted.append((self._recording, os.R_OK | os.W_OK | os.X_OK))
        readable = self._readable = _readable()
        wanted += [(each, os.R_OK) for each in readable]
        self._try("capabilities", lambda: capabilities.drop(wanted))
        self._try(
            "landlock",
            lambda: landlock.restrict(
                readable, removes=self._removing, makes=self._recording, everywhere=True
            ),
        )
        if self._filters is not None:
            filters = self._filters
            writes = self._recording is not None
            self._try(
                "seccomp",
                lambda: filters.limit_process(
                    connects=self._connects, writes=writes, removes=writes or bool(self._removing)
                ),
            )
        _in_force = True

    def enter_device_thread(self) -> None:
        """Drop what only the main thread needs at the end: writing and removing files.

        For the thread in which a device's methods are called, and those that it starts.
        """
        self._try("landlock", lambda: landlock.restrict(self._readable))
        if self._filters is not None:
            self._try("seccomp", self._filters.limit_thread)

    def _try(self, what: str, step: object) -> None:
        assert callable(step)
        try:
            step()
        except NotImplementedError as error:
            log.debug("the sandbox does without %s: %s", what, error)
        except OSError as error:
            # In a container that refuses these calls, for example.
            line = f"the sandbox does without {what}: {error.strerror or error}"
            if line not in self.notes:
                self.notes.append(line)


def _directory(path: str | os.PathLike[str]) -> str:
    return os.path.dirname(os.path.abspath(os.fspath(path)))  # noqa: PTH100, PTH120 - text is kept


def _readable() -> list[str]:
    """Where Python finds modules that are imported later, and what libraries read."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    found = {sysconfig.get_path(name) for name in names} | set(_LIBRARIES)
    packages = {
        os.path.dirname(file)  # noqa: PTH120 - there are many, and they are text
        for module in list(sys.modules.values())
        if isinstance(file := getattr(module, "__file__", None), str)
    }
    # Not a directory that is only searched, such as the current one.
    found.update(
        entry
        for path in sys.path
        if (entry := os.path.abspath(path))  # noqa: PTH100 - it may be empty
        and any(each == entry or each.startswith(entry + os.sep) for each in packages)
    )
    real = {os.path.realpath(each) for each in found}
    for package in packages:
        # It may be elsewhere: an editable installation, or a link.
        where = Path(os.path.realpath(package))
        if not any(os.fspath(each) in real for each in (where, *where.parents)):
            real.add(os.fspath(where))
    return sorted(each for each in real if os.path.exists(each))  # noqa: PTH110 - text
