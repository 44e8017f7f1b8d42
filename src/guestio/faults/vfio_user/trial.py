"""What a check of a vfio-user server works with."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from guestio.faults.base_trial import BaseTrial
from guestio.faults.outcomes import HungUpError, RejectError, SkipError
from guestio.faults.vfio_user.link import Answer, VfioLink
from guestio.vfio_user.messages import (
    CONFIG_REGION,
    DEVICE_INFO,
    DMA_MAP,
    DMA_UNMAP,
    IRQ_INFO,
    REGION_ACCESS,
    REGION_INFO,
    SET_IRQS,
    Command,
    DeviceInfo,
    HeaderFlag,
    IrqInfo,
    IrqSet,
    RegionFlag,
    RegionInfo,
    command_name,
)

PAGE: Final = 4096
INTX, MSI, MSIX = 0, 1, 2
BUS_MASTER: Final = 4
MEMORY_SPACE: Final = 2
COMMAND, STATUS, CAP_POINTER = 4, 6, 0x34
CAP_MSI, CAP_VENDOR, CAP_EXPRESS, CAP_MSIX, CAP_AF = 5, 9, 0x10, 0x11, 0x13


@dataclass(frozen=True, slots=True)
class Bar:
    """What a BAR's register says.

    Attributes:
        index: Of its register.
        io: Whether it is in I/O space.
        wide: Whether the next register has its upper half.
        size: Bytes, as its writable bits say; 0 if there is none.
    """

    index: int
    io: bool
    wide: bool
    size: int


class VfioTrial(BaseTrial):
    """One run of one check against a vfio-user server.

    Args:
        connect: Makes a connection to the server, with so much patience.
        device: Type of its device: ``nvme``, ``virtio`` or ``any``.
        patience: Seconds that an answer may take.
        seed: Of everything random.

    Attributes:
        device: Type of its device.
    """

    def __init__(
        self,
        connect: Callable[[float], VfioLink],
        device: str,
        *,
        patience: float = 1.0,
        seed: str = "0",
    ) -> None:
        super().__init__(patience, seed)
        self._connect = connect
        self.device = device
        self._link: VfioLink | None = None

    def close(self) -> None:
        """See :class:`BaseTrial`."""
        super().close()
        self._link = None

    def probe(self) -> None:
        """Negotiate, ask what the device is, and read its vendor."""
        self.begin()
        self.info()
        if self.config(0, 2) == b"\xff\xff":
            self.fail("the vendor is 0xffff, as if there were no device")

    # Connections

    @property
    def link(self) -> VfioLink:
        """The first connection, which is made when it is first asked for."""
        if self._link is None:
            self._link = self.connect()
        return self._link

    def connect(self, patience: float | None = None) -> VfioLink:
        """Another connection, with so much patience."""
        link = self._connect(self.patience if patience is None else patience)
        self._open.callback(link.close)
        return link

    def reconnect(self) -> VfioLink:
        """Hang up, connect anew, and negotiate."""
        self.link.close()
        self._link = self.connect()
        self._link.negotiate()
        return self._link

    def begin(self, *, master: bool = False) -> VfioLink:
        """Negotiate; and let the device be bus master."""
        self.link.negotiate()
        if master:
            self.master()
        return self.link

    def refused(
        self, command: int, payload: bytes = b"", fds: Sequence[int] = (), *, why: str
    ) -> Answer:
        """Send what must be refused.

        Args:
            command: The command.
            payload: Its payload.
            fds: Its descriptors.
            why: What is wrong with it.

        Raises:
            RejectError: The connection was closed.
            FailError: It succeeded.
        """
        try:
            answer = self.link.ask(command, payload, fds)
        except HungUpError:
            raise RejectError(f"closed the connection at {command_name(command)} {why}") from None
        if not answer.failed:
            self.fail(f"{command_name(command)} {why} succeeded")
        return answer

    def alive(self) -> None:
        """Whether the connection serves on.

        Raises:
            RejectError: It was closed.
        """
        try:
            self.info()
        except HungUpError:
            raise RejectError("closed the connection") from None

    # The device

    def info(self) -> DeviceInfo:
        """What the device says of itself."""
        data = self.link.do(Command.DEVICE_GET_INFO, DEVICE_INFO.pack(DEVICE_INFO.size, 0, 0, 0))
        self.expect(
            len(data) >= DEVICE_INFO.size,
            f"DEVICE_GET_INFO was answered with {len(data)} bytes, not {DEVICE_INFO.size}",
        )
        return DeviceInfo(*DEVICE_INFO.unpack_from(data))

    def region(self, index: int) -> RegionInfo:
        """What it says of a region."""
        return self.region_answer(index)[0]

    def region_answer(self, index: int, argsz: int = REGION_INFO.size) -> tuple[RegionInfo, Answer]:
        """What it says of a region, and the whole answer."""
        asked = REGION_INFO.pack(argsz, 0, index, 0, 0, 0)
        answer = self.link.ask(Command.DEVICE_GET_REGION_INFO, asked)
        self.expect(not answer.failed, f"region {index} was refused with error {answer.error}")
        data = answer.payload
        self.expect(
            len(data) >= REGION_INFO.size,
            f"DEVICE_GET_REGION_INFO was answered with {len(data)} bytes, not {REGION_INFO.size}",
        )
        return RegionInfo(*REGION_INFO.unpack_from(data)), answer

    def irq(self, kind: int) -> IrqInfo:
        """What it says of a kind of interrupts."""
        data = self.link.do(Command.DEVICE_GET_IRQ_INFO, IRQ_INFO.pack(IRQ_INFO.size, 0, kind, 0))
        self.expect(
            len(data) >= IRQ_INFO.size,
            f"DEVICE_GET_IRQ_INFO was answered with {len(data)} bytes, not {IRQ_INFO.size}",
        )
        return IrqInfo(*IRQ_INFO.unpack_from(data))

    def accessible(self) -> tuple[int, RegionInfo]:
        """A BAR that can be read and written.

        Raises:
            SkipError: There is none.
        """
        for index in range(6):
            region = self.region(index)
            both = RegionFlag.READ | RegionFlag.WRITE
            if region.size and region.flags & both == both:
                return index, region
        raise SkipError("there is no BAR that can be read and written")

    # Configuration space

    def config(self, offset: int, count: int) -> bytes:
        """Read configuration space."""
        return self.link.read(CONFIG_REGION, offset, count)

    def number(self, offset: int, count: int) -> int:
        """A number in configuration space."""
        return int.from_bytes(self.config(offset, count), "little")

    def write_config(self, offset: int, value: int, count: int) -> None:
        """Write a number to configuration space."""
        self.link.write(CONFIG_REGION, offset, value.to_bytes(count, "little"))

    def try_config(self, offset: int, value: int, count: int) -> None:
        """Write a number to configuration space, where it may be refused."""
        payload = REGION_ACCESS.pack(offset, CONFIG_REGION, count)
        self.link.ask(Command.REGION_WRITE, payload + value.to_bytes(count, "little"))

    def master(self) -> None:
        """Let the device be bus master, and its memory be reached."""
        self.write_config(COMMAND, BUS_MASTER | MEMORY_SPACE, 2)

    def capabilities(self) -> Iterator[tuple[int, int]]:
        """Identifiers and offsets of the capabilities.

        Raises:
            FailError: The list is broken.
        """
        if not self.number(STATUS, 2) & 0x10:
            return
        at = self.number(CAP_POINTER, 1) & 0xFC
        seen: set[int] = set()
        while at:
            self.expect(at >= 0x40, f"a capability at {at:#x}, in the header")
            self.expect(at not in seen, f"the list of capabilities has a loop at {at:#x}")
            seen.add(at)
            identifier, following = self.config(at, 2)
            yield identifier, at
            at = following & 0xFC

    def capability(self, identifier: int) -> int:
        """Where a capability is.

        Raises:
            SkipError: There is none.
        """
        for found, at in self.capabilities():
            if found == identifier:
                return at
        raise SkipError(f"there is no capability {identifier:#x}")

    def bars(self) -> Iterator[Bar]:
        """What the registers of the BARs say when all ones are written to them."""
        index = 0
        while index < 6:
            at = 0x10 + 4 * index
            before = self.number(at, 4)
            io, wide = bool(before & 1), before & 7 == 4
            self.write_config(at, 0xFFFFFFFF, 4)
            mask = self.number(at, 4) & (0xFFFFFFFC if io else 0xFFFFFFF0)
            self.write_config(at, before, 4)
            top = 0xFFFFFFFF if mask else 0
            if wide:
                upper = self.number(at + 4, 4)
                self.write_config(at + 4, 0xFFFFFFFF, 4)
                top = self.number(at + 4, 4)
                self.write_config(at + 4, upper, 4)
            whole = top << 32 | mask
            yield Bar(index, io, wide, (1 << 64) - whole if whole else 0)
            index += 2 if wide else 1

    # Memory

    def map(
        self,
        address: int,
        size: int,
        fd: int | None = None,
        *,
        offset: int = 0,
        flags: int = 3,
        argsz: int = DMA_MAP.size,
    ) -> Answer:
        """Have the device reach memory."""
        payload = DMA_MAP.pack(argsz, flags, offset, address, size)
        return self.link.ask(Command.DMA_MAP, payload, [] if fd is None else [fd])

    def maps(self, address: int, size: int, fd: int | None = None, **more: int) -> None:
        """Have it reach memory, which must not fail."""
        answer = self.map(address, size, fd, **more)
        self.expect(
            not answer.failed, f"DMA_MAP of {address:#x}+{size:#x} failed with {answer.error}"
        )

    def unmap(self, address: int, size: int, flags: int = 0) -> Answer:
        """Have it reach memory no more."""
        return self.link.ask(
            Command.DMA_UNMAP, DMA_UNMAP.pack(DMA_UNMAP.size, flags, address, size)
        )

    def unmaps(self, address: int, size: int, flags: int = 0) -> None:
        """Have it reach memory no more, which must not fail."""
        answer = self.unmap(address, size, flags)
        self.expect(
            not answer.failed, f"DMA_UNMAP of {address:#x}+{size:#x} failed with {answer.error}"
        )

    # Interrupts

    def set_irqs(
        self,
        flags: int,
        kind: int,
        start: int,
        count: int,
        data: bytes = b"",
        fds: Sequence[int] = (),
    ) -> Answer:
        """Set interrupts up."""
        payload = SET_IRQS.pack(SET_IRQS.size + len(data), flags, kind, start, count) + data
        return self.link.ask(Command.DEVICE_SET_IRQS, payload, fds)

    def vector(self) -> tuple[int, int]:
        """A kind of interrupts that the device has, of which an eventfd can be told; how many.

        Raises:
            SkipError: It has none.
        """
        for kind in (MSIX, MSI, INTX):
            info = self.irq(kind)
            if info.number and info.flags & 1:
                return kind, info.number
        raise SkipError("the device has no interrupts")

    def arm(self, kind: int, fds: Sequence[int], start: int = 0) -> None:
        """Have interrupts signaled to eventfds, which must not fail."""
        flags = IrqSet.DATA_EVENTFD | IrqSet.TRIGGER
        answer = self.set_irqs(flags, kind, start, len(fds), fds=fds)
        self.expect(not answer.failed, f"eventfds were refused with error {answer.error}")

    def signaled(self, fd: int, seconds: float | None = None) -> bool:
        """Wait for an eventfd, and take what it has; whether it was signaled."""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(1000 * (self.patience if seconds is None else seconds)):
            return False
        return bool(os.eventfd_read(fd))

    # Writes that nothing answers

    def post(self, region: int, offset: int, data: bytes) -> None:
        """Write to a region without wanting an answer."""
        payload = struct.pack("<QII", offset, region, len(data)) + data
        self.link.message(Command.REGION_WRITE, payload, flags=HeaderFlag.NO_REPLY)
