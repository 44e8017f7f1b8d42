"""The image of a disk: a file or a host block device, opened, sized, flushed and trimmed.

Moving data is the core's (`guestio._core.memory.image`); whatever else a disk does with its image
is here, for every kind of disk.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import stat
import struct
import threading
from typing import Final

from guestio._core.memory.image import ImageFile
from guestio.errors import DeviceError
from guestio.memory.backing import close_fd
from guestio.ratelog import LOG

log = logging.getLogger("guestio.virtio")

SECTOR: Final = 512

_FALLOC_KEEP_SIZE: Final = 1
_FALLOC_PUNCH_HOLE: Final = 2
_FALLOC_ZERO_RANGE: Final = 16
_BLKGETSIZE64: Final = 0x80081272

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Image:
    """An image that a disk is served from.

    Args:
        path: A file or a block device of the host.
        read_only: Open it for reading only.
        waits: Whether reads may wait for the disk where they are begun.
        multiple: Bytes that its size must be a multiple of.

    Raises:
        DeviceError: It cannot be opened, or has no such size.

    Attributes:
        path: As given.
        read_only: As given.
        file: The open file, for calls that move data.
        fd: Its descriptor; -1 once it is closed.
        closed: Set once it is closed.

    Threads: any may call any method.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        waits: bool = True,
        multiple: int = SECTOR,
    ) -> None:
        self.path = os.fspath(path)
        self.read_only = read_only
        self.closed = threading.Event()
        self._multiple = multiple
        self._flushing = threading.Lock()
        self._failed_flushes = 0
        self.fd = _open(self.path, read_only)
        try:
            self.file: Final = ImageFile(self.fd, self._look(self.fd), waits=waits)
        except BaseException:
            os.close(self.fd)
            raise

    @property
    def size(self) -> int:
        """Bytes: those when it was opened, or when :meth:`update_size` looked last."""
        return self.file.size

    def update_size(self) -> int:
        """Take over the size that the image has now; its bytes.

        Raises:
            DeviceError: It has no such size, or is closed; it stays as long as it was.
        """
        fd = self.file.hold()
        try:
            if fd < 0:
                raise DeviceError(f"the image {self.path} is closed: its size cannot change")
            self.file.size = self._look(fd)
        finally:
            self.file.let_go()
        return self.file.size

    def _look(self, fd: int) -> int:
        size = _size(fd, self.path)
        if not size or size % self._multiple:
            raise DeviceError(
                f"the image {self.path} is {size} bytes long, which is not a positive multiple of "
                f"{self._multiple}"
            )
        return size

    def flush(self) -> None:
        """Put everything that was written on the disk; from a thread that may wait.

        Raises:
            OSError: Some of what was written may be lost.
        """
        failed = self._failed_flushes
        with self._flushing:
            try:
                os.fdatasync(self.fd)
            except OSError:
                self._failed_flushes += 1
                raise
            # The kernel reports lost data once, to the first fsync; the other flushes that
            # wait for it must not succeed.
            if self._failed_flushes != failed:
                raise OSError(errno.EIO, "another flush of the same data failed")

    def deallocate(self, offset: int, length: int) -> bool:
        """Give a range's space back if the file system can; it then reads as zeroes.

        Raises:
            OSError: The file system can and failed.
        """
        return _fallocate(self.fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset, length)

    def zero(self, offset: int, length: int) -> None:
        """Have a range read as zeroes, and keep its space.

        Raises:
            OSError: It failed.
        """
        if _fallocate(self.fd, _FALLOC_ZERO_RANGE | _FALLOC_KEEP_SIZE, offset, length):
            return
        zeroes = bytes(min(length, 1 << 20))
        while length:
            done = os.pwrite(self.fd, zeroes[:length], offset)
            offset, length = offset + done, length - done

    def report(self, number: int, offset: int, length: int, reading: bool) -> None:
        """Log a transfer that failed, by its errno; 0 if the image ended."""
        LOG.report(
            log,
            logging.ERROR,
            "%s: %s of %d bytes failed at sector %d: %s",
            self.path,
            "read" if reading else "write",
            length,
            offset // SECTOR,
            os.strerror(number) if number else "the image is shorter than it was",
        )

    def close(self) -> None:
        """Close the image once no thread is in a system call with it.

        A thread that is about to make one would otherwise make it with whichever file is opened
        next: that may have the same number.
        """
        self.file.close(self._close)

    def _close(self) -> None:
        fd, self.fd = self.fd, -1
        # Called from the core, which an error of a late write must not stop in the middle.
        close_fd(fd)
        self.closed.set()


def _open(path: str, read_only: bool) -> int:
    try:
        return os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        hint = ""
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM) and not read_only:
            hint = " (a read-only image needs read_only=True, or --read-only)"
        raise DeviceError(f"cannot open the image {path}: {error.strerror}{hint}") from error


def _size(fd: int, path: str) -> int:
    """Bytes of an image.

    Raises:
        DeviceError: It is no image.
    """
    try:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            return status.st_size
        if stat.S_ISBLK(status.st_mode):
            size: int = struct.unpack("Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0]
            return size
    except OSError as error:
        raise DeviceError(f"the size of the image {path} is unknown: {error.strerror}") from error
    raise DeviceError(f"the image {path} is neither a file nor a block device")


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """Call fallocate(2); False if the file system does not know the mode."""
    if not length:
        return True
    while _libc.fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True
