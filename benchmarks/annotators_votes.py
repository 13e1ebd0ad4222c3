"""Pooled and aware linear reward models on votes that people cast, by the published labels.

Features are TF-IDF, with or without the length (log of the characters). Whole debates, or whole
prompts, are left out. Nothing says what was shown on the left, so nobody's liking for a side can be
learnt.
"""

import csv
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from annotators_demo import with_interval
from annotators_linear import Linear, Votes, fit_linear
from scipy import stats
from sklearn.feature_extraction.text import TfidfVectorizer

from rlhf_core.functional.annotators import CastVotes

WORDS = 2000  # of the bag
RIDGE = 5.0  # a prior of one pair in which five people agree
KNOWN = 0.02  # of the training pairs, whose label is given as a known answer
WAYS = {
    "pooled": {"aware": False, "gold": False},
    "aware": {"aware": True, "gold": False},
    "pooled, 2 % of the labels as known answers": {"aware": False, "gold": True},
    "aware, 2 % of the labels as known answers": {"aware": True, "gold": True},
}
LEAST_VOTES = (5, 20, 50, 100)


@dataclass(frozen=True)
class PairOfAnswers:
    """Two answers, who voted how, and the published label."""

    group: str
    answers: tuple[str, str]
    votes: tuple[tuple[str, str], ...]  # annotator, and a, b or tie
    label: str  # a or b; "" if there is none to test with


def read_arguments(data: Path) -> list[PairOfAnswers]:
    """Pairs of arguments; a group is a debate, with both of its sides."""
    return [
        PairOfAnswers(
            row["debate"].split("_")[0],
            (row["response_a"], row["response_b"]),
            tuple((who, vote) for who, vote, _ in row["votes"]),
            row["gold"] if row["strict"] and row["gold"] in ("a", "b") else "",
        )
        for row in _lines(data / "argument-pairs-5annotators-dev.jsonl")
    ]


def read_pandalm(data: Path, folds: int = 10) -> list[PairOfAnswers]:
    """Pairs of PandaLM; a group is a tenth of the prompts, and the label that of the majority."""
    rows = _lines(data / "pandalm-pairs-3annotators.jsonl")
    prompts = sorted({row["prompt"] for row in rows})
    random.Random(0).shuffle(prompts)
    fold = {prompt: str(number % folds) for number, prompt in enumerate(prompts)}
    return [
        PairOfAnswers(
            fold[row["prompt"]],
            (row["response_a"], row["response_b"]),
            tuple((who, vote) for who, vote in row["votes"]),
            row["majority"] if row["majority"] in ("a", "b") else "",
        )
        for row in rows
    ]


SETS = {"argument pairs": read_arguments, "PandaLM": read_pandalm}


def votes_section(data: Path) -> str:
    """The tables of both sets, as Markdown."""
    rows = [
        "| set | features | way | accuracy | aware minus pooled, same labels |",
        "|---|---|---|---|---|",
    ]
    for title, read in SETS.items():
        pairs = read(data)
        for length in (False, True):
            features = "TF-IDF and length" if length else "TF-IDF"
            found = {way: _by_group(pairs, length, **how) for way, how in WAYS.items()}
            for way, each in found.items():
                right, tested = (sum(one[place] for one in each) for place in (0, 1))
                gain = "–"
                if way.startswith("aware"):
                    before = found[way.replace("aware", "pooled")]
                    gain = with_interval(
                        [(b[0] - a[0]) / a[1] for a, b in zip(before, each, strict=True)]
                    )
                rows.append(f"| {title} | {features} | {way} | {right / tested:.3f} | {gain} |")
                print(rows[-1], flush=True)
        groups = len({pair.group for pair in pairs})
        rows[-1] += ""
        print(f"{title}: {groups} groups", flush=True)
    return "\n".join(
        [
            *rows,
            "",
            "The difference: mean over the groups that are left out (6 debates; 10 tenths of the "
            "prompts), with the 95 % interval of Student's t.",
            "",
            _competence(read_arguments(data), data),
        ]
    )


def _by_group(
    pairs: Sequence[PairOfAnswers], length: bool, *, aware: bool, gold: bool
) -> list[tuple[int, int]]:
    """Right answers and tested pairs, for each group that is left out."""
    found = []
    for group in sorted({pair.group for pair in pairs}):
        train = [pair for pair in pairs if pair.group != group]
        test = [pair for pair in pairs if pair.group == group and pair.label]
        vectorizer = _vectorizer(train)
        votes, _ = as_votes(train, vectorizer, length, gold)
        weights = fit_linear(votes, aware=aware, ridge=RIDGE).weights
        gap = _features(test, vectorizer, length) @ weights
        label = torch.tensor([1.0 if pair.label == "a" else -1.0 for pair in test])
        found.append((int((gap * label > 0).sum()), len(test)))
    return found


