"""Policy optimisation as a Prefect task, by any algorithm of the stage table."""

from collections.abc import Mapping

from prefect import task
from pydantic import BaseModel, ConfigDict

from rlhf_core.config import Section
from rlhf_core.rewards.functions import load_function
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.monitor import HELD_OUT
from rlhf_core.settings.onpolicy import OnPolicySection
from rlhf_core.settings.rewards import PIPELINE_REWARD
from tasks.engines.place import try_engine
from tasks.prefect.ui import stage_task
from tasks.record.record import Record
from tasks.registry.refs import DatasetRef, ModelRef, PipelineRun, Ref
from tasks.registry.registered import milestones_of
from tasks.reward_places import reward_places
from tasks.settings import read_settings
from tasks.steps.stage import do_stage


class TrainedPolicy(BaseModel):
    """The registered outputs of policy optimisation; only PPO has a critic."""

    model_config = ConfigDict(frozen=True)

    policy: ModelRef
    critic: ModelRef | None
    milestones: Mapping[str, ModelRef] = {}  # by kind, as milestone.10


@task(name="find-rewards", task_run_name="find rewards")
def find_rewards(config: Section, true_reward: str = "") -> dict[str, ModelRef]:
    """The reward models in the config other than the pipeline's own, by role, as explicit versions;
    the monitor's too, if it is registered already.

    Args:
        true_reward: the setting of the evaluation, which is only checked.

    Raises: ModelError for a model that does not exist, ConfigError for a function that may not or
        cannot be imported.
    """
    places = reward_places()
    if true_reward:
        load_function(true_reward, setting="evaluation.true_reward", places=places)
    if not isinstance(config, OnPolicySection):
        return {}
    for term in config.rewards:
        if not term.is_model:
            load_function(term.source, setting="the reward", places=places)
    store = Record.open().store
    others = [term for term in config.rewards if term.is_model and term.source != PIPELINE_REWARD]
    found = {term.role: store.resolve(term.source) for term in others}
    if config.monitor.held_out and not config.monitor.trains_held_out:
        found[HELD_OUT] = store.resolve(config.monitor.held_out)
    return found


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


@stage_task("policy", "{algorithm}")
def train_policy(
    algorithm: str,
    config: Section,
    sampling: SamplingConfig,
    sft: ModelRef,
    reward_model: ModelRef,
    other_rewards: Mapping[str, ModelRef],
    data: DatasetRef,
    run: PipelineRun,
) -> TrainedPolicy:
    """Optimise the SFT policy; register `<project>-policy`, and for PPO `<project>-critic`."""
    known = {"reward": reward_model, **other_rewards}
    roles = config.reward_roles if isinstance(config, OnPolicySection) else ()
    roles += (HELD_OUT,) if HELD_OUT in other_rewards else ()
    inputs: dict[str, Ref] = {"sft": sft, "data": data, **{role: known[role] for role in roles}}
    return do_stage(
        algorithm,
        config,
        run,
        inputs=inputs,
        sections={"sampling": sampling},
        returns=lambda made: TrainedPolicy(
            policy=made.models["policy"],
            critic=made.models.get("critic"),
            milestones=milestones_of(made.models),
        ),
    )
