"""Records what a running server does, in its process or from another one."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, Literal, Protocol, Self, TypeAlias

import numpy as np

from guestio.budgets import (
    RECORD_BYTES,
    RECORD_CONTENT_BYTES,
    RECORD_DISK_FREE,
    RECORD_FINISH_BYTES,
    RECORD_PEERS,
)
from guestio.control.record import groups_of, ring_of
from guestio.control.schema import Status
from guestio.control.status import Observed
from guestio.observe.finish import finish
from guestio.observe.remote import ControlSource
from guestio.observe.schema import VERSION
from guestio.observe.spool import Description, Spool
from guestio.trace import RECORD, Records, Slots, TraceReader, Tracing, What, enlarge_rings

log = logging.getLogger("guestio.observe")

Payload: TypeAlias = Literal["none", "headers", "all"]
"""How much of what requests carry is recorded: nothing; the layout of their memory, their first
64 bytes, and status and hash of the answer; or all bytes as well."""

STEP: Final = 0.02
"""Seconds between looks for new records."""

DESCRIBE_SECONDS: Final = 0.25
"""Seconds between looks at what was negotiated."""


_OF_PEERS: Final = np.array([What.CONNECTED, What.QUEUE_STARTED], np.uint16)


class Source(Protocol):
    """Where records come from."""

    def status(self) -> Status | None:
        """The latest status of the server; None once it is gone."""
        ...

    def refresh(self) -> None:
        """Make sure that the next read finds whatever was written before this call."""
        ...

    def read_slots(self) -> tuple[Slots, int]:
        """What was written since the last time, and how much was lost."""
        ...

    def close(self) -> None:
        """Have nothing written any more for this."""
        ...


class _OwnSource:
    """A server in this process."""

    def __init__(self, server: Observed, payload: Payload) -> None:
        self._server = server
        with contextlib.ExitStack() as undo:
            self._reader = undo.enter_context(TraceReader())
            groups = groups_of(payload)
            enlarge_rings(ring_of(groups))
            undo.enter_context(Tracing(groups))
            self._undo = undo.pop_all()

    def status(self) -> Status | None:
        return self._server.status()

    def refresh(self) -> None:
        """Do nothing: a reader of this process knows all rings."""

    def read_slots(self) -> tuple[Slots, int]:
        return self._reader.read_slots()

    def close(self) -> None:
        self._undo.close()


class Recorder:
    """Records what a server does, from its making to :meth:`close`.

    Args:
        source: A server of this process, such as a `Backend`; or the path of a control socket, of a
            server of the same user on this machine.
        path: The file to write; it must not be there yet. While it is written it can be read up to
            a second ago or so, also if this process dies; :meth:`close` makes it a Parquet file.
        payload: How much of what requests carry is recorded.
        most_bytes: Bytes of the file while it is written; recording ends there.

    Raises:
        DeviceError: Nothing answers there, or it refuses.
        OSError: The file is there already, or cannot be made.

    Attributes:
        path: As given.
        ending: Done once recording has ended, by itself or by :meth:`close`.
        ended: Why recording ended before :meth:`close`; None as long as it goes on.

    Threads: it has one of its own; :meth:`close` may be called from any. Cost: the server's threads
    write a record of 64 bytes for each event, and one for all of a request that the core serves by
    itself and of which no payload is recorded; this thread copies them to the file. With a server
    in another process only the former is the server's.
    """

    def __init__(
        self,
        source: Observed | str | os.PathLike[str],
        path: str | os.PathLike[str],
        *,
        payload: Payload = "none",
        most_bytes: int = RECORD_BYTES,
    ) -> None:
        self.path = Path(path)
        self.ended: str | None = None
        self.ending: Future[None] = Future()
        self._most_bytes = most_bytes
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._result: Description | None = None
        # Events of LIFE that are later than what other threads may still tell.
        self._later: Records = np.zeros(0, RECORD)
        self._origin: int | None = None
        self._spool_bytes = 0
        self._known: Description = {}
        # Whether the description differs from what was written last, and when that was.
        self._changed, self._written_at = False, 0.0
        with contextlib.ExitStack() as undo:
            self._spool = Spool(self.path)
            undo.callback(self.path.unlink)
            undo.callback(self._spool.close)
            self._source: Source
            if isinstance(source, str | os.PathLike):
                self._source = ControlSource(source, payload)
            else:
                self._source = _OwnSource(source, payload)
            undo.callback(self._source.close)
            self._description: Description = {
                "version": VERSION,
                "payload": payload,
                "content_bytes": RECORD_CONTENT_BYTES,
                "began": {"monotonic_ns": time.monotonic_ns(), "realtime_ns": time.time_ns()},
                "peers": [],
                "lost": 0,
                "ended": None,
            }
            self._describe()
            self._spool.write(self._later, self._description)
            self._thread = threading.Thread(target=self._run, name="guestio-record", daemon=True)
            self._thread.start()
            undo.pop_all()

    def _describe(self) -> bool:
        """Note what was negotiated, if that changed; whether the server is still there."""
        status = self._source.status()
        if status is None:
            return False
        found = description_of(status)
        if found != self._known:
            self._known, self._changed = found, True
            peer = found["peer"]
            self._description |= {
                "guestio": status["version"],
                "process": status["process"],
                "device": found["device"],
            }
            self._origin = found["device"]["origin"]
            if peer is not None:
                known = self._peer(peer["number"], time.monotonic_ns())
                queues = {queue["index"]: queue for queue in known["queues"]}
                queues |= {queue["index"]: queue for queue in peer["queues"]}
                # As it is now, but what has ended stays.
                memory = peer["memory"] or known["memory"]
                known |= peer
                known["queues"] = [queues[index] for index in sorted(queues)]
                known["memory"] = memory
        return True

    def _peer(self, number: int, time_ns: int) -> dict[str, Any]:
        """What describes a front-end or client, from now on if it is new."""
        peers: list[dict[str, Any]] = self._description["peers"]
        same = [each for each in peers if each["number"] == number]
        known: dict[str, Any] | None = same[-1] if same else None
        if known is not None:
            return known
        self._changed = True
        peers.append(
            {
                "time_ns": time_ns,
                "number": number,
                "features": [],
                "feature_bits": None,
                "protocol_features": [],
                "queues": [],
                "memory": [],
            }
        )
        del peers[:-RECORD_PEERS]
        return peers[-1]

    def _note_peers(self, records: Records) -> None:
        """Note those that come and go between two looks at the status."""
        for each in records[np.isin(records["what"], _OF_PEERS)]:
            if each["what"] == What.CONNECTED:
                self._peer(int(each["detail"]), int(each["time"]))
            elif self._description["peers"]:
                queues = self._description["peers"][-1]["queues"]
                index, size = int(each["queue"]), int(each["length"])
                if all(queue["index"] != index for queue in queues):
                    queues.append({"index": index, "size": size})
                    self._changed = True

    def _step(self, *, last: bool = False) -> None:
        """Write what is there, as it is: the server may want the processor that this runs on."""
        # Records before this moment have all been written, but for requests that were taken and
        # are not published yet: each is, with its time, while the interpreter's lock is held.
        until = time.monotonic_ns()
        slots, lost = self._source.read_slots()
        if lost:
            self._description["lost"] += lost
            self._changed = True
        origins = slots["origin"]
        if not (origins == self._origin).all():
            slots = slots[(origins == self._origin) | (origins == 0)]
        rare = slots["what"] >= What.REGION_ADDED
        if len(self._later) or rare.any():
            records = np.concatenate([self._later, slots[rare]])
            records = records[np.argsort(records["time"], kind="stable")]
            end = len(records) if last else int(np.searchsorted(records["time"], until, "right"))
            self._note_peers(records[:end])
            self._later = records[end:].copy()
        if len(slots) or last:
            now = time.monotonic()
            # It is long once many front-ends have come and gone.
            told = last or (self._changed and now - self._written_at >= DESCRIBE_SECONDS)
            self._spool.write(slots, self._description if told else None)
            if told:
                self._changed, self._written_at = False, now

    def _run(self) -> None:
        try:
            described = 0.0
            while not self._stop.wait(STEP):
                now = time.monotonic()
                if now - described >= DESCRIBE_SECONDS:
                    described = now
                    if not self._describe():
                        self._end("the server has ended")
                        return
                    free = shutil.disk_usage(self.path.parent).free
                    if self._spool.bytes >= self._most_bytes:
                        self._end(f"the file has reached {self._most_bytes} bytes")
                        return
                    if free < RECORD_DISK_FREE:
                        self._end(f"only {free} bytes are left on its file system")
                        return
                self._step()
        except Exception as error:
            # Whatever fails here, a disk that is full for example, must not harm the server.
            self._end(f"{type(error).__name__}: {error}")
        finally:
            self.ending.set_result(None)

    def _end(self, why: str) -> None:
        self.ended = self._description["ended"] = why
        log.warning("the recording %s ends: %s", self.path, why)

    @property
    def closing(self) -> bool:
        """Whether :meth:`close` is under way. From any thread."""
        return self._lock.locked()

    def close(self, *, finished: bool | None = True) -> Description:
        """End the recording. Calling it again does nothing.

        Args:
            finished: Whether to make it a Parquet file, which takes some seconds for a million
                requests; None to do so only if that takes a fraction of a second. What is left as
                it is can be read all the same, and finished later by `finish`.

        Returns:
            What describes the recording; with its counts if it is finished.

        Raises:
            OSError: There is no room for the Parquet file; what was written is still there.
        """
        with self._lock:
            if self._result is not None:
                return self._result
            self._stop.set()
            self._thread.join()
            try:
                with contextlib.suppress(OSError):
                    # A disk that is full keeps what it has.
                    self._source.refresh()
                    self._describe()
                    self._step(last=True)
            finally:
                self._source.close()
                self._spool_bytes = self._spool.bytes
                with contextlib.suppress(OSError):
                    self._spool.close()
            self._result = self._description
            if finished is None:
                finished = self._spool_bytes <= RECORD_FINISH_BYTES
                if not finished:
                    log.warning(
                        "the recording %s stays a stream of records, of %d bytes: `guestio report` "
                        "reads it, and `guestio report --finish` makes it a Parquet file",
                        self.path,
                        self._spool_bytes,
                    )
            if finished:
                self._result = finish(self.path)
            return self._result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def description_of(status: Status) -> dict[str, Any]:
    """What of a status a recording keeps, and a replay needs to set up the same."""
    peer = status["peer"]
    found: dict[str, Any] = {"device": status["device"], "peer": None}
    if peer is not None:
        found["peer"] = {
            "number": peer["number"],
            "features": peer["features"],
            "feature_bits": peer["feature_bits"],
            "protocol_features": peer["protocol_features"],
            "queues": [
                {"index": queue["index"], "size": queue["size"]}
                for queue in status["queues"]
                if queue["running"]
            ],
            "memory": status["memory"],
        }
    return found
