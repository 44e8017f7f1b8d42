"""How a front-end that is lied to is judged, with scripts in place of guests, and what rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from guestio.errors import DeviceError
from guestio.faults.fuzz import SERVED, Case, Finding, GuestBench, Guests, Outcome, Step, Verdict
from guestio.faults.misbehavior.rules import Level, parse


def guests(script: str, healthy: str = "", **options: object) -> Guests:
    words = ("sh", "-c", script)
    return Guests("rng", words, SERVED["rng"], healthy, **{"limit": 60.0, **options})  # type: ignore[arg-type] # as the caller says


@pytest.mark.parametrize(
    ("script", "healthy", "options", "verdict", "reason"),
    [
        ("echo well; sleep 600", "^well", {}, "ok", ""),
        ("test -d {directory}", "", {}, "ok", ""),
        ("echo '[ 1.5] Kernel panic - not syncing'; sleep 600", "w", {}, "CRASH", "Kernel panic -"),
        ("echo Oops; echo well", "^well", {"bad": "^none"}, "ok", ""),
        ("kill -SEGV $$", "", {}, "CRASH", "killed by SIGSEGV"),
        ("exit 7", "^well", {}, "CRASH", "ended with status 7"),
        ("exit 0", "^well", {}, "WEDGED", "ended without printing '^well'"),
        ("sleep 600", "^well", {"limit": 0.5}, "WEDGED", "did not print '^well' within 0.5 s"),
        ("sleep 600", "", {"limit": 0.5}, "WEDGED", "did not end within 0.5 s"),
        (
            "echo beat; sleep 600",
            "^well",
            {"alive": "beat", "patience": 0.3},
            "WEDGED",
            "prints nothing of 'beat' any more",
        ),
        ("yes | head -c 300000 | tr -d '\\n'; echo; echo well", "^well", {}, "ok", ""),
    ],
)  # fmt: skip
def test_a_guest_is_judged(
    script: str, healthy: str, options: dict[str, object], verdict: str, reason: str, tmp_path: Path
) -> None:
    # Without the device, which takes longer to start than all the rest.
    bench = GuestBench(guests(script, healthy, **options))
    judged, said, _ = bench._guest(str(tmp_path), str(tmp_path / "none.sock"))
    assert (judged, said.startswith(reason)) == (verdict, True), said


def test_a_guest_is_served_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    script = f"test -S {{socket}} || exit 1; sleep 600 & echo $! >{mark}; echo well; wait"
    outcome = GuestBench(guests(script, "^well")).play(Case("rng", 0, ()))
    assert outcome.verdict is Verdict.OK
    about = Path(f"/proc/{mark.read_text().strip()}/stat")
    # A zombie until its new parent asks for it.
    assert not about.exists() or about.read_text().split()[2] == "Z"


def test_a_device_that_cannot_be_served_is_said() -> None:
    rule = Step("rule", {"rule": "error op=read"})
    with pytest.raises(DeviceError, match=r"does not start.*read"):
        GuestBench(guests("true")).play(Case("rng", 0, (rule,)))


@pytest.mark.parametrize("device", sorted(SERVED))
def test_rules_of_a_seed_are_the_same_and_of_all_levels(device: str) -> None:
    work = Guests(device, ("x",), SERVED[device], "")
    cases = [work.make_case(seed) for seed in range(200)]
    assert cases == [work.make_case(seed) for seed in range(200)]
    found = {parse(step.arguments["rule"]).what for case in cases for step in case.steps}
    assert {each.level for each in found} == {Level.DEVICE, Level.RING, Level.CONFIG, Level.WIRE}
    assert len(found) > 20


def test_a_finding_of_rules_has_a_file() -> None:
    case = Case("rng", 4, (Step("rule", {"rule": "drop nth=1"}),))
    finding = Finding(Outcome(4, Verdict.WEDGED, "did not end", repeats=True), case, [4, 9])
    assert Finding.from_data(finding.to_data()) == finding
    assert finding.signature == "WEDGED did not end [rule drop]"
