"""Arms by a hash, and sequences in their shares."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rlhf_core.labelling.arms import Shares, arm_of, hashed, interleaved


def test_a_hash_is_what_it_was():
    assert hashed("a prompt", "demo") == 0.19437051025817254


def test_prompts_fall_to_arms_in_their_shares():
    arms = Counter(arm_of(str(i), "demo", Shares()) for i in range(20_000))
    # Standard errors of shares: 0.3 % and 0.2 %.
    assert arms["design"] / 20_000 == pytest.approx(0.7, abs=0.013)
    assert arms["random"] / 20_000 == pytest.approx(0.2, abs=0.012)
    assert arms["hold_out"] / 20_000 == pytest.approx(0.1, abs=0.009)


def test_projects_and_purposes_have_nothing_to_do_with_each_other():
    one, other = ([hashed(str(i), salt) for i in range(4000)] for salt in ("a/arm", "b/arm"))
    both = sum(x < 0.5 and y < 0.5 for x, y in zip(one, other, strict=True)) / 4000
    assert both == pytest.approx(0.25, abs=0.03)


def test_what_was_trained_on_is_not_held_out_and_else_stays_as_it_would_be():
    for i in range(2000):
        arm = arm_of(str(i), "demo", Shares())
        known = arm_of(str(i), "demo", Shares(), trained_on=True)
        assert known != "hold_out"
        if arm == "design":
            assert known == "design"
    arms = Counter(arm_of(str(i), "demo", Shares(), trained_on=True) for i in range(20_000))
    assert arms["random"] / 20_000 == pytest.approx(2 / 9, abs=0.012)


def test_a_sequence_by_hand():
    # How far design, random and hold-out are behind: .5 .3 .2 (1), 0 .6 .4 (11), .5 -.1 .6 (21),
    # 1 .2 -.2 (2), .5 .5 0 (3), 0 .8 .2 (12), .5 .1 .4 (4), 0 .4 .6 (22), .5 .7 -.2 (13), (5).
    shares = Shares(random=0.3, hold_out=0.2)
    arms = {"design": [1, 2, 3, 4, 5], "random": [11, 12, 13], "hold_out": [21, 22]}
    assert interleaved(arms, shares) == [1, 11, 21, 2, 3, 12, 4, 22, 13, 5]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(0, 30), st.integers(0, 30))
def test_every_pair_comes_once_in_the_order_of_its_arm_and_no_arm_falls_behind(n, m, k):
    arms = {
        "design": [("d", i) for i in range(n)],
        "random": [("r", i) for i in range(m)],
        "hold_out": [("h", i) for i in range(k)],
    }
    sequence = interleaved(arms, Shares())
    assert sorted(sequence) == sorted(x for arm in arms.values() for x in arm)
    for name, arm in arms.items():
        assert [x for x in sequence if x[0] == name[0]] == arm
    for at in range(1, len(sequence) + 1):
        done = Counter(x[0] for x in sequence[:at])
        if all(done[name[0]] < len(arm) for name, arm in arms.items()):
            assert abs(done["r"] - 0.2 * at) < 1
            assert abs(done["h"] - 0.1 * at) < 1


def test_shares_leave_something_to_the_design():
    with pytest.raises(ValidationError, match="leave nothing to the design"):
        Shares(random=0.6, hold_out=0.4)
    assert Shares(hold_out=0).of("design") == pytest.approx(0.8)
    assert interleaved({"hold_out": [1, 2]}, Shares(hold_out=0)) == [1, 2]
