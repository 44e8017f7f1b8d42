"""Live servers as capture interfaces of Wireshark.

Wireshark runs every program in its extcap directory, asks it for interfaces and their options, and
has it write a capture to a pipe. :mod:`guestio.cli.extcap` answers.

Source: extcap(4) of Wireshark, and section 8.2 of its developer's guide.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Final

import numpy as np

from guestio.errors import DeviceError
from guestio.observe import pcapng
from guestio.observe.remote import ControlSource
from guestio.trace import Group, Records, What

_NAME: Final = "guestio"
_STEP: Final = 0.05
_GROUPS: Final = {
    "all": Group.REQUESTS | Group.TRANSLATIONS | Group.LIFE,
    "requests": Group.REQUESTS,
    "translations": Group.TRANSLATIONS,
    "life": Group.LIFE,
}


class _Ended(Exception):  # noqa: N818 - no error: how a capture ends
    """The capture is to end."""


def capture(where: str, fifo: Path, events: str) -> None:
    """Write what a server does to a pipe, until its reader or the server has gone.

    Args:
        where: The server's control socket.
        fifo: The pipe.
        events: Which: ``all``, ``requests``, ``translations`` or ``life``.

    Raises:
        DeviceError: Nothing answers there.
        OSError: The pipe cannot be opened.
    """

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise _Ended

    source = ControlSource(where, "none")
    try:
        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        with fifo.open("wb", buffering=0) as file:
            for piece in _pieces(source, where, _GROUPS[events]):
                file.write(piece)
    except (_Ended, BrokenPipeError):
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        source.close()


def _pieces(source: ControlSource, where: str, groups: Group) -> Iterator[bytes]:
    status = source.status()
    if status is None:
        raise DeviceError(f"{where} has ended")
    origin = status["device"]["origin"]
    yield pcapng.begin(_NAME, f"{status['device']['kind']} at {status['device']['path']}")
    wanted = [int(what) for what in What if what.group & groups]
    while status is not None:
        shift = time.time_ns() - time.monotonic_ns()
        records, _ = source.read()
        yield pcapng.packets(_chosen(records, origin, wanted), shift)
        time.sleep(_STEP)
        status = source.status()
    yield pcapng.packets(_chosen(source.read().records, origin, wanted), shift)


def _chosen(records: Records, origin: int, wanted: list[int]) -> Records:
    """The events of a server that are wanted."""
    mine = (records["origin"] == origin) | (records["origin"] == 0)
    found: Records = records[mine & np.isin(records["what"], wanted)]
    return found


def install() -> tuple[Path, Path]:
    """Put the capture interface and the dissector where this user's Wireshark looks for them.

    Returns:
        The two files.

    Raises:
        DeviceError: Wireshark is not installed, or without Lua.
        OSError: A file cannot be written.
    """
    folders = _folders()
    try:
        plugins = folders["Personal Lua Plugins"]
    except KeyError:
        raise DeviceError("Wireshark was built without Lua, which the dissector needs") from None
    # Before version 4.2 it does not say so, and has it among its settings.
    programs = folders.get("Personal Extcap path", folders["Personal configuration"] / "extcap")
    program, dissector = programs / _NAME, plugins / pcapng.DISSECTOR.name
    for folder in (plugins, programs):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(pcapng.DISSECTOR, dissector)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m guestio extcap "$@"\n')
    program.chmod(0o755)
    return program, dissector


def _folders() -> dict[str, Path]:
    """Where this user's Wireshark looks for extensions."""
    tool = shutil.which("tshark") or shutil.which("wireshark")
    if tool is None:
        raise DeviceError("neither tshark nor wireshark is installed")
    said = subprocess.run([tool, "-G", "folders"], capture_output=True, text=True, check=False)
    found = (line.partition(":") for line in said.stdout.splitlines())
    return {name.strip(): Path(path.strip()) for name, _, path in found if path}
