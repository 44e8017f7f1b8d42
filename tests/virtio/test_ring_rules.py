"""Rings that break the rules: the queue stops with a clear error and nothing else happens.

Rules: virtio 1.3 section 2.7.5 to 2.7.8 and 2.7.13.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pytest

from guestio._core.virtio.chain import Chain
from guestio._core.virtio.split import SplitRing
from guestio.addr import IovaRange
from guestio.errors import MemoryVanishedError, QueueError
from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from tests.kit.rings import INDIRECT, NEXT, PAGE, WRITE, Desc, Rig, Tables, linked, physical

A, B, C = 0x10000, 0x11000, 0x12000
TOP = 2**64


def check_broken(rig: Rig, match: str, *, written: bool = False) -> None:
    """Popping fails, and so does everything after it; the used ring stays as it is."""
    with pytest.raises(QueueError, match=match):
        rig.ring.pop()
    assert rig.ring.broken is not None
    for use in (rig.ring.pop, rig.ring.pop_faulty, rig.ring.enable_kicks, rig.ring.missing):
        with pytest.raises(QueueError, match=match):
            use()
    if not rig.event_idx:
        with pytest.raises(QueueError, match=match):
            rig.ring.disable_kicks()
    if not written:
        assert rig.view.read(rig.used, 6 + 8 * rig.size) == bytes(6 + 8 * rig.size)
    # The same ring as another device finds it: not even a request to fail can be taken.
    with pytest.raises(QueueError, match=match):
        rig.device(rig.ring.next_avail).pop_faulty()


class TestDescriptors:
    def test_a_loop_to_itself(self) -> None:
        _, rig = physical()
        rig.put(0, Desc(A, 1, NEXT, 0))
        rig.offer(0)
        check_broken(rig, "the chain from descriptor 0 has a loop")

    def test_a_loop_through_the_whole_ring(self) -> None:
        _, rig = physical()
        for i in range(8):
            rig.put(i, Desc(A, 1, NEXT, (i + 3) % 8))
        rig.offer(5)
        check_broken(rig, "the chain from descriptor 5 has a loop")

    def test_a_loop_of_writable_descriptors_of_4_gib(self) -> None:
        _, rig = physical()
        for i in range(8):
            rig.put(i, Desc(A, 2**32 - 1, NEXT | WRITE, (i + 1) % 8))
        rig.offer(0)
        check_broken(rig, r"longer than 2\*\*32 bytes")

    @pytest.mark.parametrize("following", [8, 9, 0x8000, 0xFFFF])
    def test_a_link_out_of_the_ring(self, following: int) -> None:
        _, rig = physical()
        rig.put(0, Desc(A, 1, NEXT, following))
        rig.offer(0)
        check_broken(rig, f"descriptor index {following} is outside its table of 8")

    @pytest.mark.parametrize("head", [8, 0x7FFF, 0xFFFF])
    def test_a_head_out_of_the_ring(self, head: int) -> None:
        _, rig = physical()
        rig.offer(head)
        check_broken(rig, f"available entry names descriptor {head} of 8")

    @pytest.mark.parametrize("flags", [0, WRITE])
    def test_no_bytes(self, flags: int) -> None:
        _, rig = physical()
        rig.put_chain(0, Desc(A, 8), Desc(B, 0, flags), Desc(C, 1, WRITE))
        rig.offer(0)
        check_broken(rig, "a descriptor of 0 bytes in the chain from 0")

    def test_readable_after_writable(self) -> None:
        _, rig = physical()
        rig.put_chain(0, Desc(A, 1), Desc(B, 1, WRITE), Desc(C, 1))
        rig.offer(0)
        check_broken(rig, "device-readable descriptor after a device-writable one")

    @pytest.mark.parametrize("flags", [0, WRITE])
    @pytest.mark.parametrize(("addr", "length"), [(TOP - 1, 2), (TOP - 4096, 4097), (TOP - 8, 9)])
    def test_past_the_end_of_the_address_space(self, addr: int, length: int, flags: int) -> None:
        _, rig = physical()
        rig.put(0, Desc(addr, length, flags))
        rig.offer(0)
        check_broken(rig, r"passes 2\*\*64")

    @pytest.mark.parametrize("flags", [0, WRITE])
    def test_longer_than_a_chain_may_be(self, flags: int) -> None:
        # "total length ... larger than 2^32 bytes" is what a driver must not make (2.7.5.2).
        _, rig = physical()
        rig.put_chain(0, Desc(A, 2**32 - 1, flags), Desc(A, 2, flags))
        rig.offer(0)
        check_broken(rig, r"longer than 2\*\*32 bytes")

    def test_as_long_as_a_chain_may_be_is_only_out_of_memory(self) -> None:
        _, rig = physical()
        rig.put_chain(0, Desc(A, 2**32 - 1), Desc(A, 1))
        rig.offer(0)
        assert rig.pop_one().fault is not None

    def test_reserved_flags_mean_nothing(self) -> None:
        _, rig = physical()
        rig.put(0, Desc(A, 5, 0xFFF8))
        rig.offer(0)
        assert rig.pop_one().readable.total == 5


class TestIndirect:
    def test_not_negotiated(self) -> None:
        _, rig = physical()
        rig.offer(rig.put_table(0, B, [Desc(A, 1)]))
        check_broken(rig, "an indirect descriptor, but the feature was not negotiated")

    def test_nested(self) -> None:
        _, rig = physical(indirect=True)
        rig.view.write(C, struct.pack("<QIHH", A, 1, 0, 0))
        rig.offer(rig.put_table(0, B, linked(Desc(A, 1), Desc(C, 16, INDIRECT))))
        check_broken(rig, "an indirect descriptor inside an indirect table")

    def test_nested_in_itself(self) -> None:
        _, rig = physical(indirect=True)
        rig.offer(rig.put_table(0, B, [Desc(B, 16, INDIRECT)]))
        check_broken(rig, "inside an indirect table")

    def test_that_continues(self) -> None:
        _, rig = physical(indirect=True)
        rig.put_table(0, B, [Desc(A, 1)])
        rig.put(0, Desc(B, 16, INDIRECT | NEXT, 1))
        rig.put(1, Desc(A, 1))
        rig.offer(0)
        check_broken(rig, "an indirect descriptor that continues")

    @pytest.mark.parametrize("length", [0, 1, 15, 17, 16 * 1025, 16 * 65536, 2**32 - 16])
    def test_sizes_that_no_table_has(self, length: int) -> None:
        _, rig = physical(0x200000, indirect=True)
        rig.put_table(0, B, [Desc(A, 1)])
        rig.put(0, Desc(B, length, INDIRECT))
        rig.offer(0)
        check_broken(rig, f"an indirect table of {length} bytes")

    def test_a_large_ring_may_have_larger_tables(self) -> None:
        memory, rig = physical(
            0x200000, size=2048, desc=0x100000, avail=0x110000, used=0x120000, indirect=True
        )
        memory.write(0x10000, struct.pack("<QIHH", A, 1, 0, 0) * 2048)
        rig.put(0, Desc(0x10000, 16 * 2048, INDIRECT))
        rig.offer(0)
        assert rig.pop_one().readable.total == 1
        rig.put(0, Desc(0x10000, 16 * 2049, INDIRECT))
        rig.offer(0)
        check_broken(rig, "an indirect table of 32784 bytes")

    def test_past_the_end_of_the_address_space(self) -> None:
        _, rig = physical(indirect=True)
        rig.put(0, Desc(TOP - 16, 32, INDIRECT))
        rig.offer(0)
        check_broken(rig, r"an indirect table at 0xfffffffffffffff0 passes 2\*\*64")

    @pytest.mark.parametrize("following", [2, 3, 0xFFFF])
    def test_a_link_out_of_the_table(self, following: int) -> None:
        _, rig = physical(indirect=True)
        rig.offer(rig.put_table(0, B, [Desc(A, 1, NEXT, following), Desc(A, 1)]))
        check_broken(rig, f"descriptor index {following} is outside its table of 2")

    def test_a_loop(self) -> None:
        _, rig = physical(indirect=True)
        rig.offer(rig.put_table(3, B, [Desc(A, 1, NEXT, 1), Desc(A, 1, NEXT, 0)]))
        check_broken(rig, "the chain from descriptor 3 has a loop")

    def test_readable_after_writable_across_the_border(self) -> None:
        _, rig = physical(indirect=True)
        rig.put(0, Desc(A, 1, NEXT | WRITE, 1))
        rig.put_table(1, B, [Desc(A, 1)])
        rig.offer(0)
        check_broken(rig, "device-readable descriptor after")

    def test_too_long_across_the_border(self) -> None:
        _, rig = physical(indirect=True)
        rig.put(0, Desc(A, 2**32 - 1, NEXT, 1))
        rig.put_table(1, B, [Desc(A, 2, WRITE)])
        rig.offer(0)
        check_broken(rig, r"longer than 2\*\*32 bytes")

    def test_a_table_where_no_memory_is_fails_the_request_only(self) -> None:
        _, rig = physical(indirect=True)
        rig.put(0, Desc(0x10000000, 32, INDIRECT))
        rig.offer(0)
        assert rig.pop_one().fault == "no memory behind the indirect table at 0x10000000"

    def test_a_table_that_leaves_memory_fails_the_request_only(self) -> None:
        memory, rig = physical(0x20000, indirect=True)
        memory.write(0x1FFF0, struct.pack("<QIHH", A, 1, 0, 0))
        rig.put(0, Desc(0x1FFF0, 32, INDIRECT))
        rig.offer(0)
        chain = rig.pop_one()
        assert chain.fault == "no memory behind the indirect table at 0x20000"
        assert chain.readable.total == 0


class TestAvailableIndex:
    @pytest.mark.parametrize("index", [9, 0x7FFF, 0x8000, 0xFFFF])
    def test_ahead_of_the_ring(self, index: int) -> None:
        _, rig = physical()
        rig.set_avail_idx(index)
        check_broken(rig, f"available index {index} runs ahead of a ring of 8")

    @pytest.mark.capacity(RING_LOOK_WORK=1024)
    def test_backwards(self) -> None:
        _, rig = physical()
        rig.put(0, Desc(A, 1))
        rig.offer(0, 0, 0)
        rig.ring.pop()
        rig.set_avail_idx(2)
        with pytest.raises(QueueError, match="available index 2 runs ahead"):
            rig.ring.pop()

    @pytest.mark.capacity(RING_LOOK_WORK=1024)
    def test_requests_that_were_not_given_back_count(self) -> None:
        _, rig = physical()
        rig.put(0, Desc(A, 1))
        rig.offer(*[0] * 6)
        chains, _ = rig.ring.pop()
        rig.offer(0, 0)
        assert len(rig.ring.pop()[0]) == 2
        rig.offer(0)
        with pytest.raises(QueueError, match="with 8 requests not given back"):
            rig.ring.pop()
        assert rig.ring.outstanding == 8
        with pytest.raises(QueueError):
            rig.finish(chains[0])

    @pytest.mark.capacity(RING_LOOK_WORK=1024)
    def test_requests_that_were_given_back_but_not_shown_count(self) -> None:
        _, rig = physical()
        rig.put(0, Desc(A, 1))
        rig.offer(*[0] * 8)
        for chain in rig.ring.pop()[0]:
            rig.ring.complete(chain, 0)
        rig.offer(0)
        with pytest.raises(QueueError, match="with 8 requests not given back"):
            rig.ring.pop()

    def test_the_same_for_faulty_requests(self) -> None:
        _, rig = physical()
        rig.put(0, Desc(A, 1))
        rig.offer(*[0] * 8)
        for _ in range(8):
            chain = rig.ring.pop_faulty()
            assert chain is not None
            rig.ring.complete(chain, 0)
        assert rig.ring.pop_faulty() is None
        rig.offer(0)
        with pytest.raises(QueueError, match="runs ahead"):
            rig.ring.pop_faulty()
        assert rig.ring.unpublished == 8

    def test_a_ring_that_starts_in_the_middle(self) -> None:
        _, rig = physical(base=0xFFF0)
        rig.set_avail_idx(0xFFEF)
        check_broken(rig, "runs ahead of a ring of 8 whose next entry is 65520")

    def test_the_same_chain_twice_is_not_for_the_device_to_judge(self) -> None:
        _, rig = physical()
        rig.put(0, Desc(A, 1))
        rig.offer(0, 0)
        assert [chain.head for chain in rig.ring.pop()[0]] == [0, 0]


class TestAreas:
    @pytest.mark.parametrize(
        ("desc", "avail", "used"),
        [(0x1008, 0x2000, 0x3000), (0x1000, 0x2001, 0x3000), (0x1000, 0x2000, 0x3002)],
    )
    def test_misaligned(self, desc: int, avail: int, used: int) -> None:
        memory = GuestRegionCollection.from_ranges([(0, 0x10000)])
        with pytest.raises(QueueError, match="not aligned to 16, 2 and 4"):
            SplitRing(memory._space, 8, desc, avail, used)

    @pytest.mark.parametrize(
        "areas",
        [
            {"desc": TOP - 112},
            {"avail": TOP - 18},
            {"used": TOP - 64},
            {"avail": TOP - 20, "event_idx": True},
            {"used": TOP - 68, "event_idx": True},
        ],
    )
    def test_past_the_end_of_the_address_space(self, areas: dict[str, int]) -> None:
        memory = GuestRegionCollection.from_ranges([(0, 0x10000), (TOP - PAGE, PAGE)])
        places: dict[str, int] = {"desc": 0, "avail": 0x1000, "used": 0x2000} | areas
        ring = SplitRing(memory._space, 8, **places)  # type: ignore[arg-type]
        with pytest.raises(QueueError, match=r"passes 2\*\*64"):
            ring.pop()
        assert ring.broken is not None

    @pytest.mark.parametrize("which", ["desc", "avail", "used"])
    def test_where_no_memory_is(self, which: str) -> None:
        memory = GuestRegionCollection.from_ranges([(0, 0x10000)])
        places = {"desc": 0x1000, "avail": 0x2000, "used": 0x3000} | {which: 0x20000}
        ring = SplitRing(memory._space, 8, **places)
        with pytest.raises(QueueError, match="no usable memory behind the ring at 0x20000"):
            ring.pop()

    @pytest.mark.parametrize("which", ["desc", "avail", "used"])
    def test_that_leave_memory(self, which: str) -> None:
        memory = GuestRegionCollection.from_ranges([(0, 0x10000)])
        places = {"desc": 0x1000, "avail": 0x2000, "used": 0x3000} | {which: 0x10000 - 16}
        ring = SplitRing(memory._space, 8, **places)
        with pytest.raises(QueueError, match="no usable memory behind the ring at 0x10000"):
            ring.missing()

    def test_a_used_ring_that_cannot_be_written(self) -> None:
        with Backing.memfd(0x1000) as backing:
            assert backing.fd is not None
            read_only = MmapRegion(0x4000, Backing.from_fd(backing.fd, 0x1000, writable=False))
        memory = GuestRegionCollection.from_regions([MmapRegion.memfd(0, 0x4000), read_only])
        ring = SplitRing(memory._space, 8, 0x1000, 0x2000, 0x4000)
        with pytest.raises(QueueError, match="no usable memory behind the ring at 0x4000"):
            ring.pop()
        # The areas that are only read may well lie there.
        ring = SplitRing(memory._space, 8, 0x4000, 0x4800, 0x2000)
        assert ring.pop() == ([], [])

    def test_at_odd_host_addresses(self) -> None:
        # A front-end may share memory from any offset of a file: what is aligned for the guest
        # need not be so here, and a misaligned index cannot be published in one piece.
        with Backing.memfd(0x8000) as whole:
            assert whole.fd is not None
            backing = Backing.from_fd(whole.fd, 0x6000, 0x1001)
        memory = GuestRegionCollection.from_regions([MmapRegion(0, backing)])
        rig = Rig(memory._space, memory)
        rig.put(0, Desc(0x4000, 3, WRITE))
        rig.offer(0)
        chain = rig.pop_one()
        chain.writable.write(b"abc")
        rig.ring.complete(chain, 3)
        with pytest.raises(QueueError, match="misaligned in the host's memory"):
            rig.ring.publish()

    def test_an_index_split_over_mappings(self) -> None:
        tables = Tables()
        rig = tables.rig()
        for iova in (0x1000, 0x2000, 0x3000, A):
            tables.tell(iova, 1)
        # An IOMMU with granules of one byte: the used index lies in two of them.
        page = tables.pages[0x3000]
        perm = tables.iotlb._map.overlapping(0x3000, 1)[0][3]
        tables.iotlb.set_mapping(0x3003, page + 0x803, 1, perm)
        rig.put(0, Desc(A, 1))
        rig.offer(0)
        with pytest.raises(QueueError, match="0x3002 is split over mappings"):
            rig.finish(rig.pop_one())


class TestHoles:
    """Buffers where no memory is: the request fails, the ring lives."""

    @pytest.mark.capacity(RING_LOOK_WORK=1024)
    def test_a_buffer_outside_memory(self) -> None:
        _, rig = physical()
        rig.put_chain(0, Desc(A, 16), Desc(0x10000000, 512, WRITE), Desc(C, 1, WRITE))
        rig.put(7, Desc(A, 1))
        rig.offer(0, 7)
        (bad, good), _ = rig.ring.pop()
        assert bad.fault == "no usable memory behind the buffer at 0x10000000"
        assert bad.readable.total == 16
        assert bad.tail is not None
        assert bad.tail.fragments() == [(C, 1)]
        bad.tail.write(b"\1")
        assert rig.view.read(C, 1) == b"\1"
        assert good.fault is None
        rig.ring.complete(bad, 0)
        assert rig.finish(good)

    def test_a_buffer_that_leaves_memory(self) -> None:
        _, rig = physical(0x20000)
        rig.put_chain(0, Desc(0x1FFFC, 8, WRITE), Desc(C, 1, WRITE))
        rig.offer(0)
        chain = rig.pop_one()
        assert chain.fault == "no usable memory behind the buffer at 0x20000"
        assert chain.writable.total == 5
        assert chain.tail is not None

    def test_the_last_byte_itself_is_outside(self) -> None:
        _, rig = physical(0x20000)
        rig.put_chain(0, Desc(A, 4, WRITE), Desc(0x1FFFF, 2, WRITE))
        rig.offer(0)
        chain = rig.pop_one()
        assert chain.fault is not None
        assert chain.tail is None

    def test_a_readable_buffer_outside_leaves_the_last_byte(self) -> None:
        _, rig = physical()
        rig.put_chain(0, Desc(TOP - 1, 1), Desc(C, 5, WRITE))
        rig.offer(0)
        chain = rig.pop_one()
        assert chain.fault == f"no usable memory behind the buffer at {TOP - 1:#x}"
        assert chain.tail is not None
        assert chain.tail.fragments() == [(C + 4, 1)]

    def test_memory_that_cannot_be_written(self) -> None:
        with Backing.memfd(0x1000) as backing:
            assert backing.fd is not None
            read_only = MmapRegion(0x8000, Backing.from_fd(backing.fd, 0x1000, writable=False))
        memory = GuestRegionCollection.from_regions([MmapRegion.memfd(0, 0x8000), read_only])
        rig = Rig(memory._space, memory)
        rig.put_chain(0, Desc(0x8000, 8), Desc(0x8000, 8, WRITE))
        rig.offer(0)
        chain = rig.pop_one()
        assert chain.readable.total == 8
        assert chain.fault == "no usable memory behind the buffer at 0x8000"
        assert chain.tail is None


class TestTruncated:
    """The file behind the memory becomes shorter: the process lives, the queue stops."""

    SIZE = 0x20000

    def make(self, **options: bool) -> tuple[GuestRegionCollection, Rig, Callable[[int], None]]:
        backing = Backing.memfd(self.SIZE)
        memory = GuestRegionCollection.from_regions([MmapRegion(0, backing)])
        assert backing.fd is not None
        fd = backing.fd
        return memory, Rig(memory._space, memory, **options), lambda size: os.ftruncate(fd, size)

    def test_before_the_first_look(self) -> None:
        _, rig, truncate = self.make()
        truncate(0)
        with pytest.raises(QueueError, match="the file behind the ring's memory was truncated"):
            rig.ring.pop()
        with pytest.raises(QueueError, match="truncated"):
            rig.ring.pop()

    @pytest.mark.parametrize("keep", [0, 0x1000, 0x2000])
    def test_while_it_runs(self, keep: int) -> None:
        _, rig, truncate = self.make()
        rig.put(0, Desc(A, 1))
        rig.offer(0, 0, 0)
        rig.finish(rig.ring.pop(1)[0][0])
        truncate(keep)
        with pytest.raises(QueueError, match="the file behind the ring's memory was truncated"):
            rig.ring.pop()

    @pytest.mark.parametrize("event_idx", [False, True])
    @pytest.mark.parametrize("keep", [0x2000, 0x3000])
    def test_before_completions_are_shown(self, keep: int, event_idx: bool) -> None:
        _, rig, truncate = self.make(event_idx=event_idx)
        rig.put(0, Desc(A, 1))
        rig.offer(0)
        chain = rig.pop_one()
        truncate(keep)
        with pytest.raises(QueueError, match="the file behind the ring's memory was truncated"):
            rig.finish(chain)

    def test_when_notifications_are_switched(self) -> None:
        for event_idx in (False, True):
            _, rig, truncate = self.make(event_idx=event_idx)
            rig.ring.pop()
            truncate(0x2000)
            with pytest.raises(QueueError, match="truncated"):
                rig.ring.enable_kicks()

    def test_an_indirect_table(self) -> None:
        _, rig, truncate = self.make(indirect=True)
        rig.offer(rig.put_table(0, C, linked(Desc(A, 1), Desc(A, 1))))
        rig.put(1, Desc(0x8000, 4))
        rig.offer(1)
        truncate(0x10000)
        (bad, good), _ = rig.ring.pop()
        assert bad.fault == "the file behind its indirect table was truncated by its owner"
        assert good.readable.read() == bytes(4)
        rig.ring.complete(bad, 0)
        assert rig.finish(good)

    def test_the_rest_of_an_indirect_table(self) -> None:
        _, rig, truncate = self.make(indirect=True)
        rig.offer(rig.put_table(0, C + PAGE - 32, linked(*[Desc(0x8000 + i, 1) for i in range(4)])))
        truncate(C + PAGE)
        chain = rig.pop_one()
        assert chain.fault == "the file behind its indirect table was truncated by its owner"
        assert chain.readable.total == 2

    def test_a_buffer(self) -> None:
        _, rig, truncate = self.make()
        rig.put_chain(0, Desc(A, 8), Desc(B, 8, WRITE))
        rig.offer(0)
        chain = rig.pop_one()
        truncate(0x8000)
        with pytest.raises(MemoryVanishedError):
            chain.readable.read()
        with pytest.raises(MemoryVanishedError):
            chain.writable.write(bytes(8))
        assert rig.finish(chain)


class TestBounds:
    """However much the driver asks us to look at, a look takes little time and memory."""

    def test_large_chains_end_the_look_ahead(self) -> None:
        memory = GuestRegionCollection.from_ranges([(0, 0x200000)])
        ring = SplitRing(memory._space, 32768, 0, 0x80000, 0x100000)
        # One chain of all descriptors, offered again and again.
        memory.write(
            0,
            b"".join(struct.pack("<QIHH", 0x180000, 1, NEXT, i + 1) for i in range(32767))
            + struct.pack("<QIHH", 0x180000, 1, 0, 0),
        )
        memory.write(0x80002, (64).to_bytes(2, "little"))
        chains, misses = ring.pop()
        assert misses == []
        assert len(chains) == 1
        assert ring.next_avail == 1
        assert ring.enable_kicks() is True, "the others are announced as available still"
        assert len(ring.pop()[0]) == 1

    @pytest.mark.capacity(RING_LOOK_WORK=1024)
    def test_many_pieces_end_the_look_ahead(self) -> None:
        tables = Tables(0x100000)
        rig = tables.rig(size=64, desc=0x1000, avail=0x2000, used=0x3000)
        for iova in (0x1000, 0x2000, 0x3000):
            tables.tell(iova, 1)
        # Pages that repeat one byte of memory: 4096 pieces to a page.
        for i in range(4 * PAGE):
            tables.iotlb.set_mapping(
                0x100000 + i, 0x5000, 1, tables.iotlb._map.overlapping(0x1000, 1)[0][3]
            )
        for head in range(64):
            rig.put(head, Desc(0x100000, 4 * PAGE))
        rig.offer(*range(64))
        chains, _ = rig.ring.pop()
        assert len(chains) == 4
        assert all(chain.readable.count == 4 * PAGE for chain in chains)

    @pytest.mark.capacity(RING_LOOK_WORK=1024)
    def test_many_misses_end_the_look_ahead(self) -> None:
        tables = Tables()
        rig = tables.rig(size=1024, desc=0x10000, avail=0x20000, used=0x30000, indirect=True)
        tables.tell(0x10000, 16 * 1024)
        tables.tell(0x20000, 0x1000)
        tables.tell(0x30000, 0x4000)
        rows = linked(*[Desc(0x10000000 + i * PAGE, 1) for i in range(1024)])
        for head in range(128):
            rig.put_table(head, 0x40000, rows)
        tables.tell(0x40000, 16 * 1024)
        rig.offer(*range(128))
        chains, misses = rig.ring.pop(128)
        assert chains == []
        assert len(misses) == 64 * 1024
        assert misses[0] == (IovaRange(0x10000000, 1), 1)

    def test_too_many_pieces(self) -> None:
        tables = Tables(0x100000)
        rig = tables.rig(size=512, desc=0x10000, avail=0x20000, used=0x30000)
        for area in (0x10000, 0x20000, 0x30000):
            tables.tell(area, 0x3000)
        perm = tables.iotlb._map.overlapping(0x10000, 1)[0][3]
        for i in range(2 * PAGE):
            tables.iotlb.set_mapping(0x100000 + i, 0x5000, 1, perm)
        rig.put_chain(0, *[Desc(0x100000, 2 * PAGE)] * 512)
        rig.offer(0)
        with pytest.raises(QueueError, match="the chain from descriptor 0 is in too many pieces"):
            rig.ring.pop()


def test_nothing_is_taken_that_cannot_be_given_back() -> None:
    _, rig = physical()
    rig.put(0, Desc(A, 1))
    rig.put(1, Desc(A, 1, NEXT, 1))
    rig.offer(0, 1)
    with pytest.raises(QueueError, match="loop"):
        rig.ring.pop()
    assert rig.ring.broken is not None
    assert isinstance(rig.device(0).pop(1)[0][0], Chain)
