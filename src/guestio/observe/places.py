"""Where recordings are: files and directories of this machine, or what fsspec has for a URL."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

from guestio.observe.recording import RecordingError

if TYPE_CHECKING:
    import duckdb

MISSING: Final = "URLs need the extra 'remote' (pip install 'guestio[remote]')"


def is_url(place: str) -> bool:
    """Whether it is fsspec's, as ``s3://bucket/recordings``, not a path of this machine."""
    return "://" in place


def _file_system(url: str) -> tuple[Any, str]:
    """Fsspec's file system for a URL, and the path there."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise RecordingError(f"{url}: {MISSING}: {error}") from None
    try:
        found: tuple[Any, str] = url_to_fs(url)
    except (ImportError, ValueError) as error:
        # An unknown protocol, or one that needs a package that is not there.
        raise RecordingError(f"{url} cannot be reached: {reason(error)}") from None
    return found


def reason(error: BaseException) -> str:
    """An error in one line, whatever raised it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines()
    return lines[0][:300] if lines and lines[0] else type(error).__name__


def list_recordings(place: str) -> list[str]:
    """The recordings at a place, as paths or URLs, in the order of their names.

    Args:
        place: A file; or a directory, whose files named ``*.parquet`` are recordings. A URL that
            ends in ``.parquet`` is a file.

    Raises:
        RecordingError: There is none, or the place cannot be listed.
    """
    place = place.removeprefix("file://")
    if not is_url(place):
        directory = Path(place)
        if not directory.is_dir():
            return [os.path.abspath(place)]  # noqa: PTH100 - links stay as they are named
        found = [os.fspath(each) for each in directory.absolute().glob("*.parquet")]
    else:
        system, path = _file_system(place)
        if place.endswith(".parquet"):
            return [place]
        try:
            if not system.isdir(path):
                return [place]
            names = [str(name) for name in system.ls(path, detail=False)]
        except Exception as error:
            # Each of fsspec's file systems has errors of its own.
            raise RecordingError(f"{place} cannot be listed: {reason(error)}") from error
        names = [name for name in names if name.endswith(".parquet")]
        found = [name if is_url(name) else str(system.unstrip_protocol(name)) for name in names]
    if not found:
        raise RecordingError(f"{place} has no recording: no file there is named *.parquet")
    return sorted(found)


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """A recording as a file; whether it can be read anywhere, its ``seekable`` says.

    Raises:
        OSError: It cannot be read, in whatever way fsspec says it.
        RecordingError: The URL cannot be reached.
    """
    if not is_url(path):
        with Path(path).open("rb") as file:
            yield file
        return
    system, name = _file_system(path)
    with reaching():
        reached = system.open(name, "rb")
    with contextlib.closing(reached):
        yield cast("BinaryIO", reached)


def has_ranges(path: str) -> bool:
    """Whether parts of a recording can be read without what is before them.

    Raises:
        OSError: It cannot be reached.
    """
    if not is_url(path):
        return True
    system, name = _file_system(path)
    if "http" not in system.protocol:
        return True
    with reaching(), contextlib.closing(system.open(name, "rb", cache_type="none")) as file:
        try:
            # Nothing else shows it: a server that knows no ranges does not always say so.
            file.seek(1)
            file.read(1)
        except ValueError:
            return False
        return True


@contextlib.contextmanager
def reaching() -> Iterator[None]:
    """Around the use of what fsspec opened: its errors as OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(reason(error)) from error


@contextlib.contextmanager
def copied(path: str) -> Iterator[Path]:
    """A recording as a file of this machine: it, or a temporary copy of it.

    Raises:
        OSError: It cannot be read, or there is no room for the copy.
        RecordingError: The URL cannot be reached.
    """
    if not is_url(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="guestio-") as directory:
        copy = Path(directory, "recording")
        system, name = _file_system(path)
        with reaching():
            system.get_file(name, os.fspath(copy))
        yield copy


def for_duckdb(connection: duckdb.DuckDBPyConnection, path: str) -> str:
    """What DuckDB calls a recording."""
    if not is_url(path):
        return path
    from guestio.observe.reach import PREFIX, Reached

    if Reached.protocol not in connection.list_filesystems():
        connection.register_filesystem(Reached())
    return PREFIX + path
