"""Settings that are valid and yet train for nothing, or cost what nobody meant: one sentence each.

A sentence names the setting, its number and what to do. The settings that ship with this package
raise none. What cannot work at all is refused by the sections, not here.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from rlhf_core.config import Section
from rlhf_core.data.validation import Validation
from rlhf_core.settings.data import DataConfig
from rlhf_core.settings.model import FreshModelConfig, ModelConfig, SamplingConfig
from rlhf_core.settings.onpolicy import KLSection, OnPolicySection, PPOConfig
from rlhf_core.settings.rewards import PIPELINE_REWARD
from rlhf_core.settings.training import RewardModelConfig, TrainingSection
from rlhf_core.stages.table import STAGES

# Adapters start from zero and are small; 1e-4 and more is usual (Hu et al. 2021, table 11).
ADAPTER_RATE = 2e-5
LOWEST_RATE, HIGHEST_RATE = 1e-9, 0.1
MANY_STEPS = 1_000_000
FORGOTTEN = 0.01  # of the reward at the end of a response, at its beginning
ROWS = {"demonstrations": "demonstrations", "preferences": "votes", "prompts": "prompts"}


class Chosen(NamedTuple):
    """The settings of a run that are looked at."""

    model: ModelConfig
    data: DataConfig
    sampling: SamplingConfig
    trainings: dict[str, TrainingSection]  # by stage, without reused models


def doubts(chosen: Chosen, validation: Validation | None = None) -> list[str]:
    """The sentences; without a validation only those that the settings alone give reason for."""
    found = [*_of_sources(chosen), *_of_sampling(chosen.sampling)]
    for stage, section in chosen.trainings.items():
        found += _of_optimizer(stage, section)
        if isinstance(section, RewardModelConfig):
            found += _of_reward_model(stage, section)
        if isinstance(section, OnPolicySection):
            found += _of_policy(stage, section, chosen.sampling)
            found += _of_members(stage, section, chosen.trainings.get("reward_model"))
        if validation is not None:
            found += _of_data(stage, section, validation)
    return [*found, *(_cut_in_sampling(chosen.sampling, validation) if validation else ())]


def _of_sources(chosen: Chosen) -> Iterator[str]:
    data, model = chosen.data, chosen.model
    sources = (data.demonstrations.path, data.preferences.named, data.prompts.path)
    named = [source for source in sources if source]
    if data.source == "simulated" and named:
        yield (
            f"data.source is simulated, so {named[0]} is not read; set data.source to files to "
            "train on it"
        )
    if model.source and model.fresh != FreshModelConfig():
        yield (
            "model.fresh has no effect, since model.source names a model; remove model.fresh, or "
            "model.source to train a fresh one"
        )


def _of_sampling(sampling: SamplingConfig) -> Iterator[str]:
    if not 0.2 <= sampling.temperature <= 2:
        yield (
            f"sampling.temperature is {sampling.temperature:g}: responses are all but "
            f"{'the same' if sampling.temperature < 1 else 'random'}, and the policy learns little "
            "from them; use 0.5 to 1.5"
        )


def _of_optimizer(stage: str, section: TrainingSection) -> Iterator[str]:
    yield from _of_adapter(stage, section)
    for name in _rates(section):
        rate = getattr(section, name)
        if rate < LOWEST_RATE or rate > HIGHEST_RATE:
            what = "changes no weight" if rate < LOWEST_RATE else "makes training diverge"
            yield (
                f"{stage}.{name} is {rate:g}, which {what}; the default is "
                f"{_default(section, name):g}"
            )
    if section.warmup_ratio >= 0.5:
        yield (
            f"{stage}.warmup_ratio is {section.warmup_ratio:g}: the learning rate rises for half "
            "of the training or more; use 0 to 0.1"
        )
    if section.learning_rate * section.weight_decay >= 0.1:
        yield (
            f"{stage}.weight_decay is {section.weight_decay:g}: with learning_rate "
            f"{section.learning_rate:g} each step takes a tenth of every weight or more; lower it"
        )


def _of_adapter(stage: str, section: TrainingSection) -> Iterator[str]:
    if not section.lora_rank:
        for name in ("lora_alpha", "lora_layers"):
            value = getattr(section, name)
            if value != _default(section, name):
                yield (
                    f"{stage}.{name} is {value}, but {stage}.lora_rank is 0, so there is no "
                    f"adapter; set lora_rank, for example to 16, or remove {name}"
                )
        return
    for name in _rates(section):
        rate = getattr(section, name)
        if rate < ADAPTER_RATE:
            yield (
                f"{stage}.{name} is {rate:g}, a rate for training all weights: with adapters "
                f"(lora_rank {section.lora_rank}) it changes next to nothing; set it to about 1e-4"
            )
    if section.lora_alpha > 64 * section.lora_rank or 64 * section.lora_alpha < section.lora_rank:
        yield (
            f"{stage}.lora_alpha is {section.lora_alpha} with lora_rank {section.lora_rank}, so "
            f"the adapter is scaled by {section.lora_alpha / section.lora_rank:.3g}; set "
            "lora_alpha to one or two times lora_rank"
        )


def _of_reward_model(stage: str, section: RewardModelConfig) -> Iterator[str]:
    if section.loss == "pointwise_mse":
        for name in ("label_smoothing", "center_coef"):
            if getattr(section, name):
                yield f"{stage}.{name} has no effect with loss pointwise_mse; remove it"


def _of_policy(stage: str, section: OnPolicySection, sampling: SamplingConfig) -> Iterator[str]:
    if section.kl_coef == 0 and section.kl_budget == 0:
        yield (
            f"{stage}.kl_coef and {stage}.kl_budget are 0: nothing holds the policy near SFT, and "
            "it may learn texts that only please the reward; set kl_coef, for example to 0.05"
        )
    if section.clip_range < 0.01:
        yield (
            f"{stage}.clip_range is {section.clip_range:g}, so an update changes next to nothing; "
            "use 0.1 to 0.3"
        )
    if 0 < section.update_kl_limit < 1e-5:
        yield (
            f"{stage}.update_kl_limit is {section.update_kl_limit:g} nats a token, so the epochs "
            "of an iteration end after their first update; raise it, or set it to 0 for no limit"
        )
    if section.keep_every > section.iterations:
        yield (
            f"{stage}.keep_every is {section.keep_every}, more than iterations "
            f"{section.iterations}, so no milestone is kept; lower it"
        )
    if section.updates > MANY_STEPS:
        yield _too_long(stage, section.updates, "iterations or epochs")
    if section.combine_rewards != "sum" and len(section.rewards) == 1:
        yield (
            f"{stage}.combine_rewards is {section.combine_rewards}, but {stage}.rewards has a "
            "single part; add others, or remove combine_rewards"
        )
    if isinstance(section, KLSection) and section.kl_control == "fixed":
        for name in ("kl_target", "kl_horizon"):
            if getattr(section, name) != _default(section, name):
                yield f"{stage}.{name} has no effect with kl_control fixed; remove one of the two"
    if isinstance(section, PPOConfig):
        yield from _of_credit(stage, section, sampling)


def _of_members(
    stage: str, section: OnPolicySection, reward_model: TrainingSection | None
) -> Iterator[str]:
    how = section.combine_members
    models = [term.source for term in section.rewards if term.is_model]
    alone = isinstance(reward_model, RewardModelConfig) and reward_model.members == 1
    if how != "mean" and alone and models == [PIPELINE_REWARD]:
        yield (
            f"{stage}.combine_members is {how}, but reward_model.members is 1, so there is nothing "
            "to combine; set reward_model.members, for example to 4, or remove combine_members"
        )
    if how != "mean_minus_variance" and section.member_variance_coef != _default(
        section, "member_variance_coef"
    ):
        yield (
            f"{stage}.member_variance_coef has no effect with combine_members {how}; set that to "
            "mean_minus_variance, or remove member_variance_coef"
        )


def _of_credit(stage: str, section: PPOConfig, sampling: SamplingConfig) -> Iterator[str]:
    left = section.gamma ** (sampling.max_new_tokens - 1)
    if left < FORGOTTEN:
        yield (
            f"{stage}.gamma is {section.gamma:g}: of the reward at the end of a response of "
            f"{sampling.max_new_tokens} tokens {left:.1g} reaches its first one; use 1"
        )
    if section.gae_lambda == 0:
        yield (
            f"{stage}.gae_lambda is 0: a token learns only from the critic's next value, which "
            "starts out wrong; use 0.9 to 1"
        )


def _of_data(stage: str, section: TrainingSection, validation: Validation) -> Iterator[str]:
    table = STAGES[stage].passes_over
    if table is None:
        return
    rows, what = validation.tables[table].train, ROWS[table]
    epochs = getattr(section, "epochs", 1)
    steps = epochs * math.ceil(rows / section.batch_size)
    if section.batch_size > rows:
        yield (
            f"{stage}.batch_size is {section.batch_size}, more than the {rows:,} {what} for "
            f"training, so {stage} takes {steps} step{'' if steps == 1 else 's'} in all; lower it, "
            f"for example to {max(1, rows // 8)}"
        )
    if steps > MANY_STEPS:
        yield _too_long(stage, steps, "epochs")
    if (longest := getattr(section, "max_length", None)) is not None:
        whole = "demonstrations" if table == "demonstrations" else "preferences"
        cut = validation.truncated.get(f"{whole} over {longest} tokens", 0)
        count = _count(validation, table)
        if 2 * cut > count:
            yield (
                f"{stage}.max_length is {longest}, which cuts {cut:,} of {count:,} {whole}: what "
                "is cut is not learnt; raise it, or shorten the texts"
            )


def _cut_in_sampling(sampling: SamplingConfig, validation: Validation) -> Iterator[str]:
    for name, table, what in (
        ("max_prompt_length", "prompts", "prompts"),
        ("max_new_tokens", "demonstrations", "responses"),
    ):
        limit = getattr(sampling, name)
        cut = validation.truncated.get(f"{what} over {limit} tokens", 0)
        if 2 * cut > (count := _count(validation, table)):
            meaning = (
                "the policy does not read what is cut"
                if table == "prompts"
                else "the policy cannot end answers as long as those it imitates"
            )
            yield (
                f"sampling.{name} is {limit}, but {cut:,} of {count:,} {what} are longer: {meaning}"
                "; raise it"
            )


def _count(validation: Validation, table: str) -> int:
    """The rows of a table that are kept, on both sides."""
    found = validation.tables[table]
    return found.train + found.eval


def _too_long(stage: str, steps: int, settings: str) -> str:
    return (
        f"{stage} takes {steps:,} steps, which at one a second are {steps / 86_400:,.0f} days; "
        f"lower {stage}.{settings}"
    )


def _rates(section: TrainingSection) -> list[str]:
    return [name for name in type(section).model_fields if name.endswith("learning_rate")]


def _default(section: Section, name: str) -> float:
    default: float = type(section).model_fields[name].default
    return default
