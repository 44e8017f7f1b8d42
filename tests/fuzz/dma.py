"""A long campaign of vfio-user messages and register accesses, against a model of mapped pages."""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait

from tests.kit.vfio_model import run_campaign

BATCHES = 400
"""Of one connection, each with about 50 messages; the next one begins with other choices."""
SHOWN = 10.0
"""Seconds between lines that tell how far it is."""


def connection(seed: int, slow: bool) -> tuple[int, str]:
    """Drive one connection: how many messages were sent, and what was wrong, if anything was.

    In every second one an unmap waits until the device lets go of the memory; in the others what
    the device holds is cut off at once.
    """
    # Each refusal would be a line.
    logging.disable(logging.CRITICAL)
    try:
        waits = seed % 2 == 1
        return run_campaign(random.Random(seed), BATCHES, fast=not slow, waits=waits), ""
    except AssertionError as error:
        return 0, str(error) or "an assertion of the model failed"


def connections(first: int, processes: int, slow: bool) -> Iterator[tuple[int, int, str]]:
    """Drive one connection after the other, without end: seed, messages, what was wrong."""
    seeds = itertools.count(first)
    if processes == 1:
        for seed in seeds:
            yield seed, *connection(seed, slow)
    with ProcessPoolExecutor(processes) as pool:
        running: dict[Future[tuple[int, str]], int] = {}
        try:
            while True:
                while len(running) < 2 * processes:
                    seed = next(seeds)
                    running[pool.submit(connection, seed, slow)] = seed
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for each in sorted(done, key=running.__getitem__):
                    yield running.pop(each), *each.result()
        finally:
            pool.shutdown(cancel_futures=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="./run fuzz-dma",
        description="Send random messages of a vfio-user client, each of whose answers is known "
        "from a model of mapped pages, and compare all memory; until one is wrong.",
    )
    parser.add_argument("--messages", type=float, default=1e6, help="how many, such as 1e7 (1e6)")
    parser.add_argument("--seed", type=int, default=0, help="of the first connection (0)")
    parser.add_argument(
        "--processes", type=int, default=1, help="connections at a time, with seeds of their own"
    )
    parser.add_argument("--slow", action="store_true", help="all of it through Python")
    given = parser.parse_args()
    if given.processes < 1:
        parser.error("--processes must be at least 1")
    began = said = time.monotonic()
    sent = count = 0
    for seed, messages, wrong in connections(given.seed, given.processes, given.slow):
        if wrong:
            again = f"--seed {seed} --messages 1" + " --slow" * given.slow
            print(f"seed {seed}: {wrong}\nagain: ./run fuzz-dma {again}", file=sys.stderr)
            return 1
        sent, count = sent + messages, count + 1
        if sent >= given.messages:
            break
        now = time.monotonic()
        if now - said > SHOWN:
            print(f"{sent:,} messages, {count} connections, {now - began:.0f} s", flush=True)
            said = now
    took = time.monotonic() - began
    print(f"{sent:,} messages in {count} connections, {took:.0f} s: all as the model says")
    return 0


if __name__ == "__main__":
    sys.exit(main())
