"""A guest under load hops from one QEMU to the next, with a `guestio blk` of its own each time.

    ./run lab-migrate                          without an IOMMU, behind virtio-iommu and intel-iommu
    ./run lab-migrate --guest virtio --hops 20 --queue-threads
    ./run lab-migrate --qemu /usr/bin/qemu-system-x86_64
    ./run lab-migrate --qemu trixie            a QEMU of that suite; see lab/qemu.py
    ./run lab-migrate --qemu /usr/bin/qemu-system-x86_64 --onto trixie-backports
    ./run lab-migrate --device net             a network card instead of the disk
    ./run lab-migrate --inflight-migration     notes of requests in flight go along (QEMU 11.1)
    ./run lab-migrate --against qemu-storage-daemon --rounds 5

The load is `lab/migration.c`: it checks memory that only the disk writes long after it was written.
After each hop, while neither QEMU lets the guest run, all of its memory is compared page by page.
The table has a line for each hop: for how long the guest stood still, as QEMU tells it, how long
the migration took, and what the load did afterwards.

With `--onto` the guest hops to that QEMU and back again. Both have the older one's machine type.

QEMU before 9.0 without KVM forgets pages that the guest's processors write while it migrates,
whatever its devices are: it counts pages as clean, and processors that have written to them before
go on without telling. It does not if memory is no multiple of 256 KiB, so guests have 8 KiB more
there. The control shows both, without any device of guestio's:

    ./run lab-migrate --qemu /usr/bin/qemu-system-x86_64 --guest none --device memory \
        --boots 16 --hops 1 [--memory 262144]

With `--against` the same guest hops in turn between two of `guestio blk` and two of
`qemu-storage-daemon`, a boot each in every round, and the medians of their downtimes are compared.
That daemon serves no guest behind an IOMMU.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

from lab.guest import (
    MIB,
    Disk,
    Guest,
    GuestError,
    QemuDisk,
    RunningGuest,
    Script,
    VhostUserDisk,
    VhostUserNet,
    Viommu,
    system_qemu,
    version_of,
)
from lab.parts import PartsError, require_program
from lab.qemu import SUITES, new_qemu
from lab.reloads import ReloadError, served

GUESTS = {
    "none": Viommu.NONE,
    "virtio": Viommu.VIRTIO,
    "intel": Viommu.INTEL,
    "intel-strict": Viommu.INTEL_STRICT,
}
SOURCE = Path(__file__).with_name("migration.c")
MEMORY = 256 * MIB
FORGETFUL = (9,)
"""The first QEMU that does not forget what processors write to memory of such a size."""
ENOUGH = 8192
"""More bytes of memory with which those before do not either."""
DISK_SIZE = 8 * MIB
WORKERS = 4
PAGE = 4096
LIMIT = 120.0
"""Seconds that any one step may take."""
TICKS = 4
"""Seconds of load to be seen between two hops."""
LAST_TICKS = 22
"""The same after the last hop of a trip: the load tells of a worker that is stuck after 20."""

NET = ("10.0.2.1", "10.0.2.15", "52:54:00:12:34:56")
"""The host that answers, the guest's address, and its card's."""


class MigrationError(AssertionError):
    """A guest did not arrive as it left; the message says what was seen."""


class PagesDifferError(MigrationError):
    """Pages of a guest's memory are not the same at source and destination.

    Attributes:
        pages: Their numbers.
    """

    def __init__(self, pages: Sequence[int], *, frozen: bool) -> None:
        self.pages = list(pages)
        shown = ", ".join(f"{page:#x}" for page in pages[:20])
        more = ", ..." if len(pages) > 20 else ""
        still = "" if frozen else "; the source still writes"
        super().__init__(
            f"{len(pages)} pages of the guest's memory are not the same ({shown}{more}){still}"
        )


@dataclass(frozen=True)
class Part:
    """The device that a guest uses at one place.

    Attributes:
        disks: QEMU's arguments for it, if it is a disk.
        devices: The same for any other device.
        log: What its server says, if there is one.
        check: Called once the guest has gone on there; raises if something is missing.
    """

    disks: Sequence[Disk] = ()
    devices: Sequence[Disk] = ()
    log: Path | None = None
    check: Callable[[], None] = lambda: None


Serve: TypeAlias = Callable[[Path, Path], AbstractContextManager[Part]]
"""Begins a device's server, of an image, in a directory of its own."""


