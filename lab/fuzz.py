"""A device that lies by random rules to a User-mode Linux guest: `guestio fuzz --front-end`.

    ./run lab-fuzz                              20 seeds of a disk
    ./run lab-fuzz --device net --cases 100 --seed 1000 --jobs 2

Arguments are those of `guestio fuzz`. `lab/scripts/faults.sh` uses the device for some seconds in
the guest, which is well if it ends, whatever its user was told.
"""

import sys
import tempfile
from pathlib import Path

from guestio.cli import main as guestio
from lab.guest import MIB, Script
from lab.parts import PartsError
from lab.uml import UmlGuest, shim

USE_SECONDS = 6
TYPES = {"blk": (2, "disk", "virtio_blk"), "net": (1, "net", "virtio_net")}
TYPES["console"] = (3, "console", "virtio_console")
SERVE = {
    "blk": "blk {directory}/disk.img --iommu off",
    "net": "net --responder 10.0.2.1/24 --iommu off",
    "console": "console --stdio --iommu off",
}


def command(device: str, initramfs: Path) -> str:
    """What starts a guest with such a device, and prints what it prints.

    Args:
        device: Type of the device.
        initramfs: Where its root file system is to be written.

    Raises:
        PartsError: A part of it is missing.
    """
    number, name, module = TYPES[device]
    known = UmlGuest().booted_kernel()
    late = known.modules([module])
    guest = UmlGuest(
        scripts=[Script.named("faults")],
        environment={
            "DEVICES": name,
            "LATE": " ".join(each.name for each in late),
            "LIMIT": str(USE_SECONDS),
            "ROUTER": "10.0.2.1",
        },
        files={f"/lab/late/{each.name}.ko": each.data for each in late},
    )
    initramfs.write_bytes(guest.initramfs())
    words = (
        *("env", f"LD_PRELOAD={shim()}", str(known.image), f"mem={64 * MIB // MIB}M"),
        *("uml_dir={directory}/", f"initrd={initramfs}", f"virtio_uml.device={{socket}}:{number}"),
        *("con=null", "con0=null,fd:1", "ssl1=null", "quiet", "panic=-1", "loglevel=6"),
    )
    return " ".join(words)


def main() -> None:
    """Make the guest, and have it lied to."""
    words = sys.argv[1:]
    device = words[words.index("--device") + 1] if "--device" in words[:-1] else "blk"
    if device not in TYPES:
        sys.exit(f"--device {device}: User-mode Linux has one of {', '.join(TYPES)}")
    if not {"--cases", "--seconds", "--reproduce", "--help"} & set(words):
        words += ["--cases", "20"]
    with tempfile.TemporaryDirectory(prefix="guestio-lab-fuzz-") as directory:
        try:
            started = command(device, Path(directory) / "initramfs")
        except PartsError as error:
            sys.exit(str(error))
        sys.argv = [
            *("guestio", "fuzz", "--front-end", "--command", started, "--serve", SERVE[device]),
            *("--healthy", "^GUEST-RESULT", "--alive", "^FACT beat=", *words),
        ]
        guestio()


if __name__ == "__main__":
    main()
