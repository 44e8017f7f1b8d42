"""A vfio-user client whose calls fail, one after the other, in a process of its own.

Run as a program it is that process: for each line that it reads it lives a client's life in which
one call fails, and another one in which none does, and says what came of them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import mmap
import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Self

from guestio.dma import INTX, MSIX, DmaMapRequest
from guestio.errors import AccessError, DeviceError, GuestioError
from guestio.memory import Backing
from guestio.memory.backing import close_fd
from guestio.pci import Bar, PciHost
from guestio.vfio_user import Client, Server, VfioUserTarget
from tests.kit.fail_nth.case import Case
from tests.kit.fail_nth.shim import arm_page, disarm_page, open_page
from tests.kit.vfio_client import PAGE, Toy

PATIENCE: Final = 3.0
"""Seconds that a client in which something fails waits for an answer, or an interrupt."""
HANGS: Final = 60.0
"""Seconds after which a life that has not ended is taken to hang; its threads are shown then."""
ADDRESS, COPY, FILL, INTERRUPT, BELL = 8, 0x28, 0x2C, 0x30, 0x40
FACE: Final = b"a memory that the driver maps"


class Whole(Toy):
    """A device with everything that a client can use: a BAR to be mapped, and a doorbell, too."""

    def __init__(self) -> None:
        super().__init__()
        memory = Backing.memfd(PAGE)
        memoryview(memory._mapping)[: len(FACE)] = FACE
        self.bars = {0: Bar(PAGE, width=8), 2: Bar(PAGE, memory=memory)}  # type: ignore[misc]

    def attached(self, host: PciHost) -> None:
        super().attached(host)
        host.offer_ioeventfd(0, BELL)

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        # The client may not have been able to map it.
        with contextlib.suppress(AccessError):
            super().write(bar, offset, size, value)


class Life:
    """A client from its beginning to its end, which uses the device in every way there is.

    Attributes:
        failed: What failed on the way, by an error that says so.
        bad: What must not be: other errors, wrong data.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self.failed: list[str] = []
        self.bad: list[str] = []
        self._timeout = timeout
        with (
            self._trying("connecting"),
            contextlib.ExitStack() as undo,
            Client(path, timeout=timeout) as client,
        ):
            self._use(client, undo)

    @contextlib.contextmanager
    def _trying(self, what: str) -> Iterator[None]:
        try:
            yield
        except (GuestioError, MemoryError) as error:
            self.failed.append(f"{what}: {type(error).__name__}: {error}")
        except Exception as error:
            self.bad.append(f"{what}: {type(error).__name__}: {error}")

    def _step(self, what: str, call: Callable[[], Any], wanted: object = None) -> Any:
        """Do something; what it returned, or None if it failed."""
        with self._trying(what):
            found = call()
            if wanted is not None and found != wanted:
                self.bad.append(f"{what}: {found!r}, not {wanted!r}")
            return found
        return None

    def _use(self, client: Client, undo: contextlib.ExitStack) -> None:
        step, bar = self._step, client.bar(0)
        step("config", lambda: client.config.load(0, 2), 0x1234)
        step("bus master", lambda: setattr(client, "bus_master", True))
        with self._trying("memory"):
            shared, private = Backing.memfd(2 * PAGE), Backing.anonymous(PAGE)
            self._memory(client, shared, private)
        with self._trying("interrupts"):
            # The test's own.
            event = _own_eventfd()
            undo.callback(close_fd, event)
            self._interrupts(client, event)
        step("posted", lambda: bar.post(0x50, b"\5\0\0\0"))
        step("many", lambda: bar.post_many([(0x58, b"\6"), (0x60, b"\7\0\0\0")]))
        step("posted before", lambda: bar.load(0x60, 4), 7)
        with self._trying("mapped BAR"), client.bar(2).backing() as area:
            found = bytes(memoryview(area._mapping)[: len(FACE)])
            if found != FACE:
                self.bad.append(f"a mapped BAR has {found!r}")
        with self._trying("doorbells"):
            for bell in bar.doorbells():
                with bell:
                    bell.ring()
        step("reset", client.reset)
        # The connection ends, and the next one brings everything back.
        exchange = client._life.exchange
        exchange.fail("the test ends it")
        step("reconnect", lambda: client.reconnect(self._timeout))
        step("config afterwards", lambda: client.config.load(0, 2), 0x1234)
        for mapping in client._mapped.all():
            step(
                "unmap", lambda m=mapping: VfioUserTarget(client).unmap_dma(m.start, m.request.size)
            )

    def _memory(self, client: Client, shared: Backing, private: Backing) -> None:
        step, bar, target = self._step, client.bar(0), VfioUserTarget(client)
        places = [
            DmaMapRequest(0, PAGE, shared.host_address, shared.fd),
            DmaMapRequest(
                2 * PAGE, PAGE, shared.host_address + PAGE, shared.fd, PAGE, writable=False
            ),
            DmaMapRequest(4 * PAGE, PAGE, private.host_address),
        ]
        for request in places:
            step(f"map {request.start:#x}", lambda r=request: target.map_dma(r))
        for start in (0, 4 * PAGE):
            step("address", lambda at=start: bar.store(ADDRESS, at, 8))
            step("fill", lambda: bar.store(FILL, 100, 4))
            step("copy", lambda: bar.store(COPY, 100, 4))
            step("after", lambda: bar.load(ADDRESS, 8), start)
        step("unmap", lambda: target.unmap_dma(0, PAGE))
        step("map again", lambda: target.map_dma(places[0]))

    def _interrupts(self, client: Client, event: int) -> None:
        step = self._step
        on = step("enable", lambda: (client.enable_interrupts(MSIX, [event]), True)[1])
        step("mask", lambda: client.mask_interrupt(MSIX, 0))
        step("unmask", lambda: client.unmask_interrupt(MSIX, 0))
        raised = step("raise", lambda: (client.bar(0).store(INTERRUPT, 0, 4), True)[1])
        if on and raised and not self.failed and not _comes(event):
            self.bad.append("no interrupt came")
        step("unmask by", lambda: client.unmask_by(INTX, event))
        step("trigger", lambda: client.trigger_interrupt(MSIX, 0))
        step("disable", lambda: client.disable_interrupts(MSIX))
        step("enable two", lambda: client.enable_interrupts(MSIX, [event, -1, event]))


