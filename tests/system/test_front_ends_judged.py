"""`guestio check --front-end` judges real front-ends and real drivers: they keep to the rules."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.guest import MIB, Guest, GuestResult, Script, VhostUserDisk, Viommu
from lab.qemu import new_qemu
from lab.uml import UmlGuest

LIMIT = 550.0
PATIENCE = "60"
"""Seconds for a notification, on a machine without time."""


@contextlib.contextmanager
def judging(path: Path, image: Path, *options: str) -> Iterator[tuple[Path, Callable[[], Any]]]:
    """A judge; its socket, and what returns its report."""
    socket = path / "judge.sock"
    words = [sys.executable, "-m", "guestio", "check", "--front-end", str(socket), "--json"]
    words += ["--image", str(image), "--patience", PATIENCE, *options]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.append(process.stdout.read()))  # type: ignore[union-attr] # it is piped
        try:
            assert process.stderr.readline() == f"listening on {socket}\n"
            reader.start()

            def report() -> Any:
                reader.join(60)
                assert said, "the judge does not end with its front-end"
                return json.loads(said[0])

            yield socket, report
        finally:
            process.kill()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(4 * MIB))
    return path


def failed(report: Any) -> dict[str, str]:
    return {r["id"]: r["reason"] for r in report["results"] if r["verdict"] == "FAIL"}


def passed(report: Any) -> set[str]:
    return {r["id"] for r in report["results"] if r["verdict"] == "PASS"}


DRIVEN = {"avail.head-free", "desc.order", "indirect.chain", "notify.sent", "blk.capacity"}


@pytest.mark.parametrize(
    ("viommu", "qemu"),
    [
        pytest.param(Viommu.NONE, "debian", id="none-debian"),
        pytest.param(Viommu.VIRTIO, "new", id="virtio-new"),
    ],
)
def test_qemu_and_linux(
    viommu: Viommu, qemu: str, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if qemu == "new":
        monkeypatch.setenv("GUESTIO_LAB_QEMU", str(new_qemu()))
    options = ("--iommu",) if viommu.present else ()
    before = hashlib.sha256(image.read_bytes()).hexdigest()
    with judging(tmp_path, image, *options) as (socket, report):
        result: GuestResult = (
            Guest(
                disks=[VhostUserDisk(socket)],
                viommu=viommu,
                scripts=[Script.named("sha256")],
                timeout=LIMIT,
            )
            .run(tmp_path)
            .check()
        )
        found = report()
    assert result.facts["sha256"] == before
    assert failed(found) == {}
    assert passed(found) >= DRIVEN
    assert ("iotlb.miss-answered" in passed(found)) == viommu.present


def test_user_mode_linux(image: Path, tmp_path: Path) -> None:
    before = hashlib.sha256(image.read_bytes()).hexdigest()
    with judging(tmp_path, image) as (socket, report):
        guest = UmlGuest(
            disks=[VhostUserDisk(socket)], scripts=[Script.named("sha256")], timeout=LIMIT
        )
        result = guest.run(tmp_path).check()
        found = report()
    assert result.facts["sha256"] == before
    assert failed(found) == {}
    assert passed(found) >= DRIVEN


def test_libblkio(image: Path, tmp_path: Path) -> None:
    with judging(tmp_path, image) as (socket, report):
        options = f"driver=virtio-blk-vhost-user,path={socket},cache.direct=on"
        commands = ["write -P 90 64k 128k", "flush", "read -P 90 64k 128k", "write -z 0 4k"]
        words = [str(new_qemu("qemu-io")), "--image-opts", options]
        done = subprocess.run(
            [*words, *(word for command in commands for word in ("-c", command))],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = report()
    assert image.read_bytes()[65536:196608] == b"\x5a" * 131072
    assert failed(found) == {}
    assert passed(found) >= DRIVEN - {"indirect.chain"}
