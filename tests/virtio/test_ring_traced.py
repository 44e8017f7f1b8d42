"""Records of requests: those that the core serves are written as one, and read as all others."""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from guestio._core.memory.image import ImageFile
from guestio._core.trace import tracepoints
from guestio._core.virtio.block_server import BlockServer
from guestio._core.virtio.split import SplitRing
from guestio.memory import GuestRegionCollection, MmapRegion
from guestio.trace import RECORD, Group, Records, TraceReader, Tracing, What, new_origin, spell_out
from guestio.virtio.blk import T_FLUSH, T_IN, T_OUT
from tests.kit.rings import WRITE, Desc, HandRing

DESC, AVAIL, USED, BUFFERS = 0x10000, 0x20000, 0x30000, 0x40000
SIZE, ROOM = 64, 0x80000
SECTORS, WHOLE_SECTORS = 128, 64
"""Of the disk, and of the file behind it: the rest fails."""

STABLE = [name for name in RECORD.names or () if name not in ("time", "since", "thread", "origin")]

pytestmark = pytest.mark.capacity(RING_LOOK_WORK=1024)


@pytest.fixture(autouse=True)
def _capacity() -> Iterator[None]:
    tracepoints.set_capacity(1 << 12)
    yield
    tracepoints.set_capacity(tracepoints.NORMAL_CAPACITY)


class Disk:
    """A ring with a server of a block device behind it, and its driver."""

    def __init__(self, *, ordered: bool, report: Callable[..., None] | None = None) -> None:
        self.memory = GuestRegionCollection.from_regions([MmapRegion.memfd(0, ROOM)])
        self.hand = HandRing(self.memory, size=SIZE, desc=DESC, avail=AVAIL, used=USED)
        self.ring = SplitRing(self.memory._space, SIZE, DESC, AVAIL, USED, ordered=ordered)
        self.ring.origin, self.ring.queue = new_origin(), 3
        self.image = os.memfd_create("image")
        os.ftruncate(self.image, 512 * WHOLE_SECTORS)
        self.server = BlockServer(ImageFile(self.image, 512 * SECTORS), report=report)
        self.asked: list[dict[str, int]] = []

    def offer(self, *requests: tuple[int, int]) -> None:
        """Offer requests, each a kind and a sector of 512 bytes."""
        heads = []
        for i, (kind, sector) in enumerate(requests):
            at, head = BUFFERS + 0x400 * i, 2 * i
            self.memory.write(at, struct.pack("<IIQ", kind, 0, sector))
            if kind == T_OUT:
                shape = [Desc(at, 528), Desc(at + 528, 1, WRITE)]
            else:
                shape = [Desc(at, 16), Desc(at + 16, 513 if kind == T_IN else 1, WRITE)]
            self.hand.put_chain(head, *shape)
            heads.append(head)
            self.asked.append({"kind": kind, "sector": sector, "head": head, "address": at})
        self.hand.offer(*heads)

    def close(self) -> None:
        os.close(self.image)


def mine(reader: TraceReader, disk: Disk) -> Records:
    records, lost = reader.read()
    assert lost == 0
    return records[records["origin"] == disk.ring.origin]


def scenario(groups: Group, seed: int, *, ordered: bool) -> tuple[Records, Disk]:
    """Batches of requests, a part of which is left to the device and completed later."""
    chance = random.Random(seed)
    disk = Disk(ordered=ordered)
    try:
        with TraceReader() as reader, Tracing(groups):
            for _ in range(12):
                count = chance.randrange(1, 25)
                disk.offer(
                    *(
                        (chance.choice([T_IN, T_IN, T_OUT, T_FLUSH]), chance.randrange(SECTORS))
                        for _ in range(count)
                    )
                )
                chains, _, served, _ = disk.ring.run_once(disk.server, SIZE, -1, True)
                assert served + len(chains) == count
                chance.shuffle(chains)
                for chain in chains:
                    disk.ring.complete(chain, 1)
                disk.ring.publish()
            return mine(reader, disk), disk
    finally:
        disk.close()


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_they_are_read_as_if_each_had_been_written(seed: int, ordered: bool) -> None:
    """With BUFFERS, three are written for each request."""
    one, disk = scenario(Group.REQUESTS, seed, ordered=ordered)
    three, _ = scenario(Group.REQUESTS | Group.BUFFERS, seed, ordered=ordered)
    three = three[three["what"] != What.BUFFER]
    assert one[STABLE].tolist() == three[STABLE].tolist()
    for records in (one, three):
        assert (np.diff(records["time"].astype(np.int64)) >= 0).all()
    taken = one[one["what"] == What.TAKEN]
    assert taken["head"].tolist() == [each["head"] for each in disk.asked]
    assert taken["address"].tolist() == [each["address"] for each in disk.asked]
    assert taken["result"].tolist() == [*range(len(disk.asked))]
    assert taken["length"].tolist() == [528 if a["kind"] == T_OUT else 16 for a in disk.asked]
    # Each is taken, maybe served, and completed, in this order.
    open_: dict[int, dict[str, int]] = {}
    ended = 0
    for row in one:
        what, head = int(row["what"]), int(row["head"])
        if what == What.TAKEN:
            assert head not in open_
            open_[head] = disk.asked[int(row["result"])]
            assert row["since"] <= row["time"]
        elif what == What.SERVED:
            assert open_[head]["kind"] != T_FLUSH
            open_[head]["served"] = int(row["result"])
        elif what == What.COMPLETED:
            asked = open_.pop(head)
            ended += 1
            if asked["kind"] != T_FLUSH:
                assert row["access"] == 1 + asked["kind"]
                assert row["detail"] == 512 * asked["sector"]
                assert row["length"] == asked["served"]
                if asked["kind"] == T_IN and asked["sector"] < WHOLE_SECTORS:
                    assert row["length"] == 513
    assert (ended, open_) == (len(disk.asked), {})


