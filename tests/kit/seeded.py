"""Every seeded fault, and whether the check that is for it finds it: a table.

    ./run seeded-faults                        all of them, and what is said of honest devices
    ./run seeded-faults --of front-end         one list: device, back-end, front-end,
                                               virtio-iommu, honest

Device faults are made by rules as of `--fault`, those of back-ends, front-ends and virtio-iommus by
copies that are changed at one place (`tests/kit/broken_*.py`). Honest devices are
those that guestio ships, over vhost-user, vfio-user and in this process; none may be FAIL, WEDGED
or CRASH. Exit status is 0 if each fault was found and no honest device is bad.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from guestio.faults import Faults, Misbehaving, Report, check, check_iommu, check_server, parse
from guestio.testing import serving
from guestio.virtio import BlockDevice
from guestio.virtio.iommu import VirtioIommu
from tests.faults import (
    test_check,
    test_check_front_end,
    test_check_iommu,
    test_check_server,
    test_finds,
    test_seeded_device_faults,
)
from tests.kit.broken_backend import BrokenBackend
from tests.kit.broken_frontend import FAULTS as BREACHES
from tests.kit.broken_iommu import FAULTS as IOMMU_FAULTS
from tests.kit.broken_iommu import RANGES, BrokenIommu
from tests.kit.vfio_client import ServingPci

BAD = {"FAIL", "WEDGED", "CRASH"}
PATIENCE = 30.0


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        fault: What was done.
        name: The check that is for it.
        verdict: What it said.
        good: Whether that is what it should say.
    """

    fault: str
    name: str
    verdict: str
    good: bool


def device(directory: Path) -> Iterator[Row]:
    """Faults by rules, of a disk that is served once."""
    image = directory / "disk.img"
    image.write_bytes(bytes(range(1, 256)) * 8224)
    with image.open("r+b") as file:
        file.truncate(2 << 20)
    disk = Misbehaving(BlockDevice(str(image), num_queues=2))
    with serving(disk, stop_timeout=0.2) as path:
        faults: Faults = disk.faults
        examined = test_seeded_device_faults.Disk(path, faults)
        for rule, name in test_seeded_device_faults.SEEDED:
            silent = parse(rule).what.name in test_seeded_device_faults.SILENT
            number = faults.on(rule)
            try:
                verdict, _ = examined.examine(name, 0.4 if silent else 20.0)
            finally:
                faults.off(number)
            yield Row(rule, name, verdict, verdict in BAD)
    disk.close()


def back_end(directory: Path) -> Iterator[Row]:
    """Copies of a back-end that are changed at one place."""
    for number, (name, faults) in enumerate(test_finds.DEFECTS):
        path = str(directory / f"{number}.sock")
        with BrokenBackend(path, *faults.split()):
            verdict = test_finds.find(path, name, faults)
        yield Row(faults, name, verdict, verdict in BAD)


def front_end(directory: Path) -> Iterator[Row]:
    """Front-ends and drivers that break one rule."""
    for number, (name, title, act) in enumerate(BREACHES):
        place = directory / str(number)
        place.mkdir()
        patience = 0.3 if name in test_check_front_end.SILENT else PATIENCE
        report = test_check_front_end.judged(place, act, patience=patience, iommu="iotlb" in name)
        verdict = report.verdicts()[name]
        yield Row(title, name, verdict, verdict in BAD)


def virtio_iommu(_directory: Path) -> Iterator[Row]:
    """Virtio-iommus that are changed at one place."""
    for name, fault in IOMMU_FAULTS:
        broken = BrokenIommu(fault, bypass=fault in {"bypass-wide", "always-bypasses"})
        verdict = test_check_iommu.find(broken, name)
        yield Row(fault, name, verdict, verdict in BAD)


def honest(directory: Path) -> Iterator[Row]:
    """What guestio ships, over each transport."""
    for name, make in test_check.HONEST.items():
        with serving(made := make(directory), indirect="on") as path:
            report = check(path, name, writable=True, patience=PATIENCE)
        made.close()
        yield _honest(f"{name} over vhost-user", report)
    for name, (kind, make_function) in test_check_server.HONEST.items():
        with ServingPci(make_function(directory), directory / f"{name}.sock") as server:
            report = check_server(server.server.path, kind, patience=PATIENCE)
        yield _honest(f"{name} over vfio-user", report)
    iommu = VirtioIommu([8, 9], **RANGES)
    yield _honest("virtio-iommu in this process", check_iommu(iommu, patience=PATIENCE))
    with serving(VirtioIommu([8, 9], **RANGES), iommu="off") as path:
        yield _honest("virtio-iommu over vhost-user", check_iommu(path, patience=PATIENCE))


def _honest(what: str, report: Report) -> Row:
    return Row(what, f"{len(report.results)} checks", report.summary, report.passed)


LISTS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "device": device,
    "back-end": back_end,
    "front-end": front_end,
    "virtio-iommu": virtio_iommu,
    "honest": honest,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables that are wanted."""
    parser = argparse.ArgumentParser(
        prog="./run seeded-faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--of", action="append", choices=LISTS, help="only this list")
    options = parser.parse_args(arguments)
    missed = 0
    for name in options.of or LISTS:
        print(f"\n### {name}\n\n| what | check | verdict |\n|---|---|---|")
        found = count = 0
        with tempfile.TemporaryDirectory(prefix="guestio-seeded-") as directory:
            for row in LISTS[name](Path(directory)):
                print(f"| `{row.fault}` | `{row.name}` | {row.verdict} |", flush=True)
                count += 1
                found += row.good
        print(f"\n{found} of {count} as they should be")
        missed += count - found
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
