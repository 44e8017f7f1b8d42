"""A disk that every tool looks at, and the numbers that each of them shows."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from prometheus_client.openmetrics.parser import text_string_to_metric_families

from guestio.control.client import ControlClient
from guestio.trace import What
from tests.kit.browser import Browser
from tests.kit.perfetto_trace import Trace
from tests.kit.serving import until
from tests.kit.tshark import counts as packets_of

Numbers = Mapping[str, int]

COUNTERS: Final = {
    "requests": "requests",
    "failed": "failed_requests",
    "misses": "iotlb_misses",
    "updates": "iotlb_updates",
    "invalidations": "iotlb_invalidations",
    "refused": "iotlb_refused",
}
"""What is compared, and how a status calls it."""

EVENTS: Final = {
    "requests": "completed",
    "failed": "failed",
    "misses": "miss",
    "updates": "update",
    "invalidations": "invalidate",
    "refused": "refused",
}
"""How events call it."""

GUESTIO: Final = (sys.executable, "-m", "guestio")
PATIENCE: Final = 120.0


class WatchedDisk:
    """``guestio blk`` with a control socket, a recorder and an inspector; made by :func:`watched`.

    Attributes:
        socket: Where the guest connects.
        control: The client of its control socket.
    """

    def __init__(self, directory: Path, browser: Browser) -> None:
        self._directory, self._browser = directory, browser
        self.socket = directory / "disk.sock"
        self.control = ControlClient(directory / "control", timeout=60)
        self._recorder: subprocess.Popen[str] | None = None
        self._before: dict[str, Numbers] = {}

    def record(self) -> None:
        """Record from here on, and count what tools show from here on."""
        self._recorder = subprocess.Popen(
            [
                *(*GUESTIO, "record", str(self._directory / "control")),
                *("-o", str(self._directory / "recording"), "--payload", "headers"),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._recorder.stderr is not None
        assert "recording to" in self._recorder.stderr.readline()
        self._before = self._live()

    def settle(self) -> None:
        """Wait until nothing is under way any more."""
        seen = [self.control.status()["counts"]]

        def stands() -> bool:
            time.sleep(0.3)
            seen.append(self.control.status()["counts"])
            return seen[-1] == seen[-2]

        until(stands)

    def numbers(self) -> dict[str, dict[str, int]]:
        """What each tool shows since :meth:`record`, by its name; recording ends."""
        found = {
            tool: {name: shown[name] - self._before[tool][name] for name in shown}
            for tool, shown in self._live().items()
        }
        return found | self._recorded()

    def _live(self) -> dict[str, Numbers]:
        """What those tools show that look at the server itself."""
        return {
            "top --json": self._top_json(),
            "top --once": self._top_once(),
            "/metrics": self._metrics(),
            "inspect": self._inspector(),
        }

    def _guestio(self, *words: str | Path) -> str:
        done = subprocess.run(
            [*GUESTIO, *map(str, words)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _top_json(self) -> Numbers:
        status = json.loads(self._guestio("top", self._directory / "control", "--json"))
        found = {name: status["counts"][counter] for name, counter in COUNTERS.items()}
        completed = sum(queue["completed"] for queue in status["queues"])
        assert completed == found["requests"], "all that were taken were given back"
        assert completed == sum(
            latency["count"] for queue in status["queues"] for latency in queue["latency"].values()
        )
        return found

    def _top_once(self) -> Numbers:
        """What is printed for people; of faults only those that there are."""
        text = self._guestio("top", self._directory / "control", "--once")
        lines = text.splitlines()
        head = next(line for line in lines if line.split()[:1] == ["queue"])
        names = re.split(r"\s{2,}", head.strip())
        rows = [re.split(r"\s{2,}", line.strip()) for line in lines[lines.index(head) + 1 :]]
        tables = [row for row in rows if len(row) == len(names) and row[0].isdigit()]
        (line,) = [line for line in lines if line.startswith("translations: ")]
        translations = {
            name: int(number.replace(",", ""))
            for number, name in re.findall(r"([\d,]+) (requested|updates|invalidations)", line)
        }
        (line,) = [line for line in lines if line.startswith("faults: ")]
        faults = {
            name: int(number.replace(",", ""))
            for name, number in re.findall(r"(\w+) ([\d,]+)", line.removeprefix("faults: "))
        }
        return {
            "requests": sum(int(row[names.index("requests")]) for row in tables),
            "misses": translations["requested"],
            "updates": translations["updates"],
            "invalidations": translations["invalidations"],
            "refused": faults.get("iotlb_refused", 0),
            "failed": faults.get("failed_requests", 0),
        }

    def _metrics(self) -> Numbers:
        """As prometheus-client's own parser reads it; promtool has nothing against it."""
        text = self.control.get("/metrics").decode()
        samples: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples[sample.name] = samples.get(sample.name, 0) + sample.value
        promtool(self.control.get("/metrics", accept="text/plain"))
        found = {
            name: int(samples[f"guestio_{counter}_total"]) for name, counter in COUNTERS.items()
        }
        completed = samples.get("guestio_queue_requests_completed_total", 0)
        assert completed == found["requests"]
        assert samples.get("guestio_request_latency_seconds_count", 0) == completed
        return found

    def _inspector(self) -> Numbers:
        """What the page shows, of figures that are newer than this call."""
        browser = self._browser
        before = int(browser.data("html").get("updates", 0))
        browser.until(f"document.documentElement.dataset.updates >= {before + 2}")
        shown = {row[0].replace(" ", "_"): row[1] for row in browser.rows("#count-table")}
        shown |= {row[0].replace(" ", "_"): row[1] for row in browser.rows("#fault-table")}
        return {name: int(shown[counter].replace(",", "")) for name, counter in COUNTERS.items()}

    def _recorded(self) -> dict[str, dict[str, int]]:
        """What is made of the recording."""
        assert self._recorder is not None
        self._recorder.send_signal(signal.SIGINT)
        _, said = self._recorder.communicate(timeout=PATIENCE)
        assert self._recorder.returncode == 0, said
        assert "lost" not in said, said
        recording = self._directory / "recording"
        report = json.loads(self._guestio("report", recording, "--json"))
        assert report["totals"]["impossible_rows"] == 0
        events = Counter(report["events"])
        reported = {name: events[event] for name, event in EVENTS.items()}
        reported["requests"] = report["totals"]["completed"]
        assert report["totals"]["failed"] == reported["failed"]
        trace, packets = self._directory / "trace", self._directory / "packets"
        self._guestio("convert", recording, "--perfetto", trace, "--pcapng", packets)
        seen = packets_of(packets)
        return {
            "record": self._rows(said),
            "report": reported,
            "report --sql": self._asked(),
            "Perfetto": perfetto_numbers(trace),
            "Wireshark": {name: seen[event] for name, event in EVENTS.items()},
        }

    def _rows(self, said: str) -> dict[str, int]:
        """What is in the file, and what the command said of it."""
        from guestio.observe import open_recording

        with open_recording(self._directory / "recording") as recording:
            assert recording.description["ended"] is None
            assert recording.description["lost"] == 0
            counts = recording.description["counts"]
            requests = recording.requests()
            faults = Counter(recording.faults()["what"].to_pylist())
            changes = Counter(recording.translations()["what"].to_pylist())
        done = len(requests) - requests["completed"].null_count
        assert counts.get("completed", 0) == done
        assert f": {len(requests):,} requests, " in said
        assert sum(requests["failed"].to_pylist()) == faults[What.FAILED]
        return {
            "requests": done,
            "failed": faults[What.FAILED],
            "misses": changes[What.MISS],
            "updates": changes[What.UPDATE],
            "invalidations": changes[What.INVALIDATE],
            "refused": faults[What.REFUSED],
        }

    def _asked(self) -> dict[str, int]:
        """The same by a question of one's own, in SQL."""
        query = (
            "SELECT what, count(*) FROM events GROUP BY what UNION ALL "
            f"SELECT {int(What.COMPLETED)}, count(completed) FROM requests"
        )
        said = self._guestio("report", self._directory / "recording", "--sql", query)
        counts = {int(what): int(count) for what, count in map(str.split, said.splitlines()[1:])}
        return {name: counts.get(What[event.upper()], 0) for name, event in EVENTS.items()}


