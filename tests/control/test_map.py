"""`/map`: what a range of addresses has, in parts, of both transports, and within its limits."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from guestio.control import recall
from guestio.control.client import ControlClient
from guestio.errors import DeviceError
from guestio.guest.load import Load
from guestio.guest.plan import LoadPlan
from tests.control.test_counts import disk, settled
from tests.kit.serving import IOVA, Driver, Mirror, Serving, nothing_left, until

PAGE = 4096


def map_of(client: ControlClient, query: str) -> Any:
    return json.loads(client.get(f"/map?{query}"))


def whole(found: Any) -> int:
    """Bytes that are mapped in a survey of which nothing was left out."""
    assert not any(found["cells"]["unseen_bytes"])
    return sum(found["cells"]["mapped_bytes"])


def test_physical_memory(tmp_path: Path) -> None:
    control = tmp_path / "control"
    with Serving(Mirror(), tmp_path / "s", control=control, track_dirty=True) as serving:
        client = ControlClient(control)
        empty = map_of(client, "address=0&length=0x10000000000000000&parts=4")
        assert empty["extent"] is None
        assert empty["cells"]["index"] == []
        with Driver(serving.path) as driver:
            driver.run(0, b"hello")
            for query in ("", "&of=memory"):
                found = map_of(client, f"address=0&length={Driver.SIZE}&parts=512{query}")
                assert whole(found) == Driver.SIZE
                assert found["extent"] == [0, Driver.SIZE - 1]
                assert set(found["cells"]["access"]) == {"rw"}
                assert found["cells"]["target"] == found["cells"]["address"]
                assert not found["translated"]
            dirty = {i for i, n in enumerate(found["dirty_pages"]) if n}
            assert dirty == {int(n) for n in driver_pages(serving)}
            assert found["hits"] is found["age_s"] is None
        serving.let_go()
        assert map_of(client, "address=0&length=4096&parts=2")["entries"] == 0


def driver_pages(serving: Serving) -> list[int]:
    """The pages that the device has written."""
    connection: Any = serving.backend._connection
    (region,) = connection._shared.memory
    return list(region.bitmap.dirty_pages())


@pytest.mark.parametrize("transport", ["vhost-user", "vfio-user"])
def test_translations_of_both_transports(tmp_path: Path, transport: Any) -> None:
    iommu = {"iommu": "static"} if transport == "vhost-user" else {}
    with disk(tmp_path, transport) as (path, client):
        plan = LoadPlan(workload="randrw", depth=4, **iommu)  # type: ignore[arg-type]
        with Load(path, plan, transport=transport) as load:
            load.run_requests(50)
            settled(client)
            status = client.status()
            assert status["iotlb"] is not None
            found = map_of(client, "address=0&length=0x10000000000000000&parts=1024")
            assert found["translated"]
            assert found["entries"] == status["iotlb"]["entries"] > 0
            low, high = found["extent"]
            # As `explain` says, part by part.
            start = low & -PAGE
            near = map_of(client, f"address={start}&length={256 * PAGE}&parts=256")
            cells = near["cells"]
            for i, index in enumerate(cells["index"][:8]):
                said = client.explain(start + index * PAGE, PAGE)
                assert len(said["mapped"]) == cells["entries"][i]
                first = said["mapped"][0]
                shift = cells["address"][i] - first["address"]
                assert cells["target"][i] == first["target"] + shift
                assert first["access"] in cells["access"][i].split("+")
            assert map_of(client, f"address={high & -PAGE}&length=4096&parts=2")["cells"]["index"]
            memory = map_of(client, "address=0&length=0x10000000000000000&parts=1024&of=memory")
            assert not memory["translated"]
            assert memory["entries"] == len(status["memory"])


def test_what_was_used_and_how_old_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "CONTROL_HEAT_SECONDS", 1.0)
    control = tmp_path / "control"
    with (
        nothing_left(),
        Serving(Mirror(), tmp_path / "s", control=control) as serving,
        Driver(serving.path, iommu=True) as driver,
    ):
        client = ControlClient(control)
        driver.run(0, b"before")
        window = f"address={IOVA}&length={Driver.SIZE}&parts=512"
        first = map_of(client, f"{window}&age&hits")
        assert (first["recorded_s"], first["hits_s"]) == (0, 0)
        assert not any(first["hits"])
        assert {"translations", "requests", "buffers"} <= set(client.status()["trace"]["groups"])
        began = time.monotonic()
        for _ in range(3):
            driver.run(0, b"again")
        again = map_of(client, f"{window}&age&hits")
        used = {
            index: hits
            for index, hits in zip(again["cells"]["index"], again["hits"], strict=True)
            if hits
        }
        # Two pieces each, in pages of their own.
        assert sum(used.values()) == 6
        assert again["recorded_s"] > 0
        recent = [age for age in again["age_s"] if age is not None]
        assert all(age <= time.monotonic() - began for age in recent)
        # What is not asked for any more is not recorded any more.
        until(lambda: "requests" not in client.status()["trace"]["groups"])


@pytest.mark.parametrize(
    "query",
    [
        "",
        "address=0&length=16",
        "address=x&length=16&parts=4",
        "address=0&length=0&parts=4",
        "address=0&length=17&parts=4",
        "address=-4&length=16&parts=4",
        "address=4&length=0x10000000000000000&parts=4",
        "address=0&length=16&parts=1",
        "address=0&length=8192&parts=8192",
        "address=0&length=16&parts=" + "9" * 5000,
    ],
)
def test_what_has_no_parts_is_refused(tmp_path: Path, query: str) -> None:
    with Serving(Mirror(), tmp_path / "s", control=tmp_path / "control") as serving:
        client = ControlClient(tmp_path / "control")
        with pytest.raises(DeviceError, match="400"):
            map_of(client, query)
        assert client.status()["peer"] is None
        with pytest.raises(ValueError, match="parts"):
            serving.backend.survey(0, 17, 4)


def test_the_data_path_goes_on_meanwhile(tmp_path: Path) -> None:
    """Surveys of everything, one after the other, while requests map and unmap."""
    plan = LoadPlan(workload="randrw", depth=8, iommu="strict")
    with disk(tmp_path, "vhost-user") as (path, client), Load(path, plan) as load:
        surveys = 0
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            result = load.run_requests(20)
            assert result.requests == 20
            map_of(client, "address=0&length=0x10000000000000000&parts=4096&age&hits")
            surveys += 1
        assert surveys > 3
        assert not any(client.status()["faults"].values())
