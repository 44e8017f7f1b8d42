"""Recorded lives of QEMU's virtio-iommu, replayed on ours.

Ours must give an answer that the specification allows to every request, also where QEMU does not.
"""

import gzip
import json
from pathlib import Path

import pytest

from guestio import CannotResolveError, GuestRegionCollection
from guestio.virtio.iommu import VirtioIommu

TRACES = Path(__file__).parent.parent / "traces" / "virtio-iommu-qemu-10.0.2.jsonl.gz"

# Expected differences: requests that QEMU 10.0.2 answers otherwise than the specification allows,
# by what the request is.
QEMU_DIFFERS = {
    "attach-again-other-flag": "a bypass flag that contradicts the domain is taken back",
    "attach-endpoint-over-16-bits": "endpoint ids are cut to 16 bits",
    "attach-reserved": "the reserved bytes of ATTACH are not looked at",
    "detach-not-attached": "an endpoint that is not attached gets NOENT instead of INVAL",
    "detach-twice": "an endpoint that is not attached gets NOENT instead of INVAL",
    "map-beyond-input-range": "the input range is not enforced",
    "map-inverted": "virt_end below virt_start is accepted",
    "map-reserved-region": "reserved regions are not enforced",
    "map-top": "the input range is not enforced",
    "map-unaligned": "alignment is not enforced",
    "map-whole-range": "reserved regions are not enforced",
    "no-head": "a request that cannot be parsed breaks the device",
    "probe-endpoint-over-16-bits": "endpoint ids are cut to 16 bits",
    "probe-short-buffer": "too small a PROBE buffer gets DEVERR instead of INVAL",
    "unknown-type": "an unknown type gets UNSUPP instead of no answer",
}

# Accesses after QEMU has accepted a MAP that must be refused: its domain is not ours.
OTHER_STATE = {
    "mapping shorter than a granule: reaches past its end",
    "just past a mapping shorter than a granule",
    "unaligned physical address, start of granule",
    "unaligned physical address",
    "unaligned physical address, sum carries",
    "top of the 64-bit space, nothing mapped",
    "top of the 64-bit space, mapped",
    "very last byte, mapped",
}


def load():
    lives = []
    with gzip.open(TRACES, "rt") as lines:
        for line in lines:
            entry = json.loads(line)
            if entry["kind"] == "config":
                lives.append((entry, []))
            else:
                lives[-1][1].append(entry)
    return lives


LIVES = load()


class Replay:
    def __init__(self, config):
        self.iommu = VirtioIommu(
            endpoints=config["endpoints"],
            page_size_mask=config["page_size_mask"],
            input_range=tuple(config["input_range"]),
            domain_range=tuple(config["domain_range"]),
            probe_size=config["probe_size"],
            bypass=config["bypass"],
            features=config["features_negotiated"],
            reserved=[tuple(region) for region in config["reserved"]],
        )
        self.physical = GuestRegionCollection.from_ranges([(0, 128 << 20)])
        self.other_state = set()

    def req(self, entry):
        answer = self.iommu.handle_request(bytes.fromhex(entry["out"]), sum(entry["in_segs"]))
        assert isinstance(answer, bytes)
        if entry.get("heal") or entry["spec"] is None:
            return
        outcome = answer[-4] if answer else "unwritten"
        assert outcome in entry["spec"], entry
        if answer and outcome == entry.get("status"):
            assert answer.hex() == entry["in"], entry
        if not entry["conform"]:
            assert entry["tag"] in QEMU_DIFFERS, entry

    def reset(self, entry):
        assert self.iommu.reset() is None

    def bypass(self, entry):
        self.iommu.bypass = entry["value"]
        assert self.iommu.bypass == entry["reads"]
        assert self.iommu.config()[36] == entry["reads"]

    def dma(self, entry):
        if not self.same_state(entry):
            assert entry["tag"] in OTHER_STATE, entry
            self.other_state.add(entry["tag"])
            return
        if any("reserved" in piece for piece in entry["spec"]):
            return
        memory = self.iommu.endpoint(entry["endpoint"]).memory(self.physical)
        access = self.write if entry["op"] == "write" else self.read
        expected = [
            (piece["fault"], entry["endpoint"], piece["iova"])
            for piece in entry["spec"]
            if "fault" in piece
        ]
        self.iommu.event_records()
        # The whole access: all or nothing, and a record for each part that failed.
        if expected:
            with pytest.raises(CannotResolveError):
                access(memory, entry["iova"], entry["len"], None)
        else:
            access(memory, entry["iova"], entry["len"], None)
        records = self.iommu.event_records()
        assert [(r.reason, r.endpoint, r.address) for r in records] == expected, entry
        assert all(bool(r.flags & 2) == (entry["op"] == "write") for r in records)
        # Piece by piece: what the specification lets through moves, and to the right place.
        for piece in entry["spec"]:
            if "gpa" in piece:
                access(memory, piece["iova"], piece["len"], piece["gpa"])
            else:
                with pytest.raises(CannotResolveError):
                    access(memory, piece["iova"], piece["len"], None)

    def write(self, memory, iova, length, gpa):
        data = bytes((iova + i) % 251 for i in range(length))
        memory.write(iova, data)
        if gpa is not None:
            assert self.physical.read(gpa, length) == data

    def read(self, memory, iova, length, gpa):
        if gpa is not None:
            self.physical.write(gpa, bytes((gpa + i) % 241 for i in range(length)))
        data = memory.read(iova, length)
        if gpa is not None:
            assert data == self.physical.read(gpa, length)

    def same_state(self, entry):
        state = entry["state"]
        domains = {known["id"]: known for known in self.iommu.snapshot()["domains"]}
        endpoint = self.iommu.endpoint(entry["endpoint"])
        if endpoint.domain != state["domain"]:
            return False
        mine = domains[endpoint.domain]["mappings"] if endpoint.domain is not None else []
        return sorted(mine) == sorted(state.get("maps", []))


@pytest.mark.parametrize(("config", "entries"), LIVES, ids=[config["name"] for config, _ in LIVES])
def test_life(config, entries):
    replay = Replay(config)
    for entry in entries:
        getattr(replay, entry["kind"])(entry)


def test_every_listed_difference_occurs():
    differing = {
        entry["tag"]
        for _, entries in LIVES
        for entry in entries
        if entry["kind"] == "req" and not entry.get("heal") and entry["conform"] is False
    }
    assert set(QEMU_DIFFERS) == differing


def test_only_listed_accesses_meet_another_state():
    met = set()
    for config, entries in LIVES:
        if config["name"].startswith("dma-quirk"):
            replay = Replay(config)
            for entry in entries:
                getattr(replay, entry["kind"])(entry)
            met |= replay.other_state
    assert met == OTHER_STATE
