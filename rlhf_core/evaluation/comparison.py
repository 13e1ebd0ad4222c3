"""Measure the arms of an evaluation and compare them. Knows answers, not models.

Intervals are 95 % bootstraps that draw whole prompts, since answers to one prompt are correlated;
those of win rates are never narrower than Wilson's over the prompts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_core.data.encoding import Prompt
from rlhf_core.errors import NumericsError
from rlhf_core.evaluation.answers import Answers
from rlhf_core.evaluation.intervals import FEW_PROMPTS, mean_difference
from rlhf_core.evaluation.scorecard import Arm, ArmName, Comparison, PairedDifference
from rlhf_core.evaluation.signs import measure_signs
from rlhf_core.functional.interval import Interval
from rlhf_core.functional.length_control import Verdicts, length_controlled_win_rates
from rlhf_core.functional.ranking import (
    at_least_wilson,
    best_of_n_kl,
    clustered_bootstrap,
    clustered_share,
    win_rate,
)
from rlhf_core.judges.judge import Judge, Pair, Verdict, Winner
from rlhf_core.judges.load import by_score
from rlhf_core.seeding import generator
from rlhf_core.settings.judge import PEOPLE, REWARD_MODEL

TRUTH = "true_reward"
POINTS: Mapping[Winner | None, float] = {"a": 1.0, "tie": 0.5, "b": 0.0, None: math.nan}


def first_of_each(prompt: Tensor, k: int) -> Tensor:
    """Index of the first k answers to each prompt."""
    per_prompt = int((prompt == prompt[0]).sum())
    return torch.arange(len(prompt)).view(-1, per_prompt)[:, :k].reshape(-1)


def best_of_each(prompt: Tensor, score: Tensor, n: int) -> Tensor:
    """Index of the best of the first n answers to each prompt."""
    index = first_of_each(prompt, n).view(-1, n)
    return index.gather(1, score[index].argmax(1, keepdim=True)).squeeze(1)


def measure_arm(
    name: ArmName, answers: Answers, prompts: Sequence[Prompt], best_of: int, seed: int
) -> Arm:
    """The results of an arm; `best_of` is the n of best-of-n."""
    # A separate stream, so that a champion's presence does not change another arm's bounds.
    draws = generator(seed, f"evaluation/bootstrap/{name}")

    def interval(values: Tensor) -> Interval:
        return clustered_bootstrap(values, answers.prompt, generator=draws)

    kl = None if answers.kl is None else interval(answers.kl)
    if name == "best_of_n":
        kl = Interval(*[best_of_n_kl(best_of)] * 3)
    one_each = answers.pick(first_of_each(answers.prompt, 1)).texts
    nats = -answers.sft_logprob.double().sum() / answers.tokens.sum()
    return Arm(
        name=name,
        proxy_reward=interval(answers.proxy),
        true_reward=None if answers.true is None else interval(answers.true),
        kl=kl,
        perplexity=nats.exp().item(),
        length=answers.tokens.mean().item(),
        distinct_1=distinct_n(one_each, 1),
        distinct_2=distinct_n(one_each, 2),
        signs=measure_signs(name, answers, prompts, seed),
    )


def pairs_on(ours: Answers, theirs: Answers, prompts: Sequence[Prompt]) -> list[Pair]:
    """N pairs: the i-th answer of ours is a, that of theirs is b."""
    asked = [prompts[i] for i in ours.prompt.tolist()]
    return [Pair(*texts) for texts in zip(asked, ours.texts, theirs.texts, strict=True)]


def matched(
    pair: tuple[ArmName, ArmName], answers: Mapping[ArmName, Answers]
) -> tuple[Answers, Answers]:
    """The answers of two arms that meet: as many to each prompt from both."""
    ours, theirs = (answers[name] for name in pair)
    k = min(int((arm.prompt == arm.prompt[0]).sum()) for arm in (ours, theirs))
    picked = (arm.pick(first_of_each(arm.prompt, k)) for arm in (ours, theirs))
    return next(picked), next(picked)


def verdicts_on(
    ours: Answers, theirs: Answers, prompts: Sequence[Prompt], judge: Judge | None
) -> list[Verdict]:
    """The verdict on each of N pairs: the i-th answer of ours is a, that of theirs is b.

    A judge of None goes by the true reward if it is known, else by the reward model.
    """
    if judge is not None:
        return judge(pairs_on(ours, theirs, prompts))
    if ours.true is not None and theirs.true is not None:
        return by_score(ours.true, theirs.true)
    return by_score(ours.proxy, theirs.proxy)


def judge_name(answers: Answers, judge: Judge | None) -> str:
    """What reports call the judge of these answers."""
    if judge is not None:
        return judge.name
    return REWARD_MODEL if answers.true is None else TRUTH


@dataclass(frozen=True)
class Match:
    """Two arms, judged answer by answer: the i-th of one to a prompt against the i-th of the other.

    Of N pairs, as many to each prompt, some may have no verdict.
    """

    candidate: ArmName
    opponent: ArmName
    judge: str
    points: Tensor  # (N,) 1, 1/2 or 0; NaN without a verdict
    prompt: Tensor  # (N,) index of the prompt
    longer: Tensor  # (N,) characters of the candidate's answer less those of the opponent's

    @property
    def by_prompt(self) -> Tensor:
        """(P,) mean points on each prompt, NaN where there is no verdict."""
        return self.points.view(int(self.prompt[-1]) + 1, -1).nanmean(1)


def play(
    pair: tuple[ArmName, ArmName],
    answers: Mapping[ArmName, Answers],
    prompts: Sequence[Prompt],
    judge: Judge | None = None,
) -> Match:
    """Have the judge compare two arms.

    Raises: NumericsError when the judge gives no verdict at all.
    """
    ours, theirs = matched(pair, answers)
    name = judge_name(ours, judge)
    points = torch.tensor([POINTS[v.winner] for v in verdicts_on(ours, theirs, prompts, judge)])
    if points.isnan().all():
        fix = "look at its log, and check judge.endpoint"
        if name == PEOPLE:
            fix = "raise judge.people.enough or days, and invite people with `rlhf label`"
        raise NumericsError(
            f"the judge {name} gave no verdict on {pair[0]} against {pair[1]}; {fix}"
        )
    characters = (torch.tensor([len(text) for text in arm.texts]) for arm in (ours, theirs))
    longer = next(characters) - next(characters)
    return Match(*pair, name, points, ours.prompt, longer)


def sum_up(match: Match, seed: int, length_controlled: Interval | None = None) -> Comparison:
    """The numbers of a match. Answers to one prompt are correlated, so bounds are over prompts."""
    answered = ~match.points.isnan()
    outcome, prompt = match.points[answered], match.prompt[answered]
    counts = [int((outcome == value).sum()) for value in (1, 0.5, 0)]
    draws = generator(seed, f"evaluation/bootstrap/{match.candidate}/{match.opponent}")
    bounds = at_least_wilson(clustered_share(outcome, prompt, generator=draws), prompt)
    return Comparison(
        candidate=match.candidate,
        opponent=match.opponent,
        judge=match.judge,
        wins=counts[0],
        ties=counts[1],
        losses=counts[2],
        prompts=len(prompt.unique()),
        win_rate=bounds._replace(value=win_rate(*counts).value),
        points=tuple(None if math.isnan(x) else x for x in match.by_prompt.tolist()),
        unanswered=int((~answered).sum()),
        length_controlled=length_controlled,
    )


def compare(
    pair: tuple[ArmName, ArmName],
    answers: Mapping[ArmName, Answers],
    seed: int,
    prompts: Sequence[Prompt],
    judge: Judge | None = None,
) -> Comparison:
    """Compare two arms, without a win rate at equal length, for which others are needed.

    Raises: NumericsError when the judge gives no verdict at all.
    """
    return sum_up(play(pair, answers, prompts, judge), seed)


def at_equal_length(matches: Sequence[Match], seed: int) -> list[Interval | None]:
    """The win rate of each match at equal length, in characters.

    Matches against SFT share the difficulties of the prompts, whichever side SFT is on; the others
    are fitted alone. None where nobody can tell: fewer than ten prompts with a verdict, only ties,
    or fewer than five prompts with an answer that is no longer, or no shorter, than the opponent's.
    """
    rates: list[Interval | None] = [None] * len(matches)
    told = [n for n, match in enumerate(matches) if _has_equal_lengths(match)]
    groups = [[n for n in told if "sft" in (matches[n].candidate, matches[n].opponent)]]
    groups += [[n] for n in told if n not in groups[0]]
    for group in filter(None, groups):
        parts = []
        for number, n in enumerate(group):
            match = matches[n]
            sign = -1 if match.candidate == "sft" else 1
            known = ~match.points.isnan()
            points = match.points[known] if sign > 0 else 1 - match.points[known]
            size = int(known.sum())
            parts.append(
                Verdicts(
                    points,
                    sign * match.longer[known],
                    torch.full((size,), number),
                    match.prompt[known],
                )
            )
        names = "/".join(f"{matches[n].candidate}/{matches[n].opponent}" for n in group)
        found = length_controlled_win_rates(
            Verdicts(*map(torch.cat, zip(*parts, strict=True))),
            generator=generator(seed, f"evaluation/length/{names}"),
        )
        for n, rate in zip(group, found, strict=True):
            swapped = matches[n].candidate == "sft"
            if swapped:
                rate = Interval(1 - rate.value, 1 - rate.high, 1 - rate.low)
            rates[n] = rate
    return rates


def _has_equal_lengths(match: Match) -> bool:
    known = ~match.points.isnan()
    prompt, longer = match.prompt[known], match.longer[known]
    sides = (prompt[longer <= 0], prompt[longer >= 0])
    return (
        len(prompt.unique()) >= FEW_PROMPTS
        and bool((match.points[known] != 0.5).any())
        and min(len(side.unique()) for side in sides) >= FEW_PROMPTS // 2
    )


def differ(first: Match, second: Match, seed: int) -> PairedDifference | None:
    """By how much two arms differ in their win rates over the same opponent, prompt by prompt.

    None when no prompt has a verdict on both.

    Raises: ValueError when the opponents differ.
    """
    if first.opponent != second.opponent:
        raise ValueError(f"the opponents are {first.opponent} and {second.opponent}, not one.")
    differences = first.by_prompt - second.by_prompt
    differences = differences[~differences.isnan()]
    if not len(differences):
        return None
    stream = f"evaluation/difference/{first.candidate}/{second.candidate}/{first.opponent}"
    return PairedDifference(
        first=first.candidate,
        second=second.candidate,
        opponent=first.opponent,
        difference=mean_difference(differences, generator(seed, stream)),
    )


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams divided by all word n-grams of the texts; 0 when there are none.

    Source: Li et al. 2016, https://arxiv.org/abs/1510.03055.
    """
    words = (text.split() for text in texts)
    grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
