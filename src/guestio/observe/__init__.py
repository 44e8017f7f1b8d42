"""Recordings: what a server did, written down to be looked at, compared and repeated.

`Recorder` writes one, `open_recording` reads it, `replay` repeats its requests. Needs the extra
``record``.
"""

try:
    import pyarrow  # noqa: F401 - only whether it is there
except ImportError as _error:
    raise ImportError(
        f"recordings need the extra 'record' (pip install 'guestio[record]'): {_error}"
    ) from _error

from guestio._core.virtio.contents import xxh64
from guestio.observe.player import Difference, ReplayResult, replay
from guestio.observe.recorder import Payload, Recorder
from guestio.observe.recording import Recording, RecordingError, open_recording
from guestio.observe.script import NotReplayableError

__all__ = [
    "Difference",
    "NotReplayableError",
    "Payload",
    "Recorder",
    "Recording",
    "RecordingError",
    "ReplayResult",
    "open_recording",
    "replay",
    "xxh64",
]
