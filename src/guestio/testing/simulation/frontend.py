"""A simulated front-end: what a VMM tells a back-end, one operation at a time, without waiting.

Operations are generators. Each yields the answer that it goes on with, and is resumed when that is
there; meanwhile everybody else acts. What it tells follows QEMU, where several orders are legal.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Final, TypeAlias

import numpy as np

from guestio._core.virtio.inflight import part_size
from guestio.testing.simulation.guest import SIZE, Guest, Placed, Ring, Snatched
from guestio.testing.simulation.memory import EXTRA, LOW, PAGE, USER
from guestio.testing.simulation.wire import Answer, Wire
from guestio.testing.simulation.workload import InvariantError
from guestio.vhost_user.messages import (
    LOG_PAGE,
    U64,
    VHOST_F_LOG_ALL,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VHOST_VRING_F_LOG,
    VIRTIO_F_ACCESS_PLATFORM,
    BackendRequest,
    FrontendRequest,
    Header,
    Inflight,
    IotlbMessage,
    IotlbType,
    Log,
    MemoryTable,
    Payload,
    ProtocolFeature,
    SingleMemoryRegion,
    VringAddr,
    VringFd,
    VringState,
    request_name,
)
from guestio.virtio.device import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_VERSION_1,
)

_F = FrontendRequest

Operation: TypeAlias = Generator[Answer, None, None]
"""Something that the front-end does; it yields what it waits for."""

_PROTOCOL: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.LOG_SHMFD
)
# struct inflight_split_region of QEMU's docs/interop/vhost-user.rst: its head, and its entries,
# each of which begins with whether the request is in flight.
_NOTES_HEAD, _NOTES_ENTRY = 16, 16
_PROTOCOL_BIT: Final = 1 << VHOST_USER_F_PROTOCOL_FEATURES
_LOG_BIT: Final = 1 << VHOST_F_LOG_ALL
_LOG_BYTES: Final = (EXTRA.guest + EXTRA.pages * PAGE) // LOG_PAGE // 8 + 1


class Notes:
    """The region of requests in flight, which outlives back-ends."""

    def __init__(self, description: Inflight, fd: int) -> None:
        self.description, self.fd = description, fd

    def snapshot(self) -> bytes:
        """What is in it."""
        return os.pread(self.fd, self.description.mmap_size, self.description.mmap_offset)

    def restore(self, content: bytes) -> None:
        """Have it as it was."""
        os.pwrite(self.fd, content, self.description.mmap_offset)

    def count(self, index: int) -> int:
        """How many requests of a queue are in flight."""
        at = index * part_size(SIZE) + _NOTES_HEAD
        return sum(self.snapshot()[at : at + _NOTES_ENTRY * SIZE : _NOTES_ENTRY])

    def close(self) -> None:
        """Let it go."""
        os.close(self.fd)


class DirtyLog:
    """A dirty log, and a destination to which pages are copied as it tells.

    Attributes:
        fd: The log's file.
        on: Whether the back-end has acknowledged that it marks.
        by_guest: Pages that the guest itself has changed since the last harvest.
        marked: Pages that were marked and not harvested.
    """

    def __init__(self, content: bytes) -> None:
        self.fd = os.memfd_create("guestio-log", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, _LOG_BYTES)
        self.on = False
        self.by_guest: set[int] = set()
        self._copy = np.frombuffer(bytearray(content), np.uint8)

    def is_marked(self, guest: int) -> bool:
        """Whether the page at a guest physical address is marked."""
        page = guest // LOG_PAGE
        return bool(os.pread(self.fd, 1, page // 8)[0] >> page % 8 & 1)

    def harvest(self, guest: Guest) -> int:
        """Copy what was changed; how many pages."""
        memory, copied = guest.memory, 0
        for page in range(len(memory.bytes) // PAGE):
            at = memory.guest_address(page)
            marked = self.is_marked(at)
            if marked:
                number = at // LOG_PAGE
                byte = os.pread(self.fd, 1, number // 8)[0] & ~(1 << number % 8)
                os.pwrite(self.fd, bytes([byte]), number // 8)
            if marked or page in self.by_guest:
                span = slice(page * PAGE, (page + 1) * PAGE)
                self._copy[span] = memory.bytes[span]
                copied += 1
        self.by_guest.clear()
        return copied

    def compare(self, guest: Guest) -> None:
        """The destination has what the source has.

        Raises:
            InvariantError: A page was changed and never told of.
        """
        differ = (self._copy != guest.memory.bytes).reshape(-1, PAGE).any(axis=1)
        for page in np.flatnonzero(differ):
            at = guest.memory.guest_address(int(page))
            raise InvariantError("L9", f"a migrated guest lacks what was written to page {at:#x}")

    def close(self) -> None:
        """Let it go."""
        os.close(self.fd)


class Frontend:
    """A front-end and its connection to one back-end.

    Args:
        guest: Whose memory and rings it has.
        rng: Of its choices.
        tracked: Whether requests in flight are noted.
        notes: Those of the back-end before.

    Attributes:
        wire: The connection.
        notes, log: As they are now, if they are.
        connected: Whether it is past the negotiation.
        revoking: What is being unmapped and was not yet acknowledged.
    """

    def __init__(
        self, guest: Guest, rng: random.Random, *, tracked: bool, notes: Notes | None
    ) -> None:
        self.guest = guest
        self.wire = Wire()
        self.notes = notes
        self.log: DirtyLog | None = None
        self.connected = False
        self.features = 0
        self._rng = rng
        self._tracked = tracked
        self._acked = rng.random() < 0.8
        self._operation: Operation | None = None
        self._awaited: Answer | None = None
        self._name = ""
        self._pushed: list[tuple[Answer, Callable[[], None]]] = []
        self._logged_flag = False
        self.revoking: list[Placed] = []

    # Messages

    def _ask(
        self, request: int, payload: Payload | bytes = b"", fds: Sequence[int] = ()
    ) -> Generator[Answer, None, Answer]:
        answer = self.wire.send(request, payload, fds, answered=True)
        yield answer
        return answer

    def _number(self, request: int) -> Generator[Answer, None, int]:
        answer = yield from self._ask(request)
        assert answer.payload is not None
        return U64.decode(answer.payload).value

    def _tell(
        self, request: int, payload: Payload | bytes = b"", fds: Sequence[int] = ()
    ) -> Operation:
        if not self._acked:
            self.wire.send(request, payload, fds, answered=False)
            return
        answer = self.wire.send(request, payload, fds, answered=True, need_reply=True)
        yield answer
        assert answer.payload is not None
        if U64.decode(answer.payload).value:
            raise InvariantError("L10", f"the back-end refused a right {request_name(request)}")

    def _sync(self) -> Operation:
        """Have everything obeyed that was told, as QEMU does where nothing is acknowledged."""
        if not self._acked:
            yield from self._number(_F.GET_FEATURES)

    # Operations

    @property
    def busy(self) -> str:
        """What it does at the moment."""
        return self._name if self._operation is not None else ""

    def begin(self, operation: Operation, name: str) -> None:
        """Begin something, when nothing is under way."""
        assert self._operation is None
        self._operation, self._name = operation, name
        self._awaited = None
        self.go_on()

    @property
    def waits(self) -> bool:
        """Whether it waits for anything of the back-end's."""
        return self._operation is not None or bool(self._pushed)

    def go_on(self) -> None:
        """Resume what has its answer."""
        for each in list(self._pushed):
            if each[0].payload is not None:
                self._pushed.remove(each)
                each[1]()
        while self._operation is not None:
            if self._awaited is not None and self._awaited.payload is None:
                return
            try:
                self._awaited = next(self._operation)
            except StopIteration:
                self._operation = self._awaited = None

    def connect(self) -> Operation:
        """Negotiate, share memory, start all rings."""
        offered = yield from self._number(_F.GET_FEATURES)
        able = yield from self._number(_F.GET_PROTOCOL_FEATURES)
        wanted = _PROTOCOL | (ProtocolFeature.INFLIGHT_SHMFD if self._tracked else 0)
        if not self._acked and not self.guest.translating:
            wanted &= ~ProtocolFeature.REPLY_ACK
        acked, self._acked = self._acked, False
        yield from self._tell(_F.SET_PROTOCOL_FEATURES, U64(able & wanted))
        self._acked = acked
        yield from self._tell(_F.SET_OWNER)
        back = self.wire.back_channel()
        try:
            yield from self._tell(_F.SET_BACKEND_REQ_FD, fds=[back])
        finally:
            os.close(back)
        known = 1 << VIRTIO_F_VERSION_1 | ((1 << 24) - 1)
        if self.guest.translating:
            known |= 1 << VIRTIO_F_ACCESS_PLATFORM
        else:
            known |= 1 << VIRTIO_F_INDIRECT_DESC
        if self._rng.random() < 0.7 or self.guest.rings:
            known |= 1 << VIRTIO_F_EVENT_IDX
        self.features = self.guest.features if self.guest.rings else offered & known
        if self.guest.translating and not self.features >> VIRTIO_F_ACCESS_PLATFORM & 1:
            raise InvariantError("L10", "the device offers no IOMMU (VIRTIO_F_ACCESS_PLATFORM)")
        if not self.guest.rings:
            self.guest.make_rings(self.features)
        yield from self._set_features()
        yield from self._share()
        yield from self.start(kick=not self._tracked)
        self.connected = True

    def _set_features(self) -> Operation:
        log = _LOG_BIT if self._logged_flag else 0
        yield from self._tell(_F.SET_FEATURES, U64(self.features | _PROTOCOL_BIT | log))

    def _share(self) -> Operation:
        memory = self.guest.memory
        places = memory.places
        if self._rng.random() < 0.5:
            table = MemoryTable(tuple(place.message for place in places))
            yield from self._tell(_F.SET_MEM_TABLE, table, [memory.fd] * len(places))
        else:
            for place in places:
                region = SingleMemoryRegion(place.message)
                yield from self._tell(_F.ADD_MEM_REG, region, [memory.fd])

    def start(self, *, kick: bool = True) -> Operation:
        """Start all rings where they stopped."""
        if self._tracked:
            yield from self._share_notes()
        if self._acked and self._rng.random() < 0.5:
            yield from self._tell(_F.SET_STATUS, U64(15))
        for ring in self.guest.rings:
            index = ring.index
            yield from self._tell(_F.SET_VRING_NUM, VringState(index, SIZE))
            yield from self._tell(_F.SET_VRING_BASE, VringState(index, ring.base))
            yield from self._set_address(ring)
            fds = [
                (_F.SET_VRING_ERR, ring.err),
                (_F.SET_VRING_CALL, ring.call),
                (_F.SET_VRING_KICK, ring.kick),
            ]
            if self._rng.random() < 0.3:
                fds.reverse()
            for request, fd in fds:
                if request == _F.SET_VRING_KICK:
                    ring.running = True
                    self.guest.grant()
                yield from self._tell(request, VringFd(index, has_fd=True), [fd])
            yield from self._tell(_F.SET_VRING_ENABLE, VringState(index, 1))
            if self.guest.translating and self._rng.random() < 0.5:
                self._update(ring.window // PAGE + 2)
            if kick and ring.queue.outstanding:
                ring.announce()

    def _set_address(self, ring: Ring) -> Operation:
        desc, avail, used = ring.parts
        address = VringAddr(ring.index, 0, desc, used, avail)
        if self._logged_flag:
            at = self.guest.memory.guest_address(ring.pages[2])
            address = replace(address, flags=1 << VHOST_VRING_F_LOG, log=at)
        yield from self._tell(_F.SET_VRING_ADDR, address)

    def _share_notes(self) -> Operation:
        if self.notes is None:
            wanted = Inflight(0, 0, len(self.guest.rings), SIZE)
            answer = yield from self._ask(_F.GET_INFLIGHT_FD, wanted)
            assert answer.payload is not None
            self.notes = Notes(Inflight.decode(answer.payload), answer.fds.pop())
        yield from self._tell(_F.SET_INFLIGHT_FD, self.notes.description, [self.notes.fd])

    def stop(self) -> Operation:
        """Stop all rings; what the device has taken is given back before."""
        for ring in self.guest.rings:
            answer = yield from self._ask(_F.GET_VRING_BASE, VringState(ring.index, 0))
            assert answer.payload is not None
            base = VringState.decode(answer.payload).num
            behind = (base - ring.used_idx) & 0xFFFF
            if behind and not self._noted(ring, behind):
                raise InvariantError(
                    "L14",
                    f"ring {ring.index} stopped at {base}, with the used index at "
                    f"{ring.used_idx}: what is in between is lost, or done twice",
                )
            ring.base, ring.running = base, False
            self.guest.grant()
        # From here to the next start the guest may unmap without a word to the back-end: as QEMU.
        self.guest.all_released()

    def _noted(self, ring: Ring, behind: int) -> bool:
        """Whether requests that a ring has passed are told by the notes.

        Only those may that an earlier back-end left behind: no index tells what it gave back out of
        order.
        """
        left = [placed for placed in ring.queue.tokens if placed in ring.recovered]
        return self.notes is not None and behind == self.notes.count(ring.index) <= len(left)

    def pause(self) -> Operation:
        """Stop and start, as for a snapshot."""
        yield from self.stop()
        if self._acked and self._rng.random() < 0.5:
            yield from self._tell(_F.SET_STATUS, U64(0))
        yield from self.start()

    def reload(self) -> Operation:
        """The guest's driver is unloaded and loaded: other rings, other addresses."""
        early = self._acked and self._rng.random() < 0.4
        if early:
            yield from self._tell(_F.SET_STATUS, U64(0))
        yield from self.stop()
        if self._acked and not early:
            if self._rng.random() < 0.5:
                yield from self._tell(_F.SET_STATUS, U64(0))
            else:
                yield from self._tell(_F.RESET_DEVICE)
        while self._pushed:
            yield self._pushed[0][0]
        self.guest.all_released()
        self.guest.make_rings(self.features)
        if self.notes is not None:
            self.notes.close()
            self.notes = None
        yield from self._set_features()
        yield from self.start()

    def plug(self) -> Operation:
        """The extra region comes, or goes if nothing is in it."""
        memory, region = self.guest.memory, SingleMemoryRegion(EXTRA.message)
        if not memory.extra:
            yield from self._tell(_F.ADD_MEM_REG, region, [memory.fd])
            yield from self._sync()
            memory.extra = True
        elif memory.extra_is_free:
            memory.extra = False
            yield from self._tell(_F.REM_MEM_REG, region)

    def start_log(self) -> Operation:
        """A migration begins."""
        if self.log is not None:
            self.log.close()
        log = self.log = DirtyLog(self.guest.memory.snapshot())
        yield from self._ask(_F.SET_LOG_BASE, Log(_LOG_BYTES, 0), [log.fd])
        self._logged_flag = True
        yield from self._set_features()
        for ring in self.guest.rings:
            yield from self._set_address(ring)
        yield from self._sync()
        # What was written before it was on is copied now.
        log.by_guest.update(range(len(self.guest.memory.bytes) // PAGE))
        log.on = True

    def end_log(self) -> Operation:
        """A migration is over: the guest stops, and what arrived is compared with what was sent."""
        log = self.log
        assert log is not None
        yield from self.stop()
        log.by_guest |= self.guest.memory.begin_watching()
        log.harvest(self.guest)
        log.compare(self.guest)
        log.on = self._logged_flag = False
        yield from self._set_features()
        yield from self.start()

    def lie(self) -> Operation:
        """Say what the back-end must refuse."""
        choice = self._rng.randrange(4)
        if choice == 0:
            wrong = SingleMemoryRegion(replace(LOW.message, user_addr=USER + (1 << 40)))
            answer = self._refusable(_F.ADD_MEM_REG, wrong, [self.guest.memory.fd])
        elif choice == 1:
            wrong = SingleMemoryRegion(replace(LOW.message, size=PAGE))
            answer = self._refusable(_F.REM_MEM_REG, wrong)
        elif choice == 2:
            answer = self._refusable(_F.SET_VRING_NUM, VringState(200, SIZE))
        else:
            answer = self._refusable(_F.SET_VRING_NUM, VringState(0, 3))
        yield answer
        assert answer.payload is not None
        if not U64.decode(answer.payload).value:
            raise InvariantError(
                "L10", f"the back-end took a wrong {request_name(answer.request)} for right"
            )

    def _refusable(self, request: int, payload: Payload, fds: Sequence[int] = ()) -> Answer:
        return self.wire.send(request, payload, fds, answered=True, need_reply=True)

    @property
    def may_lie(self) -> bool:
        """Whether it hears of a refusal."""
        return self._acked

    # The IOMMU

    def _push(self, message: IotlbMessage, then: Callable[[], None]) -> None:
        answer = self.wire.send(_F.IOTLB_MSG, message.encode(), answered=True, need_reply=True)
        self._pushed.append((answer, then))

    def _update(self, page: int, then: Callable[[], None] = lambda: None) -> None:
        entry = self.guest.tables.mapped[page]
        self._push(
            IotlbMessage.update(page * PAGE, PAGE, USER + entry.page * PAGE, entry.access), then
        )

    def answer_miss(self, *, refuse: bool = False) -> str:
        """Answer the oldest miss."""
        header, payload = self.wire.requests.popleft()
        if header.request != BackendRequest.IOTLB_MSG:
            if header.need_reply:
                self.wire.reply(header.request, 0)
            return "other"
        message = IotlbMessage.decode(payload)
        if message.type != IotlbType.MISS:
            return "access fail"
        entry = self.guest.tables.mapped.get(message.iova // PAGE)
        if refuse or entry is None or entry.refused or message.perm & ~entry.access:
            if header.need_reply:
                self.wire.reply(header.request, 1)
            return f"refused {message.iova:#x}"
        self._update(message.iova // PAGE, lambda: self._answered(header))
        return f"{message.iova:#x}"

    def _answered(self, header: Header) -> None:
        if header.need_reply:
            self.wire.reply(header.request, 0)

    def unmap(self, placed: Placed) -> None:
        """Have the back-end forget what a job's memory was mapped at."""
        left = len(placed.mapped)
        self.revoking.append(placed)

        def one_less() -> None:
            nonlocal left
            left -= 1
            if not left:
                self.revoking.remove(placed)
                self.guest.released(placed)

        for iova, count in placed.mapped:
            self._push(IotlbMessage.invalidate(iova, count * PAGE), one_less)

    def invalidate(self, what: Snatched) -> None:
        """Have the back-end forget what memory in use was mapped at."""
        message = IotlbMessage.invalidate(what.iova, len(what.pages) * PAGE)
        self._push(message, lambda: self.guest.snatched(what))

    def abandon(self) -> None:
        """The connection is gone, and what was under way."""
        if self._operation is not None:
            self._operation.close()
        self._operation = self._awaited = None
        self._pushed.clear()
        self.wire.close()
        if self.log is not None:
            self.log.close()
            self.log = None
