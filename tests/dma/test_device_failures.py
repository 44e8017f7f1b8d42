"""Mappings of kind ``DEVICE`` that a target refuses: recorded by default, or fatal on request.

In OpenVMM the target decides, by not reporting what it can do without. The first three tests are
those of its region manager that this makes different, with ``device_failures="raise"``.
"""

import errno

import pytest

from guestio import Backing, DeviceError
from guestio.dma import DmaError, MappingType, RegionManager
from guestio.testing.targets import FailAfter, RecordingTarget, ReplacingTarget
from tests.kit.dma import PAGE, holds, mapped, region_at, unmapped

FOUR = 0x4000
RAM, DEVICE = MappingType.RAM, MappingType.DEVICE


def test_openvmm_add_mapping_dma_failure_propagates(manager: RegionManager, backing: Backing):
    region = region_at(manager, 0, 0x10000)
    region.map()
    manager.add_target(FailAfter(0), device_failures="raise")
    with pytest.raises(DmaError, match="0x4000"):
        region.add_mapping(0, FOUR, backing)
    assert region.mappings == ()
    backing.close()  # no mapping holds it


def test_openvmm_enable_region_rollback_unmaps_current_sub_mapping_from_earlier_dma_mappers(
    manager: RegionManager, backing: Backing
):
    region = region_at(manager, 0, 0x10000)
    region.add_mapping(0, FOUR, backing)
    good, bad = RecordingTarget(), FailAfter(0)
    manager.add_target(good)
    manager.add_target(bad, device_failures="raise")
    with pytest.raises(DmaError):
        region.map()
    assert good.events == mapped((0, FOUR)) + unmapped((0, FOUR))
    assert bad.events == []
    assert not region.active


def test_openvmm_enable_region_rollback_unmaps_dma_sub_mappings(
    manager: RegionManager, backing: Backing
):
    region = region_at(manager, 0, 0x18000)
    for offset in (0, 0x4000, 0x8000):
        region.add_mapping(offset, FOUR, backing, offset)
    target = FailAfter(2)
    manager.add_target(target, device_failures="raise")
    with pytest.raises(DmaError):
        region.map()
    assert not region.active
    one, two = (0, 0x4000), (0x4000, 0x8000)
    assert target.events == mapped(one, two) + unmapped(two, one)


def test_a_replay_to_a_target_that_needs_them_fails(manager: RegionManager, backing: Backing):
    region = region_at(manager, 0, 0x10000)
    region.add_mapping(0, FOUR, backing)
    region.add_mapping(FOUR, FOUR, backing)
    region.map()
    target = FailAfter(1)
    with pytest.raises(DmaError):
        manager.add_target(target, device_failures="raise")
    assert target.held == {}
    assert manager.targets == ()


def test_each_target_has_its_own_rule(manager: RegionManager, backing: Backing):
    region = region_at(manager, 0, 0x10000)
    region.map()
    lenient = manager.add_target(FailAfter(0))
    strict = manager.add_target(FailAfter(1), device_failures="raise")
    assert (lenient.device_failures, strict.device_failures) == ("record", "raise")
    region.add_mapping(0, FOUR, backing)
    assert [f.request.start for f in lenient.stats().failed] == [0]
    with pytest.raises(DmaError):
        region.add_mapping(FOUR, FOUR, backing)
    assert [f.request.start for f in lenient.stats().failed] == [0]
    assert list(strict.target.held) == [0]


def test_an_exchange_that_is_refused(manager: RegionManager, backing: Backing):
    region = region_at(manager, 0, 0x10000)
    region.add_mapping(0, FOUR, backing)
    region.map()
    target = FailAfter(0, calls=("replace",), replacing=True)
    handle = manager.add_target(target, device_failures="raise")
    before = holds(target)
    with pytest.raises(DmaError, match="replace"):
        region.map(writable=False)
    assert holds(target) == before == set(manager.mappings())
    assert handle.stats().failed == ()


