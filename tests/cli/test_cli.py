"""The ``guestio`` command, run as a user runs it."""

import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import guestio
from guestio._core.base import variant
from guestio.cli.version import extras
from guestio.guest import ScriptedGuest

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]


def run(*arguments: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "guestio", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_version_names_the_package_the_build_and_the_extras():
    first, *others = run("--version").stdout.splitlines()
    assert first == f"guestio, version {guestio.__version__}"
    said = dict(line.split(": ", 1) for line in others)
    name, compiler, checks = said["core"].split(", ")
    assert name == variant.NAME
    assert re.match(r"(GCC|Clang|.*clang.*) \d+\.", compiler)
    assert checks == ("assertions on" if variant.CHECKS else "assertions off")
    assert said["Python"].endswith(platform.python_version())
    assert platform.machine() in said["platform"]
    assert {line for line in said if line.startswith("extra ")} == {
        f"extra {extra}" for extra in PROJECT["optional-dependencies"] if extra != "dev"
    }


def test_version_names_what_an_extra_lacks(monkeypatch):
    def version(name):
        if name == "h11":
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(metadata, "version", version)
    found = extras()
    assert found.pop("control") == ["h11"]
    assert not any(found.values())


def test_help_teaches_a_whole_qemu_command_line():
    text = run("blk", "--help").stdout
    for needed in ("memory-backend-memfd", "share=on", "virtio-iommu-pci", "iommu_platform=on"):
        assert needed in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["blk"], "Missing argument"),
        (["blk", "absent.img", "--socket", "s"], "cannot open the image absent.img"),
        (["blk", "disk.img"], "say where to listen"),
        (["blk", "disk.img", "--socket", "x" * 120], "at most 107"),
        (["blk", "disk.img", "--socket", "no/such/dir/s"], "cannot listen on"),
        (["blk", "disk.img", "--socket", "disk.img"], "not a socket"),
        (["blk", "disk.img", "--socket", "s", "--num-queues", "0"], "num-queues"),
        (["blk", "disk.img", "--socket", "s", "--io-threads", "65"], "io-threads"),
        (["blk", "disk.img", "--socket", "s", "--io-threads", "-1"], "io-threads"),
        (["blk", "disk.img", "--socket", "s", "--serial", "x" * 21], "longer than 20"),
        (["blk", "disk.img", "--socket", "s", "--iommu", "maybe"], "maybe"),
        (["blk", "odd.img", "--socket", "s"], "multiple of 512"),
        (["blk", ".", "--socket", "s"], "cannot open the image"),
        (["nonsense"], "nonsense"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch, arguments, complaint
):
    (tmp_path / "odd.img").write_bytes(b"x" * 513)
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert complaint in done.stderr
    assert not (tmp_path / "s").exists()


def test_a_socket_in_use_is_refused_and_left_alone(tmp_path: Path, image: Path):
    path = tmp_path / "busy.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        done = run("blk", image, "--socket", path)
    assert done.returncode == 2
    assert "another process" in done.stderr
    assert path.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_cleanly(tmp_path: Path, serve, number):
    process = serve()
    process.send_signal(number)
    assert process.wait(60) == 0
    assert not (tmp_path / "s.sock").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_with_a_guest_connected(tmp_path: Path, serve, number):
    process = serve("--serial", "disk-7")
    with ScriptedGuest(tmp_path / "s.sock", iommu="strict") as guest:
        assert guest.get_id() == b"disk-7"
        process.send_signal(number)
        assert process.wait(60) == 0
    assert not (tmp_path / "s.sock").exists()


def test_read_only_image_and_reconnection(tmp_path: Path, image: Path, serve):
    image.chmod(0o444)
    serve("--read-only", "--num-queues", "4")
    for iommu in ("off", "static", "strict"):
        with ScriptedGuest(tmp_path / "s.sock", iommu=iommu, queues=4) as guest:
            assert guest.config.num_queues == 4
            for queue in range(4):
                assert guest.read(8, 4096, queue=queue) == image.read_bytes()[4096:8192]


@pytest.mark.parametrize("threads", ["0", "1", "64"])
def test_threads_that_wait_for_the_disk(tmp_path: Path, image: Path, serve, threads: str):
    process = serve("--io-threads", threads)
    contents = image.read_bytes()
    with ScriptedGuest(tmp_path / "s.sock", iommu="strict") as guest:
        alone = thread_count(process.pid)
        for sector in (0, 8, 8000):
            with image.open("r+b") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert guest.read(sector, 4096) == contents[512 * sector : 512 * sector + 4096]
            guest.flush()
        started = thread_count(process.pid) - alone
    assert started == 0 if threads == "0" else 1 <= started <= int(threads)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def thread_count(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def test_iommu_can_be_kept_off(tmp_path: Path, serve):
    serve("--iommu", "off")
    with pytest.raises(guestio.DeviceError, match="IOMMU"):
        ScriptedGuest(tmp_path / "s.sock", iommu="strict")


def test_demo_shows_that_every_check_held():
    done = run("demo", "--seconds", "1", timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every check held" in done.stdout
    assert "4 of 4" in done.stdout
    assert re.search(r"disk with --fault .*: caught: ", done.stdout)
    assert re.search(r"recording of 1 s: [\d,]+ requests", done.stdout)
    assert re.search(r"live .*: http://127\.0\.0\.1:\d+/#token=", done.stdout)
    assert done.stdout.count(": refused") == 4
    rows = dict(re.findall(r"│ (\S[\w ]*?) +│ +([\d,]+)\D", done.stdout))
    for name in ("requests", "IOTLB hits", "IOTLB misses", "IOTLB invalidations", "dirty pages"):
        assert int(rows[name].replace(",", "")) > 0, name


def test_demo_says_when_a_check_fails():
    done = run("demo", "--seconds", "1", "--fault", "corrupt op=read every=50", timeout=280)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "a check failed" in done.stdout
    assert "every check held" not in done.stdout


def test_demo_refuses_a_rule_that_is_none():
    done = run("demo", "--fault", "corrupt evry=3")
    assert done.returncode == 2
    assert "evry" in done.stderr
    assert not done.stdout
