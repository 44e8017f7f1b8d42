"""The event loop in C: plain messages and kicks are handled there, all else is returned at once."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from guestio._core.iommu.intervals import IntervalMap
from guestio._core.memory.image import ImageFile
from guestio._core.vhost_user.iotlb_feed import IotlbFeed, IotlbUpdater
from guestio._core.vhost_user.miss_table import PAGE, MissTable
from guestio._core.virtio.block_server import BlockServer
from guestio._core.virtio.counters import Counters
from guestio._core.virtio.loop import ActiveQueue, CoreLoop
from guestio.addr import IovaRange, Permissions
from guestio.errors import QueueError
from guestio.iommu import Iotlb
from guestio.vhost_user.messages import (
    BackendRequest,
    FrontendRequest,
    IotlbMessage,
    IotlbType,
    encode_ack,
    encode_iotlb,
    encode_message,
)
from guestio.virtio.blk import S_OK, T_FLUSH, T_IN
from tests.kit.rings import WRITE, Desc, Tables
from tests.kit.serving import WAIT

ACK = 20
USER = 0x7F0000000000
MEMORY, SIZE = 0x7E0000000000, 0x80000
"""Where the front-end has all of the guest's memory."""
INVALIDATE = encode_iotlb(
    FrontendRequest.IOTLB_MSG, IotlbMessage.invalidate(0, PAGE), need_reply=True
)
UPDATE = encode_iotlb(
    FrontendRequest.IOTLB_MSG, IotlbMessage.update(0x1000, PAGE, USER, 3), need_reply=True
)


class Rig:
    """A loop and a feed over two socket pairs, and a third pair of another reader.

    Args:
        iotlb: What it keeps up to date.
        patience: Seconds that a request may wait for translations in all.
    """

    def __init__(self, iotlb: Iotlb | None = None, patience: float = 20) -> None:
        users = IntervalMap()
        users.add(USER, PAGE, 0x8000, Permissions.READ_WRITE)
        users.add(MEMORY, SIZE, 0, Permissions.READ_WRITE)
        self.iotlb = Iotlb() if iotlb is None else iotlb
        self.misses, self.counters = MissTable(5), Counters()
        updater = IotlbUpdater(self.iotlb._map, users, self.misses, self.counters)
        self.feed = IotlbFeed(lambda: None, patience, updater, self.misses, self.counters)
        self.core = CoreLoop()
        self.core.add_feed(self.feed)
        self.pairs = [socket.socketpair() for _ in range(3)]
        (self.main, self.front), (self.back, self.service), (self.other, self.third) = self.pairs
        self.epoll = select.epoll()
        for sock in (self.main, self.back, self.other):
            self.epoll.register(sock, select.EPOLLIN)
        self.feed.main = self.main.fileno()

    def wait(self, seconds: float) -> tuple[list[int], list[int], bytes]:
        fds, feeds, outcomes = self.core.wait(self.epoll.fileno(), seconds)
        unsent, unrequested = self.feed.take_unsent()
        ready = self.feed.take_ready()
        assert (unrequested, outcomes) == (b"", [])
        assert bool(feeds) == bool(unsent or ready)
        return fds, ready, unsent

    def close(self) -> None:
        self.epoll.close()
        for pair in self.pairs:
            for sock in pair:
                sock.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


def test_plain_messages_are_applied_and_acknowledged_without_coming_back(rig: Rig) -> None:
    rig.front.sendall(UPDATE + INVALIDATE)
    assert rig.wait(0.05) == ([], [], b"")
    assert (rig.counters.updates, rig.counters.invalidations) == (1, 1)
    assert len(rig.front.recv(1000)) == 2 * ACK


def test_an_answer_wakes_who_waited(rig: Rig) -> None:
    rig.misses.request(7, [(IovaRange(0x1000, 1), 1)], 0.0, acknowledged=True)
    rig.front.sendall(UPDATE)
    assert rig.wait(5) == ([], [7], b"")


def test_answers_are_taken_before_acknowledgements(rig: Rig) -> None:
    """Or else what has just been answered would count as refused."""
    wanted = [(IovaRange(0x1000, 1), 1), (IovaRange(0x5000, 1), 1)]
    rig.misses.request(7, wanted, 1.0, acknowledged=True)
    assert rig.misses.repeat(2.0)[0]
    rig.service.sendall(2 * encode_ack(BackendRequest.IOTLB_MSG, 1))
    rig.front.sendall(UPDATE)
    assert rig.wait(5) == ([rig.back.fileno()], [], b"")
    whole, refused, _ = rig.misses.receive(rig.back.fileno())
    assert whole
    assert [miss.iova for miss in refused] == [0x5000]


