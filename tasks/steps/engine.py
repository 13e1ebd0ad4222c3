"""The servers that sample roll-outs, looked at before anything is trained."""

from prefect import task

from rlhf_core.config import Section
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.onpolicy import OnPolicySection
from tasks.engines.place import try_engine
from tasks.settings import read_settings


@task(name="check-engine", task_run_name="check the engine")
def check_engine(config: Section, sampling: SamplingConfig) -> None:
    """Find out whether the servers can sample, which otherwise fails after hours of training.

    Args:
        config: the settings of the algorithm; one that rolls nothing out needs no server.

    Raises: ConfigError when the environment names no server; EngineError when one does not answer,
        or cannot do what is needed.
    """
    if isinstance(config, OnPolicySection):
        try_engine(sampling, read_settings())
