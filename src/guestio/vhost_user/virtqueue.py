"""A virtqueue as a back end serves it: its descriptors, its ring, its turns.

A queue that lacks a translation is parked, asks for all that it lacks at once, and goes on when the
answers are there. A request that takes time is answered with a `Future`; it is completed when that
is done, and whoever stops the queue waits for it.

Nothing is lost by a stop or a crash, because whoever goes on can always tell where: without a
region that notes the requests in flight, requests are shown to the driver in the order of the ring,
and the used index says it all; with one (INFLIGHT_SHMFD), they are shown as they complete.

Threads: a queue is served in its poller's thread, with its lock held. Whoever changes it takes the
lock too, so it may be set up and stopped from any thread.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import reprlib
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import NamedTuple

from guestio._core.base.syscalls import drain_eventfd, notify_eventfd
from guestio._core.iommu.misses import Misses, touched
from guestio._core.virtio.chain import Chain
from guestio._core.virtio.loop import Attended, Intake
from guestio._core.virtio.ring import SplitRing
from guestio.addr import shown
from guestio.budgets import CANCEL_SECONDS, SLOW_ANSWER, SLOW_DEVICE, TURN_SECONDS
from guestio.errors import GuestioError, ProtocolError, QueueError
from guestio.memory.backing import close_fd
from guestio.vhost_user.foreign import PipeNotifier, check_eventfd, close_foreign, is_pipe
from guestio.vhost_user.messages import VringAddr
from guestio.vhost_user.poller import Poller
from guestio.vhost_user.statistics import Bursts, Statistics
from guestio.vhost_user.translations import Outcome, Translations
from guestio.virtio.device import Device

log = logging.getLogger("guestio.vhost_user")

TURN = 64
"""Requests that are served before somebody else has a turn."""

POLL_INTERVAL = 0.001
"""Seconds between looks at a ring whose front-end gave no kick fd."""

SPIN = 50e-6
"""Seconds that a queue is watched before everybody else has a turn."""

MAX_REFUSED = 4096
"""Refused pages that are remembered for a queue."""

PASS_PAUSE = 0.0002
"""Seconds between looks whether another thread has taken the lock of a queue."""

COPY_GRACE = 0.25
"""Seconds beyond its time limit that a stop waits for system calls that move a request's memory."""


COPY_LOOK = 0.01
"""Seconds between looks at requests that were answered while a system call moves their memory."""


class _Late(NamedTuple):
    """An answer that is to come, and since when the device has the request (monotonic time)."""

    answer: Future[int]
    since: float


@dataclass(frozen=True)
class QueueHost:
    """What the queues of a back end share.

    Attributes:
        device: Serves the requests.
        error_status: That of the device's type.
        statistics: Where to count.
        bursts: Where to report what a guest may cause any number of times.
        translations: Whom to ask for what is missing.
        make_ring: Called with a queue that is set up; its ring, or None if it is not complete.
        tracked: Whether requests in flight are noted, for whoever takes over after a crash.
        broken: Called from any thread with a queue that its driver ruined, and why.
        given_up: Called when a device did not answer requests in the time that a stop may take.
        intake: Serves queues while nothing is to be decided; None if they have their own threads.
        poll_seconds: How long to look out for a request before sleeping.
    """

    device: Device
    error_status: int | None
    statistics: Statistics
    bursts: Bursts
    translations: Translations
    make_ring: Callable[[Virtqueue], SplitRing | None]
    tracked: Callable[[], bool]
    broken: Callable[[Virtqueue, GuestioError], None]
    given_up: Callable[[], None]
    intake: Intake | None
    poll_seconds: float


