"""The checks of vfio-user servers, by area; importing them puts them into the catalogue."""

from importlib import import_module
from typing import Final

AREAS: Final = (
    "messages",
    "regions",
    "config",
    "interrupts",
    "dma",
    "life",
    "virtio",
    "nvme",
)
"""The modules, in the order in which their checks run."""

for _area in AREAS:
    import_module(f"{__name__}.{_area}")
