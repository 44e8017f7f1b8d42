"""What QEMU's qtests assert of its devices and of vhost-user, asserted of the devices here.

Repository: https://github.com/qemu/qemu, ``tests/qtest``. Each test names those that it comes from;
`README.md` here has them all. They are run over vhost-user where that is possible.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from guestio.vhost_user import Backend, Frontend
from guestio.virtio import Chain, Device, Status
from guestio.virtio.blk import BlockDevice
from guestio.virtio.iommu import VirtioIommu
from guestio.virtio.net import NetDevice
from guestio.virtio.net.features import LinkStatus, Net
from tests.kit import iommu_driver as iommu
from tests.kit.hand_guest import EVENT_IDX, INDIRECT_DESC, VERSION_1, Remote, remote
from tests.kit.net_driver import BUFFERS, MAC, MODERN, PEER, NetGuest, Wire, frame
from tests.kit.rings import WRITE, Desc, linked
from tests.kit.serving import WAIT, Serving, until

SIZE = 64 << 20
IN, OUT, DISCARD, WRITE_ZEROES = 0, 1, 11, 13
OK, IO_ERROR, UNSUPPORTED = 0, 1, 2
BLK_MQ, BLK_DISCARD, BLK_WRITE_ZEROES = 1 << 12, 1 << 13, 1 << 14
BLK = BLK_MQ | BLK_DISCARD | BLK_WRITE_ZEROES
AT = 0x8000
"""Where requests are: a header of 16 bytes, data, and the status."""
TEST = b"TEST".ljust(512, b"\0")


def new_disk(tmp_path: Path, size: int = SIZE, **options: Any) -> BlockDevice:
    path = tmp_path / "disk"
    with path.open("wb") as made:
        made.truncate(size)
    return BlockDevice(path, **options)


class Requests(Remote):
    """A driver of a disk that lays its requests out as QEMU's tests do."""

    def put_request(self, kind: int, sector: int, data: bytes) -> None:
        """Write header, data and an unanswered status to memory."""
        header = struct.pack("<IIQ", kind, 1, sector)
        self.view.write(AT, header + data + b"\xff")

    def request(self, kind: int, sector: int, data: bytes) -> int:
        """Run a request of three descriptors; its status."""
        self.put_request(kind, sector, data)
        flags = WRITE if kind == IN else 0
        row = [Desc(AT, 16), Desc(AT + 16, len(data), flags), Desc(AT + 16 + len(data), 1, WRITE)]
        position = self.offered
        self.offer(self.put_chain(0, *row))
        self.wait()
        assert self.used_entry(position)[0] == 0
        return self.view.read(AT + 16 + len(data), 1)[0]

    def read_sector(self, sector: int) -> bytes:
        """Read a sector."""
        assert self.request(IN, sector, bytes(512)) == OK
        return self.view.read(AT + 16, 512)

    def trim(self, kind: int, *ranges: tuple[int, int, int]) -> int:
        """Discard or zero ranges of sector, number of sectors and flags; the status."""
        return self.request(kind, 0, b"".join(struct.pack("<QII", *each) for each in ranges))


