"""Repeats the requests of a recording against a vhost-user back-end, and compares the answers.

Requests come in their recorded order, with their layout in memory, and at their recorded times or
faster. Those that overlapped in the recording may overlap; one that was taken after the answer to
another one is published after that was answered again, so a read that followed a write sees it.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from guestio._core.virtio.contents import xxh64
from guestio.addr import check_seconds
from guestio.errors import DeviceError, QueueError
from guestio.guest.dma import PAGE
from guestio.memory import IoVector
from guestio.observe.replay_memory import MappedMemory, PhysicalMemory, ReplayMemory
from guestio.observe.script import RecordedRequest, Script, content_bytes, scripts_of
from guestio.vhost_user.channel import PeerGoneError
from guestio.vhost_user.frontend import Frontend, FrontendQueue, NoAnswerError
from guestio.vhost_user.messages import ProtocolFeature
from guestio.virtio.device import (
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_VERSION_1,
    Status,
)
from guestio.virtio.driver import DriverQueue
from guestio.virtio.layout import MAX_QUEUE_SIZE, RingLayout

if TYPE_CHECKING:
    from guestio.observe.recording import Recording

ReplayIommu: TypeAlias = Literal["as-recorded", "off", "strict"]
"""How a replay uses an IOMMU: as the recorded guest did; not at all; or with memory mapped for each
request and unmapped after it."""

UNTOUCHED: Final = 0xA5
"""What memory that a device may write holds before: an answer that is not written is seen."""

KEPT_DIFFERENCES: Final = 1000
"""Differences that a result describes; more are only counted."""

_RING_PACKED: Final = 34
_DEFAULT_SIZE: Final = 256
_SHORT: Final = 0.002
_NAP: Final = 0.00005
_TICK: Final = 0.1

Tick: TypeAlias = Callable[[int, int], None]
"""Told several times a second how many requests were answered, and how many there are."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A request that was answered otherwise than in the recording.

    Attributes:
        number: Which request of the replay it was, from 0.
        queue: Its queue.
        sequence: Which one of its queue it was in the recording.
        operation: ``read``, ``write``, ``flush`` or ``other``.
        offset: Where in the image it begins, in bytes, if that is known.
        what: ``status``, ``length`` or ``data``.
        recorded: What the recorded answer was, in words.
        replayed: What this one was.
    """

    number: int
    queue: int
    sequence: int
    operation: str
    offset: int | None
    what: Literal["status", "length", "data"]
    recorded: str
    replayed: str


@dataclass(slots=True)
class ReplayResult:
    """What became of a replay.

    Attributes:
        requests: Requests that were repeated.
        sessions: Front-ends that made them, each of which was one connection.
        left_out: How many were not, by the reason.
        compared: How many statuses, lengths and data were compared, by name.
        not_compared: Requests of which only the length was, since their data depends on chance.
        different: Requests that were answered otherwise.
        differences: The first of them.
        seconds: How long it took.
        recorded_seconds: How long the recording was.
        latest_seconds: How late a request was published at most, apart from those that waited for
            others; 0 at the highest speed.
        misses, updates, invalidations: What the back-end's IOTLB asked, was told, and forgot.
        refused_features: Feature bits that were used in the recording and are not offered here.
    """

    requests: int = 0
    sessions: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    compared: dict[str, int] = field(default_factory=lambda: {"status": 0, "length": 0, "data": 0})
    not_compared: int = 0
    different: int = 0
    differences: list[Difference] = field(default_factory=list)
    seconds: float = 0.0
    recorded_seconds: float = 0.0
    latest_seconds: float = 0.0
    misses: int = 0
    updates: int = 0
    invalidations: int = 0
    refused_features: int = 0

    @property
    def ok(self) -> bool:
        """Whether all answers were the recorded ones."""
        return not self.different

    def text(self, most: int = 10) -> str:
        """The result in lines, with the first differences."""
        compared = ", ".join(f"{count} {name}" for name, count in self.compared.items())
        times = f"{self.seconds:.3f} s (recorded: {self.recorded_seconds:.3f} s)"
        lines = [f"{self.requests} requests in {times}; compared: {compared}"]
        if self.sessions > 1:
            lines.append(f"made by {self.sessions} front-ends, one after the other")
        lines += [f"not repeated: {count} requests {why}" for why, count in self.left_out.items()]
        if self.not_compared:
            lines.append(f"data not compared, as it depends on chance: {self.not_compared}")
        if self.misses:
            lines.append(
                f"IOTLB: {self.misses} misses, {self.updates} updates, "
                f"{self.invalidations} invalidations"
            )
        if self.refused_features:
            lines.append(f"features that are not offered here: {self.refused_features:#x}")
        if self.ok:
            lines.append("every answer was the recorded one")
        else:
            lines.append(f"{self.different} requests were answered otherwise")
            for each in self.differences[:most]:
                where = "" if each.offset is None else f" at {each.offset:#x}"
                lines.append(
                    f"  queue {each.queue}, request {each.sequence} ({each.operation}{where}): "
                    f"{each.what} {each.replayed}, recorded {each.recorded}"
                )
        return "\n".join(lines)


def replay(
    recording: Recording | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    speed: float | None = None,
    iommu: ReplayIommu = "as-recorded",
    timeout: float = 30.0,
    connect_wait: float = 0.0,
    tick: Tick | None = None,
) -> ReplayResult:
    """Repeat a recording's requests against a vhost-user back-end, and compare the answers.

    The back-end must be in the state in which the recorded one was when recording began: a disk
    needs a copy of the image as it was then. Where several front-ends came one after the other,
    each is a connection of its own, with the features and queues that it had.

    Args:
        recording: The recording, or the path of its file.
        path: The back-end's socket.
        speed: How much faster than recorded requests come; None for as fast as they are answered.
        iommu: Whether an IOMMU is in front of the device, and how it is used.
        timeout: Seconds that the back-end has for anything.
        connect_wait: Seconds to go on trying while the path has no listener yet.
        tick: Told how it goes.

    Returns:
        What was compared, and what differed.

    Raises:
        NotReplayableError: The recording does not hold what requests carried.
        RecordingError: It is no recording.
        DeviceError: The back-end cannot take the requests: it has fewer queues or no IOMMU.
        NoAnswerError: It did not answer in time.
        PeerGoneError, ProtocolError, QueueError: It went away or broke the protocol.
        OSError: It cannot be connected to.

    Threads: any; works in the caller's. Cost: about 30 us for a request of a page, beside the
    back-end's.
    """
    if speed is not None and not 0 < speed < float("inf"):
        raise ValueError(f"speed {speed} is not greater than 0, or None for the highest")
    if iommu not in ("as-recorded", "off", "strict"):
        raise ValueError(f"iommu {iommu!r} is none of as-recorded, off and strict")
    limit = check_seconds(timeout, "timeout")
    if isinstance(recording, (str, bytes, os.PathLike)):
        from guestio.observe.recording import open_recording

        with open_recording(recording) as opened:
            scripts, most = scripts_of(opened), content_bytes(opened.description)
    else:
        scripts, most = scripts_of(recording), content_bytes(recording.description)
    whole = _Whole(sum(len(script.requests) for script in scripts), most)
    whole.result.left_out = scripts[0].left_out
    for script in scripts:
        # The back-end may need a moment until it listens again.
        wait = limit if whole.result.sessions else connect_wait
        with Frontend(path, timeout=limit, connect_wait=wait, answer="caller") as frontend:
            player = _Player(script, frontend, iommu, limit, whole)
            try:
                player.run(speed, tick)
            finally:
                player.close()
    return whole.result


class _Whole:
    """What the front-ends of a replay have in common.

    Args:
        requests: Requests of all of them.
        hashed: Bytes of an answer that its recorded hash is of at most.

    Attributes:
        result: What became of it so far.
        since: When the first one began, by the clock and in the recording.
    """

    def __init__(self, requests: int, hashed: int) -> None:
        self.requests, self.hashed = requests, hashed
        self.result = ReplayResult()
        self.since: tuple[float, int] | None = None


class _Queue:
    """A queue of the replay.

    Args:
        memory: Where its ring and tables go.
        frontend: The connection.
        index: Its number.
        size: Its entries.
        longest: Descriptors of its longest chain.
    """

    def __init__(
        self, memory: ReplayMemory, frontend: Frontend, index: int, size: int, longest: int
    ) -> None:
        self.index = index
        features = frontend.features
        self._indirect = bool(features >> VIRTIO_F_INDIRECT_DESC & 1)
        gpa, address = memory.own(RingLayout.contiguous_bytes(size))
        self.ring = DriverQueue(
            memory.regions,
            RingLayout.contiguous(gpa, size),
            event_idx=bool(features >> VIRTIO_F_EVENT_IDX & 1),
            indirect=self._indirect,
        )
        self._tables: list[tuple[int, IoVector]] = []
        if self._indirect:
            step = table_bytes(longest)
            first, where = memory.own(size * step)
            self._tables = [
                (where + number * step, memory.vector(first + number * step, step))
                for number in range(size)
            ]
        self._layout = RingLayout.contiguous(address, size)
        self._size = size
        self._frontend = frontend
        self.handle: FrontendQueue | None = None
        self._used_tables: dict[int, tuple[int, IoVector]] = {}

    def start(self) -> FrontendQueue:
        self.handle = self._frontend.start_queue(self.index, self._layout)
        if self._frontend.iommu:
            # As QEMU does, so that the device need not ask for the page it will surely write.
            self._frontend.iotlb.push(self._layout.used)
        return self.handle

    def add(self, request: RecordedRequest) -> bool:
        """Put a request into the ring, unless there is no room for it."""
        count = len(request.readable) + len(request.writable)
        if count > self._size:
            raise DeviceError(
                f"request {request.sequence} of queue {self.index} has {count} buffers; the queue "
                f"has {self._size} entries"
            )
        indirect = self._indirect and count > 1
        if self.ring.free < (1 if indirect else count):
            return False
        table = self._tables.pop() if indirect else None
        self.ring.add(request.readable, request.writable, request, table=table)
        if table is not None:
            self._used_tables[request.number] = table
        return True

    def collect(self) -> list[tuple[RecordedRequest, int]]:
        """Requests that were answered, and how many bytes the device says it wrote."""
        found = [(token, written) for token, written in self.ring.collect()]
        for request, _ in found:
            table = self._used_tables.pop(request.number, None)
            if table is not None:
                self._tables.append(table)
        return found

    def close(self) -> None:
        self.ring.close()
        for _, vector in (*self._tables, *self._used_tables.values()):
            vector.close()
        self._tables.clear()
        self._used_tables.clear()


def table_bytes(longest: int) -> int:
    """Bytes for an indirect table of so many descriptors, of which none crosses a page."""
    size = 16
    while size < 16 * longest:
        size *= 2
    return size


class _Player:
    """The replay of what one front-end did."""

    def __init__(
        self,
        script: Script,
        frontend: Frontend,
        iommu: ReplayIommu,
        timeout: float,
        whole: _Whole,
    ) -> None:
        self._script = script
        self._frontend = frontend
        self._timeout = timeout
        self._whole, self._result = whole, whole.result
        self._behind = iommu == "strict" or (iommu == "as-recorded" and script.iommu)
        self._queues: dict[int, _Queue] = {}
        self._memory: ReplayMemory | None = None
        self._poller = select.poll()
        self._calls: dict[int, _Queue] = {}
        self._staged: set[_Queue] = set()
        try:
            self._set_up(strict=iommu == "strict")
        except BaseException:
            self.close()
            raise

    def _set_up(self, *, strict: bool) -> None:
        script, frontend = self._script, self._frontend
        self._negotiate()
        sizes, longest = self._sizes()
        room = sum(_own_bytes(sizes[queue], longest[queue]) for queue in sizes)
        if self._behind:
            memory: ReplayMemory = MappedMemory(script.requests, room, strict=strict)
        else:
            memory = PhysicalMemory(script.requests, room)
        self._memory = memory
        memory.connect(frontend)
        # Queues of before as well: some devices serve none unless all are there.
        for index in sizes:
            self._queues[index] = _Queue(memory, frontend, index, sizes[index], longest[index])
        for queue in self._queues.values():
            handle = queue.start()
            for fd in (handle.call_fd, handle.err_fd):
                if fd is not None:
                    self._poller.register(fd, select.POLLIN)
                    self._calls[fd] = queue
        self._poller.register(frontend.fileno(), 0)
        if frontend.iommu:
            self._poller.register(frontend.iotlb.fileno(), select.POLLIN)
        if frontend.protocol_features & ProtocolFeature.STATUS:
            frontend.set_status(
                Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
            )

    def _negotiate(self) -> None:
        script, frontend = self._script, self._frontend
        platform, packed = 1 << VIRTIO_F_ACCESS_PLATFORM, 1 << _RING_PACKED
        recorded = script.features
        wanted = (1 << 24) - 1 | ((1 << 64) - (1 << 50)) if recorded is None else recorded
        wanted |= 1 << VIRTIO_F_VERSION_1
        if recorded is None:
            wanted |= 1 << VIRTIO_F_INDIRECT_DESC | 1 << VIRTIO_F_EVENT_IDX
        wanted = wanted & ~(platform | packed) | platform * self._behind
        features = frontend.negotiate(wanted)
        if self._behind and not frontend.iommu:
            raise DeviceError(
                "the back-end offers no IOMMU (VIRTIO_F_ACCESS_PLATFORM); replay with --iommu off"
            )
        if recorded is not None:
            self._result.refused_features |= recorded & ~(features | platform | packed)
        needed = max(request.queue for request in script.requests) + 1
        if frontend.queue_count() < needed:
            raise DeviceError(
                f"the recording uses {needed} queues, the back-end has {frontend.queue_count()}"
            )

    def _sizes(self) -> tuple[dict[int, int], dict[int, int]]:
        """Entries and longest chain of each queue."""
        sizes = dict(self._script.sizes)
        longest: dict[int, int] = {}
        for request in self._script.requests:
            count = len(request.readable) + len(request.writable)
            longest[request.queue] = max(longest.get(request.queue, 1), count)
        for queue, count in longest.items():
            size = sizes.get(queue, _DEFAULT_SIZE)
            while size < count and size < MAX_QUEUE_SIZE:
                # Pieces of memory may be more than the buffers that the guest gave.
                size *= 2
            sizes[queue] = size
        return sizes, longest

    def close(self) -> None:
        """Let go of everything; the connection is the caller's to close."""
        for queue in self._queues.values():
            queue.close()
        self._frontend.close()
        self._queues.clear()
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def run(self, speed: float | None, tick: Tick | None) -> ReplayResult:
        """See :func:`replay`."""
        script, result, memory = self._script, self._result, self._memory
        assert memory is not None
        requests, revocations = script.requests, script.revocations
        heard = told = time.monotonic()
        began, origin = self._whole.since = self._whole.since or (heard, script.began)
        done = [False] * len(requests)
        answered = prefix = next_request = next_revocation = 0
        held = -1
        while answered < len(requests):
            finished = self._collect()
            answered += len(finished)
            for request in finished:
                done[request.number] = True
            while prefix < len(done) and done[script.by_end[prefix]]:
                prefix += 1
            wait = self._timeout
            before = next_request
            while next_request < len(requests):
                request = requests[next_request]
                revoked = next_revocation < len(revocations)
                if revoked and revocations[next_revocation].time <= request.start:
                    revocation = revocations[next_revocation]
                    if script.before(revocation.time) > prefix:
                        held = next_request
                        break
                    if next_request:  # before the first one there is nothing to revoke
                        self._kick()
                        memory.revoke(revocation.address, revocation.length)
                    next_revocation += 1
                    continue
                if script.before(request.start) > prefix:
                    held = next_request
                    break
                if speed is not None:
                    due = began + (request.found - origin) / 1e9 / speed
                    wait = due - time.monotonic()
                    if wait > 0:
                        break
                    if held != next_request:
                        result.latest_seconds = max(result.latest_seconds, -wait)
                if not self._publish(request):
                    held = next_request
                    break
                next_request += 1
            self._kick()
            now = time.monotonic()
            if tick is not None and now - told >= _TICK:
                told = now
                tick(result.requests + answered, self._whole.requests)
            if finished or next_request > before or next_request == answered:
                heard = now
            elif now - heard >= self._timeout:
                self._raise_silent(done, next_request)
            if not finished and next_request == before:
                self._wait(min(wait, _TICK) if wait > 0 else _TICK)
        for revocation in revocations[next_revocation:]:
            memory.revoke(revocation.address, revocation.length)
        result.requests += len(requests)
        result.sessions += 1
        result.seconds = time.monotonic() - began
        result.recorded_seconds = (script.ends[-1] - origin) / 1e9
        counts = self._frontend.iotlb.counts
        result.misses += counts.misses
        result.updates += counts.updates
        result.invalidations += counts.invalidations
        if tick is not None:
            tick(result.requests, self._whole.requests)
        self._stop()
        return result

    def _publish(self, request: RecordedRequest) -> bool:
        memory = self._memory
        assert memory is not None
        queue = self._queues[request.queue]
        if not queue.add(request):
            return False
        self._staged.add(queue)
        memory.admit(request)
        memory.write(request.readable, request.content)
        memory.fill(request.writable, UNTOUCHED)
        return True

    def _kick(self) -> None:
        """Have the device see what was put into the rings."""
        for queue in self._staged:
            if queue.ring.publish() and queue.handle is not None:
                queue.handle.kick()
        self._staged.clear()

    def _collect(self) -> list[RecordedRequest]:
        """Requests that were answered now, compared."""
        memory = self._memory
        assert memory is not None
        found = []
        for queue in self._queues.values():
            for request, written in queue.collect():
                self._compare(request, written)
                found.append(request)
        if found:
            memory.leave(found)
        return found

    def _compare(self, request: RecordedRequest, written: int) -> None:
        memory, compared = self._memory, self._result.compared
        assert memory is not None
        differences: list[tuple[Literal["status", "length", "data"], str, str]] = []
        compared["length"] += 1
        if written != request.written:
            differences.append(("length", f"{request.written} bytes", f"{written} bytes"))
        if not request.repeatable or (request.refused and not self._behind):
            self._result.not_compared += 1
        else:
            whole = request.room
            answer = memory.read(request.writable, whole)
            if request.status is not None and len(answer) == whole and whole:
                compared["status"] += 1
                if answer[-1] != request.status:
                    differences.append(("status", str(request.status), _status(answer[-1])))
            most = min(request.written, self._whole.hashed)
            if request.answer is not None and len(answer) >= len(request.answer):
                compared["data"] += 1
                ours = answer[: len(request.answer)]
                if ours != request.answer:
                    theirs, mine = _first_difference(request.answer, ours)
                    differences.append(("data", theirs, mine))
            elif request.answer_hash is not None and len(answer) >= most:
                compared["data"] += 1
                ours_hash = xxh64(answer[:most])
                if ours_hash != request.answer_hash:
                    theirs, mine = f"XXH64 {request.answer_hash:016x}", f"XXH64 {ours_hash:016x}"
                    differences.append(("data", theirs, mine))
        if not differences:
            return
        self._result.different += 1
        if len(self._result.differences) < KEPT_DIFFERENCES:
            self._result.differences += [
                Difference(
                    self._result.requests + request.number,
                    request.queue,
                    request.sequence,
                    request.operation,
                    request.offset,
                    *each,
                )
                for each in differences
            ]

    def _wait(self, seconds: float) -> None:
        """Until something happens, or so long."""
        if seconds < _SHORT:
            # Rather than a millisecond or two, which is as short as poll() waits.
            time.sleep(min(seconds, _NAP))
            seconds = 0.0
        elif any(
            queue.ring.outstanding and queue.ring.enable_interrupts()
            for queue in self._queues.values()
        ):
            return
        for fd, _ in self._poller.poll(int(seconds * 1000)):
            queue = self._calls.get(fd)
            if queue is None:
                if fd == self._frontend.fileno():
                    raise self._frontend.failure or PeerGoneError("the back-end went away")
                self._frontend.iotlb.service()
            elif queue.handle is not None and fd == queue.handle.err_fd:
                raise QueueError(f"the device reports that queue {queue.index} is broken")
            elif queue.handle is not None:
                queue.handle.clear_call()
        if self._frontend.failure is not None:
            raise self._frontend.failure

    def _raise_silent(self, done: list[bool], published: int) -> None:
        waiting = [each for each in self._script.requests[:published] if not done[each.number]]
        first = waiting[0]
        where = "" if first.offset is None else f" at {first.offset:#x}"
        raise NoAnswerError(
            f"the back-end answered none of {len(waiting)} requests for {self._timeout:g} s; the "
            f"first is request {first.sequence} of queue {first.queue} ({first.operation}{where}), "
            f"which took {(first.end - first.start) / 1e9:.3f} s in the recording"
        )

    def _stop(self) -> None:
        for index in self._queues:
            self._frontend.stop_queue(index)
        if self._frontend.protocol_features & ProtocolFeature.STATUS:
            self._frontend.set_status(Status(0))


def _own_bytes(size: int, longest: int) -> int:
    """Bytes of memory that a queue takes for its ring and tables, in whole pages."""
    parts = (RingLayout.contiguous_bytes(size), size * table_bytes(longest))
    return sum(-(-each // PAGE) * PAGE for each in parts)


def _status(value: int) -> str:
    return f"{value} (not written)" if value == UNTOUCHED else str(value)


def _first_difference(recorded: bytes, ours: bytes) -> tuple[str, str]:
    """Where two answers differ first, and how."""
    at = next(i for i, (a, b) in enumerate(zip(recorded, ours, strict=True)) if a != b)
    theirs, mine = (each[at : at + 8].hex(" ") for each in (recorded, ours))
    return f"{theirs} at byte {at}", f"{mine} at byte {at}"
