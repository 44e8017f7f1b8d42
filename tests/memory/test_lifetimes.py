"""What ends, is copied or is collected while it is still in use.

Where the danger is that the process dies, the test runs in one of its own.
"""

import contextlib
import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import textwrap
import weakref

import numpy as np
import pytest

from guestio import (
    AtomicBitmap,
    Backing,
    GuestioError,
    GuestMemory,
    GuestMemoryAtomic,
    GuestRegionCollection,
    InvalidAddressError,
    Iommu,
    IommuMemory,
    Iotlb,
    IoVector,
    MmapRegion,
    Permissions,
    SliceMemory,
    VolatileSlice,
)

R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE


class Tables(Iommu):
    """An IOMMU whose IOTLB always holds everything."""

    def __init__(self):
        self._iotlb = Iotlb()
        self._iotlb.set_mapping(0, 0, 0x1000, RW)

    @property
    def iotlb(self):
        return self._iotlb


def everything():
    """One object of every kind, over one region."""
    bitmap = AtomicBitmap(0x1000)
    region = MmapRegion(0, Backing.memfd(0x1000), bitmap=bitmap)
    memory = GuestRegionCollection.from_regions([region])
    iommu = Tables()
    return {
        "backing": region.backing,
        "region": region,
        "collection": memory,
        "slice": region.slice(),
        "slice memory": SliceMemory(region.slice()),
        "vector": memory.gather(0, 8, R),
        "bitmap": bitmap,
        "part of a bitmap": bitmap.slice_at(0),
        "atomic": GuestMemoryAtomic(memory),
        "iotlb": iommu.iotlb,
        "guard": iommu.translate(0, 8, R),
        "leases": iommu.iotlb._map.leases,
        "behind an IOMMU": IommuMemory(memory, iommu),
    }


@pytest.mark.parametrize("kind", everything())
@pytest.mark.parametrize("how", [copy.deepcopy, pickle.dumps])
def test_memory_is_not_copied_by_accident(kind, how):
    with pytest.raises(TypeError):
        how(everything()[kind])


SHARED = ("region", "collection", "slice memory", "part of a bitmap", "behind an IOMMU")


@pytest.mark.parametrize("kind", everything())
def test_a_shallow_copy_shares_or_is_refused(kind):
    """What owns a descriptor, a lease or a lock exists once; views of them may be doubled."""
    world = everything()
    if kind not in SHARED:
        with pytest.raises(TypeError):
            copy.copy(world[kind])
        return
    twin = copy.copy(world[kind])
    if kind == "region":
        assert twin.backing is world["backing"]
    elif kind == "part of a bitmap":
        twin.set_range(0, 1)
        assert world["bitmap"].count() == 1
    else:
        twin.write(0, b"seen")
        assert world["region"].slice().read(0, 4) == b"seen"


def test_a_backing_closes_its_own_descriptor_only():
    """A copy of one would close the number again, which may be reused by then."""
    backing = Backing.memfd(0x1000)
    fd = backing.fd
    with pytest.raises(TypeError, match="from_fd"):
        copy.copy(backing)
    del backing
    gc.collect()
    other = os.open("/dev/null", os.O_RDONLY)
    try:
        assert other <= fd
        gc.collect()
        os.fstat(other)
    finally:
        os.close(other)


def test_a_vector_keeps_the_slices_it_was_made_of():
    """Also if the caller's list changes afterwards."""
    mine = [MmapRegion.anonymous(0, 0x1000).slice()]
    mine[0].write(0, b"kept")
    vector = IoVector.of_slices(mine, R)
    mine.clear()
    gc.collect()
    assert vector.read(0, 4) == b"kept"


def test_empty_slices_in_a_vector_take_no_place():
    whole = VolatileSlice.over(bytearray(b"12345678"))
    vector = IoVector.of_slices([whole.offset(8), whole.subslice(0, 4), whole.offset(4)], R)
    assert (vector.count, vector.total) == (2, 8)
    assert [part.read() for part in vector.slices()] == [b"1234", b"5678"]


def test_a_slice_with_another_bitmap_stays_in_the_space():
    """Its marks do not wrap to the first page."""
    whole, marked = VolatileSlice.over(bytearray(16)), AtomicBitmap(0x1000)
    with pytest.raises(InvalidAddressError):
        whole.with_bitmap(marked, 2**64 - 15)
    part = whole.with_bitmap(marked, 2**64 - 16)
    part.offset(8).write(0, b"x")
    assert marked.count() == 0
    whole.with_bitmap(marked, 0xFFF).write(0, b"x")
    assert marked.count() == 1


