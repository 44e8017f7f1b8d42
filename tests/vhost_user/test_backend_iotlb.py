"""A back-end behind an IOMMU: what it asks, how it takes every kind of answer, what it gives up."""

from __future__ import annotations

import gc
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from guestio._core.vhost_user.miss_table import REPEAT_AFTER
from guestio.addr import Permissions
from guestio.errors import QueueError
from guestio.guest import Shape
from guestio.guest.disk import ScriptedGuest
from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from guestio.ratelog import LOG
from guestio.vhost_user.channel import Channel
from guestio.vhost_user.frontend import Frontend
from guestio.vhost_user.iotlb_service import MissAction, MissAnswer, MissHook
from guestio.vhost_user.messages import (
    FrontendRequest,
    IotlbMessage,
    MemoryRegion,
    SingleMemoryRegion,
    VringAddr,
    VringFd,
    VringState,
    encode_ack,
    encode_iotlb,
)
from guestio.virtio.blk import BlockDevice
from tests.kit.rings import NEXT, PAGE, WRITE, Desc
from tests.kit.serving import (
    BUFFERS,
    EVENT_IDX,
    FAILED,
    INDIRECT,
    IOVA,
    OK,
    Driver,
    Mirror,
    Serving,
    errors_of,
    lasting,
    nothing_left,
    promptly,
    stalled,
    until,
    warnings_of,
)

F = FrontendRequest
R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE
TIMEOUT = 1.5


@pytest.fixture
def device() -> Mirror:
    return Mirror()


@pytest.fixture
def serving(device: Mirror, tmp_path: Path) -> Iterator[Serving]:
    with Serving(device, tmp_path / "socket") as made:
        yield made


@pytest.fixture
def impatient(device: Mirror, tmp_path: Path) -> Iterator[Serving]:
    """A back-end that waits only for a short while for an answer."""
    with Serving(device, tmp_path / "socket", miss_timeout=TIMEOUT) as made:
        yield made


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(1 << 20))
    return path


