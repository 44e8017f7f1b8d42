"""A device that misbehaves: what its driver sees of each rule, and that it ends and goes on."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guestio.errors import GuestioError, QueueError
from guestio.faults import Faults, Misbehaving, MisbehavingPci
from guestio.pci import PciDevice
from guestio.testing import BlkError, Driver, ScriptedGuest, serving
from guestio.vhost_user.request_channel import NoAnswerError
from guestio.virtio import BlockDevice, ConsoleDevice, Device, EntropyDevice, InputDevice
from tests.kit.serving import until

LIMIT = 30.0
CONTENT = bytes(range(256)) * 2048


class Disk:
    """A disk that misbehaves, and a driver for it."""

    def __init__(self, path: str, faults: Faults) -> None:
        self.path = path
        self.faults = faults

    def guest(self, **options: Any) -> ScriptedGuest:
        return ScriptedGuest(self.path, **{"timeout": LIMIT, **options})

    def serves(self) -> None:
        """The next client is served as if nothing had happened, once the rules are gone."""
        for each in self.faults.counts():
            self.faults.off(each.number)
        with self.guest() as guest:
            assert guest.read(8, 4096) == CONTENT[8 * 512 : 8 * 512 + 4096]


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return str(path)


@contextlib.contextmanager
def disk(image: str, *rules: str, **options: Any) -> Iterator[Disk]:
    device = Misbehaving(BlockDevice(image, num_queues=2), rules)
    try:
        with serving(device, **options) as path:
            yield Disk(path, device.faults)
    finally:
        device.close()


def struck(disk: Disk) -> int:
    return disk.faults.counts()[0].struck


# The device


def test_a_request_fails_where_the_rule_says_and_not_beside_it(image: str) -> None:
    with disk(image, "error op=read sector=100-200") as served:
        with served.guest() as guest:
            assert guest.read(96, 2048) == CONTENT[96 * 512 : 100 * 512]
            for sector, size in ((100, 512), (200, 512), (90, 8192)):
                with pytest.raises(BlkError) as caught:
                    guest.read(sector, size)
                assert caught.value.status == 1
            guest.write(150, b"x" * 512)
            assert guest.read(201, 512) == CONTENT[201 * 512 : 202 * 512]
        assert served.faults.counts()[0][2:] == (3, 3)
        served.serves()


def test_the_status_of_an_error_can_be_chosen_and_the_disk_is_left_alone(image: str) -> None:
    with disk(image, "error=2 op=write") as served, served.guest() as guest:
        with pytest.raises(BlkError) as caught:
            guest.write(0, b"x" * 512)
        assert caught.value.status == 2
        assert guest.read(0, 512) == CONTENT[:512]


@pytest.mark.parametrize("rule", ["delay=200ms op=read", "stall=200ms op=read once"])
def test_an_answer_comes_later(image: str, rule: str) -> None:
    with disk(image, rule) as served, served.guest() as guest:
        began = time.monotonic()
        assert guest.read(8, 512) == CONTENT[8 * 512 : 9 * 512]
        assert time.monotonic() - began >= 0.2


def test_what_is_behind_a_stall_waits_and_another_queue_does_not(image: str) -> None:
    with disk(image, "stall op=read queue=0 once") as served, served.guest(queues=2) as guest:
        first = guest.submit_read(0, 512)
        until(lambda: struck(served) == 1)
        second = guest.submit_read(1, 512)
        assert guest.read(2, 512, queue=1) == CONTENT[1024:1536]
        assert not guest.poll()
        served.faults.off(1)
        guest.wait(first, second)
        assert first.data + second.data == CONTENT[:1024]


@pytest.mark.parametrize("rule", ["drop", "stall", "delay=600s", "reorder"])
def test_a_stop_does_not_wait_for_what_a_rule_holds(image: str, rule: str) -> None:
    with disk(image, f"{rule} op=write once", stop_timeout=0.2) as served:
        with served.guest() as guest:
            guest.submit_write(0, b"y" * 512)
            until(lambda: struck(served) == 1)
        served.serves()


def test_a_request_that_is_dropped_is_not_carried_out(image: str) -> None:
    with (
        disk(image, "drop op=write", stop_timeout=0.1) as served,
        served.guest(timeout=0.5) as guest,
        pytest.raises(NoAnswerError),
    ):
        guest.write(0, b"y" * 512)
    assert Path(image).read_bytes() == CONTENT


def test_a_request_is_overtaken_by_the_next(image: str) -> None:
    with disk(image, "reorder nth=1") as served, served.guest() as guest:
        first = guest.submit_read(0, 512, publish=False)
        second = guest.submit_read(1, 512)
        order = []
        while len(order) < 2:
            order += guest.wait_some()
        assert order == [second, first]
        assert first.data == CONTENT[:512]


def test_a_short_answer_leaves_the_end_of_the_buffer_and_says_so(image: str) -> None:
    with disk(image, "short=100 op=read") as served, served.guest() as guest:
        request = guest.submit_read(0, 512)
        guest.wait(request)
        assert request.status == 0
        assert request.written < 512
        assert request.data[:412] == CONTENT[:412]
        assert request.data[412:] != CONTENT[412:512]


def test_data_is_corrupted_by_as_many_bits_as_asked_and_repeatably(image: str) -> None:
    found = []
    for _ in range(2):
        with disk(image, "corrupt=3 op=read seed=5") as served, served.guest() as guest:
            data = guest.read(0, 4096)
            changed = [a ^ b for a, b in zip(data, CONTENT, strict=False) if a != b]
            assert len(changed) == 3
            assert all(bits.bit_count() == 1 for bits in changed)
            found.append(data)
    assert found[0] == found[1]


def test_a_stale_answer_is_a_success_that_does_nothing(image: str) -> None:
    with disk(image, "stale op=read,write sector=8-") as served, served.guest() as guest:
        assert guest.read(0, 512) == CONTENT[:512]
        # The guest's buffer is the same one, which still has what was read before.
        assert guest.read(9, 512) == CONTENT[:512]
        guest.write(16, b"z" * 512)
    assert Path(image).read_bytes() == CONTENT


# The ring


def test_a_used_length_is_a_lie(image: str) -> None:
    with disk(image, "used-length=7 op=read") as served, served.guest() as guest:
        request = guest.submit_read(0, 512)
        guest.wait(request)
        assert request.written == 7
        assert request.data == CONTENT[:512]


@pytest.mark.parametrize(
    "rule",
    ["used-length op=read", "wrong-head", "wrong-head=5", "duplicate-completion", "index-jump=100"],
)
def test_a_driver_that_looks_finds_its_ring_broken(image: str, rule: str) -> None:
    with disk(image, rule) as served:
        with pytest.raises(QueueError), served.guest() as guest:
            guest.read(0, 512)
            # What is published twice is only found with the next one.
            guest.read(0, 512)
        served.serves()


def test_a_driver_is_not_notified_and_finds_the_answer_when_it_looks(image: str) -> None:
    # The driver sleeps by the time of the answer.
    with disk(image, "skip-interrupt", "delay=50ms") as served:
        with served.guest(timeout=0.5) as guest:
            began = time.monotonic()
            for _ in range(2):
                guest.read(0, 512)
            # It looks once more when its time is up.
            assert time.monotonic() - began >= 0.5
        with served.guest(polling=True) as guest:
            assert guest.read(0, 512) == CONTENT[:512]
        served.serves()


def test_a_notification_comes_later(image: str) -> None:
    with disk(image, "late-interrupt=200ms", "delay=50ms") as served, served.guest() as guest:
        began = time.monotonic()
        for _ in range(3):
            assert guest.read(0, 512) == CONTENT[:512]
        assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize("rule", ["spurious-interrupt", "ignore-event-idx"])
def test_notifications_come_that_none_asked_for(image: str, rule: str) -> None:
    with disk(image, rule) as served, served.guest(polling=True) as guest:
        guest._queues[0]._handle.clear_call()
        guest.read(0, 512)
        poll = select.poll()
        poll.register(guest._queues[0]._handle.call_fd, select.POLLIN)
        assert poll.poll(LIMIT * 1000)


def test_a_device_that_needs_a_reset_stops_its_queue_and_no_other(image: str) -> None:
    with disk(image, "needs-reset op=flush") as served:
        with served.guest(queues=2) as guest:
            with pytest.raises(QueueError, match="broken"):
                guest.flush()
            until(lambda: guest.frontend.get_status() & 64)
            assert guest.read(0, 512, queue=1) == CONTENT[:512]
        served.serves()


# Features, status, configuration


def test_features_that_are_lies_are_not_used_when_they_are_accepted(image: str) -> None:
    with disk(image, "feature-lie=12", "feature-lie=9") as served, served.guest() as guest:
        # It has several queues (12), and flushes (9).
        assert not guest.frontend.features >> 9 & 1
        assert not guest.frontend.features >> 12 & 1
        assert guest.read(0, 512) == CONTENT[:512]
    with disk(image, "feature-lie=5") as served, served.guest() as guest:
        assert guest.frontend.features >> 5 & 1
        assert guest.read(0, 512) == CONTENT[:512]


def test_the_configuration_is_flipped_by_a_bit_where_the_rule_says(image: str) -> None:
    with disk(image, "config-flip offset=0-7") as served, served.guest() as guest:
        difference = guest.config.capacity ^ len(CONTENT) // 512
        assert difference.bit_count() == 1
        assert guest.config.num_queues == 2


def test_the_status_is_a_lie(image: str) -> None:
    with disk(image, "status-lie=0x40 after=1") as served, served.guest() as guest:
        honest = guest.frontend.get_status()
        assert guest.frontend.get_status() in (honest, honest ^ 0x40)
        assert guest.frontend.get_status() == honest | 0x40


# The wire


def test_the_connection_is_closed_at_a_message(image: str) -> None:
    with disk(image, "hang-up op=GET_VRING_BASE") as served:
        with served.guest() as guest:
            assert guest.read(0, 512) == CONTENT[:512]
            with pytest.raises(GuestioError):
                guest.frontend.stop_queue(0)
        served.serves()


def test_an_answer_on_the_wire_is_late_and_nothing_else_is(image: str) -> None:
    with disk(image, "slow=300ms op=GET_STATUS") as served, served.guest() as guest:
        began = time.monotonic()
        guest.frontend.get_status()
        assert time.monotonic() - began >= 0.3
        assert guest.read(0, 512) == CONTENT[:512]


def test_an_answer_never_comes(image: str) -> None:
    with disk(image, "no-reply op=GET_STATUS") as served:
        with served.guest(timeout=0.5) as guest, pytest.raises(GuestioError):
            guest.frontend.get_status()
        served.serves()


def test_an_answer_has_a_wrong_bit(image: str) -> None:
    with disk(image, "bad-reply op=GET_STATUS") as served, served.guest() as guest:
        seen = {guest.frontend.get_status() for _ in range(1)}
        assert seen != {15}
        assert struck(served) == 1


# The IOMMU


def test_memory_is_written_after_it_was_unmapped(image: str) -> None:
    with (
        disk(image, "access-after-unmap once") as served,
        served.guest(iommu="strict", event_idx=True) as guest,
    ):
        # The driver unmaps its buffer, and looks into it afterwards.
        found = [guest.read(0, 4096) for _ in range(4)]
        assert struck(served) == 1
        changed = [a ^ b for data in found for a, b in zip(data, CONTENT, strict=False) if a != b]
        assert changed == [0xFF]


def test_translations_are_asked_for_that_nothing_needs(image: str) -> None:
    with disk(image, "miss-storm=50") as served, served.guest(iommu="strict") as guest:
        assert guest.read(0, 4096) == CONTENT[:4096]
        assert guest.frontend.iotlb.counts.misses > 50


def test_a_translation_is_taken_as_refused(image: str) -> None:
    with disk(image, "refuse after=8 for=4") as served:
        with served.guest(iommu="strict") as guest:
            failed = 0
            for _ in range(12):
                try:
                    guest.read(0, 4096)
                except BlkError:
                    failed += 1
                except QueueError:
                    # The status itself could not be reached.
                    failed += 1
                    break
            assert failed
        served.serves()


# Devices that speak first


@pytest.mark.parametrize("rule", ["error op=fill", "short=60 op=fill", "delay op=fill"])
def test_an_entropy_device_misbehaves(rule: str) -> None:
    device = Misbehaving(EntropyDevice(), [rule])
    with serving(device) as path, Driver(path) as guest:
        buffer = guest.post(64)
        guest.wait(buffer)
        wanted = {"error": 0, "short": 4, "delay": 64}[rule.partition(" ")[0].partition("=")[0]]
        assert buffer.written == wanted
    device.close()


def test_what_a_device_says_first_is_corrupted_and_dropped() -> None:
    keyboard = InputDevice.keyboard()
    device = Misbehaving(keyboard, ["corrupt op=event nth=1", "drop op=event nth=3"])
    with serving(device, stop_timeout=0.2) as path, Driver(path, queues=2) as guest:
        buffers = [guest.post(8) for _ in range(8)]
        keyboard.send(("KEY_A", 1))
        keyboard.send(("KEY_A", 0))
        guest.wait(buffers[0])
        guest.wait(buffers[1])
        assert buffers[0].data != b"\1\0\36\0\1\0\0\0"
        assert buffers[1].data == bytes(8)
        assert not buffers[2].done
    device.close()


def test_a_console_with_late_output_loses_nothing() -> None:
    console = ConsoleDevice()
    device = Misbehaving(console, ["delay=5ms", "late-interrupt=2ms"])
    with serving(device) as path, Driver(path, queues=2) as guest:
        buffers = [guest.send(b"abc", 1) for _ in range(5)]
        for buffer in buffers:
            guest.wait(buffer)
    device.close()


# What is no device, and what is none for the transport


def test_what_is_wrong_raises_before_anything_is_served(image: str, tmp_path: Path) -> None:
    from guestio.serving import make_server

    with pytest.raises(TypeError, match="must be a guestio Device"):
        Misbehaving("disk")  # type: ignore[arg-type]
    with contextlib.closing(BlockDevice(image)) as device:
        with pytest.raises(ValueError, match="op=raed: a disk has no 'raed'"):
            Misbehaving(device, ["error op=raed"])
        with pytest.raises(ValueError, match="msi-lost: there is a PCI function over vfio-user"):
            make_server(Misbehaving(device, ["msi-lost"]), tmp_path / "s")
        with pytest.raises(ValueError, match="hang-up: over vhost-user only"):
            make_server(Misbehaving(device, ["hang-up"]), tmp_path / "s", transport="vfio-user")
    assert not (tmp_path / "s").exists()


def test_all_that_a_device_is_asked_is_passed_on() -> None:
    for theirs, ours in ((Device, Misbehaving), (PciDevice, MisbehavingPci)):
        names = {name for name in vars(theirs) if not name.startswith("_")}
        # What is set when it is made, from what the device says then.
        names -= set(PciDevice.__annotations__) | {"server"}
        assert names <= vars(ours).keys(), (theirs, names - vars(ours).keys())


def test_without_rules_it_is_the_device_itself(image: str) -> None:
    with disk(image) as served, served.guest(iommu="strict", queues=2) as guest:
        assert guest.read(0, 65536) == CONTENT[:65536]
        guest.write(0, b"q" * 512, queue=1)
        guest.flush()
        assert guest.read(0, 512) == b"q" * 512


def test_a_device_is_hosted_as_it_is() -> None:
    class Odd(Device):
        device_id = 61
        num_queues = 3

        def process(self, queue: int, chain: object) -> int:
            return 0

    device = Misbehaving(Odd(), ["error op=request"])
    assert (device.device_id, device.num_queues) == (61, 3)
    with serving(device) as path, Driver(path) as guest:
        buffer = guest.send(b"x")
        guest.wait(buffer)
        assert buffer.written == 0
