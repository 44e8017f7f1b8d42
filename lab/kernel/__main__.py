"""Build the lab's iommufd kernel and print where it is."""

import argparse
import sys
import time

from lab.kernel import build
from lab.parts import PartsError


def main() -> int:
    """See `python -m lab.kernel --help`."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.kernel",
        description="Build the kernel with iommufd for the VFIO lab, unless it is cached.",
    )
    parser.parse_args()
    start = time.monotonic()

    def tell(line: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - start:5.1f} s] {line}\n")

    try:
        image = build(tell)
    except PartsError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{image}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
