"""A dirty log in shared memory: which bits are set, and who may take them away."""

from __future__ import annotations

import os
import random
import threading

import numpy as np
import pytest

from guestio import Iommu, IommuMemory, Iotlb, Permissions
from guestio.errors import InvalidAddressError
from guestio.memory import (
    AtomicBitmap,
    Backing,
    DirtyLog,
    GuestRegionCollection,
    IoVector,
    MmapRegion,
)

PAGE = 4096
TOP = 2**64


def log_over(backing: Backing, size: int, offset: int = 0) -> DirtyLog:
    log = DirtyLog()
    log.use(backing._mapping, offset, size)
    log.enabled = True
    return log


def content(backing: Backing, size: int | None = None) -> bytes:
    assert backing.fd is not None
    return os.pread(backing.fd, backing.size if size is None else size, 0)


def as_bits(pages: set[int], size: int) -> bytes:
    """The specification's words: log[page / 8] |= 1 << page % 8."""
    made = bytearray(size)
    for page in pages:
        made[page // 8] |= 1 << page % 8
    return bytes(made)


@pytest.mark.parametrize("offset", [0, 1, 3, 8, 13])
def test_marks_are_the_bits_of_the_specification(offset: int) -> None:
    rng = random.Random(offset)
    size = 37
    for _ in range(300):
        backing = Backing.memfd(256)
        log = log_over(backing, size, offset)
        expected: set[int] = set()
        for _ in range(rng.randrange(1, 4)):
            start = rng.choice([rng.randrange(8 * size * PAGE), rng.randrange(TOP)])
            length = rng.choice([1, PAGE, PAGE + 1, rng.randrange(1, 80 * PAGE)])
            length = min(length, TOP - start)
            log.mark(start, length)
            last = (start + length - 1) // PAGE
            expected |= set(range(start // PAGE, min(last, 8 * size - 1) + 1))
        whole = bytes(offset) + as_bits(expected, size)
        assert content(backing) == whole.ljust(256, b"\0")
        assert log.take().tolist() == sorted(expected)
        assert content(backing) == bytes(256)
        log.clear()
        backing.close()


def test_marks_of_the_whole_address_space_stay_in_the_log() -> None:
    backing = Backing.memfd(64)
    log = log_over(backing, 10, 5)
    log.mark(0, TOP)
    assert content(backing) == bytes(5) + b"\xff" * 10 + bytes(49)
    assert log.lost > 0


def test_what_does_not_fit_is_counted() -> None:
    log = log_over(Backing.memfd(64), 1)
    log.mark(7 * PAGE, PAGE)
    assert log.lost == 0
    log.mark(8 * PAGE, 1)
    assert log.lost > 0
    log.lost = 0
    log.mark(7 * PAGE, PAGE + 1)
    assert log.lost == 1
    assert log.take().tolist() == [7]


def test_off_and_without_memory_nothing_is_marked() -> None:
    log = DirtyLog()
    log.mark(0, 1)
    assert (log.lost, log.size, log.enabled, log.vanished) == (0, 0, False, False)
    assert log.take().tolist() == []
    log.enabled = True
    log.mark(0, 1)
    assert log.lost == 1
    backing = Backing.memfd(64)
    log.use(backing._mapping, 0, 64)
    assert log.lost == 0
    log.enabled = False
    log.mark(0, 1)
    assert content(backing) == bytes(64)


def test_memory_stays_as_long_as_a_log_uses_it() -> None:
    first, second = Backing.memfd(64), Backing.memfd(64)
    log = log_over(first, 64)
    with pytest.raises(BufferError, match="in use"):
        first.close()
    log.use(second._mapping, 0, 64)
    first.close()
    log.mark(0, 1)
    log.clear()
    second.close()
    third = Backing.memfd(64)
    log.use(third._mapping, 0, 64)
    del log
    third.close()


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 0), (0, 65), (64, 1), (1, 64), (2**62, 1), (0, 2**62)]
)
def test_a_log_outside_of_its_memory(offset: int, size: int) -> None:
    backing = Backing.memfd(64)
    log = log_over(backing, 8)
    with pytest.raises(ValueError, match="not within"):
        log.use(backing._mapping, offset, size)
    log.mark(0, 1)
    assert content(backing, 1) == b"\x01"


