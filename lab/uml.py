"""A guest that is a process: User-mode Linux, a real kernel with real drivers, in a second.

It speaks vhost-user itself (`virtio_uml`), so it needs no QEMU; it has no IOMMU. Debian's package
`user-mode-linux` is fetched once to `uml/` in the lab's cache and only unpacked.

    python -m lab.uml           fetch what is missing, say where it is
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lab.guest import MIB, Guest, VhostUserDevice, VhostUserDisk, VhostUserNet
from lab.parts import (
    Kernel,
    PartsError,
    PrivateApt,
    Progress,
    cache_directory,
    codename,
    locked,
    require_program,
    run,
)

PACKAGE = "user-mode-linux"
SHIM = Path(__file__).parent / "uml_ptrace.c"
VIRTIO_ID_BLOCK = 2


def uml_kernel(progress: Progress | None = None) -> Kernel:
    """The cached User-mode Linux of this machine's Debian release, fetched if there is none.

    Safe to call from several processes at once: one fetches, the others wait for it.

    Raises:
        PartsError: It is not to be had.
    """
    tell = progress or _ignore
    home = cache_directory() / "uml"
    found = _cached(home)
    if found is not None:
        return found
    with locked(home, tell):
        found = _cached(home)
        if found is not None:
            return found
        for leftover in home.glob("fetching-*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix="fetching-", dir=home))
        try:
            return _fetch(work, home / codename(), tell)
        except PartsError as error:
            raise PartsError(
                f"User-mode Linux is not to be had (package {PACKAGE}): {error}\nWith network "
                "access, `python -m lab.uml` fetches it."
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)


def shim() -> Path:
    """The library that mends `uml_ptrace.c` lists; compiled once.

    Raises:
        PartsError: There is no compiler.
    """
    digest = hashlib.sha256(SHIM.read_bytes()).hexdigest()[:8]
    target = cache_directory() / "uml" / f"ptrace-{digest}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as directory:
            made = Path(directory) / "ptrace.so"
            gcc = require_program("gcc", "gcc")
            run([gcc, "-O2", "-Wall", "-shared", "-fPIC", "-o", str(made), str(SHIM)])
            made.rename(target)
    return target


@dataclass(frozen=True, slots=True, kw_only=True)
class UmlGuest(Guest):
    """Description of a User-mode Linux guest; its disks are `VhostUserDisk`s of one queue.

    What it runs is described like any guest; `viommu`, `smp` and `qemu_args` have no meaning. The
    back-end must run without an IOMMU (`guestio blk --iommu off`).
    """

    memory: int = 64 * MIB
    timeout: float = 600.0

    def booted_kernel(self) -> Kernel:
        """What boots."""
        return uml_kernel()

    def command(self, directory: Path) -> list[str]:
        """The command line, with the initramfs and the logs in `directory`."""
        _check_memory_place(self.memory)
        arguments = [
            *(f"mem={self.memory // MIB}M", f"uml_dir={directory}/"),
            f"initrd={directory / 'initramfs'}",
            *(f"virtio_uml.device={socket}:{VIRTIO_ID_BLOCK}" for socket in self._sockets()),
            *(
                f"virtio_uml.device={device.socket.absolute()}:{device.virtio_id}"
                for device in self.devices
                if isinstance(device, (VhostUserDevice, VhostUserNet))
            ),
            *("con=null", "con0=null,fd:1", "ssl1=null,fd:3", "quiet", "panic=-1"),
            *self.append.split(),
        ]
        # The second serial line is for the report, as in every guest.
        logs = 'cd "$0" && exec "$@" >console.log 3>report.log'
        return [
            *("env", f"LD_PRELOAD={shim()}", "sh", "-c", logs, str(directory)),
            *(str(self.booted_kernel().image), *arguments),
        ]

    def _sockets(self) -> list[Path]:
        disks = [disk for disk in self.disks if isinstance(disk, VhostUserDisk)]
        if len(disks) != len(self.disks):
            raise TypeError("User-mode Linux has vhost-user disks only")
        return [disk.socket.absolute() for disk in disks]


def _check_memory_place(needed: int) -> None:
    """User-mode Linux's memory is a file in /dev/shm, and code of its processes runs there."""
    place = os.statvfs("/dev/shm")
    if place.f_flag & os.ST_NOEXEC:
        raise PartsError("User-mode Linux: run `mount -o remount,exec /dev/shm` first")
    if place.f_bavail * place.f_frsize < needed:
        raise PartsError(
            f"User-mode Linux needs {needed // MIB} MiB in /dev/shm: run "
            "`mount -o remount,size=1G /dev/shm` first"
        )


def _ignore(_line: str) -> None:
    pass


def _cached(home: Path) -> Kernel | None:
    # A cache may be shared by machines of several releases, and the program needs its own libc.
    trees = (home / codename()).glob("usr/lib/uml/modules/*")
    return next((Kernel(tree.name, home / codename()) for tree in trees), None)


def _fetch(work: Path, target: Path, tell: Progress) -> Kernel:
    apt = PrivateApt(work / "apt", codename(), codename())
    tell(f"reading the package list of {codename()}")
    apt.update()
    [deb] = apt.download([PACKAGE], tell)
    root = work / "root"
    run(["dpkg-deb", "-x", str(deb), str(root)])
    releases = [tree.name for tree in root.glob("usr/lib/uml/modules/*")]
    if len(releases) != 1 or not Kernel(releases[0], root).image.is_file():
        raise PartsError(f"{deb.name} holds no User-mode Linux with its modules")
    root.rename(target)
    return Kernel(releases[0], target)


def main() -> int:
    """Fetch User-mode Linux and print where it is."""
    argparse.ArgumentParser(prog="python -m lab.uml", description=main.__doc__).parse_args()
    try:
        found = uml_kernel(lambda line: print(line, file=sys.stderr))
        status = subprocess.run([found.image, "--version"], check=False).returncode
    except PartsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"User-mode Linux {found.release}\n{found.image}")
    return status


if __name__ == "__main__":
    os.environ.setdefault("LC_ALL", "C")
    sys.exit(main())
