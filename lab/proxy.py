"""Whole disks through `guestio proxy`: sums, file systems, random requests, recordings repeated.

    ./run lab-proxy                          every guest and back-end, then the latency
    ./run lab-proxy --guest qemu-11 --iommu virtio --requests 1000
    ./run lab-proxy --no-latency

A guest reads its whole disk, makes and verifies random requests, makes a file system, fills, trims
and checks it, and reads everything again; once with a proxy that only watches, and once, on a
smaller disk, with one that relays and records what requests carry. The recording is then repeated
against a new back-end on a disk as it was, and both images are compared. Without an IOMMU the
back-end is qemu-storage-daemon, otherwise `guestio blk`. A table at the end has a line for each.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from guestio.observe import open_recording
from lab.guest import MIB, Guest, GuestError, GuestResult, Script, VhostUserDisk, Viommu
from lab.nvme import build_load, digest
from lab.parts import PartsError, require_program
from lab.qemu import new_qemu
from lab.uml import UmlGuest

IOMMUS = {"none": Viommu.NONE, "virtio": Viommu.VIRTIO, "intel-strict": Viommu.INTEL_STRICT}
GUESTS = ("uml", "qemu", "qemu-11")
WATCHED, RECORDED = 64 * MIB, 24 * MIB
"""Bytes of the disks."""
LOADERS = 4
START_LIMIT = 90.0
END_LIMIT = 60.0
SERIAL = "recorded"
COLUMNS = (
    *("guest", "back-end", "IOMMU", "sum", "requests", "file system", "last sum", "unseen"),
    *("recorded", "repeated", "image", "s"),
)


class ProxyLabError(AssertionError):
    """Something was not as it should be; the message says what was seen."""


@dataclass(frozen=True)
class Way:
    """From a guest to its disk.

    Attributes:
        guest: One of `GUESTS`.
        iommu: One of `IOMMUS`.
        back_end: ``guestio`` or ``qemu-storage-daemon``.
    """

    guest: str
    iommu: str
    back_end: str

    @property
    def programs(self) -> tuple[str, str]:
        """QEMU's system emulator and its storage daemon."""
        names = ("qemu-system-x86_64", "qemu-storage-daemon")
        if self.guest == "qemu-11":
            return str(new_qemu(names[0])), str(new_qemu(names[1]))
        return (
            require_program(names[0], "qemu-system-x86"),
            require_program(names[1], "qemu-utils"),
        )


WAYS = (
    Way("uml", "none", "guestio"),
    *(Way(guest, "none", "qemu-storage-daemon") for guest in GUESTS[1:]),
    *(Way(guest, iommu, "guestio") for guest in GUESTS[1:] for iommu in ("virtio", "intel-strict")),
)


@contextlib.contextmanager
def running(command: Sequence[object], socket: Path, log: Path) -> Iterator[None]:
    """A server, from its socket's appearance to SIGTERM.

    Raises:
        ProxyLabError: It does not begin, or ends badly.
    """
    with log.open("wb") as output:
        process = subprocess.Popen([str(word) for word in command], stderr=output, stdout=output)
    try:
        end = time.monotonic() + START_LIMIT
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > end:
                raise ProxyLabError(f"{command} does not start: {log.read_text()}")
            time.sleep(0.02)
        yield
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(END_LIMIT)
        except subprocess.TimeoutExpired:
            raise ProxyLabError(f"{command} did not obey SIGTERM: {log.read_text()}") from None
        if status not in (0, -signal.SIGTERM):
            raise ProxyLabError(f"{command} ended with {status}: {log.read_text()}")
    finally:
        process.kill()
        process.wait()