def test_memory_that_cannot_be_written_is_refused() -> None:
    backing = Backing.memfd(64)
    assert backing.fd is not None
    log = DirtyLog()
    with pytest.raises(ValueError, match="writable"):
        log.use(Backing.from_fd(backing.fd, 64, writable=False)._mapping, 0, 64)
    backing.close()
    with pytest.raises(ValueError, match="must be mapped"):
        log.use(backing._mapping, 0, 64)


def test_bitmaps_mark_in_their_log_too() -> None:
    backing = Backing.memfd(64)
    log = log_over(backing, 64)
    both = AtomicBitmap(4 * PAGE, log=log, log_start=0x10000)
    only = AtomicBitmap(4 * PAGE, log=log, log_start=0x20000, own=False)
    assert (both.log, only.byte_size, only.pages, AtomicBitmap(1).log) == (log, 4 * PAGE, 0, None)
    both.set_range(PAGE, 1)
    only.set_range(2 * PAGE, TOP - 2 * PAGE)
    only.set_bit(0)
    both.set_bit(4)
    only.set_bit(4)
    assert log.take().tolist() == [0x11, 0x20, 0x22, 0x23]
    assert both.dirty_pages().tolist() == [1]
    assert only.count() == 0
    assert only.dirty_pages().tolist() == only.get_and_reset().tolist() == []
    assert only.copy().count() == 0
    only.reset()
    only.reset_range(0, PAGE)
    log.enabled = False
    both.set_range(0, PAGE)
    assert log.take().tolist() == []
    assert both.dirty_pages().tolist() == [0, 1]


def test_a_bitmap_ends_where_its_log_can() -> None:
    log = DirtyLog()
    with pytest.raises(InvalidAddressError):
        AtomicBitmap(2, log=log, log_start=TOP - 1)
    bitmap = AtomicBitmap(1, log=log, log_start=TOP - PAGE, own=False)
    bitmap.enlarge(PAGE - 1)
    with pytest.raises(InvalidAddressError):
        bitmap.enlarge(1)
    assert bitmap.byte_size == PAGE


def test_every_write_to_a_region_is_logged_by_its_address() -> None:
    log = log_over(Backing.memfd(PAGE), PAGE)
    start = 0x123000
    bitmap = AtomicBitmap(4 * PAGE, log=log, log_start=start, own=False)
    region = MmapRegion(start, Backing.memfd(4 * PAGE), bitmap=bitmap)
    memory = GuestRegionCollection.from_regions([region])
    memory.write(start + PAGE - 1, b"ab")
    assert log.take().tolist() == [0x123, 0x124]
    np.frombuffer(region.slice(2 * PAGE, 8), np.uint8)[0] = 1
    assert log.take().tolist() == [0x125]
    memory.fill(start + 3 * PAGE, 1, 7)
    assert log.take().tolist() == [0x126]


