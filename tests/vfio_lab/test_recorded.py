"""The simulated kernel against what real ones said when the script ran on them."""

import json
from pathlib import Path

import pytest

from tests.vfio_lab.script import script
from tests.vfio_lab.simulated import simulate

RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.json"))


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda path: path.stem)
def test_simulation_says_what_the_kernel_said(recorded: Path):
    report = json.loads(recorded.read_text())
    steps = script(report["interface"])
    simulated = simulate(report["interface"], tuple(report["linux"]))
    assert sum(map(len, steps.values())) >= 200
    assert report["results"].keys() == steps.keys()
    for phase, said in simulated.items():
        for step, one, other in zip(steps[phase], said, report["results"][phase], strict=True):
            assert one == other, (phase, step)


def test_there_are_recordings_of_both_interfaces():
    interfaces = {json.loads(path.read_text())["interface"] for path in RECORDED}
    assert interfaces == {"type1", "iommufd"}


@pytest.mark.parametrize("interface", ["type1", "iommufd"])
def test_the_script_meets_every_kind_of_answer(interface):
    """A script of refusals only, or of successes, would compare nothing."""
    said = [answer for phase in simulate(interface, (7, 2)).values() for answer in phase]
    kinds = {"ok", "EEXIST", "EINVAL", "EFAULT", "ENOMEM", "EOVERFLOW", "nothing", "nowhere"}
    kinds |= {"ENOSPC"} if interface == "type1" else {"ENOENT", "ENODEV", "EBADF"}
    assert kinds <= {answer.split()[0] for answer in said}
    assert sum(answer.startswith(("ram", "anon", "bar")) for answer in said) >= 12
    assert sum(answer.startswith("ok") for answer in said) >= 70
