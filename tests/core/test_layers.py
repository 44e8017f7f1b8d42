"""The compiled core's layers: each folder cimports and imports only from itself and from below."""

import re
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "src" / "guestio"
CORE = SOURCES / "_core"
LAYERS = ("base", "trace", "memory", "iommu", "virtio", "vhost_user", "pci", "nvme", "vfio_user")
"""From the lowest to the highest."""
BELOW = ("addr", "errors", "budgets")
"""What of Python's modules the core may use."""

IMPORT = re.compile(r"^\s*(?:from|import|cimport)\s+(guestio[\w.]*)", re.MULTILINE)


def imports(file: Path) -> list[str]:
    """The modules of guestio that a file imports or cimports."""
    return IMPORT.findall(file.read_text())


def files(folder: Path) -> list[Path]:
    return sorted(file for kind in ("*.pyx", "*.pxd") for file in folder.glob(kind))


def test_every_folder_is_a_layer() -> None:
    folders = {file.parent.name for kind in ("*.pyx", "*.pxd") for file in CORE.rglob(kind)}
    assert folders - {"_core"} == set(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_knows_itself_and_those_below(layer: str) -> None:
    known = LAYERS[: LAYERS.index(layer) + 1]
    found = files(CORE / layer)
    assert found
    for file in found:
        for name in imports(file):
            parts = name.split(".")
            if parts[1] == "_core":
                assert parts[2] in known, f"{file.name} of {layer} uses {name}"
            else:
                assert parts[1] in BELOW, f"{file.name} of {layer} uses {name}"


def test_the_core_does_not_know_the_load_generator() -> None:
    for file in CORE.rglob("*.py[xd]"):
        assert not any(name.startswith("guestio.guest") for name in imports(file)), file


def test_compiled_modules_are_where_they_belong() -> None:
    places = {file.parent.relative_to(SOURCES).parts[0] for file in SOURCES.rglob("*.pyx")}
    assert places == {"_core", "guest"}
    assert {file.parent for file in (SOURCES / "guest").rglob("*.pyx")} == {
        SOURCES / "guest" / "_load"
    }
