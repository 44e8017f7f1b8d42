"""What crosvm's unit tests assert of its queues and devices, asserted of those here.

Repository: https://chromium.googlesource.com/crosvm/crosvm, mirrored at
https://github.com/google/crosvm, ``devices/src/virtio``. Each test names those that it comes from;
`README.md` here has them all. What its descriptor chains have in common with rust-vmm's is in
`test_virtio_queue.py`.
"""

from __future__ import annotations

import os
import random
import struct
import tempfile
from pathlib import Path

import pytest

from guestio.errors import QueueError
from guestio.testing import BlkError, Driver, ScriptedGuest, serving
from guestio.virtio import ConsoleDevice, InputDevice
from guestio.virtio.blk import BlockDevice
from guestio.virtio.console import (
    CONTROL_TRANSMIT,
    DEVICE_READY,
    F_MULTIPORT,
    PORT_OPEN,
    PORT_READY,
)
from tests.kit.hand_guest import HandGuest, remote
from tests.kit.rings import WRITE, Desc
from tests.kit.serving import WAIT, until

WRAP = 1 << 16
SEG_MAX, RO, BLK_SIZE, FLUSH, TOPOLOGY, MQ, DISCARD, WRITE_ZEROES = (
    1 << bit for bit in (2, 5, 6, 9, 10, 12, 13, 14)
)
FOR_TYPES = (1 << 24) - 1
IO_ERROR = 1


class TestEventIndex:
    """``queue/split_queue.rs``."""

    @staticmethod
    def use(guest: HandGuest, count: int) -> int:
        """Use so many buffers; how often the driver was notified."""
        for i in range(guest.size):
            guest.put(i, Desc(0x8000, 0x400, WRITE))
        while count:
            some = min(count, guest.size)
            guest.offer(*range(some))
            guest.queue.complete_all([(guest.take(), 0x400) for _ in range(some)])
            guest.serve()
            count -= some
        return guest.notifications()

    def test_a_driver_that_keeps_up(self) -> None:
        """From ``queue/split_queue.rs::queue_event_id_guest_fast``."""
        guest = HandGuest(event_idx=True)
        assert self.use(guest, 0x100) == 1
        guest.set_used_event(0x100)
        guest.serve()
        assert guest.notifications() == 0
        assert self.use(guest, WRAP - 1 - 0x100) == 1
        guest.set_used_event(WRAP - 1)
        assert self.use(guest, 0) == 0
        assert self.use(guest, 1) == 1
        assert guest.used_idx == 0
        guest.set_used_event(0)
        assert self.use(guest, 0) == 0

    def test_a_driver_that_is_slow(self) -> None:
        """From ``queue/split_queue.rs::queue_event_id_guest_slow``.

        There an index that was passed since the last notification causes one with the next buffer.
        Here, as in Linux and QEMU, only what was used since the last look counts: a driver that
        writes its index looks at the ring once more.
        """
        guest = HandGuest(event_idx=True)
        assert self.use(guest, 0x100) == 1
        guest.set_used_event(0x80)
        assert self.use(guest, 0) == 0
        assert self.use(guest, 1) == 0
        assert self.use(guest, WRAP - 1 - 0x101) == 0
        guest.set_used_event(WRAP - 2)
        assert self.use(guest, 1) == 0, "the entry of that index was used before"
        guest.set_used_event(WRAP - 1)
        assert guest.used_idx == 0
        assert self.use(guest, 1) == 0
        guest.set_used_event(1)
        assert self.use(guest, 0) == 0
        assert self.use(guest, 1) == 1


def chain_of(*pieces: tuple[int, int]) -> HandGuest:
    """A guest that has made one chain of lengths and flags available, from 0x8000 on."""
    guest = HandGuest()
    at, row = 0x8000, []
    for length, flags in pieces:
        row.append(Desc(at, length, flags))
        at += length
    guest.offer(guest.put_chain(0, *row))
    return guest


