"""libblkio, a vhost-user-blk front-end that is neither QEMU's nor ours, uses a served disk."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lab.guest import MIB
from lab.qemu import new_qemu
from lab.reloads import served

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT = 60
SIZE = 4 * MIB


@pytest.fixture(scope="module")
def qemu_io() -> Path:
    """`qemu-io`, fetched if need be. Never skips: without it nothing here is tested."""
    return new_qemu("qemu-io")


@pytest.fixture(params=[[], ["--iommu", "off"], ["--queue-threads", "--num-queues", "2"]])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str, Path]]:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(SIZE))
    with served(image, tmp_path, *request.param) as (socket, log):
        yield image, f"driver=virtio-blk-vhost-user,path={socket},cache.direct=on", log
    assert "disconnected" not in log.read_text()
    assert "failed=0" in log.read_text()


def script(content: bytearray, seed: int) -> list[str]:
    """Commands of `qemu-io` that write and read at random; `content` follows."""
    rng = random.Random(seed)
    lines = []
    for _ in range(60):
        at, length = rng.randrange(SIZE // 512) * 512, rng.choice((512, 4096, 65536, 200 * 1024))
        length = min(length, SIZE - at)
        pattern = rng.randrange(1, 256)
        content[at : at + length] = bytes([pattern]) * length
        lines += [f"aio_write -P {pattern} {at} {length}", "aio_flush"]
        lines.append(f"read -P {pattern} {at} {length}")
        if rng.random() < 0.2:
            content[at : at + length] = bytes(length)
            lines.append(f"write -z {at} {length}")
    return [*lines, "flush"]


def test_writes_and_reads_at_random(disk: tuple[Path, str, Path], qemu_io: Path) -> None:
    image, options, _log = disk
    content = bytearray(image.read_bytes())
    for seed in range(3):  # each is a front-end of its own
        lines = script(content, seed)
        done = subprocess.run(
            [qemu_io, "--image-opts", options],
            input="\n".join(lines) + "\n",
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "failed" not in done.stdout + done.stderr, done.stdout + done.stderr
        assert done.stdout.count("\nwrote ") + done.stdout.count("> wrote ") >= 60
        assert hashlib.sha256(image.read_bytes()).digest() == hashlib.sha256(content).digest()


def test_one_that_is_killed_makes_room_for_the_next(
    disk: tuple[Path, str, Path], qemu_io: Path, tmp_path: Path
) -> None:
    image, options, log = disk
    bench = new_qemu("qemu-img")
    for count in range(1, 4):
        command = [bench, "bench", "-c", "100000000", "-d", "32", "--image-opts", options]
        end = time.monotonic() + LIMIT
        while f"front-end {count} gone" not in log.read_text():
            assert time.monotonic() < end, log.read_text()
            busy = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            # Anywhere in its work; on a slow machine it may not have connected yet.
            time.sleep(0.3)
            busy.send_signal(signal.SIGKILL)
            busy.wait()
            soon = time.monotonic() + 2
            while f"front-end {count} gone" not in log.read_text() and time.monotonic() < soon:
                time.sleep(0.02)
    copy = tmp_path / "copy.img"
    subprocess.run(
        [bench, "convert", "-O", "raw", "--image-opts", options, copy], timeout=LIMIT, check=True
    )
    assert copy.read_bytes() == image.read_bytes()
