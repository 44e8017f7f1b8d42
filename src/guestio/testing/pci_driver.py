"""A driver of a PCI function, without a virtual machine: for tests of devices.

Source: PCI Local Bus Specification 3.0, chapter 6; PCI Express Base Specification 4.0, sections
6.6.2 (function level reset) and 7.5.3; linux/pci_regs.h.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Final, Self

from guestio.addr import check_int, check_seconds
from guestio.dma import INTX, MSI, MSIX, DmaMapRequest
from guestio.dma.device import kind_name
from guestio.errors import DeviceError, GuestioError
from guestio.guest.dma import PAGE, GuestBuffer, IovaAllocator, PageAllocator
from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from guestio.memory.backing import close_fd
from guestio.pci import Msi, MsiX, PciExpress
from guestio.pci.config import COMMAND, COMMAND_INTX_DISABLE
from guestio.vfio_user import Client, VfioUserTarget
from guestio.vhost_user.frontend import NoAnswerError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_CAPABILITIES: Final = 0x34
_EXTENDED_CAPABILITIES: Final = 0x100
_DEVICE_CAPABILITIES: Final = 4
"""Offset of the device capabilities register in the capability of PCI Express."""
_CAN_RESET: Final = 1 << 28
"""Bit of that register: there is a function level reset."""
_CONTROL: Final = 2
"""Offset of the control register in the capabilities of MSI and MSI-X."""
_MSIX_ENABLE: Final = 1 << 15
_MSI_ENABLE: Final = 1
_MSI_VECTORS: Final = 4
"""Where its control register has the number of vectors, as a power of two."""


class DmaBuffer:
    """Memory that a driver lets its device reach; made by :meth:`PciDriver.map`.

    For the driver and for the device it lies in a row; its pages are anywhere in the driver's
    memory. A context manager that closes it. For one thread.

    Attributes:
        iova: Where the device finds it.
        size: Bytes.
    """

    def __init__(self, driver: PciDriver, memory: GuestBuffer, iova: int) -> None:
        self._driver = driver
        self._memory = memory
        self._mapped: list[tuple[int, int]] = []
        self._closed = False
        self.iova = iova
        self.size = memory.length

    def __repr__(self) -> str:
        state = f"{len(self._mapped)} mappings" if self._mapped else "not mapped"
        return f"<DmaBuffer of {self.size} bytes at {self.iova:#x}: {state}>"

    @property
    def data(self) -> bytes:
        """What is in it now."""
        return self.read()

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Read as the driver does, from an offset on; all of it unless a length is given.

        Raises:
            ValueError: Outside the buffer, or it is closed.
        """
        self._check_open()
        return self._memory.memory.read(offset, length)

    def write(self, data: Buffer, offset: int = 0) -> None:
        """Write as the driver does.

        Raises:
            ValueError: Outside the buffer, or it is closed.
        """
        self._check_open()
        self._memory.memory.write(data, offset)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"{self!r} is closed")

    def unmap(self) -> None:
        """Take it from the device: once this returns no access of the device reaches it.

        What is in it can be read on: :attr:`data`. Calling it again does nothing.

        Raises:
            DmaError: The server refuses, or is gone without having closed its end.
        """
        while self._mapped:
            self._driver._target.unmap_dma(*self._mapped[-1])
            self._mapped.pop()

    def close(self) -> None:
        """Unmap it, and give its pages back to the driver. Calling it again does nothing.

        Raises: as :meth:`unmap`; it is not closed then.
        """
        if self._closed:
            return
        if not self._driver.closed:
            self.unmap()
        self._closed = True
        self._driver._give_back(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PciDriver(Client):
    """A driver of a PCI function at a vfio-user socket: a :class:`~guestio.vfio_user.Client`.

    Configuration space, BARs and resets are those of a client: ``driver.config.load(0, 2)``,
    ``driver.bar(0).store(offset, value, width)``, ``driver.bus_master = False``. It adds what a
    driver and its kernel do: memory for DMA that is mapped and unmapped, interrupts that are
    switched on and waited for, capabilities, the function level reset.

        with serving(MyDevice()) as path, PciDriver(path) as driver:
            driver.start_interrupts()
            with driver.map(b"hello") as buffer:
                driver.bar(0).store(0, buffer.iova, 8)
                driver.wait_interrupt()

    Registers may be accessed from any thread; the rest is for one. A context manager that closes
    it.

    Args:
        path: Where the server listens; or a connected Unix stream socket, which is the driver's.
        memory_size: Bytes of the driver's memory, a multiple of 4096.
        share: False to pass no descriptors: the device reaches memory by messages (DMA_READ,
            DMA_WRITE), as that of a VMM that does not share it.
        enable: Whether the device answers at its BARs and is bus master from the beginning; see
            :meth:`enable`.
        reuse_iovas: Whether addresses are used again at once, as Linux does: a device that uses one
            after its time then reaches other memory. False for addresses never used before.
        seed: Makes the choice of pages repeatable.
        timeout: Seconds that any wait may take unless told otherwise.
        connect_wait: Seconds to go on trying while there is no server yet.

    Raises:
        DeviceError: There is no server, or its device cannot be used.
        ServerGoneError: It does not answer, or says what cannot be.
        TypeError, ValueError: Bad arguments.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | socket.socket,
        *,
        memory_size: int = 16 << 20,
        share: bool = True,
        enable: bool = True,
        reuse_iovas: bool = True,
        seed: int = 0,
        timeout: float = 10.0,
        connect_wait: float = 0.0,
    ) -> None:
        # Until there is something to close.
        self._closed = True
        size = check_int(memory_size, "memory_size")
        if size <= 0 or size % PAGE:
            raise ValueError(f"memory_size {size} is not a positive multiple of {PAGE}")
        self._interrupt_kind: int | None = None
        self._interrupt_events: list[int] = []
        self._pin_fired = False
        self._patience = check_seconds(timeout, "timeout")
        self._iovas = IovaAllocator(reuse=reuse_iovas)
        super().__init__(path, timeout=timeout, connect_wait=connect_wait)
        try:
            self._backing = Backing.memfd(size, "guestio-driver", seal=True)
            self._region = MmapRegion(0, self._backing, name="driver")
            self._memory = GuestRegionCollection.from_regions([self._region])
            self._pages = PageAllocator(self._memory, seed)
            self._target = VfioUserTarget(self, share=share)
            if enable:
                self.enable()
        except BaseException:
            self.close()
            raise

    def enable(self) -> None:
        """Have the device answer at its BARs and begin transfers: memory space and bus mastering.

        A driver does so first, and after each reset.

        Raises:
            DeviceError: The server refuses.
            ServerGoneError: The connection has ended.
        """
        self.memory_space = self.bus_master = True

    def close(self) -> None:
        """Hang up. What is in buffers can be read on. Calling it again does nothing."""
        if self.closed:
            return
        super().close()
        self._close_events()
        # Whatever refers to the memory keeps it mapped: buffers.
        for name in ("_region", "_memory", "_backing"):
            self.__dict__.pop(name, None)

    # Capabilities and resets

    def capabilities(self, *, extended: bool = False) -> list[tuple[int, int]]:
        """The device's capabilities, each as its number and its offset in the configuration space.

        Args:
            extended: Those of PCI Express' extended configuration space instead.

        Raises:
            DeviceError: They are linked in a circle; or the server refuses to say.
            ServerGoneError: The connection has ended.
        """
        found: list[tuple[int, int]] = []
        if extended:
            at = _EXTENDED_CAPABILITIES if self.config.size > _EXTENDED_CAPABILITIES else 0
        else:
            at = self.config.load(_CAPABILITIES, 1) & ~3
        while at:
            if any(at == place for _, place in found):
                raise DeviceError(f"{self.address}: the capability at {at:#x} is linked twice")
            if extended:
                head = self.config.load(at, 4)
                number, following = head & 0xFFFF, head >> 20 & ~3
            else:
                number, following = self.config.read(at, 2)
                following &= ~3
            if number or not extended:
                # Without any, the extended space begins with zeroes.
                found.append((number, at))
            at = following
        return found

    def capability(self, number: int, *, extended: bool = False) -> int:
        """Where the first capability of a number is in the configuration space.

        Raises:
            DeviceError: There is none; or as :meth:`capabilities`.
            ServerGoneError: The connection has ended.
        """
        for known, at in self.capabilities(extended=extended):
            if known == number:
                return at
        raise DeviceError(f"{self.address} has no capability {number:#x}")

    def reset(self) -> None:
        """Reset the device by the client's message, as a machine that is reset does.

        It is as after power-on: bus mastering and interrupts are off. Mappings stay.

        Raises:
            DeviceError: It cannot be reset, or the server refuses.
            ServerGoneError: The connection has ended.
        """
        super().reset()
        self._forget_interrupts()

    def function_level_reset(self) -> None:
        """Reset the device by its capability of PCI Express, as its driver does.

        It is as after power-on: bus mastering and interrupts are off. Mappings stay.

        Raises:
            DeviceError: It has no function level reset, or the server refuses.
            ServerGoneError: The connection has ended.
        """
        at = self.capability(PciExpress.number)
        if not self.config.load(at + _DEVICE_CAPABILITIES, 4) & _CAN_RESET:
            raise DeviceError(f"{self.address} has no function level reset")
        control = self.config.load(at + PciExpress.CONTROL, 2)
        self.config.store(at + PciExpress.CONTROL, control | PciExpress.FUNCTION_RESET, 2)
        self._forget_interrupts()

    # Memory

    def map(
        self,
        content: int | Buffer,
        *,
        writable: bool = True,
        contiguous: bool = False,
        offset: int = 0,
        iova: int | None = None,
    ) -> DmaBuffer:
        """Let the device reach memory.

        Each page is a mapping of its own, of a page from anywhere in the driver's memory, as behind
        an IOMMU: the device must not take one buffer for one piece of memory. Behind the last page
        nothing is mapped.

        Args:
            content: What is in it; or how many bytes, which are zero.
            writable: Whether the device may write; it may always read.
            contiguous: Whether it is one mapping of memory in one piece, as without an IOMMU.
            offset: Where in its first page it begins.
            iova: Where the device is to find its first page; None for a place of the driver's
                choice, below 4 GiB as long as there is one.

        Raises:
            DeviceError: The driver is out of memory.
            DmaError: The server refuses, or is gone.
            TypeError, ValueError: Bad arguments, or the driver is closed.
        """
        data = bytes(check_int(content, "content")) if isinstance(content, int) else content
        content = bytes(data)
        if not content:
            raise ValueError("a buffer has a byte at least")
        if not 0 <= check_int(offset, "offset") < PAGE:
            raise ValueError(f"offset {offset} is not in a page, 0..{PAGE - 1}")
        count = -(-(offset + len(content)) // PAGE)
        if iova is not None and check_int(iova, "iova") % PAGE:
            raise ValueError(f"iova {iova:#x} is not the address of a page; see offset")
        self._check_open()
        pages = self._pages.take(count, contiguous=contiguous)
        made: DmaBuffer | None = None
        try:
            memory = GuestBuffer(self._memory, pages, offset, len(content))
            # A page more, which stays unmapped.
            start = self._iovas.take(count + 1) if iova is None else iova
            memory.iova = None if iova is not None else start
            made = DmaBuffer(self, memory, start + offset)
            made.write(content)
            sizes = [count * PAGE] if contiguous else [PAGE] * count
            for page, size in zip(pages, sizes, strict=False):
                self._map(made, start, page, size, writable=writable)
                start += size
        except BaseException:
            if made is None:
                self._pages.give(pages)
            else:
                made.close()
            raise
        return made

    def _map(self, buffer: DmaBuffer, iova: int, page: int, size: int, *, writable: bool) -> None:
        assert self._backing.fd is not None
        self._target.map_dma(
            DmaMapRequest(
                iova,
                size,
                self._region.host_address(page),
                self._backing.fd,
                page,
                writable=writable,
            )
        )
        buffer._mapped.append((iova, size))

    def _give_back(self, buffer: DmaBuffer) -> None:
        memory = buffer._memory
        if memory.iova is not None:
            self._iovas.give(memory.iova, len(memory.pages) + 1)
        memory.memory.close()
        self._pages.give(memory.pages)

    # Interrupts

    def start_interrupts(self, kind: int = MSIX, vectors: int | None = None) -> None:
        """Switch interrupts on: give each vector an eventfd, and have the device use them.

        Args:
            kind: ``MSIX``, ``MSI`` or ``INTX`` of :mod:`guestio.dma`. Another one that was on is
                switched off.
            vectors: How many; None for all that the device has. Of ``MSI`` a power of two.

        Raises:
            DeviceError: The device has none of that kind, or not as many; or the server refuses.
            ServerGoneError: The connection has ended.
            ValueError: There is no such kind, or such a number of it.
        """
        if kind not in (MSIX, MSI, INTX):
            raise ValueError(f"interrupts are of kind MSIX, MSI or INTX, not {kind_name(kind)}")
        offered = self.interrupts(kind).vectors
        count = offered if vectors is None else check_int(vectors, "vectors")
        if not offered:
            raise DeviceError(f"{self.address} has no interrupts of kind {kind_name(kind)}")
        if not 1 <= count <= offered or (kind == MSI and count & (count - 1)):
            raise ValueError(f"{count} interrupts of kind {kind_name(kind)}, of {offered}")
        self.stop_interrupts()
        try:
            for _ in range(count):
                self._interrupt_events.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self.enable_interrupts(kind, self._interrupt_events)
            self._interrupt_kind = kind
            self._switch(kind, count)
        except BaseException:
            with contextlib.suppress(GuestioError):
                self._forget_interrupts()
            raise

    def stop_interrupts(self) -> None:
        """Switch interrupts off. Without any it does nothing.

        Raises:
            DeviceError: The server refuses.
            ServerGoneError: The connection has ended.
        """
        if self._interrupt_kind is not None:
            self._switch(self._interrupt_kind, 0)
            self._forget_interrupts()

    def _switch(self, kind: int, vectors: int) -> None:
        """Say in the configuration space which interrupts the driver uses, as Linux does."""
        command = self.config.load(COMMAND, 2)
        # With messages the pin is switched off.
        pin = kind == INTX or not vectors
        command = command & ~COMMAND_INTX_DISABLE if pin else command | COMMAND_INTX_DISABLE
        self.config.store(COMMAND, command, 2)
        if kind == INTX:
            return
        at = self.capability(MsiX.number if kind == MSIX else Msi.number) + _CONTROL
        control = self.config.load(at, 2)
        if kind == MSIX:
            control = control & ~_MSIX_ENABLE | (_MSIX_ENABLE if vectors else 0)
        else:
            control &= ~(_MSI_ENABLE | 7 << _MSI_VECTORS)
            if vectors:
                control |= _MSI_ENABLE | vectors.bit_length() - 1 << _MSI_VECTORS
        self.config.store(at, control, 2)

    def _forget_interrupts(self) -> None:
        """Take the eventfds back; the device's registers say already that there are none."""
        kind, self._interrupt_kind = self._interrupt_kind, None
        self._pin_fired = False
        try:
            if kind is not None:
                self.disable_interrupts(kind)
        finally:
            self._close_events()

    def _close_events(self) -> None:
        while self._interrupt_events:
            close_fd(self._interrupt_events.pop())

    def wait_interrupt(self, vector: int = 0, timeout: float | None = None) -> int:
        """Wait for an interrupt.

        The pin (``INTX``) is masked from each of its interrupts on until the next one is waited or
        looked for: its handler has ended then. A device that still asserts it interrupts again.

        Args:
            vector: Which one.
            timeout: Seconds; None for the driver's.

        Returns:
            How often it came since it was last waited or looked for.

        Raises:
            NoAnswerError: It did not come in time.
            ServerGoneError: The connection has ended, and it will not come.
            DeviceError: Interrupts are off, or there are not as many vectors.
        """
        limit = self._patience if timeout is None else check_seconds(timeout, "timeout")
        until = time.monotonic() + limit
        poll = select.poll()
        poll.register(self._event_of(vector), select.POLLIN)
        poll.register(self.state_fd, select.POLLIN)
        while True:
            if count := self.poll_interrupt(vector):
                return count
            if (failure := self.failure) is not None:
                raise failure
            left = until - time.monotonic()
            if left <= 0:
                break
            poll.poll(left * 1000)
        raise NoAnswerError(
            f"interrupt {vector} of {self.address} did not come within {limit:g} s{self._excuse()}"
        )

    def poll_interrupt(self, vector: int = 0) -> int:
        """How often an interrupt came since it was last waited or looked for. Never waits.

        Raises:
            DeviceError: Interrupts are off, or there are not as many vectors.
            ServerGoneError: The pin cannot be unmasked: the connection has ended.
        """
        event = self._event_of(vector)
        if self._pin_fired:
            self._pin_fired = False
            self.unmask_interrupt(INTX)
        try:
            count = os.eventfd_read(event)
        except BlockingIOError:
            return 0
        self._pin_fired = self._interrupt_kind == INTX
        return count

    def _event_of(self, vector: int) -> int:
        self._check_open()
        if self._interrupt_kind is None:
            raise DeviceError(f"interrupts of {self.address} are off: call start_interrupts()")
        if not 0 <= check_int(vector, "vector") < len(self._interrupt_events):
            raise DeviceError(
                f"{len(self._interrupt_events)} interrupts of {self.address} are on, not {vector}"
            )
        return self._interrupt_events[vector]

    def _excuse(self) -> str:
        """Why no interrupt may come, for a message."""
        with contextlib.suppress(GuestioError):
            if self._interrupt_kind != INTX and not self.bus_master:
                return ": the device is not bus master; call enable()"
        return ""
