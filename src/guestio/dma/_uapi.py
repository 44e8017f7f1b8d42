"""The kernel's interface as it is on the wire: ioctl numbers, structures, flags.

From ``include/uapi/linux/vfio.h`` and ``include/uapi/linux/iommufd.h`` of Linux 7.2; the layouts
have not changed since they were introduced, except by growing at the end. Names are the kernel's,
classes without its underscores. Sizes and offsets are pinned by a test.
"""

from __future__ import annotations

import ctypes
import fcntl
from ctypes import c_int32, c_uint16, c_uint32, c_uint64
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator

Fields: TypeAlias = list[tuple[str, Any]]

# _IO(type, nr) of include/uapi/asm-generic/ioctl.h; both interfaces use the type ';'.
_TYPE = ord(";") << 8

# vfio.h

VFIO_API_VERSION = 0
VFIO_TYPE1V2_IOMMU = 3
VFIO_UPDATE_VADDR = 10

VFIO_GET_API_VERSION = _TYPE | 100
VFIO_CHECK_EXTENSION = _TYPE | 101
VFIO_SET_IOMMU = _TYPE | 102
VFIO_GROUP_GET_STATUS = _TYPE | 103
VFIO_GROUP_SET_CONTAINER = _TYPE | 104
VFIO_GROUP_GET_DEVICE_FD = _TYPE | 106
VFIO_DEVICE_GET_INFO = _TYPE | 107
VFIO_DEVICE_GET_REGION_INFO = _TYPE | 108
VFIO_DEVICE_GET_IRQ_INFO = _TYPE | 109
VFIO_DEVICE_SET_IRQS = _TYPE | 110
VFIO_DEVICE_RESET = _TYPE | 111
VFIO_IOMMU_GET_INFO = _TYPE | 112
VFIO_IOMMU_MAP_DMA = _TYPE | 113
VFIO_IOMMU_UNMAP_DMA = _TYPE | 114
VFIO_IOMMU_DIRTY_PAGES = _TYPE | 117
VFIO_DEVICE_FEATURE = _TYPE | 117
VFIO_DEVICE_BIND_IOMMUFD = _TYPE | 118
VFIO_DEVICE_ATTACH_IOMMUFD_PT = _TYPE | 119

VFIO_GROUP_FLAGS_VIABLE = 1 << 0

VFIO_DEVICE_FLAGS_RESET = 1 << 0
VFIO_DEVICE_FLAGS_PCI = 1 << 1

VFIO_REGION_INFO_FLAG_READ = 1 << 0
VFIO_REGION_INFO_FLAG_WRITE = 1 << 1
VFIO_REGION_INFO_FLAG_MMAP = 1 << 2
VFIO_REGION_INFO_FLAG_CAPS = 1 << 3
VFIO_REGION_INFO_CAP_SPARSE_MMAP = 1

VFIO_PCI_NUM_BARS = 6
VFIO_PCI_ROM_REGION_INDEX = 6
VFIO_PCI_CONFIG_REGION_INDEX = 7

VFIO_IRQ_INFO_EVENTFD = 1 << 0
VFIO_IRQ_INFO_MASKABLE = 1 << 1
VFIO_IRQ_INFO_AUTOMASKED = 1 << 2
VFIO_IRQ_INFO_NORESIZE = 1 << 3
VFIO_IRQ_SET_DATA_NONE = 1 << 0
VFIO_IRQ_SET_DATA_EVENTFD = 1 << 2
VFIO_IRQ_SET_ACTION_UNMASK = 1 << 4
VFIO_IRQ_SET_ACTION_TRIGGER = 1 << 5

VFIO_DEVICE_FEATURE_GET = 1 << 16
VFIO_DEVICE_FEATURE_SET = 1 << 17
VFIO_DEVICE_FEATURE_PROBE = 1 << 18
VFIO_DEVICE_FEATURE_DMA_LOGGING_START = 6
VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP = 7
VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT = 8
VFIO_DEVICE_FEATURE_DMA_BUF = 11

VFIO_IOMMU_INFO_PGSIZES = 1 << 0
VFIO_IOMMU_INFO_CAPS = 1 << 1
VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE = 1
VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION = 2
VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL = 3

VFIO_DMA_MAP_FLAG_READ = 1 << 0
VFIO_DMA_MAP_FLAG_WRITE = 1 << 1

VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP = 1 << 0

VFIO_IOMMU_DIRTY_PAGES_FLAG_START = 1 << 0
VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP = 1 << 1
VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP = 1 << 2

# iommufd.h

