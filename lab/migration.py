"""A guest under load hops from one QEMU to the next, with a `guestio blk` of its own each time.

    ./run lab-migrate                          without an IOMMU, behind virtio-iommu and intel-iommu
    ./run lab-migrate --guest virtio --hops 20 --queue-threads
    ./run lab-migrate --qemu /usr/bin/qemu-system-x86_64
    ./run lab-migrate --against qemu-storage-daemon --rounds 5

The load is `lab/migration.c`: it checks memory that only the disk writes long after it was written.
After each hop, while neither QEMU lets the guest run, all of its memory is compared page by page.
The table has a line for each hop: for how long the guest stood still, as QEMU tells it, how long
the migration took, and what the load did afterwards.

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

from lab.guest import MIB, Guest, GuestError, RunningGuest, Script, VhostUserDisk, Viommu
from lab.parts import PartsError, require_program
from lab.qemu import new_qemu
from lab.reloads import ReloadError, served

GUESTS = {
    "none": Viommu.NONE,
    "virtio": Viommu.VIRTIO,
    "intel": Viommu.INTEL,
    "intel-strict": Viommu.INTEL_STRICT,
}
SOURCE = Path(__file__).with_name("migration.c")
MEMORY = 256 * MIB
DISK_SIZE = 8 * MIB
WORKERS = 4
PAGE = 4096
LIMIT = 120.0
"""Seconds that any one step may take."""
TICKS = 4
"""Seconds of load to be seen between two hops."""

Serve: TypeAlias = Callable[[Path, Path], AbstractContextManager[tuple[Path, Path]]]
"""Begins a back-end of an image, in a directory of its own: its socket and its log."""


class MigrationError(AssertionError):
    """A guest did not arrive as it left; the message says what was seen."""


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
        line = self._stream.readline()
        if not line:
            raise MigrationError("QEMU is gone")
        found: dict[str, Any] = json.loads(line)
        return found

    def run(self, command: str, **arguments: object) -> Any:
        """Run a command; what it returns.

        Raises:
            MigrationError: QEMU refuses.
        """
        request: dict[str, object] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
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
        different: Pages that were not the same on both sides.
        rate: Requests a second afterwards.
        gap: The longest time without a request, in milliseconds, by the guest's own clock.
    """

    downtime: int
    total: int
    passes: int
    different: int
    rate: int
    gap: int


def by_guestio(*options: str) -> Serve:
    """`guestio blk` with some options."""
    return lambda image, directory: served(image, directory, *options)


