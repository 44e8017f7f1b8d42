"""``guestio demo``: a disk behind an IOMMU, loaded, checked and attacked, without a VM.

The back-end runs in a process of its own, as ``guestio blk`` does. This process is the guest: it
has memory, an IOMMU whose tables it controls, and a compiled driver. In turn: how many requests
there are in a second; every block compared with what was written, while each request maps what it
needs and unmaps it; four accesses that an IOMMU must refuse; a recording; a device that corrupts
reads, which the comparison must notice.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import multiprocessing
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console
from rich.table import Table

from guestio.addr import Permissions
from guestio.cli.bench import LoadProgress
from guestio.errors import GuestioError
from guestio.faults import Misbehaving
from guestio.guest import GuestBuffer, Request, ScriptedGuest
from guestio.guest.load import CorruptionError, Load, LoadResult
from guestio.guest.plan import LoadPlan
from guestio.vhost_user import Backend, Statistics
from guestio.virtio.blk import S_IOERR, T_IN, T_OUT, BlockDevice

IMAGE_BYTES = 64 << 20
SPAN = 16 << 20
BLOCK = 4096
DEPTH = 32
START_LIMIT = 60.0
MISBEHAVIOR = "corrupt op=read every=100"
RECORDED_SECONDS = 1.0


@dataclass
class Outcome:
    """What the guest saw.

    Attributes:
        fast: The load without comparison.
        verified: The load whose contents were compared; None if the disk failed before its end.
        wrong: What the disk did wrong.
        refused: Attack by its name: whether it was refused and memory was left alone.
        caught: What the comparison said of the device that misbehaves; None if it did not notice.
        recorded: The recording's summary; empty without the extra ``record``.
    """

    fast: LoadResult | None = None
    verified: LoadResult | None = None
    wrong: list[str] = field(default_factory=list)
    refused: dict[str, bool] = field(default_factory=dict)
    caught: str | None = None
    recorded: str = ""

    @property
    def good(self) -> bool:
        """Whether every check held."""
        return (
            self.fast is not None
            and self.verified is not None
            and not self.wrong
            and bool(self.refused)
            and all(self.refused.values())
            and self.caught is not None
        )


def _has(*modules: str) -> bool:
    return all(importlib.util.find_spec(name) for name in modules)


def _run(seconds: float, console: Console, *, open_: bool, faults: Sequence[str]) -> bool:
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="guestio-demo-") as name:
        directory = Path(name)
        control = directory / "blk.control" if _has("uvicorn", "starlette", "h11") else None
        with (
            _served(directory, "blk", faults, control) as (socket, statistics),
            _inspector(control, console, open_=open_),
        ):
            _load(socket, seconds, outcome, console)
            with ScriptedGuest(
                socket, iommu="strict", memory_size=32 << 20, queue_size=256
            ) as guest:
                outcome.refused = _attack(guest, console)
            _record(socket, control, directory, outcome, console)
            _misbehave(directory, outcome, console)
            served = statistics() if not open_ else None
            _show(outcome, served, console)
            if open_:
                _wait(console)
    return outcome.good


def _wait(console: Console) -> None:
    console.print("the disk and its page stay until Ctrl-C")
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


@contextlib.contextmanager
def _served(
    directory: Path, name: str, faults: Sequence[str] = (), control: Path | None = None
) -> Iterator[tuple[Path, Callable[[], Statistics]]]:
    """A back-end in its own process: its socket, and what asks it to end and tell its counters."""
    image = directory / f"{name}.img"
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    socket = directory / f"{name}.sock"
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_serve, args=(image, socket, tuple(faults), control, theirs), daemon=True
    )
    process.start()
    theirs.close()
    try:
        if not ours.poll(START_LIMIT) or ours.recv() != "ready":
            raise GuestioError("the back-end did not start")

        def statistics() -> Statistics:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGTERM)
            told = ours.recv() if ours.poll(START_LIMIT) else None
            if not isinstance(told, Statistics):
                raise GuestioError("the back-end did not end as it should")
            return told

        yield socket, statistics
    finally:
        process.terminate()
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
        ours.close()


def _serve(
    image: Path, socket: Path, faults: Sequence[str], control: Path | None, tell: Connection
) -> None:
    """The back-end's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("guestio").setLevel(logging.CRITICAL)
    disk = BlockDevice(image, serial="guestio-demo")
    device = Misbehaving(disk, faults) if faults else disk
    with (
        contextlib.closing(disk),
        Backend(device, socket, track_dirty=True, control=control) as backend,
    ):
        signal.signal(signal.SIGTERM, lambda *_: backend.stop())
        threading.Thread(target=_end_with, args=(tell, backend), daemon=True).start()
        tell.send("ready")
        backend.serve()
        tell.send(backend.statistics)


