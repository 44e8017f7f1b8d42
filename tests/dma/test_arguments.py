"""Nonsense in the arguments of DMA maps and of the targets for tests."""

import pytest

from guestio import Backing
from guestio.dma import DmaMapRequest, MappingType, RegionManager
from guestio.testing.host_iommu import SimulatedHostIommu
from guestio.testing.targets import FailAfter, RecordingTarget
from tests.kit.arguments import flags, refused
from tests.kit.dma import PAGE


def region(manager):
    return manager.new_region("region", 0, 0x10000)


def test_a_manager():
    refused(lambda: RegionManager, {"page_size": PAGE})


def test_regions():
    refused(
        lambda: RegionManager().new_region,
        {"name": "ram", "start": PAGE, "size": PAGE, "priority": 0, "kind": MappingType.RAM},
        may=[("name", "1")],
    )
    refused(lambda: region(RegionManager()).move, {"start": PAGE})
    refused(lambda: region(RegionManager()).map, {"writable": False}, may=flags("writable"))


def test_mappings(backing: Backing):
    managers = []

    def make():
        managers.append(RegionManager())
        return region(managers[-1]).add_mapping

    refused(
        make,
        {"offset": 0, "size": PAGE, "backing": backing, "backing_offset": 0, "writable": False},
        # Past the end of the region, which is said of the range.
        may=[*flags("writable"), ("size", 2**64)],
    )
    for number, manager in enumerate(managers):
        assert len(manager.regions[0].mappings) == (number == 0)
        manager.close()
    refused(
        lambda: region(RegionManager()).remove_mappings,
        {"offset": 0, "size": PAGE},
        may=[("size", 2**64)],
    )


def test_targets():
    refused(
        lambda: RegionManager().add_target,
        {"target": RecordingTarget(), "needs_fd": False, "device_failures": "record"},
        may=flags("needs_fd"),
    )


def test_requests():
    refused(
        lambda: DmaMapRequest,
        {
            "start": PAGE,
            "size": PAGE,
            "host_address": PAGE,
            "fd": 3,
            "file_offset": 0,
            "writable": False,
            "kind": MappingType.RAM,
        },
        may=[*flags("writable"), ("host_address", None), ("fd", None), ("fd", 2**64)],
    )


def test_what_tests_use():
    refused(lambda: FailAfter, {"n": 1, "times": 1}, may=[("times", None), *big("n", "times")])
    refused(
        lambda: SimulatedHostIommu,
        {"interface": "type1", "page_size": PAGE, "entries": 3, "locked_limit": 5},
        may=[("locked_limit", None), *big("entries", "locked_limit")],
    )


def big(*names):
    return [(name, 2**64) for name in names]


@pytest.mark.parametrize("cls", [RecordingTarget, SimulatedHostIommu])
def test_a_class_is_no_target(cls):
    manager = RegionManager()
    with pytest.raises(TypeError, match=f"class {cls.__name__}"):
        manager.add_target(cls)
    assert manager.targets == ()
