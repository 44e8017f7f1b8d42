"""Whatever the guest writes: a defined answer, no exception, and no change unless it is OK."""

import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guestio import GuestRegionCollection, QueueError
from guestio.virtio import SplitRing
from guestio.virtio.iommu import IommuQueues, Status, VirtioIommu, wire
from guestio.virtio.layout import RingLayout
from tests.kit.iommu_driver import MSI, attach, map_, send_all

U32, U64 = 2**32 - 1, 2**64 - 1
PHYSICAL = GuestRegionCollection.from_ranges([(0, 0x20000)])

edges32 = st.sampled_from([0, 1, 2, 7, 8, 9, 3, 0x7FFFFFFF, 0x80000000, U32 - 1, U32])
edges64 = st.one_of(
    st.sampled_from([0, 1, 0xFFF, 0x1000, 0x1FFF, 0x2000, 0xFEE00000, 2**63, U64 - 0x1000, U64]),
    st.integers(0, 20).map(lambda page: page << 12),
    st.integers(0, 20).map(lambda page: (page << 12) - 1 & U64),
    st.integers(0, U64),
)
flags = st.one_of(st.integers(0, 8), st.integers(0, U32))
few_bytes = st.one_of(st.just(b""), st.binary(max_size=8))


def whole(kind, layout, *fields):
    return st.builds(
        lambda head, rest, *values: bytes([kind]) + head + struct.pack(layout, *values) + rest,
        st.one_of(st.just(bytes(3)), st.binary(min_size=3, max_size=3)),
        few_bytes,
        *fields,
    )


reserved4 = st.one_of(st.just(0), st.integers(0, U32))
requests = st.one_of(
    whole(1, "<IIII", edges32, edges32, flags, reserved4),
    whole(2, "<IIQ", edges32, edges32, edges64),
    whole(3, "<IQQQI", edges32, edges64, edges64, edges64, flags),
    whole(3, "<IQQQI", st.just(1), edges64, edges64, edges64, st.integers(0, 7)),
    whole(4, "<IQQI", edges32, edges64, edges64, reserved4),
    whole(4, "<IQQI", st.just(1), edges64, edges64, st.just(0)),
    whole(5, "<I64s", edges32, st.binary(max_size=64)),
)
mangled = st.builds(lambda data, n: data[: n % (len(data) + 1)], requests, st.integers(0, 80))
anything = st.one_of(requests, requests, requests, mangled, st.binary(max_size=80))
rooms = st.sampled_from([4, 4, 4, 516, 0, 3, 5, 100, 4096])


@settings(max_examples=300, deadline=None)
@given(
    sent=st.lists(st.tuples(anything, rooms), max_size=25),
    granule=st.sampled_from([1, 0x1000]),
    bypass=st.booleans(),
    negotiated=st.one_of(st.none(), st.integers(0, 127)),
)
@example(sent=[(map_(1, 0x2000, 0x1FFF, 0), 4)], granule=1, bypass=False, negotiated=None)
@example(sent=[(map_(1, U64, 0, U64), 4)], granule=1, bypass=False, negotiated=None)
def test_requests(sent, granule, bypass, negotiated):
    iommu = VirtioIommu(
        endpoints=[8, 9],
        page_size_mask=U64 & -granule,
        reserved=[MSI],
        bypass=bypass,
        features=negotiated,
        max_mappings=4,
    )
    send_all(iommu, attach(8, 1), map_(1, 0x1000, 0x1FFF, 0x4000))
    before = iommu.snapshot()
    for request, room in sent:
        answer = iommu.handle_request(request, room)
        assert isinstance(answer, bytes)
        assert len(answer) in {0, 4, min(room, 516)}
        assert len(answer) <= room
        if answer:
            assert answer[-3:] == bytes(3)
        after = iommu.snapshot()
        if not answer or Status(answer[-4]) is not Status.OK:
            assert after == before
        before = after
    for endpoint in (8, 9):
        check_view(iommu, endpoint, before)


def check_view(iommu, endpoint, state):
    """What the endpoint can reach is what its domain maps, and ends with the physical space."""
    found = iommu.endpoint(endpoint)
    domains = {known["id"]: known for known in state["domains"]}
    if found.domain is None:
        expected = [(0, U64)] if state["settings"]["bypass"] else None
    elif domains[found.domain]["bypass"]:
        expected = [(0, U64)]
    else:
        expected = [
            (first, min(last, first + U64 - phys))
            for first, last, phys, _ in domains[found.domain]["mappings"]
        ]
    if expected is None:
        # The old BYPASS feature may have been negotiated.
        return
    reached = []
    for (base, length), _, _ in found.iotlb:
        if reached and reached[-1][1] + 1 == base:
            reached[-1][1] = base + length - 1
        else:
            reached.append([base, base + length - 1])
    joined = []
    for first, last in sorted(expected):
        if joined and joined[-1][1] + 1 == first:
            joined[-1][1] = last
        else:
            joined.append([first, last])
    assert reached == joined


RINGS, SIZE = 0x1000, 4
AREA = 16 * SIZE + 16 + 2 * SIZE + 16 + 8 * SIZE


@settings(max_examples=200, deadline=None)
@given(
    garbage=st.one_of(
        st.binary(min_size=AREA, max_size=AREA),
        st.lists(
            st.builds(
                struct.Struct("<QIHH").pack,
                st.sampled_from([0x8000, 0x9000, 0x1FFFF, 0x20000, 0x1000, U64]),
                st.sampled_from([1, 4, 20, 36, 72, 516, 0, U32]),
                st.integers(0, 7),
                st.integers(0, 4),
            ),
            min_size=SIZE,
            max_size=SIZE,
        ).map(b"".join),
    ),
    heads=st.lists(st.integers(0, SIZE), min_size=SIZE, max_size=SIZE),
    count=st.integers(0, 6),
    request=anything,
    queue=st.integers(0, 1),
)
def test_rings(garbage, heads, count, request, queue):
    """A driver that writes anything into its rings gets answers, or its queue breaks."""
    PHYSICAL.fill(0, 0x20000)
    layouts = [RingLayout.contiguous(RINGS + n * 0x1000, SIZE) for n in range(2)]
    chosen = layouts[queue]
    PHYSICAL.write(chosen.desc, garbage)
    PHYSICAL.write(chosen.avail, struct.pack("<HH4H", 0, count, *heads))
    PHYSICAL.write(0x8000, request.ljust(80, b"\0"))
    iommu = VirtioIommu(endpoints=[8, 9])
    iommu.report(wire.FaultRecord.make(2, 0x101, 8, 0))
    rings = [
        SplitRing(PHYSICAL._space, SIZE, place.desc, place.avail, place.used, indirect=True)
        for place in layouts
    ]
    queues = IommuQueues(iommu, *rings, lambda _: None)
    try:
        for _ in range(3):
            queues.serve()
    except QueueError:
        with pytest.raises(QueueError):
            queues.serve()
    queues.close()
