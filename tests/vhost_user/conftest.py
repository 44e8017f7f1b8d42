"""What the tests of queues share: a device that answers when it is told to, and its back-end."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.closing import settled_closes
from tests.kit.serving import Later, Mirror, Serving, footprint, left_since, until


@pytest.fixture
def device() -> Later:
    return Later()


@pytest.fixture(params=[False, True], ids=["one thread", "queue threads"])
def serving(device: Later, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Serving]:
    with Serving(device, tmp_path / "socket", queue_threads=request.param) as made:
        yield made
        device.give_up()


@pytest.fixture(scope="module")
def shared_backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One back-end for all hostile cases of a module: none of them may be its end."""
    with Serving(Mirror(), tmp_path_factory.mktemp("hostile") / "socket") as made:
        made.check_serves()
        yield made
        made.check_serves()


@pytest.fixture
def survivor(shared_backend: Serving) -> Iterator[Serving]:
    """A back-end for one hostile case.

    Afterwards it is found unharmed: the next front-end is served in time, and no descriptor,
    mapping or thread is left of the case.
    """
    shared_backend.let_go()
    # Of the case before, too, one may have waited that is gone now.
    until(lambda: not shared_backend.backend._waiting)
    shared_backend.let_go()
    settled_closes()
    # What a test before left in cycles goes now, not in the middle.
    gc.collect()
    before = footprint()
    yield shared_backend
    shared_backend.check_serves()
    until(lambda: not left_since(before), f"left behind: {before} {footprint()}")
