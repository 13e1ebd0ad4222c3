"""Evaluation: SFT, the policy, best-of-n and the champion answer the same held-out prompts.

Every arm is measured by the texts it writes, with the same reward model, at the same temperature.
Intervals are 95 % bootstraps that draw whole prompts, since answers to one prompt are correlated.
If a hidden truth is known (`true_reward`), it decides who wins; otherwise the reward model does,
which is biased in favour of a policy that was trained on it.

Best-of-n is the reference point for over-optimisation: of n samples of the SFT policy it keeps the
best under the reward model, at the known cost of log n - (n - 1)/n nats.
"""

from dataclasses import dataclass

import pandas as pd
from pydantic import Field
from torch import Tensor

from rlhf_core import figures
from rlhf_core.backbone.networks import Policy, Precision
from rlhf_core.backbone.sampling import SamplingConfig
from rlhf_core.data.encoding import (
    render_prompt,
)
from rlhf_core.data.prepared import read_table
from rlhf_core.errors import DataError
from rlhf_core.evaluation.answers import Answers, Bench, answer
from rlhf_core.evaluation.chart import Chart, draw
from rlhf_core.evaluation.comparison import best_of_each, compare, first_of_each, measure_arm
from rlhf_core.evaluation.judged import Examined, examine, judge_numbers, reward_score
from rlhf_core.evaluation.overoptimisation import Measure, Path, Point, best_of_n_path
from rlhf_core.evaluation.scorecard import ARMS, ArmName, Scorecard
from rlhf_core.functional.ranking import (
    Interval,
)
from rlhf_core.judges.config import JudgeConfig
from rlhf_core.judges.load import JUDGE, load_judge
from rlhf_core.rewards.ensemble import MemberSection
from rlhf_core.rewards.functions import RewardFunction, RewardPlaces, load_function
from rlhf_core.rewards.models import load_reward_model
from rlhf_core.rewards.shaping import LengthPenaltySection
from rlhf_core.types import Report
from rlhf_core.work import Work


