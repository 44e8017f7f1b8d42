"""A front-end and a driver that break one rule each: patched copies of guestio's own.

:class:`Hand` is a front-end whose messages can be changed on their way (``tamper``), with a ring
that is written by hand. `FAULTS` has a function for each breach, by the name of the demand.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

from guestio.errors import GuestioError
from guestio.guest import ScriptedGuest
from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from guestio.vhost_user import Frontend
from guestio.vhost_user.frontend import PROTOCOL_FEATURES
from guestio.vhost_user.iotlb_service import MissAction, MissAnswer
from guestio.vhost_user.messages import (
    U64,
    Config,
    FrontendRequest,
    IotlbMessage,
    Log,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    SingleMemoryRegion,
    VringAddr,
    VringFd,
    VringState,
    encode_message,
)
from guestio.virtio.layout import RingLayout

F = FrontendRequest
P = ProtocolFeature
NEXT, WRITE, INDIRECT = 1, 2, 4
INDIRECT_DESC, EVENT_IDX, VERSION_1, PLATFORM = 1 << 28, 1 << 29, 1 << 32, 1 << 33
WANTED = VERSION_1 | INDIRECT_DESC | 0xFFFFFF
SIZE = 16
MEMORY = 1 << 20
DATA, STATUS, HEADER, TABLE = 0x8000, 0x20000, 0x20010, 0x21000
"""Where a request has its parts."""

Sent = tuple[int, "Payload | bytes", Sequence[int]]
Tamper = Callable[[int, "Payload | bytes", Sequence[int]], "Sent | None"]


class Hand(Frontend):
    """A front-end whose every message goes through ``tamper``; with memory and a ring.

    Args:
        path: Where the judge listens.
        tamper: Given a request, its payload and its descriptors, says what is sent instead; None
            for nothing, and nothing is waited for.
    """

    def __init__(self, path: str, tamper: Tamper | None = None) -> None:
        self.tamper = tamper
        self.layout = RingLayout.contiguous(0, SIZE)
        self.backing = Backing.memfd(MEMORY, "guestio-hand")
        self.ram = GuestRegionCollection.from_regions([MmapRegion(0, self.backing)])
        self.available = 0
        super().__init__(path, timeout=20)

    def request(
        self,
        request: int,
        payload: Payload | bytes = b"",
        fds: Sequence[int] = (),
        *,
        has_reply: bool = False,
    ) -> bytes:
        if self.tamper is not None:
            sent = self.tamper(request, payload, fds)
            if sent is None:
                return b""
            request, payload, fds = sent
        return super().request(request, payload, fds, has_reply=has_reply)

    def raw(
        self,
        request: int,
        payload: Payload | bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = 1,
        replies: int = 0,
    ) -> None:
        """Send a message with these flags, and wait for so many replies."""
        body = payload if isinstance(payload, bytes) else payload.encode()
        data = struct.pack("<III", request, flags, len(body)) + body
        for expected in self._exchange.send(request, data, fds, replies):
            self._exchange.wait(expected)

    def quietly(
        self, request: int, payload: Payload | bytes = b"", fds: Sequence[int] = ()
    ) -> None:
        """Send what the judge refuses."""
        with contextlib.suppress(GuestioError):
            Frontend.request(self, request, payload, fds)

    # A guest

    def boot(
        self,
        features: int = WANTED,
        *,
        protocol: int = PROTOCOL_FEATURES,
        slots: bool | None = None,
        **queue: Any,
    ) -> None:
        """Negotiate, share memory, and start the ring."""
        self.negotiate(features, protocol)
        self.set_memory(self.ram, slots=slots)
        self.begin(**queue)

    def begin(self, **queue: Any) -> None:
        self.queue = self.start_queue(0, self.layout, **queue)

    # A driver

    def desc(self, index: int, addr: int, length: int, flags: int = 0, following: int = 0) -> None:
        self.ram.write(
            self.layout.desc + 16 * index, struct.pack("<QIHH", addr, length, flags, following)
        )

    def publish(self, *heads: int, kick: bool = True, index: int | None = None) -> None:
        """Make descriptors available, or set the available index to this."""
        for head in heads:
            at = self.layout.avail + 4 + 2 * (self.available % SIZE)
            self.ram.write(at, struct.pack("<H", head))
            self.available = (self.available + 1) & 0xFFFF
        if index is not None:
            self.available = index
        self.ram.store(self.layout.avail + 2, self.available, 2)
        if kick:
            self.queue.kick()

    def request_at(
        self,
        first: int = 0,
        *,
        kind: int = 0,
        sector: int = 0,
        read: int = 0,
        write: int = 512,
    ) -> int:
        """The descriptors of a request, in a row; the first of them."""
        self.ram.write(HEADER, struct.pack("<IIQ", kind, 0, sector))
        parts = [(HEADER, 16, 0)]
        if read:
            parts.append((DATA, read, 0))
        if write:
            parts.append((DATA, write, WRITE))
        parts.append((STATUS, 1, WRITE))
        for at, (addr, length, flags) in enumerate(parts):
            last = at == len(parts) - 1
            self.desc(first + at, addr, length, flags | (0 if last else NEXT), first + at + 1)
        return first

    def settle(self, seconds: float = 20.0) -> None:
        """Wait until everything is used, or the judge says that the ring is broken."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            used = self.ram.load(self.layout.used + 2, 2)
            if used == self.available or self.queue.failed():
                break
            time.sleep(0.002)
        self.sync()

    def run(self, **request: Any) -> None:
        """Make one request and wait for its end."""
        self.publish(self.request_at(**request))
        self.settle()

    def close(self) -> None:
        super().close()
        self.iotlb.memory = None
        with contextlib.suppress(BufferError):
            self.__dict__.pop("ram", None)
            self.backing.close()


