"""Transfers that end early or are refused: what moved, what is marked, what the error names."""

import io
import itertools
import os
import signal
import socket
import threading
import time

import pytest

from guestio import (
    AtomicBitmap,
    Backing,
    CannotResolveError,
    GuestRegionCollection,
    InvalidAddressError,
    Iommu,
    IommuMemory,
    Iotlb,
    MmapRegion,
    PartialAccessError,
    PermissionDeniedError,
    Permissions,
)

MAX = 2**64 - 1
R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE
DATA = bytes(range(1, 17))


class Tables(Iommu):
    """An IOMMU whose IOTLB always holds everything."""

    def __init__(self, *mappings):
        self._iotlb = Iotlb()
        for mapping in mappings:
            self._iotlb.set_mapping(*mapping)

    @property
    def iotlb(self):
        return self._iotlb


class Dribble(io.RawIOBase):
    """A stream that gives or takes at most 5 bytes at a time."""

    def __init__(self, content=b""):
        self.left, self.taken = content, b""

    def read(self, size=-1):
        given, self.left = self.left[: min(size, 5)], self.left[min(size, 5) :]
        return given

    def write(self, data):
        self.taken += bytes(data)[:5]
        return min(len(data), 5)


@pytest.fixture(params=["regions", "pages"])
def fragmented(request):
    """Memory in two pieces that meet at 0x1000: two regions, or two pages behind an IOMMU."""
    if request.param == "regions":
        return GuestRegionCollection.from_ranges([(0, 0x1000), (0x1000, 0x1000)])
    backend = GuestRegionCollection.from_ranges([(0x10000, 0x10000)])
    return IommuMemory(backend, Tables((0, 0x18000, 0x1000, RW), (0x1000, 0x12000, 0x1000, RW)))


def test_a_short_read_ends_the_transfer(fragmented):
    """vm-memory goes on in the next fragment, and leaves a hole."""
    source = Dribble(DATA)
    assert fragmented.read_from(0xFF8, source, 16) == 5
    assert fragmented.read(0xFF8, 16) == DATA[:5] + bytes(11)
    assert source.left == DATA[5:]


def test_an_exact_read_goes_on_in_the_same_fragment(fragmented):
    fragmented.read_exact_from(0xFF8, Dribble(DATA), 16)
    assert fragmented.read(0xFF8, 16) == DATA
    with pytest.raises(PartialAccessError) as caught:
        fragmented.read_exact_from(0xFF8, Dribble(DATA[::-1]), 17)
    assert caught.value.completed == 16
    assert fragmented.read(0xFF8, 16) == DATA[::-1]


def test_a_sink_that_takes_little(fragmented):
    fragmented.write(0xFF8, DATA)
    sink = Dribble()
    assert fragmented.write_to(0xFF8, sink, 16) == 16
    assert sink.taken == DATA


def test_streams_from_sockets(fragmented):
    """Every piece of a stream of unlike pieces arrives where it belongs."""
    ours, theirs = socket.socketpair()
    pieces = [DATA[a:b] for a, b in itertools.pairwise((0, 1, 4, 9, 16))]
    with ours, theirs:
        for piece in pieces:
            theirs.send(piece)
            assert fragmented.read_from(0xFF8, ours, 16) == len(piece)
            assert fragmented.read(0xFF8, len(piece)) == piece

        def dribble():
            for piece in pieces:
                theirs.send(piece)
                threading.Event().wait(0.01)

        fragmented.fill(0xFF8, 16)
        sender = threading.Thread(target=dribble)
        sender.start()
        fragmented.read_exact_from(0xFF8, ours, 16)
        sender.join()
        assert fragmented.read(0xFF8, 16) == DATA


def test_descriptors_are_read_in_place(fragmented, tmp_path):
    path = tmp_path / "data"
    path.write_bytes(DATA)
    fd = os.open(path, os.O_RDWR)
    try:
        assert fragmented.read_from(0xFF8, fd, 32) == 16
        assert fragmented.read(0xFF8, 16) == DATA
        assert fragmented.write_to(0xFF8, fd, 16) == 16
    finally:
        os.close(fd)
    assert path.read_bytes() == DATA + DATA


