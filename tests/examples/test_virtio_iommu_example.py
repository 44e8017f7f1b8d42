"""The example shows what it says."""

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "virtio_iommu.py"


def test_output():
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLE],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.rpartition(" ")[2] for line in lines[:3]] == ["OK"] * 3
    assert lines[3] == "sector 3: 'hello from behind an IOMMU'"
    assert lines[4].startswith("Unmap(")
    assert lines[4].endswith("-> OK")
    assert lines[5] == "sector 3: the disk could not reach its memory"
    # One for each buffer that is gone: the header that it reads and the data that it writes.
    assert lines[6:8] == [
        "fault: <FaultRecord MAPPING endpoint 8 at 0x70000000 flags 0x101>",
        "fault: <FaultRecord MAPPING endpoint 8 at 0x70000200 flags 0x102>",
    ]
    assert lines[8] == "endpoint 8 is attached to domain 1"
    assert "0x70000000+0x1000 is not mapped" in lines[10]
