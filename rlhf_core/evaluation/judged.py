"""What a judge said in an evaluation, and how far it can be trusted.

A judge meets the canaries before it decides about anything (`examine`), and what it says from then
on is kept: `Examined.facts` and `Examined.tables`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from rlhf_core.data.encoding import Prompt, render_prompt
from rlhf_core.data.prepared import prompt_key, read_table
from rlhf_core.evaluation.answers import Answers, Bench
from rlhf_core.evaluation.comparison import TRUTH, first_of_each
from rlhf_core.evaluation.scorecard import ArmName, Comparison, JudgeFacts
from rlhf_core.functional.interval import Interval
from rlhf_core.functional.ranking import clustered_share
from rlhf_core.judges.exam import meet_canaries
from rlhf_core.judges.judge import Cost, Judge, Judging, Pair, Panel, Verdict, shown
from rlhf_core.judges.load import ScoreJudge
from rlhf_core.rewards.canaries import CanaryResult, Score, end_marks
from rlhf_core.rewards.functions import call_function
from rlhf_core.rewards.models import score_texts
from rlhf_core.seeding import generator
from rlhf_core.settings.judge import REWARD_MODEL

_LONGEST = 2000  # characters of a text in a table
_log = logging.getLogger(__name__)


class Said(NamedTuple):
    """A verdict in its context."""

    candidate: ArmName  # wrote a
    opponent: ArmName  # wrote b
    pair: Pair
    verdict: Verdict


@dataclass(frozen=True)
class Examined:
    """A judge that has met the canaries, and what it has said since."""

    judge: Judge | None  # None: the scores of the answers decide
    name: str
    canaries: tuple[CanaryResult, ...]
    judging: Judging | None
    seed: int
    said: list[Said] = field(default_factory=list)

    def on(self, candidate: ArmName, opponent: ArmName) -> Judge | None:
        """The judge, for answers of two arms."""
        return None if self.judge is None else _Kept(self.judge, self.said, candidate, opponent)

    def facts(self, comparisons: Sequence[Comparison]) -> JudgeFacts:
        """What is known of it after its comparisons."""
        unanswered = sum(c.unanswered for c in comparisons)
        cost = Cost() if self.judging is None else self.judging.cost
        facts = JudgeFacts(
            name=self.name,
            pairs=sum(c.wins + c.ties + c.losses for c in comparisons) + unanswered,
            unanswered=unanswered,
            consistency=position_consistency(self.said, self.seed),
            agreement=agreement_of_people(self.said, self.seed),
            canaries=self.canaries,
            **cost._asdict(),
        )
        if self.judge is not None:
            _log.info("%s", in_words(facts))
        return facts

    def tables(self, rows: int) -> dict[str, pd.DataFrame]:
        """The canaries, and the first verdicts of a judge that is asked.

        Args:
            rows: the most verdicts on one pair of arms.
        """
        verdicts = {"evaluation_verdicts": _verdicts(self.said, rows)} if self.said else {}
        return {"evaluation_judge_canaries": _canary_table(self.canaries), **verdicts}


@dataclass(frozen=True)
class _Kept:
    """Hands verdicts on, and keeps them."""

    judge: Judge
    said: list[Said]
    candidate: ArmName
    opponent: ArmName

    @property
    def name(self) -> str:
        return self.judge.name

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        verdicts = self.judge(pairs)
        self.said.extend(
            Said(self.candidate, self.opponent, pair, verdict)
            for pair, verdict in zip(pairs, verdicts, strict=True)
        )
        return verdicts


def examine(
    judge: Judge | None,
    bench: Bench,
    sft: Answers,
    data: Path,
    *,
    most: int,
    judging: Judging | None = None,
) -> Examined:
    """Have a judge meet the canaries; a warning names each that it prefers to real answers.

    People do not meet any: their time is for the answers.

    Args:
        judge: None = whoever decides by score, the truth or the reward model of the bench.
        sft: answers of the SFT policy, which stand for real ones if nobody wrote any.
        data: directory of the prepared data, with what people wrote.
        most: prompts of which canaries are made.
        judging: what has made the judge, and knows its cost.
    """
    if isinstance(judge, Panel):
        return Examined(judge, judge.name, (), judging, bench.seed)
    bench.logger.phase("canaries for the judge")
    score = judge_by_score(bench)
    canaries = meet_canaries(
        judge or score,
        *_drawn(*_real_answers(data, bench.prompts, sft), most, bench.seed),
        seed=bench.seed,
        ends=end_marks(bench.reward_tokenizer),
    )
    name = (judge or score).name
    for canary in canaries:
        if canary.caught():
            value, low, high = canary.beats_real
            _log.warning(
                "the judge %s prefers the canary %s to real answers: %.2f [%.2f, %.2f] on %d "
                "prompts, so its verdicts may reward such answers; docs/judges.md says what to do",
                *(name, canary.kind, value, low, high, canary.prompts),
            )
    return Examined(judge, name, canaries, judging, bench.seed)


def judge_by_score(bench: Bench) -> ScoreJudge:
    """The known truth as a judge, or without one the reward model."""
    if bench.truth is None:
        return ScoreJudge(REWARD_MODEL, reward_score(bench))
    return ScoreJudge(TRUTH, partial(_true_score, bench))


def reward_score(bench: Bench) -> Score:
    """The score of the pipeline's reward model."""

    def score(prompts: Sequence[Prompt], texts: Sequence[str]) -> Tensor:
        longest = bench.sampling.max_length
        model, tokenizer = bench.reward_model, bench.reward_tokenizer
        return score_texts(model, tokenizer, prompts, texts, max_length=longest).mean(0)

    return score


