"""One guest, from QEMU's command line to the report it sent back.

QEMU runs without KVM (`-accel tcg`), so a guest boots on any machine; a boot takes 3 to 4
seconds. The guest has two serial ports: the console, with everything on it, and the report,
which carries only what scripts print, so that no kernel message can fall into the middle of a
line. In the report

    FACT name=value             is a result for the host
    GUEST-BEGIN name            opens one script's part
    GUEST-END name rc=N         closes it
    GUEST-RESULT rc=N           is the last line: 0, or the status of the script that failed

QEMU is killed on every way out of `Guest.run` and of a `RunningGuest` used as a context manager,
and by the kernel when the thread that started it dies.
"""

import contextlib
import enum
import functools
import json
import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from lab.initramfs import Initramfs
from lab.parts import Kernel, PartsError, kernel, require_program

SCRIPTS = Path(__file__).parent / "scripts"
TAIL_LINES = 40
MIB = 1 << 20


class GuestError(AssertionError):
    """A guest did not do what was asked; the message ends with the tails of its logs."""


class Viommu(enum.Enum):
    """The IOMMU between the guest's disks and its memory."""

    NONE = "none"
    VIRTIO = "virtio-iommu"
    INTEL = "intel-iommu, lazy invalidation"
    INTEL_STRICT = "intel-iommu, strict invalidation"
    INTEL_CACHING = "intel-iommu in caching mode, for devices that QEMU passes through"

    @property
    def present(self) -> bool:
        """Whether devices see I/O virtual addresses."""
        return self is not Viommu.NONE

    @property
    def arguments(self) -> list[str]:
        """QEMU arguments; they must stand before those of any device behind the IOMMU."""
        match self:
            case Viommu.NONE:
                return []
            case Viommu.VIRTIO:
                return ["-device", "virtio-iommu-pci"]
            case Viommu.INTEL | Viommu.INTEL_STRICT:
                return ["-device", "intel-iommu,intremap=off,device-iotlb=on"]
            case Viommu.INTEL_CACHING:
                return ["-device", "intel-iommu,intremap=off,caching-mode=on"]

    @property
    def append(self) -> str:
        """What Linux needs on its command line to use it."""
        match self:
            case Viommu.NONE | Viommu.VIRTIO:
                return ""
            case Viommu.INTEL:
                return "intel_iommu=on"
            case Viommu.INTEL_STRICT | Viommu.INTEL_CACHING:
                return "intel_iommu=on iommu.strict=1"

    @property
    def modules(self) -> tuple[str, ...]:
        """Drivers, to be inserted before those of the devices behind it."""
        return ("virtio_iommu",) if self is Viommu.VIRTIO else ()

    def port_arguments(self, index: int) -> list[str]:
        """QEMU arguments for the port that disk `index` is plugged into, if it needs one."""
        if self not in (Viommu.INTEL, Viommu.INTEL_STRICT):
            return []
        # Only a PCI Express device has address translation services, and only below a port is a
        # virtio device one. Without them QEMU before 8.2 does not pass on that Linux flushed a
        # whole domain, as it does in lazy mode: the back-end would use stale translations.
        return ["-device", f"pcie-root-port,id=port{index},chassis={index + 1}"]

    def device_options(self, index: int) -> str:
        """Options for the virtio PCI device of disk `index`, so that its DMA goes through it."""
        if not self.present:
            return ""
        bus = f",bus=port{index}" if self.port_arguments(index) else ""
        return f",iommu_platform=on,disable-legacy=on,ats=on{bus}"


class Disk(Protocol):
    """A source of QEMU arguments for one disk of the guest."""

    def arguments(self, index: int, viommu: Viommu) -> list[str]:
        """Arguments for the disk that Linux will call `vda` (index 0), `vdb`, ...."""
        ...


