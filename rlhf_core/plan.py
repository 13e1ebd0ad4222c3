"""Predict what a pipeline will do: the steps of each training, the parameters it changes, and how
precise the results on held-out data can be.

Nothing is trained and no weights are read: the networks are built on the device meta.
"""

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import count
from statistics import NormalDist
from typing import Final, NamedTuple

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from rlhf_core.backbone.base_model import outline
from rlhf_core.backbone.context import SAMPLING_LENGTH, require_context
from rlhf_core.backbone.networks import Network, ScalarModel
from rlhf_core.data.validation import Validation
from rlhf_core.evaluation.intervals import can_show
from rlhf_core.evaluation.signs import SIGNS
from rlhf_core.functional.ranking import win_rate
from rlhf_core.promotion import evidence
from rlhf_core.promotion.evidence import least_excess, prompts_needed, smallest_effect
from rlhf_core.promotion.looks import first_alpha
from rlhf_core.rewards.canaries import BY_SCORE, KINDS
from rlhf_core.settings.evaluation import EvaluationConfig, ReportCardConfig, RewardGateConfig
from rlhf_core.settings.judge import ENDPOINT, PEOPLE, JudgeConfig
from rlhf_core.settings.model import ModelConfig, SamplingConfig
from rlhf_core.settings.onpolicy import OnPolicySection
from rlhf_core.settings.promotion import PromotionConfig
from rlhf_core.settings.tournament import TournamentConfig
from rlhf_core.settings.training import RewardModelConfig, TrainingSection
from rlhf_core.stages.evaluation import PAIRS
from rlhf_core.stages.table import STAGES, StageSpec
from rlhf_core.training.learner import adapt

CHAMPION: Final = "champion"
POINTS = 0.05  # an improvement that many hope for, in a win rate


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True)


class NetworkPlan(_Facts):
    """The trainable and frozen parameters of one network."""

    network: str
    parameters: int
    lora_rank: int  # 0: all parameters train
    frozen: int


class StagePlan(_Facts):
    """The work of a stage."""

    stage: str
    steps: int | None  # of the optimizer, at most; None without one
    work: str
    networks: tuple[
        NetworkPlan, ...
    ]  # empty: nothing, or it depends on a model that was not looked up


class Plan(_Facts):
    """The work of all stages, and how certain the results can be."""

    stages: tuple[StagePlan, ...]
    certainty: tuple[str, ...]
    warnings: tuple[str, ...]


class Sections(NamedTuple):
    """The settings of a pipeline that its work depends on."""

    model: ModelConfig
    trainings: Mapping[str, TrainingSection]  # by stage, in order; without reused models
    sampling: SamplingConfig
    report_card: ReportCardConfig
    evaluation: EvaluationConfig
    reward_gate: RewardGateConfig
    promotion: PromotionConfig
    tournament: TournamentConfig = TournamentConfig()
    judge: JudgeConfig = JudgeConfig()


def make_plan(sections: Sections, validation: Validation) -> Plan:
    """The plan for validated data.

    Raises: ModelError when the base model cannot be found, or its family has no scalar head;
        ConfigError when a text may be longer than the model reads, or an adapter does not fit.
    """
    return Plan(
        stages=tuple(_stages(sections, validation)),
        certainty=tuple(_certainty(sections, validation)),
        warnings=tuple(_warnings(sections, validation)),
    )


# --- steps and parameters ------------------------------------------------------------------------


ROWS = {"demonstrations": "demonstration", "preferences": "vote", "prompts": "prompt"}


