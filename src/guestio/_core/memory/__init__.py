"""Memory of this process that a guest shares: mappings, bitmaps, leases, slices, vectors."""
