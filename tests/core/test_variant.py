"""Tests run against the build of the core that was asked for, and so do the programs they start."""

import os
import subprocess
import sys
from pathlib import Path

import guestio
from guestio._core.base import variant
from guestio._core.iommu import tree
from guestio.guest._load import load

ASKED = os.environ.get("GUESTIO_CORE", "normal")


def test_this_is_the_core_that_was_asked_for() -> None:
    assert ASKED == variant.NAME
    assert variant.CHECKS is (ASKED != "normal")
    core = Path(variant.__file__).parents[1]
    assert Path(tree.__file__).parents[1] == core
    assert Path(guestio.__file__).parent == core.parent
    assert Path(load.__file__).parents[2] == core.parent


def test_so_do_programs() -> None:
    program = "from guestio._core.base import variant; print(variant.NAME)"
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert said.stdout == f"{ASKED}\n"
