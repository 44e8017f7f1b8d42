"""DMA targets behind a virtio-iommu: told of everything, all or nothing."""

import errno

import pytest

from guestio import DeviceError, GuestRegionCollection, MmapRegion
from guestio.dma import DmaError, MappingType
from guestio.virtio.iommu import VirtioIommu
from tests.kit.iommu_driver import (
    DEVERR,
    FAULT,
    INVAL,
    MMIO,
    NOMEM,
    OK,
    PAGE,
    RW,
    UNSUPP,
    LedgerTarget,
    R,
    W,
    attach,
    detach,
    map_,
    send,
    send_all,
    unmap,
)

RAM = [(0, 0x10000), (0x20000, 0x10000)]


def refuse(number=errno.EINVAL):
    return DmaError("map", 0, 0, "told to fail", errno=number)


@pytest.fixture
def physical():
    return GuestRegionCollection.from_regions([MmapRegion.memfd(*place) for place in RAM])


@pytest.fixture
def iommu():
    return VirtioIommu(endpoints=[8, 9, 10])


def page(number, domain=1, phys=None, flags=RW, count=1):
    start = number * PAGE
    return map_(domain, start, start + count * PAGE - 1, start if phys is None else phys, flags)


def unpage(number, domain=1, count=1):
    return unmap(domain, number * PAGE, (number + count) * PAGE - 1)


class TestFollowing:
    def test_attach_replays_and_detach_removes_only_that_one(self, iommu, physical):
        targets = {n: LedgerTarget() for n in (8, 9)}
        for number, target in targets.items():
            iommu.endpoint(number).add_target(target, physical)
        send_all(iommu, attach(8, 1), page(1), page(2), attach(9, 1), page(3))
        expected = [(n * PAGE, PAGE) for n in (1, 2, 3)]
        assert targets[8].ranges() == targets[9].ranges() == expected
        send_all(iommu, detach(8, 1))
        assert targets[8].ranges() == []
        assert targets[9].ranges() == expected
        send_all(iommu, unpage(1, count=2))
        assert targets[9].ranges() == [(3 * PAGE, PAGE)]

    def test_a_target_added_late_gets_everything(self, iommu, physical):
        send_all(iommu, attach(8, 1), page(1), page(2))
        target = LedgerTarget()
        handle = iommu.endpoint(8).add_target(target, physical)
        assert target.ranges() == [(PAGE, PAGE), (2 * PAGE, PAGE)]
        stats = handle.stats()
        assert (stats.held, stats.held_bytes, stats.missing, stats.stuck) == (2, 2 * PAGE, {}, {})
        handle.close()
        handle.close()
        assert target.ranges() == []
        send_all(iommu, page(3))
        assert target.ranges() == []

    def test_what_a_request_says(self, iommu, physical):
        target = LedgerTarget()
        iommu.endpoint(8).add_target(target, physical)
        send_all(iommu, attach(8, 1), page(5, phys=0x21000, flags=R), page(6, phys=0, flags=W))
        reading, writing = target.held[5 * PAGE], target.held[6 * PAGE]
        region = physical.find_region(0x21000)
        assert (reading.host_address, reading.fd, reading.file_offset, reading.writable) == (
            region.host_address(0x1000),
            region.file_offset.fd,
            0x1000,
            False,
        )
        assert writing.writable
        assert reading.kind is MappingType.RAM

    def test_a_mapping_without_access_is_not_programmed(self, iommu, physical):
        target = LedgerTarget()
        iommu.endpoint(8).add_target(target, physical)
        send_all(iommu, attach(8, 1), page(1, flags=0))
        assert target.ranges() == []
        send_all(iommu, unpage(1))

    def test_a_mapping_over_two_regions(self, iommu):
        joined = GuestRegionCollection.from_ranges([(0, 0x2000), (0x2000, 0x2000)])
        target = LedgerTarget()
        iommu.endpoint(8).add_target(target, joined)
        send_all(iommu, attach(8, 1), page(16, phys=0x1000, count=2))
        assert target.ranges() == [(0x10000, PAGE), (0x11000, PAGE)]
        send_all(iommu, unpage(16, count=2))
        assert target.ranges() == []

    def test_memory_that_is_not_there(self, iommu, physical):
        target = LedgerTarget()
        iommu.endpoint(8).add_target(target, physical)
        send_all(iommu, attach(8, 1))
        assert send(iommu, page(1, phys=0xF000, count=2)) is FAULT
        assert target.calls == []
        # Registers are not guest memory; the target gets what is.
        assert send(iommu, page(1, phys=0xF000, count=2, flags=RW | MMIO)) is OK
        assert target.ranges() == [(PAGE, PAGE)]
        assert target.held[PAGE].kind is MappingType.DEVICE

    @pytest.mark.parametrize("other", [False, True])
    def test_registers_do_not_outlive_their_mapping(self, iommu, physical, other):
        """What is mapped later at the same place is memory, with and without a target."""
        target = LedgerTarget()
        send_all(iommu, attach(8, 1))
        if other:
            iommu.endpoint(8).add_target(target, physical)
        send_all(iommu, page(1, flags=RW | MMIO), page(2, flags=RW | MMIO), unpage(1))
        send_all(iommu, page(1))
        state = iommu.snapshot()
        assert [m[3] for m in state["domains"][0]["mappings"]] == [RW, RW | MMIO]
        if not other:
            iommu.endpoint(8).add_target(target, physical)
        assert [target.held[n * PAGE].kind for n in (1, 2)] == [MappingType.RAM, MappingType.DEVICE]
        # A whole range that goes takes its registers with it, and a reset everything.
        send_all(iommu, unmap(1, 0, 2**64 - 1), page(2))
        assert target.held[2 * PAGE].kind is MappingType.RAM
        iommu.reset()
        send_all(iommu, attach(8, 1), page(2))
        assert target.held[2 * PAGE].kind is MappingType.RAM
        assert [m[3] for m in iommu.snapshot()["domains"][0]["mappings"]] == [RW]

    def test_bypass_maps_all_memory(self, iommu, physical):
        target = LedgerTarget()
        iommu.endpoint(8).add_target(target, physical)
        for on, expected in ((True, RAM), (False, []), (True, RAM)):
            iommu.bypass = on
            assert target.ranges() == expected
        send_all(iommu, attach(8, 1))
        assert target.ranges() == []
        send_all(iommu, attach(8, 2, flags=1))
        assert target.ranges() == RAM
        send_all(iommu, attach(8, 1), page(1))
        iommu.reset()
        assert target.ranges() == RAM

    def test_a_shared_target_follows_the_attached_endpoint(self, iommu, physical):
        target = LedgerTarget()
        handles = {n: iommu.endpoint(n).add_target(target, physical) for n in (8, 9)}
        send_all(iommu, attach(8, 1), page(1), attach(9, 1))
        assert send(iommu, attach(9, 2)) is UNSUPP
        assert send(iommu, attach(8, 2)) is UNSUPP
        assert {n: iommu.endpoint(n).domain for n in (8, 9)} == {8: 1, 9: 1}
        send_all(iommu, detach(8, 1))
        assert target.ranges() == [(PAGE, PAGE)]
        handles[8].close()
        assert target.ranges() == [(PAGE, PAGE)]
        send_all(iommu, attach(9, 2))
        assert target.ranges() == []

    def test_a_shared_target_of_endpoints_apart(self, iommu, physical):
        send_all(iommu, attach(8, 1), attach(9, 2))
        target = LedgerTarget()
        iommu.endpoint(8).add_target(target, physical)
        with pytest.raises(DeviceError, match="shares a DMA target"):
            iommu.endpoint(9).add_target(target, physical)
        with pytest.raises(ValueError, match="already"):
            iommu.endpoint(8).add_target(target, physical)
        other = GuestRegionCollection.from_ranges([(0, 0x1000)])
        with pytest.raises(ValueError, match="physical memory"):
            iommu.endpoint(10).add_target(target, other)

    def test_endpoints_with_a_target_are_not_removed(self, iommu, physical):
        handle = iommu.endpoint(8).add_target(LedgerTarget(), physical)
        with pytest.raises(ValueError, match="close its handle"):
            iommu.remove_endpoint(8)
        handle.close()
        iommu.remove_endpoint(8)

    def test_restored_state_is_replayed(self, iommu, physical):
        send_all(iommu, attach(8, 1), page(1))
        again = VirtioIommu.restore(iommu.snapshot())
        target = LedgerTarget()
        again.endpoint(8).add_target(target, physical)
        assert target.ranges() == [(PAGE, PAGE)]


