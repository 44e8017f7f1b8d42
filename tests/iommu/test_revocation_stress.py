"""Invariant L1 under threads: no access after an acknowledged invalidation, no deadlock.

Guest pages come and go at I/O addresses. As soon as the IOTLB says that a mapping is gone, its
page is poisoned: a late read sees poison, a late write destroys it. Pages
are large enough that copies of whole ones run without the interpreter lock, beside everything else.

Values are whole words, and a word may be torn: copies of more than 8 bytes promise nothing about
those inside them. So no byte of a value is one of the poison's: a single one tells.
"""

import faulthandler
import itertools
import random
import sys
import threading
import time

import numpy as np
import pytest

from guestio import (
    AccessError,
    CannotResolveError,
    GuestRegionCollection,
    Iommu,
    IommuMemory,
    Iotlb,
    IotlbFails,
    Permissions,
)

R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE
PAGE = 64 << 10
WORDS = PAGE // 8
IO_PAGES = 12
PAGES = 24
POISON = np.uint64(0xDEAD_DEAD_DEAD_DEAD)
POISON_BYTES = np.array([0xDE, 0xAD], np.uint8)
HARMLESS = [byte for byte in range(256) if byte not in (0xDE, 0xAD)]
PATIENCE = 20


class Guest(Iommu):
    """The tables behind the IOTLB: which page is at which I/O page; misses are filled from here."""

    def __init__(self, capacity):
        self._iotlb = Iotlb(capacity)
        self.tables = {}
        self.lock = threading.Lock()

    @property
    def iotlb(self):
        return self._iotlb

    def resolve(self, fails, iova, length, access):
        for failed in (*fails.misses, *fails.access_fails):
            first, last = failed.base // PAGE, (failed.base + failed.length - 1) // PAGE
            for io_page in range(first, last + 1):
                # Filling in and taking away must not overtake each other.
                with self.lock:
                    page = self.tables.get(io_page)
                    if page is None:
                        raise CannotResolveError(failed, access, "the guest has nothing there")
                    self._iotlb.set_mapping(io_page * PAGE, page * PAGE, PAGE, RW)


