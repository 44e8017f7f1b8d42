"""A server command in a process of its own: ready, used, and ended by a signal in time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

from tests.kit.serving import promptly

ENDS_WITHIN = 2.0
"""Seconds that a command has to obey SIGTERM, whatever its guest does."""
STRICT = "GUESTIO_END_STRICT" in os.environ
"""Whether these are seconds of the clock, and not those in which the machine could work."""


class Command:
    """``guestio WORDS... --socket PATH``.

    Args:
        directory: For its socket and its log.
        words: The command and its arguments.
        terminal: The terminal that it controls.
        transport: What it speaks.
    """

    def __init__(
        self,
        directory: Path,
        *words: str,
        terminal: int | None = None,
        transport: str = "vhost-user",
    ) -> None:
        self.path = directory / f"{words[0]}.sock"
        self._log = directory / f"{words[0]}.log"

        def lead() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        with self._log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "guestio", *words),
                    *("--socket", self.path, "--transport", transport),
                ],
                stdin=subprocess.DEVNULL if terminal is None else terminal,
                stdout=terminal,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=None if terminal is None else lead,
            )

    @property
    def log(self) -> str:
        """What it has written to standard error."""
        return self._log.read_text()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while f"listening on {self.path}" not in self.log:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def end(self, *, in_use: bool = True) -> float:
        """End it by SIGTERM, in time and without a trace; the seconds that it took.

        Args:
            in_use: Its first front-end must still be there.
        """
        assert not in_use or not re.search("(front-end|client) 1 gone", self.log), self.log
        started = time.monotonic()
        with contextlib.nullcontext() if STRICT else promptly(ENDS_WITHIN):
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(60) == 0, self.log
        seconds = time.monotonic() - started
        assert not STRICT or seconds < ENDS_WITHIN, self.log
        assert not self.path.exists()
        assert "disconnected" not in self.log
        assert "Traceback" not in self.log
        return seconds

    @property
    def counts(self) -> dict[str, int]:
        """Its counters at the end."""
        said = self.log.split(" ended: ")[1]
        return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", said)}


@contextlib.contextmanager
def ready(*commands: Command) -> Iterator[None]:
    """Wait until all are ready; at the end none is left, and their logs are shown."""
    try:
        for each in commands:
            each.wait_until_ready()
        yield
    finally:
        for each in commands:
            each.process.kill()
            each.process.wait()
            print(f"--- {each.path.stem} ---\n{each.log}")
