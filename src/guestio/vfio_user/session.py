"""The server's side of vfio-user without I/O: messages in, answers out.

A `Session` judges what a client asks for and has a `SessionHandler` do it. A request that is not in
order is answered with an error and changes nothing; the connection ends only where the protocol
cannot be followed any more.

Source: QEMU docs/interop/vfio-user.rst (vfio-user 0.1).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from guestio.dma.device import kind_name
from guestio.errors import GuestioError, ProtocolError
from guestio.vfio_user.messages import (
    CONFIG_REGION,
    DEVICE_INFO,
    DMA_MAP,
    DMA_UNMAP,
    FEATURE,
    IO_FD,
    IRQ_INDICES,
    IRQ_INFO,
    MAX_DATA,
    MAX_FDS,
    MULTI_COUNT,
    MULTI_WRITE,
    REGION_ACCESS,
    REGION_INFO,
    REGION_IO_FDS,
    REGIONS,
    SET_IRQS,
    VERSION_MAJOR,
    VERSION_MINOR,
    Command,
    DeviceFlag,
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    IoFdType,
    IrqFlag,
    IrqInfo,
    IrqSet,
    RefusalError,
    RegionAccess,
    RegionFlag,
    RegionInfo,
    RegionIoFds,
    SetIrqs,
    Version,
    sparse_mmap,
)

if TYPE_CHECKING:
    from guestio.vfio_user.channel import Message

PAGE_SIZES: Final = 4096
"""Page sizes of mappings, or'ed."""


@dataclass(frozen=True)
class Region:
    """A region of a device.

    Attributes:
        size: Bytes; 0 if there is no such region.
        fd: The file that a client may map it from; None for none.
        offset: Where the region begins in that file.
        areas: The parts of it that a client may map; none for all of it.
    """

    size: int
    fd: int | None = None
    offset: int = 0
    areas: Sequence[tuple[int, int]] = ()


class RegionWrite(NamedTuple):
    """A write to a region."""

    region: int
    offset: int
    data: bytes


class SessionHandler(Protocol):
    """What a session asks of the connection; each method may raise `RefusalError`."""

    def region(self, index: int) -> Region:
        """A region of the device."""
        ...

    def ioeventfds(self, index: int, most: int) -> list[tuple[int, int]]:
        """Eventfds that stand for writes to a region, as ``(offset, descriptor)``, which stay its.

        At most ``most``.
        """
        ...

    def interrupts(self, index: int) -> tuple[int, int]:
        """How many interrupts of a kind there are, and `IrqFlag` bits."""
        ...

    def dma_map(self, request: DmaMap, fd: int | None) -> None:
        """Let the device reach memory. The descriptor stays the caller's."""
        ...

    def dma_unmap(self, request: DmaUnmap) -> bool:
        """Let it reach memory no more; False if that is to be answered later."""
        ...

    def read_region(self, index: int, offset: int, size: int) -> bytes | None:
        """Read a range that is in the region; None if that takes long and is answered later."""
        ...

    def write_regions(self, writes: Sequence[RegionWrite]) -> None:
        """Write ranges that are in their regions, in order.

        What takes long goes on later: nothing else of the client is obeyed before. Writes to the
        configuration space are done when this returns.
        """
        ...

    def set_triggers(self, index: int, start: int, fds: list[int | None]) -> None:
        """Have interrupts signalled to eventfds, or not at all. Takes the descriptors over."""
        ...

    def set_mask_events(
        self, index: int, start: int, fds: list[int | None], *, unmask: bool
    ) -> None:
        """Mask or unmask interrupts when the client signals eventfds. Takes them over."""
        ...

    def disable_interrupts(self, index: int) -> None:
        """Signal no interrupt of a kind any more."""
        ...

    def mask_interrupt(self, index: int, vector: int) -> None:
        """Keep an interrupt pending."""
        ...

    def unmask_interrupt(self, index: int, vector: int) -> None:
        """Signal it again."""
        ...

    def trigger_interrupt(self, index: int, vector: int) -> None:
        """Signal it as if the device had raised it."""
        ...

    def reset(self) -> None:
        """Reset the device."""
        ...


