"""The trial of a stage: the same stage on less, and how often the run does each of its parts.

A trial has the models, the micro-batches and the lengths of texts of the run, so its parts take the
time and the memory of the run's. It has fewer steps, iterations, rows or prompts. What it does once
in a step is multiplied; what a stage does once in all is taken as it is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from rlhf_core.config import Section
from rlhf_core.data.prepared import Split
from rlhf_core.estimate.clock import Span
from rlhf_core.settings.evaluation import EvaluationConfig, ReportCardConfig
from rlhf_core.settings.fields import TableKind
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.onpolicy import GroupSection, OnPolicySection
from rlhf_core.settings.tournament import TournamentConfig
from rlhf_core.settings.training import DPOConfig, RewardModelConfig, SFTConfig, TrainingSection

STEP: Final = "between two steps"
ANSWERING = ("answers", "scoring", "KL to SFT", "perplexity under SFT", "true reward")
MOST_VERDICTS = 200  # of the trial of a tournament
UPDATES = ("updating", "updating the critic")
# Guesses, which only decide how much a trial does; what it took is measured.
CPU_SPEED, GPU_SPEED = 4e10, 1e14  # floating-point operations a second
DECODING = 3  # a token that is sampled takes this many times the time of one that is read
TRAINING = 3  # forward and backward by forward


class Facts(BaseModel):
    """What the size of a trial depends on, beside the settings."""

    model_config = ConfigDict(frozen=True)

    parameters: int  # of the policy
    train: Mapping[str, int]  # rows by table
    eval: Mapping[str, int]
    prompt_tokens: float  # mean of the prompts
    answer_tokens: float  # mean of an answer after fine-tuning
    demonstration_tokens: float  # mean of prompt + response
    pair_tokens: float  # mean of prompt + both answers
    seconds: float = 10.0  # to spend on the repeated parts of a stage
    gpu: bool = False

    def guess(self, tokens: float) -> float:
        """Seconds to read tokens once."""
        return 2 * self.parameters * max(tokens, 1) / (GPU_SPEED if self.gpu else CPU_SPEED)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Less of a stage, and what the run has more of.

    Args:
        config: the settings of the trial.
        rows: most rows to keep of a table for training, and for evaluation, by table.
        units: steps or iterations of the run; 0 = the stage has none.
        tried: those of the trial.
        of_a_unit: parts of each unit, by phase: how many times as much the run does in one unit.
        once: parts that do not belong to a unit: how many times as much the run does in all.
        micro: micro-batches of an optimizer step in the trial and in the run.
        says: what the run does, for people.
        unit: what a unit is called.
    """

    config: Section
    rows: Mapping[tuple[TableKind, Split], int] = field(default_factory=dict)
    units: float = 0
    tried: int = 0
    of_a_unit: Mapping[str, float] = field(default_factory=dict)
    once: Mapping[str, float] = field(default_factory=dict)
    micro: tuple[float, float] = (1, 1)
    says: str = ""
    unit: str = "step"

    @property
    def samples_anew(self) -> bool:
        """Whether each unit begins with answers of the policy."""
        return self.unit == "iteration"

    @property
    def warm(self) -> int:
        """How many units are not counted, since the first one allocates and compiles."""
        return 1 if self.tried > 1 else 0


def sized(section: Section, **changes: Any) -> Any:
    """The settings with other values, checked as any others."""
    return type(section).model_validate({**section.model_dump(), **changes})


