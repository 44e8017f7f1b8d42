"""A namespace: an image, cut into blocks."""

from __future__ import annotations

import hashlib
import os
from typing import Final

from guestio._core.nvme.queues import Namespace as CoreNamespace
from guestio.virtio.image import Image

BLOCK_SIZES: Final = (512, 4096)


class Namespace:
    """A namespace of a controller.

    Args:
        path: The image.
        number: Its identifier, from 1 on.
        block_size: Bytes of a block, 512 or 4096; the image is a multiple of it.
        read_only: Whether writes are refused.
        waits: Whether reads wait for the disk where commands are fetched.
        serial: Of the controller; with ``number`` it makes the identifier that is unique.

    Raises:
        DeviceError: The image cannot be opened, or has no such size.

    Attributes:
        image: The image.
        number: As given.
        block_size: As given.
        read_only: As given.
        guid: 16 bytes, the same for the same serial number and ``number``.
        core: What the core serves reads and writes from.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        number: int,
        *,
        block_size: int,
        read_only: bool,
        waits: bool,
        serial: str,
    ) -> None:
        self.image = Image(path, read_only=read_only, waits=waits, multiple=block_size)
        self.number, self.block_size, self.read_only = number, block_size, read_only
        self.guid = hashlib.sha256(f"guestio {serial} {number}".encode()).digest()[:16]
        self.core = CoreNamespace(self.image.file, self.shift, not read_only)

    @property
    def shift(self) -> int:
        """Bits of a block's size."""
        return self.block_size.bit_length() - 1

    @property
    def blocks(self) -> int:
        """How many there are."""
        return self.image.size // self.block_size
