"""The report of votes: every measure of this package, over all, by annotator, time and group."""

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

import numpy as np

from rlhf_core.agreement.alpha import coincidences, counts_by_pair, krippendorff, same_of
from rlhf_core.agreement.dawid_skene import dawid_skene
from rlhf_core.agreement.disclosure import hidden_groups, pooled
from rlhf_core.agreement.drift import blocks, trends
from rlhf_core.agreement.flags import ALPHA, Flag, flags
from rlhf_core.agreement.habits import (
    Cases,
    Others,
    habits,
    left_when_balanced,
    medians,
    others,
    shares_of,
)
from rlhf_core.agreement.kappa import kappas
from rlhf_core.agreement.machines import machines, of_people
from rlhf_core.agreement.measures import Measure, Shares, cells, in_percent
from rlhf_core.agreement.quality import Block, Group, Habits, Kappa, Person, Quality, Reason, Said
from rlhf_core.agreement.votes import (
    CLASSES,
    REPEAT,
    SKIP,
    TIE,
    UNKNOWN,
    Floats,
    Ints,
    Votes,
)

SMOOTHING: Final = 0.1  # labels of each kind that Dawid and Skene's model adds for a person
MOST_VALUES: Final = 50  # of a column that makes groups; with more it names things
DRIFTING: Final = ("others", "gold", "left", "longer")
NO_VALUE: Final = "(none)"


def assess(votes: Votes, *, project: str = "", snapshot: str = "", seed: int = 0) -> Quality:
    """Everything about the votes of a project: of people together, of machines apart.

    Args:
        project: its name; snapshot: its digest, if the votes are one's. They are only passed on.
        seed: of the bootstrap.
    """
    judges = machines(votes)
    votes = of_people(votes)
    rest, owners, count = others(votes), votes.annotator, len(votes.names)
    cases = habits(votes, rest)
    voted = votes.choice != SKIP
    rows = votes.independent()
    counts = counts_by_pair(votes.pair[rows], votes.classes[rows], votes.pairs, len(CLASSES))
    everybody = np.zeros(len(votes), dtype=np.int64)
    [whole] = _habits(votes, cases, everybody, 1)
    model = _model(votes, rows)
    found = {name: shares_of(votes, each, owners, count) for name, each in cases.items()}
    balanced = left_when_balanced(votes, rest, owners, count)
    people = _people(votes, found, balanced, model)
    there = np.bincount(owners[owners != UNKNOWN], minlength=count) > 0
    hidden = pooled(np.bincount(owners[voted & (owners != UNKNOWN)], minlength=count), there)
    cut = blocks(votes)
    groups, hidden_values = _groups(votes, cases, rows, seed)
    return Quality(
        project=project,
        snapshot=snapshot,
        votes=int(voted.sum()),
        skips=int((~voted).sum()),
        pairs=len(np.unique(votes.pair[voted])),
        prompts=len(np.unique(votes.prompt[votes.pair[voted]])),
        annotators=int(there.sum()),
        anonymous=int((voted & (owners == UNKNOWN)).sum()),
        unknown_sides=int(((votes.choice < TIE) & (votes.first == UNKNOWN)).sum()),
        twice=int((counts.sum(1) >= 2).sum()),
        alpha=krippendorff(counts, votes.prompt, seed=seed),
        alpha_without_ties=krippendorff(counts[:, :TIE], votes.prompt, seed=seed),
        same=krippendorff(counts, votes.prompt, statistic=same_of, seed=seed),
        together=_together(counts),
        habits=whole,
        left_when_balanced=left_when_balanced(votes, rest, everybody, 1)[0],
        seconds=_median(votes, everybody, 1)[0],
        classes=dict(zip(CLASSES, model.prevalence.tolist(), strict=True)) if model else {},
        sure=model.sure if model else None,
        people=tuple(people[i] for i in np.flatnonzero(there)),
        flags=tuple(_flags(votes, found, balanced)),
        tested=int(there.sum()),
        kappas=tuple(
            Kappa(votes.names[k.first], votes.names[k.second], k.shared, k.kappa, k.same)
            for k in kappas(votes)
        ),
        blocks=tuple(_blocks(votes, cases, cut.of, cut.names)),
        weekly=cut.weekly,
        trends=tuple(trends(votes, _drifting(votes, cases), ALPHA)),
        groups=groups,
        reasons=_reasons(votes),
        machines=judges,
        pooled=_pool(votes, cases, rest, hidden),
        hidden_people=frozenset(votes.names[i] for i in hidden),
        hidden_groups=hidden_values,
    )


