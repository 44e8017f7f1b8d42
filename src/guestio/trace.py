"""What happens inside a server, event by event, as the core's tracepoints write it.

Each thread writes records of 64 bytes (:data:`RECORD`) into a ring of shared memory of its own, and
never waits for a reader. A :class:`TraceReader` reads all rings of this process, or those of
another one of the same user; what was written over before it was read is counted, exactly.

    with Tracing(Group.REQUESTS | Group.TRANSLATIONS), TraceReader() as reader:
        ...
        records, lost = reader.read()

While nothing is traced, a tracepoint costs one branch.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable
from enum import IntEnum, IntFlag
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from guestio._core.trace import tracepoints
from guestio._core.trace.tracepoints import RingReader

VERSION: Final = tracepoints.VERSION
"""Of the layout of rings and records, and of the meaning of events."""

NO_QUEUE: Final = tracepoints.NO_QUEUE
"""In the field ``queue`` of an event that concerns none."""

NO_HEAD: Final = tracepoints.NO_HEAD
"""In the field ``head`` of an event that concerns no request."""


class Group(IntFlag):
    """Which events are written."""

    REQUESTS = 1
    """What becomes of requests."""
    TRANSLATIONS = 2
    """IOTLB and DMA mappings."""
    LIFE = 4
    """Connections, messages, queues, memory, dirty pages, errors: what is rare."""
    MEASURE = 8
    """No events: latencies are counted, as ``/status`` shows them."""
    BUFFERS = 16
    """With REQUESTS: each piece of memory of each request."""
    CONTENTS = 32
    """With REQUESTS: the first 64 bytes that a request gave to read; status and a hash of what was
    written to it."""
    DATA = 64
    """With CONTENTS: all bytes, up to RECORD_CONTENT_BYTES each way."""

    ALL = REQUESTS | TRANSLATIONS | LIFE | BUFFERS
    """Every event, but for what requests carry."""


class What(IntEnum):
    """Kinds of events. A number never changes its meaning."""

    AVAILABLE = 1
    """The driver has made ``length`` requests available that were not taken, at ring position
    ``detail``."""
    TAKEN = 2
    """A request was taken: ``length`` bytes to read, ``detail`` to write, the first of them at
    ``address``; ``since``: when its batch was found; ``result``: its ring position, or -1 if a
    proxy saw it too late to know more than that it was there. One that may be served in the core
    is taken when the one before it was served: to find its memory is part of serving it."""
    STALLED = 3
    """The requests from ring position ``result`` on wait for ``detail`` translations, the first for
    ``access`` to ``address``, ``length``."""
    SERVED = 4
    """The core has served a request; ``result`` bytes were written, ``access`` says what it was:
    0 another request, 1 a read, 2 a write. Other fields as TAKEN."""
    COMPLETED = 5
    """A request was published, ``length`` bytes were written; ``since`` and ``access`` as above,
    and 3 a flush. ``detail``: where in the image a read or write began, in bytes. ``result``: of an
    NVMe command its status (code, type from bit 8 on, 0x4000: not to be tried again), 0x8000, its
    opcode from bit 16 on, and its namespace from bit 32 on; 0 of other requests."""
    INTERRUPT = 6
    """The driver is notified; the used index is ``detail``."""
    FAILED = 7
    """A request was answered with an error, which COMPLETED follows."""
    BUFFER = 8
    """Piece number ``detail`` of what a request that was TAKEN gives for ``access``: 1 to read, 2
    to write."""
    LACKING = 9
    """A request lacks ``detail`` translations, the first for ``access`` to ``address``, ``length``.
    ``since``: when its batch was found. It is looked at again when they come."""
    CONTENT = 10
    """What a request gave to read (``access`` 1) when it was taken, or what was written to it (2)
    when it was served: ``length`` bytes, the first ``detail`` of which follow in DATA. For 2,
    ``since`` is the XXH64 (seed 0) of what was written, of RECORD_CONTENT_BYTES at most, and
    ``result`` the last byte of what the request gave to write, or -1."""
    DATA = 11
    """The next 40 bytes of these, in place of all fields from ``since`` to ``result``."""
    MISS = 16
    """A translation was requested; ``result`` 1: once more. ``queue`` is the first that waits."""
    UPDATE = 17
    """A translation came: to ``detail``, for ``access``."""
    INVALIDATE = 18
    """A translation was revoked."""
    REFUSED = 19
    """A translation was not given; ``result`` is -ETIMEDOUT if no answer came in time."""
    EVICTED = 20
    """A translation to ``detail`` was dropped for want of room."""
    DMA_MAP = 21
    """A client mapped memory: at ``detail`` in the space of its files, for ``access``."""
    DMA_UNMAP = 22
    """A client's ``detail`` mappings were removed."""
    DOMAIN_MAP = 23
    """The driver of a virtio-iommu of this process mapped, in domain ``result``, to ``detail``, for
    ``access``."""
    DOMAIN_UNMAP = 24
    """It unmapped ``detail`` mappings of domain ``result``."""
    ATTACHED = 25
    """Endpoint ``detail`` sees domain ``result`` from now on; -1: none."""
    FAULT = 26
    """An ``access`` of endpoint ``result`` failed; ``detail`` is the reason that a virtio-iommu
    gives its driver."""
    REGION_ADDED = 32
    """Guest memory appeared; ``detail`` is its address in the front-end."""
    REGION_REMOVED = 33
    """Guest memory went."""
    HARVEST = 34
    """Dirty bits of ``length`` bytes were taken; ``detail`` pages had been written."""
    MESSAGE = 35
    """A message that the core did not handle: request number ``detail``, ``length`` bytes of
    payload."""
    CONNECTED = 36
    """Front-end or client number ``detail`` came."""
    DISCONNECTED = 37
    """It went."""
    QUEUE_STARTED = 38
    """A queue's ring of ``length`` entries is used from position ``detail`` on; its descriptors are
    at ``address``."""
    QUEUE_STOPPED = 39
    """A queue let go of its ring, at position ``detail``."""
    QUEUE_BROKEN = 40
    """A queue is served no more: its driver broke a rule."""
    RESET = 41
    """The device was reset."""
    ERROR = 42
    """A front-end or client broke the protocol and was disconnected."""

    @property
    def group(self) -> Group:
        """The group that it belongs to."""
        if self is What.BUFFER:
            return Group.BUFFERS
        if self in (What.CONTENT, What.DATA):
            return Group.CONTENTS
        if self < What.MISS:
            return Group.REQUESTS
        return Group.TRANSLATIONS if self < What.REGION_ADDED else Group.LIFE


