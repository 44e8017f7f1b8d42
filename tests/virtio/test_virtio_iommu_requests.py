"""Requests to a virtio-iommu: answers, the specification's examples, its device requirements."""

import struct

import pytest

from guestio import CannotResolveError, GuestRegionCollection, Permissions
from guestio.virtio.iommu import VirtioIommu, wire
from tests.kit.iommu_driver import (
    INVAL,
    MMIO,
    MSI,
    NOENT,
    NOMEM,
    OK,
    PAGE,
    RANGE,
    RW,
    UNSUPP,
    LedgerTarget,
    R,
    W,
    attach,
    detach,
    map_,
    probe,
    send,
    send_all,
    status,
    unmap,
)

MAX = 2**64 - 1


def crosvm_like(**settings):
    """As crosvm sets its device up: an MSI window, and room for one property."""
    return VirtioIommu(
        **{"endpoints": [8, 9], "probe_size": 24, "reserved": [MSI], "bypass": False, **settings}
    )


ATTACHED = [attach(8, 1)]
MAPPED = [*ATTACHED, map_(1, 0x1000, 0x1FFF, 0x4000)]
CASES = {
    "attach-reserved": ([], attach(8, 1, reserved=b"\1\0\0\0"), INVAL),
    "attach-endpoint-99": ([], attach(99, 1), NOENT),
    "attach": ([], attach(8, 1), OK),
    # crosvm says INVAL; the specification knows only the misalignment here, and so do the traces.
    "map-one-byte": (ATTACHED, map_(1, 0x1000, 0x1000, 0), RANGE),
    "map-end-unaligned": (ATTACHED, map_(1, 0x1000, 0x1FFE, 0), RANGE),
    "map-phys-unaligned": (ATTACHED, map_(1, 0x1000, 0x1FFF, 0x800), RANGE),
    "map-flags-8": (ATTACHED, map_(1, 0x1000, 0x1FFF, 0, 8), INVAL),
    "map-domain-2": (ATTACHED, map_(2, 0x1000, 0x1FFF, 0), NOENT),
    "map": (ATTACHED, map_(1, 0x1000, 0x1FFF, 0), OK),
    "map-again": (MAPPED, map_(1, 0x1000, 0x1FFF, 0x4000), INVAL),
    "unmap-split": (MAPPED, unmap(1, 0x1000, 0x17FF), RANGE),
    "unmap-domain-2": (MAPPED, unmap(2, 0x1000, 0x1FFF), NOENT),
    "unmap": (MAPPED, unmap(1, 0x1000, 0x1FFF), OK),
    "unmap-again": (ATTACHED, unmap(1, 0x1000, 0x1FFF), OK),
    "detach-99": (ATTACHED, detach(99, 1), NOENT),
    "detach": (ATTACHED, detach(8, 1), OK),
    # crosvm says OK; the specification allows INVAL.
    "detach-again": ([], detach(8, 1), INVAL),
    # crosvm cannot take one of two endpoints from a domain; we can.
    "detach-one-of-two": ([attach(8, 1), attach(9, 1)], detach(8, 1), OK),
}


@pytest.mark.parametrize(("before", "request_", "expected"), CASES.values(), ids=CASES.keys())
def test_requests_and_their_answers(before, request_, expected):
    iommu = crosvm_like()
    send_all(iommu, *before)
    state = iommu.snapshot()
    assert send(iommu, request_) is expected
    if expected is not OK:
        assert iommu.snapshot() == state


@pytest.mark.parametrize(
    ("flags", "granted"),
    [
        pytest.param(0, Permissions.NONE, id="map-none"),
        pytest.param(W, Permissions.WRITE, id="map-write-only"),
        pytest.param(R, Permissions.READ, id="map-read"),
        pytest.param(RW, Permissions.READ_WRITE, id="map-read-write"),
        pytest.param(R | MMIO, Permissions.READ, id="map-mmio"),
    ],
)
def test_mappings_grant_exactly_the_requested_access(flags, granted):
    iommu = crosvm_like()
    send_all(iommu, attach(8, 1), map_(1, 0x1000, 0x1FFF, 0x4000, flags))
    memory = iommu.endpoint(8).memory(GuestRegionCollection.from_ranges([(0, 0x8000)]))
    for access in (Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE):
        assert memory.check_range(0x1000, 0x1000, access) is granted.allows(access)
    assert not iommu.event_records()


