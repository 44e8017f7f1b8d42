"""Rings full of garbage, in bulk: a device behind them survives, and nothing is left behind."""

import os
import random
import struct
from pathlib import Path

import pytest

from guestio import GuestioError, GuestRegionCollection, Iotlb, MmapRegion, Permissions
from guestio._core.iommu.address_space import AddressSpace
from guestio.virtio import SplitRing
from guestio.virtio.blk import BlockDevice
from guestio.virtio.device import settled

SIZE = 16
DESC, AVAIL, USED, BUFFERS, TABLE = 0x0, 0x1000, 0x2000, 0x4000, 0x8000
MEMORY = 0x10000
CASES = 10_000
BATCHES = 4

ADDRESSES = (
    *(BUFFERS, BUFFERS + 0x1000, TABLE, TABLE + 8, DESC, AVAIL, USED, MEMORY - 1, MEMORY),
    *(MEMORY - 0x1000, 1 << 32, (1 << 63) - 1, (1 << 64) - 1, (1 << 64) - 4096),
)
LENGTHS = (0, 1, 8, 15, 16, 17, 32, 48, 511, 512, 513, 4096, 0x10000, 1 << 31, (1 << 32) - 1)


def descriptor(rng: random.Random) -> bytes:
    if rng.random() < 0.1:
        return rng.randbytes(16)
    flags = rng.choice((0, 1, 2, 3, 3, 4, 5, 6, 7, rng.randrange(1 << 16)))
    following = rng.choice((0, rng.randrange(SIZE), SIZE, rng.randrange(1 << 16)))
    return struct.pack("<QIHH", rng.choice(ADDRESSES), rng.choice(LENGTHS), flags, following)


def fill(memory: GuestRegionCollection, rng: random.Random) -> None:
    """Write a ring that is wrong in some places, a request header now and then, and a table."""
    memory.write(DESC, b"".join(descriptor(rng) for _ in range(SIZE)))
    memory.write(TABLE, b"".join(descriptor(rng) for _ in range(64)))
    heads = [rng.choice((rng.randrange(SIZE), rng.randrange(1 << 16))) for _ in range(SIZE)]
    ahead = rng.choice((1, 1, 2, SIZE, SIZE + 1, rng.randrange(1 << 16)))
    memory.write(AVAIL, struct.pack(f"<HH{SIZE + 1}H", rng.randrange(4), ahead, *heads, 0))
    memory.write(USED, bytes(6 + 8 * SIZE))
    kind = rng.choice((0, 1, 4, 8, 11, 13, rng.randrange(1 << 32)))
    memory.write(BUFFERS, struct.pack("<IIQ", kind, 0, rng.choice((0, 1, 7, 8, 1 << 60))))


def translation(rng: random.Random) -> Iotlb:
    """Most pages where they are, some elsewhere, some missing, some with too few permissions."""
    iotlb = Iotlb()
    for page in range(0, MEMORY, 4096):
        if rng.random() < 0.9:
            to = page if rng.random() < 0.9 else rng.randrange(0, 2 * MEMORY, 4096)
            iotlb.set_mapping(page, to, 4096, Permissions(rng.choice((1, 2, 3, 3, 3, 3))))
    return iotlb


def serve(ring: SplitRing, device: BlockDevice) -> None:
    """What a back-end does with a ring, until there is no more or it is broken."""
    for _ in range(3):
        chains, misses, *_ = ring.run_once(device.server)
        if misses and not chains:
            chain = ring.pop_faulty()
            chains = [] if chain is None else [chain]
        for chain in chains:
            answer = device.process if chain.fault is None else device.fail
            ring.complete(chain, settled(answer(0, chain)))
        ring.publish()
        ring.enable_kicks()


def footprint() -> tuple[int, int]:
    return len(list(Path("/proc/self/fd").iterdir())), len(Path("/proc/self/maps").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(BATCHES))
def test_no_ring_harms_the_device(tmp_path: Path, batch: int) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(1 << 16))
    region = MmapRegion.anonymous(0, MEMORY)
    memory = GuestRegionCollection.from_regions([region])
    device = BlockDevice(image)
    broken = served = 0
    before: tuple[int, int] | None = None
    for case in range(CASES // BATCHES):
        rng = random.Random(batch * CASES + case)
        fill(memory, rng)
        iotlb = translation(rng) if rng.random() < 0.5 else None
        ring = SplitRing(
            AddressSpace(memory._space.regions, iotlb and iotlb._map),
            *(SIZE, DESC, AVAIL, USED),
            event_idx=rng.random() < 0.5,
            indirect=rng.random() < 0.7,
        )
        try:
            serve(ring, device)
        except GuestioError:
            broken += 1
        assert ring.outstanding <= SIZE
        assert iotlb is None or ring.broken or not len(iotlb._map.leases) or ring.outstanding
        served += ring.next_used
        del ring, iotlb
        if case == 200:
            before = footprint()
    after = footprint()
    assert before is not None
    assert after[0] == before[0]
    assert after[1] - before[1] < 4096
    assert broken > CASES // BATCHES // 10
    assert served > 50
    device.close()
