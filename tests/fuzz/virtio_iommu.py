"""A virtio-iommu under any requests, against a model of plain dictionaries."""

from __future__ import annotations

import struct
from typing import Any

from guestio.virtio.iommu import Status, VirtioIommu
from tests.fuzz.choices import Choices
from tests.kit.iommu_driver import PAGE, attach, detach, map_, probe, unmap
from tests.virtio.test_virtio_iommu_fuzz import check_view
from tests.virtio.test_virtio_iommu_stateful import (
    ANCHOR,
    ENDPOINTS,
    MAX_MAPPINGS,
    RESERVED,
    Model,
)

MAX_STEPS = 60
NUMBERS = (
    0,
    1,
    2,
    8,
    0xFFF,
    0x1000,
    0x1FFF,
    0x2000,
    1 << 31,
    (1 << 32) - 1,
    1 << 63,
    (1 << 64) - 1,
)


def modelled(rng: Choices, model: Model) -> tuple[bytes, Status]:
    """A request of the kind that drivers send, and what must come of it."""
    domain = rng.choice((1, 1, 1, 2))
    endpoint = rng.choice((*ENDPOINTS, 11))
    first, count = rng.randrange(6), rng.randrange(1, 5)
    start, last = first * PAGE, (first + count) * PAGE - 1
    match rng.randrange(8):
        case 0 | 1:
            flag = rng.randrange(4) == 3
            return attach(endpoint, domain, int(flag)), model.attach(endpoint, domain, flag)
        case 2:
            return detach(endpoint, domain), model.detach(endpoint, domain)
        case 3 | 4 | 5:
            phys, flags = rng.randrange(40), rng.randrange(4)
            request = map_(domain, start, last, phys * PAGE, flags)
            return request, model.map(domain, first, count, phys, flags)
        case _:
            return unmap(domain, start, last), model.unmap(domain, first, count)


def hostile(rng: Choices) -> bytes:
    """A request that is wrong somewhere, or garbage."""
    a, b, c = (rng.choice((*NUMBERS, rng.getrandbits(64))) for _ in range(3))
    small, flags = rng.randrange(4), rng.choice((0, 1, 4, 7, 8, rng.getrandbits(32)))
    made = rng.choice(
        (
            map_(small, a, b, c, flags),
            unmap(small, a, b),
            attach(a & 0xFFFFFFFF, b & 0xFFFFFFFF, flags),
            detach(a & 0xFFFFFFFF, b & 0xFFFFFFFF),
            probe(rng.choice((8, 9, 11))),
            struct.pack("<QQQ", a, b, c),
        )
    )
    return made[: rng.choice((len(made), len(made), rng.randrange(len(made) + 1)))]


class Alone(Model):
    """Endpoints without DMA targets: none has to be where another is."""

    def attach(self, endpoint: int, number: int, flag: bool) -> Status:
        others = {e: where for e, where in self.where.items() if e != endpoint}
        self.where.update(dict.fromkeys(others))
        done = super().attach(endpoint, number, flag)
        self.where.update(others)
        return done


def compare(model: Model, state: dict[str, Any]) -> None:
    """The device's own account of its state says what the model says."""
    found = {known["id"]: known for known in state["domains"]}
    assert set(found) == set(model.domains)
    for number, domain in model.domains.items():
        assert found[number]["bypass"] == domain.bypass
        assert sorted(map(tuple, found[number]["mappings"])) == sorted(
            (first * PAGE, (first + count) * PAGE - 1, phys * PAGE, flags)
            for first, (count, phys, flags) in domain.maps.items()
        )
    where = {known["id"]: known["domain"] for known in state["endpoints"]}
    assert where == model.where


def fuzz(data: bytes) -> None:
    """Requests of both kinds; what is not OK changes nothing, what is OK changes what it says."""
    rng = Choices(data)
    iommu = VirtioIommu(
        endpoints=(*ENDPOINTS, ANCHOR),
        reserved={10: [(RESERVED * PAGE, RESERVED * PAGE + PAGE - 1, 0)]},
        max_mappings=MAX_MAPPINGS,
    )
    model, known = Alone(), True
    before = iommu.snapshot()
    for _ in range(MAX_STEPS):
        if not rng.left:
            break
        expected = None
        room = rng.choice((4, 4, 4, 4, 516, 0, 3, 5))
        if rng.randrange(4):
            request, expected = modelled(rng, model)
            room = max(room, 4)
        else:
            request = hostile(rng)
        answer = iommu.handle_request(request, room)
        assert isinstance(answer, bytes)
        assert len(answer) <= room
        after = iommu.snapshot()
        if not answer or Status(answer[-4]) is not Status.OK:
            assert after == before
        # What a hostile request is taken for, the model does not know.
        known = known and (expected is not None or after == before)
        if known and expected is not None:
            assert Status(answer[-4]) is expected
            compare(model, after)
        before = after
        for endpoint in ENDPOINTS:
            check_view(iommu, endpoint, after)
    assert iommu.reset() is None
