"""DMA targets behind a virtio-iommu follow guest memory: RAM is plugged and unplugged under them.

Everything is done with each kind of physical memory: one that the caller tells the target of, one
that is swapped atomically, and the regions of a manager.
"""

import errno
import gc
import threading
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from guestio import Backing, GuestMemoryAtomic, GuestRegionCollection, MmapRegion
from guestio.dma import DmaError, MappingType, ReentrantCallError, RegionManager
from guestio.iommu import Iommu, IommuMemory, Iotlb
from guestio.testing.targets import FailAfter, RecordingTarget, ReplacingTarget
from guestio.virtio.iommu import Pending, VirtioIommu
from tests.kit.iommu_driver import (
    DEVERR,
    FAULT,
    OK,
    PAGE,
    RW,
    UNSUPP,
    LedgerTarget,
    R,
    attach,
    detach,
    map_,
    pend,
    send,
    send_all,
    status,
    unmap,
)

WAIT = 20
SLOT = 2  # pages of a slot


def page(number, phys, count=1, domain=1, flags=RW):
    return map_(domain, number * PAGE, (number + count) * PAGE - 1, phys * PAGE, flags)


def unpage(number, count=1, domain=1):
    return unmap(domain, number * PAGE, (number + count) * PAGE - 1)


class Fixed:
    """A collection; the caller tells each target of another one."""

    follows = False

    def __init__(self):
        self.slots = {}
        self.physical = GuestRegionCollection()
        self.handles = []

    def change(self, slots):
        new = [MmapRegion(at * SLOT * PAGE, slots[at]) for at in sorted(slots)]
        self.swap(GuestRegionCollection.from_regions(new) if new else GuestRegionCollection())
        self.slots = slots

    def swap(self, new):
        before = self.physical
        done = []
        try:
            for handle in self.handles:
                handle.change_memory(new)
                done.append(handle)
        except BaseException:
            for handle in reversed(done):
                handle.change_memory(before)
            raise
        self.physical = new

    def plug(self, slot, backing):
        self.change({**self.slots, slot: backing})

    def unplug(self, slot):
        self.change({at: backing for at, backing in self.slots.items() if at != slot})

    def close(self):
        pass


class Atomic(Fixed):
    """A map that is swapped."""

    follows = True

    def __init__(self):
        super().__init__()
        self.physical = GuestMemoryAtomic(GuestRegionCollection())

    def swap(self, new):
        with self.physical.lock() as update:
            before = update.memory
            try:
                update.replace(new)
            except BaseException:
                assert self.physical.memory() is before
                raise
        assert self.physical.memory() is new


class Manager(Fixed):
    """Regions of a manager, one for each slot."""

    follows = True

    def __init__(self):
        super().__init__()
        self.physical = RegionManager()
        self.regions = {}

    def plug(self, slot, backing):
        if slot in self.slots:
            self.unplug(slot)
        region = self.physical.new_region("", slot * SLOT * PAGE, SLOT * PAGE)
        region.add_mapping(0, SLOT * PAGE, backing)
        try:
            region.map()
        except BaseException:
            region.close()
            raise
        self.regions[slot], self.slots = region, {**self.slots, slot: backing}

    def unplug(self, slot):
        del self.slots[slot]
        self.regions.pop(slot).close()

    def close(self):
        self.physical.close()


KINDS = [Fixed, Atomic, Manager]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def guest(request):
    made = request.param()
    yield made
    made.close()


@pytest.fixture(params=[Atomic, Manager], ids=lambda kind: kind.__name__)
def following(request):
    made = request.param()
    yield made
    made.close()


@pytest.fixture
def iommu():
    iommu = VirtioIommu(endpoints=[8, 9, 10])
    send_all(iommu, attach(8, 1))
    return iommu


def backing():
    return Backing.memfd(SLOT * PAGE)


def add(iommu, guest, target, endpoint=8):
    handle = iommu.endpoint(endpoint).add_target(target, guest.physical)
    guest.handles.append(handle)
    return handle


