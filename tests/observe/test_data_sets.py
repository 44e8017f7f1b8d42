"""Many recordings as one set of data: by URL, on a cluster, with bad ones among them."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from guestio.observe import RecordingError
from guestio.observe.parts import Asker, Part, look_at, shift_of, split
from guestio.observe.queries import Merger, ask, connected, make_views_of_files
from guestio.observe.report import DataSet, assemble_report, report, table, text
from guestio.observe.schema import EVENT, MAPPING, METADATA_KEY, REQUEST
from guestio.observe.spool import Spool
from guestio.trace import NO_HEAD, What
from tests.observe.test_report import DESCRIPTION, command, records, request, write

MEMORY = 128 << 20


def disk(path: Path, seed: int, count: int = 400, **more: Any) -> None:
    """A recording with everything in it, of row groups of 100 rows."""
    random = np.random.default_rng(seed)
    rows = []
    for n in range(count):
        begin = 1000 + 3000 * n
        size = 512 << int(random.integers(0, 8))
        rows += request(n % 7, begin, 512 * int(random.integers(0, 9999)), size,
                        took=int(random.integers(100, 2900)))  # fmt: skip
        if random.random() < 0.2:
            rows.append({"what": What.FAILED, "time": begin + 40, "head": n % 7})
        if random.random() < 0.5:
            change = What.UPDATE if random.random() < 0.7 else What.INVALIDATE
            page = 4096 * int(random.integers(0, 20))
            rows.append({"what": change, "time": begin + 50, "address": page, "length": 4096,
                         "head": NO_HEAD, "access": 3})  # fmt: skip
        if random.random() < 0.1:
            rows.append({"what": What.REFUSED, "time": begin + 60, "head": NO_HEAD,
                         "address": int(random.integers(0, 5)), "access": 1})  # fmt: skip
    write(path, rows)
    description = DESCRIPTION | {"began": {"monotonic_ns": 0, "realtime_ns": seed * 10**9}} | more
    content = pq.read_table(path)
    metadata = {METADATA_KEY: json.dumps(description)}
    pq.write_table(content.replace_schema_metadata(metadata), path, row_group_size=100)


def without_paths(found: dict[str, Any]) -> dict[str, Any]:
    recordings = [{**each, "path": Path(each["path"]).name} for each in found["recordings"]]
    return json.loads(json.dumps({**found, "recordings": recordings}))


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("disks")
    for seed in range(3):
        disk(directory / f"{seed}.parquet", seed)
    (directory / "notes.txt").write_text("no recording")
    return directory


@pytest.mark.parametrize("rows", [1, 150, 1000])
def test_parts_of_any_size_answer_what_all_rows_at_once_do(disks: Path, rows: int) -> None:
    found = DataSet(disks)
    with connected(MEMORY, 2) as connection, connected(MEMORY, 1) as other:
        make_views_of_files(
            connection, {part.path: (part.path, part.shift_ns) for part in found.parts(1 << 62)}
        )
        merger = Merger(other)
        merger.add(ask(connection))
        whole = assemble_report(merger.found(), found)
    assert whole["totals"]["requests"] == 1200
    assert whole["totals"]["failed"] > 100
    assert len(whole["mappings"]["ended"]) == 2
    assert whole["faults"]
    found = DataSet(disks)
    with connected(MEMORY, 1) as connection, connected(MEMORY, 1) as other:
        merger, asker = Merger(other), Asker(connection, MEMORY)
        merger.MOST_ROWS = 50  # type: ignore[misc] # so that answers are put together in between
        parts = found.parts(rows)
        assert {1: len(parts) > 20, 150: len(parts) > 10, 1000: len(parts) == 3}[rows]
        for part in parts:
            answer = asker.ask(part)
            assert answer.answers is not None
            merger.add(answer.answers)
        assert assemble_report(merger.found(), found) == whole
    assert report(disks) == whole


def test_times_of_several_recordings_are_those_of_one_clock(disks: Path, tmp_path: Path) -> None:
    one = report(disks / "2.parquet")
    assert one["seconds"] < 0.01
    assert min(row["first_ns"] for row in one["queues"]) == 1000
    several = report(disks)
    assert 2 < several["seconds"] < 2.01
    _, rows, _ = table(
        disks, "SELECT recording, min(completed + shift_ns) // 1000000000 FROM requests GROUP BY 1"
    )
    assert sorted((Path(name).name, int(second)) for name, second in rows) == [
        ("0.parquet", 0), ("1.parquet", 1), ("2.parquet", 2),
    ]  # fmt: skip
    for began in (None, {}, {"realtime_ns": "x", "monotonic_ns": 1}, [1],
                  {"realtime_ns": 1 << 70, "monotonic_ns": 0}):  # fmt: skip
        assert shift_of({"began": began}) == 0


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Sends parts of files, as object stores do."""

    sent = 0

    def log_message(self, *_: object) -> None:
        pass

    def send_head(self) -> Any:
        path = Path(self.translate_path(self.path))
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not path.is_file() or not wanted:
            return super().send_head()
        content = path.read_bytes()
        begin, end = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
        part = content[begin:end]
        type(self).sent += 1
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{begin + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        return io.BytesIO(part)

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()


class NoRanges(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(directory: Path, handler: type[http.server.SimpleHTTPRequestHandler]) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(handler, directory=str(directory))
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_urls_are_as_good_as_directories(disks: Path) -> None:
    here = without_paths(report(disks))
    memory = fsspec.filesystem("memory")
    for path in disks.iterdir():
        memory.pipe(f"/recordings/{path.name}", path.read_bytes())
    try:
        assert without_paths(report("memory://recordings")) == here
        question = "SELECT count(*) FROM requests"
        assert table("memory://recordings", question)[1] == [(1200,)]
        memory.pipe("/recordings/0.parquet", b"junk")
        assert report("memory://recordings")["totals"]["requests"] == 800
    finally:
        memory.rm("/recordings", recursive=True)
    assert without_paths(report(f"file://{disks}")) == here
    with serving(disks, Ranges) as url:
        assert without_paths(report(url)) == here
        assert Ranges.sent > 0
        assert report(f"{url}1.parquet")["totals"]["requests"] == 400
        with pytest.raises(RecordingError, match=r"7\.parquet"):
            report(f"{url}7.parquet")
    with serving(disks, NoRanges) as url:
        assert without_paths(report(url)) == here
        assert table(url, question)[1] == [(1200,)]
    with pytest.raises(RecordingError, match=r"1\.parquet"):
        report(f"{url}1.parquet")
    with pytest.raises(RecordingError, match="unheard"):
        report("unheard://of")


def spool(path: Path) -> None:
    out = Spool(path)
    rows = [each for n in range(10) for each in request(n, 1000 + 1000 * n, 4096 * n)]
    out.write(records(*rows), DESCRIPTION)
    out.close()
    path.write_bytes(path.read_bytes()[:-5])


def spoil(path: Path, group: int) -> None:
    """Make a row group unreadable, without its end that says where it is."""
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(group).column(file.schema_arrow.get_field_index("taken"))
        at = column.data_page_offset
    content = bytearray(path.read_bytes())
    content[at : at + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)


def test_bad_ones_among_many_are_named_and_the_rest_is_told(disks: Path, tmp_path: Path) -> None:
    good = (disks / "0.parquet").read_bytes()
    (tmp_path / "0.parquet").write_bytes(good)
    (tmp_path / "cut.parquet").write_bytes(good[:-9])
    (tmp_path / "junk.parquet").write_bytes(os.urandom(5000))
    (tmp_path / "nothing.parquet").write_bytes(b"")
    (tmp_path / "directory.parquet").mkdir()
    (tmp_path / "gone.parquet").symlink_to(tmp_path / "nowhere")
    disk(tmp_path / "new.parquet", 1, version=2)
    disk(tmp_path / "spoiled.parquet", 1)
    spoil(tmp_path / "spoiled.parquet", 5)
    spool(tmp_path / "unfinished.parquet")
    with pq.ParquetFile(tmp_path / "spoiled.parquet") as file:
        kinds = file.read(columns=["kind"])["kind"].to_pylist()
    lost = kinds[500:600].count(1)
    assert lost > 0
    found = report(tmp_path)
    assert found["totals"]["requests"] == 400 + 400 - lost + 10
    assert [Path(each["path"]).name for each in found["recordings"]] == [
        "0.parquet", "spoiled.parquet", "unfinished.parquet",
    ]  # fmt: skip
    bad = {Path(each["path"].split(",")[0]).name: each for each in found["unreadable"]}
    assert bad.keys() == {
        f"{name}.parquet" for name in ("cut", "junk", "nothing", "directory", "gone", "new",
                                       "spoiled")
    }  # fmt: skip
    assert "rows 500 to 599" in bad["spoiled.parquet"]["path"]
    assert "version 2" in bad["new.parquet"]["why"]
    assert "No such file" in bad["gone.parquet"]["why"]
    assert text(found).count("LEFT OUT") == len(bad)
    (tmp_path / "spoiled.parquet").unlink()
    shown = command(tmp_path, "--sql", "SELECT count(*) FROM requests")
    assert (shown.returncode, shown.stdout.splitlines()[1:]) == (0, ["410"])
    assert shown.stderr.count("left out") == 6
    for name in ("0", "unfinished"):
        (tmp_path / f"{name}.parquet").unlink()
    shown = command(tmp_path)
    assert (shown.returncode, shown.stdout) == (1, "")
    assert "nor can 5 others be read" in shown.stderr


def change(path: Path, kind: int, columns: dict[str, Callable[[list[Any]], list[Any]]]) -> None:
    """Change columns of the rows of a kind."""
    content = pq.read_table(path)
    chosen = [at for at, each in enumerate(content["kind"].to_pylist()) if each == kind]
    for name, how in columns.items():
        at = content.schema.get_field_index(name)
        field = content.schema.field(at)
        values = content[name].to_pylist()
        for row, value in zip(chosen, how([values[row] for row in chosen]), strict=True):
            values[row] = value
        content = content.set_column(at, field, pa.array(values, field.type))
    metadata = {METADATA_KEY: json.dumps(DESCRIPTION)}
    pq.write_table(content.replace_schema_metadata(metadata), path)


def test_numbers_that_cannot_be_break_nothing(tmp_path: Path) -> None:
    rows = [each for n in range(1500) for each in request(n, 1000 + 1000 * n, 0)]
    for at, each in enumerate(rows):
        each["queue"] = at // 3
    for n in range(3):
        rows.append({"what": What.UPDATE, "time": 10**7 + n, "length": 4096, "address": 0,
                     "access": 3, "head": NO_HEAD})  # fmt: skip
    rows.append({"what": What.REFUSED, "time": 10**7 + 9, "head": NO_HEAD})
    path = tmp_path / "a.parquet"
    write(path, rows)
    most = 2**64 - 1
    change(
        path,
        REQUEST,
        {
            "readable": lambda old: [most, *old[1:]],
            "operation": lambda old: [old[0], "<evil>", None, *old[3:]],
            "interrupted": lambda old: [*old[:3], most, *old[4:]],
            "misses": lambda old: [*old[:4], 2**32 - 1, *old[5:]],
        },
    )
    change(path, EVENT, {"time": lambda old: [most for _ in old]})
    change(
        path,
        MAPPING,
        {"length": lambda old: [most for _ in old], "ended_by": lambda old: [65535, 65535, None]},
    )
    found = report(path)
    assert found["totals"]["requests"] + found["totals"]["impossible_rows"] == 1500
    assert found["totals"]["impossible_rows"] == 3
    assert found["totals"]["misses"] == 2**32 - 1
    assert [row["misses"] for row in found["misses_per_request"]] == [0, 1000]
    assert len(found["queues"]) == 1000
    assert found["more_queues"] == 497
    (ended,) = found["mappings"]["ended"]
    assert (ended["ended_by"], ended["count"]) == ("other events", 2)
    assert found["faults"][0]["first_ns"] is None
    assert "1000 or more" in text(found)
    json.dumps(found)
    with connected(MEMORY, 1) as connection:
        answer = Asker(connection, MEMORY).ask(next(split(str(path), look_at(str(path))[1], 9, 0)))
    assert answer.answers is not None
    assert int(answer.answers["mappings"]["bytes"][0].as_py()) == 2 * most


def test_a_part_that_is_gone_is_named(tmp_path: Path) -> None:
    with connected(MEMORY, 1) as connection:
        answer = Asker(connection, MEMORY).ask(Part(str(tmp_path / "it's gone"), (5, 5)))
    assert answer.answers is None
    assert len(answer.unreadable) == 2


ENDS = """
import os, signal
from distributed import WorkerPlugin

class Ends(WorkerPlugin):
    begun = 0

    def transition(self, key, start, finish, **_):
        self.begun += finish == "executing"
        if self.begun == 3:
            os.kill(os.getpid(), signal.SIGKILL)

async def dask_setup(worker):
    await worker.plugin_add(Ends())
"""
"""Of a worker that is lost as it begins with its third part."""

GUESTIO = [sys.executable, "-m", "guestio"]
DASK = [sys.executable, "-m", "dask"]


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [*DASK, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_clusters_that_are_not_there_are_refused_in_a_line(disks: Path) -> None:
    code = "from guestio.observe.cluster import Cluster; Cluster('tcp://127.0.0.1:1', wait=1)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert b"RecordingError: no Dask scheduler at tcp://127.0.0.1:1" in found.stderr
    assert command(disks, "--scheduler", "tcp://127.0.0.1:1", "--sql", "SELECT 1").returncode == 2
    assert command(disks, "--memory", "1").returncode == 2


def test_a_cluster_reports_the_same_and_survives_a_worker(disks: Path, tmp_path: Path) -> None:
    file = tmp_path / "scheduler.json"
    directory = tmp_path / "many"
    directory.mkdir()
    for number in range(8):
        (directory / f"{number}.parquet").symlink_to(disks / f"{number % 3}.parquet")
    spool(directory / "unfinished.parquet")
    (directory / "junk.parquet").write_bytes(b"junk")
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            running("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
                    "--scheduler-file", str(file))
        )  # fmt: skip
        until(file.exists)
        address = json.loads(file.read_text())["address"]
        worker = ("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard",
                  "--local-directory", str(tmp_path))  # fmt: skip
        (tmp_path / "ends.py").write_text(ENDS)
        first = stack.enter_context(running(*worker, "--preload", str(tmp_path / "ends.py")))
        process = subprocess.Popen(
            [
                *GUESTIO,
                "report",
                str(directory),
                "--json",
                "--scheduler",
                address,
                "--memory",
                "64",
            ],
            stdout=subprocess.PIPE,
        )
        assert first.wait(120) == -signal.SIGKILL
        assert process.poll() is None
        stack.enter_context(running(*worker))
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 0
    found = json.loads(out)
    assert found == json.loads(json.dumps(report(directory)))
    assert found["totals"]["requests"] == 8 * 400 + 10
    assert len(found["unreadable"]) == 1
