"""Guest memory: tables, slots, offsets, and memory that goes away."""

from __future__ import annotations

from functools import partial
from typing import Final

from guestio.faults.catalogue import hostile, register, user
from guestio.faults.outcomes import HungUpError
from guestio.faults.report import Severity
from guestio.faults.ring import NEXT, WRITE, Desc, Queue, linked
from guestio.faults.trial import PLAIN, QUIET, Trial
from guestio.vhost_user.messages import (
    FrontendRequest,
    MemoryRegion,
    MemoryTable,
    ProtocolFeature,
    SingleMemoryRegion,
    VringState,
)

_F = FrontendRequest
_SLOTS: Final = ProtocolFeature.CONFIGURE_MEM_SLOTS
_HIGH: Final = 1 << 34
_MORE: Final = 1 << 20


@register(
    "memory.table",
    user("SET_MEM_TABLE"),
    "A memory table is mapped: a ring and buffers in it are reached.",
)
def _table(t: Trial) -> None:
    t.serves(t.ready())


@register(
    "memory.offset",
    user("Memory regions description"),
    "A region begins at its offset in its file.",
)
def _offset(t: Trial) -> None:
    t.negotiate()
    ram = t.new_ram(start=_HIGH, size=_MORE, offset=0x3000)
    t.link.do(_F.SET_MEM_TABLE, ram.table, [ram.fd])
    queue = Queue(t.link, ram, t.index, 64)
    try:
        queue.start()
        t.serves(queue)
    finally:
        queue.close()


@register(
    "memory.several-regions",
    user("SET_MEM_TABLE"),
    "Each region of a table has the descriptor at its position; eight regions are mapped.",
)
def _several(t: Trial) -> None:
    t.negotiate()
    others = [t.new_ram(start=_HIGH * (n + 1), size=65536) for n in range(7)]
    regions = [*others[:3], t.ram, *others[3:]]
    t.link.do(
        _F.SET_MEM_TABLE,
        MemoryTable(tuple(each.region for each in regions)),
        [each.fd for each in regions],
    )
    queue = t.new_queue()
    queue.start()
    t.serves(queue)


@register(
    "memory.buffer-elsewhere",
    user("Memory access"),
    "A ring in one region may have its buffers in another one.",
)
def _elsewhere(t: Trial) -> None:
    t.negotiate()
    other = t.new_ram(start=_HIGH, size=_MORE)
    t.link.do(_F.SET_MEM_TABLE, MemoryTable((t.ram.region, other.region)), [t.ram.fd, other.fd])
    queue = t.new_queue()
    queue.start()
    ring, queue.ram = queue.ram, other
    request = t.request()
    pieces, buffer = queue.lay_out(
        [request.readable] if request.readable else [], [request.room] if request.room else []
    )
    queue.ram = ring
    order = queue.reserve(len(pieces))
    for at, each in enumerate(pieces):
        last = at + 1 == len(pieces)
        queue.put(
            order[at],
            each if last else each._replace(flags=each.flags | 1, next=order[at + 1]),
        )
    buffer.head = order[0]
    queue.buffers[order[0]] = buffer
    queue.offer(order[0])
    queue.kick()
    done = queue.wait_one(t.patience)
    queue.ram = other
    t.judge(queue, done)


