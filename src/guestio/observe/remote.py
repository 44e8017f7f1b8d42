"""The events of a server in another process of this user, over its control socket."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from typing import TYPE_CHECKING, Final

import numpy as np

from guestio.control.client import ControlClient
from guestio.errors import DeviceError
from guestio.trace import RECORD, Batch, Slots, TraceReader, spell_out

if TYPE_CHECKING:
    from guestio.control.schema import Status


QUIET_SECONDS: Final = 60.0
"""Seconds that a server may say nothing: its control thread may get no processor for long, or the
process be stopped, and go on. One that has ended is noticed at once."""

REFRESH_SECONDS: Final = 10.0
"""Seconds that a status may take: the server's threads may get no processor for long."""


class ControlSource:
    """Has a server write events, and reads its rings, until :meth:`close`.

    Args:
        where: The path of its control socket.
        payload: How much of what requests carry is written.

    Raises:
        DeviceError: Nothing answers, it refuses, or its memory cannot be reached.

    For one thread, but for the one of its own that follows the server's status.
    """

    def __init__(self, where: str | os.PathLike[str], payload: str) -> None:
        path = os.fspath(where)
        if path.startswith("http://"):
            raise DeviceError(
                f"{path} cannot be recorded: records are read from the server's memory, so name "
                "its control socket on this machine"
            )
        self._lost = self._unheld = 0
        self._lock = threading.Lock()
        self._latest: Status | None = None
        self._stream = ControlClient(path, timeout=QUIET_SECONDS).stream(
            f"/record?payload={payload}"
        )
        self._reader: TraceReader | None = None
        try:
            status = self._next()
            if status is None:
                raise DeviceError(f"{path} has ended")
            self._process = status["process"]["pid"]
            self._unheld = status["trace"]["unheld"]
            try:
                self._reader = TraceReader(_rings(status), process=self._process)
            except OSError as error:
                raise DeviceError(
                    f"the memory of process {self._process} behind {path} cannot be read: "
                    f"{error.strerror}"
                ) from None
        except BaseException:
            self._stream.close()
            raise
        self._latest = status
        self._thread = threading.Thread(target=self._follow, name="guestio-status", daemon=True)
        self._thread.start()

    def _next(self) -> Status | None:
        """The next status; None once there is none."""
        line = self._stream.readline()
        if not line:
            return None
        try:
            status: Status = json.loads(line)
        except ValueError:
            return None
        return status

    def _follow(self) -> None:
        status: Status | None = self._latest
        while status is not None:
            try:
                status = self._next()
            except (OSError, DeviceError):
                status = None
            if status is not None:
                self._take_rings(status)
            self._latest = status

    def _take_rings(self, status: Status) -> None:
        """Open the rings that are new, at once: they go with the process."""
        assert self._reader is not None
        with self._lock:
            # A thread may end between the status and now; its ring is known then.
            with contextlib.suppress(OSError):
                self._reader.add(_rings(status), process=self._process)
            self._lost += status["trace"]["unheld"] - self._unheld
            self._unheld = status["trace"]["unheld"]

    def status(self) -> Status | None:
        """The latest status; None once the server is gone."""
        return self._latest

    def refresh(self) -> None:
        """Wait for a status of now, ten seconds at most.

        It names all rings that there are, and was made with the interpreter's lock: a thread that
        published a request before this call has written its record as well.
        """
        asked = time.monotonic()
        while time.monotonic() < asked + REFRESH_SECONDS:
            status = self._latest
            if status is None or status["time_s"] >= asked:
                return
            time.sleep(0.01)

    def read(self) -> Batch:
        """What was written since the last time."""
        slots, lost = self.read_slots()
        return Batch(spell_out(slots), lost)

    def read_slots(self) -> tuple[Slots, int]:
        """The same as its rings hold it."""
        if self._reader is None:
            return np.zeros(0, RECORD), 0
        with self._lock:
            slots, lost = self._reader.read_slots()
            lost, self._lost = lost + self._lost, 0
        return slots, lost

    def close(self) -> None:
        """Have nothing written any more for this. Calling it again does nothing."""
        self._stream.close()
        self._thread.join()
        if self._reader is not None:
            self._reader.close()


def _rings(status: Status) -> list[tuple[int, int]]:
    return [(ring["number"], ring["fd"]) for ring in status["trace"]["rings"]]
