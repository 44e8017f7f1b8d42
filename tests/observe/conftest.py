"""What is imported, and the threads of Arrow, are there before a test looks what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from guestio.control.client import ControlClient
from guestio.observe import Recorder, open_recording
from tests.kit.serving import Mirror, Serving


@pytest.fixture(scope="session", autouse=True)
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory: Path = tmp_path_factory.mktemp("observe")
    with Serving(Mirror(), directory / "socket", control=directory / "control") as serving:
        ControlClient(directory / "control", timeout=60).get("/metrics")
        for number, source in enumerate((serving.backend, directory / "control")):
            Recorder(source, directory / str(number)).close()
            with open_recording(directory / str(number)) as recording:
                recording.requests()
                recording.faults()