# ---- the whole ----


def _together(counts: Ints) -> dict[str, float]:
    o = coincidences(counts).sum(0)
    n = o.sum()
    if not n:
        return {}
    parts = {
        "the same winner": o[0, 0] + o[1, 1],
        "opposite winners": o[0, 1] + o[1, 0],
        "one tie": o[2, :2].sum() + o[:2, 2].sum(),
        "both ties": o[2, 2],
    }
    return {name: float(part / n) for name, part in parts.items()}


class _Model(NamedTuple):
    """What Dawid and Skene's model says."""

    skill: Floats  # (A,) NaN without a vote
    errors: Floats  # (A, C, C)
    prevalence: Floats
    sure: float  # share of pairs with a class of at least 95 %


def _model(votes: Votes, rows: Ints) -> _Model | None:
    """The model of the pairs with two votes or more; anonymous votes are one annotator's."""
    several = np.bincount(votes.pair[rows], minlength=votes.pairs) >= 2
    rows = rows[several[votes.pair[rows]]]
    if not len(rows):
        return None
    count = len(votes.names)
    people = np.where(votes.annotator[rows] == UNKNOWN, count, votes.annotator[rows])
    known, mine = np.unique(people, return_inverse=True)
    items = np.unique(votes.pair[rows], return_inverse=True)[1]
    found = dawid_skene(
        items, mine, votes.classes[rows], len(CLASSES), smoothing=SMOOTHING, tolerance=1e-6
    )
    skill, errors = np.full(count + 1, np.nan), np.full((count + 1, 3, 3), np.nan)
    skill[known], errors[known] = found.skill(), found.errors
    sure = float((found.posterior.max(1) >= 0.95).mean())
    return _Model(skill, errors, found.prevalence, sure)


# ---- by owner ----


def _habits(votes: Votes, cases: Mapping[str, Cases], owners: Ints, count: int) -> list[Habits]:
    found = {name: shares_of(votes, each, owners, count) for name, each in cases.items()}
    return _measured(found, count)


def _measured(found: Mapping[str, Shares], count: int) -> list[Habits]:
    return [
        Habits(**{name: each.measure(owner) for name, each in found.items()})
        for owner in range(count)
    ]


def _median(votes: Votes, owners: Ints, count: int) -> list[float | None]:
    timed = np.where((votes.choice != SKIP) & (votes.kind != REPEAT), votes.seconds, np.nan)
    return [None if np.isnan(v) else float(v) for v in medians(timed, owners, count)]


def _people(
    votes: Votes,
    found: Mapping[str, Shares],
    balanced: list[Measure | None],
    model: _Model | None,
) -> list[Person]:
    count, owners = len(votes.names), votes.annotator
    own = owners != UNKNOWN
    cast = np.bincount(owners[own & (votes.choice != SKIP)], minlength=count)
    repeats = np.bincount(owners[own & (votes.kind == REPEAT)], minlength=count)
    rows = zip(
        _measured(found, count),
        balanced,
        _median(votes, owners, count),
        strict=True,
    )
    return [
        Person(
            votes.names[i], 1, int(cast[i]), int(repeats[i]), habit, even, seconds,
            *_skill(model, i),
        )
        for i, (habit, even, seconds) in enumerate(rows)
    ]  # fmt: skip


def _skill(
    model: _Model | None, annotator: int
) -> tuple[float | None, tuple[tuple[float, ...], ...] | None]:
    if model is None or np.isnan(model.skill[annotator]):
        return None, None
    return float(model.skill[annotator]), tuple(map(tuple, model.errors[annotator].tolist()))


def _pool(votes: Votes, cases: Mapping[str, Cases], rest: Others, hidden: Ints) -> Person | None:
    """The people who are not shown one by one, as one row."""
    if not len(hidden):
        return None
    owners = np.where(np.isin(votes.annotator, hidden), 0, UNKNOWN)
    [habit], [balanced] = (
        _habits(votes, cases, owners, 1),
        left_when_balanced(votes, rest, owners, 1),
    )
    name = "1 other" if len(hidden) == 1 else f"{len(hidden)} others"
    mine = owners == 0
    return Person(
        name,
        len(hidden),
        int((mine & (votes.choice != SKIP)).sum()),
        int((mine & (votes.kind == REPEAT)).sum()),
        habit,
        balanced,
        _median(votes, owners, 1)[0],
        None,
        None,
    )


