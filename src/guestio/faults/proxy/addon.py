"""Python files that watch, and change, what passes through a proxy."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from guestio.errors import GuestioError
from guestio.faults.proxy.queue import Completion, Request
from guestio.ratelog import LOG, one_line
from guestio.vhost_user.messages import MAX_PAYLOAD_SIZE, U64

log = logging.getLogger("guestio.proxy")

HOOKS: Final = ("message", "request", "completion", "fault")
"""Functions that an addon may define."""

Sender: TypeAlias = Literal["front-end", "back-end"]
"""Who sends a message."""


class AddonError(GuestioError):
    """A file that is no addon."""


class ProxyMessage:
    """A message that passes, for an addon.

    Attributes:
        name: Of the request that it is, or answers; those on a back-end's channel begin with
            ``BACKEND_``.
        sender: ``"front-end"`` or ``"back-end"``.
        reply: Whether it answers another one.
        request: The code of the request.
        fds: How many descriptors come with it; they go where it goes.
        payload: Its bytes, without the header; may be replaced.
    """

    def __init__(
        self, name: str, sender: Sender, request: int, payload: bytes, *, reply: bool, fds: int
    ) -> None:
        self.name = name
        self.sender = sender
        self.reply = reply
        self.request = request
        self.fds = fds
        self.payload = payload
        self._dropped = False
        self._answer: bytes | None = None

    def __repr__(self) -> str:
        what = "reply to " if self.reply else ""
        return f"<{what}{self.name} of the {self.sender}, {len(self.payload)} bytes>"

    @property
    def number(self) -> int:
        """The payload as the one number that most messages have.

        Raises:
            ProtocolError: It is not 8 bytes.
        """
        return int(U64.decode(self.payload).value)

    @number.setter
    def number(self, value: int) -> None:
        self.payload = U64(value).encode()

    def drop(self) -> None:
        """Do not pass it on; who waits for an answer to it waits."""
        self._dropped = True

    def answer(self, payload: bytes | int = 0) -> None:
        """Do not pass it on, and send an answer back.

        Args:
            payload: Of the answer; a number for the 8 bytes of an acknowledgement, 0 is success.

        Raises:
            ValueError: It is an answer itself.
        """
        if self.reply:
            raise ValueError(f"{self!r} is an answer itself: change its payload, or drop it")
        self._answer = U64(payload).encode() if isinstance(payload, int) else bytes(payload)

    def checked(self) -> bytes:
        """The payload as it goes on.

        Raises:
            TypeError, ValueError: It is none.
        """
        for payload in (self.payload, self._answer):
            if payload is not None and len(bytes(payload)) > MAX_PAYLOAD_SIZE:
                raise ValueError(
                    f"a payload of {len(payload)} bytes: at most {MAX_PAYLOAD_SIZE} are passed on"
                )
        return bytes(self.payload)


@dataclass(frozen=True)
class ProxyFault:
    """A rule of the protocol that was broken.

    Attributes:
        who: ``"front-end"``, ``"back-end"``, ``"driver"`` or ``"device"``.
        what: What it did, in a sentence.
        queue: The queue whose ring it concerns; None for messages.
    """

    who: str
    what: str
    queue: int | None = None


class Addon:
    """A file's functions.

    Args:
        path: The file.

    Raises:
        AddonError: It cannot be read or run, or defines none of the functions: the message has
            file and line.

    Attributes:
        path: As given.
        errors: What its functions have raised, counted.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.errors = 0
        module = types.ModuleType(Path(path).stem)
        module.__file__ = path
        try:
            code = compile(Path(path).read_bytes(), path, "exec")
            exec(code, module.__dict__)  # noqa: S102 - to run it is what the user asks for
        except OSError as error:
            raise AddonError(f"the addon {path} cannot be read: {error.strerror}") from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise AddonError(f"{self._place(error)}: {_said(error)}") from None
        self._hooks: dict[str, Callable[[Any], object]] = {
            name: getattr(module, name) for name in HOOKS if callable(getattr(module, name, None))
        }
        if not self._hooks:
            raise AddonError(
                f"{path} is no addon: it defines none of message(m), request(r), completion(c), "
                "fault(f)"
            )

    def has(self, *names: str) -> bool:
        """Whether it defines one of these functions."""
        return any(name in self._hooks for name in names)

    def call(self, name: str, argument: object) -> bool:
        """Call a function, if there is one; False if that failed, which is logged."""
        hook = self._hooks.get(name)
        if hook is None:
            return True
        try:
            hook(argument)
        except BaseException as error:
            # It is not the service's error, nor are SystemExit and the like in its thread.
            self.failed(name, error)
            return False
        return True

    def failed(self, name: str, error: BaseException) -> None:
        """Count and log what a function raised."""
        self.errors += 1
        LOG.report(
            log,
            logging.ERROR,
            "the addon's %s failed: %s: %s",
            name,
            self._place(error),
            _said(error),
        )

    def _place(self, error: BaseException) -> str:
        """File and line of an error; those of the addon if it passed there."""
        if isinstance(error, SyntaxError) and error.filename == self.path:
            return f"{self.path}, line {error.lineno}"
        line, frame = None, error.__traceback__
        while frame is not None:
            if frame.tb_frame.f_code.co_filename == self.path:
                line = frame.tb_lineno
            frame = frame.tb_next
        return self.path if line is None else f"{self.path}, line {line}"


class Addons:
    """All addons of a proxy, in their order.

    Args:
        paths: Their files.

    Raises:
        AddonError: One is none.
    """

    def __init__(self, paths: Iterable[str] = ()) -> None:
        self._addons = [Addon(path) for path in paths]
        self.listens = any(each.has("request", "completion") for each in self._addons)
        self.sees_messages = any(each.has("message") for each in self._addons)

    @property
    def errors(self) -> int:
        """What their functions have raised, counted."""
        return sum(each.errors for each in self._addons)

    def message(self, message: ProxyMessage) -> None:
        """Let each see a message; a change that is none is taken back."""
        for each in self._addons:
            before = message.payload
            if not each.call("message", message):
                continue
            try:
                message.checked()
            except (TypeError, ValueError) as error:
                each.failed("message", error)
                message.payload, message._answer = before, None
            if message._dropped or message._answer is not None:
                return

    def request(self, request: Request) -> None:
        """Let each see a request."""
        for each in self._addons:
            each.call("request", request)

    def completion(self, completion: Completion) -> None:
        """Let each see a completion."""
        for each in self._addons:
            each.call("completion", completion)

    def fault(self, fault: ProxyFault) -> None:
        """Let each see what was broken."""
        for each in self._addons:
            each.call("fault", fault)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
