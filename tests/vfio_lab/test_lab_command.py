"""`./run lab FILE`: what it runs, with what, and what it says when it cannot."""

import hashlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lab.kernel import CONFIG, cached
from lab.vfio import NO_GUEST, REPOSITORY, VfioKernel, guest_for, python_command

KERNEL = VfioKernel(Path("/boot/none"))


def lab(*arguments: object, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lab.vfio", *map(str, arguments)],
        cwd=REPOSITORY,
        env=None if cache is None else {"PATH": "/usr/bin:/bin", "GUESTIO_LAB_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_test_files_are_run_by_pytest_and_others_by_python(tmp_path: Path):
    assert python_command(Path("/x/probe.py"), ["a"]) == [sys.executable, "/x/probe.py", "a"]
    for path in (Path("/x/test_probe.py"), tmp_path):
        command = python_command(path, ["-k", "b"])
        assert command[:3] == [sys.executable, "-m", "pytest"]
        assert command[-3:] == [str(path), "-k", "b"]


def test_the_job_survives_odd_names(monkeypatch):
    monkeypatch.setenv("LANG", "it's; $(odd)")
    guest = guest_for(Path("/x/a b.py"), ["it's", "$HOME"], on=KERNEL)
    job = guest._job()
    done = subprocess.run(
        ["sh", "-c", job.replace("exec ", "printf '%s|' \"$LANG\" ")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split("|")[:5] == [
        "it's; $(odd)",
        sys.executable,
        "/x/a b.py",
        "it's",
        "$HOME",
    ]


def test_every_line_of_the_kernel_configuration_is_an_option():
    lines = CONFIG.read_text().splitlines()
    options = [line for line in lines if line and not line.startswith("#")]
    assert all(line.startswith("CONFIG_") and "=" in line for line in options)
    assert len(set(options)) == len(options)


def test_the_newest_cached_kernel_is_taken(tmp_path: Path, monkeypatch):
    """Of those of this configuration; and those whose configuration is not known."""
    monkeypatch.setenv("GUESTIO_LAB_CACHE", str(tmp_path))
    digest = hashlib.sha256(CONFIG.read_bytes()).hexdigest()[:8]

    def cache(name: str) -> Path:
        (tmp_path / "iommufd" / name).mkdir(parents=True)
        if name != "building-x":
            (tmp_path / "iommufd" / name / "bzImage").touch()
        return tmp_path / "iommufd" / name / "bzImage"

    for name in ("building-x", "7.2.12-ffffffff"):
        cache(name)
        assert cached() is None
    cache(f"7.9.30-{digest}")
    newer = cache(f"7.10.1-{digest}")
    cache("7.11.0-ffffffff")
    assert cached() == newer
    put_there = cache("7.11.0")
    assert cached() == put_there


def test_a_file_that_is_not_there():
    done = lab("no-such-file.py")
    assert done.returncode == 2
    assert "no-such-file.py" in done.stderr


@pytest.mark.system
def test_a_file_of_the_host_runs_in_the_guest(tmp_path: Path):
    script = tmp_path / "probe.py"
    script.write_text(
        textwrap.dedent("""
        import os, pathlib, sys
        print("arguments", sys.argv[1:], os.environ["GUESTIO_LAB_GUEST"], os.getuid())
        print("same python", sys.executable)
        print("directory", os.getcwd())
        pathlib.Path(__file__).with_name("written").write_text("in the guest only")
        devices = pathlib.Path("/sys/bus/pci/drivers/vfio-pci").glob("0000:*")
        print("devices", len(list(devices)))
        print("to the other stream", file=sys.stderr)
        print()
        print("no end of line", end="")
        sys.exit(7)
        """)
    )
    done = lab(script, "one", "two words")
    assert done.returncode == 7, done.stderr
    assert done.stdout.splitlines() == [
        "arguments ['one', 'two words'] 1 0",
        f"same python {sys.executable}",
        f"directory {REPOSITORY}",
        "devices 2",
        "to the other stream",
        "",
        "no end of line",
    ]
    assert not (tmp_path / "written").exists()


@pytest.mark.system
def test_a_guest_that_takes_too_long(tmp_path: Path):
    script = tmp_path / "endless.py"
    script.write_text("while True: pass\n")
    done = lab("--timeout", 8, script)
    assert done.returncode == NO_GUEST
    assert "did not finish within its time" in done.stderr
