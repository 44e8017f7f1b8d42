"""``--sandbox``: what a device tries is refused and seen to fail; all else works as before."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import guestio
from guestio.sandbox import landlock
from guestio.virtio import EntropyDevice
from tests.kit.serving import Driver, until

INTRUDER = '''
import ctypes, os, socket, subprocess, sys, threading
from pathlib import Path
from guestio.virtio import Device

HERE = Path(__file__).parent

def ptrace():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(16, os.getppid(), None, None):
        raise OSError(ctypes.get_errno(), "ptrace")

ATTEMPTS = {
    "read": lambda: open("/etc/passwd"),
    "list": lambda: os.listdir("/"),
    "write": lambda: open("/dev/shm/guestio-intruder", "w"),
    "beside": lambda: (HERE / "taken").write_text("mine"),
    "remove": lambda: os.unlink(HERE / "s.sock"),
    "rename": lambda: os.rename(HERE / "s.sock", HERE / "t.sock"),
    "tcp": lambda: socket.create_connection(("127.0.0.1", 9)),
    "unix": lambda: socket.socket(socket.AF_UNIX),
    "datagrams": lambda: socket.socketpair(type=socket.SOCK_DGRAM),
    "exec": lambda: os.execv(sys.executable, [sys.executable, "-c", ""]),
    "run": lambda: subprocess.run([sys.executable, "-c", ""]),
    "fork": os.fork,
    "ptrace": ptrace,
    "kill": lambda: os.kill(os.getppid(), 0),
}

def thread():
    done = []
    each = threading.Thread(target=lambda: done.append(os.getpid()))
    each.start()
    each.join()
    return done[0]

USES = {
    "module": lambda: __import__("wave").__name__,
    "memory": lambda: os.memfd_create("own"),
    "random": lambda: len(os.urandom(8)),
    "thread": thread,
    "pair": lambda: socket.socketpair()[0].fileno(),
    "signal": lambda: os.kill(os.getpid(), 0),
}

class Intruder(Device):
    """Does what it is asked for."""

    device_id = 61

    def process(self, queue, chain):
        asked = chain.readable.read().decode()
        if asked in ATTEMPTS:
            ATTEMPTS[asked]()
        else:
            USES[asked]()
        chain.writable.write(b"done")
        return 4
'''
ATTEMPTS = [
    *("read", "list", "write", "beside", "remove", "rename", "tcp", "unix", "datagrams", "exec"),
    *("run", "fork", "ptrace", "kill"),
]
READING = {"read", "list"}
"""What landlock alone refuses."""
USES = ["module", "memory", "random", "thread", "pair", "signal"]
REFUSED = set(ATTEMPTS) - (set() if landlock.version() else READING)


class Server:
    """``guestio WORDS...`` listening at ``s.sock``."""

    def __init__(self, directory: Path, *words: str, environment: dict[str, str] | None = None):
        self.path = directory / "s.sock"
        self._log = directory / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *words], stderr=log, cwd=directory, env=environment
            )
        until(lambda: "listening on s.sock\n" in self.log or self.process.poll() is not None)
        assert self.process.poll() is None, self.log

    @property
    def log(self) -> str:
        return self._log.read_text()

    def statuses(self) -> list[dict[str, str]]:
        """What the kernel says of each of its threads."""
        return [
            dict(line.split(":\t", 1) for line in (each / "status").read_text().splitlines())
            for each in Path(f"/proc/{self.process.pid}/task").iterdir()
        ]

    def end(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0, self.log
        assert not self.path.exists()
        return self.log


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    """Start a server in a directory that has the module ``intruder``."""
    (tmp_path / "intruder.py").write_text(INTRUDER)
    with ExitStack() as stack:

        def begin(*words: str, **options: dict[str, str]) -> Server:
            server = Server(tmp_path, *words, **options)
            stack.callback(server.process.wait)
            stack.callback(server.process.kill)
            return server

        yield begin


SERVE = ("-m", "guestio", "serve", "intruder:Intruder", "--socket", "s.sock")


def tried(driver: Driver, what: str) -> bytes:
    """What an attempt is answered with; empty if it failed."""
    number = driver.submit(0, what.encode(), 63)
    driver.wait(0, number)
    return driver.result(0, number, driver.rings[0].used_entry(number)[1])[1]


def test_a_device_that_tries_is_refused_and_the_next_client_served(start, tmp_path: Path) -> None:
    server = start(*SERVE, "--record", "r.parquet")
    with Driver(server.path) as driver:
        for what in ATTEMPTS:
            assert bool(tried(driver, what)) == (what not in REFUSED), what
    assert server.log.count("Intruder.process raised PermissionError") >= 8, server.log
    with Driver(server.path) as driver:
        for what in USES:
            assert tried(driver, what) == b"done", what
    assert server.process.poll() is None
    log = server.end()
    assert "guestio: the sandbox" not in log
    assert not (tmp_path / "taken").exists()
    assert not Path("/dev/shm/guestio-intruder").exists()
    # Where the main thread still makes files, for the recording, the device did not.
    assert (tmp_path / "r.parquet").exists()


def test_off_lets_it(start) -> None:
    server = start(*SERVE, "--sandbox", "off")
    with Driver(server.path) as driver:
        assert tried(driver, "read") == b"done"
        assert tried(driver, "unix") == b"done"
        assert tried(driver, "run") == b"done"
    assert all(each["NoNewPrivs"] == "0" for each in server.statuses())
    server.end()


@pytest.mark.parametrize(
    "words",
    [
        ("blk", "disk.img", "--socket", "s.sock"),
        ("console", "--listen", "t.sock", "--socket", "s.sock"),
        ("input", "keyboard", "--socket", "s.sock"),
        ("net", "--responder", "10.0.2.1/24", "--socket", "s.sock"),
        ("nvme", "disk.img", "--socket", "s.sock"),
        ("rng", "--socket", "s.sock"),
        ("proxy", "--listen", "s.sock", "--connect", "b.sock"),
    ],
    ids=lambda words: words[0],
)
def test_every_server_command_drops_what_it_does_not_need(words, start, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    server = start("-m", "guestio", *words, "--control", "c.sock")
    for each in server.statuses():
        assert (each["NoNewPrivs"], each["Seccomp"]) == ("1", "2"), each["Name"]
    # Threads that were there before keep their capabilities, which the filter leaves no use for.
    assert int(next(e for e in server.statuses() if e["Pid"] == e["Tgid"])["CapEff"], 16) == 0
    server.end()
    assert not list(tmp_path.glob("*.sock"))


def test_a_missing_library_is_named_once_and_landlock_still_holds(start, tmp_path: Path) -> None:
    for name in ("seccomp", "pyseccomp"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError(\"No module named '{name}'\")")
    server = start(*SERVE)
    with Driver(server.path) as driver:
        assert tried(driver, "unix") == b"done"
        assert bool(tried(driver, "read")) == ("read" not in REFUSED)
        assert bool(tried(driver, "beside")) == (not landlock.version())
    said = "guestio: the sandbox has no system call filter: No module named 'pyseccomp' (pip "
    assert server.end().count(said) == 1


def test_a_kernel_without_landlock_is_no_reason_to_complain() -> None:
    done = run(
        """
        from guestio.sandbox import Sandbox, landlock
        landlock.version = lambda: 0
        logging.basicConfig(level=logging.DEBUG)
        box = Sandbox()
        box.enter()
        box.enter_device_thread()
        assert not box.notes, box.notes
        open("/etc/passwd").close()
        refused(lambda: open("/dev/shm/guestio-test", "w"))
        refused(lambda: socket.socket())
        """
    )
    assert "DEBUG:guestio.sandbox:the sandbox does without landlock: the kernel has none" in done


def test_threads_from_before_cannot_start_programs_either() -> None:
    run(
        """
        from guestio.sandbox import Sandbox
        go, said = threading.Event(), []
        def work():
            go.wait()
            try:
                os.fork()
            except PermissionError as error:
                said.append(error)
        early = threading.Thread(target=work)
        early.start()
        Sandbox().enter()
        go.set()
        early.join()
        assert said
        """
    )


def test_a_recording_is_finished_inside(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    run(
        """
        from guestio.observe import Recorder, open_recording
        from guestio.sandbox import Sandbox
        from guestio.vhost_user import Backend
        from guestio.virtio import EntropyDevice
        device = EntropyDevice()
        with Backend(device, "s.sock") as backend:
            recorder = Recorder(backend, "made/r.parquet")
            Sandbox(records="made/r.parquet", removes=["s.sock"]).enter()
            recorder.close()
        device.close()
        assert open("made/r.parquet", "rb").read().endswith(b"PAR1")
        assert os.listdir("made") == ["r.parquet"]
        refused(lambda: open("beside", "w"))
        open("made/another", "w").close()
        """,
        tmp_path,
    )
    assert not (tmp_path / "s.sock").exists()


def run(code: str, directory: Path | None = None) -> str:
    """Run some Python in a process of its own; what it has logged."""
    head = """
import logging, os, socket, sys, threading
def refused(call):
    try:
        call()
    except PermissionError:
        return
    sys.exit("it was not refused")
"""
    lines = [line.removeprefix(8 * " ") for line in code.splitlines()]
    done = subprocess.run(
        [sys.executable, "-c", head + "\n".join(lines)],
        capture_output=True,
        text=True,
        cwd=directory,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


PROGRAM = """
import guestio, sys
from intruder import Intruder
guestio.serve(Intruder(), "s.sock", sandbox=sys.argv[1])
try:
    open("after", "w")
except PermissionError:
    print("refused after it", file=sys.stderr)
"""


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_a_program_may_ask_for_it(mode: str, start) -> None:
    server = start("-c", PROGRAM, mode)
    with Driver(server.path) as driver:
        assert bool(tried(driver, "unix")) == (mode == "off")
    assert ("refused after it" in server.end()) == (mode == "auto")


def test_a_mode_that_is_none_is_refused(tmp_path: Path) -> None:
    with (
        contextlib.closing(EntropyDevice()) as device,
        pytest.raises(ValueError, match="neither 'auto' nor 'off'"),
    ):
        guestio.serve(device, tmp_path / "s.sock", sandbox="on")
