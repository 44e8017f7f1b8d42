"""Well-formed rings as their device sees them: what is taken, what it holds, what is given back.

Rules: virtio 1.3 section 2.7; no assumption about message framing: section 2.6.4.
"""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from guestio._core.virtio.chain import Chain
from guestio._core.virtio.split import SplitRing
from guestio.memory import AtomicBitmap, Backing, GuestRegionCollection, MmapRegion
from tests.kit.rings import INDIRECT, NEXT, PAGE, WRITE, Desc, Tables, linked, physical

A, B, C = 0x10000, 0x11000, 0x12000


class TestDirect:
    def test_what_is_read_and_what_is_written_are_apart_and_in_order(self) -> None:
        memory, rig = physical()
        memory.write(A, b"header--")
        memory.write(B + 5, b"payload")
        rig.offer(
            rig.put_chain(2, Desc(A, 8), Desc(B + 5, 7), Desc(C, 3, WRITE), Desc(A + 64, 1, WRITE))
        )
        chain = rig.pop_one()
        assert chain.head == 2
        assert chain.fault is None
        assert chain.readable.read() == b"header--payload"
        assert chain.readable.fragments() == [(A, 8), (B + 5, 7)]
        assert chain.writable.fragments() == [(C, 3), (A + 64, 1)]
        chain.writable.write(b"abc\0")
        assert memory.read(C, 4) == b"abc\0"
        assert memory.read(A + 64, 2) == b"\0\0"

    def test_links_lead_anywhere(self) -> None:
        _, rig = physical()
        rig.put(7, Desc(A, 1, NEXT, 0))
        rig.put(0, Desc(B, 2, NEXT | WRITE, 3))
        rig.put(3, Desc(C, 3, WRITE, 7))
        rig.offer(7)
        chain = rig.pop_one()
        assert chain.readable.fragments() == [(A, 1)]
        assert chain.writable.fragments() == [(B, 2), (C, 3)]

    def test_a_chain_may_take_the_whole_ring(self) -> None:
        _, rig = physical(size=4)
        rig.offer(rig.put_chain(0, *[Desc(A + 16 * i, 16) for i in range(4)]))
        assert rig.pop_one().readable.total == 64

    def test_only_reading_or_only_writing(self) -> None:
        _, rig = physical()
        rig.offer(rig.put_chain(0, Desc(A, 5)), rig.put_chain(1, Desc(A, 6, WRITE)))
        (first, second), _ = rig.ring.pop()
        assert (first.readable.total, first.writable.total) == (5, 0)
        assert (second.readable.total, second.writable.total) == (0, 6)

    def test_data_and_status_in_one_descriptor(self) -> None:
        memory, rig = physical()
        rig.offer(rig.put_chain(0, Desc(A, 16), Desc(B, 513, WRITE)))
        chain = rig.pop_one()
        chain.writable.write(b"d" * 512)
        chain.writable.write(b"\1", 512)
        assert memory.read(B, 514) == b"d" * 512 + b"\1\0"

    def test_a_header_split_into_single_bytes(self) -> None:
        memory, rig = physical(size=32)
        header = bytes(range(1, 17))
        for i, value in enumerate(header):
            memory.write(A + 0x100 * i + PAGE - 1, bytes([value]))
        rig.offer(
            rig.put_chain(
                0, *[Desc(A + 0x100 * i + PAGE - 1, 1) for i in range(16)], Desc(B, 1, WRITE)
            )
        )
        assert rig.pop_one().readable.read() == header

    def test_a_buffer_over_regions_of_memory(self) -> None:
        memory = GuestRegionCollection.from_regions(
            [MmapRegion.memfd(start, PAGE) for start in (0, PAGE, 2 * PAGE)]
        )
        ring = SplitRing(memory._space, 4, 0, 0x100, 0x200)
        memory.write(0, b"\xf0\x0f\0\0\0\0\0\0\x20\x10\0\0\2\0\0\0")
        memory.write(0x100, b"\0\0\1\0\0\0")
        ((chain,), misses) = ring.pop()
        assert misses == []
        assert chain.writable.fragments() == [(0xFF0, 16), (PAGE, PAGE), (2 * PAGE, 16)]
        chain.writable.write(bytes(i % 251 for i in range(0x1020)))
        assert memory.read(0xFF0, 0x1020) == bytes(i % 251 for i in range(0x1020))

    def test_the_last_byte_of_the_address_space(self) -> None:
        memory = GuestRegionCollection.from_regions(
            [MmapRegion.memfd(0, 0x4000), MmapRegion.memfd(2**64 - PAGE, PAGE)]
        )
        ring = SplitRing(memory._space, 4, 0x1000, 0x2000, 0x3000)
        memory.write(0x1000, (2**64 - 3).to_bytes(8, "little") + b"\3\0\0\0\2\0\0\0")
        memory.write(0x2002, b"\1\0")
        ((chain,), _) = ring.pop()
        chain.writable.write(b"end")
        assert memory.read(2**64 - 3, 3) == b"end"

    def test_a_ring_that_ends_at_the_last_byte(self) -> None:
        start = 2**64 - 3 * PAGE
        memory = GuestRegionCollection.from_regions([MmapRegion.memfd(start, 3 * PAGE)])
        # Used ring of 2 entries without an event index: 4 + 8 * 2 bytes.
        ring = SplitRing(memory._space, 2, start, start + PAGE, 2**64 - 20)
        memory.write(start, start.to_bytes(8, "little") + b"\1\0\0\0\0\0\0\0")
        memory.write(start + PAGE + 2, b"\1\0")
        ((chain,), _) = ring.pop()
        ring.complete(chain, 0)
        assert ring.publish()
        assert memory.read(2**64 - 20, 20)[2:4] == b"\1\0"


