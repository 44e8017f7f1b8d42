"""The block device and the disk behind it: what waits, who waits, and what becomes of it.

Rules: virtio 1.3 section 5.2.6.2 (a flush covers the writes completed before it), preadv2(2)
(RWF_NOWAIT), and :meth:`Device.process`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestio._core.virtio.chain import Chain
from guestio.virtio import blk
from guestio.virtio import image as images
from guestio.virtio.blk import (
    S_IOERR,
    S_OK,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
    BlockDevice,
)
from tests.kit.block_requests import READ_AT, SECTORS, SIZE, WRITE_AT, Disk
from tests.kit.rings import WRITE, Desc
from tests.kit.serving import promptly, until

PLACE = 0x10000
_libc = ctypes.CDLL(None)
LIMIT = 20.0


class Requests:
    """Puts requests before a device without waiting for them; each in memory of its own."""

    def __init__(self, device: BlockDevice) -> None:
        self.device = device
        self.disk = Disk(device)
        self.rig = self.disk.rig
        self.count = 0

    def take(self, kind: int, sector: int = 0, payload: bytes = b"", reply: int = 0) -> Chain:
        """A request as the device is given it, not offered to its server."""
        index, self.count = self.count, self.count + 1
        source = struct.pack("<IIQ", kind, 0, sector) + payload
        here, there = READ_AT + PLACE * index, WRITE_AT + PLACE * index
        self.disk.memory.write(here, source)
        self.disk.memory.write(there, b"\xee" * (reply + 1))
        head = self.rig.put_chain(4 * index, Desc(here, len(source)), Desc(there, reply + 1, WRITE))
        self.rig.offer(head)
        (chain,), _ = self.rig.ring.pop()
        return chain

    def start(self, kind: int, sector: int = 0, payload: bytes = b"", reply: int = 0) -> object:
        """Have the device process a request; what it answers."""
        return self.device.process(0, self.take(kind, sector, payload, reply))

    def reply(self, index: int, length: int) -> tuple[int, bytes]:
        """The status of a request and the bytes before it."""
        data = self.disk.memory.read(WRITE_AT + PLACE * index, length + 1)
        return data[-1], data[:-1]


def need_to_know_what_is_cached(path: Path) -> None:
    """Skip the test where a file system does not tell; before anything waits."""
    with path.open("rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            pass
        except OSError as error:
            pytest.skip(f"{path.parent} does not tell what is cached: {error.strerror}")


class CountingLock:
    """Counts how often a lock was wanted."""

    def __init__(self, lock: threading.Lock) -> None:
        self.wanted = 0
        self._lock = lock

    def __enter__(self) -> None:
        self.wanted += 1
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def forget(path: Path) -> None:
    """Drop a file from the page cache, or skip the test."""
    need_to_know_what_is_cached(path)
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        for _ in range(100):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not cached_pages(file.fileno()):
                return
            time.sleep(0.02)
    pytest.fail("the page cache keeps the file")


def _lacks_nowait(path: Path) -> bool:
    """Whether a file system does not know RWF_NOWAIT."""
    with path.open("rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except OSError as error:
            return error.errno == errno.EOPNOTSUPP
    return False


def cached_pages(fd: int) -> int:
    """How many pages of a file are in the page cache (mincore(2))."""
    with mmap.mmap(fd, 0) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        found = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        _libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped)), found)
        del start
        return sum(each & 1 for each in found)


_before: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def _threads_of_tests_before() -> None:
    """Threads of other tests' devices may be about to end."""
    _before.clear()
    _before.update(threading.enumerate())


def names() -> list[str]:
    """The device's threads that are alive."""
    return [
        each.name
        for each in threading.enumerate()
        if each.name.startswith("guestio-blk") and each not in _before
    ]


