"""Packs the guest's root file system: a cpio archive, in the kernel's `newc` format, in memory.

Needs no cpio program and no root. Format: Linux, Documentation/driver-api/early-userspace/
buffer-format.rst.
"""

import re
import stat
import subprocess
from pathlib import Path, PurePosixPath

from lab.parts import PartsError, require_program

_HEADER_FIELDS = 13


class Initramfs:
    """A root file system under construction; `pack` gives the archive. Not thread-safe."""

    def __init__(self) -> None:
        self._archive = bytearray()
        self._entries: set[str] = set()

    def add_file(self, path: str, data: bytes, *, executable: bool = False) -> None:
        """Add a regular file and the directories above it.

        Args:
            path: Absolute path in the guest. Adding a path again does nothing.
            data: Its content.
            executable: Mode 0755 instead of 0644.
        """
        mode = stat.S_IFREG | (0o755 if executable else 0o644)
        self._add(PurePosixPath(path.lstrip("/")), mode, data)

    def add_link(self, path: str, target: str) -> None:
        """Add a symbolic link at `path` that says `target`."""
        self._add(PurePosixPath(path.lstrip("/")), stat.S_IFLNK | 0o777, target.encode())

    def add_program(self, path: str, source: Path) -> None:
        """Add a program of the host together with the shared libraries it is linked to.

        Args:
            path: Absolute path in the guest.
            source: The program on the host; its libraries keep their host paths.

        Raises:
            PartsError: A library of the program is missing on the host.
        """
        self.add_file(path, source.read_bytes(), executable=True)
        for library in _shared_libraries(source):
            self.add_file(str(library), library.read_bytes(), executable=True)

    def pack(self) -> bytes:
        """The finished archive, uncompressed: QEMU copies it faster than a guest unpacks it."""
        return bytes(self._archive + _entry("TRAILER!!!", 0, 0, b""))

    def _add(self, path: PurePosixPath, mode: int, data: bytes) -> None:
        if str(path) in self._entries:
            return
        for parent in reversed(path.parents[:-1]):
            if str(parent) not in self._entries:
                self._append(str(parent), stat.S_IFDIR | 0o755, b"")
        self._append(str(path), mode, data)

    def _append(self, name: str, mode: int, data: bytes) -> None:
        self._entries.add(name)
        self._archive += _entry(name, len(self._entries), mode, data)


def _entry(name: str, inode: int, mode: int, data: bytes) -> bytes:
    encoded = name.encode() + b"\0"
    fields = [0] * _HEADER_FIELDS
    fields[0], fields[1], fields[4] = inode, mode, 1  # one link
    fields[6], fields[11] = len(data), len(encoded)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + encoded) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _shared_libraries(program: Path) -> list[Path]:
    done = subprocess.run(
        [require_program("ldd", "libc-bin"), str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    # ldd refuses a static program; that program then needs nothing.
    if done.returncode != 0 and "not a dynamic executable" in done.stdout + done.stderr:
        return []
    if done.returncode != 0 or "not found" in done.stdout:
        raise PartsError(f"shared libraries of {program}: {done.stdout}{done.stderr}")
    return [Path(path) for path in re.findall(r"(/\S+) \(0x", done.stdout)]