def _stages(sections: Sections, validation: Validation) -> Iterator[StagePlan]:
    # Parameters are known only if training starts from the base model, not a registered one.
    base = outline(sections.model, validation.vocabulary) if "sft" in sections.trainings else None
    if base is not None:
        require_context(base, sections.sampling.max_length, SAMPLING_LENGTH)
    for name, section in sections.trainings.items():
        spec = STAGES[name]
        if spec.optimises:
            yield _report_card(sections.report_card, validation)
        longest = getattr(section, "max_length", None)
        if base is not None and longest is not None:
            require_context(base, longest, f"{name}.max_length")
        steps, work = _work(section, spec, validation)
        learnt = tuple(
            fact
            for network, kind in spec.learns.items()
            if network != "critic" or "reward_model" in sections.trainings
            for fact in (_of_policy if kind == "policy" else _of_scalar)(base, section, network)
        )
        yield StagePlan(stage=name, steps=steps, work=work, networks=learnt)
    if sections.tournament.on:
        yield _tournament(sections, validation)
    k, n = sections.evaluation.samples_per_prompt, sections.evaluation.best_of
    others = "the base model, the policy" if sections.evaluation.base else "the policy"
    answers = f"{max(k, n)} answers of SFT, {k} of {others} and a champion"
    prompts = _evaluated(sections, validation)
    yield StagePlan(
        stage="evaluation", steps=None, work=f"{_many(prompts, 'prompt')}: {answers}", networks=()
    )


def _tournament(sections: Sections, validation: Validation) -> StagePlan:
    """Who meets on what before the evaluation."""
    config = sections.tournament
    kept = [getattr(section, "keep_every", 0) for section in sections.trainings.values()]
    prompts = min(config.prompts, validation.tables["prompts"].train)
    work = (
        f"SFT and {config.checkpoints} checkpoints, kept every {_many(max(kept), 'iteration')}: "
        f"{_many(config.samples_per_prompt, 'answer')} of each to "
        f"{_many(prompts, 'training prompt')}, {config.verdicts:,} verdicts at most"
    )
    return StagePlan(stage="tournament", steps=None, work=work, networks=())


def _report_card(config: ReportCardConfig, validation: Validation) -> StagePlan:
    """What is asked of the reward model before a policy is trained on it."""
    votes = _many(min(config.votes, validation.tables["preferences"].eval), "held-out vote")
    work = f"{votes}, {_many(config.samples, 'sample')} of SFT, known-bad answers"
    return StagePlan(stage="report_card", steps=None, work=work, networks=())


def _work(
    section: TrainingSection, spec: StageSpec, validation: Validation
) -> tuple[int | None, str]:
    """The maximal number of optimizer steps, and a description."""
    epochs = getattr(section, "epochs", 1)
    if spec.passes_over is not None:
        rows = validation.tables[spec.passes_over].train
        return _passes(section, epochs, rows, ROWS[spec.passes_over])
    if not isinstance(section, OnPolicySection):
        return None, ""
    minibatches = section.updates // (section.iterations * epochs)
    return section.updates, (
        f"{_many(section.iterations, 'iteration')} of {section.rollout_size} responses: "
        f"{_many(epochs, 'epoch')} of {_many(minibatches, 'update')}"
    )


def _passes(section: TrainingSection, epochs: int, rows: int, what: str) -> tuple[int, str]:
    """The optimizer steps of some epochs, and a description."""
    steps = epochs * math.ceil(rows / section.batch_size)
    size = section.batch_size
    return steps, f"{_many(epochs, 'epoch')} of {_many(rows, what)}, {size} a step"


def _of_policy(
    base: PreTrainedModel | None, section: TrainingSection, name: str
) -> tuple[NetworkPlan, ...]:
    return () if base is None else (_learnt(name, Network(deepcopy(base)), section),)


def _of_scalar(
    base: PreTrainedModel | None, section: TrainingSection, name: str
) -> tuple[NetworkPlan, ...]:
    if base is None:
        return ()
    found = _learnt(name, ScalarModel.outline(base), section)
    if isinstance(section, RewardModelConfig) and section.members > 1:
        # Each has an adapter and a head; what is frozen is there once.
        found = found.model_copy(
            update={
                "network": f"{name}, {section.members} members",
                "parameters": section.members * found.parameters,
            }
        )
    return (found,)


def _learnt(name: str, network: Network, section: TrainingSection) -> NetworkPlan:
    whole = _size(network)
    adapt(network, section, "plan", seed=0, stream="plan")
    learnt = _size(network)
    # With an adapter, the head trains too; the rest of the network is frozen.
    kept = [p for n, p in network.learnable().items() if ".lora_" not in n]
    frozen = whole - sum(p.numel() for p in kept)
    return NetworkPlan(network=name, parameters=learnt, lora_rank=section.lora_rank, frozen=frozen)


