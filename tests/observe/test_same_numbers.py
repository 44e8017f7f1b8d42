"""Every tool shows the numbers of the load generator, exactly."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestio.guest.load import Load
from guestio.guest.plan import LoadPlan
from guestio.testing import ScriptedGuest
from tests.kit.browser import Browser, open_browser
from tests.kit.counted import check_equal, table, watched

SIZE = 8 << 20
REQUESTS, WARM_UP, FAULTS = 2000, 20, 7
NOWHERE = 0x7000_0000_0000


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


def test_all_tools_show_what_the_load_generator_counts(browser: Browser, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(SIZE))
    plan = LoadPlan(workload="randrw", depth=8, queues=2, iommu="strict")
    with watched(tmp_path, browser, image, "--num-queues", "2") as disk:
        with Load(disk.socket, plan) as load:
            # The translations of its rings are requested when a queue starts.
            load.run_requests(WARM_UP)
            disk.settle()
            disk.record()
            result = load.run_requests(REQUESTS)
            disk.settle()
        with ScriptedGuest(str(disk.socket), iommu="strict") as guest:
            for number in range(FAULTS):
                there = NOWHERE + number * 0x10000
                request = guest.submit_at(0, number, writable=[(there, 512)])
                guest.wait(request)
                assert request.status == 1
            disk.settle()
            bad = guest.frontend.iotlb.counts
        found = disk.numbers()
    expected = {
        "requests": result.requests + FAULTS,
        "failed": FAULTS,
        "misses": result.misses + bad.misses,
        "updates": result.updates + bad.updates,
        "invalidations": result.invalidations + bad.invalidations,
        # Each is asked for twice: at first, and again to be told why it failed.
        "refused": result.refused + bad.refused // 2,
    }
    columns = {"load generator": expected, **found}
    print(f"\n{table(columns)}")
    check_equal(columns, expected)
    assert result.requests == REQUESTS
    assert min(result.misses, result.invalidations) > REQUESTS
    assert expected["refused"] == FAULTS
