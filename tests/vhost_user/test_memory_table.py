"""The memory table: a front-end's addresses, the guest's, and where they are in this process."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestio.errors import BackingError, InvalidAddressError
from guestio.vhost_user.memory import SharedMemory
from guestio.vhost_user.messages import MemoryRegion

PAGE = 4096
USER = 0x7F0000000000
TOP = 2**64


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("table")
    os.ftruncate(made, 0x100000)
    yield made
    os.close(made)


def mappings() -> int:
    """How often the test's file is mapped."""
    return Path("/proc/self/maps").read_text().count("memfd:table")


def region(guest: int, size: int, user: int, offset: int = 0) -> MemoryRegion:
    return MemoryRegion(guest, size, user, offset)


def test_nothing_is_shared_at_first() -> None:
    shared = SharedMemory()
    assert len(shared.memory) == 0
    with pytest.raises(InvalidAddressError, match="does not share"):
        shared.guest_address(0, 1)
    assert shared.guest_ranges(5, 0) == []


def test_regions_show_their_part_of_the_file(fd: int) -> None:
    os.pwrite(fd, b"first", 0x4000)
    os.pwrite(fd, b"second", 0x10008)
    shared = SharedMemory().replaced(
        [
            (region(0x80000000, 0x8000, USER, 0x4000), fd),
            (region(0, 0x1000, USER + 0x100000, 0x10008), fd),
        ]
    )
    assert shared.memory.read(0x80000000, 5) == b"first"
    assert shared.memory.read(0, 6) == b"second"
    shared.memory.write(0x80007FFE, b"ab")
    assert os.pread(fd, 2, 0xBFFE) == b"ab"
    assert shared.guest_address(USER + 0x1234, 4) == 0x80001234
    assert shared.guest_address(USER + 0x100000, 0x1000) == 0


def test_many_regions_of_one_fd_that_may_even_overlap_in_the_file(fd: int) -> None:
    shared = SharedMemory().replaced(
        [(region(0x100000 * i, 0x2000, USER + 0x10000 * i, 0x1000 * i), fd) for i in range(8)]
    )
    shared.memory.write(0x1000, b"same")
    assert shared.memory.read(0x100000, 4) == b"same"


class TestRanges:
    @pytest.fixture
    def shared(self, fd: int) -> SharedMemory:
        # Neighbors for the front-end: the first two also for the guest, the third is not.
        return SharedMemory().replaced(
            [
                (region(0x1000, 0x1000, USER), fd),
                (region(0x2000, 0x1000, USER + 0x1000), fd),
                (region(0x9000, 0x1000, USER + 0x2000), fd),
                (region(0x20000, 0x2000, TOP - 0x2000), fd),
            ]
        )

    def test_over_regions(self, shared: SharedMemory) -> None:
        assert shared.guest_ranges(USER + 0xFFF, 0x1002) == [
            (0x1FFF, 1),
            (0x2000, 0x1000),
            (0x9000, 1),
        ]
        assert shared.guest_ranges(USER, 1) == [(0x1000, 1)]
        assert shared.guest_ranges(USER + 0x2FFF, 1) == [(0x9FFF, 1)]

    def test_contiguous_for_the_guest(self, shared: SharedMemory) -> None:
        assert shared.guest_address(USER + 0x800, 0x1000) == 0x1800
        with pytest.raises(InvalidAddressError, match="not contiguous for the guest"):
            shared.guest_address(USER + 0x1800, 0x1000)

    def test_up_to_the_last_byte(self, shared: SharedMemory) -> None:
        assert shared.guest_ranges(TOP - 0x2000, 0x2000) == [(0x20000, 0x2000)]
        assert shared.guest_address(TOP - 1, 1) == 0x21FFF
        with pytest.raises(InvalidAddressError):
            shared.guest_ranges(TOP - 1, 2)

    @pytest.mark.parametrize(
        ("user", "size"),
        [
            (0, 1),
            (USER - 1, 1),
            (USER - 1, 2),
            (USER + 0x3000, 1),
            (USER + 0x2FFF, 2),
            (USER, 2**63),
            (TOP - 0x2001, 1),
        ],
    )
    def test_what_is_not_shared(self, shared: SharedMemory, user: int, size: int) -> None:
        with pytest.raises(InvalidAddressError, match="does not share that address"):
            shared.guest_ranges(user, size)

    def test_the_same_as_a_map(self, shared: SharedMemory) -> None:
        entries = [(tuple(a), tuple(b)) for a, b, _ in shared.user_addresses()]
        # Neighbors that are contiguous on both sides are one entry.
        assert entries == [
            ((USER, 0x2000), (0x1000, 0x2000)),
            ((USER + 0x2000, 0x1000), (0x9000, 0x1000)),
            ((TOP - 0x2000, 0x2000), (0x20000, 0x2000)),
        ]