def test_a_target_of_two_endpoints_ties_them_to_one_domain():
    iommu = crosvm_like()
    physical = GuestRegionCollection.from_ranges([(0, 0x8000)])
    target = LedgerTarget()
    for endpoint in (8, 9):
        iommu.endpoint(endpoint).add_target(target, physical)
    assert send(iommu, attach(8, 1)) is OK
    assert send(iommu, attach(9, 2)) is UNSUPP
    assert iommu.endpoint(9).domain is None
    assert send(iommu, attach(9, 1)) is OK


@pytest.mark.parametrize(
    ("endpoint", "room", "expected"),
    [
        pytest.param(8, 24, OK, id="probe"),
        pytest.param(8, 23, INVAL, id="probe-23"),
        pytest.param(99, 24, NOENT, id="probe-99"),
        pytest.param(99, 23, INVAL, id="probe-99-23"),
        pytest.param(8, 100, OK, id="probe-roomy"),
        pytest.param(8, 0, INVAL, id="probe-no-room"),
    ],
)
def test_probe_answers(endpoint, room, expected):
    answer = crosvm_like().handle_request(probe(endpoint), room + 4)
    assert status(answer) is expected
    assert len(answer) == min(room, 24) + 4
    if expected is OK:
        fields = struct.unpack("<HHB3sQQ", answer[:24])
        assert fields == (1, 20, 1, bytes(3), 0xFEE00000, 0xFEEFFFFF)
    else:
        assert not any(answer[:-4])


@pytest.mark.parametrize(
    ("request_", "writable"),
    [
        pytest.param(bytes([9]) + bytes(100), 4, id="unknown-type"),
        pytest.param(bytes(100), 4, id="type-0"),
        pytest.param(attach(8, 1), 3, id="writable-3"),
        pytest.param(attach(8, 1), 0, id="no-writable-tail"),
        pytest.param(b"", 4, id="empty"),
        pytest.param(b"\1", 4, id="one-byte"),
        *(
            pytest.param(whole[:-1], 600, id=f"short-{whole[0]}")
            for whole in (attach(8, 1), detach(8, 1), map_(1, 0, 0, 0), unmap(1, 0, 0), probe(8))
        ),
    ],
)
def test_zero_length_answers(request_, writable):
    iommu = crosvm_like()
    before = iommu.snapshot()
    assert iommu.handle_request(request_, writable) == b""
    assert iommu.snapshot() == before


def test_a_request_may_be_longer_and_its_room_larger():
    iommu = crosvm_like()
    answer = iommu.handle_request(attach(8, 1) + bytes(1000), 64)
    assert answer == bytes(4)


# virtio 1.3, section 5.13.6.6: (operation, virt_start, virt_end, expected), in granules of 1 byte.
EXAMPLES = {
    1: [("unmap", 0, 4, OK)],
    2: [("map", 0, 9, OK), ("unmap", 0, 9, OK)],
    3: [("map", 0, 4, OK), ("map", 5, 9, OK), ("unmap", 0, 9, OK)],
    4: [("map", 0, 9, OK), ("unmap", 0, 4, RANGE)],
    5: [("map", 0, 4, OK), ("map", 5, 9, OK), ("unmap", 0, 4, OK)],
    6: [("map", 0, 4, OK), ("unmap", 0, 9, OK)],
    7: [("map", 0, 4, OK), ("map", 10, 14, OK), ("unmap", 0, 14, OK)],
}
LEFT = {4: [[0, 9, 0, RW]], 5: [[5, 9, 5, RW]]}


@pytest.mark.parametrize("granule", [1, 0x1000, 0x10000], ids=["bytes", "4k", "64k"])
@pytest.mark.parametrize("number", EXAMPLES)
def test_specification_example(number, granule):
    iommu = VirtioIommu(endpoints=[8], page_size_mask=MAX & -granule)
    send_all(iommu, attach(8, 1))
    for operation, start, end, expected in EXAMPLES[number]:
        first, last = start * granule, (end + 1) * granule - 1
        request = map_(1, first, last, first) if operation == "map" else unmap(1, first, last)
        assert send(iommu, request) is expected
    (domain,) = iommu.snapshot()["domains"]
    assert domain["mappings"] == [
        [first * granule, (last + 1) * granule - 1, phys * granule, flags]
        for first, last, phys, flags in LEFT.get(number, [])
    ]