Fault = Callable[[str], None]
FAULTS: list[tuple[str, str, Fault]] = []
"""The demand that is broken, what is done, and how."""


def fault(demand: str) -> Callable[[Fault], Fault]:
    def add(act: Fault) -> Fault:
        FAULTS.append((demand, act.__name__, act))
        return act

    return add


def instead(request: int, change: Callable[[Any], Payload | bytes]) -> Tamper:
    """Change the payload of one kind of message."""

    def tamper(code: int, payload: Payload | bytes, fds: Sequence[int]) -> Sent:
        return code, (change(payload) if code == request else payload), fds

    return tamper


def without(request: int) -> Tamper:
    """Leave one kind of message out."""
    return lambda code, payload, fds: None if code == request else (code, payload, fds)


def booted(path: str, tamper: Tamper, **options: Any) -> None:
    """Boot with a changed message; the judge may refuse it."""
    with Hand(path, tamper) as hand, contextlib.suppress(GuestioError):
        hand.boot(**options)
        hand.run()


# Messages


@fault("message.version")
def another_version(path: str) -> None:
    with Hand(path) as hand:
        hand.raw(F.SET_OWNER, flags=2)
        hand.sync()


@fault("message.no-reply-flag")
def a_request_as_a_reply(path: str) -> None:
    with Hand(path) as hand:
        hand.raw(F.SET_OWNER, flags=1 | 4)
        hand.sync()


@fault("message.known")
def a_request_of_its_own(path: str) -> None:
    with Hand(path) as hand:
        hand.raw(999, bytes(8))
        hand.sync()


@fault("message.size")
def a_payload_too_long(path: str) -> None:
    with Hand(path) as hand:
        hand.raw(F.SET_VRING_NUM, VringState(0, 16).encode() + bytes(4))
        hand.sync()


@fault("message.size")
def a_payload_too_short(path: str) -> None:
    with Hand(path) as hand:
        hand.raw(F.SET_FEATURES, bytes(4))
        hand.sync()


@fault("message.descriptors")
def a_descriptor_too_many(path: str) -> None:
    with Hand(path) as hand:
        hand.raw(F.SET_OWNER, b"", [hand.backing.fd or 0])
        hand.sync()