class TestDescriptorUtils:
    """``descriptor_utils.rs``."""

    def test_a_file_that_takes_nothing(self) -> None:
        """From ``descriptor_utils.rs::reader_failing_io``.

        And ``descriptor_utils.rs::region_reader_failing_io``.
        """
        guest = chain_of((256, 0), (256, 0))
        chain = guest.take()
        with tempfile.NamedTemporaryFile() as made, Path(made.name).open("rb") as reading:
            for offset in (None, 0):
                with pytest.raises(OSError, match="Bad file descriptor"):
                    chain.readable.to_file(reading.fileno(), offset, 0, 512)
            assert os.fstat(reading.fileno()).st_size == 0
        assert chain.readable.total == 512
        guest.run(chain)

    def test_a_file_that_is_too_short(self) -> None:
        """From ``descriptor_utils.rs::writer_failing_io``.

        And ``descriptor_utils.rs::region_writer_failing_io``: an error there, the count here.
        """
        guest = chain_of((256, WRITE), (256, WRITE))
        chain = guest.take()
        with tempfile.TemporaryFile() as file:
            file.write(b"\1" * 384)
            file.flush()
            assert chain.writable.from_file(file.fileno(), 0, 0, 512) == 384
        assert guest.memory.read(0x8000, 512) == b"\1" * 384 + bytes(128)
        guest.run(chain, 384)
        assert guest.used_entry(0) == (0, 384)

    def test_numbers_that_are_written_are_read(self) -> None:
        """From ``descriptor_utils.rs::consume_collect``."""
        numbers = [0x0101010101010101 * i for i in range(1, 4)]
        guest = chain_of((24, WRITE))
        chain = guest.take()
        for i, number in enumerate(numbers):
            chain.writable.write(struct.pack("<Q", number), 8 * i)
        guest.run(chain, 24)
        guest.offer(guest.put_chain(0, Desc(0x8000, 24)))
        chain = guest.take()
        assert list(struct.unpack("<3Q", chain.readable.read())) == numbers
        guest.run(chain)

    @pytest.mark.parametrize("count", [32, 24, 8, 128])
    def test_so_many_bytes_from_a_place(self, count: int) -> None:
        """From ``descriptor_utils.rs::get_remaining_region_with_count``.

        And ``descriptor_utils.rs::get_remaining_with_count``.
        """
        guest = chain_of((16, 0), (16, 0), (96, 0), (64, WRITE), (1, WRITE), (3, WRITE))
        guest.memory.write(0x8000, bytes(range(128)))
        chain = guest.take()
        assert sum(size for _, size in chain.readable.fragments()) == 128
        start = 0 if count == 128 else 64
        assert chain.readable.read(start, count) == bytes(range(start, start + count))
        guest.run(chain)

    def test_looking_before_reading(self) -> None:
        """From ``descriptor_utils.rs::reader_peek_obj``: reading consumes nothing here."""
        guest = HandGuest()
        guest.memory.write(0x8100, struct.pack("<H", 0xBEEF))
        guest.memory.write(0x8200, struct.pack("<H", 0xDEAD))
        guest.offer(guest.put_chain(0, Desc(0x8100, 2), Desc(0x8200, 2)))
        chain = guest.take()
        for _ in range(2):
            assert chain.readable.read(0, 2) == struct.pack("<H", 0xBEEF)
            assert chain.readable.read(0, 4) == struct.pack("<I", 0xDEADBEEF)
            assert chain.readable.read(2, 2) == struct.pack("<H", 0xDEAD)
            for start, count in ((2, 4), (4, 2)):
                with pytest.raises(Exception, match="cannot access"):
                    chain.readable.read(start, count)
        guest.run(chain)

    @pytest.mark.parametrize("seed", range(200))
    def test_rings_of_random_bytes(self, seed: int) -> None:
        """From ``fuzz_targets/virtqueue_fuzzer.rs::fuzz_target``."""
        rng = random.Random(seed)
        size = 1 << rng.randrange(9)
        room = 1 << 20
        guest = HandGuest(
            room=room,
            size=size,
            desc=rng.randrange(0, room - 256 * 16, 16),
            avail=rng.randrange(0, room - 6 - 2 * 256, 2),
            used=rng.randrange(0, room - 6 - 8 * 256, 4),
        )
        guest.memory.write(guest.desc, rng.randbytes(16 * size))
        for i in range(size):
            # Half of the descriptors are of memory, so that some chains are whole.
            if rng.random() < 0.5:
                flags = rng.choice((0, 1, 2, 3))
                guest.put(i, Desc(rng.randrange(room), rng.randrange(1, 5000), flags, i ^ 1))
        guest.memory.write(guest.avail, rng.randbytes(6 + 2 * size))
        guest.memory.write(guest.used, rng.randbytes(6 + 8 * size))
        guest.set_avail_idx(rng.randrange(1, size + 1))
        for i in range(size):
            head = rng.randrange(size).to_bytes(2, "little")
            guest.memory.write(guest.avail + 4 + 2 * i, head)
        taken = 0
        while taken < 2 * size and (chain := guest.queue.take()) is not None:
            taken += 1
            data = chain.readable.read()
            assert len(data) == chain.readable.total
            chain.writable.write(bytes(chain.writable.total))
            guest.queue.complete(chain, chain.writable.total)
        try:
            guest.serve()
        except QueueError:
            assert guest.queue.broken is not None
        guest.transport.close()


