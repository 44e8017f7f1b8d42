"""What holds for every test."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _no_garbage_of_others() -> Iterator[None]:
    """Let go of what earlier modules left in cycles: tests here count fds and mappings."""
    gc.collect()
    yield
