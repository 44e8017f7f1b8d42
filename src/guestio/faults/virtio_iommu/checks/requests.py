"""Requests of all types: their heads, tails and sizes."""

from __future__ import annotations

from functools import partial
from typing import Final

from guestio.faults.catalogue import virtio
from guestio.faults.report import Severity
from guestio.faults.virtio_iommu.catalogue import hostile, iommu, register
from guestio.faults.virtio_iommu.trial import DOMAIN, IOVA, PHYS, RW, TAIL, IommuTrial
from guestio.virtio.iommu import Status, wire

_OPERATIONS: Final = iommu("6.2, Device Requirements: Device operations")
_PARSING: Final = iommu("6, Device operations")
_FRAMING: Final = virtio("2.7.4.1, Device Requirements: Message Framing")

_ALL: Final[tuple[wire.Request, ...]] = (
    wire.Attach(DOMAIN, 0, 0, bytes(4)),
    wire.Map(DOMAIN, IOVA, IOVA + 0xFFFF, PHYS, RW),
    wire.Unmap(DOMAIN, IOVA, IOVA + 0xFFFF, bytes(4)),
    wire.Detach(DOMAIN, 0),
    wire.Probe(0),
)


def _life(t: IommuTrial) -> list[wire.Request]:
    """One request of each type that is available, all of which succeed in this order."""
    (endpoint,) = t.endpoints()
    size = max(0x10000, t.page)
    requests: list[wire.Request] = [
        wire.Attach(DOMAIN, endpoint, 0, bytes(4)),
        wire.Map(DOMAIN, IOVA, IOVA + size - 1, PHYS, RW),
        wire.Unmap(DOMAIN, IOVA, IOVA + size - 1, bytes(4)),
        wire.Detach(DOMAIN, endpoint),
    ]
    if t.offered & wire.F_PROBE:
        requests.insert(0, wire.Probe(endpoint))
    return requests


def _room(t: IommuTrial, request: wire.Request) -> int:
    return TAIL + (t.probe_size if isinstance(request, wire.Probe) else 0)


@register(
    "request.ok",
    _OPERATIONS,
    "A request that succeeds should be answered with OK.",
    severity=Severity.SHOULD,
)
def _ok(t: IommuTrial) -> None:
    t.begin()
    for request in _life(t):
        t.succeeds(request)


@register(
    "request.tail-reserved",
    _OPERATIONS,
    "The reserved bytes behind the status should be zero.",
    severity=Severity.SHOULD,
)
def _tail(t: IommuTrial) -> None:
    t.begin()
    for request in _life(t):
        answer = t.succeeds(request)
        t.expect(not any(answer.data[-3:]), f"the tail is {answer.data[-4:].hex()}")


@register("request.used-length", virtio("2.7.8.2"), "The used length counts all that was written.")
def _used_length(t: IommuTrial) -> None:
    t.begin()
    for request in _life(t):
        answer = t.succeeds(request)
        t.expect(
            answer.written == len(answer.data),
            f"{answer.written} bytes are said to be written, of {len(answer.data)}",
        )


@register("request.head-reserved", _OPERATIONS, "The reserved bytes behind the type are ignored.")
def _head(t: IommuTrial) -> None:
    t.begin()
    for request in _life(t):
        sent = bytearray(wire.pack(request))
        sent[1:4] = b"\xff\x01\x80"
        answer = t.raw(bytes(sent), _room(t, request))
        t.expect(answer.status == Status.OK, f"{request} is answered with {answer}")


@register(
    "request.unknown-type",
    _OPERATIONS,
    "A request of an unknown type should have a zero-length answer.",
    severity=Severity.SHOULD,
)
def _unknown(t: IommuTrial) -> None:
    t.begin()
    for kind in (0, 6, 0x7F, 0xFF):
        answer = t.raw(bytes([kind]) + bytes(35), TAIL)
        t.expect(answer.written == 0, f"type {kind} is answered with {answer}")
        t.expect(answer.data == b"\xaa" * TAIL, f"type {kind}: the buffer is written")


@register("request.in-bytes", _FRAMING, "A request may come in descriptors of any sizes.")
def _in_bytes(t: IommuTrial) -> None:
    t.begin()
    for request in _life(t)[-4:]:
        sent = wire.pack(request)
        cuts = range(1, len(sent)) if len(sent) < 50 else range(3, len(sent), 7)
        answer = t.raw(sent, cuts=list(cuts), rooms=[1] * TAIL)
        t.expect(answer.status == Status.OK, f"{request} is answered with {answer}")


