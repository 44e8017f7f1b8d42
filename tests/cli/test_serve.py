"""``guestio serve``, ``guestio.serve`` and what all server commands have in common."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

import guestio
from guestio.cli import cli
from tests.kit.serving import PLATFORM, Driver, Mirror, promptly, until

ENDS_WITHIN = 2.0
SERVERS = ["blk", "console", "input", "net", "rng", "serve"]

DICE = '''
import atexit, os, sys, threading, time
from concurrent.futures import Future, ThreadPoolExecutor
from guestio.virtio import Device

class Dice(Device):
    """Answers with what it was made with."""

    device_id = 61

    def __init__(self, sides=6, text="", *, nested=None):
        self.said = repr((sides, text, nested)).encode()
        if sides == 0:
            raise RuntimeError("no sides\\nat all")

    def process(self, queue, chain):
        asked = chain.readable.read()
        if asked.startswith(b"HANG"):
            time.sleep(1000)
        if asked.startswith(b"FORGET"):
            return Future()
        if asked.startswith(b"EXIT"):
            raise SystemExit(7)
        chain.writable.write(self.said[:chain.writable.total])
        return min(len(self.said), chain.writable.total)

def loaded(**options):
    return Dice(sides=20)

def nothing():
    return "dice"

NUMBER = 4

class Sensor(Dice):
    def __init__(self, raised):
        self.raised = raised

    def attached(self, host):
        if self.raised == "OSError":
            open("/missing/sensor")
        raise __builtins__[self.raised]("no\\nsensor")

class Stubborn(Dice):
    def __init__(self, method):
        self.method = method
        if method == "__init__":
            self.hang("__init__")

    def attached(self, host):
        self.hang("attached")

    def close(self):
        self.hang("close")

    def hang(self, method):
        if method == self.method:
            print(method, file=sys.stderr, flush=True)
            while True:
                time.sleep(1000)

class Lingering(Dice):
    def __init__(self, what):
        if what == "thread":
            threading.Thread(target=time.sleep, args=(1000,)).start()
        elif what == "executor":
            ThreadPoolExecutor(1).submit(time.sleep, 1000)
        else:
            atexit.register(time.sleep, 1000)

class Unclosable(Dice):
    def close(self):
        raise ValueError("open for ever")
'''


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a module of a user's."""
    (tmp_path / "dice.py").write_text(DICE)
    (tmp_path / "broken.py").write_text("1 / 0")
    return tmp_path


class Program:
    """A program that serves a device at ``s.sock``, killed at the latest when the test ends."""

    def __init__(self, directory: Path, *words: str) -> None:
        self.path = directory / "s.sock"
        self.process = subprocess.Popen(
            [sys.executable, *words], stderr=subprocess.PIPE, text=True, cwd=directory
        )
        assert self.process.stderr is not None
        assert self.process.stderr.readline() == "listening on s.sock\n"

    def ask(self, driver: Driver, source: bytes = b"?") -> bytes:
        number = driver.submit(0, source, 63)
        driver.wait(0, number)
        _, written = driver.rings[0].used_entry(number)
        return driver.result(0, number, written)[1]

    def end(self, number: int = signal.SIGTERM, status: int = 0) -> str:
        with promptly(ENDS_WITHIN):
            self.process.send_signal(number)
            _, logged = self.process.communicate(timeout=60)
        assert self.process.returncode == status, logged
        assert not self.path.exists()
        return logged


@pytest.fixture
def start(directory: Path) -> Iterator[Callable[..., Program]]:
    """Start a program; ``start("dice:Dice", ...)`` is ``guestio serve`` with a socket."""
    programs: list[Program] = []

    def begin(*words: str) -> Program:
        if words[0] != "-c":
            words = ("-m", "guestio", "serve", *words, "--socket", "s.sock")
        programs.append(Program(directory, *words))
        return programs[-1]

    yield begin
    for each in programs:
        each.process.kill()
        each.process.communicate()


