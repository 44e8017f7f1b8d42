"""Guests, disks and the parts they need, for every test below this directory."""

import itertools
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab import parts
from lab.guest import MIB, Guest, GuestResult, Viommu

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is a system test."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.system)
            # Guests have limits of their own, which are wide: emulated processors crawl where
            # others work too.
            item.add_marker(pytest.mark.timeout(1200))


FIGURES = "figures of a device"
COLUMNS = ("device", "IOMMU", "QEMU", "reloads", "seen", "SIGTERM s")


@pytest.fixture
def figures(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """`figures(device, viommu, qemu, reloads, seen, seconds)` is a line of the table at the end."""

    def add(
        device: str, viommu: Viommu, qemu: str, reloads: int, seen: str, seconds: float
    ) -> None:
        said = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True)
        version = re.findall(r"version ([\d.]+)", said.stdout)[0]
        row = [device, viommu.value.replace(" invalidation", ""), version, str(reloads), seen]
        record_property(FIGURES, [*row, f"{seconds:.2f}"])

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests recorded with `figures`."""
    rows = [
        row
        for report in terminalreporter.getreports("passed")
        for name, row in report.user_properties
        if name == FIGURES
    ]
    if not rows:
        return
    terminalreporter.section("devices that guests used")
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for row in (COLUMNS, *sorted(rows, key=lambda row: (row[2], row[1], row[0]))):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.line("  ".join(cells).rstrip())


@pytest.fixture(scope="session")
def guest_kernel() -> parts.Kernel:
    """The guest kernel, fetched if need be. Never skips: without it nothing here is tested."""
    return parts.kernel()


@pytest.fixture
def disk_image(tmp_path: Path) -> Callable[..., Path]:
    """`disk_image(size=64 MiB)` makes one more raw image of random bytes."""
    numbers = itertools.count()

    def make(size: int = 64 * MIB) -> Path:
        path = tmp_path / f"disk{next(numbers)}.img"
        path.write_bytes(os.urandom(size))
        return path

    return make


@pytest.fixture
def boot(tmp_path: Path, guest_kernel: parts.Kernel) -> Callable[..., GuestResult]:
    """`boot(...)` runs a `Guest(...)` to its end and fails unless every script succeeded."""
    numbers = itertools.count()

    def run(**description: Any) -> GuestResult:
        return Guest(**description).run(tmp_path / f"guest{next(numbers)}").check()

    return run
