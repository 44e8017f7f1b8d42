"""What a server's device may reach, and the service that reaches it for a server by message.

A table of mappings, each with the memory of this process that it leads to. A server asks with
DMA_READ and DMA_WRITE for memory that it has no descriptor of; it may ask for any that is mapped.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
from bisect import bisect_right, insort
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from guestio.addr import ADDRESS_SPACE
from guestio.dma import MappingType
from guestio.memory.backing import close_fd
from guestio.vfio_user.messages import (
    DMA_ACCESS,
    DMA_MAP,
    MAX_DATA,
    Command,
    DmaFlag,
    RefusalError,
)

if TYPE_CHECKING:
    from guestio.dma import DmaMapRequest
    from guestio.vfio_user.channel import Message

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class _IoVec(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_MOVE_ARGUMENTS: Final = (
    ctypes.c_int,
    ctypes.POINTER(_IoVec),
    ctypes.c_ulong,
    ctypes.POINTER(_IoVec),
    ctypes.c_ulong,
    ctypes.c_ulong,
)
for _function in (_LIBC.process_vm_readv, _LIBC.process_vm_writev):
    _function.argtypes = _MOVE_ARGUMENTS
    _function.restype = ctypes.c_ssize_t


@dataclass
class SharedFile:
    """A file that mappings lead to, open for as long as one does.

    Attributes:
        key: Which file it is, and whether it may be written.
        fd: A descriptor of our own.
        mappings: How many lead to it.
    """

    key: tuple[int, int, bool]
    fd: int
    mappings: int = 0


class SharedFiles:
    """Files that are passed to a server, one descriptor each. For one thread at a time."""

    def __init__(self) -> None:
        self._files: dict[tuple[int, int, bool], SharedFile] = {}

    def take(self, fd: int, *, writable: bool) -> SharedFile | None:
        """A file to pass, for one mapping more.

        Of memory that the device may only read a descriptor is passed that allows no more: with a
        writable one the server's process could do what the device may not.

        Args:
            fd: A descriptor of it, which stays the caller's.
            writable: Whether the device may write.

        Returns:
            The file; None if there is no such descriptor to be had.

        Raises:
            OSError: The descriptor cannot be used.
        """
        status = os.fstat(fd)
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        if writable and mode != os.O_RDWR:
            raise PermissionError(errno.EACCES, "the descriptor does not allow writing")
        key = status.st_dev, status.st_ino, writable
        file = self._files.get(key)
        if file is None:
            if writable or mode == os.O_RDONLY:
                own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
            else:
                try:
                    own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
                except OSError:
                    return None
            file = self._files[key] = SharedFile(key, own)
        file.mappings += 1
        return file

    def release(self, file: SharedFile | None) -> None:
        """Take a mapping back; the last one closes the file."""
        if file is None:
            return
        file.mappings -= 1
        if not file.mappings:
            del self._files[file.key]
            close_fd(file.fd)


@dataclass
class Mapping:
    """A mapping that a server has, or has had until its connection ended.

    Attributes:
        request: What it is.
        file: The file that it was passed with; None if it is reached by message.
        unwanted: Whether it was to be unmapped and the server did not confirm that.
    """

    request: DmaMapRequest
    file: SharedFile | None
    unwanted: bool = False

    @property
    def start(self) -> int:
        """First I/O virtual address."""
        return self.request.start

    def message(self) -> tuple[bytes, list[int]]:
        """Payload and descriptors of the DMA_MAP that makes it."""
        request = self.request
        flags = int(DmaFlag.READ | DmaFlag.WRITE if request.writable else DmaFlag.READ)
        offset = 0 if self.file is None else request.file_offset
        payload = DMA_MAP.pack(DMA_MAP.size, flags, offset, request.start, request.size)
        return payload, [] if self.file is None else [self.file.fd]


class MappedMemory:
    """The mappings of one server, for any thread.

    Memory is moved by the kernel (``process_vm_readv(2)``), to which memory that is not there any
    more is an error, not a signal: the file behind it may be truncated.

    Attributes:
        served: How many bytes a server has moved by message.
        requests: How many messages that took.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._mappings: dict[int, Mapping] = {}
        self._files = SharedFiles()
        self._lock = threading.Lock()
        self.served = 0
        self.requests = 0

    def __len__(self) -> int:
        """How many mappings there are."""
        return len(self._starts)

    def all(self) -> list[Mapping]:
        """All mappings, ascending."""
        with self._lock:
            return [self._mappings[start] for start in self._starts]

    def find(self, start: int, size: int) -> Mapping | None:
        """A mapping that a range meets, the first one; None without any. O(log n)."""
        with self._lock:
            return self._find(start, size)

    def _find(self, start: int, size: int) -> Mapping | None:
        place = max(bisect_right(self._starts, start) - 1, 0)
        for at in self._starts[place : place + 2]:
            request = self._mappings[at].request
            if request.start < start + size and start < request.end:
                return self._mappings[at]
        return None

    def add(self, request: DmaMapRequest, *, share: bool) -> Mapping:
        """Add a mapping that meets no other one. By one thread at a time, as :meth:`remove`.

        Args:
            request: What it is. Registers of other devices are not shared: their descriptor may
                be that of the whole device.
            share: Whether a descriptor may be passed.

        Raises:
            OSError: Its descriptor cannot be used.
        """
        file = None
        if share and request.fd is not None and request.kind is MappingType.RAM:
            file = self._files.take(request.fd, writable=request.writable)
        mapping = Mapping(request, file)
        with self._lock:
            insort(self._starts, request.start)
            self._mappings[request.start] = mapping
        return mapping

    def remove(self, mapping: Mapping) -> None:
        """Remove a mapping; no message of the server moves its memory after that."""
        with self._lock:
            del self._starts[bisect_right(self._starts, mapping.start) - 1]
            del self._mappings[mapping.start]
        self._files.release(mapping.file)

    def clear(self) -> None:
        """Remove all mappings."""
        for mapping in self.all():
            self.remove(mapping)

    def serve(self, message: Message) -> bytes:
        """Do what a DMA_READ or DMA_WRITE asks for; the answer's payload.

        All of a range is moved, or nothing of it: mappings and permissions are looked at first.

        Raises:
            RefusalError: With the error number that QEMU's client answers with, too.
        """
        payload = message.payload
        if len(payload) < DMA_ACCESS.size:
            raise RefusalError(errno.EINVAL, f"{message.header.name} of {len(payload)} bytes")
        address, count = DMA_ACCESS.unpack_from(payload)
        if count > MAX_DATA:
            raise RefusalError(errno.E2BIG, f"{message.header.name} asks for {count} bytes")
        writes = message.request == Command.DMA_WRITE
        if len(payload) != DMA_ACCESS.size + (count if writes else 0):
            raise RefusalError(errno.EINVAL, f"{message.header.name} of {len(payload)} bytes")
        buffer = (ctypes.c_char * count)()
        if writes:
            buffer.raw = payload[DMA_ACCESS.size :]
        with self._lock:
            self._move(buffer, self._pieces(address, count, writes), writes)
            self.served += count
            self.requests += 1
        return payload[: DMA_ACCESS.size] + (b"" if writes else buffer.raw)

    def _pieces(self, address: int, count: int, write: bool) -> list[tuple[int, int]]:
        """Where a range is in this process: addresses and bytes."""
        found = []
        if address + count > ADDRESS_SPACE:
            raise RefusalError(errno.EINVAL, f"{address:#x}+{count:#x} leaves the address space")
        at, end = address, address + count
        while at < end:
            mapping = self._find(at, 1)
            if mapping is None or mapping.request.host_address is None:
                raise RefusalError(errno.ENODEV, f"{at:#x} is not mapped")
            request = mapping.request
            if write and not request.writable:
                raise RefusalError(errno.EACCES, f"{at:#x} is mapped for reading")
            length = min(end, request.end) - at
            found.append((mapping.request.host_address + at - request.start, length))
            at += length
        return found

    def _move(
        self, buffer: ctypes.Array[ctypes.c_char], pieces: list[tuple[int, int]], write: bool
    ) -> None:
        if not pieces:
            return
        there = (_IoVec * len(pieces))(*(_IoVec(at, size) for at, size in pieces))
        here = _IoVec(ctypes.addressof(buffer), len(buffer))
        call = _LIBC.process_vm_writev if write else _LIBC.process_vm_readv
        moved = call(os.getpid(), ctypes.byref(here), 1, there, len(pieces), 0)
        if moved != len(buffer):
            raise RefusalError(errno.EFAULT, "the memory is not there any more")
