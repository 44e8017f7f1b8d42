"""Data moves between the image and exactly the pages that a command names."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from guestio.addr import Permissions
from tests.kit.nvme_driver import (
    COMPARE,
    DATASET,
    DNR,
    FLUSH,
    PAGE,
    READ,
    VERIFY,
    WRITE,
    ZEROES,
    NvmeDriver,
    move,
)

MODEL_PAGES = 160
ROUNDS = 120
MAX = 512 << 10


class Model:
    """The image and a stretch of the driver's memory, as they should be."""

    def __init__(self, driver: NvmeDriver, image: Path, seed: int) -> None:
        self.driver, self.path = driver, image
        self.image = bytearray(image.read_bytes())
        self.base = driver.take(MODEL_PAGES)
        self.memory = bytearray(os.urandom(MODEL_PAGES * PAGE))
        driver.put(self.base, bytes(self.memory))
        self.random = random.Random(seed)

    def check(self) -> None:
        assert self.driver.get(self.base, len(self.memory)) == self.memory
        assert self.path.read_bytes() == self.image

    def prps(self, length: int) -> tuple[dict[str, int], list[tuple[int, int]]]:
        """Random PRPs for a length, and what they are: offset in the memory, bytes."""
        offset = self.random.randrange(0, PAGE, 4) if self.random.random() < 0.5 else 0
        count = (offset + length + PAGE - 1) // PAGE
        pages = self.random.sample(range(MODEL_PAGES), count)
        if self.random.random() < 0.3:
            first = self.random.randrange(MODEL_PAGES - count + 1)
            pages = list(range(first, first + count))
        extents, left = [], length
        for place, page in enumerate(pages):
            skip = 0 if place else offset
            size = min(left, PAGE - skip)
            extents.append((page * PAGE + skip, size))
            left -= size
        where = self.driver.prps([self.base + page * PAGE for page in pages], offset)
        return where, extents

    def sgl(self, length: int) -> tuple[bytes, list[tuple[int, int]]]:
        """A random SGL for a length, of one descriptor or a segment, and what it is."""
        count = min(self.random.choice([1, 1, 2, 5, 17]), length)
        cuts = sorted(self.random.sample(range(1, length), count - 1)) if count > 1 else []
        sizes = [end - start for start, end in zip([0, *cuts], [*cuts, length], strict=True)]
        # Regions that do not touch each other, so that the order of writes has no effect.
        room = len(self.memory) // count
        extents = []
        for place, size in enumerate(sizes):
            if size > room:
                return self.sgl(length)
            extents.append((place * room + self.random.randrange(room - size + 1), size))
        self.random.shuffle(extents)
        made = [struct.pack("<QI3xB", self.base + at, size, 0) for at, size in extents]
        if len(made) == 1:
            return made[0], extents
        page = self.driver.take()
        self.driver.put(page, b"".join(made))
        return struct.pack("<QI3xB", page, 16 * len(made), 0x30), extents

    def run(self) -> None:
        blocks = self.random.choice([1, 2, 7, 8, 9, 64, 128, MAX // 512])
        first = self.random.randrange(len(self.image) // 512 - blocks + 1)
        length, at = blocks * 512, first * 512
        reading = self.random.random() < 0.5
        if self.random.random() < 0.5:
            where, extents = self.prps(length)
            what = move(1, first, blocks, **where)
        else:
            sgl, extents = self.sgl(length)
            what = move(1, first, blocks, sgl=sgl, flags=0x40)
        self.driver.good(1, READ if reading else WRITE, **what)
        for start, size in extents:
            if reading:
                self.memory[start : start + size] = self.image[at : at + size]
            else:
                self.image[at : at + size] = self.memory[start : start + size]
            at += size


@pytest.mark.parametrize("fast", [True, False], ids=["in the core", "in Python"])
@pytest.mark.parametrize("seed", range(3))
def test_random_commands_move_exactly_their_data(
    driver: NvmeDriver, image: Path, fast: bool, seed: int
) -> None:
    model = Model(driver, image, seed)
    driver.device._queues.fast = fast
    before = driver.device._queues.served
    for _ in range(ROUNDS if fast else ROUNDS // 3):
        free = driver._free
        model.run()
        driver._free = free
    model.check()
    served = driver.device._queues.served - before
    assert served == (ROUNDS if fast else 0)


def test_pages_that_an_iommu_scatters(driver: NvmeDriver, image: Path) -> None:
    data = image.read_bytes()
    base = driver.take(64)
    page = (base - 0x10_0000_0000) // PAGE
    driver.map_each(page, 64)
    where = driver.prps([base + n * PAGE for n in range(64)])
    served = driver.device._queues.served
    driver.good(1, READ, **move(1, 8, 512, **where))
    assert driver.get(base, 64 * PAGE) == data[4096 : 4096 + 64 * PAGE]
    assert driver.device._queues.served == served + 1


def test_a_list_that_begins_in_its_last_entry_is_chained(driver: NvmeDriver, image: Path) -> None:
    pages = [driver.take() for _ in range(4)]
    lists = [driver.take(), driver.take()]
    driver.put(lists[0] + PAGE - 8, struct.pack("<Q", lists[1]))
    driver.put(lists[1], struct.pack("<3Q", *pages[1:]))
    for fast in (True, False):
        driver.device._queues.fast = fast
        for page in pages:
            driver.put(page, bytes(PAGE))
        driver.good(1, READ, **move(1, 0, 32, prp1=pages[0], prp2=lists[0] + PAGE - 8))
        found = b"".join(driver.get(page, PAGE) for page in pages)
        assert found == image.read_bytes()[: 4 * PAGE]


def test_chained_segments_and_bit_buckets(driver: NvmeDriver, image: Path) -> None:
    base, lists = driver.take(2), [driver.take(), driver.take()]
    driver.put(base, b"\xaa" * 2 * PAGE)
    first = struct.pack("<QI3xB", base, 100, 0) + struct.pack("<QI3xB", lists[1], 48, 0x30)
    rest = [(base + 200, 300, 0), (0, 512, 0x10), (base + 1000, 112, 0)]
    driver.put(lists[0], first)
    driver.put(lists[1], b"".join(struct.pack("<QI3xB", *each) for each in rest))
    sgl = struct.pack("<QI3xB", lists[0], 32, 0x20)
    driver.good(1, READ, **move(1, 4, 2, sgl=sgl, flags=0x40))
    data = image.read_bytes()[2048:3072]
    expected = bytearray(b"\xaa" * 2 * PAGE)
    expected[:100], expected[200:500], expected[1000:1112] = data[:100], data[100:400], data[912:]
    assert driver.get(base, 2 * PAGE) == expected


def test_what_may_only_be_read_is_not_written(driver: NvmeDriver, image: Path) -> None:
    page = driver.take()
    number = (page - 0x10_0000_0000) // PAGE
    driver.put(page, b"x" * PAGE)
    driver.unmap(number)
    driver.map(number, 1, Permissions.READ)
    assert driver.do(1, READ, **move(1, 0, 8, prp1=page)).status == 0x04 | DNR
    assert driver.get(page, PAGE) == b"x" * PAGE
    assert driver.host.memory.refused == 1
    driver.good(1, WRITE, **move(1, 0, 8, prp1=page))
    assert image.read_bytes()[:PAGE] == b"x" * PAGE


def test_no_pages_next_to_them_are_touched_when_one_is_not_mapped(
    driver: NvmeDriver, image: Path
) -> None:
    before = image.read_bytes()
    pages = [driver.take() for _ in range(4)]
    driver.unmap((pages[2] - 0x10_0000_0000) // PAGE)
    assert driver.do(1, WRITE, **move(1, 0, 32, **driver.prps(pages))).status == 0x04 | DNR
    assert image.read_bytes() == before


class TestOtherCommands:
    def test_compare(self, driver: NvmeDriver, image: Path) -> None:
        page = driver.take()
        driver.put(page, image.read_bytes()[512:1536])
        driver.good(1, COMPARE, **move(1, 1, 2, prp1=page))
        driver.put(page + 1023, bytes([driver.get(page + 1023, 1)[0] ^ 1]))
        assert driver.do(1, COMPARE, **move(1, 1, 2, prp1=page)).status == 0x285 | DNR

    def test_verify(self, driver: NvmeDriver, image: Path) -> None:
        driver.good(1, VERIFY, **move(1, 0, 8192))
        assert driver.do(1, VERIFY, **move(1, 1, 8192)).status == 0x80 | DNR

    @pytest.mark.parametrize("deallocate", [0, 1 << 25])
    def test_write_zeroes(self, driver: NvmeDriver, image: Path, deallocate: int) -> None:
        expected = bytearray(image.read_bytes())
        driver.good(1, ZEROES, **move(1, 3, 1000, w12=deallocate))
        expected[3 * 512 : 1003 * 512] = bytes(1000 * 512)
        assert image.read_bytes() == expected

    def test_deallocate_overlapping_ranges(self, driver: NvmeDriver, image: Path) -> None:
        expected = bytearray(image.read_bytes())
        page = driver.take()
        ranges = [(8, 16), (16, 32), (4096, 8), (0, 0), (8, 8)]
        driver.put(page, b"".join(struct.pack("<IIQ", 0, n, at) for at, n in ranges))
        driver.good(1, DATASET, nsid=1, prp1=page, w10=len(ranges) - 1, w11=4)
        for at, count in ranges:
            expected[at * 512 : (at + count) * 512] = bytes(count * 512)
        assert image.read_bytes() == expected
        # Hints alone change nothing.
        driver.good(1, DATASET, nsid=1, prp1=page, w10=0, w11=1)
        assert image.read_bytes() == expected

    def test_a_range_that_is_wrong_changes_nothing(self, driver: NvmeDriver, image: Path) -> None:
        before = image.read_bytes()
        page = driver.take()
        driver.put(page, struct.pack("<IIQIIQ", 0, 8, 0, 0, 2, 8191))
        assert driver.do(1, DATASET, nsid=1, prp1=page, w10=1, w11=4).status == 0x80 | DNR
        assert image.read_bytes() == before

    def test_flush_and_forced_unit_access(
        self, driver: NvmeDriver, image: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced: list[int] = []
        monkeypatch.setattr("guestio.virtio.image.os.fdatasync", synced.append)
        page = driver.take()
        driver.good(1, WRITE, **move(1, 0, 1, prp1=page))
        assert not synced
        driver.good(1, FLUSH, nsid=1)
        assert len(synced) == 1
        driver.good(1, FLUSH, nsid=0xFFFFFFFF)
        assert len(synced) == 2
        driver.good(1, WRITE, **move(1, 0, 1, prp1=page, w12=1 << 30))
        assert len(synced) == 3
        # Without a write cache every write is one.
        driver.good(0, 9, w10=6, w11=0)
        driver.good(1, WRITE, **move(1, 0, 1, prp1=page))
        driver.good(1, ZEROES, **move(1, 0, 1))
        assert len(synced) == 5
        driver.good(0, 9, w10=6, w11=1)
        driver.good(1, WRITE, **move(1, 0, 1, prp1=page))
        assert len(synced) == 5

    def test_a_flush_that_fails_says_so(
        self, driver: NvmeDriver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(fd: int) -> None:
            raise OSError(5, "no")

        monkeypatch.setattr("guestio.virtio.image.os.fdatasync", fail)
        assert driver.do(1, FLUSH, nsid=1).status == 0x280
        monkeypatch.undo()
        driver.good(1, FLUSH, nsid=1)

    def test_an_image_that_became_shorter(self, driver: NvmeDriver, image: Path) -> None:
        os.truncate(image, 4096)
        page = driver.take()
        for fast in (True, False):
            driver.device._queues.fast = fast
            assert driver.do(1, READ, **move(1, 100, 8, prp1=page)).status == 0x281 | DNR
        driver.good(1, READ, **move(1, 0, 8, prp1=page))


class TestNamespaces:
    def test_blocks_of_4096_bytes_and_a_second_namespace(
        self, make: Callable[..., NvmeDriver], image: Path, tmp_path: Path
    ) -> None:
        other = tmp_path / "other.img"
        other.write_bytes(b"o" * 16 * PAGE)
        driver = make(block_size=4096, namespaces=[other])
        driver.create(1)
        assert driver.identify(0, 2)[130] == 12
        page = driver.take()
        driver.good(1, READ, **move(2, 15, 1, prp1=page))
        assert driver.get(page, PAGE) == b"o" * PAGE
        assert driver.do(1, READ, **move(2, 16, 1, prp1=page)).status == 0x80 | DNR
        driver.good(1, READ, **move(1, 16, 1, prp1=page))
        assert driver.get(page, PAGE) == image.read_bytes()[16 * PAGE : 17 * PAGE]
        assert driver.identify(2)[:12] == struct.pack("<3I", 1, 2, 0)
        assert driver.identify(2, 1)[:8] == struct.pack("<2I", 2, 0)

    def test_read_only(self, make: Callable[..., NvmeDriver], image: Path) -> None:
        before = image.read_bytes()
        driver = make(read_only=True)
        driver.create(1)
        page = driver.take()
        for opcode, what in ((WRITE, move(1, 0, 1, prp1=page)), (ZEROES, move(1, 0, 1))):
            assert driver.do(1, opcode, **what).status == 0x20 | DNR
        driver.put(page, struct.pack("<IIQ", 0, 8, 0))
        assert driver.do(1, DATASET, nsid=1, prp1=page, w11=4).status == 0x20 | DNR
        driver.good(1, READ, **move(1, 0, 1, prp1=page))
        driver.good(1, FLUSH, nsid=1)
        assert driver.identify(0, 1)[99] == 1
        assert image.read_bytes() == before
