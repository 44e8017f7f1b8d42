"""A virtio device that misbehaves by rules, whatever transport serves it."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any, Final

from guestio._core.virtio.chain import Chain
from guestio.errors import GuestioError
from guestio.faults.misbehavior.force import Fault, Faults
from guestio.faults.misbehavior.iommu import MisbehavingTranslator, Sandbox
from guestio.faults.misbehavior.requests import TITLES, Request, describe, ops_of
from guestio.faults.misbehavior.rings import RingLies
from guestio.faults.misbehavior.rules import NO_PROXY, Level, Rule
from guestio.faults.misbehavior.wire import misbehaving_channel
from guestio.iommu.events import Event
from guestio.pci import PciDevice
from guestio.virtio.device import Device

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from guestio._core.virtio.split import SplitRing
    from guestio.virtio.host import DeviceHost
    from guestio.virtio.queue import DeviceQueue
    from guestio.virtio.translator import Translator

REORDER_PATIENCE: Final = 0.1
"""Seconds that an answer waits for the next request of its queue to be answered first."""

_ASKED: Final = ("error", "delay", "stall", "drop", "reorder", "short", "corrupt", "stale")
_SPOKEN: Final = ("delay", "stall", "drop", "reorder", "short", "corrupt")
"""What can go wrong with a buffer that the device fills by itself."""


class Misbehaving(Device):
    """A virtio device that is as another one, except where rules say so.

    Rules of a device, its rings and its configuration take effect over any transport; those of the
    wire and of an IOMMU over vhost-user. Each request passes through Python, also those that the
    compiled core serves otherwise, so that rules see them all; what a network card receives is
    seen by rules of rings alone.

    Args:
        device: What misbehaves; it is the caller's to close, by :meth:`close` or by itself.
        rules: Lines of the rule language, rules that were parsed, or a `Faults` to switch them
            with.

    Raises:
        ValueError: A rule is none, or selects requests that the device has not.

    Attributes:
        device: What misbehaves.
        faults: The rules in force; they may be switched while the device is served.

    Threads: as the device itself. One server at a time.
    """

    def __init__(self, device: Device, rules: Iterable[str | Rule] | Faults = ()) -> None:
        _check_device(device)
        self.device = device
        self.faults = rules if isinstance(rules, Faults) else Faults(rules)
        title = TITLES.get(device.device_id, f"a device of type {device.device_id}")
        for level in (Level.DEVICE, Level.RING):
            self.faults.expect(level, ops_of(device.device_id), title)
        self.faults.refuse(Level.PROXY, NO_PROXY)
        self._host: DeviceHost | None = None
        self._lock = threading.Lock()
        self._queues: dict[int, MisbehavingQueue] = {}
        self._proxy: MisbehavingHost | None = None
        # By queue: requests in the ring by their head, answers that are due later, answers that
        # wait for the next one, and requests that wait because the queue stalls.
        self._requests: dict[int, dict[int, Request]] = defaultdict(dict)
        self._later: dict[int, dict[object, Callable[[], object]]] = defaultdict(dict)
        self._overtaken: dict[int, list[Callable[[], object]]] = defaultdict(list)
        self._stalled: dict[int, deque[Callable[[], object]]] = {}
        self._stalled_by: dict[int, Fault] = {}
        self.sandbox = Sandbox()
        self.faults.watch(self._rules_changed)

    def __repr__(self) -> str:
        return f"<Misbehaving {self.device!r}: {self.faults!r}>"

    # What a device is.

    @property
    def device_id(self) -> int:  # type: ignore[override] # that of the other one
        """Type of the device."""
        return self.device.device_id

    @property
    def num_queues(self) -> int:  # type: ignore[override]
        """Queues of the device."""
        return self.device.num_queues

    @property
    def device_queues(self) -> Collection[int]:  # type: ignore[override]
        """Queues in which the device speaks first."""
        return self.device.device_queues

    @property
    def features(self) -> int:  # type: ignore[override]
        """Features of the device; a lie about them is told on the wire."""
        return self.device.features

    @property
    def offered_features(self) -> int:
        """See :class:`Device`."""
        return self.device.offered_features

    @property
    def error_status(self) -> int | None:  # type: ignore[override]
        """See :class:`Device`."""
        return self.device.error_status

    @property
    def failures(self) -> int:
        """See :class:`Device`."""
        return self.device.failures

    @property
    def state_version(self) -> int:  # type: ignore[override]
        """See :class:`Device`."""
        return self.device.state_version

    @property
    def max_state(self) -> int:  # type: ignore[override]
        """See :class:`Device`."""
        return self.device.max_state

    def save(self) -> bytes:
        """See :class:`Device`."""
        return self.device.save()

    def restore(self, state: bytes) -> None:
        """See :class:`Device`."""
        self.device.restore(state)

    def config(self) -> bytes:
        """See :class:`Device`."""
        return self.device.config()

    def write_config(self, offset: int, data: bytes) -> None:
        """See :class:`Device`."""
        self.device.write_config(offset, data)

    def negotiated(self, features: int) -> None:
        """See :class:`Device`."""
        self.device.negotiated(features)

    def reset(self) -> Event | None:
        """See :class:`Device`."""
        return self.device.reset()

    def stopped(self) -> Event | None:
        """See :class:`Device`."""
        return self.device.stopped()

    def fail(self, queue: int, chain: Chain) -> int:
        """See :class:`Device`."""
        return self.device.fail(queue, chain)

    def close(self) -> None:
        """Close the device. Calling it again does nothing more than with the device itself."""
        self.device.close()

    def server_of(self, queue: int) -> None:
        """Nothing is served past the rules."""

    def attached(self, host: DeviceHost) -> None:
        """See :class:`Device`; the device is given a host whose queues misbehave."""
        self._host = host
        host.ring_format = self._ring_format
        host.seen_translator = self._seen_translator
        host.channel_class = misbehaving_channel(self.faults, self.sandbox, host)
        self._proxy = MisbehavingHost(host, self)
        # Whoever holds a queue of the host's has the rules in between.
        self._queues = {
            index: MisbehavingQueue(host.queue(index), self) for index in range(self.num_queues)
        }
        self.device.attached(self._proxy)  # type: ignore[arg-type] # it has the same face

    def _ring_format(self, index: int) -> Callable[..., SplitRing]:
        return functools.partial(RingLies.ring, self, index)

    def _seen_translator(self, translator: Translator) -> Translator:
        return MisbehavingTranslator(translator, self.faults, self._host)

    def queue(self, index: int) -> MisbehavingQueue:
        """A queue as the device sees it."""
        return self._queues[index]

    # Requests that the driver makes.

    def process(self, queue: int, chain: Chain) -> int | Future[int]:
        """Serve a request as the device does, or worse."""
        request = self.note(queue, chain)
        with self._lock:
            waiting = self._stalled.get(queue)
            if waiting is not None:
                answer: Future[int] = Future()
                waiting.append(functools.partial(self._answer, queue, chain, request, answer))
                return answer
        return self._serve(queue, chain, request)

    def note(self, queue: int, chain: Chain) -> Request:
        """Remember what a request is, for the rules of its ring, which see its number alone."""
        request = describe(self.device_id, queue, chain, queue in self.device.device_queues)
        self._requests[queue][chain.head] = request
        if self.faults.has(("access-after-unmap",)):
            self.sandbox.remember(chain.writable.fragments())
        if self.faults.first(("spurious-interrupt",), str(request), op=request.op, **request.where):
            assert self._host is not None
            # Not at once: other threads set the interrupt up with the lock held.
            self._host.call_soon_threadsafe(self._host.queue(queue).interrupt)
        return request

    def request_of(self, queue: int, head: int) -> Request:
        """What is known of the request of a number."""
        return self._requests[queue].get(head) or Request(queue, "request", 0)

    def interrupt_later(self, queue: int, seconds: float) -> None:
        """Notify the driver of a queue after a while, or before it stops. From any thread."""
        assert self._host is not None
        self.later(queue, seconds, self._host.queue(queue).interrupt)

    def _serve(self, queue: int, chain: Chain, request: Request) -> int | Future[int]:
        found = self.faults.strike(_ASKED, str(request), op=request.op, **request.where)
        if not found:
            answer = self.device.process(queue, chain)
            if self._overtaken[queue]:
                self._let_overtaken_go(queue, answer)
            return answer
        by_name = {each.rule.what.name: each for each in reversed(found)}
        if (stall := by_name.pop("stall", None)) is not None:
            late: Future[int] = Future()
            self._stall(queue, stall)
            with self._lock:
                self._stalled[queue].append(
                    functools.partial(self._fulfil, queue, chain, request, by_name, late)
                )
            return late
        return self._carry_out(queue, chain, request, by_name)

    def _answer(self, queue: int, chain: Chain, request: Request, answer: Future[int]) -> None:
        """Serve a request that waited for its queue, and complete its future."""
        _follow(answer, lambda: self._serve(queue, chain, request))

    def _fulfil(
        self,
        queue: int,
        chain: Chain,
        request: Request,
        faults: dict[str, Fault],
        answer: Future[int],
    ) -> None:
        _follow(answer, lambda: self._carry_out(queue, chain, request, faults))

    def _carry_out(
        self, queue: int, chain: Chain, request: Request, faults: dict[str, Fault]
    ) -> int | Future[int]:
        """Serve a request with what goes wrong about it, except for a stall."""
        if "drop" in faults:
            return Future()
        if (error := faults.get("error")) is not None:
            answer: int | Future[int] = self._refuse(queue, chain, request, error)
        elif "stale" in faults:
            answer = self._pretend(chain, request)
        else:
            kept = self._keep(chain, request, faults.get("short"))
            answer = self.device.process(queue, chain)
            if kept is not None or "corrupt" in faults:
                spoil = functools.partial(
                    _spoil, chain, request, kept=kept, corrupt=faults.get("corrupt")
                )
                answer = _then(answer, spoil)
        if "reorder" in faults:
            return self._hold_back(queue, answer)
        if (delay := faults.get("delay")) is not None:
            return self._delay(queue, answer, delay.seconds)
        return answer

    def _refuse(self, queue: int, chain: Chain, request: Request, fault: Fault) -> int:
        if fault.rule.value is None or not request.status or not chain.writable.total:
            return self.device.fail(queue, chain)
        chain.writable.write(bytes([fault.value]), chain.writable.total - 1)
        return int(chain.writable.total == 1)

    def _pretend(self, chain: Chain, request: Request) -> int:
        """Report success, and do nothing."""
        if request.status:
            chain.writable.write(b"\0", chain.writable.total - 1)
        return 1 if request.op == "write" else chain.writable.total

    def _keep(
        self, chain: Chain, request: Request, short: Fault | None
    ) -> tuple[int, bytes] | None:
        """The end of a buffer as it is, and where it begins, if the answer is to be short."""
        if short is None:
            return None
        room = chain.writable.total - request.status
        begin = max(room - short.value, 0)
        return begin, chain.writable.read(begin, room - begin)

    # Answers that come later.

    def _delay(self, queue: int, answer: int | Future[int], seconds: float) -> Future[int]:
        late: Future[int] = Future()
        if isinstance(answer, Future):
            _cancel_with(late, answer)
            answer.add_done_callback(
                lambda done: self.later(queue, seconds, lambda: _copy(done, late))
            )
        else:
            self.later(queue, seconds, lambda: _set(late, answer))
        return late

    def later(self, queue: int, seconds: float, call: Callable[[], object]) -> None:
        """Do something later, or at once if the queue is to stop."""
        assert self._host is not None
        key = object()
        with self._lock:
            self._later[queue][key] = call

        def due() -> None:
            with self._lock:
                mine = self._later[queue].pop(key, None)
            if mine is not None:
                mine()

        self._host.call_later(seconds, due)

    def _hold_back(self, queue: int, answer: int | Future[int]) -> Future[int]:
        """Answer after the next request of the queue."""
        late: Future[int] = Future()
        if isinstance(answer, Future):
            _cancel_with(late, answer)
            answer.add_done_callback(lambda done: self.hold_back(queue, lambda: _copy(done, late)))
        else:
            self.hold_back(queue, lambda: _set(late, answer))
        return late

    def hold_back(self, queue: int, call: Callable[[], object]) -> None:
        """Do something after the next request of a queue was answered, or before long."""
        with self._lock:
            self._overtaken[queue].append(call)
        self.later(queue, REORDER_PATIENCE, lambda: self.let_overtaken_go(queue))

    def _let_overtaken_go(self, queue: int, answer: int | Future[int]) -> None:
        """Answer what waits for another request to be answered first, which is now or later."""
        if isinstance(answer, Future):
            answer.add_done_callback(lambda _: self._soon(queue))
        else:
            # It is given back once `process` has returned.
            self._soon(queue)

    def _soon(self, queue: int) -> None:
        assert self._host is not None
        self._host.call_soon_threadsafe(lambda: self.let_overtaken_go(queue))

    def let_overtaken_go(self, queue: int) -> None:
        """Answer what was held back."""
        with self._lock:
            calls, self._overtaken[queue] = self._overtaken[queue], []
        for call in calls:
            call()

    def _stall(self, queue: int, fault: Fault) -> None:
        """Have a queue's requests wait from now on."""
        assert self._host is not None
        with self._lock:
            self._stalled[queue] = deque()
            self._stalled_by[queue] = fault
        if fault.seconds < math.inf:
            self._host.call_later(fault.seconds, lambda: self._go_on(queue, fault))

    def stalled(self, queue: int, call: Callable[[], object]) -> bool:
        """Have something wait if a queue stalls; whether it does."""
        with self._lock:
            waiting = self._stalled.get(queue)
            if waiting is None:
                return False
            waiting.append(call)
            return True

    def stall(self, queue: int, fault: Fault, call: Callable[[], object]) -> None:
        """Have a queue stall, beginning with this."""
        self._stall(queue, fault)
        with self._lock:
            self._stalled[queue].append(call)

    def _go_on(self, queue: int, fault: Fault | None = None) -> None:
        """Serve what waits because a queue stalls; only what this fault stalls, if it is given."""
        with self._lock:
            if fault is not None and self._stalled_by.get(queue) is not fault:
                return
            self._stalled_by.pop(queue, None)
            calls = self._stalled.pop(queue, deque())
        for at, call in enumerate(calls):
            with self._lock:
                again = self._stalled.get(queue)
                if again is not None:
                    # One of those that waited has stalled the queue anew.
                    again.extend(list(calls)[at:])
                    return
            call()

    def _rules_changed(self) -> None:
        host = self._host
        if host is None:
            return
        for queue, fault in list(self._stalled_by.items()):
            if fault.ended:
                host.call_soon_threadsafe(functools.partial(self._go_on, queue, fault))

    def stopping(self, queue: int) -> None:
        """Answer what is due later, and what waits, before a queue stops; see :class:`Device`."""
        for _ in range(2):
            # What stalled may be delayed then.
            with self._lock:
                calls = list(self._later[queue].values())
                self._later[queue].clear()
            for call in calls:
                call()
            self.let_overtaken_go(queue)
            self._go_on(queue)
        self.device.stopping(queue)


