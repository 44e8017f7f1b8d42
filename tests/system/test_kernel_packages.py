"""Which kernel packages the lab takes, with the layouts that Debian's suites really have.

`packages/` holds each suite's records as `apt-cache show` printed them, shortened.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lab import parts
from lab.parts import CLOUD, FULL, Kernel, PartsError, flavour_of, kernel_packages

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).parent / "packages"
META = f"linux-image-{CLOUD}"
MODULES = ("virtio_pci", "virtio_blk", "virtio-rng", "virtio-iommu")
BOOKWORM = "6.1.0-56-cloud-amd64"
BACKPORT = "6.12.95+deb12-cloud-amd64"
TRIXIE = "6.12.117+deb13-cloud-amd64"
SPLIT = "7.3.4+deb13-cloud-amd64"


def records(suite: str) -> dict[str, str]:
    """The records of a suite by package."""
    stanzas = (HERE / suite).read_text().strip().split("\n\n")
    return {re.findall(r"^Package: (.*)$", text, re.MULTILINE)[0]: text for text in stanzas}


@pytest.mark.parametrize(
    ("suite", "release", "names"),
    [
        ("bookworm", BOOKWORM, ["image"]),
        ("bookworm-backports", BACKPORT, ["image"]),
        ("trixie", TRIXIE, ["image"]),
        ("trixie-backports", SPLIT, ["image", "base", "binary", "modules"]),
    ],
)
def test_a_kernel_is_all_packages_of_its_release(
    suite: str, release: str, names: list[str]
) -> None:
    found, packages = kernel_packages(META, records(suite).__getitem__)
    assert found == release
    assert sorted(packages) == sorted(f"linux-{name}-{release}" for name in names)
    assert flavour_of(release) == CLOUD


def test_a_meta_package_without_a_kernel_is_named() -> None:
    with pytest.raises(PartsError, match="linux-image-cloud-amd64 depends on no kernel"):
        kernel_packages(META, lambda _name: "Depends: linux-base (>= 4.3~) | linux-image-x\n")


def test_flavours_are_told_apart() -> None:
    assert flavour_of("6.1.0-56-amd64") == FULL
    assert flavour_of("6.12.95+deb12-amd64") == FULL
    assert flavour_of("6.12.95+deb12-rt-amd64") == "rt-amd64"
    assert flavour_of("7.3~rc4-cloud-amd64") == CLOUD


def build(directory: Path, package: str, files: dict[str, str]) -> Path:
    """A real .deb with these files."""
    tree = directory / package
    for path, text in {**files, "DEBIAN/control": control(package)}.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
    deb = directory / f"{package}_1_amd64.deb"
    command = ["dpkg-deb", "-Znone", "--root-owner-group", "--build", str(tree), str(deb)]
    subprocess.run(command, check=True, capture_output=True)
    return deb


def control(package: str) -> str:
    return (
        f"Package: {package}\nVersion: 1\nArchitecture: amd64\nMaintainer: n <n@n>\n"
        "Description: for a test\n"
    )


class FakeApt:
    """`PrivateApt` on the recorded records, with packages made up to have their layout."""

    downloaded: list[str]
    missing: frozenset[str]
    lacking: dict[str, set[str]]

    def __init__(self, directory: Path, suite: str, codename: str) -> None:
        self._directory = directory
        self._suite = suite
        directory.mkdir(parents=True)

    def update(self) -> None:
        if self._suite in self.missing:
            raise PartsError("apt-get update: 404 Not Found")

    def show(self, package: str) -> str:
        return records(self._suite)[package]

    def download(self, packages: Sequence[str], tell: parts.Progress) -> list[Path]:
        self.downloaded += packages
        return [build(self._directory, package, self._files(package)) for package in packages]

    def _files(self, package: str) -> dict[str, str]:
        _, kind, release = package.split("-", 2)
        tree = f"{'' if release == BOOKWORM else 'usr/'}lib/modules/{release}"
        lacking = self.lacking.get(release, set())
        drivers = {
            f"{tree}/kernel/drivers/{name}.ko": name for name in MODULES if name not in lacking
        }
        image = f"{tree}/vmlinuz" if kind == "binary" else f"boot/vmlinuz-{release}"
        base = {f"{tree}/modules.builtin": "kernel/drivers/pci/built-in.ko\n"}
        match kind:
            case "modules":
                return drivers
            case "base":
                return base
            case "binary":
                return {image: "linux"}
            case "image" if release == SPLIT:
                return {}
        return {**drivers, **base, image: "linux"}


@pytest.fixture
def apt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeApt]:
    class Apt(FakeApt):
        downloaded: list[str] = []  # noqa: RUF012 - each test has a class of its own
        missing = frozenset()
        lacking = {BOOKWORM: {"virtio-iommu"}}  # noqa: RUF012

    monkeypatch.setattr(parts, "PrivateApt", Apt)
    monkeypatch.setenv("GUESTIO_LAB_CACHE", str(tmp_path / "cache"))
    return Apt


def fetched(monkeypatch: pytest.MonkeyPatch, codename: str) -> Kernel:
    monkeypatch.setattr(parts, "codename", lambda: codename)
    kernel = parts.kernel()
    assert kernel.image.read_text() == "linux"
    assert [module.name for module in kernel.modules(["virtio-iommu"])] == ["virtio_iommu"]
    assert kernel == parts.kernel(), "the second time it comes from the cache"
    return kernel


def test_the_stable_suite_is_preferred(apt: type[FakeApt], monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetched(monkeypatch, "trixie").release == TRIXIE
    assert apt.downloaded == [f"linux-image-{TRIXIE}"]


def test_a_kernel_without_virtio_iommu_is_passed_over(
    apt: type[FakeApt], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fetched(monkeypatch, "bookworm").release == BACKPORT


def test_without_backports_the_next_release_serves(
    apt: type[FakeApt], monkeypatch: pytest.MonkeyPatch
) -> None:
    apt.missing = frozenset({"bookworm-backports"})
    assert fetched(monkeypatch, "bookworm").release == TRIXIE


def test_split_packages_are_put_together(
    apt: type[FakeApt], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # What was left by a lab that took the image's package for all of the kernel.
    stale = tmp_path / "cache/kernels" / SPLIT / "usr/share/doc"
    stale.mkdir(parents=True)
    apt.lacking = {TRIXIE: {"virtio-iommu"}}
    kernel = fetched(monkeypatch, "trixie")
    assert kernel.release == SPLIT
    assert kernel.image.parent.name == SPLIT
    assert not stale.exists()


def test_what_was_tried_is_told(apt: type[FakeApt], monkeypatch: pytest.MonkeyPatch) -> None:
    apt.lacking = {TRIXIE: {"virtio-iommu", "virtio_blk"}}
    apt.missing = frozenset({"trixie-backports"})
    monkeypatch.setattr(parts, "codename", lambda: "trixie")
    with pytest.raises(PartsError) as error:
        parts.kernel()
    assert f"trixie: kernel {TRIXIE} has no virtio_blk, virtio_iommu" in str(error.value)
    assert "trixie-backports: apt-get update: 404" in str(error.value)
    assert not list(parts.cache_directory().glob("fetching-*"))
