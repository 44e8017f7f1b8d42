"""Thirty and more faults of a device, made by rules: `guestio check` finds each of them.

One disk is served all the time; rules are switched at run time, as they are by `--fault`. After
each the same checks pass, so what is found is the rule's doing and nothing of it stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from guestio.faults import Faults, Level, Misbehaving, Verdict, parse
from guestio.faults.catalogue import catalogue, select
from guestio.faults.kinds import KINDS
from guestio.faults.link import Link
from guestio.faults.runner import Target, _Run
from guestio.testing import serving
from guestio.virtio import BlockDevice

SEEDED = [
    # The device
    ("error op=write", "blk.write"),
    ("error op=read sector=1-", "blk.read-last"),
    ("error=2 op=flush", "blk.flush"),
    ("delay=8s op=flush once", "blk.flush"),
    ("drop op=get-id once", "blk.get-id"),
    ("stall op=flush once", "blk.flush"),
    ("short op=read", "blk.used-length"),
    ("corrupt op=read", "blk.read"),
    ("corrupt=2 op=get-id", "blk.get-id"),
    ("stale op=read", "split.used-length-written"),
    ("stale op=read sector=4096-", "blk.beyond-end"),
    ("stale op=write", "blk.write"),
    ("stale op=write-zeroes", "blk.write-zeroes"),
    # The ring
    ("used-length=0 op=read", "blk.used-length"),
    ("used-length op=read after=1", "split.used-length-at-most"),
    ("wrong-head after=1", "split.used-id"),
    ("duplicate-completion after=1", "split.used-once"),
    ("index-jump after=1", "split.used-once"),
    ("index-jump=200 after=1", "split.used-id"),
    ("skip-interrupt", "notify.used"),
    ("late-interrupt=8s", "notify.used"),
    ("spurious-interrupt", "notify.suppressed"),
    ("ignore-event-idx", "notify.event-idx-suppressed"),
    ("needs-reset op=flush", "blk.flush"),
    # Features, status, configuration
    ("config-flip offset=0-7", "config.constant"),
    ("feature-lie=32", "features.version-1"),
    ("feature-lie=45", "features.reserved"),
    ("feature-lie=29 every=2", "features.constant"),
    ("status-lie", "status.initial"),
    # The wire
    ("hang-up op=GET_CONFIG", "config.read"),
    ("slow=1s op=GET_QUEUE_NUM", "protocol.queue-count"),
    ("bad-reply op=GET_VRING_BASE seed=1", "ring.stop-index"),
    ("no-reply op=GET_MAX_MEM_SLOTS", "slots.count"),
    ("wrong-fds op=GET_INFLIGHT_FD", "inflight.get"),
    ("no-reply op=SET_VRING_ADDR", "ack.SET_VRING_ADDR"),
    # The IOMMU
    ("access-after-unmap", "iotlb.invalidated-not-written"),
    ("miss-storm", "iotlb.miss"),
    ("refuse", "iotlb.served"),
    ("wrong-permission", "iotlb.miss-permission"),
]
"""Rules, and a check that finds each."""

# Where the fault is that nothing comes, that is waited for.
SILENT = {
    "delay",
    "drop",
    "stall",
    "skip-interrupt",
    "late-interrupt",
    "slow",
    "no-reply",
    "refuse",
}
SILENT |= {"wrong-permission"}


class Disk:
    def __init__(self, path: str, faults: Faults) -> None:
        self.path = path
        self.faults = faults

    def examine(self, name: str, patience: float) -> tuple[Verdict, str]:
        (each,) = select(catalogue("blk"), [name])
        target = Target(self.path, None, Link)
        return _Run(target, KINDS["blk"], 0, None, patience, 10.0, writable=True).examine(each)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    image = tmp_path_factory.mktemp("seeded") / "disk.img"
    image.write_bytes(bytes(range(1, 256)) * 8224 + bytes(2 << 20))
    with image.open("r+b") as file:
        file.truncate(2 << 20)
    device = Misbehaving(BlockDevice(str(image), num_queues=2))
    with serving(device, stop_timeout=0.2) as path:
        yield Disk(path, device.faults)
    device.close()


@pytest.mark.parametrize(("rule", "name"), SEEDED)
def test_a_fault_is_found(rule: str, name: str, disk: Disk) -> None:
    silent = parse(rule).what.name in SILENT
    number = disk.faults.on(rule)
    try:
        found, reason = disk.examine(name, 0.4 if silent else 20.0)
        struck = disk.faults.counts()[0].struck
    finally:
        disk.faults.off(number)
    assert struck
    assert found in {Verdict.FAIL, Verdict.WEDGED, Verdict.CRASH}, reason
    assert disk.examine(name, 20.0)[0] in {Verdict.PASS, Verdict.REJECT}


def test_a_promised_order_is_broken_and_that_is_found(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    device = Misbehaving(BlockDevice(str(image)), ["reorder op=read every=3"])
    with serving(device, in_order=True) as path:
        found, reason = Disk(path, device.faults).examine("split.in-order", 20.0)
        assert found is Verdict.FAIL, reason
    device.close()


def test_there_are_thirty_of_every_level() -> None:
    levels = {parse(rule).what.level for rule, _ in SEEDED}
    assert levels == set(Level) - {Level.PCI, Level.PROXY}
    assert len(SEEDED) >= 30
