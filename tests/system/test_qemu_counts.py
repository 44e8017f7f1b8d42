"""Every tool shows the numbers of QEMU's own trace and of the guest's kernel, exactly.

`./run lab-counts` does this with more requests, and prints the table.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.guest import MIB, Guest, Script, VhostUserDisk, Viommu, system_qemu, version_of
from lab.nvme import build_load
from lab.qemu import new_qemu
from tests.kit.browser import Browser, open_browser
from tests.kit.counted import check_equal, table, watched
from tests.kit.qemu_trace import qemu_counts, trace_arguments
from tests.kit.serving import until

SIZE = 16 * MIB
EACH = int(os.environ.get("GUESTIO_COUNTED_REQUESTS", "300"))
QUEUES = 2
SOURCE = Path(__file__).parents[2] / "lab" / "nowhere.c"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


def build_nowhere(directory: Path) -> bytes:
    """The program that has a device's queue lie where nothing is mapped, for a guest."""
    made = directory / "nowhere"
    words = ["gcc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", str(SOURCE), "-o", str(made)]
    subprocess.run(words, check=True)
    return made.read_bytes()


@pytest.mark.parametrize("newest", [False, True], ids=["debian", "newest"])
def test_all_tools_show_what_qemu_and_the_guest_count(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newest: bool
) -> None:
    image, trace = tmp_path / "image", tmp_path / "qemu.trace"
    image.write_bytes(os.urandom(SIZE))
    if newest:
        monkeypatch.setenv("GUESTIO_LAB_QEMU", str(new_qemu()))
    # Seen with 10.0 and 11.1, not with 7.2.
    start_fails = version_of(system_qemu()) >= (10,)
    with watched(tmp_path, browser, image, "--num-queues", str(QUEUES)) as disk:
        disk.record()
        guest = Guest(
            disks=[VhostUserDisk(disk.socket, QUEUES)],
            viommu=Viommu.VIRTIO,
            scripts=[Script.named("counted")],
            # A device whose rings are nowhere is not started by newer QEMUs, which then leave
            # unread what the back-end has asked meanwhile.
            environment={"COUNTED_EACH": str(EACH), "COUNTED_NOWHERE": str(int(not start_fails))},
            files={
                "/lab/files/disk_load": build_load(tmp_path),
                "/lab/files/nowhere": build_nowhere(tmp_path),
            },
            qemu_args=trace_arguments(trace),
            # A queue that Linux leaves alone has no used ring: newer QEMUs do not start then.
            smp=QUEUES,
            timeout=600.0,
        )
        result = guest.run(tmp_path / "guest").check()
        until(lambda: disk.control.status()["peer"] is None)
        disk.settle()
        found = disk.numbers()
    kinds = ("reads", "writes", "discards", "flushes")
    linux = {"requests": sum(int(result.facts[f"counted_{kind}"]) for kind in kinds)}
    qemu = qemu_counts(trace, QUEUES, start_fails=start_fails)
    told = {
        "misses": qemu.misses,
        "updates": qemu.updates,
        "invalidations": qemu.invalidations,
        # Each is asked for twice: at first, and again to be told why it failed.
        "refused": qemu.untranslated // 2,
    }
    columns = {"Linux": linux, "QEMU": told, **found}
    print(f"\n{table(columns)}\n{qemu}")
    check_equal(columns, {**linux, **told, "failed": 0})
    assert linux["requests"] > 2 * EACH
    assert min(qemu.misses, qemu.invalidations) > EACH
    assert (qemu.untranslated > 0) is not start_fails
    assert qemu.faults > 0
