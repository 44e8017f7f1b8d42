"""QEMU of trixie-backports, whatever the machine's own release is: 11.1.3 or newer.

It brings what older ones lack: `vhost-user-test-device-pci`, and in its `qemu-img` and `qemu-io` a
vhost-user-blk front-end that is not QEMU's (libblkio). Packages and everything they need are
fetched once, 50 MB, and unpacked to `qemu/` in the lab's cache with a starter for each program;
nothing is installed, and programs run with the libraries that came with them. Another suite has
another version: `trixie` QEMU 10.0.

    python -m lab.qemu             fetch it if need be; print the path for GUESTIO_LAB_QEMU
    python -m lab.qemu --suite trixie
"""

import argparse
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from lab.parts import PartsError, PrivateApt, Progress, cache_directory, codename, locked, run

SUITE = "trixie-backports"
SUITES = (SUITE, "trixie")
PACKAGES = ("qemu-system-x86", "qemu-utils", "qemu-block-extra")
PROGRAMS = ("qemu-system-x86_64", "qemu-img", "qemu-io", "qemu-storage-daemon")
FIRMWARE = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")
LIBRARIES = "usr/lib/x86_64-linux-gnu"


def new_qemu(
    program: str = "qemu-system-x86_64",
    progress: Progress | None = None,
    *,
    suite: str = SUITE,
) -> Path:
    """The starter of a program of the cached QEMU, which is fetched if there is none.

    Safe to call from several processes at once: one fetches, the others wait for it.

    Args:
        program: One of `PROGRAMS`.
        progress: Called with one line of text per step that takes time.
        suite: One of `SUITES`: which QEMU.

    Raises:
        PartsError: It is not to be had.
    """
    tell = progress or _ignore
    home = cache_directory() / "qemu"
    starter = home / suite / program
    if not starter.is_file():
        with locked(home, tell):
            if not starter.is_file():
                _fetch(home, suite, tell)
    return starter


def _ignore(_line: str) -> None:
    pass


def _fetch(home: Path, suite: str, tell: Progress) -> None:
    for leftover in home.glob("fetching-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix="fetching-", dir=home))
    try:
        suites = dict.fromkeys((suite.partition("-")[0], suite))
        apt = PrivateApt(work / "apt", " ".join(suites), codename())
        tell(f"reading the package lists of {suite}")
        apt.update()
        debs = apt.download_closure(PACKAGES, suite, tell)
        tell(f"unpacking {len(debs)} packages")
        made = work / "made"
        made.mkdir()
        for deb in debs:
            run(["dpkg-deb", "-x", str(deb), str(made / "root")])
        for program in PROGRAMS:
            starter = made / program
            starter.write_text(_starter(program))
            starter.chmod(0o755)
        run([str(made / PROGRAMS[0]), "--version"])
        shutil.rmtree(home / suite, ignore_errors=True)
        made.rename(home / suite)
    except PartsError as error:
        raise PartsError(
            f"QEMU of {suite} is not to be had: {error}\nWith network access, "
            f"`python -m lab.qemu --suite {suite}` fetches it."
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _starter(program: str) -> str:
    firmware = [f'-L "$root/{path}"' for path in FIRMWARE]
    options = " ".join(firmware) if program.startswith("qemu-system") else ""
    return (
        "#!/bin/sh\n"
        'root=$(dirname "$(readlink -f "$0")")/root\n'
        f'export QEMU_MODULE_DIR="$root/{LIBRARIES}/qemu"\n'
        'exec "$root/usr/lib64/ld-linux-x86-64.so.2" '
        f'--argv0 "$0" --library-path "$root/{LIBRARIES}" '
        f'"$root/usr/bin/{shlex.quote(program)}" {options} "$@"\n'
    )


def main() -> int:
    """Fetch QEMU and print the path of its starter."""
    parser = argparse.ArgumentParser(prog="python -m lab.qemu", description=main.__doc__)
    parser.add_argument("--suite", choices=SUITES, default=SUITE)
    suite = parser.parse_args().suite
    try:
        path = new_qemu(progress=lambda line: print(line, file=sys.stderr), suite=suite)
    except PartsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
