"""The configuration space: what a driver finds there, and what of it it can change."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from guestio import Backing
from guestio.errors import DeviceError
from guestio.pci import (
    Bar,
    BarWindow,
    CallbackDoorbell,
    Capability,
    Msi,
    MsiX,
    PciDevice,
    PciExpress,
    PciHost,
    PowerManagement,
    SerialNumber,
    VendorSpecific,
)
from guestio.pci.capabilities import Layout
from guestio.pci.interrupts import InterruptKind
from guestio.virtio.loop import EventLoop


class Made(Capability):
    """One that a device has made, of which everything may be wrong."""

    number = 0x42

    def __init__(self, layout: object = None, **attributes: object) -> None:
        self._layout = layout
        for name, value in attributes.items():
            setattr(self, name, value)

    def layout(self) -> Layout:
        return self._layout  # type: ignore[return-value]  # that is what is tried


class Designated(Capability):
    """A vendor-specific extended one (DVSEC), of which there may be several."""

    number, extended = 0x23, True

    def layout(self) -> Layout:
        return Layout(bytes(8))


class Pin:
    """A trigger that counts."""

    notified = 0

    def notify(self) -> None:
        self.notified += 1

    def close(self) -> None:
        pass


class Registers(PciDevice):
    """Notes accesses to a BAR of a page, which reads as 0."""

    vendor_id, device_id = 0x1234, 0x5678
    bars = {0: Bar(4096)}  # noqa: RUF012 - never changed
    capabilities = (PowerManagement(), BarWindow())
    interrupts = 1

    def __init__(self) -> None:
        self.seen: list[str] = []

    def read(self, bar: int, offset: int, size: int) -> int:
        self.seen.append("read")
        return 0

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.seen.append("write")


class Function(PciDevice):
    vendor_id, device_id, class_code, revision = 0x1234, 0x5678, 0x010802, 3

    def __init__(self, **attributes: object) -> None:
        self.resets = 0
        for name, value in attributes.items():
            setattr(self, name, value)

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    made = EventLoop()
    yield made
    made.close()


def u16(host: PciHost, at: int) -> int:
    return int.from_bytes(host.read_config(at, 2), "little")


def u32(host: PciHost, at: int) -> int:
    return int.from_bytes(host.read_config(at, 4), "little")


def write(host: PciHost, at: int, value: int, size: int = 4) -> None:
    host.write_config(at, value.to_bytes(size, "little"))


def capabilities(host: PciHost) -> dict[int, int]:
    """Where each capability is, by its number, as a driver finds them."""
    found, at = {}, host.read_config(0x34, 1)[0]
    while at:
        number, following = host.read_config(at, 2)
        assert number not in found
        found[number] = at
        at = following
    assert bool(found) == bool(u16(host, 6) & 0x10)
    return found


def test_identity(loop: EventLoop) -> None:
    host = PciHost(Function(), loop)
    assert struct.unpack("<HHHHI", host.read_config(0, 12)) == ((0x1234, 0x5678, 0, 0, 0x01080203))
    assert (u16(host, 0x2C), u16(host, 0x2E)) == (0x1234, 0x5678)
    other = PciHost(Function(subsystem_vendor_id=0x1AF4, subsystem_id=0x1100), loop)
    assert (u16(other, 0x2C), u16(other, 0x2E)) == (0x1AF4, 0x1100)
    write(host, 0, 0xFFFFFFFF)
    write(host, 8, 0xFFFFFFFF)
    write(host, 0x2C, 0xFFFFFFFF)
    assert u32(host, 0) == 0x56781234
    assert u32(host, 8) == 0x01080203
    assert u32(host, 0x2C) == 0x56781234


def test_sizes_of_bars(loop: EventLoop) -> None:
    bars = {
        0: Bar(4096),
        1: Bar(1 << 20, wide=True, prefetchable=True),
        3: Bar(32, io=True),
        4: Bar(1 << 34, wide=True),
    }
    host = PciHost(Function(bars=bars), loop)
    before = [u32(host, 0x10 + 4 * n) for n in range(6)]
    assert before == [0, 0xC, 0, 1, 4, 0]
    for n in range(6):
        write(host, 0x10 + 4 * n, 0xFFFFFFFF)
    sizes = [u32(host, 0x10 + 4 * n) for n in range(6)]
    assert sizes == [0xFFFFF000, 0xFFF0000C, 0xFFFFFFFF, 0xFFFFFFE1, 4, 0xFFFFFFFC]
    write(host, 0x10, 0xFEB01234)
    assert u32(host, 0x10) == 0xFEB01000


def test_command_and_status(loop: EventLoop) -> None:
    host = PciHost(Function(), loop)
    write(host, 4, 0xFFFF, 2)
    assert u16(host, 4) == 0x0547
    assert host.memory.enabled
    write(host, 4, 0, 1)
    assert u16(host, 4) == 0x0500
    assert not host.memory.enabled
    write(host, 6, 0xFFFF, 2)
    assert u16(host, 6) == 0


def test_capabilities_are_found(loop: EventLoop) -> None:
    function = Function(
        interrupts=3,
        capabilities=[PowerManagement(), VendorSpecific(b"abc"), PciExpress(), Msi(4)],
    )
    host = PciHost(function, loop)
    found = capabilities(host)
    assert set(found) == {1, 9, 0x10, 5}
    assert all(at % 4 == 0 for at in found.values())
    assert host.read_config(found[9] + 2, 4) == b"\x06abc"
    assert host.config.size == 4096
    # MSI: four messages, 64-bit addresses; the driver sets enable, count, address and data.
    at = found[5]
    assert u16(host, at + 2) == 0x84
    write(host, at + 2, 0xFFFF, 2)
    assert u16(host, at + 2) == 0xF5
    write(host, at + 4, 0xFFFFFFFF)
    assert u32(host, at + 4) == 0xFFFFFFFC


def test_msix_has_a_bar_of_its_own(loop: EventLoop) -> None:
    host = PciHost(Function(bars={0: Bar(64, wide=True)}, interrupts=600), loop)
    at = capabilities(host)[0x11]
    assert u16(host, at + 2) == 599
    assert u32(host, at + 4) == 2
    assert u32(host, at + 8) == 0x3000 | 2
    assert host.bars[2].size == 0x4000
    write(host, at + 2, 0xFFFF, 2)
    assert u16(host, at + 2) == 0xC000 | 599
    write(host, at + 4, 0xFFFFFFFF)
    assert u32(host, at + 4) == 2


def test_power_states(loop: EventLoop) -> None:
    host = PciHost(Function(capabilities=[PowerManagement()]), loop)
    at = capabilities(host)[1] + 4
    write(host, 4, 4, 2)
    write(host, at, 3, 2)
    assert u16(host, at) == 8 | 3
    assert (host.memory.enabled, host.memory.refusal) == (
        False,
        "the driver has put the function into D3hot",
    )
    write(host, at, 0, 2)
    assert host.memory.enabled
    write(host, 4, 0, 2)
    assert host.memory.refusal == "the driver has not enabled bus mastering"


def test_asleep_only_the_configuration_space_answers(loop: EventLoop) -> None:
    """PCI Bus Power Management Interface Specification 1.2, section 5.4.1."""
    function = Registers()
    host = PciHost(function, loop)
    pin = Pin()
    host.interrupts.set_trigger(InterruptKind.INTX, 0, pin)
    power, window = capabilities(host)[1] + 4, host.config.window
    assert window is not None
    # A look at 4 bytes at offset 0 of BAR 0.
    write(host, window + BarWindow.PLACE + 4, 4)
    write(host, 4, 6, 2)
    write(host, power, 3, 2)
    ones = b"\xff" * 4
    assert host.read_part(0, 0, 4, 0.0) == host.read_config(window + 16, 4) == ones
    assert host.write_part(0, 0, b"1234", 0.0) == 4
    host.write_config(window + 16, b"1234")
    host.interrupt(0)
    assert (function.seen, pin.notified) == ([], 0)
    assert u32(host, 0) == 0x56781234
    write(host, power, 0, 2)
    # What was written meanwhile is lost; an interrupt waits.
    assert (function.seen, pin.notified) == ([], 1)
    assert host.write_part(0, 0, b"1234", 0.0) == 4
    assert host.read_part(0, 0, 4, 0.0) == host.read_config(window + 16, 4) == bytes(4)
    assert function.seen == ["write", "read", "read"]


@pytest.mark.parametrize(("offset", "size"), [(0, 2), (1, 1), (-2, 4), (-4, 8)])
def test_function_level_reset(loop: EventLoop, offset: int, size: int) -> None:
    function = Function(capabilities=[PciExpress()])
    host = PciHost(function, loop)
    control = capabilities(host)[0x10] + PciExpress.CONTROL
    assert u32(host, control - 4) & 1 << 28
    write(host, 4, 4, 2)
    value = 0x8000 << 8 * -offset if offset <= 0 else 0x80
    write(host, control + offset, value, size)
    assert function.resets == 1
    assert u16(host, 4) == 0
    assert not u16(host, control) & 0x8000
    write(host, control, 0x7FFF, 2)
    assert u16(host, control) == 0x7FFF
    assert function.resets == 1


def test_extended_capabilities(loop: EventLoop) -> None:
    parts = [SerialNumber(0x1122334455667788), Designated()]
    host = PciHost(Function(capabilities=[PciExpress(), *parts]), loop)
    assert u32(host, 0x100) == 3 | 1 << 16 | 0x10C << 20
    assert host.read_config(0x104, 8) == bytes.fromhex("8877665544332211")
    assert u32(host, 0x10C) == 0x23 | 1 << 16
    write(host, 0x104, 0)
    assert u32(host, 0x104) == 0x55667788


def shared(size: int, *areas: tuple[int, int]) -> Bar:
    """A BAR with memory that the driver maps."""
    return Bar(size, memory=Backing.memfd(size), areas=areas)


MESSAGES = {"interrupts": 4, "capabilities": [MsiX(4, 0)]}
"""Table and pending bits are in the first two pages of BAR 0."""


def test_what_is_no_contradiction(loop: EventLoop) -> None:
    """Vectors that share messages, vectors to spare, areas beside the table, several of a kind."""
    for attributes in (
        {"interrupts": 4, "capabilities": [Msi(2), MsiX(8)]},
        MESSAGES | {"bars": {0: shared(16384, (8192, 8192))}},
        {"capabilities": [VendorSpecific(b"a"), VendorSpecific(b"b"), BarWindow()]},
        {"capabilities": [PciExpress(1), Designated(), Designated()]},
        {"interrupts": 3, "msix": False},
    ):
        PciHost(Function(**attributes), loop)


def test_a_huge_doorbell_is_looked_at_as_fast_as_a_small_one(loop: EventLoop) -> None:
    """Here it must not reach into the table of MSI-X, in the BAR's first page."""
    capabilities = [MsiX(4, 0, pba=0x800)]
    function = Function(bars={0: Bar(1 << 40, wide=True)}, interrupts=4, capabilities=capabilities)
    host = PciHost(function, loop)
    for at, size in ((0, 1), (0x3F, 1 << 39), (0x800, 1), (0x801, 1 << 39)):
        with pytest.raises(DeviceError, match="pending bits of MSI-X"):
            host.add_doorbell(0, at, size, CallbackDoorbell(print))
    host.add_doorbell(0, 0x808, (1 << 40) - 0x808, CallbackDoorbell(print))
    assert host.doorbells.write(0, (1 << 40) - 8, 4, 1)


