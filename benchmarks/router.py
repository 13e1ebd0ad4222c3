"""What an audit finds of a biased judge, where the truth is known: the demo's reviews.

    python benchmarks/router.py                     # 20 seeds of 4,000 pairs, about four minutes
    python benchmarks/router.py --seeds 2           # a glance
    python benchmarks/router.py --write             # and into docs/feedback/fewer_labels.md

Four judges read pairs of the demo's reviews in both orders, as the project asks a judge, and say
which is better by their taste, a liking for the first answer and one for the longer, and a whim
that is the same whenever they see the pair:

    fair        sentiment alone
    position    adds half of the sentiment scale to whatever it reads first
    length      adds 0.4 of it for every ten words
    both        both

Pairs on which a judge is sure are answered by it alone, but for the audit of 5 %, on which one of
the demo's annotators votes; they err, too. "Error" is that of the answers that the judge gives
alone. By verdict, a judge is sure if it says the same in both orders; with habits, if its habits as
well leave a chance of 0.8 that it is right. They are fitted to its first 1,000 pairs with the true
rewards, scaled to the logits of the annotators: what a perfect reward model would know of it.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from pages import put_between

from rlhf_core.agreement.machines import audit_error
from rlhf_core.functional.annotators import CastVotes, fit_habits
from rlhf_core.judges.judge import Pair, Verdict
from rlhf_core.labelling.router import RouterConfig, route
from rlhf_core.labelling.verdicts import JudgeHabits
from rlhf_core.seeding import stream_seed
from rlhf_core.settings.simulation import AnnotatorsConfig
from rlhf_core.simulation import Annotator, all_prompts, draw_annotators, true_reward, write_review
from tasks.feedback.routing.judging import AskedJudge, Heard

PAGE = Path(__file__).parents[1] / "docs/feedback/fewer_labels.md"
MARKS = "<!-- router: benchmarks/router.py -->", "<!-- end of router -->"
PAIRS, FITTED = 4000, 1000
NOISE = 0.15  # of a judge's whim, as that of the annotators: sentiment
JUDGES = {
    "fair": Annotator("fair"),
    "position": Annotator("position", side_bias=0.5),
    "length": Annotator("length", length_bias=0.4),
    "both": Annotator("both", side_bias=0.5, length_bias=0.4),
}
ROUTER = RouterConfig()


class Biased:
    """A judge of the project whose bias is known."""

    def __init__(self, taste: Annotator, seed: int) -> None:
        self.name = taste.name
        self._taste, self._seed = taste, seed

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        return [Verdict("a" if self._lead(pair) > 0 else "b") for pair in pairs]

    def _lead(self, pair: Pair) -> float:
        low, high = sorted((pair.a, pair.b))
        draw = Random(stream_seed(self._seed, f"whim/{self.name}/{pair.prompt}/{low}/{high}"))
        p = (draw.getrandbits(52) + 0.5) / 2**52
        whim = NOISE * math.log(p / (1 - p)) * (1 if pair.a == low else -1)
        lead = self._taste.utility(pair.a) - self._taste.utility(pair.b)
        return lead + whim + self._taste.side_bias


class Found(NamedTuple):
    """What one judge does in one world."""

    alone: float  # share of the pairs
    error: float  # of those, against the truth
    seen: float  # of those, if people were asked about them all
    audited: float  # what the audit says
    low: float
    high: float


def world(seed: int) -> tuple[list[Pair], np.ndarray]:
    """Pairs of reviews, and the true reward of a less that of b."""
    draw = Random(stream_seed(seed, "router/pairs"))
    prompts = all_prompts()
    pairs: list[Pair] = []
    while len(pairs) < PAIRS:
        prompt = draw.choice(prompts)
        a, b = write_review(prompt, draw), write_review(prompt, draw)
        if a != b:
            pairs.append(Pair(prompt, a, b))
    asked = [str(pair.prompt) for pair in pairs]
    first = np.array(true_reward(asked, [pair.a for pair in pairs]))
    return pairs, first - np.array(true_reward(asked, [pair.b for pair in pairs]))


def of_people(pairs: Sequence[Pair], seed: int) -> np.ndarray:
    """One annotator's vote on each pair: 1 for a, 0 for b, 0.5 for a tie."""
    draw = Random(stream_seed(seed, "router/people"))
    people = draw_annotators(AnnotatorsConfig(), draw)
    points = {"a": 1.0, "b": 0.0, "tie": 0.5}
    votes = []
    for pair in pairs:
        said = draw.choice(people)
        if draw.random() < 0.5:
            votes.append(points[said.prefers(pair.a, pair.b, draw)])
        else:
            votes.append(1 - points[said.prefers(pair.b, pair.a, draw)])
    return np.array(votes)