class Stress:
    def __init__(self, capacity, seed):
        self.guest = Guest(capacity)
        self.physical = GuestRegionCollection.from_ranges([(0, PAGES * PAGE)])
        self.memory = IommuMemory(self.physical, self.guest)
        self.free = list(range(PAGES))
        self.free_lock = threading.Lock()
        self.seeds = itertools.count(seed)
        self.stop = threading.Event()
        self.failures = []
        self.progress = {}
        for page in range(PAGES):
            self.poison(page)

    def poison(self, page):
        self.physical.write(page * PAGE, np.full(WORDS, POISON))

    def check_poison(self, page):
        found = np.frombuffer(self.physical.read(page * PAGE, PAGE), np.uint64)
        assert (found == POISON).all(), f"page {page} was written after its revocation"

    def value(self, rng):
        """A word none of whose bytes is one of the poison's."""
        return int.from_bytes(bytes(rng.choices(HARMLESS, k=8)), sys.byteorder)

    def check_values(self, found):
        octets = np.frombuffer(found, np.uint8)
        assert not np.isin(octets, POISON_BYTES).any(), "a page was read after its revocation"

    def map_and_unmap(self, rng, mine):
        """Take a page, put it at one of this thread's I/O pages, use it for a while, revoke it."""
        guest = self.guest
        with self.free_lock:
            page = self.free.pop(rng.randrange(len(self.free)))
        self.check_poison(page)
        # In the guest it is prepared before any device may see it.
        self.physical.write(page * PAGE, np.full(WORDS, self.value(rng), np.uint64))
        io_page = rng.choice(mine)
        with guest.lock:
            old = guest.tables.get(io_page)
            guest.tables[io_page] = page
            if old is not None and rng.random() < 0.5:
                guest.iotlb.invalidate_mapping(io_page * PAGE, PAGE)
            if old is not None or rng.random() < 0.5:
                # Without the invalidation this moves a mapping, which must wait just as well.
                guest.iotlb.set_mapping(io_page * PAGE, page * PAGE, PAGE, RW)
        if old is not None:
            # Another entry of the cache may still cover the old page after an eviction.
            self.retire(old)
        if rng.random() < 0.4:
            with guest.lock:
                page = guest.tables.pop(io_page)
                if rng.random() < 0.1:
                    guest.iotlb.invalidate_all()
                else:
                    guest.iotlb.invalidate_mapping(io_page * PAGE, PAGE)
            self.retire(page)

    def retire(self, page):
        self.poison(page)
        time.sleep(0)
        self.check_poison(page)
        with self.free_lock:
            self.free.append(page)

    def read(self, rng):
        at = rng.randrange(IO_PAGES * PAGE - 3 * PAGE) & ~7
        length = rng.choice((8, 8, 64, 4096, PAGE, 2 * PAGE + 512))
        self.check_values(self.memory.read(at, length))

    def read_slices(self, rng):
        at = rng.randrange(IO_PAGES * PAGE - PAGE) & ~7
        for piece in self.memory.slices(at, PAGE, R):
            self.check_values(bytes(memoryview(piece)))

    def write(self, rng):
        at = rng.randrange(IO_PAGES * PAGE - 3 * PAGE) & ~7
        words = rng.choice((1, 1, 8, 512, WORDS, 2 * WORDS + 64))
        self.memory.write(at, np.full(words, self.value(rng), np.uint64))

    def touch(self, rng):
        at = rng.randrange(IO_PAGES * PAGE - 8) & ~7
        if rng.random() < 0.5:
            self.memory.store(at, self.value(rng), 8)
        else:
            seen = self.memory.load(at, 8)
            self.check_values(seen.to_bytes(8, sys.byteorder))
            self.memory.compare_exchange(at, seen, self.value(rng), 8)

    def batch(self, rng):
        starts = np.array([rng.randrange(IO_PAGES * PAGE) for _ in range(500)], np.uint64)
        targets, status = self.guest.iotlb.lookup_many(starts, 1, R)
        assert ((targets < PAGES * PAGE) | (status != 0)).all()

    def loop(self, name, work, *arguments):
        rng = random.Random(next(self.seeds))
        done = 0
        try:
            while not self.stop.is_set():
                try:
                    work(rng, *arguments)
                    done += 1
                except (AccessError, IotlbFails):
                    pass
                self.progress[name] = done
        except BaseException as error:
            self.failures.append(error)
            self.stop.set()

    def run(self, seconds):
        """Run all threads; every one must get on all the time."""
        work = {
            "mapper 0": (self.map_and_unmap, range(IO_PAGES // 2)),
            "mapper 1": (self.map_and_unmap, range(IO_PAGES // 2, IO_PAGES)),
            "reader 0": (self.read,),
            "reader 1": (self.read,),
            "slices": (self.read_slices,),
            "writer 0": (self.write,),
            "writer 1": (self.write,),
            "atomics": (self.touch,),
            "batches": (self.batch,),
        }
        threads = [
            threading.Thread(target=self.loop, args=(name, *what), daemon=True)
            for name, what in work.items()
        ]
        end = time.monotonic() + seconds
        for thread in threads:
            thread.start()
        before, since = {}, time.monotonic()
        while time.monotonic() < end and not self.stop.is_set():
            time.sleep(0.2)
            now = dict(self.progress)
            if all(now.get(name, 0) > before.get(name, -1) for name in work):
                before, since = now, time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                faulthandler.dump_traceback()
                self.failures.append(AssertionError(f"a thread hangs: {before} -> {now}"))
                break
        self.stop.set()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a thread hangs at the end"


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [None, 5], ids=["unbounded", "evicting"])
def test_no_access_after_an_acknowledged_revocation(capacity):
    stress = Stress(capacity, 7)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        stress.run(10.5)
    finally:
        sys.setswitchinterval(interval)
    if stress.failures:
        raise stress.failures[0]
    assert len(stress.guest.iotlb._map.leases) == 0
    assert min(stress.progress.values()) > 5, stress.progress
    stats = stress.guest.iotlb.stats()
    assert stats.invalidations > 100
    assert bool(stats.evictions) == (capacity is not None)
    for page in stress.free:
        stress.check_poison(page)
    stress.guest.iotlb._map.check()
    print(stress.progress, stats)
