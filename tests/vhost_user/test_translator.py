"""Translations that several threads ask for at once, over real sockets."""

from __future__ import annotations

import math
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import cycle

import pytest

from guestio._core.vhost_user.miss_table import REPEAT_AFTER
from guestio.addr import IovaRange, Permissions
from guestio.errors import IotlbFails
from guestio.vhost_user.backend_channel import BackendChannel
from guestio.vhost_user.channel import Channel
from guestio.vhost_user.memory import SharedMemory
from guestio.vhost_user.messages import (
    BackendRequest,
    FrontendRequest,
    IotlbMessage,
    IotlbType,
    MemoryRegion,
    encode_ack,
    encode_iotlb,
)
from guestio.vhost_user.translator import VhostUserTranslator
from guestio.virtio.loop import EventLoop
from guestio.virtio.statistics import Statistics
from tests.kit.serving import until

PAGE = 4096
USER = 0x7F0000000000
SIZE = 1 << 20
QUEUES = 4
MARKED = 256


class Hesitant(VhostUserTranslator):
    """Every other time that it is to send, others may come first if nothing forbids it."""

    pauses = cycle((0.8 * REPEAT_AFTER, 0.0))

    def _send(self, messages: bytes) -> None:
        time.sleep(next(self.pauses))
        super()._send(messages)


class Counting(VhostUserTranslator):
    """Counts how often it looks for what is late."""

    looks = 0

    def _look(self) -> None:
        self.looks += 1
        super()._look()


def refuses(iova: int) -> bool:
    return iova // PAGE % 7 == 3


class Rig:
    """A translator with a loop in a thread, and a front-end in another that answers in order."""

    def __init__(self, kind: type[VhostUserTranslator] = Hesitant) -> None:
        self.loop, self.stats = EventLoop(), Statistics()
        self.woken = [threading.Event() for _ in range(QUEUES)]
        self.asking = BackendChannel(self.loop, self.stats, lambda: False)
        self.translations = kind(self.loop, self.asking, self.stats, self.wake, self.receive, 5.0)
        memory = os.memfd_create("translations")
        os.truncate(memory, SIZE)
        self.translations._change_memory(
            SharedMemory().adding(MemoryRegion(0, SIZE, USER, 0), memory)
        )
        os.close(memory)
        ours, self.main = socket.socketpair()
        self.channel = Channel(ours)
        self.loop.add_reader(ours.fileno(), self.receive)
        self.translations.serve(self.channel)
        back, theirs = socket.socketpair()
        self.asking.open(back.detach(), acknowledged=True)
        self.back = Channel(theirs, with_fds=False)
        self.asked: list[tuple[int, int, bool]] = []
        self.access_fails = 0
        self.stopping = False
        self.failures: list[BaseException] = []
        self.threads = [threading.Thread(target=self.guarded, args=(self.poll,))]

    def receive(self) -> None:
        self.translations.receive(self.channel)
        self.translations.read_in_core()

    def wake(self, waiters: Iterable[int]) -> None:
        for waiter in waiters:
            self.woken[waiter].set()

    def start(self, *, front_end: bool = True) -> None:
        if front_end:
            self.threads.append(threading.Thread(target=self.guarded, args=(self.answer,)))
        for thread in self.threads:
            thread.start()

    def guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            self.failures.append(error)

    def poll(self) -> None:
        while not self.stopping:
            self.loop.run_once()

    def answer(self) -> None:
        """As QEMU: one after the other, an UPDATE is acknowledged before its miss is."""
        self.main.settimeout(10)
        while not self.stopping:
            message = self.back.recv(0.05)
            if message is None:
                continue
            iotlb = IotlbMessage.decode(message.payload)
            if iotlb.type == IotlbType.ACCESS_FAIL:
                self.access_fails += 1
                continue
            self.asked.append((iotlb.iova, iotlb.perm, message.header.need_reply))
            if not refuses(iotlb.iova):
                update = IotlbMessage.update(iotlb.iova, PAGE, USER + iotlb.iova % SIZE, 3)
                self.main.sendall(encode_iotlb(FrontendRequest.IOTLB_MSG, update, need_reply=True))
                assert len(self.main.recv(20, socket.MSG_WAITALL)) == 20
            if message.header.need_reply:
                self.back.send(encode_ack(BackendRequest.IOTLB_MSG, refuses(iotlb.iova)))

    def known(self, iova: int) -> bool:
        try:
            self.translations.iotlb.lookup(iova, 1, Permissions.READ)
        except IotlbFails:
            return False
        return True

    def learn(self, waiter: int, wanted: list[int]) -> None:
        """Ask for pages until each is known or refused."""
        refused = self.translations.refused(waiter)
        deadline = time.monotonic() + 20
        while missing := [
            (IovaRange(iova, 8), 1)
            for iova in wanted
            if (iova, 1) not in refused and not self.known(iova)
        ]:
            assert time.monotonic() < deadline, f"{missing} is never told"
            self.woken[waiter].clear()
            self.translations.request(waiter, missing)
            while self.translations._misses.awaited(waiter):
                assert self.woken[waiter].wait(10), "it was not woken"
                self.woken[waiter].clear()
        for iova in wanted:
            assert ((iova, 1) in refused) == refuses(iova)
        refused.clear()

    def run_queue(self, waiter: int, rounds: int) -> None:
        """Ask for pages, some of which others need as well."""
        rng = random.Random(waiter)
        for i in range(rounds):
            wanted = [PAGE * rng.randrange(64 * i, 64 * i + 96) for _ in range(24)]
            self.learn(waiter, wanted)
            forbidden = [(IovaRange(wanted[0], 8), 2)]
            self.translations.report_failed(forbidden, forbidden)
            if i % 5 == 4:
                self.translations.request(waiter, [(IovaRange(1 << 40, 8), 1)])
                self.translations.forget(waiter)
                assert self.translations._misses.awaited(waiter) == 0

    def close(self) -> None:
        self.stopping = True
        self.loop.wake()
        for thread in self.threads:
            if thread.ident is not None:
                thread.join()
        self.translations.close()
        self.channel.close()
        self.main.close()
        self.back.close()
        self.loop.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


