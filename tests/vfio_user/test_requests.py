"""Each request of a client, in order and out of order: answered, and the next one is served."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import struct
import threading
from pathlib import Path

import pytest

from guestio.pci import Bar, CallbackDoorbell, PciExpress
from guestio.vfio_user.messages import HEADER_SIZE, Command, HeaderFlag, IrqSet
from tests.kit.serving import WAIT, nothing_left, until
from tests.kit.vfio_client import PAGE, Client, ServingPci, Toy, memory_file, number

NONE, BOOL, EVENTFD = IrqSet.DATA_NONE, IrqSet.DATA_BOOL, IrqSet.DATA_EVENTFD
MASK, UNMASK, TRIGGER = IrqSet.MASK, IrqSet.UNMASK, IrqSet.TRIGGER
INTX, MSI, MSIX = 0, 1, 2


def test_version(serving: ServingPci) -> None:
    with serving.connect() as client:
        reply = client.version(minor=7)
        assert struct.unpack_from("<HH", reply.payload) == (0, 1)
        said = json.loads(reply.payload[4:-1])["capabilities"]
        # Nothing that the client did not propose.
        assert said == {"max_msg_fds": 16, "max_data_xfer_size": 65536}
        assert client.version().error == errno.EINVAL


def test_all_that_a_client_proposes_is_answered(serving: ServingPci) -> None:
    proposed = ("write_multiple", "pgsizes", "max_msg_fds", "migration", "max_dma_maps", "unheard")
    with serving.connect() as client:
        names = dict.fromkeys(proposed, 0) | {"max_data_xfer_size": 1 << 20}
        reply = client.version(data=json.dumps({"capabilities": names}).encode())
        assert json.loads(reply.payload[4:-1])["capabilities"] == {
            "max_msg_fds": 16,
            "max_data_xfer_size": 65536,
            "pgsizes": 4096,
            "write_multiple": True,
        }


QEMU_VERSION_BYTES = 214
"""Of QEMU's request with its header; it has no more room for the answer."""


@pytest.mark.parametrize("data", [b"", b"{}", b'{"capabilities":{}}'])
def test_a_client_that_proposes_nothing_learns_the_limits(serving: ServingPci, data: bytes) -> None:
    """The one that is lower than what holds for a server that names none."""
    with serving.connect() as client:
        reply = client.version(data=data)
        assert not reply.error
        said = json.loads(reply.payload[4:-1])["capabilities"]
        assert said == {"max_data_xfer_size": 65536}
        assert HEADER_SIZE + len(reply.payload) <= QEMU_VERSION_BYTES


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0\0",
        b"\0\0\0\0no json\0",
        b"\0\0\0\0[1]\0",
        b'\0\0\0\0{"capabilities":3}\0',
        b"\0\0\0\0" + b"[" * 4000,
        b"\0\0\0\0" + b" " * 5000,
        b"\0\0\0\0\xff\xfe\0",
        b'\0\0\0\0{"capabilities":{"max_msg_fds":-1}}\0',
        b'\0\0\0\0{"capabilities":{"max_msg_fds":"16"}}\0',
        b'\0\0\0\0{"capabilities":{"max_data_xfer_size":1.5}}\0',
        b'\0\0\0\0{"capabilities":{"pgsizes":true}}\0',
    ],
)
def test_a_version_that_is_none(serving: ServingPci, payload: bytes) -> None:
    with serving.connect() as client:
        assert client.request(Command.VERSION, payload).error == errno.EINVAL
        assert not client.version().error


