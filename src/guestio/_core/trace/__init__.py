"""Tracepoints: what happens in the core, written where it happens, and read without stopping it."""
