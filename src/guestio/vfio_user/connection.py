"""One client from its connection to its disconnection: messages in, a PCI device's host driven."""

from __future__ import annotations

import errno
import logging
import math
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from guestio._core.base.syscalls import drain_eventfd, notify_eventfd
from guestio._core.vfio_user.feed import ClientFeed
from guestio.addr import ADDRESS_SPACE, Permissions
from guestio.budgets import (
    DMA_ANSWER_TIMEOUT,
    DMA_FILES,
    DMA_LOOK,
    DMA_MAPPINGS,
    DMA_NESTED,
    DMA_STOP_LOOK,
    TURN_SECONDS,
)
from guestio.control.explain import explain_iotlb
from guestio.control.schema import Explanation, Peer, Survey
from guestio.control.status import Seen, budget, iotlb_status, peer_status
from guestio.control.survey import survey_memory, survey_of
from guestio.dma.device import kind_name
from guestio.errors import BackingError, ProtocolError
from guestio.pci.host import PciHost
from guestio.pci.interrupts import NOTICES, InterruptKind
from guestio.peer.channel import PeerGoneError
from guestio.peer.connection import MESSAGES_AT_A_TIME, PeerConnection
from guestio.peer.foreign import Eventfd, close_foreign
from guestio.ratelog import LOG
from guestio.trace import What, event
from guestio.vfio_user.channel import Channel, Message
from guestio.vfio_user.memory import DmaSpace, Unmapping
from guestio.vfio_user.messages import (
    CONFIG_REGION,
    MAX_DATA,
    REGION_ACCESS,
    UNMAP_ALL,
    DmaMap,
    DmaUnmap,
    Header,
    HeaderFlag,
    IrqFlag,
    RefusalError,
    command_name,
)
from guestio.vfio_user.remote import ClientMemory
from guestio.vfio_user.session import Region, RegionWrite, Session
from guestio.vfio_user.statistics import Statistics
from guestio.virtio.host import DeviceHost
from guestio.virtio.loop import EventLoop

log = logging.getLogger("guestio.vfio_user")


class EventfdTrigger(Eventfd):
    """An eventfd of a client that an interrupt is signalled to."""

    def notify(self) -> None:
        """See :class:`~guestio.pci.interrupts.Trigger`."""
        notify_eventfd(self.fileno())


@dataclass
class _Revocation:
    """An unmap that goes on: mappings are to be removed, or accesses must end.

    Attributes:
        header: Of the request, which is answered then.
        unmapping: What is removed.
        until: When the accesses are cut off; None until all mappings are removed.
    """

    header: Header
    unmapping: Unmapping
    until: float | None = None


@dataclass
class _Access:
    """Registers whose reading or writing takes so long that others have their turn in between.

    Attributes:
        header: Of the request that is answered then; None if it was answered.
        go_on: Does a part of it, as much as there is time for; whether all is done.
        begin: What the answer begins with.
        found: What was read so far.
        active: Whether it is being gone on with: what the device asks the client for meanwhile has
            messages obeyed.
    """

    header: Header | None
    go_on: Callable[[float], bool]
    begin: bytes = b""
    found: bytearray = field(default_factory=bytearray)
    active: bool = False


@dataclass
class _Question:
    """What the client is asked for.

    Attributes:
        command: The message's command.
        answer: The client's answer, once it has come.
    """

    command: int
    answer: Message | None = None


