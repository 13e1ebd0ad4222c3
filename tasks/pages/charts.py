"""The charts of a page that show a result: win rates, the report card, over-optimisation."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rlhf_core import figures
from rlhf_core.evaluation.card.report_card import ReportCard
from rlhf_core.evaluation.chart import Chart, draw
from rlhf_core.evaluation.scorecard import Comparison, Scorecard
from rlhf_core.evaluation.tournament.page import draw as draw_tournament
from rlhf_core.evaluation.tournament.result import TournamentResult
from rlhf_core.figures import BLUE, ORANGE, blank, dress
from rlhf_core.functional.interval import Interval
from tasks.pages.drawing import Drawing, drawing
from tasks.pages.texts import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {
    "base": "base model",
    "sft": "SFT",
    "policy": "new policy",
    "best_of_n": "best-of-n",
    "champion": "champion",
}
_SLICES = 30


def win_rates(scorecard: Scorecard) -> Drawing | None:
    """Each comparison's win rate with its interval, raw and at equal length."""
    matches = scorecard.comparisons
    if not matches:
        return None
    figure = blank(4.9, 1.2 + 0.45 * len(matches))
    axes = figure.add_subplot()
    dress(axes, "", "win rate", "")
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    controlled = any(match.length_controlled is not None for match in matches)
    for place, match in enumerate(matches):
        _dot(axes, place - (0.14 if controlled else 0), match.win_rate, BLUE, "o")
        if match.length_controlled is not None:
            _dot(axes, place + 0.14, match.length_controlled, ORANGE, "s")
    if controlled:
        for color, marker, label in ((BLUE, "o", "as judged"), (ORANGE, "s", "at equal length")):
            axes.plot([], [], color=color, marker=marker, linestyle="", label=label)
        figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    axes.set_yticks(range(len(matches)), [pair(match) for match in matches])
    axes.set_ylim(len(matches) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    numbers = [f"{pair(m)}: {interval(m.win_rate)}" for m in matches]
    return drawing(figure, "win-rates", "Win rates", "0.5 is a draw.", numbers)


def two_win_rates(runs: Sequence[tuple[str, Scorecard]]) -> Drawing | None:
    """The win rates of several runs, by comparison; in each comparison one row for a run."""
    pairs = dict.fromkeys(pair(match) for _, card in runs for match in card.comparisons)
    rows = [
        (f"{name}: {run}", match.win_rate, color)
        for name in pairs
        for (run, card), color in zip(runs, (BLUE, ORANGE), strict=False)
        for match in card.comparisons
        if pair(match) == name
    ]
    if not rows:
        return None
    figure = blank(6.6, 1.0 + 0.32 * len(rows))
    axes = figure.add_subplot()
    dress(axes, "", "win rate", "")
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    for place, (_, rate, color) in enumerate(rows):
        _dot(axes, place, rate, color, "o")
    names = [name if len(name) <= 50 else f"{name[:49]}…" for name, _, _ in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    numbers = [f"{name}: {interval(rate)}" for name, rate, _ in rows]
    return drawing(figure, "win-rates", "Win rates", "0.5 is a draw.", numbers)


def _dot(axes: "Axes", place: float, found: Interval, color: str, marker: str) -> None:
    value, low, high = found
    axes.errorbar(
        value, place, None, [[value - low], [high - value]], fmt=marker, color=color, capsize=3
    )


def pair(match: Comparison) -> str:
    """`new policy over SFT`."""
    return f"{NAMES[match.candidate]} over {NAMES[match.opponent]}"


def interval(found: Interval) -> str:
    """`92 % (90 % to 95 %)`."""
    value, low, high = found
    return f"{percent(value)} ({percent(low)} to {percent(high)})"


def report_card(card: ReportCard) -> Iterator[Drawing]:
    """Reliability, slices and canaries of a reward model; what is unknown is left out."""
    if card.bins:
        dots = [(dot.predicted, dot.observed, dot.votes) for dot in card.bins]
        yield drawing(
            figures.reliability(dots),
            "reliability",
            "Reliability",
            "Where the dots are on the diagonal, a confidence of 80 % is right in 80 % of the "
            "cases.",
            [f"{said:.2f} said, {seen.value:.2f} seen" for said, seen, _ in dots],
        )
    if card.slices and card.accuracy is not None:
        worst = sorted(card.slices, key=lambda part: part.accuracy.share.value)[:_SLICES]
        rows = [(f"{p.column} = {p.value}", p.accuracy.share, p.worse) for p in worst]
        yield drawing(
            figures.forest(rows, card.accuracy.share),
            "slices",
            "Accuracy by kind of text",
            "The grey band is the accuracy on all votes.",
            [f"{name}: {interval(share)}" for name, share, _ in rows],
        )
    if card.canaries:
        shares = {canary.kind: canary.beats_real for canary in card.canaries}
        yield drawing(
            figures.canaries(shares),
            "canaries",
            "Known-bad answers (canaries)",
            "How often a bad answer gets a better reward than the real one; a good reward model "
            "has shares near 0.",
            [f"{kind}: {interval(share)}" for kind, share in shares.items()],
        )


def tournament(result: TournamentResult) -> Drawing:
    """The strengths of the checkpoints."""
    numbers = [
        f"{entrant.title}: {middle:.2f} [{low:.2f}, {high:.2f}]"
        for entrant in result.entrants
        for middle, low, high in [entrant.strength]
    ]
    says = "Log-odds of winning against SFT, with 95 % intervals; the chosen checkpoint is green."
    return drawing(
        draw_tournament(result), "strengths", "Strength of each checkpoint", says, numbers
    )


def over_optimisation(chart: Chart) -> Drawing:
    """The over-optimisation chart, with the sentences of its fits."""
    says = "Dots are measured, thick lines are fitted; squares and dashes are best-of-n."
    numbers = [fit.sentence() for fit in chart.fits()]
    return drawing(draw([chart]), "over-optimisation", "Gain against distance", says, numbers)
