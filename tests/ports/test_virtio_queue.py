"""What the tests of rust-vmm's virtio-queue assert, asserted of queues here.

Repository: https://github.com/rust-vmm/vm-virtio, crates ``virtio-queue`` and ``virtio-device``.
Each test names those that it comes from; `README.md` here has them all. Where guestio differs, the
test asserts what it does instead, and ``docs/coming-from-virtio-queue.md`` says why.
"""

from __future__ import annotations

import contextlib
import random
import struct
import threading
from collections.abc import Iterator

import pytest

from guestio.errors import DeviceError, InvalidAddressError, PermissionDeniedError, QueueError
from guestio.virtio import Chain, Device, DeviceHost
from guestio.virtio.layout import RingLayout
from tests.kit.hand_guest import (
    EVENT_IDX,
    VERSION_1,
    Answering,
    HandGuest,
    Holder,
    Remote,
    remote,
)
from tests.kit.rings import INDIRECT, NEXT, WRITE, Desc, linked, table
from tests.kit.serving import until

NO_NOTIFY = 1
PAGE = 0x1000
WRAP = 1 << 16


def pages(*flags: int) -> list[Desc]:
    """Descriptors of a page each, one behind the other; link ``i`` leads to ``i + 1``."""
    return [Desc(PAGE * (i + 1), PAGE, each, i + 1) for i, each in enumerate(flags)]


def put_all(guest: HandGuest, descriptors: list[Desc]) -> None:
    for i, each in enumerate(descriptors):
        guest.put(i, each)


def refused(guest: HandGuest, match: str) -> None:
    """Nothing can be taken: the ring is broken."""
    assert guest.queue.take() is None
    with pytest.raises(QueueError, match=match):
        guest.serve()


