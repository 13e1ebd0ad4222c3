"""Measure the arms of an evaluation and compare them. Knows answers, not models.

Intervals are 95 % bootstraps that draw whole prompts, since answers to one prompt are correlated;
those of win rates are at least as wide as Wilson's over the prompts.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhf_core.data.encoding import Prompt
from rlhf_core.errors import NumericsError
from rlhf_core.evaluation.answers import Answers
from rlhf_core.evaluation.scorecard import Arm, ArmName, Comparison
from rlhf_core.functional.ranking import (
    Interval,
    best_of_n_kl,
    clustered_bootstrap,
    clustered_share,
    win_rate,
)
from rlhf_core.judges.config import REWARD_MODEL
from rlhf_core.judges.judge import Judge, Pair, Verdict, Winner
from rlhf_core.judges.load import by_score
from rlhf_core.seeding import generator

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


def measure_arm(name: ArmName, answers: Answers, best_of: int, seed: int) -> Arm:
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
    )


def verdicts_on(
    ours: Answers, theirs: Answers, prompts: Sequence[Prompt], judge: Judge | None
) -> list[Verdict]:
    """The verdict on each of N pairs: the i-th answer of ours is a, that of theirs is b.

    A judge of None goes by the true reward if it is known, else by the reward model.
    """
    if judge is not None:
        asked = [prompts[i] for i in ours.prompt.tolist()]
        return judge([Pair(*texts) for texts in zip(asked, ours.texts, theirs.texts, strict=True)])
    if ours.true is not None and theirs.true is not None:
        return by_score(ours.true, theirs.true)
    return by_score(ours.proxy, theirs.proxy)


def judge_name(answers: Answers, judge: Judge | None) -> str:
    """What reports call the judge of these answers."""
    if judge is not None:
        return judge.name
    return REWARD_MODEL if answers.true is None else TRUTH


def compare(
    pair: tuple[ArmName, ArmName],
    answers: Mapping[ArmName, Answers],
    seed: int,
    prompts: Sequence[Prompt],
    judge: Judge | None = None,
) -> Comparison:
    """Compare the i-th answer of one arm to a prompt with the i-th answer of the other.

    Raises: NumericsError when the judge gives no verdict at all.
    """
    ours, theirs = (answers[name] for name in pair)
    k = min(int((arm.prompt == arm.prompt[0]).sum()) for arm in (ours, theirs))
    ours, theirs = (arm.pick(first_of_each(arm.prompt, k)) for arm in (ours, theirs))
    name = judge_name(ours, judge)
    verdicts = verdicts_on(ours, theirs, prompts, judge)
    points = torch.tensor([POINTS[v.winner] for v in verdicts])
    answered = ~points.isnan()
    if not answered.any():
        raise NumericsError(
            f"the judge {name} gave no verdict on {pair[0]} against {pair[1]}; look at its log, "
            "and check judge.endpoint"
        )
    outcome, prompt = points[answered], ours.prompt[answered]
    counts = [int((outcome == value).sum()) for value in (1, 0.5, 0)]
    draws = generator(seed, f"evaluation/bootstrap/{pair[0]}/{pair[1]}")
    # Answers to one prompt are correlated, so bounds from single answers would be too narrow.
    bounds = clustered_share(outcome, prompt, generator=draws)
    means = points.view(-1, k).nanmean(1)
    return Comparison(
        candidate=pair[0],
        opponent=pair[1],
        judge=name,
        wins=counts[0],
        ties=counts[1],
        losses=counts[2],
        prompts=len(prompt.unique()),
        win_rate=bounds._replace(value=win_rate(*counts).value),
        points=tuple(None if math.isnan(mean) else mean for mean in means.tolist()),
        unanswered=int((~answered).sum()),
    )


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams divided by all word n-grams of the texts; 0 when there are none.

    Source: Li et al. 2016, https://arxiv.org/abs/1510.03055.
    """
    words = (text.split() for text in texts)
    grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
