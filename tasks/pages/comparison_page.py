"""The page of two runs side by side: what differs first, then how each answers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tasks.history.comparison import Measure, RunComparison, Value, compare
from tasks.pages import charts
from tasks.pages.facts import Facts, gather
from tasks.pages.publish import write_page
from tasks.pages.reading import Row
from tasks.pages.render import render
from tasks.pages.run_page import DOING, TITLES, Sample, samples
from tasks.pages.sentences import verdict
from tasks.pages.texts import shown
from tasks.record import tags
from tasks.record.record import Record
from tasks.settings import Settings

SHOWN = 25  # metrics of a stage that differ


class Group(NamedTuple):
    """The metrics of a stage that differ, what differs most first."""

    title: str
    rows: Sequence[tuple[str, str, str, str, bool]]  # name, first, second, difference, clear
    left_out: int


def comparison_page(comparison: RunComparison, first: Facts, second: Facts) -> str:
    """The whole page as HTML."""
    names = [run.name for run in comparison.runs]
    if names[0] == names[1]:
        names = [f"{run.name} ({run.run_id[:8]})" for run in comparison.runs]
    measures = comparison.differing_measures()
    groups = [_group(stage, rows) for stage, rows in comparison.groups(measures).items()]
    both = list(_samples(first, second, names))
    return render(
        "compare.html",
        comparison=comparison,
        names=names,
        runs=[(verdict(facts), facts) for facts in (first, second)],
        clear=sum(measure.clear for measure in measures),
        groups=groups,
        wins=charts.two_win_rates(
            [(n, f.scorecard) for n, f in zip(names, (first, second), strict=True) if f.scorecard]
        ),
        stages=[
            (TITLES.get(row.stage, row.stage), *(DOING.get(end or "", "not there") for end in ends))
            for row in comparison.stages
            if (ends := (row.first, row.second))
        ],
        samples=both,
        missing=[f"{facts.name}: {line}" for facts in (first, second) for line in facts.missing],
    )


def write_comparison(
    first: str, second: str, output: Path | None, *, settings: Settings
) -> RunComparison:
    """Compare two runs, each given by its id, a prefix of it, or its name; write their page.

    Args:
        output: the file of the page; None = no page.

    Raises:
        UserError: no run, or more than one, matches.
    """
    comparison = compare(first, second, settings=settings)
    if output is not None:
        record = Record.open(settings)
        runs = [record.client.get_run(run.run_id) for run in comparison.runs]
        write_page(output, comparison_page(comparison, *(gather(record, r, None) for r in runs)))
    return comparison


def _group(stage: str, measures: Sequence[Measure]) -> Group:
    title = "The run as a whole" if stage == tags.PIPELINE else TITLES.get(stage, stage)
    rows = [
        (
            measure.name.removeprefix(tags.SUMMARY),
            value(measure.first),
            value(measure.second),
            "" if not measure.difference else f"{measure.difference:+.3g}",
            measure.clear,
        )
        for measure in measures[:SHOWN]
    ]
    return Group(title, rows, max(len(measures) - SHOWN, 0))


def value(measured: Value | None) -> str:
    """A metric with its interval, if it has one."""
    if measured is None:
        return "–"
    number, low, high = measured
    if low is None or high is None or low == high:
        return f"{number:.4g}"
    return f"{number:.3g} [{low:.3g}, {high:.3g}]"


def _samples(first: Facts, second: Facts, names: Sequence[str]) -> Iterator[Sample]:
    """What both policies answer to the prompts that both were asked."""
    ours, theirs = _answers(first), _answers(second)
    rows: list[Row] = []
    for prompt in ours:
        if prompt not in theirs or not all("policy" in arms[prompt] for arms in (ours, theirs)):
            continue
        rows += [{**ours[prompt]["policy"], "arm": "0"}, {**theirs[prompt]["policy"], "arm": "1"}]
    yield from samples(rows, {"0": shown(names[0], 100), "1": shown(names[1], 100)})


def _answers(facts: Facts) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in facts.samples:
        found.setdefault(str(row["prompt"]), {})[str(row["arm"])] = row
    return found
