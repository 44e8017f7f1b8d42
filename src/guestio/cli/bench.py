"""``guestio bench``: how many requests a virtio disk serves, how fast, and whether rightly.

The load comes from :class:`~guestio.guest.load.Load`; this is its face on the command line.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import click

from guestio.cli.seconds import Seconds
from guestio.errors import DeviceError, GuestioError

# What only this command needs is imported when it runs: the other commands start without it.
if TYPE_CHECKING:
    from guestio.guest.load import Load, LoadResult, Tick, Transport
    from guestio.guest.plan import LoadPlan

HELP = """Drive the virtio disk behind SOCKET, and measure it.

No virtual machine is needed: this process is the guest. It shares memory with the back-end, sets
queues up, keeps each of them filled with requests, and tells how many were served and how long
they took. Any vhost-user-blk back-end will do:

\b
  guestio blk disk.img --socket /tmp/blk.sock &
  guestio bench /tmp/blk.sock --pid $!

\b
  qemu-storage-daemon --blockdev driver=file,node-name=disk,filename=disk.img \\
    --export type=vhost-user-blk,id=e,node-name=disk,writable=on,\\
addr.type=unix,addr.path=/tmp/qsd.sock &
  guestio bench /tmp/qsd.sock --pid $!

With --transport vfio-user the disk is a virtio PCI function of a vfio-user server, which is
notified by posted writes, as a guest's driver does without KVM; with vfio-user-doorbells by the
eventfds that the server offers instead. There is no --iommu then.

THE DISK IS OVERWRITTEN by randwrite, write and randrw, and by --verify.

\b
With --iommu the device sees I/O virtual addresses, which this process
translates when the back-end asks (IOTLB misses):
  off     physical addresses
  static  everything is mapped once, page by page, physically scattered
  strict  each request maps what it uses and unmaps it when it is finished,
          as Linux does by default; it is over when the back-end has
          acknowledged that it forgot the mappings

Latency is what the driver sees: from putting a request into the queue to having it back. Put load
and back-end on CPUs of their own to compare back-ends (taskset -c 0 guestio bench ...). --pid tells
what the back-end's CPU time per request is; that is the steadier figure on a busy machine.

--verify writes known contents first (the first 64 MiB unless --span says otherwise), lays requests
out in memory at random (buffers cut anywhere, across pages, header and status split or shared),
checks every block that is read, and reads everything back at the end.

SIGINT ends early with what was measured so far. Exit status: 0, 1 if the device failed or returned
wrong data, 2 for bad arguments or a device that cannot do what is asked, 130 after SIGINT.
"""

_SIZE = re.compile(r"(\d+)([kmg]?)(?:i?b)?", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_TOLD_EVERY = 1.0
_CONNECT_WAIT = 2.0


class Size(click.ParamType[int]):
    """Bytes, with k, m or g for their multiples of 1024."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read a size; anything else is a usage error."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            self.fail(f"{value!r} is no size; say 4096, 4k or 1m", param, ctx)
        return int(match[1]) * _UNITS[match[2].lower()]


@dataclass(frozen=True, slots=True)
class Job:
    """What the command was asked to do.

    Attributes:
        socket: The back-end's socket.
        plan: What load to make.
        seconds: How long to measure.
        warm_up: How long to run before that.
        pid: The back-end's process, to tell its CPU time.
        as_json: Whether to print JSON rather than a table.
        transport: What leads to the device.
    """

    socket: str
    plan: LoadPlan
    seconds: float
    warm_up: float
    pid: int | None
    as_json: bool
    transport: Transport = "vhost-user"


def run(job: Job) -> int:
    """Do it, and print what came out.

    Returns:
        The command's exit status.

    Raises:
        GuestioError: The back-end cannot be reached, or cannot do what is asked.
    """
    from guestio.guest.load import Load

    if job.pid is not None:
        _cpu_seconds(job.pid)
    try:
        load = Load(job.socket, job.plan, connect_wait=_CONNECT_WAIT, transport=job.transport)
    except OSError as error:
        raise DeviceError(f"cannot connect to {job.socket}: {error.strerror or error}") from error
    signals: list[int] = []
    with load, _stopped_by_signals(load, signals):
        try:
            result, cpu = _measure(load, job)
        except GuestioError as error:
            click.echo(f"guestio: {error}", err=True)
            return 1
    if job.as_json:
        print(json.dumps(describe(job, result, cpu, interrupted=bool(signals)), indent=1))
    else:
        _show(job, result, cpu)
    return 128 + signals[0] if signals else 0


