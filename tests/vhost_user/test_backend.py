"""The back-end from its socket's first day to its last: front-ends come and go, nothing stays."""

from __future__ import annotations

import gc
import os
import pickle
import resource
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestio import Permissions
from guestio._core.base import variant
from guestio._core.virtio.chain import Chain
from guestio.errors import DeviceError, GuestioError
from guestio.guest.disk import ScriptedGuest
from guestio.peer.endpoint import ACCEPT_PAUSE
from guestio.peer.foreign import is_pipe
from guestio.vhost_user import Backend, Frontend
from guestio.vhost_user.channel import PeerGoneError
from guestio.virtio.blk import BlockDevice
from tests.kit.serving import (
    OK,
    Driver,
    Mirror,
    Serving,
    errors_of,
    footprint,
    left_since,
    nothing_left,
    until,
)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


@pytest.fixture
def device() -> Mirror:
    return Mirror()


@pytest.fixture
def serving(device: Mirror, path: Path) -> Iterator[Serving]:
    with Serving(device, path) as made:
        yield made


def print_growth(path: str) -> None:
    """Print how much memory front-ends with many translations take, and leave, one after the other.

    Without help of the garbage collector, which cannot know how much memory they take.
    """
    with Serving(Mirror(), Path(path)) as serving:
        serving.check_serves()
        gc.collect()
        gc.disable()
        before = resident()
        for _ in range(6):
            with Driver(serving.path, queues=0, iommu=True, map_all=False):
                assert serving.backend._connection is not None
                iotlb = serving.backend._connection._translator.iotlb
                for page in range(1 << 17):
                    iotlb.set_mapping(page << 13, page << 12, 4096, Permissions.READ)
                print(resident() - before)
                del iotlb
            serving.let_go()
            print(resident() - before)
        gc.enable()


