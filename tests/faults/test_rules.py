"""The rule language: what is a rule, what is none, and when a rule strikes."""

from __future__ import annotations

import re
import threading

import pytest

from guestio.budgets import FAULT_RULE_CHARS, FAULT_RULES
from guestio.faults import ALWAYS, MISBEHAVIORS, SELECTORS, Faults, Level, parse

WRONG = [
    ("", "an empty rule: say what goes wrong"),
    ("eror", "'eror' is no misbehavior: did you mean error?"),
    ("error=300", "'300' is not a status byte; say error=1"),
    ("error=", "'' is not a status byte"),
    ("drop=1", "drop has no value, say drop alone"),
    ("delay=5", "'5' is not a time; say delay=20ms"),
    ("delay=-1s", "is not a time"),
    ("delay=4000s", "is not a time"),
    ("delay=nans", "is not a time"),
    ("corrupt=0", "is not bytes"),
    ("feature-lie", "feature-lie needs a bit, as in feature-lie=28"),
    ("feature-lie=64", "is not a bit"),
    ("status-lie=0", "is not bits"),
    ("error op", "'op': say op=read"),
    ("error op=", "'' is not kinds of request"),
    ("error op=read,", "is not kinds of request"),
    ("error sectr=1", "'sectr=1': no selector; did you mean sector?"),
    ("error bar=1", "bar is no selector of error"),
    ("error sector=5-2", "'5-2' is not sectors of a disk"),
    ("error sector=-2", "is not sectors of a disk"),
    ("error sector=0x10000000000000000", "is not sectors of a disk"),
    ("error queue=1 queue=2", "queue is given twice"),
    ("error nth=0", "'0' is not the one of this number alone"),
    ("error p=0", "is not with this probability"),
    ("error p=1.1", "is not with this probability"),
    ("error once=1", "say once alone"),
    ("error once for=3", "once and for=: say one of them"),
    ("error nth=1 every=2", "nth= and every=: say one of them"),
    ("error size=1T", "is not bytes of data"),
    ("error " + "x" * FAULT_RULE_CHARS, "characters: at most"),
    ("error \x1b[31m=1", "no selector"),
]


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_what_is_no_rule_is_refused_in_one_line_that_names_the_word(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        parse(text)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("each", MISBEHAVIORS.values(), ids=lambda each: each.name)
def test_every_misbehavior_is_a_rule_with_its_example_and_all_its_selectors(each) -> None:
    value = f"={each.value.example}" if each.value is not None else ""
    words = [f"{key}={SELECTORS[key].example.split()[0]}" for key in each.selectors]
    words += [
        f"{key}={SELECTORS[key].example.split()[0]}" for key in ALWAYS if key not in ("once", "nth")
    ]
    rule = parse(f"{each.name}{value}  {' '.join(words)}")
    assert rule.what is each
    assert rule.text == " ".join([f"{each.name}{value}", *words])
    if not each.required:
        assert parse(each.name).value == each.default


def struck(rule: str, count: int, **where: int) -> list[int]:
    faults = Faults([rule])
    names = (parse(rule).what.name,)
    return [n for n in range(1, count + 1) if faults.strike(names, "a test", op="read", **where)]


def test_selectors_say_which_of_those_that_match() -> None:
    assert struck("drop", 3) == [1, 2, 3]
    assert struck("drop nth=3", 9) == [3]
    assert struck("drop every=3", 9) == [3, 6, 9]
    assert struck("drop after=4", 7) == [5, 6, 7]
    assert struck("drop after=4 nth=2", 9) == [6]
    assert struck("drop after=1 every=2 for=2", 20) == [3, 5]
    assert struck("drop once", 5) == [1]
    assert struck("drop after=1000s", 5) == []
    assert struck("drop for=1000s", 3) == [1, 2, 3]
    assert struck("drop for=0us", 3) == [1]
    assert struck("drop op=write", 3) == []
    assert struck("drop op=write,read", 2) == [1, 2]
    assert struck("drop queue=1-2", 1, queue=2) == [1]
    assert struck("drop queue=1-2", 1, queue=3) == []
    assert struck("drop size=4K-", 1, size=4095) == []
    assert struck("drop size=4K-", 1, size=1 << 40) == [1]
    # What has no sector is not selected by one.
    assert struck("drop sector=0-", 1) == []


def test_a_range_is_selected_by_what_overlaps_it() -> None:
    faults = Faults(["error sector=100-200"])
    for first, last, hit in ((0, 99, 0), (0, 100, 1), (150, 160, 1), (200, 300, 1), (201, 300, 0)):
        found = faults.strike(("error",), "a test", op="read", sector=(first, last))
        assert len(found) == hit, (first, last)


def test_what_is_random_is_the_same_for_the_same_seed() -> None:
    first = struck("drop p=0.3 seed=7", 200)
    assert 30 < len(first) < 90
    assert struck("drop p=0.3 seed=7", 200) == first
    assert struck("drop p=0.3 seed=8", 200) != first


def test_rules_are_switched_at_run_time_and_counted() -> None:
    faults = Faults(["drop"])
    changes: list[int] = []
    faults.watch(lambda: changes.append(1))
    second = faults.on("delay op=write")
    assert [each.rule for each in faults.counts()] == ["drop", "delay op=write"]
    for _ in range(3):
        faults.strike(("drop", "delay"), "a test", op="read")
    assert [(each.matched, each.struck) for each in faults.counts()] == [(3, 3), (0, 0)]
    faults.off(1)
    assert not faults.strike(("drop", "delay"), "a test", op="read")
    with pytest.raises(ValueError, match=f"no rule 1 is in force; there is {second}"):
        faults.off(1)
    assert len(changes) == 2
    # A number is not given twice.
    assert faults.on("drop") == 3


def test_there_is_a_limit_to_rules_and_one_that_is_refused_changes_nothing() -> None:
    faults = Faults(["drop"] * FAULT_RULES)
    with pytest.raises(ValueError, match="switch one off first"):
        faults.on("drop")
    faults.off(1)
    faults.refuse(Level.PCI, "over vfio-user only")
    with pytest.raises(ValueError, match="msi-lost: over vfio-user only"):
        faults.on("msi-lost")
    faults.expect(Level.DEVICE, ["read"], "a disk")
    with pytest.raises(ValueError, match="op=raed: a disk has no 'raed'; did you mean read"):
        faults.on("drop op=raed")
    assert len(faults.counts()) == FAULT_RULES - 1


def test_rules_are_a_list() -> None:
    with pytest.raises(TypeError, match=r"say \['drop'\]"):
        Faults("drop")
    with pytest.raises(TypeError, match="a rule is text, not int"):
        parse(3)  # type: ignore[arg-type]


def test_threads_do_not_strike_more_often_than_a_rule_says() -> None:
    faults = Faults(["drop for=50"])
    found: list[int] = []

    def strike() -> None:
        for _ in range(500):
            found.extend(each.number for each in faults.strike(("drop",), "a test"))

    threads = [threading.Thread(target=strike) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 50
    assert faults.counts()[0].matched == 2000
