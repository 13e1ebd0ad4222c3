"""What a pipeline would do, before it does any of it: how many steps its trainings take, how many
parameters they change, and how much its held-out data can tell.

Nothing is trained and no weights are read: the networks are built on the device meta.
"""

import math
from collections.abc import Iterator
from copy import deepcopy
from statistics import NormalDist
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf_core.backbone.models import ModelConfig, outline
from rlhf_core.backbone.networks import Network, ScalarModel, start_adapter
from rlhf_core.data.validation import Validation
from rlhf_core.evaluation.gates import PromotionConfig, RewardGateConfig, can_show
from rlhf_core.functional.ranking import win_rate
from rlhf_core.onpolicy.loop import OnPolicySection
from rlhf_core.stages.dpo import DPOConfig
from rlhf_core.stages.evaluation import EvaluationConfig
from rlhf_core.stages.ppo import PPOConfig
from rlhf_core.stages.reward_model import RewardModelConfig
from rlhf_core.stages.sft import SFTConfig
from rlhf_core.training.learner import TrainingSection


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True)


class Learnt(_Facts):
    """What a training changes of one network."""

    network: str
    parameters: int
    lora_rank: int  # 0: these are all that it has
    frozen: int  # beside them


class StagePlan(_Facts):
    """The work of a stage."""

    stage: str
    steps: int | None  # of the optimizer, at most; None where there is none
    work: str
    learnt: tuple[Learnt, ...]  # empty: nothing, or it depends on a model that was not looked up


class Plan(_Facts):
    """The work of all stages, and what can be known in the end."""

    stages: tuple[StagePlan, ...]
    certainty: tuple[str, ...]
    warnings: tuple[str, ...]


class Sections(NamedTuple):
    """The settings of a pipeline that its work depends on."""

    model: ModelConfig
    sft: SFTConfig | None  # None: a registered model is taken
    reward_model: RewardModelConfig | None
    algorithm: str
    policy: OnPolicySection | DPOConfig
    evaluation: EvaluationConfig
    reward_gate: RewardGateConfig
    promotion: PromotionConfig


def make_plan(sections: Sections, validation: Validation) -> Plan:
    """The plan for data that were looked at.

    Raises: ModelError when the base model cannot be found, or is of a family without a scalar head.
    """
    return Plan(
        stages=tuple(_stages(sections, validation)),
        certainty=tuple(_certainty(sections, validation)),
        warnings=tuple(_warnings(sections, validation)),
    )


# --- steps and parameters ------------------------------------------------------------------------


def _stages(sections: Sections, validation: Validation) -> Iterator[StagePlan]:
    sft, reward_model, policy = sections.sft, sections.reward_model, sections.policy
    tables = validation.tables
    votes = tables["preferences"].train
    base = None if sft is None else outline(sections.model, validation.vocabulary)
    if sft is not None:
        steps, work = _passes(sft, sft.epochs, tables["demonstrations"].train, "demonstration")
        yield StagePlan(stage="sft", steps=steps, work=work, learnt=_of_policy(base, sft))
    if reward_model is not None:
        steps, work = _passes(reward_model, reward_model.epochs, votes, "vote")
        learnt = _of_scalar(base, reward_model, "reward model")
        yield StagePlan(stage="reward_model", steps=steps, work=work, learnt=learnt)
    learnt = _of_policy(base, policy)
    if isinstance(policy, DPOConfig):
        steps, work = _passes(policy, policy.epochs, votes, "vote")
    else:
        steps = policy.updates
        minibatches = steps // (policy.iterations * policy.epochs)
        work = (
            f"{_many(policy.iterations, 'iteration')} of {policy.rollout_size} responses: "
            f"{_many(policy.epochs, 'epoch')} of {_many(minibatches, 'update')}"
        )
        if isinstance(policy, PPOConfig) and reward_model is not None:
            learnt += _of_scalar(base, policy, "critic")
    yield StagePlan(stage=sections.algorithm, steps=steps, work=work, learnt=learnt)
    k, n = sections.evaluation.samples_per_prompt, sections.evaluation.best_of
    answers = f"{max(k, n)} answers of SFT, {k} of the policy and of a champion"
    prompts = _evaluated(sections, validation)
    yield StagePlan(
        stage="evaluation", steps=None, work=f"{_many(prompts, 'prompt')}: {answers}", learnt=()
    )


