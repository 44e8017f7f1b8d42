"""What the unit tests of rust-vmm's vhost-device assert, asserted of the devices here.

Repository: https://github.com/rust-vmm/vhost-device, ``vhost-device-console``, ``-rng`` and
``-input``. Each test names those that it comes from; `README.md` here has them all.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestio.errors import DeviceError
from guestio.testing import Driver, Shape, serving
from guestio.vhost_user import Backend
from guestio.virtio import AbsInfo, ConsoleDevice, EntropyDevice, InputDevice
from guestio.virtio.console import (
    CONSOLE_PORT,
    CONTROL_RECEIVE,
    CONTROL_TRANSMIT,
    DEVICE_ADD,
    DEVICE_READY,
    F_MULTIPORT,
    PORT_NAME,
    PORT_OPEN,
    PORT_READY,
)
from tests.kit.hand_guest import EVENT_IDX, INDIRECT_DESC, VERSION_1, Remote, remote
from tests.kit.rings import WRITE, Desc
from tests.kit.serving import Serving, until

CONTROL = struct.Struct("<IHH")
EVENT = struct.Struct("<HHi")


@pytest.fixture
def console() -> Iterator[ConsoleDevice]:
    device = ConsoleDevice(["agent"])
    yield device
    device.close()


def nothing_is_used(device: object, queues: int, features: int) -> None:
    """Kicks of queues in which nothing is do nothing."""
    with remote(device, VERSION_1 | features) as (frontend, memory):  # type: ignore[arg-type]
        rings = []
        for index in range(queues):
            step = 0x1000 * index
            rings.append(
                Remote(
                    *(frontend, memory),
                    index=index,
                    desc=0x1000 + step,
                    avail=0x1200 + step,
                    used=0x1400 + step,
                )
            )
            rings[-1].handle.kick()
        frontend.sync()
        assert [ring.used_idx for ring in rings] == [0] * queues
        assert not any(ring.handle.failed() for ring in rings)


class TestConsole:
    """``vhost-device-console/src/vhu_console.rs``."""

    @pytest.mark.parametrize("features", [0, EVENT_IDX | F_MULTIPORT])
    def test_kicks_of_empty_queues(self, console: ConsoleDevice, features: int) -> None:
        """From ``vhu_console.rs::test_virtio_console_empty_handle_request``.

        And ``vhu_console.rs::test_virtio_console_empty_requests``.
        """
        nothing_is_used(console, 4, features)

    def test_messages_to_the_driver(self, console: ConsoleDevice) -> None:
        """From ``vhu_console.rs::test_virtio_console_ctrl_rx_request``."""
        with (
            serving(console) as path,
            Driver(path, features=F_MULTIPORT, queues=6) as driver,
        ):
            useless = driver.send(bytes(0x200), queue=CONTROL_RECEIVE)
            buffers = [driver.post(0x200, queue=CONTROL_RECEIVE) for _ in range(8)]
            driver.request(CONTROL.pack(0, DEVICE_READY, 1), 0, queue=CONTROL_TRANSMIT)
            assert driver.wait(useless).written == 0, "it has no room, and costs no message"
            added = [driver.wait(each).data for each in buffers[:2]]
            assert added == [CONTROL.pack(i, DEVICE_ADD, 1) for i in range(2)]
            driver.request(CONTROL.pack(1, PORT_READY, 1), 0, queue=CONTROL_TRANSMIT)
            named = driver.wait(buffers[2]).data
            assert named == CONTROL.pack(1, PORT_NAME, 1) + b"agent"

    def test_messages_of_the_driver(self, tmp_path: Path, console: ConsoleDevice) -> None:
        """From ``vhu_console.rs::test_virtio_console_ctrl_tx_request``.

        And ``vhu_console.rs::test_virtio_console_handle_control_msg``. One that makes no sense
        ends with an error there, here it is given back, logged and counted.
        """
        nonsense = [
            CONTROL.pack(0, PORT_READY, 1)[:2],
            CONTROL.pack(0, CONSOLE_PORT, 1),
            CONTROL.pack(9, PORT_OPEN, 1),
        ]
        with (
            Serving(console, tmp_path / "s") as served,
            Driver(served.path, features=F_MULTIPORT, queues=6) as driver,
        ):
            assert driver.request(b"", 0x200, queue=CONTROL_TRANSMIT) == b""
            for message in nonsense:
                assert driver.request(message, 0, queue=CONTROL_TRANSMIT) == b""
            assert not console.ports[0].ready
            assert served.stats.failed_requests == 1 + len(nonsense)
            for event in (PORT_OPEN, DEVICE_READY, PORT_READY):
                driver.request(CONTROL.pack(0, event, 1), 0, queue=CONTROL_TRANSMIT)
            assert console.ports[0].ready
            assert console.ports[0].guest_open

    def test_output_to_a_callback(self, console: ConsoleDevice) -> None:
        """From ``vhu_console.rs::test_virtio_console_tx_request``."""
        output = bytearray()
        console.ports[0].on_output(output.extend)
        with serving(console) as path, Driver(path) as driver:
            driver.wait(driver.send(bytes(0x200), queue=1))
            driver.wait(driver.send(b"Hello!", queue=1))
            until(lambda: output == bytes(0x200) + b"Hello!")

    def test_output_to_a_client_and_input_from_it(
        self, tmp_path: Path, console: ConsoleDevice
    ) -> None:
        """From ``vhu_console.rs::test_virtio_console_tx_request_network``.

        And ``vhu_console.rs::test_virtio_console_tcp_console_read_func``,
        ``vhu_console.rs::test_virtio_console_tcp_console_write_func``.
        """
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "tty"))
        listener.listen()
        console.ports[0].listen(listener)
        with (
            serving(console) as path,
            Driver(path) as driver,
            socket.socket(socket.AF_UNIX) as client,
        ):
            client.settimeout(20)
            client.connect(str(tmp_path / "tty"))
            client.send(b"H")
            assert driver.wait(driver.post(8, queue=0)).data == b"H"
            driver.wait(driver.send(b"Hello!", queue=1))
            assert client.recv(64) == b"Hello!"

    def test_input(self, console: ConsoleDevice) -> None:
        """From ``vhu_console.rs::test_virtio_console_rx_request``."""
        with serving(console) as path, Driver(path) as driver:
            useless = driver.send(bytes(0x200), queue=0)
            console.ports[0].send(b"Hello!")
            assert driver.wait(useless).written == 0
            assert driver.wait(driver.post(0x200, queue=0)).data == b"Hello!"

    def test_input_from_a_descriptor(self, console: ConsoleDevice) -> None:
        """From ``vhu_console.rs::test_virtio_console_start_nested_console_thread``."""
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        console.ports[0].attach(reading, None, owned=(reading,))
        with serving(console) as path, Driver(path) as driver:
            os.write(writing, b"H")
            assert driver.wait(driver.post(8, queue=0)).data == b"H"
        os.close(writing)


@pytest.fixture
def source() -> Iterator[tuple[EntropyDevice, int]]:
    """A device whose bytes come from a pipe."""
    reading, writing = os.pipe()
    device = EntropyDevice(f"/proc/self/fd/{reading}")
    os.close(reading)
    yield device, writing
    device.close()


class TestRng:
    """``vhost-device-rng/src/vhu_rng.rs``."""

    def test_several_descriptors_are_filled(self) -> None:
        """From ``vhu_rng.rs::verify_chain_descriptors``: refused there; framing is free here."""
        device = EntropyDevice()
        with serving(device) as path, Driver(path) as driver:
            got = driver.request(b"", 0x800, shape=Shape(writable=(0x200, 0x200, 0x200)))
            assert len(got) == 0x800
            assert all(any(got[at : at + 0x200]) for at in range(0, 0x800, 0x200))
        device.close()

    def test_what_is_to_be_read_gets_nothing(self) -> None:
        """From ``vhu_rng.rs::verify_chain_descriptors``."""
        device = EntropyDevice()
        with remote(device) as (frontend, memory):
            ring = Remote(frontend, memory)
            ring.offer(ring.put_chain(0, Desc(0x8000, 0x200)))
            ring.wait()
            assert ring.used_entry(0) == (0, 0)
            assert memory.read(0x8000, 0x200) == bytes(0x200)
        device.close()

    def test_a_source_that_fails(self, source: tuple[EntropyDevice, int]) -> None:
        """From ``vhu_rng.rs::verify_file_access``: that request fails, and nothing else."""
        device, writing = source
        with serving(device) as path, Driver(path) as driver:
            os.write(writing, b"\xaa" * 64)
            assert driver.request(b"", 64) == b"\xaa" * 64
            os.close(writing)
            assert driver.request(b"", 64) == b""
            assert driver.request(b"", 64) == b""

    @pytest.mark.parametrize("features", [0, EVENT_IDX])
    def test_kicks_of_an_empty_queue(self, features: int) -> None:
        """From ``vhu_rng.rs::verify_handle_event``."""
        device = EntropyDevice()
        nothing_is_used(device, 1, features)
        device.close()

    def test_fewer_bytes_than_there_is_room_for(self, source: tuple[EntropyDevice, int]) -> None:
        """From ``vhu_rng.rs::verify_backend``."""
        device, writing = source
        with serving(device) as path, Driver(path) as driver:
            os.write(writing, b"\xaa" * 0x100)
            assert driver.request(b"", 0x200) == b"\xaa" * 0x100
        os.close(writing)

    def test_what_it_offers(self) -> None:
        """From ``vhu_rng.rs::verify_backend``: NOTIFY_ON_EMPTY is not offered, it is of legacy."""
        device = EntropyDevice()
        with remote(device, indirect="on") as (frontend, _):
            offered = frontend.offered
            assert offered & 0xFFFF_FFFF == EVENT_IDX | INDIRECT_DESC
            assert offered & VERSION_1
            assert frontend.queue_count() == 1
        device.close()

    def test_what_cannot_be_served(self, tmp_path: Path) -> None:
        """From ``vhost-device-rng/src/main.rs::verify_start_backend``."""
        with pytest.raises(DeviceError, match="cannot be opened"):
            EntropyDevice("/invalid/path")
        device = EntropyDevice()
        with pytest.raises(DeviceError):
            Backend(device, "/invalid/path/socket")
        device.close()


class TestInput:
    """``vhost-device-input/src/vhu_input.rs``."""

    def test_without_events_nothing_is_used(self) -> None:
        """From ``vhu_input.rs::verify_process_event``.

        And ``vhu_input.rs::verify_handle_event``: without EVENT_IDX it is refused there.
        """
        nothing_is_used(InputDevice.keyboard(), 2, 0)
        with remote(InputDevice.keyboard()) as (frontend, memory):
            ring = Remote(frontend, memory)
            ring.offer(ring.put_chain(0, Desc(0x8000, 8, WRITE)))
            ring.handle.kick()
            frontend.sync()
            assert ring.used_idx == 0

    def test_two_events_for_two_buffers(self) -> None:
        """From ``vhu_input.rs::verify_chain_descriptors``.

        What comes while the queue is not ready is dropped there; here it waits for the queue.
        """
        device = InputDevice.keyboard()
        with serving(device) as path, Driver(path, queues=2) as driver:
            driver.pause()
            assert device.press("KEY_A")
            driver.resume()
            buffers = [driver.post(8) for _ in range(2)]
            assert [EVENT.unpack(driver.wait(each).data) for each in buffers] == [
                (1, 30, 1),
                (0, 0, 0),
            ]

    def test_a_report_comes_in_parts_if_buffers_lack(self) -> None:
        """Beside ``vhu_input.rs::verify_chain_descriptors``: there the rest is dropped."""
        device = InputDevice.pointer()
        with serving(device) as path, Driver(path, queues=2) as driver:
            assert device.send(("REL_X", 1), ("REL_Y", 2))
            expected = [(2, 0, 1), (2, 1, 2), (0, 0, 0)]
            for event in expected:
                assert EVENT.unpack(driver.wait(driver.post(8)).data) == event

    def test_what_the_configuration_says(self) -> None:
        """From ``vhu_input.rs::verify_get_dev_ids_config``.

        And ``vhu_input.rs::verify_get_name_config``, ``vhu_input.rs::verify_get_event_config``.
        """
        device = InputDevice(
            "a device",
            ["KEY_A", "REL_X", "MSC_SCAN", "SW_LID"],
            absolute={"ABS_Y": AbsInfo(0, 9)},
        )
        with remote(device) as (frontend, _):

            def ask(select: int, subsel: int = 0) -> tuple[bytes, bytes]:
                frontend.set_config(0, bytes([select, subsel]))
                space = frontend.get_config(0, 136)
                assert space[3:8] == bytes(5)
                assert space[8 + space[2] :] == bytes(128 - space[2])
                return space[:2], space[8 : 8 + space[2]]

            assert ask(1) == (b"\1\0", b"a device")
            assert ask(3)[1] == struct.pack("<HHHH", 6, 0, 0, 1), "bus, vendor, product, version"
            bits = {1: 1 << 30, 2: 1, 3: 2, 4: 1 << 4, 5: 1}
            for kind, mask in bits.items():
                assert int.from_bytes(ask(0x11, kind)[1], "little") == mask
            # What it has not is empty; what was asked for stays, and is zeroed there.
            assert ask(0x11, 6) == (b"\x11\6", b"")
            assert ask(0x77) == (b"\x77\0", b"")

    def test_what_it_offers(self) -> None:
        """From ``vhu_input.rs::verify_backend``."""
        with remote(InputDevice.keyboard(), indirect="on") as (frontend, _):
            offered = frontend.offered
            assert offered & 0xFFFF_FFFF == EVENT_IDX | INDIRECT_DESC
            assert offered & VERSION_1
            assert frontend.queue_count() == 2

    def test_a_socket_that_cannot_be(self) -> None:
        """From ``vhost-device-input/src/main.rs::test_fail_listener``."""
        with pytest.raises(DeviceError):
            Backend(InputDevice.keyboard(), "/invalid/path")