def habits_of(
    pairs: Sequence[Pair], gap: np.ndarray, heard: Sequence[Heard], people: np.ndarray
) -> JudgeHabits:
    """The judge as an aware reward model that knows the truth would have it."""
    lengths = np.array([len(pair.a) - len(pair.b) for pair in pairs], dtype=float)
    unit = float(np.sqrt((lengths**2).mean()))
    decided = people != 0.5
    scale = _fit(gap[decided], people[decided] == 1, 0 * gap[decided], lengths[decided] / unit)[0]
    logits = scale * gap
    both = [(h.a_first.winner == "a", h.b_first.winner == "a") for h in heard]
    won = np.array(both).T.reshape(-1)
    side = np.repeat([1.0, -1.0], len(pairs))
    a, b, c = _fit(np.tile(logits, 2), won, side, np.tile(lengths, 2) / unit)
    return JudgeHabits(a, b, c, unit, float(np.sqrt((logits**2).mean())))


def _fit(
    gap: np.ndarray, a_won: np.ndarray, side: np.ndarray, lengths: np.ndarray
) -> tuple[float, float, float]:
    sign = torch.tensor(np.where(a_won, 1.0, -1.0))
    votes = CastVotes(
        sign * torch.tensor(gap),
        sign * torch.tensor(side),
        sign * torch.tensor(lengths),
        torch.zeros(len(gap), dtype=torch.bool),
        torch.zeros(len(gap), dtype=torch.int64),
    )
    start = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    found = fit_habits(votes, start, torch.ones(1, 3, dtype=torch.bool))
    a, b, c = found.values[0].tolist()
    return a, b, c


def measure(
    pairs: Sequence[Pair], gap: np.ndarray, heard: Sequence[Heard], people: np.ndarray, seed: int
) -> Found:
    """Route the pairs, and audit."""
    keys = [f"{pair.prompt}\0{pair.a}\0{pair.b}" for pair in pairs]
    ways = np.array(route(keys, [h.opinion for h in heard], ROUTER, f"seed {seed}"))
    said = np.array([1.0 if h.a_first.winner == "a" else 0.0 for h in heard])
    alone, audit = ways == "judge", ways == "audit"
    right = np.where(gap > 0, 1.0, np.where(gap < 0, 0.0, 0.5))
    numbers = {pair.prompt: n for n, pair in enumerate(pairs)}  # type: ignore[misc]
    prompts = np.array([numbers[pair.prompt] for pair in pairs])  # type: ignore[index]
    found = audit_error(said[audit], people[audit], prompts[audit])
    if found is None or found.low is None or found.high is None:
        raise SystemExit("a judge is sure of too few pairs for an audit; have more pairs")
    return Found(
        float(alone.mean()),
        float(np.abs(said - right)[alone].mean()),
        float(np.abs(said - people)[alone].mean()),
        found.value,
        found.low,
        found.high,
    )


def run(seeds: int) -> list[str]:
    """The rows of the table."""
    found: dict[tuple[str, str], list[Found]] = {}
    for seed in range(seeds):
        pairs, gap = world(seed)
        people = of_people(pairs, seed)
        for name, taste in JUDGES.items():
            judge = Biased(taste, seed)
            heard = AskedJudge(judge)(pairs)
            known = habits_of(pairs[:FITTED], gap[:FITTED], heard[:FITTED], people[:FITTED])
            for sure, opinions in (("verdict", heard), ("habits", AskedJudge(judge, known)(pairs))):
                found.setdefault((name, sure), []).append(
                    measure(pairs, gap, opinions, people, seed)
                )
    return [_row(name, sure, each) for (name, sure), each in found.items()]


def _row(name: str, sure: str, found: Sequence[Found]) -> str:
    mean = Found(*np.mean(found, 0))
    as_seen = sum(each.low <= each.seen <= each.high for each in found)
    truth = sum(each.low <= each.error <= each.high for each in found)
    cells = [f"{100 * mean.alone:.0f}%"]
    cells += [f"{100 * share:.1f}%" for share in (mean.error, mean.seen, mean.audited)]
    cells += [f"±{50 * (mean.high - mean.low):.1f}", f"{as_seen} of {len(found)}"]
    return f"| {name} | {sure} | {' | '.join(cells)} | {truth} of {len(found)} |"


def main() -> None:
    """Print the table, and write it where that is wanted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="put the table into its page")
    options = parser.parse_args()
    head = [
        "| judge | sure by | answers alone | true error | error as people see it | audit says | "
        "half its interval | contains what people see | contains the true error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    table = "\n".join([*head, *run(options.seeds)])
    print(table)
    if options.write:
        put_between(table, PAGE, *MARKS)


if __name__ == "__main__":
    main()
