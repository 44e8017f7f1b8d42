"""Messages that the compiled core handles, and the Python that does the same when it does not.

Both get the same streams, hostile ones too, and must agree in everything that others can see.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from guestio.vfio_user.messages import Command, HeaderFlag
from tests.kit.serving import WAIT, nothing_left
from tests.kit.vfio_client import PAGE, memory_file
from tests.kit.vfio_model import BELLS, COUNTER, Side, run_campaign
from tests.vfio_user.test_random_messages import LAYOUTS, payload_of

BASE = 0x7000_0000
POSTED = int(HeaderFlag.NO_REPLY)
WRITTEN = 32
"""Bytes of the answer to a write, which says again where that was to, and how much."""


def message(command: int, payload: bytes = b"", flags: int = 0, number: int = 7) -> bytes:
    return struct.pack("<HHIII", number, command, 16 + len(payload), flags, 0) + payload


def write(offset: int, data: bytes, region: int = 0, flags: int = 0) -> bytes:
    payload = struct.pack("<QII", offset, region, len(data)) + data
    return message(Command.REGION_WRITE, payload, flags)


def map_payload(address: int, size: int, offset: int = 0, flags: int = 3) -> bytes:
    return struct.pack("<IIQQQ", 32, flags, offset, address, size)


def unmap_payload(address: int, size: int, flags: int = 0) -> bytes:
    return struct.pack("<IIQQ", 24, flags, address, size)


VERSION = message(Command.VERSION, bytes(4) + b"{}")


@pytest.fixture
def side() -> Iterator[Side]:
    """A connection that has negotiated, and knows a file."""
    made = Side()
    fd = memory_file()
    made.send(VERSION)
    made.send(message(Command.DMA_MAP, map_payload(1 << 40, PAGE)), (fd,))
    made.settle()
    os.close(fd)
    yield made
    made.close()


def by_core(side: Side, data: bytes, fds: tuple[int, ...] = ()) -> int:
    """How many messages of those the core handles; they are all answered."""
    before = side.stats.plain
    side.send(data, fds)
    side.settle()
    return side.stats.plain - before


def test_which_messages_are_for_the_core(side: Side) -> None:
    """Otherwise the comparison below would compare Python with itself."""
    for data, plain in (
        (write(BELLS, b"\1\0\0\0"), True),
        (write(BELLS + 2, b"\1\0", flags=POSTED), True),
        (write(BELLS + 56, bytes(8)), True),
        (write(BELLS + 2, b"\1\0\0\0"), False),  # misaligned: two accesses
        (write(BELLS, bytes(3)), False),
        (write(BELLS, bytes(16)), False),
        (write(BELLS - 4, bytes(8)), False),  # reaches into it
        (write(BELLS, b"\1\0\0\0", region=1), False),
        (write(COUNTER, bytes(4)), True),
        (write(8, bytes(8)), False),
        (write(BELLS, b""), False),
        (message(Command.REGION_WRITE, bytes(15)), False),
        (message(Command.DMA_UNMAP, unmap_payload(BASE, PAGE)), True),  # of nothing
        (message(Command.DMA_UNMAP, unmap_payload(0, 0, 2)), False),
        (message(Command.DMA_UNMAP, unmap_payload(BASE + 1, PAGE)), False),
        (message(Command.DMA_UNMAP, unmap_payload(2**64 - PAGE, PAGE)), True),
        (message(Command.DMA_UNMAP, unmap_payload(2**64 - PAGE, 2 * PAGE)), False),
        (message(Command.DMA_MAP, map_payload(BASE, PAGE)), False),  # without a file
        (message(Command.DEVICE_GET_INFO, struct.pack("<4I", 16, 0, 0, 0)), False),
    ):
        assert by_core(side, data) == plain, data.hex()
        assert by_core(side, message(Command.DMA_UNMAP, unmap_payload(BASE, PAGE))) == 1


def test_which_mappings_are_for_the_core(side: Side) -> None:
    fd, other = memory_file(), memory_file(2 * PAGE)
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)

    def core(payload: bytes, *fds: int) -> bool:
        handled = by_core(side, message(Command.DMA_MAP, payload), fds) == 1
        side.send(message(Command.DMA_UNMAP, unmap_payload(BASE, 2 * PAGE)))
        side.settle()
        return handled

    try:
        assert not core(map_payload(BASE, PAGE), fd)  # a new file
        assert core(map_payload(BASE, PAGE), fd)
        assert core(map_payload(BASE, 2 * PAGE, PAGE, flags=1), fd)
        for payload in (
            map_payload(BASE, PAGE, flags=0),
            map_payload(BASE, PAGE, flags=4),
            map_payload(BASE + 1, PAGE),
            map_payload(BASE, PAGE, 8),
            map_payload(BASE, PAGE, 1 << 20),
            map_payload(BASE, PAGE, 2**64 - PAGE),
            map_payload(1 << 40, PAGE),  # overlaps
        ):
            assert not core(payload, fd), payload.hex()
        assert not core(map_payload(BASE, PAGE), read_only)
        assert not core(map_payload(BASE, PAGE, flags=1), read_only)  # not known as such yet
        assert core(map_payload(BASE, PAGE, flags=1), read_only)
        assert not core(map_payload(BASE, PAGE), read_only)
        assert not core(map_payload(BASE, PAGE), other)
        assert not core(map_payload(BASE, PAGE), other, other)
        os.ftruncate(other, 4 * PAGE)
        assert not core(map_payload(BASE, PAGE, 3 * PAGE), other)  # beyond what is mapped of it
        assert core(map_payload(BASE, PAGE, 3 * PAGE), other)
        os.ftruncate(other, PAGE)
        assert not core(map_payload(BASE, PAGE, PAGE), other)
        assert core(map_payload(BASE, PAGE), other)
    finally:
        for each in (fd, other, read_only):
            os.close(each)


def test_an_unmap_of_memory_in_use_is_not_for_the_core(side: Side) -> None:
    fd = memory_file()
    side.send(message(Command.DMA_MAP, map_payload(BASE, PAGE)), (fd,))
    side.send(write(4, b"\6\0", region=7) + write(8, BASE.to_bytes(8, "little")) + write(32, b"\0"))
    side.settle()
    assert side.device.held is not None
    assert by_core(side, message(Command.DMA_UNMAP, unmap_payload(BASE, PAGE))) == 0
    assert side.stats.cut_off == 1
    os.close(fd)


def test_plain_messages_are_handled_before_and_behind_others(side: Side) -> None:
    data = b""
    for n in range(20):
        data += write(BELLS, n.to_bytes(4, "little"), flags=POSTED)
        data += write(BELLS, n.to_bytes(4, "little"))
        if n % 3 == 0:
            data += message(Command.REGION_READ, struct.pack("<QII", 0x100, 0, 4))
    assert by_core(side, data) == 40
    assert side.device.tails == {0: 19}


def test_descriptors_are_those_of_the_last_message_of_a_read(side: Side) -> None:
    """As many messages as there are wait when the one with a descriptor comes."""
    fd = memory_file()
    side.send(message(Command.DMA_MAP, map_payload(BASE, PAGE)), (fd,))
    side.settle()
    for n in range(1, 30):
        side.send(write(BELLS, bytes(4)))
        payload = map_payload(BASE + n * PAGE, PAGE)
        side.send(message(Command.DMA_MAP, payload, number=n), (fd,))
        side.send(write(BELLS, bytes(4)))
        side.send(message(Command.DMA_UNMAP, unmap_payload(BASE + n * PAGE, PAGE)))
    with nothing_left():
        got = side.settle()
    answers, at = [], 0
    while at < len(got):
        answers.append(struct.unpack_from("<HHIII", got, at))
        at += answers[-1][2]
    assert len(answers) == 29 * 4
    assert not any(error for *_, error in answers)
    assert [n for n, command, *_ in answers if command == Command.DMA_MAP] == [*range(1, 30)]
    os.close(fd)


def test_a_message_in_pieces(side: Side) -> None:
    fd = memory_file()
    data = message(Command.DMA_MAP, map_payload(BASE, PAGE))
    side.send(write(BELLS, bytes(4)) + write(BELLS, bytes(4))[:9])
    side.settle()
    side.send(write(BELLS, bytes(4))[9:])
    assert len(side.settle()) == WRITTEN
    side.send(data[:20], (fd,))
    assert side.settle() == b""
    side.send(data[20:] + write(BELLS, bytes(4)))
    assert len(side.settle()) == 16 + WRITTEN
    side.send(data[:20])
    side.settle()
    side.send(data[20:], (fd,))
    side.settle()
    assert side.connection.closed
    assert side.stats.protocol_errors == 1
    os.close(fd)


def test_a_client_that_does_not_read(side: Side) -> None:
    """Answers wait, nothing more is read, and all of it goes on when the client reads."""
    side.connection._channel._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sent = 0
    for _ in range(400):
        try:
            side.peer.sendall(write(BELLS, bytes(4)))
        except BlockingIOError:
            break
        sent += 1
        for _ in range(3):
            side.loop.run_once(0)
    assert side.connection._channel.backlog
    assert sent < 400
    got = b""
    while len(got) < WRITTEN * sent:
        got += side.answers()
        side.loop.run_once(0.02)
    answer = message(Command.REGION_WRITE, struct.pack("<QII", BELLS, 0, 4), HeaderFlag.REPLY)
    assert got == answer * sent


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_against_a_model_of_pages(seed: int, fast: bool, waits: bool) -> None:
    with nothing_left():
        assert run_campaign(random.Random(seed), 100, fast=fast, waits=waits) > 1000


@pytest.mark.slow
def test_against_a_model_of_pages_for_longer() -> None:
    total = sum(run_campaign(random.Random(1000 + seed), 100) for seed in range(6))
    assert total > 20_000


def streams(choose: random.Random, fds: list[int]) -> Iterator[tuple[bytes, tuple[int, ...]]]:
    """What one call of sendmsg each sends: some messages, whole or not, and descriptors."""
    for _ in range(choose.randrange(1, 60)):
        data = b""
        passed: tuple[int, ...] = ()
        for _ in range(choose.choice((1, 1, 2, 5))):
            kind = choose.randrange(8)
            flags = choose.choice((0, 0, 0, POSTED, POSTED, 0x21, 1, 2, 0x40))
            flags = flags if choose.random() < 0.01 else choose.choice((0, POSTED))
            command = choose.choice([*LAYOUTS, 0, 11, 12, 99])
            if kind < 3:
                at = BELLS + choose.randrange(-2, 18) * choose.choice((1, 2, 4))
                size = choose.choice((1, 2, 4, 4, 8, 3, 0, 9))
                data += write(at, choose.randbytes(size), choose.choice((0, 0, 0, 1, 7)), flags)
            elif kind < 5:
                page, count = choose.randrange(8), choose.randrange(1, 4)
                if choose.random() < 0.5:
                    payload = unmap_payload(page * PAGE, count * PAGE)
                    data += message(Command.DMA_UNMAP, payload, flags)
                else:
                    payload = map_payload(page * PAGE, count * PAGE, choose.randrange(3) * PAGE)
                    data += message(Command.DMA_MAP, payload, flags)
                    passed = (choose.choice(fds),) if choose.random() < 0.8 else ()
            elif command not in (Command.DEVICE_GET_REGION_INFO, Command.DEVICE_SET_IRQS):
                data += message(command, payload_of(choose, command), flags)
        if choose.random() < 0.02:
            passed = tuple(choose.choices(fds, k=choose.choice((1, 2, 17))))
        if choose.random() < 0.004:
            data = choose.randbytes(choose.randrange(1, 40))
        yield data, passed


def settle_alike(fast: Side, slow: Side) -> None:
    """Have both answer; one may need another turn of its loop, where processors are rare."""
    answers = [fast.settle(), slow.settle()]
    until = time.monotonic() + WAIT
    while answers[0] != answers[1] and time.monotonic() < until:
        for which, side in enumerate((fast, slow)):
            side.loop.run_once(0.01)
            answers[which] += side.settle()
    assert answers[0] == answers[1]


def compare_streams(choose: random.Random) -> int:
    """Give both ways the same stream; the messages that the core handled."""
    fast, slow = Side(), Side(fast=False)
    fds = [memory_file(), memory_file(PAGE), os.eventfd(0)]
    try:
        for side in (fast, slow):
            side.send(VERSION)
            side.settle()
        for data, passed in streams(choose, fds):
            if not data:
                continue
            cut = choose.choice((0, 0, choose.randrange(len(data))))
            for side in (fast, slow):
                side.send(data[: cut or len(data)], passed)
            if cut:
                if choose.random() < 0.5:
                    settle_alike(fast, slow)
                for side in (fast, slow):
                    side.send(data[cut:])
            if choose.random() < 0.7:
                settle_alike(fast, slow)
                assert seen(fast) == seen(slow)
        settle_alike(fast, slow)
        assert seen(fast) == seen(slow)
        return fast.stats.plain
    finally:
        for side in (fast, slow):
            side.close()
        for fd in fds:
            os.close(fd)


def seen(side: Side) -> dict[str, object]:
    """Everything that is visible from outside."""
    stats = side.stats
    return {
        "mappings": list(side.connection._dma._iotlb),
        "windows": [side.connection._dma.table.mappings(n) for n in range(4)],
        "maps": stats.dma_maps,
        "unmaps": stats.dma_unmaps,
        "reads": stats.region_reads,
        "writes": stats.region_writes,
        "refused": stats.refused,
        "errors": stats.protocol_errors,
        "closed": side.connection.closed,
        # What was rung for just before a client went may or may not have been served.
        "tails": None if side.connection.closed else side.device.tails,
        "registers": side.device.registers,
        "failures": side.host.failures,
    }


@pytest.mark.slow
def test_any_stream() -> None:
    with nothing_left():
        plain = sum(compare_streams(random.Random(seed)) for seed in range(60))
    assert plain > 500
