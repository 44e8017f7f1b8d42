"""Where a server command meets its front-end: it connects, or is handed a socket."""

from __future__ import annotations

import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kit.disk_driver import DiskDriver
from tests.kit.serving import WAIT, until

Start = Callable[..., subprocess.Popen[str]]

PROGRAM = [sys.executable, "-m", "guestio", "blk", "disk.img"]
ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"], os.environ["LISTEN_FDS"] = sys.argv[2] or str(os.getpid()), sys.argv[3]
os.execv(sys.executable, [sys.executable, "-m", "guestio", "blk", "disk.img"])
"""


@pytest.fixture
def start(tmp_path: Path, image: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def begin(
        command: list[str], ready: str = "", fds: tuple[int, ...] = ()
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, pass_fds=fds
        )
        started.append(process)
        if ready:
            assert process.stderr is not None
            # A log line may come first.
            while (line := process.stderr.readline()) != f"{ready}\n":
                assert line, f"{ready} was not said"
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def reads(target: Path | socket.socket, image: Path) -> None:
    with DiskDriver(target) as driver:
        capacity = int.from_bytes(driver.frontend.get_config(0, 8), "little")
        assert capacity * 512 == image.stat().st_size


def ends(process: subprocess.Popen[str]) -> str:
    process.send_signal(signal.SIGTERM)
    return ended(process)


def ended(process: subprocess.Popen[str]) -> str:
    _, said = process.communicate(timeout=WAIT)
    assert process.returncode == 0, said
    return said


def test_it_connects_and_connects_again(tmp_path: Path, image: Path, start: Start) -> None:
    blk = start([*PROGRAM, "--connect", "front-end"], "connecting to front-end")
    path = tmp_path / "front-end"
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.settimeout(WAIT)
            listener.bind(str(path))
            listener.listen(1)
            made, _ = listener.accept()
            reads(made, image)
        path.unlink()
    assert ends(blk).count("connected to front-end") == 2


def test_a_listening_socket_by_number(tmp_path: Path, image: Path, start: Start) -> None:
    path = tmp_path / "listening"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        fd = listener.fileno()
        blk = start([*PROGRAM, "--fd", str(fd)], f"listening on {path}", (fd,))
        reads(path, image)
        reads(path, image)
        ends(blk)
        assert path.exists()
        # The caller may start another one on it.
        again = start([*PROGRAM, "--fd", str(fd)], f"listening on {path}", (fd,))
        reads(path, image)
        ends(again)


def test_a_connected_socket_by_number(image: Path, start: Start) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        fd = theirs.fileno()
        blk = start([*PROGRAM, "--fd", str(fd)], f"connected by descriptor {fd}", (fd,))
    reads(ours, image)
    assert "front-end 1 gone" in ended(blk)


@pytest.mark.parametrize("connected", [False, True])
def test_systemd_hands_one_over(tmp_path: Path, image: Path, start: Start, connected: bool) -> None:
    """``Accept=no`` and ``Accept=yes``."""
    path = tmp_path / "activated"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        if not connected:
            fd = listener.fileno()
            blk = start(
                [sys.executable, "-c", ACTIVATE, str(fd), "", "1"], f"listening on {path}", (fd,)
            )
            reads(path, image)
            ends(blk)
            return
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(path))
        with listener.accept()[0] as accepted:
            fd = accepted.fileno()
            blk = start(
                [sys.executable, "-c", ACTIVATE, str(fd), "", "1"],
                "connected by descriptor 3",
                (fd,),
            )
        reads(client, image)
        ended(blk)


def refused(process: subprocess.Popen[str]) -> str:
    _, said = process.communicate(timeout=6 * WAIT)
    assert process.returncode == 2, said
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say where to listen (--socket PATH) or to connect to (--connect PATH)"),
        (["--socket", "a", "--connect", "b"], "give one of --socket, --connect and --fd"),
        (["--socket", "a", "--fd", "7"], "give one of --socket, --connect and --fd"),
        (["--connect", "disk.img"], "there is a file that is not a socket"),
        (["--connect", ""], "not the name of a file"),
        (["--fd", "2"], "--fd"),
        (["--fd", "-1"], "--fd"),
        (["--fd", "987654"], "descriptor 987654 cannot be used: Bad file descriptor"),
    ],
)
def test_what_cannot_be(start: Start, options: list[str], message: str) -> None:
    assert message in refused(start([*PROGRAM, *options]))


@pytest.mark.parametrize("kind", ["file", "datagram", "unconnected", "epoll"])
def test_descriptors_that_cannot_be(image: Path, start: Start, kind: str) -> None:
    made = {
        "file": lambda: image.open("rb"),
        "epoll": select.epoll,
        "datagram": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        "unconnected": lambda: socket.socket(socket.AF_UNIX),
    }[kind]()
    with made:
        fd = made.fileno()
        said = refused(start([*PROGRAM, "--fd", str(fd)], fds=(fd,)))
    assert "stream socket" in said or "neither listens nor is connected" in said


@pytest.mark.parametrize(
    ("pid", "count", "message"),
    [
        ("", "2", "descriptor 4 "),
        ("1", "1", "say where to listen"),
        ("", "0", "say where to listen"),
        ("", "many", "LISTEN_FDS is 'many'"),
    ],
)
def test_activation_that_cannot_be(start: Start, pid: str, count: str, message: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fd = ours.fileno()
        command = [sys.executable, "-c", ACTIVATE, str(fd), pid, count]
        assert message in refused(start(command, fds=(fd,)))


def test_a_front_end_that_hangs_up_while_it_is_waited_for(image: Path, start: Start) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        fd = theirs.fileno()
        blk = start([*PROGRAM, "--fd", str(fd)], f"connected by descriptor {fd}", (fd,))
    ours.close()
    until(lambda: blk.poll() is not None)
    ended(blk)
