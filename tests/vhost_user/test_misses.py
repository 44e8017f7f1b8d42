"""Pending misses: what is requested, who waits, and what every kind of answer means."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import pytest

from guestio._core.iommu.intervals import IntervalMap
from guestio._core.iommu.misses import touched
from guestio._core.vhost_user.iotlb_feed import IotlbUpdater
from guestio._core.vhost_user.miss_table import (
    MAX_OUTSTANDING,
    PAGE,
    REPEAT_AFTER,
    MissTable,
    PendingMiss,
)
from guestio._core.virtio.counters import Counters
from guestio.addr import IovaRange, Permissions
from guestio.iommu import Iotlb
from guestio.vhost_user.messages import (
    BackendRequest,
    FrontendRequest,
    Header,
    IotlbMessage,
    IotlbType,
    decode_ack,
    encode_ack,
    encode_iotlb,
    encode_message,
)

R, W, RW = 1, 2, 3
TOP = 2**64
HEADER, MESSAGE = 12, 44
BATCH = MAX_OUTSTANDING // 2


def need(base: int, length: int = 1, access: int = R) -> tuple[IovaRange, int]:
    return IovaRange(base, length), access


def pages(count: int, first: int = 0x100000, access: int = R) -> list[tuple[IovaRange, int]]:
    return [need(first + i * PAGE, 1, access) for i in range(count)]


def decode(data: bytes) -> list[tuple[int, int, bool]]:
    """The pages that messages ask for and who is to be acknowledged; each is checked whole."""
    found = []
    for at in range(0, len(data), MESSAGE):
        one = data[at : at + MESSAGE]
        header = Header.decode(one[:HEADER])
        message = IotlbMessage.decode(one[HEADER:])
        expected = IotlbMessage.miss(message.iova, PAGE, message.perm)
        need_reply = header.need_reply
        assert one == encode_iotlb(BackendRequest.IOTLB_MSG, expected, need_reply=need_reply)
        assert header.request == BackendRequest.IOTLB_MSG
        found.append((message.iova, message.perm, need_reply))
    return found


def is_marked(i: int) -> bool:
    """Whether a miss is acknowledged in any case, of many that are asked of a new table."""
    return i % BATCH == BATCH - 1


def acks(*values: int) -> bytes:
    return b"".join(encode_ack(BackendRequest.IOTLB_MSG, value) for value in values)


@contextlib.contextmanager
def arrived(data: bytes) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A socket at which data has arrived, and its peer."""
    here, there = socket.socketpair()
    with here, there:
        here.setblocking(False)
        there.setblocking(False)
        there.sendall(data)
        yield here, there


def left(sock: socket.socket) -> int:
    """How many bytes wait at a socket."""
    try:
        return len(sock.recv(1 << 20))
    except BlockingIOError:
        return 0


def take_acks(table: MissTable, data: bytes) -> tuple[int, bool, list[PendingMiss], list[int]]:
    """What becomes of acknowledgements that arrive; first how many bytes were taken."""
    with arrived(data) as (here, _):
        whole, refused, ready = table.receive(here.fileno())
        return len(data) - left(here), whole, refused, ready


def take_updates(updater: IotlbUpdater, data: bytes) -> tuple[int, bytes, list[int]]:
    """What becomes of messages that arrive: bytes taken, acknowledgements, who may go on."""
    with arrived(data) as (here, there):
        taken, unsent, ready = updater.receive(here.fileno())
        assert unsent == b""
        assert left(here) == len(data) - taken * MESSAGE
        try:
            replies = there.recv(1 << 16)
        except BlockingIOError:
            replies = b""
        return taken * MESSAGE, replies, ready


class Table:
    """A table with a clock of its own, and short names."""

    def __init__(self, time_limit: float = 5.0) -> None:
        self.table = MissTable(time_limit)
        self.now = 100.0
        self.unmarked = 0

    def request(
        self,
        waiter: int,
        *missing: tuple[IovaRange, int],
        acknowledged: bool = True,
        skip: tuple[tuple[int, int], ...] = (),
    ) -> list[tuple[int, int]]:
        data = self.table.request(waiter, missing, self.now, acknowledged=acknowledged, skip=skip)
        asked = decode(data)
        for _, _, marked in asked:
            self.unmarked += acknowledged
            assert marked == (self.unmarked == BATCH)
            self.unmarked %= BATCH
        return [(iova, access) for iova, access, _ in asked]

    def look(self) -> tuple[list[tuple[int, int]], set[int]]:
        """What is asked again now, and who may go on."""
        data, ready = self.table.repeat(self.now)
        again = decode(data)
        assert all(marked for *_, marked in again)
        if again:
            self.unmarked = 0
        return [(iova, access) for iova, access, _ in again], set(ready)

    def repeat(self) -> list[tuple[int, int]]:
        """What is asked again after no answer has come for long enough."""
        again = []
        for _ in range(2):
            self.now += REPEAT_AFTER
            found, ready = self.look()
            assert ready == set()
            again += found
        return sorted(again)

    def answer(self, iova: int, size: int = PAGE, perm: int = RW) -> set[int]:
        return set(self.table.answered(iova, size, perm))

    def ack(self, *values: int) -> tuple[list[tuple[int, int, list[int]]], set[int]]:
        """The misses refused, and who may go on."""
        data = acks(*values)
        taken, whole, refused, ready = take_acks(self.table, data)
        assert taken == len(data)
        assert whole
        return [(q.iova, q.access, sorted(q.waiting)) for q in refused], set(ready)

    def expired(self) -> list[tuple[int, int]]:
        return [(q.iova, q.access) for q in self.table.expired(self.now)]


