"""One Prefect deployment for each YAML file of a folder: the same configs as forms in the UI."""

from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectAlreadyExists
from prefect.types.entrypoint import EntrypointType
from prefect.workers.process import ProcessWorker

from flows.config import PipelineConfig
from flows.loading import config_files, describe, load_config
from flows.rlhf import rlhf
from flows.services import POOL


def deploy(folder: Path, *, working_dir: str = "") -> list[str]:
    """Register every config of `folder` with the Prefect server of the environment.

    All files are read before anything is registered. A run gets the whole resolved config as its
    parameter, so that the form in the UI shows every value. `working_dir` is what relative paths
    in a config refer to; empty leaves it to the worker.

    Returns: the names, as `flow/deployment`.

    Raises:
        ConfigError: the folder has no config, or one of them has a mistake.
    """
    configs = [(file, load_config(file, (), PipelineConfig)) for file in config_files(folder)]
    _make_pool()
    return [_register(file, config, working_dir) for file, config in configs]


def _make_pool() -> None:
    pool = WorkPoolCreate(
        name=POOL,
        type="process",
        base_job_template=ProcessWorker.get_default_base_job_template(),
    )
    with get_client(sync_client=True) as client:
        try:
            client.create_work_pool(pool)
        except ObjectAlreadyExists:
            return


def _register(file: Path, config: PipelineConfig, working_dir: str) -> str:
    deployment = RunnerDeployment.from_flow(
        rlhf,
        name=file.stem,
        parameters={"config": config.model_dump(mode="json")},
        description=describe(file),
        tags=["rlhf", config.project],
        work_pool_name=POOL,
        job_variables={"working_dir": working_dir} if working_dir else {},
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    deployment.apply()
    return deployment.full_name
