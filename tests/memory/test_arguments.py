"""Numbers are checked where they come in: nothing wraps, nothing is guessed, nothing changes."""

import contextlib
import ctypes
import gc
from pathlib import Path

import numpy as np
import pytest

from guestio import (
    AtomicBitmap,
    Backing,
    GuestMemoryAtomic,
    GuestRegionCollection,
    IoVector,
    MmapRegion,
    Ordering,
    Permissions,
    SliceMemory,
    VolatileSlice,
)
from tests.kit.edge_cases import cases, check_refusals

R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE


def open_fds():
    return len(list(Path("/proc/self/fd").iterdir()))


class World:
    """Memory of each kind, over one page-tracked region, as an access finds it."""

    def __init__(self):
        self.bitmap = AtomicBitmap(0x2000)
        self.bitmap.set_range(0, 1)
        self.backing = Backing.memfd(0x2000)
        self.region = MmapRegion(0, self.backing, bitmap=self.bitmap)
        self.memory = GuestRegionCollection.from_regions([self.region])
        self.slice = self.memory.whole_slice(0, 0x2000, RW)
        self.vector = self.memory.gather(0x10, 8, RW)
        self.atomic = GuestMemoryAtomic(self.memory)
        with self.atomic.lock() as self.update:
            pass
        self.update._done = False
        self.zeroes = open("/dev/zero", "r+b", buffering=0)  # noqa: PTH123, SIM115

    def close(self):
        self.vector.close()
        self.zeroes.close()

    def subjects(self):
        return {
            "GuestRegionCollection": self.memory,
            "SliceMemory": SliceMemory(self.slice),
            "VolatileSlice": self.slice,
            "IoVector": self.vector,
            "AtomicBitmap": self.bitmap,
            "BitmapSlice": self.bitmap.slice_at(0),
            "MmapRegion": self.region,
            "Backing": self.backing,
            "GuestMemoryAtomic": self.atomic,
            "MapUpdate": self.update,
            "maker": self.makers(),
        }

    def makers(self):
        """Whatever makes an object; a constructor of the core hides its parameters."""
        return {
            "bitmap": lambda size, page_size: AtomicBitmap(size, page_size),
            "region": MmapRegion,
            "atomic": GuestMemoryAtomic,
            "slice_memory": SliceMemory,
            "over": VolatileSlice.over,
            "of_slices": IoVector.of_slices,
            **{
                f"{kind.__name__}.{name}": getattr(kind, name)
                for kind, names in (
                    (Backing, ("anonymous", "memfd", "from_fd", "from_file", "from_buffer")),
                    (MmapRegion, ("anonymous", "memfd", "from_fd")),
                    (GuestRegionCollection, ("from_regions", "from_ranges")),
                )
                for name in names
            },
        }

    def state(self):
        return (
            self.memory.read(0, 0x2000),
            self.bitmap.dirty_pages().tolist(),
            self.bitmap.byte_size,
            len(self.memory),
            self.atomic.memory() is self.memory,
            self.backing.closed,
            len(self.vector),
        )

    def good(self, owner):
        shared = {
            **dict.fromkeys(("addr", "start", "offset", "base", "page", "middle", "target"), 0),
            **dict.fromkeys(("length", "width", "extra", "count"), 8),
            **dict.fromkeys(("value", "expected", "new"), 0),
            "access": RW,
            "data": bytes(8),
            "buffer": bytearray(8),
            "source": self.zeroes,
            "sink": self.zeroes,
            "kind": ctypes.c_uint64,
            "write_obj.value": np.uint64(0),
            "size": 0x1000,
            "page_size": 0x1000,
            "backing": self.backing,
            "region": MmapRegion.anonymous(0x8000, 16),
            "regions": [self.region],
            "ranges": [(0, 16)],
            "slices": [self.slice],
            "memory": self.memory,
            "fd": self.zeroes.fileno(),
            "fds_overlap.other": self.region,
            "overlaps.other": self.backing,
            "replace.new": self.memory,
            "remove_region.size": 0x2000,
            "guard": contextlib.nullcontext(),
            "path": f"/proc/self/fd/{self.backing.fd}",
        }
        return shared | {
            "VolatileSlice": {
                "other": bytearray(8),
                "copy_from.source": bytes(8),
                "bitmap": AtomicBitmap(16),
                "offset.count": 8,
            },
            "AtomicBitmap": {
                "dirty_pages.page_size": 0x1000,
                "merge.words": np.zeros(1, np.uint64),
                "parts": 2,
            },
            "maker": {
                "slice_memory.memory": self.slice,
                "Backing.from_fd.fd": self.backing.fd,
                "MmapRegion.from_fd.fd": self.backing.fd,
                "Backing.memfd.size": 2 << 20,
                "hugetlb": None,
            },
        }.get(owner, {})


