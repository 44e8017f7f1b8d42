"""Recordings: what they count is what the load generator counts, exactly."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guestio.budgets import CONTROL_STREAMS
from guestio.control import guard
from guestio.control.client import ControlClient
from guestio.control.server import RECORDED
from guestio.errors import DeviceError
from guestio.guest.load import Load
from guestio.guest.plan import LoadPlan
from guestio.observe import Recorder, open_recording, xxh64
from guestio.observe.remote import ControlSource
from guestio.pci import VirtioPci
from guestio.trace import Group, What, wanted
from guestio.virtio.blk import BlockDevice
from tests.kit.serving import Serving, nothing_left, until
from tests.kit.vfio_client import ServingPci

SIZE = 4 << 20
REQUESTS = 300


@contextlib.contextmanager
def disk(directory: Path) -> Iterator[tuple[Serving, bytes]]:
    """A disk that is served, with a control socket, and what is on it."""
    image = directory / "image"
    content = os.urandom(SIZE)
    image.write_bytes(content)
    device = BlockDevice(image)
    try:
        with Serving(device, directory / "disk.sock", control=directory / "control") as serving:
            yield serving, content
    finally:
        device.close()


def counts(table: Any, what: What) -> Any:
    return table["what"].to_pylist().count(int(what))


@pytest.mark.parametrize("iommu", ["off", "static", "strict"])
@pytest.mark.parametrize("outside", [False, True])
def test_a_recording_counts_what_the_guest_does(tmp_path: Path, iommu: Any, outside: bool) -> None:
    path = tmp_path / "recording.parquet"
    with nothing_left(), disk(tmp_path) as (serving, _):
        source: Any = tmp_path / "control" if outside else serving.backend
        plan = LoadPlan(workload="randrw", depth=8, iommu=iommu)
        with Load(os.fspath(tmp_path / "disk.sock"), plan) as load:
            load.run_requests(20)
            client = ControlClient(tmp_path / "control")
            before = client.status()
            with Recorder(source, path) as recorder:
                result = load.run_requests(REQUESTS)
                expected = before["counts"]["iotlb_invalidations"] + result.invalidations
                until(lambda: client.status()["counts"]["iotlb_invalidations"] == expected)
            assert recorder.ended is None
    with open_recording(path) as recording:
        assert recording.description["lost"] == 0
        requests, translations = recording.requests(), recording.translations()
    assert len(requests) == REQUESTS
    operations = requests["operation"].to_pylist()
    assert operations.count("read") == result.reads
    assert operations.count("write") == result.writes
    assert counts(translations, What.MISS) == result.misses
    assert counts(translations, What.UPDATE) == result.updates
    assert counts(translations, What.INVALIDATE) == result.invalidations
    assert requests["sequence"].to_pylist() == sorted(requests["sequence"].to_pylist())
    order = ["available", "taken", "served", "completed", "interrupted"]
    for row in requests.to_pylist():
        times = [row[name] for name in order if row[name] is not None]
        assert times == sorted(times)
        assert None not in (row["taken"], row["served"], row["completed"])
        assert (row["misses"] > 0) == (row["stalled"] is not None)
        moved = max(row["readable"], row["writable"])
        assert row["offset"] + moved <= SIZE + 16
    if iommu == "strict":
        assert min(requests["misses"].to_pylist()) > 0


@pytest.mark.parametrize("payload", ["headers", "all"])
def test_what_requests_carry_is_recorded(tmp_path: Path, payload: Any) -> None:
    path = tmp_path / "recording.parquet"
    plan = LoadPlan(workload="randread", depth=4)
    with (
        nothing_left(),
        disk(tmp_path) as (serving, content),
        Recorder(serving.backend, path, payload=payload),
        Load(os.fspath(tmp_path / "disk.sock"), plan) as load,
    ):
        load.run_requests(50)
        # What was negotiated is looked at now and then.
        time.sleep(0.2)
    with open_recording(path) as recording:
        rows = recording.requests().to_pylist()
        peers = recording.description["peers"]
    assert len(peers) == 1
    assert peers[0]["queues"][0]["size"] > 0
    assert len(rows) == 50
    for row in rows:
        assert row["status"] == 0
        header = row["content"]
        assert int.from_bytes(header[8:16], "little") * 512 == row["offset"]
        data = content[row["offset"] : row["offset"] + row["writable"] - 1]
        assert row["written"] == row["writable"] == len(data) + 1
        assert row["answer_hash"] == xxh64(data + b"\0")
        assert row["answer"] == (data + b"\0" if payload == "all" else None)
        assert sum(each["length"] for each in row["read_pieces"]) == row["readable"] == 16
        assert sum(each["length"] for each in row["write_pieces"]) == row["writable"]
        assert row["read_pieces"][0]["address"] == row["address"]


@pytest.mark.parametrize("outside", [False, True])
def test_a_disk_over_vfio_user_is_recorded(tmp_path: Path, outside: bool) -> None:
    image, path = tmp_path / "image", tmp_path / "recording"
    image.write_bytes(bytes(SIZE))
    device = BlockDevice(image)
    socket_, control = tmp_path / "disk.sock", tmp_path / "control"
    try:
        with ServingPci(VirtioPci(device), socket_, control=control) as serving:
            source: Any = control if outside else serving.server
            plan = LoadPlan(workload="randrw", depth=8)
            with (
                Recorder(source, path) as recorder,
                Load(os.fspath(socket_), plan, transport="vfio-user") as load,
            ):
                result = load.run_requests(REQUESTS)
                time.sleep(0.2)
            assert recorder.ended is None
            maps = ControlClient(control).status()["counts"]["dma_maps"]
    finally:
        device.close()
    with open_recording(path) as recording:
        assert recording.description["lost"] == 0
        assert recording.description["device"]["transport"] == "vfio-user"
        operations = recording.requests()["operation"].to_pylist()
        assert counts(recording.translations(), What.DMA_MAP) == maps
    assert len(operations) == REQUESTS
    assert operations.count("read") == result.reads


def test_a_recording_ends_at_its_limit_and_the_disk_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "recording.parquet"
    with nothing_left(), disk(tmp_path) as (serving, _):
        with (
            Recorder(serving.backend, path, most_bytes=50_000) as recorder,
            Load(os.fspath(tmp_path / "disk.sock"), LoadPlan(workload="randread")) as load,
        ):
            until(lambda: load.run_requests(50).requests and recorder.ended is not None)
            assert "50000 bytes" in (recorder.ended or "")
            recorder.ending.result(10)
            # What is recorded costs nothing to the disk any more, nor does it fail.
            assert load.run_requests(50).requests == 50
        with open_recording(path) as recording:
            assert recording.description["ended"] == recorder.ended
            assert recording.requests().num_rows > 0


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "recording.parquet"
    path.write_text("mine")
    with nothing_left(), disk(tmp_path) as (serving, _):
        for source in (serving.backend, tmp_path / "control"):
            with pytest.raises(FileExistsError):
                Recorder(source, path)
        with pytest.raises(ValueError, match="payload"):
            Recorder(serving.backend, tmp_path / "other", payload="some")  # type: ignore[arg-type]
        with pytest.raises(DeviceError, match="no answer"):
            Recorder(tmp_path / "nothing", tmp_path / "other")
        with pytest.raises(DeviceError, match="on this machine"):
            Recorder("http://localhost:1", tmp_path / "other")
        assert not (tmp_path / "other").exists()
        assert wanted() == RECORDED
    assert path.read_text() == "mine"


def test_streams_for_recorders_are_limited_and_for_nobody_else(tmp_path: Path) -> None:
    with nothing_left(), disk(tmp_path):
        client = ControlClient(tmp_path / "control")
        with pytest.raises(DeviceError, match=r"400.*payload"):
            client.stream("/record?payload=some")
        with contextlib.closing(http.client.HTTPConnection("localhost")) as connection:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.connect(os.fspath(tmp_path / "control"))
            connection.request("POST", "/record", headers={"Origin": "https://elsewhere.example"})
            assert connection.getresponse().status == 403
        streams = [client.stream("/record") for _ in range(CONTROL_STREAMS)]
        assert all(stream.readline() for stream in streams)
        with pytest.raises(DeviceError, match="503"):
            client.stream("/record")
        assert wanted() & Group.REQUESTS
        for stream in streams:
            stream.close()
        # Nothing is written once the last of them has gone.
        until(lambda: wanted() == RECORDED)
        Recorder(tmp_path / "control", tmp_path / "recording").close()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0xEF46DB3751D8E999),
        (b"a", 0xD24EC4F1A98C6E5B),
        (b"abc", 0x44BC2CF5AD770999),
        (b"Nobody inspects the spammish repetition", 0xFBCEA83C8A378BF1),
    ],
)
def test_the_hash_is_xxh64(data: bytes, expected: int) -> None:
    assert xxh64(data) == expected


def test_a_recording_lasts_longer_than_a_request_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorder's request is answered as long as it records; a client that stalls is cut."""
    monkeypatch.setattr(guard, "CONTROL_REQUEST_SECONDS", 0.4)
    monkeypatch.setattr(guard, "LOOK_SECONDS", 0.1)
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    device = BlockDevice(tmp_path / "image")
    control = tmp_path / "control"
    with Serving(device, tmp_path / "s", control=control) as served:
        recorder = Recorder(control, tmp_path / "recording")
        assert not recorder.ending.done()
        time.sleep(2)
        with Load(str(served.path), LoadPlan(workload="randread", depth=2)) as load:
            load.run_requests(50)
        time.sleep(0.3)
        assert recorder.close()["rows"]["requests"] == 50
        assert recorder.ended is None
    device.close()


def test_a_recorder_ends_with_a_status_of_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that takes: until then a thread may have published what it has not written."""
    with nothing_left(), disk(tmp_path) as (serving, _):
        source = ControlSource(tmp_path / "control", "none")
        try:
            free = threading.Event()
            status = serving.backend.status
            monkeypatch.setattr(serving.backend, "status", lambda: (free.wait(20), status())[1])
            asked = time.monotonic()
            timer = threading.Timer(1.3, free.set)
            timer.start()
            source.refresh()
            timer.join()
            found = source.status()
            assert found is not None
            assert found["time_s"] >= asked
        finally:
            source.close()
