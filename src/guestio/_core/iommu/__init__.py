"""Translations: the B+tree, the interval map over it, eviction, misses, the address space."""