def all_cases():
    world = World()
    try:
        return [case for owner, one in world.subjects().items() for case in cases(owner, one)]
    finally:
        world.close()


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_bad_arguments_are_refused(case):
    world = World()
    gc.collect()
    before = open_fds()
    try:
        subject = world.subjects()[case.owner]
        check_refusals(case, subject, world.good(case.owner), world.state)
        gc.collect()
        assert open_fds() <= before
    finally:
        world.close()


@pytest.mark.parametrize("number", [np.uint64(8), np.int32(8)])
def test_whatever_is_an_integer_is_one(number):
    memory = GuestRegionCollection.from_ranges([(0, 0x1000)])
    memory.write(number, b"12345678")
    assert memory.read(number, number) == b"12345678"
    assert memory.load(number, 8) == int.from_bytes(b"12345678", "little")
    assert memory.find_region(number) is not None
    assert len(memory.whole_slice(number, number, R).subslice(0, number)) == 8
    bitmap = AtomicBitmap(number, number)
    assert (len(bitmap), bitmap.is_set(number)) == (1, False)


@pytest.mark.parametrize("width", [3, 0, 16, 5])
def test_widths(width):
    memory = GuestRegionCollection.from_ranges([(0, 0x1000)])
    for call in (
        lambda: memory.load(0, width),
        lambda: memory.store(0, 0, width),
        lambda: memory.compare_exchange(0, 0, 0, width),
        lambda: memory.whole_slice(0, 64, W).load(0, width),
    ):
        with pytest.raises(ValueError, match="width"):
            call()


def test_orderings_that_an_access_cannot_have():
    memory = GuestRegionCollection.from_ranges([(0, 0x1000)])
    for ordering in (Ordering.RELEASE, Ordering.ACQ_REL):
        with pytest.raises(ValueError, match=ordering.name):
            memory.load(0, 4, ordering)
    for ordering in (Ordering.ACQUIRE, Ordering.ACQ_REL):
        with pytest.raises(ValueError, match=ordering.name):
            memory.store(0, 1, 4, ordering)
    with pytest.raises(ValueError, match="77"):
        memory.load(0, 4, 77)
    for ordering in (Ordering.RELAXED, Ordering.RELEASE, Ordering.SEQ_CST):
        memory.store(0, ordering, 4, ordering)
        assert memory.load(0, 4, Ordering.ACQUIRE) == ordering


@pytest.mark.parametrize(("width", "value"), [(1, 256), (2, 1 << 16), (4, 1 << 32), (8, 1 << 64)])
def test_values_that_do_not_fit(width, value):
    memory = GuestRegionCollection.from_ranges([(0, 0x1000)])
    with pytest.raises(ValueError, match="fit"):
        memory.store(0, value, width)
    with pytest.raises(ValueError, match="fit"):
        memory.compare_exchange(0, value, 0, width)
    with pytest.raises(ValueError, match="fit"):
        memory.compare_exchange(0, 0, value, width)
    assert memory.read(0, 8) == bytes(8)


def test_buffers_that_are_none():
    memory = GuestRegionCollection.from_ranges([(0, 0x1000)])
    for bad in (1, "text", None, [1, 2]):
        with pytest.raises(TypeError):
            memory.write(0, bad)
        with pytest.raises(TypeError):
            memory.readinto(0, bad)
        with pytest.raises(TypeError):
            VolatileSlice.over(bad)
        with pytest.raises(TypeError):
            Backing.from_buffer(bad)
    with pytest.raises((TypeError, BufferError)):
        memory.readinto(0, b"constant")
    for buffer in (np.zeros((4, 4))[:, 1], memoryview(bytearray(8))[::2]):
        with pytest.raises((TypeError, ValueError, BufferError)):
            memory.write(0, buffer)
    memory.write(0, np.arange(4, dtype="<u4").reshape(2, 2))
    assert memory.read(4, 4) == b"\x01\0\0\0"


def test_parts_that_only_others_make():
    for call in (VolatileSlice, AtomicBitmap(16).slice_at(0).__class__):
        with pytest.raises(TypeError, match="come from"):
            call()
    with pytest.raises(TypeError):
        GuestMemoryAtomic()
