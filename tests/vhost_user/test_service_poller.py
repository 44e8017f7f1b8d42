"""The poller: descriptors, timers and unfinished work of one thread, in bounded turns."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from guestio.vhost_user.poller import Poller
from tests.vhost_user.serving import nothing_left


@pytest.fixture
def poller() -> Iterator[Poller]:
    made = Poller()
    yield made
    made.close()


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def test_a_level_is_reported_as_long_as_it_lasts(poller: Poller, event: int) -> None:
    calls: list[str] = []
    poller.add(event, lambda: calls.append("level"))
    os.eventfd_write(event, 1)
    for _ in range(3):
        poller.run_once()
    assert calls == ["level"] * 3
    os.eventfd_read(event)
    poller.again(lambda: calls.append("again"))
    poller.run_once()
    assert calls[3:] == ["again"]


def test_an_edge_is_reported_once_for_every_write(poller: Poller, event: int) -> None:
    calls: list[str] = []
    os.eventfd_write(event, 1)
    poller.add(event, lambda: calls.append("edge"), edge=True)
    for count in (1, 2, 3):
        poller.run_once()
        assert len(calls) == count
        poller.again(lambda: None)
        poller.run_once()
        assert len(calls) == count, "nothing happened since"
        os.eventfd_write(event, 1)


def test_timers_come_at_their_time(poller: Poller) -> None:
    calls: list[str] = []
    start = time.monotonic()
    poller.set_timer("b", start + 0.06, lambda: calls.append("b"))
    poller.set_timer("a", start + 0.03, lambda: calls.append("a"))
    poller.set_timer("never", start + 0.03, lambda: calls.append("never"))
    poller.clear_timer("never")
    poller.clear_timer("unknown")
    while len(calls) < 2:
        poller.run_once()
    assert calls == ["a", "b"]
    assert time.monotonic() - start >= 0.06


def test_a_timer_that_is_set_again_counts_from_then(poller: Poller) -> None:
    calls: list[float] = []
    start = time.monotonic()
    poller.set_timer("t", start + 0.01, lambda: calls.append(0))
    poller.set_timer("t", start + 0.05, lambda: calls.append(time.monotonic() - start))
    while not calls:
        poller.run_once()
    assert calls[0] >= 0.05


def test_a_timer_may_set_itself_and_clear_others(poller: Poller) -> None:
    calls: list[str] = []
    now = time.monotonic()

    def first() -> None:
        calls.append("first")
        poller.clear_timer("second")
        poller.set_timer("first", time.monotonic() + 0.01, lambda: calls.append("later"))

    poller.set_timer("first", now, first)
    poller.set_timer("second", now, lambda: calls.append("second"))
    while len(calls) < 2:
        poller.run_once()
    assert calls == ["first", "later"]


def test_work_that_makes_more_work_lets_others_have_their_turn(poller: Poller, event: int) -> None:
    calls: list[str] = []

    def busy() -> None:
        calls.append("busy")
        poller.again(busy)

    poller.again(busy)
    poller.add(event, lambda: calls.append("event"))
    os.eventfd_write(event, 1)
    for _ in range(3):
        poller.run_once()
    assert calls == ["event", "busy"] * 3


def test_removing_a_descriptor_while_its_turn_is_due(poller: Poller) -> None:
    fds = [os.eventfd(1), os.eventfd(1)]
    calls: list[int] = []

    def first_come(own: int, other: int) -> None:
        calls.append(own)
        poller.remove(own)
        poller.remove(other)
        os.close(other)

    poller.add(fds[0], lambda: first_come(*fds))
    poller.add(fds[1], lambda: first_come(*reversed(fds)))
    poller.run_once()
    assert len(calls) == 1
    os.close(calls[0])
    poller.remove(12345)


@pytest.mark.parametrize("path", ["/dev/null", "/etc/hostname", "/"])
def test_what_cannot_be_waited_for(poller: Poller, path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(OSError, match="not permitted"):
        poller.add(fd, lambda: None)
    os.close(fd)
    poller.again(lambda: None)
    poller.run_once()


def test_waking_from_another_thread(poller: Poller) -> None:
    thread = threading.Timer(0.05, poller.wake)
    thread.start()
    poller.run_once()
    thread.join()
    poller.wake()
    poller.wake()
    poller.run_once()


def test_closing() -> None:
    with nothing_left():
        poller = Poller()
        poller.close()
        poller.close()
        poller.wake()
