"""The script on the real kernel: the simulated one must have said the same."""

import platform

import pytest

from tests.vfio_lab.in_guest.conftest import INTERFACES
from tests.vfio_lab.kernel import run_on_kernel
from tests.vfio_lab.script import script
from tests.vfio_lab.simulated import simulate


@pytest.mark.parametrize("interface", INTERFACES)
def test_kernel_and_simulation_agree(interface):
    major, minor = platform.release().split(".")[:2]
    simulated = simulate(interface, (int(major), int(minor)))
    real = run_on_kernel(interface)
    steps = script(interface)
    assert sum(map(len, steps.values())) >= 200
    differences = [
        f"{phase} {step}: kernel {kernel}, simulated {said}"
        for phase in steps
        for step, kernel, said in zip(steps[phase], real[phase], simulated[phase], strict=True)
        if kernel != said
    ]
    assert not differences
