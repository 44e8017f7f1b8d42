"""A guest for code that uses VFIO: assigned devices behind an IOMMU, on any machine, as any user.

QEMU (TCG, no KVM) gives the guest an Intel IOMMU, the `edu` device (it has a DMA engine) and an
`ivshmem` device (its BAR is memory), both driven by vfio-pci. The guest's root file system is the
host's, read-only over 9p below an overlay in memory, so a file of the host runs in it with the
host's Python and whatever is installed there; what it writes is gone afterwards.

    python -m lab.vfio FILE [ARGUMENT...]           Debian's kernel: VFIO type1
    python -m lab.vfio --kernel iommufd FILE ...    a kernel with iommufd; see lab.kernel

A file named `test_*.py`, or a directory of such, is run by pytest. The exit status is the file's
own; 125 if the guest never came so far.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lab.guest import MIB, Guest, GuestError, RunningGuest
from lab.initramfs import Initramfs
from lab.kernel import build, cached
from lab.parts import FULL, Kernel, PartsError, Progress, kernel, require_program

HERE = Path(__file__).parent / "vfio_guest"
REPOSITORY = Path(__file__).parents[1]
MODULES = (
    "virtio_pci",
    "9pnet_virtio",
    "9p",
    "overlay",
    "vfio_iommu_type1",
    "vfio_pci",
)
# Vendor and device numbers of edu and ivshmem.
ASSIGNED = ("0x1234:0x11e8", "0x1af4:0x1110")
NO_GUEST = 125
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "PYTHONPATH")


@dataclass(frozen=True, slots=True)
class VfioKernel:
    """A kernel for the VFIO guest.

    Attributes:
        image: What QEMU's `-kernel` takes.
        package: Where its modules are; None if everything is built in.
    """

    image: Path
    package: Kernel | None = None


def stock_kernel(progress: Progress | None = None) -> VfioKernel:
    """Debian's own kernel, with VFIO type1; fetched once.

    Raises:
        PartsError: There is none to be had.
    """
    package = kernel(FULL, progress=progress)
    return VfioKernel(package.image, package)


def iommufd_kernel(progress: Progress | None = None) -> VfioKernel:
    """A kernel with iommufd: the cached one, or with `progress` a newly built one.

    Raises:
        PartsError: There is none, or it cannot be built.
    """
    image = build(progress) if progress is not None else cached()
    if image is None:
        raise PartsError(
            "no kernel with iommufd is cached, and Debian has none ready-made: build it once "
            "with `python -m lab.kernel`"
        )
    return VfioKernel(image)


@dataclass(frozen=True, kw_only=True)
class VfioGuest(Guest):
    """Description of a VFIO guest that runs one command.

    Attributes:
        kernel: What it boots.
        arguments: The command, as the host would run it.
        variables: Environment variables for it, beside those every job gets.
        directory: Where it runs.
    """

    kernel: VfioKernel
    arguments: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)
    directory: Path = REPOSITORY
    memory: int = 768 * MIB

    def initramfs(self) -> bytes:
        """The root file system the guest boots with."""
        root = Initramfs()
        root.add_program("/bin/busybox", Path(require_program("busybox", "busybox-static")))
        root.add_file("/init", (HERE / "init.sh").read_bytes(), executable=True)
        package = self.kernel.package
        modules = package.modules([*MODULES, *self.modules]) if package is not None else []
        for module in modules:
            root.add_file(f"/lab/modules/{module.name}.ko", module.data)
        names = "".join(f"{module.name}\n" for module in modules)
        root.add_file("/lab/modules.list", names.encode())
        root.add_file("/lab/assigned.list", "".join(f"{i}\n" for i in ASSIGNED).encode())
        root.add_file("/lab/job.sh", self._job().encode())
        return root.pack()

    def command(self, directory: Path) -> list[str]:
        """QEMU's command line, with the initramfs and the logs in `directory`."""
        qemu = os.environ.get("GUESTIO_LAB_QEMU") or require_program(
            "qemu-system-x86_64", "qemu-system-x86"
        )
        append = (
            "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check intel_iommu=on "
            f"{_quirks(qemu)} {self.append}"
        )
        return [
            qemu,
            *("-accel", "tcg,thread=single", "-cpu", "max,la57=off"),
            # Time in the guest is instructions done, and leaps while nothing is to be done: a
            # busy host confuses no timer, and no transfer of edu takes 100 ms.
            *("-icount", "shift=3,sleep=off"),
            *("-machine", "q35,kernel-irqchip=off"),
            *("-smp", str(self.smp), "-m", f"{self.memory // MIB}M"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-serial", f"file:{directory / 'console.log'}"),
            *("-serial", f"file:{directory / 'report.log'}"),
            # VFIO refuses devices whose interrupts are not remapped.
            *("-device", "intel-iommu,intremap=on,aw-bits=48"),
            *("-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"),
            *("-device", "virtio-9p-pci,fsdev=root,mount_tag=host"),
            *("-device", "edu,dma_mask=0xffffffffffff"),
            *("-object", "memory-backend-memfd,id=shared,share=on,size=1M"),
            *("-device", "ivshmem-plain,memdev=shared"),
            *self.qemu_args,
            *("-kernel", str(self.kernel.image), "-initrd", str(directory / "initramfs")),
            *("-append", " ".join(append.split())),
        ]

    def _job(self) -> str:
        passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        variables = {**passed, "GUESTIO_LAB_GUEST": "1", **self.variables}
        exports = "".join(f"export {k}={shlex.quote(v)}\n" for k, v in variables.items())
        place = shlex.quote(str(self.directory))
        return f"{exports}cd {place} || exit 126\nexec {shlex.join(self.arguments)}\n"


def python_command(file: Path, arguments: Sequence[str]) -> list[str]:
    """How a file is run: test files and directories by pytest, others by Python alone."""
    if not file.is_dir() and not file.name.startswith("test_"):
        return [sys.executable, str(file), *arguments]
    options = ["-c", str(HERE / "pytest.ini"), f"--rootdir={REPOSITORY}"]
    return [sys.executable, "-m", "pytest", *options, str(file), *arguments]


def guest_for(
    file: Path, arguments: Sequence[str] = (), *, on: VfioKernel, timeout: float = 120.0
) -> VfioGuest:
    """A guest that runs a Python file of the host.

    Args:
        file: The file.
        arguments: Its arguments.
        on: The kernel.
        timeout: Seconds from QEMU's start until the guest is killed.
    """
    variables = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
    paths = [str(REPOSITORY), str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return VfioGuest(
        kernel=on,
        arguments=python_command(file.resolve(), arguments),
        variables=variables,
        timeout=timeout,
    )


def _quirks(qemu: str) -> str:
    """More kernel command line that this QEMU needs."""
    done = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"version (\d+)\.", done.stdout)
    # See lab.guest: QEMU 7.2 gets cmpxchg16b wrong where it is interrupted. The CPU must have it,
    # for programs that ask for x86-64-v2; the kernel, which would use it a lot, need not.
    return "clearcpuid=cx16" if version is not None and int(version.group(1)) < 8 else ""


def _follow(running: RunningGuest, log: Path, seconds: float) -> None:
    """Copy what the job prints to standard output, until QEMU ends or the time is over."""
    end = time.monotonic() + seconds
    rest, empty = b"", 0
    with log.open("rb") as report:
        over = False
        while not over:
            # Looked at before reading, so that the last lines are not lost.
            over = _is_over(running) or time.monotonic() > end
            rest += report.read()
            *lines, rest = rest.split(b"\n")
            for line in lines:
                if not line:
                    empty += 1
                    continue
                # The guest puts an empty line before its result.
                result = line.startswith(b"GUEST-RESULT ")
                sys.stdout.buffer.write(b"\n" * (empty - result))
                sys.stdout.buffer.write(b"" if result else line + b"\n")
                empty = 0
            sys.stdout.buffer.flush()
            if not over:
                time.sleep(0.05)


def _is_over(running: RunningGuest) -> bool:
    try:
        stat = Path(f"/proc/{running.pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


def main() -> int:
    """See `python -m lab.vfio --help`."""
    parser = argparse.ArgumentParser(
        prog="./run lab",
        description="Run a Python file in a Linux guest with assigned devices behind an IOMMU.",
        epilog="Files named test_*.py, and directories, are run by pytest. Status 125: no guest.",
    )
    parser.add_argument("--kernel", choices=("stock", "iommufd"), default="stock")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS")
    parser.add_argument("--console", action="store_true", help="print the console log at the end")
    parser.add_argument("file", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if not arguments.file.exists():
        parser.error(f"there is no file {arguments.file}")

    def tell(line: str) -> None:
        sys.stderr.write(f"lab: {line}\n")

    try:
        chosen = (stock_kernel if arguments.kernel == "stock" else iommufd_kernel)(tell)
        guest = guest_for(arguments.file, arguments.arguments, on=chosen, timeout=arguments.timeout)
        with (
            tempfile.TemporaryDirectory(prefix="guestio-vfio-") as directory,
            guest.boot(Path(directory)) as running,
        ):
            _follow(running, Path(directory) / "report.log", arguments.timeout)
            result = running.wait()
    except (PartsError, GuestError) as error:
        tell(f"error: {error}")
        return NO_GUEST
    if arguments.console:
        sys.stderr.write(result.console)
    if result.status is None or result.timed_out:
        try:
            result.check()
        except GuestError as error:
            tell(str(error))
        return NO_GUEST
    return result.status


if __name__ == "__main__":
    sys.exit(main())
