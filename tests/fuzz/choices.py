"""Random choices that come from a string of bytes, so that a fuzzer can make them."""

from __future__ import annotations

import random


class Choices(random.Random):
    """Takes all its randomness from ``data``; when that is used up, everything is 0.

    Attributes:
        left: Bytes that were not used yet.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data = data
        self.left = len(data)

    def getrandbits(self, k: int, /) -> int:
        size = (k + 7) // 8
        at = len(self._data) - self.left
        self.left = max(self.left - size, 0)
        return int.from_bytes(self._data[at : at + size], "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(8) / 256