@pytest.mark.parametrize(
    ("command", "question"),
    [
        (Command.DEVICE_GET_INFO, struct.pack("<IIII", 16, 0, 0, 0)),
        (Command.DEVICE_GET_REGION_INFO, struct.pack("<IIIIQQ", 80, 0, 0, 0, 0, 0)),
        (Command.DEVICE_GET_REGION_IO_FDS, struct.pack("<IIII", 80, 0, 0, 0)),
        (Command.DEVICE_GET_IRQ_INFO, struct.pack("<IIII", 16, 0, 0, 0)),
    ],
)
def test_a_question_may_be_as_long_as_its_answer(
    serving: ServingPci, command: int, question: bytes
) -> None:
    """As libvfio-user's client asks."""
    with serving.connect() as client:
        client.version()
        reply, longer = (
            client.request(command, question),
            client.request(command, question[:].ljust(80, b"\0")),
        )
        assert not reply.error
        assert longer.payload == reply.payload
        assert client.request(command, question[:-1]).error == errno.EINVAL


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (Command.DMA_MAP, struct.pack("<IIQQQ", 31, 3, 0, PAGE, PAGE)),
        (Command.DMA_UNMAP, struct.pack("<IIQQ", 23, 0, PAGE, PAGE)),
        (Command.DEVICE_SET_IRQS, struct.pack("<IIIII", 19, 0x21, 2, 0, 0)),
    ],
)
def test_no_room_for_an_answer(serving: ServingPci, command: int, payload: bytes) -> None:
    with serving.connect() as client:
        client.version()
        assert client.request(command, payload).error == errno.EINVAL


def test_a_write_says_again_where_it_was_to(serving: ServingPci) -> None:
    with serving.connect() as client:
        client.version()
        payload = struct.pack("<QII", 4, 7, 2) + b"\6\0"
        assert client.request(Command.REGION_WRITE, payload).payload == payload[:16]


def test_another_major_version(serving: ServingPci) -> None:
    with serving.connect() as client:
        payload = struct.pack("<HH", 1, 0)
        assert client.request(Command.VERSION, payload).error == errno.ENOTSUP
        assert not client.version().error


def test_device_info(client: Client) -> None:
    reply = client.request(Command.DEVICE_GET_INFO, struct.pack("<IIII", 16, 0, 0, 0))
    assert struct.unpack("<IIII", reply.payload) == (16, 3, 9, 5)
    short = struct.pack("<IIII", 15, 0, 0, 0)
    assert client.request(Command.DEVICE_GET_INFO, short).error == errno.EINVAL
    assert client.request(Command.DEVICE_GET_INFO, b"").error == errno.EINVAL


def test_region_info(client: Client) -> None:
    sizes = {}
    for region in range(9):
        asked = struct.pack("<IIIIQQ", 32, 0, region, 0, 0, 0)
        reply = client.request(Command.DEVICE_GET_REGION_INFO, asked)
        argsz, flags, index, at, size, offset = struct.unpack("<IIIIQQ", reply.payload)
        assert (argsz, flags, index, at, offset) == (32, 3 if size else 0, region, 0, 0)
        assert not reply.fds
        sizes[region] = size
    # The BAR of MSI-X is the first that is free.
    assert sizes == {0: PAGE, 1: 2 * PAGE, 2: 0, 3: 0, 4: 0, 5: 0, 6: 0, 7: 256, 8: 0}
    for argsz, region in ((32, 9), (32, 2**32 - 1), (31, 0)):
        asked = struct.pack("<IIIIQQ", argsz, 0, region, 0, 0, 0)
        assert client.request(Command.DEVICE_GET_REGION_INFO, asked).error == errno.EINVAL


def test_no_descriptors_of_regions(client: Client) -> None:
    asked = struct.pack("<IIII", 16, 0, 0, 0)
    reply = client.request(Command.DEVICE_GET_REGION_IO_FDS, asked)
    assert struct.unpack("<IIII", reply.payload) == (16, 0, 0, 0)
    asked = struct.pack("<IIII", 16, 0, 9, 0)
    assert client.request(Command.DEVICE_GET_REGION_IO_FDS, asked).error == errno.EINVAL


