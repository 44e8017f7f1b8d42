"""BARs that are memory: a client maps them, or reads and writes them by messages."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestio import Backing
from guestio.pci import Bar
from guestio.vfio_user.messages import Command
from tests.kit.serving import nothing_left
from tests.kit.vfio_client import PAGE, Client, ServingPci, Toy

WHOLE, SPARSE = Backing.memfd(2 * PAGE), Backing.memfd(4 * PAGE)


class Screen(Toy):
    bars = {  # noqa: RUF012 - never changed
        0: Bar(2 * PAGE, prefetchable=True, memory=WHOLE),
        2: Bar(4 * PAGE, memory=SPARSE, areas=[(PAGE, PAGE), (3 * PAGE, PAGE)]),
    }


@pytest.fixture
def screen() -> Screen:
    return Screen()


@pytest.fixture
def client(screen: Screen, tmp_path: Path) -> Iterator[Client]:
    with ServingPci(screen, tmp_path / "screen.sock") as serving, serving.connect() as made:
        yield made.begin()


def region(
    client: Client, index: int, argsz: int
) -> tuple[tuple[int, ...], bytes, tuple[int, ...]]:
    asked = struct.pack("<IIIIQQ", argsz, 0, index, 0, 0, 0)
    reply = client.request(Command.DEVICE_GET_REGION_INFO, asked)
    assert not reply.error
    return struct.unpack_from("<IIIIQQ", reply.payload), reply.payload[32:], reply.fds


def test_a_client_maps_a_bar(client: Client, screen: Screen) -> None:
    info, more, (fd,) = region(client, 0, 32)
    assert info == (32, 7, 0, 0, 2 * PAGE, 0)
    assert not more
    with mmap.mmap(fd, 2 * PAGE) as mapped:
        os.close(fd)
        mapped[5:8] = b"abc"
        # It is the same memory for messages, and for the device.
        assert client.read(0, 4, 5) == b"\0abc\0"
        client.write(0, PAGE, b"defg")
        client.read(7, 0, 1)
        assert mapped[PAGE : PAGE + 4] == b"defg"
    assert not screen.seen


def test_a_client_maps_parts_of_a_bar(client: Client, screen: Screen) -> None:
    # The first time there is no room for the areas: their place is told, and no descriptor sent.
    info, more, fds = region(client, 2, 32)
    assert info == (32 + 16 + 32, 15, 2, 32, 4 * PAGE, 0)
    assert (more, fds) == (b"", ())
    info, more, (fd,) = region(client, 2, info[0])
    head = struct.unpack_from("<HHIII", more)
    assert head == (1, 1, 0, 2, 0)
    assert struct.unpack_from("<QQQQ", more, 16) == (PAGE, PAGE, 3 * PAGE, PAGE)
    with mmap.mmap(fd, 4 * PAGE) as mapped:
        os.close(fd)
        mapped[PAGE : PAGE + 4] = b"abcd"
        assert client.read(2, PAGE, 4) == b"abcd"
    assert not screen.seen
    # The rest is the device's.
    client.write(2, 0x40, b"\1\0\0\0")
    assert client.read(2, 0x40, 4) == b"\1\0\0\0"
    assert screen.seen == [("write", 2, 0x40, 4, 1), ("read", 2, 0x40, 4)]


def test_descriptors_stay_the_devices(client: Client) -> None:
    with nothing_left():
        for index in (0, 2):
            _, _, fds = region(client, index, 4096)
            for fd in fds:
                os.close(fd)
    assert WHOLE.fd is not None
    assert SPARSE.fd is not None


@pytest.mark.parametrize("size", [0, PAGE, 4 * PAGE])
def test_no_client_resizes_what_the_next_one_maps(client: Client, size: int) -> None:
    _, _, (fd,) = region(client, 0, 32)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, size)
    os.close(fd)
