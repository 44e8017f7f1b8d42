"""The catalogue for virtio-iommus: each fault is found, ours has none, QEMU's are those known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from guestio.errors import DeviceError
from guestio.faults import Severity, Verdict, check_iommu, iommu_catalogue
from guestio.testing import serving
from guestio.virtio.iommu import VirtioIommu
from lab.qemu import new_qemu
from tests.faults.test_check import SECTIONS
from tests.kit.broken_iommu import FAULTS, RANGES, BrokenIommu

PATIENCE = 30.0

QEMU_BAD = {
    "attach.flag-not-negotiated",
    "attach.reserved",
    "attach.wide-endpoint",
    "fault.domain",
    "map.bounds",
    "map.input-range",
    "map.mmio-not-negotiated",
    "map.unaligned-end",
    "map.unaligned-half",
    "map.unaligned-physical",
    "map.unaligned-start",
    "probe.little-room",
    "probe.wide-endpoint",
    "request.unknown-type",
    "reset.domains",
    "reset.mappings",
    "resv-mem.map",
    "unmap.split-removes-none",
}
"""What QEMU 11.1.3 does otherwise than the specification says; docs/findings.md."""


def test_names_sources_and_texts() -> None:
    checks = iommu_catalogue()
    assert len(checks) > 120
    for each in checks:
        area, _, name = each.id.partition(".")
        assert area, each.id
        assert name, each.id
        assert each.text.endswith("."), each.id
        assert each.hostile == (each.severity is Severity.SAFETY), each.id
        assert each.source.split("section ")[1].split(",")[0] in SECTIONS, each.id


# Ours


@pytest.mark.parametrize(
    "options",
    [
        RANGES,
        {},
        {"probe_size": 0, "bypass": True},
        {"page_size_mask": 0xFFFF_FFFF_FFFF_0000, "input_range": (0x10000, 2**40 - 1)},
    ],
    ids=["limits", "default", "no-probe", "wide-pages"],
)
def test_our_device_does_what_it_must(options: dict[str, object]) -> None:
    report = check_iommu(VirtioIommu([8, 9], **options), patience=PATIENCE)  # type: ignore[arg-type] # options of all types
    assert report.bad == []
    assert report.counts[Verdict.PASS] > 100


def test_our_back_end_does_what_it_must() -> None:
    with serving(VirtioIommu([8, 9], **RANGES), iommu="off") as path:
        only = ["request", "attach", "probe", "config.bypass-*"]
        report = check_iommu(path, only=only, patience=PATIENCE)
    assert report.bad == []
    assert report.counts[Verdict.PASS] > 30


def test_equal_seeds_have_equal_verdicts() -> None:
    first, second = (
        check_iommu(BrokenIommu("map-rounds"), seed=5, patience=PATIENCE) for _ in range(2)
    )
    assert first.verdicts() == second.verdicts()
    assert not first.passed


# Others


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_a_fault_is_found(name: str, fault: str) -> None:
    device = BrokenIommu(fault, bypass=fault in {"bypass-wide", "always-bypasses"})
    assert find(device, name) in {Verdict.FAIL, Verdict.WEDGED}
    assert find(BrokenIommu(), name) in {Verdict.PASS, Verdict.REJECT}


def find(device: BrokenIommu, name: str) -> Verdict:
    from guestio.faults.catalogue import select
    from guestio.faults.virtio_iommu.ports import LocalCarrier
    from guestio.faults.virtio_iommu.runner import _Iommus, _Reached

    (each,) = select(iommu_catalogue(), [name])
    # A fault that also breaks the honest request would be found before any check.
    target = _Reached("device", lambda _: LocalCarrier(device))
    return _Iommus(target, 0, 2.0, 2.0).examine(each)[0]


def test_every_check_that_has_no_fault_here_is_one_of_these() -> None:
    # What they look for is a device that dies, or needs one that can be told more than ours.
    without = {each.id for each in iommu_catalogue()} - {name for name, _ in FAULTS}
    assert len(without) < 40, sorted(without)


@pytest.mark.timeout(120)
def test_qemu_is_driven_by_qtest() -> None:
    report = check_iommu(qemu=new_qemu(), only=["attach", "map", "reset"], patience=PATIENCE)
    bad = {result.id for result in report.bad}
    assert bad == {name for name in QEMU_BAD if name.startswith(("attach", "map", "reset"))}
    assert report.counts[Verdict.PASS] > 30


def test_a_qemu_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="cannot start /no/such/qemu"):
        check_iommu(qemu="/no/such/qemu")
    with pytest.raises(DeviceError, match=r"ended with status 1; it must be QEMU"):
        check_iommu(qemu="/bin/false")


def test_arguments_are_looked_at() -> None:
    with pytest.raises(ValueError, match="either a target or qemu"):
        check_iommu()
    with pytest.raises(ValueError, match="1 endpoints; two are needed"):
        check_iommu(VirtioIommu([8]))
    with pytest.raises(ValueError, match="no check matches 'nothing'"):
        check_iommu(VirtioIommu([8, 9]), only=["nothing"])


# The command


def guestio(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "guestio", "check", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_the_command_checks_a_back_end(tmp_path: Path) -> None:
    junit = tmp_path / "report.xml"
    with serving(VirtioIommu([8, 9]), iommu="off") as path:
        done = guestio(
            "--virtio-iommu", path, "--only", "probe", "--json", "--patience", "30",
            "--junit", str(junit),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["device"] == "iommu"
    assert report["counts"]["PASS"] > 5
    assert "guestio check iommu" in junit.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--virtio-iommu",), "say on which SOCKET"),
        (("--virtio-iommu", "x", "--qemu", "y"), "say one of SOCKET and --qemu"),
        (("--virtio-iommu", "x", "--device", "blk"), "--device is not for"),
        (("x", "--qemu", "y"), "--qemu is not for"),
        (("--virtio-iommu", "--vfio-user", "x"), "say one of --front-end"),
    ],
)
def test_bad_arguments_of_the_command(arguments: tuple[str, ...], message: str) -> None:
    done = guestio(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_the_command_lists_the_checks() -> None:
    done = guestio("--virtio-iommu", "--list")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == f"{len(iommu_catalogue())} checks"