class TestIndirect:
    def test_a_table(self) -> None:
        memory, rig = physical(indirect=True)
        memory.write(A, b"head")
        rig.offer(
            rig.put_table(5, B, linked(Desc(A, 4), Desc(A + 0x800, 512, WRITE), Desc(C, 1, WRITE)))
        )
        chain = rig.pop_one()
        assert chain.head == 5
        assert chain.readable.read() == b"head"
        assert chain.writable.fragments() == [(A + 0x800, 512), (C, 1)]

    def test_a_chain_whose_last_descriptor_is_a_table(self) -> None:
        _, rig = physical(indirect=True)
        rig.put(0, Desc(A, 10, NEXT, 1))
        rig.put(1, Desc(A + 100, 20, NEXT, 2))
        rig.put_table(2, B, linked(Desc(A + 200, 30), Desc(C, 40, WRITE)))
        rig.offer(0)
        chain = rig.pop_one()
        assert [size for _, size in chain.readable.fragments()] == [10, 20, 30]
        assert [size for _, size in chain.writable.fragments()] == [40]

    def test_the_write_flag_of_a_table_means_nothing(self) -> None:
        # "The device MUST ignore the write-only flag ... in the descriptor that refers to an
        # indirect table" (section 2.7.5.3.2).
        _, rig = physical(indirect=True)
        rig.put_table(0, B, [Desc(A, 4)])
        rig.put(0, Desc(B, 16, INDIRECT | WRITE))
        rig.offer(0)
        assert rig.pop_one().readable.total == 4

    def test_entries_after_the_end_of_the_chain_do_not_count(self) -> None:
        _, rig = physical(indirect=True)
        rig.put_table(0, B, [Desc(A, 4, NEXT, 2), Desc(2**64 - 1, 0xFFFFFFFF, 7, 9), Desc(A, 5)])
        rig.offer(0)
        assert rig.pop_one().readable.total == 9

    def test_a_table_may_have_more_entries_than_a_small_ring(self) -> None:
        _, rig = physical(size=2, indirect=True)
        rig.offer(rig.put_table(0, B, linked(*[Desc(A, 1)] * 1024)))
        assert rig.pop_one().readable.total == 1024

    def test_a_table_over_pages_whose_translations_differ(self) -> None:
        tables = Tables()
        rig = tables.rig(indirect=True)
        count = 600  # of 16 bytes, from the middle of a page on: four pages
        rows = linked(*[Desc(0x100000 + 3 * i, 3) for i in range(count)])
        tables.write(0x100000, bytes(i % 253 for i in range(3 * count)))
        rig.offer(rig.put_table(0, 0x20000 + PAGE - 8 * 16, rows))
        for iova in (0x1000, 0x2000, 0x3000):
            tables.tell(iova, 1)
        tables.tell(0x20000, PAGE + 16 * count)
        tables.tell(0x100000, 3 * count)
        physical_pages = [tables.pages[0x20000 + PAGE * i] for i in range(4)]
        assert any(b - a != PAGE for a, b in pairwise(physical_pages))
        chain = rig.pop_one()
        assert chain.readable.read() == bytes(i % 253 for i in range(3 * count))

    def test_a_descriptor_over_two_pages(self) -> None:
        tables = Tables()
        rig = tables.rig(indirect=True)
        tables.write(0x50000, b"x" * 32)
        rig.offer(
            rig.put_table(0, 0x20000 + PAGE - 24, linked(Desc(0x50000, 16), Desc(0x50010, 16)))
        )
        for iova in (0x1000, 0x2000, 0x3000, 0x20000, 0x21000, 0x50000):
            tables.tell(iova, 1)
        assert rig.pop_one().readable.read() == b"x" * 32


