from typing_extensions import disjoint_base

from guestio.addr import MappedRange

@disjoint_base
class Leases:
    """A table of the ranges in use. Every method may be called from any thread."""
    def abandon(self, start: int, length: int) -> list[tuple[int, int]]:
        """Have every wait pass over the leases on a range: what they lead to was taken away.

        Args:
            start: First address.
            length: Bytes, greater than 0.

        Returns:
            The whole ranges of these leases, as ``(first, last)``. Cost: O(leases).
        """
    def __len__(self) -> int: ...

@disjoint_base
class Guard:
    """A translation in use; leaving it (or dropping the object) ends the use."""
    @property
    def ranges(self) -> list[MappedRange]: ...
    def __enter__(self) -> list[MappedRange]: ...
    def __exit__(self, *exc: object) -> None: ...
    def close(self) -> None:
        """End the use. Calling it again does nothing."""