IOMMU_DESTROY = _TYPE | 0x80
IOMMU_IOAS_ALLOC = _TYPE | 0x81
IOMMU_IOAS_IOVA_RANGES = _TYPE | 0x84
IOMMU_IOAS_MAP = _TYPE | 0x85
IOMMU_IOAS_UNMAP = _TYPE | 0x86
IOMMU_HWPT_ALLOC = _TYPE | 0x89
IOMMU_GET_HW_INFO = _TYPE | 0x8A
IOMMU_HWPT_SET_DIRTY_TRACKING = _TYPE | 0x8B
IOMMU_HWPT_GET_DIRTY_BITMAP = _TYPE | 0x8C
IOMMU_IOAS_MAP_FILE = _TYPE | 0x8F

IOMMU_IOAS_MAP_FIXED_IOVA = 1 << 0
IOMMU_IOAS_MAP_WRITEABLE = 1 << 1
IOMMU_IOAS_MAP_READABLE = 1 << 2

IOMMU_HWPT_ALLOC_DIRTY_TRACKING = 1 << 1
IOMMU_HW_CAP_DIRTY_TRACKING = 1 << 0
IOMMU_HWPT_DIRTY_TRACKING_ENABLE = 1 << 0
IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR = 1 << 0


class _Struct(ctypes.Structure):
    """A structure whose first field is its size: ``argsz`` in vfio.h, ``size`` in iommufd.h."""

    def __init__(self, **fields: int) -> None:
        super().__init__(**{self._fields_[0][0]: ctypes.sizeof(self), **fields})


class VfioInfoCapHeader(ctypes.Structure):
    """``struct vfio_info_cap_header``."""

    _fields_: ClassVar[Fields] = [("id", c_uint16), ("version", c_uint16), ("next", c_uint32)]


class VfioGroupStatus(_Struct):
    """``struct vfio_group_status``."""

    _fields_: ClassVar[Fields] = [("argsz", c_uint32), ("flags", c_uint32)]


class VfioDeviceInfo(_Struct):
    """``struct vfio_device_info``."""

    _fields_: ClassVar[Fields] = [
        ("argsz", c_uint32),
        ("flags", c_uint32),
        ("num_regions", c_uint32),
        ("num_irqs", c_uint32),
        ("cap_offset", c_uint32),
        ("pad", c_uint32),
    ]


class VfioRegionInfo(_Struct):
    """``struct vfio_region_info``."""

    _fields_: ClassVar[Fields] = [
        ("argsz", c_uint32),
        ("flags", c_uint32),
        ("index", c_uint32),
        ("cap_offset", c_uint32),
        ("size", c_uint64),
        ("offset", c_uint64),
    ]


class VfioRegionSparseMmapArea(ctypes.Structure):
    """``struct vfio_region_sparse_mmap_area``."""

    _fields_: ClassVar[Fields] = [("offset", c_uint64), ("size", c_uint64)]


class VfioRegionInfoCapSparseMmap(ctypes.Structure):
    """``struct vfio_region_info_cap_sparse_mmap``, without its array."""

    _fields_: ClassVar[Fields] = [
        ("header", VfioInfoCapHeader),
        ("nr_areas", c_uint32),
        ("reserved", c_uint32),
    ]


class VfioIrqInfo(_Struct):
    """``struct vfio_irq_info``."""

    _fields_: ClassVar[Fields] = [
        ("argsz", c_uint32),
        ("flags", c_uint32),
        ("index", c_uint32),
        ("count", c_uint32),
    ]


class VfioIrqSet(_Struct):
    """``struct vfio_irq_set``, without its data."""

    _fields_: ClassVar[Fields] = [
        ("argsz", c_uint32),
        ("flags", c_uint32),
        ("index", c_uint32),
        ("start", c_uint32),
        ("count", c_uint32),
    ]


class VfioDeviceFeature(_Struct):
    """``struct vfio_device_feature``, without its data."""

    _fields_: ClassVar[Fields] = [("argsz", c_uint32), ("flags", c_uint32)]


class VfioDeviceFeatureDmaBuf(_Struct):
    """``struct vfio_device_feature`` with ``struct vfio_device_feature_dma_buf`` of one range."""

    _fields_: ClassVar[Fields] = [
        ("argsz", c_uint32),
        ("feature_flags", c_uint32),
        ("region_index", c_uint32),
        ("open_flags", c_uint32),
        ("flags", c_uint32),
        ("nr_ranges", c_uint32),
        ("offset", c_uint64),
        ("length", c_uint64),
    ]


class VfioDeviceFeatureDmaLoggingControl(_Struct):
    """``struct vfio_device_feature`` with ``struct vfio_device_feature_dma_logging_control``."""

    _fields_: ClassVar[Fields] = [
        ("argsz", c_uint32),
        ("feature_flags", c_uint32),
        ("page_size", c_uint64),
        ("num_ranges", c_uint32),
        ("reserved", c_uint32),
        ("ranges", c_uint64),
    ]