def refused(directory: Path, *words: str, status: int = 2) -> str:
    """What ``guestio`` says when it refuses its arguments."""
    done = subprocess.run(
        [sys.executable, "-m", "guestio", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=directory,
    )
    assert done.returncode == status, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("guestio: ")
    assert not (directory / "s.sock").exists()
    return done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_users_class_is_served_until_a_signal(start: Callable[..., Program], number: int) -> None:
    program = start("dice:Dice")
    with Driver(program.path) as driver:
        assert program.ask(driver) == b"(6, '', None)"
        logged = program.end(number)
    assert "dice:Dice ended: connections=1" in logged
    assert "requests=1 " in logged


def test_arguments_are_literals_or_text(start: Callable[..., Program]) -> None:
    program = start(
        *("dice:Dice", "--arg", "sides=0x10", "--arg", "text=a=b", "--arg", "nested=[1, 2]")
    )
    with Driver(program.path) as driver:
        assert program.ask(driver) == b"(16, 'a=b', [1, 2])"


def test_a_function_may_make_the_device_and_queues_be_counted(
    start: Callable[..., Program],
) -> None:
    program = start("dice:loaded", "--num-queues", "3", "--iommu", "off")
    with Driver(program.path, queues=3) as driver:
        assert program.ask(driver) == b"(20, '', None)"
        number = driver.submit(2, b"?", 63)
        driver.wait(2, number)
        assert not driver.features & PLATFORM
        assert not driver.frontend.offered & PLATFORM


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["dice"], "say MODULE:CLASS"),
        ([":Dice"], "say MODULE:CLASS"),
        (["dice.py:Dice"], "the module dice.py cannot be imported: ModuleNotFoundError"),
        (["absent:Dice"], "the module absent cannot be imported: ModuleNotFoundError"),
        (["broken:Dice"], "broken.py, line 1)"),
        (["dice:Nice"], "the module dice has no Nice"),
        (["dice:NUMBER"], "dice:NUMBER is int, neither a class nor a function"),
        (["dice:nothing"], "dice:nothing made 'dice', which is no guestio.virtio.Device"),
        (["dice:Dice", "--arg", "sides"], "say NAME=VALUE"),
        (["dice:Dice", "--arg", "1=2"], "say NAME=VALUE"),
        (["dice:Dice", "--arg", "sides=1", "--arg", "sides=2"], "sides is given twice"),
        (["dice:Dice", "--arg", "corners=2"], "unexpected keyword argument 'corners'"),
        (["dice:Dice", "--arg", "sides=0"], "cannot be made: RuntimeError: no sides at all"),
        (["dice:Dice", "--num-queues", "0"], "num-queues"),
        (["dice:Dice", "--stop-timeout", "nan"], "stop-timeout"),
        (["dice:Dice", "--stop-timeout", "-1"], "stop-timeout"),
        (["dice:Dice", "--miss-timeout", "0"], "miss-timeout"),
        (["dice:Dice", "--iommu", "maybe"], "maybe"),
        ([], "Missing argument"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(
    directory: Path, words: list[str], complaint: str
) -> None:
    assert complaint in refused(directory, "serve", *words, "--socket", "s.sock")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("KeyError", "KeyError: 'no\\nsensor'"),
        ("TypeError", "TypeError: no sensor"),
        ("OSError", "FileNotFoundError: [Errno 2] No such file or directory: '/missing/sensor'"),
    ],
)
def test_a_method_that_raises_at_the_start_is_one_line_and_status_1(
    directory: Path, raised: str, said: str
) -> None:
    words = ("serve", "dice:Sensor", "--arg", f"raised={raised}", "--socket", "s.sock")
    line = refused(directory, *words, status=1)
    assert line == f"guestio: dice:Sensor cannot be served: Sensor.attached raised {said}\n"


@pytest.mark.parametrize("name", SERVERS)
def test_every_server_has_the_common_options_and_shows_a_qemu_line(name: str) -> None:
    command = cli.commands[name]
    options = {
        option for each in command.params if isinstance(each, click.Option) for option in each.opts
    }
    assert {"--socket", "--iommu", "--stop-timeout", "--miss-timeout", "--poll-us"} <= options
    with click.Context(command, info_name=name) as context:
        text = command.get_help(context)
    for needed in (f"guestio {name} ", "qemu-system-x86_64", "share=on", "chardev=c0", "-append"):
        assert needed in text


