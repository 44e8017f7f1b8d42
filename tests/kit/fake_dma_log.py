"""A fake: devices whose log of writes is one of Python's.

No emulated device has such a log, so what stands here is not the kernel. It obeys
``include/uapi/linux/vfio.h`` and ``drivers/vfio/vfio_main.c``: START and STOP alternate, ranges are
few, aligned and disjoint, REPORT sets bits and clears the log in its range.
"""

import ctypes
import errno
import os
from typing import Any

from guestio.dma import DmaMapRequest, IommufdTarget, VfioDevice, _uapi
from guestio.dma.dirty import DeviceLogs

PAGE = 0x1000
# LOG_MAX_RANGES of vfio_main.c; drivers take fewer.
MOST_RANGES = PAGE // 16


class FakeDmaLogDevice(VfioDevice):
    """A device of a fake kernel.

    Attributes:
        knows_logs: Whether it has a log.
        written: Numbers of the pages in its log; None while it is off.
        ranges: What it was told to watch.
        refuse: Error numbers of coming calls, by the number of the feature.
    """

    def __init__(self, address: str, *, has_log: bool = True) -> None:
        self.address = address
        self._fd = os.open("/dev/null", os.O_RDONLY)
        self.knows_logs = has_log
        self.written: set[int] | None = None
        self.ranges: list[tuple[int, int]] = []
        self.refuse: dict[int, int] = {}

    def writes(self, iova: int, length: int = 1) -> None:
        """Note a write, if the log is on and watches the place."""
        if self.written is None:
            return
        for page in range(iova // PAGE, (iova + length - 1) // PAGE + 1):
            if any(start <= page * PAGE < start + size for start, size in self.ranges):
                self.written.add(page)

    def feature(self, call: Any) -> None:
        """``VFIO_DEVICE_FEATURE``."""
        # The second field of each structure, whatever its name.
        word: int = getattr(call, call._fields_[1][0])
        number, flags = word & 0xFFFF, word & ~0xFFFF
        if not self.knows_logs:
            raise fault(errno.ENOTTY)
        if flags & _uapi.VFIO_DEVICE_FEATURE_PROBE:
            return
        if number in self.refuse:
            raise fault(self.refuse[number])
        if number == _uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START:
            assert flags == _uapi.VFIO_DEVICE_FEATURE_SET
            self._start(call)
        elif number == _uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP:
            assert flags == _uapi.VFIO_DEVICE_FEATURE_SET
            if self.written is None:
                raise fault(errno.EINVAL)
            self.written = None
        elif number == _uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT:
            assert flags == _uapi.VFIO_DEVICE_FEATURE_GET
            self._report(call)
        else:
            raise fault(errno.ENOTTY)

    def _start(self, call: _uapi.VfioDeviceFeatureDmaLoggingControl) -> None:
        if self.written is not None or not 0 < call.num_ranges <= MOST_RANGES:
            raise fault(errno.EINVAL)
        kind = _uapi.VfioDeviceFeatureDmaLoggingRange * call.num_ranges
        ranges = [(r.iova, r.length) for r in kind.from_address(call.ranges)]
        end = 0
        for start, size in sorted(ranges):
            if not size or (start | size) % PAGE or start < end:
                raise fault(errno.EINVAL)
            end = start + size
        self.ranges, self.written = ranges, set()

    def _report(self, call: _uapi.VfioDeviceFeatureDmaLoggingReport) -> None:
        if self.written is None or call.page_size < PAGE or call.page_size & (call.page_size - 1):
            raise fault(errno.EINVAL)
        end = call.iova + call.length
        taken = {page for page in self.written if call.iova <= page * PAGE < end}
        self.written -= taken
        for page in taken:
            bit = (page * PAGE - call.iova) // call.page_size
            word = ctypes.c_uint64.from_address(call.bitmap + bit // 64 * 8)
            word.value |= 1 << bit % 64


def fault(number: int) -> OSError:
    """What the kernel says."""
    return OSError(number, os.strerror(number))


class FakeKernelTarget(IommufdTarget):
    """An address space of a fake kernel, whose IOMMU cannot note writes.

    Attributes:
        mapped: Sizes of what is mapped, by first address.
    """

    def __init__(self, *devices: VfioDevice) -> None:
        self._fd, self._ioas, self._tables, self._tracks = -1, 0, [], False
        self._devices = dict.fromkeys(devices)  # type: ignore[assignment]  # they stay
        self._logs = DeviceLogs()
        self.mapped: dict[int, int] = {}

    def map_dma(self, request: DmaMapRequest) -> None:
        self.mapped[request.start] = request.size

    def kernel_unmap(self, iova: int, size: int) -> int:
        if self.mapped.get(iova) != size:
            raise fault(errno.ENOENT)
        del self.mapped[iova]
        return size
