"""The charts of the report: agreement, habits of annotators, change over time."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from rlhf_core.agreement.measures import Measure, in_percent
from rlhf_core.agreement.quality import Block, Kappa, Person, Quality
from rlhf_core.figures import BLUE, GREEN, GREY, ORANGE, blank, dress
from tasks.pages.drawing import Drawing, drawing
from tasks.pages.texts import percent, shown

if TYPE_CHECKING:
    from matplotlib.patches import Rectangle

MOST_PEOPLE: Final = 40  # rows of a chart
MOST_IN_GRID: Final = 12
_NARROW: Final = 4.9  # inches, legible on a phone


def together(quality: Quality) -> Drawing | None:
    """What two votes on a pair are to each other, as one bar."""
    if not quality.together:
        return None
    figure = blank(_NARROW, 1.9)
    axes = figure.add_subplot()
    dress(axes, "", "share of any two votes on a pair", "")
    axes.grid(visible=False)
    start = 0.0
    for (name, share), color in zip(
        quality.together.items(), (BLUE, ORANGE, GREY, GREEN), strict=True
    ):
        axes.barh(0, share, left=start, color=color, height=0.5, label=name)
        start += share
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.35, 0.35)
    axes.set_yticks([])
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    numbers = [f"{name}: {percent(share)}" for name, share in quality.together.items()]
    says = "Two people look at the same pair: how their votes compare, and where ties stand."
    return drawing(figure, "together", "Two votes on a pair", says, numbers)


def grid(kappas: Sequence[Kappa]) -> Drawing | None:
    """Cohen's kappa of each two annotators, if they are few."""
    names = sorted({name for k in kappas for name in (k.first, k.second)})
    if not 2 <= len(names) <= MOST_IN_GRID:
        return None
    side = 1.6 + 0.42 * len(names)
    figure = blank(min(max(side, 2.8), 6.6), max(side - 0.5, 2.0))
    axes = figure.add_subplot()
    axes.spines[:].set_visible(False)
    for k in kappas:
        if k.kappa is None:
            continue
        for x, y in ((k.first, k.second), (k.second, k.first)):
            i, j = names.index(x), names.index(y)
            value = k.kappa.value
            color, strength = (BLUE, value) if value >= 0 else (ORANGE, -value)
            box = (i - 0.48, j - 0.48)
            axes.add_patch(_rectangle(box, color, 0.08 + 0.5 * min(strength, 1.0)))
            axes.text(i, j, f"{value:.2f}", ha="center", va="center", fontsize=9)
    short = [_short(name) for name in names]
    axes.set_xticks(range(len(names)), short, rotation=60, ha="right", fontsize=9)
    axes.set_yticks(range(len(names)), short, fontsize=9)
    axes.tick_params(length=0)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_aspect("equal")
    numbers = [f"{k.first} and {k.second}: {_kappa(k)}" for k in kappas]
    says = "0 is chance and 1 is full agreement; the stronger the blue, the closer."
    return drawing(figure, "kappas", "Cohen's kappa of each two annotators", says, numbers)


def _rectangle(corner: tuple[float, float], color: str, strength: float) -> "Rectangle":
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 0.96, 0.96, facecolor=color, alpha=strength, linewidth=0)


def _kappa(k: Kappa) -> str:
    return f"{k.kappa} on {k.shared:,} pairs"


def habit(
    people: Sequence[Person],
    key: str,
    title: str,
    says: str,
    of: Callable[[Person], Measure | None],
    line: float | None,
    flagged: frozenset[str],
) -> Drawing | None:
    """A share of each annotator with its interval, those with most votes first.

    Args:
        line: what is expected, or that of everybody.
        flagged: who is drawn in orange.
    """
    known = [(person.name, of(person)) for person in people]
    rows = [(name, m) for name, m in known if m is not None and m.low is not None][:MOST_PEOPLE]
    if not rows:
        return None
    figure = blank(_NARROW, 1.0 + 0.27 * len(rows))
    axes = figure.add_subplot()
    dress(axes, "", "share of votes", "")
    if line is not None:
        axes.axvline(line, color=GREY, linewidth=1.2, linestyle="--")
    for place, (name, measure) in enumerate(rows):
        low, high = measure.low or 0.0, measure.high or 0.0
        bounds = [[measure.value - low], [high - measure.value]]
        color = ORANGE if name in flagged else BLUE
        axes.errorbar(
            measure.value, place, None, bounds, fmt="o", color=color, capsize=2, markersize=4
        )
    axes.set_yticks(range(len(rows)), [_short(name) for name, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    numbers = [f"{name}: {in_percent(m)} of {m.of:,}" for name, m in rows]
    return drawing(figure, key, title, says, numbers)


def over_time(blocks: Sequence[Block], weekly: bool) -> Drawing | None:
    """Agreement, control questions and sides, and the time for a vote, by week or part."""
    if len(blocks) < 2:
        return None
    figure = blank(_NARROW, 4.6)
    above, below = figure.subplots(2, 1, height_ratios=[2, 1], sharex=True)
    dress(above, "", "", "share")
    lines = (
        ("others", "agree with the majority", BLUE, "o"),
        ("gold", "control questions right", GREEN, "s"),
        ("left", "left answer won", ORANGE, "^"),
    )
    numbers = []
    for name, label, color, marker in lines:
        found = [(i, getattr(block.habits, name)) for i, block in enumerate(blocks)]
        dots = [(i, m) for i, m in found if m is not None and m.low is not None]
        if not dots:
            continue
        x, y = [i for i, _ in dots], [m.value for _, m in dots]
        above.plot(x, y, color=color, marker=marker, markersize=4, linewidth=1.4, label=label)
        above.fill_between(
            x, [m.low for _, m in dots], [m.high for _, m in dots], color=color, alpha=0.15,
            linewidth=0,
        )  # fmt: skip
        numbers += [f"{label}, {blocks[i].name}: {in_percent(m)} of {m.of:,}" for i, m in dots]
    above.set_ylim(0, 1)
    if numbers:
        figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    timed = [(i, block.seconds) for i, block in enumerate(blocks) if block.seconds is not None]
    unit = "week" if weekly else "part of the votes"
    dress(below, "", unit, "seconds")
    below.plot([i for i, _ in timed], [s for _, s in timed], color=GREY, marker="o", markersize=4)
    below.set_ylim(bottom=0)
    names = [
        block.name.removeprefix("from ") if weekly else str(i + 1) for i, block in enumerate(blocks)
    ]
    step = 1 + (len(blocks) - 1) // 10
    turned = {"rotation": 50, "ha": "right"} if weekly else {}
    below.set_xticks(range(0, len(blocks), step), names[::step], fontsize=8, **turned)
    numbers += [f"median seconds, {blocks[i].name}: {s:.3g}" for i, s in timed]
    says = "Shares with their 95 % bounds, and below the median time for a vote."
    return drawing(figure, "time", "Change over time", says, numbers)


def _short(name: str, most: int = 16) -> str:
    name = shown(name, 200)
    return name if len(name) <= most else f"{name[: most - 1]}…"
