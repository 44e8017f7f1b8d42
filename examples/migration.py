"""A guest under load hops between two disks' servers, from one QEMU to the next.

    python examples/migration.py --kernel /boot/vmlinuz-6.12.95 --modules /lib/modules/6.12.95

Needs QEMU, `busybox` (static) and `guestio` on this host, and the kernel of a Linux guest with its
modules. The guest writes blocks of its disk, reads them back past its page cache and compares, all
the time. Each hop has a line: how long the guest stood still, how long the migration took, and how
many rounds the load had made when it went on. With KVM (`--kvm`) all is much faster.
"""

import argparse
import contextlib
import json
import lzma
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIMIT = 120.0
"""Seconds that any step may take."""

INIT = """#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
for module in $(cat /modules); do insmod /$module; done
[ -b /dev/vda ] || { echo "WRONG: there is no disk"; poweroff -f; }
round=0
while round=$((round + 1)); do
    dd if=/dev/urandom of=/out bs=64k count=4 2>/dev/null
    seek=$((round % 16 * 4))
    dd if=/out of=/dev/vda bs=64k seek=$seek count=4 conv=fsync 2>/dev/null
    echo 3 >/proc/sys/vm/drop_caches
    dd if=/dev/vda of=/in bs=64k skip=$seek count=4 2>/dev/null
    cmp /out /in || { echo "WRONG in round $round"; poweroff -f; }
    echo "ROUND $round"
done
"""


def archive(files: dict[str, tuple[int, bytes]]) -> bytes:
    """An initramfs of files with their modes: a cpio archive, in the kernel's newc format."""

    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 4)

    made = b""
    for number, (name, (mode, data)) in enumerate({**files, "TRAILER!!!": (0, b"")}.items(), 1):
        path = name.encode() + b"\0"
        fields = [number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0]
        made += padded(b"070701" + b"".join(b"%08x" % field for field in fields) + path)
        made += padded(data)
    return made


def modules_of(directory: Path, *names: str) -> dict[str, bytes]:
    """Modules below /lib/modules/VERSION and what they need, in the order to insert them."""
    files = {path.name.partition(".")[0]: path for path in directory.rglob("*.ko*")}
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        path = files.get(name) or files.get(name.replace("_", "-"))
        if path is None or f"{name}.ko" in ordered:
            return  # it is in the kernel, or here already
        data = path.read_bytes()
        data = lzma.decompress(data) if path.suffix == ".xz" else data
        found = re.search(rb"\0depends=([^\0]*)", data)
        for needed in found[1].decode().split(",") if found and found[1] else ():
            add(needed)
        ordered[f"{name}.ko"] = data

    for name in names:
        add(name)
    return ordered


