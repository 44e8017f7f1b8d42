"""What fsspec reaches, for DuckDB. Needs the extra ``remote``."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

PREFIX: Final = "guestio://"
"""Before a URL that DuckDB opens through `Reached`."""


class Reached(AbstractFileSystem):  # type: ignore[misc] # fsspec has no types
    """All of fsspec's file systems as one, for reading.

    DuckDB would take some URLs as its own, asks for times of change that not all file systems have,
    and takes brackets and stars in names as patterns.
    """

    protocol = "guestio"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix(PREFIX)

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        """The file at a URL."""
        if mode != "rb":
            raise PermissionError(f"{path} is only read")
        system, name = url_to_fs(self._strip_protocol(path))
        return system.open(name, "rb")

    def size(self, path: str) -> Any:
        """Bytes of a file."""
        system, name = url_to_fs(self._strip_protocol(path))
        return system.size(name)

    def exists(self, path: str, **_: Any) -> bool:
        """What is not there is noticed when it is opened."""
        return True

    def glob(self, path: str, **_: Any) -> list[str]:
        """A name is no pattern."""
        return [path]

    def modified(self, path: str) -> datetime:
        """Files are taken not to change while they are read."""
        return datetime.fromtimestamp(0, UTC)