def test_irq_info(client: Client) -> None:
    found = []
    for kind in range(5):
        asked = struct.pack("<IIII", 16, 0, kind, 0)
        reply = client.request(Command.DEVICE_GET_IRQ_INFO, asked)
        argsz, flags, index, count = struct.unpack("<IIII", reply.payload)
        assert (argsz, index) == (16, kind)
        found.append((count, flags))
    assert found == [(1, 7), (0, 0), (4, 3), (1, 1), (1, 1)]
    asked = struct.pack("<IIII", 16, 0, 5, 0)
    assert client.request(Command.DEVICE_GET_IRQ_INFO, asked).error == errno.EINVAL


def raised(event: int) -> int:
    """How often an eventfd was signalled since the last look."""
    try:
        return os.eventfd_read(event)
    except BlockingIOError:
        return 0


def event() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def interrupt(client: Client, vector: int) -> None:
    """Have the toy raise a vector; its effect is there when this returns."""
    client.write(0, 0x30, number(vector))
    client.read(0, 0x40, 1)


def test_interrupts_go_to_their_eventfds(client: Client) -> None:
    events = [event() for _ in range(4)]
    assert client.triggers(MSIX, 0, events) == 0
    for vector in (0, 3, 3):
        interrupt(client, vector)
    assert [raised(each) for each in events] == [1, 0, 0, 2]


def test_an_interrupt_without_an_eventfd_is_kept_until_there_is_one(client: Client) -> None:
    first, second = event(), event()
    client.triggers(MSIX, 0, [first])
    # A client that enables one vector more takes all away for a moment.
    assert client.set_irqs(NONE | TRIGGER, MSIX, 0, 0) == 0
    interrupt(client, 0)
    interrupt(client, 1)
    assert raised(first) == 0
    client.triggers(MSIX, 0, [first, second])
    assert (raised(first), raised(second)) == (1, 1)
    # Without descriptors the named vectors have none any more.
    assert client.set_irqs(EVENTFD | TRIGGER, MSIX, 1, 1) == 0
    interrupt(client, 1)
    interrupt(client, 0)
    assert (raised(first), raised(second)) == (1, 0)


def test_masked_interrupts_are_pending(client: Client) -> None:
    events = [event(), event()]
    client.triggers(MSIX, 0, events)
    assert client.set_irqs(BOOL | MASK, MSIX, 0, 2, b"\0\1") == 0
    interrupt(client, 0)
    interrupt(client, 1)
    interrupt(client, 1)
    assert [raised(each) for each in events] == [1, 0]
    # Table and pending bits are in the BAR of their own; the table begins masked.
    assert client.read(1, 12, 4) == number(1, 4)
    assert client.read(1, PAGE, 8) == number(1 << 1)
    assert client.set_irqs(NONE | UNMASK, MSIX, 0, 2) == 0
    assert [raised(each) for each in events] == [0, 1]
    assert client.read(1, PAGE, 8) == bytes(8)


def test_a_client_triggers_an_interrupt_itself(client: Client) -> None:
    events = [event(), event()]
    client.triggers(MSIX, 0, events)
    assert client.set_irqs(NONE | TRIGGER, MSIX, 1, 1) == 0
    assert client.set_irqs(BOOL | TRIGGER, MSIX, 0, 2, b"\1\0") == 0
    assert [raised(each) for each in events] == [1, 1]


def test_a_pin_is_masked_until_the_client_unmasks_it(client: Client) -> None:
    pin = event()
    assert client.triggers(INTX, 0, [pin]) == 0
    interrupt(client, 0)
    interrupt(client, 2)
    assert raised(pin) == 1
    assert client.set_irqs(NONE | UNMASK, INTX, 0, 1) == 0
    assert raised(pin) == 1
    client.set_irqs(NONE | UNMASK, INTX, 0, 1)
    assert raised(pin) == 0
    # The driver may switch the pin off.
    client.write(7, 4, b"\x06\x04")
    interrupt(client, 0)
    assert raised(pin) == 0
    client.master()
    assert raised(pin) == 1


