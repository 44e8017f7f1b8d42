"""Simulations of guestio's own disk and of others' devices, and what they must find."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from guestio.testing.simulation import (
    SECTOR,
    AnyWorkload,
    BlockWorkload,
    Disk,
    InvariantError,
    Job,
    World,
    simulate,
)
from guestio.testing.simulation.disk import chooser
from guestio.vhost_user.connection import Connection
from guestio.virtio import Device, DeviceId
from guestio.virtio.blk import T_FLUSH, T_OUT
from tests.simulation.defects import DEFECTS, Defect, find, replaced
from tests.simulation.devices import DeadDisk, FailingDisk, LazyDisk, disk

if TYPE_CHECKING:
    import random

    from guestio._core.virtio.chain import Chain
    from guestio.testing.simulation import DeviceFactory


@pytest.mark.parametrize("seed", range(8))
def test_a_disk_survives_whatever_dies_around_it(seed: int) -> None:
    outcome = simulate(disk if seed < 4 else LazyDisk, seed=seed, steps=300)
    assert outcome.steps == 300
    assert outcome.simulated > 0


@pytest.mark.parametrize("device", [FailingDisk, DeadDisk])
def test_a_disk_that_does_not_work_harms_nothing_else(device: DeviceFactory) -> None:
    outcome = simulate(device, seed=1, steps=300, crashes=False)
    assert outcome.completed > 10
    assert outcome.crashes == 0


def test_a_run_is_the_same_each_time_also_in_another_process() -> None:
    program = (
        "from guestio.testing import simulate\n"
        "from tests.simulation.devices import disk\n"
        "print(simulate(disk, seed=3, steps=200))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": hashing},
        ).stdout.strip()
        for hashing in ("1", "2")
    }
    assert told == {str(simulate(disk, seed=3, steps=200))}


def test_seeds_differ() -> None:
    assert len({simulate(disk, seed=seed, steps=60).digest for seed in range(4)}) == 4


class Adder(Device):
    """A device as a user writes one: it answers each request with the sum of its bytes."""

    device_id = DeviceId.ENTROPY

    def process(self, queue: int, chain: Chain) -> int:
        """See `Device`."""
        total = sum(chain.readable.read()) & 0xFF
        if not chain.writable.total:
            return 0
        chain.writable.write(bytes([total]))
        return 1


class Sums(AnyWorkload):
    """Knows what an adder must answer."""

    def done(self, job: Job, written: int, answer: bytes) -> None:
        """See `Workload`."""
        if written and answer[0] != sum(job.data) & 0xFF:
            raise InvariantError("L14", "a sum is wrong")


def adder(_world: World) -> Adder:
    return Adder()


def test_a_users_device_and_what_its_driver_expects() -> None:
    assert simulate(adder, seed=2, steps=200, crashes=False, workload=Sums).completed > 20


def test_a_wrong_answer_names_the_seed_and_the_fewest_steps() -> None:
    class Wrong(Adder):
        def process(self, queue: int, chain: Chain) -> int:
            written = super().process(queue, chain)
            if written and chain.readable.total > 40:
                chain.writable.write(b"\xff")
            return written

    with pytest.raises(InvariantError, match=r"L14: a sum is wrong\nwith seed=2, ") as caught:
        simulate(lambda _: Wrong(), seed=2, steps=200, iommu=False, crashes=False, workload=Sums)
    steps = str(caught.value).rpartition(": ")[2].split(", ")
    assert len(steps) < 40, "steps that have nothing to do with it are left out"


class Talker(Device):
    """Speaks first, on a timer."""

    device_id = DeviceId.CONSOLE
    device_queues = (0,)

    def attached(self, host: Any) -> None:
        """See `Device`."""
        self.host, self.queue = host, host.queue(0)
        self.speak()

    def speak(self) -> None:
        self.queue.send(b"x")
        self.host.call_later(0.001, self.speak)


def test_a_device_that_speaks_first() -> None:
    outcome = simulate(lambda _: Talker(), seed=5, steps=400, crashes=False)
    assert outcome.completed > 1


@pytest.mark.parametrize(
    "arguments", [{"seed": -1}, {"seed": 1 << 32}, {"seed": "1"}, {"steps": 1.5}]
)
def test_bad_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        simulate(disk, **arguments)


def test_a_factory_that_fails_leaves_nothing_behind() -> None:
    outcome = simulate(disk, seed=5, steps=40)
    made: list[int] = []

    def fails(world: World) -> Device:
        made.append(len(made))
        if len(made) == 3:
            raise OSError("no such device")
        return disk(world)

    with pytest.raises(OSError, match="no such device"):
        simulate(fails, seed=2, steps=300)
    with pytest.raises(ZeroDivisionError):
        simulate(lambda _: 1 / 0, seed=1)  # type: ignore[arg-type,return-value] # it raises
    assert simulate(disk, seed=5, steps=40) == outcome


def test_one_at_a_time() -> None:
    def nested(world: World) -> Device:
        with pytest.raises(RuntimeError, match="one at a time"):
            simulate(disk)
        return disk(world)

    simulate(nested, steps=10)


def test_nothing_is_left_behind() -> None:
    import guestio.virtio.queue as module

    simulate(LazyDisk, seed=1, steps=60)
    gc.collect()
    before = open_fds(), threading.active_count()
    for seed in (2, 3):
        simulate(LazyDisk, seed=seed, steps=60)
    gc.collect()
    assert (open_fds(), threading.active_count()) == before
    # What its modules call is their own again.
    assert (vars(module)["time"], vars(module)["threading"]) == (time, threading)


def open_fds() -> int:
    """How many descriptors this process has."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


