"""What each device of guestio takes along when its guest moves, and what it does not believe."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest

from guestio.addr import Permissions
from guestio.errors import CannotResolveError, DeviceError, ProtocolError
from guestio.memory import GuestRegionCollection
from guestio.vhost_user import Frontend
from guestio.vhost_user.frontend import RefusedError
from guestio.virtio import saved
from guestio.virtio.console import PORT_OPEN, RESIZE, ConsoleDevice
from guestio.virtio.input import InputDevice
from guestio.virtio.iommu import Status, VirtioIommu, wire
from guestio.virtio.net import NetDevice
from guestio.virtio.net.features import ACK_OK, Class, LinkStatus, Net
from tests.kit.console_driver import ConsoleDriver
from tests.kit.iommu_driver import MSI, LedgerTarget, attach, map_, send, unmap
from tests.kit.net_driver import MAC, MODERN, PEER, Mirror, NetGuest, frame, wait_quiet
from tests.kit.rings import PAGE
from tests.kit.serving import WAIT, Driver, Serving, until
from tests.vhost_user.test_input import KEY, REPORT, InputDriver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from guestio.virtio.device import Device

ANNOUNCING = int(MODERN | Net.CTRL_MAC_ADDR | Net.GUEST_ANNOUNCE)
NEW_MAC = b"\x52\x54\x00\xaa\xbb\xcc"


def go_to(driver: Driver | NetGuest, path: Path, stopped: dict[int, int]) -> None:
    """Leave a back-end whose queues have stopped for another one, with the device's state."""
    state = driver.frontend.save_state()
    features = driver.frontend.features
    driver.frontend.close()
    driver.frontend = Frontend(path, timeout=WAIT)
    driver.frontend.negotiate(features)
    driver.frontend.set_memory(driver.memory)
    driver.map_memory()
    driver.frontend.load_state(state)
    go_on(driver, stopped)


def go_on(driver: Driver | NetGuest, stopped: dict[int, int]) -> None:
    for index, base in stopped.items():
        if isinstance(driver, NetGuest):
            layout = driver.queues[index].layout
            driver.handles[index] = driver.frontend.start_queue(index, layout, base=base)
        else:
            driver.start(index, base)


def stop(driver: Driver | NetGuest) -> dict[int, int]:
    stopped = {index: driver.frontend.stop_queue(index) for index in list(driver.handles)}
    driver.handles.clear()
    return stopped


def pause(driver: Driver | NetGuest) -> None:
    """What QEMU does when its guest stands still for a while."""
    stopped = stop(driver)
    driver.frontend.set_status(0)
    go_on(driver, stopped)


@contextlib.contextmanager
def two(make: Callable[[], Device], directory: Path, **options: Any) -> Iterator[tuple[Any, ...]]:
    """Two devices and where each is served."""
    with contextlib.ExitStack() as stack:
        devices = [make(), make()]
        for device in devices:
            stack.callback(device.close)
        paths = [
            stack.enter_context(Serving(device, directory / name, **options)).path
            for device, name in zip(devices, "ab", strict=True)
        ]
        yield *devices, *paths


def refusal(device: Device, state: bytes) -> str:
    """Why a device does not take a state."""
    with pytest.raises(DeviceError) as refused:
        device.restore(state)
    return str(refused.value)


def other(state: bytes, **fields: object) -> bytes:
    """A state with other fields; None for none of that name."""
    known = json.loads(state) | fields
    return json.dumps({name: value for name, value in known.items() if value is not None}).encode()


def check_fields(device: Device, wrong: dict[str, list[object]]) -> None:
    """Every field of a state is looked at before anything changes."""
    state = device.save()
    assert set(wrong) == set(json.loads(state)), "a field that is not tried"
    for name, values in wrong.items():
        for value in (None, *values, 1.5, {"a": 1}, [[[]]], "\ud800"):
            said = refusal(device, other(state, **{name: value}))
            assert name in said or "state is of" in said, said
            assert device.save() == state
    for nonsense in (b"", b"[]", b"\xff", b"[" * 100_000, b'{"a":' * 5000, b"1" * 5000):
        refusal(device, nonsense)
    assert device.save() == state


