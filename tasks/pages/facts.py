"""What a page says about a run of a pipeline, gathered from MLflow.

Nothing of it has to be there: a run may have failed, be of an earlier release, or have lost files.
What could not be read is named in `missing`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlflow.entities import Run

from rlhf_core.evaluation.card.report_card import ReportCard
from rlhf_core.evaluation.scorecard import Scorecard
from rlhf_core.evaluation.tournament.result import TournamentResult
from rlhf_core.promotion.decision import Decision
from rlhf_core.stages.table import algorithms
from tasks.pages.reading import Reader, Row
from tasks.pages.texts import LONGEST_SETTING, shown
from tasks.record import tags
from tasks.record.describe import flatten, run_url
from tasks.record.record import Record
from tasks.registry.refs import ModelRef

PAGE = "report.html"
EVALUATION, CARD, PROMOTION = "evaluation", "report_card", "promotion"
TOURNAMENT = "tournament"


@dataclass(frozen=True)
class Setting:
    """A setting with a value of its own."""

    name: str
    value: str
    default: str


@dataclass(frozen=True)
class StageFacts:
    """A stage of a run. One that was reused is described by the run that computed it."""

    name: str
    status: str
    seconds: float | None
    reused: bool
    error: str
    machine: str
    url: str
    computed: Run
    metrics: Mapping[str, float]
    alarms: tuple[str, ...]

    def summary(self, name: str) -> float | None:
        """A final number of the stage."""
        return self.metrics.get(f"{tags.SUMMARY}{name}")


@dataclass(frozen=True)
class Facts:
    """A run of a pipeline."""

    project: str
    name: str
    run_id: str
    status: str
    error: str
    started: int | None  # milliseconds
    seconds: float | None
    seed: str
    code: str
    commit: str
    machine: str
    url: str
    page_url: str  # of the report in MLflow
    prefect_url: str
    mlflow_url: str
    params: Mapping[str, str]
    changed: tuple[Setting, ...] | None  # None: the defaults are not known
    stages: tuple[StageFacts, ...]
    models: Mapping[str, ModelRef]
    compared_with: ModelRef | None
    promoted: bool  # by the rules, or by a person later
    approved_by: str
    waits: bool  # for a person
    scorecard: Scorecard | None
    card: ReportCard | None
    tournament: TournamentResult | None
    decision: Decision | None
    samples: tuple[Row, ...]
    reader: Reader

    @property
    def missing(self) -> list[str]:
        """What could not be read, each once."""
        return list(dict.fromkeys(self.reader.missing))

    @property
    def algorithm(self) -> str:
        """How the policy was trained; empty if that is not known."""
        return self.params.get("algorithm", "")

    def stage(self, name: str) -> StageFacts | None:
        """A stage of the run."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def number(self, name: str) -> float | None:
        """A final number of the preparation."""
        prepared = self.stage("prepare")
        return None if prepared is None else prepared.summary(name)

    def version_url(self, ref: ModelRef) -> str:
        """The page of a version in MLflow."""
        return f"{self.mlflow_url}/#/models/{ref.name}/versions/{ref.version}"


