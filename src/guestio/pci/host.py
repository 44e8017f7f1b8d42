"""A PCI device with its configuration space, interrupts and memory, for any transport."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from operator import index as as_index
from typing import TYPE_CHECKING, Final

from guestio._core.memory.slices import VolatileSlice
from guestio._core.pci.doorbell import Doorbell, Doorbells
from guestio.addr import check_int
from guestio.budgets import BAR_ACCESSES
from guestio.errors import DeviceError
from guestio.memory import Backing
from guestio.memory.backing import close_fd
from guestio.pci.capabilities import Msi, MsiX
from guestio.pci.config import (
    COMMAND_INTX_DISABLE,
    COMMAND_IO,
    COMMAND_MEMORY,
    ConfigSpace,
)
from guestio.pci.device import Bar, PciDevice, check_device, complete
from guestio.pci.interrupts import InterruptKind, Interrupts
from guestio.pci.memory import ASLEEP, NO_BUS_MASTER, BusMemory, RemoteMemory
from guestio.trace import What, event, new_origin
from guestio.virtio.calls import LoopCalls
from guestio.virtio.loop import EventLoop

if TYPE_CHECKING:
    from guestio._core.iommu.address_space import AddressSpace


class PciHost(LoopCalls):
    """A PCI device and what a transport drives of it.

    A device is handed its host by `PciDevice.attached`, and uses :attr:`memory`,
    :meth:`interrupt`, :meth:`set_pin`, :meth:`report_error`, :meth:`request_removal`,
    :meth:`add_doorbell`, :meth:`remove_doorbell`, :meth:`offer_ioeventfd`, :meth:`ioeventfd`,
    ``add_reader``, ``remove_reader``, ``call_later`` and ``call_soon_threadsafe``. The rest is for
    transports, in the loop's thread.

    Args:
        device: What is hosted.
        loop: Calls it.

    Raises:
        DeviceError, TypeError, ValueError: The device is not described as one should be.

    Attributes:
        device: What is hosted.
        memory: What it reaches by DMA. From any thread.
        bars: Its BARs, that of MSI-X included.
        config: Its configuration space.
        interrupts: Its vectors, for a transport.
        doorbells: Its doorbells, for a transport.
        failures: Calls in which the device raised an exception, or returned no number.
        origin: Its number in records of tracepoints.
    """

    def __init__(self, device: PciDevice, loop: EventLoop) -> None:
        super().__init__(type(device).__name__, loop)
        self.origin: Final = new_origin()
        self.device: Final = check_device(device)
        self.bars, capabilities = complete(device)
        self.memory: Final = BusMemory()
        counts: dict[InterruptKind, int] = {}
        self._msix: MsiX | None = None
        for each in capabilities:
            if isinstance(each, MsiX):
                counts[InterruptKind.MSIX] = each.vectors
                self._msix, self._table = each, bytearray(each.table_size)
            elif isinstance(each, Msi):
                counts[InterruptKind.MSI] = each.vectors
        if device.interrupts:
            counts[InterruptKind.INTX] = 1
        self.interrupts: Final = Interrupts(counts)
        self.config: Final = ConfigSpace(
            device, self.bars, capabilities, 1 if device.interrupts else 0
        )
        self.doorbells: Final = Doorbells(self._doorbell_failed)
        self._serving_doorbells = False
        # -1 as long as nothing has asked for it.
        self._ioeventfds: dict[tuple[int, int], int] = {}
        self._connected = False
        self.failures = 0
        self._views: dict[int, VolatileSlice] = {
            number: _view(bar.memory) for number, bar in self.bars.items() if bar.memory is not None
        }
        self._start_over()

    def __repr__(self) -> str:
        return f"<PciHost of {self.device!r}: {self.memory!r}>"

    def interrupt(self, vector: int = 0) -> None:
        """Interrupt the driver. From any thread.

        What cannot be delivered now is delivered once it can be: when the driver has set the vector
        up, unmasks it, and has made the function bus master. A vector that is pending stays so,
        however often it is raised.

        Raises:
            DeviceError: The device has no such vector.
        """
        if not 0 <= check_int(vector, "vector") < max(self.device.interrupts, 1):
            raise DeviceError(
                f"{self._owner} has {self.device.interrupts} interrupts, not a vector {vector}"
            )
        self.interrupts.raise_interrupt(vector)

    def report_error(self) -> bool:
        """Tell the client that the device has failed for good: the interrupt ERR of VFIO.

        For what no driver can put right, as a fatal error that a PCI Express device reports by AER.
        It goes to the client, not to the driver, and masks and bus mastering do not hold it up.
        QEMU stops the guest, which can be looked at then and not go on (``internal-error``). A
        client that does not listen yet is told once it does; a reset, and the end of the client,
        end that. From any thread.

        Returns:
            Whether the client has been told; False if it does not listen.
        """
        told = self.interrupts.notify(InterruptKind.ERR)
        listening = "the client was told" if told else "no client listens to that (ERR)"
        self.log.report("%s has failed: %s", self._owner, listening)
        return told

    def request_removal(self) -> bool:
        """Ask the client to let go of the device: the interrupt REQ of VFIO.

        Nothing else happens, and the client decides. It is right to ask again after some seconds,
        as Linux does for a device that its host takes back. QEMU unplugs a device of
        ``vfio-pci`` then, with the guest's consent; its ``vfio-user-pci`` does not listen (11.1.3).
        A client that does not listen yet is asked once it does, resets or not, as long as it is
        there. From any thread.

        Returns:
            Whether the client has been asked; False if it does not listen.
        """
        return self.interrupts.notify(InterruptKind.REQ)

    def add_doorbell(self, bar: int, offset: int, size: int, doorbell: Doorbell) -> None:
        """Have a driver's writes to a range of registers handled in the core.

        Writes that lie in the range as a whole and are at most as wide as the BAR's accesses ring
        the doorbell instead of calling `PciDevice.write`; reads go to the device as ever. All
        doorbells that were rung serve after the messages that had arrived were obeyed, each once,
        and before a reset.

        Args:
            bar: The BAR.
            offset: Where the range begins.
            size: Its bytes.
            doorbell: What is rung. One doorbell may have several ranges.

        Raises:
            DeviceError: The device has no such BAR, or the range leaves it, overlaps another
                doorbell's, a register with an `on_write` method, or what the driver reaches
                without the device.
            TypeError: That is no doorbell, or no number.
        """
        if not isinstance(doorbell, Doorbell):
            raise TypeError(f"doorbell must be a guestio Doorbell, not {doorbell!r}")
        place = self._check_place(bar, offset, size, "a doorbell")
        register = self.device.register_file.with_on_write(bar, offset, size)
        if register is not None:
            raise DeviceError(
                f"a doorbell at {offset:#x}+{size:#x} of BAR {bar} takes the writes of "
                f"{register!r}, whose on_write method would not be called"
            )
        try:
            self.doorbells.add(bar, offset, size, place.width, doorbell)
        except ValueError as error:
            raise DeviceError(f"{self._owner}: {error}") from None

    def _check_place(self, bar: int, offset: int, size: int, what: str) -> Bar:
        """A BAR with a range whose accesses reach the device.

        Raises:
            DeviceError: There is no such one.
        """
        where = f"{what} at {check_int(offset, 'offset'):#x}+{check_int(size, 'size'):#x}"
        place = self.bars.get(check_int(bar, "bar"))
        if place is None or offset < 0 or size < 1 or offset + size > place.size:
            raise DeviceError(f"{self._owner} has no room for {where} of BAR {bar}")
        if place.overlaps_memory(offset, size):
            raise DeviceError(f"{where} of BAR {bar} is in memory that the driver maps")
        if self._msix is not None and self._msix.overlaps(bar, offset, size):
            raise DeviceError(f"{where} of BAR {bar} is in the table or pending bits of MSI-X")
        return place

    def remove_doorbell(self, bar: int, offset: int) -> None:
        """Remove the doorbell whose range begins at ``offset``: it is rung and served no more.

        Raises:
            DeviceError: There is none.
        """
        try:
            self.doorbells.remove(bar, offset)
        except ValueError as error:
            raise DeviceError(f"{self._owner}: {error}") from None

    def offer_ioeventfd(self, bar: int, offset: int) -> None:
        """Let clients signal an eventfd instead of writing to a register: an ioeventfd.

        That is for registers whose writes say nothing but "look": neither the value nor the width
        of a write is learned. A client gets the eventfd when it asks for it, and may have a
        hypervisor signal it, so that a write of the driver takes no message. Writes that come as
        messages reach the register as ever. To be called in `PciDevice.attached`.

        Args:
            bar: The BAR.
            offset: Where writes begin that the eventfd stands for.

        Raises:
            DeviceError: The device has no such register, or it is offered already.
        """
        self._check_place(bar, offset, 1, "an ioeventfd")
        if (bar, offset) in self._ioeventfds:
            raise DeviceError(
                f"{self._owner} offers an ioeventfd at {offset:#x} of BAR {bar} twice"
            )
        self._ioeventfds[bar, offset] = -1

    def ioeventfd(self, bar: int, offset: int) -> int:
        """The eventfd that the client which is there signals instead of writing.

        It is made when it is first asked for, outlives resets, and is closed when the client goes,
        once the device was reset. The client shares its file description, and may make it block,
        and as large as it likes: `guestio` reads and signals such eventfds without waiting, and
        waiting for one does no harm.

        Returns:
            The descriptor, the host's; to be duplicated by what uses it after a reset.

        Raises:
            DeviceError: It was not offered, or no client is there.
            OSError: There is no descriptor left.
        """
        fd = self._ioeventfds.get((bar, offset))
        if fd is None:
            raise DeviceError(f"{self._owner} offers no ioeventfd at {offset:#x} of BAR {bar}")
        if not self._connected:
            raise DeviceError(f"{self._owner} has no client that would signal an ioeventfd")
        if fd < 0:
            fd = self._ioeventfds[bar, offset] = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return fd

    def _doorbell_failed(self, method: str) -> None:
        self._count_failure(f"{method} of a doorbell of {self._owner} raised", trace=True)

    def serve_doorbells(self) -> None:
        """Serve what was rung for, once what is being done is done."""
        if not self._serving_doorbells:
            self._serving_doorbells = True
            self._loop.call_soon_threadsafe(self._serve_rung)

    def _serve_rung(self) -> None:
        self._serving_doorbells = False
        if self.doorbells.serve_rung():
            self.serve_doorbells()

    def set_pin(self, asserted: bool) -> None:
        """Assert or deassert the pin INTA, for a device with a level of its own. From any thread.

        While it is asserted it interrupts again each time its driver has dealt with it. It has no
        effect while the driver uses MSI-X or MSI.
        """
        self.interrupts.set_pin(asserted)

    @property
    def loop(self) -> EventLoop:
        """What calls the device."""
        return self._loop

    # What a transport drives.

    def connect(self, space: AddressSpace, remote: RemoteMemory | None = None) -> None:
        """Let the device reach a driver's memory; again when that has changed."""
        self._connected = True
        self.memory.connect(space, remote)
        self._call_device("memory_changed")

    def revoke(self, address: int, size: int) -> None:
        """Have the device let go of memory that was unmapped too long ago."""
        self._call_device("revoked", address, size)

    def disconnect(self) -> None:
        """End serving a driver: the device is reset, and reaches nothing any more."""
        self.memory.connect(None)
        self._call_device("memory_changed")
        self.interrupts.close()
        self.doorbells.forget_rung()
        self.reset()
        self._connected = False
        for place, fd in self._ioeventfds.items():
            if fd >= 0:
                # The client may go on signalling it: the next one has others.
                self._ioeventfds[place] = -1
                close_fd(fd)

    def ioeventfds(self, bar: int, most: int) -> list[tuple[int, int]]:
        """The ioeventfds of a BAR for a client, as ``(offset, descriptor)``, the first ``most``.

        Raises:
            OSError: There is no descriptor left.
        """
        places = [place for place in self._ioeventfds if place[0] == bar]
        return [(offset, self.ioeventfd(bar, offset)) for _, offset in places[:most]]

    def reset(self) -> None:
        """Reset the function. Triggers of interrupts stay."""
        # What was rung for before a reset is for the function as it was.
        self.doorbells.finish()
        event(What.RESET, origin=self.origin)
        self.config.reset()
        self.interrupts.forget_pending()
        self._start_over()
        self.device.register_file.reset()
        self._call_device("reset")

    def _start_over(self) -> None:
        if self._msix is not None:
            # Each vector is masked at first.
            self._table[:] = (bytes(12) + b"\1\0\0\0") * self._msix.vectors
        self._spaces = 0
        self._obey_config()

    def _obey_config(self) -> None:
        config = self.config
        # Clients that decode addresses themselves need not switch spaces on, and SPDK's does not:
        # what was never on is not off.
        self._spaces |= config.command
        off = self._spaces & ~config.command
        # Asleep, a function answers in its configuration space only (PCI Bus Power Management
        # Interface Specification 1.2, section 5.4.1).
        awake = config.power_state == 0
        self._silent = sum(
            1 << number
            for number, bar in self.bars.items()
            if not awake or off & (COMMAND_IO if bar.io else COMMAND_MEMORY)
        )
        self.doorbells.silent = self._silent
        changed = self.memory.enabled != config.bus_master
        self.memory.refusal = NO_BUS_MASTER if awake else ASLEEP
        self.memory.enabled = config.bus_master
        self.interrupts.allow(
            messages=config.bus_master, pin=awake and not config.command & COMMAND_INTX_DISABLE
        )
        if changed:
            self._call_device("memory_changed")

    def read_config(self, offset: int, size: int) -> bytes:
        """Read the configuration space; the range does not leave it."""
        if self.config.window_data(offset, size) is not None:
            self._read_window()
        return self.config.read(offset, size)

    def _window_target(self) -> tuple[int, int, int] | None:
        """BAR, offset and length that the window leads to; None if that is no such access."""
        index, at, length = self.config.window_target()
        if self.config.power_state:
            return None
        bar = self.bars.get(index)
        if bar is not None and length in (1, 2, 4) and not at % length and at + length <= bar.size:
            return index, at, length
        if not length:
            # Not set up: clients read the space as a whole.
            return None
        self.log.report(
            "the driver of %s accesses %#x+%d of BAR %d by the configuration space, which is no "
            "access of 1, 2 or 4 bytes within a BAR: ignored",
            self._owner,
            at,
            length,
            index,
        )
        return None

    def _read_window(self) -> None:
        target = self._window_target()
        self.config.set_window_data(b"\xff" * 4 if target is None else self.read_bar(*target))

    def write_config(self, offset: int, data: bytes) -> bool:
        """Write the configuration space; the range does not leave it.

        Returns:
            Whether that was a function level reset.
        """
        if self.config.write(offset, data):
            self.reset()
            return True
        self._obey_config()
        written = self.config.window_data(offset, len(data))
        if written is not None and (target := self._window_target()) is not None:
            index, at, length = target
            self.write_bar(index, at, self.config.read(written, length))
        return False

    def read_bar(self, index: int, offset: int, size: int) -> bytes:
        """Read a range of a BAR, which it does not leave."""
        return b"".join(self._reads(index, offset, size))

    def _reads(self, index: int, offset: int, size: int) -> Iterator[bytes]:
        bar = self.bars[index]
        for at, length in _accesses(bar, offset, size):
            yield self._read(index, bar, at, length)

    def write_bar(self, index: int, offset: int, data: bytes) -> None:
        """Write a range of a BAR, which it does not leave."""
        for _ in self._writes(index, offset, data):
            pass

    def _writes(self, index: int, offset: int, data: bytes) -> Iterator[int]:
        """Make one access of a write after the other; how many bytes are written by then."""
        bar = self.bars[index]
        for at, length in _accesses(bar, offset, len(data)):
            self._write(index, bar, at, data[at - offset : at - offset + length])
            yield at - offset + length

    def read_part(self, index: int, offset: int, size: int, until: float) -> bytes:
        """Read the beginning of a range of a BAR for a client: BAR_ACCESSES at least.

        Args:
            index: The BAR.
            offset: Where the range begins, which does not leave the BAR.
            size: Its bytes.
            until: When to stop (monotonic time).

        Returns:
            The bytes that were read; ones where the driver has switched the BAR's space off, or has
            put the function into D3hot.
        """
        if self._silent >> index & 1:
            return b"\xff" * size
        found = bytearray()
        for number, part in enumerate(self._reads(index, offset, size), 1):
            found += part
            if not number % BAR_ACCESSES and len(found) < size and time.monotonic() >= until:
                break
        return bytes(found)

    def write_part(self, index: int, offset: int, data: bytes, until: float) -> int:
        """Write the beginning of a range of a BAR, as :meth:`read_part` reads it.

        Returns:
            How many bytes were written; what is written to a BAR that is switched off is lost.
        """
        if self._silent >> index & 1:
            return len(data)
        for number, done in enumerate(self._writes(index, offset, data), 1):
            if not number % BAR_ACCESSES and done < len(data) and time.monotonic() >= until:
                return done
        return len(data)

    def _read(self, index: int, bar: Bar, at: int, length: int) -> bytes:
        if bar.mapped(at, length):
            return self._views[index].read(at, length)
        own = self._msix_bytes(index, at, length)
        if own is not None:
            return own
        value = self._call_device("read", index, at, length)
        try:
            number = as_index(value)  # type: ignore[arg-type]  # anything may have been returned
        except TypeError:
            if value is not self._failed:
                where = _place("read", index, at, length)
                self._count_failure(f"read of {self._owner}{where} returned no number")
            number = -1
        return (number & (1 << 8 * length) - 1).to_bytes(length, "little")

    def _write(self, index: int, bar: Bar, at: int, data: bytes) -> None:
        if bar.mapped(at, len(data)):
            self._views[index].write(at, data)
        elif self._msix_bytes(index, at, len(data)) is None:
            value = int.from_bytes(data, "little")
            if self.doorbells.write(index, at, len(data), value):
                self.serve_doorbells()
            else:
                self._call_device("write", index, at, len(data), value)
        elif self._msix is not None and at < self._msix.table + self._msix.table_size:
            at -= self._msix.table
            self._table[at : at + len(data)] = data

    def _msix_bytes(self, index: int, at: int, length: int) -> bytes | None:
        """Bytes of the MSI-X table or of the pending bits, if they are there; clients keep both."""
        own = self._msix
        if own is None or own.bar != index:
            return None
        if own.table <= at < own.table + own.table_size:
            at -= own.table
            return bytes(self._table[at : at + length])
        if own.pba_offset <= at < own.pba_offset + own.pba_size:
            at -= own.pba_offset
            return self.interrupts.pending_bits()[at : at + length]
        return None

    _failed: Final = object()

    def _call_device(self, method: str, *args: int) -> object:
        """Call a method of the device; what it returned, or `_failed` if it raised."""
        try:
            return getattr(self.device, method)(*args)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self._count_failure(
                f"{method} of {self._owner}{_place(method, *args)} raised {type(error).__name__}",
                trace=True,
            )
            return self._failed

    def _count_failure(self, what: str, *, trace: bool = False) -> None:
        self.failures += 1
        self.log.report("%s", what, trace=trace)


def _place(method: str, *args: int) -> str:
    """What a call of the device was about, for a log line."""
    if method == "read":
        return " (BAR {}, offset {:#x}, {} bytes)".format(*args)
    if method == "write":
        return " (BAR {}, offset {:#x}, {} bytes, value {:#x})".format(*args)
    if method == "revoked":
        return " (address {:#x}, {:#x} bytes)".format(*args)
    return ""


def _view(memory: Backing) -> VolatileSlice:
    if memory.fd is not None:
        # A client gets the descriptor, and must not resize what the next one uses. Other files
        # than memfds have no seals.
        with contextlib.suppress(OSError):
            fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return VolatileSlice.over(memory._mapping)


def _accesses(bar: Bar, offset: int, size: int) -> Iterator[tuple[int, int]]:
    """Aligned accesses of at most the BAR's width that make up a range, in order."""
    end = offset + size
    while offset < end:
        length = bar.width
        while offset % length or offset + length > end:
            length //= 2
        yield offset, length
        offset += length
