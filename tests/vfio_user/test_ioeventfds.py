"""Eventfds that a client signals instead of writing to a register (DEVICE_GET_REGION_IO_FDS)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from guestio.errors import DeviceError
from guestio.pci import Bar, MsiX, PciDevice, PciHost, VirtioPci
from guestio.testing import Driver
from guestio.vfio_user import Client as OurClient
from guestio.vfio_user.messages import Command
from guestio.virtio import Chain, Device, DeviceId
from guestio.virtio.loop import EventLoop
from tests.kit.serving import nothing_left, promptly, until
from tests.kit.vfio_client import Client, ServingPci, memory_file
from tests.kit.vfio_model import COUNTER, Side
from tests.kit.virtio_pci import NOTIFY, PciPlug, Transport


class Mirror(Device):
    """Answers a request with its bytes, backwards."""

    device_id = DeviceId.CONSOLE

    def __init__(self, num_queues: int = 3) -> None:
        self.num_queues = num_queues

    def process(self, queue: int, chain: Chain) -> int:
        data = chain.readable.read(0, chain.readable.total)[::-1]
        chain.writable.write(data)
        return len(data)


class Function(PciDevice):
    """Registers, memory and MSI-X in its BARs."""

    vendor_id, device_id = 0x1234, 0x5678
    bars = {0: Bar(0x4000)}  # noqa: RUF012 - never changed
    interrupts = 2
    capabilities = (MsiX(2, bar=0, table=0x2000, pba=0x3000),)


@contextlib.contextmanager
def driven(**options: Any) -> Iterator[Driver]:
    with closing(Mirror()) as device:
        plug: Any = PciPlug(device, **options)
        with Driver(plug, queues=1) as driver:
            yield driver


def plug_of(driver: Driver) -> Any:
    return driver.frontend


def abandon_queue(driver: Driver) -> None:
    """Let the first queue go, which the device has reset."""
    driver._queues.pop().abandon()
    plug_of(driver)._queues.pop(0).close()


@contextlib.contextmanager
def asking(path: Path, device: Device, capabilities: bytes | None = None) -> Iterator[Client]:
    """A client of a device, which may say what it can do."""
    with (
        closing(device),
        ServingPci(VirtioPci(device), path) as serving,
        serving.connect() as client,
    ):
        assert not client.version(data=capabilities).error
        yield client
        # It still answers, and nothing was wrong.
        client.read(7, 0, 64)
        assert serving.stats.failed_calls == serving.stats.protocol_errors == 0


def close_all(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)


def open_fds() -> set[int]:
    return {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}


def set_off(counter: int) -> int:
    """How often an eventfd was signalled and not read."""
    with contextlib.suppress(BlockingIOError):
        return os.eventfd_read(counter)
    return 0


class TestWhatIsAnswered:
    def test_a_queue_each(self, tmp_path: Path) -> None:
        with nothing_left(), asking(tmp_path / "s", Mirror()) as client:
            transport = Transport(client)
            part = transport.parts[NOTIFY]
            found = client.io_fds(part.bar)
            assert found.argsz == 16 + 3 * 40
            places = [part.offset + n * transport.multiplier for n in range(3)]
            # Any width and any value: sizes, types, flags and values are 0.
            assert found.entries == [(at, 0, n, 0, 0, 0) for n, at in enumerate(places)]
            kinds = [str(Path(f"/proc/self/fd/{fd}").readlink()) for fd in found.fds]
            assert kinds == ["anon_inode:[eventfd]"] * 3
            close_all(found.fds)
            for region in (1, 2, 6, 7, 8):
                assert client.io_fds(region) == (16, [], ())

    @pytest.mark.parametrize(
        ("said", "number"),
        [
            (b'{"capabilities":{"max_msg_fds":16}}', 16),
            (b'{"capabilities":{"max_msg_fds":1000}}', 16),
            (b'{"capabilities":{"max_msg_fds":2}}', 2),
            (b'{"capabilities":{"max_msg_fds":0}}', 0),
            (b"{}", 1),
        ],
    )
    def test_no_more_than_a_message_carries(self, tmp_path: Path, said: bytes, number: int) -> None:
        with asking(tmp_path / "s", Mirror(20), said) as client:
            found = client.io_fds(0)
            assert len(found.entries) == len(found.fds) == number
            close_all(found.fds)

    def test_room_for_all_of_it(self, tmp_path: Path) -> None:
        with nothing_left(), asking(tmp_path / "s", Mirror()) as client:
            for room in (16, 17, 135):
                assert client.io_fds(0, room) == (136, [], ())
            found = client.io_fds(0, 136)
            assert len(found.entries) == 3
            close_all(found.fds)

    def test_asking_again_takes_no_more_descriptors(self, tmp_path: Path) -> None:
        with asking(tmp_path / "s", Mirror()) as client:
            close_all(client.io_fds(0).fds)
            before = len(open_fds())
            for _ in range(50):
                close_all(client.io_fds(0).fds)
            assert len(open_fds()) == before

    @pytest.mark.parametrize(
        ("payload", "fds"),
        [
            (struct.pack("<IIII", 1 << 12, 1, 0, 0), 0),
            (struct.pack("<IIII", 15, 0, 0, 0), 0),
            (struct.pack("<IIII", 0, 0, 0, 0), 0),
            (struct.pack("<IIII", 1 << 12, 0, 9, 0), 0),
            (struct.pack("<IIII", 1 << 12, 0, 2**32 - 1, 0), 0),
            (struct.pack("<IIII", 1 << 12, 0, 0, 0), 1),
            (struct.pack("<III", 1 << 12, 0, 0), 0),
            (b"", 0),
        ],
    )
    def test_requests_that_are_none(self, tmp_path: Path, payload: bytes, fds: int) -> None:
        with nothing_left(), asking(tmp_path / "s", Mirror()) as client:
            passed = [memory_file() for _ in range(fds)]
            reply = client.request(Command.DEVICE_GET_REGION_IO_FDS, payload, passed)
            close_all(tuple(passed))
            assert (reply.error, reply.payload, reply.fds) == (errno.EINVAL, b"", ())
            found = client.io_fds(0)
            assert len(found.fds) == 3
            close_all(found.fds)

    def test_a_request_that_wants_no_answer(self, tmp_path: Path) -> None:
        with nothing_left(), asking(tmp_path / "s", Mirror()) as client:
            payload = struct.pack("<IIII", 1 << 12, 0, 0, 0)
            for _ in range(100):
                client.send(Command.DEVICE_GET_REGION_IO_FDS, payload, flags=0x10)
            client.read(7, 0, 4)

    def test_no_descriptor_left(self, tmp_path: Path) -> None:
        with asking(tmp_path / "s", Mirror()) as client:
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            payload = struct.pack("<IIII", 1 << 12, 0, 0, 0)
            used = max(open_fds())
            spare = []
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, limits[1]))
                with contextlib.suppress(OSError):
                    while True:
                        spare.append(os.dup(0))
                reply = client.request(Command.DEVICE_GET_REGION_IO_FDS, payload)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                close_all(tuple(spare))
            assert reply.error == errno.EMFILE
            found = client.io_fds(0)
            assert len(found.fds) == 3
            close_all(found.fds)

    @pytest.mark.parametrize("fast", [True, False])
    def test_either_way_of_messages(self, fast: bool) -> None:
        side = Side(fast=fast)
        try:
            head = struct.pack("<HHIII", 1, Command.VERSION, 16 + 6, 0, 0)
            side.send(head + bytes(4) + b"{}")
            side.settle()
            head = struct.pack("<HHIII", 2, Command.DEVICE_GET_REGION_IO_FDS, 32, 0, 0)
            side.send(head + struct.pack("<IIII", 56, 0, 0, 0))
            payload = struct.pack("<IIIIQQIIIIQ", 56, 0, 0, 1, COUNTER, 0, 0, 0, 0, 0, 0)
            answer = struct.pack("<HHIII", 2, Command.DEVICE_GET_REGION_IO_FDS, 72, 1, 0)
            assert side.settle() == answer + payload
        finally:
            side.close()


class TestNotifying:
    def test_a_signal_serves_without_a_message(self) -> None:
        with nothing_left(), driven() as driver:
            plug = plug_of(driver)
            assert driver.request(b"abc", 3) == b"cba"
            plug.take_bells()
            plug.transport.get("status")  # what was written before is done
            before = plug.serving.stats.region_writes
            for n in range(20):
                assert driver.request(b"%d" % n, 2) == (b"%d" % n)[::-1]
            assert plug.serving.stats.region_writes == before
            # A client may do either at any time.
            plug.transport.notify(0)
            os.eventfd_write(plug.bells[2], 1)
            while plug.bells:
                os.close(plug.bells.popitem()[1])
            assert driver.request(b"def", 3) == b"fed"

    @pytest.mark.parametrize("how", ["status", "queue", "function", "device"])
    def test_a_reset_leaves_them(self, how: str) -> None:
        with nothing_left(), driven() as driver:
            plug = plug_of(driver)
            t = plug.transport
            plug.take_bells()
            for n in range(3):
                assert driver.request(b"abc", 3) == b"cba"
                if how == "queue":
                    plug.stop_queue(0)
                    driver._queues.pop()._handle = None
                elif how == "function":
                    t.write_config(t.capabilities[0x10] + 8, 2, 0x8000)
                elif how == "device":
                    assert plug.client.request(Command.DEVICE_RESET).error == 0
                else:
                    t.reset()
                # No queue runs.
                for bell in plug.bells.values():
                    os.eventfd_write(bell, 1)
                t.write_config(4, 2, 6)
                t.write_config(t.capabilities[0x11] + 2, 2, 0x8000)
                if how != "queue":
                    abandon_queue(driver)
                driver.reset()
                assert t.get("status") & 4
                assert driver.request(b"abc", 3) == b"cba", n

    def test_what_a_client_makes_of_its_side(self) -> None:
        """The file description is shared: it blocks, and counts no further."""
        with nothing_left(), driven() as driver:
            plug = plug_of(driver)
            plug.take_bells()
            for bell in plug.bells.values():
                flags = fcntl.fcntl(bell, fcntl.F_GETFL)
                fcntl.fcntl(bell, fcntl.F_SETFL, flags & ~os.O_NONBLOCK)
            assert driver.request(b"abc", 3) == b"cba"
            bells = dict(plug.bells)
            # By messages from here on, each of which has the server signal the same eventfd.
            plug.bells.clear()
            os.eventfd_read(bells[0])
            os.eventfd_write(bells[0], 2**64 - 2)
            with promptly(1):
                assert driver.request(b"def", 3) == b"fed"
                # It is reset to 0 with the queue, whether it blocks or not.
                abandon_queue(driver)
                driver.reset()
                assert driver.request(b"ghi", 3) == b"ihg"
            close_all(tuple(bells.values()))

    def test_a_queue_that_is_no_bus_master(self) -> None:
        with driven() as driver:
            plug = plug_of(driver)
            plug.take_bells()
            plug.transport.write_config(4, 2, 2)
            buffer = driver.submit(b"abc", 3)
            assert not plug.transport.get("status") & 64
            assert not buffer.done
            plug.transport.write_config(4, 2, 6)
            driver.wait(buffer)
            assert buffer.data == b"cba"


class TestTheNextClient:
    def test_it_has_others(self, tmp_path: Path) -> None:
        device = Mirror()
        with closing(device), ServingPci(VirtioPci(device), tmp_path / "s") as serving:
            with serving.connect() as first:
                assert not first.version().error
                theirs = first.io_fds(0)
            with promptly(1), serving.connect() as second:
                assert not second.version().error
                found = second.io_fds(0)
                for fd in theirs.fds:
                    os.eventfd_write(fd, 1)
                assert [set_off(fd) for fd in found.fds] == [0, 0, 0]
                assert [set_off(fd) for fd in theirs.fds] == [1, 1, 1]
                close_all((*found.fds, *theirs.fds))

    def test_nothing_stays_open(self, tmp_path: Path) -> None:
        device = Mirror()
        with closing(device), ServingPci(VirtioPci(device), tmp_path / "s") as serving:
            before = len(open_fds())
            for _ in range(5):
                with serving.connect() as client:
                    assert not client.version().error
                    close_all(client.io_fds(0).fds)
                until(lambda: len(open_fds()) == before)

    def test_our_client_asks_a_new_server_again(self, tmp_path: Path) -> None:
        path, device = tmp_path / "s", Mirror(1)
        with closing(device):
            with ServingPci(VirtioPci(device), path):
                client = OurClient(path)
                (bell,) = client.bar(0).doorbells()
                assert (bell.size, bell.value) == (0, None)
                bell.ring()
                bell.close()
            with ServingPci(VirtioPci(device), path), client:
                client.reconnect()
                (bell,) = client.bar(0).doorbells()
                bell.ring()
                bell.close()


class TestTheDevicesSide:
    @pytest.fixture
    def host(self) -> Iterator[PciHost]:
        loop = EventLoop()
        yield PciHost(Function(), loop)
        loop.close()

    @pytest.mark.parametrize(
        ("bar", "offset", "reason"),
        [
            (1, 0, "no room"),
            (0, 0x4000, "no room"),
            (0, -4, "no room"),
            (0, 0x2000, "MSI-X"),
            (0, 0x3000, "MSI-X"),
            (0, 0x10, "twice"),
        ],
    )
    def test_offers_that_cannot_be(self, host: PciHost, bar: int, offset: int, reason: str) -> None:
        host.offer_ioeventfd(0, 0x10)
        with pytest.raises(DeviceError, match=reason):
            host.offer_ioeventfd(bar, offset)

    def test_it_is_there_while_a_client_is(self, host: PciHost) -> None:
        host.offer_ioeventfd(0, 0x10)
        with pytest.raises(DeviceError, match="offers no ioeventfd at 0x14 of BAR 0"):
            host.ioeventfd(0, 0x14)
        side = Side()
        space = side.connection._dma.space
        for _ in range(2):
            with pytest.raises(DeviceError, match="no client"):
                host.ioeventfd(0, 0x10)
            host.connect(space)
            fd = host.ioeventfd(0, 0x10)
            assert host.ioeventfds(0, 16) == [(0x10, fd)]
            assert host.ioeventfds(0, 0) == host.ioeventfds(1, 16) == []
            os.eventfd_write(fd, 3)
            host.reset()
            assert host.ioeventfd(0, 0x10) == fd
            assert os.eventfd_read(fd) == 3
            host.disconnect()
            with pytest.raises(OSError, match="Bad file"):
                os.fstat(fd)
        side.close()