def test_a_request_is_one_record_in_the_ring() -> None:
    disk = Disk(ordered=False)
    try:
        with TraceReader() as reader, Tracing(Group.REQUESTS):
            disk.offer(*[(T_IN, i) for i in range(20)])
            assert disk.ring.run_once(disk.server, SIZE)[2] == 20
            slots, _ = reader.read_slots()
        slots = slots[slots["origin"] == disk.ring.origin]
        spelled = spell_out(slots)
        assert [What(what).name for what in spelled["what"]].count("COMPLETED") == 20
        assert len(spelled) == len(slots) + 2 * 20
    finally:
        disk.close()


def test_what_serving_raises_leaves_the_request_taken() -> None:
    class Stop(Exception):  # noqa: N818 - no error, but how the test gets out
        pass

    def report(*_: object) -> None:
        raise Stop

    disk = Disk(ordered=False, report=report)
    try:
        with TraceReader() as reader, Tracing(Group.REQUESTS):
            disk.offer((T_IN, 0), (T_IN, WHOLE_SECTORS), (T_IN, 1))
            with pytest.raises(Stop):
                disk.ring.run_once(disk.server, SIZE)
            disk.ring.publish()
            whats = [What(what).name for what in mine(reader, disk)["what"]]
        # No interrupt: nothing was published by the batch that ended so.
        assert whats == ["AVAILABLE", "TAKEN", "SERVED", "TAKEN", "COMPLETED", "INTERRUPT"]
    finally:
        disk.close()


def test_times_that_fit_no_whole_request_are_written_apart() -> None:
    """What is more than 4.29 s after its batch was found does not fit 32 bits of ns."""
    disk = Disk(ordered=False, report=lambda *_: time.sleep(4.4))
    try:
        with TraceReader() as reader, Tracing(Group.REQUESTS):
            disk.offer((T_IN, 0), (T_IN, WHOLE_SECTORS), (T_IN, 1))
            began = time.monotonic_ns()
            assert disk.ring.run_once(disk.server, SIZE)[2] == 3
            records = mine(reader, disk)
    finally:
        disk.close()
    spans: dict[str, list[Any]] = {}
    for row in records:
        spans.setdefault(What(row["what"]).name, []).append((int(row["time"]) - began) / 1e9)
    assert [len(spans[name]) for name in ("TAKEN", "SERVED", "COMPLETED")] == [3, 3, 3]
    assert max(spans["TAKEN"][:2]) < 4 < min(spans["SERVED"][1:])
    assert spans["SERVED"][0] < 4 < min(spans["COMPLETED"])
    assert records["since"][records["what"] == What.COMPLETED].max() < began + 10**9


def test_switched_off_amid_a_batch() -> None:
    """Records of a later batch are its own, whatever was noted before."""
    tracing = Tracing(Group.REQUESTS)
    disk = Disk(ordered=True, report=lambda *_: tracing.close())
    try:
        with TraceReader() as reader:
            # The second one fails, and nothing is wanted when they are published.
            disk.offer((T_IN, 0), (T_IN, WHOLE_SECTORS), (T_IN, 1))
            assert disk.ring.run_once(disk.server, SIZE)[2] == 3
            mine(reader, disk)
            with Tracing(Group.REQUESTS):
                disk.offer((T_FLUSH, 0), (T_IN, 2))
                chains = disk.ring.run_once(disk.server, SIZE)[0]
                for chain in chains:
                    disk.ring.complete(chain, 1)
                disk.ring.publish()
                found = mine(reader, disk)
    finally:
        disk.close()
    kinds = [What(what).name for what in found["what"] if what != What.INTERRUPT]
    assert kinds == ["AVAILABLE", "TAKEN", "TAKEN", "SERVED", "COMPLETED", "COMPLETED"]


def test_a_whole_request_says_what_three_records_do() -> None:
    origin = new_origin()
    values = {
        "address": 2**64 - 1, "offset": 2**63, "readable": 16, "writable": 2**32 - 1,
        "written": 2**32 - 2, "position": 65535, "head": 32767, "origin": origin, "queue": 9,
        "access": 1,
    }  # fmt: skip
    with TraceReader() as reader:
        for i in range(3):
            tracepoints.put_whole(
                time=10_000, since=9000 - i, taken=10 + 100 * i, served=20 + 100 * i, **values
            )
        tracepoints.put(int(What.INTERRUPT), origin=origin, time=10_001)
        records, lost = reader.read()
        records = records[records["origin"] == origin]
    assert lost == 0
    assert records["what"].tolist() == [2, 4] * 3 + [5] * 3 + [6]
    assert records["time"].tolist() == [
        1010, 1020, 1111, 1121, 1212, 1222, 10_000, 10_000, 10_000, 10_001,
    ]  # fmt: skip
    taken, served, completed = records[0], records[1], records[6]
    for row in (taken, served):
        assert (row["address"], row["length"], row["detail"]) == (2**64 - 1, 16, 2**32 - 1)
    assert (taken["result"], served["result"], served["access"]) == (65535, 2**32 - 2, 1)
    assert (completed["length"], completed["detail"]) == (2**32 - 2, 2**63)
    assert {row["head"] for row in records[:-1]} == {32767}
    assert {int(row["since"]) for row in records[:-1]} == {1000, 1001, 1002}
    with pytest.raises(ValueError, match="no whole number"):
        tracepoints.spell_out(b"x" * 65)
    assert tracepoints.spell_out(b"") == b""
