"""The catalogue: what it has, what it says of honest devices, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from guestio.errors import DeviceError
from guestio.faults import KINDS, Severity, Verdict, catalogue, check
from guestio.testing import serving
from guestio.vhost_user.messages import FrontendRequest
from guestio.virtio import (
    BlockDevice,
    ConsoleDevice,
    Device,
    EntropyDevice,
    InputDevice,
    NetDevice,
)
from tests.kit.broken_backend import BrokenBackend

PATIENCE = 60.0
ROOT = Path(__file__).parents[2]
SECTIONS = dict(
    line.split(" ", 1) for line in (Path(__file__).parent / "sections.txt").read_text().splitlines()
)
"""Sections of virtio 1.4 that checks refer to, by number, and their titles."""
HEADINGS = {
    "An IOTLB message",
    "Communication",
    "Front-end message types",
    "Header",
    "IOMMU support",
    "In-band notifications",
    "Inflight I/O tracking",
    "Introduction",
    "Log description",
    "Memory access",
    "Memory regions description",
    "Message Specification",
    "Migration",
    "Multiple queue support",
    "Protocol features",
    "Ring states",
    "Suspended device state",
    "VHOST_USER_PROTOCOL_F_REPLY_ACK",
}
"""Sections of the vhost-user specification."""


@pytest.fixture
def socket(tmp_path: Path) -> str:
    return str(tmp_path / "toy.sock")


# The catalogue itself


def test_there_are_enough_checks_for_each_type_of_device() -> None:
    for device in KINDS:
        assert len(catalogue(device)) >= 150, device


def test_names_are_an_area_and_a_name_and_texts_are_sentences() -> None:
    for each in catalogue():
        area, _, name = each.id.partition(".")
        assert area, each.id
        assert name, each.id
        assert each.text.endswith("."), each.id
        assert '"' not in each.text, each.id
        assert each.devices <= set(KINDS), each.id
        assert each.hostile == (each.severity is Severity.SAFETY), each.id


def test_sections_exist_in_the_specification() -> None:
    for each in catalogue():
        if each.source.startswith("virtio"):
            number = each.source.split("section ")[1].split(",")[0]
            assert number in SECTIONS, (each.id, number)


def test_messages_exist_in_the_specification() -> None:
    messages = {each.name for each in FrontendRequest} | {"BACKEND_IOTLB_MSG"}
    for each in catalogue():
        if each.source.startswith("vhost-user"):
            title = each.source.removeprefix("vhost-user ")
            assert title in messages | HEADINGS, (each.id, title)


# Honest devices


def card() -> NetDevice:
    from guestio.virtio.net import Responder

    return NetDevice(Responder("10.0.2.2/24"))


def disk(tmp_path: Path) -> BlockDevice:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(range(256)) * 4096)
    return BlockDevice(str(image), num_queues=2)


HONEST: dict[str, Callable[[Path], Device]] = {
    "blk": disk,
    "net": lambda _: card(),
    "console": lambda _: ConsoleDevice(),
    "rng": lambda _: EntropyDevice(),
    "input": lambda _: InputDevice.keyboard(),
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", HONEST)
def test_our_devices_do_what_they_must(name: str, tmp_path: Path) -> None:
    device = HONEST[name](tmp_path)
    with serving(device, indirect="on") as path:
        report = check(path, name, writable=True, patience=PATIENCE)
    device.close()
    assert report.bad == []
    assert report.counts[Verdict.PASS] > 200


def test_a_device_of_any_type_is_judged_by_messages_and_rings(tmp_path: Path) -> None:
    with serving(disk(tmp_path)) as path:
        report = check(path, "any", only=["message", "split", "broken"], patience=PATIENCE)
    assert report.bad == []


UNHARMED = [each.id for each in catalogue("blk") if not each.id.endswith("-cut")]
"""Checks that a program without a handler for SIGBUS survives."""


def test_a_back_end_that_shares_no_code_with_us_does_what_it_must(socket: str) -> None:
    with BrokenBackend(socket):
        report = check(socket, only=UNHARMED, writable=True, patience=PATIENCE)
    assert report.bad == []
    assert report.counts[Verdict.PASS] > 200


def test_equal_seeds_have_equal_verdicts(tmp_path: Path) -> None:
    names = ["message", "framing", "malformed", "broken.random-*", "blk"]
    with serving(disk(tmp_path)) as path:
        first = check(path, only=names, seed=7, patience=PATIENCE)
        second = check(path, only=names, seed=7, patience=PATIENCE)
    assert first.verdicts() == second.verdicts()


# What comes of back-ends that end


def test_what_follows_a_crash_is_skipped(socket: str) -> None:
    names = ["message.order", "no-ring.SET_VRING_NUM", "ring.restart"]
    with BrokenBackend(socket, "fragile"):
        report = check(socket, only=names, patience=PATIENCE, recovery=1.0)
    assert [each.verdict for each in report.results] == [
        Verdict.PASS,
        Verdict.CRASH,
        Verdict.SKIP,
    ]
    assert not report.passed


def test_a_command_is_started_again_after_a_signal_killed_it(
    socket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, str(ROOT / "tests/kit/broken_backend.py"), socket]
    names = ["broken.file-cut", "blk.read"]
    report = check(socket, only=names, command=command, patience=PATIENCE)
    cut, read = report.results
    assert (cut.verdict, cut.reason) == (Verdict.CRASH, "killed by SIGBUS")
    assert read.verdict is Verdict.PASS


def test_one_that_ends_with_its_front_end_is_started_again(
    socket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, str(ROOT / "tests/kit/broken_backend.py"), socket]
    command.append("ends-with-front-end")
    names = ["malformed.version", "blk.read"]
    report = check(socket, only=names, command=command, patience=PATIENCE)
    assert [(each.verdict, each.reason) for each in report.results] == [(Verdict.PASS, "")] * 2


def test_a_back_end_that_hangs_is_wedged(socket: str) -> None:
    with BrokenBackend(socket, "follows-loops") as toy:
        report = check(socket, only=["broken.loop-of-one"], patience=1.5, recovery=3.0)
        assert toy.thread.is_alive()
    assert [each.verdict for each in report.results] == [Verdict.WEDGED]


def test_a_back_end_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="serves no honest request: cannot connect"):
        check(tmp_path / "nothing.sock", patience=0.2, recovery=0.2)


def test_a_command_that_cannot_be_started_is_an_error(socket: str) -> None:
    with pytest.raises(DeviceError, match="cannot start /no/such/program"):
        check(socket, command="/no/such/program")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "toaster"}, "there is no device type 'toaster'"),
        ({"only": ["ring", "nosuch"]}, "no check matches 'nosuch'"),
        ({"severity": "grave"}, "'grave' is not a valid Severity"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str, socket: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(socket, **arguments)  # type: ignore[arg-type]


# The command


def guestio(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "guestio", "check", *words],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_lists_the_catalogue() -> None:
    said = guestio("--list", "--device", "rng")
    assert said.returncode == 0
    for each in catalogue("rng"):
        assert each.id in said.stdout
        assert each.text in said.stdout
    rows = json.loads(guestio("--list", "--json", "--only", "ring.restart").stdout)
    assert [row["id"] for row in rows] == ["ring.restart"]
    assert rows[0]["source"] == "vhost-user SET_VRING_BASE"


def test_the_command_tells_verdicts_and_writes_junit(socket: str, tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    words = [socket, "--only", "blk.padding", "--only", "blk.c*", "--patience", "60"]
    with BrokenBackend(socket, "padding"):
        table = guestio(*words, "--junit", str(junit), "--all")
        as_json = guestio(*words, "--json")
    assert table.returncode == 1, table.stderr
    assert "FAIL    blk.padding" in table.stdout
    assert "virtio 1.4 and 1.3 section 5.2.5.2 (must)" in table.stdout
    assert "PASS    blk.capacity" in table.stdout
    assert "2 checks: 1 PASS, 1 FAIL" in table.stdout
    report = json.loads(as_json.stdout)
    assert as_json.returncode == 1
    assert not report["passed"]
    assert report["counts"]["FAIL"] == 1
    suite = ET.parse(junit).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "1", "0")
    [failure] = suite.iter("failure")
    assert failure.get("message") == "unused0 is 7"


def test_the_command_succeeds_where_nothing_is_wrong(socket: str) -> None:
    with BrokenBackend(socket):
        said = guestio(socket, "--only", "message", "--patience", "60")
    assert said.returncode == 0, said.stdout
    assert "FAIL" not in said.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "say on which SOCKET the back-end listens"),
        (("/tmp/x", "--device", "toaster"), "'toaster' is not one of"),
        (("/tmp/x", "--only", "nosuch"), "no check matches 'nosuch'"),
        (("/tmp/x", "--patience", "nan"), "not a number of seconds"),
        (("/tmp/x", "--queue", "256"), "256 is not in the range"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(words: tuple[str, ...], line: str) -> None:
    said = guestio(*words)
    assert said.returncode == 2
    assert line in said.stderr
    assert said.stderr.count("\n") == 1
