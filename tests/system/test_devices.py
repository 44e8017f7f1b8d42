"""Linux guests use what ``guestio net``, ``console``, ``input``, ``rng`` and ``blk`` serve.

Each driver is reloaded between uses, and each server ends in time while the guest uses its device.
One guest has all of them, to boot less often. `./run lab-devices` is the campaign: ten reloads.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import socket
import struct
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from lab.guest import (
    MIB,
    Disk,
    Guest,
    RunningGuest,
    Script,
    VfioUserDevice,
    VhostUserDevice,
    VhostUserDisk,
    VhostUserNet,
    Viommu,
)
from lab.parts import require_program
from lab.qemu import new_qemu
from lab.uml import UmlGuest, uml_kernel
from tests.kit.command import Command, ready

PATTERN = b"guestio!"
RNG, CONSOLE, INPUT = 4, 3, 18
RELOADS = int(os.environ.get("GUESTIO_DEVICE_RELOADS", "2"))
PINGS = int(os.environ.get("GUESTIO_DEVICE_PINGS", "10"))
LIMIT = 300.0 + 30.0 * RELOADS
KEYS = "+0.2 KEY_A\n" * 20000


class Terminal:
    """A terminal, from the side of who sits at it."""

    def __init__(self, cols: int, rows: int) -> None:
        self.master, self.slave = os.openpty()
        self.resize(cols, rows)
        self.seen = b""

    def resize(self, cols: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def wait_for(self, text: bytes) -> None:
        os.set_blocking(self.master, False)

        deadline = time.monotonic() + LIMIT
        while text not in self.seen:
            with contextlib.suppress(BlockingIOError):
                self.seen += os.read(self.master, 4096)
            assert time.monotonic() < deadline, self.seen
            time.sleep(0.01)

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal(100, 40)
    yield made
    made.close()


def rng(directory: Path, transport: str) -> Command:
    source = directory / "source"
    source.write_bytes(PATTERN * 512)
    return Command(directory, "rng", "--source", str(source), transport=transport)


def keyboard(directory: Path, transport: str) -> Command:
    script = directory / "keys"
    script.write_text(KEYS)
    return Command(directory, "input", "keyboard", "--script", str(script), transport=transport)


def use_console(guest: RunningGuest, terminal: Terminal, life: int) -> None:
    """Do what a person would do at the terminal while a driver lives."""
    guest.wait_for(f"FACT console={life}\n", LIMIT)
    terminal.wait_for(b"hello from life %d." % life)
    terminal.type(b"line %d\n" % life)
    guest.wait_for(f"FACT typed_{life}=line {life}\n", LIMIT)
    terminal.resize(101 + life, 41 + life)
    guest.wait_for(f"FACT size_{life}={41 + life} {101 + life}\n", LIMIT)


class Lab:
    """A guest's devices, each served by a command of its own.

    Attributes:
        commands: By the device's name in `lab/scripts/devices.sh`.
    """

    def __init__(
        self,
        directory: Path,
        names: list[str],
        terminal: Terminal,
        transport: str = "vhost-user",
    ) -> None:
        self.image = directory / "disk.img"
        self.image.write_bytes(os.urandom(2 * MIB))
        self.terminal = terminal
        command = functools.partial(Command, directory, transport=transport)
        start: dict[str, Callable[[], Command]] = {
            "net": lambda: command("net", "--responder", "10.0.2.1/24"),
            "disk": lambda: command("blk", str(self.image)),
            "rng": lambda: rng(directory, transport),
            "keyboard": lambda: keyboard(directory, transport),
            "console": lambda: command("console", "--stdio", terminal=terminal.slave),
        }
        self.commands = {name: start[name]() for name in names}

    def front_ends(self, viommu: Viommu, *, newest: bool) -> list[Disk]:
        """QEMU's devices, in the order of the commands but with the disk first."""
        special = {
            "rng": "" if newest else "vhost-user-rng-pci",
            "keyboard": "" if viommu.present else "vhost-user-input-pci",
        }
        make: dict[str, Callable[[Path], Disk]] = {
            "net": lambda path: VhostUserNet(path, vectors=None if newest else 0),
            "rng": lambda path: VhostUserDevice(path, RNG, front_end=special["rng"]),
            "keyboard": lambda path: VhostUserDevice(
                path, INPUT, num_queues=2, config_size=136, front_end=special["keyboard"]
            ),
            "console": lambda path: VhostUserDevice(path, CONSOLE, num_queues=2, config_size=12),
        }
        return [make[name](each.path) for name, each in self.commands.items() if name in make]

    def use(self, guest: Guest, directory: Path) -> tuple[Mapping[str, str], dict[str, float]]:
        """Have a guest use all of them, and end each in use; its facts, and the seconds of each."""
        with guest.boot(directory) as running:
            if "console" in self.commands:
                for life in range(RELOADS + 1):
                    use_console(running, self.terminal, life)
            running.wait_for("FACT done=yes\n", LIMIT)
            seconds = {
                name: end_in_use(running, name, each) for name, each in self.commands.items()
            }
            return running.kill().facts, seconds

    def check(self, facts: Mapping[str, str], name: str) -> str:
        """Compare what the guest saw with what was to be seen; says what that is."""
        if name == "net":
            assert facts["dhcp"] == "10.0.2.2/24 10.0.2.1"
            assert facts["pings_56"] == facts["pings_1400"] == str(PINGS)
            assert facts["reloads"] == str(RELOADS)
            return f"DHCP, 2 x {PINGS} pings, none lost"
        if name != "console":
            assert facts.get(f"{name}_reloads", "0") == str(RELOADS)
        if name == "disk":
            content = self.image.read_bytes()
            assert facts["disk_read"] == hashlib.sha256(content[:MIB]).hexdigest()
            written = content[MIB : MIB + MIB // 4]
            assert facts["disk_written"] == hashlib.sha256(written).hexdigest()
            return "sums of what was read and written"
        if name == "rng":
            assert len(facts["rng"]) == 64
            assert facts["rng"] in PATTERN.decode() * 9
            return "64 bytes of its source"
        if name == "keyboard":
            assert facts["keyboard"] == "guestio keyboard"
            assert facts["key"].split() == ["/dev/input/event0", "1", "30"]
            return "KEY_A by cat /dev/input/event0"
        lives = range(RELOADS + 1)
        assert all(facts[f"typed_{life}"] == f"line {life}" for life in lives)
        assert all(facts[f"size_{life}"] == f"{41 + life} {101 + life}" for life in lives)
        return f"{len(lives)} lines each way, {len(lives)} changes of size"


# The console comes last: Linux spins once its server has gone.
ALL = ["net", "disk", "rng", "keyboard", "console"]
OLDER = ["net", "disk", "rng"]
VIOMMUS = [Viommu.NONE, Viommu.VIRTIO, Viommu.INTEL_STRICT]
VFIO_USER_VIOMMUS = [
    Viommu.VIRTIO,
    *([Viommu.NONE, Viommu.INTEL_CACHING] if "GUESTIO_DEVICE_RELOADS" in os.environ else []),
]


@pytest.mark.parametrize("viommu", VIOMMUS, ids=lambda viommu: viommu.name.lower())
@pytest.mark.parametrize("qemu", ["newest", "system"])
def test_linux_uses_all_of_them(
    qemu: str,
    viommu: Viommu,
    tmp_path: Path,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
    figures: Callable[..., None],
) -> None:
    """The system's QEMU, if 7.2, has no front-end for a console, and one for input that wants KVM.

    Its network card crashes it without KVM, unless it has no MSI-X.
    """
    newest = qemu == "newest"
    program = (
        str(new_qemu()) if newest else require_program("qemu-system-x86_64", "qemu-system-x86")
    )
    monkeypatch.setenv("GUESTIO_LAB_QEMU", program)
    lab = Lab(tmp_path, ALL if newest else OLDER, terminal)
    commands = lab.commands
    with ready(*commands.values()):
        guest = Guest(
            viommu=viommu,
            disks=[VhostUserDisk(commands["disk"].path)],
            devices=lab.front_ends(viommu, newest=newest),
            scripts=[Script.named("net"), Script.named("devices")],
            environment={
                "DEVICES": " ".join(commands),
                "RELOADS": str(RELOADS),
                "PINGS": str(PINGS),
            },
            append="i8042.nokbd i8042.noaux",  # The PC's own keyboard would be event0.
            timeout=LIMIT,
        )
        facts, seconds = lab.use(guest, tmp_path / "guest")
    for name, each in commands.items():
        seen = lab.check(facts, name)
        assert bool(each.counts["iotlb_misses"]) is viommu.present
        figures(name, viommu, program, RELOADS, seen, seconds[name])


@pytest.mark.parametrize("viommu", VFIO_USER_VIOMMUS, ids=lambda viommu: viommu.name.lower())
def test_linux_uses_all_of_them_over_vfio_user(
    viommu: Viommu,
    tmp_path: Path,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
    figures: Callable[..., None],
) -> None:
    """One guest behind a virtio-iommu; `./run lab-devices` has it behind the others, too."""
    program = str(new_qemu())
    monkeypatch.setenv("GUESTIO_LAB_QEMU", program)
    lab = Lab(tmp_path, ALL, terminal, "vfio-user")
    commands = lab.commands
    with ready(*commands.values()):
        guest = Guest(
            viommu=viommu,
            disks=[VfioUserDevice(commands["disk"].path)],
            devices=[
                VfioUserDevice(each.path) for name, each in commands.items() if name != "disk"
            ],
            scripts=[Script.named("net"), Script.named("devices")],
            environment={
                "DEVICES": " ".join(commands),
                "RELOADS": str(RELOADS),
                "PINGS": str(PINGS),
            },
            append="i8042.nokbd i8042.noaux",  # The PC's own keyboard would be event0.
            timeout=LIMIT,
        )
        facts, seconds = lab.use(guest, tmp_path / "guest")
    for name, each in commands.items():
        seen = lab.check(facts, name)
        counts = each.counts
        assert counts["connections"] == 1
        assert counts["protocol_errors"] == counts["refused"] == counts["failed_calls"] == 0
        assert counts["queue_errors"] == counts["failed_requests"] == counts["cut_off"] == 0
        figures(f"{name}, vfio-user", viommu, program, RELOADS, seen, seconds[name])


def end_in_use(guest: RunningGuest, name: str, command: Command) -> float:
    """End a command while the guest uses its device without pause; the seconds that took."""
    times = int(guest.facts().get(f"busy_{name}", "0"))
    guest.wait_for(f"FACT busy_{name}={times + 1}\n", LIMIT)
    return command.end()


def test_a_kernel_in_a_process_has_a_port_beside_its_console(
    tmp_path: Path, terminal: Terminal
) -> None:
    uml_kernel()
    agent = tmp_path / "agent"
    console = Command(
        tmp_path,
        *("console", "--stdio", "--iommu", "off", "--port", f"org.example.agent={agent}"),
        terminal=terminal.slave,
    )
    with ready(console), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(agent))
        client.settimeout(LIMIT)
        guest = UmlGuest(
            devices=[VhostUserDevice(console.path, CONSOLE, num_queues=6, config_size=12)],
            scripts=[
                Script(
                    "devices",
                    Script.named("devices").text.replace("virtio-rng virtio_input evdev ", ""),
                )
            ],
            environment={"DEVICES": "port"},
            timeout=LIMIT,
        )
        with guest.boot(tmp_path / "guest") as running:
            running.wait_for("FACT port=org.example.agent\n", LIMIT)
            assert client.recv(100) == b"a line from the port\n"
            client.send(b"and the answer\n")
            running.wait_for("FACT done=yes\n", LIMIT)
            console.end()
            facts = running.kill().facts
        assert not agent.exists()
    assert facts["answer"] == "and the answer"
