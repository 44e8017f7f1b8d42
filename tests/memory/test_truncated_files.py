"""Memory whose file is truncated by its owner: an error for the access, not the end of us.

Every scenario runs in a process of its own, since what it guards against is that the process dies.
"""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from guestio import Backing, GuestRegionCollection, MmapRegion

PRELUDE = """
import ctypes, io, os, socket, sys, threading
import numpy as np
from guestio import *
R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE
PAGE, SIZE = 4096, 1 << 20

def fresh(keep=2 * PAGE, **options):
    "A region of 1 MiB at 0x100000 of which only the first bytes are left."
    region = MmapRegion(0x100000, Backing.memfd(SIZE, **options), name="ram",
                        bitmap=AtomicBitmap(SIZE))
    memory = GuestRegionCollection.from_regions([region])
    memory.fill(0x100000, SIZE, 7)
    region.bitmap.reset()
    os.ftruncate(region.backing.fd, keep)
    return memory, region

def vanishes(call, addr=None, target=None):
    try:
        call()
    except MemoryVanishedError as error:
        assert isinstance(error, OSError) and error.errno == 14, error
        assert "truncated" in str(error), error
        assert addr is None or error.addr == addr, hex(error.addr)
        assert error.target == target, error.target
        return error
    raise AssertionError("nothing was noticed")

GONE = 0x100000 + 2 * PAGE
"""

