"""Split rings that break the rules: none may reach other memory, or end the back-end."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Final

from guestio.faults.catalogue import hostile, user, virtio
from guestio.faults.outcomes import HungUpError
from guestio.faults.ring import INDIRECT, NEXT, WRITE, Desc, Queue, encode_table, linked
from guestio.faults.trial import INDIRECT_DESC, QUIET, Trial
from guestio.vhost_user.messages import FrontendRequest, MemoryTable

_F = FrontendRequest
_LAST: Final = (1 << 64) - 1
_NOWHERE: Final = 0x40_0000_0000

Make = Callable[[Trial, Queue], list[Desc]]


def _honest(t: Trial, queue: Queue) -> list[Desc]:
    """The descriptors of an honest request, one after the other in the table, from entry 0."""
    request = t.request()
    pieces, buffer = queue.lay_out(
        [request.readable] if request.readable else [], [request.room] if request.room else []
    )
    buffer.head = 0
    queue.buffers[0] = buffer
    return linked(pieces)


def _offer(t: Trial, queue: Queue, descriptors: list[Desc]) -> None:
    """Make a chain that begins with entry 0 available, and look at what comes of it."""
    for at, each in enumerate(descriptors[: queue.size]):
        queue.put(at, each)
    allowed = [
        (each.address - queue.shift, min(each.length, t.ram.size))
        for each in descriptors
        if each.flags & WRITE and not each.flags & INDIRECT
    ]
    buffer = queue.buffers.get(0)
    if buffer is not None:
        allowed += buffer.writable
    t.remember()
    queue.offer(0)
    queue.kick()
    t.aftermath(queue, allowed, [0])


def _chain(make: Make, features: int, t: Trial) -> None:
    if features:
        t.needs(features=features)
    queue = t.ready(features)
    _offer(t, queue, make(t, queue))


def _self_loop(t: Trial, queue: Queue) -> list[Desc]:
    first = _honest(t, queue)[0]
    return [Desc(first.address, first.length, first.flags | NEXT, 0)]


def _long_loop(t: Trial, queue: Queue) -> list[Desc]:
    at = queue.device_address(t.ram.take(16))
    return [Desc(at, 1, NEXT, (number + 1) % queue.size) for number in range(queue.size)]


def _next_out_of_range(t: Trial, queue: Queue) -> list[Desc]:
    first = _honest(t, queue)[0]
    return [Desc(first.address, first.length, first.flags | NEXT, queue.size)]


def _next_far(t: Trial, queue: Queue) -> list[Desc]:
    first = _honest(t, queue)[0]
    return [Desc(first.address, first.length, first.flags | NEXT, 0xFFFF)]


def _writable(address: int, length: int) -> Make:
    """An honest request whose last descriptor is replaced by this one."""

    def make(t: Trial, queue: Queue) -> list[Desc]:
        pieces = _honest(t, queue)
        flags = pieces[-1].flags & WRITE
        return [*pieces[:-1], Desc(address, length, flags)]

    return make


def _past_the_end(t: Trial, queue: Queue) -> list[Desc]:
    pieces = _honest(t, queue)
    last = pieces[-1]
    end = queue.device_address(t.ram.end)
    return [*pieces[:-1], Desc(end - max(last.length // 2, 1), last.length + 1, last.flags)]


def _fixed(*descriptors: Desc) -> Make:
    """The same chain for every device."""
    return lambda _t, _queue: list(descriptors)


def _write_then_read(t: Trial, queue: Queue) -> list[Desc]:
    room, data = t.ram.take(513), t.ram.place(bytes(16))
    return [
        Desc(queue.device_address(room), 513, WRITE | NEXT, 1),
        Desc(queue.device_address(data), 16),
    ]


def _empty_descriptor(t: Trial, queue: Queue) -> list[Desc]:
    pieces = _honest(t, queue)
    first = pieces[0]
    return linked(
        [Desc(first.address, 0, first.flags & WRITE)]
        + [Desc(each.address, each.length, each.flags & WRITE) for each in pieces]
    )


def _only_empty(t: Trial, queue: Queue) -> list[Desc]:
    return [Desc(queue.device_address(t.ram.take(16)), 0)]


def _only_empty_writable(t: Trial, queue: Queue) -> list[Desc]:
    return [Desc(queue.device_address(t.ram.take(16)), 0, WRITE)]


def _read_only(t: Trial, queue: Queue) -> list[Desc]:
    return [Desc(queue.device_address(t.ram.place(bytes(64))), 64)]


def _write_only(t: Trial, queue: Queue) -> list[Desc]:
    return [Desc(queue.device_address(t.ram.take(64)), 64, WRITE)]


def _one_byte(t: Trial, queue: Queue) -> list[Desc]:
    return [Desc(queue.device_address(t.ram.place(b"\0")), 1)]


def _one_byte_answer(t: Trial, queue: Queue) -> list[Desc]:
    return [Desc(queue.device_address(t.ram.take(1)), 1, WRITE)]


def _unknown_flags(t: Trial, queue: Queue) -> list[Desc]:
    return [
        Desc(each.address, each.length, each.flags | 0xFFF8, each.next)
        for each in _honest(t, queue)
    ]


def _four_gibibytes(t: Trial, queue: Queue) -> list[Desc]:
    # The same memory over and over: more bytes in all than a chain may have.
    at = queue.device_address(t.ram.start)
    pieces = _honest(t, queue)
    huge = [Desc(at, t.ram.size, WRITE) for _ in range(40)]
    return linked(
        [Desc(each.address, each.length, each.flags & WRITE) for each in pieces[:1]] + huge
    )


def _over_table(t: Trial, queue: Queue) -> list[Desc]:
    pieces = _honest(t, queue)
    last = pieces[-1]
    if not last.flags & WRITE:
        t.skip("requests of this queue have nothing to write")
    return [*pieces[:-1], Desc(queue.device_address(queue.desc), last.length, last.flags)]


# With indirect tables


def _refer(t: Trial, queue: Queue, table: bytes, length: int | None = None) -> list[Desc]:
    at = queue.device_address(t.ram.place(table))
    return [Desc(at, len(table) if length is None else length, INDIRECT)]


def _indirect(t: Trial, queue: Queue) -> list[Desc]:
    return _refer(t, queue, encode_table(_honest(t, queue)))


def _indirect_loop(t: Trial, queue: Queue) -> list[Desc]:
    at = queue.device_address(t.ram.take(16))
    return _refer(t, queue, encode_table([Desc(at, 1, NEXT, 1), Desc(at, 1, NEXT, 0)]))


def _indirect_next_out(t: Trial, queue: Queue) -> list[Desc]:
    first = _honest(t, queue)[0]
    return _refer(t, queue, encode_table([Desc(first.address, first.length, NEXT, 900)]))


def _nested(t: Trial, queue: Queue) -> list[Desc]:
    inner = _refer(t, queue, encode_table(_honest(t, queue)))
    return _refer(t, queue, encode_table(inner))


def _nested_in_itself(t: Trial, queue: Queue) -> list[Desc]:
    at = t.ram.take(16)
    inner = Desc(queue.device_address(at), 16, INDIRECT)
    t.ram.write(at, encode_table([inner]))
    return [inner]


def _indirect_and_next(t: Trial, queue: Queue) -> list[Desc]:
    (refer,) = _refer(t, queue, encode_table(_honest(t, queue)))
    more = queue.device_address(t.ram.take(16))
    return [Desc(refer.address, refer.length, INDIRECT | NEXT, 1), Desc(more, 16, WRITE)]


def _table_odd(t: Trial, queue: Queue) -> list[Desc]:
    return _refer(t, queue, encode_table(_honest(t, queue)) + bytes(16), 16 * 2 + 7)


def _table_empty(t: Trial, queue: Queue) -> list[Desc]:
    return _refer(t, queue, bytes(16), 0)


def _table_huge(t: Trial, queue: Queue) -> list[Desc]:
    return _refer(t, queue, encode_table(_honest(t, queue)), 0xFFFF_FFF0)


def _table_long(t: Trial, queue: Queue) -> list[Desc]:
    at = queue.device_address(t.ram.take(16))
    pieces = [Desc(at, 1) for _ in range(queue.size * 8)]
    pieces += [Desc(each.address, each.length, each.flags & WRITE) for each in _honest(t, queue)]
    return _refer(t, queue, encode_table(linked(pieces)))


_CHAINS: Final[tuple[tuple[str, str, str, Make], ...]] = (
    ("loop-of-one", "2.7.5.2", "A descriptor that leads to itself", _self_loop),
    ("loop-of-all", "2.7.5.2", "A chain that goes round the whole table", _long_loop),
    ("next-at-size", "2.7.5", "A next field that is the ring's size", _next_out_of_range),
    ("next-65535", "2.7.5", "A next field of 65535", _next_far),
    ("address-nowhere", "2.7.5", "A buffer outside of memory", _writable(_NOWHERE, 513)),
    ("address-zero", "2.7.5", "A buffer at address 0, where no memory is", _writable(0, 513)),
    ("address-last", "2.7.5", "A buffer at the last address of all", _writable(_LAST, 1)),
    ("address-wraps", "2.7.5", "A buffer that passes 2^64", _writable(_LAST - 255, 4096)),
    ("length-4-gib", "2.7.5", "A buffer of 4 GiB", _writable(1 << 20, 0xFFFF_FFFF)),
    ("length-past-end", "2.7.5", "A buffer that passes the end of memory", _past_the_end),
    (
        "readable-nowhere",
        "2.7.5",
        "A readable buffer outside of memory",
        _fixed(Desc(_NOWHERE, 16, NEXT, 1), Desc(_NOWHERE + 4096, 513, WRITE)),
    ),
    ("total-past-4-gib", "2.7.5.2", "A chain of more bytes than there is memory", _four_gibibytes),
    ("empty-piece", "2.7.5", "A chain that begins with a descriptor of 0 bytes", _empty_descriptor),
    ("empty-readable", "2.7.5", "A single readable descriptor of 0 bytes", _only_empty),
    ("empty-writable", "2.7.5", "A single writable descriptor of 0 bytes", _only_empty_writable),
    ("read-only", "2.7.4.2", "A request without room for an answer", _read_only),
    ("write-only", "2.7.4.2", "A request without anything to read", _write_only),
    ("one-byte", "2.7.4.2", "A request of one byte", _one_byte),
    ("one-byte-answer", "2.7.4.2", "Room for one byte, and nothing to read", _one_byte_answer),
    ("writable-first", "2.7.4.2", "A readable descriptor behind a writable one", _write_then_read),
    ("unknown-flags", "2.7.5", "Flags that are not defined", _unknown_flags),
    ("over-table", "2.7.5", "A writable buffer that is the descriptor table", _over_table),
    (
        "indirect-not-negotiated",
        "2.7.5.3.1",
        "An indirect table without INDIRECT_DESC negotiated",
        _indirect,
    ),
)

_TABLES: Final[tuple[tuple[str, str, str, Make], ...]] = (
    ("indirect-loop", "2.7.5.2", "A loop in an indirect table", _indirect_loop),
    ("indirect-next", "2.7.5.3", "A next field beyond an indirect table", _indirect_next_out),
    ("indirect-nested", "2.7.5.3.1", "An indirect table in an indirect table", _nested),
    (
        "indirect-in-itself",
        "2.7.5.3.1",
        "An indirect table that refers to itself",
        _nested_in_itself,
    ),
    ("indirect-and-next", "2.7.5.3.1", "A descriptor with INDIRECT and NEXT", _indirect_and_next),
    ("indirect-odd-length", "2.7.5.3", "An indirect table of no whole descriptors", _table_odd),
    ("indirect-empty", "2.7.5.3", "An indirect table of 0 bytes", _table_empty),
    ("indirect-huge", "2.7.5.3", "An indirect table of 4 GiB", _table_huge),
    (
        "indirect-nowhere",
        "2.7.5.3",
        "An indirect table outside of memory",
        _fixed(Desc(_NOWHERE, 32, INDIRECT)),
    ),
    (
        "indirect-wraps",
        "2.7.5.3",
        "An indirect table that passes 2^64",
        _fixed(Desc(_LAST - 15, 64, INDIRECT)),
    ),
    ("indirect-long", "2.7.5.3.1", "A chain eight times as long as the ring", _table_long),
)

for _rows, _features in ((_CHAINS, 0), (_TABLES, INDIRECT_DESC)):
    for _name, _section, _text, _make in _rows:
        hostile(
            f"broken.{_name}",
            virtio(_section),
            f"{_text} is used with an error, or refused; no other memory is touched.",
        )(partial(_chain, _make, _features))


# The available ring


@hostile(
    "broken.head-at-size",
    virtio("2.7.6"),
    "A head that is the ring's size is refused; no memory is touched.",
)
def _head_at_size(t: Trial) -> None:
    queue = t.ready()
    t.remember()
    queue.offer(queue.size)
    queue.kick()
    t.aftermath(queue)


@hostile(
    "broken.head-65535",
    virtio("2.7.6"),
    "A head of 65535 is refused; no memory is touched.",
)
def _head_far(t: Trial) -> None:
    queue = t.ready()
    t.remember()
    queue.offer(0xFFFF)
    queue.kick()
    t.aftermath(queue)


@hostile(
    "broken.index-jumps",
    virtio("2.7.6"),
    "An available index that runs ahead by more than the ring's size is refused.",
)
def _index_jumps(t: Trial) -> None:
    queue = t.ready()
    pieces = _honest(t, queue)
    for at, each in enumerate(pieces):
        queue.put(at, each)
    t.remember()
    queue.publish(queue.size * 3 + 1)
    queue.kick()
    t.aftermath(queue, queue.buffers[0].writable, [0])


@hostile(
    "broken.index-goes-back",
    virtio("2.7.6.1"),
    "An available index that goes back is refused, and no request is done twice.",
)
def _index_back(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue, 4)
    t.remember()
    queue.publish(2)
    queue.kick()
    t.aftermath(
        queue,
        [(t.ram.start, t.ram.size)],
        list(range(queue.size)),
    )


@hostile(
    "broken.same-head-twice",
    virtio("2.7.13"),
    "A head that is made available twice at a time is used at most twice.",
)
def _same_head(t: Trial) -> None:
    queue = t.ready()
    pieces = _honest(t, queue)
    for at, each in enumerate(pieces):
        queue.put(at, each)
    t.remember()
    queue.offer(0, 0)
    queue.kick()
    t.aftermath(queue, queue.buffers[0].writable, [0])


@hostile(
    "broken.random-table",
    virtio("2.7.5"),
    "Tables of random descriptors are refused or served; no other memory is touched.",
)
def _random_table(t: Trial) -> None:
    for _ in range(5):
        t.reconnect()
        queue = t.ready(t.offered() & INDIRECT_DESC)
        room = t.ram.take(4096)
        for at in range(queue.size):
            address = t.random.choice(
                [room, room + t.random.randrange(4096), _NOWHERE, t.random.getrandbits(64)]
            )
            queue.put(
                at,
                Desc(
                    queue.device_address(address),
                    t.random.choice([0, 1, 16, 513, 4096, t.random.getrandbits(32)]),
                    t.random.choice([0, 1, 2, 3, 3, 4, t.random.getrandbits(16)]),
                    t.random.choice([t.random.randrange(queue.size), t.random.getrandbits(16)]),
                ),
            )
        heads = [t.random.randrange(queue.size) for _ in range(8)]
        # What is writable is anything behind the room, as lengths are random.
        queue.offer(*heads)
        queue.kick()
        outcome = queue.outcome(QUIET / 2)
        if outcome == "used":
            for entry in queue.take_used():
                t.expect(entry.id in heads, f"used descriptor {entry.id}, not made available")
        try:
            queue.stop()
        except HungUpError:
            continue


@hostile(
    "broken.random-requests",
    virtio("2.7.4.2"),
    "Requests of random contents are used with an error; no other memory is touched.",
)
def _random_requests(t: Trial) -> None:
    queue = t.ready()
    # Block requests of random types may write: the type is one that only reads, or none at all.
    for _ in range(30):
        data = bytearray(t.random.randbytes(t.random.choice([8, 16, 16, 24, 64])))
        if t.kind.name == "blk":
            data[0:4] = t.random.choice([0, 4, 8, 99, 0xFFFF]).to_bytes(4, "little")
        buffer = queue.post([bytes(data)], [t.random.choice([1, 16, 512, 513])], publish=False)
        queue.publish(queue.offered)
        t.remember()
        before = t.ram.snapshot()
        queue.kick()
        if queue.outcome(t.reaction) != "used":
            t.aftermath(queue, buffer.writable, [buffer.head], seconds=0)
        for entry in queue.take_used():
            queue.settle(entry)
        at = t.ram.stray(before, [*buffer.writable, (queue.used, 6 + 8 * queue.size)])
        t.expect(at is None, f"wrote to {at or 0:#x}, which no buffer has")


@hostile(
    "broken.over-used-ring",
    virtio("2.7.5"),
    "A writable buffer that is the used ring spoils that ring, and nothing else.",
)
def _over_used_ring(t: Trial) -> None:
    queue = t.ready()
    pieces = _honest(t, queue)
    last = pieces[-1]
    if not last.flags & WRITE:
        t.skip("requests of this queue have nothing to write")
    for at, each in enumerate(
        [*pieces[:-1], last._replace(address=queue.device_address(queue.used))]
    ):
        queue.put(at, each)
    before = t.ram.snapshot()
    queue.offer(0)
    queue.kick()
    outcome = queue.outcome(QUIET)
    # What the used ring says then is the driver's own doing.
    at_ = t.ram.stray(
        before, [(queue.avail, 6 + 2 * queue.size), (queue.used, max(last.length, 4096))]
    )
    t.expect(at_ is None, f"wrote to guest memory at {at_ or 0:#x}, which no buffer has")
    if outcome == "closed":
        t.reject("closed the connection")
    queue.stop()


@hostile(
    "broken.memory-taken-away",
    user("SET_MEM_TABLE"),
    "A memory table without the memory that a running ring is in leaves the ring unserved.",
)
def _memory_away(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue)
    other = t.new_ram(start=1 << 34, size=1 << 20)
    t.link.refuses(_F.SET_MEM_TABLE, MemoryTable((other.region,)), [other.fd])
    t.post(queue, kick=False)
    before = t.ram.snapshot()
    queue.kick()
    outcome = queue.outcome(QUIET)
    at = t.ram.stray(before, ())
    t.expect(at is None, f"wrote to {at or 0:#x}, which is not in the memory table any more")
    if outcome == "closed":
        t.reject("closed the connection")
    queue.stop()


@hostile(
    "broken.file-cut",
    user("SET_MEM_TABLE"),
    "A file that is cut while the ring in it runs does not end the back-end.",
)
def _file_cut(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue)
    os.ftruncate(t.ram.fd, 0)
    queue.kick()
    t.link.quiet(QUIET)
    try:
        queue.stop()
    except HungUpError:
        t.reject("closed the connection")


@hostile(
    "broken.buffers-cut",
    user("SET_MEM_TABLE"),
    "A file that is cut behind the ring, where the buffers are, does not end the back-end.",
)
def _buffers_cut(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue)
    # Page-aligned, and behind everything that was taken so far.
    room = t.ram.end - 8192
    request = t.request()
    readable = [request.readable] if request.readable else []
    pieces, _ = queue.lay_out(readable, [])
    tail = Desc(queue.device_address(room), max(request.room, 1), WRITE)
    if not request.room:
        tail = Desc(queue.device_address(room), 64)
    for at, each in enumerate(linked([*pieces, tail])):
        queue.put(at, each)
    os.ftruncate(t.ram.fd, room - t.ram.start)
    queue.offer(0)
    queue.kick()
    outcome = queue.outcome(QUIET)
    if outcome == "closed":
        t.reject("closed the connection")
    queue.stop()
    if outcome == "error":
        t.reject("signaled an error for the ring")
