"""Servers that die at any moment, and what is there after the next one has been started."""

from __future__ import annotations

import contextlib
import os
import select
import struct
from pathlib import Path

import pytest

from guestio import Backing
from guestio.dma import INTX, MSIX, DmaError, DmaMapRequest, RegionManager
from guestio.errors import DeviceError
from guestio.vfio_user import (
    Client,
    DeviceRestartedError,
    Restored,
    ServerGoneError,
    VfioUserTarget,
)
from guestio.vfio_user.messages import Command
from tests.kit.serving import WAIT, nothing_left, until
from tests.kit.vfio_client import PAGE, ServingPci, Toy, number
from tests.kit.vfio_model import SlowConnection
from tests.kit.vfio_process import ServerProcess
from tests.kit.vfio_server import Answer, Asked, HandServer
from tests.kit.waiting import Waiting

BASE = 0x10000


def events(count: int) -> list[int]:
    return [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(count)]


def wait_for(event: int) -> int:
    assert select.select([event], [], [], WAIT)[0]
    return os.eventfd_read(event)


class Driver:
    """What a driver does with the toy: set up, have it write to memory, and interrupt."""

    def __init__(self, client: Client, memory: Backing) -> None:
        self.client = client
        self.memory = memory
        self.fds = events(4)
        self.target = VfioUserTarget(client)
        self.written = 0

    def map(self) -> None:
        half = self.memory.size // 2
        for start in (0, half):
            self.target.map_dma(
                DmaMapRequest(
                    BASE + start, half, self.memory.host_address + start, self.memory.fd, start
                )
            )

    def work(self) -> None:
        """Set the device up, and use it."""
        self.client.bus_master = True
        bar = self.client.bar(0)
        self.written += 1
        for offset in (3, PAGE + 5):
            bar.store(8, BASE + offset, 8)
            bar.store(4, self.written, 4)
        bar.post(0x30, number(2))
        assert wait_for(self.fds[2]) == 1
        view = memoryview(self.memory._mapping)
        assert view[3] == view[PAGE + 5] == self.written

    def all(self) -> None:
        """The whole life of a driver."""
        self.map()
        self.client.enable_interrupts(MSIX, self.fds)
        self.work()
        self.target.unmap_dma(BASE + PAGE, PAGE)
        self.client.disable_interrupts(MSIX)


def test_kill_restart_replay_go_on(tmp_path: Path) -> None:
    path = tmp_path / "s"
    memory = Backing.memfd(2 * PAGE)
    with ServerProcess(path) as first, Client(path) as client:
        driver = Driver(client, memory)
        driver.map()
        client.enable_interrupts(MSIX, driver.fds)
        client.mask_interrupt(MSIX, 3)
        driver.work()
        with pytest.raises(ValueError, match="still connected"):
            client.reconnect()
        first.kill()
        with pytest.raises(ServerGoneError, match="closed the connection"):
            client.bar(0).load(8, 8)
        with pytest.raises(DeviceError, match="no vfio-user server"):
            client.reconnect()
        # What is not wanted any more goes without a server, and is not brought back.
        driver.target.unmap_dma(BASE + PAGE, PAGE)
        with pytest.raises(DmaError, match="reconnect"):
            driver.map()
        with ServerProcess(path):
            assert client.reconnect(WAIT) == Restored(1, 4)
            # The device is as after power-on.
            assert not client.bus_master
            assert client.bar(0).load(8, 8) == 0
            driver.target.map_dma(
                DmaMapRequest(BASE + PAGE, PAGE, memory.host_address + PAGE, memory.fd, PAGE)
            )
            driver.work()
            # It is still masked.
            client.bar(0).post(0x30, number(3))
            client.bar(0).load(0x40, 1)
            with pytest.raises(BlockingIOError):
                os.eventfd_read(driver.fds[3])
            client.unmask_interrupt(MSIX, 3)
            assert wait_for(driver.fds[3]) == 1


