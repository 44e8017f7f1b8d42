"""A toy device that is served, for every test below this directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.vfio_client import Client, ServingPci, Toy


@pytest.fixture
def toy() -> Toy:
    return Toy()


@pytest.fixture
def serving(toy: Toy, tmp_path: Path) -> Iterator[ServingPci]:
    with ServingPci(toy, tmp_path / "toy.sock", revoke_after=0.3) as running:
        yield running


@pytest.fixture
def client(serving: ServingPci) -> Iterator[Client]:
    """A client that has negotiated and made the device bus master."""
    with serving.connect() as made:
        yield made.begin()