def test_gathered_memory_is_logged_piece_by_piece() -> None:
    """Windows of pieces of regions that have one log: with own bits too, beyond it, without it."""
    rng = random.Random(7)
    size = 64 * PAGE
    log = log_over(Backing.memfd(PAGE), 40)  # room for 320 pages
    # Where each begins in the log, and whether it has own bits.
    kinds = [
        (64 * PAGE, False),
        (128 * PAGE, True),
        (200 * PAGE + 77, False),  # its pages are not the log's
        (290 * PAGE, False),  # the log ends within
        (TOP - size, False),
        None,
    ]
    regions = []
    for number, kind in enumerate(kinds):
        bitmap = None
        if kind is not None:
            bitmap = AtomicBitmap(size, log=log, log_start=kind[0], own=kind[1])
        regions.append(MmapRegion(number * size, Backing.memfd(size), bitmap=bitmap))
    for _ in range(600):
        pieces, places = [], []
        few = rng.sample(range(len(kinds)), rng.randrange(1, 4))
        for _ in range(rng.randrange(1, 12)):
            region, at = (
                rng.choice(few),
                rng.choice([rng.randrange(size), PAGE * rng.randrange(64)]),
            )
            length = min(rng.choice([0, 1, 8, PAGE, PAGE + 1, 3 * PAGE]), size - at)
            pieces.append(regions[region].slice(at, length))
            places.append((region, at, length))
        vector = IoVector.of_slices(pieces, Permissions.WRITE)
        start = rng.randrange(vector.total + 1)
        count = rng.randrange(vector.total - start + 1)
        vector.fill(1, start, count)
        expected: set[int] = set()
        for region, at, length in places:
            skip = min(start, length)
            n = min(length - skip, count)
            start, count = start - skip, count - n
            kind = kinds[region]
            if kind is None or not n:
                continue
            first = kind[0] + at + skip
            last = first + n - 1
            expected |= set(range(first // PAGE, min(last // PAGE, 319) + 1))
        assert set(log.take().tolist()) == expected
        vector.close()


class Tables(Iommu):
    def __init__(self) -> None:
        self._iotlb = Iotlb()

    @property
    def iotlb(self) -> Iotlb:
        return self._iotlb


@pytest.mark.parametrize("room", [1024 // 8, 260 // 8, 1])
def test_scattered_pages_of_regions_are_logged(room: int) -> None:
    """As a request's are: windows of pages that lie anywhere, in regions with one log."""
    rng = random.Random(room)
    log = log_over(Backing.memfd(PAGE), room)
    # By the page they begin with; not each one of them begins with a byte of the log.
    begins = (0, 8, 16 * 8, 129 + 8 * 4, 256, 500)
    regions = []
    for begin in begins:
        bitmap = AtomicBitmap(8 * PAGE, log=log, log_start=begin * PAGE, own=False)
        backing = Backing.memfd(8 * PAGE)
        regions.append(MmapRegion(begin * PAGE, backing, bitmap=bitmap if begin != 256 else None))
    iommu = Tables()
    memory = IommuMemory(GuestRegionCollection.from_regions(regions), iommu)
    for _ in range(300):
        pages = [rng.choice(begins[:: rng.choice([1, 5])]) + rng.randrange(8) for _ in range(40)]
        for at, page in enumerate(pages):
            iommu.iotlb.set_mapping(at * PAGE, page * PAGE, PAGE, Permissions.READ_WRITE)
        start = rng.randrange(39 * PAGE)
        count = rng.choice([1, PAGE, rng.randrange(1, 40 * PAGE - start)])
        memory.fill(start, count, 1)
        touched = pages[start // PAGE : (start + count - 1) // PAGE + 1]
        assert set(log.take().tolist()) == {
            page for page in touched if page < 8 * room and not 256 <= page < 264
        }


def test_a_log_whose_file_was_cut_kills_nothing() -> None:
    fd = os.memfd_create("log")
    os.ftruncate(fd, 2 * PAGE)
    log = log_over(Backing.from_fd(fd, 2 * PAGE), 2 * PAGE)
    log.mark(0, 1)
    os.ftruncate(fd, PAGE)
    assert not log.vanished  # nothing has met the hole
    log.mark(0, TOP)
    assert log.vanished
    assert os.pread(fd, PAGE, 0) == b"\xff" * PAGE
    os.ftruncate(fd, 0)
    log.mark(0, 1)
    log.take()
    os.close(fd)


def test_no_mark_is_lost_while_bits_are_taken() -> None:
    """Each page is written with a number and then marked; the taker sees the last in the end."""
    pages, rounds = 64, 400
    backing = Backing.memfd(8)
    log = log_over(backing, 8)
    taker = log_over(backing, 8)
    memory = Backing.memfd(pages * PAGE)
    region = MmapRegion(
        0, memory, bitmap=AtomicBitmap(pages * PAGE, log=log, log_start=0, own=False)
    )
    collection = GuestRegionCollection.from_regions([region])
    seen = [0] * pages
    over = threading.Event()

    def take() -> None:
        for page in taker.take().tolist():
            seen[page] = collection.load(page * PAGE, 8)

    def always() -> None:
        while not over.is_set():
            take()

    thread = threading.Thread(target=always)
    thread.start()
    for number in range(1, rounds):
        for page in range(pages):
            collection.store(page * PAGE, number, 8)
    over.set()
    thread.join()
    take()
    assert seen == [rounds - 1] * pages
