"""Rings behind an IOMMU: misses are reported at once, what is revoked is looked up again."""

from __future__ import annotations

import struct
import threading
import time

import pytest

from guestio._core.virtio.split import SplitRing
from guestio.addr import IovaRange, Permissions
from guestio.errors import QueueError
from tests.kit.rings import INDIRECT, NEXT, PAGE, WRITE, Desc, Rig, Tables, linked

READ_ONLY, WRITE_ONLY, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE
DESC, AVAIL, USED, BUF, TABLE = 0x1000, 0x2000, 0x3000, 0x100000, 0x200000


def miss(base: int, length: int, access: int) -> tuple[IovaRange, int]:
    return IovaRange(base, length), access


@pytest.fixture
def tables() -> Tables:
    return Tables()


@pytest.fixture
def rig(tables: Tables) -> Rig:
    """A ring that the device can reach, with indirect tables."""
    made = tables.rig(indirect=True)
    for area in (DESC, AVAIL, USED):
        tables.tell(area, 1)
    return made


class TestMisses:
    def test_those_of_the_ring_come_all_at_once(self, tables: Tables) -> None:
        rig = tables.rig()
        assert rig.ring.pop() == (
            [],
            [miss(DESC, 128, 1), miss(AVAIL, 20, 1), miss(USED, 68, 3)],
        )
        assert rig.ring.missing() == rig.ring.pop()[1]
        assert rig.ring.pop_faulty() is None
        assert rig.ring.enable_kicks() is None
        rig.ring.disable_kicks()
        tables.tell_missing(rig.ring.missing())
        assert rig.ring.missing() == []
        assert rig.ring.pop() == ([], [])

    def test_an_event_index_makes_areas_longer(self, tables: Tables) -> None:
        rig = tables.rig(event_idx=True)
        assert rig.ring.missing() == [miss(DESC, 128, 1), miss(AVAIL, 22, 1), miss(USED, 70, 3)]

    def test_a_ring_is_asked_for_with_the_access_that_it_needs(self, tables: Tables) -> None:
        rig = tables.rig()
        tables.tell(DESC, 1, WRITE_ONLY)
        tables.tell(AVAIL, 1, READ_ONLY)
        tables.tell(USED, 1, READ_ONLY)
        assert rig.ring.missing() == [miss(DESC, 128, 1), miss(USED, 68, 3)]

    def test_only_the_missing_pages_of_an_area(self, tables: Tables) -> None:
        rig = tables.rig(size=512, desc=0x10000, avail=0x20000, used=0x30000)
        tables.tell(0x10000, 1)
        tables.tell(0x30000, 1)
        assert rig.ring.missing() == [
            miss(0x11000, PAGE, 1),
            miss(0x20000, 4 + 1024, 1),
            miss(0x31000, 4, 3),
        ]

    def test_those_of_a_request_come_all_at_once(self, tables: Tables, rig: Rig) -> None:
        rig.put_chain(0, Desc(BUF, 16), Desc(BUF + PAGE - 1, 2), Desc(BUF + 0x5000, 8192, WRITE))
        tables.tell(BUF + 0x6000, 1)
        rig.offer(0)
        assert rig.ring.pop() == (
            [],
            [
                miss(BUF, 16, 1),
                miss(BUF + PAGE - 1, 2, 1),
                miss(BUF + 0x5000, PAGE, 2),
            ],
        )
        tables.tell_missing(rig.ring.pop()[1])
        chain = rig.pop_one()
        assert (chain.readable.total, chain.writable.total) == (18, 8192)

    def test_a_mapping_that_forbids_the_access_is_missing_too(
        self, tables: Tables, rig: Rig
    ) -> None:
        rig.put_chain(0, Desc(BUF, 16), Desc(BUF + PAGE, 8, WRITE))
        tables.tell(BUF, 1, WRITE_ONLY)
        tables.tell(BUF + PAGE, 1, READ_ONLY)
        rig.offer(0)
        assert rig.ring.pop() == ([], [miss(BUF, 16, 1), miss(BUF + PAGE, 8, 2)])

    def test_a_table_is_asked_for_before_what_it_holds(self, tables: Tables, rig: Rig) -> None:
        rows = linked(*[Desc(BUF + PAGE * i, 8) for i in range(3)])
        rig.offer(rig.put_table(0, TABLE + PAGE - 16, rows))
        chains, misses = rig.ring.pop()
        assert (chains, misses) == ([], [miss(TABLE + PAGE - 16, 48, 1)])
        tables.tell_missing(misses)
        chains, misses = rig.ring.pop()
        assert (chains, misses) == ([], [miss(BUF + PAGE * i, 8, 1) for i in range(3)])
        tables.tell_missing(misses)
        assert rig.pop_one().readable.total == 24

    @pytest.mark.capacity(RING_LOOK_WORK=1024)
    def test_later_requests_are_looked_at_but_not_taken(self, tables: Tables, rig: Rig) -> None:
        for head in range(5):
            rig.put(head, Desc(BUF + PAGE * head, 8))
        for head in (0, 1, 3):
            tables.tell(BUF + PAGE * head, 1)
        rig.offer(*range(5))
        chains, misses = rig.ring.pop()
        assert [chain.head for chain in chains] == [0, 1]
        assert misses == [miss(BUF + 2 * PAGE, 8, 1), miss(BUF + 4 * PAGE, 8, 1)]
        assert (rig.ring.next_avail, rig.ring.outstanding) == (2, 2)
        tables.tell(BUF + 4 * PAGE, 1)
        assert rig.ring.pop() == ([], [miss(BUF + 2 * PAGE, 8, 1)])
        tables.tell(BUF + 2 * PAGE, 1)
        chains, misses = rig.ring.pop()
        assert ([chain.head for chain in chains], misses) == ([2, 3, 4], [])

    def test_requests_that_were_only_looked_at_hold_nothing(self, tables: Tables, rig: Rig) -> None:
        rig.put(0, Desc(BUF, 8))
        rig.put(1, Desc(BUF + PAGE, 8))
        tables.tell(BUF + PAGE, 1)
        rig.offer(0, 1)
        rig.ring.pop()
        assert len(tables.iotlb._map.leases) == 0
        tables.iotlb.invalidate_all()  # would wait for itself if something was held

    def test_a_rule_broken_by_a_later_request(self, tables: Tables, rig: Rig) -> None:
        rig.put(0, Desc(BUF, 8))
        rig.put(1, Desc(BUF, 8, NEXT, 1))
        rig.offer(0, 1)
        with pytest.raises(QueueError, match="loop"):
            rig.ring.pop()

    @pytest.mark.capacity(RING_LOOK_WORK=1024)
    def test_the_limit_bounds_the_look_ahead(self, tables: Tables, rig: Rig) -> None:
        for head in range(8):
            rig.put(head, Desc(BUF + PAGE * head, 8))
        rig.offer(*range(8))
        assert len(rig.ring.pop(3)[1]) == 3
        assert len(rig.ring.pop()[1]) == 8

    def test_up_to_the_last_byte_of_the_address_space(self, tables: Tables, rig: Rig) -> None:
        rig.put(0, Desc(2**64 - 5000, 5000, WRITE))
        rig.offer(0)
        assert rig.ring.pop() == ([], [miss(2**64 - 5000, 5000, 2)])
        tables.tell(2**64 - 5000, 5000)
        chain = rig.pop_one()
        assert chain.writable.total == 5000
        chain.writable.write(b"end", 4997)
        assert tables.read(2**64 - 3, 3) == b"end"