def trial(stage: str, config: Section, sections: Mapping[str, Section], facts: Facts) -> Trial:
    """The trial of a stage of the table."""
    sampling = next((s for s in sections.values() if isinstance(s, SamplingConfig)), None)
    if isinstance(config, OnPolicySection):
        return _on_policy(config, sampling or SamplingConfig(), facts)
    if isinstance(config, SFTConfig):
        return _sft(config, facts)
    if isinstance(config, RewardModelConfig):
        return _reward_model(stage, config, sampling or SamplingConfig(), facts)
    if isinstance(config, DPOConfig):
        return _dpo(config, facts)
    if isinstance(config, EvaluationConfig):
        return _evaluation(config, facts)
    if isinstance(config, ReportCardConfig):
        return _report_card(config, sampling or SamplingConfig(), facts)
    if isinstance(config, TournamentConfig):
        return _tournament(config, facts)
    return Trial(config=config)


# --- how much of each stage ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Passes:
    """Epochs over rows: the sizes of the run, and those of the trial."""

    rows: int  # of the trial
    batch: int
    epochs: int
    steps: int  # of the run
    tried: int
    micro: tuple[float, float]  # micro-batches of a step: trial, run


def _passes(
    section: TrainingSection, rows: int, epochs: int, tokens: float, facts: Facts
) -> _Passes:
    size, part = section.batch_size, section.micro_batch_size
    steps = epochs * math.ceil(rows / size)
    # A step of the run, on average: the last of an epoch may be short.
    full, rest = divmod(rows, size)
    parts = epochs * (full * math.ceil(size / part) + math.ceil(rest / part)) / max(steps, 1)
    each = TRAINING * facts.guess(tokens * min(part, size, max(rows, 1)))
    most = math.ceil(min(size, max(rows, 1)) / part)
    tried = min(most, max(2, int(0.4 * facts.seconds / each)))
    batch = size if tried == most else tried * part
    seconds = each * tried
    count = 1 + max(1, min(12, int(0.6 * facts.seconds / seconds)))
    count = min(count, steps)
    kept = min(rows, count * batch)
    again = max(1, min(epochs, math.ceil(count * batch / max(kept, 1))))
    done = again * math.ceil(kept / batch)
    return _Passes(kept, batch, again, steps, done, (tried, parts))


def _kept(available: int, part: int, seconds: float, each: float) -> int:
    """How many rows a pass without gradients reads in a time: two batches or more, or, where one
    takes too long, a part of it."""
    batches = int(seconds / max(each * part, 1e-9))
    rows = part * max(2, batches) if batches else max(2, int(seconds / each))
    return max(1, min(available, rows))


def _ratio(run: float, tried: float) -> float:
    return run / tried if tried else 1.0


def _sft(config: SFTConfig, facts: Facts) -> Trial:
    train, held_out = facts.train["demonstrations"], facts.eval["demonstrations"]
    tokens = facts.demonstration_tokens
    found = _passes(config, train, config.epochs, tokens, facts)
    measured = _kept(held_out, config.micro_batch_size, 0.3 * facts.seconds, facts.guess(tokens))
    often = min(config.evaluations, found.steps)
    return Trial(
        config=sized(config, epochs=found.epochs, batch_size=found.batch, evaluations=1),
        rows={("demonstrations", "train"): found.rows, ("demonstrations", "eval"): measured},
        units=found.steps,
        tried=found.tried,
        micro=found.micro,
        once={
            "held-out loss": often * _ratio(held_out, measured),
            "saving the best weights": often,
            "encoding the demonstrations": _ratio(train + held_out, found.rows + measured),
        },
        says=f"{found.steps:,} steps",
    )


