"""A Linux guest's view: direct 4 KiB reads of a guestio disk and of one of QEMU's own.

That is `guestio blk` and QEMU's virtio-blk, or with `--nvme` `guestio nvme` over vfio-user and
QEMU's NVMe controller, in the QEMU of the lab (`python -m lab.qemu`).

Both disks are in the same guest, behind the same virtual IOMMU or without one, and take turns. QEMU
runs without KVM, so times are longer than on hardware; the ratios are what counts. The guest has
one CPU; QEMU's disk is served in QEMU's process, guestio's in its own. What is shown are medians
over the rounds, and medians of the ratios within each round.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.status import Status
from rich.table import Table

from guestio.guest.load import cpu_seconds
from lab.guest import (
    MIB,
    Guest,
    GuestResult,
    QemuDisk,
    QemuNvme,
    Script,
    VfioUserDevice,
    VhostUserDisk,
    Viommu,
)
from lab.qemu import new_qemu

IMAGE_BYTES = 128 * MIB
START_LIMIT = 20.0
READERS = 16
SERIAL = "guestio"
BUSY_LOAD = 0.5


@dataclass(frozen=True)
class Pair:
    """Two disks that are compared.

    Attributes:
        command: Of guestio, that serves the one.
        other: What QEMU's own is called.
        names: What Linux calls them, in whichever order.
        serial: Where Linux has a disk's serial number, below `/sys/block/DISK`.
        counts: What the server counts that a read costs, and what that is called in the table.
        goals: Most times of QEMU's that guestio may take, by IOMMU and readers.
    """

    command: str
    other: str
    names: tuple[str, str]
    serial: str
    counts: dict[str, str]
    goals: dict[tuple[Viommu, int], float]

    def guest(self, socket: Path, image: Path, **more: object) -> Guest:
        """A guest with both; more are fields of `Guest`."""
        if self.command == "blk":
            more["disks"] = [VhostUserDisk(socket), QemuDisk(image)]
        else:
            more["devices"] = [VfioUserDevice(socket), QemuNvme(image)]
        return Guest(**more)  # type: ignore[arg-type]  # a dict has one type for all fields

    @property
    def which(self) -> Script:
        """Tells which disk is whose."""
        # Linux may probe disks at the same time, and then any of them is the first.
        return Script(
            "which",
            f"""for disk in {" ".join(self.names)}; do
    until [ -b /dev/$disk ]; do usleep 10000; done
    case $(cat /sys/block/$disk/{self.serial}) in
        {SERIAL}*) echo "FACT guestio=$disk" ;;
        *) echo "FACT qemu=$disk" ;;
    esac
