"""Evaluation: base model, SFT, policy, best-of-n and champion answer the same held-out prompts.

Every arm is measured by the texts it writes, with the same reward model, at the same temperature.
Intervals are 95 % bootstraps that draw whole prompts, since answers to one prompt are correlated.
If a hidden truth is known (`true_reward`), it decides who wins; otherwise the reward model does,
which is biased in favour of a policy that was trained on it.

Best-of-n is the reference point for over-optimisation: of n samples of the SFT policy it keeps the
best under the reward model, at the known cost of log n - (n - 1)/n nats.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import pandas as pd
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_core import figures
from rlhf_core.backbone.base_model import base_of
from rlhf_core.backbone.networks import Policy
from rlhf_core.data.encoding import Prompt, render_prompt
from rlhf_core.data.mapped.rows import PreparedRows
from rlhf_core.data.prepared import read_table
from rlhf_core.errors import DataError, ModelError
from rlhf_core.evaluation.answers import Answers, Bench, answer
from rlhf_core.evaluation.chart import Chart, draw
from rlhf_core.evaluation.comparison import (
    at_equal_length,
    best_of_each,
    differ,
    first_of_each,
    matched,
    measure_arm,
    pairs_on,
    play,
    sum_up,
)
from rlhf_core.evaluation.diagnosis import diagnose
from rlhf_core.evaluation.judged import Examined, examine, judge_numbers, reward_score
from rlhf_core.evaluation.kept import kept
from rlhf_core.evaluation.leaks import find_prompt_leaks
from rlhf_core.evaluation.overoptimisation import Measure, Path, Point, best_of_n_path
from rlhf_core.evaluation.scorecard import (
    ARMS,
    Arm,
    ArmName,
    PromptLeaks,
    PromptSlice,
    Scorecard,
)
from rlhf_core.evaluation.signs import SIGNS, more_than
from rlhf_core.evaluation.slices import prompt_slices, slice_rate
from rlhf_core.functional.interval import Interval
from rlhf_core.judges.judge import Judge, Panel
from rlhf_core.judges.load import JUDGE, load_judge
from rlhf_core.rewards.functions import RewardFunction, RewardPlaces, load_function
from rlhf_core.rewards.models import load_reward_model
from rlhf_core.rewards.shaping import excess
from rlhf_core.settings.evaluation import EvaluationConfig
from rlhf_core.settings.fields import TABLE_KINDS
from rlhf_core.settings.judge import JudgeConfig
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.types import Report
from rlhf_core.work import Work

_log = logging.getLogger(__name__)

# Who is compared with whom, if both are there: candidate and opponent.
PAIRS: tuple[tuple[ArmName, ArmName], ...] = (
    ("policy", "sft"),
    ("best_of_n", "sft"),
    ("policy", "best_of_n"),
    ("policy", "champion"),
    ("sft", "base"),
    ("champion", "sft"),
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
            for kind, share in arm.signs.items():  # their bounds are in a table
                numbers[f"{arm.name}/sign_{kind}"] = share.value
        for c in self.scorecard.comparisons:
            pair = f"{c.candidate}_over_{c.opponent}"
            numbers |= _bounds(f"win_rate/{pair}", c.win_rate)
            if c.length_controlled is not None:
                numbers |= _bounds(f"length_controlled_win_rate/{pair}", c.length_controlled)
        for d in self.scorecard.differences:
            name = f"{d.first}_minus_{d.second}_over_{d.opponent}"
            numbers |= _bounds(f"win_rate_difference/{name}", d.difference)
        if (leaks := self.scorecard.leaks) is not None:
            numbers |= {
                "leaked_prompts": float(leaks.equal),
                "nearly_leaked_prompts": float(leaks.near),
            }
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
    table = read_table(work.inputs["data"], "prompts", "eval", limit=config.prompts)
    if table.empty:
        raise DataError("there are no held-out prompts; raise data.eval_fraction")
    tables = (PreparedRows(work.inputs["data"], kind, "train") for kind in TABLE_KINDS)
    trained_on = (row["prompt"] for rows in tables for row in rows)
    leaks = find_prompt_leaks(trained_on, list(table["prompt"]))
    logger.progress(0, 5, "SFT policy")
    logger.phase("loading the models")
    sft_policy, tokenizer = Policy.load(work.inputs["sft"], device, config.precision)
    reward_model, reward_tokenizer = load_reward_model(
        work.inputs["reward"], device, config.precision, members=config
    )
    bench = Bench(
        prompts=list(table["prompt"]),
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
    pool = kept(work.answers, "sft", lambda: answer(bench, "sft", sft_policy, tokenizer, max(k, n)))
    answers["sft"] = pool.pick(first_of_each(pool.prompt, k))
    price = excess(config.best_of_penalty, pool.tokens)
    answers["best_of_n"] = pool.pick(best_of_each(pool.prompt, pool.proxy - price, n))
    curve = _best_of_n(pool, pool.proxy - price, bench.seed)
    for point in curve.points:
        logger.metrics(_curve_metrics(point), point.number)
    for done, name in enumerate(others, start=2):
        logger.progress(done, 5, name)
        if name in work.inputs:
            answers[name] = kept(work.answers, name, partial(_arm, bench, name, config, work))
    logger.progress(4, 5, "base model")
    base, no_base = _base(config, work)
    if base is not None:
        answers["base"] = kept(work.answers, "base", partial(answer, bench, "base", *base, k))
    logger.progress(5, 5, "comparisons")
    arms = {name: answers[name] for name in ARMS if name in answers}
    most = work.section(JudgeConfig).canary_prompts
    examined = examine(
        judge, bench, arms["sft"], work.inputs["data"], most=most, judging=work.judging
    )
    found = _Found(
        arms=arms,
        chart=Chart(title="Best of n", paths=(curve,)),
        slices=prompt_slices(table),
        leaks=leaks,
        no_base=no_base,
    )
    return _report(config, bench, found, examined)


def _arm(bench: Bench, name: ArmName, config: EvaluationConfig, work: Work) -> Answers:
    """The answers of a policy among the inputs."""
    bench.logger.phase(f"loading the {name}")
    actor = Policy.load(work.inputs[name], work.device, config.precision)
    return answer(bench, name, *actor, config.samples_per_prompt)


def _ask_ahead(
    judge: Judge | None,
    pairs: Sequence[tuple[ArmName, ArmName]],
    answers: dict[ArmName, Answers],
    prompts: Sequence[Prompt],
) -> None:
    """Tell people of all pairs at once, those of each comparison in turn: whatever is answered
    when there is enough, each has its share."""
    if isinstance(judge, Panel):
        columns = [pairs_on(*matched(pair, answers), prompts) for pair in pairs]
        judge.ahead([pair for row in zip_longest(*columns) for pair in row if pair is not None])


@dataclass(frozen=True)
class _Found:
    """What the arms said, and what is known of the prompts."""

    arms: dict[ArmName, Answers]
    chart: Chart
    slices: tuple[PromptSlice, ...]
    leaks: PromptLeaks
    no_base: str  # why there is no base model; empty if there is


def _base(
    config: EvaluationConfig, work: Work
) -> tuple[tuple[Policy, PreTrainedTokenizerBase] | None, str]:
    """The model that SFT started from, with its tokenizer; or why there is none."""
    if not config.base:
        return None, "evaluation.base is false"
    work.logger.phase("loading the base model")
    try:
        model, tokenizer = base_of(work.inputs["sft"])
    except ModelError as error:
        _log.warning("the evaluation goes on without the base model: %s", error)
        return None, str(error).rstrip(".")
    return (Policy(model.to(work.device), precision=config.precision), tokenizer), ""


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
    config: EvaluationConfig, bench: Bench, found: _Found, judge: Examined
) -> EvaluationReport:
    answers, prompts, seed = found.arms, bench.prompts, bench.seed
    arms = tuple(
        measure_arm(name, said, prompts, config.best_of, seed) for name, said in answers.items()
    )
    pairs = [pair for pair in PAIRS if all(name in answers for name in pair)]
    _ask_ahead(judge.judge, pairs, answers, prompts)
    matches = [play(pair, answers, prompts, judge.on(*pair)) for pair in pairs]
    level = at_equal_length(matches, seed)
    comparisons = tuple(
        sum_up(match, seed, rate) for match, rate in zip(matches, level, strict=True)
    )
    over_sft = {match.candidate: match for match in matches if match.opponent == "sft"}
    rivals: list[ArmName] = ["best_of_n", "champion"]
    differences = tuple(
        found_difference
        for rival in rivals
        if rival in over_sft
        and (found_difference := differ(over_sft["policy"], over_sft[rival], seed)) is not None
    )
    scorecard = Scorecard(
        arms=arms,
        comparisons=comparisons,
        slices=found.slices,
        differences=differences,
        diagnosis=diagnose(
            comparisons,
            differences,
            best_of=config.best_of,
            no_base=found.no_base,
            signs=_signs_said(arms),
        ),
        leaks=found.leaks,
        judge=judge.facts(comparisons),
    )
    bars: dict[str, list[Interval | None]] = {
        "true reward": [arm.true_reward for arm in arms],
        "reward model": [arm.proxy_reward for arm in arms],
        # That of the base model is hundreds of nats, and would make the others invisible.
        "KL to SFT (nats a sequence)": [None if arm.name == "base" else arm.kl for arm in arms],
    }
    if bench.truth is None:
        del bars["true reward"]
    plots = {
        "evaluation_arms": figures.arms([arm.name for arm in arms], bars),
        "evaluation_best_of_n": draw([found.chart]),
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
        scorecard=scorecard,
        tables={
            "evaluation_samples": _samples(config, bench, answers),
            "evaluation_best_of_n": pd.DataFrame(found.chart.rows()),
            "evaluation_signs": _signs(arms),
            "evaluation_slices": _slices(scorecard, seed),
            **judge.tables(config.sample_rows),
        },
        figures=plots,
    )


def _signs_said(arms: Sequence[Arm]) -> str:
    """A sentence on the canaries that the policy's answers look like more often than those of SFT;
    empty if there are none."""
    by_name = {arm.name: arm for arm in arms}
    found = more_than(by_name["policy"], by_name["sft"])
    said = [
        f"{kind} ({ours.value:.0%}, SFT {theirs.value:.0%})"
        for kind, (ours, theirs) in found.items()
    ]
    return f"The policy's answers look more often like canaries: {', '.join(said)}." if said else ""


def _signs(arms: Sequence[Arm]) -> pd.DataFrame:
    """The share of each arm's answers with each sign."""
    rows = [
        {"sign": kind, "rule": rule, "arm": arm.name, **_bounds("share", arm.signs[kind])}
        for kind, rule in SIGNS.items()
        for arm in arms
    ]
    return pd.DataFrame(rows)


def _slices(scorecard: Scorecard, seed: int) -> pd.DataFrame:
    """The win rate of each comparison in each slice of the prompts."""
    columns = ["slice", "candidate", "opponent", "prompts", "win_rate"]
    rows = [
        {
            "slice": part.name,
            "candidate": match.candidate,
            "opponent": match.opponent,
            "prompts": rate.prompts,
            **_bounds("win_rate", rate.win_rate),
        }
        for part in scorecard.slices
        for match in scorecard.comparisons
        if (rate := slice_rate(match, part, seed)) is not None
    ]
    return pd.DataFrame(rows, columns=None if rows else columns)


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
