"""Defects A7 to A11 that others have and this one must not; one class each."""

import socket
import threading

import pytest

from guestio import CannotResolveError, GuestRegionCollection, InvalidAddressError, Permissions
from guestio.iommu import ExportClient, ExportedRegion, ExportError, ExportServer
from guestio.virtio.iommu import VirtioIommu, wire
from tests.kit.iommu_driver import (
    INVAL,
    OK,
    PAGE,
    RANGE,
    RW,
    LedgerTarget,
    R,
    W,
    attach,
    detach,
    map_,
    pend,
    send,
    send_all,
    status,
    unmap,
)

MAX = 2**64 - 1


@pytest.fixture
def physical():
    return GuestRegionCollection.from_ranges([(0, 0x10000)])


class TestA7:
    """Arithmetic on what the guest wrote ends the process."""

    @pytest.mark.parametrize("granule", [1, PAGE])
    @pytest.mark.parametrize(
        ("request_", "expected"),
        [
            (unmap(1, 0x2000, 0x1FFF), {INVAL}),
            (unmap(1, MAX, 0), {INVAL}),
            (unmap(1, 0, MAX), {OK}),
            (unmap(1, MAX, MAX), {OK}),
            (map_(1, 0x2000, 0x1FFF, 0), {INVAL}),
            (map_(1, MAX, 0, 0), {INVAL}),
            (map_(1, 0, MAX, 0), {INVAL}),
            (map_(1, 0x8000, MAX, 0), {OK}),
            (map_(1, MAX, MAX, 0), {OK, RANGE}),
            (map_(1, MAX - 0xFFF, MAX, MAX - 0xFFF), {OK}),
            (map_(1, 0x8000, 0xFFFF, MAX - 0xFFF), {OK}),
        ],
        ids=lambda value: None if isinstance(value, set) else str(wire.parse(value)),
    )
    def test_a7(self, granule, request_, expected):
        iommu = VirtioIommu(endpoints=[8], page_size_mask=MAX & -granule)
        send_all(iommu, attach(8, 1), map_(1, 0, PAGE - 1, 0))
        assert send(iommu, request_) in expected
        send_all(iommu, unmap(1, 0, MAX))


class TestA8:
    """What a request says is not looked at: READ, MMIO, the input range, the domain, reserved."""

    @pytest.mark.parametrize("flags", range(4))
    def test_a8_exact_permissions(self, flags, physical):
        iommu = VirtioIommu(endpoints=[8])
        send_all(iommu, attach(8, 1), map_(1, 0, PAGE - 1, 0, flags))
        memory = iommu.endpoint(8).memory(physical)
        for access in (R, W, RW):
            allowed = flags & access == access
            assert memory.check_range(0, PAGE, Permissions(access)) is allowed

    def test_a8_input_range(self):
        iommu = VirtioIommu(endpoints=[8], input_range=(0, 0xFFFF))
        send_all(iommu, attach(8, 1))
        assert send(iommu, map_(1, 0x10000, 0x10FFF, 0)) is RANGE

    def test_a8_mmio_needs_its_feature_and_is_kept(self):
        iommu = VirtioIommu(endpoints=[8])
        send_all(iommu, attach(8, 1), map_(1, 0, PAGE - 1, 0, 7))
        assert iommu.snapshot()["domains"][0]["mappings"] == [[0, PAGE - 1, 0, 7]]
        iommu.features = iommu.features & ~wire.F_MMIO
        assert send(iommu, map_(1, PAGE, 2 * PAGE - 1, 0, 7)) is INVAL

    def test_a8_detach_looks_at_the_domain(self):
        iommu = VirtioIommu(endpoints=[8, 9])
        send_all(iommu, attach(8, 1), attach(9, 2))
        assert send(iommu, detach(8, 2)) is INVAL
        assert iommu.endpoint(8).domain == 1

    def test_a8_reserved_and_alignment(self):
        iommu = VirtioIommu(endpoints=[8])
        assert send(iommu, attach(8, 1, reserved=b"\0\1\0\0")) is INVAL
        send_all(iommu, attach(8, 1))
        assert send(iommu, unmap(1, 0, PAGE - 1, reserved=b"\1\0\0\0")) is INVAL
        for start, end, phys in ((1, PAGE - 1, 0), (0, PAGE, 0), (0, PAGE - 1, 1)):
            assert send(iommu, map_(1, start, end, phys)) is RANGE


