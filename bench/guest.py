"""A Linux guest's view: direct 4 KiB reads of a guestio disk and of QEMU's own virtio-blk.

Both disks are in the same guest, behind the same virtual IOMMU or without one, and take turns. QEMU
runs without KVM, so times are longer than on hardware; the ratios are what counts. The guest has
one CPU; QEMU's disk is served in QEMU's process, guestio's in its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from guestio.guest.load import cpu_seconds
from lab.guest import MIB, Guest, GuestResult, QemuDisk, Script, VhostUserDisk, Viommu

IMAGE_BYTES = 128 * MIB
START_LIMIT = 20.0
READERS = 16
GUESTIO_DISK, QEMU_DISK = "vda", "vdb"

GOALS = {(Viommu.VIRTIO, 1): 2.0, (Viommu.VIRTIO, READERS): 1.3}
"""Most times of QEMU's that guestio may take, by IOMMU and readers."""


@dataclass(frozen=True)
class Reads:
    """One way to read, on both disks.

    Attributes:
        viommu: The IOMMU, as QEMU calls it.
        readers: Processes reading at once.
        requests: Reads per round.
        guestio: Seconds of each round.
        qemu: The same for QEMU's disk.
        cpu_us: Microseconds of CPU per read that guestio's process used, over the whole guest.
    """

    viommu: Viommu
    readers: int
    requests: int
    guestio: list[float]
    qemu: list[float]
    cpu_us: float

    @property
    def ratio(self) -> float:
        """The median of how many times as long as QEMU's disk guestio's takes."""
        return statistics.median(a / b for a, b in zip(self.guestio, self.qemu, strict=True))


@dataclass(frozen=True)
class Effort:
    """How much to do: reads one at a time, reads of each reader, and rounds."""

    blocks: int
    each: int
    rounds: int


@contextlib.contextmanager
def serving(image: Path, socket: Path, options: Sequence[str]) -> Iterator[int]:
    """Run `guestio blk`; its process id."""
    command = [sys.executable, "-m", "guestio", "blk", str(image), "--socket", str(socket)]
    process = subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_LIMIT
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("guestio blk did not start")
            time.sleep(0.02)
        yield process.pid
    finally:
        process.terminate()
        process.wait(10)


def measure(
    viommu: Viommu, directory: Path, effort: Effort, options: Sequence[str], timeout: float
) -> list[Reads]:
    """One guest: both disks, one reader and many."""
    socket = directory / "blk.sock"
    with serving(directory / "guestio.img", socket, options) as pid:
        before = cpu_seconds(pid)
        result = Guest(
            disks=[VhostUserDisk(socket), QemuDisk(directory / "qemu.img")],
            viommu=viommu,
            scripts=[Script.named("reads")],
            environment={
                "DISKS": f"/dev/{GUESTIO_DISK} /dev/{QEMU_DISK}",
                "READS_BLOCKS": str(effort.blocks),
                "READS_READERS": str(READERS),
                "READS_EACH": str(effort.each),
                "READS_ROUNDS": str(effort.rounds),
            },
            timeout=timeout,
        ).run()
        cpu = cpu_seconds(pid) - before
    result.check()
    total = effort.rounds * (effort.blocks + READERS * effort.each)
    return [
        Reads(
            viommu,
            readers,
            requests,
            _seconds(result, GUESTIO_DISK, readers, effort.rounds),
            _seconds(result, QEMU_DISK, readers, effort.rounds),
            cpu / total * 1e6,
        )
        for readers, requests in ((1, effort.blocks), (READERS, READERS * effort.each))
    ]


def _seconds(result: GuestResult, disk: str, readers: int, rounds: int) -> list[float]:
    return [int(result.facts[f"reads_{disk}_{readers}_{n + 1}"]) / 100 for n in range(rounds)]


def show(found: Sequence[Reads], console: Console) -> None:
    """Print times and ratios."""
    table = Table(
        *("IOMMU", "readers", "reads", "guestio s", "QEMU s", "us a read", "us a read"),
        *("times QEMU's", "wanted", "guestio CPU us"),
    )
    for reads in found:
        ours, theirs = statistics.median(reads.guestio), statistics.median(reads.qemu)
        goal = GOALS.get((reads.viommu, reads.readers))
        style = "" if goal is None else "green" if reads.ratio <= goal else "bold red"
        table.add_row(
            reads.viommu.value,
            str(reads.readers),
            f"{reads.requests:,}",
            f"{ours:.2f}",
            f"{theirs:.2f}",
            f"{ours / reads.requests * 1e6:.0f}",
            f"{theirs / reads.requests * 1e6:.0f}",
            f"[{style}]{reads.ratio:.2f}[/]" if style else f"{reads.ratio:.2f}",
            "" if goal is None else f"<= {goal:.1f}",
            f"{reads.cpu_us:.1f}",
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Boot the guests and print what they measured."""
    parser = argparse.ArgumentParser(prog="bench/guest.py", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds in each guest (5)")
    parser.add_argument("--quick", action="store_true", help="two short rounds")
    parser.add_argument("--intel", action="store_true", help="behind an Intel IOMMU as well")
    parser.add_argument("--poll-us", type=int, help="have guestio poll so long before it sleeps")
    parser.add_argument("--json", action="store_true", help="print every measurement as JSON")
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error("nothing to measure")
    effort = Effort(2000, 250, 2) if given.quick else Effort(8000, 1000, given.rounds)
    options = [] if given.poll_us is None else ["--poll-us", str(given.poll_us)]
    viommus = [Viommu.NONE, Viommu.VIRTIO]
    if given.intel:
        viommus += [Viommu.INTEL, Viommu.INTEL_STRICT]
    console = Console(stderr=given.json)
    found: list[Reads] = []
    with tempfile.TemporaryDirectory(prefix="guestio-bench-") as name:
        directory = Path(name)
        with (directory / "guestio.img").open("wb") as file:
            for _ in range(IMAGE_BYTES // MIB):
                file.write(os.urandom(MIB))
        shutil.copy(directory / "guestio.img", directory / "qemu.img")
        for viommu in viommus:
            with console.status(f"a guest with IOMMU {viommu.value}"):
                found += measure(viommu, directory, effort, options, 120 + 120 * effort.rounds)
    if given.json:
        print(json.dumps([asdict(r) | {"viommu": r.viommu.value} for r in found], indent=1))
    else:
        show(found, console)


if __name__ == "__main__":
    main()
