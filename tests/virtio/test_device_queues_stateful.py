"""A device that speaks first, and a driver that stops, starts and resets it at any moment.

Whatever happens, each buffer comes back once, in the order of the ring, with what the device
wrote to it; one that was not taken is still there after a stop; one that was held comes back empty.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from guestio._core.virtio.chain import Chain
from guestio.errors import DeviceError
from guestio.testing import Driver, DriverBuffer
from guestio.virtio.device import Device, DeviceId
from guestio.virtio.host import DeviceHost
from tests.kit.serving import Serving, footprint, left_since, until

SIZE = 8
"""Entries of the ring: few, so that its indices wrap."""
STOP_TIMEOUT = 0.01

moments = st.sampled_from(["here", "in the loop"])


class Owner(Device):
    """Takes when the test says so, and counts what it is told."""

    device_id = DeviceId.CONSOLE
    device_queues = (0,)

    def attached(self, host: DeviceHost) -> None:
        self.host, self.queue = host, host.queue(0)
        self.told = 0
        self.queue.on_available(self.note)

    def note(self) -> None:
        self.told += 1


@dataclass
class Taken:
    """A buffer that the device took, and what it made of it."""

    buffer: DriverBuffer
    chain: Chain | None
    data: bytes | None = None


class DeviceQueues(RuleBasedStateMachine):
    """One queue of a device, its driver, and what must have become of each buffer."""

    serving: Serving | None = None
    driver: Driver

    @initialize(
        mode=st.sampled_from(["off", "static", "strict"]),
        threads=st.booleans(),
        event_idx=st.booleans(),
    )
    def begin(self, mode: Any, threads: bool, event_idx: bool) -> None:
        gc.collect()
        self.before = footprint()
        self.directory = Path(tempfile.mkdtemp())
        self.device = Owner()
        self.serving = Serving(
            self.device,
            self.directory / "socket",
            stop_timeout=STOP_TIMEOUT,
            queue_threads=threads,
        ).__enter__()
        self.driver = Driver(
            self.serving.path, iommu=mode, queue_size=SIZE, event_idx=event_idx, indirect=False
        )
        self.strict = mode == "strict"
        self.running = True
        self.posted: list[DriverBuffer] = []
        self.taken: list[Taken] = []
        self.stale: list[Chain] = []

    def call(self, where: str, function: Callable[[], Any]) -> Any:
        """What a function returns, in the test's thread or in the loop's."""
        if where == "here":
            return function()
        found: list[Any] = []

        def run() -> None:
            try:
                found.append((function(), None))
            except DeviceError as error:
                found.append((None, error))

        self.device.host.call_soon_threadsafe(run)
        until(lambda: found, "the loop does not call back")
        value, error = found[0]
        if error is not None:
            raise error
        return value

    @property
    def held(self) -> list[Taken]:
        return [each for each in self.taken if each.data is None]

    def look(self) -> None:
        """Check what the driver got back: all that is completed up to the first that is not."""
        expected: list[Taken] = []
        while self.taken and self.taken[0].data is not None:
            expected.append(self.taken.pop(0))
        for each in expected:
            got = self.driver.receive()
            assert got is each.buffer
            assert got.data == each.data
        assert self.driver.poll() == []

    @rule(size=st.integers(1, 5000), publish=st.booleans())
    def post(self, size: int, publish: bool) -> None:
        if len(self.posted) + len(self.taken) < SIZE - 2 and self.driver._queue(0).ring.free >= 3:
            self.posted.append(self.driver.post(size, publish=publish))
            if not publish:
                self.driver.publish()

    @rule(where=moments)
    def take(self, where: str) -> None:
        found: list[Chain] = []

        def look() -> bool:
            chain = self.call(where, self.device.queue.take)
            found.extend([] if chain is None else [chain])
            return bool(found)

        if not self.running or not self.posted:
            assert not look()
            return
        until(look, "a buffer is not given to the device")
        buffer = self.posted.pop(0)
        assert found[0].writable.total == buffer.size
        assert found[0].readable.total == 0
        self.taken.append(Taken(buffer, found[0]))

    @rule(where=moments, length=st.sampled_from([0, 1, 100, 6000]))
    def send(self, where: str, length: int) -> None:
        data = b"s" * length
        send = self.device.queue.send
        if not self.running or not self.posted:
            assert self.call(where, lambda: send(data)) is False
            return
        if length > self.posted[0].size:
            refused: list[DeviceError] = []

            def attempt() -> bool:
                try:
                    assert self.call(where, lambda: send(data)) is False
                except DeviceError as error:
                    refused.append(error)
                return bool(refused)

            until(attempt)
            assert f"room for {self.posted[0].size}" in str(refused[0])
            return
        until(lambda: self.call(where, lambda: send(data)), "data is not sent")
        self.taken.append(Taken(self.posted.pop(0), None, data))
        self.look()

    @precondition(lambda self: self.held)
    @rule(where=moments, which=st.data(), written=st.integers(0, 5000))
    def complete(self, where: str, which: st.DataObject, written: int) -> None:
        each = which.draw(st.sampled_from(self.held))
        chain = each.chain
        assert chain is not None
        data = b"c" * min(written, each.buffer.size)
        chain.writable.write(data)
        if written > each.buffer.size:
            with pytest.raises(DeviceError, match=f"room for {each.buffer.size}"):
                self.call(where, lambda: self.device.queue.complete(chain, written))
        assert self.call(where, lambda: self.device.queue.complete(chain, len(data))) is True
        self.stale.append(chain)
        each.data, each.chain = data, None
        self.look()

    @precondition(lambda self: self.held)
    @rule(where=moments, which=st.data())
    def complete_several(self, where: str, which: st.DataObject) -> None:
        some = which.draw(st.lists(st.sampled_from(self.held), unique_by=id, min_size=1))
        pairs = [(each.chain, 0) for each in some]
        assert self.call(where, lambda: self.device.queue.complete_all(pairs)) == len(some)
        for each in some:
            assert each.chain is not None
            self.stale.append(each.chain)
            each.data, each.chain = b"", None
        self.look()

    @precondition(lambda self: self.stale)
    @rule(where=moments, which=st.data())
    def complete_again(self, where: str, which: st.DataObject) -> None:
        chain = which.draw(st.sampled_from(self.stale))
        assert self.call(where, lambda: self.device.queue.complete(chain, 1)) is False

    def give_back(self) -> None:
        """What the device held has come back unused."""
        for each in self.held:
            assert each.chain is not None
            self.stale.append(each.chain)
            each.data, each.chain = b"", None

    @rule()
    def stop_or_start(self) -> None:
        if self.running:
            self.driver.pause()
            assert self.device.host.outstanding == 0
            self.give_back()
            self.look()
        else:
            self.driver.resume()
        self.running = not self.running

    @rule()
    def change_memory(self) -> None:
        self.driver.frontend.set_memory(self.driver.memory, slots=False)
        assert self.device.host.outstanding == 0
        self.give_back()
        self.look()

    @precondition(lambda self: self.running)
    @rule()
    def reset(self) -> None:
        self.driver.reset()
        for each in self.held:
            assert each.chain is not None
            self.stale.append(each.chain)
        self.posted.clear()
        self.taken.clear()
        assert self.device.host.outstanding == 0

    @precondition(lambda self: self.strict)
    @rule()
    def revoke(self) -> None:
        """The guest's IOMMU forgets what the device knows; what is held is given up."""
        iotlb = self.driver.frontend.iotlb
        iotlb.invalidate(*((place.base, place.length) for place, _, _ in list(iotlb.mappings)))
        if self.running:
            self.give_back()
            # Their memory is given back; the queue's thread publishes them in its own time.
            until(lambda: self.device.host.outstanding == 0, "a buffer is not given back")
            self.look()

    @precondition(lambda self: self.running and self.posted)
    @rule()
    def the_device_is_told(self) -> None:
        told = self.device.told
        self.device.queue.on_available(self.device.note)
        until(lambda: self.device.told > told, "the device is not told of a buffer")

    def teardown(self) -> None:
        if self.serving is None:
            return
        self.driver.close()
        self.serving.let_go()
        for each in (self.stale, self.taken):
            each.clear()
        self.serving.__exit__()
        shutil.rmtree(self.directory)
        until(lambda: not left_since(self.before), "something is left behind")


TestDeviceQueues = DeviceQueues.TestCase
TestDeviceQueues.settings = settings(
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    max_examples=12,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
