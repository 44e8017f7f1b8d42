"""Disks that a guest loses and gets again, without MSI-X, which QEMU 11.1 does not survive."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from lab.guest import MIB, Guest, Script, VfioUserDevice, Viommu
from lab.migration import MigrationError, Qmp
from lab.nvme import DISKS, counted, served
from lab.qemu import new_qemu

UNPLUGS = 1
LIMIT = 300.0


class RootPort:
    """A port of PCI Express that devices are plugged into."""

    def arguments(self, index: int, viommu: Viommu) -> list[str]:
        return ["-device", "pcie-root-port,id=port0,chassis=1"]


def plug(qmp: Qmp, properties: dict[str, Any]) -> None:
    """Plug a device in, once QEMU has let go of the one before."""
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            qmp.run("device_add", **properties)
        except MigrationError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


@pytest.mark.parametrize(("disk", "interrupts"), [("nvme", "msi"), ("blk", "intx")])
def test_a_disk_is_unplugged_and_plugged_in_again(
    disk: str, interrupts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUESTIO_LAB_QEMU", str(new_qemu()))
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(2 * MIB))
    monitor = tmp_path / "qmp"
    options = ["--interrupts", interrupts]
    with served([image], tmp_path, *options, disk=disk) as (path, log):
        device = VfioUserDevice(path, {"id": "disk", "bus": "port0"})
        guest = Guest(
            viommu=Viommu.INTEL_CACHING,
            devices=[RootPort(), device],
            scripts=[Script.named("unplug")],
            environment={"DISK": DISKS[disk], "UNPLUGS": str(UNPLUGS)},
            qemu_args=["-qmp", f"unix:{monitor},server=on,wait=off"],
            timeout=LIMIT,
        )
        properties = json.loads(device.arguments(0, guest.viommu)[1])
        with guest.boot(tmp_path / "guest") as running:
            qmp = Qmp(monitor)
            try:
                for life in range(1, UNPLUGS + 1):
                    running.wait_for(f"FACT plugged={life}\n", LIMIT)
                    qmp.run("device_del", id="disk")
                    running.wait_for(f"FACT gone={life}\n", LIMIT)
                    # The next client of the same server.
                    plug(qmp, properties)
                facts = running.wait().check().facts
            finally:
                qmp.close()
    sums = {value for name, value in facts.items() if name.startswith("sum_")}
    assert sums == {hashlib.sha256(image.read_bytes()).hexdigest()}
    numbers = counted(log)
    # QEMU connects before it finds that the place is not free yet.
    assert numbers["connections"] >= UNPLUGS + 1
    assert numbers["protocol_errors"] == numbers["failed_calls"] == numbers["cut_off"] == 0