def _end_with(parent: Connection, backend: Backend) -> None:
    """Stop once the other end of the pipe has gone: a demo that is killed leaves no server."""
    with contextlib.suppress(EOFError, OSError):
        parent.recv()
    backend.stop()


@contextlib.contextmanager
def _inspector(control: Path | None, console: Console, *, open_: bool) -> Iterator[None]:
    """The page that shows the disk, for as long as the demo runs."""
    if control is None:
        console.print("no inspector: pip install 'guestio[control]'")
        yield
        return
    command = [sys.executable, "-m", "guestio", "inspect", str(control)]
    if shutil.which("setpriv"):  # it ends with this process, even if that is killed
        command = ["setpriv", "--pdeathsig", "TERM", *command]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], START_LIMIT)
            address = process.stdout.readline().strip() if ready else ""
            if not address:
                raise GuestioError("the inspector did not start")
            stays = "" if open_ else " (while this runs; --open stays)"
            console.print(f"the disk, live{stays}: {address}", soft_wrap=True, highlight=False)
            if open_:
                webbrowser.open(address)
            yield
        finally:
            process.terminate()


def _load(socket: Path, seconds: float, outcome: Outcome, console: Console) -> None:
    """First as fast as it goes, then with every block compared."""
    plans = (
        ("behind an IOMMU, mappings kept", LoadPlan(depth=DEPTH, iommu="static"), 0.3),
        (
            "each request mapped and unmapped, each block compared",
            LoadPlan(workload="randrw", depth=DEPTH, iommu="strict", verify=True, span=SPAN),
            0.4,
        ),
    )
    for what, plan, share in plans:
        try:
            with Load(socket, plan) as load, LoadProgress() as progress:
                if plan.verify:
                    load.fill(progress.part("writing known contents"))
                result = load.run(seconds * share, progress.part(what))
                if plan.verify:
                    load.read_back(progress.part("reading everything back"))
        except GuestioError as error:
            outcome.wrong.append(str(error))
            console.print(f"  {what}: [bold red]{error}[/]", soft_wrap=True)
            continue
        console.print(f"  {what}: [green]{result.iops:,.0f} requests a second[/]")
        if plan.verify:
            outcome.verified = result
        else:
            outcome.fast = result


def _record(
    socket: Path, control: Path | None, directory: Path, outcome: Outcome, console: Console
) -> None:
    """Record a second of load, and say what the recording has."""
    if control is None or not _has("pyarrow", "duckdb"):
        console.print("no recording: pip install 'guestio[control,record]'")
        return
    from guestio.observe import Recorder, open_recording

    file = directory / "disk.parquet"
    # Few requests at a time, as what counts here are rows that are whole and not how many.
    with (
        Recorder(str(control), file),
        Load(socket, LoadPlan(depth=1, iommu="static")) as load,
        LoadProgress() as progress,
    ):
        try:
            load.run(RECORDED_SECONDS, progress.part("recording"))
        except GuestioError as error:
            outcome.wrong.append(str(error))
    with open_recording(file) as recording:
        rows = recording.requests()
    taken, completed = rows["taken"].to_pylist(), rows["completed"].to_pylist()
    spans = sorted(
        after - before
        for before, after in zip(taken, completed, strict=True)
        if before is not None and after is not None
    )
    if not spans:
        outcome.wrong.append("the recording has no request")
        return
    outcome.recorded = (
        f"{rows.num_rows:,} requests, half of them served within {spans[len(spans) // 2] / 1e3:.0f}"
        f" us, {file.stat().st_size:,} bytes"
    )
    console.print(f"  recording of {RECORDED_SECONDS:.0f} s: {outcome.recorded}", soft_wrap=True)


def _misbehave(directory: Path, outcome: Outcome, console: Console) -> None:
    """Serve a disk that corrupts some reads; the comparison must notice."""
    plan = LoadPlan(workload="randrw", depth=8, iommu="strict", verify=True, span=1 << 20)
    with _served(directory, "bad", [MISBEHAVIOR]) as (socket, _):
        try:
            with Load(socket, plan) as load:
                load.fill()
                load.run(5.0)
                load.read_back()
        except CorruptionError as error:
            outcome.caught = str(error)
    verdict = (
        f"[green]caught[/]: {outcome.caught}"
        if outcome.caught is not None
        else "[bold red]NOT NOTICED[/]"
    )
    console.print(f"  disk with --fault '{MISBEHAVIOR}': {verdict}", soft_wrap=True)


