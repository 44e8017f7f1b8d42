"""The block device over real files, request by request.

Rules: virtio 1.3 sections 5.2.4 (configuration), 5.2.6 (requests) and 2.6.4 (no framing).
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import resource
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestio.errors import DeviceError, MemoryVanishedError
from guestio.virtio.blk import (
    MAX_TRIM_SECTORS,
    S_IOERR,
    S_OK,
    S_UNSUPP,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
    BlockDevice,
)
from tests.kit.block_requests import READ_AT, SECTORS, SIZE, UNTOUCHED, WRITE_AT, Answer, Disk
from tests.kit.rings import WRITE, Desc

UNMAP = 1


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture(params=["served", "processed", "without threads"])
def disk(image: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    """A disk whose requests take any of the ways into the device."""
    threads = 0 if request.param == "without threads" else 3
    device = BlockDevice(image, io_threads=threads)
    yield Disk(device, served=request.param != "processed")
    device.close()


class TestReadAndWrite:
    @pytest.mark.parametrize(
        ("sector", "length"),
        [(0, 512), (1, 512), (SECTORS - 1, 512), (0, SIZE), (7, 4096), (100, 65536), (5, 1536)],
    )
    def test_what_is_written_is_in_the_file_and_is_read_again(
        self, disk: Disk, image: Path, sector: int, length: int
    ) -> None:
        before = image.read_bytes()
        assert disk.read(sector, length) == before[512 * sector : 512 * sector + length]
        data = random.Random(sector + length).randbytes(length)
        disk.write(sector, data)
        expected = before[: 512 * sector] + data + before[512 * sector + length :]
        assert image.read_bytes() == expected
        assert disk.read(sector, length) == data
        assert disk.device.errors == 0

    @pytest.mark.parametrize("sector", [0, 5, SECTORS])
    def test_no_bytes_at_all(self, disk: Disk, image: Path, sector: int) -> None:
        before = image.read_bytes()
        assert disk.run(T_IN, sector) == Answer(S_OK, b"", 1)
        assert disk.run(T_OUT, sector) == Answer(S_OK, b"", 1)
        assert image.read_bytes() == before

    @pytest.mark.parametrize(
        ("sector", "length"),
        [
            (SECTORS, 512),
            (SECTORS - 1, 1024),
            (0, SIZE + 512),
            (SECTORS + 1, 0),
            (2**55, 512),
            (2**55 - 1, 512),
            (2**64 - 1, 512),
            (2**63, 0),
        ],
    )
    def test_past_the_end_of_the_disk(
        self, disk: Disk, image: Path, sector: int, length: int
    ) -> None:
        before = image.read_bytes()
        answer = disk.run(T_IN, sector, reply=length)
        assert answer.status == S_IOERR
        assert answer.data == bytes([UNTOUCHED]) * length
        assert disk.run(T_OUT, sector, b"x" * length).status == S_IOERR
        assert image.read_bytes() == before

    @pytest.mark.parametrize("length", [1, 511, 513, 4095, 4097])
    def test_parts_of_sectors(self, disk: Disk, image: Path, length: int) -> None:
        before = image.read_bytes()
        answer = disk.run(T_IN, 0, reply=length)
        assert answer.status == S_IOERR
        assert answer.data == bytes([UNTOUCHED]) * length
        assert disk.run(T_OUT, 0, b"x" * length).status == S_IOERR
        assert image.read_bytes() == before

    def test_memory_is_marked_as_far_as_it_was_written(self, disk: Disk) -> None:
        disk.read(0, 8192)
        disk.bitmap.get_and_reset()
        position = disk.rig.offered
        disk.rig.view.write(READ_AT, struct.pack("<IIQ", T_IN, 0, 3))
        disk.rig.offer(
            disk.rig.put_chain(
                0, Desc(READ_AT, 16), Desc(0x900100, 4096, WRITE), Desc(0xA00000, 1, WRITE)
            )
        )
        disk.bitmap.get_and_reset()
        disk._serve(disk.rig.ring)
        used = disk.rig.used + 4 + 8 * (position % 4096)
        marked = {at for at in range(0, 16 << 20, 4096) if disk.bitmap.is_set(at)}
        assert marked == {0x900000, 0x901000, 0xA00000, disk.rig.used, used & ~4095}


class TestFraming:
    @pytest.mark.parametrize("cut", [*range(1, 20), 100, 500, 527])
    def test_the_header_ends_anywhere(self, disk: Disk, cut: int) -> None:
        data = random.Random(cut).randbytes(1024)
        disk.write(9, data, readable=[cut])
        assert disk.read(9, 1024, readable=[min(cut, 15)]) == data

    def test_every_byte_in_a_descriptor_of_its_own(self, disk: Disk) -> None:
        data = random.Random(3).randbytes(512)
        disk.write(3, data, readable=[1] * 528)
        assert disk.read(3, 512, readable=[1] * 16, writable=[1] * 513) == data

    @pytest.mark.parametrize(
        "cuts", [(), (512,), (511,), (1,), (256, 256), (256, 257), (1, 510, 1), (513,)]
    )
    def test_data_and_status_are_cut_anywhere(self, disk: Disk, cuts: tuple[int, ...]) -> None:
        data = random.Random(4).randbytes(512)
        disk.write(4, data)
        assert disk.read(4, 512, writable=cuts) == data
        assert disk.run(T_IN, SECTORS, reply=512, writable=cuts).status == S_IOERR

    def test_random_cuts(self, disk: Disk, image: Path) -> None:
        rng = random.Random(5)
        model = bytearray(image.read_bytes())
        for _ in range(150):
            sector, count = rng.randrange(SECTORS - 8), rng.randrange(1, 9)
            cuts = {
                name: [rng.choice((1, 15, 16, 17, 511, 512, rng.randrange(1, 5000))) for _ in "12"]
                for name in ("readable", "writable")
            }
            place = slice(512 * sector, 512 * (sector + count))
            if rng.random() < 0.5:
                model[place] = rng.randbytes(512 * count)
                disk.write(sector, bytes(model[place]), **cuts)
            else:
                assert disk.read(sector, 512 * count, **cuts) == model[place]
        assert image.read_bytes() == model

    def test_more_pieces_than_one_system_call_takes(self, disk: Disk, image: Path) -> None:
        # IOV_MAX is 1024; here are some 1500 pieces, the middle of a sector in several of them.
        data = random.Random(6).randbytes(1500 * 300 - 1500 * 300 % 512)
        cuts = [16, *[300] * 1500]
        answer = disk.run(T_OUT, 2, data, readable=cuts, gap=33)
        assert answer == Answer(S_OK, b"", 1)
        assert image.read_bytes()[1024 : 1024 + len(data)] == data
        back = disk.run(T_IN, 2, reply=len(data), writable=[300] * 1501, gap=7)
        assert back == Answer(S_OK, data, len(data) + 1)
        assert disk.device.errors == 0

    def test_more_pieces_that_end_past_the_disk_are_refused_whole(
        self, disk: Disk, image: Path
    ) -> None:
        before = image.read_bytes()
        length = 2000 * 512
        answer = disk.run(T_OUT, SECTORS - 100, b"y" * length, readable=[16, *[512] * 2000], gap=64)
        assert answer.status == S_IOERR
        assert image.read_bytes() == before

    @pytest.mark.parametrize("length", range(16))
    def test_a_header_that_is_too_short(self, disk: Disk, length: int) -> None:
        for kind in (T_IN, T_OUT, T_FLUSH, 77):
            source = struct.pack("<IIQ", kind, 0, 0)[:length]
            answer = disk.run_raw(source, 513)
            assert answer.status == S_IOERR
            assert answer.data == bytes([UNTOUCHED]) * 512

    def test_no_room_for_a_status(self, disk: Disk, image: Path) -> None:
        before = image.read_bytes()
        for kind in (T_OUT, T_FLUSH, T_DISCARD, T_IN, 99):
            source = struct.pack("<IIQ", kind, 0, 0) + b"z" * 512
            assert disk.run_raw(source, 0).used == 0
        assert image.read_bytes() == before


class TestOtherRequests:
    def test_flush(self, disk: Disk) -> None:
        disk.write(0, b"f" * 512)
        assert disk.run(T_FLUSH) == Answer(S_OK, b"", 1)
        assert disk.run(T_FLUSH, 2**64 - 1, b"ignored", reply=3) == Answer(
            S_OK, bytes([UNTOUCHED]) * 3, 0
        )

    def test_the_serial(self, image: Path) -> None:
        for serial, expected in (
            (None, b"disk.img"),
            ("", b""),
            ("ABC-123", b"ABC-123"),
            ("x" * 20, b"x" * 20),
        ):
            device = BlockDevice(image, serial=serial)
            disk = Disk(device)
            answer = disk.run(T_GET_ID, reply=20)
            assert answer == Answer(S_OK, expected.ljust(20, b"\0"), 21)
            device.close()

    def test_the_serial_in_more_room_and_in_less(self, disk: Disk) -> None:
        answer = disk.run(T_GET_ID, reply=30)
        assert answer.status == S_OK
        assert answer.used == 20
        assert answer.data == b"disk.img".ljust(20, b"\0") + bytes([UNTOUCHED]) * 10
        answer = disk.run(T_GET_ID, reply=19)
        assert answer.status == S_IOERR
        assert answer.data == bytes([UNTOUCHED]) * 19

    def test_serials_that_cannot_be(self, image: Path) -> None:
        with pytest.raises(ValueError, match="longer than 20 bytes"):
            BlockDevice(image, serial="x" * 21)
        device = BlockDevice(image, serial="ümlaut")
        assert device.serial == b"?mlaut".ljust(20, b"\0")
        device.close()

    @pytest.mark.parametrize("kind", [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 16, 100, 2**31, 2**32 - 1])
    def test_unknown_types(self, disk: Disk, image: Path, kind: int) -> None:
        before = image.read_bytes()
        answer = disk.run(kind, 0, b"p" * 512, reply=512)
        assert answer.status == S_UNSUPP
        assert answer.data == bytes([UNTOUCHED]) * 512
        assert image.read_bytes() == before
        assert disk.device.errors == 0


class TestTrim:
    """Discard and write zeroes."""

    def test_a_discard_gives_space_back(self, disk: Disk, image: Path) -> None:
        before = image.read_bytes()
        allocated = image.stat().st_blocks
        assert disk.trim(T_DISCARD, (256, 1024, 0)) == S_OK
        os.sync()
        assert image.stat().st_blocks <= allocated - 1024
        assert image.stat().st_size == SIZE
        expected = before[: 256 * 512] + bytes(1024 * 512) + before[1280 * 512 :]
        assert image.read_bytes() == expected

    def test_several_segments(self, disk: Disk, image: Path) -> None:
        before = bytearray(image.read_bytes())
        segments = [(8 * i, 8, 0) for i in range(0, 64, 2)]
        assert len(segments) == 32
        assert disk.trim(T_DISCARD, *segments) == S_OK
        for sector, count, _ in segments:
            before[512 * sector : 512 * (sector + count)] = bytes(512 * count)
        assert image.read_bytes() == before

    def test_zeroes_that_may_be_holes(self, disk: Disk, image: Path) -> None:
        allocated = image.stat().st_blocks
        assert disk.trim(T_WRITE_ZEROES, (0, 1024, UNMAP)) == S_OK
        os.sync()
        assert image.stat().st_blocks <= allocated - 1024
        assert image.read_bytes()[: 1024 * 512] == bytes(1024 * 512)

    def test_zeroes_that_must_not_be_holes(self, disk: Disk, image: Path) -> None:
        before = image.read_bytes()
        os.sync()
        allocated = image.stat().st_blocks
        assert disk.trim(T_WRITE_ZEROES, (3, 777, 0)) == S_OK
        os.sync()
        assert image.stat().st_blocks >= allocated
        assert image.read_bytes() == before[:1536] + bytes(777 * 512) + before[780 * 512 :]

    def test_a_file_system_that_cannot_zero_ranges(
        self, image: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shm = Path("/dev/shm") / f"guestio-test-{os.getpid()}.img"
        shm.write_bytes(image.read_bytes())
        try:
            device = BlockDevice(shm)
            disk = Disk(device)
            before = shm.read_bytes()
            assert disk.trim(T_WRITE_ZEROES, (5, 1500, 0)) == S_OK
            assert shm.read_bytes() == before[:2560] + bytes(1500 * 512) + before[1505 * 512 :]
            device.close()
        finally:
            shm.unlink()

    @pytest.mark.parametrize("kind", [T_DISCARD, T_WRITE_ZEROES])
    @pytest.mark.parametrize(
        "bad",
        [
            (SECTORS, 1, 0),
            (SECTORS - 1, 2, 0),
            (0, SECTORS + 1, 0),
            (0, MAX_TRIM_SECTORS + 1, 0),
            (0, 2**32 - 1, 0),
            (2**64 - 1, 1, 0),
            (2**55, 1, 0),
        ],
    )
    def test_a_bad_segment_refuses_all(
        self, disk: Disk, image: Path, kind: int, bad: tuple[int, int, int]
    ) -> None:
        before = image.read_bytes()
        assert disk.trim(kind, (0, 8, 0), bad) == S_IOERR
        assert image.read_bytes() == before

    @pytest.mark.parametrize("kind", [T_DISCARD, T_WRITE_ZEROES])
    def test_the_most_sectors_and_one_more(self, tmp_path: Path, kind: int) -> None:
        path = tmp_path / "large"
        size = 3 * 512 * MAX_TRIM_SECTORS
        with path.open("wb") as file:
            file.truncate(size)
        device = BlockDevice(path)
        disk = Disk(device)
        last = MAX_TRIM_SECTORS - 1
        disk.write(last, b"x" * 1024)
        flags = 0 if kind == T_DISCARD else UNMAP
        for many in (MAX_TRIM_SECTORS + 1, 2 * MAX_TRIM_SECTORS, 3 * MAX_TRIM_SECTORS):
            assert disk.trim(kind, (0, many, flags)) == S_IOERR
        assert disk.read(last, 1024) == b"x" * 1024
        assert disk.trim(kind, (0, MAX_TRIM_SECTORS, flags)) == S_OK
        assert disk.read(last, 1024) == bytes(512) + b"x" * 512
        device.close()

    @pytest.mark.parametrize(
        ("kind", "flags"),
        [(T_DISCARD, UNMAP), (T_DISCARD, 2), (T_WRITE_ZEROES, 2), (T_WRITE_ZEROES, 2**31 | UNMAP)],
    )
    def test_an_unknown_flag_refuses_all(
        self, disk: Disk, image: Path, kind: int, flags: int
    ) -> None:
        before = image.read_bytes()
        assert disk.trim(kind, (0, 8, 0), (8, 8, flags)) == S_UNSUPP
        assert image.read_bytes() == before

    @pytest.mark.parametrize("kind", [T_DISCARD, T_WRITE_ZEROES])
    @pytest.mark.parametrize("length", [0, 1, 15, 17, 16 * 33, 31])
    def test_lengths_that_are_no_segments(
        self, disk: Disk, image: Path, kind: int, length: int
    ) -> None:
        before = image.read_bytes()
        assert disk.run(kind, 0, bytes(length)).status == S_IOERR
        assert image.read_bytes() == before

    @pytest.mark.parametrize("kind", [T_DISCARD, T_WRITE_ZEROES])
    def test_no_sectors(self, disk: Disk, image: Path, kind: int) -> None:
        before = image.read_bytes()
        assert disk.trim(kind, (SECTORS, 0, 0), (0, 0, 0)) == S_OK
        assert image.read_bytes() == before


class TestReadOnly:
    def test_nothing_changes(self, image: Path) -> None:
        image.chmod(0o444)
        before = image.read_bytes()
        device = BlockDevice(image, read_only=True)
        disk = Disk(device)
        assert disk.read(0, 4096) == before[:4096]
        assert disk.run(T_OUT, 0, b"x" * 512).status == S_IOERR
        assert disk.trim(T_DISCARD, (0, 8, 0)) == S_IOERR
        assert disk.trim(T_WRITE_ZEROES, (0, 8, 0)) == S_IOERR
        assert disk.run(T_FLUSH).status == S_OK
        assert disk.run(T_GET_ID, reply=20).status == S_OK
        assert image.read_bytes() == before
        device.close()

    def test_it_is_told(self, image: Path) -> None:
        with_trims = 1 << 2 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 13 | 1 << 14
        device = BlockDevice(image)
        assert device.features == with_trims
        device.close()
        device = BlockDevice(image, read_only=True)
        assert device.features == 1 << 2 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10
        assert device.config()[36:57] == bytes(8) + b"\x08\0\0\0" + bytes(8) + b"\1"
        device.close()


class TestConfiguration:
    def test_every_byte(self, image: Path) -> None:
        device = BlockDevice(image, num_queues=3)
        assert device.config() == bytes.fromhex(
            "0008000000000000"  # capacity: 2048 sectors
            "00000000"  # size_max
            "7e000000"  # seg_max: 126
            "0000"
            "00"
            "00"  # geometry
            "00020000"  # blk_size: 512
            "03"
            "00"
            "0800"
            "00000000"  # topology: 8 blocks are a physical one
            "00"  # writeback
            "00"
            "0300"  # num_queues
            "00000400"  # max_discard_sectors: 1 << 18
            "20000000"  # max_discard_seg: 32
            "08000000"  # discard_sector_alignment
            "00000400"  # max_write_zeroes_sectors
            "20000000"  # max_write_zeroes_seg
            "01"  # write_zeroes_may_unmap
            "000000"
        )
        assert device.features & 1 << 12
        device.close()

    def test_one_queue_is_no_multi_queue(self, image: Path) -> None:
        device = BlockDevice(image)
        assert not device.features & 1 << 12
        assert device.config()[34:36] == b"\1\0"
        assert device.capacity == SECTORS
        device.close()

    @pytest.mark.parametrize("count", [0, 65, -1])
    def test_numbers_of_queues_that_cannot_be(self, image: Path, count: int) -> None:
        with pytest.raises(ValueError, match=r"num_queues .* is not in 1\.\.64"):
            BlockDevice(image, num_queues=count)

    def test_it_cannot_be_written(self, image: Path) -> None:
        device = BlockDevice(image)
        with pytest.raises(DeviceError, match="read-only configuration"):
            device.write_config(32, b"\1")
        device.close()


class TestImages:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(DeviceError, match=r"cannot open the image .*No such file"):
            BlockDevice(tmp_path / "none")

    @pytest.mark.parametrize("read_only", [False, True])
    def test_a_directory(self, tmp_path: Path, read_only: bool) -> None:
        with pytest.raises(DeviceError, match=r"a directory|neither a file nor a block device"):
            BlockDevice(tmp_path, read_only=read_only)

    def test_a_character_device(self) -> None:
        with pytest.raises(DeviceError, match="neither a file nor a block device"):
            BlockDevice("/dev/null")

    @pytest.mark.parametrize("size", [0, 1, 511, 513, 1025])
    def test_sizes_that_are_no_sectors(self, tmp_path: Path, size: int) -> None:
        path = tmp_path / "odd"
        path.write_bytes(bytes(size))
        fds = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counts, does not look
        with pytest.raises(DeviceError, match="not a positive multiple of 512"):
            BlockDevice(path)
        assert len(os.listdir("/proc/self/fd")) == fds  # noqa: PTH208

    def test_one_sector(self, tmp_path: Path) -> None:
        path = tmp_path / "one"
        path.write_bytes(b"1" * 512)
        device = BlockDevice(path)
        assert Disk(device).read(0, 512) == b"1" * 512
        device.close()

    def test_larger_than_32_bits_of_sectors(self, tmp_path: Path) -> None:
        path = tmp_path / "huge"
        with path.open("wb") as file:
            file.truncate(1 << 42)
        device = BlockDevice(path)
        assert device.capacity == 1 << 33
        disk = Disk(device)
        disk.write((1 << 33) - 1, b"end!" * 128)
        assert disk.read((1 << 33) - 1, 512) == b"end!" * 128
        assert disk.run(T_OUT, 1 << 33, b"x" * 512).status == S_IOERR
        device.close()
        with path.open("rb") as file:
            file.seek((1 << 42) - 512)
            assert file.read() == b"end!" * 128

    def test_closing_twice(self, image: Path) -> None:
        device = BlockDevice(image)
        device.close()
        device.close()

    def test_a_closed_device_touches_no_other_file(self, image: Path, tmp_path: Path) -> None:
        device = BlockDevice(image)
        disk = Disk(device)
        number = device._image.fd
        device.close()
        other = tmp_path / "other"
        with other.open("w+b") as file:
            # The number that the image had now leads to this file.
            held = os.dup2(file.fileno(), number) if file.fileno() != number else None
            file.write(b"o" * 4096)
            file.flush()
            for served in (True, False):
                disk.served = served
                assert disk.run(T_OUT, 0, b"x" * 512).status == S_IOERR
                assert disk.run(T_IN, 0, reply=512).status == S_IOERR
            assert disk.run(T_FLUSH).status == S_IOERR
            assert disk.trim(T_DISCARD, (0, 8, 0)) == S_IOERR
            assert disk.trim(T_WRITE_ZEROES, (0, 8, 0)) == S_IOERR
            if held is not None:
                os.close(held)
        assert other.read_bytes() == b"o" * 4096


class TestFailures:
    """The file or the memory fails: that request does, and nothing else."""

    def test_a_file_that_refuses_writes(self) -> None:
        fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
        try:
            os.write(fd, b"s" * 8192)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
            device = BlockDevice(f"/proc/self/fd/{fd}")
            disk = Disk(device)
            assert disk.run(T_OUT, 0, b"x" * 512).status == S_IOERR
            assert disk.trim(T_WRITE_ZEROES, (0, 8, 0)) == S_IOERR
            assert disk.trim(T_DISCARD, (0, 8, 0)) == S_IOERR
            assert device.errors == 3
            assert disk.read(0, 8192) == b"s" * 8192
            assert disk.run(T_FLUSH).status == S_OK
            device.close()
        finally:
            os.close(fd)

    def test_a_file_that_takes_only_part_of_a_write(self, disk: Disk, image: Path) -> None:
        before = image.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, hard))
        try:
            assert disk.run(T_OUT, SECTORS // 2 - 1, b"p" * 1024).status == S_IOERR
            assert disk.run(T_OUT, SECTORS // 2, b"q" * 512).status == S_IOERR
            disk.write(0, b"r" * 512)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert disk.device.errors == 2
        after = image.read_bytes()
        assert after[:512] == b"r" * 512
        assert after[SIZE // 2 :] == before[SIZE // 2 :]
        disk.write(SECTORS // 2, b"s" * 512)

    def test_an_image_that_shrinks(self, disk: Disk, image: Path) -> None:
        before = image.read_bytes()
        os.truncate(image, SIZE // 2 + 256)
        assert disk.read(0, SIZE // 2) == before[: SIZE // 2]
        assert disk.run(T_IN, SECTORS // 2, reply=512).status == S_IOERR
        assert disk.run(T_IN, SECTORS - 1, reply=512).status == S_IOERR
        assert disk.run(T_IN, SECTORS // 2 - 1, reply=1024).status == S_IOERR
        assert disk.device.errors == 3
        os.truncate(image, SIZE)
        assert disk.read(SECTORS // 2 + 1, 512) == bytes(512)

    def test_an_image_that_grows_keeps_its_size(self, disk: Disk, image: Path) -> None:
        os.truncate(image, 2 * SIZE)
        assert disk.device.capacity == SECTORS
        assert disk.run(T_IN, SECTORS, reply=512).status == S_IOERR

    def test_an_image_that_has_grown_is_served_whole_once_it_was_looked_at(
        self, disk: Disk, image: Path
    ) -> None:
        os.truncate(image, 2 * SIZE)
        assert disk.device.update_size() == disk.device.size == 2 * SIZE
        assert disk.device.capacity == 2 * SECTORS
        assert disk.device.config()[:8] == struct.pack("<Q", 2 * SECTORS)
        disk.write(2 * SECTORS - 1, b"n" * 512)
        assert disk.read(2 * SECTORS - 1, 512) == b"n" * 512
        assert disk.trim(T_WRITE_ZEROES, (2 * SECTORS - 1, 1, 0)) == S_OK
        assert disk.run(T_IN, 2 * SECTORS, reply=512).status == S_IOERR

    def test_nothing_goes_beyond_the_end_of_an_image_that_was_cut(
        self, disk: Disk, image: Path
    ) -> None:
        os.truncate(image, SIZE // 2)
        assert disk.device.update_size() == SIZE // 2
        for kind, payload in ((T_OUT, bytes(512)), (T_OUT, bytes(SIZE // 4))):
            assert disk.run(kind, SECTORS // 2, payload).status == S_IOERR
        assert disk.run(T_OUT, SECTORS // 2 - 1, bytes(1024)).status == S_IOERR
        assert disk.run(T_IN, SECTORS // 2, reply=512).status == S_IOERR
        assert disk.trim(T_WRITE_ZEROES, (SECTORS // 2, 1, 0)) == S_IOERR
        assert disk.trim(T_DISCARD, (SECTORS // 2, 1, 0)) == S_IOERR
        assert image.stat().st_size == SIZE // 2
        disk.write(SECTORS // 2 - 1, b"e" * 512)

    def test_the_configuration_space_is_read_with_the_size_of_that_moment(
        self, disk: Disk, image: Path
    ) -> None:
        os.truncate(image, 4 * SIZE)
        assert disk.device.config()[:8] == struct.pack("<Q", 4 * SECTORS)
        disk.write(4 * SECTORS - 1, b"n" * 512)

    @pytest.mark.parametrize("size", [0, SIZE + 1, 511])
    def test_a_size_that_cannot_be_is_not_taken_over(
        self, disk: Disk, image: Path, size: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        os.truncate(image, size)
        with pytest.raises(DeviceError, match=f"is {size} bytes long"):
            disk.device.update_size()
        assert disk.device.config()[:8] == struct.pack("<Q", SECTORS)
        assert "the disk keeps its size" in caplog.text
        assert disk.run(T_IN, SECTORS - 1, reply=512).status == (S_IOERR if size < SIZE else S_OK)

    def test_a_closed_device_keeps_its_size(self, image: Path) -> None:
        device = BlockDevice(image)
        device.close()
        os.truncate(image, 2 * SIZE)
        with pytest.raises(DeviceError, match="is closed"):
            device.update_size()
        assert device.config()[:8] == struct.pack("<Q", SECTORS)

    def test_memory_that_vanishes_under_the_data(self, disk: Disk, image: Path) -> None:
        before = image.read_bytes()
        os.ftruncate(disk.memory_fd, READ_AT + 4096)
        # Header and status lie in what is left, the data beyond it.
        disk.rig.view.write(READ_AT, struct.pack("<IIQ", T_OUT, 0, 0))
        for i, data in enumerate((Desc(0xC00000, 512), Desc(0xC00000, 512, WRITE))):
            if i:
                disk.rig.view.write(READ_AT, struct.pack("<IIQ", T_IN, 0, 0))
            disk.rig.view.write(READ_AT + 16, bytes([UNTOUCHED]))
            disk.rig.offer(
                disk.rig.put_chain(0, Desc(READ_AT, 16), data, Desc(READ_AT + 16, 1, WRITE))
            )
            disk._serve(disk.rig.ring)
            assert disk.rig.view.read(READ_AT + 16, 1) == bytes([S_IOERR])
        assert disk.device.errors == 2
        assert image.read_bytes() == before
        assert disk.rig.used_idx == 2

    @pytest.mark.parametrize("length", [512, 65536])
    @pytest.mark.parametrize("kind", [T_OUT, T_IN])
    def test_memory_that_another_access_found_to_be_gone(
        self, disk: Disk, image: Path, kind: int, length: int
    ) -> None:
        """Something stands in for it by then, which system calls read and write as if it were."""
        before = image.read_bytes()
        os.ftruncate(disk.memory_fd, READ_AT + 4096)
        at = READ_AT + 4096 - 512
        for hole in range(READ_AT + 4096, at + length + 4096, 4096):
            with pytest.raises(MemoryVanishedError):
                disk.memory.read(hole, 1)
        disk.rig.view.write(READ_AT, struct.pack("<IIQ", kind, 0, 0))
        disk.rig.view.write(READ_AT + 16, bytes([UNTOUCHED]))
        data = Desc(at, length + 512, WRITE if kind == T_IN else 0)
        disk.rig.offer(disk.rig.put_chain(0, Desc(READ_AT, 16), data, Desc(READ_AT + 16, 1, WRITE)))
        disk._serve(disk.rig.ring)
        assert disk.rig.view.read(READ_AT + 16, 1) == bytes([S_IOERR])
        assert disk.rig.used_entry(0) == (0, 0 if kind == T_IN else 1)
        assert disk.device.errors == 1
        assert image.read_bytes() == before

    def test_a_read_that_fails_half_way(self, disk: Disk, image: Path) -> None:
        """What may have been written is marked dirty, and nothing is claimed to have been."""
        os.truncate(image, SIZE - 4096)
        disk.rig.view.write(READ_AT, struct.pack("<IIQ", T_IN, 0, SECTORS - 24))
        pages = [0x400000, 0x500000, 0x600000]
        data = [Desc(at, 4096, WRITE) for at in pages]
        disk.rig.offer(
            disk.rig.put_chain(0, Desc(READ_AT, 16), *data, Desc(READ_AT + 16, 1, WRITE))
        )
        # Only the device writes from now on.
        disk.bitmap.reset()
        disk._serve(disk.rig.ring)
        marked = disk.bitmap.dirty_pages().tolist()
        assert disk.rig.view.read(READ_AT + 16, 1) == bytes([S_IOERR])
        assert disk.rig.used_entry(0) == (0, 0)
        assert disk.device.errors == 1
        assert marked == [0x30, READ_AT >> 12, *(at >> 12 for at in pages)]

    def test_only_what_a_write_touches_is_marked(self, disk: Disk) -> None:
        """Its status, that is, and the ring's used area."""
        disk.rig.view.write(READ_AT, struct.pack("<IIQ", T_OUT, 0, 0))
        data, status = Desc(0x400000, 4096), Desc(0x500000, 1, WRITE)
        disk.rig.offer(disk.rig.put_chain(0, Desc(READ_AT, 16), data, status))
        disk.bitmap.reset()
        disk._serve(disk.rig.ring)
        assert disk.bitmap.dirty_pages().tolist() == [0x30, 0x500]

    def test_the_used_length_of_a_read_counts_its_status(self, disk: Disk) -> None:
        assert disk.run(T_IN, 0, reply=1024).used == 1025
        assert disk.run(T_OUT, 0, bytes(512)).used == 1
        assert disk.run(T_IN, SECTORS, reply=512).used == 0

    def test_a_request_that_cannot_be_reached_is_failed_in_its_status(self, disk: Disk) -> None:
        disk.rig.view.write(READ_AT, struct.pack("<IIQ", T_IN, 0, 0))
        disk.rig.offer(
            disk.rig.put_chain(
                0, Desc(READ_AT, 16), Desc(1 << 40, 512, WRITE), Desc(READ_AT + 16, 1, WRITE)
            )
        )
        (chain,), _, served, _ = disk.rig.ring.run_once(disk.device.server)
        assert served == 0
        assert chain.fault is not None
        assert disk.device.fail(0, chain) == 0
        assert disk.rig.view.read(READ_AT + 16, 1) == bytes([S_IOERR])
        assert disk.device.errors == 1

    def test_the_status_itself_cannot_be_reached(self, disk: Disk) -> None:
        disk.rig.view.write(READ_AT, struct.pack("<IIQ", T_IN, 0, 0))
        disk.rig.offer(
            disk.rig.put_chain(
                0, Desc(READ_AT, 16), Desc(WRITE_AT, 512, WRITE), Desc(1 << 40, 1, WRITE)
            )
        )
        (chain,), _ = disk.rig.ring.pop()
        assert chain.tail is None
        assert disk.device.fail(0, chain) == 0


