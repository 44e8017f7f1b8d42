"""What every part of the core stands on: checked numbers, atomics, clocks, system calls."""