class Session:
    """One client's requests.

    Args:
        handler: Does what they ask for.

    Attributes:
        reply_fds: Descriptors to send with the last answer; they stay their owner's.
        last_refusal: Why the last request was refused, if it was.
        afterwards: What is to be done once the last answer was sent: writes to registers take
            effect then, as posted writes do, so that the device may ask the client for something.
        client: What the client said it can do.
    """

    def __init__(self, handler: SessionHandler) -> None:
        self._handler = handler
        self._negotiated = False
        self.client: Version | None = None
        self.reply_fds: Sequence[int] = ()
        self.last_refusal: GuestioError | None = None
        self.afterwards: Callable[[], object] | None = None

    def handle(self, message: Message) -> bytes | None:
        """Obey a command.

        Returns:
            The answer; None if the client wants none, or it is given later: to a DMA_UNMAP or a
            REGION_READ that the handler goes on with.

        Raises:
            ProtocolError: The client must be disconnected.
        """
        header = message.header
        self.reply_fds, self.last_refusal, self.afterwards = (), None, None
        with message:
            if header.is_reply:
                raise ProtocolError(f"an answer to {header.name} came that nothing waits for")
            if not self._negotiated and header.request != Command.VERSION:
                raise ProtocolError(f"{header.name} came before VERSION")
            try:
                rule = self._RULES.get(header.request)
                if rule is None:
                    raise RefusalError(errno.ENOSYS, f"{header.name} is not known")
                if message.fd_count > rule.fds:
                    raise RefusalError(
                        errno.EINVAL, f"{header.name} came with {message.fd_count} descriptors"
                    )
                payload = rule.obey(self, message)
            except RefusalError as refusal:
                self.reply_fds, self.afterwards = (), None
                self.last_refusal = refusal
                return header.refuse(refusal.number) if header.wants_reply else None
        if payload is None or not header.wants_reply:
            self.reply_fds = ()
            return None
        return header.reply(payload)

    def _version(self, message: Message) -> bytes:
        if self._negotiated:
            raise RefusalError(errno.EINVAL, "VERSION came a second time")
        version = Version.decode(message.payload)
        if version.major != VERSION_MAJOR:
            raise RefusalError(
                errno.ENOTSUP, f"vfio-user {version.major}.{version.minor} is not spoken"
            )
        self._negotiated, self.client = True, version
        minor = min(version.minor, VERSION_MINOR)
        ours = {
            "max_msg_fds": MAX_FDS,
            "max_data_xfer_size": MAX_DATA,
            "pgsizes": PAGE_SIZES,
            "write_multiple": True,
        }
        # Of what it does not propose a client may know nothing. But where no size is named, 1 MiB
        # holds, which would be refused. QEMU has room for an answer as long as what it sends, 214
        # bytes.
        named = {*version.capabilities, "max_data_xfer_size"}
        said = {name: value for name, value in ours.items() if name in named}
        return Version(VERSION_MAJOR, minor, said).encode()

    def _dma_map(self, message: Message) -> bytes:
        request = DmaMap._make(_unpack(DMA_MAP, message))
        _check_argsz(request.argsz, DMA_MAP)
        if request.flags & ~3:
            raise RefusalError(errno.EINVAL, f"DMA_MAP with flags {request.flags:#x}")
        self._handler.dma_map(request, next(iter(message.fds), None))
        return b""

    def _dma_unmap(self, message: Message) -> bytes | None:
        request = DmaUnmap._make(_unpack(DMA_UNMAP, message))
        _check_argsz(request.argsz, DMA_UNMAP)
        return b"" if self._handler.dma_unmap(request) else None

    def _device_info(self, message: Message) -> bytes:
        _check_argsz(DeviceInfo._make(_unpack_info(DEVICE_INFO, message)).argsz, DEVICE_INFO)
        flags = DeviceFlag.RESET | DeviceFlag.PCI
        return DEVICE_INFO.pack(DEVICE_INFO.size, flags, REGIONS, IRQ_INDICES)

    def _region(self, index: int) -> Region:
        if index >= REGIONS:
            raise RefusalError(errno.EINVAL, f"there are {REGIONS} regions, not a region {index}")
        return self._handler.region(index)

    def _region_info(self, message: Message) -> bytes:
        request = RegionInfo._make(_unpack_info(REGION_INFO, message))
        _check_argsz(request.argsz, REGION_INFO)
        region = self._region(request.region)
        flags = RegionFlag.READ | RegionFlag.WRITE if region.size else RegionFlag(0)
        more = b""
        if region.fd is not None:
            flags |= RegionFlag.MMAP
            if region.areas:
                flags |= RegionFlag.CAPS
                more = sparse_mmap(list(region.areas))
        argsz = REGION_INFO.size + len(more)
        at = REGION_INFO.size if more else 0
        info = REGION_INFO.pack(argsz, flags, request.region, at, region.size, region.offset)
        if request.argsz < argsz:
            # The client asks again, with room for all of it.
            return info
        if region.fd is not None:
            self.reply_fds = (region.fd,)
        return info + more

    def _region_io_fds(self, message: Message) -> bytes:
        request = RegionIoFds._make(_unpack_info(REGION_IO_FDS, message))
        _check_argsz(request.argsz, REGION_IO_FDS)
        if request.flags:
            raise RefusalError(errno.EINVAL, f"{message.header.name} with flags {request.flags:#x}")
        region = self._region(request.region)
        assert self.client is not None
        most = min(MAX_FDS, self.client.max_fds) if region.size else 0
        offered = self._handler.ioeventfds(request.region, most)
        argsz = REGION_IO_FDS.size + len(offered) * IO_FD.size
        if request.argsz < argsz:
            # The client asks again, with room for all of it.
            return REGION_IO_FDS.pack(argsz, 0, request.region, 0)
        self.reply_fds = [fd for _, fd in offered]
        # The width of a write does not matter, which is size 0, nor does its value.
        return REGION_IO_FDS.pack(argsz, 0, request.region, len(offered)) + b"".join(
            IO_FD.pack(offset, 0, number, IoFdType.IOEVENTFD, 0, 0, 0)
            for number, (offset, _) in enumerate(offered)
        )

    def _irq_info(self, message: Message) -> bytes:
        request = IrqInfo._make(_unpack_info(IRQ_INFO, message))
        _check_argsz(request.argsz, IRQ_INFO)
        count, flags = self._handler.interrupts(_irq_index(request.kind))
        return IRQ_INFO.pack(IRQ_INFO.size, flags, request.kind, count)

    def _set_irqs(self, message: Message) -> bytes:
        if len(message.payload) < SET_IRQS.size:
            raise RefusalError(errno.EINVAL, f"DEVICE_SET_IRQS of {len(message.payload)} bytes")
        request = SetIrqs._make(SET_IRQS.unpack_from(message.payload))
        _check_argsz(request.argsz, SET_IRQS)
        count, flags = self._handler.interrupts(_irq_index(request.kind))
        data, action = request.flags & IrqSet.DATA, request.flags & IrqSet.ACTION
        if request.flags >> 6 or data not in (1, 2, 4):
            raise RefusalError(errno.EINVAL, f"DEVICE_SET_IRQS with flags {request.flags:#x}")
        if request.start + request.number > count:
            raise RefusalError(
                errno.EINVAL,
                f"interrupts {request.start}+{request.number} of kind {kind_name(request.kind)}, "
                f"which has {count}",
            )
        if action in (IrqSet.MASK, IrqSet.UNMASK) and not flags & IrqFlag.MASKABLE and count:
            raise RefusalError(
                errno.ENOTTY, f"interrupts of kind {kind_name(request.kind)} cannot be masked"
            )
        values = message.payload[SET_IRQS.size :]
        if len(values) != (request.number if data == IrqSet.DATA_BOOL else 0):
            raise RefusalError(errno.EINVAL, f"DEVICE_SET_IRQS with {len(values)} bytes of data")
        if message.fd_count and data != IrqSet.DATA_EVENTFD:
            raise RefusalError(errno.EINVAL, "DEVICE_SET_IRQS with descriptors and other data")
        if not request.number:
            if request.start or (data, action) != (IrqSet.DATA_NONE, IrqSet.TRIGGER):
                raise RefusalError(errno.EINVAL, "DEVICE_SET_IRQS of no interrupt")
            self._handler.disable_interrupts(request.kind)
        elif data == IrqSet.DATA_EVENTFD:
            self._set_triggers(request, action, message)
        else:
            self._act(request, action, values if data == IrqSet.DATA_BOOL else None)
        return b""

    def _set_triggers(self, request: SetIrqs, action: int, message: Message) -> None:
        if action not in (IrqSet.TRIGGER, IrqSet.MASK, IrqSet.UNMASK):
            raise RefusalError(errno.EINVAL, f"DEVICE_SET_IRQS with flags {request.flags:#x}")
        if message.fd_count not in (0, request.number):
            raise RefusalError(
                errno.EINVAL, f"{message.fd_count} eventfds for {request.number} interrupts"
            )
        fds: list[int | None] = [*message.take_fds()] or [None] * request.number
        if action == IrqSet.TRIGGER:
            self._handler.set_triggers(request.kind, request.start, fds)
        else:
            unmask = action == IrqSet.UNMASK
            self._handler.set_mask_events(request.kind, request.start, fds, unmask=unmask)

    def _act(self, request: SetIrqs, action: int, values: bytes | None) -> None:
        do = {
            int(IrqSet.MASK): self._handler.mask_interrupt,
            int(IrqSet.UNMASK): self._handler.unmask_interrupt,
            int(IrqSet.TRIGGER): self._handler.trigger_interrupt,
        }.get(action)
        if do is None:
            raise RefusalError(errno.EINVAL, f"DEVICE_SET_IRQS with flags {request.flags:#x}")
        for number in range(request.number):
            if values is None or values[number]:
                do(request.kind, request.start + number)

    def _access(self, offset: int, index: int, count: int) -> None:
        """Refuse an access that leaves its region, or is longer than negotiated."""
        region = self._region(index)
        if count > MAX_DATA:
            raise RefusalError(errno.E2BIG, f"an access of {count} bytes, at most {MAX_DATA}")
        if offset + count > region.size:
            raise RefusalError(
                errno.EINVAL,
                f"an access to {offset:#x}+{count:#x} of region {index}, which has "
                f"{region.size:#x} bytes",
            )

    def _region_read(self, message: Message) -> bytes | None:
        access = RegionAccess._make(_unpack(REGION_ACCESS, message))
        self._access(access.offset, access.region, access.length)
        found = self._handler.read_region(access.region, access.offset, access.length)
        return None if found is None else message.payload + found

    def _region_write(self, message: Message) -> bytes:
        if len(message.payload) < REGION_ACCESS.size:
            raise RefusalError(errno.EINVAL, f"REGION_WRITE of {len(message.payload)} bytes")
        access = RegionAccess._make(REGION_ACCESS.unpack_from(message.payload))
        data = message.payload[REGION_ACCESS.size :]
        if len(data) != access.length:
            raise RefusalError(
                errno.EINVAL, f"REGION_WRITE of {access.length} bytes with {len(data)}"
            )
        self._access(access.offset, access.region, access.length)
        writes = [RegionWrite(access.region, access.offset, data)]
        if access.region == CONFIG_REGION:
            # Not before it is in effect: the device may be bus master no more.
            self._handler.write_regions(writes)
        else:
            self.afterwards = lambda: self._handler.write_regions(writes)
        return REGION_ACCESS.pack(*access)

    def _region_write_multi(self, message: Message) -> bytes:
        payload = message.payload
        if len(payload) < MULTI_COUNT.size or (len(payload) - MULTI_COUNT.size) % MULTI_WRITE.size:
            raise RefusalError(errno.EINVAL, f"REGION_WRITE_MULTI of {len(payload)} bytes")
        (count,) = MULTI_COUNT.unpack_from(payload)
        entries = list(MULTI_WRITE.iter_unpack(payload[MULTI_COUNT.size :]))
        if len(entries) != count:
            raise RefusalError(errno.EINVAL, f"{len(entries)} writes, said to be {count}")
        writes = []
        for offset, index, size, data in entries:
            if size > 8:
                raise RefusalError(errno.EINVAL, f"REGION_WRITE_MULTI with {size} bytes in a write")
            self._access(offset, index, size)
            writes.append(RegionWrite(index, offset, data[:size]))
        self.afterwards = lambda: self._handler.write_regions(writes)
        return MULTI_COUNT.pack(count)

    def _reset(self, message: Message) -> bytes:
        if message.payload:
            raise RefusalError(errno.EINVAL, f"DEVICE_RESET of {len(message.payload)} bytes")
        self._handler.reset()
        return b""

    def _feature(self, message: Message) -> bytes:
        if len(message.payload) < FEATURE.size:
            raise RefusalError(errno.EINVAL, f"DEVICE_FEATURE of {len(message.payload)} bytes")
        _, flags = FEATURE.unpack_from(message.payload)
        raise RefusalError(errno.ENOTTY, f"DEVICE_FEATURE {flags & 0xFFFF} is not supported")

    @dataclass(frozen=True)
    class _Rule:
        obey: Callable[[Session, Message], bytes | None]
        fds: int = 0

    _RULES: Final[dict[int, _Rule]] = {
        Command.VERSION: _Rule(_version),
        Command.DMA_MAP: _Rule(_dma_map, 1),
        Command.DMA_UNMAP: _Rule(_dma_unmap),
        Command.DEVICE_GET_INFO: _Rule(_device_info),
        Command.DEVICE_GET_REGION_INFO: _Rule(_region_info),
        Command.DEVICE_GET_REGION_IO_FDS: _Rule(_region_io_fds),
        Command.DEVICE_GET_IRQ_INFO: _Rule(_irq_info),
        Command.DEVICE_SET_IRQS: _Rule(_set_irqs, MAX_FDS),
        Command.REGION_READ: _Rule(_region_read),
        Command.REGION_WRITE: _Rule(_region_write),
        Command.DEVICE_RESET: _Rule(_reset),
        Command.REGION_WRITE_MULTI: _Rule(_region_write_multi),
        Command.DEVICE_FEATURE: _Rule(_feature),
    }


def _unpack(layout: struct.Struct, message: Message) -> tuple[int, ...]:
    if len(message.payload) != layout.size:
        raise RefusalError(
            errno.EINVAL,
            f"{message.header.name} of {len(message.payload)} bytes, not {layout.size}",
        )
    return layout.unpack(message.payload)


def _unpack_info(layout: struct.Struct, message: Message) -> tuple[int, ...]:
    """A question whose sender may have made it as long as the answer that it has room for."""
    if len(message.payload) < layout.size:
        raise RefusalError(
            errno.EINVAL,
            f"{message.header.name} of {len(message.payload)} bytes, not {layout.size}",
        )
    return layout.unpack_from(message.payload)


def _check_argsz(argsz: int, layout: struct.Struct) -> None:
    if argsz < layout.size:
        raise RefusalError(errno.EINVAL, f"an answer of {layout.size} bytes does not fit {argsz}")


def _irq_index(index: int) -> int:
    if index >= IRQ_INDICES:
        raise RefusalError(
            errno.EINVAL, f"there are {IRQ_INDICES} kinds of interrupts, not {index}"
        )
    return index
