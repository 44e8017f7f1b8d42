"""What a peer, a guest or a device may cost: limits on time, memory, descriptors and log lines.

Each constant names the resource, its unit and what happens once it is used up. Limits of the
compiled core's own structures (tree fan-out, slab sizes) are not budgets: they are in its header.
`docs/limits.md` lists the same for users.
"""

from __future__ import annotations

STOP_TIMEOUT = 1.0
"""Seconds that a stop waits for requests that a device still holds; then they are disowned."""
