"""The PCI device of the README, as it stands there, in real guests."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.guest import Guest, Script, VfioUserDevice, Viommu
from lab.qemu import new_qemu

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).parent / "adder_driver.c"
LIMIT = 300.0
ROUNDS = 20
SUM = sum((2654435761 * n) % 2**32 for n in range(1, 3001)) % 2**32
DIRECT_SUM = sum((2654435761 * n) % 2**32 for n in range(1, 1025)) % 2**32


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    made = tmp_path_factory.mktemp("driver") / "adder_driver"
    subprocess.run(["gcc", "-static", "-O1", "-Wall", "-Werror", DRIVER, "-o", made], check=True)
    return made.read_bytes()


class RootPort:
    """A port of PCI Express, for the device behind it in the list."""

    def arguments(self, index: int, viommu: Viommu) -> list[str]:
        return ["-device", "pcie-root-port,id=port0,chassis=1"]


EXPRESS = (
    "from guestio.pci import Msi, PciExpress, PowerManagement\n"
    "def reset(self):\n"
    "    assert not (self.address or self.count or self.total)\n"
    "    print('reset of the function')\n"
    "Adder.capabilities = [PciExpress(), PowerManagement(), Msi()]\n"
    "Adder.reset = reset\n"
)
"""The same device on PCI Express, with MSI, which says when it is reset."""


def readme_program(more: str = "") -> str:
    """The README's program, with the counters printed at its end, and ``more`` before it serves."""
    found = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    source = next(block for block in found if "class Adder" in block)
    assert len(source.splitlines()) <= 40
    serve = "guestio.serve(Adder(), sys.argv[1])\n"
    last = f'\nif __name__ == "__main__":\n    {serve}'
    assert source.endswith(last)
    counts = "print(counted, f'interrupts={counted.interrupts}')\n"
    return source.removesuffix(last) + f"{more}counted = {serve}{counts}"


@contextlib.contextmanager
def served(path: Path, log: Path, more: str = "") -> Iterator[None]:
    """The README's device, serving at a path; its counters are in its log at the end."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", readme_program(more), str(path)],
            stdout=out,
            stderr=out,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        )
    try:
        deadline = time.monotonic() + 60
        while "listening on" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
        print(log.read_text())


class Unshared(Guest):
    """A guest whose memory QEMU does not share: each access is a message."""

    def command(self, directory: Path) -> list[str]:
        words = super().command(directory)
        at = next(i for i, word in enumerate(words) if word.startswith("memory-backend-memfd,"))
        shared = words[at]
        words[at] = shared.replace("memory-backend-memfd", "memory-backend-ram")
        words[at] = words[at].removesuffix(",share=on")
        assert shared.endswith(",share=on")
        return words


@pytest.mark.parametrize(
    ("viommu", "kind"),
    [
        (Viommu.NONE, Guest),
        (Viommu.VIRTIO, Guest),
        (Viommu.INTEL_CACHING, Guest),
        (Viommu.NONE, Unshared),
        (Viommu.VIRTIO, Unshared),
    ],
    ids=lambda value: (value.name if isinstance(value, Viommu) else value.__name__).lower(),
)
def test_a_driver_in_a_guest_uses_it(
    viommu: Viommu,
    kind: type[Guest],
    driver: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GUESTIO_LAB_QEMU", str(new_qemu()))
    path, log = tmp_path / "adder.sock", tmp_path / "adder.log"
    vfio = viommu.present
    with served(path, log):
        guest = kind(
            viommu=viommu,
            devices=[VfioUserDevice(path)],
            modules=["vfio_iommu_type1", "vfio_pci"] if vfio else [],
            scripts=[Script.named("adder")],
            environment={"MODE": "vfio" if vfio else "direct"},
            files={"/lab/files/adder_driver": driver},
            append="iomem=relaxed",
            timeout=LIMIT,
        )
        result = guest.run(tmp_path / "guest").check()
    assert result.facts["sum"] == str(SUM if vfio else DIRECT_SUM)
    # What is not mapped is not reached.
    assert result.facts["unmapped"] == "0"
    assert result.facts["class"] == "0x120000"
    said = log.read_text()
    counted = {name: int(n) for name, n in re.findall(r"(\w+)=(\d+)", said)}
    assert counted["connections"] == 1
    assert counted["protocol_errors"] == counted["refused"] == counted["cut_off"] == 0
    assert bool(counted["dma_messages"]) is (kind is Unshared)
    assert counted["failed_calls"] == (1 if vfio else 0)
    assert counted["interrupts"] == ROUNDS + (1 if vfio else 0)


def test_it_is_reset_and_uses_msi_on_pci_express(
    driver: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUESTIO_LAB_QEMU", str(new_qemu()))
    path, log = tmp_path / "adder.sock", tmp_path / "adder.log"
    with served(path, log, EXPRESS):
        guest = Guest(
            viommu=Viommu.VIRTIO,
            devices=[RootPort(), VfioUserDevice(path, {"bus": "port0"})],
            modules=["vfio_iommu_type1", "vfio_pci"],
            scripts=[Script.named("adder")],
            environment={"MODE": "vfio", "RESETS": "3", "INTERRUPT": "msi"},
            files={"/lab/files/adder_driver": driver},
            timeout=LIMIT,
        )
        result = guest.run(tmp_path / "guest").check()
    assert result.facts["sum"] == str(SUM)
    assert result.facts["method"].split()[0] == "flr"
    said = log.read_text()
    resets = int(re.search(r" resets=(\d+)", said)[1])
    # The client's messages, and at least three of the function that the driver asked for.
    assert resets >= 1 + 3
    # One at first, and one for each that is counted.
    assert said.count("reset of the function") >= 1 + resets
    assert re.search(r" interrupts=(\d+)", said)[1] == str(ROUNDS + 1)