class TestBrokenRingsHoldNothing:
    """What was looked at before a rule was found broken would hold off revocations for ever."""

    @pytest.mark.parametrize("faulty", [False, True])
    def test_buffers(self, tables: Tables, rig: Rig, faulty: bool) -> None:
        rig.put_chain(0, Desc(BUF, 8), Desc(BUF, 0, WRITE))
        tables.tell(BUF, 1)
        rig.offer(0)
        with pytest.raises(QueueError, match="0 bytes"):
            rig.ring.pop_faulty() if faulty else rig.ring.pop()
        assert len(tables.iotlb._map.leases) == 0
        tables.iotlb.invalidate_all()

    @pytest.mark.parametrize("faulty", [False, True])
    def test_an_indirect_table(self, tables: Tables, rig: Rig, faulty: bool) -> None:
        rig.offer(rig.put_table(0, TABLE, linked(Desc(BUF, 8), Desc(BUF, 0))))
        tables.tell(BUF, 1)
        tables.tell(TABLE, 1)
        with pytest.raises(QueueError, match="0 bytes"):
            rig.ring.pop_faulty() if faulty else rig.ring.pop()
        assert len(tables.iotlb._map.leases) == 0

    def test_requests_that_were_taken_before(self, tables: Tables, rig: Rig) -> None:
        rig.put(0, Desc(BUF, 8))
        rig.put(1, Desc(BUF, 0))
        tables.tell(BUF, 1)
        rig.offer(0, 1)
        with pytest.raises(QueueError, match="0 bytes"):
            rig.ring.pop()
        assert len(tables.iotlb._map.leases) == 0

    def test_areas_of_the_ring(self) -> None:
        tables = Tables()
        rig = tables.rig()
        tables.iotlb.set_mapping(DESC, 0x10000000, PAGE, RW)
        with pytest.raises(QueueError, match="no usable memory behind the ring"):
            rig.ring.pop()
        assert len(tables.iotlb._map.leases) == 0

    def test_a_request_in_memory_that_is_not_there(self, tables: Tables, rig: Rig) -> None:
        tables.iotlb.set_mapping(TABLE, 0x10000000, PAGE, RW)
        rig.put(0, Desc(TABLE, 16, INDIRECT))
        rig.offer(0)
        chain = rig.pop_one()
        assert chain.fault is not None
        rig.finish(chain)
        assert len(tables.iotlb._map.leases) == 0


