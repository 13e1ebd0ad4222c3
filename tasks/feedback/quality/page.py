"""The report as one HTML page: a summary in sentences, what to look at, then the figures."""

import math
from collections.abc import Iterator
from typing import Final, NamedTuple

from rlhf_core.agreement.disclosure import FEWEST_PEOPLE, FEWEST_VOTES
from rlhf_core.agreement.drift import Trend
from rlhf_core.agreement.machines import machine_sentence
from rlhf_core.agreement.measures import Measure, in_percent
from rlhf_core.agreement.quality import Quality
from tasks.feedback.quality import charts
from tasks.pages.render import render

PAGE: Final = "report.html"
MOST_ROWS: Final = 100  # of a table; the files beside the page have all
FIRM, TENTATIVE = 0.8, 0.667  # of alpha: Krippendorff 2018, section 12.6
_HABITS: Final = {
    "others": "agreement with the majority of the others",
    "gold": "the share of control questions that are answered right",
    "left": "the share of left answers",
    "longer": "the share of longer answers",
}


class Row(NamedTuple):
    """A cell of figures: the share with its bounds, and how many cases it rests on."""

    share: str
    of: str


def quality_page(quality: Quality) -> str:
    """The whole page as HTML. Pass `quality.redacted()` for everybody but an admin."""
    people = sorted(quality.people, key=lambda p: (p.people > 1, -p.votes, p.name))
    named = {habit: _flagged(quality, habit) for habit in ("left", "longer", "others")}
    habits = quality.habits
    drawings = [
        charts.habit(
            people, "left", "The left answer wins",
            "Sides are drawn, so half is what one expects. Orange: named above.",
            lambda p: p.habits.left, 0.5, named["left"],
        ),
        charts.habit(
            people, "longer", "The longer answer wins",
            "The dashed line is the share of all votes. Orange: named above.",
            lambda p: p.habits.longer, _value(habits.longer), named["longer"],
        ),
        charts.habit(
            people, "others", "Votes like the majority of the others",
            "The dashed line is the share of all votes. Orange: named above.",
            lambda p: p.habits.others, _value(habits.others), named["others"],
        ),
    ]  # fmt: skip
    kappas = sorted(quality.kappas, key=lambda k: k.kappa.value if k.kappa else 2.0)
    return render(
        "agreement.html",
        quality=quality,
        summary=list(summary(quality)),
        unknown=list(_unknown(quality)),
        people=people[:MOST_ROWS],
        left_out=max(len(people) - MOST_ROWS, 0),
        cell=_cell,
        together=charts.together(quality),
        grid=charts.grid(quality.kappas),
        kappas=kappas[:MOST_ROWS],
        kappas_left_out=max(len(kappas) - MOST_ROWS, 0),
        habits=[drawn for drawn in drawings if drawn is not None],
        time=charts.over_time(quality.blocks, quality.weekly),
        trends=[trend_sentence(trend) for trend in quality.trends],
        columns=sorted({group.column for group in quality.groups}),
        fewest_votes=FEWEST_VOTES,
        fewest_people=FEWEST_PEOPLE,
    )


def summary(quality: Quality) -> Iterator[str]:
    """What the report says, in sentences; what matters most is first."""
    if not quality.votes:
        yield f"There are fewer than {FEWEST_VOTES} votes of people, so nothing is shown of them."
        yield from map(machine_sentence, quality.machines)
        return
    if quality.same is None or quality.alpha is None:
        yield "How far people agree cannot be said: hardly any pair has votes of two people."
    else:
        yield (
            f"Two people who look at the same pair say the same in {in_percent(quality.same)} of "
            f"the cases; Krippendorff's alpha is {_bounds(quality.alpha)}."
        )
        yield _firmness(quality.alpha)
    count = len({flag.annotator for flag in quality.flags})
    if count:
        people = "1 annotator has" if count == 1 else f"{count} annotators have"
        yield f"{people} habits that chance does not explain; they are listed below."
    else:
        yield "No annotator has a habit that chance does not explain."
    clear = [trend for trend in quality.trends if trend.clear]
    yield from map(trend_sentence, clear)
    yield from map(machine_sentence, quality.machines)


def _firmness(alpha: Measure) -> str:
    low = alpha.value if alpha.low is None else alpha.low
    if low >= FIRM:
        return "That is enough to rely on single votes."
    if low >= TENTATIVE:
        return "That is enough for tentative conclusions from single votes."
    return (
        f"Below {TENTATIVE} a single vote says little, which is usual for preferences: ask several "
        "people about each pair, or have many pairs."
    )


def trend_sentence(trend: Trend) -> str:
    """A change over time in words."""
    change = trend.change
    if trend.habit == "speed":
        factor = math.exp(change.value)
        low, high = (
            math.exp(bound) if bound is not None else math.nan
            for bound in (change.low, change.high)
        )
        words = f"The time for a vote changed by a factor of {factor:.2f} [{low:.2f}, {high:.2f}]"
    else:
        points = f"{100 * change.value:+.0f} points"
        if change.low is not None and change.high is not None:
            points += f" [{100 * change.low:+.0f}, {100 * change.high:+.0f}]"
        words = f"From the first vote to the last, {_HABITS[trend.habit]} changed by {points}"
    return words + (
        f" (p = {trend.p:.2g})." if trend.clear else f", which may be chance (p = {trend.p:.2g})."
    )


def _unknown(quality: Quality) -> Iterator[str]:
    """What the votes do not tell."""
    if not quality.votes:
        return
    if quality.unknown_sides:
        yield (
            f"Which answer was on the left is unknown for {quality.unknown_sides:,} decided votes; "
            "they say nothing about sides."
        )
    if quality.anonymous:
        yield f"{quality.anonymous:,} votes are anonymous, and belong to no annotator below."
    if quality.habits.gold is None:
        yield "There are no control questions, so nobody knows who is right."
    if quality.habits.consistency is None:
        yield "No pair was shown to the same person twice, so consistency is unknown."
    if quality.seconds is None:
        yield "No vote has a time, so speed is unknown."
    if not quality.blocks:
        yield "When the votes were cast is unknown, so change over time is not shown."


def _flagged(quality: Quality, habit: str) -> frozenset[str]:
    return frozenset(flag.annotator for flag in quality.flags if flag.habit == habit)


def _value(measure: Measure | None) -> float | None:
    return None if measure is None else measure.value


def _bounds(measure: Measure) -> str:
    if measure.low is None:
        return f"{measure.value:.2f} (fewer than ten prompts: no interval)"
    return f"{measure.value:.2f} [{measure.low:.2f}, {measure.high:.2f}]"


def _cell(measure: Measure | None) -> Row | None:
    """A figure of a table; None without a case."""
    return None if measure is None else Row(in_percent(measure), f"{measure.of:,}")