def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(0x1000))
    return path


class TestBlock:
    """``block/asynchronous.rs``."""

    def test_the_configuration_space(self, tmp_path: Path) -> None:
        """From ``block/asynchronous.rs::read_size``.

        And ``block/asynchronous.rs::read_block_size``: always 512 here.
        """
        device = BlockDevice(image(tmp_path))
        with remote(device) as (frontend, _):
            assert frontend.get_config(0, 4) == struct.pack("<I", 8)
            assert frontend.get_config(4, 4) == bytes(4)
            assert frontend.get_config(20, 4) == struct.pack("<I", 512)
        device.close()

    @pytest.mark.parametrize(
        ("options", "extra"),
        [
            ({}, FLUSH | DISCARD | WRITE_ZEROES),
            ({"read_only": True}, FLUSH | RO),
            ({"num_queues": 4}, FLUSH | DISCARD | WRITE_ZEROES | MQ),
        ],
    )
    def test_features(self, tmp_path: Path, options: dict[str, int], extra: int) -> None:
        """From ``block/asynchronous.rs::read_features``.

        And ``block/asynchronous.rs::check_runtime_blk_queue_configurability``. A flush is offered
        by disks that are only read, too, and TOPOLOGY.
        """
        device = BlockDevice(image(tmp_path), **options)  # type: ignore[arg-type]
        with remote(device) as (frontend, _):
            assert frontend.offered & FOR_TYPES == SEG_MAX | BLK_SIZE | TOPOLOGY | extra
            assert frontend.queue_count() == options.get("num_queues", 1)
        device.close()

    def test_the_last_sector_and_beyond_it(self, tmp_path: Path) -> None:
        """From ``block/asynchronous.rs::read_last_sector``.

        And ``block/asynchronous.rs::read_beyond_last_sector``.
        """
        device = BlockDevice(image(tmp_path))
        with serving(device) as path, ScriptedGuest(path) as guest:
            assert guest.read(7, 512) == bytes(512)
            with pytest.raises(BlkError) as caught:
                guest.read(7, 1024)
            assert caught.value.status == IO_ERROR
        device.close()

    def test_the_serial(self, tmp_path: Path) -> None:
        """From ``block/asynchronous.rs::get_id``."""
        device = BlockDevice(image(tmp_path), serial="a20-byteserialnumber")
        with serving(device) as path, ScriptedGuest(path) as guest:
            assert guest.get_id() == b"a20-byteserialnumber"
        device.close()

    @pytest.mark.parametrize("queue_threads", [False, True])
    def test_it_is_reset_and_used_again(self, tmp_path: Path, queue_threads: bool) -> None:
        """From ``block/asynchronous.rs::reset_and_reactivate_single_worker``.

        And ``block/asynchronous.rs::reset_and_reactivate_multiple_workers``,
        ``block/asynchronous.rs::run_worker_threads``.
        """
        device = BlockDevice(image(tmp_path), num_queues=2, serial="Block serial number")
        with serving(device, queue_threads=queue_threads) as path:
            for _ in range(3):
                with ScriptedGuest(path, queues=2) as guest:
                    for queue in range(2):
                        guest.write(queue, bytes([queue + 1]) * 512, queue=queue)
                    assert guest.read(0, 1024, queue=1) == b"\1" * 512 + b"\2" * 512
                    guest.pause()
                    guest.resume()
                    assert guest.get_id() == b"Block serial number"
        device.close()

    @pytest.mark.parametrize("queue_threads", [False, True])
    def test_its_size_changes(self, tmp_path: Path, queue_threads: bool) -> None:
        """From ``block/asynchronous.rs::resize_with_single_worker``.

        And ``block/asynchronous.rs::resize_with_multiple_workers``.
        """
        path = image(tmp_path)
        device = BlockDevice(path, num_queues=2)
        with (
            serving(device, queue_threads=queue_threads) as socket,
            ScriptedGuest(socket, queues=2) as guest,
        ):
            assert guest.frontend.get_config(0, 8) == struct.pack("<Q", 8)
            seen = guest.frontend.config_changes
            os.truncate(path, 0x2000)
            assert device.update_size() == 0x2000
            assert guest.frontend.wait_config_change(WAIT, seen=seen)
            assert guest.frontend.get_config(0, 8) == struct.pack("<Q", 16)
            for queue in range(2):
                guest.write(15, bytes([queue + 1]) * 512, queue=queue)
                assert guest.read(15, 512, queue=queue) == bytes([queue + 1]) * 512
        device.close()


