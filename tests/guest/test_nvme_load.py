"""Load on an NVMe controller: the shipped one, and completions that cannot be."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestio import Backing
from guestio.errors import DeviceError
from guestio.guest._load.nvme import NvmeDriver
from guestio.guest.nvme_load import NvmeLoad
from guestio.pci import NvmeController
from tests.kit.serving import nothing_left
from tests.kit.vfio_client import PAGE, ServingPci, Toy

SIZE = 1 << 20


@pytest.fixture(params=[512, 4096])
def serving(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServingPci]:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(SIZE))
    device = NvmeController(image, block_size=request.param)
    try:
        with ServingPci(device, tmp_path / "nvme.sock") as running:
            yield running
    finally:
        device.close()


def test_reads_are_done(serving: ServingPci) -> None:
    with nothing_left(), NvmeLoad(serving.server.path, depth=8) as load:
        result = load.run(0.2)
        load.drain()
        assert load._driver is not None
        assert result.requests > 0
        assert load._driver.in_flight == 0
        assert result.doorbells >= 2
        assert 0 < result.mean_us <= result.max_us
        # What came is what is in the image: one page of it each.
        image = Path(serving.server.path).with_name("disk.img").read_bytes()
        pages = {image[at : at + PAGE] for at in range(0, SIZE, PAGE)}
        data = load._memory.size - 8 * PAGE
        for slot in range(8):
            assert load._view.read(data + slot * PAGE, PAGE) in pages


def test_writes_are_done(serving: ServingPci) -> None:
    with NvmeLoad(serving.server.path, depth=4, writes=True) as load:
        mark = b"written!" * 512
        data = load._memory.size - 4 * PAGE
        for slot in range(4):
            load._view.write(data + slot * PAGE, mark)
        load.run(0.1)
        load.drain()
    image = Path(serving.server.path).with_name("disk.img").read_bytes()
    assert any(image[at : at + PAGE] == mark for at in range(0, SIZE, PAGE))


def test_devices_that_are_no_controllers(tmp_path: Path) -> None:
    with (
        ServingPci(Toy(), tmp_path / "toy") as toy,
        nothing_left(),
        pytest.raises(DeviceError, match="no NVMe controller"),
    ):
        NvmeLoad(toy.server.path)


def test_a_server_that_ends_meanwhile(serving: ServingPci) -> None:
    with NvmeLoad(serving.server.path, depth=4) as load:
        load.run(0.05)
        serving.server.stop()
        with pytest.raises(DeviceError, match=r"gone|stalled"):
            load.run(30)


@pytest.mark.parametrize(
    ("identifier", "status", "trouble"),
    [
        (5, 0, ("command", (5, 0))),
        (0xFFFF, 0, ("command", (0xFFFF, 0))),
        (1, 0x4002, ("status", (1, 0x4002))),
    ],
)
def test_completions_that_cannot_be(
    identifier: int, status: int, trouble: tuple[str, tuple[int, int]]
) -> None:
    memory = Backing.memfd(2 * PAGE)
    view = memoryview(memory._mapping)
    ours, theirs = socket.socketpair()
    call = os.eventfd(0, os.EFD_NONBLOCK)
    there = memory.host_address
    with ours, theirs:
        driver = NvmeDriver(
            there, there + PAGE, 8, 4, 0, 10, 8, ours.fileno(), b"tail" * 2, b"head" * 2, call
        )
        assert driver.run(1_000_000)
        assert driver.in_flight == 4
        # The doorbell says four.
        assert theirs.recv(100) == b"tail\x04\0\0\0"
        view[PAGE + 12 : PAGE + 16] = identifier.to_bytes(2, "little") + (status << 1 | 1).to_bytes(
            2, "little"
        )
        assert not driver.run(1_000_000_000)
        assert driver.trouble == trouble
        # Nothing is done after that.
        assert not driver.run(1_000_000_000)
        assert driver.requests == 0
    view.release()
    os.close(call)


def test_a_controller_that_does_nothing() -> None:
    memory = Backing.memfd(2 * PAGE)
    there, call = memory.host_address, os.eventfd(0, os.EFD_NONBLOCK)
    ours, theirs = socket.socketpair()
    with ours:
        driver = NvmeDriver(
            there, there + PAGE, 8, 4, 0, 10, 8, ours.fileno(), bytes(8), bytes(8), call, timeout=1
        )
        assert not driver.run(60_000_000_000)
        assert driver.trouble is not None
        assert driver.trouble[0] == "stalled"
        theirs.close()
        for wrong in ({"entries": 1}, {"depth": 8}, {"sectors": 9}, {"tail": b""}):
            arguments = {"entries": 8, "depth": 4, "sectors": 8, "tail": bytes(8), **wrong}
            with pytest.raises(ValueError, match=r"depth|blocks|message"):
                NvmeDriver(
                    there,
                    there + PAGE,
                    arguments["entries"],
                    arguments["depth"],
                    0,
                    10,
                    arguments["sectors"],
                    0,
                    arguments["tail"],
                    bytes(8),
                    call,
                )
    os.close(call)