class TestRequirements:
    """The device's requirements of section 5.13, by subsection."""

    def test_config_space(self):
        iommu = VirtioIommu(
            page_size_mask=0x40201000,
            input_range=(0x1000, 0xFFFF_FFFF),
            domain_range=(3, 9),
            probe_size=64,
            bypass=True,
        )
        assert iommu.config() == struct.pack(
            "<QQQIIIB3x", 0x40201000, 0x1000, 0xFFFF_FFFF, 3, 9, 64, 1
        )
        assert len(iommu.config()) == 40

    def test_offered_features(self):
        # New devices do not offer the old BYPASS; PROBE only with room for properties.
        assert VirtioIommu().offered_features == 0b1110111
        assert VirtioIommu(probe_size=0).offered_features == 0b1100111

    def test_bypass_survives_a_reset(self):
        iommu = VirtioIommu(endpoints=[8], bypass=False)
        iommu.bypass = 1
        send_all(iommu, attach(8, 1))
        iommu.reset()
        assert iommu.bypass is True
        assert iommu.endpoint(8).domain is None

    def test_head_reserved_is_ignored(self):
        iommu = crosvm_like()
        assert send(iommu, b"\1\xff\xff\xff" + attach(8, 1)[4:]) is OK

    def test_domain_range(self):
        iommu = VirtioIommu(endpoints=[8], domain_range=(2, 4))
        for domain, expected in ((1, RANGE), (2, OK), (4, OK), (5, RANGE)):
            assert send(iommu, attach(8, domain)) is expected
        assert send(iommu, map_(7, 0, 0xFFF, 0)) is NOENT

    def test_attach_bypass_flag_must_fit_the_domain(self):
        iommu = crosvm_like()
        send_all(iommu, attach(8, 1), attach(9, 2, flags=1))
        assert send(iommu, attach(9, 1, flags=1)) is INVAL
        assert iommu.endpoint(9).domain == 2
        assert send(iommu, attach(8, 2)) is INVAL
        assert send(iommu, attach(8, 1, flags=1)) is INVAL
        assert iommu.endpoint(8).domain == 1
        for request in (map_(2, 0, 0xFFF, 0), unmap(2, 0, 0xFFF)):
            assert send(iommu, request) is INVAL

    @pytest.mark.parametrize("flags", [2, 0x80000000, 1])
    def test_attach_unknown_flags(self, flags):
        iommu = crosvm_like(features=wire.F_MAP_UNMAP)
        assert send(iommu, attach(8, 1, flags=flags)) is INVAL

    def test_attach_elsewhere_is_an_implicit_detach(self):
        iommu = crosvm_like()
        send_all(iommu, attach(8, 1), map_(1, 0, 0xFFF, 0), attach(8, 2))
        assert send(iommu, map_(1, 0x1000, 0x1FFF, 0)) is NOENT
        send_all(iommu, attach(9, 1), map_(1, 0, 0xFFF, 0))

    def test_attach_again_keeps_the_domain(self):
        iommu = crosvm_like()
        send_all(iommu, attach(8, 1), map_(1, 0, 0xFFF, 0), attach(8, 1))
        assert send(iommu, map_(1, 0, 0xFFF, 0)) is INVAL

    def test_detach_names_the_domain(self):
        iommu = crosvm_like()
        send_all(iommu, attach(8, 1), attach(9, 2))
        assert send(iommu, detach(8, 2)) is INVAL
        assert send(iommu, detach(8, 3)) is INVAL
        assert send(iommu, detach(8, 1)) is OK

    def test_detach_ignores_reserved(self):
        iommu = crosvm_like()
        send_all(iommu, attach(8, 1))
        assert send(iommu, detach(8, 1)[:12] + b"\xff" * 8) is OK

    def test_map_flag_of_a_feature_that_was_not_accepted(self):
        iommu = crosvm_like(features=wire.F_MAP_UNMAP)
        send_all(iommu, attach(8, 1))
        assert send(iommu, map_(1, 0, 0xFFF, 0, R | MMIO)) is INVAL

    @pytest.mark.parametrize(
        ("start", "end", "expected"),
        [
            (0x0, 0xFFF, RANGE),
            (0x1000, 0x1FFF, OK),
            (0xF000, 0xFFFF, OK),
            (0xF000, 0x10FFF, RANGE),
            (0, MAX, RANGE),
        ],
    )
    def test_map_input_range(self, start, end, expected):
        iommu = VirtioIommu(endpoints=[8], input_range=(0x1000, 0xFFFF))
        send_all(iommu, attach(8, 1))
        assert send(iommu, map_(1, start, end, 0)) is expected

    def test_unmap_knows_no_input_range(self):
        iommu = VirtioIommu(endpoints=[8], input_range=(0x1000, 0xFFFF))
        send_all(iommu, attach(8, 1), map_(1, 0x1000, 0x1FFF, 0))
        assert send(iommu, unmap(1, 0, MAX)) is OK
        assert iommu.snapshot()["domains"][0]["mappings"] == []

    @pytest.mark.parametrize(
        ("start", "end", "expected"),
        [
            (0xFEDFF000, 0xFEDFFFFF, OK),
            (0xFEDFF000, 0xFEE00FFF, INVAL),
            (0xFEE01000, 0xFEE01FFF, INVAL),
            (0xFEEFF000, 0xFEF00FFF, INVAL),
            (0xFEF00000, 0xFEF00FFF, OK),
            (0, MAX, INVAL),
        ],
    )
    def test_map_reserved(self, start, end, expected):
        iommu = crosvm_like()
        send_all(iommu, attach(8, 1))
        assert send(iommu, map_(1, start, end, 0)) is expected

    def test_reserved_regions_of_each_endpoint(self):
        iommu = VirtioIommu(endpoints=[8, 9], reserved={9: [(0x5000, 0x5FFF, 0)]})
        send_all(iommu, attach(8, 1), map_(1, 0x5000, 0x5FFF, 0))
        assert send(iommu, attach(9, 1)) is UNSUPP
        assert iommu.endpoint(9).domain is None
        send_all(iommu, unmap(1, 0x5000, 0x5FFF), attach(9, 1))
        assert send(iommu, map_(1, 0x5000, 0x5FFF, 0)) is INVAL

    def test_unmap_reserved(self):
        iommu = crosvm_like()
        send_all(iommu, attach(8, 1), map_(1, 0, 0xFFF, 0))
        assert send(iommu, unmap(1, 0, 0xFFF, reserved=b"\0\0\0\1")) is INVAL
        assert len(iommu.snapshot()["domains"][0]["mappings"]) == 1

    def test_unmap_that_would_split_removes_nothing(self):
        iommu = crosvm_like()
        send_all(iommu, attach(8, 1), *(map_(1, at, at + 0x1FFF, 0) for at in (0, 0x2000, 0x4000)))
        assert send(iommu, unmap(1, 0, 0x4FFF)) is RANGE
        assert len(iommu.snapshot()["domains"][0]["mappings"]) == 3

    def test_probe_without_the_feature(self):
        assert VirtioIommu(endpoints=[8], probe_size=0).handle_request(probe(8), 600) == b""

    def test_probe_offered_but_not_accepted(self):
        iommu = VirtioIommu(endpoints=[8], features=wire.F_MAP_UNMAP)
        assert send(iommu, probe(8), 516) is OK

    def test_several_properties_follow_each_other(self):
        regions = [(0x1000, 0x1FFF, 0), MSI]
        iommu = VirtioIommu(endpoints=[8], probe_size=64, reserved=regions)
        answer = iommu.handle_request(probe(8), 68)
        assert [struct.unpack_from("<HHB3xQQ", answer, at) for at in (0, 24)] == [
            (1, 20, subtype, first, last) for first, last, subtype in regions
        ]
        assert answer[48:] == bytes(20)

    def test_top_of_the_address_space(self):
        iommu = VirtioIommu(endpoints=[8])
        send_all(iommu, attach(8, 1), map_(1, MAX - 0xFFF, MAX, 0x4000))
        physical = GuestRegionCollection.from_ranges([(0, 0x8000)])
        memory = iommu.endpoint(8).memory(physical)
        memory.write(MAX, b"x")
        assert physical.read(0x4FFF, 1) == b"x"
        assert send(iommu, unmap(1, 0, MAX)) is OK
        with pytest.raises(CannotResolveError):
            memory.read(MAX, 1)

    def test_the_whole_address_space_as_one_mapping(self):
        iommu = VirtioIommu(endpoints=[8])
        send_all(iommu, attach(8, 1), map_(1, 0, MAX, 0))
        assert send(iommu, unmap(1, 0, MAX - 0x1000)) is RANGE
        assert send(iommu, unmap(1, 0, MAX)) is OK

    def test_a_physical_range_may_wrap_but_leads_nowhere(self):
        iommu = VirtioIommu(endpoints=[8])
        send_all(iommu, attach(8, 1), map_(1, 0, 0x1FFF, MAX - 0xFFF))
        memory = iommu.endpoint(8).memory(GuestRegionCollection.from_ranges([(0, 0x8000)]))
        assert not memory.check_range(0x1000, 1)

    def test_quotas(self):
        iommu = VirtioIommu(endpoints=[8, 9, 10], max_domains=2, max_mappings=2)
        send_all(iommu, attach(8, 1), attach(9, 2))
        assert send(iommu, attach(10, 3)) is NOMEM
        assert iommu.endpoint(10).domain is None
        # Leaving a domain that then ceases to exist makes room.
        assert send(iommu, attach(9, 3)) is OK
        send_all(iommu, *(map_(1, at, at + PAGE - 1, 0) for at in (0, PAGE)))
        assert send(iommu, map_(1, 2 * PAGE, 3 * PAGE - 1, 0)) is NOMEM
        send_all(iommu, unmap(1, 0, PAGE - 1), map_(1, 2 * PAGE, 3 * PAGE - 1, 0))


