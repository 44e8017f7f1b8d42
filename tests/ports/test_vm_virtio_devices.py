"""What the tests of rust-vmm's virtio-blk and virtio-console assert, asserted of the devices here.

Repository: https://github.com/rust-vmm/vm-virtio. Each test names those that it comes from;
`README.md` here has them all.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestio.budgets import CONSOLE_INPUT
from guestio.testing import Driver, serving
from guestio.virtio import ConsoleDevice
from guestio.virtio.blk import BlockDevice
from tests.kit.hand_guest import HandGuest
from tests.kit.rings import WRITE, Desc
from tests.kit.serving import until

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IO_ERROR, UNSUPPORTED = 0, 1, 2
ROOM = 0x1000_0000
FILLED, OTHER = b"\x55", b"\x56"


class Disk:
    """A disk of 4 KiB behind a ring that is written by hand.

    A request's header is at 0x4000 and its status at 0x5000.
    """

    def __init__(self, path: Path, size: int = 0x1000, **options: object) -> None:
        self.path = path
        with path.open("wb") as made:
            made.truncate(size)
        self.device = BlockDevice(path, **options)  # type: ignore[arg-type]  # the test's
        self.guest = HandGuest(self.device, room=ROOM)
        self.memory = self.guest.memory

    def close(self) -> None:
        self.guest.transport.close()
        self.device.close()

    def raw(self, kind: int, sector: int, *row: Desc) -> tuple[int, int]:
        """Run a request of these descriptors; the byte at 0x5000 and the used length."""
        self.memory.write(0x4000, struct.pack("<IIQ", kind, 0, sector))
        self.memory.write(0x5000, b"\xff")
        position = self.guest.offered
        self.guest.offer(self.guest.put_chain(0, *row))
        self.guest.finish()
        assert self.guest.used_entry(position)[0] == 0
        return self.memory.read(0x5000, 1)[0], self.guest.used_entry(position)[1]

    def run(self, kind: int, sector: int, *data: tuple[int, int]) -> tuple[int, int]:
        """Run a request whose data are at these addresses and of these lengths."""
        flags = WRITE if kind in (IN, GET_ID) else 0
        pieces = [Desc(addr, length, flags) for addr, length in data]
        return self.raw(kind, sector, Desc(0x4000, 16), *pieces, Desc(0x5000, 1, WRITE))

    def trim(self, kind: int, *ranges: tuple[int, int, int]) -> tuple[int, int]:
        """Discard or zero ranges of sector, number of sectors and flags."""
        for i, each in enumerate(ranges):
            self.memory.write(0x6000 + 0x100 * i, struct.pack("<QII", *each))
        return self.run(kind, 0, *((0x6000 + 0x100 * i, 16) for i in range(len(ranges))))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk", serial="\1\2\3\4\5\6\7\10abcdefghijkl")
    yield made
    made.close()


class TestParse:
    """``virtio-blk/src/request.rs``, ``test_parse_request``."""

    def test_a_header_that_is_to_be_written(self, disk: Disk) -> None:
        """From ``request.rs::test_parse_request``."""
        row = [Desc(at, 0x100, WRITE) for at in (0x4000, 0x8000, 0x5000)]
        _, used = disk.raw(IN, 2, *row)
        assert disk.memory.read(0x50FF, 1) == bytes([IO_ERROR]), "the last byte is the status"
        assert used == 0

    def test_a_status_that_is_to_be_read(self, disk: Disk) -> None:
        """From ``request.rs::test_parse_request``: the ring's own rule here."""
        row = [Desc(0x4000, 0x100), Desc(0x8000, 0x100, WRITE), Desc(0x5000, 0x100)]
        disk.guest.offer(disk.guest.put_chain(0, *row))
        with pytest.raises(Exception, match="device-readable descriptor after a device-writable"):
            disk.guest.serve()

    def test_a_status_without_a_byte(self, disk: Disk) -> None:
        """From ``request.rs::test_parse_request``: a descriptor of 0 bytes breaks the ring."""
        row = [Desc(0x4000, 16), Desc(0x8000, 0x200, WRITE), Desc(0x5000, 0, WRITE)]
        disk.guest.offer(disk.guest.put_chain(0, *row))
        with pytest.raises(Exception, match="a descriptor of 0 bytes"):
            disk.guest.serve()

    def test_a_flush_of_a_sector(self, disk: Disk) -> None:
        """From ``request.rs::test_parse_request``: an error there; the sector means nothing here.

        It is the driver that must set it to 0 (section 5.2.6.1).
        """
        assert disk.run(FLUSH, 1) == (OK, 1)

    def test_a_read_without_room(self, disk: Disk) -> None:
        """From ``request.rs::test_parse_request``: what is to be read is not written."""
        disk.memory.write(0x8000, FILLED * 0x200)
        row = [Desc(0x4000, 16), Desc(0x8000, 0x200), Desc(0x5000, 1, WRITE)]
        assert disk.raw(IN, 2, *row) == (OK, 1), "a read of no bytes"
        assert disk.memory.read(0x8000, 0x200) == FILLED * 0x200

    def test_a_status_where_no_memory_is(self, disk: Disk) -> None:
        """From ``request.rs::test_parse_request``.

        And ``stdio_executor.rs::test_process_request``.
        """
        row = [Desc(0x4000, 16), Desc(0x8000, 0x200), Desc(ROOM + 0x100, 0x100, WRITE)]
        disk.memory.write(0x8000, FILLED * 0x200)
        with pytest.raises(Exception, match="status"):
            disk.raw(OUT, 2, *row)
        assert disk.path.read_bytes() == bytes(0x1000), "nothing was written"

    def test_a_write_of_what_is_to_be_written_writes_nothing(self, disk: Disk) -> None:
        """From ``request.rs::test_parse_request``: there it is parsed as valid."""
        disk.memory.write(0x8000, FILLED * 0x400)
        row = [Desc(0x8000, 0x200, WRITE), Desc(0x8200, 0x200, WRITE), Desc(0x5000, 1, WRITE)]
        assert disk.raw(OUT, 2, Desc(0x4000, 16), *row)[0] == OK
        assert disk.path.read_bytes() == bytes(0x1000)
        assert disk.memory.read(0x8000, 0x400) == FILLED * 0x400

    @pytest.mark.parametrize("kind", [2, 8 + 1, 0x8000_0000])
    def test_types_that_are_none(self, disk: Disk, kind: int) -> None:
        """From ``request.rs::test_parse_request``.

        And ``stdio_executor.rs::test_execute_request``.
        """
        assert disk.run(kind, 2, (0x8000, 0x200)) == (UNSUPPORTED, 1)

    def test_a_flush(self, disk: Disk) -> None:
        """From ``request.rs::test_parse_request``.

        And ``stdio_executor.rs::test_process_request``. Without VIRTIO_BLK_F_FLUSH it is an
        error there; here the data are written all the same.
        """
        assert disk.run(FLUSH, 0) == (OK, 1)


