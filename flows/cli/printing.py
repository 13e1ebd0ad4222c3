"""Prints results as tables for a terminal. It knows rich and computes nothing."""

import json
import os
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.markdown import Markdown
from rich.table import Column, Table
from rich.text import Text

from rlhf_core.errors import brief, plural, printable
from rlhf_core.redaction import masked
from tasks.servers import sign_in

if TYPE_CHECKING:
    from flows.local.find import Services
    from rlhf_core.data.validation import Validation
    from rlhf_core.estimate.result import Estimate
    from rlhf_core.plan import NetworkPlan, Plan
    from tasks.feedback.store.records import SnapshotInfo
    from tasks.history.comparison import Measure, RunComparison, Value
    from tasks.settings import Settings

ABSENT = "–"
WIDEST = 10_000  # columns, so that piped output is not folded

out = Console()
err = Console(stderr=True)


def line(text: str) -> None:
    """Print a line verbatim, without its secrets: no markup, no colours, no breaks in addresses."""
    _print(masked(text))


def secret_line(text: str) -> None:
    """Print a line with a secret that was asked for, such as a link that lets somebody in."""
    _print(text)


def _print(text: str) -> None:
    out.print(printable(text), markup=False, emoji=False, highlight=False, soft_wrap=True)


def show_start(settings: "Settings") -> None:
    """Print the servers that a run uses, before the imports, which take seconds."""
    prefect = settings.prefect_api_url or "started for this run"
    text = masked(f"MLflow: {settings.mlflow_uri}\nPrefect: {prefect}")
    err.print(text, markup=False, soft_wrap=True)


def show_report(report: str) -> None:
    """Print Markdown; on a terminal its tables are drawn."""
    for block in report.strip().split("\n\n"):
        if block.startswith("|") and out.is_terminal:
            out.print(Markdown(printable(block)))
        else:
            line(block)
        line("")


def show_services(services: "Services", settings: "Settings") -> None:
    """Print the addresses and logs of the running services."""
    logs = settings.home / "logs"
    _table(
        "Running; press Ctrl-C to stop all",
        ("Service", "Address", "Log"),
        [
            ("Prefect", services.prefect, logs / "prefect.log"),
            ("MLflow", services.mlflow, logs / "mlflow.log"),
            ("labels", services.label, logs / "label.log"),
            ("worker", "polls Prefect for runs", logs / "worker.log"),
        ],
    )
    show_links(services, settings)


def show_links(services: "Services", settings: "Settings") -> None:
    """Print links that sign a browser in, one per line."""
    line("Open the pages with these links; each one signs in one browser, once:")
    for name, address in (("Prefect", services.prefect), ("MLflow", services.mlflow)):
        _print(f"  {name:8}{sign_in.link(address, settings.account)}")  # a secret, and asked for
    line("`rlhf sign-in` prints new ones.")
    if services.label:
        line(
            f"People label at {services.label}: `rlhf feedback invite PROJECT` prints a link for "
            "one person, with `--role admin` one to the pages of whoever runs the project."
        )


def warn_on_terminal(text: str) -> None:
    """Print a message at once, also while progress bars are shown."""
    err.print(f"rlhf: {brief(masked(text))}", markup=False, highlight=False, soft_wrap=True)


def show_error(server: str, error: str, log: Path) -> None:
    """Print an error that a running server has logged."""
    warn_on_terminal(f"{server} logged an error: {error} (see {log})")


def show_snapshot(found: "SnapshotInfo | None", *, latest: bool) -> None:
    """Print which votes of the preference store a run would read, if any."""
    if found is None:
        return
    when = "as they are now; a run takes a snapshot of them when it begins" if latest else "pinned"
    line(
        f"Votes of the feedback project {found.project}: snapshot {found.digest[:16]} ({when}), "
        f"{votes_of(found)}"
    )


def votes_of(found: "SnapshotInfo") -> str:
    """How many votes a snapshot has, on what and by whom, in words."""
    votes, pairs = plural(found.votes, "vote"), plural(found.pairs, "pair")
    people, known = plural(found.annotators, "annotator"), plural(found.known, "known answer")
    return f"{votes} on {pairs} by {people}, and {known}"