@pytest.mark.parametrize("source", [b"HANG", b"FORGET"])
def test_a_device_that_does_not_answer_is_ended_in_time(
    start: Callable[..., Program], source: bytes
) -> None:
    program = start("dice:Dice")
    with Driver(program.path) as driver:
        driver.submit(0, source)
        until(lambda: driver.rings[0].offered == 1)
        time.sleep(0.1)
        program.end()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("method", ["__init__", "attached"])
def test_a_device_that_hangs_while_it_is_made_is_ended_in_time(
    directory: Path, method: str, number: int
) -> None:
    words = ("serve", "dice:Stubborn", "--arg", f"method={method}", "--socket", "s.sock")
    with subprocess.Popen(
        [sys.executable, "-m", "guestio", *words],
        stderr=subprocess.PIPE,
        text=True,
        cwd=directory,
    ) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == f"{method}\n"
            with promptly(ENDS_WITHIN):
                process.send_signal(number)
                _, logged = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert logged == "guestio: ended although a request or the device hangs\n"
    assert not (directory / "s.sock").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_device_whose_close_hangs_is_ended_in_time(
    start: Callable[..., Program], number: int
) -> None:
    program = start("dice:Stubborn", "--arg", "method=close")
    assert "the device hangs" in program.end(number)


@pytest.mark.parametrize("what", ["thread", "executor", "handler"])
def test_what_a_device_leaves_behind_does_not_keep_the_process(
    start: Callable[..., Program], what: str
) -> None:
    logged = start("dice:Lingering", "--arg", f"what={what}").end()
    assert "dice:Lingering ended: connections=0" in logged
    assert logged.endswith("threads of the device, or its exit handlers, go on\n")


def test_what_close_raises_is_logged(start: Callable[..., Program]) -> None:
    logged = start("dice:Unclosable").end()
    assert "Unclosable.close raised ValueError: open for ever" in logged
    assert "dice:Unclosable ended: connections=0" in logged


def test_a_device_that_exits_decides_the_status(start: Callable[..., Program]) -> None:
    program = start("dice:Dice")
    with Driver(program.path) as driver:
        driver.submit(0, b"EXIT")
        assert program.process.wait(20) == 7
    assert not program.path.exists()


SCRIPT = """
import signal, sys, threading
import guestio
from dice import Dice
before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
statistics = guestio.serve(Dice(**eval(sys.argv[1])), "s.sock", iommu="off")
assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
print(statistics.requests, "requests", file=sys.stderr)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_function_serves_until_a_signal_and_restores_what_it_changed(
    start: Callable[..., Program], number: int
) -> None:
    program = start("-c", SCRIPT, "{'sides': 4}")
    with Driver(program.path) as driver:
        assert program.ask(driver) == b"(4, '', None)"
        assert "1 requests" in program.end(number)


@pytest.mark.parametrize("source", [b"HANG", b"FORGET"])
def test_the_function_returns_although_the_device_does_not_answer(
    start: Callable[..., Program], source: bytes
) -> None:
    program = start("-c", SCRIPT, "{}")
    with Driver(program.path) as driver:
        driver.submit(0, source)
        time.sleep(0.1)
        logged = program.end()
    assert "1 requests" in logged or source == b"HANG"


def test_the_function_is_for_the_main_thread(tmp_path: Path) -> None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            guestio.serve(Mirror(), tmp_path / "s.sock")
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "main thread" in str(raised[0])
    assert not (tmp_path / "s.sock").exists()


def test_the_function_refuses_what_a_backend_refuses(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    with pytest.raises(TypeError, match="must be a guestio Device"):
        guestio.serve("device", tmp_path / "s.sock")  # type: ignore[arg-type]
    assert (signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)) == before


def test_a_recording_that_takes_long_to_finish_is_no_device_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends in time, and says what was not done."""
    code = (
        "import time, guestio.observe.recorder as recorder; from guestio.cli import main\n"
        "recorder.finish = lambda path: time.sleep(60)\n"
        "main()"
    )
    record = tmp_path / "run.parquet"
    words = ("rng", "--socket", str(tmp_path / "s.sock"), "--record", str(record))
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            assert "listening" in process.stderr.readline()
            with promptly(ENDS_WITHIN):
                process.send_signal(signal.SIGTERM)
                _, logged = process.communicate(timeout=60)
        finally:
            process.kill()
    assert "ended before the recording was a Parquet file" in logged
    assert "hangs" not in logged
    assert record.exists()