@dataclass(frozen=True, slots=True)
class VhostUserDisk:
    """A `vhost-user-blk` disk served by the process that listens on `socket`.

    Attributes:
        socket: Unix socket of the back-end; QEMU connects to it when it starts.
        num_queues: Number of request queues, 1 or more.
        options: More properties of QEMU's device, such as `inflight-migration=on`.
    """

    socket: Path
    num_queues: int = 1
    options: str = ""

    def arguments(self, index: int, viommu: Viommu) -> list[str]:
        """QEMU arguments; see `Disk`."""
        options = f"chardev=vhost{index},num-queues={self.num_queues}"
        options += f",{self.options}" if self.options else ""
        options += viommu.device_options(index)
        return [
            *viommu.port_arguments(index),
            *("-chardev", f"socket,id=vhost{index},path={_escaped(self.socket)}"),
            *("-device", f"vhost-user-blk-pci,{options}"),
        ]


@dataclass(frozen=True, slots=True)
class VhostUserNet:
    """A `virtio-net` card served by the process that listens on `socket`.

    Attributes:
        socket: Unix socket of the back-end; QEMU connects to it when it starts.
        queue_pairs: Number of queue pairs, 1 or more.
        mac: The address that the guest sees.
        whole: Whether QEMU hands the whole device through (QEMU 11 or newer): its address, its
            link and its control queue are the back-end's then, and `mac` has no meaning.
        virtio_id: The device type, for User-mode Linux.
        vectors: MSI-X vectors that QEMU gives it, if not as many as it likes. QEMU 7.2 without KVM
            crashes when the card starts, except with 0.
    """

    socket: Path
    queue_pairs: int = 1
    mac: str = "52:54:00:12:34:56"
    whole: bool = False
    virtio_id: int = 1
    vectors: int | None = None

    def arguments(self, index: int, viommu: Viommu) -> list[str]:
        """QEMU arguments; see `Disk`."""
        several = self.queue_pairs > 1
        queues = f",queues={self.queue_pairs}" if several else ""
        options = f"netdev=net{index},mac={self.mac}{',mq=on' if several else ''},romfile="
        options += "" if self.vectors is None else f",vectors={self.vectors}"
        options += viommu.device_options(index)
        common = [
            *viommu.port_arguments(index),
            *("-chardev", f"socket,id=vhost{index},path={_escaped(self.socket)}"),
        ]
        if self.whole:
            numbers = f"virtio-id={self.virtio_id},num_vqs={2 * self.queue_pairs + 1},vq_size=256"
            device = f"vhost-user-test-device-pci,chardev=vhost{index},{numbers},config_size=12"
            behind = viommu.device_options(index).replace(",disable-legacy=on", "")
            return [*common, "-device", device + behind]
        return [
            *common,
            *("-netdev", f"vhost-user,id=net{index},chardev=vhost{index}{queues}"),
            *("-device", f"virtio-net-pci,{options}"),
        ]


@dataclass(frozen=True, slots=True)
class VhostUserDevice:
    """A device of any type, served by the process that listens on `socket`.

    Attributes:
        socket: Unix socket of the back-end; QEMU connects to it when it starts.
        virtio_id: The device type.
        num_queues: As many as the guest's driver sets up.
        config_size: Bytes of its configuration space.
        front_end: A front-end of QEMU's for this type alone (`vhost-user-rng-pci`), which older
            versions have; without it that for any type, of QEMU 11.1 or newer.
    """

    socket: Path
    virtio_id: int
    num_queues: int = 1
    config_size: int = 0
    front_end: str = ""

    def arguments(self, index: int, viommu: Viommu) -> list[str]:
        """QEMU arguments; see `Disk`."""
        device = self.front_end or (
            f"vhost-user-test-device-pci,virtio-id={self.virtio_id},num_vqs={self.num_queues},"
            f"vq_size=64,config_size={self.config_size}"
        )
        # None of these front-ends has a legacy mode, nor the option.
        options = viommu.device_options(index).replace(",disable-legacy=on", "")
        return [
            *viommu.port_arguments(index),
            *("-chardev", f"socket,id=vhost{index},path={_escaped(self.socket)}"),
            *("-device", f"{device},chardev=vhost{index}{options}"),
        ]


