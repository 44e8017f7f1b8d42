"""Real vhost-user-blk back-ends to test against."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guestio.vhost_user import Backend
from guestio.virtio.blk import BlockDevice

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guestio.vhost_user import Statistics

SIZE = 4 << 20


@dataclass
class Disk:
    """A served image.

    Attributes:
        image: The file.
        socket: Where it is served.
        contents: What the image held at first.
        process: The back-end, if it is another process.
        statistics: The back-end's counters, if it is ours.
    """

    image: Path
    socket: Path
    contents: bytes
    process: subprocess.Popen[bytes] | None = None
    statistics: Statistics | None = None


def _image(directory: Path) -> Disk:
    contents = random.Random(7).randbytes(SIZE)
    image = directory / "disk.img"
    image.write_bytes(contents)
    return Disk(image, directory / "disk.sock", contents)


@contextlib.contextmanager
def storage_daemon(directory: Path, *, queues: int = 1) -> Iterator[Disk]:
    """A disk served by qemu-storage-daemon, which has no IOMMU."""
    program = shutil.which("qemu-storage-daemon")
    assert program, "qemu-storage-daemon is missing: apt-get install qemu-utils"
    disk = _image(directory)
    export = f"type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues={queues}"
    disk.process = subprocess.Popen(
        [
            program,
            *("--blockdev", f"driver=file,node-name=file,filename={disk.image},discard=unmap"),
            *("--blockdev", "driver=raw,node-name=disk,file=file,discard=unmap"),
            "--export",
            f"{export},addr.type=unix,addr.path={disk.socket}",
        ]
    )
    try:
        yield disk
    finally:
        disk.process.terminate()
        disk.process.wait(10)


@contextlib.contextmanager
def own_disk(
    directory: Path, *, queues: int = 1, read_only: bool = False, **options: Any
) -> Iterator[Disk]:
    """A disk served by our own back-end, in a thread; it offers indirect tables."""
    disk = _image(directory)
    device = BlockDevice(disk.image, num_queues=queues, read_only=read_only, serial="own disk")
    try:
        with Backend(device, disk.socket, **{"indirect": "on", **options}) as backend:
            disk.statistics = backend.statistics
            thread = threading.Thread(target=backend.serve, name="back-end")
            thread.start()
            try:
                yield disk
            finally:
                backend.stop()
                thread.join(10)
                assert not thread.is_alive(), "the back-end does not stop"
    finally:
        device.close()