class TestNet:
    @pytest.fixture(params=[False, True], ids=["one thread", "queue threads"])
    def cards(self, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Any, ...]]:
        with two(
            lambda: NetDevice(Mirror(), mac=MAC), tmp_path, queue_threads=request.param
        ) as made:
            yield made

    @staticmethod
    def choose(guest: NetGuest) -> None:
        """Have the card filter: an address, a group, and no broadcast."""
        group = b"\x33\x33\x00\x00\x00\x01"
        table = struct.pack("<I", 0) + struct.pack("<I", 1) + group
        for kind, command, data in (
            (Class.MAC, 1, NEW_MAC),
            (Class.RX, 0, b"\0"),
            (Class.RX, 5, b"\1"),
            (Class.MAC, 0, table),
        ):
            assert guest.control(kind, command, data) == ACK_OK

    @staticmethod
    def check_filter(guest: NetGuest, device: NetDevice) -> None:
        guest.post(*[200] * 3)
        for to in (MAC, b"\xff" * 6, NEW_MAC, b"\x33\x33\x00\x00\x00\x01"):
            device._deliver(0, frame(to=to))
        for to in (NEW_MAC, b"\x33\x33\x00\x00\x00\x01"):
            assert guest.receive()[1][:6] == to

    def test_filters_go_along_and_the_driver_announces_itself(self, cards: tuple[Any, ...]) -> None:
        here, there, a, b = cards
        with NetGuest(a, features=ANNOUNCING) as guest:
            guest.post(*[200] * 2)
            self.choose(guest)
            self.check_filter(guest, here)
            stopped = stop(guest)
            guest.frontend.set_status(0)
            go_to(guest, b, stopped)
            self.check_filter(guest, there)
            assert guest.frontend.wait_config_change(WAIT)
            mac, status = struct.unpack("<6sH", guest.frontend.get_config(0, 8))
            assert (mac, status) == (NEW_MAC, LinkStatus.LINK_UP | LinkStatus.ANNOUNCE)
            assert guest.control(Class.ANNOUNCE, 0) == ACK_OK
            assert guest.frontend.get_config(6, 1)[0] == LinkStatus.LINK_UP
            assert there._port.seen == []

    def test_a_driver_that_cannot_is_announced(self, cards: tuple[Any, ...]) -> None:
        _, there, a, b = cards
        with NetGuest(a) as guest:
            guest.post(200)
            stopped = stop(guest)
            go_to(guest, b, stopped)
            guest.post(200)
            until(lambda: there._port.seen)
            (rarp,) = there._port.seen
            assert rarp[:14] == b"\xff" * 6 + MAC + b"\x80\x35"

    def test_one_whose_address_is_not_the_cards_is_not(self, cards: tuple[Any, ...]) -> None:
        """QEMU's virtio-net has an address of its own, and announces that."""
        _, there, a, b = cards
        with NetGuest(a, features=int((MODERN | Net.MRG_RXBUF) & ~Net.MAC)) as guest:
            guest.post(200)
            go_to(guest, b, stop(guest))
            guest.post(200)
            guest.send(frame(to=PEER, of=MAC))
            assert there._port.seen == [frame(to=PEER, of=MAC)]

    def test_after_a_pause_all_is_as_before(self, cards: tuple[Any, ...]) -> None:
        here, _, a, _ = cards
        with NetGuest(a, features=ANNOUNCING) as guest:
            guest.post(*[200] * 2)
            self.choose(guest)
            self.check_filter(guest, here)
            pause(guest)
            self.check_filter(guest, here)
            assert guest.frontend.get_config(0, 8) == NEW_MAC + b"\1\0"
            assert here._port.seen == []

    def test_the_link_goes_along(self, cards: tuple[Any, ...]) -> None:
        here, there, a, b = cards
        with NetGuest(a) as guest:
            guest.post(200)
            here.link = False
            go_to(guest, b, stop(guest))
            assert not there.link
            assert guest.frontend.get_config(6, 2) == bytes(2)
            guest.send(frame(to=PEER, of=MAC))
            assert there._port.seen == []

    def test_a_link_that_is_another_one_is_told(self, cards: tuple[Any, ...]) -> None:
        """The cable of the source was gone, that of the destination is there."""
        here, there, a, b = cards
        with NetGuest(a) as guest:
            guest.post(200)
            here._gone = True
            here._apply_link()
            go_to(guest, b, stop(guest))
            assert there.link
            assert guest.frontend.wait_config_change(WAIT)

    def test_a_front_end_has_an_address_announced(self, cards: tuple[Any, ...]) -> None:
        """As QEMU does for guests that do not know how."""
        here, _, a, _ = cards
        with NetGuest(a) as guest:
            guest.post(200)
            guest.frontend.send_rarp(NEW_MAC)
            until(lambda: here._port.seen)
            pair = NEW_MAC + bytes(4)
            head = b"\xff" * 6 + NEW_MAC + bytes.fromhex("8035 0001 0800 06 04 0003")
            assert here._port.seen == [(head + pair + pair).ljust(60, b"\0")]
            here.link = False
            guest.frontend.send_rarp(NEW_MAC)
            here.link = True
            guest.send(frame(to=PEER, of=MAC))
            assert here._port.seen[1:] == [frame(to=PEER, of=MAC)]
            assert here.statistics().sent == 1
            with pytest.raises(ValueError, match="6 bytes"):
                guest.frontend.send_rarp(b"12345")

    def test_only_cards_are_asked_to_announce(self, tmp_path: Path) -> None:
        with (
            Serving(ConsoleDevice(), tmp_path / "s") as s,
            ConsoleDriver(s.path) as driver,
            pytest.raises(ProtocolError, match="RARP"),
        ):
            driver.frontend.send_rarp(MAC)

    def test_bad_fields(self) -> None:
        device = NetDevice(Mirror(), mac=MAC)
        modes = json.loads(device.save())["modes"]
        check_fields(
            device,
            {
                "address": ["", "aa", MAC.hex() + "00", "010000000000", "zz0000000000", 5],
                "modes": [{}, modes | {"more": True}, modes | {"promiscuous": 1}, []],
                "table": ["0011", "00" * 70_002, "x"],
                "link": [0, "true"],
                "link_seen": [1],
                "announcing": [""],
                "origin": ["00" * 9, 1],
            },
        )


