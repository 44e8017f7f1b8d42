"""A kernel with iommufd, built from Debian's kernel source; no Debian kernel has it.

`vfio.config` says what is in it; everything is built in, so a guest needs no modules. Building
takes 10 CPU minutes and 2 GiB below the cache directory, once; the result is 3.5 MB at
`iommufd/<version>/bzImage` in the cache (`$GUESTIO_LAB_CACHE` or `~/.cache/guestio-lab`). A kernel
built elsewhere can be put there.

    python -m lab.kernel           build it if it is not cached, say where it is
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from lab.parts import (
    PartsError,
    PrivateApt,
    Progress,
    cache_directory,
    codename,
    locked,
    require_program,
    run,
)

CONFIG = Path(__file__).parent / "vfio.config"
# The first with dma-buf export of BARs; iommufd itself is older.
OLDEST_SOURCE = (6, 19)
# Where sources of newer kernels than this release's are found; the suite's keys are in every
# release's keyring package. The package is plain data and fits everywhere.
SUITES = ("{codename}-backports", "trixie-backports", "sid")
TOOLS = {
    "gcc": "gcc",
    "make": "make",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "m4": "m4",
    "xz": "xz-utils",
}
LIBELF = Path("/usr/include/libelf.h")


def cached() -> Path | None:
    """The newest cached kernel image, or None.

    One that was built here must be of the present configuration; of one that was put there,
    without a digest in its directory's name, that is not known.
    """
    directory = cache_directory() / "iommufd"
    images = [
        image
        for image in directory.glob("[0-9]*/bzImage")
        if image.parent.name.partition("-")[2] in ("", _digest())
    ]
    return max(images, key=lambda image: _numbers(image.parent.name), default=None)


def build(progress: Progress) -> Path:
    """Return the kernel image, building it if there is none.

    Safe to call from several processes at once: one builds, the others wait for it.

    Args:
        progress: Called with one line of text per step.

    Raises:
        PartsError: It cannot be built; says what is missing.
    """
    home = cache_directory() / "iommufd"
    found = cached()
    if found is not None:
        return found
    with locked(home, progress):
        found = cached()
        if found is not None:
            return found
        _require_tools()
        for leftover in home.glob("building-*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix="building-", dir=home))
        try:
            return _build_in(work, home, progress)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _require_tools() -> None:
    packages = []
    for program, package in TOOLS.items():
        try:
            require_program(program, package)
        except PartsError:
            packages.append(package)
    if not LIBELF.is_file():
        packages.append("libelf-dev")
    if packages:
        raise PartsError(
            "building the kernel needs more programs: run `apt-get install "
            f"--no-install-recommends {' '.join(packages)}`"
        )


def _build_in(work: Path, home: Path, progress: Progress) -> Path:
    archive = _fetch_source(work, progress)
    progress(f"unpacking {archive.name}")
    run(["tar", "-xf", str(archive), "-C", str(work)])
    archive.unlink()
    (source,) = work.glob("linux-source-*")
    output = work / "output"
    output.mkdir()
    make = ["make", "-s", "-C", str(source), f"O={output}"]
    run([*make, f"KCONFIG_ALLCONFIG={CONFIG}", "allnoconfig"])
    _check_config(output / ".config")
    progress("compiling; 5 minutes on two free processors")
    with (work / "build.log").open("wb") as log:
        done = subprocess.run(
            ["nice", *make, f"-j{os.cpu_count() or 1}", "bzImage"],
            stdout=log,
            stderr=log,
            check=False,
        )
    if done.returncode != 0:
        tail = (work / "build.log").read_text(errors="replace").splitlines()[-20:]
        raise PartsError("the kernel does not compile:\n" + "\n".join(tail))
    version = run([*make, "kernelversion"]).strip()
    target = home / f"{version}-{_digest()}"
    staged = work / "done"
    staged.mkdir()
    shutil.copy(output / "arch/x86/boot/bzImage", staged / "bzImage")
    shutil.copy(output / ".config", staged / "config")
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
    return target / "bzImage"


def _fetch_source(work: Path, progress: Progress) -> Path:
    """Fetch the newest kernel source to be had; returns the archive in it."""
    release = codename()
    tried = []
    for suite in dict.fromkeys(name.format(codename=release) for name in SUITES):
        try:
            apt = PrivateApt(work / suite, suite, release)
            progress(f"reading the package list of {suite}")
            apt.update()
            names = apt.names(r"^linux-source-[0-9]")
            package = max(names, key=_numbers, default="linux-source-0")
            if _numbers(package) < OLDEST_SOURCE:
                raise PartsError(f"its newest source is {package}")
            progress("fetching the kernel's source (165 MB)")
            [deb] = apt.download([package], progress)
            run(["dpkg-deb", "-x", str(deb), str(work / "package")])
            deb.unlink()
            (archive,) = (work / "package/usr/src").glob("linux-source-*.tar.xz")
        except PartsError as error:
            tried.append(f"  {suite}: {error}")
        else:
            return archive
    wanted = ".".join(map(str, OLDEST_SOURCE))
    raise PartsError(
        f"no kernel source of at least {wanted} to be had from this machine's Debian mirror:\n"
        + "\n".join(tried)
        + f"\nA bzImage built elsewhere with {CONFIG} does too: put it at "
        f"{cache_directory()}/iommufd/<version>/bzImage"
    )


def _check_config(config: Path) -> None:
    """Every option asked for must have been taken: one that was renamed would vanish silently."""
    taken = set(config.read_text().splitlines())
    wanted = re.findall(r"^CONFIG_\w+=.*$", CONFIG.read_text(), re.MULTILINE)
    lost = [line for line in wanted if line not in taken]
    if lost:
        raise PartsError(f"this kernel does not take {', '.join(lost)} of {CONFIG}")


def _digest() -> str:
    return hashlib.sha256(CONFIG.read_bytes()).hexdigest()[:8]


def _numbers(name: str) -> tuple[int, ...]:
    # Of a directory only the version counts, not the digest of the configuration behind it.
    version = re.search(r"\d+(?:\.\d+)*", name)
    return tuple(map(int, version.group().split("."))) if version else ()