def test_a_closed_vector_is_empty():
    memory = GuestRegionCollection.from_ranges([(0, 0x1000)])
    vector = memory.gather(0, 8, RW)
    vector.close()
    vector.close()
    assert (len(vector), vector.read(), vector.slices(), vector.fragments()) == (0, b"", [], [])
    for refused in (lambda: vector.write(b"x"), lambda: vector.read(0, 1)):
        with pytest.raises(InvalidAddressError):
            refused()
    fd = os.open("/dev/zero", os.O_RDWR)
    try:
        assert vector.from_file(fd) == vector.to_file(fd) == 0
    finally:
        os.close(fd)


def test_objects_in_a_cycle_are_collected():
    """What refers to the memory that it belongs to is still released."""
    backing = Backing.anonymous(0x1000)
    region = MmapRegion(0, backing)
    region.memory = GuestRegionCollection.from_regions([region])
    region.part = region.memory.whole_slice(0, 8, R)
    gone = weakref.ref(region)
    del region
    gc.collect()
    assert gone() is None
    backing.close()


class Broken(io.RawIOBase):
    """A stream that fails."""

    def read(self, size=-1):
        raise ConnectionResetError("gone")

    def write(self, data):
        raise ConnectionResetError("gone")


class Foreign(GuestMemory):
    """Foreign memory."""

    def __init__(self, backend):
        self.backend = backend

    def check_range(self, addr, length, access=Permissions.NONE):
        return self.backend.check_range(addr, length, access)

    def slices(self, addr, length, access=R):
        yield from self.backend.slices(addr, length, access)


REFUSED = {
    "read": lambda m: m.read(0x1000, 4),
    "read of a part": lambda m: m.read(0xFF0, 0x20),
    "readinto": lambda m: m.readinto(0xFF0, bytearray(0x20)),
    "read_some": lambda m: m.read_some(0x1000, bytearray(4)),
    "write": lambda m: m.write(0x1000, bytes(4)),
    "write of a part": lambda m: m.write(0xFF0, bytes(0x20)),
    "write_some": lambda m: m.write_some(0x1000, b"1"),
    "fill": lambda m: m.fill(0xFF0, 0x20, 1),
    "fill with nonsense": lambda m: m.fill(0, 4, 256),
    "load": lambda m: m.load(0x1000, 4),
    "misaligned load": lambda m: m.load(1, 4),
    "store": lambda m: m.store(0x1000, 1, 4),
    "compare_exchange": lambda m: m.compare_exchange(0x1000, 1, 1, 4),
    "slices": lambda m: list(m.slices(0xFF0, 0x20)),
    "gather": lambda m: m.gather(0xFF0, 0x20, R),
    "read_obj": lambda m: m.read_obj(0xFFC, "u8"),
    "write_obj": lambda m: m.write_obj(0xFFC, np.uint64(1)),
    "read_from": lambda m: m.read_from(0x1000, io.BytesIO(b"1"), 1),
    "read_from a broken stream": lambda m: m.read_from(0, Broken(), 1),
    "read_exact_from": lambda m: m.read_exact_from(0xFF0, io.BytesIO(bytes(64)), 64),
    "read_exact_from a short stream": lambda m: m.read_exact_from(0, io.BytesIO(bytes(4)), 64),
    "read_exact_from a broken stream": lambda m: m.read_exact_from(0, Broken(), 64),
    "write_to": lambda m: m.write_to(0x1000, io.BytesIO(), 1),
    "write_to a broken stream": lambda m: m.write_to(0, Broken(), 8),
    "write_all_to": lambda m: m.write_all_to(0xFF0, io.BytesIO(), 64),
    "where nothing is mapped": lambda m: m.read(0x9000, 4),
}


@pytest.mark.parametrize("kind", ["collection", "slice", "behind an IOMMU", "foreign"])
@pytest.mark.parametrize("call", REFUSED)
def test_a_refused_access_lets_go_of_the_memory(kind, call):
    """At once: its error does not keep memory in use until the collector comes by."""
    backing = Backing.anonymous(0x1000)
    memory = GuestRegionCollection.from_regions([MmapRegion(0, backing)])
    if kind == "slice":
        memory = SliceMemory(memory.whole_slice(0, 0x1000, RW))
    elif kind == "behind an IOMMU":
        iommu = Tables()
        iommu.iotlb.set_mapping(0x1000, 0x1000, 0x1000, RW)
        memory = IommuMemory(memory, iommu)
    elif kind == "foreign":
        memory = Foreign(memory)
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(GuestioError, ValueError, OSError):
            pytest.fail(f"answered {REFUSED[call](memory)}")
        if kind == "behind an IOMMU":
            assert len(iommu.iotlb._map.leases) == 0
        del memory
        backing.close()
    finally:
        gc.enable()


def run(code, timeout=60):
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "survived\n"), done.stderr[-3000:]


