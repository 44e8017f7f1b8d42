"""Block devices."""

from __future__ import annotations

import struct
from functools import partial
from typing import Final

from guestio.faults.catalogue import hostile, register, virtio
from guestio.faults.checks.config import fields, read
from guestio.faults.kinds import SECTOR, blk_header
from guestio.faults.outcomes import HungUpError, SilentError
from guestio.faults.report import Severity
from guestio.faults.ring import Queue
from guestio.faults.trial import QUIET, Trial
from guestio.vhost_user.messages import FrontendRequest, ProtocolFeature

_F = FrontendRequest
_IN, _OUT, _FLUSH, _GET_ID, _LIFETIME = 0, 1, 4, 8, 10
_DISCARD, _WRITE_ZEROES, _SECURE_ERASE = 11, 13, 14
_OK, _IOERR, _UNSUPP = 0, 1, 2
_RO, _BLK_SIZE, _FLUSH_F, _MQ = 1 << 5, 1 << 6, 1 << 9, 1 << 12
_DISCARD_F, _ZEROES_F, _LIFETIME_F, _ERASE_F = 1 << 13, 1 << 14, 1 << 15, 1 << 16
_ZONED_F: Final = 1 << 17
_OPERATION: Final = virtio("5.2.6.2")
_REQUEST: Final = virtio("5.2.6")
_SEGMENT: Final = struct.Struct("<QII")
_BLK: Final = ("blk",)


def _do(
    t: Trial,
    queue: Queue,
    kind: int,
    sector: int = 0,
    *,
    data: bytes = b"",
    room: int = 0,
) -> tuple[int, bytes]:
    """Make one request; its status and what was read."""
    buffer = queue.post(
        [blk_header(kind, sector), *([data] if data else [])], [*([room] if room else []), 1]
    )
    queue.kick()
    done = queue.wait_one(t.patience)
    answer = t.answer(queue, done)
    del buffer
    return answer[-1], answer[:-1]


def _read(t: Trial, queue: Queue, sector: int, sectors: int = 1) -> bytes:
    status, data = _do(t, queue, _IN, sector, room=sectors * SECTOR)
    t.expect(status == _OK, f"reading sector {sector} has status {status}")
    return data


def _capacity(t: Trial) -> int:
    return int.from_bytes(fields(t, 8), "little")


def _status(t: Trial, got: int, *wanted: int, what: str) -> None:
    names = {0: "OK", 1: "IOERR", 2: "UNSUPP"}
    t.expect(
        got in wanted,
        f"{what} has status {names.get(got, got)}, not "
        f"{' or '.join(names[each] for each in wanted)}",
    )


@register(
    "blk.capacity", virtio("5.2.4"), "The capacity says how many sectors there are.", devices=_BLK
)
def _has_capacity(t: Trial) -> None:
    sectors = _capacity(t)
    t.expect(0 < sectors < 1 << 55, f"the capacity is {sectors} sectors")


@register(
    "blk.block-size",
    virtio("5.2.4"),
    "The block size is a power of two, 512 or more.",
    devices=_BLK,
)
def _block_size(t: Trial) -> None:
    t.needs(features=_BLK_SIZE)
    size = int.from_bytes(fields(t, 60)[20:24], "little")
    t.expect(size >= 512 and size & size - 1 == 0, f"the block size is {size}")


@register("blk.padding", virtio("5.2.5.2"), "unused0 and unused1 are 0.", devices=_BLK)
def _padding(t: Trial) -> None:
    space = fields(t, 60)
    t.expect(space[33] == 0, f"unused0 is {space[33]}")
    t.expect(space[57:60] == bytes(3), f"unused1 is {space[57:60].hex()}")


@register(
    "blk.flush-offered",
    virtio("5.2.5.2"),
    "FLUSH is offered.",
    severity=Severity.SHOULD,
    devices=_BLK,
)
def _flush_offered(t: Trial) -> None:
    t.expect(bool(t.offered() & _FLUSH_F), "VIRTIO_BLK_F_FLUSH is not offered")