class TestConsole:
    NAMES = ("data", "more")

    def test_ports_go_along(self, tmp_path: Path) -> None:
        made = two(lambda: ConsoleDevice(self.NAMES, size=(80, 25)), tmp_path)
        near, far = socket.socketpair()
        near.setblocking(False)
        with made as (here, there, a, b), near, far, ConsoleDriver(a, ports=3) as driver:
            driver.set_up(3)
            driver.control(1, PORT_OPEN, 1)
            until(lambda: here.ports[1].guest_open)
            here.ports[1].send(b"before ")
            here.ports[0].send(b"typed")
            wait_quiet()
            there.resize(132, 50)
            there.ports[1].attach(near.fileno(), near.fileno())
            there.ports[1].send(b"after")
            stopped = stop(driver)
            driver.frontend.set_status(0)
            go_to(driver, b, stopped)
            assert there.ports[1].guest_open
            assert not there.ports[2].guest_open
            told = [driver.told() for _ in range(3)]
            assert (0, RESIZE, 0, struct.pack("<HH", 132, 50)) in told
            assert (1, PORT_OPEN, 1, b"") in told
            assert (2, PORT_OPEN, 0, b"") in told
            assert driver.read(4, 12) == b"before after"
            assert driver.read(0, 5) == b"typed"
            driver.write(5, b"on its way")
            far.settimeout(WAIT)
            assert far.recv(100) == b"on its way"

    def test_after_a_pause_all_is_as_before_and_once(self, tmp_path: Path) -> None:
        made = two(lambda: ConsoleDevice(self.NAMES), tmp_path)
        with made as (here, _, a, _), ConsoleDriver(a, ports=3) as driver:
            driver.set_up(3)
            driver.control(1, PORT_OPEN, 1)
            until(lambda: here.ports[1].guest_open)
            here.ports[1].send(b"once")
            wait_quiet()
            pause(driver)
            assert driver.read(4, 4) == b"once"
            here.ports[1].send(b"again")
            assert driver.read(4, 5) == b"again"

    def test_what_was_taken_along_is_not_there_again(self, tmp_path: Path) -> None:
        """A guest that comes back finds what has come meanwhile, after what it brings."""
        made = two(lambda: ConsoleDevice(("data",)), tmp_path)
        with made as (here, there, a, b), ConsoleDriver(a, ports=2) as driver:
            driver.set_up(2)
            driver.control(1, PORT_OPEN, 1)
            until(lambda: here.ports[1].guest_open)
            here.ports[1].send(b"both ways ")
            go_to(driver, b, stop(driver))
            here.ports[1].send(b"meanwhile ")
            there.ports[1].send(b"there ")
            wait_quiet()
            go_to(driver, a, stop(driver))
            here.ports[1].send(b"again")
            assert driver.read(4, 31) == b"both ways there meanwhile again"

    def test_a_message_that_waits_goes_along(self, tmp_path: Path) -> None:
        made = two(lambda: ConsoleDevice(self.NAMES), tmp_path)
        with made as (_, there, a, b), ConsoleDriver(a, ports=3) as driver:
            driver.control(0, 0, 1)  # ready; that there are three ports waits for buffers
            go_to(driver, b, stop(driver))
            assert [driver.told()[:3] for _ in range(3)] == [(n, 1, 1) for n in range(3)]
            assert not there.ports[0].ready

    def test_another_console(self) -> None:
        state = ConsoleDevice(("data",)).save()
        assert "['console', 'data']; here are ['console']" in refusal(ConsoleDevice(), state)

    def test_bad_fields(self) -> None:
        device = ConsoleDevice(("data",))
        message = wire_message(0, 5)
        check_fields(
            device,
            {
                "ports": [["console"], ["data", "console"], "console", [1, 2]],
                "multiport": [1],
                "ready": [[True], [True, 1], [True] * 3],
                "open": [[False]],
                "input": [["", ""] * 2, ["00" * 70_000, ""], ["", 1]],
                "pending": [
                    "",
                    [message[:6]],
                    [wire_message(2, 5)],
                    [wire_message(0, 3)],
                    [message] * 11,
                    [message + "00" * 200],
                ],
                "origin": ["00" * 9],
            },
        )


