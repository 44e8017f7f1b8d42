"""A recording of many generated requests, and how long its report takes, with how much memory.

The rows go through the same code as those of a running server: records of tracepoints are made, and
put together to requests. `--files N` makes as many recordings, for reports over many machines.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from guestio.observe.assemble import Assembler
from guestio.observe.finish import RecordingFile
from guestio.observe.schema import VERSION
from guestio.trace import RECORD, Records, What

AT_ONCE = 100_000


def records_of(count: int, first: int, random: np.random.Generator, clock: int) -> Records:
    """What tracepoints write for requests of a queue of depth 32: a batch of 32 at a time."""
    number = first + np.arange(count)
    batch = number // 32
    begin = clock + (batch - batch[0]) * 80_000
    parts = []
    size = 512 << random.integers(3, 8, count)
    reads = random.random(count) < 0.7
    offset = np.where(
        random.random(count) < 0.5, number * 4096, random.integers(0, 1 << 24, count) * 512
    )
    at = number % 32
    taken = begin + 500 + at * 1500
    done = begin + 60_000 + random.exponential(3000, count).astype(np.int64)
    # Requests of a batch are published together.
    done = np.maximum.reduceat(done, np.flatnonzero(np.r_[True, batch[1:] != batch[:-1]]))[
        batch - batch[0]
    ]
    for what, time_ in ((What.TAKEN, taken), (What.SERVED, taken + 900), (What.COMPLETED, done)):
        made = np.zeros(count, RECORD)
        made["what"], made["time"], made["since"] = what, time_, begin
        made["origin"], made["queue"], made["head"], made["thread"] = 1, batch % 4, at, 4711
        made["length"] = np.where(reads, 16, size + 16)
        made["detail"] = np.where(reads, size + 1, 1)
        made["address"] = 0x1_0000_0000 + random.integers(0, 1 << 16, count) * 4096
        if what == What.TAKEN:
            made["result"] = number % 65536
        else:
            made["access"] = np.where(reads, 1, 2)
        if what == What.COMPLETED:
            made["length"], made["detail"] = np.where(reads, size + 1, 1), offset
        parts.append(made)
    first_of = np.flatnonzero(at == 0)
    made = np.zeros(len(first_of), RECORD)
    made["what"], made["time"], made["origin"] = What.INTERRUPT, done[first_of] + 700, 1
    made["queue"], made["head"] = batch[first_of] % 4, 0xFFFFFFFF
    parts.append(made)
    found = np.concatenate(parts)
    return found[np.argsort(found["time"], kind="stable")]


def generate(path: Path, count: int, seed: int) -> None:
    """Write a recording of so many requests."""
    random = np.random.default_rng(seed)
    out, assembler, clock = RecordingFile(path), Assembler(), 1_000_000_000
    for first in range(0, count, AT_ONCE):
        records = records_of(min(AT_ONCE, count - first), first, random, clock)
        clock = int(records["time"][-1]) + 1000
        out.add(assembler.add(records))
    out.add(assembler.add(np.zeros(0, RECORD), last=True))
    out.close(
        {
            "version": VERSION, "guestio": "generated", "payload": "none", "lost": 0, "ended": None,
            "began": {"monotonic_ns": 1_000_000_000, "realtime_ns": 0}, "peers": [],
            "device": {"kind": "BlockDevice", "transport": "vhost-user", "path": "", "origin": 1,
                       "device_id": 2, "config": ""},
            "rows": {}, "counts": {}, "incomplete": assembler.incomplete,
        }
    )  # fmt: skip


def main() -> int:
    """Generate, report, and print what that took."""
    parser = argparse.ArgumentParser(prog="bench report", description=__doc__)
    parser.add_argument("--requests", type=float, default=1e7, help="in all (default: 1e7)")
    parser.add_argument("--files", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a directory for the recordings")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="guestio-") as temporary:
        directory = arguments.keep or Path(temporary)
        directory.mkdir(exist_ok=True)
        started = time.monotonic()
        for number in range(arguments.files):
            path = directory / f"generated-{number}.parquet"
            if not path.exists():
                generate(path, int(arguments.requests) // arguments.files, number)
        took = time.monotonic() - started
        bytes_ = sum(path.stat().st_size for path in directory.glob("*.parquet"))
        print(f"{arguments.requests:,.0f} requests in {bytes_ / 1e6:,.0f} MB, made in {took:.1f} s")
        started = time.monotonic()
        command = [sys.executable, "-m", "guestio", "report", os.fspath(directory), "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        took = time.monotonic() - started
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"guestio report: {took:.1f} s, {used.ru_utime + used.ru_stime:.1f} s of CPU, "
            f"{used.ru_maxrss / 1024:,.0f} MiB at most"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
