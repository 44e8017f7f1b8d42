"""Vectors of more fragments than they have room for at first, byte by byte against a model."""

import os

import pytest

from guestio import (
    AtomicBitmap,
    GuestRegionCollection,
    InvalidAddressError,
    Iommu,
    IommuMemory,
    Iotlb,
    MemoryVanishedError,
    MmapRegion,
    Permissions,
)

R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE
PAGE = 4096


class Tables(Iommu):
    iotlb = None

    def __init__(self):
        self.iotlb = Iotlb()


@pytest.fixture
def scattered():
    """Nine I/O pages from 0x100000 on, at pages that are not beside each other; and the region."""
    region = MmapRegion.memfd(0, 64 * PAGE, bitmap=AtomicBitmap(64 * PAGE))
    tables = Tables()
    marked = AtomicBitmap(0x200000)
    for i in range(9):
        tables.iotlb.set_mapping(0x100000 + i * PAGE, page_of(i) * PAGE, PAGE, RW)
    memory = GuestRegionCollection.from_regions([region])
    memory.write(0, bytes(i * 7 % 251 for i in range(64 * PAGE)))
    region.bitmap.reset()
    return memory, region, tables, marked


def page_of(i):
    return 60 - 5 * i


def seen_by(memory, tables, marked=None):
    from guestio import DirtyMode

    return IommuMemory(memory, tables, bitmap=marked, dirty=DirtyMode.BOTH)


def expected(memory, count):
    return b"".join(memory.read(page_of(i) * PAGE, PAGE) for i in range(count))


@pytest.mark.parametrize("count", [1, 4, 5, 6, 8, 9])
def test_all_fragments_are_where_they_belong(scattered, count):
    memory, _, tables, _ = scattered
    view = seen_by(memory, tables)
    with view.gather(0x100000 + 9, count * PAGE - 18, R) as vector:
        sizes = [PAGE] * count
        sizes[0] -= 9
        sizes[-1] -= 9
        starts = [0x100000 + i * PAGE + (9 if i == 0 else 0) for i in range(count)]
        assert vector.fragments() == list(zip(starts, sizes, strict=True))
        whole = expected(memory, count)[9:-9]
        assert vector.read() == whole
        windows = [(0, 1), (3, len(whole) - 3), (len(whole) - 1, 1)]
        if count > 1:
            windows.append((PAGE - 10, 2))
        for start, size in windows:
            assert vector.read(start, size) == whole[start : start + size]
            buffer = bytearray(size)
            vector.readinto(buffer, start)
            assert buffer == whole[start : start + size]
        assert [bytes(memoryview(piece)) for piece in vector.slices()] == [
            whole[s - 0x100009 : s - 0x100009 + n] for s, n in zip(starts, sizes, strict=True)
        ]