done
""",
        )


BLK = Pair(
    "blk",
    "virtio-blk",
    ("vda", "vdb"),
    "serial",
    {"iotlb_misses": "misses", "iotlb_invalidations": "invalidations"},
    {(Viommu.VIRTIO, 1): 2.0, (Viommu.VIRTIO, READERS): 1.3},
)
NVME = Pair(
    "nvme",
    "NVMe controller",
    ("nvme0n1", "nvme1n1"),
    "device/serial",
    {"dma_maps": "maps", "dma_unmaps": "unmaps", "region_writes": "doorbells"},
    {(Viommu.VIRTIO, 1): 2.0, (Viommu.VIRTIO, READERS): 1.5},
)


@dataclass(frozen=True)
class Reads:
    """One way to read, on both disks.

    Attributes:
        pair: The disks.
        viommu: The IOMMU, as QEMU calls it.
        readers: Processes reading at once.
        requests: Reads per round.
        guestio: Seconds of each round.
        qemu: The same for QEMU's disk.
        cpu_us: Microseconds of CPU per read that guestio's process used, over the whole guest.
        counts: What else guestio counted per read, over the whole guest.
    """

    pair: Pair
    viommu: Viommu
    readers: int
    requests: int
    guestio: list[float]
    qemu: list[float]
    cpu_us: float
    counts: dict[str, float]

    @property
    def ratio(self) -> float:
        """The median of how many times as long as QEMU's disk guestio's takes."""
        return statistics.median(a / b for a, b in zip(self.guestio, self.qemu, strict=True))

    @property
    def goal(self) -> float | None:
        """The most that the ratio shall be, if that is said."""
        return self.pair.goals.get((self.viommu, self.readers))


@dataclass(frozen=True)
class Effort:
    """How much to do: reads one at a time, reads of each reader, and rounds."""

    blocks: int
    each: int
    rounds: int


@dataclass(frozen=True)
class Server:
    """A running server: its process, and what it wrote to its standard error."""

    pid: int
    log: Path

    def counts(self) -> dict[str, int]:
        """What the front-ends or clients that are gone have cost."""
        lines = [line for line in self.log.read_text().splitlines() if "so far:" in line]
        if not lines:
            raise SystemExit(f"guestio counted nothing: {self.log.read_text()[-500:]}")
        return {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", lines[-1])}


@contextlib.contextmanager
def serving(command: str, image: Path, socket: Path, options: Sequence[str]) -> Iterator[Server]:
    """Run a command of guestio."""
    words = [sys.executable, "-m", "guestio", command, str(image), "--socket", str(socket)]
    log = socket.with_suffix(".log")
    with log.open("wb") as errors:
        process = subprocess.Popen([*words, "--serial", SERIAL, *options], stderr=errors)
    try:
        deadline = time.monotonic() + START_LIMIT
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"guestio {command} did not start: {log.read_text()[-500:]}")
            time.sleep(0.02)
        yield Server(process.pid, log)
    finally:
        process.terminate()
        process.wait(10)


def measure(
    pair: Pair,
    viommu: Viommu,
    directory: Path,
    effort: Effort,
    options: Sequence[str],
    tell: Callable[[str], None],
) -> list[Reads]:
    """One guest: both disks, one reader and many."""
    socket = directory / "disk.sock"
    limit = 120.0 + 120.0 * effort.rounds
    with serving(pair.command, directory / "guestio.img", socket, options) as server:
        before = cpu_seconds(server.pid)
        guest = pair.guest(
            socket,
            directory / "qemu.img",
            viommu=viommu,
            scripts=[pair.which, Script.named("reads")],
            environment={
                "DISKS": " ".join(f"/dev/{name}" for name in pair.names),
                "READS_BLOCKS": str(effort.blocks),
                "READS_READERS": str(READERS),
                "READS_EACH": str(effort.each),
                "READS_ROUNDS": str(effort.rounds),
            },
            timeout=limit,
        )
        result = _run(pair, guest, effort.rounds, limit, tell)
        cpu = cpu_seconds(server.pid) - before
    counts = server.counts()
    total = effort.rounds * (effort.blocks + READERS * effort.each)
    return [
        Reads(
            pair,
            viommu,
            readers,
            requests,
            _seconds(result, result.facts["guestio"], readers, effort.rounds),
            _seconds(result, result.facts["qemu"], readers, effort.rounds),
            cpu / total * 1e6,
            {shown: counts[name] / total for name, shown in pair.counts.items()},
        )
        for readers, requests in ((1, effort.blocks), (READERS, READERS * effort.each))
    ]


def _run(
    pair: Pair, guest: Guest, rounds: int, limit: float, tell: Callable[[str], None]
) -> GuestResult:
    """Run a guest, and tell how far it is."""
    with guest.boot() as running:
        tell("boots")
        for number in range(rounds):
            for disk in pair.names:
                running.wait_for(f"FACT reads_{disk}_{READERS}_{number + 1}=", limit)
            tell(f"round {number + 1} of {rounds} done")
        return running.wait().check()


def _seconds(result: GuestResult, disk: str, readers: int, rounds: int) -> list[float]:
    return [int(result.facts[f"reads_{disk}_{readers}_{n + 1}"]) / 100 for n in range(rounds)]


def show(found: Sequence[Reads], console: Console) -> None:
    """Print times, ratios and whether they are as wanted."""
    table = Table(
        *("IOMMU", "readers", "reads", "guestio us/read", "QEMU us/read", "times QEMU's"),
        "guestio CPU us/read",
        *(f"{name}/read" for name in found[0].counts),
    )
    for reads in found:
        table.add_row(
            reads.viommu.value,
            str(reads.readers),
            f"{reads.requests:,}",
            f"{statistics.median(reads.guestio) / reads.requests * 1e6:.0f}",
            f"{statistics.median(reads.qemu) / reads.requests * 1e6:.0f}",
            f"{reads.ratio:.2f}",
            f"{reads.cpu_us:.1f}",
            *(f"{count:.2f}" for count in reads.counts.values()),
        )
    console.print(table)
    _show_goals(found, console)


def _show_goals(found: Sequence[Reads], console: Console) -> None:
    table = Table("goal", "against", "figure", "wanted", "measured", "")
    for reads in found:
        if reads.goal is None:
            continue
        many = "s" if reads.readers > 1 else ""
        table.add_row(
            f"4K direct read, {reads.readers} reader{many}, {reads.viommu.value}",
            f"QEMU's {reads.pair.other}, the same",
            "time",
            f"<= {reads.goal:.2f}",
            f"{reads.ratio:.2f}",
            "[green]reached[/]" if reads.ratio <= reads.goal else "[bold red]not reached[/]",
        )
    console.print(table)


def _plain(reads: Reads) -> dict[str, object]:
    """A measurement for JSON."""
    return asdict(reads) | {"pair": reads.pair.command, "viommu": reads.viommu.value}


def _tell(status: Status, viommu: Viommu, state: str) -> None:
    status.update(f"a guest, IOMMU {viommu.value}: {state}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Boot the guests and print what they measured."""
    parser = argparse.ArgumentParser(prog="bench/guest.py", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds in each guest (5)")
    parser.add_argument("--quick", action="store_true", help="two short rounds")
    parser.add_argument("--intel", action="store_true", help="behind an Intel IOMMU as well")
    parser.add_argument("--nvme", action="store_true", help="guestio nvme and QEMU's controller")
    parser.add_argument("--poll-us", type=int, help="have guestio poll so long before it sleeps")
    parser.add_argument("--json", action="store_true", help="print every measurement as JSON")
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error("nothing to measure")
    effort = Effort(2000, 250, 2) if given.quick else Effort(8000, 1000, given.rounds)
    options = [] if given.poll_us is None else ["--poll-us", str(given.poll_us)]
    viommus = [Viommu.NONE, Viommu.VIRTIO]
    pair = NVME if given.nvme else BLK
    if given.intel:
        viommus += [Viommu.INTEL_CACHING] if given.nvme else [Viommu.INTEL, Viommu.INTEL_STRICT]
    if given.nvme:
        os.environ["GUESTIO_LAB_QEMU"] = str(new_qemu())
    console = Console(stderr=given.json)
    if (load := os.getloadavg()[0]) > BUSY_LOAD:
        console.print(
            f"[bold]The machine is busy (load average {load:.1f}):[/] guestio's disk takes two "
            "processes that wait for each other, and loses more by it than QEMU's."
        )
    found: list[Reads] = []
    with tempfile.TemporaryDirectory(prefix="guestio-bench-") as name:
        directory = Path(name)
        with (directory / "guestio.img").open("wb") as file:
            for _ in range(IMAGE_BYTES // MIB):
                file.write(os.urandom(MIB))
        shutil.copy(directory / "guestio.img", directory / "qemu.img")
        for viommu in viommus:
            with console.status("") as status:
                tell = functools.partial(_tell, status, viommu)
                found += measure(pair, viommu, directory, effort, options, tell)
    if given.json:
        print(json.dumps([_plain(reads) for reads in found], indent=1))
    else:
        show(found, console)


if __name__ == "__main__":
    main()
