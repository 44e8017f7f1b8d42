"""CPU time of a disk's server per request: while it is watched, recorded or migrated, and without.

A `guestio blk` on one processor, the load on another. Rounds with and without alternate, and what
counts are medians of the ratios within a round; CPU time is user and system time of all threads of
the server, by the scheduler's count. What a recorder uses is shown apart: it is a process of its
own, `guestio record`.

    ./run bench watching
    ./run bench watching --only log --rounds 16
    ./run bench watching --page

`--page` has what the inspector asks for asked of an idle server, as often as it does, and shows the
server's CPU time per second, with some numbers of translations in the IOTLB.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from guestio.addr import Permissions
from guestio.control.client import ControlClient
from guestio.guest.load import Load, cpu_seconds
from guestio.guest.plan import LoadPlan
from guestio.testing import Driver
from guestio.vhost_user import Frontend

IMAGE_BYTES = 256 << 20
PAGE = 4096
LOAD_CPU, SERVER_CPU = 0, 1
LOOK_SECONDS = 1.0
MAP_SECONDS = 2.0
MAP_PARTS = 1024
"""As the inspector has them."""


@dataclass(frozen=True)
class Case:
    """A load, and what is on in one half of the rounds.

    Attributes:
        what: ``control``, ``record`` or ``log``.
        name: Of the load.
        plan: The load.
        requests: Of a round.
    """

    what: str
    name: str
    plan: LoadPlan
    requests: int


def _cases() -> list[Case]:
    deep = LoadPlan(workload="randread", depth=32)
    loads = [
        ("4K randread depth 32", deep, 200_000),
        ("4K randread depth 1", LoadPlan(workload="randread", depth=1), 40_000),
        ("128K read depth 8", LoadPlan(workload="read", block_size=128 << 10, depth=8), 20_000),
    ]
    static = LoadPlan(workload="read", block_size=128 << 10, depth=8, iommu="static")
    return [
        Case("control", *loads[0]),
        Case("record", *loads[0]),
        *(Case("log", *load) for load in loads),
        Case("log", "128K read depth 8, IOMMU static", static, 20_000),
    ]


@contextlib.contextmanager
def serving(directory: Path, *, control: bool) -> Iterator[int]:
    """A disk's server at ``disk.sock``, maybe with a control socket at ``control``; its process."""
    socket = directory / "disk.sock"
    socket.unlink(missing_ok=True)
    command = [sys.executable, "-m", "guestio", "blk", str(directory / "disk.img")]
    command += ["--socket", str(socket)]
    if control:
        command += ["--control", str(directory / "control")]
    with subprocess.Popen(
        ["taskset", "-c", str(SERVER_CPU), *command], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            if "listening" not in line:
                raise RuntimeError(line + process.stderr.read())
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield process.pid
        finally:
            process.terminate()


@contextlib.contextmanager
def polling(control: Path) -> Iterator[None]:
    """Ask for the status each second."""
    over = threading.Event()

    def poll() -> None:
        client = ControlClient(control)
        while not over.wait(LOOK_SECONDS):
            client.status()

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def recording(control: Path, path: Path) -> Iterator[int]:
    """Record in another process, on the load's processor; that process."""
    command = [sys.executable, "-m", "guestio", "record", str(control), "-o", str(path)]
    with subprocess.Popen(
        ["taskset", "-c", str(LOAD_CPU), *command], stderr=subprocess.DEVNULL
    ) as process:
        try:
            while not path.exists() or not path.stat().st_size:
                time.sleep(0.05)
            # It opens the rings after the file.
            time.sleep(0.5)
            yield process.pid
        finally:
            process.kill()
            process.wait()
            path.unlink(missing_ok=True)


def _round(load: Load, pid: int, requests: int) -> float:
    """CPU time of the server per request, us."""
    before = cpu_seconds(pid)
    done = load.run_requests(requests).requests
    return (cpu_seconds(pid) - before) / done * 1e6


def measure(case: Case, directory: Path, rounds: int) -> tuple[list[float], list[float], float]:
    """CPU time per request without and with, round by round; and of a recorder, the median."""
    without, with_, beside = [], [], []
    with contextlib.ExitStack() as stack:
        pid = stack.enter_context(serving(directory, control=case.what != "log"))
        load = stack.enter_context(Load(directory / "disk.sock", case.plan, connect_wait=10.0))
        bare, bare_pid = load, pid
        if case.what == "control":
            other = directory / "bare"
            other.mkdir()
            (other / "disk.img").symlink_to(directory / "disk.img")
            bare_pid = stack.enter_context(serving(other, control=False))
            bare = stack.enter_context(Load(other / "disk.sock", case.plan, connect_wait=10.0))
        for each, at in ((load, pid), (bare, bare_pid)):
            _round(each, at, case.requests)
        for _ in range(rounds):
            without.append(_round(bare, bare_pid, case.requests))
            with contextlib.ExitStack() as on:
                recorder = None
                if case.what == "control":
                    on.enter_context(polling(directory / "control"))
                elif case.what == "record":
                    path = directory / "recording"
                    recorder = on.enter_context(recording(directory / "control", path))
                    before = cpu_seconds(recorder)
                else:
                    assert isinstance(load.frontend, Frontend)
                    load.frontend.start_logging()
                    on.callback(load.frontend.stop_logging)
                with_.append(_round(load, pid, case.requests))
                if recorder is not None:
                    # It writes what is left.
                    time.sleep(0.3)
                    beside.append((cpu_seconds(recorder) - before) / case.requests * 1e6)
    return without, with_, statistics.median(beside) if beside else 0.0


def page(directory: Path, entries: int, seconds: float) -> tuple[float, float, float]:
    """CPU time of a server in ms per second: alone, with ``top``, with the inspector open."""
    with (
        serving(directory, control=True) as pid,
        Driver(directory / "disk.sock", iommu="strict") as driver,
    ):
        begin = 1 << 40
        for i in range(entries):
            # Not in a row, so that nothing is put together.
            driver.frontend.iotlb.map(begin + 2 * PAGE * i, 0, PAGE, Permissions.READ_WRITE)
            driver.frontend.iotlb.push(begin + 2 * PAGE * i)
        driver.frontend.sync()
        client = ControlClient(directory / "control")
        iotlb = client.status()["iotlb"]
        found = 0 if iotlb is None else iotlb["entries"]
        if found < entries:
            raise RuntimeError(f"{found} translations are there of {entries}")
        bits = (max(2 * PAGE * entries, PAGE * MAP_PARTS) - 1).bit_length()
        maps = [
            f"/map?address={begin}&length={1 << bits}&parts={MAP_PARTS}&of=iova",
            f"/map?address=0&length={1 << 30}&parts={MAP_PARTS}&of=memory",
        ]
        figures = []
        for asked in ([], ["/status"], ["/status", *maps]):
            before, began, looks = cpu_seconds(pid), time.monotonic(), 0
            while (now := time.monotonic()) < began + seconds:
                for target in asked:
                    if target == "/status" or looks % round(MAP_SECONDS / LOOK_SECONDS) == 0:
                        client.get(target)
                looks += 1
                time.sleep(max(now + LOOK_SECONDS - time.monotonic(), 0))
            passed = time.monotonic() - began
            figures.append((cpu_seconds(pid) - before) / passed * 1000)
        return figures[0], figures[1], figures[2]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="bench/watching.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=9, help="with and without (9)")
    parser.add_argument("--only", default="", help="control, record or log")
    parser.add_argument(
        "--page", action="store_true", help="what an open page costs an idle server"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of each with --page (20)")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {LOAD_CPU})
    with tempfile.TemporaryDirectory(prefix="guestio-bench-", dir="/dev/shm") as name:
        directory = Path(name)
        (directory / "disk.img").write_bytes(os.urandom(IMAGE_BYTES))
        if arguments.page:
            print("translations   alone   with top   with the inspector   (ms of CPU per second)")
            for entries in (0, 1000, 100_000):
                alone, top, whole = page(directory, entries, arguments.seconds)
                print(f"{entries:12,} {alone:7.2f} {top:10.2f} {whole:20.2f}")
            return
        for case in _cases():
            if arguments.only not in case.what:
                continue
            without, with_, beside = measure(case, directory, arguments.rounds)
            ratios = [b / a for a, b in zip(without, with_, strict=True)]
            print(
                f"{case.what:8} {case.name:32} {statistics.median(without):6.2f} us without, "
                f"{statistics.median(with_):6.2f} with: {statistics.median(ratios):.3f} "
                f"({min(ratios):.3f} to {max(ratios):.3f})"
                + (f"; the recorder {beside:.2f} us" if beside else ""),
                flush=True,
            )


if __name__ == "__main__":
    main()