def perfetto_numbers(path: Path) -> dict[str, int]:
    """What a trace shows, as Perfetto's own definitions read it."""
    trace = Trace(path)
    shown = trace.counts("translation") + trace.counts("life")
    requests = trace.counts("request")
    found = {name: shown[event] for name, event in EVENTS.items()}
    found["requests"] = sum(requests.values()) - requests["interrupt"]
    found["failed"] = sum("failed" in each.name for each in trace.slices)
    return found


def promtool(text: bytes) -> None:
    """Have Prometheus' own tool check metrics; it is a Debian package, which the lab installs."""
    program = shutil.which("promtool")
    assert program is not None, "promtool is not installed: apt-get install prometheus"
    done = subprocess.run(
        [program, "check", "metrics"], input=text, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()


@contextlib.contextmanager
def watched(directory: Path, browser: Browser, image: Path, *options: str) -> Iterator[WatchedDisk]:
    """A disk that is served by the command, with its page open in a browser."""
    disk = WatchedDisk(directory, browser)
    control = str(directory / "control")
    with contextlib.ExitStack() as undo:
        log = undo.enter_context((directory / "log").open("w+"))
        served = subprocess.Popen(
            [
                *GUESTIO,
                "blk",
                str(image),
                "--socket",
                str(disk.socket),
                "--control",
                control,
                *options,
            ],
            stderr=log,
        )
        undo.callback(_end, served)
        until(lambda: "listening on" in (directory / "log").read_text() or served.poll())
        assert served.poll() is None, (directory / "log").read_text()
        inspect = subprocess.Popen(
            [*GUESTIO, "inspect", control], stdout=subprocess.PIPE, text=True
        )
        undo.callback(_end, inspect)
        assert inspect.stdout is not None
        browser.open(inspect.stdout.readline().strip())
        browser.until("document.documentElement.dataset.updates >= 1")
        try:
            yield disk
            assert browser.leave() == []
        finally:
            if disk._recorder is not None:
                _end(disk._recorder)


def _end(process: subprocess.Popen[Any]) -> None:
    process.kill()
    process.communicate()


def table(columns: Mapping[str, Numbers]) -> str:
    """All numbers, a line each; a column for each tool."""
    names = list(COUNTERS)
    heads = ["", *columns]
    rows = [[name, *(f"{shown[name]:,}" if name in shown else "-" for shown in columns.values())]
            for name in names]  # fmt: skip
    widths = [max(len(row[at]) for row in (heads, *rows)) for at in range(len(heads))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (heads, *rows)
    )


def check_equal(columns: Mapping[str, Numbers], expected: Numbers) -> None:
    """All tools show the same numbers, those that are expected."""
    shown = table(columns)
    for tool, numbers in columns.items():
        different = {
            name: (numbers[name], wanted)
            for name, wanted in expected.items()
            if name in numbers and numbers[name] != wanted
        }
        assert not different, f"{tool}: {different} (shown, expected)\n{shown}"
