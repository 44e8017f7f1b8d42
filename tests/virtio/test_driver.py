"""The driver's side of a split ring, against an independent model and against the real device side.

Numbers and rules: virtio 1.3 section 2.7.
"""

from __future__ import annotations

import os
import select
import struct
import threading
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestio._core.virtio.split import SplitRing
from guestio.addr import Ordering, Permissions
from guestio.errors import InvalidAddressError, QueueError
from guestio.iommu import Iommu, IommuMemory, Iotlb
from guestio.memory import Backing, GuestRegionCollection, IoVector, MmapRegion
from guestio.virtio.driver import Completion, DriverQueue
from guestio.virtio.layout import RingLayout

if TYPE_CHECKING:
    from collections.abc import Iterator

BASE = 0x10000
TABLES = 0x40000
BUFFER = 0x80000


class Descriptor(NamedTuple):
    addr: int
    length: int
    flags: int
    next: int


class ModelDevice:
    """The device's side, read off the specification with plain memory accesses only."""

    def __init__(self, memory: GuestRegionCollection, layout: RingLayout) -> None:
        self.memory = memory
        self.layout = layout
        self.seen = 0
        self.used = 0

    def word(self, addr: int) -> int:
        return int.from_bytes(self.memory.read(addr, 2), "little")

    def put_word(self, addr: int, value: int) -> None:
        self.memory.write(addr, value.to_bytes(2, "little"))

    @property
    def avail_idx(self) -> int:
        return self.word(self.layout.avail + 2)

    def set_used_idx(self, value: int) -> None:
        self.put_word(self.layout.used + 2, value & 0xFFFF)

    def set_avail_event(self, value: int) -> None:
        self.put_word(self.layout.used + 4 + 8 * self.layout.size, value)

    @property
    def used_event(self) -> int:
        return self.word(self.layout.avail + 4 + 2 * self.layout.size)

    def descriptor(self, table: int, index: int) -> Descriptor:
        return Descriptor(*struct.unpack("<QIHH", self.memory.read(table + 16 * index, 16)))

    def pop(self) -> list[int]:
        """Heads that became available."""
        heads = []
        while self.seen != self.avail_idx:
            slot = self.seen % self.layout.size
            heads.append(self.word(self.layout.avail + 4 + 2 * slot))
            self.seen = (self.seen + 1) & 0xFFFF
        return heads

    def chain(self, head: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """What a chain gives to read and to write."""
        table, index = self.layout.desc, head
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        first = self.descriptor(table, head)
        if first.flags & 4:
            assert first.flags == 4
            assert first.length % 16 == 0
            table, index = first.addr, 0
        while True:
            here = self.descriptor(table, index)
            assert not here.flags & 4
            if here.flags & 2:
                writable.append((here.addr, here.length))
            else:
                assert not writable, "readable after writable"
                readable.append((here.addr, here.length))
            if not here.flags & 1:
                return readable, writable
            index = here.next

    def use(self, head: int, written: int = 0, *, publish: bool = True) -> None:
        slot = self.used % self.layout.size
        at = self.layout.used + 4 + 8 * slot
        self.memory.write(at, struct.pack("<II", head, written))
        self.used = (self.used + 1) & 0xFFFF
        if publish:
            self.set_used_idx(self.used)


@pytest.fixture
def memory() -> GuestRegionCollection:
    return GuestRegionCollection.from_ranges([(BASE, 0x100000)])


class Rig:
    def __init__(self, memory: GuestRegionCollection, size: int = 8, **features: bool) -> None:
        self.memory = memory
        self.layout = RingLayout.contiguous(BASE, size)
        self.driver = DriverQueue(memory, self.layout, **features)
        self.device = ModelDevice(memory, self.layout)

    def table(self, addr: int, entries: int) -> tuple[int, IoVector]:
        return addr, self.memory.gather(addr, 16 * entries, Permissions.READ_WRITE)


@pytest.fixture
def rig(memory: GuestRegionCollection) -> Iterator[Rig]:
    made = Rig(memory, indirect=True)
    yield made
    made.driver.close()


def one(rig: Rig, token: object = "t", readable: int = 16, writable: int = 32) -> int:
    return rig.driver.add([(BUFFER, readable)], [(BUFFER + 4096, writable)], token)


class TestLayout:
    def test_sizes_are_those_of_the_specification(self) -> None:
        # Section 2.7: 16 * size, 6 + 2 * size, 6 + 8 * size.
        assert RingLayout.desc_bytes(128) == 2048
        assert RingLayout.avail_bytes(128) == 262
        assert RingLayout.used_bytes(128) == 1030

    def test_contiguous_parts_do_not_overlap_and_fit(self) -> None:
        for size in (1, 2, 256, 32768):
            layout = RingLayout.contiguous(BASE, size)
            assert layout.desc + 16 * size <= layout.avail
            assert layout.avail + 6 + 2 * size <= layout.used
            assert layout.used % 4 == 0
            end = layout.used + 6 + 8 * size
            assert end == BASE + RingLayout.contiguous_bytes(size)

    @pytest.mark.parametrize("size", [0, 3, -4, 65536, 32769])
    def test_bad_sizes(self, size: int) -> None:
        with pytest.raises(ValueError, match="power of two"):
            RingLayout(size, 0, 0x1000, 0x2000)

    @pytest.mark.parametrize("bad", [{"desc": 8}, {"avail": 1}, {"used": 2}])
    def test_misaligned_parts(self, bad: dict[str, int]) -> None:
        places = {"desc": 0, "avail": 0x1000, "used": 0x2000} | bad
        with pytest.raises(ValueError, match="is not a multiple of"):
            RingLayout(8, **places)

    def test_a_part_may_end_at_2_64_but_not_pass_it(self) -> None:
        assert RingLayout(8, 2**64 - 128, 0, 0x1000).desc == 2**64 - 128
        with pytest.raises(InvalidAddressError):
            RingLayout(16, 2**64 - 128, 0, 0x1000)

    def test_rings_outside_memory_are_refused(self, memory: GuestRegionCollection) -> None:
        with pytest.raises(InvalidAddressError):
            DriverQueue(memory, RingLayout(8, BASE, 0x1000, BASE + 0x1000))


class TestAdd:
    def test_a_direct_chain(self, rig: Rig) -> None:
        readable = [(BUFFER, 16), (BUFFER + 100, 7)]
        writable = [(BUFFER + 0x1000, 512), (BUFFER + 0x2000, 1)]
        head = rig.driver.add(readable, writable, "token")
        assert rig.driver.free == 4
        assert rig.driver.outstanding == 0
        assert rig.driver.publish()
        assert rig.device.pop() == [head]
        assert rig.device.chain(head) == (readable, writable)
        assert rig.driver.outstanding == 1

    def test_an_indirect_chain_takes_one_descriptor(self, rig: Rig) -> None:
        buffers = [(BUFFER + 64 * i, 32 + i) for i in range(6)]
        head = rig.driver.add(buffers[:2], buffers[2:], table=rig.table(TABLES, 6))
        assert rig.driver.free == 7
        rig.driver.publish()
        assert rig.device.pop() == [head]
        assert rig.device.descriptor(rig.layout.desc, head)[:3] == (TABLES, 96, 4)
        assert rig.device.chain(head) == (buffers[:2], buffers[2:])

    def test_nothing_is_visible_before_publish(self, rig: Rig) -> None:
        one(rig)
        one(rig)
        assert rig.device.avail_idx == 0
        rig.driver.publish()
        assert rig.device.avail_idx == 2

    def test_descriptors_of_chains_in_flight_are_not_reused(self, rig: Rig) -> None:
        heads = [one(rig, i) for i in range(4)]
        rig.driver.publish()
        assert rig.driver.free == 0
        chains = [rig.device.chain(head) for head in heads]
        assert all(chain == ([(BUFFER, 16)], [(BUFFER + 4096, 32)]) for chain in chains)
        with pytest.raises(QueueError, match="2 descriptors are needed, 0 are free"):
            one(rig)
        rig.device.use(heads[2], 3)
        assert rig.driver.collect() == [Completion(2, 3)]
        assert one(rig, "again") == heads[2]

    @pytest.mark.parametrize(
        ("readable", "writable", "match"),
        [
            ([], [], "chain of 0 buffers"),
            ([(BUFFER, 1)] * 9, [], "chain of 9 buffers"),
            ([(BUFFER, 0)], [], "length"),
            ([], [(BUFFER, 2**32)], "length"),
            ([(BUFFER, -1)], [], "length"),
        ],
    )
    def test_bad_chains_change_nothing(
        self,
        rig: Rig,
        readable: list[tuple[int, int]],
        writable: list[tuple[int, int]],
        match: str,
    ) -> None:
        with pytest.raises(ValueError, match=match):
            rig.driver.add(readable, writable)
        assert rig.driver.free == 8
        assert not rig.driver.publish()
        assert rig.device.avail_idx == 0

    def test_a_table_needs_the_feature(self, memory: GuestRegionCollection) -> None:
        rig = Rig(memory)
        with pytest.raises(ValueError, match="VIRTIO_RING_F_INDIRECT_DESC"):
            rig.driver.add([(BUFFER, 16)], [], table=rig.table(TABLES, 1))
        assert rig.driver.free == 8

    def test_a_table_that_is_too_short_is_refused(self, rig: Rig) -> None:
        with pytest.raises(InvalidAddressError):
            rig.driver.add([(BUFFER, 1), (BUFFER, 1)], [], table=rig.table(TABLES, 1))
        assert rig.driver.free == 8


class TestKick:
    def test_without_event_index_the_flag_decides(self, rig: Rig) -> None:
        one(rig)
        assert rig.driver.publish()
        rig.device.put_word(rig.layout.used, 1)
        one(rig)
        assert not rig.driver.publish()
        rig.device.put_word(rig.layout.used, 0)
        assert not rig.driver.publish(), "nothing was added"

    @settings(deadline=None)
    @given(
        start=st.integers(0, 2).map(lambda laps: laps * 8),
        added=st.integers(1, 8),
        event=st.one_of(st.integers(0, 0xFFFF), st.integers(0, 40)),
    )
    def test_with_event_index_the_formula_of_the_specification_decides(
        self, start: int, added: int, event: int
    ) -> None:
        memory = GuestRegionCollection.from_ranges([(BASE, 0x100000)])
        rig = Rig(memory, event_idx=True)
        for _ in range(start):
            rig.driver.add([(BUFFER, 1)], [])
            rig.driver.publish()
            rig.device.use(rig.device.pop()[0])
            rig.driver.collect()
        rig.device.set_avail_event(event)
        for _ in range(added):
            rig.driver.add([(BUFFER, 1)], [])
        # Section 2.7.10.1: the device wants to know once the index passes `event`.
        passed = event in {(start + i) & 0xFFFF for i in range(added)}
        assert rig.driver.publish() == passed


class TestInterrupts:
    def test_without_event_index_the_flag_is_set_and_cleared(self, rig: Rig) -> None:
        rig.driver.disable_interrupts()
        assert rig.device.word(rig.layout.avail) == 1
        assert not rig.driver.enable_interrupts()
        assert rig.device.word(rig.layout.avail) == 0

    def test_with_event_index_the_flag_stays_0(self, memory: GuestRegionCollection) -> None:
        rig = Rig(memory, event_idx=True)
        rig.driver.disable_interrupts()
        assert rig.device.word(rig.layout.avail) == 0
        assert rig.device.used_event == 0xFFFF
        assert not rig.driver.enable_interrupts(after=3)
        assert rig.device.used_event == 2

    @pytest.mark.parametrize("event_idx", [False, True])
    def test_what_is_finished_already_is_reported(
        self, memory: GuestRegionCollection, event_idx: bool
    ) -> None:
        rig = Rig(memory, event_idx=event_idx)
        heads = [one(rig), one(rig)]
        rig.driver.publish()
        rig.device.use(heads[0])
        assert rig.driver.enable_interrupts()
        assert not rig.driver.enable_interrupts(after=2)
        rig.device.use(heads[1])
        assert rig.driver.enable_interrupts(after=2)
        rig.driver.collect()
        assert not rig.driver.enable_interrupts()

    @pytest.mark.parametrize("after", [0, -1, 9])
    def test_bad_counts(self, rig: Rig, after: int) -> None:
        with pytest.raises(ValueError, match="after"):
            rig.driver.enable_interrupts(after)


class TestCollect:
    def test_nothing_finished(self, rig: Rig) -> None:
        one(rig)
        rig.driver.publish()
        assert rig.driver.collect() == []

    def test_any_order_and_a_limit(self, rig: Rig) -> None:
        heads = [one(rig, name) for name in "abc"]
        rig.driver.publish()
        for head, written in zip(reversed(heads), (1, 2, 32), strict=True):
            rig.device.use(head, written)
        assert rig.driver.collect(limit=2) == [("c", 1), ("b", 2)]
        assert rig.driver.collect() == [("a", 32)]
        assert rig.driver.free == 8

    def test_entries_without_the_index_do_not_count(self, rig: Rig) -> None:
        head = one(rig)
        rig.driver.publish()
        rig.device.use(head, publish=False)
        assert rig.driver.collect() == []

    def test_indices_wrap_at_16_bits(self, memory: GuestRegionCollection) -> None:
        rig = Rig(memory, size=4, event_idx=True)
        for i in range(66000):
            head = rig.driver.add([(BUFFER, 1)], [], i)
            rig.device.set_avail_event(i & 0xFFFF)
            assert rig.driver.publish()
            rig.device.use(head)
            assert rig.driver.collect() == [(i, 0)]
        assert rig.driver.next_used == rig.driver.published == 66000 - 65536

    def test_reset_begins_anew(self, rig: Rig) -> None:
        one(rig)
        rig.driver.publish()
        rig.driver.reset()
        assert (rig.driver.free, rig.driver.outstanding, rig.device.avail_idx) == (8, 0, 0)
        assert rig.driver.collect() == []


class TestLyingDevice:
    """A device that breaks the rules is found out, and the queue stops."""

    def check_broken(self, rig: Rig, match: str) -> None:
        with pytest.raises(QueueError, match=match):
            rig.driver.collect()
        with pytest.raises(QueueError, match=match):
            rig.driver.collect()
        with pytest.raises(QueueError, match=match):
            one(rig)
        rig.driver.reset()
        one(rig)

    def test_index_beyond_the_ring(self, rig: Rig) -> None:
        one(rig)
        rig.driver.publish()
        rig.device.use(8)
        self.check_broken(rig, "names chain 8")

    @pytest.mark.parametrize("head", [5, 0xFFFFFFFF])
    def test_chain_it_was_never_given(self, rig: Rig, head: int) -> None:
        one(rig)
        rig.driver.publish()
        rig.device.use(head)
        self.check_broken(rig, f"names chain {head}")

    def test_middle_of_a_chain(self, rig: Rig) -> None:
        head = one(rig)
        rig.driver.publish()
        rig.device.use(rig.device.descriptor(rig.layout.desc, head).next)
        self.check_broken(rig, "which the device does not have")

    def test_chain_that_was_not_published_yet(self, rig: Rig) -> None:
        one(rig)
        rig.driver.publish()
        rig.device.use(one(rig))
        self.check_broken(rig, "which the device does not have")

    def test_same_chain_twice(self, rig: Rig) -> None:
        heads = [one(rig, "a"), one(rig, "b")]
        rig.driver.publish()
        rig.device.use(heads[0], 5)
        rig.device.use(heads[0], 5)
        assert rig.driver.collect() == [("a", 5)], "what was right comes first"
        self.check_broken(rig, "which the device does not have")

    def test_more_bytes_than_there_is_room_for(self, rig: Rig) -> None:
        head = one(rig, writable=32)
        rig.driver.publish()
        rig.device.use(head, 33)
        self.check_broken(rig, "wrote 33 bytes")

    @pytest.mark.parametrize("index", [2, 9, 0x8000, 0xFFFF])
    def test_index_that_jumps(self, rig: Rig, index: int) -> None:
        one(rig)
        rig.driver.publish()
        rig.device.set_used_idx(index)
        self.check_broken(rig, "only 1 chains outstanding")

    def test_index_that_moves_with_nothing_published(self, rig: Rig) -> None:
        one(rig)
        rig.device.set_used_idx(1)
        self.check_broken(rig, "only 0 chains outstanding")


@settings(deadline=None, max_examples=60)
@given(data=st.data(), size=st.sampled_from([1, 2, 8, 16]), event_idx=st.booleans())
def test_random_traffic_against_the_model(data: st.DataObject, size: int, event_idx: bool) -> None:
    memory = GuestRegionCollection.from_ranges([(BASE, 0x100000)])
    rig = Rig(memory, size=size, event_idx=event_idx, indirect=True)
    expected: dict[int, tuple[object, list[tuple[int, int]], list[tuple[int, int]]]] = {}
    in_device: list[int] = []
    used: list[int] = []
    token = 0
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["add", "publish", "use", "collect"]))
        if action == "add" and rig.driver.free:
            count = data.draw(st.integers(1, min(size, 5)))
            buffers = [(BUFFER + 64 * i, 1 + i) for i in range(count)]
            split = data.draw(st.integers(0, count))
            indirect = count > rig.driver.free or data.draw(st.booleans())
            table = rig.table(TABLES + 256 * (token % 64), count) if indirect else None
            head = rig.driver.add(buffers[:split], buffers[split:], token, table=table)
            assert head not in expected
            expected[head] = (token, buffers[:split], buffers[split:])
            token += 1
        elif action == "publish":
            rig.driver.publish()
            for head in rig.device.pop():
                assert rig.device.chain(head) == expected[head][1:]
                in_device.append(head)
        elif action == "use" and in_device:
            head = in_device.pop(data.draw(st.integers(0, len(in_device) - 1)))
            rig.device.use(head, sum(length for _, length in expected[head][2]))
            used.append(head)
        elif action == "collect":
            wanted = [
                (expected[head][0], sum(length for _, length in expected.pop(head)[2]))
                for head in used
            ]
            assert rig.driver.collect() == wanted
            used.clear()
    rig.driver.close()