@register("blk.queue-count", virtio("5.2.5"), "num_queues is the number of queues.", devices=_BLK)
def _queues(t: Trial) -> None:
    t.needs(features=_MQ, protocol=ProtocolFeature.MQ)
    count = int.from_bytes(fields(t, 60)[34:36], "little")
    queues = t.link.u64(_F.GET_QUEUE_NUM)
    t.expect(1 <= count <= queues, f"num_queues is {count}, and GET_QUEUE_NUM says {queues}")


@register(
    "blk.discard-limits", virtio("5.2.5"), "With DISCARD there are limits to go by.", devices=_BLK
)
def _discard_limits(t: Trial) -> None:
    t.needs(features=_DISCARD_F)
    sectors, segments = struct.unpack_from("<II", fields(t, 60), 36)
    t.expect(sectors > 0 and segments > 0, f"discards have {sectors} sectors, {segments} segments")


@register(
    "blk.write-zeroes-limits",
    virtio("5.2.5"),
    "With WRITE_ZEROES there are limits to go by.",
    devices=_BLK,
)
def _zeroes_limits(t: Trial) -> None:
    t.needs(features=_ZEROES_F)
    sectors, segments = struct.unpack_from("<II", fields(t, 60), 48)
    t.expect(sectors > 0 and segments > 0, f"{sectors} sectors, {segments} segments")


@register("blk.read", _REQUEST, "A read fills its buffer and has status OK.", devices=_BLK)
def _reads(t: Trial) -> None:
    queue = t.ready()
    first = _read(t, queue, 0, 8)
    t.expect(_read(t, queue, 0, 8) == first, "reads different data from the same sectors")


@register("blk.read-parts", _REQUEST, "A sector reads as it does among others.", devices=_BLK)
def _read_parts(t: Trial) -> None:
    queue = t.ready()
    if _capacity_of(t) < 8:
        t.skip("the disk is too small")
    whole = _read(t, queue, 0, 8)
    for sector in range(8):
        part = _read(t, queue, sector)
        t.expect(
            part == whole[sector * SECTOR :][:SECTOR], f"sector {sector} reads otherwise alone"
        )


def _capacity_of(t: Trial) -> int:
    """The capacity, on a connection that is in use; a disk without CONFIG is large enough."""
    if not t.link.protocol & ProtocolFeature.CONFIG:
        return 1 << 11
    return int.from_bytes(read(t, 0, 8), "little")


@register(
    "blk.read-last", virtio("5.2.4"), "The last sector of the capacity can be read.", devices=_BLK
)
def _read_last(t: Trial) -> None:
    t.needs(protocol=ProtocolFeature.CONFIG)
    queue = t.ready()
    _read(t, queue, _capacity_of(t) - 1)


@register(
    "blk.large-read",
    _REQUEST,
    "A read of 128 KiB is served.",
    severity=Severity.SHOULD,
    devices=_BLK,
)
def _large(t: Trial) -> None:
    queue = t.ready()
    sectors = min(_capacity_of(t), 256)
    _read(t, queue, 0, sectors)


def _beyond(where: str, t: Trial) -> None:
    t.needs(protocol=ProtocolFeature.CONFIG)
    queue = t.ready()
    capacity = _capacity_of(t)
    sector = {
        "end": capacity,
        "last": capacity - 1,
        "wraps": (1 << 64) - 1,
        "bytes-wrap": 1 << 55,
    }[where]
    status, data = _do(t, queue, _IN, sector, room=2 * SECTOR)
    _status(t, status, _IOERR, _UNSUPP, what=f"reading sector {sector:#x} of {capacity:#x}")
    del data


for _where, _text in (
    ("end", "behind the last sector"),
    ("last", "that begins with the last sector and goes on"),
    ("wraps", "of the last sector of all"),
    ("bytes-wrap", "whose byte offset passes 2^64"),
):
    register(
        f"blk.beyond-{_where}",
        _REQUEST,
        f"A read {_text} has an error status.",
        devices=_BLK,
    )(partial(_beyond, _where))


@register(
    "blk.odd-length",
    _REQUEST,
    "A read that is no multiple of 512 bytes has an error status.",
    devices=_BLK,
)
def _odd_length(t: Trial) -> None:
    queue = t.ready()
    status, _ = _do(t, queue, _IN, 0, room=100)
    _status(t, status, _IOERR, _UNSUPP, what="reading 100 bytes")


