"""Show the demo as a terminal does: ``python -m docsite.terminal`` writes docs/images/demo.svg."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Final

from rich.console import Console

from guestio.cli.demo import run

SHOWN: Final = Path(__file__).resolve().parent.parent / "docs/images/demo.svg"
WIDTH: Final = 120


def picture(console: Console) -> str:
    """What a console has recorded, as an SVG that loads nothing from elsewhere."""
    svg = console.export_svg(title="guestio demo", unique_id="demo")
    # The token of a page that has gone is of no use, and changes with each run.
    svg = re.sub(r'textLength="[\d.]+"([^>]*>[^<]*token=)[\w&#;-]+', r"\1...", svg)
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


if __name__ == "__main__":
    recording = Console(
        record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    status = run(20.0, console=recording)
    if status == 0:
        SHOWN.write_text(picture(recording))
    sys.exit(status)
