"""Back-ends for a vhost-user disk side by side: requests per second and CPU time per request.

`guestio bench` drives `guestio blk` and `qemu-storage-daemon` in turn, on the same image, in the
same run: load on one CPU and back-end on another, or both on one. Every measurement has a fresh
back-end. The back-ends take turns within a round; what is shown are medians over the rounds, and
medians of the ratios within each round. `qemu-storage-daemon` has no support for an IOMMU, so only
guestio is measured behind one.

The image is kept in memory (/dev/shm), because it is the back-ends that are measured: on a disk,
what was written is written back meanwhile, and both of them wait for that. `bench disk` is about
that waiting.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

IMAGE_BYTES = 256 << 20
START_LIMIT = 20.0
POLL_US = 50
BUSY_LOAD = 0.5
LOAD_CPU, BACKEND_CPU = 0, 1

Server = Literal["guestio", "qemu-storage-daemon"]


@dataclass(frozen=True)
class Case:
    """A back-end, and what is between it and memory.

    Attributes:
        server: Which program.
        iommu: What the load does about an IOMMU.
        poll_us: How long the back-end polls before it sleeps; None for as it does by default.
        io_threads: Threads of guestio's that wait for the disk; None for as it does by default.
        aio: How `qemu-storage-daemon` reads files: threads or io_uring; None for its default.
        acknowledge: Whether the load sends IOTLB messages in bulk, or each once the one before it
            was acknowledged, as QEMU does.
    """

    server: Server
    iommu: str = "off"
    poll_us: int | None = None
    io_threads: int | None = None
    aio: str | None = None
    acknowledge: str = "bulk"

    def __str__(self) -> str:
        polls = "" if self.poll_us is None else f" --poll-us {self.poll_us}"
        threads = "" if self.io_threads is None else f" --io-threads {self.io_threads}"
        aio = "" if self.aio is None else f" aio={self.aio}"
        each = " (each acknowledged)" if self.acknowledge == "each" else ""
        return f"{self.server}{polls}{threads}{aio}{each}"


QEMU = Case("qemu-storage-daemon")
OFF = Case("guestio")
POLLING = Case("guestio", poll_us=POLL_US)
STATIC = Case("guestio", "static")
STRICT = Case("guestio", "strict")
EACH = Case("guestio", "strict", acknowledge="each")


@dataclass(frozen=True)
class Workload:
    """What the load is.

    Attributes:
        name: For the tables.
        options: Options of `guestio bench`.
        cases: Back-ends to compare, the base of the ratios first.
        one_cpu: Whether load and back-end share a CPU.
    """

    name: str
    options: tuple[str, ...]
    cases: tuple[Case, ...]
    one_cpu: bool = False


def _options(workload: str, size: str, depth: int, *more: str) -> tuple[str, ...]:
    return ("--workload", workload, "--block-size", size, "--depth", str(depth), *more)


WORKLOADS = (
    Workload(
        "4K randread depth 32", _options("randread", "4k", 32), (QEMU, OFF, STATIC, STRICT, EACH)
    ),
    Workload(
        "4K randwrite depth 32", _options("randwrite", "4k", 32), (QEMU, OFF, STATIC, STRICT, EACH)
    ),
    Workload(
        "4K randread depth 1", _options("randread", "4k", 1), (QEMU, OFF, POLLING, STATIC, STRICT)
    ),
    Workload(
        "4K randread depth 1, driver polls",
        _options("randread", "4k", 1, "--polling"),
        (QEMU, OFF, POLLING),
    ),
    Workload(
        "4K randread depth 1, one CPU",
        _options("randread", "4k", 1),
        (QEMU, OFF, STATIC, STRICT),
        one_cpu=True,
    ),
    Workload("128K read depth 8", _options("read", "128k", 8), (QEMU, OFF, STATIC, STRICT)),
)


@dataclass(frozen=True)
class Goal:
    """What shall be reached: a ratio of medians under one workload."""

    workload: str
    case: Case
    base: Case
    figure: Literal["iops", "cpu_us"]
    limit: float

    @property
    def at_least(self) -> bool:
        """Whether more is better."""
        return self.figure == "iops"


GOALS = (
    Goal("4K randread depth 32", OFF, QEMU, "iops", 2.0),
    Goal("4K randread depth 32", OFF, QEMU, "cpu_us", 0.5),
    Goal("4K randwrite depth 32", OFF, QEMU, "iops", 2.0),
    Goal("4K randwrite depth 32", OFF, QEMU, "cpu_us", 0.5),
    Goal("4K randread depth 1", OFF, QEMU, "iops", 1.0),
    Goal("4K randread depth 1", OFF, QEMU, "cpu_us", 0.8),
    Goal("4K randread depth 1", POLLING, QEMU, "iops", 2.0),
    Goal("4K randread depth 1, one CPU", OFF, QEMU, "iops", 1.8),
    Goal("128K read depth 8", OFF, QEMU, "iops", 1.0),
    Goal("128K read depth 8", OFF, QEMU, "cpu_us", 0.8),
    Goal("4K randread depth 32", STATIC, OFF, "cpu_us", 1.15),
    Goal("4K randread depth 32", STRICT, OFF, "cpu_us", 2.5),
    Goal("4K randwrite depth 32", STATIC, OFF, "cpu_us", 1.15),
    Goal("4K randwrite depth 32", STRICT, OFF, "cpu_us", 2.5),
    Goal("128K read depth 8", STATIC, OFF, "cpu_us", 1.15),
)


@dataclass
class Row:
    """All measurements of one back-end under one workload, one per round.

    Attributes:
        workload: Its name.
        case: The back-end.
        measured: What `guestio bench --json` said.
    """

    workload: str
    case: Case
    measured: list[dict[str, Any]]

    def figures(self, name: str) -> list[float]:
        """One figure of every round: `iops`, `mb_per_s`, `cpu_us`, or `p50`, `p99` latency."""
        if name == "cpu_us":
            return [one["cpu"]["us_per_request"] for one in self.measured]
        if name in {"p50", "p99"}:
            return [one["latency_us"][name] for one in self.measured]
        return [one[name] for one in self.measured]

    def median(self, name: str) -> float:
        """The median of a figure."""
        return statistics.median(self.figures(name))

    def ratio(self, base: Row, name: str) -> float:
        """The median of the ratios to another row's, round by round."""
        pairs = zip(self.figures(name), base.figures(name), strict=True)
        return statistics.median(a / b if b else float("nan") for a, b in pairs)


