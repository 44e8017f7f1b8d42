"""What is imported for the first control socket is there before a test looks what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from guestio.control.client import ControlClient
from tests.kit.serving import Mirror, Serving


@pytest.fixture(scope="session", autouse=True)
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory: Path = tmp_path_factory.mktemp("control")
    with Serving(Mirror(), directory / "socket", control=directory / "control"):
        client = ControlClient(directory / "control", timeout=60)
        client.explain(0)
        client.get("/metrics")
