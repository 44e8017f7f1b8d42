"""The region that tracks requests in flight: its bytes, its steps, and being killed between them.

The specification is QEMU docs/interop/vhost-user.rst, "Inflight I/O tracking".
"""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import signal
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestio._core.memory.mapping import HostMapping
from guestio._core.virtio.inflight import InflightQueue, part_size
from guestio.errors import BackingError, ProtocolError, QueueError
from guestio.memory import Backing
from guestio.vhost_user.inflight import InflightRegion
from guestio.vhost_user.messages import Inflight
from tests.kit.peer import nothing_left
from tests.kit.traced import Traced

if TYPE_CHECKING:
    from collections.abc import Iterator

U16 = st.integers(0, 65535)
HEADER = struct.Struct("=QHHHH")  # features, version, desc_num, last_batch_head, used_idx
DESC = struct.Struct("=B5xHQ")  # inflight, next, counter


def anonymous(size: int, content: bytes = b"") -> HostMapping:
    mapping = HostMapping(-1, 0, size)
    memoryview(mapping)[: len(content)] = content
    return mapping


def header(mapping: HostMapping, offset: int = 0) -> tuple[int, ...]:
    return HEADER.unpack_from(memoryview(mapping), offset)


def desc(mapping: HostMapping, head: int) -> tuple[int, ...]:
    return DESC.unpack_from(memoryview(mapping), 16 + 16 * head)


def region_bytes(
    descs: list[tuple[int, int, int]],
    *,
    features: int = 0,
    version: int = 1,
    desc_num: int | None = None,
    last: int = 0,
    used: int = 0,
) -> bytes:
    """A part: (inflight, next, counter) of every descriptor."""
    entries = len(descs) if desc_num is None else desc_num
    return HEADER.pack(features, version, entries, last, used) + b"".join(
        DESC.pack(*each) for each in descs
    )


class TestLayout:
    @pytest.mark.parametrize(
        ("entries", "size"), [(1, 64), (3, 64), (4, 128), (128, 2112), (256, 4160), (32768, 524352)]
    )
    def test_sizes_are_those_of_libvhost_user(self, entries: int, size: int) -> None:
        # ALIGN_UP(sizeof(VuDescStateSplit) * queue_size + sizeof(uint16_t), 64)
        assert part_size(entries) == size == (16 * entries + 2 + 63) // 64 * 64

    @pytest.mark.parametrize("entries", [0, -1, 32769, 1 << 70])
    def test_no_such_size(self, entries: int) -> None:
        with pytest.raises(ValueError, match="queue size"):
            part_size(entries)

    def test_a_fresh_part(self) -> None:
        mapping = anonymous(128)
        queue = InflightQueue(mapping, 0, 4)
        assert queue.size == 4
        assert bytes(memoryview(mapping)) == bytes(128), "touched before its ring was known"
        assert queue.recover(0x1234) == []
        assert bytes(memoryview(mapping)[:16]) == bytes.fromhex(
            "0000000000000000 0100 0400 0000 3412"
        )
        assert not any(memoryview(mapping)[16:])

    def test_every_byte_of_a_busy_part(self) -> None:
        mapping = anonymous(192)
        queue = InflightQueue(mapping, 64, 4)
        queue.recover(0xFFFF)
        for head in (2, 0, 3):
            queue.take(head)
        queue.batch(3)
        queue.batch(2)
        assert bytes(memoryview(mapping)[64:144]).hex(" ", 8).split() == [
            "0000000000000000",
            "010004000200ffff",
            "0100000000000000",
            "0100000000000000",
            "0000000000000000",
            "0000000000000000",
            "0100000000000300",
            "0000000000000000",
            "0100000000000000",
            "0200000000000000",
        ]
        assert not any(memoryview(mapping)[:64])
        assert not any(memoryview(mapping)[144:])

    @pytest.mark.parametrize(
        ("offset", "entries"), [(64, 4), (1, 1), (129, 1), (1 << 62, 1), (0, 8), (-1, 1)]
    )
    def test_a_part_that_is_not_there(self, offset: int, entries: int) -> None:
        with pytest.raises(ValueError, match=r"does not fit|not aligned|not in"):
            InflightQueue(anonymous(128), offset, entries)

    def test_memory_that_cannot_be_written_or_is_gone(self) -> None:
        mapping = HostMapping(-1, 0, 128, writable=False)
        with pytest.raises(ValueError, match="cannot be written"):
            InflightQueue(mapping, 0, 1)
        mapping = anonymous(128)
        mapping.close()
        with pytest.raises(ValueError, match="closed"):
            InflightQueue(mapping, 0, 1)

    def test_the_mapping_stays_as_long_as_the_part(self) -> None:
        mapping = anonymous(128)
        queue = InflightQueue(mapping, 0, 4)
        with pytest.raises(BufferError):
            mapping.close()
        del queue
        mapping.close()


