"""Memory that a client maps and unmaps: what the device reaches of it, and when no more."""

from __future__ import annotations

import errno
import os
import random
import socket
from pathlib import Path

import pytest

from guestio.addr import ADDRESS_SPACE, Permissions
from guestio.budgets import DMA_UNMAP_STEP
from guestio.errors import BackingError, CannotResolveError, PermissionDeniedError
from guestio.memory import Backing
from guestio.vfio_user.memory import DmaSpace
from guestio.vfio_user.messages import Command, HeaderFlag, RefusalError
from tests.kit.serving import nothing_left, until
from tests.kit.vfio_client import (
    PAGE,
    READ,
    WRITE,
    Client,
    ServingPci,
    Toy,
    memory_file,
    number,
)

RW = Permissions.READ_WRITE
BASE = 0x7000_0000


def poke(client: Client, address: int, value: int) -> None:
    """Have the toy write a byte to memory; its effect is there when this returns."""
    client.write(0, 8, number(address))
    client.write(0, 4, number(value, 1))
    client.read(0, 0x40, 1)


def peek(client: Client, address: int) -> int:
    """What the toy reads there; 0xff if it cannot."""
    client.write(0, 8, number(address))
    return client.read(0, 0, 1)[0]


def test_the_device_reaches_what_is_mapped(client: Client, serving: ServingPci) -> None:
    fd = memory_file()
    assert client.map(BASE, 2 * PAGE, fd, offset=PAGE) == 0
    poke(client, BASE + PAGE + 5, 0x42)
    assert os.pread(fd, 1, 2 * PAGE + 5) == b"\x42"
    assert peek(client, BASE + PAGE + 5) == 0x42
    assert peek(client, BASE + 2 * PAGE) == 0xFF
    assert client.unmap(BASE, 2 * PAGE) == 0
    assert peek(client, BASE + PAGE + 5) == 0xFF
    assert (serving.stats.dma_maps, serving.stats.dma_unmaps) == (1, 1)


def test_permissions_are_kept(client: Client) -> None:
    fd = memory_file()
    os.pwrite(fd, b"\x11" * 3 * PAGE, 0)
    assert client.map(BASE, PAGE, fd, flags=READ) == 0
    assert client.map(BASE + PAGE, PAGE, fd, offset=PAGE, flags=WRITE) == 0
    poke(client, BASE, 0x42)
    poke(client, BASE + PAGE, 0x43)
    assert peek(client, BASE) == 0x11
    assert peek(client, BASE + PAGE) == 0xFF
    assert os.pread(fd, 1, PAGE) == b"\x43"


def test_no_access_without_bus_mastering(client: Client, toy: Toy) -> None:
    assert client.map(BASE, PAGE, memory_file()) == 0
    client.write(7, 4, b"\x02\x00")
    assert peek(client, BASE) == 0xFF
    with pytest.raises(PermissionDeniedError, match="bus mastering"):
        toy.host.memory.read(BASE, 1)
    client.master()
    assert peek(client, BASE) == 0


def test_refused_accesses_are_counted(client: Client, serving: ServingPci, toy: Toy) -> None:
    assert client.map(BASE, PAGE, memory_file(), flags=READ) == 0
    # Looking is no access.
    assert not toy.host.memory.check_range(BASE, 1, WRITE)
    serving.server.explain(BASE + PAGE)
    assert peek(client, BASE) == 0
    assert serving.server.status()["faults"]["dma_refused"] == 0
    poke(client, BASE, 1)
    assert peek(client, BASE + PAGE) == 0xFF
    assert serving.stats.dma_refused == 2
    client.write(7, 4, b"\x02\x00")
    assert peek(client, BASE) == 0xFF
    status = serving.server.status()
    assert status["counts"]["dma_refused"] == status["faults"]["dma_refused"] == 3
    assert "dma_refused=3" in str(serving.stats)


def test_what_an_access_would_meet(client: Client, serving: ServingPci) -> None:
    """What is not mapped is not asked for, and without bus mastering nothing is reached."""
    assert client.map(BASE, PAGE, memory_file(), flags=1) == 0
    said = serving.server.explain(BASE, 8)
    assert (said["read"], said["write"]) == ("succeeds", f"refused: {BASE:#x} allows r")
    said = serving.server.explain(BASE + PAGE - 1, 2)
    assert said["read"] == f"fails: {BASE + PAGE:#x} is not mapped"
    client.write(7, 4, b"\x02\x00")
    said = serving.server.explain(BASE)
    assert said["read"] == said["write"] == "refused: the driver has not enabled bus mastering"