class TestChain:
    """``virtio-queue/src/chain.rs``."""

    def test_a_head_beyond_the_queue_gives_nothing(self) -> None:
        """From ``chain.rs::test_checked_new_descriptor_chain``."""
        guest = HandGuest()
        guest.offer(16)
        refused(guest, "names descriptor 16 of 16")

    def test_a_table_far_away_gives_nothing(self) -> None:
        """From ``chain.rs::test_checked_new_descriptor_chain``."""
        guest = HandGuest(desc=0x00FF_FFFF_FFF0)
        guest.offer(0)
        refused(guest, "no usable memory behind the ring at 0xfffffffff0")

    def test_a_link_out_of_the_table(self) -> None:
        """From ``chain.rs::test_checked_new_descriptor_chain``: there the first is still given."""
        guest = HandGuest()
        guest.put(0, Desc(0x1000, 0x1000, NEXT, 16))
        guest.offer(0)
        refused(guest, "descriptor index 16 is outside its table of 16")

    def test_two_linked_descriptors(self) -> None:
        """From ``chain.rs::test_checked_new_descriptor_chain``."""
        guest = HandGuest()
        put_all(guest, pages(NEXT, 0))
        guest.offer(0)
        chain = guest.take()
        assert chain.head == 0
        assert chain.readable.fragments() == [(0x1000, 0x1000), (0x2000, 0x1000)]
        guest.run(chain)

    def test_a_chain_of_all_descriptors(self) -> None:
        """From ``chain.rs::test_ttl_wrap_around``."""
        guest = HandGuest()
        put_all(guest, pages(*[NEXT] * 15, 0))
        guest.offer(0)
        chain = guest.take()
        assert [addr for addr, _ in chain.readable.fragments()] == [
            PAGE * (i + 1) for i in range(16)
        ]
        guest.run(chain)

    def test_an_indirect_table_ends_the_chain(self) -> None:
        """From ``chain.rs::test_new_from_indirect_descriptor``."""
        guest = HandGuest(indirect=True)
        guest.put(0, Desc(0x6000, 0x1000, NEXT, 1))
        guest.put(1, Desc(0x7000, 4 * 16, INDIRECT, 2))
        guest.put(2, Desc(0x8000, 0x1000))
        guest.memory.write(0x7000, table(*linked(*[Desc(PAGE * i, 0x1000) for i in range(1, 5)])))
        guest.offer(0)
        chain = guest.take()
        assert chain.head == 0
        assert [addr for addr, _ in chain.readable.fragments()] == [
            *(0x6000, 0x1000, 0x2000, 0x3000, 0x4000)
        ]
        guest.run(chain)

    def test_an_indirect_descriptor_with_a_link_is_refused(self) -> None:
        """From ``chain.rs::test_new_from_indirect_descriptor``: there the link is ignored."""
        guest = HandGuest(indirect=True)
        guest.put(0, Desc(0x7000, 4 * 16, INDIRECT | NEXT, 2))
        guest.put(2, Desc(0x8000, 0x1000))
        guest.memory.write(0x7000, table(*linked(*[Desc(PAGE * i, 0x1000) for i in range(1, 5)])))
        guest.offer(0)
        refused(guest, "an indirect descriptor that continues")

    def test_an_indirect_table_need_not_be_aligned(self) -> None:
        """From ``chain.rs::test_indirect_descriptor_address_noaligned``."""
        guest = HandGuest(indirect=True)
        rows = linked(*[Desc(PAGE * i, 0x1000) for i in range(1, 5)])
        guest.offer(guest.put_table(0, 0x7001, rows))
        chain = guest.take()
        assert chain.readable.total == 4 * 0x1000
        guest.run(chain)

    @pytest.mark.parametrize("length", [0x1001, WRAP * 16])
    def test_lengths_that_no_indirect_table_has(self, length: int) -> None:
        """From ``chain.rs::test_indirect_descriptor_err``."""
        guest = HandGuest(room=0x200000, indirect=True)
        guest.memory.write(0x1000, table(Desc(0x3000, 0x1000)))
        guest.put(0, Desc(0x1000, length, INDIRECT))
        guest.offer(0)
        refused(guest, f"an indirect table of {length} bytes")

    def test_one_descriptor_of_a_long_indirect_table(self) -> None:
        """From ``chain.rs::test_indirect_descriptor_err``."""
        guest = HandGuest(indirect=True)
        guest.memory.write(0x1000, table(Desc(0x3000, 0x1000)))
        guest.put(0, Desc(0x1000, 0x1000, INDIRECT))
        guest.offer(0)
        chain = guest.take()
        assert chain.readable.fragments() == [(0x3000, 0x1000)]
        guest.run(chain)

    def test_an_indirect_table_in_an_indirect_table(self) -> None:
        """From ``chain.rs::test_indirect_descriptor_err``."""
        guest = HandGuest(indirect=True)
        guest.memory.write(0x1000, table(Desc(0x3000, 0x1000, INDIRECT)))
        guest.put(0, Desc(0x1000, 0x1000, INDIRECT))
        guest.offer(0)
        refused(guest, "an indirect descriptor inside an indirect table")


SHARED = [(16, 0), (16, 0), (96, 0), (64, WRITE), (1, WRITE), (3, WRITE)]


@contextlib.contextmanager
def chain_of(pieces: list[tuple[int, int]], apart: int = 0) -> Iterator[tuple[HandGuest, Chain]]:
    """A chain of lengths and flags in memory from 0x1000 on, so many bytes apart."""
    guest = HandGuest()
    at, row = 0x1000, []
    for length, flags in pieces:
        row.append(Desc(at, length, flags))
        at += length + apart
    guest.offer(guest.put_chain(0, *row))
    chain = guest.take()
    yield guest, chain
    guest.run(chain)