class TestSteps:
    """The numbered steps of the specification, each by what it leaves in memory."""

    def test_receiving(self) -> None:
        mapping = anonymous(128)
        queue = InflightQueue(mapping, 0, 4)
        queue.recover(0)
        for counter, head in enumerate((3, 1, 0)):
            queue.take(head)
            assert desc(mapping, head) == (1, 0, counter)
        assert desc(mapping, 2) == (0, 0, 0)

    def test_supplying_a_batch(self) -> None:
        mapping = anonymous(128)
        queue = InflightQueue(mapping, 0, 4)
        queue.recover(7)
        for head in (3, 1, 0):
            queue.take(head)
        queue.batch(1)
        assert (header(mapping)[3:], desc(mapping, 1)) == ((1, 7), (1, 0, 1))
        queue.batch(3)
        assert (header(mapping)[3:], desc(mapping, 3)) == ((3, 7), (1, 1, 0))
        queue.publish([1, 3], 9)
        assert header(mapping) == (0, 1, 4, 3, 9)
        assert [desc(mapping, head)[0] for head in range(4)] == [1, 0, 0, 0]

    def test_reconnecting_when_the_used_index_agrees(self) -> None:
        descs = [(1, 0, 12), (0, 0, 13), (1, 1, 11), (1, 3, 10)]
        before = region_bytes(descs, last=2, used=5)
        mapping = anonymous(128, before)
        queue = InflightQueue(mapping, 0, 4)
        assert queue.recover(5) == [3, 2, 0]
        assert bytes(memoryview(mapping)[: len(before)]) == before
        queue.take(1)
        assert desc(mapping, 1) == (1, 0, 13), "the counter goes on"

    def test_reconnecting_after_the_used_index_was_stored(self) -> None:
        descs = [(1, 0, 12), (1, 0, 13), (1, 1, 11), (1, 3, 10)]
        mapping = anonymous(128, region_bytes(descs, last=2, used=65535))
        assert InflightQueue(mapping, 0, 4).recover(1) == [3, 0]
        assert header(mapping) == (0, 1, 4, 2, 1)
        assert [desc(mapping, head)[0] for head in range(4)] == [1, 0, 0, 1]

    def test_counters_begin_again_when_nothing_is_in_flight(self) -> None:
        mapping = anonymous(128, region_bytes([(0, 0, 99)] * 4))
        queue = InflightQueue(mapping, 0, 4)
        queue.recover(0)
        queue.take(2)
        assert desc(mapping, 2) == (1, 0, 0)

    def test_the_part_of_another_ring_begins_anew(self) -> None:
        """A ring that was reset begins at 0; no batch is as large as the difference."""
        mapping = anonymous(128, region_bytes([(1, 0, 1)] * 4, last=3, used=500))
        queue = InflightQueue(mapping, 0, 4)
        assert queue.recover(0) == []
        assert header(mapping) == (0, 1, 4, 0, 0)
        mapping = anonymous(128, region_bytes([(1, 0, 1)] * 4, used=500))
        assert InflightQueue(mapping, 0, 4).recover(505) == []
        assert header(mapping) == (0, 1, 4, 0, 505)

    def test_a_device_that_was_reset_has_nothing_in_flight(self) -> None:
        mapping = anonymous(128)
        queue = InflightQueue(mapping, 0, 4)
        queue.recover(3)
        queue.take(1)
        queue.forget()
        assert header(mapping)[1] == 0
        assert queue.recover(3) == []
        assert header(mapping) == (0, 1, 4, 0, 3)