class Field(NamedTuple):
    """A field of a record: its name, numpy type, unit, and what it says."""

    name: str
    type: str
    unit: str
    meaning: str


FIELDS: Final = (
    Field("time", "<u8", "ns", "when it happened (CLOCK_MONOTONIC)"),
    Field("since", "<u8", "ns", "when what ended now began; 0 if that is not known"),
    Field("address", "<u8", "byte", "I/O virtual, or guest physical of regions and harvests"),
    Field("length", "<u8", "byte", "bytes, unless the event says otherwise"),
    Field("detail", "<u8", "", "depends on the event"),
    Field("result", "<i8", "", "depends on the event"),
    Field("thread", "<u4", "", "the thread that wrote it, as the kernel numbers it"),
    Field("head", "<u4", "", "identifies a request in its queue while it is in flight, or NO_HEAD"),
    Field("what", "<u2", "", "the event, a `What`"),
    Field("origin", "<u2", "", "the server in its process, as `/status` numbers it; 0 for none"),
    Field("queue", "<u2", "", "the queue, or NO_QUEUE"),
    Field("access", "<u2", "", "1 read, 2 write, 3 both"),
)
"""The fields of a record, in their order."""

RECORD: Final[np.dtype[np.void]] = np.dtype([(field.name, field.type) for field in FIELDS])
"""The layout of a record: 64 bytes, little-endian, one column of a table for each field."""

Records: TypeAlias = NDArray[np.void]
"""An array of :data:`RECORD`."""

Slots: TypeAlias = NDArray[np.void]
"""As :data:`Records`, but as rings hold them: a request may be one in place of its three. Of these,
``time`` is when it was published, and only ``thread``, ``origin`` and ``queue`` mean the same."""


def spell_out(slots: Slots) -> Records:
    """The records that slots stand for, in the order of time.

    Cost: copies, and a sort if slots are not in the order of time.
    """
    records: Records = np.frombuffer(tracepoints.spell_out(slots.view(np.uint8).data), RECORD)
    if np.all(records["time"][1:] >= records["time"][:-1]):
        return records
    return records[np.argsort(records["time"], kind="stable")]


class Batch(NamedTuple):
    """What was read at once.

    Attributes:
        records: In the order of time, of all threads.
        lost: Records that were written over since the last batch before they were read; a request
            that was written as one counts as one.
    """

    records: Records
    lost: int


_origins = itertools.count(1)


def new_origin() -> int:
    """A number for a server, for the field ``origin`` of its events: 1 to 65535, then again."""
    return (next(_origins) - 1) % 0xFFFF + 1


