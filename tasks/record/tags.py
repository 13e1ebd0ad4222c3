"""The vocabulary of MLflow: every tag that a run or a version of ours has, and how it is read.

No other module of `tasks` or `flows` spells one of these names; a test looks for them.
"""

from collections.abc import Mapping
from typing import Final

from tasks.registry.refs import DatasetRef, ModelRef, is_version

# ---- what a run is ----
STAGE: Final = "stage"  # its name, as `sft`; of a run that has stages: what kind of run it is
SEED: Final = "seed"
KEY: Final = "stage_key"  # equal keys lead to equal bits: tasks/record/identity.py
DATA_DIGEST: Final = "data_digest"  # of the prepared data that went in, or came out
CODE_VERSION: Final = "code_version"
CODE_DIGEST: Final = "code_digest"  # of the whole core
GIT_COMMIT: Final = "git_commit"
GIT_DIRTY: Final = "git_dirty"
FLOW_RUN: Final = "prefect.flow_run_id"
TASK_RUN: Final = "prefect.task_run_id"
FLOW_NAME: Final = "prefect.flow_name"
FLOW_URL: Final = "prefect.flow_run_url"

# ---- what became of it ----
ERROR: Final = "error"
RESUMED: Final = "resumed"  # how often it was taken up again
CACHED_FROM: Final = "cached_from"  # the run that has done its work before

# ---- the promotion: on the pipeline's run, and on that of the stage ----
COMPARED_WITH: Final = "compared_with"  # the champion of the evaluation
PROMOTED: Final = "promoted"
REASONS: Final = "reasons"  # one a line
CANDIDATE: Final = "candidate"  # the version that waits for a person
APPROVED: Final = "approved"  # true, false or WAITING; on the version too, and so are the next
APPROVED_BY: Final = "approved_by"
APPROVED_AT: Final = "approved_at"
APPROVAL_REASON: Final = "approval_reason"

# ---- a version ----
DIGEST: Final = "digest"  # of its files
LOGGED_MODEL: Final = "logged_model_id"
RUN: Final = "run_id"  # the stage that has made it
PIPELINE_RUN: Final = "pipeline_run_id"
KIND: Final = "kind"
ITERATION: Final = "iteration"  # of a milestone
PROMOTED_AT: Final = "promoted_at"
REPLACED: Final = "replaced"  # the champion before it
ROLLED_BACK_AT: Final = "rolled_back_at"
ROLLED_BACK_TO: Final = "rolled_back_to"
ROLLED_BACK_BY: Final = "rolled_back_by"

# ---- names of MLflow's own ----
PARENT_RUN: Final = "mlflow.parentRunId"
DESCRIPTION: Final = "mlflow.note.content"  # shown on the page of the run
SHOWN_TABLES: Final = "mlflow.loggedArtifacts"
MODEL_VERSIONS: Final = "mlflow.modelVersions"  # of a LoggedModel
DATA_CONTEXT: Final = "mlflow.data.context"  # of a dataset as an input

# ---- values, and a prefix of metrics ----
SUMMARY: Final = "summary/"  # before the names of the metrics that a stage closes with
PIPELINE: Final = "pipeline"  # of STAGE
WAITING: Final = "waiting"  # of APPROVED
NOBODY: Final = "none"  # where a version could be named

# ---- families ----
_OUTPUT: Final = "output."
DATA, RESULT = "data", "result"  # what a stage may make beside models


def input_of(role: str) -> str:
    """What went into a run, by its role."""
    return f"input.{role}"


def output_of(kind: str) -> str:
    """What came out of a run, by its kind: a model, DATA or RESULT."""
    return f"{_OUTPUT}{kind}"


def parent_of(role: str) -> str:
    """The version that a version was made from, by its role."""
    return f"parent.{role}"


def outputs(tags: Mapping[str, str]) -> dict[str, str]:
    """The addresses of all that came out of a run, by kind."""
    return {
        name.removeprefix(_OUTPUT): uri for name, uri in tags.items() if name.startswith(_OUTPUT)
    }


def models(tags: Mapping[str, str]) -> dict[str, ModelRef]:
    """The versions among them."""
    return {kind: ModelRef.parse(uri) for kind, uri in outputs(tags).items() if is_version(uri)}


def dataset(tags: Mapping[str, str]) -> DatasetRef:
    """The prepared data that came out of a run."""
    run_id = run_of(tags[output_of(DATA)])
    return DatasetRef(run_id=run_id, digest=tags[DATA_DIGEST])


def run_of(uri: str) -> str:
    """The run in `runs:/run_id/path`."""
    return uri.split("/")[1]


def kind(made: str) -> dict[str, str]:
    """The tags of a version by what it is in its run: a kind, or one of several, as milestone.10"""
    name, _, number = made.partition(".")
    return {KIND: name, ITERATION: number} if number else {KIND: name}


def name_of(ref: ModelRef | None) -> str:
    """A version that there may not be, as a value."""
    return NOBODY if ref is None else ref.uri


def version_of(value: str) -> ModelRef | None:
    """The version that such a value names."""
    return None if value == NOBODY else ModelRef.parse(value)


def flag(value: bool) -> str:
    """`true` or `false`."""
    return str(value).lower()
