"""The compiled answering of IOTLB misses, against a back-end played in bytes."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Iterator
from mmap import PAGESIZE
from pathlib import Path

import pytest

from guestio._core.base import variant
from guestio.guest._load.iotlb_front import IotlbFront
from guestio.vhost_user.messages import (
    BackendRequest,
    FrontendRequest,
    IotlbMessage,
    IotlbType,
    encode_ack,
    encode_iotlb,
    encode_message,
)

PAGE = 4096
BASE = 0xFEED_0000
HOST = 0x7F00_0000_0000
MESSAGE = struct.Struct("=III32s")
ACK = struct.Struct("=IIIQ")
GONE, PROTOCOL, REFUSED = 1, 2, 3
READ, WRITE = 1, 2


class Peer:
    """A front under test, and the back-end's ends of its two connections."""

    def __init__(self, pages: int = 64, **options: object) -> None:
        self.front, self.main = socket.socketpair()
        self.back, self.back_channel = socket.socketpair()
        for sock in (self.main, self.back_channel):
            sock.setblocking(False)
        self.iotlb = IotlbFront(
            BASE, pages, self.front.fileno(), self.back.fileno(), **options  # type: ignore[arg-type]
        )  # fmt: skip

    def close(self) -> None:
        for sock in (self.front, self.main, self.back, self.back_channel):
            sock.close()

    def ask(self, iova: int, access: int = READ, *, need_reply: bool = True) -> None:
        message = IotlbMessage.miss(iova, PAGE, access)
        self.back_channel.sendall(
            encode_iotlb(BackendRequest.IOTLB_MSG, message, need_reply=need_reply)
        )

    def told(self) -> list[IotlbMessage]:
        """What the back-end was told on its main socket."""
        found = []
        data = _receive(self.main)
        for request, flags, size, body in MESSAGE.iter_unpack(data):
            assert (request, flags, size) == (FrontendRequest.IOTLB_MSG, 1 | 8, 32)
            found.append(IotlbMessage.decode(body))
        return found

    def acknowledge(self, *statuses: int) -> None:
        for status in statuses:
            self.main.sendall(encode_ack(FrontendRequest.IOTLB_MSG, status))

    def answers(self) -> list[int]:
        """What came back on the back-end's channel."""
        found = []
        for request, flags, size, status in ACK.iter_unpack(_receive(self.back_channel)):
            assert (request, flags, size) == (BackendRequest.IOTLB_MSG, 1 | 4, 8)
            found.append(status)
        return found


def _receive(sock: socket.socket) -> bytes:
    data = b""
    while True:
        try:
            part = sock.recv(1 << 20)
        except BlockingIOError:
            return data
        if not part:
            return data
        data += part


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    made.iotlb.map(3, HOST + 7 * PAGE, READ)
    made.iotlb.map(4, HOST + 8 * PAGE, READ)
    made.iotlb.map(5, HOST + 1 * PAGE, READ | WRITE)
    yield made
    made.close()