@dataclass(frozen=True, slots=True)
class VfioUserDevice:
    """A PCI device that the process listening on `socket` serves; QEMU 10.1 or newer.

    Attributes:
        socket: Unix socket of the server; QEMU connects to it when it starts.
        options: More properties of the device.
    """

    socket: Path
    options: Mapping[str, object] = field(default_factory=dict)

    def arguments(self, index: int, viommu: Viommu) -> list[str]:
        """QEMU arguments; see `Disk`."""
        address = {"type": "unix", "path": str(self.socket)}
        device = {"driver": "vfio-user-pci", "id": f"vfio{index}", "socket": address}
        return ["-device", json.dumps(device | dict(self.options))]


@dataclass(frozen=True, slots=True)
class QemuDisk:
    """QEMU's own `virtio-blk` on a raw image, for comparison.

    Attributes:
        image: Raw image file.
        num_queues: Number of request queues, 1 or more.
        read_only: Whether the guest may not write.
    """

    image: Path
    num_queues: int = 1
    read_only: bool = False

    def arguments(self, index: int, viommu: Viommu) -> list[str]:
        """QEMU arguments; see `Disk`."""
        read_only = "on" if self.read_only else "off"
        drive = f"if=none,id=drive{index},format=raw,read-only={read_only}"
        options = f"drive=drive{index},num-queues={self.num_queues}"
        options += viommu.device_options(index)
        return [
            *viommu.port_arguments(index),
            *("-drive", f"{drive},file={_escaped(self.image)}"),
            *("-device", f"virtio-blk-pci,{options}"),
        ]


@dataclass(frozen=True, slots=True)
class QemuNvme:
    """QEMU's own NVMe controller on a raw image, for comparison.

    Attributes:
        image: Raw image file.
        serial: What the guest sees.
    """

    image: Path
    serial: str = "qemu"

    def arguments(self, index: int, viommu: Viommu) -> list[str]:
        """QEMU arguments; see `Disk`."""
        return [
            *("-drive", f"if=none,id=drive{index},format=raw,file={_escaped(self.image)}"),
            *("-device", f"nvme,drive=drive{index},serial={self.serial}"),
        ]


@dataclass(frozen=True, slots=True)
class Script:
    """A shell script to run in the guest, by busybox sh, as root.

    Attributes:
        name: File name in the guest; unique among a guest's scripts.
        text: The script. A line `# programs: a b` in it asks for host programs, which it then
            calls by path, `/lab/bin/a` (busybox sh prefers its own applets otherwise), and a
            line `# modules: a b` for kernel modules.
    """

    name: str
    text: str

    @classmethod
    def named(cls, name: str) -> "Script":
        """The script `lab/scripts/<name>.sh`."""
        return cls(name, (SCRIPTS / f"{name}.sh").read_text())

    @property
    def programs(self) -> list[str]:
        """Names of the host programs it runs."""
        return self._declared("programs")

    @property
    def modules(self) -> list[str]:
        """Names of the kernel modules it needs."""
        return self._declared("modules")

    def _declared(self, what: str) -> list[str]:
        lines = re.findall(rf"^# {what}: (.*)$", self.text, re.MULTILINE)
        return [name for line in lines for name in line.split()]


@dataclass(frozen=True, slots=True)
class ScriptResult:
    """What one script did: its exit status (None: it never ended), facts and output."""

    name: str
    status: int | None
    facts: Mapping[str, str]
    output: str


