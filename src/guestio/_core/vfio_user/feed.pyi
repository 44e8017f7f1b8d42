from collections.abc import Callable

from typing_extensions import disjoint_base

from guestio._core.pci.doorbell import Doorbells
from guestio._core.vfio_user.dma_table import DmaTable
from guestio._core.vfio_user.inbox import Inbox
from guestio._core.virtio.loop import Feed

@disjoint_base
class DmaCounters:
    """What is counted of a client's messages.

    Attributes:
        dma_maps: Mappings made.
        dma_unmaps: Requests to remove mappings.
        region_reads: Reads of BARs and of the configuration space.
        region_writes: Writes to them.
        plain: Messages that were handled in the core.
    """

    dma_maps: int
    dma_unmaps: int
    region_reads: int
    region_writes: int
    plain: int

@disjoint_base
class ClientFeed(Feed):
    """Plain messages of one client: doorbells, and mappings of files that are known.

    A plain message is handled and answered exactly as the session would. Doorbells that were rung
    serve once all messages that had arrived are answered.

    Args:
        callback: Called by the event loop when something is left to do: answers to send, messages
            to handle, doorbells to serve.
        turn: Seconds after which the loop's others have their turn, however much arrives.
        inbox: What has arrived.
        table: What the client has mapped.
        doorbells: The device's.
        counters: Where to count.

    Attributes:
        main: The socket, or -1 while it is not to be read here.
        unmaps: Whether unmaps are handled here: not while accesses by messages are under way, which
            they end.

    For the thread of the event loop.
    """

    main: int
    unmaps: bool
    def __init__(
        self,
        callback: Callable[[], None],
        turn: float,
        *,
        inbox: Inbox,
        table: DmaTable,
        doorbells: Doorbells,
        counters: DmaCounters,
    ) -> None: ...
    def take_unsent(self) -> bytes:
        """Answers that could not be sent without waiting; once."""
    def run(self, fd: int) -> tuple[bytes, bool, bool]:
        """Handle the plain messages that have arrived before the first other one.

        What comes while Python has its turn is read once, so that a client that is quicker than
        Python does not keep all its messages from the core.

        Args:
            fd: The socket that they are answered on.

        Returns:
            ``(unsent, more, dry)``: answers that could not be sent; whether doorbells are still to
            be served, which are not if there are such answers; and whether nothing is left.
        """