class TestA9:
    """The second endpoint of a domain takes the mappings from the first."""

    def test_a9_both_see_what_was_and_what_comes(self, physical):
        iommu = VirtioIommu(endpoints=[8, 9])
        targets = {n: LedgerTarget() for n in (8, 9)}
        memory = {n: iommu.endpoint(n).memory(physical) for n in (8, 9)}
        for number, target in targets.items():
            iommu.endpoint(number).add_target(target, physical)
        send_all(iommu, attach(8, 1), map_(1, 0, PAGE - 1, PAGE), attach(9, 1))
        send_all(iommu, map_(1, PAGE, 2 * PAGE - 1, 0))
        for number in (8, 9):
            assert memory[number].check_range(0, 2 * PAGE, Permissions.READ_WRITE)
            assert targets[number].ranges() == [(0, PAGE), (PAGE, PAGE)]
        send_all(iommu, unmap(1, 0, PAGE - 1))
        for number in (8, 9):
            assert not memory[number].check_range(0, 1)
            assert targets[number].ranges() == [(PAGE, PAGE)]

    def test_a9_removing_a_device_leaves_the_domain(self, physical):
        iommu = VirtioIommu(endpoints=[8, 9])
        send_all(iommu, attach(8, 1), attach(9, 1), map_(1, 0, PAGE - 1, 0))
        iommu.remove_endpoint(8)
        assert iommu.endpoint(9).memory(physical).check_range(0, PAGE)
        assert send(iommu, map_(1, 0, PAGE - 1, 0)) is INVAL


class TestA10:
    """The remote mapper: no answer for an unknown endpoint, overruns, exports that leak."""

    @pytest.fixture
    def client(self):
        self.iommu = VirtioIommu(endpoints=[8])
        send_all(self.iommu, attach(8, 1), map_(1, 0, PAGE - 1, 0xF000))
        send_all(self.iommu, map_(1, PAGE, 2 * PAGE - 1, 0x10000))
        ours, theirs = socket.socketpair()
        exports = {8: self.iommu.endpoint(8)}
        server = ExportServer(ours, exports.get)
        thread = threading.Thread(target=server.run)
        thread.start()
        with ExportClient(theirs, timeout=10) as client:
            yield client
        thread.join(10)
        assert not thread.is_alive()

    def test_a10_an_unknown_endpoint_is_answered(self, client):
        with pytest.raises(ExportError, match="does not exist"):
            client.mapper(9).start_export_session()

    def test_a10_a_copy_from_the_middle_ends_with_the_region(self, client, physical):
        remote = client.mapper(8)
        remote.start_export_session()
        with ExportedRegion(remote, 0x800, 0x400, physical) as region:
            assert region.valid
            assert len(region.memory.read(0xA00, 0x200)) == 0x200
            with pytest.raises(CannotResolveError):
                region.memory.read(0xA00, 0x201)
            with pytest.raises(CannotResolveError):
                region.memory.write(0xA00, bytes(0x201))

    def test_a10_a_region_that_is_refused_is_not_held(self, client, physical):
        remote = client.mapper(8)
        remote.start_export_session()
        # The second page is mapped to where there is no memory.
        with pytest.raises(InvalidAddressError):
            ExportedRegion(remote, 0, 2 * PAGE, physical)
        assert self.iommu.endpoint(8).sessions[0].exports == []
        assert send(self.iommu, unmap(1, 0, 2 * PAGE - 1)) is OK

    def test_a10_a_client_that_dies_holds_nothing(self, client):
        remote = client.mapper(8)
        remote.start_export_session()
        remote.export(0, 1)
        pending = pend(self.iommu, unmap(1, 0, PAGE - 1))
        client.close()
        assert status(pending.result(10)) is OK


class TestA11:
    """One client that never releases blocks every later request."""

    def held(self, **settings):
        iommu = VirtioIommu(endpoints=[8, 9], **settings)
        send_all(iommu, attach(8, 1), attach(9, 2), map_(1, 0, PAGE - 1, 0))
        iommu.endpoint(8).open_session().export(0, 1)
        return iommu

    def test_a11_only_its_own_domain_waits(self):
        iommu = self.held(revoke_after=None)
        pending = pend(iommu, unmap(1, 0, PAGE - 1))
        send_all(iommu, map_(2, 0, PAGE - 1, 0), unmap(2, 0, PAGE - 1), detach(9, 2))
        assert not pending.done

    def test_a11_and_not_for_ever(self):
        iommu = self.held(revoke_after=0.05)
        assert status(pend(iommu, unmap(1, 0, PAGE - 1)).result(10)) is OK

    def test_a11_there_is_a_limit_unless_told_otherwise(self):
        iommu = self.held()
        (session,) = iommu.endpoint(8).sessions
        assert 0 < session.time_limit <= 10
