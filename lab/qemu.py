"""Programs of other Debian releases, whatever the machine's own release is, with all they need.

QEMU of trixie-backports, 11.1.3 or newer, brings what older ones lack:
`vhost-user-test-device-pci`, and in its `qemu-img` and `qemu-io` a vhost-user-blk front-end that is
not QEMU's (libblkio). The others are to be judged (`lab.verdicts`): QEMU 7.2, virtiofsd and DPDK's
testpmd.

Packages and everything they need are fetched once (QEMU: 50 MB) and unpacked to `qemu/` in the
lab's cache with a starter for each program; nothing is installed, and programs run with the
libraries that came with them.

    python -m lab.qemu             fetch QEMU if need be; print the path for GUESTIO_LAB_QEMU
    python -m lab.qemu --suite trixie      QEMU 10.0
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lab.parts import PartsError, PrivateApt, Progress, cache_directory, codename, locked, run

FIRMWARE = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")
LIBRARIES = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")
LOADERS = ("usr/lib64/ld-linux-x86-64.so.2", "lib64/ld-linux-x86-64.so.2")


@dataclass(frozen=True, slots=True)
class Programs:
    """Programs of a Debian suite that are unpacked together.

    Attributes:
        name: Their directory in the cache.
        suite: The suite whose versions are taken.
        packages: What they are in.
        paths: The place of each in the packages, by its name; the first one is tried with
            ``--help`` once it is unpacked.
    """

    name: str
    suite: str
    packages: tuple[str, ...]
    paths: Mapping[str, str]

    def starter(self, program: str, progress: Progress | None = None) -> Path:
        """The starter of a program, which is fetched if it is not in the cache.

        Safe to call from several processes at once: one fetches, the others wait for it.

        Args:
            program: One of ``paths``.
            progress: Called with one line of text per step that takes time.

        Raises:
            PartsError: It is not to be had.
        """
        tell = progress or _ignore
        home = cache_directory() / "qemu"
        starter = home / self.name / program
        if not starter.is_file():
            with locked(home, tell):
                if not starter.is_file():
                    self._fetch(home, tell)
        return starter

    def _fetch(self, home: Path, tell: Progress) -> None:
        for leftover in home.glob("fetching-*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix="fetching-", dir=home))
        try:
            suites = " ".join(dict.fromkeys((self.suite.partition("-")[0], self.suite)))
            apt = PrivateApt(work / "apt", suites, codename())
            tell(f"reading the package lists of {self.suite}")
            apt.update()
            debs = apt.download_closure(self.packages, self.suite, tell)
            tell(f"unpacking {len(debs)} packages")
            made = work / "made"
            made.mkdir()
            for deb in debs:
                run(["dpkg-deb", "-x", str(deb), str(made / "root")])
            for program, path in self.paths.items():
                starter = made / program
                starter.write_text(_starter(made / "root", program, path))
                starter.chmod(0o755)
            run([str(made / next(iter(self.paths))), "--help"])
            shutil.rmtree(home / self.name, ignore_errors=True)
            made.rename(home / self.name)
        except PartsError as error:
            raise PartsError(
                f"{', '.join(self.packages)} of {self.suite} is not to be had: {error}\n"
                "With network access, `python -m lab.qemu` fetches QEMU, and `./run lab-verdicts` "
                "what it needs."
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)


SUITE: Final = "trixie-backports"
SUITES: Final = (SUITE, "trixie")
QEMU: Final = {
    suite: Programs(
        suite,
        suite,
        ("qemu-system-x86", "qemu-utils", "qemu-block-extra"),
        {
            name: f"usr/bin/{name}"
            for name in ("qemu-system-x86_64", "qemu-img", "qemu-io", "qemu-storage-daemon")
        },
    )
    for suite in SUITES
}
"""QEMU by the suite that it is from."""
NEW_QEMU: Final = QEMU[SUITE]
OLD_QEMU: Final = Programs(
    "bookworm",
    "bookworm",
    ("qemu-system-x86", "qemu-utils"),
    {
        "qemu-system-x86_64": "usr/bin/qemu-system-x86_64",
        "qemu-storage-daemon": "usr/bin/qemu-storage-daemon",
        "virtiofsd": "usr/lib/qemu/virtiofsd",
    },
)
VIRTIOFSD: Final = Programs(
    "trixie-virtiofsd", "trixie", ("virtiofsd",), {"virtiofsd": "usr/libexec/virtiofsd"}
)
DPDK: Final = Programs("trixie-dpdk", "trixie", ("dpdk-dev",), {"testpmd": "usr/bin/dpdk-testpmd"})


def new_qemu(
    program: str = "qemu-system-x86_64",
    progress: Progress | None = None,
    *,
    suite: str = SUITE,
) -> Path:
    """The starter of a program of `QEMU`; see :meth:`Programs.starter`."""
    return QEMU[suite].starter(program, progress)


def _ignore(_line: str) -> None:
    pass


def _starter(root: Path, program: str, path: str) -> str:
    firmware = [f'-L "$root/{place}"' for place in FIRMWARE]
    options = " ".join(firmware) if program.startswith("qemu-system") else ""
    loader = next(place for place in LOADERS if (root / place).exists())
    libraries = ":".join(f"$root/{place}" for place in LIBRARIES)
    return (
        "#!/bin/sh\n"
        'root=$(dirname "$(readlink -f "$0")")/root\n'
        f'export QEMU_MODULE_DIR="$root/{LIBRARIES[0]}/qemu"\n'
        f'exec "$root/{loader}" '
        f'--argv0 "$0" --library-path "{libraries}" '
        f'"$root/{shlex.quote(path)}" {options} "$@"\n'
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
