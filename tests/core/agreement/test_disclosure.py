"""What everybody may see: few votes, small groups, and what subtraction would tell."""

from dataclasses import replace

import numpy as np
import pytest

from rlhf_core.agreement.assess import assess
from rlhf_core.agreement.disclosure import hidden_groups, pooled
from rlhf_core.agreement.quality import REST
from rlhf_core.agreement.votes import SKIP, UNKNOWN, Grouping


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([9, 8, 7], []),
        ([9, 4, 7, 3], [1, 3]),
        ([9, 4, 7], [1, 2]),  # one alone would follow from the total
        ([9, 1, 1, 8], [1, 2, 3]),  # two with two votes together
        ([1, 1], [0, 1]),
        ([3], [0]),
    ],
)
def test_people_under_five_votes_are_shown_together(votes, expected):
    assert pooled(np.array(votes), np.ones(len(votes), bool)).tolist() == expected


def test_who_only_skips_is_shown_with_others():
    assert pooled(np.array([9, 0, 7, 0]), np.array([True, True, True, False])).tolist() == [1, 2]


def groups_of(cells):
    """Votes by group and person: {group: {person: votes}}."""
    rows = [(g, p) for g, people in cells.items() for p, n in people.items() for _ in range(n)]
    return (np.array(column) for column in zip(*rows, strict=True))


MANY = dict.fromkeys(range(6), 3)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({0: MANY, 1: MANY}, []),
        ({0: MANY, 1: MANY, 2: {0: 50}}, [0, 2]),  # one person; alone it would follow
        ({0: MANY, 1: MANY, 2: {0: 50}, 3: {0: 9}}, [0, 2, 3]),  # two groups of one person
        ({0: MANY, 1: {0: 9, 1: 9, 2: 9}, 2: {3: 9, 4: 9, 5: 9}}, [1, 2]),  # six people together
        ({0: MANY, 1: {0: 1}}, [0, 1]),
    ],
)
def test_small_groups_are_hidden_with_enough_others(cells, expected):
    groups, people = groups_of(cells)
    assert hidden_groups(groups, people, len(cells)).tolist() == expected


@pytest.fixture
def quality(simulated):
    votes = simulated({f"p{i}": None for i in range(9)}, pairs=120, gold=0, repeats=0)
    first_three = {who: np.flatnonzero(votes.annotator == who) for who in (0, 1)}
    kept = np.ones(len(votes), bool)
    kept[np.concatenate([rows[3:] for rows in first_three.values()])] = False  # three votes each
    own = ("pair", "annotator", "choice", "first", "kind", "seconds", "at", "reason")
    votes = replace(votes, **{name: getattr(votes, name)[kept] for name in own})
    choice, reason = votes.choice.copy(), votes.reason.copy()
    skips = np.flatnonzero(votes.annotator > 1)[::9]
    choice[skips], reason[skips] = SKIP, np.arange(len(skips)) % 2
    reason[skips[0]] = 2
    codes = np.where(votes.pair < 4, 1, 0)
    codes[votes.pair < 2] = UNKNOWN
    topics = Grouping(codes, ("law", "art"))
    reasons = ("too long", "I know the author", "my name is Eve")
    return assess(
        replace(votes, choice=choice, reason=reason, reasons=reasons, groups={"topic": topics})
    )


def test_an_admin_sees_everything(quality):
    assert {person.name for person in quality.people} == {f"p{i}" for i in range(9)}
    assert {group.value for group in quality.groups} == {"law", "art", "(none)"}
    assert "my name is Eve" in {reason.text for reason in quality.reasons}


def test_everybody_else_sees_neither_few_votes_nor_small_groups(quality):
    shown = quality.redacted()
    names = {person.name for person in shown.people}
    assert not names & {"p0", "p1"}
    others = shown.people[-1]
    assert (others.name, others.people, others.votes) == ("2 others", 2, 6)
    assert sum(person.votes for person in shown.people) == shown.votes
    assert "my name is Eve" not in str(shown)
    assert REST in {reason.text for reason in shown.reasons}
    assert not {f.annotator for f in shown.flags} & {"p0", "p1"}
    assert all({k.first, k.second}.isdisjoint({"p0", "p1"}) for k in shown.kappas)
    assert "p0" not in str(shown.as_json())
    assert shown.redacted() is shown


def test_a_project_with_four_votes_shows_nothing(simulated):
    quality = assess(simulated({"a": None, "b": None}, pairs=2, each=2, gold=0, repeats=0))
    shown = quality.redacted()
    assert quality.votes == 4
    assert (shown.votes, shown.people, shown.alpha) == (0, (), None)
