"""A device that misbehaves on command: the rules, and what makes them come true."""
