"""The dirty log of vhost-user: what is in it is what the device wrote, page by page.

The mutants that these tests must catch: no marks, marks one page off, the used ring not marked,
marks by I/O virtual address.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import socket
import struct
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from guestio._core.iommu.address_space import AddressSpace
from guestio.budgets import LOG_BURST
from guestio.errors import GuestioError
from guestio.guest.dma import PAGE, IommuMode
from guestio.guest.queue import Shape
from guestio.memory import AtomicBitmap, DirtyLog, MmapRegion
from guestio.vhost_user.dirty_log import SharedLog
from guestio.vhost_user.messages import U64, Log, encode_message
from guestio.vhost_user.messages import FrontendRequest as F
from guestio.virtio.blk import BlockDevice
from tests.kit.migration import Migration, TrackedGuest, WrittenPages, used_pages
from tests.kit.recording import LOG_ALL
from tests.kit.rings import WRITE, Desc, HandRing
from tests.kit.serving import (
    BUFFERS,
    DESC,
    EVENT_IDX,
    OK,
    QUEUE_STEP,
    USED,
    WAIT,
    Driver,
    Later,
    Load,
    Mirror,
    Serving,
    Shifted,
    memfd,
    nothing_left,
    promptly,
    warnings_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from guestio._core.iommu.intervals import IntervalMap
    from guestio._core.memory.vector import RegionTable
    from guestio._core.virtio.chain import Chain

SECTOR = 512
IMAGE = 1 << 20


def page(gpa: int) -> int:
    return gpa // PAGE


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image no two sectors of which are alike, and none is like memory that was not written."""
    path = tmp_path / "disk.img"
    rng = random.Random(5)
    path.write_bytes(
        b"".join(struct.pack("<Q", n) + rng.randbytes(SECTOR - 8) for n in range(IMAGE // SECTOR))
    )
    return path


def load(
    guest: TrackedGuest, written: WrittenPages, rng: random.Random, *, batches: int, queues: int = 1
) -> None:
    """Requests of all sizes and shapes, up to 12 at a time on each queue."""
    for _ in range(batches):
        requests = []
        for number in range(12 * queues):
            queue = number % queues
            sectors = rng.choice([1, 8, 8, 17, 40])
            sector = rng.randrange(IMAGE // SECTOR - sectors)
            length = sectors * SECTOR
            if rng.random() < 0.7:
                shape = Shape.random(rng, 16, length + 1, most=3)
                request = guest.submit_read(
                    sector, length, queue=queue, shape=shape, keep=False, publish=False
                )
                written.expect(request, length)
            else:
                shape = Shape.random(rng, 16 + length, 1, most=3)
                request = guest.submit_write(
                    sector, rng.randbytes(length), queue=queue, shape=shape, publish=False
                )
                written.expect(request, 0)
            requests.append(request)
        for queue in range(queues):
            guest.publish(queue)
        guest.wait(*requests)
        for request in requests:
            request.check()


@pytest.mark.parametrize("iommu", ["off", "static", "strict"])
@pytest.mark.parametrize("threads", [False, True], ids=["one-thread", "queue-threads"])
def test_logged_pages_are_the_written_ones(image: Path, iommu: IommuMode, threads: bool) -> None:
    rng = random.Random(3)
    with (
        Serving(BlockDevice(image, num_queues=2), image.parent / "s", queue_threads=threads) as s,
        TrackedGuest(s.path, queues=2, iommu=iommu, memory_size=16 << 20) as guest,
    ):
        before = WrittenPages()
        load(guest, before, rng, batches=3, queues=2)
        migration = Migration(guest)
        written = WrittenPages()
        with migration:
            load(guest, written, rng, batches=15, queues=2)
        used = used_pages(guest)
        guest.pause()
        migration.harvest()
        assert migration.different() == []
        assert migration.logged == written.pages | used
        assert migration.passes > 2


@pytest.mark.parametrize("iommu", ["off", "strict"])
def test_a_used_ring_of_several_pages_is_logged(image: Path, iommu: IommuMode) -> None:
    with (
        Serving(BlockDevice(image), image.parent / "s") as s,
        TrackedGuest(s.path, queue_size=1024, iommu=iommu, memory_size=16 << 20) as guest,
    ):
        used = used_pages(guest)
        assert len(used) == 3
        migration = Migration(guest)
        written = WrittenPages()
        load(guest, written, random.Random(7), batches=90)  # more than there are entries
        guest.pause()
        migration.harvest()
        assert migration.different() == []
        assert migration.logged == written.pages | used


@pytest.mark.parametrize("iommu", [False, True])
def test_index_entries_and_event_of_a_used_ring_are_logged(tmp_path: Path, iommu: bool) -> None:
    """Each on a page of its own."""
    size, index = 512, USED + PAGE - 4
    with (
        Serving(Mirror(), tmp_path / "s") as s,
        Driver(s.path, queues=0, size=size, iommu=iommu, features=EVENT_IDX) as driver,
    ):
        assert driver.features & EVENT_IDX
        layout = replace(driver.layout(0), used=driver.at(index))
        driver.rings[0] = HandRing(
            Shifted(driver.memory) if iommu else driver.memory,
            size=size,
            desc=layout.desc,
            avail=layout.avail,
            used=layout.used,
            event_idx=True,
        )
        driver.handles[0] = driver.frontend.start_queue(0, layout)
        log = driver.frontend.start_logging()
        assert driver.run(0, b"abc") == (OK, b"cba")
        driver.stop(0)
        pages = [page(index), page(index) + 1, page(index) + 2]
        assert log.take().tolist() == [*pages, page(driver.buffer(0, 0) + PAGE)]


def no_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedLog, "switch", lambda self, *, enable: None)


def one_page_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def bitmap(size: int, *, log: DirtyLog, log_start: int, own: bool) -> AtomicBitmap:
        return AtomicBitmap(size, log=log, log_start=log_start + PAGE, own=own)

    monkeypatch.setattr("guestio.vhost_user.memory.AtomicBitmap", bitmap)


def marks_by_iova(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log under the addresses that the driver uses."""
    logs: list[DirtyLog] = []

    def bitmap(size: int, *, log: DirtyLog, log_start: int, own: bool) -> AtomicBitmap:
        logs.append(log)
        return AtomicBitmap(size)

    def space(regions: RegionTable, known: IntervalMap | None = None) -> AddressSpace:
        log = logs[-1] if logs else None
        return AddressSpace(regions, known, AtomicBitmap(1 << 48, log=log, own=False))

    monkeypatch.setattr("guestio.vhost_user.memory.AtomicBitmap", bitmap)
    monkeypatch.setattr("guestio.vhost_user.connection.AddressSpace", space)


@pytest.mark.parametrize("mutant", [no_marks, one_page_off, marks_by_iova])
def test_wrong_marks_are_found(
    image: Path, monkeypatch: pytest.MonkeyPatch, mutant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """The check above can fail."""
    mutant(monkeypatch)
    with (
        Serving(BlockDevice(image), image.parent / "s") as s,
        TrackedGuest(s.path, iommu="static", memory_size=16 << 20) as guest,
    ):
        migration = Migration(guest)
        written = WrittenPages()
        with migration:
            load(guest, written, random.Random(1), batches=5)
        used = used_pages(guest)
        guest.pause()
        migration.harvest()
        assert migration.logged != written.pages | used


class Arrays(Mirror):
    """Writes through numpy arrays and memoryviews of its requests' memory."""

    def process(self, queue: int, chain: Chain) -> int:
        source = chain.readable.read()
        answer = source[::-1] + bytes([OK])
        (piece,) = chain.writable.slices()
        if source.startswith(b"VIEW"):
            memoryview(piece)[: len(answer)] = answer
        else:
            np.frombuffer(piece, np.uint8)[: len(answer)] = np.frombuffer(answer, np.uint8)
        return len(answer)


@pytest.mark.parametrize("iommu", [False, True])
@pytest.mark.parametrize("word", [b"VIEW", b"ARRAY"])
def test_what_is_written_through_buffers_is_marked(
    tmp_path: Path, iommu: bool, word: bytes
) -> None:
    with Serving(Arrays(), tmp_path / "s") as s, Driver(s.path, iommu=iommu) as driver:
        log = driver.frontend.start_logging()
        assert driver.run(0, word) == (OK, word[::-1])
        driver.stop(0)
        assert log.take().tolist() == [page(USED), page(driver.buffer(0, 0) + PAGE)]


@pytest.mark.parametrize("iommu", [False, True])
def test_a_request_under_way_when_logging_starts_is_marked(tmp_path: Path, iommu: bool) -> None:
    """What it writes comes after the copy of all memory that the front-end makes then."""
    device = Later()
    with Serving(device, tmp_path / "s") as s, Driver(s.path, iommu=iommu) as driver:
        number = driver.submit(0, b"LATE")
        device.expect(b"LATE")
        log = driver.frontend.start_logging()
        assert log.take().tolist() == []
        device.finish(b"LATE")
        driver.wait(0, number)
        driver.stop(0)
        assert log.take().tolist() == [page(USED), page(driver.buffer(0, number) + PAGE)]


def test_logging_is_switched_without_stopping_what_is_under_way(tmp_path: Path) -> None:
    device = Later()
    with Serving(device, tmp_path / "s", stop_timeout=30) as s, Driver(s.path) as driver:
        number = driver.submit(0, b"LATE")
        device.expect(b"LATE")
        with promptly(3):
            for _ in range(200):
                log = driver.frontend.start_logging()
                driver.frontend.stop_logging()
        assert b"LATE" in device.begun  # no stop has waited for it
        device.finish(b"LATE")
        driver.wait(0, number)
        assert driver.result(0, number, 4) == (OK, b"ETAL")
        assert driver.run(0, b"off") == (OK, b"ffo")
        assert log.take().tolist() == []


@pytest.mark.parametrize("threads", [False, True], ids=["one-thread", "queue-threads"])
def test_an_old_log_is_not_touched_once_its_successor_is_acknowledged(
    tmp_path: Path, threads: bool
) -> None:
    """Also in the middle of a turn: two queues are busy all the time."""
    size = 64
    with (
        Serving(Mirror(), tmp_path / "s", queue_threads=threads) as s,
        Driver(s.path, queues=2) as driver,
        contextlib.ExitStack() as files,
    ):
        loads = [Load(driver, index, seed=index) for index in (0, 1)]
        driver.frontend.start_logging()
        retired: list[int] = []
        expected: set[int] = set()
        for _ in range(60):
            for each in loads:
                each.submit(20)
            fd = memfd(size)
            files.callback(os.close, fd)
            driver.frontend.request(F.SET_LOG_BASE, Log(size, 0), [fd], has_reply=True)
            for old in retired[-1:]:
                expected |= bits(os.pread(old, size, 0))
                os.pwrite(old, bytes(size), 0)
            retired.append(fd)
            for each in loads:
                each.reap()
        for each in loads:
            each.finish()
        for index in (0, 1):
            driver.stop(index)
        *before, last = retired
        assert not any(any(os.pread(old, size, 0)) for old in before)
        expected |= bits(os.pread(last, size, 0))
        used = {page(USED), page(USED + QUEUE_STEP)}
        answers = {page(each.place(slot) + PAGE) for each in loads for slot in range(32)}
        assert used < expected <= used | answers


def bits(log: bytes) -> set[int]:
    """The pages that a log says are dirty, as the specification has it."""
    return {8 * at + bit for at, byte in enumerate(log) for bit in range(8) if byte >> bit & 1}


@pytest.mark.parametrize("offset", [0, 1, 7, 4096, 4099])
def test_nothing_is_marked_outside_of_a_log(
    tmp_path: Path, offset: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A log that ends in the middle of what is written, and that need not be aligned."""
    used, answer = page(USED), page(BUFFERS) + 1
    size = answer // 8  # the used ring is covered, the buffer is the first page that is not
    assert used // 8 < size
    fd = memfd(16384)
    os.pwrite(fd, b"\xa5" * 16384, 0)
    os.pwrite(fd, bytes(size), offset)
    try:
        with Serving(Mirror(), tmp_path / "s") as s, Driver(s.path) as driver:
            driver.frontend.request(F.SET_LOG_BASE, Log(size, offset), [fd], has_reply=True)
            driver.frontend._tell_features(driver.features | LOG_ALL)
            for _ in range(40):
                assert driver.run(0, b"abc") == (OK, b"cba")
            driver.stop(0)
            content = os.pread(fd, 16384, 0)
            assert bits(content[offset : offset + size]) == {used}
            rest = content[:offset] + content[offset + size :]
            assert rest == b"\xa5" * len(rest)
        assert any("log ends at guest address" in each for each in warnings_of(caplog))
    finally:
        os.close(fd)


def test_what_a_log_had_no_room_for_is_marked_in_the_next(tmp_path: Path) -> None:
    with Serving(Mirror(), tmp_path / "s") as s, Driver(s.path) as driver:
        driver.frontend.start_logging(1)
        assert driver.run(0, b"abc") == (OK, b"cba")
        log = driver.frontend.start_logging()
        assert log.take().tolist() == list(range(Driver.SIZE // PAGE))
        assert driver.run(0, b"abc") == (OK, b"cba")
        log = driver.frontend.start_logging()
        assert len(log.take()) == 2


def test_what_was_written_before_there_was_a_log_is_marked_in_it(tmp_path: Path) -> None:
    """A front-end that reconnects while it migrates tells the features first, and the log last."""
    with Serving(Mirror(), tmp_path / "s") as s, Driver(s.path) as driver:
        driver.frontend._tell_features(driver.features | LOG_ALL)
        assert driver.run(0, b"abc") == (OK, b"cba")
        log = driver.frontend.start_logging()
        assert log.take().tolist() == list(range(Driver.SIZE // PAGE))


def test_a_front_end_that_takes_every_feature_and_gives_no_log_is_served(tmp_path: Path) -> None:
    with Serving(Mirror(), tmp_path / "s") as s, Driver(s.path) as driver:
        driver.frontend._tell_features(driver.features | LOG_ALL)
        for _ in range(100):
            assert driver.run(0, b"abc") == (OK, b"cba")


@pytest.mark.parametrize("threads", [False, True], ids=["one-thread", "queue-threads"])
def test_a_log_that_is_truncated_harms_only_its_owner(
    tmp_path: Path, threads: bool, caplog: pytest.LogCaptureFixture
) -> None:
    fd = memfd(PAGE)
    try:
        with (
            Serving(Mirror(), tmp_path / "s", queue_threads=threads) as s,
            Driver(s.path, queues=2) as driver,
        ):
            loads = [Load(driver, index) for index in (0, 1)]
            driver.frontend.request(F.SET_LOG_BASE, Log(PAGE, 0), [fd], has_reply=True)
            driver.frontend._tell_features(driver.features | LOG_ALL)
            for round_ in range(20):
                for each in loads:
                    each.submit(10)
                os.ftruncate(fd, 0 if round_ % 2 else PAGE)
                for each in loads:
                    each.finish()
            # What was marked is not known: so all of it may have been written.
            log = driver.frontend.start_logging()
            assert len(log.take()) == Driver.SIZE // PAGE
        assert any("truncated its dirty log" in each for each in warnings_of(caplog))
        with Serving(Mirror(), tmp_path / "s") as s:
            s.check_serves()
    finally:
        os.close(fd)


def refused_logs() -> dict[str, Callable[[], tuple[int, Log]]]:
    def read_only() -> tuple[int, Log]:
        fd = memfd(PAGE)
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        os.close(fd)
        return again, Log(PAGE, 0)

    def sealed() -> tuple[int, Log]:
        fd = os.memfd_create("log", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, PAGE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        return fd, Log(PAGE, 0)

    def write_later() -> tuple[int, Log]:
        fd = os.memfd_create("log", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, PAGE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0x10)  # F_SEAL_FUTURE_WRITE: whoever maps it later
        return fd, Log(PAGE, 0)

    def pipe() -> int:
        reading, writing = os.pipe()
        os.close(reading)
        return writing

    return {
        "empty": lambda: (memfd(PAGE), Log(0, 0)),
        "too short": lambda: (memfd(PAGE), Log(PAGE + 1, 0)),
        "too far": lambda: (memfd(PAGE), Log(1, PAGE)),
        "beyond 2**64": lambda: (memfd(PAGE), Log(PAGE, 2**64 - 1)),
        "at 2**63": lambda: (memfd(PAGE), Log(PAGE, 2**63)),
        "larger than any guest needs": lambda: (memfd(1 << 40), Log(1 << 38, 0)),
        "no memory": lambda: (os.open("/dev/zero", os.O_RDWR), Log(PAGE, 0)),
        "an eventfd": lambda: (os.eventfd(0), Log(PAGE, 0)),
        "read-only": read_only,
        "sealed": sealed,
        "sealed against later writers": write_later,
        "a pipe": lambda: (pipe(), Log(PAGE, 0)),
        "a socket": lambda: (socket.socket(socket.AF_UNIX).detach(), Log(PAGE, 0)),
        "a directory": lambda: (os.open("/dev/shm", os.O_RDONLY), Log(PAGE, 0)),
        "a path": lambda: (os.open("/dev/shm", os.O_PATH), Log(PAGE, 0)),
        "a file of the system": lambda: (os.open("/proc/self/mem", os.O_RDWR), Log(PAGE, 0)),
    }


@pytest.mark.parametrize("kind", refused_logs())
def test_a_log_that_cannot_be_used_ends_the_connection(tmp_path: Path, kind: str) -> None:
    """QEMU takes any reply for a success, and would lose pages."""
    fd, log = refused_logs()[kind]()
    try:
        with Serving(Mirror(), tmp_path / "s") as s:
            with Driver(s.path) as driver, pytest.raises(GuestioError):
                driver.frontend.request(F.SET_LOG_BASE, log, [fd], has_reply=True)
            s.let_go()
            assert s.stats.protocol_errors == 1
            s.check_serves()
    finally:
        os.close(fd)


@pytest.mark.parametrize("threads", [False, True], ids=["one-thread", "queue-threads"])
def test_logging_that_is_toggled_for_ever(
    tmp_path: Path, threads: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Without waiting for anything: the queue is served, and the log of the server has few lines.

    What was written while it was on is marked.
    """
    with (
        Serving(Mirror(), tmp_path / "s", queue_threads=threads) as s,
        Driver(s.path) as driver,
    ):
        log = driver.frontend.start_logging()
        base = driver.features | driver.frontend._protocol_bit
        storm = b"".join(
            encode_message(F.SET_FEATURES, U64(base | (LOG_ALL if on else 0)))
            for _ in range(50)
            for on in (False, True)
        )
        sock = driver.frontend._exchange
        caplog.set_level("INFO")
        for _ in range(60):
            sock.send(F.SET_FEATURES, storm)
            number = driver.submit(0, b"abc")
            driver.wait(0, number)
        driver.frontend.sync()
        log.take()
        assert driver.run(0, b"abc") == (OK, b"cba")
        driver.stop(0)
        assert page(USED) in log.take().tolist()
    lines = [each for each in caplog.messages if "dirty log o" in each]
    assert 0 < len(lines) <= LOG_BURST + 2
    with Serving(Mirror(), tmp_path / "s") as s:
        s.check_serves()


def test_a_log_that_is_replaced_for_ever(tmp_path: Path) -> None:
    """One is mapped at a time, and the queue is served."""
    with Serving(Mirror(), tmp_path / "s") as s:
        s.check_serves()
        with nothing_left(), Driver(s.path) as driver:
            driver.frontend._tell_features(driver.features | LOG_ALL)
            for round_ in range(300):
                fd = memfd(1 << 20)
                driver.frontend.request(F.SET_LOG_BASE, Log(1 << 20, 0), [fd], has_reply=True)
                os.close(fd)
                if not round_ % 30:
                    assert driver.run(0, b"abc") == (OK, b"cba")
                    mapped = Path("/proc/self/maps").read_text()
                    assert mapped.count("memfd:hostile") <= 1
            driver.close()
            s.let_go()
        s.check_serves()


@pytest.mark.parametrize("what", ["the used ring", "the descriptors", "a buffer"])
def test_a_log_in_the_guests_own_memory_harms_only_its_owner(tmp_path: Path, what: str) -> None:
    """Marks then change what the device reads; it may find the ring broken, and no more."""
    at = {"the used ring": USED, "the descriptors": DESC, "a buffer": BUFFERS}[what]
    with Serving(Mirror(), tmp_path / "s") as s:
        with Driver(s.path) as driver:
            fd = driver.backing.fd
            assert fd is not None
            driver.frontend.request(F.SET_LOG_BASE, Log(64, at), [fd], has_reply=True)
            driver.frontend._tell_features(driver.features | LOG_ALL)
            for _ in range(20):
                driver.submit(0, b"abc")
            driver.stop(0)
        s.let_go()
        s.check_serves()


def test_nothing_is_left_of_logs(tmp_path: Path) -> None:
    with Serving(Mirror(), tmp_path / "s") as s:
        s.check_serves()
        with nothing_left():
            for _ in range(3):
                with Driver(s.path) as driver:
                    for _ in range(5):
                        driver.frontend.start_logging()
                        assert driver.run(0, b"abc") == (OK, b"cba")
                s.let_go()


def test_an_eventfd_for_marks_is_taken_and_closed(tmp_path: Path) -> None:
    with Serving(Mirror(), tmp_path / "s") as s, Driver(s.path) as driver:
        ours, theirs = os.pipe()
        driver.frontend.request(F.SET_LOG_FD, fds=[theirs])
        os.close(theirs)
        poller = select.poll()
        poller.register(ours, select.POLLHUP)
        assert poller.poll(WAIT * 1000)
        os.close(ours)


def test_memory_that_comes_while_logging_is_marked(tmp_path: Path) -> None:
    """The front-end enlarges its log first, as QEMU does."""
    with Serving(Mirror(), tmp_path / "s") as s, Driver(s.path) as driver:
        log = driver.frontend.start_logging(Driver.SIZE // PAGE // 8 + 0x4000)
        high = 0x1000_0000
        assert high // PAGE // 8 < log.size
        more = MmapRegion.memfd(high, 0x10000)
        memory = driver.memory.insert_region(more)
        driver.frontend.set_memory(memory)
        driver.memory.write(driver.buffer(0, 0), b"abc")
        driver.run_raw(0, Desc(driver.buffer(0, 0), 3), Desc(high + 0x3000, 4, WRITE))
        assert memory.read(high + 0x3000, 3) == b"cba"
        driver.stop(0)
        assert log.take().tolist() == [page(USED), page(high + 0x3000)]
        driver.frontend.set_memory(driver.memory)
        del memory


@pytest.mark.parametrize("how", ["reset", "status"])
def test_logging_goes_on_over_a_reset(tmp_path: Path, how: str) -> None:
    """As when a guest reboots while it migrates."""
    with Serving(Mirror(), tmp_path / "s") as s, Driver(s.path) as driver:
        log = driver.frontend.start_logging()
        assert driver.run(0, b"abc") == (OK, b"cba")
        if how == "reset":
            driver.frontend.reset_device()
        else:
            driver.frontend.set_status(0)
            driver.stop(0)
        log.take()
        driver.add_queue(0)
        driver.memory.write(driver.buffer(0, 0) + PAGE, bytes(8))
        assert driver.run(0, b"abc") == (OK, b"cba")
        driver.stop(0)
        assert log.take().tolist() == [page(USED), page(driver.buffer(0, 0) + PAGE)]


def test_the_log_and_a_count_of_pages_do_not_disturb_each_other(tmp_path: Path) -> None:
    with Serving(Mirror(), tmp_path / "s", track_dirty=True) as s:
        with Driver(s.path) as driver:
            log = driver.frontend.start_logging()
            assert driver.run(0, b"abc") == (OK, b"cba")
            driver.stop(0)
            assert len(log.take()) == 2
        s.let_go()
        assert s.stats.dirty_pages == 2
