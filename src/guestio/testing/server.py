"""A device that is served for the length of a test."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from guestio.serving import make_server

if TYPE_CHECKING:
    from guestio.pci import PciDevice
    from guestio.virtio import Device

_LIMIT: Final = 30.0


@contextlib.contextmanager
def serving(
    device: Device | PciDevice, path: str | os.PathLike[str] | None = None, **options: Any
) -> Iterator[str]:
    """Serve a device in a thread of this process, as long as the context lasts.

    Args:
        device: What to serve, over vhost-user, or over vfio-user if it is a PCI device; it is the
            caller's to close.
        path: Where to listen; None for a directory of its own, removed afterwards.
        options: As for :func:`guestio.serving.make_server`: ``transport="vfio-user"`` for a virtio
            device as a PCI function; more arguments for :class:`~guestio.vhost_user.Backend` or
            :class:`vfio_user.Server <guestio.vfio_user.Server>`.

    Yields:
        The path of its socket, for a :class:`Driver` or a :class:`PciDriver`.

    Raises:
        BaseException: What ended the server, once the context ends: SystemExit or
            KeyboardInterrupt, if the device raised it. It is the cause of what the context itself
            raised, if that raised something.
        TimeoutError: The server does not end, because a call of the device does not return.
        DeviceError, TypeError, ValueError: As from ``make_server``.
    """
    with contextlib.ExitStack() as stack:
        if path is None:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="guestio-"))
            path = os.path.join(directory, "device.sock")  # noqa: PTH118 - a string, as given
        server = make_server(device, path, **options)
        errors: list[BaseException] = []

        def serve() -> None:
            try:
                server.serve()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=serve, name="guestio-serving", daemon=True)
        try:
            try:
                thread.start()
                yield server.path
            finally:
                server.stop()
                if thread.ident is not None:
                    thread.join(_LIMIT)
                if thread.is_alive():
                    raise TimeoutError(
                        f"{type(device).__name__} is still served {_LIMIT:g} s after the test: one "
                        "of its methods or callbacks does not return"
                    )
                server.close()
        except BaseException as error:
            if errors:
                # A server that is gone is why a driver fails.
                raise error from errors.pop()
            raise
        if errors:
            raise errors.pop()