@dataclass(frozen=True)
class Trip:
    """What hops, and between what.

    Attributes:
        viommu: What the device is behind.
        serve: Its server.
        load: What `lab/migration.c` uses: a disk, an address, or `memory`.
        qemus: Their paths; they take turns.
        memory: Bytes of the guest's memory; by default what each of the QEMUs can migrate.
    """

    viommu: Viommu
    serve: Serve
    load: str = "/dev/vda"
    qemus: Sequence[str] = ()
    memory: int | None = None

    def qemu(self, number: int) -> str:
        """The path of that which the guest is in after so many hops."""
        return self.qemus[number % len(self.qemus)] if self.qemus else system_qemu()

    @property
    def size(self) -> int:
        """Bytes of the guest's memory."""
        forgets = any(version_of(self.qemu(i)) < FORGETFUL for i in range(len(self.qemus) or 1))
        return self.memory or MEMORY + (ENOUGH if forgets else 0)

    @property
    def machine(self) -> list[str]:
        """What two versions of QEMU must be told to be the same for a guest."""
        versions = sorted(version_of(qemu) for qemu in self.qemus)
        if len(set(versions)) < 2:
            return []
        return ["-machine", "pc-q35-{}.{}".format(*versions[0]), "-cpu", "qemu64,-cx16"]


class Qmp:
    """A connection to QEMU's monitor. For one thread.

    Args:
        path: Its socket, which QEMU makes when it starts.
    """

    def __init__(self, path: Path) -> None:
        end = time.monotonic() + LIMIT
        while True:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                self._socket.close()
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)
        self._socket.settimeout(LIMIT)
        self._stream = self._socket.makefile("rw")
        self._read()
        self.run("qmp_capabilities")

    def _read(self) -> dict[str, Any]:
        try:
            line = self._stream.readline()
        except ConnectionError:
            line = ""
        if not line:
            raise MigrationError("QEMU is gone")
        found: dict[str, Any] = json.loads(line)
        return found

    def run(self, command: str, **arguments: object) -> Any:
        """Run a command; what it returns.

        Raises:
            MigrationError: QEMU refuses, or is gone.
        """
        request: dict[str, object] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        # What cannot be sent is not answered either.
        with contextlib.suppress(ConnectionError):
            self._stream.write(json.dumps(request) + "\n")
            self._stream.flush()
        while True:
            answer = self._read()
            if "error" in answer:
                raise MigrationError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        """Hang up."""
        self._stream.close()
        self._socket.close()


@dataclass(frozen=True)
class Hop:
    """What was seen of one hop.

    Attributes:
        downtime: Milliseconds that the guest stood still, by QEMU.
        total: Milliseconds that the migration took.
        passes: How often QEMU asked what was written.
        rate: Requests a second afterwards.
        gap: The longest time without a request, in milliseconds, by the guest's own clock.
    """

    downtime: int
    total: int
    passes: int
    rate: int
    gap: int


def by_guestio(*options: str, queues: int = 1, properties: str = "") -> Serve:
    """`guestio blk` with some options, and more properties of QEMU's front-end."""

    @contextlib.contextmanager
    def serve(image: Path, directory: Path) -> Iterator[Part]:
        more = ("--migration", "local", "--num-queues", str(queues))
        with served(image, directory, *more, *options) as (path, log):
            yield Part(disks=[VhostUserDisk(path, queues, properties)], log=log)

    return serve


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes], log: Path, ready: Callable[[], bool]) -> Iterator[None]:
    """A server that has been started: wait until it is ready, and end it afterwards."""
    try:
        end = time.monotonic() + LIMIT
        while not ready():
            if process.poll() is not None or time.monotonic() > end:
                raise MigrationError(f"{process.args!r} does not start: {log.read_text()}")
            time.sleep(0.02)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def by_daemon(program: str, queues: int) -> Serve:
    """`qemu-storage-daemon`, by its path."""

    @contextlib.contextmanager
    def serve(image: Path, directory: Path) -> Iterator[Part]:
        path, log = directory / "blk.sock", directory / "blk.log"
        export = f"addr.type=unix,addr.path={path},writable=on,num-queues={queues}"
        command = [
            program,
            # The one at the other end has the image open as well.
            *("--blockdev", f"driver=file,filename={image},node-name=file,locking=off"),
            *("--blockdev", "driver=raw,file=file,node-name=disk"),
            *("--export", f"type=vhost-user-blk,id=disk,node-name=disk,{export}"),
        ]
        with log.open("wb") as stderr:
            process = subprocess.Popen(command, stderr=stderr)
        with ended(process, log, path.exists):
            yield Part(disks=[VhostUserDisk(path, queues)], log=log)

    return serve