def test_queues_in_threads_of_their_own(image: Path) -> None:
    device = BlockDevice(image, num_queues=4)
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            disk = Disk(device)
            rng = random.Random(index)
            share = SECTORS // 4
            for _ in range(200):
                sector = index * share + rng.randrange(share - 8)
                data = rng.randbytes(4096)
                disk.write(sector, data)
                assert disk.read(sector, 4096) == data
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    device.close()
    assert failures == []
    assert device.errors == 0


def test_a_block_device_of_the_host(tmp_path: Path) -> None:
    path = tmp_path / "loop.img"
    path.write_bytes(random.Random(9).randbytes(SIZE))
    try:
        loop = _attach_loop(path)
    except OSError as error:
        pytest.skip(f"no loop device can be had here: {error.strerror}")
    try:
        device = BlockDevice(loop)
        assert device.capacity == SECTORS
        disk = Disk(device)
        assert disk.read(1, 4096) == path.read_bytes()[512:4608]
        disk.write(SECTORS - 1, b"l" * 512)
        assert disk.run(T_FLUSH).status == S_OK
        device.close()
        assert path.read_bytes()[-512:] == b"l" * 512
    finally:
        _detach_loop(loop)


_LOOP_SET_FD, _LOOP_CLR_FD, _LOOP_CTL_GET_FREE = 0x4C00, 0x4C01, 0x4C82


def _attach_loop(path: Path) -> str:
    control = os.open("/dev/loop-control", os.O_RDWR)
    try:
        loop = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
    finally:
        os.close(control)
    fd = os.open(loop, os.O_RDWR)
    try:
        with path.open("r+b") as file:
            fcntl.ioctl(fd, _LOOP_SET_FD, file.fileno())
    finally:
        os.close(fd)
    return loop


def _detach_loop(loop: str) -> None:
    fd = os.open(loop, os.O_RDWR)
    try:
        fcntl.ioctl(fd, _LOOP_CLR_FD)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
    finally:
        os.close(fd)
