"""What a ring's device writes to the used ring: never after a revocation, never unmarked."""

from __future__ import annotations

import os

import pytest

from guestio._core.base.variant import CAPACITIES
from guestio._core.iommu.address_space import AddressSpace
from guestio._core.memory.image import ImageFile
from guestio._core.virtio.block_server import BlockServer
from guestio._core.virtio.split import SplitRing
from guestio.addr import Permissions
from guestio.iommu import Iotlb
from guestio.memory import AtomicBitmap, GuestRegionCollection, MmapRegion
from tests.kit.rings import PAGE, WRITE, Desc, HandRing

RW = Permissions.READ_WRITE
DESC, AVAIL, USED, BUFFERS = 0x10000, 0x20000, 0x30000, 0x40000
EACH = CAPACITIES["RING_PUBLISH_EACH"]
"""Requests after which a batch publishes what it has completed."""


class TestRevokedAmidATurn:
    @pytest.mark.parametrize(
        ("count", "at"),
        [(1, 1), (EACH, EACH), (EACH + 1, EACH), (2 * EACH, 2 * EACH), (2 * EACH, EACH + 1)],
    )
    @pytest.mark.capacity(RING_LOOK_WORK=1024)
    def test_the_used_ring_is_not_written_any_more(self, count: int, at: int) -> None:
        """A server's callback takes the used ring away; what was completed is published later."""
        size = 64
        memory = GuestRegionCollection.from_regions([MmapRegion.memfd(0, 0x80000)])
        hand = HandRing(memory, size=size, desc=DESC, avail=AVAIL, used=USED)
        for i in range(count):
            memory.write(BUFFERS + 0x400 * i, bytes(16))
            hand.put_chain(
                2 * i,
                Desc(BUFFERS + 0x400 * i, 16),
                Desc(BUFFERS + 0x400 * i + 16, 513, WRITE),
            )
        hand.offer(*range(0, 2 * count, 2))
        iotlb = Iotlb()
        iotlb.set_mapping(0, 0, USED, RW)
        iotlb.set_mapping(USED, USED, PAGE, RW)
        iotlb.set_mapping(BUFFERS, BUFFERS, 0x80000 - BUFFERS, RW)
        ring = SplitRing(
            AddressSpace(memory._space.regions, iotlb._map), size, DESC, AVAIL, USED, ordered=True
        )
        seen: list[bytes] = []
        calls = 0

        def report(*_: object) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                iotlb.invalidate_mapping(USED, PAGE)
                seen.append(memory.read(USED, PAGE))

        image = os.memfd_create("empty")
        try:
            # The image is empty by now, so every read fails and is reported.
            server = BlockServer(ImageFile(image, 0x10000), report=report)
            chains, misses, served, _ = ring.run_once(server, size, -1, True)
            assert (chains, served, len(seen)) == ([], at, 1)
            assert memory.read(USED, PAGE) == seen[0], "written after it was taken away"
            assert USED in [base for (base, _), _ in misses]
            iotlb.set_mapping(USED, USED, PAGE, RW)
            assert ring.run_once(server, size, -1, True)[2] == count - at
            assert hand.used_idx == count
            assert [hand.used_entry(i)[0] for i in range(count)] == list(range(0, 2 * count, 2))
        finally:
            os.close(image)


class TestMarked:
    """A used ring of three pages: index and flags, elements, the index to be announced."""

    SIZE = 1024
    BASE = 700  # its element is on the second page

    def _make(self, *, event_idx: bool) -> None:
        room = 0x80000
        self.bitmap = AtomicBitmap(room)
        self.memory = GuestRegionCollection.from_regions(
            [MmapRegion.memfd(0, room, bitmap=self.bitmap)]
        )
        self.hand = HandRing(
            self.memory,
            size=self.SIZE,
            desc=DESC,
            avail=AVAIL,
            used=USED,
            base=self.BASE,
            event_idx=event_idx,
        )
        self.memory.write(USED + 2, self.BASE.to_bytes(2, "little"))
        self.hand.set_avail_idx(self.BASE)
        self.hand.put(0, Desc(BUFFERS, 16, WRITE))
        self.ring = SplitRing(
            self.memory._space,
            self.SIZE,
            DESC,
            AVAIL,
            USED,
            base=self.BASE,
            event_idx=event_idx,
        )
        self._begin()

    def _begin(self) -> None:
        """From here on, what is written is to be marked."""
        self.bitmap.reset()
        self.before = self.memory.read(0, 0x80000)

    def _changed(self) -> list[int]:
        """The pages that were written; all of them are marked."""
        now = self.memory.read(0, 0x80000)
        changed = [
            at // PAGE
            for at in range(0, len(now), PAGE)
            if now[at : at + PAGE] != self.before[at : at + PAGE]
        ]
        assert set(changed) <= set(self.bitmap.dirty_pages().tolist())
        return changed

    @pytest.mark.parametrize("event_idx", [False, True])
    def test_elements_and_index(self, event_idx: bool) -> None:
        self._make(event_idx=event_idx)
        self.hand.offer(0)
        (chain,), _ = self.ring.pop()
        self._begin()
        self.ring.complete(chain, 16)
        self.ring.publish()
        assert self._changed() == [USED // PAGE, USED // PAGE + 1]

    def test_an_element_on_two_pages(self) -> None:
        self.BASE = 511
        self._make(event_idx=False)
        self.hand.put(0x101, Desc(BUFFERS, 0x10102, WRITE))
        self.hand.offer(0x101)
        (chain,), _ = self.ring.pop()
        self._begin()
        self.ring.complete(chain, 0x10102)
        self.ring.publish()
        assert self._changed() == [USED // PAGE, USED // PAGE + 1]

    def test_the_index_to_be_announced(self) -> None:
        self._make(event_idx=True)
        assert self.ring.enable_kicks() is False
        assert self._changed() == [USED // PAGE + 2]

    def test_the_flags(self) -> None:
        self._make(event_idx=False)
        self.ring.disable_kicks()
        assert self._changed() == [USED // PAGE]
        self._begin()
        assert self.ring.enable_kicks() is False
        assert self._changed() == [USED // PAGE]