class MisbehavingHost:
    """A host as a device sees it that misbehaves: its queues are other ones."""

    def __init__(self, host: DeviceHost, device: Misbehaving) -> None:
        self._host = host
        self._device = device

    def queue(self, index: int) -> MisbehavingQueue:
        """See `DeviceHost`."""
        self._host.queue(index)
        return self._device.queue(index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)


class MisbehavingQueue:
    """A queue as a device sees it that misbehaves: buffers that it fills pass by the rules."""

    def __init__(self, queue: DeviceQueue, device: Misbehaving) -> None:
        self._queue = queue
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    def take(self) -> Chain | None:
        """See `DeviceQueue`."""
        chain = self._queue.take()
        if chain is not None:
            self._device.note(self._queue.index, chain)
        return chain

    def send(self, data: Buffer) -> bool:
        """See `DeviceQueue`."""
        if not self._device.faults.has(_SPOKEN):
            return self._queue.send(data)
        chain = self.take()
        if chain is None:
            return False
        content = memoryview(data).cast("B")[: chain.writable.total]
        chain.writable.write(content)
        return self.complete(chain, len(content))

    def complete(self, chain: Chain, written: int = 0) -> bool:
        """See `DeviceQueue`."""
        return self.complete_all([(chain, written)]) == 1

    def complete_all(self, buffers: Iterable[tuple[Chain, int]]) -> int:
        """See `DeviceQueue`."""
        return sum(self._complete(chain, written) for chain, written in buffers)

    def _complete(self, chain: Chain, written: int) -> int:
        device, index = self._device, self._queue.index
        give = functools.partial(self._queue.complete, chain, written)
        if device.stalled(index, give):
            return 1
        request = device.request_of(index, chain.head)
        found = device.faults.strike(_SPOKEN, str(request), op=request.op, **request.where)
        if not found:
            given = give()
            device.let_overtaken_go(index)
            return int(given)
        faults = {each.rule.what.name: each for each in reversed(found)}
        if "drop" in faults:
            return 1
        short, corrupt = faults.get("short"), faults.get("corrupt")
        if short is not None:
            written = max(written - short.value, 0)
        if corrupt is not None and written:
            _flip(chain, written, corrupt)
        give = functools.partial(self._queue.complete, chain, written)
        if (stall := faults.get("stall")) is not None:
            device.stall(index, stall, give)
        elif "reorder" in faults:
            device.hold_back(index, give)
        elif (delay := faults.get("delay")) is not None:
            device.later(index, delay.seconds, give)
        else:
            return int(give())
        return 1


