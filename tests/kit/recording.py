"""A session handler that remembers what it was told, and proves that every fd it got is open."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from guestio.vhost_user.inflight import InflightRegion
from guestio.vhost_user.messages import FrontendRequest as F
from guestio.vhost_user.messages import ProtocolFeature
from guestio.vhost_user.session import INFLIGHT_FEATURES, SUPPORTED_PROTOCOL_FEATURES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guestio.errors import GuestioError
    from guestio.vhost_user.messages import Inflight, IotlbMessage, Log, MemoryRegion, VringAddr

VIRTIO_F_VERSION_1 = 1 << 32
ACCESS_PLATFORM = 1 << 33
PROTOCOL_FEATURES = 1 << 30
DEVICE_FEATURES = VIRTIO_F_VERSION_1 | ACCESS_PLATFORM | 0b101
LOG_ALL = 1 << 26
OFFERED_PROTOCOL_FEATURES = int(
    SUPPORTED_PROTOCOL_FEATURES
    | INFLIGHT_FEATURES
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.DEVICE_STATE
    | ProtocolFeature.RARP
)

# Requests that are answered whether or not an acknowledgement is asked for.
OWN_REPLY = {
    F.GET_FEATURES,
    F.GET_PROTOCOL_FEATURES,
    F.GET_QUEUE_NUM,
    F.GET_VRING_BASE,
    F.GET_CONFIG,
    F.GET_MAX_MEM_SLOTS,
    F.GET_STATUS,
    F.GET_INFLIGHT_FD,
    F.GET_VRING_BASE_SKIP_DRAIN,
    F.IOTLB_MSG,
    F.SET_LOG_BASE,
    F.SET_DEVICE_STATE_FD,
    F.CHECK_DEVICE_STATE,
}

STATE_FD = 2
"""What a device's state travels through: any descriptor that is always there."""


class RecordingHandler:
    """Appends `(method, arguments)` to `calls`; fds are replaced by "fd" and closed.

    Set `error` to make the next call raise it, after the fds were taken over.
    """

    def __init__(self) -> None:
        self.features = DEVICE_FEATURES
        self.protocol_features = OFFERED_PROTOCOL_FEATURES
        self.num_queues = 2
        self.max_mem_slots = 4
        self.calls: list[tuple[Any, ...]] = []
        self.error: GuestioError | None = None
        self.config = bytes(range(64))
        self.status = 0
        self.base = 7
        self.region: InflightRegion | None = None

    def _record(self, name: str, *arguments: Any) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self.calls.append((name, *arguments))

    @staticmethod
    def _consume(fd: int | None) -> str | None:
        if fd is None:
            return None
        os.fstat(fd)
        os.close(fd)
        return "fd"

    def set_features(self, features: int) -> None:
        self._record("set_features", features)

    def set_memory_table(self, regions: Sequence[tuple[MemoryRegion, int]]) -> None:
        self._record("set_memory_table", [(region, self._consume(fd)) for region, fd in regions])

    def add_memory_region(self, region: MemoryRegion, fd: int) -> None:
        self._record("add_memory_region", region, self._consume(fd))

    def remove_memory_region(self, region: MemoryRegion) -> None:
        self._record("remove_memory_region", region)

    def set_vring_num(self, index: int, num: int) -> None:
        self._record("set_vring_num", index, num)

    def set_vring_addr(self, index: int, address: VringAddr) -> None:
        self._record("set_vring_addr", index, address)

    def set_vring_base(self, index: int, base: int) -> None:
        self._record("set_vring_base", index, base)

    def get_vring_base(self, index: int) -> int:
        self._record("get_vring_base", index)
        return self.base

    def set_vring_kick(self, index: int, fd: int | None) -> None:
        self._record("set_vring_kick", index, self._consume(fd))

    def set_vring_call(self, index: int, fd: int | None) -> None:
        self._record("set_vring_call", index, self._consume(fd))

    def set_vring_err(self, index: int, fd: int | None) -> None:
        self._record("set_vring_err", index, self._consume(fd))

    def set_vring_enable(self, index: int, enable: bool) -> None:
        self._record("set_vring_enable", index, enable)

    def set_backend_channel(self, fd: int) -> None:
        self._record("set_backend_channel", self._consume(fd))

    def get_config(self, offset: int, size: int) -> bytes:
        self._record("get_config", offset, size)
        return (self.config + bytes(8192))[offset : offset + size].ljust(size, b"\0")

    def set_config(self, offset: int, data: bytes, flags: int) -> None:
        self._record("set_config", offset, data, flags)

    def iotlb(self, message: IotlbMessage) -> None:
        self._record("iotlb", message)

    def get_inflight(self, num_queues: int, queue_size: int) -> tuple[Inflight, int]:
        self._record("get_inflight", num_queues, queue_size)
        self.region = InflightRegion.create(num_queues, queue_size)
        return self.region.description, self.region.fd

    def set_inflight(self, inflight: Inflight, fd: int) -> None:
        self._record("set_inflight", inflight, self._consume(fd))

    def set_log(self, log: Log, fd: int) -> None:
        self._record("set_log", log, self._consume(fd))

    def set_logging(self, enable: bool) -> None:
        self._record("set_logging", enable)

    def save_state(self) -> int:
        self._record("save_state")
        return STATE_FD

    def load_state(self) -> int:
        self._record("load_state")
        return STATE_FD

    def check_state(self) -> None:
        self._record("check_state")

    def send_rarp(self, address: bytes) -> None:
        self._record("send_rarp", address)

    def get_status(self) -> int:
        self._record("get_status")
        return self.status

    def set_status(self, status: int) -> None:
        self._record("set_status", status)
        self.status = status

    def reset_device(self) -> None:
        self._record("reset_device")