class TestExecute:
    """``virtio-blk/src/stdio_executor.rs``."""

    def test_a_flush_of_a_disk_that_is_only_read(self, tmp_path: Path) -> None:
        """From ``stdio_executor.rs::test_execute_request``: an error there, nothing to do here."""
        disk = Disk(tmp_path / "disk")
        disk.close()
        disk = Disk(tmp_path / "disk", read_only=True)
        assert disk.run(FLUSH, 0) == (OK, 1)
        assert disk.run(OUT, 0, (0x8000, 0x200)) == (IO_ERROR, 1)
        disk.close()

    def test_a_read_in_two_pieces(self, disk: Disk) -> None:
        """From ``stdio_executor.rs::test_execute_request``.

        And ``stdio_executor.rs::test_process_request``.
        """
        contents = bytearray(0x1000)
        contents[0x100:0x300] = FILLED * 0x200
        contents[0x400:0x480] = OTHER * 0x80
        disk.path.write_bytes(contents)
        assert disk.run(IN, 0, (0x10000, 0x400), (0x10600, 0x200)) == (OK, 0x601)
        assert disk.memory.read(0x10000, 0x400) == contents[:0x400]
        assert disk.memory.read(0x10400, 0x200) == bytes(0x200)
        assert disk.memory.read(0x10600, 0x200) == contents[0x400:0x600]

    def test_a_write_in_two_pieces(self, disk: Disk) -> None:
        """From ``stdio_executor.rs::test_execute_request``."""
        disk.memory.write(0x10100, FILLED * 0x200)
        disk.memory.write(0x10880, FILLED * 0x100)
        assert disk.run(OUT, 1, (0x10000, 0x400), (0x10800, 0x200)) == (OK, 1)
        expected = bytearray(0x1000)
        expected[0x300:0x500] = FILLED * 0x200
        expected[0x680:0x780] = FILLED * 0x100
        assert disk.path.read_bytes() == expected

    def test_the_last_sector_and_beyond(self, disk: Disk) -> None:
        """From ``stdio_executor.rs::test_execute_request``."""
        assert disk.run(OUT, 7, (0x8000, 0x200)) == (OK, 1)
        disk.memory.write(0x8000, FILLED * 0x400)
        assert disk.run(OUT, 7, (0x8000, 0x400)) == (IO_ERROR, 1)
        assert disk.path.read_bytes() == bytes(0x1000)

    @pytest.mark.parametrize("kind", [IN, OUT])
    def test_lengths_that_are_no_sectors(self, disk: Disk, kind: int) -> None:
        """From ``stdio_executor.rs::test_execute_request``."""
        used = 0 if kind == IN else 1
        assert disk.run(kind, 2, (0x8000, 0x400), (0x8500, 0x100)) == (IO_ERROR, used)
        assert disk.run(kind, 2, (0x8000, 0x201)) == (IO_ERROR, used)

    def test_pieces_need_not_be_sectors(self, disk: Disk) -> None:
        """From ``stdio_executor.rs::test_execute_request``."""
        assert disk.run(IN, 2, (0x8000, 0x500), (0x9000, 0x300)) == (OK, 0x801)

    @pytest.mark.parametrize("kind", [IN, OUT, GET_ID])
    def test_data_that_leave_memory(self, disk: Disk, kind: int) -> None:
        """From ``stdio_executor.rs::test_execute_request``.

        And ``stdio_executor.rs::test_process_request``. There as much as there is memory for is
        moved, and counted; here nothing is.
        """
        disk.memory.write(ROOM - 16, FILLED * 16)
        length = 20 if kind == GET_ID else 0x200
        status, used = disk.run(kind, 7, (ROOM - 16, length))
        assert status == IO_ERROR
        assert used == 0, "a status beyond a hole is not counted"
        assert disk.memory.read(ROOM - 16, 16) == FILLED * 16
        assert disk.path.read_bytes() == bytes(0x1000)

    def test_more_than_4_gib(self, disk: Disk) -> None:
        """From ``stdio_executor.rs::test_execute_request``."""
        guest = disk.guest
        row = [Desc(0x8000, 2**32 - 0x200, WRITE), Desc(0x9000, 0x400, WRITE)]
        guest.offer(guest.put_chain(0, Desc(0x4000, 16), *row))
        with pytest.raises(Exception, match=r"longer than 2\*\*32 bytes"):
            guest.serve()

    def test_zeroing_and_discarding(self, disk: Disk) -> None:
        """From ``stdio_executor.rs::test_discard_wr_zeroes_request``."""
        contents = bytearray(FILLED * 0x800 + OTHER * 0x800)
        disk.path.write_bytes(contents)
        assert disk.trim(WRITE_ZEROES, (2, 2, 0), (5, 1, 0)) == (OK, 1)
        contents[0x400:0x800] = bytes(0x400)
        contents[0xA00:0xC00] = bytes(0x200)
        assert disk.path.read_bytes() == contents
        assert disk.trim(DISCARD, (7, 1, 0)) == (OK, 1)
        contents[0xE00:] = bytes(0x200)
        assert disk.path.read_bytes() == contents, "and it is as long as before"
        assert disk.trim(WRITE_ZEROES, (4, 1, 1)) == (OK, 1)
        contents[0x800:0xA00] = bytes(0x200)
        assert disk.path.read_bytes() == contents

    def test_a_range_in_two_pieces(self, disk: Disk) -> None:
        """From ``stdio_executor.rs::test_discard_wr_zeroes_request``.

        An error there; here descriptors do not matter (section 2.7.4.1).
        """
        disk.path.write_bytes(FILLED * 0x1000)
        disk.memory.write(0x6000, struct.pack("<Q", 7))
        disk.memory.write(0x7000, struct.pack("<II", 1, 0))
        assert disk.run(DISCARD, 0, (0x6000, 8), (0x7000, 8)) == (OK, 1)
        assert disk.path.read_bytes() == FILLED * 0xE00 + bytes(0x200)

    def test_ranges_that_are_none(self, disk: Disk) -> None:
        """From ``stdio_executor.rs::test_discard_wr_zeroes_request``."""
        disk.path.write_bytes(FILLED * 0x1000)
        assert disk.run(DISCARD, 7, (0x6000, 15)) == (IO_ERROR, 1)
        assert disk.trim(DISCARD, (7, 2, 0)) == (IO_ERROR, 1), "beyond the end"
        assert disk.trim(DISCARD, (3, 2, 1)) == (UNSUPPORTED, 1), "unmap"
        assert disk.trim(WRITE_ZEROES, (3, 2, 0xA000)) == (UNSUPPORTED, 1), "reserved flags"
        assert disk.run(WRITE_ZEROES, 7, (ROOM + 0x100, 16)) == (IO_ERROR, 0), "no memory"
        assert disk.path.read_bytes() == FILLED * 0x1000

    def test_ranges_past_the_end_of_the_address_space(self, disk: Disk) -> None:
        """From ``stdio_executor.rs::test_discard_wr_zeroes_request``: the ring breaks here."""
        row = [Desc(0x4000, 16), Desc(2**64 - 17, 32), Desc(0x5000, 1, WRITE)]
        disk.guest.offer(disk.guest.put_chain(0, *row))
        with pytest.raises(Exception, match=r"passes 2\*\*64"):
            disk.guest.serve()

    def test_the_serial(self, disk: Disk) -> None:
        """From ``stdio_executor.rs::test_get_device_id``: there is always one here."""
        serial = b"\1\2\3\4\5\6\7\10abcdefghijkl"
        assert disk.run(GET_ID, 1, (0x8000, 19)) == (IO_ERROR, 0)
        assert disk.run(GET_ID, 1, (0x8000, 20)) == (OK, 21)
        assert disk.memory.read(0x8000, 20) == serial
        assert disk.run(GET_ID, 1, (0x9000, 8), (0xA000, 12)) == (OK, 21)
        assert disk.memory.read(0x9000, 9) == serial[:8] + b"\0"
        assert disk.memory.read(0xA000, 13) == serial[8:] + b"\0"