class TestFollowing:
    def test_plugged_and_unplugged(self, iommu, guest):
        low, high = backing(), backing()
        target = RecordingTarget()
        guest.plug(0, low)
        add(iommu, guest, target)
        send_all(iommu, page(1, 0))
        guest.plug(1, high)
        send_all(iommu, page(5, SLOT, 2))
        assert target.held[5 * PAGE].host_address == high.host_address
        assert target.held[5 * PAGE].fd == high.fd
        events = len(target.events)
        guest.unplug(1)
        assert [event[:] for event in target.events[events:]] == [("unmap", 5 * PAGE, 2 * PAGE)]
        # The mapping is the domain's still, and leads nowhere.
        assert len(iommu.snapshot()["domains"][0]["mappings"]) == 2
        guest.plug(1, low)
        assert target.held[5 * PAGE].host_address == low.host_address
        send_all(iommu, unpage(1, 9))
        assert target.held == {}

    def test_a_map_of_what_is_not_there_yet(self, iommu, following):
        """It is reachable as soon as there is memory, in whatever order its parts come."""
        target = RecordingTarget()
        handle = add(iommu, following, target)
        send_all(iommu, page(1, 1, 4))
        assert target.held == {}
        for slot, expected in (
            (2, {(4, 1)}),
            (0, {(1, 1), (4, 1)}),
            (1, {(1, 1), (2, 2), (4, 1)}),
        ):
            following.plug(slot, backing())
            assert {(r.start // PAGE, r.size // PAGE) for r in target.held.values()} == expected
        assert handle.stats().held_bytes == 4 * PAGE
        assert handle.stats().missing == {}
        send_all(iommu, unpage(1, 4))
        assert target.held == {}

    def test_memory_that_is_fixed_is_told_of(self, iommu):
        target = RecordingTarget()
        guest = Fixed()
        handle = add(iommu, guest, target)
        assert send(iommu, page(1, 0)) is FAULT
        guest.plug(0, backing())
        send_all(iommu, page(1, 0))
        handle.close()

    def test_a_target_that_follows_is_not_told(self, iommu, following):
        handle = add(iommu, following, RecordingTarget())
        with pytest.raises(ValueError, match="by itself"):
            handle.change_memory(GuestRegionCollection())

    def test_permissions_and_kinds(self, iommu):
        manager = RegionManager()
        target = RecordingTarget()
        iommu.endpoint(8).add_target(target, manager)
        memory = backing()
        for slot, kind, writable in (
            (0, MappingType.RAM, True),
            (1, MappingType.DEVICE, True),
            (2, MappingType.RAM, False),
        ):
            start = slot * SLOT * PAGE
            region = manager.new_region("", start, SLOT * PAGE, kind=kind)
            region.add_mapping(0, SLOT * PAGE, memory)
            region.map(writable)
            send_all(iommu, page(2 * slot, slot * SLOT), page(2 * slot + 1, slot * SLOT, flags=R))
        assert [(r.kind, r.writable) for _, r in sorted(target.held.items())] == [
            (MappingType.RAM, True),
            (MappingType.RAM, False),
            (MappingType.DEVICE, True),
            (MappingType.DEVICE, False),
            (MappingType.RAM, False),
            (MappingType.RAM, False),
        ]
        manager.close()
        assert target.held == {}

    def test_a_region_that_covers_another(self, iommu):
        """A ROM in front of RAM and away again: the mapping follows what is active."""
        manager = RegionManager()
        target = ReplacingTarget()
        iommu.endpoint(8).add_target(target, manager)
        ram, rom = backing(), backing()
        send_all(iommu, page(1, 0, 2))
        regions = {}
        for name, memory, priority in (("ram", ram, 0), ("rom", rom, 1)):
            regions[name] = manager.new_region(name, 0, SLOT * PAGE, priority)
            regions[name].add_mapping(0, SLOT * PAGE, memory)
            regions[name].map()
            assert target.held[PAGE].host_address == memory.host_address
        regions["rom"].unmap()
        assert target.held[PAGE].host_address == ram.host_address
        # Never without one of the two.
        assert [event.call for event in target.events] == ["map", "replace", "replace"]
        regions["ram"].move(SLOT * PAGE)
        assert target.held == {}
        manager.close()

    def test_bypass(self, iommu, guest):
        target = RecordingTarget()
        guest.plug(1, backing())
        add(iommu, guest, target, endpoint=9)
        iommu.bypass = True
        guest.plug(0, backing())
        guest.unplug(1)
        assert list(target.held) == [0]
        iommu.bypass = False
        assert target.held == {}
        guest.plug(1, backing())
        assert target.held == {}

    def test_many_targets_and_domains(self, iommu, guest):
        targets = {number: RecordingTarget() for number in (8, 9)}
        for number, target in targets.items():
            add(iommu, guest, target, number)
        iommu.endpoint(10).add_target(targets[9], guest.physical)
        guest.plug(0, backing())
        send_all(iommu, attach(9, 2), page(1, 0), page(2, 1, domain=2))
        assert send(iommu, attach(10, 1)) is UNSUPP
        guest.plug(0, backing())
        address = guest.slots[0].host_address
        assert targets[8].held[PAGE].host_address == address
        assert targets[9].held[2 * PAGE].host_address == address + PAGE
        send_all(iommu, detach(9, 2), attach(9, 1))
        guest.unplug(0)
        assert targets[8].held == targets[9].held == {}

    def test_closed_targets_follow_no_more(self, iommu, following):
        target = RecordingTarget()
        handles = [add(iommu, following, target, number) for number in (9, 10)]
        followed = following.physical.followed
        followed = followed() if callable(followed) else followed
        assert len(followed._followers) == 1
        send_all(iommu, attach(9, 1), attach(10, 1), page(1, 0))
        handles[0].close()
        following.plug(0, backing())
        assert len(target.held) == 1
        handles[1].close()
        following.unplug(0)
        assert target.held == {}
        assert followed._followers == []

    def test_other_memory_is_refused(self, iommu, guest):
        target = RecordingTarget()
        add(iommu, guest, target)
        for other in (GuestRegionCollection(), GuestMemoryAtomic(GuestRegionCollection())):
            with pytest.raises(ValueError, match="other physical memory"):
                iommu.endpoint(9).add_target(target, other)
        iommu.endpoint(9).add_target(target, guest.physical)

    def test_not_for_anything_else(self, iommu):
        class Nothing(Iommu):
            iotlb = Iotlb()

        behind = IommuMemory(GuestRegionCollection(), Nothing())
        for bad in (None, RegionManager, behind, GuestMemoryAtomic(behind)):
            with pytest.raises(TypeError, match="physical"):
                iommu.endpoint(8).add_target(RecordingTarget(), bad)
        atomic = GuestMemoryAtomic(GuestRegionCollection())
        iommu.endpoint(8).add_target(RecordingTarget(), atomic)
        with atomic.lock() as update, pytest.raises(TypeError, match="physical"):
            update.replace(behind)
        assert isinstance(atomic.memory(), GuestRegionCollection)


class TestOrder:
    """Targets let go before memory does, and hold new memory before anyone sees it."""

    def test_memory_is_released_last(self, iommu, guest):
        target = FailAfter(0, calls=("unmap",), times=0)
        guest.plug(0, backing())
        memory = guest.slots[0]
        add(iommu, guest, target)
        send_all(iommu, page(1, 0))
        gc.collect()
        with pytest.raises(BufferError):
            memory.close()
        guest.unplug(0)
        gc.collect()
        memory.close()

    def test_before_a_map_is_seen(self, iommu):
        atomic = GuestMemoryAtomic(GuestRegionCollection())
        seen = []

        class Target(RecordingTarget):
            def map_dma(self, request):
                seen.append(("map", len(atomic.memory())))
                super().map_dma(request)

            def unmap_dma(self, start, size):
                seen.append(("unmap", len(atomic.memory())))
                super().unmap_dma(start, size)

        iommu.endpoint(8).add_target(Target(), atomic)
        send_all(iommu, page(1, 0))
        region = MmapRegion(0, backing())
        for new in (GuestRegionCollection.from_regions([region]), GuestRegionCollection()):
            with atomic.lock() as update:
                update.replace(new)
        assert seen == [("map", 0), ("unmap", 1)]

    def test_what_is_not_given_up_is_kept(self, iommu):
        """A manager's memory goes whatever a target does; what that may reach stays mapped."""
        guest = Manager()
        guest.plug(0, backing())
        memory = guest.slots[0]
        target = FailAfter(0, calls=("unmap",), times=1)
        handle = add(iommu, guest, target)
        send_all(iommu, page(1, 0))
        with pytest.raises(DmaError):
            guest.unplug(0)
        assert guest.physical.mappings() == ()
        assert list(handle.stats().stuck) == [PAGE]
        gc.collect()
        with pytest.raises(BufferError):
            memory.close()
        other = backing()
        guest.plug(0, other)
        assert handle.stats().stuck == {}
        assert target.held[PAGE].host_address == other.host_address
        gc.collect()
        memory.close()

    def test_what_is_in_the_way_of_what_comes(self, iommu):
        """A region uncovers another one: what is stuck keeps that from being mapped, and shows."""
        manager = RegionManager()
        target = FailAfter(0, calls=("unmap",), times=0)
        handle = iommu.endpoint(8).add_target(target, manager)
        ram, rom = backing(), backing()
        regions = []
        for memory, priority in ((ram, 0), (rom, 1)):
            region = manager.new_region("", 0, SLOT * PAGE, priority)
            region.add_mapping(0, SLOT * PAGE, memory)
            region.map()
            regions.append(region)
        send_all(iommu, page(1, 0))
        target._times = 2
        with pytest.raises(DmaError):
            regions[1].unmap()
        assert not regions[1].mapped
        stats = handle.stats()
        assert (list(stats.stuck), list(stats.missing), stats.held) == ([PAGE], [PAGE], 0)
        assert target.held[PAGE].host_address == rom.host_address
        # The next change tries again.
        regions[1].map()
        assert handle.stats().stuck == {}
        regions[1].unmap()
        assert target.held[PAGE].host_address == ram.host_address
        assert handle.stats().missing == {}
        handle.close()
        manager.close()


class TestRefusals:
    """Whatever call of whichever target fails: nothing has changed, and it works the next time."""

    def set_up(self, guest):
        iommu = VirtioIommu(endpoints=[8, 9])
        targets = [FailAfter(99, calls=("map", "unmap"), times=1) for _ in range(2)]
        for slot in range(3):
            guest.plug(slot, backing())
        for number, target in zip((8, 9), targets, strict=True):
            add(iommu, guest, target, number)
        send_all(iommu, attach(8, 1), attach(9, 1))
        send_all(iommu, page(0, 1, 2), page(4, 0), page(6, 2, 3))
        guest.unplug(2)
        return iommu, targets

    @pytest.mark.parametrize("which", [0, 1])
    @pytest.mark.parametrize("change", ["plug", "unplug", "exchange"])
    def test_every_call(self, guest, which, change):
        iommu, targets = self.set_up(guest)
        ways = {
            "plug": lambda: guest.plug(2, new),
            "unplug": lambda: guest.unplug(1),
            "exchange": lambda: guest.plug(1, new),
        }
        unmaps = {"plug": 0, "unplug": 2, "exchange": 2}[change]
        calls = 0
        while True:
            new = backing()
            before = [dict(target.held) for target in targets]
            slots = dict(guest.slots)
            targets[which].remaining, targets[which].failures = calls, 0
            try:
                ways[change]()
            except DmaError:
                assert targets[which].failures == 1
            else:
                assert targets[which].failures == 0
                break
            if isinstance(guest, Manager) and calls < unmaps:
                # Memory that is taken away goes anyway.
                assert 1 not in guest.slots
                assert len(guest.handles[which].stats().stuck) == 1
                guest.plug(1, slots[1])
                targets[which].remaining = 99
            if isinstance(guest, Manager) and change == "exchange" and 1 not in guest.slots:
                guest.plug(1, slots[1])
            assert [dict(target.held) for target in targets] == before
            assert guest.slots == slots
            for handle in guest.handles:
                assert (handle.stats().missing, handle.stats().stuck) == ({}, {})
            calls += 1
        assert calls >= 2 if change != "plug" else calls == 1
        for target in targets:
            target.remaining = 99
        send_all(iommu, unpage(0, 20))
        assert [target.held for target in targets] == [{}, {}]

    def test_an_undo_that_fails_shows(self, iommu):
        """One target refuses, the other does not take back: what is missing or stuck is listed."""
        atomic = GuestMemoryAtomic(GuestRegionCollection())
        first = FailAfter(1, calls=("map", "unmap"), times=1)
        second = FailAfter(0, calls=("map",), times=1)
        handles = [iommu.endpoint(8).add_target(target, atomic) for target in (first, second)]
        send_all(iommu, page(1, 0))
        new = GuestRegionCollection.from_regions([MmapRegion(0, backing())])
        with atomic.lock() as update, pytest.raises(DmaError) as caught:
            update.replace(new)
        assert any("undoing" in note for note in caught.value.__notes__)
        assert [list(handle.stats().stuck) for handle in handles] == [[PAGE], []]
        with atomic.lock() as update:
            update.replace(new)
        for handle in handles:
            assert (handle.stats().held, handle.stats().stuck) == (1, {})

    def test_adding_that_is_refused_follows_nothing(self, following):
        iommu = VirtioIommu(endpoints=[8])
        following.plug(0, backing())
        send_all(iommu, attach(8, 1), page(1, 0))
        target = FailAfter(0, times=1)
        with pytest.raises(DmaError):
            iommu.endpoint(8).add_target(target, following.physical)
        following.plug(0, backing())
        assert target.held == {}
        add(iommu, following, target)
        assert len(target.held) == 1


class TestOtherThreads:
    def test_a_guests_clients_do_not_hold_up_memory(self, following):
        """An UNMAP that waits for a client for ever, and what queues up behind it, is passed."""
        iommu = VirtioIommu(endpoints=[8], revoke_after=None)
        target = RecordingTarget()
        following.plug(0, backing())
        add(iommu, following, target)
        send_all(iommu, attach(8, 1), page(1, 0), page(2, 1))
        session = iommu.endpoint(8).open_session()
        session.export(PAGE, 1)
        waiting = [pend(iommu, unpage(1)), pend(iommu, page(3, 0)), pend(iommu, detach(8, 1))]
        new = backing()
        following.plug(0, new)
        assert [r.host_address for r in target.held.values()] == [new.host_address + PAGE]
        session.close()
        assert [status(pending.result(WAIT)) for pending in waiting] == [OK] * 3
        assert target.held == {}

    def test_a_reset_does_not_make_it_forget_memory(self, following):
        """A change that waits for a reset is carried out, whatever the next reset cancels."""
        iommu = VirtioIommu(endpoints=[8, 9], bypass=True, stop_timeout=60)
        target = RecordingTarget()
        add(iommu, following, target, 9)
        send_all(iommu, attach(8, 1), page(1, 0))
        session = iommu.endpoint(8).open_session()
        session.export(PAGE, 1)
        pending = iommu.reset()
        thread = threading.Thread(target=following.plug, args=(0, backing()))
        thread.start()
        end = time.monotonic() + WAIT
        while iommu._requests.waiting < 2 and time.monotonic() < end:
            time.sleep(0.001)
        again = iommu.reset()
        assert target.held == {}
        session.close()
        thread.join(WAIT)
        assert list(target.held) == [0]
        assert pending.wait(WAIT)
        assert again.wait(WAIT)

    def test_a_target_that_comes_in_the_middle_of_a_change(self, iommu):
        """It got the old map, so it is told of the new one before that is there."""
        atomic = GuestMemoryAtomic(GuestRegionCollection())
        late, added = RecordingTarget(), []

        def add_late():
            added.append(iommu.endpoint(9).add_target(late, atomic))

        class Target(RecordingTarget):
            def map_dma(self, request):
                if not added:
                    added.append(None)
                    thread = threading.Thread(target=add_late)
                    thread.start()
                    thread.join(WAIT)
                super().map_dma(request)

        iommu.endpoint(8).add_target(Target(), atomic)
        send_all(iommu, attach(9, 2), page(1, 0), page(2, 0, domain=2))
        with atomic.lock() as update:
            update.replace(GuestRegionCollection.from_regions([MmapRegion(0, backing())]))
        assert len(added) == 2
        assert list(late.held) == [2 * PAGE]

    @pytest.mark.parametrize("how", ["swap", "add", "close"])
    def test_a_target_that_calls_back_is_refused(self, iommu, how):
        """It would wait for itself."""
        atomic = GuestMemoryAtomic(GuestRegionCollection())
        region = MmapRegion(0, backing())
        one = GuestRegionCollection.from_regions([region])
        refused = []

        class Target(RecordingTarget):
            def map_dma(self, request):
                calls = {
                    "add": lambda: iommu.endpoint(8).add_target(self, atomic),
                    "close": lambda: handle.close(),
                }
                with pytest.raises((ReentrantCallError, RuntimeError)) as caught:
                    if how == "swap":
                        with atomic.lock() as update:
                            update.replace(GuestRegionCollection())
                    else:
                        calls[how]()
                refused.append(caught.value)
                super().map_dma(request)

        target = Target()
        handle = iommu.endpoint(8).add_target(target, atomic)
        send_all(iommu, page(1, 0))
        with atomic.lock() as update:
            update.replace(one)
        assert len(refused) == 1
        # From a guest's request as well.
        send_all(iommu, page(2, 0))
        assert len(refused) == 2
        assert len(target.held) == 2

    def test_memory_and_requests_at_the_same_time(self, following):
        iommu = VirtioIommu(endpoints=[8, 9])
        targets = [RecordingTarget(), RecordingTarget()]
        following.plug(0, backing())
        for number, target in zip((8, 9), targets, strict=True):
            add(iommu, following, target, number)
        send_all(iommu, attach(8, 1), attach(9, 2))
        errors = []

        def ask(request):
            # It waits while the other side is at the same target.
            answer = iommu.handle_request(request, 4)
            assert status(answer.result(WAIT) if isinstance(answer, Pending) else answer) is OK

        def guest_side(domain):
            try:
                for _ in range(150):
                    ask(page(1, 0, 4, domain))
                    ask(page(9, 1, 1, domain))
                    ask(unpage(9, 1, domain))
                    ask(unpage(1, 4, domain))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=guest_side, args=(domain,)) for domain in (1, 2)]
        for thread in threads:
            thread.start()
        for _ in range(60):
            following.plug(1, backing())
            following.plug(0, backing())
            following.unplug(1)
        for thread in threads:
            thread.join(60)
        assert not errors
        assert [target.held for target in targets] == [{}, {}]
        send_all(iommu, page(1, 0, 4))
        assert [(r.start, r.size) for r in targets[0].held.values()] == [(PAGE, 2 * PAGE)]