class Gate:
    """An fdatasync that stands still until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered = threading.Semaphore(0)
        self.go = threading.Event()
        self._real = os.fdatasync
        monkeypatch.setattr(blk.os, "fdatasync", self._wait)

    def _wait(self, fd: int) -> None:
        self.entered.release()
        assert self.go.wait(LIMIT)
        self._real(fd)

    def await_entered(self) -> None:
        assert self.entered.acquire(timeout=LIMIT)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture
def make(image: Path) -> Iterator[Callable[..., Requests]]:
    """Make a device over the image, with requests for it."""
    made: list[BlockDevice] = []

    def requests(**options: int) -> Requests:
        made.append(BlockDevice(image, **options))
        return Requests(made[-1])

    yield requests
    for device in made:
        device.close()
    assert names() == []


class TestWhatIsNotCached:
    def test_it_is_left_where_the_ring_is_walked(self, image: Path, make) -> None:
        disk = make(io_threads=1).disk
        assert not disk.device.server.image.waits
        disk.rig.view.write(READ_AT, struct.pack("<IIQ", T_IN, 0, 8))
        for cached in (False, True):
            if not cached:
                forget(image)
            disk.rig.offer(disk.rig.put_chain(0, Desc(READ_AT, 16), Desc(WRITE_AT, 4097, WRITE)))
            chains, _, served, _ = disk.rig.ring.run_once(disk.device.server)
            assert (served, len(chains)) == ((1, 0) if cached else (0, 1))
            for chain in chains:
                assert disk.device.server.process(chain) == 4097
                disk.rig.ring.complete(chain, 4097)
            disk.rig.ring.publish()
            assert disk.memory.read(WRITE_AT, 4097) == image.read_bytes()[4096:8192] + b"\0"
            disk.memory.write(WRITE_AT, bytes(4097))
        assert disk.device.errors == 0

    def test_a_thread_waits_for_it(self, image: Path, make) -> None:
        requests = make(io_threads=1)
        forget(image)
        assert names() == []
        answer = requests.start(T_IN, 8, reply=4096)
        assert isinstance(answer, Future)
        assert answer.result(LIMIT) == 4097
        assert requests.reply(0, 4096) == (S_OK, image.read_bytes()[4096:8192])
        assert len(names()) == 1
        assert requests.start(T_IN, 8, reply=4096) == 4097

    def test_without_threads_everything_is_done_at_once(self, image: Path, make) -> None:
        requests = make(io_threads=0)
        assert requests.device.server.image.waits
        forget(image)
        for kind, payload, reply in (
            (T_IN, b"", 4096),
            (T_OUT, b"w" * 512, 0),
            (T_FLUSH, b"", 0),
            (T_GET_ID, b"", 20),
        ):
            assert isinstance(requests.start(kind, 0, payload, reply), int)
        assert names() == []

    def test_a_part_of_it_is_cached(self, image: Path, make) -> None:
        requests = make(io_threads=1)
        for cached in (0, 128, 250):
            forget(image)
            with image.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                os.pread(file.fileno(), 4096, 4096 * cached)
            # The first page or another one is there, the rest is not.
            answer = requests.start(T_IN, 0, reply=SIZE // 32)
            assert blk_result(answer) == SIZE // 32 + 1
            index = requests.count - 1
            assert requests.reply(index, SIZE // 32)[1] == image.read_bytes()[: SIZE // 32]

    def test_what_was_moved_before_it_would_wait_is_marked(self, image: Path, make) -> None:
        requests = make(io_threads=1)
        chain = requests.take(T_IN, 0, reply=14 * 4096)
        deadline = time.monotonic() + LIMIT
        # The rest may arrive before it is asked for again, and the kernel may read more than the
        # page that it was told to.
        while True:
            forget(image)
            with image.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                os.pread(file.fileno(), 4096, 0)
            requests.disk.memory.fill(WRITE_AT, 4096, 0xEE)
            requests.disk.bitmap.get_and_reset()
            if requests.device.server.process(chain, wait=False) is None:
                break
            assert time.monotonic() < deadline, "the whole read was served each time"
        assert requests.disk.memory.read(WRITE_AT, 4096) == image.read_bytes()[:4096]
        assert requests.disk.bitmap.is_set(WRITE_AT)

    def test_memory_knows_nothing_to_wait_for(self, image: Path) -> None:
        shm = Path("/dev/shm") / f"guestio-test-{os.getpid()}.img"
        shm.write_bytes(image.read_bytes())
        try:
            device = BlockDevice(shm, io_threads=2)
            disk = Disk(device)
            assert not device.server.image.waits
            assert disk.read(8, 4096) == image.read_bytes()[4096:8192]
            # It is asked once, not for each read.
            assert device.server.image.waits == _lacks_nowait(shm)
            assert isinstance(Requests(device).start(T_IN, 8, reply=4096), int)
            assert disk.device.errors == 0
            assert names() == []
            device.close()
        finally:
            shm.unlink()

    def test_a_read_only_image(self, image: Path, make) -> None:
        requests = make(io_threads=1, read_only=True)
        forget(image)
        assert blk_result(requests.start(T_IN, 8, reply=4096)) == 4097
        assert blk_result(requests.start(T_FLUSH)) == 1
        assert blk_result(requests.start(T_DISCARD, 0, struct.pack("<QII", 0, 8, 0))) == 1
        assert requests.reply(2, 0)[0] == S_IOERR


def blk_result(answer: object) -> int:
    """What came of a request, waited for."""
    return answer.result(LIMIT) if isinstance(answer, Future) else answer


_segments = st.lists(
    st.tuples(st.integers(0, SECTORS + 2), st.integers(0, 64), st.sampled_from((0, 1))),
    min_size=1,
    max_size=3,
)
_requests = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(0, SECTORS + 1), st.integers(0, 16), st.booleans()),
        st.tuples(st.just("write"), st.integers(0, SECTORS + 1), st.integers(0, 16), st.booleans()),
        st.tuples(st.sampled_from((T_DISCARD, T_WRITE_ZEROES)), _segments),
        st.tuples(st.sampled_from((T_FLUSH, T_GET_ID, 99))),
    ),
    max_size=20,
)


@settings(max_examples=60, deadline=None)
@given(_requests, st.integers(1, 4), st.booleans())
def test_threads_change_no_answer(tmp_path_factory, requests, threads, served) -> None:
    directory = tmp_path_factory.mktemp("same")
    contents = random.Random(7).randbytes(SIZE)
    disks, images = [], []
    for name, count in (("now", 0), ("later", threads)):
        images.append(directory / name)
        images[-1].write_bytes(contents)
        disks.append(Disk(BlockDevice(images[-1], io_threads=count, serial="same"), served=served))
    rng = random.Random(8)
    for kind, *rest in requests:
        if kind in ("read", "write"):
            sector, count, cold = rest
            if cold:
                forget(images[1])
            data = rng.randbytes(512 * count)
            given = (T_IN, sector) if kind == "read" else (T_OUT, sector, data)
            reply = 512 * count if kind == "read" else 0
        else:
            payload = b"".join(struct.pack("<QII", *each) for each in rest[0]) if rest else b""
            given, reply = (kind, 0, payload), 20
        assert disks[0].run(*given, reply=reply) == disks[1].run(*given, reply=reply)
    for disk in disks:
        disk.device.close()
    assert images[0].read_bytes() == images[1].read_bytes()
    assert disks[0].device.errors == disks[1].device.errors
    for path in images:
        path.unlink()


class TestFlush:
    def test_reads_are_served_while_it_waits(
        self, image: Path, make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        need_to_know_what_is_cached(image)
        requests, gate = make(io_threads=2), Gate(monkeypatch)
        flush = requests.start(T_FLUSH)
        gate.await_entered()
        assert requests.start(T_IN, 8, reply=512) == 513
        assert requests.start(T_OUT, 8, b"n" * 512) == 1
        forget(image)
        assert blk_result(requests.start(T_IN, 8, reply=512)) == 513
        assert requests.reply(3, 512) == (S_OK, b"n" * 512)
        assert isinstance(flush, Future)
        assert not flush.done()
        assert requests.reply(0, 0) == (0xEE, b"")
        gate.go.set()
        assert flush.result(LIMIT) == 1
        assert requests.reply(0, 0) == (S_OK, b"")

    def test_it_begins_after_every_write_that_was_completed_before_it(
        self, make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        order: list[str] = []
        real_sync, real_allocate = os.fdatasync, images._fallocate

        def sync(fd: int) -> None:
            order.append("sync")
            real_sync(fd)

        def allocate(*arguments: int) -> bool:
            time.sleep(0.05)
            done = real_allocate(*arguments)
            order.append("zeroed")
            return done

        monkeypatch.setattr(blk.os, "fdatasync", sync)
        monkeypatch.setattr(images, "_fallocate", allocate)
        requests = make(io_threads=4)
        for _ in range(5):
            zeroes = requests.start(T_WRITE_ZEROES, 0, struct.pack("<QII", 0, 8, 0))
            assert blk_result(zeroes) == 1
            assert blk_result(requests.start(T_FLUSH)) == 1
        assert order == ["zeroed", "sync"] * 5

    def test_lost_data_fails_every_flush_that_was_waiting_for_it(
        self, make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # fsync(2): an error of writing back is reported once for each open file description.
        lost = [OSError(errno.EIO, "lost")]
        requests = make(io_threads=3)
        gate = Gate(monkeypatch)

        def sync(fd: int) -> None:
            error = lost.pop() if lost else None
            gate._wait(fd)
            if error is not None:
                raise error

        monkeypatch.setattr(blk.os, "fdatasync", sync)
        first = requests.start(T_FLUSH)
        gate.await_entered()
        begun = CountingLock(requests.device._image._flushing)
        monkeypatch.setattr(requests.device._image, "_flushing", begun)
        others = [requests.start(T_FLUSH) for _ in range(2)]
        until(lambda: begun.wanted == 2)
        gate.go.set()
        for answer in (first, *others):
            blk_result(answer)
        assert [requests.reply(i, 0)[0] for i in range(3)] == [S_IOERR] * 3
        assert requests.device.errors == 3
        blk_result(requests.start(T_FLUSH))
        assert requests.reply(3, 0)[0] == S_OK


class TestErrorsInThreads:
    def test_the_disk_fails(self, make, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(fd: int) -> None:
            raise OSError(errno.EIO, "the disk is broken")

        monkeypatch.setattr(blk.os, "fdatasync", fail)
        requests = make(io_threads=2)
        answer = requests.start(T_FLUSH)
        assert isinstance(answer, Future)
        assert answer.result(LIMIT) == 1
        assert requests.reply(0, 0)[0] == S_IOERR
        assert requests.device.errors == 1

    def test_an_image_that_shrinks_under_a_read(self, image: Path, make) -> None:
        requests = make(io_threads=1)
        forget(image)
        os.truncate(image, SIZE // 2)
        for sector, length in ((SECTORS // 2, 512), (SECTORS // 2 - 1, 1024)):
            blk_result(requests.start(T_IN, sector, reply=length))
            assert requests.reply(requests.count - 1, length)[0] == S_IOERR
        assert requests.device.errors == 2

    def test_each_is_counted(self, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(fd: int) -> None:
            raise OSError(errno.EIO, "the disk is broken")

        monkeypatch.setattr(blk.os, "fdatasync", fail)
        device = BlockDevice(image, io_threads=8, num_queues=4)

        def work() -> None:
            requests = Requests(device)
            for _ in range(40):
                wait([requests.start(T_FLUSH) for _ in range(3)], LIMIT)  # type: ignore[misc]
                requests.count = 0

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert device.errors == 4 * 40 * 3
        device.close()


class TestClosing:
    def test_it_waits_for_what_is_under_way(
        self, image: Path, make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        need_to_know_what_is_cached(image)
        requests, gate = make(io_threads=1), Gate(monkeypatch)
        flush = requests.start(T_FLUSH)
        gate.await_entered()
        forget(image)
        # Stands in line behind the flush.
        read = requests.start(T_IN, 8, reply=4096)
        closing = threading.Thread(target=requests.device.close)
        closing.start()
        closing.join(0.1)
        assert closing.is_alive()
        late = requests.start(T_FLUSH)
        # The core leaves everything to the device, which refuses it.
        assert requests.start(T_IN, 8, reply=512) == 0
        assert requests.reply(3, 512) == (S_IOERR, b"\xee" * 512)
        for kind, length in ((T_IN, 512), (T_OUT, 0)):
            chain = requests.take(kind, 8, b"" if kind == T_IN else b"w" * 512, length)
            assert requests.device.server.is_large(chain)
        gate.go.set()
        closing.join(LIMIT)
        assert not closing.is_alive()
        assert late == 1
        assert requests.reply(2, 0)[0] == S_IOERR
        assert [blk_result(each) for each in (flush, read)] == [1, 4097]
        assert requests.reply(0, 0)[0] == requests.reply(1, 4096)[0] == S_OK
        assert requests.reply(1, 4096)[1] == image.read_bytes()[4096:8192]

    @pytest.mark.parametrize("threads", [0, 1])
    def test_while_a_request_is_looked_at(
        self, make, monkeypatch: pytest.MonkeyPatch, threads: int
    ) -> None:
        requests = make(io_threads=threads)
        device, look = requests.device, requests.device._work

        def close_first(chain: Chain, patience: blk.Patience) -> blk.Work:
            device.close()
            return look(chain, patience)

        monkeypatch.setattr(device, "_work", close_first)
        assert requests.start(T_FLUSH) == 1
        assert requests.reply(0, 0)[0] == S_IOERR
        assert names() == []

    def test_nothing_goes_on_afterwards(self, make) -> None:
        requests = make(io_threads=2)
        assert blk_result(requests.start(T_FLUSH)) == 1
        requests.device.close()
        requests.device.close()
        assert names() == []
        for kind, reply in ((T_FLUSH, 0), (T_IN, 512)):
            assert isinstance(requests.start(kind, reply=reply), int)
            assert requests.reply(requests.count - 1, reply)[0] == S_IOERR
        assert names() == []

    def test_many_devices_leave_no_threads_and_no_files(self, image: Path) -> None:
        fds = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counts, does not look
        for _ in range(20):
            device = BlockDevice(image, io_threads=3)
            disk = Disk(device)
            for _ in range(5):
                assert disk.run(T_FLUSH).status == S_OK
            device.close()
            del disk
        assert names() == []
        assert len(os.listdir("/proc/self/fd")) <= fds  # noqa: PTH208


class TestSlices:
    """What takes long is done by threads, in slices between which it may be given up."""

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(blk, "TRIM_SLICE_BYTES", SIZE // 4)
        monkeypatch.setattr(blk, "SLICE_BYTES", 4096)
        monkeypatch.setattr(blk, "GIVE_UP_AFTER", 0.0)

    KINDS = ((T_DISCARD, 0), (T_WRITE_ZEROES, 0), (T_WRITE_ZEROES, 1))

    @pytest.mark.parametrize(("kind", "flags"), KINDS)
    def test_a_queue_that_stops_gives_the_rest_up(
        self, image: Path, make, kind: int, flags: int
    ) -> None:
        requests, before = make(), image.read_bytes()
        device = requests.device
        chain = requests.take(kind, 0, struct.pack("<QII", 0, SECTORS, flags))
        work = device._work(chain, device._patience[0])
        for done in (1, 2):
            next(work)
            assert image.read_bytes() == bytes(done * SIZE // 4) + before[done * SIZE // 4 :]
        device.stopping(0)
        with pytest.raises(StopIteration):
            next(work)
        assert requests.reply(0, 0)[0] == S_IOERR
        assert image.read_bytes() == bytes(SIZE // 2) + before[SIZE // 2 :]

    @pytest.mark.parametrize(("kind", "flags"), KINDS)
    def test_a_queue_that_goes_on_is_given_all_the_time(
        self, image: Path, make, kind: int, flags: int
    ) -> None:
        """The stop was for the requests of before."""
        requests = make()
        requests.device.stopping(0)
        assert blk_result(requests.start(kind, 0, struct.pack("<QII", 0, SECTORS, flags))) == 1
        assert requests.reply(0, 0)[0] == S_OK
        assert image.read_bytes() == bytes(SIZE)
        requests.device.stopping(0)
        requests.take(T_IN)
        chain = requests.take(T_IN, 0, reply=16384)
        work = requests.device._work(chain, requests.device._patience[0])
        assert len(list(work)) == 3
        assert requests.reply(2, 16384) == (S_OK, bytes(16384))

    @pytest.mark.parametrize("kind", [T_IN, T_OUT])
    def test_a_request_that_was_given_back_is_left(self, image: Path, make, kind: int) -> None:
        """By a stop that gave it up: its memory is not the device's any more."""
        requests, size = make(), 8192
        device = requests.device
        payload, reply = (b"", size) if kind == T_IN else (b"w" * size, 0)
        chain = requests.take(kind, 0, payload, reply)
        work = device._work(chain, device._patience[0])
        next(work)
        chain.finish(0)
        before, answer = image.read_bytes(), requests.reply(0, reply)
        with pytest.raises(StopIteration) as finished:
            next(work)
        assert finished.value.value == 0
        assert (image.read_bytes(), requests.reply(0, reply)) == (before, answer)
        assert device.errors == 0

    @pytest.mark.parametrize("threads", [0, 2])
    @pytest.mark.parametrize(("kind", "flags"), KINDS)
    def test_trims_are_never_done_where_the_ring_is_walked(
        self, image: Path, make, kind: int, flags: int, threads: int
    ) -> None:
        requests = make(io_threads=threads)
        answer = requests.start(kind, 0, struct.pack("<QII", 0, SECTORS, flags))
        assert isinstance(answer, Future)
        assert answer.result(LIMIT) == 1
        assert image.read_bytes() == bytes(SIZE)

    @pytest.mark.parametrize("threads", [0, 2])
    @pytest.mark.parametrize("kind", [T_IN, T_OUT])
    def test_nor_is_what_is_large(
        self, image: Path, monkeypatch: pytest.MonkeyPatch, make, kind: int, threads: int
    ) -> None:
        monkeypatch.setattr(blk, "INLINE_BYTES", 16 + 8192 + 1)
        requests, contents = make(io_threads=threads), image.read_bytes()
        ring = requests.rig.ring
        for index, length in enumerate((8192, 8192 + 512)):
            source, room = (b"", length) if kind == T_IN else (b"w" * length, 0)
            here, there = READ_AT, WRITE_AT
            requests.disk.memory.write(here, struct.pack("<IIQ", kind, 0, 0) + source)
            head = requests.rig.put_chain(
                4 * index, Desc(here, 16 + len(source)), Desc(there, room + 1, WRITE)
            )
            requests.rig.offer(head)
            chains, _, served, _ = ring.run_once(requests.device.server)
            assert (served, len(chains)) == ((1, 0) if length == 8192 else (0, 1))
            for chain in chains:
                answer = requests.device.process(0, chain)
                assert isinstance(answer, Future)
                ring.complete(chain, answer.result(LIMIT))
            ring.publish()
            assert requests.disk.memory.read(there + room, 1) == bytes(1)
            if kind == T_IN:
                assert requests.disk.memory.read(there, length) == contents[:length]
            else:
                assert image.read_bytes() == source + contents[length:]
            chain = requests.take(kind, 0, source, room)
            assert requests.device.server.is_large(chain) == (length > 8192)
            ring.complete(chain, 0)


