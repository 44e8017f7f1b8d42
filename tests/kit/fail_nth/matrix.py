"""Which call fails and how, and what must hold afterwards.

`python -m tests.kit.fail_nth.matrix` runs all of it, which takes long; see `./run fail-nth`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tests.kit.fail_nth.case import Case
from tests.kit.fail_nth.client import ClientProcess
from tests.kit.fail_nth.script import (
    Contents,
    next_one_is_served,
    next_pci_one_is_served,
    whole_connection,
    whole_pci_connection,
)
from tests.kit.fail_nth.shim import CLIENT_ERRORS, ERRORS, Server, build, serving
from tests.kit.pci_disks import NvmeDisk, VirtioDisk

SERVED_WITHIN = 1.0
CLEAN_WITHIN = 20.0


@dataclass(frozen=True)
class Mode:
    """A way to serve a disk, and what uses it.

    Attributes:
        options: Of the command.
        command: Which one.
        whole: Connects, uses the disk in every way, and says what failed.
        following: Is another one that uses it; the seconds that took.
    """

    options: tuple[str, ...] = ()
    command: str = "blk"
    whole: Callable[[Path, Contents], list[str]] = whole_connection
    following: Callable[[Path, Contents], float] = next_one_is_served

    errors: ClassVar = ERRORS

    @contextlib.contextmanager
    def bench(self, library: Path, directory: Path) -> Iterator[Bench]:
        """A server in the shim whose calls fail one after the other, with an image of its own."""
        contents = Contents(directory / "disk.img")
        with self.serving(library, directory, contents.path) as server:
            yield Bench(server, contents, self)

    @contextlib.contextmanager
    def serving(self, library: Path, directory: Path, image: Path) -> Iterator[Server]:
        """A server in the shim."""
        with serving(library, directory, image, *self.options, command=self.command) as server:
            yield server


class ClientMode:
    """A client of vfio-user whose calls fail."""

    errors: ClassVar = CLIENT_ERRORS

    @contextlib.contextmanager
    def bench(self, library: Path, directory: Path) -> Iterator[ClientProcess]:
        """A client in the shim whose calls fail one after the other."""
        with ClientProcess(library, directory) as client:
            yield client


MODES: dict[str, Mode | ClientMode] = {
    "one thread": Mode(),
    "queue threads": Mode(("--queue-threads",)),
    "vfio-user": Mode(
        ("--transport", "vfio-user"),
        whole=functools.partial(whole_pci_connection, VirtioDisk),
        following=functools.partial(next_pci_one_is_served, VirtioDisk),
    ),
    "nvme": Mode(
        command="nvme",
        whole=functools.partial(whole_pci_connection, NvmeDisk),
        following=functools.partial(next_pci_one_is_served, NvmeDisk),
    ),
    "client": ClientMode(),
}


class Bench:
    """A server, warmed up, whose calls fail one after the other.

    Args:
        server: The server.
        contents: Of its image.
        mode: How it serves it.

    Attributes:
        calls: How often each function is called in a connection where nothing fails.
        log: The last lines that the server wrote.
    """

    def __init__(self, server: Server, contents: Contents, mode: Mode) -> None:
        self.server, self.contents, self.mode = server, contents, mode
        self.log = server.log
        self._own = server.footprint()[2]
        for _ in range(2):
            server.arm()
            failed = mode.whole(server.socket, contents)
            self._until_gone()
            self.calls, _ = server.disarm()
            assert not failed, (failed, *server.log)
        self._footprint = server.footprint()

    def _until_gone(self) -> None:
        """Wait until the back-end has let go of everything that a front-end shared."""
        deadline = time.monotonic() + CLEAN_WITHIN
        while self.server.footprint()[2] > self._own and time.monotonic() < deadline:
            time.sleep(0.002)

    def _same(self, now: tuple[int, int, int]) -> bool:
        """Whether nothing is left over. A thread that was ending may have been counted at first."""
        files, threads, shared = self._footprint
        return (now[0], now[2]) == (files, shared) and now[1] <= threads

    def run(self, case: Case) -> tuple[bool, float]:
        """Have one call fail during a connection, and see what is left of it.

        Returns:
            Whether there was such a call, and how long it took to serve the next front-end.

        Raises:
            AssertionError: Something is not as it must be.
        """
        server = self.server
        server.arm(case.function, case.nth, case.error)
        failed = self.mode.whole(server.socket, self.contents)
        self._until_gone()
        _, injected = server.disarm()
        assert server.status is None, f"{case}: it ended with {server.status}: {failed}"
        took = self.mode.following(server.socket, self.contents)
        deadline = time.monotonic() + CLEAN_WITHIN
        while not (same := self._same(now := server.footprint())) and time.monotonic() < deadline:
            time.sleep(0.005)
        assert same, (
            f"{case}: descriptors, threads, shared mappings are {now}, not {self._footprint}: "
            f"{failed} {server.descriptors()}"
        )
        self.contents.check_image()
        return injected, took


def cases(
    calls: dict[str, int],
    functions: Sequence[str],
    *,
    most: int | None = None,
    errors: Mapping[str, Sequence[int]] = ERRORS,
) -> Iterator[Case]:
    """Every call that a connection makes and every error, or so many calls spread over them.

    Args:
        calls: How often each function is called.
        functions: Those that are to fail.
        most: Calls of each function, for each of its errors; None for all of them.
        errors: What errors each may have.
    """
    for function in functions:
        # A connection in which something failed may make more calls than one in which nothing did.
        total = calls[function] + (2 if calls[function] else 0)
        for shift, error in enumerate(errors[function]):
            if most is None or total <= most:
                chosen = range(1, total + 1)
            else:
                chosen = range(
                    1 + shift * total // most // len(errors[function]), total + 1, -(-total // most)
                )
            for nth in chosen:
                yield Case(function, nth, error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the matrix; 1 if something is not as it must be."""
    parser = argparse.ArgumentParser(prog="fail-nth", description=__doc__)
    parser.add_argument("--only", action="append", help="a function that is to fail; repeatable")
    parser.add_argument("--mode", choices=MODES, action="append", help="how queues are served")
    parser.add_argument("--most", type=int, help="calls of a function per error, not all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after so long")
    given = parser.parse_args(arguments)
    until, bad, done = time.monotonic() + given.seconds, 0, 0
    slowest = (0.0, "")
    for name in given.mode or MODES:
        mode = MODES[name]
        functions = [each for each in given.only or mode.errors if each in mode.errors]
        if not given.only:
            functions.remove("python")
        with tempfile.TemporaryDirectory(prefix="guestio-fail-nth-") as made:
            directory = Path(made)
            library = build(directory)
            with mode.bench(library, directory) as bench:
                calls = bench.calls
            print(f"{name}: {calls}", flush=True)
            pending = list(cases(calls, functions, most=given.most, errors=mode.errors))
            while pending and time.monotonic() < until:
                log: Sequence[str] = ()
                try:
                    with mode.bench(library, directory) as bench:
                        log = bench.log
                        while pending and time.monotonic() < until:
                            case = pending.pop(0)
                            done += 1
                            _, took = bench.run(case)
                            slowest = max(slowest, (took, f"{name}: {case}"))
                            if took > SERVED_WITHIN:
                                print(f"SLOW {name}: {case}: {took:.1f} s", flush=True)
                except Exception as error:
                    bad += 1
                    print(f"BAD {name}: {case}: {type(error).__name__}: {error}", flush=True)
                    for line in itertools.islice(log, max(0, len(log) - 25), None):
                        print("    ", line, flush=True)
            if pending:
                print(f"{name}: {len(pending)} cases were not run", flush=True)
    print(f"{done} cases, {bad} bad; the next front-end waited at most {slowest}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
