"""Linux guests use network cards that ``guestio net`` serves, with and without an IOMMU."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.guest import MIB, Guest, Script, VhostUserNet, Viommu
from lab.parts import Kernel
from lab.qemu import new_qemu
from lab.uml import UmlGuest, uml_kernel
from tests.kit.command import Command, ready
from tests.kit.net_driver import can_make_taps

LIMIT = 550.0
PINGS = int(os.environ.get("GUESTIO_NET_PINGS", "100"))
RELOADS = int(os.environ.get("GUESTIO_NET_RELOADS", "2"))
BYTES = int(os.environ.get("GUESTIO_NET_BYTES", str(2 * MIB)))
# Tests that run at the same time have taps and networks of their own.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
TAP, HOST, ADDRESS = f"guestio-sys{WORKER}", f"10.93.{WORKER}.1", f"10.93.{WORKER}.2/24"


@contextlib.contextmanager
def served(tmp_path: Path, *options: str) -> Iterator[Command]:
    """A running ``guestio net``."""
    command = Command(tmp_path, "net", *options)
    with ready(command):
        yield command
        if command.process.poll() is None:
            command.end(in_use=False)


@pytest.fixture
def qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU 7.2 without KVM cannot start a vhost-user network card."""
    monkeypatch.setenv("GUESTIO_LAB_QEMU", str(new_qemu()))


def test_a_kernel_in_a_process_pings_and_gets_an_address(tmp_path: Path) -> None:
    uml_kernel()
    options = ("--responder", "10.0.2.1/24", "--iommu", "off", "--mac", "52:54:00:00:00:77")
    with served(tmp_path, *options, "--mtu", "1450") as net:
        result = UmlGuest(
            devices=[VhostUserNet(net.path)],
            scripts=[Script.named("net")],
            environment={"PINGS": str(PINGS), "RELOADS": str(RELOADS)},
        ).run(tmp_path / "guest")
        result.check()
        # It has no front-end of another kind between: what the device says is what it sees.
        assert result.facts["mac"] == "52:54:00:00:00:77"
        assert result.facts["mtu"] == "1450"
        assert result.facts["dhcp"] == "10.0.2.2/24 10.0.2.1"
        assert int(result.facts["reloads"]) == RELOADS
    counted = dict(re.findall(r"(\w+)=(\d+)", net.log.split("frames: ")[-1]))
    assert int(counted["sent"]) > 2 * PINGS
    assert int(counted["send_dropped"]) == 0


WATCHES_THE_LINK = """
# modules: virtio_net
carrier() { # value
    tries=0
    until [ "$(cat /sys/class/net/eth0/carrier)" = "$1" ]; do
        tries=$((tries + 1))
        [ "$tries" -lt 3000 ] || { echo "the carrier is never $1"; exit 1; }
        usleep 10000
    done
    echo "FACT carrier=$1"
}
[ "$(cat /sys/class/net/eth0/address)" = 52:54:00:00:00:77 ] || exit 1
ip link set eth0 up
for life in 1 2 3; do
    carrier 1
    carrier 0
done
carrier 1
ip addr add 10.0.2.9/24 dev eth0
ping -c 1 -W 10 10.0.2.1
# Its address, and which others it receives, are for the control queue.
ip link set eth0 down
ip link set eth0 address 52:54:00:00:00:78
ip link set eth0 up
ping -c 1 -W 10 10.0.2.1
"""


@pytest.mark.parametrize("kind", ["uml", "qemu"])
@pytest.mark.usefixtures("qemu")
def test_a_kernel_sees_its_link_go_down_and_up(kind: str, tmp_path: Path) -> None:
    """In QEMU behind an IOMMU, and the device as a whole is ours: control queue, address, link."""
    options = ("--responder", "10.0.2.1/24", "--mac", "52:54:00:00:00:77")
    with served(tmp_path, *options, *(["--iommu", "off"] if kind == "uml" else [])) as net:
        script = Script("link", WATCHES_THE_LINK)
        guest = (
            UmlGuest(devices=[VhostUserNet(net.path)], scripts=[script])
            if kind == "uml"
            else Guest(
                devices=[VhostUserNet(net.path, whole=True)],
                scripts=[script],
                viommu=Viommu.VIRTIO,
            )
        )
        with guest.boot(tmp_path / "guest") as running:
            for life in range(1, 4):
                for value in ("1", "0"):
                    running.wait_for(f"FACT carrier={value}\n", LIMIT, times=life)
                    net.process.send_signal(signal.SIGUSR1)
            running.wait().check()


class Peer:
    """The host's side of a tap: takes what the guest sends, and sends it as much.

    Attributes:
        sum: Of what came.
        data: What is sent.
    """

    def __init__(self, address: str, size: int) -> None:
        self.data, self.sum = os.urandom(size), ""
        self._listening = [socket.create_server((address, port)) for port in (7001, 7002)]
        for one in self._listening:
            one.settimeout(LIMIT)
        self._threads = [
            threading.Thread(target=run, args=(one,), daemon=True)
            for run, one in zip((self._take, self._give), self._listening, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def _take(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError), listening.accept()[0] as connected:
            found = hashlib.sha256()
            while data := connected.recv(1 << 16):
                found.update(data)
            self.sum = found.hexdigest()

    def _give(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError), listening.accept()[0] as connected:
            connected.sendall(self.data)

    def close(self) -> None:
        for one in self._listening:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(10)


@pytest.mark.skipif(not can_make_taps(), reason="it takes CAP_NET_ADMIN, /dev/net/tun and iproute2")
@pytest.mark.usefixtures("qemu")
@pytest.mark.parametrize(
    "viommu", [Viommu.NONE, Viommu.VIRTIO, Viommu.INTEL_STRICT], ids=lambda v: v.name.lower()
)
def test_linux_uses_a_tap(
    viommu: Viommu, tmp_path: Path, guest_kernel: Kernel, figures: Callable[..., None]
) -> None:
    """Pings, a transfer each way with equal sums, and the driver reloaded in between."""
    pairs = 1 if viommu.present else 2
    with served(tmp_path, "--tap", TAP, "--queue-pairs", str(pairs)) as net:
        subprocess.run(["ip", "addr", "add", f"{HOST}/24", "dev", TAP], check=True)
        subprocess.run(["ip", "link", "set", TAP, "up"], check=True)
        guest = Guest(
            devices=[VhostUserNet(net.path, pairs)],
            viommu=viommu,
            smp=pairs,
            timeout=LIMIT,
            scripts=[Script.named("net")],
            environment={
                "ROUTER": HOST,
                "ADDRESS": ADDRESS,
                "PINGS": str(PINGS),
                "RELOADS": str(RELOADS),
                "BYTES": str(BYTES),
                "STAY": "yes",
            },
        )
        peer = Peer(HOST, BYTES)
        try:
            with guest.boot(tmp_path / "guest") as running:
                running.wait_for("FACT stays=yes\n", LIMIT)
                seconds = net.end()
                facts = running.kill().facts
        finally:
            peer.close()
    assert int(facts["queues"]) == pairs
    assert facts["pings_56"] == facts["pings_1400"] == str(PINGS)
    assert facts["sent"] == peer.sum
    assert facts["received"] == hashlib.sha256(peer.data).hexdigest()
    assert int(facts["reloads"]) == RELOADS
    assert bool(net.counts["iotlb_misses"]) is viommu.present
    seen = f"2 x {PINGS} pings, none lost; {BYTES / MIB:g} MiB each way, sums equal"
    figures("net, tap", viommu, str(new_qemu()), RELOADS, seen, seconds)
