"""A PCI function that misbehaves by rules, whatever transport serves it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from guestio.faults.misbehavior.force import Fault, Faults
from guestio.faults.misbehavior.rules import NO_PROXY, Level, Rule
from guestio.faults.misbehavior.wire import flipped
from guestio.pci import PciDevice, VirtioPci
from guestio.pci.virtio_pci import CONFIG

if TYPE_CHECKING:
    from guestio.pci.host import PciHost
    from guestio.pci.interrupts import Interrupts, Trigger
    from guestio.pci.registers import RegisterFile

_ONES: Final = -1
_SELECT, _FEATURES, _DRIVER_HALF, _DRIVER_FEATURES = 0x00, 0x04, 0x08, 0x0C
_STATUS, _GENERATION = 0x14, 0x15
"""Registers of virtio's common configuration (virtio 1.4, section 4.1.4.3)."""
_DESCRIPTION: Final = (
    "vendor_id",
    "device_id",
    "class_code",
    "revision",
    "subsystem_vendor_id",
    "subsystem_id",
    "bars",
    "interrupts",
    "capabilities",
    "msix",
)


class MisbehavingPci(PciDevice):
    """A PCI function that is as another one, except where rules say so.

    Registers whose writes are handled in the compiled core (doorbells), and memory of a BAR that
    the client maps, are beyond the rules.

    Args:
        device: What misbehaves. A `VirtioPci` of a `Misbehaving` device obeys the rules of that,
            too, if it is given the same `Faults`.
        rules: As for `Misbehaving`.

    Raises:
        ValueError: A rule is none, or of a level that this device has not.

    Attributes:
        device: What misbehaves.
        faults: The rules in force.
    """

    def __init__(self, device: PciDevice, rules: Iterable[str | Rule] | Faults = ()) -> None:
        if not isinstance(device, PciDevice):
            raise TypeError(f"device must be a guestio PciDevice, not {device!r}")
        self.device = device
        self.faults = rules if isinstance(rules, Faults) else Faults(rules)
        self.faults.expect(Level.PCI, ("read", "write"), "a PCI function")
        for level in (Level.WIRE, Level.IOMMU):
            self.faults.refuse(level, "over vhost-user only")
        self.faults.refuse(Level.PROXY, NO_PROXY)
        self._virtio = isinstance(device, VirtioPci)
        if not self._virtio:
            for level in (Level.DEVICE, Level.RING, Level.CONFIG):
                self.faults.refuse(level, "of virtio devices only; rules of this one are of PCI")
        for name in _DESCRIPTION:
            setattr(self, name, getattr(device, name))
        self._host: PciHost | None = None
        self._gone: Fault | None = None
        self._half = self._driver_half = 0
        self._invented = 0
        self._generation: int | None = None

    def __repr__(self) -> str:
        return f"<MisbehavingPci {self.device!r}: {self.faults!r}>"

    @property
    def virtio(self) -> VirtioPci | None:
        """See `PciDevice`."""
        return self.device.virtio

    @property
    def register_file(self) -> RegisterFile:
        """See `PciDevice`."""
        return self.device.register_file

    def explain(self) -> str:
        """See `PciDevice`."""
        return self.device.explain()

    def attached(self, host: PciHost) -> None:
        """See `PciDevice`; the device is given a host whose interrupts may be lost."""
        self._host = host
        self.device.attached(MisbehavingPciHost(host, self))  # type: ignore[arg-type] # same face

    def loses(self, vector: int) -> bool:
        """Whether an interrupt is not to be delivered."""
        return (
            self._gone is not None
            or self.faults.first(("msi-lost",), f"interrupt {vector}", vector=vector) is not None
        )

    def read(self, bar: int, offset: int, size: int) -> int:
        """Read a register as the device does, or worse."""
        if self._aborts("read", bar, offset, size):
            return _ONES
        value = self.device.read(bar, offset, size)
        if self._virtio and bar == 0:
            value = self._told(offset, size, value)
        last = offset + size - 1
        what = f"a read of BAR {bar}, {offset:#x}+{size}"
        for fault in self.faults.strike(("bad-bar",), what, bar=bar, offset=(offset, last)):
            value ^= 1 << fault.random.randrange(8 * size)
        return value

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Write a register as the device does, or worse."""
        if self._aborts("write", bar, offset, size):
            return
        if self._virtio and bar == 0:
            if (offset, size) == (_SELECT, 4):
                self._half = value
            elif (offset, size) == (_DRIVER_HALF, 4):
                self._driver_half = value
            elif (offset, size) == (_DRIVER_FEATURES, 4) and self._driver_half < 2:
                # What was offered and is not there is not used, either.
                value &= ~(self._invented >> 32 * self._driver_half)
        self.device.write(bar, offset, size, value)

    def _aborts(self, op: str, bar: int, offset: int, size: int) -> bool:
        if self._gone is not None:
            if not self._gone.ended:
                return True
            self._gone = None
        last = offset + size - 1
        what = f"a {op} of BAR {bar}, {offset:#x}+{size}"
        names = ("master-abort", "surprise-remove")
        fault = self.faults.first(names, what, op=op, bar=bar, offset=(offset, last))
        if fault is not None and fault.rule.what.name == "surprise-remove":
            self._gone = fault
            self.device.reset()
        return fault is not None

    def _told(self, offset: int, size: int, value: int) -> int:
        """What is read of virtio's registers, with lies about them."""
        end = offset + size
        if (offset, size) == (_FEATURES, 4) and self._half < 2:
            shift = 32 * self._half
            for fault in self.faults.strike(("feature-lie",), "the features that are offered"):
                if self._half == fault.value // 32:
                    bit = 1 << fault.value - shift
                    self._invented |= (bit & ~value) << shift
                    value ^= bit
        if offset <= _STATUS < end:
            for fault in self.faults.strike(("status-lie",), "the device status"):
                value ^= fault.value << 8 * (_STATUS - offset)
        if offset <= _GENERATION < end:
            shift = 8 * (_GENERATION - offset)
            now = value >> shift & 0xFF
            if self._generation is None:
                self._generation = now
            elif self._generation != now and self.faults.first(
                ("generation-stuck",), f"generation {now}, which is read as {self._generation}"
            ):
                value ^= (now ^ self._generation) << shift
        if offset >= CONFIG:
            data = flipped(self.faults, offset - CONFIG, value.to_bytes(size, "little"))
            value = int.from_bytes(data, "little")
        return value

    def reset(self) -> None:
        """See `PciDevice`. A device that is gone comes back at the end of its connection."""
        self._half = self._driver_half = 0
        if (
            self._gone is not None
            and self._host is not None
            and self._host.memory.reachable is None
        ):
            self._gone = None
        if self._gone is None:
            self.device.reset()

    def memory_changed(self) -> None:
        """See `PciDevice`."""
        self.device.memory_changed()

    def revoked(self, address: int, size: int) -> None:
        """See `PciDevice`."""
        self.device.revoked(address, size)

    def close(self) -> None:
        """Close the device, if it can be closed."""
        close = getattr(self.device, "close", None)
        if close is not None:
            close()


class MisbehavingPciHost:
    """A PCI host as a device sees it that misbehaves."""

    def __init__(self, host: PciHost, device: MisbehavingPci) -> None:
        self._host = host
        self._device = device
        self.interrupts = MisbehavingInterrupts(host.interrupts, device)

    def interrupt(self, vector: int = 0) -> None:
        """See `PciHost`."""
        if not self._device.loses(vector):
            self._host.interrupt(vector)

    def set_pin(self, asserted: bool) -> None:
        """See `PciHost`."""
        if not asserted or not self._device.loses(0):
            self._host.set_pin(asserted)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)


class MisbehavingInterrupts:
    """Interrupts as a device sees them that misbehaves: each of them passes by the rules."""

    def __init__(self, interrupts: Interrupts, device: MisbehavingPci) -> None:
        object.__setattr__(self, "_interrupts", interrupts)
        object.__setattr__(self, "_device", device)

    def raise_interrupt(self, vector: int) -> None:
        """See `Interrupts`."""
        if not self._device.loses(vector):
            self._interrupts.raise_interrupt(vector)

    def direct(self, vector: int) -> Trigger | None:
        """None: nothing is signalled past the rules."""
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._interrupts, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._interrupts, name, value)
