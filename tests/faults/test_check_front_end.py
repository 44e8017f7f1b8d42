"""A front-end is judged: each seeded breach by its name, and honest ones not at all."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from guestio.errors import DeviceError
from guestio.faults import Report, Verdict, check_front_end, demands
from guestio.guest import Driver, ScriptedGuest, Shape
from guestio.guest.dma import IommuMode
from guestio.vhost_user.messages import FrontendRequest
from tests.faults.test_check import HEADINGS, SECTIONS
from tests.kit.broken_frontend import FAULTS, Fault, Hand

PATIENCE = 30.0
SILENT = {"notify.sent", "iotlb.miss-answered"}
"""Found by waiting for what does not come."""

ALSO: dict[str, set[str]] = {
    # The ring is moved along with its memory.
    "slots.remove-unused": {"vring.in-memory"},
    # Nothing was asked either.
    "channel.reply": {"channel.asked"},
}


def judged(path: Path, act: Callable[[str], object], **options: Any) -> Report:
    """The report of a judge that ``act`` talked to."""
    place = str(path / "judge.sock")
    found: list[Report] = []
    ready = threading.Event()

    def run() -> None:
        found.append(check_front_end(place, listening=ready.set, seconds=60, **options))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(20)
        act(place)
    finally:
        thread.join(60)
    return found[0]


@pytest.mark.parametrize(
    ("demand", "act"), [pytest.param(d, act, id=f"{d}-{name}") for d, name, act in FAULTS]
)
def test_a_seeded_breach_is_named(demand: str, act: Fault, tmp_path: Path) -> None:
    patience = 0.3 if demand in SILENT else PATIENCE
    report = judged(tmp_path, act, patience=patience, iommu="iotlb" in demand)
    failed = {result.id: result.reason for result in report.bad}
    assert demand in failed, report.verdicts()
    assert not report.passed
    assert set(failed) - {demand} <= ALSO.get(demand, set()), failed


def test_every_demand_has_a_breach() -> None:
    assert {demand for demand, _, _ in FAULTS} == {each.id for each in demands()}


# Honest ones


def drive_a_disk(path: str, iommu: IommuMode = "off") -> None:
    """All kinds of requests, in all shapes, with stops, resets and a log in between."""
    rng = random.Random(18)
    with ScriptedGuest(path, iommu=iommu, queues=2, timeout=30) as guest:
        for features in ({}, {"indirect": False}, {"event_idx": False, "queue_size": 16}):
            guest.boot(iommu=iommu, queues=2, **features)  # type: ignore[arg-type] # booleans
            for at in range(12):
                data = rng.randbytes(512 * rng.randrange(1, 9))
                queue = at % 2
                guest.write(8 * at, data, queue=queue, shape=Shape.random(rng, 512, 1, 3))
                shape = Shape.random(rng, 16, len(data) + 1, 4)
                assert guest.read(8 * at, len(data), queue=queue, shape=shape) == data
            guest.flush()
            assert guest.get_id() == b"guestio-check"
            guest.discard(0, 8)
            guest.write_zeroes(8, 8, unmap=True)
            assert guest.read(8, 512) == bytes(512)
            many = [guest.submit_read(at, 512, publish=False) for at in range(3)]
            guest.publish()
            guest.wait(*many)
            guest.pause()
            guest.resume()
        assert guest.frontend.queue_count() == 2
        log = guest.frontend.start_logging()
        guest.read(0, 4096)
        assert log.take().size
        guest.frontend.stop_logging()
        guest.frontend.set_memory(guest.memory)
        guest.read(0, 512)
        guest.shut_down()
        guest.frontend.reset_device()


@pytest.mark.parametrize("iommu", ["off", "static", "strict"])
def test_our_own_front_end_keeps_to_the_rules(iommu: IommuMode, tmp_path: Path) -> None:
    report = judged(
        tmp_path,
        lambda path: drive_a_disk(path, iommu),
        queues=2,
        iommu=iommu != "off",
        patience=PATIENCE,
    )
    assert report.bad == []
    unseen = {result.id for result in report.results if result.verdict is Verdict.SKIP}
    # What an honest front-end never does, or this one has no occasion for.
    assert unseen == {
        "protocol.other",
        "memory.regions",
        "slots.remove-known",
        "slots.remove-unused",
        "config.writable",
        *(
            ("vring.in-memory",)
            if iommu != "off"
            else (each.id for each in demands() if each.id.startswith(("iotlb", "channel")))
        ),
    }


@pytest.mark.parametrize("device", ["net", "console", "rng"])
def test_other_devices_have_judges(device: str, tmp_path: Path) -> None:
    def drive(path: str) -> None:
        with Driver(path, timeout=30) as driver:
            driver.post(64, queue=0)
            if device == "rng":
                assert len(driver.receive(0).data) == 64
            else:
                driver.send(bytes(100), queue=1)
            driver.reset()

    report = judged(tmp_path, drive, device=device, patience=PATIENCE)
    assert report.bad == []
    verdicts = report.verdicts()
    assert verdicts["desc.order"] is Verdict.PASS
    assert verdicts["notify.sent"] is Verdict.PASS
    assert not any(name.startswith("blk.") for name in verdicts)


def test_an_image_is_read_and_written(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"before".ljust(1 << 20, b"\0"))

    def drive(path: str) -> None:
        with ScriptedGuest(path, timeout=30) as guest:
            assert guest.config.capacity == 2048
            assert guest.read(0, 512)[:6] == b"before"
            guest.write(1, b"after".ljust(512, b"."))

    report = judged(tmp_path, drive, image=image, only=["blk"], patience=PATIENCE)
    assert report.passed
    assert {name.partition(".")[0] for name in report.verdicts()} == {"blk"}
    assert image.read_bytes()[512:517] == b"after"


# Limits, and the command


def test_a_front_end_that_only_looks_is_not_the_one(tmp_path: Path) -> None:
    def drive(path: str) -> None:
        with socket.socket(socket.AF_UNIX) as looker:
            looker.connect(path)
        with Hand(path) as hand:
            hand.boot()
            hand.run()

    assert judged(tmp_path, drive, patience=PATIENCE).verdicts()["blk.header"] is Verdict.PASS


def test_noise_ends_the_judgment_and_fails_it(tmp_path: Path) -> None:
    def drive(path: str) -> None:
        with socket.socket(socket.AF_UNIX) as noise:
            noise.settimeout(20)
            noise.connect(path)
            noise.sendall(b"\xff" * 64)
            assert noise.recv(1) == b""

    report = judged(tmp_path, drive, patience=PATIENCE)
    assert [result.id for result in report.bad] == ["message.size"]


def test_a_time_limit_ends_it_without_a_front_end(tmp_path: Path) -> None:
    report = check_front_end(tmp_path / "judge.sock", seconds=0.1)
    assert {result.verdict for result in report.results} == {Verdict.SKIP}
    assert not (tmp_path / "judge.sock").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "toaster"}, "no device of type 'toaster'"),
        ({"only": ["nosuch"]}, "no check matches 'nosuch'"),
        ({"device": "rng", "image": "/dev/null"}, "an image is for a disk"),
        ({"patience": 0}, "patience"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        check_front_end(tmp_path / "judge.sock", **arguments)
    assert not (tmp_path / "judge.sock").exists()


def test_an_image_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"nothing\.img"):
        check_front_end(tmp_path / "judge.sock", image=tmp_path / "nothing.img")


def test_demands_have_names_and_sources_of_the_specification() -> None:
    for each in demands():
        assert each.text.endswith("."), each.id
        if each.source.startswith("virtio"):
            assert each.source.split("section ")[1].split(",")[0] in SECTIONS, each.id
        else:
            messages = {request.name for request in FrontendRequest}
            assert each.source.removeprefix("vhost-user ") in messages | HEADINGS, each.id


def command(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "guestio", "check", "--front-end", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_tells_of_a_broken_driver(tmp_path: Path) -> None:
    path, junit = str(tmp_path / "judge.sock"), tmp_path / "junit.xml"
    with command(path, "--junit", str(junit)) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == f"listening on {path}\n"
        with Hand(path) as hand:
            hand.boot()
            hand.run(write=100)
        told, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "FAIL    blk.multiple" in told
    assert "virtio 1.4 and 1.3 section 5.2.6.1 (must)" in told
    suite = ET.parse(junit).getroot()
    assert suite.get("failures") == "1"


def test_sigint_ends_the_command_with_its_verdicts(tmp_path: Path) -> None:
    path = str(tmp_path / "judge.sock")
    with command(path, "--json") as process:
        assert process.stderr is not None
        process.stderr.readline()
        with Hand(path) as hand:
            hand.boot()
            hand.run()
            process.send_signal(signal.SIGINT)
            told, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(told)["passed"]
    assert not Path(path).exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "say on which SOCKET to listen"),
        (("x", "--writable"), "--writable is not for a check with --front-end"),
        (("x", "--device", "input"), "no device type 'input' here"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(words: tuple[str, ...], line: str) -> None:
    with command(*words) as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert line in said
    assert said.count("\n") == 1
