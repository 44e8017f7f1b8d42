"""A client and a server against each other: registers, interrupts, mapped BARs."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestio import Backing
from guestio.addr import Permissions
from guestio.dma import ERR, INTX, MSI, MSIX, DmaError, DmaMapRequest, MmapArea, PciFunction
from guestio.errors import AccessError, BackingError, DeviceError
from guestio.pci import Bar
from guestio.pci.interrupts import InterruptKind
from guestio.vfio_user import Client, ServerGoneError, VfioUserTarget
from guestio.vfio_user.client import _set_triggers
from guestio.vfio_user.messages import RefusalError
from tests.kit.serving import nothing_left, until
from tests.kit.vfio_client import PAGE, ServingPci, Toy, number

FRAME = Backing.memfd(2 * PAGE)
MIXED = Backing.memfd(4 * PAGE)


@pytest.fixture
def device(serving: ServingPci) -> Iterator[Client]:
    with Client(serving.server.path) as made:
        made.bus_master = True
        yield made


def events(count: int) -> list[int]:
    return [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(count)]


def raised(event: int) -> int:
    try:
        return os.eventfd_read(event)
    except BlockingIOError:
        return 0


def interrupt(device: Client, vector: int) -> None:
    """Have the toy raise a vector; its effect is there when this returns."""
    device.bar(0).post(0x30, number(vector))
    device.bar(0).load(0x40, 1)


def test_what_a_device_is(device: Client, serving: ServingPci) -> None:
    assert isinstance(device, PciFunction)
    assert device.address == serving.server.path
    assert device.can_reset
    assert device.limits == (1, 16, 65536, 65535, PAGE, True)
    sizes = [device.region(index).size for index in range(9)]
    assert sizes == [PAGE, 2 * PAGE, 0, 0, 0, 0, 0, 256, 0]
    assert device.bar(0).readable
    assert not device.bar(2).readable
    assert not device.rom.size
    assert [device.interrupts(kind)[:2] for kind in range(5)] == [
        (1, True),
        (0, False),
        (4, True),
        (1, True),
        (1, True),
    ]
    assert device.interrupts(INTX).automasked
    assert not device.interrupts(MSIX).automasked


def test_registers(device: Client, toy: Toy) -> None:
    assert device.config.load(0, 4) == 0x5678_1234
    bar = device.bar(0)
    bar.store(0x100, 0x1122_3344_5566_7788, 8)
    assert bar.load(0x100, 8) == 0x1122_3344_5566_7788
    assert bar.read(0x100, 4) == b"\x88\x77\x66\x55"
    # Each of them was one access.
    assert [entry[0:4] for entry in toy.seen] == [
        ("write", 0, 0x100, 8),
        ("read", 0, 0x100, 8),
        ("read", 0, 0x100, 4),
    ]
    assert bar.read(0, 0) == b""
    bar.write(0, b"")
    assert len(toy.seen) == 3


def test_bus_mastering_and_memory_space(device: Client, toy: Toy) -> None:
    assert device.bus_master
    assert not device.memory_space
    device.memory_space = True
    assert device.config.load(4, 2) == 6
    device.bus_master = False
    assert device.config.load(4, 2) == 2
    assert not toy.host.memory.enabled


def test_accesses_outside_of_a_region(device: Client, toy: Toy) -> None:
    bar = device.bar(0)
    for offset, length in ((PAGE, 1), (PAGE - 4, 8), (-1, 1), (2**64 - 1, 1), (0, PAGE + 1)):
        with pytest.raises(ValueError, match=r"region 0|offset"):
            bar.read(offset, length)
        with pytest.raises(ValueError, match=r"region 0|offset"):
            bar.write(offset, bytes(length))
        with pytest.raises(ValueError, match=r"region 0|offset"):
            bar.post(offset, bytes(length))
    with pytest.raises(ValueError, match="region 3"):
        device.bar(3).read(0, 1)
    for wrong in (-1, 9):
        with pytest.raises(ValueError, match="regions"):
            device.region(wrong)
    with pytest.raises(ValueError, match="BAR 6"):
        device.bar(6)
    assert not toy.seen


def test_long_accesses_are_several_messages(tmp_path: Path) -> None:
    class Large(Toy):
        bars = {0: Bar(1 << 18, width=8)}  # noqa: RUF012 - never changed

        def read(self, bar: int, offset: int, size: int) -> int:
            return self.registers.get(offset, 0)

    data = os.urandom(65536 * 2 + 8)
    with ServingPci(Large(), tmp_path / "s") as serving, Client(serving.server.path) as client:
        # What the toy does at its registers is not wanted.
        client.bar(0).write(0x1000, data)
        assert client.bar(0).read(0x1000, len(data)) == data
        assert serving.stats.region_writes == 3
        assert serving.stats.region_reads == 3


def test_posted_writes_come_before_what_follows(device: Client, toy: Toy) -> None:
    bar = device.bar(0)
    for value in range(300):
        bar.post(0x100, number(value))
    assert bar.load(0x100, 8) == 299
    assert [entry[4] for entry in toy.seen if entry[0] == "write"] == list(range(300))


def test_many_writes_in_few_messages(
    device: Client, toy: Toy, serving: ServingPci, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = device.bar(0)
    writes = [(0x100 + 8 * (index % 100), number(index)) for index in range(700)]
    bar.post_many([*writes, (0x100, b"\x05")])
    bar.load(0x40, 1)
    seen = [entry[2:] for entry in toy.seen if entry[0] == "write"]
    expected = [(offset, 8, index) for index, (offset, _) in enumerate(writes)]
    assert seen == [*expected, (0x100, 1, 5)]
    assert serving.stats.refused == 0
    toy.seen.clear()
    # With a server that does not know the message each write is one.
    limits = device._life.limits._replace(write_multiple=False)
    monkeypatch.setattr(device._life, "limits", limits)
    bar.post_many(writes[:10])
    bar.load(0x40, 1)
    assert [entry[2:] for entry in toy.seen if entry[0] == "write"] == expected[:10]
    toy.seen.clear()
    for wrong in (b"", bytes(9)):
        with pytest.raises(ValueError, match="1 to 8"):
            bar.post_many([(0x100, b"1"), (0x108, wrong)])
    with pytest.raises(ValueError, match="not inside"):
        bar.post_many([(0x100, b"1"), (PAGE, b"1")])
    bar.load(0x40, 1)
    assert not [entry for entry in toy.seen if entry[0] == "write"]


def test_several_threads_access_at_a_time(device: Client) -> None:
    failed = []

    def work(place: int) -> None:
        for value in range(50):
            device.bar(0).store(0x100 + 8 * place, value, 8)
            if device.bar(0).load(0x100 + 8 * place, 8) != value:
                failed.append((place, value))

    threads = [threading.Thread(target=work, args=(place,)) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_reset(device: Client, toy: Toy) -> None:
    before = toy.resets
    device.reset()
    assert toy.resets == before + 1
    assert not device.bus_master


def test_interrupts_go_to_their_eventfds(device: Client) -> None:
    fds = events(4)
    device.enable_interrupts(MSIX, fds)
    for vector in (0, 3, 3):
        interrupt(device, vector)
    assert [raised(each) for each in fds] == [1, 0, 0, 2]
    # Fewer: the others are off. One is skipped.
    device.enable_interrupts(MSIX, [fds[0], -1, fds[2]])
    for vector in (1, 2, 3):
        interrupt(device, vector)
    assert [raised(each) for each in fds] == [0, 0, 1, 0]
    # What could not be delivered is pending.
    device.enable_interrupts(MSIX, fds)
    assert [raised(each) for each in fds] == [0, 1, 0, 1]
    device.disable_interrupts(MSIX)
    interrupt(device, 0)
    assert raised(fds[0]) == 0


def test_more_interrupts_than_descriptors_in_a_message(
    device: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device._life, "limits", device._life.limits._replace(max_fds=2))
    fds = events(4)
    device.enable_interrupts(MSIX, [fds[0], fds[1], fds[2], -1])
    for vector in range(3):
        interrupt(device, vector)
    assert [raised(each) for each in fds] == [1, 1, 1, 0]


def test_masked_and_triggered_interrupts(device: Client) -> None:
    fds = events(2)
    device.enable_interrupts(MSIX, fds)
    device.mask_interrupt(MSIX, 1)
    interrupt(device, 1)
    assert raised(fds[1]) == 0
    device.unmask_interrupt(MSIX, 1)
    assert raised(fds[1]) == 1
    device.trigger_interrupt(MSIX, 0)
    assert raised(fds[0]) == 1


def test_a_pin_is_masked_until_it_is_unmasked(device: Client) -> None:
    (pin,) = events(1)
    device.enable_interrupts(INTX, [pin])
    interrupt(device, 0)
    interrupt(device, 1)
    assert raised(pin) == 1
    device.unmask_interrupt(INTX)
    assert raised(pin) == 1


def test_eventfds_that_mask_and_unmask(device: Client, serving: ServingPci) -> None:
    with nothing_left():
        pin, resample = events(2)
        device.enable_interrupts(INTX, [pin])
        device.unmask_by(INTX, resample)
        interrupt(device, 0)
        interrupt(device, 1)
        assert raised(pin) == 1
        # As KVM does when the guest has handled it: no message is sent.
        os.eventfd_write(resample, 1)
        until(lambda: raised(pin) == 1)
        device.disable_interrupts(INTX)
        vectors, (mask, unmask) = events(2), events(2)
        device.enable_interrupts(MSIX, vectors)
        device.mask_by(MSIX, mask, 1)
        device.unmask_by(MSIX, unmask, 1)
        os.eventfd_write(mask, 1)
        until(lambda: 1 in masked(serving))
        interrupt(device, 1)
        assert raised(vectors[1]) == 0
        os.eventfd_write(unmask, 5)
        until(lambda: raised(vectors[1]) == 1)
        # Once taken away they are not listened to.
        device.mask_by(MSIX, -1, 1)
        os.eventfd_write(mask, 1)
        interrupt(device, 1)
        assert raised(vectors[1]) == 1
        pipe = os.pipe()
        with pytest.raises(DeviceError, match="cannot be masked"):
            device.mask_by(MSIX, pipe[0])
        with pytest.raises(DeviceError, match="no interrupt"):
            device.mask_by(MSI, mask)
        device.disable_interrupts(MSIX)
        for fd in (pin, resample, *vectors, mask, unmask, *pipe):
            os.close(fd)


def masked(serving: ServingPci) -> set[int]:
    """Vectors of MSI-X that the server has masked."""
    return serving.server._host.interrupts._masked[InterruptKind.MSIX]


def test_interrupts_that_there_are_not(device: Client) -> None:
    fds = events(5)
    with nothing_left():
        for kind, count in ((MSIX, 5), (MSI, 1), (ERR, 2), (7, 1), (-1, 1)):
            with pytest.raises(DeviceError, match="interrupts"):
                device.enable_interrupts(kind, fds[:count])
        for kind, vector in ((MSIX, 4), (MSIX, -1), (MSI, 0)):
            for act in (device.mask_interrupt, device.unmask_interrupt, device.trigger_interrupt):
                with pytest.raises(DeviceError, match="no interrupt"):
                    act(kind, vector)
        with pytest.raises(ValueError, match="descriptor of an eventfd"):
            device.enable_interrupts(MSIX, [fds[0], 12345])


def test_a_refused_eventfd_changes_nothing(device: Client) -> None:
    """The second of two messages is refused, because a pipe is no eventfd."""
    fds, pipe = events(2), os.pipe()
    device.enable_interrupts(MSIX, fds)
    wrong = [fds[1], -1, pipe[1]]
    with nothing_left(), pytest.raises(DeviceError, match="cannot set up 3 interrupts"):
        device.enable_interrupts(MSIX, wrong)
    interrupt(device, 0)
    interrupt(device, 1)
    assert [raised(each) for each in fds] == [1, 1]
    with pytest.raises(RefusalError):
        _set_triggers(device._life, MSIX, wrong)


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[Client]:
    class Screen(Toy):
        bars = {  # noqa: RUF012 - never changed
            0: Bar(2 * PAGE, prefetchable=True, memory=FRAME),
            2: Bar(4 * PAGE, memory=MIXED, areas=[(PAGE, PAGE), (3 * PAGE, PAGE)]),
        }

    with ServingPci(Screen(), tmp_path / "s") as serving, Client(serving.server.path) as client:
        yield client


def test_bars_are_mapped(screen: Client) -> None:
    assert screen.bar(0).areas == (MmapArea(0, 2 * PAGE),)
    assert screen.bar(2).areas == (MmapArea(PAGE, PAGE), MmapArea(3 * PAGE, PAGE))
    with screen.bar(0).backing() as frame:
        memoryview(frame._mapping)[5:8] = b"abc"
        assert screen.bar(0).read(4, 5) == b"\0abc\0"
    with screen.bar(2).backing(1) as part:
        screen.bar(2).write(3 * PAGE + 7, b"hello")
        screen.config.read(0, 1)
        assert bytes(memoryview(part._mapping)[7:12]) == b"hello"
    for area in (-1, 2):
        with pytest.raises(ValueError, match="2 areas"):
            screen.bar(2).backing(area)
    with pytest.raises(ValueError, match="0 areas"):
        screen.config.backing()


def test_what_is_mapped_outlives_the_client(screen: Client) -> None:
    frame = screen.bar(0).backing()
    screen.close()
    memoryview(frame._mapping)[0:1] = b"x"
    frame.close()


def test_a_file_that_was_cut(screen: Client) -> None:
    """A server of ours seals its files; this one stands for another's."""
    short = os.memfd_create("short")
    os.ftruncate(short, PAGE)
    os.dup2(short, screen._life.files[0], inheritable=False)
    os.close(short)
    with pytest.raises(BackingError, match="do not fit"):
        screen.bar(0).backing()