def test_a_retry_raises_as_well(manager: RegionManager, backing: Backing):
    region = region_at(manager, 0, 0x10000)
    region.add_mapping(0, FOUR, backing)
    region.map()
    target = FailAfter(0, calls=("unmap",), times=1)
    handle = manager.add_target(target, device_failures="raise")
    with pytest.raises(DmaError):
        region.unmap()
    region.map()
    target._calls, target._times, target.remaining = frozenset({"map"}), None, 0
    with pytest.raises(DmaError):
        handle.retry()
    target._calls = frozenset()
    assert not handle.retry()


def own_error(call: str, start: int, size: int) -> DmaError:
    return DmaError(call, start, size, "no", errno=errno.EFAULT)


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        (own_error, True),
        (lambda *_: OSError(errno.EFAULT, "no"), True),
        (lambda *_: DeviceError("the device is gone"), True),
        (lambda *_: TypeError("a bug"), False),
        (lambda *_: AttributeError("a bug"), False),
        (lambda *_: ValueError("a bug"), False),
        (lambda *_: ZeroDivisionError("a bug"), False),
    ],
    ids=["dma", "os", "ours", "type", "attribute", "value", "zero"],
)
@pytest.mark.parametrize("call", ["map", "replace"])
def test_a_bug_of_a_target_is_no_refusal(manager, backing, error, refusal, call):
    """An error that says nothing about the mapping is neither recorded nor swallowed."""
    region = region_at(manager, 0, 0x10000)
    region.add_mapping(0, FOUR, backing)
    good = ReplacingTarget()
    manager.add_target(good)
    handle = manager.add_target(FailAfter(0, calls=(call,), error=error, replacing=True))
    if call == "replace":
        region.map()
    before = good.held.copy()

    def operation():
        region.map(writable=call == "map")

    if refusal:
        operation()
        assert [f.request.start for f in handle.stats().failed] == [0]
        assert good.held != before
    else:
        with pytest.raises(DmaError, match=r"cannot (map|replace) .*(bug)") as caught:
            operation()
        assert "bug" in str(caught.value.__cause__)
        assert handle.stats().failed == ()
        assert good.held == before
        assert not handle.broken


def test_what_is_no_rule(manager: RegionManager):
    for bad in ("ignore", None, True, b"raise"):
        with pytest.raises(ValueError, match="device_failures"):
            manager.add_target(RecordingTarget(), device_failures=bad)
    with pytest.raises(TypeError, match="class RecordingTarget"):
        manager.add_target(RecordingTarget)
    assert manager.targets == ()


class Scripted(RecordingTarget):
    """A target that refuses what it is told to: calls as ``(call, start)``, once each."""

    def __init__(self, *refused):
        super().__init__()
        self.refused = set(refused)

    def _refuse(self, call, start, size):
        if (call, start) in self.refused:
            self.refused.discard((call, start))
            raise DmaError(call, start, size, "scripted")

    def map_dma(self, request):
        self._refuse("map", request.start, request.size)
        super().map_dma(request)

    def unmap_dma(self, start, size):
        self._refuse("unmap", start, size)
        super().unmap_dma(start, size)


def test_a_retry_that_fails_keeps_the_list_of_failures(manager: RegionManager, backing: Backing):
    """What was refused before is still listed, with its reason, when a retry gets nowhere."""
    window = region_at(manager, 0x100000, 0x110000)
    window.add_mapping(0, FOUR, backing)
    window.map()
    ram = region_at(manager, 0, 0x10000, kind=RAM)
    ram.add_mapping(0, PAGE, backing)
    ram.map()
    target = Scripted(("map", 0x100000), ("unmap", 0))
    handle = manager.add_target(target)
    (failure,) = handle.stats().failed
    with pytest.raises(DmaError):
        ram.unmap()
    ram.map()
    # The retry maps the window, then the RAM is refused, and the window is taken back.
    target.refused = {("map", 0)}
    with pytest.raises(DmaError):
        handle.retry()
    assert target.held == {}
    assert handle.stats().failed == (failure,)
    assert {r.start for r in handle.diff().missing} == {0, 0x100000}
    assert not handle.retry()
    assert handle.stats().failed == ()
    assert holds(target) == set(manager.mappings())
