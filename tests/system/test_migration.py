"""A guest under load hops between QEMUs; its memory and its disk are right each time.

`./run lab-migrate` is the campaign. These are short: two hops of one boot each.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from guestio.virtio.console import ConsoleDevice
from guestio.virtio.input import InputDevice
from guestio.virtio.net import NetDevice
from guestio.virtio.rng import EntropyDevice
from lab import migration, parts
from lab.guest import MIB, Viommu, version_of
from lab.migration import (
    NET,
    MigrationError,
    PagesDifferError,
    Part,
    Qmp,
    Trip,
    announced,
    by_guestio,
    by_none,
    card_by_guestio,
    compare_memory,
    different_pages,
    hops,
)
from lab.qemu import new_qemu
from tests.kit.net_driver import Mirror as Network
from tests.kit.serving import Mirror, Serving, memfd, until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("viommu", [Viommu.NONE, Viommu.VIRTIO, Viommu.INTEL_STRICT])
@pytest.mark.parametrize("qemu", ["new", "system"])
def test_a_guest_hops_to_the_next_qemu_and_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, viommu: Viommu, qemu: str
) -> None:
    if qemu == "new":
        monkeypatch.setenv("GUESTIO_LAB_QEMU", str(new_qemu()))
    made = list(hops(Trip(viommu, by_guestio(queues=2)), 2, tmp_path))
    assert len(made) == 2
    assert all(each.rate > 0 for each in made)


def test_a_guest_with_a_card_hops_to_the_next_qemu_and_on(tmp_path: Path) -> None:
    """Its card is announced, and what it sends is answered and right."""
    trip = Trip(Viommu.VIRTIO, card_by_guestio(), NET[0], [str(new_qemu())])
    made = list(hops(trip, 2, tmp_path))
    assert len(made) == 2
    assert all(each.rate > 0 for each in made)


def test_a_guest_hops_to_a_newer_qemu_and_back(tmp_path: Path) -> None:
    system = parts.require_program("qemu-system-x86_64", "qemu-system-x86")
    trip = Trip(Viommu.VIRTIO, by_guestio(), qemus=[system, str(new_qemu())])
    assert trip.machine[:1] == ["-machine"]
    if version_of(system) < (8,):
        assert len(list(hops(trip, 2, tmp_path))) == 2
        return
    # 11.1 loads no virtio device of Debian 13's 10.0: it takes its queues for longer than its own.
    with pytest.raises(MigrationError, match="exceeds allocated max"):
        list(hops(trip, 2, tmp_path))


def test_the_example_has_a_guest_hop() -> None:
    kernel = parts.kernel()
    places = [kernel.root / top / kernel.release for top in ("lib/modules", "usr/lib/modules")]
    modules = next(place for place in places if place.is_dir())
    command = [sys.executable, "examples/migration.py", "--hops", "1", "--qemu", str(new_qemu())]
    command += ["--kernel", str(kernel.image), "--modules", str(modules)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    head, hop = done.stdout.splitlines()
    assert head.split() == ["hop", "server", "stood", "still/ms", "total/ms", "round"]
    assert hop.split()[:2] == ["1", "b"]


class Files(Mirror):
    """Some device of the type of a file system that has a state."""

    device_id = 26

    def __init__(self, known: bytes) -> None:
        super().__init__(2)
        self.known = known

    def save(self) -> bytes:
        return self.known

    def restore(self, state: bytes) -> None:
        self.known = state


FRONT_ENDS = {
    "net": ["-netdev", "vhost-user,chardev=c0,id=n0", "-device", "virtio-net-pci,netdev=n0"],
    "fs": ["-device", "vhost-user-fs-pci,chardev=c0,tag=files"],
}


@contextlib.contextmanager
def empty_guest(directory: Path, path: Path, kind: str, *more: str) -> Iterator[tuple[Any, Qmp]]:
    """A guest with nothing to boot: its process and its monitor."""
    monitor = directory / f"{path.name}.qmp"
    base = [
        "-M",
        "q35,memory-backend=mem",
        "-m",
        "64",
        "-accel",
        "tcg",
        "-display",
        "none",
        "-nodefaults",
    ]
    memory = ["-object", "memory-backend-memfd,id=mem,size=64M,share=on"]
    device = ["-chardev", f"socket,id=c0,path={path}", *FRONT_ENDS[kind]]
    control = ["-qmp", f"unix:{monitor},server=on,wait=off"]
    command = [str(new_qemu()), *base, *memory, *device, *control, *more]
    with (directory / f"{path.name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with contextlib.closing(Qmp(monitor)) as qmp:
            yield process, qmp
    finally:
        process.kill()
        process.wait()


def send_over(source: Qmp, target: Qmp, directory: Path) -> None:
    """Migrate; whether that worked is for the destination to tell."""
    uri = f"unix:{directory / 'stream'}"
    target.run("migrate-incoming", uri=uri)
    source.run("migrate", uri=uri)
    until(lambda: source.run("query-migrate")["status"] in {"completed", "failed"})


@pytest.mark.parametrize("kind", FRONT_ENDS)
def test_qemu_takes_the_state_of_a_device_along(tmp_path: Path, kind: str) -> None:
    cards = [NetDevice(Network(), mac="52:54:00:12:34:56") for _ in range(2)]
    cards[0].link = False
    here, there = cards if kind == "net" else (Files(b"what it knows"), Files(b""))
    with (
        Serving(here, tmp_path / "a") as a,
        Serving(there, tmp_path / "b") as b,
        empty_guest(tmp_path, a.path, kind) as (_, source),
        empty_guest(tmp_path, b.path, kind, "-incoming", "defer") as (_, target),
    ):
        send_over(source, target, tmp_path)
        until(lambda: target.run("query-status")["status"] == "running")
        if kind == "net":
            assert not cards[1].link
            # QEMU announces a guest that does not know how to, without a driver for example.
            cards[1].link = True
            target.run("announce-self", initial=50, max=100, rounds=3, step=50, interfaces=[])
            port = cards[1]._port
            until(lambda: port.seen)
            assert port.seen[0][:14] == b"\xff" * 6 + b"\x52\x54\0\x12\x34\x56" + b"\x80\x35"
        else:
            assert there.known == b"what it knows"


def test_a_state_that_is_refused_ends_the_destination(tmp_path: Path) -> None:
    here, there = Files(b"what it knows"), Files(b"")
    there.state_version = 2
    with (
        Serving(here, tmp_path / "a") as a,
        Serving(there, tmp_path / "b") as b,
        empty_guest(tmp_path, a.path, "fs") as (_, source),
        empty_guest(tmp_path, b.path, "fs", "-incoming", "defer") as (process, target),
    ):
        send_over(source, target, tmp_path)
        until(lambda: process.poll() is not None)
        assert "Back-end failed to process its internal state" in (tmp_path / "b.log").read_text()
        source.run("cont")
        assert source.run("query-status")["status"] == "running"
        assert here.known == b"what it knows"
        assert there.known == b""


def test_pages_that_are_not_the_same_are_told(tmp_path: Path) -> None:
    size = MIB + 8192
    one, other = memfd(size), memfd(size)
    assert different_pages(one, other, size) == []
    os.pwrite(one, b"x", 0)
    os.pwrite(other, b"x", 5 * migration.PAGE - 1)
    os.pwrite(other, b"x", 5 * migration.PAGE)
    os.pwrite(other, b"x", size - 1)
    assert different_pages(one, other, size) == [0, 4, 5, size // migration.PAGE - 1]

    class Frozen(migration.Place):
        def __init__(self, fd: int) -> None:
            self._fd = fd

        def memory(self) -> int:
            return os.dup(self._fd)

    with pytest.raises(PagesDifferError, match=r"4 pages .* \(0x0, 0x4, 0x5, 0x101\)$") as told:
        compare_memory(Frozen(one), Frozen(other), size)
    assert told.value.pages == [0, 4, 5, size // migration.PAGE - 1]
    for fd in (one, other):
        os.close(fd)


def test_a_source_that_still_writes_is_told() -> None:
    one, other = memfd(MIB), memfd(MIB)
    os.pwrite(one, b"x", 0)

    class Writing(migration.Place):
        def __init__(self) -> None:
            pass

        def memory(self) -> int:
            writer = threading.Timer(0.2, os.pwrite, (one, b"y", 0))
            writer.start()
            return os.dup(one)

    class Still(Writing):
        def memory(self) -> int:
            return os.dup(other)

    with pytest.raises(PagesDifferError, match="the source still writes"):
        compare_memory(Writing(), Still(), MIB)
    for fd in (one, other):
        os.close(fd)


def test_guests_have_memory_that_old_qemus_do_not_forget(tmp_path: Path) -> None:
    def version(number: str) -> str:
        path = tmp_path / number
        path.write_text(f"#!/bin/sh\necho QEMU emulator version {number}\n")
        path.chmod(0o755)
        return str(path)

    old, new, newest = map(version, ("7.2.22", "10.0.13", "11.1.3"))
    for qemus, more in (([old], 8192), ([new], 0), ([new, old], 8192), ([new, newest], 0)):
        assert Trip(Viommu.NONE, by_none, qemus=qemus).size == 256 * MIB + more
    assert Trip(Viommu.NONE, by_none, qemus=[old], memory=MIB).size == MIB
    assert Trip(Viommu.NONE, by_none, qemus=[newest]).machine == []
    assert "pc-q35-7.2" in Trip(Viommu.NONE, by_none, qemus=[newest, old]).machine
    assert "pc-q35-10.0" in Trip(Viommu.NONE, by_none, qemus=[new, newest]).machine


def test_what_announces_a_card() -> None:
    mac = bytes.fromhex(NET[2].replace(":", ""))
    me, peer = bytes([10, 0, 2, 15]), bytes([10, 0, 2, 1])
    head = b"\xff" * 6 + mac + bytes.fromhex("0806 0001 0800 06 04 0001") + mac + me
    assert announced(b"frames" + head + bytes(6) + me)
    assert announced(b"frames" + b"\xff" * 6 + mac + b"\x80\x35")
    assert not announced(head + bytes(6) + peer)
    assert not announced(head)
    assert announced(head + bytes(6) + peer + head + bytes(6) + me)


@pytest.mark.parametrize(
    "front_end",
    [
        "vhost-user-test-device-pci,virtio-id=3,num_vqs=2,vq_size=64,config_size=12",
        "vhost-user-input-pci",
        "vhost-user-rng-pci",
    ],
)
def test_what_qemu_does_not_migrate(
    tmp_path: Path, front_end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it does one day, its guide is to say what goes along."""
    monkeypatch.setitem(FRONT_ENDS, "other", ["-device", f"{front_end},chardev=c0"])
    made = {"test": ConsoleDevice, "input": InputDevice.keyboard, "rng": EntropyDevice}
    device = made[front_end.split("-")[2]]()
    with (
        Serving(device, tmp_path / "a") as a,
        empty_guest(tmp_path, a.path, "other") as (_, source),
        pytest.raises(MigrationError, match="blocked by non-migratable device"),
    ):
        source.run("migrate", uri=f"unix:{tmp_path / 'stream'}")


