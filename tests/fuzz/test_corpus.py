"""Every input that once reached something new is run again, against whichever core is tested."""

from importlib import import_module
from pathlib import Path

import pytest

from tests.fuzz.__main__ import TARGETS

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", TARGETS)
def test_corpus(name: str) -> None:
    fuzz = import_module(f"tests.fuzz.{name}").fuzz
    inputs = sorted((CORPUS / name).iterdir())
    assert inputs
    assert sum(each.stat().st_size for each in inputs) < 1 << 17, "minimize it"
    for each in inputs:
        try:
            fuzz(each.read_bytes())
        except BaseException as error:
            error.add_note(f"./run fuzz {name} {each.relative_to(Path.cwd())}")
            raise