class TestFaulty:
    """A request is taken although some of it was refused: it is there to be failed."""

    def test_it_holds_what_can_be_reached(self, tables: Tables, rig: Rig) -> None:
        tables.write(BUF, b"header")
        rig.put_chain(0, Desc(BUF, 6), Desc(BUF + PAGE, 512, WRITE), Desc(BUF + 0x5000, 1, WRITE))
        tables.tell(BUF, 1)
        tables.tell(BUF + 0x5000, 1)
        rig.offer(0)
        assert rig.ring.pop() == ([], [miss(BUF + PAGE, 512, 2)])
        chain = rig.ring.pop_faulty()
        assert chain is not None
        assert chain.fault == f"no translation of the buffer at {BUF + PAGE:#x}+0x200"
        assert chain.readable.read() == b"header"
        assert chain.writable.fragments() == [(BUF + 0x5000, 1)]
        assert chain.tail is not None
        chain.tail.write(b"\1")
        assert tables.read(BUF + 0x5000, 1) == b"\1"
        assert chain.access_fails == []
        assert rig.ring.outstanding == 1
        assert rig.finish(chain)
        assert rig.used_entry(0) == (0, 0)

    def test_forbidden_accesses_are_listed(self, tables: Tables, rig: Rig) -> None:
        rig.put_chain(0, Desc(BUF, 6), Desc(BUF + 0x1FFF, 2, WRITE), Desc(BUF + 0x5000, 1, WRITE))
        tables.tell(BUF, 1, WRITE_ONLY)
        tables.tell(BUF + 0x2000, 1, READ_ONLY)
        tables.tell(BUF + 0x5000, 1, READ_ONLY)
        rig.offer(0)
        chain = rig.ring.pop_faulty()
        assert chain is not None
        assert chain.access_fails == [
            miss(BUF, 6, 1),
            miss(BUF + 0x2000, 1, 2),
            miss(BUF + 0x5000, 1, 2),
        ]
        assert chain.tail is None
        assert chain.writable.total == chain.readable.total == 0

    def test_the_status_byte_shares_a_descriptor_that_is_partly_missing(
        self, tables: Tables, rig: Rig
    ) -> None:
        rig.put_chain(0, Desc(BUF, 16), Desc(BUF + 0x1E00, 513, WRITE))
        tables.tell(BUF, 1)
        tables.tell(BUF + 0x2000, 1)
        rig.offer(0)
        chain = rig.ring.pop_faulty()
        assert chain is not None
        assert chain.fault is not None
        assert chain.tail is not None
        assert chain.tail.fragments() == [(BUF + 0x2000, 1)]
        assert chain.writable.total == 0

    def test_a_missing_header_leaves_the_status_byte(self, tables: Tables, rig: Rig) -> None:
        rig.put_chain(0, Desc(BUF, 16), Desc(BUF + PAGE, 1, WRITE))
        tables.tell(BUF + PAGE, 1)
        rig.offer(0)
        chain = rig.ring.pop_faulty()
        assert chain is not None
        assert chain.tail is not None

    def test_a_missing_table_leaves_nothing(self, tables: Tables, rig: Rig) -> None:
        rig.offer(rig.put_table(0, TABLE, [Desc(BUF, 1, WRITE)]))
        chain = rig.ring.pop_faulty()
        assert chain is not None
        assert chain.fault == f"no translation of the indirect table at {TABLE:#x}"
        assert chain.tail is None
        rig.finish(chain)
        assert rig.used_idx == 1

    def test_a_forbidden_table(self, tables: Tables, rig: Rig) -> None:
        tables.tell(TABLE, 1, WRITE_ONLY)
        rig.offer(rig.put_table(0, TABLE, [Desc(BUF, 1)]))
        chain = rig.ring.pop_faulty()
        assert chain is not None
        assert chain.access_fails == [miss(TABLE, 16, 1)]

    def test_it_may_be_reached_by_now(self, tables: Tables, rig: Rig) -> None:
        rig.put(0, Desc(BUF, 6))
        rig.offer(0)
        assert rig.ring.pop()[1]
        tables.tell(BUF, 1)
        chain = rig.ring.pop_faulty()
        assert chain is not None
        assert chain.fault is None
        assert chain.readable.total == 6

    def test_rules_hold_for_it_as_well(self, tables: Tables, rig: Rig) -> None:
        rig.put(0, Desc(BUF, 6, NEXT, 0))
        rig.offer(0)
        with pytest.raises(QueueError, match="loop"):
            rig.ring.pop_faulty()

    def test_the_next_one_is_a_normal_one(self, tables: Tables, rig: Rig) -> None:
        rig.put(0, Desc(BUF, 6))
        rig.put(1, Desc(BUF + PAGE, 7))
        tables.tell(BUF + PAGE, 1)
        rig.offer(0, 1)
        assert rig.ring.pop_faulty() is not None
        assert rig.pop_one().head == 1

    def test_memory_behind_a_translation_may_be_missing(self, tables: Tables, rig: Rig) -> None:
        rig.put_chain(0, Desc(BUF, 16), Desc(BUF + PAGE, 1, WRITE))
        tables.iotlb.set_mapping(BUF, 0x10000000, PAGE, RW)
        tables.tell(BUF + PAGE, 1)
        rig.offer(0)
        chain = rig.pop_one()
        assert chain.fault == f"no usable memory behind the buffer at {BUF:#x}"
        assert chain.tail is not None


