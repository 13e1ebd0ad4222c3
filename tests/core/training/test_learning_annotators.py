"""What is learnt of annotators beside a reward model: from what, when, and how it is kept."""

import math

import pandas as pd
import pytest
import torch

from rlhf_core.functional.annotators import fit_habits
from rlhf_core.training.annotators import (
    ANONYMOUS,
    GOLD_RELIABILITY,
    Annotators,
    VoteFacts,
    average_habits,
    habits_table,
)
from rlhf_core.training.ranks import Ranks

COLUMNS = ("annotator", "vote", "shown_first", "response_a", "response_b", "gold")
ROWS = [
    ("ann", "a", "a", "four", "sixsix", False),  # chosen on the left, 2 characters shorter
    ("bob", "b", "a", "four", "sixsix", False),  # chosen on the right, 2 longer
    ("ann", "b", "b", "four", "sixsix", False),  # chosen on the left
    ("", "tie", "b", "four", "sixsix", False),  # answer a stands for the chosen one
    ("gold", "a", "", "four", "four", True),
    ("gold", "a", "", "four", "four", False),  # a person who is called so
    ("ann", "b", "", "four", "four", True),  # a person's vote on a control question
]


def table(rows=ROWS):
    return pd.DataFrame(rows, columns=COLUMNS)


def votes_of(habits, count, seed=0):
    """A table of votes by annotators with these (a, b, c), and the gaps of what they chose."""
    draws = torch.Generator().manual_seed(seed)
    rows, gaps = [], []
    for number in range(count):
        name, (a, b, c) = list(habits.items())[number % len(habits)]
        gap, flip = torch.randn(2, generator=draws).tolist()
        longer = 10 if flip > 0 else -10
        logit = a * gap + b + c * longer / 10
        first = torch.rand(1, generator=draws).item() < 1 / (1 + math.exp(-logit))
        texts = ("x" * (20 + longer), "x" * 20)
        rows.append((name, "a" if first else "b", "a", *texts, name == "gold"))
        gaps.append(gap if first else -gap)
    return table(rows), dict(enumerate(gaps))


def test_facts_of_votes_by_hand():
    facts = VoteFacts.of(table(), "gold")
    assert facts.names == ("gold", ANONYMOUS, "ann", "bob", "gold")
    assert facts.annotator.tolist() == [2, 3, 2, 1, 0, 4, 2]
    assert facts.side.tolist() == [1, -1, 1, -1, 0, 0, 0]
    assert facts.tie.tolist() == [False] * 3 + [True] + [False] * 3
    unit = math.sqrt(4 * 4 / 7)
    assert facts.unit == pytest.approx(unit)
    assert (facts.length_gap * unit).tolist() == pytest.approx([-2, 2, 2, -2, 0, 0, 0])


def test_facts_of_other_votes_keep_the_numbers_and_the_unit():
    known = VoteFacts.of(table(ROWS[:3]), "gold")
    later = VoteFacts.of(table([*ROWS[:2], ("eve", *ROWS[0][1:])]), "gold", known)
    assert known.names == ("gold", "ann", "bob")
    assert later.names == ("gold", "ann", "bob", "eve")
    assert later.annotator.tolist() == [1, 2, 3]
    assert later.unit == known.unit


def test_answers_that_are_all_as_long_have_a_unit():
    facts = VoteFacts.of(table([("ann", "a", "a", "four", "four", False)]), "gold")
    assert facts.unit == 1
    assert facts.length_gap.tolist() == [0]


def test_nothing_is_known_at_first():
    annotators = Annotators(VoteFacts.of(table(), "gold"), Ranks())
    assert annotators.habits.values[0].tolist() == [GOLD_RELIABILITY, 0, 0]
    assert annotators.habits.values[1:].tolist() == [[1.0, 0.0, 0.0]] * 4
    nu = annotators.habits.log_tie.exp().item()
    assert nu / (2 + nu) == pytest.approx(1 / 7)  # the share of ties


def test_the_habits_are_the_mode_given_the_newest_score_of_each_vote_that_was_seen():
    votes, gaps = votes_of({"ann": (1, 0, 0), "bob": (0, 0.5, 0), "eve": (-1, 0, 0)}, 90)
    facts = VoteFacts.of(votes, "gold")
    annotators = Annotators(facts, Ranks())
    rows = list(range(60))
    annotators.learn(dict.fromkeys(rows, 9.0), rows)  # of an older model
    annotators.learn({row: gaps[row] for row in rows}, rows)
    free = torch.ones(4, 3, dtype=torch.bool)
    free[0] = False
    seen = torch.arange(60)
    expected = fit_habits(
        facts.cast(torch.tensor([gaps[row] for row in rows], dtype=torch.float64), seen),
        Annotators(facts, Ranks()).habits.values,
        free,
        anchor_reliability=True,
        anchor_length=True,
    )
    torch.testing.assert_close(annotators.habits.values, expected.values, rtol=0, atol=1e-9)
    found = habits_table(facts, annotators.habits, annotators.gap)
    assert found["annotator"].tolist() == ["eve", "bob", "ann"]
    assert found["votes"].tolist() == [30, 30, 30]


def test_they_are_fitted_again_when_enough_votes_are_new(monkeypatch):
    votes, gaps = votes_of({"ann": (1, 0, 0), "bob": (0, 0, 0)}, 1000)
    annotators = Annotators(VoteFacts.of(votes, "gold"), Ranks())
    fits = []
    monkeypatch.setattr(annotators, "fit", lambda: fits.append(int(annotators._seen.sum())))
    for row in range(1000):
        annotators.learn({row: gaps[row]}, [row])
        if fits and fits[-1] == row + 1:
            annotators._new = 0
    assert fits[:3] == [1, 2, 3]
    assert 250 < len(fits) < 350  # each up to 100 votes, one of ten at 1000
    assert fits[-1] - fits[-2] == 10


