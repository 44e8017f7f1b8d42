"""What `/status` and `/metrics` count is what the load generator counts, exactly."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.parser import text_string_to_metric_families as plain_families

from guestio.control.client import ControlClient
from guestio.guest.load import Load, LoadResult
from guestio.guest.plan import LoadPlan
from guestio.pci import VirtioPci
from guestio.trace import TraceReader, What
from guestio.virtio.blk import BlockDevice
from tests.kit.serving import Serving, nothing_left, until
from tests.kit.vfio_client import ServingPci

SIZE = 4 << 20
REQUESTS, WARM_UP = 300, 20
HEADER_AND_STATUS = 16 + 1


@contextmanager
def disk(directory: Path, transport: str) -> Iterator[tuple[str, ControlClient]]:
    """A disk that is served and watched: its socket, and what asks it."""
    image, path, control = (directory / name for name in ("image", "disk.sock", "control"))
    image.write_bytes(os.urandom(SIZE))
    device = BlockDevice(image)
    try:
        if transport == "vhost-user":
            with Serving(device, path, control=control):
                yield str(path), ControlClient(control)
        else:
            with ServingPci(VirtioPci(device), path, control=control):
                yield str(path), ControlClient(control)
    finally:
        device.close()


def metrics(client: ControlClient) -> dict[str, float]:
    """All samples of `/metrics`, by name and labels."""
    text = client.get("/metrics").decode()
    return {
        f"{sample.name}{sorted(sample.labels.items())}" if sample.labels else sample.name: (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def counts_of(result: LoadResult) -> dict[str, int]:
    """What the load generator counts, as servers call it."""
    return {
        "requests": result.requests,
        "failed_requests": 0,
        "iotlb_misses": result.misses,
        "iotlb_updates": result.updates,
        "iotlb_invalidations": result.invalidations,
        "iotlb_refused": result.refused,
        "access_fails": result.access_fails,
    }


def grown(client: ControlClient, before: dict[str, int], names: Any) -> dict[str, int]:
    counts = client.status()["counts"]
    return {name: counts[name] - before[name] for name in names}


def check_explained(client: ControlClient, load: Load) -> None:
    """A translation that came while it was asked about: since when, and what happened last."""
    assert client.explain(0)["recorded_s"] == 0
    asked = client.status()["time_s"]
    load.run_requests(WARM_UP)
    settled(client)
    with TraceReader(from_start=True) as reader:
        records = reader.read().records
    updates = records[records["what"] == What.UPDATE]
    if load.plan.iommu == "static":
        return
    latest = int(updates[-1]["address"])
    found = client.explain(latest)
    assert found["recorded_s"] > 0
    assert {"update", "miss"} <= {each["what"] for each in found["last"]}
    assert all(each["time_s"] > asked for each in found["last"])
    assert found["translated"]


def settled(client: ControlClient) -> dict[str, int]:
    """The counts once nothing is under way any more."""
    found = [client.status()["counts"]]

    def stands() -> bool:
        time.sleep(0.1)
        found.append(client.status()["counts"])
        return found[-1] == found[-2]

    until(stands)
    return found[-1]


@pytest.mark.parametrize("iommu", ["off", "static", "strict"])
def test_a_vhost_user_disk_counts_what_its_guest_does(tmp_path: Path, iommu: Any) -> None:
    with nothing_left(), disk(tmp_path, "vhost-user") as (path, client):
        plan = LoadPlan(workload="randrw", depth=8, iommu=iommu)
        with Load(path, plan) as load:
            # The translations of its rings are requested when the queue starts.
            warm = load.run_requests(WARM_UP)
            before = settled(client)
            result = load.run_requests(REQUESTS)
            expected = counts_of(result)
            # The last acknowledgements, and repeated misses, may still be under way.
            until(lambda: grown(client, before, expected) == expected, str(expected))
            status = client.status()
            queue = status["queues"][0]
            total = REQUESTS + WARM_UP
            assert (queue["taken"], queue["completed"]) == (total, total)
            assert queue["depth"] == queue["held"] == 0
            moved = warm.moved + result.moved
            assert queue["bytes"] == moved + total * HEADER_AND_STATUS
            assert queue["notifications"] >= result.interrupts > 0
            done = {"read": warm.reads + result.reads, "write": warm.writes + result.writes}
            assert {name: one["count"] for name, one in queue["latency"].items()} == done
            assert not any(status["faults"].values())
            found = metrics(client)
            for name, count in expected.items():
                assert found[f"guestio_{name}_total"] == status["counts"][name]
                assert found[f"guestio_{name}_total"] - before[name] == count
            for name in ("taken", "completed"):
                assert found[f"guestio_queue_requests_{name}_total[('queue', '0')]"] == total
            for name, count in done.items():
                labels = f"[('operation', '{name}'), ('queue', '0')]"
                assert found[f"guestio_request_latency_seconds_count{labels}"] == count
                whole = f"[('le', '+Inf'), ('operation', '{name}'), ('queue', '0')]"
                assert found[f"guestio_request_latency_seconds_bucket{whole}"] == count
            if iommu == "off":
                assert status["iotlb"] is None
            else:
                iotlb = status["iotlb"]
                assert iotlb is not None
                assert iotlb["miss_latency"]["count"] > 0
                check_explained(client, load)
                assert "ACCESS_PLATFORM" in status["peer"]["features"]  # type: ignore[index]
        until(lambda: client.status()["peer"] is None)
        # What was counted stays.
        total = client.status()["queues"][0]["completed"]
        assert client.status()["queues"][0]["completed"] == total
        with Load(path, plan) as load:
            load.run_requests(10)
            until(lambda: client.status()["queues"][0]["completed"] == total + 10)


def test_a_vfio_user_disk_counts_what_its_guest_does(tmp_path: Path) -> None:
    with nothing_left(), disk(tmp_path, "vfio-user") as (path, client):
        with Load(path, LoadPlan(workload="randrw", depth=8), transport="vfio-user") as load:
            load.frontend.queue_count()
            before = client.status()["counts"]
            result = load.run_requests(REQUESTS)
            expected = {
                "requests": REQUESTS,
                "failed_requests": 0,
                "region_writes": result.kicks,
                "refused": 0,
            }
            until(lambda: grown(client, before, expected) == expected, str(expected))
            status, found = client.status(), metrics(client)
            assert status["device"]["transport"] == "vfio-user"
            assert status["device"]["kind"] == "BlockDevice"
            assert status["queues"][0]["completed"] == REQUESTS
            for name, count in status["counts"].items():
                assert found[f"guestio_{name}_total"] == count, name
            assert status["iotlb"] is not None
            assert status["iotlb"]["entries"] == status["counts"]["dma_maps"]
        until(lambda: client.status()["peer"] is None)


def test_older_readers_get_the_older_format(tmp_path: Path) -> None:
    """Who names text/plain, and not OpenMetrics; the numbers are the same."""
    with nothing_left(), disk(tmp_path, "vhost-user") as (path, client):
        with Load(path, LoadPlan(workload="randread", depth=2)) as load:
            load.run_requests(50)
        until(lambda: client.status()["peer"] is None)
        plain = client.get("/metrics", accept="text/plain;version=0.0.4").decode()
        found = {
            sample.name: sample.value
            for family in plain_families(plain)
            for sample in family.samples
            if not sample.labels
        }
        shown = metrics(client)
        assert found["guestio_requests_total"] == shown["guestio_requests_total"] == 50
        assert "# EOF" not in plain
        for accept in ("*/*", "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"):
            assert client.get("/metrics", accept=accept).decode().endswith("# EOF\n")


def test_front_ends_that_break_the_protocol_are_counted(tmp_path: Path) -> None:
    with nothing_left(), disk(tmp_path, "vhost-user") as (path, client):
        for number in range(1, 6):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(path)
                peer.sendall(b"\xff" * 64)
                with contextlib.suppress(ConnectionResetError):
                    assert peer.recv(1) == b""
            until(lambda number=number: client.status()["counts"]["protocol_errors"] == number)  # type: ignore[misc]
        assert client.status()["faults"]["protocol_errors"] == 5
        assert metrics(client)["guestio_protocol_errors_total"] == 5