CYCLES = {
    "guard": """
        guard = tables.iotlb.guard(0, 8, R)
        guard.__enter__().append(guard)
        del guard
    """,
    "vector": """
        class Holder:
            def __enter__(self): pass
            def __exit__(self, *exc): pass
        vector, holder = memory.gather(0, 8, R), Holder()
        holder.itself, holder.vector = holder, vector
        vector.hold(holder)
        del vector, holder
    """,
    "iterator": """
        pieces = memory.slices(0, 8, R)
        box = [pieces, next(pieces)]
        box.append(box)
        del pieces, box
    """,
}


@pytest.mark.parametrize("kind", CYCLES)
def test_the_collector_gives_leases_back(kind):
    """It takes what a guard refers to away before the guard itself goes."""
    run(
        """
import gc
from guestio import *
R, RW = Permissions.READ, Permissions.READ_WRITE
class Tables(Iommu):
    iotlb = Iotlb()
tables = Tables()
tables.iotlb.set_mapping(0, 0, 4096, RW)
memory = IommuMemory(GuestRegionCollection.from_ranges([(0, 4096)]), tables)
gc.disable()
"""
        + textwrap.dedent(CYCLES[kind])
        + """
assert len(tables.iotlb._map.leases) == 1
gc.collect()
assert len(tables.iotlb._map.leases) == 0
tables.iotlb.invalidate_all()
print("survived")
"""
    )


