"""Preferences as tokens, for the reward model and DPO."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from rlhf_core.data.chat_tokens import Fitted
from rlhf_core.data.encoding import Prompt, encode_all_answers
from rlhf_core.data.prepared import falls_to_eval, prompt_key
from rlhf_core.errors import DataError
from rlhf_core.settings.training import Votes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 1000  # rows that the tokenizer gets at once


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


def with_lengths(votes: pd.DataFrame) -> pd.DataFrame:
    """`with_winners` with the added columns `chosen_length` and `rejected_length` (characters)."""
    voted = with_winners(votes)
    lengths = {f"{name}_length": voted[name].str.len() for name in ("chosen", "rejected")}
    return voted.assign(**lengths)


def select_votes(votes: pd.DataFrame, which: Votes) -> pd.DataFrame:
    """All votes of a table, or those on one half of the prompts.

    A hash decides the half of a prompt, whatever the seed, so the two halves share no prompt, and
    models of different seeds can be trained on disjoint halves. The hash is not the one that holds
    prompts out.

    Raises: DataError when no vote is in the half.
    """
    if which == "all":
        return votes
    found = votes[votes["prompt"].map(lambda prompt: in_half(prompt, which)).astype(bool)]
    if found.empty:
        raise DataError(none_in_half(len(votes), which))
    return found.reset_index(drop=True)


def in_half(prompt: Prompt, which: Votes) -> bool:
    """Whether the votes on a prompt are among those that `select_votes` takes."""
    if which == "all":
        return True
    second = falls_to_eval(f"half/{prompt_key(prompt)}", 0, 0.5)
    return second == (which == "second_half")


def none_in_half(votes: int, which: Votes) -> str:
    """Why a half of the votes cannot be used."""
    return (
        f"none of the {votes} votes is on a prompt of the {which.replace('_', ' ')}; add votes on "
        "more prompts, or train on all of them"
    )


class VoteTexts(NamedTuple):
    """The texts of a vote, and who won by how much."""

    prompt: Prompt
    chosen: str
    rejected: str
    tie: bool
    margin: float

    @property
    def lead(self) -> float:
        """The margin; a tie has none, whatever the row has for its other votes."""
        return 0.0 if self.tie else float(self.margin)


def vote_texts(row: Mapping[str, Any]) -> VoteTexts:
    """The texts of a row of the preferences, by `with_winners`."""
    answers = row["response_a"], row["response_b"]
    chosen, rejected = answers[::-1] if row["vote"] == "b" else answers
    return VoteTexts(row["prompt"], chosen, rejected, row["vote"] == "tie", row["margin"])


def encode_votes(
    votes: Sequence[VoteTexts], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> Iterator[tuple[int, VoteTexts, Fitted]]:
    """The place and the tokens of each vote whose two texts are not the same tokens."""
    for start in range(0, len(votes), BATCH):
        part = votes[start : start + BATCH]
        asked = [(vote.prompt, (vote.chosen, vote.rejected)) for vote in part]
        found = encode_all_answers(asked, tokenizer, max_length)
        for place, (vote, tokens) in enumerate(zip(part, found, strict=True), start):
            if tokens.responses[0] != tokens.responses[1]:
                yield place, vote, tokens


def pair_of(
    prompt: list[int], answers: Sequence[list[int]], *, tie: bool, margin: float, cut: bool
) -> Pair:
    """A pair of the tokens of a prompt and of its two answers."""
    chosen, rejected = (prompt + answer for answer in answers)
    start = max(len(prompt), 1)
    return Pair(chosen, rejected, (start, start), tie, margin, cut)


class EncodedPairs(NamedTuple):
    """The votes of a table, encoded, without those that teach nothing."""

    pairs: list[Pair]
    table: pd.DataFrame  # the rows of these pairs
    same: int  # votes left out, since both texts are the same tokens


def encode_pairs(
    table: pd.DataFrame,
    tokenizer: "PreTrainedTokenizerBase",
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
    columns = (with_winners(table)[name] for name in VoteTexts._fields)
    votes = [VoteTexts(*row) for row in zip(*columns, strict=True)]
    pairs, kept = [], []
    for row, vote, found in encode_votes(votes, tokenizer, max_length):
        tie = bool(vote.tie)
        made = pair_of(found.prompt, found.responses, tie=tie, margin=vote.lead, cut=found.cut)
        pairs.append(made)
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


def smoothing(ties: Tensor, label_smoothing: float) -> Tensor:
    """(B,) probability that each vote is the wrong way round: 0.5 for a tie."""
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