def messages_of_a_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many messages a client sends in a driver's whole life."""
    path = tmp_path / "count"
    monkeypatch.setattr("guestio.vfio_user.server.Connection", SlowConnection)
    with ServingPci(Toy(), path) as serving, Client(path) as client:
        handled = []
        connection = serving.server._connection
        handle = connection._session.handle

        def count(message):  # as Session.handle
            handled.append(message.header.name)
            return handle(message)

        before = 2 + 9 + 5
        connection._session.handle = count
        Driver(client, Backing.memfd(2 * PAGE)).all()
        return before + len(handled)


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_message(
    tmp_path: Path, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was lost, the driver goes on with the next server, and nothing is left behind."""
    total = messages_of_a_life(tmp_path, monkeypatch)
    path = tmp_path / "s"
    # During the first 16 the client is being made. Both ways each message is met once.
    for at in range(2 if after else 1, total + 1, 2):
        with nothing_left():
            _die_and_go_on(path, at, after)


def _die_and_go_on(path: Path, at: int, after: bool) -> None:
    memory = Backing.memfd(2 * PAGE)
    with ServerProcess(path, at, after=after) as dying:
        try:
            client = Client(path)
        except ServerGoneError:
            assert at <= 16
            dying.wait_dead()
            memory.close()
            return
        with client:
            driver = Driver(client, memory)
            try:
                driver.all()
                # The last message was answered before.
                until(lambda: client._life.exchange.failure is not None)
            except (ServerGoneError, DmaError, AssertionError):
                pass
            dying.wait_dead()
            with ServerProcess(path):
                client.reconnect(WAIT)
                # The driver begins again: what is mapped is unmapped first, as far as it was.
                for start in (BASE, BASE + PAGE):
                    driver.target.unmap_dma(start, PAGE)
                for fd in driver.fds:
                    os.set_blocking(fd, False)
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(fd)
                driver.all()
        for fd in driver.fds:
            os.close(fd)
    memory.close()


def test_the_driver_is_told_of_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = ServerProcess(path)
    with nothing_left(), Client(path, reconnect_for=WAIT) as client:
        driver = Driver(client, Backing.memfd(2 * PAGE))
        driver.map()
        client.enable_interrupts(MSIX, driver.fds)
        driver.work()
        first.kill()
        wait_for(client.state_fd)
        with pytest.raises(ServerGoneError):
            client.bar(0).load(8, 8)
        with ServerProcess(path) as second:
            wait_for(client.state_fd)
            for call in (
                lambda: client.bar(0).load(8, 8),
                lambda: client.bar(0).post(8, b"1"),
                client.reset,
                client.bar(0).doorbells,
            ):
                with pytest.raises(DeviceRestartedError, match="set the device up again"):
                    call()
            assert client.wait_restart(WAIT) == Restored(2, 4)
            driver.work()
            second.kill()
            with ServerProcess(path):
                assert client.wait_restart(WAIT) == Restored(2, 4)
                driver.work()
        for fd in driver.fds:
            os.close(fd)
        driver.memory.close()


def test_no_server_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with nothing_left(), ServerProcess(path) as server, Client(path, reconnect_for=0.1) as client:
        server.kill()
        with pytest.raises(ServerGoneError, match="no vfio-user server"):
            client.wait_restart(WAIT)
        with pytest.raises(ServerGoneError):
            client.config.read(0, 4)
        with ServerProcess(path):
            assert client.reconnect(WAIT) == Restored(0, 0)
            assert client.config.load(0, 2) == 0x1234


def test_a_client_that_is_closed_while_it_waits(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with nothing_left(), ServerProcess(path) as server:
        client = Client(path, reconnect_for=1000)
        server.kill()
        wait_for(client.state_fd)
        waiting = Waiting(lambda: client.wait_restart(1000))
        client.close()
        with pytest.raises(AssertionError, match="closed"):
            waiting.end()
    with ServerProcess(path), Client(path) as other, pytest.raises(ValueError, match="by itself"):
        other.wait_restart(1)


def test_a_server_that_hangs_is_not_replaced(tmp_path: Path) -> None:
    """It still has the memory: its process must end."""
    path = tmp_path / "s"
    with ServerProcess(path) as hanging, Client(path, timeout=1) as client:
        target = VfioUserTarget(client)
        memory = Backing.memfd(PAGE)
        target.map_dma(DmaMapRequest(0, PAGE, memory.host_address, memory.fd))
        hanging.stop()
        with pytest.raises(ServerGoneError, match="did not answer"):
            client.config.read(0, 4)
        with pytest.raises(DmaError, match="end its process"):
            target.unmap_dma(0, PAGE)
        with pytest.raises(ServerGoneError, match="end its process"):
            client.reconnect()
        hanging.kill()
        with ServerProcess(path):
            # It was to be unmapped, so it is not brought back.
            assert client.reconnect(WAIT) == Restored(0, 0)
            target.unmap_dma(0, PAGE)


def test_another_device_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with ServerProcess(path) as first, Client(path) as client:
        first.kill()
        with ServerProcess(path, kind="other"), pytest.raises(DeviceError, match="another device"):
            client.reconnect(WAIT)
        with pytest.raises(ServerGoneError):
            client.config.read(0, 4)
        with ServerProcess(path):
            client.reconnect(WAIT)
            assert client.config.load(0, 2) == 0x1234


def test_a_server_that_refuses_what_the_last_one_had(tmp_path: Path) -> None:
    """The client is as before: nothing of it was brought back, and it can be tried again."""
    memory = Backing.memfd(2 * PAGE)
    with nothing_left(), HandServer() as first, first.client() as client:
        target = VfioUserTarget(client)
        for start in (0, PAGE):
            target.map_dma(
                DmaMapRequest(start, PAGE, memory.host_address + start, memory.fd, start)
            )
        first.hang_up()
        until(lambda: client.failure is not None)

        def refuse(server: HandServer, asked: Asked) -> Answer:
            (address,) = struct.unpack_from("<Q", asked.payload, 16)
            return Answer(b"", 12 if address else 0)

        servers = [HandServer({Command.DMA_MAP: refuse}), HandServer()]
        client._connect = lambda until: coming.pop(0)  # type: ignore[method-assign]
        coming = [server.other for server in servers]
        with servers[0] as second, servers[1] as third:
            with pytest.raises(DeviceError, match="refuses what it had before"):
                client.reconnect()
            assert [each.command for each in second.seen].count(Command.DMA_MAP) == 2
            with pytest.raises(ServerGoneError):
                client.config.read(0, 4)
            assert client.reconnect() == Restored(2, 0)
            mapped = [each.payload for each in third.seen if each.command == Command.DMA_MAP]
            assert [struct.unpack_from("<Q", each, 16)[0] for each in mapped] == [0, PAGE]


def test_a_region_manager_over_deaths(tmp_path: Path) -> None:
    path = tmp_path / "s"
    memory = Backing.memfd(4 * PAGE)
    with (
        ServerProcess(path) as first,
        Client(path, timeout=1) as client,
        RegionManager() as manager,
    ):
        low = manager.new_region("low", 0, 2 * PAGE)
        low.add_mapping(0, 2 * PAGE, memory)
        low.map()
        handle = manager.add_target(VfioUserTarget(client))
        first.kill()
        high = manager.new_region("high", 2 * PAGE, 2 * PAGE)
        high.add_mapping(0, 2 * PAGE, memory, 2 * PAGE)
        # Memory that the device must have and cannot: the operation is refused as a whole.
        with pytest.raises(DmaError, match="ENOTCONN"):
            high.map()
        assert not high.mapped
        assert handle.broken is None
        low.unmap()
        assert handle.broken is None
        with ServerProcess(path) as second:
            assert client.reconnect(WAIT) == Restored(0, 0)
            low.map()
            high.map()
            assert not handle.diff()
            second.stop()
            # A server that hangs has the memory still.
            with pytest.raises(DmaError):
                high.unmap()
            assert handle.broken is not None
            assert handle.stats().quarantined
            second.kill()
            with ServerProcess(path):
                assert client.reconnect(WAIT) == Restored(1, 0)
                assert not handle.retry()
                assert handle.broken is None
                high.map()
                assert not handle.diff()
                assert len(client._mapped) == 2


def test_the_pin_is_brought_back(tmp_path: Path) -> None:
    path = tmp_path / "s"
    pin, resample = events(2)
    with ServerProcess(path) as first, Client(path) as client:
        client.enable_interrupts(INTX, [pin])
        client.unmask_by(INTX, resample)
        first.kill()
        with ServerProcess(path):
            assert client.reconnect(WAIT) == Restored(0, 1)
            for vector in (0, 1):
                client.bar(0).store(0x30, vector, 4)
            assert wait_for(pin) == 1
            os.eventfd_write(resample, 1)
            assert wait_for(pin) == 1
