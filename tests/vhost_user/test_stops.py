"""A stop ends what belonged to it: translations, questions, and what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from guestio.addr import Permissions
from guestio.vhost_user.iotlb_service import MissAction, MissAnswer
from guestio.vhost_user.messages import IotlbMessage
from tests.vhost_user.serving import (
    OK,
    Driver,
    Later,
    Serving,
    until,
)
from tests.vhost_user.test_virtqueue_late import Waiting, begin, mirrored
from tests.virtio.rings import PAGE, WRITE, Desc

RW = Permissions.READ_WRITE

ELSEWHERE = 0x180000
"""Guest memory that stands in for the buffers once a driver has mapped it there."""


@pytest.fixture
def behind(serving: Serving) -> Iterator[Driver]:
    """Two queues behind an IOMMU."""
    with Driver(serving.path, queues=2, iommu=True) as made:
        yield made


def stop_all(driver: Driver) -> None:
    for index in list(driver.handles):
        driver.stop(index)


ENDS: dict[str, Callable[[Driver], object]] = {
    "stop": stop_all,
    "stop, then status 0": lambda driver: (stop_all(driver), driver.frontend.set_status(0)),
    "status 0, then stop": lambda driver: (driver.frontend.set_status(0), stop_all(driver)),
    "reset": lambda driver: driver.frontend.reset_device(),
}


def remap(driver: Driver, index: int, number: int) -> int:
    """Move a request's two pages without a word to the back-end; where they are now."""
    driver.frontend.iotlb.mappings.set_mapping(
        driver.at(driver.buffer(index, number)), ELSEWHERE, 2 * PAGE, RW
    )
    return ELSEWHERE


def again(driver: Driver, index: int) -> None:
    """Run a queue's second request, of 4 bytes, at the addresses of the first one."""
    ring, place = driver.rings[index], driver.at(driver.buffer(index, 0))
    ring.offer(ring.put_chain(0, Desc(place, 4), Desc(place + PAGE, 5, WRITE)))
    driver.handles[index].kick()
    driver.wait(index, 1)


def used(driver: Driver, index: int) -> int:
    return driver.rings[index].used_idx


class TestTranslations:
    @pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
    def test_are_forgotten(self, behind: Driver, end: Callable[[Driver], object]) -> None:
        """A front-end forwards no invalidation while the queues stand still."""
        old = behind.buffer(0, 0)
        assert behind.run(0, b"before") == mirrored(b"before")
        asked = behind.frontend.iotlb.counts.misses
        end(behind)
        new = remap(behind, 0, 0)
        behind.memory.write(old, bytes(PAGE))
        behind.memory.write(new, b"afterwards")
        # The next request uses the same addresses, which lead elsewhere.
        ring = behind.rings[0]
        before = behind.memory.read(old, 2 * PAGE)
        behind.start(0, used(behind, 0))
        number = ring.offered
        ring.offer(
            ring.put_chain(0, Desc(behind.at(old), 10), Desc(behind.at(old) + PAGE, 11, WRITE))
        )
        behind.handles[0].kick()
        behind.wait(0, number)
        assert behind.memory.read(new + PAGE, 11) == b"afterwards"[::-1] + bytes([OK])
        assert behind.memory.read(old, 2 * PAGE) == before
        assert behind.frontend.iotlb.counts.misses >= asked + 2

    def test_that_arrive_during_the_stop_are_not_believed(self, behind: Driver) -> None:
        """An answer that was under way, for one; what it says may be over by the next start."""
        assert behind.run(0, b"before") == mirrored(b"before")
        stop_all(behind)
        place = behind.buffer(0, 0)
        assert behind.frontend.iotlb.push(behind.at(place))
        assert behind.frontend.iotlb.push(behind.at(place) + PAGE)
        new = remap(behind, 0, 0)
        behind.memory.write(new, b"text")
        before = behind.memory.read(place, 2 * PAGE)
        behind.start(0, 1)
        again(behind, 0)
        assert behind.memory.read(new + PAGE, 5) == b"txet" + bytes([OK])
        assert behind.memory.read(place, 2 * PAGE) == before

    def test_that_are_told_a_running_queue_are_kept(self, behind: Driver) -> None:
        """The start of a second queue does not have the first one ask anew."""
        behind.stop(1)
        assert behind.run(0, b"before") == mirrored(b"before")
        asked = behind.frontend.iotlb.counts.misses
        behind.start(1)
        again(behind, 0)
        assert behind.frontend.iotlb.counts.misses == asked

    def test_of_another_queue_are_asked_for_anew(self, behind: Driver) -> None:
        assert behind.run(1, b"other") == mirrored(b"other")
        behind.stop(0)
        new = remap(behind, 1, 0)
        behind.memory.write(new, b"text")
        again(behind, 1)
        assert behind.memory.read(new + PAGE, 5) == b"txet" + bytes([OK])

    def test_in_use_by_another_queue_are_waited_for(self, device: Later, behind: Driver) -> None:
        """Another queue's stop neither waits for a request nor lets its memory be taken away."""
        (number,) = begin(behind, device, b"LATE", queue=1)
        behind.stop(0)
        page = behind.at(behind.buffer(1, number)) + PAGE
        revoking = Waiting(lambda: behind.frontend.iotlb.unmap((page, PAGE)))
        assert revoking.waits()
        device.finish(b"LATE")
        revoking.end()
        behind.wait(1, number)
        assert behind.result(1, number, 4) == mirrored(b"LATE")

    def test_that_were_refused_may_be_asked_for_again(self, behind: Driver) -> None:
        """What a stopped queue was refused is not held against the next start."""
        assert behind.run(0, b"before") == mirrored(b"before")
        wanted = behind.at(behind.buffer(0, 1))
        refused: list[int] = []

        def refuse(message: IotlbMessage) -> MissAnswer:
            if message.iova != wanted:
                return MissAnswer()
            refused.append(message.iova)
            return MissAnswer(MissAction.REFUSE)

        service = behind.frontend.iotlb
        service.miss_hook = lambda message: (
            MissAnswer(MissAction.IGNORE) if message.iova == wanted else MissAnswer()
        )
        behind.submit(0, b"text")
        until(lambda: service.counts.ignored)
        # From here on the queue is not served, so nobody draws a conclusion from the refusal.
        behind.frontend.enable_queue(0, enable=False)
        service.miss_hook = refuse
        until(lambda: refused)
        until(lambda: behind.frontend.iotlb.counts.refused)
        behind.frontend.sync()
        base = behind.stop(0)
        service.miss_hook = None
        behind.start(0, base)
        behind.handles[0].kick()
        behind.wait(0, 1)
        assert behind.result(0, 1, 4) == mirrored(b"text")
