"""A signal ends `guestio blk` in time, in whatever state it is: status 0, and no socket left."""

from __future__ import annotations

import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guestio.vhost_user.messages import FrontendRequest, encode_message
from guestio.virtio.blk import T_FLUSH, T_IN, T_WRITE_ZEROES
from tests.kit.disk_driver import MIB, DiskDriver
from tests.kit.serving import PLATFORM, WAIT, promptly, until

ENDS_WITHIN = 2.0
F = FrontendRequest


class Program:
    """`guestio blk` in a process of its own.

    Args:
        directory: Where its files are.
        before: Python code that runs before it, to have the disk behave badly.
        options: More arguments.
    """

    def __init__(self, directory: Path, before: str = "", *options: str) -> None:
        self.path = directory / "socket"
        image = directory / "disk.img"
        with image.open("wb") as file:
            file.truncate(64 * MIB)
        code = f"import os, time\n{before}\nfrom guestio.cli import main\nmain()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "blk", str(image), "--socket", str(self.path), *options],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        assert line == f"listening on {self.path}\n"

    def end(self, number: int = signal.SIGTERM) -> str:
        """Send a signal; what the program had logged by its end."""
        with promptly(ENDS_WITHIN):
            self.process.send_signal(number)
            _, logged = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, logged
        assert not self.path.exists()
        return logged


@contextmanager
def program(directory: Path, before: str = "", *options: str) -> Iterator[Program]:
    made = Program(directory, before, *options)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()
        made.process.stderr.close()  # type: ignore[union-attr]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_without_a_front_end(tmp_path: Path, number: int) -> None:
    with program(tmp_path) as blk:
        blk.end(number)


def test_a_hang_up_has_the_size_looked_at(tmp_path: Path) -> None:
    """A driver is told, and reads what is there now; what cannot be is reported."""
    with program(tmp_path) as blk:
        assert blk.process.stderr is not None
        with DiskDriver(blk.path) as driver:
            frontend = driver.frontend

            def sectors() -> int:
                return int.from_bytes(frontend.get_config(0, 8), "little")

            assert sectors() == 64 * MIB // 512
            for seen, size in enumerate([128 * MIB, 32 * MIB]):
                os.truncate(tmp_path / "disk.img", size)
                blk.process.send_signal(signal.SIGHUP)
                assert frontend.wait_config_change(WAIT, seen=seen)
                assert sectors() == size // 512
                assert f"has {size} bytes now" in blk.process.stderr.readline()
            os.truncate(tmp_path / "disk.img", 32 * MIB + 1)
            blk.process.send_signal(signal.SIGHUP)
            said = blk.process.stderr.readline()
            assert "33554433 bytes long, which is not a positive multiple of 512" in said
            assert "the disk keeps its size" in said
            assert not frontend.wait_config_change(0.05, seen=2)
            driver.frontend.sync()
        blk.end()


def test_a_hang_up_that_is_ignored_elsewhere_has_the_size_looked_at_too(tmp_path: Path) -> None:
    """`nohup` ignores it, so that it does not end a program; it would not end this one."""
    with program(tmp_path, "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)") as blk:
        assert blk.process.stderr is not None
        os.truncate(tmp_path / "disk.img", 128 * MIB)
        blk.process.send_signal(signal.SIGHUP)
        assert "134217728 bytes now" in blk.process.stderr.readline()
        blk.end()


def test_it_ends_with_its_terminal(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(MIB))
    pid, master = pty.fork()
    if not pid:
        try:
            os.chdir(tmp_path)
            os.execv(
                sys.executable,
                [sys.executable, "-m", "guestio", "blk", "disk.img", "--socket", "s.sock"],
            )
        finally:
            os._exit(99)
    try:
        said = b""
        while b"listening on s.sock" not in said:
            said += os.read(master, 4096)
        os.kill(pid, signal.SIGHUP)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / "s.sock"))
        os.close(master)
        ended: list[int] = []

        def over() -> bool:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                ended.append(status)
            return bool(found)

        until(over, "it goes on without its terminal")
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    assert ended == [0]
    assert not (tmp_path / "s.sock").exists()