class TestDescriptorUtils:
    """``virtio-queue/src/descriptor_utils.rs``: a reader and a writer are two I/O vectors here."""

    def test_a_buffer_outside_of_memory_fails_that_request(self) -> None:
        """From ``descriptor_utils.rs::reader_test_inv_desc_addr``."""
        guest = HandGuest(room=0x1000)
        guest.put(0, Desc(0x1001, 1, 0, 1))
        guest.put(1, Desc(0x800, 1))
        guest.offer(0, 1)
        chain = guest.take()
        assert chain.head == 1
        guest.run(chain)
        assert [guest.used_entry(i) for i in range(2)] == [(0, 0), (1, 0)]

    def test_reading_a_chain(self) -> None:
        """From ``descriptor_utils.rs::reader_test_simple_chain``."""
        with chain_of([(8, 0), (16, 0), (18, 0), (64, 0)]) as (guest, chain):
            guest.memory.write(0x1000, bytes(range(106)))
            assert chain.readable.total == 106
            assert chain.readable.read(0, 64) == bytes(range(64))
            assert chain.readable.read(64) == bytes(range(64, 106))

    def test_writing_a_chain(self) -> None:
        """From ``descriptor_utils.rs::writer_test_simple_chain``."""
        with chain_of([(8, WRITE), (16, WRITE), (18, WRITE), (64, WRITE)]) as (guest, chain):
            assert chain.writable.total == 106
            chain.writable.write(bytes(range(64)))
            chain.writable.write(bytes(range(64, 106)), 64)
            assert guest.memory.read(0x1000, 107) == bytes(range(106)) + b"\0"

    def test_nothing_to_read_in_what_is_to_be_written(self) -> None:
        """From ``descriptor_utils.rs::reader_test_incompatible_chain``."""
        with chain_of([(8, WRITE)]) as (_, chain):
            assert chain.readable.total == 0
            with pytest.raises(InvalidAddressError):
                chain.readable.read(0, 1)
            assert chain.readable.read() == b""

    def test_no_room_in_what_is_to_be_read(self) -> None:
        """From ``descriptor_utils.rs::writer_test_incompatible_chain``."""
        with chain_of([(8, 0)]) as (guest, chain):
            assert chain.writable.total == 0
            with pytest.raises(InvalidAddressError):
                chain.writable.write(b"\xff")
            with pytest.raises(PermissionDeniedError):
                chain.readable.write(b"\xff")
            assert guest.memory.read(0x1000, 8) == bytes(8)

    def test_a_request_with_both(self) -> None:
        """From ``descriptor_utils.rs::reader_writer_shared_chain``."""
        with chain_of(SHARED) as (guest, chain):
            guest.memory.write(0x1000, bytes(range(128)))
            data = chain.readable.read()
            assert len(data) == 128
            assert chain.writable.total == 68
            chain.writable.write(data[:68])
            assert guest.memory.read(0x1000 + 128, 69) == bytes(range(68)) + b"\0"

    def test_a_number_in_four_pieces(self) -> None:
        """From ``descriptor_utils.rs::reader_writer_shattered_object``."""
        secret = struct.pack("<I", 0x1234_5678)
        with chain_of([(1, WRITE)] * 4, apart=123) as (guest, chain):
            chain.writable.write(secret)
        with chain_of([(1, 0)] * 4, apart=123) as (other, chain):
            other.memory.write(0x1000, guest.memory.read(0x1000, 0x1000))
            assert chain.readable.read(0, 4) == secret

    def test_reading_past_the_end(self) -> None:
        """From ``descriptor_utils.rs::reader_unexpected_eof``."""
        with chain_of([(256, 0), (256, 0)]) as (_, chain):
            buffer = bytearray(b"\xee" * 1024)
            with pytest.raises(InvalidAddressError):
                chain.readable.readinto(buffer)
            assert buffer == b"\xee" * 1024

    @pytest.mark.parametrize("at", [32, 24, 128, 0], ids=["border", "middle", "end", "beginning"])
    def test_reading_up_to_a_place_and_from_there(self, at: int) -> None:
        """From ``descriptor_utils.rs::split_border``.

        And ``descriptor_utils.rs::split_middle``, ``descriptor_utils.rs::split_end``,
        ``descriptor_utils.rs::split_beginning``.
        """
        with chain_of(SHARED) as (guest, chain):
            guest.memory.write(0x1000, bytes(range(128)))
            assert chain.readable.read(0, at) == bytes(range(at))
            assert chain.readable.read(at) == bytes(range(at, 128))

    def test_writing_up_to_a_place_and_from_there(self) -> None:
        """From ``descriptor_utils.rs::split_border``."""
        with chain_of(SHARED) as (guest, chain):
            chain.writable.fill(1, 0, 64)
            chain.writable.fill(2, 64)
            assert guest.memory.read(0x1080, 69) == b"\1" * 64 + b"\2" * 4 + b"\0"

    def test_a_place_beyond_the_end(self) -> None:
        """From ``descriptor_utils.rs::split_outofbounds``."""
        with chain_of(SHARED) as (_, chain):
            for start, count in ((256, None), (0, 256), (128, 1), (2**63, 2**63)):
                with pytest.raises(InvalidAddressError):
                    chain.readable.read(start, count)
            assert chain.readable.read(128) == b""

    def test_a_read_of_too_much_raises_where_theirs_is_short(self) -> None:
        """From ``descriptor_utils.rs::read_full``: 48 of 64 bytes there."""
        with chain_of([(16, 0)] * 3) as (guest, chain):
            guest.memory.write(0x1000, bytes(range(48)))
            with pytest.raises(InvalidAddressError):
                chain.readable.read(0, 64)
            assert chain.readable.read(0, min(64, chain.readable.total)) == bytes(range(48))

    def test_a_write_of_too_much_raises_where_theirs_is_short(self) -> None:
        """From ``descriptor_utils.rs::write_full``: 48 of 64 bytes there."""
        with chain_of([(16, WRITE)] * 3) as (guest, chain):
            with pytest.raises(InvalidAddressError):
                chain.writable.write(b"\xde" * 64)
            assert guest.memory.read(0x1000, 64) == bytes(64), "nothing was written"
            chain.writable.write(b"\xde" * 48)
            assert guest.memory.read(0x1000, 64) == b"\xde" * 48 + bytes(16)


