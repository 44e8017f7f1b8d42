"""``guestio console``, run as a user runs it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kit.console_driver import ConsoleDriver
from tests.kit.serving import promptly, until

Program = subprocess.Popen[bytes]


class Terminal:
    """A terminal of 100 columns and 40 rows."""

    def __init__(self) -> None:
        self.master, self.slave = os.openpty()
        self.resize(100, 40)
        self.before = termios.tcgetattr(self.slave)

    def resize(self, cols: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            assert select.select((self.master,), (), (), 20)[0], data
            data += os.read(self.master, count - len(data))
        return data


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal()
    yield made
    os.close(made.master)
    os.close(made.slave)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start the command; its socket is s.sock."""
    started: list[Program] = []

    def begin(*words: str, terminal: Terminal | None = None, stdin: int | None = None) -> Program:
        def lead() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        process = subprocess.Popen(
            [sys.executable, "-m", "guestio", "console", *words, "--socket", "s.sock"],
            stdin=stdin if terminal is None else terminal.slave,
            stdout=subprocess.PIPE if terminal is None else terminal.slave,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=None if terminal is None else lead,
            cwd=tmp_path,
        )
        started.append(process)
        assert process.stderr is not None
        assert process.stderr.readline() == b"listening on s.sock\n"
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def end(process: Program, number: int = signal.SIGTERM) -> None:
    with promptly(2.0):
        process.send_signal(number)
        assert process.wait(60) == 0


def test_this_terminal(tmp_path: Path, start: Callable[..., Program], terminal: Terminal) -> None:
    process = start("--stdio", terminal=terminal)
    with ConsoleDriver(tmp_path / "s.sock") as driver:
        assert driver.frontend.get_config(0, 4) == struct.pack("<HH", 100, 40)
        driver.write(1, b"login: ")
        assert terminal.read(7) == b"login: "
        # Keys are the guest's, those that mean something to a terminal included, and not echoed.
        os.write(terminal.master, b"root\x03\x1a\x04\r")
        assert driver.read(0, 8) == b"root\x03\x1a\x04\r"
        assert process.poll() is None
        seen = driver.frontend.config_changes
        terminal.resize(132, 50)
        until(lambda: driver.frontend.get_config(0, 4) == struct.pack("<HH", 132, 50))
        assert driver.frontend.wait_config_change(20, seen=seen)
        assert termios.tcgetattr(terminal.slave) != terminal.before
        os.write(terminal.master, b"\x1d")
        assert process.wait(20) == 0
    assert termios.tcgetattr(terminal.slave) == terminal.before
    assert not (tmp_path / "s.sock").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_terminal_as_it_was(
    tmp_path: Path, start: Callable[..., Program], terminal: Terminal, number: int
) -> None:
    process = start("--stdio", terminal=terminal)
    with ConsoleDriver(tmp_path / "s.sock") as driver:
        driver.write(1, b"x" * 5000, wait=False)  # which is not read
        end(process, number)
    assert termios.tcgetattr(terminal.slave) == terminal.before


def test_standard_input_and_output_that_are_no_terminal(
    tmp_path: Path, start: Callable[..., Program]
) -> None:
    reading, writing = os.pipe()
    process = start("--stdio", "--size", "90x33", stdin=reading)
    os.close(reading)
    with ConsoleDriver(tmp_path / "s.sock") as driver:
        assert driver.frontend.get_config(0, 4) == struct.pack("<HH", 90, 33)
        os.write(writing, b"echo \x1d\n")
        assert driver.read(0, 7) == b"echo \x1d\n"
        os.close(writing)
        driver.write(1, b"after the end of input")
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 100) == b"after the end of input"
        end(process)


def test_a_pseudoterminal(tmp_path: Path, start: Callable[..., Program]) -> None:
    process = start("--pty")
    assert process.stderr is not None
    match = re.fullmatch(rb"console at (/dev/pts/\d+)\n", process.stderr.readline())
    assert match is not None
    with (
        ConsoleDriver(tmp_path / "s.sock") as driver,
        Path(match[1].decode()).open("r+b", buffering=0) as pty,
    ):
        driver.write(1, b"login: ")
        assert pty.read(100) == b"login: "
        pty.write(b"root\r")
        assert driver.read(0, 5) == b"root\r"
        end(process)


def test_sockets_for_the_terminal_and_for_ports(
    tmp_path: Path, start: Callable[..., Program]
) -> None:
    # One that nothing listens on is replaced.
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "tty"))
    process = start("--listen", "tty", "--port", "agent=a.sock", "--port", "log=l.sock")
    with ConsoleDriver(tmp_path / "s.sock", 3) as driver:
        driver.set_up(3)
        for index, name in ((1, "tty"), (5, "a.sock"), (7, "l.sock")):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(tmp_path / name))
                client.settimeout(20)
                if name != "tty":
                    assert driver.told()[1:] == (6, 1, b"")
                driver.write(index, name.encode())
                got = b""
                with contextlib.suppress(TimeoutError):
                    while name.encode() not in got:
                        driver.write(index, name.encode())
                        got += client.recv(100)
                assert name.encode() in got
            if name != "tty":
                assert driver.told()[1:] == (6, 0, b"")
        end(process)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "say one of --stdio, --pty and --listen SOCK"),
        (["--pty", "--listen", "tty"], "say one of"),
        (["--pty", "--size", "80"], "'80' is no size; say 80x25"),
        (["--pty", "--size", "80x99999"], "99999 rows are not in 0..65535"),
        (["--pty", "--port", "agent"], "say NAME=SOCK"),
        (["--pty", "--port", "a=x", "--port", "a=y"], "a is given twice"),
        (["--pty", "--port", "=x"], "port name ''"),
        (["--pty", "--port", "console=x"], "not all different"),
        (["--listen", "no/such/dir"], "cannot listen on no/such/dir"),
        (["--listen", "tty", "--port", "a=file"], "a file that is not a socket"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(
    tmp_path: Path, words: list[str], complaint: str
) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-m", "guestio", "console", *words, "--socket", "s.sock"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert complaint in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_command_in_the_background_leaves_the_terminal_alone(
    tmp_path: Path, terminal: Terminal
) -> None:
    code = (
        "import fcntl, os, subprocess, sys, termios\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "done = subprocess.run([sys.executable, '-m', 'guestio', 'console', '--stdio', '--socket',"
        " 's.sock'], stderr=2, process_group=0)\n"
        "sys.exit(done.returncode)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=terminal.slave,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd=tmp_path,
        timeout=60,
        check=False,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "--stdio needs the terminal, and runs in the background" in done.stderr
    assert termios.tcgetattr(terminal.slave) == terminal.before
