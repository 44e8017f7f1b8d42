"""The command lines of docs/other-front-ends.md do what the page says."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lab.guest import Guest, Script, VhostUserDisk, Viommu
from lab.qemu import new_qemu
from lab.reloads import served
from lab.uml import UmlGuest
from tests.docs.test_docs import ROOT, back_end, blocks, boot, commands

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = ROOT / "docs/other-front-ends.md"
SOCKET = "/tmp/blk.sock"
LIMIT = 280

pytestmark = pytest.mark.system


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(1 << 20))
    return path


def server_options(heading: str) -> list[str]:
    """What `guestio blk` is given in a section of the page."""
    section = PAGE.read_text().partition(f"## {heading}")[2].partition("\n## ")[0]
    (line,) = [line for line in section.splitlines() if line.startswith("guestio blk ")]
    words = line.split()
    assert words[:5] == ["guestio", "blk", "disk.img", "--socket", SOCKET]
    return words[5:]


@pytest.fixture
def disk(image: Path, tmp_path: Path) -> Iterator[Path]:
    with served(image, tmp_path, *server_options("libblkio")) as (socket, log):
        yield socket
    assert "disconnected" not in log.read_text()


def test_user_mode_linux(image: Path, tmp_path: Path) -> None:
    (documented,) = commands(PAGE, "linux.uml")
    with served(image, tmp_path, *server_options("User-mode Linux")) as (socket, _log):
        guest = UmlGuest(disks=[VhostUserDisk(socket)], scripts=[Script.named("sha256")])
        lab = guest.command(tmp_path)
        start = next(index for index, word in enumerate(lab) if word.endswith("/linux.uml"))
        given = {"initrd=initrd": f"initrd={tmp_path / 'initramfs'}"}
        words = [given.get(w, w).replace(SOCKET, str(socket)) for w in documented[1:]]
        (tmp_path / "initramfs").write_bytes(guest.initramfs())
        # The report's line and a place for its files are what the page's reader does not need.
        words += ["ssl1=null,fd:3", f"uml_dir={tmp_path}/"]
        command = ["setpriv", "--pdeathsig", "KILL", *lab[: start + 1], *words]
        subprocess.run(command, stdin=subprocess.DEVNULL, timeout=LIMIT, check=True)
    report = (tmp_path / "report.log").read_text()
    assert f"FACT sha256={hashlib.sha256(image.read_bytes()).hexdigest()}\n" in report
    assert "GUEST-RESULT rc=0" in report


def run_tool(words: list[str], socket: Path, directory: Path) -> str:
    words = [word.replace(SOCKET, str(socket)) for word in words]
    done = subprocess.run(
        [new_qemu(words[0]), *words[1:]],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_qemu_img_and_qemu_io(image: Path, disk: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    convert, bench = commands(PAGE, "qemu-img")
    run_tool(convert, disk, tmp_path)
    assert (tmp_path / "copy.img").read_bytes() == before
    assert "Sending 1000 read requests" in run_tool(bench, disk, tmp_path)
    (io,) = commands(PAGE, "qemu-io")
    said = run_tool(io, disk, tmp_path)
    assert "wrote 131072/131072 bytes" in said
    assert "read 131072/131072 bytes" in said
    assert "verification failed" not in said
    written = b"\x5a" * 131072
    assert image.read_bytes() == before[:65536] + written + before[65536 + 131072 :]


def test_qemus_device_for_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUESTIO_LAB_QEMU", str(new_qemu()))
    readme = blocks(ROOT / "README.md")
    source = next(text for info, text in readme if info == "python" and "class Entropy" in text)
    (tmp_path / "rng.py").write_text(source)
    server = commands(PAGE, "python")[0]
    assert server[1:] == ["rng.py", "/tmp/rng.sock"]
    reads = 'echo "FACT read=$(dd if=/dev/hwrng bs=4096 count=8 2>/dev/null | wc -c)"\n'
    guest = Guest(viommu=Viommu.VIRTIO, modules=["virtio-rng"], scripts=[Script("rng", reads)])
    (command,) = commands(PAGE, "qemu-system-x86_64")
    with back_end([sys.executable, server[1], str(tmp_path / "rng.sock")], tmp_path):
        facts = boot(command, guest, tmp_path)
    assert int(facts["read"]) == 8 * 4096