class TestPlaces:
    """Sizes and addresses of a queue."""

    @pytest.mark.parametrize("size", [0, 11, 15, 65535, 65536, -1])
    def test_sizes_that_no_queue_has(self, size: int) -> None:
        """From ``queue.rs::test_queue_is_valid``.

        And ``queue.rs::test_setters_error_cases``,
        ``queue.rs::test_regression_iterator_division``, ``state.rs::test_invalid_queue_state``.
        """
        with pytest.raises(ValueError, match="power of two"):
            RingLayout(size, 0, 0x1000, 0x2000)

    @pytest.mark.parametrize("size", [1, 2, 4, 16, 0x100, 32768])
    def test_sizes_that_queues_have(self, size: int) -> None:
        """From ``queue.rs::test_queue_is_valid``, ``queue_sync.rs::test_state_sync_add_used``."""
        assert RingLayout(size, 0, 0x100000, 0x200000).size == size

    @pytest.mark.parametrize(
        "areas", [{"desc": 0xF}, {"desc": 8}, {"avail": 1}, {"used": 3}, {"used": 2}]
    )
    def test_unaligned_areas(self, areas: dict[str, int]) -> None:
        """From ``queue.rs::test_queue_is_valid``.

        And ``queue.rs::test_setters_error_cases``, ``state.rs::test_invalid_queue_state``.
        """
        places = {"desc": 0x1000, "avail": 0x2000, "used": 0x3000} | areas
        with pytest.raises(ValueError, match="is not a multiple of"):
            RingLayout(16, **places)

    @pytest.mark.parametrize(
        "areas", [{"desc": 0xFFFF_FFF0}, {"avail": 0xFFFF_FFFE}, {"used": 0xFFFF_FFFC}]
    )
    def test_aligned_areas_outside_of_memory(self, areas: dict[str, int]) -> None:
        """From ``queue.rs::test_queue_is_valid``: they can be set, and serve nothing."""
        guest = HandGuest(**areas)  # type: ignore[arg-type]
        refused(guest, "no usable memory behind the ring")

    @pytest.mark.parametrize("areas", [{"desc": 0x10}, {"avail": 0x1002}, {"used": 0x2004}])
    def test_the_least_alignment(self, areas: dict[str, int]) -> None:
        """From ``queue.rs::test_queue_is_valid``."""
        places: dict[str, int] = {"desc": 0x4000, "avail": 0x1000, "used": 0x2000} | areas
        guest = HandGuest(desc=places["desc"], avail=places["avail"], used=places["used"])
        guest.put(3, Desc(0x8000, 8))
        guest.offer(3)
        guest.run(guest.take())
        assert guest.used_entry(0) == (3, 0)


