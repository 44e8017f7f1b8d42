"""Whatever call of a vfio-user server fails: it lives, leaks nothing, and serves the next one.

And whatever call of a client fails: an error says so, nothing is left, and the next client works.
This is a sample of what `./run fail-nth --mode vfio-user --mode nvme --mode client` tries, the same
each time.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from guestio._core.base import variant
from tests.kit.fail_nth.matrix import MODES, cases
from tests.kit.fail_nth.shim import CLIENT_ERRORS, ERRORS, build

WITHIN = 10.0
"""Seconds that the next client may wait at most; where nothing else runs it is below one."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vfio-user", "nvme"])
@pytest.mark.skipif(
    "asan" in variant.NAME, reason="a sanitizer's runtime must be the first that is loaded"
)
def test_after_any_failure_the_next_client_is_served(tmp_path: Path, name: str) -> None:
    failed = set()
    with MODES[name].bench(build(tmp_path), tmp_path) as bench:
        for case in cases(bench.calls, [name for name in ERRORS if name != "python"], most=1):
            injected, took = bench.run(case)
            assert took < WITHIN, str(case)
            if injected:
                failed.add(case.function)
    # What the connection is meant to lead through.
    wanted = {"close", "send", "recvmsg", "accept4", "epoll_ctl", "epoll_wait", "mmap"}
    assert failed >= wanted | {"fdatasync", "preadv2", "pwritev", "fstat", "fcntl", "malloc"}


@pytest.mark.slow
@pytest.mark.skipif(
    "asan" in variant.NAME, reason="a sanitizer's runtime must be the first that is loaded"
)
def test_after_any_failure_of_a_client_the_next_one_works(tmp_path: Path) -> None:
    failed = set()
    with MODES["client"].bench(build(tmp_path), tmp_path) as bench:
        functions = [name for name in CLIENT_ERRORS if name != "python"]
        for case in cases(bench.calls, functions, most=1, errors=CLIENT_ERRORS):
            injected, _ = bench.run(case)
            if injected:
                failed.add(case.function)
    assert failed >= {"close", "recvmsg", "socket", "connect", "fcntl", "mmap", "pthread_create"}
    assert failed >= {"sendmsg", "poll", "open", "fstat", "process_vm_readv", "process_vm_writev"}
