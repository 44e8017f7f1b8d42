"""A virtio-iommu with faults that can be switched on, each of which a check must find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from guestio.virtio.iommu import Pending, Status, VirtioIommu, wire

Change = Callable[["BrokenIommu", wire.Request, bytes], bytes]

RANGES: dict[str, Any] = {
    "input_range": (0, 2**39 - 1),
    "domain_range": (0, 0xFFFF),
    "reserved": [(0xFEE00000, 0xFEEFFFFF, wire.RESV_MEM_MSI)],
}
"""Limits of a device that has all of them."""


class BrokenIommu(VirtioIommu):
    """Two endpoints, and a fault.

    Args:
        fault: Its name; "" for none.
        options: More of `VirtioIommu`.
    """

    def __init__(self, fault: str = "", **options: Any) -> None:
        self.fault = fault
        super().__init__([8, 9], **{**RANGES, **options})

    def has(self, fault: str) -> bool:
        """Whether it has this fault."""
        return self.fault == fault

    # What a driver is told

    @property
    def offered_features(self) -> int:
        """See `VirtioIommu`."""
        bits = super().offered_features
        if self.has("offers-bypass"):
            bits |= wire.F_BYPASS
        if self.has("no-map-unmap"):
            bits &= ~wire.F_MAP_UNMAP
        return bits

    def config(self) -> bytes:
        """See `VirtioIommu`."""
        config = bytearray(super().config())
        if self.has("no-page-size"):
            config[:8] = bytes(8)
        if self.has("input-inverted"):
            config[8:24] = config[16:24] + b"\1" + bytes(7)
            config[8:16] = b"\2" + bytes(7)
            config[16:24] = b"\1" + bytes(7)
        if self.has("domains-inverted"):
            config[24:32] = b"\2\0\0\0\1\0\0\0"
        if self.has("always-bypasses"):
            config[wire.BYPASS_OFFSET] = 0
        if self.has("bypass-wide") and config[wire.BYPASS_OFFSET]:
            config[wire.BYPASS_OFFSET] = 0xFF
        return bytes(config)

    def write_config(self, offset: int, data: bytes) -> None:
        """See `VirtioIommu`."""
        if self.has("bypass-fixed") or self.has("always-bypasses"):
            return
        if self.has("bypass-keeps-all") and offset == wire.BYPASS_OFFSET:
            self.fault = "bypass-wide"
            data = b"\1"
        super().write_config(offset, data)

    def reset(self) -> Pending | None:
        """See `VirtioIommu`."""
        if self.has("reset-does-nothing"):
            return None
        if self.has("reset-bypasses"):
            self.bypass = True
        return super().reset()

    # Requests

    def handle_request(self, request: bytes, writable: int) -> bytes | Pending:
        """See `VirtioIommu`."""
        request = self._read_wrongly(bytes(request))
        parsed = wire.parse(request)
        if parsed is None:
            if self.has("unknown-unsupported") and writable >= 4:
                return wire.tail(Status.UNSUPP)
            if self.has("short-succeeds") and writable >= 4 and len(request) > 1:
                return bytes(writable - 4) + wire.tail(Status.OK)
            return super().handle_request(request, writable)
        done = self._instead(parsed, request, writable)
        answer = super().handle_request(request, writable) if done is None else done
        return self._answer_wrongly(parsed, answer) if isinstance(answer, bytes) else answer

    def _read_wrongly(self, request: bytes) -> bytes:
        if self.has("head-looked-at") and request[1:4] != bytes(3):
            return b"\x63" + request[1:]
        if self.has("endpoints-16-bit") and request[:1] in {b"\1", b"\2"}:
            return request[:10] + bytes(2) + request[12:]
        if self.has("probes-16-bit") and request[:1] == b"\5":
            return request[:6] + bytes(2) + request[8:]
        return request

    def _instead(self, request: wire.Request, raw: bytes, room: int) -> bytes | None:
        """What is answered without doing it properly; None to do it."""
        ok, base = wire.tail(Status.OK), super().handle_request

        def do(changed: wire.Request) -> bytes:
            answer = base(wire.pack(changed), room)
            return answer if isinstance(answer, bytes) else answer.result(10)

        match request:
            case wire.Attach():
                if self.has("attach-ignores-reserved"):
                    return do(request._replace(reserved=bytes(4)))
                if self.has("attach-ignores-flags"):
                    return do(request._replace(flags=request.flags & wire.ATTACH_F_BYPASS))
                if self.has("attach-anything") and request.endpoint not in self.endpoint_ids:
                    return ok
                if self.has("attach-does-nothing"):
                    return ok
                if self.has("attach-own-range"):
                    return do(request._replace(domain=request.domain & 0xFFFF))
                if self.has("attach-one") and any(
                    self.endpoint(n).domain == request.domain and n != request.endpoint
                    for n in self.endpoint_ids
                ):
                    return wire.tail(Status.INVAL)
                if self.has("attach-stays") and request.endpoint in self.endpoint_ids:
                    now = self.endpoint(request.endpoint).domain
                    if now is not None and now != request.domain:
                        return ok
                if self.has("attach-any-bypass"):
                    answer = do(request)
                    return do(request._replace(flags=request.flags ^ 1)) if answer[0] else answer
                if self.has("attach-again-clears") and request.endpoint in self.endpoint_ids:
                    do(wire.Unmap(request.domain, 0, (1 << 64) - 1, bytes(4)))
            case wire.Detach():
                if self.has("detach-looks-at-reserved") and any(raw[-8:]):
                    return wire.tail(Status.INVAL)
                if self.has("detach-anything"):
                    do(request)
                    return ok
                if self.has("detach-does-nothing") and do(request)[0] != Status.NOENT:
                    return self._reattach(request)
                if self.has("detach-any-domain") and request.endpoint in self.endpoint_ids:
                    domain = self.endpoint(request.endpoint).domain
                    return do(request._replace(domain=domain or 0))
            case wire.Map():
                return self._map_instead(request, do)
            case wire.Unmap():
                return self._unmap_instead(request, do)
            case _:
                pass
        return None

    def _reattach(self, request: wire.Detach) -> bytes:
        attach = wire.pack(wire.Attach(request.domain, request.endpoint, 0, bytes(4)))
        answer = super().handle_request(attach, 4)
        assert isinstance(answer, bytes)
        return answer

    def _map_instead(self, request: wire.Map, do: Callable[[wire.Request], bytes]) -> bytes | None:
        page = 4096
        if self.has("map-rounds"):
            first, last = request.virt_start & -page, request.virt_end | page - 1
            phys = request.phys_start & -page
            return do(request._replace(virt_start=first, virt_end=last, phys_start=phys))
        if self.has("map-replaces"):
            if do(request)[0] == Status.INVAL:
                do(wire.Unmap(request.domain, 0, (1 << 64) - 1, bytes(4)))
                return do(request)
            return wire.tail(Status.OK)
        if self.has("map-any-flags"):
            return do(request._replace(flags=request.flags & 3))
        if self.has("map-always-writable"):
            return do(request._replace(flags=request.flags | 2))
        if self.has("map-elsewhere"):
            return do(request._replace(phys_start=request.phys_start ^ page))
        if self.has("map-too-much"):
            if not do(request._replace(virt_end=request.virt_end + page))[0]:
                return wire.tail(Status.OK)
            return do(request)
        if self.has("map-always-succeeds"):
            do(request)
            return wire.tail(Status.OK)
        if self.has("map-no-edges") and request.virt_start == 0:
            return wire.tail(Status.RANGE)
        return None

    def _unmap_instead(
        self, request: wire.Unmap, do: Callable[[wire.Request], bytes]
    ) -> bytes | None:
        if self.has("unmap-does-nothing") and request.domain:
            answer = do(request._replace(virt_start=0, virt_end=0))
            return wire.tail(Status.OK) if answer[0] == Status.RANGE else answer
        if self.has("unmap-fails-if-nothing"):
            before = self._count(request.domain)
            answer = do(request)
            unchanged = not answer[0] and self._count(request.domain) == before
            return wire.tail(Status.INVAL) if unchanged else answer
        if self.has("unmap-splits"):
            answer = do(request)
            return wire.tail(Status.OK) if answer[0] == Status.RANGE else answer
        if self.has("unmap-takes-all"):
            return do(request._replace(virt_start=0, virt_end=(1 << 64) - 1))
        if self.has("unmap-anywhere"):
            do(request)
            return wire.tail(Status.OK)
        if self.has("unmap-strange"):
            return wire.tail(Status.NOMEM) if any(request.reserved) else None
        if self.has("unmap-takes-split") and do(request)[0] == Status.RANGE:
            do(request._replace(virt_start=0, virt_end=request.virt_start + 0x1FFF))
            return wire.tail(Status.RANGE)
        return None

    def _count(self, domain: int) -> int:
        for known in self.snapshot()["domains"]:
            if known["id"] == domain:
                return len(known["mappings"])
        return 0

    def _answer_wrongly(self, request: wire.Request, answer: bytes) -> bytes:
        if self.has("tail-not-zero") and answer:
            return answer[:-1] + b"\1"
        if self.has("always-device-error") and answer and not answer[-4]:
            return answer[:-4] + wire.tail(Status.DEVERR)
        if not isinstance(request, wire.Probe) or not answer or answer[-4]:
            if isinstance(request, wire.Probe) and self.has("probe-succeeds") and answer:
                return answer[:-4] + wire.tail(Status.OK)
            return answer
        if self.has("probe-endless"):
            return b"\x01\x00\xff\xff" + answer[4:]
        if self.has("probe-bits"):
            return answer[:1] + b"\xf0" + answer[2:]
        if self.has("probe-rest"):
            return answer[:-5] + b"\1" + answer[-4:]
        if self.has("probe-reserved"):
            return answer[:5] + b"\1" + answer[6:]
        if self.has("probe-two-msi"):
            return answer[:24] + answer[:24] + answer[48:]
        return answer

    # Faults

    def event_fault(self, record: wire.FaultRecord) -> wire.FaultRecord:
        """The record as it is reported."""
        raw = bytearray(record)
        if self.has("fault-reason"):
            raw[0] = 0
        if self.has("fault-reserved"):
            raw[1] = 1
        if self.has("fault-flags"):
            raw[7] = 0x80
        if self.has("fault-direction"):
            raw[4] ^= 3
        if self.has("fault-endpoint"):
            raw[8] ^= 0x40
        if self.has("fault-address"):
            raw[17] ^= 0x55
        return wire.FaultRecord(bytes(raw))

    def report(self, record: wire.FaultRecord) -> None:
        """See `VirtioIommu`."""
        changed = self.event_fault(record)
        # An endpoint that does not exist has no reports.
        self._faults.add(changed) if self.has("fault-endpoint") else super().report(changed)


FAULTS: list[tuple[str, str]] = [
    ("features.map-unmap", "no-map-unmap"),
    ("features.bypass-superseded", "offers-bypass"),
    ("features.not-both-bypass", "offers-bypass"),
    ("config.page-size", "no-page-size"),
    ("config.input-range", "input-inverted"),
    ("config.domain-range", "domains-inverted"),
    ("config.bypass-value", "bypass-wide"),
    ("config.bypass-written", "bypass-fixed"),
    ("config.bypass-kept", "reset-bypasses"),
    ("config.bypass-other-value", "bypass-keeps-all"),
    ("reset.domains", "reset-does-nothing"),
    ("reset.mappings", "reset-does-nothing"),
    ("reset.unattached", "always-bypasses"),
    ("bypass.switched", "bypass-fixed"),
    ("request.ok", "always-device-error"),
    ("request.tail-reserved", "tail-not-zero"),
    ("request.head-reserved", "head-looked-at"),
    ("request.unknown-type", "unknown-unsupported"),
    ("request.short-ATTACH", "short-succeeds"),
    ("request.short-MAP", "short-succeeds"),
    ("request.short-UNMAP", "short-succeeds"),
    ("request.short-DETACH", "short-succeeds"),
    ("request.short-PROBE", "short-succeeds"),
    ("attach.creates", "attach-does-nothing"),
    ("attach.reserved", "attach-ignores-reserved"),
    ("attach.unknown-flag", "attach-ignores-flags"),
    ("attach.no-endpoint", "attach-anything"),
    ("attach.wide-endpoint", "endpoints-16-bit"),
    ("attach.second-endpoint", "attach-one"),
    ("attach.isolated", "attach-does-nothing"),
    ("attach.bypass-to-mapped", "attach-any-bypass"),
    ("attach.mapped-to-bypass", "attach-any-bypass"),
    ("attach.again-other-flag", "attach-any-bypass"),
    ("attach.moves", "attach-stays"),
    ("attach.moved-reach", "attach-stays"),
    ("attach.again", "attach-again-clears"),
    ("attach.domain-range", "attach-own-range"),
    ("attach.refused-moves-nothing", "attach-ignores-flags"),
    ("detach.last", "detach-does-nothing"),
    ("detach.reserved", "detach-looks-at-reserved"),
    ("detach.no-endpoint", "detach-anything"),
    ("detach.other-domain", "detach-any-domain"),
    ("map.translates", "map-elsewhere"),
    ("map.bounds", "map-too-much"),
    ("map.read-only", "map-always-writable"),
    ("map.no-access", "map-always-writable"),
    ("map.unaligned-start", "map-rounds"),
    ("map.unaligned-end", "map-rounds"),
    ("map.unaligned-half", "map-rounds"),
    ("map.unaligned-physical", "map-rounds"),
    ("map.overlap-same", "map-replaces"),
    ("map.overlap-inside", "map-replaces"),
    ("map.overlap-around", "map-replaces"),
    ("map.overlap-begin", "map-replaces"),
    ("map.overlap-end", "map-replaces"),
    ("map.unknown-flag", "map-any-flags"),
    ("map.mmio-not-negotiated", "map-any-flags"),
    ("map.no-domain", "map-always-succeeds"),
    ("map.bypass-domain", "map-always-succeeds"),
    ("map.input-range", "map-always-succeeds"),
    ("map.edges", "map-no-edges"),
    ("map.inverted", "map-always-succeeds"),
    ("unmap.nothing", "unmap-fails-if-nothing"),
    ("unmap.one", "unmap-does-nothing"),
    ("unmap.two", "unmap-does-nothing"),
    ("unmap.first", "unmap-takes-all"),
    ("unmap.spill", "unmap-does-nothing"),
    ("unmap.gap", "unmap-does-nothing"),
    ("unmap.split-begin", "unmap-splits"),
    ("unmap.split-middle", "unmap-splits"),
    ("unmap.split-end", "unmap-splits"),
    ("unmap.split-beyond", "unmap-splits"),
    ("unmap.split-removes-none", "unmap-takes-split"),
    ("unmap.reach", "unmap-does-nothing"),
    ("unmap.all", "unmap-does-nothing"),
    ("unmap.reserved", "unmap-strange"),
    ("unmap.no-domain", "unmap-anywhere"),
    ("unmap.bypass-domain", "unmap-anywhere"),
    ("unmap.inverted", "unmap-takes-all"),
    ("probe.answer", "probe-endless"),
    ("probe.no-endpoint", "probe-succeeds"),
    ("probe.wide-endpoint", "probes-16-bit"),
    ("probe.property-reserved", "probe-bits"),
    ("probe.rest", "probe-rest"),
    ("probe.little-room", "probe-succeeds"),
    ("resv-mem.reserved", "probe-reserved"),
    ("resv-mem.one-msi", "probe-two-msi"),
    ("resv-mem.overlap", "probe-two-msi"),
    ("resv-mem.map", "map-always-succeeds"),
    ("fault.mapping", "fault-reason"),
    ("fault.domain", "fault-reason"),
    ("fault.permission", "fault-reason"),
    ("fault.endpoint", "fault-endpoint"),
    ("fault.address", "fault-address"),
    ("fault.direction", "fault-direction"),
    ("fault.reserved", "fault-reserved"),
    ("fault.flags", "fault-flags"),
]
"""Checks, and the fault that each must find."""
