"""Events as a trace that https://ui.perfetto.dev opens.

A server is a process; each of its queues has a track of requests, with the stages of each below it,
a track of notifications, and a counter of its depth; the IOTLB and the server's life have one each.
An arrow leads from a request to the notification that told the driver of it.

The few messages needed are encoded here: protobuf's wire format is lengths and numbers.

Source: https://perfetto.dev/docs/reference/synthetic-track-event; the field numbers are those of
Perfetto's protos/perfetto/trace/trace_packet.proto and track_event/*.proto.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, TypeAlias

from guestio.trace import NO_QUEUE, Group, Records, What

Content: TypeAlias = bytes
"""An encoded field."""

_SEQUENCE: Final = 1
_MOST_FLOWS: Final = 1 << 15
"""Requests that one notification tells of: as many as the largest queue holds."""

_NOT_SHOWN: Final = frozenset((What.AVAILABLE, What.STALLED, What.BUFFER, What.CONTENT, What.DATA))
"""What the slices of requests say already."""

_U64: Final = (1 << 64) - 1


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _number(field_number: int, value: int) -> Content:
    """An integer; a negative one as 64 bits of two's complement."""
    return _varint(field_number << 3) + _varint(value & _U64)


def _fixed(field_number: int, value: int) -> Content:
    return _varint(field_number << 3 | 1) + struct.pack("<Q", value)


def _bytes(field_number: int, value: bytes) -> Content:
    return _varint(field_number << 3 | 2) + _varint(len(value)) + value


def _text(field_number: int, value: str) -> Content:
    return _bytes(field_number, value.encode(errors="replace"))


class _Type(IntEnum):
    """`TrackEvent.Type`."""

    BEGIN = 1
    END = 2
    INSTANT = 3
    COUNTER = 4


def _packet(content: Content) -> bytes:
    """A `TracePacket` of a `Trace`."""
    return _bytes(1, content + _number(10, _SEQUENCE))


def _event(time: int, kind: _Type, track: int, *parts: Content) -> bytes:
    body = b"".join((_number(9, kind), _number(11, track), *parts))
    return _packet(_number(8, time) + _bytes(11, body))


def _named(name: str, category: str) -> Content:
    return _text(22, category) + _text(23, name)


def _note(name: str, value: int | str, *, hexadecimal: bool = False) -> Content:
    """A `DebugAnnotation`: an argument of a slice."""
    if isinstance(value, str):
        said = _text(6, value)
    elif hexadecimal:
        said = _number(7, value)
    else:
        said = _number(4 if value < 0 else 3, value)
    return _bytes(4, _text(10, name) + said)


_EXPLICIT: Final = _number(11, 3)
"""Children in the order of their rank."""


@dataclass(slots=True)
class _Request:
    lane: int
    number: int
    found: int
    taken: int
    readable: int
    writable: int
    address: int
    stalled: int = 0
    failed: bool = False
    served: int = 0


@dataclass(slots=True)
class _Queue:
    """A queue's tracks.

    Attributes:
        requests: The track of requests.
        notifications: Of notifications.
        depth: The counter.
        lanes: When the last request of each row of the track ended; None while it lasts.
        open: Requests in flight, by their heads.
        told: Requests that the driver was not notified of yet.
        lacking: When requests, by their heads, were found to lack translations.
    """

    requests: int
    notifications: int
    depth: int
    lanes: list[int | None] = field(default_factory=list)
    tracks: list[int] = field(default_factory=list)
    open: dict[int, _Request] = field(default_factory=dict)
    told: deque[int] = field(default_factory=lambda: deque(maxlen=_MOST_FLOWS))
    lacking: dict[int, int] = field(default_factory=dict)