@pytest.mark.slow
def test_a_hundred_thousand_mappings():
    """Only what leads to the memory in question is touched."""
    pages = 100_000
    half = pages // 2 * PAGE
    low, high = Backing.memfd(half), Backing.memfd(half)
    regions = [MmapRegion(0, low), MmapRegion(half, high)]
    maps = {n: GuestRegionCollection.from_regions(regions[:n]) for n in (1, 2)}
    physical = GuestMemoryAtomic(maps[2])

    def show(count):
        with physical.lock() as update:
            update.replace(maps[count])

    iommu = VirtioIommu(endpoints=[8])
    target = RecordingTarget()
    handle = iommu.endpoint(8).add_target(target, physical)
    send_all(iommu, attach(8, 1))
    for number in range(pages):
        behind = number * 7919 % pages * PAGE
        request = map_(1, number * PAGE, number * PAGE + PAGE - 1, behind)
        assert iommu.handle_request(request, 4) == bytes(4)
    full = dict(target.held)
    assert len(full) == pages
    events = len(target.events)
    show(1)
    assert len(target.held) == handle.stats().held == pages // 2
    show(2)
    assert target.held == full
    assert len(target.events) - events == pages
    send_all(iommu, unmap(1, 0, 2**64 - 1))
    assert target.held == {}
    handle.close()