@dataclass(frozen=True, slots=True)
class GuestResult:
    """Everything a guest left behind.

    Attributes:
        status: N of `GUEST-RESULT rc=N`; None when the guest never came that far.
        facts: All `FACT name=value` lines, of the boot and of every script; the last one wins.
        scripts: One entry per script that was begun, by name, in order.
        timed_out: Whether it was killed because its time was over.
        seconds: Wall time from QEMU's start to its end.
        console: The console: kernel messages and script output.
        report: The report port: script output only.
        qemu_log: QEMU's own standard output and error (vIOMMU faults are logged there).
        qemu_status: QEMU's exit status; negative: the signal that killed it.
        command: QEMU's command line.
    """

    status: int | None
    facts: Mapping[str, str]
    scripts: Mapping[str, ScriptResult]
    timed_out: bool
    seconds: float
    console: str
    report: str
    qemu_log: str
    qemu_status: int
    command: Sequence[str]

    def check(self) -> Self:
        """Return itself if every script ended with status 0.

        Raises:
            GuestError: Otherwise; says why and shows the tails of the logs.
        """
        if self.status == 0 and not self.timed_out:
            return self
        if self.timed_out:
            why = "the guest did not finish within its time"
        elif self.status is None:
            why = f"the guest ended without a result (QEMU's exit status {self.qemu_status})"
        else:
            failed = list(self.scripts) or ["its start"]
            why = f"in the guest, {failed[-1]} failed with status {self.status}"
        raise GuestError(why + self._last_words() + self.describe())

    def _last_words(self) -> str:
        """The end of each log, which tells most: a report may show few lines of a failure."""
        parts = [f" after {self.seconds:.0f} s"]
        logs = (("report", self.report), ("console", self.console), ("QEMU", self.qemu_log))
        for title, text in logs:
            lines = [line[:200] for line in text.splitlines() if line.strip()]
            parts.append(f"\n{title} ends: " + " | ".join(lines[-2:] or ["nothing in it"]))
        return "".join(parts)

    def describe(self) -> str:
        """The command line and the tails of the logs, for a failure message."""
        parts = [f"\n$ {shlex.join(self.command)}"]
        for title, text in (("QEMU", self.qemu_log), ("console", self.console)):
            tail = "\n".join(text.splitlines()[-TAIL_LINES:])
            parts.append(f"\n--- {title}, last {TAIL_LINES} lines ---\n{tail}")
        return "".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """Description of a guest; `run` boots it. Immutable; one description may boot many times.

    Attributes:
        disks: Become `/dev/vda`, `/dev/vdb`, ... in this order.
        viommu: The IOMMU all disks and devices are behind.
        devices: More devices, such as a `VhostUserNet`; their drivers are to be among `modules`.
        scripts: Run in this order until one fails.
        environment: Variables for the scripts.
        files: More files for the guest: absolute path to content.
        modules: More kernel modules to insert, after those of vIOMMU and disks.
        append: More kernel command line.
        qemu_args: More QEMU arguments.
        smp: Number of virtual CPUs.
        memory: Bytes of guest memory, a multiple of 8 KiB; shared, as vhost-user needs it.
        timeout: Seconds from QEMU's start until it is killed.
        qemu: QEMU's path, if not `$GUESTIO_LAB_QEMU` or the system's.
    """

    disks: Sequence[Disk] = ()
    viommu: Viommu = Viommu.NONE
    devices: Sequence[Disk] = ()
    scripts: Sequence[Script] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    modules: Sequence[str] = ()
    append: str = ""
    qemu_args: Sequence[str] = ()
    smp: int = 1
    memory: int = 512 * MIB
    timeout: float = 300.0
    qemu: str = ""

    def run(self, directory: Path | None = None) -> GuestResult:
        """Boot, wait for the end, and return what happened; does not judge it.

        Args:
            directory: Where the logs are kept; without it they live only in the result.

        Raises:
            lab.parts.PartsError: QEMU, busybox, the kernel or a program is missing.
        """
        with self.boot(directory) as running:
            return running.wait()

    def boot(self, directory: Path | None = None) -> "RunningGuest":
        """Start the guest and return at once; use the result as a context manager."""
        return RunningGuest(self, directory)

    def booted_kernel(self) -> Kernel:
        """What boots."""
        return kernel()

    def initramfs(self) -> bytes:
        """The root file system the guest boots with."""
        root = Initramfs()
        root.add_program("/bin/busybox", Path(require_program("busybox", "busybox-static")))
        root.add_file("/init", (SCRIPTS / "init.sh").read_bytes(), executable=True)
        root.add_link("/etc/mtab", "/proc/mounts")
        disk_driver = ["virtio_blk"] if self.disks else []
        wanted = [*self.viommu.modules, *disk_driver, *self.modules]
        for script in self.scripts:
            wanted += script.modules
            root.add_file(f"/lab/scripts/{script.name}", script.text.encode())
            for program in script.programs:
                package = {"mke2fs": "e2fsprogs", "e2fsck": "e2fsprogs"}.get(program, program)
                root.add_program(f"/lab/bin/{program}", Path(require_program(program, package)))
        modules = self.booted_kernel().modules(wanted)
        for module in modules:
            root.add_file(f"/lab/modules/{module.name}.ko", module.data)
        root.add_file("/lab/modules.list", _lines(module.name for module in modules))
        root.add_file("/lab/scripts.list", _lines(script.name for script in self.scripts))
        variables = (f"export {k}={shlex.quote(v)}" for k, v in self.environment.items())
        root.add_file("/lab/environment", _lines(variables))
        for path, data in self.files.items():
            root.add_file(path, data)
        return root.pack()

    def command(self, directory: Path) -> list[str]:
        """QEMU's command line, with the initramfs and the logs in `directory`."""
        devices = [
            argument
            for index, disk in enumerate((*self.disks, *self.devices))
            for argument in disk.arguments(index, self.viommu)
        ]
        size = f"{self.memory // 1024}K"
        append = f"console=ttyS0 quiet panic=-1 no_timer_check {self.viommu.append} {self.append}"
        qemu = self.qemu or system_qemu()
        return [
            qemu,
            *_tcg_arguments(qemu),
            *("-smp", str(self.smp), "-m", size),
            *("-machine", "q35,memory-backend=memory,kernel-irqchip=off"),
            *("-object", f"memory-backend-memfd,id=memory,size={size},share=on"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-serial", f"file:{_escaped(directory / 'console.log')}"),
            *("-serial", f"file:{_escaped(directory / 'report.log')}"),
            *self.viommu.arguments,
            *devices,
            *self.qemu_args,
            *("-kernel", str(self.booted_kernel().image), "-initrd", str(directory / "initramfs")),
            *("-append", " ".join(append.split())),
        ]


class RunningGuest:
    """A booted guest. Leaving its context kills QEMU if it still runs. Not thread-safe."""

    def __init__(self, guest: Guest, directory: Path | None = None) -> None:
        self._guest = guest
        self._temporary = tempfile.TemporaryDirectory(prefix="guestio-lab-")
        self._directory = directory or Path(self._temporary.name)
        self._directory.mkdir(parents=True, exist_ok=True)
        for name in ("console.log", "report.log", "qemu.log"):
            (self._directory / name).write_bytes(b"")
        (self._directory / "initramfs").write_bytes(guest.initramfs())
        self._command = guest.command(self._directory)
        self._timed_out = False
        self._start = time.monotonic()
        with (self._directory / "qemu.log").open("wb") as log:
            # setpriv has the kernel kill QEMU should this process be killed itself.
            self._qemu = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._qemu.pid

    def wait_for(self, text: str, timeout: float = 300.0, *, times: int = 1) -> None:
        """Wait until the report holds `text`, as often as that.

        Raises:
            GuestError: It did not appear within `timeout` seconds (the guest is killed then),
                or the guest ended first.
        """
        end = time.monotonic() + timeout
        while self._log("report").count(text) < times:
            if self._qemu.poll() is not None or time.monotonic() > end:
                if self._log("report").count(text) >= times:  # written between the two looks
                    return
                raise GuestError(f"the guest never reported {text!r}{self.kill().describe()}")
            time.sleep(0.02)

    @property
    def ended(self) -> int | None:
        """QEMU's exit status, or None while it runs."""
        return self._qemu.poll()

    def facts(self) -> dict[str, str]:
        """What scripts have reported so far; the last value of each name."""
        return _facts(self._log("report"))

    def wait(self) -> GuestResult:
        """Wait for QEMU's end; kill it when the guest's time is over."""
        left = self._start + self._guest.timeout - time.monotonic()
        try:
            self._qemu.wait(max(left, 0.0))
        except subprocess.TimeoutExpired:
            self._timed_out = True
        return self.kill()

    def kill(self, number: int = signal.SIGKILL) -> GuestResult:
        """End QEMU by a signal, if it still runs, and return what the guest left."""
        if self._qemu.poll() is None:
            self._qemu.send_signal(number)
        try:
            self._qemu.wait(10.0)
        except subprocess.TimeoutExpired:
            self._qemu.kill()
            self._qemu.wait()
        self._end_helpers()
        return self._result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._qemu.poll() is None:
            self._qemu.kill()
        self._qemu.wait()
        self._end_helpers()
        (self._directory / "initramfs").unlink(missing_ok=True)
        self._temporary.cleanup()

    def _end_helpers(self) -> None:
        # User-mode Linux has helper processes, which do not notice that it is gone.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._qemu.pid, signal.SIGKILL)

    def _log(self, name: str) -> str:
        data = (self._directory / f"{name}.log").read_bytes()
        return data.decode(errors="replace").replace("\r\n", "\n")

    def _result(self) -> GuestResult:
        report = self._log("report")
        status = re.search(r"^GUEST-RESULT rc=(\d+)$", report, re.MULTILINE)
        return GuestResult(
            status=int(status.group(1)) if status else None,
            facts=_facts(report),
            scripts={part.name: part for part in _script_results(report)},
            timed_out=self._timed_out,
            seconds=time.monotonic() - self._start,
            console=self._log("console"),
            report=report,
            qemu_log=self._log("qemu"),
            qemu_status=self._qemu.returncode,
            command=self._command,
        )


def system_qemu() -> str:
    """The path of the QEMU that guests run under: `$GUESTIO_LAB_QEMU`, or the system's.

    Raises:
        lab.parts.PartsError: There is none.
    """
    return os.environ.get("GUESTIO_LAB_QEMU") or require_program(
        "qemu-system-x86_64", "qemu-system-x86"
    )


@functools.cache
def version_of(qemu: str) -> tuple[int, ...]:
    """The version of a QEMU.

    Raises:
        lab.parts.PartsError: It does not tell.
    """
    done = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"version ([\d.]+)", done.stdout)
    if version is None:
        raise PartsError(f"{qemu} does not tell its version: {done.stdout}{done.stderr}")
    return tuple(int(part) for part in version.group(1).split("."))


