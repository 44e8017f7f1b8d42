"""Matching of replies, failures and threads, with the peer played by hand."""

from __future__ import annotations

import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from guestio.errors import GuestioError, ProtocolError
from guestio.vhost_user.channel import PeerGoneError
from guestio.vhost_user.messages import FrontendRequest, VringState, encode_ack, encode_message
from guestio.vhost_user.request_channel import NoAnswerError, RequestChannel
from tests.kit.peer import WAIT, Hand, nothing_left

if TYPE_CHECKING:
    from collections.abc import Iterator

_F = FrontendRequest
FEATURES = encode_message(_F.GET_FEATURES)
QUEUES = encode_message(_F.GET_QUEUE_NUM)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def pair() -> Iterator[tuple[RequestChannel, Hand]]:
    ours, theirs = socket.socketpair()
    exchange, hand = RequestChannel(ours, WAIT), Hand(theirs)
    yield exchange, hand
    exchange.close()
    hand.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


def ask(exchange: RequestChannel, request: int = _F.GET_FEATURES) -> int:
    (pending,) = exchange.send(request, encode_message(request), replies=1)
    return exchange.wait_ack(pending)


def test_replies_of_one_kind_keep_their_order(pair: tuple[RequestChannel, Hand]) -> None:
    exchange, hand = pair
    pending = exchange.send(_F.GET_FEATURES, FEATURES * 3, replies=3)
    for value in (7, 8, 9):
        hand.expect(_F.GET_FEATURES)
        hand.ack(_F.GET_FEATURES, value)
    assert [exchange.wait_ack(each) for each in reversed(pending)] == [9, 8, 7]


def test_replies_of_different_kinds_may_change_places(pair: tuple[RequestChannel, Hand]) -> None:
    exchange, hand = pair
    (slow,) = exchange.send(_F.GET_VRING_BASE, encode_message(_F.GET_VRING_BASE), replies=1)
    (fast,) = exchange.send(_F.IOTLB_MSG, encode_message(_F.IOTLB_MSG), replies=1)
    hand.ack(_F.IOTLB_MSG, 1)
    hand.reply(_F.GET_VRING_BASE, VringState(0, 5))
    assert exchange.wait_ack(fast) == 1
    assert VringState.decode(exchange.wait(slow).payload).num == 5


def test_one_who_waits_reads_for_the_others(
    pair: tuple[RequestChannel, Hand], pool: ThreadPoolExecutor
) -> None:
    exchange, hand = pair
    first = pool.submit(ask, exchange, _F.GET_FEATURES)
    hand.expect(_F.GET_FEATURES)
    second = pool.submit(ask, exchange, _F.GET_QUEUE_NUM)
    hand.expect(_F.GET_QUEUE_NUM)
    hand.ack(_F.GET_QUEUE_NUM, 2)
    assert second.result(WAIT) == 2
    assert not first.done()
    hand.ack(_F.GET_FEATURES, 1)
    assert first.result(WAIT) == 1


def test_many_threads_each_get_their_own_reply(
    pair: tuple[RequestChannel, Hand], pool: ThreadPoolExecutor
) -> None:
    """The request carries a number in its code's place; the peer answers kinds in random order."""
    exchange, hand = pair
    codes = list(range(100, 108))

    def caller(code: int) -> None:
        for count in range(100):
            assert ask(exchange, code) == code * 1000 + count

    calls = [pool.submit(caller, code) for code in codes]
    rng, waiting, counts = random.Random(1), [], dict.fromkeys(codes, 0)
    while any(count < 100 for count in counts.values()):
        message = hand.main.recv(0.001 if waiting else WAIT)
        if message is not None:
            waiting.append(message.request)
        if waiting and (message is None or rng.random() < 0.5):
            code = waiting.pop(rng.randrange(len(waiting)))
            hand.ack(code, code * 1000 + counts[code])
            counts[code] += 1
    for call in calls:
        call.result(WAIT)


def test_no_answer_in_time(pair: tuple[RequestChannel, Hand]) -> None:
    exchange, _ = pair
    exchange.timeout = 0.05
    began = time.monotonic()
    with pytest.raises(NoAnswerError, match=r"did not answer GET_FEATURES for 0\.05 s"):
        ask(exchange)
    assert time.monotonic() - began < 10
    with pytest.raises(TimeoutError):
        ask(exchange)
    assert isinstance(exchange.failure, NoAnswerError)


def test_a_reply_to_another_call_does_not_extend_the_wait(
    pair: tuple[RequestChannel, Hand], pool: ThreadPoolExecutor
) -> None:
    exchange, hand = pair
    exchange.timeout = 0.3
    pending = exchange.send(_F.GET_FEATURES, FEATURES * 20, replies=20)
    waiting = pool.submit(exchange.wait_ack, pending[-1])
    for _ in range(19):
        time.sleep(0.03)
        hand.ack(_F.GET_FEATURES)
    with pytest.raises(NoAnswerError):
        waiting.result(WAIT)


def test_the_peer_hangs_up(pair: tuple[RequestChannel, Hand], pool: ThreadPoolExecutor) -> None:
    exchange, hand = pair
    waiting = [pool.submit(ask, exchange) for _ in range(3)]
    for _ in waiting:
        hand.expect(_F.GET_FEATURES)
    hand.close()
    for each in waiting:
        with pytest.raises(PeerGoneError):
            each.result(WAIT)
    with pytest.raises(PeerGoneError):
        ask(exchange)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (encode_ack(_F.GET_QUEUE_NUM, 1), "GET_QUEUE_NUM came, but no call waits for it"),
        (FEATURES, "GET_FEATURES came, but no call waits for it"),
        (b"\xff" * 12, "version"),
    ],
)
def test_what_no_peer_may_send(pair: tuple[RequestChannel, Hand], data: bytes, match: str) -> None:
    exchange, hand = pair
    hand.main.send(data)
    with pytest.raises(ProtocolError, match=match):
        ask(exchange)
    with pytest.raises(ProtocolError, match=match):
        ask(exchange)


def test_fds_with_a_reply_are_refused_and_do_not_leak(pair: tuple[RequestChannel, Hand]) -> None:
    exchange, hand = pair
    hand.main.send(encode_ack(_F.GET_FEATURES, 1), [0, 1])
    with pytest.raises(ProtocolError, match="fds"):
        ask(exchange)


def test_shut_down_wakes_all_waiting_calls(
    pair: tuple[RequestChannel, Hand], pool: ThreadPoolExecutor
) -> None:
    exchange, hand = pair
    waiting = [pool.submit(ask, exchange) for _ in range(3)]
    for _ in waiting:
        hand.expect(_F.GET_FEATURES)
    exchange.shut_down()
    for each in waiting:
        with pytest.raises(PeerGoneError, match="closed on this side"):
            each.result(WAIT)


def test_a_peer_that_does_not_read(pair: tuple[RequestChannel, Hand]) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        exchange = RequestChannel(ours, 0.1)
        try:
            with pytest.raises(GuestioError, match="did not read"):
                for _ in range(1000):
                    exchange.send(_F.IOTLB_MSG, encode_message(_F.IOTLB_MSG, bytes(4096)))
            assert exchange.failure is not None
        finally:
            exchange.close()


def test_closing_twice(pair: tuple[RequestChannel, Hand]) -> None:
    exchange, _ = pair
    exchange.close()
    exchange.close()
    assert exchange.fileno() == -1
    with pytest.raises(PeerGoneError):
        ask(exchange)
