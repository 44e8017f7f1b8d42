"""What a front-end, a guest or a disk may cost: each limit, and what happens beyond it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from guestio import budgets
from guestio._core.virtio.chain import Chain, Quota
from guestio._core.virtio.split import SplitRing
from guestio.errors import BackingError
from guestio.memory import Backing, GuestRegionCollection
from guestio.ratelog import LOG
from guestio.vhost_user import Backend, backend_channel
from guestio.vhost_user import memory as memory_module
from guestio.vhost_user.channel import Channel
from guestio.vhost_user.memory import SharedMemory
from guestio.vhost_user.messages import FrontendRequest, MemoryRegion, VringState, encode_message
from guestio.virtio import blk
from guestio.virtio.blk import S_IOERR, S_OK, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, BlockDevice
from guestio.virtio.image import Image
from guestio.virtio.loop import EventLoop
from tests.kit.disk_driver import MIB, DiskDriver
from tests.kit.hostile import Raw
from tests.kit.rings import PAGE, WRITE, Desc, Rig, physical
from tests.kit.serving import (
    OK,
    PLATFORM,
    WAIT,
    Driver,
    Later,
    Mirror,
    Serving,
    errors_of,
    promptly,
    stalled,
    until,
)

F = FrontendRequest


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    return path


@pytest.fixture(params=[{}, {"io_threads": 0}], ids=["threads", "no threads"])
def disk(image: Path, request: pytest.FixtureRequest) -> Iterator[BlockDevice]:
    device = BlockDevice(image, num_queues=2, **request.param)
    yield device
    device.close()


def small_ring(size: int = 0x40000) -> tuple[GuestRegionCollection, Rig]:
    """Memory with a ring of 64 entries in its first pages."""
    return physical(size, size=64, desc=0, avail=0x2000, used=0x3000)


def flush(device: BlockDevice) -> tuple[Rig, Chain, Future[int]]:
    """Begin a flush."""
    memory, rig = small_ring()
    memory.write(0x4000, struct.pack("<IIQ", T_FLUSH, 0, 0))
    rig.offer(rig.put_chain(0, Desc(0x4000, 16), Desc(0x5000, 1, WRITE)))
    (chain,), _ = rig.ring.pop()
    answer = device.process(0, chain)
    assert not isinstance(answer, int)
    return rig, chain, answer


class TestTurns:
    def test_a_turn_ends_after_some_bytes(self, image: Path) -> None:
        device = BlockDevice(image)
        memory, rig = small_ring()
        ring = SplitRing(memory._space, 64, 0, 0x2000, 0x3000, batch_bytes=3 * 4096)
        memory.write(0x4000, struct.pack("<IIQ", T_OUT, 0, 0))
        for i in range(10):
            rig.offer(
                rig.put_chain(
                    3 * i, Desc(0x4000, 16), Desc(0x5000, 4096), Desc(0x6000 + i, 1, WRITE)
                )
            )
        served = []
        idle = False
        while not idle:
            chains, misses, count, idle = ring.run_once(device.server, 64, -1, True)
            assert (chains, list(misses)) == ([], [])
            served.append(count)
        assert served == [3, 3, 3, 1]
        device.close()

    def test_others_come_before_what_takes_long(self) -> None:
        """No edge is lost, and none is seen twice."""
        loop = EventLoop()
        calls: list[int] = []
        fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]

        def work(index: int) -> None:
            calls.append(index)
            time.sleep(1.5 * budgets.TURN_SECONDS)

        for index, fd in enumerate(fds):
            loop.add_reader(fd, lambda index=index: work(index), edge=True)
            os.eventfd_write(fd, 1)
        rounds = []
        while len(calls) < 4:
            loop.run_once()
            rounds.append(len(calls))
        assert rounds[0] <= 2
        assert sorted(calls) == [0, 1, 2, 3]
        loop.close()
        for fd in fds:
            os.close(fd)

    def test_large_requests_keep_neither_messages_nor_other_queues(
        self, disk: BlockDevice, tmp_path: Path
    ) -> None:
        """Requests of 60 MiB, as many as the ring takes."""
        with (
            Serving(disk, tmp_path / "socket") as serving,
            DiskDriver(serving.path, queues=2) as driver,
        ):
            small = driver.request(1, T_IN, 8, 4096)
            assert driver.finish(1, small) == S_OK
            numbers = [driver.request(0, T_IN, 0, 60 * MIB) for _ in range(20)]
            before = stalled()
            driver.handles[0].kick()
            driver.frontend.sync()
            small = driver.request(1, T_IN, 8, 4096)
            assert driver.finish(1, small) == S_OK
            # Where this thread was kept from looking, the flood may be over.
            first = driver.rings[0].used_idx
            assert first < 20 or stalled() - before > 0.05, "all were served first"
            driver.wait(0, numbers[-1])
            assert {driver.status(0, number) for number in numbers} == {S_OK}
            driver.close()
            serving.let_go()

    def test_many_large_requests_that_are_served_at_once(
        self, disk: BlockDevice, tmp_path: Path
    ) -> None:
        """Of 2 MiB, which is the most that is moved in the ring's own thread."""
        stop = threading.Event()
        with (
            Serving(disk, tmp_path / "socket") as serving,
            DiskDriver(serving.path, queues=2) as driver,
        ):
            length = budgets.INLINE_BYTES - 4096
            driver.finish(0, driver.request(0, T_IN, 0, length))

            def flood() -> None:
                while not stop.is_set():
                    last = [driver.request(0, T_IN, 0, length) for _ in range(20)][-1]
                    driver.handles[0].kick()
                    while not driver.done(0, last) and not stop.is_set():
                        time.sleep(0.0005)

            thread = threading.Thread(target=flood)
            thread.start()
            try:
                for _ in range(10):
                    driver.frontend.sync()
                    assert driver.finish(1, driver.request(1, T_IN, 8, 4096)) == S_OK
            finally:
                stop.set()
                thread.join()


