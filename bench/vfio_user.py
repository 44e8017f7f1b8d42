"""A PCI device over vfio-user: what a request, a doorbell, a read and a mapping cost its server.

`guestio bench` drives the same disk over vhost-user and as a PCI function over vfio-user, in turn,
and a compiled NVMe driver an NVMe controller of the same image; load on one CPU and server on
another, each with a fresh server: CPU time of the server per request, and its ratio to that of
vhost-user. What is shown are medians over the rounds, and medians of the ratios
within each round.

Then a device with one register and nothing else is driven by `guestio.vfio_user.Client`: posted
writes (doorbells), reads, and pairs of a mapping and its removal, with the server's CPU time and
the time that the driver waited for each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.block import BACKEND_CPU, IMAGE_BYTES, LOAD_CPU, START_LIMIT, warn_if_busy
from guestio import Backing
from guestio.dma import DmaMapRequest
from guestio.guest.load import cpu_seconds
from guestio.vfio_user import Client, VfioUserTarget

PAGE = 4096
_SERVE = """
import sys
from guestio.pci import Bar, PciDevice, VirtioPci
from guestio.vfio_user import Server

class Nothing(PciDevice):
    vendor_id, device_id = 0x1234, 1
    bars = {0: Bar(4096)}

if sys.argv[1] == "blk":
    from guestio.virtio.blk import BlockDevice
    device = VirtioPci(BlockDevice(sys.argv[3], num_queues=1), iommu="off")
elif sys.argv[1] == "nvme":
    from guestio.pci import NvmeController
    device = NvmeController(sys.argv[3], read_only=True)
else:
    device = Nothing()
Server(device, sys.argv[2]).serve()
"""


_DRIVE_NVME = """
import json, sys
from guestio.guest.load import cpu_seconds
from guestio.guest.nvme_load import NvmeLoad

path, pid, seconds, depth = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
with NvmeLoad(path, depth=depth) as load:
    load.run(seconds / 5)
    before = cpu_seconds(pid)
    result = load.run(seconds)
    used = cpu_seconds(pid) - before
    load.drain()
print(json.dumps({
    "iops": result.iops, "requests": result.requests, "kicks": result.doorbells,
    "interrupts": result.interrupts, "latency_us": {"mean": result.mean_us},
    "cpu": {"us_per_request": used * 1e6 / result.requests},
}))
"""


@dataclass
class Case:
    """A way to a disk.

    Attributes:
        name: For the table.
        transport: For `guestio bench --transport`.
        measured: What that said, one for each round.
    """

    name: str
    transport: str
    measured: list[dict[str, Any]] = field(default_factory=list)

    def figures(self, name: str) -> list[float]:
        """One figure of every round: ``iops``, ``cpu_us``, ``mean`` latency."""
        if name == "cpu_us":
            return [one["cpu"]["us_per_request"] for one in self.measured]
        if name == "mean":
            return [one["latency_us"]["mean"] for one in self.measured]
        return [one[name] for one in self.measured]

    def ratio(self, base: Case, name: str) -> float:
        """The median of the ratios to another case's, round by round."""
        pairs = zip(self.figures(name), base.figures(name), strict=True)
        return statistics.median(a / b if b else float("nan") for a, b in pairs)


CASES = (
    ("blk, vhost-user", "vhost-user"),
    ("blk, vfio-user, posted writes", "vfio-user"),
    ("blk, vfio-user, ioeventfds", "vfio-user-doorbells"),
    ("nvme", "nvme"),
)
GOALS = {"vfio-user": 1.2, "vfio-user-doorbells": 1.2, "nvme": 1.3}
"""CPU time per request to that of ``blk`` over vhost-user, at most, at depth 32."""