def gather(
    record: Record,
    run: Run,
    defaults: Mapping[str, Any] | None,
    *,
    scorecard: Scorecard | None = None,
    decision: Decision | None = None,
    card: ReportCard | None = None,
    models: Mapping[str, ModelRef] | None = None,
) -> Facts:
    """Gather what is known about a pipeline's run.

    Args:
        defaults: the settings of a run that changes none, by section.
        scorecard: and the others: what the caller has already; the rest is read from MLflow.
    """
    reader, info, run_tags = Reader(record), run.info, run.data.tags
    settings = record.settings
    experiment = reader.attempt(
        "the project", lambda: record.client.get_experiment(info.experiment_id).name
    )
    found = reader.attempt("the stages", lambda: _stages(record, run)) or []
    stages = {stage.name: stage for stage in found}
    url = run_url(info.run_id, info.experiment_id, settings)

    def kept(name: str, kind: type[Any], what: str) -> Any:
        return reader.kept(stages[name].computed, kind, what) if name in stages else None

    rows = []
    if EVALUATION in stages:
        rows = reader.table(stages[EVALUATION].computed, "evaluation_samples")
    release, commit = (
        run_tags.get(name, "unknown") for name in (tags.CODE_VERSION, tags.GIT_COMMIT)
    )
    changed = " with changes" if run_tags.get(tags.GIT_DIRTY) == tags.flag(True) else ""
    last = max((s.computed.info.end_time or 0 for s in found if not s.reused), default=0)
    end = info.end_time or last or None
    return Facts(
        project=experiment or "",
        name=info.run_name or info.run_id,
        run_id=info.run_id,
        status=info.status,
        error=run_tags.get(tags.ERROR, ""),
        started=info.start_time,
        seconds=(end - info.start_time) / 1000 if end and info.start_time else None,
        seed=run_tags.get(tags.SEED, "unknown"),
        code=f"release {release}, commit {commit[:12]}{changed}",
        commit=commit,
        machine=run_tags.get(tags.MACHINE, "unknown"),
        url=url,
        page_url=page_url(record, run),
        prefect_url=run_tags.get(tags.FLOW_URL, ""),
        mlflow_url=settings.mlflow_public_url,
        params=dict(run.data.params),
        changed=None if defaults is None else _changed(run.data.params, flatten(defaults)),
        stages=tuple(found),
        models=models or reader.attempt("the models", lambda: _models(run, found)) or {},
        compared_with=reader.attempt(
            "the champion before",
            lambda: tags.version_of(run_tags.get(tags.COMPARED_WITH, tags.NOBODY)),
        ),
        promoted=run_tags.get(tags.PROMOTED) == tags.flag(True),
        approved_by=run_tags.get(tags.APPROVED_BY, ""),
        waits=run_tags.get(tags.APPROVED) == tags.WAITING,
        scorecard=scorecard or kept(EVALUATION, Scorecard, "the numbers of the evaluation"),
        card=card or kept(CARD, ReportCard, "the report card of the reward model"),
        tournament=kept(TOURNAMENT, TournamentResult, "the result of the tournament"),
        decision=decision or kept(PROMOTION, Decision, "the decision about promotion"),
        samples=tuple(rows),
        reader=reader,
    )


def page_url(record: Record, run: Run) -> str:
    """Where MLflow shows the report of a run."""
    base = record.settings.mlflow_public_url
    place = f"{base}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/artifacts"
    return f"{place}/{PAGE}?workflowType=machine_learning"


def _stages(record: Record, run: Run) -> list[StageFacts]:
    """The stages in the order in which they ran; of several with one name, the last."""
    found: dict[str, StageFacts] = {}
    for own in record.runs.stages(run.info.experiment_id, run.info.run_id):
        name = own.data.tags.get(tags.STAGE, own.info.run_name)
        source = own.data.tags.get(tags.CACHED_FROM)
        computed = (record.runs.find(source) if source else None) or own
        start, end = computed.info.start_time, computed.info.end_time
        found[name] = StageFacts(
            name=name,
            status=own.info.status,
            seconds=(end - start) / 1000 if start and end else None,
            reused=source is not None,
            error=own.data.tags.get(tags.ERROR, ""),
            machine=computed.data.tags.get(tags.MACHINE, ""),
            url=run_url(own.info.run_id, own.info.experiment_id, record.settings),
            computed=computed,
            metrics={**computed.data.metrics, **own.data.metrics},
            alarms=tuple(tags.alarms(computed.data.tags).values()),
        )
    return list(found.values())


def _models(run: Run, stages: list[StageFacts]) -> dict[str, ModelRef]:
    """The models of a run, by kind, without milestones; the run itself names them at its end."""
    found: dict[str, ModelRef] = {}
    for stage in stages:
        found |= {k: v for k, v in tags.models(stage.computed.data.tags).items() if "." not in k}
    return found | tags.models(run.data.tags)


def _changed(params: Mapping[str, str], defaults: Mapping[str, str]) -> tuple[Setting, ...]:
    """The settings that differ from the defaults, without those of algorithms that did not run."""
    unused = {*algorithms()} - {params.get("algorithm", "")}
    return tuple(
        Setting(
            name, shown(value, LONGEST_SETTING), shown(defaults.get(name, "–"), LONGEST_SETTING)
        )
        for name, value in params.items()
        if name.partition(".")[0] not in unused and defaults.get(name) != value
    )
