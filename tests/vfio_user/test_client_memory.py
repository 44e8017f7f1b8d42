"""Memory that a client does not share: reached by asking it, and never while it waits."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from guestio.addr import Permissions
from guestio.errors import AccessError
from guestio.vfio_user.messages import Command
from tests.kit.serving import promptly, until
from tests.kit.vfio_client import PAGE, Client, ServingPci, Toy, memory_file, number

BASE = 0x7000_0000
CHUNK = 65536


def copy(client: Client, size: int, address: int = BASE) -> None:
    """Have the toy read memory."""
    client.write(0, 8, number(address))
    assert client.write(0, 0x28, number(size, 4)) == 0


def test_reads(client: Client, toy: Toy, serving: ServingPci) -> None:
    assert client.map(BASE, 64 * PAGE, None) == 0
    data = os.urandom(CHUNK + 1000)
    copy(client, len(data))
    for start in (0, CHUNK):
        sent, command, payload = client.asked()
        address, size = struct.unpack("<QQ", payload)
        assert (command, address) == (Command.DMA_READ, BASE + start)
        client.answer(sent, command, payload + data[start : start + size])
    until(lambda: toy.copied == data)
    assert serving.stats.dma_messages == 2
    assert toy.host.memory.check_range(BASE, 64 * PAGE, Permissions.WRITE)
    assert serving.stats.dma_messages == 2


def test_writes(client: Client) -> None:
    client.map(BASE, 64 * PAGE, None)
    client.write(0, 8, number(BASE + 1))
    client.write(0, 0x2C, number(CHUNK + 5, 4))
    written = b""
    for start in (0, CHUNK):
        sent, command, payload = client.asked()
        address, size = struct.unpack_from("<QQ", payload)
        assert (command, address, size) == (Command.DMA_WRITE, BASE + 1 + start, len(payload) - 16)
        written += payload[16:]
        client.answer(sent, command, payload[:16])
    assert written == bytes(n % 251 for n in range(CHUNK + 5))


def test_a_part_is_written_back_with_what_was_there(client: Client, toy: Toy) -> None:
    """A vector may be written to in part, so the rest is read before."""
    client.map(BASE, PAGE, None)
    client.write(0, 8, number(BASE))
    client.write(0, 0x20, number(1))
    sent, command, payload = client.asked()
    assert command == Command.DMA_READ
    client.answer(sent, command, payload + b"\x11" * PAGE)
    until(lambda: toy.held is not None)
    toy.held.write(b"\x22", 5)
    client.write(0, 0x24, number(1))
    sent, command, payload = client.asked()
    assert command == Command.DMA_WRITE
    assert payload[16:] == b"\x11" * 5 + b"\x22" + b"\x11" * (PAGE - 6)
    client.answer(sent, command, payload[:16])


def test_the_client_is_served_before_it_answers(client: Client, toy: Toy) -> None:
    client.map(BASE, PAGE, None)
    fd = memory_file()
    copy(client, 4)
    sent, command, payload = client.asked()
    assert client.map(BASE + PAGE, PAGE, fd) == 0
    assert client.write(0, 0x100, number(7)) == 0
    assert client.read(0, 0x100, 8) == number(7)
    assert client.unmap(BASE + PAGE, PAGE) == 0
    client.answer(sent, command, payload + b"1234")
    until(lambda: toy.copied == b"1234")


def test_not_while_the_client_waits(client: Client, serving: ServingPci) -> None:
    client.map(BASE, PAGE, None)
    client.write(0, 8, number(BASE))
    # The toy's register 0 reads memory: the client would wait for the answer, and not serve.
    assert client.read(0, 0, 1) == b"\xff"
    assert serving.stats.failed_calls == 1


def test_not_from_another_thread(client: Client, toy: Toy) -> None:
    client.map(BASE, PAGE, None)
    with pytest.raises(AccessError, match="thread"):
        toy.host.memory.read(BASE, 1)


@pytest.mark.parametrize("error", [errno.ENODEV, errno.E2BIG, 12345])
def test_a_client_that_refuses(client: Client, toy: Toy, error: int) -> None:
    client.map(BASE, PAGE, None)
    copy(client, 4)
    sent, command, _ = client.asked()
    client.answer(sent, command, error=error)
    until(lambda: isinstance(toy.copied, AccessError))
    assert client.read(7, 0, 2) == b"\x34\x12"


@pytest.mark.parametrize(
    "wrong", [b"", bytes(16), struct.pack("<QQ", BASE, 4) + bytes(5), bytes(20)]
)
def test_an_answer_that_is_none(client: Client, toy: Toy, wrong: bytes) -> None:
    client.map(BASE, PAGE, None)
    copy(client, 4)
    sent, command, _ = client.asked()
    client.answer(sent, command, wrong)
    until(lambda: isinstance(toy.copied, AccessError))
    assert client.read(7, 0, 2) == b"\x34\x12"


def test_an_answer_to_something_else(serving: ServingPci, toy: Toy) -> None:
    with serving.connect() as client:
        client.begin()
        client.map(BASE, PAGE, None)
        copy(client, 4)
        sent, command, payload = client.asked()
        client.answer(sent + 1, command, payload + b"1234")
        until(lambda: isinstance(toy.copied, AccessError))
    with serving.connect() as following:
        assert not following.version().error
    assert serving.stats.protocol_errors == 1


def test_a_client_that_goes_instead(serving: ServingPci, toy: Toy) -> None:
    with serving.connect() as client:
        client.begin()
        client.map(BASE, PAGE, None)
        copy(client, 4)
        client.asked()
    until(lambda: isinstance(toy.copied, AccessError))
    with serving.connect() as following:
        assert not following.version().error


def test_a_client_that_does_not_answer(
    serving: ServingPci, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guestio.vfio_user.connection.DMA_ANSWER_TIMEOUT", 0.2)
    with serving.connect() as client:
        client.begin()
        client.map(BASE, PAGE, None)
        copy(client, 4)
        client.asked()
        until(lambda: isinstance(toy.copied, AccessError))
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            client.receive_any()
    with serving.connect() as following:
        assert not following.version().error


def test_too_much_at_once(client: Client, toy: Toy) -> None:
    client.map(BASE, 1 << 25, None)
    assert client.map(1 << 50, 1 << 48, None) == errno.EINVAL
    copy(client, (1 << 24) + 1)
    until(lambda: isinstance(toy.copied, AccessError))


def test_a_server_that_stops_does_not_wait_for_an_answer(
    client: Client, toy: Toy, serving: ServingPci
) -> None:
    client.map(BASE, PAGE, None)
    copy(client, 4)
    client.asked()
    with promptly(1.0):
        serving.server.stop()
        until(lambda: not serving.serving)