def _reward_model(
    stage: str, config: RewardModelConfig, sampling: SamplingConfig, facts: Facts
) -> Trial:
    train, held_out = facts.train["preferences"], facts.eval["preferences"]
    if stage == "held_out" or config.votes != "all":
        train = math.ceil(train / 2)
    tokens = facts.pair_tokens
    members = config.members
    found = _passes(config, train, config.epochs, tokens * members, facts)
    # Votes on one half of the prompts: twice as many rows have to be there.
    halves = 2 if config.votes != "all" else 1
    scored = _kept(
        held_out, config.micro_batch_size, 0.2 * facts.seconds, members * facts.guess(tokens)
    )
    asked = config.normalization_samples
    answer = facts.guess(facts.prompt_tokens + DECODING * facts.answer_tokens)
    samples = max(2, _kept(asked, sampling.batch_size, 0.3 * facts.seconds, answer))
    return Trial(
        config=sized(
            config,
            epochs=found.epochs,
            batch_size=found.batch,
            normalization_samples=samples,
        ),
        rows={
            ("preferences", "train"): halves * found.rows,
            ("preferences", "eval"): max(scored, 8),
        },
        units=found.steps,
        tried=found.tried,
        micro=found.micro,
        once={
            "held-out votes": _ratio(held_out, min(held_out, max(scored, 8))),
            "encoding the preferences": _ratio(
                train + held_out, found.rows + min(held_out, max(scored, 8))
            ),
            "normaliser: sampling": _ratio(asked, samples),
            "normaliser: scoring": _ratio(asked, samples),
        },
        says=f"{found.steps:,} steps" + (f" of {members} members" if members > 1 else ""),
    )


def _dpo(config: DPOConfig, facts: Facts) -> Trial:
    train, held_out = facts.train["preferences"], facts.eval["preferences"]
    found = _passes(config, train, config.epochs, facts.pair_tokens, facts)
    scored = _kept(
        held_out, config.micro_batch_size, 0.2 * facts.seconds, facts.guess(facts.pair_tokens)
    )
    scored = min(held_out, max(scored, 8))
    return Trial(
        config=sized(config, epochs=found.epochs, batch_size=found.batch),
        rows={("preferences", "train"): found.rows, ("preferences", "eval"): scored},
        units=found.steps,
        tried=found.tried,
        micro=found.micro,
        once={
            "reference": _ratio(train, found.rows),
            "held-out reference": _ratio(held_out, scored),
            "held-out votes": _ratio(held_out, scored),
            "encoding the preferences": _ratio(train + held_out, found.rows + scored),
        },
        says=f"{found.steps:,} steps",
    )


