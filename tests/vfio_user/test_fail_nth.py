"""Whatever call of a vfio-user server fails: it lives, leaks nothing, and serves the next one.

This is a sample of what `./run fail-nth --mode vfio-user --mode nvme` tries, the same each time.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from guestio._core.base import variant
from tests.kit.fail_nth.matrix import MODES, Bench, cases
from tests.kit.fail_nth.script import Contents
from tests.kit.fail_nth.shim import ERRORS, build

WITHIN = 10.0
"""Seconds that the next client may wait at most; where nothing else runs it is below one."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vfio-user", "nvme"])
@pytest.mark.skipif(
    "asan" in variant.NAME, reason="a sanitizer's runtime must be the first that is loaded"
)
def test_after_any_failure_the_next_client_is_served(tmp_path: Path, name: str) -> None:
    library, contents, mode = build(tmp_path), Contents(tmp_path / "disk.img"), MODES[name]
    failed = set()
    with mode.serving(library, tmp_path, contents.path) as server:
        bench = Bench(server, contents, mode)
        for case in cases(bench.calls, [name for name in ERRORS if name != "python"], most=1):
            injected, took = bench.run(case)
            assert took < WITHIN, str(case)
            if injected:
                failed.add(case.function)
    # What the connection is meant to lead through.
    wanted = {"close", "send", "recvmsg", "accept4", "epoll_ctl", "epoll_wait", "mmap"}
    assert failed >= wanted | {"fdatasync", "preadv2", "pwritev", "fstat", "fcntl", "malloc"}
