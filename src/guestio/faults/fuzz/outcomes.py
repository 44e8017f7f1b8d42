"""What became of a case, whether it does so again, and the fewest steps for it."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Protocol, Self

from guestio.budgets import FUZZ_MINIMIZE_RUNS, FUZZ_MINIMIZE_SECONDS
from guestio.faults.fuzz.steps import Case

_TRIES: Final = 2


class Verdict(StrEnum):
    """What a case found."""

    OK = "ok"
    """Nothing: the peer did as it must, and goes on."""
    WRONG = "WRONG"
    """An honest request or message was answered wrongly, or memory was written that no request
    gave."""
    LATE = "LATE"
    """An honest request or message was not answered in time, and the next connection is served."""
    WEDGED = "WEDGED"
    """No honest request is served afterwards; a guest does not come through."""
    CRASH = "CRASH"
    """The process is gone, or nothing listens any more; a guest says that it has crashed."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one case.

    Attributes:
        seed: Which one.
        verdict: What was found.
        reason: Why, in one line; empty for ok.
        repeats: Whether the same was found when the case was played again, to a peer that was
            started anew where that is possible.
        stderr: The last lines that the peer printed, if it was started here.
        before: Seeds that were played to the same process before, the latest last.
    """

    seed: int
    verdict: Verdict
    reason: str = ""
    repeats: bool = False
    stderr: tuple[str, ...] = ()
    before: tuple[int, ...] = ()

    @property
    def bad(self) -> bool:
        """Whether something was found."""
        return self.verdict is not Verdict.OK

    @property
    def kind(self) -> str:
        """Verdict and reason without numbers: equal for what looks the same."""
        text = re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?", "#", self.reason)
        return f"{self.verdict} {text}"

    def confirmed(self, again: Callable[[], Outcome]) -> Outcome:
        """Play the case again, if something was found.

        What is only late, and not when it is played again, was the machine's doing: it is ok.

        Args:
            again: Plays it.
        """
        if not self.bad:
            return self
        timely = self.verdict in {Verdict.LATE, Verdict.WEDGED}
        same = (again().kind == self.kind for _ in range(_TRIES))
        repeats = all(same) if timely else any(same)
        if self.verdict is Verdict.LATE and not repeats:
            return Outcome(self.seed, Verdict.OK)
        return dataclasses.replace(self, repeats=repeats)

    def to_data(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self) | {"verdict": str(self.verdict)}

    @classmethod
    def from_data(cls, data: Any) -> Self:
        """Read what :meth:`to_data` has made.

        Raises:
            KeyError, TypeError, ValueError: It is something else.
        """
        return cls(
            int(data["seed"]),
            Verdict(data["verdict"]),
            str(data["reason"]),
            bool(data["repeats"]),
            tuple(map(str, data["stderr"])),
            tuple(map(int, data["before"])),
        )


class Player(Protocol):
    """What plays cases to a peer and judges it."""

    def play(self, case: Case) -> Outcome:
        """Play a case once."""
        ...

    def examine(self, case: Case) -> Outcome:
        """Play a case, and again if something is found."""
        ...

    def minimize(self, case: Case, kind: str) -> Case:
        """The fewest steps of a case that still fail in this way."""
        ...

    def close(self) -> None:
        """End the peer, if it was started here."""
        ...


def reduce_case(case: Case, fails: Callable[[Case], bool]) -> Case:
    """Leave out steps for as long as a case still fails.

    Args:
        case: What fails.
        fails: Plays a smaller one, and says whether it fails in the same way.

    Returns:
        A case from which no single step can be left out, unless time or runs were up.
    """
    deadline = time.monotonic() + FUZZ_MINIMIZE_SECONDS
    runs = FUZZ_MINIMIZE_RUNS

    def tried(steps: list[Any]) -> bool:
        nonlocal runs
        if runs <= 0 or time.monotonic() > deadline:
            return False
        runs -= 1
        return fails(case.but(steps))

    return case.but(reduce(list(case.steps), tried))


def reduce(items: list[Any], fails: Callable[[list[Any]], bool]) -> list[Any]:
    """The fewest items that still fail, found by leaving out halves, quarters and so on.

    Zeller's delta debugging: of each size the runs of items are left out one after the other.
    """
    size = max(len(items) // 2, 1)
    while True:
        at, smaller = 0, False
        while at < len(items):
            rest = items[:at] + items[at + size :]
            if rest and fails(rest):
                items, smaller = rest, True
            else:
                at += size
        if size == 1 and not smaller:
            return items
        size = max(size // 2, 1)