def _on_policy(config: OnPolicySection, sampling: SamplingConfig, facts: Facts) -> Trial:
    group = config.group_size if isinstance(config, GroupSection) else 1
    tokens = facts.prompt_tokens + facts.answer_tokens
    networks = 4 if hasattr(config, "critic_learning_rate") else 3
    trained = networks - 2

    def seconds(rows: int, epochs: int) -> float:
        sampled = facts.prompt_tokens + DECODING * facts.answer_tokens
        read = tokens * (networks + TRAINING * trained * epochs)
        return facts.guess(rows * (sampled + read))

    rows, epochs, size = config.rollout_size, config.epochs, config.batch_size
    often = 2  # iterations: one to warm up
    if seconds(rows, epochs) * often > facts.seconds:
        epochs = 1
    parts = (
        min(rows, sampling.batch_size),
        size,
        2 * config.micro_batch_size,
        config.micro_batch_size,
    )
    for smaller in parts:
        if seconds(rows, epochs) * often <= facts.seconds:
            break
        smaller = max(group, -(-smaller // group) * group, 2)
        rows = min(rows, smaller)
    size = min(size, rows)
    each = seconds(rows, epochs)
    tried = (
        1
        if each > 3 * facts.seconds
        else min(1 + max(1, min(4, int(facts.seconds / each))), config.iterations)
    )
    monitor = config.monitor
    watched = monitor.prompts if monitor.on else 0
    if monitor.on and seconds(watched, 0) > facts.seconds:
        watched = max(2, min(watched, rows))
    calm = {name: "warn" for name in type(monitor).model_fields if name.startswith("at_")}
    looks = math.ceil(config.iterations / monitor.every) if monitor.on else 0
    kept = config.iterations // config.keep_every if config.keep_every else 0
    changes: dict[str, Any] = {
        "iterations": tried,
        "rollout_size": rows,
        "batch_size": size,
        "epochs": epochs,
        "update_kl_limit": 0.0,
        "at_kl_budget": "warn",
        "keep_every": tried if kept else 0,
        "monitor": {**monitor.model_dump(), **calm, "prompts": watched, "every": 1},
    }
    updates = config.updates / config.iterations
    tried_updates = epochs * math.ceil(rows / size)
    here, there = (
        math.ceil(size / config.micro_batch_size),
        math.ceil(config.batch_size / config.micro_batch_size),
    )
    of_watch = _ratio(looks, config.iterations) * _ratio(monitor.prompts, watched)
    more = _ratio(config.rollout_size, rows)
    prompts = facts.train["prompts"]
    new = min(prompts, config.iterations * config.rollout_size / group)
    return Trial(
        config=sized(config, **changes),
        rows={("prompts", "train"): 4096, ("prompts", "eval"): 4096},
        units=config.iterations,
        tried=tried,
        of_a_unit={
            "sampling": more,
            "scoring": more,
            "updating": updates / tried_updates,
            "updating the critic": updates / tried_updates,
            "monitor: sampling": of_watch,
            "saving a milestone": 0.0,
            STEP: 1.0,
            "reference answers": _ratio(new, config.iterations * rows / group),
        },
        once={
            "monitor: sampling the SFT policy": _ratio(monitor.prompts, watched),
            "saving a milestone": kept,
            "uploading and checking the milestones": kept,
            "encoding the prompts": _ratio(prompts, min(prompts, 4096)),
        },
        micro=(here, there),
        says=f"{config.iterations:,} iterations of {config.rollout_size:,} answers, "
        f"{config.updates:,} updates at most",
        unit="iteration",
    )


def _evaluation(config: EvaluationConfig, facts: Facts) -> Trial:
    prompts = min(config.prompts, facts.eval["prompts"])
    each, pool = config.samples_per_prompt, max(config.samples_per_prompt, config.best_of)
    others = 2 if config.base else 1
    seconds = facts.guess(_read_and_scored(facts))
    tried = min(prompts, max(4, int(facts.seconds / (seconds * (pool + others * each)))))
    few, few_pool = each, pool
    if seconds * tried * (pool + others * each) > 3 * facts.seconds:
        tried, few, few_pool = min(prompts, 2), 1, 1
    once: dict[str, float] = {}
    for arm in ("SFT policy", "policy", "base model"):
        ran, here = (pool, few_pool) if arm == "SFT policy" else (each, few)
        more = _ratio(prompts * ran, tried * here)
        once |= {f"{arm}: {what}": more for what in ANSWERING}
    return Trial(
        config=sized(
            config,
            prompts=max(2, tried),
            samples_per_prompt=few,
            best_of=min(config.best_of, few_pool),
        ),
        rows={("prompts", "eval"): max(tried, 2)},
        once=once,
        says=f"{prompts:,} prompts, {prompts * (pool + others * each):,} answers",
        unit="",
    )


def _read_and_scored(facts: Facts) -> float:
    """Tokens that are read for an answer which is sampled, scored and compared with SFT."""
    answer = facts.prompt_tokens + DECODING * facts.answer_tokens
    return answer + 4 * (facts.prompt_tokens + facts.answer_tokens)


def _report_card(config: ReportCardConfig, sampling: SamplingConfig, facts: Facts) -> Trial:
    votes = min(config.votes, facts.eval["preferences"])
    pair = facts.guess(facts.pair_tokens)
    examined = max(min(votes, 8), _kept(votes, config.batch_size, 0.3 * facts.seconds, pair))
    answer = facts.guess(facts.prompt_tokens + DECODING * facts.answer_tokens)
    asked = config.samples
    samples = max(2, _kept(asked, sampling.batch_size, 0.4 * facts.seconds, answer))
    of_canaries = min(config.canary_prompts, max(votes, 1))
    canaries = min(
        of_canaries, _kept(of_canaries, config.batch_size, 0.3 * facts.seconds, 10 * pair)
    )
    seen = "held-out votes", "samples of the SFT policy", "canaries"
    return Trial(
        config=sized(config, samples=samples, canary_prompts=canaries),
        rows={("preferences", "eval"): examined},
        once={
            f"{seen[0]}: held-out pairs": _ratio(votes, examined),
            f"{seen[1]}: samples": _ratio(asked, samples),
            f"{seen[1]}: scoring the samples": _ratio(asked, samples),
            f"{seen[2]}: canaries": _ratio(of_canaries, canaries),
        },
        says=f"{votes:,} votes, {asked:,} answers",
        unit="",
    )


def _tournament(config: TournamentConfig, facts: Facts) -> Trial:
    prompts = min(config.prompts, facts.train["prompts"])
    entrants = config.checkpoints + 1
    # SFT and the last policy play in the trial, which has no milestone; all of them in the run.
    seconds = 2 * config.samples_per_prompt * facts.guess(_read_and_scored(facts))
    tried = min(config.prompts, max(10, min(prompts, int(facts.seconds / seconds))))
    more = _ratio(prompts, min(prompts, tried))
    verdicts = min(config.verdicts, MOST_VERDICTS)
    return Trial(
        config=sized(config, prompts=tried, checkpoints=2, verdicts=verdicts),
        rows={("prompts", "train"): max(tried, 10)},
        once={
            **{f"sft: {what}": more for what in ANSWERING},
            **{f"policy: {what}": more * config.checkpoints for what in ANSWERING},
            "policy: loading policy": config.checkpoints,
            "verdicts: asking the judge": _ratio(config.verdicts, verdicts),
        },
        says=f"{entrants} policies, {prompts * entrants * config.samples_per_prompt:,} answers",
        unit="",
    )


# --- from the time of the trial to that of the run ------------------------------------------------


def run_seconds(plan: Trial, spans: Sequence[Span], *, cpu: bool = False) -> float:
    """What the run will take, from the spans of a trial (s).

    A phase in `of_a_unit`, or a batch, is a mean over the units after the first, times the units of
    the run; any other is there once.
    """
    of_a_unit = {STEP: 1.0, "batch": 1.0, "texts that the members share": 1.0, **plan.of_a_unit}

    def took(span: Span) -> float:
        return span.cpu_seconds if cpu else span.seconds

    counted = plan.tried - plan.warm
    total = 0.0
    for name in {span.what for span in spans}:
        mine = [span for span in spans if span.what == name]
        if plan.units and name in of_a_unit:
            warm = [span for span in mine if plan.warm <= span.unit < plan.tried]
            if name == STEP:  # after a step; what follows the last one is there once
                total += sum(took(span) for span in mine if span.unit == plan.tried)
            seconds = sum(map(took, warm)) / max(counted, 1) * plan.units * of_a_unit[name]
            if name in ("batch", *UPDATES):
                seconds *= _longer(plan.micro, [span for span in warm if span.parts], took)
            total += seconds
        if name not in of_a_unit or name in plan.once:
            factor = plan.once.get(name, 1.0)
            if name.endswith("-milestone"):
                factor = plan.once.get("uploading and checking the milestones", 1.0)
            total += factor * sum(map(took, mine))
    return total


def _longer(
    micro: tuple[float, float], spans: Sequence[Span], took: Callable[[Span], float]
) -> float:
    """How much longer a step of the run is than one of the trial, which has fewer micro-batches:
    the last micro-batch has the optimizer step in it, and the others have not."""
    here, there = micro
    last = [took(span) for span in spans if span.last]
    others = [took(span) for span in spans if not span.last]
    if here == there or not last:
        return 1.0
    end = sum(last) / len(last)
    each = sum(others) / len(others) if others else end
    return (end + (there - 1) * each) / (end + (here - 1) * each)
