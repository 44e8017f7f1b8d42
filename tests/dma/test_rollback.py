"""Every operation, failing at every call that it makes to a target: all or nothing.

The target under test stands between two that never fail; what they hold tells whether the
operation left a trace.
"""

from collections.abc import Callable

import pytest

from guestio import Backing
from guestio.dma import DmaError, MappingType, Region, RegionManager
from guestio.testing.targets import FailAfter, RecordingTarget, ReplacingTarget
from tests.kit.dma import PAGE, holds

Operation = Callable[["World"], None]


class World:
    """RAM of four pages, a ROM that can shadow it, a window elsewhere, and three targets."""

    def __init__(self, kind: MappingType, replacing: bool) -> None:
        self.backing = Backing.memfd(16 * PAGE)
        self.manager = RegionManager()
        self.ram = self._region("ram", 0, 1, kind)
        self.rom = self._region("rom", 0, 2, kind)
        self.window = self.manager.new_region("window", 0x100000, 4 * PAGE, 0, kind)
        self.ram.map()
        for region, skip in ((self.ram, 0), (self.rom, 4 * PAGE), (self.window, 8 * PAGE)):
            for offset in (0, PAGE, 3 * PAGE):
                region.add_mapping(offset, PAGE, self.backing, skip + offset)
        self.before = RecordingTarget()
        self.flaky = FailAfter(10**6, calls=("map", "unmap", "replace"), replacing=replacing)
        self.after = ReplacingTarget()
        self.handles = [
            self.manager.add_target(target) for target in (self.before, self.flaky, self.after)
        ]

    def _region(self, name: str, start: int, priority: int, kind: MappingType) -> Region:
        return self.manager.new_region(name, start, 4 * PAGE, priority, kind)

    def arm(self, n: int) -> None:
        self.flaky.remaining = n

    def disarm(self) -> None:
        self.flaky.remaining = 10**6

    def state(self) -> object:
        """All that a refused operation must leave as it was."""
        return (
            [
                (r.name, r.start, r.mapped, r.active, r.writable, r.mappings)
                for r in self.manager.regions
            ],
            self.manager.mappings(),
            holds(self.before),
            holds(self.flaky),
            holds(self.after),
            [t.target for t in self.manager.targets],
        )

    def check(self) -> None:
        """Invariant L3, and that every ledger tells the truth about its target."""
        truth = set(self.manager.mappings())
        for handle in self.manager.targets:
            held = holds(handle.target)
            diff, stats = handle.diff(), handle.stats()
            assert set(diff.missing) == truth - held
            assert set(diff.stale) == (held - truth) | set(stats.quarantined)
            assert stats.mappings == len(held)
            if not handle.broken:
                assert held <= truth
                assert truth - held == {f.request for f in stats.failed}

    def finish(self) -> None:
        self.disarm()
        for handle in self.manager.targets:
            assert not handle.retry()
            assert holds(handle.target) == set(self.manager.mappings())
        self.manager.close()
        assert not self.before.held | self.flaky.held | self.after.held
        self.backing.close()


def overlay(world: World) -> None:
    world.rom.map()


def unmap_overlay(world: World) -> None:
    world.rom.unmap()


def close_overlay(world: World) -> None:
    world.rom.close()


def add(world: World) -> None:
    world.ram.add_mapping(2 * PAGE, PAGE, world.backing)


def remove(world: World) -> None:
    world.ram.remove_mappings(0, 2 * PAGE)


def read_only(world: World) -> None:
    world.ram.map(writable=False)


def move_away(world: World) -> None:
    world.window.move(0x200000)


def move_onto_itself(world: World) -> None:
    world.window.move(0x101000)


def unmap(world: World) -> None:
    world.ram.unmap()


def register(world: World) -> None:
    world.handles[1].close()
    world.manager.add_target(world.flaky)


OPERATIONS: dict[str, tuple[Operation, tuple[str, ...]]] = {
    "add": (add, ()),
    "remove": (remove, ()),
    "read_only": (read_only, ()),
    "unmap": (unmap, ()),
    "overlay": (overlay, ()),
    "unmap_overlay": (unmap_overlay, ("rom",)),
    "close_overlay": (close_overlay, ("rom",)),
    "move_away": (move_away, ("window",)),
    "move_onto_itself": (move_onto_itself, ("window",)),
    "register": (register, ("window",)),
}


@pytest.mark.parametrize("replacing", [False, True], ids=["plain", "replacing"])
@pytest.mark.parametrize("times", [1, 2, None], ids=["once", "twice", "ever_after"])
@pytest.mark.parametrize("kind", list(MappingType), ids=lambda kind: kind.value)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_that_fails_at_any_call(name, kind, times, replacing):
    operation, mapped_first = OPERATIONS[name]
    n = 0
    while True:
        world = World(kind, replacing)
        for region in mapped_first:
            getattr(world, region).map()
        world.flaky._times = times
        before = world.state()
        world.arm(n)
        refused = False
        try:
            operation(world)
        except DmaError:
            refused = True
        broken = [h for h in world.manager.targets if h.broken]
        # Only a failed unmapping may leave a trace.
        if refused and not broken and name != "register":
            assert world.state() == before
        # Targets that never fail never differ from the truth.
        assert holds(world.before) == holds(world.after) == set(world.manager.mappings())
        failures = world.flaky.failures
        world.check()
        world.finish()
        if not failures:
            break
        n += 1
    assert n >= 1


@pytest.mark.parametrize("name", ["unmap", "remove", "close_overlay", "unmap_overlay"])
def test_what_is_taken_away_is_gone_wherever_that_works(name):
    """An unmapping that fails at one target does not keep the memory within reach of others."""
    operation, mapped_first = OPERATIONS[name]
    world = World(MappingType.RAM, replacing=False)
    for region in mapped_first:
        getattr(world, region).map()
    truth = set(world.manager.mappings())
    world.arm(0)
    world.flaky._times = 1
    with pytest.raises(DmaError, match="unmap"):
        operation(world)
    assert holds(world.before) == set(world.manager.mappings()) != truth
    assert len(world.handles[1].stats().quarantined) == 1
    world.check()
    world.finish()


@pytest.mark.parametrize("operation", [overlay, add, move_away, register, read_only])
def test_an_interrupt_is_no_reason_to_forget(operation):
    """Ctrl-C just as a target has mapped something: that is undone like everything else."""
    world = World(MappingType.RAM, replacing=False)
    world.window.map()
    before = world.state()
    real_map = world.flaky.map_dma

    def interrupted(request):
        real_map(request)
        world.flaky.map_dma = real_map
        raise KeyboardInterrupt

    world.flaky.map_dma = interrupted
    with pytest.raises(KeyboardInterrupt):
        operation(world)
    if operation is register:
        assert holds(world.flaky) == set()
        world.manager.add_target(world.flaky)
        world.handles[1] = world.manager.targets[-1]
    else:
        assert world.state() == before
    assert not any(handle.broken for handle in world.manager.targets)
    world.check()
    world.finish()


def test_an_interrupted_unmapping_leaves_the_memory_kept():
    world = World(MappingType.RAM, replacing=False)
    world.flaky._error = lambda *_: KeyboardInterrupt()
    world.flaky._times = 1
    world.arm(0)
    before = world.state()
    with pytest.raises(KeyboardInterrupt):
        unmap(world)
    assert world.state() == before
    assert world.handles[1].broken
    world.check()
    world.finish()