@cache
def polls() -> bool:
    """Whether `guestio blk` can poll."""
    command = [sys.executable, "-m", "guestio", "blk", "--help"]
    return "--poll-us" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def serving(case: Case, image: Path, socket: Path, cpu: int, queues: int = 1) -> Iterator[int]:
    """Run a back-end on a CPU; its process id."""
    if case.server == "guestio":
        command = [sys.executable, "-m", "guestio", "blk", str(image), "--socket", str(socket)]
        if case.poll_us is not None:
            command += ["--poll-us", str(case.poll_us)]
        if case.io_threads is not None:
            command += ["--io-threads", str(case.io_threads)]
        if queues > 1:
            command += ["--num-queues", str(queues)]
    else:
        program = shutil.which("qemu-storage-daemon")
        if program is None:
            raise SystemExit("qemu-storage-daemon is missing: apt-get install qemu-utils")
        aio = "" if case.aio is None else f",aio={case.aio}"
        export = (
            f"type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={socket},"
            f"writable=on,num-queues={queues}"
        )
        command = [
            program,
            *("--blockdev", f"driver=file,node-name=file,filename={image}{aio}"),
            *("--blockdev", "driver=raw,node-name=disk,file=file"),
            *("--export", export),
        ]
    process = subprocess.Popen(["taskset", "-c", str(cpu), *command], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_LIMIT
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{case} did not start")
            time.sleep(0.02)
        yield process.pid
    finally:
        process.terminate()
        process.wait(10)
        socket.unlink(missing_ok=True)


def measure(case: Case, work: Workload, directory: Path, seconds: float) -> dict[str, Any]:
    """One back-end, fresh, under one workload."""
    socket = directory / "bench.sock"
    cpu = LOAD_CPU if work.one_cpu else BACKEND_CPU
    with serving(case, directory / "disk.img", socket, cpu) as pid:
        done = subprocess.run(
            [
                *("taskset", "-c", str(LOAD_CPU), sys.executable, "-m", "guestio", "bench"),
                *(str(socket), "--json", "--pid", str(pid), "--iommu", case.iommu),
                *("--acknowledge", case.acknowledge),
                *("--time", str(seconds), "--warm-up", str(seconds / 5), *work.options),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{work.name}, {case}, IOMMU {case.iommu}: {done.stderr.strip()}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def run(
    workloads: Sequence[Workload],
    rounds: int,
    seconds: float,
    place: Path,
    tell: Callable[[str], contextlib.AbstractContextManager[object]],
) -> list[Row]:
    """Measure everything, the back-ends in turn."""
    found: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="guestio-bench-", dir=place) as name:
        directory = Path(name)
        with (directory / "disk.img").open("wb") as file:
            for _ in range(IMAGE_BYTES >> 20):
                file.write(os.urandom(1 << 20))
        for work in workloads:
            cases = [case for case in work.cases if case.poll_us is None or polls()]
            rows = [Row(work.name, case, []) for case in cases]
            for number in range(rounds):
                for row in rows:
                    case = row.case
                    with tell(f"{work.name}, round {number + 1}: {case}, IOMMU {case.iommu}"):
                        row.measured.append(measure(case, work, directory, seconds))
            found += rows
    return found


def show(rows: Sequence[Row], console: Console) -> None:
    """Print medians and ratios."""
    table = Table(
        *("workload", "back-end", "IOMMU", "IOPS", "x", "MB/s", "p50 us", "x", "p99 us"),
        *("CPU us/req", "x"),
    )
    bases = {row.workload: row for row in reversed(rows)}
    for row in rows:
        base = bases[row.workload]
        table.add_row(
            row.workload if row is base else "",
            str(row.case),
            row.case.iommu,
            f"{row.median('iops'):,.0f}",
            f"{row.ratio(base, 'iops'):.2f}",
            f"{row.median('mb_per_s'):,.0f}",
            f"{row.median('p50'):,.0f}",
            f"{row.ratio(base, 'p50'):.2f}",
            f"{row.median('p99'):,.0f}",
            f"{row.median('cpu_us'):.2f}",
            f"{row.ratio(base, 'cpu_us'):.2f}",
            end_section=row is [r for r in rows if r.workload == row.workload][-1],
        )
    console.print(table)


def _show_goals(rows: Sequence[Row], console: Console) -> None:
    known = {(row.workload, row.case): row for row in rows}
    table = Table("goal", "against", "figure", "wanted", "measured", "")
    for goal in GOALS:
        row, base = known.get((goal.workload, goal.case)), known.get((goal.workload, goal.base))
        if row is None or base is None:
            continue
        ratio = row.ratio(base, goal.figure)
        reached = ratio >= goal.limit if goal.at_least else ratio <= goal.limit
        table.add_row(
            f"{goal.workload}: {goal.case}, IOMMU {goal.case.iommu}",
            f"{goal.base}, IOMMU {goal.base.iommu}",
            {"iops": "IOPS", "cpu_us": "CPU/request"}[goal.figure],
            f"{'>=' if goal.at_least else '<='} {goal.limit:.2f}",
            f"{ratio:.2f}",
            "[green]reached[/]" if reached else "[bold red]not reached[/]",
        )
    console.print(table)


def warn_if_busy(console: Console) -> None:
    """Say so if others disturb what is about to be measured."""
    if (load := os.getloadavg()[0]) > BUSY_LOAD:
        console.print(
            f"[bold]The machine is busy (load average {load:.1f}):[/] IOPS and p99 are those of "
            "the machine; CPU time per request and p50 are the ones to look at."
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench/block.py", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds (5)")
    parser.add_argument("--time", type=float, default=5.0, help="seconds per measurement (5)")
    parser.add_argument("--quick", action="store_true", help="one round of one second each")
    parser.add_argument("--only", default="", help="only workloads whose name has this in it")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("/dev/shm"),
        help="where to put the image, 256 MiB (/dev/shm)",
    )
    parser.add_argument("--json", action="store_true", help="print every measurement as JSON")
    given = parser.parse_args(arguments)
    rounds, seconds = (1, 1.0) if given.quick else (given.rounds, given.time)
    workloads = [work for work in WORKLOADS if given.only in work.name]
    if not workloads or rounds < 1 or seconds <= 0:
        parser.error("nothing to measure")
    if not given.directory.is_dir():
        parser.error(f"{given.directory} is no directory; choose another with --directory")
    if not {LOAD_CPU, BACKEND_CPU} <= os.sched_getaffinity(0):
        parser.error(f"CPUs {LOAD_CPU} and {BACKEND_CPU} are needed")
    console = Console(stderr=given.json)
    warn_if_busy(console)
    rows = run(workloads, rounds, seconds, given.directory, console.status)
    if given.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        show(rows, console)
        _show_goals(rows, console)


if __name__ == "__main__":
    main()
