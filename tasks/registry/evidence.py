"""Gathers from MLflow what the gate has to know beside the scorecard."""

import tempfile
from pathlib import Path

from mlflow.entities import Run

from rlhf_core.errors import ModelError
from rlhf_core.evaluation.card.report_card import ReportCard
from rlhf_core.evaluation.scorecard import Scorecard
from rlhf_core.onpolicy.monitor.rules import ACTION
from rlhf_core.promotion.facts import Facts, Files
from rlhf_core.settings.promotion import PromotionConfig
from tasks.record import tags
from tasks.record.record import Record
from tasks.registry.looks import look
from tasks.registry.refs import ModelRef, PipelineRun


def gather(
    record: Record,
    config: PromotionConfig,
    scorecard: Scorecard,
    candidate: ModelRef,
    champion: ModelRef | None,
    run: PipelineRun,
    report_card: ReportCard | None,
) -> Facts:
    """What the rules need. It takes the look of this comparison, if that was not taken before."""
    return Facts(
        look=look(record, config.alpha, scorecard, candidate, champion),
        files=_files(record, candidate, run),
        report_card=report_card,
        alarms=_alarms(record, candidate, run),
    )


def _files(record: Record, candidate: ModelRef, run: PipelineRun) -> Files:
    """The files in the store, fetched and compared with the registry, and those evaluated."""
    evaluations = [
        found
        for found in record.runs.stages(run.experiment_id, run.run_id, "evaluation")
        if found.data.tags.get(tags.input_of("policy")) == candidate.uri
    ]
    done = evaluations[-1] if evaluations else None
    return Files(
        candidate=candidate.uri,
        digest=record.store.tags(candidate).get(tags.DIGEST, ""),
        problem=_problem(record, candidate),
        evaluated=done and done.data.tags.get(tags.input_digest_of("policy")),
        evaluation=done.info.run_id if done else "",
    )


def _problem(record: Record, candidate: ModelRef) -> str:
    folder = record.settings.home / "work"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gate-", dir=folder) as scratch:
        try:
            record.store.fetch(candidate, Path(scratch) / "policy")
        except ModelError as error:
            return str(error)
    return ""


def _alarms(record: Record, candidate: ModelRef, run: PipelineRun) -> dict[str, str] | None:
    """The alarms of the monitor in the training of the candidate, by measure; None without one."""
    made = record.store.tags(candidate)
    stages = record.runs.stages(run.experiment_id, run.run_id)
    ids = {stage.data.tags.get(tags.CACHED_FROM, stage.info.run_id) for stage in stages}
    ids |= {made[tags.RUN]} if tags.RUN in made else set()
    runs = [found for found in map(record.runs.find, sorted(ids)) if found is not None]
    if not any(map(_watched, runs)):
        return None
    last = int(made[tags.ITERATION]) if tags.ITERATION in made else None
    return {
        name.partition(".")[2]: line
        for found in runs
        if last is None or _acted(record, found.info.run_id, last)
        for name, line in tags.alarms(found.data.tags).items()
    }


def _watched(run: Run) -> bool:
    """Whether a stage had a monitor."""
    prompts = [v for name, v in run.data.params.items() if name.endswith(".monitor.prompts")]
    return any(number != "0" for number in prompts)


def _acted(record: Record, run_id: str, last: int) -> bool:
    """Whether an alarm was given up to an iteration, that of a milestone."""
    history = record.client.get_metric_history(run_id, ACTION)
    return any(point.value > 0 and point.step <= last for point in history)