def _own_eventfd() -> int:
    try:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as error:
        raise DeviceError(f"no eventfd for the test: {error}") from None


def _comes(event: int) -> bool:
    poll = select.poll()
    poll.register(event, select.POLLIN)
    try:
        return bool(poll.poll(PATIENCE * 1000))
    except OSError as error:
        # The call that was to fail is the test's own.
        raise DeviceError(f"the test cannot wait: {error}") from None


def _footprint() -> list[int]:
    """Open descriptors, threads, and mappings of shared memory."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [
        len(os.listdir("/proc/self/fd")),  # noqa: PTH208 - one descriptor, that of the listing
        threading.active_count(),
        sum(1 for line in maps if "memfd:" in line),
    ]


def _settled(wanted: list[int]) -> list[int]:
    """The footprint, once it is the one that is wanted: some descriptors are closed in threads."""
    until = time.monotonic() + HANGS / 6
    while (found := _footprint()) != wanted and wanted and time.monotonic() < until:
        time.sleep(0.01)
    return found


def main() -> None:
    """Live one life for each line: the path, and what is to fail in it."""
    path, control = sys.argv[1:]
    with Path(control).open("r+b") as file:
        page = mmap.mmap(file.fileno(), 0)
    for line in sys.stdin:
        function, nth, error, wanted = json.loads(line)
        faulthandler.dump_traceback_later(HANGS, exit=True)
        arm_page(page, function, nth, error)
        begun = time.monotonic()
        try:
            life = Life(path, PATIENCE)
        finally:
            calls, injected = disarm_page(page)
        took = time.monotonic() - begun
        begun = time.monotonic()
        following = Life(path, HANGS / 2)
        served = time.monotonic() - begun
        faulthandler.cancel_dump_traceback_later()
        found = {
            "failed": life.failed,
            "bad": life.bad
            + [f"the next one: {each}" for each in following.failed + following.bad],
            "calls": calls,
            "injected": injected,
            "took": took,
            "served": served,
            "footprint": _settled(wanted),
            "descriptors": [
                str(each.readlink())
                for each in Path("/proc/self/fd").iterdir()
                if each.is_symlink()
            ],
        }
        print(json.dumps(found), flush=True)


class ClientProcess:
    """A client in the shim, and a server for it in a thread of this process.

    Args:
        library: The shim.
        directory: A place of its own.

    Attributes:
        calls: How often each function is called in a life where nothing fails.
        log: The last lines that it wrote.
    """

    def __init__(self, library: Path, directory: Path) -> None:
        self._page, environment = open_page(directory)
        self.log: deque[str] = deque(maxlen=60)
        path = directory / "client.sock"
        self._device = Whole()
        self._server = Server(self._device, path)
        self._serving = threading.Thread(target=self._server.serve, name="serving")
        self._serving.start()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.kit.fail_nth.client"),
                *(str(path), str(directory / "control")),
            ],
            env=environment | {"LD_PRELOAD": str(library)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.calls: dict[str, int] = {}
        self._footprint: list[int] = []
        try:
            for _ in range(2):
                found = self._live(None, 0, 0)
                assert not found["failed"], found["failed"]
                self.calls = found["calls"]
            self._footprint = found["footprint"]
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(line.rstrip())

    def _live(self, function: str | None, nth: int, error: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([function, nth, error, self._footprint]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "\n".join(["it ended, or hangs:", *self.log])
        found: dict[str, Any] = json.loads(answer)
        assert not found["bad"], (found["bad"], found["failed"])
        return found

    def run(self, case: Case) -> tuple[bool, float]:
        """Have one call fail in a client's life; whether there was one, and how long the next took.

        Raises:
            AssertionError: An error says nothing, something is left, or the next client fails.
        """
        found = self._live(case.function, case.nth, case.error)
        assert found["footprint"] == self._footprint, (
            f"descriptors, threads, shared mappings are {found['footprint']}, not "
            f"{self._footprint}: {found['failed']} {found['descriptors']}"
        )
        # Each step may wait once, no more than one does for nothing.
        assert found["took"] < HANGS / 2, f"{found['took']} s: {found['failed']}"
        return found["injected"], found["served"]

    def close(self) -> None:
        """End it, and the server."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._server.stop()
        self._serving.join()
        self._server.close()
        self._page.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


if __name__ == "__main__":
    main()
