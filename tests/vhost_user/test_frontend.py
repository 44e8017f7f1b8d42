"""The front-end against the real session, a hand-played peer, and qemu-storage-daemon."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from guestio.addr import Permissions
from guestio.errors import DeviceError, InvalidAddressError, ProtocolError
from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from guestio.vhost_user.channel import Channel, PeerGoneError
from guestio.vhost_user.frontend import (
    PROTOCOL_FEATURES,
    Frontend,
    NoAnswerError,
    RefusedError,
)
from guestio.vhost_user.messages import (
    BackendRequest,
    FrontendRequest,
    Inflight,
    IotlbMessage,
    IotlbType,
    MemoryTable,
    ProtocolFeature,
    VringAddr,
    VringState,
    encode_ack,
    encode_iotlb,
    encode_message,
)
from guestio.virtio.driver import DriverQueue
from guestio.virtio.layout import RingLayout
from tests.kit.disks import Disk, storage_daemon
from tests.kit.peer import WAIT, Hand, SessionPeer, nothing_left
from tests.kit.recording import DEVICE_FEATURES
from tests.kit.serving import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_F = FrontendRequest
ALL = 2**64 - 1
PLATFORM = 1 << 33
NO_PLATFORM = ALL & ~PLATFORM


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


class Guest:
    """Two regions of memory that other processes can map."""

    def __init__(self) -> None:
        self.backings = [Backing.memfd(0x20000), Backing.memfd(0x10000)]
        self.memory = GuestRegionCollection.from_regions(
            MmapRegion(*each) for each in zip((0, 1 << 32), self.backings, strict=True)
        )

    def close(self) -> None:
        del self.memory
        for backing in self.backings:
            backing.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    made.close()


class Link:
    """A front-end joined to the real session, with memory to share."""

    def __init__(self, guest: Guest) -> None:
        ours, theirs = socket.socketpair()
        self.guest = guest
        self.peer = SessionPeer(theirs)
        self.frontend = Frontend(ours, timeout=WAIT)

    @property
    def calls(self) -> list[tuple[Any, ...]]:
        return self.peer.handler.calls


@pytest.fixture
def link(guest: Guest) -> Iterator[Link]:
    made = Link(guest)
    with made.peer:
        yield made
        made.frontend.close()
        made.frontend.iotlb.memory = None
    assert made.peer.error is None


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


class TestNegotiation:
    def test_everything_on_offer(self, link: Link) -> None:
        frontend = link.frontend
        assert frontend.negotiate(ALL) == DEVICE_FEATURES
        assert frontend.offered == frontend.features == DEVICE_FEATURES
        assert frontend.protocol_features == int(PROTOCOL_FEATURES)
        assert frontend.iommu
        assert frontend.queue_count() == 2
        assert frontend.max_memory_slots() == 4
        assert link.calls == [("set_backend_channel", "fd"), ("set_features", DEVICE_FEATURES)]

    def test_only_what_is_wanted(self, link: Link) -> None:
        assert link.frontend.negotiate(1, 0) == 1
        assert link.frontend.protocol_features == 0
        assert not link.frontend.iommu
        assert link.frontend.queue_count() == 1
        assert link.frontend.max_memory_slots() == 8
        link.frontend.sync()
        assert link.calls == [("set_features", 1)]

    @pytest.mark.parametrize("missing", [ProtocolFeature.BACKEND_REQ, ProtocolFeature.REPLY_ACK])
    def test_an_iommu_needs_its_protocol_features(
        self, link: Link, missing: ProtocolFeature
    ) -> None:
        link.peer.handler.protocol_features &= ~missing
        with pytest.raises(ProtocolError, match="BACKEND_REQ and REPLY_ACK"):
            link.frontend.negotiate(ALL)

    def test_features_that_it_cannot_use(self, link: Link) -> None:
        with pytest.raises(ValueError, match="cannot be used"):
            link.frontend.negotiate(ALL, ProtocolFeature.PAGEFAULT)

    def test_other_features_later_as_after_a_boot_loader(self, link: Link) -> None:
        link.frontend.negotiate(ALL)
        link.frontend.set_features(1 << 32)
        assert not link.frontend.iommu
        link.frontend.set_features(DEVICE_FEATURES)
        assert link.frontend.iommu

    def test_negotiating_again_replaces_the_back_end_channel(self, link: Link) -> None:
        link.frontend.negotiate(ALL)
        os.close(link.peer.handler.channel_fd or -1)
        link.frontend.negotiate(ALL)
        assert link.peer.names.count("set_backend_channel") == 2


class TestConfigAndStatus:
    def test_config(self, link: Link) -> None:
        link.frontend.negotiate(ALL)
        assert link.frontend.get_config(3, 5) == bytes(range(3, 8))
        link.frontend.set_config(32, b"\1")
        assert link.calls[-1] == ("set_config", 32, b"\1", 0)

    def test_config_that_the_device_does_not_have(self, link: Link) -> None:
        link.frontend.negotiate(ALL)
        link.peer.handler.error = DeviceError("no such bytes")
        with pytest.raises(RefusedError, match=r"config at 200\+4"):
            link.frontend.get_config(200, 4)
        assert link.frontend.get_config(0, 1) == b"\0"

    def test_status(self, link: Link) -> None:
        link.frontend.negotiate(ALL)
        link.frontend.set_status(7)
        assert link.frontend.get_status() == 7
        link.frontend.reset_device()
        assert link.calls[-1] == ("reset_device",)

    def test_a_refusal_is_an_error_and_the_connection_lives(self, link: Link) -> None:
        link.frontend.negotiate(ALL)
        link.peer.handler.error = DeviceError("not now")
        with pytest.raises(RefusedError, match="SET_STATUS with 0x1"):
            link.frontend.set_status(1)
        link.frontend.set_status(2)
        assert link.frontend.failure is None


class TestMemory:
    def test_one_message_per_region(self, link: Link) -> None:
        link.frontend.negotiate(ALL)
        link.frontend.set_memory(link.guest.memory)
        assert link.peer.names[-2:] == ["add_memory_region", "add_memory_region"]
        regions = [call[1] for call in link.calls[-2:]]
        assert [(r.guest_addr, r.size) for r in regions] == [(0, 0x20000), (1 << 32, 0x10000)]
        assert [r.user_addr for r in regions] == [r.host_address() for r in link.guest.memory]

    def test_only_what_changed_is_sent(self, link: Link) -> None:
        link.frontend.negotiate(ALL)
        link.frontend.set_memory(link.guest.memory)
        smaller, _ = link.guest.memory.remove_region(1 << 32, 0x10000)
        before = len(link.calls)
        link.frontend.set_memory(smaller)
        assert link.peer.names[before:] == ["remove_memory_region"]
        link.frontend.set_memory(link.guest.memory)
        assert link.peer.names[before:] == ["remove_memory_region", "add_memory_region"]

    def test_a_table(self, link: Link) -> None:
        link.frontend.negotiate(ALL)
        link.frontend.set_memory(link.guest.memory, slots=False)
        name, regions = link.calls[-1]
        assert name == "set_memory_table"
        assert [(r.guest_addr, fd) for r, fd in regions] == [(0, "fd"), (1 << 32, "fd")]

    def test_memory_without_a_file_cannot_be_shared(self, link: Link) -> None:
        link.frontend.negotiate(ALL)
        with pytest.raises(ValueError, match="no file behind it"):
            link.frontend.set_memory(GuestRegionCollection.from_ranges([(0, 4096)]))

    def test_user_addresses(self, link: Link) -> None:
        with pytest.raises(InvalidAddressError, match="no memory was shared"):
            link.frontend.user_address(0)
        link.frontend.negotiate(ALL)
        link.frontend.set_memory(link.guest.memory)
        start = link.guest.memory.host_address(1 << 32)
        assert link.frontend.user_address((1 << 32) + 5) == start + 5
        with pytest.raises(InvalidAddressError):
            link.frontend.user_address(0x20000)


class TestQueues:
    LAYOUT = RingLayout(256, 0x1000, 0x2000, 0x3000)

    def test_set_up_in_order_with_user_addresses(self, link: Link) -> None:
        link.frontend.negotiate(NO_PLATFORM)
        link.frontend.set_memory(link.guest.memory)
        before = len(link.calls)
        queue = link.frontend.start_queue(1, self.LAYOUT, base=9)
        user = link.guest.memory.host_address(0)
        assert link.calls[before:] == [
            ("set_vring_num", 1, 256),
            ("set_vring_base", 1, 9),
            ("set_vring_addr", 1, VringAddr(1, 0, user + 0x1000, user + 0x3000, user + 0x2000)),
            ("set_vring_err", 1, "fd"),
            ("set_vring_call", 1, "fd"),
            ("set_vring_kick", 1, "fd"),
            ("set_vring_enable", 1, True),
        ]
        assert queue.index == 1
        link.frontend.enable_queue(1, enable=False)
        assert link.calls[-1] == ("set_vring_enable", 1, False)

    def test_with_an_iommu_the_addresses_are_sent_as_they_are(self, link: Link) -> None:
        link.frontend.negotiate(ALL)
        link.frontend.start_queue(0, self.LAYOUT)
        assert ("set_vring_addr", 0, VringAddr(0, 0, 0x1000, 0x3000, 0x2000)) in link.calls

    def test_polling_on_both_sides_sends_no_fds(self, link: Link) -> None:
        link.frontend.negotiate(ALL)
        queue = link.frontend.start_queue(0, self.LAYOUT, kick=False, call=False)
        assert ("set_vring_kick", 0, None) in link.calls
        assert ("set_vring_call", 0, None) in link.calls
        queue.kick()
        assert not queue.clear_call()
        with pytest.raises(ValueError, match="poll it"):
            queue.wait_call(0)

    def test_stop_returns_the_index_and_closes_the_eventfds(self, link: Link) -> None:
        link.frontend.negotiate(ALL)
        queue = link.frontend.start_queue(0, self.LAYOUT)
        assert queue.kick_fd is not None
        assert link.frontend.stop_queue(0) == link.peer.handler.base
        assert (queue.kick_fd, queue.call_fd, queue.err_fd) == (None, None, None)

    def test_a_ring_outside_memory(self, link: Link) -> None:
        link.frontend.negotiate(NO_PLATFORM)
        link.frontend.set_memory(link.guest.memory)
        with pytest.raises(InvalidAddressError):
            link.frontend.start_queue(0, RingLayout(8, 0x30000, 0, 0x1000))

    def test_a_refused_ring_leaves_no_fds(self, link: Link) -> None:
        link.frontend.negotiate(ALL)
        with nothing_left(), pytest.raises(RefusedError, match="SET_VRING_NUM"):
            link.frontend.start_queue(7, self.LAYOUT)

    def test_notifications(self, link: Link) -> None:
        link.frontend.negotiate(ALL)
        queue = link.frontend.start_queue(0, self.LAYOUT)
        assert queue.call_fd is not None
        assert queue.err_fd is not None
        assert not queue.wait_call(0)
        os.eventfd_write(queue.call_fd, 3)
        assert queue.wait_call(0)
        assert not queue.clear_call()
        assert not queue.failed()
        os.eventfd_write(queue.err_fd, 1)
        assert queue.failed()
        assert not queue.failed()


class TestLifeTime:
    def test_no_listener(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            Frontend(tmp_path / "none")
        began = time.monotonic()
        with pytest.raises(FileNotFoundError):
            Frontend(tmp_path / "none", connect_wait=0.1)
        assert 0.1 <= time.monotonic() - began < 10

    def test_waiting_for_a_listener(self, tmp_path: Path) -> None:
        path = tmp_path / "late"
        with socket.socket(socket.AF_UNIX) as listener:

            def listen() -> None:
                listener.bind(os.fspath(path))
                time.sleep(0.05)
                listener.listen()

            timer = threading.Timer(0.05, listen)
            timer.start()
            Frontend(path, connect_wait=WAIT).close()
            timer.join()

    def test_bad_options_close_the_socket(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            with pytest.raises(ValueError, match="granularity"):
                Frontend(ours, granularity=3)
            assert theirs.recv(1) == b""

    def test_close_is_final_and_may_be_repeated(self, link: Link) -> None:
        link.frontend.negotiate(ALL)
        link.frontend.start_queue(0, RingLayout(8, 0, 0x1000, 0x2000))
        link.frontend.close()
        link.frontend.close()
        with pytest.raises(PeerGoneError):
            link.frontend.sync()

    def test_a_peer_that_never_answers(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, Frontend(ours, timeout=0.05) as frontend:
            with pytest.raises(NoAnswerError, match="GET_FEATURES"):
                frontend.negotiate(ALL)
            with pytest.raises(NoAnswerError):
                frontend.sync()

    def test_a_peer_that_hangs_up(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.close()
        with Frontend(ours) as frontend, pytest.raises(PeerGoneError):
            frontend.negotiate(ALL)

    @pytest.mark.parametrize(
        ("request_code", "reply"),
        [
            (_F.GET_CONFIG, struct.pack("=III4s", 0, 4, 0, b"abcd")),
            (_F.GET_VRING_BASE, VringState(3, 1).encode()),
            (_F.GET_STATUS, b"1234567"),
        ],
    )
    def test_replies_that_answer_something_else(
        self, pool: ThreadPoolExecutor, request_code: int, reply: bytes
    ) -> None:
        ours, theirs = socket.socketpair()
        hand = Hand(theirs)
        calls = {
            _F.GET_CONFIG: lambda f: f.get_config(4, 4),
            _F.GET_VRING_BASE: lambda f: f.stop_queue(0),
            _F.GET_STATUS: lambda f: f.get_status(),
        }
        with Frontend(ours, timeout=WAIT) as frontend:
            call = pool.submit(calls[_F(request_code)], frontend)
            hand.expect(request_code)
            hand.main.send(
                struct.pack("=III", request_code, 0b101, len(reply)) + reply,
            )
            with pytest.raises(ProtocolError):
                call.result(WAIT)
        hand.close()

    def test_any_request_can_be_sent(self, pool: ThreadPoolExecutor) -> None:
        ours, theirs = socket.socketpair()
        hand = Hand(theirs)
        with Frontend(ours, timeout=WAIT) as frontend:
            assert frontend.request(200, b"hello") == b""
            assert hand.expect(200).payload == b"hello"
            call = pool.submit(frontend.request, _F.SET_MEM_TABLE, MemoryTable(()), has_reply=True)
            assert not hand.expect(_F.SET_MEM_TABLE).header.need_reply
            hand.ack(_F.SET_MEM_TABLE, 258)
            assert call.result(WAIT) == bytes([2, 1, 0, 0, 0, 0, 0, 0])
        hand.close()


def test_misses_reach_the_iotlb_service(link: Link) -> None:
    link.frontend.negotiate(ALL)
    link.frontend.set_memory(link.guest.memory)
    link.frontend.iotlb.map(0x5000, 1 << 32, 4096, Permissions.READ)
    fd = link.peer.handler.channel_fd
    assert fd is not None
    with Channel.from_fd(os.dup(fd)) as back_channel:
        ask = IotlbMessage.miss(0x5010, 16, 1)
        back_channel.send(encode_iotlb(BackendRequest.IOTLB_MSG, ask, need_reply=True))
        answer = back_channel.recv(WAIT)
    assert answer is not None
    assert answer.payload == bytes(8)
    name, update = link.calls[-1]
    assert (name, update.type) == ("iotlb", IotlbType.UPDATE)
    assert update[:3] == (0x5000, 4096, link.guest.memory.host_address(1 << 32))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    with storage_daemon(tmp_path_factory.mktemp("daemon")) as disk:
        yield disk


class TestStorageDaemon:
    """QEMU's own back-end."""

    @pytest.mark.parametrize("slots", [False, True])
    def test_read_and_write(self, daemon: Disk, guest: Guest, slots: bool) -> None:
        with Frontend(daemon.socket, connect_wait=WAIT) as frontend:
            frontend.negotiate(NO_PLATFORM)
            (capacity,) = struct.unpack("<Q", frontend.get_config(0, 8))
            assert capacity * 512 == len(daemon.contents)
            frontend.set_memory(guest.memory, slots=slots)
            layout = RingLayout.contiguous(0, 64)
            ring = DriverQueue(guest.memory, layout, event_idx=True)
            queue = frontend.start_queue(0, layout)

            def run(
                readable: list[tuple[int, int]], writable: list[tuple[int, int]]
            ) -> tuple[object, int]:
                ring.add(readable, writable, "token")
                if ring.publish():
                    queue.kick()
                while not ring.enable_interrupts():
                    assert queue.wait_call(WAIT)
                (done,) = ring.collect()
                return done

            head, data = 0x10000, (1 << 32) + 0x4000
            guest.memory.write(head, struct.pack("<IIQ", 0, 0, 8))
            assert run([(head, 16)], [(data, 4096), (head + 16, 1)]) == ("token", 4097)
            assert guest.memory.read(data, 4096) == daemon.contents[4096:8192]
            assert guest.memory.read(head + 16, 1) == b"\0"
            guest.memory.write(head, struct.pack("<IIQ", 1, 0, 16))
            guest.memory.write(data, b"guestio!" * 64)
            assert run([(head, 16), (data, 512)], [(head + 16, 1)])[1] == 1
            assert daemon.image.read_bytes()[8192:8704] == b"guestio!" * 64
            assert frontend.stop_queue(0) == 2
            ring.close()
            frontend.iotlb.memory = None

    def test_it_cannot_do_with_an_iommu(self, daemon: Disk) -> None:
        with Frontend(daemon.socket, connect_wait=WAIT) as frontend:
            assert not frontend.negotiate(ALL) & PLATFORM
            assert not frontend.iommu


