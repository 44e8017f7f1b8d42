"""`guestio record`, and `--record` of a server command, up to their ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestio.guest.load import Load
from guestio.guest.plan import LoadPlan
from guestio.observe import open_recording
from tests.kit.serving import until

GUESTIO = [sys.executable, "-m", "guestio"]


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen([*GUESTIO, *map(str, arguments)], stderr=subprocess.PIPE, text=True)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return process.stderr.readline()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    (tmp_path / "image").write_bytes(bytes(4 << 20))
    process = start(
        "blk", tmp_path / "image", "--socket", tmp_path / "sock", "--control", tmp_path / "control",
        "--record", tmp_path / "whole", "--record-payload", "headers",
    )  # fmt: skip
    try:
        assert "listening" in line(process)
        yield process
    finally:
        process.kill()
        process.communicate()


SERVED = """
import sys
import guestio
from guestio.virtio import BlockDevice

image, path, recording = sys.argv[1:]
counts = guestio.serve(BlockDevice(image), path, record=recording, record_payload="headers")
print(counts.requests, file=sys.stderr)
"""


def test_a_program_records_what_it_serves(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(4 << 20))
    arguments = [tmp_path / "image", tmp_path / "sock", tmp_path / "whole"]
    words = [sys.executable, "-c", SERVED, *map(str, arguments)]
    served = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        assert "listening" in line(served)
        run(tmp_path, 60)
        run(tmp_path, 40)
        served.send_signal(signal.SIGTERM)
        _, said = served.communicate(timeout=60)
    finally:
        served.kill()
        served.wait()
    assert said.endswith("100\n")
    assert count(tmp_path / "whole") == 100
    with open_recording(tmp_path / "whole") as recording:
        assert recording.description["payload"] == "headers"
        assert len(recording.description["peers"]) == 2
    # A file that is there is not written over, and nothing is served.
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "File exists" in again.stderr
    assert "listening" not in again.stderr
    assert not (tmp_path / "sock").exists()


def run(tmp_path: Path, requests: int) -> None:
    with Load(os.fspath(tmp_path / "sock"), LoadPlan(workload="randrw", depth=8)) as load:
        load.run_requests(requests)


def count(path: Path) -> int:
    with open_recording(path) as recording:
        assert recording.description["lost"] == 0
        return recording.requests().num_rows


def test_commands_record_until_they_end(tmp_path: Path, disk: subprocess.Popen[str]) -> None:
    recorder = start("record", tmp_path / "control", "-o", tmp_path / "part")
    assert line(recorder) == f"guestio: recording to {tmp_path / 'part'}\n"
    run(tmp_path, 100)
    # What is written meanwhile can be read.
    until(lambda: count(tmp_path / "part") == 100)
    recorder.send_signal(signal.SIGINT)
    _, said = recorder.communicate(timeout=60)
    assert recorder.returncode == 0
    assert "100 requests" in said
    assert count(tmp_path / "part") == 100
    # A file that is there is not written over.
    again = start("record", tmp_path / "control", "-o", tmp_path / "part")
    _, said = again.communicate(timeout=60)
    assert (again.returncode, said.count("\n")) == (1, 1)
    assert "File exists" in said
    run(tmp_path, 50)
    begun = time.monotonic()
    disk.send_signal(signal.SIGTERM)
    assert disk.wait(timeout=60) == 0
    print(time.monotonic() - begun)
    assert (tmp_path / "whole").read_bytes()[:4] == b"PAR1"
    with open_recording(tmp_path / "whole") as recording:
        rows = recording.requests()
        assert rows.num_rows == 150
        assert rows["status"].to_pylist() == [0] * 150
        assert [peer["number"] for peer in recording.description["peers"]] == [1, 2]


def test_a_server_that_is_killed_ends_its_recordings(
    tmp_path: Path, disk: subprocess.Popen[str]
) -> None:
    recorder = start("record", tmp_path / "control", "-o", tmp_path / "part")
    line(recorder)
    run(tmp_path, 100)
    until(lambda: count(tmp_path / "whole") == count(tmp_path / "part") == 100)
    disk.kill()
    _, said = recorder.communicate(timeout=60)
    assert recorder.returncode == 0
    assert "the server has ended" in said
    assert count(tmp_path / "part") == 100
    # The server's own recording is as the kill has left it.
    assert (tmp_path / "whole").read_bytes()[:4] != b"PAR1"
    assert count(tmp_path / "whole") == 100


def test_the_first_line_says_what_is_wrong(tmp_path: Path) -> None:
    process = start("record", tmp_path / "nothing", "-o", tmp_path / "part")
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.count("\n")) == (1, 1)
    assert "no answer" in said
    assert not (tmp_path / "part").exists()
