"""What holds for every test."""

import gc

import pytest

from guestio._core import variant


def pytest_report_header() -> str:
    return f"guestio's core: {variant.NAME}"


@pytest.fixture(autouse=True, scope="module")
def _no_garbage_of_others() -> None:
    """Let go of what earlier modules left in cycles: tests here count fds and mappings."""
    gc.collect()