def disk_server(way: Way, image: Path, directory: Path) -> contextlib.AbstractContextManager[None]:
    """The back-end on an image; it listens at ``disk.sock``."""
    socket, log = directory / "disk.sock", directory / "disk.log"
    if way.back_end == "guestio":
        iommu = ["--iommu", "off"] if way.guest == "uml" else []
        command = [*guestio("blk"), image, "--socket", socket, "--serial", SERIAL, *iommu]
    else:
        file = f"driver=file,node-name=file,filename={image},discard=unmap"
        export = "type=vhost-user-blk,id=export,node-name=disk,writable=on"
        command = [
            *(way.programs[1], "--blockdev", file),
            *("--blockdev", "driver=raw,node-name=disk,file=file,discard=unmap"),
            *("--export", f"{export},addr.type=unix,addr.path={socket}"),
        ]
    return running(command, socket, log)


def guestio(*words: object) -> list[object]:
    """A command of `guestio`."""
    return [sys.executable, "-m", "guestio", *words]


@contextlib.contextmanager
def proxied(way: Way, image: Path, directory: Path, *options: object) -> Iterator[Path]:
    """A disk behind a proxy that cuts at the first rule that is broken; the proxy's socket."""
    front = directory / "proxy.sock"
    words = ["--listen", front, "--connect", directory / "disk.sock", "--device", "blk", "--strict"]
    with (
        disk_server(way, image, directory),
        running(guestio("proxy", *words, *options), front, directory / "proxy.log"),
    ):
        yield front


def counted(directory: Path) -> dict[str, int]:
    """What the proxy has counted.

    Raises:
        ProxyLabError: It complained.
    """
    said = (directory / "proxy.log").read_text()
    counts = {name: int(n) for name, n in re.findall(r"(\w+)=(\d+)", said.split(" ended: ")[-1])}
    if (
        "broke the protocol" in said
        or counts["violations"]
        or counts["protocol_errors"]
        or counts["requests"] != counts["completed"]
    ):
        raise ProxyLabError(f"the proxy complained:\n{said}")
    return counts


def use_disk(
    way: Way, front: Path, image: Path, directory: Path, requests: int, limit: float
) -> tuple[GuestResult, str]:
    """Have a guest do everything with its disk: what it told, and the sum of before."""
    before = digest(image.read_bytes())
    blocks = image.stat().st_size // 4096 // 2 // LOADERS
    last = Script("last", Script.named("sha256").text)
    names = ["sha256", "load", "filesystem"]
    options = {
        "disks": [VhostUserDisk(front)],
        "scripts": [*map(Script.named, names), last],
        "environment": {"DISK_LOAD": f"{LOADERS} {requests // LOADERS} {blocks}"},
        "files": {"/lab/files/disk_load": build_load(directory)},
        "timeout": limit,
    }
    if way.guest == "uml":
        guest: Guest = UmlGuest(**options)  # type: ignore[arg-type]  # a dict has one type for all
    else:
        os.environ["GUESTIO_LAB_QEMU"] = way.programs[0]
        guest = Guest(viommu=IOMMUS[way.iommu], **options)  # type: ignore[arg-type]  # a dict has one type for all
    result = guest.run(directory / "guest").check()
    return result, before


def check_sums(result: GuestResult, before: str, image: Path) -> dict[str, str]:
    """Compare what the guest read with the image; columns of the table.

    Raises:
        ProxyLabError: They differ.
    """
    if (seen := result.scripts["sha256"].facts["sha256"]) != before:
        raise ProxyLabError(f"the guest read {seen}, the image was {before}")
    if (seen := result.scripts["last"].facts["sha256"]) != digest(image.read_bytes()):
        raise ProxyLabError(f"at the end the guest read {seen}, which the image is not")
    return {
        "sum": "same",
        "requests": result.facts["load_requests"],
        "file system": f"clean, {result.facts['filesystem_files']} files",
        "last sum": "same",
    }


def watched(
    way: Way, directory: Path, requests: int, limit: float, size: int = WATCHED
) -> dict[str, str]:
    """A whole disk through a proxy that only watches; columns of the table."""
    directory.mkdir()
    image = directory / "disk.img"
    image.write_bytes(os.urandom(size))
    with proxied(way, image, directory, "--notifications", "watch") as front:
        result, before = use_disk(way, front, image, directory, requests, limit)
    counts = counted(directory)
    row = check_sums(result, before, image)
    return row | {"unseen": f"{counts['unseen_requests']} of {counts['requests']}"}