def test_memory_that_the_device_reaches(device: Client, toy: Toy, serving: ServingPci) -> None:
    target = VfioUserTarget(device)
    memory = Backing.memfd(4 * PAGE)
    request = DmaMapRequest(
        start=0x10000,
        size=2 * PAGE,
        host_address=memory.host_address + PAGE,
        fd=memory.fd,
        file_offset=PAGE,
    )
    target.map_dma(request)
    device.bar(0).store(8, 0x10010, 8)
    device.bar(0).store(4, 0x77, 4)
    device.bar(0).load(0x40, 1)
    assert memoryview(memory._mapping)[PAGE + 16] == 0x77
    target.unmap_dma(0x10000, 2 * PAGE)
    assert not toy.host.memory.check_range(0x10010, 1)
    assert serving.stats.dma_messages == device.served_requests == 0


def test_an_unmap_waits_for_the_answer(device: Client, toy: Toy, serving: ServingPci) -> None:
    target = VfioUserTarget(device)
    memory = Backing.memfd(PAGE)
    target.map_dma(DmaMapRequest(0, PAGE, memory.host_address, memory.fd))
    device.bar(0).store(8, 0, 8)
    device.bar(0).store(0x20, 1, 4)
    until(lambda: toy.held is not None)
    target.unmap_dma(0, PAGE)
    # The lease was still held: it was cut off, after 0.3 s.
    assert serving.stats.cut_off == 1


