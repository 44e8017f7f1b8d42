"""A value that changes as a whole, and others who must be ready before it does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

Follower = Callable[[T, "list[Any] | None"], Callable[[], None]]
"""Called with the new value and with a list or None. It returns what takes it back, or raises to
refuse the change. With a list, what could not be taken away is appended there and nothing is
refused because of it: what goes away goes anyway."""


class Followed(Generic[T]):
    """A value and its followers, each of which is told of a new value before it is there.

    The value may be read, and followers may come and go, from any thread and at any time, also
    while a change is under way. Changes are made one at a time; their callers see to that. No lock
    is held while followers are called.

    Attributes:
        value: The value at this moment.
    """

    def __init__(self, value: T) -> None:
        self.value = value
        self._lock = threading.Lock()
        self._followers: list[Follower[T]] = []

    def follow(self, follower: Follower[T]) -> T:
        """Have a follower told of every later value.

        Returns:
            The value at this moment. A change that is under way is not in it: the follower is told
            of that like of any later one.
        """
        with self._lock:
            self._followers.append(follower)
            return self.value

    def unfollow(self, follower: Follower[T]) -> None:
        """Undo one :meth:`follow`. A change that is under way may call the follower still."""
        with self._lock:
            self._followers.remove(follower)

    def replace(self, new: T, failures: list[Any] | None = None) -> None:
        """Tell every follower of a new value, then make it the value.

        Raises:
            BaseException: What a follower raised. Those told before took it back, last first, and
                the value is the old one. What failed on the way back is in the error's notes.
        """
        told: list[Follower[T]] = []
        undo: list[Callable[[], None]] = []
        try:
            while True:
                with self._lock:
                    # One that comes meanwhile got the old value.
                    next_one = next((f for f in self._followers if f not in told), None)
                    if next_one is None:
                        self.value = new
                        return
                told.append(next_one)
                undo.append(next_one(new, failures))
        except BaseException as error:
            for take_back in reversed(undo):
                try:
                    take_back()
                except Exception as failure:
                    error.add_note(f"while undoing: {failure}")
            raise
