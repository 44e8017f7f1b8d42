"""The loop: descriptors, timers and unfinished work of one thread, in bounded turns."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from guestio.virtio.loop import EventLoop, LoopThread
from tests.kit.serving import WAIT, nothing_left, until


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    made = EventLoop()
    yield made
    made.close()


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def test_a_level_is_reported_as_long_as_it_lasts(loop: EventLoop, event: int) -> None:
    calls: list[str] = []
    loop.add_reader(event, lambda: calls.append("level"))
    os.eventfd_write(event, 1)
    for _ in range(3):
        loop.run_once()
    assert calls == ["level"] * 3
    os.eventfd_read(event)
    loop.call_soon_threadsafe(lambda: calls.append("again"))
    loop.run_once()
    assert calls[3:] == ["again"]


def test_an_edge_is_reported_once_for_every_write(loop: EventLoop, event: int) -> None:
    calls: list[str] = []
    os.eventfd_write(event, 1)
    loop.add_reader(event, lambda: calls.append("edge"), edge=True)
    for count in (1, 2, 3):
        loop.run_once()
        assert len(calls) == count
        loop.call_soon_threadsafe(lambda: None)
        loop.run_once()
        assert len(calls) == count, "nothing happened since"
        os.eventfd_write(event, 1)


def test_timers_come_at_their_time(loop: EventLoop) -> None:
    calls: list[str] = []
    start = time.monotonic()
    loop.set_timer("b", start + 0.06, lambda: calls.append("b"))
    loop.set_timer("a", start + 0.03, lambda: calls.append("a"))
    loop.set_timer("never", start + 0.03, lambda: calls.append("never"))
    loop.clear_timer("never")
    loop.clear_timer("unknown")
    while len(calls) < 2:
        loop.run_once()
    assert calls == ["a", "b"]
    assert time.monotonic() - start >= 0.06


def test_a_timer_that_is_set_again_counts_from_then(loop: EventLoop) -> None:
    calls: list[float] = []
    start = time.monotonic()
    loop.set_timer("t", start + 0.01, lambda: calls.append(0))
    loop.set_timer("t", start + 0.05, lambda: calls.append(time.monotonic() - start))
    while not calls:
        loop.run_once()
    assert calls[0] >= 0.05


def test_a_timer_may_set_itself_and_clear_others(loop: EventLoop) -> None:
    calls: list[str] = []
    now = time.monotonic()

    def first() -> None:
        calls.append("first")
        loop.clear_timer("second")
        loop.set_timer("first", time.monotonic() + 0.01, lambda: calls.append("later"))

    loop.set_timer("first", now, first)
    loop.set_timer("second", now, lambda: calls.append("second"))
    while len(calls) < 2:
        loop.run_once()
    assert calls == ["first", "later"]


class Compared(float):
    """A time that has another thread do something when it is compared with another time.

    Attributes:
        meanwhile: What is done, and at which comparison.
    """

    meanwhile: tuple[str, Callable[[], None]] | None = None

    def _compared(self, how: str) -> None:
        if self.meanwhile is not None and self.meanwhile[0] == how:
            thread = threading.Thread(target=self.meanwhile[1])
            thread.start()
            thread.join(WAIT)

    def __le__(self, other: float) -> bool:
        self._compared("due")
        return super().__le__(other)

    def __lt__(self, other: float) -> bool:
        self._compared("next")
        return super().__lt__(other)


@pytest.mark.parametrize("step", ["due", "next"])
def test_timers_that_another_thread_clears_while_they_are_looked_through(
    loop: EventLoop, step: str
) -> None:
    """Whether they are due or which one is next: they are gone then, and that is all."""
    calls: list[str] = []
    now = time.monotonic()
    compared = Compared(now if step == "due" else now + 60)

    def clear() -> None:
        calls.append("clear")
        loop.clear_timer("last")
        loop.clear_timer("compared")

    loop.set_timer("last", now + 60, lambda: calls.append("last"))
    loop.set_timer("first", now, lambda: calls.append("first"))
    loop.set_timer("compared", compared, lambda: calls.append("compared"))
    compared.meanwhile = (step, clear)
    loop.run_once()
    assert sorted(calls) == ["clear", "first"]


def test_work_that_makes_more_work_lets_others_have_their_turn(loop: EventLoop, event: int) -> None:
    calls: list[str] = []

    def busy() -> None:
        calls.append("busy")
        loop.call_soon_threadsafe(busy)

    loop.call_soon_threadsafe(busy)
    loop.add_reader(event, lambda: calls.append("event"))
    os.eventfd_write(event, 1)
    for _ in range(3):
        loop.run_once()
    assert calls == ["event", "busy"] * 3


def test_removing_a_descriptor_while_its_turn_is_due(loop: EventLoop) -> None:
    fds = [os.eventfd(1), os.eventfd(1)]
    calls: list[int] = []

    def first_come(own: int, other: int) -> None:
        calls.append(own)
        loop.remove_reader(own)
        loop.remove_reader(other)
        os.close(other)

    loop.add_reader(fds[0], lambda: first_come(*fds))
    loop.add_reader(fds[1], lambda: first_come(*reversed(fds)))
    loop.run_once()
    assert len(calls) == 1
    os.close(calls[0])
    loop.remove_reader(12345)


@pytest.mark.parametrize("path", ["/dev/null", "/etc/hostname", "/"])
def test_what_cannot_be_waited_for(loop: EventLoop, path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(OSError, match="not permitted"):
        loop.add_reader(fd, lambda: None)
    os.close(fd)
    loop.call_soon_threadsafe(lambda: None)
    loop.run_once()


def test_waking_from_another_thread(loop: EventLoop) -> None:
    thread = threading.Timer(0.05, loop.wake)
    thread.start()
    loop.run_once()
    thread.join()
    loop.wake()
    loop.wake()
    loop.run_once()


def test_closing() -> None:
    with nothing_left():
        loop = EventLoop()
        loop.close()
        loop.close()
        loop.wake()


class Lingering:
    """An epoll that gives other threads a while after it has registered a descriptor."""

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll

    def register(self, fd: int, events: int) -> None:
        self._epoll.register(fd, events)
        time.sleep(0.02)

    def __getattr__(self, name: str) -> object:
        return getattr(self._epoll, name)


class TestThread:
    @pytest.fixture
    def failures(self) -> list[Exception]:
        return []

    @pytest.fixture
    def thread(self, failures: list[Exception]) -> Iterator[LoopThread]:
        made = LoopThread("test-loop", failures.append)
        yield made
        made.close()

    def test_callbacks_run_in_it(self, thread: LoopThread, event: int) -> None:
        names: list[str] = []
        done = threading.Event()

        def note() -> None:
            names.append(threading.current_thread().name)
            if len(names) == 3:
                done.set()

        thread.loop.call_soon_threadsafe(note)
        until(lambda: len(names) == 1)
        thread.loop.add_reader(event, note, edge=True)
        os.eventfd_write(event, 1)
        until(lambda: len(names) == 2)
        thread.loop.call_soon_threadsafe(lambda: thread.loop.set_timer("t", time.monotonic(), note))
        assert done.wait(WAIT)
        assert names == ["test-loop"] * 3

    def test_an_edge_that_was_there_before_its_descriptor(
        self, thread: LoopThread, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is found by the thread that waits while another one is still adding it."""
        monkeypatch.setattr(thread.loop, "_epoll", Lingering(thread.loop._epoll))
        thread.loop.wake()
        seen, fd = threading.Event(), os.eventfd(1, os.EFD_NONBLOCK)
        thread.loop.add_reader(fd, seen.set, edge=True)
        assert seen.wait(WAIT)
        thread.loop.remove_reader(fd)
        os.close(fd)

    def test_work_of_many_threads(self, thread: LoopThread) -> None:
        done: list[int] = []

        def give(first: int) -> None:
            for i in range(200):
                thread.loop.call_soon_threadsafe(lambda i=i: done.append(first + i))

        givers = [threading.Thread(target=give, args=(1000 * i,)) for i in range(4)]
        for giver in givers:
            giver.start()
        for giver in givers:
            giver.join(WAIT)
        until(lambda: len(done) == 800)
        for i in range(4):
            assert [n for n in done if n // 1000 == i] == list(range(1000 * i, 1000 * i + 200))

    def test_removed_from_outside(self, thread: LoopThread, event: int) -> None:
        calls: list[int] = []
        thread.loop.add_reader(event, lambda: calls.append(1), edge=True)
        os.eventfd_write(event, 1)
        until(lambda: calls)
        thread.loop.remove_reader(event)
        before = len(calls)
        os.eventfd_write(event, 1)
        passed = threading.Event()
        thread.loop.call_soon_threadsafe(passed.set)
        assert passed.wait(WAIT)
        assert len(calls) == before

    def test_what_raises_ends_nothing(self, thread: LoopThread, failures: list[Exception]) -> None:
        error = ValueError("wrong")

        def fail() -> None:
            raise error

        passed = threading.Event()
        thread.loop.call_soon_threadsafe(fail)
        thread.loop.call_soon_threadsafe(passed.set)
        assert passed.wait(WAIT)
        assert failures == [error]

    def test_closing_waits_for_what_it_does(self) -> None:
        entered, go_on, left = threading.Event(), threading.Event(), threading.Event()

        def work() -> None:
            entered.set()
            assert go_on.wait(WAIT)
            left.set()

        with nothing_left():
            thread = LoopThread("test-loop", lambda _: None)
            thread.loop.call_soon_threadsafe(work)
            assert entered.wait(WAIT)
            closing = threading.Thread(target=thread.close)
            closing.start()
            closing.join(0.05)
            assert closing.is_alive()
            go_on.set()
            closing.join(WAIT)
            assert left.is_set()
            thread.close()
            thread.loop.call_soon_threadsafe(work)
