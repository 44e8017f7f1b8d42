"""Everything a driver can get wrong: each has its status, and the next command is served."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guestio.pci.nvme import NvmeController
from tests.kit.nvme_driver import (
    BASE,
    COMPARE,
    CSTS,
    DATASET,
    DNR,
    DOORBELLS,
    FATAL,
    FLUSH,
    PAGE,
    READ,
    READY,
    VERIFY,
    WRITE,
    ZEROES,
    NvmeDriver,
    move,
)

FAR = 1 << 50
FIELD, TRANSFER, NAMESPACE, OFFSET, RANGE = 0x02, 0x04, 0x0B, 0x13, 0x80
ADMIN_OPCODES = {0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 0x7C}
IO_OPCODES = {FLUSH, WRITE, READ, COMPARE, ZEROES, DATASET, VERIFY}


def serves(driver: NvmeDriver) -> None:
    """The controller is as good as ever."""
    assert driver.status & (READY | FATAL) == READY
    driver.good(1, READ, **move(1, 0, 1, prp1=driver.take()))
    driver.good(0, 6, prp1=driver.take(), w10=1)


class TestCommands:
    def test_opcodes_that_are_none(self, driver: NvmeDriver) -> None:
        page = driver.take()
        for opcode in range(256):
            if opcode not in ADMIN_OPCODES:
                assert driver.do(0, opcode, nsid=1, prp1=page).status == 0x01 | DNR, opcode
            if opcode not in IO_OPCODES:
                assert driver.do(1, opcode, nsid=1, prp1=page).status == 0x01 | DNR, opcode
        serves(driver)

    @pytest.mark.parametrize("opcode", sorted(IO_OPCODES))
    @pytest.mark.parametrize("nsid", [0, 2, 0xFFFFFFFE, 0xFFFFFFFF])
    def test_namespaces_that_are_none(self, driver: NvmeDriver, opcode: int, nsid: int) -> None:
        page = driver.take()
        status = driver.do(1, opcode, **move(nsid, 0, 1, prp1=page)).status
        every = opcode == FLUSH and nsid == 0xFFFFFFFF
        assert status == (0 if every else NAMESPACE | DNR)
        serves(driver)

    @pytest.mark.parametrize("flags", [1, 2, 3, 4, 0x20, 0x3F, 0xC0])
    @pytest.mark.parametrize("queue", [0, 1])
    def test_flags(self, driver: NvmeDriver, queue: int, flags: int) -> None:
        page = driver.take()
        what: dict[str, Any] = move(1, 0, 1, prp1=page) if queue else {"prp1": page, "w10": 1}
        opcode = READ if queue else 6
        assert driver.do(queue, opcode, flags=flags, **what).status == FIELD | DNR
        serves(driver)

    @pytest.mark.parametrize("opcode", [READ, WRITE, COMPARE, VERIFY, ZEROES])
    @pytest.mark.parametrize(
        ("block", "count", "status"),
        [
            (8192, 1, RANGE),
            (8191, 2, RANGE),
            ((1 << 64) - 1, 1, RANGE),
            ((1 << 64) - 1, 2, RANGE),
            (1 << 55, 1, RANGE),
            (0, 1025, FIELD),
            (0, 65536, FIELD),
        ],
    )
    def test_ranges(
        self, driver: NvmeDriver, image: Path, opcode: int, block: int, count: int, status: int
    ) -> None:
        before = image.read_bytes()
        if status == FIELD and opcode in (VERIFY, ZEROES):
            # They move no data, so that only the namespace limits them.
            status = RANGE if count > 8192 else 0
            if opcode == ZEROES and not status:
                return
        got = driver.do(1, opcode, **move(1, block, count, prp1=driver.take())).status
        assert got == (status | DNR if status else 0)
        assert image.read_bytes() == before
        serves(driver)

    @pytest.mark.parametrize(
        ("prp1", "prp2", "blocks", "status"),
        [
            (BASE + 1, 0, 1, OFFSET),
            (BASE + 2, 0, 1, OFFSET),
            (BASE, BASE + 4, 16, OFFSET),
            (BASE, BASE + 4, 64, OFFSET),
            (BASE, BASE + 1, 64, OFFSET),
            (FAR, 0, 1, TRANSFER),
            (BASE, FAR, 16, TRANSFER),
            (BASE, FAR, 64, TRANSFER),
            ((1 << 64) - PAGE, 0, 8, TRANSFER),
            ((1 << 64) - PAGE, 0, 16, TRANSFER),
            ((1 << 64) - 4, BASE, 8, TRANSFER),
        ],
    )
    @pytest.mark.parametrize("opcode", [READ, WRITE, COMPARE])
    def test_prps(
        self,
        driver: NvmeDriver,
        image: Path,
        opcode: int,
        prp1: int,
        prp2: int,
        blocks: int,
        status: int,
    ) -> None:
        before = image.read_bytes()
        got = driver.do(1, opcode, **move(1, 0, blocks, prp1=prp1, prp2=prp2)).status
        assert got == status | DNR
        assert image.read_bytes() == before
        serves(driver)

    def test_a_list_that_leads_to_itself(self, driver: NvmeDriver) -> None:
        page, target = driver.take(), driver.take()
        # Its last entry, in every place where a list could go on.
        driver.put(page, struct.pack("<512Q", *[page] * 512))
        for offset in (0, PAGE - 8, PAGE - 16, PAGE - 80):
            done = driver.do(1, WRITE, **move(1, 0, 1024, prp1=target, prp2=page + offset))
            assert done.status == 0
        serves(driver)

    @pytest.mark.parametrize("entry", [BASE + 8, BASE + 1, FAR, (1 << 64) - 8])
    @pytest.mark.parametrize("place", [0, 1, 509, 510])
    def test_entries_of_a_list(self, driver: NvmeDriver, entry: int, place: int) -> None:
        page, target = driver.take(), driver.take()
        entries = [target] * 512
        entries[place] = entry
        driver.put(page, struct.pack("<512Q", *entries))
        at = page + 8 * max(place - 2, 0)
        done = driver.do(1, READ, **move(1, 0, 64, prp1=target, prp2=at))
        assert done.status == (OFFSET if entry % PAGE else TRANSFER) | DNR
        serves(driver)

    @pytest.mark.parametrize(
        ("segment", "kind", "status"),
        [
            ([(0, 512, 0)], 0x30, 0),
            ([(0, 511, 0)], 0x30, 0x0F),
            ([(0, 513, 0)], 0x30, 0x0F),
            ([(0, 0, 0), (0, 512, 0)], 0x30, 0),
            ([(0, 512, 0x40)], 0x30, 0x11),
            ([(0, 512, 0x01)], 0x30, 0x11),
            ([(0, 512, 0xF0)], 0x30, 0x11),
            ([(0, 512, 0)], 0x20, 0x0D),
            ([(0, 16, 0x30), (0, 512, 0)], 0x20, 0x0D),
            ([(0, 512, 0), (0, 16, 0x30)], 0x30, 0x0D),
            ([(0, 16, 0x20)], 0x20, 0x0E),
            ([], 0x30, 0x0D),
            ([(FAR, 512, 0)], 0x30, TRANSFER),
            ([((1 << 64) - 1 - (BASE + 2 * PAGE), 512, 0)], 0x30, TRANSFER),
            ([(0, 512, 0x10)], 0x30, 0),
        ],
    )
    def test_sgls(
        self, driver: NvmeDriver, segment: list[tuple[int, int, int]], kind: int, status: int
    ) -> None:
        page, target = driver.take(), driver.take()
        made = b""
        for address, size, identifier in segment:
            base = page if identifier in (0x20, 0x30) else target
            made += struct.pack("<QI3xB", (base + address) % 2**64, size, identifier)
        driver.put(page, made)
        sgl = struct.pack("<QI3xB", page, len(made), kind)
        done = driver.do(1, READ, **move(1, 0, 1, sgl=sgl, flags=0x40))
        assert done.status == (status | DNR if status else 0)
        serves(driver)

    @pytest.mark.parametrize(("count", "status"), [(1024, 0), (1025, 0x0E | DNR)])
    def test_as_many_descriptors_as_there_may_be(
        self, driver: NvmeDriver, count: int, status: int
    ) -> None:
        """The one in the command, which leads to them, is not among them."""
        segment, target = driver.take(5), driver.take(128)
        sizes = [512] * 1023 + [512 // (count - 1023)] * (count - 1023)
        made = b"".join(
            struct.pack("<QI3xB", target + 512 * place, size, 0) for place, size in enumerate(sizes)
        )
        driver.put(segment, made)
        sgl = struct.pack("<QI3xB", segment, len(made), 0x30)
        assert driver.do(1, READ, **move(1, 0, 1024, sgl=sgl, flags=0x40)).status == status
        serves(driver)

    @pytest.mark.parametrize(
        ("sgl", "status"),
        [
            ((BASE, 511, 0), 0x0F),
            ((BASE, 1 << 31, 0), 0x0F),
            ((BASE, 512, 0x10), 0x11),
            ((BASE, 512, 0x50), 0x11),
            ((FAR, 512, 0), TRANSFER),
            ((FAR, 16, 0x30), TRANSFER),
            ((BASE, 17, 0x30), 0x0D),
            ((BASE, 1 << 31, 0x30), 0x0E),
            (((1 << 64) - 16, 512, 0), TRANSFER),
            (((1 << 64) - 16, 32, 0x30), TRANSFER),
        ],
    )
    def test_the_first_descriptor(
        self, driver: NvmeDriver, sgl: tuple[int, int, int], status: int
    ) -> None:
        what = move(1, 0, 1, sgl=struct.pack("<QI3xB", *sgl), flags=0x40)
        for opcode in (READ, WRITE):
            assert driver.do(1, opcode, **what).status == status | DNR
        assert driver.do(0, 6, w10=1, sgl=bytes(16), flags=0x40).status == FIELD | DNR
        serves(driver)


class TestQueues:
    @pytest.mark.parametrize(
        ("words", "status"),
        [
            ({"w10": 15 << 16, "w11": 3}, 0x101),
            ({"w10": 15 << 16 | 1, "w11": 3}, 0x101),
            ({"w10": 15 << 16 | 9, "w11": 3}, 0x101),
            ({"w10": 15 << 16 | 0xFFFF, "w11": 3}, 0x101),
            ({"w10": 2, "w11": 3}, 0x102),
            ({"w10": 1024 << 16 | 2, "w11": 3}, 0x102),
            ({"w10": 0xFFFF << 16 | 2, "w11": 3}, 0x102),
            ({"w10": 15 << 16 | 2, "w11": 2}, FIELD),
            ({"w10": 15 << 16 | 2, "w11": 9 << 16 | 3}, 0x108),
            ({"w10": 15 << 16 | 2, "w11": 0xFFFF << 16 | 3}, 0x108),
        ],
    )
    def test_completion_queues(
        self, driver: NvmeDriver, words: dict[str, int], status: int
    ) -> None:
        assert driver.do(0, 5, prp1=driver.take(), **words).status == status | DNR
        assert not driver.device._queues.has_completion_queue(2)
        serves(driver)

    @pytest.mark.parametrize(
        ("words", "status"),
        [
            ({"w10": 15 << 16, "w11": 1 << 16 | 1}, 0x101),
            ({"w10": 15 << 16 | 1, "w11": 1 << 16 | 1}, 0x101),
            ({"w10": 15 << 16 | 9, "w11": 1 << 16 | 1}, 0x101),
            ({"w10": 2, "w11": 1 << 16 | 1}, 0x102),
            ({"w10": 1024 << 16 | 2, "w11": 1 << 16 | 1}, 0x102),
            ({"w10": 15 << 16 | 2, "w11": 1 << 16}, FIELD),
            ({"w10": 15 << 16 | 2, "w11": 1}, 0x100),
            ({"w10": 15 << 16 | 2, "w11": 3 << 16 | 1}, 0x100),
            ({"w10": 15 << 16 | 2, "w11": 0xFFFF << 16 | 1}, 0x100),
        ],
    )
    def test_submission_queues(
        self, driver: NvmeDriver, words: dict[str, int], status: int
    ) -> None:
        assert driver.do(0, 1, prp1=driver.take(), **words).status == status | DNR
        assert not driver.device._queues.has_submission_queue(2)
        serves(driver)

    @pytest.mark.parametrize("address", [BASE + 8, BASE + 1, (1 << 64) - PAGE])
    def test_addresses(self, driver: NvmeDriver, address: int) -> None:
        for opcode, more in ((5, 3), (1, 1 << 16 | 1)):
            words = {"w10": 1023 << 16 | 2, "w11": more}
            assert driver.do(0, opcode, prp1=address, **words).status == OFFSET | DNR
        serves(driver)

    @pytest.mark.parametrize("number", [0, 2, 9, 0xFFFF])
    def test_deletion_of_what_is_not_there(self, driver: NvmeDriver, number: int) -> None:
        for opcode in (0, 4):
            assert driver.do(0, opcode, w10=number).status == 0x101 | DNR
        serves(driver)

    @pytest.mark.parametrize(
        ("offset", "value", "event"),
        [
            (8 * 2, 1, 0),  # there is no queue 2
            (8 * 8, 1, 0),
            (8 * 9, 1, 0),  # nor can there be a queue 9
            (0xFF8, 1, 0),
            (0xFFC, 1, 0),
            (8, 64, 1),
            (8, 0xFFFFFFFF, 1),
            (12, 1, 1),  # nothing was completed
            (12, 64, 1),
            (12, 0xFFFFFFFF, 1),
        ],
    )
    def test_doorbells(self, driver: NvmeDriver, offset: int, value: int, event: int) -> None:
        driver.submit(0, driver.command(0x0C))
        driver.write(DOORBELLS + offset, value)
        done = driver.wait(0)
        assert (done.status, done.result) == (0, 0x010000 | event << 8)
        assert driver.log(1, 64)[10:12] == b"\xff\xff"
        serves(driver)

    @pytest.mark.parametrize("size", [1, 2, 8])
    def test_doorbells_of_other_sizes(self, driver: NvmeDriver, size: int) -> None:
        driver.submit(0, driver.command(0x0C))
        driver.write(DOORBELLS + 8, 1, size)
        assert driver.wait(0).result == 0x010000
        serves(driver)

    def test_a_flood_of_wrong_doorbells_is_one_event(self, driver: NvmeDriver) -> None:
        driver.submit(0, driver.command(0x0C), driver.command(0x0C))
        for _ in range(500):
            driver.write(DOORBELLS + 8 * 5, 1)
        assert driver.wait(0).result == 0x010000
        driver.settle()
        assert driver.next(0) is None
        serves(driver)

    @pytest.mark.parametrize("which", ["sq", "cq"])
    @pytest.mark.parametrize("number", [0, 1])
    def test_a_queue_that_is_unmapped_is_fatal(
        self, driver: NvmeDriver, number: int, which: str
    ) -> None:
        page = (getattr(driver.queues[number], which) - BASE) // PAGE
        if which == "cq":
            driver.submit(number, driver.command(FLUSH if number else 8, nsid=1), ring=False)
        driver.unmap(page)
        driver.write(DOORBELLS + 8 * number, (driver.queues[number].tail or 1))
        if which == "sq":
            driver.write(DOORBELLS + 8 * number, (driver.queues[number].tail + 1) % 32)
        driver.run(lambda: driver.status & FATAL, "fatal")
        # Nothing moves until the controller is reset, whatever is rung.
        for offset in range(0, 64, 4):
            driver.write(DOORBELLS + offset, 1)
        driver.settle()
        assert driver.read(CSTS) & FATAL
        driver.unmap(0, 0)  # maps everything again
        driver.disable()
        assert driver.status == 0
        driver.enable().ready()
        driver.create(1)
        serves(driver)

    def test_without_bus_mastering_queues_are_idle(self, driver: NvmeDriver) -> None:
        """What is rung then is served afterwards, and nothing is lost or done twice."""
        interrupts, page = driver.triggers[0].count, driver.take()
        driver.host.write_config(4, b"\x02\0")
        pair = driver.queues[1]
        entries = [driver.command(READ, **move(1, 0, 1, prp1=page)) for _ in range(3)]
        os.pwrite(driver.fd, b"".join(entries), pair.sq - BASE + 64 * pair.tail)
        pair.tail += 3
        driver.ring(1)
        driver.settle()
        assert not driver.status & FATAL
        assert driver.triggers[0].count == interrupts
        driver.host.write_config(4, b"\x06\0")
        assert [driver.wait(1).status for _ in range(3)] == [0, 0, 0]
        assert driver.triggers[0].count > interrupts
        driver.settle()
        assert driver.next(1) is None
        assert driver.host.memory.refused == 0
        serves(driver)

    def test_what_completes_without_bus_mastering_is_posted_afterwards(
        self, driver: NvmeDriver
    ) -> None:
        flush = driver.command(FLUSH, nsid=1)
        driver.submit(1, flush)
        driver.host.doorbells.serve_rung()  # fetched: a thread has it
        driver.host.write_config(4, b"\x02\0")
        driver.run(lambda: driver.device._queues.outstanding(1) == 0, "the end of the flush")
        assert not driver.status & FATAL
        driver.host.write_config(4, b"\x06\0")
        done = driver.wait(1)
        assert (done.status, done.cid) == (0, int.from_bytes(flush[2:4], "little"))
        # It has waited; nothing was refused.
        assert driver.host.memory.refused == 0
        serves(driver)

    def test_a_reset_forgets_what_waits_for_bus_mastering(self, driver: NvmeDriver) -> None:
        driver.submit(1, driver.command(FLUSH, nsid=1))
        driver.host.doorbells.serve_rung()
        driver.host.write_config(4, b"\x02\0")
        driver.run(lambda: driver.device._queues.outstanding(1) == 0, "the end of the flush")
        at = driver.queues[1].cq - BASE
        driver.disable()
        driver.host.write_config(4, b"\x06\0")
        driver.settle()
        assert os.pread(driver.fd, 16, at) == bytes(16)
        driver.enable().ready()
        driver.create(1)
        serves(driver)


class TestAnything:
    @pytest.mark.parametrize("seed", range(4))
    def test_random_commands_and_registers(
        self, make: Callable[..., NvmeDriver], image: Path, seed: int
    ) -> None:
        """Each command is completed once, and the controller can always be enabled again."""
        rng = random.Random(seed)
        driver = make(queues=3)
        before = driver.get(BASE, PAGE)
        assert len(before) == PAGE
        addresses = [0, 8, BASE, BASE + 4, BASE + 0x10_0000, FAR, (1 << 64) - PAGE, PAGE]
        for _ in range(25):
            driver.disable()
            driver._free = 256
            driver.enable(entries=64).ready()
            driver.create(1, entries=64)
            for queue in [rng.randrange(2) for _ in range(20)]:
                # Those that would change queues or wait for ever are tried elsewhere.
                opcode = (
                    rng.choice([*range(16), 0x7C, 0x80]) if queue else rng.choice([2, 6, 9, 10])
                )
                words = {f"w{n}": rng.choice([0, 1, 7, rng.getrandbits(32)]) for n in range(10, 16)}
                if queue:
                    words["w12"] &= 0x0200FFFF
                driver.do(
                    queue,
                    opcode,
                    nsid=rng.choice([0, 1, 1, 1, 2, 0xFFFFFFFF]),
                    flags=rng.choice([0, 0, 0, 0x40, rng.getrandbits(8)]),
                    prp1=rng.choice(addresses),
                    prp2=rng.choice(addresses),
                    **words,
                )
                if rng.random() < 0.3:
                    offset = rng.choice([8, 12, 16, 28, 32, 36, 40, 44, 48, 0x40, 0xF00])
                    size = rng.choice([1, 2, 4])
                    driver.write(offset, rng.getrandbits(8 * size), size)
                    driver.read(rng.randrange(0, 0x2000, 8), 8)
            assert driver.status & FATAL == 0
        driver.disable()
        driver._free = 256
        driver.enable().ready()
        driver.create(1)
        serves(driver)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"block_size": 1024}, ValueError),
        ({"queues": 0}, ValueError),
        ({"queues": 64}, ValueError),
        ({"serial": "s" * 21}, ValueError),
        ({"interrupts": "none"}, ValueError),
        ({"io_threads": -1}, ValueError),
    ],
)
def test_arguments(image: Path, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        NvmeController(image, **options)
