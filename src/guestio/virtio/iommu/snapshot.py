"""The state of a virtio-iommu as plain data, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from guestio.addr import Permissions, check_seconds
from guestio.virtio.iommu import wire
from guestio.virtio.iommu.faults import FaultLog, FaultStats
from guestio.virtio.iommu.space import Endpoint, ReservedRegion, Space
from guestio.virtio.iommu.state import State
from guestio.virtio.iommu.wire import FaultRecord

VERSION = 1


def take(state: State, faults: FaultLog) -> dict[str, Any]:
    """The state as plain data."""
    limits = asdict(state.limits)
    limits["input_range"] = list(state.limits.input_range)
    limits["domain_range"] = list(state.limits.domain_range)
    return {
        "version": VERSION,
        "settings": {**limits, "bypass": state.bypass, "features": state.features},
        "endpoints": [_endpoint(state.endpoints[n], faults) for n in sorted(state.endpoints)],
        "domains": [_domain(state.domains[n]) for n in sorted(state.domains)],
        "records": [record.hex() for record in faults.waiting()],
    }


def _endpoint(endpoint: Endpoint, faults: FaultLog) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "domain": endpoint.domain,
        "reserved": [list(region) for region in endpoint.reserved],
        "faults": asdict(faults.stats(endpoint.id)),
        "sessions": [
            {
                "broken": session.broken,
                "time_limit": session.time_limit,
                "exports": [list(held) for held in session.exports],
            }
            for session in endpoint.sessions
        ],
    }


def _domain(space: Space) -> dict[str, Any]:
    entries = [] if space.bypass else space.mapper.mappings()
    return {
        "id": space.id,
        "bypass": space.bypass,
        "mappings": [
            [iova, iova + size - 1, gpa, prot | (wire.MAP_F_MMIO if iova in space.mmio else 0)]
            for iova, size, gpa, prot in entries
        ],
    }


def requests(state: State) -> Iterator[bytes]:
    """The requests by which a driver would bring a device that was reset into a state."""
    for number in sorted(state.domains):
        space = state.domains[number]
        flags = wire.ATTACH_F_BYPASS if space.bypass else 0
        for endpoint in sorted(space.endpoints):
            yield wire.pack(wire.Attach(number, endpoint, flags, bytes(4)))
        for first, last, gpa, access in _domain(space)["mappings"]:
            yield wire.pack(wire.Map(number, first, last, gpa, access))


def settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the device's constructor.

    Raises:
        ValueError: The data is not a snapshot of this version.
    """
    if data.get("version") != VERSION:
        raise ValueError(f"not a snapshot of version {VERSION}: {data.get('version')!r}")
    return dict(data["settings"])


def endpoints(data: Mapping[str, Any]) -> list[tuple[int, list[ReservedRegion]]]:
    """The endpoints and their reserved regions."""
    return [
        (known["id"], [(first, last, subtype) for first, last, subtype in known["reserved"]])
        for known in data["endpoints"]
    ]


def fill(state: State, faults: FaultLog, data: Mapping[str, Any]) -> None:
    """Bring a new device with all its endpoints into the state of the data.

    Raises:
        ValueError: The data contradicts itself.
    """
    for known in data["domains"]:
        if known["id"] in state.domains:
            raise ValueError(f"domain {known['id']} is there twice")
        space = state.domains[known["id"]] = _space(known, state)
        state.count(space.counted)
    for known in data["endpoints"]:
        endpoint = state.endpoints[known["id"]]
        if known["domain"] is not None:
            if known["domain"] not in state.domains:
                raise ValueError(f"endpoint {endpoint.id} is in a domain that does not exist")
            state.place(endpoint, state.domains[known["domain"]])
        for held in known["sessions"]:
            session = endpoint.open_session()
            limit = held["time_limit"]
            session.time_limit = None if limit is None else check_seconds(limit, "time_limit")
            session.restore([(iova, size) for iova, size in held["exports"]], held["broken"])
    if any(not space.endpoints for space in state.domains.values()):
        raise ValueError("a domain has no endpoint")
    records = [FaultRecord.fromhex(record) for record in data["records"]]
    stats = {known["id"]: FaultStats(**known["faults"]) for known in data["endpoints"]}
    faults.restore(records, stats)


def _space(known: Mapping[str, Any], state: State) -> Space:
    space = Space(known["id"], known["bypass"], state.new_mapper())
    for first, last, gpa, flags in known["mappings"]:
        prot = Permissions(flags & 3)
        registers = bool(flags & wire.MAP_F_MMIO)
        if not space.add(first, last - first + 1, gpa, prot, registers=registers):
            raise ValueError(f"domain {space.id} maps {first:#x}..{last:#x} twice")
    return space