def _half_a_message(sock: socket.socket) -> None:
    sock.send(encode_message(F.GET_FEATURES)[:5])


def _reads_nothing(sock: socket.socket) -> None:
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            sock.send(encode_message(F.GET_FEATURES) * 50)


def _says_nothing(sock: socket.socket) -> None:
    pass


@pytest.mark.parametrize("hostile", [_half_a_message, _reads_nothing, _says_nothing])
def test_a_front_end_that_does_not_go_on(
    tmp_path: Path, hostile: Callable[[socket.socket], None]
) -> None:
    with program(tmp_path) as blk, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(blk.path))
        hostile(sock)
        blk.end()


FLUSH_HANGS = "os.fdatasync = lambda fd: time.sleep(1000)"
ZEROES_ARE_SLOW = (
    "from guestio.virtio.blk import BlockDevice\n"
    "BlockDevice._zero = lambda self, offset, length: time.sleep(0.2)"
)
SERVING_HANGS = (
    "from guestio.virtio.blk import BlockDevice\n"
    "BlockDevice.process = lambda self, queue, chain: time.sleep(1000)"
)


def _reads(driver: DiskDriver) -> None:
    for _ in range(20):
        driver.request(0, T_IN, 0, 60 * MIB)


def _flush(driver: DiskDriver) -> None:
    driver.request(0, T_FLUSH)


def _zeroes(driver: DiskDriver) -> None:
    for _ in range(20):
        driver.request(0, T_WRITE_ZEROES, payload=struct.pack("<QII", 0, 64 * MIB // 512, 0))


@pytest.mark.parametrize(
    ("before", "work", "options"),
    [
        ("", _reads, ()),
        ("", _reads, ("--io-threads", "0")),
        (ZEROES_ARE_SLOW, _zeroes, ()),
        (ZEROES_ARE_SLOW, _zeroes, ("--io-threads", "0")),
        (SERVING_HANGS, _flush, ()),
        (SERVING_HANGS, _flush, ("--queue-threads",)),
        (FLUSH_HANGS, _flush, ("--io-threads", "0")),
        (FLUSH_HANGS, _flush, ()),
    ],
    ids=[
        "large reads",
        "large reads without threads",
        "write zeroes",
        "write zeroes without threads",
        "a device that blocks its thread",
        "a device that blocks a queue's thread",
        "a disk that blocks the thread",
        "a disk that does not answer",
    ],
)
def test_requests_that_take_long(
    tmp_path: Path, before: str, work: Callable[[DiskDriver], None], options: tuple[str, ...]
) -> None:
    with (
        program(tmp_path, before, "--iommu", "off", *options) as blk,
        DiskDriver(blk.path) as driver,
    ):
        work(driver)
        driver.handles[0].kick()
        time.sleep(0.1)
        blk.end()


def test_a_call_eventfd_that_is_full(tmp_path: Path) -> None:
    with program(tmp_path, "", "--iommu", "off") as blk, DiskDriver(blk.path) as driver:
        call = driver.handles[0].call_fd
        assert call is not None
        os.eventfd_write(call, 2**64 - 2)
        os.set_blocking(call, True)
        driver.finish(0, driver.request(0, T_IN, 0, 4096))
        blk.end()


def test_misses_that_are_not_answered(tmp_path: Path) -> None:
    with (
        program(tmp_path) as blk,
        DiskDriver(blk.path, iommu=True, map_all=False) as driver,
    ):
        assert driver.features & PLATFORM
        driver.request(0, T_IN, 0, 60 * MIB)
        driver.handles[0].kick()
        until(lambda: driver.rings[0].offered == 1)
        blk.end()
