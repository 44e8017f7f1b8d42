"""Registers as a table: what a driver may do to them, whatever its accesses; what a device says."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from guestio import Backing
from guestio.errors import DeviceError
from guestio.pci import (
    Access,
    Bar,
    CallbackDoorbell,
    MsiX,
    PciDevice,
    PciExpress,
    PciHost,
    Register,
    VendorSpecific,
)
from guestio.virtio.loop import EventLoop


class Function(PciDevice):
    vendor_id, device_id = 0x1234, 0x5678
    bars = {0: Bar(0x100, width=8), 3: Bar(0x1000, wide=True)}  # noqa: RUF012 - never changed
    capabilities = (PciExpress(),)

    control = Register(0x00, access=Access.RO, reset=0xA0000000, doc="What it does.")
    enabled = control.field(0, access=Access.RW, doc="Whether it runs.")
    mode = control.field(4, 3, access=Access.RW, reset=5)
    key = control.field(8, 8, access=Access.WO)
    alarm = control.field(16, access=Access.W1C, reset=1)
    address = Register(0x08, 8, reset=0x1122334455667788)
    small = Register(0x11, 1, reset=0x5A)
    events = Register(0x12, 2, access=Access.W1C, reset=0xF00F)
    start = Register(0x14, access=Access.WO)
    ticks = Register(0x18, access=Access.RO)
    far = Register(0x0FF8, 8, bar=3)

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.at_reset: list[int] = []

    def reset(self) -> None:
        self.at_reset.append(self.small)

    @start.on_write
    def started(self, value: int) -> None:
        self.calls.append(("start", value))

    @address.on_write
    def moved(self, value: int) -> None:
        self.calls.append(("address", value))

    @ticks.on_read
    def tick(self) -> int:
        return self.ticks + 1


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    made = EventLoop()
    yield made
    made.close()


@pytest.fixture
def device() -> Function:
    return Function()


@pytest.fixture
def host(loop: EventLoop, device: Function) -> PciHost:
    return PciHost(device, loop)


def test_each_access_type_does_what_it_says(host: PciHost, device: Function) -> None:
    assert host.read_bar(0, 0, 4) == (0xA0010050).to_bytes(4, "little")
    host.write_bar(0, 0, b"\xff" * 4)
    assert device.control == 0xA000FF71
    assert (device.enabled, device.mode, device.key, device.alarm) == (1, 7, 0xFF, 0)
    # What may only be written reads as 0, for the driver.
    assert host.read_bar(0, 0, 4) == (0xA0000071).to_bytes(4, "little")
    device.alarm, device.mode = 1, 2
    host.write_bar(0, 0, bytes(4))
    assert device.control == 0xA0010000
    host.write_bar(0, 0x12, b"\x01\x10")
    assert device.events == 0xE00E
    host.write_bar(0, 0x14, b"\x78\x56\x34\x12")
    assert device.calls == [("start", 0x12345678)]
    assert host.read_bar(0, 0x14, 4) == bytes(4)
    assert device.start == 0x12345678


def test_a_method_tells_what_is_read(host: PciHost, device: Function) -> None:
    assert host.read_bar(0, 0x18, 4) == b"\1\0\0\0"
    assert host.read_bar(0, 0x18, 1) == b"\2"
    host.write_bar(0, 0x18, b"\xff" * 4)
    assert device.ticks == 2


def test_halves_are_written_one_after_the_other(host: PciHost, device: Function) -> None:
    host.write_bar(0, 0x08, b"\x01\0\0\0")
    host.write_bar(0, 0x0C, b"\x02\0\0\0")
    assert device.calls == [("address", 0x1122334400000001), ("address", 0x0000000200000001)]
    # As one, where accesses may be that wide; not in another BAR, whose width is 4.
    host.write_bar(0, 0x08, b"\x03" * 8)
    assert device.calls[2:] == [("address", 0x0303030303030303)]
    host.write_bar(3, 0xFF8, b"\x04" * 8)
    assert device.far == 0x0404040404040404


@pytest.mark.parametrize("seed", range(6))
def test_accesses_of_any_place_and_size(host: PciHost, device: Function, seed: int) -> None:
    """Compared with bytes, each with the bits that may be read, written and cleared."""
    rng = random.Random(seed)
    value = bytearray(0x20)
    seen, writable, cleared = bytearray(b"\xff" * 0x20), bytearray(0x20), bytearray(0x20)

    def put(target: bytearray, at: int, number: int, width: int) -> None:
        target[at : at + width] = number.to_bytes(width, "little")

    put(value, 0, 0xA0010050, 4)
    put(seen, 0, 0xFFFF00FF, 4)
    put(writable, 0, 0xFF71, 4)
    put(cleared, 0, 1 << 16, 4)
    put(value, 8, 0x1122334455667788, 8)
    put(writable, 8, 2**64 - 1, 8)
    put(value, 0x11, 0x5A, 1)
    put(writable, 0x11, 0xFF, 1)
    put(value, 0x12, 0xF00F, 2)
    put(cleared, 0x12, 0xFFFF, 2)
    put(seen, 0x14, 0, 4)
    put(writable, 0x14, 2**32 - 1, 4)
    for _ in range(400):
        at = rng.randrange(0x18)
        size = rng.randrange(1, 0x18 - at + 1)
        if rng.random() < 0.5:
            data = rng.randbytes(size)
            host.write_bar(0, at, data)
            for place, byte in enumerate(data, at):
                kept = value[place] & ~writable[place] & ~(byte & cleared[place])
                value[place] = kept | byte & writable[place]
        expected = bytes(a & b for a, b in zip(value, seen, strict=True))
        assert host.read_bar(0, at, size) == expected[at : at + size]
        assert device.control == int.from_bytes(value[:4], "little")
    assert host.failures == 0


def test_every_reset_sets_them_before_the_device_is_called(host: PciHost, device: Function) -> None:
    for reset in (
        host.reset,
        host.disconnect,
        lambda: host.write_config(host.read_config(0x34, 1)[0] + 9, b"\x80"),
    ):
        device.small, device.mode, device.far = 1, 1, 7
        reset()
        assert (device.small, device.mode, device.far) == (0x5A, 5, 0)
    assert device.at_reset == [0x5A] * 3


def test_a_value_that_is_too_large_for_its_size_reaches_no_further(device: Function) -> None:
    device.write(0, 0x12, 1, 0xFFFF)
    device.write(0, 0x08, 1, 0xFFFF)
    assert (device.events, device.address) == (0xF000, 0x11223344556677FF)


def test_what_a_device_sets_is_checked(device: Function) -> None:
    for name, value in (("small", 256), ("small", -1), ("mode", 8), ("far", 1 << 64)):
        with pytest.raises(ValueError, match=f"{name} .*does not fit"):
            setattr(device, name, value)
    with pytest.raises(TypeError, match="small"):
        device.small = "1"  # type: ignore[assignment] # that is the point
    assert (device.small, device.mode, device.far) == (0x5A, 5, 0)


def test_methods_that_fail_are_told_with_their_place(
    loop: EventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(PciDevice):
        vendor_id, device_id = 0x1234, 0x5678
        bars = {1: Bar(0x100)}  # noqa: RUF012 - never changed
        bad = Register(0x20, bar=1)
        other = Register(0x24, bar=1)

        @bad.on_write
        def written(self, value: int) -> None:
            raise OSError(f"no {value}")

        @bad.on_read
        def read_it(self) -> int:
            return 1 << 40

        def memory_changed(self) -> None:
            raise OSError("lost")

    host = PciHost(Broken(), loop)
    host.write_bar(1, 0x20, b"\1\0\0\0")
    assert host.read_bar(1, 0x20, 4) == b"\xff" * 4
    host.write_bar(1, 0x24, b"\1\0\0\0")
    assert host.read_bar(1, 0x24, 4) == b"\1\0\0\0"
    host.disconnect()
    assert host.failures == 3
    assert "write of Broken (BAR 1, offset 0x20, 4 bytes, value 0x1) raised OSError" in caplog.text
    assert "read of Broken (BAR 1, offset 0x20, 4 bytes) raised ValueError" in caplog.text
    assert "memory_changed of Broken raised OSError" in caplog.text


def test_a_read_that_is_no_number_is_told_with_its_place(
    loop: EventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    class Wordy(PciDevice):
        vendor_id, device_id = 0x1234, 0x5678
        bars = {0: Bar(0x100)}  # noqa: RUF012 - never changed

        def read(self, bar: int, offset: int, size: int) -> int:
            return "seven"  # type: ignore[return-value] # that is the point

    assert PciHost(Wordy(), loop).read_bar(0, 0x10, 2) == b"\xff\xff"
    assert "read of Wordy (BAR 0, offset 0x10, 2 bytes) returned no number" in caplog.text


def test_a_subclass_adds_and_replaces(loop: EventLoop) -> None:
    class Newer(Function):
        small = Register(0x11, 1, reset=0x77)
        added = Register(0x40, 2)

    host = PciHost(Newer(), loop)
    assert host.read_bar(0, 0x11, 1) == b"\x77"
    host.write_bar(0, 0x40, b"\1\2")
    assert isinstance(host.device, Newer)
    assert (host.device.added, host.device.mode) == (0x201, 5)
    # Of the class that it was made from, nothing has changed.
    assert Function().small == 0x5A


def test_two_devices_of_a_class_have_values_of_their_own() -> None:
    one, other = Function(), Function()
    one.small = 1
    assert (one.small, other.small) == (1, 0x5A)


def test_it_explains_itself(device: Function) -> None:
    device.mode = 2
    lines = [" ".join(line.split()) for line in device.explain().splitlines()]
    assert lines[0] == "Function: PCI function 1234:5678, class ff0000"
    assert lines[1] == "BAR 0: 0x100 bytes, 32-bit"
    assert lines[2] == "BAR 3: 0x1000 bytes, 64-bit"
    assert lines[3] == "interrupts: 0"
    assert "0 0x0000-0x0003 control RO 0xa0010050 0xa0010020 What it does." in lines
    assert "bit 0 enabled RW 0x0 0x0 Whether it runs." in lines
    assert "bits 6:4 mode RW 0x5 0x2" in lines
    assert "3 0x0ff8-0x0fff far RW 0x0000000000000000 0x0000000000000000" in lines
    # The class itself knows them, too.
    assert (Function.control.name, Function.mode.low, Function.far.bar) == ("control", 4, 3)


@pytest.mark.parametrize(
    ("arguments", "words", "error"),
    [
        ((0, 3), {}, ValueError),
        ((2, 4), {}, ValueError),
        ((-4,), {}, ValueError),
        ((0, 1), {"reset": 256}, ValueError),
        ((0,), {"access": "RW"}, TypeError),
        ((0.0,), {}, TypeError),
    ],
)
def test_registers_that_cannot_be(
    arguments: tuple[Any, ...], words: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        Register(*arguments, **words)


@pytest.mark.parametrize(
    ("low", "bits", "words"),
    [(30, 3, {}), (-1, 1, {}), (0, 0, {}), (4, 2, {}), (0, 1, {"reset": 2})],
)
def test_fields_that_cannot_be(low: int, bits: int, words: dict[str, Any]) -> None:
    register = Register(0)
    register.field(5, 2)
    with pytest.raises(ValueError, match=r"bits|fit"):
        register.field(low, bits, **words)
    assert len(register.fields) == 1


def test_a_register_has_one_method_of_each_kind() -> None:
    register = Register(0)
    register.on_write(print)
    register.on_read(int)
    with pytest.raises(ValueError, match="on_write"):
        register.on_write(print)
    with pytest.raises(ValueError, match="on_read"):
        register.on_read(int)
    wrong: Any = 5
    with pytest.raises(TypeError, match="on_write is given a method, not 5"):
        Register(0).on_write(wrong)
    with pytest.raises(TypeError, match="on_read is given a method, not 5"):
        Register(0).on_read(wrong)


def test_a_subclass_overrides_the_methods_of_registers(loop: EventLoop) -> None:
    class Newer(Function):
        def started(self, value: int) -> None:
            super().started(value)
            self.calls.append(("newer", value))

        def tick(self) -> int:
            return 77

    host = PciHost(Newer(), loop)
    host.write_bar(0, 0x14, b"\5\0\0\0")
    assert isinstance(host.device, Newer)
    assert host.device.calls == [("start", 5), ("newer", 5)]
    assert host.read_bar(0, 0x18, 4) == b"\x4d\0\0\0"


def test_a_method_of_a_register_that_was_replaced_makes_no_class() -> None:
    with pytest.raises(DeviceError, match=r"start.*was replaced, but not its method started"):
        type("Replaced", (Function,), {"start": Register(0x14)})
    # One that is replaced as well is what it says.
    type("Replaced", (Function,), {"start": Register(0x14), "started": None})


def test_a_doorbell_does_not_take_a_method_its_writes(loop: EventLoop) -> None:
    host = PciHost(Function(), loop)
    doorbell = CallbackDoorbell(print)
    with pytest.raises(DeviceError, match=r"0x10\+0x8 of BAR 0 .*start.* on_write method would"):
        host.add_doorbell(0, 0x10, 8, doorbell)
    host.add_doorbell(0, 0x18, 8, doorbell)


def test_registers_that_overlap_make_no_class() -> None:
    with pytest.raises(DeviceError, match=r"one at BAR 0 0x8\+8> and <Register two .*overlap"):

        class Overlapping(PciDevice):
            two = Register(0x0C)
            one = Register(0x08, 8)


@pytest.mark.parametrize("name", ["read", "reset", "bars", "vendor_id", "explain"])
def test_a_register_cannot_be_called_like_a_method(name: str) -> None:
    with pytest.raises(DeviceError, match=f"{name}: a register cannot be called that"):
        type("Named", (PciDevice,), {name: Register(0)})


def test_a_field_of_a_register_that_was_replaced_makes_no_class() -> None:
    with pytest.raises(DeviceError, match=r"control.*not its field enabled"):
        type("Replaced", (Function,), {"control": Register(0)})


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"bars": [Bar(0x1000)]}, TypeError, r"bars is \[.*not a mapping such as"),
        ({"bars": {0: [Bar(0x1000)]}}, TypeError, r"bars\[0\] is \["),
        ({"bars": {0: Bar(16)}}, DeviceError, "no room for <Register register"),
        ({"bars": {1: Bar(0x1000)}}, DeviceError, "no room for <Register register"),
        (
            {"bars": {0: Bar(0x1000, memory=Backing.memfd(0x1000))}},
            DeviceError,
            "in memory that the driver maps",
        ),
        (
            {"interrupts": 1, "capabilities": [MsiX(1, bar=0, table=0x10, pba=0x800)]},
            DeviceError,
            "in the table or pending bits of MSI-X",
        ),
        ({"capabilities": [PciExpress]}, TypeError, "not a Capability: make one of it"),
        ({"capabilities": VendorSpecific(b"")}, TypeError, "not a list"),
    ],
)
def test_devices_that_contradict_themselves_are_not_served(
    changes: dict[str, Any], error: type[Exception], text: str, loop: EventLoop
) -> None:
    class Plain(PciDevice):
        vendor_id, device_id = 0x1234, 0x5678
        bars = {0: Bar(0x1000)}  # noqa: RUF012 - never changed
        register = Register(0x10, 8)

    device = Plain()
    PciHost(device, loop)
    for name, value in changes.items():
        setattr(device, name, value)
    with pytest.raises(error, match=text):
        PciHost(device, loop)