class Connection(PeerConnection[Header]):
    """A client from its connection to its disconnection; a :class:`SessionHandler`.

    Args:
        channel: The connection; owned from here on.
        host: The device that it is connected to.
        loop: Calls back when there is something to do.
        statistics: Where to count.
        revoke_after: Seconds that an unmap waits for accesses to end.
        ending: Whether the server is to stop: then the client is not waited for.
    """

    peer_name = "client"
    _channel: Channel

    def __init__(
        self,
        channel: Channel,
        host: PciHost,
        loop: EventLoop,
        statistics: Statistics,
        *,
        revoke_after: float,
        ending: Callable[[], bool],
    ) -> None:
        super().__init__(channel, loop, log)
        self._ending = ending
        self._host = host
        self._stats = statistics
        self._revoke_after = revoke_after
        self._dma = DmaSpace(host.origin)
        self._feed = ClientFeed(
            self._fed,
            TURN_SECONDS,
            inbox=channel.inbox,
            table=self._dma.table,
            doorbells=host.doorbells,
            counters=statistics.messages,
        )
        self._half_at = -1
        self._remote = ClientMemory(self, self._accesses_by_messages)
        self._asked = 0
        self._questions: dict[int, _Question] = {}
        self._given_up = False
        self._busy = False
        self._mask_events: dict[tuple[int, int, bool], Eventfd] = {}
        self._session = Session(self)
        self._handled: Header | None = None
        self._revocation: _Revocation | None = None
        self._access: _Access | None = None
        host.connect(self._dma.space, self._remote)
        loop.core.add_feed(self._feed)
        self._start()
        event(What.CONNECTED, origin=host.origin, detail=statistics.connections)

    def _may_read(self) -> bool:
        # Messages are obeyed in their order: what follows an unmap that waits, or an access that
        # takes long, waits, too.
        return self._revocation is None and self._access is None and not self._channel.backlog

    def _receive(self) -> None:
        # What the core does not handle has come, or what it has not handled yet is there.
        self._feed.main = -1
        super()._receive()
        self._feed_core()

    def _feed_core(self) -> None:
        """Have the core handle plain messages from now on, if messages are read at all."""
        if not self.closed and self._session.client is not None and self._may_read():
            self._feed.main = self._channel.fileno()

    def _next(self) -> Message | None:
        if self._session.client is not None and not self._handle_plain():
            return None
        return self._channel.recv()

    def _handle_plain(self) -> bool:
        """Have the core handle what it can; False if nothing is left, or may be read any more."""
        unsent, more, dry = self._feed.run(self._channel.fileno())
        if more:
            self._host.serve_doorbells()
        if dry or (unsent and not self._send(unsent)):
            return False
        return not self.closed and self._may_read()

    def _fed(self) -> None:
        """Do what the core has left to do."""
        unsent = self._feed.take_unsent()
        if self.closed:
            return
        try:
            if unsent:
                self._send(unsent)
        except PeerGoneError:
            self.close()
            return
        except ProtocolError as error:
            self.disconnect(str(error))
            return
        self._host.serve_doorbells()
        if self._channel.unfinished:
            self._receive_soon()

    def _send(self, reply: bytes, fds: Sequence[int] = ()) -> bool:
        sent = super()._send(reply, fds)
        if not sent:
            self._feed.main = -1
        return sent

    def _resume(self) -> None:
        if self._may_read():
            super()._resume()
            self._feed_core()

    def _watch_half_message(self) -> None:
        at = self._channel.inbox.position
        if at != self._half_at:
            self._half_at, self._half_since = at, None
        super()._watch_half_message()

    def _give_up_half(self) -> None:
        # The core may have handled the message that was waited for.
        if self._channel.inbox.position != self._half_at or not self._channel.unfinished:
            self._half_since = None
            if self._channel.unfinished and not self.closed:
                self._watch_half_message()
            return
        super()._give_up_half()

    def _handle(self, message: Message) -> tuple[bytes | None, Sequence[int]]:
        self._handled = message.header
        event(
            What.MESSAGE,
            origin=self._host.origin,
            detail=message.header.request,
            length=message.header.size,
        )
        self._busy = message.header.wants_reply
        try:
            reply = self._session.handle(message)
        finally:
            self._busy = False
        refusal, self._session.last_refusal = self._session.last_refusal, None
        if refusal is not None:
            self._stats.refused += 1
            self._host.log.report("the client was refused: %s", refusal)
        if self._session.client is not None:
            self._remote.most = min(MAX_DATA, self._session.client.max_data)
        fds, self._session.reply_fds = self._session.reply_fds, ()
        afterwards, self._session.afterwards = self._session.afterwards, None
        if afterwards is None:
            return reply, fds
        if reply is not None:
            self._send(reply)
        afterwards()
        return None, ()

    def ask(self, command: int, payload: bytes) -> bytes:
        """Ask the client for something, and obey what it sends before it answers.

        The device may be called meanwhile, and may ask for more; the client answers in any order.

        Raises:
            RefusalError: It refuses or does not answer; or it cannot be asked here and now.
        """
        if not self._loop.is_current:
            raise RefusalError(errno.EDEADLK, "the client is asked in the event loop's thread only")
        if self._busy:
            raise RefusalError(errno.EDEADLK, "the client waits for an answer itself")
        if self.closed or self._given_up:
            raise RefusalError(errno.ENOTCONN, "the client is gone")
        if len(self._questions) >= DMA_NESTED:
            raise RefusalError(errno.EDEADLK, f"{DMA_NESTED} answers of the client are waited for")
        number = self._free_number()
        question = self._questions[number] = _Question(command)
        self._stats.dma_messages += 1
        try:
            self._channel.send(Header(number, command, len(payload)).encode() + payload)
            answer = self._await_answer(question)
        except PeerGoneError:
            # The loop finds out as well, once the device has returned.
            self._receive_soon()
            raise RefusalError(errno.ENOTCONN, "the client is gone") from None
        except ProtocolError as error:
            self._give_up(str(error))
            raise RefusalError(errno.EPROTO, "the client broke the protocol") from None
        finally:
            del self._questions[number]
            if self._channel.unfinished:
                # What was read behind the answer: no descriptor tells of it any more.
                self._receive_soon()
        if answer.header.flags & HeaderFlag.ERROR:
            raise RefusalError(answer.header.error or errno.EIO, "the client refuses")
        return answer.payload

    def _free_number(self) -> int:
        """A number that no question has whose answer may still come."""
        while True:
            self._asked = (self._asked + 1) % 2**16
            if self._asked not in self._questions:
                return self._asked

    def _await_answer(self, question: _Question) -> Message:
        """Obey what the client sends until it has answered a question, for a limited time.

        Raises:
            RefusalError: There is no answer; the client is given up.
            PeerGoneError, ProtocolError: As from `Channel.recv` and `Channel.send`.
        """
        until, late = time.monotonic() + DMA_ANSWER_TIMEOUT, 0
        while question.answer is None:
            if self.closed:
                raise RefusalError(errno.ENOTCONN, "the client is gone")
            if self._ending():
                self._give_up("the server stops")
                raise RefusalError(errno.ECANCELED, "the server stops")
            if self._revocation is not None:
                time.sleep(DMA_LOOK)
                self._look()
                continue
            if self._access is not None and not self._access.active:
                self._go_on()
                continue
            left = max(until - time.monotonic(), 0)
            message = self._channel.recv(min(left, DMA_STOP_LOOK))
            # The answer may have come in time, behind other messages: some are read on for it.
            late += not left
            if late > MESSAGES_AT_A_TIME or (message is None and not left):
                if message is not None:
                    message.close()
                # Its answer may still come, and would be taken for another one's.
                self._give_up(f"{command_name(question.command)} was not answered in time")
                raise RefusalError(errno.ETIMEDOUT, "the client does not answer")
            if message is not None and not self._take_answer(message):
                reply, fds = self._handle(message)
                if reply is not None:
                    self._channel.send(reply, fds)
        return question.answer

    def _take_answer(self, message: Message) -> bool:
        """Keep a message for the question that it answers; False if it answers none."""
        header = message.header
        question = self._questions.get(header.number) if header.is_reply else None
        if question is None or question.command != header.request or question.answer is not None:
            return False
        message.close()
        question.answer = message
        return True

    def _give_up(self, reason: str) -> None:
        """Disconnect the client once the device has returned."""
        self._given_up = True

        def disconnect() -> None:
            if not self.closed:
                self.disconnect(reason)

        self._loop.call_soon_threadsafe(disconnect)

    def _count_protocol_error(self) -> None:
        self._stats.protocol_errors += 1
        event(What.ERROR, origin=self._host.origin)

    def close(self) -> None:
        """Give everything back. Calling it again does nothing."""
        if self.closed:
            return
        self.closed = True
        self._release(
            [self._hang_up, self._forget_mask_events, self._host.disconnect, self._dma.close],
            f"client {self._stats.connections}",
        )
        event(What.DISCONNECTED, origin=self._host.origin, detail=self._stats.connections)
        LOG.report(
            log, logging.INFO, "client %d gone; so far: %s", self._stats.connections, self._stats
        )

    def _hang_up(self) -> None:
        self._feed.main = -1
        self._loop.core.remove_feed(self._feed)
        super()._hang_up()
        self._loop.clear_timer((self, "revocation"))
        self._loop.clear_timer((self, "access"))
        self._revocation = self._access = None

    def region(self, index: int) -> Region:
        """See :class:`SessionHandler`."""
        if index == CONFIG_REGION:
            return Region(self._host.config.size)
        bar = self._host.bars.get(index)
        if bar is None:
            return Region(0)
        if bar.memory is None:
            return Region(bar.size)
        return Region(bar.size, bar.memory.fd, bar.memory.file_offset or 0, bar.areas)

    def ioeventfds(self, index: int, most: int) -> list[tuple[int, int]]:
        """See :class:`SessionHandler`."""
        try:
            return self._host.ioeventfds(index, most)
        except OSError as error:
            raise RefusalError(error.errno or errno.EMFILE, "an ioeventfd cannot be made") from None

    def interrupts(self, index: int) -> tuple[int, int]:
        """See :class:`SessionHandler`."""
        flags = IrqFlag.EVENTFD
        if index not in NOTICES:
            flags |= IrqFlag.MASKABLE
        if index == InterruptKind.INTX:
            flags |= IrqFlag.AUTOMASKED
        count = 0
        if index in list(InterruptKind):
            count = self._host.interrupts.counts.get(InterruptKind(index), 0)
        return count, flags if count else 0

    def dma_map(self, request: DmaMap, fd: int | None) -> None:
        """See :class:`SessionHandler`."""
        perm = Permissions(request.flags)
        if self._dma.map(request.address, request.size, perm, fd, request.offset):
            self._host.connect(self._dma.space, self._remote)
        self._stats.messages.dma_maps += 1

    def _accesses_by_messages(self, under_way: bool) -> None:
        self._feed.unmaps = not under_way

    def dma_unmap(self, request: DmaUnmap) -> bool:
        """See :class:`SessionHandler`."""
        address, size = request.address, request.size
        if request.flags & ~UNMAP_ALL:
            raise RefusalError(errno.EINVAL, f"DMA_UNMAP with flags {request.flags:#x}")
        if request.flags:
            if address or size:
                raise RefusalError(errno.EINVAL, "DMA_UNMAP of everything, with a range")
            size = ADDRESS_SPACE
        unmapping = self._dma.unmap(address, size)
        self._remote.end("its driver unmapped it", address, size)
        self._stats.messages.dma_unmaps += 1
        if unmapping.proceed() and not (unmapping.used and self._dma.in_use(address, size)):
            return True
        assert self._handled is not None
        self._revocation = _Revocation(self._handled, unmapping)
        self._feed.main = -1
        self._loop.remove_reader(self._channel.fileno())
        self._look()
        return False

    def _look(self) -> None:
        """Go on with the unmap that waits, and answer it once no access is under way."""
        waiting, now = self._revocation, time.monotonic()
        if waiting is None:
            return
        unmapping = waiting.unmapping
        if not unmapping.proceed():
            self._loop.set_timer((self, "revocation"), now, self._look)
            return
        if unmapping.used and self._dma.in_use(unmapping.address, unmapping.size):
            if waiting.until is None:
                self._stats.delayed_unmaps += 1
                waiting.until = now + self._revoke_after
            if now < waiting.until:
                self._loop.set_timer((self, "revocation"), now + DMA_LOOK, self._look)
                return
            self._host.revoke(unmapping.address, unmapping.size)
        self._revocation = None
        try:
            if unmapping.used and self._dma.in_use(unmapping.address, unmapping.size):
                self._cut_off(unmapping)
            if not waiting.header.wants_reply or self._send(waiting.header.reply()):
                self._resume()
        except PeerGoneError:
            self.close()
        except (ProtocolError, BackingError) as error:
            self.disconnect(str(error))

    def _cut_off(self, unmapping: Unmapping) -> None:
        self._stats.cut_off += 1
        self._host.log.report(
            "%s still accesses %#x+%#x, which its driver unmapped %g s ago: it reads zeroes there "
            "from now on, and what it writes is lost",
            type(self._host.device).__name__,
            unmapping.address,
            unmapping.size,
            self._revoke_after,
        )
        if self._dma.cut_off(unmapping.address, unmapping.size, unmapping.used):
            self._host.connect(self._dma.space, self._remote)

    def read_region(self, index: int, offset: int, size: int) -> bytes | None:
        """See :class:`SessionHandler`."""
        self._stats.messages.region_reads += 1
        if index == CONFIG_REGION:
            return self._host.read_config(offset, size)
        if not size:
            # There need not be such a BAR.
            return b""
        found = bytearray(self._host.read_part(index, offset, size, self._turn_end()))
        if len(found) == size:
            return bytes(found)
        begin = REGION_ACCESS.pack(offset, index, size)

        def go_on(until: float) -> bool:
            at = len(found)
            found.extend(self._host.read_part(index, offset + at, size - at, until))
            return len(found) == size

        header = self._handled
        assert header is not None
        self._put_off(_Access(header if header.wants_reply else None, go_on, begin, found))
        return None

    def write_regions(self, writes: Sequence[RegionWrite]) -> None:
        """See :class:`SessionHandler`."""
        at = done = 0

        def go_on(until: float) -> bool:
            nonlocal at, done
            while at < len(writes):
                index, offset, data = writes[at]
                if index == CONFIG_REGION:
                    self._stats.resets += self._host.write_config(offset, data)
                elif done < len(data):
                    done += self._host.write_part(index, offset + done, data[done:], until)
                    if done < len(data):
                        return False
                self._stats.messages.region_writes += 1
                at, done = at + 1, 0
                if at < len(writes) and time.monotonic() >= until:
                    return False
            return True

        if not go_on(self._turn_end()):
            self._put_off(_Access(None, go_on))

    def _turn_end(self) -> float:
        """Until when an access that is made now may take.

        While the device waits for the client, all of it is done: the loop waits anyway, and what
        the device does is inside of an access, which would be gone on with later.
        """
        return math.inf if self._questions else time.monotonic() + TURN_SECONDS

    def _put_off(self, access: _Access) -> None:
        """Go on with an access when the loop's others have had their turn."""
        if self.closed:
            return
        self._access = access
        self._feed.main = -1
        self._loop.remove_reader(self._channel.fileno())
        self._loop.set_timer((self, "access"), time.monotonic(), self._go_on)

    def _is_gone(self) -> bool:
        """Whether the client has hung up, while nothing is read from it."""
        poll = select.poll()
        poll.register(self._channel.fileno(), 0)
        return bool(poll.poll(0))

    def _go_on(self) -> None:
        """Go on with the access that takes long, and answer it once it is done."""
        access = self._access
        if access is None or access.active:
            return
        if self._is_gone():
            self.close()
            return
        access.active, self._busy = True, access.header is not None
        try:
            done = access.go_on(time.monotonic() + TURN_SECONDS)
        finally:
            access.active = self._busy = False
        if self.closed:
            return
        if not done:
            self._loop.set_timer((self, "access"), time.monotonic(), self._go_on)
            return
        self._access = None
        try:
            if access.header is None or self._send(
                access.header.reply(access.begin + bytes(access.found))
            ):
                self._resume()
        except PeerGoneError:
            self.close()
        except ProtocolError as error:
            self.disconnect(str(error))

    def set_triggers(self, index: int, start: int, fds: list[int | None]) -> None:
        """See :class:`SessionHandler`."""
        kind = InterruptKind(index)
        made: list[EventfdTrigger | None] = []
        try:
            for number, fd in enumerate(fds):
                what = f"descriptor of interrupt {start + number} of kind {kind_name(index)}"
                made.append(None if fd is None else EventfdTrigger(fd, what))
        except ProtocolError as error:
            # The descriptor that was refused is closed; those behind it are not.
            close_foreign([fd for fd in fds[len(made) + 1 :] if fd is not None])
            for trigger in made:
                if trigger is not None:
                    trigger.close()
            raise RefusalError(errno.EINVAL, str(error)) from None
        for number, trigger in enumerate(made):
            self._host.interrupts.set_trigger(kind, start + number, trigger)

    def set_mask_events(
        self, index: int, start: int, fds: list[int | None], *, unmask: bool
    ) -> None:
        """See :class:`SessionHandler`."""
        made: list[Eventfd | None] = []
        try:
            for number, fd in enumerate(fds):
                name = f"{start + number} of kind {kind_name(index)}"
                what = f"descriptor that masks interrupt {name}"
                made.append(None if fd is None else Eventfd(fd, what))
        except ProtocolError as error:
            close_foreign([fd for fd in fds[len(made) + 1 :] if fd is not None])
            for event in made:
                if event is not None:
                    event.close()
            raise RefusalError(errno.EINVAL, str(error)) from None
        for vector, event in enumerate(made, start):
            key = index, vector, unmask
            self._forget_mask_event(key)
            if event is not None:
                self._mask_events[key] = event
                self._loop.add_reader(event.fileno(), partial(self._mask_event, key))

    def _mask_event(self, key: tuple[int, int, bool]) -> None:
        """The client has signalled one: KVM does so at the end of a level-triggered interrupt."""
        index, vector, unmask = key
        drain_eventfd(self._mask_events[key].fileno())
        if unmask:
            self.unmask_interrupt(index, vector)
        else:
            self.mask_interrupt(index, vector)

    def _forget_mask_event(self, key: tuple[int, int, bool]) -> None:
        event = self._mask_events.pop(key, None)
        if event is not None:
            self._loop.remove_reader(event.fileno())
            event.close()

    def _forget_mask_events(self, index: int | None = None) -> None:
        for key in list(self._mask_events):
            if index in (None, key[0]):
                self._forget_mask_event(key)

    def disable_interrupts(self, index: int) -> None:
        """See :class:`SessionHandler`."""
        self._forget_mask_events(index)
        if index in self._host.interrupts.counts:
            self._host.interrupts.disable(InterruptKind(index))

    def mask_interrupt(self, index: int, vector: int) -> None:
        """See :class:`SessionHandler`."""
        self._host.interrupts.mask(InterruptKind(index), vector)

    def unmask_interrupt(self, index: int, vector: int) -> None:
        """See :class:`SessionHandler`."""
        self._host.interrupts.unmask(InterruptKind(index), vector)

    def trigger_interrupt(self, index: int, vector: int) -> None:
        """See :class:`SessionHandler`."""
        self._host.interrupts.trigger(InterruptKind(index), vector)

    def reset(self) -> None:
        """See :class:`SessionHandler`."""
        self._stats.resets += 1
        self._host.reset()

    def seen(self, host: DeviceHost | None) -> Seen:
        """What is to be seen of the client. From any thread, without waiting.

        Args:
            host: That of the virtio device, if the function is one.
        """
        if self.closed:
            return Seen()
        peer: Peer = {
            "number": self._stats.connections,
            "connected_s": time.monotonic() - self.since,
            "features": [],
            "feature_bits": 0,
            "protocol_features": [],
            "status": [],
        }
        if host is not None:
            peer = peer_status(host, self._stats.connections, self.since)
        dma = self._dma
        return Seen(
            peer=peer,
            iotlb=iotlb_status(dma.iotlb),
            memory=[
                {"address": start, "length_bytes": size, "user_address": None}
                for start, size in dma.files()
            ],
            budgets={
                "dma_mappings": budget(len(dma), DMA_MAPPINGS),
                "dma_files": budget(len(dma.files()), DMA_FILES),
            },
        )

    def explain(self, address: int, length: int) -> Explanation:
        """What a range of the driver's addresses leads to. From any thread, without waiting."""
        return explain_iotlb(
            self._dma.iotlb,
            address,
            length,
            origin=self._host.origin,
            asks=False,
            refused="" if self._host.memory.enabled else self._host.memory.refusal,
        )

    def survey(self, address: int, length: int, parts: int, *, memory: bool) -> Survey:
        """What a range of addresses has, in equal parts. From any thread, without waiting."""
        if memory:
            files = [(start, size, None) for start, size in self._dma.files()]
            return survey_memory(files, address, length, parts)
        return survey_of(self._dma.iotlb._map, address, length, parts, translated=True)
