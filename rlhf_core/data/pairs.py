"""Preferences as tokens, for the reward model and DPO."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_core.data.encoding import encode_pair
from rlhf_core.errors import DataError


class Pair(NamedTuple):
    """One vote, encoded."""

    chosen: list[int]
    rejected: list[int]
    starts: tuple[int, int]  # index of the first token of each response, at least 1
    tie: bool
    margin: float
    truncated: bool


def with_winners(votes: pd.DataFrame) -> pd.DataFrame:
    """The votes of a table with the added columns `chosen`, `rejected` and `tie`.

    vote "a"      chosen = response_a, rejected = response_b
    vote "b"      chosen = response_b, rejected = response_a
    vote "tie"    chosen = response_a, rejected = response_b, tie = True: nobody won, and
                  a loss must be symmetric in the two
    """
    second = votes["vote"] == "b"
    return votes.assign(
        chosen=votes["response_b"].where(second, votes["response_a"]),
        rejected=votes["response_a"].where(second, votes["response_b"]),
        tie=votes["vote"] == "tie",
    )


def encode_pairs(
    table: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Pair]:
    """Encode the votes of a table.

    Raises: DataError when there are none.
    """
    if table.empty:
        raise DataError(
            "the preferences have no rows for training or for evaluation; add rows, or change "
            "data.eval_fraction"
        )
    pairs = []
    voted = with_winners(table)
    columns = (voted[name] for name in ("prompt", "chosen", "rejected", "tie", "margin"))
    for prompt, winner, loser, tie, margin in zip(*columns, strict=True):
        chosen, head, cut = encode_pair(prompt, winner, tokenizer, max_length)
        rejected, other_head, also_cut = encode_pair(prompt, loser, tokenizer, max_length)
        # A tie has no margin, whatever the row has for its other votes.
        lead = 0.0 if tie else float(margin)
        starts = max(head, 1), max(other_head, 1)
        pairs.append(Pair(chosen, rejected, starts, bool(tie), lead, cut or also_cut))
    return pairs


def smoothing(pairs: Sequence[Pair], label_smoothing: float, device: torch.device) -> Tensor:
    """(B,) probability that each vote is the wrong way round: 0.5 for a tie."""
    ties = torch.tensor([pair.tie for pair in pairs], device=device)
    return torch.where(ties, 0.5, label_smoothing)


def half_for_ties(gap: Tensor) -> Tensor:
    """1 where the gap is positive, 1/2 where it is 0, and 0 where it is negative."""
    return (gap.sign().float() + 1) / 2


def prompt_numbers(table: pd.DataFrame) -> Tensor:
    """(N,) number of the prompt that each vote is about."""
    return torch.from_numpy(pd.factorize(table["prompt"].map(str))[0]).long()


def require_decided(decided: Tensor) -> None:
    """Raise DataError unless some held-out vote has a winner."""
    if not decided.any():
        raise DataError(
            "the held-out preferences are all ties, so no accuracy can be measured; raise "
            "data.eval_fraction or add evaluation pairs with a winner"
        )
