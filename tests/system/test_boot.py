"""Firmware reads a boot sector, and what that wants, from disks over vfio-user, and writes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from lab.guest import MIB, VfioUserDevice, Viommu, _tcg_arguments
from lab.nvme import counted, served
from lab.qemu import new_qemu

SOURCE = Path(__file__).parents[2] / "lab" / "boot_sector.S"
SECTOR = 512
LIMIT = 240.0


@pytest.fixture(scope="module")
def boot_sector(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    made = tmp_path_factory.mktemp("boot")
    subprocess.run(["as", "--32", SOURCE, "-o", made / "o"], check=True)
    linked = ["-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary"]
    subprocess.run(["ld", *linked, made / "o", "-o", made / "sector"], check=True)
    return (made / "sector").read_bytes()


@pytest.mark.parametrize("disk", ["nvme", "blk"])
def test_seabios_boots_from_it(disk: str, boot_sector: bytes, tmp_path: Path) -> None:
    assert len(boot_sector) == SECTOR
    text = os.urandom(400).hex().encode()
    image, serial = tmp_path / "disk.img", tmp_path / "serial"
    image.write_bytes(boot_sector)
    with image.open("r+b") as file:
        file.truncate(4 * MIB)
        file.seek(1000 * SECTOR)
        file.write(text)
    qemu = str(new_qemu())
    with served([image], tmp_path, disk=disk) as (path, log):
        done = subprocess.run(
            [
                *("setpriv", "--pdeathsig", "KILL", qemu, *_tcg_arguments(qemu)),
                *("-machine", "q35,memory-backend=memory,kernel-irqchip=off", "-m", "64M"),
                *("-object", "memory-backend-memfd,id=memory,size=64M,share=on"),
                *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
                *("-serial", f"file:{serial}", "-device", "isa-debug-exit,iobase=0xf4"),
                *VfioUserDevice(path).arguments(0, Viommu.NONE),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    assert done.returncode == 3, f"{done}\n{serial.read_bytes()!r}"
    assert serial.read_bytes().endswith(text)
    data = image.read_bytes()
    assert data[2000 * SECTOR : 2002 * SECTOR] == text.ljust(2 * SECTOR, b"\0")
    numbers = counted(log)
    assert numbers["protocol_errors"] == numbers["failed_calls"] == numbers["cut_off"] == 0
