"""Pipeline runs that were stopped, to be resumed."""

import tempfile
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from rlhf_core.errors import UserError
from tasks.record import tags
from tasks.record.describe import CONFIG
from tasks.record.identity import code_identity
from tasks.record.record import Record
from tasks.record.reuse import close_abandoned
from tasks.settings import Settings


class StoppedRun(BaseModel):
    """A pipeline run that can be resumed: what it was asked to do, and who was doing it."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    project: str
    seed: int
    config: dict[str, Any]
    flow_run_id: str  # of Prefect
    flow_name: str


def find_stopped(name: str, *, settings: Settings) -> StoppedRun:
    """The pipeline run of that name, id or start of an id, which has not finished.

    Raises:
        UserError: there is none, it has finished, or other code than that here has begun it.
    """
    record = Record.open(settings)
    close_abandoned(record)
    run = record.runs.pipeline(name)
    info, run_tags = run.info, run.data.tags
    if info.status == "FINISHED":
        raise UserError(f"the run {info.run_name} ({info.run_id[:8]}) has finished")
    here = code_identity()
    if run_tags.get(tags.CODE_DIGEST) != here[tags.CODE_DIGEST]:
        release, commit = (run_tags.get(n, "unknown") for n in (tags.CODE_VERSION, tags.GIT_COMMIT))
        raise UserError(
            f"the run {info.run_name} was begun by other code (release {release}, commit {commit}) "
            f"than that here (release {here[tags.CODE_VERSION]}, commit {here[tags.GIT_COMMIT]}), "
            "whose numbers may differ; install that, or start anew with `rlhf run`"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(record.client.download_artifacts(info.run_id, CONFIG, folder))
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    experiment = record.client.get_experiment(info.experiment_id)
    return StoppedRun(
        run_id=info.run_id,
        project=experiment.name,
        seed=int(run_tags[tags.SEED]),
        config=config,
        flow_run_id=run_tags.get(tags.FLOW_RUN, ""),
        flow_name=run_tags.get(tags.FLOW_NAME, ""),
    )
