"""What a recording has to be replayed: its requests in their order, and what came between them.

A :class:`Script` is made of a recording's tables once, and knows nothing of how it is replayed.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from guestio.addr import ADDRESS_SPACE
from guestio.errors import DeviceError
from guestio.guest.dma import PAGE, Segment
from guestio.trace import What
from guestio.virtio.device import VIRTIO_F_ACCESS_PLATFORM
from guestio.virtio.layout import MAX_QUEUE_SIZE

if TYPE_CHECKING:
    from guestio.observe.recording import Recording

BLOCK: Final = 2
"""The type of a virtio-blk device (virtio 1.4, section 5.2)."""
_ENTROPY: Final = 4
_ALL_TIME: Final = (1 << 64) - 1
_MOST_BYTES: Final = 1 << 32
"""Bytes of a request: the driver is told how many were written in 32 bits."""

_COLUMNS: Final = (
    "origin", "queue", "sequence", "operation", "offset", "available", "taken", "served",
    "completed", "readable", "writable", "written", "failed", "status", "answer_hash", "content",
    "answer", "read_pieces", "write_pieces",
)  # fmt: skip


class NotReplayableError(DeviceError):
    """A recording has not what is needed to repeat its requests."""


@dataclass(slots=True, eq=False)
class RecordedRequest:
    """A request as it was recorded.

    Attributes:
        number: Which one of its script it is, from 0, in the order in which they are repeated.
        queue: Its queue.
        sequence: Which one of its queue it is.
        operation: ``read``, ``write``, ``flush`` or ``other``.
        offset: Where in the image it begins, or None.
        found: When its batch was found in the ring, in nanoseconds.
        start: When it was taken: its driver had published it before.
        end: When it had been served, and so had all that were published with it: its driver knew
            no earlier.
        readable, writable: What it gave: addresses and lengths.
        content: What the device was given to read.
        written: How many bytes the device said it had written.
        status: The last byte of what it gave to write, or None.
        answer: What was written, or None.
        answer_hash: XXH64 of that, or None.
        refused: Pages that the device was refused while it had it.
        repeatable: Whether another device must answer the same.
    """

    number: int
    queue: int
    sequence: int
    operation: str
    offset: int | None
    found: int
    start: int
    end: int
    readable: list[Segment]
    writable: list[Segment]
    content: bytes
    written: int
    status: int | None
    answer: bytes | None
    answer_hash: int | None
    refused: frozenset[int] = frozenset()
    repeatable: bool = True

    @property
    def room(self) -> int:
        """Bytes that it gave to write."""
        return sum(length for _, length in self.writable)


class Revocation(NamedTuple):
    """Translations were revoked.

    Attributes:
        time: When.
        address, length: Which.
    """

    time: int
    address: int
    length: int


@dataclass(frozen=True, slots=True)
class Script:
    """What one front-end of a recording did, to be repeated.

    Attributes:
        requests: In the order in which they are repeated: that in which they were taken.
        ends: When each of them had been served, in order; and :attr:`by_end`, which that was.
        by_end: Numbers of requests in the order of their ends.
        revocations: In the order of time.
        device_id: The type of device, or None.
        features: The feature bits that it negotiated last.
        iommu: Whether an IOMMU was in front of the device.
        sizes: Entries of each queue that was used.
        left_out: How many requests are not repeated, by the reason.
    """

    requests: list[RecordedRequest]
    ends: list[int]
    by_end: list[int]
    revocations: list[Revocation]
    device_id: int | None
    features: int | None
    iommu: bool
    sizes: dict[int, int]
    left_out: dict[str, int]

    @property
    def seconds(self) -> float:
        """From the first request to the end of the last."""
        if not self.requests:
            return 0.0
        return (self.ends[-1] - self.began) / 1e9

    @property
    def began(self) -> int:
        """When the first request was found."""
        return min(request.found for request in self.requests)

    def before(self, time: int) -> int:
        """How many requests had been served before a moment: the first ones of `by_end`."""
        return bisect_left(self.ends, time)


def scripts_of(recording: Recording) -> list[Script]:
    """What a recording has to be replayed: for each front-end that made requests, in their order.

    What is not repeated at all is counted in the first one.

    Raises:
        NotReplayableError: It was recorded without the content of requests, or of another version;
            the message says what to record with.
    """
    events = recording.events()
    description = recording.description
    payload = description.get("payload", "none")
    name = recording.path
    if payload == "none":
        raise NotReplayableError(
            f"{name} was recorded without what requests carry; record with --payload all to replay "
            "it, or with --payload headers if its requests only read"
        )
    requests, left_out, short = _requests(recording.requests())
    if short:
        total = len(requests) + len(short)
        first = short[0]
        advice = "record with --payload all"
        if lost := description.get("lost"):
            advice = f"{lost} records were lost, as the recorder got too little processor time"
        elif payload == "all":
            advice = f"of a request, {content_bytes(description)} bytes were recorded at most"
        raise NotReplayableError(
            f"{name} was recorded with --payload {payload}, which does not hold all of what "
            f"{len(short)} of its {total} requests gave to read (the first: request {first[1]} of "
            f"queue {first[0]}, {first[2]} of {first[3]} bytes); {advice}"
        )
    if not requests:
        raise NotReplayableError(
            f"{name} has no request that can be replayed"
            + "".join(f"; {count} {why}" for why, count in left_out.items())
        )
    device_id = (description.get("device") or {}).get("device_id")
    _note_refusals(requests, _changes(events, What.REFUSED))
    _note_unrepeatable(requests, device_id)
    found: list[Script] = []
    for session in _sessions(events, description.get("peers") or []):
        theirs = [each for each in requests if session.begin <= each.start < session.end]
        if theirs:
            script = _script(session, theirs, device_id, {} if found else left_out)
            found.append(script)
    return found


def content_bytes(description: Mapping[str, Any]) -> int:
    """Bytes of a request of which a recording has the content or the hash, each way."""
    found: int = description.get("content_bytes", 1 << 20)
    return found


class _Session(NamedTuple):
    """The time in which a front-end was connected.

    Attributes:
        begin: When it came.
        end: When the next one came.
        peer: What describes it; empty if nothing does.
        features: Those that it negotiated last; of one whose features are not known, those of the
            latest that are.
        events: What happened meanwhile.
    """

    begin: int
    end: int
    peer: dict[str, Any]
    features: int | None
    events: pa.Table


def _sessions(events: pa.Table, peers: list[dict[str, Any]]) -> Iterator[_Session]:
    """The front-ends of a recording, one after the other."""
    came = [(each["time"], each["detail"]) for each in _of_kind(
        events, What.CONNECTED, ["time", "detail"]
    )]  # fmt: skip
    came.sort()
    by_number = {each.get("number"): each for each in peers}
    # One that was there when recording began has not come meanwhile.
    new = {number for _, number in came}
    first = [each.get("number") for each in peers if each.get("number") not in new]
    came.insert(0, (0, first[-1] if first else None))
    known = [each["feature_bits"] for each in peers if each.get("feature_bits") is not None]
    times = events["time"]
    for number, (begin, which) in enumerate(came):
        end = came[number + 1][0] if number + 1 < len(came) else _ALL_TIME
        peer = by_number.get(which, {})
        features = peer.get("feature_bits")
        if features is None and known:
            features = known[-1]
        between = pc.and_(
            pc.greater_equal(times, pa.scalar(begin, times.type)),
            pc.less(times, pa.scalar(end, times.type)),
        )
        yield _Session(begin, end, peer, features, events.filter(between))


def _script(
    session: _Session,
    requests: list[RecordedRequest],
    device_id: int | None,
    left_out: dict[str, int],
) -> Script:
    """What is to be repeated of one front-end."""
    events, features = session.events, session.features
    revocations = _changes(events, What.INVALIDATE)
    iommu = bool(revocations or _changes(events, What.REFUSED)) or _had_updates(events)
    if features is not None and not iommu:
        iommu = bool(features >> VIRTIO_F_ACCESS_PLATFORM & 1)
    for number, request in enumerate(requests):
        request.number = number
        if iommu:
            request.readable = _merged(request.readable)
            request.writable = _merged(request.writable)
    order = sorted(range(len(requests)), key=lambda number: requests[number].end)
    return Script(
        requests=requests,
        ends=[requests[number].end for number in order],
        by_end=order,
        revocations=revocations,
        device_id=device_id,
        features=features,
        iommu=iommu,
        sizes=_sizes(events, session.peer, requests),
        left_out=left_out,
    )


def _requests(
    table: pa.Table,
) -> tuple[list[RecordedRequest], dict[str, int], list[tuple[int, int, int, int]]]:
    """Requests in their order, how many are left out and why, and those whose content is short."""
    found: list[RecordedRequest] = []
    short: list[tuple[int, int, int, int]] = []
    left_out: dict[str, int] = {}

    def leave_out(why: str) -> None:
        left_out[why] = left_out.get(why, 0) + 1

    published: dict[tuple[int, int], int] = {}
    for row in _rows(table, ["queue", "served", "completed"]):
        if row["completed"] is not None:
            key = row["queue"], row["completed"]
            published[key] = max(published.get(key, 0), row["served"] or row["completed"])
    for row in _rows(table, _COLUMNS):
        if row["taken"] is None:
            leave_out("were taken before the recording began")
            continue
        if row["completed"] is None:
            leave_out("have no end in the recording")
            continue
        readable = _segments(row["read_pieces"], row["readable"])
        writable = _segments(row["write_pieces"], row["writable"])
        content = row["content"] or b""
        needed = row["readable"] or 0
        if len(content) < needed or readable is None or writable is None:
            short.append((row["queue"], row["sequence"] or 0, len(content), needed))
            continue
        if not readable and not writable:
            leave_out("gave no memory")
            continue
        start = row["taken"]
        found.append(
            RecordedRequest(
                number=0,
                queue=row["queue"],
                sequence=row["sequence"] or 0,
                operation=row["operation"] or "other",
                offset=row["offset"],
                found=min(row["available"] or start, start),
                start=start,
                end=max(published[row["queue"], row["completed"]], start),
                readable=readable,
                writable=writable,
                content=content[:needed],
                written=row["written"] or 0,
                status=row["status"],
                answer=row["answer"],
                answer_hash=row["answer_hash"],
            )
        )
    found.sort(key=lambda request: (request.start, request.queue, request.sequence))
    return found, left_out, short


def _rows(table: pa.Table, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for batch in table.select(list(columns)).to_batches(max_chunksize=4096):
        yield from batch.to_pylist()


def _segments(pieces: list[dict[str, int]] | None, expected: int | None) -> list[Segment] | None:
    """Where memory was; None if that was not recorded.

    Raises:
        NotReplayableError: No request can have such memory.
    """
    found = [(each["address"], each["length"]) for each in pieces or () if each["length"]]
    total = sum(length for _, length in found)
    if any(address + length > ADDRESS_SPACE for address, length in found) or total > _MOST_BYTES:
        raise NotReplayableError(f"a request of {total} bytes at {found[0][0]:#x} cannot be")
    return found if total == (expected or 0) else None


def _merged(segments: list[Segment]) -> list[Segment]:
    """Pieces of a buffer that an IOMMU has on several pages, as one buffer again."""
    found: list[Segment] = []
    for address, length in segments:
        if found and address % PAGE == 0 and sum(found[-1]) == address:
            found[-1] = found[-1][0], found[-1][1] + length
        else:
            found.append((address, length))
    return found


def _had_updates(events: pa.Table) -> bool:
    return bool(pc.any(pc.equal(events["what"], int(What.UPDATE))).as_py())


def _of_kind(events: pa.Table, what: What, columns: list[str]) -> list[dict[str, Any]]:
    chosen = events.filter(pc.equal(events["what"], int(what))).select(columns)
    found: list[dict[str, Any]] = chosen.to_pylist()
    return found


def _changes(events: pa.Table, what: What) -> list[Revocation]:
    """What was revoked, or refused."""
    columns = ["time", "address", "length"]
    return sorted(Revocation(**each) for each in _of_kind(events, what, columns))


def _note_refusals(requests: list[RecordedRequest], refusals: list[Revocation]) -> None:
    """Which pages each request was refused."""
    times = [each.time for each in refusals]
    if not times:
        return
    for request in requests:
        near = refusals[bisect_left(times, request.start) : bisect_right(times, request.end)]
        if near:
            pages = {
                page
                for address, length in request.readable + request.writable
                for page in pages_of(address, length)
            }
            request.refused = frozenset(
                page
                for page in pages
                if any(each.address < page + PAGE and page < each.address + each.length
                       for each in near)
            )  # fmt: skip


def _note_unrepeatable(requests: list[RecordedRequest], device_id: int | None) -> None:
    """Which answers depend on chance: random numbers, and reads of what was being written."""
    if device_id == _ENTROPY:
        for request in requests:
            request.repeatable = False
    if device_id != BLOCK:
        return
    moving: list[tuple[RecordedRequest, int, int]] = []
    for request in requests:
        moving = [each for each in moving if each[0].end >= request.start]
        if request.offset is None:
            continue
        if request.operation == "read":
            length = request.room - 1
        else:
            length = sum(n for _, n in request.readable) - 16
        end = request.offset + length
        for other, first, last in moving:
            if (
                first < end
                and request.offset < last
                and "write"
                in (
                    request.operation,
                    other.operation,
                )
            ):
                request.repeatable = request.repeatable and request.operation != "read"
                other.repeatable = other.repeatable and other.operation != "read"
        moving.append((request, request.offset, end))


def _sizes(
    events: pa.Table, peer: dict[str, Any], requests: list[RecordedRequest]
) -> dict[int, int]:
    """The largest size of each queue that has requests."""
    seen = [(each["index"], each["size"]) for each in peer.get("queues") or ()]
    started = _of_kind(events, What.QUEUE_STARTED, ["queue", "length"])
    seen += [(each["queue"], each["length"]) for each in started]
    used = {request.queue for request in requests}
    found: dict[int, int] = {}
    for queue, size in seen:
        # A queue that never started has no size.
        if queue in used and 0 < size <= MAX_QUEUE_SIZE and not size & (size - 1):
            found[queue] = max(found.get(queue, 0), size)
    return found


def pages_of(address: int, length: int) -> range:
    """The pages that a range touches."""
    return range(address - address % PAGE, address + length, PAGE)
