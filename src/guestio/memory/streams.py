"""Moving bytes between gathered memory and streams: descriptors, files, sockets, file-like objects.

Descriptors are read and written in place. Objects with a buffer of their own (Python's buffered
files, ``BytesIO``, ...) go through that buffer, at the price of a copy.
"""

from __future__ import annotations

import io
from typing import Any, Protocol, TypeAlias

from guestio._core.memory.vector import IoVector
from guestio.addr import check_int

CHUNK = 1 << 20
"""Bytes that are copied at once to or from a file-like object."""


class HasFileno(Protocol):
    """Something with a file descriptor of its own: a socket, a raw file."""

    def fileno(self) -> int:
        """The descriptor."""


class Readable(Protocol):
    """A file-like object that gives bytes."""

    def read(self, size: int, /) -> bytes | None:
        """Up to ``size`` bytes; none at the end; None if there are none now."""


class Writable(Protocol):
    """A file-like object that takes bytes."""

    def write(self, data: bytes, /) -> int | None:
        """The number of bytes taken; None if none can be taken now."""


Source: TypeAlias = int | HasFileno | Readable
Sink: TypeAlias = int | HasFileno | Writable


def pull(vector: IoVector, source: Source, start: int, count: int) -> int:
    """Read once from a stream into ``[start, start + count)`` of a vector; 0 at its end."""
    if count == 0:
        return 0
    fd, stream = _open(source, "read")
    if stream is None:
        return vector.from_file(fd, None, start, count, once=True)
    # read1 gives what is there; read of a buffered file would wait for all of it.
    read = getattr(stream, "read1", stream.read)
    data = read(min(CHUNK, count))
    if data is None:
        raise BlockingIOError("the stream has no bytes now")
    vector.write(data, start)
    return len(data)


def push(vector: IoVector, sink: Sink, start: int, count: int) -> int:
    """Write once from ``[start, start + count)`` of a vector to a stream; 0 if it takes no more."""
    fd, stream = _open(sink, "write")
    if stream is None:
        return vector.to_file(fd, None, start, count, once=True)
    data = vector.read(start, min(CHUNK, count))
    moved = stream.write(data)
    if moved is None:
        return 0
    if not 0 <= check_int(moved, "bytes written") <= len(data):
        raise ValueError(f"the stream says it took {moved} of {len(data)} bytes")
    return int(moved)


def _open(stream: object, method: str) -> tuple[int, Any]:
    """The descriptor to use, or the object whose own method must be used."""
    if isinstance(stream, int):
        return check_int(stream, "fd"), None
    if isinstance(stream, io.FileIO) or not hasattr(stream, method):
        if not hasattr(stream, "fileno"):
            raise TypeError(
                f"{type(stream).__name__} is neither a file descriptor nor has it "
                f"{method}() or fileno()"
            )
        return stream.fileno(), None
    return -1, stream
