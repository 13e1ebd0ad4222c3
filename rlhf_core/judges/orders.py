"""Show each pair in both orders, for a judge that may prefer what it reads first.

Models that compare two answers often prefer a position, whatever stands there. A judge that says
the same with the answers exchanged has read them; one that does not has given no verdict about the
answers, which is a tie.

Reference: Zheng et al. 2023, https://arxiv.org/abs/2306.05685, section 3.4 (position bias, and the
same remedy).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_core.data.prepared import canonical_prompt
from rlhf_core.judges.judge import Judge, Pair, Verdict, Winner

_EXCHANGED: Mapping[Winner, Winner] = {"a": "b", "b": "a", "tie": "tie"}


@dataclass(frozen=True)
class BothOrders:
    """Asks a judge about each pair in both orders.

    * The same verdict twice is the verdict, with the reason of the first order.
    * Two verdicts that contradict each other are a tie, and so are a winner and a tie: the order
      has decided. The verdict has `consistent` False, and both reasons.
    * If one of the two is missing, there is no verdict.
    * Two equal answers are a tie; the judge is not asked, so `consistent` is None.

    Each different pair is asked about once.
    """

    judge: Judge

    @property
    def name(self) -> str:
        """The name of the judge."""
        return self.judge.name

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict for each pair."""
        asked: dict[tuple[str, str, str], Pair] = {}
        for pair in pairs:
            if pair.a != pair.b:
                for each in (pair, _exchanged(pair)):  # side by side, should the judge be stopped
                    asked.setdefault(_key(each), each)
        said = dict(zip(asked, self.judge(list(asked.values())), strict=True)) if asked else {}
        return [
            Verdict("tie", "the answers are equal")
            if pair.a == pair.b
            else _both(said[_key(pair)], said[_key(_exchanged(pair))])
            for pair in pairs
        ]


def _both(first: Verdict, second: Verdict) -> Verdict:
    """The verdict of two orders; in the second, b is called A."""
    missing = next((verdict for verdict in (first, second) if verdict.winner is None), None)
    if missing is not None:
        return Verdict(None, missing.reason)
    assert first.winner is not None
    assert second.winner is not None
    if first.winner == _EXCHANGED[second.winner]:
        return Verdict(first.winner, first.reason, consistent=True)
    reasons = [
        f"{order}: {verdict.winner}{', ' if verdict.reason else ''}{verdict.reason}"
        for order, verdict in (("as shown", first), ("exchanged", second))
    ]
    return Verdict("tie", "; ".join(reasons), consistent=False)


def _exchanged(pair: Pair) -> Pair:
    return Pair(pair.prompt, pair.b, pair.a)


def _key(pair: Pair) -> tuple[str, str, str]:
    return canonical_prompt(pair.prompt), pair.a, pair.b
