"""The benchmark of the store, small: it measures what it says, and says what there is."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[4] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("feedback_store")
    sys.modules.pop("feedback_store", None)


def test_the_report_counts_what_is_there(benchmark, empty_url):
    report = list(benchmark.measure(empty_url, pairs=60, labelled=10, repeats=6))
    text = "\n".join(report)
    assert "import of 300 votes" in text
    assert "the same again: 0 new" in text
    # 300 imported, 10 labelled before, 6 votes of two people less every fourth, and of one more
    found = next(line for line in report if line.startswith("snapshot of "))
    votes = int(found.split()[2].replace(",", ""))
    assert 300 + 10 < votes <= 300 + 10 + 3 * 6
    for row in ("next pair", "vote", "undo", "progress"):
        assert sum(line.startswith(f"| {row}") for line in report) == 3, row


def test_a_database_with_a_project_is_left_alone(benchmark, store, database_url):
    store.project("mine", make=True)
    with pytest.raises(SystemExit, match="not empty"):
        next(benchmark.measure(database_url, 1, 1, 1))
    assert store.names() == ["mine"]