class Huge(VendorSpecific):
    """As long as a capability may be."""


@pytest.mark.parametrize(
    ("attributes", "error", "says"),
    [
        ({"vendor_id": 1 << 16}, ValueError, "vendor_id"),
        ({"class_code": "storage"}, TypeError, "class_code"),
        ({"interrupts": 2049}, ValueError, "interrupts"),
        ({"bars": {6: Bar(16)}}, ValueError, "BARs 0 to 5"),
        ({"bars": {0: 4096}}, TypeError, "not a Bar"),
        ({"bars": {5: Bar(16, wide=True)}}, DeviceError, "wide"),
        ({"bars": {0: Bar(16, wide=True), 1: Bar(16)}}, DeviceError, "wide"),
        ({"bars": {n: Bar(16) for n in range(6)}, "interrupts": 1}, DeviceError, "no BAR left"),
        (MESSAGES | {"bars": {0: Bar(4096)}}, DeviceError, "no room"),
        (MESSAGES | {"bars": {1: Bar(16384)}}, DeviceError, "no room"),
        (MESSAGES | {"bars": {0: Bar(256, io=True)}}, DeviceError, "is in I/O space, where MSI-X"),
        (MESSAGES | {"interrupts": 5}, DeviceError, "5, and MsiX.* 4 vectors: .* would be lost"),
        (MESSAGES | {"interrupts": 0}, DeviceError, "and no interrupts"),
        ({"capabilities": [Msi(4)]}, DeviceError, "and no interrupts"),
        (MESSAGES | {"bars": {0: shared(16384)}}, DeviceError, "table of MSI-X, at 0x0.0x40 of"),
        (
            MESSAGES | {"bars": {0: shared(16384, (4096, 8192))}},
            DeviceError,
            "pending bits of MSI-X, at 0x1000.0x8 of",
        ),
        ({"capabilities": [PciExpress(), PciExpress(9)]}, DeviceError, "both PciExpress"),
        ({"capabilities": [PowerManagement(), PowerManagement()]}, DeviceError, "both Power"),
        ({"interrupts": 1, "capabilities": [Msi(), Msi(2)]}, DeviceError, "both Msi"),
        ({"interrupts": 1, "capabilities": [MsiX(1), MsiX(2)]}, DeviceError, "both MsiX"),
        ({"capabilities": [BarWindow(), BarWindow()]}, DeviceError, "both BarWindow"),
        (
            {"capabilities": [PciExpress(), SerialNumber(1), SerialNumber(1)]},
            DeviceError,
            "both SerialNumber",
        ),
        ({"vendor_id": 0xFFFF}, ValueError, "no function"),
        ({"capabilities": [Made(Layout(b""), number=256)]}, ValueError, "number 0x100 is not"),
        ({"capabilities": [Made(Layout(b""), number=None)]}, TypeError, "number is missing"),
        (
            {"capabilities": [PciExpress(), Made(Layout(b""), extended=True, version=16)]},
            ValueError,
            "version 0x10 is not",
        ),
        ({"capabilities": [Made(b"bytes")]}, DeviceError, "is no Layout"),
        ({"capabilities": [Made(Layout(b"ab", b"abc"))]}, DeviceError, "has 2 bytes"),
        ({"capabilities": [Made(Layout(b"ab", b"", b"abc"))]}, DeviceError, "has 2 bytes"),
        ({"capabilities": [Made(Layout(b"ab", b"\3\1", b"\0\1"))]}, DeviceError, "and, by writ"),
        ({"capabilities": [SerialNumber(1)]}, DeviceError, "PciExpress"),
        ({"capabilities": [Huge(bytes(200))]}, DeviceError, "do not fit"),
    ],
)
def test_descriptions_that_cannot_be(
    loop: EventLoop, attributes: dict[str, object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        PciHost(Function(**attributes), loop)


def part_of_a_file(offset: int = 0, writable: bool = True) -> Backing:
    whole = Backing.memfd(8192)
    assert whole.fd is not None
    return Backing.from_fd(whole.fd, 4096, offset, writable)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Bar(4096, memory=bytearray(4096)),  # type: ignore[arg-type]
        lambda: Bar(8192, memory=Backing.memfd(8192), areas=[(0.0, 4096)]),  # type: ignore[list-item]
        lambda: VendorSpecific("text"),  # type: ignore[arg-type]
        lambda: MsiX(4, bar="0"),  # type: ignore[arg-type]
        lambda: SerialNumber("7"),  # type: ignore[arg-type]
        lambda: PciExpress("endpoint"),  # type: ignore[arg-type]
    ],
)
def test_parts_of_another_type(make: object) -> None:
    with pytest.raises(TypeError):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Bar(0),
        lambda: Bar(24),
        lambda: Bar(8),
        lambda: Bar(1 << 32),
        lambda: Bar(512, io=True),
        lambda: Bar(16, io=True, wide=True),
        lambda: Bar(16, width=3),
        lambda: Bar(4096, memory=Backing.anonymous(4096)),
        lambda: Bar(4096, memory=Backing.memfd(8192)),
        lambda: Bar(4096, areas=[(0, 4096)]),
        lambda: Bar(8192, memory=Backing.memfd(8192), areas=[(0, 100)]),
        lambda: Bar(8192, memory=Backing.memfd(8192), areas=[(4096, 8192)]),
        lambda: MsiX(0),
        lambda: MsiX(2049),
        lambda: MsiX(4, 0, 4),
        lambda: MsiX(4, 0, 0, 32),
        lambda: Msi(3),
        lambda: Msi(64),
        lambda: VendorSpecific(bytes(253)),
        lambda: MsiX(4, bar=6),
        lambda: MsiX(4, bar=-1),
        lambda: MsiX(4, table=0x1000),
        lambda: MsiX(4, pba=0x1000),
        lambda: PciExpress(4),
        lambda: SerialNumber(1 << 64),
        lambda: Bar(4096, memory=part_of_a_file(offset=100)),
        lambda: Bar(4096, memory=part_of_a_file(writable=False)),
    ],
)
def test_parts_that_cannot_be(make: object) -> None:
    with pytest.raises(ValueError):
        make()  # type: ignore[operator]


def test_a_device_of_another_kind(loop: EventLoop) -> None:
    with pytest.raises(TypeError, match="make one of it"):
        PciHost(Function, loop)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="vendor_id is missing"):
        PciHost(type("Bare", (PciDevice,), {})(), loop)
    assert issubclass(VendorSpecific, Capability)