def test_no_message_without_bus_mastering(client: Client) -> None:
    each = event()
    client.triggers(MSIX, 0, [each])
    client.write(7, 4, b"\x02\x00")
    interrupt(client, 0)
    assert raised(each) == 0
    client.master()
    assert raised(each) == 1


@pytest.mark.parametrize(
    ("flags", "kind", "start", "count", "data"),
    [
        (NONE | TRIGGER, 5, 0, 1, b""),
        (NONE | TRIGGER, MSI, 0, 1, b""),
        (NONE | TRIGGER, MSIX, 4, 1, b""),
        (NONE | TRIGGER, MSIX, 2**32 - 1, 2**32 - 1, b""),
        (NONE | TRIGGER, MSIX, 0, 2**32 - 1, b""),
        (NONE | TRIGGER, MSIX, 1, 0, b""),
        (NONE | MASK, MSIX, 0, 0, b""),
        (NONE | BOOL | TRIGGER, MSIX, 0, 1, b"\1"),
        (NONE | TRIGGER | MASK, MSIX, 0, 1, b""),
        (NONE, MSIX, 0, 1, b""),
        (TRIGGER, MSIX, 0, 1, b""),
        (NONE | TRIGGER | 64, MSIX, 0, 1, b""),
        (BOOL | TRIGGER, MSIX, 0, 2, b"\1"),
        (NONE | TRIGGER, MSIX, 0, 1, b"\1"),
    ],
)
def test_interrupts_that_cannot_be_set(
    client: Client, flags: int, kind: int, start: int, count: int, data: bytes
) -> None:
    assert client.set_irqs(flags, kind, start, count, data) == errno.EINVAL
    assert client.read(7, 0, 2) == b"\x34\x12"


def test_descriptors_that_are_no_eventfds(client: Client) -> None:
    good, pipe = event(), os.pipe()
    with nothing_left():
        assert client.triggers(MSIX, 0, [good, pipe[0], good]) == errno.EINVAL
        assert client.triggers(MSIX, 0, [good, good, good, good, good]) == errno.EINVAL
        assert client.set_irqs(EVENTFD | TRIGGER, MSIX, 0, 3, fds=[good]) == errno.EINVAL
        assert client.set_irqs(NONE | TRIGGER, MSIX, 0, 1, fds=[good]) == errno.EINVAL
        assert client.set_irqs(EVENTFD | MASK, MSIX, 0, 2, fds=[good, pipe[0]]) == errno.EINVAL
    # Nothing of what was refused has happened.
    interrupt(client, 0)
    assert raised(good) == 0


def test_accesses_of_any_width_and_alignment(client: Client, toy: Toy) -> None:
    assert client.write(0, 0x101, bytes(range(1, 16))) == 0
    assert len(client.read(0, 0x100, 16)) == 16
    assert [entry[2:4] for entry in toy.seen if entry[0] == "write"] == [
        (0x101, 1),
        (0x102, 2),
        (0x104, 4),
        (0x108, 8),
    ]
    assert [entry[2:] for entry in toy.seen if entry[0] == "read"] == [(0x100, 8), (0x108, 8)]
    assert client.read(0, 0, 0) == b""


@pytest.mark.parametrize(
    ("region", "offset", "count"),
    [
        (0, PAGE, 1),
        (0, PAGE - 4, 8),
        (0, 2**64 - 1, 1),
        (0, 2**64 - 4, 8),
        (2, 0, 1),
        (6, 0, 4),
        (7, 256, 1),
        (7, 255, 2),
        (9, 0, 1),
        (2**32 - 1, 0, 1),
    ],
)
def test_accesses_outside_of_regions(
    client: Client, toy: Toy, region: int, offset: int, count: int
) -> None:
    asked = struct.pack("<QII", offset, region, count)
    assert client.request(Command.REGION_READ, asked).error == errno.EINVAL
    assert client.write(region, offset, bytes(count)) == errno.EINVAL
    assert not toy.seen