def wire_message(number: int, event: int) -> str:
    return struct.pack("<IHH", number, event, 1).hex()


class TestInput:
    def test_lights_and_events_go_along(self, tmp_path: Path) -> None:
        made = two(InputDevice.keyboard, tmp_path)
        with made as (here, there, a, b), InputDriver(a) as driver:
            assert driver.ask(0x12) == b""
            here.leds["LED_CAPSL"] = True
            here.press("KEY_A")
            stopped = stop(driver)
            driver.frontend.set_status(0)
            go_to(driver, b, stopped)
            assert there.leds["LED_CAPSL"]
            there.release("KEY_A")
            assert driver.events(4) == [(KEY, 30, 1), REPORT, (KEY, 30, 0), REPORT]
            assert there.config()[0] == 0x12

    def test_another_keyboard(self) -> None:
        state = InputDevice.keyboard("one").save()
        assert "with another name" in refusal(InputDevice.keyboard("two"), state)
        assert "with another name" in refusal(InputDevice.pointer(), state)

    def test_bad_fields(self) -> None:
        device = InputDevice.keyboard()
        event = struct.Struct("<HHi")
        check_fields(
            device,
            {
                "device": ["00" * 16, "", 1],
                "select": [-1, 256, True, "1"],
                "subsel": [256],
                "leds": [{}, {"LED_CAPSL": True}, device.leds | {"LED_NUML": 1}],
                "waiting": [
                    "00",
                    event.pack(1, 30, 1).hex(),
                    (event.pack(2, 30, 1) + bytes(8)).hex(),
                    "00" * 8 * 100_000,
                ],
            },
        )


