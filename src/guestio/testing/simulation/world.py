"""One simulated run: a guest, its front-end, a back-end with a device, a disk, and what goes wrong.

The session, the host, queues, rings, the IOTLB, notes of requests in flight, the device and its
image are the real ones. A :class:`World` chooses what acts next, and checks after each step of the
back-end what it has done.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, Self

from guestio.budgets import HALF_MESSAGE_TIMEOUT
from guestio.testing.simulation.backend import Backend, Killed
from guestio.testing.simulation.disk import Disk, chooser
from guestio.testing.simulation.environment import Environment
from guestio.testing.simulation.frontend import Frontend, Notes, Operation
from guestio.testing.simulation.guest import Guest, take_event
from guestio.testing.simulation.workload import (
    AnyWorkload,
    BlockWorkload,
    InvariantError,
    Workload,
)
from guestio.virtio.device import DeviceId

if TYPE_CHECKING:
    from guestio.virtio import Device

SECTORS: Final = 64
"""Of the simulated disk."""

STEP_SECONDS: Final = 1e-5
"""Simulated seconds that each step takes."""

ANSWER_SECONDS: Final = 4.0
"""Simulated seconds that a back-end may take to answer a message."""

PATIENCE_SECONDS: Final = 100.0
"""Simulated seconds that a back-end's thread may wait in one step: more than for a slow medium."""

KEPT_SECONDS: Final = 0.05
"""Simulated seconds in one step of the back-end's after which what it waited for may fail."""

QUIET_ROUNDS: Final = 5000
"""Steps after which a run must have come to its end."""

DeviceFactory = Callable[["World"], "Device"]
"""Makes the device of a back-end; called again after each crash."""


