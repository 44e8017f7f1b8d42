"""Devices of the kernel's own test of iommufd, which has an IOMMU that notes writes.

From ``drivers/iommu/iommufd/iommufd_test.h`` (``CONFIG_IOMMUFD_TEST``). A device does nothing by
itself: that it writes a page is a call.
"""

import ctypes
import errno
import itertools
import os
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from guestio.dma import IommufdTarget, _uapi

IOMMU_TEST_CMD = _uapi._TYPE | 0xA0
MOCK_DOMAIN_REPLACE, MOCK_DOMAIN_FLAGS, DIRTY = 10, 12, 13
NO_DIRTY = 1 << 0
# What its IOMMU can map.
APERTURE, APERTURE_END = 1 << 24, 1 << 31
PAGE = 4096


class _TestCmd(_uapi._Struct):
    """``struct iommu_test_cmd``; its union as far as it is used here."""

    _fields_: ClassVar[_uapi.Fields] = [
        ("size", ctypes.c_uint32),
        ("op", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        # Of a device: number, its first page table, number in the iommufd, flags. Of a page table
        # to attach to: its number. Of writes: two words without meaning, and the address.
        ("words", ctypes.c_uint32 * 4),
        ("length", ctypes.c_uint64),
        ("page_size", ctypes.c_uint64),
        ("uptr", ctypes.c_uint64),
        ("out_nr_dirty", ctypes.c_uint64),
        ("last", ctypes.c_uint32),
    ]


def kernel_has_it() -> bool:
    """Whether this kernel has such devices."""
    try:
        fd = os.open("/dev/iommu", os.O_RDWR)
    except OSError:
        return False
    try:
        _uapi.ioctl(fd, IOMMU_TEST_CMD, _TestCmd())
    except OSError as error:
        return error.errno != errno.ENOTTY
    finally:
        os.close(fd)
    return True


class MockDevice:
    """A device in a target's address space.

    Args:
        target: Where it joins, as a real one does.
        tracks: Whether its IOMMU can note writes.

    Attributes:
        address: What it is called.
        table: The page table that notes its writes, or None.
    """

    closed = False
    has_dma_log = False
    _numbers = itertools.count()

    def __init__(self, target: IommufdTarget, *, tracks: bool = True) -> None:
        self.address = f"mock-{next(self._numbers)}"
        self._fd = target.fileno()
        call = _TestCmd(op=MOCK_DOMAIN_FLAGS, id=target._ioas)
        call.words[3] = 0 if tracks else NO_DIRTY
        _uapi.ioctl(self._fd, IOMMU_TEST_CMD, call)
        self._number, device_id = call.words[0], call.words[2]
        self.table = target._attach(device_id, self._attach)
        target._devices[self] = self.table  # type: ignore[index]  # it stands for a VfioDevice

    def _attach(self, table: int) -> None:
        call = _TestCmd(op=MOCK_DOMAIN_REPLACE, id=self._number)
        call.words[0] = table
        _uapi.ioctl(self._fd, IOMMU_TEST_CMD, call)

    def writes(self, iova: int, pages: npt.NDArray[np.bool_]) -> None:
        """Write some of the pages that begin at an address.

        Raises:
            OSError: Its IOMMU notes nothing now (``EINVAL``).
        """
        bits = np.packbits(pages, bitorder="little")
        call = _TestCmd(
            op=DIRTY,
            id=self.table,
            length=len(pages) * PAGE,
            page_size=PAGE,
            uptr=bits.ctypes.data,
        )
        call.words[2], call.words[3] = iova & 0xFFFFFFFF, iova >> 32
        _uapi.ioctl(self._fd, IOMMU_TEST_CMD, call)
        assert call.out_nr_dirty == np.count_nonzero(pages)
