"""``--fault``, ``guestio faults``, and ``/fault`` at the control socket."""

from __future__ import annotations

import http.client
import json
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guestio.budgets import FAULT_RULE_CHARS
from guestio.faults import reference
from guestio.testing import BlkError, ScriptedGuest

LIMIT = 60.0


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "guestio", *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("blk disk.img --fault eror", "--fault: 'eror' is no misbehavior: did you mean error?"),
        ("blk disk.img --fault drop --fault delay=3", "'3' is not a time; say delay=20ms"),
        ("blk disk.img --fault 'error op=raed'", "a disk has no 'raed'; did you mean read?"),
        ("rng --fault msi-lost", "there is a PCI function over vfio-user only"),
        ("rng --transport vfio-user --fault hang-up", "hang-up: over vhost-user only"),
        ("nvme disk.img --fault drop", "drop: of virtio devices only"),
    ],
)
def test_a_bad_rule_is_one_line_and_status_2(
    words: str, said: str, image: Path, tmp_path: Path
) -> None:
    done = run(*shlex.split(words), "--socket", "s.sock", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("guestio: ")
    assert said in line
    assert not (tmp_path / "s.sock").exists()


def test_a_server_misbehaves_says_so_and_counts(
    serve: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = serve("--fault", "error op=read sector=8", "--fault", "stall op=flush")
    assert process.stderr is not None
    assert "every request passes through Python" in process.stderr.readline()
    assert process.stderr.readline() == "fault 1: error op=read sector=8\n"
    with ScriptedGuest(str(tmp_path / "s.sock"), timeout=LIMIT) as guest:
        guest.read(0, 4096)
        with pytest.raises(BlkError):
            guest.read(8, 512)
        guest.submit(4)  # a flush, which stalls
        while "fault 2 (stall op=flush): flush" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=LIMIT)[1]
    assert process.returncode == 0
    assert "fault 1 (error op=read sector=8) struck 1 of 1" in said
    assert "fault 2 (stall op=flush) struck 1 of 1" in said


def test_the_list_is_the_reference(tmp_path: Path) -> None:
    assert run("faults", cwd=tmp_path).stdout == f"{reference()}\n"


class Control(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=LIMIT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


def ask(path: Path, method: str, target: str, body: str = "", **headers: str) -> tuple[int, Any]:
    control = Control(path)
    try:
        control.request(method, target, body.encode(), headers)
        answer = control.getresponse()
        text = answer.read().decode()
        return answer.status, json.loads(text) if text[:1] == "[" else text.strip()
    finally:
        control.close()


def test_rules_are_switched_at_the_control_socket(
    serve: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    serve("--fault", "none", "--control", "c.sock")
    path = tmp_path / "c.sock"
    assert ask(path, "GET", "/fault") == (200, [])
    with ScriptedGuest(str(tmp_path / "s.sock"), timeout=LIMIT) as guest:
        guest.read(0, 512)
        status, found = ask(path, "POST", "/fault", "error op=read sector=0")
        assert (status, found[0]["rule"]) == (200, "error op=read sector=0")
        with pytest.raises(BlkError):
            guest.read(0, 512)
        status, (counts,) = ask(path, "GET", "/fault")
        assert (counts["matched"], counts["struck"]) == (1, 1)
        assert ask(path, "DELETE", "/fault?number=1") == (200, [])
        guest.read(0, 512)
    assert ask(path, "POST", "/fault", "eror") == (
        400,
        "'eror' is no misbehavior: did you mean error?",
    )
    assert ask(path, "DELETE", "/fault?number=7") == (
        400,
        "no rule 7 is in force; there is none",
    )
    assert ask(path, "POST", "/fault", "x" * (FAULT_RULE_CHARS + 1))[0] == 400
    assert ask(path, "POST", "/fault", "drop", Origin="http://elsewhere.example")[0] == 403
    assert ask(path, "GET", "/fault") == (200, [])


def test_a_server_without_rules_has_none_to_switch(
    serve: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    serve("--control", "c.sock")
    status, said = ask(tmp_path / "c.sock", "POST", "/fault", "drop")
    assert (status, said) == (404, "this server obeys no rules: start it with --fault none")
