"""A guest under load hops between QEMUs; its memory and its disk are right each time.

`./run lab-migrate` is the campaign. These are short: two hops of one boot each.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from lab import migration
from lab.guest import MIB, Viommu
from lab.migration import MigrationError, different_pages, hops
from lab.qemu import new_qemu
from tests.kit.serving import memfd

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS = ("--migration", "local", "--num-queues", "2")


@pytest.mark.parametrize("viommu", [Viommu.NONE, Viommu.VIRTIO, Viommu.INTEL_STRICT])
@pytest.mark.parametrize("qemu", ["new", "system"])
def test_a_guest_hops_to_the_next_qemu_and_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, viommu: Viommu, qemu: str
) -> None:
    if qemu == "new":
        monkeypatch.setenv("GUESTIO_LAB_QEMU", str(new_qemu()))
    made = list(hops(viommu, 2, tmp_path, OPTIONS, queues=2))
    assert [each.different for each in made] == [0, 0]
    assert all(each.rate > 0 for each in made)


def test_pages_that_are_not_the_same_are_counted() -> None:
    one, other = memfd(MIB), memfd(MIB)
    assert different_pages(one, other, MIB) == 0
    os.pwrite(one, b"x", 0)
    os.pwrite(other, b"x", 5 * migration.PAGE - 1)
    os.pwrite(other, b"x", 5 * migration.PAGE)
    assert different_pages(one, other, MIB) == 3
    for fd in (one, other):
        os.close(fd)


def test_a_load_that_found_something_is_an_error(tmp_path: Path) -> None:
    class Told(migration.Place):
        def __init__(self, *lines: str) -> None:
            self.directory, self.log = tmp_path, tmp_path / "log"
            guest = tmp_path / "guest"
            guest.mkdir(exist_ok=True)
            for name in ("report.log", "qemu.log", "console.log"):
                (guest / name).write_text("")
            self.log.write_text("")
            self._more = list(lines)
            self._report = guest / "report.log"

        def lines(self) -> list[dict[str, int]]:
            found = super().lines()
            if self._more:
                with self._report.open("a") as report:
                    report.write(self._more.pop(0) + "\n")
            return found

    right = "LOAD ops={} bad=0 gap=3 stuck=0"
    lines = Told(right.format(1), right.format(9), "STALE block 1 generation 2").see_load(2)
    assert [line["ops"] for line in lines] == [1, 9]
    for wrong in ("LOAD ops=9 bad=1 gap=3 stuck=0", "LOAD ops=9 bad=0 gap=3 stuck=1"):
        with pytest.raises(MigrationError, match="the load found"):
            Told(right.format(1), wrong).see_load(2)
    with pytest.raises(MigrationError, match="the load found"):
        Told(right.format(5), right.format(5)).see_load(2)