class TestInflight:
    TRACKING = int(PROTOCOL_FEATURES | ProtocolFeature.INFLIGHT_SHMFD)

    def test_it_is_negotiated_only_on_request(self, link: Link) -> None:
        link.frontend.negotiate(ALL)
        assert not link.frontend.protocol_features & ProtocolFeature.INFLIGHT_SHMFD

    def test_a_region_goes_there_and_back(self, link: Link) -> None:
        link.frontend.negotiate(ALL, self.TRACKING)
        assert link.frontend.protocol_features == self.TRACKING
        link.calls.clear()
        made, fd = link.frontend.get_inflight(2, 128)
        try:
            assert made == Inflight(4224, 0, 2, 128)
            region = link.peer.handler.region
            assert region is not None
            assert os.path.sameopenfile(fd, region.fd)
            link.frontend.set_inflight(made, fd)
            assert link.calls == [("get_inflight", 2, 128), ("set_inflight", made, "fd")]
        finally:
            os.close(fd)

    def test_none_is_made(self, link: Link) -> None:
        link.frontend.negotiate(ALL, self.TRACKING)
        with pytest.raises(RefusedError, match="no region"):
            link.frontend.get_inflight(3, 128)
        link.peer.handler.error = DeviceError("no")
        with pytest.raises(RefusedError, match="refused SET_INFLIGHT_FD"):
            link.frontend.set_inflight(Inflight(4224, 0, 2, 128), link.frontend.fileno())
        assert link.frontend.queue_count() == 2

    @pytest.mark.parametrize(
        ("reply", "fds"),
        [
            (Inflight(320, 0, 1, 16), 0),
            (Inflight(320, 0, 1, 16), 2),
            (Inflight(320, 0, 2, 16), 1),
            (Inflight(320, 0, 1, 8), 1),
            (VringState(1, 1), 1),
        ],
        ids=repr,
    )
    def test_a_reply_that_makes_no_sense(
        self, pool: ThreadPoolExecutor, reply: Inflight | VringState, fds: int
    ) -> None:
        ours, theirs = socket.socketpair()
        hand = Hand(theirs)
        with Frontend(ours, timeout=WAIT) as frontend:
            asked = pool.submit(frontend.get_inflight, 1, 16)
            hand.expect(_F.GET_INFLIGHT_FD)
            data = encode_message(_F.GET_INFLIGHT_FD, reply, reply=True)
            hand.main.send(data, [hand.main.fileno()] * fds)
            with pytest.raises(ProtocolError):
                asked.result(WAIT)
        hand.close()

    def test_an_fd_that_comes_amid_other_replies(self, pool: ThreadPoolExecutor) -> None:
        """Others wait, and read as far ahead as they can; the fd must reach who asked for it."""
        ours, theirs = socket.socketpair()
        hand = Hand(theirs)
        with Frontend(ours, timeout=WAIT) as frontend:
            syncs = [pool.submit(frontend.sync)]
            hand.expect(_F.GET_FEATURES)
            until(lambda: frontend._exchange._reading)  # who reads expects no fd
            asked = pool.submit(frontend.get_inflight, 1, 16)
            assert hand.silent()
            hand.ack(_F.GET_FEATURES)
            hand.expect(_F.GET_INFLIGHT_FD)
            syncs += [pool.submit(frontend.sync) for _ in range(2)]
            for _ in range(2):
                hand.expect(_F.GET_FEATURES)
            ack = encode_ack(_F.GET_FEATURES, 0)
            hand.main.send(ack)
            data = encode_message(_F.GET_INFLIGHT_FD, Inflight(320, 0, 1, 16), reply=True)
            with Backing.memfd(320) as backing:
                assert backing.fd is not None
                hand.main.send(data + ack, [backing.fd])
                made, fd = asked.result(WAIT)
                assert os.path.sameopenfile(fd, backing.fd)
            os.close(fd)
            for each in syncs:
                each.result(WAIT)
            assert made == Inflight(320, 0, 1, 16)
            # None is expected any more.
            late = pool.submit(frontend.sync)
            hand.expect(_F.GET_FEATURES)
            hand.main.send(ack, [hand.main.fileno()])
            with pytest.raises(ProtocolError, match="without fds"):
                late.result(WAIT)
        hand.close()

    def test_the_reply_does_not_come(self) -> None:
        ours, theirs = socket.socketpair()
        with (
            theirs,
            Frontend(ours, timeout=0.1) as frontend,
            pytest.raises(NoAnswerError, match="GET_INFLIGHT_FD"),
        ):
            frontend.get_inflight(1, 16)
