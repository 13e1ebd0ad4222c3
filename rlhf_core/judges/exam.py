"""Every judge meets the canaries, before it decides about anything.

A judge that prefers half an answer with an order to rate it highest can be talked into anything by
the answers that it reads; one that prefers three times the same answer goes by length. See
`rlhf_core.rewards.canaries` for the kinds.
"""

from collections.abc import Sequence

import torch

from rlhf_core.data.encoding import Prompt
from rlhf_core.judges.judge import Judge, Pair, Winner
from rlhf_core.judges.load import ScoreJudge
from rlhf_core.rewards.canaries import (
    CanaryResult,
    canary_results,
    make_canaries,
    measure_canaries,
)

_LEADS: dict[Winner, float] = {"a": 1.0, "tie": 0.0, "b": -1.0}


def meet_canaries(
    judge: Judge,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    *,
    seed: int,
    ends: Sequence[str],
) -> tuple[CanaryResult, ...]:
    """How often each kind of canary beats the real answer under a judge.

    A judge by score is asked for scores, and meets all kinds. Any other compares, and does not meet
    `constant` and `keyword`, which are made by a score. A pair without a verdict is left out.

    Args:
        prompts, answers: (N) real ones.
        seed: of canaries and bounds.
        ends: what a pasted end of text is written with, see `end_marks`.

    Returns: the kinds that were measured; none without a real answer.
    """
    if not answers:
        return ()
    canaries = make_canaries(prompts, answers, seed=seed, ends=ends)
    if isinstance(judge, ScoreJudge):
        return tuple(measure_canaries(canaries, prompts, answers, judge.score, seed=seed))
    verdicts = judge([Pair(prompts[c.row], c.text, answers[c.row]) for c in canaries])
    decided = [
        (canary, _LEADS[verdict.winner])
        for canary, verdict in zip(canaries, verdicts, strict=True)
        if verdict.winner is not None
    ]
    leads = torch.tensor([lead for _, lead in decided], dtype=torch.float64)
    made = [canary for canary, _ in decided]
    return tuple(canary_results(made, leads, prompts, answers, seed=seed))
