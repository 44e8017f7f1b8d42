"""A Linux guest whose QEMU listens: ``guestio blk`` connects to it, and another one after it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.guest import MIB, Guest, Script, Viommu
from lab.parts import Kernel

SIZE = 4 * MIB
LIMIT = 240.0

WORK = """
set -eu
sum() {
    dd if=/dev/vda bs=64k iflag=direct status=none | sha256sum
}
first=$(sum)
echo "FACT read=once"
i=0
while [ "$i" -lt 10 ]; do
    [ "$(sum)" = "$first" ]
    i=$((i + 1))
done
echo "FACT read=again"
"""


@dataclass(frozen=True, slots=True)
class ListeningDisk:
    """A `vhost-user-blk` disk whose back-end connects to QEMU."""

    socket: Path

    def arguments(self, index: int, viommu: Viommu) -> list[str]:
        """QEMU arguments."""
        options = f"chardev=vhost{index},num-queues=1{viommu.device_options(index)}"
        return [
            *viommu.port_arguments(index),
            *("-chardev", f"socket,id=vhost{index},path={self.socket},server=on"),
            *("-device", f"vhost-user-blk-pci,{options}"),
        ]


@pytest.mark.parametrize("viommu", [Viommu.NONE, Viommu.VIRTIO])
def test_a_guest_goes_on_with_the_next_back_end_that_connects(
    viommu: Viommu, disk_image: Callable[..., Path], tmp_path: Path, guest_kernel: Kernel
) -> None:
    image, path, log = disk_image(SIZE), tmp_path / "qemu.sock", tmp_path / "blk.log"
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        with log.open("ab") as stderr:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "guestio", "blk", image, "--connect", path],
                    stderr=stderr,
                )
            )

    try:
        start()
        guest = Guest(disks=[ListeningDisk(path)], viommu=viommu, scripts=[Script("reads", WORK)])
        with guest.boot(tmp_path / "guest") as running:
            running.wait_for("FACT read=once", LIMIT)
            started[0].kill()
            start()
            result = running.wait().check()
        assert result.facts["read"] == "again"
        assert log.read_text().count(f"connected to {path}\n") >= 2
        deadline = time.monotonic() + LIMIT
        while "gone; so far" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        started[1].terminate()
        assert started[1].wait(60) == 0
    finally:
        for process in started:
            process.kill()
            process.wait()
