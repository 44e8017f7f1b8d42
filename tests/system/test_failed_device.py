"""A device that has failed for good, under QEMU: the machine is stopped. It boots nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path

from guestio.pci.interrupts import InterruptKind
from lab.guest import VfioUserDevice, Viommu
from lab.migration import Qmp
from lab.qemu import new_qemu
from tests.kit.serving import until
from tests.kit.vfio_client import ServingPci, Toy


def test_qemu_stops_the_machine(tmp_path: Path) -> None:
    device, monitor = Toy(), tmp_path / "qmp"
    with ServingPci(device, tmp_path / "toy.sock") as serving:
        command = [
            str(new_qemu()),
            *("-accel", "tcg", "-m", "64", "-display", "none", "-nodefaults"),
            *("-machine", "q35,memory-backend=mem"),
            *("-object", "memory-backend-memfd,id=mem,size=64M,share=on"),
            *("-qmp", f"unix:{monitor},server=on,wait=off"),
            *VfioUserDevice(serving.server.path, {}).arguments(0, Viommu.NONE),
        ]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as qemu:
            try:
                listening = device.host.interrupts._triggers
                until(lambda: listening[InterruptKind.ERR])
                qmp = Qmp(monitor)
                until(lambda: qmp.run("query-status")["running"])
                # As of 11.1.3 it does not listen to that.
                assert not device.host.request_removal()
                assert device.host.report_error()
                until(lambda: qmp.run("query-status")["status"] == "internal-error")
                qmp.close()
            finally:
                qemu.kill()
            assert qemu.stderr is not None
            assert "Unrecoverable error detected" in qemu.stderr.read()
