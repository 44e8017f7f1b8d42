"""Wireshark's tshark, reading events of guestio's."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from guestio.observe.pcapng import DISSECTOR

NOBODY = 65534


def tshark(packets: Path, *arguments: str) -> str:
    """What tshark says of a file; it must have no complaints about the dissector.

    Wireshark 4.4 loads no Lua scripts for root, so it is another user's who can read nothing here.
    """
    with tempfile.TemporaryDirectory(dir="/tmp") as directory, packets.open("rb") as given:
        script = Path(directory, "guestio.lua")
        script.write_bytes(Path(DISSECTOR).read_bytes())
        script.chmod(0o644)
        Path(directory).chmod(0o755)
        other: dict[str, Any] = {}
        if os.geteuid() == 0:
            other = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        done = subprocess.run(
            ["tshark", "-X", f"lua_script:{script}", "-r", "-", *arguments],
            stdin=given,
            capture_output=True,
            text=True,
            timeout=120,
            cwd="/",
            env=os.environ | {"HOME": directory},
            check=False,
            **other,
        )
    assert done.returncode == 0, done.stderr
    assert "Lua:" not in done.stderr, done.stderr
    return done.stdout


def fields(path: Path, *names: str, where: str = "") -> list[list[str]]:
    """Fields of each packet that a display filter lets through."""
    wanted = [argument for name in names for argument in ("-e", name)]
    said = tshark(path, "-Y", where or "guestio", "-T", "fields", *wanted)
    return [line.split("\t") for line in said.splitlines()]


def counts(path: Path) -> Counter[str]:
    """How many packets there are of each event."""
    return Counter(what for (what,) in fields(path, "guestio.what"))
