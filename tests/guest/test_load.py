"""Load on real back-ends: our own in every mode, QEMU's without an IOMMU, and broken ones."""

from __future__ import annotations

import contextlib
import signal
import struct
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from guestio.errors import DeviceError, GuestioError
from guestio.guest import load as load_module
from guestio.guest.load import CorruptionError, Load, LoadResult, cpu_seconds, percentile
from guestio.guest.plan import LoadPlan
from guestio.vhost_user import Backend
from guestio.vhost_user.channel import PeerGoneError
from guestio.vhost_user.frontend import NoAnswerError
from guestio.virtio.blk import F_BLK_SIZE, F_SEG_MAX
from guestio.virtio.device import Device, DeviceId
from tests.kit.disks import SIZE, Disk, own_disk, storage_daemon
from tests.kit.peer import nothing_left

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guestio._core.virtio.chain import Chain

MODES = ["off", "static", "strict"]
SPAN = 1 << 20
BUSY = """
import sys, time
while time.process_time() < 0.2:
    pass
print(time.process_time(), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def served(kind: str, directory: Path, queues: int = 1) -> Iterator[Disk]:
    with (storage_daemon if kind == "daemon" else own_disk)(directory, queues=queues) as disk:
        yield disk


def verified(disk: Disk, seconds: float = 0.4, **plan: Any) -> LoadResult:
    """Fill, run and read back with everything checked; the result of the run."""
    plan = {"workload": "randrw", "span": SPAN, "verify": True, **plan}
    with Load(disk.socket, LoadPlan(**plan), connect_wait=10) as load:
        filled = load.fill()
        assert (filled.reads, filled.writes) == (0, load.blocks)
        result = load.run(seconds)
        back = load.read_back()
        assert (back.reads, back.writes) == (load.blocks, 0)
    return result


class TestHowTheLoadIsMade:
    """What the generator can be asked for, so that figures are comparable."""

    @pytest.mark.parametrize("mode", MODES)
    def test_batches_take_one_notification_each(self, tmp_path: Path, mode: Any) -> None:
        with own_disk(tmp_path) as disk:
            plan = LoadPlan(depth=16, iommu=mode, batches=True, span=SPAN)
            with Load(disk.socket, plan, connect_wait=10) as load:
                result = load.run_requests(16 * 20 + 5)
        assert result.requests == 16 * 20 + 5
        # A back-end that is still awake is not notified.
        assert 0 < result.kicks <= 21
        assert result.interrupts <= 21 + 1

    @pytest.mark.parametrize("batches", [False, True])
    def test_messages_that_are_acknowledged_one_by_one(self, tmp_path: Path, batches: bool) -> None:
        with own_disk(tmp_path) as disk:
            result = verified(
                disk, iommu="strict", depth=8, acknowledge="each", batches=batches, indirect=False
            )
        assert result.requests > 10
        assert result.invalidations > 2 * result.requests
        assert result.refused == result.access_fails == 0


class TestVerified:
    @pytest.mark.parametrize("kind", ["daemon", *MODES])
    def test_reads_return_what_was_written(self, tmp_path: Path, kind: str) -> None:
        mode = "off" if kind == "daemon" else kind
        with served(kind, tmp_path) as disk:
            result = verified(disk, 1.5, iommu=mode, depth=16)
        assert result.reads > 20
        assert result.writes > 20
        assert result.moved == result.requests * 4096
        if mode == "strict":
            assert result.invalidations > 2 * result.requests
            assert result.misses >= result.updates > 0
        else:
            assert result.invalidations == 0
        assert result.refused == result.access_fails == 0

    @pytest.mark.parametrize("kind", ["daemon", *MODES])
    @pytest.mark.parametrize(
        "plan",
        [
            {"indirect": False, "event_idx": False, "depth": 4},
            {"polling": True, "depth": 1},
            {"queues": 2, "depth": 4},
            {"block_size": 512, "queue_size": 64, "depth": 16},
            {"block_size": 128 << 10, "depth": 2, "span": 4 << 20},
            {"queue_size": 1024, "depth": 40},
            {"granularity": "whole", "contiguous": True, "block_size": 16 << 10, "depth": 4},
        ],
        ids=lambda plan: "-".join(plan),
    )
    def test_in_every_shape(self, tmp_path: Path, kind: str, plan: dict[str, Any]) -> None:
        mode = "off" if kind == "daemon" else kind
        with served(kind, tmp_path, plan.get("queues", 1)) as disk:
            assert verified(disk, 0.2, iommu=mode, **plan).requests > 0

    def test_the_rest_of_the_disk_is_left_alone(self, tmp_path: Path) -> None:
        with served("own", tmp_path) as disk:
            verified(disk)
            assert disk.image.read_bytes()[SPAN:] == disk.contents[SPAN:]


class TestMeasured:
    @pytest.mark.parametrize("kind", ["daemon", *MODES])
    @pytest.mark.parametrize("workload", ["randread", "randwrite", "read", "write", "randrw"])
    def test_workloads(self, tmp_path: Path, kind: str, workload: Any) -> None:
        mode: Any = "off" if kind == "daemon" else kind
        with (
            served(kind, tmp_path) as disk,
            Load(
                disk.socket, LoadPlan(workload=workload, iommu=mode, depth=8), connect_wait=10
            ) as load,
        ):
            assert load.blocks == SIZE // 4096
            result = load.run(0.2)
        assert 0.2 <= result.seconds < 20
        assert (result.reads > 0) == (workload in {"randread", "read", "randrw"})
        assert (result.writes > 0) == (workload in {"randwrite", "write", "randrw"})
        assert result.iops == result.requests / result.seconds
        assert result.bytes_per_second == 4096 * result.requests / result.seconds
        assert 0 < result.p50_us <= result.p99_us <= result.max_us * 1.02
        assert result.p50_us <= 2 * result.mean_us
        assert result.kicks > 0
        assert disk.image.read_bytes() == disk.contents or result.writes

    def test_iommu_traffic_is_what_linux_makes(self, tmp_path: Path) -> None:
        """Three mappings a request; four if the status is apart; two without a table."""
        with served("own", tmp_path) as disk:
            for plan, mappings in (
                ({}, 3),
                ({"separate_status": True}, 4),
                ({"indirect": False}, 2),
            ):
                with Load(disk.socket, LoadPlan(iommu="strict", depth=4, **plan)) as load:
                    load.run(0.1)
                    result = load.run(0.3)
                    assert result.invalidations / result.requests == pytest.approx(mappings, 0.2)
                    # Each is asked for once, and again if the answer is long in coming.
                    assert 0.8 * mappings < result.misses / result.requests < 2 * mappings
                    assert result.updates == pytest.approx(result.misses, abs=64)

    def test_what_stays_mapped_is_asked_for_once(self, tmp_path: Path) -> None:
        with (
            served("own", tmp_path) as disk,
            Load(disk.socket, LoadPlan(iommu="static", depth=4)) as load,
        ):
            first, second = load.run(0.3), load.run(0.2)
        assert first.misses > 0
        assert second.requests > 0
        assert second.misses == 0

    def test_runs_follow_each_other(self, tmp_path: Path) -> None:
        with served("own", tmp_path) as disk, Load(disk.socket, LoadPlan(depth=2)) as load:
            told: list[float] = []
            counts = [load.run(0.1, lambda share, _: told.append(share)).requests for _ in range(3)]
        assert all(counts)
        assert told[-1] == 1.0
        assert disk.statistics is not None
        assert disk.statistics.requests >= sum(counts)

    def test_it_can_be_stopped(self, tmp_path: Path) -> None:
        with served("own", tmp_path) as disk, Load(disk.socket, LoadPlan()) as load:
            timer = threading.Timer(0.2, load.stop)
            timer.start()
            result = load.run(60)
            timer.join()
            assert 0.1 < result.seconds < 20
            assert load.stopped
            assert load.run(60).seconds < 20

    @pytest.mark.parametrize("mode", MODES)
    def test_nothing_is_left(self, tmp_path: Path, mode: Any) -> None:
        with served("own", tmp_path) as disk, nothing_left():
            for _ in range(3):
                with Load(disk.socket, LoadPlan(iommu=mode, verify=True, depth=4)) as load:
                    load.run(0.05)

    def test_cpu_seconds(self) -> None:
        # A process of its own: here, threads of other tests may just be ending.
        with subprocess.Popen(
            [sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as busy:
            assert busy.stdin is not None
            assert busy.stdout is not None
            used = float(busy.stdout.readline())
            assert used - 0.01 < cpu_seconds(busy.pid) < used + 1
            busy.stdin.close()
        with pytest.raises(OSError, match="No such file"):
            cpu_seconds(2**22 + 1)

    @pytest.mark.parametrize(
        ("histogram", "percent", "value"),
        [
            ([], 50, 0),
            ([(5, 1)], 99, 5),
            ([(1, 50), (2, 49), (9, 1)], 50, 1),
            ([(1, 50), (2, 49), (9, 1)], 99, 2),
            ([(1, 50), (2, 49), (9, 1)], 100, 9),
        ],
    )
    def test_percentile(
        self, histogram: list[tuple[float, int]], percent: float, value: float
    ) -> None:
        assert percentile(histogram, percent) == value


class FaultyDisk(Device):
    """A disk in memory that can be made to do wrong."""

    device_id = DeviceId.BLOCK
    features = F_SEG_MAX | F_BLK_SIZE

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.data = bytearray(SPAN)
        self.requests = 0

    def config(self) -> bytes:
        return struct.pack("<QII4xI8xB1xH", SPAN // 512, 0, 254, 512, 0, 1).ljust(60, b"\0")

    def process(self, queue: int, chain: Chain) -> int:
        self.requests += 1
        broken = self.requests > 600
        kind, _, sector = struct.unpack("<IIQ", chain.readable.read(0, 16))
        at, room = sector * 512, chain.writable.total - 1
        status, written = 0, 1
        if kind == 1:
            data = chain.readable.read(16)
            if broken and self.fault == "torn write":
                data = data[:512]
            self.data[at : at + len(data)] = data
        else:
            if broken and self.fault == "wrong place":
                at = (at + 4096) % SPAN
            chain.writable.write(bytes(self.data[at : at + room]))
            written = room + 1
        if broken and self.fault == "I/O error":
            status = 1
        if broken and self.fault == "hang":
            time.sleep(1.3)
        chain.writable.write(bytes([status]), room)
        return written


class TestWrong:
    @pytest.mark.parametrize(
        ("fault", "error", "message"),
        [
            ("torn write", CorruptionError, r"should hold its version \d+ and holds version \d+"),
            ("wrong place", CorruptionError, r"holds version \d+ of sector \d+"),
            ("I/O error", DeviceError, r"failed with status 1"),
            ("hang", NoAnswerError, r"none of 4 requests was finished for 1.0 s"),
        ],
    )
    def test_disks(
        self, tmp_path: Path, fault: str, error: type[GuestioError], message: str
    ) -> None:
        path = tmp_path / "faulty.sock"
        with Backend(FaultyDisk(fault), path) as backend:
            thread = threading.Thread(target=backend.serve)
            thread.start()
            try:
                plan = LoadPlan(workload="randrw", verify=True, depth=4)
                with (
                    pytest.raises(error, match=message),
                    Load(path, plan, timeout=1.0 if fault == "hang" else 60.0) as load,
                ):
                    load.fill()
                    load.run(20)
            finally:
                backend.stop()
                thread.join()

    def test_the_checks_pass_without_a_fault(self, tmp_path: Path) -> None:
        path = tmp_path / "faulty.sock"
        with Backend(FaultyDisk(""), path) as backend:
            thread = threading.Thread(target=backend.serve)
            thread.start()
            with Load(path, LoadPlan(workload="randrw", verify=True, depth=8)) as load:
                load.fill()
                load.run(0.3)
                load.read_back()
            backend.stop()
            thread.join()

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_a_back_end_that_dies(self, tmp_path: Path, number: signal.Signals) -> None:
        with served("daemon", tmp_path) as disk:
            assert disk.process is not None
            with (
                pytest.raises(PeerGoneError),
                Load(disk.socket, LoadPlan(), connect_wait=10) as load,
            ):
                load.run(0.1)
                disk.process.send_signal(number)
                load.run(20)

    def test_no_iommu(self, tmp_path: Path) -> None:
        with (
            own_disk(tmp_path, iommu="off") as disk,
            nothing_left(),
            pytest.raises(DeviceError, match="no IOMMU"),
        ):
            Load(disk.socket, LoadPlan(iommu="static"))

    def test_a_read_only_disk(self, tmp_path: Path) -> None:
        with own_disk(tmp_path, read_only=True) as disk:
            for plan in (LoadPlan(workload="write"), LoadPlan(verify=True)):
                with nothing_left(), pytest.raises(DeviceError, match="read-only"):
                    Load(disk.socket, plan)
            with Load(disk.socket, LoadPlan()) as load:
                assert load.run(0.05).reads > 0

    @pytest.mark.parametrize(
        ("plan", "complaint"),
        [
            ({"queues": 3}, "3 queues are wanted, the device has 2"),
            ({"span": SIZE + 1}, "of a disk of"),
            ({"span": 2048}, "in blocks of 4096"),
            ({"verify": True, "depth": 256, "span": SPAN}, "at least 1024 blocks, not 256"),
            ({"block_size": 2 << 20, "depth": 1}, "512 segments, the device takes 126"),
        ],
    )
    def test_what_the_device_cannot_do(
        self, tmp_path: Path, plan: dict[str, Any], complaint: str
    ) -> None:
        with (
            own_disk(tmp_path, queues=2) as disk,
            nothing_left(),
            pytest.raises(DeviceError, match=complaint),
        ):
            Load(disk.socket, LoadPlan(**plan))

    def test_large_blocks_go_if_contiguous(self, tmp_path: Path) -> None:
        plan = LoadPlan(block_size=2 << 20, depth=1, contiguous=True)
        with own_disk(tmp_path) as disk, Load(disk.socket, plan) as load:
            assert load.run(0.1).reads > 0

    def test_no_listener(self, tmp_path: Path) -> None:
        with nothing_left(), pytest.raises(FileNotFoundError):
            Load(tmp_path / "absent.sock", LoadPlan())


class TestPlan:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"workload": "trim"},
            {"iommu": "lazy"},
            {"granularity": "half"},
            {"block_size": 0},
            {"block_size": 1000},
            {"block_size": 8 << 20},
            {"depth": 0},
            {"depth": 1025},
            {"queues": 0},
            {"queues": 65},
            {"queue_size": 100},
            {"queue_size": 2048},
            {"queue_size": 0},
            {"queue_size": 64, "depth": 32, "indirect": False},
            {"depth": 512, "indirect": False},
            {"block_size": 1 << 20, "queue_size": 256},
        ],
    )
    def test_what_makes_no_sense(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"\w"):
            LoadPlan(**wrong)

    @pytest.mark.parametrize(
        ("plan", "entries"),
        [
            ({}, 256),
            ({"depth": 1024}, 1024),
            ({"depth": 128, "indirect": False}, 512),
            ({"block_size": 1 << 20}, 1024),
            ({"block_size": 1 << 20, "contiguous": True}, 256),
            ({"block_size": 1 << 20, "iommu": "strict"}, 256),
            ({"queue_size": 64}, 64),
        ],
    )
    def test_queues_are_as_long_as_needed(self, plan: dict[str, Any], entries: int) -> None:
        assert LoadPlan(**plan).entries == entries


def test_public_names_are_documented() -> None:
    for name in ("Load", "LoadResult", "CorruptionError", "cpu_seconds", "percentile"):
        assert getattr(load_module, name).__doc__