def test_failing_streams_say_what_moved(fragmented):
    class Breaks(Dribble):
        def read(self, size=-1):
            if not self.left:
                raise ConnectionResetError("gone")
            return super().read(size)

    class Blocks(io.RawIOBase):
        def read(self, size=-1):
            return None

        def write(self, data):
            return None

    class Lies(io.RawIOBase):
        def read(self, size=-1):
            return bytes(size + 1)

        def write(self, data):
            return len(data) + 1

    with pytest.raises(PartialAccessError) as caught:
        fragmented.read_exact_from(0xFF8, Breaks(DATA), 20)
    assert caught.value.completed == 16
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    with pytest.raises(ConnectionResetError):
        fragmented.read_exact_from(0xFF8, Breaks(), 4)
    with pytest.raises(BlockingIOError):
        fragmented.read_from(0, Blocks(), 4)
    with pytest.raises(PartialAccessError):
        fragmented.write_to(0, Blocks(), 4)
    before = fragmented.read(0, 0x2000)
    with pytest.raises(InvalidAddressError):
        fragmented.read_from(0x1000, Lies(), 0x1000)
    with pytest.raises(ValueError, match="took"):
        fragmented.write_to(0, Lies(), 4)
    assert fragmented.read(0, 0x2000) == before
    for stream in (object(), "name", 1.5, None):
        with pytest.raises(TypeError):
            fragmented.read_from(0, stream, 4)
        with pytest.raises(TypeError):
            fragmented.write_to(0, stream, 4)
    with pytest.raises(OSError, match="Bad file descriptor"):
        fragmented.read_from(0, 1 << 20, 4)


def test_a_socket_that_dies_while_it_is_written_to(fragmented):
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        with pytest.raises(BrokenPipeError):
            fragmented.write_all_to(0, ours, 16)


@pytest.fixture
def behind():
    """A read-only region and another, behind an IOMMU that maps beyond them."""
    read_only = MmapRegion(0x10000, Backing.anonymous(0x1000), writable=False, name="rom")
    ram = MmapRegion.anonymous(0x20000, 0x1000)
    tables = Tables(
        (0x1000, 0x10000, 0x1000, RW),
        (0x2000, 0x20000, 0x1000, RW),
        (0x3000, 0x20800, 0x1000, RW),
        (0x5000, 0x20000, 0x1000, R),
    )
    backend = GuestRegionCollection.from_regions([read_only, ram])
    return IommuMemory(backend, tables, bitmap=AtomicBitmap(0x10000)), read_only


@pytest.mark.parametrize("iova", [0x5000, 0x5001, 0x5800, 0x5FFF, 0x6000, 0x9999999, 2**64 - 1])
def test_an_access_of_nothing_succeeds_everywhere(behind, iova):
    """At the start of an entry that forbids it, inside, at its end, in a hole."""
    memory, _ = behind
    memory.write(iova, b"")
    memory.fill(iova, 0)
    assert memory.write_some(iova, b"") == 0
    assert memory.read_from(iova, io.BytesIO(b"x"), 0) == 0
    assert memory.check_range(iova, 0, RW)
    assert list(memory.slices(iova, 0, RW)) == []
    with memory.gather(iova, 0, RW) as vector, memory.iommu.translate(iova, 0, RW) as ranges:
        assert (len(vector), ranges) == (0, [])
    assert memory.iommu.iotlb.lookup(iova, 0, W) == []
    assert memory.bitmap.count() == 0
    assert len(memory.iommu.iotlb._map.leases) == 0


def test_translation_fails_as_a_whole(behind):
    memory, _ = behind
    for call in (
        lambda: memory.write_some(0x3000, bytes(0x1001)),
        lambda: memory.write(0x3000, bytes(0x1001)),
        lambda: memory.fill(0x3000, 0x1001, 1),
        lambda: memory.read_some(0x3000, bytearray(0x1001)),
    ):
        with pytest.raises(CannotResolveError) as caught:
            call()
        assert tuple(caught.value.iova_range) == (0x4000, 1)
    assert memory.bitmap.count() == 0


