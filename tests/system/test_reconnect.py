"""A real Linux guest goes on with its disk although ``guestio blk`` is killed amid its requests."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from guestio._core.virtio.inflight import part_size
from lab.guest import MIB, Guest, Script, VhostUserDisk, Viommu
from lab.parts import Kernel, require_program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

QUEUES = 2
# Given to QEMU: 10.0.13 lets the driver have rings of 1024 entries whatever it is told, and has
# notes for as many as it was told.
QUEUE_SIZE = 1024
KILLS = 6
BUSY = 4  # requests in flight at a kill, at least
WRITERS = 8
AREA = 4 * MIB
STOP_AT = 63 * MIB

# Every writer writes random bytes to its area, reads them back and compares, until the host says
# stop on the disk itself.
WORK = f"""
set -eu
stopped() {{
    word=$(dd if=/dev/vda bs=512 skip={STOP_AT // 512} count=1 iflag=direct status=none | head -c 4)
    [ "$word" = stop ]
}}
work() {{
    while :; do
        dd if=/dev/urandom of="/tmp/written$1" bs={AREA} count=1 status=none
        dd if="/tmp/written$1" of=/dev/vda bs={AREA} seek="$1" oflag=direct \\
            conv=notrunc status=none || return 1
        dd if=/dev/vda of="/tmp/read$1" bs=64k skip=$(($1 * {AREA >> 16})) count={AREA >> 16} \\
            iflag=direct status=none || return 1
        cmp "/tmp/written$1" "/tmp/read$1" || return 1
        ! stopped || break
    done
    sum=$(sha256sum <"/tmp/written$1")
    echo "FACT sum$1=${{sum%% *}}"
}}
echo "FACT working=yes"
workers=
i=0
while [ "$i" -lt {WRITERS} ]; do
    work "$i" &
    workers="$workers $!"
    i=$((i + 1))
done
for worker in $workers; do
    wait "$worker" || {{ echo "worker $worker of $workers failed"; exit 1; }}
done
"""


# `guestio blk` on a disk that takes its time: requests overtake each other all the time.
SLOW_DISK = """
import random, sys, time
from concurrent.futures import ThreadPoolExecutor
from guestio.vhost_user import Backend
from guestio.virtio.blk import BlockDevice
from guestio.virtio.device import Device, settled

class SlowDisk(Device):
    device_id = BlockDevice.device_id

    def __init__(self, disk):
        self._disk, self._pool = disk, ThreadPoolExecutor(64)
        self.num_queues, self.features, self.config = disk.num_queues, disk.features, disk.config

    def process(self, queue, chain):
        return self._pool.submit(self._late, queue, chain)

    def _late(self, queue, chain):
        time.sleep(random.random() / 50)
        return settled(self._disk.process(queue, chain))

image, _, path, _, queues = sys.argv[1:]
with Backend(SlowDisk(BlockDevice(image, num_queues=int(queues))), path) as back:
    print("listening on", back.path, file=sys.stderr, flush=True)
    back.serve()
"""


class BackEnd:
    """A running back-end.

    Args:
        program: What the interpreter is told to run.
        log: Where its standard error goes.
    """

    def __init__(self, program: list[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen([sys.executable, *program], stderr=stderr)
        deadline = time.monotonic() + 60
        while "listening on" not in log.read_text():
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)

    def hold(self) -> None:
        """Stop it where it is."""
        self.process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), self.log.read_text()

    def release(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it wherever it is."""
        self.process.kill()
        self.process.wait()


class ReconnectingDisk(VhostUserDisk):
    """A disk whose back-end may go away and come back."""

    __slots__ = ()

    def arguments(self, index: int, viommu: Viommu) -> list[str]:
        """QEMU arguments; see `Disk`."""
        # QEMU 9.2 deprecates seconds and counts in milliseconds.
        option = "reconnect-ms=100" if _qemu_version() >= (9, 2) else "reconnect=1"
        more = {"socket,": option, "vhost-user-blk-pci,": f"queue-size={QUEUE_SIZE}"}
        return [
            next((f"{word},{add}" for start, add in more.items() if word.startswith(start)), word)
            for word in super().arguments(index, viommu)
        ]


def _qemu_version() -> tuple[int, int]:
    qemu = os.environ.get("GUESTIO_LAB_QEMU") or require_program(
        "qemu-system-x86_64", "qemu-system-x86"
    )
    said = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"version (\d+)\.(\d+)", said)
    assert version, said
    return int(version[1]), int(version[2])


class Tracked:
    """The region for requests in flight, as the front-end has it."""

    def __init__(self, memory: mmap.mmap) -> None:
        parts = np.frombuffer(memory, np.uint8).reshape(QUEUES, part_size(QUEUE_SIZE))
        self._flags = parts[:, 16 : 16 + 16 * QUEUE_SIZE : 16]
        self._used = parts[:, 14:16]

    def in_flight(self) -> int:
        """Requests of all queues that are marked."""
        return int(np.count_nonzero(self._flags))

    def used(self) -> np.ndarray:
        """The used index of every queue, as noted here last."""
        return self._used.copy().view(np.uint16)[:, 0]


@contextmanager
def tracked(qemu: int) -> Iterator[Tracked]:
    """Look at the region that a running QEMU keeps."""
    (found,) = [
        fd
        for fd in Path(f"/proc/{qemu}/fd").iterdir()
        if "memfd:guestio-inflight" in str(fd.readlink())
    ]
    with found.open("rb") as file:
        # It lives as long as it is referred to.
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    assert len(memory) == QUEUES * part_size(QUEUE_SIZE)
    yield Tracked(memory)


def kill_at_work(backend: BackEnd, region: Tracked) -> None:
    """Kill a back-end amid requests, once it got on with every queue.

    It is held up, so that requests come together, let go, and held to look how many it took.
    """
    before = region.used()
    deadline = time.monotonic() + 200
    while True:
        assert time.monotonic() < deadline, (before, region.used(), region.in_flight())
        if np.any(region.used() == before):
            time.sleep(0.01)
            continue
        backend.hold()
        time.sleep(0.2)
        backend.release()
        soon = time.monotonic() + 0.2
        while region.in_flight() < BUSY and time.monotonic() < soon:
            pass
        backend.hold()
        if region.in_flight() >= BUSY:
            backend.kill()
            return
        backend.release()


@pytest.mark.parametrize(
    ("program", "viommu"),
    [
        pytest.param(["-c", SLOW_DISK], Viommu.VIRTIO, id="slow-viommu"),
        pytest.param(["-c", SLOW_DISK], Viommu.NONE, id="slow"),
    ],
)
def test_linux_goes_on_when_the_back_end_is_killed(
    program: list[str],
    viommu: Viommu,
    disk_image: Callable[..., Path],
    tmp_path: Path,
    guest_kernel: Kernel,
) -> None:
    """No request fails, none is lost, and none is done to other memory than it was made for."""
    image, socket = disk_image(), tmp_path / "blk.sock"
    logs = [tmp_path / f"blk{number}.log" for number in range(KILLS + 1)]
    guest = Guest(
        disks=[ReconnectingDisk(socket, QUEUES)],
        viommu=viommu,
        smp=QUEUES,
        scripts=[Script("work", WORK)],
    )
    program = [*program, str(image), "--socket", str(socket), "--num-queues", str(QUEUES)]
    backend = BackEnd(program, logs[0])
    try:
        with guest.boot(tmp_path / "guest") as running:
            running.wait_for("FACT working=yes")
            with tracked(running.pid) as region:
                for log in logs[1:]:
                    kill_at_work(backend, region)
                    backend = BackEnd(program, log)
            with image.open("r+b") as file:
                os.pwrite(file.fileno(), b"stop", STOP_AT)
            result = running.wait().check()
    finally:
        backend.kill()
    assert "error" not in result.console.lower()
    content = image.read_bytes()
    for writer in range(WRITERS):
        written = content[writer * AREA : (writer + 1) * AREA]
        assert hashlib.sha256(written).hexdigest() == result.facts[f"sum{writer}"]
    for log in logs:
        assert "disconnected" not in log.read_text()
        assert "failed" not in log.read_text().replace("failed=0", "")
