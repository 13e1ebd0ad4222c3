"""What held-out votes say, each number worked by hand."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from rlhf_core.evaluation.card.held_out import HeldOutVotes, pair_numbers


def votes(*rows, gaps=None, longer=None, scale=1.0, **columns):
    """Votes of (prompt, a, b, vote) or of (prompt, a, b, vote, annotator).

    `gaps` and `longer` are those of the first answer over the second.
    """
    table = pd.DataFrame([(*row, "")[:5] for row in rows], dtype=object)
    table.columns = ["prompt", "response_a", "response_b", "vote", "annotator"]
    table = table.assign(**{"shown_first": "", "source": "s", "gold": False} | columns)
    gaps = [1.0] * len(rows) if gaps is None else gaps
    members = torch.tensor(gaps if isinstance(gaps[0], list) else [gaps])
    longer = torch.zeros(len(rows)) if longer is None else torch.tensor(longer)
    return HeldOutVotes(table, members, longer, scale, seed=0)


def on_prompts(n, vote="a"):
    return [(f"p{i}", "x", "y", vote) for i in range(n)]


# ---- shares ----


def test_accuracy_and_the_rules_by_hand():
    # Right, wrong, no preference, right, and a tie that does not count: (1 + 0 + 1/2 + 1) / 4.
    found = votes(
        *[("p", "x", "y", "a"), ("p", "x", "y", "b"), ("q", "x", "y", "a"), ("r", "x", "y", "b")],
        ("r", "x", "y", "tie"),
        gaps=[2.0, 1.0, 0.0, -1.0, 5.0],
        longer=[3.0, 3.0, 0.0, -2.0, 9.0],
        shown_first=["a", "a", "", "a", "a"],
    )
    accuracy = found.accuracy()
    assert (accuracy.share.value, accuracy.votes, accuracy.prompts) == (2.5 / 4, 4, 3)
    # Longer: right, wrong, as long, right. Where the longer one won: the first and the last.
    assert found.longer_rule().share.value == 2.5 / 4
    assert (found.where_won(longer=True).votes, found.where_won(longer=True).share.value) == (2, 1)
    assert found.where_won(longer=False).share.value == 0
    # The first side is known of three with a winner: right, wrong, wrong.
    first = found.first_rule()
    assert (first.share.value, first.votes) == (pytest.approx(1 / 3), 3)


def test_without_a_winner_nothing_is_known():
    found = votes(("p", "x", "y", "tie"), ("q", "x", "y", "tie"))
    assert found.accuracy() is found.longer_rule() is found.first_rule() is None
    assert found.agreement() is found.calibration() is found.members() is None
    assert found.slices(1) == ((), ())
    assert len(found.winners()) == 0
    # Ties pull the rewards together: log 2 plus log cosh(1/2).
    assert found.log_loss().value == pytest.approx(math.log(2) + math.log(math.cosh(0.5)))


def test_one_prompt_is_no_certainty():
    found = votes(*[("p", "x", f"y{i}", "a") for i in range(50)])
    wilson = stats.binomtest(1, 1).proportion_ci(method="wilson")
    assert found.accuracy().share == (1.0, pytest.approx(wilson.low), 1.0)
    assert found.log_loss().low is None
    assert found.calibration()[0].low is None


# ---- the ceiling ----


def test_agreement_by_hand_whatever_the_sides():
    found = votes(
        # Three people, two for x: each vote's share of equal others is 1/2, 1/2, 0.
        *[("p", "x", "y", "a", "ann"), ("p", "y", "x", "b", "ben"), ("p", "x", "y", "b", "cyd")],
        # Two who agree: 1, 1.
        *[("q", "x", "y", "a", "ann"), ("q", "y", "x", "b", "ben")],
        # The same person twice, and a vote alone: nobody else to ask.
        *[("r", "x", "y", "a", "ann"), ("r", "x", "y", "b", "ann"), ("s", "x", "y", "a", "ann")],
        gaps=[1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0],
    ).agreement()
    assert (found.pairwise.votes, found.pairwise.prompts) == (5, 2)
    assert found.pairwise.share.value == pytest.approx((0.5 + 0.5 + 0 + 1 + 1) / 5)
    # The others of each of the three: one each way (half), one each way, both against.
    assert found.majority.share.value == pytest.approx((0.5 + 0.5 + 0 + 1 + 1) / 5)
    # The model is for x: right on four of the five.
    assert found.accuracy.share.value == pytest.approx(0.8)
    high = found.pairwise.share.high
    assert found.limit == pytest.approx((1 + math.sqrt(2 * high - 1)) / 2)
    assert not found.alarm


def test_the_majority_of_many_is_a_better_guess_than_one():
    # Four for x, one for y. Pairwise: 4 votes with 3/4, 1 with 0. Majority: 4 right, 1 wrong.
    rows = [("p", "x", "y", "a", name) for name in "abcd"] + [("p", "x", "y", "b", "e")]
    found = votes(*rows).agreement()
    assert found.pairwise.share.value == pytest.approx(3 / 5)
    assert found.majority.share.value == pytest.approx(4 / 5)


def test_a_known_answer_or_a_machine_is_nobody_with_whom_people_agree():
    people = [("p", "x", "y", "a", "ann"), ("p", "x", "y", "b", "ben"), ("q", "x", "y", "a", "ann")]
    known = [("p", "x", "y", "a", "gold"), ("q", "x", "y", "a", "gold")]
    found = votes(*people, *known, gold=[True] * 5)
    assert found.agreement().pairwise.share.value == 0
    assert found.agreement().pairwise.votes == 2
    assert found.accuracy().votes == 5
    machines = [("p", "x", "y", "a", "judge:m"), ("q", "x", "y", "a", "judge:m")]
    assert votes(*people, *machines).agreement().pairwise.votes == 2
    # A person of this name is one, where the vote is not marked.
    assert votes(*people, *known).agreement().pairwise.votes == 5


def test_anonymous_votes_are_of_different_people():
    found = votes(("p", "x", "y", "a"), ("p", "x", "y", "a"), ("p", "x", "y", "b"))
    assert found.agreement().pairwise.share.value == pytest.approx(1 / 3)


def test_one_annotator_has_no_ceiling():
    assert votes(*[("p", "x", f"y{i}", "a", "ann") for i in range(9)]).agreement() is None


def two_people(pairs, leak):
    """Two votes on each pair; everybody prefers x in 80 % of the cases, by the pair.

    The model knows what people prefer, or, with a leak, what these two have said.
    """
    draws = np.random.default_rng(0)
    cast = draws.random((pairs, 2)) < 0.8
    rows = [
        (f"p{i}", "x", "y", "a" if yes else "b", name)
        for i, both in enumerate(cast)
        for name, yes in zip("ab", both, strict=True)
    ]
    said = np.where(cast.sum(1) == 0, -1.0, 1.0) if leak else np.ones(pairs)
    return votes(*rows, gaps=np.repeat(said, 2).tolist()).agreement()


def test_a_model_that_knows_what_people_prefer_is_above_their_agreement_and_no_alarm():
    found = two_people(3000, leak=False)
    assert found.pairwise.share.high < 0.72  # 0.8² + 0.2² = 0.68
    assert found.accuracy.share.low > 0.75  # 0.8
    assert not found.alarm


def test_a_model_that_has_seen_the_votes_is_an_alarm():
    found = two_people(3000, leak=True)
    assert found.accuracy.share.value == pytest.approx(0.84, abs=0.01)
    assert found.alarm


# ---- calibration ----


def test_log_loss_by_hand_in_logits():
    found = votes(*on_prompts(2), gaps=[1.0, -0.5], scale=2.0).log_loss()
    assert found.value == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2)


def test_reliability_does_not_depend_on_the_sides():
    rows = [(f"p{i}", "x", "y", "a" if i % 4 else "b") for i in range(40)]
    swapped = [(p, b, a, {"a": "b", "b": "a"}[vote]) for p, a, b, vote in rows]
    one = votes(*rows, gaps=[2.0] * 40).calibration()
    other = votes(*swapped, gaps=[-2.0] * 40).calibration()
    assert one == other
    error, noise, confidence, bins = one
    sure = 1 / (1 + math.exp(-2))
    assert confidence == pytest.approx(sure)
    assert error.value == pytest.approx(sure - 0.75)
    assert [dot.predicted for dot in bins] == pytest.approx([1 - sure, sure])
    assert [dot.observed.value for dot in bins] == pytest.approx([0.25, 0.75])
    assert [dot.votes for dot in bins] == [40, 40]
    assert 0 < noise < 0.2


def test_a_constant_reward_is_a_coin():
    found = votes(*on_prompts(30), *on_prompts(30, "b"), gaps=[0.0] * 60)
    assert found.accuracy().share.value == 0.5
    assert found.accuracy().share.low < 0.5 < found.accuracy().share.high
    assert (found.log_loss().value, found.log_loss().low) == (pytest.approx(math.log(2)), None)
    error, _, confidence, bins = found.calibration()
    assert (error.value, confidence, len(bins)) == (0, 0.5, 1)


# ---- slices ----


def test_slices_have_wilsons_interval_and_small_ones_only_a_name():
    rows = [(f"p{i}", "x", "y", "a", f"ann{i % 2}") for i in range(20)]
    rows += [("z", "x", "y", "a", "rare"), ("z", "x", "y", "a", "")]
    gaps = [1.0 if i % 2 or i < 12 else -1.0 for i in range(20)] + [1.0, 1.0]
    found, small = votes(*rows, gaps=gaps).slices(10)
    assert {part.value for part in found} == {"ann0", "ann1"}
    worst = next(part for part in found if part.value == "ann0").accuracy
    assert (worst.votes, worst.prompts) == (10, 10)
    wilson = stats.binomtest(6, 10).proportion_ci(method="wilson")
    assert worst.share.value == pytest.approx(0.6)
    assert worst.share.low <= wilson.low + 1e-9
    assert worst.share.high >= wilson.high - 1e-9
    assert [(s.column, s.values, s.votes, s.named) for s in small] == [
        ("annotator", 2, 2, ("(unknown)", "rare"))
    ]


def test_a_slice_is_worse_only_if_that_is_clear_among_as_many():
    rows = [(f"p{i}", "x", "y", "a") for i in range(400)]
    topics = [{"topic": f"t{i % 10}"} for i in range(400)]
    draws = np.random.default_rng(1)
    gaps = np.where(draws.random(400) < 0.8, 1.0, -1.0)
    by_chance, _ = votes(*rows, gaps=gaps.tolist(), kept=topics).slices(5)
    assert not any(part.worse for part in by_chance)
    gaps[3::10] = np.where(np.arange(40) % 4 == 0, 1.0, -1.0)  # a quarter right
    planted, _ = votes(*rows, gaps=gaps.tolist(), kept=topics).slices(5)
    assert [part.value for part in planted if part.worse] == ["t3"]
    assert {part.column for part in planted} == {"topic"}


def test_length_differences_are_quarters_and_a_single_value_is_no_slice():
    found, small = votes(*on_prompts(40), longer=[float(i - 20) for i in range(40)]).slices(5)
    assert {part.column for part in found} == {"length difference"}
    assert sum(part.accuracy.votes for part in found) == 40
    assert [part.value for part in found][-1].endswith("tokens")
    assert small == ()


def test_ten_thousand_values_are_counted():
    rows = on_prompts(10_000)
    kept = [{"user": f"u{i}"} for i in range(10_000)]
    found, [small] = votes(*rows, kept=kept).slices(20)
    assert (small.column, small.values, small.votes, len(small.named)) == (
        *("user", 10_000, 10_000),
        12,
    )
    assert found == ()


# ---- members and pairs ----


def test_members_one_by_one_and_where_they_disagree():
    found = votes(*on_prompts(4), gaps=[[1.0, 1.0, 1.0, -1.0], [1.0, -1.0, 1.0, -1.0]])
    members = found.members()
    assert [own.share.value for own in members.accuracies] == [0.75, 0.5]
    assert members.disagreement.share.value == 0.25
    # The second vote's mean is 0: no preference.
    assert found.accuracy().share.value == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert votes(*on_prompts(4)).members() is None


def test_a_pair_is_the_same_from_either_side():
    table = votes(("p", "x", "y", "a"), ("p", "y", "x", "a"), ("q", "x", "y", "a")).table
    pair, flipped = pair_numbers(table)
    assert pair.tolist() == [0, 0, 1]
    assert flipped.tolist() == [False, True, False]