class TestUsed:
    """Giving buffers back."""

    def test_what_is_not_held_changes_nothing(self) -> None:
        """From ``queue.rs::test_add_used``, ``queue_sync.rs::test_state_sync_add_used``."""
        guest, other = HandGuest(), HandGuest()
        for each in (guest, other):
            each.put(1, Desc(0x1000, 0x1000, WRITE))
            each.offer(1)
        assert guest.used_idx == 0
        foreign = other.take()
        assert guest.queue.complete(foreign, 0x1000) is False
        assert guest.used_idx == 0
        chain = guest.take()
        guest.run(chain, 0x1000)
        assert guest.used_idx == 1
        assert guest.used_entry(0) == (1, 0x1000)
        assert guest.queue.complete(chain, 0) is False, "a second time"
        assert guest.used_idx == 1
        other.run(foreign)

    def test_more_than_there_is_room_for(self) -> None:
        """From ``queue.rs::test_add_used``.

        And ``fuzz/common/src/virtio_queue.rs``: there any length is taken.
        """
        guest = HandGuest()
        guest.put(0, Desc(0x1000, 0x1000))
        guest.offer(0)
        chain = guest.take()
        with pytest.raises(DeviceError, match="room for"):
            guest.queue.complete(chain, 0x2000)
        assert guest.used_idx == 0
        guest.run(chain)

    def test_each_is_written_before_the_index(self) -> None:
        """From ``queue/verification.rs::verify_add_used``."""
        rng = random.Random(1)
        guest = HandGuest(size=8)
        total = 0
        for _ in range(200):
            held = []
            for head in rng.sample(range(8), rng.randrange(1, 9)):
                guest.put(head, Desc(0x1000 + 64 * head, 64, WRITE))
                guest.offer(head)
                held.append(guest.take())
            for chain in held:
                written = rng.randrange(65)
                before = guest.used_idx
                assert guest.queue.complete(chain, written)
                assert guest.used_idx == (before + 1) % WRAP
                assert guest.used_entry(total) == (chain.head, written)
                total += 1
            guest.serve()