def by_daemon(program: str, queues: int) -> Serve:
    """`qemu-storage-daemon`, by its path."""

    @contextlib.contextmanager
    def serve(image: Path, directory: Path) -> Iterator[tuple[Path, Path]]:
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
        try:
            end = time.monotonic() + LIMIT
            while not path.exists():
                if process.poll() is not None or time.monotonic() > end:
                    raise MigrationError(f"{program} does not start: {log.read_text()}")
                time.sleep(0.02)
            yield path, log
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    return serve


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
        queues: int,
    ) -> None:
        directory.mkdir()
        self.directory = directory
        self._exit = contextlib.ExitStack()
        try:
            self.socket, self.log = self._exit.enter_context(serve(image, directory))
            monitor = directory / "qmp"
            arguments = ["-qmp", f"unix:{monitor},server=on,wait=off"]
            if incoming:
                arguments += ["-incoming", "defer", "-S"]
            self.running: RunningGuest = self._exit.enter_context(
                replace(
                    guest,
                    disks=[VhostUserDisk(self.socket, queues)],
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
        logs = (self.log, guest / "report.log", guest / "qemu.log", guest / "console.log")
        return "".join(
            f"\n--- {log.name} ---\n"
            + "\n".join(log.read_text(errors="replace").splitlines()[-12:])
            for log in logs
        )


def different_pages(one: int, other: int, size: int) -> int:
    """How many pages of two memories are not the same."""
    found = 0
    for at in range(0, size, MIB):
        left, right = os.pread(one, MIB, at), os.pread(other, MIB, at)
        if left != right:
            found += sum(
                left[page : page + PAGE] != right[page : page + PAGE]
                for page in range(0, MIB, PAGE)
            )
    return found


def hop(source: Place, target: Place) -> Hop:
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
    while target.qmp.run("query-status")["status"] == "inmigrate":
        if time.monotonic() > end:
            raise MigrationError(f"the guest does not arrive{target.words()}")
        time.sleep(0.02)
    with contextlib.ExitStack() as files:
        memories = [source.memory(), target.memory()]
        for fd in memories:
            files.callback(os.close, fd)
        different = different_pages(memories[0], memories[1], MEMORY)
    if different:
        raise MigrationError(f"{different} pages of the guest's memory are not the same")
    target.qmp.run("cont")
    lines = target.see_load(TICKS)
    return Hop(
        downtime=state["downtime"],
        total=state["total-time"],
        passes=state["ram"]["dirty-sync-count"],
        different=different,
        rate=(lines[-1]["ops"] - lines[0]["ops"]) // (len(lines) - 1),
        gap=max(line["gap"] for line in target.lines()),
    )


def described(viommu: Viommu, directory: Path) -> Guest:
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
    text = f"cp /lab/load /tmp/load && chmod +x /tmp/load && exec /tmp/load /dev/vda {WORKERS}\n"
    return Guest(
        viommu=viommu,
        scripts=[Script("load", text)],
        files={"/lab/load": load.read_bytes()},
        memory=MEMORY,
        smp=2,
    )


def hops(
    viommu: Viommu,
    count: int,
    directory: Path,
    options: Sequence[str] = (),
    *,
    queues: int = 1,
    serve: Serve | None = None,
) -> Iterator[Hop]:
    """Boot one guest and have it hop so many times; each hop as it was made.

    Args:
        viommu: Behind which IOMMU.
        count: How many hops.
        directory: For everything, and empty.
        options: Of `guestio blk`.
        queues: How many the disk has.
        serve: Another back-end than that.

    Raises:
        MigrationError: Something was not right.
        GuestError: The guest did not come up.
        PartsError: Something is missing on this machine.
    """
    image = directory / "disk.img"
    image.write_bytes(bytes(DISK_SIZE))
    guest = described(viommu, directory)
    serve = serve or by_guestio(*options)
    here = Place(guest, image, directory / "place-0", serve, incoming=False, queues=queues)
    try:
        here.see_load(TICKS)
        for number in range(1, count + 1):
            there = Place(
                guest, image, directory / f"place-{number}", serve, incoming=True, queues=queues
            )
            try:
                made = hop(here, there)
                here.__exit__(None, None, None)
            except BaseException:
                there.__exit__(None, None, None)
                raise
            here = there
            yield made
        here.see_load(TICKS)
    finally:
        here.__exit__(None, None, None)


def version_of(qemu: Mapping[str, str]) -> str:
    """The version of the QEMU that a guest would run under."""
    program = qemu.get("GUESTIO_LAB_QEMU") or require_program(
        "qemu-system-x86_64", "qemu-system-x86"
    )
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"version ([\d.]+)", said.stdout)
    return found.group(1) if found else "?"


TITLE = "QEMU    guest         hop  down/ms  total/ms  passes  pages differ  ops/s  gap/ms"


def line(version: str, name: str, number: int, made: Hop) -> str:
    """A line of the table."""
    return (
        f"{version:7} {name:13} {number:3} {made.downtime:8} {made.total:9} {made.passes:7} "
        f"{made.different:13} {made.rate:6} {made.gap:7}"
    )


def compare(
    version: str, servers: Mapping[str, Serve], rounds: int, count: int, queues: int
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
            with tempfile.TemporaryDirectory(prefix="guestio-migrate-") as directory:
                made = hops(Viommu.NONE, count, Path(directory), queues=queues, serve=servers[name])
                for number, each in enumerate(made, 1):
                    found[name].append(each.downtime)
                    print(line(version, name, number, each), flush=True)
    return found


def main() -> int:
    """Run the campaign; a table on standard output."""
    parser = argparse.ArgumentParser(prog="./run lab-migrate", description=__doc__.split("\n")[0])
    parser.add_argument("--guest", choices=GUESTS, action="append", help="default: all")
    parser.add_argument("--hops", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--queues", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--queue-threads", action="store_true")
    parser.add_argument(
        "--against",
        metavar="PROGRAM",
        help="compare downtimes with this qemu-storage-daemon; without a path, the one of the "
        "QEMU that runs the guest",
    )
    parser.add_argument("--rounds", type=int, default=3, help="with --against: %(default)s")
    parser.add_argument(
        "--qemu", help="default: $GUESTIO_LAB_QEMU, else that of python -m lab.qemu"
    )
    arguments = parser.parse_args()
    if arguments.against and arguments.guest not in (None, ["none"]):
        parser.error("qemu-storage-daemon serves no guest behind an IOMMU: --guest none")
    if arguments.qemu or "GUESTIO_LAB_QEMU" not in os.environ:
        os.environ["GUESTIO_LAB_QEMU"] = arguments.qemu or str(new_qemu())
    options = ["--migration", "local", "--num-queues", str(arguments.queues)]
    options += ["--queue-threads"] if arguments.queue_threads else []
    version = version_of(os.environ)
    if arguments.against:
        daemon = arguments.against
        beside = Path(os.environ["GUESTIO_LAB_QEMU"]).with_name(daemon)
        if "/" not in daemon and beside.exists():
            daemon = str(beside)
        servers = {
            "guestio": by_guestio(*options),
            "daemon": by_daemon(daemon, arguments.queues),
        }
        try:
            found = compare(version, servers, arguments.rounds, arguments.hops, arguments.queues)
        except (MigrationError, ReloadError, GuestError, PartsError, OSError) as error:
            print(f"FAILED\n{error}", flush=True)
            return 1
        middle = {name: statistics.median(times) for name, times in found.items()}
        for name, times in found.items():
            print(f"{name}: median {middle[name]:g} ms of {len(times)} hops, {sorted(times)}")
        print(f"guestio's is {middle['guestio'] / middle['daemon']:.2f} of {daemon}'s")
        return 0
    failed = False
    print(TITLE)
    for name in arguments.guest or GUESTS:
        try:
            with tempfile.TemporaryDirectory(prefix="guestio-migrate-") as directory:
                made = hops(
                    GUESTS[name],
                    arguments.hops,
                    Path(directory),
                    options,
                    queues=arguments.queues,
                )
                for number, each in enumerate(made, 1):
                    print(line(version, name, number, each), flush=True)
        except (MigrationError, ReloadError, GuestError, PartsError) as error:
            failed = True
            print(f"{version} {name}: FAILED\n{error}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