def as_votes(
    pairs: Sequence[PairOfAnswers], vectorizer: TfidfVectorizer, length: bool, gold: bool
) -> tuple[Votes, list[str]]:
    """All votes on some pairs, and the names of the annotators; known answers come last."""
    names = sorted({who for pair in pairs for who, _ in pair.votes})
    number = {name: place for place, name in enumerate(names)}
    cast = [(i, number[who], vote) for i, pair in enumerate(pairs) for who, vote in pair.votes]
    if gold:
        labelled = [i for i, pair in enumerate(pairs) if pair.label]
        known = random.Random(0).sample(labelled, round(KNOWN * len(labelled)))
        cast += [(i, len(names), pairs[i].label) for i in known]
    characters = [len(pair.answers[0]) - len(pair.answers[1]) for pair in pairs]
    pair = torch.tensor([i for i, _, _ in cast])
    sign = torch.tensor([-1.0 if vote == "b" else 1.0 for _, _, vote in cast], dtype=torch.float64)
    lengths = torch.tensor(characters, dtype=torch.float64)[pair] * sign
    nothing = torch.zeros_like(sign)
    votes = CastVotes(
        gap=nothing,
        side=nothing,
        length_gap=lengths / lengths.square().mean().sqrt(),
        tie=torch.tensor([vote == "tie" for _, _, vote in cast]),
        annotator=torch.tensor([who for _, who, _ in cast]),
    )
    features = _features(pairs, vectorizer, length)
    count = len(names) + gold
    return Votes(features, pair, sign, votes, count, len(names) if gold else None), names


def _vectorizer(pairs: Sequence[PairOfAnswers]) -> TfidfVectorizer:
    vectorizer = TfidfVectorizer(min_df=2, max_features=WORDS)
    return vectorizer.fit([text for pair in pairs for text in pair.answers])


def _features(
    pairs: Sequence[PairOfAnswers], vectorizer: TfidfVectorizer, length: bool
) -> torch.Tensor:
    """(P, D) of the first answers minus those of the second."""
    first, second = (
        vectorizer.transform([pair.answers[side] for pair in pairs]).toarray() for side in (0, 1)
    )
    found = first - second
    if length:
        logs = [math.log1p(len(a)) - math.log1p(len(b)) for a, b in (p.answers for p in pairs)]
        found = np.hstack([found, np.array(logs)[:, None]])
    return torch.from_numpy(found)


def _competence(pairs: Sequence[PairOfAnswers], data: Path) -> str:
    """How reliability goes with the competence that was published for each worker."""
    with (data / "argument-pairs-workers.csv").open() as file:
        published = {row["worker"]: float(row["mace_competence"]) for row in csv.DictReader(file)}
    votes, names = as_votes(pairs, _vectorizer(pairs), True, False)
    linear: Linear = fit_linear(votes, aware=True, ridge=RIDGE)
    reliability = linear.habits.values[:, 0].tolist()
    counts = torch.bincount(votes.cast.annotator, minlength=len(names)).tolist()
    agreement = _agreement(pairs)
    rows = [
        "| workers with at least | workers | reliability a | agreement with the others' votes |",
        "|---|---|---|---|",
    ]
    for least in LEAST_VOTES:
        kept = [i for i, name in enumerate(names) if counts[i] >= least and name in published]
        truth = [published[names[i]] for i in kept]
        ours = _spearman([reliability[i] for i in kept], truth)
        simple = _spearman([agreement[names[i]] for i in kept], truth)
        rows.append(f"| {least} votes | {len(kept)} | {ours} | {simple} |")
        print(rows[-1], flush=True)
    return "\n".join(
        [
            "Spearman's correlation with the competence that Habernal and Gurevych published for "
            "their workers (MACE, from all debates), with Fisher's 95 % interval:",
            "",
            *rows,
        ]
    )


def _agreement(pairs: Sequence[PairOfAnswers]) -> dict[str, float]:
    """How often each worker votes as another one on the same pair does."""
    same: dict[str, list[bool]] = {}
    for pair in pairs:
        for place, (who, vote) in enumerate(pair.votes):
            others = [v for other, (_, v) in enumerate(pair.votes) if other != place]
            same.setdefault(who, []).extend(v == vote for v in others)
    return {who: mean(found) if found else 0.0 for who, found in same.items()}


def _spearman(ours: list[float], truth: list[float]) -> str:
    found = float(stats.spearmanr(ours, truth).statistic)
    half = 1.96 * math.sqrt((1 + found**2 / 2) / (len(ours) - 3))  # Bonett and Wright 2000
    low, high = (math.tanh(math.atanh(found) + sign * half) for sign in (-1, 1))
    return f"{found:.3f} [{low:.3f}, {high:.3f}]"


def _lines(path: Path) -> list[dict]:
    if not path.is_file():
        raise SystemExit(
            f"{path} is not there, and nothing can be measured without it: name the folder that "
            "holds it with --data"
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