class TestArithmetic:
    """Addresses at and beyond the ends of the 64-bit space."""

    @pytest.mark.parametrize("granule", [1, PAGE])
    @pytest.mark.parametrize(
        ("request_", "expected"),
        [
            (unmap(1, 0x2000, 0x1FFF), {INVAL}),
            (unmap(1, MAX, 0), {INVAL}),
            (unmap(1, 0, MAX), {OK}),
            (unmap(1, MAX, MAX), {OK}),
            (map_(1, 0x2000, 0x1FFF, 0), {INVAL}),
            (map_(1, MAX, 0, 0), {INVAL}),
            (map_(1, 0, MAX, 0), {INVAL}),
            (map_(1, 0x8000, MAX, 0), {OK}),
            (map_(1, MAX, MAX, 0), {OK, RANGE}),
            (map_(1, MAX - 0xFFF, MAX, MAX - 0xFFF), {OK}),
            (map_(1, 0x8000, 0xFFFF, MAX - 0xFFF), {OK}),
        ],
        ids=lambda value: None if isinstance(value, set) else str(wire.parse(value)),
    )
    def test_no_arithmetic_wraps(self, granule, request_, expected):
        iommu = VirtioIommu(endpoints=[8], page_size_mask=MAX & -granule)
        send_all(iommu, attach(8, 1), map_(1, 0, PAGE - 1, 0))
        assert send(iommu, request_) in expected
        send_all(iommu, unmap(1, 0, MAX))


