"""The fuzzer finds devices that are wrong in one thing: a part of those of `./run fuzz-faults`.

Each fault is of an otherwise honest disk: made by a rule in guestio's own, or in the plain back-end
of the tests, which shares no code with it. Cases are played from seed 0 on until one finds it.

    ./run fuzz-faults                  all, with the seed that found each
    ./run fuzz-faults --cases 500 corrupt drop
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestio.faults import Misbehaving, parse
from guestio.faults.fuzz import Bench, Outcome, Work, make_case
from guestio.testing import serving
from guestio.virtio import BlockDevice
from tests.faults.test_finds import DEFECTS
from tests.faults.test_seeded_device_faults import SEEDED, SILENT
from tests.kit.broken_backend import BrokenBackend

PATIENCE = 20.0
"""Seconds for an honest answer, on a machine with much to do."""
SILENT_PATIENCE = 1.0

FOUND_SOON = [
    # Rule, and a seed of a case that finds it.
    ("corrupt op=read", 0),
    ("stale op=write", 0),
    ("wrong-head after=1", 0),
    ("duplicate-completion after=1", 0),
    ("used-length=0 op=read", 0),
    ("feature-lie=32", 0),
    ("error op=write", 0),
    ("needs-reset op=write", 0),
]


@contextlib.contextmanager
def ruled(rule: str, directory: Path, patience: float) -> Iterator[Bench]:
    """A bench with guestio's own disk, which obeys a rule once it has proved to be honest."""
    image = directory / "disk.img"
    image.write_bytes(bytes(range(1, 256)) * 8224 + bytes(2 << 20))
    with image.open("r+b") as file:
        file.truncate(2 << 20)
    device = Misbehaving(BlockDevice(str(image), num_queues=2))
    with contextlib.closing(device), serving(device, stop_timeout=0.2) as path:
        bench = Bench(Work("blk", str(path), None, patience))
        device.faults.on(rule)
        yield bench


@contextlib.contextmanager
def broken(faults: str, directory: Path, patience: float) -> Iterator[Bench]:
    """A bench with the plain back-end, whose faults come once it has proved to be honest."""
    with BrokenBackend(str(directory / "toy.sock")) as backend:
        bench = Bench(Work("blk", backend.path, None, patience))
        backend.faults |= set(faults.split())
        yield bench


def first_found(bench: Bench, seeds: range) -> Outcome | None:
    """The outcome of the first case that finds something."""
    return next(
        (found for seed in seeds if (found := bench.play(make_case("blk", seed))).bad), None
    )


def patience_of(rule: str) -> float:
    return SILENT_PATIENCE if parse(rule).what.name in SILENT else PATIENCE


@pytest.mark.parametrize(("rule", "seed"), FOUND_SOON)
def test_a_seeded_fault_is_found(rule: str, seed: int, tmp_path: Path) -> None:
    with ruled(rule, tmp_path, patience_of(rule)) as bench:
        assert first_found(bench, range(seed, seed + 5))


def main() -> int:
    """Look for every fault, and print a table in Markdown."""
    parser = argparse.ArgumentParser(
        prog="./run fuzz-faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=int, default=400, help="of each fault at most")
    parser.add_argument("--patience", type=float, default=1.0, help="seconds for an answer")
    parser.add_argument("words", nargs="*", help="only faults with one of these in them")
    options = parser.parse_args()
    plan = [(rule, ruled) for rule, _ in SEEDED]
    plan += [(faults, broken) for faults in dict.fromkeys(each for _, each in DEFECTS)]
    plan = [
        (name, make)
        for name, make in plan
        if not options.words or any(word in name for word in options.words)
    ]
    missed = 0
    print("| fault | verdict | seed | seconds | reason |\n|---|---|---|---|---|")
    for name, make in plan:
        started, found = time.monotonic(), None
        with tempfile.TemporaryDirectory() as directory:
            try:
                with make(name, Path(directory), options.patience) as bench:
                    found = first_found(bench, range(options.cases))
            except AssertionError as error:
                # The back-end of the tests does not end: its thread has died of the fault.
                print(f"{name}: {error}", file=sys.stderr)
        missed += found is None
        seconds = f"{time.monotonic() - started:.1f}"
        cells = (
            ("-", "", seconds, "")
            if found is None
            else (str(found.verdict), str(found.seed), seconds, found.reason.replace("|", "/")[:90])
        )
        print(f"| `{name}` | {' | '.join(cells)} |", flush=True)
    print(f"\n{len(plan) - missed} of {len(plan)} found", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
