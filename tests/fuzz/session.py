"""A vhost-user session under messages of a lying front-end, whose handler checks all it is told."""

from __future__ import annotations

from guestio.vhost_user.session import Session
from tests.fuzz.choices import Choices
from tests.vhost_user.test_session_fuzz import CheckingHandler, negotiate, step

MAX_STEPS = 60


def fuzz(data: bytes) -> None:
    """One connection, as long as it lasts."""
    rng = Choices(data)
    hostility = rng.choice((0.0, 0.2, 0.6))
    handler = CheckingHandler(rng)
    session = Session(handler)
    negotiate(session, rng)
    try:
        for _ in range(MAX_STEPS):
            if not rng.left or not step(rng, session, handler, hostility):
                break
    finally:
        handler.close()
