"""vfio-user's messages in bulk, and those of a client that need no Python: a feed of the loop."""
