"""The checks of virtio-iommu devices, by area; importing them puts them into the catalogue."""

from importlib import import_module
from typing import Final

AREAS: Final = (
    "setup",
    "requests",
    "attachments",
    "mappings",
    "probes",
    "reports",
)
"""The modules, in the order in which their checks run."""

for _area in AREAS:
    import_module(f"{__name__}.{_area}")
