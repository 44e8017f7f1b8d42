"""Linux guests use what ``guestio rng``, ``guestio input`` and ``guestio console`` serve.

Each server ends in time while its guest runs. One guest has all of them, to boot less often.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.guest import Guest, RunningGuest, Script, VhostUserDevice, Viommu
from lab.qemu import new_qemu
from lab.uml import UmlGuest, uml_kernel
from tests.kit.serving import promptly

PATTERN = b"guestio!"
RNG, CONSOLE, INPUT = 4, 3, 18
ENDS_WITHIN = 2.0
LIMIT = 300.0
KEYS = "".join("+0.2 KEY_A\n" for _ in range(2000))


class Server:
    """A command that serves, at a socket."""

    def __init__(self, directory: Path, *words: str, terminal: int | None = None) -> None:
        self.path = directory / f"{words[0]}.sock"
        self.log = directory / f"{words[0]}.log"

        def lead() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        with self.log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "guestio", *words, "--socket", self.path],
                stdin=subprocess.DEVNULL if terminal is None else terminal,
                stdout=terminal,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=None if terminal is None else lead,
            )

    def ready(self) -> None:
        deadline = time.monotonic() + 60
        while f"listening on {self.path}" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def end(self) -> None:
        """End it by a signal, in time."""
        with promptly(ENDS_WITHIN):
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(60) == 0, self.log.read_text()
        assert not self.path.exists()
        said = self.log.read_text()
        assert "disconnected" not in said
        assert "Traceback" not in said


@contextlib.contextmanager
def servers(*started: Server) -> Iterator[None]:
    try:
        for each in started:
            each.ready()
        yield
    finally:
        for each in started:
            each.process.kill()
            each.process.wait()
            print(f"--- {each.log.name} ---\n{each.log.read_text()}")


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


def rng(directory: Path, *options: str) -> Server:
    source = directory / "source"
    source.write_bytes(PATTERN * 512)
    return Server(directory, "rng", "--source", str(source), *options)


def keyboard(directory: Path, *options: str) -> Server:
    script = directory / "keys"
    script.write_text(KEYS)
    return Server(directory, "input", "keyboard", "--script", str(script), *options)


def use_console(guest: RunningGuest, terminal: Terminal) -> None:
    """Do what a person would do at the terminal."""
    guest.wait_for("FACT size=", LIMIT)
    terminal.wait_for(b"hello from the guest")
    terminal.type(b"a line that is typed\n")
    guest.wait_for("FACT typed=", LIMIT)
    terminal.resize(132, 50)


def check_rng(facts: dict[str, str]) -> None:
    read = facts["rng"]
    assert len(read) == 64
    assert read in PATTERN.decode() * 9


def check_keyboard(facts: dict[str, str]) -> None:
    assert facts["keyboard"] == "guestio keyboard"
    assert facts["key"].split() == ["1", "30"]


def check_console(facts: dict[str, str]) -> None:
    assert facts["size"] == "40 100"
    assert facts["typed"] == "a line that is typed"
    assert facts["new_size"] == "50 132"


def finish(guest: RunningGuest, *started: Server) -> dict[str, str]:
    """Wait until the guest has seen all, and end the servers under it; what it has seen."""
    guest.wait_for("FACT done=yes", LIMIT)
    for each in started:
        each.end()
    return dict(guest.kill().facts)


@pytest.mark.parametrize(
    "viommu", [Viommu.NONE, Viommu.VIRTIO, Viommu.INTEL_STRICT], ids=lambda v: v.name.lower()
)
def test_linux_uses_all_of_them(
    viommu: Viommu, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUESTIO_LAB_QEMU", str(new_qemu()))
    started = (
        rng(tmp_path),
        keyboard(tmp_path),
        Server(tmp_path, "console", "--stdio", terminal=terminal.slave),
    )
    with servers(*started):
        guest = Guest(
            viommu=viommu,
            devices=[
                VhostUserDevice(started[0].path, RNG),
                VhostUserDevice(
                    started[1].path,
                    INPUT,
                    num_queues=2,
                    config_size=136,
                    front_end="" if viommu.present else "vhost-user-input-pci",
                ),
                VhostUserDevice(started[2].path, CONSOLE, num_queues=2, config_size=12),
            ],
            scripts=[Script.named("devices")],
            environment={
                "DEVICES": "rng keyboard console",
                "RELOADS": "2",
                "SIZE": "40 100",
                "NEW_SIZE": "50 132",
            },
            timeout=LIMIT,
        )
        with guest.boot(tmp_path / "guest") as running:
            use_console(running, terminal)
            facts = finish(running, *started)
    check_rng(facts)
    check_keyboard(facts)
    check_console(facts)
    assert facts["read_rng_reloads"] == facts["read_key_reloads"] == "2"
    for each in started:
        counted = "iotlb_misses=0" in each.log.read_text().split(" ended: ")[1]
        assert counted is not viommu.present


def test_a_front_end_of_older_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU 7.2's for input devices wants KVM."""
    monkeypatch.delenv("GUESTIO_LAB_QEMU", raising=False)
    served = rng(tmp_path)
    with servers(served):
        guest = Guest(
            devices=[VhostUserDevice(served.path, RNG, front_end="vhost-user-rng-pci")],
            scripts=[Script.named("devices")],
            environment={"DEVICES": "rng"},
            timeout=LIMIT,
        )
        with guest.boot(tmp_path / "guest") as running:
            check_rng(finish(running, served))


def test_a_kernel_in_a_process_has_a_port_beside_its_console(
    tmp_path: Path, terminal: Terminal
) -> None:
    uml_kernel()
    agent = tmp_path / "agent"
    console = Server(
        tmp_path,
        *("console", "--stdio", "--iommu", "off", "--port", f"org.example.agent={agent}"),
        terminal=terminal.slave,
    )
    with servers(console), socket.socket(socket.AF_UNIX) as client:
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
            facts = finish(running, console)
        assert not agent.exists()
    assert facts["answer"] == "and the answer"
