"""A controller with an image of random bytes, and a driver of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guestio.pci.nvme import NvmeController
from tests.kit.nvme_driver import NvmeDriver

SIZE = 4 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def make(image: Path) -> Iterator[Callable[..., NvmeDriver]]:
    """`make(**options)` is a driver of a controller with these options, enabled."""
    made: list[NvmeDriver] = []

    def build(**options: Any) -> NvmeDriver:
        driver = NvmeDriver(NvmeController(image, **options))
        made.append(driver)
        return driver.enable().ready()

    yield build
    for driver in made:
        driver.__exit__()


@pytest.fixture
def driver(make: Callable[..., NvmeDriver]) -> NvmeDriver:
    """A driver with an I/O queue pair, number 1."""
    made = make()
    made.create(1)
    return made