def initramfs(modules: Path | None) -> bytes:
    """A root file system with busybox, the driver of the disk, and the load."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise SystemExit("busybox is missing: apt-get install busybox-static")
    inserted = {} if modules is None else modules_of(modules, "virtio_pci", "virtio_blk")
    return archive(
        {
            **dict.fromkeys(("bin", "dev", "proc"), (stat.S_IFDIR | 493, b"")),
            "bin/busybox": (stat.S_IFREG | 0o755, Path(busybox).read_bytes()),
            "init": (stat.S_IFREG | 0o755, INIT.encode()),
            "modules": (stat.S_IFREG | 0o644, "\n".join(inserted).encode()),
            **{name: (stat.S_IFREG | 0o644, data) for name, data in inserted.items()},
        }
    )


class Monitor:
    """QEMU's monitor (QMP)."""

    def __init__(self, path: Path) -> None:
        end = time.monotonic() + LIMIT
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                self._socket.close()
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)
        self._socket.settimeout(LIMIT)
        self._stream = self._socket.makefile("rw")
        self._stream.readline()
        self.run("qmp_capabilities")

    def run(self, command: str, **arguments: object) -> Any:
        """What a command returns."""
        self._stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._stream.flush()
        while True:
            answer = json.loads(self._stream.readline())
            if "error" in answer:
                raise SystemExit(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        self._stream.close()
        self._socket.close()


class Vm:
    """A QEMU, with the guest in it or waiting for it."""

    def __init__(self, qemu: str, number: int, disk: Path, boot: list[str], where: Path) -> None:
        self.console = where / f"console-{number}"
        self.incoming = f"unix:{where / f'stream-{number}'}"
        monitor = where / f"monitor-{number}"
        self._process = subprocess.Popen(
            [
                qemu,
                *["-machine", "q35,memory-backend=mem", "-m", "256", "-smp", "1"],
                *["-object", "memory-backend-memfd,id=mem,size=256M,share=on"],
                *["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"],
                *("-serial", f"file:{self.console}"),
                *("-qmp", f"unix:{monitor},server=on,wait=off"),
                *("-chardev", f"socket,id=disk,path={disk}"),
                *("-device", "vhost-user-blk-pci,chardev=disk,disable-legacy=on"),
                *boot,
                *(["-incoming", "defer"] if number else []),
            ]
        )
        try:
            self.monitor = Monitor(monitor)
        except BaseException:
            self._process.kill()
            raise

    def rounds(self) -> int:
        """The last round of the load that was seen here; 0 for none."""
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        if "WRONG" in text or self._process.poll() is not None:
            raise SystemExit(f"the guest ended or found something wrong:\n{text[-2000:]}")
        # The line that is being written does not count.
        seen = [line.split()[1] for line in text.split("\n")[:-1] if line.startswith("ROUND ")]
        return int(seen[-1]) if seen else 0

    def see_rounds(self, count: int) -> int:
        """Wait for so many rounds more; the last one."""
        end, goal = time.monotonic() + LIMIT, 0
        while not goal or self.rounds() < goal:
            if not goal and (first := self.rounds()):
                goal = first + count
            if time.monotonic() > end:
                raise SystemExit(f"the load does not go on:\n{self.console.read_text()[-2000:]}")
            time.sleep(0.02)
        return self.rounds()

    def close(self) -> None:
        self.monitor.close()
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def served(image: Path, socket_path: Path) -> Iterator[Path]:
    """A server of the image; where it listens."""
    command = [sys.executable, "-m", "guestio", "blk", str(image), "--socket", str(socket_path)]
    with subprocess.Popen([*command, "--migration", "local"], stderr=subprocess.PIPE) as server:
        try:
            assert server.stderr is not None
            if not server.stderr.readline().startswith(b"listening"):
                raise SystemExit(server.stderr.read().decode())
            yield socket_path
        finally:
            server.kill()


def hop(source: Vm, target: Vm) -> tuple[int, int]:
    """Migrate the guest; milliseconds that it stood still, and that all took."""
    target.monitor.run("migrate-incoming", uri=target.incoming)
    source.monitor.run("migrate", uri=target.incoming)
    end = time.monotonic() + LIMIT
    while (state := source.monitor.run("query-migrate"))["status"] != "completed":
        if state["status"] in ("failed", "cancelled") or time.monotonic() > end:
            raise SystemExit(f"the migration: {state}")
        time.sleep(0.02)
    return state["downtime"], state["total-time"]


def emulation(qemu: str) -> list[str]:
    """What a QEMU without KVM runs Linux 6 with."""
    said = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout
    if "version 7." in said:
        return ["-accel", "tcg,thread=single", "-cpu", "qemu64,-cx16"]
    return ["-accel", "tcg"]


def main() -> None:
    """Have a guest hop, and print how it went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", type=Path, required=True, help="of the guest")
    parser.add_argument("--modules", type=Path, help="its modules, if the disk's driver is one")
    parser.add_argument("--qemu", default="qemu-system-x86_64")
    parser.add_argument("--kvm", action="store_true")
    parser.add_argument("--hops", type=int, default=10)
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        where = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="guestio-hops-")))
        (where / "initrd").write_bytes(initramfs(given.modules))
        image = where / "disk.img"
        image.write_bytes(bytes(4 << 20))
        servers = [stack.enter_context(served(image, where / name)) for name in ("a", "b")]
        boot = ["-accel", "kvm", "-cpu", "host"] if given.kvm else emulation(given.qemu)
        boot += ["-kernel", str(given.kernel)]
        boot += ["-initrd", str(where / "initrd"), "-append", "console=ttyS0 quiet panic=-1"]
        here = Vm(given.qemu, 0, servers[0], boot, where)
        try:
            here.see_rounds(3)
            print("hop  server  stood still/ms  total/ms  round", flush=True)
            for number in range(1, given.hops + 1):
                there = Vm(given.qemu, number, servers[number % 2], boot, where)
                try:
                    still, total = hop(here, there)
                    # Its server is free for the hop after the next.
                    here.close()
                except BaseException:
                    there.close()
                    raise
                here = there
                rounds = here.see_rounds(3)
                name = servers[number % 2].name
                print(f"{number:3}  {name:6}  {still:14}  {total:8}  {rounds:5}", flush=True)
        finally:
            here.close()


if __name__ == "__main__":
    main()