class TestDefects:
    @pytest.mark.parametrize("defect", DEFECTS, ids=lambda each: each.name.partition(":")[0])
    def test_a_defect_of_before_is_found(self, defect: Defect) -> None:
        found = find(defect, 60)
        assert found is not None, "not within a minute of a processor"
        assert found.error.invariant in defect.invariants, found.error

    def test_a_request_that_is_lost_is_missed(self) -> None:
        class Loses(Adder):
            def process(self, queue: int, chain: Chain) -> Any:
                return Future() if chain.readable.total > 40 else super().process(queue, chain)

        with pytest.raises(InvariantError, match=r"L14: .* requests are never given back"):
            simulate(lambda _: Loses(), seed=2, steps=100, iommu=False, crashes=False, shrink=False)

    def test_a_write_to_memory_of_others_is_seen(self) -> None:
        """Memory that the driver did not give, written past the core: what no core may allow."""

        class Thief(Adder):
            world: World

            def process(self, queue: int, chain: Chain) -> int:
                self.world._guest.memory.bytes[-1] ^= 1
                return super().process(queue, chain)

        def thief(world: World) -> Thief:
            made = Thief()
            made.world = world
            return made

        with pytest.raises(InvariantError, match=r"L1: the device wrote 1 bytes .* taken back"):
            simulate(thief, seed=2, steps=100, iommu=False, crashes=False, shrink=False)

    def test_a_missed_interrupt_is_seen(self) -> None:
        def deaf(_self: Connection, _index: int, fd: int | None) -> None:
            if fd is not None:
                os.close(fd)

        with (
            replaced(Connection, "set_vring_call", deaf),
            pytest.raises(InvariantError, match=r"L14: ring 0: .* the driver was not interrupted"),
        ):
            for seed in range(20):
                simulate(LazyDisk, seed=seed, steps=60, crashes=False, shrink=False)


class TestDisk:
    def test_a_power_loss_keeps_what_was_flushed_and_any_of_the_rest(self) -> None:
        found = set()
        for seed in range(40):
            disk = Disk(3)
            with Path(disk.path).open("r+b", buffering=0) as image:
                image.write(b"a" * SECTOR)
                disk.flush()
                image.seek(0)
                image.write(b"a" * SECTOR + b"b" * SECTOR + b"c" * SECTOR)
            disk.lose_power(chooser(seed))
            found.add(bytes(disk.content()[::SECTOR]))
            disk.close()
        assert found == {b"a\0\0", b"ab\0", b"a\0c", b"abc"}

    @pytest.mark.parametrize("flushed", [False, True])
    def test_what_a_flush_covers_must_be_there(self, flushed: bool) -> None:
        workload, rng = BlockWorkload(8), chooser(1)
        finish(workload, rng, T_OUT)
        if flushed:
            finish(workload, rng, T_FLUSH)
        workload.died([])
        workload.lost_power()
        if not flushed:
            workload.check(bytes(8 * SECTOR))
            return
        with pytest.raises(InvariantError, match="L14: the image finds"):
            workload.check(bytes(8 * SECTOR))


def finish(workload: BlockWorkload, rng: random.Random, kind: int) -> None:
    """Have a job of a kind succeed; those that come before it fail."""
    while True:
        job = workload.next(rng)
        if job is None:
            continue
        wanted = job.data[0] == kind
        job.may_fail = True
        workload.done(job, job.room, bytes(job.room - 1) + bytes([0 if wanted else 1]))
        if wanted:
            return
