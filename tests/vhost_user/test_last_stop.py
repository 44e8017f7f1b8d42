"""What a disk does when its last queue stops, and when its first one starts elsewhere."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from guestio.errors import DeviceError
from guestio.guest import ScriptedGuest
from guestio.iommu.events import Event
from guestio.virtio.blk import BlockDevice
from tests.kit.serving import WAIT, Driver, Mirror, Serving, errors_of, promptly, until, warnings_of

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was written out, in its order with what the test notes there."""
    found: list[str] = []
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        real(fd)
        found.append("synced")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    return found


def test_a_disk_is_written_out_before_its_last_queue_has_stopped(
    image: Path, synced: list[str]
) -> None:
    with (
        Serving(BlockDevice(image, num_queues=2), image.parent / "s") as s,
        ScriptedGuest(s.path, queues=2, memory_size=16 << 20) as guest,
    ):
        guest.write(0, b"x" * 512)
        guest.frontend.stop_queue(0)
        assert synced == []
        guest.frontend.stop_queue(1)
        assert synced == ["synced"]
        guest.frontend.stop_queue(0)  # it does not run
        assert synced == ["synced"]


def test_it_is_also_if_the_status_was_reset_before(image: Path, synced: list[str]) -> None:
    """QEMU 7.2 sets it before it asks where the queues stopped."""
    with (
        Serving(BlockDevice(image), image.parent / "s") as s,
        ScriptedGuest(s.path, memory_size=16 << 20) as guest,
    ):
        guest.write(0, b"x" * 512)
        guest.frontend.set_status(0)
        assert synced == []
        assert guest.frontend.stop_queue(0) == 1
        assert synced == ["synced"]


@pytest.mark.parametrize("how", ["local", "read-only", "gone"])
def test_it_is_not_for_nothing(image: Path, synced: list[str], how: str) -> None:
    migration = "local" if how == "local" else "hosts"
    device = BlockDevice(image, read_only=how == "read-only", migration=migration)
    with Serving(device, image.parent / "s") as s:
        with ScriptedGuest(s.path, memory_size=16 << 20) as guest:
            guest.read(0, 512)
            if how != "gone":
                guest.pause()
        s.let_go()
    assert synced == []


def test_a_disk_that_does_not_answer_keeps_no_server(
    image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entered, go = threading.Event(), threading.Event()

    def hang(fd: int) -> None:
        entered.set()
        go.wait(WAIT)

    monkeypatch.setattr(os, "fdatasync", hang)
    with Serving(BlockDevice(image), image.parent / "s") as s:
        guest = ScriptedGuest(s.path, memory_size=16 << 20)
        guest.write(0, b"x" * 512)
        stopping = threading.Thread(target=guest.pause)
        stopping.start()
        assert entered.wait(WAIT)
        assert stopping.is_alive()
        with promptly(1.0):
            s.backend.stop()
            until(lambda: not s.alive, "it waits for the disk")
        stopping.join(WAIT)
        guest.frontend.close()
    go.set()
    assert any("not on the medium yet" in line for line in warnings_of(caplog))


def test_an_error_is_counted_and_the_queue_stops(
    image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    device = BlockDevice(image)
    with (
        Serving(device, image.parent / "s") as s,
        ScriptedGuest(s.path, memory_size=16 << 20) as guest,
    ):
        guest.write(0, b"x" * 512)
        guest.pause()
        assert device.failures == 1
        guest.resume()
        assert guest.read(0, 512) == b"x" * 512
    assert errors_of(caplog) == [f"{image}: writing out at a stop failed: Input/output error"]


@pytest.mark.parametrize("kind", ["raises", "nonsense", "later"])
def test_a_device_that_cannot_does_not_keep_a_queue(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Mirror):
        def stopped(self) -> Event | None:
            if kind == "raises":
                raise DeviceError("not now")
            if kind == "nonsense":
                return "soon"  # type: ignore[return-value] - nonsense
            over = Event()
            threading.Timer(0.05, over.set).start()
            return over

    with Serving(Failing(), tmp_path / "s") as s, Driver(s.path) as driver, promptly(2.0):
        assert driver.run(0, b"abc")[1] == b"cba"
        assert driver.stop(0) == 1
    assert ("Failing.stopped: not now" in caplog.text) == (kind == "raises")


def test_the_size_is_looked_at_when_a_guest_begins(image: Path) -> None:
    """It may have changed while its guest was at another host."""
    device = BlockDevice(image)
    with (
        Serving(device, image.parent / "s") as s,
        ScriptedGuest(s.path, memory_size=16 << 20) as guest,
    ):
        guest.pause()
        os.truncate(image, 2 << 20)
        seen = guest.frontend.config_changes
        guest.frontend.set_status(0)
        guest.resume()
        guest.write(2048, b"y" * 512)  # beyond the end of before
        assert guest.read(2048, 512) == b"y" * 512
        assert guest.frontend.wait_config_change(WAIT, seen=seen)


def test_a_place_to_go_that_there_is_not(image: Path) -> None:
    with pytest.raises(ValueError, match="neither 'hosts' nor 'local'"):
        BlockDevice(image, migration="elsewhere")  # type: ignore[arg-type] - what is tested
