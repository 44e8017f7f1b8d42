"""The memory management of the scripted guest's kernel."""

from __future__ import annotations

import socket
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestio.addr import Permissions
from guestio.errors import DeviceError
from guestio.guest.dma import PAGE, DmaSpace, IovaAllocator, PageAllocator
from guestio.memory import GuestRegionCollection
from guestio.vhost_user.iotlb_service import IotlbService
from guestio.vhost_user.request_channel import RequestChannel

if TYPE_CHECKING:
    from collections.abc import Iterator

RW = Permissions.READ_WRITE
PAGES = 64


@pytest.fixture
def memory() -> GuestRegionCollection:
    half = PAGES // 2 * PAGE
    return GuestRegionCollection.from_ranges([(0, half), (1 << 32, half)])


class Space:
    """A DmaSpace whose unmaps are acknowledged at once."""

    def __init__(self, memory: GuestRegionCollection, mode: str, *, reuse: bool = True) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.exchange = RequestChannel(self.ours, 5)
        self.iotlb = IotlbService(self.exchange, answer="caller", granularity=PAGE, pipeline=1)
        self.told: list[tuple[int, int]] = []
        self.iotlb.invalidate = lambda *ranges: self.told.extend(ranges)  # type: ignore[method-assign]
        self.pages = PageAllocator(memory, 3)
        self.dma = DmaSpace(memory, self.pages, self.iotlb, mode, reuse=reuse)  # type: ignore[arg-type]

    def close(self) -> None:
        self.exchange.close()
        self.theirs.close()


@pytest.fixture
def strict(memory: GuestRegionCollection) -> Iterator[Space]:
    made = Space(memory, "strict")
    yield made
    made.close()


class TestPages:
    def test_scattered_but_repeatable(self, memory: GuestRegionCollection) -> None:
        first, second = PageAllocator(memory, 1), PageAllocator(memory, 1)
        pages = first.take(16)
        assert pages == second.take(16)
        assert pages != PageAllocator(memory, 2).take(16)
        assert sum(b == a + PAGE for a, b in pairwise(pages)) < 8

    def test_every_page_once(self, memory: GuestRegionCollection) -> None:
        pages = PageAllocator(memory, 1)
        taken = pages.take(PAGES)
        assert len(set(taken)) == PAGES
        assert all(memory.check_range(gpa, PAGE) for gpa in taken)
        assert pages.free == 0
        with pytest.raises(DeviceError, match="1 pages wanted, 0 free"):
            pages.take(1)
        pages.give(taken)
        assert pages.free == PAGES

    def test_runs(self, memory: GuestRegionCollection) -> None:
        pages = PageAllocator(memory, 1)
        run = pages.take(32, contiguous=True)
        assert run == list(range(run[0], run[0] + 32 * PAGE, PAGE))
        with pytest.raises(DeviceError, match="in one piece"):
            pages.take(33, contiguous=True)
        pages.give(run)
        again = pages.take(PAGES)
        assert sorted(again) == sorted(set(again))

    @given(st.lists(st.tuples(st.integers(1, 12), st.booleans(), st.booleans()), max_size=40))
    def test_no_page_is_ever_handed_out_twice(self, steps: list[tuple[int, bool, bool]]) -> None:
        memory = GuestRegionCollection.from_ranges([(0, PAGES * PAGE)])
        pages = PageAllocator(memory, 1)
        held: list[list[int]] = []
        for count, contiguous, give in steps:
            if give and held:
                pages.give(held.pop(0))
                continue
            try:
                held.append(pages.take(count, contiguous=contiguous))
            except DeviceError:
                continue
            everything = [gpa for each in held for gpa in each]
            assert len(everything) == len(set(everything))
            assert pages.free == PAGES - len(everything)


class TestIovas:
    def test_top_down_and_quick_reuse(self) -> None:
        iovas = IovaAllocator(reuse=True)
        first, second = iovas.take(1), iovas.take(4)
        assert second == first - 4 * PAGE
        assert first < 1 << 32
        iovas.give(first, 1)
        assert iovas.take(4) == second - 4 * PAGE
        assert iovas.take(1) == first

    def test_fresh_ones(self) -> None:
        iovas = IovaAllocator(reuse=False)
        first = iovas.take(1)
        iovas.give(first, 1)
        assert iovas.take(1) == first - PAGE

    def test_above_4_gib_once_below_is_used_up(self) -> None:
        iovas = IovaAllocator(reuse=False)
        iovas.take((1 << 20) - 8)
        assert iovas.take(16) == (1 << 47) - 16 * PAGE


