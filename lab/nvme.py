"""`guestio nvme` in guests: whole disks, file systems, random requests, lives, resets, suspend.

    ./run lab-nvme                     behind no IOMMU, virtio-iommu and intel-iommu
    ./run lab-nvme --guest virtio --requests 1000 --lives 5
    ./run lab-nvme --disk blk          the same with `guestio blk --transport vfio-user`

QEMU 11.1 runs the guests (`python -m lab.qemu`). A table at the end has a line for each.
"""

import argparse
import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lab.guest import MIB, Guest, GuestError, Script, VfioUserDevice, Viommu
from lab.parts import PartsError
from lab.qemu import new_qemu

GUESTS = {"none": Viommu.NONE, "virtio": Viommu.VIRTIO, "intel": Viommu.INTEL_CACHING}
SOURCE = Path(__file__).parent / "disk_load.c"
DISKS = {"nvme": "/dev/nvme0n1", "blk": "/dev/vda"}
SCRIPTS = {"nvme": "nvme", "blk": "virtio_disk"}
DISK_SIZE = 64 * MIB
START_LIMIT = 60.0
LOADERS = 4
BLOCKS = 2048
COLUMNS = (
    *("disk", "IOMMU", "sum", "file system", "logs", "suspend", "requests", "maps+unmaps"),
    *("lives", "resets", "FLRs", "last sum", "s"),
)


class DiskError(AssertionError):
    """The disk did not do as it should; the message says what was seen."""


@contextmanager
def served(
    images: Sequence[Path], directory: Path, *options: str, disk: str = "nvme"
) -> Iterator[tuple[Path, Path]]:
    """`guestio nvme` on images, or `guestio blk`: its socket and its log; ended by SIGTERM."""
    socket, log = directory / f"{disk}.sock", directory / f"{disk}.log"
    more = [word for image in images[1:] for word in ("--namespace", str(image))]
    if disk != "nvme":
        more += ["--transport", "vfio-user"]
    command = [sys.executable, "-m", "guestio", disk, str(images[0]), "--socket", str(socket)]
    with log.open("wb") as stderr:
        process = subprocess.Popen([*command, *more, *options], stderr=stderr)
    try:
        end = time.monotonic() + START_LIMIT
        while "listening on" not in log.read_text():
            if process.poll() is not None or time.monotonic() > end:
                raise DiskError(f"guestio {disk} does not start: {log.read_text()}")
            time.sleep(0.02)
        yield socket, log
        process.send_signal(signal.SIGTERM)
        if process.wait(10):
            raise DiskError(f"guestio {disk} failed: {log.read_text()}")
    finally:
        process.kill()
        process.wait()


def counted(log: Path) -> dict[str, int]:
    """What a server that has ended says that it counted."""
    last = next(line for line in reversed(log.read_text().splitlines()) if " ended: " in line)
    return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", last)}


def build_load(directory: Path) -> bytes:
    """The program that makes random requests and verifies them, for a guest."""
    made = directory / "disk_load"
    words = ["gcc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", str(SOURCE), "-o", str(made)]
    subprocess.run(words, check=True)
    return made.read_bytes()


def disk_guest(
    socket: Path,
    viommu: Viommu,
    scripts: Sequence[str],
    environment: Mapping[str, str],
    files: Mapping[str, bytes],
    **more: object,
) -> Guest:
    """A guest with one PCI function as its only disk; more are fields of `Guest`."""
    description: dict[str, object] = {
        "viommu": viommu,
        "devices": [VfioUserDevice(socket)],
        "scripts": [Script.named(name) for name in scripts],
        "environment": {"DISK": DISKS["nvme"], **environment},
        "files": files,
        "timeout": 300.0,
        **more,
    }
    return Guest(**description)  # type: ignore[arg-type]  # a dict has one type for all fields