class VfioDeviceFeatureDmaLoggingRange(ctypes.Structure):
    """``struct vfio_device_feature_dma_logging_range``."""

    _fields_: ClassVar[Fields] = [("iova", c_uint64), ("length", c_uint64)]


class VfioDeviceFeatureDmaLoggingReport(_Struct):
    """``struct vfio_device_feature`` with ``struct vfio_device_feature_dma_logging_report``."""

    _fields_: ClassVar[Fields] = [
        ("argsz", c_uint32),
        ("feature_flags", c_uint32),
        ("iova", c_uint64),
        ("length", c_uint64),
        ("page_size", c_uint64),
        ("bitmap", c_uint64),
    ]


class VfioDeviceBindIommufd(_Struct):
    """``struct vfio_device_bind_iommufd``."""

    _fields_: ClassVar[Fields] = [
        ("argsz", c_uint32),
        ("flags", c_uint32),
        ("iommufd", c_int32),
        ("out_devid", c_uint32),
    ]


class VfioDeviceAttachIommufdPt(_Struct):
    """``struct vfio_device_attach_iommufd_pt`` as it was before it took a PASID."""

    _fields_: ClassVar[Fields] = [("argsz", c_uint32), ("flags", c_uint32), ("pt_id", c_uint32)]


class VfioIommuType1Info(_Struct):
    """``struct vfio_iommu_type1_info``."""

    _fields_: ClassVar[Fields] = [
        ("argsz", c_uint32),
        ("flags", c_uint32),
        ("iova_pgsizes", c_uint64),
        ("cap_offset", c_uint32),
        ("pad", c_uint32),
    ]


class VfioIovaRange(ctypes.Structure):
    """``struct vfio_iova_range``; ``end`` is the last address."""

    _fields_: ClassVar[Fields] = [("start", c_uint64), ("end", c_uint64)]


class VfioIommuType1InfoCapIovaRange(ctypes.Structure):
    """``struct vfio_iommu_type1_info_cap_iova_range``, without its array."""

    _fields_: ClassVar[Fields] = [
        ("header", VfioInfoCapHeader),
        ("nr_iovas", c_uint32),
        ("reserved", c_uint32),
    ]


class VfioIommuType1InfoDmaAvail(ctypes.Structure):
    """``struct vfio_iommu_type1_info_dma_avail``."""

    _fields_: ClassVar[Fields] = [("header", VfioInfoCapHeader), ("avail", c_uint32)]


class VfioIommuType1DmaMap(_Struct):
    """``struct vfio_iommu_type1_dma_map``."""

    _fields_: ClassVar[Fields] = [
        ("argsz", c_uint32),
        ("flags", c_uint32),
        ("vaddr", c_uint64),
        ("iova", c_uint64),
        ("size", c_uint64),
    ]


class VfioIommuType1DmaUnmap(_Struct):
    """``struct vfio_iommu_type1_dma_unmap``, without its data."""

    _fields_: ClassVar[Fields] = [
        ("argsz", c_uint32),
        ("flags", c_uint32),
        ("iova", c_uint64),
        ("size", c_uint64),
    ]


class VfioIommuType1DmaUnmapBitmap(_Struct):
    """``struct vfio_iommu_type1_dma_unmap`` with ``struct vfio_bitmap``."""

    _fields_: ClassVar[Fields] = [
        ("argsz", c_uint32),
        ("flags", c_uint32),
        ("iova", c_uint64),
        ("size", c_uint64),
        ("pgsize", c_uint64),
        ("bitmap_size", c_uint64),
        ("data", c_uint64),
    ]


class VfioIommuType1DirtyBitmap(_Struct):
    """``struct vfio_iommu_type1_dirty_bitmap``, without its data."""

    _fields_: ClassVar[Fields] = [("argsz", c_uint32), ("flags", c_uint32)]


class VfioIommuType1DirtyBitmapGet(_Struct):
    """``struct vfio_iommu_type1_dirty_bitmap`` with that of ``GET_BITMAP``."""

    _fields_: ClassVar[Fields] = [
        ("argsz", c_uint32),
        ("flags", c_uint32),
        ("iova", c_uint64),
        ("size", c_uint64),
        ("pgsize", c_uint64),
        ("bitmap_size", c_uint64),
        ("data", c_uint64),
    ]


class IommuDestroy(_Struct):
    """``struct iommu_destroy``."""

    _fields_: ClassVar[Fields] = [("size", c_uint32), ("id", c_uint32)]


class IommuIoasAlloc(_Struct):
    """``struct iommu_ioas_alloc``."""

    _fields_: ClassVar[Fields] = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("out_ioas_id", c_uint32),
    ]