class TestFrontEndsComeAndGo:
    def test_one_after_the_other(self, serving: Serving, device: Mirror) -> None:
        for i in range(20):
            with Driver(serving.path, queues=2) as driver:
                assert driver.run(0, b"hello") == (OK, b"olleh")
                number = str(i)
                assert driver.run(1, number.encode()) == (OK, number[::-1].encode())
            until(lambda i=i: device.resets == i + 1)
        assert serving.stats.connections == 20
        assert serving.stats.requests == 40
        assert serving.stats.protocol_errors == serving.stats.failed_requests == 0
        # As a program sends them that serves in a process of its own.
        assert str(pickle.loads(pickle.dumps(serving.stats))) == str(serving.stats)

    @pytest.mark.parametrize("iommu", [False, True])
    def test_nothing_stays_of_them(self, serving: Serving, iommu: bool) -> None:
        serving.check_serves()
        with nothing_left():
            for _ in range(5):
                with Driver(serving.path, queues=2, iommu=iommu) as driver:
                    driver.run(0, b"abc")
                    driver.run(1, b"abc")

    @pytest.mark.skipif(
        "asan" in variant.NAME, reason="the sanitizer keeps memory that was given back for a while"
    )
    def test_no_translation_stays_of_them(self, path: Path) -> None:
        """In a process of its own: memory that other tests have freed would be used again."""
        code = f"import tests.vhost_user.test_backend as t; t.print_growth({str(path)!r})"
        done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
        grown = [int(word) for word in done.stdout.split()]
        assert grown[0] > 8 << 20
        assert grown[-1] < grown[0]

    def test_nothing_stays_of_one_that_vanishes_in_the_middle(self, serving: Serving) -> None:
        serving.check_serves()
        with nothing_left():
            for stop_after in range(8):
                driver = Driver(serving.path, queues=0)
                if stop_after > 1:
                    driver.add_queue(0)
                if stop_after > 2:
                    driver.submit(0, b"abc")
                if stop_after > 3:
                    driver.rings[0].set_avail_idx(40000)
                    driver.handles[0].kick()
                driver.close()
        serving.check_serves()

    def test_nothing_stays_of_one_that_was_refused_something(self, serving: Serving) -> None:
        serving.check_serves()
        with nothing_left(), Driver(serving.path, iommu=True) as driver:
            driver.run(0, b"abc")
            update = driver.frontend.request
            for _ in range(3):
                # IOTLB update to memory that is not shared.
                reply = update(22, _update(0x5000, 0x1000, 0x1234000), has_reply=True)
                assert reply != bytes(8)
            driver.run(0, b"abc")
        serving.check_serves()

    def test_the_second_one_waits_for_the_first_to_go(self, serving: Serving) -> None:
        with Driver(serving.path) as first:
            second = Frontend(serving.path, timeout=10)
            with second:
                waited: list[int] = []
                thread = threading.Thread(target=lambda: waited.append(second.negotiate(1 << 32)))
                thread.start()
                assert first.run(0, b"mine") == (OK, b"enim")
                time.sleep(0.1)
                assert not waited
                assert first.run(0, b"still") == (OK, b"llits")
                first.close()
                thread.join(10)
                assert waited == [1 << 32]
        assert serving.stats.connections == 2

    def test_one_that_says_nothing_holds_up_only_others(self, serving: Serving) -> None:
        silent = serving.connect()
        time.sleep(0.05)
        silent.close()
        serving.check_serves()

    def test_many_that_hang_up_at_once(self, serving: Serving) -> None:
        for _ in range(50):
            serving.connect().close()
        serving.check_serves()
        assert serving.stats.protocol_errors == 0

    def test_without_fds_to_accept_one(
        self, serving: Serving, caplog: pytest.LogCaptureFixture
    ) -> None:
        serving.check_serves()
        waiting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
        try:
            began = time.monotonic()
            waiting.connect(str(serving.path))
            time.sleep(0.6)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        tries = (time.monotonic() - began) / ACCEPT_PAUSE + 1
        logged = [line for line in errors_of(caplog) if "cannot accept a peer" in line]
        assert 1 <= len(logged) <= tries
        with Driver(waiting) as driver:
            assert driver.run(0, b"late") == (OK, b"etal")

    def test_without_memory_for_one(
        self, serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is lost, its descriptor is not, and the next one is served."""
        serving.check_serves()
        before = footprint()
        failed = threading.Event()

        class Short:
            AF_UNIX, SOCK_STREAM = socket.AF_UNIX, socket.SOCK_STREAM

            @staticmethod
            def socket(*args: int) -> socket.socket:
                if not failed.is_set():
                    failed.set()
                    raise MemoryError
                return socket.socket(*args)

        monkeypatch.setattr("guestio.peer.endpoint.socket", Short)
        with serving.connect():
            assert failed.wait(10)
            assert errors_of(caplog) in ([], ["serving failed"])
        serving.check_serves()
        until(lambda: not left_since(before))

    def test_without_memory_to_judge_a_descriptor(
        self, serving: Serving, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        serving.check_serves()
        before = footprint()
        failed = threading.Event()

        def short(fd: int) -> bool:
            if not failed.is_set():
                failed.set()
                raise MemoryError
            return is_pipe(fd)

        monkeypatch.setattr("guestio.peer.foreign.is_pipe", short)
        with pytest.raises(GuestioError), Driver(serving.path) as driver:
            driver.run(0, b"lost")
        assert failed.is_set()
        serving.check_serves()
        until(lambda: not left_since(before))


class TestServing:
    def test_for_a_number_of_front_ends(self, device: Mirror, path: Path) -> None:
        with Backend(device, path) as backend:
            thread = threading.Thread(target=backend.serve, args=(2,))
            thread.start()
            for _ in range(2):
                with Driver(path) as driver:
                    driver.run(0, b"abc")
            thread.join(10)
            assert not thread.is_alive()
            backend.serve(0)
            thread = threading.Thread(target=backend.serve, args=(1,))
            thread.start()
            with Driver(path) as driver:
                driver.run(0, b"abc")
            thread.join(10)
            assert not thread.is_alive()
            assert backend.statistics.connections == 3

    def test_stopping_while_it_waits(self, device: Mirror, path: Path) -> None:
        with nothing_left():
            for _ in range(10):
                with Serving(device, path):
                    pass

    def test_stopping_while_a_front_end_is_connected(self, device: Mirror, path: Path) -> None:
        with nothing_left():
            with Serving(device, path) as serving:
                driver = Driver(path, queues=2)
                driver.run(0, b"abc")
            with pytest.raises(PeerGoneError):
                driver.frontend.sync()
            driver.close()
        assert serving.stats.requests == 1

    @pytest.mark.parametrize("name", ["", "a\0b"])
    def test_what_is_no_name_of_a_file(self, device: Mirror, name: str) -> None:
        with pytest.raises(DeviceError, match="not the name of a file"):
            Backend(device, name)

    def test_stopping_before_it_begins(self, device: Mirror, path: Path) -> None:
        with Backend(device, path) as backend:
            backend.stop()
            backend.stop()
            backend.serve()

    def test_stopping_what_is_closed(self, device: Mirror, path: Path) -> None:
        backend = Backend(device, path)
        backend.close()
        before = footprint()
        # The number of its wake-up fd is reused now.
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        backend.stop()
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
        os.close(reader)
        os.close(writer)
        assert not left_since(before)

    def test_stopping_under_load(self, tmp_path: Path, path: Path) -> None:
        image = tmp_path / "image"
        image.write_bytes(bytes(1 << 20))
        with nothing_left():
            device = BlockDevice(image)
            with Serving(device, path):
                guest = ScriptedGuest(path)
                for _ in range(100):
                    guest.submit_read(0, 4096)
            guest.close()
            device.close()
        assert not path.exists()

    def test_polling_for_requests(self, device: Mirror, path: Path) -> None:
        with Serving(device, path, poll_us=200), Driver(path, queues=2) as driver:
            for i in range(50):
                assert driver.run(i % 2, b"spin") == (OK, b"nips")
            time.sleep(0.01)
            assert driver.run(0, b"slept") == (OK, b"tpels")

    @pytest.mark.parametrize(
        ("options", "platform", "indirect"),
        [
            ({}, True, False),
            ({"iommu": "auto", "indirect": "on"}, True, True),
            ({"iommu": "auto", "indirect": "off"}, True, False),
            ({"iommu": "off"}, False, True),
            ({"iommu": "off", "indirect": "on"}, False, True),
            ({"iommu": "off", "indirect": "off"}, False, False),
        ],
    )
    def test_what_is_offered(
        self,
        device: Mirror,
        path: Path,
        options: dict[str, str],
        platform: bool,
        indirect: bool,
    ) -> None:
        options = {"indirect": "auto", **options}
        with Serving(device, path, **options), Frontend(path) as frontend:
            frontend.negotiate(0)
            assert bool(frontend.offered >> 33 & 1) == platform
            assert bool(frontend.offered >> 28 & 1) == indirect
            assert frontend.offered & 0b111 == 0b101
            for bit in (29, 32):
                assert frontend.offered >> bit & 1


class TestSocket:
    def test_it_is_there_and_goes(self, device: Mirror, path: Path) -> None:
        backend = Backend(device, path)
        assert stat.S_ISSOCK(path.stat().st_mode)
        backend.close()
        assert not path.exists()
        backend.close()

    def test_a_stale_one_is_replaced(self, device: Mirror, path: Path) -> None:
        stale = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stale.bind(str(path))
        stale.close()
        assert path.exists()
        with Serving(device, path) as serving:
            serving.check_serves()

    def test_one_with_a_listener_is_not(self, device: Mirror, serving: Serving) -> None:
        with nothing_left():
            for _ in range(3):
                with pytest.raises(DeviceError, match="another process is listening there"):
                    Backend(device, serving.path)
        serving.check_serves()

    def test_one_whose_listener_is_busy_is_not(self, device: Mirror, path: Path) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen(0)
        waiting = []
        try:
            while True:
                client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                client.setblocking(False)
                waiting.append(client)
                client.connect(str(path))
        except BlockingIOError:
            pass
        with pytest.raises(DeviceError, match="another process is listening there"):
            Backend(device, path)
        assert path.exists()
        for client in waiting:
            client.close()
        listener.close()

    def test_a_datagram_socket_is_not(self, device: Mirror, path: Path) -> None:
        other = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        other.bind(str(path))
        with pytest.raises(DeviceError, match=r"cannot listen on .*socket"):
            Backend(device, path)
        assert path.exists()
        other.close()

    @pytest.mark.parametrize("kind", ["file", "directory", "fifo", "dangling"])
    def test_anything_else_is_not(self, device: Mirror, path: Path, kind: str) -> None:
        match kind:
            case "file":
                path.write_text("precious")
            case "directory":
                path.mkdir()
            case "fifo":
                os.mkfifo(path)
            case _:
                path.symlink_to("/nowhere/to/be/found")
        with nothing_left(), pytest.raises(DeviceError, match="cannot listen on"):
            Backend(device, path)
        assert os.path.lexists(path)
        if kind == "file":
            assert path.read_text() == "precious"

    def test_a_path_that_is_too_long(self, device: Mirror, tmp_path: Path) -> None:
        fits = tmp_path / ("x" * (107 - len(str(tmp_path)) - 1))
        Backend(device, fits).close()
        long = tmp_path / ("x" * (108 - len(str(tmp_path)) - 1))
        with nothing_left(), pytest.raises(DeviceError, match=r"108 bytes long; .* at most 107"):
            Backend(device, long)
        umlauts = tmp_path / ("ü" * 53)
        with pytest.raises(DeviceError, match="bytes long"):
            Backend(device, umlauts)

    def test_a_directory_that_is_not_there(self, device: Mirror, tmp_path: Path) -> None:
        with nothing_left(), pytest.raises(DeviceError, match=r"cannot listen on .*No such file"):
            Backend(device, tmp_path / "none" / "socket")

    def test_a_path_through_a_file(self, device: Mirror, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(DeviceError, match=r"cannot listen on .*Not a directory"):
            Backend(device, tmp_path / "file" / "socket")

    def test_a_socket_that_was_removed(self, device: Mirror, path: Path) -> None:
        backend = Backend(device, path)
        path.unlink()
        backend.close()

    def test_a_socket_that_another_back_end_replaced(self, device: Mirror, path: Path) -> None:
        old = Backend(device, path)
        path.unlink()
        with Serving(device, path) as new:
            old.close()
            assert path.exists()
            new.check_serves()
        assert not path.exists()

    @pytest.mark.parametrize(
        "options",
        [
            {"iommu": "on"},
            {"indirect": "yes"},
            {"miss_timeout": 0},
            {"miss_timeout": -1},
            {"miss_timeout": float("nan")},
            {"miss_timeout": float("inf")},
            {"miss_timeout": 1e300},
            {"stop_timeout": -1},
            {"stop_timeout": 3600.1},
            {"stop_timeout": float("inf")},
            {"stop_timeout": 10**400},
            {"poll_us": -1},
        ],
    )
    def test_bad_arguments_leave_nothing(
        self, device: Mirror, path: Path, options: dict[str, object]
    ) -> None:
        with nothing_left(), pytest.raises(ValueError, match=next(iter(options))):
            Backend(device, path, **options)  # type: ignore[arg-type]
        assert not path.exists()


def _update(iova: int, size: int, user: int, perm: int = 3) -> bytes:
    return (
        b"".join(n.to_bytes(8, "little") for n in (iova, size, user)) + bytes([perm, 2]) + bytes(6)
    )


def test_one_that_serves_cannot_be_closed(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not even by its device: that is a request that fails, and nothing else."""

    class Closing(Mirror):
        def process(self, queue: int, chain: Chain) -> int:
            serving.backend.close()
            return 0

    with Serving(Closing(), path) as serving, Driver(path) as driver:
        for _ in range(2):
            driver.run(0, b"close")
            assert "cannot be closed while it serves: call stop()" in caplog.messages[-1]
        with pytest.raises(DeviceError, match=r"call stop\(\)"):
            serving.backend.close()
        driver.frontend.sync()
    assert errors_of(caplog) == []
    assert not path.exists()
