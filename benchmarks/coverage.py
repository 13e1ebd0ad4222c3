"""How often the 95 % intervals of an evaluation contain the truth, by simulation.

    python benchmarks/coverage.py                       # all designs, about a quarter of an hour
    python benchmarks/coverage.py --data-sets 100       # a glance
    python benchmarks/coverage.py --tables lengths      # one of them
    python benchmarks/coverage.py --page                # and into benchmarks/README.md

A data set has 10, 30 or 100 prompts, 1, 2 or 4 answers to each, and verdicts of one prompt that
agree more or less: prompt i is won at rate pᵢ, drawn from a beta distribution with the mean of the
design and the intraclass correlation ρ (ρ = 1: all verdicts on a prompt are the same). The truth is
the mean over all prompts there could be. What is measured are the functions that the stage uses.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pages import put_between
from scipy.special import expit
from scipy.stats import norm

from rlhf_core.evaluation.comparison import Match, at_equal_length, sum_up
from rlhf_core.evaluation.intervals import mean_difference
from rlhf_core.functional.interval import Interval
from rlhf_core.functional.ranking import clustered_bootstrap

PAGE = Path(__file__).parent / "README.md"
RESAMPLES = 500  # of the bootstrap that is shown for comparison
PROMPTS = (10, 30, 100)
RATES = (0.5, 0.6, 0.8)
ANY = (0.2, 0.8)  # a rate drawn anew for each data set: no share is favoured by whole numbers
Covered = dict[str, bool]


class Design(NamedTuple):
    """How the verdicts on a prompt are drawn."""

    answers: int  # to each prompt
    correlation: float  # of two verdicts on a prompt
    ties: float = 0.0  # share


DESIGNS = (
    Design(1, 1.0),
    Design(2, 1.0),
    Design(2, 0.5),
    *(Design(4, rho) for rho in (1.0, 0.8, 0.5, 0.2)),
    Design(1, 1.0, 0.3),
    Design(4, 0.5, 0.3),
)


class Compared(NamedTuple):
    """How two arms on the same prompts are drawn: logits θ + spread·γ, γ standard normal."""

    answers: int
    thetas: tuple[float, float]
    spread: float


DIFFERENCES = tuple(
    Compared(m, thetas, spread)
    for m in (1, 4)
    for thetas in ((0.5, 0.5), (1.0, 0.3))
    for spread in (0.0, 1.0, 3.0)
)


class Lengths(NamedTuple):
    """How arms are drawn whose length matters: logits θ + φ·x + γ; x has mean `longer`, in sd."""

    theta: float
    phi: float
    longer: float
    arms: int = 1


LENGTHS = (
    Lengths(0.0, 0.0, 0.0),
    Lengths(0.0, 1.0, 0.5),
    Lengths(1.5, 0.5, 0.5),
    Lengths(0.0, 1.0, 0.5, arms=2),
)


def main() -> None:
    """Measure, print the tables, and put them into the page if asked to."""
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--data-sets", type=int, default=1000, help="simulated, for each design")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tables", nargs="+", choices=[*TABLES], default=[*TABLES])
    parser.add_argument("--page", action="store_true", help="write benchmarks/README.md")
    args = parser.parse_args()
    for name in args.tables:
        rows = TABLES[name](args.data_sets, args.seed)
        section = f"{args.data_sets:,} data sets for each cell, seed {args.seed}.\n\n{rows}"
        print(section, flush=True)
        if args.page:
            marks = f"<!-- coverage, {name}: written by coverage.py -->", f"<!-- end of {name} -->"
            put_between(section, PAGE, *marks)


# --- win rates ---


def win_rates(prompts: int, design: Design, rate: float | None, seed: int) -> Iterator[Covered]:
    """Data sets without end: which intervals contain the truth; a rate of None is drawn."""
    draws = np.random.default_rng([seed, prompts, design.answers, round(100 * design.correlation)])
    number = torch.arange(prompts).repeat_interleave(design.answers)
    while True:
        mean = draws.uniform(*ANY) if rate is None else rate
        points = _verdicts(draws, prompts, design, mean)
        truth = mean * (1 - design.ties) + design.ties / 2
        flat = torch.from_numpy(points.reshape(-1)).float()
        generator = torch.Generator().manual_seed(int(draws.integers(2**31)))
        drawn = clustered_bootstrap(flat, number, resamples=RESAMPLES, generator=generator)
        match = Match("policy", "sft", "j", flat, number, torch.zeros(len(flat)))
        found = {
            "bootstrap": drawn,
            "effective": _at_effective_number(points.mean(1), design.answers),
            "reported": sum_up(match, int(draws.integers(2**31))).win_rate,
        }
        yield {name: _covers(interval, truth) for name, interval in found.items()}


def _verdicts(
    draws: np.random.Generator, prompts: int, design: Design, mean: float
) -> NDArray[np.float64]:
    """(prompts, answers) points."""
    rho = design.correlation
    if rho == 1:
        rates = (draws.random(prompts) < mean).astype(float)
    else:
        rates = draws.beta(mean * (1 / rho - 1), (1 - mean) * (1 / rho - 1), prompts)
    shape = (prompts, design.answers)
    won = (draws.random(shape) < rates[:, None]).astype(float)
    return np.where(draws.random(shape) < design.ties, 0.5, won)


def _at_effective_number(means: NDArray[np.float64], answers: int) -> Interval:
    """Wilson's interval at the number of independent verdicts that would vary as the prompts do.

    It is what is known without the floor, for comparison; no stage uses it.
    """
    share, prompts = float(means.mean()), len(means)
    variance = float(means.var(ddof=1)) / prompts
    number = share * (1 - share) / variance if variance > 0 else float(prompts)
    number = min(number, prompts * answers)
    z2 = float(norm.ppf(0.975)) ** 2
    centre = share + z2 / (2 * number)
    half = (z2 * (share * (1 - share) / number + z2 / (4 * number**2))) ** 0.5
    return Interval(share, *((centre + side * half) / (1 + z2 / number) for side in (-1, 1)))


def rates_table(data_sets: int, seed: int) -> str:
    """A row for each design, three columns for each number of prompts."""
    kinds = {
        "bootstrap": "bootstrap",
        "effective": "Wilson, effective n",
        "reported": "**reported**",
    }
    head = ["answers", "ρ", "ties", *(f"{n} prompts: {k}" for n in PROMPTS for k in kinds.values())]
    rows = []
    for design in DESIGNS:
        cells = [str(design.answers), f"{design.correlation:g}", f"{design.ties:.0%}"]
        for prompts in PROMPTS:
            found = [
                _share(win_rates(prompts, design, rate, seed), data_sets) for rate in (*RATES, None)
            ]
            cells += [_spread([shares[kind] for shares in found]) for kind in kinds]
        rows.append(cells)
    return _table(head, rows)


# --- differences ---


def differences(prompts: int, design: Compared, seed: int) -> Iterator[Covered]:
    """Data sets without end: whether the interval contains the truth."""
    draws = np.random.default_rng([seed, 1, prompts, design.answers, round(10 * design.spread)])
    ease = np.random.default_rng(0).normal(size=1_000_000)
    first, second = (expit(theta + design.spread * ease).mean() for theta in design.thetas)
    truth = float(first - second)
    while True:
        gamma = draws.normal(size=prompts)
        ours, theirs = (
            draws.binomial(design.answers, expit(theta + design.spread * gamma)) / design.answers
            for theta in design.thetas
        )
        generator = torch.Generator().manual_seed(int(draws.integers(2**31)))
        values = torch.from_numpy(ours - theirs)
        alone = torch.arange(prompts)
        drawn = clustered_bootstrap(values, alone, resamples=RESAMPLES, generator=generator)
        found = {"bootstrap": drawn, "reported": mean_difference(values, generator)}
        yield {name: _covers(interval, truth) for name, interval in found.items()}


def differences_table(data_sets: int, seed: int) -> str:
    """A row for each pair of arms, two columns for each number of prompts."""
    kinds = ("bootstrap", "reported")
    head = ["answers", "logits", *(f"{n} prompts: {k}" for n in PROMPTS for k in kinds)]
    rows = []
    for answers in dict.fromkeys(design.answers for design in DIFFERENCES):
        for thetas in dict.fromkeys(design.thetas for design in DIFFERENCES):
            designs = [d for d in DIFFERENCES if (d.answers, d.thetas) == (answers, thetas)]
            cells = [str(answers), f"{thetas[0]:g} and {thetas[1]:g}"]
            for prompts in PROMPTS:
                found = [_share(differences(prompts, d, seed), data_sets) for d in designs]
                cells += [_spread([shares[kind] for shares in found]) for kind in kinds]
            rows.append(cells)
    return _table(head, rows)


# --- at equal length ---


def equal_lengths(prompts: int, design: Lengths, seed: int) -> Iterator[Covered]:
    """Data sets without end: whether there is an interval, and whether it contains the truth."""
    draws = np.random.default_rng([seed, 2, prompts, round(10 * design.theta), design.arms])
    truth = float(expit(design.theta + np.random.default_rng(0).normal(size=1_000_000)).mean())
    arms = ("policy", "champion", "best_of_n")[: design.arms]
    while True:
        gamma = draws.normal(size=prompts)
        matches = []
        for arm in arms:
            longer = draws.normal(design.longer, 1, prompts) * 100
            chance = expit(design.theta + design.phi * np.tanh(longer / 100) + gamma)
            points = torch.from_numpy((draws.random(prompts) < chance).astype(np.float32))
            number, length = torch.arange(prompts), torch.from_numpy(longer)
            matches.append(Match(arm, "sft", "j", points, number, length))
        rate = at_equal_length(matches, int(draws.integers(2**31)))[0]
        raw = sum_up(matches[0], 0).win_rate
        yield {
            "told": rate is not None,
            "reported": rate is not None and _covers(rate, truth),
            "raw": _covers(raw, truth),
        }


def lengths_table(data_sets: int, seed: int) -> str:
    """A row for each design, three columns for each number of prompts."""
    kinds = ("raw win rate", "**at equal length**", "told")
    head = ["arms", "θ", "φ", "longer by (sd)"]
    head += [f"{n} prompts: {k}" for n in PROMPTS for k in kinds]
    rows = []
    for design in LENGTHS:
        cells = [str(design.arms), *(f"{x:g}" for x in design[:3])]
        for prompts in PROMPTS:
            shares = _share(equal_lengths(prompts, design, seed), data_sets)
            told = shares["told"]
            among = f"{100 * shares['reported'] / told:.1f}" if told else "–"
            cells += [f"{100 * shares['raw']:.1f}", among, f"{100 * told:.1f}"]
        rows.append(cells)
    return _table(head, rows)


# --- what all have in common ---


def _covers(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def _share(data_sets: Iterator[Covered], count: int) -> dict[str, float]:
    """The share of `count` data sets in which each interval contains the truth."""
    found = [next(data_sets) for _ in range(count)]
    return {name: sum(each[name] for each in found) / count for name in found[0]}


def _spread(shares: list[float]) -> str:
    percent = [100 * share for share in shares]
    return f"{sum(percent) / len(percent):.1f} ({min(percent):.1f}–{max(percent):.1f})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


TABLES: dict[str, Callable[[int, int], str]] = {
    "rates": rates_table,
    "differences": differences_table,
    "lengths": lengths_table,
}

if __name__ == "__main__":
    main()
