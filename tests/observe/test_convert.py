"""Recordings as Perfetto and Wireshark read them, and the same numbers everywhere."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner

from guestio.cli import cli
from guestio.guest.load import Load
from guestio.guest.plan import LoadPlan
from guestio.observe import Recorder, open_recording
from guestio.observe.convert import write_pcapng, write_perfetto
from guestio.observe.pcapng import DISSECTOR
from guestio.testing import ScriptedGuest
from guestio.trace import FIELDS, What
from guestio.virtio.blk import BlockDevice
from tests.kit.perfetto_trace import Trace
from tests.kit.serving import Serving, until
from tests.kit.tshark import counts, fields

SIZE = 4 << 20
REQUESTS, WARM_UP, FAULTS = 200, 20, 5
NOWHERE = 0x7000_0000_0000


class Recorded(NamedTuple):
    """A recording of a load behind an IOMMU, and of requests whose addresses lead nowhere.

    Attributes:
        path: The recording.
        expected: What the guests counted, by the name of the event.
        reads, writes: Requests of the load.
    """

    path: Path
    expected: dict[str, int]
    reads: int
    writes: int


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    directory = tmp_path_factory.mktemp("recorded")
    image = directory / "image"
    image.write_bytes(os.urandom(SIZE))
    device = BlockDevice(image)
    path = directory / "recording"
    with Serving(device, directory / "blk.sock") as served:

        def counts_now() -> dict[str, int]:
            found: dict[str, int] = served.backend.status()["counts"]
            return found

        def settle() -> dict[str, int]:
            seen = [counts_now()]

            def stands() -> bool:
                time.sleep(0.2)
                seen.append(counts_now())
                return seen[-1] == seen[-2]

            until(stands)
            return seen[-1]

        with Load(str(served.path), LoadPlan(workload="randrw", depth=8, iommu="strict")) as load:
            # The translations of its rings are requested when the queue starts.
            load.run_requests(WARM_UP)
            settle()
            recorder = Recorder(served.backend, path, payload="all")
            result = load.run_requests(REQUESTS)
            settle()
        with ScriptedGuest(str(served.path), iommu="strict") as guest:
            for number in range(FAULTS):
                there = NOWHERE + number * 0x10000
                request = guest.submit_at(0, number, writable=[(there, 512)])
                guest.wait(request)
                assert request.status == 1
            settle()
            bad = guest.frontend.iotlb.counts
        recorder.close()
    device.close()
    expected = {
        "completed": result.requests + FAULTS,
        "miss": result.misses + bad.misses,
        "update": result.updates + bad.updates,
        "invalidate": result.invalidations + bad.invalidations,
        # Each is asked for twice: at first, and again to be told why it failed.
        "refused": result.refused + bad.refused // 2,
        "failed": FAULTS,
    }
    return Recorded(path, expected, result.reads, result.writes)


def test_the_same_numbers_everywhere(recorded: Recorded, tmp_path: Path) -> None:
    """What the guests counted, the recording, Perfetto's and Wireshark's reading of it: equal."""
    assert recorded.expected["miss"] > REQUESTS
    assert recorded.expected["invalidate"] > REQUESTS
    with open_recording(recorded.path) as recording:
        events = Counter(What(each).name.lower() for each in recording.events()["what"].to_pylist())
        requests = recording.requests()
        events["completed"] = len(requests) - requests["completed"].null_count
        write_perfetto(recording, tmp_path / "trace")
        write_pcapng(recording, tmp_path / "packets")
    names = [*recorded.expected]
    assert {name: events[name] for name in names} == recorded.expected
    packets = counts(tmp_path / "packets")
    assert {name: packets[name] for name in names} == recorded.expected
    trace = Trace(tmp_path / "trace")
    shown = trace.counts("translation") + trace.counts("life")
    shown["completed"] = (
        sum(trace.counts("request").values()) - trace.counts("request")["interrupt"]
    )
    shown["failed"] = sum("failed" in each.name for each in trace.slices)
    assert {name: shown[name] for name in names} == recorded.expected
    assert packets["interrupt"] == trace.counts("request")["interrupt"] == events["interrupt"] > 0


def test_a_trace_shows_requests_with_their_stages(recorded: Recorded, tmp_path: Path) -> None:
    with open_recording(recorded.path) as recording:
        rows = recording.requests().to_pylist()
        write_perfetto(recording, tmp_path / "trace")
    trace = Trace(tmp_path / "trace")
    ((_, name),) = trace.processes
    assert name.startswith("BlockDevice at /")
    requests = [each for each in trace.slices if each.track.endswith("queue 0/requests")]
    tops = [each for each in requests if each.depth == 0]
    by_name = Counter(each.name for each in tops)
    assert by_name["read"] == recorded.reads
    assert by_name["write"] == recorded.writes
    assert len(tops) == len(rows)
    assert sorted((each.begin, each.end) for each in tops) == sorted(
        (min(row["available"], row["stalled"] or row["available"]), row["completed"])
        for row in rows
    )
    for each in tops:
        assert [child.category for child in each.children] == ["stage"] * len(each.children)
        at = each.begin
        for child in each.children:
            assert child.begin == at, "stages follow each other"
            at = child.end
        assert at == each.end
    waiting = [e for e in requests if e.name == "waits for translations"]
    assert len(waiting) == sum(row["stalled"] is not None for row in rows) > REQUESTS / 2
    # Each request leads to one notification, which comes after its end.
    ended = {each.flows[0]: each.end for each in tops}
    told = [(flow, each) for each in trace.slices for flow in each.ended_flows]
    assert len({flow for flow, _ in told}) == len(told) > 0
    assert all(each.name == "interrupt" and each.begin >= ended[flow] for flow, each in told)
    depth = trace.counters[next(name for name in trace.counters if name.endswith("depth"))]
    assert depth[-1] == 0
    assert 1 < max(depth) <= 8


def test_packets_show_what_requests_carry(recorded: Recorded, tmp_path: Path) -> None:
    with open_recording(recorded.path) as recording:
        rows = recording.requests().to_pylist()
        write_pcapng(recording, tmp_path / "packets")
        began = recording.description["began"]["realtime_ns"]
    taken = fields(
        tmp_path / "packets",
        *("guestio.queue", "guestio.head", "guestio.length", "guestio.blk.type"),
        *("guestio.blk.sector", "frame.time_epoch", "guestio.content.length"),
        where='guestio.what == "taken"',
    )
    rows.sort(key=lambda row: row["taken"])
    assert len(taken) == len(rows)
    for packet, row in zip(taken, rows, strict=True):
        assert [int(each) for each in packet[:3]] == [row["queue"], row["head"], row["readable"]]
        assert int(packet[3]) == int.from_bytes(row["content"][:4], "little")
        assert int(packet[4]) == int.from_bytes(row["content"][8:16], "little")
        assert abs(float(packet[5]) - began / 1e9) < 600
        assert int(packet[6]) == len(row["content"])
    done = fields(
        tmp_path / "packets",
        *("guestio.blk.status", "guestio.took", "guestio.taken_in", "guestio.length"),
        where='guestio.what == "completed"',
    )
    rows.sort(key=lambda row: row["completed"])
    assert sorted(took for _, took, _, _ in done) == sorted(
        str(row["completed"] - row["available"]) for row in rows
    )
    assert all(begun for _, _, begun, _ in done)
    assert len({begun for _, _, begun, _ in done}) == len(rows)
    bad = fields(tmp_path / "packets", "guestio.what", where="guestio.failure")
    assert Counter(what for (what,) in bad) == {
        name: recorded.expected[name] for name in ("failed", "refused")
    }


def test_the_command_converts(recorded: Recorded, tmp_path: Path) -> None:
    run = CliRunner().invoke
    trace, packets = tmp_path / "t", tmp_path / "p"
    done = run(
        cli, ["convert", str(recorded.path), "--perfetto", str(trace), "--pcapng", str(packets)]
    )
    assert done.exit_code == 0, done.output
    assert f"{trace}: " in done.output
    assert Trace(trace).slices
    assert counts(packets)["completed"] == recorded.expected["completed"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["p", "t"]
    none = run(cli, ["convert", str(recorded.path)], standalone_mode=True)
    assert none.exit_code == 2
    bad = tmp_path / "bad"
    bad.write_bytes(b"PAR1" + bytes(100))
    refused = run(cli, ["convert", str(bad), "--perfetto", str(trace)])
    assert refused.exit_code == 1
    assert f"{bad} is no recording" in refused.stderr


def test_numbers_and_names_are_those_of_the_records() -> None:
    """The dissector's table of events and its layout are the core's."""
    import re

    text = DISSECTOR.read_text()
    table = text[text.index("local WHAT") : text.index("local ACCESS")]
    found = {int(number): name for number, name in re.findall(r'\[(\d+)\] = "(\w+)"', table)}
    assert found == {int(what): what.name.lower() for what in What}
    layout = text[text.index("local LAYOUT") : text.index("-- The packet in which")]
    sizes = [(name, int(size)) for name, size in re.findall(r'\{ "(\w+)", (\d) \}', layout)]
    assert sizes == [(each.name, int(each.type[-1])) for each in FIELDS]
