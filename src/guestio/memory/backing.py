"""Host memory: the one place that makes or adopts file descriptors and maps them."""

from __future__ import annotations

import fcntl
import os
import stat
from typing import TYPE_CHECKING, Final, NoReturn, Self

from guestio._core.memory.mapping import HostMapping
from guestio.addr import check_int
from guestio.errors import BackingError

if TYPE_CHECKING:
    from typing_extensions import Buffer

SEALS = {
    fcntl.F_SEAL_SEAL: "seal",
    fcntl.F_SEAL_SHRINK: "shrink",
    fcntl.F_SEAL_GROW: "grow",
    fcntl.F_SEAL_WRITE: "write",
    0x0010: "future_write",  # F_SEAL_FUTURE_WRITE of linux/fcntl.h
    0x0020: "exec",  # F_SEAL_EXEC of linux/fcntl.h
}


class Backing:
    """Memory of this process that guest memory can be made of; owns its fd and its mapping.

    Make one with :meth:`anonymous`, :meth:`memfd`, :meth:`from_fd`, :meth:`from_file` or
    :meth:`from_buffer`. It stays mapped as long as a collection, slice or buffer uses it;
    :meth:`close` refuses until then. It may be used from any thread.

    Attributes:
        size: Bytes.
        fd: The file behind it, owned by this object, or None for anonymous memory.
        file_offset: Where in the file it begins, in bytes; None for anonymous memory.
        writable: Whether it may be written.
    """

    def __init__(
        self, mapping: HostMapping, size: int, skip: int, fd: int | None, file_offset: int | None
    ) -> None:
        self._mapping: Final = mapping
        self._skip: Final = skip
        self.size: Final = size
        self.file_offset: Final = file_offset
        self.writable: Final = mapping.writable
        # The last: a caller whose object cannot be made closes the descriptor.
        self.fd = fd

    @classmethod
    def anonymous(cls, size: int, *, guard: bool = False) -> Self:
        """Private, zeroed memory without a file.

        Args:
            size: Bytes, greater than 0.
            guard: Keep an inaccessible page on either side.

        Raises:
            BackingError: The host cannot provide it.
        """
        return cls(HostMapping(-1, 0, _positive(size), guard=guard), size, 0, None, None)

    @classmethod
    def memfd(
        cls,
        size: int,
        name: str = "guestio",
        *,
        hugetlb: int | None = None,
        seal: bool = False,
        guard: bool = False,
    ) -> Self:
        """Zeroed memory with a file descriptor that other processes can map.

        Args:
            size: Bytes, greater than 0; a multiple of ``hugetlb`` if that is given.
            name: Shown in ``/proc/PID/maps``.
            hugetlb: Size of the huge pages to use, a power of two such as ``2 << 20``.
            seal: Forbid changes of the file's size, to every process.
            guard: Keep an inaccessible page on either side.

        Raises:
            BackingError: The host cannot provide it (huge pages must have been reserved).
        """
        length = _positive(size)
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        if hugetlb is not None:
            page = check_int(hugetlb, "hugetlb")
            if page <= 0 or page & (page - 1) or length % page:
                raise ValueError(f"size {length:#x} is not a multiple of huge pages of {page:#x}")
            flags |= os.MFD_HUGETLB | (page.bit_length() - 1) << os.MFD_HUGE_SHIFT
        try:
            fd = os.memfd_create(name, flags)
        except OSError as error:
            raise BackingError(f"cannot make a memfd: {error.strerror}") from error
        try:
            os.ftruncate(fd, length)
            if seal:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            return cls(HostMapping(fd, 0, length, guard=guard), length, 0, fd, 0)
        except OSError as error:
            close_fd(fd)
            raise BackingError(
                f"cannot make a memfd of {length:#x} bytes: {error.strerror}"
            ) from error
        except BaseException:
            close_fd(fd)
            raise

    @classmethod
    def from_fd(
        cls, fd: int, size: int, offset: int = 0, writable: bool = True, *, guard: bool = False
    ) -> Self:
        """Map a file that the caller has open.

        Args:
            fd: An open descriptor; it is duplicated and stays the caller's.
            size: Bytes, greater than 0.
            offset: Where in the file to begin; it need not be aligned.
            writable: Whether the memory may be written; the descriptor must allow it.
            guard: Keep an inaccessible page on either side.

        Raises:
            BackingError: The file is too short, not mappable, or not writable.
        """
        length, begin, source = _positive(size), check_int(offset, "offset"), check_int(fd, "fd")
        if not 0 <= source < 1 << 31:
            raise ValueError(f"fd {source} is not a file descriptor")
        if begin < 0 or begin + length >= 1 << 63:
            raise ValueError(f"offset {begin:#x} + size {length:#x} is not in [0, 2**63)")
        try:
            own = fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, 0)
        except OSError as error:
            raise BackingError(f"fd {fd} cannot be used: {error.strerror}") from error
        try:
            page = max(
                os.fstatvfs(own).f_bsize if _is_hugetlb(own) else 0, os.sysconf("SC_PAGESIZE")
            )
            status = os.fstat(own)
            if stat.S_ISREG(status.st_mode) and status.st_size < begin + length:
                raise BackingError(
                    f"the file behind fd {fd} is {status.st_size:#x} bytes long; "
                    f"{length:#x} bytes at offset {begin:#x} do not fit"
                )
            skip = begin % page
            mapping = HostMapping(own, begin - skip, length + skip, writable=writable, guard=guard)
            return cls(mapping, length, skip, own, begin)
        except OSError as error:
            close_fd(own)
            raise BackingError(f"fd {fd} cannot be looked at: {error.strerror}") from error
        except BaseException:
            close_fd(own)
            raise

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        size: int | None = None,
        offset: int = 0,
        writable: bool = True,
        *,
        guard: bool = False,
    ) -> Self:
        """Map a file by its name.

        Args:
            path: The file.
            size: Bytes; None for all from ``offset`` to its end.
            offset: Where in the file to begin; it need not be aligned.
            writable: Whether the memory may be written; that changes the file.
            guard: Keep an inaccessible page on either side.

        Raises:
            BackingError: It cannot be opened or mapped, or is too short.
        """
        mode = os.O_RDWR if writable else os.O_RDONLY
        try:
            fd = os.open(path, mode | os.O_CLOEXEC)
        except OSError as error:
            raise BackingError(f"cannot open {path}: {error.strerror}") from error
        try:
            if size is None:
                size = os.fstat(fd).st_size - check_int(offset, "offset")
                if size <= 0:
                    raise BackingError(f"{path} has no bytes from offset {offset:#x} on")
            return cls.from_fd(fd, size, offset, writable, guard=guard)
        finally:
            close_fd(fd)

    @classmethod
    def from_buffer(cls, buffer: Buffer) -> Self:
        """Use memory that another object of this process owns: a ``bytearray``, an ``mmap``, ...

        The buffer stays exported (it cannot be resized or closed) until this is closed or goes
        away; it is not unmapped then. If it maps a file that others may truncate, accesses are not
        protected as those to a file mapped here are.

        Raises:
            ValueError: It is empty.
            TypeError: It is no contiguous buffer.
        """
        mapping = HostMapping(over=memoryview(buffer))
        return cls(mapping, mapping.size, 0, None, None)

    def overlaps(self, other: Backing) -> bool:
        """Whether both are parts of one file that have bytes in common.

        Files are compared by what they are, not by descriptor. Anonymous memory overlaps nothing.
        """
        if not isinstance(other, Backing):
            raise TypeError(f"other must be a Backing, not {type(other).__name__}")
        if self.fd is None or other.fd is None:
            return False
        if self.file_offset is None or other.file_offset is None:
            return False
        if not os.path.sameopenfile(self.fd, other.fd):
            return False
        return (
            self.file_offset < other.file_offset + other.size
            and other.file_offset < self.file_offset + self.size
        )

    @property
    def host_address(self) -> int:
        """Where the memory is in this process.

        What is written there by other means than this library's is not tracked, and nothing
        keeps the memory mapped but this object.

        Raises:
            ValueError: It is closed.
        """
        return self._mapping.address + self._skip

    @property
    def page_size(self) -> int:
        """Bytes to a page of the file system or of anonymous memory."""
        return self._mapping.page_size

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` has been called."""
        return self._mapping.closed

    @property
    def seals(self) -> frozenset[str]:
        """What the file's seals forbid: of the values of ``SEALS``, such as ``shrink``.

        Files that cannot be sealed have none. Memory without a file has none either; its
        size cannot change. See fcntl(2), F_GET_SEALS.
        """
        if self.fd is None:
            return frozenset()
        try:
            seals = fcntl.fcntl(self.fd, fcntl.F_GET_SEALS)
        except OSError:
            return frozenset()
        return frozenset(name for bit, name in SEALS.items() if seals & bit)

    @property
    def shrinkable(self) -> bool:
        """Whether the memory can be taken away by truncating its file.

        An access to memory that was taken away raises :class:`~guestio.MemoryVanishedError`.
        """
        return self.fd is not None and "shrink" not in self.seals

    @property
    def vanished(self) -> int | None:
        """Offset from which on the file was found to be truncated, or None."""
        at = self._mapping.vanished
        return None if at is None else max(at - self._skip, 0)

    def cut_off(self, offset: int, length: int) -> None:
        """Put private, zeroed pages in place of some of a file's memory, for good.

        Everything that uses this memory then reads zeroes there, and what it writes goes nowhere.
        The file is as it was, and so is other memory that is made of it.

        Args:
            offset: Where to begin, in bytes from the start of this memory.
            length: Bytes; every page that they touch is replaced.

        Raises:
            ValueError: The range is not in this memory, or that is closed or has no file.
            BackingError: The host refuses.
        """
        if self.fd is None:
            raise ValueError("only memory of an open file can be cut off")
        self._mapping.cut_off(self._skip + check_int(offset, "offset"), check_int(length, "length"))

    def close(self) -> None:
        """Unmap the memory and close the fd. Calling it again does nothing.

        Raises:
            BufferError: A region, slice or buffer still uses the memory.
        """
        self._mapping.close()
        self._close_fd()

    def _close_fd(self) -> None:
        fd, self.fd = self.fd, None
        if fd is not None:
            close_fd(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "fd", None) is not None:
            self._close_fd()

    def __reduce__(self) -> NoReturn:
        # A copy would close the same descriptor a second time.
        raise TypeError(
            "a Backing cannot be copied or pickled: it owns its file; place it in another "
            "MmapRegion, or make another with from_fd()"
        )

    def __repr__(self) -> str:
        kind = "no file" if self.fd is None else f"fd {self.fd} at {self.file_offset:#x}"
        return f"<Backing {self.size:#x} bytes, {'closed' if self.closed else kind}>"


def _positive(size: int) -> int:
    length = check_int(size, "size")
    if not 0 < length < 1 << 62:
        raise ValueError(f"size {length} is not in (0, 2**62)")
    return length


def _is_hugetlb(fd: int) -> bool:
    return os.fstatvfs(fd).f_bsize > os.sysconf("SC_PAGESIZE")


def close_fd(fd: int) -> None:
    """Close a descriptor of a kind that does not wait.

    Linux has closed it whatever it says, so an error (an interruption, or a late one of a file
    system) must not keep the caller from the rest of its work.
    """
    try:  # noqa: SIM105 - `suppress` would need memory
        os.close(fd)
    except OSError:
        pass
