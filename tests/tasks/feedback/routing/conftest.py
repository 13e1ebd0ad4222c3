"""Judges and servers of tests are modules beside them."""

import sys
from pathlib import Path

import pytest

JUDGES = Path(__file__).parents[2] / "judges"


@pytest.fixture(autouse=True)
def from_here(monkeypatch):
    """A function judge may come from the folder of the program."""
    monkeypatch.chdir(Path(__file__).parent)


sys.path.append(str(JUDGES))