@pytest.mark.parametrize(
    ("address", "size", "offset", "flags", "error"),
    [
        (BASE, 0, 0, 3, errno.EINVAL),
        (BASE + 1, PAGE, 0, 3, errno.EINVAL),
        (BASE, PAGE + 1, 0, 3, errno.EINVAL),
        (BASE, PAGE, 1, 3, errno.EINVAL),
        (BASE, PAGE, 1 << 20, 3, errno.EINVAL),
        (BASE, 1 << 21, 0, 3, errno.EINVAL),
        (BASE, PAGE, 2**64 - PAGE, 3, errno.EINVAL),
        (2**64 - PAGE, 2 * PAGE, 0, 3, errno.EINVAL),
        (BASE, 2**64 - PAGE, 0, 3, errno.EINVAL),
        (BASE, PAGE, 0, 0, errno.EINVAL),
        (BASE, PAGE, 0, 4, errno.EINVAL),
    ],
)
def test_mappings_that_cannot_be(
    client: Client, address: int, size: int, offset: int, flags: int, error: int
) -> None:
    fd = memory_file()
    with nothing_left():
        assert client.map(address, size, fd, offset, flags) == error
    assert client.map(BASE, PAGE, fd) == 0


def test_overlapping_mappings(client: Client) -> None:
    fd = memory_file()
    assert client.map(BASE, 2 * PAGE, fd) == 0
    for address, size in ((BASE, PAGE), (BASE + PAGE, 2 * PAGE), (BASE - PAGE, 4 * PAGE)):
        assert client.map(address, size, fd) == errno.EEXIST
        assert client.map(address, size, None) == errno.EEXIST
    assert client.map(BASE + 2 * PAGE, PAGE, fd) == 0
    assert client.map(2**64 - PAGE, PAGE, fd) == 0


def test_descriptors_that_are_no_memory(client: Client, tmp_path: Path) -> None:
    read, write = os.pipe()
    left, right = socket.socketpair()
    directory, counter = os.open(tmp_path, os.O_RDONLY), os.eventfd(0)
    read_only = os.open(f"/proc/self/fd/{memory_file()}", os.O_RDONLY)
    with nothing_left():
        for fd in (read, write, left.fileno(), directory, counter):
            assert client.map(BASE, PAGE, fd) == errno.EINVAL
        assert client.map(BASE, PAGE, read_only) == errno.EACCES
        payload = bytes(32)
        assert client.request(Command.DMA_MAP, payload, [read, write]).error == errno.EINVAL
        assert client.request(Command.DMA_MAP, bytes(31)).error == errno.EINVAL
    assert client.map(BASE, PAGE, read_only, flags=READ) == 0
    right.close()
    left.close()


def test_a_file_that_is_cut_short_harms_only_its_accesses(
    client: Client, serving: ServingPci
) -> None:
    fd = memory_file()
    client.map(BASE, 4 * PAGE, fd)
    os.ftruncate(fd, 0)
    assert peek(client, BASE + PAGE) == 0xFF
    poke(client, BASE + PAGE, 1)
    assert serving.stats.failed_calls == 2
    assert client.unmap(BASE, 4 * PAGE) == 0


def test_a_file_that_has_grown(client: Client) -> None:
    fd = memory_file(PAGE)
    assert client.map(BASE, PAGE, fd) == 0
    os.ftruncate(fd, 8 * PAGE)
    assert client.map(BASE + PAGE, 7 * PAGE, fd, PAGE) == 0
    poke(client, BASE + 7 * PAGE, 0x42)
    assert os.pread(fd, 1, 7 * PAGE) == b"\x42"
    assert peek(client, BASE) == 0


@pytest.mark.parametrize(
    ("address", "size", "flags", "error"),
    [
        (BASE, PAGE, 0, errno.EINVAL),  # would cut the mapping
        (BASE + PAGE, 4 * PAGE, 0, errno.EINVAL),
        (BASE, 0, 0, errno.EINVAL),
        (BASE + 8, PAGE, 0, errno.EINVAL),
        (2**64 - PAGE, 2 * PAGE, 0, errno.EINVAL),
        (BASE, 2 * PAGE, 1, errno.EINVAL),
        (BASE, 2 * PAGE, 2, errno.EINVAL),
        (BASE + 64 * PAGE, PAGE, 0, 0),  # of nothing
        (0xFEF00000, 0xFFFFFFFF01100000, 0, 0),
        (0, BASE + 2 * PAGE, 0, 0),
        (0, 0, 2, 0),
    ],
)
def test_unmaps(client: Client, address: int, size: int, flags: int, error: int) -> None:
    fd = memory_file()
    client.map(BASE, 2 * PAGE, fd)
    os.pwrite(fd, b"\x11", 0)
    assert client.unmap(address, size, flags) == error
    gone = not error and address <= BASE < address + (size or ADDRESS_SPACE)
    assert peek(client, BASE) == (0xFF if gone else 0x11)


