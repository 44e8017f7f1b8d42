"""Every line of the comparison with crosvm names what exists, and a test."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "coming-from-crosvm.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text().splitlines()
    if line.startswith("| ") and not line.startswith(("| crosvm |", "| question |"))
]


def test_there_are_rows():
    assert len(ROWS) > 25


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_row(row):
    (test,) = re.findall(r"`(test_\w+\.py)`", row[-1])
    assert any((ROOT / "tests" / room / test).exists() for room in ("iommu", "virtio"))
    for module, name in re.findall(r"`(guestio(?:\.[a-z_]+)+)\.([A-Z]\w+)`", " ".join(row)):
        assert hasattr(importlib.import_module(module), name)
