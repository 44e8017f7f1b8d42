"""A device that is served for the length of a test."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from guestio.vhost_user import Backend

if TYPE_CHECKING:
    from guestio.virtio import Device

_LIMIT: Final = 30.0


@contextlib.contextmanager
def serving(
    device: Device, path: str | os.PathLike[str] | None = None, **options: Any
) -> Iterator[str]:
    """Serve a device in a thread of this process, as long as the context lasts.

    Args:
        device: What to serve; it is the caller's to close.
        path: Where to listen; None for a directory of its own, removed afterwards.
        options: More arguments for :class:`~guestio.vhost_user.Backend`.

    Yields:
        The path of its socket, for a :class:`Driver` say.

    Raises:
        BaseException: What ended the back-end, once the context ends: SystemExit or
            KeyboardInterrupt, if the device raised it. It is the cause of what the context itself
            raised, if that raised something.
        TimeoutError: The back-end does not end, because a call of the device does not return.
    """
    with contextlib.ExitStack() as stack:
        if path is None:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="guestio-"))
            path = os.path.join(directory, "device.sock")  # noqa: PTH118 - a string, as given
        backend = Backend(device, path, **options)
        errors: list[BaseException] = []

        def serve() -> None:
            try:
                backend.serve()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=serve, name="guestio-serving", daemon=True)
        try:
            try:
                thread.start()
                yield backend.path
            finally:
                backend.stop()
                if thread.ident is not None:
                    thread.join(_LIMIT)
                if thread.is_alive():
                    raise TimeoutError(
                        f"{type(device).__name__} is still served {_LIMIT:g} s after the test: one "
                        "of its methods or callbacks does not return"
                    )
                backend.close()
        except BaseException as error:
            if errors:
                # A back-end that is gone is why a driver fails.
                raise error from errors.pop()
            raise
        if errors:
            raise errors.pop()
