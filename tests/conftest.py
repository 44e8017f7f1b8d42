"""What holds for every test."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def _no_garbage_of_others() -> None:
    """Let go of what earlier modules left in cycles: tests here count fds and mappings."""
    gc.collect()