class World:
    """Everything of one run.

    Args:
        factory: Makes the device.
        seed: Of all choices.
        iommu: Whether an IOMMU is in front of the device.
        crashes: Whether the back-end, the guest or the host may die.
        tracked: Whether requests in flight are noted.
        workload: What the driver does, given the device; None for what suits it.

    Attributes:
        disk: Where a device may keep what must outlive it.
        clock: Simulated time.
        rng: Of the choice that is being made, for devices that choose as well.
        trace: What was done: number and name of each step.
        crashed: How often the back-end, the guest or the host died.
        failures: Whether medium and IOMMU may fail.
    """

    def __init__(
        self,
        factory: DeviceFactory,
        seed: int,
        *,
        iommu: bool,
        crashes: bool,
        tracked: bool,
        workload: Callable[[Device], Workload] | None = None,
    ) -> None:
        self.seed = seed
        self.disk = Disk(SECTORS)
        self.environment = Environment(self._idle, self._sync)
        self.clock = self.environment.clock
        self.trace: list[tuple[int, str]] = []
        self.crashed = 0
        self.steps = 0
        self.rng = chooser(seed)
        self._mortality = self.rng.choice(_MORTALITY)
        self._digest = hashlib.blake2b(digest_size=8)
        self._factory = factory
        self._iommu, self._crashes, self._tracked = iommu, crashes, tracked
        self._make_workload = workload
        self._notes: Notes | None = None
        self._deferred: list[tuple[Future[int], Callable[[], int]]] = []
        self._fuse: int | None = None
        self._saved: Callable[[], None] | None = None
        self._completed = 0
        self._failure: InvariantError | None = None
        self._step_began = self.clock.now
        self._waited: tuple[object, float] | None = None
        self._undo = contextlib.ExitStack()
        self._guest: Guest = None  # type: ignore[assignment] # made when the context is entered
        self._front: Frontend
        self._backend: Backend
        self._workload: Workload

    # What a device uses

    def defer(self, function: Callable[[], int]) -> Future[int]:
        """Have a function called later, when the simulation likes, as a thread would.

        Args:
            function: Uses the request's memory, and returns what `Device.process` would.

        Returns:
            A future of what it returns, for `Device.process` to return.
        """
        future: Future[int] = Future()
        self._deferred.append((future, function))
        return future

    def excuse(self, *, hangs: bool = False) -> None:
        """Have it be right that a request fails which is in flight now: the device means to.

        Args:
            hangs: Whether it may also not be answered before its queue stops.
        """
        for job in self._guest.jobs:
            job.may_fail = True
            job.may_hang |= hangs

    # Beginning and end

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as failed:
            failed.callback(self._undo.close)
            self._undo.callback(self.disk.close)
            self._undo.enter_context(self.environment.active())
            device = self._factory(self)
            failed.callback(device.close)
            if self._make_workload is not None:
                self._workload = self._make_workload(device)
            elif device.device_id == DeviceId.BLOCK:
                self._workload = BlockWorkload(SECTORS, device.num_queues)
            else:
                self._workload = AnyWorkload(device)
            self._backend = Backend(self, device)
            self._new_guest(device)
            self._connect()
            failed.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if self._front.notes is not None:
            self._front.notes.close()
        with contextlib.suppress(Exception):
            self._front.abandon()
        self._step_began = self.clock.now
        with contextlib.suppress(Exception, Killed):
            self._backend.close()
        with contextlib.suppress(Exception):
            self._guest.close()
        self._drop_notes()
        self._undo.close()

    def _new_guest(self, device: Device) -> None:
        self._completed += 0 if self._guest is None else self._guest.completed
        self._guest = Guest(
            chooser(self.rng.random()),
            self._workload,
            device.num_queues,
            translating=self._iommu,
            polling=self.rng.random() < 0.3,
        )

    def _connect(self) -> None:
        rng = chooser(self.rng.random())
        front = Frontend(self._guest, rng, tracked=self._tracked, notes=self._notes)
        self._front, self._notes = front, None
        self._backend.connect(front)
        front.begin(front.connect(), "connect")

    def _drop_notes(self) -> None:
        notes, self._notes = self._notes, None
        if notes is not None:
            notes.close()

    # Choices

    def actions(self) -> list[tuple[int, str]]:
        """What may happen now, and how likely each is."""
        front, guest, found = self._front, self._guest, []
        backend = self._backend
        ready = backend.loop.pending
        if ready:
            found.append((120, "run"))
        if front.wire.waiting:
            found += [(100, "deliver"), (4, "half")]
        if front.wire.requests:
            found.append((60, "answer"))
        if any(each.waiting for each in self.environment.threads):
            found.append((30, "thread"))
        if self._deferred:
            found.append((30, "deferred"))
        if front.connected:
            if guest.may_submit:
                found.append((50, "submit"))
            if any(ring.kick_owed for ring in guest.rings):
                found.append((40, "kick"))
            if any(map(guest.may_collect, guest.rings)):
                found.append((60, "collect"))
            if guest.translating and backend.host.outstanding:
                found.append((4, "snatch"))
            if guest.unmapping:
                found.append((50, "unmap"))
            if not front.busy:
                found += [(1, "pause"), (1, "reload"), (1, "plug")]
                logs = front.log is not None and front.log.on
                found.append((3, "end log") if logs else (2, "log"))
                if front.may_lie:
                    found.append((1, "lie"))
            if front.log is not None and front.log.on:
                found.append((3, "harvest"))
        if not ready and not front.wire.half:
            found.append((3, "time"))
        if front.busy and not front.wire.half:
            found.append((60, "rush"))
        if not self._quiet:
            found.append((1, "medium"))
        return found

    _quiet = False

    def step(self, number: int, name: str | None = None) -> None:
        """Have something happen: the named action, or one that is chosen.

        Args:
            number: Of the step; with the seed it decides all details.
            name: What is to happen; nothing does if that cannot be now.
        """
        self.rng = chooser(self.seed << 32 | number)
        actions = self.actions()
        if self._crashes:
            deaths = _DEATHS if self._front.connected else _DEATHS[:2]
            if self._front.wire.half:
                deaths = [(1, "silence")]
            if name is None and self.rng.random() < self._mortality:
                actions = deaths
            elif name is not None:
                actions += deaths
        if name is None:
            weights = [weight for weight, _ in actions]
            name = self.rng.choices([each for _, each in actions], weights)[0]
        elif name not in {each for _, each in actions}:
            return
        # From here on the choices depend on the number alone, however the step was chosen.
        self.rng = chooser(self.seed << 32 | number | 1 << 63)
        self.trace.append((number, name))
        self.steps += 1
        self.clock.advance(STEP_SECONDS)
        self._act(name)

    def _act(self, name: str) -> None:
        self._step_began = self.clock.now
        try:
            detail = getattr(self, "_do_" + name.replace(" ", "_"))()
        except Killed:
            assert self._failure is not None  # whatever else dies is buried
            raise self._failure from None
        self._digest.update(f"{name} {detail} {self.clock.now:.6f}\n".encode())
        self._check_waiting()

    @property
    def digest(self) -> str:
        """Of all that happened: equal for an equal version and seed."""
        return self._digest.hexdigest()

    # Actions

    def _do_run(self) -> object:
        """The back-end deals with what it has found."""
        return self._in_backend(lambda: self._backend.loop.run_once(0))

    def _do_thread(self) -> object:
        threads = [each for each in self.environment.threads if each.waiting]
        return self._in_backend(self.rng.choice(threads).step)

    def _do_deferred(self) -> object:
        future, function = self._deferred.pop(self.rng.randrange(len(self._deferred)))
        return self._in_backend(lambda: self._finish(future, function))

    @staticmethod
    def _finish(future: Future[int], function: Callable[[], int]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except BaseException as error:
            if isinstance(error, Killed):
                raise
            future.set_exception(error)

    def _do_deliver(self) -> object:
        wire = self._front.wire
        found = []
        for _ in range(self.rng.choice(_SEVERAL)):
            found.append(wire.deliver())
            if not wire.waiting:
                break
        return found

    def _do_half(self) -> object:
        return self._front.wire.deliver(self.rng.random())

    def _do_answer(self) -> object:
        front = self._front
        found = []
        for _ in range(self.rng.choice(_SEVERAL)):
            found.append(front.answer_miss())
            if not front.wire.requests:
                break
        return found

    def _do_submit(self) -> object:
        return self._guest.submit(self.rng)

    def _do_rush(self) -> object:
        """What the front-end does goes on until it is done, or the back-end dies."""
        front, done = self._front, []
        for _ in range(_RUSH):
            if self._front is not front or not front.busy:
                break
            names = [name for _, name in self.actions() if name in _RUSHED]
            if not names:
                break
            self.clock.advance(STEP_SECONDS)
            done.append((names[0], getattr(self, "_do_" + names[0])()))
        return done

    def _do_kick(self) -> object:
        ring = self.rng.choice([ring for ring in self._guest.rings if ring.kick_owed])
        ring.announce()
        return ring.index

    def _do_collect(self) -> object:
        ready = [ring for ring in self._guest.rings if self._guest.may_collect(ring)]
        return self._guest.collect(self.rng.choice(ready))

    def _do_unmap(self) -> object:
        guest = self._guest
        placed = guest.unmapping.pop(self.rng.randrange(len(guest.unmapping)))
        # Before a ring runs the back-end knows nothing, and is not told either.
        if placed.mapped and any(ring.running for ring in guest.rings):
            self._front.unmap(placed)
        else:
            guest.released(placed)
        return len(placed.mapped)

    def _do_snatch(self) -> object:
        """The guest unmaps what the device may be reading."""
        held = {
            (queue.index, chain.head)
            for queue in self._backend.host.queues
            for chain in queue._in_progress
        }
        what = self._guest.snatch(self.rng, held)
        if what is None:
            return ""
        self._front.invalidate(what)
        return what

    def _begin(self, operation: Operation, name: str) -> str:
        self._front.begin(operation, name)
        return name

    def _do_pause(self) -> object:
        return self._begin(self._front.pause(), "pause")

    def _do_reload(self) -> object:
        return self._begin(self._front.reload(), "reload")

    def _do_plug(self) -> object:
        return self._begin(self._front.plug(), "plug")

    def _do_log(self) -> object:
        return self._begin(self._front.start_log(), "log")

    def _do_end_log(self) -> object:
        return self._begin(self._front.end_log(), "end log")

    def _do_lie(self) -> object:
        before = self._told()
        front = self._front

        def then() -> Operation:
            yield from front.lie()
            if self._told() != before:
                raise InvariantError("L2", "a message that the back-end refused left a trace")

        return self._begin(then(), "lie")

    def _told(self) -> object:
        connection = self._backend.connection
        assert connection is not None
        session = connection._session
        rings = [(ring.num, ring.address, ring.base, ring.kicked) for ring in session.vrings]
        return session.features, session.regions, rings

    def _do_harvest(self) -> object:
        log = self._front.log
        assert log is not None
        log.by_guest |= self._guest.memory.begin_watching()
        return log.harvest(self._guest)

    def _do_medium(self) -> object:
        """The next flush fails."""
        self.disk.fails = True
        return ""

    def _do_time(self) -> object:
        """Nothing happens until the back-end's next timer is due."""
        due = self._backend.loop.next_timer
        took = min(due - self.clock.now, 10.0) if due < 1e12 else 0.001
        wire = self._front.wire
        if wire.requests or wire.waiting:
            # A front-end that lets a miss time out is to blame for what comes of it.
            took = min(took, _UNANSWERED_SECONDS)
        self.clock.advance(took)
        return ""

    # Death

    def _do_kill(self) -> object:
        self._save()
        self._bury()
        return ""

    def _do_fuse(self) -> object:
        """The back-end dies amid what it does soon."""
        self._fuse = self.rng.randrange(1, 12)
        return self._fuse

    def point(self, where: str) -> None:
        """The back-end may die here; called from within it."""
        if self._fuse is not None:
            self._fuse -= 1
            if self._fuse <= 0:
                self._fuse = None
                self._save()
                raise Killed(where)

    def _save(self) -> None:
        """Note what outlives a process: memory that others have too, and files."""
        memory, disk = self._guest.memory, self.disk
        content, image = memory.snapshot(), disk.snapshot()
        notes = self._front.notes
        noted = None if notes is None else notes.snapshot()
        calls = [(ring.call, take_event(ring.call)) for ring in self._guest.rings]
        now, fails = self.clock.now, disk.fails

        def restore() -> None:
            memory.restore(content)
            disk.restore(image)
            if notes is not None and noted is not None:
                notes.restore(noted)
            for fd, count in calls:
                take_event(fd)
                if count:
                    _add(fd, count)
            self.clock.now, disk.fails = now, fails

        self._saved = restore

    def _bury(self) -> None:
        """Let a process go that was killed, and start the next one.

        It is ended in an orderly way, so that nothing of it is left in this process; what it did to
        the world on the way is undone.
        """
        assert self._saved is not None
        self.crashed += 1
        self._fuse = None
        front = self._front
        self._notes, front.notes = front.notes, None
        front.abandon()
        self._backend.close()
        self._forget_process()
        self._saved()
        self._saved = None
        guest = self._guest
        guest.all_released()
        # No back-end is left that would acknowledge them.
        for placed in front.revoking:
            guest.released(placed)
        for ring in guest.rings:
            ring.running = False
            ring.base = ring.used_idx
            ring.recovered = set(ring.queue.tokens)
            take_event(ring.err)
            if not self._tracked:
                # Without notes the driver cannot know whether the last interrupt was sent.
                _add(ring.call, 1)
        self._backend = Backend(self, self._factory(self))
        self._connect()

    def _forget_process(self) -> None:
        self.environment.threads.clear()
        self._deferred.clear()

    def _do_guest_dies(self) -> object:
        """The front-end hangs up, and the back-end finds out by itself."""
        self.crashed += 1
        self._end_guest()
        self._until_gone()
        self._drop_notes()
        self._new_guest(self._backend.device)
        self._connect()
        return ""

    def _do_silence(self) -> object:
        """The front-end leaves half a message, and nothing else comes from it."""
        connection = self._backend.connection
        assert connection is not None
        self._in_backend_quietly()
        self.clock.advance(HALF_MESSAGE_TIMEOUT + 0.1)
        self._in_backend_quietly()
        if not connection.closed:
            raise InvariantError(
                "L12", f"half a message is waited for longer than {HALF_MESSAGE_TIMEOUT:g} s"
            )
        return self._do_guest_dies()

    def _in_backend_quietly(self) -> None:
        """Have the back-end do what it has to; it may hang up, and does not die."""
        self._fuse = None
        self._step_began = self.clock.now
        for _ in range(QUIET_ROUNDS):
            if not self._backend.loop.pending:
                break
            self._backend.loop.run_once(0)

    def _end_guest(self) -> None:
        front, guest = self._front, self._guest
        self._fuse = None
        self._notes, front.notes = front.notes, None
        front.abandon()
        guest.lose()

    def _until_gone(self) -> None:
        connection = self._backend.connection
        assert connection is not None
        began = self._step_began = self.clock.now
        for _ in range(QUIET_ROUNDS):
            if connection.closed:
                break
            try:
                self._backend.loop.run_once(0)
            except (Exception, Killed) as error:
                raise self._failure or InvariantError(
                    "L10", f"a front-end's end raised {error!r}"
                ) from error
            if not self._backend.loop.pending:
                self._idle(0.01)
        if not connection.closed or self.clock.now - began > ANSWER_SECONDS:
            raise InvariantError("L12", "a back-end does not let go of a front-end that is gone")
        self._guest.close()

    def _do_power(self) -> object:
        """The host loses power, with all that is on it."""
        self.crashed += 1
        self._save()
        saved = self._saved
        assert saved is not None
        self._end_guest()
        self._backend.close()
        self._forget_process()
        # Only the disk is left.
        state = self.clock.now
        saved()
        self._saved = None
        self.clock.now = state
        self.disk.lose_power(self.rng)
        self._workload.lost_power()
        self._guest.close()
        self._drop_notes()
        self._backend = Backend(self, self._factory(self))
        self._new_guest(self._backend.device)
        self._connect()
        return ""

    # The back-end, watched

    def _in_backend(self, call: Callable[[], object]) -> object:
        """Have the back-end do something, and check what it did."""
        memory, log = self._guest.memory, self._front.log
        by_guest = memory.begin_watching(told=log is not None)
        if log is not None:
            log.by_guest |= by_guest
        began = self._step_began = self.clock.now
        try:
            call()
        except Killed:
            pass
        except Exception as error:
            if self._saved is None and self._failure is None:
                raise InvariantError("L10", f"the back-end's loop raised {error!r}") from error
        if self._failure is not None:
            raise self._failure
        if self.clock.now - began > KEPT_SECONDS:
            # The device had no time to answer, and a stop does not wait for ever.
            self.excuse()
        if self._saved is not None:
            # Also if a thread of the device's caught it: what it did since is undone.
            self._bury()
            return "dies"
        return self._watch()

    def _watch(self) -> object:
        memory = self._guest.memory
        changed = memory.end_watching()
        log = self._front.log
        if changed and log is not None and log.on:
            for page in sorted(changed):
                at = memory.guest_address(page)
                if not log.is_marked(at):
                    raise InvariantError(
                        "L9", f"the device wrote to page {at:#x} and did not mark it in the log"
                    )
        if self._front.wire.receive():
            raise InvariantError("L10", "the back-end hung up on a front-end that kept the rules")
        self._front.go_on()
        self._check_known()
        for ring in self._guest.rings:
            if take_event(ring.err):
                raise InvariantError(
                    "L10",
                    f"queue {ring.index} broke: {self._backend.host.queues[ring.index].broken}",
                )
        return sorted(changed)

    def _check_known(self) -> None:
        if not self._iommu:
            return
        connection = self._backend.connection
        assert connection is not None
        known = connection._translator.iotlb._map
        # Between a stop and the next start answers may come that the driver does not use.
        if connection._host.live and len(known):
            self._guest.tables.check(known.overlapping(0, 2**64))

    def check_locks(self, what: str) -> None:
        """No lock of guestio's but that of a queue is held; called where a device is."""
        back = self._backend.connection
        if back is not None and back._back.lock.locked():
            # A host takes what is raised there for the device's failure.
            self._failure = InvariantError("L11", f"{what} is called under a lock")
            raise Killed(what)

    def _check_waiting(self) -> None:
        """An operation of the front-end does not wait for ever."""
        waited = self._front._awaited
        if waited is None or self._front.wire.waiting:
            self._waited = None
        elif self._waited is None or self._waited[0] is not waited:
            self._waited = waited, self.clock.now
        elif self.clock.now - self._waited[1] > ANSWER_SECONDS:
            raise InvariantError(
                "L12",
                f"{self._front.busy}: no answer came within {ANSWER_SECONDS:g} s, whatever the "
                "device does",
            )

    def _sync(self, _fd: int) -> None:
        self.point("flush")
        if self.disk.fails:
            self.excuse()
        self.disk.flush()
        self.point("flushed")

    def _idle(self, longest: float) -> None:
        """Let something happen while the back-end's own thread waits; or let time pass."""
        if self.clock.now - self._step_began > PATIENCE_SECONDS:
            self._failure = InvariantError(
                "L12",
                f"the back-end's thread waits for more than {PATIENCE_SECONDS:g} s, whatever "
                "happens meanwhile",
            )
            raise Killed("it waits")
        threads = [each for each in self.environment.threads if each.waiting]
        rng = self.rng
        if threads and rng.random() < 0.7:
            rng.choice(threads).step()
        elif self._deferred and rng.random() < 0.7:
            future, function = self._deferred.pop(rng.randrange(len(self._deferred)))
            self._finish(future, function)
        else:
            self.clock.advance(min(longest, 0.1 if rng.random() < 0.5 else 5.0))

    # The end of a run

    def finish(self) -> None:
        """Nothing goes wrong any more: everything that is in flight comes to its end.

        Raises:
            InvariantError: Something does not.
        """
        self._quiet, self._crashes, self._fuse = True, False, None
        self.disk.fails = False
        number = (1 << 31) + len(self.trace)
        still = 0
        for at in range(QUIET_ROUNDS):
            self.rng = chooser(self.seed << 32 | number + at)
            names = [name for _, name in self.actions() if name in _WORK]
            if not self._busy:
                break
            if names:
                still = 0
                self.clock.advance(STEP_SECONDS)
                self._act(names[0])
                continue
            still += 1
            if still > 60:
                break
            self._act("time")
        if self._busy and not self._may_hang:
            raise InvariantError("L14", self._stuck())
        self._check_end()

    @property
    def _may_hang(self) -> bool:
        """Whether nothing is in flight but what the device does not answer, and what is behind."""
        waiting = [ring for ring in self._guest.rings if ring.queue.outstanding]
        return not self._front.waits and all(
            any(placed.job.may_hang for placed in ring.queue.tokens) for ring in waiting
        )

    @property
    def _busy(self) -> bool:
        guest, front = self._guest, self._front
        return bool(front.waits or guest.in_flight or guest.unmapping or front.wire.waiting)

    def _stuck(self) -> str:
        guest, front = self._guest, self._front
        for ring in guest.rings:
            ready = ring.queue._ready()
            if ready:
                return (
                    f"ring {ring.index}: {ready} requests were given back, and the driver was not "
                    "interrupted"
                )
        if front.busy:
            return f"the front-end waits for ever in {front.busy}"
        return f"{guest.in_flight} requests are never given back"

    def _check_end(self) -> None:
        if not self._front.busy and self._front.connected:
            self._front.begin(self._front.stop(), "stop")
            for _ in range(QUIET_ROUNDS):
                if not self._front.waits:
                    break
                names = [name for _, name in self.actions() if name in _WORK]
                self._act(names[0] if names else "time")
            if self._front.waits:
                raise InvariantError("L12", "the rings do not stop")
            if self._iommu:
                connection = self._backend.connection
                assert connection is not None
                if len(connection._translator.iotlb):
                    raise InvariantError("L1", "translations outlive the stop of all rings")
        if isinstance(self._workload, BlockWorkload):
            # The driver is not told of what a stop has ended.
            self._workload.died(self._guest.jobs)
            self._workload.check(self.disk.content())

    @property
    def completed(self) -> int:
        """Jobs that the guests got back."""
        return self._completed + self._guest.completed


_SEVERAL: Final = (1, 1, 2, 4, 16)
"""How many things of a kind happen in one step."""

_UNANSWERED_SECONDS: Final = 0.05
"""Seconds that pass at once while the front-end owes the back-end something."""

_RUSH: Final = 200
"""Steps that are one if the front-end is in a hurry."""

_RUSHED: Final = frozenset({"run", "deliver", "answer"})

_DEATHS: Final = [(4, "kill"), (6, "fuse"), (1, "guest dies"), (1, "power")]
"""How they end, and how often."""

_MORTALITY: Final = (0.2, 0.05, 0.01)
"""How likely a step is one of them; a run has one of these."""

_WORK: Final = frozenset(
    {"run", "deliver", "answer", "thread", "deferred", "kick", "collect", "unmap"}
)


def _add(fd: int, count: int) -> None:
    os.eventfd_write(fd, count)