@contextlib.contextmanager
def _stopped_by_signals(load: Load, signals: list[int]) -> Iterator[None]:
    """Have SIGINT and SIGTERM end the load early; a second one ends the process."""

    def stop(number: int, _: object) -> None:
        signals.append(number)
        load.stop()
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _measure(load: Load, job: Job) -> tuple[LoadResult, float | None]:
    """The result, and the CPU seconds that the back-end used for it."""
    with LoadProgress() as progress:
        if job.plan.verify:
            load.fill(progress.part("writing known contents"))
        if job.warm_up:
            load.run(job.warm_up, progress.part("warming up"))
        before = None if job.pid is None else _cpu_seconds(job.pid)
        result = load.run(job.seconds, progress.part(job.plan.workload))
        cpu = None if before is None or job.pid is None else _cpu_seconds(job.pid) - before
        if job.plan.verify:
            load.read_back(progress.part("reading everything back"))
    return result, cpu


def _cpu_seconds(pid: int) -> float:
    from guestio.guest.load import cpu_seconds

    try:
        return cpu_seconds(pid)
    except OSError as error:
        raise DeviceError(f"there is no process {pid} to tell the CPU time of") from error


class LoadProgress:
    """How it goes, on standard error: a bar on a terminal, else a line a second."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        self._bar = (
            Progress(*columns, console=console, transient=True) if console.is_terminal else None
        )
        self._told = time.monotonic()

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def part(self, what: str) -> Tick:
        """What to call during one part of the work."""
        bar = self._bar
        if bar is None:
            return lambda share, result: self._tell(what, share, result)
        task = bar.add_task(what, total=1.0, figures="")
        return lambda share, result: bar.update(task, completed=share, figures=figures_of(result))

    def _tell(self, what: str, share: float, result: LoadResult) -> None:
        now = time.monotonic()
        if now - self._told >= _TOLD_EVERY:
            self._told = now
            print(f"{what}: {share:.0%}, {figures_of(result)}", file=sys.stderr, flush=True)


def figures_of(result: LoadResult) -> str:
    """A result in a line."""
    return f"{result.iops:,.0f} IOPS, {result.bytes_per_second / 1e6:,.1f} MB/s"


def describe(
    job: Job, result: LoadResult, cpu: float | None, *, interrupted: bool
) -> dict[str, Any]:
    """The result as plain data, which ``--json`` prints.

    Args:
        job: What was asked for.
        result: What was measured.
        cpu: CPU seconds the back-end used meanwhile, if known.
        interrupted: Whether a signal ended it early.
    """
    plan = job.plan
    return {
        "transport": job.transport,
        "workload": plan.workload,
        "block_size": plan.block_size,
        "depth": plan.depth,
        "queues": plan.queues,
        "queue_size": plan.entries,
        "iommu": plan.iommu,
        "granularity": plan.granularity,
        "acknowledge": plan.acknowledge,
        "verify": plan.verify,
        "polling": plan.polling,
        "indirect": plan.indirect,
        "contiguous": plan.contiguous,
        "seconds": result.seconds,
        "interrupted": interrupted,
        "requests": result.requests,
        "reads": result.reads,
        "writes": result.writes,
        "bytes": result.moved,
        "iops": result.iops,
        "mb_per_s": result.bytes_per_second / 1e6,
        "latency_us": {
            "mean": result.mean_us,
            "p50": result.p50_us,
            "p99": result.p99_us,
            "max": result.max_us,
        },
        "kicks": result.kicks,
        "interrupts": result.interrupts,
        "iotlb": {
            "misses": result.misses,
            "updates": result.updates,
            "invalidations": result.invalidations,
            "refused": result.refused,
            "access_fails": result.access_fails,
        },
        "cpu": None
        if cpu is None
        else {
            "pid": job.pid,
            "seconds": cpu,
            "us_per_request": _per_request(cpu * 1e6, result),
        },
    }


def _per_request(amount: float, result: LoadResult) -> float:
    return amount / result.requests if result.requests else 0.0


def _show(job: Job, result: LoadResult, cpu: float | None) -> None:
    from rich.console import Console
    from rich.table import Table

    plan = job.plan
    title = (
        f"{plan.workload} {plan.block_size} bytes, depth {plan.depth}, "
        f"{plan.queues} queue{'s' if plan.queues > 1 else ''}, IOMMU {plan.iommu}"
    )
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = {
        "requests": f"{result.requests:,} in {result.seconds:.2f} s",
        "IOPS": f"{result.iops:,.0f}",
        "throughput": f"{result.bytes_per_second / 1e6:,.1f} MB/s",
        "latency mean": f"{result.mean_us:,.1f} us",
        "latency p50": f"{result.p50_us:,.1f} us",
        "latency p99": f"{result.p99_us:,.1f} us",
        "latency max": f"{result.max_us:,.1f} us",
        "notifications to the device": f"{result.kicks:,}",
        "notifications from it": f"{result.interrupts:,}",
    }
    if plan.iommu != "off":
        for name, count in (
            ("IOTLB misses", result.misses),
            ("IOTLB updates", result.updates),
            ("IOTLB invalidations", result.invalidations),
            ("IOTLB misses refused", result.refused),
        ):
            rows[name] = f"{count:,} ({_per_request(count, result):.2f} a request)"
    if cpu is not None:
        busy = cpu / result.seconds if result.seconds else 0.0
        rows["back-end's CPU"] = f"{_per_request(cpu * 1e6, result):.2f} us a request, {busy:.0%}"
    if plan.verify:
        rows["verified"] = "everything read was what had been written"
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


@click.command(help=HELP)
@click.argument("socket", type=click.Path())
@click.option(
    "--workload",
    type=click.Choice(["randread", "randwrite", "read", "write", "randrw"]),
    default="randread",
    show_default=True,
    help="What to do; randrw is half reads, half writes.",
)
@click.option(
    "--transport",
    type=click.Choice(["vhost-user", "vfio-user", "vfio-user-doorbells"]),
    default="vhost-user",
    show_default=True,
    help="What leads to the disk.",
)
@click.option(
    "--block-size", type=Size(), default="4k", show_default=True, help="Bytes per request."
)
@click.option("--depth", type=int, default=32, show_default=True, help="Requests in each queue.")
@click.option("--queues", type=int, default=1, show_default=True, help="Queues to use.")
@click.option(
    "--time",
    "seconds",
    type=Seconds(0.01, 86400),
    default=5.0,
    show_default=True,
    help="Seconds to measure.",
)
@click.option(
    "--warm-up",
    type=Seconds(0, 3600),
    default=0.5,
    show_default=True,
    help="Seconds to run before that.",
)
@click.option(
    "--iommu",
    type=click.Choice(["off", "static", "strict"]),
    default="off",
    show_default=True,
    help="What is between the device and memory.",
)
@click.option(
    "--granularity",
    type=click.Choice(["page", "whole"]),
    default="page",
    show_default=True,
    help="What an answer to a miss covers: a page, or all that is contiguous.",
)
@click.option(
    "--acknowledge",
    type=click.Choice(["bulk", "each"]),
    default="bulk",
    show_default=True,
    help="Behind an IOMMU: send translations and revocations in bulk, or each once the one before "
    "it was acknowledged, as QEMU does.",
)
@click.option("--verify", is_flag=True, help="Check contents. OVERWRITES the disk.")
@click.option(
    "--polling/--no-polling",
    default=False,
    show_default=True,
    help="Look for completions without pause, or sleep until notified.",
)
@click.option(
    "--indirect/--no-indirect",
    default=True,
    show_default=True,
    help="Use indirect descriptor tables if the device offers them.",
)
@click.option("--contiguous", is_flag=True, help="Have each buffer in one piece of memory.")
@click.option(
    "--separate-status",
    is_flag=True,
    help="With strict, map header and status apart, as Linux does.",
)
@click.option("--queue-size", type=int, help="Entries of each queue.  [default: 256 or as needed]")
@click.option("--span", type=Size(), help="How much of the disk to use.  [default: all of it]")
@click.option("--seed", type=click.IntRange(0, 1 << 32), default=0, help="Of all random choices.")
@click.option("--pid", type=int, help="The back-end's process, to tell its CPU time.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON rather than a table.")
def bench(
    socket: str,
    seconds: float,
    warm_up: float,
    pid: int | None,
    as_json: bool,
    transport: Transport,
    **plan: Any,
) -> None:
    """Measure a disk; the help text is ``HELP``."""
    from guestio.guest.plan import LoadPlan

    try:
        status = run(Job(socket, LoadPlan(**plan), seconds, warm_up, pid, as_json, transport))
    except (GuestioError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    sys.exit(status)