def _blocks(
    votes: Votes, cases: Mapping[str, Cases], of: Ints, names: tuple[str, ...]
) -> Iterator[Block]:
    count = len(names)
    timed = of != UNKNOWN
    size = np.bincount(of[timed & (votes.choice != SKIP)], minlength=count)
    people = cells(of[timed], votes.voters()[timed])[0]
    rows = zip(_habits(votes, cases, of, count), _median(votes, of, count), strict=True)
    for i, (habit, seconds) in enumerate(rows):
        yield Block(names[i], int(size[i]), int((people == i).sum()), habit, seconds)


def _drifting(votes: Votes, cases: Mapping[str, Cases]) -> dict[str, tuple[Ints, Floats]]:
    """What is tested for a trend: four habits, and the logarithm of the time for a vote."""
    found = {name: (cases[name].rows, cases[name].values) for name in DRIFTING}
    timed = np.flatnonzero((votes.seconds > 0) & (votes.choice != SKIP) & (votes.kind != REPEAT))
    return found | {"speed": (timed, np.log(votes.seconds[timed]))}


def _groups(
    votes: Votes, cases: Mapping[str, Cases], rows: Ints, seed: int
) -> tuple[tuple[Group, ...], frozenset[tuple[str, str]]]:
    """The groups of each column that has two to fifty values; and those that admins alone see."""
    made: list[Group] = []
    hidden: set[tuple[str, str]] = set()
    voted, classes = votes.choice != SKIP, votes.classes
    for column, grouping in sorted(votes.groups.items()):
        of = np.where(grouping.codes == UNKNOWN, len(grouping.values), grouping.codes)
        there = np.unique(of)
        if not 2 <= len(there) <= MOST_VALUES:
            continue
        values, count = (*grouping.values, NO_VALUE), len(grouping.values) + 1
        small = hidden_groups(of[voted], votes.annotator[voted], count)
        hidden |= {(column, values[i]) for i in small}
        people = cells(of[voted], votes.annotator[voted])[0]
        found = _habits(votes, cases, of, count)
        for i in there:
            own = rows[of[rows] == i]
            counts = counts_by_pair(votes.pair[own], classes[own], votes.pairs, len(CLASSES))
            made.append(
                Group(
                    column,
                    values[i],
                    int((of[voted] == i).sum()),
                    int((people == i).sum()),
                    krippendorff(counts, votes.prompt, seed=seed),
                    found[i],
                )
            )
    return tuple(made), frozenset(hidden)


def _reasons(votes: Votes) -> tuple[Reason, ...]:
    skipped = votes.choice == SKIP
    of, people = votes.reason[skipped], votes.annotator[skipped]
    made = [
        Reason(
            votes.reasons[i] if i != UNKNOWN else "no reason given",
            int((of == i).sum()),
            len(np.unique(people[of == i])),
        )
        for i in np.unique(of)
    ]
    return tuple(sorted(made, key=lambda reason: (-reason.skips, reason.text)))


# ---- flags ----

_SENTENCES: Final = {
    "left": "{name} chose the left answer in {share} of {of} decided votes; sides are drawn, so "
    "45 to 55 % is what one expects.",
    "longer": "{name} chose the longer answer in {share} of {of} decided votes; the others did in "
    "{rest}.",
    "fast": "{name} voted faster than one can read in {share} of {of} votes; up to 10 % happens.",
    "gold": "{name} was right on {share} of {of} control questions; the others on {rest}.",
    "consistency": "{name} gave the same answer again in {share} of {of} repeats; the others in "
    "{rest}.",
    "others": "{name} voted as the majority of the others on {share} of {of} pairs; the others "
    "did on {rest}.",
}


def _flags(
    votes: Votes, found: Mapping[str, Shares], balanced: list[Measure | None]
) -> Iterator[Said]:
    for flag in flags(found, balanced):
        yield Said(
            votes.names[flag.annotator], flag.habit, flag.measure, flag.p, sentence(votes, flag)
        )


def sentence(votes: Votes, flag: Flag) -> str:
    """A flag in words: who, what, how often, of how many, and what is expected."""
    return _SENTENCES[flag.habit].format(
        name=votes.names[flag.annotator],
        share=in_percent(flag.measure),
        of=f"{flag.measure.of:,}",
        rest=f"{100 * flag.rest:.0f} %",
    )