@register("request.cut", _FRAMING, "A request may be cut anywhere.")
def _cut(t: IommuTrial) -> None:
    t.begin()
    for _ in range(8):
        for request in _life(t):
            sent = wire.pack(request)
            cuts = sorted(t.random.sample(range(1, len(sent)), 3))
            room = _room(t, request)
            first = t.random.randrange(1, room)
            answer = t.raw(sent, cuts=cuts, rooms=[first, room - first])
            t.expect(answer.status == Status.OK, f"{request} is answered with {answer}")


@register("request.together", iommu("2, Virtqueues"), "Requests may be made many at a time.")
def _together(t: IommuTrial) -> None:
    t.begin()
    (endpoint,) = t.endpoints()
    t.attach(endpoint)
    page = t.page
    for requests in (
        [
            wire.Map(DOMAIN, IOVA + i * page, IOVA + i * page + page - 1, PHYS, RW)
            for i in range(30)
        ],
        [
            wire.Unmap(DOMAIN, IOVA + i * page, IOVA + i * page + page - 1, bytes(4))
            for i in range(30)
        ],
    ):
        answers = t.driver.ask_all([([wire.pack(each)], [TAIL]) for each in requests])
        bad = [str(answer) for answer in answers if answer.status != Status.OK]
        t.expect(not bad, f"{len(bad)} of 30 are answered with {bad[:1]}")


def _short(name: str, request: wire.Request, t: IommuTrial) -> None:
    t.begin()
    (endpoint,) = t.endpoints()
    if name != "ATTACH":
        t.attach(endpoint)
    if isinstance(request, wire.Probe):
        t.need(wire.F_PROBE, "PROBE")
    whole = wire.pack(request)
    for length in (4, 5, len(whole) // 2, len(whole) - 1):
        answer = t.raw(whole[:length], _room(t, request))
        if answer.written:
            t.expect(
                answer.status != Status.OK, f"{length} of {len(whole)} bytes are answered with OK"
            )
            t.reject(f"{length} of {len(whole)} bytes are answered with {answer}")
        if answer.written is None:
            t.reject(str(answer))
        t.expect(set(answer.data) <= {0xAA}, "the buffer is written, with used length 0")


for _request in _ALL:
    _kind = type(_request).__name__.upper()
    hostile(
        f"request.short-{_kind}",
        _PARSING,
        f"A request that is shorter than {_kind} is given back with nothing written.",
    )(partial(_short, _kind, _request))


@hostile("request.no-tail", _PARSING, "A request without room for a status is given back.")
def _no_tail(t: IommuTrial) -> None:
    t.begin()
    for room in (0, 1, 3):
        answer = t.raw(wire.pack(wire.Detach(DOMAIN, t.absent_endpoint())), room)
        if answer.written is None:
            t.reject(f"with room for {room} bytes: {answer}")
        t.expect(answer.written == 0, f"{answer.written} bytes are written to {room}")


@hostile("request.no-head", _PARSING, "A request of fewer bytes than its head is given back.")
def _no_head(t: IommuTrial) -> None:
    t.begin()
    for length in (1, 3):
        answer = t.raw(b"\2\0\0"[:length], TAIL)
        if answer.written is None:
            t.reject(f"{length} bytes: {answer}")
        t.expect(answer.status != Status.OK, f"{length} bytes are answered with OK")


@hostile("request.nothing-readable", _PARSING, "A request of writable bytes alone is given back.")
def _nothing(t: IommuTrial) -> None:
    t.begin()
    answer = t.raw(b"", 64)
    if answer.written is None:
        t.reject(str(answer))
    t.expect(answer.status != Status.OK, "answered with OK")


@hostile("request.too-long", _PARSING, "A request with more bytes than its type has does no harm.")
def _too_long(t: IommuTrial) -> None:
    t.begin()
    request = wire.pack(wire.Detach(DOMAIN, t.absent_endpoint())) + b"\xff" * 3000
    answer = t.raw(request, TAIL)
    if answer.written is None:
        t.reject(str(answer))
    t.expect(answer.status != Status.OK, "answered with OK")


@hostile("request.noise", _PARSING, "Random requests do no harm.")
def _noise(t: IommuTrial) -> None:
    t.begin()
    for _ in range(200):
        length = t.random.choice([0, 1, 4, 12, 20, 28, 36, 72, t.random.randrange(200)])
        request = bytearray(t.random.randbytes(length))
        if request:
            request[0] = t.random.choice([1, 2, 3, 5, 6, t.random.randrange(256)])
            if request[0] == wire.RequestType.UNMAP:
                # What a range without end does is `unmap.all` and `map.inverted`.
                request[0] = 7
        room = t.random.choice([0, 4, 4, 4, 516, t.random.randrange(600)])
        if not request and not room:
            continue
        if t.raw(bytes(request), room).written is None:
            t.begin()
