"""A region manager with targets that fail at random, against a model of bytes.

The model knows regions as plain numbers and answers per page who wins there. After every
operation, each target must hold exactly what the model says, apart from what it is known to have
failed at.
"""

import errno
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from guestio import Backing, IovaRange, MemoryRegionOverlapError, MmapRegion, RegionError
from guestio.dma import DmaError, DmaMapRequest, MappingType, Region, RegionManager, TargetHandle
from guestio.testing.host_iommu import DmaFaultError, SimulatedHostIommu
from guestio.testing.targets import RecordingTarget, ReplacingTarget

PAGES = 16
PAGE = 0x1000
TOP = 1 << 64
# The address space under test ends at its very top, where arithmetic likes to wrap.
BASE = TOP - PAGES * PAGE


@dataclass
class ModelRegion:
    """A region as the model sees it; its position in the list is its age."""

    start: int
    pages: int
    priority: int
    device: bool
    mapped: bool = False
    writable: bool = True
    maps: dict[int, tuple[int, int, bool]] = field(default_factory=dict)

    @property
    def span(self) -> set[int]:
        return set(range(self.start, self.start + self.pages))


class Flaky:
    """A target that fails at chosen calls, before or after the deed when it unmaps."""

    def __init__(self, replacing: bool) -> None:
        self.inner = ReplacingTarget() if replacing else RecordingTarget()
        self.fuse: dict[str, int] = {}
        self.failures = 0
        self.after_the_deed = False
        if replacing:
            self.replace_dma = self._replace

    def _burn(self, call: str) -> bool:
        if call not in self.fuse:
            return False
        self.fuse[call] -= 1
        if self.fuse[call] >= 0:
            return False
        del self.fuse[call]
        self.failures += 1
        return True

    def map_dma(self, request: DmaMapRequest) -> None:
        if self._burn("map"):
            raise OSError(errno.ENOMEM, "armed")
        self.inner.map_dma(request)

    def unmap_dma(self, start: int, size: int) -> None:
        failing = self._burn("unmap")
        if failing and not self.after_the_deed:
            raise OSError(errno.EIO, "armed")
        if start in self.inner.held:  # a hole is no error, as with VFIO's type1
            self.inner.unmap_dma(start, size)
        if failing:
            raise OSError(errno.EIO, "armed, but done")

    def _replace(self, old: DmaMapRequest, new: DmaMapRequest) -> None:
        if self._burn("replace"):
            raise OSError(errno.EINVAL, "armed")
        self.inner.replace_dma(old, new)


