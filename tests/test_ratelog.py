"""A bounded number of log lines, and no line that stays hidden."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from guestio import budgets, ratelog
from guestio.ratelog import RateLimitedLog

log = logging.getLogger("guestio.test_ratelog")


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(ratelog, "time", made)
    return made


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.name == log.name]
    caplog.clear()
    return found


def test_the_first_at_once_then_a_count(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    limited = RateLimitedLog(burst=3, lines=100, interval=10)
    for i in range(8):
        limited.report(log, logging.WARNING, "line %d", i)
    assert lines(caplog) == ["line 0", "line 1", "line 2"]
    clock.now += 9.9
    limited.report(log, logging.WARNING, "line %d", 8)
    assert lines(caplog) == []
    clock.now += 0.2
    limited.report(log, logging.WARNING, "line %d", 9)
    assert lines(caplog) == ["6 more lines like this were not logged: line 3", "line 9"]


def test_one_kind_does_not_hide_another(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    limited = RateLimitedLog(burst=2, lines=100, interval=10)
    for _ in range(50):
        limited.report(log, logging.WARNING, "flood")
    limited.report(log, logging.ERROR, "the disk is on fire")
    assert lines(caplog) == ["flood", "flood", "the disk is on fire"]


def test_all_kinds_together_are_bounded(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    limited = RateLimitedLog(burst=2, lines=5, interval=10)
    for i in range(20):
        limited.report(log, logging.WARNING, f"kind {i}")
    assert len(lines(caplog)) == 5
    limited.flush()
    assert len(lines(caplog)) == 15


def test_a_flood_for_a_day(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    limited = RateLimitedLog(burst=10, lines=60, interval=10)
    for _ in range(8640):
        clock.now += 1
        for _ in range(20):
            limited.report(log, logging.WARNING, "front-end %d gone", 7)
    limited.flush()
    found = lines(caplog)
    shown = sum(1 for line in found if line == "front-end 7 gone")
    counted = sum(int(line.split()[0]) for line in found if "more lines" in line)
    assert shown + counted == 8640 * 20
    assert len(found) <= 8640 / 10 * 11 + 11


def test_the_watcher_is_called_once_when_lines_are_hidden(clock: Clock) -> None:
    limited = RateLimitedLog(burst=1, lines=10, interval=10)
    told: list[float] = []
    limited.watch(told.append)
    clock.now += 1
    for _ in range(3):
        limited.report(log, logging.DEBUG, "x")
        clock.now += 1
    assert told == [9]
    limited.flush()
    limited.report(log, logging.DEBUG, "x")
    assert told == [9]
    limited.unwatch(told.append)
    limited.report(log, logging.DEBUG, "x")
    assert told == [9]


def test_a_trace(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    limited = RateLimitedLog(burst=1, lines=10, interval=10)
    try:
        raise ValueError("of a device")
    except ValueError:
        limited.report(log, logging.WARNING, "failed", trace=True)
    record = caplog.records[-1]
    assert record.exc_info is None
    assert record.exc_text is not None
    assert record.exc_text.startswith("Traceback (last calls):\n")
    assert record.exc_text.endswith("ValueError: of a device")
    assert "raise ValueError" in record.exc_text


class MuteError(Exception):
    def __str__(self) -> str:
        raise asyncio.CancelledError


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        raise ValueError


def deep(level: int) -> None:
    if level:
        deep(level - 1)
    try:
        raise KeyError("first" * 5000)
    except KeyError as error:
        raise ValueError("second\nINFO forged" + "\t" * 5000) from error


def test_texts_of_foreign_code_are_one_short_line(caplog: pytest.LogCaptureFixture) -> None:
    limited = RateLimitedLog(burst=100, lines=100, interval=10)
    for value in (
        MuteError(),
        Text("ok"),
        ValueError("A" * 5_000_000),
        "a\nb\x1b[2J\udc80",
        ValueError("é" * 20),
        "\n" * 5_000_000,
        3,
    ):
        limited.report(log, logging.WARNING, "it says %s", value)
    found = lines(caplog)
    assert found[0] == "it says (MuteError, whose str() raised CancelledError)"
    assert found[1] == "it says ok"
    assert found[2] == "it says " + "A" * budgets.LOG_TEXT + "... (5000000 characters)"
    assert found[3] == "it says a\\nb\\x1b[2J\\udc80"
    assert found[4] == "it says " + "é" * 20
    assert len(found[5]) < budgets.LOG_TEXT + 50
    assert found[6] == "it says 3"


def test_a_trace_is_bounded_and_forges_no_line(caplog: pytest.LogCaptureFixture) -> None:
    limited = RateLimitedLog(burst=100, lines=100, interval=10)
    for level in (0, 500):
        try:
            deep(level)
        except ValueError as error:
            limited.report(log, logging.WARNING, "failed", trace=error)
        text = caplog.records[-1].exc_text
        assert text is not None
        assert len(text) <= budgets.LOG_TRACE + 4
        assert "\nINFO" not in text
        assert text.rstrip().endswith("characters)")
        assert "KeyError" in text or level
        assert "ValueError: second\\nINFO forged" in text


def test_a_trace_of_causes_that_go_in_a_circle(caplog: pytest.LogCaptureFixture) -> None:
    limited = RateLimitedLog(burst=100, lines=100, interval=10)
    first, second = ValueError("first"), ValueError("second")
    first.__context__, second.__cause__ = second, first
    limited.report(log, logging.WARNING, "failed", trace=first)
    text = caplog.records[-1].exc_text
    assert text is not None
    assert (text.count("first"), text.count("second")) == (1, 1)


def test_nothing_is_lost_between_threads(caplog: pytest.LogCaptureFixture) -> None:
    limited = RateLimitedLog(burst=5, lines=100, interval=3600)
    threads = [
        threading.Thread(
            target=lambda: [limited.report(log, logging.WARNING, "x") for _ in range(500)]
        )
        for _ in range(4)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    limited.flush()
    found = lines(caplog)
    assert found[:5] == ["x"] * 5
    assert found[5:] == ["1995 more lines like this were not logged: x"]