class TestRevoked:
    """A ring's own translation goes away, and its pages with it."""

    @pytest.mark.parametrize("area", [DESC, AVAIL, USED])
    def test_it_is_looked_up_again_before_the_next_use(
        self, tables: Tables, rig: Rig, area: int
    ) -> None:
        tables.tell(BUF, PAGE)
        for i in range(10):
            rig.put(i % 8, Desc(BUF + i, 10 + i, WRITE))
            rig.offer(i % 8)
            chain = rig.pop_one()
            assert chain.writable.fragments() == [(BUF + i, 10 + i)]
            tables.move(area)
            rig.ring.complete(chain, i)
            assert rig.ring.publish() is None
            assert rig.ring.unpublished == 1
            assert [base for (base, _), _ in rig.ring.missing()] == [area]
            tables.tell_missing(rig.ring.missing())
            assert rig.ring.publish() is True
            assert rig.used_entry(i) == (i % 8, i)
            assert rig.used_idx == i + 1

    def test_the_old_pages_are_not_touched(self, tables: Tables, rig: Rig) -> None:
        tables.tell(BUF, 1)
        rig.put(0, Desc(BUF, 1, WRITE))
        rig.offer(0)
        chain = rig.pop_one()
        old = [tables.move(area) for area in (DESC, AVAIL, USED)]
        rig.ring.complete(chain, 1)
        assert rig.ring.publish() is None
        assert rig.ring.enable_kicks() is None
        rig.ring.disable_kicks()
        assert rig.ring.pop()[0] == []
        assert rig.ring.pop_faulty() is None
        for page in old:
            assert tables.memory.read(page, PAGE) == b"\xa5" * PAGE
        tables.tell_missing(rig.ring.missing())
        assert rig.ring.publish() is True
        for page in old:
            assert tables.memory.read(page, PAGE) == b"\xa5" * PAGE

    def test_other_translations_may_go_meanwhile(self, tables: Tables, rig: Rig) -> None:
        tables.tell(BUF, 1)
        rig.put(0, Desc(BUF, 1))
        for _ in range(3):
            tables.tell(0x900000, 1)
            tables.iotlb.invalidate_mapping(0x900000, PAGE)
            rig.offer(0)
            assert rig.finish(rig.pop_one())

    def test_a_new_one_for_the_same_address_counts_at_once(self, tables: Tables, rig: Rig) -> None:
        tables.tell(BUF, 1)
        rig.put(0, Desc(BUF, 1))
        rig.offer(0)
        rig.finish(rig.pop_one())
        tables.move(AVAIL)
        tables.tell(AVAIL, 1)
        rig.offer(0)
        assert rig.finish(rig.pop_one())

    def test_requests_in_flight_hold_off_a_revocation(self, tables: Tables, rig: Rig) -> None:
        tables.tell(BUF, 1)
        rig.put(0, Desc(BUF, 4, WRITE))
        rig.offer(0)
        chain = rig.pop_one()
        gone = threading.Event()

        def revoke() -> None:
            tables.iotlb.invalidate_mapping(BUF, PAGE)
            gone.set()

        thread = threading.Thread(target=revoke)
        thread.start()
        assert not gone.wait(0.1)
        chain.writable.write(b"late")
        rig.ring.complete(chain, 4)
        assert gone.wait(5)
        thread.join()
        assert tables.read(BUF, 4) == b"late"

    def test_the_ring_itself_holds_off_nothing(self, tables: Tables, rig: Rig) -> None:
        rig.ring.pop()
        assert len(tables.iotlb._map.leases) == 0
        tables.iotlb.invalidate_all()

    def test_moved_to_other_memory(self, tables: Tables, rig: Rig) -> None:
        tables.tell(BUF, 1)
        rig.put(0, Desc(BUF, 1, WRITE))
        rig.offer(0)
        chain = rig.pop_one()
        other = Tables(seed=5)
        for area in (DESC, AVAIL, USED):
            other.tell(area, 1)
            other.write(area, tables.read(area, PAGE))
        rig.ring.rebind(other.space)
        assert rig.finish(chain, 1)
        assert rig.used_idx == 0, "the old memory is not written any more"
        assert other.read(USED, 12) == b"\0\0\1\0\0\0\0\0\1\0\0\0"

    def test_an_eviction_counts_as_a_revocation(self) -> None:
        tables = Tables()
        tables.iotlb = type(tables.iotlb)(capacity=4)
        tables.space = type(tables.space)(tables.memory._space.regions, tables.iotlb._map)
        rig = tables.rig()
        tables.tell(BUF, 1)
        for area in (DESC, AVAIL, USED):
            tables.tell(area, 1)
        rig.put(0, Desc(BUF, 1))
        rig.offer(0)
        chain = rig.pop_one()
        rig.ring.complete(chain, 0)
        for i in range(4):
            tables.tell(0x500000 + 2 * i * PAGE, 1)
        assert rig.ring.publish() is None
        assert len(rig.ring.missing()) == 3


