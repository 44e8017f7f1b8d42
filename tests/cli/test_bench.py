"""``guestio bench``, run as a user runs it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kit.disks import storage_daemon

SCHEMA: dict[str, Any] = {
    "transport": str,
    "workload": str,
    "block_size": int,
    "depth": int,
    "queues": int,
    "queue_size": int,
    "iommu": str,
    "granularity": str,
    "acknowledge": str,
    "verify": bool,
    "polling": bool,
    "indirect": bool,
    "contiguous": bool,
    "seconds": float,
    "interrupted": bool,
    "requests": int,
    "reads": int,
    "writes": int,
    "bytes": int,
    "iops": float,
    "mb_per_s": float,
    "latency_us": {"mean": float, "p50": float, "p99": float, "max": float},
    "kicks": int,
    "interrupts": int,
    "iotlb": {
        "misses": int,
        "updates": int,
        "invalidations": int,
        "refused": int,
        "access_fails": int,
    },
    "cpu": {"pid": int, "seconds": float, "us_per_request": float},
}


def bench(
    *arguments: str | Path, cwd: Path | None = None, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "guestio", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=cwd,
    )


def measured(*arguments: str | Path) -> dict[str, Any]:
    """What ``--json`` says, after a look at its shape."""
    done = bench(*arguments, "--json", "--time", "0.3", "--warm-up", "0.1")
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    check(said, SCHEMA if said["cpu"] is not None else {**SCHEMA, "cpu": type(None)})
    return said


def check(said: dict[str, Any], schema: dict[str, Any]) -> None:
    assert list(said) == list(schema)
    for name, kind in schema.items():
        if isinstance(kind, dict):
            check(said[name], kind)
        else:
            assert type(said[name]) is kind, name


def test_help_teaches() -> None:
    text = bench("--help").stdout
    for needed in (
        "guestio blk disk.img",
        "qemu-storage-daemon",
        "THE DISK IS OVERWRITTEN",
        "--pid",
        "strict",
        "taskset",
        "130",
    ):
        assert needed in text, needed


@pytest.mark.parametrize("iommu", ["off", "static", "strict"])
def test_json(tmp_path: Path, serve: Callable[..., subprocess.Popen[str]], iommu: str) -> None:
    process = serve()
    said = measured(
        *(tmp_path / "s.sock", "--iommu", iommu, "--workload", "randrw", "--depth", "8"),
        *("--pid", str(process.pid)),
    )
    assert said["iommu"] == iommu
    assert said["workload"] == "randrw"
    assert said["depth"] == 8
    assert said["requests"] == said["reads"] + said["writes"] > 0
    assert said["bytes"] == 4096 * said["requests"]
    assert said["iops"] == pytest.approx(said["requests"] / said["seconds"])
    assert said["cpu"]["pid"] == process.pid
    assert 0 < said["cpu"]["us_per_request"] < 1e5
    assert (said["iotlb"]["invalidations"] > 0) == (iommu == "strict")
    assert not said["interrupted"]


def test_a_foreign_back_end(tmp_path: Path) -> None:
    with storage_daemon(tmp_path) as disk:
        said = measured(disk.socket, "--block-size", "64k", "--workload", "read", "--polling")
        assert said["block_size"] == 65536
        assert said["polling"]
        assert said["cpu"] is None
        assert said["mb_per_s"] == pytest.approx(said["iops"] * 65536 / 1e6)
        assert disk.image.read_bytes() == disk.contents


@pytest.mark.parametrize("iommu", ["off", "strict"])
def test_the_table(tmp_path: Path, serve: Callable[..., Any], iommu: str) -> None:
    process = serve("--num-queues", "2")
    done = bench(
        *(tmp_path / "s.sock", "--time", "0.3", "--verify", "--span", "1m", "--depth", "4"),
        *("--queues", "2", "--iommu", iommu, "--pid", str(process.pid)),
    )
    assert done.returncode == 0, done.stderr
    for needed in ("IOPS", "MB/s", "latency p99", "us a request", "2 queues", "had been written"):
        assert needed in done.stdout, needed
    assert ("IOTLB misses" in done.stdout) == (iommu != "off")


def test_progress_while_it_runs(tmp_path: Path, serve: Callable[..., Any]) -> None:
    serve()
    process = subprocess.Popen(
        [sys.executable, "-m", "guestio", "bench", tmp_path / "s.sock", "--time", "30", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines = [process.stderr.readline() for _ in range(2)]
    assert all("IOPS" in line and "%" in line for line in lines), lines
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in err
    said = json.loads(out)
    assert said["interrupted"]
    assert said["requests"] > 0
    assert 0 < said["seconds"] < 20


def test_the_back_end_lives_on_after_an_interrupt(
    tmp_path: Path, serve: Callable[..., subprocess.Popen[str]]
) -> None:
    server = serve()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "guestio", "bench", tmp_path / "s.sock"),
            *("--time", "30", "--iommu", "strict"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM
    assert "IOPS" in out
    assert server.poll() is None
    assert measured(tmp_path / "s.sock")["requests"] > 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "Missing argument"),
        (["s.sock", "--workload", "trim"], "trim"),
        (["s.sock", "--block-size", "5x"], "5x"),
        (["s.sock", "--block-size", "1000"], "multiple of 512"),
        (["s.sock", "--depth", "0"], "depth 0"),
        (["s.sock", "--depth", "many"], "many"),
        (["s.sock", "--time", "0"], "time"),
        (["s.sock", "--time", "nan"], "not a number of seconds"),
        (["s.sock", "--queues", "0"], "queues 0"),
        (["s.sock", "--queues", "9"], "9 queues are wanted, the device has 1"),
        (["s.sock", "--queue-size", "100"], "power of two"),
        (["s.sock", "--iommu", "lazy"], "lazy"),
        (["s.sock", "--span", "1g"], "of a disk of"),
        (["s.sock", "--pid", "4194305"], "no process 4194305"),
        (["s.sock", "--verify"], "read-only"),
        (["s.sock", "--workload", "write"], "read-only"),
        (["absent.sock"], "cannot connect to absent.sock"),
        (["disk.img"], "cannot connect to disk.img"),
        (["s.sock", "--nonsense"], "nonsense"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(
    tmp_path: Path, serve: Callable[..., Any], arguments: list[str], complaint: str
) -> None:
    serve("--read-only")
    done = bench(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert complaint in done.stderr


def test_a_failure_is_one_line_and_status_1(
    tmp_path: Path, serve: Callable[..., subprocess.Popen[str]]
) -> None:
    server = serve()
    process = subprocess.Popen(
        [sys.executable, "-m", "guestio", "bench", tmp_path / "s.sock", "--time", "30"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    process.stderr.readline()
    server.kill()
    out, err = process.communicate(timeout=10)
    assert process.returncode == 1
    assert out == ""
    complaints = [line for line in err.splitlines() if "IOPS" not in line]
    assert complaints == ["guestio: the back-end went away"]


def test_wrong_contents_are_a_failure(tmp_path: Path, serve: Callable[..., Any]) -> None:
    """Another process writes to the image while it is verified."""
    serve()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "guestio", "bench", tmp_path / "s.sock"),
            *("--verify", "--time", "30", "--span", "1m"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    process.stderr.readline()
    with (tmp_path / "disk.img").open("r+b") as image:
        image.write(b"!" * (1 << 20))
    out, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert out == ""
    assert "holds something else" in err


def test_the_side_by_side_benchmark_runs() -> None:
    command = [sys.executable, "-m", "bench", "block", "--rounds", "1", "--time", "0.2", "--json"]
    done = subprocess.run(
        [*command, "--only", "128K"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["case"]["server"], row["case"]["iommu"]) for row in rows] == [
        ("qemu-storage-daemon", "off"),
        ("guestio", "off"),
        ("guestio", "static"),
        ("guestio", "strict"),
    ]
    for row in rows:
        (said,) = row["measured"]
        assert said["block_size"] == 128 << 10
        assert said["requests"] > 0
        assert said["cpu"]["us_per_request"] > 0
