"""Servers that lie, stop in the middle, ask for what they may not have, or say nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestio import Backing
from guestio.dma import MSIX, DmaError, DmaMapRequest
from guestio.errors import DeviceError, ProtocolError
from guestio.vfio_user import Client, ServerGoneError, VfioUserTarget, answers
from guestio.vfio_user.messages import REGION_INFO, Command, HeaderFlag
from tests.kit.serving import nothing_left, until
from tests.kit.vfio_client import PAGE
from tests.kit.vfio_server import (
    CAPABILITIES,
    HEADER,
    Answer,
    Asked,
    HandServer,
    region_info,
    usual,
    version,
)
from tests.kit.waiting import Waiting

SOON = 0.2
REPLY, ERROR = int(HeaderFlag.REPLY), int(HeaderFlag.ERROR)


def capabilities(**changed: object) -> bytes:
    return version({"capabilities": {**CAPABILITIES, **changed}})


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0\0\0",
        version(major=1),
        version(minor=2),
        version(b"{"),
        version(b"[" * 4000),
        version([]),
        version({"capabilities": 5}),
        version(b"\xff\xfe"),
        capabilities(max_msg_fds=-1),
        capabilities(max_msg_fds="8"),
        capabilities(max_msg_fds=True),
        capabilities(max_msg_fds=2**64),
        capabilities(max_data_xfer_size=0),
        capabilities(max_data_xfer_size=7),
        capabilities(max_data_xfer_size=1.5),
        capabilities(pgsizes=0),
        capabilities(pgsizes=None),
        capabilities(max_dma_maps=-5),
        capabilities(write_multiple=1),
        capabilities(twin_socket={"supported": True, "fd_index": 0}),
        version(b" " * 5000),
    ],
)
def test_versions_that_cannot_be(payload: bytes) -> None:
    with nothing_left(), HandServer({Command.VERSION: lambda *_: payload}) as server:
        with pytest.raises(ServerGoneError, match="a socket is gone: "):
            server.client()
        assert [asked.command for asked in server.seen] == [Command.VERSION]


def test_what_a_server_need_not_say() -> None:
    for said in (version(b""), version(b"\0"), version({}), version({"capabilities": {}})):
        assert answers.version(said) == (1, 1, 65536, 65535, 4096, False)
    said = capabilities(
        max_msg_fds=300, max_data_xfer_size=8, pgsizes=0x201000, max_dma_maps=2, write_multiple=True
    )
    assert answers.version(said) == (1, 16, 8, 2, 4096, True)
    assert answers.version(version({"capabilities": {"migration": {}}}, minor=0))[0] == 0


SPARSE = struct.pack("<HHIII", 1, 1, 0, 1, 0) + struct.pack("<QQ", 0, PAGE)


def sparse(*areas: tuple[int, int], count: int | None = None, following: int = 0) -> bytes:
    number = len(areas) if count is None else count
    return struct.pack("<HHIII", 1, 1, following, number, 0) + b"".join(
        struct.pack("<QQ", *area) for area in areas
    )


def described(more: bytes, size: int = 4 * PAGE, at: int = 32) -> bytes:
    return region_info(0, size, 15, 32 + len(more), at) + more


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        region_info(0)[:-1],
        region_info(0) + b"1",
        region_info(1),
        region_info(0, argsz=0),
        region_info(0, argsz=31),
        region_info(0, argsz=2**32 - 1),
        region_info(0, size=2**63),
        region_info(0, size=PAGE, flags=7, offset=2**63 - PAGE),
        region_info(0, size=PAGE, flags=7, offset=2**64 - 1),
        described(sparse(), at=8),
        described(sparse(), at=2**32 - 1),
        described(sparse(count=1)),
        described(sparse(count=2**32 - 1)),
        described(sparse((0, 5 * PAGE))),
        described(sparse((2**64 - PAGE, PAGE))),
        described(sparse((PAGE, 2**64 - PAGE))),
        described(sparse((0, PAGE), following=32)),
        described(sparse((0, PAGE), following=60)),
        described(struct.pack("<HHI", 1, 1, 0)),
        described(struct.pack("<HHI", 9, 1, 33) + bytes(8)),
    ],
)
def test_regions_that_cannot_be(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        answers.region_info(payload, 0)


def test_regions_that_can_be() -> None:
    facts = answers.region_info(described(sparse((0, 100), (PAGE, 2 * PAGE + 5), (5, PAGE))), 0)
    assert facts.areas == ((PAGE, 2 * PAGE),)
    # Other capabilities are passed over.
    other = struct.pack("<HHIQ", 7, 1, 48, 0)
    facts = answers.region_info(described(other + sparse((PAGE, PAGE))), 0)
    assert facts.areas == ((PAGE, PAGE),)
    facts = answers.region_info(region_info(0, PAGE + 5, 7), 0)
    assert facts.areas == ((0, PAGE),)
    assert answers.region_info(region_info(0, 2**63 - 1), 0).areas == ()


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_or_refused(data: bytes, long: bool) -> None:
    head = struct.pack("<II", 32 + len(data), 15) if long else b""
    for read in (
        lambda: answers.version(data),
        lambda: answers.device_info(data),
        lambda: answers.region_info(head + struct.pack("<I", 0) + data, 0),
        lambda: answers.irq_info(data, 0),
        lambda: answers.io_fds(data, 0, PAGE, 1),
    ):
        with contextlib.suppress(ProtocolError):
            read()


def io_fds(*entries: tuple[int, int, int, int, int, int, int], count: int | None = None) -> bytes:
    body = b"".join(struct.pack("<QQIIIIQ", *entry) for entry in entries)
    number = len(entries) if count is None else count
    return struct.pack("<IIII", 16 + len(body), 0, 0, number) + body


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        io_fds(count=1),
        io_fds((0, 4, 0, 0, 0, 0, 0), count=2**32 - 1),
        io_fds((0, 4, 1, 0, 0, 0, 0)),
        io_fds((0, 3, 0, 0, 0, 0, 0)),
        io_fds((PAGE, 0, 0, 0, 0, 0, 0)),
        io_fds((PAGE - 3, 4, 0, 0, 0, 0, 0)),
        io_fds((2**64 - 4, 4, 0, 0, 0, 0, 0)),
        io_fds((0, 4, 0, 0, 0, 0, 0)) + b"1",
        struct.pack("<IIII", 16, 1, 0, 0),
        struct.pack("<IIII", 16, 0, 1, 0),
    ],
)
def test_doorbells_that_cannot_be(payload: bytes) -> None:
    bell = os.eventfd(0)
    special = {Command.DEVICE_GET_REGION_IO_FDS: lambda *_: Answer(payload, 0, [bell])}
    with (
        nothing_left(),
        HandServer(special) as server,
        server.client() as client,
        pytest.raises(ServerGoneError),
    ):
        client.bar(0).doorbells()
    os.close(bell)


def test_doorbells() -> None:
    bell, pipe = os.eventfd(0, os.EFD_NONBLOCK), os.pipe()
    entries = [(0, 0, 0, 0, 0, 0, 9), (8, 4, 0, 0, 1, 0, 7), (16, 4, 0, 1, 0, 0, 7)]
    answer = [Answer(io_fds(*entries), 0, [bell])]
    special = {Command.DEVICE_GET_REGION_IO_FDS: lambda *_: answer[0]}
    with nothing_left(), HandServer(special) as server, server.client() as client:
        first, second = client.bar(0).doorbells()
        assert (first.offset, first.size, first.value) == (0, 0, None)
        assert (second.offset, second.size, second.value) == (8, 4, 7)
        with first, second:
            first.ring()
            second.ring()
            assert os.eventfd_read(bell) == 2
        with pytest.raises(ValueError, match="closed"):
            first.ring()
        answer[0] = Answer(io_fds(*entries), 0, [pipe[1]])
        with pytest.raises(ServerGoneError, match="eventfd"):
            client.bar(0).doorbells()
    for fd in (bell, *pipe):
        os.close(fd)


def region_with(fds: list[int]) -> Callable[[HandServer, Asked], Answer | bytes]:
    def answer(server: HandServer, asked: Asked) -> Answer | bytes:
        (index,) = struct.unpack_from("<I", asked.payload, 8)
        return Answer(region_info(index, PAGE, 7), 0, fds) if not index else usual(server, asked)

    return answer


def test_files_of_regions_that_are_none() -> None:
    pipe, memory = os.pipe(), Backing.memfd(PAGE)
    assert memory.fd is not None
    for fds in ([pipe[0]], [memory.fd, memory.fd]):
        special = {Command.DEVICE_GET_REGION_INFO: region_with(fds)}
        with nothing_left(), HandServer(special) as server, pytest.raises(ServerGoneError):
            server.client()
    # Without a file it cannot be mapped, and one is not asked for where none is announced.
    special = {Command.DEVICE_GET_REGION_INFO: region_with([])}
    with nothing_left(), HandServer(special) as server, server.client() as client:
        assert client.bar(0).areas == ()
    for fd in pipe:
        os.close(fd)


def test_a_region_that_needs_ever_more_room() -> None:
    def answer(server: HandServer, asked: Asked) -> bytes:
        argsz, _, index = struct.unpack_from("<III", asked.payload)
        return region_info(index, argsz=argsz + 16)

    with HandServer({Command.DEVICE_GET_REGION_INFO: answer}) as server:
        with pytest.raises(ServerGoneError, match="more room each time"):
            server.client()
        assert len(server.seen) == 4


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (Command.DEVICE_GET_INFO, b""),
        (Command.DEVICE_GET_INFO, struct.pack("<IIII", 16, 1, 9, 5)),
        (Command.DEVICE_GET_INFO, struct.pack("<IIII", 16, 3, 7, 5)),
        (Command.DEVICE_GET_IRQ_INFO, b""),
        (Command.DEVICE_GET_IRQ_INFO, struct.pack("<IIII", 16, 3, 1, 0)),
        (Command.DEVICE_GET_IRQ_INFO, struct.pack("<IIII", 16, 3, 0, 4097)),
    ],
)
def test_devices_that_cannot_be(command: int, payload: bytes) -> None:
    with (
        nothing_left(),
        HandServer({command: lambda *_: payload}) as server,
        pytest.raises(ServerGoneError),
    ):
        server.client()


def test_as_many_regions_and_interrupts_as_a_server_likes() -> None:
    payload = struct.pack("<IIII", 16, 3, 2**32 - 1, 2**32 - 1)
    with HandServer({Command.DEVICE_GET_INFO: lambda *_: payload}) as server, server.client():
        assert len(server.seen) == 2 + 9 + 5


@pytest.mark.parametrize(
    "command",
    [
        Command.VERSION,
        Command.DEVICE_GET_INFO,
        Command.DEVICE_GET_REGION_INFO,
        Command.DEVICE_GET_IRQ_INFO,
    ],
)
@pytest.mark.parametrize("error", [errno.EINVAL, 0xFFFF_FFFF])
def test_a_server_that_refuses_to_say_what_it_has(command: int, error: int) -> None:
    special = {command: lambda *_: Answer(b"", error)}
    with (
        nothing_left(),
        HandServer(special) as server,
        pytest.raises(DeviceError, match="cannot be used"),
    ):
        server.client()


def test_a_refused_request_is_an_error_and_the_connection_goes_on() -> None:
    def refused(*_: object) -> Answer:
        return Answer(b"", errno.EPERM)

    commands = {
        Command.REGION_READ,
        Command.REGION_WRITE,
        Command.DEVICE_RESET,
        Command.DEVICE_SET_IRQS,
        Command.DMA_MAP,
        Command.DEVICE_GET_REGION_IO_FDS,
    }
    event, memory = os.eventfd(0), Backing.memfd(PAGE)
    request = DmaMapRequest(0, PAGE, memory.host_address, memory.fd)
    with (
        nothing_left(),
        HandServer(dict.fromkeys(commands, refused)) as server,
        server.client() as client,
    ):
        for call in (
            lambda: client.bar(0).read(0, 4),
            lambda: client.bar(0).write(0, b"1"),
            client.reset,
            lambda: client.disable_interrupts(MSIX),
            lambda: client.mask_interrupt(MSIX, 1),
            client.bar(0).doorbells,
        ):
            with pytest.raises(DeviceError, match="not permitted"):
                call()
        with pytest.raises(DmaError, match="EPERM"):
            VfioUserTarget(client).map_dma(request)
        assert not len(client._mapped)
        server.special.clear()
        client.bar(0).read(0, 4)
        VfioUserTarget(client).map_dma(request)
        server.special[Command.DMA_UNMAP] = refused
        with pytest.raises(DmaError, match="EPERM"):
            VfioUserTarget(client).unmap_dma(0, PAGE)
        # It counts as reachable, and is tried again.
        assert len(client._mapped) == 1
        server.special.clear()
        VfioUserTarget(client).unmap_dma(0, PAGE)
    os.close(event)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda asked: b"",
        lambda asked: asked.payload,
        lambda asked: asked.payload + bytes(3),
        lambda asked: asked.payload + bytes(5),
        lambda asked: bytes(20),
    ],
)
def test_reads_that_are_answered_with_something_else(wrong: Callable[[Asked], bytes]) -> None:
    special = {Command.REGION_READ: lambda _, asked: wrong(asked)}
    with nothing_left(), HandServer(special) as server, server.client() as client:
        for _ in range(2):
            with pytest.raises(ServerGoneError, match="answered with others"):
                client.bar(0).read(0, 4)


@pytest.mark.parametrize(
    "command", [Command.REGION_WRITE, Command.DEVICE_RESET, Command.DEVICE_SET_IRQS]
)
def test_answers_that_should_say_nothing(command: int) -> None:
    special = {command: lambda *_: bytes(5)}
    with (
        nothing_left(),
        HandServer(special) as server,
        server.client() as client,
        pytest.raises(ServerGoneError, match="was answered with 5 bytes"),
    ):
        if command == Command.REGION_WRITE:
            client.bar(0).write(0, b"1")
        elif command == Command.DEVICE_RESET:
            client.reset()
        else:
            client.disable_interrupts(MSIX)


def test_descriptors_where_none_belong() -> None:
    pipe = os.pipe()
    special = {Command.REGION_READ: lambda _, asked: Answer(asked.payload + b"1", 0, [pipe[1]])}
    with (
        nothing_left(),
        HandServer(special) as server,
        server.client() as client,
        pytest.raises(ServerGoneError, match="descriptors"),
    ):
        client.bar(0).read(0, 1)
    for fd in pipe:
        os.close(fd)


@pytest.mark.parametrize(
    "data",
    [
        HEADER.pack(500, Command.REGION_READ, 16, REPLY, 0),
        HEADER.pack(500, Command.REGION_READ, 16, REPLY | ERROR, 5),
        HEADER.pack(1, Command.VERSION, 16, REPLY, 0),
        HEADER.pack(1, Command.DMA_READ, 15, 0, 0),
        HEADER.pack(1, Command.DMA_WRITE, 2**32 - 1, 0, 0),
        HEADER.pack(1, Command.DMA_WRITE, 80000, 0, 0),
        HEADER.pack(1, Command.DMA_READ, 32, 2, 0),
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\xff" * 64,
    ],
)
def test_messages_that_cannot_be_followed(data: bytes) -> None:
    with nothing_left(), HandServer() as server, server.client() as client:
        server.send(data)
        until(lambda: client._life.exchange.failure is not None)
        with pytest.raises(ServerGoneError):
            client.bar(0).read(0, 4)
        with pytest.raises(ServerGoneError):
            client.bar(0).post(0, b"1")


def test_an_answer_to_another_command() -> None:
    def swap(server: HandServer, asked: Asked) -> bytes:
        server.answer(asked._replace(command=Command.REGION_WRITE), b"")
        return b""

    with (
        HandServer({Command.REGION_READ: swap}) as server,
        server.client() as client,
        pytest.raises(ServerGoneError, match="nothing waits for"),
    ):
        client.bar(0).read(0, 4)


@pytest.mark.parametrize("part", [b"", HEADER.pack(1, 9, 40, REPLY, 0)[:7], b"x" * 16 + b"yz"])
@pytest.mark.parametrize("then", ["silence", "end"])
def test_half_an_answer_or_none(part: bytes, then: str) -> None:
    def stop(server: HandServer, asked: Asked) -> None:
        head = HEADER.pack(asked.number, asked.command, 40, REPLY, 0)
        server.send(head[: len(part)] + part[16:])
        if then == "end":
            server.hang_up()

    with (
        nothing_left(),
        HandServer({Command.REGION_READ: stop}) as server,
        server.client(timeout=SOON if then == "silence" else 30) as client,
    ):
        begun = time.monotonic()
        reason = "did not answer REGION_READ" if then == "silence" else "closed the connection"
        with pytest.raises(ServerGoneError, match=reason):
            client.bar(0).read(0, 4)
        with pytest.raises(ServerGoneError, match=reason):
            client.config.read(0, 4)
        assert time.monotonic() - begun < 20


def test_everything_that_waits_ends_when_the_server_does() -> None:
    count = 5
    with (
        nothing_left(),
        HandServer({Command.REGION_READ: lambda *_: None}) as server,
        server.client() as client,
    ):
        waiting = [Waiting(lambda: client.bar(0).read(0, 4)) for _ in range(count)]
        until(lambda: sum(each.command == 9 for each in server.seen) == count)
        server.hang_up()
        for each in waiting:
            with pytest.raises(AssertionError, match="closed the connection"):
                each.end()


def test_a_server_that_does_not_read() -> None:
    stopped = threading.Event()

    def stop(server: HandServer, asked: Asked) -> None:
        stopped.wait(30)

    with HandServer({Command.DEVICE_RESET: stop}) as server:
        with server.client(timeout=SOON) as client:
            client._life.exchange.post(Command.DEVICE_RESET, b"")
            with pytest.raises(ServerGoneError, match="did not read"):
                for _ in range(100_000):
                    client.bar(0).post(0, bytes(4096))
        stopped.set()


def access(address: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<QQ", address, count) + data


def test_what_a_server_may_ask_for() -> None:
    memory, rom = Backing.memfd(2 * PAGE), Backing.anonymous(PAGE)
    view = memoryview(memory._mapping)
    with nothing_left(), HandServer() as server, server.client() as client:
        target = VfioUserTarget(client)
        target.map_dma(DmaMapRequest(0, 2 * PAGE, memory.host_address, memory.fd))
        target.map_dma(DmaMapRequest(2 * PAGE, PAGE, rom.host_address, writable=False))
        view[5:8] = b"abc"
        read, write = Command.DMA_READ, Command.DMA_WRITE
        cases: list[tuple[int, bytes, int]] = [
            (read, b"", errno.EINVAL),
            (read, access(0, 4, b"1"), errno.EINVAL),
            (read, access(3 * PAGE, 1), errno.ENODEV),
            (read, access(3 * PAGE - 1, 2), errno.ENODEV),
            (read, access(0, 65537), errno.E2BIG),
            (read, access(0, 2**64 - 1), errno.E2BIG),
            (read, access(2**64 - 1, 2), errno.EINVAL),
            (read, access(2**64 - 1, 1), errno.ENODEV),
            (write, access(0, 4, b"123"), errno.EINVAL),
            (write, access(0, 4, b"12345"), errno.EINVAL),
            (write, access(2 * PAGE, 1, b"1"), errno.EACCES),
            (write, access(2 * PAGE - 1, 2, b"12"), errno.EACCES),
            (write, access(3 * PAGE, 1, b"1"), errno.ENODEV),
            (Command.DMA_MAP, bytes(32), errno.ENOSYS),
            (Command.VERSION, b"", errno.ENOSYS),
            (0xFFFF, bytes(100), errno.ENOSYS),
        ]
        for command, payload, error in cases:
            server.ask(command, payload)
            assert server.result() == (error, b"")
        # Nothing of a write that is refused is done.
        assert view[2 * PAGE - 1] == 0
        server.ask(read, access(5, 3))
        assert server.result() == (0, access(5, 3, b"abc"))
        server.ask(read, access(2 * PAGE - 1, 2))
        assert server.result() == (0, access(2 * PAGE - 1, 2, bytes(2)))
        server.ask(read, access(77 * PAGE, 0))
        assert server.result() == (0, access(77 * PAGE, 0))
        server.ask(write, access(6, 2, b"xy"))
        assert server.result() == (0, access(6, 2))
        assert bytes(view[5:9]) == b"axy\0"
        # One that wants no answer gets none.
        server.ask(write, access(5, 1, b"z"), number=8, flags=int(HeaderFlag.NO_REPLY))
        server.ask(read, access(5, 1), number=9)
        assert server.result(9) == (0, access(5, 1, b"z"))
        assert 8 not in server.answers
        assert client.bar(0).read(0, 1) == b"\0"
        view.release()
        target.unmap_dma(0, 2 * PAGE)
        server.ask(read, access(5, 3))
        assert server.result() == (errno.ENODEV, b"")


def test_a_server_that_asks_before_it_answers() -> None:
    """Also while it is to unmap what it asks for: it may finish what it has begun."""
    memory = Backing.memfd(PAGE)
    found = []

    def answer(server: HandServer, asked: Asked) -> bytes:
        for number in range(20):
            server.ask(Command.DMA_WRITE, access(number, 1, b"%c" % (65 + number)), number)
        # The answers come to this thread, later.
        found.append(len(server.seen))
        return b""

    with (
        nothing_left(),
        HandServer({Command.DMA_UNMAP: answer}) as server,
        server.client() as client,
    ):
        target = VfioUserTarget(client)
        target.map_dma(DmaMapRequest(0, PAGE, memory.host_address, memory.fd))
        target.unmap_dma(0, PAGE)
        view = bytes(memoryview(memory._mapping)[:20])
        assert view == bytes(range(65, 85))
        assert client.served_requests == 20


def test_a_flood_of_questions_does_not_keep_the_client_from_its_work() -> None:
    done = threading.Event()
    with nothing_left(), HandServer() as server, server.client() as client:

        def flood() -> None:
            while not done.is_set():
                server.ask(Command.DMA_READ, access(0, 1))
                server.result()

        flooding = threading.Thread(target=flood)
        flooding.start()
        for _ in range(20):
            client.bar(0).read(0, 4)
        done.set()
        flooding.join()


def test_an_unmap_without_an_answer_keeps_the_memory() -> None:
    memory = Backing.memfd(PAGE)
    with (
        nothing_left(),
        HandServer({Command.DMA_UNMAP: lambda *_: None}) as server,
        server.client(timeout=SOON) as client,
    ):
        target = VfioUserTarget(client)
        target.map_dma(DmaMapRequest(0, PAGE, memory.host_address, memory.fd))
        with pytest.raises(DmaError, match="has not let go of the memory"):
            target.unmap_dma(0, PAGE)
        with pytest.raises(DmaError, match="ENOTCONN"):
            target.map_dma(DmaMapRequest(PAGE, PAGE, memory.host_address, memory.fd))
        # It is let go of when the server closes its end.
        server.hang_up()
        target.unmap_dma(0, PAGE)
        assert not len(client._mapped)


def test_a_mapping_without_an_answer_is_refused() -> None:
    memory = Backing.memfd(PAGE)
    with (
        nothing_left(),
        HandServer({Command.DMA_MAP: lambda *_: None}) as server,
        server.client(timeout=SOON) as client,
    ):
        with pytest.raises(DmaError, match="did not answer DMA_MAP"):
            VfioUserTarget(client).map_dma(DmaMapRequest(0, PAGE, memory.host_address, memory.fd))
        assert not len(client._mapped)


def test_a_server_that_takes_no_descriptors() -> None:
    memory = Backing.memfd(PAGE)
    special = {Command.VERSION: lambda *_: capabilities(max_msg_fds=0)}
    with nothing_left(), HandServer(special) as server, server.client() as client:
        VfioUserTarget(client).map_dma(DmaMapRequest(0, PAGE, memory.host_address, memory.fd))
        assert server.seen[-1].fds == []
        with pytest.raises(DeviceError, match="no descriptors"):
            client.enable_interrupts(MSIX, [0])


def test_a_server_that_maps_larger_pages() -> None:
    memory = Backing.memfd(4 * PAGE)
    special = {Command.VERSION: lambda *_: capabilities(pgsizes=4 * PAGE)}
    with HandServer(special) as server, server.client() as client:
        target = VfioUserTarget(client)
        with pytest.raises(DmaError, match="multiples of 0x4000"):
            target.map_dma(DmaMapRequest(0, PAGE, memory.host_address, memory.fd))
        target.map_dma(DmaMapRequest(0, 4 * PAGE, memory.host_address, memory.fd))


def test_messages_have_numbers_of_their_own() -> None:
    with HandServer() as server, server.client() as client:
        client._life.exchange._number = 65530
        for _ in range(10):
            client.bar(0).read(0, 1)
        assert [asked.number for asked in server.seen[-10:]] == [
            *range(65531, 65536),
            *range(5),
        ]


def test_the_whole_answer_is_asked_for_once() -> None:
    def answer(server: HandServer, asked: Asked) -> Answer | bytes:
        argsz, _, index = struct.unpack_from("<III", asked.payload)
        if index:
            return usual(server, asked)
        more = sparse((PAGE, PAGE))
        said = region_info(0, 4 * PAGE, 15, 32 + len(more), 32)
        return said if argsz < len(said + more) else Answer(said + more, 0, [memory.fd or 0])

    memory = Backing.memfd(4 * PAGE)
    with HandServer({Command.DEVICE_GET_REGION_INFO: answer}) as server, server.client() as client:
        asked = [each for each in server.seen if each.command == 5]
        assert [REGION_INFO.unpack(each.payload)[0] for each in asked[:3]] == [32, 64, 32]
        with client.bar(0).backing() as area:
            assert area.size == PAGE
            assert area.file_offset == PAGE


def test_a_server_that_hangs_up_at_once() -> None:
    with nothing_left(), HandServer() as server:
        server.hang_up()
        with pytest.raises(ServerGoneError):
            Client(server.other)
