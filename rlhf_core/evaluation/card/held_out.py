"""What held-out votes say about a reward model: accuracy, baselines, ceiling, calibration, slices.

Votes on one prompt rise and fall together, so every interval is over prompts. A pair is the prompt
and two answers in one order, whatever the sides they were shown on.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_core.data.pairs import half_for_ties, prompt_numbers, with_winners
from rlhf_core.data.prepared import (
    KEPT,
    UNKNOWN,
    canonical_prompt,
    known_answers,
    votes_of_machines,
)
from rlhf_core.evaluation.card.report_card import Agreement, Bin, Members, Share, Slice, SmallSlices
from rlhf_core.evaluation.intervals import (
    Estimate,
    calibration_estimate,
    calibration_noise,
    mean_estimate,
)
from rlhf_core.functional.ranking import clustered_share, expected_calibration_error
from rlhf_core.seeding import generator

_NAMED = 12  # small slices of a column that are named
_BUCKETS = 4


@dataclass(frozen=True)
class HeldOutVotes:
    """Votes as cast, and what a reward model gives to both answers.

    Args:
        table: N votes, as prepared.
        gaps: (K, N) reward of the first answer less that of the second, by each member.
        longer: (N,) tokens of the first answer less those of the second.
        scale: logits in a unit of reward.
        seed: of the run, for the intervals.
    """

    table: pd.DataFrame
    gaps: Tensor
    longer: Tensor
    scale: float
    seed: int
    _side: Tensor = field(init=False)  # (N,) 1 if the first answer won, -1 if the second, 0: a tie

    def __post_init__(self) -> None:
        sides = self.table["vote"].map({"a": 1.0, "b": -1.0, "tie": 0.0}).tolist()
        object.__setattr__(self, "_side", torch.tensor(sides))

    # ---- shares ----

    @cached_property
    def decided(self) -> Tensor:
        """(N,) bool, whether a vote has a winner."""
        return self._side != 0

    @cached_property
    def prompt(self) -> Tensor:
        """(N,) number of the prompt."""
        return prompt_numbers(self.table)

    @cached_property
    def correct(self) -> Tensor:
        """(N,) 1 where the reward prefers the winner, 1/2 where it has no preference."""
        return half_for_ties(self.gaps.mean(0) * self._side)

    def share(
        self, points: Tensor, among: Tensor, stream: str, confidence: float = 0.95
    ) -> Share | None:
        """The mean of (N,) points among some votes; None if there are none."""
        if not among.any():
            return None
        prompts = self.prompt[among]
        bounds = clustered_share(
            points[among], prompts, confidence=confidence, generator=self._draws(stream)
        )
        return Share(share=bounds, votes=len(prompts), prompts=len(prompts.unique()))

    def accuracy(self, among: Tensor | None = None) -> Share | None:
        """Accuracy on votes with a winner, all or some of them.

        Its bounds on all votes are those of the reward-model stage, whose random stream it has.
        """
        some = self.decided if among is None else self.decided & among
        return self.share(self.correct, some, "reward/bootstrap")

    def longer_rule(self) -> Share | None:
        """Accuracy of "prefer the longer"; as long is half."""
        points = half_for_ties(self.longer * self._side)
        return self.share(points, self.decided, "report_card/longer")

    def first_rule(self) -> Share | None:
        """Accuracy of "prefer the answer shown first", where that is known."""
        first = torch.tensor(
            self.table["shown_first"].map({"a": 1.0, "b": -1.0}).fillna(0.0).tolist()
        )
        return self.share(
            half_for_ties(first * self._side), self.decided & (first != 0), "report_card/first"
        )

    def where_won(self, longer: bool) -> Share | None:
        """Accuracy where the longer answer won, or where the shorter one did."""
        lead = self.longer * self._side
        return self.accuracy(lead > 0 if longer else lead < 0)

    # ---- the ceiling ----

    def agreement(self) -> Agreement | None:
        """How well people predict each other; None unless some pair has votes of several.

        A vote is compared with those of other annotators on the same pair. With p the share of
        people who prefer an answer of the pair, another vote is the same with probability
        a = E[1 - 2p(1 - p)], and the best predictor is right with E[max(p, 1 - p)], which by
        Jensen's inequality is at most (1 + √(2a - 1)) / 2.
        """
        nobodys = known_answers(self.table) | votes_of_machines(self.table)
        at = np.flatnonzero(self.decided.numpy() & ~nobodys.to_numpy())
        pair, flipped = self._pairs
        first = np.where(flipped.numpy()[at], -1, 1) * self._side.numpy()[at] > 0
        votes = pd.DataFrame({"pair": pair.numpy()[at], "first": first.astype(int)})
        # An anonymous vote is another person's than any other vote.
        names = self.table["annotator"].to_numpy()[at]
        votes["who"] = [name or f"\0{n}" for n, name in enumerate(names)]
        of_pair = votes.groupby("pair")["first"]
        of_person = votes.groupby(["pair", "who"])["first"]
        others = of_pair.transform("size") - of_person.transform("size")
        firsts = of_pair.transform("sum") - of_person.transform("sum")
        same = firsts.where(votes["first"] == 1, others - firsts)
        several = torch.zeros(len(self.table), dtype=torch.bool)
        several[at] = torch.tensor((others > 0).to_numpy())
        pairwise, majority = torch.zeros(len(self.table)), torch.zeros(len(self.table))
        pairwise[at] = torch.tensor((same / others.clip(lower=1)).to_numpy(), dtype=torch.float32)
        majority[at] = half_for_ties(torch.tensor((2 * same - others).to_numpy()))
        agree = self.share(pairwise, several, "report_card/agreement")
        most = self.share(majority, several, "report_card/ceiling")
        accuracy = self.accuracy(several)
        if agree is None or most is None or accuracy is None:
            return None
        limit = (1 + max(2 * agree.share.high - 1, 0) ** 0.5) / 2
        return Agreement(pairwise=agree, majority=most, limit=limit, accuracy=accuracy)

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        return pair_numbers(self.table)

    # ---- calibration ----

    def log_loss(self) -> Estimate | None:
        """Bradley-Terry loss in nats a vote; a tie counts half in each direction."""
        if self.table.empty:
            return None
        gap, tie = self.gaps.mean(0) * self.scale, ~self.decided
        won = torch.where(tie, gap, gap * self._side)
        wrong = 0.5 * tie.float()
        losses = -(1 - wrong) * logsigmoid(won) - wrong * logsigmoid(-won)
        return mean_estimate(losses, self.prompt, self._draws("report_card/loss"))

    def calibration(self) -> tuple[Estimate, float, float, tuple[Bin, ...]] | None:
        """The calibration error, that of a calibrated model, the mean confidence, and the curve.

        Each vote with a winner counts in both orders. None if there is none.
        """
        if not self.decided.any():
            return None
        pair, flipped = self._pairs
        flip = torch.where(flipped, -1.0, 1.0)[self.decided]
        first = torch.sigmoid(self.gaps.mean(0)[self.decided] * self.scale * flip)
        won = (self._side[self.decided] * flip > 0).float()
        both, outcomes = torch.cat([first, 1 - first]), torch.cat([won, 1 - won])
        prompts = self.prompt[self.decided].repeat(2)
        error = calibration_estimate(both, outcomes, prompts, self._draws("report_card/ece"))
        noise = calibration_noise(first, pair[self.decided], self._draws("report_card/calibrated"))
        curve = expected_calibration_error(both, outcomes)
        edges = torch.arange(1, len(curve.counts)).to(both.dtype) / len(curve.counts)
        bin_of = torch.bucketize(both, edges, right=True)
        draws = self._draws("report_card/bins")
        bins = tuple(
            Bin(
                predicted=curve.mean_predicted[b].item(),
                observed=clustered_share(
                    outcomes[bin_of == b], prompts[bin_of == b], generator=draws
                ),
                votes=int(curve.counts[b]),
            )
            for b in bin_of.unique().tolist()
        )
        return error, noise, torch.maximum(first, 1 - first).mean().item(), bins

    # ---- slices ----

    def slices(self, least: int) -> tuple[tuple[Slice, ...], tuple[SmallSlices, ...]]:
        """Accuracy by each value of each column, and the values with fewer than `least` prompts.

        A column with a single value is no slice. `worse` uses bounds at 1 - 0.05 / m for m judged
        slices, so that the worst of many is not taken for worse by chance alone.
        """
        judged: list[tuple[str, str, Tensor]] = []
        small: list[SmallSlices] = []
        for column, values in self.columns():
            found = self._by_value(values)
            if len(found) < 2:
                continue
            enough = {v: rows for v, rows in found.items() if self._prompts(rows) >= least}
            judged += [(column, value, rows) for value, rows in enough.items()]
            if few := {v: rows for v, rows in found.items() if v not in enough}:
                votes = sum(len(rows) for rows in few.values())
                named = tuple(sorted(few)[:_NAMED])
                small.append(SmallSlices(column=column, values=len(few), votes=votes, named=named))
        slices = tuple(self._slice(*part, len(judged)) for part in judged)
        return slices, tuple(small)

    def columns(self) -> Iterable[tuple[str, list[str]]]:
        """The columns to slice by, with the value of each vote."""
        named = {"annotator": "annotator", "source": "source", "shown_first": "shown first"}
        for column, title in named.items():
            yield title, [str(value) or UNKNOWN for value in self.table[column]]
        if len(self.longer):
            yield "length difference", _buckets(self.longer.abs())
        if KEPT in self.table:
            names = dict.fromkeys(name for kept in self.table[KEPT] for name in kept)
            for name in names:
                yield name, [kept.get(name) or UNKNOWN for kept in self.table[KEPT]]

    def _by_value(self, values: list[str]) -> dict[str, Tensor]:
        """The rows of the votes with a winner, by value."""
        codes, names = pd.factorize(np.array(values, dtype=object))
        rows = np.flatnonzero(self.decided.numpy())
        order = rows[np.argsort(codes[rows], kind="stable")]
        ends = np.cumsum(np.bincount(codes[rows], minlength=len(names)))
        parts = np.split(order, ends[:-1]) if len(names) else []
        return {
            str(name): torch.from_numpy(part)
            for name, part in zip(names, parts, strict=True)
            if len(part)
        }

    def _prompts(self, rows: Tensor) -> int:
        return len(self.prompt[rows].unique())

    def _slice(self, column: str, value: str, rows: Tensor, judged: int) -> Slice:
        points, prompts = self.correct[rows], self.prompt[rows]
        stream = f"report_card/slice/{column}/{value}"
        bounds = clustered_share(points, prompts, generator=self._draws(stream))
        strict = clustered_share(
            points, prompts, confidence=1 - 0.05 / judged, generator=self._draws(stream)
        )
        share = Share(share=bounds, votes=len(rows), prompts=self._prompts(rows))
        whole = self.correct[self.decided].mean().item()
        return Slice(column=column, value=value, accuracy=share, worse=strict.high < whole)

    # ---- members ----

    def members(self) -> Members | None:
        """The members one by one, and how often they disagree; None for a model alone."""
        if len(self.gaps) == 1 or not self.decided.any():
            return None
        points = half_for_ties(self.gaps * self._side)
        accuracies = [
            self.share(own, self.decided, f"report_card/member/{k}") for k, own in enumerate(points)
        ]
        differ = ((points != points[0]).any(0)).float()
        disagreement = self.share(differ, self.decided, "report_card/disagreement")
        assert disagreement is not None
        known = tuple(found for found in accuracies if found is not None)
        return Members(accuracies=known, disagreement=disagreement)

    def winners(self) -> pd.DataFrame:
        """The winning answer of the first decided vote on each prompt: prompt and chosen."""
        voted = with_winners(self.table)[self.decided.numpy()]
        return voted.iloc[np.unique(self.prompt[self.decided].numpy(), return_index=True)[1]]

    def _draws(self, stream: str) -> torch.Generator:
        return generator(self.seed, stream)


def pair_numbers(table: pd.DataFrame) -> tuple[Tensor, Tensor]:
    """(N,) number of the pair that each vote is about, and (N,) bool whether its answers are in the
    other order than those of the pair.

    A pair is a prompt and two answers, whatever the sides they were shown on.
    """
    sides = list(zip(table["response_a"], table["response_b"], strict=True))
    prompts = table["prompt"].map(canonical_prompt)
    pairs = [(p, min(a, b), max(a, b)) for p, (a, b) in zip(prompts, sides, strict=True)]
    numbers: dict[tuple[str, str, str], int] = {}
    found = torch.tensor([numbers.setdefault(pair, len(numbers)) for pair in pairs]).long()
    return found, torch.tensor([a > b for a, b in sides], dtype=torch.bool)


def _buckets(values: Tensor) -> list[str]:
    """The quarter of its values that each falls into, by the bounds of the quarter."""
    numbers = values.long().numpy()
    edges = np.unique(np.quantile(numbers, np.linspace(0, 1, _BUCKETS + 1)[1:-1], method="lower"))
    at = np.searchsorted(edges, numbers, side="left")
    names = {}
    for bucket in np.unique(at):
        low, high = int(numbers[at == bucket].min()), int(numbers[at == bucket].max())
        names[bucket] = f"{low} tokens" if low == high else f"{low} to {high} tokens"
    return [names[bucket] for bucket in at]
