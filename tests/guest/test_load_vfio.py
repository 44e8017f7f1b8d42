"""Load on a disk that is a PCI function of a vfio-user server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from guestio.cli.bench import bench
from guestio.errors import DeviceError, GuestioError
from guestio.guest._load.load import LoadDriver
from guestio.guest.load import Load
from guestio.guest.pci_frontend import PciFrontend
from guestio.guest.plan import LoadPlan
from guestio.pci import VirtioPci
from guestio.virtio.blk import BlockDevice
from guestio.virtio.rng import EntropyDevice
from tests.kit.serving import nothing_left
from tests.kit.vfio_client import ServingPci, Toy

SIZE = 4 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[ServingPci]:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(SIZE))
    device = BlockDevice(image)
    try:
        with ServingPci(VirtioPci(device), tmp_path / "disk.sock") as serving:
            yield serving
    finally:
        device.close()


@pytest.mark.parametrize("transport", ["vfio-user", "vfio-user-doorbells"])
def test_what_is_written_is_read_back(disk: ServingPci, transport: str) -> None:
    plan = LoadPlan(workload="randrw", depth=8, verify=True, contiguous=False)
    path = disk.server.path
    with nothing_left(), Load(path, plan, transport=transport) as load:  # type: ignore[arg-type]
        load.fill()
        result = load.run_requests(500)
        assert result.requests == 500
        load.read_back()
    assert disk.stats.failed_calls == 0
    assert disk.stats.refused == 0


def test_notifications_are_posted_writes(disk: ServingPci) -> None:
    plan = LoadPlan(workload="randread", depth=1)
    with Load(disk.server.path, plan, transport="vfio-user") as load:
        load.frontend.queue_count()  # what set it up has been done
        before = disk.stats.region_writes
        result = load.run_requests(50)
        load.frontend.queue_count()  # all of them have been served
        assert 0 < result.kicks <= 50
        assert disk.stats.region_writes == before + result.kicks
        assert disk.stats.dma_messages == 0


def test_no_iommu(disk: ServingPci) -> None:
    with pytest.raises(DeviceError, match="leave --iommu off"):
        Load(disk.server.path, LoadPlan(iommu="strict"), transport="vfio-user")


def test_more_queues_than_there_are(disk: ServingPci) -> None:
    with nothing_left(), pytest.raises(DeviceError, match="2 queues are wanted"):
        Load(disk.server.path, LoadPlan(queues=2), transport="vfio-user")


def test_devices_that_are_no_disks(tmp_path: Path) -> None:
    with (
        ServingPci(Toy(), tmp_path / "toy") as toy,
        nothing_left(),
        pytest.raises(DeviceError, match="no virtio device"),
    ):
        PciFrontend(toy.server.path)
    with (
        ServingPci(VirtioPci(EntropyDevice()), tmp_path / "rng") as rng,
        nothing_left(),
        pytest.raises(DeviceError, match="lacks parts"),
    ):
        PciFrontend(rng.server.path)


def test_a_server_that_ends_meanwhile(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    device = BlockDevice(image)
    with ServingPci(VirtioPci(device), tmp_path / "disk.sock") as serving:
        load = Load(serving.server.path, LoadPlan(workload="randread"), transport="vfio-user")

        def stop(share: float, result: object) -> None:
            serving.server.stop()

        with load, pytest.raises(GuestioError):
            load.run(30, stop)
    device.close()


def test_the_command(disk: ServingPci) -> None:
    arguments = [disk.server.path, "--transport", "vfio-user", "--time", "0.05"]
    arguments += ["--warm-up", "0", "--json", "--pid", str(os.getpid())]
    done = CliRunner().invoke(bench, arguments)
    assert done.exit_code == 0, done.output
    assert '"transport": "vfio-user"' in done.stdout


def test_messages_that_are_too_long() -> None:
    event, page = os.eventfd(0), [4096]
    driver = LoadDriver(4096, 1024, event)
    with pytest.raises(ValueError, match="message of 65 bytes"):
        driver.add_queue(1, 1, page, page, page, event, event, -1, message=bytes(65))
    del driver
    os.close(event)