def test_an_unmap_is_answered_after_the_last_access(client: Client, serving: ServingPci) -> None:
    fd = memory_file()
    client.map(BASE, PAGE, fd)
    client.map(BASE + PAGE, PAGE, fd, PAGE)
    client.write(0, 8, number(BASE))
    client.write(0, 0x20, number(1))
    # Another range is not concerned.
    assert client.unmap(BASE + PAGE, PAGE) == 0
    sent = client.send(Command.DMA_UNMAP, client.unmap_payload(BASE, PAGE))
    behind = client.send(Command.DEVICE_RESET)
    until(lambda: serving.stats.delayed_unmaps == 1)
    client.socket.settimeout(0.05)
    with pytest.raises(TimeoutError):
        client.receive()
    client.socket.settimeout(10)
    serving.server._host.call_soon_threadsafe(serving.server.device.held.close)
    assert client.receive()[0] == sent
    assert client.receive()[0] == behind
    assert serving.stats.cut_off == 0


def test_an_access_that_does_not_end_is_cut_off(
    client: Client, toy: Toy, serving: ServingPci
) -> None:
    fd = memory_file()
    os.pwrite(fd, b"\x11" * 2 * PAGE, 0)
    client.map(BASE, PAGE, fd)
    client.map(BASE + PAGE, PAGE, fd, PAGE)
    client.write(0, 8, number(BASE))
    client.write(0, 0x20, number(1))
    assert client.unmap(BASE, PAGE) == 0
    assert (serving.stats.delayed_unmaps, serving.stats.cut_off) == (1, 1)
    # What the device still holds leads nowhere.
    toy.held.write(b"\x99" * PAGE)
    assert os.pread(fd, PAGE, 0) == b"\x11" * PAGE
    # All else is as before, also at the same address; and the next unmap waits for nothing.
    assert peek(client, BASE + PAGE) == 0x11
    assert client.map(BASE, PAGE, fd) == 0
    assert peek(client, BASE) == 0x11
    assert client.unmap(BASE, PAGE) == 0
    assert serving.stats.delayed_unmaps == 1
    toy.held.close()


def test_memory_that_is_held_while_its_file_is_cut(client: Client, toy: Toy) -> None:
    """What is left of the file is mapped anew, and what was cut as soon as it is there again."""
    fd = memory_file(8 * PAGE)
    os.pwrite(fd, b"\x11" * 8 * PAGE, 0)
    client.map(BASE, 2 * PAGE, fd)
    client.map(BASE + 2 * PAGE, PAGE, fd, PAGE)
    client.write(0, 8, number(BASE))
    client.write(0, 0x20, number(1))
    os.ftruncate(fd, 2 * PAGE + 100)
    assert client.unmap(BASE, 2 * PAGE) == 0
    toy.held.write(b"\x99" * PAGE)
    assert os.pread(fd, 2 * PAGE, 0) == b"\x11" * 2 * PAGE
    assert peek(client, BASE + 2 * PAGE) == 0x11
    assert client.map(BASE, PAGE, fd, 2 * PAGE) == errno.EINVAL
    os.ftruncate(fd, 8 * PAGE)
    assert client.map(BASE, PAGE, fd, 7 * PAGE) == 0
    poke(client, BASE, 0x42)
    assert os.pread(fd, 1, 7 * PAGE) == b"\x42"
    toy.held.close()


