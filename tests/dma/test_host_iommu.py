"""The simulated host IOMMU, and through it the real targets' checks, choices and explanations."""

import errno
import gc
import os
import resource
from pathlib import Path

import pytest

from guestio import Backing, IovaRange, MmapRegion
from guestio.dma import DmaError, DmaMapRequest, MappingType, RegionManager
from guestio.testing.host_iommu import DmaFaultError, SimulatedBar, SimulatedHostIommu
from tests.kit.dma import PAGE
from tests.vfio_lab.script import UNMAPPED

BOTH = pytest.mark.parametrize("interface", ["type1", "iommufd"])
MSI_WINDOW = 0xFEE00000


@pytest.fixture
def memory():
    with Backing.memfd(8 * PAGE) as made:
        yield made


def request_for(memory: Backing, start: int = 0, size: int = 8 * PAGE, **changes) -> DmaMapRequest:
    fields = {
        "host_address": memory.host_address,
        "fd": memory.fd,
        "file_offset": memory.file_offset or 0,
        **changes,
    }
    return DmaMapRequest(start, size, **fields)


def fill(memory: Backing, data: bytes, at: int = 0) -> None:
    MmapRegion(0, memory).slice().write(at, data)


def content(memory: Backing, at: int, length: int) -> bytes:
    return bytes(MmapRegion(0, memory).slice().read(at, length))


@BOTH
def test_a_device_reaches_what_is_mapped_and_nothing_else(interface, memory):
    host = SimulatedHostIommu(interface)
    host.map_dma(request_for(memory, 0x10000))
    host.write(0x10000 + PAGE - 2, b"across")
    assert content(memory, PAGE - 2, 6) == b"across"
    assert host.read(0x10000 + PAGE - 2, 6) == b"across"
    for iova, length in ((0xF000, 1), (0x18000, 1), (0x17FFF, 2), (0, 2**63)):
        with pytest.raises(DmaFaultError):
            host.read(iova, length)
    host.unmap_dma(0x10000, 8 * PAGE)
    with pytest.raises(DmaFaultError) as caught:
        host.write(0x10004, b"late")
    assert (caught.value.addr, caught.value.length) == (0x10004, 4)
    assert content(memory, 4, 4) == bytes(4)


@BOTH
def test_an_access_over_several_mappings(interface, memory):
    host = SimulatedHostIommu(interface)
    host.map_dma(request_for(memory, PAGE, PAGE))
    other = request_for(
        memory,
        2 * PAGE,
        PAGE,
        host_address=memory.host_address + 4 * PAGE,
        file_offset=4 * PAGE,
        writable=False,
    )
    host.map_dma(other)
    fill(memory, b"cd", 4 * PAGE)
    host.write(2 * PAGE - 2, b"ab")
    assert host.read(2 * PAGE - 2, 4) == b"abcd"
    # What lies before the fault has arrived, as with a real device.
    with pytest.raises(DmaFaultError, match="reading only") as caught:
        host.write(2 * PAGE - 2, b"ABCD")
    assert caught.value.addr == 2 * PAGE
    assert host.read(2 * PAGE - 2, 4) == b"ABcd"
    assert host.read(2 * PAGE, 0) == b""
    assert host.mappings() == [(PAGE, PAGE, True), (2 * PAGE, PAGE, False)]


@BOTH
@pytest.mark.parametrize(
    ("changes", "number", "advice"),
    [
        ({"start": 0x800}, errno.EINVAL, "multiples of 0x1000"),
        ({"size": 0x800}, errno.EINVAL, "multiples of 0x1000"),
        ({"start": MSI_WINDOW}, errno.EINVAL, r"\[0x0, 0xfee00000\), \[0xfef00000, "),
        ({"start": MSI_WINDOW - PAGE}, errno.EINVAL, "can map only"),
        ({"start": 1 << 48}, errno.EINVAL, "can map only"),
        ({"start": 2**64 - PAGE, "size": PAGE}, errno.EINVAL, "can map only"),
    ],
)
def test_what_the_kernel_would_refuse_is_refused_before(interface, memory, changes, number, advice):
    host = SimulatedHostIommu(interface)
    fields = {"start": 0, "size": 2 * PAGE, **changes}
    with pytest.raises(DmaError, match=advice) as caught:
        host.map_dma(request_for(memory, **fields))
    assert caught.value.errno == number
    assert (caught.value.start, caught.value.size) == (fields["start"], fields["size"])
    assert host.calls == 0
    assert host.mappings() == []