def test_partial_results_say_how_much_moved(behind):
    memory, _ = behind
    assert memory.write_some(0x3000, b"\x01" * 0x1000) == 0x800
    for call, done in (
        (lambda: memory.write(0x3000, bytes(0x1000)), 0x800),
        (lambda: memory.fill(0x3100, 0xF00, 1), 0x700),
        (lambda: memory.read(0x3200, 0xE00), 0x600),
        (lambda: memory.readinto(0x3300, bytearray(0xD00)), 0x500),
        (lambda: memory.read_exact_from(0x3400, io.BytesIO(bytes(0xC00)), 0xC00), 0x400),
        (lambda: memory.write_all_to(0x3500, io.BytesIO(), 0xB00), 0x300),
    ):
        with pytest.raises(PartialAccessError) as caught:
            call()
        assert caught.value.completed == done
        assert caught.value.__cause__.target == 0x21000


def test_errors_name_both_addresses(behind):
    memory, _ = behind
    with pytest.raises(InvalidAddressError) as caught:
        memory.write(0x3800, b"12345678")
    error = caught.value
    assert (error.addr, error.target, error.length, error.access) == (0x3800, 0x21000, 8, W)
    for part in ("0x3800", "0x21000", "0x8", "WRITE"):
        assert part in str(error)


def test_errors_name_the_region(behind):
    memory, rom = behind
    with pytest.raises(PermissionDeniedError) as caught:
        memory.write(0x1100, b"x")
    error = caught.value
    assert (error.addr, error.target, error.region) == (0x1100, 0x10100, rom)
    assert "'rom'" in str(error)
    with pytest.raises(PermissionDeniedError) as caught:
        memory.backend.store(0x10000, 1, 4)
    assert (caught.value.addr, caught.value.target, caught.value.region) == (0x10000, None, rom)
    assert not memory.check_range(0x1100, 1, W)
    assert memory.check_range(0x1100, 1, R)
    with pytest.raises(CannotResolveError) as refused:
        memory.write(0x5000, b"x")
    assert "does not allow" in str(refused.value)
    assert refused.value.access == W


@pytest.mark.parametrize("way", ["read", "write"])
def test_interrupted_system_calls_are_repeated(way):
    """Signals whose handlers return do not end a transfer; one whose handler raises does."""
    memory = GuestRegionCollection.from_ranges([(0, 1 << 20)])
    memory.fill(0, 1 << 20, 5)
    ours, theirs = socket.socketpair()
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)

    def serve():
        end = time.monotonic() + 30
        while len(seen) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        if way == "read":
            theirs.sendall(b"late")
        else:
            left = 1 << 20
            while left:
                left -= len(theirs.recv(left))

    peer = threading.Thread(target=serve)
    try:
        with ours, theirs:
            peer.start()
            if way == "read":
                assert memory.read_from(0, ours, 100) == 4
                assert memory.read(0, 5) == b"late\x05"
            else:
                memory.write_all_to(0, ours, 1 << 20)
            peer.join()
            assert len(seen) > 2

            def give_up(*_):
                raise KeyboardInterrupt

            # Once, and not before it is waited for: pytest would take it for the user's.
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, give_up)
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                memory.read_from(0, ours, 4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_exact_read_from_a_byte_source_moves_what_there_is():
    """The original checks the length of such a source first, and moves nothing."""
    memory = GuestRegionCollection.from_ranges([(0, 0x1000)])
    source = io.BytesIO(b"123")
    with pytest.raises(PartialAccessError) as caught:
        memory.read_exact_from(0, source, 4)
    assert (caught.value.completed, memory.read(0, 4)) == (3, b"123\0")
    assert source.tell() == 3


def test_a_range_that_passes_the_address_space_is_refused_before_anything_moves():
    memory = GuestRegionCollection.from_regions([MmapRegion.anonymous(MAX - 0xFFF, 0x1000)])
    for refused in (
        lambda: memory.slices(MAX, 2),
        lambda: memory.write(MAX, b"ab"),
        lambda: memory.write_some(MAX, b"ab"),
        lambda: memory.read_from(MAX, io.BytesIO(b"ab"), 2),
    ):
        with pytest.raises(InvalidAddressError):
            refused()
    assert memory.read(MAX, 1) == b"\0"
    assert [len(piece) for piece in memory.slices(MAX, 1)] == [1]
