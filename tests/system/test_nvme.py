"""`guestio nvme` in real guests: whole disks, file systems, lives, resets; behind every IOMMU."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

import pytest

from lab.guest import MIB, Script, Viommu
from lab.nvme import build_load, counted, disk_guest, served
from lab.qemu import new_qemu

SIZE = 16 * MIB
MODES = [Viommu.NONE, Viommu.VIRTIO, Viommu.INTEL_CACHING]


@pytest.fixture(autouse=True)
def _newer_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUESTIO_LAB_QEMU", str(new_qemu()))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


def checked(log: Path, cut_off: int = 0) -> dict[str, int]:
    """What the server counted: nothing may have been wrong."""
    numbers = counted(log)
    assert numbers["protocol_errors"] == numbers["failed_calls"] == 0, log.read_text()
    assert numbers["cut_off"] == cut_off, log.read_text()
    return numbers


@pytest.mark.parametrize("viommu", MODES, ids=lambda mode: mode.name.lower())
def test_a_guest_uses_the_disk(viommu: Viommu, image: Path, tmp_path: Path) -> None:
    before = hashlib.sha256(image.read_bytes()).hexdigest()
    pattern = os.urandom(256 * 1024)
    with served([image], tmp_path) as (socket, log):
        guest = disk_guest(
            socket,
            viommu,
            scripts=["nvme", "sha256", "pattern"],
            environment={"PATTERN_OFFSET": str(MIB), "DISK_LOAD": "2 150 256", "DISK_LIVES": "1"},
            files={"/lab/pattern": pattern, "/lab/files/disk_load": build_load(tmp_path)},
        )
        # Sums come first: the load writes.
        guest = dataclasses.replace(
            guest,
            scripts=[Script("sum", Script.named("sha256").text), *guest.scripts],
        )
        result = guest.run(tmp_path / "guest").check()
    assert result.scripts["sum"].facts["sha256"] == before
    data = image.read_bytes()
    assert result.scripts["sha256"].facts["sha256"] != before
    assert data[MIB : MIB + len(pattern)] == pattern
    assert result.facts["nvme_model"].strip() == "guestio NVMe"
    assert result.facts["load_requests"] == "300"
    assert result.facts["disk_lives"] == "1"
    numbers = checked(log)
    if viommu.present:
        # Each request of the load maps its page and unmaps it.
        assert numbers["dma_maps"] >= 300


def test_resets_under_load_with_msi_and_two_namespaces(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(os.urandom(4 * MIB))
    options = ["--block-size", "4096", "--interrupts", "msi", "--serial", "S1"]
    with served([image, other], tmp_path, *options) as (socket, log):
        result = (
            disk_guest(
                socket,
                Viommu.VIRTIO,
                scripts=["nvme", "sha256"],
                environment={
                    "DISK_LOAD": "2 300 256",
                    "DISK_RESETS": "2",
                    "DISK_FLRS": "2",
                },
                files={"/lab/files/disk_load": build_load(tmp_path)},
            )
            .run(tmp_path / "guest")
            .check()
        )
    # Linux names namespaces in the order in which it comes to know them.
    read = image if result.facts["size"] == str(SIZE) else other
    assert result.facts["sha256"] == hashlib.sha256(read.read_bytes()).hexdigest()
    assert result.facts["load_requests"] == "600"
    assert (result.facts["disk_resets"], result.facts["disk_flrs"]) == ("2", "2")
    assert (result.facts["nvme_block"], result.facts["nvme_disks"]) == ("4096", "2")
    assert result.facts["nvme_serial"].strip() == "S1"
    checked(log)


def test_a_read_only_disk_with_the_interrupt_pin(image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    image.chmod(0o444)
    with served([image], tmp_path, "--read-only") as (socket, log):
        guest = disk_guest(
            socket, Viommu.NONE, ["nvme", "sha256"], environment={}, files={}, append="pci=nomsi"
        )
        result = guest.run(tmp_path / "guest").check()
    assert result.facts["sha256"] == hashlib.sha256(before).hexdigest()
    assert result.facts["nvme_read_only"] == "1"
    assert result.facts["nvme_interrupts"] == "0"
    checked(log)
