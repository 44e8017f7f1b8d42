"""Exports of a virtio-iommu to clients: answers, bounds, what is released, who waits."""

import socket
import threading

import pytest

from guestio import CannotResolveError, GuestRegionCollection, InvalidAddressError
from guestio.iommu import ExportClient, ExportedRegion, ExportError, ExportServer
from guestio.virtio.iommu import VirtioIommu
from tests.kit.iommu_driver import (
    OK,
    PAGE,
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


class TestExports:
    """Every request is answered, copies stay inside the region, no export is left behind."""

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

    def test_an_unknown_endpoint_is_answered(self, client):
        with pytest.raises(ExportError, match="does not exist"):
            client.mapper(9).start_export_session()

    def test_a_copy_from_the_middle_ends_with_the_region(self, client, physical):
        remote = client.mapper(8)
        remote.start_export_session()
        with ExportedRegion(remote, 0x800, 0x400, physical) as region:
            assert region.valid
            assert len(region.memory.read(0xA00, 0x200)) == 0x200
            with pytest.raises(CannotResolveError):
                region.memory.read(0xA00, 0x201)
            with pytest.raises(CannotResolveError):
                region.memory.write(0xA00, bytes(0x201))

    def test_a_region_that_is_refused_is_not_held(self, client, physical):
        remote = client.mapper(8)
        remote.start_export_session()
        # The second page is mapped to where there is no memory.
        with pytest.raises(InvalidAddressError):
            ExportedRegion(remote, 0, 2 * PAGE, physical)
        assert self.iommu.endpoint(8).sessions[0].exports == []
        assert send(self.iommu, unmap(1, 0, 2 * PAGE - 1)) is OK

    def test_a_client_that_dies_holds_nothing(self, client):
        remote = client.mapper(8)
        remote.start_export_session()
        remote.export(0, 1)
        pending = pend(self.iommu, unmap(1, 0, PAGE - 1))
        client.close()
        assert status(pending.result(10)) is OK


class TestClientThatNeverReleases:
    """It delays its own domain only, and for a limited time."""

    def held(self, **settings):
        iommu = VirtioIommu(endpoints=[8, 9], **settings)
        send_all(iommu, attach(8, 1), attach(9, 2), map_(1, 0, PAGE - 1, 0))
        iommu.endpoint(8).open_session().export(0, 1)
        return iommu

    def test_only_its_own_domain_waits(self):
        iommu = self.held(revoke_after=None)
        pending = pend(iommu, unmap(1, 0, PAGE - 1))
        send_all(iommu, map_(2, 0, PAGE - 1, 0), unmap(2, 0, PAGE - 1), detach(9, 2))
        assert not pending.done

    def test_the_wait_is_bounded(self):
        iommu = self.held(revoke_after=0.05)
        assert status(pend(iommu, unmap(1, 0, PAGE - 1)).result(10)) is OK

    def test_there_is_a_limit_unless_told_otherwise(self):
        iommu = self.held()
        (session,) = iommu.endpoint(8).sessions
        assert 0 < session.time_limit <= 10