class Ring:
    """What a back-end did: requests in the order taken, and which of them the driver was shown."""

    def __init__(self, base: int) -> None:
        self.base = base
        self.taken: list[int] = []
        self.order: list[int] = []  # of the used ring; positions in `taken`
        self.shown = 0
        self.tracked = 0

    @property
    def used_idx(self) -> int:
        return (self.base + self.shown) & 0xFFFF

    def in_flight(self) -> list[int]:
        done = set(self.order[: self.shown])
        return [head for at, head in enumerate(self.taken) if at not in done]


@settings(max_examples=300, deadline=None)
@given(st.data(), U16, st.integers(1, 6))
def test_the_successor_finds_what_was_not_published(
    data: st.DataObject, base: int, size: int
) -> None:
    """Back-ends that work, out of order and in batches, and are replaced at any step."""
    mapping = anonymous(part_size(size))
    ring = Ring(base)
    queue = InflightQueue(mapping, 0, size)
    assert queue.recover(base) == []
    for _ in range(data.draw(st.integers(0, 40))):
        # What the successor would find; it looks at a copy.
        copy = anonymous(part_size(size), bytes(memoryview(mapping)))
        assert InflightQueue(copy, 0, size).recover(ring.used_idx) == ring.in_flight()
        batched = ring.order[ring.shown :]
        untracked = ring.order[ring.tracked : ring.shown]
        free = [head for head in range(size) if head not in ring.in_flight()]
        busy = [at for at in range(len(ring.taken)) if at not in ring.order]
        steps = ["die"]
        if untracked:
            steps += ["track"] * 4
        else:
            steps += ["take"] * 2 * bool(free) + ["batch"] * 2 * bool(busy)
            steps += ["show"] * bool(batched)
        step = data.draw(st.sampled_from(steps))
        if step == "take":
            ring.taken.append(data.draw(st.sampled_from(free)))
            queue.take(ring.taken[-1])
        elif step == "batch":
            ring.order.append(data.draw(st.sampled_from(busy)))
            queue.batch(ring.taken[ring.order[-1]])
        elif step == "show":
            ring.shown = len(ring.order)
        elif step == "track":
            queue.publish([ring.taken[at] for at in untracked], ring.used_idx)
            ring.tracked = ring.shown
        else:
            del ring.order[ring.shown :]
            queue = InflightQueue(mapping, 0, size)
            assert queue.recover(ring.used_idx) == ring.in_flight()
            ring.tracked = ring.shown


