"""`guestio nvme` in guests: whole disks, file systems, random requests, lives, resets.

    ./run lab-nvme                     behind no IOMMU, virtio-iommu and intel-iommu
    ./run lab-nvme --guest virtio --requests 1000 --lives 5

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
SOURCE = Path(__file__).parent / "nvme_load.c"
DISK = "/dev/nvme0n1"
DISK_SIZE = 64 * MIB
START_LIMIT = 60.0
LOADERS = 4
BLOCKS = 2048
COLUMNS = (
    *("IOMMU", "sum", "file system", "logs", "suspend", "requests", "maps+unmaps"),
    *("lives", "resets", "FLRs", "s"),
)


class NvmeError(AssertionError):
    """The disk did not do as it should; the message says what was seen."""


@contextmanager
def served(images: Sequence[Path], directory: Path, *options: str) -> Iterator[tuple[Path, Path]]:
    """`guestio nvme` on images: its socket and its log; ended by SIGTERM."""
    socket, log = directory / "nvme.sock", directory / "nvme.log"
    more = [word for image in images[1:] for word in ("--namespace", str(image))]
    command = [sys.executable, "-m", "guestio", "nvme", str(images[0]), "--socket", str(socket)]
    with log.open("wb") as stderr:
        process = subprocess.Popen([*command, *more, *options], stderr=stderr)
    try:
        end = time.monotonic() + START_LIMIT
        while "listening on" not in log.read_text():
            if process.poll() is not None or time.monotonic() > end:
                raise NvmeError(f"guestio nvme does not start: {log.read_text()}")
            time.sleep(0.02)
        yield socket, log
        process.send_signal(signal.SIGTERM)
        if process.wait(10):
            raise NvmeError(f"guestio nvme failed: {log.read_text()}")
    finally:
        process.kill()
        process.wait()


def counted(log: Path) -> dict[str, int]:
    """What a server that has ended says that it counted."""
    last = next(line for line in reversed(log.read_text().splitlines()) if " ended: " in line)
    return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", last)}


def build_load(directory: Path) -> bytes:
    """The program that makes random requests and verifies them, for a guest."""
    made = directory / "nvme_load"
    words = ["gcc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", str(SOURCE), "-o", str(made)]
    subprocess.run(words, check=True)
    return made.read_bytes()


def nvme_guest(
    socket: Path,
    viommu: Viommu,
    scripts: Sequence[str],
    environment: Mapping[str, str],
    files: Mapping[str, bytes],
    **more: object,
) -> Guest:
    """A guest with the controller as its only disk; more are fields of `Guest`."""
    description: dict[str, object] = {
        "viommu": viommu,
        "devices": [VfioUserDevice(socket)],
        "scripts": [Script.named(name) for name in scripts],
        "environment": {"DISK": DISK, **environment},
        "files": files,
        "timeout": 300.0,
        **more,
    }
    return Guest(**description)  # type: ignore[arg-type]  # a dict has one type for all fields


def whole_disk(guest: str, directory: Path, arguments: argparse.Namespace) -> dict[str, str]:
    """Sum a whole disk in a guest, then have it live through everything; a row of the table.

    Raises:
        NvmeError: Something was summed wrongly, or the server complained.
        GuestError: The guest did not come to its end, or found something wrong.
    """
    image = directory / "disk.img"
    image.write_bytes(os.urandom(DISK_SIZE))
    viommu = GUESTS[guest]
    began = time.monotonic()
    before = hashlib.sha256(image.read_bytes()).hexdigest()
    files = {"/lab/files/nvme_load": build_load(directory)}
    each = arguments.requests // LOADERS
    row = {"IOMMU": guest}

    def boot(
        scripts: Sequence[str], environment: Mapping[str, object], name: str, **more: object
    ) -> tuple[Mapping[str, str], dict[str, int]]:
        with served([image], directory) as (socket, log):
            description = nvme_guest(
                socket,
                viommu,
                scripts,
                {key: str(value) for key, value in environment.items()},
                files,
                timeout=arguments.limit,
                **more,
            )
            result = description.run(directory / name).check()
        numbers = counted(log)
        if numbers["protocol_errors"] or numbers["failed_calls"] or numbers["cut_off"]:
            raise NvmeError(f"the server complained:\n{log.read_text()}")
        return result.facts, numbers

    facts, _ = boot(["nvme", "sha256"], {}, "sum")
    if facts["sha256"] != before:
        raise NvmeError(f"the guest read {facts['sha256']}, the image is {before}")
    row["sum"] = "same"
    _, idle = boot(["nvme"], {}, "idle")
    load = {"NVME_LOAD": f"{LOADERS} {each} {BLOCKS}"}
    facts, busy = boot(["nvme"], load, "load", smp=2)
    row["requests"] = facts["load_requests"]
    done = int(facts["load_requests"])
    row["maps+unmaps"] = "+".join(
        f"{(busy[key] - idle[key]) / done:.2f}" for key in ("dma_maps", "dma_unmaps")
    )
    facts, _ = boot(["nvme", "filesystem", "nvme_logs", "nvme_suspend"], {}, "file-system")
    row["file system"] = f"clean, {facts['filesystem_files']} files"
    row["logs"] = "read" if facts.get("nvme_logs") == "1" else "no"
    row["suspend"] = facts["nvme_suspend"]
    lives = {"NVME_LIVES": arguments.lives, "NVME_RESETS": arguments.resets}
    lives |= {"NVME_FLRS": arguments.resets}
    facts, _ = boot(["nvme"], lives | {"NVME_LOAD": f"{LOADERS} {each // 5} {BLOCKS}"}, "lives")
    row |= {key: facts[f"nvme_{key.lower()}"] for key in ("lives", "resets", "FLRs")}
    row["s"] = f"{time.monotonic() - began:.0f}"
    return row


def main() -> int:
    """Run the guests that are asked for, and print a line for each."""
    parser = argparse.ArgumentParser(
        prog="./run lab-nvme", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
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
            except (NvmeError, GuestError, PartsError) as error:
                print(f"{guest}: {error}", file=sys.stderr, flush=True)
                failed += 1
    table = [COLUMNS, *(tuple(row.get(name, "") for name in COLUMNS) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