@register(
    "blk.status-alone", _REQUEST, "The status may have a descriptor of its own.", devices=_BLK
)
def _status_alone(t: Trial) -> None:
    queue = t.ready()
    t.expect(len(_read(t, queue, 0)) == SECTOR, "read nothing")


@register(
    "blk.status-with-data",
    virtio("2.7.4.1"),
    "The status may be in the descriptor of the data.",
    devices=_BLK,
)
def _status_with_data(t: Trial) -> None:
    queue = t.ready()
    alone = _read(t, queue, 0)
    queue.post([blk_header(_IN)], [SECTOR + 1])
    queue.kick()
    done = queue.wait_one(t.patience)
    answer = t.answer(queue, done)
    t.expect(answer[-1] == _OK, f"the status is {answer[-1]}")
    t.expect(answer[:-1] == alone, "reads otherwise with the status behind the data")


@register(
    "blk.used-length",
    virtio("2.7.8"),
    "A read's used length is that of the data and the status.",
    severity=Severity.SHOULD,
    devices=_BLK,
)
def _used_length(t: Trial) -> None:
    queue = t.ready()
    (done,) = t.serves(queue)
    t.expect(done.written == SECTOR + 1, f"says it wrote {done.written} of {SECTOR + 1} bytes")


@register("blk.flush", _REQUEST, "A flush has status OK where FLUSH is offered.", devices=_BLK)
def _flush(t: Trial) -> None:
    t.needs(features=_FLUSH_F)
    queue = t.ready(_FLUSH_F)
    status, _ = _do(t, queue, _FLUSH)
    _status(t, status, _OK, what="a flush")


@register(
    "blk.get-id",
    _REQUEST,
    "GET_ID gives 20 bytes of ASCII, NUL-padded.",
    severity=Severity.SHOULD,
    devices=_BLK,
)
def _get_id(t: Trial) -> None:
    queue = t.ready()
    status, data = _do(t, queue, _GET_ID, room=20)
    _status(t, status, _OK, _UNSUPP, what="GET_ID")
    if status == _UNSUPP:
        t.reject("GET_ID is not supported")
    text, _, rest = data.partition(b"\0")
    t.expect(text.isascii(), f"the id {data!r} is not ASCII")
    t.expect(not rest.strip(b"\0"), f"the id {data!r} is not padded with NUL")


def _unsupported(kind: int, t: Trial) -> None:
    queue = t.ready()
    status, _ = _do(t, queue, kind, room=64)
    _status(t, status, _UNSUPP, what=f"a request of type {kind}")


for _label, _kind in (("unknown", 99), ("huge", 0xFFFF_FFFF), ("legacy-scsi", 2)):
    register(
        f"blk.type-{_label}",
        _REQUEST,
        f"A request of type {_kind}, which does not exist, has status UNSUPP.",
        devices=_BLK,
    )(partial(_unsupported, _kind))


def _zone(kind: int, t: Trial) -> None:
    if t.offered() & _ZONED_F:
        t.skip("ZONED is offered")
    _unsupported(kind, t)


for _label, _kind in (
    ("append", 15),
    ("report", 16),
    ("open", 18),
    ("close", 20),
    ("finish", 22),
    ("reset", 24),
    ("reset-all", 26),
):
    register(
        f"blk.zone-{_label}",
        _OPERATION,
        f"Without ZONED negotiated a ZONE_{_label.upper().replace('-', '_')} has status UNSUPP.",
        devices=_BLK,
    )(partial(_zone, _kind))


def _not_offered(feature: int, kind: int, t: Trial) -> None:
    if t.offered() & feature:
        t.skip("the feature is offered")
    queue = t.ready()
    if kind == _LIFETIME:
        status, _ = _do(t, queue, kind, room=6)
    else:
        status, _ = _do(t, queue, kind, data=_SEGMENT.pack(0, 1, 0))
    _status(t, status, _UNSUPP, _IOERR, what=f"a request of type {kind}")


for _label, _feature, _kind in (
    ("discard", _DISCARD_F, _DISCARD),
    ("write-zeroes", _ZEROES_F, _WRITE_ZEROES),
    ("secure-erase", _ERASE_F, _SECURE_ERASE),
    ("lifetime", _LIFETIME_F, _LIFETIME),
):
    register(
        f"blk.{_label}-not-offered",
        _REQUEST,
        f"A {_label} request has an error status where its feature is not offered.",
        devices=_BLK,
    )(partial(_not_offered, _feature, _kind))


