"""Tests below `in_guest` run in the lab guest only; the host boots it and has them run there."""

import os

collect_ignore = [] if "GUESTIO_LAB_GUEST" in os.environ else ["in_guest"]
