"""Every MLflow tag that our runs and versions have, and how to read it.

No other module of `tasks` or `flows` spells out one of these names; a test checks that.
"""

from collections.abc import Mapping
from typing import Final

from tasks.registry.refs import DatasetRef, ModelRef, is_version

# ---- identity of a run ----
STAGE: Final = "stage"  # the stage, as `sft`; for a run with stages: its kind
SEED: Final = "seed"
KEY: Final = "stage_key"  # equal keys lead to equal bits: tasks/record/identity.py
DATA_DIGEST: Final = "data_digest"  # of the prepared data, input or output
SNAPSHOT: Final = "preference_snapshot"  # of votes: what was trained on, or reported on
CODE_VERSION: Final = "code_version"
CODE_DIGEST: Final = "code_digest"  # of the whole core
GIT_COMMIT: Final = "git_commit"
GIT_DIRTY: Final = "git_dirty"
MACHINE: Final = "machine_type"  # processor and device, as people say it
AUTO_PRECISION: Final = "auto_precision"  # the type that `precision: auto` is in all its stages
FLOW_RUN: Final = "prefect.flow_run_id"
TASK_RUN: Final = "prefect.task_run_id"
FLOW_NAME: Final = "prefect.flow_name"
CALLER: Final = "prefect.parent_flow_run_id"  # the flow run that called this one, as `retrain`
FLOW_URL: Final = "prefect.flow_run_url"

# ---- outcome of a run ----
ERROR: Final = "error"
RESUMED: Final = "resumed"  # how often it was resumed
WAITS_FOR: Final = "waits_for_people"  # a sentence, as long as it does
BY_COMMAND: Final = "continued_by_command"  # true: no worker continues it
CACHED_FROM: Final = "cached_from"  # the run that it was reused from

# ---- promotion: on the runs of pipeline and stage ----
COMPARED_WITH: Final = "compared_with"  # the champion in the evaluation
PROMOTED: Final = "promoted"
REASONS: Final = "reasons"  # one per line
CANDIDATE: Final = "candidate"  # the version that waits for a person
APPROVED: Final = "approved"  # true, false or WAITING; these four also on the version
APPROVED_BY: Final = "approved_by"
APPROVED_AT: Final = "approved_at"
APPROVAL_REASON: Final = "approval_reason"

# ---- a loop: on the run of the pipeline ----
ROUND: Final = "loop_round"  # since a person asked
NEXT: Final = "loop_next"  # what people are asked next, or why they are not

# ---- a version ----
DIGEST: Final = "digest"  # of its files
LOGGED_MODEL: Final = "logged_model_id"
RUN: Final = "run_id"  # the stage that made it
PIPELINE_RUN: Final = "pipeline_run_id"
KIND: Final = "kind"
ITERATION: Final = "iteration"  # of a milestone
COPY_OF: Final = "copy_of"  # the version that it is a copy of: a milestone that was chosen
PROMOTED_AT: Final = "promoted_at"
REPLACED: Final = "replaced"  # the champion before it
ERASED: Final = (
    "learnt_from_erased"  # a sentence: it learnt from a person who was erased; also of a run
)
RETIRED_ALIASES: Final = "retired_aliases"  # that it had until then
ROLLED_BACK_AT: Final = "rolled_back_at"
ROLLED_BACK_TO: Final = "rolled_back_to"
ROLLED_BACK_BY: Final = "rolled_back_by"

# ---- promotion: on the candidate, and on whom it was compared with ----
_GATE: Final = "gate."
_LOOK: Final = "look."

# ---- a reward model: key numbers of its report card ----
_CARD: Final = "report_card."
CARD_VERDICT: Final = "report_card.verdict"  # a sentence

# ---- names of MLflow's own ----
PARENT_RUN: Final = "mlflow.parentRunId"
DESCRIPTION: Final = "mlflow.note.content"  # shown on the page of the run
SHOWN_TABLES: Final = "mlflow.loggedArtifacts"
MODEL_VERSIONS: Final = "mlflow.modelVersions"  # of a LoggedModel
DATA_CONTEXT: Final = "mlflow.data.context"  # of an input dataset

# ---- values, and a prefix of metrics ----
SUMMARY: Final = "summary/"  # prefix of the final metrics of a stage
PIPELINE: Final = "pipeline"  # of STAGE
VERDICTS: Final = "judge_verdicts"  # of STAGE: a run that keeps what judges said
FEEDBACK_REPORT: Final = "feedback_report"  # of STAGE: what annotators agree on
QUEUE_ORDER: Final = "queue_order"  # of STAGE: what the order of a queue of pairs saves
WAITING: Final = "waiting"  # of APPROVED
ERASURE: Final = "erasure"  # of STAGE: a run with the certificate of an erasure
NOBODY: Final = "none"  # in place of a version

