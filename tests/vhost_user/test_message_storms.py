"""Front-ends that send as much as the protocol lets them: others are served, and nothing grows."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestio._core.base.variant import NAME
from guestio.errors import GuestioError
from guestio.vhost_user import translator
from guestio.vhost_user.connection import MAX_MEM_SLOTS
from guestio.vhost_user.frontend import PROTOCOL_FEATURES
from guestio.vhost_user.messages import (
    U64,
    FrontendRequest,
    Inflight,
    IotlbMessage,
    MemoryRegion,
    ProtocolFeature,
    SingleMemoryRegion,
    VringAddr,
    VringFd,
    VringState,
    encode_iotlb,
    encode_message,
)
from guestio.vhost_user.request_channel import RefusedError
from tests.kit.hostile import Raw
from tests.kit.rings import PAGE
from tests.kit.serving import (
    DESC,
    IOVA,
    OK,
    PLATFORM,
    Driver,
    Later,
    Mirror,
    Serving,
    footprint,
    memfd,
    until,
)

F = FrontendRequest
GIB = 1 << 30
LITTLE = (512 if "asan" in NAME else 64) << 20
"""Bytes of memory that tables and their like may take; a sanitizer keeps what was freed."""


def resident() -> int:
    """Bytes of memory that this process has touched."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


