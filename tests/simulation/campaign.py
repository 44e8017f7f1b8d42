"""Campaigns of simulations.

./run simulate --seeds 2000       runs of a disk, some lazy, each with a seed of its own
./run simulate --seconds 60       as many as there is time for
./run simulate --defects          puts ten defects back, one at a time: each must be found
./run simulate --seed 17          one run again, its steps made fewer if it fails
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from typing import Final

from guestio.testing.simulation import DeviceFactory, InvariantError, Outcome, simulate
from tests.simulation.defects import DEFECTS, find
from tests.simulation.devices import DeadDisk, FailingDisk, LazyDisk, disk

_DEVICES: Final[dict[str, DeviceFactory]] = {
    "disk": disk,
    "lazy": LazyDisk,
    "failing": FailingDisk,
    "dead": DeadDisk,
}
_SHARES: Final = ("disk", "disk", "lazy", "lazy", "failing", "dead")
"""Devices of runs, in turn: of each which `simulate` chooses IOMMU and notes by the seed."""

_PROGRESS: Final = 5.0


def _device_of(seed: int) -> str:
    return _SHARES[seed // 4 % len(_SHARES)]


def _run(seed: int, steps: int) -> tuple[int, float, Outcome | str]:
    """The seed, the seconds of a processor that it took, and what came of it."""
    began = time.process_time()
    outcome: Outcome | str
    try:
        outcome = simulate(_DEVICES[_device_of(seed)], seed=seed, steps=steps, shrink=False)
    except InvariantError as error:
        outcome = str(error)
    return seed, time.process_time() - began, outcome


def _again(seed: int, steps: int) -> int:
    name = _device_of(seed)
    try:
        print(f"{name}:", simulate(_DEVICES[name], seed=seed, steps=steps))
    except InvariantError as error:
        print(f"{name}: {error}")
        return 1
    return 0


def _campaign(seeds: Iterator[int], steps: int, jobs: int, seconds: float) -> int:
    began = told = time.monotonic()
    worked = 0.0
    runs = crashes = taken = completed = failed = 0

    def report() -> None:
        spent = time.monotonic() - began
        print(
            f"{runs} runs, {failed} failed; {taken} steps, {completed} requests; {crashes} crashes "
            f"in {spent:.1f} s: {crashes / spent * 60:.0f} a minute, "
            f"{crashes / max(worked, 1e-9) * 60:.0f} a minute of a processor",
            flush=True,
        )

    # Processes of their own, because modules are given another clock meanwhile.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = {pool.submit(_run, seed, steps) for seed in itertools.islice(seeds, 2 * jobs)}
        while waiting:
            done, waiting = concurrent.futures.wait(
                waiting, return_when=concurrent.futures.FIRST_COMPLETED
            )
            now = time.monotonic()
            for future in done:
                seed, took, outcome = future.result()
                worked += took
                runs += 1
                if isinstance(outcome, str):
                    failed += 1
                    first = outcome.splitlines()[0]
                    print(f"{first}\nagain: ./run simulate --seed {seed}", flush=True)
                else:
                    crashes += outcome.crashes
                    taken += outcome.steps
                    completed += outcome.completed
                if now - began < seconds:
                    waiting |= {
                        pool.submit(_run, each, steps) for each in itertools.islice(seeds, 1)
                    }
            if now - told > _PROGRESS:
                told = now
                report()
    report()
    return bool(failed)


def _defects(seconds: float) -> int:
    missed = 0
    for defect in DEFECTS:
        found = find(defect, seconds)
        if found is None:
            missed += 1
            print(f"{defect.name}: not found within {seconds:g} s", flush=True)
            continue
        text = str(found.error).splitlines()[0]
        print(
            f"{defect.name}: found with seed {found.seed} after {found.seconds:.1f} s of processor "
            f"time: {text}",
            flush=True,
        )
        missed += found.error.invariant not in defect.invariants
    print(f"{len(DEFECTS) - missed} of {len(DEFECTS)} found")
    return bool(missed)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="./run simulate", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, help="how many runs, from --first on")
    parser.add_argument("--first", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--seconds", type=float, help="for how long, or how long for each defect")
    parser.add_argument("--steps", type=int, default=500, help="steps of a run (500)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seed", type=int, help="one run again")
    parser.add_argument("--defects", action="store_true", help="put defects back and find them")
    options = parser.parse_args()
    if options.defects:
        return _defects(options.seconds or 60.0)
    if options.seed is not None:
        return _again(options.seed, options.steps)
    if options.seeds is None and options.seconds is None:
        options.seeds = 200
    seeds: Iterator[int] = itertools.count(options.first)
    if options.seeds is not None:
        seeds = iter(range(options.first, options.first + options.seeds))
    seconds = float("inf") if options.seconds is None else options.seconds
    return _campaign(seeds, options.steps, options.jobs, seconds)