@pytest.mark.parametrize("way", ["write", "fill", "file"])
@pytest.mark.parametrize(
    ("start", "length"),
    [(0, 1), (PAGE - 1, 2), (4 * PAGE, PAGE), (3 * PAGE + 5, 3 * PAGE), (0, 9 * PAGE)],
)
def test_writing_a_window_changes_and_marks_just_that(scattered, way, start, length, tmp_path):
    memory, region, tables, marked = scattered
    model = bytearray(expected(memory, 9))
    untouched = memory.read(0, 64 * PAGE)
    data = bytes([3]) * length
    with seen_by(memory, tables, marked).gather(0x100000, 9 * PAGE, W) as vector:
        if way == "write":
            vector.write(data, start)
        elif way == "fill":
            vector.fill(3, start, length)
        else:
            data = bytes(i * 11 % 253 for i in range(length))
            (tmp_path / "file").write_bytes(data)
            with (tmp_path / "file").open("rb") as file:
                assert vector.from_file(file.fileno(), 0, start, length) == length
    model[start : start + length] = data
    assert expected(memory, 9) == bytes(model)
    touched = range(start // PAGE, (start + length - 1) // PAGE + 1)
    assert region.bitmap.dirty_pages().tolist() == sorted(page_of(i) for i in touched)
    assert marked.dirty_pages().tolist() == [0x100 + i for i in touched]
    for page in set(range(64)) - {page_of(i) for i in range(9)}:
        assert memory.read(page * PAGE, PAGE) == untouched[page * PAGE : (page + 1) * PAGE]


def test_a_window_goes_to_a_file(scattered, tmp_path):
    memory, region, tables, _ = scattered
    whole = expected(memory, 9)
    with seen_by(memory, tables).gather(0x100000, 9 * PAGE, R) as vector:
        with (tmp_path / "out").open("w+b", buffering=0) as file:
            assert vector.to_file(file.fileno(), 100, 3 * PAGE + 5, 3 * PAGE) == 3 * PAGE
            assert vector.to_file(file.fileno(), 0, 0, 7) == 7
            file.seek(0)
            assert file.read() == whole[:7] + bytes(93) + whole[3 * PAGE + 5 : 6 * PAGE + 5]
        with pytest.raises(InvalidAddressError):
            vector.read(9 * PAGE - 1, 2)
        with pytest.raises(InvalidAddressError):
            vector.read(9 * PAGE + 1, 1)
    assert region.bitmap.count() == 0


@pytest.mark.parametrize("gone", range(6))
def test_an_error_names_the_fragment_that_vanished(gone):
    """Six regions in one vector; the file behind one of them was truncated."""
    regions = [MmapRegion.memfd(0x10000 + i * PAGE, PAGE) for i in range(6)]
    memory = GuestRegionCollection.from_regions(regions)
    tables = Tables()
    tables.iotlb.set_mapping(0x700000, 0x10000, 6 * PAGE, RW)
    view = seen_by(memory, tables)
    memory.fill(0x10000, 6 * PAGE, 7)
    os.ftruncate(regions[gone].backing.fd, 0)
    with view.gather(0x700000, 6 * PAGE, RW) as vector:
        assert vector.count == 6
        for access in (
            lambda: vector.read(),
            lambda: vector.read(gone * PAGE, 1),
            lambda: vector.write(bytes(6 * PAGE)),
            lambda: vector.to_file(1),
        ):
            with pytest.raises(MemoryVanishedError) as caught:
                access()
            assert caught.value.addr == 0x700000 + gone * PAGE
            assert caught.value.target == 0x10000 + gone * PAGE
            assert caught.value.region is regions[gone]
        if gone:
            assert vector.read(0, gone * PAGE) == bytes(gone * PAGE)


def test_many_leases_are_all_given_back(scattered):
    """One to each descriptor: more than a vector has room for at first."""
    from guestio._core.iommu.address_space import AddressSpace
    from guestio._core.virtio.split import SplitRing

    memory, _, tables, _ = scattered
    tables.iotlb.set_mapping(0, 0, 3 * PAGE, RW)
    ring = SplitRing(AddressSpace(memory._space.regions, tables.iotlb._map), 16, 0, PAGE, 2 * PAGE)
    for i in range(9):
        flags = 1 if i < 8 else 0
        descriptor = (0x100000 + i * PAGE).to_bytes(8, "little") + PAGE.to_bytes(4, "little")
        link = flags.to_bytes(2, "little") + (i + 1).to_bytes(2, "little")
        memory.write(16 * i, descriptor + link)
    memory.store(PAGE + 4, 0, 2)
    memory.store(PAGE + 2, 1, 2)
    memory.store(2 * PAGE + 2, 0, 2)
    (chain,), misses = ring.pop()
    assert not misses
    assert len(tables.iotlb._map.leases) == 9
    assert chain.readable.read() == expected(memory, 9)
    chain.hand_over()
    assert len(tables.iotlb._map.leases) == 9
    ring.complete(chain, 0)
    assert len(tables.iotlb._map.leases) == 0