def test_accesses_that_are_too_long(client: Client) -> None:
    asked = struct.pack("<QII", 0, 0, 65537)
    assert client.request(Command.REGION_READ, asked).error == errno.E2BIG
    assert client.write(0, 0, bytes(65537)) == errno.E2BIG
    payload = struct.pack("<QII", 0, 0, 8) + bytes(7)
    assert client.request(Command.REGION_WRITE, payload).error == errno.EINVAL
    assert client.request(Command.REGION_WRITE, b"short").error == errno.EINVAL
    assert client.request(Command.REGION_READ, asked + b"more").error == errno.EINVAL


def test_posted_writes_are_not_answered(client: Client, toy: Toy) -> None:
    for value in range(200):
        client.post(0, 0x100, number(value))
    client.post(2, 0, b"nowhere")
    assert client.read(0, 0x100, 8) == number(199)
    assert [entry[4] for entry in toy.seen if entry[0] == "write"] == list(range(200))


def multi(*writes: tuple[int, int, int, bytes], count: int | None = None) -> bytes:
    body = b"".join(struct.pack("<QII8s", *write) for write in writes)
    return struct.pack("<Q", len(writes) if count is None else count) + body


def test_several_writes_in_one_message(client: Client, toy: Toy) -> None:
    payload = multi((0x100, 0, 8, number(7)), (0x108, 0, 4, number(8)), (0x10C, 0, 1, b"\xff" * 8))
    reply = client.request(Command.REGION_WRITE_MULTI, payload)
    assert (reply.error, reply.payload) == (0, number(3))
    client.read(0, 0x110, 1)
    assert toy.seen[:3] == [
        ("write", 0, 0x100, 8, 7),
        ("write", 0, 0x108, 4, 8),
        ("write", 0, 0x10C, 1, 0xFF),
    ]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        number(1),
        multi((0, 0, 9, b"")),
        multi((0, 0, 4, b""), (PAGE, 0, 4, b"")),
        multi((0, 0, 4, b""), count=2),
        multi((0, 0, 4, b""), count=2**64 - 1),
        multi((0, 0, 4, b""))[:-1],
    ],
)
def test_several_writes_of_which_one_is_wrong(client: Client, toy: Toy, payload: bytes) -> None:
    assert client.request(Command.REGION_WRITE_MULTI, payload).error == errno.EINVAL
    client.read(7, 0, 1)
    assert not toy.seen


def test_mistakes_of_the_device_are_its_own(client: Client, serving: ServingPci) -> None:
    assert client.read(0, 0x80, 8) == b"\xff" * 8
    assert client.read(0, 0x88, 8) == b"\xff" * 8
    assert client.write(0, 0x80, number(1)) == 0
    # Memory that is not mapped.
    client.write(0, 8, number(0x5000))
    assert client.read(0, 0, 4) == b"\xff" * 4
    assert serving.stats.failed_calls == 4


def test_reset(client: Client, toy: Toy) -> None:
    each = event()
    client.triggers(MSIX, 0, [each])
    before = toy.resets
    assert client.request(Command.DEVICE_RESET).error == 0
    assert toy.resets == before + 1
    # Bus mastering is off again; the eventfd is still there.
    assert client.read(7, 4, 2) == bytes(2)
    client.master()
    interrupt(client, 0)
    assert raised(each) == 1
    assert client.request(Command.DEVICE_RESET, b"1").error == errno.EINVAL


