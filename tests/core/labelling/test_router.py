"""Who answers what, and how often people contradict the judge."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rlhf_core.labelling.router import Opinion, RouterConfig, audit_error, route

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


def test_an_audit_by_hand():
    # The judge said a, a, b, a; people say a, b, b and a tie: errors 0, 1, 0, 1/2.
    audit = audit_error(
        [1, 1, 0, 1], [1, 0, 0, 0.5], [1, 2, 3, 4], 80, generator=torch.Generator().manual_seed(0)
    )
    assert audit.error.value == pytest.approx(0.375)
    assert audit.error.low < 0.375 < audit.error.high
    assert (audit.audited, audit.alone, audit.wrong.value) == (4, 80, pytest.approx(30))


def test_an_audit_without_an_error_does_not_say_there_is_none():
    audit = audit_error([1] * 50, [1.0] * 50, range(50), 950, generator=torch.Generator())
    assert audit.error.value == 0
    assert audit.error.high == pytest.approx(0.0713, abs=1e-3)  # Wilson: z² / (n + z²)
    assert audit_error([], [], [], 7, generator=torch.Generator()).error is None


def test_the_interval_of_an_audit_covers():
    """10 % of what the judge says alone is wrong; 200 audits of 60 pairs."""
    inside = 0
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        voted = (torch.rand(60, generator=g) > 0.1).double().tolist()
        audit = audit_error([1] * 60, voted, range(60), 1000, generator=g)
        inside += audit.error.low <= 0.1 <= audit.error.high
    assert inside >= 182  # fewer has a chance below 2 % at a coverage of 95 %


def test_lists_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="for each pair"):
        audit_error([1], [1, 0], [1], 7, generator=torch.Generator())
    with pytest.raises(ValueError, match="zip"):
        route(["x"], [], RouterConfig(), "demo")
