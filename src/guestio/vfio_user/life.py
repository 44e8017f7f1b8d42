"""A connection to a server from its beginning: what was negotiated, and what its device is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

from guestio.errors import BackingError, ProtocolError
from guestio.peer.foreign import check_memory, close_foreign
from guestio.vfio_user import answers
from guestio.vfio_user.answers import IrqFacts, Limits, RegionFacts
from guestio.vfio_user.exchange import Exchange
from guestio.vfio_user.messages import (
    DEVICE_INFO,
    IRQ_INDICES,
    IRQ_INFO,
    MAX_DATA,
    MAX_FDS,
    REGION_INFO,
    REGIONS,
    VERSION_MAJOR,
    VERSION_MINOR,
    Command,
    Version,
)


@dataclass
class Life:
    """A connection and what its server said at first.

    Attributes:
        exchange: The connection.
        limits: What the server takes.
        can_reset: Whether its device can be reset.
        regions: Its regions.
        irqs: Its kinds of interrupts.
        files: Descriptors of regions that can be mapped, by index.
    """

    exchange: Exchange
    limits: Limits
    can_reset: bool = False
    regions: list[RegionFacts] = field(default_factory=list)
    irqs: list[IrqFacts] = field(default_factory=list)
    files: dict[int, int] = field(default_factory=dict)

    def ask(
        self,
        command: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        answers: Sequence[bytes] = (),
    ) -> None:
        """Send a request whose answer says nothing: it is empty, or one of ``answers``.

        Raises:
            RefusalError: The server refuses.
            ServerGoneError: The connection has ended, or ends because of the answer.
        """
        with self.exchange.request(command, payload, fds) as message:
            if message.payload and message.payload not in answers:
                self.broken(f"{message.header.name} was answered with {len(message.payload)} bytes")

    def broken(self, reason: str) -> NoReturn:
        """End the connection.

        Raises:
            ServerGoneError: In any case.
        """
        self.exchange.fail(reason)
        failure = self.exchange.failure
        assert failure is not None
        raise failure

    @contextmanager
    def judged(self) -> Iterator[None]:
        """End the connection if what is inside finds an answer that cannot be.

        Raises:
            ServerGoneError: It does.
        """
        try:
            yield
        except ProtocolError as error:
            self.broken(str(error))

    @property
    def facts(self) -> tuple[object, ...]:
        """What must be the same after a restart, for a driver to go on."""
        return self.limits.page_size, self.can_reset, self.regions, self.irqs

    def close(self) -> None:
        """End the connection."""
        self.exchange.close()
        close_foreign(self.files.values())
        self.files.clear()


def meet(exchange: Exchange) -> Life:
    """Negotiate, and learn what the device is.

    Raises:
        ServerGoneError: The connection has ended, or the server says what cannot be.
        RefusalError: It refuses to say.
    """
    life = Life(exchange, _negotiate(exchange))
    try:
        with (
            exchange.request(
                Command.DEVICE_GET_INFO, DEVICE_INFO.pack(DEVICE_INFO.size, 0, 0, 0)
            ) as message,
            life.judged(),
        ):
            life.can_reset, regions, kinds = answers.device_info(message.payload)
        for index in range(min(regions, REGIONS)):
            life.regions.append(_ask_region(life, index))
        for kind in range(min(kinds, IRQ_INDICES)):
            asked = IRQ_INFO.pack(IRQ_INFO.size, 0, kind, 0)
            with (
                exchange.request(Command.DEVICE_GET_IRQ_INFO, asked) as message,
                life.judged(),
            ):
                life.irqs.append(answers.irq_info(message.payload, kind))
    except BaseException:
        close_foreign(life.files.values())
        raise
    return life


def _negotiate(exchange: Exchange) -> Limits:
    ours = Version(
        VERSION_MAJOR,
        VERSION_MINOR,
        {
            "max_msg_fds": MAX_FDS,
            "max_data_xfer_size": MAX_DATA,
            "max_dma_maps": 65535,
            "pgsizes": 4096,
            "write_multiple": True,
        },
    )
    with exchange.request(Command.VERSION, ours.encode()) as message:
        try:
            return answers.version(message.payload)
        except ProtocolError as error:
            exchange.fail(str(error))
            failure = exchange.failure
            assert failure is not None
            raise failure from None


def _ask_region(life: Life, index: int) -> RegionFacts:
    argsz = REGION_INFO.size
    while True:
        asked = REGION_INFO.pack(argsz, 0, index, 0, 0, 0)
        with life.exchange.request(Command.DEVICE_GET_REGION_INFO, asked, with_fds=True) as message:
            with life.judged():
                needed = answers.region_argsz(message.payload, index)
                if needed > argsz:
                    if argsz > REGION_INFO.size:
                        raise ProtocolError(f"region {index} needs more room each time")
                    argsz = needed
                    continue
                facts = answers.region_info(message.payload, index)
                if message.fd_count > 1:
                    raise ProtocolError(f"region {index} came with {message.fd_count} descriptors")
                if facts.mappable and message.fd_count:
                    try:
                        check_memory(message.fds[0])
                    except BackingError as error:
                        raise ProtocolError(f"the file of region {index}: {error}") from None
                    life.files[index] = message.take_fd()
            return facts