def _size(network: Network) -> int:
    return sum(parameter.numel() for parameter in network.learnable().values())


# --- certainty ---------------------------------------------------------------------------------


def _evaluated(sections: Sections, validation: Validation) -> int:
    """How many held-out prompts the evaluation will use."""
    return min(sections.evaluation.prompts, validation.tables["prompts"].eval)


def _certainty(sections: Sections, validation: Validation) -> Iterator[str]:
    """Approximate: all answers to one prompt count as one."""
    prompts = _evaluated(sections, validation)
    each = sections.evaluation.samples_per_prompt
    yield (
        f"Decision: {_many(prompts, 'held-out prompt')}, {_many(each, 'answer')} to each; a win "
        f"rate near 0.5 will be known to about ± {_half_width(prompts):.2f}."
        f"{_first_look(sections.promotion, prompts)}"
    )
    if sections.judge.source == ENDPOINT:
        yield _requests(sections, prompts)
    if sections.judge.source == PEOPLE:
        yield _people_asked(sections, prompts)
    if "reward_model" in sections.trainings:
        votes = validation.tables["preferences"]
        yield (
            f"Reward model: {_many(votes.eval, 'held-out vote')} on "
            f"{_many(votes.eval_prompts, 'prompt')}; an accuracy near 0.5 will be known to about "
            f"± {_half_width(votes.eval_prompts):.2f}."
        )


def _first_look(promotion: PromotionConfig, prompts: int) -> str:
    """What so many prompts show at the first look at a champion; empty if nothing."""
    alpha, over = first_alpha(promotion.alpha), promotion.asked(CHAMPION)
    effect, needed = smallest_effect(prompts, over, alpha), prompts_needed(POINTS, over, alpha)
    if not effect or needed is None:
        return ""
    return (
        f" At the first look (level {alpha:.3g}) the gate shows that it exceeds {over:g} in 80 of "
        f"100 evaluations if it is truly {over + effect:.2f}; for {over + POINTS:g} it needs "
        f"{_many(needed, 'prompt')}."
    )


def _people_asked(sections: Sections, prompts: int) -> str:
    """What people are asked, if no two answers are equal and nothing was asked before."""
    people = sections.judge.people
    verdicts = _verdicts(sections, prompts)
    contest = sections.tournament.verdicts if sections.tournament.on else 0
    return (
        f"Judge: people are asked about at most {_many(verdicts + contest, 'pair')}, "
        f"{verdicts:,} of the evaluation"
        + (f" and {contest:,} of the tournament" if contest else "")
        + f", {_many(people.votes_per_pair, 'vote')} on each; the run waits until "
        f"{people.enough:.0%} are answered, {people.days:g} days at most."
    )


def _verdicts(sections: Sections, prompts: int) -> int:
    """The verdicts of an evaluation with a champion."""
    each = sections.evaluation.samples_per_prompt
    return sum(prompts * (1 if "best_of_n" in pair else each) for pair in PAIRS)


def _requests(sections: Sections, prompts: int) -> str:
    """What an endpoint is asked, in both orders, if nothing is remembered or repeated."""
    judge, verdicts = sections.judge, _verdicts(sections, prompts)
    contest = sections.tournament.verdicts if sections.tournament.on else 0
    # The kinds that a comparison can meet; a stage that asks meets them first.
    canaries = (len(KINDS) - len(BY_SCORE)) * judge.canary_prompts
    total = 2 * (verdicts + contest + canaries)
    return (
        f"Judge: at most {total:,} requests to {judge.endpoint.model}, two for each of "
        f"{_many(verdicts, 'verdict')} of the evaluation"
        + (f", {contest:,} of the tournament" if contest else "")
        + f" and {canaries:,} on canaries."
    )


