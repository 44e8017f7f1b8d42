"""The driver's side of a split virtqueue: what a guest's kernel does with a ring.

A :class:`DriverQueue` puts chains of buffers into a queue and collects what the device made of
them. It trusts the device no more than a device trusts its driver: a used ring that contradicts
what was made available raises :class:`~guestio.errors.QueueError`.

Descriptors carry the addresses that the device uses. Ring addresses are also those of the memory
the queue is given, so a driver behind an IOMMU works on an :class:`~guestio.iommu.IommuMemory`
with the guest's own mappings: rings may then be scattered over physical pages, as a real guest's.

Source: virtio 1.3 sections 2.7 "Split Virtqueues" (layout 2.7.5 to 2.7.8, notification suppression
2.7.7 and 2.7.10, order of operations 2.7.13 and 2.7.14) and 6.1 for the feature bits.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from guestio.addr import Ordering, Permissions, check_int
from guestio.errors import QueueError, again
from guestio.virtio.layout import RingLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guestio.memory import GuestMemory, IoVector

DESC_F_NEXT: Final = 1
DESC_F_WRITE: Final = 2
DESC_F_INDIRECT: Final = 4
AVAIL_F_NO_INTERRUPT: Final = 1
USED_F_NO_NOTIFY: Final = 1

_DESC: Final = struct.Struct("<QIHH")
_USED_ELEM: Final = struct.Struct("<II")
_U16: Final = struct.Struct("<H")
_WRAP: Final = 0xFFFF
_MAX_LENGTH: Final = 1 << 32


class Completion(NamedTuple):
    """A chain that the device has finished with.

    Attributes:
        token: What the chain was added with.
        written: Bytes the device says it wrote, at most the chain's writable bytes.
    """

    token: Any
    written: int


class _Chain(NamedTuple):
    token: Any
    ids: Sequence[int]
    writable: int


class DriverQueue:
    """The driver's side of one split virtqueue.

    Chains that were added become visible to the device with the next :meth:`publish`. Completions
    are fetched with :meth:`collect`, which never waits, so a driver may poll; one that wants an
    interrupt calls :meth:`enable_interrupts` before it sleeps.

    Not safe for several threads at once. It keeps the ring memory in use until :meth:`close`.

    Args:
        memory: Where the rings are.
        layout: Where in it.
        event_idx: Whether VIRTIO_RING_F_EVENT_IDX was negotiated.
        indirect: Whether VIRTIO_RING_F_INDIRECT_DESC was negotiated.

    Raises:
        AccessError: The memory is not there.
    """

    def __init__(
        self,
        memory: GuestMemory,
        layout: RingLayout,
        *,
        event_idx: bool = False,
        indirect: bool = False,
    ) -> None:
        self.layout = layout
        self.event_idx = event_idx
        self.indirect = indirect
        self._memory = memory
        self._size = size = layout.size
        self._held: list[IoVector] = []
        try:
            self._desc = self._hold(layout.desc, layout.desc_bytes(size))
            self._avail_flags = self._hold(layout.avail, 2)
            self._avail_idx = self._hold(layout.avail + 2, 2)
            self._avail_ring = self._hold(layout.avail + 4, 2 * size)
            self._used_event = self._hold(layout.avail + 4 + 2 * size, 2)
            self._used_flags = self._hold(layout.used, 2)
            self._used_idx = self._hold(layout.used + 2, 2)
            self._used_ring = self._hold(layout.used + 4, 8 * size)
            self._avail_event = self._hold(layout.used + 4 + 8 * size, 2)
        except BaseException:
            self.close()
            raise
        self.reset()

    def _hold(self, addr: int, length: int) -> IoVector:
        vector = self._memory.gather(addr, length, Permissions.READ_WRITE)
        self._held.append(vector)
        return vector

    def reset(self) -> None:
        """Zero the rings and forget every chain; the device must have stopped."""
        for vector in self._held:
            vector.fill(0)
        self._free = list(range(self._size - 1, -1, -1))
        self._chains: list[_Chain | None] = [None] * self._size
        self._staged: list[tuple[int, _Chain]] = []
        self._outstanding = 0
        self._published = 0
        self._collected = 0
        self._broken: QueueError | None = None

    def close(self) -> None:
        """Let the ring memory go. May be called again."""
        while self._held:
            self._held.pop().close()

    @property
    def free(self) -> int:
        """Descriptors that are not in use."""
        return len(self._free)

    @property
    def outstanding(self) -> int:
        """Chains that were published and not yet collected."""
        return self._outstanding

    @property
    def tokens(self) -> list[Any]:
        """What the chains were added with that were not collected yet, those not published too."""
        chains = [chain for chain in self._chains if chain is not None]
        return [chain.token for chain in chains] + [chain.token for _, chain in self._staged]

    @property
    def next_used(self) -> int:
        """Number of the used entry that is collected next, modulo 65536."""
        return self._collected

    @property
    def published(self) -> int:
        """The available index as the device may see it, modulo 65536."""
        return self._published

    def add(
        self,
        readable: Sequence[tuple[int, int]],
        writable: Sequence[tuple[int, int]],
        token: Any = None,
        *,
        table: tuple[int, IoVector] | None = None,
    ) -> int:
        """Put a chain into the queue; the device sees it after :meth:`publish`.

        Args:
            readable: ``(address, length)`` of what the device reads, in order.
            writable: The same for what it writes.
            token: Comes back with the completion.
            table: Where to put an indirect table of 16 bytes per buffer: its address for the
                device, and its memory for us. It must stay untouched until the completion. None
                for a chain in the ring.

        Returns:
            The number of the chain's first descriptor.

        Raises:
            ValueError: The chain is empty, longer than the ring, or has an empty or too large
                buffer; or a table was given without the feature.
            QueueError: The ring has too few free descriptors, or the device broke it before.
            AccessError: The table's memory is too short.
        """
        if self._broken is not None:
            raise again(self._broken)
        count = len(readable) + len(writable)
        if not 0 < count <= self._size:
            raise ValueError(f"a chain of {count} buffers; the ring has {self._size} descriptors")
        if len(self._free) < (count if table is None else 1):
            raise QueueError(f"{count} descriptors are needed, {len(self._free)} are free")
        sizes = [length for _, length in writable]
        if any(not 0 < length < _MAX_LENGTH for length in sizes) or any(
            not 0 < length < _MAX_LENGTH for _, length in readable
        ):
            raise ValueError("a buffer's length must be in [1, 2**32)")
        buffers = [(addr, length, 0) for addr, length in readable]
        buffers += [(addr, length, DESC_F_WRITE) for addr, length in writable]
        if table is None:
            ids: Sequence[int] = self._free[: -count - 1 : -1]
            self._write_chain(buffers, ids)
        else:
            self._write_indirect(buffers, table)
            ids = self._free[-1:]
        del self._free[-len(ids) :]
        head = ids[0]
        slot = (self._published + len(self._staged)) % self._size
        self._avail_ring.write(_U16.pack(head), 2 * slot)
        self._staged.append((head, _Chain(token, ids, sum(sizes))))
        return head

    def _write_chain(self, buffers: Sequence[tuple[int, int, int]], ids: Sequence[int]) -> None:
        for (addr, length, flags), here, following in zip(
            buffers[:-1], ids[:-1], ids[1:], strict=True
        ):
            self._desc.write(_DESC.pack(addr, length, flags | DESC_F_NEXT, following), 16 * here)
        addr, length, flags = buffers[-1]
        self._desc.write(_DESC.pack(addr, length, flags, 0), 16 * ids[-1])

    def _write_indirect(
        self, buffers: Sequence[tuple[int, int, int]], table: tuple[int, IoVector]
    ) -> None:
        if not self.indirect:
            raise ValueError("an indirect table needs VIRTIO_RING_F_INDIRECT_DESC")
        last = len(buffers) - 1
        entries = b"".join(
            _DESC.pack(addr, length, flags | DESC_F_NEXT, i + 1)
            if i < last
            else _DESC.pack(addr, length, flags, 0)
            for i, (addr, length, flags) in enumerate(buffers)
        )
        address, memory = table
        memory.write(entries)
        self._desc.write(_DESC.pack(address, len(entries), DESC_F_INDIRECT, 0), 16 * self._free[-1])

    def publish(self) -> bool:
        """Make the added chains visible to the device.

        Returns:
            Whether the device wants to be notified of them.
        """
        added = len(self._staged)
        if not added:
            return False
        for head, chain in self._staged:
            self._chains[head] = chain
        self._staged.clear()
        self._outstanding += added
        self._published = after = (self._published + added) & _WRAP
        # Sequentially consistent, and so is the load after it: the device stores its wish and then
        # looks at our index, we store our index and then look at its wish, and one of the two must
        # see the other (section 2.7.13.4.1). It also is the release that publishes the chains.
        self._avail_idx.store(after, 2, Ordering.SEQ_CST)
        if self.event_idx:
            event = self._avail_event.load(2, Ordering.SEQ_CST)
            return (after - event - 1) & _WRAP < added
        return not self._used_flags.load(2, Ordering.SEQ_CST) & USED_F_NO_NOTIFY

    def collect(self, limit: int | None = None) -> list[Completion]:
        """Fetch finished chains without waiting, at most ``limit``.

        Raises:
            QueueError: The device finished what it did not have, wrote more bytes than it was
                given, or moved its index too far. What was finished properly before is returned
                first. The queue is of no more use then, until :meth:`reset`.
        """
        if self._broken is not None:
            raise again(self._broken)
        ready = self._ready()
        if ready > self._outstanding:
            self._broken = QueueError(
                f"the used index is {ready} entries past {self._collected}, with only "
                f"{self._outstanding} chains outstanding"
            )
            raise again(self._broken)
        done: list[Completion] = []
        try:
            for _ in range(ready if limit is None else min(ready, limit)):
                done.append(self._collect_one())  # noqa: PERF401 - what precedes an error is kept
        except QueueError as error:
            self._broken = again(error)
            if not done:
                raise
        return done

    def _ready(self, ordering: Ordering = Ordering.ACQUIRE) -> int:
        return (self._used_idx.load(2, ordering) - self._collected) & _WRAP

    def _collect_one(self) -> Completion:
        at = 8 * (self._collected % self._size)
        head, written = _USED_ELEM.unpack(self._used_ring.read(at, 8))
        chain = self._chains[head] if head < self._size else None
        if chain is None:
            raise QueueError(
                f"used entry {self._collected} names chain {head}, which the device does not have"
            )
        if written > chain.writable:
            raise QueueError(
                f"the device says it wrote {written} bytes to chain {head}, which has "
                f"{chain.writable} writable ones"
            )
        self._chains[head] = None
        self._free.extend(reversed(chain.ids))
        self._outstanding -= 1
        self._collected = (self._collected + 1) & _WRAP
        return Completion(chain.token, written)

    def enable_interrupts(self, after: int = 1) -> bool:
        """Ask for an interrupt once ``after`` more chains are finished.

        With EVENT_IDX the device can keep to the number; without it, it may interrupt for each.

        Returns:
            Whether that many are finished already: collect then, there may be no interrupt.
        """
        if not 0 < check_int(after, "after") <= self._size:
            raise ValueError(f"after {after} is not in [1, {self._size}]")
        if self.event_idx:
            event = (self._collected + after - 1) & _WRAP
            self._used_event.store(event, 2, Ordering.SEQ_CST)
        else:
            self._avail_flags.store(0, 2, Ordering.SEQ_CST)
        # The mirror image of publish(): our wish is stored before we look at the device's index.
        return self._ready(Ordering.SEQ_CST) >= after

    def disable_interrupts(self) -> None:
        """Ask for no interrupts; a hint that the device may ignore."""
        if self.event_idx:
            # "MUST set flags to 0" (section 2.7.7.1); an index just passed comes up again last.
            self._used_event.store((self._collected - 1) & _WRAP, 2, Ordering.RELAXED)
        else:
            self._avail_flags.store(AVAIL_F_NO_INTERRUPT, 2, Ordering.RELAXED)