SCENARIOS = {
    "copies": """
        for length in (1, 2, 4, 8, 100, PAGE, 100000):
            for call in (
                lambda m: m.read(GONE, length),
                lambda m: m.readinto(GONE, bytearray(length)),
                lambda m: m.read_some(GONE, bytearray(length)),
                lambda m: m.write(GONE, bytes(length)),
                lambda m: m.write_some(GONE, bytes(length)),
                lambda m: m.fill(GONE, length, 1),
            ):
                memory, region = fresh()
                error = vanishes(lambda: call(memory), GONE)
                assert error.region is region and "'ram'" in str(error), error
                vanishes(lambda: call(memory), GONE)
                assert region.backing.vanished == 2 * PAGE
    """,
    "what is left": """
        memory, region = fresh()
        assert memory.read(0x100000, 2 * PAGE) == bytes([7]) * 2 * PAGE
        assert region.backing.vanished is None
        vanishes(lambda: memory.read(0x100000, SIZE), GONE)
        vanishes(lambda: memory.write(GONE - 4, b"12345678"), GONE)
        assert memory.read(GONE - 4, 4) == b"1234"
        memory.store(GONE - 8, 1, 8)
        assert region.describe()["vanished"] == 2 * PAGE
        # Later pages are refused too although none of them was touched.
        vanishes(lambda: memory.read(0x100000 + SIZE - 1, 1), 0x100000 + SIZE - 1)
    """,
    "atomics": """
        for call in (
            lambda m: m.load(GONE, 8),
            lambda m: m.store(GONE, 1, 4),
            lambda m: m.compare_exchange(GONE, 0, 1, 2),
            lambda m: m.compare_exchange(GONE, 5, 1, 2),
        ):
            memory, region = fresh()
            vanishes(lambda: call(memory), GONE)
    """,
    "slices": """
        for call in (
            lambda s: s.read(2 * PAGE, 4),
            lambda s: s.read(0, SIZE),
            lambda s: s.readinto(2 * PAGE, bytearray(4)),
            lambda s: s.write(2 * PAGE, b"data"),
            lambda s: s.fill(2 * PAGE, 4, 1),
            lambda s: s.load(2 * PAGE, 4),
            lambda s: s.store(2 * PAGE, 1, 4),
            lambda s: s.compare_exchange(2 * PAGE, 0, 1, 4),
            lambda s: s.copy_to(VolatileSlice.over(bytearray(SIZE))),
            lambda s: VolatileSlice.over(bytearray(SIZE)).copy_to(s),
            lambda s: s.copy_from(bytes(SIZE)),
            lambda s: s.copy_to(bytearray(SIZE)),
            lambda s: SliceMemory(s).read(2 * PAGE, 4),
        ):
            memory, region = fresh()
            whole = memory.whole_slice(0x100000, SIZE, RW)
            vanishes(lambda: call(whole))
            assert whole.read(0, 4) is not None
    """,
    "buffers": """
        memory, region = fresh()
        whole = memory.whole_slice(0x100000, SIZE, RW)
        view = memoryview(whole)
        # A buffer cannot raise: it shows zeroes where nothing is, and the next access says so.
        assert view[2 * PAGE] == 0
        assert bytes(view[2 * PAGE : 4 * PAGE]) == bytes(2 * PAGE)
        view[3 * PAGE] = 9
        assert np.frombuffer(whole, np.uint8).sum() == 7 * 2 * PAGE + 9
        vanishes(lambda: whole.read(2 * PAGE, 1))
        vanishes(lambda: memory.read(GONE, 1), GONE)
        assert region.backing.vanished == 2 * PAGE
    """,
    "files": """
        path = sys.argv[1]
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.write(fd, bytes(SIZE))
        for access, call in (
            (W, lambda v: v.from_file(fd, 0)),
            (W, lambda v: v.from_file(fd, 0, 2 * PAGE, 10)),
            (R, lambda v: v.to_file(fd, 0)),
            (R, lambda v: v.to_file(fd, 0, 2 * PAGE, PAGE)),
        ):
            memory, region = fresh()
            with memory.gather(0x100000, SIZE, access) as vector:
                vanishes(lambda: call(vector), GONE)
                vanishes(lambda: call(vector), GONE)
        assert os.pread(fd, 4, 0) == bytes([7] * 4)
        memory, region = fresh()
        with memory.gather(0x100000, SIZE, W) as vector:
            try:
                vector.from_file(99, 0)
            except MemoryVanishedError:
                raise SystemExit("a bad descriptor is not vanished memory")
            except OSError as error:
                assert error.errno == 9
        # After a failure it is unknown what was written: all of it counts as dirty.
        memory, region = fresh()
        with memory.gather(0x100000, SIZE, W) as vector:
            vanishes(lambda: vector.from_file(fd, 0), GONE)
        assert region.bitmap.count() == SIZE // PAGE
    """,
    "streams": """
        ours, theirs = socket.socketpair()
        theirs.sendall(bytes(100))
        memory, region = fresh()
        vanishes(lambda: memory.read_from(GONE, ours, 100), GONE)
        memory, region = fresh()
        vanishes(lambda: memory.write_to(GONE, ours, 100), GONE)
        vanishes(lambda: memory.write_all_to(GONE, ours, 100), GONE)
        memory, region = fresh()
        vanishes(lambda: memory.read_exact_from(GONE, io.BytesIO(bytes(100)), 100), GONE)
        vanishes(lambda: memory.write_all_to(GONE, io.BytesIO(), 100), GONE)
    """,
    "translated": """
        class Tables(Iommu):
            iotlb = Iotlb()
        backend, region = fresh()
        memory = IommuMemory(backend, Tables())
        memory.iommu.iotlb.set_mapping(0x5000, 0x100000 + PAGE, 2 * PAGE, RW)
        error = vanishes(lambda: memory.read(0x5000, 2 * PAGE), 0x6000, GONE)
        assert error.region is region and error.length == PAGE
        assert "0x6000" in str(error) and hex(GONE) in str(error)
        assert memory.read(0x5000, PAGE) == bytes([7]) * PAGE
        for call in (
            lambda: memory.load(0x6008, 8),
            lambda: memory.store(0x6008, 1, 8),
            lambda: memory.compare_exchange(0x6008, 0, 1, 8),
        ):
            vanishes(call, 0x6008, GONE + 8)
    """,
    "rings": """
        from guestio._core.virtio.split import SplitRing
        def ring(memory, desc, avail, used):
            return SplitRing(memory._space, 8, desc, avail, used, indirect=True)
        low = 0x100000
        for areas in (
            (GONE, low + 0x800, low + 0x900),
            (low, GONE, low + 0x900),
            (low, low + 0x800, GONE),
        ):
            memory, region = fresh()
            memory.fill(low, 2 * PAGE)
            try:
                memory.store(areas[1] + 2, 1, 2)
            except MemoryVanishedError:
                pass
            queue = ring(memory, *areas)
            try:
                queue.pop()
            except QueueError as error:
                assert "truncated" in str(error), error
                assert queue.broken
            else:
                raise AssertionError("nothing was noticed")
        # A buffer that is gone is the problem of its request, not of the ring.
        memory, region = fresh()
        memory.fill(low, 2 * PAGE)
        memory.write(low, GONE.to_bytes(8, "little") + (512).to_bytes(4, "little") + bytes(4))
        memory.store(low + 0x802, 1, 2)
        queue = ring(memory, low, low + 0x800, low + 0x900)
        chains, misses = queue.pop()
        assert len(chains) == 1 and not misses
        vanishes(lambda: chains[0].readable.read(), GONE)
        queue.complete(chains[0], 0)
        assert queue.publish() is not None and memory.load(low + 0x902, 2) == 1
    """,
    "the part of a ring that says which request is next": """
        # The index is left; the entries beyond it read as request 0, which is an old one.
        from guestio._core.memory.image import ImageFile
        from guestio._core.virtio.block_server import BlockServer
        from guestio._core.virtio.split import SplitRing
        low, size = 0x100000, 8
        fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, 8192)
        avail = low + 2 * PAGE - 8
        for touched in (False, True):
            memory, region = fresh(keep=SIZE)
            memory.fill(low, SIZE)
            # Request 0 writes to the disk; requests 1 and 2 ask for nothing that is served.
            memory.write(low + 0x800, bytes([1]) + bytes(15) + b"x" * 512)
            for index, (at, length, flags, after) in enumerate((
                (low + 0x800, 528, 1, 3), (low + 0x800, 1, 0, 0), (low + 0x800, 1, 0, 0),
                (low + 0xC00, 1, 2, 0),
            )):
                memory.write(low + 16 * index, at.to_bytes(8, "little")
                             + length.to_bytes(4, "little") + bytes((flags, 0, after, 0)))
            for position, head in enumerate((1, 2, 1)):
                memory.store(avail + 4 + 2 * position, head, 2)
            memory.store(avail + 2, 2, 2)
            queue = SplitRing(memory._space, size, low, avail, low + PAGE)
            chains, misses = queue.pop()
            assert [chain.head for chain in chains] == [1, 2]
            for chain in chains:
                queue.complete(chain, 0)
            queue.publish()
            memory.store(avail + 2, 3, 2)
            os.ftruncate(region.backing.fd, 2 * PAGE)
            if touched:
                vanishes(lambda: memory.read(GONE, 1), GONE)
            try:
                queue.run_once(BlockServer(ImageFile(fd, 8192)))
            except QueueError as error:
                assert "truncated" in str(error), error
            else:
                raise AssertionError("nothing was noticed")
            assert os.pread(fd, 512, 0) == bytes(512), "a request was served that was not made"
            assert memory.load(low + 0xC00, 1) == 0
    """,
    "a used ring between taking and giving back": """
        from guestio._core.virtio.split import SplitRing
        low = 0x100000
        memory, region = fresh(keep=SIZE)
        memory.fill(low, SIZE)
        memory.write(low, (low + 0x1000).to_bytes(8, "little") + (8).to_bytes(4, "little"))
        memory.store(low + 0x802, 1, 2)
        queue = SplitRing(memory._space, 8, low, low + 0x800, GONE)
        (chain,), misses = queue.pop()
        os.ftruncate(region.backing.fd, 2 * PAGE)
        try:
            queue.complete(chain, 0)
            queue.publish()
        except QueueError as error:
            assert "truncated" in str(error), error
        else:
            raise AssertionError("nothing was noticed")
        assert queue.broken
        assert memory.read(low, 8) == (low + 0x1000).to_bytes(8, "little")
    """,
    "chains that a file is read into": """
        from guestio._core.virtio.split import SplitRing
        low, fd = 0x100000, os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
        os.write(fd, bytes(4096))
        os.lseek(fd, 0, os.SEEK_SET)
        memory, region = fresh()
        memory.fill(low, 2 * PAGE)
        for at, flags in ((0, 1), (16, 2)):
            memory.write(low + at, (GONE + 256 * at).to_bytes(8, "little")
                         + (512).to_bytes(4, "little") + bytes((flags, 0, at // 16 + 1, 0)))
        memory.store(low + 0x802, 1, 2)
        queue = SplitRing(memory._space, 8, low, low + 0x800, low + 0x900)
        (chain,), misses = queue.pop()
        vanishes(lambda: chain.readable.to_file(fd), GONE)
        vanishes(lambda: chain.writable.from_file(fd), GONE + 4096)
        queue.complete(chain, 0)
        assert queue.publish() is not None and not queue.broken
    """,
    "regular files": """
        for writable in (True, False):
            path = sys.argv[1] + str(writable)
            with open(path, "wb") as file:
                file.write(bytes([7]) * SIZE)
            backing = Backing.from_file(path, offset=100, writable=writable)
            assert backing.shrinkable and backing.seals == frozenset()
            memory = GuestRegionCollection.from_regions([MmapRegion(0, backing)])
            assert memory.read(SIZE - 200, 100) == bytes([7]) * 100
            os.truncate(path, 2 * PAGE)
            vanishes(lambda: memory.load(2 * PAGE - 100 + 8, 8), 2 * PAGE - 92)
            vanishes(lambda: memory.read(0, SIZE - 100), 2 * PAGE - 100)
            assert memory.read(0, 2 * PAGE - 100) == bytes([7]) * (2 * PAGE - 100)
            assert backing.vanished == 2 * PAGE - 100
    """,
    "all of it": """
        memory, region = fresh(keep=0)
        for call in (
            lambda: memory.read(0x100000, 1),
            lambda: memory.compare_exchange(0x100000, 0, 1, 8),
            lambda: memory.whole_slice(0x100000, SIZE, RW).copy_to(bytearray(SIZE)),
            lambda: memory.read_exact_from(0x100000, io.BytesIO(bytes(8)), 8),
        ):
            vanishes(call)
        assert region.backing.vanished == 0 and not region.backing.closed
        assert memory.check_range(0x100000, SIZE, RW)
        del memory
        region.backing.close()
    """,
    "while it is copied": """
        memory, region = fresh(keep=SIZE)
        done = threading.Event()
        def copy():
            try:
                while True:
                    memory.read(0x100000, SIZE)
                    memory.write(0x100000, bytes(SIZE))
            except MemoryVanishedError:
                done.set()
        copier = threading.Thread(target=copy)
        copier.start()
        os.ftruncate(region.backing.fd, 3 * PAGE)
        assert done.wait(20)
        copier.join()
        # The copy that noticed may have been past the new end already.
        assert 3 * PAGE <= region.backing.vanished < SIZE
    """,
    "two mappings": """
        memory, region = fresh()
        twin = Backing.memfd(SIZE)
        beside = GuestRegionCollection.from_regions([MmapRegion(0, twin)])
        vanishes(lambda: memory.read(GONE, 1), GONE)
        assert beside.read(SIZE - 1, 1) == bytes(1) and twin.vanished is None
        # The place of a mapping that is gone can be taken by another.
        del memory, region
        for _ in range(300):
            again, region = fresh()
            vanishes(lambda: again.read(GONE, 1), GONE)
    """,
    "another handler": """
        import faulthandler
        first, _ = fresh()
        vanishes(lambda: first.read(GONE, 1), GONE)
        faulthandler.enable()
        second, _ = fresh()
        vanishes(lambda: second.read(GONE, 1), GONE)
    """,
}


