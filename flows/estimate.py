"""The stages of a pipeline in their order, for an estimate of what a run will take."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flows.config import PipelineConfig
from flows.local import allocator
from rlhf_core.config import Section
from rlhf_core.settings.judge import ENDPOINT, PEOPLE, JudgeConfig
from rlhf_core.settings.onpolicy import OnPolicySection
from rlhf_core.settings.rewards import PIPELINE_REWARD
from tasks.estimate.job import StageJob

if TYPE_CHECKING:
    from rlhf_core.data.validation import Validation
    from rlhf_core.estimate.result import Estimate
    from rlhf_core.estimate.trial import Facts
    from rlhf_core.metrics import StageLogger
    from tasks.settings import Settings

_WEIGHT = 4  # bytes of a parameter
_COPIES = 14  # of the model that the trials write: each output, as made, stored and fetched


def estimate_run(
    config: PipelineConfig,
    found: "Validation",
    settings: "Settings",
    logger: "StageLogger",
    *,
    parameters: int,
    snapshot: Path | None,
) -> "Estimate":
    """Try each stage of a run on this machine, and say what the run will take.

    Args:
        found: what the validation of the data found.
        parameters: of the policy.
        snapshot: votes of the preference store, if the config reads them there.

    Raises: UserError when there is no room for trials.
    """
    from rlhf_core.errors import UserError
    from tasks.estimate.probe import enough_room, estimate

    if why := enough_room(_COPIES * _WEIGHT * parameters):
        raise UserError(f"the time of a run cannot be estimated: {why}, or pass --no-probe")
    return estimate(
        stage_jobs(config),
        facts_of(config, found, parameters, settings),
        settings,
        logger,
        project=config.project,
        seed=config.seed,
        snapshot=snapshot,
        sft_is_trained=not config.sft.reuse,
        environment=allocator.ENVIRONMENT,
        imports=("flows.__main__", "flows.rlhf"),
    )


def facts_of(
    config: PipelineConfig, found: "Validation", parameters: int, settings: "Settings"
) -> "Facts":
    """What the size of a trial depends on."""
    from rlhf_core.estimate.trial import Facts

    mean = {(item.table, item.text): item.mean for item in found.lengths}
    limit, sampling = config.length_limits, config.sampling
    prompt = min(mean.get(("prompts", "prompt"), limit.prompt), limit.prompt)
    answer = min(mean.get(("demonstrations", "response"), sampling.max_new_tokens), limit.response)
    asked = mean.get(("preferences", "prompt"), prompt)
    pair = sum(
        min(asked + mean.get(("preferences", side), answer), limit.reward)
        for side in ("chosen", "rejected")
    )
    demonstration = mean.get(("demonstrations", "prompt"), prompt) + mean.get(
        ("demonstrations", "response"), answer
    )
    return Facts(
        parameters=parameters,
        train={name: table.train for name, table in found.tables.items()},
        eval={name: table.eval for name, table in found.tables.items()},
        prompt_tokens=prompt,
        answer_tokens=answer,
        demonstration_tokens=min(demonstration, limit.sft),
        pair_tokens=pair,
        gpu=settings.device != "cpu",
    )


def stage_jobs(config: PipelineConfig) -> list[StageJob]:
    """The stages that a run of the pipeline does, each with what it reads of the others."""
    sft = config.sft.reuse or "sft"
    reward = config.reward_model.reuse or "reward"
    judge, unasked = _judge(config)
    sampling: dict[str, Section] = {"sampling": config.sampling}
    models = {"sft": sft, "data": "data"}
    jobs = [
        _job("prepare", config.data, {"model": config.model, "limits": config.length_limits}, {})
    ]
    if not config.sft.reuse:
        jobs.append(_job("sft", config.sft, {"model": config.model}, {"data": "data"}))
    if not config.reward_model.reuse:
        jobs.append(_job("reward_model", config.rewarded, sampling, models))
    jobs.append(_job("report_card", config.examination, sampling, {**models, "reward": reward}))
    if config.trains_held_out:
        half = config.reward_model.model_copy(update={"votes": "second_half"})
        jobs.append(_job("held_out", half, sampling, models))
    jobs.append(_job(config.algorithm, config.optimised, sampling, _of_policy(config, reward)))
    compared = {**models, "reward": reward, "policy": "policy"}
    if judge.is_registered:
        compared["judge"] = judge.source
    asked: dict[str, Section] = {"sampling": config.sampling, "judge": judge}
    stand_in = {"policy": "sft"}
    if config.tournament.on:
        jobs.append(_job("tournament", config.contest, asked, compared, stand_in, unasked))
    jobs.append(_job("evaluation", config.evaluation, asked, compared, stand_in, unasked))
    return jobs


def _job(
    stage: str,
    config: Section,
    sections: Mapping[str, Section],
    inputs: Mapping[str, str],
    stand_ins: Mapping[str, str] = {},
    left_out: tuple[str, ...] = (),
) -> StageJob:
    from rlhf_core.stages.table import STAGES

    spec = STAGES[stage]
    return StageJob(
        stage=stage,
        config=spec.config.part_of(config).model_dump(mode="json"),
        sections={name: sections[name].model_dump(mode="json") for name in spec.sections},
        inputs=inputs,
        stand_ins=stand_ins,
        left_out=left_out,
    )


def _of_policy(config: PipelineConfig, reward: str) -> dict[str, str]:
    """The inputs of the stage that optimises the policy."""
    inputs = {"sft": config.sft.reuse or "sft", "data": "data"}
    section = config.policy
    if not isinstance(section, OnPolicySection):
        return inputs
    sources = {term.role: term.source for term in section.rewards if term.is_model}
    for role in section.reward_roles:
        source = sources.get(role, PIPELINE_REWARD)
        inputs[role] = reward if source == PIPELINE_REWARD else source
    if config.trains_held_out:
        inputs["held_out"] = "held_out"
    elif section.monitor.held_out:
        inputs["held_out"] = section.monitor.held_out
    return inputs


def _judge(config: PipelineConfig) -> tuple[JudgeConfig, tuple[str, ...]]:
    """The judge of the trials; who costs money or days is not asked."""
    if config.judge.source == ENDPOINT:
        said = "the endpoint that judges was not asked, since it may cost money; add its replies"
    elif config.judge.source == PEOPLE:
        said = "people who judge were not asked; add the days that they take"
    else:
        return config.judge, ()
    return config.judge.model_copy(update={"source": JudgeConfig().source}), (said,)
