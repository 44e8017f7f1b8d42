"""Rules in force: which of them strikes now, how often each has, and switching them at run time."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from guestio.budgets import FAULT_RULES
from guestio.faults.misbehavior.rules import Level, Rule, check_ops, parse
from guestio.ratelog import LOG

log = logging.getLogger("guestio.faults")


class FaultCounts(NamedTuple):
    """A rule in force, and what it has done.

    Attributes:
        number: Names it to :meth:`Faults.off`.
        rule: The line.
        matched: Requests, messages or accesses that ``op=`` and the like have selected.
        struck: Those of them that went wrong.
    """

    number: int
    rule: str
    matched: int
    struck: int


class Fault:
    """One rule in force; :class:`Faults` has them.

    Attributes:
        number: Its number, from 1.
        rule: The rule.
        matched: As in `FaultCounts`.
        struck: As in `FaultCounts`.
        random: What is random in it; of no use for secrets.
        ended: Whether it was switched off.
    """

    def __init__(self, number: int, rule: Rule) -> None:
        self.number = number
        self.rule = rule
        self.matched = self.struck = 0
        # A run must be repeatable.
        self.random = random.Random(rule.seed)  # noqa: S311
        self.ended = False
        self._since = time.monotonic()
        self._late = 0
        self._first: float | None = None

    @property
    def value(self) -> int:
        """What follows its name, for those that want a whole number."""
        assert self.rule.value is not None
        return int(self.rule.value)

    @property
    def seconds(self) -> float:
        """What follows its name, for those that want a time."""
        assert self.rule.value is not None
        return self.rule.value

    def strikes(self, op: str | None, where: dict[str, tuple[int, int]]) -> bool:
        """Whether it strikes at this; counts it. For one thread at a time."""
        rule = self.rule
        if rule.op is not None and op not in rule.op:
            return False
        for key, span in rule.spans.items():
            place = where.get(key)
            if place is None or not span.meets(*place):
                return False
        self.matched += 1
        now = time.monotonic()
        number = self.matched
        if rule.after.seconds is not None:
            if now - self._since < rule.after.seconds:
                return False
            self._late += 1
            number = self._late
        elif rule.after.times is not None:
            number -= rule.after.times
        if number <= 0 or number % rule.every or rule.nth not in (None, number):
            return False
        if rule.p < 1 and self.random.random() >= rule.p:
            return False
        if rule.limit.times is not None and self.struck >= rule.limit.times:
            return False
        if self._first is None:
            self._first = now
        elif rule.limit.seconds is not None and now - self._first >= rule.limit.seconds:
            return False
        self.struck += 1
        return True


class Faults:
    """The rules that a device misbehaves by; they may be switched on and off while it is served.

    Args:
        rules: Those in force at first, as text or as :func:`parse` made them.

    Raises:
        ValueError: One is no rule.

    Threads: from any.
    """

    def __init__(self, rules: Iterable[str | Rule] = ()) -> None:
        self._lock = threading.Lock()
        self._faults: tuple[Fault, ...] = ()
        self._count = 0
        self._known: dict[Level, tuple[Collection[str] | None, str]] = {}
        self._unserved: dict[Level, str] = {}
        self._only: tuple[Collection[str], str] | None = None
        self._watchers: list[Callable[[], object]] = []
        if isinstance(rules, str):
            raise TypeError(f"rules is a list of lines: say [{rules!r}]")
        for each in rules:
            self.on(each)

    def __repr__(self) -> str:
        return f"<Faults: {', '.join(repr(each.rule.text) for each in self._faults) or 'none'}>"

    def on(self, rule: str | Rule) -> int:
        """Put a rule into force; its number.

        Raises:
            ValueError: It is no rule; what is served has nothing that it could strike at; or there
                are `FAULT_RULES` already.
        """
        made = parse(rule) if isinstance(rule, str) else rule
        with self._lock:
            if len(self._faults) >= FAULT_RULES:
                raise ValueError(f"{FAULT_RULES} rules are in force: switch one off first")
            self._check(made)
            self._count += 1
            self._faults = (*self._faults, Fault(self._count, made))
            number = self._count
        self._tell()
        return number

    def off(self, number: int) -> None:
        """Take a rule back; what it has held is answered.

        Raises:
            ValueError: No rule of that number is in force.
        """
        with self._lock:
            kept = tuple(each for each in self._faults if each.number != number)
            if len(kept) == len(self._faults):
                known = ", ".join(str(each.number) for each in kept) or "none"
                raise ValueError(f"no rule {number!r} is in force; there is {known}")
            for each in self._faults:
                each.ended = each.ended or each.number == number
            self._faults = kept
        self._tell()

    def counts(self) -> list[FaultCounts]:
        """The rules in force, in their order, with what they have done."""
        with self._lock:
            return [
                FaultCounts(each.number, each.rule.text, each.matched, each.struck)
                for each in self._faults
            ]

    def watch(self, callback: Callable[[], object]) -> None:
        """Call back after each change, in the thread that makes it."""
        self._watchers.append(callback)

    def _tell(self) -> None:
        for each in self._watchers:
            each()

    def expect(self, level: Level, ops: Collection[str] | None, where: str) -> None:
        """Say which kinds of request, message or access there are at a level.

        Args:
            level: The level.
            ops: Their names; None if any will do.
            where: What has them, for messages.

        Raises:
            ValueError: A rule in force selects others.
        """
        with self._lock:
            self._known[level] = ops, where
            for each in self._faults:
                self._check(each.rule)

    def refuse(self, level: Level, why: str) -> None:
        """Say that nothing is served at a level.

        Raises:
            ValueError: A rule in force is of it.
        """
        with self._lock:
            self._unserved[level] = why
            for each in self._faults:
                self._check(each.rule)

    def allow(self, names: Collection[str], why: str) -> None:
        """Say that only some misbehaviors are possible.

        Args:
            names: Those that are.
            why: What is said of the others.

        Raises:
            ValueError: A rule in force is another one.
        """
        with self._lock:
            self._only = names, why
            for each in self._faults:
                self._check(each.rule)

    def _check(self, rule: Rule) -> None:
        level = rule.what.level
        if self._only is not None and rule.what.name not in self._only[0]:
            known = ", ".join(self._only[0])
            raise ValueError(f"{rule.what.name}: {self._only[1]}; say one of {known}")
        if level in self._unserved:
            raise ValueError(f"{rule.what.name}: {self._unserved[level]}")
        ops, where = self._known.get(level, (None, ""))
        if ops is not None:
            check_ops(rule, ops, where)

    def has(self, names: Collection[str]) -> bool:
        """Whether a rule in force is one of these misbehaviors."""
        return any(each.rule.what.name in names for each in self._faults)

    def strike(
        self,
        names: Collection[str],
        what: str,
        *,
        op: str | None = None,
        **where: int | tuple[int, int],
    ) -> list[Fault]:
        """The rules that strike now, in their order; each is counted and logged.

        Args:
            names: Misbehaviors that are possible here.
            what: What they strike at, for the log.
            op: Kind of the request, message or access.
            where: By name of the selector, a number, or the first and the last.
        """
        if not self._faults:
            return []
        spans = {
            key: place if isinstance(place, tuple) else (place, place)
            for key, place in where.items()
        }
        with self._lock:
            found = [
                each
                for each in self._faults
                if each.rule.what.name in names and each.strikes(op, spans)
            ]
        for each in found:
            LOG.report(log, logging.WARNING, "fault %d (%s): %s", each.number, each.rule.text, what)
        return found

    def first(
        self,
        names: Collection[str],
        what: str,
        *,
        op: str | None = None,
        **where: int | tuple[int, int],
    ) -> Fault | None:
        """As :meth:`strike`, where one misbehavior excludes another: the first that strikes."""
        found = self.strike(names, what, op=op, **where)
        return found[0] if found else None
