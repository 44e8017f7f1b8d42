"""What has to wait for a disk: reads that are not cached, and cached reads while flushes run.

Back-ends take turns on the same image, on a real disk. Before each measurement the image is dropped
from the page cache, and it is large enough that hardly a page is read twice. Many disks of rented
machines serve a burst quickly and then slow down, for any program: runs are short, with pauses.

For the flushes, one queue writes a few blocks and flushes, over and over, while another reads what
is cached, one block at a time; the latency of those reads is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.block import (
    BACKEND_CPU,
    LOAD_CPU,
    Case,
    Row,
    Workload,
    measure,
    serving,
    show,
    warn_if_busy,
)
from guestio.guest import ScriptedGuest

COLD_BYTES = 4 << 30
WARM_BYTES = 64 << 20
PAUSE = 4.0
BLOCK = 4096
WRITES_PER_FLUSH = 16

QEMU = Case("qemu-storage-daemon", aio="threads")
URING = Case("qemu-storage-daemon", aio="io_uring")
ALONE = Case("guestio", io_threads=0)
THREADS = Case("guestio")
CASES = (
    QEMU,
    URING,
    ALONE,
    Case("guestio", io_threads=1),
    THREADS,
    Case("guestio", io_threads=16),
)
FLUSH_CASES = (QEMU, ALONE, THREADS)


def _uncached(name: str, size: str, depth: int) -> Workload:
    options = ("--workload", "randread", "--block-size", size, "--depth", str(depth))
    return Workload(name, options, CASES)


WORKLOADS = (
    _uncached("4K randread depth 32, uncached", "4k", 32),
    _uncached("4K randread depth 1, uncached", "4k", 1),
    _uncached("128K randread depth 8, uncached", "128k", 8),
)


@dataclass
class Reads:
    """Cached reads while another queue flushed.

    Attributes:
        case: The back-end.
        p50, p99, worst: Latencies, us.
        reads: How many there were.
        flushes: How many flushes were completed meanwhile.
    """

    case: Case
    p50: float
    p99: float
    worst: float
    reads: int
    flushes: int


def drop(image: Path) -> None:
    """Have nothing of a file in the page cache."""
    with image.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_image(image: Path, size: int) -> None:
    """Fill an image, and have it on the disk."""
    block = os.urandom(1 << 20)
    with image.open("wb") as file:
        for _ in range(size >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def reads_during_flushes(case: Case, directory: Path, seconds: float) -> Reads:
    """Latency of cached reads of one queue while another one writes and flushes."""
    image, socket = directory / "warm.img", directory / "flush.sock"
    image.read_bytes()
    rng = random.Random(1)
    took: list[int] = []
    flushes = 0
    stop = threading.Event()
    with (
        serving(case, image, socket, BACKEND_CPU, queues=2),
        ScriptedGuest(socket, queues=2, timeout=60.0) as guest,
    ):

        def flush() -> None:
            nonlocal flushes
            data = os.urandom(BLOCK)
            while not stop.is_set():
                for _ in range(WRITES_PER_FLUSH):
                    sector = _sector(rng, WARM_BYTES // 2, WARM_BYTES)
                    guest.write(sector, data, queue=1)
                guest.flush(queue=1)
                flushes += 1

        thread = threading.Thread(target=flush)
        thread.start()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            sector = _sector(rng, 0, WARM_BYTES // 2)
            before = time.perf_counter_ns()
            guest.read(sector, BLOCK)
            took.append(time.perf_counter_ns() - before)
        stop.set()
        thread.join()
    took.sort()
    p50, p99, worst = (took[int(at * (len(took) - 1))] / 1000 for at in (0.5, 0.99, 1.0))
    return Reads(case, p50, p99, worst, len(took), flushes)


def _sector(rng: random.Random, start: int, end: int) -> int:
    return rng.randrange(start // BLOCK, end // BLOCK) * (BLOCK // 512)


def run(
    rounds: int, seconds: float, place: Path, tell: Callable[[str], AbstractContextManager[object]]
) -> tuple[list[Row], list[list[Reads]]]:
    """Measure everything, the back-ends in turn."""
    rows = [Row(work.name, case, []) for work in WORKLOADS for case in work.cases]
    flushed: list[list[Reads]] = [[] for _ in FLUSH_CASES]
    works = {work.name: work for work in WORKLOADS}
    with tempfile.TemporaryDirectory(prefix="guestio-bench-", dir=place) as name:
        directory = Path(name)
        with tell("writing the images"):
            write_image(directory / "disk.img", COLD_BYTES)
            write_image(directory / "warm.img", WARM_BYTES)
        for number in range(rounds):
            for row in rows:
                with tell(f"{row.workload}, round {number + 1}: {row.case}"):
                    time.sleep(PAUSE)
                    drop(directory / "disk.img")
                    one = measure(row.case, works[row.workload], directory, seconds)
                    row.measured.append(one)
            for found, case in zip(flushed, FLUSH_CASES, strict=True):
                with tell(f"cached reads during flushes, round {number + 1}: {case}"):
                    time.sleep(PAUSE)
                    found.append(reads_during_flushes(case, directory, seconds))
    return rows, flushed


def show_flushes(flushed: Sequence[Sequence[Reads]], console: Console) -> None:
    """Print medians."""
    table = Table("cached reads during flushes", "p50 us", "p99 us", "worst us", "reads", "flushes")
    for found in flushed:
        names = ("p50", "p99", "worst", "reads", "flushes")
        medians = [statistics.median(getattr(one, name) for one in found) for name in names]
        table.add_row(str(found[0].case), *(f"{each:,.0f}" for each in medians))
    console.print(table)


def file_system(directory: Path) -> str:
    """The type of the file system that a directory is on."""
    command = ["stat", "-f", "-c", "%T", str(directory)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench/disk.py", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds (5)")
    parser.add_argument("--time", type=float, default=1.5, help="seconds per measurement (1.5)")
    parser.add_argument("--quick", action="store_true", help="one round of half a second each")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("/var/tmp"),
        help="where to put the image, 4 GiB, on a disk (/var/tmp)",
    )
    parser.add_argument("--json", action="store_true", help="print every measurement as JSON")
    given = parser.parse_args(arguments)
    rounds, seconds = (1, 0.5) if given.quick else (given.rounds, given.time)
    if rounds < 1 or seconds <= 0:
        parser.error("nothing to measure")
    if not given.directory.is_dir() or file_system(given.directory) in {"tmpfs", "ramfs"}:
        parser.error(f"{given.directory} is no directory on a disk; choose one with --directory")
    if not {LOAD_CPU, BACKEND_CPU} <= os.sched_getaffinity(0):
        parser.error(f"CPUs {LOAD_CPU} and {BACKEND_CPU} are needed")
    os.sched_setaffinity(0, {LOAD_CPU})
    console = Console(stderr=given.json)
    warn_if_busy(console)
    rows, flushed = run(rounds, seconds, given.directory, console.status)
    if given.json:
        found = {"reads": [asdict(row) for row in rows]}
        found["flushes"] = [asdict(one) for each in flushed for one in each]
        print(json.dumps(found, indent=1))
    else:
        show(rows, console)
        show_flushes(flushed, console)


if __name__ == "__main__":
    main()