class TestNotifications:
    """Of the driver, and by it."""

    @staticmethod
    def one(guest: HandGuest) -> bool:
        """Use one buffer; whether the driver is notified."""
        guest.put(0, Desc(0x1000, 8, WRITE))
        guest.offer(0)
        guest.run(guest.take(), 8)
        return bool(guest.notifications())

    @staticmethod
    def skip(guest: HandGuest, upto: int) -> int:
        """Use buffers up to an index, as many at a time as there is room; notifications."""
        for i in range(guest.size):
            guest.put(i, Desc(0x1000, 8, WRITE))
        while guest.used_idx != upto:
            count = min((upto - guest.used_idx) % WRAP, guest.size)
            guest.offer(*range(count))
            guest.queue.complete_all([(guest.take(), 8) for _ in range(count)])
            guest.serve()
        return guest.notifications()

    def test_always_without_the_event_index(self) -> None:
        """From ``queue.rs::test_needs_notification``.

        And ``queue/verification.rs::verify_device_notification_suppression``.
        """
        guest = HandGuest()
        assert all(self.one(guest) for _ in range(16))

    def test_not_if_the_driver_wants_none(self) -> None:
        """Beside ``queue/verification.rs::verify_device_notification_suppression``.

        Where the flag is ignored, which the specification allows.
        """
        guest = HandGuest()
        guest.set_avail_flags(1)
        assert not any(self.one(guest) for _ in range(16))

    def test_at_the_event_index_only_twice_around(self) -> None:
        """From ``queue.rs::test_needs_notification``."""
        guest = HandGuest(event_idx=True)
        guest.set_used_event(4)
        # Of a queue that begins it is not known what the driver was told: the first is announced.
        assert self.one(guest)
        assert [i for i in range(2, 41) if self.one(guest)] == [5]
        guest.set_used_event(WRAP - 12)
        assert self.skip(guest, WRAP - 12) == 0
        assert self.one(guest)
        guest.set_used_event(4)
        assert self.skip(guest, WRAP - 8) == 0
        assert [i for i in range(WRAP - 7, WRAP + 13) if self.one(guest)] == [WRAP + 5]

    def test_an_event_index_that_is_passed_or_far_ahead(self) -> None:
        """From ``queue.rs::test_needs_notification``."""
        guest = HandGuest(event_idx=True)
        assert self.one(guest)
        assert self.skip(guest, 12) == 0
        guest.set_used_event(8)
        assert not self.one(guest), "it is behind"
        guest.set_used_event(15)
        assert not self.one(guest), "the 14th"
        assert not self.one(guest), "the 15th"
        assert self.one(guest), "the 16th has index 15"
        guest.serve()
        assert guest.notifications() == 0

    def test_a_batch_that_passes_the_event_index(self) -> None:
        """From ``queue/verification.rs::verify_device_notification_suppression``.

        Whenever the index just before the new one is the event index, and also when it was
        passed.
        """
        rng = random.Random(2)
        guest = HandGuest(event_idx=True)
        for i in range(16):
            guest.put(i, Desc(0x1000, 8, WRITE))
        self.one(guest)
        for _ in range(300):
            count, before = rng.randrange(1, 17), guest.used_idx
            event = (before + rng.randrange(-20, 20)) % WRAP
            guest.set_used_event(event)
            guest.offer(*range(count))
            guest.queue.complete_all([(guest.take(), 8) for _ in range(count)])
            guest.serve()
            passed = event in {(before + i) % WRAP for i in range(count)}
            assert guest.notifications() == int(passed)

    def test_the_flag_while_it_works_and_after(self) -> None:
        """From ``queue.rs::test_enable_disable_notification``.

        And ``queue_sync.rs::test_enable_disable_notification``.
        """
        seen: list[int] = []

        def look(_: Chain) -> int:
            seen.append(guest.used_flags)
            return 0

        guest = HandGuest(Answering(look))
        guest.serve()
        assert guest.used_flags == 0
        for _ in range(3):
            guest.put(0, Desc(0x1000, 8))
            guest.offer(0)
            guest.serve()
            assert guest.used_flags == 0
        assert seen == [NO_NOTIFY] * 3

    def test_the_event_index_says_where_it_has_looked(self) -> None:
        """From ``queue.rs::test_enable_disable_notification``.

        And ``queue_sync.rs::test_enable_disable_notification``.
        """
        guest = HandGuest(event_idx=True)
        guest.serve()
        for offered in (2, 8):
            for i in range(guest.offered, offered):
                guest.put(i, Desc(0x1000, 8))
                guest.offer(i)
            while (chain := guest.queue.take()) is not None:
                guest.run(chain)
            assert guest.avail_event == offered, "take() found nothing more"

    @pytest.mark.parametrize("event_idx", [False, True])
    def test_chains_that_come_while_it_works(self, event_idx: bool) -> None:
        """From ``queue.rs::test_consume_chains_with_notif``."""
        heads: list[int] = []

        def answer(chain: Chain) -> int:
            heads.append(chain.head)
            if len(heads) == 3:
                guest.set_avail_idx(4)  # nothing announces it
            return 0

        guest = HandGuest(Answering(answer), event_idx=event_idx)
        ends = {1, 4, 6, 8, 12}
        put_all(guest, pages(*(0 if i in ends else NEXT for i in range(13))))
        guest.offer(0, 2, 5, 7, 9)
        guest.set_avail_idx(2)
        guest.serve()
        assert heads == [0, 2]
        assert guest.used_idx == 2
        guest.set_avail_idx(3)
        guest.serve()
        assert heads == [0, 2, 5, 7]
        assert guest.used_idx == 4
        # More than were written: what the ring happens to hold there is taken for heads.
        guest.set_avail_idx(7)
        guest.serve()
        assert heads == [0, 2, 5, 7, 9, 0, 0]
        assert guest.used_idx == 7


