"""Which call fails and how, and what must hold afterwards.

`python -m tests.vhost_user.fail_nth.matrix` runs all of it, which takes long; see `./run fail-nth`.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.vhost_user.fail_nth.script import Contents, next_one_is_served, whole_connection
from tests.vhost_user.fail_nth.shim import ERRORS, SIGTERM, Server, build, serving

SERVED_WITHIN = 1.0
CLEAN_WITHIN = 5.0
MODES = {"one thread": (), "queue threads": ("--queue-threads",)}


@dataclass(frozen=True)
class Case:
    """The nth call of a function fails with an error.

    Attributes:
        function: Its name in the shim.
        nth: Which call, from 1.
        error: Number of the error.
    """

    function: str
    nth: int
    error: int

    def __str__(self) -> str:
        name = "SIGTERM" if self.error == SIGTERM else errno.errorcode[self.error]
        return f"{self.function} {self.nth} {name}"


class Bench:
    """A server, warmed up, whose calls fail one after the other.

    Args:
        server: The server.
        contents: Of its image.

    Attributes:
        calls: How often each function is called in a connection where nothing fails.
    """

    def __init__(self, server: Server, contents: Contents) -> None:
        self.server, self.contents = server, contents
        for _ in range(2):
            server.arm()
            failed = whole_connection(server.socket, contents)
            self._until_gone()
            self.calls, _ = server.disarm()
            assert not failed, (failed, *server.log)
        self._footprint = server.footprint()

    def _until_gone(self) -> None:
        """Wait until the back-end has let go of everything that a front-end shared."""
        deadline = time.monotonic() + CLEAN_WITHIN
        while self.server.footprint()[2] and time.monotonic() < deadline:
            time.sleep(0.002)

    def run(self, case: Case) -> tuple[bool, float]:
        """Have one call fail during a connection, and see what is left of it.

        Returns:
            Whether there was such a call, and how long it took to serve the next front-end.

        Raises:
            AssertionError: Something is not as it must be.
        """
        server = self.server
        server.arm(case.function, case.nth, case.error)
        failed = whole_connection(server.socket, self.contents)
        self._until_gone()
        _, injected = server.disarm()
        assert server.status is None, f"{case}: it ended with {server.status}: {failed}"
        took = next_one_is_served(server.socket, self.contents)
        deadline = time.monotonic() + CLEAN_WITHIN
        while (now := server.footprint()) != self._footprint and time.monotonic() < deadline:
            time.sleep(0.005)
        assert now == self._footprint, (
            f"{case}: descriptors, threads, shared mappings are {now}, not {self._footprint}: "
            f"{failed} {server.descriptors()}"
        )
        self.contents.check_image()
        return injected, took


def cases(
    calls: dict[str, int], functions: Sequence[str], *, most: int | None = None
) -> Iterator[Case]:
    """Every call that a connection makes and every error, or so many calls spread over them.

    Args:
        calls: How often each function is called.
        functions: Those that are to fail.
        most: Calls of each function, for each of its errors; None for all of them.
    """
    for function in functions:
        # A connection in which something failed may make more calls than one in which nothing did.
        total = calls[function] + (2 if calls[function] else 0)
        for shift, error in enumerate(ERRORS[function]):
            if most is None or total <= most:
                chosen = range(1, total + 1)
            else:
                chosen = range(
                    1 + shift * total // most // len(ERRORS[function]), total + 1, -(-total // most)
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
    functions = given.only or [name for name in ERRORS if name != "python"]
    until, bad, done = time.monotonic() + given.seconds, 0, 0
    slowest = (0.0, "")
    for mode in given.mode or MODES:
        with tempfile.TemporaryDirectory(prefix="guestio-fail-nth-") as name:
            directory = Path(name)
            library = build(directory)
            contents = Contents(directory / "disk.img")
            with serving(library, directory, contents.path, *MODES[mode]) as server:
                calls = Bench(server, contents).calls
            print(f"{mode}: {calls}", flush=True)
            pending = list(cases(calls, functions, most=given.most))
            while pending and time.monotonic() < until:
                contents = Contents(directory / "disk.img")
                try:
                    with serving(library, directory, contents.path, *MODES[mode]) as server:
                        bench = Bench(server, contents)
                        while pending and time.monotonic() < until:
                            case = pending.pop(0)
                            done += 1
                            _, took = bench.run(case)
                            slowest = max(slowest, (took, f"{mode}: {case}"))
                            if took > SERVED_WITHIN:
                                print(f"SLOW {mode}: {case}: {took:.1f} s", flush=True)
                except Exception as error:
                    bad += 1
                    print(f"BAD {mode}: {case}: {type(error).__name__}: {error}", flush=True)
                    for line in itertools.islice(server.log, max(0, len(server.log) - 25), None):
                        print("    ", line, flush=True)
                    server.close()
            if pending:
                print(f"{mode}: {len(pending)} cases were not run", flush=True)
    print(f"{done} cases, {bad} bad; the next front-end waited at most {slowest}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
