"""Win rates, differences and win rates at equal length, from verdicts that are known."""

import math

import pytest
import torch
from scipy import stats

from rlhf_core.evaluation.comparison import Match, at_equal_length, differ, sum_up
from rlhf_core.evaluation.intervals import mean_difference

NAN = math.nan


def match(points, *, longer=None, candidate="policy", opponent="sft", k=1):
    n = len(points)
    prompt = torch.arange(n // k).repeat_interleave(k)
    longer = [0] * n if longer is None else longer
    return Match(candidate, opponent, "j", torch.tensor(points), prompt, torch.tensor(longer))


def test_a_win_rate_is_never_narrower_than_wilson_over_prompts():
    # 100 prompts with two answers each, of which one wins: the bootstrap has no width.
    found = sum_up(match([1.0, 0.0] * 100, k=2), 0)
    z2 = stats.norm.ppf(0.975) ** 2
    half = (z2 * (0.25 / 100 + z2 / 40_000)) ** 0.5 / (1 + z2 / 100)
    assert found.win_rate == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    assert found.points == (0.5,) * 100
    # Where prompts differ more than trials can, the bootstrap may be wider.
    assert sum_up(match([1.0] * 60 + [0.0] * 40), 0).win_rate.low < 0.51


def test_pairs_without_a_verdict_count_nowhere_and_keep_their_place():
    found = sum_up(match([1.0, NAN, NAN, NAN, 0.0, 0.5], k=2), 0)
    assert found.points == (1.0, None, 0.25)
    assert (found.wins, found.ties, found.losses, found.unanswered) == (1, 1, 1, 3)
    assert found.prompts == 2


# --- paired differences ---


def test_a_difference_is_taken_prompt_by_prompt():
    first = match([1.0, 1.0, 0.5, NAN], candidate="policy")
    second = match([0.0, 0.5, 0.5, 1.0], candidate="best_of_n")
    found = differ(first, second, 0)
    assert (found.first, found.second, found.opponent) == ("policy", "best_of_n", "sft")
    assert found.difference.value == pytest.approx((1 + 0.5 + 0) / 3)


def test_a_difference_needs_a_prompt_that_both_have_and_one_opponent():
    assert differ(match([NAN, 1.0]), match([0.0, NAN]), 0) is None
    with pytest.raises(ValueError, match="not one"):
        differ(match([1.0]), match([1.0], opponent="base"), 0)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.5])
@pytest.mark.parametrize("k", [1, 2, 10, 100])
def test_equal_differences_are_no_point(value, k):
    found = mean_difference(torch.full((k,), value), torch.Generator().manual_seed(0))
    assert found.value == value
    assert found.low <= value <= found.high
    assert found.high - found.low > 2 / (k + 2)
    assert found.low >= -1
    assert found.high <= 1


def test_a_difference_by_hand():
    # With 1 and -1 added: 1, 0, 0, 0, 1, -1, of mean 1/6.
    found = mean_difference(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.Generator().manual_seed(0))
    spread = ((2 * (5 / 6) ** 2 + 3 * (1 / 6) ** 2 + (7 / 6) ** 2) / 5 / 6) ** 0.5
    half = stats.t.ppf(0.975, 5) * spread
    assert found.value == 0.25
    assert found.low == pytest.approx(1 / 6 - half)
    assert found.high == pytest.approx(max(1 / 6 + half, 0.75))  # 3 of 4 in a resample


@pytest.mark.parametrize("bad", [1.1, -1.1, NAN])
def test_a_difference_outside_is_refused(bad):
    with pytest.raises(ValueError, match=r"must lie in \[-1, 1\]"):
        mean_difference(torch.tensor([0.0, bad]), torch.Generator())


# --- at equal length ---


def inflated(prompts=200, seed=0, candidate="policy", opponent="sft"):
    """An arm that is longer and wins by that alone."""
    draws = torch.Generator().manual_seed(seed)
    longer = (torch.randn(prompts, generator=draws) + 1) * 100
    won = torch.rand(prompts, generator=draws) < (2 * (longer / 100).tanh()).sigmoid()
    return match(
        won.float().tolist(),
        longer=longer.long().tolist(),
        candidate=candidate,
        opponent=opponent,
    )


def test_an_arm_that_is_only_longer_wins_half_at_equal_length():
    matches = [inflated(), inflated(seed=1, candidate="champion")]
    raw = [each.points.mean().item() for each in matches]
    assert min(raw) > 0.65
    for rate in at_equal_length(matches, 0):
        assert rate.value == pytest.approx(0.5, abs=0.1)
        assert rate.low < 0.5 < rate.high


def test_sft_over_the_base_is_the_base_over_sft_the_other_way():
    over_base = inflated(candidate="sft", opponent="base")
    turned = Match(
        "base",
        "sft",
        "j",
        1 - over_base.points,
        over_base.prompt,
        -over_base.longer,
    )
    names = [inflated(seed=1)]
    [_, one] = at_equal_length([*names, over_base], 0)
    [_, other] = at_equal_length([*names, turned], 0)
    assert one.value == pytest.approx(1 - other.value)
    assert one.low < one.value < one.high
    assert one.low == pytest.approx(1 - other.high, abs=0.03)  # other draws


@pytest.mark.parametrize(
    "untold",
    [
        match([1.0, 0.0] * 4, longer=[1, -1] * 4),  # eight prompts
        match([0.5] * 40, longer=[1, -1] * 20),  # ties only
        match([1.0, 0.0] * 20, longer=[30] * 36 + [-30] * 4),  # four prompts without a longer one
        match([1.0, 0.0] * 20, longer=[-30] * 40),
        match([1.0] + [NAN] * 39, longer=[1, -1] * 20),
    ],
)
def test_where_nobody_can_tell_there_is_no_rate_and_others_have_theirs(untold):
    [none, some] = at_equal_length([untold, inflated(candidate="champion")], 0)
    assert none is None
    assert some is not None


def test_arms_of_the_same_length_are_told():
    [rate] = at_equal_length([match([1.0, 0.0, 0.0, 0.0] * 10)], 0)
    assert rate.value == pytest.approx(0.25, abs=0.02)
