"""Messages of a vfio-user client: against a model of mapped pages, or one way against the other."""

from __future__ import annotations

from tests.fuzz.choices import Choices
from tests.kit.vfio_model import Campaign, Side
from tests.vfio_user.test_fast_and_slow import compare_streams


def fuzz(data: bytes) -> None:
    """One connection: messages whose answers are known, or any at all."""
    choose = Choices(data)
    if choose.randrange(4) == 0:
        compare_streams(choose)
        return
    fast, waits = choose.randrange(4) > 0, choose.randrange(2) == 0
    side = Side(fast=fast, revoke_after=3600.0 if waits else 0.0)
    side.device.lets_go = choose.randrange(2) == 0
    campaign = Campaign(choose, side, waits=waits)
    try:
        while choose.left:
            campaign.run(1)
    finally:
        side.close()
        campaign.close()