@pytest.mark.slow
def test_revocation_while_misses_are_reported() -> None:
    """Reporting a miss lets other threads run; one takes the ring away in that moment.

    Once the invalidation has returned, the old page is filled with chains that break the rules. A
    device that still looks at it says so.
    """
    tables = Tables(0x200000)
    rig = tables.rig(size=64, desc=0x1000, avail=0x2000, used=0x3000)
    poison = struct.pack("<QIHH", 0, 0, 0, 0) * 256
    for head in range(64):
        rig.put(head, Desc(BUF + PAGE * head, 64))
    rig.offer(*range(64))
    pages = [tables.pages[0x1000], tables._free.pop()]
    tables.tell(0x2000, 1)
    tables.tell(0x3000, 1)
    good = tables.memory.read(pages[0], PAGE)
    stop = threading.Event()
    failures: list[BaseException] = []
    looks = 0

    def look() -> None:
        nonlocal looks
        try:
            while not stop.is_set():
                chains, misses = rig.ring.pop()
                assert chains == []
                assert misses
                looks += 1
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    moves = 0
    deadline = time.monotonic() + 2
    try:
        while time.monotonic() < deadline and not failures:
            here, there = pages[moves % 2], pages[(moves + 1) % 2]
            tables.memory.write(there, good)
            tables.iotlb.set_mapping(0x1000, there, PAGE, RW)
            tables.memory.write(here, poison)
            moves += 1
    finally:
        stop.set()
        thread.join()
    assert not failures, failures
    assert looks > 100
    assert moves > 100


def test_misses_do_not_add_up_over_looks(tables: Tables, rig: Rig) -> None:
    rig.put(0, Desc(BUF, 6))
    rig.offer(0)
    first = rig.ring.pop()[1]
    for _ in range(1000):
        assert rig.ring.pop()[1] == first
    assert rig.ring.outstanding == 0
    assert isinstance(rig.ring, SplitRing)
