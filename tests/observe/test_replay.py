"""What was recorded of a disk under load is repeated: by calls, by the command, and in a test."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from guestio import testing
from guestio.cli import cli
from guestio.guest.load import Load, LoadResult
from guestio.guest.plan import LoadPlan
from guestio.observe import (
    NotReplayableError,
    Recorder,
    RecordingError,
    open_recording,
    replay,
)
from guestio.testing import ScriptedGuest, serving
from guestio.virtio import EntropyDevice
from guestio.virtio.blk import BlockDevice
from tests.kit.disks import storage_daemon
from tests.kit.serving import Serving, nothing_left, until

SIZE = 4 << 20
REQUESTS = 300


def record_load(
    directory: Path,
    iommu: Any,
    payload: Any = "all",
    contents: bytes | None = None,
    **plan: Any,
) -> LoadResult:
    """Record a load on a disk: `recording`, and `before` and `image` as the disk was and is."""
    before, image = directory / "before", directory / "image"
    before.write_bytes(os.urandom(SIZE) if contents is None else contents)
    shutil.copyfile(before, image)
    device = BlockDevice(image, num_queues=2)
    with Serving(device, directory / "recorded.sock") as served:
        recorder = Recorder(served.backend, directory / "recording", payload=payload)
        plan = {"workload": "randrw", "depth": 8, "queues": 1} | plan
        with Load(str(served.path), LoadPlan(iommu=iommu, **plan)) as load:
            result = load.run_requests(REQUESTS)
        recorder.close()
    device.close()
    return result


@contextmanager
def before(directory: Path) -> Iterator[BlockDevice]:
    """The disk as it was."""
    device = BlockDevice(directory / "before", num_queues=2)
    try:
        yield device
    finally:
        device.close()


def images_are_equal(directory: Path) -> bool:
    return (directory / "before").read_bytes() == (directory / "image").read_bytes()


@pytest.mark.parametrize("iommu", ["off", "static", "strict"])
def test_a_load_is_repeated(tmp_path: Path, iommu: Any) -> None:
    result = record_load(tmp_path, iommu)
    with before(tmp_path) as device, nothing_left(), serving(device) as path:
        again = replay(tmp_path / "recording", path)
    assert again.ok, again.text()
    assert again.requests == result.requests
    # Reads of what is being written may be answered one way or the other.
    assert again.compared["data"] == again.requests - again.not_compared
    assert again.not_compared < REQUESTS / 4
    assert images_are_equal(tmp_path)
    if iommu == "strict":
        # As Linux does: each request maps, and unmaps. Rings are set up once more.
        assert abs(again.invalidations - result.invalidations) < 20
        assert again.misses > 2 * REQUESTS
    elif iommu == "off":
        assert again.misses == 0


def test_on_several_queues_at_their_times(tmp_path: Path) -> None:
    result = record_load(tmp_path, "off", queues=2)
    with before(tmp_path) as device, serving(device, queue_threads=True) as path:
        again = replay(tmp_path / "recording", path, speed=0.5)
    assert again.ok, again.text()
    assert again.requests == result.requests
    assert again.seconds > again.recorded_seconds


@pytest.mark.parametrize("iommu", ["as-recorded", "off"])
def test_the_command_and_other_back_ends(tmp_path: Path, iommu: str) -> None:
    """qemu-storage-daemon answers as guestio did; behind an IOMMU it cannot be."""
    (tmp_path / "qemu").mkdir()
    with storage_daemon(tmp_path / "qemu") as disk:
        record_load(tmp_path, "strict", contents=disk.contents)
        until(disk.socket.exists)
        arguments = ["replay", str(tmp_path / "recording"), str(disk.socket), "--speed", "max"]
        done = CliRunner().invoke(cli, [*arguments, "--iommu", iommu])
    if iommu == "off":
        assert done.exit_code == 0, done.output
        assert "every answer was the recorded one" in done.stdout
        assert disk.image.read_bytes() == (tmp_path / "image").read_bytes()
    else:
        assert done.exit_code == 1
        assert "offers no IOMMU" in done.stderr
        assert "--iommu off" in done.stderr


def test_the_command_shows_what_differs(tmp_path: Path) -> None:
    record_load(tmp_path, "off", workload="randread", payload="headers")
    with (tmp_path / "before").open("r+b") as image:
        image.write(bytes(SIZE // 2))
    with before(tmp_path) as device, serving(device) as path:
        arguments = ["replay", str(tmp_path / "recording"), path, "--differences", "3"]
        done = CliRunner().invoke(cli, arguments)
        machine = CliRunner().invoke(cli, [*arguments, "--json"])
    found = json.loads(machine.stdout)
    assert (machine.exit_code, found["ok"], len(found["differences"])) == (1, False, 3)
    assert found["different"] >= 3
    assert done.exit_code == 1
    assert "requests were answered otherwise" in done.stdout
    assert done.stdout.count("XXH64") + done.stdout.count("data") >= 3
    assert "first 3 differences" in done.stdout
    silent = CliRunner().invoke(cli, ["replay", str(tmp_path / "recording"), str(tmp_path / "no")])
    assert silent.exit_code == 1
    assert str(tmp_path / "no") in silent.stderr or "No such file" in silent.stderr
    for wrong in ("0", "-1", "fast", "nan", "1e9"):
        used = CliRunner().invoke(cli, [*arguments, "--speed", wrong])
        assert used.exit_code == 2, wrong
        assert "neither max nor a number" in used.output


def test_a_recording_is_a_test_in_two_lines(tmp_path: Path) -> None:
    record_load(tmp_path, "off", workload="randread")
    with before(tmp_path) as device:
        assert testing.replay(tmp_path / "recording", device).requests == REQUESTS
    (tmp_path / "before").write_bytes(bytes(SIZE))
    different = pytest.raises(AssertionError, match=f"{REQUESTS} requests were answered otherwise")
    with before(tmp_path) as device, serving(device) as path, different:
        testing.replay(tmp_path / "recording", path)


def test_what_was_not_recorded_cannot_be_repeated(tmp_path: Path) -> None:
    """And nothing was connected to before that was said."""
    record_load(tmp_path, "off", payload="none")
    nowhere = tmp_path / "nowhere"
    with pytest.raises(NotReplayableError, match=r"without what requests carry.*--payload all"):
        replay(tmp_path / "recording", nowhere)
    (tmp_path / "recording").unlink()
    record_load(tmp_path, "off", payload="headers", workload="randwrite")
    with pytest.raises(
        NotReplayableError,
        match=r"--payload headers, which does not hold.*64 of 4112 bytes\); record with .* all",
    ):
        replay(tmp_path / "recording", nowhere)


def test_a_guest_that_does_everything(tmp_path: Path) -> None:
    """Reads, writes, flushes, discards, the serial number, errors: other answers are seen."""
    image = tmp_path / "image"
    image.write_bytes(os.urandom(SIZE))
    shutil.copyfile(image, tmp_path / "before")
    device = BlockDevice(image, serial="the same")
    with Serving(device, tmp_path / "s") as served:
        recorder = Recorder(served.backend, tmp_path / "recording", payload="all")
        with recorder, ScriptedGuest(str(served.path), iommu="strict") as guest:
            guest.write(3, os.urandom(100 * 512))
            guest.flush()
            guest.discard(0, 2)
            guest.write_zeroes(50, 9)
            guest.get_id()
            guest.wait(guest.submit_read(1 << 40, 512))
            guest.read(0, 200 * 512)
    device.close()
    again = testing.replay(
        tmp_path / "recording", BlockDevice(tmp_path / "before", serial="the same")
    )
    assert again.requests == 7
    assert images_are_equal(tmp_path)
    shutil.copyfile(image, tmp_path / "before")
    other = BlockDevice(tmp_path / "before", serial="another one")
    with serving(other) as path:
        again = replay(tmp_path / "recording", path, iommu="off")
    other.close()
    assert again.different >= 1
    assert "another one"[:8].encode().hex(" ") in again.text()


def test_front_ends_that_came_one_after_the_other(tmp_path: Path) -> None:
    """Each with its own features and addresses; at their times, and at the highest speed."""
    image = tmp_path / "image"
    image.write_bytes(os.urandom(SIZE))
    shutil.copyfile(image, tmp_path / "before")
    device = BlockDevice(image, num_queues=2)
    plans = [
        LoadPlan(workload="randrw", depth=4, iommu="off"),
        LoadPlan(workload="randrw", depth=8, queues=2, iommu="strict", queue_size=64),
        LoadPlan(workload="write", depth=1, iommu="static"),
    ]
    with Serving(device, tmp_path / "s") as served:
        recorder = Recorder(served.backend, tmp_path / "recording", payload="all")
        results = []
        for plan in plans:
            with Load(str(served.path), plan) as load:
                results.append(load.run_requests(100))
            time.sleep(0.3)
        recorder.close()
    device.close()
    for speed in (None, 2.0):
        shutil.copyfile(tmp_path / "before", tmp_path / "again")
        again = BlockDevice(tmp_path / "again", num_queues=2)
        ticks: list[tuple[int, int]] = []
        with Serving(again, tmp_path / "a") as served:
            result = replay(
                tmp_path / "recording",
                served.path,
                speed=speed,
                tick=lambda done, total, ticks=ticks: ticks.append((done, total)),  # type: ignore[misc] # the loop's own
            )
            counted = served.backend.status()["counts"]
        again.close()
        assert result.ok, result.text()
        assert (result.requests, result.sessions) == (300, 3)
        assert "by 3 front-ends" in result.text()
        assert (counted["connections"], counted["requests"]) == (3, 300)
        assert counted["iotlb_misses"] == result.misses > 100
        assert counted["protocol_errors"] == 0
        assert ticks[-1] == (300, 300)
        assert ticks == sorted(ticks)
        assert (tmp_path / "again").read_bytes() == image.read_bytes()
        assert result.recorded_seconds > 0.6
        assert speed is None or result.seconds > result.recorded_seconds / speed
    # Strictly mapped, whatever was negotiated.
    with before(tmp_path) as device, serving(device) as path:
        assert replay(tmp_path / "recording", path, iommu="strict").sessions == 3


def test_requests_of_megabytes(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(16 << 20))
    shutil.copyfile(image, tmp_path / "before")
    device = BlockDevice(image)
    with Serving(device, tmp_path / "s") as served:
        recorder = Recorder(served.backend, tmp_path / "recording", payload="all")
        with recorder, ScriptedGuest(str(served.path), contiguous=True) as guest:
            guest.write(8, os.urandom(5 << 20))
            time.sleep(0.5)
            guest.read(1, 8 << 20)
    device.close()
    with open_recording(tmp_path / "recording") as recording:
        assert recording.description["lost"] == 0
        assert recording.description["content_bytes"] == 8 << 20
        rows = recording.requests().to_pylist()
        assert [len(row["content"]) for row in rows] == [16 + (5 << 20), 16]
    again = testing.replay(tmp_path / "recording", BlockDevice(tmp_path / "before"))
    assert (again.requests, again.compared["data"]) == (2, 2)
    assert images_are_equal(tmp_path)
    # A byte behind the first megabyte that differs is seen.
    with (tmp_path / "before").open("r+b") as changed_image:
        changed_image.seek(7 << 20)
        changed_image.write(b"another")
    with before(tmp_path) as device, serving(device) as path:
        result = replay(tmp_path / "recording", path)
    assert result.different == 1


def test_random_numbers_need_not_be_the_same(tmp_path: Path) -> None:
    with Serving(EntropyDevice(), tmp_path / "s") as served:
        recorder = Recorder(served.backend, tmp_path / "recording", payload="all")
        with recorder, testing.Driver(str(served.path)) as driver:
            for size in (16, 300):
                driver.request(b"", size)
    result = testing.replay(tmp_path / "recording", EntropyDevice())
    assert (result.requests, result.not_compared) == (2, 2)
    assert result.compared == {"status": 0, "length": 2, "data": 0}


def changed(path: Path, column: str, value: Any) -> Path:
    """A copy of a recording whose requests have another value in a column."""
    table = pq.read_table(path)
    at = table.schema.get_field_index(column)
    values = table.column(column).to_pylist()
    kinds = table.column("kind").to_pylist()
    values = [value if kind == 1 else old for kind, old in zip(kinds, values, strict=True)]
    table = table.set_column(
        at, table.schema.field(at), pa.array(values, table.schema.field(at).type)
    )
    target = path.with_name(f"changed-{column}")
    with pq.ParquetWriter(target, table.schema) as writer:
        for kind in set(kinds):  # each in row groups of its own
            writer.write_table(table.filter(pc.equal(table["kind"], kind)))
        writer.add_key_value_metadata(pq.read_metadata(path).metadata)
    return target


def test_impossible_recordings_are_refused(tmp_path: Path) -> None:
    record_load(tmp_path, "off", workload="randread")
    good = tmp_path / "recording"
    huge = [{"address": 2**64 - 8, "length": 16}]
    with before(tmp_path) as device, serving(device) as path:
        for column, value, what in (
            ("read_pieces", huge, "cannot be"),
            ("write_pieces", [{"address": 0, "length": 2**63}], "cannot be"),
            ("read_pieces", [], "does not hold all"),
            ("queue", 200, "uses 201 queues"),
            ("content", b"", "does not hold all"),
            ("taken", None, "no request that can be replayed; 300 were taken before"),
        ):
            with pytest.raises(Exception, match=what):
                replay(changed(good, column, value), path)
        torn = tmp_path / "torn"
        torn.write_bytes(good.read_bytes()[:-100])
        with pytest.raises(RecordingError, match="is no recording"):
            replay(torn, path)
        # And the back-end serves the next one.
        assert replay(good, path).ok


def test_what_a_crash_has_left_is_repeated(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(os.urandom(SIZE))
    shutil.copyfile(tmp_path / "image", tmp_path / "before")
    device = BlockDevice(tmp_path / "image", num_queues=2)
    with Serving(device, tmp_path / "s") as served:
        recorder = Recorder(served.backend, tmp_path / "recording", payload="all")
        with Load(str(served.path), LoadPlan(workload="randread", depth=4)) as load:
            load.run_requests(REQUESTS)
            time.sleep(0.5)
            recorder.close(finished=False)
    device.close()
    with open_recording(tmp_path / "recording") as recording, before(tmp_path) as device:
        assert testing.replay(recording, device).requests == REQUESTS