class TestConsole:
    """``virtio-console/src/console.rs``."""

    def test_what_waits_for_the_guest_has_a_limit(self) -> None:
        """From ``console.rs::test_input_buffer_operations``.

        There more is refused as a whole; here as much as fits is taken, and the count says so. A
        reset forgets nothing: input is a stream.
        """
        device = ConsoleDevice()
        assert device.ports[0].send(bytes(CONSOLE_INPUT)) == CONSOLE_INPUT
        assert device.ports[0].send(b"x") == 0
        device.close()

    def test_output(self) -> None:
        """From ``console.rs::test_process_transmitq_chain``."""
        device = ConsoleDevice()
        output = bytearray()
        device.ports[0].on_output(output.extend)
        guest = HandGuest(device, room=0x10000, index=1)
        # There a buffer to write is an error; here it is left as it is, and what is read is read.
        guest.memory.write(0x1000, b"\1" * 256)
        guest.offer(guest.put_chain(0, Desc(0x1000, 256), Desc(0x2000, 256, WRITE)))
        guest.finish()
        assert output == b"\1" * 256
        assert guest.memory.read(0x2000, 256) == bytes(256)
        assert guest.used_entry(0) == (0, 0)
        # Out of memory: that buffer is lost, and no other.
        guest.offer(guest.put_chain(0, Desc(0x10000, 256), Desc(0x20000, 256)))
        guest.finish()
        assert len(output) == 256
        guest.memory.write(0x3000, b"\2" * 256)
        guest.memory.write(0x4000, b"\3" * 256)
        guest.offer(guest.put_chain(0, Desc(0x3000, 256), Desc(0x4000, 256)))
        guest.finish()
        assert output[256:] == b"\2" * 256 + b"\3" * 256
        guest.transport.close()
        device.close()

    def test_input(self) -> None:
        """From ``console.rs::test_process_receiveq_chain``."""
        device = ConsoleDevice()
        guest = HandGuest(device, room=0x10000)
        guest.offer(guest.put_chain(0, Desc(0x10000, 256, WRITE), Desc(0x20000, 256, WRITE)))
        device.ports[0].send(b"\1" * 256 + b"\2" * 256)
        guest.finish()
        assert guest.used_entry(0) == (0, 0), "a buffer out of memory takes nothing"
        guest.offer(guest.put_chain(0, Desc(0x3000, 256, WRITE), Desc(0x4000, 256, WRITE)))
        guest.finish()
        assert guest.used_entry(1) == (0, 512)
        assert guest.memory.read(0x3000, 256) == b"\1" * 256
        assert guest.memory.read(0x4000, 256) == b"\2" * 256
        # More than there is room for: the rest comes in the next buffer.
        device.ports[0].send(bytes(range(256)) * 2)
        for i in (2, 3):
            guest.offer(guest.put_chain(0, Desc(0x5000, 256, WRITE)))
            guest.finish()
            assert guest.used_entry(i) == (0, 256)
            assert guest.memory.read(0x5000, 256) == bytes(range(256))
            guest.memory.write(0x5000, bytes(256))
        # Nothing to read: the buffer stays, where theirs is given back empty.
        guest.offer(guest.put_chain(0, Desc(0x7000, 256, WRITE)))
        guest.serve()
        assert guest.used_idx == 4
        device.ports[0].send(b"end")
        guest.finish()
        assert guest.used_entry(4) == (0, 3)
        guest.transport.close()
        device.close()

    def test_input_for_a_buffer_that_is_to_be_read(self) -> None:
        """From ``console.rs::test_process_receiveq_chain``: an error there; no room here."""
        with serving(device := ConsoleDevice()) as path, Driver(path) as driver:
            useless = driver.send(b"0123", queue=0)
            device.ports[0].send(b"abc")
            assert driver.wait(useless).written == 0
            assert driver.wait(driver.post(8, queue=0)).data == b"abc"
            until(lambda: not device.ports[0].lost)
        device.close()
