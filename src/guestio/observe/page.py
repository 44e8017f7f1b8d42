"""A report as a page of its own: tables, and a few plots."""

from __future__ import annotations

import html
import io
from typing import Any, Final

from guestio.observe.report import Report, heading, sections

COLORS: Final = {
    "read": "#0072b2",
    "write": "#d55e00",
    "flush": "#009e73",
    "other": "#7f7f7f",
}
"""Of operations: those of Okabe and Ito, which people with color blindness tell apart."""

POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Nothing is loaded from anywhere, and no script runs."""

STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block;
        overflow-x: auto; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; }
"""


def page(found: Report) -> str:
    """A report as HTML, without scripts and without anything from elsewhere.

    Raises:
        ImportError: matplotlib is not installed (extra ``record``).
    """
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>guestio report</title><style>{STYLE}</style></head><body>",
        "<h1>guestio report</h1>",
    ]
    parts += [f"<p>{html.escape(line)}</p>" for line in heading(found)]
    parts += [_figure(title, svg) for title, svg in _plots(found)]
    for title, names, rows in sections(found):
        head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        parts.append(
            f"<h2>{html.escape(title)}</h2><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table>"
        )
    parts.append("</body></html>")
    return "\n".join(parts)


def _figure(title: str, svg: str) -> str:
    escaped = html.escape(title)
    return f"<h2>{escaped}</h2><figure role='img' aria-label='{escaped}'>{svg}</figure>"


def _plots(found: Report) -> list[tuple[str, str]]:
    """Titles and SVG of what there is to show."""
    plots = []
    if found["timeline"]:
        plots.append(("requests a second", _timeline(found["timeline"])))
    total = [row for row in found["latencies"] if row["stage"] == "total"]
    if total:
        plots.append(("how long requests took", _latencies(total)))
    stages = [row for row in found["latencies"] if row["stage"] != "total"]
    if stages:
        plots.append(("where their time went (median, and up to the 99th of 100)", _stages(stages)))
    return plots


def _axes(height: float = 2.8) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    return svg[svg.index("<svg") :]


def _timeline(rows: list[dict[str, Any]]) -> str:
    figure, axes = _axes()
    for operation in COLORS:
        mine = [row for row in rows if (row["operation"] or "other") == operation]
        if mine:
            axes.plot(
                [row["begins_s"] for row in mine],
                [row["requests"] / row["seconds"] for row in mine],
                color=COLORS[operation],
                label=operation,
                drawstyle="steps-post",
                marker="o" if len(mine) == 1 else None,
            )
    axes.set(xlabel="seconds", ylabel="requests a second", ylim=(0, None))
    axes.legend(frameon=False)
    return _svg(figure)


def _latencies(rows: list[dict[str, Any]]) -> str:
    """The share of requests that took at most so long."""
    figure, axes = _axes()
    for row in rows:
        operation = row["operation"] or "other"
        seen, xs, ys = 0, [], []
        for _, end, count in row["buckets"]:
            seen += count
            xs.append(end * 1e6)
            ys.append(100 * seen / row["count"])
        axes.plot(
            xs, ys, color=COLORS.get(operation), label=operation, drawstyle="steps-post",
            marker="o" if len(xs) == 1 else None,
        )  # fmt: skip
    axes.set(xscale="log", xlabel="microseconds", ylabel="% took at most", ylim=(0, 101))
    axes.legend(frameon=False)
    return _svg(figure)


def _stages(rows: list[dict[str, Any]]) -> str:
    figure, axes = _axes(0.8 + 0.32 * len(rows))
    labels = [f"{row['stage']}, {row['operation'] or 'other'}" for row in rows]
    for at, row in enumerate(rows):
        color = COLORS.get(row["operation"] or "other")
        axes.plot([row["p50_s"] * 1e6, row["p99_s"] * 1e6], [at, at], color=color, linewidth=3)
        axes.plot([row["p50_s"] * 1e6], [at], marker="o", color=color)
    axes.set(xscale="log", xlabel="microseconds")
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    return _svg(figure)
