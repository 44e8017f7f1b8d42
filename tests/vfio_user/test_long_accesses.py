"""Accesses to many registers in one message: others have their turn, and all stays in order."""

from __future__ import annotations

import itertools
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestio.budgets import BAR_ACCESSES
from guestio.errors import AccessError
from guestio.pci import Bar, PciDevice, PciHost
from guestio.vfio_user.messages import Command, HeaderFlag
from tests.kit.serving import until
from tests.kit.vfio_client import PAGE, Client, ServingPci, number

ACCESS = 0.001
"""Seconds that an access of the device takes at least."""
IN_A_TURN = 2 * (10 + BAR_ACCESSES)
"""Accesses that fit into a round of the loop: twice 10 ms, when the first part is done and when it
goes on, and those under way when they are over. So others wait for 36 ms at most."""


class Slow(PciDevice):
    """Its registers hold what was written, and take their time.

    Attributes:
        accesses: Offset of each access, and whether it wrote.
        others: How many accesses there had been when another descriptor of the loop was served.
        asked: What a timer that fired amid an access found in the client's memory.
    """

    vendor_id, device_id = 0x1234, 0x5678
    bars = {0: Bar(1 << 16, width=8), 1: Bar(PAGE, width=1)}  # noqa: RUF012 - never changed

    def __init__(self) -> None:
        self.registers: dict[int, int] = {}
        self.accesses: list[tuple[int, bool]] = []
        self.others: list[int] = []
        self.asked: bytes | AccessError | None = None
        self.resets = 0
        self.pause = ACCESS
        self.at: int | None = None
        self.other = os.eventfd(1, os.EFD_NONBLOCK)

    def attached(self, host: PciHost) -> None:
        self.host = host
        # Never read, so it is there in each round of the loop.
        host.add_reader(self.other, lambda: self.others.append(len(self.accesses)))

    def reset(self) -> None:
        self.resets += 1

    def _ask(self) -> None:
        try:
            self.asked = self.host.memory.read(0, 8)
        except AccessError as error:
            self.asked = error

    def read(self, bar: int, offset: int, size: int) -> int:
        time.sleep(self.pause)
        self.accesses.append((offset, False))
        if self.at is not None and len(self.accesses) == self.at:
            self.host.call_soon_threadsafe(self._ask)
        return self.registers.get(offset, offset)

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        time.sleep(self.pause)
        self.accesses.append((offset, True))
        self.registers[offset] = value

    @property
    def most_in_a_turn(self) -> int:
        """Accesses between two rounds of the loop, at most."""
        seen = [0, *self.others, len(self.accesses)]
        return max(after - before for before, after in itertools.pairwise(seen))


@pytest.fixture
def device() -> Iterator[Slow]:
    made = Slow()
    yield made
    os.close(made.other)


@pytest.fixture
def serving(device: Slow, tmp_path: Path) -> Iterator[ServingPci]:
    with ServingPci(device, tmp_path / "slow.sock") as running:
        yield running


@pytest.fixture
def client(serving: ServingPci) -> Iterator[Client]:
    with serving.connect() as made:
        yield made.begin()


def offsets(size: int) -> bytes:
    """What is read of registers to which nothing was written."""
    return struct.pack(f"<{size // 8}Q", *range(0, size, 8))


def test_others_have_their_turn_amid_a_read(client: Client, device: Slow) -> None:
    assert client.read(0, 0, 1600) == offsets(1600)
    assert [at for at, _ in device.accesses] == list(range(0, 1600, 8))
    assert device.most_in_a_turn <= IN_A_TURN


def test_others_have_their_turn_amid_a_write(client: Client, device: Slow) -> None:
    data = os.urandom(1600)
    assert client.write(0, 64, data) == 0
    # What comes behind it waits for it.
    assert client.read(0, 64 + 1592, 8) == data[-8:]
    assert device.accesses == [*((64 + at, True) for at in range(0, 1600, 8)), (64 + 1592, False)]
    assert device.most_in_a_turn <= IN_A_TURN
    device.pause = 0
    assert client.read(0, 64, 1600) == data


