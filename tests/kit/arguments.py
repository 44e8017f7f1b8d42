"""Nonsense for every argument of a call: it must be refused by name, before anything changes."""

import numpy as np

NONSENSE = (
    None,
    True,
    1.5,
    float("nan"),
    "1",
    b"1",
    -1,
    -(2**70),
    2**64,
    np.float64(1.0),
    np.int64(-1),
    [],
    object(),
    int,
)


def refused(make, good, *, may=(), plain=True):
    """Call with one argument after the other replaced by nonsense.

    Args:
        make: Makes what is called, with good arguments once and then anew each time.
        good: Arguments that are accepted.
        may: ``(name, value)`` that are accepted although they look like nonsense.
        plain: Whether to see first that the good ones are accepted.
    """
    if plain:
        make()(**good)
    accepted = {(name, repr(value)) for name, value in may}
    for name in good:
        for bad in NONSENSE:
            if (name, repr(bad)) in accepted:
                continue
            call = make()
            try:
                call(**{**good, name: bad})
            except (TypeError, ValueError) as error:
                assert name in str(error), (name, bad)  # noqa: PT017
            else:
                raise AssertionError(f"{name}={bad!r} was accepted")


def flags(*names):
    """Where 0, 1 and a bool are the same."""
    return [(name, True) for name in names]


def numbers(*names):
    """Numbers that need not be whole."""
    return [(name, value) for name in names for value in (1.5, np.float64(1.0))]
