"""Configuration space: the header, capabilities, and what may be written.

A server may leave the sizing of BARs to its client, as QEMU does it by itself; the checks of it
are recommendations.
"""

from __future__ import annotations

from typing import Final

from guestio.faults.report import Severity
from guestio.faults.vfio_user.catalogue import hostile, pci, register
from guestio.faults.vfio_user.trial import (
    BUS_MASTER,
    CAP_MSI,
    CAP_MSIX,
    CAP_POINTER,
    COMMAND,
    INTX,
    MEMORY_SPACE,
    MSI,
    MSIX,
    STATUS,
    VfioTrial,
)
from guestio.vfio_user.messages import CONFIG_REGION

_CAPABILITIES: Final = pci("6.7")
_BARS: Final = pci("6.2.5.1")
_EXTENDED: Final = 0x100


@register(
    "config.vendor", pci("6.2.1"), "The vendor is not 0xffff, which means that nothing is there."
)
def _vendor(t: VfioTrial) -> None:
    t.begin()
    t.expect(t.number(0, 2) != 0xFFFF, "the vendor is 0xffff")


@register(
    "config.header", pci("6.2.1"), "The header is of type 0, as that of any device but bridges."
)
def _header(t: VfioTrial) -> None:
    t.begin()
    kind = t.number(0x0E, 1) & 0x7F
    t.expect(kind == 0, f"the header is of type {kind}")


@register(
    "config.identity-read-only",
    pci("6.2.1"),
    "Vendor, device, revision, class, header type and subsystem are read-only.",
)
def _identity(t: VfioTrial) -> None:
    t.begin()
    for offset, count in ((0, 4), (8, 4), (0x0E, 1), (0x2C, 4)):
        before = t.config(offset, count)
        for value in (0xFFFFFFFF, 0):
            t.try_config(offset, value & ((1 << 8 * count) - 1), count)
        after = t.config(offset, count)
        t.try_config(offset, int.from_bytes(before, "little"), count)
        t.expect(after == before, f"{before.hex()} at {offset:#x} has become {after.hex()}")


@register(
    "config.command-bits", pci("6.2.2"), "Bits of the command register that do not exist stay 0."
)
def _command_bits(t: VfioTrial) -> None:
    t.begin()
    before = t.number(COMMAND, 2)
    t.try_config(COMMAND, 0xF800 | before, 2)
    value = t.number(COMMAND, 2)
    t.write_config(COMMAND, before, 2)
    t.expect(not value & 0xF800, f"the command register reads {value:#x}")


@register(
    "config.command", pci("6.2.2"), "Memory space and bus mastering can be switched on and off."
)
def _command(t: VfioTrial) -> None:
    t.begin()
    both = MEMORY_SPACE | BUS_MASTER
    for wanted in (both, MEMORY_SPACE, 0):
        t.write_config(COMMAND, wanted, 2)
        found = t.number(COMMAND, 2) & both
        t.expect(found == wanted, f"{wanted:#x} was written, {found:#x} is read")


@register("config.bytes", pci("3.2.2.3.4"), "A write of a byte changes that byte alone.")
def _bytes(t: VfioTrial) -> None:
    t.begin()
    before = t.config(0x38, 8)
    t.write_config(0x3C, 0x77, 1)
    after = t.config(0x38, 8)
    expected = before[:4] + b"\x77" + before[5:]
    t.expect(after == expected, f"{before.hex()} has become {after.hex()}")


@register(
    "config.capability-bit",
    _CAPABILITIES,
    "The status register says that there is a list of capabilities if there is one.",
)
def _capability_bit(t: VfioTrial) -> None:
    t.begin()
    listed = bool(t.number(STATUS, 2) & 0x10)
    pointer = t.number(CAP_POINTER, 1)
    t.expect(listed or not pointer, f"there is a list at {pointer:#x}, and the status denies it")


@register(
    "config.capabilities",
    _CAPABILITIES,
    "The list of capabilities has no loop, ends, and lies behind the header, on whole registers.",
)
def _capability_list(t: VfioTrial) -> None:
    t.begin()
    found = list(t.capabilities())
    t.expect(not t.number(CAP_POINTER, 1) & 3, "the list begins at an address that is not aligned")
    for identifier, at in found:
        t.expect(identifier != 0xFF, f"there is nothing at {at:#x}, where a capability is to be")