def test_the_main_channel_is_the_first_to_be_served(rig: Rig) -> None:
    """Answers may lie there that take the session."""
    rig.service.send(b"x")
    rig.third.send(b"x")
    rig.front.sendall(encode_message(FrontendRequest.GET_FEATURES))
    fds, *_ = rig.wait(5)
    assert fds[0] == rig.main.fileno()
    assert sorted(fds) == sorted(sock.fileno() for sock in (rig.main, rig.back, rig.other))


def test_what_is_not_plain_comes_back(rig: Rig) -> None:
    rig.front.sendall(INVALIDATE + encode_message(FrontendRequest.GET_FEATURES))
    assert rig.wait(5)[0] == [rig.main.fileno()]
    assert rig.counters.invalidations == 1
    assert len(rig.main.recv(1000)) == 12, "it is still in the socket"


def test_so_do_other_descriptors_and_sockets_that_are_not_to_be_served(rig: Rig) -> None:
    rig.third.send(b"x")
    assert rig.wait(5)[0] == [rig.other.fileno()]
    rig.other.recv(1)
    rig.feed.main = -1
    rig.front.sendall(INVALIDATE)
    assert rig.wait(5)[0] == [rig.main.fileno()]
    assert rig.counters.invalidations == 0


def test_a_peer_that_is_gone_comes_back(rig: Rig) -> None:
    rig.front.close()
    assert rig.wait(5)[0] == [rig.main.fileno()]


def test_a_flood_does_not_keep_it(rig: Rig) -> None:
    """Timers and other queues are served although there is always one message more."""
    done = threading.Event()

    def flood() -> None:
        rig.front.settimeout(10)
        while not done.is_set():
            rig.front.sendall(INVALIDATE)
            if not done.is_set():
                rig.front.recv(ACK)

    peer = threading.Thread(target=flood)
    peer.start()
    started = time.monotonic()
    assert rig.wait(-1) == ([], [], b"")
    assert time.monotonic() - started < 10
    assert rig.counters.invalidations >= 64
    done.set()
    while peer.is_alive():
        rig.wait(0.01)
    peer.join()


WAITER = 3
DESC, AVAIL, USED = 0x10000, 0x20000, 0x30000
SOURCE, ANSWER = 0x40000, 0x50000
RING = 512
IMAGE = bytes(range(256)) * 2


class Queue(Rig):
    """An intake that attends a ring behind an IOMMU and serves it from an image of one sector.

    The ring and the sources of requests are known; where their answers go has to be asked for.
    """

    def __init__(self, patience: float = 20) -> None:
        self.tables = Tables(SIZE)
        super().__init__(self.tables.iotlb, patience)
        self.ring = self.tables.rig(size=RING, desc=DESC, avail=AVAIL, used=USED)
        for known, length in ((DESC, 16 * RING), (AVAIL, 2 * RING), (USED, 8 * RING)):
            self.tables.tell(known, length + 6)
        self.tables.tell(SOURCE, PAGE)
        self.tables.map(ANSWER, PAGE)
        self.image = os.memfd_create("image")
        os.write(self.image, IMAGE)
        self.kick, self.call = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        self.epoll.register(self.kick, select.EPOLLIN | select.EPOLLET)
        self.feed.back = self.back.fileno()
        server = BlockServer(ImageFile(self.image, len(IMAGE)))
        self.active = ActiveQueue(
            self.ring.ring,
            server,
            self.kick,
            self.call,
            feed=self.feed,
            waiter=WAITER,
            counters=self.counters,
            callback=lambda _: None,
        )
        self.core.add(self.active)
        self.service.setblocking(False)

    def put(self, kind: int, head: int = 0, room: int = len(IMAGE)) -> int:
        """Lay a request out; its head."""
        source = SOURCE + 16 * head
        self.tables.write(source, struct.pack("<IIQ", kind, 0, 0))
        return self.ring.put_chain(head, Desc(source, 16), Desc(ANSWER, room + 1, WRITE))

    def announce(self, *heads: int) -> None:
        """Make requests available and say so."""
        self.ring.offer(*heads)
        os.eventfd_write(self.kick, 1)

    def tell(self, length: int) -> None:
        """Answer about the first bytes of the page that answers are written to."""
        user = MEMORY + self.tables.pages[ANSWER]
        update = IotlbMessage.update(ANSWER, length, user, Permissions.READ_WRITE)
        self.front.sendall(encode_iotlb(FrontendRequest.IOTLB_MSG, update, need_reply=True))
        assert self.wait(0) == ([], [], b"")
        assert len(self.front.recv(1000)) == ACK

    def sent_miss(self) -> IotlbMessage | None:
        """What was asked on the back-end channel."""
        try:
            return IotlbMessage.decode(self.service.recv(1000)[12:])
        except BlockingIOError:
            return None

    def close(self) -> None:
        super().close()
        for fd in (self.image, self.kick, self.call):
            os.close(fd)


