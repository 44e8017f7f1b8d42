"""``guestio net``: its arguments, and what it says at its end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from guestio.virtio.net.features import Net
from tests.kit.net_driver import MODERN, NetGuest, frame
from tests.kit.serving import until


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "either --tap IFNAME or --responder ADDRESS/PREFIX"),
        (["--tap", "a", "--responder", "10.0.2.1/24"], "either --tap"),
        (["--responder", "10.0.2.1"], "no host in a network"),
        (["--responder", "10.0.2.1/24", "--mac", "1:2"], "no MAC address"),
        (["--responder", "10.0.2.1/24", "--mac", "01:00:00:00:00:00"], "address of a group"),
        (["--responder", "10.0.2.1/24", "--pcap", "/nowhere/at/all"], "cannot write the capture"),
        (["--responder", "10.0.2.1/24", "--mtu", "67"], "67"),
        (["--responder", "10.0.2.1/24", "--queue-pairs", "32"], "32"),
        (["--tap", "a" * 16], "no name of an interface"),
        (["--tap", "lo"], "cannot open the tap lo"),
    ],
)
def test_bad_arguments_are_named_in_one_line(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "guestio", "net", "--socket", tmp_path / "s", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_frames_are_counted_and_recorded_and_the_link_toggled(tmp_path: Path) -> None:
    path, capture = tmp_path / "s", tmp_path / "frames.pcapng"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "guestio", "net", "--responder", "10.0.2.1/24"),
            *("--socket", path, "--pcap", capture, "--mac", "52:54:00:00:00:05", "--mtu", "9000"),
            *("--queue-pairs", "2"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline() == f"listening on {path}\n"
        features = int(MODERN | Net.MQ | Net.MTU)
        with NetGuest(path, pairs=2, features=features) as guest:
            config = guest.frontend.get_config(0, 12)
            assert config == bytes.fromhex("525400000005 0100 0200 2823")
            for pair in (0, 1):
                guest.send(frame(60, to=b"\xff" * 6), pair)
            process.send_signal(signal.SIGUSR1)
            until(lambda: guest.frontend.get_config(6, 2) == b"\0\0")
            process.send_signal(signal.SIGUSR1)
            until(lambda: guest.frontend.get_config(6, 2) == b"\1\0")
            # It ends with its driver there.
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        said = process.stderr.read()
    finally:
        process.kill()
        process.communicate()
    assert re.search("frames: sent=2 sent_bytes=120 send_dropped=0 received=0 ", said)
    assert "the link is down" in said
    assert "the link is up" in said
    assert capture.read_bytes().count(frame(60, to=b"\xff" * 6)) == 2
    assert not path.exists()
