"""The language of faults: one line says what goes wrong, and when.

    WHAT[=VALUE] [SELECTOR=VALUE ...]

``WHAT`` is one of :data:`MISBEHAVIORS`; selectors say which requests, messages or accesses it
strikes, and how often. A rule without selectors strikes at each.
"""

from __future__ import annotations

import difflib
import enum
import math
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from guestio.budgets import FAULT_RULE_CHARS


class Level(enum.StrEnum):
    """Where a misbehavior takes place."""

    DEVICE = "device"
    RING = "ring"
    CONFIG = "config"
    WIRE = "wire"
    IOMMU = "iommu"
    PCI = "pci"
    PROXY = "proxy"


NO_PROXY: Final = "only `guestio proxy` passes kicks on"
"""Why a device has no rules of that level."""


class Span(NamedTuple):
    """Numbers from ``first`` to ``last``, both included; ``last`` may be infinite."""

    first: int
    last: float

    def meets(self, first: int, last: int | None = None) -> bool:
        """Whether any number from ``first`` to ``last`` (by default ``first``) is in it."""
        return self.first <= (first if last is None else last) and first <= self.last


class Amount(NamedTuple):
    """So many times, or so many seconds; the other one is None."""

    times: int | None
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Value:
    """What may follow a word and ``=``.

    Attributes:
        what: For people, in the reference.
        example: One that is right.
        read: Makes it of the text; raises ValueError.
    """

    what: str
    example: str
    read: Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Misbehavior:
    """Something that can go wrong.

    Attributes:
        name: As it is named in a rule.
        level: Where it takes place.
        text: What happens, in one sentence.
        selectors: Those that it has besides :data:`ALWAYS`.
        value: What may follow its name; None for nothing.
        default: Its value if the rule has none; None if a value is required or there is none.
        required: Whether the rule must say it.
    """

    name: str
    level: Level
    text: str
    selectors: tuple[str, ...]
    value: Value | None = None
    default: float | None = None
    required: bool = False


def _count(text: str) -> int:
    if not re.fullmatch(r"0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20}", text):
        raise ValueError
    number = int(text, 16 if text[:2].lower() == "0x" else 10)
    if number >= 1 << 64:
        raise ValueError
    return number


def _positive(text: str) -> int:
    if not (number := _count(text)):
        raise ValueError
    return number


def _bytes(text: str) -> int:
    shift = {"K": 10, "M": 20, "G": 30}.get(text[-1:].upper(), 0)
    number = _count(text[:-1] if shift else text) << shift
    if number >= 1 << 64:
        raise ValueError
    return number


def _bit(text: str) -> int:
    if (number := _count(text)) > 63:
        raise ValueError
    return number


def _byte(text: str) -> int:
    if not 0 < (number := _count(text)) < 256:
        raise ValueError
    return number


def _status(text: str) -> int:
    if (number := _count(text)) > 255:
        raise ValueError
    return number