def card_by_guestio(*options: str, pairs: int = 1) -> Serve:
    """`guestio net`: a card whose network has a host that answers, and its frames are recorded."""

    @contextlib.contextmanager
    def serve(_image: Path, directory: Path) -> Iterator[Part]:
        path, log, frames = (directory / name for name in ("net.sock", "net.log", "frames"))
        command = [sys.executable, "-m", "guestio", "net", "--responder", f"{NET[0]}/24"]
        command += ["--socket", str(path), "--pcap", str(frames), "--queue-pairs", str(pairs)]
        with log.open("wb") as stderr:
            process = subprocess.Popen([*command, *options], stderr=stderr)

        def check() -> None:
            end = time.monotonic() + LIMIT
            while not announced(frames.read_bytes()):
                if time.monotonic() > end:
                    raise MigrationError("the guest's card did not announce itself")
                time.sleep(0.05)

        with ended(process, log, lambda: "listening on" in log.read_text()):
            card = VhostUserNet(path, pairs, mac=NET[2])
            yield Part(devices=[card], log=log, check=check)

    return serve


def announced(frames: bytes) -> bool:
    """Whether recorded frames have one that tells where the guest's address is now."""
    mac = bytes.fromhex(NET[2].replace(":", ""))
    address = socket.inet_aton(NET[1])
    arp, request = b"\x08\x06\x00\x01\x08\x00\x06\x04\x00", b"\x01" + mac + address
    gratuitous = b"\xff" * 6 + mac + arp + request
    at = frames.find(gratuitous)
    while at >= 0:
        # It asks who has the address that it has itself.
        if frames[at + 38 : at + 42] == address:
            return True
        at = frames.find(gratuitous, at + 1)
    return b"\xff" * 6 + mac + b"\x80\x35" in frames


@contextlib.contextmanager
def by_qemu(image: Path, _directory: Path) -> Iterator[Part]:
    """QEMU's own disk: a control."""
    yield Part(disks=[QemuDisk(image)])


@contextlib.contextmanager
def by_none(_image: Path, _directory: Path) -> Iterator[Part]:
    """No device at all: a control."""
    yield Part()