def _passes(section: TrainingSection, epochs: int, rows: int, what: str) -> tuple[int, str]:
    """Optimizer steps of some epochs, and the words for them."""
    steps = epochs * math.ceil(rows / section.batch_size)
    size = section.batch_size
    return steps, f"{_many(epochs, 'epoch')} of {_many(rows, what)}, {size} a step"


def _of_policy(base: PreTrainedModel | None, section: TrainingSection) -> tuple[Learnt, ...]:
    return () if base is None else (_learnt("policy", Network(deepcopy(base)), section),)


def _of_scalar(
    base: PreTrainedModel | None, section: TrainingSection, name: str
) -> tuple[Learnt, ...]:
    if base is None:
        return ()
    config = deepcopy(base.config)
    config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    return (_learnt(name, ScalarModel(model), section),)


def _learnt(name: str, network: Network, section: TrainingSection) -> Learnt:
    whole = _size(network)
    if section.lora_rank:
        start_adapter(
            network,
            "plan",
            rank=section.lora_rank,
            alpha=section.lora_alpha,
            layers=section.lora_layers,
            seed=0,
        )
    learnt = _size(network)
    # A head learns beside an adapter; the rest of the network lies still.
    kept = [p for n, p in network.learnable().items() if ".lora_" not in n]
    frozen = whole - sum(p.numel() for p in kept)
    return Learnt(network=name, parameters=learnt, lora_rank=section.lora_rank, frozen=frozen)


def _size(network: Network) -> int:
    return sum(parameter.numel() for parameter in network.learnable().values())


# --- what can be known ---------------------------------------------------------------------------


def _evaluated(sections: Sections, validation: Validation) -> int:
    """Held-out prompts that the evaluation will have."""
    return min(sections.evaluation.prompts, validation.tables["prompts"].eval)


def _certainty(sections: Sections, validation: Validation) -> Iterator[str]:
    """Roughly, as answers to one prompt count as one."""
    prompts = _evaluated(sections, validation)
    each = sections.evaluation.samples_per_prompt
    yield (
        f"Verdict: {_many(prompts, 'held-out prompt')}, {_many(each, 'answer')} to each; a win "
        f"rate near 0.5 will be known to about ± {_half_width(prompts):.2f}."
    )
    if sections.reward_model is not None:
        votes = validation.tables["preferences"]
        yield (
            f"Reward model: {_many(votes.eval, 'held-out vote')} on "
            f"{_many(votes.eval_prompts, 'prompt')}; an accuracy near 0.5 will be known to about "
            f"± {_half_width(votes.eval_prompts):.2f}."
        )


def _warnings(sections: Sections, validation: Validation) -> Iterator[str]:
    promotion, prompts = sections.promotion, _evaluated(sections, validation)
    more = "data.eval_fraction, or evaluation data of their own"
    way_out = "evaluation.prompts" if prompts == sections.evaluation.prompts else more
    least, over = promotion.min_win_rate, promotion.min_win_rate_over_champion
    for what, setting, rate in (
        ("No policy can be promoted", "promotion.min_win_rate", least),
        ("No champion can be replaced", "promotion.min_win_rate_over_champion", over),
    ):
        if not can_show(prompts, rate):
            yield (
                f"{what}: {_many(prompts, 'held-out prompt')} cannot show {setting} {rate:g}, even "
                f"if every one of them is won; {_needed(rate)} ({way_out})."
            )
            break
    if sections.reward_model is None:
        return
    prompts = validation.tables["preferences"].eval_prompts
    gate = sections.reward_gate.min_accuracy
    if gate and not can_show(prompts, gate):
        yield (
            f"No policy will be trained: held-out votes on {_many(prompts, 'prompt')} cannot show "
            f"reward_gate.min_accuracy {gate:g}, even if all of them are predicted; "
            f"{_needed(gate)} ({more})."
        )
    elif not can_show(prompts, 0.5):
        yield (
            f"The reward model cannot be told from chance by held-out votes on "
            f"{_many(prompts, 'prompt')}; {_needed(0.5)} ({more})."
        )


def _needed(least: float) -> str:
    """How many prompts could show a share above `least`: n / (n + z²) > least, by Wilson."""
    if least == 1:
        return "no number of them can"
    z2 = NormalDist().inv_cdf(0.975) ** 2
    return f"it takes {math.floor(z2 * least / (1 - least)) + 1}"


def _half_width(prompts: int) -> float:
    interval = win_rate(0, prompts, 0)
    return (interval.high - interval.low) / 2


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
