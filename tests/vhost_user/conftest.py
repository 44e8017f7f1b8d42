"""What the tests of queues share: a device that answers when it is told to, and its back end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vhost_user.serving import Later, Serving


@pytest.fixture
def device() -> Later:
    return Later()


@pytest.fixture(params=[False, True], ids=["one thread", "queue threads"])
def serving(device: Later, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Serving]:
    with Serving(device, tmp_path / "socket", queue_threads=request.param) as made:
        yield made
        device.give_up()
