"""`guestio explain --endpoint`: what an address leads to for a device behind a virtio-iommu."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from guestio import CannotResolveError, GuestRegionCollection
from guestio.cli import cli
from guestio.control.client import ControlClient
from guestio.errors import DeviceError
from guestio.faults import Misbehaving
from guestio.pci import VirtioPci
from guestio.virtio.iommu import Status, VirtioIommu, wire
from tests.kit.serving import Mirror, Serving
from tests.kit.vfio_client import ServingPci

READ, BOTH = wire.MAP_F_READ, wire.MAP_F_READ | wire.MAP_F_WRITE
MSI = (0xFEE00000, 0xFEEFFFFF, wire.RESV_MEM_MSI)


def ask(iommu: VirtioIommu, request: wire.Request) -> None:
    answer = iommu.handle_request(wire.pack(request), 4)
    assert isinstance(answer, bytes)
    assert Status(answer[-4]) is Status.OK


def attach(iommu: VirtioIommu, domain: int, endpoint: int) -> None:
    ask(iommu, wire.Attach(domain, endpoint, flags=0, reserved=bytes(4)))


@pytest.fixture
def iommu() -> VirtioIommu:
    return VirtioIommu(endpoints=[8, 9, 10], reserved=[MSI])


@pytest.fixture
def client(iommu: VirtioIommu, tmp_path: Path) -> Iterator[ControlClient]:
    control = tmp_path / "control"
    with Serving(iommu, tmp_path / "iommu.sock", iommu="off", control=control):
        yield ControlClient(control, timeout=60)


def test_it_says_who_maps_what_for_whom(iommu: VirtioIommu, client: ControlClient) -> None:
    assert client.explain(0x1000, endpoint=8)["endpoint"] == {
        "number": 8,
        "domain": None,
        "bypass": False,
        "others": [],
        "reserved": [],
        "held": [],
    }
    for endpoint in (8, 9):
        attach(iommu, 3, endpoint)
    ask(iommu, wire.Map(3, 0x1000, 0x1FFF, 0x8000, READ))
    # A neighbor that leads on is a mapping of its own: the driver made two.
    ask(iommu, wire.Map(3, 0x2000, 0x3FFF, 0x9000, BOTH))
    session = iommu.endpoint(8).open_session()
    session.export(0x2000, 16)
    found = client.explain(0x1800, 0x1000, endpoint=8)
    assert found["recorded_s"] > 0
    assert found["translated"]
    assert [(m["address"], m["length_bytes"], m["target"], m["access"]) for m in found["mapped"]] \
        == [(0x1000, 0x1000, 0x8000, "r"), (0x2000, 0x2000, 0x9000, "rw")]  # fmt: skip
    assert all(0 <= (each["since_s"] or -1) < 60 for each in found["mapped"])
    assert found["read"] == "succeeds"
    assert found["write"] == "refused: 0x1800 allows r"
    info = found["endpoint"]
    assert info is not None
    assert (info["domain"], info["others"], info["bypass"]) == (3, [9], False)
    assert [(each["address"], each["broken"]) for each in info["held"]] == [(0x2000, False)]
    session.close()
    lacking = client.explain(0x3F00, 0x200, endpoint=9)
    assert lacking["read"] == "fails: 0x4000 is not mapped"
    # The third one sees none of it.
    other = client.explain(0x1800, endpoint=10)
    assert other["mapped"] == []
    assert other["read"] == other["write"] == "refused: it is attached to no domain"
    # The device's own queues are no endpoint's: their addresses are physical.
    own = client.explain(0x1800)
    assert own["endpoint"] is None
    assert not own["translated"]
    reserved = client.explain(0xFEE00010, endpoint=8)["endpoint"]
    assert reserved is not None
    assert reserved["reserved"] == [
        {"address": 0xFEE00000, "length_bytes": 0x100000, "subtype": wire.RESV_MEM_MSI}
    ]


def test_it_says_what_happened_last(iommu: VirtioIommu, client: ControlClient) -> None:
    client.explain(0x1000, endpoint=8)
    attach(iommu, 1, 8)
    attach(iommu, 2, 9)
    ask(iommu, wire.Map(1, 0x1000, 0x1FFF, 0x8000, READ))
    ask(iommu, wire.Map(2, 0x1000, 0x1FFF, 0xA000, READ))
    memory = iommu.endpoint(8).memory(GuestRegionCollection.from_ranges([(0, 0x10000)]))
    with pytest.raises(CannotResolveError):
        memory.write(0x1010, b"x")
    ask(iommu, wire.Unmap(1, 0x1000, 0x1FFF, reserved=bytes(4)))
    last = client.explain(0x1000, 0x1000, endpoint=8)["last"]
    assert [(each["what"], each["detail"], each["result"]) for each in last] == [
        ("domain_unmap", 1, 1),
        ("fault", wire.FaultReason.MAPPING, 8),
        ("domain_map", 0x8000, 1),
        ("attached", 8, 1),
    ]
    assert (last[1]["address"], last[1]["access"]) == (0x1010, "w")
    # What is mapped in its domain before it comes, it sees since it came.
    attach(iommu, 2, 8)
    moved = client.explain(0x1000, endpoint=8)
    assert [each["what"] for each in moved["last"]][:2] == ["attached", "domain_map"][:2]
    assert moved["mapped"][0]["target"] == 0xA000
    stays = client.explain(0x1000, endpoint=9)["mapped"][0]["since_s"]
    since = moved["mapped"][0]["since_s"]
    assert since is not None
    assert stays is not None
    assert since < stays


def test_the_command_prints_it(iommu: VirtioIommu, client: ControlClient, tmp_path: Path) -> None:
    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli, ["explain", str(tmp_path / "control"), *words])
        return done.exit_code, done.output

    run("0x1000", "--endpoint", "8")
    for endpoint in (8, 9):
        attach(iommu, 3, endpoint)
    ask(iommu, wire.Map(3, 0x1000, 0x1FFF, 0x8000, READ))
    status, text = run("0x1000", "--endpoint", "0x8")
    assert status == 0
    assert "endpoint 8: attached to domain 3, with 9" in text
    assert "mapped: 0x1000+0x1000 -> 0x8000 r, for 0." in text
    assert "domain_map 0x1000+0x1000 r -> 0x8000 in domain 3" in text
    status, text = run("0x1000", "--endpoint", "8", "--json")
    assert json.loads(text)["endpoint"]["others"] == [9]
    status, text = run("0x1000", "--endpoint", "7")
    assert status == 1
    assert text.endswith("400 Bad Request: endpoint 7 does not exist; there are: 8, 9, 10\n")
    assert run("0x1000", "--endpoint", "-1")[0] == 2


@pytest.mark.parametrize("number", ["x", "-1", str(2**70), ""])
def test_bad_endpoints_are_refused(client: ControlClient, number: str) -> None:
    with pytest.raises(DeviceError, match="400"):
        client.get(f"/explain?address=0&endpoint={number}")
    assert client.explain(0, endpoint=8)["endpoint"] is not None


def test_other_devices_have_no_endpoints(tmp_path: Path) -> None:
    control = tmp_path / "control"
    with (
        Serving(Mirror(), tmp_path / "sock", control=control),
        pytest.raises(DeviceError, match="this server is no virtio-iommu"),
    ):
        ControlClient(control, timeout=60).explain(0, endpoint=8)


def test_it_is_found_behind_a_pci_function_and_rules(tmp_path: Path) -> None:
    control = tmp_path / "control"
    for device, serve in (
        (VirtioPci(VirtioIommu(endpoints=[8])), ServingPci),
        (Misbehaving(VirtioIommu(endpoints=[8]), []), Serving),
    ):
        with serve(device, tmp_path / "sock", control=control):  # type: ignore[operator] # either
            found = ControlClient(control, timeout=60).explain(0, endpoint=8)
            assert found["endpoint"] is not None
            assert found["endpoint"]["number"] == 8