class TestBuffers:
    def test_contents_go_to_the_pages(self, memory: GuestRegionCollection, strict: Space) -> None:
        buffer = strict.dma.buffer(3 * PAGE, offset=100)
        assert len(buffer.pages) == 4
        data = bytes(i % 251 for i in range(3 * PAGE))
        buffer.memory.write(data)
        pieces = buffer.pieces(0, 3 * PAGE)
        assert b"".join(memory.read(*piece) for piece in pieces) == data
        assert pieces[0][0] == buffer.pages[0] + 100

    @settings(deadline=None)
    @given(
        length=st.integers(1, 5 * PAGE),
        offset=st.integers(0, PAGE - 1),
        contiguous=st.booleans(),
        data=st.data(),
    )
    def test_pieces_are_what_the_pages_say(
        self, length: int, offset: int, contiguous: bool, data: st.DataObject
    ) -> None:
        memory = GuestRegionCollection.from_ranges([(0, PAGES * PAGE)])
        space = Space(memory, "off")
        buffer = space.dma.buffer(length, offset=offset, contiguous=contiguous)
        at = data.draw(st.integers(0, length - 1))
        size = data.draw(st.integers(1, length - at))
        mapped: list[tuple[int, int]] = []
        segments = space.dma.map(buffer, at, size, RW, mapped)
        assert not mapped
        flat = [gpa + i for gpa, n in segments for i in (0, n - 1)]
        assert sum(n for _, n in segments) == size
        position = offset + at
        assert flat[0] == buffer.pages[position // PAGE] + position % PAGE
        position += size - 1
        assert flat[-1] == buffer.pages[position // PAGE] + position % PAGE
        assert len(segments) == 1 or not contiguous
        space.close()

    def test_released_pages_come_back(self, strict: Space) -> None:
        buffers = [strict.dma.buffer(PAGE + 1) for _ in range(10)]
        assert strict.pages.free == PAGES - 20
        strict.dma.release(*buffers)
        assert strict.pages.free == PAGES


class TestMapping:
    @settings(deadline=None)
    @given(length=st.integers(1, 5 * PAGE), offset=st.integers(0, PAGE - 1), data=st.data())
    def test_a_mapping_leads_to_the_buffer(
        self, length: int, offset: int, data: st.DataObject
    ) -> None:
        memory = GuestRegionCollection.from_ranges([(0, PAGES * PAGE)])
        space = Space(memory, "strict")
        buffer = space.dma.buffer(length, offset=offset)
        at = data.draw(st.integers(0, length - 1))
        size = data.draw(st.integers(1, length - at))
        mapped: list[tuple[int, int]] = []
        ((iova, told),) = space.dma.map(buffer, at, size, Permissions.WRITE, mapped)
        assert told == size
        assert iova % PAGE == (offset + at) % PAGE
        found = space.iotlb.mappings.lookup(iova, size, Permissions.WRITE)
        flat = [(base + i) for base, n in found for i in range(n)]
        wanted = [gpa + i for gpa, n in buffer.pieces(at, size) for i in range(n)]
        assert flat == wanted
        ((first, covered),) = mapped
        assert first <= iova
        assert iova + size <= first + covered
        assert covered % PAGE == first % PAGE == 0
        space.dma.unmap(mapped)
        assert len(space.iotlb.mappings) == 0
        assert space.told == mapped
        space.close()

    def test_permissions_are_the_ones_asked_for(self, strict: Space) -> None:
        buffer = strict.dma.buffer(PAGE)
        strict.dma.map(buffer, 0, 16, Permissions.READ, [])
        strict.dma.map(buffer, 16, 1, Permissions.WRITE, [])
        assert {perm for _, _, perm in strict.iotlb.mappings} == {
            Permissions.READ,
            Permissions.WRITE,
        }

    def test_the_same_page_twice_has_two_addresses(self, strict: Space) -> None:
        buffer = strict.dma.buffer(PAGE)
        ((first, _),) = strict.dma.map(buffer, 0, 16, RW, [])
        ((second, _),) = strict.dma.map(buffer, 16, 16, RW, [])
        assert first // PAGE != second // PAGE

    def test_static_mappings_stay_until_the_buffer_goes(
        self, memory: GuestRegionCollection
    ) -> None:
        space = Space(memory, "static")
        buffer = space.dma.buffer(4 * PAGE)
        mapped: list[tuple[int, int]] = []
        ((first, _),) = space.dma.map(buffer, 0, 100, RW, mapped)
        ((second, _),) = space.dma.map(buffer, PAGE, 100, RW, mapped)
        assert second == first + PAGE
        assert not mapped
        space.dma.release(buffer)
        assert space.told == [(first, 4 * PAGE)]
        assert len(space.iotlb.mappings) == 0
        space.close()
