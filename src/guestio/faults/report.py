"""What a run of the catalogue found: verdicts, one by one and together; as JSON and as JUnit."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final
from xml.etree import ElementTree as ET

BAD: Final[frozenset[str]] = frozenset({"FAIL", "WEDGED", "CRASH"})
"""Verdicts that make a run fail."""


class Verdict(StrEnum):
    """What one check found."""

    PASS = "PASS"  # noqa: S105 - a verdict, no password
    """The back-end did what the specification demands."""
    FAIL = "FAIL"
    """It did not."""
    REJECT = "REJECT"
    """It refused cleanly what the specification lets it refuse, and served on."""
    WEDGED = "WEDGED"
    """Its process lives, but an honest request was not served in time afterwards."""
    CRASH = "CRASH"
    """Its process died, or nothing listens on its socket any more."""
    SKIP = "SKIP"
    """The check does not apply, or could not be run."""


class Severity(StrEnum):
    """What a check judges by."""

    MUST = "must"
    """The specification demands it."""
    SHOULD = "should"
    """The specification recommends it."""
    SAFETY = "safety"
    """The peer broke a rule; the back-end must stay whole and serve the next one."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one check found.

    Attributes:
        id: Name of the check.
        text: What it demands.
        source: Where the specification says so.
        severity: How strongly.
        verdict: What came out.
        reason: Why, in one line; empty after a plain PASS.
        seconds: How long the check took, with the honest request after it.
    """

    id: str
    text: str
    source: str
    severity: Severity
    verdict: Verdict
    reason: str = ""
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        """Whether the verdict is FAIL, WEDGED or CRASH."""
        return self.verdict in BAD


@dataclass(slots=True)
class Report:
    """A run of the catalogue.

    Attributes:
        target: The socket that was connected to.
        device: Type of the device, as it was named.
        seed: Of everything random.
        results: In the order in which the checks ran.
    """

    target: str
    device: str
    seed: int
    results: list[Result] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no check found anything bad."""
        return not any(result.bad for result in self.results)

    @property
    def bad(self) -> list[Result]:
        """The results that are FAIL, WEDGED or CRASH."""
        return [result for result in self.results if result.bad]

    @property
    def counts(self) -> dict[Verdict, int]:
        """How often each verdict came out, zeroes included."""
        counted = Counter(result.verdict for result in self.results)
        return {verdict: counted[verdict] for verdict in Verdict}

    @property
    def summary(self) -> str:
        """The counts in one line."""
        counted = ", ".join(f"{n} {verdict}" for verdict, n in self.counts.items() if n)
        return f"{len(self.results)} checks: {counted or 'none'}"

    def verdicts(self) -> dict[str, Verdict]:
        """The verdict of each check, by its id."""
        return {result.id: result.verdict for result in self.results}

    def to_json(self) -> str:
        """The whole report as a JSON object."""
        return json.dumps(
            {
                "target": self.target,
                "device": self.device,
                "seed": self.seed,
                "passed": self.passed,
                "counts": {str(verdict): n for verdict, n in self.counts.items()},
                "results": [
                    {
                        "id": result.id,
                        "text": result.text,
                        "source": result.source,
                        "severity": str(result.severity),
                        "verdict": str(result.verdict),
                        "reason": result.reason,
                        "seconds": round(result.seconds, 4),
                    }
                    for result in self.results
                ],
            },
            indent=1,
        )

    def to_junit(self) -> str:
        """The whole report as JUnit XML, which continuous integration systems read.

        FAIL is a failure, WEDGED and CRASH are errors; a REJECT has passed, its reason is the
        output of the test case.
        """
        counts = self.counts
        suite = ET.Element(
            "testsuite",
            name=f"guestio check {self.device}",
            tests=str(len(self.results)),
            failures=str(counts[Verdict.FAIL]),
            errors=str(counts[Verdict.WEDGED] + counts[Verdict.CRASH]),
            skipped=str(counts[Verdict.SKIP]),
            time=f"{sum(result.seconds for result in self.results):.3f}",
        )
        properties = ET.SubElement(suite, "properties")
        for name, value in (("target", self.target), ("seed", str(self.seed))):
            ET.SubElement(properties, "property", name=name, value=value)
        for result in self.results:
            suite.append(_case(result))
        ET.indent(suite, " ")
        return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(suite, "unicode") + "\n"


def _case(result: Result) -> ET.Element:
    area, _, name = result.id.partition(".")
    case = ET.Element("testcase", classname=area, name=name, time=f"{result.seconds:.3f}")
    details = f"{result.text}\n{result.source}"
    if result.bad:
        kind = "failure" if result.verdict is Verdict.FAIL else "error"
        bad = ET.SubElement(case, kind, type=str(result.verdict), message=printable(result.reason))
        bad.text = details
    elif result.verdict is Verdict.SKIP:
        ET.SubElement(case, "skipped", message=printable(result.reason))
    elif result.reason:
        ET.SubElement(case, "system-out").text = printable(f"{result.verdict}: {result.reason}")
    return case


def printable(text: str) -> str:
    """The text on one line, without what XML and terminals cannot show; a peer may be quoted."""
    return "".join(c if c.isprintable() else "?" for c in text)
