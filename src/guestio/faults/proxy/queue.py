"""One virtqueue that passes through a proxy: its notifications, and what is seen of its ring."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from guestio._core.iommu.address_space import AddressSpace
from guestio._core.trace.latencies import Latencies
from guestio._core.virtio.observer import EventRelay, RingObserver
from guestio.budgets import PROXY_MISS_AGAIN
from guestio.errors import ProtocolError
from guestio.faults.misbehavior.force import Faults
from guestio.faults.proxy.own_rings import OwnRings
from guestio.memory.backing import close_fd
from guestio.peer.foreign import PipeNotifier, is_eventfd, is_pipe
from guestio.virtio.loop import EventLoop
from guestio.virtio.snapshot import QueueCounts, QueueSnapshot

KICK_RULES: Final = ("skip-kick", "late-kick", "spurious-interrupt")
"""What can go wrong when a driver announces requests."""
CALL_RULES: Final = ("skip-interrupt", "late-interrupt")
"""What can go wrong when it is notified."""

_OPERATIONS: Final = {
    0: "read",
    1: "write",
    4: "flush",
    8: "get-id",
    11: "discard",
    13: "write-zeroes",
}


class RingPlace(NamedTuple):
    """Where a ring is, and what was negotiated about it.

    Attributes:
        size: Entries.
        desc, avail, used: Addresses of its parts, as its driver's requests have them.
        event_idx, indirect: Whether these features were negotiated.
        base: Where the back-end begins.
    """

    size: int
    desc: int
    avail: int
    used: int
    event_idx: bool
    indirect: bool
    base: int


@dataclass(frozen=True)
class Request:
    """A request that a driver made available.

    Attributes:
        queue: Its queue.
        head: Identifies it in its queue until it is given back.
        known: Whether it was seen before the device gave it back. If not, nothing below is known:
            a proxy that only watches may come too late, see ``--notifications between``.
        operation: What a disk is to do (``read``, ``write``, ``flush``, ...); None for other
            devices.
        sector: Where; None likewise.
        readable, writable: Bytes that the device may read, and write.
        pieces: Each piece of memory: address, bytes, whether the device writes it.
    """

    queue: int
    head: int
    known: bool
    operation: str | None
    sector: int | None
    readable: int
    writable: int
    pieces: list[tuple[int, int, bool]] = field(repr=False)
    _space: AddressSpace | None = field(default=None, repr=False)

    def read(self, length: int = 1 << 16) -> bytes:
        """A copy of what the driver wrote, from its beginning.

        What cannot be reached, and all that is behind it, is missing. To be called at once: the
        device may give the request back meanwhile.

        Args:
            length: Bytes at most, up to 1 MiB.
        """
        return self._copy(length, written=False)

    def _copy(self, length: int, *, written: bool) -> bytes:
        found = b""
        left = min(length, 1 << 20)
        for address, size, writes in self.pieces:
            if writes != written or self._space is None or not left:
                continue
            part = self._space.read(address, min(size, left))
            if part is None:
                break
            found += part
            left -= len(part)
        return found


@dataclass(frozen=True)
class Completion:
    """A request that a device gave back.

    Attributes:
        queue, head: As of the request.
        request: The request, if it was seen.
        written: Bytes that the device says it wrote.
        seconds: How long it took, as seen from here; None if that is not known.
    """

    queue: int
    head: int
    request: Request | None
    written: int
    seconds: float | None

    def read(self, length: int = 1 << 16) -> bytes:
        """A copy of what the device wrote, from its beginning, as :meth:`Request.read`."""
        return b"" if self.request is None else self.request._copy(length, written=True)


class Watcher(Protocol):
    """What a queue tells of what it sees.

    Attributes:
        block: Whether the device is a disk.
        between: Whether notifications are passed on, rather than only looked at.
        listens: Whether requests and completions are told.
        faults: Rules of notifications; None for none.
    """

    block: bool
    between: bool
    listens: bool
    faults: Faults | None

    def untranslated(self, missing: Sequence[tuple[int, int, int]]) -> None:
        """A ring that is relayed lacks translations: addresses, bytes and accesses."""

    def requested(self, request: Request) -> None:
        """A driver made a request available."""

    def completed(self, completion: Completion) -> None:
        """A device gave one back."""

    def ring_violated(self, queue: int, who: str, what: str) -> None:
        """A driver or a device broke a rule of a ring; it is not looked at any more."""


class ProxyQueue:
    """A queue, over all front-ends of a proxy.

    Args:
        index: Its number.
        loop: Calls back for its notifications.
        watcher: Is told what is seen.
        origin: The server's number in records of tracepoints.

    Attributes:
        index: Its number.
        enabled: Whether the front-end has enabled it.
        broken: Which rule of its ring was broken, or None.
        kicks, calls: Notifications that were seen.

    For the loop's thread, but for :meth:`snapshot`.
    """

    def __init__(self, index: int, loop: EventLoop, watcher: Watcher, origin: int) -> None:
        self.index = index
        self.enabled = False
        self.broken: str | None = None
        self.kicks = self.calls = self.unseen = 0
        self._loop = loop
        self._watcher = watcher
        self._origin = origin
        self._counts = QueueCounts()
        self._latencies = Latencies()
        self._observer: RingObserver | None = None
        self._place: RingPlace | None = None
        self._space: AddressSpace | None = None
        self._asked = 0.0
        self._known: dict[int, Request] = {}
        self._kick = _Line()
        self._call = _Line()

    # Notifications.

    def set_kick(self, fd: int | None) -> int | None:
        """Take the descriptor that the driver kicks with.

        Args:
            fd: It stays the caller's. None if there is none.

        Returns:
            What the back-end is to be given instead, which stays this object's; or None to pass on
            what came.
        """
        return self._set(self._kick, fd, call=False)

    def set_call(self, fd: int | None) -> int | None:
        """Take the descriptor that notifies the driver; as :meth:`set_kick`."""
        return self._set(self._call, fd, call=True)

    def _set(self, line: _Line, fd: int | None, *, call: bool) -> int | None:
        self._disarm(line)
        line.close()
        if fd is None:
            return None
        if is_eventfd(fd):
            line.theirs = os.dup(fd)
        elif call and self._watcher.between and is_pipe(fd):
            # User-mode Linux has no eventfd for that.
            line.notifier = PipeNotifier(os.dup(fd))
            line.theirs = os.dup(line.notifier.fd)
        else:
            return None
        if self._watcher.between:
            line.ours = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._arm(line, call=call)
        return line.ours if line.ours >= 0 else None

    def _arm(self, line: _Line, *, call: bool) -> None:
        """Look at the ring whenever a line is signaled."""
        observer = self._observer
        if observer is None or line.theirs < 0 or line.relay is not None:
            return
        # A driver signals its own eventfd, the device the one that it was given.
        between = line.ours >= 0
        source = line.ours if between and call else line.theirs
        target = (line.theirs if call else line.ours) if between else -1
        relay = EventRelay(self._ring_changed, 0.0, source, observer, target=target, call=call)
        relay.by_python = self._needs_python(call=call)
        line.relay = relay
        if call:
            observer.call_fd = target
        else:
            observer.kick_fd = target
        self._loop.core.add_feed(relay)
        self._loop.add_reader(source, self._called if call else self._kicked, edge=True)
        line.source = source

    def _disarm(self, line: _Line) -> None:
        relay, line.relay = line.relay, None
        if relay is not None:
            self._loop.remove_reader(line.source)
            self._loop.core.remove_feed(relay)
            observer = self._observer
            if line is self._kick:
                self.kicks += relay.passed
                if observer is not None:
                    observer.kick_fd = -1
            else:
                self.calls += relay.passed
                if observer is not None:
                    observer.call_fd = -1
            relay.close()

    def _needs_python(self, *, call: bool) -> bool:
        faults = self._watcher.faults
        rules = CALL_RULES if call else KICK_RULES
        return self._watcher.listens or (faults is not None and faults.has(rules))

    def rules_changed(self) -> None:
        """Look at the rules again. From any thread."""
        for line, call in ((self._kick, False), (self._call, True)):
            if (relay := line.relay) is not None:
                relay.by_python = self._needs_python(call=call)

    def _kicked(self) -> None:
        self.look()
        if self._observer is None or not self._observer.relays:
            self._pass_kick()

    def _pass_kick(self) -> None:
        faults, delay = self._watcher.faults, 0.0
        if self._kick.relay is None:
            return
        if faults is not None and self._watcher.between:
            what = f"a kick of queue {self.index}"
            for fault in faults.strike(KICK_RULES, what, queue=self.index):
                match fault.rule.what.name:
                    case "skip-kick":
                        return
                    case "late-kick":
                        delay = max(delay, fault.seconds)
                    case _:
                        self._pass_on(self._call, 0.0)
        self._pass_on(self._kick, delay)

    def _called(self) -> None:
        self.look()
        if self._observer is None or not self._observer.relays:
            self._pass_call()

    def _pass_call(self) -> None:
        faults, delay = self._watcher.faults, 0.0
        if self._call.relay is None:
            return
        if faults is not None and self._watcher.between:
            what = f"a notification of queue {self.index}"
            for fault in faults.strike(CALL_RULES, what, queue=self.index):
                if fault.rule.what.name == "skip-interrupt":
                    return
                delay = max(delay, fault.seconds)
        if self._observer is not None:
            self._observer.note_notification()
        self._pass_on(self._call, delay)

    def _pass_on(self, line: _Line, delay: float) -> None:
        relay = line.relay
        if relay is None:
            return
        if not delay:
            relay.pass_on()
            return
        key = (self, line is self._call, time.monotonic())
        self._loop.set_timer(key, time.monotonic() + delay, relay.pass_on)

    # The ring.

    @property
    def watched(self) -> bool:
        """Whether its ring is in use and looked at."""
        return self._observer is not None

    def translated(self) -> None:
        """Look again if a translation that has come may tell more."""
        if self._observer is not None and self._observer.waits:
            self.look()

    def watch(self, space: AddressSpace, place: RingPlace, own: OwnRings | None = None) -> None:
        """Look at a ring from now on; nothing changes if that is so already.

        Args:
            space: What the driver's addresses lead to.
            place: Where the ring is.
            own: Has the rings that the back-end uses, if this one is relayed.
        """
        if self._observer is not None and place == self._place:
            if space is not self._space:
                self.look()
                self._space = space
                self._observer.rebind(space)
            return
        self.leave()
        try:
            if own is not None:
                own.reset(self.index, place.base)
            observer = RingObserver(
                space,
                *place[:4],
                event_idx=place.event_idx,
                indirect=place.indirect,
                base=place.base,
                queue=self.index,
                origin=self._origin,
                block=self._watcher.block,
                latencies=self._latencies,
                own=None if own is None else own.space,
                own_avail=0 if own is None else own.avail(self.index),
                own_used=0 if own is None else own.used(self.index),
            )
        except (ValueError, ProtocolError) as error:
            self._watcher.ring_violated(self.index, "driver", str(error))
            return
        self.broken = None
        self._space, self._place, self._observer = space, place, observer
        self._arm(self._kick, call=False)
        self._arm(self._call, call=True)

    def look(self) -> bool:
        """Look at the ring; whether anything has happened there."""
        observer = self._observer
        if observer is None or self.broken is not None:
            return False
        if not self._watcher.listens:
            changed = observer.look()
        else:
            requests: list[tuple[int, int, bool, int | None, int | None, int, int, list[_P]]] = []
            completions: list[tuple[int, int, int, int]] = []
            changed = observer.look(requests, completions)
            self._tell(requests, completions)
        if observer.violation is not None:
            self._report(observer.violation)
        elif observer.relays:
            self._react(observer)
        return changed

    def _react(self, observer: RingObserver) -> None:
        """Notify whom a relay has something for, and ask for what it lacks."""
        kick, observer.to_kick = observer.to_kick, False
        call, observer.to_call = observer.to_call, False
        if kick:
            self._pass_kick()
        if call:
            self._pass_call()
        if not observer.resolved_areas and self._observer is observer:
            now = time.monotonic()
            if now - self._asked >= PROXY_MISS_AGAIN:
                self._asked = now
                lacks = [(each.base, each.length, access) for each, access in observer.missing()]
                if lacks:
                    self._watcher.untranslated(lacks)

    def _tell(
        self,
        requests: list[tuple[int, int, bool, int | None, int | None, int, int, list[_P]]],
        completions: list[tuple[int, int, int, int]],
    ) -> None:
        for head, _, known, kind, sector, readable, writable, pieces in requests:
            operation = None if kind is None else _OPERATIONS.get(kind, f"operation {kind}")
            request = Request(
                self.index,
                head,
                known,
                operation,
                sector,
                readable,
                writable,
                pieces,
                self._space,
            )
            self._known[head] = request
            self._watcher.requested(request)
        for head, written, since, now in completions:
            seconds = (now - since) / 1e9 if since else None
            self._watcher.completed(
                Completion(self.index, head, self._known.pop(head, None), written, seconds)
            )

    def _ring_changed(self) -> None:
        """Go on after the loop met a broken rule, unless that ends the connection."""
        observer = self._observer
        if observer is not None and observer.violation is not None:
            self._report(observer.violation)
        for line in (self._kick, self._call):
            if line.relay is not None:
                line.relay.settle()
                line.relay.pass_on()

    def _report(self, violation: tuple[str, str]) -> None:
        """Report a rule that was broken, once."""
        if self.broken is None:
            who, what = violation
            self.broken = f"{who}: {what}"
            self._watcher.ring_violated(self.index, who, what)

    def leave(self) -> None:
        """Look at the ring once more, and then no more. Calling it again does nothing."""
        self.look()
        observer = self._observer
        if observer is None:
            return
        self._observer = self._place = self._space = None
        self._counts = _with(self._counts, observer)
        self.unseen += observer.unseen
        self._known.clear()
        self._disarm(self._kick)
        self._disarm(self._call)

    def disconnect(self) -> None:
        """Close the descriptors. Calling it again does nothing."""
        for line in (self._kick, self._call):
            self._disarm(line)
            line.close()
        self.enabled = False

    def snapshot(self) -> QueueSnapshot:
        """What is known of it. From any thread, without waiting."""
        observer, place = self._observer, self._place
        return QueueSnapshot(
            index=self.index,
            enabled=self.enabled,
            running=observer is not None,
            size=0 if place is None else place.size,
            next_avail=0 if observer is None else observer.next_avail,
            next_used=0 if observer is None else observer.next_used,
            depth=0 if observer is None else observer.depth,
            held=0,
            stalled_since=None,
            broken=self.broken,
            counts=_with(self._counts, observer),
            latencies=self._latencies,
        )

    @property
    def unseen_requests(self) -> int:
        """Requests that were seen too late to know anything of them. From any thread."""
        observer = self._observer
        return self.unseen + (0 if observer is None else observer.unseen)

    @property
    def notifications(self) -> tuple[int, int]:
        """Kicks and calls that were seen. From any thread."""
        kick, call = self._kick.relay, self._call.relay
        return (
            self.kicks + (0 if kick is None else kick.passed),
            self.calls + (0 if call is None else call.passed),
        )


_P = tuple[int, int, bool]


class _Line:
    """An eventfd of a front-end, and one of ours that the back-end has instead."""

    def __init__(self) -> None:
        self.theirs = self.ours = self.source = -1
        self.relay: EventRelay | None = None
        self.notifier: PipeNotifier | None = None

    def close(self) -> None:
        notifier, self.notifier = self.notifier, None
        if notifier is not None:
            notifier.close()
        for fd in (self.theirs, self.ours):
            if fd >= 0:
                close_fd(fd)
        self.theirs = self.ours = -1


def _with(counts: QueueCounts, observer: RingObserver | None) -> QueueCounts:
    if observer is None:
        return counts
    return QueueCounts(
        counts.taken + observer.taken,
        counts.completed + observer.completed,
        counts.bytes + observer.bytes,
        counts.notifications + observer.notifications,
    )
