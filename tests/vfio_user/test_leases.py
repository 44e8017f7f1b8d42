"""Devices that hold memory on purpose: an unmap waits, to its deadline and not beyond.

What the device can still reach is looked at when the answer is about to be sent: from then on the
guest gives the memory to others.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from guestio.addr import Permissions
from guestio.pci.nvme import NvmeController
from guestio.pci.nvme.io import IoCommands
from guestio.vfio_user.connection import Connection
from guestio.vfio_user.messages import Command, HeaderFlag
from tests.kit.nvme_driver import DNR, READ, NvmeDriver, move
from tests.kit.serving import SLACK, WAIT, stalled, until
from tests.kit.vfio_client import PAGE, Client, ServingPci, Toy, memory_file, number
from tests.pci.test_virtio_pci import Toy as Virtio
from tests.pci.test_virtio_pci import driven, front

BASE = 0x7000_0000
DEADLINE = 0.3


class Answers:
    """Calls back just before a DMA_UNMAP is answered, and notes when that was."""

    def __init__(self) -> None:
        self.look: Callable[[], object] = lambda: None
        self.errors: list[BaseException] = []
        self.at: list[float] = []

    def sent(self, reply: bytes) -> None:
        command, flags = reply[2], reply[8]
        if command == Command.DMA_UNMAP and flags & HeaderFlag.REPLY:
            self.at.append(time.monotonic())
            try:
                self.look()
            except BaseException as error:
                self.errors.append(error)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    made, send = Answers(), Connection._send

    def watched(self: Connection, reply: bytes, fds: object = ()) -> bool:
        made.sent(reply)
        return send(self, reply, fds)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(Connection, "_send", watched)
    yield made
    assert not made.errors, made.errors


def test_a_device_of_ones_own(
    client: Client, toy: Toy, serving: ServingPci, answers: Answers
) -> None:
    fd = memory_file()
    os.pwrite(fd, b"\x11" * PAGE, 0)
    client.map(BASE, PAGE, fd)
    client.write(0, 8, number(BASE))
    toy.host.call_soon_threadsafe(
        lambda: setattr(toy, "held", toy.host.memory.gather(BASE, PAGE, Permissions.READ_WRITE))
    )
    until(lambda: toy.held is not None)

    def look() -> None:
        assert toy.held.read() == bytes(PAGE)
        toy.held.write(b"\x99" * PAGE)
        assert os.pread(fd, PAGE, 0) == b"\x42" + b"\x11" * (PAGE - 1)

    answers.look = look
    began, before = time.monotonic(), stalled()
    client.send(Command.DMA_UNMAP, client.unmap_payload(BASE, PAGE))
    until(lambda: serving.stats.delayed_unmaps)
    # Until the deadline all is as it was, unless it has come already on a busy machine.
    seen = toy.held.read(0, 1)
    toy.held.write(b"\x42")
    if answers.at:
        pytest.skip("the machine is too busy to look before the deadline")
    assert seen == b"\x11"
    assert client.receive()[2].error == 0
    took = answers.at[0] - began
    assert DEADLINE <= took < DEADLINE * SLACK + stalled() - before + 1
    assert (serving.stats.delayed_unmaps, serving.stats.cut_off) == (1, 1)
    toy.held.close()


def test_a_virtio_device(answers: Answers) -> None:
    """Its function gives its request up, and what the device has of it leads nowhere."""
    device = Virtio()
    with driven(device, "strict", revoke_after=DEADLINE) as driver:
        plug = front(driver)
        device.later = Future()
        buffer = driver.submit(b"abc", 3)
        until(lambda: device.held)
        writable, readable = device.held[0].writable, device.held[0].readable
        assert (writable.total, readable.read()) == (3, b"abc")
        looked = []

        def look() -> None:
            for vector in (writable, readable):
                assert vector.total == 0
                assert vector.read() == b""
            with pytest.raises(ValueError, match="3"):
                writable.write(b"xyz")
            looked.append(True)

        answers.look = look
        assert buffer.placement is not None
        began = time.monotonic()
        plug.iotlb.unmap(*buffer.placement.mapped)
        assert looked
        assert answers.at[0] - began >= DEADLINE
        assert plug.serving.stats.delayed_unmaps >= 1
        assert driver.receive().written == 0


def test_an_nvme_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds nothing while it waits for a disk: nothing is delayed, and the data goes nowhere."""
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(1 << 20))
    entered, go = threading.Event(), threading.Event()
    pread = IoCommands._pread

    def slow(self: IoCommands, *args: object) -> bytes:
        entered.set()
        assert go.wait(WAIT)
        return pread(self, *args)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(IoCommands, "_pread", slow)
    with NvmeDriver(NvmeController(image)) as driver:
        driver.enable().ready()
        driver.create(1)
        # As if the blocks were not in the page cache.
        driver.device._queues.fast = False
        page = driver.take()
        at = (page - 0x10_0000_0000) // PAGE
        os.pwrite(driver.fd, b"\x11" * PAGE, at * PAGE)
        driver.submit(1, driver.command(READ, **move(1, 0, 8, prp1=page)))
        driver.run(entered.is_set, "the disk's call")
        driver.unmap(at)
        assert not driver.dma.in_use(page, PAGE)
        go.set()
        assert driver.wait(1).status == 4 | DNR
        assert os.pread(driver.fd, PAGE, at * PAGE) == b"\x11" * PAGE
