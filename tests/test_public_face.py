"""What users meet before they read any documentation: names, reprs, truth, errors, signatures."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys

import pytest

import guestio
from guestio import (
    AccessError,
    AtomicBitmap,
    CannotResolveError,
    DmaError,
    GuestioError,
    GuestMemoryAtomic,
    GuestRegionCollection,
    InvalidAddressError,
    Iotlb,
    IotlbFails,
    IovaRange,
    MemoryVanishedError,
    PartialAccessError,
    Permissions,
    RegionManager,
)

PACKAGES = ("cli", "dma", "faults", "guest", "iommu", "memory", "testing", "vhost_user", "virtio")
PUBLIC = [
    (module, name)
    for module in ("", ".memory", ".dma", ".iommu", ".virtio", ".vhost_user", ".guest", ".testing")
    for name in __import__(f"guestio{module}", fromlist=["__all__"]).__all__
]


def public(module: str, name: str) -> object:
    return getattr(__import__(f"guestio{module}", fromlist=[name]), name)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_attributes_and_are_imported_when_used(package: str) -> None:
    program = (
        f"import guestio; print(guestio.{package}.__name__); print({package!r} in dir(guestio))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == [f"guestio.{package}", "True"]


def test_an_attribute_that_is_none_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'vhostuser'"):
        guestio.vhostuser  # noqa: B018 - the access is what is tested


def test_importing_guestio_does_not_import_the_command() -> None:
    program = "import guestio, sys; print([n for n in ('click', 'rich') if n in sys.modules])"
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert said.stdout == "[]\n"


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_a_class_is_at_home_where_users_find_it(module: str, name: str) -> None:
    thing = public(module, name)
    if isinstance(thing, type):
        assert "_core" not in thing.__module__
        assert thing.__name__ == name


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_a_class_has_a_signature(module: str, name: str) -> None:
    thing = public(module, name)
    if isinstance(thing, type) and not issubclass(thing, BaseException):
        assert inspect.signature(thing) is not None


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_a_class_says_what_one_wants_to_know_while_debugging(module: str, name: str) -> None:
    thing = public(module, name)
    if isinstance(thing, type) and not inspect.isabstract(thing):
        if getattr(thing, "_is_protocol", False):
            return
        assert thing.__repr__ is not object.__repr__


@pytest.mark.parametrize(
    "empty",
    [
        GuestRegionCollection(),
        GuestMemoryAtomic(GuestRegionCollection()),
        Iotlb(),
        AtomicBitmap(0),
        RegionManager(),
        guestio.BasicMemoryMapper(),
        guestio.VolatileSlice.over(b""),
    ],
    ids=lambda empty: type(empty).__name__,
)
def test_what_is_empty_is_true_and_has_a_repr(empty: object) -> None:
    assert empty
    assert type(empty).__name__ in repr(empty)


def test_an_address_in_memory() -> None:
    memory = GuestRegionCollection.from_ranges([(0x1000, 0x1000), (0x2000, 0x1000)])
    assert 0x1000 in memory
    assert 0x2FFF in memory
    assert 0xFFF not in memory
    assert 0x3000 not in memory


R = Permissions.READ
ERRORS = [
    GuestioError("text"),
    AccessError(1, 2, R, "why", target=3, region=GuestRegionCollection()),
    InvalidAddressError(1, 2, None, "why"),
    MemoryVanishedError(1, 2, R, "why"),
    PartialAccessError(1, 2, R, 1, "why"),
    CannotResolveError(IovaRange(1, 2), R, "why"),
    IotlbFails([IovaRange(1, 2)], [IovaRange(3, 4)]),
    DmaError("map", 0x1000, 0x1000, "why", errno=17),
    guestio.ProtocolError("text"),
    guestio.dma.ReentrantCallError("text"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_pickle(error: GuestioError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.args == error.args
    for name, value in vars(error).items():
        expected = str(value) if name == "region" and value is not None else value
        assert getattr(again, name) == expected
    if isinstance(error, OSError):
        assert again.errno == error.errno


def test_errors_are_one_tree() -> None:
    def below(kind: type) -> set[type]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    known = below(GuestioError)
    for module, name in PUBLIC:
        thing = public(module, name)
        if isinstance(thing, type) and issubclass(thing, BaseException):
            assert thing in known
