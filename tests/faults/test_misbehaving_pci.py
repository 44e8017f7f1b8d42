"""A PCI function that misbehaves, over vfio-user: registers, interrupts, and the rings behind."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestio.errors import QueueError
from guestio.faults import Faults, Misbehaving, MisbehavingPci
from guestio.pci import PciDevice, VirtioPci
from guestio.testing import BlkError, ScriptedGuest
from guestio.virtio import BlockDevice
from tests.kit.vfio_client import ServingPci
from tests.kit.virtio_pci import DEVICE, PciFront, Transport

LIMIT = 30.0
CONTENT = bytes(range(256)) * 2048


@contextlib.contextmanager
def served(tmp_path: Path, *rules: str) -> Iterator[tuple[ServingPci, Faults]]:
    image = tmp_path / "disk.img"
    image.write_bytes(CONTENT)
    faults = Faults(rules)
    device = Misbehaving(BlockDevice(str(image)), faults)
    function = MisbehavingPci(VirtioPci(device), faults)
    with ServingPci(function, tmp_path / "disk.sock") as server:
        yield server, faults
    function.close()
    device.close()


@contextlib.contextmanager
def transport(server: ServingPci) -> Iterator[Transport]:
    client = server.connect()
    client.begin()
    try:
        yield Transport(client)
    finally:
        client.socket.close()


def guest(server: ServingPci, **options: object) -> ScriptedGuest:
    return ScriptedGuest(PciFront(server.server.path), **{"timeout": LIMIT, **options})  # type: ignore[arg-type]


def test_requests_and_rings_obey_the_same_rules(tmp_path: Path) -> None:
    with served(tmp_path, "error op=read sector=8", "wrong-head op=flush") as (server, faults):
        with guest(server) as driver:
            assert driver.read(0, 512) == CONTENT[:512]
            with pytest.raises(BlkError):
                driver.read(8, 512)
            with pytest.raises(QueueError):
                driver.flush()
        faults.off(2)
        assert faults.counts()[0].struck == 1
        with guest(server) as driver:
            driver.flush()


def test_a_register_is_not_reached(tmp_path: Path) -> None:
    rules = ["master-abort op=read bar=0 offset=0x12", "master-abort op=write offset=0x16"]
    with served(tmp_path, *rules) as (server, _), transport(server) as registers:
        assert registers.get("num_queues") == 0xFFFF
        assert registers.get("status") == 0
        registers.set("select", 3)
        assert registers.get("select") == 0


def test_a_register_is_read_with_a_wrong_bit(tmp_path: Path) -> None:
    with served(tmp_path, "bad-bar offset=0x12 nth=2") as (server, _), transport(server) as one:
        found = [one.get("num_queues") for _ in range(3)]
        assert found[0] == found[2] == 1
        assert (found[1] ^ 1).bit_count() == 1


def test_features_status_and_configuration_are_lies(tmp_path: Path) -> None:
    rules = ["feature-lie=40", "feature-lie=50", "config-flip offset=0-7 once"]
    with served(tmp_path, *rules) as (server, faults), transport(server) as registers:
        offered = registers.offered
        assert not offered >> 40 & 1
        assert offered >> 50 & 1
        # It is accepted, and not used.
        assert registers.accept(1 << 32 | 1 << 50)
        honest = registers.get("status")
        faults.on("status-lie=0x80")
        assert registers.get("status") == honest | 0x80
        capacity = len(CONTENT) // 512
        found = [int.from_bytes(registers.peek(DEVICE, 0, 4), "little") for _ in range(2)]
        assert (found[0] ^ capacity).bit_count() == 1
        assert found[1] == capacity


def test_the_generation_stays_as_it_was(tmp_path: Path) -> None:
    with served(tmp_path, "generation-stuck") as (server, faults), transport(server) as registers:
        seen = []
        for size in (1, 2, 3):
            os.truncate(tmp_path / "disk.img", size * 4096)
            registers.peek(DEVICE, 0, 4)
            seen.append(registers.get("generation"))
        assert len(set(seen)) == 1
        faults.off(1)
        assert registers.get("generation") != seen[0]


def test_an_interrupt_is_lost_and_the_next_comes(tmp_path: Path) -> None:
    # The driver sleeps by the time of the answer.
    with (
        served(tmp_path, "msi-lost vector=1 nth=1", "delay=50ms") as (server, faults),
        guest(server, timeout=1.0) as driver,
    ):
        began = time.monotonic()
        assert driver.read(0, 512) == CONTENT[:512]
        # It looks once more when its time is up.
        assert time.monotonic() - began >= 1.0
        assert driver.read(0, 512) == CONTENT[:512]
        found = faults.counts()[0]
        assert (found.struck, found.matched > 1) == (1, True)


def test_a_function_is_removed_and_is_back_for_the_next_client(tmp_path: Path) -> None:
    with served(tmp_path, "surprise-remove op=read offset=0x14 after=1 once") as (server, _):
        with transport(server) as registers:
            assert registers.get("status") == 0
            assert registers.get("status") == 0xFF
            assert registers.get("num_queues") == 0xFFFF
            registers.set("select", 0)
            assert registers.get("select") == 0xFFFF
        with guest(server) as driver:
            assert driver.read(0, 512) == CONTENT[:512]


def test_rules_that_are_not_for_pci_are_refused() -> None:
    class Registers(PciDevice):
        vendor_id, device_id = 0x1234, 0x5678

    with pytest.raises(ValueError, match="drop: of virtio devices only"):
        MisbehavingPci(Registers(), ["drop"])
    with pytest.raises(ValueError, match="hang-up: over vhost-user only"):
        MisbehavingPci(Registers(), ["hang-up"])
    with pytest.raises(ValueError, match="op=config: a PCI function has no 'config'"):
        MisbehavingPci(Registers(), ["master-abort op=config"])
    with pytest.raises(TypeError, match="must be a guestio PciDevice"):
        MisbehavingPci(object())  # type: ignore[arg-type]