def _attack(guest: ScriptedGuest, console: Console) -> dict[str, bool]:
    """Do what a vIOMMU is there to stop; whether each was refused."""
    attacks = {
        "access to a page that is not mapped": _unmapped,
        "write through a read-only mapping": _read_only,
        "read through a write-only mapping": _write_only,
        "use after unmap": _after_unmap,
    }
    refused = {}
    for name, attack in attacks.items():
        refused[name] = attack(guest)
        mark = "[green]refused[/]" if refused[name] else "[bold red]NOT REFUSED[/]"
        console.print(f"  {name}: {mark}")
    guest.write(0, bytes(BLOCK))
    return refused


def _refused(guest: ScriptedGuest, request: Request, victim: GuestBuffer, before: bytes) -> bool:
    guest.wait(request)
    return request.status == S_IOERR and victim.memory.read() == before


def _victim(guest: ScriptedGuest) -> tuple[GuestBuffer, bytes]:
    victim = guest.dma.buffer(BLOCK)
    before = os.urandom(BLOCK)
    victim.memory.write(before)
    return victim, before


def _unmapped(guest: ScriptedGuest) -> bool:
    victim, before = _victim(guest)
    # Its physical address, which means nothing behind an IOMMU.
    request = guest.submit_at(T_IN, writable=[(victim.pages[0], BLOCK)])
    return _refused(guest, request, victim, before)


def _read_only(guest: ScriptedGuest) -> bool:
    victim, before = _victim(guest)
    address = guest.dma.map(victim, 0, BLOCK, Permissions.READ, [])
    return _refused(guest, guest.submit_at(T_IN, writable=address), victim, before)


def _write_only(guest: ScriptedGuest) -> bool:
    victim, before = _victim(guest)
    address = guest.dma.map(victim, 0, BLOCK, Permissions.WRITE, [])
    return _refused(guest, guest.submit_at(T_OUT, readable=address), victim, before)


def _after_unmap(guest: ScriptedGuest) -> bool:
    victim, before = _victim(guest)
    mapped: list[tuple[int, int]] = []
    address = guest.dma.map(victim, 0, BLOCK, Permissions.WRITE, mapped)
    used = guest.submit_at(T_IN, writable=address)
    guest.wait(used)
    if used.status != 0:
        return False
    victim.memory.write(before)
    guest.dma.unmap(mapped)
    return _refused(guest, guest.submit_at(T_IN, writable=address), victim, before)


def _show(outcome: Outcome, served: Statistics | None, console: Console) -> None:
    table = Table(title="guestio demo", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    fast, verified = outcome.fast, outcome.verified
    rows = {
        "requests": f"{sum(result.requests for result in (fast, verified) if result):,}",
        "mappings kept": f"{fast.iops:,.0f} requests/s" if fast else "failed",
        "mapped each time": f"{verified.iops:,.0f} requests/s" if verified else "failed",
        "compared": "all as written" if verified else "[bold red]failed[/]",
    }
    if served is not None:
        rows |= {
            "IOTLB hits": f"{served.iotlb_hits:,}",
            "IOTLB misses": f"{served.iotlb_misses:,}",
            "IOTLB invalidations": f"{served.iotlb_invalidations:,}",
            "dirty pages": f"{served.dirty_pages:,}",
        }
    rows |= {
        "refused accesses": f"{sum(outcome.refused.values())} of {len(outcome.refused)}",
        "misbehaving disk": "caught" if outcome.caught is not None else "[bold red]missed[/]",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    verdict = "[green]every check held[/]" if outcome.good else "[bold red]a check failed[/]"
    console.print(verdict)


def run(
    seconds: float,
    *,
    open_: bool = False,
    faults: Sequence[str] = (),
    console: Console | None = None,
) -> int:
    """Run the demonstration.

    Args:
        seconds: About how long.
        open_: Open the inspector in the browser, and stay until Ctrl-C.
        faults: Rules by which the disk misbehaves, so that a check fails.
        console: Where to show it; standard output by default.

    Returns:
        The command's exit status: 0 only if every check held.
    """
    console = console or Console()
    try:
        return 0 if _run(seconds, console, open_=open_, faults=faults) else 1
    except (GuestioError, OSError) as error:
        print(f"guestio: {error}", file=sys.stderr)
        return 1