class Place:
    """A QEMU with a back-end of its own, on an image that others use as well, one at a time."""

    def __init__(
        self,
        guest: Guest,
        image: Path,
        directory: Path,
        serve: Serve,
        *,
        incoming: bool,
    ) -> None:
        directory.mkdir()
        self.directory = directory
        self._exit = contextlib.ExitStack()
        try:
            self.part = self._exit.enter_context(serve(image, directory))
            monitor = directory / "qmp"
            arguments = ["-qmp", f"unix:{monitor},server=on,wait=off"]
            if incoming:
                arguments += ["-incoming", "defer", "-S"]
            self.running: RunningGuest = self._exit.enter_context(
                replace(
                    guest,
                    disks=self.part.disks,
                    devices=self.part.devices,
                    qemu_args=[*guest.qemu_args, *arguments],
                ).boot(directory / "guest")
            )
            self.qmp = Qmp(monitor)
            self._exit.callback(self.qmp.close)
        except BaseException:
            self._exit.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit.close()

    def memory(self) -> int:
        """A descriptor of the guest's memory; the caller's."""
        for entry in Path(f"/proc/{self.running.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if "memfd:memory-backend" in str(entry.readlink()):
                    return os.open(entry, os.O_RDONLY)
        raise MigrationError("QEMU has no memory to be found")

    def lines(self) -> list[dict[str, int]]:
        """What the load has said here, a line for each second."""
        report = (self.directory / "guest" / "report.log").read_text(errors="replace")
        return [
            {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", line)}
            for line in re.findall(r"^LOAD (.*?stuck=\d+)\s*$", report, re.MULTILINE)
        ]

    def see_load(self, ticks: int) -> list[dict[str, int]]:
        """Wait for so many lines of the load, each of which must be right; those lines.

        Raises:
            MigrationError: The load found something wrong, or does not go on.
        """
        seen = len(self.lines())
        end = time.monotonic() + LIMIT
        while len(lines := self.lines()) < seen + ticks:
            if time.monotonic() > end:
                raise MigrationError(f"the load does not go on: {lines[-3:]}{self.words()}")
            time.sleep(0.05)
        found = lines[-ticks:]
        wrong = [line for line in lines if line["bad"] or line["stuck"]]
        if wrong or found[-1]["ops"] <= found[0]["ops"]:
            raise MigrationError(f"the load found: {wrong[:1] or found}{self.words()}")
        return found

    def words(self) -> str:
        """The ends of the logs."""
        guest = self.directory / "guest"
        logs = [guest / "report.log", guest / "qemu.log", guest / "console.log"]
        logs[:0] = [self.part.log] if self.part.log else []
        return "".join(
            f"\n--- {log.name} ---\n"
            + "\n".join(log.read_text(errors="replace").splitlines()[-12:])
            for log in logs
        )


def different_pages(one: int, other: int, size: int) -> list[int]:
    """The numbers of the pages of two memories that are not the same."""
    found = []
    for at in range(0, size, MIB):
        length = min(MIB, size - at)
        left, right = os.pread(one, length, at), os.pread(other, length, at)
        if left != right:
            found += [
                (at + page) // PAGE
                for page in range(0, length, PAGE)
                if left[page : page + PAGE] != right[page : page + PAGE]
            ]
    return found


def compare_memory(source: Place, target: Place, size: int) -> None:
    """Compare the guest's memory on both sides while neither lets it run.

    Raises:
        PagesDifferError: It is not the same.
    """
    with contextlib.ExitStack() as files:
        memories = [source.memory(), target.memory()]
        for fd in memories:
            files.callback(os.close, fd)
        pages = different_pages(memories[0], memories[1], size)
        if pages:
            before = [os.pread(memories[0], PAGE, page * PAGE) for page in pages]
            time.sleep(0.5)
            after = [os.pread(memories[0], PAGE, page * PAGE) for page in pages]
            raise PagesDifferError(pages, frozen=before == after)


def hop(source: Place, target: Place, size: int) -> Hop:
    """Migrate the guest, compare its memory on both sides, and have it go on.

    Raises:
        MigrationError: It did not arrive, or not as it was.
    """
    uri = f"unix:{target.directory / 'stream'}"
    target.qmp.run("migrate-incoming", uri=uri)
    source.qmp.run("migrate", uri=uri)
    end = time.monotonic() + LIMIT
    while (state := source.qmp.run("query-migrate"))["status"] != "completed":
        if state["status"] in ("failed", "cancelled") or time.monotonic() > end:
            raise MigrationError(f"the migration: {state}{source.words()}{target.words()}")
        time.sleep(0.05)
    while not arrived(target):
        if time.monotonic() > end:
            raise MigrationError(f"the guest does not arrive{target.words()}")
        time.sleep(0.02)
    compare_memory(source, target, size)
    target.qmp.run("cont")
    lines = target.see_load(TICKS)
    target.part.check()
    return Hop(
        downtime=state["downtime"],
        total=state["total-time"],
        passes=state["ram"]["dirty-sync-count"],
        rate=(lines[-1]["ops"] - lines[0]["ops"]) // (len(lines) - 1),
        gap=max(line["gap"] for line in target.lines()),
    )


def arrived(target: Place) -> bool:
    """Whether a guest has come whole.

    Raises:
        MigrationError: QEMU has refused it, and ended; the source may have been done before.
    """
    try:
        return bool(target.qmp.run("query-status")["status"] != "inmigrate")
    except MigrationError as error:
        raise MigrationError(f"the guest does not arrive: {error}{target.words()}") from None


def described(trip: Trip, directory: Path) -> Guest:
    """The guest, with the load in it."""
    load = directory / "load"
    compiler = require_program("gcc", "gcc")
    done = subprocess.run(
        [compiler, "-O1", "-static", "-o", str(load), str(SOURCE)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise PartsError(f"the load cannot be compiled: {done.stderr}")
    # The archive keeps files, not their modes.
    text = "cp /lab/load /tmp/load && chmod +x /tmp/load\n"
    if trip.load == NET[0]:
        text += (
            "# modules: virtio_net\n"
            "until [ -e /sys/class/net/eth0 ]; do usleep 20000; done\n"
            f"ip addr add {NET[1]}/24 dev eth0 && ip link set eth0 up\n"
        )
    # As many as processors, so that each keeps to its own.
    workers = 2 if trip.load == "memory" else WORKERS
    text += f"exec /tmp/load {trip.load} {workers}\n"
    return Guest(
        viommu=trip.viommu,
        scripts=[Script("load", text)],
        files={"/lab/load": load.read_bytes()},
        qemu_args=trip.machine,
        memory=trip.size,
        smp=2,
    )


def hops(trip: Trip, count: int, directory: Path, *, last: int = TICKS) -> Iterator[Hop]:
    """Boot one guest and have it hop so many times; each hop as it was made.

    Args:
        trip: What hops.
        count: How many hops.
        directory: For everything, and empty.
        last: Seconds of load to be seen after the last one.

    Raises:
        MigrationError: Something was not right.
        GuestError: The guest did not come up.
        PartsError: Something is missing on this machine.
    """
    image = directory / "disk.img"
    image.write_bytes(bytes(DISK_SIZE))
    guest = described(trip, directory)

    def place(number: int) -> Place:
        here = replace(guest, qemu=trip.qemu(number))
        name = f"place-{number}"
        return Place(here, image, directory / name, trip.serve, incoming=number > 0)

    here = place(0)
    try:
        here.see_load(TICKS)
        for number in range(1, count + 1):
            there = place(number)
            try:
                made = hop(here, there, guest.memory)
                here.__exit__(None, None, None)
            except BaseException:
                there.__exit__(None, None, None)
                raise
            here = there
            yield made
        here.see_load(last)
    finally:
        here.__exit__(None, None, None)


TITLE = "QEMU    guest         hop  down/ms  total/ms  passes  ops/s  gap/ms"


def line(version: str, name: str, number: int, made: Hop) -> str:
    """A line of the table."""
    return (
        f"{version:7} {name:13} {number:3} {made.downtime:8} {made.total:9} {made.passes:7} "
        f"{made.rate:6} {made.gap:7}"
    )


def named(qemu: str) -> str:
    """A QEMU's version, as it is written."""
    return ".".join(map(str, version_of(qemu)))


def compare(
    qemu: str, servers: Mapping[str, Serve], rounds: int, count: int
) -> dict[str, list[int]]:
    """Have a guest hop with each server in turn, and print each hop; the downtimes of each.

    Raises:
        MigrationError, GuestError, PartsError: As :func:`hops`.
    """
    found: dict[str, list[int]] = {name: [] for name in servers}
    print(TITLE.replace("guest ", "server"))
    for turn in range(rounds):
        # The one that begins has the machine as the other left it, so they take turns.
        order = list(servers)[:: 1 if turn % 2 == 0 else -1]
        for name in order:
            trip = Trip(Viommu.NONE, servers[name], qemus=[qemu])
            with tempfile.TemporaryDirectory(prefix="guestio-migrate-") as directory:
                for number, each in enumerate(hops(trip, count, Path(directory)), 1):
                    found[name].append(each.downtime)
                    print(line(named(qemu), name, number, each), flush=True)
    return found


def found_qemu(name: str) -> str:
    """The path of a QEMU that is named by its path or by a suite of `lab.qemu`."""
    return str(new_qemu(suite=name)) if name in SUITES else name


def run_comparison(qemu: str, arguments: argparse.Namespace, options: Sequence[str]) -> int:
    """Print downtimes with guestio and with the daemon; the exit status."""
    daemon = arguments.against
    beside = Path(qemu).with_name(daemon)
    if "/" not in daemon and beside.exists():
        daemon = str(beside)
    servers = {
        "guestio": by_guestio(*options, queues=arguments.queues),
        "daemon": by_daemon(daemon, arguments.queues),
    }
    try:
        found = compare(qemu, servers, arguments.rounds, arguments.hops)
    except (MigrationError, ReloadError, GuestError, PartsError, OSError) as error:
        print(f"FAILED\n{error}", flush=True)
        return 1
    middle = {name: statistics.median(times) for name, times in found.items()}
    for name, times in found.items():
        print(f"{name}: median {middle[name]:g} ms of {len(times)} hops, {sorted(times)}")
    print(f"guestio's is {middle['guestio'] / middle['daemon']:.2f} of {daemon}'s")
    return 0


def told(name: str, found: Sequence[int]) -> str:
    """What is said of hops in which memory was the same and the load right, by their downtimes."""
    if not found:
        return f"{name}: no hop"
    return (
        f"{name}: {len(found)} hops with 0 pages that differ and the load right; "
        f"down {min(found)} to {max(found)} ms, median {statistics.median(found):g}"
    )


def run_trips(trips: Mapping[str, Trip], arguments: argparse.Namespace) -> int:
    """Have a guest, or several, hop on each trip, and print each hop; the exit status."""
    failed = False
    print(TITLE)
    for name, trip in trips.items():
        differ: list[int] = []
        good: list[int] = []
        for _ in range(arguments.boots):
            try:
                with tempfile.TemporaryDirectory(prefix="guestio-migrate-") as directory:
                    made = hops(trip, arguments.hops, Path(directory), last=LAST_TICKS)
                    for number, each in enumerate(made, 1):
                        good.append(each.downtime)
                        print(line(named(trip.qemu(number)), name, number, each), flush=True)
            except (MigrationError, ReloadError, GuestError, PartsError) as error:
                failed = True
                if isinstance(error, PagesDifferError):
                    differ.append(len(error.pages))
                print(f"{name}: FAILED\n{error}", flush=True)
        print(told(name, good), flush=True)
        if arguments.boots > 1:
            which = f": {', '.join(map(str, differ))} pages" if differ else ""
            print(f"{name}: memory differed in {len(differ)} of {arguments.boots} guests{which}")
    return int(failed)


def main() -> int:
    """Run the campaign; a table on standard output."""
    parser = argparse.ArgumentParser(prog="./run lab-migrate", description=__doc__.split("\n")[0])
    parser.add_argument("--guest", choices=GUESTS, action="append", help="default: all")
    parser.add_argument("--hops", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--boots", type=int, default=1, help="guests of each kind, one by one")
    parser.add_argument(
        "--device",
        choices=("blk", "net", "qemu-blk", "memory"),
        default="blk",
        help="what the guest uses: a disk or a card of guestio's, or, as controls, QEMU's own "
        "disk, or memory alone",
    )
    parser.add_argument("--queues", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--queue-threads", action="store_true")
    parser.add_argument("--inflight-migration", action="store_true", help="of QEMU 11.1's disk")
    parser.add_argument("--memory", type=int, metavar="KIB", help="of the guest")
    parser.add_argument(
        "--against",
        metavar="PROGRAM",
        help="compare downtimes with this qemu-storage-daemon; without a path, the one of the "
        "QEMU that runs the guest",
    )
    parser.add_argument("--rounds", type=int, default=3, help="with --against: %(default)s")
    parser.add_argument(
        "--qemu",
        help=f"a path, {' or '.join(SUITES)}; default: $GUESTIO_LAB_QEMU, else {SUITES[0]}",
    )
    parser.add_argument("--onto", metavar="QEMU", help="hop to this one and back")
    arguments = parser.parse_args()
    if arguments.against and arguments.guest not in (None, ["none"]):
        parser.error("qemu-storage-daemon serves no guest behind an IOMMU: --guest none")
    asked = arguments.qemu or os.environ.get("GUESTIO_LAB_QEMU") or SUITES[0]
    qemus = [found_qemu(name) for name in (asked, arguments.onto) if name]
    options = ["--queue-threads"] if arguments.queue_threads else []
    if arguments.against:
        return run_comparison(qemus[0], arguments, options)
    properties = "inflight-migration=on" if arguments.inflight_migration else ""
    queues = arguments.queues
    serve, load = {
        "blk": (by_guestio(*options, queues=queues, properties=properties), "/dev/vda"),
        "net": (card_by_guestio(*options, pairs=queues), NET[0]),
        "qemu-blk": (by_qemu, "/dev/vda"),
        "memory": (by_none, "memory"),
    }[arguments.device]
    memory = arguments.memory and arguments.memory * 1024
    trips = {
        name: Trip(GUESTS[name], serve, load, qemus, memory) for name in arguments.guest or GUESTS
    }
    return run_trips(trips, arguments)


if __name__ == "__main__":
    sys.exit(main())
