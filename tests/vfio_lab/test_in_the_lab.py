"""Boots the lab guest and has the tests below `in_guest` run on real kernels."""

import re
from pathlib import Path

import pytest

from lab.parts import PartsError
from lab.vfio import VfioKernel, guest_for, iommufd_kernel, stock_kernel

HERE = Path(__file__).parent
PER_INTERFACE = 22
# With the devices of the kernel's own test of iommufd.
MOCKED = 11

pytestmark = pytest.mark.system


def run_in_guest(kernel: VfioKernel, directory: Path, least: int) -> None:
    guest = guest_for(HERE / "in_guest", on=kernel, timeout=240)
    result = guest.run(directory)
    assert result.status == 0, result.report + result.describe()
    # A guest in which nothing was run would be green too.
    summary = re.findall(r"(\d+) (passed|failed|error|skipped|deselected)", result.report)
    assert [word for _number, word in summary] == ["passed"], result.report
    assert int(summary[0][0]) >= least, result.report


def test_type1_on_debians_kernel(tmp_path: Path):
    run_in_guest(stock_kernel(), tmp_path, PER_INTERFACE)


def test_type1_and_iommufd_on_a_kernel_of_our_own(tmp_path: Path):
    try:
        kernel = iommufd_kernel()
    except PartsError as error:
        pytest.skip(f"IOMMUFD IS NOT TESTED: {error}")
    run_in_guest(kernel, tmp_path, 2 * PER_INTERFACE + MOCKED)
