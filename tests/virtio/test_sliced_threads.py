"""Threads that take turns between queues, slice by slice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

from guestio.virtio.slices import SlicedThreads

LIMIT = 20.0


@pytest.fixture
def one() -> Iterator[SlicedThreads]:
    threads = SlicedThreads(1, "test-slices")
    yield threads
    assert threads.close(LIMIT)


def steps(seen: list[str], name: str, count: int) -> Generator[None, None, int]:
    for index in range(count):
        seen.append(f"{name}{index}")
        yield
    return count


def held(go: threading.Event, entered: threading.Event) -> Generator[None, None, int]:
    entered.set()
    assert go.wait(LIMIT)
    yield
    return 0


def test_queues_take_turns_and_their_own_work_is_in_order(one: SlicedThreads) -> None:
    seen: list[str] = []
    go, entered = threading.Event(), threading.Event()
    futures = [one.submit(9, held(go, entered))]
    assert entered.wait(LIMIT)
    futures += [one.submit(0, steps(seen, "a", 3)), one.submit(0, steps(seen, "b", 1))]
    futures += [one.submit(1, steps(seen, "x", 2))]
    assert one.waiting == 3
    go.set()
    assert [each.result(LIMIT) for each in futures] == [0, 3, 1, 2]
    assert seen == ["a0", "x0", "a1", "x1", "a2", "b0"]


def test_another_queue_waits_for_one_slice(one: SlicedThreads) -> None:
    """However much is before it."""
    seen: list[str] = []
    go, entered = threading.Event(), threading.Event()
    one.submit(9, held(go, entered))
    assert entered.wait(LIMIT)
    flood = [one.submit(0, steps(seen, f"{i}.", 100)) for i in range(100)]
    other = one.submit(1, steps(seen, "other", 1))
    go.set()
    assert other.result(LIMIT) == 1
    assert seen.index("other0") == 1
    assert sum(each.result(LIMIT) for each in flood) == 10000


def test_a_failure_ends_its_own_work_only(one: SlicedThreads) -> None:
    def fail() -> Generator[None, None, int]:
        yield
        raise OSError("broken")

    bad, good = one.submit(0, fail()), one.submit(0, steps([], "a", 1))
    with pytest.raises(OSError, match="broken"):
        bad.result(LIMIT)
    assert good.result(LIMIT) == 1


def test_what_is_cancelled_is_not_begun(one: SlicedThreads) -> None:
    seen: list[str] = []
    go, entered = threading.Event(), threading.Event()
    one.submit(9, held(go, entered))
    assert entered.wait(LIMIT)
    unwanted, wanted = one.submit(0, steps(seen, "a", 1)), one.submit(0, steps(seen, "b", 1))
    assert unwanted.cancel()
    go.set()
    assert wanted.result(LIMIT) == 1
    assert seen == ["b0"]


def test_threads_are_started_as_there_is_work() -> None:
    threads = SlicedThreads(3, "test-slices")
    go = threading.Event()
    entered = [threading.Event() for _ in range(5)]
    futures = [threads.submit(i, held(go, each)) for i, each in enumerate(entered)]
    for each in entered[:3]:
        assert each.wait(LIMIT)
    assert not entered[3].is_set()
    names = sorted(t.name for t in threading.enumerate() if t.name.startswith("test-slices"))
    assert names == ["test-slices_0", "test-slices_1", "test-slices_2"]
    go.set()
    assert [each.result(LIMIT) for each in futures] == [0] * 5
    assert threads.close(LIMIT)
    assert not [t for t in threading.enumerate() if t.name.startswith("test-slices")]


def test_a_lack_of_threads_costs_no_work_that_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = SlicedThreads(2, "test-slices")
    seen: list[str] = []
    go, entered = threading.Event(), threading.Event()

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="new thread"):
            threads.submit(0, steps(seen, "a", 1))
        assert threads.waiting == 0
    first = threads.submit(0, held(go, entered))
    assert entered.wait(LIMIT)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        second = threads.submit(1, steps(seen, "b", 1))
    go.set()
    assert (first.result(LIMIT), second.result(LIMIT)) == (0, 1)
    assert seen == ["b0"]
    assert threads.close(LIMIT)


def test_closing_waits_for_what_was_submitted_but_not_for_ever() -> None:
    threads = SlicedThreads(1, "test-slices")
    go, entered = threading.Event(), threading.Event()
    stuck, behind = threads.submit(0, held(go, entered)), threads.submit(0, steps([], "a", 3))
    assert entered.wait(LIMIT)
    assert not threads.close(0.05)
    with pytest.raises(RuntimeError, match="closed"):
        threads.submit(0, steps([], "b", 1))
    go.set()
    assert threads.close(LIMIT)
    assert (stuck.result(0), behind.result(0)) == (0, 3)


def test_a_lack_of_memory_costs_the_work_and_not_the_thread(
    one: SlicedThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking: list[str] = []

    def short(name: str) -> Callable[..., Any]:
        method = getattr(SlicedThreads, name)

        def instead(self: SlicedThreads, *args: Any, **options: Any) -> Any:
            if name in lacking and options.get("first", True):
                lacking.remove(name)
                raise MemoryError(name)
            return method(self, *args, **options)

        return instead

    for name in ("_take", "_put", "_work_on"):
        monkeypatch.setattr(SlicedThreads, name, short(name))
    for name in ("_put", "_work_on"):
        lacking.append(name)
        with pytest.raises(MemoryError, match=name):
            one.submit(0, steps([], "a", 3)).result(LIMIT)
        assert one.submit(0, steps([], "b", 3)).result(LIMIT) == 3
    lacking.append("_take")
    assert one.submit(0, steps([], "c", 1)).result(LIMIT) == 1
    assert one.submit(0, steps([], "d", 1)).result(LIMIT) == 1
    assert lacking == []
