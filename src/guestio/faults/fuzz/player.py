"""Plays the steps of a case against a back-end, and judges what an honest front-end may expect.

As long as nothing wrong was sent on a connection, each honest step must succeed: a wrong answer is
WRONG, none in time is LATE. After that the back-end may refuse and hang up as it likes, but never
write where nothing may be written, and the next connection is judged as the first.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from guestio.budgets import FUZZ_CASE_SECONDS, FUZZ_KICKS, FUZZ_REPLIES
from guestio.faults.catalogue import catalogue, select
from guestio.faults.checks.iotlb import Translated
from guestio.faults.fuzz.outcomes import Verdict
from guestio.faults.fuzz.steps import Case, CaseError, Step
from guestio.faults.kinds import SECTOR, blk_header
from guestio.faults.memory import CANARY, Ram
from guestio.faults.outcomes import (
    AbsentError,
    FailError,
    HungUpError,
    OutcomeError,
    RejectError,
    SilentError,
    SkipError,
)
from guestio.faults.ring import INDIRECT, Desc, Queue, encode_table
from guestio.faults.trial import ACCESS_PLATFORM, Trial
from guestio.vhost_user.messages import U64, FrontendRequest, MemoryTable, ProtocolFeature

if TYPE_CHECKING:
    from guestio.faults.kinds import Kind
    from guestio.faults.link import Link

_F = FrontendRequest
_GUARD: Final = 1 << 30
"""Guest address of memory that nothing is to be done with."""
_GUARD_SIZE: Final = 1 << 16
_REPLY_WAIT: Final = 0.03
"""Seconds that a reply to what may be wrong is waited for."""
_SETTLE: Final = 0.02
"""Seconds that a broken ring is looked at."""
_READ_ONLY: Final = 1 << 5
_F_FLUSH: Final = 9
_FLUSH: Final = 4
_GET_ID: Final = 8
_UNSUPPORTED: Final = 2
_ID_BYTES: Final = 20
_DRIVER_OK: Final = 0xF
"""ACKNOWLEDGE, DRIVER, FEATURES_OK and DRIVER_OK."""
_ANSWERED: Final = frozenset(code for code in FrontendRequest if code.name.startswith("GET_")) | {
    _F.SET_LOG_BASE
}


class WrongError(Exception):
    """Ends a case with WRONG or LATE."""

    def __init__(self, verdict: Verdict, reason: str) -> None:
        super().__init__(reason)
        self.verdict = verdict


class BackendPlayer:
    """Plays cases; for one thread.

    Args:
        connect: Makes a connection, with so much patience.
        kind: Type of the device.
        patience: Seconds that an honest answer may take.
    """

    def __init__(self, connect: Callable[[float], Link], kind: Kind, patience: float = 1.0) -> None:
        self._connect = connect
        self._kind = kind
        self._patience = patience
        self._scene: _Scene | None = None

    def play(self, case: Case) -> None:
        """Do all that a case says, and close what it has opened.

        Raises:
            WrongError: Something that an honest front-end relies on did not hold.
            AbsentError: Nothing listens.
        """
        deadline = time.monotonic() + FUZZ_CASE_SECONDS
        try:
            for step in case.steps:
                if time.monotonic() > deadline:
                    break
                self._play(step, case.seed)
            self._hang_up()
        finally:
            self._drop()

    def honest(self) -> None:
        """Serve an honest request on a connection of its own, and remember what was written.

        Raises:
            OutcomeError: It did not go as it must.
        """
        scene = _Scene(self._connect, self._kind, self._patience)
        try:
            queue = scene.queue(self._kind.queue)
            scene.serve(queue, 1)
            scene.remember(queue, 8, 1)
        finally:
            scene.close()

    def _play(self, step: Step, seed: int) -> None:
        if step.name == "connect":
            self._hang_up()
            return
        if step.name == "check":
            self._hang_up()
            self._check(str(step.arguments["check"]), seed)
            return
        if step.name not in _STEPS:
            raise CaseError(f"a back-end knows no step {step.name!r}")
        if self._scene is None:
            self._scene = _Scene(self._connect, self._kind, self._patience)
        scene = self._scene
        with contextlib.suppress(SkipError), scene.judged(step):
            _STEPS[step.name](scene, **step.arguments)

    def _hang_up(self) -> None:
        """End the connection; what the back-end may not have written is compared."""
        scene, self._scene = self._scene, None
        if scene is None:
            return
        try:
            scene.compare()
        except FailError as error:
            raise WrongError(Verdict.WRONG, str(error)) from None
        finally:
            scene.close()

    def _drop(self) -> None:
        scene, self._scene = self._scene, None
        if scene is not None:
            scene.close()

    def _check(self, name: str, seed: int) -> None:
        (check,) = select(catalogue(self._kind.name), [name])
        trial = Trial(
            self._connect,
            self._kind,
            patience=self._patience,
            seed=f"{seed}:{name}",
            writable=True,
        )
        try:
            with trial:
                check.body(trial)
        except (SkipError, RejectError):
            return
        except HungUpError as error:
            if not check.hostile:
                raise WrongError(Verdict.WRONG, f"{name}: {error}") from None
        except SilentError as error:
            raise WrongError(Verdict.LATE, f"{name}: {error}") from None
        except FailError as error:
            raise WrongError(Verdict.WRONG, f"{name}: {error}") from None


class _Scene:
    """One connection, with its memory and rings, and whether it has kept to the rules so far."""

    def __init__(self, connect: Callable[[float], Link], kind: Kind, patience: float) -> None:
        self.kind = kind
        self.trial = Trial(connect, kind, patience=patience, writable=True)
        self.honest = True
        self.gone = False
        self.read_only = False
        self.shared = False
        self.queues: dict[int, Queue] = {}
        self.given: list[tuple[int, int]] = []
        self.side: Translated | None = None
        self._guard: Ram | None = None
        self._quiet: list[tuple[int, bytes]] = []
        self._written: dict[int, bytes] = {}

    @property
    def patience(self) -> float:
        """Seconds that an answer may take: little once nothing need be answered."""
        return self.trial.patience if self.honest else _REPLY_WAIT

    def close(self) -> None:
        """Hang up."""
        self.trial.close()

    @contextlib.contextmanager
    def judged(self, step: Step) -> Iterator[None]:
        """Around a step: what it raises is a finding, unless rules were broken before."""
        if self.gone:
            raise SkipError
        try:
            yield
        except (SkipError, RejectError):
            pass
        except AbsentError:
            raise
        except OutcomeError as error:
            if isinstance(error, HungUpError):
                self.gone = True
            if self.honest or isinstance(error, _AlwaysError):
                verdict = Verdict.LATE if isinstance(error, SilentError) else Verdict.WRONG
                raise WrongError(verdict, f"{step.name}: {error}") from None
        except (ValueError, OSError):
            # No room in the ring or in memory for it, or too few descriptors here: left out.
            pass

    def compare(self) -> None:
        """Look at what must not have been written.

        Raises:
            FailError: It was.
        """
        if self._guard is not None:
            at = self._guard.memory.read(_GUARD, _GUARD_SIZE)
            if at != bytes([CANARY]) * _GUARD_SIZE:
                raise _AlwaysError("wrote to memory that no descriptor led to")
        if self.honest:
            for address, content in self._quiet:
                if self.trial.ram.read(address, len(content)) != content:
                    raise FailError("wrote to memory after its ring was stopped or it was unmapped")

    # Honest beginnings, which later steps make up for where they were left out

    def negotiate(self, features: int = 0, protocol: int | None = None) -> None:
        """Agree on features, honestly."""
        link = self.trial.negotiate(features, *(() if protocol is None else (protocol,)))
        self.read_only = bool(self.trial.offered() & _READ_ONLY)
        if link.features & _READ_ONLY:
            self.read_only = True

    def share(self) -> None:
        """Share memory, some of which no descriptor leads to."""
        if not self.trial.link.features:
            self.negotiate()
        if self._guard is None:
            self._guard = self.trial.new_ram(start=_GUARD, size=_GUARD_SIZE)
        ram, guard = self.trial.ram, self._guard
        self.trial.link.do(
            _F.SET_MEM_TABLE, MemoryTable((ram.region, guard.region)), [ram.fd, guard.fd]
        )
        self.shared = True

    def start(self, queue: int, size: int, base: int) -> None:
        """Start a ring anew."""
        if not self.shared:
            self.share()
        old = self.queues.pop(queue, None)
        if old is not None and self.honest:
            self.stop(old)
        self.compare()
        self._quiet.clear()
        ring = self.trial.new_queue(queue, size, base=base)
        ring.start()
        if self.trial.link.protocol & ProtocolFeature.STATUS:
            # A device may wait for it.
            self.trial.link.do(_F.SET_STATUS, U64(_DRIVER_OK))
        self.queues[queue] = ring

    def queue(self, index: int) -> Queue:
        """A ring that runs."""
        if index not in self.queues:
            self.start(index, 64, 0)
        return self.queues[index]

    def stop(self, ring: Queue) -> None:
        """Stop a ring, and hold the device to it."""
        base = ring.stop()
        self.queues.pop(ring.index, None)
        if not self.honest:
            return
        done = ring.seen + ring.ready & 0xFFFF
        if base not in {done, ring.offered}:
            raise FailError(
                f"GET_VRING_BASE says {base}; {ring.offered} were available and {done} used"
            )
        content = bytes([CANARY ^ 0xFF]) * 64
        for buffer in ring.buffers.values():
            for address, length in buffer.writable:
                self.trial.ram.write(address, content[:length])
                self._quiet.append((address, content[:length]))

    # Honest requests

    def serve(self, ring: Queue, count: int) -> None:
        """Make honest requests and judge all about them."""
        trial, ram = self.trial, self.trial.ram
        if not self.honest:
            trial.post(ring, min(count, len_free(ring) // 2))
            ring.wait(1, self.patience)
            return
        count = max(1, min(count, len_free(ring) // 2))
        # With EVENT_IDX a notification comes when this one is used.
        ring.set_used_event(ring.seen)
        buffers = trial.post(ring, count, kick=False)
        before = ram.snapshot()
        ring.kick()
        done = ring.wait(count, self.patience)
        for buffer in done:
            trial.judge(ring, buffer)
        if not ring.called(self.patience):
            raise SilentError("sent no notification of used requests")
        allowed = [(ring.used, 6 + 8 * ring.size), (ring.avail, 6 + 2 * ring.size)]
        for buffer in buffers:
            allowed += buffer.writable
        at = ram.stray(before, [*allowed, *self._pending(), *self.given])
        if at is not None:
            raise FailError(f"wrote to guest memory at {at:#x}, which no buffer has")

    def _pending(self) -> list[tuple[int, int]]:
        return [
            piece
            for ring in self.queues.values()
            for buffer in ring.buffers.values()
            for piece in buffer.writable
        ]

    def remember(self, ring: Queue, sector: int, step: int) -> None:
        """Write to a disk and read it back; of other devices, one more honest request."""
        if self.kind.name != "blk" or self.read_only or not self.honest or len_free(ring) < 3:
            self.serve(ring, 1)
            return
        self._drain(ring)
        data = bytes((sector * 7 + step + number) & 0xFF for number in range(SECTOR))
        if self._blk(ring, [blk_header(1, sector) + data], [1]) != b"\0":
            raise FailError(f"a write of sector {sector} failed")
        answer = self._blk(ring, [blk_header(0, sector)], [SECTOR, 1])
        if answer[-1]:
            raise FailError(f"a read of sector {sector} has status {answer[-1]}")
        if answer[:-1] != data:
            raise FailError(f"sector {sector} reads other than it was written just before")
        self._settle(ring)

    def _settle(self, ring: Queue) -> None:
        """Flush a disk, and ask for its identifier twice."""
        status = self._blk(ring, [blk_header(_FLUSH)], [1])[-1]
        if status and (status != _UNSUPPORTED or self.trial.link.features >> _F_FLUSH & 1):
            raise FailError(f"a flush has status {status}")
        answers = [self._blk(ring, [blk_header(_GET_ID)], [_ID_BYTES, 1], all_written=False)]
        answers.append(self._blk(ring, [blk_header(_GET_ID)], [_ID_BYTES, 1], all_written=False))
        if any(answer[-1] not in {0, _UNSUPPORTED} for answer in answers):
            raise FailError(f"GET_ID has status {answers[0][-1]} and {answers[1][-1]}")
        # What is behind the end of a short one is not said to be written.
        one, other = (answer[:-1].partition(b"\0")[0] for answer in answers)
        if one != other:
            raise FailError("GET_ID answers otherwise the second time")

    def _drain(self, ring: Queue) -> None:
        """Wait for what was posted before."""
        if ring.buffers:
            ring.kick()
            ring.wait(len(ring.buffers), self.patience)

    def _blk(
        self,
        ring: Queue,
        readable: Sequence[bytes],
        writable: Sequence[int],
        *,
        all_written: bool = True,
    ) -> bytes:
        buffer = ring.post(readable, writable)
        ring.kick()
        done = ring.wait_one(self.patience)
        if done is not buffer:
            raise FailError("used another request than the one that was made available")
        answer = self.trial.answer(ring, done)
        # What is at the end of a request that has succeeded was written.
        if all_written and not answer[-1] and done.written != len(answer):
            raise FailError(f"says that {done.written} bytes were written, not {len(answer)}")
        return answer

    # What a step does

    def break_rules(self) -> None:
        """From here on the back-end may refuse."""
        self.honest = False

    def do_message(
        self,
        code: int,
        payload: str,
        flags: int = 1,
        size: int | None = None,
        fds: Sequence[str] = (),
    ) -> None:
        """Send a message of any kind, and read what comes of it."""
        self.break_rules()
        data = bytes.fromhex(payload)
        header = (
            int(each).to_bytes(4, "little")
            for each in (code, flags, len(data) if size is None else size)
        )
        link = self.trial.link
        link.send(b"".join(header) + data, self._fds(fds))
        if code in _ANSWERED or flags & 8:
            self._listen()
        elif link.closed(0):
            self.gone = True

    def _listen(self) -> None:
        link = self.trial.link
        wait = _REPLY_WAIT
        for _ in range(FUZZ_REPLIES):
            try:
                link.receive(wait)
            except SilentError:
                return
            wait = 0.0

    def _fds(self, kinds: Sequence[str]) -> list[int]:
        trial = self.trial
        found = []
        for kind in kinds:
            match kind:
                case "ram":
                    found.append(trial.ram.fd)
                case "memfd":
                    found.append(trial.memfd(4096))
                case "empty":
                    found.append(trial.memfd(0))
                case "read-only":
                    fd = trial.memfd(1 << 20)
                    found.append(trial.own(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)))
                case "eventfd":
                    found.append(trial.eventfd())
                case "full":
                    fd = trial.own(os.eventfd(0, os.EFD_CLOEXEC))
                    os.eventfd_write(fd, (1 << 64) - 2)
                    found.append(fd)
                case "pipe":
                    ends = os.pipe()
                    found.append(trial.own(ends[1]))
                    trial.own(ends[0])
                case "socket":
                    found.append(trial.socket_pair()[1].fileno())
                case "own":
                    found.append(trial.link.fileno())
                case "null":
                    found.append(trial.own(os.open("/dev/null", os.O_RDWR)))
                case "directory":
                    found.append(trial.own(os.open("/", os.O_RDONLY | os.O_DIRECTORY)))
                case _:
                    raise SkipError(f"there is no descriptor of kind {kind}")
        return found

    def do_noise(self, data: str) -> None:
        """Send bytes as they are."""
        self.break_rules()
        self.trial.link.send(bytes.fromhex(data))
        self._listen()

    def do_half(self, data: str, sent: int) -> None:
        """Send the beginning of a message, and hang up."""
        self.break_rules()
        self.trial.link.send(bytes.fromhex(data)[:sent])
        self.trial.link.close()
        self.gone = True

    def do_post(self, queue: int, count: int) -> None:
        """Make honest requests available, and wait for none."""
        ring = self.queue(queue)
        self.trial.post(ring, min(count, len_free(ring) // 2))

    def do_serves(self, queue: int, count: int) -> None:
        """Honest requests, which are judged."""
        ring = self.queue(queue)
        self._drain(ring)
        self.serve(ring, count)

    def do_remembers(self, queue: int, sector: int) -> None:
        """A write that is read back."""
        self.remember(self.queue(queue), sector, sector)

    def do_stop(self, queue: int) -> None:
        """GET_VRING_BASE, which is judged."""
        self.stop(self.queue(queue))

    def do_request(
        self, queue: int, readable: Sequence[str], writable: Sequence[int], indirect: bool
    ) -> None:
        """A well-formed chain with any content, which must be used."""
        ring = self.queue(queue)
        self._drain(ring)
        if len(readable) + len(writable) > ring.size:
            # A driver must not, also in an indirect table (virtio 1.4 section 2.7.5.3.1).
            self.break_rules()
        buffer = ring.post(
            [bytes.fromhex(each) for each in readable],
            list(writable),
            indirect=indirect and bool(self.trial.link.features >> 28 & 1),
        )
        self.given += buffer.writable
        ring.kick()
        if self.honest:
            ring.wait(1, self.patience)
            answer = self.trial.answer(ring, buffer)
            if self.kind.name == "blk" and answer and answer[-1] == CANARY:
                raise FailError("a request was used, and its status was not written")
            return
        ring.outcome(_SETTLE)

    # Rings that lie

    def do_descriptors(
        self,
        queue: int,
        table: Sequence[Sequence[int]],
        heads: Sequence[int],
        content: str,
        indirect: bool,
        cut: int,
    ) -> None:
        """A table that is written by hand."""
        ring = self.queue(queue)
        ram = self.trial.ram
        area = ram.take(8192, 4096)
        ram.write(area, bytes.fromhex(content)[:4096])
        rows: dict[int, Desc] = {}
        for index, at, length, flags, following in table:
            address = -1 - at if at < 0 else ring.device_address(area + at)
            rows[index] = Desc(address & (1 << 64) - 1, length, flags & 0xFFFF, following & 0xFFFF)
        self.break_rules()
        if indirect:
            listed = [rows.get(index, Desc(0, 0)) for index in range(max(rows) + 1)][:256]
            data = encode_table(listed)
            rows = {
                0: Desc(ring.device_address(ram.place(data)), max(len(data) - cut, 0), INDIRECT)
            }
        for index, row in rows.items():
            ring.put(index % ring.size, row)
        ring.offer(*heads)
        ring.kick()
        ring.outcome(_SETTLE)
        ring.seen = ring.used_index

    def do_publish(self, queue: int, ahead: int) -> None:
        """Move the available index."""
        ring = self.queue(queue)
        self.break_rules()
        ring.publish(ring.offered + ahead & 0xFFFF)

    def do_scribble(self, queue: int, area: str, offset: int, data: str, kicks: int) -> None:
        """Write into a ring while the device may look at it."""
        ring = self.queue(queue)
        self.break_rules()
        at = {"desc": ring.desc, "avail": ring.avail, "used": ring.used}[area]
        ring.kick()
        for _ in range(min(kicks, FUZZ_KICKS) + 1):
            self.trial.ram.write(at + offset, bytes.fromhex(data))
            ring.kick()
        ring.outcome(_SETTLE)

    def do_kick(self, queue: int) -> None:
        """Notify the device."""
        ring = self.queue(queue)
        ring.kick()
        ring.outcome(_SETTLE if not self.honest else 0)

    def do_truncate(self, size: int) -> None:
        """Cut the file behind the guest's memory."""
        self.break_rules()
        queues = list(self.queues.values())
        ram = self.trial.ram
        if stat.S_ISREG(os.fstat(ram.fd).st_mode):
            os.ftruncate(ram.fd, size)
        for ring in queues:
            ring.kick()
        time.sleep(_SETTLE)
        # What is gone cannot be looked at any more.
        self.gone = True

    # Behind an IOMMU

    def do_translate(self) -> None:
        """Start a ring behind an IOMMU, on a connection of its own."""
        if self.shared or self.side is not None:
            raise SkipError("it has begun otherwise")
        self.side = Translated(self.trial)
        self.shared = True
        self.queues[self.trial.index] = self.side.queue

    def do_translated(self, count: int) -> None:
        """Honest requests, whose misses are answered."""
        side = self._side()
        if self.honest:
            side.serve(count)
        else:
            self.trial.post(side.queue, count)
            with contextlib.suppress(OutcomeError):
                side.let_be(_REPLY_WAIT)

    def do_revoke(self) -> None:
        """Unmap the buffers of requests that are done; they must not be written any more."""
        side = self._side()
        self.trial.ram.take(1, 4096)
        (buffer,) = self.trial.post(side.queue)
        if not self.honest:
            raise SkipError("it need not be served")
        side.wait(1)
        # Nothing is to be written any more, so what is written here stays.
        content = bytes([CANARY ^ 0xFF])
        for address, length in buffer.writable:
            self.trial.ram.write(address, content * length)
            self._quiet.append((address, content * length))
        for address, length in [*buffer.writable, *((at, len(d)) for at, d in buffer.readable)]:
            first, end = address & ~4095, address + length + 4095 & ~4095
            side.invalidate(first, end - first)
            for page in range(first, end, 4096):
                side.granted.pop(page, None)
        side.let_be(_SETTLE)
        self.compare()

    def do_refuse(self, count: int) -> None:
        """Requests whose misses are not answered."""
        side = self._side()
        side.answered = False
        self.break_rules()
        self.trial.ram.take(1, 4096)
        self.trial.post(side.queue, count)
        with contextlib.suppress(OutcomeError):
            side.let_be(_REPLY_WAIT)
        side.answered = True

    def _side(self) -> Translated:
        if self.side is None:
            self.do_translate()
        if self.side is None or not self.trial.link.features & ACCESS_PLATFORM:
            raise SkipError("it is behind no IOMMU")
        return self.side


class _AlwaysError(FailError):
    """What must not happen whatever a front-end does."""


def len_free(ring: Queue) -> int:
    """Descriptors of a ring that are free."""
    return ring.size - sum(len(buffer.chain) for buffer in ring.buffers.values())


_STEPS: Final[dict[str, Callable[..., None]]] = {
    "negotiate": _Scene.negotiate,
    "share": _Scene.share,
    "start": _Scene.start,
    **{name[3:]: getattr(_Scene, name) for name in vars(_Scene) if name.startswith("do_")},
}
STEP_NAMES: Final = frozenset(_STEPS) | {"connect", "check", "rule"}
"""What a step may be named."""
