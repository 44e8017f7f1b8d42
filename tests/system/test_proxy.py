"""A Linux guest uses a disk through a proxy: what arrives is right, what was seen is complete."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.guest import MIB, GuestResult, Script, VhostUserDisk, Viommu
from lab.proxy import WAYS, recorded
from lab.uml import shim, uml_kernel
from tests.kit.disks import storage_daemon

PATTERN_AT = 1 * MIB + 512
LIMIT = 550.0


class Proxied:
    """A running ``guestio proxy`` that cuts at the first rule that is broken."""

    def __init__(self, directory: Path, backend: Path) -> None:
        self.socket = directory / "proxy.sock"
        self._log = directory / "proxy.log"
        words = ["proxy", "--listen", self.socket, "--connect", backend, "--device", "blk"]
        with self._log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "guestio", *words, "--strict"], stderr=stderr
            )
        wait_for(self.socket, self.process)

    def end(self) -> dict[str, int]:
        """End it; what it has counted."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0
        said = self._log.read_text()
        assert "broke the protocol" not in said, said
        return {name: int(n) for name, n in re.findall(r"(\w+)=(\d+)", said.split(" ended: ")[1])}


def wait_for(socket: Path, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while not socket.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def disk(disk_image: Callable[..., Path], tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """An image and the socket of ``guestio blk``."""
    image, socket = disk_image(4 * MIB), tmp_path / "blk.sock"
    words = ["-m", "guestio", "blk", image, "--socket", socket]
    with subprocess.Popen([sys.executable, *words], stderr=subprocess.DEVNULL) as process:
        wait_for(socket, process)
        yield image, socket
        process.terminate()


def used(
    boot: Callable[..., GuestResult], proxied: Proxied, image: Path, viommu: Viommu
) -> dict[str, int]:
    """Have a guest read everything and write something; what the proxy has counted."""
    before, pattern = hashlib.sha256(image.read_bytes()).hexdigest(), os.urandom(MIB)
    result = boot(
        disks=[VhostUserDisk(proxied.socket, 1)],
        viommu=viommu,
        timeout=LIMIT,
        scripts=[Script.named("sha256"), Script.named("pattern")],
        environment={"PATTERN_OFFSET": str(PATTERN_AT)},
        files={"/lab/pattern": pattern},
    )
    assert result.facts["sha256"] == before
    with image.open("rb") as file:
        file.seek(PATTERN_AT)
        assert file.read(MIB) == pattern
    counts = proxied.end()
    assert counts["requests"] == counts["completed"] > 20
    assert counts["violations"] == counts["protocol_errors"] == 0
    return counts


@pytest.mark.parametrize("viommu", [Viommu.NONE, Viommu.VIRTIO], ids=lambda v: v.name.lower())
def test_linux_uses_a_disk_of_guestio_through_a_proxy(
    viommu: Viommu,
    disk: tuple[Path, Path],
    boot: Callable[..., GuestResult],
    tmp_path: Path,
) -> None:
    image, socket = disk
    counts = used(boot, Proxied(tmp_path, socket), image, viommu)
    assert (counts["iotlb_updates"] > 10) == viommu.present


def test_linux_uses_a_disk_of_qemus_storage_daemon_through_a_proxy(
    boot: Callable[..., GuestResult], tmp_path: Path
) -> None:
    with storage_daemon(tmp_path) as served:
        used(boot, Proxied(tmp_path, served.socket), served.image, Viommu.NONE)


def test_what_a_proxy_recorded_of_a_guest_is_repeated(tmp_path: Path) -> None:
    """User-mode Linux reads, writes, trims and checks a whole disk; `./run lab-proxy` has more."""
    shim()
    uml_kernel()
    row = recorded(WAYS[0], tmp_path / "it", 200, LIMIT, 8 * MIB)
    assert int(row["recorded"]) > 200
    assert row["image"] == "same"
