"""Admin commands (NVMe 1.4, section 5)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from guestio._core.nvme.queues import NvmeQueues
from guestio.budgets import NVME_EVENTS, NVME_QUEUE_ENTRIES, NVME_TRANSFER_BYTES
from guestio.memory import GuestMemory
from guestio.pci.nvme import identify
from guestio.pci.nvme.data import Data
from guestio.pci.nvme.features import Features
from guestio.pci.nvme.identify import Identity
from guestio.pci.nvme.io import IoCommands
from guestio.pci.nvme.logs import Logs
from guestio.pci.nvme.namespace import Namespace
from guestio.pci.nvme.spec import (
    ALL_NAMESPACES,
    COMPLETION_BITS,
    ENTRY_BITS,
    NAMESPACE_CHANGED,
    PAGE,
    TEMPERATURE_EVENT,
    Admin,
    Command,
    Event,
    Failed,
    Feature,
    Log,
    Status,
)

_RETAIN_EVENT: Final = 1 << 15
_SAVE: Final = 1 << 31
_NAMESPACE_NOTICES: Final = 1 << 8
_TEMPERATURE_EVENTS: Final = 1 << 1


class AdminCommands:
    """Does admin commands for a controller.

    Args:
        memory: The driver's.
        queues: Those of the controller.
        namespaces: In the order of their numbers.
        identity: What the controller is called.
        io: Does I/O commands.
        logs: The log pages.
        num_queues: I/O queues of each kind.
        vectors: Interrupt vectors.
        ended: Called with a command, its status, dword 0 of its completion and the byte of it that
            is wrong.
        post_event: Completes an asynchronous event request with dword 0; False if there is no room
            now.

    Attributes:
        features: The features that the driver has set.
    """

    def __init__(
        self,
        memory: GuestMemory,
        queues: NvmeQueues,
        namespaces: Sequence[Namespace],
        identity: Identity,
        io: IoCommands,
        logs: Logs,
        *,
        num_queues: int,
        vectors: int,
        ended: Callable[[Command, int, int], object],
        post_event: Callable[[Command, int, int], bool],
    ) -> None:
        self.features = Features(num_queues, vectors)
        self._memory, self._queues, self._namespaces = memory, queues, namespaces
        self._identity, self._io, self._logs = identity, io, logs
        self._num_queues, self._vectors = num_queues, vectors
        self._ended, self._post_event = ended, post_event
        self._sizes = (0, 0)
        self._requests: deque[Command] = deque()
        self._events: deque[Event] = deque()
        self._reported: set[int] = set()
        self._deleting: dict[int, Command] = {}
        self._handlers: dict[int, Callable[[Command], int | None]] = {
            Admin.DELETE_SQ: self._delete_sq,
            Admin.CREATE_SQ: self._create_sq,
            Admin.GET_LOG_PAGE: self._get_log_page,
            Admin.DELETE_CQ: self._delete_cq,
            Admin.CREATE_CQ: self._create_cq,
            Admin.IDENTIFY: self._identify,
            Admin.ABORT: self._abort,
            Admin.SET_FEATURES: self._set_features,
            Admin.GET_FEATURES: self._get_features,
            Admin.ASYNC_EVENT: self._async_event,
            Admin.DOORBELL_BUFFER: self._doorbell_buffer,
        }

    def reset(self) -> None:
        """Forget what a driver has set and what it waits for."""
        self.features.reset()
        self._requests.clear()
        self._events.clear()
        self._reported.clear()
        self._deleting.clear()

    def set_sizes(self, entry_bits: int, completion_bits: int) -> None:
        """The sizes of queue entries that the driver has put into CC."""
        self._sizes = entry_bits, completion_bits

    def begin(self, command: Command) -> None:
        """Do a command; ``ended`` is called, now or later.

        Raises:
            Failed: Something is wrong with it; ``ended`` is not called.
        """
        handler = self._handlers.get(command.opcode)
        if handler is None:
            raise Failed(Status.INVALID_OPCODE, 0)
        if command.flags & 0x3F:
            raise Failed(Status.INVALID_FIELD, 1)
        result = handler(command)
        if result is not None:
            self._ended(command, Status.SUCCESS, result)

    def _give(self, command: Command, data: bytes) -> None:
        Data(self._memory, command, len(data), to_driver=True).write(data)

    # Queues.

    def _create_cq(self, command: Command) -> int:
        number, size = self._new_queue(command, self._queues.has_completion_queue)
        how = command.word(11)
        vector = how >> 16
        if how & 2 and vector >= self._vectors:
            raise Failed(Status.INTERRUPT_VECTOR, 46)
        self._queues.create_completion_queue(
            number, command.quad(6), size, vector if how & 2 else -1
        )
        return 0

    def _create_sq(self, command: Command) -> int:
        completions = command.word(11) >> 16
        if not completions or not self._queues.has_completion_queue(completions):
            raise Failed(Status.CQ_INVALID, 46)
        number, size = self._new_queue(command, self._queues.has_submission_queue)
        self._queues.create_submission_queue(number, command.quad(6), size, completions)
        return 0

    def _new_queue(self, command: Command, present: Callable[[int], bool]) -> tuple[int, int]:
        """Number and entries of a queue that is to be made."""
        number, entries = command.word(10) & 0xFFFF, (command.word(10) >> 16) + 1
        if not 0 < number <= self._num_queues or present(number):
            raise Failed(Status.QUEUE_ID, 40)
        if not 2 <= entries <= NVME_QUEUE_ENTRIES or self._sizes != (ENTRY_BITS, COMPLETION_BITS):
            raise Failed(Status.QUEUE_SIZE, 42)
        if not command.word(11) & 1:
            raise Failed(Status.INVALID_FIELD, 44)  # not contiguous: CAP.CQR says it must be
        address = command.quad(6)
        if address % PAGE or address + entries * 64 > 1 << 64:
            raise Failed(Status.PRP_OFFSET, 24)
        return number, entries

    def _delete_sq(self, command: Command) -> int | None:
        number = command.word(10) & 0xFFFF
        if not number or not self._queues.has_submission_queue(number) or number in self._deleting:
            raise Failed(Status.QUEUE_ID, 40)
        self._queues.stop_submission_queue(number)
        self._deleting[number] = command
        self._io.give_up(Status.ABORTED_QUEUE_DELETED, lambda each: each.queue == number)
        self.look_at_deleted(number)
        return None

    def look_at_deleted(self, number: int) -> None:
        """A command of a queue has ended: the last one of a queue that is to be deleted lets it."""
        if number in self._deleting and not self._queues.outstanding(number):
            command = self._deleting.pop(number)
            self._queues.delete_submission_queue(number)
            self._ended(command, Status.SUCCESS, 0)

    def _delete_cq(self, command: Command) -> int:
        number = command.word(10) & 0xFFFF
        if not number or not self._queues.has_completion_queue(number):
            raise Failed(Status.QUEUE_ID, 40)
        if self._queues.users(number):
            raise Failed(Status.QUEUE_DELETION, 40)
        self._queues.delete_completion_queue(number)
        return 0

    def _doorbell_buffer(self, command: Command) -> int:
        shadow, events = command.quad(6), command.quad(8)
        for place, address in ((24, shadow), (32, events)):
            if not address or address % PAGE:
                raise Failed(Status.INVALID_FIELD, place)
        self._queues.set_shadow(shadow, events)
        return 0

    def _abort(self, command: Command) -> int:
        queue, cid = command.word(10) & 0xFFFF, command.word(10) >> 16
        for each in list(self._requests):
            if (each.queue, each.cid) == (queue, cid):
                self._requests.remove(each)
                if self._post_event(each, Status.ABORTED, 0):
                    return 0
                self._requests.append(each)
                return 1
        # What a thread has begun ends soon, but not at once: it is not aborted by this command.
        self._io.give_up(Status.ABORTED, lambda each: (each.queue, each.cid) == (queue, cid))
        return 1

    # What the controller says of itself.

    def _identify(self, command: Command) -> int:
        kind, nsid = command.word(10) & 0xFF, command.nsid
        if kind == 1:
            data = identify.controller(self._identity, self._namespaces)
        elif kind == 2:
            if nsid >= 0xFFFFFFFE:
                raise Failed(Status.INVALID_NAMESPACE, 4)
            data = identify.active_list(self._namespaces, nsid)
        elif kind in (0, 3):
            if not 0 < nsid <= len(self._namespaces):
                raise Failed(Status.INVALID_NAMESPACE, 4)
            make = identify.descriptors if kind else identify.namespace
            data = make(self._namespaces[nsid - 1])
        else:
            raise Failed(Status.INVALID_FIELD, 40)
        self._give(command, data)
        return 0

    def _get_log_page(self, command: Command) -> int:
        number = command.word(10) & 0xFF
        length = 4 * (((command.word(11) & 0xFFFF) << 16 | command.word(10) >> 16) + 1)
        offset = command.quad(12)
        if length > NVME_TRANSFER_BYTES:
            raise Failed(Status.INVALID_FIELD, 42)
        data = self._logs.page(number, command.nsid)
        if offset % 4 or offset > len(data):
            raise Failed(Status.INVALID_FIELD, 48)
        self._give(command, data[offset : offset + length].ljust(length, b"\0"))
        if not command.word(10) & _RETAIN_EVENT:
            if number == Log.CHANGED_NAMESPACES:
                self._logs.forget_changed()
            kind = {Log.ERRORS: 0, Log.HEALTH: 1, Log.CHANGED_NAMESPACES: 2}.get(Log(number))
            if kind in self._reported:
                self._reported.discard(kind)
                self._deliver()
        return 0

    def _get_features(self, command: Command) -> int:
        feature, select = command.word(10) & 0xFF, command.word(10) >> 8 & 7
        result = self.features.get(feature, select, command.word(11))
        if feature == Feature.TIMESTAMP and select != 3:
            self._give(command, self.features.clock())
        return result

    def _set_features(self, command: Command) -> int:
        feature = command.word(10) & 0xFF
        if command.word(10) & _SAVE:
            raise Failed(Status.NOT_SAVEABLE, 43)
        if command.nsid not in (0, ALL_NAMESPACES):
            raise Failed(Status.NOT_NAMESPACE_SPECIFIC, 4)
        if feature == Feature.TIMESTAMP:
            self.features.set_clock(Data(self._memory, command, 8, to_driver=False).read())
            return 0
        result = self.features.set(feature, command.word(11))
        if feature == Feature.WRITE_CACHE:
            self._io.write_through = self._queues.write_through = not self.features.write_cache
        elif feature in (Feature.TEMPERATURE, Feature.EVENTS):
            self._logs.temperature_threshold_passed = self.features.too_hot
            if self.features.too_hot and self.features.events & _TEMPERATURE_EVENTS:
                self.report(TEMPERATURE_EVENT)
        return result

    # Asynchronous events.

    def _async_event(self, command: Command) -> None:
        if len(self._requests) >= NVME_EVENTS:
            raise Failed(Status.EVENT_LIMIT)
        self._queues.forget(command.queue)
        self._requests.append(command)
        self._deliver()

    def report(self, event: Event) -> None:
        """Report an event, once the driver has asked for one and has read about the last."""
        if event == NAMESPACE_CHANGED and not self.features.events & _NAMESPACE_NOTICES:
            return
        if event not in self._events:
            self._events.append(event)
        self._deliver()

    def _deliver(self) -> None:
        for event in list(self._events):
            if not self._requests:
                return
            if event.kind not in self._reported:
                # First: the client may be asked for memory, and a reset may come in between.
                request = self._requests.popleft()
                self._events.remove(event)
                self._reported.add(event.kind)
                if not self._post_event(request, Status.SUCCESS, event.result):
                    self._requests.appendleft(request)
                    self._events.appendleft(event)
                    self._reported.discard(event.kind)
                    return

    def try_again(self) -> None:
        """Report what there was no room for."""
        self._deliver()
