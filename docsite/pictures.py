"""Draw the README's picture: ``python -m docsite.pictures`` writes docs/images/overview.svg.

A test holds that the file is what this draws.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Final

OVERVIEW: Final = Path(__file__).resolve().parent.parent / "docs/images/overview.svg"

_STYLE: Final = """
  .box { fill: #f6f8fa; stroke: #57606a; stroke-width: 1.5 }
  .part { fill: #ffffff; stroke: #8c959f }
  .own { fill: #ddf4ff; stroke: #0969da; stroke-width: 2 }
  .safe { fill: #fff8c5; stroke: #9a6700 }
  text { font: 14px sans-serif; fill: #1f2328 }
  .title { font-weight: bold }
  .small { font-size: 12px }
  .code { font-family: monospace; font-size: 12px }
  path { stroke: #57606a; stroke-width: 1.5; fill: none; marker-end: url(#tip) }
"""

_TIP: Final = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
    'markerHeight="7" orient="auto"><path d="M 0 0 L 8 4 L 0 8 z" '
    'style="fill: #57606a; stroke: none; marker-end: none"/></marker></defs>'
)

_BOXES: Final = (
    (10, 10, 330, 240, "box", "QEMU, unmodified"),
    (30, 45, 290, 105, "part", "Linux guest, with its own driver"),
    (30, 180, 290, 50, "safe", "virtual IOMMU"),
    (480, 10, 330, 240, "box", "guestio: a process without privileges"),
    (500, 45, 290, 105, "own", "your device: 20 lines of Python"),
    (500, 180, 290, 50, "safe", "compiled: rings, translations"),
)

_LINES: Final = (
    (45, 95, "small", "disk, network card, console, NVMe,"),
    (45, 113, "small", "a PCI function of your own"),
    (45, 220, "small", "decides which pages the device reaches"),
    (515, 92, "code", "class Entropy(Device):"),
    (515, 110, "code", "    def process(self, queue, chain):"),
    (515, 128, "code", "        ..."),
    (515, 220, "small", "what was unmapped is out of reach"),
    (352, 88, "small", "requests, interrupts"),
    (352, 197, "small", "vhost-user, vfio-user"),
    (352, 237, "small", "shared memory"),
)

_ARROWS: Final = (
    "M 322 97 H 498",
    "M 498 110 H 322",
    "M 322 205 H 498",
    "M 498 218 H 322",
    "M 645 180 V 152",
)


def overview() -> str:
    """The picture: guest, QEMU, guestio and the device, as SVG."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 260" role="img">',
        "<title>A guest in QEMU, and a device of 20 lines in guestio, behind an IOMMU</title>",
        f"<style>{_STYLE}</style>",
        _TIP,
        '<rect width="820" height="260" fill="#ffffff"/>',
    ]
    for x, y, width, height, kind, title in _BOXES:
        parts.append(
            f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'
        )
        parts.append(f'<text class="title" x="{x + 15}" y="{y + 23}">{escape(title)}</text>')
    parts += [f'<path d="{arrow}"/>' for arrow in _ARROWS]
    parts += [
        f'<text class="{kind}" x="{x}" y="{y}" xml:space="preserve">{escape(text)}</text>'
        for x, y, kind, text in _LINES
    ]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    OVERVIEW.write_text(overview())