class TestScattered:
    def test_a_buffer_of_many_fragments(self) -> None:
        tables = Tables(0x300000)
        rig = tables.rig()
        for iova in (0x1000, 0x2000, 0x3000):
            tables.tell(iova, 1)
        data = random.Random(1).randbytes(200 * PAGE)
        tables.write(0x100007, data)
        tables.tell(0x100007, len(data))
        rig.offer(rig.put_chain(0, Desc(0x100007, len(data)), Desc(0x400FFF, 4098, WRITE)))
        tables.tell(0x400FFF, 4098)
        chain = rig.pop_one()
        assert chain.readable.read() == data
        assert chain.readable.count > 150
        assert sum(size for _, size in chain.readable.fragments()) == len(data)
        chain.writable.write(bytes(i % 251 for i in range(4098)))
        assert tables.read(0x400FFF, 4098) == bytes(i % 251 for i in range(4098))

    @pytest.mark.parametrize("event_idx", [False, True])
    @pytest.mark.parametrize("offset", [0, 16, 2048, PAGE - 16])
    def test_a_ring_of_512_over_pages_that_lie_anywhere(self, offset: int, event_idx: bool) -> None:
        tables = Tables(seed=offset)
        rig = tables.rig(
            size=512,
            desc=0x100000 + offset,
            avail=0x200000 + offset + 8,
            used=0x300000 + offset + 4,
            event_idx=event_idx,
        )
        tables.tell(rig.desc, 8192)
        tables.tell(rig.avail, 6 + 1024)
        tables.tell(rig.used, 6 + 4096)
        tables.tell(0x10000, PAGE)
        rng = random.Random(offset)
        given = 0
        for _ in range(20):
            batch = rng.randrange(1, 512)
            for i in range(batch):
                head = (given + i) % 512
                rig.put(head, Desc(0x10000 + head, 1 + head % 7, WRITE))
                rig.offer(head)
            taken: list[Chain] = []
            while len(taken) < batch:
                chains, misses = rig.ring.pop(rng.randrange(1, 200))
                assert misses == []
                taken += chains
            assert [chain.head for chain in taken] == [(given + i) % 512 for i in range(batch)]
            rng.shuffle(taken)
            for i, chain in enumerate(taken):
                rig.ring.complete(chain, chain.head % 7)
                if i % 100 == 99:
                    rig.ring.publish()
            rig.ring.publish()
            for i, chain in enumerate(taken):
                assert rig.used_entry(given + i) == (chain.head, chain.head % 7)
            given += batch
            assert rig.used_idx == given & 0xFFFF
            if event_idx:
                rig.ring.enable_kicks()
                assert rig.avail_event == given & 0xFFFF


