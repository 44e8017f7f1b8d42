"""The scripted guest against real back-ends: QEMU's without an IOMMU, our own in every mode."""

from __future__ import annotations

import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from guestio.errors import DeviceError, GuestioError, QueueError
from guestio.guest import BlkError, Request, ScriptedGuest, Shape
from guestio.vhost_user.channel import PeerGoneError
from guestio.vhost_user.iotlb_service import MissAction, MissAnswer
from guestio.vhost_user.messages import IotlbMessage
from guestio.vhost_user.request_channel import NoAnswerError
from guestio.virtio.blk import F_RO, S_IOERR, S_UNSUPP, T_IN
from tests.kit.disks import SIZE, Disk, own_disk, storage_daemon
from tests.kit.peer import nothing_left
from tests.kit.serving import lasting

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECTORS = SIZE // 512
MODES = ["off", "static", "strict"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with own_disk(tmp_path, queues=2) as made:
        yield made


@pytest.fixture(params=["daemon", *MODES])
def guest(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ScriptedGuest]:
    """A guest on each kind of disk; ``guest.disk`` is the disk."""
    kind = request.param
    served = storage_daemon(tmp_path) if kind == "daemon" else own_disk(tmp_path)
    mode = "off" if kind == "daemon" else kind
    with served as disk, ScriptedGuest(disk.socket, connect_wait=10, iommu=mode) as made:
        made.disk = disk  # type: ignore[attr-defined]
        yield made


def contents(guest: ScriptedGuest) -> bytes:
    disk: Disk = guest.disk  # type: ignore[attr-defined]
    return disk.contents


def image(guest: ScriptedGuest) -> bytes:
    disk: Disk = guest.disk  # type: ignore[attr-defined]
    return disk.image.read_bytes()


class TestRequests:
    def test_config(self, guest: ScriptedGuest) -> None:
        assert guest.config.capacity == SECTORS
        assert guest.config.num_queues == 1
        assert guest.config.blk_size == 512

    @pytest.mark.parametrize(("sector", "length"), [(0, 512), (8, 4096), (100, 131072 + 512)])
    def test_read(self, guest: ScriptedGuest, sector: int, length: int) -> None:
        assert guest.read(sector, length) == contents(guest)[sector * 512 :][:length]

    @pytest.mark.parametrize(("sector", "length"), [(0, 512), (8, 4096), (100, 131072 + 512)])
    def test_write(self, guest: ScriptedGuest, sector: int, length: int) -> None:
        data = random.Random(length).randbytes(length)
        guest.write(sector, data)
        guest.flush()
        expected = bytearray(contents(guest))
        expected[sector * 512 : sector * 512 + length] = data
        assert image(guest) == expected

    def test_get_id(self, guest: ScriptedGuest) -> None:
        assert guest.get_id() in {b"own disk", b"vhost_user_blk"}

    def test_discard_and_write_zeroes(self, guest: ScriptedGuest) -> None:
        guest.discard(8, 8)
        guest.write_zeroes(32, 8)
        guest.write_zeroes(64, 8, unmap=guest.config.write_zeroes_may_unmap == 1)
        expected = bytearray(contents(guest))
        for sector in (8, 32, 64):
            expected[sector * 512 : sector * 512 + 4096] = bytes(4096)
            assert guest.read(sector, 4096) == bytes(4096)
        assert image(guest) == expected

    def test_beyond_the_end(self, guest: ScriptedGuest) -> None:
        with pytest.raises(BlkError, match="VIRTIO_BLK_S_IOERR") as caught:
            guest.read(SECTORS - 1, 1024)
        assert caught.value.status == S_IOERR
        with pytest.raises(BlkError):
            guest.write(SECTORS, bytes(512))
        assert image(guest) == contents(guest)

    def test_unknown_requests(self, guest: ScriptedGuest) -> None:
        request = guest.submit(999, reply=16)
        guest.wait(request)
        assert request.status == S_UNSUPP
        assert guest.read(0, 512) == contents(guest)[:512]

    def test_a_read_reports_all_it_wrote(self, guest: ScriptedGuest) -> None:
        request = guest.submit_read(0, 4096)
        assert not request.done
        guest.wait(request)
        assert request.done
        assert request.written == 4097


SHAPES = {
    "header in two": Shape(readable=(8, 8)),
    "header in single bytes": Shape(readable=(1,) * 16),
    "header over a page border": Shape(readable_offset=4096 - 5),
    "header and data in one": Shape(readable=()),
    "data and status in one": Shape(writable=()),
    "status alone": Shape(writable=(4096,)),
    "data in odd pieces": Shape(writable=(1, 510, 7, 2000)),
    "pages crossed by data": Shape(writable_offset=3000, readable_offset=3000),
    "table over a page border": Shape(readable=(8,), writable=(4096,), table_offset=4096 - 16),
    "direct": Shape(readable=(16,), writable=(4096,), indirect=False),
}


class TestShapes:
    @pytest.mark.parametrize("name", SHAPES)
    def test_every_kind(self, guest: ScriptedGuest, name: str) -> None:
        shape = SHAPES[name]
        assert guest.read(16, 4096, shape=shape) == contents(guest)[8192:12288]
        data = random.Random(name).randbytes(4096)
        guest.write(24, data, shape=shape)
        assert guest.read(24, 4096) == data
        guest.flush(shape=shape)
        assert guest.get_id(shape=shape)

    def test_random_shapes(self, guest: ScriptedGuest) -> None:
        rng = random.Random(11)
        expected = bytearray(contents(guest))
        free = guest._pages.free
        for _ in range(120):
            length = 512 * rng.choice([1, 2, 8, rng.randrange(1, 64)])
            sector = rng.randrange(SECTORS - length // 512)
            place = slice(sector * 512, sector * 512 + length)
            if rng.random() < 0.5:
                data = rng.randbytes(length)
                guest.write(sector, data, shape=Shape.random(rng, 16 + length, 1))
                expected[place] = data
            else:
                shape = Shape.random(rng, 16, length + 1)
                assert guest.read(sector, length, shape=shape) == expected[place], shape
        assert image(guest) == expected
        assert guest._pages.free == free

    def test_cuts_of_random_shapes_fit(self) -> None:
        rng = random.Random(2)
        for _ in range(300):
            shape = Shape.random(rng, 16, 513)
            assert sum(shape.readable) < 16
            assert sum(shape.writable) < 513
            assert all(cut > 0 for cut in (*shape.readable, *shape.writable))
            assert shape.table_offset % 16 == 0


class TestManyAtATime:
    @pytest.mark.parametrize("polling", [False, True])
    @pytest.mark.parametrize("mode", MODES)
    def test_queue_depth(self, disk: Disk, mode: Any, polling: bool) -> None:
        rng = random.Random(3)
        with ScriptedGuest(disk.socket, iommu=mode, polling=polling) as guest:
            done = 0
            sectors: dict[int, int] = {}
            while done < 400:
                while guest.in_flight() < 16:
                    sector = rng.randrange(SECTORS - 8)
                    sectors[id(guest.submit_read(sector, 4096, publish=False))] = sector
                    guest.publish()
                for request in guest.wait_some():
                    request.check()
                    assert request.data == disk.contents[request.sector * 512 :][:4096]
                    done += 1
            guest.drain()
            assert guest.in_flight() == 0

    def test_poll_takes_what_is_finished(self, disk: Disk) -> None:
        with ScriptedGuest(disk.socket) as guest:
            requests = [guest.submit_read(8 * i, 4096) for i in range(8)]
            found: list[Request] = []
            deadline = time.monotonic() + 60
            while len(found) < 8 and time.monotonic() < deadline:
                found += guest.poll()
            assert {id(request) for request in found} == {id(request) for request in requests}
            assert guest.poll() == []

    def test_unpublished_requests_wait(self, disk: Disk) -> None:
        with ScriptedGuest(disk.socket) as guest:
            first = guest.submit_read(0, 512, publish=False)
            time.sleep(0.05)
            assert guest.poll() == []
            second = guest.submit_read(1, 512)
            guest.wait(first, second)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("shape", [None, Shape(indirect=False)])
    def test_a_full_queue_refuses_and_leaks_nothing(
        self, disk: Disk, mode: Any, shape: Shape | None
    ) -> None:
        with ScriptedGuest(disk.socket, queue_size=8, iommu=mode, indirect=False) as guest:
            guest.read(0, 512, shape=shape)
            for attempt in range(3):
                pages, mappings = guest._pages.free, len(guest.frontend.iotlb.mappings)
                requests = []
                with pytest.raises(QueueError, match="are needed"):
                    for _ in range(9):
                        requests.append(guest.submit_read(0, 512, shape=shape, publish=False))
                assert requests
                guest.publish()
                guest.wait(*requests)
                if attempt:
                    assert guest._pages.free == pages
                    assert len(guest.frontend.iotlb.mappings) == mappings

    def test_queues_on_threads_of_their_own(self, disk: Disk) -> None:
        with ScriptedGuest(disk.socket, queues=2, iommu="strict") as guest:

            def drive(queue: int) -> None:
                rng = random.Random(queue)
                base = queue * SECTORS // 2
                for _ in range(60):
                    sector = base + rng.randrange(SECTORS // 2 - 8)
                    data = rng.randbytes(4096)
                    guest.write(sector, data, queue=queue)
                    assert guest.read(sector, 4096, queue=queue) == data

            with ThreadPoolExecutor(2) as pool:
                for call in [pool.submit(drive, queue) for queue in (0, 1)]:
                    call.result(60)


class TestIommu:
    def test_strict_maps_and_unmaps_each_request(self, disk: Disk) -> None:
        with ScriptedGuest(disk.socket, iommu="strict") as guest:
            guest.read(0, 4096)
            mappings, counts = len(guest.frontend.iotlb.mappings), guest.frontend.iotlb.counts
            misses, gone = counts.misses, counts.invalidations
            for _ in range(10):
                guest.read(0, 4096)
            # Table, header, data and status are mapped anew for each. What is asked for is asked
            # for again if the answer is long in coming.
            assert counts.invalidations - gone == 40
            assert 40 <= counts.misses - misses <= 80
            assert counts.refused == 0
            assert len(guest.frontend.iotlb.mappings) == mappings

    def test_static_is_asked_for_once(self, disk: Disk) -> None:
        with ScriptedGuest(disk.socket, iommu="static") as guest:
            for _ in range(20):  # a miss that was answered may be repeated late
                guest.read(0, 4096)
            misses = guest.frontend.iotlb.counts.misses
            for _ in range(10):
                guest.read(0, 4096)
            assert guest.frontend.iotlb.counts.misses == misses

    @pytest.mark.parametrize(
        "options",
        [
            {"answer": "caller"},
            {"answer": "caller", "polling": True},
            {"pipeline": 8},
            {"granularity": None},
            {"granularity": 1 << 21},
            {"reuse_iovas": False},
            {"indirect": False},
            {"event_idx": False},
            {"queue_size": 1024},
            {"contiguous": True},
        ],
        ids=str,
    )
    def test_options(self, disk: Disk, options: dict[str, Any]) -> None:
        rng = random.Random(4)
        with ScriptedGuest(disk.socket, iommu="strict", **options) as guest:
            for _ in range(20):
                sector = rng.randrange(SECTORS - 64)
                data = rng.randbytes(16384)
                guest.write(sector, data)
                assert guest.read(sector, 16384) == data

    def test_rings_of_several_pages_are_not_contiguous_physically(self, disk: Disk) -> None:
        with ScriptedGuest(disk.socket, iommu="static", queue_size=1024) as guest:
            assert len(guest._queues[0]._rings.pieces(0, 20000)) > 2

    def test_a_device_without_one(self, tmp_path: Path) -> None:
        with (
            own_disk(tmp_path, iommu="off") as disk,
            nothing_left(),
            pytest.raises(DeviceError, match="VIRTIO_F_ACCESS_PLATFORM"),
        ):
            ScriptedGuest(disk.socket, iommu="strict")

    @pytest.mark.parametrize(
        ("answer", "timeouts"),
        [(MissAnswer(MissAction.REFUSE), 0), (MissAnswer(MissAction.IGNORE), 1)],
        ids=["refused", "never answered"],
    )
    def test_a_translation_that_does_not_come_is_seen_as_a_failure(
        self, tmp_path: Path, answer: MissAnswer, timeouts: int
    ) -> None:
        with own_disk(tmp_path, miss_timeout=1.5 if timeouts else 10.0) as disk:
            # In turn: the indirect table, the header, the data, the status.
            outcomes = [self._lose_one_page(disk, answer, victim) for victim in range(4)]
            # Without a status byte to write, only a broken queue tells the driver.
            assert outcomes == ["broken", S_IOERR, S_IOERR, "broken"]
            with ScriptedGuest(disk.socket, iommu="strict") as guest:
                assert guest.read(0, 4096) == disk.contents[:4096]
            assert disk.statistics is not None
            assert (disk.statistics.iotlb_timeouts > 0) == bool(timeouts)

    @staticmethod
    def _lose_one_page(disk: Disk, answer: MissAnswer, victim: int) -> int | str:
        """Lose one of the pages that a request needs; its status, or that its queue broke."""
        asked: list[int] = []

        def hook(miss: IotlbMessage) -> MissAnswer:
            if miss.iova not in asked:
                asked.append(miss.iova)
            return answer if asked.index(miss.iova) == victim else MissAnswer()

        with ScriptedGuest(disk.socket, iommu="strict") as guest:
            assert guest.read(0, 4096) == disk.contents[:4096]
            guest.frontend.iotlb.miss_hook = hook
            request = guest.submit_read(0, 4096)
            try:
                guest.wait(request)
            except QueueError:
                return "broken"
            guest.frontend.iotlb.miss_hook = None
            assert guest.read(0, 4096) == disk.contents[:4096]
            return request.status

    def test_a_request_that_points_where_nothing_is_mapped(self, disk: Disk) -> None:
        with ScriptedGuest(disk.socket, iommu="strict") as guest:
            request = guest.submit_at(T_IN, 0, writable=[(0x1234000, 512)])
            guest.wait(request)
            assert request.status == S_IOERR
            assert guest.frontend.iotlb.counts.refused > 0
            assert guest.read(0, 512) == disk.contents[:512]

    def test_a_request_of_its_own_that_does_not_fit_leaks_nothing(self, disk: Disk) -> None:
        with ScriptedGuest(disk.socket, iommu="strict", queue_size=8) as guest:
            guest.read(0, 512)
            mappings = len(guest.frontend.iotlb.mappings)
            for _ in range(3):
                with pytest.raises(ValueError, match="a chain of 10 buffers"):
                    guest.submit_at(T_IN, 0, writable=[(0x1000, 512)] * 8)
            assert len(guest.frontend.iotlb.mappings) == mappings
            assert guest.read(0, 512) == disk.contents[:512]

    def test_late_answers_are_waited_for(self, disk: Disk) -> None:
        with ScriptedGuest(disk.socket, iommu="strict") as guest:
            guest.frontend.iotlb.miss_hook = lambda miss: MissAnswer(delay=0.02)
            assert guest.read(0, 4096) == disk.contents[:4096]


class TestLife:
    @pytest.mark.parametrize("mode", MODES)
    def test_pause_and_resume(self, disk: Disk, mode: Any) -> None:
        with ScriptedGuest(disk.socket, iommu=mode) as guest:
            for lap in range(3):
                requests = [guest.submit_read(8 * i, 4096) for i in range(20)]
                guest.pause()
                with pytest.raises(DeviceError, match="is stopped"):
                    guest.wait(guest.submit_read(0, 512))
                guest.resume()
                guest.drain()
                assert all(request.check().done for request in requests), lap

    def test_boot_stages_with_other_features(self, disk: Disk) -> None:
        """A boot loader without an IOMMU, then a kernel with one, and again."""
        with ScriptedGuest(disk.socket, event_idx=False, indirect=False) as guest:
            free = guest._pages.free
            for mode in ("off", "strict", "off", "static", "strict"):
                guest.boot(iommu=mode, queues=2)  # type: ignore[arg-type]
                assert guest.frontend.iommu == (mode != "off")
                for queue in (0, 1):
                    assert guest.read(8, 4096, queue=queue) == disk.contents[4096:8192]
            guest.boot(event_idx=False, indirect=False)
            assert guest._pages.free == free
            assert len(guest.frontend.iotlb.mappings) == 0

    def test_one_after_the_other(self, disk: Disk) -> None:
        for _ in range(5):
            with nothing_left(), ScriptedGuest(disk.socket, iommu="strict") as guest:
                assert guest.read(8, 4096) == disk.contents[4096:8192]

    def test_closing_with_requests_in_flight_leaves_nothing(self, disk: Disk) -> None:
        with nothing_left(), ScriptedGuest(disk.socket, iommu="strict") as guest:
            for i in range(32):
                guest.submit_read(8 * i, 4096)
        assert guest.frontend.failure is not None
        guest.close()

    def test_read_only(self, tmp_path: Path) -> None:
        with own_disk(tmp_path, read_only=True) as disk, ScriptedGuest(disk.socket) as guest:
            assert guest.frontend.features & F_RO
            with pytest.raises(BlkError):
                guest.write(0, bytes(512))
            assert guest.read(0, 512) == disk.contents[:512]

    def test_the_back_end_dies(self, tmp_path: Path) -> None:
        with (
            storage_daemon(tmp_path) as disk,
            nothing_left(),
            ScriptedGuest(disk.socket, connect_wait=10) as guest,
        ):
            guest.read(0, 512)
            assert disk.process is not None
            disk.process.kill()
            disk.process.wait()
            with lasting(0.0, 5.0), pytest.raises(PeerGoneError):
                guest.read(0, 512)

    def test_a_back_end_that_goes_to_sleep(self, tmp_path: Path) -> None:
        with storage_daemon(tmp_path) as disk:
            assert disk.process is not None
            with ScriptedGuest(disk.socket, connect_wait=10, timeout=0.3) as guest:
                disk.process.send_signal(signal.SIGSTOP)
                request = guest.submit_read(0, 512)
                with pytest.raises(NoAnswerError, match="did not finish any of 1 requests"):
                    guest.wait(request)
                disk.process.send_signal(signal.SIGCONT)
                guest.wait(request)
                assert request.check().data == disk.contents[:512]

    def test_a_broken_ring_is_reported(self, disk: Disk) -> None:
        with ScriptedGuest(disk.socket, queue_size=8, indirect=False) as guest:
            guest.memory.store(guest._queues[0].layout.avail + 2, 100, 2)
            handle = guest._queues[0]._handle
            assert handle is not None
            handle.kick()
            with pytest.raises(GuestioError, match=r"broken|index"):
                guest.wait(Request(T_IN, 0, 0))

    @pytest.mark.parametrize("size", [0, 4096, 8191])
    def test_bad_memory_sizes(self, disk: Disk, size: int) -> None:
        with nothing_left(), pytest.raises(ValueError, match="memory_size"):
            ScriptedGuest(disk.socket, memory_size=size)

    def test_too_little_memory(self, disk: Disk) -> None:
        with ScriptedGuest(disk.socket, memory_size=16 * 4096) as guest:
            with pytest.raises(DeviceError, match="out of memory"):
                guest.read(0, 1 << 20)
            assert guest.read(0, 4096) == disk.contents[:4096]


@pytest.mark.slow
@pytest.mark.parametrize("reuse", [True, False])
def test_integrity_with_revocation_behind_an_iommu(tmp_path: Path, reuse: bool) -> None:
    """Several requests in flight, random shapes, every page unmapped after use and used again."""
    rng = random.Random(9)
    with (
        own_disk(tmp_path) as disk,
        ScriptedGuest(
            disk.socket, iommu="strict", memory_size=1 << 20, reuse_iovas=reuse, pipeline=4
        ) as guest,
    ):
        expected = bytearray(disk.contents)
        stop = threading.Timer(4, lambda: None)
        stop.start()
        while stop.is_alive():
            busy: set[int] = set()
            reads: list[tuple[Request, bytes]] = []
            writes: list[Request] = []
            for _ in range(rng.randrange(1, 8)):
                length = 512 * rng.randrange(1, 17)
                sector = rng.randrange(SECTORS // 64) * 64
                if sector in busy:
                    continue
                busy.add(sector)
                place = slice(sector * 512, sector * 512 + length)
                if rng.random() < 0.5:
                    data = rng.randbytes(length)
                    shape = Shape.random(rng, 16 + length, 1, 4)
                    writes.append(guest.submit_write(sector, data, shape=shape))
                    expected[place] = data
                else:
                    shape = Shape.random(rng, 16, length + 1, 4)
                    request = guest.submit_read(sector, length, shape=shape)
                    reads.append((request, bytes(expected[place])))
            guest.drain()
            for request, data in reads:
                assert request.check().data == data
            for request in writes:
                request.check()
        stop.join()
        assert disk.image.read_bytes() == expected
