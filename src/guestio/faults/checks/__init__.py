"""The checks, by area; importing them puts them into the catalogue.

Nothing that a check does depends on another one.
"""

from importlib import import_module
from typing import Final

AREAS: Final = (
    "messages",
    "features",
    "lifecycle",
    "split",
    "broken_rings",
    "memory",
    "iotlb",
    "inflight",
    "log",
    "config",
    "blk",
    "devices",
)
"""The modules, in the order in which their checks run."""

for _area in AREAS:
    import_module(f"{__name__}.{_area}")