@pytest.fixture
def table() -> Table:
    return Table()


class TestAsking:
    def test_whole_pages(self, table: Table) -> None:
        assert table.request(0, need(0x1FFF, 2, W), need(0x5000, PAGE, RW)) == [
            (0x1000, W),
            (0x2000, W),
            (0x5000, RW),
        ]
        assert len(table.table) == 3
        assert table.table.requested == 3

    def test_the_last_page_of_the_address_space(self, table: Table) -> None:
        assert table.request(0, need(TOP - 1), need(TOP - 2 * PAGE, 2 * PAGE, W)) == [
            (TOP - PAGE, RW),
            (TOP - 2 * PAGE, W),
        ]
        assert table.answer(TOP - PAGE) == set()
        assert table.answer(TOP - 2 * PAGE) == {0}

    def test_a_page_is_requested_once_for_all_waiters(self, table: Table) -> None:
        assert table.request(0, need(0x1000), need(0x1800)) == [(0x1000, R)]
        assert table.request(0, need(0x1004)) == []
        assert table.request(7, need(0x1FFF)) == []
        assert table.answer(0x1000) == {0, 7}
        assert table.request(0, need(0x1000)) == [(0x1000, R)], (
            "what was answered may be asked again"
        )

    @pytest.mark.parametrize("accesses", list(permutations((R, W, RW))))
    def test_what_is_read_and_written_is_asked_for_once(
        self, table: Table, accesses: tuple[int, ...]
    ) -> None:
        wanted = [need(0x1000 + access, 1, access) for access in accesses]
        assert table.request(0, *wanted) == [(0x1000, RW)]
        assert table.table.awaited(0) == 1
        assert table.answer(0x1000, PAGE, RW) == {0}

    def test_a_question_that_was_sent_is_not_changed(self, table: Table) -> None:
        assert table.request(0, need(0x1000, 1, R)) == [(0x1000, R)]
        assert table.request(1, need(0x1000, 1, W)) == [(0x1000, W)]
        assert table.request(2, need(0x1000, 1, R), need(0x1000, 1, W)) == []
        assert table.answer(0x1000, PAGE, R) == {0}
        assert table.answer(0x1000, PAGE, RW) == {1, 2}

    def test_after_a_refusal_of_both_each_is_asked_for(self, table: Table) -> None:
        both = need(0x1000, 1, R), need(0x1000, 1, W)
        assert table.request(0, *both) == [(0x1000, RW)]
        assert table.repeat() == [(0x1000, RW)]
        assert table.ack(1) == ([(0x1000, RW, [0])], {0})
        skip = ((0x1000, RW),)
        assert table.request(0, *both, skip=skip) == [(0x1000, R), (0x1000, W)]

    def test_waiters_are_small_numbers(self, table: Table) -> None:
        assert table.request(255, need(0x1000)) == [(0x1000, R)]
        assert table.answer(0x1000) == {255}
        for waiter in (256, -1, 2**64):
            with pytest.raises(ValueError, match="waiter"):
                table.request(waiter, need(0x1000))

    def test_without_acknowledgements(self, table: Table) -> None:
        assert table.request(0, need(0x1000), acknowledged=False) == [(0x1000, R)]
        assert table.table.deadline() == 105.0
        assert table.repeat() == [], "there is nothing to be learnt from it"
        assert table.ack(1) == ([], set()), "it was not requested"
        assert table.answer(0x1000) == {0}

    def test_not_what_was_refused(self, table: Table) -> None:
        skip = ((0x1000, R), (0x3000, W))
        assert table.request(0, need(0x1000, 0x3000), skip=skip) == [(0x2000, R), (0x3000, R)]
        assert table.table.awaited(0) == 2

    def test_nothing(self, table: Table) -> None:
        assert table.request(0) == []
        assert table.table.deadline() is None
        assert table.expired() == []
        assert table.answer(0, 2**64) == set()


class TestAnswers:
    def test_only_who_misses_nothing_any_more_goes_on(self, table: Table) -> None:
        table.request(0, *pages(3))
        table.request(1, *pages(1))
        table.request(2, *pages(2))
        assert table.answer(0x100000) == {1}
        assert table.answer(0x102000) == set()
        assert table.answer(0x101000) == {0, 2}
        assert len(table.table) == 0

    def test_a_large_one_answers_all_in_it(self, table: Table) -> None:
        table.request(0, *pages(4))
        table.request(1, need(0x200000))
        assert table.answer(0x100000, 4 * PAGE) == {0}
        assert table.answer(0, 2**64) == {1}

    def test_a_large_one_that_begins_and_ends_within_pages(self, table: Table) -> None:
        table.request(0, *pages(3))
        assert table.answer(0x100800, 2 * PAGE) == {0}

    def test_one_that_was_not_requested(self, table: Table) -> None:
        table.request(0, need(0x1000))
        assert table.answer(0x2000) == set()
        assert table.table.awaited(0) == 1

    def test_one_that_allows_too_little_answers_nothing(self, table: Table) -> None:
        table.request(0, need(0x1000, 1, W))
        table.request(0, need(0x1000, 1, R))
        assert table.answer(0x1000, PAGE, R) == set()
        assert table.table.awaited(0) == 1
        assert table.answer(0x1000, PAGE, W) == {0}

    def test_the_same_for_a_large_one(self, table: Table) -> None:
        table.request(0, *pages(2, access=RW))
        assert table.answer(0x100000, 16 * PAGE, W) == set()
        assert table.answer(0x100000, 16 * PAGE, RW) == {0}


