"""Nonsense in the arguments of the virtio-iommu."""

import numpy as np
import pytest

from guestio import AtomicBitmap, DirtyMode, GuestRegionCollection, IovaRange, Permissions
from guestio.testing.targets import RecordingTarget
from guestio.virtio.iommu import FaultRecord, IommuQueues, VirtioIommu
from guestio.virtio.layout import RingLayout
from tests.kit.arguments import flags, numbers, refused

MEMORY = GuestRegionCollection.from_ranges([(0, 0x10000)])


def iommu(**settings):
    return VirtioIommu(endpoints=[8], **settings)


def test_the_constructor():
    empty = [("endpoints", []), ("reserved", []), ("features", []), ("features", None)]
    times = numbers("revoke_after", "stop_timeout", "fault_rate")
    nothing = [("revoke_after", None), ("max_domains", None)]
    refused(
        lambda: VirtioIommu,
        {
            "endpoints": [8],
            "page_size_mask": 4096,
            "input_range": (0, 100),
            "domain_range": (0, 3),
            "probe_size": 512,
            "bypass": False,
            "features": 0,
            "reserved": (),
            "max_domains": 3,
            "max_mappings": 3,
            "max_total_mappings": 3,
            "revoke_after": 1.0,
            "stop_timeout": 1.0,
            "fault_rate": 1.0,
            "fault_burst": 1,
            "fault_capacity": 1,
            "clock": float,
        },
        may=[*empty, *times, *nothing, *flags("bypass"), ("clock", int), ("fault_rate", 2**64)],
    )
    for bad in ([None], ["8"], [-1], [2**32], [8, 8], [True]):
        with pytest.raises((TypeError, ValueError), match="endpoint"):
            VirtioIommu(endpoints=bad)
    for bad in ([(0,)], [(1, 0, 0)], [(0, 1, 256)], [(0, None, 0)], [5], [(0, 2**64, 0)]):
        with pytest.raises((TypeError, ValueError), match="reserved"):
            VirtioIommu(endpoints=[8], reserved=bad)
    for bad in ((1,), (5, 3), (-1, 3), (0, 2**64), (0, 1, 2), 7, (0, 1.0)):
        with pytest.raises((TypeError, ValueError), match="input_range"):
            VirtioIommu(input_range=bad)


def test_requests():
    refused(
        lambda: lambda writable: iommu().handle_request(b"\1" * 20, writable),
        {"writable": 4},
        may=[
            ("writable", -1),
            ("writable", np.int64(-1)),
            ("writable", -(2**70)),
            ("writable", 2**64),
        ],
    )
    for bad in (None, 1, "request", 1.5, [1]):
        with pytest.raises(TypeError):
            iommu().handle_request(bad, 4)
    refused(lambda: iommu().event_records, {"limit": 1}, may=[("limit", None), ("limit", 2**64)])
    refused(lambda: iommu().report, {"record": FaultRecord.make(2, 0, 8, 0)})
    device = iommu()
    refused(
        lambda: lambda bypass: setattr(device, "bypass", bypass),
        {"bypass": False},
        may=flags("bypass"),
    )
    refused(
        lambda: lambda features: setattr(device, "features", features),
        {"features": 0},
        may=[("features", [])],
    )


def test_endpoints():
    refused(lambda: lambda endpoint: iommu().endpoint(endpoint), {"endpoint": 8})
    refused(lambda: lambda endpoint: iommu().add_endpoint(endpoint), {"endpoint": 9})
    refused(lambda: lambda endpoint: iommu().remove_endpoint(endpoint), {"endpoint": 8})
    refused(
        lambda: iommu().add_target,
        {"endpoint": 8, "target": RecordingTarget(), "physical": MEMORY},
    )
    endpoint = iommu().endpoint(8)
    refused(
        lambda: endpoint.memory,
        {"physical": MEMORY, "bitmap": AtomicBitmap(4096), "dirty": DirtyMode.IOVA},
        may=[("bitmap", None), ("dirty", None)],
    )
    refused(
        lambda: lambda access: endpoint.report_unreachable(IovaRange(0, 1), access),
        {"access": Permissions.READ},
    )
    refused(
        lambda: endpoint.open_session,
        {"time_limit": 1.0},
        may=[("time_limit", None), *numbers("time_limit")],
    )
    refused(
        lambda: lambda iova, length: endpoint.explain(iova, length),
        {"iova": 0, "length": 1},
        may=[("length", 2**64)],
    )


def test_queues():
    layout = RingLayout.contiguous(0, 8)
    refused(
        lambda: (
            lambda **options: IommuQueues.in_memory(
                memory=MEMORY, requests=layout, events=layout, **options
            )
        ),
        {"iommu": iommu(), "notify": [].append},
        may=[("notify", int)],
    )


def test_snapshots():
    refused(lambda: VirtioIommu.restore, {"data": iommu().snapshot()})
    for name in iommu().snapshot()["settings"]:
        state = iommu().snapshot()
        state["settings"][name] = object()
        with pytest.raises(ValueError):
            VirtioIommu.restore(state)
