"""``python -m guestio`` is the ``guestio`` command."""

from guestio.cli import main

main()
