"""A campaign: seeds are given to workers, what they find is merged, made small, and written down.

What is found depends on the seeds alone, however they were spread: failing seeds are looked at in
their order, once all before them are done, and each either is one more of a finding that is known,
or becomes a finding of its own.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from guestio.budgets import FUZZ_FILE_BYTES, FUZZ_FINDINGS, FUZZ_MINIMIZE_SECONDS
from guestio.errors import DeviceError
from guestio.faults.fuzz.bench import Job, close_bench, minimize_seed, play_seeds
from guestio.faults.fuzz.outcomes import Outcome, Verdict
from guestio.faults.fuzz.player import STEP_NAMES
from guestio.faults.fuzz.steps import FORMAT, Case, CaseError

CHUNK: Final = 10
"""Seeds of a task."""
_SAVE_EVERY: Final = 5.0
_TICK: Final = 0.5
_ATTEMPTS: Final = 5
_STATE: Final = "state.json"
_VERSION: Final = importlib.metadata.version("guestio")


@dataclass(slots=True)
class Finding:
    """Something that was found, by its smallest case.

    Attributes:
        outcome: What became of the seed that found it first.
        case: The fewest steps that still fail in the same way.
        seeds: All that found it, the first first.
    """

    outcome: Outcome
    case: Case
    seeds: list[int] = field(default_factory=list)

    @property
    def signature(self) -> str:
        """Verdict, reason and kinds of steps, without numbers: what makes it this finding."""
        steps = " > ".join(self._labels)
        return f"{self.outcome.kind} [{steps}]"

    @property
    def _labels(self) -> list[str]:
        return [step.label for step in self.case.steps]

    def covers(self, outcome: Outcome, case: Case) -> bool:
        """Whether a failing case is taken as one more of this.

        It is if it looks the same, and contains the same kinds of steps in the same order.
        """
        if outcome.kind != self.outcome.kind:
            return False
        labels = iter(step.label for step in case.steps)
        return all(label in labels for label in self._labels)

    def to_data(self) -> dict[str, Any]:
        """What a file holds of it."""
        return {
            "guestio fuzz": FORMAT,
            "version": _VERSION,
            "signature": self.signature,
            "found": self.outcome.to_data(),
            "seeds": self.seeds,
            "case": self.case.to_data(),
        }

    @classmethod
    def from_data(cls, data: Any) -> Finding:
        """Read what :meth:`to_data` has made.

        Raises:
            CaseError: It is something else, or of another format.
        """
        if not isinstance(data, dict) or "guestio fuzz" not in data:
            raise CaseError("no finding of guestio fuzz")
        if data["guestio fuzz"] != FORMAT:
            raise CaseError(
                f"a finding of format {data['guestio fuzz']}, and this guestio plays {FORMAT}: use "
                f"guestio {data.get('version')}"
            )
        case = Case.from_data(data.get("case"))
        for step in case.steps:
            if step.name not in STEP_NAMES:
                raise CaseError(f"there is no step {step.name!r}")
        try:
            seeds = [int(seed) for seed in data["seeds"]]
            return cls(Outcome.from_data(data["found"]), case, seeds)
        except (KeyError, TypeError, ValueError) as error:
            raise CaseError(f"no finding of guestio fuzz: {error!r}") from None

    @property
    def file_name(self) -> str:
        """What its file is named."""
        words = re.sub(r"[^a-z0-9]+", "-", self.outcome.kind.lower()).strip("-")[:50]
        return f"{words}-{self.outcome.seed}.json"


class Inline(Executor):
    """Does a task where it is submitted: for one worker, without a process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See :class:`concurrent.futures.Executor`."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            if not isinstance(error, Exception):
                raise
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See :class:`concurrent.futures.Executor`."""
        close_bench()


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def local_workers(jobs: int) -> Executor:
    """Workers that are processes of this machine."""
    if jobs == 1:
        return Inline()
    return concurrent.futures.ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=_ignore_interrupts
    )


def cluster_workers(address: str) -> tuple[Executor, int]:
    """Workers of a Dask cluster, and how many there are.

    Raises:
        DeviceError: The extra ``cluster`` is not installed, or no scheduler answers.
    """
    try:
        # It has no types.
        client_class: Any = importlib.import_module("distributed").Client
    except ImportError as error:
        raise DeviceError(
            f"--scheduler needs the extra 'cluster' (pip install 'guestio[cluster]'): {error}"
        ) from error
    try:
        client = client_class(address, timeout=10, set_as_default=False)
    except (OSError, ValueError) as error:
        raise DeviceError(f"no Dask scheduler answers at {address}: {error}") from error
    # A task that was with a worker which is gone is given to another one by the scheduler.
    executor: Executor = client.get_executor(pure=False, retries=_ATTEMPTS)
    return executor, max(len(client.ncores()), 1)


class Seeds:
    """Which seeds are done, as ranges; what they were may have any order."""

    def __init__(self, first: int, done: Sequence[Sequence[int]] = ()) -> None:
        self.first = first
        self._done: set[int] = set()
        self._low = first
        for start, end in done:
            for seed in range(start, end):
                self.add(seed)

    def __contains__(self, seed: int) -> bool:
        return self.first <= seed < self._low or seed in self._done

    def __len__(self) -> int:
        return self._low - self.first + len(self._done)

    @property
    def low(self) -> int:
        """All before this are done, and it is not."""
        return self._low

    def add(self, seed: int) -> None:
        """This one is done."""
        self._done.add(seed)
        while self._low in self._done:
            self._done.remove(self._low)
            self._low += 1

    def ranges(self) -> list[list[int]]:
        """First and one behind the last of each run of seeds."""
        found = [[self.first, self._low]] if self._low > self.first else []
        for seed in sorted(self._done):
            if found and found[-1][1] == seed:
                found[-1][1] += 1
            else:
                found.append([seed, seed + 1])
        return found


class Campaign:
    """Cases of many seeds, and what they found.

    Args:
        work: What they are played to.
        first: The first seed.
        out: Where findings and the state are written; None for nowhere.
        resume: Whether to go on with what is there; otherwise there must be nothing yet.

    Attributes:
        findings: In the order of their first seeds.
        counts: How many seeds had each verdict.
        vanished: Seeds whose verdict did not come again when they were played alone.

    Raises:
        CaseError: What is there cannot be gone on with.
    """

    def __init__(
        self, work: Job, first: int = 0, out: Path | None = None, *, resume: bool = False
    ) -> None:
        self.work = work
        self.out = out
        self.done = Seeds(first)
        self.findings: list[Finding] = []
        self.counts: dict[Verdict, int] = dict.fromkeys(Verdict, 0)
        self.vanished: list[int] = []
        self._failing: dict[int, Outcome] = {}
        self._saved = time.monotonic()
        self._looked = first
        if out is not None:
            state = out / _STATE
            if resume:
                self._load(read_json(state))
            elif state.exists():
                raise CaseError(
                    f"{out} has a campaign already: go on with --resume, or choose another --out"
                )

    def _load(self, data: Any) -> None:
        try:
            if data["format"] != FORMAT or data["device"] != self.work.device:
                raise CaseError(
                    f"{self.out} has a campaign of format {data['format']} for {data['device']}; "
                    f"this one is of format {FORMAT} for {self.work.device}"
                )
            self.done = Seeds(int(data["first"]), data["done"])
            self._looked = int(data["looked"])
            self.counts |= {Verdict(name): int(n) for name, n in data["counts"].items()}
            self.vanished = [int(seed) for seed in data["vanished"]]
            waiting = [Outcome.from_data(each) for each in data["failing"]]
            self.findings = [Finding.from_data(each) for each in data["findings"]]
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CaseError):
                raise
            raise CaseError(f"{self.out} holds no campaign: {error!r}") from None
        self._failing = {each.seed: each for each in waiting}

    @property
    def played(self) -> int:
        """Seeds that are accounted for."""
        return len(self.done)

    @property
    def found(self) -> bool:
        """Whether anything was found."""
        return bool(self.findings)

    def run(
        self,
        workers: Executor,
        jobs: int,
        *,
        cases: int | None,
        seconds: float | None,
        progress: Callable[[Campaign], None] | None = None,
        renew: Callable[[], Executor] | None = None,
    ) -> None:
        """Play cases until there are so many, or the time is over.

        Args:
            workers: Who plays them; they belong to the caller.
            jobs: How many there are.
            cases: Seeds in all, those of before included; None for no limit.
            seconds: How long; None for no limit.
            progress: Is called at least twice a second.
            renew: Makes workers anew where those of before are broken.

        Raises:
            DeviceError: The back-end cannot be started, or serves no more.
        """
        started = time.monotonic()
        deadline = started + seconds if seconds is not None else float("inf")
        end = self.done.first + cases if cases is not None else None
        running: dict[Future[Any], tuple[str, Any, int]] = {}
        source = self._seeds(end)
        chunk = 1 if isinstance(workers, Inline) else CHUNK
        retry: list[tuple[str, Any, int]] = []
        minimizing = False
        try:
            while True:
                late = time.monotonic() >= deadline or len(self.findings) >= FUZZ_FINDINGS
                while len(running) < 2 * jobs or retry:
                    if retry:
                        what, value, attempt = retry.pop()
                    elif (
                        not minimizing
                        and time.monotonic() < deadline + FUZZ_MINIMIZE_SECONDS
                        and (outcome := self._next_failing()) is not None
                    ):
                        what, value, attempt, minimizing = "minimize", outcome, 0, True
                    elif not late and (seeds := _take(source, chunk)):
                        what, value, attempt = "play", seeds, 0
                    else:
                        break
                    future = self._submit(workers, what, value, deadline)
                    running[future] = what, value, attempt
                    if isinstance(workers, Inline):
                        break
                if not running:
                    break
                done, _ = concurrent.futures.wait(
                    running, _TICK, concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    what, value, attempt = running.pop(future)
                    try:
                        result = future.result()
                    except DeviceError:
                        raise
                    except Exception as error:
                        # Its worker is gone, and took the task with it.
                        if attempt + 1 >= _ATTEMPTS:
                            raise DeviceError(f"workers are lost: {error!r}") from error
                        retry.append((what, value, attempt + 1))
                        if isinstance(error, concurrent.futures.BrokenExecutor) and renew:
                            retry += [(w, v, a + 1) for w, v, a in running.values()]
                            running.clear()
                            workers = renew()
                            break
                        continue
                    if what == "minimize":
                        minimizing = False
                        self._add(value, result)
                    else:
                        self._note(result)
                self._save(soon=False)
                if progress is not None:
                    progress(self)
        finally:
            for future in running:
                future.cancel()
            self._save(soon=True)

    def _submit(self, workers: Executor, what: str, value: Any, deadline: float) -> Future[Any]:
        if what == "minimize":
            return workers.submit(minimize_seed, self.work, value.seed, value.kind)
        return workers.submit(play_seeds, self.work, value, deadline - time.monotonic())

    def _seeds(self, end: int | None) -> Iterator[int]:
        seed = self.done.first
        while end is None or seed < end:
            if seed not in self.done:
                yield seed
            seed += 1

    def _note(self, outcomes: Sequence[Outcome]) -> None:
        # Those that were not played, as time was up, are not done.
        for outcome in outcomes:
            if outcome.seed in self.done:
                continue
            self.done.add(outcome.seed)
            self.counts[outcome.verdict] += 1
            if outcome.bad:
                self._failing[outcome.seed] = outcome

    def _next_failing(self) -> Outcome | None:
        """The next failing seed that is to be made small; others are dealt with on the way."""
        while self._looked < self.done.low:
            seed = self._looked
            outcome = self._failing.get(seed)
            if outcome is None:
                self._looked += 1
                continue
            case = self.work.make_case(seed)
            known = next((each for each in self.findings if each.covers(outcome, case)), None)
            if known is not None:
                known.seeds.append(seed)
            elif outcome.repeats:
                return outcome
            elif outcome.verdict is Verdict.CRASH:
                # It needs what was before it, too.
                self._add(outcome, case)
                continue
            else:
                self.vanished.append(seed)
            self._forget(seed)
        return None

    def _forget(self, seed: int) -> None:
        self._failing.pop(seed, None)
        self._looked = seed + 1

    def _add(self, outcome: Outcome, case: Case) -> None:
        finding = Finding(outcome, case, [outcome.seed])
        twin = next((e for e in self.findings if e.signature == finding.signature), None)
        if twin is not None:
            twin.seeds.append(outcome.seed)
        else:
            self.findings.append(finding)
            self._write(finding)
        self._forget(outcome.seed)

    def _write(self, finding: Finding) -> None:
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / finding.file_name, finding.to_data())

    def _save(self, *, soon: bool) -> None:
        if self.out is None or not (soon or time.monotonic() >= self._saved + _SAVE_EVERY):
            return
        self.out.mkdir(parents=True, exist_ok=True)
        self._saved = time.monotonic()
        write_json(
            self.out / _STATE,
            {
                "format": FORMAT,
                "version": _VERSION,
                "device": self.work.device,
                "first": self.done.first,
                "done": self.done.ranges(),
                "looked": self._looked,
                "counts": {str(verdict): n for verdict, n in self.counts.items()},
                "vanished": self.vanished,
                "failing": [each.to_data() for each in self._failing.values()],
                "findings": [each.to_data() for each in self.findings],
            },
        )

    def to_data(self) -> dict[str, Any]:
        """For people's programs: what was played and found."""
        return {
            "device": self.work.device,
            "format": FORMAT,
            "first": self.done.first,
            "played": self.played,
            "counts": {str(verdict): n for verdict, n in self.counts.items()},
            "vanished": self.vanished,
            "findings": [each.to_data() for each in self.findings],
        }

    @property
    def summary(self) -> str:
        """What was played and found, in one line."""
        counted = ", ".join(f"{n} {verdict}" for verdict, n in self.counts.items() if n)
        text = f"{self.played} cases: {counted or 'none'}; {len(self.findings)} findings"
        if self.vanished:
            text += f"; {len(self.vanished)} failed once and not again"
        if self._failing:
            text += f"; {len(self._failing)} failures not looked at yet, see --resume"
        return text