class TestMisses:
    def test_an_answer_covers_one_page(self, peer: Peer) -> None:
        peer.ask(BASE + 3 * PAGE + 100)
        assert peer.iotlb.exchange() == []
        update = IotlbMessage.update(BASE + 3 * PAGE, PAGE, HOST + 7 * PAGE, READ)
        assert peer.told() == [update]
        assert peer.answers() == []  # not before the UPDATE was acknowledged
        peer.acknowledge(0)
        peer.iotlb.exchange()
        assert peer.answers() == [0]
        assert (peer.iotlb.misses, peer.iotlb.updates, peer.iotlb.refused) == (1, 1, 0)
        assert peer.iotlb.quiet

    def test_one_at_a_time_if_each_is_to_be_acknowledged(self) -> None:
        peer = Peer(each=True)
        for page in range(4):
            peer.iotlb.map(page, HOST + page * PAGE, READ)
            peer.ask(BASE + page * PAGE)
        peer.iotlb.unmap(3, 1, 77)
        kinds, done = [], []
        for _ in range(4):
            done += peer.iotlb.exchange()
            done += peer.iotlb.exchange()
            (message,) = peer.told()
            kinds.append((message.type, (message.iova - BASE) // PAGE))
            peer.acknowledge(0)
        done += peer.iotlb.exchange()
        assert peer.told() == []
        assert kinds == [(IotlbType.INVALIDATE, 3)] + [
            (IotlbType.UPDATE, page) for page in range(3)
        ]
        assert done == [77]
        assert peer.answers() == [0, 0, 0, 1]
        assert peer.iotlb.quiet
        peer.close()

    def test_or_all_that_lies_in_a_row(self) -> None:
        peer = Peer(whole=True)
        for page, host, perm in ((0, 9, 1), (1, 10, 1), (2, 11, 1), (3, 12, 3), (4, 11, 1)):
            peer.iotlb.map(page, HOST + host * PAGE, perm)
        for page in (1, 3, 4):
            peer.ask(BASE + page * PAGE)
        peer.iotlb.exchange()
        assert peer.told() == [
            IotlbMessage.update(BASE, 3 * PAGE, HOST + 9 * PAGE, READ),
            IotlbMessage.update(BASE + 3 * PAGE, PAGE, HOST + 12 * PAGE, READ | WRITE),
            IotlbMessage.update(BASE + 4 * PAGE, PAGE, HOST + 11 * PAGE, READ),
        ]
        peer.close()

    def test_whole_at_both_ends_of_the_window(self) -> None:
        peer = Peer(pages=8, whole=True)
        for page in range(8):
            peer.iotlb.map(page, HOST + page * PAGE, WRITE)
        peer.ask(BASE + 5 * PAGE, WRITE)
        peer.iotlb.exchange()
        assert peer.told() == [IotlbMessage.update(BASE, 8 * PAGE, HOST, WRITE)]
        peer.close()

    @pytest.mark.parametrize(
        ("iova", "access"),
        [
            (BASE, READ),
            (BASE + 3 * PAGE, WRITE),
            (BASE + 3 * PAGE, READ | WRITE),
            (BASE + 64 * PAGE, READ),
            (BASE - 1, READ),
            (0, READ),
            (2**64 - 1, READ),
        ],
    )
    def test_what_is_not_mapped_is_refused(self, peer: Peer, iova: int, access: int) -> None:
        peer.ask(iova, access)
        peer.iotlb.exchange()
        assert peer.told() == []
        (status,) = peer.answers()
        assert status != 0
        assert (peer.iotlb.misses, peer.iotlb.refused) == (1, 1)

    def test_answers_keep_the_order_of_misses(self, peer: Peer) -> None:
        for iova in (BASE + 3 * PAGE, 0, BASE + 4 * PAGE, 1, 2):
            peer.ask(iova)
        peer.iotlb.exchange()
        assert len(peer.told()) == 2
        assert peer.answers() == []
        peer.acknowledge(0)
        peer.iotlb.exchange()
        assert peer.answers() == [0, 1]
        peer.acknowledge(0)
        peer.iotlb.exchange()
        assert peer.answers() == [0, 1, 1]

    def test_a_refused_update_is_a_refused_miss(self, peer: Peer) -> None:
        peer.ask(BASE + 3 * PAGE)
        peer.iotlb.exchange()
        peer.acknowledge(5)
        peer.iotlb.exchange()
        assert peer.answers() == [1]
        assert peer.iotlb.refused == 1

    def test_only_requested_acknowledgements_are_sent(self, peer: Peer) -> None:
        peer.ask(BASE + 3 * PAGE, need_reply=False)
        peer.ask(0, need_reply=False)
        peer.iotlb.exchange()
        assert len(peer.told()) == 1
        peer.acknowledge(0)
        peer.iotlb.exchange()
        assert peer.answers() == []
        assert peer.iotlb.quiet

    def test_messages_may_come_in_pieces(self, peer: Peer) -> None:
        message = IotlbMessage.miss(BASE + 3 * PAGE, PAGE, READ)
        data = encode_iotlb(BackendRequest.IOTLB_MSG, message, need_reply=True)
        for byte in data:
            assert peer.told() == []
            peer.back_channel.send(bytes([byte]))
            peer.iotlb.exchange()
        assert len(peer.told()) == 1
        for byte in encode_ack(FrontendRequest.IOTLB_MSG, 0):
            peer.main.send(bytes([byte]))
            peer.iotlb.exchange()
        assert peer.answers() == [0]

    def test_other_requests_are_answered(self, peer: Peer) -> None:
        def ask(request: int, payload: bytes) -> int:
            peer.back_channel.sendall(encode_message(request, payload, need_reply=True))
            peer.iotlb.exchange()
            got, flags, size, status = ACK.unpack(_receive(peer.back_channel))
            assert (got, flags, size) == (request, 5, 8)
            return int(status)

        assert ask(BackendRequest.CONFIG_CHANGE_MSG, b"") == 0
        assert ask(BackendRequest.VRING_HOST_NOTIFIER_MSG, bytes(24)) == 1
        assert ask(99, b"x" * 4096) == 1
        fail = IotlbMessage(BASE, PAGE, 0, WRITE, IotlbType.ACCESS_FAIL)
        assert ask(BackendRequest.IOTLB_MSG, fail.encode()) == 1
        assert peer.iotlb.access_fails == 1
        assert peer.iotlb.misses == 0

    def test_a_flood_of_questions_is_bounded_and_lost_nowhere(self) -> None:
        """Neither memory nor order suffers when the back-end asks on and on and reads nothing."""
        peer = Peer()
        for page in range(64):
            peer.iotlb.map(page, HOST + page * PAGE, READ)
        for sock in (peer.front, peer.back):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        rng = random.Random(5)
        asked = [rng.randrange(96) for _ in range(20_000)]
        rest = b"".join(
            encode_iotlb(
                BackendRequest.IOTLB_MSG,
                IotlbMessage.miss(BASE + page * PAGE, PAGE, READ),
                need_reply=True,
            )
            for page in asked
        )
        told, answers = b"", b""
        while len(answers) < ACK.size * len(asked):
            if rest:
                try:
                    sent = peer.back_channel.send(rest[:65536])
                    rest = rest[sent:]
                except BlockingIOError:
                    pass
            peer.iotlb.exchange()
            if rng.random() < 0.1:
                told += (data := _receive(peer.main))
                # Whole messages only are acknowledged.
                done = len(told) // MESSAGE.size - (len(told) - len(data)) // MESSAGE.size
                peer.acknowledge(*[0] * done)
                answers += _receive(peer.back_channel)
            assert peer.iotlb.failure is None
        expected = [page for page in asked if page < 64]
        found = [
            (IotlbMessage.decode(body).iova - BASE) // PAGE
            for *_, body in MESSAGE.iter_unpack(told)
        ]
        assert found == expected
        statuses = [status for *_, status in ACK.iter_unpack(answers)]
        assert statuses == [int(page >= 64) for page in asked]
        peer.close()


class TestUnmapping:
    def test_is_told_and_over_when_acknowledged(self, peer: Peer) -> None:
        peer.iotlb.unmap(3, 2, 77)
        peer.ask(BASE + 3 * PAGE)
        assert peer.iotlb.exchange() == []
        assert peer.told() == [IotlbMessage.invalidate(BASE + 3 * PAGE, 2 * PAGE)]
        assert peer.iotlb.invalidations == 0
        assert not peer.iotlb.quiet
        peer.acknowledge(0)
        assert peer.iotlb.exchange() == [77]
        assert peer.answers() == [1]
        assert peer.iotlb.invalidations == 1
        assert peer.iotlb.quiet

    def test_many_are_under_way_at_a_time(self, peer: Peer) -> None:
        for page in range(50):
            peer.iotlb.unmap(page, 1, page)
        peer.iotlb.exchange()
        assert [message.iova for message in peer.told()] == [BASE + n * PAGE for n in range(50)]
        peer.acknowledge(*[0] * 20)
        assert peer.iotlb.exchange() == list(range(20))
        peer.acknowledge(*[0] * 30)
        assert peer.iotlb.exchange() == list(range(20, 50))

    def test_an_update_never_follows_its_invalidation(self, peer: Peer) -> None:
        peer.ask(BASE + 3 * PAGE)
        peer.ask(BASE + 4 * PAGE)
        peer.iotlb.exchange()
        peer.iotlb.unmap(3, 2)
        peer.ask(BASE + 3 * PAGE)
        peer.iotlb.exchange()
        assert [message.type for message in peer.told()] == [
            IotlbType.UPDATE,
            IotlbType.UPDATE,
            IotlbType.INVALIDATE,
        ]

    def test_room_is_limited(self) -> None:
        peer = Peer(room=2)
        peer.iotlb.unmap(0, 1)
        peer.iotlb.unmap(0, 1)
        with pytest.raises(ValueError, match="under way"):
            peer.iotlb.unmap(0, 1)
        peer.iotlb.exchange()
        peer.acknowledge(0)
        peer.iotlb.exchange()
        peer.iotlb.unmap(0, 1)
        peer.close()

    def test_a_refusal_breaks_the_connection(self, peer: Peer) -> None:
        peer.iotlb.unmap(3, 1)
        peer.iotlb.exchange()
        peer.acknowledge(9)
        peer.iotlb.exchange()
        assert peer.iotlb.failure == (REFUSED, 9)

    def test_a_page_can_be_told_before_it_is_asked_for(self, peer: Peer) -> None:
        peer.iotlb.push(5)
        peer.iotlb.exchange()
        assert peer.told() == [IotlbMessage.update(BASE + 5 * PAGE, PAGE, HOST + PAGE, 3)]
        peer.acknowledge(0)
        peer.iotlb.exchange()
        assert peer.answers() == []
        assert (peer.iotlb.updates, peer.iotlb.misses) == (1, 0)
        with pytest.raises(ValueError, match="pushed"):
            peer.iotlb.push(6)


class TestLies:
    @pytest.mark.parametrize(
        "data",
        [
            encode_ack(FrontendRequest.IOTLB_MSG, 0),
            struct.pack("=IIIQ", 21, 5, 8, 0),
            struct.pack("=IIIQ", 22, 1, 8, 0),
            struct.pack("=IIIQ", 22, 6, 8, 0),
            struct.pack("=IIIQ", 22, 5, 9, 0),
            b"\xff" * 20,
        ],
    )
    def test_replies(self, peer: Peer, data: bytes) -> None:
        if data[:1] != b"\x16" or data != encode_ack(FrontendRequest.IOTLB_MSG, 0):
            peer.iotlb.unmap(3, 1)
        peer.main.sendall(data)
        assert peer.iotlb.exchange() == []
        assert peer.iotlb.failure == (PROTOCOL, struct.unpack_from("=I", data)[0])

    @pytest.mark.parametrize(
        "header",
        [(1, 2, 32), (1, 5, 32), (1, 1, 4097), (1, 1, 0xFFFFFFFF), (1, 1, 31), (1 << 24, 1, 0)],
    )
    def test_requests(self, peer: Peer, header: tuple[int, int, int]) -> None:
        peer.back_channel.sendall(struct.pack("=III", *header) + bytes(64))
        peer.iotlb.exchange()
        assert peer.iotlb.failure == (PROTOCOL, header[0])
        assert peer.told() == []

    def test_noise(self) -> None:
        rng = random.Random(11)
        for _ in range(300):
            peer = Peer()
            peer.iotlb.map(1, HOST, READ)
            peer.iotlb.unmap(1, 1)
            for sock in (peer.main, peer.back_channel):
                sock.sendall(rng.randbytes(rng.randrange(200)))
            peer.iotlb.exchange()
            peer.close()

    @pytest.mark.parametrize("which", ["main", "back_channel"])
    def test_a_closed_connection(self, peer: Peer, which: str) -> None:
        getattr(peer, which).close()
        peer.iotlb.unmap(3, 1)
        peer.iotlb.exchange()
        assert peer.iotlb.failure == (GONE, 0)
        assert peer.iotlb.exchange() == []


class TestBorder:
    @pytest.mark.parametrize(
        ("base", "pages", "room"),
        [
            (1, 1, 1),
            (-PAGE, 1, 1),
            (0, 0, 1),
            (2**64 - PAGE, 2, 1),
            (2**64, 1, 1),
            (0, 1 << 41, 1),
            (0, 1, 1 << 21),
            (0, 1, -1),
        ],
    )
    def test_windows(self, base: int, pages: int, room: int) -> None:
        with pytest.raises(ValueError):
            IotlbFront(base, pages, -1, -1, room=room)

    def test_the_last_page_of_all_is_a_window(self) -> None:
        iotlb = IotlbFront(2**64 - PAGE, 1, -1, -1)
        iotlb.map(0, HOST, READ)
        iotlb.unmap(0, 1)

    def test_pages(self, peer: Peer) -> None:
        for page, host, perm in ((64, HOST, 1), (0, HOST + 1, 1), (0, HOST, 0), (-1, HOST, 1)):
            with pytest.raises(ValueError):
                peer.iotlb.map(page, host, perm)
        for page, count in ((0, 0), (64, 1), (0, 65), (63, 2), (2**64 - 1, 2)):
            with pytest.raises(ValueError):
                peer.iotlb.unmap(page, count)

    def test_bad_fds_are_a_failure_and_not_a_crash(self) -> None:
        iotlb = IotlbFront(0, 1, -1, -1)
        assert iotlb.exchange() == []
        assert iotlb.failure is not None
        assert iotlb.failure[0] == 4
        assert os.strerror(iotlb.failure[1]) == "Bad file descriptor"

    @pytest.mark.skipif("asan" in variant.NAME, reason="freed memory waits in quarantine")
    def test_nothing_is_kept(self) -> None:
        def size() -> int:
            return int(Path("/proc/self/statm").read_text().split()[0]) * PAGESIZE

        IotlbFront(0, 1 << 16, -1, -1, room=1 << 12)
        before = size()
        for _ in range(200):
            IotlbFront(0, 1 << 16, -1, -1, room=1 << 12)
        assert size() - before < 16 << 20
