"""What a PCI function reaches by DMA: the memory that its bus maps for it at this moment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from guestio._core.iommu.address_space import AddressSpace
from guestio._core.memory.slices import VolatileSlice
from guestio._core.memory.vector import IoVector
from guestio.addr import ADDRESS_SPACE, Permissions, check_access, check_range
from guestio.budgets import DMA_COPY
from guestio.errors import (
    AccessError,
    CannotResolveError,
    InvalidAddressError,
    IotlbFails,
    PermissionDeniedError,
)
from guestio.memory import GuestMemory
from guestio.memory.access import HeldSlices, Shortfall, shortfall_of

NO_BUS_MASTER = "the driver has not enabled bus mastering"
ASLEEP = "the driver has put the function into D3hot"


class RemoteMemory(Protocol):
    """Memory that is reached only by asking the client for each access."""

    def begin(self, addr: int, length: int) -> RemoteAccess:
        """Begin an access to a range, all of which is mapped; it is to be closed."""
        ...

    def end(self, reason: str, addr: int = 0, length: int = ADDRESS_SPACE) -> None:
        """Have accesses that have begun reach nothing more, if they overlap a range.

        Args:
            reason: What they raise.
            addr: Where the range begins, which is unmapped.
            length: Its bytes; all there are, when the function is no bus master any more.
        """
        ...


class RemoteAccess(Protocol):
    """An access to such memory. While the client is asked, it may take the memory away.

    Attributes:
        ended: Why nothing more is read or written; empty while all is as at the beginning.
    """

    ended: str

    def read(self) -> bytearray:
        """A copy of the range.

        Raises:
            AccessError: The client refuses, or cannot be asked now; or part of the range was taken
                away since the access began.
        """
        ...

    def write(self, data: memoryview) -> None:
        """Write the range, or its beginning. Raises as :meth:`read`."""
        ...

    def close(self) -> None:
        """End the access."""
        ...


class BusMemory(GuestMemory):
    """Memory as a bus master sees it: by I/O virtual address, through what is mapped now.

    While the driver has not made the function a bus master every access is refused. An access holds
    its translation: an unmap is answered to the driver once it has ended, so it should end soon.
    It may be used from any thread.

    Memory that the client does not share is reached by asking it for each access, in copies, so
    that atomic accesses are not atomic there; what is written to a vector or to a slice arrives
    when that is closed. That is possible in the thread of the event loop only, and not while the
    client waits for an answer: not in `PciDevice.read` and `PciDevice.reset`.

    Attributes:
        refusal: Why accesses are refused while it is not enabled.
        refused: Accesses that were refused: what they were to was not mapped, or not for that, or
            the function is no bus master. Approximate while several threads have some refused.
    """

    def __init__(self) -> None:
        self.refused = 0
        self._space: AddressSpace | None = None
        self._remote: RemoteMemory | None = None
        self._enabled = False
        self.refusal = NO_BUS_MASTER

    def __repr__(self) -> str:
        if self._space is None:
            return "<BusMemory: not connected>"
        return f"<BusMemory: bus mastering {'on' if self._enabled else 'off'}>"

    def connect(self, space: AddressSpace | None, remote: RemoteMemory | None = None) -> None:
        """Use other translations and memory from now on, or none. For a transport.

        Args:
            space: What is mapped.
            remote: Reaches what is mapped and leads to no memory of ``space``.
        """
        self._space, self._remote = space, remote
        self._direct = space if self._enabled else None

    @property
    def reachable(self) -> AddressSpace | None:
        """What is mapped, for structures of the core; None while nothing may be accessed.

        See `PciDevice.memory_changed`.
        """
        return self._direct

    @property
    def enabled(self) -> bool:
        """Whether the function is bus master."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = value
        if not value and self._remote is not None:
            self._remote.end(self.refusal)
        self._direct = self._space if value else None

    def check_range(self, addr: int, length: int, access: Permissions = Permissions.NONE) -> bool:
        """See :meth:`GuestMemory.check_range`."""
        try:
            with self._translate(addr, length, access) as vector:
                return not vector.stop or self._is_remote(vector)
        except AccessError:
            return False

    def _is_remote(self, vector: IoVector) -> bool:
        """Whether a range that ends early is in memory that only the client reaches."""
        return self._remote is not None and bool(vector.stop) and vector.stop_region is None

    def slices(
        self, addr: int, length: int, access: Permissions = Permissions.READ
    ) -> Iterator[VolatileSlice]:
        """See :meth:`GuestMemory.slices`."""
        return HeldSlices(*self._gather(addr, length, access))

    def _gather(
        self, addr: int, length: int, access: Permissions
    ) -> tuple[IoVector, Shortfall | None]:
        remote = self._remote
        with self._counting():
            vector = self._translate(addr, length, access)
            if remote is not None and self._is_remote(vector):
                vector.close()
                return _bounce(remote, addr, length, access), None
        stop = shortfall_of(vector, addr, length)
        self.refused += stop is not None
        return vector, stop

    def _copy_in(self, addr: int, view: memoryview) -> tuple[int, Shortfall | None]:
        remote = self._remote
        if remote is not None:
            with self._counting():
                with self._translate(addr, len(view), Permissions.WRITE) as vector:
                    asked = self._is_remote(vector)
                if asked:
                    # What is written as a whole need not be read before.
                    with contextlib.closing(remote.begin(addr, len(view))) as access:
                        access.write(view)
                    return len(view), None
        return super()._copy_in(addr, view)

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        """Count an access that is refused."""
        try:
            yield
        except AccessError:
            self.refused += 1
            raise

    def _translate(self, addr: int, length: int, access: Permissions) -> IoVector:
        at, size = check_range(addr, length)
        wanted = check_access(access)
        space = self._space
        if not size:
            return IoVector.of_slices([], wanted)
        if space is None:
            raise InvalidAddressError(at, size, wanted, "no driver is connected")
        if not self._enabled:
            raise PermissionDeniedError(at, size, wanted, self.refusal)
        try:
            return space.gather(at, size, wanted)
        except IotlbFails as fails:
            missing = bool(fails.misses)
            where = fails.misses[0] if missing else fails.access_fails[0]
            reason = "it is not mapped" if missing else "its mapping does not allow the access"
            raise CannotResolveError(where, wanted, reason) from None


def _bounce(remote: RemoteMemory, addr: int, length: int, access: Permissions) -> IoVector:
    """A vector over a copy of a range, which is written back when it is closed."""
    if length > DMA_COPY:
        raise InvalidAddressError(
            addr, length, access, f"more than {DMA_COPY} bytes of memory that is not shared"
        )
    with contextlib.ExitStack() as until_closed:
        begun = until_closed.enter_context(contextlib.closing(remote.begin(addr, length)))
        try:
            copy = begun.read()
        except AccessError:
            # Memory that may only be written.
            if begun.ended or access & Permissions.READ or not access & Permissions.WRITE:
                raise
            copy = bytearray(length)
        vector = IoVector.of_slices([VolatileSlice.over(copy)], access)
        if access & Permissions.WRITE:
            until_closed.callback(begun.write, memoryview(copy))
            vector.hold(until_closed.pop_all())
    return vector