@contextlib.contextmanager
def serving(kind: str, socket: Path, image: Path) -> Iterator[int]:
    """Run a server on its CPU; its process id."""
    if kind == "vhost-user":
        command = ["-m", "guestio", "blk", str(image), "--socket", str(socket)]
    else:
        command = ["-c", _SERVE, kind, str(socket), str(image)]
    process = subprocess.Popen(
        ["taskset", "-c", str(BACKEND_CPU), sys.executable, *command], stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + START_LIMIT
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server of {kind} did not start")
            time.sleep(0.02)
        yield process.pid
    finally:
        process.terminate()
        process.wait(10)
        socket.unlink(missing_ok=True)


def measure(case: Case, directory: Path, seconds: float, depth: int) -> None:
    """One way, with a fresh server."""
    socket, image = directory / "bench.sock", directory / "disk.img"
    kind = "blk" if case.transport.startswith("vfio-user") else case.transport
    with serving(kind, socket, image) as pid:
        drive = [
            *("-m", "guestio", "bench", str(socket)),
            *("--transport", case.transport, "--json", "--pid", str(pid)),
            *("--workload", "randread", "--block-size", "4k", "--depth", str(depth)),
            *("--time", str(seconds), "--warm-up", str(seconds / 5)),
        ]
        if kind == "nvme":
            drive = ["-c", _DRIVE_NVME, str(socket), str(pid), str(seconds), str(depth)]
        done = subprocess.run(
            ["taskset", "-c", str(LOAD_CPU), sys.executable, *drive],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{case.name}: {done.stderr.strip()}")
    case.measured.append(json.loads(done.stdout))


@dataclass(frozen=True)
class Stage:
    """What one message costs.

    Attributes:
        name: What it is.
        count: How many were measured.
        waited_us: Microseconds that the driver waited for each.
        cpu_us: CPU time of the server for each.
    """

    name: str
    count: int
    waited_us: float
    cpu_us: float


def stages(directory: Path, count: int) -> list[Stage]:
    """Messages of each kind to a device that does nothing."""
    found = []
    socket = directory / "bench.sock"
    memory = Backing.memfd(PAGE)
    request = DmaMapRequest(0, PAGE, memory.host_address, memory.fd)
    with serving("nothing", socket, directory) as pid, Client(socket) as client:
        bar, target = client.bar(0), VfioUserTarget(client)
        # One mapping stays, as in a guest, so that the file does.
        target.map_dma(DmaMapRequest(1 << 20, PAGE, memory.host_address, memory.fd))

        def map_and_unmap() -> None:
            target.map_dma(request)
            target.unmap_dma(0, PAGE)

        kinds: list[tuple[str, Callable[[], object]]] = [
            ("posted write", lambda: bar.post(0, b"1234")),
            ("register read", lambda: bar.read(0, 4)),
            ("map and unmap", map_and_unmap),
        ]
        for name, call in kinds:
            call()
            bar.read(0, 4)
            before, started = cpu_seconds(pid), time.monotonic()
            for _ in range(count):
                call()
            bar.read(0, 4)
            waited, used = time.monotonic() - started, cpu_seconds(pid) - before
            found.append(Stage(name, count, waited * 1e6 / count, used * 1e6 / count))
    return found


def show(cases: Sequence[Case], found: Sequence[Stage], depth: int, console: Console) -> None:
    """Print medians, ratios and whether the goal is reached."""
    table = Table(
        "4K randread, depth " + str(depth), "IOPS", "mean us", "CPU us/req", "x", "kicks/req"
    )
    base = cases[0]
    for case in cases:
        ratio = case.ratio(base, "cpu_us")
        table.add_row(
            case.name,
            f"{statistics.median(case.figures('iops')):,.0f}",
            f"{statistics.median(case.figures('mean')):,.0f}",
            f"{statistics.median(case.figures('cpu_us')):.2f}",
            f"{ratio:.2f}",
            f"{statistics.median(one['kicks'] / one['requests'] for one in case.measured):.3f}",
        )
    console.print(table)
    for case in cases if depth == 32 else ():
        goal = GOALS.get(case.transport)
        if goal is not None:
            ratio = case.ratio(base, "cpu_us")
            verdict = "[green]reached[/]" if ratio <= goal else "[bold red]not reached[/]"
            console.print(f"{case.name}: <= {goal:.2f} wanted, {ratio:.2f} measured: {verdict}")
    table = Table("message", "times", "driver waits us", "server CPU us")
    for stage in found:
        table.add_row(
            stage.name, f"{stage.count:,}", f"{stage.waited_us:.1f}", f"{stage.cpu_us:.1f}"
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench/vfio_user.py", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds (5)")
    parser.add_argument("--time", type=float, default=5.0, help="seconds per measurement (5)")
    parser.add_argument("--depth", type=int, default=32, help="requests in the queue (32)")
    parser.add_argument("--quick", action="store_true", help="one round of one second each")
    parser.add_argument("--json", action="store_true", help="print every measurement as JSON")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("/dev/shm"),
        help="where to put the image, 256 MiB (/dev/shm)",
    )
    given = parser.parse_args(arguments)
    rounds, seconds = (1, 1.0) if given.quick else (given.rounds, given.time)
    if rounds < 1 or seconds <= 0 or given.depth < 1:
        parser.error("nothing to measure")
    if not {LOAD_CPU, BACKEND_CPU} <= os.sched_getaffinity(0):
        parser.error(f"CPUs {LOAD_CPU} and {BACKEND_CPU} are needed")
    console = Console(stderr=given.json)
    warn_if_busy(console)
    cases = [Case(*names) for names in CASES]
    with tempfile.TemporaryDirectory(prefix="guestio-bench-", dir=given.directory) as name:
        directory = Path(name)
        with (directory / "disk.img").open("wb") as file:
            for _ in range(IMAGE_BYTES >> 20):
                file.write(os.urandom(1 << 20))
        for number in range(rounds):
            for case in cases:
                with console.status(f"round {number + 1}: {case.name}"):
                    measure(case, directory, seconds, given.depth)
        os.sched_setaffinity(0, {LOAD_CPU})
        found = stages(directory, 500 if given.quick else 5000)
    if given.json:
        print(json.dumps({case.name: case.measured for case in cases}, indent=1))
    show(cases, found, given.depth, console)


if __name__ == "__main__":
    main()
