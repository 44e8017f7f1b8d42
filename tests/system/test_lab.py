"""The lab itself, with QEMU's own disk, so that a failure elsewhere is not the lab's."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import parts
from lab.guest import MIB, Guest, GuestError, GuestResult, QemuDisk, Script, Viommu
from lab.qemu import new_qemu
from lab.uml import uml_kernel

PATTERN = bytes(range(256)) * 300
PATTERN_OFFSET = 3 * MIB + 512
DISK_SIZE = 8 * MIB


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lab") / "disk,with comma.img"
    path.write_bytes(os.urandom(DISK_SIZE))
    return path


@pytest.fixture(scope="module")
def before(image: Path) -> bytes:
    return image.read_bytes()


@pytest.fixture(scope="module")
def result(image: Path, before: bytes, guest_kernel: parts.Kernel) -> GuestResult:
    guest = Guest(
        disks=[QemuDisk(image)],
        viommu=Viommu.VIRTIO,
        environment={"PATTERN_OFFSET": str(PATTERN_OFFSET), "WORD": "it's here"},
        files={"/lab/pattern": PATTERN},
        scripts=[
            Script.named("sha256"),
            Script.named("pattern"),
            Script("fails", 'echo "FACT word=$WORD"; exit 3\n'),
            Script("never", "echo FACT never=1\n"),
        ],
    )
    return guest.run()


def test_the_guest_reads_the_whole_disk(result: GuestResult, before: bytes) -> None:
    assert result.scripts["sha256"].status == 0
    assert result.scripts["sha256"].facts == {
        "size": str(DISK_SIZE),
        "sha256": hashlib.sha256(before).hexdigest(),
    }


def test_the_guest_writes_where_it_was_told_and_nowhere_else(
    result: GuestResult, before: bytes, image: Path
) -> None:
    assert result.scripts["pattern"].status == 0
    end = PATTERN_OFFSET + len(PATTERN)
    assert image.read_bytes() == before[:PATTERN_OFFSET] + PATTERN + before[end:]


def test_the_disk_is_behind_the_viommu_of_the_fetched_kernel(
    result: GuestResult, guest_kernel: parts.Kernel
) -> None:
    assert result.facts["iommu"] == "DMA-FQ"
    assert result.facts["kernel"] == guest_kernel.release


def test_a_failing_script_ends_the_guest_and_is_named(result: GuestResult) -> None:
    assert list(result.scripts) == ["sha256", "pattern", "fails"]
    assert (result.status, result.scripts["fails"].status) == (3, 3)
    assert result.facts["word"] == "it's here"
    assert (result.timed_out, result.qemu_status) == (False, 0)
    with pytest.raises(GuestError, match=r"fails failed with status 3(.|\n)*GUEST-RESULT rc=3"):
        result.check()


def test_a_guest_that_takes_too_long_is_killed() -> None:
    late = Guest(scripts=[Script("sleeps", "sleep 1000\n")], timeout=1.0).run()
    assert late.timed_out
    assert late.status is None
    assert late.qemu_status == -signal.SIGKILL
    assert late.seconds < 60
    with pytest.raises(GuestError, match=r"did not finish within its time after \d+ s"):
        late.check()


def test_leaving_the_context_kills_the_guest_whatever_happened(tmp_path: Path) -> None:
    guest = Guest(scripts=[Script("sleeps", "echo FACT asleep=1; sleep 1000\n")])
    with contextlib.suppress(ZeroDivisionError), guest.boot(tmp_path) as running:
        running.wait_for("FACT asleep=1")
        with pytest.raises(GuestError, match="never reported 'FACT awake=1'"):
            running.wait_for("FACT awake=1", timeout=0.1)
        _ = 1 // 0
    assert not Path(f"/proc/{running.pid}").exists()
    assert "FACT asleep=1" in (tmp_path / "report.log").read_text()


def _runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # gone, before or while it was read
        return False


@contextlib.contextmanager
def _killed_at_the_end(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_qemu_dies_with_a_process_that_is_killed(guest_kernel: parts.Kernel) -> None:
    boots = "from lab.guest import Guest; print(Guest().boot().pid, flush=True); input()"
    with _killed_at_the_end([sys.executable, "-c", boots]) as process:
        assert process.stdout is not None
        qemu = int(process.stdout.readline())
        assert _runs(qemu)
    end = time.monotonic() + 60
    while _runs(qemu):
        assert time.monotonic() < end, "QEMU outlived the process that started it"
        time.sleep(0.02)


def test_modules_come_after_what_they_depend_on(guest_kernel: parts.Kernel) -> None:
    names = [module.name for module in guest_kernel.modules(["vfio-pci", "virtio_blk", "ext4"])]
    assert names.index("vfio") < names.index("vfio_pci_core") < names.index("vfio_pci")
    assert "virtio_blk" in names
    assert "ext4" not in names, "built in, nothing to insert"
    with pytest.raises(parts.PartsError, match="has no module no_such_thing"):
        guest_kernel.modules(["no-such-thing"])


def test_a_missing_program_is_named_with_its_package() -> None:
    with pytest.raises(parts.PartsError, match=r"apt-get install .* some-package"):
        parts.require_program("no-such-program", "some-package")


@pytest.mark.parametrize(("fetch", "module"), [(uml_kernel, "lab.uml"), (new_qemu, "lab.qemu")])
def test_what_cannot_be_fetched_is_named_with_the_command_that_fetches_it(
    fetch: Callable[[], object], module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUESTIO_LAB_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(parts.PartsError, match=rf"is not to be had.*(?s:.*)`python -m {module}`"):
        fetch()


def test_a_cached_kernel_serves_without_writing_or_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for release in ("6.12.9-cloud-amd64", "6.12.90-cloud-amd64", "6.13-unfinished"):
        (tmp_path / "kernels" / release / "boot").mkdir(parents=True)
    for release in ("6.12.9-cloud-amd64", "6.12.90-cloud-amd64"):
        (tmp_path / "kernels" / release / "boot" / f"vmlinuz-{release}").touch()
    monkeypatch.setenv("GUESTIO_LAB_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert parts.kernel().release == "6.12.90-cloud-amd64"
    assert [path.name for path in tmp_path.iterdir()] == ["kernels"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "sources.list",
            (
                "# main archive\n"
                "deb-src http://mirror/debian bookworm main\n"
                "deb [arch=amd64 signed-by=/key.gpg] http://mirror/debian bookworm main extra # x\n"
            ),
        ),
        (
            "sources.list.d/debian.sources",
            (
                "Types: deb\nURIs: http://elsewhere/extras\nSuites: stable\nComponents: main\n\n"
                "Types: deb deb-src\n# a comment\nURIs: http://mirror/debian\n"
                "Suites: bookworm bookworm-updates\nComponents: main contrib\nSigned-By: /key.gpg\n"
            ),
        ),
    ],
)
def test_the_private_source_uses_the_machines_mirror_and_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert parts.debian_source("bookworm-backports", "bookworm", tmp_path) == (
        "Types: deb\nURIs: http://mirror/debian\nSuites: bookworm-backports\n"
        "Components: main\nArchitectures: amd64\nSigned-By: /key.gpg\n"
    )
    with pytest.raises(parts.PartsError, match="no source for `trixie main`"):
        parts.debian_source("trixie-backports", "trixie", tmp_path)