class Slow(Mirror):
    """Takes its time for each request, without a future, and serves only as many as it may."""

    def __init__(self, queues: int = 2) -> None:
        super().__init__(queues)
        self.allowed = threading.Semaphore(0)

    def process(self, queue: int, chain: Chain) -> int | Future[int]:
        self.entered.set()
        assert self.allowed.acquire(timeout=WAIT)
        time.sleep(2 * budgets.TURN_SECONDS)
        return super().process(queue, chain)


class TestSlowDevices:
    @pytest.mark.parametrize("options", [{}, {"iommu": True}, {"inflight": True}])
    @pytest.mark.parametrize("threads", [False, True], ids=["one thread", "queue threads"])
    def test_the_rest_of_a_batch_waits(
        self, tmp_path: Path, threads: bool, options: dict[str, bool]
    ) -> None:
        device = Slow(1)
        sources = [b"request %d" % i for i in range(30)]
        with (
            Serving(device, tmp_path / "socket", queue_threads=threads) as serving,
            Driver(serving.path, **options) as driver,  # type: ignore[arg-type]
        ):
            for source in sources:
                driver.prepare(0, source)
            driver.handles[0].kick()
            assert device.entered.wait(WAIT)
            # The message is there before the first request is done, and waits for few of them.
            exchange = driver.frontend._exchange
            (reply,) = exchange.send(F.GET_FEATURES, encode_message(F.GET_FEATURES), replies=1)
            device.allowed.release(3)
            exchange.wait(reply)
            # So does a stop.
            message = encode_message(F.GET_VRING_BASE, VringState(0, 0))
            (reply,) = exchange.send(F.GET_VRING_BASE, message, replies=1)
            device.allowed.release(3)
            base = VringState.decode(exchange.wait(reply).payload).num
            assert base == len(device.seen) == driver.rings[0].used_idx <= 6
            driver.stop(0)
            device.entered.clear()
            driver.start(0, base)
            driver.handles[0].kick()
            assert device.entered.wait(WAIT)
            serving.backend.stop()
            device.allowed.release(6)
            serving._thread.join(WAIT)
            assert not serving.alive
            assert base < len(device.seen) <= 12
        assert [source for _, source in device.seen] == sources[: len(device.seen)]

    def test_all_of_a_batch_is_served_in_the_end(self, tmp_path: Path) -> None:
        device = Slow()
        with (
            Serving(device, tmp_path / "socket") as serving,
            Driver(serving.path, queues=2) as driver,
        ):
            sources = [b"request %d" % i for i in range(20)]
            numbers = [driver.submit(0, source) for source in sources]
            assert device.entered.wait(WAIT)
            other = driver.submit(1, b"other")
            device.allowed.release(6)
            driver.wait(1, other)
            assert driver.result(1, other, 5) == (OK, b"rehto")
            device.allowed.release(len(sources))
            for number, source in zip(numbers, sources, strict=True):
                driver.wait(0, number)
                assert driver.result(0, number, len(source)) == (OK, source[::-1])
            assert [source for queue, source in device.seen if not queue] == sources
            assert serving.stats.requests == 21

    @pytest.mark.capacity(RING_LOOK_WORK=1024)
    def test_what_is_put_back_is_taken_again(self) -> None:
        memory, rig = small_ring()
        quota = Quota(1 << 20)
        ring = SplitRing(memory._space, 64, 0, 0x2000, 0x3000, quota=quota, ordered=True)
        for i in range(5):
            rig.offer(rig.put_chain(2 * i, Desc(0x4000, 16), Desc(0x5000, 1, WRITE)))
        chains, *_ = ring.run_once(None, 64, -1, True)
        heads = [chain.head for chain in chains]
        rest = chains[2:]
        used = quota.used
        ring.put_back(rest)
        assert (rest, ring.outstanding, ring.next_avail) == ([], 2, 2)
        assert quota.used == used * 2 // 5
        with pytest.raises(ValueError, match="was not handed out by this ring"):
            ring.put_back(chains[2:])
        with pytest.raises(ValueError, match="completed before"):
            ring.complete(chains[2], 0)
        # One that came before those of this batch stays.
        again, *_ = ring.run_once(None, 64, -1, True)
        assert [chain.head for chain in again] == heads[2:]
        both = [chains[1], *again]
        ring.put_back(both)
        assert both == chains[1:2]
        for chain in chains[:2]:
            ring.complete(chain, 0)
        assert (quota.used, ring.resume_at) == (0, 0)
        ring.publish()
        assert (ring.resume_at, rig.used_idx) == (2, 2)

    @pytest.mark.capacity(RING_LOOK_WORK=1024)
    def test_what_follows_one_that_was_served_stays(self, image: Path) -> None:
        device = BlockDevice(image)
        memory, rig = small_ring()
        ring = SplitRing(memory._space, 64, 0, 0x2000, 0x3000)
        for i, kind in enumerate((T_FLUSH, T_OUT, T_FLUSH)):
            memory.write(0x4000 + 16 * i, struct.pack("<IIQ", kind, 0, 0))
            data = [Desc(0x5000, 4096)] if kind == T_OUT else []
            rig.offer(
                rig.put_chain(3 * i, Desc(0x4000 + 16 * i, 16), *data, Desc(0x6000 + i, 1, WRITE))
            )
        chains, _, served, _ = ring.run_once(device.server, 64, -1, True)
        assert (len(chains), served) == (2, 1)
        rest = list(chains)
        ring.put_back(rest)
        assert (rest, ring.next_avail) == (chains[:1], 2)
        device.close()