def recorded(
    way: Way, directory: Path, requests: int, limit: float, size: int = RECORDED
) -> dict[str, str]:
    """A disk through a proxy that records, and the recording repeated; columns of the table.

    Raises:
        ProxyLabError: The recording is not complete, or was answered differently.
    """
    directory.mkdir()
    image, as_it_was, file = (directory / name for name in ("disk.img", "before.img", "recording"))
    image.write_bytes(os.urandom(size))
    shutil.copyfile(image, as_it_was)
    options = ["--record", file, "--record-payload", "all"]
    with proxied(way, image, directory, *options) as front:
        result, before = use_disk(way, front, image, directory, requests, limit)
    check_sums(result, before, image)
    counts = counted(directory)
    if counts["unseen_requests"]:
        raise ProxyLabError(f"{counts['unseen_requests']} requests were not seen")
    with open_recording(file) as recording:
        rows, lost = recording.requests().num_rows, recording.description["lost"]
    if lost or rows != counts["requests"]:
        raise ProxyLabError(
            f"{rows} of {counts['requests']} requests recorded, {lost} records lost"
        )
    again = directory / "again"
    again.mkdir()
    shutil.copyfile(as_it_was, again / "disk.img")
    with disk_server(way, again / "disk.img", again):
        words: list[object] = ["replay", file, again / "disk.sock", "--speed", "max"]
        words += ["--timeout", "120"]
        done = subprocess.run(
            [str(word) for word in guestio(*words)], capture_output=True, text=True, check=False
        )
    if done.returncode or "every answer was the recorded one" not in done.stdout:
        raise ProxyLabError(f"the replay is different:\n{done.stdout}\n{done.stderr}")
    if not same(again / "disk.img", image):
        raise ProxyLabError("after the replay the image is not what the guest left")
    return {"recorded": str(rows), "repeated": "equal answers", "image": "same"}


def same(one: Path, other: Path) -> bool:
    """Whether two files have the same content."""
    sums = [hashlib.sha256(each.read_bytes()).digest() for each in (one, other)]
    return sums[0] == sums[1]


def main() -> int:
    """Run what is asked for, and print a line for each."""
    parser = argparse.ArgumentParser(
        prog="./run lab-proxy", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--guest", action="append", choices=GUESTS, help="one of them only")
    parser.add_argument("--iommu", action="append", choices=[*IOMMUS], help="one of them only")
    parser.add_argument("--requests", type=int, default=10_000, metavar="N", help="random ones")
    parser.add_argument("--limit", type=float, default=1800.0, metavar="SECONDS", help="of a boot")
    parser.add_argument("--no-latency", action="store_true", help="leave ./run bench proxy out")
    arguments = parser.parse_args()
    rows, failed = [], 0
    for way in WAYS:
        if way.guest not in (arguments.guest or GUESTS):
            continue
        if way.iommu not in (arguments.iommu or IOMMUS):
            continue
        began = time.monotonic()
        row = {"guest": way.guest, "back-end": way.back_end, "IOMMU": way.iommu}
        rows.append(row)
        with tempfile.TemporaryDirectory(prefix="guestio-proxy-") as directory:
            for name, part in (("watched", watched), ("recorded", recorded)):
                requests = arguments.requests // (1 if part is watched else 10)
                try:
                    row |= part(way, Path(directory, name), requests, arguments.limit)
                except (ProxyLabError, GuestError, PartsError) as error:
                    print(f"{way}, {name}: {error}", file=sys.stderr, flush=True)
                    row[COLUMNS[3] if part is watched else "recorded"] = "FAILED"
                    failed += 1
        row["s"] = f"{time.monotonic() - began:.0f}"
        print(row, file=sys.stderr, flush=True)
    table = [COLUMNS, *(tuple(row.get(name, "") for name in COLUMNS) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(map(str.ljust, line, widths)).rstrip(), flush=True)
    if not arguments.no_latency:
        from bench.proxy import main as latency

        latency(["--rounds", "5", "--time", "2"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
