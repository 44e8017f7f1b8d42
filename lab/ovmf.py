"""UEFI firmware starts a program from a disk that `guestio nvme` serves.

    ./run lab-ovmf

Debian's OVMF is fetched and unpacked below a temporary directory, the disk is a FAT file system
with the guest kernel as `EFI/BOOT/BOOTX64.EFI`, and QEMU 11.1 runs the firmware. It is asked
whether it has found the disk, read the kernel from it and started it.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lab.guest import VfioUserDevice, Viommu, _tcg_arguments
from lab.nvme import DiskError, counted, served
from lab.parts import PartsError, PrivateApt, codename, kernel, run
from lab.qemu import new_qemu

STARTED = re.compile(r'BdsDxe: starting (\w+) "UEFI guestio NVMe')


def firmware(directory: Path) -> tuple[Path, Path]:
    """Debian's OVMF, unpacked: its code, and a copy of its variables."""
    apt = PrivateApt(directory / "apt", codename(), codename())
    apt.update()
    for deb in apt.download(["ovmf"], lambda line: print(line, file=sys.stderr)):
        run(["dpkg-deb", "-x", str(deb), str(directory / "root")])
    variables = directory / "variables.fd"
    found = directory / "root/usr/share/OVMF"
    shutil.copy(found / "OVMF_VARS_4M.fd", variables)
    return found / "OVMF_CODE_4M.fd", variables


def fat_image(directory: Path) -> Path:
    """A disk with a FAT file system, and the kernel where firmware looks for a program."""
    files, image = directory / "files", directory / "disk.img"
    (files / "EFI/BOOT").mkdir(parents=True)
    shutil.copy(kernel().image, files / "EFI/BOOT/BOOTX64.EFI")
    make = [str(new_qemu("qemu-img")), "convert", "-f", "vvfat", "-O", "raw"]
    run([*make, f"fat:{files}", str(image)])
    return image


def start(directory: Path, limit: float) -> str:
    """Have the firmware start the program; what it said of it.

    Raises:
        DiskError: It did not within `limit` seconds, or the server complained.
    """
    code, variables = firmware(directory)
    serial = directory / "serial"
    serial.touch()
    qemu = str(new_qemu())
    drives = []
    for unit, (path, only) in enumerate(((code, "on"), (variables, "off"))):
        drives += ["-drive", f"if=pflash,format=raw,unit={unit},readonly={only},file={path}"]
    with served([fat_image(directory)], directory) as (socket, log):
        process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", qemu, *_tcg_arguments(qemu)),
                *("-machine", "q35,memory-backend=memory,kernel-irqchip=off", "-m", "256M"),
                *("-object", "memory-backend-memfd,id=memory,size=256M,share=on"),
                *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
                *("-serial", f"file:{serial}", *drives),
                *VfioUserDevice(socket).arguments(0, Viommu.NONE),
            ],
            stdin=subprocess.DEVNULL,
        )
        try:
            end = time.monotonic() + limit
            while not (found := STARTED.search(serial.read_text(errors="replace"))):
                if process.poll() is not None or time.monotonic() > end:
                    said = serial.read_text(errors="replace")
                    raise DiskError(f"the firmware started nothing: {said}")
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    numbers = counted(log)
    if numbers["protocol_errors"] or numbers["failed_calls"] or numbers["cut_off"]:
        raise DiskError(f"the server complained:\n{log.read_text()}")
    return found[0] + f'": {numbers["region_writes"]} writes to registers'


def main() -> int:
    """Try it; a line tells what the firmware did."""
    parser = argparse.ArgumentParser(
        prog="./run lab-ovmf", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="guestio-ovmf-") as directory:
        try:
            print(start(Path(directory), arguments.limit))
        except (DiskError, PartsError) as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
