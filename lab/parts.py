"""The guest kernel: found in a cache, or fetched once from the machine's own Debian mirror.

Suites are tried in turn, the machine's own stable one first, and the first kernel that has the
drivers the lab needs is taken: what is in the package decides, not its version. (Debian 12's own
has no virtio-iommu, the one of its backports has; Debian 13's has.) Some suites split a kernel
into several packages; all of them are fetched. Nothing is installed and the system's apt
configuration stays as it is: apt works on private lists below the cache directory, and packages
are only unpacked.

The cache is `$GUESTIO_LAB_CACHE`, or `~/.cache/guestio-lab`. It may be filled beforehand and
shared between processes: fetching takes a file lock, and a kernel appears under its final name
only when it is complete.

    python -m lab.parts            fetch what is missing, say where it is
    python -m lab.parts --update   look for a newer kernel too
"""

import argparse
import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CLOUD = "cloud-amd64"
FULL = "amd64"
# Modules, or built-in drivers, that make a kernel of each flavour fit for the lab.
_NEEDED_BY_ALL = ("virtio_pci", "virtio_blk", "virtio_rng", "virtio_iommu")
NEEDED = {
    CLOUD: _NEEDED_BY_ALL,
    FULL: (*_NEEDED_BY_ALL, "9pnet_virtio", "9p", "overlay", "vfio_iommu_type1", "vfio_pci"),
}
# A kernel package is data and serves on every release; the keys of later releases are in every
# release's keyring.
KERNEL_SUITES = ("{codename}", "{codename}-backports", "trixie")

Progress = Callable[[str], None]


class PartsError(RuntimeError):
    """Something the lab needs is missing; the message names it and the command that gets it."""


@dataclass(frozen=True, slots=True)
class KernelModule:
    """One kernel module, decompressed, ready for `insmod`."""

    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked Debian kernel package. Immutable; safe to share between threads.

    Attributes:
        release: What `uname -r` prints in the guest, such as `6.12.95+deb12-cloud-amd64`.
        root: Directory the package was unpacked to.
    """

    release: str
    root: Path

    @property
    def image(self) -> Path:
        """The compressed kernel that QEMU's `-kernel` takes; of User-mode Linux, the program."""
        places = (
            self.root / "boot" / f"vmlinuz-{self.release}",
            # Where packages that are split in image and modules have it.
            self.root / "usr/lib/modules" / self.release / "vmlinuz",
            self.root / "usr/bin/linux.uml",
        )
        return next((place for place in places if place.is_file()), places[0])

    def lacks(self, names: Iterable[str]) -> list[str]:
        """Those of the named modules that are neither built in nor in the package."""
        try:
            built_in, files = self._drivers()
        except PartsError:
            return list(names)
        there = built_in | files.keys()
        return [name for name in names if name.replace("-", "_") not in there]

    def modules(self, names: Iterable[str]) -> list[KernelModule]:
        """Modules in the order they must be inserted, each after what it depends on.

        The package carries no `modules.dep` (installing it would make one), so dependencies
        come from each module's own `depends=` record, as depmod takes them.

        Args:
            names: Module names; `-` and `_` are the same. Those built into the kernel are
                left out of the result.

        Raises:
            PartsError: A module is neither built in nor in the package.
        """
        built_in, files = self._drivers()
        ordered: dict[str, KernelModule] = {}

        def visit(name: str) -> None:
            name = name.replace("-", "_")
            if name in built_in or name in ordered:
                return
            if name not in files:
                raise PartsError(f"kernel {self.release} has no module {name}")
            data = _decompressed(files[name])
            record = re.search(rb"\0depends=([^\0]*)\0", data)
            for dependency in record.group(1).decode().split(",") if record else []:
                if dependency:
                    visit(dependency)
            ordered[name] = KernelModule(name, data)

        for name in names:
            visit(name)
        return list(ordered.values())

    def _drivers(self) -> tuple[set[str], dict[str, Path]]:
        """Names of what is built in, and the files of the modules."""
        # Packages of a merged-/usr system unpack to usr/lib, older ones to lib.
        for prefix in ("usr/lib", "lib", "usr/lib/uml"):
            tree = self.root / prefix / "modules" / self.release
            if (tree / "modules.builtin").is_file():
                lines = (tree / "modules.builtin").read_text().split()
                files = {_module_name(path): path for path in (tree / "kernel").rglob("*.ko*")}
                return {_module_name(Path(line)) for line in lines}, files
        raise PartsError(f"no modules of kernel {self.release} below {self.root}")


