"""The device's side of virtqueues: rings, chains, in-flight notes, block server, event loop."""
