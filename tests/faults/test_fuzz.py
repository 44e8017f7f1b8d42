"""`guestio fuzz`: cases are made of seeds, judged, made smaller, merged and played again."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest

from guestio.budgets import FUZZ_FILE_BYTES
from guestio.errors import DeviceError
from guestio.faults import Misbehaving
from guestio.faults.fuzz import (
    Bench,
    Campaign,
    Case,
    CaseError,
    Finding,
    Outcome,
    Step,
    Verdict,
    Work,
    local_workers,
    make_case,
    read_json,
    reproduce,
)
from guestio.faults.fuzz.campaign import Inline, Seeds
from guestio.faults.fuzz.outcomes import reduce
from guestio.faults.misbehavior.rules import parse
from guestio.testing import serving
from guestio.virtio import BlockDevice, EntropyDevice
from tests.kit.fuzz_victim import VICTIM

PATIENCE = 20.0
"""Seconds for an honest answer, on a machine with much to do."""


def victim(*words: str) -> tuple[str, ...]:
    """A back-end in a process of its own, which is wrong as it is told."""
    return (sys.executable, str(VICTIM), "{socket}", *words)


# Cases


@pytest.mark.parametrize("device", ["blk", "net", "console", "rng", "input", "fs", "any"])
def test_a_seed_makes_the_same_steps_every_time(device: str) -> None:
    first = [make_case(device, seed) for seed in range(60)]
    assert first == [make_case(device, seed) for seed in range(60)]
    assert len({str(case.steps) for case in first}) > 50
    assert [Case.from_data(json.loads(json.dumps(case.to_data()))) for case in first] == first


def test_a_seed_makes_the_same_steps_in_another_process() -> None:
    code = "from guestio.faults.fuzz import make_case; print(make_case('blk', 7).to_data())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{make_case('blk', 7).to_data()}\n"


def test_cases_do_everything() -> None:
    steps = [step for seed in range(400) for step in make_case("blk", seed).steps]
    names = {step.name for step in steps}
    assert names >= {
        "connect", "negotiate", "share", "start", "stop", "serves", "remembers", "request", "post",
        "descriptors", "publish", "scribble", "kick", "truncate", "message", "noise", "half",
        "translate", "translated", "revoke", "refuse", "check",
    }  # fmt: skip
    assert len({step.label for step in steps if step.name == "message"}) > 40


# An honest back-end


def test_nothing_is_found_in_an_honest_disk(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with serving(BlockDevice(str(image), num_queues=2), stop_timeout=0.2) as path:
        bench = Bench(Work("blk", str(path), None, PATIENCE))
        for seed in range(25):
            outcome = bench.play(make_case("blk", seed))
            assert not outcome.bad, (seed, outcome)


def test_nothing_is_found_in_an_honest_entropy_device() -> None:
    with serving(EntropyDevice(), stop_timeout=0.2) as path:
        bench = Bench(Work("rng", str(path), None, PATIENCE))
        for seed in range(15):
            outcome = bench.play(make_case("rng", seed))
            assert not outcome.bad, (seed, outcome)


# Verdicts


def case(*steps: Step) -> Case:
    return Case("blk", 0, steps)


SERVES = Step("serves", {"queue": 0, "count": 2})
STOP = Step("stop", {"queue": 0})
REMEMBERS = Step("remembers", {"queue": 0, "sector": 3})


@pytest.mark.parametrize(
    ("rule", "steps", "patience", "verdict", "reason"),
    [
        ("corrupt op=read nth=3", [REMEMBERS], PATIENCE, "WRONG", "reads other than it was writ"),
        ("stale op=write nth=1", [REMEMBERS], PATIENCE, "WRONG", "reads other than it was writ"),
        ("used-length nth=1", [SERVES], PATIENCE, "WRONG", "says it wrote"),
        ("bad-reply op=GET_VRING_BASE once", [STOP], PATIENCE, "WRONG", "BASE"),
        ("drop nth=1", [SERVES], 0.5, "LATE", "of 2 requests of queue 0"),
        ("skip-interrupt once", [SERVES], 0.5, "LATE", "sent no notification"),
        ("access-after-unmap", [Step("translate"), Step("revoke")], PATIENCE, "WRONG", "unmapped"),
        ("error after=4", [SERVES], PATIENCE, "WRONG", "afterwards: "),
        ("stall after=2", [SERVES], 0.3, "WEDGED", "serves no honest request afterwards"),
    ],
)  # fmt: skip
def test_what_a_device_does_wrong_has_a_verdict(
    rule: str, steps: list[Step], patience: float, verdict: str, reason: str, tmp_path: Path
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    device = Misbehaving(BlockDevice(str(image)), [])
    with serving(device, stop_timeout=0.1) as path:
        bench = Bench(Work("blk", str(path), None, patience))
        device.faults.on(rule)
        outcome = bench.play(case(*steps))
    device.close()
    assert (outcome.verdict, reason in outcome.reason) == (verdict, True), outcome
    assert parse(rule)


def test_a_process_that_dies_has_crashed_and_its_last_words_are_kept() -> None:
    bench = Bench(Work("blk", None, victim("--die-at", "24"), PATIENCE))
    try:
        step = Step("message", {"code": 24, "payload": "00" * 12})
        outcome = bench.play(case(REMEMBERS, step))
        assert outcome.verdict is Verdict.CRASH
        assert outcome.reason == "exited with status 3"
        assert outcome.stderr == ("dying at 24",)
        # It is started again.
        again = bench.play(case(REMEMBERS))
        assert not again.bad
        assert again.before == ()
        assert bench.play(case(step)).before == (0,)
    finally:
        bench.close()


def test_a_case_is_made_smaller_until_no_step_can_be_left_out() -> None:
    noise = [Step("message", {"code": 1, "payload": ""}), SERVES, Step("connect"), REMEMBERS]
    step = Step("message", {"code": 24, "payload": "00" * 12})
    bench = Bench(Work("blk", None, victim("--die-at", "24"), PATIENCE))
    try:
        found = bench.examine(case(*noise, step, *noise))
        assert found.repeats
        assert bench.minimize(case(*noise, step, *noise), found.kind).steps == (step,)
    finally:
        bench.close()


def test_reducing_keeps_what_is_needed_together() -> None:
    tried = []

    def fails(items: list[int]) -> bool:
        tried.append(items)
        return {3, 11} <= set(items)

    assert reduce(list(range(16)), fails) == [3, 11]
    assert len(tried) < 60


def test_a_back_end_that_is_not_there_is_no_finding(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="ended with status 1"):
        Bench(Work("blk", str(tmp_path / "none.sock"), ("false",), 0.1))


def test_the_back_end_does_not_outlive_a_worker_that_is_killed(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    code = (
        "import sys, time\n"
        "from guestio.faults.fuzz import Bench, Work\n"
        f"b = Bench(Work('blk', None, {victim('--pid', str(mark))!r}, {PATIENCE}))\n"
        "print('there', flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"there\n"
        pid = int(mark.read_text())
        worker.kill()
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the back-end still runs"
        time.sleep(0.02)


# Campaigns


def run(work: Work, out: Path | None, cases: int, **options: Any) -> Campaign:
    campaign = Campaign(work, FIRST, out, resume=options.pop("resume", False))
    with local_workers(1) as workers:
        campaign.run(workers, 1, cases=cases, seconds=None, **options)
    return campaign


def found_in(campaign: Campaign) -> list[tuple[str, list[int]]]:
    return [(each.signature, each.seeds) for each in campaign.findings]


@pytest.fixture(scope="module")
def crashing() -> Work:
    # It dies of two messages that no check has.
    return Work("blk", None, victim("--die-at", "28,29"), PATIENCE)


FIRST, CASES = 18, 12


@pytest.fixture(scope="module")
def serial(crashing: Work, tmp_path_factory: pytest.TempPathFactory) -> tuple[Campaign, Path]:
    out = tmp_path_factory.mktemp("fuzz") / "out"
    return run(crashing, out, CASES), out


def test_a_campaign_finds_each_defect_once(serial: tuple[Campaign, Path]) -> None:
    campaign, out = serial
    labels = [[step.label for step in each.case.steps] for each in campaign.findings]
    assert sorted(labels) == [["message POSTCOPY_ADVISE"], ["message POSTCOPY_LISTEN"]]
    assert campaign.played == CASES
    assert campaign.counts[Verdict.CRASH] == sum(len(each.seeds) for each in campaign.findings)
    files = {each.name for each in out.iterdir()} - {"state.json"}
    assert files == {each.file_name for each in campaign.findings}


def test_a_finding_is_played_again_from_its_file(
    serial: tuple[Campaign, Path], crashing: Work
) -> None:
    campaign, out = serial
    for each in campaign.findings:
        finding = Finding.from_data(read_json(out / each.file_name))
        assert finding == each
        assert reproduce(crashing, finding).kind == finding.outcome.kind
        assert not reproduce(Work("blk", None, victim(), PATIENCE), finding).bad


def test_a_campaign_goes_on_where_it_ended(
    serial: tuple[Campaign, Path], crashing: Work, tmp_path: Path
) -> None:
    run(crashing, tmp_path, CASES // 3)
    with pytest.raises(CaseError, match="go on with --resume"):
        Campaign(crashing, FIRST, tmp_path)
    with pytest.raises(CaseError, match="for blk; this one is of format 1 for net"):
        Campaign(Work("net", None, ("x",), 1.0), 0, tmp_path, resume=True)
    again = run(crashing, tmp_path, CASES, resume=True)
    assert again.played == CASES
    assert found_in(again) == found_in(serial[0])


def test_processes_find_the_same_also_when_one_is_killed(
    serial: tuple[Campaign, Path], crashing: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guestio.faults.fuzz.campaign.CHUNK", 2)
    campaign = Campaign(crashing, FIRST)
    pools: list[Any] = []

    def pool() -> Executor:
        pools.append(local_workers(2))
        return pools[-1]  # type: ignore[no-any-return] # it is what was just made

    killed = []

    def progress(campaign: Campaign) -> None:
        if campaign.played and not killed:
            killed.append(next(iter(pools[0]._processes)))
            os.kill(killed[0], signal.SIGKILL)

    try:
        campaign.run(pool(), 2, cases=CASES, seconds=None, progress=progress, renew=pool)
    finally:
        for each in pools:
            each.shutdown(wait=True, cancel_futures=True)
    assert killed
    assert len(pools) == 2
    assert campaign.done.ranges() == [[FIRST, FIRST + CASES]]
    assert found_in(campaign) == found_in(serial[0])


class Scripted(Inline):
    """Has outcomes instead of playing."""

    def __init__(self, outcomes: dict[int, Outcome], order: Callable[[list[int]], list[int]]):
        self.outcomes = outcomes
        self.order = order

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if fn.__name__ == "play_seeds":
            seeds = self.order(list(args[1]))
            future.set_result([self.outcomes.get(s, Outcome(s, Verdict.OK)) for s in seeds])
        else:
            future.set_result(args[0].make_case(args[1]))
        return future


def test_what_did_not_come_again_is_no_finding_but_a_crash_is() -> None:
    outcomes = {
        3: Outcome(3, Verdict.WRONG, "odd", repeats=False),
        5: Outcome(5, Verdict.CRASH, "killed by SIGSEGV", repeats=False, before=(1, 2)),
        7: Outcome(7, Verdict.WRONG, "wrong 17", repeats=True),
    }
    campaign = Campaign(Work("blk", None, ("x",), 1.0))
    campaign.run(Scripted(outcomes, list), 1, cases=10, seconds=None)
    assert campaign.vanished == [3]
    assert [each.outcome.seed for each in campaign.findings] == [5, 7]
    assert (
        campaign.summary
        == "10 cases: 7 ok, 2 WRONG, 1 CRASH; 2 findings; 1 failed once and not again"
    )


def test_seeds_are_accounted_for_in_any_order() -> None:
    for order in itertools.permutations(range(10, 14)):
        seeds = Seeds(10)
        for count, seed in enumerate(order):
            assert seed not in seeds
            seeds.add(seed)
            assert seed in seeds
            assert len(seeds) == count + 1
            assert Seeds(10, seeds.ranges()).ranges() == seeds.ranges()
        assert seeds.ranges() == [[10, 14]]
        assert seeds.low == 14


# Files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "no finding of guestio fuzz"),
        ('{"guestio fuzz": 999, "version": "9.9"}', "of format 999.*use guestio 9.9"),
        ('{"guestio fuzz": 1}', "no case of guestio fuzz"),
        (
            '{"guestio fuzz": 1, "case": {"device": "blk", "seed": 1, "steps": [["close", {}]]}}',
            "there is no step 'close'",
        ),
        (
            '{"guestio fuzz": 1, "case": {"device": "blk", "seed": 1, "steps": []}}',
            "no finding of guestio fuzz",
        ),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "case.json"
    path.write_text(text)
    with pytest.raises(CaseError, match=words) as caught:
        Finding.from_data(read_json(path))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_too_long_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "case.json"
    with path.open("wb") as file:
        file.truncate(FUZZ_FILE_BYTES + 1)
    with pytest.raises(CaseError, match="has more than"):
        read_json(path)


# The command


def guestio(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "guestio", "fuzz", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_the_command_finds_writes_and_reproduces(tmp_path: Path) -> None:
    command = " ".join(victim("--die-at", "29"))
    options = ["--patience", str(PATIENCE), "--command", command]
    done = guestio("--seed", "28", "--cases", "3", *options, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "CRASH   exited with status 3" in done.stdout
    assert "| dying at 29" in done.stdout
    assert re.search(r"^3 cases: \d+ ok, \d+ CRASH; 1 findings$", done.stdout, re.MULTILINE)
    (file,) = (tmp_path / "guestio-fuzz").glob("crash-*.json")
    assert f"guestio fuzz --reproduce {file.relative_to(tmp_path)}" in done.stdout
    again = guestio("--reproduce", str(file), "--json", *options, cwd=tmp_path)
    assert again.returncode == 1
    assert json.loads(again.stdout)["reason"] == "exited with status 3"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "say the SOCKET, or --command with {socket}"),
        (["--command", "x"], "say the SOCKET, or --command with {socket}"),
        (["s", "--command", "'"], "no command line: No closing quotation"),
        (["s", "--jobs", "2"], "each worker needs a peer of its own"),
        (["s", "--healthy", "x"], "--healthy is only for --front-end"),
        (["s", "--front-end"], "--front-end needs the --command"),
        (
            ["--front-end", "--command", "x {socket}", "--healthy", "("],
            "--healthy: missing ), unterminated subpattern",
        ),
        (["s", "--resume"], "cannot read guestio-fuzz/state.json: No such file"),
    ],
)
def test_bad_arguments_end_with_one_line(words: list[str], complaint: str, tmp_path: Path) -> None:
    done = guestio(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture(autouse=True)
def _no_benches() -> Iterator[None]:
    yield
    from guestio.faults.fuzz.bench import close_bench

    close_bench()
