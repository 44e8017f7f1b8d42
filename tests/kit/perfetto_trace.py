"""Traces as Perfetto's own protocol definitions read them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perfetto.protos.perfetto.trace import (  # type: ignore[import-untyped]
    perfetto_trace_pb2 as protos,
)

BEGIN, END, INSTANT, COUNTER = 1, 2, 3, 4


@dataclass
class Slice:
    """A slice of a track, or an instant: `end` is `begin` then."""

    track: str
    name: str
    category: str
    begin: int
    end: int
    flows: list[int]
    ended_flows: list[int]
    notes: dict[str, Any]
    depth: int = 0
    children: list[Slice] = field(default_factory=list)


class Trace:
    """A trace, as trace_processor would have it: packets sorted by time, slices that nest."""

    def __init__(self, path: Path) -> None:
        trace = protos.Trace()
        trace.ParseFromString(path.read_bytes())
        self.names: dict[int, str] = {}
        self.parents: dict[int, int] = {}
        self.processes: list[tuple[int, str]] = []
        self.slices: list[Slice] = []
        self.counters: dict[str, list[int]] = {}
        for packet in trace.packet:
            assert packet.trusted_packet_sequence_id == 1
            if packet.HasField("track_descriptor"):
                self._describe(packet.track_descriptor)
        open_slices: dict[int, list[Slice]] = {}
        events = [packet for packet in trace.packet if packet.HasField("track_event")]
        for packet in sorted(events, key=lambda each: each.timestamp):
            self._event(packet.timestamp, packet.track_event, open_slices)
        assert not any(open_slices.values()), "slices without an end"

    def _describe(self, track: Any) -> None:
        assert track.uuid not in self.names, "described twice"
        self.names[track.uuid] = track.name
        self.parents[track.uuid] = track.parent_uuid
        if track.HasField("process"):
            self.processes.append((track.process.pid, track.process.process_name))
        elif track.parent_uuid:
            assert track.parent_uuid in self.names, "its parent is described before"

    def path_of(self, track: int) -> str:
        parts: list[str] = []
        while track:
            parts.append(self.names[track])
            track = self.parents[track]
        return "/".join(filter(None, reversed(parts)))

    def _event(self, time: int, event: Any, open_slices: dict[int, list[Slice]]) -> None:
        track = self.path_of(event.track_uuid)
        stack = open_slices.setdefault(event.track_uuid, [])
        if event.type == COUNTER:
            self.counters.setdefault(track, []).append(event.counter_value)
        elif event.type == END:
            stack.pop().end = time
        else:
            found = Slice(
                track,
                event.name,
                ",".join(event.categories),
                time,
                time,
                list(event.flow_ids),
                list(event.terminating_flow_ids),
                {
                    each.name: each.pointer_value or each.uint_value or each.int_value
                    for each in event.debug_annotations
                },
                len(stack),
            )
            self.slices.append(found)
            if event.type == BEGIN:
                if stack:
                    stack[-1].children.append(found)
                stack.append(found)

    def counts(self, category: str) -> Counter[str]:
        """How many slices and instants of a category there are, by name."""
        return Counter(each.name for each in self.slices if each.category == category)
