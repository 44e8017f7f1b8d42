"""A console device behind its socket: both directions, back-pressure, ports, and what is wrong."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestio.budgets import CONSOLE_INPUT, CONSOLE_OUTPUT, CONSOLE_PATIENCE, CONTROL_TURN
from guestio.virtio.console import (
    CONSOLE_PORT,
    DEVICE_ADD,
    DEVICE_READY,
    PORT_NAME,
    PORT_OPEN,
    PORT_READY,
    RESIZE,
    ConsoleDevice,
    ConsolePort,
)
from tests.kit.console_driver import CONTROL, PLACES, SLOTS, ConsoleDriver
from tests.kit.rings import WRITE, Desc
from tests.kit.serving import Serving, nothing_left, promptly, until, warnings_of


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection: the device's end and the reader's."""
    device, reader = socket.socketpair()
    device.setblocking(False)
    reader.settimeout(20)
    with device, reader:
        yield device, reader


def read_exactly(reader: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += reader.recv(count - len(data))
    return data


@contextlib.contextmanager
def served(tmp_path: Path, device: ConsoleDevice, **options: object) -> Iterator[Serving]:
    with Serving(device, tmp_path / "s", **options) as serving:
        yield serving
    device.close()


@pytest.mark.parametrize("queue_threads", [False, True], ids=["one thread", "queue threads"])
@pytest.mark.parametrize("iommu", [False, True], ids=["direct", "iommu"])
def test_a_line_each_way(
    tmp_path: Path, ends: tuple[socket.socket, socket.socket], iommu: bool, queue_threads: bool
) -> None:
    mine, reader = ends
    device = ConsoleDevice()
    device.ports[0].attach(mine.fileno(), mine.fileno())
    with (
        nothing_left(),
        served(tmp_path, device, queue_threads=queue_threads) as serving,
        ConsoleDriver(serving.path, iommu=iommu) as driver,
    ):
        driver.write(1, b"login: ")
        assert read_exactly(reader, 7) == b"login: "
        reader.send(b"root\n")
        assert driver.read(0, 5) == b"root\n"
        # A buffer that was there before, and one that comes in three pieces of memory.
        driver.post(0)
        reader.send(b"x")
        assert driver.received(0) == b"x"
        driver.write(1, b"one", b"two", b"three")
        assert read_exactly(reader, 11) == b"onetwothree"


def test_functions_instead_of_descriptors(tmp_path: Path) -> None:
    device = ConsoleDevice()
    got: list[bytes] = []
    device.ports[0].on_output(got.append)
    assert device.ports[0].send(b"typed ") == 6
    with served(tmp_path, device) as serving, ConsoleDriver(serving.path) as driver:
        assert device.ports[0].send(b"early") == 5
        assert driver.read(0, 11) == b"typed early"
        driver.write(1, b"x" * 8000, b"y" * 8000)
        until(lambda: b"".join(got) == b"x" * 8000 + b"y" * 8000)
        threads = [
            threading.Thread(target=device.ports[0].send, args=(bytes([65 + n]) * 100,))
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        data = driver.read(0, 800)
        for thread in threads:
            thread.join()
        assert sorted(data) == sorted(b"".join(bytes([65 + n]) * 100 for n in range(8)))


def test_a_function_that_raises_is_named_and_harms_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = ConsoleDevice()

    def fail(data: bytes) -> None:
        raise RuntimeError(f"no {data!r}")

    device.ports[0].on_output(fail)
    with served(tmp_path, device) as serving, ConsoleDriver(serving.path) as driver:
        driver.write(1, b"one")
        device.ports[0].send(b"still")
        assert driver.read(0, 5) == b"still"
        until(lambda: warnings_of(caplog))
    assert "the on_output callback of ConsoleDevice raised RuntimeError: no b'one'" in str(
        warnings_of(caplog)
    )


def test_the_size_is_in_the_configuration_and_its_changes_are_told(tmp_path: Path) -> None:
    device = ConsoleDevice(size=(100, 40))
    with served(tmp_path, device) as serving, ConsoleDriver(serving.path) as driver:
        frontend = driver.frontend
        assert frontend.get_config(0, 12) == struct.pack("<HHII", 100, 40, 1, 0)
        device.resize(132, 50)
        assert frontend.wait_config_change(10)
        assert frontend.get_config(0, 4) == struct.pack("<HH", 132, 50)
        for cols, rows in ((-1, 1), (1, 65536), (70000, 1)):
            with pytest.raises(ValueError, match="65535"):
                device.resize(cols, rows)
        assert frontend.get_config(0, 4) == struct.pack("<HH", 132, 50)


def test_a_driver_that_begins_is_told_of_the_size(tmp_path: Path) -> None:
    """Linux asks for it only when it is told that it changed."""
    device = ConsoleDevice()
    with served(tmp_path, device) as serving:
        for _ in range(2):
            with ConsoleDriver(serving.path) as driver:
                assert driver.frontend.config_changes == 0
                driver.post(0)
                assert driver.frontend.wait_config_change(10)
                driver.write(1, b"x")
                assert driver.frontend.wait_config_change(10, seen=1)
                driver.write(1, b"x")
                driver.post(0)
                driver.frontend.sync()
                assert driver.frontend.config_changes == 2
            serving.let_go()


def test_the_next_driver_is_told_of_the_size_without_a_reset(tmp_path: Path) -> None:
    """QEMU and User-mode Linux only stop the queues when a driver is unbound."""
    device = ConsoleDevice()
    with served(tmp_path, device) as serving, ConsoleDriver(serving.path) as driver:
        for life in range(3):
            driver.post(0)
            assert driver.frontend.wait_config_change(10, seen=2 * life)
            driver.write(1, b"x")
            assert driver.frontend.wait_config_change(10, seen=2 * life + 1)
            for index in (0, 1):
                driver.stop(index)
            for index in (0, 1):
                driver.add_queue(index)


def test_input_waits_for_a_guest_that_does_not_read(
    tmp_path: Path, ends: tuple[socket.socket, socket.socket]
) -> None:
    mine, writer = ends
    device = ConsoleDevice()
    port = device.ports[0]
    port.attach(mine.fileno(), mine.fileno())
    data = os.urandom(1 << 20)
    with served(tmp_path, device) as serving, ConsoleDriver(serving.path) as driver:
        thread = threading.Thread(target=writer.sendall, args=(data,))
        thread.start()
        until(lambda: len(port._in))
        # Nothing more is read, and the loop sleeps.
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.2
        assert len(port._in) <= CONSOLE_INPUT
        taken = port.send(b"z" * (2 << 20))
        assert len(port._in) == CONSOLE_INPUT
        got = b""
        while len(got) < len(data) + taken:
            driver.post(0, 8192, count=8)
            for _ in range(8):
                got += driver.received(0)
                if len(got) == len(data) + taken:
                    break
        assert got.replace(b"z" * taken, b"", 1) == data
        thread.join()


def test_a_reader_that_does_not_read_stops_a_port_and_nothing_else(
    tmp_path: Path, ends: tuple[socket.socket, socket.socket]
) -> None:
    mine, reader = ends
    device = ConsoleDevice(["log"])
    mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    device.ports[1].attach(mine.fileno(), mine.fileno())
    got: list[bytes] = []
    device.ports[0].on_output(got.append)
    with served(tmp_path, device) as serving, ConsoleDriver(serving.path, 2) as driver:
        sent = b""
        for number in range(40):
            data = bytes([65 + number % 26]) * 8000
            at = driver.write(5, data, wait=False)
            sent += data
            if not _soon(functools.partial(driver.done, 5, at)):
                break
        else:
            pytest.fail("output went on without a reader")
        assert len(device.ports[1]._out) <= CONSOLE_OUTPUT
        # The console is served meanwhile, and messages are answered.
        driver.write(1, b"alive")
        until(lambda: got == [b"alive"])
        driver.frontend.sync()
        assert device.ports[1].lost == 0
        time.sleep(1.2 * CONSOLE_PATIENCE)
        assert read_exactly(reader, len(sent)) == sent
        driver.write(5, b"on")
        assert read_exactly(reader, 2) == b"on"
        assert device.ports[1].lost == 0


def _soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.002)
    return False


def test_a_console_drops_output_when_its_reader_takes_none(
    tmp_path: Path,
    ends: tuple[socket.socket, socket.socket],
    caplog: pytest.LogCaptureFixture,
) -> None:
    mine, reader = ends
    device = ConsoleDevice()
    port = device.ports[0]
    mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    port.attach(mine.fileno(), mine.fileno())
    with served(tmp_path, device) as serving, ConsoleDriver(serving.path) as driver:
        for _ in range(64):
            driver.write(1, b"x" * 8000)
        until(lambda: port.lost > 0)
        assert port.lost < 64 * 8000
        reader.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while reader.recv(1 << 16):
                pass
        reader.settimeout(20)
        until(lambda: not port._dropping)
        driver.write(1, b"new")
        assert reader.recv(100).endswith(b"new")
    assert "port 0: its reader has taken nothing for 1 s" in warnings_of(caplog)[0]


def test_nothing_attached_drops_output(tmp_path: Path) -> None:
    device = ConsoleDevice(["p"])
    with served(tmp_path, device) as serving, ConsoleDriver(serving.path, 2) as driver:
        driver.write(1, b"into the void")
        driver.write(5, b"too")
        until(lambda: device.ports[0].lost == 13)
        until(lambda: device.ports[1].lost == 3)


def test_a_large_buffer_is_written_in_parts_and_given_back_at_a_stop(
    tmp_path: Path, ends: tuple[socket.socket, socket.socket]
) -> None:
    mine, reader = ends
    mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    device = ConsoleDevice(["p"])
    device.ports[1].attach(mine.fileno(), mine.fileno())
    room = 0x100000
    with served(tmp_path, device, stop_timeout=60) as serving:
        with ConsoleDriver(serving.path, 2) as driver:
            data = os.urandom(room)
            driver.memory.write(driver.SIZE - room, data)
            ring = driver.rings[5]
            ring.offer(ring.put_chain(0, Desc(driver.SIZE - room, room)))
            driver.handles[5].kick()
            assert read_exactly(reader, 100000) == data[:100000]
            assert not driver.done(5, 0)
            with promptly(1.0):
                assert driver.stop(5) == 1
            assert driver.done(5, 0)
        serving.let_go()
        lost = device.ports[1].lost
        assert 0 < lost < room
        assert read_exactly(reader, room - lost - 100000) == data[100000 : room - lost]
        with ConsoleDriver(serving.path, 2) as driver:
            driver.write(5, b"again")


def test_memory_that_is_taken_away_from_a_buffer_that_is_being_written(
    tmp_path: Path,
    ends: tuple[socket.socket, socket.socket],
    caplog: pytest.LogCaptureFixture,
) -> None:
    mine, reader = ends
    mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    device = ConsoleDevice(["p"])
    port = device.ports[1]
    port.attach(mine.fileno(), mine.fileno())
    got: list[bytes] = []
    device.ports[0].on_output(got.append)
    room = 0x80000
    with (
        served(tmp_path, device, stop_timeout=0.2) as serving,
        ConsoleDriver(serving.path, 2, iommu=True) as driver,
    ):
        place = driver.at(driver.SIZE - room)
        ring = driver.rings[5]
        ring.offer(ring.put_chain(0, Desc(place, room)))
        driver.handles[5].kick()
        until(lambda: port._chain is not None)
        # Its reader reads nothing: the buffer is held, and given up after a while.
        driver.frontend.iotlb.unmap((place, room))
        driver.wait(5, 0)
        driver.write(1, b"alive")
        until(lambda: got == [b"alive"])
        seen = b""
        until(lambda: port._chain is None or not reader.recv(1 << 16))
        driver.write(5, b"after it", wait=False)
        while not seen.endswith(b"after it"):
            seen += reader.recv(1 << 16)
    assert "ConsoleDevice" in str(warnings_of(caplog))


def test_ports_are_introduced(tmp_path: Path) -> None:
    device = ConsoleDevice(["org.example.agent", "log"], size=(90, 30))
    device.ports[2].on_output(lambda data: None)
    with served(tmp_path, device) as serving, ConsoleDriver(serving.path, 3) as driver:
        assert driver.frontend.get_config(0, 12) == struct.pack("<HHII", 90, 30, 3, 0)
        assert driver.set_up(3) == {
            0: [
                (CONSOLE_PORT, 1, b""),
                (RESIZE, 0, struct.pack("<HH", 90, 30)),
                (PORT_NAME, 1, b"console"),
                (PORT_OPEN, 1, b""),
            ],
            1: [(PORT_NAME, 1, b"org.example.agent"), (PORT_OPEN, 0, b"")],
            2: [(PORT_NAME, 1, b"log"), (PORT_OPEN, 1, b"")],
        }
        device.resize(91, 31)
        assert driver.told() == (0, RESIZE, 0, struct.pack("<HH", 91, 31))


def test_a_port_takes_input_once_the_guest_has_opened_it(tmp_path: Path) -> None:
    device = ConsoleDevice(["p"])
    with served(tmp_path, device) as serving, ConsoleDriver(serving.path, 2) as driver:
        driver.set_up(2)
        driver.post(4)
        device.ports[1].send(b"early")
        driver.frontend.sync()
        time.sleep(0.05)
        assert not driver.done(4, 0)
        driver.control(1, PORT_OPEN, 1)
        assert driver.received(4) == b"early"
        driver.control(1, PORT_OPEN, 0)
        device.ports[1].send(b"late")
        driver.post(4)
        driver.frontend.sync()
        assert not driver.done(4, 1)


def test_clients_of_a_socket_come_and_go(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "tty"))
    listener.listen()
    device = ConsoleDevice(["p"])
    device.ports[1].listen(listener)

    def connect() -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(tmp_path / "tty"))
        client.settimeout(20)
        return client

    with served(tmp_path, device) as serving, ConsoleDriver(serving.path, 2) as driver:
        driver.set_up(2)
        driver.control(1, PORT_OPEN, 1)
        for round_number in range(3):
            with connect() as client:
                assert driver.told() == (1, PORT_OPEN, 1, b"")
                driver.write(5, b"hello %d" % round_number)
                assert client.recv(100) == b"hello %d" % round_number
                client.send(b"and back")
                assert driver.read(4, 8) == b"and back"
                with connect() as second:
                    assert second.recv(1) == b""  # refused
                driver.write(5, b"still")
                assert client.recv(100) == b"still"
            assert driver.told() == (1, PORT_OPEN, 0, b"")
        # One that has hung up unnoticed, as the guest does not read, makes way.
        first = connect()
        assert driver.told() == (1, PORT_OPEN, 1, b"")
        driver.control(1, PORT_OPEN, 0)
        first.sendall(b"x" * CONSOLE_INPUT)
        first.close()
        with connect() as second:
            driver.write(5, b"welcome")
            assert second.recv(100) == b"welcome"


