"""What `--sandbox` costs a disk: CPU time per request with it and without, in turns.

Two servers of the same image, one with `--sandbox auto` and one with `--sandbox off`, are measured
by `guestio bench`, turn by turn, so that whatever else the machine does meets both. What is shown
are medians of CPU time per request, and the median of the ratios of neighbors; with its spread,
because on a busy machine that is wider than what is looked for. How long a server takes until it
listens is shown as well.

First comes what is steady on any machine: the shortest time of a read of 4 KiB from the page cache,
in threads of one process with filters and without, in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

from rich.console import Console
from rich.table import Table

from guestio.sandbox.seccomp import Filters

IMAGE_BYTES = 64 << 20
MODES = ("auto", "off")
READ_BYTES, READS, BATCHES = 4096, 1000, 400
WORKLOADS = {
    "4K randread depth 32": ("--workload", "randread", "--depth", "32"),
    "4K randread depth 1": ("--workload", "randread", "--depth", "1"),
    "4K randread depth 1, IOMMU strict": (
        *("--workload", "randread", "--depth", "1"),
        *("--iommu", "strict", "--acknowledge", "each"),
    ),
}


@contextlib.contextmanager
def serving(image: Path, socket: Path, mode: str) -> Iterator[tuple[int, float]]:
    """A server's process id, and the seconds until it listened."""
    words = ("blk", str(image), "--socket", str(socket), "--sandbox", mode)
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "guestio", *words], stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()
        yield process.pid, time.monotonic() - began
        process.terminate()


def measure(socket: Path, pid: int, workload: str, seconds: float) -> float:
    """CPU microseconds per request."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "guestio", "bench", str(socket), "--json"),
            *("--pid", str(pid), "--time", str(seconds), "--warm-up", "0.2"),
            *WORKLOADS[workload],
        ],
        check=True,
        stdout=subprocess.PIPE,
    )
    found: float = json.loads(done.stdout)["cpu"]["us_per_request"]
    return found


class Reader(threading.Thread):
    """Reads from the page cache, with the filters of a device's thread or without."""

    def __init__(self, fd: int, *, filtered: bool) -> None:
        super().__init__(daemon=True)
        self._fd, self._filtered = fd, filtered
        self._turns: SimpleQueue[None] = SimpleQueue()
        self._took: SimpleQueue[float] = SimpleQueue()
        self.start()

    def run(self) -> None:
        """Measure a batch whenever it is this thread's turn."""
        if self._filtered:
            filters = Filters()
            filters.limit_process(connects=False, writes=False, removes=True, everywhere=False)
            filters.limit_thread()
        # Through ctypes, with as little of Python as can be, and without giving its lock away.
        read, buffer = ctypes.PyDLL(None).pread, ctypes.create_string_buffer(READ_BYTES)
        while True:
            self._turns.get()
            began = time.thread_time_ns()
            for _ in range(READS):
                read(self._fd, buffer, READ_BYTES, 0)
            self._took.put((time.thread_time_ns() - began) / READS)

    def turn(self) -> float:
        """CPU nanoseconds of a read, over one batch."""
        self._turns.put(None)
        return self._took.get()


def call_times() -> tuple[float, float]:
    """CPU nanoseconds of a read, at best: with the filters and without."""
    fd = os.memfd_create("bench")
    os.ftruncate(fd, READ_BYTES)
    readers = Reader(fd, filtered=True), Reader(fd, filtered=False)
    with_filters, without = zip(
        *([each.turn() for each in readers] for _ in range(BATCHES)), strict=True
    )
    return min(with_filters), min(without)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="bench/sandbox.py", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    wanted = parser.parse_args()
    table = Table("workload", "auto", "off", "ratio", "quartiles of the ratio")
    starts: dict[str, list[float]] = {mode: [] for mode in MODES}
    filtered, plain = call_times()
    table.add_row("a read of 4 KiB, at best", f"{filtered:.0f} ns", f"{plain:.0f} ns", "", "")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made, contextlib.ExitStack() as stack:
        directory = Path(made)
        image = directory / "disk.img"
        image.write_bytes(bytes(IMAGE_BYTES))
        pids = {}
        for mode in MODES:
            pids[mode], _ = stack.enter_context(serving(image, directory / mode, mode))
        for workload in WORKLOADS:
            figures: dict[str, list[float]] = {mode: [] for mode in MODES}
            for number in range(wanted.rounds):
                # Who is first changes, because the second finds warmer caches.
                for mode in MODES if number % 2 else reversed(MODES):
                    found = measure(directory / mode, pids[mode], workload, wanted.seconds)
                    figures[mode].append(found)
            ratios = [a / b for a, b in zip(figures["auto"], figures["off"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            table.add_row(
                workload,
                *(f"{statistics.median(figures[mode]):.3f} us" for mode in MODES),
                f"{middle:.4f}",
                f"{low:.4f} to {high:.4f}",
            )
        for number in range(wanted.rounds):
            for mode in MODES if number % 2 else reversed(MODES):
                with serving(image, directory / "start", mode) as (_, seconds):
                    starts[mode].append(seconds * 1e3)
    table.add_row(
        "until it listens", *(f"{statistics.median(starts[mode]):.0f} ms" for mode in MODES), "", ""
    )
    Console().print(table)


if __name__ == "__main__":
    main()
