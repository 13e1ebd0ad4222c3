"""Who answers what, and how often people contradict the judge."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rlhf_core.labelling.router import Opinion, RouterConfig, route

KEYS = [f"pair {i}" for i in range(10_000)]


@pytest.mark.parametrize(
    ("a_first", "b_first", "sure"),
    [
        (1.0, 1.0, True),  # a in both orders
        (0.0, 0.0, True),  # b in both
        (1.0, 0.0, False),  # whatever comes first
        (0.5, 0.5, False),  # a tie
        (1.0, 0.5, False),
        (0.8, 0.9, True),
        (0.79, 0.95, False),  # sure in one order only
        (0.2, 0.1, True),
        (0.21, 0.1, False),
    ],
)
def test_a_judge_is_sure_if_it_is_so_in_both_orders(a_first, b_first, sure):
    assert Opinion(a_first, b_first).is_sure(0.8) is sure
    assert Opinion(1 - b_first, 1 - a_first).is_sure(0.8) is sure  # the answers exchanged


def test_a_tie_is_never_sure():
    assert not Opinion(0.5, 0.5).is_sure(0.5)
    assert Opinion(0.6, 0.51).is_sure(0.5)


def test_people_get_what_the_judge_is_unsure_of_and_a_share_of_the_rest():
    opinions = [Opinion(1.0, 1.0), Opinion(1.0, 0.0), None, Opinion(0.0, 0.1)] * 2500
    ways = route(KEYS, opinions, RouterConfig(), "demo")
    assert all(way == "unsure" for way in ways[1::4] + ways[2::4])
    sure = Counter(ways[0::4] + ways[3::4])
    assert sure["audit"] / 5000 == pytest.approx(0.05, abs=0.012)  # four standard errors
    assert sure["audit"] + sure["judge"] == 5000
    assert route(KEYS, opinions, RouterConfig(), "demo") == ways


@given(st.floats(0.5, 1), st.floats(0.5, 1), st.floats(0, 1), st.floats(0, 1))
def test_who_asks_for_more_certainty_asks_people_more(low, high, a, b):
    low, high = sorted((low, high))
    if Opinion(a, b).is_sure(high):
        assert Opinion(a, b).is_sure(low)


def test_everything_may_be_audited():
    ways = route(KEYS[:9], [Opinion(1.0, 1.0)] * 9, RouterConfig(audit=1), "demo")
    assert set(ways) == {"audit"}
    with pytest.raises(ValidationError):
        RouterConfig(audit=0)


def test_lists_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="zip"):
        route(["x"], [], RouterConfig(), "demo")
