"""The compiled load against a device played by hand."""

from __future__ import annotations

import os
import random
import signal
import struct
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest

from guestio.guest._load.load import LoadDriver
from tests.kit.load_device import (
    BLOCK,
    DONE,
    PAGE,
    SECTOR,
    SIGNAL,
    TIME_OVER,
    TROUBLE,
    Rig,
)

NO_TIME = 0


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as made:
        made.driver.begin(read_percent=100, random=True)
        yield made


class TestRequests:
    @pytest.mark.parametrize("indirect", [True, False])
    @pytest.mark.parametrize("read_percent", [100, 0])
    def test_are_laid_out_as_linux_does(self, indirect: bool, read_percent: int) -> None:
        with Rig(indirect=indirect, depth=4) as rig:
            rig.driver.begin(read_percent=read_percent, random=False, first=7)
            assert rig.driver.run(NO_TIME) == TIME_OVER
            for n in range(4):
                chain = rig.take()
                assert chain is not None
                assert chain.indirect == indirect
                data = chain.writable if read_percent else chain.readable[1:]
                assert [length for _, length in chain.readable][:1] == [16]
                assert [length for _, length in chain.writable][-1:] == [1]
                assert sum(length for _, length in data[: None if not read_percent else -1]) == (
                    BLOCK
                )
                header = rig.gather(*chain.readable[0], 1)
                kind, zero, sector = struct.unpack("<IIQ", header)
                assert (kind, zero) == (0 if read_percent else 1, 0)
                assert sector == (7 + n) * BLOCK // SECTOR
                assert rig.gather(*chain.writable[-1], 1) == b"\xff"
            assert rig.take() is None

    def test_scattered_data_is_one_descriptor_for_each_run(self) -> None:
        with Rig(depth=1, block=3 * PAGE) as rig:
            rig.driver.begin(read_percent=100, random=True)
            rig.driver.run(NO_TIME)
            chain = rig.take()
            assert chain is not None
            data = chain.writable[:-1]
            assert sum(length for _, length in data) == 3 * PAGE
            assert all(a + length != b for (a, length), (b, _) in pairwise(data))

    def test_sequential_ones_wrap_around(self) -> None:
        seen: list[int] = []
        with Rig(depth=4, blocks=6) as rig:
            rig.spoil = lambda kind, sector, data: (seen.append(sector), data)[1]
            rig.driver.begin(read_percent=100, random=False, limit=13, first=4)
            assert rig.play() == DONE
        assert seen == [(4 + n) % 6 * BLOCK // SECTOR for n in range(13)]

    def test_mixes_read_and_write(self) -> None:
        with Rig() as rig:
            rig.driver.begin(read_percent=50, random=True, limit=2000)
            assert rig.play() == DONE
            assert rig.driver.reads + rig.driver.writes == 2000
            assert 850 < rig.driver.reads < 1150

    def test_random_ones_reach_all_blocks(self) -> None:
        seen: set[int] = set()
        with Rig(blocks=64) as rig:

            def note(kind: int, sector: int, data: bytes) -> bytes:
                seen.add(sector)
                return data

            rig.spoil = note
            rig.driver.begin(read_percent=100, random=True, limit=2000)
            assert rig.play() == DONE
        assert seen == {n * BLOCK // SECTOR for n in range(64)}

    def test_the_seed_repeats_them(self) -> None:
        def sectors(seed: int) -> list[int]:
            seen: list[int] = []
            with Rig(seed=seed) as rig:
                rig.spoil = lambda kind, sector, data: (seen.append(sector), data)[1]
                rig.driver.begin(read_percent=100, random=True, limit=50)
                rig.play()
            return seen

        assert sectors(1) == sectors(1) != sectors(2)


class TestRing:
    @pytest.mark.parametrize("size", [4, 64, 512])
    @pytest.mark.parametrize("event_idx", [True, False])
    def test_goes_around_for_a_long_time(self, size: int, event_idx: bool) -> None:
        count = 70_000 if size == 512 else 3_000
        with Rig(size=size, depth=min(size, 64), event_idx=event_idx) as rig:
            rig.driver.begin(read_percent=100, random=True, limit=count)
            assert rig.play(100_000) == DONE
            assert rig.driver.reads == count
            assert rig.driver.in_flight == 0

    def test_takes_completions_in_any_order(self) -> None:
        rng = random.Random(3)
        with Rig(depth=16, indirect=False) as rig:
            rig.driver.begin(read_percent=100, random=True, limit=500)
            while rig.driver.run(NO_TIME) != DONE:
                chains = []
                while (chain := rig.take()) is not None:
                    chains.append(chain)
                rng.shuffle(chains)
                for chain in chains:
                    rig.put(chain.writable[-1][0], b"\0")
                    rig.complete(chain.head, BLOCK + 1)
            assert rig.driver.reads == 500

    def test_depth_is_kept(self, rig: Rig) -> None:
        rig.driver.run(NO_TIME)
        assert rig.available() == rig.driver.in_flight == 8
        rig.serve(3)
        rig.driver.run(NO_TIME)
        assert rig.available() == 11
        assert rig.driver.in_flight == 8

    def test_a_chain_is_not_longer_than_free_descriptors(self) -> None:
        with Rig(size=4, depth=4, indirect=False) as rig:
            rig.driver.begin(read_percent=100, random=True, limit=20)
            rig.driver.run(NO_TIME)
            assert rig.available() == 1  # three descriptors of four
            assert rig.play() == DONE

    def test_the_device_is_notified_if_it_wants(self) -> None:
        with Rig(depth=4) as rig:
            rig.driver.begin(read_percent=100, random=True)
            rig.driver.run(NO_TIME)
            assert rig.kicks() == 1
            rig.serve()
            rig.set_avail_event(100)
            rig.driver.run(NO_TIME)
            assert rig.kicks() == 0
            rig.serve()
            rig.set_avail_event(rig.available() + 2)
            rig.driver.run(NO_TIME)
            assert rig.kicks() == 1
            assert rig.driver.kicks == 2

    def test_the_device_is_notified_by_flag(self) -> None:
        with Rig(depth=4, event_idx=False) as rig:
            rig.set_used_flags(1)
            rig.driver.begin(read_percent=100, random=True)
            rig.driver.run(NO_TIME)
            assert rig.kicks() == 0
            rig.set_used_flags(0)
            rig.serve()
            rig.driver.run(NO_TIME)
            assert rig.kicks() == 1

    def test_interrupts_are_wanted_before_it_sleeps(self, rig: Rig) -> None:
        rig.driver.run(NO_TIME)
        assert rig.used_event() == 0
        rig.serve(5)
        rig.driver.run(NO_TIME)
        assert rig.used_event() == 5

    def test_interrupts_are_not_wanted_while_it_polls(self) -> None:
        with Rig(polling=True) as rig:
            rig.driver.begin(read_percent=100, random=True)
            rig.driver.run(1000)
            rig.serve(5)
            rig.driver.run(1000)
            assert rig.used_event() == 0xFFFF
        with Rig(polling=True, event_idx=False) as rig:
            assert rig.avail_flags() == 1

    def test_an_interrupt_wakes_it(self, rig: Rig) -> None:
        rig.driver.begin(read_percent=100, random=True, limit=8)
        rig.driver.run(NO_TIME)
        rig.serve()
        os.eventfd_write(rig.call, 1)
        assert rig.driver.run(10**10) == DONE


class TestMeasuring:
    def test_counts_and_times(self, rig: Rig) -> None:
        driver = rig.driver
        driver.begin(read_percent=100, random=True, limit=100)
        assert rig.play() == DONE
        counts = driver.histogram()
        assert sum(count for _, count in counts) == driver.reads == 100
        assert [value for value, _ in counts] == sorted(value for value, _ in counts)
        assert 0 < counts[0][0] <= counts[-1][0] <= driver.latency_max * 1.02
        mean = sum(value * count for value, count in counts) / 100
        assert mean == pytest.approx(driver.latency_sum / 100, rel=0.02)
        driver.reset_counts()
        assert driver.reads == driver.latency_sum == driver.latency_max == driver.kicks == 0
        assert driver.histogram() == []

    def test_latency_is_the_time_in_the_queue(self, rig: Rig) -> None:
        rig.driver.begin(read_percent=100, random=True, limit=1)
        rig.driver.run(NO_TIME)
        time.sleep(0.05)
        rig.serve()
        assert rig.driver.run(NO_TIME) == DONE
        ((value, count),) = rig.driver.histogram()
        assert count == 1
        assert 50e6 <= rig.driver.latency_max < 5e9
        assert value == pytest.approx(rig.driver.latency_max, rel=1 / 64)

    def test_a_signal_ends_a_wait(self, rig: Rig) -> None:
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        try:
            # More than once, for it may come when there is no wait.
            signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
            assert rig.driver.run(20 * 10**9) == SIGNAL
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert rig.driver.trouble is None


class TestTrouble:
    def trouble(self, rig: Rig) -> tuple[str, tuple[int, ...]]:
        assert rig.driver.run(NO_TIME) == TROUBLE
        assert rig.driver.run(NO_TIME) == TROUBLE  # and it stays so
        assert rig.driver.trouble is not None
        name, queue, values = rig.driver.trouble
        assert queue == 0
        return name, values

    @pytest.mark.parametrize("index", [9, 0x8000, 0xFFFF])
    def test_a_used_index_too_far(self, rig: Rig, index: int) -> None:
        rig.driver.run(NO_TIME)
        rig.set_used(index)
        assert self.trouble(rig) == ("used-index", (index, 0, 8, 0))

    def test_a_used_index_that_goes_back(self, rig: Rig) -> None:
        rig.driver.run(NO_TIME)
        rig.serve(5)
        rig.driver.run(NO_TIME)
        rig.set_used(0)
        assert self.trouble(rig) == ("used-index", (0, 5, 8, 0))

    @pytest.mark.parametrize("head", [64, 0xFFFFFFFF, 60])
    def test_a_chain_that_the_device_does_not_have(self, rig: Rig, head: int) -> None:
        rig.driver.run(NO_TIME)
        rig.complete(head, 1)
        assert self.trouble(rig) == ("used-id", (head, 0, 0, 0))

    def test_a_chain_finished_twice(self, rig: Rig) -> None:
        rig.driver.run(NO_TIME)
        rig.serve(1)
        rig.complete(rig.chains[0].head, 1)
        assert self.trouble(rig) == ("used-id", (rig.chains[0].head, 1, 0, 0))

    def test_a_middle_of_a_chain(self) -> None:
        with Rig(indirect=False) as rig:
            rig.driver.begin(read_percent=100, random=True)
            rig.driver.run(NO_TIME)
            rig.complete(1, 1)
            assert self.trouble(rig)[0] == "used-id"

    def test_more_bytes_than_there_is_room(self, rig: Rig) -> None:
        rig.driver.run(NO_TIME)
        chain = rig.take()
        assert chain is not None
        rig.put(chain.writable[-1][0], b"\0")
        rig.complete(chain.head, BLOCK + 2)
        name, values = self.trouble(rig)
        assert (name, values[1:3]) == ("used-length", (BLOCK + 2, BLOCK + 1))

    @pytest.mark.parametrize("status", [1, 2, 0xFF])
    def test_a_failed_request(self, rig: Rig, status: int) -> None:
        rig.driver.begin(read_percent=0, random=False, first=3)
        rig.driver.run(NO_TIME)
        chain = rig.take()
        assert chain is not None
        rig.put(chain.writable[-1][0], bytes([status]))
        rig.complete(chain.head, 1)
        assert self.trouble(rig) == ("status", (3 * BLOCK // SECTOR, 1, status, 0))

    def test_no_progress(self) -> None:
        with Rig(timeout=50_000_000) as rig:
            rig.driver.begin(read_percent=100, random=True)
            assert rig.driver.run(10**10) == TROUBLE
            assert rig.driver.trouble is not None
            assert rig.driver.trouble[0] == "stalled"
            assert rig.driver.trouble[2][0] == 8

    def test_no_progress_in_many_short_runs(self) -> None:
        with Rig(timeout=500_000_000) as rig:
            rig.driver.begin(read_percent=100, random=True)
            outcomes = {rig.driver.run(50_000_000) for _ in range(12)}
            assert outcomes == {TIME_OVER, TROUBLE}

    def test_time_outside_does_not_count(self) -> None:
        with Rig(timeout=500_000_000) as rig:
            rig.driver.begin(read_percent=100, random=True)
            for _ in range(3):
                assert rig.driver.run(5_000_000) == TIME_OVER
                time.sleep(0.6)

    def test_the_back_end_goes(self, rig: Rig) -> None:
        rig.front_peer.close()
        assert rig.driver.run(10**10) == TROUBLE
        assert self.trouble(rig)[0] == "gone"

    def test_a_message_that_was_not_requested(self, rig: Rig) -> None:
        rig.front_peer.send(b"hello")
        assert rig.driver.run(10**10) == TROUBLE
        assert self.trouble(rig)[0] == "unasked"

    def test_the_device_reports_its_ring_broken(self, rig: Rig) -> None:
        os.eventfd_write(rig.err, 1)
        assert rig.driver.run(10**10) == TROUBLE
        assert self.trouble(rig)[0] == "ring-error"


class TestVerify:
    @pytest.mark.parametrize("strict", [False, True])
    @pytest.mark.parametrize("indirect", [True, False])
    @pytest.mark.parametrize("block", [512, BLOCK, 3 * BLOCK])
    def test_a_faithful_disk_passes(self, strict: bool, indirect: bool, block: int) -> None:
        with Rig(verify=True, strict=strict, indirect=indirect, block=block, blocks=128) as rig:
            rig.driver.begin(read_percent=50, random=True, limit=600)
            assert rig.play() == DONE, rig.driver.trouble
            rig.driver.begin(read_percent=100, random=False, limit=128)
            assert rig.play() == DONE, rig.driver.trouble
            assert rig.driver.reads + rig.driver.writes == 728
            self.look(rig, block)
            if rig.iotlb is not None:
                assert rig.iotlb.invalidations > 2 * 728
                assert rig.iotlb.quiet

    def look(self, rig: Rig, block: int) -> None:
        """Whether layouts were as various as they should be."""
        seen: Counter[str] = Counter()
        for chain in rig.chains:
            lengths = [length for _, length in chain.readable]
            room = sum(length for _, length in chain.writable)
            assert sum(lengths) == (16 if room > 1 else 16 + block)
            seen["split header"] += lengths[0] < 16
            seen["header with data"] += lengths[0] > 16
            seen["status with data"] += chain.writable[-1][1] > 1
            seen["status alone"] += chain.writable[-1][1] == 1 and room > 1
            seen["indirect" if chain.indirect else "direct"] += 1
            seen["unaligned"] += any(addr % 8 for addr, _ in chain.pieces)
            seen["crosses a page"] += any(
                addr // PAGE != (addr + length - 1) // PAGE for addr, length in chain.pieces
            )
            seen["many pieces"] += len(chain.pieces) > 6
        expected = {
            "split header", "header with data", "status with data", "status alone", "direct",
            "unaligned", "many pieces",
        }  # fmt: skip
        expected |= {"crosses a page"} if rig.iotlb is not None else set()
        expected |= {"indirect"} if any(chain.indirect for chain in rig.chains) else set()
        assert {name for name, count in seen.items() if count > 5} >= expected, seen

    def found(self, rig: Rig) -> tuple[str, tuple[int, ...]]:
        rig.driver.begin(read_percent=0, random=False, limit=256)
        assert rig.play() == DONE
        self.broken = True
        rig.driver.begin(read_percent=50, random=True, limit=20_000)
        assert rig.play() == TROUBLE
        assert rig.driver.trouble is not None
        name, _, values = rig.driver.trouble
        return name, values

    def test_a_flipped_bit_is_found(self) -> None:
        self.broken = False

        def flip(kind: int, sector: int, data: bytes) -> bytes:
            if not self.broken or kind:
                return data
            return data[:1000] + bytes([data[1000] ^ 4]) + data[1001:]

        with Rig(verify=True) as rig:
            rig.spoil = flip
            name, values = self.found(rig)
            assert name == "contents"
            assert values[0] % 8 == 1  # byte 1000 is in the second sector
            assert values[2] == 2**64 - 1

    def test_a_lost_write_is_found(self) -> None:
        self.broken = False
        with Rig(verify=True) as rig:
            rig.spoil = lambda kind, sector, data: None if kind and self.broken else data
            name, (sector, version, found_sector, found_version) = self.found(rig)
            assert name == "contents"
            assert found_sector == sector
            assert 1 <= found_version < version

    def test_another_sector_is_found(self) -> None:
        self.broken = False
        with Rig(verify=True) as rig:

            def elsewhere(kind: int, sector: int, data: bytes) -> bytes:
                at = (sector ^ 8) * SECTOR
                return bytes(rig.disk[at : at + len(data)]) if self.broken and not kind else data

            rig.spoil = elsewhere
            name, (sector, _, found_sector, _) = self.found(rig)
            assert name == "contents"
            assert found_sector == sector ^ 8

    def test_a_read_that_never_wrote_is_found(self) -> None:
        self.broken = False
        with Rig(verify=True) as rig:
            rig.spoil = lambda kind, sector, data: data if kind or not self.broken else b""
            assert self.found(rig)[0] in {"short", "status"}

    def test_a_byte_too_many_is_found(self) -> None:
        with Rig(verify=True) as rig:
            rig.extra = b"!"
            rig.driver.begin(read_percent=0, random=False, limit=256)
            assert rig.play() == TROUBLE
            assert rig.driver.trouble is not None
            assert rig.driver.trouble[0] == "overrun"

    def test_a_stale_translation_is_found(self) -> None:
        """A device that does not forget what was unmapped reaches the memory of other requests."""
        with Rig(verify=True, strict=True, stale=True, depth=4) as rig:
            rig.driver.begin(read_percent=50, random=True, limit=20_000)
            try:
                outcome = rig.play()
            except (AssertionError, struct.error):
                return  # what it read was no request at all
            assert outcome == TROUBLE
            assert rig.driver.trouble is not None
            assert rig.driver.trouble[0] in {"contents", "status", "overrun", "short"}


class TestBorder:
    def make(self, **changes: object) -> LoadDriver:
        made = os.pipe()
        try:
            arguments: dict[str, object] = {"block": 512, "blocks": 1, "front": made[0], **changes}
            return LoadDriver(**arguments)  # type: ignore[arg-type]
        finally:
            for fd in made:
                os.close(fd)

    @pytest.mark.parametrize(
        "changes",
        [
            {"block": 0},
            {"block": 513},
            {"block": -512},
            {"block": 1 << 31},
            {"blocks": 0},
            {"blocks": 1 << 64},
            {"strict": True},
            {"timeout": -1},
            {"seed": -1},
        ],
    )
    def test_constructor(self, changes: dict[str, object]) -> None:
        with pytest.raises(ValueError):
            self.make(**changes)

    def test_constructor_takes_no_closed_fd(self) -> None:
        with pytest.raises(OSError):
            self.make(front=-1)

    @pytest.mark.parametrize("size", [0, 3, 65536])
    def test_queue_size(self, rig: Rig, size: int) -> None:
        with pytest.raises(ValueError):
            rig.driver.add_queue(size, 1, [0], [0], [0], rig.kick, rig.call, rig.err)

    def test_queue_without_pages(self, rig: Rig) -> None:
        with pytest.raises(ValueError, match="desc has 0 pages"):
            rig.driver.add_queue(64, 1, [], [], [], rig.kick, rig.call, rig.err)

    @pytest.mark.parametrize("depth", [0, 65])
    def test_depth(self, rig: Rig, depth: int) -> None:
        with pytest.raises(ValueError, match="depth"):
            rig.driver.add_queue(64, depth, [0], [0], [0], rig.kick, rig.call, rig.err)

    def test_extents(self, rig: Rig) -> None:
        page = rig.memory.take(1)
        with pytest.raises(ValueError, match="queue 1 of 1"):
            rig.driver.add_slot(1, page, page, page)
        with pytest.raises(ValueError, match="one page"):
            rig.driver.add_slot(0, (*rig.memory.take(2)[:2], PAGE - 8), page, page)
        with pytest.raises(ValueError, match="room"):
            rig.driver.add_slot(0, page, (page[0], page[1], 8), page)
        with pytest.raises(ValueError, match="extent"):
            rig.driver.add_slot(0, ([], [], 0), page, page)
        with pytest.raises(ValueError, match="window"):
            rig.driver.add_stride(0, 0)

    @pytest.mark.parametrize("percent", [-1, 101])
    def test_begin(self, rig: Rig, percent: int) -> None:
        with pytest.raises(ValueError):
            rig.driver.begin(read_percent=percent, random=True)
        with pytest.raises(ValueError):
            rig.driver.begin(read_percent=0, random=False, first=256)
