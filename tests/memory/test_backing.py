"""Where memory comes from, what it says of itself, and when it may go away."""

import contextlib
import ctypes
import fcntl
import gc
import mmap
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from guestio import (
    AtomicBitmap,
    Backing,
    BackingError,
    FileOffset,
    GuestRegionCollection,
    MmapRegion,
    PermissionDeniedError,
    Permissions,
    SliceMemory,
    VolatileSlice,
)

R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE
PAGE = mmap.PAGESIZE


def open_fds():
    return len(list(Path("/proc/self/fd").iterdir()))


def mapped(name):
    return name in Path("/proc/self/maps").read_text()


def run(code, *fds):
    """Run code in a process of its own; its exit status (negative: the signal) and output."""
    # Where there is a sanitizer, a signal must still be what ends the process.
    options = f"{os.environ.get('ASAN_OPTIONS', '')}:handle_segv=0"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, fds)],
        pass_fds=fds,
        env={**os.environ, "ASAN_OPTIONS": options},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_memfd_is_shared_by_all_holders():
    with Backing.memfd(3 * PAGE, "shared") as ours:
        assert Path(f"/proc/self/fd/{ours.fd}").readlink().name.startswith("memfd:shared")
        assert (ours.size, ours.file_offset, ours.writable, ours.page_size) == (
            3 * PAGE,
            0,
            True,
            PAGE,
        )
        theirs = MmapRegion.from_fd(0, ours.fd, PAGE, PAGE)
        one = GuestRegionCollection.from_regions([MmapRegion(0, ours)])
        two = GuestRegionCollection.from_regions([theirs])
        two.write(5, b"both")
        assert one.read(PAGE + 5, 4) == b"both"
        del one
        gc.collect()


def test_an_adopted_fd_stays_the_callers(tmp_path):
    path = tmp_path / "memory"
    path.write_bytes(bytes(range(256)) * 32)
    before = open_fds()
    with path.open("r+b") as file:
        region = MmapRegion.from_fd(0x1000, file.fileno(), 100, 1234)
    memory = GuestRegionCollection.from_regions([region])
    assert memory.read(0x1000, 100) == path.read_bytes()[1234:1334]
    memory.write(0x1000, b"mark")
    assert path.read_bytes()[1230:1240] == bytes([206, 207, 208, 209]) + b"mark" + bytes([214, 215])
    assert region.file_offset == FileOffset(region.backing.fd, 1234)
    assert open_fds() == before + 1
    del memory, region
    gc.collect()
    assert open_fds() == before


def test_files_by_name(tmp_path):
    path = tmp_path / "memory"
    path.write_bytes(bytes(100))
    whole = Backing.from_file(path)
    assert (whole.size, whole.writable) == (100, True)
    assert Backing.from_file(path, offset=40).size == 60
    path.chmod(0o400)
    assert not Backing.from_file(path, 10, 5, writable=False).writable
    for bad in (
        lambda: Backing.from_file(tmp_path / "absent"),
        lambda: Backing.from_file(path, 101, writable=False),
        lambda: Backing.from_file(path, offset=100, writable=False),
        lambda: Backing.from_file(tmp_path, 10, writable=False),
    ):
        with pytest.raises(BackingError):
            bad()


def test_read_only_memory(tmp_path):
    path = tmp_path / "rom"
    path.write_bytes(b"firmware" * 10)
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(BackingError, match="Permission"):
            Backing.from_fd(fd, 80)
        region = MmapRegion.from_fd(0, fd, 80, 0, False)
    finally:
        os.close(fd)
    memory = GuestRegionCollection.from_regions([region])
    assert not region.writable
    assert memory.read(8, 8) == b"firmware"
    piece = region.slice()
    assert piece.readonly
    assert memoryview(piece).readonly
    for refused in (
        lambda: memory.write(0, b"x"),
        lambda: memory.fill(0, 80),
        lambda: memory.store(0, 1, 8),
        lambda: memory.compare_exchange(0, 0, 1, 8),
        lambda: memory.read_from(0, 0, 8),
        lambda: piece.write(0, b"x"),
        lambda: piece.store(0, 1, 8),
        lambda: piece.compare_exchange(0, 0, 1, 8),
        lambda: piece.copy_from(b"x"),
        lambda: piece.fill(0, 1, 1),
        lambda: VolatileSlice.over(bytearray(8)).copy_to(piece),
        lambda: list(memory.slices(0, 8, RW)),
        lambda: SliceMemory(piece).write(0, b"x"),
    ):
        with pytest.raises(PermissionDeniedError):
            refused()
    memory.write(0, b"")
    assert not memory.check_range(0, 1, W)
    assert path.read_bytes() == b"firmware" * 10


