"""What holds for every test."""

import contextlib
import ctypes
import gc
import signal
import sys
import traceback
from collections.abc import Generator

import pytest

from guestio._core.base import variant
from guestio.ratelog import LOG
from lab.parts import PartsError


def pytest_report_header() -> str:
    return f"guestio's core: {variant.NAME}"


def pytest_configure() -> None:
    """Tests send SIGHUP to programs, which `nohup` would have them ignore."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what states how a core of larger capacities behaves."""
    for mark in item.iter_markers("capacity"):
        for name, least in mark.kwargs.items():
            if (has := variant.CAPACITIES[name]) < least:
                pytest.skip(f"states what a core with {name} of {least} does; here it is {has}")


@pytest.fixture(autouse=True, scope="module")
def _no_garbage_of_others() -> None:
    """Let go of what earlier modules left in cycles: tests here count fds and mappings."""
    gc.collect()


def pytest_sessionfinish() -> None:
    """Look for memory that nothing refers to any more; the report goes to a file."""
    if "asan" in variant.NAME:
        gc.collect()
        # Only Python's stack, which the sanitizer does not search, refers to running frames.
        running = [
            frame
            for top in sys._current_frames().values()
            for frame, _ in traceback.walk_stack(top)
        ]
        with contextlib.suppress(AttributeError):  # a runtime without it
            ctypes.CDLL(None).__lsan_do_recoverable_leak_check()
        del running


@pytest.fixture(autouse=True)
def _log_lines_of_its_own() -> None:
    """What earlier tests logged is not counted against this one's lines, nor how long it takes."""
    LOG._interval = 3600.0
    LOG.flush()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A part of the lab that is not to be had is named, without the way that led there."""
    report = yield
    if call.excinfo is not None and call.excinfo.errisinstance(PartsError):
        report.longrepr = f"missing: {call.excinfo.value}"
    return report