class TestRefusals:
    """Invariant L2: a request that fails at one target leaves no trace at any."""

    @pytest.fixture
    def targets(self, iommu, physical):
        made = [LedgerTarget() for _ in range(3)]
        for number, target in zip((8, 9, 10), made, strict=True):
            iommu.endpoint(number).add_target(target, physical)
        send_all(iommu, *(attach(n, 1) for n in (8, 9, 10)), page(1))
        return made

    @pytest.mark.parametrize("failing", range(3))
    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (refuse(), DEVERR),
            (refuse(errno.ENOMEM), NOMEM),
            (refuse(errno.ENOSPC), NOMEM),
            (OSError(errno.ENOMEM, "no"), NOMEM),
            (RuntimeError("anything"), DEVERR),
        ],
        ids=["einval", "enomem", "enospc", "oserror", "other"],
    )
    def test_map(self, iommu, targets, failing, error, expected):
        before = iommu.snapshot()
        targets[failing].fail_next(error)
        assert send(iommu, page(2)) is expected
        assert [t.ranges() for t in targets] == [[(PAGE, PAGE)]] * 3
        assert iommu.snapshot() == before
        assert len(iommu.endpoint(8).iotlb) == 1
        assert send(iommu, page(2)) is OK

    @pytest.mark.parametrize("failing", range(3))
    @pytest.mark.parametrize("after", range(2))
    def test_unmap(self, iommu, targets, failing, after):
        send_all(iommu, page(2))
        before = iommu.snapshot()
        targets[failing].fail_next(refuse(), after)
        assert send(iommu, unpage(1, count=2)) is DEVERR
        assert [t.ranges() for t in targets] == [[(PAGE, PAGE), (2 * PAGE, PAGE)]] * 3
        assert iommu.snapshot() == before
        assert send(iommu, unpage(1, count=2)) is OK
        assert [t.ranges() for t in targets] == [[]] * 3

    @pytest.mark.parametrize("after", range(4))
    def test_attach_elsewhere(self, iommu, targets, after):
        """The target gives up one page, then must take three."""
        iommu.add_endpoint(11)
        send_all(iommu, attach(11, 2), *(page(n, domain=2) for n in (4, 5, 6)))
        before = iommu.snapshot()
        targets[0].fail_next(refuse(errno.ENOMEM), after)
        assert send(iommu, attach(8, 2)) is UNSUPP
        assert targets[0].ranges() == [(PAGE, PAGE)]
        assert iommu.snapshot() == before
        assert send(iommu, attach(8, 2)) is OK
        assert targets[0].ranges() == [(n * PAGE, PAGE) for n in (4, 5, 6)]

    def test_attach_to_a_new_domain_leaves_no_domain(self, iommu, targets):
        targets[0].fail_next(refuse())
        assert send(iommu, attach(8, 5)) is UNSUPP
        assert [d["id"] for d in iommu.snapshot()["domains"]] == [1]

    def test_detach(self, iommu, targets):
        before = iommu.snapshot()
        targets[0].fail_next(refuse())
        assert send(iommu, detach(8, 1)) is DEVERR
        assert iommu.snapshot() == before
        assert send(iommu, detach(8, 1)) is OK

    @pytest.mark.parametrize("after", range(3))
    def test_adding_a_target(self, iommu, physical, targets, after):
        send_all(iommu, page(2), page(3))
        late = LedgerTarget()
        late.fail_next(refuse(), after)
        with pytest.raises(DmaError):
            iommu.endpoint(8).add_target(late, physical)
        assert late.ranges() == []
        assert send(iommu, page(4)) is OK
        assert late.ranges() == []
        iommu.endpoint(8).add_target(late, physical)
        assert len(late.ranges()) == 4

    def test_bypass(self, iommu, targets):
        send_all(iommu, *(detach(n, 1) for n in (8, 9, 10)))
        targets[2].fail_next(refuse(), 1)
        with pytest.raises(DmaError):
            iommu.bypass = True
        assert iommu.bypass is False
        assert [t.ranges() for t in targets] == [[]] * 3
        memory = iommu.endpoint(8).memory(GuestRegionCollection.from_ranges([(0, 0x1000)]))
        assert not memory.check_range(0, 1)

    def test_registers_may_be_missing_at_a_target(self, iommu, physical, targets):
        targets[1].fail_next(refuse())
        assert send(iommu, page(2, flags=RW | MMIO)) is OK
        assert [len(t.ranges()) for t in targets] == [2, 1, 2]
        assert send(iommu, unpage(2)) is OK
        assert [len(t.ranges()) for t in targets] == [1, 1, 1]

    def test_a_rollback_that_fails_is_kept_in_mind(self, iommu, physical):
        """Invariant L4: what a target does not give up is stuck, visible, and tried again."""
        good, bad = LedgerTarget(), LedgerTarget()
        handle = iommu.endpoint(8).add_target(good, physical)
        iommu.endpoint(9).add_target(bad, physical)
        send_all(iommu, attach(8, 1), attach(9, 1))
        good.fail_next(refuse(), after=1)
        bad.fail_next(refuse())
        assert send(iommu, page(1)) is DEVERR
        assert list(handle.stats().stuck) == [PAGE]
        assert good.ranges() == [(PAGE, PAGE)]
        # The next mapping there first takes it away.
        assert send(iommu, page(1)) is OK
        assert handle.stats().stuck == {}
        assert good.ranges() == [(PAGE, PAGE)]

    def test_a_reset_goes_on_whatever_a_target_does(self, iommu, physical, targets):
        targets[0].fail_next(refuse())
        handle = iommu.endpoint(8).add_target(LedgerTarget(), physical)
        iommu.reset()
        assert [t.ranges() for t in targets] == [[(PAGE, PAGE)], [], []]
        assert handle.stats().stuck == {}
        assert iommu.snapshot()["domains"] == []

    def test_a_stuck_target_is_not_let_go(self, iommu, physical):
        target = LedgerTarget()
        handle = iommu.endpoint(8).add_target(target, physical)
        send_all(iommu, attach(8, 1), page(1))
        target.fail_next(refuse())
        iommu.reset()
        assert list(handle.stats().stuck) == [PAGE]
        target.fail_next(refuse())
        with pytest.raises(DmaError):
            handle.close()
        handle.close()
        assert target.ranges() == []


def test_a_request_refused_before_targets_are_asked(iommu, physical):
    target = LedgerTarget()
    iommu.endpoint(8).add_target(target, physical)
    send_all(iommu, attach(8, 1), page(1))
    calls = len(target.calls)
    assert send(iommu, page(1)) is INVAL
    assert len(target.calls) == calls