class Tables(Iommu):
    def __init__(self) -> None:
        self.table = Iotlb()

    @property
    def iotlb(self) -> Iotlb:
        return self.table


def test_rings_on_scattered_pages_behind_an_iommu(memory: GuestRegionCollection) -> None:
    """A ring of 1024 entries spans 7 pages, here in reverse order; the device side agrees."""
    size, iova = 1024, 0xFFFF0000
    pages = -(-RingLayout.contiguous_bytes(size) // 4096)
    tables = Tables()
    for page in range(pages):
        gpa = BASE + 4096 * (pages - page)
        tables.table.set_mapping(iova + 4096 * page, gpa, 4096, Permissions.READ_WRITE)
    tables.table.set_mapping(0, BUFFER, 0x2000, Permissions.READ_WRITE)
    view = IommuMemory(memory, tables)
    layout = RingLayout.contiguous(iova, size)
    driver = DriverQueue(view, layout, event_idx=True)
    ring = SplitRing(view._space, size, layout.desc, layout.avail, layout.used, event_idx=True)
    for lap in range(3):
        for i in range(size // 2):
            driver.add([(0, 16)], [(4096, 64)], (lap, i))
        driver.publish()
        done: list[Completion] = []
        while len(done) < size // 2:
            chains, misses = ring.pop()
            assert not misses
            for chain in reversed(chains):
                assert (chain.readable.total, chain.writable.total) == (16, 64)
                ring.complete(chain, 64)
            ring.publish()
            done += driver.collect()
        assert {token for token, _ in done} == {(lap, i) for i in range(size // 2)}
    driver.close()


ROUNDS = 30000


@pytest.mark.parametrize("event_idx", [False, True])
def test_no_notification_is_lost_between_two_processes(event_idx: bool) -> None:
    """Both sides sleep whenever they may: a wish for a notification that is missed hangs them."""
    backing = Backing.memfd(0x100000)
    memory = GuestRegionCollection.from_regions([MmapRegion(BASE, backing)])
    layout = RingLayout.contiguous(BASE, 16)
    kick, call = os.eventfd(0), os.eventfd(0)
    driver = DriverQueue(memory, layout, event_idx=event_idx)
    child = os.fork()
    if child == 0:
        os._exit(_serve(memory, layout, event_idx, kick, call))
    try:
        submitted = collected = 0
        while collected < ROUNDS:
            depth = 1 + submitted % 5
            while submitted < ROUNDS and driver.outstanding < depth:
                driver.add([(BUFFER, 8)], [(BUFFER + 64, 8)], submitted)
                submitted += 1
                if driver.publish():
                    os.eventfd_write(kick, 1)
            done = driver.collect()
            collected += len(done)
            if not done and not driver.enable_interrupts():
                assert _readable(call, 10), f"notification lost after {collected} requests"
                os.eventfd_read(call)
    finally:
        os.eventfd_write(kick, 1 << 32)
        driver.close()
        os.close(kick)
        os.close(call)
    assert os.waitpid(child, 0)[1] == 0


def _serve(
    memory: GuestRegionCollection, layout: RingLayout, event_idx: bool, kick: int, call: int
) -> int:
    """The device: serve requests until a kick says to stop; 0 if all went well."""
    space = memory._space
    ring = SplitRing(
        space, layout.size, layout.desc, layout.avail, layout.used, event_idx=event_idx
    )
    served = 0
    while True:
        chains, _ = ring.pop()
        for chain in chains:
            ring.complete(chain, 8)
            served += 1
            if ring.publish():
                os.eventfd_write(call, 1)
        if not chains and not ring.enable_kicks():
            if not _readable(kick, 20):
                return 1
            if os.eventfd_read(kick) >= 1 << 32:
                return 0 if served == ROUNDS else 2


def _readable(fd: int, timeout: float) -> bool:
    return bool(select.select([fd], [], [], timeout)[0])


def test_a_polling_driver_sees_whole_indices(memory: GuestRegionCollection) -> None:
    """The index is loaded whole while another thread moves it over a byte border."""
    rig = Rig(memory, size=256)
    stop = threading.Event()
    flips = deque([0x00FF, 0x0100])

    def flip() -> None:
        while not stop.is_set():
            memory.store(rig.layout.used + 2, flips[0], 2, Ordering.RELEASE)
            flips.rotate()

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        seen = {rig.driver._ready() for _ in range(50000)}
    finally:
        stop.set()
        thread.join()
    assert seen <= {0, 0x00FF, 0x0100}