RACES = """
import faulthandler, gc, os, random, sys, threading, time
import numpy as np
from guestio import *

R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE
SIZE = 1 << 18
faulthandler.dump_traceback_later(50, exit=True)
sys.setswitchinterval(1e-5)

class Lazy(Iommu):
    def __init__(self):
        self._iotlb = Iotlb(8)

    @property
    def iotlb(self):
        return self._iotlb

    def resolve(self, fails, iova, length, access):
        for base, size in (*fails.misses, *fails.access_fails):
            self._iotlb.set_mapping(base & ~0xFFF, base & ~0xFFF, (size + 0x1FFF) & ~0xFFF, RW)

class World:
    def __init__(self):
        self.marked, self.bitmap = AtomicBitmap(SIZE), AtomicBitmap(SIZE)
        self.backing = Backing.memfd(SIZE)
        region = MmapRegion(0, self.backing, bitmap=self.bitmap)
        self.memory = GuestRegionCollection.from_regions([region])
        self.iommu = Lazy()
        self.iotlb = self.iommu.iotlb
        self.behind = IommuMemory(self.memory, self.iommu, bitmap=self.marked,
                                  dirty=DirtyMode.BOTH)
        self.vectors = [self.behind.gather(0, 0x20000, RW), self.memory.gather(0, SIZE, RW)]
        self.slices = [self.memory.whole_slice(0, SIZE, RW)]
        self.iterators = [self.behind.slices(0, 0x10000, RW)]
        self.guards = [self.iommu.translate(0, 8, R)]

    def swap(self, kept, new):
        kept[random.randrange(len(kept))] = new

world = World()
zero = os.open("/dev/zero", os.O_RDWR)
NOTHING = np.arange(0, SIZE, 64, dtype=np.uint64)
CALLS = [
    lambda w, v, s, a, n: v.read(),
    lambda w, v, s, a, n: v.write(bytes(min(n, len(v)))),
    lambda w, v, s, a, n: v.close(),
    lambda w, v, s, a, n: v.from_file(zero, 0),
    lambda w, v, s, a, n: v.to_file(zero, 0),
    lambda w, v, s, a, n: v.fill(3),
    lambda w, v, s, a, n: w.swap(w.vectors, w.behind.gather(a, n, RW)),
    lambda w, v, s, a, n: w.swap(w.slices, v.slices()[0]),
    lambda w, v, s, a, n: s.read(),
    lambda w, v, s, a, n: s.write_some(0, bytes(n)),
    lambda w, v, s, a, n: s.copy_to(random.choice(w.slices)),
    lambda w, v, s, a, n: np.frombuffer(s, np.uint8).sum(),
    lambda w, v, s, a, n: s.compare_exchange(0, s.load(0, 8), 2, 8),
    lambda w, v, s, a, n: w.iotlb.set_mapping(a & ~0xFFF, a & ~0xFFF, 0x2000, RW),
    # Those of an Iotlb wait for guards that other threads keep, and these may wait, too.
    lambda w, v, s, a, n: w.iotlb._map.cut(a & ~0xFFF, 0x3000),
    lambda w, v, s, a, n: w.iotlb._map.clear(),
    lambda w, v, s, a, n: w.iotlb.drain(a, n, 0.001),
    lambda w, v, s, a, n: w.iotlb.lookup_many(NOTHING, 4, R),
    lambda w, v, s, a, n: (list(w.iotlb), w.iotlb.explain(a, n, RW), w.iotlb.stats()),
    lambda w, v, s, a, n: (w.iotlb.pin(a, n), w.iotlb.unpin(a, n)),
    lambda w, v, s, a, n: w.swap(w.guards, w.iommu.translate(a, 8, R)),
    lambda w, v, s, a, n: random.choice(w.guards).close(),
    lambda w, v, s, a, n: (w.bitmap.set_range(a, n), w.bitmap.dirty_pages(clear=True)),
    lambda w, v, s, a, n: w.marked.byte_size < 1 << 24 and w.marked.enlarge(4096),
    lambda w, v, s, a, n: (w.marked.get_and_reset(), w.marked.copy(), w.marked.count()),
    lambda w, v, s, a, n: w.backing.close(),
    lambda w, v, s, a, n: w.behind.write(a, bytes(n)),
    lambda w, v, s, a, n: w.behind.read(a, n),
    lambda w, v, s, a, n: setattr(w.behind, "enabled", a & 8),
    lambda w, v, s, a, n: next(random.choice(w.iterators)),
    lambda w, v, s, a, n: w.swap(w.iterators, w.behind.slices(a, n, R)),
    lambda w, v, s, a, n: random.choice(w.iterators).close(),
    lambda w, v, s, a, n: w.swap(w.slices, MmapRegion(0, Backing.memfd(0x4000)).slice()),
]
EXPECTED = (GuestioError, BufferError, IndexError, OSError, RuntimeError, StopIteration, ValueError)
end, done, wrong = time.monotonic() + 4, [], []

def work():
    global world
    count = 0
    while time.monotonic() < end and not wrong:
        w, n = world, random.choice((1, 8, 64, 4096, 0x8000, 0x20000))
        a = random.randrange(0, SIZE - n) & ~7
        try:
            random.choice(CALLS)(w, random.choice(w.vectors), random.choice(w.slices), a, n)
        except EXPECTED:
            pass
        except BaseException as error:
            wrong.append(error)
        count += 1
        if count % 200 == 0:
            world = World()
        if count % 500 == 0:
            os.ftruncate(w.backing.fd, SIZE // 2)
    done.append(count)

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not wrong, wrong
assert min(done) > 20, done
world.iotlb._map.check()
world = None
gc.collect()
print("survived")
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["vanished", "misaligned"])
def test_a_vector_that_is_closed_while_its_error_is_made(fault):
    """Another thread may run as soon as Python code does, here while permissions are named."""
    run(f"""
        import os
        from guestio import *
        from guestio._core.memory import vector as core
        class Tables(Iommu):
            iotlb = Iotlb()
        backing = Backing.memfd(8192)
        memory = GuestRegionCollection.from_regions([MmapRegion(0x10000, backing)])
        behind = IommuMemory(memory, Tables())
        behind.iommu.iotlb.set_mapping(0, 0x10000, 8192, Permissions.READ_WRITE)
        def closing(access):
            vector.close()
            return Permissions(access)
        vector = behind.gather(1, 8, Permissions.READ)
        if {fault!r} == "vanished":
            os.ftruncate(backing.fd, 0)
        core.Permissions = closing
        try:
            vector.read() if {fault!r} == "vanished" else vector.load(8)
        except (MemoryVanishedError, MisalignedError) as error:
            assert error.addr == 1, error
            assert error.target == 0x10001, error.target
            print("survived")
    """)


def test_whatever_closes_while_others_use_it_is_safe():
    """Every call on shared objects, in any order, from eight threads."""
    run(RACES)


def test_objects_that_were_never_set_up_do_no_harm():
    """A subclass may forget to call its base, and a pickle may make an object by itself."""
    run("""
import contextlib, importlib, itertools
from guestio import *

VALUES = (0, 8, Permissions.READ, bytearray(8), [], None, "x")
calls = 0
for name in (
    "iommu.address_space", "iommu.intervals", "iommu.lookups",
    "memory.bitmap", "memory.leases", "memory.mapping", "memory.slices", "memory.vector",
):
    module = importlib.import_module(f"guestio._core.{name}")
    for kind in vars(module).values():
        if not isinstance(kind, type) or kind.__module__ != module.__name__:
            continue
        with contextlib.suppress(TypeError, ValueError):
            made = kind.__new__(kind)
            for attribute in dir(kind):
                if attribute.startswith("__") and attribute not in ("__len__", "__iter__"):
                    continue
                with contextlib.suppress(Exception):
                    method = getattr(made, attribute)
                    for count in range(5):
                        for arguments in itertools.islice(
                            itertools.product(VALUES, repeat=count), 60
                        ):
                            calls += 1
                            with contextlib.suppress(Exception):
                                method(*arguments)
assert calls > 1000, calls
print("survived")
""")