class TestConsole:
    """``console/worker.rs`` and ``console.rs``."""

    def test_which_queues_a_port_has(self) -> None:
        """From ``console/worker.rs::test_receiveq_idx``.

        And ``console/worker.rs::test_transmitq_idx``, ``console/worker.rs::test_receiveq_port_id``,
        ``console/worker.rs::test_transmitq_port_id``.
        """
        device = ConsoleDevice(["one", "two", "three"])
        output: list[tuple[int, bytes]] = []
        for port in device.ports:
            port.on_output(lambda data, number=port.number: output.append((number, data)))
        queues = {0: (0, 1), 1: (4, 5), 2: (6, 7), 3: (8, 9)}
        with (
            serving(device) as path,
            Driver(path, features=F_MULTIPORT, queues=10) as driver,
        ):
            control = struct.Struct("<IHH")
            driver.request(control.pack(0, DEVICE_READY, 1), 0, queue=CONTROL_TRANSMIT)
            for number, (receive, transmit) in queues.items():
                for event in (PORT_READY, PORT_OPEN):
                    driver.request(control.pack(number, event, 1), 0, queue=CONTROL_TRANSMIT)
                text = b"port %d" % number
                device.ports[number].send(text)
                assert driver.wait(driver.post(64, queue=receive)).data == text
                driver.wait(driver.send(text, queue=transmit))
                until(lambda expected=(number, text): output[-1:] == [expected])
        device.close()

    def test_input_that_comes_before_a_driver(self) -> None:
        """From ``console.rs::test_inactive_sleep_resume``."""
        device = ConsoleDevice()
        with serving(device) as path:
            device.ports[0].send(b"Hello")
            with Driver(path) as driver:
                assert driver.wait(driver.post(64)).data == b"Hello"
                driver.pause()
                device.ports[0].send(b"again")
                driver.resume()
                assert driver.wait(driver.post(64)).data == b"again"
        device.close()


class TestInput:
    """``input/event_source.rs`` and ``input/defaults.rs``."""

    def test_events_come_in_order(self) -> None:
        """From ``input/event_source.rs::total_pop``.

        And ``input/event_source.rs::partial_pop``, ``input/event_source.rs::empty_new``,
        ``input/event_source.rs::empty_receive``.
        """
        device = InputDevice.pointer()
        event = struct.Struct("<HHi")
        with serving(device) as path, Driver(path, queues=2) as driver:
            first = driver.post(8)
            driver.frontend.sync()
            assert driver.poll() == []
            device.send(("REL_X", 3), ("REL_Y", -6), ("REL_WHEEL", 9), ("REL_HWHEEL", -12))
            got = [event.unpack(driver.wait(first).data)]
            got += [event.unpack(driver.wait(driver.post(8)).data) for _ in range(4)]
            assert got == [(2, 0, 3), (2, 1, -6), (2, 8, 9), (2, 6, -12), (0, 0, 0)]
            driver.post(8)
            driver.frontend.sync()
            assert driver.poll() == []

    def test_switches(self) -> None:
        """From ``input/defaults.rs::test_new_switches_config``."""
        device = InputDevice("switches", ["SW_LID", "SW_TABLET_MODE"])
        with remote(device) as (frontend, _):
            frontend.set_config(0, bytes([0x11, 5]))
            space = frontend.get_config(0, 136)
            assert space[2] == 1
            assert space[8] == 0b11
