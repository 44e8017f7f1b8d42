"""A block device over a file (virtio 1.3, section 5.2).

Reads of what is in the page cache and writes to it are done at once, where the ring is walked.
What may wait for the disk is for a few threads of the device's own: reads of what is not cached,
flushes, discards and writing zeroes.

Order: virtio-blk promises none between requests that are under way at the same time, so they may
overtake each other. A flush covers every write that was completed before the flush was submitted
(section 5.2.6.2); that holds because a write is completed only after its data went to the page
cache, or its range was deallocated or zeroed, and fdatasync(2) is called after that and covers it,
whichever thread did which.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import queue
import stat
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

from guestio._core.access import IoVector
from guestio._core.blockio import BlockServer
from guestio._core.chain import Chain
from guestio.budgets import STOP_TIMEOUT
from guestio.errors import AccessError, DeviceError
from guestio.virtio.device import Device, DeviceId

SECTOR: Final = 512

IO_THREADS: Final = 4
"""Threads for what may wait for the disk, unless told otherwise."""
MAX_IO_THREADS: Final = 64

F_SEG_MAX: Final = 1 << 2
F_RO: Final = 1 << 5
F_BLK_SIZE: Final = 1 << 6
F_FLUSH: Final = 1 << 9
F_TOPOLOGY: Final = 1 << 10
F_MQ: Final = 1 << 12
F_DISCARD: Final = 1 << 13
F_WRITE_ZEROES: Final = 1 << 14

T_IN: Final = 0
T_OUT: Final = 1
T_FLUSH: Final = 4
T_GET_ID: Final = 8
T_DISCARD: Final = 11
T_WRITE_ZEROES: Final = 13

S_OK: Final = 0
S_IOERR: Final = 1
S_UNSUPP: Final = 2

ID_BYTES: Final = 20
SEG_MAX: Final = 126
MAX_TRIM_SECTORS: Final = 1 << 22
MAX_TRIM_SEGMENTS: Final = 32

_HEADER: Final = struct.Struct("<IIQ")
_TRIM: Final = struct.Struct("<QII")
_FLAG_UNMAP: Final = 1

# struct virtio_blk_config up to write_zeroes_may_unmap: capacity, size_max, seg_max, geometry,
# blk_size, topology, writeback, num_queues, discard and write-zeroes limits.
_CONFIG: Final = struct.Struct("<QIIHBBIBBHIBxHIIIIIBxxx")

_FALLOC_KEEP_SIZE: Final = 1
_FALLOC_PUNCH_HOLE: Final = 2
_FALLOC_ZERO_RANGE: Final = 16
_BLKGETSIZE64: Final = 0x80081272

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class BlockDevice(Device):
    """A disk whose contents are a file or a host block device.

    Data moves between the file and guest memory without a copy in between. An error of the file
    becomes VIRTIO_BLK_S_IOERR for that request and nothing else.

    Args:
        path: The image; its size must be a multiple of 512 bytes.
        read_only: Refuse writes.
        num_queues: Request queues, 1 to 64.
        serial: What GET_ID answers, up to 20 bytes of ASCII; None derives it from the file name.
        io_threads: Threads that wait for the disk, up to 64, so that nobody else does: started
            when there is something to wait for. 0: :meth:`process` does everything itself.

    Raises:
        DeviceError: The image cannot be opened or served.

    Threads: requests of different queues may be processed at the same time.
    """

    device_id = DeviceId.BLOCK
    error_status = S_IOERR

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        num_queues: int = 1,
        serial: str | None = None,
        io_threads: int = IO_THREADS,
    ) -> None:
        if not 1 <= num_queues <= 64:
            raise ValueError(f"num_queues {num_queues} is not in 1..64")
        if not 0 <= io_threads <= MAX_IO_THREADS:
            raise ValueError(f"io_threads {io_threads} is not in 0..{MAX_IO_THREADS}")
        self.path = os.fspath(path)
        self.read_only = read_only
        self.num_queues = num_queues
        self.io_threads = io_threads
        text = os.path.basename(self.path)[:ID_BYTES] if serial is None else serial  # noqa: PTH119
        encoded = text.encode("ascii", "replace")
        if len(encoded) > ID_BYTES:
            raise ValueError(f"serial {text!r} is longer than {ID_BYTES} bytes")
        self.serial = encoded.ljust(ID_BYTES, b"\0")
        self._fd = _open_image(self.path, read_only)
        try:
            self.size = _image_size(self._fd, self.path)
        except BaseException:
            os.close(self._fd)
            raise
        self.features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY
        if num_queues > 1:
            self.features |= F_MQ
        self.features |= F_RO if read_only else F_DISCARD | F_WRITE_ZEROES
        self.server: BlockServer = BlockServer(
            self._fd, self.size, writable=not read_only, waits=not io_threads
        )
        self._lock = threading.Lock()
        self._errors = 0
        self._flushing = threading.Lock()
        self._failed_flushes = 0
        self._pool: _Pool | None = None
        self._closed = False
        self._serve: dict[int, Callable[[int, Chain], int]] = {
            T_FLUSH: self._flush,
            T_GET_ID: self._get_id,
            T_DISCARD: self._discard,
            T_WRITE_ZEROES: self._write_zeroes,
        }

    @property
    def capacity(self) -> int:
        """Sectors of 512 bytes."""
        return self.size // SECTOR

    @property
    def errors(self) -> int:
        """Requests that failed because of the file or the guest's memory."""
        return self._errors + self.server.errors

    def config(self) -> bytes:
        """The configuration space (section 5.2.4)."""
        trims = (0, 0) if self.read_only else (MAX_TRIM_SECTORS, MAX_TRIM_SEGMENTS)
        return _CONFIG.pack(
            self.capacity,
            0,  # size_max: no limit
            SEG_MAX,
            *(0, 0, 0),  # geometry
            SECTOR,  # blk_size
            *(3, 0, 8, 0),  # physical block 4096, aligned; minimum I/O 4096, optimum not told
            0,  # writeback
            self.num_queues,
            *trims,
            8,  # discard alignment, sectors
            *trims,
            1,  # write zeroes may deallocate
        )

    def process(self, queue: int, chain: Chain) -> int | Future[int]:
        """Serve one request; see :meth:`Device.process`.

        The header may be split over any descriptors; the last writable byte is the status.

        Returns:
            The bytes written. A future of it if the request may wait for the disk and there are
            threads for that.
        """
        if not self._closed:
            if not self.io_threads:
                return self._serve_waiting(chain)
            # What was not cached a moment ago may be by now: that look started to read it.
            served = self.server.process(chain, wait=False)
            if served is not None:
                return served
            with self._lock:
                if not self._closed:
                    if self._pool is None:
                        self._pool = _Pool(self.io_threads)
                    return self._pool.submit(self._serve_waiting, chain)
        self._count_error()
        return _answer(chain.writable, S_IOERR, 0) if chain.writable.total else 0

    def _serve_waiting(self, chain: Chain) -> int:
        """Serve any request, in whichever thread has the time."""
        served = self.server.process(chain)
        if served is not None:
            return served
        readable, writable = chain.readable, chain.writable
        if not writable.total:
            return 0
        try:
            kind, _, sector = _HEADER.unpack(readable.read(0, _HEADER.size))
            serve = self._serve.get(kind)
            if serve is None:
                return _answer(writable, S_UNSUPP, 0)
            return _answer(writable, S_OK, serve(sector, chain))
        except _Refused as refused:
            return _answer(writable, refused.status, 0)
        except (AccessError, OSError):
            self._count_error()
            return _answer(writable, S_IOERR, 0)

    def fail(self, queue: int, chain: Chain) -> int:
        """Report an I/O error in the status byte, if that can be reached."""
        self._count_error()
        return super().fail(queue, chain)

    def _count_error(self) -> None:
        with self._lock:
            self._errors += 1

    def _span(self, sector: int, length: int) -> int:
        """Check that a transfer is whole sectors of the disk, and return where it begins."""
        if length % SECTOR or sector > self.capacity or length > self.size - sector * SECTOR:
            raise _Refused(S_IOERR)
        return sector * SECTOR

    def _flush(self, sector: int, chain: Chain) -> int:
        if self.read_only:
            return 0
        failed = self._failed_flushes
        with self._flushing:
            try:
                os.fdatasync(self._fd)
            except OSError:
                self._failed_flushes += 1
                raise
            # Of data that was lost the kernel tells once, to whoever asks first; the others that
            # asked for it meanwhile must not believe that it is safe.
            if self._failed_flushes != failed:
                raise OSError(errno.EIO, "another flush of the same data failed")
        return 0

    def _get_id(self, sector: int, chain: Chain) -> int:
        room = chain.writable.total - 1
        if room < ID_BYTES:
            raise _Refused(S_IOERR)
        chain.writable.write(self.serial)
        return ID_BYTES

    def _discard(self, sector: int, chain: Chain) -> int:
        for offset, length, _ in self._segments(chain, 0):
            self._deallocate(offset, length)
        return 0

    def _write_zeroes(self, sector: int, chain: Chain) -> int:
        for offset, length, flags in self._segments(chain, _FLAG_UNMAP):
            if not (flags and self._deallocate(offset, length)):
                self._zero(offset, length)
        return 0

    def _segments(self, chain: Chain, known: int) -> list[tuple[int, int, int]]:
        """The ranges of a discard or write-zeroes request (section 5.2.6.2), all of them checked.

        Nothing may be done before: a request that is refused leaves the disk as it is.
        """
        self._check_writable()
        length = chain.readable.total - _HEADER.size
        if length % _TRIM.size or not 0 < length <= _TRIM.size * MAX_TRIM_SEGMENTS:
            raise _Refused(S_IOERR)
        found = []
        for sector, sectors, flags in _TRIM.iter_unpack(chain.readable.read(_HEADER.size)):
            if flags & ~known:
                raise _Refused(S_UNSUPP)
            if sectors > MAX_TRIM_SECTORS:
                raise _Refused(S_IOERR)
            found.append((self._span(sector, sectors * SECTOR), sectors * SECTOR, flags))
        return found

    def _deallocate(self, offset: int, length: int) -> bool:
        """Give the range's space back if the file system can; it then reads as zeroes."""
        return _fallocate(self._fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset, length)

    def _zero(self, offset: int, length: int) -> None:
        if _fallocate(self._fd, _FALLOC_ZERO_RANGE | _FALLOC_KEEP_SIZE, offset, length):
            return
        zeroes = bytes(min(length, 1 << 20))
        while length:
            done = os.pwrite(self._fd, zeroes[:length], offset)
            offset, length = offset + done, length - done

    def _check_writable(self) -> None:
        if self.read_only:
            raise _Refused(S_IOERR)

    def close(self) -> None:
        """Finish what is under way, then close the image; requests fail from now on.

        What takes longer than `guestio.budgets.STOP_TIMEOUT` goes on in its thread, and the image
        stays open as long. Calling it again does nothing.
        """
        with self._lock:
            if self._closed:
                return
            self._closed, pool = True, self._pool
        self._close_image() if pool is None else pool.close(self._close_image, STOP_TIMEOUT)

    def _close_image(self) -> None:
        fd, self._fd = self._fd, -1
        self.server.close()
        os.close(fd)


