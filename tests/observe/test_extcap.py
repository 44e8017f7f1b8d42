"""A live server is a capture interface of Wireshark's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from guestio.cli import cli
from guestio.testing import ScriptedGuest
from guestio.virtio.blk import BlockDevice
from tests.kit.serving import Serving
from tests.kit.tshark import fields

LIMIT = 60.0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory in which `guestio extcap --install` was run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    done = CliRunner().invoke(cli, ["extcap", "--install"])
    assert done.exit_code == 0, done.output
    program, dissector = map(Path, done.stdout.split())
    assert program.is_relative_to(tmp_path)
    assert os.access(program, os.X_OK)
    assert dissector.is_relative_to(tmp_path)
    return tmp_path


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Serving]:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    device = BlockDevice(image)
    with Serving(device, tmp_path / "blk.sock", control=tmp_path / "control") as serving:
        yield serving
    device.close()


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed program as Wireshark does."""
    (program,) = home.glob("**/extcap/guestio")
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=LIMIT, check=False
    )


def requests(serving: Serving, count: int) -> None:
    with ScriptedGuest(str(serving.path), iommu="strict") as guest:
        for number in range(count):
            guest.write(number, bytes(512))


@pytest.mark.parametrize("named", [True, False], ids=["in the environment", "as an option"])
def test_tshark_captures_what_a_server_does(
    home: Path, served: Serving, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    control = home / "control"
    monkeypatch.setenv("GUESTIO_CONTROL", str(control))
    chosen = (
        ["-i", f"guestio:{control}"]
        if named
        else ["-i", "guestio", "-o", f"extcap.guestio.control:{control}"]
    )
    out = home / "packets.pcapng"
    with subprocess.Popen(
        ["tshark", *chosen, "-w", out, "-c", "200"], stderr=subprocess.PIPE, text=True
    ) as capture:
        try:
            deadline = time.monotonic() + LIMIT
            count = 0
            while capture.poll() is None:
                assert time.monotonic() < deadline
                requests(served, 5)
                count += 5
                time.sleep(0.1)
        finally:
            capture.kill()
        assert capture.stderr is not None
        said = capture.stderr.read()
    assert capture.returncode == 0, said
    found = Counter(what for (what,) in fields(out, "guestio.what"))
    assert found.total() == 200
    # Whole front-ends were seen, with everything that they did.
    assert found["taken"] <= count
    assert min(found["taken"], found["completed"], found["miss"], found["update"]) > 5
    assert found["queue_started"] > 0


def test_a_capture_ends_with_the_server(home: Path, served: Serving) -> None:
    """And with the one who reads it; the pipe is gone first."""
    fifo = home / "fifo"
    os.mkfifo(fifo)
    arguments = ["--extcap-interface", f"guestio:{home / 'control'}", "--events", "life"]
    (program,) = home.glob("**/extcap/guestio")
    for ends in ("reader", "server"):
        with subprocess.Popen([program, *arguments, "--capture", "--fifo", fifo]) as capture:
            try:
                with fifo.open("rb") as reader:
                    assert reader.read(4) == b"\x0a\x0d\x0d\x0a"
                    requests(served, 1)
                    if ends == "server":
                        served.backend.stop()
                        served._thread.join(LIMIT)
                        served.backend.close()
                        rest = reader.read()
                        assert b"gio\x01" in rest
                deadline = time.monotonic() + LIMIT
                while capture.poll() is None:
                    assert time.monotonic() < deadline
                    if ends == "reader":
                        requests(served, 1)
                assert capture.returncode == 0
            finally:
                capture.kill()


def test_what_wireshark_asks_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUESTIO_CONTROL", "/run/a.control:/run/b{}:/run/c d:")
    listed = run(home, "--extcap-interfaces", "--extcap-version=4.0").stdout.splitlines()
    assert listed[0].startswith("extcap {version=")
    assert listed[1:] == [
        "interface {value=guestio:/run/a.control}{display=guestio server at /run/a.control}",
        "interface {value=guestio}{display=guestio server}",
    ]
    assert "{number=147}" in run(home, "--extcap-dlts", "--extcap-interface", "guestio").stdout
    config = run(home, "--extcap-config", "--extcap-interface", "guestio").stdout
    assert "{call=--control}" in config
    assert "{value=requests}" in config
    named = run(home, "--extcap-config", "--extcap-interface", "guestio:/run/a.control").stdout
    assert "--control" not in named


def test_what_cannot_be_captured_is_said(home: Path) -> None:
    fifo = str(home / "fifo")
    for arguments, status, text in (
        (["--capture", "--fifo", fifo], 2, "needs --extcap-interface"),
        (["--capture", "--fifo", fifo, "--extcap-interface", "guestio"], 1, "no control socket"),
        (
            ["--capture", "--fifo", fifo, "--extcap-interface", f"guestio:{home / 'nothing'}"],
            1,
            "no answer from the control socket",
        ),
        ([], 2, "say what to do"),
    ):
        done = run(home, *arguments)
        assert (done.returncode, done.stdout) == (status, "")
        assert text in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert sys.executable in (next(home.glob("**/extcap/guestio"))).read_text()