def _warnings(sections: Sections, validation: Validation) -> Iterator[str]:
    promotion, prompts = sections.promotion, _evaluated(sections, validation)
    more = "raise data.eval_fraction, or add evaluation data"
    fix = "raise evaluation.prompts" if prompts == sections.evaluation.prompts else more
    alpha = first_alpha(promotion.alpha)
    for what, setting, rate in (
        ("No policy can be promoted", "promotion.min_win_rate", promotion.asked("sft")),
        (
            "No champion can be replaced",
            "promotion.min_win_rate_over_champion",
            promotion.asked(CHAMPION),
        ),
    ):
        if rate > 0 and not evidence.can_show(prompts, rate, alpha):
            yield (
                f"{what}: {_many(prompts, 'held-out prompt')} cannot show {setting} {rate:g}, even "
                f"if every one of them is won; {_gate_needs(rate, alpha, fix)}."
            )
            break
    else:
        yield from _sign_warning(promotion, prompts, alpha, fix)
        if prompts < promotion.min_prompts:
            yield (
                f"No policy can be promoted: {_many(prompts, 'held-out prompt')} cannot meet "
                f"promotion.min_prompts {promotion.min_prompts}; {fix}."
            )
    if "reward_model" not in sections.trainings:
        return
    prompts = validation.tables["preferences"].eval_prompts
    gate = sections.reward_gate.min_accuracy
    if gate and not can_show(prompts, gate):
        yield (
            f"No policy will be trained: held-out votes on {_many(prompts, 'prompt')} cannot show "
            f"reward_gate.min_accuracy {gate:g}, even if all are predicted correctly; "
            f"{_needed(gate, more)}."
        )
    elif not can_show(prompts, 0.5):
        yield (
            f"Held-out votes on {_many(prompts, 'prompt')} cannot show that the reward model is "
            f"better than chance; {_needed(0.5, more)}."
        )
    yield from _canary_warning(sections, prompts)


def _sign_warning(
    promotion: PromotionConfig, prompts: int, alpha: float, fix: str
) -> Iterator[str]:
    """The signs of canaries in the answers are a family of tests, too."""
    most, level = promotion.max_sign_excess, alpha / len(SIGNS)
    if most < 1 and least_excess(prompts, level) >= most:
        z2 = NormalDist().inv_cdf(1 - level) ** 2
        needed = math.floor(z2 * (1 - most) / most) + 1
        yield (
            f"No policy can be promoted: {_many(prompts, 'held-out prompt')} cannot show "
            f"promotion.max_sign_excess {most:g} for {len(SIGNS)} kinds of canary, even if no "
            f"answer has a sign; at least {needed} are needed ({fix})."
        )


def _gate_needs(rate: float, alpha: float, fix: str) -> str:
    """How many prompts can show a rate at a level, if all are won."""
    if rate == 1:
        return "no number of them can; lower it"
    needed = next(n for n in count(1) if evidence.can_show(n, rate, alpha))
    return f"at least {needed} are needed ({fix})"


def _canary_warning(sections: Sections, prompts: int) -> Iterator[str]:
    """The canary `keyword` has only half of the prompts, the other half chooses the word."""
    most, asked = sections.reward_gate.max_canary_share, sections.report_card.canary_prompts
    half = min(prompts, asked) // 2
    if most < 1 and not can_show(half, 1 - most):
        fix = "raise report_card.canary_prompts" if asked <= prompts else "raise data.eval_fraction"
        yield (
            f"No policy will be trained: a canary on {_many(half, 'prompt')}, half of those that "
            f"there are, cannot show reward_gate.max_canary_share {most:g}, even if it never wins; "
            f"{_needed(1 - most, fix)}."
        )


def _needed(least: float, fix: str) -> str:
    """How many prompts can show a share above `least`: n / (n + z²) > least, by Wilson."""
    if least == 1:
        return "no number of them can; lower it"
    z2 = NormalDist().inv_cdf(0.975) ** 2
    return f"at least {math.floor(z2 * least / (1 - least)) + 1} are needed ({fix})"


def _half_width(prompts: int) -> float:
    interval = win_rate(0, prompts, 0)
    return (interval.high - interval.low) / 2


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
