"""Runs of IOTLB messages, plain and not, as the core takes them, against one at a time.

The core must apply exactly those at the start that are plain, acknowledge each, leave the rest in
the socket, and change the IOTLB as the public calls do; a miss stays open as long as nothing
of its page came with what was asked for. A part may be all that a request needs.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import NamedTuple

from guestio import Iotlb, IotlbFails, IovaRange, Permissions
from guestio._core.iommu.intervals import IntervalMap
from guestio._core.vhost_user.iotlb_feed import IotlbUpdater
from guestio._core.vhost_user.miss_table import PAGE, MissTable
from guestio._core.virtio.counters import Counters
from guestio.vhost_user.messages import FrontendRequest
from tests.fuzz.choices import Choices

MAX_STEPS = 30
USERS = ((0x7F0000000000, 0x40000, 0), (0x7F0000100000, 0x1000, 0x80000))
"""Where the front-end has memory: its own address, length, guest address."""
SPACE = 1 << 64
ACK = 20
UPDATE, INVALIDATE = 2, 3
EDGES = (0, 1, 0xFFF, PAGE, 0x7F000003F000, 0x7F0000040000, 1 << 63, SPACE - PAGE, SPACE - 1)


class Sent(NamedTuple):
    """The fields of a message, in the order in which they are packed."""

    request: int
    flags: int
    size: int
    iova: int
    length: int
    user: int
    perm: int
    kind: int

    def encode(self) -> bytes:
        return struct.pack("<IIIQQQBB6x", *self)


class Run:
    """An updater and what is compared with it.

    Args:
        rng: What decides.
    """

    def __init__(self, rng: Choices, ours: socket.socket, theirs: socket.socket) -> None:
        self.rng, self.ours, self.theirs = rng, ours, theirs
        users = IntervalMap()
        for start, length, guest in USERS:
            users.add(start, length, guest, Permissions.READ_WRITE)
        self.iotlb, self.model = Iotlb(), Iotlb()
        self.misses, self.counters = MissTable(5), Counters()
        self.updater = IotlbUpdater(self.iotlb._map, users, self.misses, self.counters)
        self.asked: dict[tuple[int, int], set[int]] = {}

    def message(self) -> Sent:
        rng = self.rng
        if rng.randrange(6):
            iova = rng.randrange(64) * PAGE
            length = PAGE * rng.choice((1, 1, 1, 2, 16))
            start, size, _ = rng.choice((USERS[0], USERS[0], USERS[1]))
            user = start + rng.randrange(size // PAGE) * PAGE
        else:
            iova, length, user = (rng.choice((*EDGES, rng.getrandbits(64))) for _ in range(3))
        kind = rng.choice((UPDATE, UPDATE, INVALIDATE, INVALIDATE, rng.getrandbits(8)))
        perm = rng.choice((3, 3, 1, 2, 0, rng.getrandbits(8)))
        request, flags, size = FrontendRequest.IOTLB_MSG, rng.choice((1, 9)), 32
        match rng.randrange(24):
            case 0:
                request = rng.getrandbits(32)
            case 1:
                flags = rng.getrandbits(32)
            case 2:
                size = rng.choice((0, 31, 33, 1 << 31))
        return Sent(request, flags, size, iova, length, user, perm, kind)

    def target(self, sent: Sent) -> int | None:
        """Where a plain UPDATE leads to."""
        for start, length, guest in USERS:
            if start <= sent.user and sent.user + sent.length <= start + length:
                return guest + sent.user - start
        return None

    def plain(self, sent: Sent, held: tuple[int, int] | None) -> bool:
        if (sent.request, sent.size, sent.flags & 7) != (FrontendRequest.IOTLB_MSG, 32, 1):
            return False
        if not sent.length or sent.iova + sent.length > SPACE:
            return False
        if held is not None and held[0] < sent.iova + sent.length and sent.iova < sum(held):
            return False
        if sent.kind == UPDATE:
            return sent.perm <= 3 and self.target(sent) is not None
        return sent.kind == INVALIDATE

    def apply(self, sent: Sent) -> None:
        if sent.kind == INVALIDATE:
            self.model.invalidate_mapping(sent.iova, sent.length)
            return
        target = self.target(sent)
        assert target is not None
        self.model.set_mapping(sent.iova, target, sent.length, Permissions(sent.perm))

    def request(self) -> None:
        waiter = self.rng.randrange(3)
        page, access = self.rng.randrange(64) * PAGE, self.rng.randrange(1, 4)
        self.misses.request(waiter, [(IovaRange(page, PAGE), access)], 0, acknowledged=False)

    def receive(self, held: tuple[int, int] | None = None) -> None:
        messages = [self.message() for _ in range(self.rng.choice((1, 2, 3, 8, 40)))]
        data = b"".join(sent.encode() for sent in messages)
        data = data[: len(data) - self.rng.choice((0, 0, 0, 1, 43))]
        self.theirs.send(data)
        whole = messages[: len(data) // 44]
        count = next((i for i, sent in enumerate(whole) if not self.plain(sent, held)), len(whole))
        watched = [(page * PAGE, access) for page in range(64) for access in (1, 2, 3)]
        was_open = [key for key in watched if self.misses.is_open(*key)]
        rest = whole[:count]
        while True:  # a build with a small buffer needs several calls
            taken, unsent, _ = self.updater.receive(self.ours.fileno())
            assert unsent == b""
            assert taken <= len(rest)
            if not taken:
                break
            acks = self.theirs.recv(1 << 16)
            assert acks == struct.pack("<IIIQ", FrontendRequest.IOTLB_MSG, 5, 8, 0) * taken
            for sent in rest[:taken]:
                self.apply(sent)
            del rest[:taken]
        assert not rest, "a plain message was not taken"
        self.check(data[count * 44 :])
        for page, access in was_open:
            given = 0
            for sent in whole[:count]:
                touched = sent.iova < page + PAGE and page < sent.iova + sent.length
                if sent.kind == UPDATE and touched:
                    given |= sent.perm
            if not given & access:
                assert self.misses.is_open(page, access)

    def check(self, left: bytes) -> None:
        self.iotlb._map.check()
        assert list(self.iotlb) == list(self.model)
        self.ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            assert self.ours.recv(1 << 16) == left
            left = b""
        assert left == b""


def fuzz(data: bytes) -> None:
    """Runs of messages, some while a translation is used, and misses between them."""
    rng = Choices(data)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        run = Run(rng, ours, theirs)
        for _ in range(MAX_STEPS):
            if not rng.left:
                break
            match rng.randrange(5):
                case 0:
                    run.request()
                case 1:
                    held = rng.randrange(64) * PAGE, PAGE
                    with contextlib.suppress(IotlbFails):
                        run.iotlb.lookup(*held, Permissions.READ)
                        with run.iotlb.guard(*held, Permissions.READ):
                            run.receive(held)
                case _:
                    run.receive()