class RegionsMachine(RuleBasedStateMachine):
    regions: Bundle[Region] = Bundle("regions")
    targets: Bundle[TargetHandle] = Bundle("targets")

    @initialize()
    def start(self) -> None:
        self.backing = Backing.memfd(4 * PAGES * PAGE)
        self.manager = RegionManager()
        self.model: dict[Region, ModelRegion] = {}
        pages = MmapRegion(0, self.backing).slice()
        for page in range(4 * PAGES):
            pages.write(page * PAGE, b"page %03d" % page)
        del pages
        self.steady = RecordingTarget()
        self.host = SimulatedHostIommu("type1", ranges=[IovaRange(0, TOP)])
        self.host_handle = self.manager.add_target(self.host)
        self.steady_handle = self.manager.add_target(self.steady)

    # The model.

    def truth(self) -> dict[int, DmaMapRequest]:
        """By start: what every target should hold, found page by page."""
        order = list(self.model)
        winner = {}
        for page in range(PAGES):
            there = [r for r in order if self.model[r].mapped and page in self.model[r].span]
            if there:
                best = max(self.model[r].priority for r in there)
                winner[page] = next(r for r in there if self.model[r].priority == best)
        found = {}
        for region, model in self.model.items():
            if winner.get(model.start) is not region or not model.mapped:
                continue
            for at, (pages, skip, writable) in model.maps.items():
                request = DmaMapRequest(
                    start=BASE + (model.start + at) * PAGE,
                    size=pages * PAGE,
                    host_address=self.backing.host_address + skip * PAGE,
                    fd=self.backing.fd,
                    file_offset=skip * PAGE,
                    writable=writable and model.writable,
                    kind=MappingType.DEVICE if model.device else MappingType.RAM,
                )
                found[request.start] = request
        return found

    def fits(self, span: set[int], priority: int, but: Region | None = None) -> bool:
        for region, other in self.model.items():
            if region is but or not span & other.span:
                continue
            if priority <= other.priority and not span <= other.span:
                return False
            if priority >= other.priority and not span >= other.span:
                return False
        return True

    def attempt(self, operation, model_change) -> None:
        """Run an operation; the model follows it unless it was refused."""
        broken_before = {h for h in self.manager.targets if h.broken}
        failures = self.failures()
        try:
            operation()
        except DmaError:
            assert self.failures() > failures, "no target had failed"
            newly = {h for h in self.manager.targets if h.broken} - broken_before
            took_effect = self.looks_like(model_change)
            # Only a failed unmapping, at a target broken by it or before, lets a call that raises
            # take effect.
            assert not took_effect or newly or broken_before
            if took_effect:
                model_change()
        else:
            model_change()

    def failures(self) -> int:
        return sum(h.target.failures for h in self.manager.targets if isinstance(h.target, Flaky))

    def looks_like(self, model_change) -> bool:
        saved = {r: (m.start, m.mapped, m.writable, dict(m.maps)) for r, m in self.model.items()}
        order = dict(self.model)
        before = self.truth()
        model_change()
        changed = self.truth()
        expected = {r: (m.start, m.mapped, m.writable, dict(m.maps)) for r, m in self.model.items()}
        self.model = order
        for region, (start, mapped, writable, maps) in saved.items():
            model = self.model[region]
            model.start, model.mapped, model.writable, model.maps = start, mapped, writable, maps
        actual = {
            r: (
                (r.start - BASE) // PAGE,
                r.mapped,
                r.writable,
                {
                    s.offset // PAGE: (s.size // PAGE, s.backing_offset // PAGE, s.writable)
                    for s in r.mappings
                },
            )
            for r in self.manager.regions
        }
        assert actual in (saved, expected)
        assert set(self.manager.mappings()) in (set(before.values()), set(changed.values()))
        return actual == expected and actual != saved

    # Regions.

    @rule(
        target=regions,
        start=st.integers(0, PAGES - 1),
        pages=st.integers(1, PAGES),
        priority=st.integers(0, 2),
        device=st.booleans(),
    )
    def new_region(self, start, pages, priority, device):
        kind = MappingType.DEVICE if device else MappingType.RAM
        if start + pages > PAGES:
            try:
                self.manager.new_region("r", BASE + start * PAGE, pages * PAGE, priority, kind)
            except ValueError:
                return multiple()
            raise AssertionError("a region passed 2**64")
        span = set(range(start, start + pages))
        try:
            region = self.manager.new_region("r", BASE + start * PAGE, pages * PAGE, priority, kind)
        except MemoryRegionOverlapError:
            assert not self.fits(span, priority)
            return multiple()
        assert self.fits(span, priority)
        self.model[region] = ModelRegion(start, pages, priority, device)
        return region

    @rule(
        region=regions,
        at=st.integers(0, PAGES - 1),
        pages=st.integers(1, 4),
        skip=st.integers(0, 4 * PAGES - 1),
        writable=st.booleans(),
    )
    def add_mapping(self, region, at, pages, skip, writable):
        model = self.model.get(region)
        bad = (
            model is None
            or at + pages > model.pages
            or skip + pages > 4 * PAGES
            or any(at < o + n and o < at + pages for o, (n, _, _) in model.maps.items())
        )

        def operation():
            region.add_mapping(at * PAGE, pages * PAGE, self.backing, skip * PAGE, writable)

        if bad:
            self.refused(operation)
            return
        self.attempt(operation, lambda: model.maps.__setitem__(at, (pages, skip, writable)))

    @rule(region=regions, at=st.integers(0, PAGES - 1), pages=st.integers(1, PAGES))
    def remove_mappings(self, region, at, pages):
        model = self.model.get(region)

        def operation():
            region.remove_mappings(at * PAGE, pages * PAGE)

        if model is None or at + pages > model.pages:
            self.refused(operation)
            return
        touched = {o: n for o, (n, _, _) in model.maps.items() if at < o + n and o < at + pages}
        if any(o < at or o + n > at + pages for o, n in touched.items()):
            self.refused(operation)
            return

        def change():
            for offset in touched:
                del model.maps[offset]

        self.attempt(operation, change)

    @rule(region=regions, writable=st.booleans())
    def map(self, region, writable):
        model = self.model.get(region)
        if model is None:
            self.refused(lambda: region.map(writable))
            return

        def change():
            model.mapped, model.writable = True, writable

        self.attempt(lambda: region.map(writable), change)

    @rule(region=regions)
    def unmap(self, region):
        model = self.model.get(region)
        if model is None:
            self.refused(region.unmap)
            return
        self.attempt(region.unmap, lambda: setattr(model, "mapped", False))

    @rule(region=regions, start=st.integers(0, PAGES - 1))
    def move(self, region, start):
        model = self.model.get(region)
        bad = (
            model is None
            or start + model.pages > PAGES
            or not self.fits(set(range(start, start + model.pages)), model.priority, region)
        )
        if bad:
            self.refused(lambda: region.move(BASE + start * PAGE))
            return
        self.attempt(
            lambda: region.move(BASE + start * PAGE), lambda: setattr(model, "start", start)
        )

    @rule(region=consumes(regions))
    def close(self, region):
        if region not in self.model:
            region.close()
            return
        self.attempt(region.close, lambda: self.model.pop(region))

    def refused(self, operation) -> None:
        """Misuse: an exception, and nothing changed."""
        before = (self.manager.mappings(), self.manager.regions, len(self.steady.events))
        try:
            operation()
        except (ValueError, RegionError):
            pass
        else:
            raise AssertionError("misuse was accepted")
        assert before == (self.manager.mappings(), self.manager.regions, len(self.steady.events))

    # Targets.

    @rule(target=targets, replacing=st.booleans(), fuse=st.integers(-1, 4))
    def add_target(self, replacing, fuse):
        target = Flaky(replacing)
        if fuse >= 0:
            target.fuse["map"] = fuse
        try:
            handle = self.manager.add_target(target)
        except DmaError:
            assert not target.inner.held
            return multiple()
        target.fuse.clear()
        return handle

    @rule(
        handle=targets,
        call=st.sampled_from(["map", "unmap", "replace"]),
        n=st.integers(0, 3),
        after=st.booleans(),
    )
    def arm(self, handle, call, n, after):
        handle.target.fuse[call] = n
        handle.target.after_the_deed = after

    @rule(handle=targets)
    def retry(self, handle):
        if handle.closed:
            self.refused(handle.retry)
            return
        try:
            diff = handle.retry()
        except DmaError:
            assert handle.broken
            return
        assert not handle.broken
        assert not diff.stale
        assert all(request.kind is MappingType.DEVICE for request in diff.missing)

    @rule(handle=consumes(targets))
    def remove_target(self, handle):
        try:
            handle.close()
        except DmaError:
            assert not handle.closed
            handle.target.fuse.clear()
            handle.close()
        assert handle.closed
        assert not handle.target.inner.held

    @rule(handle=consumes(targets))
    def target_disappears(self, handle):
        handle.forget()
        assert handle.closed
        assert not handle.diff()

    # What must hold at all times.

    @invariant()
    def targets_equal_truth(self):
        if not hasattr(self, "model"):
            return
        truth = set(self.truth().values())
        assert set(self.manager.mappings()) == truth
        assert set(self.steady.held.values()) == truth
        for handle in self.manager.targets:
            if handle in {self.steady_handle, self.host_handle}:
                continue
            held = set(handle.target.inner.held.values())
            diff, stats = handle.diff(), handle.stats()
            if handle.broken:
                # In doubt means: kept and listed, whether or not the target still has it.
                assert held - truth <= set(diff.stale)
                assert truth - held <= set(diff.missing) | set(stats.quarantined)
            else:
                assert held <= truth
                assert truth - held == {f.request for f in stats.failed}
                assert set(diff.missing) == truth - held
                assert not diff.stale

    @precondition(lambda self: hasattr(self, "model"))
    @invariant()
    def devices_reach_what_the_model_says(self):
        reachable = {}
        for request in self.truth().values():
            skip = (request.host_address - self.backing.host_address) // PAGE
            first = (request.start - BASE) // PAGE
            for page in range(request.size // PAGE):
                reachable[first + page] = (skip + page, request.writable)
        for page in range(PAGES):
            try:
                seen = self.host.read(BASE + page * PAGE, 8)
            except DmaFaultError:
                assert page not in reachable
            else:
                assert seen == b"page %03d" % reachable[page][0]
        # One write, which must not change anything, tells about permissions.
        for page, (skip, writable) in list(reachable.items())[:2]:
            try:
                self.host.write(BASE + page * PAGE, b"page %03d" % skip)
            except DmaFaultError:
                assert not writable
            else:
                assert writable

    @precondition(lambda self: hasattr(self, "model"))
    @invariant()
    def memory_in_use_cannot_be_closed(self):
        in_use = any(m.maps for m in self.model.values()) or any(
            handle.stats().mappings for handle in self.manager.targets
        )
        if in_use:
            try:
                self.backing.close()
            except BufferError:
                return
            raise AssertionError("memory that devices reach was closed")

    def teardown(self):
        if not hasattr(self, "model"):
            return
        for handle in self.manager.targets:
            if isinstance(handle.target, Flaky):
                handle.target.fuse.clear()
        for handle in self.manager.targets:
            handle.retry()
        self.manager.close()
        assert not self.steady.held
        self.backing.close()  # nothing holds it any more


RegionsMachine.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestRegions = RegionsMachine.TestCase
