"""What a check of a virtio-iommu works with: a driver, endpoints, and what they can reach."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Final

from guestio.faults.base_trial import QUIET, BaseTrial
from guestio.faults.outcomes import OutcomeError
from guestio.faults.virtio_iommu.driver import DATA, DMA_BYTES, Answer, Carrier, IommuDriver
from guestio.faults.virtio_iommu.ports import VERSION_1
from guestio.virtio.iommu import FaultRecord, Status, wire

PAGE: Final = 4096
TAIL: Final = wire.TAIL_BYTES
R, W, RW = wire.MAP_F_READ, wire.MAP_F_WRITE, wire.MAP_F_READ | wire.MAP_F_WRITE
DOMAIN: Final = 1
OTHER: Final = 2
IOVA: Final = 0x100000
"""Where checks map things, far from what is reserved."""
PHYS: Final = DATA
"""Guest memory that they map."""

_SCRATCH: Final = DATA + 0x400000
_SCRATCH_IOVA: Final = 0x3000000
_DUMP_DOMAIN: Final = 1000
_KNOWN: Final = 0x7F | VERSION_1


class IommuTrial(BaseTrial):
    """One run of one check of a virtio-iommu.

    Args:
        connect: Reaches the device.
        patience: Seconds that an answer may take.
        seed: Of everything random.
        known: Endpoints that were found earlier, for a device that does not name them; filled.

    Attributes:
        features: What was negotiated.
        page: Granularity of mappings, 4096 or more: smaller ones allow that too.
    """

    def __init__(
        self,
        connect: Callable[[float], Carrier],
        *,
        patience: float,
        seed: str,
        known: list[int],
    ) -> None:
        super().__init__(patience, seed)
        self._connect = connect
        self._carrier: Carrier | None = None
        self._driver: IommuDriver | None = None
        self._known = known
        self._tried: set[tuple[int, int]] = set()
        self._domains: dict[int, tuple[int, bool]] = {}
        self._initial_bypass: int | None = None
        self.features = 0
        self.page = PAGE

    # Life

    @property
    def carrier(self) -> Carrier:
        """What reaches the device."""
        if self._carrier is None:
            self._carrier = self._connect(self.patience)
            self.on_close(self._carrier.release)
            self._driver = IommuDriver(self._carrier, self.patience)
            self.on_close(self._driver.close)
            self.on_close(self._clean_up)
        return self._carrier

    @property
    def driver(self) -> IommuDriver:
        """The driver."""
        assert self.carrier is not None
        assert self._driver is not None
        return self._driver

    @property
    def offered(self) -> int:
        """Feature bits that the device offers."""
        return self.carrier.offered

    def begin(
        self, *, without: int = 0, only: int | None = None, bypass: bool | None = False
    ) -> None:
        """Reset the device and set it up.

        Args:
            without: Feature bits that are not accepted.
            only: The feature bits to accept, where offered; None for all of the device's type.
            bypass: What unattached endpoints do, if that can be chosen; None to leave it.
        """
        wanted = (_KNOWN if only is None else only) & ~without
        self.features = self.offered & wanted
        self.driver.start(self.features)
        config = self.carrier.config()
        mask = int.from_bytes(config[:8], "little")
        if mask:
            self.page = max(PAGE, mask & -mask)
        if self._initial_bypass is None:
            self._initial_bypass = config[wire.BYPASS_OFFSET]
        if bypass is not None and self.features & wire.F_BYPASS_CONFIG:
            self.set_bypass(bypass)

    def set_bypass(self, on: bool | int) -> None:
        """Write ``bypass`` to the configuration space."""
        self.carrier.write_config(wire.BYPASS_OFFSET, bytes([int(on)]))

    def _clean_up(self) -> None:
        """Take back what outlives a reset in devices that keep it."""
        if not self._tried and self._initial_bypass is None:
            return
        with contextlib.suppress(OutcomeError):
            self.driver.start(self.offered & _KNOWN)
            for domain, endpoint in self._tried:
                self.ask(wire.Detach(domain, endpoint))
            if self._initial_bypass is not None and self.features & wire.F_BYPASS_CONFIG:
                self.set_bypass(self._initial_bypass)

    def probe(self) -> None:
        """Attach an endpoint, map, unmap and detach it."""
        self.begin()
        endpoint = self.endpoints()[0]
        for request in (
            wire.Attach(DOMAIN, endpoint, 0, bytes(4)),
            wire.Map(DOMAIN, IOVA, IOVA + self.page - 1, PHYS, RW),
            wire.Unmap(DOMAIN, IOVA, IOVA + self.page - 1, bytes(4)),
            wire.Detach(DOMAIN, endpoint),
        ):
            self.succeeds(request)

    def need(self, bit: int, name: str) -> None:
        """Skip the check unless a feature is offered."""
        if not self.offered & bit:
            self.skip(f"{name} is not offered")

    def need_dma(self) -> None:
        """Skip the check if endpoints are out of reach."""
        if not self.carrier.has_dma:
            self.skip("endpoints behind a socket are out of reach")

    def endpoints(self, count: int = 1) -> list[int]:
        """Endpoints that there are; the check is skipped if there are fewer."""
        candidates = list(self.carrier.endpoints)
        if len(candidates) > 2:
            candidates = self._found(candidates)
        if len(candidates) < count:
            self.skip(f"the device has {len(candidates)} endpoints")
        return candidates[:count]

    def _found(self, candidates: Iterable[int]) -> list[int]:
        if not self._known:
            for endpoint in candidates:
                request = wire.Attach(DOMAIN, endpoint, 0, bytes(4))
                if self.ask(request).status == Status.OK:
                    self.ask(wire.Detach(DOMAIN, endpoint))
                    self._known.append(endpoint)
                if len(self._known) == 2:
                    break
        return list(self._known)

    def absent_endpoint(self) -> int:
        """The id of an endpoint that there is not, in 16 bits."""
        return 0xFEDC

    # Requests

    def raw(
        self,
        request: bytes,
        room: int = TAIL,
        *,
        cuts: Sequence[int] = (),
        rooms: Sequence[int] = (),
    ) -> Answer:
        """Send bytes as a request.

        Args:
            request: The device-readable part.
            room: Bytes of the device-writable part.
            cuts: Where the device-readable part is cut into descriptors.
            rooms: Sizes of the device-writable descriptors, instead of one.
        """
        ends = [0, *cuts, len(request)]
        pieces = [request[a:b] for a, b in pairwise(ends) if b > a]
        answer = self.driver.ask(pieces, list(rooms) or ([room] if room else []))
        parsed = wire.parse(request)
        if isinstance(parsed, wire.Attach) and answer.status == Status.OK:
            self._tried.add((parsed.domain, parsed.endpoint))
            bypass = bool(parsed.flags & wire.ATTACH_F_BYPASS)
            self._domains[parsed.endpoint] = (parsed.domain, bypass)
        elif isinstance(parsed, wire.Detach) and answer.status == Status.OK:
            self._domains.pop(parsed.endpoint, None)
        return answer

    def ask(self, request: wire.Request) -> Answer:
        """Send a request as a driver does."""
        room = self.probe_size + TAIL if isinstance(request, wire.Probe) else TAIL
        return self.raw(wire.pack(request), room)

    @property
    def probe_size(self) -> int:
        """Bytes of properties; the field is there if PROBE is offered."""
        if not self.offered & wire.F_PROBE:
            return 0
        size = int.from_bytes(self.carrier.config()[32:36], "little")
        if size > 1 << 16:
            self.fail(f"probe_size is {size}")
        return size

    def succeeds(self, request: wire.Request) -> Answer:
        """Send a request that must be answered OK."""
        answer = self.ask(request)
        self.expect(answer.status == Status.OK, f"{_name(request)} is answered with {answer}")
        return answer

    def refused(self, request: wire.Request, *wanted: Status) -> None:
        """Send a request that must be refused, with one of these statuses; any if there are none.

        Raises:
            RejectError: It was refused with another one.
        """
        self.is_refusal(self.ask(request), *wanted)

    def is_refusal(self, answer: Answer, *wanted: Status) -> None:
        """As :meth:`refused`, of an answer that came."""
        said = " or ".join(each.name for each in wanted) or "a failure"
        self.expect(answer.status != Status.OK, f"answered with OK, not with {said}")
        if wanted and answer.status not in wanted:
            self.fail(f"answered with {answer}, not with {said}")

    def attach(self, endpoint: int, domain: int = DOMAIN, flags: int = 0) -> None:
        """Attach an endpoint, which must succeed."""
        self.succeeds(wire.Attach(domain, endpoint, flags, bytes(4)))

    def detach(self, endpoint: int, domain: int = DOMAIN) -> None:
        """Detach an endpoint, which must succeed."""
        self.succeeds(wire.Detach(domain, endpoint))

    def map(  # what a driver does, and shadows nothing here
        self, iova: int, size: int, phys: int, flags: int = RW, domain: int = DOMAIN
    ) -> None:
        """Map, which must succeed."""
        self.succeeds(wire.Map(domain, iova, iova + size - 1, phys, flags))

    def unmap(self, iova: int, size: int, domain: int = DOMAIN) -> None:
        """Unmap, which must succeed."""
        self.succeeds(wire.Unmap(domain, iova, iova + size - 1, bytes(4)))

    def is_mapped(self, iova: int, size: int, domain: int = DOMAIN) -> bool:
        """Whether there is a mapping, by whether it can be mapped again; it stays as it is."""
        answer = self.ask(wire.Map(domain, iova, iova + size - 1, PHYS, RW))
        if answer.status == Status.OK:
            self.unmap(iova, size, domain)
            return False
        self.expect(answer.status == Status.INVAL, f"MAP is answered with {answer}")
        return True

    def exists(self, domain: int) -> bool:
        """Whether there is a domain, by what an UNMAP of nothing is answered."""
        answer = self.ask(wire.Unmap(domain, 0, self.page - 1, bytes(4)))
        return answer.status != Status.NOENT

    # What endpoints reach

    def reads(self, endpoint: int, iova: int, phys: int, length: int = 64) -> bool:
        """Whether a read of an endpoint reaches guest memory.

        The endpoint must be attached, or be attachable: what it has read is looked at by having
        it write that to memory through a mapping made for it.
        """
        data = self.random.randbytes(length)
        self.carrier.memory.write(phys, data)
        self.carrier.dma_read(endpoint, iova, length)
        return self._dump(endpoint, length) == data

    def writes(self, endpoint: int, iova: int, phys: int, length: int = 64) -> bool:
        """Whether a write of an endpoint reaches guest memory."""
        before = self.random.randbytes(length)
        self.carrier.memory.write(phys, before)
        self.carrier.dma_write(endpoint, iova, length)
        return self.carrier.memory.read(phys, length) != before

    def fill(self, endpoint: int) -> bytes:
        """Have an endpoint's buffer hold random bytes, which are returned; it is attached then."""
        data = self.random.randbytes(DMA_BYTES)
        self._through_scratch(
            endpoint, lambda at: self.carrier.dma_read(endpoint, at, DMA_BYTES), data
        )
        return data

    def _dump(self, endpoint: int, length: int) -> bytes:
        """What an endpoint's buffer begins with."""
        self._through_scratch(
            endpoint, lambda at: self.carrier.dma_write(endpoint, at, length), bytes(DMA_BYTES)
        )
        return self.carrier.memory.read(_SCRATCH, length)

    def _through_scratch(self, endpoint: int, act: Callable[[int], None], data: bytes) -> None:
        self.carrier.memory.write(_SCRATCH, data)
        attached = self._domains.get(endpoint)
        if attached is None:
            self.attach(endpoint, _DUMP_DOMAIN)
            domain, bypass = _DUMP_DOMAIN, False
        else:
            domain, bypass = attached
        if bypass:
            act(_SCRATCH)
        else:
            self.map(_SCRATCH_IOVA, self.page, _SCRATCH, RW, domain)
            act(_SCRATCH_IOVA)
            self.unmap(_SCRATCH_IOVA, self.page, domain)
        if attached is None:
            self.detach(endpoint, _DUMP_DOMAIN)

    # Events

    def records(self, count: int = 1) -> list[FaultRecord]:
        """Fault records that came: as soon as there are so many, or after a moment of none."""
        seconds = self.patience if count else QUIET
        return [FaultRecord(each) for each in self.driver.events(count, seconds)]


def _name(request: wire.Request) -> str:
    return type(request).__name__.upper()
