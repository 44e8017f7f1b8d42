"""A block device over a file (virtio 1.3, section 5.2).

Reads of what is in the page cache and writes to it are done at once, where the ring is walked.
What may wait for the disk is for a few threads of the device's own: reads of what is not cached,
flushes, discards and writing zeroes. So are requests that take long because they are large. All of
it is done in slices, so that queues take turns and a queue that is to stop does not wait for it.

Order: virtio-blk promises none between requests that are under way at the same time, so they may
overtake each other. A flush covers every write that was completed before the flush was submitted
(section 5.2.6.2); that holds because a write is completed only after its data went to the page
cache, or its range was deallocated or zeroed, and fdatasync(2) is called after that and covers it,
whichever thread did which.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Literal

from guestio._core.memory.vector import IoVector
from guestio._core.virtio.block_server import BlockServer
from guestio._core.virtio.chain import Chain
from guestio.budgets import (
    DEVICE_CLOSE_TIMEOUT,
    GIVE_UP_AFTER,
    INLINE_BYTES,
    SLICE_BYTES,
    TRIM_SECTORS,
    TRIM_SLICE_BYTES,
)
from guestio.errors import AccessError, DeviceError
from guestio.iommu.events import Event
from guestio.ratelog import LOG
from guestio.virtio.device import Device, DeviceId
from guestio.virtio.image import SECTOR, Image
from guestio.virtio.slices import Patience, SlicedThreads, Work, ranges

if TYPE_CHECKING:
    from guestio.virtio.host import DeviceHost

log = logging.getLogger("guestio.virtio")

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
MAX_TRIM_SECTORS: Final = TRIM_SECTORS
MAX_TRIM_SEGMENTS: Final = 32

_HEADER: Final = struct.Struct("<IIQ")
_TRIM: Final = struct.Struct("<QII")
_FLAG_UNMAP: Final = 1

# struct virtio_blk_config up to write_zeroes_may_unmap: capacity, size_max, seg_max, geometry,
# blk_size, topology, writeback, num_queues, discard and write-zeroes limits.
_CONFIG: Final = struct.Struct("<QIIHBBIBBHIBxHIIIIIBxxx")

_TRIMS: Final = frozenset({T_DISCARD, T_WRITE_ZEROES})
_NAMES: Final = {T_FLUSH: "flush", T_DISCARD: "discard", T_WRITE_ZEROES: "write zeroes"}


class BlockDevice(Device):
    """A disk whose contents are a file or a host block device.

    Data moves between the file and guest memory without a copy in between. An error of the file
    becomes VIRTIO_BLK_S_IOERR for that request and nothing else.

    Args:
        path: The image; its size must be a multiple of 512 bytes.
        read_only: Refuse writes.
        num_queues: Request queues, 1 to 64.
        serial: What GET_ID answers, up to 20 bytes of ASCII; None derives it from the file name.
        io_threads: Threads that wait for the disk, up to 64, instead of the loop: started
            when there is something to wait for. 0: :meth:`process` waits itself; one is started
            all the same for what is large, discards and write-zeroes.
        migration: Where a guest that migrates goes: ``"hosts"``, where the image is reached in
            another way, so that all that was acknowledged is on the medium (fdatasync(2)) before
            the last queue has stopped; or ``"local"``, to another process that shares this host's
            page cache, which spares that.

    Attributes:
        size: Bytes of the disk: what the image had when it was opened, or when :meth:`update_size`
            or :meth:`config` looked last.
        server: Serves plain reads and writes in the compiled core, past :meth:`process`. None in a
            subclass that overrides :meth:`process`, which is given every request. May be set to
            None, before the device is served, for the same.

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
        migration: Literal["hosts", "local"] = "hosts",
    ) -> None:
        if not 1 <= num_queues <= 64:
            raise ValueError(f"num_queues {num_queues} is not in 1..64")
        if not 0 <= io_threads <= MAX_IO_THREADS:
            raise ValueError(f"io_threads {io_threads} is not in 0..{MAX_IO_THREADS}")
        if migration not in ("hosts", "local"):
            raise ValueError(f"migration {migration!r} is neither 'hosts' nor 'local'")
        self.path = os.fspath(path)
        self.read_only = read_only
        self.num_queues = num_queues
        self.io_threads = io_threads
        self.migration = migration
        text = os.path.basename(self.path)[:ID_BYTES] if serial is None else serial  # noqa: PTH119
        encoded = text.encode("ascii", "replace")
        if len(encoded) > ID_BYTES:
            raise ValueError(f"serial {text!r} is longer than {ID_BYTES} bytes")
        self.serial = encoded.ljust(ID_BYTES, b"\0")
        self._image = Image(self.path, read_only=read_only, waits=not io_threads)
        self.size = self._image.size
        self.features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY
        if num_queues > 1:
            self.features |= F_MQ
        self.features |= F_RO if read_only else F_DISCARD | F_WRITE_ZEROES
        self._server = BlockServer(
            self._image.file,
            writable=not read_only,
            inline_bytes=INLINE_BYTES,
            report=self._image.report,
        )
        # What the core serves never reaches `process`: an overriding one must see all requests.
        self.server = self._server if type(self).process is _PROCESS else None
        self._hosts: weakref.WeakSet[DeviceHost] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._errors = self._image_errors = 0
        self._threads: SlicedThreads | None = None
        self._patience = [Patience() for _ in range(num_queues)]
        self._closed = False
        self._serve: dict[int, Callable[[int, Chain, Patience], Work]] = {
            T_FLUSH: self._flush,
            T_GET_ID: self._get_id,
            T_DISCARD: self._discard,
            T_WRITE_ZEROES: self._write_zeroes,
        }

    def attached(self, host: DeviceHost) -> None:
        """Take a host, to tell its driver of another size."""
        self._hosts.add(host)

    def update_size(self) -> int:
        """Take over the size that the image has now, and tell the driver of it.

        To be called after the image was enlarged or cut. Linux then has more sectors in
        ``/sys/block/vda/size``, without a restart. Requests beyond the end of a disk that has
        become shorter fail.

        Returns:
            Bytes of the disk.

        Raises:
            DeviceError: The image has no such size, or is closed; the disk stays as long as it was.

        Threads: from any. Cost: one system call.
        """
        before = self.size
        self._look_at_image()
        if self.size != before:
            log.info("%s: the disk has %d bytes now, after %d", self.path, self.size, before)
        # In any case: it may have changed before, when another part of the configuration was read.
        for host in list(self._hosts):
            host.config_changed()
        return self.size

    def _look_at_image(self) -> None:
        self.size = self._image.update_size()

    def _refresh_size(self) -> None:
        if not self._closed:
            try:
                self._look_at_image()
            except DeviceError as error:
                LOG.report(log, logging.ERROR, "%s; the disk keeps its size", error)

    @property
    def capacity(self) -> int:
        """Sectors of 512 bytes."""
        return self.size // SECTOR

    @property
    def errors(self) -> int:
        """Requests that failed because of the file or the guest's memory."""
        return self._errors + self.failures

    @property
    def failures(self) -> int:
        """Those of them that failed while data moved: because of the file, or memory that went."""
        return self._image_errors + self._server.errors

    def config(self) -> bytes:
        """The configuration space (section 5.2.4), with the size that the image has now."""
        self._refresh_size()
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
            The bytes written. A future of it if the request is large, a discard or write-zeroes,
            or may wait for the disk and there are threads for that.
        """
        if not self._closed:
            large = self._server.is_large(chain)
            if not large:
                # What was not cached a moment ago may be by now: that look started to read it.
                served = self._server.process(chain, wait=not self.io_threads)
                if served is not None:
                    return served
            work = self._work(chain, self._patience[queue])
            if not (large or self.io_threads or _kind(chain) in _TRIMS):
                return self._serve_here(chain, work)
            with self._lock:
                if not self._closed:
                    if self._threads is None:
                        self._threads = SlicedThreads(max(self.io_threads, 1), "guestio-blk")
                    return self._threads.submit(queue, work)
        return self._refuse(chain)

    def _serve_here(self, chain: Chain, work: Work) -> int:
        """Do work in one go, in this thread, with the image open meanwhile."""
        try:
            return _all_of(work) if self._image.file.hold() >= 0 else self._refuse(chain)
        finally:
            self._image.file.let_go()

    def _refuse(self, chain: Chain) -> int:
        """Answer a request that a closed device is given."""
        self._count_error()
        return _answer(chain.writable, S_IOERR, 0) if chain.writable.total else 0

    def stopping(self, queue: int) -> None:
        """Give up what takes long of a queue that is to stop, if it is not done soon."""
        self._patience[queue].until = time.monotonic() + GIVE_UP_AFTER
        self._patience[queue] = Patience()

    def stopped(self) -> Event | None:
        """Write out what is only in the page cache, for another host; see ``migration``."""
        if self.read_only or self.migration == "local" or self._closed:
            return None
        written = Event()
        # In a thread, because a disk may take as long as it likes.
        thread = threading.Thread(
            target=self._write_out, args=(written,), name="guestio-blk-sync", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            # There is none to be had.
            self._write_out(written)
        return written

    def _write_out(self, written: Event) -> None:
        file = self._image.file
        try:
            if file.hold() >= 0:
                self._image.flush()
        except OSError as error:
            self._count_image_error(error.errno or errno.EIO, "writing out at a stop")
        finally:
            file.let_go()
            written.set()

    def negotiated(self, features: int) -> None:
        """Look at the image's size: its guest may have made it another one at another host."""
        before = self.size
        self._refresh_size()
        if self.size != before:
            for host in list(self._hosts):
                host.config_changed()

    def _work(self, chain: Chain, patience: Patience) -> Work:
        """Serve any request, in whichever thread has the time, slice by slice."""
        transfer = self._server.transfer(chain)
        if transfer is not None:
            while (served := transfer.step(SLICE_BYTES)) is None:
                yield
                if patience.is_over:
                    self._count_error()
                    return transfer.abandon()
            return served
        readable, writable = chain.readable, chain.writable
        if not writable.total:
            return 0
        try:
            kind, _, sector = _HEADER.unpack(readable.read(0, _HEADER.size))
            serve = self._serve.get(kind)
            if serve is None:
                return _answer(writable, S_UNSUPP, 0)
            return _answer(writable, S_OK, (yield from serve(sector, chain, patience)))
        except _Refused as refused:
            return _answer(writable, refused.status, 0)
        except AccessError:
            self._count_error()
        except OSError as error:
            self._count_image_error(error.errno or errno.EIO, _NAMES.get(kind, "request"))
        return _answer(writable, S_IOERR, 0)

    def fail(self, queue: int, chain: Chain) -> int:
        """Report an I/O error in the status byte, if that can be reached."""
        self._count_error()
        return super().fail(queue, chain)

    def _count_error(self) -> None:
        with self._lock:
            self._errors += 1

    def _count_image_error(self, number: int, what: str) -> None:
        with self._lock:
            self._image_errors += 1
        LOG.report(log, logging.ERROR, "%s: %s failed: %s", self.path, what, os.strerror(number))

    def _span(self, sector: int, length: int) -> int:
        """Check that a transfer is whole sectors of the disk, and return where it begins."""
        if length % SECTOR or sector > self.capacity or length > self.size - sector * SECTOR:
            raise _Refused(S_IOERR)
        return sector * SECTOR

    def _flush(self, sector: int, chain: Chain, patience: Patience) -> Work:
        yield from ()
        if self.read_only:
            return 0
        self._image.flush()
        return 0

    def _get_id(self, sector: int, chain: Chain, patience: Patience) -> Work:
        yield from ()
        room = chain.writable.total - 1
        if room < ID_BYTES:
            raise _Refused(S_IOERR)
        chain.writable.write(self.serial)
        return ID_BYTES

    def _discard(self, sector: int, chain: Chain, patience: Patience) -> Work:
        for offset, length, _ in self._segments(chain, 0):
            for at, size in ranges(offset, length, TRIM_SLICE_BYTES):
                self._image.deallocate(at, size)
                yield
                self._check(patience)
        return 0

    def _write_zeroes(self, sector: int, chain: Chain, patience: Patience) -> Work:
        for offset, length, flags in self._segments(chain, _FLAG_UNMAP):
            for at, size in ranges(offset, length, TRIM_SLICE_BYTES):
                if not (flags and self._image.deallocate(at, size)):
                    self._image.zero(at, size)
                yield
                self._check(patience)
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
        # Otherwise one request could be worth any number of disks.
        for (start, length, _), (following, _, _) in pairwise(sorted(found)):
            if start + length > following:
                raise _Refused(S_IOERR)
        return found

    def _check(self, patience: Patience) -> None:
        """Refuse to go on with what was given up."""
        if patience.is_over:
            raise _Refused(S_IOERR)

    def _check_writable(self) -> None:
        if self.read_only:
            raise _Refused(S_IOERR)

    def close(self) -> None:
        """Finish what is under way, then close the image; requests fail from now on.

        What takes longer than DEVICE_CLOSE_TIMEOUT goes on in its thread, and the image stays open
        as long. Calling it again does nothing.
        """
        with self._lock:
            if self._closed:
                return
            self._closed, threads = True, self._threads
        self._server.retire()
        until = time.monotonic() + DEVICE_CLOSE_TIMEOUT
        if threads is None:
            self._image.close()
        else:
            threads.close(DEVICE_CLOSE_TIMEOUT, self._image.close)
        if not self._image.closed.wait(max(until - time.monotonic(), 0)):
            log.error("%s: the disk does not answer; the image stays open", self.path)


_PROCESS: Final = BlockDevice.process


class _Refused(Exception):  # noqa: N818 - not an error of ours but the driver's answer
    """The request itself is wrong; its status says so."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(status)


def _kind(chain: Chain) -> int | None:
    """What a request asks for, if that can be read."""
    try:
        return int.from_bytes(chain.readable.read(0, 4), "little")
    except AccessError:
        return None


def _all_of(work: Work) -> int:
    """Do work in one go."""
    while True:
        try:
            next(work)
        except StopIteration as finished:
            return int(finished.value)


def _answer(writable: IoVector, status: int, written: int) -> int:
    """Put the status into the last byte; the number of bytes written from the start on."""
    last = writable.total - 1
    writable.write(bytes([status]), last)
    return last + 1 if written == last else written
