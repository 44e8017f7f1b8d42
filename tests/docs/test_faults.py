"""The page about faults lists the rules as the parser knows them."""

from pathlib import Path

from guestio.faults import MISBEHAVIORS, SELECTORS, reference

PAGE = Path(__file__).parents[2] / "docs/faults.md"


def test_the_reference_is_that_of_the_parser() -> None:
    assert PAGE.read_text().rstrip().endswith(reference().rstrip())


def test_the_reference_has_everything() -> None:
    text = reference()
    for name in MISBEHAVIORS:
        assert f"| `{name}" in text, name
    for name in SELECTORS:
        assert f"| `{name}" in text, name
