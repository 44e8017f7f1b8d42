"""``guestio serve``: a device that a user wrote."""

from __future__ import annotations

import ast
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from guestio.cli.server import Server, fail, num_queues_option, server_options, vfio_user_help
from guestio.pci import PciDevice
from guestio.virtio.device import Device

HELP = """Serve a device of your own over vhost-user or vfio-user: CLASS of MODULE.

MODULE is a Python module, found as `python -m` finds it, the current directory first. CLASS is a
subclass of guestio.virtio.Device or guestio.pci.PciDevice, or a function that returns one. Each
--arg is an argument of its call: a VALUE that is a Python literal (1, 0x10, 2.5, True, [1, 2]) is
that, any other is text.

The socket is ready when one line on standard error says so. SIGINT, SIGTERM and SIGHUP end the
service with status 0 and remove the socket, whatever the device does.

For a class Dice in dice.py, a complete QEMU command line (11.1 or later, which has a front-end for
any type of device; virtio-id is the device's device_id, num_vqs its num_queues, config_size the
length of its config()):

\b
  guestio serve dice:Dice --arg sides=6 --socket /tmp/dice.sock &
  qemu-system-x86_64 -machine q35,memory-backend=mem -m 1G \\
    -object memory-backend-memfd,id=mem,size=1G,share=on \\
    -chardev socket,id=c0,path=/tmp/dice.sock \\
    -device vhost-user-test-device-pci,chardev=c0,\\
virtio-id=61,num_vqs=1,vq_size=64,config_size=0 \\
    -kernel vmlinuz -initrd initrd -append "console=ttyS0"

Guest memory must be shared (share=on). Behind a virtual IOMMU add "-device virtio-iommu-pci" before
the device, and iommu_platform=on,ats=on to it.
"""
HELP += vfio_user_help("dice", "serve dice:Dice --arg sides=6")


@click.command(help=HELP)
@click.argument("device", metavar="MODULE:CLASS")
@click.option(
    "--arg",
    "arguments",
    multiple=True,
    metavar="NAME=VALUE",
    help="A keyword argument of CLASS; may be given several times.",
)
@num_queues_option(None, "Queues of the device, instead of as many as it says.", most=128)
@server_options
def serve(device: str, arguments: Sequence[str], num_queues: int | None, server: Server) -> None:
    """Serve a user's device; the help text is ``HELP``."""
    made = _parse(arguments)
    call = _find(device)

    def make() -> Device | PciDevice:
        try:
            result = call(**made)
            if num_queues is not None and isinstance(result, Device):
                result.num_queues = num_queues
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            fail(f"{device} cannot be made: {_said(error)}")
        if num_queues is not None and isinstance(result, PciDevice):
            fail("there is no --num-queues of a PCI device")
        if not isinstance(result, (Device, PciDevice)):
            fail(
                f"{device} made {result!r}, which is no guestio.virtio.Device and no "
                "guestio.pci.PciDevice"
            )
        return result

    server.run(make, device)


def _parse(arguments: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments from ``NAME=VALUE``."""
    made: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals or not name.isidentifier():
            fail(f"--arg {argument}: say NAME=VALUE")
        if name in made:
            fail(f"--arg {argument}: {name} is given twice")
        try:
            made[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            made[name] = text
    return made


def _find(device: str) -> Any:
    """What ``MODULE:CLASS`` names."""
    module, colon, name = device.partition(":")
    if not colon or not name or not all(part.isidentifier() for part in module.split(".")):
        fail(f"{device}: say MODULE:CLASS, as in dice:Dice")
    if (here := os.getcwd()) not in sys.path:  # noqa: PTH109
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        fail(f"the module {module} cannot be imported: {_said(error)}{_place(error, here)}")
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            fail(f"the module {module} has no {name}")
    if not callable(found):
        fail(f"{device} is {type(found).__name__}, neither a class nor a function")
    return found


def _place(error: BaseException, directory: str) -> str:
    """Where an import failed: file and line, of the directory's modules if there is one."""
    frames = [
        each
        for each in traceback.extract_tb(error.__traceback__)[1:]
        if "importlib" not in each.filename
    ]
    own = [each for each in frames if each.filename.startswith(directory)] or frames
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


def _said(error: BaseException) -> str:
    """An error, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