class TestDisk:
    def test_a_queue_that_stops_gives_up_zeroing(
        self, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(blk, "GIVE_UP_AFTER", 0.0)
        monkeypatch.setattr(blk, "TRIM_SLICE_BYTES", MIB)
        entered, go = threading.Event(), threading.Event()

        def zero(self: Image, offset: int, length: int) -> None:
            entered.set()
            assert go.wait(WAIT)

        monkeypatch.setattr(Image, "zero", zero)
        device = BlockDevice(image)
        device.stopping(0)
        with Serving(device, tmp_path / "socket") as serving, DiskDriver(serving.path) as driver:
            payload = struct.pack("<QII", 0, 64 * MIB // 512, 0)
            number = driver.request(0, T_WRITE_ZEROES, payload=payload)
            driver.handles[0].kick()
            assert entered.wait(WAIT)
            device.stopping(0)
            go.set()
            driver.wait(0, number)
            assert driver.status(0, number) == S_IOERR
        device.close()

    def test_a_queue_that_stops_gives_up_a_large_read(
        self, image: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(blk, "GIVE_UP_AFTER", 0.0)
        device = BlockDevice(image)
        memory, rig = small_ring(0x800000)
        memory.write(0x4000, struct.pack("<IIQ", T_IN, 0, 0))
        head = rig.put_chain(
            0, Desc(0x4000, 16), Desc(0x10000, 6 * MIB, WRITE), Desc(0x5000, 1, WRITE)
        )
        rig.offer(head)
        (chain,), _ = rig.ring.pop()
        work = device._work(chain, device._patience[0])
        next(work)
        device.stopping(0)
        with pytest.raises(StopIteration) as finished:
            next(work)
        assert finished.value.value == 0
        assert memory.read(0x5000, 1) == bytes([S_IOERR])
        assert device.errors == 1
        rig.finish(chain, 0)
        device.close()

    def test_ranges_that_overlap_are_refused_as_a_whole(self, image: Path) -> None:
        device = BlockDevice(image)
        os.pwrite(device._image.fd, b"x" * 4096, 0)
        memory, rig = small_ring()
        for ranges, expected in (
            (((0, 8, 0), (7, 8, 0)), S_IOERR),
            (((8, 8, 0), (0, 9, 0)), S_IOERR),
            (((0, 8, 0), (0, 8, 0)), S_IOERR),
            (((8, 8, 0), (16, 8, 0)), S_OK),
        ):
            memory.write(0x4000, struct.pack("<IIQ", T_WRITE_ZEROES, 0, 0))
            memory.write(0x4010, b"".join(struct.pack("<QII", *each) for each in ranges))
            rig.offer(rig.put_chain(0, Desc(0x4000, 16 + 16 * len(ranges)), Desc(0x5000, 1, WRITE)))
            (chain,), _ = rig.ring.pop()
            answer = device.process(0, chain)
            assert not isinstance(answer, int)
            answer.result(WAIT)
            assert memory.read(0x5000, 1)[0] == expected, ranges
            assert os.pread(device._image.fd, 4096, 0) == b"x" * 4096
            rig.finish(chain, 1)
        device.close()

    def test_a_full_disk_is_logged_and_counted(
        self, image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Writes that fail behind the guest's back cost it data."""
        caplog.set_level(logging.INFO)
        device = BlockDevice(image)
        full = os.open("/dev/full", os.O_RDWR)
        os.dup2(full, device._image.fd)
        os.close(full)
        with (
            Serving(device, tmp_path / "socket") as serving,
            DiskDriver(serving.path) as driver,
        ):
            for i in range(30):
                assert driver.finish(0, driver.request(0, T_OUT, 8 * i, 4096)) == S_IOERR
            assert serving.stats.failed_requests == 30
            assert serving.stats.requests == 30
            driver.close()
            serving.let_go()
        LOG.flush()
        # What stands in for the image has no size.
        errors = [line for line in errors_of(caplog) if "write of" in line]
        assert errors[1] == (
            f"{image}: write of 4096 bytes failed at sector 8: No space left on device"
        )
        assert len(errors) == budgets.LOG_BURST + 1
        assert errors[-1].startswith("20 more lines like this")
        assert any("requests=30 failed=30 " in line for line in caplog.messages)
        device.close()

    def test_a_flush_that_fails_is_logged_and_counted(
        self, image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(fd: int) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(blk.os, "fdatasync", fail)
        device = BlockDevice(image)
        rig, chain, answer = flush(device)
        assert answer.result(WAIT) == 1
        assert device.failures == 1
        assert errors_of(caplog) == [f"{image}: flush failed: Input/output error"]
        rig.finish(chain, 1)
        device.close()

    def test_a_disk_that_does_not_answer_can_be_closed(
        self,
        image: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        entered, go = threading.Event(), threading.Event()

        def hang(fd: int) -> None:
            entered.set()
            go.wait(WAIT)

        monkeypatch.setattr(blk.os, "fdatasync", hang)
        device = BlockDevice(image)
        _, _, answer = flush(device)
        assert entered.wait(WAIT)
        with promptly(budgets.DEVICE_CLOSE_TIMEOUT):
            device.close()
        assert errors_of(caplog) == [f"{image}: the disk does not answer; the image stays open"]
        go.set()
        answer.result(WAIT)
        until(lambda: device._image.fd < 0, "the image stays open")


class TestOutstanding:
    def test_a_ring_takes_no_more_than_its_quota(self) -> None:
        memory, rig = small_ring()
        quota = Quota(40)
        ring = SplitRing(memory._space, 64, 0, 0x2000, 0x3000, quota=quota)
        other = SplitRing(memory._space, 64, 0, 0x2000, 0x3000, quota=quota)
        for i in range(10):
            rig.offer(rig.put_chain(2 * i, Desc(0x4000, 16), Desc(0x5000, 1, WRITE)))
        chains, _, _, idle = ring.run_once(None, 64, -1, True)
        # Each counts as 16 pieces and its own two.
        assert (len(chains), quota.used) == (3, 54)
        assert not idle
        assert ring.run_once(None, 64, -1, True)[0] == []
        # Another ring whose device holds nothing goes on all the same.
        assert len(other.run_once(None, 64, -1, True)[0]) == 1
        assert quota.used == 72
        del other
        assert quota.used == 54
        ring.complete(chains[0], 0)
        assert (len(ring.run_once(None, 64, -1, True)[0]), quota.used) == (1, 54)
        for chain in chains[1:]:
            ring.complete(chain, 0)
        assert quota.used == 18

    def test_a_device_that_holds_much_is_given_no_more(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("guestio.virtio.host.OUTSTANDING_PIECES", 60)
        device = Later()
        with (
            Serving(device, tmp_path / "socket") as serving,
            Driver(serving.path, queues=2) as driver,
        ):
            numbers = [driver.submit(0, b"LATE%d" % i) for i in range(20)]
            device.expect(b"LATE0", b"LATE3")
            driver.frontend.sync()
            assert len(device.begun) == 4
            assert driver.run(1, b"other") == (OK, b"rehto")
            for i in range(20):
                device.expect(b"LATE%d" % i)
                device.finish(b"LATE%d" % i)
            driver.wait(0, numbers[-1])


class TestMessages:
    def test_half_a_message_is_waited_for_a_while(
        self, survivor: Serving, caplog: pytest.LogCaptureFixture
    ) -> None:
        with Raw(survivor) as raw:
            started = time.monotonic()
            raw.send(encode_message(F.SET_OWNER) + encode_message(F.GET_FEATURES)[:7])
            assert raw.closed()
            assert time.monotonic() - started >= 0.9 * budgets.HALF_MESSAGE_TIMEOUT
        assert errors_of(caplog) == [
            "front-end disconnected: the rest of a message did not come within 1.0 s"
        ]

    def test_bytes_that_trickle_are_no_message(
        self, survivor: Serving, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("guestio.peer.connection.HALF_MESSAGE_TIMEOUT", 0.3)
        with Raw(survivor) as raw:
            raw.send(struct.pack("=III", F.SET_FEATURES, 1, 4000))
            until(lambda: _trickle(raw), "it may go on for ever")

    def test_a_slow_message_and_then_another(
        self, survivor: Serving, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("guestio.peer.connection.HALF_MESSAGE_TIMEOUT", 2.0)
        message = encode_message(F.SET_OWNER)
        with Raw(survivor) as raw:
            for _ in range(4):
                raw.send(message[:5])
                time.sleep(0.6)
                raw.send(message[5:])
            raw.request(F.GET_FEATURES)
            assert len(raw.sock.recv(100)) == 20
            # One that is whole is not limited.
            time.sleep(2.2)
            raw.request(F.GET_FEATURES)
            assert len(raw.sock.recv(100)) == 20

    def test_one_that_says_nothing_makes_way(
        self, survivor: Serving, caplog: pytest.LogCaptureFixture
    ) -> None:
        with (
            Raw(survivor),
            promptly(budgets.FIRST_MESSAGE_TIMEOUT),
            Driver(survivor.path) as driver,
        ):
            assert driver.run(0, b"next") == (OK, b"txen")
        (line,) = errors_of(caplog)
        assert line.endswith("no message within 1.0 s, and another front-end waits")

    def test_a_silent_front_end_may_stay_if_no_other_waits(
        self, survivor: Serving, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("guestio.peer.server.FIRST_MESSAGE_TIMEOUT", 0.1)
        with Raw(survivor) as raw:
            time.sleep(0.4)
            raw.request(F.GET_FEATURES)
            assert len(raw.sock.recv(100)) == 20

    def test_one_that_was_heard_stays_although_others_wait(
        self, survivor: Serving, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("guestio.peer.server.FIRST_MESSAGE_TIMEOUT", 0.1)
        with Raw(survivor) as raw:
            raw.request(F.GET_FEATURES)
            assert len(raw.sock.recv(100)) == 20
            with Raw(survivor):
                time.sleep(0.4)
                raw.request(F.GET_FEATURES)
                assert len(raw.sock.recv(100)) == 20

    def test_one_that_is_gone_does_not_wait(self, survivor: Serving) -> None:
        with Raw(survivor) as raw:
            raw.request(F.GET_FEATURES)
            assert len(raw.sock.recv(100)) == 20
            with Raw(survivor):
                until(lambda: survivor.backend._waiting)
            until(lambda: not survivor.backend._waiting)

    def test_those_left_waiting_by_an_earlier_call_are_watched(self, tmp_path: Path) -> None:
        with Backend(Mirror(), tmp_path / "socket") as backend:
            thread = threading.Thread(target=backend.serve, args=(1,))
            thread.start()
            with contextlib.ExitStack() as stack:
                clients = [
                    stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                    for _ in range(4)
                ]
                for client in clients:
                    client.connect(str(tmp_path / "socket"))
                until(lambda: len(backend._waiting) == 3)
                clients[0].close()
                thread.join(WAIT)
                assert len(backend._waiting) == 3
                thread = threading.Thread(target=backend.serve)
                thread.start()
                until(lambda: len(backend._waiting) == 2)
                clients[2].close()
                until(lambda: len(backend._waiting) == 1)
                backend.stop()
                thread.join(WAIT)
                assert not thread.is_alive()

    def test_those_that_wait_are_served_in_order(self, survivor: Serving) -> None:
        with Raw(survivor) as first, Raw(survivor) as second, Raw(survivor) as third:
            for raw in (third, second, first):
                raw.request(F.GET_FEATURES)
            for raw in (first, second, third):
                assert len(raw.sock.recv(100)) == 20
                raw.sock.settimeout(0.05)
                with pytest.raises(TimeoutError):
                    raw.sock.recv(100)
                raw.sock.shutdown(socket.SHUT_RDWR)

    def test_one_that_speaks_is_served_before_those_that_are_silent(
        self, survivor: Serving, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # As long as none makes way.
        monkeypatch.setattr("guestio.peer.server.FIRST_MESSAGE_TIMEOUT", WAIT)
        with contextlib.ExitStack() as stack:
            served, *_, speaking = (stack.enter_context(Raw(survivor)) for _ in range(14))
            until(lambda: len(survivor.backend._waiting) == 13)
            speaking.request(F.GET_FEATURES)
            served.sock.shutdown(socket.SHUT_RDWR)
            assert len(speaking.sock.recv(100)) == 20

    def test_more_than_may_wait(self, survivor: Serving, caplog: pytest.LogCaptureFixture) -> None:
        with contextlib.ExitStack() as stack:
            first, *others = (
                stack.enter_context(Raw(survivor)) for _ in range(budgets.MAX_WAITING + 1)
            )
            for each in (first, *others):
                each.request(F.GET_FEATURES)
            assert len(first.sock.recv(100)) == 20
            until(lambda: len(survivor.backend._waiting) == budgets.MAX_WAITING)
            with Raw(survivor) as raw:
                assert raw.closed()
            first.sock.shutdown(socket.SHUT_RDWR)
            assert len(others[0].sock.recv(100)) == 20
        (line,) = errors_of(caplog)
        assert line.endswith("front-end refused: 16 others wait")

    def test_one_too_many_gets_the_place_of_one_that_is_silent(self, survivor: Serving) -> None:
        with contextlib.ExitStack() as stack:
            first, *others = (
                stack.enter_context(Raw(survivor)) for _ in range(budgets.MAX_WAITING + 1)
            )
            for each in (first, others[0]):
                each.request(F.GET_FEATURES)
            assert len(first.sock.recv(100)) == 20
            until(lambda: len(survivor.backend._waiting) == budgets.MAX_WAITING)
            with Raw(survivor) as late:
                assert others[1].closed()
                late.request(F.GET_FEATURES)
                first.sock.shutdown(socket.SHUT_RDWR)
                assert len(others[0].sock.recv(100)) == 20
                others[0].sock.shutdown(socket.SHUT_RDWR)
                assert len(late.sock.recv(100)) == 20

    def test_one_that_leaves_its_end_with_another_that_waits(
        self, survivor: Serving, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As a process does that has two connections, passes one by the other, and dies."""
        with Raw(survivor) as first:
            first.request(F.GET_FEATURES)
            assert len(first.sock.recv(100)) == 20
            with Raw(survivor) as second:
                second.request(F.GET_FEATURES, b"", [first.sock.fileno()])
        survivor.let_go()
        (line,) = errors_of(caplog)
        assert "1 descriptors came from it while it waited" in line

    def test_one_that_passes_descriptors_while_it_waits(
        self, survivor: Serving, caplog: pytest.LogCaptureFixture
    ) -> None:
        with Raw(survivor) as first, Raw(survivor) as second:
            first.request(F.GET_FEATURES)
            assert len(first.sock.recv(100)) == 20
            until(lambda: survivor.backend._waiting)
            second.request(F.GET_FEATURES, b"", [second.memfd()])
            assert second.closed()
            # Not that it would matter to the other one.
            first.request(F.GET_FEATURES)
            assert len(first.sock.recv(100)) == 20
        assert len(errors_of(caplog)) == 1

    def test_one_that_reads_no_replies_is_served_on_until_its_time_is_over(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        limits = {"with_fds": True, "send_timeout": 4.0}
        monkeypatch.setattr(Channel.__init__, "__kwdefaults__", limits)
        with Serving(Mirror(), tmp_path / "socket") as serving:
            driver = Driver(serving.path)
            sock = driver.frontend._exchange._channel._socket
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:
                    sock.send(encode_message(F.GET_FEATURES) * 50)
            # Its queue is not kept.
            for _ in range(5):
                assert driver.run(0, b"still") == (OK, b"llits")
            until(lambda: errors_of(caplog))
            assert "did not read a message for 4.0 s" in errors_of(caplog)[0]
            driver.close()
            serving.check_serves()

    def test_one_that_reads_late_gets_every_reply(self, survivor: Serving) -> None:
        with Raw(survivor) as raw:
            raw.sock.setblocking(False)
            sent = 0
            with pytest.raises(BlockingIOError):
                while True:
                    # Few bytes go as a whole or not at all.
                    raw.sock.send(encode_message(F.GET_FEATURES))
                    sent += 1
            raw.sock.settimeout(WAIT)
            received = b""
            while len(received) < 20 * sent:
                received += raw.sock.recv(65536)
            assert received == received[:20] * sent

    def test_misses_that_are_not_read_delay_no_other_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A full back-end channel: the main channel is answered all the same."""
        with (
            Serving(Mirror(), tmp_path / "socket") as serving,
            Driver(serving.path, iommu=True, queues=1) as driver,
        ):
            connection = serving.backend._connection
            assert connection is not None
            back = connection._back._channel
            assert back is not None
            monkeypatch.setattr(back, "_send_some", lambda data, fds: 0)
            driver.prepare(0, b"x")
            driver.frontend.iotlb.unmap((driver.at(driver.buffer(0, 0)), PAGE))
            driver.handles[0].kick()
            with promptly(0.5):
                for _ in range(5):
                    driver.frontend.sync()
            assert backend_channel.MAX_BACKLOG >= 4096
            assert driver.features & PLATFORM


def _trickle(raw: Raw) -> bool:
    try:
        raw.sock.send(b"x")
    except (BrokenPipeError, ConnectionResetError):
        return True
    time.sleep(0.01)
    return False


class TestMemory:
    def test_more_than_any_guest_has(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory_module, "MAX_GUEST_MEMORY", 3 * PAGE)
        with_room = SharedMemory()
        backing = Backing.memfd(8 * PAGE)
        assert backing.fd is not None

        def region(at: int, pages: int) -> MemoryRegion:
            return MemoryRegion(at, pages * PAGE, at, 0)

        two = with_room.replaced([(region(0, 2), backing.fd)])
        with pytest.raises(BackingError, match="0x4000 bytes of guest memory in all"):
            two.adding(region(0x10000, 2), backing.fd)
        assert len(two.adding(region(0x10000, 1), backing.fd).memory) == 2
        with pytest.raises(BackingError, match="at most 0x3000"):
            with_room.replaced([(region(0, 4), backing.fd)])
        del two
        backing.close()


class TestLog:
    def test_a_flood_of_connections(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        with Serving(Mirror(), tmp_path / "socket") as serving:
            for _ in range(100):
                with Raw(serving) as raw:
                    raw.send(b"GET / HTTP/1.1\r\n\r\n")
                    assert raw.closed()
            serving.let_go()
            lines = [line for line in caplog.messages if "front-end" in line]
            assert len(lines) <= 2 * budgets.LOG_BURST
            assert serving.stats.protocol_errors == 100
        # The end tells the rest.
        counted = [line for line in caplog.messages if "more lines" in line]
        assert sum(int(re.match(r"\d+", line).group()) for line in counted) == 200 - len(lines)  # type: ignore[union-attr]

    def test_the_count_comes_by_itself(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(LOG, "_interval", 0.5)
        LOG.flush()
        with Serving(Mirror(), tmp_path / "socket") as serving:
            for _ in range(budgets.LOG_BURST + 5):
                with Raw(serving) as raw:
                    raw.send(b"GET / HTTP/1.1\r\n\r\n")
                    assert raw.closed()
            until(lambda: any("more lines" in line for line in caplog.messages))


def test_the_limits_are_those_of_the_page() -> None:
    """Each constant that a peer may feel is in docs/limits.md."""
    page = (Path(__file__).parents[2] / "docs/limits.md").read_text()
    for shown in ("4 MiB", "2 MiB", "256 KiB", "32 TiB", "1.4 s"):
        assert shown in page
    assert budgets.TURN_BYTES == 4 * MIB
    assert budgets.INLINE_BYTES == 2 * MIB
    assert budgets.MAX_BACKLOG == 256 << 10
    assert budgets.MAX_GUEST_MEMORY == 32 << 40
    assert budgets.EXIT_TIMEOUT == 1.4
    assert budgets.CLOSE_TIMEOUT == 1.75