class TestChanges:
    def test_adding_and_removing_makes_other_tables(self, fd: int) -> None:
        first = SharedMemory().adding(region(0x1000, 0x1000, USER), fd)
        second = first.adding(region(0x5000, 0x1000, USER + 0x10000, 0x1000), fd)
        third = second.removing(region(0x1000, 0x1000, USER))
        assert [len(each.memory) for each in (first, second, third)] == [1, 2, 1]
        assert third.guest_address(USER + 0x10000, 1) == 0x5000
        with pytest.raises(InvalidAddressError):
            third.guest_address(USER, 1)
        assert second.guest_address(USER, 1) == 0x1000

    def test_memory_is_unmapped_with_the_last_table_that_has_it(self, fd: int) -> None:
        gc.disable()
        try:
            before = mappings()
            shared = SharedMemory().adding(region(0x1000, 0x1000, USER), fd)
            shared = shared.adding(region(0x5000, 0x1000, USER + 0x10000, 0x1000), fd)
            assert mappings() == before + 2
            shared = shared.removing(region(0x5000, 0x1000, USER + 0x10000, 0x1000))
            assert mappings() == before + 1
            shared = shared.replaced([])
            assert mappings() == before
            assert len(shared.memory) == 0
        finally:
            gc.enable()

    @pytest.mark.parametrize("bad", [region(0, 0x1000, 0, 0x100000), region(0, 2**40, 0)])
    def test_a_region_that_cannot_be_mapped_leaves_none(self, fd: int, bad: MemoryRegion) -> None:
        gc.disable()
        try:
            before, fds = mappings(), sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
            with pytest.raises(BackingError):
                SharedMemory().replaced([(region(0x100000, 0x1000, USER), fd), (bad, fd)])
            assert mappings() == before
            assert sorted(os.listdir("/proc/self/fd")) == fds  # noqa: PTH208
        finally:
            gc.enable()

    def test_fds_that_cannot_be_mapped(self) -> None:
        reader, writer = os.pipe()
        null = os.open("/dev/null", os.O_RDWR)
        event = os.eventfd(0)
        directory = os.open("/", os.O_RDONLY)
        for bad in (reader, writer, event, directory):
            with pytest.raises(BackingError):
                SharedMemory().adding(region(0, PAGE, USER), bad)
        with pytest.raises(BackingError):
            SharedMemory().adding(region(0, PAGE, USER), null)
        for each in (reader, writer, null, event, directory):
            os.close(each)

    def test_a_file_that_may_only_be_read(self, tmp_path: Path) -> None:
        path = tmp_path / "ro"
        path.write_bytes(bytes(PAGE))
        with path.open("rb") as file, pytest.raises(BackingError):
            SharedMemory().adding(region(0, PAGE, USER), file.fileno())


def test_written_pages_are_tracked_if_wanted(fd: int) -> None:
    shared = SharedMemory(track_dirty=True).replaced([(region(0x10000, 0x8000, USER), fd)])
    shared = shared.adding(region(0x100000, 0x2000, USER + 0x10000, 0x8000), fd)
    shared.memory.write(0x12FFF, b"ab")
    shared.memory.write(0x100000, b"c")
    first, second = shared.memory
    assert first.bitmap is not None
    assert second.bitmap is not None
    assert (first.bitmap.count(), second.bitmap.count()) == (2, 1)
    assert all(
        each.bitmap is None for each in SharedMemory().replaced([(region(0, 1, 0), fd)]).memory
    )
