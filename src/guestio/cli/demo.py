"""``guestio demo``: a disk behind an IOMMU, used, checked and attacked, without a VM.

The back-end runs in a process of its own, exactly as ``guestio blk`` runs it. This process is the
guest: it has memory, an IOMMU whose tables it controls, and a driver that maps what each request
needs and unmaps it afterwards. Every block that is read is compared with what was written.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from guestio.addr import Permissions
from guestio.errors import GuestioError
from guestio.guest import BlkError, GuestBuffer, Request, ScriptedGuest
from guestio.vhost_user import Backend, Statistics
from guestio.virtio.blk import S_IOERR, T_IN, T_OUT, BlockDevice
from guestio.virtio.image import SECTOR

IMAGE_BYTES = 64 << 20
BLOCK = 4096
DEPTH = 16
START_LIMIT = 20.0


@dataclass
class Outcome:
    """What the guest saw.

    Attributes:
        requests: Requests that the device answered.
        moved: Bytes moved in either direction.
        seconds: How long that took.
        mismatches: Blocks that were not what had been written.
        refused: Attack by its name: whether it was refused and memory was left alone.
    """

    requests: int = 0
    moved: int = 0
    seconds: float = 0.0
    mismatches: int = 0
    refused: dict[str, bool] | None = None

    @property
    def good(self) -> bool:
        """Whether every check held."""
        return not self.mismatches and bool(self.refused) and all((self.refused or {}).values())


def _run(seconds: float, console: Console) -> bool:
    with (
        tempfile.TemporaryDirectory(prefix="guestio-demo-") as directory,
        _served(Path(directory)) as (socket, statistics),
    ):
        with ScriptedGuest(socket, iommu="strict", memory_size=32 << 20, queue_size=256) as guest:
            outcome = _write_and_verify(guest, seconds, console)
            outcome.refused = _attack(guest, console)
        served = statistics()
    _show(outcome, served, console)
    return outcome.good


@contextlib.contextmanager
def _served(directory: Path) -> Iterator[tuple[Path, Callable[[], Statistics]]]:
    """A back-end in its own process: its socket, and what asks it to end and tell its counters."""
    image = directory / "disk.img"
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    socket = directory / "blk.sock"
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(image, socket, theirs), daemon=True)
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
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
        ours.close()


def _serve(image: Path, socket: Path, tell: Connection) -> None:
    """The back-end's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("guestio").setLevel(logging.ERROR)
    device = BlockDevice(image, serial="guestio-demo")
    with contextlib.closing(device), Backend(device, socket, track_dirty=True) as backend:
        signal.signal(signal.SIGTERM, lambda *_: backend.stop())
        tell.send("ready")
        backend.serve()
        tell.send(backend.statistics)


def _write_and_verify(guest: ScriptedGuest, seconds: float, console: Console) -> Outcome:
    """Keep the queue full of random writes and reads that are compared."""
    outcome = Outcome()
    rng = random.Random(1)  # noqa: S311 - repeatable, not secret
    contents: dict[int, bytes] = {}
    expected: dict[int, bytes] = {}
    started = time.monotonic()
    columns = (TextColumn("write, read, compare"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=seconds)
        while (elapsed := time.monotonic() - started) < seconds:
            progress.update(task, completed=elapsed)
            requests = _submit_batch(guest, rng, contents, expected)
            guest.wait(*requests)
            for request in requests:
                _check(request, expected, outcome)
        progress.update(task, completed=seconds)
    outcome.seconds = time.monotonic() - started
    return outcome


def _submit_batch(
    guest: ScriptedGuest,
    rng: random.Random,
    contents: dict[int, bytes],
    expected: dict[int, bytes],
) -> list[Request]:
    """Begin a batch of requests for different blocks, half of them reads of known ones."""
    requests = []
    blocks = rng.sample(range(IMAGE_BYTES // BLOCK), DEPTH // 2)
    known = rng.sample(list(contents), min(len(contents), DEPTH // 2)) if contents else []
    for block in known:
        request = guest.submit_read(block * BLOCK // SECTOR, BLOCK, publish=False)
        expected[id(request)] = contents[block]
        requests.append(request)
    for block in blocks:
        if block in known:
            continue
        contents[block] = rng.randbytes(BLOCK)
        requests.append(guest.submit_write(block * BLOCK // SECTOR, contents[block], publish=False))
    guest.publish()
    return requests


def _check(request: Request, expected: dict[int, bytes], outcome: Outcome) -> None:
    outcome.requests += 1
    outcome.moved += BLOCK
    wanted = expected.pop(id(request), None)
    try:
        request.check()
    except BlkError:
        outcome.mismatches += 1
        return
    if wanted is not None and request.data != wanted:
        outcome.mismatches += 1


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


def _show(outcome: Outcome, served: Statistics, console: Console) -> None:
    table = Table(title="guestio demo", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    refused = outcome.refused or {}
    rows = {
        "requests": f"{outcome.requests:,}",
        "bytes": f"{outcome.moved:,}",
        "throughput": f"{outcome.moved / outcome.seconds / 1e6:.1f} MB/s",
        "mismatches": f"{outcome.mismatches}",
        "IOTLB hits": f"{served.iotlb_hits:,}",
        "IOTLB misses": f"{served.iotlb_misses:,}",
        "IOTLB invalidations": f"{served.iotlb_invalidations:,}",
        "refused accesses": f"{sum(refused.values())} of {len(refused)}",
        "dirty pages": f"{served.dirty_pages:,}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    verdict = "[green]every check held[/]" if outcome.good else "[bold red]a check failed[/]"
    console.print(verdict)


def run(seconds: float) -> int:
    """Run the demonstration.

    Args:
        seconds: How long to write and verify.

    Returns:
        The command's exit status: 0 only if every check held.
    """
    console = Console()
    try:
        return 0 if _run(seconds, console) else 1
    except (GuestioError, OSError) as error:
        print(f"guestio: {error}", file=sys.stderr)
        return 1
