"""Enabling, resets, shutdown, clients that come and go: what is begun ends, and nothing is lost."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestio.virtio.image import Image
from tests.kit.nvme_driver import (
    ACQ,
    AQA,
    ASQ,
    CC,
    CSTS,
    DNR,
    DOORBELLS,
    ENABLE,
    FATAL,
    FLUSH,
    PAGE,
    READ,
    READY,
    WRITE,
    ZEROES,
    NvmeDriver,
    move,
)
from tests.kit.serving import WAIT


class Gate:
    """Holds calls of `Image.zero` back until it is opened."""

    def __init__(self) -> None:
        self.entered, self.go = threading.Event(), threading.Event()

    def zero(self, image: Image, offset: int, length: int) -> None:
        self.entered.set()
        assert self.go.wait(WAIT)
        os.pwrite(image.fd, bytes(length), offset)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate()
    monkeypatch.setattr(Image, "zero", lambda *args: made.zero(*args))
    yield made
    made.go.set()


def again(driver: NvmeDriver) -> None:
    """Another life works."""
    driver.enable().ready()
    driver.create(1)
    driver.good(1, READ, **move(1, 0, 1, prp1=driver.take()))


class TestEnabling:
    @pytest.mark.parametrize(
        ("cc", "aqa"),
        [
            (ENABLE | 1 << 7, 0x001F001F),  # pages of 8 KiB
            (ENABLE | 1 << 4, 0x001F001F),  # another command set
            (ENABLE | 1 << 11, 0x001F001F),  # another arbitration
            (ENABLE, 0x001F0000),
            (ENABLE, 0x0000001F),
        ],
    )
    def test_what_cannot_be(self, driver: NvmeDriver, cc: int, aqa: int) -> None:
        driver.disable()
        driver.write(AQA, aqa)
        driver.write(CC, cc)
        driver.settle()
        assert driver.status & (READY | FATAL) == FATAL
        driver.write(CC, 0)
        assert driver.status == 0
        again(driver)

    def test_registers_do_not_change_meanwhile(self, driver: NvmeDriver) -> None:
        before = [driver.read(AQA), driver.read(ASQ, 8), driver.read(ACQ, 8)]
        for register in (AQA, ASQ, ASQ + 4, ACQ, ACQ + 4):
            driver.write(register, 0x12345000)
        driver.write(CSTS, 0xFFFFFFFF)
        driver.write(0, 0xFFFFFFFF)
        assert [driver.read(AQA), driver.read(ASQ, 8), driver.read(ACQ, 8)] == before
        # Nor do page size, command set and arbitration; queues go on.
        driver.write(CC, ENABLE | 0x3FF << 4)
        driver.good(1, READ, **move(1, 0, 1, prp1=driver.take()))

    def test_queues_need_entry_sizes(self, driver: NvmeDriver) -> None:
        driver.disable()
        driver.enable(cc=1).ready()
        assert driver.do(0, 5, prp1=driver.take(), w10=15 << 16 | 1, w11=3).status == 0x102 | DNR
        driver.write(CC, ENABLE)
        driver.create(1)


class TestReset:
    def test_nothing_is_completed_afterwards(self, driver: NvmeDriver, gate: Gate) -> None:
        queue = driver.queues[1]
        driver.submit(1, driver.command(ZEROES, **move(1, 0, 8)))
        driver.run(gate.entered.is_set, "zeroing")
        driver.write(CC, 0)
        assert driver.status == 0
        entries = driver.get(queue.cq, PAGE)
        gate.go.set()
        driver.settle()
        driver.run(lambda: not driver.device._io.busy, "its end")
        assert driver.get(queue.cq, PAGE) == entries
        again(driver)

    def test_the_next_life_waits_for_what_still_writes(
        self, driver: NvmeDriver, gate: Gate, image: Path
    ) -> None:
        driver.submit(1, driver.command(ZEROES, **move(1, 0, 8)))
        driver.run(gate.entered.is_set, "zeroing")
        driver.write(CC, 0)
        driver.enable()
        driver.settle()
        assert not driver.status & READY
        gate.go.set()
        driver.ready()
        driver.create(1)
        page = driver.take()
        driver.put(page, b"n" * PAGE)
        driver.good(1, WRITE, **move(1, 0, 8, prp1=page))
        assert image.read_bytes()[:PAGE] == b"n" * PAGE

    def test_what_waits_is_not_begun(self, driver: NvmeDriver, gate: Gate, image: Path) -> None:
        before = image.read_bytes()
        for place in range(12):
            driver.submit(1, driver.command(ZEROES, **move(1, 1000 + 8 * place, 8)))
        driver.run(gate.entered.is_set, "zeroing")
        driver.write(CC, 0)
        gate.go.set()
        driver.run(lambda: not driver.device._io.busy, "their end")
        changed = [n for n in range(12) if image.read_bytes()[512 * (1000 + 8 * n)] == 0]
        assert len(changed) <= 5  # those that threads had begun
        assert image.read_bytes()[: 512 * 1000] == before[: 512 * 1000]

    def test_function_level_reset_under_load(self, driver: NvmeDriver) -> None:
        page = driver.take()
        for round_ in range(20):
            for n in range(8):
                driver.submit(1, driver.command(WRITE, **move(1, n, 8, prp1=page)))
            if round_ % 2:
                driver.loop.run_once(0)
            # Device control, bit 15, of the PCI Express capability.
            at = driver.host.read_config(0x34, 1)[0]
            while driver.host.read_config(at, 1)[0] != 0x10:
                at = driver.host.read_config(at + 1, 1)[0]
            driver.host.write_config(at + 8, b"\x00\x80")
            assert driver.status == driver.read(CC) == driver.read(ASQ, 8) == 0
            assert not driver.host.memory.enabled
            driver.settle()
            driver.host.write_config(4, b"\x06\0")
            driver._free = 8
            again(driver)

    def test_controller_resets_under_load(self, driver: NvmeDriver, image: Path) -> None:
        driver.device._queues.fast = False
        page = driver.take()
        for _ in range(20):
            for n in range(8):
                driver.submit(1, driver.command(WRITE, **move(1, n, 8, prp1=page)))
            driver.loop.run_once(0)
            driver.disable()
            driver._free = 8
            again(driver)
        assert driver.log(2, 512)[144] >= 20  # unsafe shutdowns

    def test_the_next_client(self, driver: NvmeDriver, image: Path) -> None:
        data = image.read_bytes()
        for round_ in range(3):
            driver.submit(1, driver.command(READ, **move(1, 0, 8, prp1=driver.take())))
            driver.disconnect()
            driver.settle()
            driver.connect()
            driver.enable().ready()
            driver.create(1)
            page = driver.take()
            driver.good(1, READ, **move(1, 8 * round_, 8, prp1=page))
            assert driver.get(page, PAGE) == data[PAGE * round_ : PAGE * (round_ + 1)]

    def test_nothing_of_a_client_is_kept(self, driver: NvmeDriver) -> None:
        driver.good(1, READ, **move(1, 0, 8, prp1=driver.take()))
        assert "/memfd:driver" in Path("/proc/self/maps").read_text()
        driver.disconnect()
        assert "/memfd:driver" not in Path("/proc/self/maps").read_text()
        driver.connect()


class TestShutdown:
    @pytest.mark.parametrize("how", [1, 2])
    def test_everything_is_on_the_disk(
        self, driver: NvmeDriver, monkeypatch: pytest.MonkeyPatch, how: int
    ) -> None:
        synced: list[int] = []
        monkeypatch.setattr("guestio.virtio.image.os.fdatasync", synced.append)
        driver.write(CC, ENABLE | how << 14)
        assert driver.status >> 2 & 3 in (1, 2)
        driver.run(lambda: driver.status >> 2 & 3 == 2, "shutdown")
        assert len(synced) == 1
        driver.write(CC, 0)
        assert driver.status == 0
        again(driver)
        assert driver.log(2, 512)[144] == 0

    def test_a_disk_that_fails_does_not_keep_it(
        self, driver: NvmeDriver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(fd: int) -> None:
            raise OSError(5, "no")

        monkeypatch.setattr("guestio.virtio.image.os.fdatasync", fail)
        driver.write(CC, ENABLE | 1 << 14)
        driver.run(lambda: driver.status >> 2 & 3 == 2, "shutdown")


class TestThreads:
    def test_a_queue_is_deleted_amid_work(self, driver: NvmeDriver, gate: Gate) -> None:
        commands = [driver.command(ZEROES, **move(1, 8 * n, 8)) for n in range(10)]
        driver.submit(1, *commands)
        driver.run(gate.entered.is_set, "zeroing")
        delete = driver.command(0, w10=1)
        driver.submit(0, delete)
        driver.settle()
        assert driver.next(0) is None
        gate.go.set()
        assert driver.wait(0).status == 0
        found = {}
        while (one := driver.next(1, consume=False)) is not None:
            found[one.cid] = one.status
        assert set(found) == {int.from_bytes(each[2:4], "little") for each in commands}
        assert set(found.values()) <= {0, 0x08}
        assert 0x08 in found.values()
        driver.write(DOORBELLS + 8, 3)  # is no one's any more
        driver.settle()
        assert driver.do(0, 0, w10=1).status == 0x101 | DNR

    def test_a_command_in_a_thread_is_aborted(self, driver: NvmeDriver, gate: Gate) -> None:
        first = driver.command(ZEROES, cid=900, **move(1, 0, 8))
        driver.submit(1, first)
        driver.run(gate.entered.is_set, "zeroing")
        assert driver.good(0, 8, w10=900 << 16 | 1).result == 1
        gate.go.set()
        assert driver.wait(1).status in (0, 0x07)

    def test_reads_of_what_is_not_cached_do_not_hold_others_up(
        self, driver: NvmeDriver, monkeypatch: pytest.MonkeyPatch, image: Path
    ) -> None:
        entered, go = threading.Event(), threading.Event()
        real = os.pread

        def slow(fd: int, size: int, at: int) -> bytes:
            if threading.current_thread().name.startswith("guestio-nvme"):
                entered.set()
                assert go.wait(WAIT)
            return real(fd, size, at)

        monkeypatch.setattr("guestio.pci.nvme.io.os.pread", slow)
        page, other = driver.take(), driver.take()
        driver.device._queues.fast = False
        driver.submit(1, driver.command(READ, cid=1000, **move(1, 0, 8, prp1=page)))
        driver.run(entered.is_set, "a read")
        driver.device._queues.fast = True
        driver.submit(1, driver.command(READ, cid=1001, **move(1, 8, 8, prp1=other)))
        assert driver.wait(1).cid == 1001
        go.set()
        assert driver.wait(1).cid == 1000
        assert driver.get(page, PAGE) == image.read_bytes()[:PAGE]

    def test_copies_are_limited(
        self, driver: NvmeDriver, monkeypatch: pytest.MonkeyPatch, gate: Gate
    ) -> None:
        monkeypatch.setattr("guestio.pci.nvme.io.NVME_BUFFER_BYTES", 3 * PAGE)
        driver.device._queues.fast = False
        page = driver.take()
        commands = [driver.command(READ, **move(1, 8 * n, 8, prp1=page)) for n in range(30)]
        driver.submit(1, *commands)
        most = 0
        done = 0
        while done < len(commands):
            most = max(most, driver.device._io._buffered)
            driver.loop.run_once(0.01)
            done += driver.next(1) is not None
        assert 0 < most <= 3 * PAGE

    def test_closing_ends_what_is_under_way(
        self, make: Callable[..., NvmeDriver], gate: Gate, tmp_path: Path
    ) -> None:
        driver = make()
        driver.create(1)
        driver.submit(1, driver.command(ZEROES, **move(1, 0, 8)), driver.command(FLUSH, nsid=1))
        driver.run(gate.entered.is_set, "zeroing")
        gate.go.set()
        driver.device.close()
        assert all(each.image.closed.is_set() for each in driver.device.namespaces)
        driver.settle()
        assert driver.status & READY
        driver.submit(1, driver.command(READ, cid=1000, **move(1, 0, 8, prp1=driver.take())))
        # What was under way may have been done before, and is completed then.
        while (done := driver.wait(1)).cid != 1000:
            pass
        assert done.status
