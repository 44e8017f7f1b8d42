"""What is recorded of a card's frames."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import dpkt  # type: ignore[import-untyped]
import pytest

from guestio.errors import DeviceError
from guestio.virtio.net import CaptureFile, NetDevice, Port, pcapng
from tests.kit.net_driver import MAC, PEER, Mirror, NetGuest, Wire, frame
from tests.kit.serving import Serving


def read(path: Path) -> list[tuple[float, bytes]]:
    """What another library reads in a capture."""
    with path.open("rb") as file:
        return list(dpkt.pcapng.Reader(file))


@pytest.mark.parametrize("kind", [Mirror, Wire])
def test_frames_are_recorded_both_ways(kind: type[Port], tmp_path: Path) -> None:
    path = tmp_path / "frames.pcapng"
    port: Any = kind()
    device = NetDevice(port, mac=MAC, capture=CaptureFile(path))
    began = time.time()
    with Serving(device, tmp_path / "net") as serving, NetGuest(serving.path) as guest:
        guest.post(*[2000] * 8)
        guest.send(frame(61, to=PEER, of=MAC))
        if isinstance(port, Wire):
            assert port.get() == (bytes(12), frame(61, to=PEER, of=MAC))
            port.put(frame(1000))
        else:
            guest.receive()
            port.deliver(0, frame(1000))
        assert guest.receive()[1] == frame(1000)
        # What was recorded is in the file at once.
        recorded = read(path)
    device.close()
    frames = [data for _, data in recorded]
    assert frames[0] == frame(61, to=PEER, of=MAC)
    assert frames[-1] == frame(1000)
    assert all(began - 1 <= float(when) <= time.time() + 1 for when, _ in recorded)


def test_times_are_in_nanoseconds_and_directions_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "frames.pcapng"
    monkeypatch.setattr(pcapng.time, "time_ns", lambda: 1_234_567_890_123_456_789)
    capture = CaptureFile(path, name="net7")
    for sent in (True, False):
        capture.write(frame(61), sent=sent)
    capture.close()
    capture.close()
    with path.open("rb") as file:
        reader = dpkt.pcapng.Reader(file)
        assert [data for _, data in reader] == [frame(61)] * 2
        assert reader.idb.opts[0].data.rstrip(b"\0") == b"net7"
    data = path.read_bytes()
    now = 1_234_567_890_123_456_789
    assert data.count(struct.pack("<II", now >> 32, now & 0xFFFFFFFF)) == 2
    assert (data.count(b"\2\0\4\0\2\0\0\0"), data.count(b"\2\0\4\0\1\0\0\0")) == (1, 1)
    assert len(data) % 4 == 0


def test_wireshark_reads_it(tmp_path: Path) -> None:
    assert shutil.which("capinfos"), "capinfos is missing: apt-get install tshark"
    path = tmp_path / "frames.pcapng"
    capture = CaptureFile(path)
    for size in range(14, 60):
        capture.write(frame(size), sent=bool(size % 2))
    capture.close()
    said = subprocess.run(["capinfos", path], capture_output=True, text=True, check=True).stdout
    assert "46" in said
    assert "Ethernet" in said
    assert "nanoseconds" in said


def test_a_file_that_takes_no_more_ends_the_record_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pcapng, "NET_CAPTURE_BYTES", 1000)
    path = tmp_path / "frames.pcapng"
    capture = CaptureFile(path)
    for _ in range(100):
        capture.write(frame(200), sent=True)
    assert "ends: it is 9" in caplog.text or "ends: it is 8" in caplog.text
    assert len(read(path)) == 3
    capture.close()
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setattr(pcapng, "NET_CAPTURE_BYTES", 1 << 30)
    capture = CaptureFile(tmp_path / "pipe")
    for _ in range(100):
        capture.write(frame(9000), sent=True)
    os.close(reading)
    assert len([record for record in caplog.records if "capture" in record.getMessage()]) == 2


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"cannot write the capture .*nowhere"):
        CaptureFile(tmp_path / "nowhere" / "file")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DeviceError, match="pipe"):
        CaptureFile(tmp_path / "pipe")