def cache_directory() -> Path:
    """Where the parts are kept: `$GUESTIO_LAB_CACHE`, or `~/.cache/guestio-lab`."""
    configured = os.environ.get("GUESTIO_LAB_CACHE")
    return Path(configured).absolute() if configured else Path.home() / ".cache" / "guestio-lab"


def kernel(
    flavour: str = CLOUD, *, update: bool = False, progress: Progress | None = None
) -> Kernel:
    """Return the newest cached guest kernel, fetching one if there is none.

    Safe to call from several processes at once: one fetches, the others wait for it.

    Args:
        flavour: Debian's name for what the kernel is made for: `CLOUD` (35 MB to fetch) has the
            drivers of virtual machines only, `FULL` (106 MB) has them all, 9p among them.
        update: Ask the mirror for a newer kernel even when one is cached.
        progress: Called with one line of text per step that takes time.

    Raises:
        PartsError: No kernel cached and none to be had; the message says what was tried.
    """
    tell = progress or _ignore
    found = _newest(cache_directory(), flavour)
    if found is not None and not update:
        return found
    return _fetch_kernel(cache_directory(), flavour, tell, refetch=update)


def require_program(name: str, package: str) -> str:
    """Path of a host program.

    Raises:
        PartsError: It is not installed; the message names the Debian package and the command.
    """
    # Administration tools (mke2fs) stand outside an ordinary user's PATH.
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        raise PartsError(
            f"{name} is not installed: run `apt-get install --no-install-recommends {package}`"
        )
    return path


def debian_source(suite: str, codename: str, apt: Path = Path("/etc/apt")) -> str:
    """A deb822 source for `suite`, with the mirror and keys the machine uses for its release.

    Args:
        suite: The suite wanted, such as `bookworm-backports`; or several, with blanks between.
        codename: The release whose own source is the model.
        apt: Apt's configuration directory.

    Raises:
        PartsError: The machine has no source for its release.
    """
    for stanza in _configured_sources(apt):
        usable = (
            "deb" in stanza.get("types", "").split()
            and codename in stanza.get("suites", "").split()
            and "main" in stanza.get("components", "").split()
            and stanza.get("enabled", "yes").lower() not in {"no", "false", "0"}
        )
        if usable:
            lines = [
                "Types: deb",
                f"URIs: {stanza['uris']}",
                f"Suites: {suite}",
                "Components: main",
                "Architectures: amd64",
            ]
            if "signed-by" in stanza:
                lines.append(f"Signed-By: {stanza['signed-by']}")
            return "\n".join(lines) + "\n"
    raise PartsError(f"no source for `{codename} main` in {apt}/sources.list or sources.list.d")


def _ignore(_line: str) -> None:
    pass


def _module_name(path: Path) -> str:
    return path.name.split(".ko")[0].replace("-", "_")


def _decompressed(path: Path) -> bytes:
    if path.suffix != ".xz":
        return path.read_bytes()
    # Not Python's lzma, which is often missing from a Python that was built by hand.
    command = [require_program("xz", "xz-utils"), "--decompress", "--stdout", str(path)]
    return subprocess.run(command, capture_output=True, check=True).stdout


def _version(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release))


def flavour_of(release: str) -> str:
    """The flavour in a release's name: `6.12.95+deb12-cloud-amd64`, `6.1.0-56-amd64`."""
    return re.sub(r"^[\w.+~]+-(\d+-)?", "", release)


def _newest(cache: Path, flavour: str) -> Kernel | None:
    kernels = [Kernel(path.name, path) for path in (cache / "kernels").glob("[0-9]*")]
    usable = [
        entry for entry in kernels if flavour_of(entry.release) == flavour and entry.image.is_file()
    ]
    return max(usable, key=lambda entry: _version(entry.release), default=None)


