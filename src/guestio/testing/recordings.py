"""A recording as a regression test."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from guestio.testing.server import serving
from guestio.virtio.device import Device

if TYPE_CHECKING:
    from guestio.observe.player import ReplayResult
    from guestio.observe.recording import Recording


def replay(
    recording: Recording | str | os.PathLike[str],
    device: Device | str | os.PathLike[str],
    **options: Any,
) -> ReplayResult:
    """Repeat a recording's requests, and fail unless every answer is the recorded one.

    Args:
        recording: The recording, or the path of its file. It must hold what requests carried:
            ``--payload all``, or ``headers`` if they only read.
        device: A device, which is served meanwhile and stays the caller's to close; or the path of
            the socket of a vhost-user back-end. A disk must hold what the recorded one did when
            recording began.
        options: More arguments for :func:`guestio.observe.replay`; as fast as the device answers
            unless ``speed`` says otherwise.

    Returns:
        What was compared.

    Raises:
        AssertionError: An answer differs; the message shows the first ones.
        GuestioError: As from :func:`guestio.observe.replay`.

    Needs the extra ``record``.
    """
    from guestio.observe import replay as repeat

    if isinstance(device, Device):
        with serving(device) as path:
            result = repeat(recording, path, **options)
    else:
        result = repeat(recording, device, **options)
    if not result.ok:
        raise AssertionError(result.text())
    return result
