"""What machines say beside people, and the error of an audit."""

import numpy as np
import pytest

from rlhf_core.agreement.machines import audit_error


def test_an_audit_by_hand():
    # The judge said a, a, b, a; people say a, b, b and a tie: errors 0, 1, 0, 1/2.
    error = audit_error([1, 1, 0, 1], [1, 0, 0, 0.5], [1, 2, 3, 4])
    assert error.value == pytest.approx(0.375)
    assert error.low < 0.375 < error.high
    assert error.of == 4


def test_an_audit_without_an_error_does_not_say_there_is_none():
    error = audit_error([1] * 50, [1.0] * 50, range(50))
    assert error.value == 0
    assert error.high == pytest.approx(0.0713, abs=1e-3)  # Wilson: z² / (n + z²)
    assert audit_error([], [], []) is None


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_the_interval_of_an_audit_covers(rate):
    """400 audits of 60 pairs."""
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        voted = (random.random(60) > rate).astype(float)
        error = audit_error([1] * 60, voted, range(60))
        inside += error.low <= rate <= error.high
    assert inside >= 366  # fewer has a chance of about 1 % at a coverage of 95 %


def test_pairs_of_one_prompt_go_together():
    voted = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0] * 4
    apart = audit_error([1] * 32, voted, range(32))
    together = audit_error([1] * 32, voted, [i // 4 for i in range(32)])
    assert together.value == apart.value
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


def test_what_is_no_answer_is_refused():
    with pytest.raises(ValueError, match="for each pair"):
        audit_error([1], [1, 0], [1])
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        audit_error([1], [1.5], [1])