@pytest.mark.parametrize("share", [True, False])
def test_memory_that_may_only_be_read(device: Client, toy: Toy, share: bool) -> None:
    target = VfioUserTarget(device, share=share)
    memory = Backing.memfd(PAGE)
    target.map_dma(DmaMapRequest(0, PAGE, memory.host_address, memory.fd, writable=False))
    assert toy.host.memory.check_range(0, PAGE, Permissions.READ)
    assert not toy.host.memory.check_range(0, 1, Permissions.WRITE)
    if share:
        # Nor does the server's process have a descriptor that allows it.
        (mapping,) = device._mapped.all()
        assert mapping.file is not None
        with pytest.raises(BackingError):
            Backing.from_fd(mapping.file.fd, PAGE)
        Backing.from_fd(mapping.file.fd, PAGE, writable=False).close()


@pytest.mark.parametrize("file", [True, False])
def test_memory_by_messages(device: Client, toy: Toy, serving: ServingPci, file: bool) -> None:
    size = 40 * PAGE
    memory = Backing.memfd(size) if file else Backing.anonymous(size)
    target = VfioUserTarget(device, share=False)
    # Two mappings that are neighbors, the second one first in memory.
    half = size // 2
    there = memory.host_address
    target.map_dma(DmaMapRequest(0, half, there + half, memory.fd, half if file else 0))
    target.map_dma(DmaMapRequest(half, half, there, memory.fd))
    data = os.urandom(half)
    memoryview(memory._mapping)[:half] = data
    device.bar(0).store(8, half, 8)
    device.bar(0).store(0x28, half, 4)
    until(lambda: toy.copied is not None)
    assert toy.copied == data
    device.bar(0).store(8, half - 100, 8)
    device.bar(0).store(0x2C, 200, 4)
    pattern = bytes(index % 251 for index in range(200))
    until(lambda: bytes(memoryview(memory._mapping)[:100]) == pattern[100:])
    until(lambda: bytes(memoryview(memory._mapping)[size - 100 :]) == pattern[:100])
    until(lambda: device.served_bytes == half + 200)
    assert serving.stats.dma_messages == device.served_requests
    target.unmap_dma(0, half)
    toy.copied = None
    device.bar(0).store(8, half - 8, 8)
    device.bar(0).store(0x28, 16, 4)
    until(lambda: toy.copied is not None)
    assert isinstance(toy.copied, AccessError)


