"""Split rings that keep the rules: framing, used entries, notifications, indirect tables."""

from __future__ import annotations

from typing import Final

from guestio.faults.catalogue import register, virtio
from guestio.faults.report import Severity
from guestio.faults.ring import INDIRECT, NEXT, WRITE, Buffer, Desc, Queue, encode_table, linked
from guestio.faults.trial import (
    ENTRIES,
    EVENT_IDX,
    IN_ORDER,
    INDIRECT_DESC,
    QUIET,
    Trial,
)

_SETTLE: Final = 0.03


def _pieces(total: int, cuts: list[int]) -> list[int]:
    """Cut so many bytes into pieces of the given lengths, and what remains."""
    out = []
    for cut in cuts:
        if total <= cut:
            break
        out.append(cut)
        total -= cut
    return [*out, total] if total else out


def _cut(data: bytes, lengths: list[int]) -> list[bytes]:
    out, at = [], 0
    for length in _pieces(len(data), lengths):
        out.append(data[at : at + length])
        at += length
    return out


def _framed(
    t: Trial,
    queue: Queue,
    read_cuts: list[int],
    write_cuts: list[int],
    *,
    indirect: bool = False,
    align: int = 16,
) -> Buffer:
    """Make an honest request, cut as told, and judge the answer."""
    request = t.request()
    buffer = queue.post(
        _cut(request.readable, read_cuts),
        _pieces(request.room, write_cuts),
        indirect=indirect,
        align=align,
    )
    queue.kick()
    done = queue.wait_one(t.patience)
    t.judge(queue, done)
    return buffer


@register("split.request", virtio("2.7.13"), "A buffer that is made available is used.")
def _request(t: Trial) -> None:
    t.serves(t.ready())


@register(
    "split.used-id", virtio("2.7.8"), "A used entry names the head of the chain that it is about."
)
def _used_id(t: Trial) -> None:
    queue = t.ready()
    for head in (40, 3, ENTRIES - 1):
        request = t.request()
        order = [head, *(each for each in range(10, 20) if each != head)]
        queue.post(
            [request.readable] if request.readable else [],
            [request.room] if request.room else [],
            order=order,
        )
        queue.kick()
        done = queue.wait_one(t.patience)
        t.expect(done.head == head, f"used {done.head}, not {head}")


@register(
    "split.used-once",
    virtio("2.7.8"),
    "Each buffer is used once.",
)
def _used_once(t: Trial) -> None:
    queue = t.ready()
    count = ENTRIES // 4
    t.serves(queue, count)
    queue.kick()
    t.expect(queue.stays_quiet(QUIET), "used a buffer again")
    t.expect(queue.used_index == count, f"the used index is {queue.used_index}, not {count}")


@register(
    "split.used-length-at-most",
    virtio("2.7.8"),
    "The length in a used entry is at most what the buffer has room for.",
)
def _length_at_most(t: Trial) -> None:
    queue = t.ready()
    for buffer in t.serves(queue, 4):
        t.expect(
            (buffer.written or 0) <= buffer.room, f"wrote {buffer.written} of {buffer.room} bytes"
        )


@register(
    "split.used-length-written",
    virtio("2.7.8.2"),
    "As many bytes as a used entry says were written, from the first writable one on.",
)
def _length_written(t: Trial) -> None:
    if not t.request().room:
        t.skip("requests of this queue have nothing to write")
    queue = t.ready()
    answers = []
    for fill in (0x00, 0xFF):
        request = t.request()
        buffer = queue.post(
            [request.readable] if request.readable else [], [request.room], publish=False
        )
        for address, length in buffer.writable:
            t.ram.write(address, bytes([fill]) * length)
        queue.publish(queue.offered)
        queue.kick()
        done = queue.wait_one(t.patience)
        answers.append((t.answer(queue, done)[: done.written], fill))
    (first, _), (second, _) = answers
    untouched = [
        at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a == 0x00 and b == 0xFF
    ]
    # Random bytes are either by chance, one in 65536 times; not many at a time.
    t.expect(
        len(untouched) < 3,
        f"says it wrote {len(first)} bytes, and {len(untouched)} of them are as they were",
    )