@BOTH
def test_memory_off_its_page(interface, memory):
    host = SimulatedHostIommu(interface)
    odd = request_for(memory, 0, PAGE, host_address=memory.host_address + 8, file_offset=8)
    with pytest.raises(DmaError, match="multiples of 0x1000"):
        host.map_dma(odd)


@BOTH
def test_an_overlap_is_explained(interface, memory):
    host = SimulatedHostIommu(interface)
    host.map_dma(request_for(memory))
    with pytest.raises(DmaError, match=r"mapped already.*EEXIST"):
        host.map_dma(request_for(memory, 7 * PAGE))


def test_cutting_and_holes_in_type1(memory):
    host = SimulatedHostIommu("type1")
    host.map_dma(request_for(memory))
    with pytest.raises(DmaError, match="cut") as caught:
        host.unmap_dma(0, PAGE)
    assert caught.value.errno == errno.EINVAL
    assert host.mappings() == [(0, 8 * PAGE, True)]
    host.unmap_dma(0, 16 * PAGE)
    host.unmap_dma(0, PAGE)  # a hole is fine


def test_cutting_and_holes_in_iommufd(memory):
    host = SimulatedHostIommu("iommufd")
    host.map_dma(request_for(memory, 0, PAGE))
    host.map_dma(request_for(memory, PAGE, 2 * PAGE))
    with pytest.raises(DmaError, match="cut") as caught:
        host.unmap_dma(PAGE, PAGE)
    assert caught.value.errno == errno.ENOENT
    # The kernel goes through the range: what lies before the one that would be cut is gone.
    with pytest.raises(DmaError):
        host.unmap_dma(0, 2 * PAGE)
    assert host.mappings() == [(PAGE, 2 * PAGE, True)]
    with pytest.raises(DmaError, match="nothing is mapped"):
        host.unmap_dma(0x100000, PAGE)


@BOTH
@pytest.mark.parametrize("writable", [False, True])
def test_memory_that_is_read_only(interface, memory, writable):
    host = SimulatedHostIommu(interface)
    with Backing.from_fd(memory.fd, 8 * PAGE, writable=False) as view:
        request = request_for(view, writable=writable, fd=None)
        if writable:
            with pytest.raises(DmaError, match=r"cannot be written.*EFAULT"):
                host.map_dma(request)
        else:
            host.map_dma(request)
            with pytest.raises(DmaFaultError):
                host.write(0, b"x")


@BOTH
def test_memory_that_is_not_there(interface):
    host = SimulatedHostIommu(interface)
    with pytest.raises(DmaError, match="EFAULT"):
        host.map_dma(DmaMapRequest(0, PAGE, host_address=UNMAPPED))
    with pytest.raises(DmaError, match="host address"):
        host.map_dma(DmaMapRequest(0, PAGE))


@BOTH
def test_memory_unmapped_under_a_mapping_is_a_fault_and_no_crash(interface):
    """With real hardware the pages stay pinned; here the mistake is reported."""
    host = SimulatedHostIommu(interface)
    memory = Backing.anonymous(PAGE)
    host.map_dma(request_for(memory, size=PAGE))
    memory.close()
    with pytest.raises(DmaFaultError, match="while mapped for DMA"):
        host.read(0, 4)
    with pytest.raises(DmaFaultError, match="while mapped for DMA"):
        host.write(0, b"data")


def test_a_container_that_is_full(memory):
    host = SimulatedHostIommu("type1", entries=2)
    for page in range(2):
        host.map_dma(request_for(memory, page * PAGE, PAGE))
    with pytest.raises(DmaError, match=r"dma_entry_limit.*ENOSPC"):
        host.map_dma(request_for(memory, 2 * PAGE, PAGE))
    host.unmap_dma(0, PAGE)
    host.map_dma(request_for(memory, 2 * PAGE, PAGE))


@BOTH
def test_the_limit_of_locked_memory(interface, memory):
    limit, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    host = SimulatedHostIommu(interface, locked_limit=4 * PAGE)
    host.map_dma(request_for(memory, 0, 3 * PAGE))
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (4 * PAGE, hard))
        with pytest.raises(DmaError, match=r"ENOMEM") as caught:
            host.map_dma(request_for(memory, 0x10000, 2 * PAGE))
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, hard))
    # The number to raise it to: what this process has locked, and two pages.
    assert "raise it to at least" in str(caught.value)
    number = int(str(caught.value).split("at least ")[1].split()[0])
    assert number >= 2 * PAGE


@BOTH
def test_without_a_limit_it_is_the_host_that_is_out_of_memory(interface, memory, monkeypatch):
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _what: unlimited)
    host = SimulatedHostIommu(interface)
    host.fail_after(0, errno.ENOMEM)
    with pytest.raises(DmaError, match="host is out of memory"):
        host.map_dma(request_for(memory))


