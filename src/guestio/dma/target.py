"""The contract between what decides which memory devices may reach and what programs it.

A source of mappings (a region manager, a virtio-iommu domain) calls a :class:`DmaTarget` (a VFIO
container, an iommufd address space, a simulated IOMMU) with one :class:`DmaMapRequest` per
mapping and takes exactly those mappings away again. The words are those of
``VFIO_IOMMU_MAP_DMA`` in ``include/uapi/linux/vfio.h``: IOVA, size, host virtual address.
"""

from __future__ import annotations

import enum
import errno as errno_names
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from guestio.addr import ADDRESS_SPACE, check_flag, check_int, check_range
from guestio.errors import GuestioError

if TYPE_CHECKING:
    from collections.abc import Callable


class MappingType(enum.Enum):
    """What a mapping leads to, and what it means when a target cannot hold it.

    ``RAM``: ordinary memory. Without it devices do not work, so a failure fails the operation.
    ``DEVICE``: registers or memory of a device (a BAR). Only other devices' direct access to it
    is lost, so a failure is recorded and the operation goes on; never shared with other processes.
    """

    RAM = "ram"
    DEVICE = "device"


class DmaError(GuestioError):
    """A target could not map or unmap a range, or not tell what devices wrote there.

    Attributes:
        operation: ``"map"``, ``"unmap"``, ``"replace"`` or ``"track"``.
        start: First I/O virtual address of the range.
        size: Bytes of the range.
        reason: Why, and what to do about it.
        errno: The kernel's error number (``errno.EEXIST``, ...), or None.
    """

    def __init__(
        self, operation: str, start: int, size: int, reason: str, *, errno: int | None = None
    ) -> None:
        self.operation = operation
        self.start = start
        self.size = size
        self.reason = reason
        self.errno = errno
        code = f" ({errno_names.errorcode.get(errno, errno)})" if errno is not None else ""
        super().__init__(f"cannot {operation} IOVA {start:#x}+{size:#x}: {reason}{code}")


_OPTIONAL = frozenset({"host_address", "fd"})


@dataclass(frozen=True, slots=True)
class DmaMapRequest:
    """One mapping of I/O virtual addresses to host memory.

    Attributes:
        start: First I/O virtual address.
        size: Bytes, greater than 0; ``start + size`` is at most ``2**64``.
        host_address: Where the memory is in this process; it stays mapped there until the mapping
            has been taken away. None if the source of the mapping has no address for it.
        fd: A file that holds the memory, open at least until the call returns; None for memory
            without a file.
        file_offset: Where in that file the memory begins, in bytes; 0 without a file.
        writable: Whether devices may write; they may always read.
        kind: What the memory is.

    Raises:
        TypeError, ValueError: The numbers do not hold to that, or ``kind`` is no MappingType.
    """

    start: int
    size: int
    host_address: int | None = None
    fd: int | None = None
    file_offset: int = 0
    writable: bool = True
    kind: MappingType = MappingType.RAM

    def __post_init__(self) -> None:
        for name in ("start", "size", "host_address", "fd", "file_offset"):
            value = getattr(self, name)
            if value.__class__ is not int and (value is not None or name not in _OPTIONAL):
                # Sums of numpy's integers, say, would wrap.
                object.__setattr__(self, name, check_int(value, name))
        if not 0 <= self.start < self.start + self.size <= ADDRESS_SPACE:
            check_range(self.start, self.size, name="start", length_name="size", empty=False)
        if not 0 <= self.file_offset <= ADDRESS_SPACE - self.size:
            check_range(self.file_offset, self.size, name="file_offset", length_name="size")
        host, fd = self.host_address, self.fd
        if host is not None and not 0 <= host <= ADDRESS_SPACE - self.size:
            check_range(host, self.size, name="host_address", length_name="size")
        if fd is not None and fd < 0:
            raise ValueError(f"fd {fd} is no file descriptor")
        if self.kind.__class__ is not MappingType:
            raise TypeError(f"kind must be a MappingType, not {type(self.kind).__name__}")
        object.__setattr__(self, "writable", check_flag(self.writable, "writable"))

    @property
    def end(self) -> int:
        """The first address after the mapping; ``2**64`` is possible."""
        return self.start + self.size


@runtime_checkable
class DmaTarget(Protocol):
    """Receives DMA mappings: a VFIO container, an iommufd IOAS, a simulator.

    One source calls one target from one thread at a time. An implementation must not call its
    source back. Any exception means failure; :class:`DmaError` says it best.
    """

    def map_dma(self, request: DmaMapRequest) -> None:
        """Let devices reach this memory.

        When it returns, a device's access succeeds. When it raises, nothing has changed: no part
        of the range is mapped that was not before.
        """
        ...

    def unmap_dma(self, start: int, size: int) -> None:
        """Take away a mapping; ``start`` and ``size`` are exactly those of one ``map_dma``.

        When it returns, no device reaches the memory any more, not even by an access that had
        begun. When it raises, the memory counts as reachable.
        """
        ...


@runtime_checkable
class ReplacingDmaTarget(DmaTarget, Protocol):
    """A target that can exchange a mapping without a moment in which accesses fail."""

    def replace_dma(self, old: DmaMapRequest, new: DmaMapRequest) -> None:
        """Exchange a mapping for another of the same ``start`` and ``size``.

        At every moment a device reaches the memory of one of the two. When it returns, the old
        memory is out of reach; when it raises, the old mapping is in place.
        """
        ...


@dataclass(slots=True)
class Journal:
    """What has been done so far, so that it can be undone in reverse order.

    The one undo routine of everything that changes several targets. Not thread-safe.
    """

    _undo: list[Callable[[], None]] = field(default_factory=list)

    def did(self, undo: Callable[[], None]) -> None:
        """Note a step that was done, by what takes it back."""
        self._undo.append(undo)

    def undo(self) -> list[Exception]:
        """Take every step back, last first, and forget them.

        Returns:
            What the steps raised; one that fails does not stop the others.
        """
        failures = []
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as error:
                failures.append(error)
        return failures