@contextlib.contextmanager
def locked(cache: Path, tell: Progress) -> Iterator[None]:
    """Hold a directory's lock, which is made with it; waits while another process holds it."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("waiting for another process that makes a guest kernel")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch_kernel(cache: Path, flavour: str, tell: Progress, *, refetch: bool) -> Kernel:
    require_program("apt-get", "apt")
    try:
        with locked(cache, tell):
            found = _newest(cache, flavour)
            if found is not None and not refetch:
                return found
            for leftover in cache.glob("fetching-*"):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix="fetching-", dir=cache))
            try:
                return _fetch_into(cache / "kernels", flavour, work, tell)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise PartsError(
            f"cannot write the guest kernel to {cache}: {error}; "
            "set GUESTIO_LAB_CACHE to a directory you may write to"
        ) from error


def _fetch_into(kernels: Path, flavour: str, work: Path, tell: Progress) -> Kernel:
    release_name = codename()
    tried: list[str] = []
    for suite in dict.fromkeys(name.format(codename=release_name) for name in KERNEL_SUITES):
        try:
            apt = PrivateApt(work / suite, suite, release_name)
            tell(f"reading the package list of {suite}")
            apt.update()
            release, packages = kernel_packages(f"linux-image-{flavour}", apt.show)
            kernel = Kernel(release, kernels / release)
            if not kernel.image.is_file():
                kernel = _unpack_kernel(release, apt.download(packages, tell), work / suite)
            lacking = kernel.lacks(NEEDED[flavour])
            if lacking:
                raise PartsError(f"kernel {release} has no {', '.join(lacking)}")
            return _kept(kernel, kernels)
        except PartsError as error:
            tried.append(f"  {suite}: {error}")
    raise PartsError(
        f"no guest kernel to be had from this machine's Debian mirror (linux-image-{flavour}):\n"
        + "\n".join(tried)
        + "\nWith network access, `python -m lab.parts` fetches it; a filled cache can be copied "
        "from another machine and named by GUESTIO_LAB_CACHE."
    )


def _unpack_kernel(release: str, debs: Iterable[Path], work: Path) -> Kernel:
    for deb in debs:
        run(["dpkg-deb", "-x", str(deb), str(work / "root")])
    kernel = Kernel(release, work / "root")
    if not kernel.image.is_file():
        raise PartsError(f"the packages of kernel {release} have no {kernel.image.name}")
    return kernel


def _kept(kernel: Kernel, kernels: Path) -> Kernel:
    target = kernels / kernel.release
    if kernel.root != target:
        kernels.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)  # was made when split packages were not known
        kernel.root.rename(target)
    return Kernel(kernel.release, target)


def kernel_packages(meta: str, show: Callable[[str], str]) -> tuple[str, list[str]]:
    """Which packages make up the kernel that a meta package stands for.

    Args:
        meta: Such as `linux-image-amd64`.
        show: Returns a package's record, as `apt-cache show` prints it.

    Returns:
        The kernel's release, and the names of its packages: the one that the meta package depends
        on and what that depends on of the same release (image, modules, files for both).

    Raises:
        PartsError: The meta package depends on no kernel.
    """
    found = [name for name in _dependencies(show(meta)) if re.match(r"linux-image-\d", name)]
    if not found:
        raise PartsError(f"{meta} depends on no kernel")
    release = found[0].removeprefix("linux-image-")
    packages: list[str] = []
    while found:
        name = found.pop()
        if name not in packages:
            packages.append(name)
            found += [n for n in _dependencies(show(name)) if n.endswith(f"-{release}")]
    return release, packages


def _dependencies(record: str) -> list[str]:
    """Names of all packages that a record depends on, alternatives included."""
    fields = re.findall(r"^(?:Pre-)?Depends: (.*(?:\n[ \t].*)*)", record, re.MULTILINE)
    return re.findall(r"(?:^|[,|])\s*([a-z0-9][a-z0-9.+~-]*)", ",".join(fields))


class PrivateApt:
    """Apt on a source list, package lists and caches of its own; needs no root."""

    def __init__(self, directory: Path, suite: str, codename: str) -> None:
        self._directory = directory
        (directory / "lists" / "partial").mkdir(parents=True)
        (directory / "archives" / "partial").mkdir(parents=True)
        sources = directory / "sources.list.d"
        sources.mkdir()
        (sources / "lab.sources").write_text(debian_source(suite, codename))
        self._options = [
            option
            for setting in (
                "Dir::Etc::sourcelist=/dev/null",
                f"Dir::Etc::sourceparts={sources}",
                "Dir::Etc::preferences=/dev/null",
                "Dir::Etc::preferencesparts=/dev/null",
                f"Dir::State::lists={directory}/lists",
                f"Dir::Cache={directory}",
                "Acquire::Languages=none",
                "Acquire::Retries=3",
                # The unprivileged user apt downloads as could not write to our directory.
                "APT::Sandbox::User=root",
            )
            for option in ("-o", setting)
        ]

    def update(self) -> None:
        """Fetch the suite's package list; before anything else."""
        run(["apt-get", *self._options, "-qq", "update", "--error-on=any"])

    def names(self, pattern: str) -> list[str]:
        """Names of the packages whose name matches a regular expression."""
        listing = run(["apt-cache", *self._options, "search", "--names-only", pattern])
        return [line.split(" ", 1)[0] for line in listing.splitlines()]

    def show(self, package: str) -> str:
        """A package's record."""
        return run(["apt-cache", *self._options, "show", "--no-all-versions", package])

    def download(self, packages: Sequence[str], tell: Progress) -> list[Path]:
        """Fetch and authenticate packages; returns the .debs."""
        tell(f"downloading {' '.join(packages)}")
        run(["apt-get", *self._options, "-qq", "download", *packages], cwd=self._directory)
        debs = list(self._directory.glob("*.deb"))
        if len(debs) != len(packages):
            raise PartsError(
                f"apt-get download {' '.join(packages)} left {len(debs)} packages in "
                f"{self._directory}"
            )
        return debs

    def download_closure(self, packages: Sequence[str], target: str, tell: Progress) -> list[Path]:
        """Fetch packages with everything that they need on a machine that has nothing.

        Args:
            packages: What is wanted.
            target: The suite whose versions are preferred.
            tell: Told what is done.
        """
        tell(f"downloading {' '.join(packages)} of {target} and what they need")
        empty = self._directory / "status"
        empty.touch()
        settings = (f"Dir::State::status={empty}", "Debug::NoLocking=1")
        options = [option for setting in settings for option in ("-o", setting)]
        command = ["apt-get", *self._options, *options, "-qq", "-y", "--no-install-recommends"]
        run([*command, "--download-only", "-t", target, "install", *packages])
        return list((self._directory / "archives").glob("*.deb"))


