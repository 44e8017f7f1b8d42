"""The other direction: a device lies to a front-end and to the driver of its guest.

A case is a few rules of :mod:`guestio.faults.misbehavior.rules`, made of a seed. `guestio` serves a
device that obeys them, a given command starts the guest, and the guest is judged by what it prints
and by how it ends.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from guestio.budgets import FUZZ_LINE_BYTES, FUZZ_STDERR_LINES
from guestio.errors import DeviceError
from guestio.faults.fuzz.outcomes import Outcome, Verdict, reduce_case
from guestio.faults.fuzz.steps import FORMAT, Case, Step
from guestio.faults.misbehavior.requests import OPS
from guestio.faults.misbehavior.rules import MISBEHAVIORS, Level, Misbehavior, parse
from guestio.faults.report import printable
from guestio.vhost_user.messages import FrontendRequest
from guestio.virtio.device import DeviceId

BAD: Final = (
    r"Kernel panic|Oops|BUG:|general protection fault|KASAN|UBSAN|unable to handle|stack segment"
    r"|Segmentation fault|Assertion .* failed|AddressSanitizer|double free|corrupted"
)
"""What a guest or a VMM prints that is a crash."""
_START: Final = 120.0
"""Seconds that the device may take until it listens."""
_TICK: Final = 0.1
_DISK: Final = 8 << 20
_LEVELS: Final = (Level.DEVICE, Level.RING, Level.CONFIG, Level.WIRE)
_IDS: Final = {
    "blk": DeviceId.BLOCK,
    "net": DeviceId.NET,
    "console": DeviceId.CONSOLE,
    "rng": DeviceId.ENTROPY,
    "input": DeviceId.INPUT,
}
SERVED: Final[dict[str, tuple[str, ...]]] = {
    "blk": ("blk", "{directory}/disk.img"),
    "net": ("net", "--responder", "10.0.2.1/24"),
    "console": ("console", "--stdio"),
    "rng": ("rng",),
    "input": ("input", "keyboard", "--script", "{directory}/keys"),
}
"""Words of `guestio` that serve each type of device, unless others are given."""


@dataclass(frozen=True, slots=True)
class Guests:
    """What a worker must know to start guests, and to judge them.

    Attributes:
        device: Type of the device that lies.
        command: Words that start the front-end; ``{socket}`` and ``{directory}`` in them are the
            place of the case.
        served: Words of `guestio` that serve the device; without rules and socket.
        healthy: Regular expression of what a guest prints that has come through; empty for one
            that ends with status 0.
        alive: Regular expression of what a living guest prints again and again; empty for nothing.
        bad: Regular expression of what is a crash.
        patience: Seconds for which ``alive`` may not be printed, once it was.
        limit: Seconds that a guest may take in all.
        socket: Where the device listens; None for a place of the worker's own.
    """

    device: str
    command: tuple[str, ...]
    served: tuple[str, ...]
    healthy: str
    alive: str = ""
    bad: str = BAD
    patience: float = 30.0
    limit: float = 120.0
    socket: str | None = None

    def make_case(self, seed: int) -> Case:
        """The rules of a seed; the same for ever, for this device and format."""
        # Not for secrets: the point is that it can be repeated.
        dice = random.Random(f"guestio-fuzz-rules:{FORMAT}:{self.device}:{seed}")  # noqa: S311
        count = dice.choice((1, 1, 1, 2, 2, 3))
        return Case(
            self.device,
            seed,
            tuple(Step("rule", {"rule": make_rule(dice, self.device)}) for _ in range(count)),
        )

    def bench(self) -> GuestBench:
        """What plays cases."""
        return GuestBench(self)


def make_rule(dice: random.Random, device: str) -> str:
    """A rule that a device of this type can obey, at random."""
    choice = [
        each
        for each in MISBEHAVIORS.values()
        # Over vhost-user there is no generation.
        if each.level in _LEVELS and each.name != "generation-stuck"
    ]
    what = dice.choice(choice)
    words = [what.name + _value(dice, what)]
    if "op" in what.selectors and dice.random() < 0.5:
        if what.level is Level.WIRE:
            names: Sequence[str] = [each.name for each in FrontendRequest]
        else:
            names = OPS[_IDS[device]]
        words.append(f"op={dice.choice(names)}")
    match dice.randrange(6):
        case 0:
            words.append(f"nth={dice.choice((1, 2, 3, 5, 20))}")
        case 1:
            words.append(f"every={dice.choice((2, 3, 5, 20))}")
        case 2:
            words.append(f"after={dice.choice((1, 5, 50))}")
        case 3:
            words += [f"p={dice.choice((0.5, 0.1, 0.02))}", f"seed={dice.randrange(1000)}"]
        case _:
            pass
    if dice.random() < 0.3:
        words.append(dice.choice(("once", "for=3", "for=20")))
    return parse(" ".join(words)).text


def _value(dice: random.Random, what: Misbehavior) -> str:
    if what.value is None or (not what.required and dice.random() < 0.4):
        return ""
    match what.value.what:
        case "a time":
            return f"={dice.choice(('1ms', '20ms', '300ms', '2s'))}"
        case "a status byte":
            return f"={dice.choice((1, 2, 3, 255))}"
        case "bits":
            return f"={dice.choice(('0x01', '0x04', '0x40', '0x80', '0xff'))}"
        case "a bit":
            return f"={dice.choice((*range(24), 28, 29, 32, 33, 34, 35, 38, 41, 63))}"
        case "entries":
            return f"={dice.choice((1, 2, 100, 255, 256, 300, 32768, 65535))}"
        case "bytes":
            return f"={dice.choice((1, 4, 8, 512, 4096))}"
        case _:
            return f"={dice.choice((0, 1, 3, 64, 128, 255, 256, 4096, 65535, 2**31, 2**32 - 1))}"


class GuestBench:
    """Plays cases to guests, one after the other. For one thread.

    Args:
        work: What starts them, and judges them.
    """

    def __init__(self, work: Guests) -> None:
        self.work = work
        self._healthy = re.compile(work.healthy) if work.healthy else None
        self._alive = re.compile(work.alive) if work.alive else None
        self._bad = re.compile(work.bad)

    def close(self) -> None:
        """Nothing lives longer than a case."""

    def play(self, case: Case) -> Outcome:
        """Boot a guest whose device obeys the rules of a case, and judge it.

        Raises:
            DeviceError: The device or the guest cannot be started.
        """
        rules = [str(step.arguments["rule"]) for step in case.steps if step.name == "rule"]
        with tempfile.TemporaryDirectory(prefix="guestio-fuzz-") as directory:
            socket = self.work.socket or f"{directory}/fuzz.sock"
            with self._device(rules, directory, socket) as device:
                verdict, reason, lines = self._guest(directory, socket)
                if device.poll() is not None:
                    said = Path(directory, "device.log").read_text("utf-8", "replace")
                    lines = [*lines, *said.splitlines()[-5:]]
                    verdict = Verdict.WRONG
                    reason = f"guestio itself ended with status {device.returncode}"
        kept = tuple(printable(line[:300]) for line in lines[-FUZZ_STDERR_LINES:])
        return Outcome(
            case.seed, verdict, printable(reason), stderr=kept if verdict is not Verdict.OK else ()
        )

    def examine(self, case: Case) -> Outcome:
        """Play a case; again, if something is found.

        Raises:
            DeviceError: As :meth:`play`.
        """
        return self.play(case).confirmed(lambda: self.play(case))

    def minimize(self, case: Case, kind: str) -> Case:
        """Leave out rules for as long as the guest still fails in the same way.

        Raises:
            DeviceError: As :meth:`play`.
        """
        return reduce_case(case, lambda fewer: self.play(fewer).kind == kind)

    @contextlib.contextmanager
    def _device(
        self, rules: Sequence[str], directory: str, socket: str
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A device that obeys rules."""
        with Path(directory, "disk.img").open("wb") as image:
            image.truncate(_DISK)
        Path(directory, "keys").write_text("+0.05 KEY_A\n" * 4000, encoding="ascii")
        words = [word.replace("{directory}", directory) for word in self.work.served]
        for rule in rules:
            words += ["--fault", rule]
        log = Path(directory, "device.log")
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "guestio", *words, "--socket", socket],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
        try:
            deadline = time.monotonic() + _START
            while "listening on" not in (said := log.read_text("utf-8", "replace")):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise DeviceError(f"guestio {' '.join(words)} does not start: {said[-300:]}")
                time.sleep(_TICK / 4)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()

    def _guest(self, directory: str, socket: str) -> tuple[Verdict, str, list[str]]:
        """Start a guest, look at it until it is judged, and end it."""
        command = [
            word.replace("{socket}", socket).replace("{directory}", directory)
            for word in self.work.command
        ]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise DeviceError(f"cannot start {command[0]}: {error.strerror}") from error
        lines: list[str] = []
        try:
            assert process.stdout is not None
            with process.stdout as output:
                verdict, reason = self._watch(process, output, lines)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return verdict, reason, lines

    def _watch(
        self, process: subprocess.Popen[bytes], output: IO[bytes], lines: list[str]
    ) -> tuple[Verdict, str]:
        deadline = time.monotonic() + self.work.limit
        alive_at: float | None = None
        for line in _lines_of(output):
            now = time.monotonic()
            if line:
                lines.append(line)
                del lines[:-200]
                if self._bad.search(line):
                    return Verdict.CRASH, re.sub(r"^\[[^\]]*\] *", "", line).strip()[:200]
                if self._healthy is not None and self._healthy.search(line):
                    return Verdict.OK, ""
                if self._alive is not None and self._alive.search(line):
                    alive_at = now
            if alive_at is not None and now > alive_at + self.work.patience:
                return Verdict.WEDGED, f"prints nothing of {self.work.alive!r} any more"
            if now > deadline:
                break
        else:
            return self._ended(process, deadline)
        what = f"did not print {self.work.healthy!r}" if self.work.healthy else "did not end"
        return Verdict.WEDGED, f"{what} within {self.work.limit:g} s"

    def _ended(self, process: subprocess.Popen[bytes], deadline: float) -> tuple[Verdict, str]:
        """What is to be thought of a guest whose output has ended."""
        try:
            status = process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            return Verdict.WEDGED, "closed its output, and did not end"
        if status < 0:
            return Verdict.CRASH, f"killed by {signal.Signals(-status).name}"
        if status:
            return Verdict.CRASH, f"ended with status {status}"
        if self._healthy is not None:
            return Verdict.WEDGED, f"ended without printing {self.work.healthy!r}"
        return Verdict.OK, ""


def _lines_of(stream: IO[bytes]) -> Iterator[str]:
    """Lines as they come, and an empty one now and then while none does; ends with the stream."""
    os.set_blocking(stream.fileno(), False)
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if not selector.select(_TICK):
                yield ""
                continue
            try:
                data = os.read(stream.fileno(), 1 << 16)
            except BlockingIOError:
                continue
            if not data:
                if rest:
                    yield rest.decode("utf-8", "replace")
                return
            *whole, rest = (rest + data).split(b"\n")
            if len(rest) > FUZZ_LINE_BYTES:
                whole.append(rest)
                rest = b""
            for each in whole:
                yield each.decode("utf-8", "replace").rstrip("\r") or " "
