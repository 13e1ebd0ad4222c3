"""Preferences as tokens, for the reward model and DPO."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_core.data.encoding import encode_answers
from rlhf_core.data.prepared import falls_to_eval, prompt_key
from rlhf_core.errors import DataError
from rlhf_core.settings.training import Votes


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


def select_votes(votes: pd.DataFrame, which: Votes) -> pd.DataFrame:
    """All votes of a table, or those on one half of the prompts.

    A hash decides the half of a prompt, whatever the seed, so the two halves share no prompt, and
    models of different seeds can be trained on disjoint halves. The hash is not the one that holds
    prompts out.

    Raises: DataError when no vote is in the half.
    """
    if which == "all":
        return votes
    second = votes["prompt"].map(lambda prompt: falls_to_eval(f"half/{prompt_key(prompt)}", 0, 0.5))
    found = votes[second.astype(bool) == (which == "second_half")]
    if found.empty:
        raise DataError(
            f"none of the {len(votes)} votes is on a prompt of the {which.replace('_', ' ')}; add "
            "votes on more prompts, or train on all of them"
        )
    return found.reset_index(drop=True)


class EncodedPairs(NamedTuple):
    """The votes of a table, encoded, without those that teach nothing."""

    pairs: list[Pair]
    table: pd.DataFrame  # the rows of these pairs
    same: int  # votes left out, since both texts are the same tokens


def encode_pairs(
    table: pd.DataFrame,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    setting: str = "max_length",
) -> EncodedPairs:
    """Encode the votes of a table; both texts of a vote begin with the same prompt tokens.

    A vote on two texts that are the same tokens, after the cut to `max_length`, has no gradient and
    no accuracy: it is left out and counted. `setting` names the one with `max_length`.

    Raises: DataError when no vote is left.
    """
    if table.empty:
        raise DataError(
            "the preferences have no rows for training or for evaluation; add rows, or change "
            "data.eval_fraction"
        )
    pairs, kept = [], []
    voted = with_winners(table)
    columns = (voted[name] for name in ("prompt", "chosen", "rejected", "tie", "margin"))
    for row, (prompt, winner, loser, tie, margin) in enumerate(zip(*columns, strict=True)):
        found = encode_answers(prompt, [winner, loser], tokenizer, max_length)
        chosen, rejected = (found.prompt + response for response in found.responses)
        if chosen == rejected:
            continue
        # A tie has no margin, whatever the row has for its other votes.
        lead = 0.0 if tie else float(margin)
        start = max(len(found.prompt), 1)
        pairs.append(Pair(chosen, rejected, (start, start), bool(tie), lead, found.cut))
        kept.append(row)
    if not pairs:
        raise DataError(all_the_same(len(table), max_length, setting))
    return EncodedPairs(pairs, table.iloc[kept], len(table) - len(pairs))


def all_the_same(
    votes: int, max_length: int, setting: str, purpose: str = "training or for evaluation"
) -> str:
    """Why no vote of a side can be used."""
    which = "the only preference" if votes == 1 else f"each of the {votes} preferences"
    return (
        f"both answers of {which} for {purpose} are the same tokens once they are cut to "
        f"{max_length} tokens, so nothing can be learnt or measured; raise {setting}"
    )


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