@pytest.fixture
def physical():
    return GuestRegionCollection.from_ranges([(0, 0x40000)])


class TestFields:
    """Every field of a request counts: flags, input range, domain, reserved bytes."""

    @pytest.mark.parametrize("flags", range(4))
    def test_exact_permissions(self, flags, physical):
        iommu = VirtioIommu(endpoints=[8])
        send_all(iommu, attach(8, 1), map_(1, 0, PAGE - 1, 0, flags))
        memory = iommu.endpoint(8).memory(physical)
        for access in (R, W, RW):
            allowed = flags & access == access
            assert memory.check_range(0, PAGE, Permissions(access)) is allowed

    def test_input_range(self):
        iommu = VirtioIommu(endpoints=[8], input_range=(0, 0xFFFF))
        send_all(iommu, attach(8, 1))
        assert send(iommu, map_(1, 0x10000, 0x10FFF, 0)) is RANGE

    def test_mmio_needs_its_feature_and_is_kept(self):
        iommu = VirtioIommu(endpoints=[8])
        send_all(iommu, attach(8, 1), map_(1, 0, PAGE - 1, 0, 7))
        assert iommu.snapshot()["domains"][0]["mappings"] == [[0, PAGE - 1, 0, 7]]
        iommu.features = iommu.features & ~wire.F_MMIO
        assert send(iommu, map_(1, PAGE, 2 * PAGE - 1, 0, 7)) is INVAL

    def test_detach_looks_at_the_domain(self):
        iommu = VirtioIommu(endpoints=[8, 9])
        send_all(iommu, attach(8, 1), attach(9, 2))
        assert send(iommu, detach(8, 2)) is INVAL
        assert iommu.endpoint(8).domain == 1

    def test_reserved_and_alignment(self):
        iommu = VirtioIommu(endpoints=[8])
        assert send(iommu, attach(8, 1, reserved=b"\0\1\0\0")) is INVAL
        send_all(iommu, attach(8, 1))
        assert send(iommu, unmap(1, 0, PAGE - 1, reserved=b"\1\0\0\0")) is INVAL
        for start, end, phys in ((1, PAGE - 1, 0), (0, PAGE, 0), (0, PAGE - 1, 1)):
            assert send(iommu, map_(1, start, end, phys)) is RANGE