def _seconds(text: str) -> float:
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(us|ms|s)", text)
    if found is None:
        raise ValueError
    seconds = float(found[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[found[2]]
    if seconds > 3600:
        raise ValueError
    return seconds


def _span(read: Callable[[str], int]) -> Callable[[str], Span]:
    def span(text: str) -> Span:
        first, dash, last = text.partition("-")
        begin = read(first)
        end: float = begin if not dash else read(last) if last else math.inf
        if end < begin:
            raise ValueError
        return Span(begin, end)

    return span


def _amount(text: str) -> Amount:
    return Amount(None, _seconds(text)) if text.endswith("s") else Amount(_positive(text), None)


def _probability(text: str) -> float:
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", text) or not 0 < (p := float(text)) <= 1:
        raise ValueError
    return p


def _names(text: str) -> frozenset[str]:
    names = frozenset(text.split(","))
    if not all(names):
        raise ValueError
    return names


SELECTORS: Final[dict[str, Value]] = {
    "op": Value(
        "kinds of request, message or access, by name, several with commas", "read", _names
    ),
    "queue": Value("a queue, or several", "0-1", _span(_count)),
    "sector": Value(
        "sectors of a disk; a request that touches one of them", "100-200", _span(_count)
    ),
    "size": Value("bytes of data of the request; K, M and G may follow", "4K-64K", _span(_bytes)),
    "offset": Value(
        "bytes of a register or of the configuration space", "0x10-0x17", _span(_count)
    ),
    "bar": Value("a BAR, or several", "0", _span(_count)),
    "vector": Value("an interrupt vector, or several", "1", _span(_count)),
    "iova": Value("addresses as the driver gives them", "0x100000-", _span(_count)),
    "after": Value("not the first so many, or not for so long", "100 or after=2s", _amount),
    "nth": Value("the one of this number alone, from 1", "3", _positive),
    "every": Value("one of so many", "10", _positive),
    "p": Value("with this probability", "0.01", _probability),
    "seed": Value("of what is random in this rule, 0 by default", "7", _count),
    "for": Value(
        "at most so many times, or for so long since the first time", "5 or for=10s", _amount
    ),
    "once": Value("nothing follows: once, as for=1", "", str),
}
"""Selectors, and what each wants."""

ALWAYS: Final = ("after", "nth", "every", "p", "seed", "for", "once")
"""Selectors of every misbehavior; applied in this order to what the others have selected."""

_REQUEST: Final = ("op", "queue", "sector", "size")
_TIME: Final = Value("a time", "20ms", _seconds)
_NUMBER: Final = Value("a number", "4096", _count)

MISBEHAVIORS: Final[dict[str, Misbehavior]] = {
    each.name: each
    for each in (
        # Device
        Misbehavior(
            "error",
            Level.DEVICE,
            (
                "The request is not carried out and fails with this status; by default the "
                "error of the device type."
            ),
            _REQUEST,
            Value("a status byte", "1", _status),
        ),
        Misbehavior(
            "delay", Level.DEVICE, "The request is answered so much later.", _REQUEST, _TIME, 0.02
        ),
        Misbehavior(
            "stall",
            Level.DEVICE,
            (
                "This request and all behind it in its queue wait for so long; by default until"
                " the rule is taken back or the queue stops."
            ),
            _REQUEST,
            _TIME,
            math.inf,
        ),
        Misbehavior(
            "drop",
            Level.DEVICE,
            (
                "The request is not carried out and never answered; a stop of the queue waits "
                "for it as long as for any."
            ),
            _REQUEST,
        ),
        Misbehavior(
            "reorder",
            Level.DEVICE,
            (
                "The request is answered after the next one of its queue, or after 0.1 s if "
                "there is none."
            ),
            _REQUEST,
        ),
        Misbehavior(
            "short",
            Level.DEVICE,
            (
                "So many bytes at the end of the data that the driver asked for stay as they "
                "were, and are not counted in the used length."
            ),
            _REQUEST,
            Value("bytes", "512", _bytes),
            1,
        ),
        Misbehavior(
            "corrupt",
            Level.DEVICE,
            "One bit is flipped in so many bytes of the data that the driver asked for.",
            _REQUEST,
            Value("bytes", "4", _positive),
            1,
        ),
        Misbehavior(
            "stale",
            Level.DEVICE,
            (
                "Nothing is done, and success is reported: what was to be read is what the "
                "buffer held before, and what was to be written is lost."
            ),
            _REQUEST,
        ),
        # Ring
        Misbehavior(
            "used-length",
            Level.RING,
            "The used entry has this length; by default 4096 more than the right one.",
            _REQUEST,
            _NUMBER,
        ),
        Misbehavior(
            "wrong-head",
            Level.RING,
            ("The used entry names this descriptor; by default one behind the end of the table."),
            _REQUEST,
            _NUMBER,
        ),
        Misbehavior(
            "duplicate-completion",
            Level.RING,
            "The request is put into the used ring twice.",
            _REQUEST,
        ),
        Misbehavior(
            "index-jump",
            Level.RING,
            ("The used index is published so many entries ahead; the next one is right again."),
            ("queue",),
            Value("entries", "100", _positive),
            1,
        ),
        Misbehavior(
            "skip-interrupt",
            Level.RING,
            "The driver is not notified of what was published.",
            ("queue",),
        ),
        Misbehavior(
            "late-interrupt",
            Level.RING,
            "The driver is notified so much later than it should be.",
            ("queue",),
            _TIME,
            0.02,
        ),
        Misbehavior(
            "spurious-interrupt",
            Level.RING,
            ("The driver is notified when a request is taken, although nothing was published."),
            _REQUEST,
        ),
        Misbehavior(
            "ignore-event-idx",
            Level.RING,
            "The driver is notified of everything, also where it said that it need not be.",
            ("queue",),
        ),
        Misbehavior(
            "needs-reset",
            Level.RING,
            (
                "Instead of giving the request back, the device stops the queue for good and "
                "says that it needs a reset."
            ),
            _REQUEST,
        ),
        # Configuration
        Misbehavior(
            "config-flip",
            Level.CONFIG,
            "One bit of what is read of the configuration space is flipped, at random.",
            ("offset",),
        ),
        Misbehavior(
            "generation-stuck",
            Level.CONFIG,
            "The configuration's generation stays as it was first read; over vfio-user.",
            (),
        ),
        Misbehavior(
            "feature-lie",
            Level.CONFIG,
            "This feature bit is offered if it is not there, and not offered if it is.",
            (),
            Value("a bit", "28", _bit),
            None,
            True,
        ),
        Misbehavior(
            "status-lie",
            Level.CONFIG,
            "These bits of the device status are read inverted; by default FEATURES_OK.",
            (),
            Value("bits", "0x40", _byte),
            8,
        ),
        # Wire
        Misbehavior(
            "hang-up",
            Level.WIRE,
            "The connection is closed instead of obeying the message.",
            ("op",),
        ),
        Misbehavior(
            "slow", Level.WIRE, "The message is answered so much later.", ("op",), _TIME, 0.5
        ),
        Misbehavior(
            "bad-reply",
            Level.WIRE,
            "One bit of the answer's payload is flipped, at random.",
            ("op",),
        ),
        Misbehavior("no-reply", Level.WIRE, "The message is obeyed and not answered.", ("op",)),
        Misbehavior(
            "wrong-fds",
            Level.WIRE,
            (
                "The answer has no descriptor where it should have one, and one where it should"
                " have none."
            ),
            ("op",),
        ),
        # IOMMU
        Misbehavior(
            "access-after-unmap",
            Level.IOMMU,
            (
                "When an unmap of a buffer that the device was given to write has been "
                "acknowledged, one byte in that buffer is overwritten all the same."
            ),
            ("iova",),
        ),
        Misbehavior(
            "miss-storm",
            Level.IOMMU,
            ("With each translation that is missing, so many are asked for that nothing needs."),
            ("queue", "iova"),
            Value("translations", "100", _positive),
            64,
        ),
        Misbehavior(
            "refuse",
            Level.IOMMU,
            (
                "A missing translation is not asked for but taken as refused, which makes the "
                "request fail."
            ),
            ("queue", "iova"),
        ),
        Misbehavior(
            "wrong-permission",
            Level.IOMMU,
            (
                "A missing translation is asked for with the wrong permission: for writing "
                "where it is to be read, and the other way round."
            ),
            ("queue", "iova"),
        ),
        # PCI
        Misbehavior(
            "master-abort",
            Level.PCI,
            "The access to a register reaches nothing: reads give ones, writes are lost.",
            ("op", "bar", "offset"),
        ),
        Misbehavior(
            "bad-bar",
            Level.PCI,
            "One bit of what is read of a register is flipped, at random.",
            ("bar", "offset"),
        ),
        Misbehavior("msi-lost", Level.PCI, "The interrupt is not delivered.", ("vector",)),
        Misbehavior(
            "surprise-remove",
            Level.PCI,
            (
                "At this access to a register the device is gone: reads give ones, writes are "
                "lost, nothing is served and nothing interrupts, until the client hangs up."
            ),
            ("op", "bar", "offset"),
        ),
        # Proxy
        Misbehavior(
            "skip-kick",
            Level.PROXY,
            "The device is not notified of the requests that the driver announces.",
            ("queue",),
        ),
        Misbehavior(
            "late-kick",
            Level.PROXY,
            "The device is notified so much later than it should be.",
            ("queue",),
            _TIME,
            0.02,
        ),
    )
}
"""What can go wrong, by name."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the language; :func:`parse` makes it.

    Attributes:
        text: The line, with single spaces.
        what: What goes wrong.
        value: What follows its name, or its default; None for neither.
        op: Kinds of request, message or access; None for all.
        spans: Numbers selected, by the name of the selector.
        after: What is let pass first.
        nth: The only one, or None.
        every: One of so many.
        p: Probability.
        seed: Of what is random.
        limit: How often at most, or for how long.
    """

    text: str
    what: Misbehavior
    value: float | None
    op: frozenset[str] | None
    spans: dict[str, Span]
    after: Amount
    nth: int | None
    every: int
    p: float
    seed: int
    limit: Amount

    def __str__(self) -> str:
        return self.text


def parse(text: str) -> Rule:
    """Read one rule.

    Args:
        text: ``WHAT[=VALUE] [SELECTOR=VALUE ...]``, words divided by spaces.

    Raises:
        ValueError: It is no rule: which word is wrong, and what would be right, in one line.
        TypeError: It is no text.
    """
    if not isinstance(text, str):
        raise TypeError(f"a rule is text, not {type(text).__name__}")
    if len(text) > FAULT_RULE_CHARS:
        raise ValueError(f"a rule of {len(text)} characters: at most {FAULT_RULE_CHARS}")
    words = text.split()
    if not words:
        raise ValueError("an empty rule: say what goes wrong, one of ")
    name, given, word = words[0].partition("=")
    what = MISBEHAVIORS.get(name)
    if what is None:
        raise ValueError(f"{_shown(name)} is no misbehavior: {_one_of(name, MISBEHAVIORS)}")
    value = what.default
    if given:
        if what.value is None:
            raise ValueError(f"{_shown(words[0])}: {name} has no value, say {name} alone")
        value = _read(words[0], what.value, word, name)  # type: ignore[assignment] # a number
    elif what.required and what.value is not None:
        raise ValueError(f"{name} needs {what.value.what}, as in {name}={what.value.example}")
    found: dict[str, object] = {}
    allowed = (*what.selectors, *ALWAYS)
    for each in words[1:]:
        key, equals, rest = each.partition("=")
        if key not in allowed:
            known = f"{key} is no selector of {name}" if key in SELECTORS else "no selector"
            raise ValueError(f"{_shown(each)}: {known}; {_one_of(key, allowed)}")
        if key in found:
            raise ValueError(f"{_shown(each)}: {key} is given twice")
        if key == "once":
            if equals:
                raise ValueError(f"{_shown(each)}: say once alone, or for=N for N times")
            found[key] = True
        elif not equals:
            raise ValueError(f"{_shown(each)}: say {key}={SELECTORS[key].example}")
        else:
            found[key] = _read(each, SELECTORS[key], rest, key)
    if "once" in found and "for" in found:
        raise ValueError("once and for=: say one of them")
    if "nth" in found and "every" in found:
        raise ValueError("nth= and every=: say one of them")
    return _rule(" ".join(words), what, value, found)


def _rule(text: str, what: Misbehavior, value: float | None, found: dict[str, object]) -> Rule:
    none = Amount(None, None)
    limit = Amount(1, None) if "once" in found else found.get("for", none)
    return Rule(
        text=text,
        what=what,
        value=value,
        op=found.get("op"),  # type: ignore[arg-type] # each is what its reader made
        spans={key: each for key, each in found.items() if isinstance(each, Span)},
        after=found.get("after", none),  # type: ignore[arg-type]
        nth=found.get("nth"),  # type: ignore[arg-type]
        every=found.get("every", 1),  # type: ignore[arg-type]
        p=found.get("p", 1.0),  # type: ignore[arg-type]
        seed=found.get("seed", 0),  # type: ignore[arg-type]
        limit=limit,  # type: ignore[arg-type]
    )


def _read(word: str, value: Value, text: str, key: str) -> object:
    try:
        return value.read(text)
    except ValueError:
        raise ValueError(
            f"{_shown(word)}: {_shown(text)} is not {value.what}; say {key}={value.example}"
        ) from None


def _shown(word: str) -> str:
    """A word of a rule in a message: printable, and not long."""
    return repr(word if len(word) <= 40 else f"{word[:37]}...")


def _one_of(word: str, names: Iterable[str]) -> str:
    """What would be right instead of a word."""
    known = list(names)
    near = difflib.get_close_matches(word, known, 1)
    if near:
        return f"did you mean {near[0]}?"
    return f"say one of {', '.join(known)}"


def check_ops(rule: Rule, known: Collection[str], where: str) -> None:
    """Refuse a rule that selects kinds of request, message or access that there are not.

    Args:
        rule: The rule.
        known: Those that there are.
        where: What has them, for the message.

    Raises:
        ValueError: One is not known.
    """
    for each in sorted(rule.op or ()):
        if each not in known:
            raise ValueError(
                f"op={each}: {where} has no {_shown(each)}; {_one_of(each, sorted(known))}"
            )


def reference() -> str:
    """The rule language for people, in Markdown: every misbehavior and every selector."""
    lines = []
    for level in Level:
        lines += [
            f"### {_HEADINGS[level]}",
            "",
            "| rule | what happens | selectors |",
            "|---|---|---|",
        ]
        for each in MISBEHAVIORS.values():
            if each.level is level:
                chosen = ", ".join(f"`{key}=`" for key in each.selectors)
                lines.append(f"| `{each.name}{_value(each)}` | {each.text} | {chosen} |")
        lines.append("")
    lines += ["### Selectors", "", "| selector | selects |", "|---|---|"]
    for key, value in SELECTORS.items():
        example = key if key == "once" else f"{key}={value.example.split()[0]}"
        lines.append(f"| `{example}` | {value.what} |")
    return "\n".join(lines)


_HEADINGS: Final = {
    Level.DEVICE: "The device",
    Level.RING: "The ring",
    Level.CONFIG: "Features, status and configuration space",
    Level.WIRE: "The wire: vhost-user",
    Level.IOMMU: "The IOMMU: vhost-user",
    Level.PCI: "The PCI function: vfio-user",
    Level.PROXY: "What a proxy passes on: `guestio proxy`",
}


def _value(each: Misbehavior) -> str:
    """What may follow a name, in the reference."""
    if each.value is None:
        return ""
    return f"={each.value.example}" if each.required else f"[={each.value.example}]"
