"""Stores the report of a run: a page for people, and the model card of the policy.

What is written here is about results that are there already: it may be incomplete, and it never
fails the run.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Run

from rlhf_core.evaluation.card.report_card import ReportCard
from rlhf_core.evaluation.scorecard import Scorecard
from rlhf_core.promotion.decision import Decision
from tasks.lineage.lineage import saw
from tasks.pages.facts import PAGE, Facts, gather
from tasks.pages.model_card import description, model_card
from tasks.pages.run_page import run_page
from tasks.pages.sentences import verdict
from tasks.prefect import ui
from tasks.prefect.ui import PrefectRun, artifact_key
from tasks.record.record import Record
from tasks.registry.refs import ModelRef, PipelineRun
from tasks.settings import Settings

log = logging.getLogger(__name__)


def publish_report(
    record: Record,
    run: PipelineRun,
    defaults: Mapping[str, Any] | None,
    scorecard: Scorecard,
    decision: Decision,
    card: ReportCard,
    models: Mapping[str, ModelRef],
) -> None:
    """Log the page with the run, link it in Prefect, and describe the policy in the registry."""

    def collect() -> tuple[Facts, Run]:
        found = record.client.get_run(run.run_id)
        known = {"scorecard": scorecard, "decision": decision, "card": card, "models": models}
        return gather(record, found, defaults, **known), found  # type: ignore[arg-type]

    collected = _attempt("the page of the run", collect)
    if collected is None:
        return
    facts, found = collected

    def page() -> None:
        record.client.log_text(run.run_id, run_page(facts, found), PAGE)
        if PrefectRun.current():
            key, title = artifact_key(run.project, "page"), f"{run.project}: report"
            ui.show_link(key, facts.page_url, title)

    policy = models["policy"]
    _attempt("the page of the run", page)
    seen = _attempt(f"the lineage of {policy.uri}", lambda: saw(record, policy))
    _attempt(
        f"the model card of {policy.uri}",
        lambda: record.store.describe(
            policy, model_card(facts, policy, seen), description(facts, policy)
        ),
    )


def write_run_page(
    name: str, output: Path, *, defaults: Mapping[str, Any] | None, settings: Settings
) -> str:
    """Write the page of any pipeline run, given by its id, a prefix of it, or its name, to a file.

    Returns: what came of the run, in a sentence.

    Raises:
        UserError: no run, or more than one, matches.
    """
    record = Record.open(settings)
    run = record.runs.pipeline(name)
    facts = gather(record, run, defaults)
    write_page(output, run_page(facts, run))
    return verdict(facts).sentence


def write_page(output: Path, html: str) -> None:
    """Write a page to a file, whose folder is made if needed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(html, encoding="utf-8")


def _attempt(what: str, do: Callable[[], Any]) -> Any:
    """What `do` returns; None, with a warning, if it fails."""
    try:
        return do()
    except Exception:
        log.warning(
            "%s could not be written; everything else of the run is there", what, exc_info=True
        )
        return None
