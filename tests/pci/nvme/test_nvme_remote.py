"""A driver whose memory is not shared: each access is a message, during which anything may come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestio.pci.nvme import NvmeController
from tests.kit.nvme_driver import (
    CC,
    DOORBELLS,
    FATAL,
    PAGE,
    READ,
    READY,
    WRITE,
    NvmeDriver,
    move,
)


@pytest.fixture
def far(image: Path) -> Iterator[NvmeDriver]:
    with NvmeDriver(NvmeController(image), shared=False) as driver:
        driver.enable().ready()
        driver.create(1)
        yield driver


def meanwhile(driver: NvmeDriver, skip: int, what: Callable[[], object]) -> None:
    """Have something happen during an access, after some others."""
    assert driver.remote is not None
    if skip:
        driver.remote.meanwhile = lambda: meanwhile(driver, skip - 1, what)
    else:
        driver.remote.meanwhile = what


def test_reads_and_writes(far: NvmeDriver, image: Path) -> None:
    pages = [far.take() for _ in range(9)]
    far.good(1, READ, **move(1, 16, 64, **far.prps(pages, 1024)))
    data = image.read_bytes()
    found = b"".join(far.get(page, PAGE) for page in pages)
    assert found[1024 : 1024 + 8 * PAGE] == data[2 * PAGE : 10 * PAGE]
    far.put(pages[0], b"w" * PAGE)
    far.good(1, WRITE, **move(1, 0, 8, prp1=pages[0]))
    assert image.read_bytes()[:PAGE] == b"w" * PAGE
    assert far.device._queues.served == 0
    assert b"guestio" in far.identify(1)


# A fetch of entries, the data, and a completion in two parts.
@pytest.mark.parametrize("skip", range(4))
def test_a_doorbell_is_rung_meanwhile(far: NvmeDriver, skip: int) -> None:
    page = far.take()
    second = far.command(READ, cid=2001, **move(1, 8, 8, prp1=page))

    def ring() -> None:
        far.submit(1, second)

    meanwhile(far, skip, ring)
    far.submit(1, far.command(READ, cid=2000, **move(1, 0, 8, prp1=page)))
    found = {far.wait(1).cid, far.wait(1).cid}
    assert found == {2000, 2001}
    assert far.device._queues.outstanding(1) == 0


@pytest.mark.parametrize("how", ["disable", "function", "client"])
@pytest.mark.parametrize("skip", range(6))
def test_a_reset_comes_meanwhile(far: NvmeDriver, image: Path, skip: int, how: str) -> None:
    page = far.take()

    def reset() -> None:
        if how == "disable":
            far.write(CC, 0)
        elif how == "function":
            far.host.reset()
        else:
            far.disconnect()

    meanwhile(far, skip, reset)
    commands = [far.command(READ, **move(1, 8 * n, 8, prp1=page)) for n in range(3)]
    far.submit(1, *commands)
    far.run(lambda: not far.status & READY, "a reset")
    far.settle()
    far.run(lambda: not far.device._io.busy, "its end")
    assert not far.status & (READY | FATAL)
    far.disconnect()
    far.connect()
    far.enable().ready()
    far.create(1)
    page = far.take()
    far.good(1, READ, **move(1, 0, 8, prp1=page))
    assert far.get(page, PAGE) == image.read_bytes()[:PAGE]
    assert far.write(DOORBELLS + 8, far.queues[1].tail) is None


@pytest.mark.parametrize("skip", range(3))
def test_another_life_begins_meanwhile(far: NvmeDriver, skip: int) -> None:
    """What an earlier life's access brings is not taken for a command of the next one."""
    old, new = far.take(), far.take()
    far.put(old, b"o" * PAGE)
    cids: list[int] = []

    def live_again() -> None:
        far.write(CC, 0)
        far.enable()
        far.submit(0, far.command(6, cid=2001, prp1=new, w10=1))

    meanwhile(far, skip, live_again)
    far.submit(0, far.command(6, cid=2000, prp1=old, w10=1))
    cids.append(far.wait(0).cid)
    far.settle()
    assert (cids, far.next(0)) == ([2001], None)
    assert b"guestio" in far.get(new, PAGE)
    assert not far.status & FATAL
    if not skip:
        assert far.get(old, PAGE) == b"o" * PAGE
    assert far.device._queues.outstanding(0) == 0


def test_a_write_is_not_done_after_a_reset(far: NvmeDriver, image: Path) -> None:
    before = image.read_bytes()
    page = far.take()
    far.put(page, b"w" * PAGE)
    # Its entry is fetched first, then its data.
    meanwhile(far, 1, lambda: far.write(CC, 0))
    far.submit(1, far.command(WRITE, **move(1, 0, 8, prp1=page)))
    far.run(lambda: not far.status & READY, "a reset")
    far.settle()
    far.run(lambda: not far.device._io.busy, "its end")
    assert image.read_bytes() == before


def test_events_amid_a_reset(far: NvmeDriver) -> None:
    far.submit(0, far.command(0x0C))
    far.settle()
    meanwhile(far, 0, lambda: far.write(CC, 0))
    far.write(DOORBELLS + 8 * 5, 1)  # belongs to no queue, which is an event
    far.run(lambda: not far.status & READY, "a reset")
    far.enable().ready()
    far.submit(0, far.command(0x0C))
    far.settle()
    assert far.next(0) is None
    far.write(DOORBELLS + 8 * 5, 1)
    assert far.wait(0).result == 0x010000