def _true_score(bench: Bench, prompts: Sequence[Prompt], texts: Sequence[str]) -> Tensor:
    assert bench.truth is not None
    rendered = [render_prompt(prompt, bench.tokenizer) for prompt in prompts]
    return call_function(bench.truth, "evaluation.true_reward", rendered, list(texts))


def position_consistency(said: Sequence[Said], seed: int) -> Interval | None:
    """The share of pairs with the same verdict in both orders, with bounds over prompts.

    None when no pair was shown in both orders.
    """
    return _share([(each.pair, each.verdict.consistent) for each in said], seed, "consistency")


def agreement_of_people(said: Sequence[Said], seed: int) -> Interval | None:
    """The share of pairs on which all people said the same, with bounds over prompts.

    None when no pair has the votes of several people.
    """
    return _share([(each.pair, each.verdict.agreed) for each in said], seed, "agreement")


def _share(told: Sequence[tuple[Pair, bool | None]], seed: int, what: str) -> Interval | None:
    judged = [(pair, fact) for pair, fact in told if fact is not None]
    if not judged:
        return None
    number: dict[str, int] = {}
    clusters = [number.setdefault(prompt_key(pair.prompt), len(number)) for pair, _ in judged]
    return clustered_share(
        torch.tensor([float(fact) for _, fact in judged]),
        torch.tensor(clusters),
        generator=generator(seed, f"judge/{what}"),
    )


def judge_numbers(facts: JudgeFacts) -> dict[str, float]:
    """The facts as metrics; position consistency and cost only where there is one."""
    numbers: dict[str, float] = {
        "judge/pairs": float(facts.pairs),
        "judge/unanswered": float(facts.unanswered),
    }
    if facts.consistency is not None:
        numbers |= _bounds("judge/consistency", facts.consistency)
    if facts.agreement is not None:
        numbers |= _bounds("judge/agreement", facts.agreement)
    if facts.requests or facts.remembered:
        names = ("requests", "remembered", "tokens", "seconds")
        numbers |= {f"judge/{name}": float(getattr(facts, name)) for name in names}
    for canary in facts.canaries:
        numbers |= _bounds(f"judge/canary/{canary.kind}", canary.beats_real)
    return numbers


def in_words(facts: JudgeFacts) -> str:
    """The facts as a sentence, as the log has them."""
    parts = [f"the judge {facts.name} compared {facts.pairs:,} pairs"]
    parts += [f"{facts.unanswered:,} without a verdict"] if facts.unanswered else []
    if facts.consistency is not None:
        value, low, high = facts.consistency
        parts.append(
            f"the same verdict in both orders on {value:.2f} [{low:.2f}, {high:.2f}] of those that "
            "were shown in both"
        )
    if facts.agreement is not None:
        value, low, high = facts.agreement
        parts.append(
            f"all people said the same on {value:.2f} [{low:.2f}, {high:.2f}] of those that "
            "several were asked about"
        )
    if facts.requests or facts.remembered:
        parts.append(
            f"{facts.requests:,} requests with {facts.tokens:,} tokens in {facts.seconds:,.0f} s "
            f"of waiting, {facts.remembered:,} verdicts remembered"
        )
    return "; ".join(parts)


def _real_answers(
    data: Path, prompts: Sequence[Prompt], sft: Answers
) -> tuple[list[Prompt], list[str]]:
    """The held-out demonstrations, which people wrote; without any, first answers of SFT."""
    table = read_table(data, "demonstrations", "eval")
    if not table.empty:
        return list(table["prompt"]), list(table["response"])
    return list(prompts), sft.pick(first_of_each(sft.prompt, 1)).texts


def _drawn(
    prompts: Sequence[Prompt], texts: Sequence[str], most: int, seed: int
) -> tuple[list[Prompt], list[str]]:
    """One answer to each of at most `most` prompts, drawn at random."""
    order = torch.randperm(len(prompts), generator=generator(seed, "judge/canaries")).tolist()
    first: dict[str, int] = {}
    for row in order:
        first.setdefault(prompt_key(prompts[row]), row)
    rows = list(first.values())[:most]
    return [prompts[row] for row in rows], [texts[row] for row in rows]


def _verdicts(said: Sequence[Said], rows: int) -> pd.DataFrame:
    """The first verdicts on each pair of arms, with reasons."""
    by_arms: dict[tuple[ArmName, ArmName], list[Said]] = {}
    for each in said:
        by_arms.setdefault((each.candidate, each.opponent), []).append(each)
    return pd.DataFrame(
        [_row(each) for found in by_arms.values() for each in found[:rows]],
        columns=["prompt", "a", "b", "winner", "consistent", "reason", "answer_a", "answer_b"],
    )


def _canary_table(canaries: Sequence[CanaryResult]) -> pd.DataFrame:
    """How often each canary beats the real answers, and the one that got furthest."""
    return pd.DataFrame(
        [
            {
                "canary": canary.kind,
                "beats_real": round(canary.beats_real.value, 3),
                "low": round(canary.beats_real.low, 3),
                "high": round(canary.beats_real.high, 3),
                "prompts": canary.prompts,
                "caught": canary.caught(),
                "example": canary.example[:_LONGEST],
            }
            for canary in canaries
        ]
    )


def _row(each: Said) -> Mapping[str, object]:
    verdict = each.verdict
    return {
        "prompt": shown(each.pair.prompt)[:_LONGEST],
        "a": each.candidate,
        "b": each.opponent,
        "winner": verdict.winner or "unanswered",
        "consistent": verdict.consistent,
        "reason": verdict.reason[:_LONGEST],
        "answer_a": each.pair.a[:_LONGEST],
        "answer_b": each.pair.b[:_LONGEST],
    }


def _bounds(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