@fault("message.complete")
def half_a_message(path: str) -> None:
    with Hand(path) as hand:
        hand.sync()
        hand._exchange.send(F.SET_OWNER, encode_message(F.SET_OWNER)[:7])


@fault("ack.negotiated")
def an_answer_wanted_too_early(path: str) -> None:
    with Hand(path) as hand:
        hand.raw(F.SET_OWNER, flags=1 | 8)
        hand.sync()


# Negotiation


@fault("owner.before-rings")
def no_owner(path: str) -> None:
    booted(path, without(F.SET_OWNER))


@fault("owner.once")
def owner_again(path: str) -> None:
    with Hand(path) as hand:
        hand.boot()
        hand.request(F.SET_OWNER)


@fault("features.asked")
def features_without_asking(path: str) -> None:
    with Hand(path) as hand:
        hand.raw(F.SET_FEATURES, U64(VERSION_1))
        hand.sync()


@fault("features.offered")
def a_feature_never_offered(path: str) -> None:
    booted(path, instead(F.SET_FEATURES, lambda p: U64(p.value | 1 << 40)))


@fault("features.version-1")
def a_legacy_driver(path: str) -> None:
    booted(path, instead(F.SET_FEATURES, lambda p: U64(p.value & ~VERSION_1)))


@fault("features.before-rings")
def rings_without_features(path: str) -> None:
    booted(path, without(F.SET_FEATURES))


@fault("features.while-started")
def features_while_it_runs(path: str) -> None:
    with Hand(path) as hand:
        hand.boot()
        hand.set_features(hand.features & ~INDIRECT_DESC)


@fault("protocol.offered-bit")
def protocol_features_first(path: str) -> None:
    with Hand(path) as hand:
        hand.raw(F.SET_PROTOCOL_FEATURES, U64(0))
        hand.sync()


@fault("protocol.offered")
def a_protocol_feature_never_offered(path: str) -> None:
    booted(path, instead(F.SET_PROTOCOL_FEATURES, lambda p: U64(p.value | P.SHMEM)))


def _without(feature: ProtocolFeature, act: Callable[[Hand], object]) -> Fault:
    def run(path: str) -> None:
        with Hand(path) as hand:
            hand.negotiate(WANTED, PROTOCOL_FEATURES & ~feature)
            with contextlib.suppress(GuestioError):
                act(hand)

    run.__name__ = f"no_{feature.name}"
    return run


for _feature, _act in (
    (P.MQ, lambda hand: hand._ask(F.GET_QUEUE_NUM)),
    (P.CONFIG, lambda hand: hand.get_config(0, 8)),
    (P.STATUS, lambda hand: hand.get_status()),
    (P.RESET_DEVICE, lambda hand: hand.reset_device()),
    (P.CONFIGURE_MEM_SLOTS, lambda hand: hand._ask(F.GET_MAX_MEM_SLOTS)),
    (
        P.LOG_SHMFD,
        lambda hand: hand.request(
            F.SET_LOG_BASE, Log(MEMORY, 0), [hand.backing.fd], has_reply=True
        ),
    ),
    (P.BACKEND_REQ, lambda hand: hand._open_backend_channel()),
):
    fault(f"protocol.{_feature.name}")(_without(_feature, _act))


@fault("protocol.other")
def what_nobody_offered(path: str) -> None:
    with Hand(path) as hand:
        hand.negotiate(WANTED)
        hand.quietly(F.SEND_RARP, U64(0))


# Memory


@fault("memory.before-rings")
def rings_without_memory(path: str) -> None:
    booted(path, without(F.ADD_MEM_REG))


def _region(change: Callable[[MemoryRegion], MemoryRegion]) -> Callable[[Any], Payload]:
    return lambda payload: SingleMemoryRegion(change(payload.region))


def _with(region: MemoryRegion, **changed: int) -> MemoryRegion:
    fields = {name: getattr(region, name) for name in MemoryRegion.__slots__}
    return MemoryRegion(**{**fields, **changed})


@fault("memory.regions")
def an_empty_table(path: str) -> None:
    with Hand(path) as hand:
        hand.negotiate(WANTED)
        hand.quietly(F.SET_MEM_TABLE, MemoryTable(()))


