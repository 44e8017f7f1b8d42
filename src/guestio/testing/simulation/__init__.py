"""Deterministic simulation of a device, its back-end, and everything around it that may go wrong.

:func:`simulate` has a driver, an IOMMU, a front-end, a back-end and its device, and a disk act in
one process, under a simulated clock, in an order that a seed decides; either side may die.
After each step the invariants of the architecture are checked. Everything between the socket and
the image is the real thing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from guestio.addr import check_int
from guestio.testing.simulation.disk import SECTOR, Disk
from guestio.testing.simulation.workload import (
    AnyWorkload,
    BlockWorkload,
    InvariantError,
    Job,
    Workload,
)
from guestio.testing.simulation.world import SECTORS, DeviceFactory, World

if TYPE_CHECKING:
    from guestio.virtio import Device

__all__ = [
    "SECTOR",
    "SECTORS",
    "AnyWorkload",
    "BlockWorkload",
    "DeviceFactory",
    "Disk",
    "InvariantError",
    "Job",
    "Outcome",
    "Workload",
    "World",
    "simulate",
]

SHRINK_SECONDS: Final = 5.0
"""Seconds that a failing run is made shorter."""


@dataclass(frozen=True)
class Outcome:
    """What a run that broke no invariant has done.

    Attributes:
        seed: As given.
        steps: Steps that were taken.
        digest: Of all of them, with their effects: equal for an equal version of guestio, device,
            seed and arguments.
        crashes: How often the back-end, the guest, or the host died.
        completed: Requests that the guests got back.
        simulated: Seconds of simulated time.
    """

    seed: int
    steps: int
    digest: str
    crashes: int
    completed: int
    simulated: float


@dataclass(frozen=True)
class _Options:
    factory: DeviceFactory
    seed: int
    iommu: bool
    crashes: bool
    tracked: bool
    workload: Callable[[Device], Workload] | None


def simulate(
    factory: DeviceFactory,
    *,
    seed: int = 0,
    steps: int = 500,
    iommu: bool | None = None,
    crashes: bool = True,
    tracked: bool | None = None,
    workload: Callable[[Device], Workload] | None = None,
    shrink: bool = True,
) -> Outcome:
    """Simulate a device among everything that may go wrong.

    Args:
        factory: Makes the device, at the beginning and after each crash. It is given the
            :class:`World`, whose ``disk.path`` is the image of a disk that outlives crashes, and
            whose ``defer`` has a request answered later.
        seed: Decides everything: who acts next, what is asked, what dies when.
        steps: How many steps to take, before all that is in flight has to come to its end.
        iommu: Whether an IOMMU is in front of the device; None to have the seed decide.
        crashes: Whether the back-end may be killed, the guest die, and the host lose power.
        tracked: Whether the front-end keeps notes of requests in flight (INFLIGHT_SHMFD); None to
            have the seed decide.
        workload: Given the device, makes what the driver does; None for what suits it: reads,
            writes, flushes and trims of a disk whose contents are checked, random bytes for any
            other device.
        shrink: Whether to look, for some seconds, for fewer steps that fail as well.

    Returns:
        What was done.

    Raises:
        InvariantError: An invariant does not hold; an `AssertionError`. The message says which
            one, the seed, and the steps that lead to it.
        RuntimeError: Another simulation is running in this process.
        BaseException: What the factory, the device's constructor or the workload raised.

    Threads: one at a time in a process, as guestio's modules are given another clock meanwhile; no
    device may be served by other threads. Cost: about 50 microseconds a step.
    """
    seed, steps = check_int(seed, "seed"), check_int(steps, "steps")
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed {seed} is not in 0..2**32-1")
    options = _Options(
        factory,
        seed,
        bool(seed & 1) if iommu is None else iommu,
        crashes,
        bool(seed & 2) if tracked is None else tracked,
        workload,
    )
    trace: list[tuple[int, str]] = []
    try:
        return _run(options, [(number, None) for number in range(steps)], trace)
    except InvariantError as error:
        failure = error
    shorter, last = trace, failure
    if shrink:
        shorter, last = _shrink(options, trace, failure)
    raise _told(options, steps, shorter, last) from failure


def _run(
    options: _Options, plan: list[tuple[int, str | None]], trace: list[tuple[int, str]]
) -> Outcome:
    enabled = gc.isenabled()
    gc.disable()
    try:
        world = World(
            options.factory,
            options.seed,
            iommu=options.iommu,
            crashes=options.crashes,
            tracked=options.tracked,
            workload=options.workload,
        )
        world.trace = trace
        began = world.clock.now
        with world:
            for number, name in plan:
                world.step(number, name)
            world.finish()
            return Outcome(
                options.seed,
                world.steps,
                world.digest,
                world.crashed,
                world.completed,
                world.clock.now - began,
            )
    finally:
        if enabled:
            gc.enable()


def _shrink(
    options: _Options, trace: list[tuple[int, str]], failure: InvariantError
) -> tuple[list[tuple[int, str]], InvariantError]:
    """Leave out steps, as long as the same invariant is broken."""
    until = time.monotonic() + SHRINK_SECONDS
    best, last = list(trace), failure
    size = max(len(best) // 2, 1)
    while size and time.monotonic() < until:
        at, progress = 0, False
        while at < len(best) and time.monotonic() < until:
            candidate: list[tuple[int, str | None]] = [*best[:at], *best[at + size :]]
            taken: list[tuple[int, str]] = []
            try:
                _run(options, candidate, taken)
            except InvariantError as error:
                if error.invariant == failure.invariant:
                    best, last, progress = taken, error, True
                    continue
            at += size
        if not progress:
            size //= 2
    return best, last


def _told(
    options: _Options, steps: int, trace: list[tuple[int, str]], failure: InvariantError
) -> InvariantError:
    names: list[str] = []
    for _, name in trace:
        if names and names[-1].split(" x")[0] == name:
            count = int(names[-1].split(" x")[1]) if " x" in names[-1] else 1
            names[-1] = f"{name} x{count + 1}"
        else:
            names.append(name)
    text = str(failure).partition(": ")[2]
    return InvariantError(
        failure.invariant,
        f"{text}\nwith seed={options.seed}, steps={steps}, iommu={options.iommu}, "
        f"tracked={options.tracked}; {len(trace)} steps that lead to it: {', '.join(names)}",
    )
