"""An entropy device (virtio 1.4, section 5.4): fills the driver's buffers with random bytes."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections import deque
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING

from guestio._core.virtio.chain import Chain
from guestio.budgets import ENTROPY_BYTES
from guestio.errors import DeviceError, GuestioError
from guestio.memory.backing import close_fd
from guestio.virtio.device import Device, DeviceId

if TYPE_CHECKING:
    from guestio.virtio.host import DeviceHost


class EntropyDevice(Device):
    """Gives a guest random bytes: the host's, or those of a file, a device or a pipe.

    Each request is answered with as many bytes as the source has at once, 64 KiB at most. While
    it has none, requests wait and everything else is served. A regular file begins again at its
    end, so a short one makes a guest whose random numbers are the same each time.

    Args:
        source: Where the bytes come from.

    Raises:
        DeviceError: The source cannot be opened, or is a directory or an empty file.

    Threads: as any device; :meth:`close` once no server uses it.
    """

    device_id = DeviceId.ENTROPY

    def __init__(self, source: str | os.PathLike[str] = "/dev/urandom") -> None:
        self._name = os.fspath(source)
        self._host: DeviceHost | None = None
        self._waiting: deque[tuple[Chain, Future[int]]] = deque()
        self._lock = threading.Lock()
        self._fd = -1
        try:
            self._fd = os.open(self._name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
            status = os.fstat(self._fd)
        except (OSError, ValueError) as error:
            self.close()
            why = getattr(error, "strerror", None) or error
            raise DeviceError(f"the source {self._name} cannot be opened: {why}") from error
        self._regular = stat.S_ISREG(status.st_mode)
        if stat.S_ISDIR(status.st_mode) or (self._regular and not status.st_size):
            self.close()
            what = "an empty file" if self._regular else "a directory"
            raise DeviceError(f"the source {self._name} is {what}: it has no random bytes")

    def attached(self, host: DeviceHost) -> None:
        """See :class:`Device`."""
        self._host = host

    def process(self, queue: int, chain: Chain) -> int | Future[int]:
        """Fill a buffer; see :class:`Device`."""
        with self._lock:
            if not self._waiting:
                try:
                    return self._fill(chain)
                except BlockingIOError:
                    self._watch()
            answer: Future[int] = Future()
            self._waiting.append((chain, answer))
            return answer

    def _fill(self, chain: Chain) -> int:
        count = min(chain.writable.total, ENTROPY_BYTES)
        if not count:
            return 0
        data = os.read(self._fd, count)
        if not data and self._regular:
            os.lseek(self._fd, 0, os.SEEK_SET)
            data = os.read(self._fd, count)
        if not data:
            raise DeviceError(f"the source {self._name} has no more random bytes")
        chain.writable.write(data)
        return len(data)

    def _watch(self) -> None:
        if self._host is None:
            raise DeviceError(
                f"the source {self._name} has no random bytes now, and nothing waits for it"
            )
        self._host.add_reader(self._fd, self._readable)

    def _unwatch(self) -> None:
        if self._host is not None:
            self._host.remove_reader(self._fd)

    def _readable(self) -> None:
        """Answer requests that wait, as long as the source has bytes."""
        answered: list[tuple[Future[int], int | Exception]] = []
        with self._lock:
            while self._waiting:
                chain, answer = self._waiting[0]
                try:
                    answered.append((answer, self._fill(chain)))
                except BlockingIOError:
                    break
                except (GuestioError, OSError) as error:
                    answered.append((answer, error))
                self._waiting.popleft()
            else:
                self._unwatch()
        for answer, outcome in answered:
            # The host may have given it up meanwhile.
            with contextlib.suppress(InvalidStateError):
                if isinstance(outcome, int):
                    answer.set_result(outcome)
                else:
                    answer.set_exception(outcome)

    def stopping(self, queue: int) -> None:
        """Answer the requests that wait for the source with nothing."""
        with self._lock:
            self._unwatch()
            waiting = list(self._waiting)
            self._waiting.clear()
        for _, answer in waiting:
            with contextlib.suppress(InvalidStateError):
                answer.set_result(0)

    def close(self) -> None:
        """Close the source. Calling it again does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            close_fd(fd)
