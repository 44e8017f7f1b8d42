"""A DMA target for the device of a vfio-user server: what is mapped goes to it as messages."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from guestio.dma import DmaError
from guestio.vfio_user.exchange import ServerGoneError
from guestio.vfio_user.messages import DMA_UNMAP, Command, RefusalError

if TYPE_CHECKING:
    from guestio.dma import DmaMapRequest
    from guestio.vfio_user.client import Client


class VfioUserTarget:
    """Lets a vfio-user server's device reach memory of this process: a `guestio.dma.DmaTarget`.

    Memory with a file is shared: the server gets a descriptor, read-only where the device may only
    read, and maps it. Other memory, and that of other devices, is moved by messages (DMA_READ and
    DMA_WRITE), which a thread of the client serves.

    An unmap is answered once the server has answered it. If the connection has ended, it waits for
    the server to close its end, which a process that ends does: then nothing is reached any more.
    A mapping that is there when the connection ends stays the target's: `Client.reconnect` makes
    it anew. For one source, from one thread at a time.

    Args:
        client: The device.
        share: False to pass no descriptors: all memory is moved by messages.
    """

    def __init__(self, client: Client, *, share: bool = True) -> None:
        self._client = client
        self._share = share

    def __repr__(self) -> str:
        return f"<VfioUserTarget of {self._client!r}>"

    def map_dma(self, request: DmaMapRequest) -> None:
        """Let the device reach memory.

        Raises:
            DmaError: It is not possible, or the server refuses or is gone. ``errno`` is the
                server's; checks made before use the number that it would use.
        """
        client = self._client
        with client._operation() as life:
            limits = life.limits
            if (gone := life.exchange.failure) is not None:
                raise _refused(request, f"{gone}; reconnect() the client", errno.ENOTCONN)
            if (request.start | request.size) % limits.page_size:
                reason = f"the server maps multiples of {limits.page_size:#x}"
                raise _refused(request, reason, errno.EINVAL)
            if client._mapped.find(request.start, request.size) is not None:
                raise _refused(request, "a part of it is mapped already", errno.EEXIST)
            if len(client._mapped) >= limits.max_maps:
                reason = f"the server takes {limits.max_maps} mappings: map larger ranges"
                raise _refused(request, reason, errno.ENOSPC)
            try:
                mapping = client._mapped.add(request, share=self._share and limits.max_fds > 0)
            except OSError as error:
                raise _refused(request, str(error.strerror), error.errno) from error
            try:
                if mapping.file is None and request.host_address is None:
                    reason = "it has neither a file that can be shared nor an address here"
                    raise _refused(request, reason, errno.EINVAL)
                life.ask(Command.DMA_MAP, *mapping.message())
            except BaseException as error:
                client._mapped.remove(mapping)
                if isinstance(error, RefusalError):
                    reason = f"the server refuses: {os.strerror(error.number)}"
                    raise _refused(request, reason, error.number) from None
                if isinstance(error, ServerGoneError):
                    # Whether it was mapped is unknown until the server has let go of everything.
                    life.exchange.wait_hang_up(life.exchange.timeout)
                    raise _refused(request, str(error), errno.ENOTCONN) from None
                raise

    def unmap_dma(self, start: int, size: int) -> None:
        """Take a mapping away, as it was made. If nothing is mapped there, nothing happens.

        Raises:
            DmaError: It would cut a mapping; or the server refuses, or is gone without having
                closed its end. Its memory counts as reachable then.
        """
        client = self._client
        with client._operation() as life:
            mapping = client._mapped.find(start, size)
            if mapping is None:
                return
            if (mapping.start, mapping.request.size) != (start, size):
                reason = f"{mapping.start:#x}+{mapping.request.size:#x} was mapped as one"
                raise DmaError("unmap", start, size, reason, errno=errno.EINVAL)
            payload = DMA_UNMAP.pack(DMA_UNMAP.size, 0, start, size)
            mapping.unwanted = True
            try:
                life.ask(Command.DMA_UNMAP, payload, answers=(payload,))
            except RefusalError as error:
                reason = f"the server refuses: {os.strerror(error.number)}"
                raise DmaError("unmap", start, size, reason, errno=error.number) from None
            except ServerGoneError as error:
                if not life.exchange.wait_hang_up(life.exchange.timeout):
                    reason = f"{error}, and has not let go of the memory: end its process"
                    raise DmaError("unmap", start, size, reason, errno=errno.ENOTCONN) from None
            client._mapped.remove(mapping)


def _refused(request: DmaMapRequest, reason: str, number: int | None) -> DmaError:
    return DmaError("map", request.start, request.size, reason, errno=number)