def _flags(feature: int, kind: int, flags: int, t: Trial) -> None:
    t.needs(features=feature)
    if t.writable and not t.offered() & _RO:
        t.reconnect()
        queue, before = _writing(t, feature)
        try:
            status, _ = _do(t, queue, kind, data=_SEGMENT.pack(0, 8, flags))
        finally:
            _restore(t, queue, before)
        _status(t, status, _UNSUPP, what=f"flags {flags:#x}")
        return
    # Beyond the disk, so that nothing is lost if it is carried out; that is an error as well.
    sector = _capacity(t)
    t.reconnect()
    queue = t.ready(feature)
    status, _ = _do(t, queue, kind, data=_SEGMENT.pack(sector, 1, flags))
    _status(t, status, _UNSUPP, _IOERR, what=f"flags {flags:#x}")


for _label, _feature, _kind, _value in (
    ("discard-unmap", _DISCARD_F, _DISCARD, 1),
    ("discard-flags", _DISCARD_F, _DISCARD, 2),
    ("write-zeroes-flags", _ZEROES_F, _WRITE_ZEROES, 2),
    ("secure-erase-flags", _ERASE_F, _SECURE_ERASE, 2),
):
    register(
        f"blk.{_label}",
        _OPERATION,
        f"A {_label.rpartition('-')[0]} with flags {_value} has status UNSUPP.",
        devices=_BLK,
    )(partial(_flags, _feature, _kind, _value))


def _range(feature: int, kind: int, t: Trial) -> None:
    t.needs(features=feature)
    sector = _capacity(t)
    t.reconnect()
    queue = t.ready(feature)
    for start, count in ((sector, 1), (sector - 1, 2), ((1 << 64) - 1, 1), (1 << 55, 0xFFFF_FFFF)):
        status, _ = _do(t, queue, kind, data=_SEGMENT.pack(start, count, 0))
        _status(t, status, _IOERR, _UNSUPP, what=f"{count} sectors from {start:#x}")


for _label, _feature, _kind in (
    ("discard", _DISCARD_F, _DISCARD),
    ("write-zeroes", _ZEROES_F, _WRITE_ZEROES),
):
    register(
        f"blk.{_label}-beyond",
        _REQUEST,
        f"A {_label} request beyond the capacity has an error status.",
        devices=_BLK,
    )(partial(_range, _feature, _kind))


# What writes


def _writable(t: Trial) -> None:
    if not t.writable:
        t.skip("the disk is not to be written; allow it with --writable")


def _writing(t: Trial, features: int = 0) -> tuple[Queue, bytes]:
    """A ring of a disk that may be written, and what its first sectors hold."""
    _writable(t)
    if t.offered() & _RO:
        t.skip("the disk is read-only")
    queue = t.ready(features | _FLUSH_F)
    if _capacity_of(t) < 16:
        t.skip("the disk is too small")
    return queue, _read(t, queue, 0, 16)


def _restore(t: Trial, queue: Queue, before: bytes) -> None:
    status, _ = _do(t, queue, _OUT, 0, data=before)
    t.expect(status == _OK, "cannot write back what was on the disk")


@register("blk.write", _REQUEST, "What was written is read.", devices=_BLK)
def _write(t: Trial) -> None:
    queue, before = _writing(t)
    data = t.random.randbytes(16 * SECTOR)
    try:
        status, _ = _do(t, queue, _OUT, 0, data=data)
        _status(t, status, _OK, what="a write")
        t.expect(_read(t, queue, 0, 16) == data, "reads something else than was written")
    finally:
        _restore(t, queue, before)


@register(
    "blk.write-in-place",
    _REQUEST,
    "A write changes the sectors that it names, and no others.",
    devices=_BLK,
)
def _in_place(t: Trial) -> None:
    queue, before = _writing(t)
    data = t.random.randbytes(2 * SECTOR)
    try:
        status, _ = _do(t, queue, _OUT, 5, data=data)
        _status(t, status, _OK, what="a write")
        wanted = before[: 5 * SECTOR] + data + before[7 * SECTOR :]
        t.expect(_read(t, queue, 0, 16) == wanted, "a write of sectors 5 and 6 changed others")
    finally:
        _restore(t, queue, before)


