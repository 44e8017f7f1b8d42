"""A disk's driver is unloaded and loaded, unbound and bound, again and again, under load.

    ./run lab-reloads                      50 reloads behind every IOMMU under QEMU, 200 in UML
    ./run lab-reloads --guest virtio --reloads 5
    GUESTIO_LAB_QEMU=/path/to/qemu-system-x86_64 ./run lab-reloads

`guestio blk` serves the disk. `lab/scripts/reload.sh` runs in the guest; it compares what it reads
with what it wrote, looks after the memory that the disk has left, and sums up the areas at the end,
which are compared with the image.
"""

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.guest import MIB, Guest, GuestError, GuestResult, Script, VhostUserDisk, Viommu
from lab.parts import PartsError
from lab.uml import UmlGuest

GUESTS = {
    "uml": None,
    "none": Viommu.NONE,
    "virtio": Viommu.VIRTIO,
    "intel": Viommu.INTEL,
    "intel-strict": Viommu.INTEL_STRICT,
}
DISK_SIZE = 8 * MIB
START_LIMIT = 90.0
END_LIMIT = 60.0
"""Seconds that a server may take to obey SIGTERM; 2, but on a machine that is overloaded."""
SECONDS_PER_LIFE = 20.0


class ReloadError(AssertionError):
    """The disk did not survive; the message says what was seen."""


@contextmanager
def served(image: Path, directory: Path, *options: str) -> Iterator[tuple[Path, Path]]:
    """`guestio blk` on an image: its socket and its log; ended by SIGTERM."""
    socket, log = directory / "blk.sock", directory / "blk.log"
    command = [sys.executable, "-m", "guestio", "blk", str(image), "--socket", str(socket)]
    with log.open("wb") as stderr:
        process = subprocess.Popen([*command, *options], stderr=stderr)
    try:
        end = time.monotonic() + START_LIMIT
        while "listening on" not in log.read_text():
            if process.poll() is not None or time.monotonic() > end:
                raise ReloadError(f"guestio blk does not start: {log.read_text()}")
            time.sleep(0.02)
        yield socket, log
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise ReloadError(f"guestio blk did not obey SIGTERM: {log.read_text()}") from None


def reload_disk(
    guest: str, reloads: int, directory: Path, ways: str = "module unbind", *, blocks: int = 16
) -> GuestResult:
    """Boot one guest and have it reload its disk's driver.

    Args:
        guest: A key of `GUESTS`.
        reloads: How often.
        directory: For the image, the socket and the logs.
        ways: How the driver goes, in turn: `module`, `unbind`.
        blocks: 4 KiB blocks of each of the four areas that are read and written.

    Raises:
        ReloadError: Something was read, written or summed wrongly, or the back-end complained.
        GuestError: The guest did not come to its end.
        PartsError: Something is missing on this machine.
    """
    image = directory / "disk.img"
    image.write_bytes(os.urandom(DISK_SIZE))
    viommu = GUESTS[guest]
    options = ["--iommu", "off"] if viommu is None else []
    variables = {"RELOADS": reloads, "RELOAD_WAYS": ways, "RELOAD_BLOCKS": blocks}
    with served(image, directory, *options) as (socket, log):
        description = Guest(
            disks=[VhostUserDisk(socket)],
            viommu=viommu or Viommu.NONE,
            scripts=[Script.named("reload")],
            environment={name: str(value) for name, value in variables.items()},
            timeout=START_LIMIT + reloads * SECONDS_PER_LIFE,
        )
        if viommu is None:
            description = uml(description)
        result = description.run(directory / "guest").check()
    said = log.read_text()
    # Nothing that the driver does here is a mistake, so there is nothing to complain of. (QEMU
    # 10.0.13 gives the driver a larger ring than it says when it asks for notes.)
    complaints = [
        line
        for line in said.splitlines()[1:]
        if " INFO " not in line and "its requests are not tracked" not in line
    ]
    if complaints or "failed=0" not in said:
        raise ReloadError(f"the back-end complained:\n{said}")
    content = image.read_bytes()[: int(result.facts["reload_bytes"])]
    if hashlib.sha256(content).hexdigest() != result.facts["reload_sha256"]:
        raise ReloadError(f"what the guest reads is not what is in {image}")
    if int(result.facts["lives"]) != reloads:
        raise ReloadError(f"{result.facts['lives']} reloads, not {reloads}")
    return result


def uml(guest: Guest) -> UmlGuest:
    """The same guest as a User-mode Linux."""
    return UmlGuest(
        disks=guest.disks,
        scripts=guest.scripts,
        environment=guest.environment,
        timeout=guest.timeout,
    )


def main() -> int:
    """Run the campaign; one line per guest on standard output."""
    parser = argparse.ArgumentParser(prog="./run lab-reloads", description=__doc__.split("\n")[0])
    parser.add_argument("--guest", choices=[*GUESTS], action="append", help="default: all but none")
    parser.add_argument("--reloads", type=int, help="default: 50, and 200 for uml")
    parser.add_argument("--ways", default="module unbind", help="default: %(default)s")
    arguments = parser.parse_args()
    failed = False
    for guest in arguments.guest or [name for name in GUESTS if name != "none"]:
        reloads = arguments.reloads or (200 if guest == "uml" else 50)
        start = time.monotonic()
        try:
            with tempfile.TemporaryDirectory(prefix="guestio-reloads-") as directory:
                reload_disk(guest, reloads, Path(directory), arguments.ways)
        except (ReloadError, GuestError, PartsError) as error:
            failed = True
            print(f"{guest}: FAILED\n{error}", flush=True)
        else:
            seconds = time.monotonic() - start
            print(f"{guest}: {reloads} reloads, sums right, {seconds:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
