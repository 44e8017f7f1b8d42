"""What a command says that needs an extra which is not installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import click


@contextlib.contextmanager
def observing() -> Iterator[None]:
    """Around an import of `guestio.observe`: one line and status 1 without the extra."""
    try:
        yield
    except ImportError as error:
        click.echo(f"guestio: {error}", err=True)
        sys.exit(1)