@register(
    "blk.write-survives",
    _OPERATION,
    "What was written and flushed is there for the next front-end.",
    devices=_BLK,
)
def _survives(t: Trial) -> None:
    queue, before = _writing(t)
    data = t.random.randbytes(16 * SECTOR)
    try:
        _do(t, queue, _OUT, 0, data=data)
        if t.link.features & _FLUSH_F:
            _do(t, queue, _FLUSH)
        t.reconnect()
        queue = t.ready(_FLUSH_F)
        t.expect(_read(t, queue, 0, 16) == data, "lost what was written and flushed")
    finally:
        _restore(t, queue, before)


@register(
    "blk.write-beyond", _REQUEST, "A write beyond the capacity has an error status.", devices=_BLK
)
def _write_beyond(t: Trial) -> None:
    _writable(t)
    t.needs(protocol=ProtocolFeature.CONFIG)
    queue = t.ready()
    capacity = _capacity_of(t)
    for sector in (capacity, 1 << 55, (1 << 64) - 1):
        status, _ = _do(t, queue, _OUT, sector, data=bytes(SECTOR))
        _status(t, status, _IOERR, _UNSUPP, what=f"writing sector {sector:#x} of {capacity:#x}")


@register(
    "blk.write-disabled",
    "vhost-user Ring states",
    "A disabled ring has no effects: a write of it does not reach the disk.",
    devices=_BLK,
)
def _write_disabled(t: Trial) -> None:
    queue, before = _writing(t)
    if not t.link.features >> 30 & 1:
        t.skip("protocol features are not offered")
    queue.enable(0)
    queue.post([blk_header(_OUT), bytes(b ^ 0xFF for b in before[:SECTOR])], [1])
    queue.kick()
    queue.outcome(QUIET)
    t.reconnect()
    queue = t.ready()
    after = _read(t, queue, 0, 16)
    if after != before:
        _restore(t, queue, before)
        t.fail("wrote to the disk by a ring that is disabled")


@register(
    "blk.write-zeroes",
    _OPERATION,
    "After WRITE_ZEROES the sectors read as zeroes, with unmap and without it.",
    devices=_BLK,
)
def _zeroes(t: Trial) -> None:
    t.needs(features=_ZEROES_F)
    queue, before = _writing(t, _ZEROES_F)
    try:
        for unmap in (0, 1):
            data = t.random.randbytes(16 * SECTOR)
            _do(t, queue, _OUT, 0, data=data)
            status, _ = _do(t, queue, _WRITE_ZEROES, data=_SEGMENT.pack(2, 4, unmap))
            _status(t, status, _OK, what="WRITE_ZEROES")
            wanted = data[: 2 * SECTOR] + bytes(4 * SECTOR) + data[6 * SECTOR :]
            t.expect(_read(t, queue, 0, 16) == wanted, "WRITE_ZEROES left other data")
    finally:
        _restore(t, queue, before)


@register(
    "blk.discard", _OPERATION, "A discard has status OK, and spares other sectors.", devices=_BLK
)
def _discard(t: Trial) -> None:
    t.needs(features=_DISCARD_F)
    queue, before = _writing(t, _DISCARD_F)
    try:
        status, _ = _do(t, queue, _DISCARD, data=_SEGMENT.pack(8, 8, 0))
        _status(t, status, _OK, what="a discard")
        t.expect(_read(t, queue, 0, 8) == before[: 8 * SECTOR], "a discard changed other sectors")
    finally:
        _restore(t, queue, before)


@register(
    "blk.read-only-kept",
    _OPERATION,
    "A write to a read-only disk has status IOERR, and writes nothing.",
    devices=_BLK,
)
def _read_only(t: Trial) -> None:
    t.needs(features=_RO)
    queue = t.ready(_RO)
    before = _read(t, queue, 0)
    status, _ = _do(t, queue, _OUT, 0, data=bytes(b ^ 0xFF for b in before))
    _status(t, status, _IOERR, what="a write")
    t.expect(_read(t, queue, 0) == before, "wrote to a read-only disk")


