"""Stores a stage's report with its run: `summary/` metrics, `tables/`, `figures/` and a page."""

import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from rlhf_core.types import Report
from tasks.prefect import ui
from tasks.prefect.ui import PrefectRun, artifact_key
from tasks.record import tags
from tasks.record.logger import MlflowLogger
from tasks.record.record import Record


def store_report(
    record: Record, run_id: str, report: Report, logger: MlflowLogger, *, project: str, stage: str
) -> None:
    """Store a report with a run, and show it in Prefect if this is a Prefect run."""
    summary = report.summary()
    logger.metrics({f"{tags.SUMMARY}{name}": value for name, value in summary.items()}, step=0)
    for name, table in report.tables.items():
        _store_table(record, run_id, table, f"tables/{name}.json")
    images = {name: _png(figure) for name, figure in report.figures.items()}
    for name, png in images.items():
        _store_file(record, run_id, png, f"figures/{name}.png")
    if report.page:
        record.write_page(run_id, report.page, f"{stage}.md")
    if PrefectRun.current():
        _show(project, stage, summary, report.tables, images)
        if report.page:
            ui.show_page(artifact_key(project, stage, "page"), report.page, f"{project} {stage}")


def _store_table(record: Record, run_id: str, table: pd.DataFrame, artifact: str) -> None:
    # The format of `log_table`, which itself warns about the strings of pandas 3. The tag makes
    # MLflow show the table on the page of the run.
    content = table.to_json(orient="split", index=False, date_format="iso")
    _store_file(record, run_id, str(content).encode(), artifact)
    shown = json.loads(record.runs.tags(run_id).get(tags.SHOWN_TABLES, "[]"))
    if (entry := {"path": artifact, "type": "table"}) not in shown:
        record.add_tags(run_id, {tags.SHOWN_TABLES: json.dumps([*shown, entry])})


def _store_file(record: Record, run_id: str, content: bytes, artifact: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(artifact).name)
        path.write_bytes(content)
        record.client.log_artifact(run_id, str(path), str(Path(artifact).parent))


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    return buffer.getvalue()


def _show(
    project: str,
    stage: str,
    summary: Mapping[str, float],
    tables: Mapping[str, pd.DataFrame],
    images: Mapping[str, bytes],
) -> None:
    title = f"{project} {stage}"
    numbers = [round(value, 4) for value in summary.values()]
    rows = pd.DataFrame({"metric": list(summary), "value": numbers})
    for name, table in {"summary": rows, **tables}.items():
        if not table.empty:
            ui.show_table(artifact_key(project, stage, name), table, f"{title}: {name}")
    if images:
        key = artifact_key(project, stage, "figures")
        ui.show_figures(key, images, f"{title}: figures")
