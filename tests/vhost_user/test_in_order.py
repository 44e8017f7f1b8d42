"""Requests are given back in the order of the ring where the driver has accepted that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from guestio.virtio.device import VIRTIO_F_IN_ORDER
from tests.kit.serving import OK, Driver, Later, Mirror, Serving, until

IN_ORDER = 1 << VIRTIO_F_IN_ORDER


@pytest.fixture(params=[False, True], ids=["one thread", "queue threads"])
def offering(device: Later, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Serving]:
    with Serving(device, tmp_path / "socket", queue_threads=request.param, in_order=True) as made:
        yield made
        device.give_up()


def test_it_is_offered_only_if_asked_for(serving: Serving, tmp_path: Path) -> None:
    with Driver(serving.path, features=IN_ORDER) as driver:
        assert not driver.frontend.offered & IN_ORDER
        assert not driver.features & IN_ORDER
    with (
        Serving(Mirror(), tmp_path / "another", in_order=True) as other,
        Driver(other.path, features=IN_ORDER) as driver,
    ):
        assert driver.features & IN_ORDER
        assert driver.run(0, b"on") == (OK, b"no")


@pytest.mark.parametrize("iommu", [False, True], ids=["direct", "iommu"])
def test_a_slow_request_holds_up_those_behind_it_although_they_are_noted(
    offering: Serving, device: Later, iommu: bool
) -> None:
    with Driver(offering.path, features=IN_ORDER, inflight=True, iommu=iommu) as driver:
        ring = driver.rings[0]
        slow = driver.submit(0, b"LATE one")
        device.expect(b"LATE one")
        numbers = [driver.submit(0, b"quick %d" % i) for i in range(4)]
        until(lambda: len(device.seen) == 4)
        driver.frontend.sync()
        assert ring.used_idx == 0
        device.finish(b"LATE one")
        driver.wait(0, numbers[-1])
        heads = [ring.used_entry(number)[0] for number in (slow, *numbers)]
        assert heads == sorted(heads), "as the driver made them available"
        for i, number in enumerate(numbers):
            assert driver.result(0, number, 7) == (OK, b"%d kciuq" % i)


def test_without_it_those_that_are_noted_overtake(offering: Serving, device: Later) -> None:
    with Driver(offering.path, inflight=True) as driver:
        driver.submit(0, b"LATE one")
        device.expect(b"LATE one")
        driver.submit(0, b"quick")
        until(lambda: driver.rings[0].used_idx == 1)
        device.finish(b"LATE one")
        until(lambda: driver.rings[0].used_idx == 2)
