"""A disk of which a power loss leaves a mixture of what was flushed and what was written since."""

from __future__ import annotations

import errno
import os
import random
from typing import Final

SECTOR: Final = 512


def chooser(seed: float) -> random.Random:
    """What makes choices, always the same ones for a seed."""
    return random.Random(seed)  # noqa: S311 - they must be repeatable


class Disk:
    """An image in memory, and what of it is on the medium.

    Args:
        sectors: How large it is.

    Attributes:
        path: The image, for a device to open.
        sectors: As given.
        flushes: How often it was flushed.
        fails: Whether the next flush fails, for want of a good medium.
    """

    def __init__(self, sectors: int) -> None:
        self.sectors = sectors
        self.flushes = 0
        self.fails = False
        self._fd = os.memfd_create("guestio-disk", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, sectors * SECTOR)
        self.path = f"/proc/self/fd/{self._fd}"
        self._medium = self.content()

    def content(self) -> bytes:
        """What a program of the host reads now."""
        return os.pread(self._fd, self.sectors * SECTOR, 0)

    def flush(self) -> None:
        """Put what was written on the medium; what a device's ``Image`` does by `fdatasync`.

        Raises:
            OSError: It failed.
        """
        if self.fails:
            self.fails = False
            raise OSError(errno.EIO, "the simulated medium failed")
        self.flushes += 1
        self._medium = self.content()

    def snapshot(self) -> tuple[bytes, bytes]:
        """What :meth:`restore` takes: the image and the medium."""
        return self.content(), self._medium

    def restore(self, state: tuple[bytes, bytes]) -> None:
        """Have it as it was."""
        content, self._medium = state
        os.pwrite(self._fd, content, 0)

    def lose_power(self, rng: random.Random) -> None:
        """Each sector that was written since the last flush is on the medium, or is not."""
        written, kept = self.content(), bytearray(self._medium)
        share = rng.random()
        for at in range(0, len(kept), SECTOR):
            now = written[at : at + SECTOR]
            if now != kept[at : at + SECTOR] and rng.random() < share:
                kept[at : at + SECTOR] = now
        os.pwrite(self._fd, kept, 0)
        self._medium = bytes(kept)

    def close(self) -> None:
        """Let it go. May be called again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
