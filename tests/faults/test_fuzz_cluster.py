"""`guestio fuzz --scheduler`: Dask workers find what one process finds, also when one is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.fuzz_victim import VICTIM

FIRST, CASES = 18, 24
PATIENCE = "20"
WAIT = 120.0
COMMAND = f"{sys.executable} {VICTIM} {{socket}} --die-at 28,29"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler's address, and its two workers, which nothing starts again."""
    about = tmp_path / "scheduler.json"
    common = ["--scheduler-file", str(about), "--no-dashboard"]
    module = "distributed.cli.dask_"
    with contextlib.ExitStack() as stack:

        def start(kind: str, *words: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                [sys.executable, "-m", module + kind, *common, *words],
                cwd=tmp_path,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        start("scheduler", "--host", "127.0.0.1", "--port", "0")
        wait_for(about.exists)
        workers = [start("worker", "--no-nanny", "--nthreads", "1") for _ in range(2)]
        yield json.loads(about.read_text())["address"], workers


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> set[str]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return {child for task in tasks for child in (task / "children").read_text().split()}


def words(out: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "guestio", "fuzz", "--device", "blk", "--seed", str(FIRST)),
        *(
            "--cases",
            str(CASES),
            "--patience",
            PATIENCE,
            "--command",
            COMMAND,
            "--out",
            str(out),
            "--json",
            *more,
        ),
    ]


def told(text: str) -> tuple[list[tuple[str, list[int]]], int]:
    data = json.loads(text)
    return [(each["signature"], each["seeds"]) for each in data["findings"]], data["played"]


def test_a_worker_is_killed_and_nothing_is_lost(
    cluster: tuple[str, list[subprocess.Popen[bytes]]], tmp_path: Path
) -> None:
    address, workers = cluster
    with subprocess.Popen(
        words(tmp_path / "many", "--scheduler", address), stdout=subprocess.PIPE, text=True
    ) as many:
        # Both have begun: their back-ends and those that watch over these are there.
        wait_for(lambda: all(len(children(each.pid)) >= 2 for each in workers))
        assert many.poll() is None
        backends = children(workers[0].pid)
        os.kill(workers[0].pid, signal.SIGKILL)
        found, _ = many.communicate(timeout=WAIT)
    assert many.returncode == 1
    one = subprocess.run(
        words(tmp_path / "one"), capture_output=True, text=True, timeout=WAIT, check=False
    )
    assert told(found) == told(one.stdout)
    assert told(found)[1] == CASES
    assert len(told(found)[0]) >= 2
    state = json.loads((tmp_path / "many" / "state.json").read_text())
    assert state["done"] == [[FIRST, FIRST + CASES]]
    wait_for(lambda: not any(alive(int(pid)) for pid in backends))


def alive(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def test_a_scheduler_that_is_not_there_is_said(tmp_path: Path) -> None:
    done = subprocess.run(
        words(tmp_path / "out", "--scheduler", "tcp://127.0.0.1:1"),
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("guestio: no Dask scheduler answers at tcp://127.0.0.1:1")