@BOTH
def test_other_apertures_and_pages(interface, memory):
    host = SimulatedHostIommu(interface, page_size=2 * PAGE, ranges=[IovaRange(0x100000, 0x10000)])
    assert host.info().page_size == 2 * PAGE
    aligned = {"host_address": (memory.host_address + PAGE) & -2 * PAGE}
    host.map_dma(request_for(memory, 0x10E000, 2 * PAGE, **aligned))
    for start, size in (
        (0x10D000, 2 * PAGE),
        (0x100000, PAGE),
        (0x10F000, 2 * PAGE),
        (0, 2 * PAGE),
    ):
        with pytest.raises(DmaError, match="EINVAL"):
            host.map_dma(request_for(memory, start, size * PAGE, **aligned))


@BOTH
@pytest.mark.parametrize("n", range(3))
def test_any_call_can_be_made_to_fail(interface, memory, n):
    host = SimulatedHostIommu(interface)
    host.fail_after(n, errno.EIO)
    outcomes = []
    for call in (
        lambda: host.map_dma(request_for(memory)),
        lambda: host.unmap_dma(0, 8 * PAGE),
        lambda: host.map_dma(request_for(memory)),
        lambda: host.unmap_dma(0, 8 * PAGE),
    ):
        try:
            call()
        except DmaError as error:
            outcomes.append(error.errno)
        else:
            outcomes.append(None)
    assert outcomes[n] == errno.EIO
    # It had no effect: where the first unmapping failed, the second mapping finds one.
    assert (
        outcomes
        == [
            [errno.EIO, errno.ENOENT if interface == "iommufd" else None, None, None],
            [None, errno.EIO, errno.EEXIST, None],
            [None, None, errno.EIO, errno.ENOENT if interface == "iommufd" else None],
        ][n]
    )


class TestFiles:
    """How an iommufd maps memory that has a file."""

    def test_by_its_descriptor(self, memory):
        host = SimulatedHostIommu("iommufd")
        host.map_dma(request_for(memory, host_address=None))
        host.write(5, b"by file")
        assert content(memory, 5, 7) == b"by file"

    def test_a_descriptor_for_reading_only_is_refused_for_writing(self, memory):
        """The kernel takes it, and devices could write what the process may not."""
        host = SimulatedHostIommu("iommufd")
        fd = os.open(f"/proc/self/fd/{memory.fd}", os.O_RDONLY)
        with pytest.raises(DmaError, match="reading only") as caught:
            host.map_dma(request_for(memory, fd=fd))
        assert caught.value.errno == errno.EACCES
        assert host.calls == 0
        host.map_dma(request_for(memory, fd=fd, writable=False))
        os.close(fd)

    def test_a_file_of_the_wrong_kind_is_mapped_by_its_address(self, tmp_path, memory):
        host = SimulatedHostIommu("iommufd")
        path = tmp_path / "file"
        path.write_bytes(bytes(8 * PAGE))
        with path.open("r+b") as file, Backing.from_fd(file.fileno(), 8 * PAGE) as backing:
            host.map_dma(request_for(backing))
            host.write(0, b"by address")
            assert content(backing, 0, 10) == b"by address"
            with pytest.raises(DmaError, match="EINVAL"):
                host.map_dma(request_for(backing, 0x100000, host_address=None))

    def test_a_file_that_is_too_short(self, memory):
        host = SimulatedHostIommu("iommufd")
        with pytest.raises(DmaError, match="EINVAL"):
            host.map_dma(request_for(memory, file_offset=PAGE, host_address=None))
        with pytest.raises(DmaError, match="EBADF"):
            host.map_dma(request_for(memory, fd=1000, writable=False, host_address=None))