def test_a_liking_for_length_that_all_share_needs_known_answers():
    habits = {"ann": (1, 0, 1.0), "bob": (1.2, 0, 0.8), "eve": (0.8, 0, 1.2)}
    for known in (False, True):
        votes, gaps = votes_of(habits | ({"gold": (4, 0, 0)} if known else {}), 3000)
        annotators = Annotators(VoteFacts.of(votes, "gold"), Ranks())
        annotators.learn(gaps, list(gaps))
        mean = annotators.habits.values[1:, 2].mean().item()
        assert annotators.gold is known
        assert mean == pytest.approx(1.0 if known else 0.0, abs=0.15)
        table_of = habits_table(annotators.facts, annotators.habits, annotators.gap)
        assert "gold" not in table_of["annotator"].tolist()


def test_a_state_is_put_back_to_the_bit():
    votes, gaps = votes_of({"ann": (1, 0, 0), "bob": (0, 0.5, 0)}, 100)
    facts = VoteFacts.of(votes, "gold")
    one, two = Annotators(facts, Ranks()), Annotators(facts, Ranks())
    half = list(range(50))
    one.learn({row: gaps[row] for row in half}, half)
    state = one.state_dict()
    rest = list(range(50, 100))
    one.learn({row: gaps[row] for row in rest}, rest)
    assert not torch.equal(state["habits"][0], one.habits.values)  # a copy
    two.load_state_dict(state)
    two.learn({row: gaps[row] for row in rest}, rest)
    assert torch.equal(one.habits.values, two.habits.values)
    assert torch.equal(one.habits.deviations, two.habits.deviations)


def test_who_is_new_is_taken_for_an_average_voter():
    votes, gaps = votes_of({"ann": (1, 0, 0), "bob": (-1, 0.5, 0)}, 400)
    facts = VoteFacts.of(votes, "gold")
    annotators = Annotators(facts, Ranks())
    annotators.learn(gaps, list(gaps))
    later = VoteFacts.of(table([("eve", *ROWS[0][1:]), ("bob", *ROWS[0][1:])]), "gold", facts)
    found = annotators.predict(later, torch.tensor([0.7, 0.7]))
    assert found[0].item() == pytest.approx(0.7)
    assert found[1].item() < 0.2


def test_votes_that_count_several_times_are_as_many_votes():
    """A bootstrap is the table with its rows repeated; who is not in it stays as by the prior."""
    habits = {"ann": (1, 0, 0), "bob": (0.3, 0.5, 0), "eve": (-1, 0, 0.5), "gold": (4, 0, 0)}
    votes, gaps = votes_of(habits, 120)
    times = [0 if row % 4 == 1 else row % 3 for row in range(120)]  # none of bob's
    member = Annotators(VoteFacts.of(votes, "gold"), Ranks(), times)
    mine = [row for row in range(120) if times[row]]
    member.learn({row: gaps[row] for row in mine}, mine)
    repeated = [row for row in range(120) for _ in range(times[row])]
    other = VoteFacts.of(votes.iloc[repeated], "gold", member.facts)
    alone = Annotators(other, Ranks())
    alone.learn({n: gaps[row] for n, row in enumerate(repeated)}, range(len(repeated)))
    torch.testing.assert_close(member.habits.values, alone.habits.values, rtol=0, atol=1e-9)
    torch.testing.assert_close(member.habits.deviations, alone.habits.deviations)
    assert member.votes().tolist() == alone.votes().tolist()
    assert member.habits.values[2].tolist() == [1, 0, 0]
    assert member.habits.deviations[2].tolist() == pytest.approx([0.5, 0.7, 1.0])


def test_known_answers_count_where_a_bootstrap_has_them():
    votes, _ = votes_of({"ann": (1, 0, 0), "gold": (4, 0, 0)}, 8)
    facts = VoteFacts.of(votes, "gold")
    assert Annotators(facts, Ranks()).gold
    assert not Annotators(facts, Ranks(), [1, 0] * 4).gold
    assert Annotators(facts, Ranks(), [1, 0] * 3 + [1, 2]).gold


def test_what_members_know_is_the_mixture_of_it_by_hand():
    facts = VoteFacts.of(table(), "gold")  # gold, anonymous, ann, bob, and a person called gold
    bootstraps = ([1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 0, 2], [0, 0, 0, 0, 3, 0, 0])
    members = [Annotators(facts, Ranks(), times) for times in bootstraps]
    for number, member in enumerate(members):
        values = torch.full((5, 3), float(number), dtype=torch.float64)
        sd = torch.full((5, 3), 0.1 * (number + 1), dtype=torch.float64)
        log_tie = torch.tensor(math.log(0.1) if number == 0 else -math.inf, dtype=torch.float64)
        member.habits = member.habits._replace(values=values, deviations=sd, log_tie=log_tie)
    found = average_habits(members)
    # All have known answers; two have ann; only the first has anybody else.
    assert found.values[:, 0].tolist() == [1, 0, 0.5, 0, 0]
    ann = math.sqrt((0.1**2 + 0.5**2 + 0.2**2 + 0.5**2) / 2)
    assert found.deviations[2].tolist() == pytest.approx([ann] * 3)
    assert found.deviations[3].tolist() == pytest.approx([0.1] * 3)
    assert found.log_tie.exp().item() == pytest.approx(0.1 / 3)
    assert average_habits(members[:1]) is members[0].habits
