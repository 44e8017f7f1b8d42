"""A long campaign of vfio-user messages and register accesses, against a model of mapped pages."""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time

from tests.kit.vfio_model import run_campaign

BATCHES = 400
"""Of one connection, each with about 25 messages; the next one begins with other choices."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="./run fuzz-dma",
        description="Send random messages of a vfio-user client, each of whose answers is known "
        "from a model of mapped pages, and compare all memory; until one is wrong.",
    )
    parser.add_argument("--messages", type=float, default=1e6, help="how many, such as 1e7 (1e6)")
    parser.add_argument("--seed", type=int, default=0, help="of the first connection (0)")
    parser.add_argument("--slow", action="store_true", help="all of it through Python")
    given = parser.parse_args()
    # Each refusal would be a line.
    logging.disable(logging.CRITICAL)
    sent, seed, said = 0, given.seed, time.monotonic()
    while sent < given.messages:
        try:
            sent += run_campaign(random.Random(seed), BATCHES, fast=not given.slow)
        except AssertionError as error:
            print(f"seed {seed}: {error}", file=sys.stderr)
            return 1
        seed += 1
        if time.monotonic() - said > 10:
            print(f"{sent:,} messages, {seed - given.seed} connections", flush=True)
            said = time.monotonic()
    print(f"{sent:,} messages in {seed - given.seed} connections: all as the model says")
    return 0


if __name__ == "__main__":
    sys.exit(main())