def whole_disk(guest: str, directory: Path, arguments: argparse.Namespace) -> dict[str, str]:
    """Sum a whole disk in a guest, then have it live through everything; a row of the table.

    Raises:
        DiskError: Something was summed wrongly, or the server complained.
        GuestError: The guest did not come to its end, or found something wrong.
    """
    image = directory / "disk.img"
    image.write_bytes(os.urandom(DISK_SIZE))
    began = time.monotonic()
    before = digest(image.read_bytes())
    files = {"/lab/files/disk_load": build_load(directory)}
    each = arguments.requests // LOADERS
    disk = arguments.disk
    row = {"disk": disk, "IOMMU": guest}

    def boot(
        name: str, *scripts: str, smp: int = 1, **variables: object
    ) -> tuple[Mapping[str, str], dict[str, int]]:
        with served([image], directory, disk=disk) as (socket, log):
            description = disk_guest(
                socket,
                GUESTS[guest],
                [SCRIPTS[disk], *scripts],
                {"DISK": DISKS[disk]} | {key: str(value) for key, value in variables.items()},
                files,
                timeout=arguments.limit,
                smp=smp,
            )
            result = description.run(directory / name).check()
        numbers = counted(log)
        if numbers["protocol_errors"] or numbers["failed_calls"] or numbers["cut_off"]:
            raise DiskError(f"the server complained:\n{log.read_text()}")
        return result.facts, numbers

    facts, _ = boot("sum", "sha256")
    if facts["sha256"] != before:
        raise DiskError(f"the guest read {facts['sha256']}, the image is {before}")
    row["sum"] = "same"
    _, idle = boot("idle")
    facts, busy = boot("load", smp=2, DISK_LOAD=f"{LOADERS} {each} {BLOCKS}")
    row["requests"] = facts["load_requests"]
    row["maps+unmaps"] = "+".join(
        f"{(busy[key] - idle[key]) / int(facts['load_requests']):.2f}"
        for key in ("dma_maps", "dma_unmaps")
    )
    facts, _ = boot("file-system", "filesystem", *(["nvme_logs"] if disk == "nvme" else []))
    row["file system"] = f"clean, {facts['filesystem_files']} files"
    row["logs"] = "read" if facts.get("nvme_logs") == "1" else "-"
    if disk != "nvme":
        row["suspend"] = "-"  # such guests did not come back; see docs/limits.md
    elif GUESTS[guest] is Viommu.VIRTIO:
        # Linux 6.12 does not bring a virtio-iommu back: with QEMU's own disks neither.
        row["suspend"] = "Linux cannot"
    else:
        facts, _ = boot("suspend", "suspend")
        row["suspend"] = facts["suspends"].strip()
    lives = {"DISK_LIVES": arguments.lives, "DISK_FLRS": arguments.resets}
    if disk == "nvme":
        lives |= {"DISK_RESETS": arguments.resets}
        facts, _ = boot("lives", **lives, DISK_LOAD=f"{LOADERS} {each // 5} {BLOCKS}")
        row["resets"] = facts["disk_resets"]
    else:
        facts, _ = boot("lives", **lives)
        reloads = {"RELOADS": arguments.resets, "RELOAD_WAYS": "unbind"}
        resets, _ = boot("resets", "reload", **reloads)
        row["resets"] = resets["lives"]
        if digest(image.read_bytes()[: int(resets["reload_bytes"])]) != resets["reload_sha256"]:
            raise DiskError("after resets under load the guest reads what the image has not")
    row |= {"lives": facts["disk_lives"], "FLRs": facts["disk_flrs"]}
    facts, _ = boot("last", "sha256")
    if facts["sha256"] != digest(image.read_bytes()):
        raise DiskError(f"at the end the guest read {facts['sha256']}, which the image is not")
    row["last sum"] = "same"
    row["s"] = f"{time.monotonic() - began:.0f}"
    return row


def digest(data: bytes) -> str:
    """The SHA-256 of data, as `sha256sum` prints it."""
    return hashlib.sha256(data).hexdigest()


def main() -> int:
    """Run the guests that are asked for, and print a line for each."""
    parser = argparse.ArgumentParser(
        prog="./run lab-nvme", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--disk", choices=[*DISKS], default="nvme", help="what serves it")
    parser.add_argument("--guest", action="append", choices=[*GUESTS], help="one of them only")
    parser.add_argument("--requests", type=int, default=100_000, metavar="N")
    parser.add_argument("--lives", type=int, default=100, metavar="N", help="unbind and bind")
    parser.add_argument("--resets", type=int, default=20, metavar="N", help="of each kind")
    parser.add_argument("--limit", type=float, default=3600.0, metavar="SECONDS", help="of a boot")
    arguments = parser.parse_args()
    os.environ["GUESTIO_LAB_QEMU"] = str(new_qemu())
    rows, failed = [], 0
    for guest in arguments.guest or GUESTS:
        with tempfile.TemporaryDirectory(prefix="guestio-nvme-") as directory:
            try:
                rows.append(whole_disk(guest, Path(directory), arguments))
                print(rows[-1], flush=True)
            except (DiskError, GuestError, PartsError) as error:
                print(f"{guest}: {error}", file=sys.stderr, flush=True)
                failed += 1
    table = [COLUMNS, *(tuple(row.get(name, "") for name in COLUMNS) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
