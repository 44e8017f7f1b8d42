"""Recordings of many generated requests, and what their report costs: here, and on a cluster.

`--workers N` has as many local workers of Dask make the same report, each in a process of its own
with `--memory` for its rows, and `--compare` has DuckDB answer all questions for all rows at once:
all three must be the same. `--lose` kills a worker in the middle, and starts another one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.recordings import generate
from guestio.budgets import REPORT_MEMORY_BYTES
from guestio.observe.queries import Merger, ask, connected, make_views_of_files, processors
from guestio.observe.report import DataSet, assemble_report


def report(directory: Path, *more: str) -> dict[str, Any]:
    """`guestio report`, with what it took."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "guestio", "report", os.fspath(directory), "--json", *more]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    took, used = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"guestio report {' '.join(more)}: {took:.1f} s, {cpu:.1f} s of its CPU, "
        f"{used.ru_maxrss / 1024:,.0f} MiB at most",
        flush=True,
    )
    found: dict[str, Any] = json.loads(out)
    return found


def at_once(directory: Path) -> dict[str, Any]:
    """The same report, of answers that DuckDB gave for all rows at once."""
    started, used = time.monotonic(), time.process_time()
    found, files = DataSet(directory), {}
    for part in found.parts(1 << 62):
        files[part.path] = part.path, part.shift_ns
    with (
        connected(REPORT_MEMORY_BYTES, processors()) as connection,
        connected(REPORT_MEMORY_BYTES, 1) as other,
    ):
        make_views_of_files(connection, files)
        merger = Merger(other)
        merger.add(ask(connection))
        made = json.loads(json.dumps(assemble_report(merger.found(), found)))
    print(
        f"DuckDB, all rows at once: {time.monotonic() - started:.1f} s, "
        f"{time.process_time() - used:.1f} s of CPU",
        flush=True,
    )
    return dict(made)


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """A process of Dask's."""
    return subprocess.Popen(
        [sys.executable, "-m", "dask", *arguments],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


@contextmanager
def cluster(workers: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler and its workers on this machine, of one thread each."""
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="guestio-") as directory:
        file = Path(directory, "scheduler.json")

        def end(process: subprocess.Popen[bytes]) -> None:
            process.kill()
            process.wait()

        scheduler = start(
            "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
            "--scheduler-file", str(file),
        )  # fmt: skip
        stack.callback(end, scheduler)
        while not file.exists():
            time.sleep(0.1)
        address: str = json.loads(file.read_text())["address"]
        started = []
        for _ in range(workers):
            started.append(
                start("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard",
                      "--local-directory", directory)
            )  # fmt: skip
            stack.callback(end, started[-1])
        yield address, started


def most_memory(pid: int) -> float:
    """The most memory of a process so far, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def on_cluster(directory: Path, workers: int, memory: int, *, lose: bool) -> dict[str, Any]:
    """The report by a cluster, with the memory of its workers."""
    with cluster(workers) as (address, started):
        killer = None
        if lose:
            # From outside, while this process waits for the report.
            killer = subprocess.Popen(["sh", "-c", f"sleep 20; kill -KILL {started[0].pid}"])
        found = report(directory, "--scheduler", address, "--memory", str(memory))
        if killer is not None:
            killer.wait()
            print(f"a worker ended: {started[0].wait() == -signal.SIGKILL}")
        for worker in started:
            if worker.poll() is None:
                print(f"a worker: {most_memory(worker.pid):,.0f} MiB at most")
    return found


def main() -> int:
    """Generate, report, compare, and print what that took."""
    parser = argparse.ArgumentParser(prog="bench report", description=__doc__)
    parser.add_argument("--requests", type=float, default=1e7, help="in all (default: 1e7)")
    parser.add_argument("--files", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="of a cluster on this machine")
    parser.add_argument("--memory", type=int, default=400, help="MiB of each worker for rows")
    parser.add_argument("--lose", action="store_true", help="kill a worker after 20 s")
    parser.add_argument("--compare", action="store_true", help="with all rows at once")
    parser.add_argument("--keep", type=Path, help="a directory for the recordings")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="guestio-") as temporary:
        directory = arguments.keep or Path(temporary)
        directory.mkdir(exist_ok=True)
        started = time.monotonic()
        for number in range(arguments.files):
            path = directory / f"generated-{number}.parquet"
            if not path.exists():
                generate(path, int(arguments.requests) // arguments.files, number)
        took = time.monotonic() - started
        bytes_ = sum(path.stat().st_size for path in directory.glob("*.parquet"))
        print(
            f"{arguments.requests:,.0f} requests in {bytes_ / 1e6:,.0f} MB, made in {took:.1f} s",
            flush=True,
        )
        reports = [report(directory)]
        if arguments.workers:
            reports.append(
                on_cluster(directory, arguments.workers, arguments.memory, lose=arguments.lose)
            )
        if arguments.compare:
            reports.append(at_once(directory))
    if any(found != reports[0] for found in reports):
        print("the reports differ", file=sys.stderr)
        return 1
    if len(reports) > 1:
        print(f"{len(reports)} reports, all the same")
    return 0


if __name__ == "__main__":
    sys.exit(main())
