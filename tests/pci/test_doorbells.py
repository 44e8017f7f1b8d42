"""Doorbells: which writes ring them, when they serve, and what goes wrong in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from guestio import Backing
from guestio._core.pci.doorbell import Doorbells
from guestio.errors import DeviceError
from guestio.pci import Bar, CallbackDoorbell, Doorbell, EventfdDoorbell, MsiX, PciDevice, PciHost
from guestio.virtio.loop import EventLoop
from tests.kit.vfio_model import Side


class Function(PciDevice):
    vendor_id, device_id = 0x1234, 0x5678
    bars = {  # noqa: RUF012 - never changed
        0: Bar(0x4000, width=4),
        2: Bar(0x4000, memory=Backing.memfd(0x4000), areas=[(0x1000, 0x1000)]),
    }
    interrupts = 2
    capabilities = (MsiX(2, bar=0, table=0x2000, pba=0x3000),)

    def __init__(self) -> None:
        self.writes: list[tuple[int, ...]] = []

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.writes.append((bar, offset, size, value))


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    made = EventLoop()
    yield made
    made.close()


@pytest.fixture
def host(loop: EventLoop) -> PciHost:
    return PciHost(Function(), loop)


def written(host: PciHost) -> list[tuple[int, ...]]:
    assert isinstance(host.device, Function)
    return host.device.writes


def test_which_writes_ring(host: PciHost, loop: EventLoop) -> None:
    rings: list[tuple[int, ...]] = []
    host.add_doorbell(0, 0x1000, 8, CallbackDoorbell(lambda *ring: rings.append(ring)))
    host.add_doorbell(0, 0x1008, 2, CallbackDoorbell(lambda *ring: rings.append((9, *ring))))
    for at, data in (
        (0x1000, b"\1\0\0\0"),
        (0x1004, b"\2\0"),
        (0x1006, b"\3"),
        (0x0FFE, b"\4\0"),  # before
        (0x1008, b"\5\0"),
        (0x1008, b"\6\0\0\0"),  # reaches out of it
        (0x100A, b"\7\0"),  # behind
    ):
        host.write_bar(0, at, data)
    host.write_bar(2, 0x1000, b"\1\0\0\0")
    assert rings == []
    loop.run_once()
    assert rings == [(0, 4, 1), (4, 2, 2), (6, 1, 3), (9, 0, 2, 5)]
    assert written(host) == [(0, 0x0FFE, 2, 4), (0, 0x1008, 4, 6), (0, 0x100A, 2, 7)]


def test_a_wide_write_arrives_as_the_bar_takes_it(host: PciHost, loop: EventLoop) -> None:
    rings: list[tuple[int, ...]] = []
    host.add_doorbell(0, 0x1000, 8, CallbackDoorbell(lambda *ring: rings.append(ring)))
    host.write_bar(0, 0x1000, b"\1\0\0\0\2\0\0\0")
    loop.run_once()
    assert rings == [(0, 4, 1), (4, 4, 2)]


def test_several_rings_serve_once(host: PciHost, loop: EventLoop) -> None:
    counter = os.eventfd(0, os.EFD_NONBLOCK)
    host.add_doorbell(0, 0, 64, EventfdDoorbell(counter))
    for at in (0, 4, 0):
        host.write_bar(0, at, b"\1\0\0\0")
    loop.run_once()
    assert os.eventfd_read(counter) == 1
    host.write_bar(0, 0, b"\1\0\0\0")
    loop.run_once()
    assert os.eventfd_read(counter) == 1
    os.close(counter)


def test_a_removed_doorbell_serves_no_more(host: PciHost, loop: EventLoop) -> None:
    rings: list[tuple[int, ...]] = []

    def ring(*what: int) -> None:
        rings.append(what)
        host.remove_doorbell(0, 8)

    host.add_doorbell(0, 0, 4, CallbackDoorbell(ring))
    host.add_doorbell(0, 8, 4, CallbackDoorbell(ring))
    host.write_bar(0, 0, b"\1\0\0\0")
    host.write_bar(0, 8, b"\2\0\0\0")
    loop.run_once()
    assert rings == [(0, 4, 1)]
    host.write_bar(0, 8, b"\2\0\0\0")
    assert written(host) == [(0, 8, 4, 2)]
    host.write_bar(0, 0, b"\1\0\0\0")
    host.remove_doorbell(0, 0)
    loop.run_once()
    assert rings == [(0, 4, 1)]
    with pytest.raises(DeviceError, match="no doorbell"):
        host.remove_doorbell(0, 0)


def test_nothing_is_served_for_a_driver_that_is_gone(host: PciHost, loop: EventLoop) -> None:
    rings: list[tuple[int, ...]] = []
    host.add_doorbell(0, 0, 4, CallbackDoorbell(lambda *ring: rings.append(ring)))
    host.write_bar(0, 0, b"\1\0\0\0")
    host.disconnect()
    loop.run_once()
    assert rings == []


def test_a_doorbell_that_raises(host: PciHost, loop: EventLoop) -> None:
    rings: list[tuple[int, ...]] = []
    host.add_doorbell(0, 0, 4, CallbackDoorbell(lambda *_: 1 // 0))
    host.add_doorbell(0, 4, 4, CallbackDoorbell(lambda *ring: rings.append(ring)))
    for at in (0, 4):
        host.write_bar(0, at, b"\1\0\0\0")
    loop.run_once()
    assert host.failures == 1
    assert rings == [(0, 4, 1)]


def test_a_doorbell_that_refuses_leaves_it_to_the_device(host: PciHost) -> None:
    host.add_doorbell(0, 0, 4, Doorbell())
    host.write_bar(0, 0, b"\1\0\0\0")
    assert written(host) == [(0, 0, 4, 1)]


@pytest.mark.parametrize(
    ("bar", "offset", "size", "reason"),
    [
        (1, 0, 4, "no room"),
        (0, 0x3FFC, 8, "no room"),
        (0, -4, 8, "no room"),
        (0, 0, 0, "no room"),
        (0, 0x1FFC, 8, "MSI-X"),
        (0, 0x3004, 4, "MSI-X"),
        (0, 0x10C, 8, "overlaps"),
        (0, 0x0F8, 12, "overlaps"),
        (2, 0x0FFC, 8, "memory"),
    ],
)
def test_where_a_doorbell_cannot_be(
    host: PciHost, bar: int, offset: int, size: int, reason: str
) -> None:
    bell = CallbackDoorbell(print)
    host.add_doorbell(0, 0x100, 16, bell)
    host.add_doorbell(0, 0x0F0, 8, bell)
    with pytest.raises(DeviceError, match=reason):
        host.add_doorbell(bar, offset, size, bell)
    assert len(host.doorbells) == 2


def test_bad_arguments(host: PciHost) -> None:
    for wrong in (None, print, 7):
        with pytest.raises(TypeError, match="doorbell"):
            host.add_doorbell(0, 0, 4, wrong)  # type: ignore[arg-type]  # that is the test
    with pytest.raises(TypeError, match="callable"):
        CallbackDoorbell(7)  # type: ignore[arg-type]  # that is the test
    with pytest.raises((TypeError, ValueError)):
        EventfdDoorbell(-1)


def test_the_ends_of_the_address_space() -> None:
    table, rings = Doorbells(print), []
    bell = CallbackDoorbell(lambda *ring: rings.append(ring))
    table.add(0, 2**64 - 8, 8, 8, bell)
    table.add(5, 0, 1, 1, bell)
    with pytest.raises(ValueError, match="leaves"):
        table.add(0, 2**64 - 4, 8, 8, bell)
    assert table.write(0, 2**64 - 8, 8, 2**64 - 1)
    assert table.write(5, 0, 1, 1)
    for bar, at, size in ((0, 2**64 - 9, 8), (0, 2**64 - 2, 4), (5, 0, 2), (5, 1, 1), (0, 0, 0)):
        assert not table.write(bar, at, size, 1)
    assert not table.serve_rung()
    assert rings == [(0, 1, 1)]  # one doorbell, whose offsets are those of each range


def test_what_a_doorbell_asks_of_the_loop_is_not_slept_over() -> None:
    """Doorbells serve while the loop waits in the core, which knows nothing of callbacks."""
    side = Side()
    called: list[str] = []
    woken: list[bool] = []
    loop = side.loop

    class Waits:
        """Calls back from within the core's wait, as a doorbell does that enters Python."""

        def wait(self, epfd: int, seconds: float) -> tuple[list[int], list[Any], list[Any]]:
            if not woken:
                loop.call_soon_threadsafe(lambda: called.append("soon"))
                loop.set_timer("timer", 0, lambda: called.append("timer"))
            found = core.wait(epfd, seconds)
            woken.append(bool(found[0]))
            return found

    core, loop.core = loop.core, Waits()  # type: ignore[assignment]  # that is the test
    loop.run_once(5)
    for _ in range(2):
        loop.run_once(0)
    assert woken[0]
    assert called == ["soon", "timer"]
    loop.core = core
    side.close()