class TestBlk:
    """``virtio-blk-test.c`` and ``vhost-user-blk-test.c``."""

    def test_basic(self, tmp_path: Path) -> None:
        """From ``virtio-blk-test.c::basic``.

        And ``vhost-user-blk-test.c::basic``.
        """
        device = new_disk(tmp_path)
        with remote(device, VERSION_1 | BLK) as (frontend, memory):
            assert frontend.features & (BLK_DISCARD | BLK_WRITE_ZEROES)
            assert frontend.get_config(0, 8) == struct.pack("<Q", SIZE // 512)
            ring = Requests(frontend, memory)
            assert ring.request(OUT, 0, TEST) == OK
            assert ring.read_sector(0) == TEST
            assert ring.trim(WRITE_ZEROES, (0, 1, 0)) == OK
            assert ring.read_sector(0) == bytes(512)
            assert ring.trim(DISCARD, (0, 1, 0)) == OK
            # Two descriptors: header and data in one, data and status in one.
            ring.put_request(OUT, 1, TEST)
            ring.offer(ring.put_chain(0, Desc(AT, 528), Desc(AT + 528, 1, WRITE)))
            ring.wait()
            assert memory.read(AT + 528, 1) == bytes([OK])
            ring.put_request(IN, 1, bytes(512))
            ring.offer(ring.put_chain(0, Desc(AT, 16), Desc(AT + 16, 513, WRITE)))
            ring.wait()
            assert memory.read(AT + 16, 513) == TEST + bytes([OK])
        device.close()

    @pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
    def test_ranges_that_are_none(self, tmp_path: Path, kind: int) -> None:
        """From ``vhost-user-blk-test.c::basic``, its invalid discards and write-zeroes.

        One range is its limit; here the configuration space says 32.
        """
        size = 1 << 42  # so that more sectors than the limit are no more than it has
        device = new_disk(tmp_path, size)
        with remote(device, VERSION_1 | BLK) as (frontend, memory):
            ring = Requests(frontend, memory)
            (segments,) = struct.unpack("<I", frontend.get_config(40, 4))
            assert segments == 32
            assert ring.trim(kind, *[(i, 1, 0) for i in range(segments)]) == OK
            assert ring.trim(kind, *[(i, 1, 0) for i in range(segments + 1)]) == IO_ERROR
            assert ring.trim(kind, (0, 0xFFFF_FFFF, 0)) == IO_ERROR
            assert ring.trim(kind, (size // 512 + 1, 1, 0)) == IO_ERROR
            assert ring.trim(kind, (0, 1, 0xFFFF_FFFE)) == UNSUPPORTED
        device.close()

    def test_indirect(self, tmp_path: Path) -> None:
        """From ``virtio-blk-test.c::indirect``.

        And ``vhost-user-blk-test.c::indirect``. It is always offered there.
        """
        device = new_disk(tmp_path)
        with remote(device, VERSION_1 | INDIRECT_DESC, indirect="on") as (frontend, memory):
            assert frontend.features & INDIRECT_DESC
            ring = Requests(frontend, memory)
            ring.put_request(OUT, 0, TEST)
            ring.offer(ring.put_table(0, 0x4000, linked(Desc(AT, 528), Desc(AT + 528, 1, WRITE))))
            ring.wait()
            assert memory.read(AT + 528, 1) == bytes([OK])
            ring.put_request(IN, 0, bytes(512))
            ring.offer(ring.put_table(1, 0x4000, linked(Desc(AT, 16), Desc(AT + 16, 513, WRITE))))
            ring.wait()
            assert memory.read(AT + 16, 513) == TEST + bytes([OK])
        device.close()

    def test_a_disk_that_changes_its_size(self, tmp_path: Path) -> None:
        """From ``virtio-blk-test.c::config``.

        And ``virtio-blk-test.c::resize``, ``virtio-blk-test.c::msix``.
        """
        device = new_disk(tmp_path)
        with remote(device) as (frontend, memory):
            ring = Requests(frontend, memory)
            assert ring.request(OUT, 0, TEST) == OK
            seen = frontend.config_changes
            with (tmp_path / "disk").open("r+b") as image:
                image.truncate(SIZE // 2)
            device.update_size()
            assert frontend.wait_config_change(WAIT, seen=seen)
            assert frontend.get_config(0, 8) == struct.pack("<Q", SIZE // 2 // 512)
            assert ring.read_sector(0) == TEST
            assert ring.request(IN, SIZE // 2 // 512, bytes(512)) == IO_ERROR
        device.close()

    def test_a_notification_for_two_requests(self, tmp_path: Path) -> None:
        """From ``virtio-blk-test.c::idx``.

        And ``vhost-user-blk-test.c::idx``.
        """
        device = new_disk(tmp_path)
        with remote(device, VERSION_1 | EVENT_IDX) as (frontend, memory):
            ring = Requests(frontend, memory)
            assert ring.request(OUT, 0, TEST) == OK
            assert ring.handle.wait_call(WAIT)
            ring.set_used_event(2)
            assert ring.request(OUT, 1, TEST) == OK
            frontend.sync()
            assert not ring.handle.clear_call(), "the second is not announced"
            assert ring.read_sector(1) == TEST
            assert ring.handle.wait_call(WAIT), "with the third it is"
            assert not ring.handle.clear_call(), "once"
        device.close()

    def test_a_queue_that_is_not_there(self, tmp_path: Path) -> None:
        """From ``virtio-blk-test.c::test_nonexistent_virtqueue``.

        And ``vhost-user-blk-test.c::test_nonexistent_virtqueue``.
        """
        device = new_disk(tmp_path)
        with remote(device) as (frontend, memory):
            assert frontend.queue_count() == 1
            with pytest.raises(Exception, match="refused"):
                Requests(frontend, memory, index=2)
        with remote(device) as (frontend, memory):
            assert Requests(frontend, memory).request(OUT, 0, TEST) == OK
        device.close()

    @pytest.mark.parametrize("queues", [1, 8])
    def test_several_queues(self, tmp_path: Path, queues: int) -> None:
        """From ``vhost-user-blk-test.c::multiqueue``."""
        device = new_disk(tmp_path, num_queues=queues)
        with remote(device, VERSION_1 | BLK) as (frontend, memory):
            assert bool(frontend.features & BLK_MQ) == (queues > 1)
            assert frontend.get_config(34, 2) == struct.pack("<H", queues)
            assert frontend.queue_count() == queues
            for index in range(queues):
                step = 0x1000 * index
                ring = Requests(
                    *(frontend, memory),
                    index=index,
                    desc=0x10000 + step,
                    avail=0x10200 + step,
                    used=0x10400 + step,
                )
                assert ring.request(OUT, index, bytes([index]) * 512) == OK
                assert ring.read_sector(index) == bytes([index]) * 512
        device.close()


@pytest.fixture
def wire() -> Iterator[tuple[Wire, NetDevice]]:
    port = Wire(2)
    device = NetDevice(port, mac=MAC)
    yield port, device
    device.close()


class TestNet:
    """``virtio-net-test.c``."""

    def test_a_frame_each_way(self, tmp_path: Path, wire: tuple[Wire, NetDevice]) -> None:
        """From ``virtio-net-test.c::send_recv_test``.

        There a frame of five bytes is received; here one has an Ethernet header at least.
        """
        port, device = wire
        with Serving(device, tmp_path / "s") as serving, NetGuest(serving.path) as guest:
            guest.post(64)
            port.put(b"TEST\0")
            until(lambda: device.statistics().receive_dropped == 1)
            port.put(frame(20))
            assert guest.receive() == (bytes(10) + b"\1\0", frame(20))
            guest.send(frame(52, to=PEER))
            assert port.get()[1] == frame(52, to=PEER)

    def test_a_frame_that_comes_while_the_queue_is_stopped(
        self, tmp_path: Path, wire: tuple[Wire, NetDevice]
    ) -> None:
        """From ``virtio-net-test.c::stop_cont_test``."""
        port, device = wire
        with Serving(device, tmp_path / "s") as serving, NetGuest(serving.path) as guest:
            guest.post(64)
            base = guest.frontend.stop_queue(0)
            assert base == 0
            port.put(frame(20))
            guest.frontend.sync()
            assert guest.queues[0].collect() == []
            layout = guest.queues[0].layout
            guest.handles[0] = guest.frontend.start_queue(0, layout, base=base)
            guest.handles[0].kick()
            assert guest.receive()[1] == frame(20)

    def test_it_announces_itself(self, tmp_path: Path, wire: tuple[Wire, NetDevice]) -> None:
        """From ``virtio-net-test.c::announce_self``.

        QEMU sends packets itself; here the driver is told to. Unlike there, its acknowledgement
        is accepted also when there was nothing to acknowledge.
        """
        _, device = wire
        features = int(MODERN | Net.GUEST_ANNOUNCE | Net.MQ | Net.CTRL_MAC_ADDR)
        with (
            Serving(device, tmp_path / "s") as serving,
            NetGuest(serving.path, features=features, pairs=2) as guest,
        ):

            def status() -> int:
                return int.from_bytes(guest.frontend.get_config(6, 2), "little")

            assert status() == LinkStatus.LINK_UP
            device.announce()
            assert status() == LinkStatus.LINK_UP | LinkStatus.ANNOUNCE
            assert guest.control(3, 0) == 0
            assert status() == LinkStatus.LINK_UP
            assert guest.control(3, 0) == 0, "a second time"
            assert guest.control(3, 0, b"\0") == 1, "with a byte too many"
            for command in range(6):
                assert guest.control(0, command, b"\1") == 0
                assert guest.control(0, command, b"\1\0") == 1, "with a byte too many"
            assert guest.control(1, 1, b"\1\0\0\0\0\1") == 1, "the address of a group"
            assert guest.control(1, 1, b"\xff" * 6) == 1
            assert guest.control(1, 1, b"\2\0\0\0\0\1") == 0

    @pytest.mark.parametrize(
        ("total", "broken"), [(0xFFFF_FFFF, True), (4096 + 65536, False)], ids=["uint_max", "large"]
    )
    def test_a_frame_that_is_too_long(
        self, tmp_path: Path, wire: tuple[Wire, NetDevice], total: int, broken: bool
    ) -> None:
        """From ``virtio-net-test.c::large_tx``.

        65 descriptors of the same memory. There more than 4 GiB are given back unsent, here they
        are the driver's mistake (section 2.7.5.2).
        """
        _, device = wire
        piece = total // 64
        with Serving(device, tmp_path / "s") as serving, NetGuest(serving.path, size=128) as guest:
            row = [(BUFFERS, piece)] * 65
            guest.queues[1].add(row, [], None)
            guest.queues[1].publish()
            guest.handles[1].kick()
            if broken:
                until(lambda: guest.handles[1].failed())
            else:
                until(guest.queues[1].collect)
                assert device.statistics().send_dropped == 1
                guest.send(frame(60, to=PEER))


class Copier(Device):
    """Answers with what it was given to read."""

    device_id = 61

    def process(self, queue: int, chain: Chain) -> int:
        chain.writable.write(chain.readable.read())
        return chain.readable.total


class TestVhostUser:
    """``vhost-user-test.c``, with the back-end here instead of its own."""

    @pytest.mark.parametrize("kind", ["memfd", "file"])
    def test_the_back_end_reads_what_the_guest_has(self, tmp_path: Path, kind: str) -> None:
        """From ``vhost-user-test.c::test_read_guest_mem``."""
        shm = Path("/dev/shm") / f"guestio-{tmp_path.name}"
        try:
            if kind == "memfd":
                backing = Backing.memfd(0x40000)
            else:
                with shm.open("w+b") as made:
                    made.truncate(0x40000)
                    backing = Backing.from_fd(made.fileno(), 0x40000)
            memory = GuestRegionCollection.from_regions([MmapRegion(0, backing)])
            with (
                Serving(Copier(), tmp_path / "s") as serving,
                Frontend(serving.path, timeout=WAIT) as frontend,
            ):
                frontend.negotiate(VERSION_1)
                frontend.set_memory(memory)
                ring = Remote(frontend, memory, desc=0x10000, avail=0x11000, used=0x12000)
                data = bytes(i * 7 & 0xFF for i in range(1024))
                memory.write(0, data)
                ring.offer(ring.put_chain(0, Desc(0, 1024), Desc(0x20000, 1024, WRITE)))
                ring.wait()
                assert memory.read(0x20000, 1024) == data
        finally:
            shm.unlink(missing_ok=True)

    def test_the_back_end_goes_and_another_one_comes(self, tmp_path: Path) -> None:
        """From ``vhost-user-test.c::test_reconnect``: all is told to it again."""
        memory = GuestRegionCollection.from_regions([MmapRegion.memfd(0, 0x20000)])
        base = 0
        for served in range(3):
            with (
                Serving(Copier(), tmp_path / "s") as serving,
                Frontend(serving.path, timeout=WAIT) as frontend,
            ):
                frontend.negotiate(VERSION_1)
                frontend.set_memory(memory)
                ring = Remote(frontend, memory, base=base)
                memory.write(0x8000, bytes([served]))
                ring.offer(ring.put_chain(0, Desc(0x8000, 1), Desc(0x9000, 1, WRITE)))
                ring.wait()
                assert memory.read(0x9000, 1) == bytes([served])
                base = ring.used_idx
        assert base == 3

    def test_a_connection_that_fails_at_first(self, tmp_path: Path) -> None:
        """From ``vhost-user-test.c::test_vhost_user_started``, connect-fail and flags-mismatch.

        The roles are changed: front-ends that hang up after a message and after their features,
        and then one that stays.
        """
        with Backend(Copier(), tmp_path / "s") as backend:
            thread = threading.Thread(target=backend.serve)
            thread.start()
            try:
                with Frontend(backend.path, timeout=WAIT):
                    pass
                with Frontend(backend.path, timeout=WAIT) as frontend:
                    frontend.negotiate(VERSION_1)
                memory = GuestRegionCollection.from_regions([MmapRegion.memfd(0, 0x20000)])
                with Frontend(backend.path, timeout=WAIT) as frontend:
                    frontend.negotiate(VERSION_1)
                    frontend.set_memory(memory)
                    ring = Remote(frontend, memory)
                    ring.offer(ring.put_chain(0, Desc(0x8000, 1), Desc(0x9000, 1, WRITE)))
                    ring.wait()
            finally:
                backend.stop()
                thread.join(WAIT)

    def test_two_queue_pairs(self, tmp_path: Path, wire: tuple[Wire, NetDevice]) -> None:
        """From ``vhost-user-test.c::test_multiqueue``."""
        port, device = wire
        features = int(MODERN | Net.MQ)
        with (
            Serving(device, tmp_path / "s") as serving,
            NetGuest(serving.path, features=features, pairs=2) as guest,
        ):
            assert guest.frontend.queue_count() == 5
            assert set(guest.handles) == {0, 1, 2, 3, 4}
            for pair in range(2):
                guest.send(frame(60, to=PEER, seed=pair), pair=pair)
                assert port.get(pair)[1] == frame(60, to=PEER, seed=pair)
                guest.post(64, pair=pair)
                port.put(frame(40, seed=pair), pair)
                assert guest.receive(pair)[1] == frame(40, seed=pair)

    def test_the_steps_of_a_status(self) -> None:
        """From ``libqos/virtio.c::qvirtio_start_device``.

        And ``libqos/virtio.c::qvirtio_set_features``, ``libqos/virtio.c::qvirtio_set_driver_ok``,
        ``libqos/virtio.c::qvirtio_reset``.
        """
        with remote(Copier()) as (frontend, memory):
            frontend.set_status(0)
            assert frontend.get_status() == 0
            status = Status(0)
            for step in (Status.ACKNOWLEDGE, Status.DRIVER, Status.FEATURES_OK, Status.DRIVER_OK):
                status |= step
                frontend.set_status(status)
                assert frontend.get_status() == status
            assert status == 15
            Remote(frontend, memory).run()
            frontend.stop_queue(0)
            frontend.set_status(0)
            assert frontend.get_status() == 0


class TestIommu:
    """``virtio-iommu-test.c``."""

    @staticmethod
    def make() -> VirtioIommu:
        return VirtioIommu(endpoints=[0], page_size_mask=2**64 - 1)

    def test_the_configuration(self) -> None:
        """From ``virtio-iommu-test.c::pci_config``: at boot it is bypassed there by default."""
        assert self.make().config()[36] == 0
        space = VirtioIommu(endpoints=[0], bypass=True).config()
        start, end, first, last = struct.unpack_from("<QQII", space, 8)
        assert start == 0
        assert end >= 2**32 - 1
        assert (first, last) == (0, 2**32 - 1)
        assert space[36] == 1

    def test_attach_and_detach(self) -> None:
        """From ``virtio-iommu-test.c::test_attach_detach``."""
        device = self.make()
        steps = [
            (iommu.attach(0, 0), iommu.OK),
            (iommu.attach(444, 0), iommu.NOENT),
            (iommu.detach(1, 0), iommu.NOENT),
            (iommu.attach(0, 1), iommu.OK),
            (iommu.detach(0, 0), iommu.INVAL),
            (iommu.detach(0, 1), iommu.OK),
            (iommu.attach(0, 1), iommu.OK),
            (iommu.map_(1, 0, 0xFFF, 0xA1000, iommu.R), iommu.OK),
            (iommu.map_(1, 0x2000, 0x2FFF, 0xB1000, iommu.R), iommu.OK),
            (iommu.detach(0, 1), iommu.OK),
        ]
        assert [iommu.send(device, step) for step, _ in steps] == [answer for _, answer in steps]

    def test_map_and_unmap(self) -> None:
        """From ``virtio-iommu-test.c::test_map_unmap``."""
        device = self.make()

        def map_(start: int, end: int, phys: int, domain: int = 1) -> Any:
            return iommu.send(device, iommu.map_(domain, start, end, phys, iommu.R))

        def unmap(start: int, end: int, domain: int = 1) -> Any:
            return iommu.send(device, iommu.unmap(domain, start, end))

        assert iommu.send(device, iommu.attach(0, 1)) == iommu.OK
        assert map_(0, 0xFFF, 0xA1000, 0) == iommu.NOENT
        assert map_(0, 0xFFF, 0xA1000) == iommu.OK
        assert map_(0, 0xFFFF, 0xB1000) == iommu.INVAL
        assert unmap(0x10, 0xFFF, 4) == iommu.NOENT
        assert unmap(0x10, 0xFFF) == iommu.RANGE
        assert unmap(0, 0x1000) == iommu.OK
        assert unmap(0, 4) == iommu.OK
        assert [map_(0, 9, 0xA1000), unmap(0, 9)] == [iommu.OK] * 2
        assert [map_(0, 4, 0xB1000), map_(5, 9, 0xB2000), unmap(0, 9)] == [iommu.OK] * 3
        assert map_(0, 9, 0xC1000) == iommu.OK
        assert unmap(0, 4) == iommu.RANGE
        assert unmap(0, 10) == iommu.OK
        assert [map_(0, 4, 0xD1000), map_(5, 9, 0xD2000)] == [iommu.OK] * 2
        assert [unmap(0, 4), unmap(5, 9)] == [iommu.OK] * 2
        assert [map_(0, 4, 0xE2000), unmap(0, 9)] == [iommu.OK] * 2
        assert [map_(0, 4, 0xF2000), map_(10, 14, 0xF3000), unmap(0, 14)] == [iommu.OK] * 3
        assert [map_(10, 14, 0xF3000), map_(0, 4, 0xF2000), unmap(0, 4)] == [iommu.OK] * 3
        assert map_(10, 14, 0xF3000) == iommu.INVAL, "it is still mapped"
