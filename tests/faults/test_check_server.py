"""The catalogue for vfio-user servers: each fault is found, and honest ones have none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guestio.errors import DeviceError
from guestio.faults import Severity, Verdict, check_server, server_catalogue
from guestio.pci import NvmeController, PciDevice, VirtioPci
from guestio.virtio import (
    BlockDevice,
    ConsoleDevice,
    EntropyDevice,
    InputDevice,
    NetDevice,
)
from guestio.virtio.net import Responder
from tests.faults.test_check import SECTIONS
from tests.kit.broken_vfio_server import FAULTS, BrokenServer, Fault
from tests.kit.vfio_client import ServingPci, Toy

PATIENCE = 30.0


def image(path: Path) -> str:
    disk = path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    return str(disk)


MAKE: dict[str, Callable[[Path], PciDevice]] = {
    "any": lambda _: Toy(),
    "nvme": lambda path: NvmeController(image(path)),
    "virtio": lambda path: VirtioPci(BlockDevice(image(path))),
}


# The catalogue


def test_there_are_enough_checks() -> None:
    assert len(server_catalogue("any")) >= 150
    assert len(server_catalogue("nvme")) > len(server_catalogue("any"))
    for each in server_catalogue():
        area, _, name = each.id.partition(".")
        assert area, each.id
        assert name, each.id
        assert each.text.endswith("."), each.id
        assert each.hostile == (each.severity is Severity.SAFETY), each.id
        kind, _, rest = each.source.partition(" ")
        assert kind in {"vfio-user", "PCI", "NVMe", "virtio"}, each.id
        if kind == "virtio":
            assert rest.split("section ")[1].split(",")[0] in SECTIONS, each.id


# Honest servers

HONEST: dict[str, tuple[str, Callable[[Path], PciDevice]]] = {
    "toy": ("any", MAKE["any"]),
    "nvme": ("nvme", MAKE["nvme"]),
    "blk": ("virtio", MAKE["virtio"]),
    "net": ("virtio", lambda _: VirtioPci(NetDevice(Responder("10.0.2.2/24")))),
    "console": ("virtio", lambda _: VirtioPci(ConsoleDevice())),
    "rng": ("virtio", lambda _: VirtioPci(EntropyDevice())),
    "input": ("virtio", lambda _: VirtioPci(InputDevice.keyboard())),
    "intx": ("virtio", lambda _: VirtioPci(EntropyDevice(), interrupts="intx")),
}


@pytest.mark.parametrize("name", HONEST)
def test_our_servers_do_what_they_must(name: str, tmp_path: Path) -> None:
    kind, make = HONEST[name]
    # What all PCI functions have in common is the same code.
    only = () if name in {"toy", "nvme"} else ("config", "irq", "reset", "flr", "virtio")
    with ServingPci(make(tmp_path), tmp_path / "server.sock") as serving:
        report = check_server(serving.server.path, kind, only=only, patience=PATIENCE)
    assert report.bad == []
    assert report.counts[Verdict.PASS] > 50


def test_equal_seeds_have_equal_verdicts(tmp_path: Path) -> None:
    names = ["message", "config.noise", "read"]
    with ServingPci(Toy(), tmp_path / "server.sock") as serving:
        first, second = (
            check_server(serving.server.path, only=names, seed=7, patience=PATIENCE)
            for _ in range(2)
        )
    assert first.verdicts() == second.verdicts()


# Broken ones


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    path = tmp_path_factory.mktemp("behind")
    with (
        ServingPci(NvmeController(image(path)), path / "nvme.sock") as nvme,
        ServingPci(VirtioPci(EntropyDevice()), path / "virtio.sock") as virtio,
    ):
        yield {"any": nvme.server.path, "nvme": nvme.server.path, "virtio": virtio.server.path}


SILENT = {
    "irq.trigger",
    "nvme.ready",
    "nvme.posted-doorbell",
    "nvme.interrupt",
    "virtio.reset",
}
"""Found by waiting for what does not come."""


@pytest.mark.parametrize(
    ("kind", "name", "fault"), [pytest.param(*each, id=each[1]) for each in FAULTS]
)
def test_a_fault_is_found(
    kind: str, name: str, fault: Fault, behind: dict[str, str], tmp_path: Path
) -> None:
    patience = 0.5 if name in SILENT else PATIENCE
    found = _examine(tmp_path, behind[kind], kind, name, fault, patience)
    assert found.verdict in {Verdict.FAIL, Verdict.WEDGED, Verdict.CRASH}, found.reason


def _examine(path: Path, behind: str, kind: str, name: str, fault: Fault, patience: float) -> Any:
    from guestio.faults.catalogue import select
    from guestio.faults.runner import Target
    from guestio.faults.vfio_user.link import VfioLink
    from guestio.faults.vfio_user.runner import _Servers

    (each,) = select(server_catalogue(kind), [name])
    with BrokenServer(path / "broken.sock", behind, fault):
        target = Target(str(path / "broken.sock"), None, VfioLink)
        verdict, reason = _Servers(target, kind, 0, patience, PATIENCE).examine(each)
    return type("Found", (), {"verdict": verdict, "reason": reason})


def test_what_finds_faults_finds_none_in_the_server_behind(
    behind: dict[str, str], tmp_path: Path
) -> None:
    for number, (kind, name, _) in enumerate(FAULTS):
        if name == "region.mapped":
            continue
        (path := tmp_path / str(number)).mkdir()
        found = _examine(path, behind[kind], kind, name, Fault(), PATIENCE)
        assert found.verdict in {Verdict.PASS, Verdict.REJECT}, (name, found.reason)


# Arguments and the command


def test_a_server_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="serves no honest request: cannot connect"):
        check_server(tmp_path / "nothing.sock", patience=0.2, recovery=0.2)


def test_a_device_type_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no device type 'toaster'"):
        check_server(tmp_path / "nothing.sock", "toaster")


def guestio(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "guestio", "check", "--vfio-user", *words],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_checks_a_server(tmp_path: Path) -> None:
    with ServingPci(Toy(), tmp_path / "server.sock") as serving:
        said = guestio(
            serving.server.path, "--only", "info", "--only", "dma", "--json", "--patience", "30"
        )
    assert said.returncode == 0, said.stdout + said.stderr
    report = json.loads(said.stdout)
    assert report["passed"]
    assert {each["id"].partition(".")[0] for each in report["results"]} == {"info", "dma"}


def test_the_command_tells_of_a_broken_server(behind: dict[str, str], tmp_path: Path) -> None:
    fault = next(fault for _, name, fault in FAULTS if name == "info.pci")
    with BrokenServer(tmp_path / "broken.sock", behind["any"], fault):
        said = guestio(str(tmp_path / "broken.sock"), "--only", "info.pci", "--patience", "30")
    assert said.returncode == 1
    assert "FAIL    info.pci" in said.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "say on which SOCKET the server listens"),
        (("x", "--device", "blk"), "no device type 'blk'"),
        (("x", "--writable"), "--writable is not for a check with --vfio-user"),
        (("x", "--front-end"), "one of --front-end, --vfio-user and --virtio-iommu"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(words: tuple[str, ...], line: str) -> None:
    said = guestio(*words)
    assert said.returncode == 2
    assert line in said.stderr
    assert said.stderr.count("\n") == 1