_lock = threading.Lock()
_open: list[Group] = []
_reading: list[TraceReader] = []
"""Readers of this process: rings stay as long as there are any, or any are written."""


def _choose() -> None:
    groups = Group(0)
    for each in _open:
        groups |= each
    tracepoints.want(int(groups))
    if not _open and not _reading:
        tracepoints.release()


class Tracing:
    """Has events written while it is open; what others want is written besides.

    Args:
        groups: Which.

    Threads: any.
    """

    def __init__(self, groups: Group = Group.ALL) -> None:
        self.groups = Group(groups)
        self._closed = False
        with _lock:
            _open.append(self.groups)
            _choose()

    def close(self) -> None:
        """Want nothing any more. Calling it again does nothing."""
        with _lock:
            if not self._closed:
                self._closed = True
                _open.remove(self.groups)
                _choose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def enlarge_rings(records: int) -> None:
    """Have all threads go on in rings that hold so many records at least.

    What is in the rings of before stays there to be read. Threads: any.
    """
    tracepoints.enlarge(records)


def wanted() -> Group:
    """The groups that are written at this moment."""
    return Group(tracepoints.wanted())


def event(what: What, **fields: Any) -> None:
    """Write an event if its group is wanted.

    Args:
        what: The event.
        fields: Fields of the record; see `What` for those that matter.

    Threads: any. Cost: half a microsecond, or two if it is written.
    """
    if tracepoints.wanted() & what.group:
        tracepoints.put(int(what), **fields)


class TraceReader:
    """Reads what the threads of a process write, as long as it is open.

    Args:
        rings: ``(number, fd)`` of each ring of another process, as its ``/status`` lists them; None
            for all of this process, those of later threads included.
        process: That process.
        from_start: Whether to begin with the oldest records that are still there; otherwise with
            what is written from now on.

    Raises:
        OSError: A ring cannot be opened: the process is gone, or another user's.

    One thread at a time; the writers are never stopped.
    """

    def __init__(
        self,
        rings: Iterable[tuple[int, int]] | None = None,
        *,
        process: int | None = None,
        from_start: bool = False,
    ) -> None:
        self._readers: dict[int, RingReader] = {}
        self._own = rings is None
        self._unheld = tracepoints.unheld() if self._own else 0
        self._lost = 0
        if rings is None:
            with _lock:
                _reading.append(self)
            try:
                self._look()
            except BaseException:
                self.close()
                raise
        else:
            self.add(rings, process=os.getpid() if process is None else process)
        if not from_start:
            for reader in self._readers.values():
                reader.skip()

    def _look(self) -> None:
        for reader in tracepoints.open_rings(self._readers):
            self._readers[reader.number] = reader

    def add(self, rings: Iterable[tuple[int, int]], *, process: int) -> None:
        """Read these rings of another process as well, unless they are known.

        Raises:
            OSError: As when it was made.
        """
        for number, remote in rings:
            if number in self._readers:
                continue
            fd = os.open(f"/proc/{process}/fd/{remote}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                reader = RingReader(fd)
            finally:
                os.close(fd)
            self._readers[reader.number] = reader

    @property
    def lost(self) -> int:
        """Records that were lost so far."""
        return self._lost

    def read(self, most: int = 1 << 20) -> Batch:
        """What was written since the last time.

        Args:
            most: Records of each ring at most; the rest is left for the next time.

        Cost: copies, and a sort by time.
        """
        slots, lost = self.read_slots(most)
        return Batch(spell_out(slots), lost)

    def read_slots(self, most: int = 1 << 20) -> tuple[Slots, int]:
        """As :meth:`read`, but as the rings hold it, one ring after the other.

        What two calls return is in the order of time once a quarter of a second is sorted, unless
        a request was served for longer than that before it could be written.

        Args:
            most: Records of each ring at most; the rest is left for the next time.

        Cost: a copy.
        """
        if self._own:
            self._look()
        before = sum(reader.lost for reader in self._readers.values())
        parts = [found for reader in self._readers.values() if (found := reader.read(most))]
        lost = sum(reader.lost for reader in self._readers.values()) - before
        if self._own:
            unheld = tracepoints.unheld()
            lost += unheld - self._unheld
            self._unheld = unheld
        self._lost += lost
        return np.frombuffer(b"".join(parts), RECORD), lost

    def close(self) -> None:
        """Let go of the rings. Calling it again does nothing."""
        self._readers.clear()
        if self._own:
            self._own = False
            with _lock:
                _reading.remove(self)
                _choose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
