"""Finds stopped pipeline runs to resume."""

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
    """A pipeline run that can be resumed: its config, and the flow run that executed it."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    project: str
    seed: int
    config: dict[str, Any]
    flow_run_id: str  # of Prefect
    flow_name: str


def find_stopped(name: str, *, settings: Settings) -> StoppedRun:
    """The unfinished pipeline run with this name, id or prefix of an id.

    Raises:
        UserError: there is none, it has finished, or it was started by other code.
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
            f"the run {info.run_name} was started by other code (release {release}, commit "
            f"{commit}) than the one installed here (release {here[tags.CODE_VERSION]}, commit "
            f"{here[tags.GIT_COMMIT]}), so its numbers could change; install that code, or start a "
            "new run with `rlhf run`"
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
