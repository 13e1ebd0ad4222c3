"""What annotators are like, learnt beside the reward model from the votes that it trains on.

The reward model scores the two answers of a vote before it learns from them. These scores are kept,
of each vote the newest, and from time to time reliability, liking for the left and for length of
every annotator are set to what is most probable given all votes seen so far:
`rlhf_core.functional.annotators`. So the rewards climb, a step at a time, what the annotators have
already climbed to the top of, and there is no second learning rate. In the first epoch every score
is from before its vote was learnt from, so that an annotator gains nothing by what the rewards know
by heart.

Each member of an ensemble has annotators of its own, who cast the votes of its bootstrap.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import pandas as pd
import torch
from torch import Tensor

from rlhf_core.data.pairs import with_lengths
from rlhf_core.functional.annotators import CastVotes, Habits, fit_habits, vote_logits, vote_nll
from rlhf_core.training.ranks import Ranks

GOLD_RELIABILITY = 4.0  # a of known answers: an average voter has 1
ANONYMOUS = "(anonymous)"  # what tables call those who cast votes without a name
AGAIN = 0.01  # share of the votes seen that are new when the habits are fitted again


@dataclass(frozen=True)
class VoteFacts:
    """What the likelihood of each vote depends on beside the rewards; answer 1 is the chosen one.

    Annotator 0 is the gold annotator, the others are in the order of `names`.
    """

    names: tuple[str, ...]
    annotator: Tensor  # (N,) int64
    side: Tensor  # (N,) 1 chosen was on the left, -1 on the right, 0 unknown
    length_gap: Tensor  # (N,) characters of chosen minus rejected, in `unit`
    tie: Tensor  # (N,) bool
    unit: float  # characters

    @classmethod
    def of(cls, table: pd.DataFrame, gold: str, known: "VoteFacts | None" = None) -> Self:
        """The facts of the votes of a prepared table, or of what `StoredPairs` knows of them.

        Args:
            gold: the annotator whose votes are known answers, where the row is marked as gold.
            known: of other votes, for the numbers of their annotators and their unit; who is not
                among them gets a number behind them.
        """
        votes = table if "chosen_length" in table else with_lengths(table)
        persons = votes["annotator"].astype(str).replace("", ANONYMOUS)
        is_gold = (votes["annotator"] == gold) & votes["gold"].astype(bool)
        found = sorted(set(persons[~is_gold]))
        before = (gold,) if known is None else known.names
        names = (*before, *(name for name in found if name not in before[1:]))
        number = {name: place for place, name in enumerate(names) if place}
        who = [
            0 if right else number[person] for person, right in zip(persons, is_gold, strict=True)
        ]
        chosen_side = votes["vote"].astype(str).replace("tie", "a")
        first = votes["shown_first"].astype(str)
        side = (first == chosen_side).astype(float) - ((first != chosen_side) & (first != ""))
        gap = votes["chosen_length"] - votes["rejected_length"]
        lengths = torch.tensor(gap.tolist(), dtype=torch.float64)
        unit = lengths.square().mean().sqrt().item() if known is None else known.unit
        return cls(
            names,
            torch.tensor(who, dtype=torch.int64),
            torch.tensor(side.tolist(), dtype=torch.float64),
            lengths / (unit or 1.0),
            torch.tensor(votes["tie"].tolist(), dtype=torch.bool),
            unit or 1.0,
        )

    def cast(self, gap: Tensor, rows: Tensor) -> CastVotes:
        """Some of the votes, with r(chosen) - r(rejected) of each."""
        return CastVotes(
            gap,
            self.side[rows].to(gap),
            self.length_gap[rows].to(gap),
            self.tie[rows].to(gap.device),
            self.annotator[rows].to(gap.device),
        )


class Annotators:
    """The habits of the annotators of some votes, as they are known so far. Part of a checkpoint.

    With a gold annotator there is a fixed point, and c may have a mean, which is a liking for
    length that all share. Without one it has none, since it could not be told from a reward for
    length. The mean of a is 1 in either case, so that rewards are in logits of the average voter;
    with one annotator that is all there is to know, and it is plain Bradley-Terry but for a liking
    for a side. Votes without a name are those of one more annotator.

    Args:
        facts: of the votes.
        times: how often each of them counts; once by default.
    """

    def __init__(self, facts: VoteFacts, ranks: Ranks, times: Sequence[int] | None = None) -> None:
        self.facts = facts
        self._ranks = ranks
        count, votes = len(facts.names), len(facts.tie)
        self._times = torch.tensor([1] * votes if times is None else list(times))
        self._gaps = torch.zeros(votes, dtype=torch.float64)
        self._seen = torch.zeros(votes, dtype=torch.bool)
        self._new = 0  # votes since the last fit
        values = torch.zeros(count, 3, dtype=torch.float64)
        values[0, 0], values[1:, 0] = GOLD_RELIABILITY, 1.0
        ties = facts.tie.repeat_interleave(self._times).double().mean().item()
        # Of equal answers ν / (2 + ν) are ties.
        log_tie = math.log(2 * ties / (1 - ties)) if 0 < ties < 1 else -math.inf
        log_tie = 0.0 if ties == 1 else log_tie
        nothing = torch.zeros_like(values)
        self.habits = Habits(values, nothing, torch.tensor(log_tie, dtype=torch.float64))

    @property
    def gold(self) -> bool:
        """Whether some votes are known answers."""
        return bool(self.votes()[0])

    def votes(self) -> Tensor:
        """(K,) how many votes of each annotator there are to learn from."""
        who = self.facts.annotator.repeat_interleave(self._times)
        return torch.bincount(who, minlength=len(self.facts.names))

    def loss(self, gap: Tensor, rows: Sequence[int], margin: Tensor) -> Tensor:
        """Mean negative log-likelihood of some votes, in nats; a row may be there several times.

        Shapes: gap (B,) r(chosen) - r(rejected); margin (B,).
        """
        index = torch.tensor(rows)
        cast = self.facts.cast(gap, index)
        logits = vote_logits(cast, self.habits.values.to(gap))
        return vote_nll(logits, cast.tie, self.habits.log_tie.to(gap), margin=margin).mean()

    def learn(self, gaps: Mapping[int, float], rows: Sequence[int]) -> None:
        """Take note of r(chosen) - r(rejected) of votes; all ranks have to call this together.

        Args:
            gaps: by row, of the votes that this rank has scored.
            rows: of all ranks.
        """
        places = {row: place for place, row in enumerate(rows)}
        mine = torch.zeros(len(rows), dtype=torch.float64)
        mine[[places[row] for row in gaps]] = torch.tensor([*gaps.values()], dtype=torch.float64)
        # Each vote is scored on one rank, and a sum with zeros is exact.
        self._gaps[list(rows)] = self._ranks.total(mine)
        self._seen[list(rows)] = True
        self._new += len(rows)
        if self._new >= AGAIN * int(self._seen.sum()):
            self.fit()

    def fit(self) -> None:
        """Set the habits to their mode given the votes seen; the same to the bit on every rank."""
        self._new = 0
        if self._ranks.main:
            seen = self._seen.nonzero().squeeze(1)
            rows = seen.repeat_interleave(self._times[seen])
            free = torch.ones_like(self.habits.values, dtype=torch.bool)
            free[0] = False
            self.habits = fit_habits(
                self.facts.cast(self._gaps[rows], rows),
                self.habits.values,
                free,
                log_tie=self.habits.log_tie.item(),
                anchor_reliability=True,
                anchor_length=not self.gold,
            )
        self.habits = Habits(*self._ranks.from_main(tuple(self.habits)))

    @property
    def gap(self) -> float:
        """The root mean square of r(chosen) - r(rejected) over the votes seen; 0 without any."""
        seen = self._gaps[self._seen]
        return seen.square().mean().sqrt().item() if len(seen) else 0.0

    def predict(self, facts: VoteFacts, gap: Tensor) -> Tensor:
        """(N,) logit that the chosen answer of other votes wins; who is new has a = 1, b = c = 0.

        Args:
            facts: of these votes, with these annotators as `known`.
            gap: (N,) r(chosen) - r(rejected).
        """
        more = torch.zeros(len(facts.names) - len(self.facts.names), 3, dtype=torch.float64)
        more[:, 0] = 1.0
        values = torch.cat([self.habits.values, more])
        return vote_logits(facts.cast(gap.double(), torch.arange(len(gap))), values)

    def state_dict(self) -> dict[str, Any]:
        """The scores of the votes, and the habits."""
        return {
            "gaps": self._gaps.clone(),
            "seen": self._seen.clone(),
            "new": self._new,
            "habits": tuple(self.habits),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._gaps.copy_(state["gaps"])
        self._seen.copy_(state["seen"])
        self._new = state["new"]
        self.habits = Habits(*state["habits"])


def average_habits(members: Sequence[Annotators]) -> Habits:
    """What the members of an ensemble know of the annotators of the same votes.

    The moments of the mixture of what each says: means mₖ with deviations sₖ become the mean
    m̄ = Σₖ mₖ / K, with the variance Σₖ (sₖ² + (mₖ - m̄)²) / K. It is taken over the members that
    have votes of an annotator in their bootstrap; without any the annotator is as by the prior.
    """
    if len(members) == 1:
        return members[0].habits
    values = torch.stack([member.habits.values for member in members])
    variances = torch.stack([member.habits.deviations for member in members]).square()
    has = torch.stack([member.votes() > 0 for member in members])
    weights = torch.where(has.any(0), has, True).double()
    weights = (weights / weights.sum(0)).unsqueeze(2)
    mean = (weights * values).sum(0)
    variance = (weights * (variances + (values - mean).square())).sum(0)
    nu = torch.stack([member.habits.log_tie for member in members]).exp().mean()
    return Habits(mean, variance.sqrt(), nu.log())


def habits_table(facts: VoteFacts, habits: Habits, gap: float) -> pd.DataFrame:
    """A row for each annotator with votes, the least reliable first; gold is not among them.

    Args:
        gap: the root mean square of r(chosen) - r(rejected) over the votes. It is the column
            `reward_gap`, with which `reliability` has to be read, as `length` with `length_unit`
            (characters).
    """
    counts = torch.bincount(facts.annotator, minlength=len(facts.names))
    known = torch.bincount(facts.annotator, facts.side.abs(), minlength=len(facts.names))
    names = ("reliability", "left", "length")
    columns = {"annotator": facts.names, "votes": counts, "known_sides": known.long()}
    for place, name in enumerate(names):
        columns[name] = habits.values[:, place]
        columns[f"{name}_sd"] = habits.deviations[:, place]
    columns["length_unit"] = torch.full((len(counts),), facts.unit)
    columns["reward_gap"] = torch.full((len(counts),), gap)
    frame = pd.DataFrame({name: list(map(_plain, x)) for name, x in columns.items()})
    frame = frame[1:][frame["votes"][1:] > 0]
    return frame.sort_values(["reliability", "annotator"], ignore_index=True)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