@pytest.mark.parametrize("how", ["reset", "disconnect"])
def test_what_was_rung_before_a_reset_is_not_served_after_it(
    host: PciHost, loop: EventLoop, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rings: list[tuple[int, ...]] = []
    monkeypatch.setattr(host.device, "reset", lambda: rings.append(()))
    host.add_doorbell(0, 0x1000, 8, CallbackDoorbell(lambda *ring: rings.append(ring)))
    host.write_bar(0, 0x1000, b"\1\0\0\0")
    host.write_bar(0, 0x1004, b"\2\0\0\0")
    getattr(host, how)()
    # What is rung then is all that is served.
    host.write_bar(0, 0x1000, b"\3\0\0\0")
    loop.run_once(0)
    assert rings == [*([(0, 4, 1), (4, 4, 2)] if how == "reset" else []), (), (0, 4, 3)]


def test_a_reset_amid_the_serving_ends_it(host: PciHost, loop: EventLoop) -> None:
    rings: list[tuple[int, ...]] = []

    def serve(*ring: int) -> None:
        rings.append(ring)
        if len(rings) == 1:
            host.reset()
            host.write_bar(0, 0x1000, b"\4\0\0\0")

    host.add_doorbell(0, 0x1000, 8, CallbackDoorbell(serve))
    host.add_doorbell(0, 0x1008, 4, CallbackDoorbell(lambda *ring: rings.append((9, *ring))))
    host.write_bar(0, 0x1000, b"\1\0\0\0")
    host.write_bar(0, 0x1004, b"\2\0\0\0")
    host.write_bar(0, 0x1008, b"\3\0\0\0")
    for _ in range(3):
        loop.run_once(0)
    assert rings == [(0, 4, 1), (0, 4, 4)]


def test_a_call_that_raises_keeps_no_other_from_its_ring(host: PciHost, loop: EventLoop) -> None:
    rings: list[int] = []

    def serve(offset: int, size: int, value: int) -> None:
        rings.append(offset)
        if not offset:
            raise RuntimeError("broken")

    host.add_doorbell(0, 0x1000, 8, CallbackDoorbell(serve))
    host.write_bar(0, 0x1000, b"\1\0\0\0")
    host.write_bar(0, 0x1004, b"\2\0\0\0")
    for _ in range(3):
        loop.run_once(0)
    assert rings == [0, 4]
    assert host.failures == 1
