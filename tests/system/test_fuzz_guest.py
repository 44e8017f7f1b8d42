"""`guestio fuzz --front-end`: a User-mode Linux guest whose disk lies is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from guestio.faults.fuzz import Case, GuestBench, Guests, Step, Verdict, parse_command
from lab.fuzz import SERVE, command

pytestmark = pytest.mark.system
HEALTHY = "^GUEST-RESULT"


@pytest.fixture(scope="module")
def uml(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return parse_command(command("blk", tmp_path_factory.mktemp("uml") / "initramfs"))


def guests(words: tuple[str, ...], **options: object) -> Guests:
    served = parse_command(SERVE["blk"])
    return Guests("blk", words, served, HEALTHY, "^FACT beat=", limit=250.0, **options)  # type: ignore[arg-type] # as the caller says


def rules(*lines: str) -> Case:
    return Case("blk", 0, tuple(Step("rule", {"rule": line}) for line in lines))


def test_a_guest_comes_through_a_disk_that_fails(uml: tuple[str, ...]) -> None:
    outcome = GuestBench(guests(uml)).play(rules("error every=5", "delay=1ms"))
    assert outcome.verdict is Verdict.OK, outcome


def test_what_a_guest_says_is_judged_and_rules_are_left_out(uml: tuple[str, ...]) -> None:
    # What Linux says of a wrong head is no crash; here it is taken as one.
    bench = GuestBench(guests(uml, bad=r"id \d+ out of range"))
    case = rules("delay=1ms", "wrong-head nth=4")
    outcome = bench.play(case)
    assert outcome.verdict is Verdict.CRASH, outcome
    assert "out of range" in outcome.reason
    assert bench.minimize(case, outcome.kind) == rules("wrong-head nth=4")


def test_the_command_boots_guests_of_seeds(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "lab.fuzz",
            "--cases",
            "1",
            "--limit",
            "25",
            "--out",
            str(tmp_path / "out"),
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode in {0, 1}, done.stderr
    assert json.loads(done.stdout)["played"] == 1