class IommuIovaRange(ctypes.Structure):
    """``struct iommu_iova_range``."""

    _fields_: ClassVar[Fields] = [("start", c_uint64), ("last", c_uint64)]


class IommuIoasIovaRanges(_Struct):
    """``struct iommu_ioas_iova_ranges``."""

    _fields_: ClassVar[Fields] = [
        ("size", c_uint32),
        ("ioas_id", c_uint32),
        ("num_iovas", c_uint32),
        ("reserved", c_uint32),
        ("allowed_iovas", c_uint64),
        ("out_iova_alignment", c_uint64),
    ]


class IommuIoasMap(_Struct):
    """``struct iommu_ioas_map``."""

    _fields_: ClassVar[Fields] = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("ioas_id", c_uint32),
        ("reserved", c_uint32),
        ("user_va", c_uint64),
        ("length", c_uint64),
        ("iova", c_uint64),
    ]


class IommuIoasMapFile(_Struct):
    """``struct iommu_ioas_map_file``."""

    _fields_: ClassVar[Fields] = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("ioas_id", c_uint32),
        ("fd", c_int32),
        ("start", c_uint64),
        ("length", c_uint64),
        ("iova", c_uint64),
    ]


class IommuIoasUnmap(_Struct):
    """``struct iommu_ioas_unmap``."""

    _fields_: ClassVar[Fields] = [
        ("size", c_uint32),
        ("ioas_id", c_uint32),
        ("iova", c_uint64),
        ("length", c_uint64),
    ]


class IommuHwptAlloc(_Struct):
    """``struct iommu_hwpt_alloc``, as it was before it took a fault queue."""

    _fields_: ClassVar[Fields] = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("dev_id", c_uint32),
        ("pt_id", c_uint32),
        ("out_hwpt_id", c_uint32),
        ("reserved", c_uint32),
        ("data_type", c_uint32),
        ("data_len", c_uint32),
        ("data_uptr", c_uint64),
    ]


class IommuHwInfo(_Struct):
    """``struct iommu_hw_info``."""

    _fields_: ClassVar[Fields] = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("dev_id", c_uint32),
        ("data_len", c_uint32),
        ("data_uptr", c_uint64),
        ("out_data_type", c_uint32),
        ("reserved", c_uint32),
        ("out_capabilities", c_uint64),
    ]


class IommuHwptSetDirtyTracking(_Struct):
    """``struct iommu_hwpt_set_dirty_tracking``."""

    _fields_: ClassVar[Fields] = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("hwpt_id", c_uint32),
        ("reserved", c_uint32),
    ]


class IommuHwptGetDirtyBitmap(_Struct):
    """``struct iommu_hwpt_get_dirty_bitmap``."""

    _fields_: ClassVar[Fields] = [
        ("size", c_uint32),
        ("hwpt_id", c_uint32),
        ("flags", c_uint32),
        ("reserved", c_uint32),
        ("iova", c_uint64),
        ("length", c_uint64),
        ("page_size", c_uint64),
        ("data", c_uint64),
    ]


def ioctl(fd: int, request: int, structure: ctypes.Structure | bytearray) -> int:
    """Call the kernel with a structure that it may change; returns what the call returns.

    Raises:
        OSError: The kernel refused.
    """
    answer: int = fcntl.ioctl(fd, request, structure, True)
    return answer


def info_with_capabilities(fd: int, request: int, structure: _Struct) -> bytes:
    """Call an INFO ioctl that may be followed by capabilities; returns structure and chain.

    "Callers of INFO ioctls passing insufficiently sized buffers will see ... argsz ... updated to
    report the necessary buffer size" (vfio.h).

    Raises:
        OSError: The kernel refused.
    """
    ioctl(fd, request, structure)
    needed = structure.argsz
    if needed <= ctypes.sizeof(structure):
        return bytes(structure)
    buffer = bytearray(bytes(structure).ljust(needed, b"\0"))
    ioctl(fd, request, buffer)
    return bytes(buffer)


def capabilities(info: bytes, offset: int) -> Iterator[tuple[int, int]]:
    """The capability chain that begins at ``offset``: each one's id and where it begins."""
    seen = 0
    while offset and offset + ctypes.sizeof(VfioInfoCapHeader) <= len(info):
        header = VfioInfoCapHeader.from_buffer_copy(info, offset)
        yield header.id, offset
        seen += 1
        # Chains are ascending; one that is not would never end.
        if header.next <= offset or seen > len(info):
            return
        offset = header.next


def array_of(info: bytes, kind: type[ctypes.Structure], offset: int, count: int) -> list[Any]:
    """``count`` structures that begin at ``offset``; as many as there really are."""
    size = ctypes.sizeof(kind)
    fit = min(count, max(len(info) - offset, 0) // size)
    return [kind.from_buffer_copy(info, offset + index * size) for index in range(fit)]