def test_a_writable_backing_as_a_read_only_region():
    backing = Backing.anonymous(PAGE)
    both = GuestRegionCollection.from_regions(
        [MmapRegion(0, backing, writable=False), MmapRegion(0x10000, backing)]
    )
    both.write(0x10000, b"seen")
    assert both.read(0, 4) == b"seen"
    with pytest.raises(PermissionDeniedError):
        both.write(0, b"x")


def test_refused_backings(tmp_path):
    before = open_fds()
    reading, writing = os.pipe()
    closed = os.dup(reading)
    os.close(closed)
    with pytest.raises(BackingError):
        Backing.from_fd(reading, PAGE)
    with pytest.raises(BackingError, match="cannot be used"):
        Backing.from_fd(closed, PAGE)
    with pytest.raises(BackingError):
        Backing.anonymous(1 << 60)
    with pytest.raises(ValueError, match="multiple"):
        Backing.memfd(PAGE, hugetlb=3000)
    with pytest.raises(ValueError, match="multiple"):
        Backing.memfd(PAGE, hugetlb=2 << 20)
    os.close(reading)
    os.close(writing)
    assert open_fds() == before


def test_seals_are_made_and_reported():
    plain, sealed = Backing.memfd(PAGE), Backing.memfd(PAGE, seal=True)
    assert (plain.seals, plain.shrinkable) == (frozenset(), True)
    assert (sealed.seals, sealed.shrinkable) == ({"shrink", "grow"}, False)
    for size in (0, 2 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(sealed.fd, size)
    fcntl.fcntl(plain.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    assert (plain.seals, plain.shrinkable) == ({"shrink", "seal"}, False)
    adopted = Backing.from_fd(sealed.fd, 100, 50)
    assert (adopted.seals, adopted.shrinkable) == (sealed.seals, False)
    private = Backing.anonymous(PAGE)
    assert (private.seals, private.shrinkable) == (frozenset(), False)


def test_files_cannot_be_sealed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(10))
    backing = Backing.from_file(path)
    assert (backing.seals, backing.shrinkable) == (frozenset(), True)


def test_what_a_region_says_of_itself(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * PAGE))
    region = MmapRegion(
        0x100000,
        Backing.from_file(path, PAGE, 100, writable=False),
        bitmap=AtomicBitmap(PAGE),
        name="rom",
    )
    assert region.describe() == {
        "name": "rom",
        "start": 0x100000,
        "size": PAGE,
        "last_addr": 0x100000 + PAGE - 1,
        "writable": False,
        "file": str(path),
        "file_offset": 100,
        "page_size": PAGE,
        "is_hugetlbfs": False,
        "seals": [],
        "shrinkable": True,
        "vanished": None,
        "tracked": True,
    }
    plain = MmapRegion.anonymous(0, 10).describe()
    assert (plain["file"], plain["file_offset"], plain["tracked"]) == (None, None, False)
    assert repr(region) == f"<MmapRegion 'rom' 0x100000+{PAGE:#x}>"
    assert (region.file_offset.start, MmapRegion.anonymous(0, 10).file_offset) == (100, None)
    assert region.host_address(5) == region.host_address() + 5
    assert 0x100000 in region
    assert 0x100000 + PAGE not in region


def test_a_bitmap_must_cover_its_region():
    """Else writes to the rest would be lost to a migration."""
    with pytest.raises(ValueError, match="miss writes"):
        MmapRegion.anonymous(0, 0x2000, bitmap=AtomicBitmap(0x1FFF))


HUGE = 2 << 20