class PerfettoTrace:
    """Turns events into a Perfetto trace, piece by piece.

    Args:
        name: What the server is called.
        process: The number of its process.

    Events must come in the order of time. For one thread. Memory: for requests in flight.
    """

    def __init__(self, name: str, process: int = 1) -> None:
        self._name = name
        self._process = process
        self._tracks = 0
        self._requests = 0
        self._queues: dict[tuple[int, int], _Queue] = {}
        self._servers: dict[int, tuple[int, int, int]] = {}
        self._now = 0

    def _track(self, parent: int, name: str, rank: int, *parts: Content) -> tuple[int, bytes]:
        """A new track: its number and its description."""
        self._tracks += 1
        body = [_number(1, self._tracks), *parts, _number(12, rank)]
        if name:
            body.append(_text(2, name))
        if parent:
            body.append(_number(5, parent))
        return self._tracks, _packet(_bytes(60, b"".join(body)))

    def feed(self, records: Records) -> Iterator[bytes]:
        """The pieces of the file for events; joined in this order they are a trace.

        Args:
            records: The next events.
        """
        for row in records.tolist():
            (time, since, address, length, detail, result, _, head, what, origin, queue, access) = (
                row
            )
            self._now = max(self._now, time)
            if origin not in self._servers:
                yield from self._new_server(origin)
            if queue != NO_QUEUE and (origin, queue) not in self._queues:
                yield from self._new_queue(origin, queue)
            if what == What.TAKEN:
                yield from self._taken(origin, queue, head, row)
            elif what == What.COMPLETED:
                yield from self._completed(origin, queue, head, time, length, access)
            elif what in (What.SERVED, What.FAILED):
                request = self._queues[origin, queue].open.get(head) if queue != NO_QUEUE else None
                if request is not None and what == What.SERVED:
                    request.served = time
                elif request is not None:
                    request.failed = True
            elif what == What.LACKING and queue != NO_QUEUE:
                self._queues[origin, queue].lacking.setdefault(head, time)
            elif what == What.INTERRUPT and queue != NO_QUEUE:
                yield self._interrupt(self._queues[origin, queue], time, detail)
            elif what not in _NOT_SHOWN:
                yield from self._other(
                    origin, what, time, since, address, length, detail, result, queue, access
                )

    def end(self) -> Iterator[bytes]:
        """The pieces for what is still in flight: requests that no end was seen of."""
        for (origin, queue), found in self._queues.items():
            for head in list(found.open):
                yield from self._completed(origin, queue, head, self._now, 0, 0, cut=True)

    def _new_server(self, origin: int) -> Iterator[bytes]:
        process = _number(1, self._process) + _text(6, f"{self._name}")
        server, described = self._track(0, "", 0, _bytes(3, process), _EXPLICIT)
        yield described
        iotlb, described = self._track(server, "translations", 1)
        yield described
        life, described = self._track(server, "life", 0)
        yield described
        self._servers[origin] = server, iotlb, life

    def _new_queue(self, origin: int, queue: int) -> Iterator[bytes]:
        server = self._servers[origin][0]
        rank = 2 + 4 * queue
        requests, described = self._track(server, f"queue {queue}", rank)
        yield described
        notifications, described = self._track(server, f"queue {queue} notifications", rank + 1)
        yield described
        unit = _number(3, 2)
        depth, described = self._track(server, f"queue {queue} depth", rank + 2, _bytes(8, unit))
        yield described
        self._queues[origin, queue] = _Queue(requests, notifications, depth)

    def _taken(self, origin: int, queue: int, head: int, row: tuple[int, ...]) -> Iterator[bytes]:
        found = self._queues[origin, queue]
        if head in found.open:
            # Its end was lost.
            yield from self._completed(origin, queue, head, row[0], 0, 0, cut=True)
        time, since, address, length, detail = row[:5]
        began = since if 0 < since <= time else time
        lacked = found.lacking.pop(head, 0)
        if 0 < lacked <= time:
            # Its batch was found again once the translations were there.
            began = min(began, lacked)
        else:
            lacked = 0
        ends = enumerate(found.lanes)
        lane = next((each for each, end in ends if end is not None and end <= began), -1)
        if lane < 0:
            lane = len(found.lanes)
            found.lanes.append(None)
            track, described = self._track(found.requests, "requests", 0)
            found.tracks.append(track)
            yield described
        found.lanes[lane] = None
        self._requests += 1
        request = _Request(lane, self._requests, began, time, length, detail, address)
        request.stalled = lacked
        found.open[head] = request
        yield self._depth(found, time)

    @staticmethod
    def _depth(queue: _Queue, time: int) -> bytes:
        return _event(time, _Type.COUNTER, queue.depth, _number(30, len(queue.open)))

    def _completed(
        self,
        origin: int,
        queue: int,
        head: int,
        time: int,
        written: int,
        access: int,
        *,
        cut: bool = False,
    ) -> Iterator[bytes]:
        found = self._queues.get((origin, queue))
        request = None if found is None else found.open.pop(head, None)
        if found is None or request is None:
            return  # it was taken before the recording began
        name = {1: "read", 2: "write"}.get(access, "request")
        if request.failed:
            name += " failed"
        elif cut:
            name += " (no end seen)"
        track = found.tracks[request.lane]
        notes = [
            _note("head", head),
            _note("readable", request.readable),
            _note("writable", request.writable),
            _note("address", request.address, hexadecimal=True),
            _note("written", written),
        ]
        flow = _fixed(47, request.number)
        yield _event(request.found, _Type.BEGIN, track, _named(name, "request"), flow, *notes)
        waited = request.stalled or request.taken
        stages = [("in the ring", request.found, waited)]
        if request.stalled:
            stages.append(("waits for translations", request.stalled, request.taken))
        if request.served:
            stages.append(("served", request.taken, request.served))
            stages.append(("published", request.served, time))
        else:
            stages.append(("served by the device", request.taken, time))
        for stage, begin, end in stages:
            if end > begin:
                yield _event(begin, _Type.BEGIN, track, _named(stage, "stage"))
                yield _event(end, _Type.END, track)
        yield _event(max(time, request.found), _Type.END, track)
        found.lanes[request.lane] = time
        if not cut:
            found.told.append(request.number)
        yield self._depth(found, time)

    @staticmethod
    def _interrupt(queue: _Queue, time: int, index: int) -> bytes:
        flows = b"".join(_fixed(48, number) for number in queue.told)
        queue.told.clear()
        return _event(
            time,
            _Type.INSTANT,
            queue.notifications,
            _named("interrupt", "request"),
            flows,
            _note("used index", index),
        )

    def _other(
        self,
        origin: int,
        what: int,
        time: int,
        since: int,
        address: int,
        length: int,
        detail: int,
        result: int,
        queue: int,
        access: int,
    ) -> Iterator[bytes]:
        kind = What(what) if what in What._value2member_map_ else None
        name = f"event {what}" if kind is None else kind.name.lower()
        _, iotlb, life = self._servers[origin]
        translation = kind is not None and kind.group == Group.TRANSLATIONS
        notes = [_note("address", address, hexadecimal=True), _note("length", length)]
        if detail:
            notes.append(_note("detail", detail, hexadecimal=True))
        if result:
            notes.append(_note("result", result))
        if queue != NO_QUEUE:
            notes.append(_note("queue", queue))
        if access:
            notes.append(
                _note("access", {1: "read", 2: "write", 3: "both"}.get(access, str(access)))
            )
        if 0 < since <= time:
            notes.append(_note("took_ns", time - since))
        yield _event(
            time,
            _Type.INSTANT,
            iotlb if translation else life,
            _named(name, "translation" if translation else "life"),
            *notes,
        )