# What a back-end does in `TestKilled`; it is stopped after each machine instruction. It is killed
# and replaced three times as well: amid a batch, behind a used index, and behind the flags.
PLAY = """
import ctypes, mmap, os, signal, sys
from guestio._core.virtio.inflight import InflightQueue
from guestio._core.memory.mapping import HostMapping

region, ring, size = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
mapping = HostMapping(region, 0, 4096)
used = memoryview(mmap.mmap(ring, 4096)).cast("H")
libc = ctypes.CDLL(None, use_errno=True)
if libc.ptrace(0, 0, None, None):  # PTRACE_TRACEME
    sys.exit(77)

def play():
    queue = InflightQueue(mapping, 0, size)
    queue.recover(65534)
    queue.take(0); queue.take(1); queue.take(2)
    queue.batch(2); queue.batch(0); used[0] = 0; queue.publish([2, 0], 0)
    queue.take(2); queue.batch(2); used[0] = 1; queue.publish([2], 1)
    queue.take(3); queue.take(0)
    queue.batch(0); queue.batch(1)
    queue = InflightQueue(mapping, 0, size)
    assert queue.recover(1) == [1, 3, 0]
    queue.batch(3); queue.batch(1); used[0] = 3
    queue = InflightQueue(mapping, 0, size)
    assert queue.recover(3) == [0]
    queue.take(1)
    queue.batch(1); queue.batch(0); used[0] = 5; queue.publish([1, 0], 5)
    queue = InflightQueue(mapping, 0, size)
    assert queue.recover(5) == []

os.kill(os.getpid(), signal.SIGSTOP)
play()
os.kill(os.getpid(), signal.SIGSTOP)
"""
PLAY_TAKEN = [0, 1, 2, 2, 3, 0, 1]
PLAY_USED = [2, 0, 3, 4, 1, 6, 5]  # positions in PLAY_TAKEN


class TestKilled:
    def test_between_any_two_instructions(self) -> None:
        """All that a SIGKILL can leave behind is seen, also when it hits a recovery."""
        states = self._states(size=4)
        assert len(states) > 40, "every store that changes something makes one"
        reached = 0
        for content, used_idx in states:
            shown = (used_idx - 65534) & 0xFFFF
            found = InflightQueue(anonymous(4096, content), 0, 4).recover(used_idx)
            taken = shown + len(found)
            done = PLAY_USED[:shown]
            assert found == [
                head for at, head in enumerate(PLAY_TAKEN[:taken]) if at not in done
            ], (content.hex(" ", 8), used_idx)
            assert reached <= taken <= reached + 1, "no request is forgotten or made up"
            reached = taken
        assert reached == len(PLAY_TAKEN)

    @staticmethod
    def _states(size: int) -> list[tuple[bytes, int]]:
        """The region and the used index after each instruction that changed them."""
        length = part_size(size)
        with Backing.memfd(4096) as region, Backing.memfd(4096) as ring:
            assert region.fd is not None
            assert ring.fd is not None
            os.pwrite(ring.fd, struct.pack("=H", 65534), 0)
            with (
                mmap.mmap(region.fd, 4096, prot=mmap.PROT_READ) as content,
                mmap.mmap(ring.fd, 4096, prot=mmap.PROT_READ) as index,
            ):
                traced = Traced(PLAY, region.fd, ring.fd, arguments=(str(size),))
                try:
                    if traced.wait() != signal.SIGSTOP:
                        pytest.skip("this process may not trace others")
                    seen = [(content[:length], index[:2])]
                    while (stopped := traced.step()) == signal.SIGTRAP:
                        if (now := (content[:length], index[:2])) != seen[-1]:
                            seen.append(now)
                    assert stopped == signal.SIGSTOP, "the back-end failed"
                finally:
                    traced.kill()
        return [(part, int.from_bytes(used, sys.byteorder)) for part, used in seen]


