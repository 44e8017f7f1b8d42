"""Makes `src/guestio/virtio/event_codes.py` from the kernel's list of input event codes.

`python -m lab.event_codes [HEADER] > src/guestio/virtio/event_codes.py` reads
`/usr/include/linux/input-event-codes.h` (Debian: linux-libc-dev) unless another header is named.
"""

import re
import sys
from pathlib import Path

HEADER = Path("/usr/include/linux/input-event-codes.h")

TYPES = {
    "EV": "types of events",
    "INPUT_PROP": "properties of devices",
    "SYN": "codes of EV_SYN",
    "KEY": "codes of EV_KEY: keys and buttons",
    "REL": "codes of EV_REL",
    "ABS": "codes of EV_ABS",
    "MSC": "codes of EV_MSC",
    "SW": "codes of EV_SW",
    "LED": "codes of EV_LED",
    "SND": "codes of EV_SND",
    "REP": "codes of EV_REP",
}
PREFIXES = {"BTN": "KEY"}
# Bounds and counts of the kernel's own arrays, no codes.
_BOUND = re.compile(r"\w+_(MAX|CNT|MIN_INTERESTING)")


def parse(text: str) -> dict[str, dict[str, int]]:
    """The codes of a header by their type, in its order.

    Args:
        text: The header.
    """
    codes: dict[str, dict[str, int]] = {name: {} for name in TYPES}
    known: dict[str, int] = {}
    for name, value in re.findall(
        r"^#define\s+([A-Z]\w+)\s+(0x[0-9a-fA-F]+|\d+|[A-Z]\w+)\b", text, re.MULTILINE
    ):
        number = known.get(value) if value[0].isalpha() else int(value, 0)
        if number is None or _BOUND.fullmatch(name):
            continue
        known[name] = number
        prefix = "INPUT_PROP" if name.startswith("INPUT_PROP_") else name.partition("_")[0]
        prefix = PREFIXES.get(prefix, prefix)
        if prefix in codes:
            codes[prefix][name] = number
    return codes


def module(codes: dict[str, dict[str, int]]) -> str:
    """The module's text."""
    lines = [
        '"""Names and numbers of input events, from linux/input-event-codes.h.',
        "",
        "Generated: `python -m lab.event_codes` makes this file.",
        '"""',
        "",
        "from __future__ import annotations",
        "",
        "from typing import Final",
    ]
    for name, what in TYPES.items():
        lines += ["", f"{name}: Final[dict[str, int]] = {{"]
        lines += [f'    "{code}": 0x{number:X},' for code, number in codes[name].items()]
        lines += ["}", f'"""{what[0].upper()}{what[1:]}."""']
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the module; see the docstring."""
    header = Path(sys.argv[1]) if len(sys.argv) > 1 else HEADER
    sys.stdout.write(module(parse(header.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