class TestAsking:
    def test_a_whole_batch_at_once_and_every_page_once(self, serving: Serving) -> None:
        with Driver(serving.path, iommu=True, answer="caller") as driver:
            asked: list[tuple[int, int]] = []
            service = driver.frontend.iotlb

            def note(message: IotlbMessage) -> MissAnswer:
                asked.append((message.iova, message.perm))
                return MissAnswer()

            service.miss_hook = note
            # The ring's own pages come first, and alone: nothing else is known before.
            number = driver.submit(0, b"first")
            until(lambda: service.service() or driver.done(0, number))
            until(lambda: service.service() or driver.done(0, number))
            ring = driver.layout(0)
            rings = {(ring.desc, 1), (ring.avail, 1), (ring.used, 3)}
            assert set(asked[:3]) == rings
            # A busy machine may have some asked twice.
            assert len(set(asked)) == 5
            # Twenty requests, whose sources share one page and whose answers share another.
            asked.clear()
            hand = driver.rings[0]
            source, answer = BUFFERS + 0x40000, BUFFERS + 0x50000
            for i in range(20):
                driver.memory.write(source + 8 * i, b"no. %4d" % i)
                hand.offer(
                    hand.put_chain(
                        2 * i,
                        Desc(driver.at(source + 8 * i), 8),
                        Desc(driver.at(answer + 16 * i), 9, WRITE),
                    )
                )
            number = hand.offered - 1
            driver.handles[0].kick()
            until(lambda: service.service() or driver.done(0, number))
            until(lambda: driver.done(0, number) or service.service())
            assert sorted(set(asked)) == [(driver.at(source), 1), (driver.at(answer), 2)]
            for i in range(20):
                expected = (b"no. %4d" % i)[::-1] + bytes([OK])
                assert driver.memory.read(answer + 16 * i, 9) == expected

    def test_all_of_a_batch_is_asked_before_anything_is_answered(self, serving: Serving) -> None:
        with Driver(serving.path, iommu=True, answer="caller") as driver:
            service = driver.frontend.iotlb
            number = driver.submit(0, b"first")
            until(lambda: service.service() or driver.done(0, number))
            until(lambda: driver.done(0, number) or service.service())
            # 30 requests of two pages each; none is answered yet.
            for i in range(30):
                last = driver.prepare(0, b"batch%d" % i)
            driver.handles[0].kick()
            channel = socket.socket(fileno=os.dup(service.fileno()))
            channel.settimeout(5)
            data = b""
            expected = 44 * 60
            while len(data) < expected:
                data = channel.recv(1 << 16, socket.MSG_PEEK)
            channel.close()
            asked = {IotlbMessage.decode(data[at + 12 : at + 44]) for at in range(0, expected, 44)}
            assert len(asked) == 60
            until(lambda: driver.done(0, last) or service.service())
            until(lambda: driver.done(0, last))
            # What was not answered soon is asked once more.
            assert 5 + 60 <= service.counts.misses <= 2 * (5 + 60)
            assert serving.stats.iotlb_misses == service.counts.misses
            assert driver.result(0, last, 7) == (OK, b"92hctab")

    def test_no_acknowledgement_is_asked_for_what_is_answered(self, serving: Serving) -> None:
        with Hand(serving.path) as hand:
            for _ in range(3):
                hand.submit()
                hand.serve_until_done()
            assert hand.status() == OK
            first = {(iova, access): marked for iova, access, marked in reversed(hand.asked)}
            assert len(first) == 5
            assert not any(first.values())

    def test_what_is_not_answered_is_asked_once_more(self, serving: Serving) -> None:
        with Hand(serving.path) as hand:
            hand.submit()
            asked = [hand.next_miss() for _ in range(6)]
            assert [marked for *_, marked in asked] == 3 * [False] + 3 * [True]
            assert sorted(asked[:3]) == sorted((*page, False) for *page, _ in asked[3:])
            assert hand.back.recv(10 * REPEAT_AFTER) is None
            # The answers to the first misses, then refusals of the second ones.
            for iova, *_ in asked[:3]:
                assert hand.update(iova, PAGE, hand.user(iova - IOVA), 3) == 0
            hand.back.send(3 * encode_ack(1, 1))
            hand.serve_until_done()
            assert hand.status() == OK
            assert serving.stats.iotlb_refused == 0
            # A busy machine may have the other two asked again as well.
            assert 6 + 2 <= serving.stats.iotlb_misses <= 6 + 4

    def test_both_queues_share_what_is_asked(self, serving: Serving) -> None:
        with Driver(serving.path, queues=2, iommu=True) as driver:
            driver.run(0, b"warm")
            driver.run(1, b"warm")
            before = driver.frontend.iotlb.counts.misses
            for index in (0, 1):
                ring = driver.rings[index]
                ring.offer(
                    ring.put_chain(
                        0,
                        Desc(driver.at(0x180000), 4),
                        Desc(driver.at(0x190000 + 8 * index), 5, WRITE),
                    )
                )
            for index in (0, 1):
                driver.handles[index].kick()
            for index in (0, 1):
                driver.wait(index, 1)
            assert driver.frontend.iotlb.counts.misses - before <= 4
            assert driver.frontend.iotlb.counts.misses - before >= 2

    def test_nothing_is_asked_twice(self, serving: Serving) -> None:
        with Driver(serving.path, iommu=True, features=EVENT_IDX) as driver:
            for _ in range(64):
                driver.run(0, b"warm")
            before = driver.frontend.iotlb.counts.misses
            for _ in range(200):
                assert driver.run(0, b"known") == (OK, b"nwonk")
            assert driver.frontend.iotlb.counts.misses == before

    @pytest.mark.parametrize("pipeline", [1, 16, 2000])
    def test_more_pages_than_may_be_asked_for_at_a_time(
        self, image: Path, tmp_path: Path, pipeline: int
    ) -> None:
        device = BlockDevice(image)
        with (
            Serving(device, tmp_path / "socket"),
            ScriptedGuest(
                tmp_path / "socket", iommu="strict", queue_size=64, pipeline=pipeline
            ) as guest,
        ):
            requests = [guest.submit_read(0, 131072, publish=i == 31) for i in range(32)]
            guest.wait(*requests)
            expected = image.read_bytes()[:131072]
            assert all(request.check().data == expected for request in requests)
        device.close()

    def test_all_answers_before_all_acknowledgements(self, serving: Serving) -> None:
        """More than fits in flight, from a front-end that acknowledges late."""
        with Driver(serving.path, iommu=True, answer="caller", pipeline=4096) as driver:
            service = driver.frontend.iotlb
            ring = driver.rings[0]
            pages = [driver.at(0x80000 + PAGE * i) for i in range(300)]
            number = driver.submit(0, b"first")
            until(lambda: service.service() or driver.done(0, number))
            until(lambda: driver.done(0, number) or service.service())
            # A source of 600 pages in 50 pieces.
            head = ring.put_chain(
                4,
                *[Desc(pages[0] + PAGE * 6 * i, PAGE * 6) for i in range(50)],
                Desc(driver.at(BUFFERS + PAGE), 1, WRITE),
            )
            driver.frontend.iotlb.map(IOVA + 0x400000, 0x80000, 0x100000, RW)
            ring.offer(head)
            driver.handles[0].kick()
            until(lambda: driver.done(0, number + 1) or (service.service() and False))
            assert driver.memory.read(BUFFERS + PAGE, 1) == bytes([OK])