def test_others_have_their_turn_amid_many_writes(client: Client, device: Slow) -> None:
    """In one message; each of those to BAR 1 is 8 accesses."""
    writes = [(at, at // 8 % 2, bytes([at // 8 % 256] * 8)) for at in range(0, 400, 8)]
    payload = struct.pack("<Q", len(writes)) + b"".join(
        struct.pack("<QII8s", at, bar, 8, data) for at, bar, data in writes
    )
    assert client.request(Command.REGION_WRITE_MULTI, payload).error == 0
    assert client.read(1, 8, 1) == b"\1"
    expected = [at + byte for at, bar, _ in writes for byte in (range(8) if bar else range(1))]
    assert device.accesses == [*((at, True) for at in expected), (8, False)]
    assert device.most_in_a_turn <= IN_A_TURN


def test_messages_behind_a_long_access_keep_their_order(client: Client, device: Slow) -> None:
    def asked(offset: int, size: int) -> bytes:
        return struct.pack("<QII", offset, 0, size)

    numbers = [
        client.send(Command.REGION_READ, asked(0, 800)),
        client.send(Command.REGION_WRITE, asked(0, 400) + bytes(400)),
        client.send(Command.REGION_READ, asked(0, 400)),
        client.send(Command.DEVICE_RESET),
        client.send(Command.DEVICE_GET_INFO, struct.pack("<4I", 16, 0, 0, 0)),
    ]
    client.send(Command.REGION_READ, asked(0, 400), flags=HeaderFlag.NO_REPLY)
    numbers.append(client.send(Command.REGION_READ, asked(800, 8)))
    replies = [client.receive() for _ in numbers]
    assert [each[0] for each in replies] == numbers
    found = [reply.payload[16:] for _, _, reply in replies]
    assert (found[0], found[2], found[5]) == (offsets(800), bytes(400), number(800))
    assert device.resets == 1


@pytest.mark.parametrize("writes", [False, True])
def test_a_client_that_goes_amid_a_long_access(
    serving: ServingPci, device: Slow, writes: bool
) -> None:
    with serving.connect() as client:
        client.begin()
        head = struct.pack("<QII", 0, 0, 65536)
        if writes:
            client.send(Command.REGION_WRITE, head + bytes(65536))
            client.receive()
        else:
            client.send(Command.REGION_READ, head)
        until(lambda: len(device.accesses) > 2 * IN_A_TURN)
        client.send(Command.DEVICE_RESET)
    # 8192 accesses take 8 s.
    began = time.monotonic()
    with serving.connect() as following:
        following.begin()
        assert following.read(0, 0, 8) == number(0)
    assert time.monotonic() - began < 4
    assert device.resets == 1


def test_a_server_is_stopped_amid_a_long_access(
    client: Client, serving: ServingPci, device: Slow
) -> None:
    client.send(Command.REGION_READ, struct.pack("<QII", 0, 0, 65536))
    until(lambda: len(device.accesses) > 2 * IN_A_TURN)
    serving.server.stop()
    until(lambda: not serving.serving)
    assert len(device.accesses) < 8192


def test_a_device_asks_the_client_amid_a_long_access(client: Client, device: Slow) -> None:
    """From a timer, while the client waits: it has its answer before it is waited for."""
    assert client.map(0, PAGE, None) == 0
    device.at = 20
    client.send(Command.REGION_READ, struct.pack("<QII", 0, 0, 800))
    asked, command, payload = client.asked()
    assert (command, payload) == (Command.DMA_READ, struct.pack("<QQ", 0, 8))
    _, answered, reply = client.receive()
    assert (answered, reply.payload[16:]) == (Command.REGION_READ, offsets(800))
    client.answer(asked, command, payload + b"memories")
    until(lambda: device.asked is not None)
    assert device.asked == b"memories"
    assert client.read(0, 8, 8) == number(8)