@pytest.mark.parametrize(
    ("command", "payload", "error"),
    [
        (Command.DEVICE_FEATURE, struct.pack("<II", 16, 1 | 1 << 16), errno.ENOTTY),
        (Command.DEVICE_FEATURE, b"", errno.EINVAL),
        (Command.MIG_DATA_READ, b"", errno.ENOSYS),
        (Command.MIG_DATA_WRITE, b"", errno.ENOSYS),
        (Command.DMA_READ, bytes(16), errno.ENOSYS),
        (Command.DMA_WRITE, bytes(24), errno.ENOSYS),
        (14, b"", errno.ENOSYS),
        (0, b"", errno.ENOSYS),
        (0xFFFF, bytes(100), errno.ENOSYS),
    ],
)
def test_what_is_not_there(client: Client, command: int, payload: bytes, error: int) -> None:
    assert client.request(command, payload).error == error


@pytest.mark.parametrize(
    "command", sorted(set(Command) - {Command.DMA_MAP, Command.DEVICE_SET_IRQS})
)
def test_descriptors_where_none_belong(client: Client, command: int) -> None:
    fd = memory_file()
    with nothing_left():
        assert client.request(command, b"", [fd]).error
    assert client.read(7, 0, 2) == b"\x34\x12"


HEADER = struct.Struct("<HHIII")