def test_a_pseudoterminal(tmp_path: Path) -> None:
    device = ConsoleDevice()
    path = device.ports[0].open_pty()
    with (
        served(tmp_path, device) as serving,
        ConsoleDriver(serving.path) as driver,
        Path(path).open("r+b", buffering=0) as terminal,
    ):
        driver.write(1, b"login: ")
        assert terminal.read(100) == b"login: "
        terminal.write(b"root\r")
        assert driver.read(0, 5) == b"root\r"


def test_a_regular_file_as_input_ends_and_output_goes_on(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"script\n" * 3000)
    device = ConsoleDevice()
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as sink:
        device.ports[0].attach(source.fileno(), sink.fileno())
        with served(tmp_path, device) as serving, ConsoleDriver(serving.path) as driver:
            assert driver.read(0, 21000) == b"script\n" * 3000
            driver.write(1, b"done")
            until(lambda: (tmp_path / "out").read_bytes() == b"done")


def test_a_driver_comes_again_and_input_waits_for_it(tmp_path: Path) -> None:
    device = ConsoleDevice(["p"])
    with served(tmp_path, device) as serving:
        for round_number in range(3):
            with ConsoleDriver(serving.path, 2) as driver:
                device.ports[0].send(b"for the next %d" % round_number)
                assert driver.read(0, 14) == b"for the next %d" % round_number
                driver.set_up(2)
                for index in (0, 2, 4):
                    driver.post(index, count=8)
                # Buffers that are not used are there again.
                assert driver.stop(4) == 0
                driver.start(4)
                driver.control(1, PORT_OPEN, 1)
                device.ports[1].send(b"restarted")
                assert driver.received(4) == b"restarted"
            serving.let_go()