class TestAvailable:
    """What the driver makes available."""

    def test_an_index_that_goes_back(self) -> None:
        """From ``queue.rs::test_invalid_avail_idx``."""
        guest = HandGuest()
        put_all(guest, pages(*(0 if i in {1, 4, 6} else NEXT for i in range(7))))
        guest.offer(0, 2, 5)
        for head in (0, 2, 5):
            chain = guest.take()
            assert chain.head == head
            guest.run(chain)
        assert guest.used_idx == 3
        guest.set_avail_idx(1)
        refused(guest, "available index 1 runs ahead of a ring of 16 whose next entry is 3")
        assert guest.used_idx == 3

    def test_chains_whose_flags_say_what_is_written(self) -> None:
        """From ``queue.rs::test_descriptor_and_iterator``."""
        guest = HandGuest()
        flags = [NEXT, 0, NEXT, NEXT | WRITE, WRITE, NEXT, WRITE]
        put_all(guest, pages(*flags))
        guest.offer(0, 2, 5)
        first, second, third = (guest.take() for _ in range(3))
        assert [first.head, second.head, third.head] == [0, 2, 5]
        assert first.readable.fragments() == [(0x1000, 0x1000), (0x2000, 0x1000)]
        assert first.writable.fragments() == []
        assert second.readable.fragments() == [(0x3000, 0x1000)]
        assert second.writable.fragments() == [(0x4000, 0x1000), (0x5000, 0x1000)]
        assert third.readable.fragments() == [(0x6000, 0x1000)]
        assert third.writable.fragments() == [(0x7000, 0x1000)]
        guest.queue.complete_all([(first, 0), (second, 0), (third, 0)])

    @pytest.mark.parametrize("flags", [(NEXT | WRITE, NEXT, WRITE), (NEXT | WRITE, 0)])
    def test_what_is_to_be_read_behind_what_is_to_be_written(self, flags: tuple[int, ...]) -> None:
        """From ``queue.rs::test_descriptor_and_iterator``: there it is served in any order."""
        guest = HandGuest()
        put_all(guest, pages(*flags))
        guest.offer(0)
        refused(guest, "device-readable descriptor after a device-writable one")

    def test_a_buffer_is_put_back_and_comes_again(self) -> None:
        """From ``queue.rs::test_iterator``: sending more than it has room for does that here."""
        guest = HandGuest()
        put_all(guest, pages(NEXT, WRITE, NEXT, NEXT | WRITE, WRITE))
        guest.offer(0, 2)
        first = guest.take()
        assert first.head == 0
        with pytest.raises(DeviceError, match="has room for 8192"):
            guest.queue.send(bytes(8193))
        again = guest.take()
        assert again.head == 2
        assert len(again.writable.fragments()) == 2
        guest.queue.complete_all([(first, 0), (again, 0)])

    @pytest.mark.parametrize(
        "row",
        [
            [Desc(0x1000, 0xFFFF_FFFF, NEXT, 1), Desc(0x1000, 0x1234_5678, 0, 2)],
            [Desc(0x1000, 0xFFFF_FFFF, NEXT, 0)],
        ],
        ids=["two", "a loop"],
    )
    def test_more_than_4_gib(self, row: list[Desc]) -> None:
        """From ``queue.rs::test_iterator``: there the iteration ends before it would be more."""
        guest = HandGuest()
        put_all(guest, row)
        guest.offer(0)
        refused(guest, r"longer than 2\*\*32 bytes")

    def test_descriptors_that_a_fuzzer_found(self) -> None:
        """From ``queue.rs::test_regression_iterator_division``."""
        guest = HandGuest(size=1, avail=0x20)
        guest.put(0, Desc(14178673876262995140, 3301229764, 50372, 50372))
        guest.offer(0)
        refused(guest, "indirect descriptor")


class Counter(Device):
    """Counts its requests."""

    device_id = 61

    def __init__(self) -> None:
        self.served: list[tuple[int, int]] = []

    def process(self, queue: int, chain: Chain) -> int:
        self.served.append((chain.head, chain.readable.total))
        return 0


class Spoken(Holder):
    """Keeps its host."""

    host: DeviceHost

    def attached(self, host: DeviceHost) -> None:
        self.host = host


class Described(Counter):
    """Has a configuration space."""

    def config(self) -> bytes:
        return bytes(range(12))


