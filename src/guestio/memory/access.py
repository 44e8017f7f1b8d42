"""What every guest memory can do, whether its addresses are physical or translated."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from operator import index
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from guestio._core.iommu.address_space import AddressSpace
from guestio._core.memory.slices import VolatileSlice
from guestio._core.memory.vector import IoVector
from guestio.addr import (
    Ordering,
    Permissions,
    check_access,
    check_address,
    check_int,
    check_range,
)
from guestio.errors import (
    AccessError,
    InvalidAddressError,
    PartialAccessError,
    PermissionDeniedError,
)
from guestio.memory.objects import from_bytes, size_of, to_bytes
from guestio.memory.streams import Sink, Source, pull, push

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from guestio.memory.region import GuestRegionCollection

T = TypeVar("T")


class GuestMemory(ABC):
    """Memory that a device can address.

    A subclass provides :meth:`check_range` and :meth:`slices`; everything else follows from them.

    An access of 0 bytes touches nothing and always succeeds, wherever it points. Exact transfers
    (``read``, ``write``, ...) raise :class:`~guestio.PartialAccessError` if memory ends part of
    the way: the bytes before that have moved, and ``completed`` says how many. If not even the
    first byte is there, the error that says why is raised instead. With a translation in between,
    a range that is not wholly translated fails before any byte moves.

    Memory whose file was truncated by its owner raises :class:`~guestio.MemoryVanishedError`.

    Writes are marked dirty; what is written through the buffer of a slice is when the buffer is
    released or the slices' iterator ends, whichever comes first, and again at the other.
    """

    # Where a subclass has one, the quick way for accesses that meet no obstacle.
    _direct: AddressSpace | None = None

    @abstractmethod
    def check_range(self, addr: int, length: int, access: Permissions = Permissions.NONE) -> bool:
        """Whether every byte of ``[addr, addr + length)`` is there and allows ``access``."""

    @abstractmethod
    def slices(
        self, addr: int, length: int, access: Permissions = Permissions.READ
    ) -> Iterator[VolatileSlice]:
        """The host memory behind ``[addr, addr + length)``, in order.

        The lengths sum to ``length``; there are none for 0. The translation is held until the
        iterator is exhausted or closed, so use the slices while iterating.

        Raises:
            AccessError: While iterating, at the first byte that is not there or not allowed.
        """

    @property
    def physical_memory(self) -> GuestRegionCollection | None:
        """The physical memory, if addresses are its own; None with a translation in between."""
        return None

    def gather(self, addr: int, length: int, access: Permissions) -> IoVector:
        """The host memory behind a whole range, held until the returned vector is closed.

        Use it as a context manager, for the time of the access only: a revocation of the
        translation waits for it.

        Raises:
            AccessError: Some of it is not there or not allowed.
        """
        vector, stop = self._gather(addr, length, access)
        if stop is not None:
            vector.close()
            raise stop.take()
        return vector

    def _gather(
        self, addr: int, length: int, access: Permissions
    ) -> tuple[IoVector, Shortfall | None]:
        """As much of a range as there is, and why it is not all."""
        addr, length = check_int(addr, "addr"), check_int(length, "length")
        found: list[VolatileSlice] = []
        got = 0
        stop: Shortfall | None = None
        source = self.slices(addr, length, access)
        try:
            # The iterator is not exhausted, because that would give the translation back.
            while got < length:
                found.append(next(source))
                got += len(found[-1])
        except StopIteration:
            stop = Shortfall(
                InvalidAddressError(addr + got, length - got, access, "memory ends there")
            )
        except AccessError as stopped:
            stop = Shortfall(stopped.with_traceback(None))
        vector = IoVector.of_slices(found, access)
        close = getattr(source, "close", None)
        if close is not None:
            held = ExitStack()
            held.callback(close)
            vector.hold(held)
        return vector, stop

    def read(self, addr: int, length: int) -> bytes:
        """A copy of exactly ``length`` bytes.

        Raises:
            PartialAccessError: Memory ends part of the way.
            AccessError: The first byte is not there or may not be read.
        """
        if self._direct is not None:
            data = self._direct.read(addr, length)
            if data is not None:
                return data
        vector, stop = self._gather(addr, length, Permissions.READ)
        with vector:
            if stop is not None:
                raise _shortfall(stop, addr, length, Permissions.READ, vector.total)
            return vector.read()

    def readinto(self, addr: int, buffer: Buffer) -> None:
        """Fill a writable buffer exactly; raises as :meth:`read`."""
        if self._direct is not None and self._direct.readinto(addr, buffer):
            return
        view = memoryview(buffer).cast("B")
        done, stop = self._copy_out(addr, view)
        if stop is not None:
            raise _shortfall(stop, addr, len(view), Permissions.READ, done)

    def read_some(self, addr: int, buffer: Buffer) -> int:
        """Fill a buffer as far as memory goes; the number of bytes, at least 1 unless it is empty.

        Raises:
            AccessError: The first byte is not there or may not be read.
        """
        done, stop = self._copy_out(addr, memoryview(buffer).cast("B"))
        if stop is not None and not done:
            raise stop.take()
        return done

    def _copy_out(self, addr: int, view: memoryview) -> tuple[int, Shortfall | None]:
        vector, stop = self._gather(addr, len(view), Permissions.READ)
        with vector:
            vector.readinto(view[: vector.total])
            return vector.total, stop

    def write(self, addr: int, data: Buffer) -> None:
        """Copy all of ``data`` to ``addr``.

        Raises:
            PartialAccessError: Memory ends part of the way; what fits was written.
            AccessError: The first byte is not there or may not be written.
        """
        if self._direct is not None and self._direct.write(addr, data):
            return
        view = memoryview(data).cast("B")
        done, stop = self._copy_in(addr, view)
        if stop is not None:
            raise _shortfall(stop, addr, len(view), Permissions.WRITE, done)

    def write_some(self, addr: int, data: Buffer) -> int:
        """Copy as much of ``data`` as memory goes; the number of bytes.

        Raises:
            AccessError: The first byte is not there or may not be written.
        """
        done, stop = self._copy_in(addr, memoryview(data).cast("B"))
        if stop is not None and not done:
            raise stop.take()
        return done

    def _copy_in(self, addr: int, view: memoryview) -> tuple[int, Shortfall | None]:
        vector, stop = self._gather(addr, len(view), Permissions.WRITE)
        with vector:
            vector.write(view[: vector.total])
            return vector.total, stop

    def fill(self, addr: int, length: int, value: int = 0) -> None:
        """Set ``length`` bytes to ``value``, 0 to 255; raises as :meth:`write`."""
        vector, stop = self._gather(addr, length, Permissions.WRITE)
        with vector:
            vector.fill(value)
            if stop is not None:
                raise _shortfall(stop, addr, length, Permissions.WRITE, vector.total)

    def read_obj(self, addr: int, kind: type[T] | np.dtype[Any]) -> T:
        """One object: of a ctypes type (a structure, ``c_uint32``, ...) or of a numpy dtype.

        Types with a byte order of their own (``BigEndianStructure``, ``">u4"``) are converted by
        ctypes and numpy. Aligned objects of up to 8 bytes are never torn.

        Raises:
            TypeError: ``kind`` is neither, or holds pointers, which mean nothing in a guest.
            AccessError: As :meth:`read`.
        """
        return from_bytes(kind, self.read(addr, size_of(kind)))

    def write_obj(self, addr: int, value: object) -> None:
        """Write a ctypes object or a numpy scalar; raises as :meth:`read_obj` and :meth:`write`."""
        self.write(addr, to_bytes(value))

    def load(self, addr: int, width: int, ordering: Ordering = Ordering.SEQ_CST) -> int:
        """One atomic load of an unsigned native-endian integer.

        Args:
            addr: Address, a multiple of ``width``.
            width: 1, 2, 4 or 8 bytes.
            ordering: ``RELAXED``, ``ACQUIRE`` or ``SEQ_CST``.

        Raises:
            MisalignedError: It is not aligned, or not contiguous in one region.
            AccessError: It is not there.
        """
        with self.gather(addr, width, Permissions.READ) as vector:
            return vector.load(width, ordering)

    def store(
        self, addr: int, value: int, width: int, ordering: Ordering = Ordering.SEQ_CST
    ) -> None:
        """One atomic store; ``ordering`` is ``RELAXED``, ``RELEASE`` or ``SEQ_CST``."""
        with self.gather(addr, width, Permissions.WRITE) as vector:
            vector.store(value, width, ordering)

    def compare_exchange(self, addr: int, expected: int, new: int, width: int) -> tuple[bool, int]:
        """Atomically put ``new`` where ``expected`` is, sequentially consistent.

        Returns:
            Whether it was put there, and the value that was found.
        """
        with self.gather(addr, width, Permissions.READ_WRITE) as vector:
            return vector.compare_exchange(expected, new, width)

    def read_from(self, addr: int, source: Source, count: int) -> int:
        """Read up to ``count`` bytes of a stream into memory, as one read would.

        Args:
            addr: Where to.
            source: A file descriptor, something with one, or an object with ``read``. Python's
                buffered files and ``BytesIO`` are read through their buffer.
            count: Bytes at most.

        Returns:
            Bytes moved: fewer if the stream had fewer at once or memory ends; 0 at its end.

        Raises:
            AccessError: The first byte is not there or may not be written.
            OSError: The stream failed; BlockingIOError if it has nothing now.
        """
        vector, stop = self._gather(addr, check_int(count, "count"), Permissions.WRITE)
        with vector:
            if stop is not None and not vector.total:
                raise stop.take()
            return pull(vector, source, 0, vector.total)

    def read_exact_from(self, addr: int, source: Source, count: int) -> None:
        """Read exactly ``count`` bytes of a stream into memory, in as many reads as it takes.

        Raises:
            PartialAccessError: The stream or memory ended, or the stream failed, before that;
                its cause says which.
            OSError: The stream failed before any byte moved.
        """
        vector, stop = self._gather(addr, check_int(count, "count"), Permissions.WRITE)
        with vector:
            done = 0
            while done < vector.total:
                try:
                    moved = pull(vector, source, done, vector.total - done)
                except OSError as failed:
                    if not done or isinstance(failed, AccessError):
                        raise
                    raise PartialAccessError(
                        addr, count, Permissions.WRITE, done, f"the stream failed: {failed}"
                    ) from failed
                if not moved:
                    raise PartialAccessError(
                        addr, count, Permissions.WRITE, done, "the stream ended"
                    ) from EOFError("the stream ended")
                done += moved
        if stop is not None:
            raise _shortfall(stop, addr, count, Permissions.WRITE, done)

    def write_to(self, addr: int, sink: Sink, count: int) -> int:
        """Write up to ``count`` bytes of memory to a stream.

        A sink that takes only part of it is written to until it took all.

        Returns:
            Bytes moved: fewer than ``count`` only if memory ends.

        Raises:
            PartialAccessError: The sink takes no more, or failed after some bytes; its cause says
                which.
            AccessError: The first byte is not there or may not be read.
            OSError: The stream failed before any byte moved.
        """
        done, stop = self._push(addr, sink, count)
        if stop is not None and not done:
            raise stop.take()
        return done

    def write_all_to(self, addr: int, sink: Sink, count: int) -> None:
        """Write exactly ``count`` bytes of memory to a stream.

        Raises:
            PartialAccessError: Memory ended, or the sink takes no more.
            OSError: The stream failed before any byte moved.
        """
        done, stop = self._push(addr, sink, count)
        if stop is not None:
            raise _shortfall(stop, addr, count, Permissions.READ, done)

    def _push(self, addr: int, sink: Sink, count: int) -> tuple[int, Shortfall | None]:
        vector, stop = self._gather(addr, check_int(count, "count"), Permissions.READ)
        with vector:
            done = 0
            while done < vector.total:
                try:
                    moved = push(vector, sink, done, vector.total - done)
                except OSError as failed:
                    if not done or isinstance(failed, AccessError):
                        raise
                    raise PartialAccessError(
                        addr, count, Permissions.READ, done, f"the stream failed: {failed}"
                    ) from failed
                if not moved:
                    raise PartialAccessError(
                        addr, count, Permissions.READ, done, "the stream takes no more"
                    )
                done += moved
            return done, stop


class SliceMemory(GuestMemory):
    """A slice as memory of its own: addresses are offsets in the slice.

    It gives a slice, or any buffer by way of :meth:`VolatileSlice.over`, everything that guest
    memory can do; writes are marked where the slice's writes are.
    """

    def __init__(self, memory: VolatileSlice) -> None:
        if not isinstance(memory, VolatileSlice):
            raise TypeError(f"memory must be a VolatileSlice, not {type(memory).__name__}")
        self._memory = memory

    def __repr__(self) -> str:
        return f"<SliceMemory over {self._memory!r}>"

    def check_range(self, addr: int, length: int, access: Permissions = Permissions.NONE) -> bool:
        """Whether the range lies in the slice and ``access`` is allowed."""
        start, size = check_address(addr), check_int(length, "length")
        writes = check_access(access) & Permissions.WRITE
        if size < 0:
            raise ValueError(f"length {size} must be >= 0")
        if size == 0:
            return True
        return start + size <= len(self._memory) and not (writes and self._memory.readonly)

    def slices(
        self, addr: int, length: int, access: Permissions = Permissions.READ
    ) -> Iterator[VolatileSlice]:
        """The part of the slice; see :meth:`GuestMemory.slices`."""
        return HeldSlices(*self._gather(addr, length, access))

    def _gather(
        self, addr: int, length: int, access: Permissions
    ) -> tuple[IoVector, Shortfall | None]:
        start, size = check_range(addr, length)
        wanted, there = check_access(access), len(self._memory)
        if size > sys.maxsize:
            raise InvalidAddressError(start, size, wanted, "more than a process can address")
        have = min(size, max(there - start, 0))
        stop: Shortfall | None = None
        if have < size:
            reason = f"the slice is {there:#x} bytes long"
            stop = Shortfall(InvalidAddressError(start + have, size - have, wanted, reason))
        part = [self._memory.subslice(start, have)] if have else []
        return IoVector.of_slices(part, wanted), stop


class Shortfall:
    """Why a range ends early: an error, to be raised once or not at all.

    An error refers to the frames that it passed. If one of them referred to the error as well,
    the memory would stay in use until the garbage collector comes by; so frames hold this.
    """

    __slots__ = ("_error",)

    def __init__(self, error: AccessError) -> None:
        self._error = [error]

    def take(self) -> AccessError:
        """The error, which is forgotten here."""
        return self._error.pop()


def shortfall_of(vector: IoVector, addr: int, length: int) -> Shortfall | None:
    """Why a vector holds less than requested, if it does."""
    return Shortfall(_shortfall_error(vector, addr, length)) if vector.stop else None


def _shortfall_error(vector: IoVector, addr: int, length: int) -> AccessError:
    at, target = vector.stop_addr, vector.stop_target
    behind = None if at == target else target
    rest = index(addr) + index(length) - at
    access = Permissions(vector.access)
    if vector.stop_region is not None:
        return PermissionDeniedError(
            at, rest, access, "the memory is read-only", target=behind, region=vector.stop_region
        )
    return InvalidAddressError(at, rest, access, "no memory region is there", target=behind)


class HeldSlices(Iterator[VolatileSlice]):
    """The slices of a vector, which is held while they are iterated; then the error, if any.

    Any thread may close it. It is no generator because CPython 3.11 crashes when a generator that
    runs in one thread is closed by another.
    """

    __slots__ = ("_pieces", "_stop", "_vector")

    def __init__(self, vector: IoVector, stop: Shortfall | None) -> None:
        self._vector, self._stop = vector, stop
        self._pieces = iter(vector.slices())

    def __next__(self) -> VolatileSlice:
        for piece in self._pieces:
            return piece
        stop, self._stop = self._stop, None
        self.close()
        if stop is not None:
            raise stop.take()
        raise StopIteration

    def close(self) -> None:
        """Give the vector back; there are no more slices, and no error."""
        self._pieces, self._stop = iter(()), None
        self._vector.close()


def _shortfall(
    stop: Shortfall, addr: int, length: int, access: Permissions, done: int
) -> AccessError:
    """The error of an exact transfer that moved ``done`` bytes and then stopped."""
    error = stop.take()
    if not done:
        return error
    partial = PartialAccessError(
        addr, length, access, done, str(error), target=error.target, region=error.region
    )
    partial.__cause__ = error
    return partial