@pytest.fixture
def huge_pages():
    """How many huge pages can be had; as root some are reserved for the time of the test."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    free, reserved = pool / "free_hugepages", pool / "nr_hugepages"
    if not pool.exists():
        yield 0
        return
    # The pool is the host's: tests in other processes wait.
    with reserved.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = int(reserved.read_text())
        missing = max(4 - int(free.read_text()), 0)
        with contextlib.suppress(OSError):
            reserved.write_text(str(before + missing))
        try:
            yield int(free.read_text())
        finally:
            gc.collect()
            with contextlib.suppress(OSError):
                reserved.write_text(str(before))


def test_huge_pages(huge_pages):
    """Where the host gives none that is said at once, not when they are touched."""
    if huge_pages < 4:
        with pytest.raises(BackingError, match=r"cannot (map|make a memfd)"):
            Backing.memfd(HUGE * (huge_pages + 1), hugetlb=HUGE)
        return
    with Backing.memfd(HUGE, hugetlb=HUGE, seal=True) as backing:
        region = MmapRegion(0, backing)
        assert (region.is_hugetlbfs, backing.page_size) == (True, HUGE)
        assert (backing.seals, backing.shrinkable) == ({"shrink", "grow"}, False)
        shown = region.describe()
        assert (shown["is_hugetlbfs"], shown["page_size"]) == (True, HUGE)
        memory = GuestRegionCollection.from_regions([region])
        memory.write(12345, b"huge")
        assert memory.read(12345, 4) == b"huge"
        odd = MmapRegion.from_fd(0, backing.fd, 100, 12345)
        assert (odd.slice().read(0, 4), odd.is_hugetlbfs) == (b"huge", True)
        guarded = Backing.from_fd(backing.fd, 100, 12345, guard=True)
        assert MmapRegion(0, guarded).slice().read(0, 4) == b"huge"
        del memory, region
        gc.collect()
    with Backing.memfd(HUGE, hugetlb=HUGE, guard=True) as backing:
        ctypes.memset(backing.host_address, 1, HUGE)
        ends = {
            int(end, 16)
            for line in Path("/proc/self/maps").read_text().splitlines()
            if " ---p " in line
            for end in line.split()[0].split("-")
        }
        assert {backing.host_address, backing.host_address + HUGE} <= ends


def test_huge_pages_that_are_truncated(huge_pages):
    """A huge page that is gone is an error of the access, as a small one is."""
    if huge_pages < 4:
        with pytest.raises(BackingError, match=r"cannot (map|make a memfd)"):
            Backing.memfd(HUGE * (huge_pages + 1), hugetlb=HUGE)
        return
    done = run(
        f"""
        import os
        from guestio import *
        backing = Backing.memfd({2 * HUGE}, hugetlb={HUGE})
        memory = GuestRegionCollection.from_regions([MmapRegion(0, backing)])
        memory.write(0, b"kept")
        os.ftruncate(backing.fd, {HUGE})
        for call in (lambda: memory.read({HUGE} + 5, 4), lambda: memory.store({HUGE}, 1, 8)):
            try:
                call()
            except MemoryVanishedError:
                print("noticed")
        print(memory.read(0, 4), backing.vanished)
        """
    )
    assert done == (0, f"noticed\nnoticed\nb'kept' {HUGE}\n")


def test_more_huge_pages_than_there_are():
    """Not when they are touched, which would be too late, but at once; and nothing is kept."""
    before = open_fds()
    with pytest.raises(BackingError, match=r"cannot (map|make a memfd)"):
        Backing.memfd(1 << 40, hugetlb=HUGE)
    assert open_fds() == before


@pytest.mark.parametrize("kind", ["anonymous", "memfd", "from_fd"])
@pytest.mark.parametrize("where", ["below", "above"])
def test_guard_pages(kind, where):
    """Overrunning a guarded backing by a raw pointer kills the process; one without does not."""
    code = f"""
        import ctypes
        from guestio import Backing
        kind = {kind!r}
        if kind == "from_fd":
            shared = Backing.memfd(8192)
            backing = Backing.from_fd(shared.fd, 8192, guard=True)
        else:
            backing = getattr(Backing, kind)(8192, guard=True)
        ctypes.memset(backing.host_address, 1, 8192)
        print("inside", flush=True)
        ctypes.memset(backing.host_address + {-1 if where == "below" else 8192}, 1, 1)
    """
    assert run(code) == (-signal.SIGSEGV, "inside\n")


def test_memory_of_another_owner():
    array = np.zeros(PAGE, np.uint8)
    region = MmapRegion(0x4000, Backing.from_buffer(array), bitmap=AtomicBitmap(PAGE))
    memory = GuestRegionCollection.from_regions([region])
    memory.write(0x4010, b"mine")
    assert array[0x10:0x14].tobytes() == b"mine"
    array[0] = 7
    assert memory.load(0x4000, 1) == 7
    assert region.bitmap.count() == 1
    assert region.host_address() == array.ctypes.data
    with mmap.mmap(-1, PAGE) as other:
        backing = Backing.from_buffer(other)
        with pytest.raises(BufferError):
            other.close()
        backing.close()


def test_closing():
    backing = Backing.memfd(PAGE, "to-be-closed")
    assert mapped("to-be-closed")
    backing.close()
    backing.close()
    assert backing.closed
    assert backing.fd is None
    assert not mapped("to-be-closed")
    with pytest.raises(ValueError, match="closed"):
        backing.host_address  # noqa: B018
    with pytest.raises(ValueError, match="closed"):
        GuestRegionCollection.from_regions([MmapRegion(0, backing)])


USERS = {
    "collection": lambda b: GuestRegionCollection.from_regions([MmapRegion(0, b)]),
    "slice": lambda b: MmapRegion(0, b).slice(),
    "part of a slice": lambda b: MmapRegion(0, b).slice().split_at(10)[1],
    "memoryview": lambda b: memoryview(MmapRegion(0, b).slice()),
    "array": lambda b: np.frombuffer(MmapRegion(0, b).slice(8), np.uint32),
    "vector": lambda b: USERS["collection"](b).gather(0, 10, R),
    "iterator": lambda b: USERS["collection"](b).slices(0, 10),
    "slice memory": lambda b: SliceMemory(MmapRegion(0, b).slice()),
    "another backing": lambda b: Backing.from_buffer(MmapRegion(0, b).slice()),
}


@pytest.mark.parametrize("kind", [Backing.anonymous, Backing.memfd])
@pytest.mark.parametrize("user", USERS)
def test_memory_in_use_is_not_closed(user, kind):
    backing = kind(PAGE)
    using = USERS[user](backing)
    with pytest.raises(BufferError, match="in use"):
        backing.close()
    assert not backing.closed
    del using
    gc.collect()
    backing.close()


@pytest.mark.parametrize("user", ["slice", "memoryview", "array", "vector"])
def test_memory_in_use_outlives_everything_it_came_from(user):
    backing = Backing.memfd(PAGE, "outlived")
    MmapRegion(0, backing).slice().write(8, b"still here")
    using = USERS[user](backing)
    del backing
    gc.collect()
    assert mapped("outlived")
    content = using.read() if hasattr(using, "read") else bytes(memoryview(using).cast("B"))
    assert b"still here"[:2] in content
    del using
    gc.collect()
    assert not mapped("outlived")


def test_raw_addresses_are_the_callers_risk():
    backing = Backing.anonymous(PAGE)
    ctypes.memmove(backing.host_address, b"raw", 3)
    assert MmapRegion(0, backing).slice().read(0, 3) == b"raw"


def test_memory_in_use_says_by_what():
    backing = Backing.memfd(2 * PAGE)
    memory = GuestRegionCollection.from_regions([MmapRegion(0, backing)])
    with pytest.raises(BufferError, match=r"0x2000 bytes .* in use by 1 region tables .*drop or"):
        backing.close()
    part = memory.whole_slice(0, PAGE, Permissions.READ)
    view = memoryview(part)
    with pytest.raises(BufferError, match=r"1 region tables .* and 1 buffers \(memoryview"):
        backing.close()
    view.release()
    del part, memory, view
    backing.close()


def test_an_address_or_a_region_can_be_looked_for():
    low, high = MmapRegion.anonymous(0x1000, PAGE), MmapRegion.anonymous(1 << 63, PAGE)
    memory = GuestRegionCollection.from_regions([low, high])
    assert 0x1000 in memory
    assert 0x1FFF in memory
    assert 0x100 not in memory
    assert 0x2000 not in memory
    assert np.uint64(1 << 63) in memory
    assert low in memory
    assert MmapRegion.anonymous(0x1000, PAGE) not in memory
    assert 0 not in GuestRegionCollection()
    with pytest.raises(TypeError):
        "0x1000" in memory  # noqa: B015
    with pytest.raises(ValueError):
        -1 in memory  # noqa: B015


def test_private_memory_is_not_shared_and_files_are(tmp_path):
    """Without a file private and zeroed; with one, what is written is in the file."""
    path = tmp_path / "ram"
    path.write_bytes(bytes(0x2000))
    shared = MmapRegion(0x1000, Backing.from_file(path))
    memory = GuestRegionCollection.from_regions([MmapRegion.anonymous(0, 0x1000), shared])
    assert memory.read(0, 0x1000) == bytes(0x1000)
    memory.write(0xFFC, b"12345678")
    assert path.read_bytes()[:4] == b"5678"
    modes = []
    for region in memory:
        at = region.host_address()
        for line in Path("/proc/self/maps").read_text().splitlines():
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            if first <= at < last:
                modes.append(line.split()[1])
    assert modes == ["rw-p", "rw-s"]


def test_adopted_memory_stays_the_owners():
    """Any address can be adopted by way of ctypes, aligned or not; closing does not unmap it."""
    owner = np.zeros(0x2001, np.uint8)
    at = owner.ctypes.data + 1
    backing = Backing.from_buffer((ctypes.c_uint8 * 0x1000).from_address(at))
    assert (backing.host_address, backing.fd, backing.file_offset) == (at, None, None)
    memory = GuestRegionCollection.from_regions([MmapRegion(0, backing)])
    memory.write(0, b"adopted")
    assert owner[1:8].tobytes() == b"adopted"
    del memory
    backing.close()
    owner[1] = 1


def test_memory_of_ordinary_pages_says_so():
    assert not MmapRegion.anonymous(0, 0x1000).is_hugetlbfs
    assert not MmapRegion.memfd(0, 0x1000).is_hugetlbfs
