"""I/O commands that the core leaves to Python (NVMe 1.4, section 6).

They are checked here, in the loop's thread, and done in one of a few threads that may wait for the
disk. No thread touches the driver's memory: what it wrote is copied before, what it is to read is
copied to it afterwards, in the loop's thread. So an unmap, a reset and a disconnection never wait
for a disk, and a command whose life is over has no more to do with the driver.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from guestio.budgets import (
    DEVICE_CLOSE_TIMEOUT,
    NVME_BUFFER_BYTES,
    NVME_TRANSFER_BYTES,
    SLICE_BYTES,
    TRIM_SLICE_BYTES,
)
from guestio.memory import GuestMemory
from guestio.pci.nvme.data import Data
from guestio.pci.nvme.logs import Counters
from guestio.pci.nvme.namespace import Namespace
from guestio.pci.nvme.spec import ALL_NAMESPACES, Command, Failed, Io, Status
from guestio.ratelog import LOG
from guestio.virtio.slices import SlicedThreads, Work, ranges

log = logging.getLogger("guestio.pci")

_FORCE_UNIT_ACCESS: Final = 1 << 30
_DEALLOCATE: Final = 1 << 25
_DATASET_DEALLOCATE: Final = 1 << 2
_RANGE: Final = struct.Struct("<IIQ")


@dataclass(eq=False)
class Job:
    """What is left to do for a command in a thread.

    Attributes:
        command: The command.
        work: Does it, and returns its status.
        buffered: Bytes that it holds in copies.
        then: Called in the loop's thread when it went well; its status is the command's.
        given_up: The status to end with soon; None to go on.
    """

    command: Command
    work: Work
    buffered: int = 0
    then: Callable[[], int] | None = None
    given_up: int | None = field(default=None)


class IoCommands:
    """Does I/O commands for a controller.

    Args:
        memory: The driver's.
        namespaces: In the order of their numbers.
        counters: Where to count.
        threads: How many may wait for the disk.
        call_soon: Calls back in the loop's thread.
        ended: Called with a command and its status, and the byte of it that is wrong, in the
            loop's thread.
        idle: Called when no thread works on a command any more.

    Attributes:
        write_through: Whether a write is completed only when it is on the disk.
    """

    def __init__(
        self,
        memory: GuestMemory,
        namespaces: Sequence[Namespace],
        counters: Counters,
        *,
        threads: int,
        call_soon: Callable[[Callable[[], object]], object],
        ended: Callable[[Command, int, int | None], object],
        idle: Callable[[], object],
    ) -> None:
        self.write_through = False
        self._memory, self._namespaces, self._counters = memory, namespaces, counters
        self._call_soon, self._ended, self._idle = call_soon, ended, idle
        self._threads = SlicedThreads(threads, "guestio-nvme")
        self._waiting: deque[Job] = deque()
        self._running: set[Job] = set()
        self._buffered = 0
        self._life = 0
        self._handlers: dict[int, Callable[[Command, Namespace], Job | None]] = {
            Io.FLUSH: self._flush,
            Io.WRITE: self._write,
            Io.READ: self._read,
            Io.COMPARE: self._compare,
            Io.WRITE_ZEROES: self._write_zeroes,
            Io.DATASET: self._dataset,
            Io.VERIFY: self._verify,
        }

    @property
    def busy(self) -> bool:
        """Whether a thread still works on a command, of this life or an earlier one."""
        return bool(self._running)

    def begin(self, command: Command) -> None:
        """Do a command; ``ended`` is called, now or later.

        Raises:
            Failed: Something is wrong with it; ``ended`` is not called.
        """
        handler = self._handlers.get(command.opcode)
        if handler is None:
            raise Failed(Status.INVALID_OPCODE, 0)
        if command.flags & 0x3F:
            raise Failed(Status.INVALID_FIELD, 1)  # fused, or reserved
        life = self._life
        job = handler(command, self._namespace(command))
        if life != self._life:
            # A reset came while the client was asked for the data.
            if job is not None:
                job.work.close()
        elif job is None:
            self._ended(command, Status.SUCCESS, None)
        else:
            self._waiting.append(job)
            self._start()

    def background(self, work: Work) -> None:
        """Have work done that belongs to no command, as part of this life."""
        self._waiting.append(Job(Command(0, bytes(64)), work, then=lambda: Status.SUCCESS))
        self._start()

    def _namespace(self, command: Command) -> Namespace:
        nsid = command.nsid
        if nsid == ALL_NAMESPACES and command.opcode == Io.FLUSH:
            return self._namespaces[0]
        if not 0 < nsid <= len(self._namespaces):
            raise Failed(Status.INVALID_NAMESPACE, 4)
        return self._namespaces[nsid - 1]

    def give_up(self, status: int, matches: Callable[[Command], bool]) -> bool:
        """End commands soon: those that no thread has begun now, the others after a slice.

        Returns:
            Whether there was a command that has not ended yet.
        """
        waiting, self._waiting = self._waiting, deque()
        for job in waiting:
            if matches(job.command):
                job.work.close()
                self._ended(job.command, status, None)
            else:
                self._waiting.append(job)
        left = [job for job in self._running if matches(job.command)]
        for job in left:
            job.given_up = status
        return bool(left)

    def forget(self) -> None:
        """The controller is reset: nothing is completed any more, and what is begun ends soon."""
        self._life += 1
        for job in self._waiting:
            job.work.close()
        self._waiting.clear()
        for job in self._running:
            job.given_up = Status.ABORTED

    def _start(self) -> None:
        """Begin as many commands as there is room for."""
        while self._waiting:
            job = self._waiting[0]
            if self._buffered and self._buffered + job.buffered > NVME_BUFFER_BYTES:
                return
            self._waiting.popleft()
            self._buffered += job.buffered
            self._running.add(job)
            began, life = time.monotonic(), self._life
            try:
                future = self._threads.submit(job.command.queue, _sliced(job))
            except RuntimeError:
                # No thread can be had, or the controller is closed.
                self._finish(job, life, began, Status.INTERNAL)
                continue
            future.add_done_callback(
                lambda done, job=job, life=life, began=began: self._call_soon(  # type: ignore[misc]  # a lambda with defaults
                    lambda: self._finish(job, life, began, self._outcome(done))
                )
            )

    def _outcome(self, done: Future[int]) -> int:
        error = done.exception()
        if error is None:
            return done.result()
        if isinstance(error, Failed):
            return error.status
        LOG.report(log, logging.ERROR, "a thread of an NVMe controller failed: %r", error)
        return Status.INTERNAL

    def _finish(self, job: Job, life: int, began: float, status: int) -> None:
        self._running.discard(job)
        self._buffered -= job.buffered
        self._counters.busy += time.monotonic() - began
        if life == self._life:
            place = None
            if status == Status.SUCCESS and job.then is not None:
                try:
                    status = job.then()
                except Failed as failed:
                    status, place = failed.status, failed.place
            # The client may have been asked for memory, and a reset may have come in between.
            if life == self._life:
                self._ended(job.command, status, place)
        self._start()
        if not self._running:
            self._idle()

    # Commands.

    def _extent(self, command: Command, namespace: Namespace, most: int) -> tuple[int, int]:
        """Where a command's blocks are in the image, and their bytes."""
        first, count = command.quad(10), (command.word(12) & 0xFFFF) + 1
        length = count * namespace.block_size
        if length > most:
            raise Failed(Status.INVALID_FIELD, 48)
        if first > namespace.blocks or count > namespace.blocks - first:
            raise Failed(Status.LBA_RANGE, 40)
        return first * namespace.block_size, length

    def _flush(self, command: Command, namespace: Namespace) -> Job | None:
        every = self._namespaces if command.nsid == ALL_NAMESPACES else [namespace]
        writable = [each for each in every if not each.read_only]
        if not writable:
            return None

        def work() -> Work:
            for each in writable:
                self._sync(each)
                yield
            return Status.SUCCESS

        return Job(command, work())

    def _read(self, command: Command, namespace: Namespace) -> Job:
        offset, length = self._extent(command, namespace, NVME_TRANSFER_BYTES)
        data = Data(self._memory, command, length, to_driver=True)
        found: list[bytes] = []

        def work() -> Work:
            for at, size in ranges(offset, length, SLICE_BYTES):
                found.append(self._pread(namespace, at, size))
                yield
            return Status.SUCCESS

        def give() -> int:
            data.write(b"".join(found))
            self._counters.reads += 1
            self._counters.bytes_read += length
            return Status.SUCCESS

        return Job(command, work(), length, give)

    def _write(self, command: Command, namespace: Namespace) -> Job:
        self._check_writable(namespace)
        offset, length = self._extent(command, namespace, NVME_TRANSFER_BYTES)
        data = Data(self._memory, command, length, to_driver=False)
        through = self.write_through or bool(command.word(12) & _FORCE_UNIT_ACCESS)

        def work() -> Work:
            at, left = offset, memoryview(found)
            with self._image(namespace, offset, length, reading=False) as fd:
                while left:
                    done = os.pwrite(fd, left, at)
                    at, left = at + done, left[done:]
            if through:
                yield
                self._sync(namespace)
            return Status.SUCCESS

        found = data.read()
        self._counters.writes += 1
        self._counters.bytes_written += length
        return Job(command, work(), length)

    def _compare(self, command: Command, namespace: Namespace) -> Job:
        offset, length = self._extent(command, namespace, NVME_TRANSFER_BYTES)
        data = Data(self._memory, command, length, to_driver=False).read()

        def work() -> Work:
            for at, size in ranges(offset, length, SLICE_BYTES):
                there = self._pread(namespace, at, size)
                if there != data[at - offset : at - offset + size]:
                    return Status.COMPARE_FAILURE
                yield
            return Status.SUCCESS

        return Job(command, work(), length)

    def _verify(self, command: Command, namespace: Namespace) -> Job:
        offset, length = self._extent(command, namespace, 1 << 32)

        def work() -> Work:
            for at, size in ranges(offset, length, NVME_TRANSFER_BYTES):
                self._pread(namespace, at, size)
                yield
            return Status.SUCCESS

        return Job(command, work(), NVME_TRANSFER_BYTES)

    def _write_zeroes(self, command: Command, namespace: Namespace) -> Job:
        self._check_writable(namespace)
        offset, length = self._extent(command, namespace, 1 << 32)
        give_back = bool(command.word(12) & _DEALLOCATE)
        through = self.write_through or bool(command.word(12) & _FORCE_UNIT_ACCESS)

        def work() -> Work:
            for at, size in ranges(offset, length, TRIM_SLICE_BYTES):
                if not (give_back and self._trim(namespace, at, size)):
                    with self._image(namespace, at, size, reading=False):
                        namespace.image.zero(at, size)
                yield
            if through:
                self._sync(namespace)
            return Status.SUCCESS

        return Job(command, work())

    def _dataset(self, command: Command, namespace: Namespace) -> Job | None:
        count = (command.word(10) & 0xFF) + 1
        data = Data(self._memory, command, count * _RANGE.size, to_driver=False).read()
        extents = []
        for _, blocks, first in _RANGE.iter_unpack(data):
            if first > namespace.blocks or blocks > namespace.blocks - first:
                raise Failed(Status.LBA_RANGE)
            extents.append((first * namespace.block_size, (first + blocks) * namespace.block_size))
        if not command.word(11) & _DATASET_DEALLOCATE:
            return None  # hints, which are not needed
        self._check_writable(namespace)
        disjoint = _union(extents)

        def work() -> Work:
            for start, end in disjoint:
                for at, size in ranges(start, end - start, TRIM_SLICE_BYTES):
                    if not self._trim(namespace, at, size):
                        return Status.SUCCESS  # the file system cannot: nothing is promised
                    yield
            return Status.SUCCESS

        return Job(command, work())

    def _check_writable(self, namespace: Namespace) -> None:
        if namespace.read_only:
            raise Failed(Status.WRITE_PROTECTED, 4)

    @contextlib.contextmanager
    def _image(
        self, namespace: Namespace, offset: int, length: int, *, reading: bool
    ) -> Iterator[int]:
        """Keep the image open for a call, whose failure is the command's; the descriptor."""
        file = namespace.image.file
        fd = file.hold()
        try:
            if fd < 0:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            yield fd
        except OSError as error:
            number = errno.EIO if error.errno is None else error.errno
            namespace.image.report(number, offset, length, reading)
            self._counters.media_errors += 1
            raise Failed(Status.READ_ERROR if reading else Status.WRITE_FAULT) from None
        finally:
            file.let_go()

    def _trim(self, namespace: Namespace, at: int, size: int) -> bool:
        with self._image(namespace, at, size, reading=False):
            return namespace.image.deallocate(at, size)

    def _pread(self, namespace: Namespace, at: int, size: int) -> bytes:
        found = bytearray()
        with self._image(namespace, at, size, reading=True) as fd:
            while len(found) < size:
                part = os.pread(fd, size - len(found), at + len(found))
                if not part:
                    raise OSError(0, "the image ended")
                found += part
        return bytes(found)

    def _sync(self, namespace: Namespace) -> None:
        with self._image(namespace, 0, namespace.image.size, reading=False):
            namespace.image.flush()

    def flush_all(self) -> Work:
        """Put everything on the disk, as a shutdown wants it."""
        for each in self._namespaces:
            if not each.read_only:
                self._sync(each)
                yield
        return Status.SUCCESS

    def close(self) -> None:
        """Finish what threads are doing, then close the images.

        What takes longer than DEVICE_CLOSE_TIMEOUT goes on, and the images stay open as long.
        """
        self.forget()

        def close_images() -> None:
            for each in self._namespaces:
                each.image.close()

        until = time.monotonic() + DEVICE_CLOSE_TIMEOUT
        self._threads.close(DEVICE_CLOSE_TIMEOUT, close_images)
        for each in self._namespaces:
            if not each.image.closed.wait(max(until - time.monotonic(), 0)):
                log.error("%s: the disk does not answer; the image stays open", each.image.path)


def _sliced(job: Job) -> Work:
    """A job's work, which ends after a slice once it is given up."""
    work = job.work
    while job.given_up is None:
        try:
            next(work)
        except StopIteration as finished:
            return int(finished.value)
        yield
    work.close()
    return job.given_up


def _union(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes as disjoint ranges: a driver cannot have one byte deallocated often."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(extents):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        elif start < end:
            found.append((start, end))
    return found
