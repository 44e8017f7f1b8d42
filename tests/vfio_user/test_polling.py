"""A server that looks out for the next message before it sleeps."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from guestio._core.virtio.loop import CoreLoop
from guestio.vfio_user import Server
from tests.kit.serving import promptly
from tests.kit.vfio_client import PAGE, ServingPci, Toy, memory_file
from tests.kit.vfio_model import BELLS, Probe, Side
from tests.vfio_user.test_fast_and_slow import VERSION, write


@pytest.mark.parametrize("poll_us", [-1, 1_000_001])
def test_no_such_time(tmp_path: Path, poll_us: int) -> None:
    with pytest.raises(ValueError, match=r"poll_us -?\d+ is not in 0..1000000"):
        Server(Toy(), tmp_path / "s", poll_us=poll_us)


@pytest.mark.parametrize("seconds", [-1.0, 61.0, float("nan")])
def test_no_such_time_of_the_core(seconds: float) -> None:
    core = CoreLoop()
    with pytest.raises(ValueError, match="watch"):
        core.watch = seconds
    assert core.watch == 0


def test_messages_are_obeyed_while_it_looks_out(tmp_path: Path) -> None:
    """Each comes within the time that is looked out for it; the core handles nearly all."""
    device = Probe()
    with ServingPci(device, tmp_path / "s", poll_us=1_000_000) as serving:
        fd = memory_file()
        with promptly(30), serving.connect() as client:
            client.begin()
            assert client.map(1 << 30, PAGE, fd) == 0
            before = serving.stats.plain
            for n in range(50):
                assert client.map(0, PAGE, fd) == 0
                client.post(0, BELLS, n.to_bytes(4, "little"))
                assert client.unmap(0, PAGE) == 0
            assert client.read(7, 0, 2) == b"\x34\x12"
            assert before + 75 < serving.stats.plain <= before + 150
            assert device.tails == {0: 49}
        os.close(fd)
        # What ends a client or the server is not looked over.
        with promptly(30), serving.connect() as client:
            client.begin()
            assert client.unmap(0, PAGE) == 0


@pytest.mark.parametrize("what", ["thread", "timer"])
def test_what_else_is_due_ends_the_look(what: str) -> None:
    side = Side()
    done: list[str] = []

    def ring() -> None:
        time.sleep(0.05)
        side.loop.call_soon_threadsafe(lambda: done.append(what))

    thread = threading.Thread(target=ring)
    try:
        side.send(VERSION)
        side.settle()
        side.loop.core.watch = 60.0
        side.send(write(BELLS, bytes(4)))
        if what == "thread":
            thread.start()
        else:
            side.loop.set_timer("t", time.monotonic() + 0.05, lambda: done.append(what))
        with promptly(30):
            while not done:
                side.loop.run_once()
        assert side.stats.plain == 1
    finally:
        if thread.ident is not None:
            thread.join()
        side.close()