def run(code, *arguments, timeout=60):
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code) + "\nprint('survived')", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_process_survives(scenario, tmp_path):
    done = run(SCENARIOS[scenario], str(tmp_path / "disk"))
    assert (done.returncode, done.stdout) == (0, "survived\n"), done.stderr[-3000:]


def test_memory_of_others_is_none_of_our_business():
    """A SIGBUS in memory that was not mapped here ends the process as ever."""
    done = run("""
        import mmap, tempfile
        memory, region = fresh()
        vanishes(lambda: memory.read(GONE, 1), GONE)
        with tempfile.TemporaryFile() as file:
            file.truncate(PAGE)
            view = mmap.mmap(file.fileno(), PAGE)
            file.truncate(0)
            view[0]
    """)
    assert done.returncode == -signal.SIGBUS
    assert "survived" not in done.stdout


def test_a_handler_from_before_still_hears_of_them():
    done = run("""
        import faulthandler, mmap, tempfile
        faulthandler.enable()
        memory, region = fresh()
        with tempfile.TemporaryFile() as file:
            file.truncate(PAGE)
            view = mmap.mmap(file.fileno(), PAGE)
            file.truncate(0)
            view[0]
    """)
    assert done.returncode == -signal.SIGBUS
    assert "Bus error" in done.stderr


def test_sealed_memory_cannot_vanish():
    backing = Backing.memfd(0x10000, seal=True)
    memory = GuestRegionCollection.from_regions([MmapRegion(0, backing)])
    with pytest.raises(PermissionError):
        os.ftruncate(backing.fd, 0)
    assert memory.read(0xFFFF, 1) == b"\0"