class TestTaking:
    def test_nothing_is_available(self) -> None:
        _, rig = physical()
        assert rig.ring.pop() == ([], [])
        assert rig.ring.pop_faulty() is None

    @pytest.mark.capacity(RING_LOOK_WORK=1024)
    def test_order_is_the_drivers(self) -> None:
        _, rig = physical()
        for head in (6, 1, 3):
            rig.put(head, Desc(A, head))
        rig.offer(6, 1, 3)
        chains, _ = rig.ring.pop()
        assert [chain.readable.total for chain in chains] == [6, 1, 3]
        assert rig.ring.next_avail == 3
        assert rig.ring.outstanding == 3

    @pytest.mark.capacity(RING_LOOK_WORK=1024)
    def test_a_limit(self) -> None:
        _, rig = physical()
        for head in range(5):
            rig.put(head, Desc(A, 1))
        rig.offer(0, 1, 2, 3, 4)
        assert [c.head for c in rig.ring.pop(2)[0]] == [0, 1]
        assert rig.ring.pop(0) == ([], [])
        assert rig.ring.pop(-1) == ([], [])
        assert [c.head for c in rig.ring.pop()[0]] == [2, 3, 4]

    def test_entries_beyond_the_index_do_not_count(self) -> None:
        _, rig = physical()
        rig.put(0, Desc(A, 1))
        rig.offer(0)
        rig.view.write(rig.avail + 6, b"\xff\xff" * 7)
        rig.pop_one()

    @pytest.mark.capacity(RING_LOOK_WORK=1024)
    def test_it_begins_where_it_is_told(self) -> None:
        _, rig = physical(base=0xFFFE)
        rig.view.write(rig.used + 2, b"\xfe\xff")
        for head in range(4):
            rig.put(head, Desc(A, 1))
        rig.offer(0, 1, 2, 3)
        chains, _ = rig.ring.pop()
        assert [chain.head for chain in chains] == [0, 1, 2, 3]
        assert rig.ring.next_avail == 2
        for chain in chains:
            rig.ring.complete(chain, 0)
        rig.ring.publish()
        assert rig.used_idx == rig.ring.next_used == 2
        assert [rig.used_entry(0xFFFE + i)[0] for i in range(4)] == [0, 1, 2, 3]

    @pytest.mark.parametrize("event_idx", [False, True])
    @pytest.mark.parametrize("size", [1, 2, 8])
    def test_indices_wrap_at_16_bits(self, size: int, event_idx: bool) -> None:
        _, rig = physical(size=size, event_idx=event_idx)
        rig.put(0, Desc(A, 1, WRITE))
        for i in range(0x10000 + 3 * size):
            rig.offer(0)
            assert rig.finish(rig.pop_one(), 1) is not None
            if event_idx:
                rig.set_used_event(i & 0xFFFF)
        assert rig.used_idx == rig.ring.next_avail == 3 * size

    def test_the_largest_ring_can_be_full(self) -> None:
        memory = GuestRegionCollection.from_ranges([(0, 0x200000)])
        ring = SplitRing(memory._space, 32768, 0, 0x80000, 0x100000)
        memory.write(0, (0x180000.to_bytes(8, "little") + b"\1\0\0\0\2\0\0\0") * 32768)
        memory.write(0x80004, b"".join(i.to_bytes(2, "little") for i in range(32768)))
        memory.write(0x80002, (32768).to_bytes(2, "little"))
        chains, _ = ring.pop(40000)
        while more := ring.pop(40000)[0]:
            chains += more
        assert [chain.head for chain in chains] == list(range(32768))
        for chain in chains:
            ring.complete(chain, 1)
        assert ring.unpublished == 32768
        assert ring.publish()
        assert memory.read(0x100002, 2) == b"\0\x80"
        assert memory.read(0x100004 + 8 * 32767, 8) == b"\xff\x7f\0\0\1\0\0\0"