# ---- families ----
_OUTPUT: Final = "output."
_ALARM: Final = "alarm."
_PARENT: Final = "parent."
_INPUT: Final = "input."
DATA, RESULT = "data", "result"  # outputs other than models


def input_of(role: str) -> str:
    """The tag of an input, by its role."""
    return f"{_INPUT}{role}"


def inputs(tags: Mapping[str, str]) -> dict[str, str]:
    """The addresses of all inputs of a run, by role."""
    return {name.removeprefix(_INPUT): uri for name, uri in tags.items() if name.startswith(_INPUT)}


def input_digest_of(role: str) -> str:
    """The tag for the digest of an input model's files when the stage began, by its role."""
    return f"input_digest.{role}"


def gate_fact(name: str) -> str:
    """The tag of a candidate for a key fact of the decision about it."""
    return f"{_GATE}{name}"


def look_of(comparison: str) -> str:
    """The tag for a look, on the version or model that was compared with."""
    return f"{_LOOK}{comparison}"


def looks(tags: Mapping[str, str]) -> dict[str, str]:
    """All looks at a version or model, by comparison, as they are."""
    return {
        name.removeprefix(_LOOK): value for name, value in tags.items() if name.startswith(_LOOK)
    }


def output_of(kind: str) -> str:
    """The tag of an output, by its kind: a model, DATA or RESULT."""
    return f"{_OUTPUT}{kind}"


def alarm_of(measure: str) -> str:
    """The tag of the last alarm of a measure of the monitor."""
    return f"{_ALARM}{measure}"


def alarms(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags of all alarms of a run, as they are."""
    return {name: line for name, line in tags.items() if name.startswith(_ALARM)}


def parent_of(role: str) -> str:
    """The tag of the version that a version was trained from, by its role."""
    return f"{_PARENT}{role}"


def parents(tags: Mapping[str, str]) -> dict[str, str]:
    """The versions that a version was trained from, by role."""
    return {
        name.removeprefix(_PARENT): uri for name, uri in tags.items() if name.startswith(_PARENT)
    }


def as_copy(
    own: Mapping[str, str], original: ModelRef, its_tags: Mapping[str, str]
) -> dict[str, str]:
    """The tags of a version that is a copy: parents and iteration are those of the original."""
    parents = {name: uri for name, uri in its_tags.items() if name.startswith(_PARENT)}
    iteration = {ITERATION: its_tags[ITERATION]} if ITERATION in its_tags else {}
    rest = {name: value for name, value in own.items() if not name.startswith(_PARENT)}
    return {**rest, **parents, **iteration, COPY_OF: original.uri}


def outputs(tags: Mapping[str, str]) -> dict[str, str]:
    """The addresses of all outputs of a run, by kind."""
    return {
        name.removeprefix(_OUTPUT): uri for name, uri in tags.items() if name.startswith(_OUTPUT)
    }


def models(tags: Mapping[str, str]) -> dict[str, ModelRef]:
    """The versions among the outputs of a run, by kind."""
    return {kind: ModelRef.parse(uri) for kind, uri in outputs(tags).items() if is_version(uri)}


def dataset(tags: Mapping[str, str]) -> DatasetRef:
    """The prepared data that a run made."""
    run_id = run_of(tags[output_of(DATA)])
    return DatasetRef(run_id=run_id, digest=tags[DATA_DIGEST])


def run_of(uri: str) -> str:
    """The run in `runs:/run_id/path`."""
    return uri.split("/")[1]


def kind(made: str) -> dict[str, str]:
    """The tags of a version for its kind, which may have a number, as in milestone.10."""
    name, _, number = made.partition(".")
    return {KIND: name, ITERATION: number} if number else {KIND: name}


def card_number(name: str) -> str:
    """The tag of a reward model for a key number of its report card."""
    return f"{_CARD}{name}"


def name_of(ref: ModelRef | None) -> str:
    """A version, or None, as a tag value."""
    return NOBODY if ref is None else ref.uri


def version_of(value: str) -> ModelRef | None:
    """The version in such a tag value; None for NOBODY."""
    return None if value == NOBODY else ModelRef.parse(value)


def flag(value: bool) -> str:
    """`true` or `false`."""
    return str(value).lower()
