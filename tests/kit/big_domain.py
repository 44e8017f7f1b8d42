"""A domain of a virtio-iommu with very many mappings, and a model of it page by page."""

import errno

import numpy as np

from guestio import GuestRegionCollection, Permissions
from guestio.dma import DmaError
from guestio.testing.targets import FailAfter
from guestio.virtio.iommu import VirtioIommu
from tests.kit.iommu_driver import (
    DEVERR,
    INVAL,
    OK,
    PAGE,
    RANGE,
    attach,
    map_,
    send,
    send_all,
    unmap,
)

NOWHERE = -1


class BigDomain:
    """Domain 1 with endpoint 8, whose pages lead to other pages in an order that cannot merge.

    The model has the physical page behind each page, and the first page of its mapping.
    """

    def __init__(self, pages, base=0, **settings):
        self.pages, self.base = pages, base
        self.behind = np.full(pages, NOWHERE)
        self.begins = np.full(pages, NOWHERE)
        self.iommu = VirtioIommu(endpoints=[8, 9], **settings)
        send_all(self.iommu, attach(8, 1))
        self.target = None

    def add_target(self):
        """A DMA target for endpoint 8, and memory behind every page."""
        self.physical = GuestRegionCollection.from_ranges([(0, 2 * self.pages * PAGE)])
        self.target = FailAfter(0, times=0, calls=("map", "unmap"))
        self.iommu.endpoint(8).add_target(self.target, self.physical)

    def fail_next(self, after=0):
        """Have one of the target's next calls fail."""
        self.target.remaining, self.target.failures = after, 0
        self.target._times = 1
        self.target._error = lambda *_: DmaError("map", 0, 0, "told to", errno=errno.EIO)

    def failed(self):
        """Whether a call failed since; none will any more."""
        failed = self.target is not None and self.target.failures > 0
        if self.target is not None:
            self.target._times, self.target.failures = 0, 0
        return failed

    def at(self, page):
        return self.base + page * PAGE

    def map(self, first, count=1, behind=None):
        """Map pages; by default to where no neighbor leads, so that nothing can merge."""
        if behind is None:
            behind = (first * 7919) % self.pages
        request = map_(1, self.at(first), self.at(first + count) - 1, behind * PAGE)
        status = send(self.iommu, request)
        free = (self.begins[first : first + count] == NOWHERE).all()
        if self.failed():
            assert status is DEVERR
        elif free:
            assert status is OK
            self.begins[first : first + count] = first
            self.behind[first : first + count] = np.arange(behind, behind + count)
        else:
            assert status is INVAL

    def fill(self, pages):
        """Map many single pages, none of which is mapped."""
        handle, base, n = self.iommu.handle_request, self.base, self.pages
        for page in pages:
            start = base + page * PAGE
            behind = page * 7919 % n * PAGE
            assert handle(map_(1, start, start + PAGE - 1, behind), 4) == bytes(4)
        pages = np.array(pages)
        assert (self.begins[pages] == NOWHERE).all()
        self.begins[pages] = pages
        self.behind[pages] = pages * 7919 % n

    def unmap(self, first, count=1):
        end = first + count
        status = send(self.iommu, unmap(1, self.at(first), self.at(end) - 1))
        begins = self.begins
        cut = NOWHERE < begins[first] < first
        cut |= end < self.pages and NOWHERE < begins[end] < end
        if self.failed():
            assert status is DEVERR
        elif cut:
            assert status is RANGE
        else:
            assert status is OK
            begins[first:end] = NOWHERE
            self.behind[first:end] = NOWHERE

    @property
    def count(self):
        """Mappings that there are."""
        return len(np.unique(self.begins[self.begins != NOWHERE]))

    def ranges(self):
        """The mappings as ``(start, size)``."""
        firsts, counts = np.unique(self.begins[self.begins != NOWHERE], return_counts=True)
        return [(self.at(int(f)), int(n) * PAGE) for f, n in zip(firsts, counts, strict=True)]

    def check(self, endpoint=8):
        """What an endpoint sees, page by page, what the domain and its target hold."""
        iotlb = self.iommu.endpoint(endpoint).iotlb
        iotlb._map.check()
        starts = np.arange(self.pages, dtype=np.uint64) * np.uint64(PAGE) + np.uint64(self.base)
        found, states = iotlb.lookup_many(starts, PAGE, Permissions.READ)
        mapped = self.behind != NOWHERE
        assert ((states == 0) == mapped).all()
        assert (found[mapped] == (self.behind[mapped] * PAGE).astype(np.uint64)).all()
        state = self.iommu._state
        space = state.domains[1]
        assert len(space.mapper) == self.count
        assert state.total_mappings == self.count * (
            1 + (self.target is not None and 8 in space.endpoints)
        )
        if self.target is not None:
            assert sorted((r.start, r.size) for r in self.target.held.values()) == self.ranges()
