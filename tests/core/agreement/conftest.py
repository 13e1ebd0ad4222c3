"""The published data of the tests on agreement, which are not in this repository."""

import csv
import json
from pathlib import Path

import pytest
from simulated_votes import Habit, simulate

SHARED = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture
def published():
    """Reads a file of published data: rows of a CSV, or of JSON lines."""

    def read(name):
        path = SHARED / name
        if not path.is_file():
            pytest.skip(f"there is no {path}; it has published data that are not kept here")
        with path.open(encoding="utf-8") as file:
            return list(csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, file))

    return read


@pytest.fixture
def simulated():
    """Votes of simulated people; None stands for a careful one."""

    def make(people, **settings):
        return simulate({n: Habit() if h is None else h for n, h in people.items()}, **settings)

    return make