class TestAcknowledgements:
    """Of misses that were asked again: they name what is refused."""

    def test_after_the_answer_they_say_nothing_new(self, table: Table) -> None:
        for value in (0, 1):
            table.request(0, *pages(2))
            assert len(table.repeat()) == 2
            table.answer(0x100000)
            assert table.answer(0x101000) == {0}
            assert table.ack(value, value) == ([], set())
        assert table.table.refused == 0

    def test_refusals_are_those_of_the_oldest_misses(self, table: Table) -> None:
        table.request(0, *pages(1))
        table.request(0, *pages(2))
        table.request(1, *pages(3))
        assert table.repeat() == [(0x100000, R), (0x101000, R), (0x102000, R)]
        assert table.ack(1) == ([(0x100000, R, [0, 1])], set())
        assert table.answer(0x101000) == {0}
        assert table.ack(0, 5) == ([(0x102000, R, [1])], {1})
        assert table.table.refused == 2
        assert len(table.table) == 0

    def test_success_without_an_answer_is_waited_for(self, table: Table) -> None:
        # The translation comes on another channel and may be overtaken.
        table.request(0, need(0x1000))
        table.repeat()
        assert table.ack(0) == ([], set())
        assert table.table.awaited(0) == 1
        assert table.request(0, need(0x1000)) == [], (
            "it is not asked again, however often it is tried"
        )
        assert table.repeat() == []
        assert table.answer(0x1000) == {0}

    def test_success_with_an_answer_that_allows_too_little_is_a_refusal(self, table: Table) -> None:
        table.request(3, need(0x1000, 1, W))
        assert table.answer(0x1000, PAGE, R) == set()
        assert table.repeat() == [(0x1000, W)]
        assert table.answer(0x1000, PAGE, R) == set()
        assert table.ack(0) == ([(0x1000, W, [3])], {3})

    def test_success_that_is_a_lie_is_found_out_by_time(self, table: Table) -> None:
        table.request(0, need(0x1000))
        table.repeat()
        table.ack(0)
        table.now = 105.0
        assert table.expired() == [(0x1000, R)]

    def test_they_belong_to_questions_even_if_those_were_forgotten(self, table: Table) -> None:
        table.request(0, need(0x1000))
        table.request(1, need(0x2000))
        table.repeat()
        table.table.forget(0)
        assert table.ack(1, 1) == ([(0x2000, R, [1])], {1})

    def test_more_than_there_were_misses(self, table: Table) -> None:
        assert table.ack(0, 1, 0) == ([], set())
        table.request(0, need(0x1000))
        assert table.ack(0, 1, 0) == ([], set()), "it was not to be acknowledged"
        assert table.answer(0x1000) == {0}

    @pytest.mark.parametrize("cut", [0, 1, 11, 12, 19])
    def test_incomplete_ones_are_left(self, table: Table, cut: int) -> None:
        table.request(0, *pages(2))
        table.repeat()
        taken, whole, refused, ready = take_acks(table.table, acks(1) + acks(1)[:cut])
        assert whole == (cut == 0)
        assert (taken, len(refused), ready) == (20, 1, [])

    @pytest.mark.parametrize(
        "strange",
        [
            encode_ack(FrontendRequest.IOTLB_MSG, 0),
            encode_message(BackendRequest.IOTLB_MSG, bytes(8)),
            encode_message(BackendRequest.IOTLB_MSG, bytes(16), reply=True),
            encode_message(BackendRequest.CONFIG_CHANGE_MSG, bytes(8), reply=True),
            b"\1\0\0\0" + b"\6\0\0\0" + b"\x08\0\0\0" + bytes(8),
            bytes(20),
        ],
    )
    def test_what_is_none_is_left(self, table: Table, strange: bytes) -> None:
        table.request(0, *pages(2))
        table.repeat()
        taken, whole, refused, _ = take_acks(table.table, acks(1) + strange + acks(1))
        assert not whole
        assert (taken, len(refused)) == (20, 1)