class EvaluationConfig(MemberSection):
    """Settings of the evaluation."""

    prompts: int = Field(128, ge=2, le=1_000_000, description="Most held-out prompts to answer")
    samples_per_prompt: int = Field(
        2, ge=1, le=10_000, description="Answers of each policy to each prompt"
    )
    best_of: int = Field(
        8, ge=1, le=10_000, description="n of best-of-n: SFT samples to choose from"
    )
    best_of_penalty: LengthPenaltySection = Field(
        default_factory=LengthPenaltySection,
        description="Best-of-n takes the best by the reward less this price of long answers",
    )
    true_reward: str = Field(
        "",
        description="Import path module:function of the known truth, called with prompts and "
        "responses (lists of str), returns one number each; empty = none",
    )
    sample_rows: int = Field(32, ge=1, description="Prompts shown in the table of samples")
    precision: Precision = Field(
        "float32",
        description="Type of matrix products in every arm and in the reward model; "
        "bfloat16 is faster on GPUs and on CPUs with instructions for it",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationReport(Report):
    """The scorecard, with tables and plots."""

    scorecard: Scorecard

    @property
    def result(self) -> Scorecard:
        """The scorecard, which decides about promotion."""
        return self.scorecard

    def summary(self) -> dict[str, float]:
        """Every number of the scorecard as `arm/measure` or `win_rate/candidate_over_opponent`."""
        numbers: dict[str, float] = {}
        for arm in self.scorecard.arms:
            for name, value in arm:
                if isinstance(value, Interval):
                    numbers |= _bounds(f"{arm.name}/{name}", value)
                elif isinstance(value, float):
                    numbers[f"{arm.name}/{name}"] = value
        for c in self.scorecard.comparisons:
            numbers |= _bounds(f"win_rate/{c.candidate}_over_{c.opponent}", c.win_rate)
        if self.scorecard.judge is not None:
            numbers |= judge_numbers(self.scorecard.judge)
        return numbers


def evaluate(config: EvaluationConfig, work: Work) -> EvaluationReport:
    """Let every arm answer the held-out prompts, and compare the answers.

    Args:
        work: inputs sft, policy, reward and data; champion, and judge, if there are such models;
            sections sampling and judge.

    Raises: ModelError, DataError, ConfigError for errors that a user can fix.
    """
    sampling, logger, device = work.section(SamplingConfig), work.logger, work.device
    table = read_table(work.inputs["data"], "prompts", "eval")
    if table.empty:
        raise DataError("there are no held-out prompts; raise data.eval_fraction")
    logger.progress(0, 4, "SFT policy")
    logger.phase("loading the models")
    sft_policy, tokenizer = Policy.load(work.inputs["sft"], device, config.precision)
    reward_model, reward_tokenizer = load_reward_model(
        work.inputs["reward"], device, config.precision, members=config
    )
    bench = Bench(
        prompts=list(table["prompt"].iloc[: config.prompts]),
        sft=sft_policy,
        tokenizer=tokenizer,
        reward_model=reward_model,
        reward_tokenizer=reward_tokenizer,
        truth=_known_truth(config, work.rewards_from),
        sampling=sampling,
        seed=work.seed,
        logger=logger,
    )
    judge = load_judge(
        work.section(JudgeConfig),
        registered=work.inputs.get(JUDGE),
        max_length=sampling.max_length,
        device=device,
        precision=config.precision,
        members=config,
        places=work.rewards_from,
        judging=work.judging,
        reward=None if bench.truth is None else reward_score(bench),
    )
    k, n = config.samples_per_prompt, config.best_of
    others: tuple[ArmName, ...] = ("policy", "champion")
    answers: dict[ArmName, Answers] = {}
    pool = answer(bench, "sft", sft_policy, tokenizer, max(k, n))
    answers["sft"] = pool.pick(first_of_each(pool.prompt, k))
    price = config.best_of_penalty.excess(pool.tokens)
    answers["best_of_n"] = pool.pick(best_of_each(pool.prompt, pool.proxy - price, n))
    curve = _best_of_n(pool, pool.proxy - price, bench.seed)
    for point in curve.points:
        logger.metrics(_curve_metrics(point), point.number)
    for done, name in enumerate(others, start=2):
        logger.progress(done, 4, name)
        if name in work.inputs:
            logger.phase(f"loading the {name}")
            actor = Policy.load(work.inputs[name], device, config.precision)
            answers[name] = answer(bench, name, *actor, k)
    logger.progress(4, 4, "comparisons")
    arms = {name: answers[name] for name in ARMS if name in answers}
    most = work.section(JudgeConfig).canary_prompts
    examined = examine(
        judge, bench, arms["sft"], work.inputs["data"], most=most, judging=work.judging
    )
    return _report(config, bench, arms, Chart(title="Best of n", paths=(curve,)), examined)


def _known_truth(config: EvaluationConfig, places: RewardPlaces | None) -> RewardFunction | None:
    if not config.true_reward:
        return None
    return load_function(config.true_reward, setting="evaluation.true_reward", places=places)


def _best_of_n(pool: Answers, scores: Tensor, seed: int) -> Path:
    """What best-of-n gains for every n that the pool allows; `scores` select."""
    prompts = int(pool.prompt[-1]) + 1
    measures: dict[Measure, Tensor] = {"proxy": pool.proxy.view(prompts, -1)}
    if pool.true is not None:
        measures["truth"] = pool.true.view(prompts, -1)
    return best_of_n_path("SFT samples", scores.view(prompts, -1), measures, seed)


def _curve_metrics(point: Point) -> dict[str, float]:
    """A point of best-of-n as metrics, whose step is n."""
    gains = {f"best_of_n/{measure}_gain": gain for measure, gain in point.gains.items()}
    numbers = {"best_of_n/kl": point.kl.value}
    for name, interval in gains.items():
        numbers |= _bounds(name, interval)
    return numbers


def _report(
    config: EvaluationConfig,
    bench: Bench,
    answers: dict[ArmName, Answers],
    best_of_n: Chart,
    judge: Examined,
) -> EvaluationReport:
    arms = tuple(
        measure_arm(name, found, config.best_of, bench.seed) for name, found in answers.items()
    )
    pairs: list[tuple[ArmName, ArmName]] = [
        ("policy", "sft"),
        ("best_of_n", "sft"),
        ("policy", "best_of_n"),
        ("policy", "champion"),
    ]
    comparisons = tuple(
        compare(pair, answers, bench.seed, bench.prompts, judge.on(*pair))
        for pair in pairs
        if all(name in answers for name in pair)
    )
    bars: dict[str, list[Interval | None]] = {
        "true reward": [arm.true_reward for arm in arms],
        "reward model": [arm.proxy_reward for arm in arms],
        "KL to SFT (nats a sequence)": [arm.kl for arm in arms],
    }
    if bench.truth is None:
        del bars["true reward"]
    plots = {
        "evaluation_arms": figures.arms([arm.name for arm in arms], bars),
        "evaluation_best_of_n": draw([best_of_n]),
    }
    if bench.truth is not None:
        plots["evaluation_proxy_against_truth"] = figures.proxy_against_truth(
            {
                name: list(zip(a.proxy.tolist(), a.true.tolist(), strict=True))
                for name, a in answers.items()
                if a.true is not None
            }
        )
    return EvaluationReport(
        scorecard=Scorecard(arms=arms, comparisons=comparisons, judge=judge.facts(comparisons)),
        tables={
            "evaluation_samples": _samples(config, bench, answers),
            "evaluation_best_of_n": pd.DataFrame(best_of_n.rows()),
            **judge.tables(config.sample_rows),
        },
        figures=plots,
    )


def _samples(
    config: EvaluationConfig, bench: Bench, answers: dict[ArmName, Answers]
) -> pd.DataFrame:
    """The first answer of every arm to some prompts."""
    rows = []
    for p, prompt in enumerate(bench.prompts[: config.sample_rows]):
        for name, arm in answers.items():
            i = int((arm.prompt == p).nonzero()[0])
            rows.append(
                {
                    "prompt": render_prompt(prompt, bench.tokenizer),
                    "arm": name,
                    "response": arm.texts[i],
                    "reward_model": round(arm.proxy[i].item(), 3),
                    "true_reward": None if arm.true is None else round(arm.true[i].item(), 3),
                }
            )
    return pd.DataFrame(rows)


def _bounds(name: str, interval: Interval) -> dict[str, float]:
    """An interval as three numbers."""
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
