"""Runs the catalogue against a back-end, and finds out after each check whether it still serves."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

from guestio.errors import DeviceError
from guestio.faults.catalogue import Check, catalogue, select
from guestio.faults.kinds import KINDS
from guestio.faults.link import Link
from guestio.faults.outcomes import (
    AbsentError,
    FailError,
    HungUpError,
    OutcomeError,
    RejectError,
    SilentError,
    SkipError,
)
from guestio.faults.raw_link import RawLink
from guestio.faults.report import Report, Result, Severity, Verdict, printable
from guestio.faults.trial import Trial

if TYPE_CHECKING:
    from guestio.faults.base_trial import BaseTrial
    from guestio.faults.kinds import Kind

PATIENCE: Final = 1.0
"""Seconds that an answer, and the honest request after each check, may take."""
START: Final = 10.0
"""Seconds that a back-end's command may take until it listens, and a wedged one to recover."""
_PAUSE: Final = 0.01
_PANIC: Final = 101
_ORDER: Final = (Severity.SAFETY, Severity.MUST, Severity.SHOULD)


L = TypeVar("L", bound=RawLink)


class Examined(Protocol):
    """What is examined; see :class:`Target`, which is one, for the methods."""

    @property
    def path(self) -> str:
        """What it is called in reports."""
        ...

    @property
    def replaceable(self) -> bool:
        """Whether it can be started again."""
        ...

    @property
    def connect(self) -> Callable[[float], Any]:
        """Reaches it, with an answer in so many seconds."""
        ...

    def start(self) -> None:
        """Start it if it does not run."""
        ...

    def take_death(self) -> str | None:
        """How it died since this was last asked."""
        ...

    def ended(self, seconds: float) -> bool:
        """Wait so long for its end; whether it has ended."""
        ...

    def close(self) -> None:
        """End it, if it was started here."""
        ...


