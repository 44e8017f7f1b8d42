"""A running Linux guest sees that the disk which ``guestio blk`` serves has another size."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.guest import MIB, Guest, Script, VhostUserDisk, Viommu
from lab.parts import Kernel
from lab.uml import UmlGuest, uml_kernel

FIRST, LARGER, LARGEST, SMALLER = 4 * MIB, 12 * MIB, 16 * MIB, 8 * MIB

# The driver is unloaded for long enough that the host changes the size meanwhile; QEMU takes no
# notice of that by itself.
WORK = f"""
set -eu
wait_for() {{
    until [ "$(cat /sys/block/vda/size)" = "$1" ]; do
        sleep 0.1
    done
}}
wait_for {FIRST // 512}
echo "FACT at=first"
wait_for {LARGER // 512}
dd if=/dev/urandom of=/tmp/end bs=1M count=1 status=none
dd if=/tmp/end of=/dev/vda bs=1M seek={LARGER // MIB - 1} oflag=direct conv=notrunc status=none
dd if=/dev/vda of=/tmp/read bs=1M skip={LARGER // MIB - 1} iflag=direct status=none
cmp /tmp/end /tmp/read
rmmod virtio_blk
echo "FACT at=larger"
sleep 2
insmod /lab/modules/virtio_blk.ko
wait_for {LARGEST // 512}
echo "FACT at=largest"
wait_for {SMALLER // 512}
dd if=/dev/vda of=/dev/null bs=1M iflag=direct status=none
echo "FACT at=smaller"
"""


@pytest.mark.parametrize("viommu", [Viommu.NONE, Viommu.VIRTIO, Viommu.INTEL_STRICT])
def test_linux_sees_another_size(
    viommu: Viommu,
    disk_image: Callable[..., Path],
    tmp_path: Path,
    guest_kernel: Kernel,
) -> None:
    _sees_another_size(disk_image(FIRST), tmp_path, Guest, viommu=viommu)


def test_a_kernel_in_a_process_sees_another_size(
    disk_image: Callable[..., Path], tmp_path: Path
) -> None:
    """Another front-end: User-mode Linux itself."""
    uml_kernel()
    _sees_another_size(disk_image(FIRST), tmp_path, UmlGuest, "--iommu", "off")


def _sees_another_size(
    image: Path, tmp_path: Path, kind: type[Guest], *options: str, **description: Any
) -> None:
    path, log = tmp_path / "blk.sock", tmp_path / "blk.log"
    with log.open("wb") as stderr:
        blk = subprocess.Popen(
            [sys.executable, "-m", "guestio", "blk", image, "--socket", path, *options],
            stderr=stderr,
        )

    def logged(text: str) -> None:
        deadline = time.monotonic() + 120
        while text not in log.read_text():
            assert blk.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)

    def resize(size: int) -> None:
        os.truncate(image, size)
        blk.send_signal(signal.SIGHUP)
        logged(f"has {size} bytes now")

    try:
        logged("listening on")
        guest = kind(disks=[VhostUserDisk(path)], scripts=[Script("resize", WORK)], **description)
        with guest.boot(tmp_path / "guest") as running:
            for fact, size in (("first", LARGER), ("larger", LARGEST), ("largest", SMALLER)):
                running.wait_for(f"FACT at={fact}", 240)
                resize(size)
            result = running.wait().check()
        assert result.facts["at"] == "smaller"
        blk.send_signal(signal.SIGTERM)
        assert blk.wait(10) == 0
        assert "disconnected" not in log.read_text()
        assert "failed=0" in log.read_text()
    finally:
        blk.kill()
        blk.wait()
