"""Reports: what they say of known requests, how parts add up, and bad recordings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from guestio.observe import RecordingError, open_recording
from guestio.observe.assemble import Assembler
from guestio.observe.finish import RecordingFile
from guestio.observe.page import page
from guestio.observe.report import report, table, text
from guestio.observe.schema import METADATA_KEY, VERSION
from guestio.observe.spool import Spool
from guestio.trace import NO_HEAD, RECORD, Records, What

DESCRIPTION = {
    "version": VERSION,
    "payload": "none",
    "lost": 0,
    "ended": None,
    "peers": [],
    "device": {"kind": "<b>Evil\x1b[31m", "transport": "vhost-user", "origin": 1},
}


def records(*rows: dict[str, int]) -> Records:
    made = np.zeros(len(rows), RECORD)
    made["origin"], made["queue"] = 1, 0
    for at, row in enumerate(rows):
        for name, value in row.items():
            made[name][at] = value
    return made


def request(head: int, begin: int, offset: int, size: int = 4096, took: int = 100) -> list[Any]:
    """A read that was found, taken 10 ns later, served 20 after, and completed."""
    return [
        {"what": What.TAKEN, "time": begin + 10, "since": begin, "head": head, "length": 16,
         "detail": size + 1, "address": 0x1000 * head},
        {"what": What.SERVED, "time": begin + 30, "since": begin, "head": head, "access": 1},
        {"what": What.COMPLETED, "time": begin + took, "since": begin, "head": head, "access": 1,
         "length": size + 1, "detail": offset},
    ]  # fmt: skip


def write(path: Path, rows: Iterable[dict[str, int]], portion: int = 1 << 20, **more: Any) -> None:
    """A finished recording of these records, given in portions."""
    made = records(*rows)
    made = made[np.argsort(made["time"], kind="stable")]
    out, assembler = RecordingFile(path), Assembler()
    for at in range(0, len(made), portion):
        out.add(assembler.add(made[at : at + portion]))
    out.add(assembler.add(made[:0], last=True))
    out.close(DESCRIPTION | more)


def test_known_requests_are_told(tmp_path: Path) -> None:
    rows = [each for n in range(10) for each in request(n, 1000 + 1000 * n, 4096 * n)]
    rows.append({"what": What.LACKING, "time": 20_000, "since": 19_990, "head": 3, "detail": 2})
    rows += request(3, 20_100, 1 << 30, took=1000)
    rows.append({"what": What.INTERRUPT, "time": 21_200, "head": NO_HEAD})
    rows.append({"what": What.FAILED, "time": 30_020, "head": 5})
    rows += request(5, 30_000, 0)
    write(tmp_path / "a", rows)
    found = report(tmp_path / "a")
    assert found["totals"] == {
        "requests": 12, "completed": 12, "failed": 1, "bytes": 12 * 4096, "stalled": 1,
        "misses": 2, "sequential": 9, "placed": 11, "impossible_rows": 0,
    }  # fmt: skip
    (sizes,) = found["sizes"]
    assert (sizes["operation"], sizes["at_least"], sizes["requests"]) == ("read", 4096, 12)
    stages = {row["stage"]: row for row in found["latencies"]}
    assert stages["total"]["count"] == stages["core"]["count"] == 12
    assert stages["core"]["p50_s"] == pytest.approx(20e-9, rel=0.06)
    assert stages["translation"]["count"] == 1
    assert stages["translation"]["max_s"] == pytest.approx(110e-9)
    assert stages["total"]["max_s"] == pytest.approx(1110e-9)
    assert stages["notify"]["count"] == 11
    assert found["misses_per_request"] == [
        {"misses": 0, "requests": 11},
        {"misses": 2, "requests": 1},
    ]
    assert found["events"] == {"interrupt": 1, "failed": 1}
    assert [fault["what"] for fault in found["faults"]] == ["failed"]
    json.dumps(found)
    names, rows_, _ = table(tmp_path / "a", 'SELECT head, "offset" FROM requests WHERE failed')
    assert (names, rows_) == (["head", "offset"], [(5, 0)])


@pytest.mark.parametrize("portion", [1, 3, 7, 1000])
def test_portions_make_no_difference(tmp_path: Path, portion: int) -> None:
    """Requests over several queues, heads used again, open ones, and notifications far off."""
    random = np.random.default_rng(portion)
    rows = []
    for n in range(200):
        rows += request(n % 7, 2000 * n, 512 * int(random.integers(0, 100)), took=1500)
        if random.random() < 0.3:
            rows.append({"what": What.INTERRUPT, "time": 2000 * n + 1600, "head": NO_HEAD})
    rows.append({"what": What.TAKEN, "time": 10**7, "head": 3, "length": 16, "detail": 1})
    rows.append({"what": What.TAKEN, "time": 10**7 + 5, "head": 3, "length": 16, "detail": 1})
    write(tmp_path / "whole", rows)
    write(tmp_path / "parts", rows, portion)
    with open_recording(tmp_path / "whole") as one, open_recording(tmp_path / "parts") as other:
        assert one.requests().to_pylist() == other.requests().to_pylist()
        assert one.events().to_pylist() == other.events().to_pylist()
        assert one.requests().num_rows == 202
        assert one.requests()["completed"].null_count == 2


def test_mappings_live_from_their_update_to_their_end(tmp_path: Path) -> None:
    def change(what: What, time: int, address: int, length: int) -> dict[str, int]:
        return {"what": what, "time": time, "address": address, "length": length,
                "head": NO_HEAD, "access": 3, "detail": address // 2}  # fmt: skip

    write(
        tmp_path / "a",
        [
            change(What.UPDATE, 10, 0x1000, 0x1000),
            change(What.UPDATE, 20, 0x5000, 0x2000),
            change(What.INVALIDATE, 30, 0x1800, 0x10),
            change(What.UPDATE, 40, 0x6000, 0x1000),
            change(What.INVALIDATE, 50, 0, 2**64 - 1),
            change(What.UPDATE, 60, 2**64 - 0x1000, 0x1000),
            # What cannot be is no mapping.
            change(What.UPDATE, 70, 2**64 - 1, 2),
            change(What.UPDATE, 80, 5, 0),
        ],
    )
    with open_recording(tmp_path / "a") as recording:
        found = [
            (row["address"], row["mapped"], row["unmapped"], row["ended_by"])
            for row in recording.mappings().to_pylist()
        ]
    assert found == [
        (0x1000, 10, 30, What.INVALIDATE),
        (0x5000, 20, 40, What.UPDATE),
        (0x6000, 40, 50, What.INVALIDATE),
        (2**64 - 0x1000, 60, None, None),
    ]


def test_rows_that_cannot_be_are_left_out(tmp_path: Path) -> None:
    rows = [each for n in range(4) for each in request(n, 1000 + 1000 * n, 0)]
    write(tmp_path / "a", rows)
    content = pq.read_table(tmp_path / "a")
    taken = [2**64 - 1, 5, *content["taken"].to_pylist()[2:]]
    at = content.schema.get_field_index("taken")
    content = content.set_column(at, content.schema.field(at), pa.array(taken, pa.uint64()))
    metadata = {METADATA_KEY: json.dumps(DESCRIPTION)}
    pq.write_table(content.replace_schema_metadata(metadata), tmp_path / "a")
    found = report(tmp_path / "a")
    assert found["totals"]["impossible_rows"] == 2
    assert found["totals"]["requests"] == 2
    assert "impossible" in text(found)


def test_what_a_guest_says_is_escaped(tmp_path: Path) -> None:
    write(tmp_path / "a", request(1, 1000, 0))
    found = report(tmp_path / "a")
    assert "\x1b" not in text(found)
    html = page(found)
    assert "<b>Evil" not in html
    assert "&lt;b&gt;Evil" in html
    assert html.count("<svg") == 3
    assert "http-equiv" in html
    assert "<script" not in html


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "guestio", "report", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_bad_files_are_refused_in_a_line(tmp_path: Path) -> None:
    write(tmp_path / "other", request(1, 1000, 0), version=2)
    write(tmp_path / "good", request(1, 1000, 0))
    good = (tmp_path / "good").read_bytes()
    (tmp_path / "cut").write_bytes(good[:-5])
    (tmp_path / "junk").write_bytes(os.urandom(5000))
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    pq.write_table(pq.read_table(tmp_path / "good").replace_schema_metadata(None), tmp_path / "no")
    pq.write_table(
        pq.read_table(tmp_path / "good", columns=["kind"]).replace_schema_metadata(
            {METADATA_KEY: json.dumps(DESCRIPTION)}
        ),
        tmp_path / "thin",
    )
    for name, why in {
        "other": "version 2",
        "cut": "no recording",
        "junk": "no recording",
        "text": "no recording",
        "empty": "no recording",
        "no": "no recording",
        "thin": "lacks the column",
    }.items():
        with pytest.raises(RecordingError, match=why):
            report(tmp_path / name)
    with pytest.raises(RecordingError, match="named"):
        report(tmp_path)
    with pytest.raises(RecordingError, match="DuckDB says"):
        table(tmp_path / "good", "SELECT nothing")
    found = command(tmp_path / "junk")
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (1, "", 1)
    assert command(tmp_path / "missing").stderr.endswith("No such file or directory\n")
    assert command(tmp_path / "good", "--json", "--html").returncode == 2
    found = command(tmp_path / "good", "--sql", "SELECT count(*) AS n FROM requests")
    assert (found.returncode, found.stdout) == (0, "n\n1\n")


def test_what_a_crash_leaves_is_read_up_to_the_last_whole_batch(tmp_path: Path) -> None:
    path = tmp_path / "crashed"
    spool = Spool(path)
    rows = [each for n in range(10) for each in request(n, 1000 + 1000 * n, 4096 * n)]
    sizes = []
    for at in range(0, len(rows), 3):
        spool.write(records(*rows[at : at + 3]), DESCRIPTION)
        sizes.append(spool.bytes)
    whole = path.read_bytes()
    spool.close()
    for count, size in enumerate(sizes[:-1]):
        # Between the end of this batch and that of the next one.
        for cut in {size, size + 1, size + 8, (size + sizes[count + 1]) // 2, sizes[count + 1] - 1}:
            path.write_bytes(whole[:cut])
            with open_recording(path) as recording:
                assert recording.requests().num_rows == count + 1
                assert recording.description["payload"] == "none"
    path.write_bytes(whole)
    assert report(path)["totals"]["requests"] == 10
    assert command(path, "--finish").returncode == 0
    assert path.read_bytes()[:4] == b"PAR1"
    assert report(path)["totals"]["requests"] == 10
    assert command(path, "--finish").returncode == 1