@register(
    "split.no-overrun",
    virtio("2.7.8"),
    "Nothing is written but the writable buffers and the used ring.",
)
def _no_overrun(t: Trial) -> None:
    queue = t.ready()
    t.post(queue, 8, kick=False)
    before = t.ram.snapshot()
    allowed = [each for buffer in queue.buffers.values() for each in buffer.writable]
    queue.kick()
    queue.wait(8, t.patience)
    at = t.ram.stray(before, [*allowed, (queue.used, 6 + 8 * queue.size)])
    t.expect(at is None, f"wrote to {at or 0:#x}, which is no writable buffer")


@register(
    "split.readable-kept",
    virtio("2.7.5.1"),
    "A readable buffer is not written.",
)
def _readable_kept(t: Trial) -> None:
    if not t.request().readable:
        t.skip("requests of this queue have nothing to read")
    queue = t.ready()
    for buffer in t.serves(queue, 4):
        for address, data in buffer.readable:
            t.expect(queue.ram.read(address, len(data)) == data, "wrote to a readable buffer")


@register(
    "split.table-kept",
    virtio("2.7.5.1"),
    "The descriptor table is not written.",
)
def _table_kept(t: Trial) -> None:
    queue = t.ready()
    t.post(queue, 6, kick=False)
    before = t.ram.read(queue.desc, 16 * queue.size)
    queue.kick()
    queue.wait(6, t.patience)
    t.expect(t.ram.read(queue.desc, 16 * queue.size) == before, "wrote to the descriptor table")


@register(
    "split.available-kept",
    virtio("2.7.6"),
    "The available ring, which the driver writes, is not written.",
)
def _available_kept(t: Trial) -> None:
    queue = t.ready()
    t.post(queue, 6, kick=False)
    before = t.ram.read(queue.avail, 6 + 2 * queue.size)
    queue.kick()
    queue.wait(6, t.patience)
    t.expect(t.ram.read(queue.avail, 6 + 2 * queue.size) == before, "wrote to the available ring")


@register(
    "split.used-flags",
    virtio("2.7.10.2"),
    "The flags of the used ring are 0 or 1.",
)
def _used_flags(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue, 5)
    t.expect(queue.used_flags <= 1, f"the used ring's flags are {queue.used_flags:#x}")


@register(
    "split.used-flags-event-idx",
    virtio("2.7.10.2"),
    "With EVENT_IDX the flags of the used ring are 0.",
)
def _used_flags_event(t: Trial) -> None:
    t.needs(features=EVENT_IDX)
    queue = t.ready(EVENT_IDX)
    t.serves(queue, 5)
    t.expect(queue.used_flags == 0, f"the used ring's flags are {queue.used_flags:#x}")


@register(
    "split.used-flags-obeyed",
    virtio("2.7.10.1"),
    "A driver that notifies when the used ring's flags are 0, and only then, is served.",
)
def _flags_obeyed(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue)
    for _ in range(100):
        (buffer,) = t.post(queue, kick=False)
        if queue.used_flags == 0:
            queue.kick()
        queue.wait(1, t.patience)
        del buffer


@register(
    "split.available-event-obeyed",
    virtio("2.7.10.1"),
    "With EVENT_IDX a driver that notifies at avail_event, and only then, is served.",
)
def _event_obeyed(t: Trial) -> None:
    t.needs(features=EVENT_IDX)
    queue = t.ready(EVENT_IDX)
    t.serves(queue)
    for round_ in range(100):
        before = queue.offered
        count = 1 + round_ % 5
        t.post(queue, count, kick=False)
        if (queue.offered - queue.avail_event - 1) & 0xFFFF < (queue.offered - before) & 0xFFFF:
            queue.kick()
        queue.wait(count, t.patience)


@register(
    "split.scattered-chain",
    virtio("2.7.5"),
    "A chain is followed by its next fields, in whatever order it lies in the table.",
)
def _scattered_chain(t: Trial) -> None:
    queue = t.ready()
    for _ in range(10):
        request = t.request()
        readable = _cut(request.readable, [5, 3])
        writable = _pieces(request.room, [7, 100])
        order = t.random.sample(range(queue.size), len(readable) + len(writable))
        queue.post(readable, writable, order=order)
        queue.kick()
        done = queue.wait_one(t.patience)
        t.judge(queue, done)


@register(
    "split.heads-in-any-order",
    virtio("2.7.6"),
    "The available ring may name heads in any order.",
)
def _heads_any(t: Trial) -> None:
    queue = t.ready()
    for head in t.random.sample(range(0, 32, 4), 8):
        request = t.request()
        queue.post(
            [request.readable] if request.readable else [],
            [request.room] if request.room else [],
            order=[head, head + 1, head + 2],
            publish=False,
        )
    queue.publish(queue.offered)
    queue.kick()
    for buffer in queue.wait(8, t.patience):
        t.judge(queue, buffer)