@pytest.mark.parametrize("size", [*range(8), 9, 100, 8000])
def test_control_messages_of_any_size(
    tmp_path: Path, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    device = ConsoleDevice(["p"])
    with served(tmp_path, device) as serving, ConsoleDriver(serving.path, 2) as driver:
        message = CONTROL.pack(0, DEVICE_READY, 1) + bytes(8000)
        driver.write(3, message[: size or 1]) if size else driver.run_raw(
            3, Desc(PLACES, 100, WRITE)
        )
        driver.seen[2] = driver.rings[2].used_idx
        driver.control(0, DEVICE_READY, 1)
        assert driver.told() == (0, DEVICE_ADD, 1, b"")
        assert serving.stats.failed_requests == (size < 8)
    if size < 8:
        assert f"a control message of {size} bytes; it has 8" in warnings_of(caplog)[0]


@pytest.mark.parametrize(
    "message",
    [
        (2, PORT_READY, 1),
        (0xFFFFFFFF, PORT_OPEN, 1),
        (1, DEVICE_ADD, 1),
        (0, 77, 1),
        (1, 0xFFFF, 0xFFFF),
        (0, CONSOLE_PORT, 1),
    ],
)
def test_control_messages_that_make_no_sense(
    tmp_path: Path, message: tuple[int, int, int], caplog: pytest.LogCaptureFixture
) -> None:
    device = ConsoleDevice(["p"])
    with served(tmp_path, device) as serving, ConsoleDriver(serving.path, 2) as driver:
        driver.control(*message)
        assert serving.stats.failed_requests == 1
        driver.set_up(2)
    assert "ConsoleDevice.process" in warnings_of(caplog)[0]


def test_control_buffers_that_are_too_small_lose_no_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = ConsoleDevice(["p"])
    with served(tmp_path, device) as serving, ConsoleDriver(serving.path, 2) as driver:
        for room in (1, 7, 8):
            driver.post(2, room)
        driver.control(0, DEVICE_READY, 1)
        assert driver.received(2) == driver.received(2) == b""
        assert CONTROL.unpack(driver.received(2)) == (0, DEVICE_ADD, 1)
        # A buffer that cannot be written at all.
        driver.run_raw(2, Desc(PLACES, 100))
        driver.seen[2] += 1
        assert driver.told() == (1, DEVICE_ADD, 1, b"")
    assert "buffer for control messages has 1 bytes; 8 are needed" in warnings_of(caplog)[0]


def test_a_driver_that_repeats_itself_costs_nothing(tmp_path: Path) -> None:
    device = ConsoleDevice(["p", "q"])
    with served(tmp_path, device) as serving, ConsoleDriver(serving.path, 3) as driver:
        for _ in range(20):
            message = CONTROL.pack(0, DEVICE_READY, 1)
            driver.write(3, *[message] * 4)
            driver.write(3, *[CONTROL.pack(1, PORT_READY, 1)] * 4)
        until(lambda: len(device._pending) == 5)
        assert len(device._pending) < CONTROL_TURN


def test_buffers_of_one_byte_and_of_none(tmp_path: Path) -> None:
    device = ConsoleDevice()
    got: list[bytes] = []
    device.ports[0].on_output(got.append)
    with served(tmp_path, device) as serving, ConsoleDriver(serving.path) as driver:
        driver.post(0, 1, count=3)
        device.ports[0].send(b"abc")
        assert [driver.received(0) for _ in range(3)] == [b"a", b"b", b"c"]
        # A receive buffer that is only readable has no room, and is given back.
        device.ports[0].send(b"d")
        assert driver.run_raw(0, Desc(PLACES, 10))[1] == 0
        driver.seen[0] += 1
        driver.post(0, 1)
        assert driver.received(0) == b"d"
        # A transmit buffer that is only writable says nothing.
        assert driver.run_raw(1, Desc(PLACES, 10, WRITE))[1] == 0
        driver.seen[1] += 1
        driver.write(1, b"x")
        until(lambda: b"".join(got) == b"x")


def test_buffers_that_are_nowhere(tmp_path: Path) -> None:
    device = ConsoleDevice()
    got: list[bytes] = []
    device.ports[0].on_output(got.append)
    with served(tmp_path, device) as serving, ConsoleDriver(serving.path) as driver:
        assert driver.run_raw(1, Desc(driver.SIZE, 10))[1] == 0
        device.ports[0].send(b"kept")
        assert driver.run_raw(0, Desc(driver.SIZE, 10, WRITE))[1] == 0
        driver.seen[0] += 1
        assert driver.read(0, 4) == b"kept"
        driver.write(1, b"on")
        until(lambda: got == [b"on"])


def test_a_ring_that_is_refilled_as_fast_as_it_is_emptied_keeps_nothing_waiting(
    tmp_path: Path,
) -> None:
    device = ConsoleDevice()
    device.ports[0].on_output(lambda data: None)
    stop = threading.Event()
    with served(tmp_path, device) as serving, ConsoleDriver(serving.path) as driver:

        def flood() -> None:
            ring = driver.rings[1]
            while not stop.is_set():
                while (ring.offered - ring.used_idx) & 0xFFFF < 8:
                    ring.offer(ring.put_chain(ring.offered % SLOTS, Desc(PLACES, 1)))
                driver.handles[1].kick()

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            until(lambda: driver.rings[1].used_idx > 100)
            for _ in range(20):
                driver.frontend.sync()
                device.ports[0].send(b"x")
                assert driver.read(0, 1) == b"x"
        finally:
            stop.set()
            thread.join()


def test_descriptors_of_the_users_that_are_closed_too_early(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = ConsoleDevice()
    ended = threading.Event()
    reading, writing = os.pipe()
    device.ports[0].attach(None, writing, ended=ended.set)
    os.close(reading)
    with served(tmp_path, device) as serving, ConsoleDriver(serving.path) as driver:
        driver.write(1, b"no one")
        assert ended.wait(20)
        assert not device.ports[0].connected
        driver.write(1, b"listens")
        until(lambda: device.ports[0].lost == 7)
    os.close(writing)


@pytest.mark.parametrize(
    ("ports", "options", "complaint"),
    [
        ([""], {}, "port name ''"),
        (["x" * 129], {}, "port name"),
        (["a\0b"], {}, "port name"),
        (["a", "a"], {}, "not all different"),
        (["console"], {}, "not all different"),
        ([], {"size": (80, 70000)}, "70000 rows"),
        ([], {"size": (-1, 25)}, "-1 columns"),
    ],
)
def test_arguments(ports: list[str], options: dict[str, tuple[int, int]], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ConsoleDevice(ports, **options)


def test_a_port_says_what_it_is() -> None:
    device = ConsoleDevice(["log"])
    assert repr(device.ports[1]) == "<ConsolePort 1 'log': port, 0 bytes lost>"
    assert isinstance(device.ports[0], ConsolePort)
    assert device.num_queues == 6
    assert device.device_queues == {0, 1, 2, 4, 5}
    assert ConsoleDevice().num_queues == 2