class TestBars:
    """Another device's memory."""

    @pytest.fixture(params=["type1", "iommufd"])
    def host(self, request) -> SimulatedHostIommu:
        return SimulatedHostIommu(request.param)

    @pytest.fixture
    def bar(self, host):
        made = host.new_bar(4 * PAGE)
        yield made
        made.close()

    @staticmethod
    def request(bar: SimulatedBar, start: int = 0x100000) -> DmaMapRequest:
        return request_for(bar.backing, start, 4 * PAGE, kind=MappingType.DEVICE)

    def test_peer_to_peer(self, host, bar):
        host.map_dma(self.request(bar))
        host.write(0x100008, b"peer")
        assert content(bar.backing, 8, 4) == b"peer"
        assert host.read(0x100008, 4) == b"peer"

    def test_switching_the_device_off(self, host, bar):
        host.map_dma(self.request(bar))
        bar.memory_space = False
        if host.interface == "type1":
            host.write(0x100000, b"lost")
            assert host.read(0x100000, 2) == b"\xff\xff"
        else:
            with pytest.raises(DmaFaultError, match="revoked"):
                host.write(0x100000, b"lost")
            with pytest.raises(DmaError, match="ENODEV"):
                host.map_dma(self.request(bar, 0x200000))
        bar.memory_space = True
        assert content(bar.backing, 0, 4) == bytes(4)
        if host.interface == "iommufd":
            with pytest.raises(DmaFaultError, match="revoked"):
                host.read(0x100000, 4)
            with pytest.raises(DmaError, match="EEXIST"):
                host.map_dma(self.request(bar))
            host.unmap_dma(0x100000, 4 * PAGE)
            host.map_dma(self.request(bar))
        host.write(0x100000, b"live")
        assert content(bar.backing, 0, 4) == b"live"

    def test_a_revoked_mapping_comes_back_with_its_region(self, host, bar):
        """What a virtual machine monitor does when its guest switches a device off and on."""
        with RegionManager() as manager:
            region = manager.new_region("bar", 0x100000, 4 * PAGE, kind=MappingType.DEVICE)
            region.add_mapping(0, 4 * PAGE, bar.backing)
            region.map()
            with manager.add_target(host):
                region.unmap()
                bar.memory_space = False
                bar.memory_space = True
                region.map()
                host.write(0x100000, b"again")
                assert content(bar.backing, 0, 5) == b"again"

    def test_a_kernel_that_exports_no_bars(self):
        host = SimulatedHostIommu("iommufd", linux=(6, 12))
        bar = host.new_bar(4 * PAGE)
        with RegionManager() as manager:
            region = manager.new_region("bar", 0x100000, 4 * PAGE, kind=MappingType.DEVICE)
            region.add_mapping(0, 4 * PAGE, bar.backing)
            region.map()
            with manager.add_target(host) as handle:
                (failed,) = handle.stats().failed
                assert "6.19" in str(failed.error)
                assert not handle.broken

    def test_device_memory_that_is_an_ordinary_file(self, host, memory):
        """An emulated device's memory is mapped as memory."""
        host.map_dma(request_for(memory, kind=MappingType.DEVICE))
        host.write(0, b"emulated")
        assert content(memory, 0, 8) == b"emulated"

    def test_no_descriptor_is_left_open(self, host, bar):
        gc.collect()  # what earlier tests left must not be closed in between
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(8):
            host.map_dma(self.request(bar))
            host.unmap_dma(0x100000, 4 * PAGE)
        assert len(list(Path("/proc/self/fd").iterdir())) == before


@BOTH
def test_a_region_manager_on_a_simulated_host(interface, memory):
    host = SimulatedHostIommu(interface)
    with RegionManager() as manager, manager.add_target(host) as handle:
        ram = manager.new_region("ram", MSI_WINDOW - 2 * PAGE, 4 * PAGE)
        ram.map()
        ram.add_mapping(0, 2 * PAGE, memory)
        with pytest.raises(DmaError, match="can map only"):
            ram.add_mapping(2 * PAGE, 2 * PAGE, memory, 2 * PAGE)
        assert host.mappings() == [(MSI_WINDOW - 2 * PAGE, 2 * PAGE, True)]
        assert not handle.diff()
    assert host.mappings() == []


@BOTH
def test_a_region_without_references_stays_mapped(interface, memory):
    host = SimulatedHostIommu(interface)
    with RegionManager() as manager, manager.add_target(host):
        manager.new_region("ram", 0x10000, 8 * PAGE).map()
        manager.regions[0].add_mapping(0, 8 * PAGE, memory)
        gc.collect()
        host.write(0x10000, b"still there")
        assert content(memory, 0, 11) == b"still there"
        with manager.regions[0] as ram:
            assert ram.active
        assert manager.regions == ()
        with pytest.raises(DmaFaultError):
            host.read(0x10000, 1)


def test_private_memory_of_several_targets():
    hosts = [SimulatedHostIommu("type1"), SimulatedHostIommu("iommufd")]
    with Backing.anonymous(2 * PAGE) as private, RegionManager() as manager:
        ram = manager.new_region("ram", 0, 2 * PAGE)
        ram.add_mapping(0, 2 * PAGE, private)
        ram.map()
        for host in hosts:
            manager.add_target(host)
        hosts[0].write(PAGE, b"shared")
        assert hosts[1].read(PAGE, 6) == content(private, PAGE, 6) == b"shared"


def test_interfaces_have_names():
    with pytest.raises(ValueError, match="neither"):
        SimulatedHostIommu("type2")