def _check_device(device: object) -> None:
    if not isinstance(device, Device):
        hint = "; MisbehavingPci is for PCI devices" if isinstance(device, PciDevice) else ""
        raise TypeError(f"device must be a guestio Device, not {device!r}{hint}")


def _spoil(
    chain: Chain,
    request: Request,
    written: int,
    *,
    kept: tuple[int, bytes] | None,
    corrupt: Fault | None,
) -> int:
    """Spoil what a request was answered with; the bytes written then."""
    room = chain.writable.total - request.status
    data = min(written, room)
    if kept is not None:
        begin, before = kept
        chain.writable.write(before, begin)
        if data > begin:
            written -= data - begin
            data = begin
    if corrupt is not None and data:
        _flip(chain, data, corrupt)
    return written


def _flip(chain: Chain, size: int, fault: Fault) -> None:
    """Flip a bit in as many bytes of a buffer as the fault says."""
    for at in fault.random.sample(range(size), min(fault.value, size)):
        byte = chain.writable.read(at, 1)[0] ^ 1 << fault.random.randrange(8)
        chain.writable.write(bytes([byte]), at)


def _then(answer: int | Future[int], change: Callable[[int], int]) -> int | Future[int]:
    """An answer that is changed before it is given."""
    if not isinstance(answer, Future):
        return change(answer)
    late: Future[int] = Future()
    _cancel_with(late, answer)

    def done(finished: Future[int]) -> None:
        try:
            _set(late, change(finished.result(0)))
        except BaseException as error:
            _raise(late, error)

    answer.add_done_callback(done)
    return late


def _follow(late: Future[int], serve: Callable[[], int | Future[int]]) -> None:
    """Complete a future as something is answered."""
    if late.cancelled():
        return
    try:
        answer = serve()
    except GuestioError as error:
        _raise(late, error)
        return
    if isinstance(answer, Future):
        _cancel_with(late, answer)
        answer.add_done_callback(lambda done: _copy(done, late))
    else:
        _set(late, answer)


def _cancel_with(late: Future[int], answer: Future[int]) -> None:
    """Have an answer cancelled when the one that waits for it is."""
    late.add_done_callback(lambda done: answer.cancel() if done.cancelled() else None)


def _copy(done: Future[int], late: Future[int]) -> None:
    if done.cancelled():
        late.cancel()
    elif (error := done.exception(0)) is not None:
        _raise(late, error)
    else:
        _set(late, done.result(0))


def _set(late: Future[int], written: int) -> None:
    # The host may have given it up.
    with contextlib.suppress(InvalidStateError):
        late.set_result(written)


def _raise(late: Future[int], error: BaseException) -> None:
    with contextlib.suppress(InvalidStateError):
        late.set_exception(error)
