"""What judges that are machines say beside people: their habits, and the audit of what they answer
alone.

A judge is asked about each pair in both orders, so a pair has two votes of it. Its verdict on the
pair is the answer that it prefers in both, and a tie otherwise.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from rlhf_core.agreement.disclosure import FEWEST_VOTES
from rlhf_core.agreement.habits import habits, others, shares_of
from rlhf_core.agreement.measures import Measure, in_percent, shares
from rlhf_core.agreement.quality import Machine
from rlhf_core.agreement.votes import (
    MACHINE,
    SKIP,
    TIE,
    UNKNOWN,
    Flags,
    Floats,
    Grouping,
    Ints,
    Votes,
)

ALONE, AUDIT = 1, 2  # of `Votes.routes`
_POINTS: Final = np.array([1.0, 0.0, 0.5])  # of a: it won, b won, a tie


def of_people(votes: Votes) -> Votes:
    """The votes without those of machines."""
    return _some(votes, votes.kind != MACHINE)


def audit_error(
    judged: Sequence[float] | Floats, voted: Sequence[float] | Floats, prompts: Sequence[int] | Ints
) -> Measure | None:
    """The share of audited pairs on which people contradict the judge, with its interval.

        error = mean |voteᵢ - judgeᵢ|,   1 for a, 0 for b, 0.5 for a tie of people

    Votes of one prompt go together (`measures.shares`), and the interval is never narrower than
    Wilson's. People err too: this is the error as they see it, not that against the truth.

    Args:
        judged: (N,) 1 where the judge prefers a, 0 where b.
        voted: (N,) what people said; of several votes on a pair the mean.
        prompts: (N,) which prompt.

    Returns: None without a pair.

    Raises:
        ValueError: if the lengths differ, or a value is not in [0, 1].
    """
    said = np.asarray(judged, dtype=np.float64), np.asarray(voted, dtype=np.float64)
    where = np.asarray(prompts, dtype=np.int64)
    if not len(said[0]) == len(said[1]) == len(where):
        raise ValueError("audit_error needs a judge's answer, a vote and a prompt for each pair.")
    if not all(((each >= 0) & (each <= 1)).all() for each in said):
        raise ValueError("what a judge and people say of a pair must lie in [0, 1].")
    errors = np.abs(said[1] - said[0])
    return shares(errors, np.zeros(len(where), dtype=np.int64), where, 1).measure(0)


def machines(votes: Votes) -> tuple[Machine, ...]:
    """Each machine among the voters, by name."""
    theirs = _some(votes, (votes.kind == MACHINE) & (votes.choice != SKIP))
    return tuple(_machines(votes, theirs))


def machine_sentence(machine: Machine) -> str:
    """What a judge answers alone, and what the audit says of it, in words."""
    parts = [
        f"{machine.name} answers {machine.alone:,} pairs alone, of the {machine.pairs:,} that it "
        "was asked about"
    ]
    if machine.same_in_both is not None:
        same = in_percent(machine.same_in_both)
        parts.append(f"it says the same in both orders on {same}")
    error, wrong = machine.error, machine.wrong
    if error is not None and wrong is not None:
        value, low, high = wrong
        parts.append(
            f"people contradict it on {in_percent(error)} of {error.of:,} audited pairs, which "
            f"makes {value:,.0f} [{low:,.0f}, {high:,.0f}] of those that it answers alone"
        )
    elif machine.to_audit:
        parts.append(
            f"its error is unknown: fewer than {FEWEST_VOTES} of the {machine.to_audit:,} pairs of "
            "the audit have an answer of people"
        )
    return "; ".join(parts) + "."


def _machines(votes: Votes, theirs: Votes) -> Iterator[Machine]:
    points, people = _said_by_people(votes)
    for judge in np.unique(theirs.annotator[theirs.annotator != UNKNOWN]):
        own = _some(theirs, theirs.annotator == judge)
        all_ = np.zeros(len(own), dtype=np.int64)
        found = habits(own, others(own))
        left, longer = (shares_of(own, found[name], all_, 1) for name in ("left", "longer"))
        pairs, place = np.unique(own.pair, return_inverse=True)
        count = np.bincount(place)
        mean = np.bincount(place, _POINTS[own.classes]) / count
        both = count >= 2
        same = (mean[both] == 0) | (mean[both] == 1) | _tied(own, place, len(pairs))[both]
        verdict = np.where(mean == 1, 1.0, np.where(mean == 0, 0.0, 0.5))
        answered = people[pairs] > 0
        route = votes.routes[pairs] if len(votes.routes) else np.zeros(len(pairs))
        audited = answered & (route == AUDIT)
        error = audit_error(*_beside(votes, verdict, points, pairs, audited))
        against = audit_error(*_beside(votes, verdict, points, pairs, answered))
        yield Machine(
            name=votes.names[judge],
            votes=len(own),
            pairs=len(pairs),
            same_in_both=_share(same, votes.prompt[pairs[both]]),
            left=left.measure(0),
            longer=longer.measure(0),
            with_people=None if against is None else _rest(against),
            error=error,
            alone=int((route == ALONE).sum()),
            to_audit=int((route == AUDIT).sum()),
        )


def _beside(
    votes: Votes, verdict: Floats, points: Floats, pairs: Ints, which: Flags
) -> tuple[Floats, Floats, Ints]:
    some = pairs[which]
    return verdict[which], points[some], votes.prompt[some]


def _said_by_people(votes: Votes) -> tuple[Floats, Ints]:
    """The mean of what people said on each pair, and how many said something."""
    rows = votes.independent()
    count = np.bincount(votes.pair[rows], minlength=votes.pairs)
    won = np.bincount(votes.pair[rows], _POINTS[votes.classes[rows]], minlength=votes.pairs)
    return won / np.maximum(count, 1), count


def _tied(own: Votes, place: Ints, pairs: int) -> Flags:
    """The pairs of which every vote is a tie."""
    decided = np.bincount(place, own.classes != TIE, minlength=pairs)
    return np.asarray(decided == 0)


def _share(values: Flags, prompts: Ints) -> Measure | None:
    owners = np.zeros(len(values), dtype=np.int64)
    return shares(values.astype(float), owners, prompts, 1).measure(0)


def _rest(error: Measure) -> Measure:
    """One less a share."""
    low, high = (None if bound is None else 1 - bound for bound in (error.high, error.low))
    return Measure(1 - error.value, low, high, error.of)


def _some(votes: Votes, which: Flags) -> Votes:
    """Some of the votes; pairs and names stay as they are."""
    names = ("pair", "annotator", "choice", "first", "kind", "seconds", "at", "reason")
    groups = {
        column: Grouping(grouping.codes[which], grouping.values)
        for column, grouping in votes.groups.items()
    }
    rows = {name: getattr(votes, name)[which] for name in names}
    return replace(votes, **rows, groups=groups)
