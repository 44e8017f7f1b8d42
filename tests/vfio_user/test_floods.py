"""Clients that send as much as they can: a turn ends, others have theirs, and nothing grows.

Turns are counted, not timed: what is handled in one of them, and whether what else was due when it
began has been done when it ends. The connection is driven by hand, so a turn is one round of the
event loop.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeAlias

import pytest

from guestio import budgets
from guestio._core.base.variant import NAME
from guestio.addr import Permissions
from guestio.peer.connection import MESSAGES_AT_A_TIME
from guestio.vfio_user.channel import Message
from guestio.vfio_user.messages import Command, HeaderFlag
from tests.kit.serving import WAIT, footprint, until
from tests.kit.vfio_client import PAGE, Client, ServingPci, Toy, memory_file
from tests.kit.vfio_model import ADDRESS, BELLS, STORE, Side
from tests.vfio_user.test_random_messages import LAYOUTS, payload_of

POSTED = int(HeaderFlag.NO_REPLY)
READ_BYTES = 100 if "tiny" in NAME else 32768
"""Bytes that the core reads at a time."""
STEP = 2 if "tiny" in NAME else budgets.DMA_UNMAP_STEP

Messages: TypeAlias = "Iterator[tuple[bytes, tuple[int, ...]]]"


def message(command: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack("<HHIII", 7, command, 16 + len(payload), flags, 0) + payload


def write(region: int, offset: int, data: bytes, flags: int = 0) -> bytes:
    payload = struct.pack("<QII", offset, region, len(data)) + data
    return message(Command.REGION_WRITE, payload, flags)


def read(region: int, offset: int, size: int) -> bytes:
    return message(Command.REGION_READ, struct.pack("<QII", offset, region, size))


def dma_map(address: int, size: int = PAGE) -> bytes:
    return message(Command.DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, address, size))


def dma_unmap(address: int, size: int = PAGE, flags: int = 0) -> bytes:
    return message(Command.DMA_UNMAP, struct.pack("<IIQQ", 24, flags, address, size))


def mapping_by_file(fd: int) -> Messages:
    for page in itertools.cycle(range(1, 100)):
        yield dma_map(page * PAGE), (fd,)
        yield dma_unmap(page * PAGE), ()


def mapping_without_file(fd: int) -> Messages:
    for page in itertools.cycle(range(1, 100)):
        yield dma_map(page * PAGE), ()
        yield dma_unmap(page * PAGE), ()


def anything(fd: int) -> Messages:
    choose = random.Random(1)
    commands = [each for each in LAYOUTS if each not in (Command.DMA_MAP, Command.DEVICE_SET_IRQS)]
    while True:
        command = choose.choice([*commands, 0, 99])
        yield message(command, payload_of(choose, command)), ()


def again(data: bytes) -> Callable[[int], Messages]:
    return lambda fd: itertools.repeat((data, ()))


FLOODS: dict[str, Callable[[int], Messages]] = {
    "posted doorbells": again(write(0, BELLS, bytes(4), POSTED)),
    "doorbells": again(write(0, BELLS, bytes(4))),
    "posted writes": again(write(0, 0x100, bytes(4), POSTED)),
    "writes of a kind": again(write(0, 0x100, bytes(64), POSTED)),
    "register reads": again(read(0, 0x100, 8)),
    "config reads": again(read(7, 0, 256)),
    "config writes": again(write(7, 4, b"\6\0")),
    "DMA by registers": again(write(0, STORE, bytes(8), POSTED)),
    "maps of a file": mapping_by_file,
    "maps of no file": mapping_without_file,
    "unmaps of nothing": again(dma_unmap(PAGE, 1 << 40)),
    "unmaps of everything": again(dma_unmap(0, 0, 2)),
    "resets": again(message(Command.DEVICE_RESET)),
    "what is refused": again(message(99)),
    "interrupts": again(message(Command.DEVICE_SET_IRQS, struct.pack("<5I", 20, 0x21, 0, 0, 0))),
    "versions": again(message(Command.VERSION, bytes(4) + b"{}")),
    "anything": anything,
}


class Flooded:
    """A side that has negotiated, and whose socket is filled with a flood again and again.

    Attributes:
        by_python: Messages that were handled by Python.
        calls: What of the loop's others was called.
    """

    def __init__(self, flood: Callable[[int], Messages]) -> None:
        self.side = Side()
        self.fd = memory_file()
        self.side.send(message(Command.VERSION, bytes(4) + b"{}"))
        self.side.send(write(7, 4, b"\6\0") + write(0, ADDRESS, bytes(8)))
        self.side.settle()
        self.side.send(dma_map(0), (self.fd,))
        self.side.settle()
        self._messages, self._left = flood(self.fd), b""
        self.by_python = 0
        self._handle = self.side.connection._handle
        self.side.connection._handle = self._count  # type: ignore[method-assign]  # to count
        self.calls: list[str] = []
        self.other = os.eventfd(0, os.EFD_NONBLOCK)
        self.side.loop.add_reader(self.other, self._called)

    def _called(self) -> None:
        os.eventfd_read(self.other)
        self.calls.append("descriptor")

    def fill(self, most: int = 3000) -> None:
        """Send as much as there is room for."""
        peer = self.side.peer
        with contextlib.suppress(BlockingIOError):
            for _ in range(most):
                if self._left:
                    peer.send(self._left)
                    self._left = b""
                data, fds = next(self._messages)
                self._left = data
                socket.send_fds(peer, [data], list(fds))
                self._left = b""

    def _count(self, message: Message) -> Any:
        self.by_python += 1
        return self._handle(message)

    @property
    def by_core(self) -> int:
        """Messages that the core has handled."""
        return self.side.stats.plain

    def close(self) -> None:
        self.side.close()
        os.close(self.fd)
        os.close(self.other)


@pytest.fixture
def flooded(request: pytest.FixtureRequest) -> Iterator[Flooded]:
    made = Flooded(FLOODS[request.param])
    yield made
    made.close()


@pytest.mark.parametrize("flooded", FLOODS, indirect=True)
@pytest.mark.parametrize("turn", [0.0, 3600.0], ids=["short turns", "long turns"])
def test_a_turn_ends_and_others_have_theirs(
    flooded: Flooded, monkeypatch: pytest.MonkeyPatch, turn: float
) -> None:
    """However long a turn may take, it is limited by a number, too; and so is one of no time."""
    for module in ("vfio_user.connection", "peer.connection"):
        monkeypatch.setattr(f"guestio.{module}.TURN_SECONDS", turn)
    flooded.side.connection._feed.__init__(  # type: ignore[misc]  # as if made with that turn
        flooded.side.connection._fed,
        turn,
        inbox=flooded.side.connection._channel.inbox,
        table=flooded.side.connection._dma.table,
        doorbells=flooded.side.host.doorbells,
        counters=flooded.side.stats.messages,
    )
    flooded.side.connection._feed_core()
    # What one round handles at most: by Python one turn, or a message, and behind each of them
    # what the core has read; by the core one read, if it has no more time.
    plain = READ_BYTES // 32 + 1
    loop = flooded.side.loop
    for _ in range(30):
        flooded.fill()
        by_python, by_core = flooded.by_python, flooded.by_core
        flooded.calls.clear()
        os.eventfd_write(flooded.other, 1)
        loop.call_later(0, lambda: flooded.calls.append("timer"))
        loop.call_soon_threadsafe(lambda: flooded.calls.append("callback"))
        loop.run_once(0)
        # Messages are looked at when they arrive, and for what is left of the last round.
        assert flooded.by_python - by_python <= (2 * MESSAGES_AT_A_TIME if turn else 2)
        if not turn:
            assert flooded.by_core - by_core <= 3 * plain
        flooded.side.answers()
        # What had no time is first in the next round.
        loop.run_once(0)
        flooded.side.answers()
        assert sorted(flooded.calls) == ["callback", "descriptor", "timer"]
    assert flooded.by_python + flooded.by_core >= 60
    assert not flooded.side.connection.closed


def test_unmaps_of_very_many_mappings_end_a_turn_each() -> None:
    """In one read there may be as many of them as there are mappings."""
    side, fd = Side(), memory_file()
    side.send(message(Command.VERSION, bytes(4) + b"{}"))
    side.settle()
    side.send(dma_map(1 << 50), (fd,))
    side.settle()
    table = side.connection._dma.table
    ((_, _, target, _),) = side.connection._dma._iotlb.overlapping(1 << 50, PAGE)
    for page in range(10 * STEP):
        assert table.add(page * PAGE, PAGE, target, Permissions.READ_WRITE)
    side.send(b"".join(dma_unmap(part * STEP * PAGE, STEP * PAGE) for part in range(10)))
    left, turns = len(side.connection._dma), 0
    while side.loop.pending:
        side.loop.run_once(0)
        # By the core, by the core when Python asks for more, and by Python.
        assert left - len(side.connection._dma) <= 3 * STEP
        left, turns = len(side.connection._dma), turns + 1
    assert left == 1
    assert turns > 3
    assert len(side.settle()) == 16 * 10
    side.close()
    os.close(fd)


class Sender:
    """Sends a flood from a thread, and reads what is answered, until it is stopped."""

    def __init__(self, client: Client, messages: Messages) -> None:
        self._socket, self._messages = client.socket, messages
        self.sent = 0
        self.stopping = False
        self._threads = [threading.Thread(target=run) for run in (self._send, self._read)]

    def _send(self) -> None:
        with contextlib.suppress(OSError):
            for data, fds in self._messages:
                if self.stopping:
                    break
                socket.send_fds(self._socket, [data], list(fds))
                self.sent += 1

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while self._socket.recv(1 << 16):
                pass

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(WAIT)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    "name", ["posted doorbells", "register reads", "maps of a file", "what is refused", "anything"]
)
def test_a_server_in_a_flood(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its timers and descriptors are heard, it says and keeps little, and can be stopped."""
    toy, fd = Toy(), memory_file()
    rung: list[float] = []
    other = os.eventfd(0, os.EFD_NONBLOCK)
    with ServingPci(toy, tmp_path / "toy.sock") as serving:
        with serving.connect() as first:
            first.begin()

        def heard() -> None:
            os.eventfd_read(other)
            rung.append(time.monotonic())

        toy.host.call_soon_threadsafe(lambda: toy.host.add_reader(other, heard))
        before = footprint()
        with serving.connect() as client:
            client.begin()
            with Sender(client, FLOODS[name](fd)) as sender:
                for count in range(1, 6):
                    at = sender.sent
                    until(lambda at=at: sender.sent > at + 100)  # type: ignore[misc]  # a lambda with defaults
                    os.eventfd_write(other, 1)
                    until(lambda count=count: len(rung) == count)  # type: ignore[misc]  # the same
        with serving.connect() as following:
            assert not following.version().error
            after = footprint()
            assert len(after[0]) <= len(before[0]) + 4
            with Sender(following, FLOODS[name](fd)) as sender:
                until(lambda: sender.sent > 100)
                serving.server.stop()
                until(lambda: not serving.serving)
        lines = [each for each in caplog.records if "guestio" in each.name]
        assert len(lines) <= 2 * budgets.LOG_LINES
    os.close(fd)
    os.close(other)


def test_answers_to_nothing_end_the_connection(tmp_path: Path) -> None:
    """A flood of them is no more than the first one."""
    toy = Toy()
    with ServingPci(toy, tmp_path / "toy.sock") as serving:
        for _ in range(20):
            with serving.connect() as client:
                client.begin()
                answer = struct.pack("<HHIII", 1, Command.DMA_READ, 36, 1, 0) + bytes(20)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    for _ in range(500):
                        client.socket.sendall(answer)
                with pytest.raises((ConnectionResetError, BrokenPipeError)):
                    client.version()
        assert serving.stats.protocol_errors == 20
        with serving.connect() as following:
            assert not following.version().error