class Target(Generic[L]):
    """What is examined: a socket, and the command that starts what listens, if that is known.

    Args:
        path: The socket.
        command: Words of the command; None if something else started it.
        link: What a connection is.
        limit: Seconds that the command may take until it listens.
    """

    def __init__(
        self, path: str, command: Sequence[str] | None, link: type[L], limit: float = START
    ) -> None:
        self.path = path
        self._limit = limit
        self._link = link
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._died: str | None = None
        self._latest: L | None = None
        # Whether its process ends with its front-end.
        self._parts = False

    def start(self) -> None:
        """Start the command if it does not run, and wait until it listens.

        Raises:
            DeviceError: It cannot be started, or does not listen in time.
        """
        if self._command is None or (self._process is not None and self._process.poll() is None):
            return
        self._note_death()
        Path(self.path).unlink(missing_ok=True)
        try:
            self._process = self._launch(self._command)
        except OSError as error:
            raise DeviceError(f"cannot start {self._command[0]}: {error.strerror}") from error
        deadline = time.monotonic() + self._limit
        # The socket is looked for, not connected to: some back-ends end with their first front-end.
        while not Path(self.path).exists():
            if (status := self._process.poll()) is not None:
                raise DeviceError(f"{shlex.join(self._command)} ended with status {status}")
            if time.monotonic() >= deadline:
                raise DeviceError(f"{shlex.join(self._command)} does not make {self.path}")
            time.sleep(_PAUSE)
        # A socket is bound before it listens.
        time.sleep(_PAUSE)

    def _launch(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a process of the command."""
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    @property
    def replaceable(self) -> bool:
        """Whether it can be started again."""
        return self._command is not None

    def connect(self, patience: float) -> L:
        """Connect to it; one that ended with its last front-end is started anew.

        Raises:
            AbsentError: Nothing listens.
            SilentError: Too many connections wait to be accepted.
        """
        if self._parts and self._latest is not None and self._latest.fileno() < 0:
            # A process that ends takes connections for a moment more, which nothing answers.
            self.ended(patience)
        self._latest = self._reach(patience)
        return self._latest

    def _reach(self, patience: float) -> L:
        try:
            return self._link.connect(self.path, patience)
        except AbsentError:
            # One that takes no second connection may need a while to end after its first.
            if not self.replaceable or not self.ended(max(patience, START)):
                raise
        self.start()
        deadline = time.monotonic() + self._limit
        while True:
            try:
                return self._link.connect(self.path, patience)
            except AbsentError:
                # It has bound the socket, and does not listen yet.
                if time.monotonic() >= deadline or self.ended(_PAUSE):
                    raise

    def take_death(self) -> str | None:
        """How its process died since this was last asked, if otherwise than by an ordinary exit."""
        self._note_death()
        died, self._died = self._died, None
        return died

    def _note_death(self) -> None:
        if self._process is None or (status := self._process.poll()) is None:
            return
        death = self._death(status)
        self._parts |= death is None
        self._died = death or self._died
        self._process = None

    def _death(self, status: int) -> str | None:
        """How a process died that ended with this status, or None for an ordinary exit."""
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return f"exited with status {status}, as a panic does" if status == _PANIC else None

    def ended(self, seconds: float) -> bool:
        """Wait so long for the command's process to end; whether it has, or was not started."""
        if self._process is None:
            return True
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """End the command, if it was started here."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(2)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None


def check(
    path: str | os.PathLike[str],
    device: str = "blk",
    *,
    only: Sequence[str] = (),
    severity: Severity | str = Severity.SHOULD,
    seed: int = 0,
    queue: int | None = None,
    writable: bool = False,
    patience: float = PATIENCE,
    command: Sequence[str] | str | None = None,
    recovery: float = START,
    progress: Callable[[Result], None] | None = None,
) -> Report:
    """Run the catalogue against a vhost-user back-end, without a VM.

    Each check has connections of its own, one after the other. After each an honest request must be
    served, on another connection and within ``patience``; else the verdict is WEDGED, or CRASH if
    the back-end is gone.

    Args:
        path: The socket on which the back-end listens.
        device: Type of its device: a key of :data:`guestio.faults.KINDS`.
        only: Names of checks, with wildcards as for files, or of areas; all if there are none.
        severity: The weakest kind of check to run: ``should`` for all, ``must`` without
            recommendations, ``safety`` for those alone in which the peer is hostile.
        seed: Of everything random; the same seed asks the same.
        queue: The queue that requests are made on; None for that of the device type.
        writable: Whether a disk may be written. What was written is put back, unless that fails.
        patience: Seconds that an answer may take.
        command: Starts the back-end, before the first check and whenever it has ended. Without it
            the back-end must run, and what follows a crash is skipped.
        recovery: Seconds that the back-end may take until it serves for the first time, and again
            after it was wedged or started anew.
        progress: Called with each result.

    Raises:
        ValueError: There is no such device type, or no such check.
        DeviceError: The back-end cannot be started, or does not serve an honest request before
            anything else was done to it.
    """
    if device not in KINDS:
        raise ValueError(f"there is no device type {device!r}; say one of {', '.join(KINDS)}")
    kind = KINDS[device]
    chosen = as_strong(select(catalogue(device), only), Severity(severity))
    words = shlex.split(command) if isinstance(command, str) else command
    report = Report(os.fspath(path), device, seed)
    target = Target(report.target, words, Link)
    run = _Run(target, kind, seed, queue, patience, recovery, writable=writable)
    try:
        report.results += run.run(chosen, progress)
    finally:
        target.close()
    return report


def as_strong(checks: Sequence[Check], least: Severity) -> list[Check]:
    """Those that are of this kind or a stronger one."""
    allowed = _ORDER[: _ORDER.index(least) + 1]
    return [each for each in checks if each.severity in allowed]


class Examination(ABC):
    """Runs one check after the other, and finds out after each whether what it examined lives on.

    Args:
        target: What is examined.
        patience: Seconds that an honest request may take.
        recovery: Seconds that it may take until it serves for the first time, and again after it
            was wedged or started anew.
    """

    def __init__(self, target: Examined, patience: float, recovery: float) -> None:
        self._target = target
        self._patience = patience
        self._recovery = recovery

    @abstractmethod
    def _trial(self, name: str) -> BaseTrial:
        """What a check of that name works with."""

    def examine(self, each: Check) -> tuple[Verdict, str]:
        """Run one check, and find out whether the back-end lives on."""
        self._target.start()
        with self._trial(each.id) as trial:
            try:
                each.body(trial)
            except SkipError as outcome:
                verdict, reason = Verdict.SKIP, str(outcome)
            except RejectError as outcome:
                verdict, reason = Verdict.REJECT, str(outcome)
            except HungUpError as outcome:
                verdict = Verdict.REJECT if each.hostile else Verdict.FAIL
                reason = str(outcome)
            except (FailError, SilentError, AbsentError) as outcome:
                verdict, reason = Verdict.FAIL, str(outcome)
            except OSError as error:
                # Of this process: too few descriptors, say. It is no finding about the back-end.
                verdict, reason = Verdict.SKIP, f"cannot be run here: {error}"
            else:
                verdict, reason = Verdict.PASS, ""
        return self._ending() or (verdict, reason)

    def _ending(self) -> tuple[Verdict, str] | None:
        """CRASH or WEDGED, if the back-end does not serve any more."""
        complaint = self.serves()
        if isinstance(complaint, HungUpError) and self._target.replaceable:
            # It may have been about to end, as some do with their front-end.
            self._target.ended(self._patience)
            complaint = self.serves()
        deadline = time.monotonic() + self._patience
        while isinstance(complaint, HungUpError) and time.monotonic() < deadline:
            # A process that ends takes connections for a moment more.
            time.sleep(_PAUSE)
            complaint = self.serves()
        if death := self._target.take_death():
            return Verdict.CRASH, death
        if complaint is None:
            return None
        if isinstance(complaint, AbsentError):
            return Verdict.CRASH, str(complaint)
        return Verdict.WEDGED, f"serves no honest request afterwards: {complaint}"

    def serves(self) -> OutcomeError | None:
        """Whether an honest request is served; what is wrong otherwise."""
        with self._trial("probe") as trial:
            try:
                trial.probe()
            except OutcomeError as outcome:
                return outcome
        return None

    def recover(self) -> str:
        """Wait until an honest request is served; a command is started anew if need be.

        Returns:
            What is wrong, if it stays so; else nothing.
        """
        deadline = time.monotonic() + self._recovery
        while True:
            self._target.start()
            complaint = self.serves()
            if complaint is None:
                return ""
            if time.monotonic() >= deadline:
                return str(complaint)
            if self._target.replaceable:
                self._target.close()
            elif isinstance(complaint, FailError):
                return str(complaint)
            time.sleep(_PAUSE)

    def run(
        self, checks: Sequence[Check], progress: Callable[[Result], None] | None
    ) -> list[Result]:
        """Run checks in their order.

        Raises:
            DeviceError: What is examined serves no honest request before anything else was done.
        """
        if reason := self.recover():
            raise DeviceError(f"{self._target.path} serves no honest request: {reason}")
        gone = ""
        results = []
        for each in checks:
            started = time.monotonic()
            verdict, reason = (Verdict.SKIP, gone) if gone else self.examine(each)
            if not gone and verdict in {Verdict.WEDGED, Verdict.CRASH} and self.recover():
                gone = f"nothing serves any more since {each.id}"
            result = Result(
                each.id,
                each.text,
                each.source,
                each.severity,
                verdict,
                printable(reason),
                time.monotonic() - started,
            )
            results.append(result)
            if progress is not None:
                progress(result)
        return results


class _Run(Examination):
    """Runs the catalogue for back-ends; see :func:`check` for the arguments."""

    def __init__(
        self,
        target: Target[Link],
        kind: Kind,
        seed: int,
        queue: int | None,
        patience: float,
        recovery: float,
        *,
        writable: bool,
    ) -> None:
        super().__init__(target, patience, recovery)
        self._connect = target.connect
        self._kind = kind
        self._seed = seed
        self._queue = queue
        self._writable = writable
        self._served = self._in_pairs = False

    def serves(self) -> OutcomeError | None:
        """See :class:`Examination`; finds out at first whether queues must be started in pairs."""
        complaint = super().serves()
        if complaint is not None and self._kind.beside and not self._served:
            self._in_pairs = True
            complaint = super().serves()
            self._in_pairs = complaint is None
        self._served |= complaint is None
        return complaint

    def _trial(self, name: str) -> Trial:
        return Trial(
            self._connect,
            self._kind,
            queue=self._queue,
            patience=self._patience,
            seed=f"{self._seed}:{name}",
            writable=self._writable,
            in_pairs=self._in_pairs,
        )