class QueueLock:
    """Held while a queue is served or changed; the thread that changes it has its turn.

    A thread that serves a queue without a pause would take a plain lock again before one that waits
    for it wakes up.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._counting = threading.Lock()
        self._wanted = 0

    def acquire(self, seconds: float = -1) -> bool:
        """Take the lock to change the queue, again if it is taken; whether that came in time."""
        if self._lock.acquire(blocking=False):
            return True
        with self._counting:
            self._wanted += 1
        try:
            return self._lock.acquire(timeout=seconds)
        finally:
            with self._counting:
                self._wanted -= 1

    def acquire_to_serve(self) -> None:
        """Take the lock for a turn of the queue, after a thread that waits to change it."""
        while self._wanted:
            time.sleep(PASS_PAUSE)
        self._lock.acquire()

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Virtqueue:
    """A virtqueue as the front-end set it up.

    Args:
        index: Its number.
        host: What it shares with others.
        poller: Whose thread serves it.

    Attributes:
        num: Entries of its ring, or 0.
        address: Where its ring is.
        base: Where to begin in the ring.
    """

    def __init__(self, index: int, host: QueueHost, poller: Poller) -> None:
        self.index = index
        self._host = host
        self._poller = poller
        self._lock = QueueLock()
        self._scheduled = False
        self._late: dict[Chain, _Late] = {}
        self._late_change = threading.Condition()
        self._settled: deque[Chain] = deque()
        self._moving: list[Chain] = []
        self._moving_since: float | None = None
        self._tell_after = SLOW_ANSWER
        self._watching = False
        self._told_of: tuple[float, float] = (0.0, 0.0)
        self._pipes: dict[int, PipeNotifier] = {}
        self._clear()

    def _clear(self) -> None:
        self.num = 0
        self.address: VringAddr | None = None
        self.base = 0
        self._enabled = False
        self._started = False
        self._polled = False
        self._stuck = False
        self._watch_until = 0.0
        self._parked_at: float | None = None
        self._parked_for = 0
        self._kick: int | None = None
        self._call: int | None = None
        self._err: int | None = None
        self._ring: SplitRing | None = None

    @property
    def live(self) -> bool:
        """Whether the front-end may announce requests: it has set a kick, or asked for polling."""
        return self._kick is not None or self._polled

    @property
    def outstanding(self) -> int:
        """Requests that the device holds, or whose memory it still uses."""
        return len(self._late) + len(self._settled) + len(self._moving)

    @property
    def lock(self) -> QueueLock:
        """Held while the queue is served or changed."""
        return self._lock

    def announce_stop(self) -> None:
        """Have the device finish what it holds, before anybody waits for it."""
        if self._ring is None:
            return
        try:
            self._host.device.stopping(self.index)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            self._host.bursts.report(
                "queue %d: %s failed", self.index, self._method("stopping"), trace=True
            )

    def await_turn(self) -> None:
        """Wait until the thread of the queue has a turn to give, and report a device that has not.

        A stop of the queue waits for that turn, whatever the device does.
        """
        if self._lock.acquire(SLOW_DEVICE):
            self._lock.release()
        else:
            self._host.bursts.report(
                "queue %d: %s has not returned for %d s; the queue cannot be stopped until it does",
                self.index,
                self._method("process"),
                SLOW_DEVICE,
            )

    def reset(self, until: float, *, keep_base: bool = False) -> None:
        """Stop the queue and forget how it was set up.

        Args:
            until: As for :meth:`detach`.
            keep_base: Whether to remember where it stopped.
        """
        with self._lock:
            self.stop(until)
            self._set_fd("call", None)
            self._set_fd("err", None)
            base = self.base
            self._clear()
            if keep_base:
                self.base = base

    def set_num(self, num: int) -> None:
        """Set the number of entries."""
        with self._lock:
            self.num = num
            self.wake()

    def set_address(self, address: VringAddr, until: float) -> None:
        """Set where the ring is; ``until`` as for :meth:`detach`."""
        with self._lock:
            self.detach(until)
            self.address = address

    def set_base(self, base: int) -> None:
        """Set where to begin in the ring."""
        with self._lock:
            self.base = base

    def enable(self, enable: bool) -> None:
        """Serve the queue, or let it stand."""
        with self._lock:
            self._leave()
            self._enabled = enable
            self.wake()

    def detach(self, until: float) -> None:
        """Let go of a ring's memory; it is set up again, where it stopped, before its next use.

        Requests that take time are waited for, and fail if they are not done in time. Completions
        that cannot be shown any more are taken back, and done again then.

        Args:
            until: When to give up the requests that the device still holds (monotonic time).
        """
        with self._lock:
            self._leave()
            self._drain(until)
            ring, self._ring, self._stuck = self._ring, None, False
            if ring is not None:
                with contextlib.suppress(GuestioError):
                    if ring.publish():
                        signal(self._call)
                    ring.give_back()
                self.base = ring.resume_at
            self.wake()

    def stop(self, until: float) -> None:
        """Stop serving, until the next kick fd; ``until`` as for :meth:`detach`."""
        with self._lock:
            self._started = False
            self.detach(until)
            self._unpark()
            self._host.translations.forget(self.index)
            self._poller.clear_timer(self)
            self._poller.clear_timer((self, "moving"))
            self._poller.clear_timer((self, "slow"))
            self._watching = False
            self._set_fd("kick", None)
            self._polled = False

    def set_kick(self, fd: int | None) -> None:
        """Set the eventfd that announces requests; None has the ring looked at now and then."""
        with self._lock:
            self._leave()
            self._set_fd("kick", fd)
            self._polled = fd is None
            # What a back-end that is gone left in flight was announced to that one; see also
            # libvhost-user, `vu_check_queue_inflights`.
            if fd is None or self._host.tracked():
                self._started = True
                self.wake()

    def set_call(self, fd: int | None) -> None:
        """Set the eventfd to notify the driver with."""
        with self._lock:
            self._leave()
            self._set_fd("call", fd)
            # A back-end that is gone may have shown requests and not come to say so; see also
            # libvhost-user, `vu_set_vring_call_exec`.
            if self._host.tracked():
                signal(self._call)
            self.wake()

    def set_err(self, fd: int | None) -> None:
        """Set the eventfd to report with that the queue is broken."""
        with self._lock:
            self._set_fd("err", fd)

    def _set_fd(self, name: str, fd: int | None) -> None:
        """Replace one of the eventfds. A kick is noticed by its edge and never read."""
        try:
            attribute = f"_{name}"
            old: int | None = getattr(self, attribute)
            setattr(self, attribute, None)
            if old is not None:
                self._poller.remove(old)
                if name == "kick":
                    drain_eventfd(old)
                pipe = self._pipes.pop(old, None)
                if pipe is None:
                    close_fd(old)
                else:
                    pipe.close()
            if fd is None:
                return
            piped = name == "call" and is_pipe(fd)
        except BaseException:
            if fd is not None:
                close_foreign([fd])
            raise
        if piped:
            pipe = PipeNotifier(fd)
            fd = pipe.fd
            self._pipes[fd] = pipe
        else:
            try:
                check_eventfd(fd, f"{name} fd of queue {self.index}")
                if name == "kick":
                    self._poller.add(fd, functools.partial(self._kicked, fd), edge=True)
            except OSError as error:
                close_foreign([fd])
                raise ProtocolError(
                    f"the {name} fd of queue {self.index} is unusable: {error.strerror}"
                ) from error
            except BaseException:
                close_foreign([fd])
                raise
        setattr(self, attribute, fd)

    def wake(self) -> None:
        """Have the queue served, soon and by its own thread. From any thread."""
        if not self._scheduled:
            self._scheduled = True
            try:
                self._poller.again(self._run)
            except BaseException:
                self._scheduled = False
                raise

    def _kicked(self, fd: int) -> None:
        self._lock.acquire_to_serve()
        try:
            # The queue may have been stopped since the poller found the descriptor readable.
            if fd == self._kick:
                self._started = True
                self._serve()
        finally:
            self._lock.release()

    def _run(self) -> None:
        self._scheduled = False
        self._lock.acquire_to_serve()
        try:
            self._serve()
        finally:
            self._lock.release()

    def _serve(self) -> None:
        """Serve the queue for one turn."""
        if self._stuck or not (self._enabled and self._started):
            return
        try:
            if self._ring is None:
                self._ring = self._host.make_ring(self)
            if self._ring is not None and self._serve_ring(self._ring):
                self.wake()
        except GuestioError as error:
            self._break(error)

    def _break(self, error: GuestioError) -> None:
        self._stuck = True
        signal(self._err)
        self._host.broken(self, error)

    def _serve_ring(self, ring: SplitRing) -> bool:
        """Serve a ring until there is nothing to do, or until others have a turn.

        Returns:
            Whether there is more to do.
        """
        host = self._host
        call = -1 if self._call is None else self._call
        until = time.monotonic() + TURN_SECONDS
        for _ in range(TURN):
            if self._settled:
                self._complete_settled(ring)
            watching = host.poll_seconds and time.monotonic() < self._watch_until
            outcome = ring.turn(host.device.server, TURN, call, not watching)
            taken = self._conclude(ring, outcome)
            if taken is None:
                return False
            if taken >= TURN or time.monotonic() >= until:
                return True
            # Those who watch other queues have their turn too.
            if (
                watching
                and not taken
                and (self._poller.busy or not ring.spin(SPIN, self._poller.fileno()))
            ):
                return True
        return True

    def _conclude(self, ring: SplitRing, outcome: Outcome) -> int | None:
        """Do what is left to do after a turn of the ring.

        Returns:
            How many requests were taken; None if there is nothing more to do now.
        """
        chains, missing, served, resting = outcome
        host = self._host
        given = len(chains)
        if served or given:
            try:
                if chains:
                    self._begin(ring, chains)
            finally:
                host.statistics.traffic.count_requests(served + len(chains))
            if len(chains) < given:
                # Also if others wait for translations.
                self.wake()
            if host.poll_seconds:
                self._watch_until = time.monotonic() + host.poll_seconds
        if missing:
            self._park(ring, missing)
            return None
        self._unpark()
        if not resting:
            return served + len(chains)
        if self._polled:
            self._poller.set_timer(self, time.monotonic() + POLL_INTERVAL, self._run)
        elif host.intake is not None and not host.poll_seconds:
            self._attend(host.intake, ring)
        return None

    def _attend(self, intake: Intake, ring: SplitRing) -> None:
        """Have the queue served in the core until something is to be decided."""
        if self._kick is not None:
            call = -1 if self._call is None else self._call
            intake.attend(Attended(ring, self._host.device.server, self._kick, call, self.index))

    def _leave(self) -> None:
        if self._host.intake is not None:
            self._host.intake.leave(self.index)

    def go_on(self, outcome: Outcome | GuestioError | None) -> None:
        """Take a queue over that was served in the core, with what is to be decided."""
        with self._lock:
            ring = self._ring
            try:
                if isinstance(outcome, GuestioError):
                    self._break(outcome)
                elif outcome is None or ring is None or self._conclude(ring, outcome) is not None:
                    self.wake()
            except GuestioError as error:
                self._break(error)

    def _begin(self, ring: SplitRing, chains: list[Chain]) -> None:
        """Have requests processed; those that take time are completed later.

        Args:
            ring: Where they come from.
            chains: All that were taken. Once the turn is over the rest of them is removed and put
                back into the ring: a device that takes its time for each of them keeps neither the
                front-end nor other queues from their turns.

        Raises:
            QueueError: One failed and its driver cannot be told.
        """
        untold = None
        began = now = time.monotonic()
        at, taken = 0, len(chains)
        try:
            while at < len(chains):
                if now - began >= TURN_SECONDS and at and taken == len(chains):
                    rest = chains[at:]
                    ring.put_back(rest)
                    chains[at:] = rest
                    if not rest:
                        break
                chain = chains[at]
                at += 1
                answer = self._process(chain)
                if isinstance(answer, Future):
                    self._await(chain, answer, began)
                elif (
                    chain.fault is None or chain.tail is not None or self._host.error_status is None
                ):
                    if not self._complete(ring, chain, answer):
                        self._withhold(chain)
                else:
                    chain.settle(0)
                    untold = chain
                now = time.monotonic()
        except BaseException:
            # Serving ends. What was not answered is not shown, and must not keep memory in use.
            for chain in chains:
                if chain not in self._late:
                    with contextlib.suppress(ValueError):
                        chain.settle(0)
            raise
        if (took := now - began) >= SLOW_DEVICE:
            self._host.bursts.report(
                "queue %d: %s took %d s for %d requests, and nothing else was served meanwhile; "
                "have it return a future of what takes long",
                self.index,
                self._method("process"),
                took,
                len(chains),
            )
        if untold is not None:
            # A status of before would tell the driver that all went well.
            raise QueueError(
                f"request {untold.head} failed and the byte for its status cannot be reached: "
                f"{untold.fault}"
            )

    def _complete(self, ring: SplitRing, chain: Chain, written: int) -> bool:
        """As ``ring.complete``, also for a request that its device has settled by itself."""
        try:
            return ring.complete(chain, written)
        except ValueError:
            self._host.statistics.traffic.count_failed()
            self._host.bursts.report(
                "queue %d: %s called Chain.settle; return the number of bytes written instead",
                self.index,
                self._method("process"),
            )
            return ring.complete(chain)

    def _method(self, name: str) -> str:
        """A method of the device, for people."""
        return f"{type(self._host.device).__name__}.{name}"

    def _await(self, chain: Chain, answer: Future[int], since: float) -> None:
        """Have a request completed once its future is done."""
        chain.hand_over()
        self._late[chain] = _Late(answer, since)
        if not self._watching:
            self._watching = True
            self._poller.set_timer((self, "slow"), since + SLOW_ANSWER, self._look_for_slow)
        try:
            answer.add_done_callback(functools.partial(self._finish, chain))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            self._host.bursts.report(
                "queue %d: request failed: the future of %s takes no callback",
                self.index,
                self._method("process"),
                trace=True,
            )
            self._take_back(chain)

    def _look_for_slow(self) -> None:
        """Name a device that has not answered for long; again each time it took twice as long."""
        with self._late_change:
            oldest = next(iter(self._late.values()), None)
        if oldest is None:
            self._watching = False
            return
        now, since = time.monotonic(), oldest.since
        age = now - since
        told_of, told_at = self._told_of
        if age >= SLOW_ANSWER and (since != told_of or age >= 2 * told_at):
            self._told_of = since, age
            self._host.bursts.report(
                "queue %d: %s has not answered a request for %d s; it holds %d, and their driver "
                "waits until it completes their futures",
                self.index,
                self._method("process"),
                age,
                len(self._late),
            )
        when = now + SLOW_ANSWER - age % SLOW_ANSWER
        self._poller.set_timer((self, "slow"), when, self._look_for_slow)

    def _complete_settled(self, ring: SplitRing) -> None:
        """Complete requests that were answered, once no system call moves their memory."""
        for _ in range(len(self._settled)):
            chain = self._settled.popleft()
            if not ring.complete(chain):
                self._withhold(chain)

    def _withhold(self, chain: Chain) -> None:
        """Complete a request later: its driver must not get memory back that is still written."""
        # The thread that took it may have to wait for it.
        chain.hand_over()
        if not self._moving:
            self._poller.set_timer(
                (self, "moving"), time.monotonic() + COPY_LOOK, self._look_at_moving
            )
        self._moving.append(chain)
        if self._moving_since is None:
            self._moving_since, self._tell_after = time.monotonic(), SLOW_ANSWER

    def _look_at_moving(self) -> None:
        with self._lock:
            self._settled.extend(self._moving)
            self._moving.clear()
            self._serve()
            if not self._moving or self._moving_since is None:
                self._moving_since = None
                return
            if (age := time.monotonic() - self._moving_since) >= self._tell_after:
                self._tell_after = 2 * age
                self._host.bursts.report(
                    "queue %d: %d requests that %s has answered wait for its system calls, which "
                    "still move their memory after %d s",
                    self.index,
                    len(self._moving),
                    self._method("process"),
                    age,
                )

    def _process(self, chain: Chain) -> int | Future[int]:
        """What the device says to a request; where it failed, what it says to that."""
        bursts, method = self._host.bursts, self._method("process")
        try:
            if chain.fault is None:
                answer = self._host.device.process(self.index, chain)
                if isinstance(answer, Future):
                    return answer
                return _plausible(answer, chain, f"{method} returned")
            bursts.report("queue %d: request refused: %s", self.index, chain.fault)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self._report_failure(error, f"{method} raised")
        return self._fail(chain)

    def _report_failure(self, error: BaseException, what: str) -> None:
        """Log why a request failed; with the traceback, if that is not an error of guestio's."""
        if isinstance(error, _NonsenseError):
            self._host.bursts.report("queue %d: request failed: %s", self.index, error)
            return
        self._host.bursts.report(
            "queue %d: request failed: %s %s: %s",
            self.index,
            what,
            type(error).__name__,
            error,
            trace=not isinstance(error, GuestioError) and error,
        )

    def _fail(self, chain: Chain, *, late: bool = False) -> int:
        """Tell the driver that a request failed, as its device does it or else as its type does.

        Args:
            chain: The request.
            late: Whether this is called in a thread of the device's, in which nothing ends that
                the device wants to end.
        """
        device, method = self._host.device, self._method("fail")
        self._host.statistics.traffic.count_failed()
        written = None
        try:
            written = _plausible(device.fail(self.index, chain), chain, f"{method} returned")
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)) and not late:
                raise
            self._report_failure(error, f"{method} raised")
        finally:
            if written is None:
                written = self._fail_as_type(chain)
            elif self._host.error_status is not None and chain.in_use():
                chain.stamp(self._host.error_status)
        return written

    def _fail_as_type(self, chain: Chain) -> int:
        """As `Device.fail`, whatever the device makes of it."""
        status, tail = self._host.error_status, chain.tail
        if status is None or tail is None:
            return 0
        try:
            tail.write(bytes([status]))
        except GuestioError:
            # The byte may be gone with its file, or have been given up already.
            return 0
        if chain.in_use():
            chain.stamp(status)
        return int(chain.fault is None and chain.writable.total == 1)

    def _finish(self, chain: Chain, answer: Future[int]) -> None:
        """Take a late answer, in whatever thread it was found.

        The memory is given back here: a revocation of its translation may be waiting for it in the
        very thread that serves the queue. If the request was given up, its answer goes nowhere.
        """
        if chain not in self._late:
            return
        written = None
        try:
            written = self._late_answer(chain, answer)
        finally:
            if written is None:
                # A signal came in between: even so its driver must not see it succeed.
                written = self._fail_as_type(chain)
            with self._late_change:
                if self._late.pop(chain, None) is not None:
                    self._give_back(chain, written)

    def _give_back(self, chain: Chain, written: int) -> None:
        """Let go of a request's memory and have it completed. Needs the lock of late requests."""
        # Whatever a device did to its request, nobody waits for it for ever.
        with contextlib.suppress(ValueError):
            chain.settle(written)
        self._settled.append(chain)
        self.wake()
        self._late_change.notify_all()

    def _late_answer(self, chain: Chain, answer: Future[int]) -> int:
        whose = f"the future of {self._method('process')} ended with"
        late = threading.current_thread() is not threading.main_thread()
        try:
            # One that only pretends to be done must not be waited for.
            return _plausible(answer.result(0), chain, whose)
        except CancelledError:
            self._host.bursts.report(
                "queue %d: request failed: the future of %s was cancelled",
                self.index,
                self._method("process"),
            )
        except BaseException as error:
            # In the main thread these may come of a signal instead.
            if (
                isinstance(error, (KeyboardInterrupt, SystemExit))
                and not late
                and answer.exception(0) is not error
            ):
                raise
            self._report_failure(error, whose)
        return self._fail(chain, late=late)

    def give_up(self, iova: int, size: int) -> None:
        """Fail the requests that the device holds and that use a range of addresses.

        For a revocation that has waited for them long enough. From any thread.
        """
        with self._late_change:
            held = [chain for chain in list(self._late) if _uses(chain, iova, iova + size)]
        self._disown(held, "their memory is taken away")

    def _disown(self, held: list[Chain], why: str) -> None:
        """Fail requests that the device still holds; what it says of them later goes nowhere."""
        if not held:
            return
        self._host.bursts.report(
            "queue %d: %d requests fail that %s has not answered in time: %s",
            self.index,
            len(held),
            self._method("process"),
            why,
        )
        spent = 0.0
        for chain in held:
            spent += self._take_back(chain, cancel=spent < CANCEL_SECONDS)

    def _take_back(self, chain: Chain, *, cancel: bool = True) -> float:
        """Fail a request that the device still holds; the seconds that its future's cancel took."""
        late = self._late.get(chain)
        if late is None:
            return 0.0
        written = self._fail(chain)
        with self._late_change:
            if self._late.pop(chain, None) is None:
                return 0.0
            self._give_back(chain, written)
        if not cancel:
            return 0.0
        began = time.monotonic()
        # What has not begun need not begin any more.
        try:
            late.answer.cancel()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            self._host.bursts.report(
                "queue %d: the future of %s cannot be cancelled",
                self.index,
                self._method("process"),
                trace=True,
            )
        return time.monotonic() - began

    def _drain(self, until: float) -> None:
        """Wait for the requests that take time, and complete them; fail them when time is up.

        Those whose memory is still moved by a system call then are not shown to the driver: the
        next back-end begins with them.
        """
        with self._late_change:
            while self._late and (left := until - time.monotonic()) > 0:
                self._late_change.wait(left)
            held = list(self._late)
        if held:
            self._disown(held, "the queue stops")
            self._host.given_up()
        self._settled.extend(self._moving)
        self._moving.clear()
        self._moving_since = None
        self._wait_for_copies(until + COPY_GRACE)
        while self._settled:
            chain = self._settled.popleft()
            if self._ring is not None:
                self._ring.complete(chain)

    def _wait_for_copies(self, until: float) -> None:
        """Wait for system calls that move the memory of requests which were answered or given up.

        The memory is kept for a call that does not return; its kernel may still write to it.
        """
        while (moving := sum(c.in_use() for c in list(self._settled))) and time.monotonic() < until:
            time.sleep(0.001)
        if moving:
            self._host.given_up()
            self._host.bursts.report(
                "queue %d: %d requests are not given back to their driver: system calls of %s "
                "still move their memory, and write to it until they return",
                self.index,
                moving,
                self._method("process"),
            )

    def _park(self, ring: SplitRing, missing: Misses) -> None:
        """Ask for what the queue lacks; a request that lacks what was refused fails instead."""
        self._leave()
        now = time.monotonic()
        if self._parked_at is None or self._parked_for != ring.progress:
            self._parked_at, self._parked_for = now, ring.progress
        if not self._give_up(ring, late=now - self._parked_at >= self._host.translations.patience):
            self._host.translations.ask(self.index, missing)

    def _unpark(self) -> None:
        self._parked_at = None
        self._host.translations.refused(self.index).clear()

    def _give_up(self, ring: SplitRing, *, late: bool) -> bool:
        """Deal with a refusal that concerns the ring itself or a request that waits.

        Args:
            ring: The queue's ring.
            late: Whether the oldest has waited long enough for whatever it lacks.

        Returns:
            Whether there is nothing to ask for now.
        """
        refused = self._host.translations.refused(self.index)
        if not refused and not late:
            return False
        if len(refused) > MAX_REFUSED:
            refused.clear()
        lacking = ring.missing()
        if lacking and (late or touched(lacking, refused)):
            self._host.bursts.report("queue %d: its ring has no translation", self.index)
            refused.clear()
            self._started, self._parked_at = False, None
            return True
        lacks = ring.lacking()
        if lacks is None:
            return False
        lost = touched(lacks, refused)
        # The end of a request is the place of a block request's status: that may still come.
        hopeless = lost and not self._host.translations.under_way(*lacks[-1])
        if lacks and not hopeless and not late:
            return False
        refused -= lost
        if late and not hopeless:
            self._host.bursts.report(
                "queue %d: a request fails for want of time: its translations were not complete "
                "after %g s",
                self.index,
                self._host.translations.patience,
            )
        self._fail_lacking(ring)
        return True

    def _fail_lacking(self, ring: SplitRing) -> None:
        """Fail a request that waits for what will not come."""
        host = self._host
        chain = ring.pop_faulty()
        if chain is not None:
            host.statistics.traffic.count_requests(1)
            host.translations.report_access_fails(chain.access_fails)
            self._begin(ring, [chain])
        self.wake()


class _NonsenseError(Exception):
    """A device's answer is no number of bytes; the message names its method."""


def _plausible(written: object, chain: Chain, whose: str) -> int:
    """What a device says that it wrote, if that is possible.

    Raises:
        _NonsenseError: It is not.
    """
    if type(written) is int:
        count = written
    else:
        try:
            if isinstance(written, bool):
                raise TypeError
            # An integer of a class of its own may compare as it likes.
            count = int.__index__(operator.index(written))  # type: ignore[arg-type]
        except TypeError:
            raise _NonsenseError(
                f"{whose} {reprlib.repr(written)}; return the number of bytes written"
            ) from None
    if not 0 <= count <= chain.writable.total:
        raise _NonsenseError(
            f"{whose} {shown(count)}, but the request has room for {chain.writable.total} "
            "bytes; return the number of bytes written"
        )
    return count


def _uses(chain: Chain, first: int, end: int) -> bool:
    """Whether a request has memory at the addresses from ``first`` to ``end``."""
    return any(
        addr < end and first < addr + length
        for memory in (chain.readable, chain.writable)
        for addr, length in memory.fragments()
    )


def signal(fd: int | None) -> None:
    """Notify an eventfd, if there is one."""
    if fd is not None:
        notify_eventfd(fd)