class _Pool:
    """Threads that may be stuck in a system call: nobody waits for them without limit.

    Those of `concurrent.futures` are waited for when the process ends.

    Args:
        size: How many threads to start, as they are needed.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._work: queue.SimpleQueue[tuple[Future[int], Callable[[Chain], int], Chain] | None] = (
            queue.SimpleQueue()
        )
        self._change = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._pending = self._running = 0
        self._last: Callable[[], None] | None = None

    def submit(self, call: Callable[[Chain], int], chain: Chain) -> Future[int]:
        """Have a thread make a call; not after :meth:`close`."""
        promised: Future[int] = Future()
        with self._change:
            if self._pending >= len(self._threads) < self._size:
                name = f"guestio-blk_{len(self._threads)}"
                thread = threading.Thread(target=self._run, name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
                self._running += 1
            self._pending += 1
        self._work.put((promised, call, chain))
        return promised

    def close(self, last: Callable[[], None], seconds: float) -> None:
        """End the threads once all is done, then call ``last``; wait for it so many seconds."""
        until = time.monotonic() + seconds
        with self._change:
            self._last = last
            for _ in self._threads:
                self._work.put(None)
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0))

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            promised, call, chain = work
            if promised.set_running_or_notify_cancel():
                try:
                    written = call(chain)
                except BaseException as error:
                    promised.set_exception(error)
                else:
                    promised.set_result(written)
            del work, promised, call, chain
            with self._change:
                self._pending -= 1
        with self._change:
            self._running -= 1
            last = None if self._running else self._last
        if last is not None:
            last()


class _Refused(Exception):  # noqa: N818 - not an error of ours but the driver's answer
    """The request itself is wrong; its status says so."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(status)


def _answer(writable: IoVector, status: int, written: int) -> int:
    """Put the status into the last byte; the number of bytes written from the start on."""
    last = writable.total - 1
    writable.write(bytes([status]), last)
    return last + 1 if written == last else written


def _open_image(path: str, read_only: bool) -> int:
    try:
        return os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        hint = ""
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM) and not read_only:
            hint = " (a read-only image needs read_only)"
        raise DeviceError(f"cannot open the image {path}: {error.strerror}{hint}") from error


def _image_size(fd: int, path: str) -> int:
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        size = status.st_size
    elif stat.S_ISBLK(status.st_mode):
        size = struct.unpack("Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0]
    else:
        raise DeviceError(f"the image {path} is neither a file nor a block device")
    if not size or size % SECTOR:
        raise DeviceError(
            f"the image {path} is {size} bytes long, which is not a positive multiple of {SECTOR}"
        )
    return size


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