class TestRepeating:
    """What has no answer is asked once more, with an acknowledgement."""

    def test_not_what_is_answered(self, table: Table) -> None:
        table.request(0, *pages(10))
        assert table.answer(0x100000, 10 * PAGE) == {0}
        assert table.table.deadline() is None, "no wake-up is needed for it"
        assert table.repeat() == []
        assert table.table.requested == 10

    def test_not_too_early(self, table: Table) -> None:
        table.request(0, need(0x1000))
        table.now += REPEAT_AFTER / 2
        table.request(0, need(0x2000))
        assert table.table.deadline() == 100 + REPEAT_AFTER
        table.now = 100 + REPEAT_AFTER
        assert table.look() == ([(0x1000, R)], set())
        # Looks are as far apart, so that there is time for an answer between two of them.
        assert table.table.deadline() == table.now + REPEAT_AFTER
        table.now += REPEAT_AFTER / 2
        assert table.look() == ([], set())
        table.now += REPEAT_AFTER / 2
        assert table.look() == ([(0x2000, R)], set())
        assert table.table.deadline() == 105.0

    def test_only_once(self, table: Table) -> None:
        table.request(0, *pages(2))
        table.answer(0x101000)
        assert table.repeat() == [(0x100000, R)]
        assert table.repeat() == []
        assert table.ack(0) == ([], set())
        assert table.repeat() == []
        assert table.request(1, *pages(1)) == [], "it is under way"
        assert table.answer(0x100000) == {0, 1}
        assert table.table.requested == 3

    def test_what_was_passed_over_although_others_are_answered(self, table: Table) -> None:
        table.request(0, *pages(5))
        table.request(1, need(0x200000))
        table.answer(0x100000)
        table.answer(0x103000)
        table.now += REPEAT_AFTER
        assert table.look() == ([(0x101000, R), (0x102000, R)], set())
        # The others were not woken yet, and are one by one.
        table.answer(0x104000)
        table.now += REPEAT_AFTER
        assert table.look() == ([], set())
        assert table.ack(0, 1) == ([(0x102000, R, [0])], set())
        assert table.answer(0x200000) == {1}
        assert table.answer(0x101000) == {0}

    def test_all_when_there_are_no_answers_any_more(self, table: Table) -> None:
        table.request(0, *pages(5))
        table.answer(0x101000)
        assert table.repeat() == [(0x100000 + i * PAGE, R) for i in (0, 2, 3, 4)]

    def test_an_acknowledgement_is_an_answer(self, table: Table) -> None:
        asked = table.request(0, *pages(BATCH + 44))
        assert table.ack(0) == ([], set())
        table.now += REPEAT_AFTER
        assert sorted(table.look()[0]) == asked[: BATCH - 1]
        table.now += REPEAT_AFTER
        assert sorted(table.look()[0]) == asked[BATCH:]

    def test_all_are_refused(self, table: Table) -> None:
        asked = table.request(0, *pages(50))
        assert table.repeat() == asked
        refused, ready = table.ack(*[1] * 50)
        assert {page[:2] for page in refused} == set(asked)
        assert ready == {0}
        assert table.table.requested == 100

    def test_a_translation_that_allows_too_little_may_be_that_of_another_miss(
        self, table: Table
    ) -> None:
        table.request(0, need(0x1000, 1, R))
        table.request(3, need(0x1000, 1, W))
        assert table.answer(0x1000, PAGE, R) == {0}
        assert table.answer(0x1000, PAGE, RW) == {3}

    def test_expiry_counts_from_the_first_miss(self, table: Table) -> None:
        table.request(0, *pages(3))
        table.answer(0x102000)
        assert len(table.repeat()) == 2
        assert table.table.deadline() == 105.0
        table.now = 105.0
        assert sorted(table.expired()) == [(0x100000, R), (0x101000, R)]
        # Late acknowledgements still belong to them.
        table.request(0, need(0x5000))
        table.repeat()
        assert table.ack(1, 1) == ([], set())
        assert table.ack(1) == ([(0x5000, R, [0])], {0})

    def test_an_acknowledgement_after_all_expired(self, table: Table) -> None:
        table.request(0, *pages(3))
        assert len(table.repeat()) == 3
        table.now += 5
        assert len(table.expired()) == 3
        assert len(table.request(0, *pages(3))) == 3
        assert len(table.repeat()) == 3
        assert table.ack(1, 1, 1) == ([], set()), "they were for the first ones"
        assert table.answer(0x100000, 2 * PAGE) == set()
        assert table.ack(1, 1, 1) == ([(0x102000, R, [0])], {0})

    def test_not_what_is_not_needed_any_more(self, table: Table) -> None:
        table.request(0, *pages(3))
        table.request(1, *pages(1))
        table.table.forget(0)
        assert table.repeat() == [(0x100000, R)]
        assert len(table.table) == 1
        assert table.request(2, *pages(2)) == [(0x101000, R)]

    def test_nothing_of_before_a_reset(self, table: Table) -> None:
        table.request(0, *pages(10))
        table.repeat()
        table.table.reset()
        table.request(1, need(0x1000), need(0x2000))
        assert table.repeat() == [(0x1000, R), (0x2000, R)]
        assert table.ack(1) == ([(0x1000, R, [1])], set())
        assert len(table.table) == 1

    def test_each_256th_is_acknowledged_in_any_case(self, table: Table) -> None:
        """However few are asked at a time (the table's helper counts along)."""
        for i in range(2 * BATCH):
            table.request(0, need(i * PAGE))
            if i != BATCH - 1:
                table.answer(i * PAGE)
        assert table.repeat() == [], "what is to be acknowledged needs no second miss"
        assert table.ack(1) == ([((BATCH - 1) * PAGE, R, [0])], {0})
        assert table.ack(1) == ([], set())

    def test_asking_again_counts_as_well(self, table: Table) -> None:
        table.request(0, *pages(100))
        assert len(table.repeat()) == 100
        data = table.table.request(1, pages(BATCH, 1 << 32), table.now, acknowledged=True)
        assert [marked for *_, marked in decode(data)] == [False] * (BATCH - 1) + [True]


class TestTime:
    @pytest.mark.parametrize("acknowledged", [True, False])
    def test_questions_expire_in_their_order(self, table: Table, acknowledged: bool) -> None:
        table.request(0, need(0x1000), acknowledged=acknowledged)
        table.repeat()
        table.now = 102.0
        table.request(0, need(0x2000), acknowledged=acknowledged)
        table.repeat()
        assert table.table.deadline() == 105.0
        table.now = 104.9
        assert table.expired() == []
        table.now = 105.0
        assert table.expired() == [(0x1000, R)]
        assert table.table.deadline() == 107.0
        assert table.table.awaited(0) == 1
        table.now = 200.0
        assert table.expired() == [(0x2000, R)]
        assert (table.table.refused, table.table.timeouts) == (2, 2)
        assert table.table.deadline() is None

    def test_without_having_been_asked_again(self) -> None:
        """A time limit shorter than the patience."""
        table = Table(REPEAT_AFTER / 2)
        table.request(0, need(0x1000))
        assert table.table.deadline() == 100 + REPEAT_AFTER / 2
        table.now += REPEAT_AFTER
        assert table.expired() == [(0x1000, R)]

    def test_asking_again_after_it_expired(self, table: Table) -> None:
        table.request(0, need(0x1000), acknowledged=False)
        table.now += 5
        table.expired()
        assert table.request(0, need(0x1000), acknowledged=False) == [(0x1000, R)]
        assert table.table.deadline() == 110.0


