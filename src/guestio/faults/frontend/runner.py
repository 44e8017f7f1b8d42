"""Listens as a back-end, and judges the front-end that comes."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Final

from guestio.addr import check_seconds
from guestio.errors import GuestioError
from guestio.faults.catalogue import select as select_checks
from guestio.faults.frontend.demands import Book, demands
from guestio.faults.frontend.devices import make_device
from guestio.faults.frontend.judge import EndedError, FrontEndJudge
from guestio.faults.report import Report
from guestio.peer.channel import PeerGoneError
from guestio.peer.endpoint import Listener

PATIENCE: Final = 2.0
"""Seconds that a front-end may take to answer a miss, and a driver to notify."""
_LOOK: Final = 0.05
"""Seconds between looks for what should have come."""


def check_front_end(
    path: str | os.PathLike[str],
    device: str = "blk",
    *,
    only: Sequence[str] = (),
    image: str | os.PathLike[str] | None = None,
    queues: int = 1,
    iommu: bool = False,
    seconds: float | None = None,
    patience: float = PATIENCE,
    listening: Callable[[], object] | None = None,
) -> Report:
    """Serve one front-end a small device, and judge what it and its driver do.

    The judge is a back-end of its own: it walks rings and reads messages without the code that
    guestio's back-ends use for that. It returns when the front-end hangs up. What did not happen
    is not judged: have the guest do what is to be seen.

    Args:
        path: Where to listen.
        device: Type of the device: ``blk``, ``net``, ``console`` or ``rng``.
        only: Names of demands, with wildcards as for files, or of areas; all if there are none.
        image: What is on the disk, which the guest may change; None for 64 MiB of zeroes.
        queues: Request queues of the disk.
        iommu: Whether to offer VIRTIO_F_ACCESS_PLATFORM, which puts an IOMMU in front of it.
        seconds: How long to go on at most, waiting for the front-end included; None for as long as
            it stays.
        patience: Seconds that a miss and a notification may take.
        listening: Called once a front-end can connect.

    Returns:
        The verdict on each demand: FAIL if it was broken, PASS if it was met whenever it was seen,
        SKIP if it was never seen.

    Raises:
        ValueError: There is no such device type or demand, or an image is given for what is no
            disk.
        DeviceError: The socket or the image cannot be used.
        KeyboardInterrupt: As it came; the socket is removed.
    """
    with JudgedRun(
        path, device, only, image=image, queues=queues, iommu=iommu, patience=patience
    ) as run:
        if listening is not None:
            listening()
        run.serve(seconds)
    return run.report()


class JudgedRun:
    """A judge and its socket, for as long as a front-end is there.

    Args:
        only: Names of demands.

    For these and the others see :func:`check_front_end`.

    Attributes:
        ready_line: One line that says where it listens.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: str = "blk",
        only: Sequence[str] = (),
        *,
        image: str | os.PathLike[str] | None = None,
        queues: int = 1,
        iommu: bool = False,
        patience: float = PATIENCE,
    ) -> None:
        self._path, self._name = os.fspath(path), device
        self._book = Book(select_checks(demands(device), only))
        self._iommu = iommu
        self._stopping = False
        self._patience = check_seconds(patience, "patience", zero=False)
        self._undo = contextlib.ExitStack()
        try:
            self._device = make_device(device, image=image, queues=queues)
            self._undo.callback(self._device.close)
            self._endpoint = Listener.at(self._path)
            self._undo.callback(self._endpoint.close)
        except BaseException:
            self._undo.close()
            raise
        self.ready_line = self._endpoint.ready_line

    def __enter__(self) -> JudgedRun:  # noqa: PYI034 - it is final
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def report(self) -> Report:
        """What has come out so far."""
        return self._book.report(self._path, self._name)

    def stop(self) -> None:
        """Have :meth:`serve` return soon. From any thread, and from signal handlers."""
        self._stopping = True

    def serve(self, seconds: float | None = None) -> None:
        """Serve one front-end until it hangs up, the time is over, or :meth:`stop`."""
        limit = None if seconds is None else check_seconds(seconds, "seconds")
        deadline = None if limit is None else time.monotonic() + limit
        while (connected := self._accept(deadline)) is not None:
            judge = FrontEndJudge(
                connected,
                self._book,
                self._device,
                iommu=self._iommu,
                patience=self._patience,
            )
            try:
                if self._serve(judge, deadline):
                    return
            finally:
                judge.close()

    def _accept(self, deadline: float | None) -> socket.socket | None:
        listener = self._endpoint._socket
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        while not self._stopping and (deadline is None or time.monotonic() < deadline):
            if poll.poll(1000 * _LOOK):
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    return listener.accept()[0]
        return None

    def _serve(self, judge: FrontEndJudge, deadline: float | None) -> bool:
        """Serve a front-end; whether it was one.

        Some connect, look whether something listens, and hang up.
        """
        try:
            while not self._stopping and (deadline is None or time.monotonic() < deadline):
                poll = select.poll()
                for fd in judge.fds():
                    poll.register(fd, select.POLLIN)
                poll.poll(1000 * _LOOK)
                judge.turn()
        except PeerGoneError:
            return judge.messages > 0
        except (EndedError, GuestioError):
            # It sends what is no message, or does not read what it is answered; what was seen until
            # then stands.
            return True
        return True