def test_a_load_that_found_something_is_an_error(tmp_path: Path) -> None:
    class Told(migration.Place):
        def __init__(self, *lines: str) -> None:
            self.directory, self.part = tmp_path, Part(log=tmp_path / "log")
            guest = tmp_path / "guest"
            guest.mkdir(exist_ok=True)
            for name in ("report.log", "qemu.log", "console.log"):
                (guest / name).write_text("")
            (tmp_path / "log").write_text("")
            self._more = list(lines)
            self._report = guest / "report.log"

        def lines(self) -> list[dict[str, int]]:
            found = super().lines()
            if self._more:
                with self._report.open("a") as report:
                    report.write(self._more.pop(0) + "\n")
            return found

    right = "LOAD ops={} bad=0 gap=3 stuck=0"
    lines = Told(right.format(1), right.format(9), "STALE block 1 generation 2").see_load(2)
    assert [line["ops"] for line in lines] == [1, 9]
    for wrong in ("LOAD ops=9 bad=1 gap=3 stuck=0", "LOAD ops=9 bad=0 gap=3 stuck=1"):
        with pytest.raises(MigrationError, match="the load found"):
            Told(right.format(1), wrong).see_load(2)
    with pytest.raises(MigrationError, match="the load found"):
        Told(right.format(5), right.format(5)).see_load(2)
