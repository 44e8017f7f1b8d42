"""A split ring as a judge serves it: every index, descriptor and table is looked at.

A ring is walked here without the compiled core, so that what the core overlooks is found too. All
that is available is taken before anything is completed: whatever the driver does with descriptors
of buffers in flight is seen then.

Source: virtio 1.4 section 2.7.
"""

from __future__ import annotations

import select
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NoReturn

from guestio._core.base.syscalls import drain_eventfd, notify_eventfd
from guestio.addr import Permissions
from guestio.errors import MemoryVanishedError
from guestio.faults.frontend.reach import Miss, MissingError, Piece, Reach, UnreachableError
from guestio.peer.foreign import Eventfd, PipeNotifier
from guestio.virtio.driver import AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE
from guestio.virtio.layout import RingLayout

if TYPE_CHECKING:
    from guestio.faults.frontend.demands import Book
    from guestio.vhost_user.messages import VringAddr

_DESC: Final = struct.Struct("<QIHH")
_U16: Final = struct.Struct("<H")
_USED: Final = struct.Struct("<II")
_KNOWN_FLAGS: Final = DESC_F_NEXT | DESC_F_WRITE | DESC_F_INDIRECT
_WRAP: Final = 0xFFFF
_MOST_BYTES: Final = 1 << 32
_LONGEST_TABLE: Final = 1 << 16
AT_A_TIME: Final = 1024
"""Buffers that are taken before others are completed."""


class BrokenRingError(Exception):
    """The ring cannot be gone on with; what is wrong was noted."""


@dataclass(slots=True)
class Taken:
    """A buffer that was taken out of the ring.

    Attributes:
        head: Index of its first descriptor.
        descriptors: Indices of all its descriptors in the ring's table, and their bytes.
        table: Address and bytes of its indirect table, if it has one.
        readable: Where the device reads.
        writable: Where it writes.
        segments: Descriptors of what is read, and of what is written.
        fault: Why some of it cannot be reached.
    """

    head: int
    descriptors: list[tuple[int, bytes]] = field(default_factory=list)
    table: tuple[int, bytes] | None = None
    readable: list[Piece] = field(default_factory=list)
    writable: list[Piece] = field(default_factory=list)
    segments: tuple[int, int] = (0, 0)
    fault: str = ""


Serve = Callable[[Taken], "int | None"]
"""Serves a buffer: bytes written, or None to keep it."""


