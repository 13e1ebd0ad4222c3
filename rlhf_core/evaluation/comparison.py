"""Measure the arms of an evaluation and compare them. Knows answers, not models.

Intervals are 95 % bootstraps that draw whole prompts, since answers to one prompt are correlated;
those of win rates are at least as wide as Wilson's over the prompts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_core.evaluation.answers import Answers
from rlhf_core.evaluation.scorecard import Arm, ArmName, Comparison
from rlhf_core.functional.ranking import (
    Interval,
    best_of_n_kl,
    clustered_bootstrap,
    clustered_share,
    win_rate,
)
from rlhf_core.seeding import generator


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


def compare(
    pair: tuple[ArmName, ArmName], answers: dict[ArmName, Answers], seed: int
) -> Comparison:
    """Compare the i-th answer of one arm to a prompt with the i-th answer of the other."""
    ours, theirs = (answers[name] for name in pair)
    k = min(int((arm.prompt == arm.prompt[0]).sum()) for arm in (ours, theirs))
    ours, theirs = (arm.pick(first_of_each(arm.prompt, k)) for arm in (ours, theirs))
    if ours.true is not None and theirs.true is not None:
        gap = ours.true - theirs.true
    else:
        gap = ours.proxy - theirs.proxy
    outcome = (gap.sign() + 1) / 2  # a tie is half a win
    counts = [int((outcome == points).sum()) for points in (1, 0.5, 0)]
    draws = generator(seed, f"evaluation/bootstrap/{pair[0]}/{pair[1]}")
    # Answers to one prompt are correlated, so bounds from single answers would be too narrow.
    bounds = clustered_share(outcome, ours.prompt, generator=draws)
    return Comparison(
        candidate=pair[0],
        opponent=pair[1],
        judge="reward_model" if ours.true is None else "true_reward",
        wins=counts[0],
        ties=counts[1],
        losses=counts[2],
        prompts=len(outcome) // k,
        win_rate=bounds._replace(value=win_rate(*counts).value),
    )


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams divided by all word n-grams of the texts; 0 when there are none.

    Source: Li et al. 2016, https://arxiv.org/abs/1510.03055.
    """
    words = (text.split() for text in texts)
    grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
