"""One back-end on the bench: played to, judged, and started anew."""

from __future__ import annotations

import collections
import contextlib
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Final, TypeAlias

from guestio.budgets import (
    FUZZ_HISTORY,
    FUZZ_STDERR_LINES,
)
from guestio.errors import DeviceError
from guestio.faults.base_trial import BaseTrial
from guestio.faults.fuzz.generate import make_case
from guestio.faults.fuzz.guests import Guests
from guestio.faults.fuzz.outcomes import Outcome, Player, Verdict, reduce_case
from guestio.faults.fuzz.player import BackendPlayer, WrongError
from guestio.faults.fuzz.steps import Case
from guestio.faults.kinds import KINDS
from guestio.faults.link import Link
from guestio.faults.outcomes import AbsentError, FailError, HungUpError, OutcomeError
from guestio.faults.report import printable
from guestio.faults.runner import START, Examination, Target

_START_FACTOR: Final = 10
_AT_LAST: Final = 10.0
"""Seconds for an honest request after which a back-end is not late but wedged, at least."""
_LINE: Final = 300


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker must know to play cases.

    Attributes:
        device: Type of the device.
        socket: Where the back-end listens; None for a place of the worker's own.
        command: Words that start the back-end; ``{socket}`` and ``{directory}`` in them are the
            worker's own. None if something else started it.
        patience: Seconds that an honest answer may take.
    """

    device: str
    socket: str | None
    command: tuple[str, ...] | None
    patience: float

    def make_case(self, seed: int) -> Case:
        """The case of a seed."""
        return make_case(self.device, seed)

    def bench(self) -> Bench:
        """What plays cases.

        Raises:
            DeviceError: As :class:`Bench`.
        """
        return Bench(self)


def _start_limit(patience: float) -> float:
    """Seconds that a back-end may take to start: more where all takes long."""
    return max(START, _START_FACTOR * patience)


class _Process(Target[Link]):
    """A back-end whose last words are kept, and which does not outlive this process."""

    def __init__(self, path: str, command: Sequence[str] | None, limit: float) -> None:
        super().__init__(path, command, Link, limit)
        self._last_words: tuple[str, ...] = ()
        self._said: collections.deque[str] = collections.deque(maxlen=FUZZ_STDERR_LINES)
        self._reader: threading.Thread | None = None
        self._watcher: subprocess.Popen[bytes] | None = None

    def _launch(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        self._said.clear()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        self._reader = threading.Thread(target=self._read, args=(process.stderr,), daemon=True)
        self._reader.start()
        self._let_go()
        # Its standard input ends when this process does, even by SIGKILL.
        self._watcher = subprocess.Popen(
            ["sh", "-c", 'read -r _; kill -9 "$0" 2>/dev/null', str(process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return process

    def _read(self, stream: IO[bytes]) -> None:
        with stream, contextlib.suppress(ValueError, OSError):
            while line := stream.readline(1 << 16):
                text = line.decode("utf-8", "replace").rstrip()
                self._said.append(printable(text[:_LINE]))

    def _death(self, status: int) -> str | None:
        # Another one may be started before they are asked for.
        if self._reader is not None:
            self._reader.join(1)
        self._last_words = tuple(self._said)
        ordinary = super()._death(status)
        if ordinary is None and status:
            return f"exited with status {status}"
        return ordinary

    def _let_go(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.kill()
            watcher.communicate()

    def said(self, *, died: bool) -> tuple[str, ...]:
        """The last lines of the standard error, of the process that died last or of this one."""
        return self._last_words if died else tuple(self._said)

    def close(self) -> None:
        super().close()
        self._let_go()
        if self._reader is not None:
            self._reader.join(1)


class _Honest(BaseTrial):
    """An honest request after a case."""

    def __init__(self, player: BackendPlayer, patience: float) -> None:
        super().__init__(patience, "0")
        self._player = player

    def probe(self) -> None:
        self._player.honest()


class _Judge(Examination):
    """Finds out whether a back-end serves."""

    def __init__(self, target: _Process, player: BackendPlayer, patience: float) -> None:
        super().__init__(target, patience, _start_limit(patience))
        self._player = player

    def _trial(self, name: str) -> BaseTrial:
        return _Honest(self._player, self._patience)


class Bench:
    """A back-end, and what plays cases to it. For one thread.

    Args:
        work: What to play to.

    Raises:
        DeviceError: It cannot be started, or serves no honest request before anything was done.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self._place: tempfile.TemporaryDirectory[str] | None = None
        path, command = work.socket, work.command
        if command is not None:
            self._place = tempfile.TemporaryDirectory(prefix="guestio-fuzz-")
            directory = self._place.name
            path = path or f"{directory}/fuzz.sock"
            command = tuple(
                word.replace("{socket}", path).replace("{directory}", directory) for word in command
            )
        if path is None:
            raise DeviceError("say where the back-end listens, or the command that starts it")
        self._target = _Process(path, command, _start_limit(work.patience))
        kind = KINDS[work.device]
        self._player = BackendPlayer(self._target.connect, kind, work.patience)
        self._judge = _Judge(self._target, self._player, work.patience)
        patience = max(_AT_LAST, 2 * work.patience)
        patient = BackendPlayer(self._target.connect, kind, patience)
        self._patient = _Judge(self._target, patient, patience)
        self._before: list[int] = []
        try:
            if complaint := self._judge.recover():
                raise DeviceError(f"{path} serves no honest request: {complaint}")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the back-end, if it was started here. May be called again."""
        self._target.close()
        if self._place is not None:
            self._place.cleanup()

    def renew(self) -> None:
        """Start the back-end anew, or wait until it serves.

        Raises:
            DeviceError: It does not.
        """
        if self._target.replaceable:
            self._target.close()
            self._before.clear()
        self._target.take_death()
        if complaint := self._judge.recover():
            raise DeviceError(f"{self._target.path} serves no more: {complaint}")

    def play(self, case: Case) -> Outcome:
        """Play a case once, and find out whether the back-end serves on."""
        self._target.start()
        verdict, reason = Verdict.OK, ""
        try:
            self._player.play(case)
        except WrongError as error:
            verdict, reason = error.verdict, str(error)
        except AbsentError:
            pass  # Whether it is gone is found out below.
        except OutcomeError as error:
            verdict, reason = Verdict.WRONG, str(error)
        if (ending := self._ending()) is not None:
            verdict, reason = ending
        before = tuple(self._before[-FUZZ_HISTORY:])
        # After a crash another process plays.
        self._before = [] if verdict is Verdict.CRASH else [*before, case.seed]
        return Outcome(
            case.seed,
            verdict,
            printable(reason),
            stderr=()
            if verdict is Verdict.OK
            else self._target.said(died=verdict is Verdict.CRASH),
            before=before,
        )

    def _ending(self) -> tuple[Verdict, str] | None:
        complaint = self._judge.serves()
        if isinstance(complaint, HungUpError | AbsentError):
            # A process that ends takes connections for a moment more.
            if self._target.replaceable:
                self._target.ended(self.work.patience)
            complaint = self._judge.serves()
        if death := self._target.take_death():
            return Verdict.CRASH, death
        if complaint is None:
            return None
        if isinstance(complaint, AbsentError):
            return Verdict.CRASH, "nothing listens any more"
        if isinstance(complaint, FailError):
            return Verdict.WRONG, f"afterwards: {complaint}"
        if self._patient.serves() is None:
            return Verdict.LATE, f"afterwards: {complaint}"
        if death := self._target.take_death():
            return Verdict.CRASH, death
        return Verdict.WEDGED, f"serves no honest request afterwards: {complaint}"

    def examine(self, case: Case) -> Outcome:
        """Play a case; again, to a back-end that was started anew, if something is found.

        Raises:
            DeviceError: The back-end cannot be started again, or serves no more.
        """
        found = self.play(case)

        def again() -> Outcome:
            self.renew()
            return self.play(case)

        confirmed = found.confirmed(again)
        if found.bad:
            self.renew()
        return confirmed

    def minimize(self, case: Case, kind: str) -> Case:
        """Leave out steps for as long as the case still fails in the same way.

        Raises:
            DeviceError: The back-end cannot be started again, or serves no more.
        """

        def fails(fewer: Case) -> bool:
            outcome = self.play(fewer)
            if outcome.bad:
                self.renew()
            return outcome.kind == kind

        return reduce_case(case, fails)


Job: TypeAlias = Work | Guests
"""What a worker is told."""

_LOCAL: Final = threading.local()


def _bench(work: Job) -> Player:
    """The bench of this thread, which is kept from one task to the next."""
    if getattr(_LOCAL, "work", None) != work:
        close_bench()
        _LOCAL.bench = work.bench()
        _LOCAL.work = work
    bench: Player = _LOCAL.bench
    return bench


def close_bench() -> None:
    """End the back-end of this thread."""
    bench: Player | None = getattr(_LOCAL, "bench", None)
    if bench is not None:
        _LOCAL.bench = _LOCAL.work = None
        bench.close()


def play_seeds(work: Job, seeds: Sequence[int], seconds: float) -> list[Outcome]:
    """Task of a worker: play these seeds, for so long at most; outcomes of those that were played.

    Raises:
        DeviceError: As :meth:`Bench.examine`.
    """
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    bench = _bench(work)
    for seed in seeds:
        if time.monotonic() >= deadline:
            break
        outcomes.append(bench.examine(work.make_case(seed)))
    return outcomes


def minimize_seed(work: Job, seed: int, kind: str) -> Case:
    """Task of a worker: the smallest case of a seed that still fails in this way."""
    return _bench(work).minimize(work.make_case(seed), kind)


def parse_command(text: str) -> tuple[str, ...]:
    """The words of a command line.

    Raises:
        ValueError: A quotation is not closed, or there is no word.
    """
    words = tuple(shlex.split(text))
    if not words:
        raise ValueError("the command is empty")
    return words
