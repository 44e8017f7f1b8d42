"""The virtio-iommu device (virtio 1.3, section 5.13).

``device`` is the device, ``serving`` what it does on its queues, ``queues`` serves those to a
driver in memory of this process, and ``endpoint_queue`` a queue of another device that sits behind
an endpoint. ``wire`` is the bytes, ``space`` what endpoints see, ``targets`` what DMA targets hold
of it, ``requests`` the order of requests that wait, ``faults`` the records on their way to the
guest.
"""

from guestio.virtio.iommu.device import VirtioIommu
from guestio.virtio.iommu.endpoint_queue import EndpointQueue
from guestio.virtio.iommu.faults import FaultStats
from guestio.virtio.iommu.queues import IommuQueues
from guestio.virtio.iommu.requests import Pending
from guestio.virtio.iommu.space import Endpoint, EndpointMemory, TargetHandle
from guestio.virtio.iommu.targets import TargetStats
from guestio.virtio.iommu.wire import FaultReason, FaultRecord, Status

__all__ = [
    "Endpoint",
    "EndpointMemory",
    "EndpointQueue",
    "FaultReason",
    "FaultRecord",
    "FaultStats",
    "IommuQueues",
    "Pending",
    "Status",
    "TargetHandle",
    "TargetStats",
    "VirtioIommu",
]