def test_memory_whose_file_was_cut_fails_the_access(device: Client, toy: Toy) -> None:
    memory = Backing.memfd(2 * PAGE)
    VfioUserTarget(device, share=False).map_dma(
        DmaMapRequest(0, 2 * PAGE, memory.host_address, memory.fd)
    )
    assert memory.fd is not None
    os.ftruncate(memory.fd, PAGE)
    device.bar(0).store(8, PAGE, 8)
    device.bar(0).store(0x28, 4, 4)
    until(lambda: toy.copied is not None)
    assert isinstance(toy.copied, AccessError)
    assert device.config.load(0, 2) == 0x1234


def test_mappings_that_cannot_be(device: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    target = VfioUserTarget(device)
    memory = Backing.memfd(4 * PAGE)
    there = memory.host_address
    target.map_dma(DmaMapRequest(PAGE, PAGE, there, memory.fd))
    cases = [
        (DmaMapRequest(0, PAGE // 2, there, memory.fd), "EINVAL"),
        (DmaMapRequest(PAGE // 2, PAGE, there, memory.fd), "EINVAL"),
        (DmaMapRequest(0, 2 * PAGE, there, memory.fd), "EEXIST"),
        (DmaMapRequest(PAGE, PAGE, there, memory.fd), "EEXIST"),
        (DmaMapRequest(4 * PAGE, PAGE), "EINVAL"),
        # The server's: the file is too short, the offset is not a page's.
        (DmaMapRequest(4 * PAGE, PAGE, there, memory.fd, 4 * PAGE), "EINVAL"),
        (DmaMapRequest(4 * PAGE, PAGE, there, memory.fd, 5), "EINVAL"),
        (DmaMapRequest(4 * PAGE, PAGE, there, 12345), "EBADF"),
    ]
    with nothing_left():
        for request, code in cases:
            with pytest.raises(DmaError, match=code):
                target.map_dma(request)
        assert len(device._mapped) == 1
    monkeypatch.setattr(device._life, "limits", device._life.limits._replace(max_maps=1))
    with pytest.raises(DmaError, match="ENOSPC"):
        target.map_dma(DmaMapRequest(8 * PAGE, PAGE, there, memory.fd))
    for start, size in ((0, 2 * PAGE), (PAGE, 2 * PAGE)):
        with pytest.raises(DmaError, match="mapped as one"):
            target.unmap_dma(start, size)
    target.unmap_dma(2 * PAGE, PAGE)
    target.unmap_dma(PAGE, PAGE)
    target.unmap_dma(PAGE, PAGE)
    assert not len(device._mapped)


def test_a_file_is_open_as_long_as_a_mapping_leads_to_it(device: Client) -> None:
    target = VfioUserTarget(device)
    with nothing_left():
        memory = Backing.memfd(4 * PAGE)
        for page in range(4):
            target.map_dma(
                DmaMapRequest(
                    page * PAGE, PAGE, memory.host_address, memory.fd, page * PAGE, page % 2 == 0
                )
            )
        assert len({mapping.file.fd for mapping in device._mapped.all() if mapping.file}) == 2
        for page in range(4):
            target.unmap_dma(page * PAGE, PAGE)
        memory.close()
        # The server keeps what was mapped last.
        device.close()


def test_a_closed_client(serving: ServingPci) -> None:
    with nothing_left():
        client = Client(serving.server.path)
        bar = client.bar(0)
        client.close()
        client.close()
        assert client.closed
        for call in (
            lambda: bar.read(0, 1),
            lambda: bar.post(0, b"1"),
            client.reset,
            client.fileno,
            client.reconnect,
            lambda: client.interrupts(0),
            lambda: client.enable_interrupts(MSIX, [0]),
            lambda: VfioUserTarget(client).unmap_dma(0, PAGE),
            bar.doorbells,
        ):
            with pytest.raises(ValueError, match="closed"):
                call()
        # One that is forgotten hangs up all the same.
        Client(serving.server.path)
        Client(serving.server.path).close()


def test_where_no_server_is(tmp_path: Path) -> None:
    with nothing_left():
        with pytest.raises(DeviceError, match="no vfio-user server listens on"):
            Client(tmp_path / "nothing")
        with pytest.raises(DeviceError, match="cannot connect"):
            Client(tmp_path / ("x" * 200))
        with socket.socket() as kept, pytest.raises(ValueError, match="socket"):
            Client(kept, reconnect_for=1)
        with pytest.raises(ServerGoneError):
            Client(socket.socket(socket.AF_UNIX))


def test_a_server_that_comes_later(toy: Toy, tmp_path: Path) -> None:
    path, made = tmp_path / "s", []
    waiting = threading.Thread(target=lambda: made.append(Client(path, connect_wait=30)))
    waiting.start()
    with ServingPci(toy, path):
        waiting.join()
        assert made[0].config.load(0, 2) == 0x1234
        made[0].close()
