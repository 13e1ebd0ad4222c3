"""Pipeline runs of the past: found by the names that people use, and taken up again."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from pydantic import BaseModel, ConfigDict

from rlhf_core.errors import UserError
from tasks.record.identity import code_identity
from tasks.record.stage import FLOW_RUN, close_abandoned
from tasks.record.tracking import connect
from tasks.settings import Settings

PIPELINE = "pipeline"
PAGE = 1000


class StoppedRun(BaseModel):
    """A pipeline run that can go on: what it was asked to do, and who was doing it."""

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
    client = connect(settings)
    close_abandoned(client, settings)
    run = find_run(client, name)
    info, tags = run.info, run.data.tags
    if info.status == "FINISHED":
        raise UserError(f"the run {info.run_name} ({info.run_id[:8]}) has finished")
    here = code_identity()
    if tags.get("code_digest") != here["code_digest"]:
        raise UserError(
            f"the run {info.run_name} was begun by other code (release "
            f"{tags.get('code_version', 'unknown')}, commit {tags.get('git_commit', 'unknown')}) "
            f"than that here (release {here['code_version']}, commit {here['git_commit']}), whose "
            "numbers may differ; install that, or start anew with `rlhf run`"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(client.download_artifacts(info.run_id, "config.yaml", folder))
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    experiment = client.get_experiment(info.experiment_id)
    return StoppedRun(
        run_id=info.run_id,
        project=experiment.name,
        seed=int(tags["seed"]),
        config=config,
        flow_run_id=tags.get(FLOW_RUN, ""),
        flow_name=tags.get("prefect.flow_name", ""),
    )


def find_run(client: MlflowClient, name: str) -> Run:
    """The pipeline run with that id, start of an id, or name.

    Raises: UserError when none, or more than one, answers to it.
    """
    return _find(name, list(_pipeline_runs(client)))


def _pipeline_runs(client: MlflowClient) -> Iterator[Run]:
    """Every run that has stages, the newest first."""
    experiments = [found.experiment_id for found in client.search_experiments()]
    yield from search(client, experiments, f"tags.stage = '{PIPELINE}'")


def search(client: MlflowClient, experiments: list[str], condition: str) -> Iterator[Run]:
    """All runs of some experiments that meet a condition."""
    token = None
    while True:
        page = client.search_runs(experiments, condition, max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _find(name: str, known: list[Run]) -> Run:
    matches = [run for run in known if name in (run.info.run_id, run.info.run_name)]
    matches = matches or [run for run in known if run.info.run_id.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        ids = ", ".join(run.info.run_id[:12] for run in matches[:5])
        raise UserError(
            f"{len(matches)} runs answer to '{name}' (the newest: {ids}); give an id instead"
        )
    newest = ", ".join(f"{run.info.run_name} ({run.info.run_id[:8]})" for run in known[:5])
    hint = f"the newest are {newest}" if newest else "there is none yet: start one with `rlhf run`"
    raise UserError(f"no pipeline run answers to '{name}'; {hint}")