class TestLife:
    """Reset, states, and who sees them."""

    def test_a_reset_queue_begins_anew(self) -> None:
        """From ``queue.rs::test_reset_queue``, ``queue_sync.rs::test_sync_state_reset_queue``."""
        with remote(Counter(), VERSION_1 | EVENT_IDX) as (frontend, memory):
            ring = Remote(frontend, memory, size=8, desc=0x5000)
            ring.run(3)
            assert ring.avail_event == 3
            frontend.stop_queue(0)
            frontend.set_status(0)
            memory.write(0, bytes(0x8000))
            frontend.set_features(VERSION_1)
            again = Remote(frontend, memory, size=16)
            again.run(2)
            assert [again.used_entry(i) for i in range(2)] == [(0, 0), (1, 0)]
            until(lambda: again.used_flags == 0)
            assert memory.read(0x3000 + 4 + 8 * 16, 2) == b"\0\0", "no event index"

    def test_nothing_of_before_is_served_after_a_reset(self) -> None:
        """From ``queue.rs::test_regression_timeout_after_reset``, with its descriptors."""
        device = Counter()
        rows = [
            Desc(21508325467, 0, 1, 4),
            Desc(2097152, 4096, 3, 0),
            Desc(18374686479672737792, 4294967295, 65535, 29),
            Desc(76842670169653248, 1114115, 0, 0),
            Desc(16, 983040, 126, 3),
            Desc(897648164864, 0, 0, 0),
            Desc(111669149722, 0, 0, 0),
        ]
        with remote(device) as (frontend, memory):
            ring = Remote(frontend, memory)
            ring.run()
            frontend.stop_queue(0)
            frontend.set_status(0)
            for i, row in enumerate(rows):
                ring.put(i, row)
            ring.offer(0, 1, 2, 3, 4, 5, 6)
            ring.handle.kick()
            frontend.sync()
            assert len(device.served) == 1
            assert ring.used_idx == 1
            # Nor does a queue that is started with them do anything but stop.
            ring = Remote(frontend, memory, base=1)
            ring.set_avail_idx(8)
            ring.handle.kick()
            until(lambda: ring.handle.failed())
            assert len(device.served) == 1

    @pytest.mark.parametrize(
        ("ahead", "valid"), [(2, True), (1, True), (3, False), (0xFFFF, False)]
    )
    def test_how_far_the_index_may_be_ahead_where_it_wraps(self, ahead: int, valid: bool) -> None:
        """From ``queue.rs::test_iterator_and_avail_idx``."""
        with remote(Counter()) as (frontend, memory):
            memory.write(0x3002, b"\xff\xff")
            memory.write(0x2002, struct.pack("<H", (0xFFFF + ahead) % WRAP))
            memory.write(0x1000, table(Desc(0x8000, 8), Desc(0x9000, 8)))
            memory.write(0x2004, struct.pack("<HH", 1, 0))
            ring = Remote(frontend, memory, size=2, base=0xFFFF)
            ring.handle.kick()
            if valid:
                until(lambda: ring.used_idx == (0xFFFF + ahead) % WRAP)
            else:
                until(lambda: ring.handle.failed())
                assert ring.used_idx == 0xFFFF

    def test_a_state_without_any_work_is_restored(self) -> None:
        """From ``state.rs::test_empty_queue_state``.

        And ``virtio-queue-ser/src/state.rs::test_state_ser``: what is saved is one index.
        """
        with remote(Counter()) as (frontend, memory):
            Remote(frontend, memory)
            assert frontend.stop_queue(0) == 0
            ring = Remote(frontend, memory, base=0)
            ring.run(5)
            assert frontend.stop_queue(0) == 5
            ring = Remote(frontend, memory, base=5)
            ring.run(2)
            assert frontend.stop_queue(0) == 7

    def test_a_queue_that_is_not_started_has_no_buffers_in_any_thread(self) -> None:
        """From ``queue_sync.rs::test_queue_state_sync``, ``queue.rs::test_iterator``."""
        device = Spoken()
        with remote(device) as (frontend, memory):
            found: list[Chain | None] = []

            def look() -> None:
                found.append(device.host.queue(0).take())

            def in_threads() -> list[Chain]:
                threads = [threading.Thread(target=look) for _ in range(2)]
                for each in threads:
                    each.start()
                for each in threads:
                    each.join()
                taken = [each for each in found if each is not None]
                found.clear()
                return taken

            assert in_threads() == []
            ring = Remote(frontend, memory)
            ring.put(0, Desc(0x8000, 8, WRITE))
            ring.offer(0)
            ring.handle.kick()
            frontend.sync()
            taken: list[Chain] = []

            def one_is_taken() -> bool:
                taken.extend(in_threads())
                return bool(taken)

            until(one_is_taken)
            assert len(taken) == 1
            assert device.host.queue(0).complete(taken[0], 0)
            until(lambda: ring.used_idx == 1)

    @pytest.mark.parametrize("offset", [0, 1, 3, 6, 11])
    @pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 12])
    def test_the_configuration_space_at_odd_offsets(self, offset: int, size: int) -> None:
        """From ``virtio-device/src/virtio_config.rs::test_impls``.

        And ``virtio-device/src/mmio.rs::test_virtio_mmio_device``: beyond its end are zeroes.
        """
        with remote(Described()) as (frontend, _):
            expected = (bytes(range(12)) + bytes(12))[offset : offset + size]
            assert frontend.get_config(offset, size) == expected