@hostile(
    "blk.short-header",
    virtio("5.2.6.1"),
    "A request that is shorter than its header has an error status, or is refused.",
    devices=_BLK,
)
def _short_header(t: Trial) -> None:
    for length in (1, 8, 15):
        t.reconnect()
        queue = t.ready()
        buffer = queue.post([blk_header(_IN)[:length]], [SECTOR, 1], publish=False)
        queue.publish(queue.offered)
        t.remember()
        queue.kick()
        outcome = queue.outcome(t.reaction)
        if outcome == "used":
            done = queue.wait_one(t.patience)
            status = t.answer(queue, done)[-1]
            t.expect(status != _OK, f"a request of {length} bytes has status OK")
        elif outcome == "closed":
            t.reject("closed the connection")
        else:
            t.aftermath(queue, buffer.writable, [buffer.head], seconds=0)


@hostile(
    "blk.no-status",
    virtio("5.2.6.1"),
    "A request without room for a status is used or refused; nothing is written elsewhere.",
    devices=_BLK,
)
def _no_status(t: Trial) -> None:
    queue = t.ready()
    buffer = queue.post([blk_header(_FLUSH)], [], publish=False)
    queue.publish(queue.offered)
    t.remember()
    queue.kick()
    t.aftermath(queue, [], [buffer.head])


@hostile(
    "blk.too-many-segments",
    _OPERATION,
    "A discard of a thousand segments has an error status, or is carried out.",
    devices=_BLK,
)
def _segments(t: Trial) -> None:
    t.needs(features=_DISCARD_F)
    sector = _capacity(t)
    t.reconnect()
    queue = t.ready(_DISCARD_F)
    status, _ = _do(t, queue, _DISCARD, data=_SEGMENT.pack(sector, 1, 0) * 1000)
    _status(t, status, _IOERR, _UNSUPP, what="a discard of 1000 segments")


@hostile(
    "blk.segment-odd",
    _REQUEST,
    "A discard whose data is no whole segment has an error status.",
    devices=_BLK,
)
def _segment_odd(t: Trial) -> None:
    t.needs(features=_DISCARD_F)
    sector = _capacity(t)
    t.reconnect()
    queue = t.ready(_DISCARD_F)
    status, _ = _do(t, queue, _DISCARD, data=_SEGMENT.pack(sector, 1, 0)[:9])
    _status(t, status, _IOERR, _UNSUPP, what="a discard of 9 bytes")


@register(
    "blk.many",
    _REQUEST,
    "Requests of several types at a time are each answered as on their own.",
    devices=_BLK,
)
def _many(t: Trial) -> None:
    queue = t.ready(size=128)
    first = _read(t, queue, 0)
    for _ in range(8):
        buffers = {}
        for number in range(24):
            kind = (_IN, _GET_ID, 99)[number % 3]
            room = {_IN: SECTOR, _GET_ID: 20, 99: 1}[kind]
            buffer = queue.post([blk_header(kind)], [room, 1], publish=False)
            buffers[buffer.head] = kind
        queue.publish(queue.offered)
        queue.kick()
        for done in queue.wait(24, t.patience):
            kind, answer = buffers[done.head], t.answer(queue, done)
            if kind == _IN:
                t.expect(answer == first + b"\0", "a read among others reads otherwise")
            elif kind == 99:
                t.expect(answer[-1] == _UNSUPP, f"an unknown request has status {answer[-1]}")


@register(
    "blk.stop-under-load",
    "vhost-user GET_VRING_BASE",
    "A disk that is stopped under load and started again loses and repeats nothing.",
    devices=_BLK,
)
def _load(t: Trial) -> None:
    queue = t.ready(size=256)
    total = 0
    for _ in range(8):
        t.post(queue, 60)
        try:
            base = queue.stop()
        except (SilentError, HungUpError) as outcome:
            t.fail(f"under load: {outcome}")
        total += len([queue.settle(entry) for entry in queue.take_used()])
        queue.restart(base)
        queue.kick()
        rest = queue.offered - queue.seen & 0xFFFF
        total += len(queue.wait(rest, t.patience))
    t.expect(total == 480, f"used {total} of 480 requests")
