"""A real Linux guest uses a disk that ``guestio blk`` serves, with and without an IOMMU."""

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

QUEUES = 2
PATTERN_AT = 33 * MIB + 512
# Seconds for each boot. Strict invalidation waits for us at each request: on a busy machine, where
# each wait costs a time slice, that adds up to minutes.
LIMIT = 550.0


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Served:
    """A running ``guestio blk``."""

    def __init__(self, image: Path, socket: Path, log: Path) -> None:
        self.image = image
        self.socket = socket
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "guestio", "blk", image, "--socket", socket),
                    *("--num-queues", str(QUEUES)),
                ],
                stderr=stderr,
            )
        deadline = time.monotonic() + 60
        while f"listening on {socket}" not in log.read_text():
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)

    def counts(self) -> dict[str, int]:
        """What the service said when its last front-end went."""
        deadline = time.monotonic() + 60
        while not (said := re.findall(r"so far: (.*)", self.log.read_text())):
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return {name: int(n) for name, n in re.findall(r"(\w+)=(\d+)", said[-1])}

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(10)


@pytest.fixture
def served(disk_image: Callable[..., Path], tmp_path: Path) -> Iterator[Served]:
    service = Served(disk_image(), tmp_path / "blk.sock", tmp_path / "blk.log")
    yield service
    if service.process.poll() is None:
        service.process.kill()
        service.process.wait()


@pytest.mark.parametrize("viommu", list(Viommu), ids=lambda v: v.name.lower())
def test_linux_uses_the_disk(
    viommu: Viommu, served: Served, boot: Callable[..., GuestResult]
) -> None:
    """Contents arrive, writes land, a file system survives, queues work side by side, twice."""
    before = sha256(served.image)
    pattern = os.urandom(MIB)
    disk = VhostUserDisk(served.socket, QUEUES)

    first = boot(
        disks=[disk],
        viommu=viommu,
        smp=QUEUES,
        timeout=LIMIT,
        scripts=[Script.named(name) for name in ("sha256", "parallel", "pattern")],
        environment={"PATTERN_OFFSET": str(PATTERN_AT)},
        files={"/lab/pattern": pattern},
    )
    assert first.facts["sha256"] == before
    assert int(first.facts["parallel_queues"]) == QUEUES
    with served.image.open("rb") as image:
        written = hashlib.sha256(image.read(int(first.facts["parallel_bytes"])))
        assert written.hexdigest() == first.facts["parallel_sha256"]
        image.seek(PATTERN_AT)
        assert image.read(len(pattern)) == pattern

    now = sha256(served.image)
    second = boot(
        disks=[disk],
        viommu=viommu,
        smp=QUEUES,
        timeout=LIMIT,
        scripts=[Script.named("sha256"), Script.named("filesystem")],
    )
    assert second.facts["sha256"] == now

    counts = served.counts()
    assert counts["requests"] > 1000
    assert counts["failed"] == 0
    if viommu.present:
        assert counts["iotlb_misses"] > 1000
        assert counts["iotlb_invalidations"] > 100
    else:
        assert counts["iotlb_misses"] == counts["iotlb_invalidations"] == 0
    assert served.stop() == 0
    assert not served.socket.exists()
    assert "disconnected" not in served.log.read_text()