class TestRoom:
    """More is needed than may be in flight at a time."""

    def fill(self, table: Table, waiter: int = 0) -> list[tuple[int, int]]:
        asked = table.request(waiter, *pages(2 * MAX_OUTSTANDING))
        assert len(asked) == MAX_OUTSTANDING
        return asked

    def serve_rest(self, table: Table, waiter: int) -> None:
        """The waiter is woken until it has everything."""
        for _ in range(10):
            asked = table.request(waiter, *pages(2 * MAX_OUTSTANDING)[-1:])
            for iova, _ in asked:
                table.answer(iova)
            if asked:
                table.ack(0)
                return
        raise AssertionError("it starves")

    def test_answered_and_acknowledged_one_by_one(self, table: Table) -> None:
        asked = self.fill(table)
        woken = []
        for i, (iova, _) in enumerate(asked):
            ready = table.answer(iova)
            if is_marked(i):
                ready |= table.ack(0)[1]
            if ready:
                woken.append(i)
        assert woken == [MAX_OUTSTANDING // 2 - 1, MAX_OUTSTANDING - 1]

    def test_all_answers_before_all_acknowledgements(self, table: Table) -> None:
        asked = self.fill(table)
        for iova, _ in asked[:-1]:
            assert table.answer(iova) == set()
        assert table.answer(asked[-1][0]) == {0}
        # There is no room yet: acknowledgements are still to come.
        assert table.request(0, *pages(2 * MAX_OUTSTANDING)[-1:]) == []
        assert table.table.deadline() == 105.0
        assert table.ack(0)[1] == {0}, "who could not ask is told that there is room"
        self.serve_rest(table, 0)

    def test_answers_but_never_an_acknowledgement(self, table: Table) -> None:
        for iova, _ in self.fill(table):
            table.answer(iova)
        assert table.request(0, *pages(2 * MAX_OUTSTANDING)[-1:]) == []
        assert table.table.deadline() == 105.0
        table.now = 105.0
        assert table.expired() == []
        assert table.table.starved(table.now) == [0]
        self.serve_rest(table, 0)

    def test_no_answer_at_all(self, table: Table) -> None:
        self.fill(table)
        assert table.request(1, need(0x5000)) == []
        table.now = 105.0
        assert len(table.expired()) == MAX_OUTSTANDING
        assert sorted(table.table.starved(table.now)) == [0, 1]
        assert table.request(1, need(0x5000)) == [(0x5000, R)]

    def test_again_and_again_without_any_answer(self, table: Table) -> None:
        # Every round asks for other pages; expectations of acknowledgements must not pile up.
        for round_ in range(20):
            first = 0x10000000 * (round_ + 1)
            asked = table.request(0, *pages(MAX_OUTSTANDING, first))
            assert len(asked) == MAX_OUTSTANDING, round_
            table.now += 5
            assert len(table.expired()) == MAX_OUTSTANDING

    def test_who_waits_for_room_is_woken_once(self, table: Table) -> None:
        asked = self.fill(table)
        table.request(1, need(0x5000))
        ready: list[int] = []
        for i, (iova, _) in enumerate(asked):
            ready += table.table.answered(iova, PAGE, RW)
            if is_marked(i):
                ready += table.table.acknowledge(0)[1]
        assert ready.count(1) == 1

    def test_forgotten_ones_are_not_woken(self, table: Table) -> None:
        asked = self.fill(table)
        table.request(1, need(0x5000))
        table.table.forget(1)
        for i, (iova, _) in enumerate(asked):
            assert 1 not in table.answer(iova)
            if is_marked(i):
                assert 1 not in table.ack(0)[1]

    def test_a_front_end_that_reads_nothing_is_not_asked_without_end(self, table: Table) -> None:
        """What it told unasked settles misses that are still in the socket."""
        asked = 0
        for i in range(100):
            asked += len(table.request(0, *pages(20, (i + 1) << 24)))
            table.answer(0, 2**64)
        assert asked == MAX_OUTSTANDING

    def test_all_of_a_full_table_is_asked_again(self, table: Table) -> None:
        asked = self.fill(table)
        again = [page for i, page in enumerate(asked) if not is_marked(i)]
        assert table.repeat() == again
        assert table.request(1, need(0x5000)) == []
        assert table.ack(0, 0) == ([], set())
        assert len(table.ack(*[1] * len(again))[0]) == len(again)
        assert table.request(1, need(0x5000)) == [(0x5000, R)]
        assert table.answer(asked[BATCH - 1][0]) | table.answer(asked[-1][0]) == {0}

    def test_questions_that_are_still_to_be_acknowledged_keep_their_place(
        self, table: Table
    ) -> None:
        """However much is asked meanwhile, no acknowledgement is taken for another miss's."""
        table.request(0, need(0x1000))
        table.repeat()
        table.answer(0x1000)
        for i in range(3 * MAX_OUTSTANDING):
            assert table.request(1, need(0x100000 + i * PAGE), acknowledged=False)
            assert table.answer(0x100000 + i * PAGE) == {1}
        table.request(2, need(0x2000))
        table.repeat()
        assert table.ack(1) == ([], set())
        assert table.ack(1) == ([(0x2000, R, [2])], {2})

    def test_a_huge_range_costs_what_may_be_in_flight(self, table: Table) -> None:
        asked = table.request(0, need(0, 2**63))
        assert len(asked) == MAX_OUTSTANDING


class TestForgetting:
    def test_a_waiter(self, table: Table) -> None:
        table.request(0, *pages(2))
        table.request(1, *pages(2))
        table.table.forget(0)
        assert table.table.awaited(0) == 0
        assert table.answer(0x100000, 2 * PAGE) == {1}

    def test_a_waiter_that_comes_again(self, table: Table) -> None:
        table.request(0, *pages(2))
        table.table.forget(0)
        assert table.request(0, *pages(1)) == [(0x100000, R)], "an old answer may be wrong by now"
        assert table.table.awaited(0) == 1
        assert table.answer(0x100000) == {0}
        assert table.answer(0x101000) == set()

    def test_everything(self, table: Table) -> None:
        table.request(0, *pages(2))
        table.request(1, *pages(2 * MAX_OUTSTANDING))
        table.request(2, need(0x1000))
        table.request(3, *pages(1))
        table.answer(0x100000)
        assert sorted(table.table.reset()) == [0, 1, 2]
        assert len(table.table) == 0
        assert table.table.deadline() is None
        # A miss of before is not taken for one of after.
        assert table.request(0, need(0x9000)) == [(0x9000, R)]
        assert table.repeat() == [(0x9000, R)]
        assert table.ack(1) == ([(0x9000, R, [0])], {0})


@dataclass(eq=False)
class Asked:
    """A miss, for the model."""

    key: tuple[int, int]
    number: int
    at: float
    repeatable: bool = True
    forbidden: bool = False
    settled: bool = False


def test_against_a_model() -> None:
    """Random requests against a few dictionaries: no waiter wakes early or is left waiting."""
    for seed in range(60):
        _run_against_model(random.Random(seed))


def _run_against_model(rng: random.Random) -> None:
    table = Table()
    lacking: dict[int, set[tuple[int, int]]] = {waiter: set() for waiter in range(4)}
    expected: list[Asked] = []
    open_: dict[tuple[int, int], Asked] = {}
    misses, messages, reached, before, looked = 0, 0, 0, 0, 0.0

    def settle(gone: set[tuple[int, int]]) -> set[int]:
        for key in gone:
            open_.pop(key).settled = True
        return _settle(lacking, gone)

    for _ in range(600):
        table.now += rng.random() * rng.choice((0.3, REPEAT_AFTER))
        match rng.randrange(9):
            case 0 | 1:
                waiter = rng.randrange(4)
                wanted = [
                    need(
                        0x1000 * rng.randrange(12) + rng.randrange(PAGE), 1, rng.choice((R, W, RW))
                    )
                    for _ in range(rng.randrange(5))
                ]
                keys, fresh = _expected(wanted, set(open_))
                asked = table.request(waiter, *wanted)
                assert set(asked) == fresh
                for key in asked:
                    misses, messages = misses + 1, messages + 1
                    open_[key] = Asked(key, misses, table.now)
                    if messages == BATCH:
                        messages, open_[key].repeatable = 0, False
                        expected.append(open_[key])
                lacking[waiter] |= keys
            case 2 | 3:
                iova, size = 0x1000 * rng.randrange(12), PAGE * rng.choice((1, 1, 1, 3))
                perm = rng.choice((R, W, RW, RW))
                ready = table.answer(iova, size, perm)
                hit = {key for key in open_ if iova <= key[0] < iova + size}
                gone = {key for key in hit if not key[1] & ~perm}
                for key in hit - gone:
                    open_[key].forbidden = True
                reached = max([reached, *(open_[key].number for key in gone)])
                assert ready == settle(gone)
            case 4 | 5 if expected:
                each, value = expected.pop(0), rng.randrange(2)
                reached = max(reached, each.number)
                refused = not each.settled and (value or each.forbidden)
                found, ready_ = table.table.acknowledge(value)
                assert [(q.iova, q.access) for q in found] == [each.key] * refused
                assert set(ready_) == settle({each.key} if refused else set())
            case 6 | 7:
                again, ready = table.look()
                if table.now < looked + REPEAT_AFTER:
                    assert again == []
                    continue
                due = [
                    each
                    for each in open_.values()
                    if each.repeatable and table.now >= each.at + REPEAT_AFTER
                ]
                assert set(again) == {
                    each.key for each in due if before == reached or each.number < reached
                }
                assert ready == set()
                # They are acknowledged in the order in which they are asked.
                for key in again:
                    open_[key].repeatable, messages = False, 0
                    expected.append(open_[key])
                before, looked = reached, table.now
            case 8 if rng.random() < 0.2:
                waiter = rng.randrange(4)
                assert table.table.forget(waiter) == []
                lacking[waiter] = set()
                settle(open_.keys() - set().union(*lacking.values()))
            case 8 if rng.random() < 0.1:
                waiting = {waiter for waiter, keys in lacking.items() if keys}
                assert set(table.table.reset()) == waiting
                lacking = {waiter: set() for waiter in lacking}
                expected, open_ = [], {}
                misses, messages, reached, before, looked = 0, 0, 0, 0, 0.0
                table.unmarked = 0
            case _:
                over = {key for key, each in open_.items() if table.now - each.at >= 5}
                assert set(table.expired()) == over
                settle(over)
        assert len(table.table) == len(open_)
        for waiter, keys in lacking.items():
            assert table.table.awaited(waiter) == len(keys)


@pytest.mark.parametrize("seed", range(6))
def test_heavy_traffic_with_a_front_end(seed: int) -> None:
    """All slots are used again and again; each waiter learns what is true of each of its pages."""
    front_end = _FrontEnd(random.Random(seed))
    for _ in range(3000):
        front_end.step()
    front_end.finish()


class _FrontEnd:
    """Answers in order, on two channels of which either may be read late; and those who ask."""

    PAGES, WAITERS = 4000, 8

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.table = MissTable(1e9)
        self.perms = [rng.choice((0, R, RW, RW, RW, RW)) for _ in range(self.PAGES)]
        self.sent: list[tuple[int, int, bool]] = []
        self.updates: list[int] = []
        self.acks: list[int] = []
        self.wanted: list[set[tuple[int, int]]] = [set() for _ in range(self.WAITERS)]
        self.answered: list[set[tuple[int, int]]] = [set() for _ in range(self.WAITERS)]
        self.asked = 0
        self.now = 1.0

    def step(self, most: int = 60) -> None:
        rng = self.rng
        match rng.randrange(5):
            case 0:
                self.request(rng.randrange(self.WAITERS), rng.randrange(2 * most))
            case 1:
                self.handle(rng.randrange(most))
            case 2:
                self.take_updates(rng.randrange(most))
            case 3:
                self.look()
            case _:
                self.take_acks(rng.randrange(most))

    def request(self, waiter: int, count: int) -> None:
        wanted = self.wanted[waiter]
        if self.table.awaited(waiter):
            return
        if not wanted:
            for _ in range(count):
                wanted.add((self.rng.randrange(self.PAGES) * PAGE, self.rng.choice((R, W))))
        missing = [need(iova, PAGE, access) for iova, access in sorted(wanted)]
        self.send(self.table.request(waiter, missing, self.now, acknowledged=True))

    def look(self) -> None:
        self.now += 0.7 * REPEAT_AFTER
        again, _ = self.table.repeat(self.now)
        self.send(again)

    def send(self, data: bytes) -> None:
        self.sent += decode(data)
        self.asked += len(data) // MESSAGE

    def handle(self, count: int) -> None:
        for iova, access, need_reply in self.sent[:count]:
            perm = self.perms[iova // PAGE]
            # Also one that allows too little.
            if perm:
                self.updates.append(iova)
            if need_reply:
                self.acks.append(access & ~perm)
        del self.sent[:count]

    def take_updates(self, count: int) -> None:
        for iova in self.updates[:count]:
            perm = self.perms[iova // PAGE]
            self.table.answered(iova, PAGE, perm)
            for wanted in self.wanted:
                wanted -= {(iova, access) for access in range(1, 4) if not access & ~perm}
        del self.updates[:count]

    def take_acks(self, count: int) -> None:
        for value in self.acks[:count]:
            refused, _ = self.table.acknowledge(value)
            for miss in refused:
                assert miss.access & ~self.perms[miss.iova // PAGE], "it is allowed"
                for waiter in miss.waiting:
                    wanted = self.wanted[waiter]
                    wanted -= {(miss.iova, miss.access & bit) for bit in (R, W)}
        del self.acks[:count]

    def finish(self) -> None:
        """Everything is answered sooner or later, without any time limit."""
        for _ in range(200):
            self.look()
            self.handle(1 << 20)
            self.take_updates(1 << 20)
            self.take_acks(1 << 20)
            for waiter, wanted in enumerate(self.wanted):
                if wanted:
                    self.request(waiter, 0)
        assert not any(self.wanted)
        assert len(self.table) == 0
        assert self.table.requested == self.asked
        assert self.asked > 20 * MAX_OUTSTANDING


def _expected(
    wanted: list[tuple[IovaRange, int]], known: set[tuple[int, int]]
) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """What a waiter for ranges of a page waits for, and what of it is requested anew."""
    keys, fresh = set(), set()
    for (base, _), access in wanted:
        page = base - base % PAGE
        if (page, access) in known | fresh:
            keys.add((page, access))
        elif (page, RW) in known | fresh:
            keys.add((page, RW))
        else:
            narrow = fresh & {(page, R), (page, W)}
            key = (page, RW if narrow else access)
            keys, fresh = keys - narrow | {key}, fresh - narrow | {key}
    return keys, fresh


def _settle(lacking: dict[int, set[tuple[int, int]]], gone: set[tuple[int, int]]) -> set[int]:
    ready = set()
    for waiter, keys in lacking.items():
        if keys & gone and not keys - gone:
            ready.add(waiter)
        keys -= gone
    return ready


class TestTouched:
    def test_known_pages_in_ranges(self) -> None:
        known = {(0x1000, R), (0x3000, R), (0x3000, W), (TOP - PAGE, R)}
        assert touched([need(0x1FFF)], known) == {(0x1000, R)}
        assert touched([need(0x0FFF, 1), need(0x2000, PAGE)], known) == set()
        assert touched([need(0x0FFF, 0x3000)], known) == {(0x1000, R), (0x3000, R)}
        assert touched([need(0x3800, 1, W), need(TOP - 1)], known) == {(0x3000, W), (TOP - PAGE, R)}

    def test_nothing_known_costs_nothing(self) -> None:
        assert touched([need(0, TOP - 1)], set()) == set()


class TestUpdater:
    """UPDATE and INVALIDATE as bytes; what is not plain is left for others."""

    def make(self) -> tuple[Iotlb, MissTable, IotlbUpdater]:
        self.counters = Counters()
        iotlb, misses, users = Iotlb(), MissTable(5), IntervalMap()
        users.add(0x7F0000000000, 0x10000, 0x1000, Permissions.READ_WRITE)
        users.add(0x7F0000020000, 0x10000, 0x80000, Permissions.READ_WRITE)
        users.add(TOP - 0x2000, 0x2000, 0x200000, Permissions.READ_WRITE)
        return iotlb, misses, IotlbUpdater(iotlb._map, users, misses, self.counters)

    @staticmethod
    def wire(*messages: IotlbMessage) -> bytes:
        request = FrontendRequest.IOTLB_MSG
        return b"".join(encode_iotlb(request, each, need_reply=True) for each in messages)

    def test_a_run(self) -> None:
        iotlb, misses, updater = self.make()
        misses.request(5, [need(0x10000), need(0x11000, 1, W)], 0.0, acknowledged=True)
        data = self.wire(
            IotlbMessage.update(0x10000, PAGE, 0x7F0000000000, R),
            IotlbMessage.update(0x11000, PAGE, 0x7F0000021000, RW),
            IotlbMessage.update(0x50000, 0x10000, 0x7F0000000000, W),
            IotlbMessage.invalidate(0x52000, 0x1000),
            IotlbMessage.update(TOP - PAGE, PAGE, TOP - PAGE, RW),
        )
        taken, replies, ready = take_updates(updater, data)
        assert taken == len(data)
        assert ready == [5]
        assert (self.counters.updates, self.counters.invalidations) == (4, 1)
        for at in range(0, len(replies), 20):
            header = Header.decode(replies[at : at + HEADER])
            assert decode_ack(header, replies[at + HEADER : at + 20], 22) == 0
        assert len(replies) == 5 * 20
        assert sorted(iotlb) == [
            ((0x10000, PAGE), (0x1000, PAGE), R),
            ((0x11000, PAGE), (0x81000, PAGE), RW),
            ((0x50000, 0x2000), (0x1000, 0x2000), W),
            ((0x53000, 0xD000), (0x4000, 0xD000), W),
            ((TOP - PAGE, PAGE), (0x201000, PAGE), RW),
        ]

    @pytest.mark.parametrize(
        "message",
        [
            IotlbMessage.update(0x1000, 0, 0x7F0000000000, RW),
            IotlbMessage.update(TOP - PAGE, 2 * PAGE, 0x7F0000000000, RW),
            IotlbMessage.update(0x1000, PAGE, 0x7F0000010000, RW),
            IotlbMessage.update(0x1000, PAGE, 0x7F000000F001, RW),
            IotlbMessage.update(0x1000, 2 * PAGE, TOP - PAGE, RW),
            IotlbMessage.update(0x1000, PAGE, 0, RW),
            IotlbMessage.update(0x1000, PAGE, 0x7EFFFFFFFFFF, RW),
            IotlbMessage.update(0x1000, PAGE, 0x7F0000000000, 4),
            IotlbMessage.invalidate(0, 0),
            IotlbMessage.invalidate(TOP - 1, 2),
            IotlbMessage(0x1000, PAGE, 0, 0, IotlbType.MISS),
            IotlbMessage(0x1000, PAGE, 0, 0, IotlbType.ACCESS_FAIL),
            IotlbMessage(0x1000, PAGE, 0, 0, 0),
            IotlbMessage(0x1000, PAGE, 0, 0, 255),
        ],
    )
    def test_what_is_not_plain_is_left_and_changes_nothing(self, message: IotlbMessage) -> None:
        iotlb, _, updater = self.make()
        good = IotlbMessage.update(0x10000, PAGE, 0x7F0000000000, R)
        taken, replies, _ = take_updates(updater, self.wire(good, message, good))
        assert (taken, len(replies)) == (MESSAGE, 20)
        assert len(iotlb) == 1

    def test_other_messages_are_left(self) -> None:
        _, _, updater = self.make()
        good = self.wire(IotlbMessage.invalidate(0, PAGE))
        strange = (
            encode_message(FrontendRequest.GET_FEATURES),
            encode_message(FrontendRequest.IOTLB_MSG, bytes(33)),
            encode_message(FrontendRequest.IOTLB_MSG, good[HEADER:], reply=True),
            b"\x16\0\0\0\2\0\0\0" + good[8:],
            encode_message(BackendRequest.IOTLB_MSG, good[HEADER:]),
        )
        for other in strange:
            assert take_updates(updater, other + good)[0] == 0
            assert take_updates(updater, good + other)[0] == MESSAGE

    @pytest.mark.parametrize("cut", range(0, MESSAGE, 7))
    def test_incomplete_messages_are_left(self, cut: int) -> None:
        _, _, updater = self.make()
        good = self.wire(IotlbMessage.invalidate(0, PAGE))
        assert take_updates(updater, good[:cut])[0] == 0
        assert take_updates(updater, good + good[:cut])[0] == MESSAGE

    def test_a_translation_in_use_is_left(self) -> None:
        iotlb, _, updater = self.make()
        iotlb.set_mapping(0x10000, 0x1000, PAGE, Permissions.READ_WRITE)
        update = IotlbMessage.update(0x10000, PAGE, 0x7F0000000000, R)
        with iotlb.guard(0x10000, 8, Permissions.READ):
            assert take_updates(updater, self.wire(IotlbMessage.invalidate(0, 2 * 0x10000)))[0] == 0
            assert take_updates(updater, self.wire(update))[0] == 0
            assert (
                take_updates(updater, self.wire(IotlbMessage.invalidate(0x20000, PAGE)))[0]
                == MESSAGE
            )
        assert (
            take_updates(updater, self.wire(IotlbMessage.invalidate(0, 2 * 0x10000)))[0] == MESSAGE
        )

    def test_arguments(self) -> None:
        iotlb, misses, _ = self.make()
        with pytest.raises(TypeError):
            IotlbUpdater(None, IntervalMap(), misses, Counters())  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            IotlbUpdater(iotlb._map, IntervalMap(), None, Counters())  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            MissTable(5).receive("text")  # type: ignore[arg-type]