class TestHostile:
    """Whatever the front-end writes or takes away: an error or a list of heads, nothing worse."""

    @pytest.mark.parametrize(
        ("content", "used_idx", "reason"),
        [
            (region_bytes([(1, 0, 0)] * 4, version=2), 0, "version 2, only 1"),
            (region_bytes([(1, 0, 0)] * 4, version=65535), 0, "version 65535"),
            (region_bytes([(1, 0, 0)] * 4, features=1), 0, "feature flags 0x1,"),
            (region_bytes([(1, 0, 0)] * 4, features=1 << 63), 0, "flags 0x8000000000000000,"),
            (region_bytes([(1, 0, 0)] * 4, desc_num=0), 0, "has 0 entries, the front-end said 4"),
            (region_bytes([(1, 0, 0)] * 4, desc_num=5), 0, "5 entries"),
            (region_bytes([(1, 0, 0)] * 4, last=4), 1, "descriptor 4 of 4"),
            (region_bytes([(1, 65535, 0)] * 4, last=3), 2, "descriptor 65535 of 4"),
        ],
    )
    def test_a_part_that_cannot_be_followed(
        self, content: bytes, used_idx: int, reason: str
    ) -> None:
        with pytest.raises(QueueError, match=f"region that tracks requests in flight .*{reason}"):
            InflightQueue(anonymous(128, content), 0, 4).recover(used_idx)

    def test_a_batch_that_leads_back_into_itself_ends(self) -> None:
        content = region_bytes([(1, 1, 0), (1, 0, 1), (1, 2, 2), (1, 3, 3)], last=0)
        assert InflightQueue(anonymous(128, content), 0, 4).recover(4) == [2, 3]

    def test_any_counters(self) -> None:
        top = 2**64 - 1
        content = region_bytes([(1, 0, top), (255, 0, 0), (1, 0, top), (1, 0, 1 << 63)])
        mapping = anonymous(128, content)
        queue = InflightQueue(mapping, 0, 4)
        assert queue.recover(0) == [1, 3, 0, 2]
        queue.take(1)
        assert desc(mapping, 1) == (1, 0, 0)

    def test_heads_that_no_ring_has(self) -> None:
        mapping = anonymous(256)
        queue = InflightQueue(mapping, 64, 4)
        queue.recover(0)
        before = bytes(memoryview(mapping))
        for head in (4, 9, 65535):
            queue.take(head)
            queue.batch(head)
        queue.publish([4, 9, 65535], 0)
        assert bytes(memoryview(mapping)) == before

    def test_numbers_that_do_not_fit(self) -> None:
        queue = InflightQueue(anonymous(128), 0, 4)
        for call in (queue.take, queue.batch, queue.recover):
            for number in (-1, 65536, 1 << 70):
                with pytest.raises(OverflowError):
                    call(number)
        with pytest.raises(OverflowError):
            queue.publish([0, 65536], 0)

    @pytest.mark.parametrize("seed", range(4))
    def test_random_contents_that_change_all_the_time(self, seed: int) -> None:
        rng = random.Random(seed)
        size = rng.choice((1, 4, 61))
        mapping = anonymous(part_size(size) + 128)
        guards = bytes([0xA5]) * 64
        view = memoryview(mapping)
        view[:64] = view[-64:] = guards
        queue = InflightQueue(mapping, 64, size)
        recovered = refused = 0
        for _ in range(3000):
            if rng.random() < 0.5:
                self._spoil(rng, view[64:-64], size)
            match rng.randrange(4):
                case 0:
                    queue.take(rng.randrange(size))
                case 1:
                    queue.batch(rng.randrange(size))
                case 2:
                    heads = [rng.randrange(size) for _ in range(rng.randrange(size + 1))]
                    queue.publish(heads, rng.randrange(65536))
                case _:
                    try:
                        heads = queue.recover((header(mapping, 64)[4] + rng.randrange(4)) & 0xFFFF)
                    except QueueError:
                        refused += 1
                        queue.forget()
                    else:
                        recovered += 1
                        assert sorted(set(heads)) == sorted(heads)
                        assert all(0 <= head < size for head in heads)
            assert bytes(view[:64]) == bytes(view[-64:]) == guards
        assert recovered > 100
        assert refused > 30

    @staticmethod
    def _spoil(rng: random.Random, part: memoryview, size: int) -> None:
        """Mostly what is nearly right, which goes further than noise."""
        if rng.random() < 0.2:
            at = rng.randrange(len(part))
            part[at:] = rng.randbytes(len(part) - at)
        if rng.random() < 0.8:
            last = rng.choice((0, size - 1, size, rng.randrange(65536)))
            HEADER.pack_into(part, 0, 0, 1, size, last, rng.randrange(65536))

    @pytest.mark.parametrize("left", [0, 4096])
    def test_a_file_that_is_truncated(self, left: int) -> None:
        with Backing.memfd(3 * 4096) as backing:
            assert backing.fd is not None
            description = Inflight(3 * 4096, 0, 1, 700)
            with InflightRegion.from_fd(description, backing.fd) as region:
                queue = region.queue(0)
                assert queue.recover(0) == []
                queue.take(600)
                os.ftruncate(backing.fd, left)
                assert not queue.vanished, "not looked at"
                queue.take(1)
                queue.take(601)
                queue.batch(601)
                queue.publish([601], 1)
                assert queue.vanished
                with pytest.raises(QueueError, match="truncated the file"):
                    queue.recover(1)
                queue.forget()

    def test_a_recovery_that_finds_the_file_truncated(self) -> None:
        with Backing.memfd(3 * 4096) as backing:
            assert backing.fd is not None
            with InflightRegion.from_fd(Inflight(3 * 4096, 0, 1, 700), backing.fd) as region:
                os.ftruncate(backing.fd, 4096)
                with pytest.raises(QueueError, match="truncated the file"):
                    region.queue(0).recover(0)

    def test_one_part_gone_and_another_there(self) -> None:
        with Backing.memfd(2 * 4160) as backing:
            assert backing.fd is not None
            with InflightRegion.from_fd(Inflight(2 * 4160, 0, 2, 256), backing.fd) as region:
                os.ftruncate(backing.fd, 4160)
                first, second = region.queue(0), region.queue(1)
                with pytest.raises(QueueError, match="truncated"):
                    second.recover(0)
                assert first.recover(0) == []


