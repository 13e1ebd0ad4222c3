"""What the command shows, as tables for a terminal. Knows rich; computes nothing."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from flows.services import Services
    from rlhf_core.plan import Learnt, Plan
    from rlhf_core.validation import Validation
    from tasks.comparison import RunComparison
    from tasks.settings import Settings

out = Console()
err = Console(stderr=True)


def line(text: str) -> None:
    """A line as it is: no markup, no colours, no breaks that would cut an address."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def show_start(settings: "Settings") -> None:
    """What a run uses: said before the seconds in which nothing else is to be seen."""
    prefect = settings.prefect_api_url or "started for this run"
    err.print(f"MLflow: {settings.mlflow_uri}\nPrefect: {prefect}", markup=False, soft_wrap=True)


def show_report(report: str) -> None:
    """Markdown; on a terminal its tables are drawn."""
    for block in report.strip().split("\n\n"):
        if block.startswith("|") and out.is_terminal:
            out.print(Markdown(block))
        else:
            line(block)
        line("")


def show_services(services: "Services", logs: Path) -> None:
    """Where everything is, once it runs."""
    _table(
        "Running; Ctrl-C stops all",
        ("Service", "Address", "Log"),
        [
            ("Prefect", services.prefect, logs / "prefect.log"),
            ("MLflow", services.mlflow, logs / "mlflow.log"),
            ("worker", "polls Prefect for runs", logs / "worker.log"),
        ],
    )


def show_validation(validation: "Validation") -> None:
    """The validation report: what is kept, what is left out and why, how long the texts are."""
    rows = [
        (name, table.source, table.rows, table.train, table.eval, sum(table.dropped.values()))
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
    _table("Cut by a stage", ("Limit", "Texts"), validation.truncated.items())
    for row in validation.bad_rows:
        line(row)
    line(
        f"{validation.ties} ties, {validation.contradictory_pairs} contradictory pairs, "
        f"{validation.shared_prompts} prompts shared by training and evaluation."
    )


def show_plan(plan: "Plan") -> None:
    """What a run would do: steps, parameters, and how much it could find out."""
    rows = [
        (stage.stage, stage.steps, stage.work, "\n".join(map(_learnt, stage.learnt)))
        for stage in plan.stages
    ]
    _table("Work", ("Stage", "Steps", "Work", "Parameters that learn"), rows)
    for text in plan.certainty:
        line(text)
    for text in plan.warnings:
        line(f"Warning: {text}")


def _learnt(network: "Learnt") -> str:
    if not network.lora_rank:
        return f"{network.network}: all {network.parameters:,}"
    beside = f"LoRA of rank {network.lora_rank}, beside {network.frozen:,}"
    return f"{network.network}: {network.parameters:,} ({beside})"


def show_comparison(comparison: "RunComparison") -> None:
    """Two runs side by side."""
    left, right = comparison.runs
    names = [f"{run.name} {run.run_id[:8]}" for run in (left, right)]
    params = [(row.stage, row.name, row.first, row.second) for row in comparison.params]
    _table("Settings that differ", ("Section", "Setting", *names), params)
    metrics = [
        (row.stage, row.name, row.first, row.second, row.difference) for row in comparison.metrics
    ]
    _table("Metrics", ("Stage", "Metric", *names, "Difference"), metrics)
    for run in comparison.runs:
        line(f"{run.name} ({run.status.lower()}): {run.url}")
    line(f"side by side: {comparison.url}")


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table; numbers to the right and short; nothing at all when there is no row."""
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
    return Text(f"{value:.4g}" if isinstance(value, float) else str(value))
