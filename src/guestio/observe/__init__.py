"""Recordings: what a server did, written down to be looked at, compared and repeated.

`Recorder` writes one, `open_recording` reads it. Needs the extra ``record``.
"""

from guestio._core.virtio.contents import xxh64
from guestio.observe.recorder import Payload, Recorder
from guestio.observe.recording import Recording, RecordingError, open_recording

__all__ = ["Payload", "Recorder", "Recording", "RecordingError", "open_recording", "xxh64"]
