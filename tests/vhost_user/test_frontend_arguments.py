"""Nonsense in the arguments of the front-end: refused before anything is sent."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from guestio.addr import Permissions
from guestio.vhost_user.frontend import Frontend
from guestio.vhost_user.sharing import MemoryTableTarget
from guestio.virtio.layout import RingLayout
from tests.kit.arguments import NONSENSE, numbers, refused
from tests.kit.peer import nothing_left

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def silent() -> Iterator[Frontend]:
    """A front-end whose back-end must not hear a word."""
    ours, theirs = socket.socketpair()
    with theirs:
        frontend = Frontend(ours, timeout=0.2)
        yield frontend
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)
        frontend.close()


def test_the_constructor() -> None:
    refused(
        lambda: lambda **options: connect(**options),
        {"timeout": 1.0, "connect_wait": 0.0, "granularity": 4096, "pipeline": 1},
        may=[
            *numbers("timeout", "connect_wait"),
            ("granularity", None),
            *big("pipeline", "granularity"),
        ],
    )
    for bad in ("", "none", None, 1, True):
        with pytest.raises(ValueError, match="answer"):
            connect(answer=bad)
    for bad in (None, 1.5, [], object()):
        with pytest.raises(TypeError):
            Frontend(bad)  # type: ignore[arg-type]


def big(*names: str) -> list[tuple[str, object]]:
    return [(name, 2**64) for name in names]


def connect(**options: object) -> None:
    ours, theirs = socket.socketpair()
    with theirs, ours:
        Frontend(ours, **options).close()  # type: ignore[arg-type]


def test_calls(silent: Frontend) -> None:
    layout = RingLayout.contiguous(0, 8)
    for name, call in (
        ("wanted", lambda bad: silent.negotiate(bad)),
        ("protocol", lambda bad: silent.negotiate(0, bad)),
        ("features", silent.set_features),
        ("offset", lambda bad: silent.get_config(bad, 4)),
        ("size", lambda bad: silent.get_config(0, bad)),
        ("offset", lambda bad: silent.set_config(bad, b"")),
        ("status", silent.set_status),
        ("index", lambda bad: silent.start_queue(bad, layout)),
        ("base", lambda bad: silent.start_queue(0, layout, base=bad)),
        ("index", lambda bad: silent.enable_queue(bad, enable=True)),
        ("index", silent.stop_queue),
    ):
        for bad in NONSENSE:
            with pytest.raises((TypeError, ValueError), match=name):
                call(bad)
    for bad in NONSENSE:
        with pytest.raises(TypeError, match="memory"):
            silent.set_memory(bad)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="frontend"):
            MemoryTableTarget(bad)  # type: ignore[arg-type]
        with pytest.raises((TypeError, ValueError)):
            silent.iotlb.map(bad, 0, 4096, Permissions.READ)  # type: ignore[arg-type]
        with pytest.raises((TypeError, ValueError)):
            silent.iotlb.unmap((bad, 4096))  # type: ignore[arg-type]
        with pytest.raises((TypeError, ValueError), match="iova"):
            silent.iotlb.push(bad)  # type: ignore[arg-type]
    for index in (256, 2**16):
        with pytest.raises(ValueError, match="index"):
            silent.stop_queue(index)
    assert len(silent.iotlb.mappings) == 0
