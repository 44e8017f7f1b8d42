"""A disk in a process of its own, for the fuzzer: right, but for what it is told to be wrong in.

python fuzz_victim.py SOCKET [--die-at CODE[,CODE]] [--pid FILE] [--fault FAULT]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

VICTIM = Path(__file__)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("--die-at", default="")
    parser.add_argument("--pid")
    parser.add_argument("--fault", action="append", default=[])
    options = parser.parse_args()
    sys.path.insert(0, str(VICTIM.parents[2]))
    from tests.kit.broken_backend import BrokenBackend

    if options.pid:
        Path(options.pid).write_text(str(os.getpid()))
    deadly = {int(code) for code in options.die_at.split(",") if code}

    class Victim(BrokenBackend):
        def handle(self, code: int, flags: int, payload: bytes, fds: list[int]) -> None:
            if code in deadly:
                print(f"dying at {code}", file=sys.stderr, flush=True)
                os._exit(3)
            super().handle(code, flags, payload, fds)

    Victim(options.socket, *options.fault).serve()


if __name__ == "__main__":
    main()
