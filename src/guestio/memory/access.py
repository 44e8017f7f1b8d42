"""What every guest memory can do, whether its addresses are physical or translated."""

from __future__ import annotations

import ctypes
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import numpy as np

from guestio._core.access import IoVector, VolatileSlice
from guestio.addr import Ordering, Permissions, check_int
from guestio.errors import (
    AccessError,
    InvalidAddressError,
    PartialAccessError,
    PermissionDeniedError,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from guestio.memory.region import GuestRegionCollection

T = TypeVar("T")

_CHUNK = 1 << 20


class HasFileno(Protocol):
    """Something with a file descriptor of its own: a socket, a raw file."""

    def fileno(self) -> int:
        """The descriptor."""


class GuestMemory(ABC):
    """Memory that a device can address.

    A subclass provides :meth:`check_range` and :meth:`slices`; everything else follows from them.

    An access of 0 bytes touches nothing and always succeeds, wherever it points. Exact transfers
    (``read``, ``write``, ...) raise :class:`~guestio.errors.PartialAccessError` if memory ends
    part of the way: the bytes before that have moved, and ``completed`` says how many. If not even
    the first byte is there, the error that says why is raised instead. With a translation in
    between, a range that is not wholly translated fails before any byte moves.

    Writes are marked dirty; what is written through the buffer of a slice is not.
    """

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
        vector, error = self._gather(addr, length, access)
        if error is not None:
            vector.close()
            raise error
        return vector

    def _gather(
        self, addr: int, length: int, access: Permissions
    ) -> tuple[IoVector, AccessError | None]:
        """As much of a range as there is, and why it is not all."""
        found: list[VolatileSlice] = []
        error = None
        source = self.slices(addr, length, access)
        try:
            found.extend(source)
        except AccessError as stopped:
            error = stopped
        return IoVector.of_slices(found, access), error

    def read(self, addr: int, length: int) -> bytes:
        """A copy of exactly ``length`` bytes.

        Raises:
            PartialAccessError: Memory ends part of the way.
            AccessError: The first byte is not there or may not be read.
        """
        vector, error = self._gather(addr, length, Permissions.READ)
        with vector:
            data = vector.read()
        if error is not None:
            raise _shortfall(error, addr, length, Permissions.READ, len(data))
        return data

    def readinto(self, addr: int, buffer: Buffer) -> None:
        """Fill a writable buffer exactly; raises as :meth:`read`."""
        view = memoryview(buffer).cast("B")
        done, error = self._copy_out(addr, view)
        if error is not None:
            raise _shortfall(error, addr, len(view), Permissions.READ, done)

    def read_some(self, addr: int, buffer: Buffer) -> int:
        """Fill a buffer as far as memory goes; the number of bytes, at least 1 unless it is empty.

        Raises:
            AccessError: The first byte is not there or may not be read.
        """
        done, error = self._copy_out(addr, memoryview(buffer).cast("B"))
        if error is not None and not done:
            raise error
        return done

    def _copy_out(self, addr: int, view: memoryview) -> tuple[int, AccessError | None]:
        vector, error = self._gather(addr, len(view), Permissions.READ)
        with vector:
            vector.readinto(view[: vector.total])
            return vector.total, error

    def write(self, addr: int, data: Buffer) -> None:
        """Copy all of ``data`` to ``addr``.

        Raises:
            PartialAccessError: Memory ends part of the way; what fits was written.
            AccessError: The first byte is not there or may not be written.
        """
        view = memoryview(data).cast("B")
        done, error = self._copy_in(addr, view)
        if error is not None:
            raise _shortfall(error, addr, len(view), Permissions.WRITE, done)

    def write_some(self, addr: int, data: Buffer) -> int:
        """Copy as much of ``data`` as memory goes; the number of bytes.

        Raises:
            AccessError: The first byte is not there or may not be written.
        """
        done, error = self._copy_in(addr, memoryview(data).cast("B"))
        if error is not None and not done:
            raise error
        return done

    def _copy_in(self, addr: int, view: memoryview) -> tuple[int, AccessError | None]:
        vector, error = self._gather(addr, len(view), Permissions.WRITE)
        with vector:
            vector.write(view[: vector.total])
            return vector.total, error

    def fill(self, addr: int, length: int, value: int = 0) -> None:
        """Set ``length`` bytes to ``value``; raises as :meth:`write`."""
        vector, error = self._gather(addr, length, Permissions.WRITE)
        with vector:
            vector.fill(value)
            done = vector.total
        if error is not None:
            raise _shortfall(error, addr, length, Permissions.WRITE, done)

    def read_obj(self, addr: int, kind: type[T] | np.dtype[Any]) -> T:
        """One object: of a ctypes type (a structure, ``c_uint32``, ...) or of a numpy dtype.

        Types with a byte order of their own (``BigEndianStructure``, ``">u4"``) are converted by
        ctypes and numpy. Aligned objects of up to 8 bytes are never torn.

        Raises:
            TypeError: ``kind`` is neither.
            AccessError: As :meth:`read`.
        """
        if isinstance(kind, type) and issubclass(kind, _CTYPES):
            return cast("T", kind.from_buffer_copy(self.read(addr, ctypes.sizeof(kind))))
        try:
            dtype = np.dtype(kind)
        except TypeError:
            raise TypeError(f"{kind!r} is neither a ctypes type nor a numpy dtype") from None
        return cast("T", np.frombuffer(self.read(addr, dtype.itemsize), dtype)[0])

    def write_obj(self, addr: int, value: object) -> None:
        """Write a ctypes object or a numpy scalar; raises as :meth:`write`."""
        if isinstance(value, _CTYPES):
            self.write(addr, bytes(value))
        elif isinstance(value, np.generic):
            self.write(addr, value.tobytes())
        else:
            raise TypeError(
                f"{type(value).__name__} has no layout; use a ctypes object or a numpy scalar"
            )

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

    def read_from(self, addr: int, source: int | HasFileno | io.IOBase, count: int) -> int:
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
            OSError: The stream failed.
        """
        vector, error = self._gather(addr, check_int(count, "count"), Permissions.WRITE)
        with vector:
            if error is not None and not vector.total:
                raise error
            return _pull(vector, source, 0)

    def read_exact_from(self, addr: int, source: int | HasFileno | io.IOBase, count: int) -> None:
        """Read exactly ``count`` bytes of a stream into memory, in as many reads as it takes.

        Raises:
            PartialAccessError: The stream or memory ended before that.
        """
        vector, error = self._gather(addr, check_int(count, "count"), Permissions.WRITE)
        with vector:
            done = 0
            while done < vector.total:
                moved = _pull(vector, source, done)
                if not moved:
                    raise PartialAccessError(
                        addr, count, Permissions.WRITE, done, "the stream ended"
                    ) from EOFError("the stream ended")
                done += moved
        if error is not None:
            raise _shortfall(error, addr, count, Permissions.WRITE, done)

    def write_to(self, addr: int, sink: int | HasFileno | io.IOBase, count: int) -> int:
        """Write up to ``count`` bytes of memory to a stream.

        Memory is read once, so a sink that takes only part of it is written to until it took all.

        Returns:
            Bytes moved: fewer than ``count`` only if memory ends.

        Raises:
            PartialAccessError: The sink takes no more.
            AccessError: The first byte is not there or may not be read.
            OSError: The stream failed.
        """
        done, error = self._push(addr, sink, count)
        if error is not None and not done:
            raise error
        return done

    def write_all_to(self, addr: int, sink: int | HasFileno | io.IOBase, count: int) -> None:
        """Write exactly ``count`` bytes of memory to a stream.

        Raises:
            PartialAccessError: Memory ended or the sink takes no more.
        """
        done, error = self._push(addr, sink, count)
        if error is not None:
            raise _shortfall(error, addr, count, Permissions.READ, done)

    def _push(
        self, addr: int, sink: int | HasFileno | io.IOBase, count: int
    ) -> tuple[int, AccessError | None]:
        vector, error = self._gather(addr, check_int(count, "count"), Permissions.READ)
        with vector:
            fd, stream = _stream(sink)
            done = 0
            while done < vector.total:
                if stream is None:
                    moved = vector.to_file(fd, None, done, once=True)
                else:
                    piece = vector.read(done, min(_CHUNK, vector.total - done))
                    moved = stream.write(piece) or 0
                if not moved:
                    raise PartialAccessError(
                        addr, count, Permissions.READ, done, "the stream takes no more"
                    )
                done += moved
            return done, error


_CTYPES = (ctypes.Structure, ctypes.Union, ctypes.Array, ctypes._SimpleCData)


def stop_error(vector: IoVector, addr: int, length: int) -> AccessError:
    """Why a vector holds less than was asked for."""
    at, target = vector.stop_addr, vector.stop_target
    behind = None if at == target else target
    rest = addr + length - at
    access = Permissions(vector.access)
    if vector.stop == 2:
        return PermissionDeniedError(at, rest, access, "the memory is read-only", target=behind)
    return InvalidAddressError(at, rest, access, "no memory region is there", target=behind)


def held_slices(vector: IoVector, error: AccessError | None) -> Iterator[VolatileSlice]:
    """The slices of a vector, which is held while they are iterated; then ``error``, if any."""
    with vector:
        yield from vector.slices()
    if error is not None:
        raise error


def _shortfall(
    error: AccessError, addr: int, length: int, access: Permissions, done: int
) -> AccessError:
    """The error of an exact transfer that moved ``done`` bytes and then met ``error``."""
    if not done:
        return error
    partial = PartialAccessError(addr, length, access, done, str(error), target=error.target)
    partial.__cause__ = error
    return partial


def _stream(stream: int | HasFileno | io.IOBase) -> tuple[int, Any]:
    """The descriptor to use, or the object whose own ``read`` or ``write`` must be used."""
    if isinstance(stream, int):
        return check_int(stream, "fd"), None
    if isinstance(stream, io.FileIO) or not hasattr(stream, "read"):
        return stream.fileno(), None
    return -1, stream


def _pull(vector: IoVector, source: int | HasFileno | io.IOBase, start: int) -> int:
    """One read of a stream into a vector from ``start`` on."""
    fd, stream = _stream(source)
    if start >= vector.total:
        return 0
    if stream is None:
        return vector.from_file(fd, None, start, once=True)
    data = stream.read(min(_CHUNK, vector.total - start)) or b""
    vector.write(data, start)
    return len(data)
