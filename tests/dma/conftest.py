"""Fixtures of the tests of DMA maps."""

from collections.abc import Iterator

import pytest

from guestio import Backing
from guestio.dma import RegionManager


@pytest.fixture
def backing() -> Iterator[Backing]:
    with Backing.memfd(0x40000, "dma-test") as memory:
        yield memory


@pytest.fixture
def private() -> Iterator[Backing]:
    with Backing.anonymous(0x40000) as memory:
        yield memory


@pytest.fixture
def manager(backing: Backing, private: Backing) -> Iterator[RegionManager]:
    """Closed before the memory is: whatever still holds some then fails the test."""
    with RegionManager() as made:
        yield made
