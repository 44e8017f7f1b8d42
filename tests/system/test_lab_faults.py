"""What `./run lab-faults` knows: results are kept, and what does not apply is not run."""

from __future__ import annotations

from pathlib import Path

import pytest

from guestio.faults import parse
from guestio.faults.misbehavior.rules import MISBEHAVIORS
from lab.faults import NOT_IN_UML, RULES, VFIO_USER, VIRTIO, WAYS, Case, Outcome, Results, table


def test_what_is_known_is_not_run_again_even_if_a_run_was_killed(tmp_path: Path) -> None:
    file = tmp_path / "results"
    case = Case("qemu", "vhost-user", "none")
    results = Results(file)
    assert results.missing(case, VIRTIO) == list(VIRTIO)
    results.add(case, {"disk": Outcome("survived", ""), "net": Outcome("hung", "its user waits")})
    results.add(case, {"net": Outcome("warned", "of something")})
    with file.open("a") as torn:
        torn.write('{"guest": "qemu", "wa')
    again = Results(file)
    assert again.missing(case, VIRTIO) == ["rng", "keyboard", "console"]
    assert str(again.get(case, "net")) == "warned: of something"
    lines = list(table([case], ["disk", "net", "rng"], again))
    assert "| `none` | survived | warned: of something | not run |" in lines


@pytest.mark.parametrize("name", ["rng", "keyboard"])
def test_what_user_mode_linux_has_not_does_not_apply(tmp_path: Path, name: str) -> None:
    results = Results(tmp_path / "results")
    found = results.get(Case("uml", "vhost-user", "none"), name)
    assert found == Outcome("does not apply", NOT_IN_UML[name])
    nvme = results.get(Case("qemu", VFIO_USER, "generation-stuck"), "nvme")
    assert nvme is not None
    assert nvme.verdict == "does not apply"


def test_every_rule_is_run() -> None:
    """A rule that is new must get a row, or the documentation would not be complete."""
    run = {rule.split("=")[0].split()[0] for rules in RULES.values() for rule in rules}
    assert run - {"none"} == set(MISBEHAVIORS)
    assert RULES.keys() == WAYS.keys()
    for rules in RULES.values():
        for rule in rules:
            assert rule == "none" or parse(rule)