class TestMemory:
    def test_as_many_huge_regions_as_there_may_be(self, survivor: Serving) -> None:
        """Together 31.8 TiB, none of which is there."""
        size = 64 * GIB
        fd = memfd(size)
        before = resident()
        with Driver(survivor.path, queues=0) as driver:
            for number in range(MAX_MEM_SLOTS - 1):
                at = (1 + number) * size
                driver.frontend.request(
                    F.ADD_MEM_REG, SingleMemoryRegion(MemoryRegion(at, size, at, 0)), [fd]
                )
            one_more = SingleMemoryRegion(MemoryRegion(1 << 50, PAGE, 1 << 50, 0))
            with pytest.raises((RefusedError, GuestioError)):
                driver.frontend.request(F.ADD_MEM_REG, one_more, [fd])
                driver.frontend.sync()
                driver.frontend.request(F.ADD_MEM_REG, one_more, [fd])
        os.close(fd)
        assert resident() - before < LITTLE

    def test_a_table_that_is_set_again_and_again(self, survivor: Serving) -> None:
        with Driver(survivor.path, queues=2) as driver:
            for lap in range(200):
                driver.frontend.set_memory(driver.memory, slots=False)
                if not lap % 20:
                    assert driver.run(lap // 20 % 2, b"still") == (OK, b"llits")


class TestInflight:
    def test_regions_as_large_as_there_are(self, survivor: Serving) -> None:
        before = resident()
        with Driver(survivor.path, queues=0, inflight=True) as driver:
            driver.frontend.sync()
            after = footprint()
            for _ in range(100):
                _, fd = driver.frontend.get_inflight(2, 32768)
                os.close(fd)
            until(lambda: len(footprint()[0]) <= len(after[0]) + 1)
            driver.add_queue(0)
            assert driver.run(0, b"noted") == (OK, b"deton")
        assert resident() - before < LITTLE

    @pytest.mark.parametrize(
        ("size", "offset"),
        [(1 << 62, 0), (1 << 40, 0), (PAGE, 1 << 62), ((1 << 64) - 1, 1), (0, 0)],
    )
    def test_regions_that_are_larger(self, survivor: Serving, size: int, offset: int) -> None:
        fd = memfd(1 << 40)
        before = resident()
        protocol = PROTOCOL_FEATURES | ProtocolFeature.INFLIGHT_SHMFD
        with Raw(survivor) as raw:
            raw.request(F.SET_PROTOCOL_FEATURES, U64(int(protocol)))
            raw.request(F.SET_FEATURES, U64(1 << 32 | 1 << 30))
            for _ in range(20):
                raw.request(F.SET_INFLIGHT_FD, Inflight(size, offset, 2, 32768), [fd])
        os.close(fd)
        assert resident() - before < LITTLE


class TestRings:
    def test_messages_about_one_do_not_keep_another(self, survivor: Serving) -> None:
        """Whatever is said about queue 1, a thousand times, queue 0 is served."""
        rng = random.Random(1)
        with Driver(survivor.path, queues=2) as driver:
            before = len(footprint()[0])
            exchange = driver.frontend._exchange
            fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
            at = driver.frontend.user_address(DESC)

            def anything(*, started: bool) -> tuple[bytes, list[int]]:
                fd = [rng.choice(fds)] if rng.random() < 0.7 else []
                places = [at + PAGE * rng.randrange(64) for _ in range(3)]
                before_start = [
                    (F.SET_VRING_NUM, VringState(1, 1 << rng.randrange(11))),
                    (F.SET_VRING_BASE, VringState(1, rng.randrange(1 << 16))),
                ]
                request, payload = rng.choice(
                    [
                        (F.SET_VRING_ENABLE, VringState(1, rng.randrange(2))),
                        (F.SET_VRING_ADDR, VringAddr(1, 0, *places, 0)),
                        (F.SET_VRING_CALL, VringFd(1, has_fd=bool(fd))),
                        (F.SET_VRING_ERR, VringFd(1, has_fd=bool(fd))),
                        *([(F.SET_VRING_KICK, VringFd(1, has_fd=bool(fd)))] if started else []),
                        *([] if started else before_start),
                    ]
                )
                passes = isinstance(payload, VringFd)
                return encode_message(request, payload), fd if passes else []

            for _ in range(40):
                driver.frontend.stop_queue(1)
                for number in range(30):
                    data, passed = anything(started=number >= 20)
                    exchange.send(0, data, passed)
                    os.eventfd_write(rng.choice(fds), 1)
                assert driver.run(0, b"still") == (OK, b"llits")
            driver.frontend.sync()
            assert len(footprint()[0]) <= before + len(fds) + 3
            for fd in fds:
                os.close(fd)


class TestIotlb:
    @pytest.fixture
    def few(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
        monkeypatch.setattr(translator, "MAX_TRANSLATIONS", 256)
        with Serving(Mirror(), tmp_path / "socket") as serving:
            yield serving
            serving.check_serves()

    def test_of_updates_and_invalidations(self, few: Serving) -> None:
        """Of any pages, large and small, thousands; a queue is served meanwhile."""
        rng = random.Random(2)
        with Driver(few.path, iommu=True) as driver:
            assert driver.features & PLATFORM
            exchange = driver.frontend._exchange
            connection = few.backend._connection
            assert connection is not None
            iotlb = connection._translator.iotlb
            user = driver.frontend.user_address(0)

            def anything() -> IotlbMessage:
                page = rng.randrange(1 << 13)
                iova, size = (1 << 40) + page * 2 * PAGE, PAGE * rng.choice([1, 1, 1, 2, 500])
                if rng.random() < 0.2:
                    return IotlbMessage.invalidate(iova, size)
                target = user + PAGE * rng.randrange(256)
                return IotlbMessage.update(iova, min(size, 8 * PAGE), target, rng.randrange(1, 4))

            for lap in range(40):
                data = b"".join(
                    encode_iotlb(F.IOTLB_MSG, anything(), need_reply=False) for _ in range(250)
                )
                acknowledged = exchange.send(F.IOTLB_MSG, data, replies=250)
                if not lap % 4:
                    assert driver.run(0, b"still") == (OK, b"llits")
                assert {exchange.wait_ack(each) for each in acknowledged} == {0}
            assert len(iotlb) <= 256
            assert iotlb.stats().evictions > 1000
            assert driver.at(0) == IOVA

    def test_of_what_is_in_use(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A request that waits for its device keeps its pages, and nothing else is kept."""
        monkeypatch.setattr(translator, "MAX_TRANSLATIONS", 256)
        device = Later()
        with Serving(device, tmp_path / "socket") as serving:
            with Driver(serving.path, iommu=True) as driver:
                number = driver.submit(0, b"LATE")
                device.expect(b"LATE")
                exchange, user = driver.frontend._exchange, driver.frontend.user_address(0)
                for lap in range(20):
                    data = b"".join(
                        encode_iotlb(
                            F.IOTLB_MSG,
                            IotlbMessage.update(
                                (1 << 40) + (lap * 500 + i) * 2 * PAGE, PAGE, user + PAGE * i % 7, 3
                            ),
                            need_reply=False,
                        )
                        for i in range(500)
                    )
                    acknowledged = exchange.send(F.IOTLB_MSG, data, replies=500)
                    assert {exchange.wait_ack(each) for each in acknowledged} == {0}
                connection = serving.backend._connection
                assert connection is not None
                assert len(connection._translator.iotlb) <= 256 + 8
                device.finish(b"LATE")
                driver.wait(0, number)
                assert driver.result(0, number, 4) == (OK, b"ETAL")
            serving.let_go()
            device.begun.clear()
            serving.check_serves()
