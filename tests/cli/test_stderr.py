"""Standard error that is not read, not open or on a full disk stops neither service nor its end."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guestio.testing import ScriptedGuest
from tests.kit.serving import promptly, until

BLK = [sys.executable, "-c", "from guestio.cli import main; main()", "blk"]
SHELL = f'exec {sys.executable} -c \'from guestio.cli import main; main()\' blk "$0" --socket "$1"'


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(1 << 20)
    return path


@contextmanager
def killed(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def listens(path: Path) -> bool:
    """Whether the program accepts connections; the path is there a moment before."""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def read_a_sector(path: Path) -> None:
    with ScriptedGuest(path) as guest:
        assert guest.read(0, 512) == bytes(512)


def end(process: subprocess.Popen[bytes], path: Path) -> None:
    with promptly(2.0):
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not path.exists()


def fill(pipe: int) -> None:
    os.set_blocking(pipe, False)
    for size in (4096, 1):
        with pytest.raises(BlockingIOError):
            while True:
                os.write(pipe, b"x" * size)
    os.set_blocking(pipe, True)


def test_a_pipe_that_is_not_read(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "socket"
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    arguments = [*BLK, str(image), "--socket", str(path)]
    with killed(subprocess.Popen(arguments, stderr=writing)) as process:
        assert os.read(reading, 4096) == f"listening on {path}\n".encode()
        fill(writing)
        for _ in range(20):
            read_a_sector(path)
        end(process, path)
    os.close(reading)
    os.close(writing)


def test_a_full_disk(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "socket"
    with Path("/dev/full").open("w") as full:
        arguments = [*BLK, str(image), "--socket", str(path)]
        with killed(subprocess.Popen(arguments, stderr=full)) as process:
            until(lambda: listens(path))
            read_a_sector(path)
            end(process, path)


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "<&- 2>&-", ">&- 2>&-", "<&-"])
def test_no_image_gets_the_number_of_a_standard_descriptor(
    tmp_path: Path, image: Path, closed: str
) -> None:
    path = tmp_path / "socket"
    arguments = ["sh", "-c", f"{SHELL} {closed}", str(image), str(path)]
    with killed(subprocess.Popen(arguments)) as process:
        until(lambda: listens(path))
        read_a_sector(path)
        opened = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in range(3)]  # noqa: PTH115
        assert str(image) not in opened
        assert not any("eventfd" in each or "socket" in each for each in opened)
        end(process, path)


def test_lines_that_were_lost_are_told(tmp_path: Path) -> None:
    code = f"""
import logging, os, time
from guestio.cli.stderr import StderrLog
log = StderrLog()
for number in range(6000):
    logging.getLogger("guestio").info("%d", number)
print(open({str(tmp_path / "go")!r}).read(), end="")
assert log.drain(30)
logging.getLogger("guestio").info("later")
assert log.drain(30)
"""
    go = tmp_path / "go"
    os.mkfifo(go)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    # By then all has been said, to a pipe that takes a part of it.
    with go.open("w"):
        pass
    _, logged = process.communicate(timeout=60)
    assert process.returncode == 0, logged
    *lines, last = logged.splitlines()
    assert last.endswith("INFO later")
    told = [line for line in lines if line.endswith("lines were lost: standard error was not read")]
    assert told
    assert sum(int(line.split()[3]) for line in told) + len(lines) - len(told) == 6000


LATE = """
import logging, sys, time
from guestio.cli.stderr import StderrLog

class Late(logging.StreamHandler):
    def emit(self, record):
        time.sleep(0.5)
        super().emit(record)

logging.StreamHandler = Late
log = StderrLog()
log.say("the last line")
print(log.drain(0.2))
"""


def test_a_thread_that_runs_late_still_writes_the_last_lines() -> None:
    """As on a machine so busy that only the reader has time."""
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, timeout=60, text=True)
    assert done.stdout == "True\n"
    assert done.stderr == "the last line\n"