def _take(source: Iterator[int], count: int) -> list[int]:
    return [seed for _, seed in zip(range(count), source, strict=False)]


def reproduce(work: Job, finding: Finding, *, history: bool = True) -> Outcome:
    """Play the case of a finding once more.

    Args:
        work: What to play it to.
        finding: What was found.
        history: Whether the cases before it are played first, where it did not repeat without.

    Returns:
        What became of it.

    Raises:
        DeviceError: The back-end cannot be started, or serves nothing at first.
    """
    work = dataclasses.replace(work, device=finding.case.device)
    bench = work.bench()
    with contextlib.closing(bench):
        if history and not finding.outcome.repeats:
            for seed in finding.outcome.before:
                outcome = bench.play(work.make_case(seed))
                if outcome.bad:
                    return outcome
        return bench.play(finding.case)


def read_json(path: Path) -> Any:
    """Read a file of JSON.

    Raises:
        CaseError: It cannot be read, is too long, or is no JSON.
    """
    try:
        with path.open("rb") as file:
            data = file.read(FUZZ_FILE_BYTES + 1)
    except OSError as error:
        raise CaseError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > FUZZ_FILE_BYTES:
        raise CaseError(f"{path} has more than {FUZZ_FILE_BYTES} bytes")
    try:
        return json.loads(data)
    except ValueError as error:
        raise CaseError(f"{path} is no JSON: {error}") from None


def write_json(path: Path, data: Any) -> None:
    """Write a file of JSON, which is there wholly or as before.

    Raises:
        DeviceError: It cannot be written.
    """
    beside = path.with_suffix(".new")
    try:
        beside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)  # noqa: PTH105 - as said, in one step
    except OSError as error:
        raise DeviceError(f"cannot write {path}: {error.strerror}") from error
