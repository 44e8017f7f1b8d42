"""User instructions that `guestio blk` takes per request, however busy the machine is.

The rows are those of `bench block` in which guestio serves; the kernel, the load generator and
other back-ends are not counted. Where `perf` counts instructions it does so, otherwise the back
end runs in callgrind (`apt-get install valgrind`). The load depends on nothing but the numbers of
requests: the generator begins a queue's depth of requests at once, notifies once, and waits until
all of them are finished. N requests are counted, then 2 N on the same connection, and what is
shown is (I(2N) - I(N)) / N.

`--against DIRECTORY` counts another checkout's back-end with the same generator, and shows ratios.
Its core must have been built there: `python setup.py build_ext --inplace`.

`--log` compares with and without a dirty log, which is emptied before each count as in a migration.
`--record` compares with and without a recording, which this process makes: what its files cost is
not counted, as it is not the server's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from guestio.guest.load import Load
from guestio.guest.plan import LoadPlan
from guestio.observe import Recorder
from guestio.vhost_user import Frontend

IMAGE_BYTES = 16 << 20
START_LIMIT = 120.0
LIMIT = 1.03
HERE = Path(__file__).parent.parent
SLOW_CLOCK = Path(__file__).with_name("slow_clock.c")


@dataclass(frozen=True)
class Row:
    """What is counted.

    Attributes:
        name: For the table.
        plan: What the load is.
        requests: N, a multiple of 256: each 256th question of a back-end is acknowledged.
    """

    name: str
    plan: LoadPlan
    requests: int


def _rows() -> list[Row]:
    found = []
    for name, workload, size, depth, requests in (
        ("4K randread depth 32", "randread", 4096, 32, 2048),
        ("4K randwrite depth 32", "randwrite", 4096, 32, 2048),
        ("4K randread depth 1", "randread", 4096, 1, 512),
        ("128K read depth 8", "read", 128 << 10, 8, 512),
    ):
        shared: dict[str, Any] = {
            "workload": workload,
            "block_size": size,
            "depth": depth,
            "batches": True,
        }
        for iommu in ("off", "static", "strict"):
            plan = LoadPlan(iommu=iommu, **shared)
            found.append(Row(f"{name}, IOMMU {iommu}", plan, requests))
    plan = LoadPlan(iommu="strict", acknowledge="each", depth=32, batches=True)
    found.append(Row("4K randread depth 32, IOMMU strict, each acknowledged", plan, 1024))
    return found


class Counter(Protocol):
    """Counts the user instructions of a back-end."""

    def command(self, program: list[str], directory: Path) -> list[str]:
        """How to start the program so that it can be counted."""

    @contextlib.contextmanager
    def counting(self, pid: int, directory: Path) -> Iterator[list[int]]:
        """Count within this context; the list has the one number after it."""


class Perf:
    """`perf stat`, attached to the running program."""

    EVENT = "instructions:u"

    @classmethod
    def works(cls) -> bool:
        """Whether there is such a program and it counts instructions here."""
        if shutil.which("perf") is None:
            return False
        command = ["perf", "stat", "-x", ",", "-e", cls.EVENT, "true"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode == 0 and _perf_count(done.stderr) is not None

    def command(self, program: list[str], directory: Path) -> list[str]:
        return program

    @contextlib.contextmanager
    def counting(self, pid: int, directory: Path) -> Iterator[list[int]]:
        found: list[int] = []
        # Acknowledged, so that nothing before is counted and nothing after is missed.
        control, ack = directory / "perf.control", directory / "perf.ack"
        for path in (control, ack):
            path.unlink(missing_ok=True)
            os.mkfifo(path)
        command = ["perf", "stat", "-x", ",", "-e", self.EVENT, "-p", str(pid), "-D", "-1"]
        command += ["--control", f"fifo:{control},{ack}"]
        perf = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        with control.open("w") as orders, ack.open() as answers:
            orders.write("enable\n")
            orders.flush()
            answers.readline()
            yield found
            orders.write("disable\n")
            orders.flush()
            answers.readline()
        perf.send_signal(signal.SIGINT)
        _, text = perf.communicate(timeout=START_LIMIT)
        count = _perf_count(text)
        if count is None:
            raise SystemExit(f"perf counted nothing: {text.strip()}")
        found.append(count)


def _perf_count(text: str) -> int | None:
    match = re.search(rf"^(\d+),[^,]*,{re.escape(Perf.EVENT)}", text, re.MULTILINE)
    return int(match[1]) if match else None


class Callgrind:
    """Callgrind, in which the program runs from its start, with a slower clock.

    Attributes:
        last: The file that it wrote last.
    """

    last: Path

    def __init__(self) -> None:
        self._dumps = 0

    @staticmethod
    def works() -> bool:
        """Whether it is installed."""
        return shutil.which("valgrind") is not None

    def command(self, program: list[str], directory: Path) -> list[str]:
        self._dumps = 0
        clock = directory / "slow_clock.so"
        compiler = shlex.split(os.environ.get("CC", "cc"))
        subprocess.run(
            [*compiler, "-O2", "-fPIC", "-shared", "-o", str(clock), str(SLOW_CLOCK)], check=True
        )
        options = ["--tool=callgrind", f"--callgrind-out-file={directory / 'callgrind.out'}"]
        # Names in full, so that callgrind_annotate can read each dump by itself.
        options += ["--compress-strings=no", f"--log-file={directory / 'log'}"]
        return ["env", f"LD_PRELOAD={clock}", "valgrind", *options, *program]

    @contextlib.contextmanager
    def counting(self, pid: int, directory: Path) -> Iterator[list[int]]:
        found: list[int] = []
        self._dump(pid, directory)
        yield found
        text = self._dump(pid, directory).read_text()
        match = re.search(r"^summary: (\d+)", text, re.MULTILINE)
        assert match is not None, text[:400]
        found.append(int(match[1]))

    def _dump(self, pid: int, directory: Path) -> Path:
        """Have the costs since the last dump written to a file, and begin anew."""
        self._dumps += 1
        self.last = path = directory / f"callgrind.out.{self._dumps}"
        command = ["callgrind_control", "--dump", str(pid)]
        subprocess.run(command, check=True, capture_output=True, timeout=START_LIMIT)
        deadline = time.monotonic() + START_LIMIT
        while not path.exists() or "\ntotals:" not in path.read_text()[-200:]:
            if time.monotonic() > deadline:
                raise SystemExit(f"callgrind did not write {path}")
            time.sleep(0.02)
        return path


class Server:
    """A checkout's `guestio blk`, whose instructions are counted.

    Args:
        tree: The checkout.
        counter: Counts.
        directory: A place for its files, its own.
        control: Whether it has a control socket.
    """

    def __init__(
        self, tree: Path, counter: Counter, directory: Path, *, control: bool = False
    ) -> None:
        self._counter, self._directory = counter, directory
        self._socket = str(directory / "disk.sock")
        image = directory / "disk.img"
        image.write_bytes(os.urandom(IMAGE_BYTES))
        # The same Python for every checkout; its own comes first in its path.
        program = [sys.executable, "-m", "guestio", "blk", str(image), "--socket", self._socket]
        if control:
            program += ["--control", str(directory / "control")]
        environment = os.environ | {
            "PYTHONPATH": str(tree / "src"),
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self._process = subprocess.Popen(
            counter.command(program, directory),
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        line = self._process.stderr.readline()
        if not line.startswith("listening"):
            raise SystemExit(f"{tree}: {line}{self._process.stderr.read()}")
        # What it logs must not fill the pipe.
        self._log = threading.Thread(target=self._process.stderr.read)
        self._log.start()

    def count(self, row: Row, repeats: int, *, logs: bool = False, recorded: bool = False) -> float:
        """Instructions per request: the median of so many pairs of N and 2 N requests.

        Args:
            row: Of what load.
            repeats: Pairs.
            logs: Whether the pages that are written are logged meanwhile.
            recorded: Whether a recording is made meanwhile.
        """
        found = []
        with contextlib.ExitStack() as stack:
            load = stack.enter_context(
                Load(self._socket, row.plan, timeout=60.0, connect_wait=60.0)
            )
            if recorded:
                recording = self._directory / "recording"
                stack.callback(recording.unlink)
                stack.enter_context(Recorder(self._directory / "control", recording))
            log = None
            if logs:
                assert isinstance(load.frontend, Frontend)
                log = load.frontend.start_logging()
            load.run_requests(row.requests)
            for _ in range(repeats):
                counts = []
                for requests in (row.requests, 2 * row.requests):
                    if log is not None:
                        assert len(log.take())
                    with self._counter.counting(self._process.pid, self._directory) as counted:
                        done = load.run_requests(requests)
                    assert done.requests == requests
                    counts += counted
                found.append((counts[1] - counts[0]) / row.requests)
        return statistics.median(found)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._log.join()
        assert self._process.stderr is not None
        self._process.stderr.close()


def measure(
    rows: Sequence[Row],
    tree: Path,
    counter: Counter,
    repeats: int,
    keep: Path | None,
    *,
    logs: bool = False,
    control: bool = False,
    recorded: bool = False,
) -> dict[str, float]:
    """Instructions per request of every row for a checkout, one server for all of them.

    Args:
        rows: What to count.
        tree: The checkout.
        counter: Counts.
        repeats: Pairs of N and 2 N requests.
        keep: Where to keep the last file that callgrind wrote for each row, if anywhere.
        logs: Whether the pages that are written are logged meanwhile.
        control: Whether the server has a control socket.
        recorded: Whether a recording is made over it.
    """
    found = {}
    with tempfile.TemporaryDirectory(prefix="guestio-bench-", dir="/dev/shm") as name:
        server = Server(tree, counter, Path(name), control=control)
        try:
            for row in rows:
                found[row.name] = server.count(row, repeats, logs=logs, recorded=recorded)
                if keep is not None and isinstance(counter, Callgrind):
                    keep.mkdir(parents=True, exist_ok=True)
                    target = keep / row.name.replace(" ", "-").replace(",", "")
                    shutil.copy(counter.last, f"{target}.out")
        finally:
            server.close()
    return found


def show(now: dict[str, float], before: dict[str, float]) -> Table:
    """The numbers, and their ratios to those of another checkout where there are any."""
    table = Table("row", "instructions per request", *(("before", "ratio") if before else ()))
    for name, number in now.items():
        cells = [name, f"{number:,.0f}"]
        if name in before:
            ratio = number / before[name]
            more = ratio > LIMIT
            cells += [
                f"{before[name]:,.0f}",
                f"[bold red]{ratio:.3f}[/]" if more else f"{ratio:.3f}",
            ]
        table.add_row(*cells)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Count and print; 1 if a row takes too many more instructions than before."""
    parser = argparse.ArgumentParser(prog="bench/instructions.py", description=__doc__)
    parser.add_argument("--only", default="", help="only rows whose name has this in it")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of N and 2 N requests (3)")
    parser.add_argument("--against", type=Path, help="another checkout, to show ratios to it")
    parser.add_argument(
        "--baseline", type=Path, help="what --json printed before, instead of another checkout"
    )
    parser.add_argument(
        "--log", action="store_true", help="count with a dirty log, and compare with none"
    )
    parser.add_argument(
        "--record", action="store_true", help="count with a recording, and compare with none"
    )
    parser.add_argument("--control", action="store_true", help="with a control socket open")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--keep", type=Path, help="where to keep callgrind's files")
    given = parser.parse_args(arguments)
    rows = [row for row in _rows() if given.only in row.name]
    if (given.log or given.record) and (given.against or given.baseline):
        parser.error("--log and --record compare with no other checkout")
    if not rows or given.repeats < 1:
        parser.error("nothing to count")
    counter: Counter
    if Perf.works():
        counter = Perf()
    elif Callgrind.works():
        counter = Callgrind()
    else:
        parser.error("neither perf nor valgrind works here: apt-get install valgrind")
    console = Console(stderr=given.json)
    before: dict[str, float] = {}
    if given.baseline is not None:
        before = json.loads(given.baseline.read_text())
    if given.against is not None:
        keep = None if given.keep is None else given.keep / "against"
        with console.status(f"counting {given.against}"):
            before = measure(rows, given.against.resolve(), counter, given.repeats, keep)
    if given.log:
        with console.status("counting without a log"):
            before = measure(rows, HERE, counter, given.repeats, None)
    if given.record:
        with console.status("counting without a recording"):
            before = measure(rows, HERE, counter, given.repeats, None, control=True)
    with console.status("counting"):
        now = measure(
            rows,
            HERE,
            counter,
            given.repeats,
            given.keep,
            logs=given.log,
            control=given.control or given.record,
            recorded=given.record,
        )
    if given.json:
        print(json.dumps(now, indent=1))
    console.print(show(now, before))
    return int(any(now[name] > LIMIT * before[name] for name in now.keys() & before.keys()))


if __name__ == "__main__":
    sys.exit(main())
