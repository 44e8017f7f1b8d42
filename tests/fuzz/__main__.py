"""Coverage-guided fuzzing of the compiled core; `./run fuzz` builds what it needs."""

from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import sys
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).parent
TARGETS = {
    "intervals": "an interval map against a model, changed in any order",
    "ring": "a virtqueue that its driver fills with anything",
    "iotlb": "runs of vhost-user's IOTLB messages, against one at a time",
    "session": "vhost-user messages of a lying front-end",
    "virtio_iommu": "requests to a virtio-iommu, against a model",
    "vfio_user": "messages of a vfio-user client, against a model of mapped pages",
    "nvme": "registers, doorbells, queues and commands of an NVMe controller",
}
SEEDS = 10
OPTIONS = (
    # By the clock, not by time of the processor: a busy machine must not make a finding.
    *("-timeout=120", "-rss_limit_mb=8192", "-detect_leaks=0", "-handle_bus=0", "-max_len=1024"),
    *("-print_final_stats=1", "-reload=0", "-len_control=0"),
)


def arguments() -> argparse.Namespace:
    listing = "".join(f"\n  {name:14}{text}" for name, text in TARGETS.items())
    parser = argparse.ArgumentParser(
        prog="./run fuzz",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Drive a target with inputs that reach new code, until one fails.\n\n"
        f"targets:{listing}\n\n"
        "New inputs go to build/fuzz/TARGET/found, those that fail to build/fuzz/TARGET.",
    )
    parser.add_argument("target", choices=TARGETS, metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=60, help="how long (60)")
    parser.add_argument(
        "--minimize",
        action="store_true",
        help="instead, replace the corpus in the repository by the fewest of all inputs known "
        "that reach as much",
    )
    parser.add_argument("inputs", nargs="*", type=Path, help="instead, run these inputs once each")
    parser.add_argument("--raw", action="store_true", help=argparse.SUPPRESS)
    return parser


def again(work: Path, target: str) -> Path:
    """A program that starts this one again: so libFuzzer goes on after an input that fails."""
    script = work / "again"
    preload = shlex.quote(f"LD_PRELOAD={os.environ.get('GUESTIO_FUZZ_PRELOAD', '')}")
    script.write_text(
        f"#!/bin/sh\nexec env {preload} {shlex.quote(sys.executable)} -m tests.fuzz {target} "
        '--raw -- "$@"\n'
    )
    script.chmod(0o755)
    return script


def main() -> None:
    parser = arguments()
    given, raw = parser.parse_known_args()
    if raw and not given.raw:
        parser.error(f"unrecognized arguments: {' '.join(raw)}")
    work = Path("build/fuzz") / given.target
    corpus, found = HERE / "corpus" / given.target, work / "found"
    for directory in (corpus, found):
        directory.mkdir(parents=True, exist_ok=True)
    for seed in range(SEEDS):
        # Long sequences from the beginning on: short ones grow slowly.
        (found / f"seed-{seed}").write_bytes(random.Random(seed).randbytes(64 << seed % 5))
    start = [str(again(work, given.target)), *OPTIONS, f"-artifact_prefix={work}/"]
    # Programs that are started from here have nothing to do with libFuzzer.
    os.environ.pop("LD_PRELOAD", None)
    import libfuzzer  # type: ignore[import-not-found]

    fuzz = import_module(f"tests.fuzz.{given.target}").fuzz
    if given.raw:
        libfuzzer.fuzz(fuzz, [start[0], *sys.argv[sys.argv.index("--") + 1 :]])
    elif given.inputs:
        libfuzzer.fuzz(fuzz, [*start, *map(str, given.inputs)])
    elif given.minimize:
        fewest = work / "fewest"
        shutil.rmtree(fewest, ignore_errors=True)
        fewest.mkdir()
        print(f"when done: rm -r {corpus} && mv {fewest} {corpus}", flush=True)
        libfuzzer.fuzz(fuzz, [*start, "-set_cover_merge=1", *map(str, (fewest, corpus, found))])
    else:
        limit = f"-max_total_time={given.seconds}"
        libfuzzer.fuzz(fuzz, [*start, limit, str(found), str(corpus)])


if __name__ == "__main__":
    main()
