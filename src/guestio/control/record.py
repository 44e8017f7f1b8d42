"""What a recorder asks of a server: that events are written, and what is negotiated meanwhile.

The records themselves are read from the server's rings, which are shared memory: no byte of them
passes through the control socket.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Final

from guestio._core.trace import tracepoints
from guestio.budgets import RECORD_DATA_RING, RECORD_RING
from guestio.control.status import Observed
from guestio.trace import Group, Tracing, enlarge_rings

LOOK_SECONDS: Final = 0.05
"""Seconds between looks at what was negotiated."""

STATUS_LOOKS: Final = 5
"""Looks after which a line is sent although nothing has changed."""

_GROUPS: Final = {
    "none": Group.REQUESTS | Group.TRANSLATIONS | Group.LIFE,
    "headers": Group.REQUESTS | Group.TRANSLATIONS | Group.LIFE | Group.BUFFERS | Group.CONTENTS,
    "all": Group.ALL | Group.CONTENTS | Group.DATA,
}


def groups_of(payload: str) -> Group:
    """The groups of events that a recording needs.

    Args:
        payload: How much of what requests carry is recorded: ``none``, ``headers`` or ``all``.

    Raises:
        ValueError: It is none of these.
    """
    try:
        return _GROUPS[payload]
    except KeyError:
        raise ValueError(f"payload {payload[:40]!r} is not none, headers or all") from None


def ring_of(groups: Group) -> int:
    """Records that the ring of a thread must hold while these groups are recorded."""
    return RECORD_DATA_RING if Group.DATA in groups else RECORD_RING


async def record_stream(
    streams: list[int], observed: Observed, groups: Group
) -> AsyncIterator[str]:
    """Statuses, a line each; events are written as long as they are read.

    One is sent each quarter of a second, and at once if another peer, queue or thread is there.

    Args:
        streams: Counts the streams that are open.
        observed: The server.
        groups: What is written.
    """
    streams[0] += 1
    try:
        enlarge_rings(ring_of(groups))
        with Tracing(groups):
            known: object = None
            changed = False
            for look in itertools.count():
                # Peers, features and queues do not change without an event.
                found = (tracepoints.told(), tracepoints.rings())
                # Once more after a change: what an event tells may be there a moment after it.
                if changed or found != known or look % STATUS_LOOKS == 0:
                    known, changed = found, found != known
                    yield json.dumps(observed.status()) + "\n"
                await asyncio.sleep(LOOK_SECONDS)
    finally:
        streams[0] -= 1