class JudgedRing:
    """One ring of a judge's device.

    Args:
        index: Its number.
        book: Where to note what is seen.
        reach: Memory.

    Attributes:
        num: Entries; 0 before SET_VRING_NUM.
        address: Where it is; None before SET_VRING_ADDR.
        base: Where to begin, as it was set.
        stopped_at: Where it stopped last; None before.
        enabled: Whether it is enabled.
        started: Whether it was started and not stopped.
        kick, call, err: Its descriptors.
        next: The available index that is taken next.
        used: The used index.
        event_idx, indirect: Whether these features were negotiated.
        broken: Whether it cannot be gone on with.
        late_since: Since when there are buffers without a notification.
    """

    def __init__(self, index: int, book: Book, reach: Reach) -> None:
        self.index = index
        self._book, self._reach = book, reach
        self.num = 0
        self.address: VringAddr | None = None
        self.base = 0
        self.stopped_at: int | None = None
        self.enabled = False
        self.started = False
        self.kick: Eventfd | None = None
        self.call: Eventfd | PipeNotifier | None = None
        self.err: Eventfd | None = None
        self.next = self.used = 0
        self.event_idx = self.indirect = False
        self.broken = False
        self.late_since: float | None = None
        self._fresh = True
        self._flying: list[Taken] = []
        self._busy: dict[int, int] = {}
        self._parts = (0, 0, 0)

    @property
    def live(self) -> bool:
        """Whether it is to be served."""
        return self.started and self.enabled and not self.broken

    def start(self, *, event_idx: bool, indirect: bool) -> None:
        """Begin at the base that was set; its parts are known."""
        self.event_idx, self.indirect = event_idx, indirect
        self.next = self.used = self.base
        self.started, self.broken, self._fresh = True, False, True
        self.late_since = None
        self._flying.clear()
        self._busy.clear()

    def place(self, desc: int, avail: int, used: int) -> None:
        """Say where its parts are for :class:`Reach`."""
        self._parts = (desc, avail, used)

    def stop(self) -> int:
        """Stop it; where it stopped. It is not accessed afterwards."""
        if self.started:
            self.stopped_at = self.base = self.used
        self.started = False
        self._flying.clear()
        self._busy.clear()
        self.set_kick(None)
        return self.base

    def forget(self) -> None:
        """Forget how it was set up, as a reset does; where it stopped is kept."""
        self.stop()
        self.num, self.address, self.enabled = 0, None, False
        self.stopped_at = None

    def set_kick(self, kick: Eventfd | None) -> None:
        """Use another descriptor."""
        before, self.kick = self.kick, kick
        if before is not None:
            before.close()

    def set_call(self, call: Eventfd | PipeNotifier | None) -> None:
        """Use another descriptor."""
        before, self.call = self.call, call
        if before is not None:
            before.close()

    def set_err(self, err: Eventfd | None) -> None:
        """Use another descriptor."""
        before, self.err = self.err, err
        if before is not None:
            before.close()

    def close(self) -> None:
        """Close its descriptors."""
        self.set_kick(None)
        self.set_call(None)
        self.set_err(None)

    def clear_kick(self) -> bool:
        """Take a notification; whether there was one."""
        if self.kick is None:
            return False
        poll = select.poll()
        poll.register(self.kick, select.POLLIN)
        if not poll.poll(0):
            return False
        drain_eventfd(self.kick.fileno())
        return True

    # Serving

    def look(self) -> bool:
        """Whether there are buffers that were not taken."""
        try:
            return self._reach.load(self._parts[1] + 2) != self.next
        except (MissingError, UnreachableError, MemoryVanishedError):
            return False

    def serve(self, serve: Serve) -> None:
        """Take what is available, judge it, and complete it.

        Raises:
            MissingError: Translations are missing; to be called again once they are there.
            BrokenRingError: It cannot be gone on with.
        """
        try:
            self._check_parts()
            missing = None
            while True:
                try:
                    while self._take_available():
                        pass
                except MissingError as error:
                    missing = error
                completed = self._complete(serve)
                if missing is not None:
                    raise missing
                if not completed and not self._ask_for_kick():
                    return
        except UnreachableError as error:
            self._unreachable("vring.in-memory", f"ring {self.index}", error)
        except MemoryVanishedError as error:
            self._broken("memory.stays", str(error))

    def _check_parts(self) -> None:
        """Have the translations of all three parts before anything is looked at."""
        misses = []
        for start, length, access in zip(
            self._parts,
            (
                RingLayout.desc_bytes(self.num),
                RingLayout.avail_bytes(self.num) - 2 * (not self.event_idx),
                RingLayout.used_bytes(self.num) - 2 * (not self.event_idx),
            ),
            (Permissions.READ, Permissions.READ, Permissions.WRITE),
            strict=True,
        ):
            try:
                self._reach.pieces(start, length, access)
            except MissingError as error:
                misses += error.misses
        if misses:
            raise MissingError(misses)

    def _broken(self, name: str, reason: str) -> NoReturn:
        self._book.judge(name, False, reason)
        raise BrokenRingError(reason)

    def _unreachable(self, name: str, where: str, error: UnreachableError) -> NoReturn:
        """Give the ring up, and say why unless that was said."""
        if error.judged:
            raise BrokenRingError(str(error)) from None
        self._broken(name, f"{where}: {error}")

    def _take_available(self) -> bool:
        """Take what is available now; whether that was anything."""
        judge, reach, num = self._book.judge, self._reach, self.num
        index = reach.load(self._parts[1] + 2)
        waiting = (index - self.next) & _WRAP
        where = f"ring {self.index}: available index {index} after {self.next}"
        if self._fresh:
            if not judge("vring.base-fits", waiting <= num, f"{where}, {num} entries"):
                raise BrokenRingError(where)
            self._fresh = False
        if not waiting or len(self._flying) >= AT_A_TIME:
            return False
        if not judge("avail.index-grows", waiting < 0x8000, where):
            raise BrokenRingError(where)
        outstanding = (index - self.used) & _WRAP
        if not judge(
            "avail.room", outstanding <= num, f"{where}: {outstanding} buffers in {num} entries"
        ):
            raise BrokenRingError(where)
        flags = reach.load(self._parts[1])
        judge(
            "avail.flags",
            not flags & ~AVAIL_F_NO_INTERRUPT,
            f"ring {self.index}: flags of the available ring are {flags:#x}",
        )
        if self.event_idx:
            judge(
                "avail.flags-event-idx",
                not flags,
                f"ring {self.index}: flags of the available ring are {flags:#x} with EVENT_IDX",
            )
        for _ in range(waiting):
            at = self._parts[1] + 4 + 2 * (self.next % num)
            head = reach.load(at)
            taken = self._walk(head)
            self._flying.append(taken)
            for each, _raw in taken.descriptors:
                self._busy[each] = head
            self.next = (self.next + 1) & _WRAP
        return True

    def _walk(self, head: int) -> Taken:
        """Follow a chain, judge its descriptors, and find its memory."""
        judge, num = self._book.judge, self.num
        where = f"ring {self.index}, buffer {self.next}"
        if not judge("avail.head", head < num, f"{where}: descriptor {head} of {num}"):
            raise BrokenRingError(where)
        clash = self._busy.get(head)
        if not judge(
            "avail.head-free",
            clash != head,
            f"{where}: descriptor {head} begins a buffer that is in flight",
        ):
            raise BrokenRingError(where)
        taken = Taken(head)
        buffers: list[tuple[int, int, int]] = []
        index, seen = head, set[int]()
        while True:
            if not judge(
                "desc.no-loop", index not in seen, f"{where}: descriptor {index} comes twice"
            ):
                raise BrokenRingError(where)
            seen.add(index)
            judge(
                "desc.free",
                index not in self._busy,
                f"{where}: descriptor {index} belongs to a buffer that is in flight",
            )
            raw = self._reach.read(self._parts[0] + 16 * index, 16)
            taken.descriptors.append((index, raw))
            addr, length, flags, following = _DESC.unpack(raw)
            self._judge_flags(flags, f"{where}, descriptor {index}")
            if flags & DESC_F_INDIRECT:
                self._walk_table(taken, buffers, (addr, length, flags), where)
                break
            buffers.append((addr, length, flags))
            if not flags & DESC_F_NEXT:
                break
            if not judge(
                "desc.next",
                following < num,
                f"{where}: descriptor {index} goes on at {following} of {num}",
            ):
                raise BrokenRingError(where)
            index = following
        self._judge_buffers(taken, buffers, where)
        return taken

    def _judge_flags(self, flags: int, where: str) -> None:
        self._book.judge("desc.flags", not flags & ~_KNOWN_FLAGS, f"{where}: flags {flags:#x}")

    def _walk_table(
        self,
        taken: Taken,
        buffers: list[tuple[int, int, int]],
        descriptor: tuple[int, int, int],
        where: str,
    ) -> None:
        judge = self._book.judge
        addr, length, flags = descriptor
        where = f"{where}, indirect table at {addr:#x}"
        negotiated = judge("indirect.negotiated", self.indirect, f"{where}: not negotiated")
        judge("indirect.no-next", not flags & DESC_F_NEXT, f"{where}: has a next descriptor")
        whole = judge("indirect.length", length and not length % 16, f"{where}: has {length} bytes")
        if not negotiated or not whole:
            raise BrokenRingError(where)
        count = min(length // 16, _LONGEST_TABLE)
        try:
            table = self._reach.read(addr, 16 * count)
        except UnreachableError as error:
            self._unreachable("desc.reachable", where, error)
        taken.table = addr, table
        index, seen = 0, set[int]()
        while True:
            if not judge("desc.no-loop", index not in seen, f"{where}: entry {index} comes twice"):
                raise BrokenRingError(where)
            seen.add(index)
            start, size, flags, following = _DESC.unpack_from(table, 16 * index)
            self._judge_flags(flags, f"{where}, entry {index}")
            if not judge(
                "indirect.not-nested",
                not flags & DESC_F_INDIRECT,
                f"{where}: entry {index} refers to another table",
            ):
                raise BrokenRingError(where)
            buffers.append((start, size, flags))
            if not flags & DESC_F_NEXT:
                return
            if not judge(
                "desc.next",
                following < count,
                f"{where}: entry {index} goes on at {following} of {count}",
            ):
                raise BrokenRingError(where)
            index = following

    def _judge_buffers(self, taken: Taken, buffers: list[tuple[int, int, int]], where: str) -> None:
        judge = self._book.judge
        # An entry of the ring that refers to a table is not one of the chain's own.
        judge(
            "indirect.chain",
            len(buffers) <= self.num,
            f"{where}: {len(buffers)} descriptors, the ring has {self.num} entries",
        )
        total = sum(length for _, length, _ in buffers)
        if not judge("desc.total", total <= _MOST_BYTES, f"{where}: {total:#x} bytes"):
            raise BrokenRingError(where)
        directions = [flags & DESC_F_WRITE for _, _, flags in buffers]
        if not judge(
            "desc.order",
            directions == sorted(directions),
            f"{where}: a descriptor to read comes after one to write",
        ):
            raise BrokenRingError(where)
        writes = directions.count(DESC_F_WRITE)
        taken.segments = len(buffers) - writes, writes
        misses: list[Miss] = []
        judged = False
        for addr, length, flags in buffers:
            writable = flags & DESC_F_WRITE
            access = Permissions.WRITE if writable else Permissions.READ
            try:
                found = self._reach.pieces(addr, length, access)
            except MissingError as error:
                misses += error.misses
            except UnreachableError as error:
                taken.fault = taken.fault or str(error)
                judged |= error.judged
            else:
                (taken.writable if writable else taken.readable).extend(found)
        if misses:
            raise MissingError(misses)
        if not judged:
            judge("desc.reachable", not taken.fault, f"{where}: {taken.fault}")

    def _complete(self, serve: Serve) -> int:
        """Serve what was taken, publish it, and notify; how much that was."""
        done, kept = 0, []
        before = self.used
        for taken in self._flying:
            written = serve(taken)
            if written is None:
                kept.append(taken)
                continue
            self._judge_kept(taken)
            at = self._parts[2] + 4 + 8 * (self.used % self.num)
            self._reach.write(at, _USED.pack(taken.head, written))
            self.used = (self.used + 1) & _WRAP
            done += 1
            for each, _raw in taken.descriptors:
                self._busy.pop(each, None)
        self._flying = kept
        if done:
            self._book.met("memory.stays", done)
            self._reach.store(self._parts[2] + 2, self.used)
            if self._wants_call(before):
                self.notify()
        return done

    def _judge_kept(self, taken: Taken) -> None:
        """Whether the descriptors of a buffer are as they were when it was taken."""
        for index, raw in taken.descriptors:
            self._book.judge(
                "desc.kept",
                self._reach.read(self._parts[0] + 16 * index, 16) == raw,
                f"ring {self.index}: descriptor {index} was changed while its buffer was in flight",
            )
        if taken.table is not None:
            addr, raw = taken.table
            try:
                same = self._reach.read(addr, len(raw)) == raw
            except (MissingError, UnreachableError):
                return
            self._book.judge(
                "desc.kept",
                same,
                f"ring {self.index}: the indirect table at {addr:#x} was changed while its buffer "
                "was in flight",
            )

    def _wants_call(self, before: int) -> bool:
        avail = self._parts[1]
        if self.event_idx:
            event = self._reach.load(avail + 4 + 2 * self.num)
            return (self.used - event - 1) & _WRAP < (self.used - before) & _WRAP
        return not self._reach.load(avail) & AVAIL_F_NO_INTERRUPT

    def notify(self) -> None:
        """Notify the driver."""
        if self.call is not None:
            notify_eventfd(self.call.fileno())

    def report_error(self) -> None:
        """Tell the front-end that the ring is broken."""
        if self.err is not None:
            notify_eventfd(self.err.fileno())

    def _ask_for_kick(self) -> bool:
        """Have the driver notify of the next buffer; whether there is one already."""
        if self.event_idx:
            self._reach.store(self._parts[2] + 4 + 8 * self.num, self.next)
        return self._reach.load(self._parts[1] + 2) != self.next and (len(self._flying) < AT_A_TIME)
