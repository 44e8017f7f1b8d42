"""A proxy in front of a disk: what a request takes longer, and what it costs the proxy.

`guestio bench` drives the same disk of `guestio blk` directly, through `guestio proxy
--notifications watch`, and through ones with `between` and `relay`, in turn, each with fresh
processes; load on one CPU and disk on another, the proxy wherever there is room, or on
`--proxy-cpu`. What is shown are medians over the rounds: latencies as the driver sees them, what a
request takes longer than directly in the same round, and the proxy's CPU time per request.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.block import BACKEND_CPU, IMAGE_BYTES, LOAD_CPU, START_LIMIT, warn_if_busy


@dataclass
class Case:
    """A way to the disk.

    Attributes:
        name: For the table.
        notifications: Of the proxy; None for no proxy.
        measured: What `guestio bench` said, one for each round.
        cpu_us: CPU time of the proxy per request, likewise.
    """

    name: str
    notifications: str | None
    measured: list[dict[str, Any]] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)

    def latency(self, which: str) -> list[float]:
        """A figure of the latencies of each round, microseconds."""
        return [one["latency_us"][which] for one in self.measured]

    def longer(self, base: Case, which: str) -> float:
        """The median of what it takes longer than another way, round by round."""
        pairs = zip(self.latency(which), base.latency(which), strict=True)
        return statistics.median(a - b for a, b in pairs)


CASES = (
    ("directly", None),
    ("proxy, watch", "watch"),
    ("proxy, between", "between"),
    ("proxy, relay", "relay"),
)
GOAL_US = 10.0
"""What a request may take longer through a proxy that only watches, at depth 1."""


@contextlib.contextmanager
def running(cpus: set[int], *words: str, socket: Path) -> Iterator[int]:
    """A command that makes a socket, on some CPUs; its process id."""
    listed = ",".join(map(str, sorted(cpus)))
    process = subprocess.Popen(
        ["taskset", "-c", listed, sys.executable, "-m", "guestio", *words],
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + START_LIMIT
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{words[0]} did not start")
            time.sleep(0.02)
        yield process.pid
    finally:
        process.terminate()
        process.wait(10)


def measure(case: Case, directory: Path, seconds: float, depth: int, cpus: set[int]) -> None:
    """One way, with fresh processes."""
    disk, front = directory / "disk.sock", directory / "proxy.sock"
    with contextlib.ExitStack() as stack:
        words = ["blk", str(directory / "disk.img"), "--socket", str(disk)]
        stack.enter_context(running({BACKEND_CPU}, *words, socket=disk))
        proxy = None
        if case.notifications is not None:
            words = ["proxy", "--listen", str(front), "--connect", str(disk), "--device", "blk"]
            words += ["--notifications", case.notifications]
            proxy = stack.enter_context(running(cpus, *words, socket=front))
        drive = [
            *("-m", "guestio", "bench", str(disk if proxy is None else front), "--json"),
            *("--workload", "randread", "--block-size", "4k", "--depth", str(depth)),
            *("--time", str(seconds), "--warm-up", str(seconds / 5)),
        ]
        if proxy is not None:
            drive += ["--pid", str(proxy)]
        done = subprocess.run(
            ["taskset", "-c", str(LOAD_CPU), sys.executable, *drive],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{case.name}: {done.stderr.strip()}")
    result = json.loads(done.stdout)
    case.measured.append(result)
    case.cpu_us.append(0.0 if proxy is None else result["cpu"]["us_per_request"])


def show(cases: Sequence[Case], depth: int, console: Console) -> None:
    """Print medians, and whether the goal is reached."""
    table = Table(
        f"4K randread, depth {depth}", "IOPS", "p50 us", "longer", "mean us", "longer", "proxy CPU"
    )
    base = cases[0]
    for case in cases:
        table.add_row(
            case.name,
            f"{statistics.median(one['iops'] for one in case.measured):,.0f}",
            f"{statistics.median(case.latency('p50')):.1f}",
            f"{case.longer(base, 'p50'):+.1f}",
            f"{statistics.median(case.latency('mean')):.1f}",
            f"{case.longer(base, 'mean'):+.1f}",
            f"{statistics.median(case.cpu_us):.1f}",
        )
    console.print(table)
    if depth == 1:
        longer = cases[1].longer(base, "p50")
        verdict = "[green]reached[/]" if longer <= GOAL_US else "[bold red]not reached[/]"
        console.print(f"watch: <= {GOAL_US:g} us wanted, {longer:+.1f} us measured: {verdict}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench/proxy.py", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds (5)")
    parser.add_argument("--time", type=float, default=3.0, help="seconds per measurement (3)")
    parser.add_argument("--depth", type=int, default=1, help="requests in the queue (1)")
    parser.add_argument("--proxy-cpu", type=int, help="the proxy's CPU (any)")
    parser.add_argument("--json", action="store_true", help="print every measurement as JSON")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("/dev/shm"),
        help="where to put the image, 256 MiB (/dev/shm)",
    )
    given = parser.parse_args(arguments)
    if given.rounds < 1 or given.time <= 0 or given.depth < 1:
        parser.error("nothing to measure")
    allowed = os.sched_getaffinity(0)
    if not {LOAD_CPU, BACKEND_CPU} <= allowed:
        parser.error(f"CPUs {LOAD_CPU} and {BACKEND_CPU} are needed")
    console = Console(stderr=given.json)
    warn_if_busy(console)
    cpus = allowed if given.proxy_cpu is None else {given.proxy_cpu}
    cases = [Case(*names) for names in CASES]
    with tempfile.TemporaryDirectory(prefix="guestio-bench-", dir=given.directory) as name:
        directory = Path(name)
        with (directory / "disk.img").open("wb") as file:
            for _ in range(IMAGE_BYTES >> 20):
                file.write(os.urandom(1 << 20))
        for number in range(given.rounds):
            for case in cases:
                with console.status(f"round {number + 1}: {case.name}"):
                    measure(case, directory, given.time, given.depth, cpus)
    if given.json:
        print(json.dumps({case.name: case.measured for case in cases}, indent=1))
    show(cases, given.depth, console)


if __name__ == "__main__":
    main()