def show_validation(validation: "Validation") -> None:
    """Print the validation report: rows kept, rows dropped and why, lengths of the texts."""
    here = f"{Path.cwd()}{os.sep}"  # paths below the working folder are shown without it
    rows = [
        (
            name,
            table.source.replace(here, ""),
            table.rows,
            table.train,
            table.eval,
            sum(table.dropped.values()),
        )
        for name, table in validation.tables.items()
    ]
    _table("Examples", ("Table", "Source", "Rows", "Train", "Eval", "Dropped"), rows)
    dropped = [
        (name, reason, count)
        for name, table in validation.tables.items()
        for reason, count in table.dropped.items()
    ]
    _table("Dropped", ("Table", "Reason", "Examples"), dropped)
    lengths = [
        (item.table, item.text, item.count, item.mean, item.p50, item.p95, item.max)
        for item in validation.lengths
    ]
    _table("Tokens", ("Table", "Text", "Count", "Mean", "Median", "95 %", "Longest"), lengths)
    _table("Truncated by a stage", ("Limit", "Texts"), validation.truncated.items())
    lost = [(limit, tokens) for limit, tokens in validation.lost.items() if tokens]
    _table("Answer tokens cut off", ("Limit", "Tokens"), lost)
    for note in (*validation.bad_rows, *validation.unread):
        line(note)
    line(
        f"{validation.ties} ties, {validation.contradictory_pairs} contradictory pairs, "
        f"{validation.shared_prompts} prompts shared by training and evaluation."
    )
    if validation.same_after_cut:
        line(
            "Preferences whose answers are the same tokens once they are cut, and which are left "
            f"out: {validation.same_after_cut}."
        )
    if validation.written_controls:
        line(
            "Texts in which a control token of the model is written out; it is read as text: "
            f"{validation.written_controls}."
        )
    line(
        f"Votes: {validation.known_sides} record which response was shown first, "
        f"{validation.timed} have a time, {validation.gold} are on pairs with a known answer."
    )
    if validation.known_answers:
        line(
            f"Of the preferences, {validation.known_answers} are known right answers of the "
            "annotator gold, and nobody's votes; with annotators: aware they are taken for such."
        )
    if validation.machine_votes:
        line(f"Of the preferences, {validation.machine_votes} are votes of judges, not people's.")


def show_plan(plan: "Plan") -> None:
    """Print what a run would do: steps, trainable parameters, and what it could detect."""
    rows = [
        (stage.stage, stage.steps, stage.work, "\n".join(map(_learnt, stage.networks)))
        for stage in plan.stages
    ]
    _table("Work", ("Stage", "Steps", "Work", "Trainable parameters"), rows)
    for text in plan.certainty:
        line(text)
    for text in plan.warnings:
        line(f"Warning: {text}")


def show_estimate(estimate: "Estimate") -> None:
    """Print what each stage of a run will take on this machine, and what does not fit."""
    from rlhf_core.estimate.result import duration, gibibytes

    def size(number: int | None) -> str:
        return gibibytes(number) if number else ABSENT

    rows = [
        (
            stage.stage,
            stage.work,
            ABSENT if stage.seconds is None else duration(stage.seconds),
            size(stage.peak),
            size(stage.kept),
            stage.problem or stage.measured,
        )
        for stage in estimate.stages
    ]
    start = ("start and report", "", duration(estimate.start_seconds), ABSENT, ABSENT, "imports")
    _table(
        "What a run takes on this machine",
        ("Stage", "Work", "Time", "Memory", "Stores", "Measured"),
        [*rows, start],
    )
    most = max((stage.peak or 0 for stage in estimate.stages), default=0)
    least = "" if estimate.complete else "at least "
    line(
        f"The whole run: {least}{duration(estimate.seconds)}, {size(most)} of memory at most, "
        f"{size(estimate.kept)} stored. Tried in {duration(estimate.took)}."
    )
    for note in estimate.notes:
        line(f"Note: {note}.")
    for misfit in estimate.misfits:
        line(f"Warning: {misfit}")


def _learnt(network: "NetworkPlan") -> str:
    if not network.lora_rank:
        return f"{network.network}: all {network.parameters:,}"
    lora = f"LoRA of rank {network.lora_rank}; {network.frozen:,} frozen"
    return f"{network.network}: {network.parameters:,} ({lora})"


