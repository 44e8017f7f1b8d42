"""Memory that a client does not share: reached by asking it, and never while it waits."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading

import pytest

from guestio import budgets
from guestio.addr import Permissions
from guestio.errors import AccessError
from guestio.vfio_user.messages import Command, HeaderFlag
from tests.kit.serving import WAIT, promptly, until
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


def take_away(client: Client, how: str) -> None:
    """Have the device reach nothing of what it accesses; this has been answered on return."""
    if how == "unmap all":
        assert client.unmap(0, 0, 2) == 0
    elif how == "bus master":
        client.write(7, 4, b"\x02\x00")
        client.write(7, 4, b"\x06\x00")
    elif how == "reset":
        assert client.request(Command.DEVICE_RESET).error == 0
        client.write(7, 4, b"\x06\x00")
    else:
        assert client.unmap(BASE, 64 * PAGE) == 0
        if how == "remap":
            assert client.map(BASE, 64 * PAGE, None) == 0


WAYS = ["unmap", "unmap all", "remap", "bus master", "reset"]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("register", [0x28, 0x2C])
def test_what_is_taken_away_amid_an_access_is_not_asked_for(
    client: Client, toy: Toy, serving: ServingPci, register: int, how: str
) -> None:
    """A long access is several messages, and what it was allowed may end between them."""
    client.map(BASE, 64 * PAGE, None)
    client.map(1 << 40, PAGE, None)
    client.write(0, 8, number(BASE))
    failed = serving.stats.device_failures()
    client.write(0, register, number(3 * CHUNK, 4))
    sent, command, payload = client.asked()
    # What has nothing to do with it does not end it.
    assert client.unmap(1 << 40, PAGE) == 0
    client.answer(sent, command, payload + bytes(CHUNK) if register == 0x28 else payload[:16])
    sent, command, payload = client.asked()
    take_away(client, how)
    client.answer(sent, command, payload + bytes(CHUNK) if register == 0x28 else payload[:16])
    assert client.read(7, 0, 2) == b"\x34\x12"
    if register == 0x28:
        until(lambda: isinstance(toy.copied, AccessError))
    else:
        until(lambda: serving.stats.device_failures() == failed + 1)
    assert serving.stats.dma_messages == 2


@pytest.mark.parametrize("how", WAYS)
def test_what_is_taken_away_is_not_written_back(
    client: Client, toy: Toy, serving: ServingPci, how: str
) -> None:
    client.map(BASE, 64 * PAGE, None)
    client.write(0, 8, number(BASE))
    client.write(0, 0x20, number(1))
    sent, command, payload = client.asked()
    client.answer(sent, command, payload + bytes(PAGE))
    until(lambda: toy.held is not None)
    take_away(client, how)
    if toy.held is not None:
        client.write(0, 0x24, number(1))
    assert client.read(7, 0, 2) == b"\x34\x12"
    assert serving.stats.dma_messages == 1


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


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_a_client_that_is_asked_again_answers_in_any_order(
    client: Client, toy: Toy, serving: ServingPci, order: tuple[int, ...]
) -> None:
    """Another of its processors writes to a register before the first one's write has its memory.

    QEMU answers in the order in which it was asked.
    """
    client.map(BASE, PAGE, None)
    copy(client, 4)
    asked = [client.asked()]
    for length in (5, 6):
        client.post(0, 0x28, number(length))
        asked.append(client.asked())
    assert len({sent for sent, _, _ in asked}) == 3
    for place in order:
        sent, command, payload = asked[place]
        client.answer(sent, command, payload + b"abcdef"[: 4 + place])
    # The first one asked is the last one to go on.
    until(lambda: toy.copied == b"abcd")
    assert client.read(7, 0, 2) == b"\x34\x12"
    assert serving.stats.protocol_errors == 0


def test_how_often_a_client_is_asked_at_a_time(
    client: Client, toy: Toy, serving: ServingPci
) -> None:
    client.map(BASE, PAGE, None)
    client.write(0, 8, number(BASE))
    asked = []
    for _ in range(budgets.DMA_NESTED):
        client.post(0, 0x28, number(4))
        asked.append(client.asked())
    for _ in range(50):
        client.post(0, 0x28, number(4))
    until(lambda: isinstance(toy.copied, AccessError))
    for sent, command, payload in asked:
        client.answer(sent, command, payload + b"abcd")
    until(lambda: toy.copied == b"abcd")
    assert client.read(7, 0, 2) == b"\x34\x12"
    assert serving.stats.dma_messages == budgets.DMA_NESTED


class Flood:
    """Posted writes without end, in place of an answer."""

    def __init__(self, client: Client) -> None:
        self._socket = client.socket
        payload = struct.pack("<QII", 16, 0, 4) + b"abcd"
        head = struct.pack("<HHIII", 1, Command.REGION_WRITE, 36, HeaderFlag.NO_REPLY, 0)
        self._data = 100 * (head + payload)
        self._thread = threading.Thread(target=self._run, name="flood")

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._socket.sendall(self._data)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(WAIT)
        assert not self._thread.is_alive()


def test_messages_without_end_are_no_answer(
    serving: ServingPci, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guestio.vfio_user.connection.DMA_ANSWER_TIMEOUT", 0.2)
    with serving.connect() as client:
        client.begin()
        client.map(BASE, PAGE, None)
        copy(client, 4)
        client.asked()
        with Flood(client):
            until(lambda: isinstance(toy.copied, AccessError))
            # It is disconnected.
            with serving.connect() as following:
                assert not following.version().error


def test_messages_without_end_do_not_keep_a_server_from_stopping(
    client: Client, toy: Toy, serving: ServingPci
) -> None:
    client.map(BASE, PAGE, None)
    copy(client, 4)
    client.asked()
    with Flood(client), promptly(1.0):
        serving.server.stop()
        until(lambda: not serving.serving)


def test_a_device_that_goes_on_asking_is_refused_at_once(
    serving: ServingPci, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its accesses would wait as long as the first one."""
    monkeypatch.setattr("guestio.vfio_user.connection.DMA_ANSWER_TIMEOUT", 0.2)
    refused: list[str] = []

    def write(bar: int, offset: int, size: int, value: int) -> None:
        for _ in range(1000):
            with pytest.raises(AccessError) as error:
                toy.host.memory.read(BASE, 4)
            refused.append(str(error.value))

    with serving.connect() as client:
        client.begin()
        client.map(BASE, PAGE, None)
        monkeypatch.setattr(toy, "write", write)
        client.post(0, 0x28, b"\4")
        client.asked()
        until(lambda: len(refused) == 1000)
        assert "does not answer" in refused[0]
        assert all("the client is gone" in each for each in refused[1:])
    assert serving.stats.dma_messages == 1