@register(
    "memory.across-regions",
    user("Memory access"),
    "A buffer may cross from one region to the next, if their guest addresses adjoin.",
)
def _across(t: Trial) -> None:
    t.negotiate()
    half = t.ram.size // 2
    first = MemoryRegion(t.ram.start, half, t.ram.user(t.ram.start), 0)
    # User addresses that do not adjoin: a back-end that translates once per buffer is wrong.
    second = MemoryRegion(t.ram.start + half, half, 0x5000_0000_0000, half)
    t.link.do(_F.SET_MEM_TABLE, MemoryTable((first, second)), [t.ram.fd, t.ram.fd])
    queue = t.new_queue()
    queue.start()
    request = t.request()
    border = t.ram.start + half
    start = border - max((request.room or len(request.readable)) // 2, 1)
    pieces, buffer = queue.lay_out([], [])
    if request.room:
        buffer.writable = [(start, request.room)]
        if request.readable:
            head = border + 8192
            t.ram.write(head, request.readable)
            pieces = [
                Desc(head, len(request.readable), NEXT, 1),
                Desc(start, request.room, WRITE),
            ]
        else:
            pieces = [Desc(start, request.room, WRITE)]
    else:
        t.ram.write(start, request.readable)
        pieces = [Desc(start, len(request.readable))]
    for position, each in enumerate(pieces):
        queue.put(position, each)
    buffer.head = 0
    queue.buffers[0] = buffer
    queue.offer(0)
    queue.kick()
    done = queue.wait_one(t.patience)
    t.judge(queue, done)


@register(
    "memory.table-again",
    user("SET_MEM_TABLE"),
    "A table that replaces another one while a ring runs takes effect, with nothing lost.",
)
def _again(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue)
    other = t.new_ram(start=_HIGH, size=_MORE)
    t.link.do(_F.SET_MEM_TABLE, MemoryTable((t.ram.region, other.region)), [t.ram.fd, other.fd])
    t.serves(queue, 3)
    t.share()
    t.serves(queue, 3)


@register(
    "memory.table-at-other-place",
    user("SET_MEM_TABLE"),
    "Memory may move to other user addresses while rings are stopped; they are set up again there.",
    severity=Severity.SHOULD,
)
def _moved(t: Trial) -> None:
    queue = t.ready()
    t.serves(queue)
    base = queue.stop()
    shift = 0x100_0000_0000
    moved = MemoryRegion(t.ram.start, t.ram.size, t.ram.user(t.ram.start) + shift, t.ram.offset)
    t.link.do(_F.SET_MEM_TABLE, MemoryTable((moved,)), [t.ram.fd])
    queue.base = base
    queue.iommu, queue.shift = True, t.ram.user(0) + shift
    # Only the ring's own addresses are user addresses.
    addresses = queue.addresses
    queue.iommu, queue.shift = False, 0
    t.link.do(_F.SET_VRING_NUM, VringState(queue.index, queue.size))
    t.link.do(_F.SET_VRING_BASE, VringState(queue.index, base))
    t.link.do(_F.SET_VRING_ADDR, addresses)
    queue.set_fd(_F.SET_VRING_CALL, queue.call_fd)
    queue.set_fd(_F.SET_VRING_KICK, queue.kick_fd)
    if t.link.features >> 30 & 1:
        queue.enable()
    t.serves(queue, 3)


@register(
    "memory.revoked",
    user("SET_MEM_TABLE"),
    "Memory that is not in the new table is not touched any more once the table is accepted.",
)
def _revoked(t: Trial) -> None:
    queue = t.ready()
    extra = t.new_ram(start=_HIGH, size=_MORE)
    t.link.do(_F.SET_MEM_TABLE, MemoryTable((t.ram.region, extra.region)), [t.ram.fd, extra.fd])
    t.serves(queue)
    t.share()
    before = extra.snapshot()
    ring, queue.ram = queue.ram, extra
    request = t.request()
    pieces, _ = queue.lay_out([], [max(request.room, 64)])
    queue.ram = ring
    if not request.room:
        t.skip("requests of this queue have nothing to write")
    head: list[tuple[int, int]] = []
    if request.readable:
        head = [(t.ram.place(request.readable), len(request.readable))]
    chain = linked([*(Desc(at, length) for at, length in head), *pieces])
    for at, each in enumerate(chain):
        queue.put(at, each)
    queue.offer(0)
    queue.kick()
    queue.outcome(QUIET)
    at_ = extra.stray(before, ())
    t.expect(at_ is None, f"wrote to {at_ or 0:#x}, which is in the table no more")


def _bad_table(what: str, t: Trial) -> None:
    link = t.negotiate()
    good = t.ram.region
    table = {
        "empty-region": (MemoryRegion(good.guest_addr, 0, good.user_addr, 0),),
        "guest-wraps": (MemoryRegion((1 << 64) - 4096, 8192, good.user_addr, 0),),
        "user-wraps": (MemoryRegion(good.guest_addr, 8192, (1 << 64) - 4096, 0),),
        "past-file": (MemoryRegion(good.guest_addr, good.size * 2, good.user_addr, 0),),
        "offset-past-file": (
            MemoryRegion(good.guest_addr, 4096, good.user_addr, good.size + 4096),
        ),
        "offset-wraps": (MemoryRegion(good.guest_addr, 8192, good.user_addr, (1 << 64) - 4096),),
        "huge": (MemoryRegion(0, (1 << 64) - 4096, 0, 0),),
        "overlap": (good, MemoryRegion(good.guest_addr, good.size, good.user_addr, 0)),
        "unaligned-offset": (MemoryRegion(good.guest_addr, 4096, good.user_addr, 7),),
    }[what]
    link.refuses(_F.SET_MEM_TABLE, MemoryTable(table), [t.ram.fd] * len(table))
    queue = t.new_queue()
    try:
        queue.start()
        t.post(queue)
        queue.outcome(QUIET)
        queue.stop()
    except HungUpError:
        t.reject("closed the connection when a ring was started")


for _what in (
    "empty-region",
    "guest-wraps",
    "user-wraps",
    "past-file",
    "offset-past-file",
    "offset-wraps",
    "huge",
    "overlap",
    "unaligned-offset",
):
    hostile(
        f"memory.bad-{_what}",
        user("SET_MEM_TABLE"),
        f"A region that is wrong ({_what.replace('-', ' ')}) is refused, or harms nothing.",
    )(partial(_bad_table, _what))


@hostile(
    "memory.count-lies",
    user("Memory regions description"),
    "A table whose count is more than it has regions is refused.",
)
def _count_lies(t: Trial) -> None:
    link = t.negotiate()
    for count in (2, 9, 0xFFFF_FFFF):
        link = t.reconnect()
        t.negotiate()
        data = count.to_bytes(4, "little") + bytes(4) + t.ram.region.encode()
        try:
            link.result(_F.SET_MEM_TABLE, data, [t.ram.fd])
        except HungUpError:
            continue
    t.reconnect().ask(_F.GET_FEATURES)


@hostile(
    "memory.descriptor-is-none",
    user("SET_MEM_TABLE"),
    "A table whose descriptor is no file is refused, or its memory is not reached.",
)
def _no_file(t: Trial) -> None:
    link = t.negotiate()
    link.refuses(_F.SET_MEM_TABLE, t.ram.table, [t.eventfd()])


# Slots


def _slots(t: Trial) -> int:
    t.needs(protocol=_SLOTS)
    t.negotiate(protocol=PLAIN | _SLOTS)
    return t.link.u64(_F.GET_MAX_MEM_SLOTS)


def _add(t: Trial, region: MemoryRegion, fd: int) -> None:
    t.link.do(_F.ADD_MEM_REG, SingleMemoryRegion(region), [fd])


@register(
    "slots.count",
    user("GET_MAX_MEM_SLOTS"),
    "There is at least one memory slot, and the number is a sensible one.",
)
def _slot_count(t: Trial) -> None:
    count = _slots(t)
    t.expect(1 <= count <= 1 << 20, f"says it has {count} memory slots")


@register("slots.add", user("ADD_MEM_REG"), "Memory that is added is reached.")
def _slot_add(t: Trial) -> None:
    _slots(t)
    _add(t, t.ram.region, t.ram.fd)
    queue = t.new_queue()
    queue.start()
    t.serves(queue, 3)


@register(
    "slots.add-more",
    user("ADD_MEM_REG"),
    "Memory can be added and removed while a ring runs, with nothing lost.",
)
def _slot_more(t: Trial) -> None:
    slots = _slots(t)
    _add(t, t.ram.region, t.ram.fd)
    queue = t.new_queue()
    queue.start()
    others = [t.new_ram(start=_HIGH * (n + 1), size=65536) for n in range(min(slots - 1, 7))]
    for each in others:
        _add(t, each.region, each.fd)
        t.serves(queue)
    for each in others:
        t.link.do(_F.REM_MEM_REG, SingleMemoryRegion(each.region))
        t.serves(queue)


@register(
    "slots.fill",
    user("GET_MAX_MEM_SLOTS"),
    "As many regions can be added as there are slots; up to 32 are tried.",
)
def _slot_fill(t: Trial) -> None:
    slots = min(_slots(t), 32)
    for number in range(slots):
        at = _HIGH + number * 0x10000
        _add(t, MemoryRegion(at, 0x1000, at, 0), t.ram.fd)


@hostile(
    "slots.one-too-many",
    user("GET_MAX_MEM_SLOTS"),
    "One region more than there are slots is refused.",
)
def _slot_surplus(t: Trial) -> None:
    slots = _slots(t)
    if slots > 600:
        t.skip(f"there are {slots} slots")
    places = range(_HIGH, _HIGH + slots * 0x10000, 0x10000)
    # Several at a time, as a round trip for each of some hundred takes long.
    for first in range(0, slots, 32):
        several = places[first : first + 32]
        for at in several:
            message = SingleMemoryRegion(MemoryRegion(at, 0x1000, at, 0))
            t.link.request(_F.ADD_MEM_REG, message, [t.ram.fd], need_reply=t.link.acknowledges)
        for _ in several if t.link.acknowledges else ():
            reply = t.link.receive()
            t.link.judge(reply, _F.ADD_MEM_REG)
            t.expect(reply.u64 == 0, f"says it has {slots} memory slots, and refuses one of them")
    t.link.refuses(_F.ADD_MEM_REG, SingleMemoryRegion(t.ram.region), [t.ram.fd])
    t.fail(f"says it has {slots} memory slots, and acknowledges one region more")


@register(
    "slots.remove-by-identity",
    user("REM_MEM_REG"),
    "A region is removed by its addresses and size; its offset is ignored.",
)
def _slot_identity(t: Trial) -> None:
    _slots(t)
    region = t.ram.region
    _add(t, region, t.ram.fd)
    other = MemoryRegion(region.guest_addr, region.size, region.user_addr, 0x12345000)
    t.link.do(_F.REM_MEM_REG, SingleMemoryRegion(other))
    _add(t, region, t.ram.fd)


@register(
    "slots.remove-with-descriptor",
    user("REM_MEM_REG"),
    "A descriptor that comes with REM_MEM_REG is closed, whether the message is accepted or not.",
)
def _slot_descriptor(t: Trial) -> None:
    _slots(t)
    _add(t, t.ram.region, t.ram.fd)
    mine, theirs = t.socket_pair()
    refused = ""
    try:
        if value := t.link.result(
            _F.REM_MEM_REG, SingleMemoryRegion(t.ram.region), [theirs.fileno()]
        ):
            refused = f"refuses REM_MEM_REG with a descriptor ({value})"
    except HungUpError:
        refused = "closed the connection at REM_MEM_REG with a descriptor"
    theirs.close()
    mine.settimeout(t.patience)
    try:
        t.expect(mine.recv(1) == b"", "uses a descriptor that came with REM_MEM_REG")
    except TimeoutError:
        t.fail("keeps a descriptor that came with REM_MEM_REG")
    except ConnectionResetError:
        pass
    if refused:
        t.reject(refused)


@register(
    "slots.removed-not-reached",
    user("REM_MEM_REG"),
    "Memory that was removed is not touched any more once the removal is accepted.",
)
def _slot_removed(t: Trial) -> None:
    _slots(t)
    if not t.request().room:
        t.skip("requests of this queue have nothing to write")
    _add(t, t.ram.region, t.ram.fd)
    queue = t.new_queue()
    queue.start()
    t.serves(queue)
    t.link.do(_F.REM_MEM_REG, SingleMemoryRegion(t.ram.region))
    t.post(queue, kick=False)
    before = t.ram.snapshot()
    queue.kick()
    queue.outcome(QUIET)
    at = t.ram.stray(before, ())
    t.expect(at is None, f"wrote to {at or 0:#x}, which was removed")


def _bad_slot(what: str, t: Trial) -> None:
    _slots(t)
    region = t.ram.region
    link = t.link
    if what == "overlap":
        _add(t, region, t.ram.fd)
        link.refuses(
            _F.ADD_MEM_REG,
            SingleMemoryRegion(
                MemoryRegion(region.guest_addr + 4096, 8192, region.user_addr + 4096, 4096)
            ),
            [t.ram.fd],
        )
    elif what == "no-descriptor":
        link.refuses(_F.ADD_MEM_REG, SingleMemoryRegion(region))
        t.fail("accepted a region without a descriptor")
    elif what == "two-descriptors":
        link.refuses(_F.ADD_MEM_REG, SingleMemoryRegion(region), [t.ram.fd, t.ram.fd])
    elif what == "remove-unknown":
        link.refuses(_F.REM_MEM_REG, SingleMemoryRegion(region))
        t.fail("said that a region which it never had was removed")
    elif what == "remove-part":
        _add(t, region, t.ram.fd)
        part = MemoryRegion(region.guest_addr, 4096, region.user_addr, 0)
        link.refuses(_F.REM_MEM_REG, SingleMemoryRegion(part))
        t.fail("said that a part of a region was removed")
    else:
        bad = MemoryRegion(region.guest_addr, 0, region.user_addr, 0)
        link.refuses(_F.ADD_MEM_REG, SingleMemoryRegion(bad), [t.ram.fd])


for _what in (
    "overlap",
    "no-descriptor",
    "two-descriptors",
    "remove-unknown",
    "remove-part",
    "empty",
):
    hostile(
        f"slots.bad-{_what}",
        user("REM_MEM_REG" if _what.startswith("remove") else "ADD_MEM_REG"),
        f"A change of slots that is wrong ({_what.replace('-', ' ')}) is refused.",
    )(partial(_bad_slot, _what))
