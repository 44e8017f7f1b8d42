"""vfio-user's messages over a connected socket."""

from __future__ import annotations

from typing import TypeAlias

from guestio.peer import channel
from guestio.vfio_user.messages import HEADER_SIZE, MAX_FDS, Header

Message: TypeAlias = channel.Message[Header]
"""A received message and the fds that came with it."""


class Channel(channel.Channel[Header]):
    """One end of a vfio-user connection; see :class:`guestio.peer.channel.Channel`."""

    header_size = HEADER_SIZE
    max_fds = MAX_FDS

    def _decode_header(self, data: bytes) -> Header:
        return Header.decode(data)
