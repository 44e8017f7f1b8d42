"""A disk's driver, its guest and its device come and go, and the disk is right each time.

User-mode Linux lives such lives in a second, so it lives many. `./run lab-reloads` is the campaign:
50 reloads behind every IOMMU that QEMU has, 200 in User-mode Linux.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lab.guest import MIB, Script, VhostUserDisk
from lab.reloads import DISK_SIZE, reload_disk, served
from lab.uml import UmlGuest, shim, uml_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.parts import Kernel

UML_RELOADS = 40
QEMU_RELOADS = 5
BOOTS = 3
SUSPEND_TIMES = 10
PATTERN_AT = 3 * MIB + 512

# Counts boots in the disk's first sector, and boots again until there were enough.
REBOOTS = f"""
boots=$(dd if=/dev/vda bs=512 count=1 iflag=direct status=none | head -c 2)
boots=$((boots + 1))
printf '%02d' "$boots" | dd of=/dev/vda bs=512 conv=sync,notrunc oflag=direct status=none
echo "FACT boots=$boots"
[ "$boots" -ge {BOOTS} ] || reboot -f
"""

# Suspends while a writer checks what it wrote; the host wakes it by a signal.
SUSPENDS = f"""
touch /tmp/load
writer() {{
    while [ -e /tmp/load ]; do
        dd if=/dev/urandom of=/tmp/new bs=4096 count=32 status=none
        dd if=/tmp/new of=/dev/vda bs=4096 oflag=direct conv=notrunc status=none || return 1
        dd if=/dev/vda bs=4096 count=32 iflag=direct status=none >/tmp/back || return 1
        cmp /tmp/new /tmp/back || return 1
    done
}}
writer &
asleep=0
while [ "$asleep" -lt {SUSPEND_TIMES} ]; do
    usleep 30000
    # Woken too early it does not fall asleep.
    echo freeze >/sys/power/state 2>/dev/null && asleep=$((asleep + 1))
done
rm /tmp/load
wait $! || exit 1
echo "FACT suspends=$asleep"
echo "FACT written=$(sha256sum </tmp/new | cut -d' ' -f1)"
"""

READS_FOR_EVER = """
while :; do
    dd if=/dev/vda of=/dev/null bs=64k iflag=direct status=none
    echo "FACT reads=yes"
done
"""


@pytest.fixture(scope="module")
def uml() -> Kernel:
    """User-mode Linux, fetched if need be. Never skips: without it nothing here is tested."""
    shim()
    return uml_kernel()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, VhostUserDisk, Path]]:
    """A served image of random bytes; the disk, and the back-end's log."""
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(DISK_SIZE))
    with served(image, tmp_path, "--iommu", "off") as (socket, log):
        yield image, VhostUserDisk(socket), log
    print(log.read_text())  # shown where the test failed


def complaints(log: Path) -> list[str]:
    """What the back-end said of a front-end that was disconnected, or of a queue."""
    words = ("disconnected", "stopped")
    return [line for line in log.read_text().splitlines() if any(word in line for word in words)]


def of_uml() -> list[str]:
    """All running processes of User-mode Linux."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
            state = (path.parent / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # gone, before or while it was read
            continue
        if b"linux.uml" in command and state != "Z":
            found.append(command.replace(b"\0", b" ").decode())
    return found


def test_user_mode_linux_uses_the_disk(
    uml: Kernel, disk: tuple[Path, VhostUserDisk, Path], tmp_path: Path
) -> None:
    image, served_disk, log = disk
    before = hashlib.sha256(image.read_bytes()).hexdigest()
    pattern = os.urandom(MIB)
    guest = UmlGuest(
        disks=[served_disk],
        scripts=[Script.named("sha256"), Script.named("pattern")],
        environment={"PATTERN_OFFSET": str(PATTERN_AT)},
        files={"/lab/pattern": pattern},
    )
    result = guest.run(tmp_path / "guest").check()
    assert result.facts["kernel"] == uml.release
    assert result.facts["sha256"] == before
    with image.open("rb") as file:
        file.seek(PATTERN_AT)
        assert file.read(len(pattern)) == pattern
    assert complaints(log) == []


def test_user_mode_linux_boots_again_and_again(
    uml: Kernel, disk: tuple[Path, VhostUserDisk, Path], tmp_path: Path
) -> None:
    image, served_disk, log = disk
    guest = UmlGuest(disks=[served_disk], scripts=[Script("reboots", REBOOTS)])
    with image.open("r+b") as file:
        file.write(b"00")
    result = guest.run(tmp_path / "guest").check()
    assert result.facts["boots"] == str(BOOTS)
    assert image.read_bytes()[:2] == b"%02d" % BOOTS
    assert complaints(log) == []


def test_a_guest_that_is_killed_makes_room_for_the_next(
    uml: Kernel, disk: tuple[Path, VhostUserDisk, Path], tmp_path: Path
) -> None:
    image, served_disk, log = disk
    guest = UmlGuest(disks=[served_disk], scripts=[Script("reads", READS_FOR_EVER)])
    with guest.boot(tmp_path / "killed") as running:
        running.wait_for("FACT reads=yes")
        running.kill()
    mine = f"uml_dir={tmp_path}"
    end = time.monotonic() + 60
    while left := [command for command in of_uml() if mine in command]:
        assert time.monotonic() < end, left
        time.sleep(0.02)
    following = UmlGuest(disks=[served_disk], scripts=[Script.named("sha256")])
    result = following.run(tmp_path / "next").check()
    assert result.facts["sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
    assert re.findall(r"front-end (\d+) gone", log.read_text())[0] == "1"


def test_user_mode_linux_suspends_under_load(
    uml: Kernel, disk: tuple[Path, VhostUserDisk, Path], tmp_path: Path
) -> None:
    """The driver resets the device and sets it up again amid requests."""
    image, served_disk, log = disk
    guest = UmlGuest(disks=[served_disk], scripts=[Script("suspends", SUSPENDS)])
    with guest.boot(tmp_path / "guest") as running:
        running.wait_for("GUEST-BEGIN suspends")
        end = time.monotonic() + 300
        report = tmp_path / "guest/report.log"
        while "FACT suspends=" not in report.read_text() and time.monotonic() < end:
            with contextlib.suppress(ProcessLookupError):
                os.kill(running.pid, signal.SIGUSR1)
            time.sleep(0.05)
        result = running.wait().check()
    assert int(result.facts["suspends"]) == SUSPEND_TIMES
    written = image.read_bytes()[: 32 * 4096]
    assert hashlib.sha256(written).hexdigest() == result.facts["written"]
    assert complaints(log) == []


def test_user_mode_linux_reloads_its_driver(uml: Kernel, tmp_path: Path) -> None:
    result = reload_disk("uml", UML_RELOADS, tmp_path)
    assert result.facts["lives"] == str(UML_RELOADS)


@pytest.mark.parametrize("guest", ["virtio"])
def test_linux_under_qemu_reloads_its_driver(
    guest: str, guest_kernel: Kernel, tmp_path: Path
) -> None:
    result = reload_disk(guest, QEMU_RELOADS, tmp_path, blocks=64)
    assert result.facts["iommu"].startswith("DMA")
