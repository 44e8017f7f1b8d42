"""``guestio faults``: what can go wrong on command."""

from __future__ import annotations

import click

from guestio.faults import reference


@click.command()
def faults() -> None:
    """List what a device can be made to do wrong, and how a rule selects when.

    A rule is one line, for --fault of each command that serves a device. The list is in Markdown.
    """
    click.echo(reference())
