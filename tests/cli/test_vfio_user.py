"""Server commands and ``guestio.serve`` over vfio-user."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

import guestio
from guestio.cli import cli
from guestio.pci import PciDevice, VirtioPci
from guestio.testing import Driver
from tests.kit.serving import WAIT, Mirror, promptly, until
from tests.kit.vfio_client import Client
from tests.kit.virtio_pci import PciFront, Transport

ENDS_WITHIN = 2.0
SERVERS = ["blk", "console", "input", "net", "rng", "serve"]

MODULE = """
import time
from guestio.pci import Bar, PciDevice
from guestio.virtio import Device

class Echo(Device):
    device_id = 61

    def process(self, queue, chain):
        data = chain.readable.read()
        if data == b"HANG":
            time.sleep(1000)
        chain.writable.write(data)
        return len(data)

class Counter(PciDevice):
    vendor_id, device_id, bars = 0x1234, 0x0003, {0: Bar(4096)}

    def read(self, bar, offset, size):
        return offset + 1
"""
SCRIPT = """
import sys, guestio
from toys import *
statistics = guestio.serve(eval(sys.argv[1]), "s.sock", **eval(sys.argv[2]))
print("after", statistics, file=sys.stderr)
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "toys.py").write_text(MODULE)
    return tmp_path


class Program:
    """A program that serves at ``s.sock``."""

    def __init__(self, directory: Path, *words: str) -> None:
        self.path = directory / "s.sock"
        self.process = subprocess.Popen(
            [sys.executable, *words], stderr=subprocess.PIPE, text=True, cwd=directory
        )
        assert self.process.stderr is not None
        assert self.process.stderr.readline() == "listening on s.sock\n"

    def end(self) -> str:
        with promptly(ENDS_WITHIN):
            self.process.send_signal(signal.SIGTERM)
            _, logged = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, logged
        assert not self.path.exists()
        return logged


@pytest.fixture
def start(directory: Path) -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def begin(*words: str) -> Program:
        if words[0] != "-c":
            words = ("-m", "guestio", *words, "--socket", "s.sock")
        programs.append(Program(directory, *words))
        return programs[-1]

    yield begin
    for each in programs:
        each.process.kill()
        each.process.communicate()


def test_a_users_virtio_device(start: Callable[..., Program]) -> None:
    program = start("serve", "toys:Echo", "--transport", "vfio-user", "--indirect", "on")
    with Driver(PciFront(program.path), timeout=WAIT) as driver:  # type: ignore[arg-type]
        assert driver.features & 1 << 28
        assert driver.request(b"over PCI", 8) == b"over PCI"
        logged = program.end()
    assert "toys:Echo ended: connections=1" in logged
    assert " requests=1 failed_requests=0 " in logged


def test_a_users_pci_device_needs_no_transport(start: Callable[..., Program]) -> None:
    program = start("serve", "toys:Counter")
    with Client(program.path) as client:
        assert client.begin().read(0, 4, 4) == b"\5\0\0\0"
    assert "toys:Counter ended: connections=1" in program.end()


def test_a_disk(start: Callable[..., Program], directory: Path) -> None:
    (directory / "disk.img").write_bytes(b"x" * 4096)
    program = start("blk", "disk.img", "--transport", "vfio-user", "--iommu", "off")
    with Client(program.path) as client:
        transport = Transport(client.begin())
        assert transport.config(2, 2) == 0x1042
        assert not transport.offered & 1 << 33
        program.end()


def test_a_device_that_hangs_is_ended_in_time(start: Callable[..., Program]) -> None:
    program = start("serve", "toys:Echo", "--transport", "vfio-user")
    with Driver(PciFront(program.path), timeout=WAIT) as driver:  # type: ignore[arg-type]
        driver.submit(b"HANG", 4)
        until(lambda: driver._queues[0].ring.outstanding == 1)
        time.sleep(0.1)
        assert "a request or the device hangs" in program.end()


@pytest.mark.parametrize(
    ("device", "options"),
    [("Echo()", "{'transport': 'vfio-user', 'queue_size': 8}"), ("Counter()", "{}")],
)
def test_the_function(start: Callable[..., Program], device: str, options: str) -> None:
    program = start("-c", SCRIPT, device, options)
    with Client(program.path) as client:
        client.begin()
        if device == "Echo()":
            assert Transport(client).get_of(0, "size") == 8
        assert "after connections=1" in program.end()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["toys:Echo", "--transport", "vfio"], "vfio"),
        (["toys:Echo", "--revoke-after", "3"], "there is no --revoke-after over vhost-user"),
        (["toys:Echo", "--interrupts", "intx"], "there is no --interrupts over vhost-user"),
        (["toys:Counter", "--interrupts", "intx"], "there is no --interrupts of a PCI device"),
        *(
            (
                ["toys:Echo", "--transport", "vfio-user", *option],
                f"there is no {option[0]} over vfio-user",
            )
            for option in (["--miss-timeout", "3"], ["--track-dirty"], ["--queue-threads"])
        ),
        (["toys:Counter", "--iommu", "off"], "there is no --iommu of a PCI device"),
        (["toys:Counter", "--num-queues", "2"], "there is no --num-queues of a PCI device"),
        (["toys:Counter", "--transport", "vhost-user"], "for virtio devices"),
    ],
)
def test_options_of_the_other_transport_are_one_line_and_status_2(
    directory: Path, words: list[str], complaint: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "guestio", "serve", *words, "--socket", "s.sock"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=directory,
    )
    assert done.returncode == 2, done.stderr
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (directory / "s.sock").exists()


def test_what_the_function_refuses(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with pytest.raises(ValueError, match="neither 'vhost-user' nor 'vfio-user'"):
        guestio.serve(Mirror(), path, transport="tcp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="for virtio devices"):
        guestio.serve(VirtioPci(Mirror()), path, transport="vhost-user")
    with pytest.raises(TypeError, match="no queue_size"):
        guestio.serve(VirtioPci(Mirror()), path, queue_size=8)
    with pytest.raises(TypeError, match="must be a guestio Device"):
        guestio.serve(3, path, transport="vfio-user")  # type: ignore[arg-type]
    assert issubclass(VirtioPci, PciDevice)
    assert not path.exists()


@pytest.mark.parametrize("name", SERVERS)
def test_help_shows_a_whole_line_of_qemu(name: str) -> None:
    command = cli.commands[name]
    with click.Context(command, info_name=name) as context:
        text = command.get_help(context)
    _, _, shown = text.partition("Over vfio-user ")
    words, _, line = shown.partition("qemu-system-x86_64")
    assert f"guestio {name} " in words
    socket = re.findall(r"--transport vfio-user --socket (\S+) &", words)[0]
    (device,) = re.findall(r"-device '(\{.*?\})'", line)
    assert json.loads(device) == {
        "driver": "vfio-user-pci",
        "socket": {"type": "unix", "path": socket},
    }
    assert "share=on" in line
    assert "--transport" in text