@register(
    "config.capabilities-once",
    _CAPABILITIES,
    "MSI, MSI-X, power management and PCI Express are in the list once at most.",
)
def _once(t: VfioTrial) -> None:
    t.begin()
    found = [identifier for identifier, _ in t.capabilities()]
    for identifier in (1, CAP_MSI, 0x10, CAP_MSIX):
        count = found.count(identifier)
        t.expect(count <= 1, f"capability {identifier:#x} is in the list {count} times")


@register(
    "config.capabilities-read-only",
    _CAPABILITIES,
    "Identifiers and links of capabilities are read-only.",
)
def _links(t: VfioTrial) -> None:
    t.begin()
    found = list(t.capabilities())
    if not found:
        t.skip("there are no capabilities")
    for _, at in found:
        before = t.config(at, 2)
        t.try_config(at, 0xFFFF, 2)
        after = t.config(at, 2)
        t.expect(before == after, f"{before.hex()} at {at:#x} has become {after.hex()}")


@register(
    "config.pointer-read-only", _CAPABILITIES, "Where the list of capabilities begins is read-only."
)
def _pointer(t: VfioTrial) -> None:
    t.begin()
    before = t.number(CAP_POINTER, 1)
    t.try_config(CAP_POINTER, 0xFC, 1)
    t.expect(t.number(CAP_POINTER, 1) == before, "it was changed")


@register(
    "config.extended",
    "PCI Express 5.0 section 7.6.3",
    "The list of extended capabilities has no loop and ends.",
)
def _extended(t: VfioTrial) -> None:
    t.begin()
    size = t.region(CONFIG_REGION).size
    if size <= _EXTENDED:
        t.skip("configuration space has 256 bytes")
    at, seen = _EXTENDED, set[int]()
    while at:
        t.expect(_EXTENDED <= at < size, f"an extended capability at {at:#x}")
        t.expect(at not in seen, f"the list has a loop at {at:#x}")
        seen.add(at)
        header = t.number(at, 4)
        t.expect(header != 0xFFFFFFFF, f"there is nothing at {at:#x}")
        at = header >> 20 & 0xFFC


@register(
    "config.bar-sizes",
    _BARS,
    "All ones that are written to a BAR tell its size, that of the region.",
    severity=Severity.SHOULD,
)
def _bar_sizes(t: VfioTrial) -> None:
    t.begin()
    for bar in t.bars():
        region = t.region(bar.index)
        t.expect(
            bar.size == region.size,
            f"BAR {bar.index} has {bar.size:#x} bytes, region {bar.index} {region.size:#x}",
        )


@register(
    "config.bar-powers",
    _BARS,
    "The size of a BAR is a power of two, at least 16 bytes of memory or 4 of I/O ports.",
)
def _bar_powers(t: VfioTrial) -> None:
    t.begin()
    for bar in t.bars():
        if bar.size:
            t.expect(
                not bar.size & (bar.size - 1) and bar.size >= (4 if bar.io else 16),
                f"BAR {bar.index} has {bar.size:#x} bytes",
            )


@register(
    "config.bar-address",
    _BARS,
    "A BAR keeps the address that is written to it, and its type.",
    severity=Severity.SHOULD,
)
def _bar_address(t: VfioTrial) -> None:
    t.begin()
    seen = False
    for bar in t.bars():
        if not bar.size or bar.io or bar.size > 1 << 30:
            continue
        seen = True
        at = 0x10 + 4 * bar.index
        before = t.number(at, 4)
        t.write_config(at, 0xC0000000, 4)
        found = t.number(at, 4)
        t.write_config(at, before, 4)
        t.expect(
            found == 0xC0000000 | before & 0xF,
            f"BAR {bar.index}: 0xc0000000 was written, {found:#x} is read",
        )
    if not seen:
        t.skip("there is no memory BAR")


@register("config.no-bar", _BARS, "The register of a BAR that does not exist is always 0.")
def _no_bar(t: VfioTrial) -> None:
    t.begin()
    taken = {bar.index + 1 for bar in t.bars() if bar.wide}
    for index in range(6):
        if index in taken or t.region(index).size:
            continue
        at = 0x10 + 4 * index
        t.try_config(at, 0xFFFFFFFF, 4)
        found = t.number(at, 4)
        t.expect(not found, f"BAR {index} does not exist, and its register reads {found:#x}")