def show_comparison(comparison: "RunComparison", *, everything: bool) -> None:
    """Print what differs between two runs; with `everything` also what is the same."""
    left, right = (f"{run.name} {run.run_id[:8]}" for run in comparison.runs)
    settings, stages = comparison.params, comparison.differing_stages()
    measures, all_measures = comparison.differing_measures(), comparison.measures()
    same = (
        f"{len(comparison.same_params)} settings, "
        f"{len(comparison.stages) - len(stages)} stages and "
        f"{sum(not measure.differs for measure in all_measures)} metrics are the same"
    )
    if differs := bool(settings or stages or measures):
        line(f"{left} and {right} differ; {same}.")
    else:
        line(f"Nothing differs between {left} and {right}: {same}.")
    if everything:
        settings = (*settings, *comparison.same_params)
        stages, measures = list(comparison.stages), all_measures
    _side_by_side(
        ("Setting", left, right),
        [(f"{row.stage}.{row.name}".lstrip("."), row.first, row.second) for row in settings],
    )
    _side_by_side(
        ("Stage", left, right),
        [
            (row.stage, *((end or ABSENT).lower() for end in (row.first, row.second)))
            for row in stages
        ],
    )
    groups = comparison.groups(measures)
    if clear := [row for rows in groups.values() for row in rows if row.clear]:
        line(f"Clearly different, since the intervals do not overlap: {_names(clear)}.")
    _side_by_side(
        ("Metric", left, right, "Difference"),
        [
            (f"{row.stage} {row.name}", _value(row.first), _value(row.second), _change(row))
            for rows in groups.values()
            for row in rows
        ],
        ends=[len(rows) for rows in groups.values()],
    )
    if differs and not everything:
        line("Use `--all` to list the rest, and the metrics of stages that only one run has.")
    for run in comparison.runs:
        line(f"{run.name} ({run.status.lower()}; {run.code}): {run.url}")
    line(f"side by side: {comparison.url}")


def _names(measures: "Sequence[Measure]", most: int = 5) -> str:
    """The first measures by name, and how many there are beside them."""
    named = ", ".join(f"{row.stage} {row.name}" for row in measures[:most])
    return named if len(measures) <= most else f"{named} and {len(measures) - most} more"


def _side_by_side(
    columns: Sequence[str], rows: Sequence[Sequence[str]], ends: Sequence[int] = ()
) -> None:
    """Print a table without cutting cells; if the terminal is too narrow, two lines per row.

    Args:
        ends: sizes of the groups of rows, which a line separates.
    """
    if not rows:
        return
    table = Table(*(Column(name, no_wrap=True) for name in columns))
    last = set(accumulate(ends))
    for place, row in enumerate(rows, start=1):
        table.add_row(*map(Text, map(printable, row)), end_section=place in last)
    wide = Console(width=WIDEST)
    if not out.is_terminal:
        wide.print(table)
    elif table.__rich_measure__(wide, wide.options).maximum <= out.width:
        out.print(table)
    else:
        line(f"{columns[0]}: {' → '.join(columns[1:3])}")
        for name, first, second, *change in rows:
            line(f"{name}\n    {first} → {second}{''.join(f'  ({c})' for c in change if c)}")


def _value(value: "Value | None") -> str:
    """Format as `0.83 [0.82, 0.84]`, or as `0.8312` without an interval."""
    if value is None:
        return ABSENT
    number, low, high = value
    if low is None or high is None or low == high:
        return _number(number)
    return f"{number:.3g} [{low:.3g}, {high:.3g}]"


def _number(value: float) -> str:
    """Format counts in full and other numbers with four digits."""
    return str(int(value)) if value.is_integer() else f"{value:.4g}"


def _change(measure: "Measure") -> str:
    """Format the difference with its sign; empty if it is unknown or the runs agree."""
    if measure.difference is None or not measure.differs:
        return ""
    return f"{measure.difference:+.3g}" if measure.difference else "0"


def responses_as_text(prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> str:
    """Format each prompt after `>` above its indented responses; a single response as it is."""
    if [len(group) for group in responses] == [1]:
        return responses[0][0]
    blocks = []
    for prompt, group in zip(prompts, responses, strict=True):
        marks = [f"[{n}] " for n in range(1, len(group) + 1)] if len(group) > 1 else ["    "]
        answers = [
            mark + text.replace("\n", "\n" + " " * len(mark))
            for mark, text in zip(marks, group, strict=True)
        ]
        blocks.append("\n".join(["> " + prompt.replace("\n", "\n> "), *answers]))
    return "\n\n".join(blocks)


def responses_as_json(prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> str:
    """Format each response as a JSON object, one per line."""
    return "\n".join(
        json.dumps({"prompt": prompt, "sample": n, "response": text}, ensure_ascii=False)
        for prompt, group in zip(prompts, responses, strict=True)
        for n, text in enumerate(group, 1)
    )


def show_table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table without a title; nothing if it has no rows."""
    _table("", columns, rows)


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table with numbers right-aligned and short; print nothing if it has no rows."""
    filled = [tuple(row) for row in rows]
    if not filled:
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        number = any(isinstance(row[index], int | float) for row in filled)
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in filled:
        table.add_row(*(_cell(value) for value in row))
    out.print(table)


def _cell(value: object) -> RenderableType:
    if value is None:
        return "–"
    return Text(f"{value:.4g}" if isinstance(value, float) else brief(str(value)))
