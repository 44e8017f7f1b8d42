"""Whatever call of a back-end fails: it lives, leaks and misreports nothing, serves the next.

This is a sample of what `./run fail-nth` tries, the same each time.
"""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest

from guestio._core.base import variant
from tests.kit.fail_nth.matrix import MODES, Bench, cases
from tests.kit.fail_nth.script import Contents, whole_connection
from tests.kit.fail_nth.shim import ERRORS, SIGTERM, Server, build, fail_at_start

WITHIN = 10.0
"""Seconds that the next front-end may wait at most; where nothing else runs it is below one."""


pytestmark = pytest.mark.skipif(
    "asan" in variant.NAME, reason="a sanitizer's runtime must be the first that is loaded"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def contents(tmp_path: Path) -> Contents:
    return Contents(tmp_path / "disk.img")


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "most"), [("one thread", 4), ("queue threads", 2)])
def test_after_any_failure_the_next_front_end_is_served(
    library: Path, tmp_path: Path, contents: Contents, mode: str, most: int
) -> None:
    functions = [name for name in ERRORS if name != "python"]
    failed = set()
    with MODES[mode].serving(library, tmp_path, contents.path) as server:
        bench = Bench(server, contents, MODES[mode])
        for case in cases(bench.calls, functions, most=most):
            injected, took = bench.run(case)
            assert took < WITHIN, str(case)
            if injected:
                failed.add(case.function)
    # What the connection is meant to lead through.
    wanted = {"close", "recv", "send", "recvmsg", "sendmsg", "accept4", "epoll_ctl", "epoll_wait"}
    wanted |= {"mmap", "memfd_create", "ftruncate", "fallocate", "fdatasync", "preadv2", "pwritev"}
    assert failed >= wanted | {"fstat", "fcntl", "malloc"}


@pytest.mark.parametrize("nth", [1, 2, 30])
def test_a_signal_just_before_the_wait_ends_it(
    library: Path, tmp_path: Path, contents: Contents, nth: int
) -> None:
    """Python has looked for signals then, and looks again only after the wait."""
    with Server(library, tmp_path, contents.path) as server:
        server.arm("epoll_wait", nth, SIGTERM)
        whole_connection(server.socket, contents)
        start = time.monotonic()
        assert server.wait() == 0
        assert time.monotonic() - start < WITHIN
        assert not server.socket.exists()


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENOMEM])
@pytest.mark.parametrize(
    ("function", "nth"), [("eventfd", 2), ("epoll_create1", 2), ("epoll_ctl", 1)]
)
def test_a_failure_at_the_start_is_named(
    library: Path, tmp_path: Path, contents: Contents, function: str, nth: int, error: int
) -> None:
    status, said = fail_at_start(library, tmp_path, contents.path, function, nth, error)
    assert status == 1
    assert said.startswith("guestio: ")
    assert said.count("\n") == 1, said
    assert not (tmp_path / "s").exists()