@register(
    "split.full-ring",
    virtio("2.7.13"),
    "A ring in which every descriptor is in use is served whole.",
)
def _full_ring(t: Trial) -> None:
    queue = t.ready()
    request = t.request()
    each = bool(request.readable) + bool(request.room)
    for _ in range(4):
        t.serves(queue, queue.size // each)


@register(
    "split.around-the-ring",
    virtio("2.7.6"),
    "Both rings are used round and round.",
)
def _around(t: Trial) -> None:
    queue = t.ready(size=8)
    for _ in range(30):
        t.serves(queue, 3)


@register(
    "split.one-publication",
    virtio("2.7.13.3"),
    "Buffers that are made available one by one behind a single notification are all used.",
)
def _one_publication(t: Trial) -> None:
    queue = t.ready()
    t.post(queue)
    t.post(queue, 9, kick=False)
    queue.kick()
    for buffer in queue.wait(10, t.patience):
        t.judge(queue, buffer)


@register(
    "split.in-order",
    virtio("6.2"),
    "With IN_ORDER buffers are used in the order in which they were made available.",
)
def _in_order(t: Trial) -> None:
    t.needs(features=IN_ORDER)
    queue = t.ready(IN_ORDER)
    posted: list[int] = []
    for _ in range(20):
        request = t.request()
        start = 3 * len(posted)
        posted.append(
            queue.post(
                [request.readable] if request.readable else [],
                [request.room] if request.room else [],
                order=[start, start + 1, start + 2],
                publish=False,
            ).head
        )
    queue.publish(queue.offered)
    queue.kick()
    last = posted[-1]
    done: list[int] = []
    while last not in done:
        if queue.outcome(t.patience) != "used":
            t.fail(f"used {len(done)} of {len(posted)} requests")
        done += [entry.id for entry in queue.take_used()]
    # One entry may stand for all those before it.
    rest = iter(posted)
    t.expect(all(head in rest for head in done), f"used {done} where {posted} were available")


# Framing


@register(
    "framing.header-in-bytes",
    virtio("2.7.4.1"),
    "What the device reads may be cut into descriptors of one byte.",
)
def _bytes(t: Trial) -> None:
    request = t.request()
    if len(request.readable) < 2:
        t.skip("requests of this queue have too little to read")
    _framed(t, t.ready(size=128), [1] * min(len(request.readable) - 1, 60), [])


@register(
    "framing.answer-in-pieces",
    virtio("2.7.4.1"),
    "What the device writes may be cut into descriptors anywhere.",
)
def _answer_pieces(t: Trial) -> None:
    if t.request().room < 2:
        t.skip("requests of this queue have too little to write")
    _framed(t, t.ready(), [], [1, 2, 3, 5, 7, 11])


@register(
    "framing.answer-in-one",
    virtio("2.7.4.1"),
    "What the device writes may be one descriptor.",
)
def _answer_one(t: Trial) -> None:
    _framed(t, t.ready(), [], [])


@register(
    "framing.random",
    virtio("2.7.4.1"),
    "Twenty requests, cut at random, are served.",
)
def _random(t: Trial) -> None:
    queue = t.ready()
    for _ in range(20):
        reads = [t.random.randrange(1, 17) for _ in range(t.random.randrange(6))]
        writes = [t.random.choice([1, 3, 511, 512]) for _ in range(t.random.randrange(6))]
        _framed(t, queue, reads, writes, align=t.random.choice([1, 2, 16]))


@register(
    "framing.unaligned",
    virtio("2.7"),
    "Buffers need no alignment; only the parts of the ring have one.",
)
def _unaligned(t: Trial) -> None:
    queue = t.ready()
    t.ram.take(1, 1)
    for _ in range(6):
        _framed(t, queue, [], [], align=1)
        t.ram.take(1 + t.random.randrange(8), 1)


@register(
    "framing.across-pages",
    virtio("2.7.4.1"),
    "A buffer may cross pages.",
)
def _across_pages(t: Trial) -> None:
    queue = t.ready()
    for _ in range(4):
        page = t.ram.take(8192, 4096)
        del page
        t.ram.take(4096 - 64 - 5, 4096)
        _framed(t, queue, [], [], align=1)


@register(
    "framing.long-chain",
    virtio("2.7.4.1"),
    "A chain of half the ring's size is served, or refused as being too long.",
    severity=Severity.SHOULD,
)
def _long_chain(t: Trial) -> None:
    room = t.request().room
    if room < ENTRIES:
        t.skip("requests of this queue have too little to write")
    _framed(t, t.ready(), [], [1] * (ENTRIES // 2 - 2))


# Notifications


@register(
    "notify.used",
    virtio("2.7.7.2"),
    "With flags 0 a used buffer is notified.",
)
def _notify(t: Trial) -> None:
    queue = t.ready()
    for _ in range(5):
        t.serves(queue)
        t.expect(queue.called(t.patience), "used a buffer and sent no notification")


@register(
    "notify.used-event-ignored",
    virtio("2.7.7.2"),
    "Without EVENT_IDX used_event is ignored.",
)
def _event_ignored(t: Trial) -> None:
    queue = t.ready()
    queue.set_used_event(0x7000)
    t.serves(queue)
    t.expect(queue.called(t.patience), "goes by used_event although EVENT_IDX is not negotiated")


@register(
    "notify.suppressed",
    virtio("2.7.7.2"),
    "With flags 1 no notification is sent.",
    severity=Severity.SHOULD,
)
def _suppressed(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue)
    # A notification may be sent when the call descriptor is set.
    queue.called(_SETTLE)
    queue.set_avail_flags(1)
    t.serves(queue, 5)
    t.expect(not queue.called(_SETTLE), "sent a notification although flags are 1")


@register(
    "notify.after-suppression",
    virtio("2.7.7.2"),
    "Notifications that were suppressed are sent again when flags are 0.",
)
def _after_suppression(t: Trial) -> None:
    queue = t.ready()
    queue.set_avail_flags(1)
    t.serves(queue, 3)
    queue.called(_SETTLE)
    queue.set_avail_flags(0)
    t.serves(queue)
    t.expect(queue.called(t.patience), "sends no notification after flags were 1 once")


@register(
    "notify.event-idx",
    virtio("2.7.7.2"),
    "With EVENT_IDX the buffer at used_event is notified.",
)
def _event_idx(t: Trial) -> None:
    t.needs(features=EVENT_IDX)
    queue = t.ready(EVENT_IDX)
    for _ in range(5):
        queue.set_used_event(queue.used_index)
        t.serves(queue)
        t.expect(queue.called(t.patience), "passed used_event and sent no notification")


@register(
    "notify.event-idx-in-batch",
    virtio("2.7.7.2"),
    "With EVENT_IDX several buffers at once are notified if used_event is among them.",
)
def _event_batch(t: Trial) -> None:
    t.needs(features=EVENT_IDX)
    queue = t.ready(EVENT_IDX)
    for _ in range(5):
        queue.set_used_event(queue.used_index + 3)
        t.serves(queue, 8)
        t.expect(queue.called(t.patience), "passed used_event and sent no notification")


@register(
    "notify.event-idx-suppressed",
    virtio("2.7.7.2"),
    "With EVENT_IDX other buffers are not notified.",
    severity=Severity.SHOULD,
)
def _event_suppressed(t: Trial) -> None:
    t.needs(features=EVENT_IDX)
    queue = t.ready(EVENT_IDX)
    t.serves(queue)
    queue.called(_SETTLE)
    queue.set_used_event(queue.used_index + 100)
    t.serves(queue, 5)
    t.expect(not queue.called(_SETTLE), "sent a notification far from used_event")


@register(
    "notify.event-idx-flags-ignored",
    virtio("2.7.7.2"),
    "With EVENT_IDX the flags of the available ring are ignored.",
)
def _event_flags(t: Trial) -> None:
    t.needs(features=EVENT_IDX)
    queue = t.ready(EVENT_IDX)
    queue.set_avail_flags(1)
    queue.set_used_event(queue.used_index)
    t.serves(queue)
    t.expect(queue.called(t.patience), "goes by flags although EVENT_IDX is negotiated")


@register(
    "notify.event-idx-wraps",
    virtio("2.7.7.2"),
    "With EVENT_IDX notifications go on when the indices pass 65535.",
)
def _event_wraps(t: Trial) -> None:
    t.needs(features=EVENT_IDX)
    queue = t.ready(EVENT_IDX, base=65533)
    for _ in range(6):
        queue.set_used_event(queue.used_index)
        t.serves(queue)
        t.expect(queue.called(t.patience), f"sent no notification at {queue.used_index}")


# Indirect tables


def _indirect_queue(t: Trial) -> Queue:
    t.needs(features=INDIRECT_DESC)
    return t.ready(INDIRECT_DESC)


@register(
    "indirect.whole",
    virtio("2.7.5.3"),
    "A request in an indirect table is served.",
)
def _indirect_whole(t: Trial) -> None:
    queue = _indirect_queue(t)
    for _ in range(3):
        _framed(t, queue, [4, 4], [9], indirect=True)


@register(
    "indirect.table-kept",
    virtio("2.7.5.1"),
    "An indirect table is not written.",
)
def _indirect_kept(t: Trial) -> None:
    queue = _indirect_queue(t)
    buffer = _framed(t, queue, [4], [9], indirect=True)
    assert buffer.table is not None
    address, table = buffer.table
    t.expect(t.ram.read(address, len(table)) == table, "wrote to an indirect table")


def _by_hand(t: Trial, queue: Queue, descriptors: list[Desc], buffer: Buffer) -> None:
    """Make a chain available that was written by hand, and judge the answer."""
    for at, each in enumerate(descriptors):
        queue.put(at, each)
    buffer.head, buffer.chain = 0, []
    queue.buffers[0] = buffer
    queue.offer(0)
    queue.kick()
    done = queue.wait_one(t.patience)
    t.judge(queue, done)


@register(
    "indirect.after-direct",
    virtio("2.7.5.3.2"),
    "Ordinary descriptors may be followed by one that refers to an indirect table.",
)
def _after_direct(t: Trial) -> None:
    queue = _indirect_queue(t)
    request = t.request()
    pieces, buffer = queue.lay_out(
        _cut(request.readable, [3]), _pieces(request.room, [max(request.room // 2, 1)])
    )
    if len(pieces) < 2:
        t.skip("requests of this queue have one piece")
    table = encode_table(linked(pieces[1:]))
    at = t.ram.place(table)
    first = pieces[0]
    _by_hand(
        t,
        queue,
        [
            Desc(first.address, first.length, first.flags | NEXT, 1),
            Desc(queue.device_address(at), len(table), INDIRECT),
        ],
        buffer,
    )


@register(
    "indirect.write-flag-ignored",
    virtio("2.7.5.3.2"),
    "The write flag of a descriptor that refers to an indirect table is ignored.",
)
def _write_flag(t: Trial) -> None:
    queue = _indirect_queue(t)
    request = t.request()
    pieces, buffer = queue.lay_out(
        [request.readable] if request.readable else [], [request.room] if request.room else []
    )
    table = encode_table(linked(pieces))
    at = t.ram.place(table)
    _by_hand(t, queue, [Desc(queue.device_address(at), len(table), INDIRECT | WRITE)], buffer)
    t.expect(t.ram.read(at, len(table)) == table, "wrote to an indirect table")


@register(
    "indirect.scattered",
    virtio("2.7.5.3"),
    "An indirect table is followed by its next fields, and may have unused entries.",
)
def _indirect_scattered(t: Trial) -> None:
    queue = _indirect_queue(t)
    request = t.request()
    pieces, buffer = queue.lay_out(
        _cut(request.readable, [2]), _pieces(request.room, [max(request.room // 2, 1)])
    )
    places = [0, 7, 3, 5, 1, 2][: len(pieces)]
    table = [Desc(0, 0)] * 8
    for position, (place, piece) in enumerate(zip(places, pieces, strict=True)):
        last = position + 1 == len(pieces)
        table[place] = Desc(
            piece.address,
            piece.length,
            piece.flags | (0 if last else NEXT),
            0 if last else places[position + 1],
        )
    data = encode_table(table)
    at = t.ram.place(data)
    _by_hand(t, queue, [Desc(queue.device_address(at), len(data), INDIRECT)], buffer)


@register(
    "indirect.unaligned-table",
    virtio("2.7.5.3"),
    "An indirect table may be anywhere in memory.",
)
def _unaligned_table(t: Trial) -> None:
    queue = _indirect_queue(t)
    request = t.request()
    pieces, buffer = queue.lay_out(
        [request.readable] if request.readable else [], [request.room] if request.room else []
    )
    table = encode_table(linked(pieces))
    at = t.ram.take(len(table) + 16) + 4
    t.ram.write(at, table)
    _by_hand(t, queue, [Desc(queue.device_address(at), len(table), INDIRECT)], buffer)
