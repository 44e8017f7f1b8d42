"""A Linux boot that was recorded is repeated without a guest, byte for byte."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from guestio.observe import open_recording
from lab.guest import MIB, GuestResult, Script, VhostUserDisk, Viommu
from lab.reloads import served
from lab.uml import UmlGuest, shim, uml_kernel

SIZE = 24 * MIB
LIMIT = 550.0
SERIAL = ("--serial", "recorded")


def repeat(directory: Path, before: Path, *options: str) -> str:
    """Replay `recording` against a disk as it was; what the command says, and the disk after."""
    disk = directory / f"repeated{len(list(directory.glob('repeated*')))}"
    disk.mkdir()
    shutil.copyfile(before, disk / "disk.img")
    with served(disk / "disk.img", disk, *SERIAL) as (socket, log):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "guestio", "replay", directory / "recording"),
                *(socket, "--timeout", "120", *options),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log.read_text()}"
    assert "every answer was the recorded one" in done.stdout
    assert (disk / "disk.img").read_bytes() == (directory / "disk.img").read_bytes()
    return done.stdout


def new_disk(directory: Path) -> tuple[Path, Path, list[str]]:
    """An image, a copy of it, and options for having what is done to it recorded."""
    image, before = directory / "disk.img", directory / "before.img"
    image.write_bytes(os.urandom(SIZE))
    shutil.copyfile(image, before)
    recording = str(directory / "recording")
    return image, before, ["--record", recording, "--record-payload", "all", *SERIAL]


def check_recorded(directory: Path) -> int:
    """How many requests the recording has; it must be complete."""
    with open_recording(directory / "recording") as recording:
        assert recording.description["lost"] == 0
        requests = recording.requests()
        assert {"read", "write", "flush"} <= set(requests["operation"].to_pylist())
        return len(requests)


def test_user_mode_linux(tmp_path: Path) -> None:
    """At its recorded pace and at the highest speed; behind an IOMMU as well."""
    shim()
    uml_kernel()
    image, before, options = new_disk(tmp_path)
    with served(image, tmp_path, "--iommu", "off", *options) as (socket, _):
        guest = UmlGuest(disks=[VhostUserDisk(socket)], scripts=[Script.named("filesystem")])
        guest.run(tmp_path / "guest").check()
    count = check_recorded(tmp_path)
    assert count > 100
    for speed in (["--speed", "1"], ["--speed", "max"], ["--speed", "max", "--iommu", "strict"]):
        assert f"{count} requests in " in repeat(tmp_path, before, *speed)


def test_qemu_behind_an_iommu(boot: Callable[..., GuestResult], tmp_path: Path) -> None:
    """Firmware, kernel and file system, with every translation and its revocation."""
    image, before, options = new_disk(tmp_path)
    with served(image, tmp_path, *options) as (socket, _):
        boot(
            disks=[VhostUserDisk(socket)],
            viommu=Viommu.VIRTIO,
            timeout=LIMIT,
            scripts=[Script.named("filesystem")],
        )
    count = check_recorded(tmp_path)
    with open_recording(tmp_path / "recording") as recording:
        assert recording.description["counts"]["invalidate"] > 100
    for speed in ([], ["--speed", "max"], ["--speed", "max", "--iommu", "off"]):
        said = repeat(tmp_path, before, *speed)
        assert f"{count} requests in " in said
        assert ("IOTLB: " in said) is ("off" not in speed)
