"""What an observer sees of a ring whose driver and device are others: by hand, step by step."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest

from guestio._core.virtio.observer import RingObserver
from guestio.memory import GuestRegionCollection, MmapRegion
from guestio.trace import RECORD, Group, TraceReader, Tracing, What
from tests.kit.rings import INDIRECT, NEXT, WRITE, Desc, HandRing

SIZE = 8
PLACES = {"desc": 0x1000, "avail": 0x2000, "used": 0x3000}


class Ring(HandRing):
    """A ring, both of whose sides are the test."""

    def __init__(self, **options: Any) -> None:
        self.memory = GuestRegionCollection.from_regions([MmapRegion.memfd(0, 1 << 16)])
        super().__init__(self.memory, size=SIZE, **PLACES)
        self.returned = 0
        self.observer = RingObserver(
            self.memory._space, SIZE, *PLACES.values(), **{"indirect": True, **options}
        )

    def give_back(self, head: int, written: int = 0) -> None:
        """What the device does."""
        slot = self.used + 4 + 8 * (self.returned % SIZE)
        self.memory.write(slot, struct.pack("<II", head, written))
        self.set_used(self.returned + 1)

    def set_used(self, index: int) -> None:
        self.returned = index & 0xFFFF
        self.memory.write(self.used + 2, struct.pack("<H", self.returned))

    def request(self, head: int, *descriptors: Desc) -> None:
        self.offer(self.put_chain(head, *(descriptors or (Desc(0x8000, 16),))))

    def seen(self) -> tuple[list[Any], list[Any]]:
        requests: list[Any] = []
        completions: list[Any] = []
        self.observer.look(requests, completions)
        return requests, completions


def test_a_request_and_its_completion_are_seen() -> None:
    ring = Ring(block=True)
    assert not ring.observer.look()
    ring.memory.write(0x8000, struct.pack("<IIQ", 1, 0, 77))
    # The header is split.
    ring.request(2, Desc(0x8000, 3), Desc(0x8003, 600), Desc(0x9000, 1, WRITE))
    requests, completions = ring.seen()
    assert not completions
    pieces = [(0x8000, 3, False), (0x8003, 600, False), (0x9000, 1, True)]
    assert requests == [(2, 0, True, 1, 77, 603, 1, pieces)]
    assert ring.observer.depth == 1
    ring.give_back(2, 1)
    requests, completions = ring.seen()
    assert not requests
    assert completions[0][:2] == (2, 1)
    assert completions[0][3] >= completions[0][2] > 0
    observer = ring.observer
    assert (observer.taken, observer.completed, observer.bytes) == (1, 1, 604)
    assert (observer.unseen, observer.violation, observer.depth) == (0, None, 0)


def test_an_indirect_table_is_followed() -> None:
    ring = Ring()
    ring.put_table(0, 0x8000, [Desc(0x9000, 100, NEXT, 1), Desc(0xA000, 50, WRITE)])
    ring.offer(0)
    assert ring.seen()[0][0][5:7] == (100, 50)


def test_what_was_given_back_before_it_was_looked_at_is_counted_and_not_believed() -> None:
    ring = Ring()
    ring.request(0, Desc(0x8000, 10))
    ring.give_back(0)
    # The driver has its descriptor again, and has begun to fill it in.
    ring.put_chain(0, Desc(0x8000, 9999))
    requests, completions = ring.seen()
    assert requests == [(0, 0, False, None, None, 0, 0, [])]
    assert [each[0] for each in completions] == [0]
    # The last of several with the same descriptor is the device's still.
    for _ in range(2):
        ring.request(0, Desc(0x8000, 11))
        ring.give_back(0)
    ring.request(0, Desc(0x8000, 12))
    requests, completions = ring.seen()
    assert [(each[2], each[5]) for each in requests] == [(False, 0), (False, 0), (True, 12)]
    assert len(completions) == 2
    assert (ring.observer.unseen, ring.observer.taken) == (3, 4)


def test_nonsense_in_descriptors_that_are_the_drivers_again_is_no_violation() -> None:
    ring = Ring()
    ring.request(0)
    ring.give_back(0)
    ring.put(0, Desc(0x8000, 16, NEXT, 0))
    ring.observer.look()
    assert ring.observer.violation is None


def test_a_ring_that_has_lapped_is_counted_exactly_and_followed_again() -> None:
    ring = Ring()
    rng = random.Random(1)
    for _ in range(3):
        for _ in range(SIZE * 5 + 3):
            ring.request(rng.randrange(SIZE))
            head = int.from_bytes(
                ring.memory.read(ring.avail + 4 + 2 * ((ring.offered - 1) % SIZE), 2), "little"
            )
            ring.give_back(head)
        ring.request(3, Desc(0x8000, 30))
        ring.observer.look()
        assert ring.observer.violation is None
        assert ring.observer.depth == 1
        ring.give_back(3)
        ring.observer.look()
    assert ring.observer.taken == ring.observer.completed == 3 * (SIZE * 5 + 4)
    ring.request(5, Desc(0x8000, 50))
    assert ring.seen()[0][0][:3] == (5, ring.offered - 1, True)


def test_what_the_device_has_from_before_is_given_back_without_complaint() -> None:
    ring = Ring(base=2)
    ring.set_avail_idx(2)
    ring.offered = 2
    ring.observer.look()
    assert ring.observer.depth == 2
    ring.give_back(6)
    ring.give_back(7)
    ring.observer.look()
    assert ring.observer.violation is None
    # No more than two.
    ring.request(0)
    ring.give_back(4)
    ring.observer.look()
    who, what = ring.observer.violation or ("", "")
    assert who == "device"
    assert "request 4" in what


def lie_ahead(ring: Ring) -> None:
    ring.set_avail_idx(SIZE + 1)


def lie_head(ring: Ring) -> None:
    ring.offer(SIZE)


def lie_loop(ring: Ring) -> None:
    ring.put(0, Desc(0x8000, 16, NEXT, 0))
    ring.offer(0)


def lie_order(ring: Ring) -> None:
    ring.request(0, Desc(0x8000, 16, WRITE), Desc(0x9000, 16))


def lie_nested(ring: Ring) -> None:
    ring.put_table(0, 0x8000, [Desc(0x9000, 16, INDIRECT)])
    ring.offer(0)


def lie_twice(ring: Ring) -> None:
    ring.request(0)
    ring.offer(0)


def lie_used_ahead(ring: Ring) -> None:
    ring.request(0)
    ring.give_back(0)
    ring.give_back(0)


def lie_used_head(ring: Ring) -> None:
    ring.request(0)
    ring.give_back(SIZE)


def lie_other(ring: Ring) -> None:
    ring.request(0)
    ring.give_back(1)


def lie_length(ring: Ring) -> None:
    ring.request(0, Desc(0x8000, 16), Desc(0x9000, 16, WRITE))
    ring.observer.look()
    ring.give_back(0, 17)


@pytest.mark.parametrize(
    ("lie", "who", "what"),
    [
        (lie_ahead, "driver", "runs ahead"),
        (lie_head, "driver", "names descriptor 8 of 8"),
        (lie_loop, "driver", "has a loop"),
        (lie_order, "driver", "behind one to write"),
        (lie_nested, "driver", "inside an indirect table"),
        (lie_twice, "driver", "made available again"),
        (lie_used_ahead, "device", "ahead of the available index"),
        (lie_used_head, "device", "names descriptor 8 of 8"),
        (lie_other, "device", "does not have it"),
        (lie_length, "device", "17 bytes written, and has room for 16"),
    ],
)
def test_a_broken_rule_is_named_with_who_broke_it(lie: Any, who: str, what: str) -> None:
    ring = Ring()
    lie(ring)
    ring.observer.look()
    blamed, said = ring.observer.violation or ("", "")
    assert blamed == who
    assert what in said
    # Nothing is looked at any more.
    ring.request(2)
    assert not ring.observer.look()


def test_tracepoints_are_written_as_by_a_device() -> None:
    ring = Ring(queue=3, origin=7, block=True)
    with Tracing(Group.REQUESTS | Group.BUFFERS), TraceReader() as reader:
        ring.memory.write(0x8000, struct.pack("<IIQ", 0, 0, 5))
        ring.request(1, Desc(0x8000, 16), Desc(0x9000, 513, WRITE))
        ring.observer.look()
        ring.give_back(1, 513)
        ring.observer.look()
        ring.observer.note_notification()
        records = reader.read().records
    assert records.dtype == RECORD
    records = records[records["origin"] == 7]
    assert set(records["queue"]) == {3}
    kinds = [What(int(each)) for each in records["what"]]
    assert kinds == [
        What.AVAILABLE,
        What.TAKEN,
        What.BUFFER,
        What.BUFFER,
        What.COMPLETED,
        What.INTERRUPT,
    ]
    taken, completed = records[1], records[4]
    assert (taken["head"], taken["length"], taken["detail"], taken["access"]) == (1, 16, 513, 1)
    assert (completed["head"], completed["length"], completed["access"]) == (1, 513, 1)
    assert completed["since"] == taken["time"]
    assert [int(each["address"]) for each in records[2:4]] == [0x8000, 0x9000]


def test_any_order_of_two_honest_sides_is_followed_exactly() -> None:
    """Looks at any moment; what both sides did is a model of what must have been seen."""
    for seed in range(60):
        rng = random.Random(seed)
        ring = Ring()
        free, out = list(range(SIZE)), []
        offered = returned = 0
        seen: list[Any] = []
        done: list[Any] = []
        for _ in range(300):
            move = rng.randrange(4)
            if move == 0 and free:
                head = free.pop(rng.randrange(len(free)))
                ring.request(head, Desc(0x8000 + offered, 100 + offered))
                offered += 1
                out.append(head)
            elif move == 1 and out:
                head = out.pop(rng.randrange(len(out)))
                ring.give_back(head)
                free.append(head)
                returned += 1
            elif rng.random() < 0.5:
                ring.observer.look(seen, done)
                assert ring.observer.violation is None, seed
                assert (ring.observer.taken, ring.observer.completed) == (offered, returned)
                assert ring.observer.depth == len(out)
        for each in seen:
            if each[2]:
                # What it said is what it said when it was made.
                assert each[7] == [(0x8000 + each[1], 100 + each[1], False)]
        assert ring.observer.unseen >= offered - len(seen)