class TestRefusals:
    def test_an_unmapped_buffer_fails_its_request_only(
        self, serving: Serving, caplog: pytest.LogCaptureFixture
    ) -> None:
        with Driver(serving.path, iommu=True, queues=2) as driver:
            for i in range(30):
                _, written = driver.run_raw(
                    0, Desc(0x5000 + i * PAGE, 16), Desc(driver.at(BUFFERS), 1, WRITE)
                )
                assert written == 0
                assert driver.memory.read(BUFFERS, 1) == bytes([FAILED])
                driver.memory.write(BUFFERS, b"\0")
                assert driver.run(1, b"fine") == (OK, b"enif")
            assert serving.stats.failed_requests == 30
            assert serving.stats.iotlb_refused == 30
            assert serving.stats.iotlb_timeouts == 0
        assert errors_of(caplog) == []
        LOG.flush()
        logged = warnings_of(caplog)
        assert "no translation of the buffer at 0x5000+0x10" in logged[0]
        assert "20 more lines like this" in logged[-1]
        assert len(logged) == 11

    def test_an_unmapped_answer_and_an_unmapped_status(self, serving: Serving) -> None:
        with Driver(serving.path, iommu=True) as driver:
            driver.run_raw(
                0,
                Desc(driver.at(BUFFERS), 4),
                Desc(0x9000, 512, WRITE),
                Desc(driver.at(BUFFERS + PAGE), 1, WRITE),
            )
            assert driver.memory.read(BUFFERS + PAGE, 1) == bytes([FAILED])
            assert driver.run_raw(0, Desc(driver.at(BUFFERS), 4), Desc(0x9000, 1, WRITE))[1] == 0
            assert driver.run(0, b"fine") == (OK, b"enif")

    def test_an_unmapped_indirect_table(self, serving: Serving) -> None:
        with Driver(serving.path, iommu=True, features=INDIRECT) as driver:
            assert driver.run_raw(0, Desc(0x9000, 32, 4))[1] == 0
            assert serving.stats.failed_requests == 1
            assert driver.run(0, b"fine") == (OK, b"enif")

    def test_requests_around_it_are_served_in_order(self, serving: Serving, device: Mirror) -> None:
        with Driver(serving.path, iommu=True) as driver:
            ring = driver.rings[0]
            for i in range(20):
                if i % 3 == 1:
                    ring.offer(
                        ring.put_chain(
                            2 * ring.offered % 64, Desc(0x5000, 4), Desc(0x6000, 1, WRITE)
                        )
                    )
                else:
                    driver.prepare(0, b"i%d" % i)
            driver.handles[0].kick()
            driver.wait(0, 19)
            assert [source for _, source in device.seen] == [
                b"i%d" % i for i in range(20) if i % 3 != 1
            ]
            assert [ring.used_entry(i)[0] for i in range(20)] == [2 * i for i in range(20)]

    def test_a_huge_unmapped_buffer_fails_soon(self, serving: Serving) -> None:
        with Driver(serving.path, iommu=True, queues=2) as driver:
            driver.run(0, b"warm")
            with lasting(0.0, 5.0):
                driver.run_raw(0, Desc(1 << 40, 2**31), Desc(driver.at(BUFFERS), 1, WRITE))
            assert driver.frontend.iotlb.counts.misses < 2000
            assert driver.run(1, b"fine") == (OK, b"enif")

    def test_writing_where_only_reading_is_allowed(self, serving: Serving) -> None:
        with Driver(serving.path, iommu=True, map_all=False) as driver:
            iotlb = driver.frontend.iotlb
            iotlb.map(IOVA + BUFFERS, BUFFERS, PAGE, RW)
            iotlb.map(IOVA + BUFFERS + PAGE, BUFFERS + PAGE, PAGE, R)
            secret = BUFFERS + PAGE
            driver.memory.write(secret, b"read only")
            # The device knows the page from reading it.
            driver.run_raw(0, Desc(driver.at(secret), 9), Desc(driver.at(BUFFERS + 100), 10, WRITE))
            assert driver.memory.read(BUFFERS + 100, 9) == b"ylno daer"
            driver.run_raw(
                0,
                Desc(driver.at(BUFFERS), 4),
                Desc(driver.at(secret + 2), 4, WRITE),
                Desc(driver.at(BUFFERS + 200), 1, WRITE),
            )
            assert driver.memory.read(BUFFERS + 200, 1) == bytes([FAILED])
            assert driver.memory.read(secret, 9) == b"read only"
            until(lambda: iotlb.counts.access_fails == 1)
            assert serving.stats.access_fails == 1
            assert iotlb.counts.refused == 2, "asked, and asked again to be told"

    def test_reading_where_only_writing_is_allowed(self, serving: Serving) -> None:
        with Driver(serving.path, iommu=True, map_all=False) as driver:
            iotlb = driver.frontend.iotlb
            iotlb.map(IOVA + BUFFERS, BUFFERS, PAGE, W)
            driver.run_raw(0, Desc(driver.at(BUFFERS), 4), Desc(driver.at(BUFFERS + 8), 1, WRITE))
            assert driver.memory.read(BUFFERS + 8, 1) == bytes([FAILED])
            driver.run_raw(0, Desc(driver.at(BUFFERS), 4), Desc(driver.at(BUFFERS + 8), 1, WRITE))
            until(lambda: iotlb.counts.access_fails >= 1)

    def test_one_in_the_middle_of_a_batch_costs_one_more_miss(self, serving: Serving) -> None:
        with Driver(serving.path, iommu=True, answer="caller") as driver:
            service = driver.frontend.iotlb
            number = driver.submit(0, b"first")
            until(lambda: service.service() or driver.done(0, number))
            until(lambda: driver.done(0, number) or service.service())
            before = service.counts.misses
            ring, statuses = driver.rings[0], []
            for i in range(1, 6):
                source, answer = BUFFERS + 0x40000 + i * PAGE, BUFFERS + 0x60000 + i * PAGE
                driver.memory.write(source, b"no %d" % i)
                driver.memory.write(answer, bytes(8))
                statuses.append(answer)
                rows = [Desc(driver.at(source), 4)]
                if i == 3:
                    rows.append(Desc(0x5000, 4))
                ring.offer(ring.put_chain(4 * i, *rows, Desc(driver.at(answer), 5, WRITE)))
            driver.handles[0].kick()
            until(lambda: driver.done(0, number + 5) or (service.service() and False))
            results = [driver.memory.read(status, 5) for status in statuses]
            assert results[2][4:] == bytes([FAILED])
            assert [results[i] for i in (0, 1, 3, 4)] == [
                b"%d on" % i + bytes([OK]) for i in (1, 2, 4, 5)
            ]
            # On a busy machine, others are asked twice as well.
            assert 5 * 2 + 1 + 1 <= service.counts.misses - before <= 2 * (5 * 2 + 1)
            assert service.counts.refused == 2
            assert serving.stats.iotlb_misses == service.counts.misses
            assert (serving.stats.iotlb_refused, serving.stats.iotlb_timeouts) == (1, 0)
            assert serving.stats.failed_requests == 1

    def test_very_many_forbidden_accesses_are_reported_in_part(self, serving: Serving) -> None:
        with Driver(
            serving.path, iommu=True, map_all=False, size=1024, features=INDIRECT
        ) as driver:
            iotlb = driver.frontend.iotlb
            for at in (0x10000, 0x20000, 0x30000):
                iotlb.map(IOVA + at, at, 0x8000, RW)
            iotlb.map(IOVA + BUFFERS, BUFFERS, 0x10000, RW)
            iotlb.map(IOVA + 0x100000, 0x100000, PAGE, R)
            ring = driver.rings[0]
            rows = [Desc(driver.at(0x100000), 1, NEXT, 1)]
            rows += [Desc(driver.at(0x100000 + i), 1, WRITE | NEXT, i + 1) for i in range(1, 1000)]
            rows.append(Desc(driver.at(BUFFERS), 1, WRITE))
            ring.offer(ring.put_table(0, driver.at(BUFFERS + PAGE), rows))
            driver.handles[0].kick()
            driver.wait(0, 0)
            assert driver.memory.read(BUFFERS, 1) == bytes([FAILED])
            assert serving.stats.access_fails == 999
            until(lambda: iotlb.counts.access_fails == 64)