PAGES = 5  # where mappings begin
SLOTS = 3
ENDPOINTS = (8, 9, 10)
SHARED = {8: (8,), 9: (9, 10), 10: (9, 10)}  # endpoints with the same target


class Machine(RuleBasedStateMachine):
    """Memory and mappings come and go, and targets fail, against a model of pages."""

    kind = None

    def __init__(self):
        super().__init__()
        self.guest = self.kind()
        self.iommu = VirtioIommu(endpoints=ENDPOINTS)
        self.targets = {8: LedgerTarget(), 9: LedgerTarget()}
        self.targets[10] = self.targets[9]
        self.handles = {n: add(self.iommu, self.guest, self.targets[n], n) for n in (8, 9)}
        self.guest.handles = list(self.handles.values())
        self.handles[10] = self.iommu.endpoint(10).add_target(self.targets[10], self.guest.physical)
        self.pool = [backing() for _ in range(3)]
        self.slots = {}  # slot: backing
        self.maps = {}  # domain: {page: (pages, physical page, flags)}
        self.where = dict.fromkeys(ENDPOINTS)
        self.bypass = False
        self.clean = True  # nothing was left behind by a target that did not give up

    endpoints = st.sampled_from(ENDPOINTS)
    domains = st.sampled_from([1, 1, 2])
    failures = st.one_of(
        st.none(), st.none(), st.tuples(st.sampled_from([8, 9]), st.integers(0, 4))
    )

    @initialize(first=st.booleans())
    def start(self, first):
        self.attach(8, 1, None)
        self.attach(9, 1, None)
        if first:
            self.plug(0, 0, None)

    def expected(self, endpoint):
        """``{page: (pages, backing, page in it, writable)}`` of an endpoint's target."""
        attached = [e for e in SHARED[endpoint] if self.where[e] is not None]
        if attached:
            maps = self.maps[self.where[attached[0]]]
        elif self.bypass:
            maps = {0: (SLOTS * SLOT, 0, RW)}
        else:
            maps = {}
        found = {}
        for at, (count, phys, flags) in maps.items():
            for slot, memory in self.slots.items():
                first, end = max(phys, slot * SLOT), min(phys + count, (slot + 1) * SLOT)
                if first < end and flags:
                    found[at + first - phys] = (
                        end - first,
                        memory,
                        first - slot * SLOT,
                        bool(flags & 2),
                    )
        return found

    def arm(self, failing):
        self.calls = {n: len(self.targets[n].calls) for n in (8, 9)}
        self.armed = failing
        if failing is not None:
            number, after = failing
            error = DmaError("map", 0, 0, "told to fail", errno=errno.EIO)
            self.targets[number].fail_next(error, after)

    def failed(self):
        """Whether the target failed as it was told to; it will not any more."""
        if self.armed is None:
            return False
        failures = self.targets[self.armed[0]].failures
        happened = not failures
        failures.clear()
        return happened

    def request(self, request, failing):
        """Whether a request was carried out."""
        self.arm(failing)
        answer = send(self.iommu, request)
        if self.failed():
            assert answer in {DEVERR, UNSUPP}
            return False
        assert answer is OK
        return True

    @rule(endpoint=endpoints, domain=domains, failing=failures)
    def attach(self, endpoint, domain, failing):
        others = {self.where[e] for e in SHARED[endpoint] if e != endpoint} - {None}
        if others - {domain}:
            return
        if not self.guest.follows and not others and self.where[endpoint] != domain:
            maps = self.maps.get(domain, {}).values()
            if not all(self.there(phys, count) for count, phys, flags in maps if flags):
                self.arm(None)
                assert send(self.iommu, attach(endpoint, domain)) is UNSUPP
                return
        if not self.request(attach(endpoint, domain), failing):
            return
        if self.where[endpoint] != domain:
            self.leave(endpoint)
            self.where[endpoint] = domain
            self.maps.setdefault(domain, {})

    def there(self, phys, count):
        """Whether pages are memory, all of them."""
        return all(page // SLOT in self.slots for page in range(phys, phys + count))

    def leave(self, endpoint):
        number, self.where[endpoint] = self.where[endpoint], None
        if number is not None and number not in self.where.values():
            del self.maps[number]

    @rule(endpoint=endpoints, failing=failures)
    def detach(self, endpoint, failing):
        number = self.where[endpoint]
        if number is not None and self.request(detach(endpoint, number), failing):
            self.leave(endpoint)

    @rule(
        domain=domains,
        at=st.integers(0, PAGES - 1),
        count=st.integers(1, 3),
        phys=st.integers(0, SLOTS * SLOT - 1),
        flags=st.integers(0, 3),
        failing=failures,
    )
    def map(self, domain, at, count, phys, flags, failing):
        maps = self.maps.get(domain)
        if maps is None or any(f < at + count and at < f + n for f, (n, _, _) in maps.items()):
            return
        request = page(at, phys, count, domain, flags)
        if flags and not self.guest.follows and not self.there(phys, count):
            self.arm(None)
            assert send(self.iommu, request) is FAULT
        elif self.request(request, failing):
            maps[at] = count, phys, flags

    @rule(domain=domains, data=st.data(), failing=failures)
    def unmap(self, domain, data, failing):
        maps = self.maps.get(domain)
        if maps:
            at = data.draw(st.sampled_from(sorted(maps)), label="page")
            if self.request(unpage(at, maps[at][0], domain), failing):
                del maps[at]

    @rule(on=st.booleans())
    def set_bypass(self, on):
        self.arm(None)
        self.iommu.bypass = self.bypass = on

    @rule()
    def reset(self):
        self.arm(None)
        self.iommu.reset()
        self.maps, self.where = {}, dict.fromkeys(ENDPOINTS)

    @rule(slot=st.integers(0, SLOTS - 1), which=st.integers(0, 2), failing=failures)
    def plug(self, slot, which, failing):
        if isinstance(self.guest, Manager) and slot in self.slots:
            return
        self.change(failing, {**self.slots, slot: self.pool[which]}, "plug", slot, self.pool[which])

    @rule(data=st.data(), failing=failures)
    def unplug(self, data, failing):
        if self.slots:
            slot = data.draw(st.sampled_from(sorted(self.slots)), label="slot")
            rest = {at: memory for at, memory in self.slots.items() if at != slot}
            self.change(failing, rest, "unplug", slot)

    def change(self, failing, after, how, *arguments):
        before = {n: self.expected(n) for n in (8, 9)}
        slots, self.slots = self.slots, after
        wanted = {n: self.expected(n) for n in (8, 9)}
        self.arm(failing)
        try:
            getattr(self.guest, how)(*arguments)
        except DmaError:
            assert self.failed()
            if how == "unplug" and isinstance(self.guest, Manager):
                self.clean = False
            else:
                self.slots = slots
            return
        assert not self.failed()
        if failing is None and self.clean:
            # What is the same before and after was not touched, not for a moment.
            for number in (8, 9):
                touched = {c[1] // PAGE for c in self.targets[number].calls[self.calls[number] :]}
                same = {
                    at for at, known in before[number].items() if wanted[number].get(at) == known
                }
                assert not touched & same

    @invariant()
    def targets_hold_what_they_should(self):
        for number in (8, 9):
            held = {
                start // PAGE: (r.size // PAGE, r.host_address, r.writable)
                for start, r in self.targets[number].held.items()
            }
            stats = self.handles[number].stats()
            if self.clean:
                assert (stats.stuck, stats.missing) == ({}, {})
            assert stats.held + len(stats.stuck) == len(held)
            for start in stats.stuck:
                del held[start // PAGE]
            expected = {
                at: (count, memory.host_address + inside * PAGE, writable)
                for at, (count, memory, inside, writable) in self.expected(number).items()
                if at * PAGE not in stats.missing
            }
            assert held == expected

    def teardown(self):
        for handle in self.handles.values():
            for target in self.targets.values():
                target.failures.clear()
            handle.close()
        assert all(target.held == {} for target in self.targets.values())
        if isinstance(self.guest, Atomic):
            self.guest.change({})
        self.guest.close()
        del self.guest, self.slots
        gc.collect()
        for memory in self.pool:
            memory.close()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_machine(kind):
    class OfKind(Machine):
        pass

    OfKind.kind = kind
    run_state_machine_as_test(
        OfKind, settings=settings(max_examples=30, stateful_step_count=40, deadline=None)
    )