class TestGivingBack:
    def test_nothing_shows_before_publish(self) -> None:
        _, rig = physical()
        rig.put(4, Desc(A, 100, WRITE))
        rig.offer(4)
        rig.ring.complete(rig.pop_one(), 99)
        assert (rig.used_idx, rig.ring.unpublished, rig.ring.outstanding) == (0, 1, 0)
        assert rig.ring.publish()
        assert rig.used_idx == 1
        assert rig.used_entry(0) == (4, 99)
        assert rig.ring.unpublished == 0

    def test_nothing_to_publish(self) -> None:
        _, rig = physical()
        assert rig.ring.publish() is False

    @pytest.mark.capacity(RING_LOOK_WORK=1024)
    def test_out_of_order(self) -> None:
        _, rig = physical()
        for head in range(3):
            rig.put(head, Desc(A, 10, WRITE))
        rig.offer(0, 1, 2)
        chains, _ = rig.ring.pop()
        for i, n in ((2, 5), (0, 0), (1, 10)):
            rig.ring.complete(chains[i], n)
        rig.ring.publish()
        assert [rig.used_entry(i) for i in range(3)] == [(2, 5), (0, 0), (1, 10)]

    def test_only_the_used_ring_is_written(self) -> None:
        memory, rig = physical(0x20000)
        rig.put(1, Desc(A, 16, WRITE))
        rig.offer(1)
        before = memory.read(0, 0x20000)
        chain = rig.pop_one()
        assert memory.read(0, 0x20000) == before
        rig.finish(chain, 7)
        after = memory.read(0, 0x20000)
        used = rig.used + 2
        expected = before[:used] + b"\1\0\1\0\0\0\7\0\0\0" + before[used + 10 :]
        assert after == expected

    def test_twice(self) -> None:
        _, rig = physical()
        rig.put(0, Desc(A, 1))
        rig.offer(0)
        chain = rig.pop_one()
        rig.ring.complete(chain, 0)
        with pytest.raises(ValueError, match="request 0 was completed before"):
            rig.ring.complete(chain, 0)
        assert (rig.ring.outstanding, rig.ring.unpublished) == (0, 1)
        rig.ring.publish()
        with pytest.raises(ValueError, match="completed before"):
            rig.ring.complete(chain, 0)

    @pytest.mark.parametrize("bad", [17, 2**32, 2**64, -1, True, 1.0, None])
    def test_a_number_of_bytes_that_cannot_be(self, bad: object) -> None:
        _, rig = physical()
        rig.put_chain(0, Desc(A, 100), Desc(B, 16, WRITE))
        rig.offer(0)
        chain = rig.pop_one()
        with pytest.raises((ValueError, TypeError)):
            rig.ring.complete(chain, bad)  # type: ignore[arg-type]
        assert (rig.ring.outstanding, rig.ring.unpublished) == (1, 0)
        rig.finish(chain, 16)
        assert rig.used_entry(0) == (0, 16)

    def test_to_another_ring(self) -> None:
        _, rig = physical()
        rig.put(0, Desc(A, 1))
        rig.offer(0)
        chain = rig.pop_one()
        other = rig.device(0)
        for _ in range(20):
            with pytest.raises(ValueError, match="another ring"):
                other.complete(chain, 0)
        assert other.outstanding == other.unpublished == 0

    def test_a_finished_request_lets_its_memory_go(self) -> None:
        _, rig = physical()
        rig.put_chain(0, Desc(A, 8), Desc(B, 8, WRITE))
        rig.offer(0)
        chain = rig.pop_one()
        rig.ring.complete(chain, 0)
        assert (chain.readable.total, chain.writable.total) == (0, 0)

    def test_chains_have_no_constructor(self) -> None:
        with pytest.raises(TypeError, match="come from a ring"):
            Chain()


class TestDirty:
    def test_data_and_used_ring_are_marked_and_nothing_else(self) -> None:
        backing = Backing.memfd(0x20000)
        bitmap = AtomicBitmap(0x20000, 256)
        memory = GuestRegionCollection.from_regions([MmapRegion(0, backing, bitmap=bitmap)])
        ring = SplitRing(memory._space, 8, 0x1000, 0x2000, 0x30F8, indirect=True)
        memory.write(0x1000, A.to_bytes(8, "little") + b"\0\2\0\0\2\0\0\0")
        memory.write(0x2002, b"\1\0")
        bitmap.get_and_reset()
        ((chain,), _) = ring.pop()
        assert not any(bitmap.is_set(at) for at in range(0, 0x20000, 256))
        chain.writable.write(b"x" * 10)
        ring.complete(chain, 10)
        assert {at for at in range(0, 0x20000, 256) if bitmap.is_set(at)} == {A}
        ring.publish()
        # The index lies at the end of one granule, the first entry begins there and goes on in
        # the next one.
        marked = {at for at in range(0, 0x20000, 256) if bitmap.is_set(at)}
        assert marked == {A, 0x3000, 0x3100}


class TestArguments:
    @pytest.mark.parametrize("size", [0, 3, 65536, 32769, -1])
    def test_sizes(self, size: int) -> None:
        memory = GuestRegionCollection.from_ranges([(0, 0x10000)])
        with pytest.raises(ValueError, match=r"power of two|\[0, 2\*\*64\)"):
            SplitRing(memory._space, size, 0, 0x1000, 0x2000)

    @pytest.mark.parametrize("bad", [True, 1.5, None, "0"])
    @pytest.mark.parametrize("which", ["size", "desc", "avail", "used", "base"])
    def test_types(self, which: str, bad: object) -> None:
        memory = GuestRegionCollection.from_ranges([(0, 0x10000)])
        arguments: dict[str, object] = {"size": 8, "desc": 0, "avail": 0x1000, "used": 0x2000}
        with pytest.raises(TypeError):
            SplitRing(memory._space, **(arguments | {which: bad}))  # type: ignore[arg-type]

    def test_there_must_be_a_space(self) -> None:
        with pytest.raises(TypeError):
            SplitRing(None, 8, 0, 0x1000, 0x2000)  # type: ignore[arg-type]