@fault("memory.not-empty")
def an_empty_region(path: str) -> None:
    booted(path, instead(F.ADD_MEM_REG, _region(lambda r: _with(r, size=0))))


@fault("memory.addresses")
def a_region_past_the_end(path: str) -> None:
    booted(path, instead(F.ADD_MEM_REG, _region(lambda r: _with(r, guest_addr=(1 << 64) - 4096))))


def _twice(path: str, **changed: int) -> None:
    """Share the memory a second time, at another place."""
    with Hand(path) as hand:
        hand.boot()
        region = MemoryRegion(0, MEMORY, hand.user_address(0), 0)
        fds = [hand.backing.fd or 0]
        hand.quietly(F.ADD_MEM_REG, SingleMemoryRegion(_with(region, **changed)), fds)


@fault("memory.guest-disjoint")
def regions_overlap_for_the_guest(path: str) -> None:
    _twice(path, guest_addr=MEMORY // 2, user_addr=1 << 40)


@fault("memory.user-disjoint")
def regions_overlap_in_the_front_end(path: str) -> None:
    _twice(path, guest_addr=1 << 40)


@fault("memory.mappable")
def memory_that_is_a_pipe(path: str) -> None:
    def tamper(code: int, payload: Payload | bytes, fds: Sequence[int]) -> Sent:
        return code, payload, [reader] if code == F.ADD_MEM_REG else fds

    reader, writer = os.pipe()
    try:
        booted(path, tamper)
    finally:
        os.close(reader)
        os.close(writer)


@fault("memory.mappable")
def memory_that_is_read_only(path: str) -> None:
    def tamper(code: int, payload: Payload | bytes, fds: Sequence[int]) -> Sent:
        if code != F.ADD_MEM_REG:
            return code, payload, fds
        opened.append(os.open(f"/proc/self/fd/{fds[0]}", os.O_RDONLY))
        return code, payload, opened

    opened: list[int] = []
    booted(path, tamper)
    os.close(opened[0])


@fault("memory.in-file")
def memory_beyond_its_file(path: str) -> None:
    booted(path, instead(F.ADD_MEM_REG, _region(lambda r: _with(r, mmap_offset=4096))))


@fault("memory.stays")
def memory_that_is_cut(path: str) -> None:
    with Hand(path) as hand:
        hand.boot()
        hand.desc(0, DATA + 0x10000, 16, NEXT, 1)
        hand.desc(1, DATA, 512, WRITE | NEXT, 2)
        hand.desc(2, STATUS, 1, WRITE)
        os.ftruncate(hand.backing.fd or 0, 0x8000)
        hand.publish(0)
        hand.settle()


@fault("slots.limit")
def more_regions_than_slots(path: str) -> None:
    with Hand(path) as hand:
        hand.boot()
        for at in range(1, hand.max_memory_slots() + 1):
            region = MemoryRegion(at * MEMORY, 4096, (1 << 40) + at * MEMORY, 0)
            hand.quietly(F.ADD_MEM_REG, SingleMemoryRegion(region), [hand.backing.fd or 0])


@fault("slots.remove-known")
def a_region_that_is_not_there(path: str) -> None:
    with Hand(path) as hand:
        hand.boot()
        hand.quietly(F.REM_MEM_REG, SingleMemoryRegion(MemoryRegion(1, 2, 3, 0)))


@fault("slots.remove-unused")
def memory_taken_from_under_a_ring(path: str) -> None:
    with Hand(path) as hand:
        hand.boot()
        hand._set_slots(GuestRegionCollection())


# Setting rings up


@fault("vring.index")
def a_ring_that_is_not_there(path: str) -> None:
    with Hand(path) as hand:
        hand.boot()
        hand.quietly(F.SET_VRING_NUM, VringState(7, 16))


@fault("vring.size")
def a_ring_of_a_hundred(path: str) -> None:
    booted(path, instead(F.SET_VRING_NUM, lambda _: VringState(0, 100)))


@fault("vring.base")
def a_base_of_17_bits(path: str) -> None:
    booted(path, instead(F.SET_VRING_BASE, lambda _: VringState(0, 1 << 16)))


@fault("vring.base-continues")
def a_ring_that_goes_on_elsewhere(path: str) -> None:
    with Hand(path) as hand:
        hand.boot()
        for _ in range(3):
            hand.run()
        base = hand.stop_queue(0)
        hand.begin(base=base - 1)
        hand.settle(0.1)


@fault("vring.base-fits")
def a_ring_that_begins_in_the_future(path: str) -> None:
    with Hand(path) as hand:
        hand.boot(base=50)
        hand.sync()


def _moved(path: str, **changed: Callable[[VringAddr], int]) -> None:
    def change(payload: VringAddr) -> VringAddr:
        fields = {name: getattr(payload, name) for name in VringAddr.__slots__}
        fields.update({name: make(payload) for name, make in changed.items()})
        return VringAddr(**fields)

    booted(path, instead(F.SET_VRING_ADDR, change))


@fault("vring.flags")
def a_ring_with_flags(path: str) -> None:
    _moved(path, flags=lambda _: 2)


@fault("vring.aligned-desc")
def descriptors_not_aligned(path: str) -> None:
    _moved(path, desc=lambda a: a.desc + 8)


@fault("vring.aligned-avail")
def an_available_ring_not_aligned(path: str) -> None:
    _moved(path, avail=lambda a: a.avail + 1)


@fault("vring.aligned-used")
def a_used_ring_not_aligned(path: str) -> None:
    _moved(path, used=lambda a: a.used + 2)


@fault("vring.in-memory")
def a_ring_outside_of_memory(path: str) -> None:
    _moved(path, used=lambda a: a.used + (1 << 41))


@fault("vring.disjoint")
def a_ring_over_itself(path: str) -> None:
    _moved(path, used=lambda a: a.desc)


@fault("vring.complete")
def a_kick_before_the_addresses(path: str) -> None:
    booted(path, without(F.SET_VRING_ADDR))


@fault("vring.while-started")
def a_ring_resized_while_it_runs(path: str) -> None:
    with Hand(path) as hand:
        hand.boot()
        hand.quietly(F.SET_VRING_NUM, VringState(0, 32))


@fault("vring.enable-negotiated")
def enabled_without_protocol_features(path: str) -> None:
    with Hand(path) as hand:
        hand.negotiate(WANTED)
        hand.raw(F.SET_FEATURES, U64(VERSION_1))
        hand.quietly(F.SET_VRING_ENABLE, VringState(0, 1))


@fault("vring.enable-value")
def enabled_twice_over(path: str) -> None:
    booted(path, instead(F.SET_VRING_ENABLE, lambda _: VringState(0, 2)))


@fault("fd.bits")
def a_kick_with_more_bits(path: str) -> None:
    booted(path, instead(F.SET_VRING_KICK, lambda _: U64(1 << 9)))


@fault("fd.flag")
def a_descriptor_that_is_denied(path: str) -> None:
    booted(path, instead(F.SET_VRING_CALL, lambda _: VringFd(0, has_fd=False)))


def _other_fd(request: int, demand: str) -> None:
    @fault(demand)
    def another_kind_of_descriptor(path: str) -> None:
        def tamper(code: int, payload: Payload | bytes, fds: Sequence[int]) -> Sent:
            return code, payload, [memory] if code == request else fds

        memory = os.memfd_create("guestio-test")
        try:
            booted(path, tamper)
        finally:
            os.close(memory)


_other_fd(F.SET_VRING_KICK, "fd.kick")
_other_fd(F.SET_VRING_CALL, "fd.call")
_other_fd(F.SET_VRING_ERR, "fd.err")
_other_fd(F.SET_BACKEND_REQ_FD, "fd.channel")


# Configuration, status, log


@fault("config.flags")
def a_config_access_with_flags(path: str) -> None:
    with Hand(path) as hand:
        hand.negotiate(WANTED)
        hand.request(F.GET_CONFIG, Config(0, bytes(8), 2), has_reply=True)


@fault("config.writable")
def a_driver_that_sets_the_capacity(path: str) -> None:
    with Hand(path) as hand:
        hand.negotiate(WANTED)
        hand.set_config(0, bytes(8))


def _status(*values: int, before: Callable[[Hand], object] = bool) -> Fault:
    def run(path: str) -> None:
        with Hand(path) as hand:
            hand.negotiate(WANTED)
            for value in values:
                hand.set_status(value)
            before(hand)

    run.__name__ = "status_" + "_".join(map(str, values))
    return run


fault("status.bits")(_status(1 | 64))
fault("status.kept")(_status(3, 1))
fault("status.order")(_status(1 | 2 | 4))
fault("status.features")(
    _status(1 | 2 | 8, before=lambda hand: hand.set_features(hand.features & ~INDIRECT_DESC))
)


@fault("log.base-first")
def logging_without_a_log(path: str) -> None:
    with Hand(path) as hand:
        hand.boot()
        hand.request(F.SET_FEATURES, U64(hand.features | 1 << 26 | 1 << 30))


@fault("log.mappable")
def a_log_longer_than_its_file(path: str) -> None:
    with Hand(path) as hand:
        hand.boot()
        log = Log(2 * MEMORY, 0)
        hand.request(F.SET_LOG_BASE, log, [hand.backing.fd or 0], has_reply=True)


@fault("log.covers")
def a_log_that_is_too_small(path: str) -> None:
    with Hand(path) as hand:
        hand.boot()
        hand.start_logging(2)


# The available ring and its descriptors


def driven(
    demand: str, features: int = WANTED, **options: Any
) -> Callable[[Callable[[Hand], object]], Callable[[Hand], object]]:
    """A fault of the driver alone: everything before is honest."""

    def add(act: Callable[[Hand], object]) -> Callable[[Hand], object]:
        def run(path: str) -> None:
            with Hand(path) as hand:
                hand.boot(features, **options)
                act(hand)
                hand.settle()

        run.__name__ = act.__name__
        fault(demand)(run)
        return act

    return add


@driven("avail.index-grows")
def an_index_that_goes_back(hand: Hand) -> None:
    hand.run()
    hand.run()
    hand.publish(index=1)


@driven("avail.room")
def more_buffers_than_entries(hand: Hand) -> None:
    hand.request_at(0)
    hand.publish(index=SIZE + 1)


@driven("avail.head")
def a_head_outside_of_the_table(hand: Hand) -> None:
    hand.publish(SIZE)


@driven("avail.head-free")
def a_buffer_that_is_in_flight_already(hand: Hand) -> None:
    hand.request_at(0)
    hand.publish(0, 0)


@driven("avail.flags")
def flags_that_do_not_exist(hand: Hand) -> None:
    hand.ram.write(hand.layout.avail, b"\x02\0")
    hand.run()


@driven("avail.flags-event-idx", WANTED | EVENT_IDX)
def flags_and_event_idx(hand: Hand) -> None:
    hand.ram.write(hand.layout.avail, b"\x01\0")
    hand.run()


@driven("desc.next")
def a_chain_that_leaves_the_table(hand: Hand) -> None:
    hand.desc(0, HEADER, 16, NEXT, SIZE)
    hand.publish(0)


@driven("desc.no-loop")
def a_loop(hand: Hand) -> None:
    hand.desc(0, HEADER, 16, NEXT, 1)
    hand.desc(1, DATA, 512, NEXT, 0)
    hand.publish(0)


@driven("desc.no-loop")
def a_loop_in_a_table(hand: Hand) -> None:
    _table(hand, (HEADER, 16, NEXT, 1), (DATA, 512, NEXT, 0))


@driven("desc.total")
def more_than_four_gigabytes(hand: Hand) -> None:
    hand.desc(0, HEADER, 16, NEXT, 1)
    hand.desc(1, DATA, 0xFFFFFFFF, WRITE, 2)
    hand.publish(0)


@driven("desc.order")
def writing_before_reading(hand: Hand) -> None:
    hand.desc(0, DATA, 512, WRITE | NEXT, 1)
    hand.desc(1, HEADER, 16, NEXT, 2)
    hand.desc(2, STATUS, 1, WRITE)
    hand.publish(0)


@driven("desc.flags")
def a_flag_of_its_own(hand: Hand) -> None:
    hand.request_at(0)
    hand.desc(2, STATUS, 1, WRITE | 8)
    hand.publish(0)


@driven("desc.reachable")
def a_buffer_outside_of_memory(hand: Hand) -> None:
    hand.request_at(0)
    hand.desc(1, MEMORY, 512, WRITE | NEXT, 2)
    hand.publish(0)


@driven("desc.free")
def buffers_that_share_a_descriptor(hand: Hand) -> None:
    hand.request_at(0)
    hand.desc(5, HEADER, 16, NEXT, 1)
    hand.publish(0, 5)


@driven("desc.kept")
def descriptors_changed_in_flight(hand: Hand) -> None:
    # The device itself changes them: they are where it is to put its data.
    hand.request_at(0)
    hand.desc(1, hand.layout.desc, 512, WRITE | NEXT, 2)
    hand.desc(1, hand.layout.desc, SIZE * 16, WRITE | NEXT, 2)
    hand.desc(3, DATA, 512 - SIZE * 16, WRITE | NEXT, 2)
    hand.desc(1, hand.layout.desc, SIZE * 16, WRITE | NEXT, 3)
    hand.publish(0)


def _table(hand: Hand, *entries: tuple[int, int, int, int], **head: int) -> None:
    hand.ram.write(HEADER, struct.pack("<IIQ", 0, 0, 0))
    hand.ram.write(TABLE, b"".join(struct.pack("<QIHH", *entry) for entry in entries))
    length = head.get("length", 16 * len(entries))
    hand.desc(0, TABLE, length, head.get("flags", INDIRECT), 1)
    hand.publish(0)


_READ = (HEADER, 16, NEXT, 1), (DATA, 512, WRITE | NEXT, 2), (STATUS, 1, WRITE, 0)


@driven("indirect.negotiated", VERSION_1)
def a_table_without_the_feature(hand: Hand) -> None:
    _table(hand, *_READ)


@driven("indirect.no-next")
def a_table_and_a_next_descriptor(hand: Hand) -> None:
    _table(hand, *_READ, flags=INDIRECT | NEXT)


@driven("indirect.not-nested")
def a_table_in_a_table(hand: Hand) -> None:
    _table(hand, (HEADER, 16, NEXT, 1), (TABLE, 16, INDIRECT, 0))


@driven("indirect.length")
def a_table_with_half_a_descriptor(hand: Hand) -> None:
    _table(hand, *_READ, length=40)


@driven("indirect.chain")
def a_chain_longer_than_the_ring(hand: Hand) -> None:
    pieces = [(DATA + 64 * at, 64, WRITE | NEXT, 2 + at) for at in range(SIZE)]
    _table(hand, (HEADER, 16, NEXT, 1), *pieces, (STATUS, 1, WRITE, 0))


@driven("notify.sent")
def no_notification(hand: Hand) -> None:
    hand.publish(hand.request_at(0), kick=False)


# Requests of a disk


@driven("blk.header")
def half_a_header(hand: Hand) -> None:
    hand.request_at(0)
    hand.desc(0, HEADER, 8, NEXT, 1)
    hand.publish(0)


@driven("blk.status")
def no_status(hand: Hand) -> None:
    hand.request_at(0)
    hand.desc(0, HEADER, 16)
    hand.publish(0)


@driven("blk.type")
def a_type_that_does_not_exist(hand: Hand) -> None:
    hand.run(kind=99)


@driven("blk.type", WANTED & ~(1 << 9))
def a_flush_without_the_feature(hand: Hand) -> None:
    hand.run(kind=4, write=0)


@driven("blk.direction")
def a_read_with_data(hand: Hand) -> None:
    hand.run(read=512)


@driven("blk.multiple")
def a_hundred_bytes(hand: Hand) -> None:
    hand.run(write=100)


@driven("blk.capacity")
def a_read_past_the_end(hand: Hand) -> None:
    hand.run(sector=131072)


@driven("blk.flush-sector")
def a_flush_with_a_sector(hand: Hand) -> None:
    hand.run(kind=4, sector=8, write=0)


@driven("blk.flush-data")
def a_flush_with_data(hand: Hand) -> None:
    hand.run(kind=4, read=512, write=0)


@driven("blk.id-length")
def eight_bytes_of_an_id(hand: Hand) -> None:
    hand.run(kind=8, write=8)


def _trim(kind: int, sector: int, count: int, flags: int) -> Callable[[Hand], object]:
    def act(hand: Hand) -> None:
        hand.ram.write(DATA, struct.pack("<QII", sector, count, flags))
        hand.run(kind=kind, read=16, write=0)

    return act


@driven("blk.trim-length")
def half_a_range(hand: Hand) -> None:
    hand.run(kind=11, read=8, write=0)


driven("blk.trim-range")(_trim(13, 131072, 8, 0))
driven("blk.trim-flags")(_trim(11, 0, 8, 1))


def _many_segments(path: str) -> None:
    """As the scripted guest reads a megabyte: it does not look at SEG_MAX."""
    with ScriptedGuest(path, timeout=20, queue_size=512, memory_size=32 << 20) as guest:
        guest.read(0, 1 << 20)


fault("blk.segments")(_many_segments)


# Translation


def _iommu(path: str, act: Callable[[ScriptedGuest], object]) -> None:
    with ScriptedGuest(path, timeout=20, iommu="strict") as guest:
        with contextlib.suppress(GuestioError):
            act(guest)
        guest.frontend.sync()


def _update(iova: int, size: int, uaddr: int, perm: int, kind: int = 2) -> Callable[[Any], object]:
    def act(guest: ScriptedGuest) -> None:
        user = guest.frontend.user_address(0)
        message = IotlbMessage(iova, size, user + uaddr, perm, kind)
        guest.frontend.request(F.IOTLB_MSG, message, has_reply=True)

    return act


for _demand, _message in (
    ("iotlb.type", _update(0, 4096, 0, 3, 7)),
    ("iotlb.range", _update(0, 0, 0, 3)),
    ("iotlb.permission", _update(0, 4096, 0, 0)),
    ("iotlb.in-memory", _update(0, 4096, 1 << 41, 3)),
):

    def _told(path: str, act: Callable[[Any], object] = _message) -> None:
        _iommu(path, act)

    fault(_demand)(_told)


@fault("iotlb.negotiated")
def a_translation_without_an_iommu(path: str) -> None:
    with Hand(path) as hand:
        hand.boot()
        message = IotlbMessage(0, 4096, hand.user_address(0), 3, 2)
        hand.request(F.IOTLB_MSG, message, has_reply=True)


def _missed(action: MissAction) -> Fault:
    def run(path: str) -> None:
        def act(guest: ScriptedGuest) -> None:
            guest.read(0, 512)
            guest.frontend.iotlb.miss_hook = lambda _: MissAnswer(action)
            request = guest.submit_read(0, 512)
            deadline = time.monotonic() + 1
            while not request.done and time.monotonic() < deadline:
                guest.poll()
                time.sleep(0.01)

        _iommu(path, act)

    return run


fault("iotlb.miss-answered")(_missed(MissAction.IGNORE))
fault("iotlb.miss-covered")(_missed(MissAction.CLAIM))


def _back(data: bytes) -> Fault:
    def run(path: str) -> None:
        with Hand(path) as hand:
            hand.boot()
            assert hand.iotlb._channel is not None
            hand.iotlb._channel.send(data)
            hand.sync()
            hand.run()

    return run


fault("channel.asked")(_back(struct.pack("<IIIQ", 1, 1 | 4, 8, 0)))
fault("channel.reply")(_back(struct.pack("<IIIQ", 1, 1, 8, 0)))
