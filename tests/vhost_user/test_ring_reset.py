"""A driver resets one queue (VIRTIO_F_RING_RESET) while the others go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from guestio.virtio.device import VIRTIO_F_RING_RESET
from tests.kit.serving import FAILED, OK, Driver, Later, Load, Mirror, Serving, until

RING_RESET = 1 << VIRTIO_F_RING_RESET


@pytest.fixture(params=[False, True], ids=["one thread", "queue threads"])
def offering(device: Later, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Serving]:
    with Serving(device, tmp_path / "socket", queue_threads=request.param, ring_reset=True) as made:
        yield made
        device.give_up()


def reset(driver: Driver, index: int, size: int, *, disable_first: bool = False) -> int:
    """Reset a queue and set it up with another size; where it had stopped.

    As virtio's driver sees it: what it had made available comes back, if at all, before the queue
    is reset, and the new ring begins with nothing.
    """
    if disable_first:
        driver.frontend.enable_queue(index, enable=False)
    stopped = driver.stop(index)
    if not disable_first:
        driver.frontend.enable_queue(index, enable=False)
    driver.size = size
    driver.add_queue(index)
    return stopped


def test_it_is_offered_only_if_asked_for(serving: Serving, tmp_path: Path) -> None:
    """QEMU up to 11.1 lets the guest have it and tells a vhost-user back-end nothing of a reset."""
    with Driver(serving.path, features=RING_RESET) as driver:
        assert not driver.frontend.offered & RING_RESET
    with (
        Serving(Mirror(), tmp_path / "another", ring_reset=True) as other,
        Driver(other.path, features=RING_RESET) as driver,
    ):
        assert driver.features & RING_RESET


@pytest.mark.parametrize("disable_first", [False, True])
@pytest.mark.parametrize("inflight", [False, True], ids=["", "noted"])
@pytest.mark.parametrize("iommu", [False, True], ids=["direct", "iommu"])
def test_one_queue_begins_anew_while_another_goes_on(
    offering: Serving, device: Later, iommu: bool, inflight: bool, disable_first: bool
) -> None:
    with Driver(
        offering.path, queues=2, features=RING_RESET, iommu=iommu, inflight=inflight
    ) as driver:
        other = Load(driver, 1)
        for turn, size in enumerate((32, 8, 64)):
            for number in range(5 + turn):
                assert driver.run(0, b"turn %d" % number)[0] == OK
            other.submit(8)
            assert reset(driver, 0, size, disable_first=disable_first) == 5 + turn
            assert driver.rings[0].used_idx == 0
            other.finish()
        assert driver.run(0, b"last") == (OK, b"tsal")
        assert other.done == other.offered
        assert not other.failed


@pytest.mark.parametrize("inflight", [False, True], ids=["", "noted"])
def test_what_the_device_holds_ends_with_the_queue(
    device: Later, tmp_path: Path, inflight: bool
) -> None:
    """Its late answer goes nowhere, least of all into the new ring."""
    with (
        Serving(device, tmp_path / "socket", ring_reset=True, stop_timeout=0.1) as serving,
        Driver(serving.path, queues=2, features=RING_RESET, inflight=inflight) as driver,
    ):
        held = driver.submit(0, b"LATE one")
        device.expect(b"LATE one")
        chain, promised = device.begun.pop(b"LATE one")
        assert reset(driver, 0, 16) == 1
        assert driver.result(0, held, 8)[0] == FAILED
        assert promised.cancelled()
        assert not chain.writable.total, "its memory is the driver's again"
        assert driver.run(0, b"new") == (OK, b"wen")
        assert driver.run(1, b"other") == (OK, b"rehto")
        assert driver.rings[0].used_idx == 1


def test_buffers_that_lack_a_translation_are_forgotten_with_the_ring(
    offering: Serving, device: Later
) -> None:
    """What was left in the old ring is not looked for in the new one."""
    with Driver(
        offering.path, queues=2, features=RING_RESET, iommu=True, map_all=False, inflight=True
    ) as driver:
        driver.submit(0, b"never mapped")
        until(lambda: offering.stats.iotlb_misses)
        reset(driver, 0, 32)
        driver.frontend.sync()
        assert driver.rings[0].used_idx == 0
        number = driver.submit(0, b"refused")
        driver.wait(0, number)
        assert driver.rings[0].used_idx == 1
        assert not any(said == b"never mapped" for _, said in device.seen)
