"""Waiting in the core: plain IOTLB traffic is dealt with there, all else comes back at once."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from guestio._core.intake import Intake
from guestio._core.intervals import IntervalMap
from guestio._core.iotlbwire import IotlbUpdater, Traffic
from guestio._core.questions import PAGE, MissTable
from guestio.addr import IovaRange, Permissions
from guestio.iommu import Iotlb
from guestio.vhost_user.messages import (
    BackendRequest,
    FrontendRequest,
    IotlbMessage,
    encode_ack,
    encode_iotlb,
    encode_message,
)

ACK = 20
USER = 0x7F0000000000
INVALIDATE = encode_iotlb(
    FrontendRequest.IOTLB_MSG, IotlbMessage.invalidate(0, PAGE), need_reply=True
)
UPDATE = encode_iotlb(
    FrontendRequest.IOTLB_MSG, IotlbMessage.update(0x1000, PAGE, USER, 3), need_reply=True
)


class Rig:
    """An intake over two socket pairs and a third that is somebody else's."""

    def __init__(self) -> None:
        users = IntervalMap()
        users.add(USER, PAGE, 0x8000, Permissions.READ_WRITE)
        self.iotlb, self.misses, self.traffic = Iotlb(), MissTable(5), Traffic()
        updater = IotlbUpdater(self.iotlb, users, self.misses, self.traffic)
        self.intake = Intake(updater, self.misses, 20)
        self.pairs = [socket.socketpair() for _ in range(3)]
        (self.main, self.front), (self.back, self.service), (self.other, self.third) = self.pairs
        self.epoll = select.epoll()
        for sock in (self.main, self.back, self.other):
            self.epoll.register(sock, select.EPOLLIN)
        self.intake.main = self.main.fileno()

    def wait(self, seconds: float) -> tuple[list[int], list[int], bytes]:
        fds, ready, unsent, unasked, outcomes = self.intake.wait(self.epoll.fileno(), seconds)
        assert (unasked, outcomes) == (b"", [])
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
    assert (rig.traffic.updates, rig.traffic.invalidations) == (1, 1)
    assert len(rig.front.recv(1000)) == 2 * ACK


def test_an_answer_wakes_who_waited(rig: Rig) -> None:
    rig.misses.ask(7, [(IovaRange(0x1000, 1), 1)], 0.0, acknowledged=True)
    rig.front.sendall(UPDATE)
    assert rig.wait(5) == ([], [7], b"")


def test_answers_are_taken_before_acknowledgements(rig: Rig) -> None:
    """Or else what has just been answered would count as refused."""
    wanted = [(IovaRange(0x1000, 1), 1), (IovaRange(0x5000, 1), 1)]
    rig.misses.ask(7, wanted, 1.0, acknowledged=True)
    assert rig.misses.repeat(2.0)[0]
    rig.service.sendall(2 * encode_ack(BackendRequest.IOTLB_MSG, 1))
    rig.front.sendall(UPDATE)
    assert rig.wait(5) == ([rig.back.fileno()], [], b"")
    whole, refused, _ = rig.misses.receive(rig.back.fileno())
    assert whole
    assert [question.iova for question in refused] == [0x5000]


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
    assert rig.traffic.invalidations == 1
    assert len(rig.main.recv(1000)) == 12, "it is still in the socket"


def test_so_do_other_descriptors_and_sockets_that_are_not_to_be_served(rig: Rig) -> None:
    rig.third.send(b"x")
    assert rig.wait(5)[0] == [rig.other.fileno()]
    rig.other.recv(1)
    rig.intake.main = -1
    rig.front.sendall(INVALIDATE)
    assert rig.wait(5)[0] == [rig.main.fileno()]
    assert rig.traffic.invalidations == 0


def test_a_peer_that_is_gone_comes_back(rig: Rig) -> None:
    rig.front.close()
    assert rig.wait(5)[0] == [rig.main.fileno()]


def test_a_flood_does_not_keep_it(rig: Rig) -> None:
    """Timers and other queues have their turn although there is always one message more."""
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
    assert rig.traffic.invalidations >= 64
    done.set()
    while peer.is_alive():
        rig.wait(0.01)
    peer.join()
