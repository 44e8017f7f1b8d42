"""An NVMe controller: :class:`NvmeController`.

``controller`` has registers and life cycle; ``admin`` and ``io`` do commands, ``data`` finds their
data, ``identify``, ``features`` and ``logs`` are what a controller says of itself, ``namespace`` is
an image cut into blocks, ``spec`` has the specification's numbers. Queues and plain reads and
writes are in the core (``guestio._core.nvme``).
"""

from guestio.pci.nvme.controller import NvmeController

__all__ = ["NvmeController"]
