"""The IOMMU's side of a vhost-user connection: translations, misses, invalidations.

An :class:`IotlbService` holds the translations of the IOMMU in front of a device, from I/O virtual
to guest physical addresses. The back-end learns one by a MISS (answered by an UPDATE
with the address in this process) and forgets it when :meth:`IotlbService.unmap` says so.

Which thread answers misses is chosen once. ``answer="thread"`` starts one for it.
``answer="caller"`` leaves it to :meth:`IotlbService.service`; as in QEMU, whose main loop does
everything, no miss is then answered while a request waits for its reply.

Source: QEMU docs/interop/vhost-user.rst, "IOMMU support" and VHOST_USER_BACKEND_IOTLB_MSG; how QEMU
behaves: hw/virtio/vhost.c (`vhost_device_iotlb_miss`), vhost-backend.c, vhost-user.c
(`backend_read`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

from guestio.addr import ADDRESS_SPACE, Permissions, check_address, check_int, check_range
from guestio.budgets import FRONTEND_MISSES_PER_TURN
from guestio.errors import GuestioError, ProtocolError
from guestio.iommu import Iotlb
from guestio.vhost_user.channel import Channel, Message, PeerGoneError
from guestio.vhost_user.messages import (
    BackendRequest,
    FrontendRequest,
    IotlbMessage,
    IotlbType,
    encode_ack,
    encode_iotlb,
)
from guestio.vhost_user.request_channel import Pending, RefusedError, RequestChannel

if TYPE_CHECKING:
    from guestio.memory import GuestRegionCollection

_log = logging.getLogger(__name__)

_F = FrontendRequest
_FAILED: Final = 1


class MissAction(Enum):
    """What to do about an IOTLB miss."""

    ANSWER = "answer"
    """Send the translation, or refuse if there is none that fits."""
    REFUSE = "refuse"
    """Answer non-zero without looking."""
    CLAIM = "claim"
    """Answer 0 without having sent a translation: a lie."""
    IGNORE = "ignore"
    """Never answer."""


class MissAnswer(NamedTuple):
    """How a miss is dealt with: what is done, and after how many seconds."""

    action: MissAction = MissAction.ANSWER
    delay: float = 0.0


_ANSWER: Final = MissAnswer()

MissHook: TypeAlias = Callable[[IotlbMessage], MissAnswer]
"""Decides about each miss; called in the thread that serves misses."""


@dataclass(slots=True)
class IotlbCounts:
    """What happened between a front-end and its back-end's IOTLB.

    Attributes:
        misses: Misses received.
        updates: Translations sent.
        invalidations: Invalidations acknowledged.
        access_fails: Forbidden accesses the back-end reported.
        refused: Misses that were answered non-zero.
        ignored: Misses that were not answered, by the hook's wish.
    """

    misses: int = 0
    updates: int = 0
    invalidations: int = 0
    access_fails: int = 0
    refused: int = 0
    ignored: int = 0


class IotlbService:
    """Translations of one back-end's device, and the answers to its misses.

    Made by a :class:`~guestio.vhost_user.frontend.Frontend`, which opens the back-end's channel.
    Everything may be called from any thread.

    Args:
        exchange: Where UPDATE and INVALIDATE go.
        answer: Which thread answers misses, see the module.
        granularity: Largest answer to a miss in bytes, a power of two; an answer does not cross a
            multiple of it. None for as much as is mapped in one piece. QEMU answers a page.
        pipeline: Messages that may be under way to the back-end at a time. QEMU sends the next one
            when the last was acknowledged.

    Attributes:
        answer: As given.
        mappings: What is translated, to guest physical addresses. Change it with :meth:`map` and
            :meth:`unmap`.
        memory: Guest memory shared with the back-end; None before.
        counts: Counters so far.
        config_changes: How often the back-end announced a change of the configuration space.
        miss_hook: Decides about each miss, for tests; None answers all of them.
    """

    def __init__(
        self,
        exchange: RequestChannel,
        *,
        answer: Literal["thread", "caller"],
        granularity: int | None,
        pipeline: int,
    ) -> None:
        if granularity is not None:
            granularity = check_int(granularity, "granularity")
            if granularity < 1 or granularity & (granularity - 1):
                raise ValueError(f"granularity {granularity} is not a power of two")
        pipeline = check_int(pipeline, "pipeline")
        if pipeline < 1:
            raise ValueError(f"pipeline {pipeline} must be at least 1")
        if answer not in {"thread", "caller"}:
            raise ValueError(f"answer {answer!r} is neither 'thread' nor 'caller'")
        self.mappings = Iotlb()
        self.memory: GuestRegionCollection | None = None
        self.counts = IotlbCounts()
        self.config_changes = 0
        self.miss_hook: MissHook | None = None
        self._exchange = exchange
        self.answer = answer
        self._granule = granularity
        self._pipeline = pipeline
        self._mapping = threading.Lock()
        self._serving = threading.Lock()
        self._socket: socket.socket | None = None
        self._channel: Channel | None = None
        self._thread: threading.Thread | None = None
        self._ended = False
        self._stop: int | None = None
        self._stopping = threading.Event()
        self._changing = threading.Condition()

    def open(self, sock: socket.socket) -> None:
        """Serve the misses that come on a socket, which is the service's from here on."""
        self.close()
        self._stopping.clear()
        self._socket = sock
        self._channel = Channel(sock, with_fds=False, send_timeout=self._exchange.timeout)
        self._ended = False
        if self.answer == "thread":
            self._start_serving(self._channel)

    def close(self) -> None:
        """Stop serving: the thread and the socket are gone when this returns.

        It waits until a miss that is being answered is, or until its connection is broken.
        """
        self._stopping.set()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread is not None and self._stop is not None:
            os.eventfd_write(self._stop, 1)
            self._thread.join()
            os.close(self._stop)
            self._thread = self._stop = None
        if self._channel is not None:
            self._channel.close()
            self._channel = self._socket = None

    def map(self, iova: int, gpa: int, length: int, perm: Permissions) -> None:
        """Let the device reach guest memory at an I/O virtual address.

        Nothing is sent: the back-end sends a miss when it needs a translation. What the range
        translated to before must have been unmapped.
        """
        with self._mapping:
            self.mappings.set_mapping(iova, gpa, length, perm)

    def unmap(self, *ranges: tuple[int, int]) -> None:
        """Take translations of ``(iova, length)`` ranges away, from the back-end too.

        When this returns, the back-end has acknowledged that it does not use them any more.

        Raises:
            TypeError, ValueError: Bad numbers; nothing changed.
            RefusedError: The back-end refused to forget some; :attr:`mappings` has none of them.
        """
        checked = [check_range(*each, name="iova", empty=False) for each in ranges]
        with self._mapping:
            for iova, length in checked:
                self.mappings.invalidate_mapping(iova, length)
        self.invalidate(*checked)

    def invalidate(self, *ranges: tuple[int, int]) -> None:
        """Have the back-end forget translations; :attr:`mappings` stays: it may request them again.

        Raises:
            TypeError, ValueError: Bad numbers; nothing was sent.
            RefusedError: The back-end refused some; the others it has forgotten.
        """
        checked = [check_range(*each, name="iova", empty=False) for each in ranges]
        refused = []
        for at in range(0, len(checked), self._pipeline):
            chunk = checked[at : at + self._pipeline]
            # The whole space is 2**64 bytes, which the wire, as QEMU fills it, carries as 0.
            expected = self._post(
                [IotlbMessage.invalidate(iova, length % ADDRESS_SPACE) for iova, length in chunk]
            )
            statuses = [self._exchange.wait_ack(each) for each in expected]
            self.counts.invalidations += statuses.count(0)
            refused += [
                f"{iova:#x}+{length:#x} with {status:#x}"
                for (iova, length), status in zip(chunk, statuses, strict=True)
                if status
            ]
        if refused:
            raise RefusedError(f"the back-end refused to forget {', '.join(refused[:16])}")

    def push(self, iova: int) -> bool:
        """Send a translation before a miss, as QEMU does for used rings.

        Returns:
            Whether there is one for ``iova``.
        """
        with self._mapping:
            update = self._update_for(check_address(iova, "iova"), 0)
            sent = [] if update is None else [update]
            self.counts.updates += len(sent)
            expected = self._post(sent)
        for each in expected:
            if self._exchange.wait_ack(each):
                raise RefusedError(f"the back-end refused a translation of {iova:#x}")
        return update is not None

    def _post(self, messages: Sequence[IotlbMessage]) -> list[Pending]:
        if not messages:
            return []
        # IOTLB_MSG has a reply of its own, whatever was negotiated; QEMU requests it all the same.
        data = b"".join(encode_iotlb(_F.IOTLB_MSG, each, need_reply=True) for each in messages)
        return self._exchange.send(_F.IOTLB_MSG, data, (), len(messages))

    def fileno(self) -> int:
        """The back-end's channel, readable when :meth:`service` has something to do.

        Raises:
            ValueError: There is none.
        """
        if self._channel is None:
            raise ValueError("the back-end has no channel for requests (BACKEND_REQ)")
        return self._channel.fileno()

    def service(self) -> int:
        """Answer the misses that have come, without waiting for more.

        Returns:
            How many requests there were. From `FRONTEND_MISSES_PER_TURN` on there may be more;
            then :meth:`fileno` is readable.
        """
        with self._serving:
            if self._channel is None:
                return 0
            return self._serve(self._channel)

    def wait_config_change(self, seen: int, seconds: float) -> bool:
        """Wait until :attr:`config_changes` differs from ``seen``; False if that takes too long.

        With ``answer="caller"``, requests that come meanwhile are answered, as by :meth:`service`.

        Raises:
            ValueError: The back-end has no channel.
            GuestioError: The connection is broken.
        """
        deadline = time.monotonic() + seconds
        if self.answer == "thread" and self._thread is not None:
            with self._changing:
                self._changing.wait_for(lambda: self.config_changes != seen or self._ended, seconds)
            if self.config_changes == seen and self._ended:
                raise self._exchange.failure or PeerGoneError("the back-end's channel is closed")
            return self.config_changes != seen
        poller = select.poll()
        poller.register(self.fileno(), select.POLLIN)
        while self.config_changes == seen:
            left = deadline - time.monotonic()
            if left <= 0 or not poller.poll(left * 1000):
                return False
            self.service()
        return True

    def _serve(self, channel: Channel) -> int:
        count = 0
        while batch := self._take_requests(channel, count >= FRONTEND_MISSES_PER_TURN):
            count += len(batch)
            self._answer_requests(channel, batch)
        return count

    def _take_requests(self, channel: Channel, enough: bool) -> list[Message]:
        """Requests to answer together; once there were enough, only what has been read already."""
        batch: list[Message] = []
        while len(batch) < self._pipeline:
            message = channel.take_read() if enough else channel.recv()
            if message is None:
                break
            if message.header.is_reply:
                raise ProtocolError("a reply came on the back-end's channel")
            batch.append(message)
        return batch

    def _answer_requests(self, channel: Channel, batch: Sequence[Message]) -> None:
        """Answer requests in their order, a miss once its UPDATE is acknowledged."""
        plans = [self._plan(message) for message in batch]
        # Looking up and sending are one step: an UPDATE must not come after the INVALIDATE that
        # follows a change of the table.
        with self._mapping:
            updates = [
                self._update_for(plan.iova, plan.perm) if isinstance(plan, IotlbMessage) else None
                for plan in plans
            ]
            sent = [update for update in updates if update is not None]
            self.counts.updates += len(sent)
            expected = self._post(sent)
        acknowledged = iter([self._exchange.wait_ack(each) for each in expected])
        replies = b""
        for message, plan, update in zip(batch, plans, updates, strict=True):
            status = plan
            if isinstance(plan, IotlbMessage):
                status = _FAILED if update is None else next(acknowledged)
                self.counts.refused += status != 0
            if status is not None and message.header.need_reply:
                replies += encode_ack(message.request, int(status != 0))
        if replies:
            channel.send(replies)

    def _plan(self, message: Message) -> IotlbMessage | int | None:
        """What to do about a request: look a miss up, answer with a status, or stay silent."""
        if message.request == BackendRequest.CONFIG_CHANGE_MSG:
            with self._changing:
                self.config_changes += 1
                self._changing.notify_all()
            return 0
        if message.request != BackendRequest.IOTLB_MSG:
            return _FAILED
        iotlb = IotlbMessage.decode(message.payload)
        if iotlb.type != IotlbType.MISS:
            # QEMU does not act on an ACCESS_FAIL and answers that it failed.
            self.counts.access_fails += iotlb.type == IotlbType.ACCESS_FAIL
            return _FAILED
        self.counts.misses += 1
        action, delay = _ANSWER if self.miss_hook is None else self.miss_hook(iotlb)
        if delay:
            self._stopping.wait(delay)
        if action is MissAction.ANSWER:
            return iotlb
        if action is MissAction.IGNORE:
            self.counts.ignored += 1
            return None
        self.counts.refused += action is MissAction.REFUSE
        return _FAILED if action is MissAction.REFUSE else 0

    def _update_for(self, iova: int, access: int) -> IotlbMessage | None:
        """The UPDATE that answers a miss, or None without a mapping that allows the access."""
        entries = self.mappings._map.overlapping(iova, 1)
        if not entries or self.memory is None:
            return None
        start, size, target, perm = entries[0]
        # A guest may have mapped a range whose target passes the last address.
        size = min(size, ADDRESS_SPACE - target)
        if iova >= start + size:
            return None
        region = self.memory.find_region(target + iova - start)
        granted = int(perm)
        if region is None or access & ~granted:
            return None
        # As much as lies in one mapping, one granule and one region around the address.
        first, end = start, start + size
        if self._granule is not None:
            granule = iova & -self._granule
            first, end = max(first, granule), min(end, granule + self._granule)
        first = max(first, start + region.start - target)
        end = min(end, start + region.start + region.size - target)
        user = region.host_address(target + first - start - region.start)
        return IotlbMessage.update(first, end - first, user, granted)

    def _start_serving(self, channel: Channel) -> None:
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(
            target=self._serve_until_stopped,
            args=(channel, self._stop),
            name="guestio-iotlb",
            daemon=True,
        )
        self._thread.start()

    def _serve_until_stopped(self, channel: Channel, stop: int) -> None:
        poller = select.poll()
        poller.register(channel.fileno(), select.POLLIN)
        poller.register(stop, select.POLLIN)
        try:
            while stop not in {fd for fd, _ in poller.poll()}:
                with self._serving:
                    self._serve(channel)
        except PeerGoneError:
            return
        except GuestioError as error:
            self._exchange.fail(error)
        except Exception as error:
            # The failure would go unnoticed otherwise, and the back-end would wait for its answers.
            _log.exception("the thread that answers a back-end's IOTLB misses failed")
            reason = f"IOTLB misses are not answered any more: {type(error).__name__}: {error}"
            self._exchange.fail(GuestioError(reason))
        finally:
            with self._changing:
                self._ended = True
                self._changing.notify_all()
