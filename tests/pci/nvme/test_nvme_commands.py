"""What a controller says of itself, features, logs, events, queues, shadow doorbells."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from guestio.pci.interrupts import InterruptKind
from tests.kit.nvme_driver import (
    CAP,
    DNR,
    DOORBELLS,
    INTMC,
    INTMS,
    PAGE,
    READ,
    VS,
    WRITE,
    NvmeDriver,
    Trigger,
    move,
)


class TestIdentity:
    def test_registers(self, driver: NvmeDriver) -> None:
        cap = driver.read(CAP, 8)
        assert driver.read(CAP) | driver.read(CAP + 4) << 32 == cap
        assert cap & 0xFFFF == 1023
        assert cap >> 16 & 1  # contiguous queues
        assert cap >> 32 & 0xF == 0  # doorbells are four bytes apart
        assert cap >> 37 & 1  # the NVM command set
        assert cap >> 48 == 0  # pages of 4 KiB
        assert driver.read(VS) == 0x10400
        assert driver.read(DOORBELLS + 8) == 0

    def test_the_controller(self, make: Callable[..., NvmeDriver]) -> None:
        data = make(serial="S 1").identify(1)
        assert data[4:24] == b"S 1".ljust(20)
        assert data[24:64].strip() == b"guestio NVMe"
        assert data[77] == 7  # 512 KiB
        assert struct.unpack_from("<I", data, 80) == (0x10400,)
        assert (data[512], data[513]) == (0x66, 0x44)
        assert struct.unpack_from("<I", data, 516) == (1,)
        assert data[768:].startswith(b"nqn.")
        assert len(data) == PAGE

    def test_the_namespace(self, driver: NvmeDriver) -> None:
        data = driver.identify(0, 1)
        assert struct.unpack_from("<3Q", data) == (8192, 8192, 8192)
        assert struct.unpack_from("<HBB", data, 128) == (0, 9, 0)
        assert any(data[104:120])
        assert driver.identify(3, 1)[:20] == b"\x02\x10\0\0" + data[104:120]

    def test_the_same_serial_number_has_the_same_identifier(
        self, make: Callable[..., NvmeDriver]
    ) -> None:
        first, second, other = (make(serial=text).identify(3, 1) for text in ("a", "a", "b"))
        assert first == second != other

    @pytest.mark.parametrize(
        ("kind", "nsid", "status"),
        [(0, 0, 0x0B), (0, 2, 0x0B), (3, 2, 0x0B), (2, 0xFFFFFFFE, 0x0B), (0x55, 1, 0x02)],
    )
    def test_what_is_not_there(self, driver: NvmeDriver, kind: int, nsid: int, status: int) -> None:
        assert driver.do(0, 6, nsid=nsid, prp1=driver.take(), w10=kind).status == status | DNR


class TestFeatures:
    def test_queues(self, make: Callable[..., NvmeDriver]) -> None:
        driver = make(queues=5)
        assert driver.good(0, 9, w10=7, w11=0x0001_0001).result == 0x0004_0004
        assert driver.good(0, 10, w10=7).result == 0x0004_0004
        assert driver.do(0, 9, w10=7, w11=0xFFFF).status == 0x02 | DNR

    @pytest.mark.parametrize(
        ("feature", "value", "default"),
        [(1, 0x01020304, 4), (4, 350, 343), (5, 7, 0), (6, 0, 1), (8, 0x0203, 0), (11, 0x300, 0)],
    )
    def test_set_get_and_reset(
        self, driver: NvmeDriver, feature: int, value: int, default: int
    ) -> None:
        assert driver.good(0, 10, w10=feature).result == default
        driver.good(0, 9, w10=feature, w11=value)
        assert driver.good(0, 10, w10=feature).result == value
        assert driver.good(0, 10, w10=feature | 1 << 8).result == default
        assert driver.good(0, 10, w10=feature | 3 << 8).result == 4
        driver.disable()
        driver.enable().ready()
        assert driver.good(0, 10, w10=feature).result == default

    def test_vectors(self, make: Callable[..., NvmeDriver]) -> None:
        driver = make(queues=2)
        assert driver.good(0, 10, w10=9, w11=2).result == 2
        assert driver.do(0, 10, w10=9, w11=3).status == 0x02 | DNR
        driver.good(0, 9, w10=9, w11=1 << 16 | 2)
        assert driver.good(0, 10, w10=9, w11=2).result == 1 << 16 | 2

    def test_the_timestamp_goes_on(self, driver: NvmeDriver) -> None:
        page = driver.take()
        driver.put(page, (1 << 40).to_bytes(8, "little"))
        driver.good(0, 9, prp1=page, w10=14)
        driver.good(0, 10, prp1=page, w10=14)
        data = driver.get(page, 8)
        now = int.from_bytes(data[:6], "little")
        assert 1 << 40 <= now < (1 << 40) + 300_000
        assert data[6] == 2

    @pytest.mark.parametrize(
        ("words", "nsid", "status"),
        [
            ({"w10": 6 | 1 << 31}, 0, 0x10D),
            ({"w10": 6}, 1, 0x10F),
            ({"w10": 2, "w11": 1}, 0, 0x02),
            ({"w10": 0x0F}, 0, 0x02),
            ({"w10": 0x0C}, 0, 0x02),
            ({"w10": 0}, 0, 0x02),
        ],
    )
    def test_what_cannot_be_set(
        self, driver: NvmeDriver, words: dict[str, int], nsid: int, status: int
    ) -> None:
        assert driver.do(0, 9, nsid=nsid, **words).status == status | DNR


class TestLogs:
    def test_health_counts(self, driver: NvmeDriver) -> None:
        pages = [driver.take() for _ in range(128)]
        where = driver.prps(pages)
        for fast in (True, False):
            driver.device._queues.fast = fast
            driver.good(1, READ, **move(1, 0, 1000, **where))
            driver.good(1, WRITE, **move(1, 0, 500, **where))
        data = driver.log(2, 512)
        read, written, reads, writes = (
            int.from_bytes(data[at : at + 16], "little") for at in (32, 48, 64, 80)
        )
        assert (read, written, reads, writes) == (2, 1, 2, 2)
        assert data[3] == 100

    def test_errors_newest_first(self, driver: NvmeDriver) -> None:
        driver.do(1, READ, **move(1, 9000, 1, prp1=driver.take()))
        bad = driver.command(0x7E, nsid=1)
        driver.submit(0, bad)
        driver.wait(0)
        data = driver.log(1, 16 * 64)
        fields = struct.unpack_from("<QHHHHQI", data)
        assert fields == (2, 0, int.from_bytes(bad[2:4], "little"), (0x01 | DNR) << 1, 0, 0, 1)
        fields = struct.unpack_from("<QHHHHQI", data, 64)
        assert (fields[0], fields[1], fields[3], fields[5]) == (1, 1, (0x80 | DNR) << 1, 9000)
        assert driver.identify(1)[262] == 15

    def test_firmware_and_effects(self, driver: NvmeDriver) -> None:
        data = driver.log(3, 512)
        assert data[0] == 1
        assert data[8:16] == driver.identify(1)[64:72]
        effects = struct.unpack("<512I", driver.log(5, 2048))
        assert effects[6] == 1
        assert effects[0x80] == 0  # format
        assert effects[256 + WRITE] == 3
        assert effects[256 + READ] == 1

    def test_parts_of_a_page(self, driver: NvmeDriver) -> None:
        whole = driver.log(2, 512)
        assert driver.log(2, 64, w12=32)[:16] == whole[32:48]
        assert driver.log(2, 1024)[512:] == bytes(512)
        assert driver.do(0, 2, prp1=driver.take(), w10=15 << 16 | 2, w12=516).status == 0x02 | DNR
        assert driver.do(0, 2, prp1=driver.take(), w10=15 << 16 | 0x7F).status == 0x109 | DNR
        assert driver.do(0, 2, prp1=driver.take(), w10=2, w11=0x10).status == 0x02 | DNR


class TestEvents:
    def test_another_size_is_told(self, driver: NvmeDriver, image: Path) -> None:
        request = driver.command(0x0C)
        driver.submit(0, request)
        driver.good(0, 9, w10=11, w11=1 << 8)
        os.truncate(image, 6 << 20)
        driver.device.update_size()
        done = driver.wait(0)
        assert done.cid == int.from_bytes(request[2:4], "little")
        assert (done.status, done.result) == (0, 0x040002)
        assert struct.unpack_from("<Q", driver.identify(0, 1)) == (12288,)
        driver.good(1, READ, **move(1, 12287, 1, prp1=driver.take()))
        # The next one comes once the log was read.
        driver.submit(0, driver.command(0x0C))
        os.truncate(image, 5 << 20)
        driver.device.update_size()
        driver.settle()
        assert driver.next(0) is None
        driver.submit(0, driver.command(2, prp1=driver.take(), w10=1023 << 16 | 4))
        results = {driver.wait(0).result for _ in range(2)}
        assert results == {0, 0x040002}

    def test_it_is_not_told_unless_wanted(self, driver: NvmeDriver, image: Path) -> None:
        driver.submit(0, driver.command(0x0C))
        os.truncate(image, 6 << 20)
        driver.device.update_size()
        driver.settle()
        assert driver.next(0) is None
        assert driver.log(4, 4096)[:4] == struct.pack("<I", 1)
        assert driver.log(4, 4096)[:4] == bytes(4)

    def test_temperature(self, driver: NvmeDriver) -> None:
        driver.submit(0, driver.command(0x0C))
        driver.good(0, 9, w10=11, w11=2)
        driver.submit(0, driver.command(9, w10=4, w11=300))
        results = {driver.wait(0).result for _ in range(2)}
        assert results == {0, 0x020101}
        assert driver.log(2, 512)[0] == 2

    def test_at_most_four_requests_wait(self, driver: NvmeDriver) -> None:
        for _ in range(4):
            driver.submit(0, driver.command(0x0C))
        assert driver.do(0, 0x0C).status == 0x105 | DNR

    def test_a_request_is_aborted(self, driver: NvmeDriver) -> None:
        driver.submit(0, driver.command(0x0C, cid=77))
        driver.submit(0, driver.command(8, cid=78, w10=77 << 16))
        both = {done.cid: done for done in (driver.wait(0), driver.wait(0))}
        assert both[77].status == 0x07
        assert (both[78].status, both[78].result) == (0, 0)
        # What is not there is not aborted.
        assert driver.good(0, 8, w10=99 << 16 | 1).result == 1

    def test_events_wait_for_room(self, make: Callable[..., NvmeDriver]) -> None:
        driver = make()
        driver.disable()
        driver.enable(entries=8, cq_entries=2).ready()
        driver.submit(0, driver.command(0x0C))
        driver.submit(0, driver.command(6, prp1=driver.take(), w10=1))
        driver.run(lambda: driver.next(0, consume=False), "identify")
        driver.write(DOORBELLS + 8 * 5, 1)  # belongs to no queue
        driver.settle()
        assert driver.next(0) is None
        driver.consume(0)
        done = driver.wait(0)
        assert (done.status, done.result) == (0, 0x010000)


class TestQueues:
    def test_interrupts_of_a_batch(self, driver: NvmeDriver) -> None:
        driver.create(2, vector=2)
        page = driver.take()
        before = [each.count for each in driver.triggers]
        commands = [driver.command(READ, **move(1, n, 1, prp1=page)) for n in range(20)]
        driver.submit(2, *commands)
        driver.settle()
        assert driver.triggers[2].count == before[2] + 1
        assert driver.triggers[1].count == before[1]
        for command in commands:
            done = driver.wait(2)
            assert (done.cid, done.status) == (int.from_bytes(command[2:4], "little"), 0)

    def test_interrupts_that_do_not_enter_python(self, driver: NvmeDriver) -> None:
        """The core signals a client's eventfd itself, as long as nothing stands in between."""
        driver.create(2, vector=2)
        page, interrupts = driver.take(), driver.host.interrupts
        seen: list[tuple[int, int]] = []

        def read() -> None:
            before = trigger.direct, trigger.count
            driver.submit(2, driver.command(READ, **move(1, 0, 1, prp1=page)))
            driver.settle()
            assert driver.wait(2).status == 0
            seen.append((trigger.direct - before[0], trigger.count - before[1]))

        trigger = driver.triggers[2]
        read()
        # Masked, by the client or because the function may send nothing: it is pending.
        interrupts.mask(InterruptKind.MSIX, 2)
        read()
        interrupts.unmask(InterruptKind.MSIX, 2)
        assert trigger.count == 2
        read()
        interrupts.set_trigger(InterruptKind.MSIX, 2, None)
        read()
        trigger = driver.triggers[2] = Trigger()
        interrupts.set_trigger(InterruptKind.MSIX, 2, trigger)
        assert trigger.count == 1
        read()
        interrupts.disable(InterruptKind.MSIX)
        read()
        assert seen == [(1, 1), (0, 0), (1, 1), (0, 0), (1, 1), (0, 0)]

    def test_no_interrupts_where_none_are_wanted(self, driver: NvmeDriver) -> None:
        cq, sq = driver.take(), driver.take()
        driver.good(0, 5, prp1=cq, w10=15 << 16 | 2, w11=1)
        driver.good(0, 1, prp1=sq, w10=15 << 16 | 2, w11=2 << 16 | 1)
        before = [each.count for each in driver.triggers]
        driver.put(sq, driver.command(READ, **move(1, 0, 1, prp1=driver.take())))
        driver.write(DOORBELLS + 16, 1)
        driver.run(lambda: driver.get(cq + 14, 1)[0] & 1, "a completion")
        assert [each.count for each in driver.triggers] == before

    def test_masked_vectors(self, driver: NvmeDriver) -> None:
        driver.create(2, vector=3)
        driver.write(INTMS, 1 << 3)
        assert driver.read(INTMS) == driver.read(INTMC) == 8
        driver.submit(2, driver.command(READ, **move(1, 0, 1, prp1=driver.take())))
        driver.settle()
        assert driver.triggers[3].count == 0
        driver.write(INTMC, 1 << 3)
        assert driver.triggers[3].count == 1
        assert driver.wait(2).status == 0
        driver.write(INTMS, 1 << 3)
        driver.write(INTMC, 1 << 3)
        assert driver.triggers[3].count == 1

    def test_round_and_round_a_small_queue(self, driver: NvmeDriver, image: Path) -> None:
        driver.create(2, entries=3)
        page, data = driver.take(), image.read_bytes()
        for number in range(50):
            driver.good(2, READ, **move(1, number, 1, prp1=page))
            assert driver.get(page, 512) == data[512 * number : 512 * number + 512]

    def test_nothing_is_fetched_that_could_not_be_completed(self, driver: NvmeDriver) -> None:
        driver.create(2, entries=64, cq_entries=4)
        page = driver.take()
        commands = [driver.command(READ, **move(1, n, 1, prp1=page)) for n in range(40)]
        driver.submit(2, *commands)
        driver.settle()
        assert driver.device._queues.served == 3
        done = [driver.wait(2).cid for _ in commands]
        assert done == [int.from_bytes(each[2:4], "little") for each in commands]

    def test_two_queues_share_completions(self, driver: NvmeDriver) -> None:
        sq = driver.take()
        driver.good(0, 1, prp1=sq, w10=15 << 16 | 2, w11=1 << 16 | 1)
        driver.put(sq, driver.command(READ, cid=500, **move(1, 0, 1, prp1=driver.take())))
        driver.write(DOORBELLS + 16, 1)
        done = driver.wait(1)
        assert (done.queue, done.cid, done.head) == (2, 500, 1)
        assert driver.do(0, 4, w10=1).status == 0x10C | DNR
        driver.good(0, 0, w10=1)
        assert driver.do(0, 4, w10=1).status == 0x10C | DNR
        driver.good(0, 0, w10=2)
        driver.good(0, 4, w10=1)

    def test_a_deleted_queue_can_be_made_again(self, driver: NvmeDriver) -> None:
        for _ in range(3):
            driver.good(0, 0, w10=1)
            driver.good(0, 4, w10=1)
            driver.create(1)
            driver.good(1, READ, **move(1, 0, 1, prp1=driver.take()))


