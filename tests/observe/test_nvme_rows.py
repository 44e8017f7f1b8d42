"""Commands of an NVMe controller are rows of a recording, like a virtio disk's requests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from guestio.guest.nvme_load import NvmeLoad
from guestio.observe import Recorder, open_recording
from guestio.observe.assemble import Assembler
from guestio.observe.convert import write_pcapng, write_perfetto
from guestio.observe.report import report
from guestio.pci import NvmeController
from guestio.trace import Group, TraceReader, Tracing
from tests.kit.nvme_driver import FLUSH, READ, WRITE, NvmeDriver, move
from tests.kit.perfetto_trace import Trace
from tests.kit.tshark import counts
from tests.kit.vfio_client import ServingPci

SIZE = 4 << 20
LBA_OUT_OF_RANGE = 0x80
COLUMNS = (
    *("queue", "operation", "command", "namespace", "code", "failed", "offset", "gap"),
    *("readable", "writable", "written", "position"),
)


@pytest.fixture(params=[True, False], ids=["core", "python"])
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NvmeDriver]:
    """A driver of a controller with blocks of 4096 bytes; its core serves plain commands or not."""
    image = tmp_path / "image"
    image.write_bytes(os.urandom(SIZE))
    with NvmeDriver(NvmeController(image, block_size=4096)) as made:
        made.enable().ready()
        made.create(1)
        made.device._queues.fast = request.param
        yield made


def rows(driver: NvmeDriver, *commands: tuple[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """What is recorded of commands on queue 1, one after the other."""
    made = Assembler()
    with Tracing(Group.REQUESTS), TraceReader() as reader:
        for opcode, what in commands:
            driver.do(1, opcode, **what)
        records = reader.read().records
    records = records[records["origin"] == driver.host.origin]
    tables = [table for table in made.add(records, last=True) if "completed" in table.column_names]
    found = pa.concat_tables(tables)
    assert made.incomplete == 0
    return [row for row in found.to_pylist() if row["kind"] == 1]


def test_commands_say_what_they_were_and_how_they_ended(driver: NvmeDriver) -> None:
    page, more = driver.take(), driver.take()
    found = rows(
        driver,
        (WRITE, move(1, 3, 2, prp1=page, prp2=more)),
        (READ, move(1, 5, 1, prp1=page)),
        (FLUSH, {"nsid": 1}),
        (READ, move(1, 1 << 40, 1, prp1=page)),
        (READ, move(7, 0, 1, prp1=page)),
        (0x7F, {"nsid": 1}),
    )
    assert [tuple(row[name] for name in COLUMNS) for row in found] == [
        (1, "write", 1, 1, 0, False, 3 * 4096, None, 8192, 0, 0, 0),
        (1, "read", 2, 1, 0, False, 5 * 4096, 0, 0, 4096, 4096, 1),
        (1, "flush", 0, 1, 0, False, None, None, 0, 0, 0, 2),
        (1, "read", 2, 1, LBA_OUT_OF_RANGE, True, 1 << 52, (1 << 52) - 6 * 4096, 0, 4096, 0, 3),
        (1, "read", 2, 7, 0x0B, True, 0, -(1 << 52) - 4096, 0, 0, 0, 4),
        (1, "other", 0x7F, 1, 0x01, True, None, None, 0, 0, 0, 5),
    ]
    assert all(row["available"] <= row["taken"] <= row["completed"] for row in found)
    assert all((row["interrupted"] or row["completed"]) >= row["completed"] for row in found)
    assert found[0]["address"] == page


def test_what_is_noted_of_commands_goes_with_them(driver: NvmeDriver) -> None:
    """Commands that were taken while it was recorded, and completed when it was not any more."""
    page = driver.take()
    with Tracing(Group.REQUESTS):
        driver.submit(1, driver.command(READ, **move(1, 0, 1, prp1=page)), ring=False)
        driver.submit(0, driver.command(0x0C, cid=99))  # waits for an event
        driver.settle()
    driver.ring(1)
    assert driver.wait(1).status == 0
    # Neither is it an error, nor is anything known of those taken before.
    found = rows(driver, (READ, move(1, 0, 1, prp1=page)))
    assert len(found) == 1
    driver.disable()
    driver.enable().ready()


def test_a_servers_commands_are_reported_and_converted(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(os.urandom(SIZE))
    device = NvmeController(tmp_path / "image")
    with ServingPci(device, tmp_path / "nvme.sock") as running:
        recorder = Recorder(running.server, tmp_path / "recording")
        with NvmeLoad(running.server.path, depth=8, writes=True) as load:
            done = load.run(0.1).requests
            load.drain()
            driver = load._driver
            assert driver is not None
            done = driver.requests
        recorder.close()
    device.close()
    said = report(tmp_path / "recording")
    (writes,) = [row for row in said["queues"] if row["operation"] == "write"]
    assert (writes["queue"], writes["requests"], writes["failed"]) == (1, done, 0)
    assert writes["bytes"] == done * 4096
    assert {row["queue"] for row in said["queues"]} == {0, 1}
    with open_recording(tmp_path / "recording") as recording:
        rows = [row for row in recording.requests().to_pylist() if row["operation"] == "write"]
        assert {(row["command"], row["namespace"], row["code"]) for row in rows} == {(1, 1, 0)}
        assert all(row["offset"] % 4096 == 0 and row["readable"] == 4096 for row in rows)
        write_perfetto(recording, tmp_path / "trace")
        write_pcapng(recording, tmp_path / "packets")
    shown = Trace(tmp_path / "trace").counts("request")
    assert shown["write"] == done
    assert counts(tmp_path / "packets")["completed"] == said["totals"]["completed"]