def maps() -> int:
    """How often regions are mapped."""
    return Path("/proc/self/maps").read_text().count("memfd:guestio-inflight")


class TestRegion:
    @pytest.fixture(autouse=True)
    def nothing_left(self) -> Iterator[None]:
        with nothing_left():
            yield
            assert maps() == 0

    def test_a_region_of_our_own(self) -> None:
        with InflightRegion.create(3, 128) as region:
            assert region.description == Inflight(3 * 2112, 0, 3, 128)
            assert os.fstat(region.fd).st_size == 3 * 2112
            for size in (0, 4096, 1 << 20):
                with pytest.raises(PermissionError):
                    os.ftruncate(region.fd, size)
            assert os.pread(region.fd, 8192, 0) == bytes(3 * 2112)

    def test_every_ring_has_its_own_part(self) -> None:
        with InflightRegion.create(3, 4) as region:
            queues = [region.queue(index) for index in range(3)]
            for index, queue in enumerate(queues):
                assert queue.recover(index) == []
                queue.take(index)
            content = os.pread(region.fd, 3 * 128, 0)
            for index in range(3):
                part = content[128 * index : 128 * (index + 1)]
                flags = [(int(head == index), 0, 0) for head in range(4)]
                assert part[:80] == region_bytes(flags, used=index)
                assert not any(part[80:])
            del queue, queues

    def test_the_next_back_end_goes_on(self) -> None:
        with InflightRegion.create(2, 8) as first:
            queue = first.queue(1)
            queue.recover(5)
            queue.take(7)
            queue.take(2)
            with InflightRegion.from_fd(first.description, first.fd) as second:
                assert second.queue(0).recover(0) == []
                assert second.queue(1).recover(5) == [7, 2]
                assert second.description == first.description
                assert second.fd != first.fd
            del queue

    def test_a_region_somewhere_in_a_file(self) -> None:
        with Backing.memfd(8192) as backing:
            assert backing.fd is not None
            description = Inflight(192, 4096 + 64, 2, 1)
            with InflightRegion.from_fd(description, backing.fd) as region:
                region.queue(1).recover(0x55)
            content = os.pread(backing.fd, 8192, 0)
            at = 4096 + 64 + 64
            assert content[at : at + 16] == HEADER.pack(0, 1, 1, 0, 0x55)
            assert not any(content[:at])
            assert not any(content[at + 16 :])

    def test_a_queue_outlives_its_region(self) -> None:
        region = InflightRegion.create(1, 8)
        queue = region.queue(0)
        region.close()
        region.close()
        assert queue.recover(0) == []
        queue.take(3)
        assert queue.recover(0) == [3]
        assert maps() == 1
        del queue, region

    def test_what_is_closed(self) -> None:
        region = InflightRegion.create(1, 8)
        region.close()
        with pytest.raises(ValueError, match="closed"):
            region.queue(0)
        with pytest.raises(ValueError, match="closed"):
            _ = region.fd
        assert "closed" in repr(region)

    @pytest.mark.parametrize("index", [-1, 2, 65535])
    def test_a_ring_without_a_part(self, index: int) -> None:
        with (
            InflightRegion.create(2, 8) as region,
            pytest.raises(ProtocolError, match=f"ring {index} are not tracked.*for 2 rings"),
        ):
            region.queue(index)

    GOOD = Inflight(2 * 192, 0, 2, 8)

    @pytest.mark.parametrize(
        ("wrong", "reason"),
        [
            ({"mmap_size": 2 * 192 - 1}, "0x17f bytes cannot track .* takes 0x180 bytes"),
            ({"mmap_size": 0}, "0x0 bytes cannot track"),
            ({"num_queues": 0}, "0 queues, not 1..65535"),
            ({"num_queues": 65535}, "65535 queues of 8 entries: that takes"),
            ({"queue_size": 0}, r"queue size 0 is not in \[1, 32768\]"),
            ({"queue_size": 32769}, "queue size 32769"),
            ({"mmap_offset": 8}, "offset 0x8 is not aligned to 64"),
            ({"mmap_offset": 1 << 63}, "beyond the end of any file"),
            ({"mmap_offset": 2**64 - 64}, "beyond the end of any file"),
            ({"mmap_size": 2**64 - 1}, "beyond the end of any file"),
        ],
    )
    def test_a_description_that_contradicts_itself(
        self, wrong: dict[str, int], reason: str
    ) -> None:
        with Backing.memfd(8192) as backing:
            assert backing.fd is not None
            with pytest.raises(ProtocolError, match=reason):
                InflightRegion.from_fd(replace(self.GOOD, **wrong), backing.fd)

    @pytest.mark.parametrize(("queues", "entries"), [(0, 8), (65536, 8), (1, 0), (1, 32769)])
    def test_a_region_of_no_such_size(self, queues: int, entries: int) -> None:
        with pytest.raises(ProtocolError, match="region for requests in flight"):
            InflightRegion.create(queues, entries)

    def test_a_file_that_is_too_short(self) -> None:
        with Backing.memfd(2 * 192 + 63) as backing:
            assert backing.fd is not None
            with pytest.raises(BackingError, match="do not fit"):
                InflightRegion.from_fd(replace(self.GOOD, mmap_offset=64), backing.fd)

    def test_a_file_that_cannot_be_written_or_mapped(self) -> None:
        # No file in a temporary directory: in a container that is on no file system for memory.
        writable = os.memfd_create("region")
        os.ftruncate(writable, 4096)
        read_only = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY)
        pipe = os.pipe()
        try:
            for fd, why in (
                (read_only, "cannot map"),
                (pipe[0], "cannot be guest memory"),
                (pipe[1], "cannot be guest memory"),
            ):
                with pytest.raises(BackingError, match=why):
                    InflightRegion.from_fd(self.GOOD, fd)
        finally:
            for fd in (writable, read_only, *pipe):
                os.close(fd)

    def test_a_sealed_file(self) -> None:
        with InflightRegion.create(2, 8) as region:
            fcntl.fcntl(region.fd, fcntl.F_ADD_SEALS, 0x0010)  # F_SEAL_FUTURE_WRITE
            with pytest.raises(BackingError, match="cannot map"):
                InflightRegion.from_fd(self.GOOD, region.fd)