class TestShadowDoorbells:
    @pytest.fixture
    def shadow(self, make: Callable[..., NvmeDriver]) -> tuple[NvmeDriver, int, int]:
        driver = make()
        shadow, events = driver.take(), driver.take()
        driver.good(0, 0x7C, prp1=shadow, prp2=events)
        driver.create(1, entries=16)
        return driver, shadow, events

    def test_the_doorbell_need_not_be_rung_while_it_serves(
        self, shadow: tuple[NvmeDriver, int, int]
    ) -> None:
        driver, page, events = shadow
        buffer = driver.take()

        def tail(value: int) -> None:
            driver.put(page + 8, struct.pack("<I", value))

        def announced() -> int:
            return struct.unpack("<I", driver.get(events + 8, 4))[0]

        first = [driver.command(READ, **move(1, n, 1, prp1=buffer)) for n in range(3)]
        driver.submit(1, *first, ring=False)
        tail(3)
        # One ring for what the shadow says, whatever its value.
        driver.write(DOORBELLS + 8, 1)
        for _ in first:
            assert driver.wait(1).status == 0
            driver.put(page + 12, struct.pack("<I", driver.queues[1].head))
        assert announced() == 3
        # The driver goes past what was announced: it has to ring.
        driver.submit(1, driver.command(READ, **move(1, 0, 1, prp1=buffer)), ring=False)
        tail(4)
        driver.settle()
        assert driver.next(1) is None
        driver.write(DOORBELLS + 8, 4)
        assert driver.wait(1).status == 0
        assert announced() == 4

    def test_room_is_found_in_the_shadow(self, shadow: tuple[NvmeDriver, int, int]) -> None:
        driver, page, events = shadow
        driver.create(2, entries=16, cq_entries=3)
        buffer = driver.take()
        commands = [driver.command(READ, **move(1, n, 1, prp1=buffer)) for n in range(6)]
        driver.submit(2, *commands, ring=False)
        driver.put(page + 16, struct.pack("<I", 6))
        driver.write(DOORBELLS + 16, 6)
        driver.settle()
        for command in commands:
            before, one = driver.queues[2].head, driver.next(2, consume=False)
            assert one is not None
            assert one.cid == int.from_bytes(command[2:4], "little")
            head = driver.queues[2].head
            driver.put(page + 20, struct.pack("<I", head))
            event = struct.unpack("<I", driver.get(events + 20, 4))[0]
            if (head - event - 1) % 2**16 < (head - before) % 2**16:
                driver.consume(2)
                driver.settle()

    def test_a_shadow_that_is_unmapped_is_fatal(self, shadow: tuple[NvmeDriver, int, int]) -> None:
        driver, page, _ = shadow
        driver.unmap((page - 0x10_0000_0000) // PAGE)
        driver.write(DOORBELLS + 8, 1)
        driver.run(lambda: driver.status & 2, "fatal")

    def test_a_tail_that_cannot_be_is_told(self, shadow: tuple[NvmeDriver, int, int]) -> None:
        driver, page, _ = shadow
        driver.submit(0, driver.command(0x0C))
        driver.put(page + 8, struct.pack("<I", 16))
        driver.write(DOORBELLS + 8, 1)
        assert driver.wait(0).result == 0x010100

    @pytest.mark.parametrize(("prp1", "prp2"), [(0, PAGE), (PAGE, 0), (PAGE + 8, PAGE), (PAGE, 4)])
    def test_pages_that_are_none(self, driver: NvmeDriver, prp1: int, prp2: int) -> None:
        assert driver.do(0, 0x7C, prp1=prp1, prp2=prp2).status == 0x02 | DNR
