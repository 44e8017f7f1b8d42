from typing import Self

from typing_extensions import disjoint_base

from guestio._core.iommu.address_space import AddressSpace
from guestio._core.iommu.misses import Misses
from guestio._core.trace.latencies import Latencies
from guestio._core.virtio.areas import RingAreas
from guestio._core.virtio.chain import Chain, Quota, Server
from guestio._core.virtio.inflight import InflightQueue
from guestio.addr import IovaRange

@disjoint_base
class Ring(RingAreas):
    """A virtqueue as its device sees it: what is taken, held, published, and in which order.

    Abstract: how the ring lies in memory is decided by a format, a subclass such as
    :class:`~guestio._core.virtio.split.SplitRing`, which provides what the section "Ring format" at
    the end of this class lists.

    Args:
        space: Where the addresses of rings, tables and buffers lead.
        size: Entries, a power of two up to 32768.
        desc, avail, used: Addresses of the three areas, aligned to 16, 2 and 4.
        event_idx: VIRTIO_F_EVENT_IDX was negotiated.
        indirect: VIRTIO_F_INDIRECT_DESC was negotiated.
        base: Index of the next available entry.
        ordered: Publish completed requests in the order in which they were taken, so that the used
            index says where to resume after a stop or a crash, and as VIRTIO_F_IN_ORDER promises.
            Otherwise they are published as they complete.
        inflight: Where to note which requests are in flight, for the successor after a crash.
            Requests that are noted in it already are taken first, whatever ``base`` is.
        batch_bytes: Bytes of requests that one :meth:`run_once` serves, so that other queues are
            not starved; the last one may exceed it.
        quota: Limits the memory of requests that were taken and not completed, together with other
            rings; None for no limit.

    Attributes:
        next_avail: The ring position that is taken next.
        outstanding: Requests taken and not completed; those not published yet are not counted.
        held_count: Requests that were in flight when the device before this one ended, and that
            were not taken again yet.
        progress: Requests taken so far, those that were put back included.
        returned: Those of them that were put back.
        completions: Requests published so far.
        notifications: Notifications that the driver wanted so far.
        bytes: Bytes of the requests taken so far.
        queue, origin: Its number and that of its server, for records of tracepoints.
        latencies: Where to count how long requests took, while that is measured.
        crowded: Whether the last attempt to take requests ended because the quota is used up.
        broken: Why the ring stopped, or None.

    One thread at a time.
    """
    def __new__(
        cls,
        space: AddressSpace,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        event_idx: bool = False,
        indirect: bool = False,
        base: int = 0,
        ordered: bool = False,
        inflight: InflightQueue | None = None,
        batch_bytes: int = ...,
        quota: Quota | None = None,
    ) -> Self: ...
    @property
    def indirect(self) -> bool: ...
    @property
    def next_avail(self) -> int: ...
    @property
    def next_used(self) -> int: ...
    @property
    def outstanding(self) -> int: ...
    @property
    def unpublished(self) -> int:
        """Completed requests that are not published yet."""
    @property
    def ordered(self) -> bool: ...
    @property
    def inflight(self) -> InflightQueue | None: ...
    @property
    def held_count(self) -> int: ...
    @property
    def progress(self) -> int: ...
    @property
    def returned(self) -> int: ...
    @property
    def completions(self) -> int: ...
    @property
    def notifications(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    queue: int
    origin: int
    latencies: Latencies | None
    @property
    def crowded(self) -> bool: ...
    @property
    def resume_at(self) -> int:
        """Where a successor resumes after a stop; what is not published by then is done again."""
    def pop(self, limit: int = 64) -> tuple[list[Chain], list[tuple[IovaRange, int]]]:
        """Take the available requests, as far as they can be translated.

        Requests are taken in the order in which the driver made them available. One that lacks
        translations ends the list and stays in the ring; those behind it are looked at too, so
        that everything that is missing can be requested at once.

        Args:
            limit: Requests to look at, at most; fewer if they are very large.

        Returns:
            ``(chains, misses)``: the requests taken, and ``(IovaRange, access)`` for everything
            that is not mapped, or not for this access. Misses of the ring itself are among them.

        Raises:
            QueueError: The driver broke a rule; the ring is broken from now on.

        Cost: O(descriptors) plus a lookup for each.
        """
    def run_once(
        self,
        server: Server | None,
        limit: int = 64,
        call: int = -1,
        rearm: bool = False,
    ) -> tuple[list[Chain], Misses, int, bool]:
        """Serve one batch of requests: all that can be done for the ring inside the core.

        What was completed before is published; the available requests are taken, as by :meth:`pop`;
        those that the server can serve at once are served, and published every few requests; and
        the driver is notified if it wants to be.

        Args:
            server: Serves requests; what it leaves is returned. None returns them all.
            limit: As for :meth:`pop`.
            call: Eventfd to notify the driver with, or -1.
            rearm: Whether to enable kicks if no request is left, as :meth:`enable_kicks` does. They
                stay disabled while requests wait for translations: those that come then are found
                when the answers do.

        Returns:
            ``(chains, misses, served, idle)``: as from :meth:`pop`, but the misses as
            :class:`~guestio._core.iommu.misses.Misses`; how many requests were served; and
            whether nothing but the chains and the misses is left to do until the next kick.

        Raises:
            QueueError: As :meth:`pop`.
        """
    def lacking(self) -> list[tuple[IovaRange, int]] | None:
        """What the request that is taken next lacks.

        Returns:
            As the misses of :meth:`pop`; None if there is no such request, or the ring itself
            cannot be reached.
        """
    def pop_faulty(self) -> Chain | None:
        """Take the next request although some of it cannot be reached.

        Returns:
            A chain with ``fault`` set (unless it can be reached by now), or None if there is none
            or the ring itself cannot be reached.

        Raises:
            QueueError: The driver broke a rule.
        """
    def put_back(self, chains: list[Chain]) -> None:
        """Have requests taken again later that were handed out and that no device has worked on.

        Only the newest ones can be, as far as no other was served between them, and before the
        next batch is taken.

        Args:
            chains: The last of those that :meth:`pop` or :meth:`run_once` returned, in their order.
                Those that are put back are removed; their memory must not be touched any more.

        Raises:
            ValueError: One was given back before, or comes from another ring.
        """
    def complete(self, chain: Chain, written: int | None = None) -> bool:
        """Give a request back; its driver sees that after :meth:`publish`.

        Args:
            chain: The request. Its memory must not be touched any more.
            written: The number of bytes written to it; None for a request that is finished.

        Returns:
            Whether it was given back. Not while another thread moves its data, which its driver
            would see change: it is finished then (:meth:`Chain.finish`); complete it again later,
            without ``written``.

        Raises:
            ValueError: It was given back before, comes from another ring, or has less room.
        """
    def give_back(self) -> int:
        """Put back into the ring what was in flight before and was not taken again.

        For a stop: so the index says where to resume, also to a device that is not given the notes.
        What the device before this one had overtaken no index can say: that stays in the notes.
        Nothing is given back while the ring cannot be reached.

        Returns:
            How many.
        """
    def publish(self) -> bool | None:
        """Make completed requests visible to the driver.

        Returns:
            Whether the driver wants to be notified of them; None if the used ring lacks a
            translation (see :meth:`missing`); nothing was published then.

        Raises:
            QueueError: The ring is broken.
        """
    def spin(self, seconds: float, other: int) -> bool:
        """Look for new requests for a while without sleeping, with the GIL held.

        Args:
            seconds: For how long, up to SPIN_MOST.
            other: A descriptor; once it is readable, something else is to be done.

        Returns:
            Whether there are any. False also if the ring lacks a translation.

        Raises:
            ValueError: No such time.
        """
    def disable_kicks(self) -> None:
        """Tell the driver that it need not kick for new requests. Only a hint."""
    def enable_kicks(self) -> bool | None:
        """Have the driver kick for the next request.

        Returns:
            Whether requests are available already, for which no kick may come; None if the ring
            lacks a translation.
        """
