"""``guestio faults``: what can go wrong on command."""

from __future__ import annotations

import json

import click

from guestio.faults import reference
from guestio.faults.misbehavior.rules import MISBEHAVIORS, SELECTORS


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON rather than Markdown.")
def faults(as_json: bool) -> None:
    """List what a device can be made to do wrong, and how a rule selects when.

    A rule is one line, for --fault of each command that serves a device. The list is in Markdown.
    """
    if as_json:
        rules = [
            {
                "name": each.name,
                "level": each.level.name.lower(),
                "value": None if each.value is None else each.value.example,
                "value_required": each.value is not None and each.required,
                "what": each.text,
                "selectors": list(each.selectors),
            }
            for each in MISBEHAVIORS.values()
        ]
        selectors = {key: value.what for key, value in SELECTORS.items()}
        click.echo(json.dumps({"rules": rules, "selectors": selectors}, indent=1))
        return
    click.echo(reference())
