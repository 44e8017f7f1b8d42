"""Rings of a real back-end: started, stopped, moved, broken; and devices that misbehave."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestio.errors import DeviceError, GuestioError
from guestio.memory import Backing, MmapRegion
from guestio.ratelog import LOG
from guestio.vhost_user.frontend import PROTOCOL_FEATURES, Frontend
from guestio.vhost_user.inflight import InflightRegion
from guestio.vhost_user.messages import (
    FrontendRequest,
    ProtocolFeature,
    VringAddr,
    VringFd,
    VringState,
)
from guestio.vhost_user.request_channel import RefusedError
from guestio.virtio.device import Status
from tests.kit.rings import INDIRECT as INDIRECT_FLAG
from tests.kit.rings import NEXT, PAGE, WRITE, Desc
from tests.kit.serving import (
    BUFFERS,
    EVENT_IDX,
    FAILED,
    INDIRECT,
    OK,
    Driver,
    Mirror,
    Serving,
    errors_of,
    lasting,
    until,
    warnings_of,
)

F = FrontendRequest


@pytest.fixture
def device() -> Mirror:
    return Mirror(queues=3)


@pytest.fixture
def serving(device: Mirror, tmp_path: Path) -> Iterator[Serving]:
    with Serving(device, tmp_path / "socket") as made:
        yield made


@pytest.fixture
def driver(serving: Serving) -> Iterator[Driver]:
    with Driver(serving.path, queues=2) as made:
        yield made


class TestStopping:
    @pytest.mark.parametrize("features", [0, EVENT_IDX])
    def test_it_answers_where_it_stopped_and_goes_on_there(
        self, serving: Serving, device: Mirror, features: int
    ) -> None:
        with Driver(serving.path, features=features) as driver:
            done = 0
            for round_ in range(30):
                numbers = [driver.prepare(0, b"r%d.%d" % (round_, i)) for i in range(20)]
                driver.handles[0].kick()
                base = driver.stop(0)
                ring = driver.rings[0]
                assert ring.used_idx == base, "what was taken was finished"
                assert done <= base <= ring.offered
                assert len(device.seen) == base
                # Nothing happens while it is stopped, whatever is available.
                time.sleep(0.002)
                assert ring.used_idx == base
                driver.start(0, base)
                driver.handles[0].kick()
                driver.wait(0, numbers[-1])
                done = ring.offered
                length = len(b"r%d.19" % round_)
                assert driver.result(0, numbers[-1], length)[0] == OK
            # Every request was served once, in order.
            assert [source for _, source in device.seen] == [
                b"r%d.%d" % (round_, i) for round_ in range(30) for i in range(20)
            ]

    def test_a_request_in_flight_is_finished_first(
        self, serving: Serving, device: Mirror, driver: Driver
    ) -> None:
        driver.submit(0, b"WAIT")
        assert device.entered.wait(5)
        driver.submit(0, b"next")
        device.go_on.set()
        base = driver.stop(0)
        assert base in {1, 2}
        assert driver.rings[0].used_idx == base
        assert driver.result(0, 0, 4) == (OK, b"TIAW")

    def test_from_where_the_front_end_says(self, driver: Driver) -> None:
        for _ in range(5):
            driver.run(0, b"abc")
        assert driver.stop(0) == 5
        # As after a migration: the ring's memory goes on elsewhere in its numbers.
        ring = driver.rings[0]
        ring.offered = 65530
        ring.set_avail_idx(65530)
        ring.view.write(ring.used + 2, (65530).to_bytes(2, "little"))
        driver.start(0, 65530)
        for i in range(10):
            assert driver.run(0, b"wrap") == (OK, b"parw")
            assert ring.used_idx == (65531 + i) & 0xFFFF
        assert driver.stop(0) == 4

    def test_of_rings_that_never_ran(self, serving: Serving) -> None:
        with Frontend(serving.path) as frontend:
            frontend.negotiate(1 << 32)
            assert frontend.stop_queue(1) == 0
            frontend.request(F.SET_VRING_BASE, VringState(2, 77))
            assert frontend.stop_queue(2) == 77
            assert frontend.stop_queue(2) == 77

    def test_the_other_queue_goes_on(self, driver: Driver) -> None:
        driver.stop(0)
        assert driver.run(1, b"go on") == (OK, b"no og")

    def test_kick_fds_are_let_go(self, driver: Driver) -> None:
        event = driver.handles[0].kick_fd
        assert event is not None
        kept = os.dup(event)
        driver.run(0, b"abc")
        driver.stop(0)
        # The kick was taken back, and a late one means nothing.
        assert not select.select([kept], [], [], 0)[0]
        driver.prepare(0, b"late")
        os.eventfd_write(kept, 1)
        driver.frontend.sync()
        assert driver.rings[0].used_idx == 1
        os.close(kept)

    def test_a_kick_fd_that_waits_delays_no_other_queue(self, driver: Driver) -> None:
        event = driver.handles[0].kick_fd
        assert event is not None
        kept = os.dup(event)
        driver.run(0, b"abc")
        os.eventfd_read(kept)
        os.set_blocking(kept, True)
        assert driver.stop(0) == 1
        os.close(kept)


class TestEnabling:
    def test_a_disabled_ring_waits(self, serving: Serving) -> None:
        with Driver(serving.path, queue_options={"enable": False}) as driver:
            driver.submit(0, b"early")
            driver.frontend.sync()
            time.sleep(0.02)
            assert driver.rings[0].used_idx == 0
            driver.frontend.enable_queue(0, enable=True)
            driver.wait(0, 0)
            assert driver.result(0, 0, 5) == (OK, b"ylrae")
            driver.frontend.enable_queue(0, enable=False)
            driver.submit(0, b"later")
            driver.frontend.sync()
            time.sleep(0.02)
            assert driver.rings[0].used_idx == 1
            driver.frontend.enable_queue(0, enable=True)
            driver.wait(0, 1)

    def test_without_protocol_features_rings_are_enabled_at_once(self, serving: Serving) -> None:
        with Frontend(serving.path) as frontend:
            frontend.request(F.SET_OWNER)
            frontend.set_features(1 << 32)  # without VHOST_USER_F_PROTOCOL_FEATURES
            # Only the memory table's own message remains for a front-end that old.
            assert frontend.protocol_features == 0
            frontend.sync()

    @pytest.mark.parametrize("iommu", [False, True])
    @pytest.mark.parametrize("features", [0, EVENT_IDX])
    def test_without_kick_fd_it_is_polled(
        self, serving: Serving, iommu: bool, features: int
    ) -> None:
        options = {"kick": False}
        with Driver(serving.path, iommu=iommu, features=features, queue_options=options) as driver:
            for _ in range(20):
                assert driver.run(0, b"polled") == (OK, b"dellop")
                time.sleep(0.003)
            assert driver.stop(0) == 20
            driver.prepare(0, b"stopped")
            time.sleep(0.02)
            assert driver.rings[0].used_idx == 20

    def test_without_a_call_fd_there_is_no_call(self, serving: Serving) -> None:
        with Driver(serving.path, queue_options={"call": False}) as driver:
            assert driver.run(0, b"quiet") == (OK, b"teiuq")

    def test_the_driver_is_called(self, driver: Driver) -> None:
        driver.run(0, b"abc")
        assert driver.handles[0].wait_call(5)
        driver.rings[0].set_avail_flags(1)
        driver.run(0, b"abc")
        driver.frontend.sync()
        assert not driver.handles[0].clear_call()

    def test_a_full_call_fd_delays_no_other_queue(self, driver: Driver) -> None:
        call = driver.handles[0].call_fd
        assert call is not None
        os.eventfd_write(call, 2**64 - 2)
        for _ in range(5):
            assert driver.run(0, b"full") == (OK, b"lluf")

    def test_a_size_that_comes_after_the_kick(self, serving: Serving) -> None:
        with Driver(serving.path, queues=0) as driver:
            frontend, layout = driver.frontend, driver.layout(0)
            addresses = [
                frontend.user_address(gpa) for gpa in (layout.desc, layout.used, layout.avail)
            ]
            frontend.request(F.SET_VRING_ADDR, VringAddr(0, 0, *addresses))
            kick = os.eventfd(1)
            frontend.request(F.SET_VRING_KICK, VringFd(0, has_fd=True), [kick])
            frontend.request(F.SET_VRING_ENABLE, VringState(0, 1))
            frontend.sync()
            driver.memory.write(layout.avail, bytes(200))
            driver.memory.write(BUFFERS, b"size")
            _write_ring(driver, Desc(BUFFERS, 4, NEXT, 1), Desc(BUFFERS + PAGE, 5, WRITE))
            frontend.request(F.SET_VRING_NUM, VringState(0, driver.size))
            until(lambda: driver.memory.read(layout.used + 2, 2) == b"\1\0")
            assert driver.memory.read(BUFFERS + PAGE, 5) == b"ezis" + bytes([OK])
            os.close(kick)


def _write_ring(driver: Driver, *descriptors: Desc) -> None:
    layout = driver.layout(0)
    for i, (addr, length, flags, following) in enumerate(descriptors):
        data = b"".join(
            value.to_bytes(size, "little")
            for value, size in ((addr, 8), (length, 4), (flags, 2), (following, 2))
        )
        driver.memory.write(layout.desc + 16 * i, data)
    driver.memory.write(layout.avail + 4, b"\0\0")
    driver.memory.write(layout.avail + 2, b"\1\0")


class TestBroken:
    """A driver that breaks a rule: its queue stops and says so, all others go on."""

    @pytest.mark.parametrize(
        ("descriptor", "message"),
        [
            (Desc(BUFFERS, 1, NEXT, 0), "the chain from descriptor 0 has a loop"),
            (Desc(BUFFERS, 0), "a descriptor of 0 bytes"),
            (Desc(BUFFERS, 1, NEXT, 64), "descriptor index 64 is outside its table of 64"),
            (Desc(BUFFERS, 16, INDIRECT_FLAG), "but the feature was not negotiated"),
            (Desc(2**64 - 1, 2), r"passes 2**64"),
        ],
    )
    def test_it_is_reported_and_alone(
        self,
        serving: Serving,
        driver: Driver,
        caplog: pytest.LogCaptureFixture,
        descriptor: Desc,
        message: str,
    ) -> None:
        assert driver.run(1, b"before") == (OK, b"erofeb")
        driver.frontend.set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK)
        ring = driver.rings[0]
        ring.put(0, descriptor)
        ring.offer(0)
        driver.handles[0].kick()
        until(driver.handles[0].failed)
        assert driver.frontend.get_status() & Status.NEEDS_RESET
        assert not driver.handles[1].failed()
        assert driver.run(1, b"after") == (OK, b"retfa")
        # More kicks say nothing new.
        for _ in range(10):
            driver.handles[0].kick()
            driver.frontend.sync()
        assert not driver.handles[0].failed()
        assert ring.used_idx == 0
        (logged,) = errors_of(caplog)
        assert logged.startswith("queue 0 stopped: ")
        assert message in logged
        assert serving.stats.queue_errors == 1
        # The driver resets the device and sets it up again.
        driver.frontend.set_status(0)
        assert driver.frontend.get_status() == 0
        driver.frontend._queues.clear()
        driver.add_queue(0)
        assert driver.run(0, b"fresh") == (OK, b"hserf")

    def test_the_next_front_end_is_served(self, serving: Serving) -> None:
        with Driver(serving.path) as driver:
            driver.rings[0].set_avail_idx(1000)
            driver.handles[0].kick()
            until(driver.handles[0].failed)
        serving.check_serves()

    def test_without_an_error_fd(self, serving: Serving) -> None:
        with Driver(serving.path, queues=2) as driver:
            driver.frontend.request(F.SET_VRING_ERR, VringFd(0, has_fd=False))
            driver.rings[0].set_avail_idx(1000)
            driver.handles[0].kick()
            until(lambda: serving.stats.queue_errors == 1)
            assert driver.run(1, b"fine") == (OK, b"enif")

    def test_rings_outside_memory(self, serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
        with Driver(serving.path, queues=1) as driver:
            layout = driver.layout(1)
            user = driver.frontend.user_address(layout.desc)
            driver.frontend.request(F.SET_VRING_NUM, VringState(1, 64))
            driver.frontend.request(F.SET_VRING_ADDR, VringAddr(1, 0, user, 0x1000, user + 0x1000))
            error, kick = os.eventfd(0), os.eventfd(1)
            driver.frontend.request(F.SET_VRING_ERR, VringFd(1, has_fd=True), [error])
            driver.frontend.request(F.SET_VRING_KICK, VringFd(1, has_fd=True), [kick])
            driver.frontend.request(F.SET_VRING_ENABLE, VringState(1, 1))
            assert select.select([error], [], [], 5)[0]
            assert driver.run(0, b"fine") == (OK, b"enif")
            os.close(error)
            os.close(kick)
        assert any("does not share that address" in line for line in errors_of(caplog))

    def test_memory_that_vanishes_under_a_ring(
        self, serving: Serving, caplog: pytest.LogCaptureFixture
    ) -> None:
        with Driver(serving.path, queues=2) as driver:
            driver.run(0, b"abc")
            assert driver.backing.fd is not None
            os.ftruncate(driver.backing.fd, 0x21000)
            driver.handles[0].kick()
            until(driver.handles[0].failed)
            os.ftruncate(driver.backing.fd, Driver.SIZE)
        assert errors_of(caplog) == [
            "queue 0 stopped: the file behind the ring's memory was truncated by its owner"
        ]
        serving.check_serves()

    def test_memory_that_vanishes_under_a_buffer(self, serving: Serving) -> None:
        with Driver(serving.path, queues=2) as driver:
            driver.run(0, b"abc")
            assert driver.backing.fd is not None
            ring = driver.rings[0]
            ring.offer(ring.put_chain(0, Desc(0x1F0000, 16), Desc(BUFFERS, 17, WRITE)))
            os.ftruncate(driver.backing.fd, 0x1F0000)
            driver.handles[0].kick()
            driver.wait(0, 1)
            assert ring.used_entry(1) == (0, 0)
            assert driver.run(1, b"fine") == (OK, b"enif")
            os.ftruncate(driver.backing.fd, Driver.SIZE)
        assert serving.stats.failed_requests == 1
        assert serving.stats.queue_errors == 0


class TestMemory:
    def test_it_comes_and_goes_while_rings_run(self, driver: Driver, serving: Serving) -> None:
        frontend = driver.frontend
        extra = Backing.memfd(0x10000)
        for _ in range(5):
            more = driver.memory.insert_region(MmapRegion(0x10000000, extra))
            frontend.set_memory(more)
            ring = driver.rings[0]
            more.write(0x10000100, b"plugged")
            number = ring.offered
            _, written = driver.run_raw(0, Desc(0x10000100, 7), Desc(0x10000FFF, 8, WRITE))
            assert written == 8
            assert more.read(0x10000FFF, 8) == b"deggulp" + bytes([OK])
            frontend.set_memory(driver.memory)
            # The same request again: the memory is gone, the ring is not.
            ring.offer(0)
            driver.handles[0].kick()
            driver.wait(0, number + 1)
            assert ring.used_entry(number + 1) == (0, 0)
            assert extra.fd is not None
            assert driver.run(0, b"on") == (OK, b"no")
        assert serving.stats.failed_requests == 5
        frontend.iotlb.memory = None
        del more
        extra.close()

    def test_the_whole_table_replaced_under_running_rings(self, driver: Driver) -> None:
        for _ in range(10):
            driver.frontend.set_memory(driver.memory, slots=False)
            assert driver.run(0, b"abc") == (OK, b"cba")
            assert driver.run(1, b"abc") == (OK, b"cba")

    def test_a_ring_that_moves_while_it_runs(self, driver: Driver) -> None:
        frontend = driver.frontend
        ring = driver.rings[0]
        for i in range(6):
            driver.run(0, b"abc")
            old, new = (ring.desc, ring.avail, ring.used), []
            for at in old:
                moved = at ^ 0x8000
                driver.memory.write(moved, driver.memory.read(at, 0x1000))
                new.append(moved)
            users = [frontend.user_address(gpa) for gpa in (new[0], new[2], new[1])]
            frontend.request(F.SET_VRING_ADDR, VringAddr(0, 0, *users))
            ring.desc, ring.avail, ring.used = new
            for at in old:
                driver.memory.write(at, b"\xa5" * 0x1000)
            assert driver.run(0, b"moved") == (OK, b"devom")
            assert ring.used_idx == 2 * (i + 1)
            for at in old:
                assert driver.memory.read(at, 0x1000) == b"\xa5" * 0x1000

    def test_as_many_regions_as_there_are_slots(self, serving: Serving) -> None:
        with Driver(serving.path) as driver:
            slots = driver.frontend.max_memory_slots()
            assert slots == 509
            backing = Backing.memfd(PAGE * slots)
            memory = driver.memory
            assert backing.fd is not None
            regions = [
                MmapRegion.from_fd(0x10000000 + 2 * PAGE * i, backing.fd, PAGE, PAGE * i)
                for i in range(slots)
            ]
            for region in regions[: slots - 1]:
                memory = memory.insert_region(region)
            driver.frontend.set_memory(memory)
            assert driver.run(0, b"many") == (OK, b"ynam")
            with pytest.raises(RefusedError):
                driver.frontend.set_memory(memory.insert_region(regions[-1]))
            assert driver.run(0, b"still") == (OK, b"llits")
            driver.frontend.iotlb.memory = None
            del memory
            backing.close()
            regions.clear()

    def test_removing_what_is_not_there(self, driver: Driver) -> None:
        from guestio.vhost_user.messages import MemoryRegion, SingleMemoryRegion

        with pytest.raises(RefusedError):
            driver.frontend.request(
                F.REM_MEM_REG, SingleMemoryRegion(MemoryRegion(0x5000, 0x1000, 0x1000, 0))
            )
        assert driver.run(0, b"abc") == (OK, b"cba")


class TestFeatures:
    def test_indirect_tables_if_negotiated(self, serving: Serving) -> None:
        with Driver(serving.path, features=INDIRECT | EVENT_IDX) as driver:
            ring = driver.rings[0]
            driver.memory.write(BUFFERS, b"table")
            for _ in range(3):
                head = ring.put_table(
                    5, 0x100000, [Desc(BUFFERS, 5, NEXT, 1), Desc(BUFFERS + PAGE, 6, WRITE)]
                )
                number = ring.offered
                ring.offer(head)
                driver.handles[0].kick()
                driver.wait(0, number)
                assert ring.used_entry(number) == (5, 6)

    def test_the_device_is_told(self, serving: Serving, device: Mirror) -> None:
        with Driver(serving.path, features=0b1):
            assert device.negotiated_features == [1 << 32 | 0b1]

    @pytest.mark.parametrize("repeated", [False, True])
    @pytest.mark.parametrize("reset", ["status 0", "RESET_DEVICE"])
    def test_a_device_that_was_reset_is_told_again(
        self, serving: Serving, device: Mirror, reset: str, repeated: bool
    ) -> None:
        """It forgot them; a front-end need not repeat them."""
        with Driver(serving.path, features=0b1) as driver:
            if reset == "status 0":
                driver.frontend.set_status(0)
            else:
                driver.frontend.reset_device()
            del device.negotiated_features[:]
            if repeated:
                driver.frontend.set_features(driver.features)
            driver.add_queue(0)
            assert driver.run(0, b"abc") == (OK, b"cba")
            driver.frontend.set_features(driver.features)
            driver.add_queue(1)
            driver.frontend.sync()
            assert device.negotiated_features == [1 << 32 | 0b1]

    def test_none_are_told_too(self, serving: Serving, device: Mirror) -> None:
        for _ in range(2):
            with Frontend(serving.path) as frontend:
                frontend.negotiate(0)
        until(lambda: device.resets == 2, "the device was not reset")
        assert device.negotiated_features == [0, 0]

    def test_a_reset_device_that_refuses_them(self, serving: Serving, device: Mirror) -> None:
        """Its queue does not start without."""

        def refuse(features: int) -> None:
            raise DeviceError("not again")

        with Driver(serving.path, features=0b1) as driver:
            driver.frontend.reset_device()
            device.negotiated = refuse  # type: ignore[method-assign]
            with pytest.raises(RefusedError):
                driver.add_queue(0)

    def test_a_device_that_refuses_them(self, serving: Serving, device: Mirror) -> None:
        def refuse(features: int) -> None:
            raise DeviceError("not with me")

        with Frontend(serving.path) as frontend:
            frontend.negotiate(1 << 32)
            device.negotiated = refuse  # type: ignore[method-assign]
            with pytest.raises(RefusedError):
                frontend.set_features(1 << 33 | 1 << 32)
            # Nothing changed: there is no IOMMU now, so an update makes no sense.
            reply = frontend.request(F.IOTLB_MSG, bytes(25) + b"\2" + bytes(6), has_reply=True)
            assert reply != bytes(8)

    def test_configuration_space(self, serving: Serving, device: Mirror) -> None:
        with Frontend(serving.path) as frontend:
            frontend.negotiate(1 << 32)
            assert frontend.get_config(3, 5) == bytes([3, 4, 5, 6, 7])
            assert frontend.get_config(60, 8) == bytes([60, 61, 62, 63, 0, 0, 0, 0])
            frontend.set_config(2, b"ab")
            assert frontend.get_config(0, 5) == b"\0\1ab\4"
            with pytest.raises(RefusedError):
                frontend.set_config(63, b"ab")
            with pytest.raises(RefusedError):
                frontend.set_config(0, b"x", flags=1)
            assert device.space[:4] == b"\0\1ab"

    def test_status_and_reset(self, serving: Serving, device: Mirror) -> None:
        with Driver(serving.path) as driver:
            driver.frontend.set_status(0xF)
            assert driver.frontend.get_status() == 0xF
            driver.run(0, b"abc")
            before = device.resets
            driver.frontend.reset_device()
            assert device.resets == before + 1
            assert driver.frontend.get_status() == 0
            driver.add_queue(0)
            assert driver.run(0, b"again") == (OK, b"niaga")

    def test_features_change_between_boots(self, serving: Serving) -> None:
        with Driver(serving.path, queues=0) as driver:
            for features in (0, EVENT_IDX, INDIRECT, EVENT_IDX | INDIRECT, 0):
                driver.frontend.set_features(1 << 32 | features)
                driver.features = features
                driver.add_queue(0)
                for _ in range(3):
                    assert driver.run(0, b"boot") == (OK, b"toob")
                driver.stop(0)

    def test_without_acknowledgements(self, serving: Serving) -> None:
        with Frontend(serving.path) as frontend:
            frontend.negotiate(1 << 32, PROTOCOL_FEATURES & ~ProtocolFeature.REPLY_ACK)
            frontend.sync()


class TestDevices:
    """A device that fails is the business of its requests, whatever it raises."""

    @pytest.mark.parametrize(
        "error", [DeviceError("no"), ValueError("bad"), OSError(5, "io"), RuntimeError("?")]
    )
    def test_that_raises(
        self, serving: Serving, device: Mirror, driver: Driver, error: Exception
    ) -> None:
        device.error = error
        number = driver.submit(0, b"RAISE")
        driver.wait(0, number)
        assert driver.rings[0].used_entry(number)[1] == 0
        assert driver.run(0, b"fine") == (OK, b"enif")
        assert serving.stats.failed_requests == 1
        assert serving.stats.queue_errors == 0

    @pytest.mark.parametrize("value", ["-1", "1000", "None", "1.5", "2**64", "True", "'x'"])
    def test_that_returns_nonsense(self, serving: Serving, driver: Driver, value: str) -> None:
        number = driver.submit(0, b"RETURN" + value.encode())
        driver.wait(0, number)
        assert driver.rings[0].used_entry(number)[1] == 0
        assert driver.run(0, b"fine") == (OK, b"enif")
        assert serving.stats.failed_requests == 1

    def test_that_fails_to_fail(self, serving: Serving, device: Mirror, driver: Driver) -> None:
        device.error = ValueError("first")
        for error in (RuntimeError("second"), DeviceError("second")):
            device.fail_error = error
            number = driver.submit(0, b"RAISE")
            driver.wait(0, number)
            assert driver.rings[0].used_entry(number) == (2 * number, 0)
        assert driver.run(1, b"fine") == (OK, b"enif")

    def test_that_closes_its_request(self, device: Mirror, driver: Driver) -> None:
        process = device.process

        def close(queue: int, chain: object) -> int:
            chain.readable.close()  # type: ignore[attr-defined]
            chain.writable.close()  # type: ignore[attr-defined]
            return 1

        device.process = close  # type: ignore[method-assign,assignment]
        number = driver.submit(0, b"abc")
        driver.wait(0, number)
        device.process = process  # type: ignore[method-assign]
        assert driver.run(0, b"fine") == (OK, b"enif")

    @pytest.mark.parametrize("what", ["config", "reset", "negotiated", "write_config"])
    @pytest.mark.parametrize("error", [RuntimeError("oops"), DeviceError("no")])
    def test_whose_other_methods_raise(
        self, serving: Serving, device: Mirror, what: str, error: Exception
    ) -> None:
        def fail(*_: object) -> None:
            raise error

        original = getattr(device, what)
        setattr(device, what, fail)
        try:
            with Frontend(serving.path, timeout=5) as frontend:
                frontend.negotiate(1 << 32)
                frontend.get_config(0, 4)
                frontend.set_config(0, b"x")
                frontend.reset_device()
        except GuestioError:
            pass
        finally:
            serving.let_go()
            setattr(device, what, original)
        serving.check_serves()

    def test_whose_features_cannot_be(self, serving: Serving, device: Mirror) -> None:
        good, device.features = device.features, 1 << 30
        with pytest.raises(GuestioError), Frontend(serving.path, timeout=5) as frontend:
            frontend.negotiate(1 << 32)
        device.features = good
        serving.check_serves()


def test_requests_that_reach_nothing_are_logged_once_a_burst(
    serving: Serving, driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(100):
        driver.run_raw(0, Desc(1 << 40, 16), Desc(BUFFERS, 1, WRITE))
        assert driver.memory.read(BUFFERS, 1) == bytes([FAILED])
    assert serving.stats.failed_requests == 100
    assert driver.run(0, b"fine") == (OK, b"enif")
    driver.close()
    LOG.flush()
    logged = warnings_of(caplog)
    assert logged[0] == (
        "queue 0: request refused: no usable memory behind the buffer at 0x10000000000"
    )
    assert logged[-1] == f"90 more lines like this were not logged: {logged[0]}"
    assert len(logged) == 11


def test_queues_take_turns(serving: Serving, driver: Driver) -> None:
    """A queue that always has more does not keep the others from being served."""
    ring = driver.rings[0]
    head = ring.put_chain(0, Desc(BUFFERS, 4), Desc(BUFFERS + PAGE, 5, WRITE))
    deadline = time.monotonic() + 0.5
    rounds = 0
    while time.monotonic() < deadline or serving.stats.requests <= 100:
        # Keep it full: as soon as something is used it is offered again.
        room = driver.size - ((ring.offered - ring.used_idx) & 0xFFFF)
        if room:
            ring.offer(*[head] * room)
            driver.handles[0].kick()
        if rounds % 50 == 0:
            with lasting(0.0, 5.0):
                assert driver.run(1, b"turn") == (OK, b"nrut")
        rounds += 1


def test_a_ring_larger_than_the_region_for_requests_in_flight(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    """As under QEMU 10.0.13: 1024 entries, and notes for the 128 that it was told.

    It is served without notes, and the part for them is left alone.
    """
    with InflightRegion.create(2, 8) as region:
        noted = (region.description, region.fd)
        with Driver(serving.path, queues=2, size=16, inflight=noted) as driver:
            for number in range(40):
                assert driver.run(number % 2, b"text") == (OK, b"txet")
            assert driver.stop(0) == 20
        assert os.pread(region.fd, 4096, 0).strip(b"\0") == b""
    (first, *_) = warnings_of(caplog)
    assert "queue 0 of 16 entries: its requests are not tracked" in first
    assert not errors_of(caplog)
