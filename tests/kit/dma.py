"""Regions, and the events that targets of DMA maps record."""

from guestio.dma import DmaMapRequest, MappingType, Region, RegionManager
from guestio.testing.targets import DmaEvent, RecordingTarget

PAGE = 0x1000


def mapped(*places: tuple[int, int]) -> list[DmaEvent]:
    """The events of mapping ``[start, end)`` ranges."""
    return [DmaEvent("map", start, end - start) for start, end in places]


def unmapped(*places: tuple[int, int]) -> list[DmaEvent]:
    """The events of unmapping ``[start, end)`` ranges."""
    return [DmaEvent("unmap", start, end - start) for start, end in places]


def holds(target: RecordingTarget) -> set[DmaMapRequest]:
    """What a target holds."""
    return set(target.held.values())


def region_at(
    manager: RegionManager,
    start: int,
    end: int,
    priority: int = 0,
    kind: MappingType = MappingType.DEVICE,
) -> Region:
    """A region of ``[start, end)``; of kind ``DEVICE`` unless told otherwise."""
    return manager.new_region(f"{start:#x}", start, end - start, priority, kind)