@pytest.mark.parametrize("count", [-1, 65])
def test_numbers_of_threads_that_cannot_be(image: Path, count: int) -> None:
    with pytest.raises(ValueError, match=r"io_threads .* is not in 0\.\.64"):
        BlockDevice(image, io_threads=count)


class TestStuck:
    """A disk that never answers blocks its own thread only."""

    def test_does_not_keep_the_device_from_closing(self, tmp_path: Path) -> None:
        image = tmp_path / "image"
        image.write_bytes(bytes(SIZE))
        go_on, begun = threading.Event(), threading.Event()

        class Stuck(BlockDevice):
            def _work(self, chain: Chain, patience: blk.Patience) -> blk.Work:
                begun.set()
                assert go_on.wait(LIMIT)
                return (yield from super()._work(chain, patience))

        device = Stuck(image)
        fd = device._image.fd
        requests = Requests(device)
        promised = requests.start(T_FLUSH)
        assert begun.wait(LIMIT)
        with promptly(0.5):
            device.close()
        # Its thread may still use the image, so that its number is no other file's.
        assert os.fstat(fd).st_size == SIZE
        go_on.set()
        assert isinstance(promised, Future)
        assert promised.result(LIMIT) == 1
        deadline = time.monotonic() + LIMIT
        while device._image.fd >= 0:
            assert time.monotonic() < deadline, "the image stays open"
            time.sleep(0.002)

    def test_does_not_keep_the_process(self, tmp_path: Path) -> None:
        """Python waits for the threads of a ThreadPoolExecutor when it ends."""
        image = tmp_path / "image"
        image.write_bytes(bytes(SIZE))
        script = (
            "import sys, threading\n"
            "from guestio.virtio.blk import BlockDevice\n"
            "device = BlockDevice(sys.argv[1])\n"
            "begun = threading.Event()\n"
            "def wait(chain, patience):\n"
            "    begun.set()\n"
            "    threading.Event().wait()\n"
            "    yield\n"
            "device._work = wait\n"
            "class Never:\n"
            "    def is_large(self, chain): return True\n"
            "    def retire(self): pass\n"
            "    def close(self, released): pass\n"
            "device._server = Never()\n"
            "device.process(0, None)\n"
            "assert begun.wait(10)\n"
            "device.close()\n"
        )
        subprocess.run([sys.executable, "-c", script, str(image)], timeout=LIMIT, check=True)
