"""The budget of alpha over repeated looks at one champion.

Scheduled retraining compares policy after policy with the same champion. Each comparison at the
full level would promote an equal policy sooner or later: 20 looks at 5 % do in about two of three
reigns. So all looks of a reign share one alpha: the k-th spends

    alpha_k = alpha / (k·(k + 1)),  with the sum alpha over any number of looks

The first look has half of it: 0.025 one-sided, the familiar 95 % interval. No number of looks has
to be known in advance, as group-sequential plans ask for; the comparisons are of different
policies, so nothing is gained from how they depend on each other.
"""

from collections.abc import Sequence

from rlhf_core.promotion.decision import Look


def take_look(number: int, total: float, others: Sequence[float], opponent: str) -> Look:
    """The look with this number; `others` is what the other looks at the opponent have spent.

        alpha_k = min(total / (k·(k + 1)), left / (k + 1)),  left = total - sum of others

    Both are the same as long as `total` does not change within a reign. If it was lowered, the
    second keeps what is left positive, and the sum within it.

    Raises: ValueError for a number below 1.
    """
    if number < 1:
        raise ValueError(f"the first look has the number 1, got {number}.")
    spent = sum(others)
    alpha = min(total / number, max(total - spent, 0.0)) / (number + 1)
    return Look(number=number, alpha=alpha, total=total, spent=spent + alpha, opponent=opponent)


def first_alpha(total: float) -> float:
    """The alpha of the first look."""
    return take_look(1, total, (), "").alpha