def _tcg_arguments(qemu: str) -> tuple[str, ...]:
    """Accelerator and CPU model that run Linux 6.12 without crashing it."""
    if version_of(qemu) >= (8,):
        return ("-accel", "tcg")
    # QEMU 7.2 computes the flags after cmpxchg16b from a stale state and corrupts a guest that
    # is interrupted there; with one thread per virtual CPU, code that one CPU patches may also
    # be run by another after it agreed to the change (`Oops: int3`).
    return ("-accel", "tcg,thread=single", "-cpu", "qemu64,-cx16")


def _facts(report: str) -> dict[str, str]:
    return dict(re.findall(r"^FACT (\w+)=(.*)$", report, re.MULTILINE))


def _script_results(report: str) -> list[ScriptResult]:
    results = []
    for part in re.split(r"^GUEST-BEGIN ", report, flags=re.MULTILINE)[1:]:
        name, _, rest = part.partition("\n")
        output, end, tail = rest.partition(f"GUEST-END {name} rc=")
        status = int(tail.split()[0]) if end and tail.strip() else None
        results.append(ScriptResult(name, status, _facts(output), output))
    return results


def _lines(items: Iterable[str]) -> bytes:
    return "".join(f"{item}\n" for item in items).encode()


def _escaped(path: Path) -> str:
    # A comma ends an option in QEMU's syntax; doubled it stands for itself.
    return str(path).replace(",", ",,")