class TestActiveQueue:
    @pytest.fixture
    def queue(self) -> Iterator[Queue]:
        made = Queue()
        yield made
        made.close()

    def test_is_served_without_coming_back(self, queue: Queue) -> None:
        queue.tables.tell(ANSWER, PAGE)
        head = queue.put(T_IN)
        for lap in range(1, 4):
            queue.tables.write(ANSWER, bytes(len(IMAGE)) + b"\xee")
            queue.announce(head)
            assert queue.wait(0) == ([], [], b"")
            assert queue.tables.read(ANSWER, len(IMAGE) + 1) == IMAGE + bytes([S_OK])
            assert queue.ring.used_entry(lap - 1) == (head, len(IMAGE) + 1)
            assert queue.ring.used_idx == lap
            assert os.eventfd_read(queue.call) == 1
            assert queue.counters.requests == lap
        assert queue.sent_miss() is None

    def test_what_its_server_leaves_comes_back_and_it_is_left(self, queue: Queue) -> None:
        queue.tables.tell(ANSWER, PAGE)
        queue.announce(queue.put(T_IN, 0), queue.put(T_FLUSH, 2, room=0))
        fds, feeds, outcomes = queue.core.wait(queue.epoll.fileno(), 5)
        assert (fds, feeds) == ([], [])
        ((active, outcome),) = outcomes
        assert active is queue.active
        assert isinstance(outcome, tuple)
        (chain,), misses, served, idle = outcome
        assert (chain.head, len(misses), served, idle) == (2, 0, 1, False)
        assert queue.counters.requests == 0, "the thread that takes over counts it"
        # Kicks are for the thread that took over.
        os.eventfd_write(queue.kick, 1)
        assert queue.wait(5) == ([queue.kick], [], b"")

    def test_a_broken_ring_comes_back_as_its_error(self, queue: Queue) -> None:
        queue.ring.set_avail_idx(0x1234)
        os.eventfd_write(queue.kick, 1)
        *_, outcomes = queue.core.wait(queue.epoll.fileno(), 5)
        ((active, error),) = outcomes
        assert active is queue.active
        assert isinstance(error, QueueError)
        os.eventfd_write(queue.kick, 1)
        assert queue.wait(5) == ([queue.kick], [], b""), "it is active no more"

    def test_a_miss_is_asked_and_its_answer_goes_on_within(self, queue: Queue) -> None:
        queue.announce(queue.put(T_IN))
        assert queue.wait(0) == ([], [], b"")
        miss = queue.sent_miss()
        assert miss is not None
        assert (miss.type, miss.iova) == (IotlbType.MISS, ANSWER)
        assert miss.perm == Permissions.WRITE
        assert (queue.ring.used_idx, queue.counters.misses) == (0, 1)
        queue.tell(PAGE)
        assert queue.ring.used_idx == 1
        assert queue.tables.read(ANSWER, len(IMAGE) + 1) == IMAGE + bytes([S_OK])
        assert queue.counters.misses == 1

    def test_a_miss_without_a_watched_deadline_comes_back(self, queue: Queue) -> None:
        """The alarm is to be set first."""
        queue.feed.look_after = 1
        queue.announce(queue.put(T_IN))
        *_, outcomes = queue.core.wait(queue.epoll.fileno(), 5)
        ((_, outcome),) = outcomes
        assert isinstance(outcome, tuple)
        assert [where for where, _ in outcome[1]] == [IovaRange(ANSWER, len(IMAGE) + 1)]
        assert queue.sent_miss() is None

    def test_patience_with_answers_that_never_fit(self) -> None:
        patience = 0.05
        queue = Queue(patience)
        started = time.monotonic()
        queue.announce(queue.put(T_IN))
        misses = 0
        while True:
            *_, outcomes = queue.core.wait(queue.epoll.fileno(), 0.001)
            if outcomes:
                break
            if queue.sent_miss() is not None:
                misses += 1
                user = MEMORY + queue.tables.pages[ANSWER]
                update = IotlbMessage.update(ANSWER, 2, user, Permissions.READ_WRITE)
                queue.front.sendall(
                    encode_iotlb(FrontendRequest.IOTLB_MSG, update, need_reply=True)
                )
            assert time.monotonic() - started < WAIT
        assert time.monotonic() - started >= patience
        assert misses > 1
        ((active, outcome),) = outcomes
        assert active is queue.active
        assert isinstance(outcome, tuple)
        chains, misses, served, _ = outcome
        assert (chains, len(misses), served) == ([], 1, 0)
        queue.close()

    def test_a_busy_one_comes_back_for_others_to_have_their_turn(self, queue: Queue) -> None:
        queue.tables.tell(ANSWER, PAGE)
        head = queue.put(T_IN)
        queue.announce(*[head] * 300)
        *_, outcomes = queue.core.wait(queue.epoll.fileno(), 5)
        assert outcomes == [(queue.active, None)]
        assert queue.ring.used_idx == queue.counters.requests == 256
