"""Wireshark's tshark, reading events of guestio's."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from pathlib import Path

from guestio.observe.pcapng import DISSECTOR


def tshark(*arguments: str | Path, **environment: str) -> str:
    """What tshark says; it must have no complaints about the dissector."""
    done = subprocess.run(
        ["tshark", "-X", f"lua_script:{DISSECTOR}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Lua:" not in done.stderr, done.stderr
    return done.stdout


def fields(path: Path, *names: str, where: str = "") -> list[list[str]]:
    """Fields of each packet that a display filter lets through."""
    wanted = [argument for name in names for argument in ("-e", name)]
    said = tshark("-r", path, "-Y", where or "guestio", "-T", "fields", *wanted)
    return [line.split("\t") for line in said.splitlines()]


def counts(path: Path) -> Counter[str]:
    """How many packets there are of each event."""
    return Counter(what for (what,) in fields(path, "guestio.what"))
