"""Every structure and number of the kernel's interface: size, field offsets, ioctl."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from guestio.dma import _uapi

# Kernel name -> (class, size in bytes, offset of each field of ours under the kernel's name).
# From include/uapi/linux/vfio.h and iommufd.h of Linux 7.2; arrays at the end not counted.
VFIO = {
    "struct vfio_info_cap_header": (_uapi.VfioInfoCapHeader, 8, {"id": 0, "version": 2, "next": 4}),
    "struct vfio_group_status": (_uapi.VfioGroupStatus, 8, {"argsz": 0, "flags": 4}),
    "struct vfio_region_info": (
        _uapi.VfioRegionInfo,
        32,
        {"argsz": 0, "flags": 4, "index": 8, "cap_offset": 12, "size": 16, "offset": 24},
    ),
    "struct vfio_region_sparse_mmap_area": (
        _uapi.VfioRegionSparseMmapArea,
        16,
        {"offset": 0, "size": 8},
    ),
    "struct vfio_region_info_cap_sparse_mmap": (
        _uapi.VfioRegionInfoCapSparseMmap,
        16,
        {"header": 0, "nr_areas": 8, "reserved": 12},
    ),
    "struct vfio_irq_info": (
        _uapi.VfioIrqInfo,
        16,
        {"argsz": 0, "flags": 4, "index": 8, "count": 12},
    ),
    "struct vfio_irq_set": (
        _uapi.VfioIrqSet,
        20,
        {"argsz": 0, "flags": 4, "index": 8, "start": 12, "count": 16},
    ),
    "struct vfio_device_feature": (_uapi.VfioDeviceFeature, 8, {"argsz": 0, "flags": 4}),
    "struct vfio_iova_range": (_uapi.VfioIovaRange, 16, {"start": 0, "end": 8}),
    "struct vfio_iommu_type1_info_cap_iova_range": (
        _uapi.VfioIommuType1InfoCapIovaRange,
        16,
        {"header": 0, "nr_iovas": 8, "reserved": 12},
    ),
    "struct vfio_iommu_type1_info_dma_avail": (
        _uapi.VfioIommuType1InfoDmaAvail,
        12,
        {"header": 0, "avail": 8},
    ),
    "struct vfio_iommu_type1_dma_map": (
        _uapi.VfioIommuType1DmaMap,
        32,
        {"argsz": 0, "flags": 4, "vaddr": 8, "iova": 16, "size": 24},
    ),
    "struct vfio_iommu_type1_dma_unmap": (
        _uapi.VfioIommuType1DmaUnmap,
        24,
        {"argsz": 0, "flags": 4, "iova": 8, "size": 16},
    ),
}
# Younger than the headers of Debian 12, or with a field more since.
YOUNGER = {
    "struct vfio_device_info": (
        _uapi.VfioDeviceInfo,
        24,
        {"argsz": 0, "flags": 4, "num_regions": 8, "num_irqs": 12, "cap_offset": 16},
    ),
    "struct vfio_iommu_type1_info": (
        _uapi.VfioIommuType1Info,
        24,
        {"argsz": 0, "flags": 4, "iova_pgsizes": 8, "cap_offset": 16},
    ),
    "struct vfio_device_bind_iommufd": (
        _uapi.VfioDeviceBindIommufd,
        16,  # before token_uuid_ptr
        {"argsz": 0, "flags": 4, "iommufd": 8, "out_devid": 12},
    ),
    "struct vfio_device_attach_iommufd_pt": (
        _uapi.VfioDeviceAttachIommufdPt,
        12,  # before pasid
        {"argsz": 0, "flags": 4, "pt_id": 8},
    ),
    "struct vfio_device_feature_dma_buf": (
        _uapi.VfioDeviceFeatureDmaBuf,
        40,  # 8 bytes of struct vfio_device_feature in front, one range behind
        {"region_index": 8, "open_flags": 12, "flags": 16, "nr_ranges": 20, "offset": 24},
    ),
    "struct vfio_device_feature_dma_logging_control": (
        _uapi.VfioDeviceFeatureDmaLoggingControl,
        32,  # 8 bytes of struct vfio_device_feature in front
        {"page_size": 8, "num_ranges": 16, "ranges": 24},
    ),
    "struct vfio_device_feature_dma_logging_range": (
        _uapi.VfioDeviceFeatureDmaLoggingRange,
        16,
        {"iova": 0, "length": 8},
    ),
    "struct vfio_device_feature_dma_logging_report": (
        _uapi.VfioDeviceFeatureDmaLoggingReport,
        40,  # the same in front
        {"iova": 8, "length": 16, "page_size": 24, "bitmap": 32},
    ),
    "struct vfio_iommu_type1_dma_unmap with struct vfio_bitmap": (
        _uapi.VfioIommuType1DmaUnmapBitmap,
        48,
        {"flags": 4, "iova": 8, "size": 16, "pgsize": 24, "bitmap_size": 32, "data": 40},
    ),
    "struct vfio_iommu_type1_dirty_bitmap": (
        _uapi.VfioIommuType1DirtyBitmap,
        8,
        {"argsz": 0, "flags": 4},
    ),
    "struct vfio_iommu_type1_dirty_bitmap_get": (
        _uapi.VfioIommuType1DirtyBitmapGet,
        48,  # 8 bytes of struct vfio_iommu_type1_dirty_bitmap in front
        {"flags": 4, "iova": 8, "size": 16, "pgsize": 24, "bitmap_size": 32, "data": 40},
    ),
    "struct iommu_hwpt_alloc": (
        _uapi.IommuHwptAlloc,
        40,  # before fault_id
        {"flags": 4, "dev_id": 8, "pt_id": 12, "out_hwpt_id": 16, "data_type": 24, "data_uptr": 32},
    ),
    "struct iommu_hw_info": (
        _uapi.IommuHwInfo,
        40,
        {"flags": 4, "dev_id": 8, "data_len": 12, "data_uptr": 16, "out_capabilities": 32},
    ),
    "struct iommu_hwpt_set_dirty_tracking": (
        _uapi.IommuHwptSetDirtyTracking,
        16,
        {"size": 0, "flags": 4, "hwpt_id": 8},
    ),
    "struct iommu_hwpt_get_dirty_bitmap": (
        _uapi.IommuHwptGetDirtyBitmap,
        48,
        {"hwpt_id": 4, "flags": 8, "iova": 16, "length": 24, "page_size": 32, "data": 40},
    ),
    "struct iommu_destroy": (_uapi.IommuDestroy, 8, {"size": 0, "id": 4}),
    "struct iommu_ioas_alloc": (
        _uapi.IommuIoasAlloc,
        12,
        {"size": 0, "flags": 4, "out_ioas_id": 8},
    ),
    "struct iommu_iova_range": (_uapi.IommuIovaRange, 16, {"start": 0, "last": 8}),
    "struct iommu_ioas_iova_ranges": (
        _uapi.IommuIoasIovaRanges,
        32,
        {"size": 0, "ioas_id": 4, "num_iovas": 8, "allowed_iovas": 16, "out_iova_alignment": 24},
    ),
    "struct iommu_ioas_map": (
        _uapi.IommuIoasMap,
        40,
        {"size": 0, "flags": 4, "ioas_id": 8, "user_va": 16, "length": 24, "iova": 32},
    ),
    "struct iommu_ioas_map_file": (
        _uapi.IommuIoasMapFile,
        40,
        {"size": 0, "flags": 4, "ioas_id": 8, "fd": 12, "start": 16, "length": 24, "iova": 32},
    ),
    "struct iommu_ioas_unmap": (
        _uapi.IommuIoasUnmap,
        24,
        {"size": 0, "ioas_id": 4, "iova": 8, "length": 16},
    ),
}
NUMBERS = {
    "VFIO_API_VERSION": 0,
    "VFIO_TYPE1v2_IOMMU": 3,
    "VFIO_GET_API_VERSION": 0x3B64,
    "VFIO_CHECK_EXTENSION": 0x3B65,
    "VFIO_SET_IOMMU": 0x3B66,
    "VFIO_GROUP_GET_STATUS": 0x3B67,
    "VFIO_GROUP_SET_CONTAINER": 0x3B68,
    "VFIO_GROUP_GET_DEVICE_FD": 0x3B6A,
    "VFIO_DEVICE_GET_INFO": 0x3B6B,
    "VFIO_DEVICE_GET_REGION_INFO": 0x3B6C,
    "VFIO_DEVICE_GET_IRQ_INFO": 0x3B6D,
    "VFIO_DEVICE_SET_IRQS": 0x3B6E,
    "VFIO_DEVICE_RESET": 0x3B6F,
    "VFIO_IOMMU_GET_INFO": 0x3B70,
    "VFIO_IOMMU_MAP_DMA": 0x3B71,
    "VFIO_IOMMU_UNMAP_DMA": 0x3B72,
    "VFIO_IOMMU_DIRTY_PAGES": 0x3B75,
    "VFIO_DEVICE_FEATURE": 0x3B75,
    "VFIO_GROUP_FLAGS_VIABLE": 1,
    "VFIO_DEVICE_FLAGS_RESET": 1,
    "VFIO_DEVICE_FLAGS_PCI": 2,
    "VFIO_REGION_INFO_FLAG_READ": 1,
    "VFIO_REGION_INFO_FLAG_WRITE": 2,
    "VFIO_REGION_INFO_FLAG_MMAP": 4,
    "VFIO_REGION_INFO_FLAG_CAPS": 8,
    "VFIO_REGION_INFO_CAP_SPARSE_MMAP": 1,
    "VFIO_PCI_ROM_REGION_INDEX": 6,
    "VFIO_PCI_CONFIG_REGION_INDEX": 7,
    "VFIO_IRQ_INFO_EVENTFD": 1,
    "VFIO_IRQ_INFO_AUTOMASKED": 4,
    "VFIO_IRQ_SET_DATA_NONE": 1,
    "VFIO_IRQ_SET_DATA_EVENTFD": 4,
    "VFIO_IRQ_SET_ACTION_UNMASK": 16,
    "VFIO_IRQ_SET_ACTION_TRIGGER": 32,
    "VFIO_DEVICE_FEATURE_GET": 0x10000,
    "VFIO_DEVICE_FEATURE_SET": 0x20000,
    "VFIO_DEVICE_FEATURE_PROBE": 0x40000,
    "VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION": 2,
    "VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP": 1,
    "VFIO_IOMMU_DIRTY_PAGES_FLAG_START": 1,
    "VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP": 2,
    "VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP": 4,
    "VFIO_IOMMU_INFO_PGSIZES": 1,
    "VFIO_IOMMU_INFO_CAPS": 2,
    "VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE": 1,
    "VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL": 3,
    "VFIO_DMA_MAP_FLAG_READ": 1,
    "VFIO_DMA_MAP_FLAG_WRITE": 2,
}
YOUNGER_NUMBERS = {
    "VFIO_DEVICE_FEATURE_DMA_LOGGING_START": 6,
    "VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP": 7,
    "VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT": 8,
    "VFIO_DEVICE_FEATURE_DMA_BUF": 11,
    "VFIO_DEVICE_BIND_IOMMUFD": 0x3B76,
    "VFIO_DEVICE_ATTACH_IOMMUFD_PT": 0x3B77,
    "IOMMU_DESTROY": 0x3B80,
    "IOMMU_IOAS_ALLOC": 0x3B81,
    "IOMMU_IOAS_IOVA_RANGES": 0x3B84,
    "IOMMU_IOAS_MAP": 0x3B85,
    "IOMMU_IOAS_UNMAP": 0x3B86,
    "IOMMU_HWPT_ALLOC": 0x3B89,
    "IOMMU_GET_HW_INFO": 0x3B8A,
    "IOMMU_HWPT_SET_DIRTY_TRACKING": 0x3B8B,
    "IOMMU_HWPT_GET_DIRTY_BITMAP": 0x3B8C,
    "IOMMU_HWPT_ALLOC_DIRTY_TRACKING": 2,
    "IOMMU_HW_CAP_DIRTY_TRACKING": 1,
    "IOMMU_HWPT_DIRTY_TRACKING_ENABLE": 1,
    "IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR": 1,
    "IOMMU_IOAS_MAP_FILE": 0x3B8F,
    "IOMMU_IOAS_MAP_FIXED_IOVA": 1,
    "IOMMU_IOAS_MAP_WRITEABLE": 2,
    "IOMMU_IOAS_MAP_READABLE": 4,
}
STRUCTURES = {**VFIO, **YOUNGER}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name):
    kind, size, offsets = STRUCTURES[name]
    assert ctypes.sizeof(kind) == size
    assert {field: getattr(kind, field).offset for field in offsets} == offsets


@pytest.mark.parametrize("name", [*NUMBERS, *YOUNGER_NUMBERS])
def test_numbers(name):
    expected = {**NUMBERS, **YOUNGER_NUMBERS}[name]
    assert getattr(_uapi, name.replace("TYPE1v2", "TYPE1V2")) == expected


def test_no_structure_is_forgotten():
    ours = {
        value
        for value in vars(_uapi).values()
        if isinstance(value, type)
        and issubclass(value, ctypes.Structure)
        and value.__module__ == _uapi.__name__
        and not value.__name__.startswith("_")
    }
    assert ours == {kind for kind, _size, _offsets in STRUCTURES.values()}


def test_the_installed_header_agrees(tmp_path: Path):
    """What the system's own vfio.h says, asked of a C compiler."""
    header = Path("/usr/include/linux/vfio.h")
    if not header.exists():
        pytest.skip("no kernel headers installed (linux-libc-dev)")
    lines = []
    for name, (_kind, size, offsets) in VFIO.items():
        lines.append(f"_Static_assert(sizeof({name}) == {size}, {name!r});".replace("'", '"'))
        lines += [
            f'_Static_assert(__builtin_offsetof({name}, {field}) == {at}, "{name} {field}");'
            for field, at in offsets.items()
        ]
    lines += [f'_Static_assert({name} == {value}, "{name}");' for name, value in NUMBERS.items()]
    source = tmp_path / "check.c"
    source.write_text("#include <linux/vfio.h>\n#include <sys/ioctl.h>\n" + "\n".join(lines))
    done = subprocess.run(
        ["gcc", "-fsyntax-only", str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", [_uapi.VfioRegionInfo, _uapi.IommuIoasMap])
def test_a_structure_knows_its_size(kind):
    made = kind()
    assert getattr(made, kind._fields_[0][0]) == ctypes.sizeof(kind)


class TestCapabilities:
    """Chains come from the kernel, but what is read from memory is checked all the same."""

    @staticmethod
    def chain(*headers: tuple[int, int, int, int]) -> bytes:
        info = bytearray(64)
        for at, number, version, following in headers:
            header = _uapi.VfioInfoCapHeader(number, version, following)
            info[at : at + 8] = bytes(header)
        return bytes(info)

    def test_a_chain(self):
        info = self.chain((24, 1, 1, 40), (40, 3, 1, 0))
        assert list(_uapi.capabilities(info, 24)) == [(1, 24), (3, 40)]

    @pytest.mark.parametrize("following", [24, 8, 1000, 60])
    def test_a_chain_that_does_not_end_well(self, following):
        info = self.chain((24, 1, 1, following))
        assert list(_uapi.capabilities(info, 24)) == [(1, 24)]

    @pytest.mark.parametrize("offset", [0, 60, 1 << 31])
    def test_no_chain(self, offset):
        assert list(_uapi.capabilities(self.chain(), offset)) == []

    def test_an_array_that_claims_to_be_longer(self):
        found = _uapi.array_of(bytes(40), _uapi.VfioIovaRange, 8, 1 << 30)
        assert len(found) == 2