def run_together(rig: Rig, calls: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=rig.guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rig.failures == []


def test_several_threads_ask(rig: Rig) -> None:
    """Each learns what is true of its pages, and what others do does not disturb it."""
    rig.start()
    rounds = 25
    run_together(rig, [partial(rig.run_queue, waiter, rounds) for waiter in range(QUEUES)])
    until(lambda: rig.access_fails == QUEUES * rounds)
    assert rig.stats.access_fails == QUEUES * rounds
    assert rig.stats.iotlb_timeouts == 0
    until(lambda: rig.stats.iotlb_misses == len(rig.asked))


def test_what_two_threads_ask_is_sent_in_the_order_of_the_table(rig: Rig) -> None:
    """Or else an acknowledgement is taken for that of another miss.

    Each asks for so much that its last miss is acknowledged; one of these is refused.
    """
    rig.start()
    begin = threading.Barrier(2)

    def ask(waiter: int) -> None:
        for i in range(8):
            pages = [page for page in range(2000 * i, 2000 * i + 1000) if page % 7 != 3]
            first = (1 << 20) * waiter
            last = [7 * 2000 * (i + 1) + 3] if waiter else []
            chosen = pages[: MARKED - len(last)] + last
            begin.wait(10)
            rig.learn(waiter, [(7 * first + page) * PAGE for page in chosen])

    run_together(rig, [partial(ask, 0), partial(ask, 1)])
    assert rig.stats.iotlb_timeouts == 0
    assert rig.stats.iotlb_refused == 8


def test_a_channel_that_another_thread_finds_gone_is_closed_by_the_loop(rig: Rig) -> None:
    rig.start(front_end=False)
    channel = rig.asking._channel
    assert channel is not None
    rig.back.close()
    for i in range(3):
        rig.translations.request(0, [(IovaRange(i * PAGE, 8), 1)])
    until(lambda: channel.fileno() == -1)
    rig.translations.request(1, [(IovaRange(0x100000, 8), 1)])
    assert rig.translations._misses.awaited(1) == 1
    # With a new one every waiter requests again.
    ours, theirs = socket.socketpair()
    with Channel(theirs, with_fds=False) as back:
        rig.loop.call_soon_threadsafe(lambda: rig.asking.open(ours.detach(), acknowledged=True))
        for waiter in (0, 1):
            assert rig.woken[waiter].wait(5)
        rig.translations.request(1, [(IovaRange(0x100000, 8), 1)])
        message = back.recv(5)
        assert message is not None
        assert IotlbMessage.decode(message.payload) == IotlbMessage.miss(0x100000, PAGE, 1)
    assert rig.failures == []


def test_the_time_is_watched_only_while_something_is_open() -> None:
    """And then not for each miss: a look is due every few milliseconds at most."""
    rig = Rig(Counting)
    rig.start()
    try:
        assert isinstance(rig.translations, Counting)
        started = time.monotonic()
        for i in range(300):
            if not refuses(i * PAGE):
                rig.learn(0, [i * PAGE])
        looks = rig.translations.looks
        assert looks <= (time.monotonic() - started) / REPEAT_AFTER + 1
        until(lambda: rig.loop._due == math.inf)
        looks = rig.translations.looks
        time.sleep(10 * REPEAT_AFTER)
        assert rig.translations.looks == looks
    finally:
        rig.close()
    assert rig.failures == []


def test_a_question_of_another_thread_is_asked_again_by_the_loop() -> None:
    """Although that thread sleeps with nothing to wake it up."""
    rig = Rig(VhostUserTranslator)
    rig.start(front_end=False)
    try:
        time.sleep(0.05)
        rig.translations.request(0, [(IovaRange(0, 8), 1)])
        marks = []
        for _ in range(2):
            message = rig.back.recv(5)
            assert message is not None
            marks.append(message.header.need_reply)
        assert marks == [False, True]
        rig.back.send(encode_ack(BackendRequest.IOTLB_MSG, 1))
        until(lambda: rig.translations.refused(0) == {(0, 1)})
        assert rig.woken[0].wait(5)
    finally:
        rig.close()
    assert rig.failures == []


def test_an_answer_is_under_way_if_it_is_about_the_last_page(rig: Rig) -> None:
    """A request's status is its last byte, so it is the end of a range that counts."""
    where = IovaRange(8 * PAGE + 0x800, 2 * PAGE)  # three pages
    rig.translations.request(0, [(IovaRange(8 * PAGE, 8), 2), (IovaRange(9 * PAGE, 8), 2)])
    assert not rig.translations.under_way(where, 2)
    rig.translations.request(1, [(IovaRange(10 * PAGE, 8), 2)])
    assert rig.translations.under_way(where, 2)
    assert not rig.translations.under_way(where._replace(length=PAGE // 2), 1)
    rig.translations.forget(1)
    assert rig.translations.under_way(IovaRange(10 * PAGE - 1, 1), 2)


def test_what_was_refused_ends_with_the_stop(rig: Rig) -> None:
    """Nothing of it is left for the next descriptor of that number."""
    rig.translations.refused(0).add((8 * PAGE, 1))
    rig.translations.refused(1).add((8 * PAGE, 1))
    rig.translations.forget(0)
    assert rig.translations.refused(0) == set()
    assert rig.translations.refused(1) == {(8 * PAGE, 1)}