class TestSilence:
    """A front-end that answers late, wrongly or never."""

    def test_a_miss_that_is_never_answered(
        self, impatient: Serving, caplog: pytest.LogCaptureFixture
    ) -> None:
        with Driver(impatient.path, iommu=True, queues=2) as driver:
            driver.run(0, b"warm")
            driver.run(1, b"warm")
            lost = driver.at(0x180000)
            driver.frontend.iotlb.miss_hook = _only(lost, MissAction.IGNORE)
            ring = driver.rings[0]
            ring.offer(ring.put_chain(0, Desc(lost, 8), Desc(driver.at(BUFFERS), 1, WRITE)))
            before = stalled()
            started = time.monotonic()
            driver.handles[0].kick()
            # Meanwhile the other queue is served, with translations of its own.
            served = 0
            while not driver.done(0, 1):
                assert driver.run(1, b"meanwhile") == (OK, b"elihwnaem")
                served += 1
            waited = stalled() - before
            assert TIMEOUT / 2 < time.monotonic() - started < 10 * TIMEOUT + waited
            assert served > 5 or waited > TIMEOUT / 2
            assert driver.memory.read(BUFFERS, 1) == bytes([FAILED])
            assert (impatient.stats.iotlb_timeouts, impatient.stats.iotlb_refused) == (1, 1)
            assert impatient.stats.failed_requests == 1
            # What is answered is served again.
            driver.frontend.iotlb.miss_hook = None
            assert driver.run(0, b"fine") == (OK, b"enif")
            assert driver.run_raw(0, Desc(lost, 8), Desc(driver.at(BUFFERS), 9, WRITE))[1] == 9
        assert errors_of(caplog) == []

    def test_no_miss_is_ever_answered(self, impatient: Serving) -> None:
        with Driver(impatient.path, iommu=True) as driver:
            driver.run(0, b"warm")
            driver.frontend.iotlb.miss_hook = lambda _: MissAnswer(MissAction.IGNORE)
            with promptly(3 * TIMEOUT):
                for i in range(3):
                    driver.run_raw(0, Desc(0x100000 + i * PAGE, 8), Desc(0x200000, 1, WRITE))
            assert impatient.stats.failed_requests == 3

    def test_far_more_unanswered_misses_than_may_be_in_flight(self, impatient: Serving) -> None:
        """The expectation of acknowledgements that never come must not pile up."""
        with Driver(impatient.path, iommu=True) as driver:
            driver.run(0, b"warm")
            driver.frontend.iotlb.miss_hook = lambda _: MissAnswer(MissAction.IGNORE)
            for i in range(3):
                driver.run_raw(0, Desc((i + 1) << 32, 400 * PAGE), Desc(0x200000, 1, WRITE))
            assert impatient.stats.failed_requests == 3
            driver.frontend.iotlb.miss_hook = None
            assert driver.run(0, b"fine") == (OK, b"enif")

    @pytest.mark.parametrize("late", [0.05, 2 * TIMEOUT])
    def test_late_answers(self, impatient: Serving, late: float) -> None:
        with Driver(impatient.path, iommu=True) as driver:
            driver.run(0, b"warm")
            slow = driver.at(BUFFERS + 0x80000)
            driver.memory.write(BUFFERS + 0x80000, b"slow")
            driver.frontend.iotlb.miss_hook = _only(slow, MissAction.ANSWER, late)
            driver.run_raw(0, Desc(slow, 4), Desc(driver.at(BUFFERS), 5, WRITE))
            in_time = late < TIMEOUT
            assert driver.memory.read(BUFFERS + 4, 1) == bytes([OK if in_time else FAILED])
            driver.frontend.iotlb.miss_hook = None
            until(lambda: impatient.stats.iotlb_updates >= 6)
            driver.run_raw(0, Desc(slow, 4), Desc(driver.at(BUFFERS), 5, WRITE))
            assert driver.memory.read(BUFFERS, 5) == b"wols" + bytes([OK])

    def test_a_success_without_a_translation(self, impatient: Serving) -> None:
        with Driver(impatient.path, iommu=True) as driver:
            driver.run(0, b"warm")
            before = driver.frontend.iotlb.counts.misses
            driver.frontend.iotlb.miss_hook = lambda _: MissAnswer(MissAction.CLAIM)
            driver.run_raw(0, Desc(0x100000, 8), Desc(driver.at(BUFFERS), 1, WRITE))
            assert driver.memory.read(BUFFERS, 1) == bytes([FAILED])
            # It is asked once more and then believed; what is long in coming is repeated, too.
            assert 2 <= driver.frontend.iotlb.counts.misses - before <= 4

    def test_a_translation_that_allows_too_little(self, impatient: Serving) -> None:
        with Hand(impatient.path) as hand:
            hand.answers[hand.at(BUFFERS), 1] = R
            hand.answers[hand.at(BUFFERS + PAGE), 2] = R
            hand.submit()
            hand.serve_until_done()
            assert hand.used() == 1
            assert impatient.stats.iotlb_refused == 1
            assert impatient.stats.iotlb_timeouts == 0, "it is refused, not waited for"
            assert (hand.at(BUFFERS + PAGE), 2, True) in hand.asked
            assert len(set(hand.asked)) == len(hand.asked), "nothing is asked more than twice"

    @pytest.mark.parametrize("size", [100])
    def test_translations_of_less_than_is_needed(
        self, impatient: Serving, size: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An endless dialogue: every miss is answered, never with what is needed."""
        with Hand(impatient.path) as hand:
            hand.sizes[hand.at(BUFFERS)] = size
            hand.submit(at=200)
            with lasting(0.0, 20 * TIMEOUT):
                hand.serve_until_done()
            assert hand.used() == 1
            assert impatient.stats.failed_requests == 1
            assert any("a request fails for want of time" in m for m in warnings_of(caplog))

    def test_a_ring_whose_translation_is_refused(
        self, serving: Serving, caplog: pytest.LogCaptureFixture
    ) -> None:
        with Driver(serving.path, iommu=True, queues=2) as driver:
            driver.run(1, b"warm")
            iotlb = driver.frontend.iotlb
            layout = driver.layout(0)
            used = layout.used
            iotlb.unmap((used, PAGE))
            driver.submit(0, b"lost")
            until(lambda: any("its ring has no translation" in m for m in warnings_of(caplog)))
            assert driver.run(1, b"fine") == (OK, b"enif")
            # It comes back, and a kick has it tried again.
            iotlb.map(used, used - IOVA, PAGE, RW)
            driver.handles[0].kick()
            driver.wait(0, 0)
            assert driver.result(0, 0, 4) == (OK, b"tsol")

    def test_the_back_channel_goes_away(self, impatient: Serving) -> None:
        with Hand(impatient.path) as hand:
            hand.submit()
            hand.serve_until_done()
            hand.back.close()
            hand.submit(place=BUFFERS + 0x10000)
            until(lambda: hand.used() == 2)
            assert impatient.stats.failed_requests == 1
            assert hand.run_known()

    def test_garbage_on_the_back_channel(
        self, impatient: Serving, caplog: pytest.LogCaptureFixture
    ) -> None:
        with Hand(impatient.path) as hand:
            hand.submit()
            hand.serve_until_done()
            hand.back._socket.send(b"garbage" * 20)
            until(lambda: any("of no use any more" in line for line in errors_of(caplog)))
            assert hand.run_known()

    def test_another_back_channel(self, impatient: Serving) -> None:
        """Acknowledgements on it are for the misses on it, not for older ones."""
        with Hand(impatient.path) as hand:
            hand.submit()
            hand.serve_until_done()
            hand.submit(place=BUFFERS + 0x10000)
            # The misses are out; now the channel is replaced. They are asked again there.
            hand.take_back_channel()
            hand.new_channel()
            hand.serve_until_done()
            assert hand.used() == 2
            assert impatient.stats.failed_requests == 0

    def test_a_front_end_that_accepts_an_iommu_and_has_none(
        self, impatient: Serving, caplog: pytest.LogCaptureFixture
    ) -> None:
        """User-mode Linux does. No address of its own leads anywhere, for all it shares."""
        with Naive(impatient.path) as hand:
            before = bytes(hand.whole.read(0x30000, 0x1000))
            hand.submit()
            until(lambda: any("its ring has no translation" in m for m in warnings_of(caplog)))
            assert hand.whole.read(0x30000, 0x1000) == before
            assert impatient.stats.requests == 0
        with Driver(impatient.path, iommu=True) as driver:
            assert driver.run(0, b"next") == (OK, b"txen")

    def test_acknowledgements_that_were_not_requested(self, impatient: Serving) -> None:
        with Hand(impatient.path) as hand:
            hand.back.send(encode_ack(1, 0) * 5000)
            hand.submit()
            hand.serve_until_done()
            assert hand.status() == OK


class TestUpdates:
    def test_over_regions(self, serving: Serving) -> None:
        with Hand(serving.path, regions=4) as hand:
            reply = hand.update(IOVA + 0x700000, 0x100000, hand.user(0), RW)
            assert reply == 0
            hand.run_at(IOVA + 0x700000)

    def test_to_memory_that_is_not_shared(self, serving: Serving) -> None:
        with Hand(serving.path) as hand:
            end = hand.user(0) + Driver.SIZE
            for user, size in ((0, PAGE), (end, PAGE), (end - PAGE, 2 * PAGE), (2**64 - 1, 1)):
                assert hand.update(0x5000, size, user, RW) != 0
            assert hand.update(0x5000, 0, hand.user(0), RW) != 0
            assert hand.update(2**64 - PAGE, 2 * PAGE, hand.user(0), RW) != 0
            assert hand.update(0x5000, PAGE, hand.user(0), 4) != 0
            hand.submit()
            hand.serve_until_done()
            assert hand.status() == OK

    def test_a_refusal_keeps_no_memory_mapped(self, serving: Serving) -> None:
        with Driver(serving.path, iommu=True) as driver, Backing.memfd(PAGE, "extra") as extra:
            more = driver.memory.insert_region(MmapRegion(0x10000000, extra))
            driver.frontend.set_memory(more)
            assert _mapped("extra") == 2, "here and in the back-end"
            gc.disable()
            try:
                update = IotlbMessage.update(0x5000, PAGE, 0x1000, 3).encode()
                reply = driver.frontend.request(F.IOTLB_MSG, update, has_reply=True)
                assert reply != bytes(8)
                driver.frontend.set_memory(driver.memory)
                assert _mapped("extra") == 1
            finally:
                gc.enable()
            del more

    def test_what_was_not_asked_for(self, serving: Serving) -> None:
        with Hand(serving.path) as hand:
            assert hand.update(IOVA, Driver.SIZE, hand.user(0), RW) == 0
            hand.submit()
            until(lambda: hand.used() == 1)
            assert hand.asked == []
            assert hand.status() == OK

    def test_without_an_iommu(self, serving: Serving) -> None:
        with Driver(serving.path) as driver:
            user = driver.frontend.user_address(0)
            message = IotlbMessage.update(0x5000, PAGE, user, 3)
            reply = driver.frontend.request(F.IOTLB_MSG, message.encode(), has_reply=True)
            assert reply != bytes(8)
            reply = driver.frontend.request(
                F.IOTLB_MSG, IotlbMessage.invalidate(0x5000, PAGE).encode(), has_reply=True
            )
            assert reply == bytes(8)
            assert driver.run(0, b"fine") == (OK, b"enif")

    @pytest.mark.parametrize("count", [1, 63, 64, 65, 500])
    def test_many_in_one_go_are_all_acknowledged(self, serving: Serving, count: int) -> None:
        with Hand(serving.path) as hand:
            messages = [
                IotlbMessage.update(0x10000000 + i * PAGE, PAGE, hand.user(0) + i % 16 * PAGE, 3)
                if i % 3
                else IotlbMessage.invalidate(0x10000000 + i * PAGE, 16 * PAGE)
                for i in range(count)
            ]
            data = b"".join(encode_iotlb(22, m, need_reply=True) for m in messages)
            hand.main.send(data)
            for _ in range(count):
                assert hand.reply(22) == bytes(8)
            hand.submit()
            hand.serve_until_done()
            assert hand.status() == OK


class TestRevocation:
    """Once an invalidation is acknowledged, nothing happens through the old translation."""

    def test_a_late_access_is_refused(self, serving: Serving, device: Mirror) -> None:
        with Driver(serving.path, iommu=True, map_all=False, features=EVENT_IDX) as driver:
            iotlb = driver.frontend.iotlb
            page = BUFFERS + PAGE
            iotlb.map(IOVA + BUFFERS, BUFFERS, PAGE, RW)
            for i in range(50):
                iova = 0x900000 + i % 3 * PAGE
                iotlb.map(iova, page, PAGE, RW)
                driver.memory.write(BUFFERS, b"data%02d" % i)
                driver.run_raw(0, Desc(driver.at(BUFFERS), 6), Desc(iova, 7, WRITE))
                assert driver.memory.read(page, 7) == (b"data%02d" % i)[::-1] + bytes([OK])
                iotlb.unmap((iova, PAGE))
                # The page has another use now.
                driver.memory.write(page, b"private")
                seen = len(device.seen)
                driver.run_raw(0, Desc(driver.at(BUFFERS), 6), Desc(iova, 7, WRITE))
                assert driver.memory.read(page, 7) == b"private"
                driver.run_raw(0, Desc(iova, 7), Desc(driver.at(BUFFERS + 64), 8, WRITE))
                assert len(device.seen) == seen, "the device never saw what is not its own"
                assert driver.memory.read(BUFFERS + 71, 1) == bytes([FAILED])
            assert serving.stats.iotlb_invalidations == 50
            assert serving.stats.failed_requests == 100

    def test_a_request_in_flight_delays_the_acknowledgement(
        self, serving: Serving, device: Mirror
    ) -> None:
        with Driver(serving.path, iommu=True) as driver:
            driver.submit(0, b"WAIT")
            assert device.entered.wait(5)
            place = driver.buffer(0, 0)
            revoked = threading.Event()

            def revoke() -> None:
                driver.frontend.iotlb.unmap((driver.at(place), 2 * PAGE))
                revoked.set()

            thread = threading.Thread(target=revoke)
            thread.start()
            assert not revoked.wait(0.2)
            device.go_on.set()
            assert revoked.wait(5)
            thread.join()
            # It was finished before, in full.
            assert driver.result(0, 0, 4) == (OK, b"TIAW")
            driver.memory.write(place + PAGE, b"mine now")
            driver.frontend.sync()
            assert driver.memory.read(place + PAGE, 8) == b"mine now"

    def test_a_page_that_moves(self, serving: Serving) -> None:
        with Driver(serving.path, iommu=True, map_all=False) as driver:
            iotlb = driver.frontend.iotlb
            iotlb.map(IOVA + BUFFERS, BUFFERS, PAGE, RW)
            iova = 0x900000
            for i in range(100):
                place = BUFFERS + PAGE * (1 + i % 7)
                iotlb.map(iova, place, PAGE, RW)
                driver.memory.write(place, bytes(PAGE))
                driver.memory.write(BUFFERS, b"%06d" % i)
                driver.run_raw(0, Desc(driver.at(BUFFERS), 6), Desc(iova, 7, WRITE))
                assert driver.memory.read(place, 6) == (b"%06d" % i)[::-1]
                iotlb.unmap((iova, PAGE))

    @pytest.mark.parametrize("area", ["desc", "avail", "used"])
    def test_a_ring_page_that_moves_while_it_runs(self, serving: Serving, area: str) -> None:
        with Driver(serving.path, iommu=True) as driver:
            iotlb = driver.frontend.iotlb
            driver.run(0, b"warm")
            at = getattr(driver.layout(0), area)
            homes = [at - IOVA, 0x1F0000]
            for i in range(20):
                here, there = homes[i % 2], homes[(i + 1) % 2]
                iotlb.unmap((at, PAGE))
                driver.memory.write(there, driver.memory.read(here, PAGE))
                driver.memory.write(here, b"\xa5" * PAGE)
                iotlb.map(at, there, PAGE, RW)
                driver.rings[0].view = _Moved(driver.memory, at, there)
                assert driver.run(0, b"follow") == (OK, b"wollof")
                assert driver.memory.read(here, PAGE) == b"\xa5" * PAGE

    def test_everything_at_once(self, serving: Serving) -> None:
        with Driver(serving.path, iommu=True, queues=2) as driver:
            for i in range(20):
                assert driver.run(i % 2, b"flush") == (OK, b"hsulf")
                driver.frontend.iotlb.invalidate((0, 2**64))

    def test_under_load_with_addresses_used_again_at_once(
        self, image: Path, tmp_path: Path
    ) -> None:
        """As Linux in strict mode: what is late reaches the memory of another request."""
        device = BlockDevice(image, num_queues=2)
        rng = random.Random(7)
        with (
            Serving(device, tmp_path / "socket"),
            ScriptedGuest(
                tmp_path / "socket", iommu="strict", queues=2, queue_size=64, memory_size=8 << 20
            ) as guest,
        ):
            model = bytearray(image.read_bytes())
            for _ in range(60):
                batch = []
                for _ in range(rng.randrange(1, 8)):
                    sector = rng.randrange(2000)
                    shape = Shape.random(rng, 16, 4097) if rng.random() < 0.5 else None
                    batch.append(
                        (
                            sector,
                            guest.submit_read(sector, 4096, queue=rng.randrange(2), shape=shape),
                        )
                    )
                guest.wait(*(request for _, request in batch))
                for sector, request in batch:
                    assert request.check().data == model[512 * sector : 512 * sector + 4096]
                sector, data = rng.randrange(2000), rng.randbytes(4096)
                guest.write(sector, data)
                model[512 * sector : 512 * sector + 4096] = data
            assert image.read_bytes() == model
        device.close()

    def test_a_buffer_the_guest_took_back_too_early(self, image: Path, tmp_path: Path) -> None:
        device = BlockDevice(image)
        with (
            Serving(device, tmp_path / "socket", miss_timeout=TIMEOUT) as serving,
            ScriptedGuest(tmp_path / "socket", iommu="strict") as guest,
        ):
            guest.frontend.iotlb.miss_hook = lambda m: MissAnswer(
                MissAction.REFUSE if m.perm == 2 else MissAction.ANSWER
            )
            # The status byte is among what was taken back, so there is no telling but this.
            with pytest.raises(QueueError, match="is broken"):
                guest.read(0, 4096)
            until(lambda: serving.stats.queue_errors == 1)
            assert serving.stats.failed_requests == 1
        device.close()


def test_nothing_is_left_of_misses(device: Mirror, tmp_path: Path) -> None:
    with Serving(device, tmp_path / "socket") as serving:
        serving.check_serves()
        with nothing_left():
            for _ in range(3):
                driver = Driver(serving.path, iommu=True, answer="caller")
                driver.submit(0, b"never answered")
                until(lambda: serving.stats.iotlb_misses >= 3)
                driver.close()
        serving.check_serves()


def _mapped(name: str) -> int:
    return Path("/proc/self/maps").read_text().count(f"memfd:{name}")


def _only(iova: int, action: MissAction, delay: float = 0.0) -> MissHook:
    def hook(message: IotlbMessage) -> MissAnswer:
        return MissAnswer(action, delay) if message.iova == iova else MissAnswer()

    return hook


class _Moved:
    """Memory at I/O virtual addresses, with one page elsewhere."""

    def __init__(self, memory: GuestRegionCollection, iova: int, gpa: int) -> None:
        self._memory, self._iova, self._gpa = memory, iova, gpa

    def _place(self, addr: int) -> int:
        inside = addr - self._iova
        return self._gpa + inside if 0 <= inside < PAGE else addr - IOVA

    def read(self, addr: int, length: int) -> bytes:
        return self._memory.read(self._place(addr), length)

    def write(self, addr: int, data: bytes) -> None:
        self._memory.write(self._place(addr), data)


class Hand:
    """A front-end whose answers to misses are the test's: whole messages, sent and read by hand."""

    def __init__(self, path: Path, *, regions: int = 1) -> None:
        self.backing = Backing.memfd(Driver.SIZE)
        assert self.backing.fd is not None
        share = Driver.SIZE // regions
        self.parts = [Backing.from_fd(self.backing.fd, share, share * i) for i in range(regions)]
        self.whole = GuestRegionCollection.from_regions([MmapRegion(0, self.backing)])
        self.frontend = Frontend(path, timeout=5, answer="caller")
        self.frontend.negotiate(1 << 32 | 1 << 33)
        self.main = self.frontend._exchange._channel
        self._share(regions, share)
        self.answers: dict[tuple[int, int], int] = {}
        self.sizes: dict[int, int] = {}
        self.asked: list[tuple[int, int, bool]] = []
        self.driver_offered = 0
        self.back: Channel | None = None
        self.new_channel()
        self._start()

    def _share(self, regions: int, share: int) -> None:
        """Share the memory in parts, neighbors for the front-end but not for the guest."""
        self._user = 0x7000_0000_0000
        assert self.backing.fd is not None
        for i in range(regions):
            region = MemoryRegion(
                (regions - 1 - i) * 2 * share if regions > 1 else 0,
                share,
                self._user + i * share,
                i * share,
            )
            self.frontend.request(F.ADD_MEM_REG, SingleMemoryRegion(region), [self.backing.fd])

    def user(self, offset: int) -> int:
        return self._user + offset

    def at(self, offset: int) -> int:
        return IOVA + offset

    def new_channel(self) -> None:
        if self.back is not None:
            self.back.close()
        ours, theirs = socket.socketpair()
        self.frontend.request(F.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        theirs.close()
        self.back = Channel(ours)

    def _start(self) -> None:
        request = self.frontend.request
        request(F.SET_VRING_NUM, VringState(0, 64))
        request(
            F.SET_VRING_ADDR,
            VringAddr(0, 0, self.at(0x10000), self.at(0x30000), self.at(0x20000)),
        )
        self.kick = os.eventfd(0)
        request(F.SET_VRING_KICK, VringFd(0, has_fd=True), [self.kick])
        request(F.SET_VRING_ENABLE, VringState(0, 1))

    def update(self, iova: int, size: int, user: int, perm: int) -> int:
        """Send an UPDATE; what the back-end says to it."""
        message = encode_iotlb(
            22, IotlbMessage.update(iova, size, user, int(perm)), need_reply=True
        )
        self.main.send(message)
        return int.from_bytes(self.reply(22), "little")

    def reply(self, request: int) -> bytes:
        message = self.main.recv(5)
        assert message is not None
        assert message.request == request
        return message.payload

    def submit(self, at: int = 0, place: int = BUFFERS) -> None:
        """A request of 4 bytes at some offset in a page, and an answer in the next page."""
        self._submit(self.at(place + at), self.at(place + PAGE))

    def _submit(self, source: int, answer: int) -> None:
        head = 2 * self.driver_offered % 64
        rows = struct.pack("<QIHH", source, 4, 1, head + 1) + struct.pack("<QIHH", answer, 5, 2, 0)
        self.whole.write(0x10000 + 16 * head, rows)
        slot = 0x20004 + 2 * (self.driver_offered % 64)
        self.whole.write(slot, head.to_bytes(2, "little"))
        self.driver_offered += 1
        self.whole.write(0x20002, self.driver_offered.to_bytes(2, "little"))
        os.eventfd_write(self.kick, 1)

    def used(self) -> int:
        return int.from_bytes(self.whole.read(0x30002, 2), "little")

    def status(self) -> int:
        return self.whole.read(BUFFERS + PAGE + 4, 1)[0]

    def take_back_channel(self) -> None:
        """Read what is asked without answering."""
        assert self.back.recv(5) is not None

    def next_miss(self) -> tuple[int, int, bool]:
        """The next miss: page, access, and whether it is to be acknowledged."""
        message = self.back.recv(5)
        assert message is not None
        iotlb = IotlbMessage.decode(message.payload)
        return iotlb.iova, iotlb.perm, message.header.need_reply

    def serve_until_done(self) -> None:
        """Answer misses until everything offered is used."""
        deadline = time.monotonic() + 10
        while self.used() != self.driver_offered & 0xFFFF:
            assert time.monotonic() < deadline, "it hangs"
            message = self.back.recv(0.01)
            if message is None or message.header.is_reply:
                continue
            iotlb = IotlbMessage.decode(message.payload)
            if iotlb.type != 1:
                continue
            self.asked.append((iotlb.iova, iotlb.perm, message.header.need_reply))
            perm = self.answers.get((iotlb.iova, iotlb.perm), 3)
            size = self.sizes.get(iotlb.iova, PAGE)
            user = self.user(iotlb.iova - IOVA)
            assert self.update(iotlb.iova, size, user, perm) == 0
            if message.header.need_reply:
                self.back.send(encode_ack(1, 0))

    def run_known(self) -> bool:
        """Run a request whose translations the back-end has."""
        before = self.used()
        self.submit()
        until(lambda: self.used() == (before + 1) & 0xFFFF)
        return self.status() == OK

    def run_at(self, iova: int) -> None:
        """Read where two regions meet, through a mapping of them in a row."""
        assert self.update(IOVA, Driver.SIZE, self.user(0), 3) == 0
        self.whole.write(0x7FFFE, b"over")
        self._submit(iova + 0x7FFFE, self.at(BUFFERS + PAGE))
        self.serve_until_done()
        assert self.whole.read(BUFFERS + PAGE, 5) == b"revo" + bytes([OK])

    def close(self) -> None:
        self.frontend.close()
        if self.back is not None:
            self.back.close()
        os.close(self.kick)
        del self.whole
        for part in self.parts:
            part.close()
        self.backing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Naive(Hand):
    """One that accepted an IOMMU, has none, and goes on with addresses of its own."""

    def at(self, offset: int) -> int:
        return self.user(offset)

    def new_channel(self) -> None:
        """There is no channel for requests."""