def run(command: list[str], cwd: Path | None = None) -> str:
    """Run a program and return what it prints.

    Raises:
        PartsError: It cannot be run or failed; says what it said.
    """
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except OSError as error:
        raise PartsError(f"cannot run {command[0]}: {error}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        what = next((word for word in command[1:] if re.fullmatch("[a-z]+", word)), "")
        raise PartsError(f"{command[0]} {what}: {said}")
    return done.stdout


def codename() -> str:
    """The name of this machine's Debian release, such as `bookworm`.

    Raises:
        PartsError: It is another distribution.
    """
    text = Path("/etc/os-release").read_text()
    fields: dict[str, str] = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', text, re.MULTILINE))
    if fields.get("ID") != "debian" or "VERSION_CODENAME" not in fields:
        raise PartsError(
            "this machine is no Debian release, so its apt cannot fetch the guest kernel; copy "
            f"a filled cache from a Debian machine to {cache_directory()}"
        )
    return fields["VERSION_CODENAME"]


def _configured_sources(apt: Path) -> Iterator[dict[str, str]]:
    """Every configured source as deb822 fields, names in lower case (sources.list(5))."""
    one_line = [apt / "sources.list", *sorted(apt.glob("sources.list.d/*.list"))]
    for path in filter(Path.is_file, one_line):
        pattern = r"^\s*(deb)\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s+([^#\n]*)"
        for match in re.finditer(pattern, path.read_text(), re.MULTILINE):
            kind, options, uri, suite, components = match.groups()
            stanza = {"types": kind, "uris": uri, "suites": suite, "components": components}
            for option in (options or "").split():
                name, _, value = option.partition("=")
                stanza[name.lower()] = value
            yield stanza
    for path in sorted(apt.glob("sources.list.d/*.sources")):
        text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE)
        for block in re.split(r"\n\s*\n", text):
            # A continuation line starts with a blank; an inline key spans many of them.
            fields = re.findall(r"^([\w-]+):[ \t]*(.*(?:\n[ \t]+.*)*)", block, re.MULTILINE)
            yield {name.lower(): value.rstrip() for name, value in fields}


def main() -> int:
    """Fetch what the lab needs and print where it is."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.parts", description="Fetch and cache the lab's guest kernel."
    )
    parser.add_argument("--update", action="store_true", help="look for a newer kernel too")
    arguments = parser.parse_args()
    start = time.monotonic()

    def tell(line: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - start:5.1f} s] {line}\n")

    try:
        found = kernel(update=arguments.update, progress=tell)
    except PartsError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"kernel {found.release}\n{found.image}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
