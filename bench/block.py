"""Back ends for a vhost-user disk side by side: requests per second and CPU time per request.

The same scripted guest drives `guestio blk` and `qemu-storage-daemon` in turn, on the same image,
in the same run. The guest runs on one CPU and the back end on another. `qemu-storage-daemon` has
no support for an IOMMU, so only guestio is measured behind one.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from guestio.guest import IommuMode, Request, ScriptedGuest

BLOCK = 4096
SECTOR = 512
IMAGE_BYTES = 256 << 20
START_LIMIT = 20.0
CPU_GUEST, CPU_BACKEND = 0, 1

Server = Literal["guestio", "qemu-storage-daemon"]


@dataclass(frozen=True)
class Workload:
    """What the guest does."""

    name: str
    depth: int
    size: int = BLOCK
    write: bool = False


WORKLOADS = (
    Workload("4K randread depth 1", 1),
    Workload("4K randread depth 32", 32),
    Workload("4K randwrite depth 32", 32, write=True),
    Workload("128K read depth 8", 8, size=128 << 10),
)


@dataclass(frozen=True)
class Result:
    """One measurement."""

    server: Server
    iommu: IommuMode
    workload: str
    iops: float
    cpu_us: float


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its threads, to the nanosecond."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


@contextlib.contextmanager
def serving(server: Server, image: Path, socket: Path) -> Iterator[int]:
    """Run a back end on its CPU; its process id."""
    if server == "guestio":
        command = [sys.executable, "-m", "guestio", "blk", str(image), "--socket", str(socket)]
    else:
        program = shutil.which("qemu-storage-daemon")
        if program is None:
            raise SystemExit("qemu-storage-daemon is missing: apt-get install qemu-utils")
        command = [
            program,
            *("--blockdev", f"driver=file,node-name=file,filename={image}"),
            *("--blockdev", "driver=raw,node-name=disk,file=file"),
            "--export",
            f"type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={socket},writable=on",
        ]
    process = subprocess.Popen(
        ["taskset", "-c", str(CPU_BACKEND), *command], stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + START_LIMIT
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{server} did not start")
            time.sleep(0.02)
        yield process.pid
    finally:
        process.terminate()
        process.wait(10)
        socket.unlink(missing_ok=True)


def drive(guest: ScriptedGuest, work: Workload, seconds: float) -> int:
    """Keep the queue at its depth for a while; the number of requests finished."""
    rng = random.Random(7)
    blocks = IMAGE_BYTES // work.size
    data = rng.randbytes(work.size)

    def begin() -> Request:
        sector = rng.randrange(blocks) * work.size // SECTOR
        if work.write:
            return guest.submit_write(sector, data, publish=False)
        return guest.submit_read(sector, work.size, keep=False, publish=False)

    for _ in range(work.depth):
        begin()
    guest.publish()
    done, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        finished = guest.wait_some()
        done += len(finished)
        for request in finished:
            request.check()
            begin()
        guest.publish()
    guest.drain()
    return done


def measure(
    server: Server, iommu: IommuMode, work: Workload, directory: Path, seconds: float
) -> Result:
    """One back end, fresh, under one workload."""
    socket = directory / "bench.sock"
    with (
        serving(server, directory / "disk.img", socket) as pid,
        ScriptedGuest(socket, iommu=iommu, memory_size=128 << 20, queue_size=128) as guest,
    ):
        drive(guest, work, seconds / 5)
        cpu, started = cpu_seconds(pid), time.monotonic()
        done = drive(guest, work, seconds)
        elapsed = time.monotonic() - started
        used = cpu_seconds(pid) - cpu
    return Result(server, iommu, work.name, done / elapsed, used / done * 1e6)


def run(rounds: int, seconds: float, console: Console) -> list[Result]:
    """Measure everything, the back ends in turn; medians over the rounds."""
    cases: list[tuple[Server, IommuMode]] = [
        ("qemu-storage-daemon", "off"),
        ("guestio", "off"),
        ("guestio", "static"),
        ("guestio", "strict"),
    ]
    os.sched_setaffinity(0, {CPU_GUEST})
    found: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="guestio-bench-") as name:
        directory = Path(name)
        with (directory / "disk.img").open("wb") as file:
            for _ in range(IMAGE_BYTES >> 20):
                file.write(os.urandom(1 << 20))
        for work in WORKLOADS:
            rows: dict[tuple[Server, IommuMode], list[Result]] = {case: [] for case in cases}
            for _ in range(rounds):
                for case in cases:
                    with console.status(f"{work.name}: {case[0]}, IOMMU {case[1]}"):
                        rows[case].append(measure(*case, work, directory, seconds))
            found += [_median(results) for results in rows.values()]
    return found


def _median(results: list[Result]) -> Result:
    first = results[0]
    return Result(
        first.server,
        first.iommu,
        first.workload,
        statistics.median(r.iops for r in results),
        statistics.median(r.cpu_us for r in results),
    )


def show(results: list[Result], console: Console) -> None:
    """Print the results, with ratios to `qemu-storage-daemon` under the same workload."""
    table = Table("workload", "back end", "IOMMU", "IOPS", "x", "CPU us/request", "x")
    base: Result | None = None
    for result in results:
        if result.server == "qemu-storage-daemon":
            base = result
        assert base is not None
        table.add_row(
            result.workload,
            result.server,
            result.iommu,
            f"{result.iops:,.0f}",
            f"{result.iops / base.iops:.2f}",
            f"{result.cpu_us:.1f}",
            f"{result.cpu_us / base.cpu_us:.2f}",
        )
    console.print(table)


def main(*, quick: bool, as_json: bool) -> None:
    """Measure and print."""
    console = Console(stderr=as_json)
    results = run(1 if quick else 5, 1.0 if quick else 5.0, console)
    if as_json:
        print(json.dumps([asdict(result) for result in results], indent=1))
    else:
        show(results, console)


if __name__ == "__main__":
    main(quick="--quick" in sys.argv, as_json="--json" in sys.argv)