class TestIommu:
    MEMORY = GuestRegionCollection.from_ranges([(0, 1 << 20)])

    @staticmethod
    def make(*endpoints: int, **options: Any) -> VirtioIommu:
        return VirtioIommu(endpoints or (8, 9), reserved=[MSI], revoke_after=None, **options)

    def filled(self) -> VirtioIommu:
        iommu = self.make(bypass=True)
        for request in (
            attach(8, 1),
            attach(9, 3, flags=1),
            *(map_(1, n * PAGE, (n + 1) * PAGE - 1, 2 * n * PAGE, 1 + n % 3) for n in range(20)),
            map_(1, 1 << 32, (1 << 32) + PAGE - 1, 0, 7),
        ):
            assert send(iommu, request) is Status.OK
        with pytest.raises(CannotResolveError):
            iommu.endpoint(8).memory(self.MEMORY).read(1 << 40, 1)
        return iommu

    def test_mappings_go_along(self) -> None:
        here, there = self.filled(), self.make()
        target = LedgerTarget()
        there.add_target(8, target, self.MEMORY)
        there.restore(here.save())
        before, after = here.snapshot(), there.snapshot()
        assert after["domains"] == before["domains"]
        assert after["settings"] == before["settings"]
        assert after["records"] == before["records"]
        assert [each["domain"] for each in after["endpoints"]] == [1, 3]
        assert there.endpoint(8).iotlb.lookup(PAGE, 8, Permissions.WRITE)
        assert target.held
        # It is a device like any other from now on.
        assert send(there, unmap(1, 0, 20 * PAGE - 1)) is Status.OK
        assert here.snapshot() == before

    def test_what_was_there_is_gone(self) -> None:
        there = self.make()
        assert send(there, attach(8, 7)) is Status.OK
        assert send(there, map_(7, 0, PAGE - 1, 0, 3)) is Status.OK
        there.restore(self.filled().save())
        assert [each["id"] for each in there.snapshot()["domains"]] == [1, 3]

    @pytest.mark.parametrize(
        ("other", "reason"),
        [
            ({"endpoints": (8,)}, "NOENT"),
            ({"max_mappings": 5}, "NOMEM"),
            ({"page_size_mask": 1 << 16}, "RANGE"),
            ({"max_domains": 1}, "NOMEM"),
        ],
    )
    def test_another_iommu(self, other: dict[str, Any], reason: str) -> None:
        there = self.make(*other.pop("endpoints", ()), **other)
        assert reason in refusal(there, self.filled().save())
        assert there.snapshot()["domains"] == []

    def test_what_is_no_state(self) -> None:
        state = self.filled().save()
        size = 4 + int.from_bytes(state[:4], "little")
        there = self.make()
        for wrong in (
            b"",
            state[:3],
            state[: size - 1],
            state[:-1],
            state[:size] + b"\xff" * 40,
            state[:size] + unmap(1, 0, PAGE),
            state[:size] + wire.pack(wire.Probe(8)),
            b"\xff" * 100,
            state[:size] + state[size:] * 2,
        ):
            refusal(there, wrong)
            assert there.snapshot()["domains"] == []
            assert send(there, attach(8, 1)) is Status.OK  # it serves on
            there.reset()
        for field in ({"bypass": 1}, {"features": -1}, {"records": ["00"]}, {"records": 1}):
            head = other(state[4:size], **field)
            refusal(there, len(head).to_bytes(4, "little") + head + state[size:])

    def test_over_a_socket(self, tmp_path: Path) -> None:
        with (
            Serving(self.filled(), tmp_path / "a") as a,
            Serving(there := self.make(), tmp_path / "b") as b,
            Driver(a.path, queues=0, features=there.offered_features) as driver,
        ):
            state = driver.frontend.save_state()
            with Driver(b.path, queues=0) as second:
                second.frontend.load_state(state)
                assert len(there.snapshot()["domains"][0]["mappings"]) == 21
                # The endpoint 8 is there, but the device is another one than a console's.
                with pytest.raises(RefusedError):
                    second.frontend.load_state(saved.wrap(ConsoleDevice(), b""))
                assert len(there.snapshot()["domains"][0]["mappings"]) == 21

    def test_the_class_makes_a_device_of_a_snapshot(self) -> None:
        state = self.filled().snapshot()
        assert (
            VirtioIommu.restore(state, revoke_after=1.0).snapshot()["domains"] == state["domains"]
        )
