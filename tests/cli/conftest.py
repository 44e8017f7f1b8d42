"""An image, and `guestio blk` serving it in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

IMAGE_BYTES = 8 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk of 8 MiB with random contents, disk.img."""
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(IMAGE_BYTES))
    return path


@pytest.fixture
def serve(tmp_path: Path, image: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start ``guestio blk`` with more arguments; its socket is s.sock."""
    started = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "guestio", "blk", image, "--socket", "s.sock", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        started.append(process)
        assert process.stderr is not None
        assert process.stderr.readline() == "listening on s.sock\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
