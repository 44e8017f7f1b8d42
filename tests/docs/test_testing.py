"""The test of a PCI device that a page shows is run as it stands there, on the README's device."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.docs.test_docs import ROOT, python


def test_the_test_of_the_readmes_device(tmp_path: Path) -> None:
    found = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    device = next(block for block in found if "class Adder" in block)
    test = python(ROOT / "docs/testing-a-device.md", "python test_adder.py")
    for source, expected in (
        (device, "2 passed"),
        # It would notice a device that forgets one.
        (device.replace('cast("I")', 'cast("I")[:-1]'), "1 failed, 1 passed"),
    ):
        (tmp_path / "adder.py").write_text(source)
        (tmp_path / "test_adder.py").write_text(test)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_adder.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert expected in done.stdout, done.stdout + done.stderr
