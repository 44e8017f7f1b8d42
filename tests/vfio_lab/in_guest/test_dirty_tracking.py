"""What type1 and a real IOMMU without dirty bits tell of a device's writes."""

import pytest

from guestio import AtomicBitmap, DeviceError
from guestio.dma import DmaError, MappingType
from tests.vfio_lab.in_guest.conftest import WINDOW, Lab, bytes_of
from tests.vfio_lab.script import PAGE


def test_what_a_device_may_have_written_is_marked(lab: Lab, manager, memory):
    ram = manager.new_region("ram", 0x100000, 8 * PAGE)
    ram.add_mapping(0, 4 * PAGE, memory)
    ram.add_mapping(5 * PAGE, PAGE, memory, 5 * PAGE, writable=False)
    ram.add_mapping(6 * PAGE, PAGE, memory, 6 * PAGE)
    ram.map()
    bar = manager.new_region("bar", 0x100000000, 1 << 20, kind=MappingType.DEVICE)
    bar.add_mapping(0, 1 << 20, lab.bar)
    bar.map()
    marks = AtomicBitmap(1 << 32)
    with manager.add_target(lab.target) as handle:
        support = handle.dirty_support()
        if lab.interface == "iommufd":
            # QEMU's Intel IOMMU has no dirty bits, and neither device a log.
            assert "IOMMU_HW_CAP_DIRTY_TRACKING" in support.missing
            assert lab.edu_device.address in support.missing
            with pytest.raises(DeviceError, match="VFIO_DEVICE_FEATURE_DMA_LOGGING"):
                manager.start_dirty_tracking(marks)
            assert manager.dirty_tracking is None
            lab.device_writes(0x100000, b"goes on")
            assert bytes_of(memory).read(0, 7) == b"goes on"
            return
        assert support.missing == ""
        assert set(support.ways.values()) == {"container"}
        assert not support.exact
        manager.start_dirty_tracking(marks)
        for _time in range(2):
            assert manager.harvest_dirty() == 5
            assert list(marks.dirty_pages(clear=True)) == [*range(0x100, 0x104), 0x106]
        # Unmapping tells in the same call.
        ram.remove_mappings(6 * PAGE, PAGE)
        assert list(marks.dirty_pages(clear=True)) == [0x106]
        manager.stop_dirty_tracking()
        # Off in the kernel too.
        with pytest.raises(DmaError, match="EINVAL"):
            lab.target.read_dirty(WINDOW, PAGE, PAGE)
