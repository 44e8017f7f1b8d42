"""Servers that are killed at any message of a migration: the guest goes on, here or there.

A sample; `./run killed-migrations` tries every message.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest

from tests.kit.mortal import Mortals, When
from tests.kit.mover import CASES, migrate
from tests.kit.serving import nothing_left

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EVERY = 12
"""Of how many messages one is tried in each case."""


@pytest.fixture(scope="module")
def mortals() -> Iterator[Mortals]:
    with Mortals() as made:
        yield made


def test_a_migration_of_which_no_server_dies(tmp_path: Path, mortals: Mortals) -> None:
    messages = migrate(mortals, tmp_path, tracked=True)
    logged = ["SET_LOG_BASE", "SET_FEATURES", "SET_VRING_ADDR"]
    saved = ["GET_VRING_BASE", "SET_DEVICE_STATE_FD", "CHECK_DEVICE_STATE"]
    assert messages["source"][-6:] == logged + saved
    assert "SET_INFLIGHT_FD" in messages["source"]
    assert messages["target"][-1] == "GET_VRING_BASE"


@pytest.mark.parametrize(("tracked", "name", "onwards", "when"), CASES)
def test_killed_at_a_message(
    tmp_path: Path, mortals: Mortals, tracked: bool, name: str, onwards: bool, when: When
) -> None:
    messages = migrate(mortals, tmp_path, tracked=tracked)[name]
    # Others in each case, so that each is among them.
    first = CASES.index((tracked, name, onwards, when)) * 5 % EVERY
    for at in range(1 + first, len(messages) + 1, EVERY):
        with nothing_left():
            told = migrate(
                mortals,
                tmp_path,
                tracked=tracked,
                onwards=onwards,
                dies=name,
                at=at,
                when=when,
            )
            # The errors that the front-end met refer to its memory, in a circle in Python 3.13.
            gc.collect()
        assert told[name] == messages[:at]