@register(
    "config.interrupt-pin",
    pci("6.2.4"),
    "The interrupt pin is there if, and only if, the device has INTx.",
)
def _pin(t: VfioTrial) -> None:
    t.begin()
    pin, count = t.number(0x3D, 1), t.irq(INTX).number
    t.expect(pin <= 4, f"the pin is {pin}")
    t.expect(bool(pin) == bool(count), f"the pin is {pin}, and INTx has {count} interrupts")


@register("config.pin-read-only", pci("6.2.4"), "The interrupt pin is read-only.")
def _pin_read_only(t: VfioTrial) -> None:
    t.begin()
    before = t.number(0x3D, 1)
    t.try_config(0x3D, before ^ 3, 1)
    t.expect(t.number(0x3D, 1) == before, "it was changed")


@register(
    "config.msi", pci("6.8.1"), "MSI has as many vectors as its kind of interrupts, at most 32."
)
def _msi(t: VfioTrial) -> None:
    t.begin()
    at = t.capability(CAP_MSI)
    vectors = 1 << (t.number(at + 2, 2) >> 1 & 7)
    count = t.irq(MSI).number
    t.expect(vectors <= 32, f"the capability has {vectors} vectors")
    t.expect(count == vectors, f"the capability has {vectors} vectors, the interrupts {count}")


@register("config.msix-count", pci("6.8.2"), "MSI-X has as many vectors as its kind of interrupts.")
def _msix_count(t: VfioTrial) -> None:
    t.begin()
    at = t.capability(CAP_MSIX)
    vectors = (t.number(at + 2, 2) & 0x7FF) + 1
    count = t.irq(MSIX).number
    t.expect(count == vectors, f"the capability has {vectors} vectors, the interrupts {count}")


@register(
    "config.msix-place",
    pci("6.8.2"),
    "MSI-X's table and pending bits lie in BARs that exist, and do not overlap.",
)
def _msix_place(t: VfioTrial) -> None:
    t.begin()
    at = t.capability(CAP_MSIX)
    vectors = (t.number(at + 2, 2) & 0x7FF) + 1
    places = []
    for name, where, length in (
        ("table", at + 4, 16 * vectors),
        ("pending bits", at + 8, -(-vectors // 64) * 8),
    ):
        word = t.number(where, 4)
        bar, offset = word & 7, word & ~7
        t.expect(bar < 6, f"the {name} is in BAR {bar}")
        size = t.region(bar).size
        t.expect(
            offset + length <= size,
            f"the {name} is at {offset:#x}+{length:#x} of BAR {bar}, which has {size:#x} bytes",
        )
        places.append((bar, offset, length))
    (bar, table, length), (other, pending, more) = places
    t.expect(
        bar != other or table + length <= pending or pending + more <= table,
        "the table and the pending bits overlap",
    )


@register(
    "config.msix-read-only", pci("6.8.2"), "Where MSI-X's table is, and its size, are read-only."
)
def _msix_read_only(t: VfioTrial) -> None:
    t.begin()
    at = t.capability(CAP_MSIX)
    before = t.config(at + 4, 8)
    size = t.number(at + 2, 2) & 0x7FF
    t.try_config(at + 2, (size ^ 0x7FF) & 0x7FF, 2)
    for word in (4, 8):
        t.try_config(at + word, 0xFFFFFFFF, 4)
    t.expect(t.config(at + 4, 8) == before, "the place was changed")
    t.expect(t.number(at + 2, 2) & 0x7FF == size, "the size was changed")


@hostile("config.noise", pci("6.1"), "Noise in configuration space harms nothing.")
def _noise(t: VfioTrial) -> None:
    t.begin()
    size = t.region(CONFIG_REGION).size
    for _ in range(200):
        count = t.random.choice([1, 2, 4])
        offset = t.random.randrange(size // count) * count
        if offset <= COMMAND + 1 and offset + count > COMMAND:
            continue
        t.try_config(offset, t.random.getrandbits(8 * count), count)
    t.alive()