@pytest.mark.parametrize(
    "data",
    [
        HEADER.pack(1, Command.VERSION, 15, 0, 0),
        HEADER.pack(1, Command.VERSION, 0, 0, 0),
        HEADER.pack(1, Command.VERSION, 2**32 - 1, 0, 0),
        HEADER.pack(1, Command.REGION_WRITE, 80000, 0, 0),
        HEADER.pack(1, Command.VERSION, 16, 2, 0),
        HEADER.pack(1, Command.REGION_READ, 16, HeaderFlag.REPLY, 0),
        HEADER.pack(1, Command.DEVICE_RESET, 16, 0, 0),
        b"\xff" * 64,
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_who_cannot_be_understood_is_disconnected(serving: ServingPci, data: bytes) -> None:
    with nothing_left():
        with serving.connect() as client:
            client.socket.send(data)
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                while True:
                    client.receive()
        with serving.connect() as following:
            assert not following.version().error
    until(lambda: serving.stats.protocol_errors == 1)


def test_half_a_message(serving: ServingPci) -> None:
    with serving.connect() as client:
        client.begin()
        client.socket.send(HEADER.pack(1, Command.REGION_WRITE, 100, 0, 0) + bytes(10))
        with pytest.raises(ConnectionResetError):
            client.receive()
    with serving.connect() as following:
        assert not following.version().error


def test_a_client_that_goes_takes_everything_with_it(serving: ServingPci, toy: Toy) -> None:
    with serving.connect() as first:
        first.begin()
    until(lambda: toy.resets == 1)
    with nothing_left():
        with serving.connect() as client:
            client.begin()
            fd, each = memory_file(), event()
            client.map(0, PAGE, fd)
            client.triggers(MSIX, 0, [each])
            os.close(fd)
            os.close(each)
        with serving.connect() as following:
            following.begin()
            following.write(0, 8, number(0))
            assert following.read(0, 0, 1) == b"\xff"
            assert toy.resets == 2


def test_a_client_that_does_not_read(serving: ServingPci) -> None:
    with serving.connect() as client:
        client.begin()
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asked = HEADER.pack(1, Command.REGION_READ, 32, 0, 0) + struct.pack("<QII", 0x100, 0, 3840)
        client.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            while True:
                client.socket.sendall(asked)
    with serving.connect() as following:
        assert not following.version().error


def test_a_second_client_is_told_of_in_the_log(
    serving: ServingPci, caplog: pytest.LogCaptureFixture
) -> None:
    """It hangs until the first one goes, and nothing else tells why."""
    caplog.set_level(logging.INFO, "guestio.vfio_user")
    with serving.connect() as first:
        first.begin()
        assert "second" not in caplog.text
        with serving.connect() as second:
            until(lambda: "a second client has connected" in caplog.text)
            second.send(Command.VERSION, struct.pack("<HH", 0, 1))
            first.socket.close()
            assert second.receive()[1] == Command.VERSION


def test_a_function_level_reset_is_counted(tmp_path: Path) -> None:
    class Express(Toy):
        capabilities = (PciExpress(),)

    device = Express()
    with ServingPci(device, tmp_path / "express.sock") as serving, serving.connect() as client:
        client.begin()
        assert client.read(7, 0x40, 1) == b"\x10"
        # Other bits of the register are not.
        assert client.write(7, 0x48, b"\x10\x28") == 0
        assert (serving.stats.resets, device.resets) == (0, 0)
        assert client.write(7, 0x48, b"\x10\xa8") == 0
        assert (serving.stats.resets, device.resets) == (1, 1)
        multi = struct.pack("<QQII8s", 1, 0x49, 7, 1, b"\x80")
        assert client.request(Command.REGION_WRITE_MULTI, multi).error == 0
        assert client.request(Command.DEVICE_RESET).error == 0
        assert (serving.stats.resets, device.resets) == (3, 3)


ONES = b"\xff" * 8


def test_registers_whose_space_is_switched_off(client: Client, toy: Toy) -> None:
    """They read as ones, and what is written is lost, a doorbell's writes as well."""
    rung: list[tuple[int, int, int]] = []
    added = threading.Event()

    def add() -> None:
        toy.host.add_doorbell(0, 0x200, 64, CallbackDoorbell(lambda *args: rung.append(args)))
        added.set()

    toy.host.call_soon_threadsafe(add)
    assert added.wait(WAIT)
    client.write(0, 0x100, number(7))
    client.write(0, 0x204, number(1, 4))
    assert client.read(0, 0x100, 8) == number(7)
    # Doorbells serve once what had arrived is answered.
    until(lambda: rung == [(4, 4, 1)])
    seen = len(toy.seen)
    client.write(7, 4, b"\x05\x00")
    assert client.read(0, 0x100, 8) == ONES
    assert client.read(0, 0, 100) == b"\xff" * 100
    # That of MSI-X as well.
    assert client.read(1, 0, 8) == ONES
    client.write(0, 0x100, number(9))
    client.write(0, 0x204, number(2, 4))
    client.post(0, 0x204, number(3, 4))
    assert client.read(7, 4, 2) == b"\x05\x00"
    assert (len(toy.seen), len(rung)) == (seen, 1)
    client.write(7, 4, b"\x06\x00")
    assert client.read(0, 0x100, 8) == number(7)
    client.post(0, 0x204, number(4, 4))
    client.read(0, 0x100, 8)
    until(lambda: rung == [(4, 4, 1), (4, 4, 4)])


def test_a_space_that_was_never_switched_on(serving: ServingPci) -> None:
    """SPDK's driver makes a function bus master, and nothing else."""
    with serving.connect() as client:
        client.version()
        client.write(0, 0x100, number(7))
        assert client.read(0, 0x100, 8) == number(7)
        client.write(7, 4, b"\x04\x04")
        assert client.read(0, 0x100, 8) == number(7)
        client.write(7, 4, b"\x06\x04")
        client.write(7, 4, b"\x00\x00")
        assert client.read(0, 0x100, 8) == ONES
        client.request(Command.DEVICE_RESET)
        assert client.read(0, 0x100, 8) == bytes(8)


def test_each_bar_obeys_the_switch_of_its_space(tmp_path: Path) -> None:
    class Ports(Toy):
        bars = {0: Bar(16, io=True), 2: Bar(PAGE)}  # noqa: RUF012 - never changed

    with ServingPci(Ports(), tmp_path / "ports.sock") as serving, serving.connect() as client:
        client.version()
        client.write(7, 4, b"\x03\x00")
        for command, ports, memory in ((2, ONES, bytes(8)), (1, bytes(8), ONES), (0, ONES, ONES)):
            client.write(7, 4, bytes([command, 0]))
            assert (client.read(0, 8, 8), client.read(2, 8, 8)) == (ports, memory)