@pytest.mark.parametrize("how", ["cut", "refused"])
def test_a_client_whose_memory_cannot_be_mapped_anew_is_disconnected(
    serving: ServingPci, toy: Toy, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The device reaches nothing of it: nothing is left that the memory could be taken away by."""
    fd = memory_file(8 * PAGE)
    os.pwrite(fd, b"\x11" * 8 * PAGE, 0)
    with serving.connect() as client:
        client.begin()
        client.map(BASE, PAGE, fd, PAGE)
        client.write(0, 8, number(BASE))
        client.write(0, 0x20, number(1))
        if how == "cut":
            os.ftruncate(fd, 0)
        else:

            def refuse(*_: object, **__: object) -> None:
                raise BackingError("no memory")

            monkeypatch.setattr("guestio.vfio_user.memory.Backing.from_fd", refuse)
        with pytest.raises(ConnectionResetError):
            client.unmap(BASE, PAGE)
    with serving.connect() as following:
        assert not following.version().error
        os.ftruncate(fd, 8 * PAGE)
        toy.held.write(b"\x99" * PAGE)
        assert b"\x99" not in os.pread(fd, 8 * PAGE, 0)
        toy.held.close()
    assert serving.stats.protocol_errors == 1


def test_more_pieces_than_a_process_may_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then all that is under way in the file is cut off."""
    space, fd = DmaSpace(), memory_file(4 * PAGE)
    space.map(0, 4 * PAGE, RW, fd, 0)
    held = space.space.gather(PAGE, PAGE, RW)
    cut_off, seen = Backing.cut_off, []

    def refuse(self: Backing, offset: int, length: int) -> None:
        seen.append((offset, length))
        if len(seen) == 1:
            raise BackingError("too many mappings")
        cut_off(self, offset, length)

    monkeypatch.setattr(Backing, "cut_off", refuse)
    unmapping = space.unmap(0, 4 * PAGE)
    unmapping.finish()
    assert space.cut_off(0, 4 * PAGE, unmapping.used)
    assert seen[1] == (0, 4 * PAGE)
    held.write(b"\x99" * PAGE)
    assert os.pread(fd, 4 * PAGE, 0) == bytes(4 * PAGE)
    held.close()
    space.close()


def test_an_unmap_that_wants_no_answer(client: Client) -> None:
    fd = memory_file()
    client.map(BASE, PAGE, fd)
    client.write(0, 8, number(BASE))
    client.write(0, 0x20, number(1))
    client.send(Command.DMA_UNMAP, client.unmap_payload(BASE, PAGE), flags=HeaderFlag.NO_REPLY)
    assert client.map(BASE, PAGE, fd) == 0


def test_a_client_that_goes_while_its_unmap_waits(serving: ServingPci, toy: Toy) -> None:
    with serving.connect() as client:
        client.begin()
        fd = memory_file()
        os.pwrite(fd, b"\x11", 0)
        client.map(BASE, PAGE, fd)
        client.write(0, 8, number(BASE))
        client.write(0, 0x20, number(1))
        client.send(Command.DMA_UNMAP, client.unmap_payload(BASE, PAGE))
        until(lambda: serving.stats.delayed_unmaps == 1)
    with serving.connect() as following:
        following.begin()
        # The memory of a client that is gone is out of reach.
        toy.held.write(b"\x99" * PAGE)
        assert os.pread(fd, 1, 0) == b"\x11"
        toy.held.close()


def test_what_the_driver_unmapped_is_not_reached_by_other_threads(client: Client, toy: Toy) -> None:
    memory = toy.host.memory
    client.map(BASE, PAGE, memory_file())
    assert memory.read(BASE, 4) == bytes(4)
    assert memory.check_range(BASE, PAGE, RW)
    client.unmap(BASE, PAGE)
    assert not memory.check_range(BASE, PAGE)
    with pytest.raises(CannotResolveError, match="not mapped"):
        memory.write(BASE, b"1234")
    assert memory.read(BASE, 0) == b""


def unmapped(space: DmaSpace, address: int, size: int) -> int:
    """Unmap a range; how many mappings were removed."""
    return space.unmap(address, size).finish()


def test_files_are_mapped_once_and_let_go_of() -> None:
    space = DmaSpace()
    fd, other = memory_file(), memory_file()
    assert space.map(0, PAGE, RW, fd, 0)
    with nothing_left():
        for n in range(1, 200):
            assert not space.map(n * PAGE, PAGE, RW, fd, n * PAGE)
        assert space.map(1 << 40, PAGE, RW, other, 0)
        assert len(space) == 201
        assert unmapped(space, 1 << 40, PAGE) == 1
        space.close()
        space.map(0, PAGE, RW, fd, 0)
    space.close()


def test_the_budget_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guestio.vfio_user.memory.DMA_FILES", 3)
    space = DmaSpace()
    for n in range(3):
        space.map(n * PAGE, PAGE, RW, memory_file(PAGE), 0)
    with pytest.raises(RefusalError) as refused:
        space.map(3 * PAGE, PAGE, RW, memory_file(PAGE), 0)
    assert refused.value.number == errno.ENOSPC
    assert unmapped(space, PAGE, PAGE) == 1
    assert space.map(3 * PAGE, PAGE, RW, memory_file(PAGE), 0)
    space.close()


def test_the_budget_of_mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guestio.vfio_user.memory.DMA_MAPPINGS", 3)
    space, fd = DmaSpace(), memory_file()
    for n in range(3):
        space.map(n * PAGE, PAGE, RW, fd, 0)
    with pytest.raises(RefusalError) as refused:
        space.map(3 * PAGE, PAGE, RW, fd, 0)
    assert refused.value.number == errno.ENOSPC
    space.close()


def test_against_a_model_of_pages() -> None:
    """Random maps and unmaps: the device reaches exactly what a dictionary of pages says."""
    choose = random.Random(7)
    space = DmaSpace()
    files = [memory_file(16 * PAGE) for _ in range(3)]
    for index, fd in enumerate(files):
        for page in range(16):
            os.pwrite(fd, bytes([16 * index + page]), page * PAGE)
    pages: dict[int, tuple[int, int]] = {}
    mappings: dict[int, int] = {}
    for _ in range(600):
        first, count = choose.randrange(64), choose.randrange(1, 5)
        inside = range(first, first + count)
        if choose.random() < 0.5:
            index, at = choose.randrange(3), choose.randrange(12)
            perm = choose.choice((1, 2, 3))
            free = not any(page in pages for page in inside)
            try:
                space.map(first * PAGE, count * PAGE, Permissions(perm), files[index], at * PAGE)
            except RefusalError:
                assert not free
                continue
            assert free
            mappings[first] = count
            pages |= {page: (16 * index + at + page - first, perm) for page in inside}
        else:
            hit = [s for s, c in mappings.items() if s < first + count and first < s + c]
            whole = all(s >= first and s + mappings[s] <= first + count for s in hit)
            try:
                removed = unmapped(space, first * PAGE, count * PAGE)
            except RefusalError:
                assert not whole
                continue
            assert whole
            assert removed == len(hit)
            for start in hit:
                for page in range(start, start + mappings.pop(start)):
                    del pages[page]
        page = choose.randrange(70)
        found = None
        if page not in pages or not pages[page][1] & 1:
            with pytest.raises(Exception, match="not"):
                space.space.gather(page * PAGE, 1, Permissions.READ)
        else:
            found = space.space.read(page * PAGE, 1)
            assert found == bytes([pages[page][0]])
    space.close()


def test_very_many_mappings_of_very_many_pieces() -> None:
    """A hundred thousand: each map and unmap in little memory, and all of them step by step."""
    space, fd = DmaSpace(), memory_file()
    space.map(0, PAGE, RW, fd, 0)
    count = 100_000
    for n in range(1, count):
        assert space.table.add(2 * n * PAGE, PAGE, (1 << 48) + n % 256 * PAGE, 3)
    assert space.table.mappings(1) == len(space) == count
    unmapping, steps = space.unmap(0, ADDRESS_SPACE), 1
    while not unmapping.proceed():
        steps += 1
        assert len(space) == count - unmapping.removed
    # None of them keeps the loop for long, and nothing is noted of what nothing uses.
    assert (steps, unmapping.removed, unmapping.used) == (-(-count // DMA_UNMAP_STEP), count, [])
    assert space.table.mappings(1) == 0
    assert unmapped(space, 0, ADDRESS_SPACE) == 0
    space.close()


def test_an_unmap_of_very_many_is_answered_when_all_are_gone(
    client: Client, serving: ServingPci, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guestio.vfio_user.memory.DMA_UNMAP_STEP", 7)
    fd = memory_file()
    os.pwrite(fd, b"\x11" * 64 * PAGE, 0)
    for n in range(64):
        client.map(BASE + n * PAGE, PAGE, fd, n * PAGE)
    # The core removes up to 32768 by itself; an access that is under way leaves it to Python.
    client.write(0, 8, number(BASE + 40 * PAGE))
    client.write(0, 0x20, number(1))
    sent = client.send(Command.DMA_UNMAP, client.unmap_payload(0, 0, 2))
    until(lambda: serving.stats.delayed_unmaps == 1)
    assert not toy.host.memory.check_range(BASE, PAGE)
    assert client.receive()[0] == sent
    assert serving.stats.cut_off == 1
    toy.held.write(b"\x99" * PAGE)
    assert os.pread(fd, 64 * PAGE, 0) == b"\x11" * 64 * PAGE
    assert client.map(BASE, 64 * PAGE, fd) == 0
    toy.held.close()
