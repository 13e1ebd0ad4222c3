"""What is made of a score before a policy learns from it."""

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from rlhf_core.rewards.shaping import Shaping
from rlhf_core.settings.rewards import ShapingSection

SCORES = torch.tensor([1.0, 3.0, 5.0, 7.0])  # mean 4, variance 5
LENGTHS = torch.tensor([2, 4, 6, 8])


def shaping(prompts=4, **settings):
    return Shaping(ShapingSection(**settings), prompts, torch.Generator().manual_seed(0))


def test_nothing_is_changed_by_default():
    assert not ShapingSection().active
    assert torch.equal(shaping()(SCORES, LENGTHS, [0, 1, 2, 3]), SCORES)


def test_whitened_clipped_and_charged_in_this_order():
    shape = shaping(transform="whiten", clip=1.0, length_limit=5, length_penalty=0.5)
    # ±3/√5 = ±1.34 is cut to ±1, ±1/√5 is not; then 1 and 3 tokens too many
    a = 1 / 5**0.5
    expected = torch.tensor([-1.0, -a, a - 0.5, 1.0 - 1.5])
    assert_close(shape(SCORES, LENGTHS, [0, 1, 2, 3]), expected)


def test_whitening_goes_on_from_the_roll_outs_before():
    shape = shaping(transform="whiten")
    shape(torch.tensor([0.0, 8.0]), LENGTHS[:2], [0, 1])
    both = torch.tensor([0.0, 8.0, 2.0, 6.0])
    expected = (both[2:] - both.mean()) / both.std(correction=0)
    assert_close(shape(both[2:], LENGTHS[:2], [2, 3]), expected)


def test_a_response_is_compared_with_answers_to_its_own_prompt():
    shape = shaping(transform="sigmoid", reference_answers=2)
    assert shape.unknown([3, 0, 3]) == [3, 0]
    shape.keep_reference([3, 0], torch.tensor([[7.0, 7.0], [100.0, -100.0]]))
    assert shape.unknown([3, 0, 2]) == [2]
    result = shape(torch.tensor([7.0, 0.0]), LENGTHS[:2], [3, 0])
    assert_close(result, torch.tensor([0.5, 0.5]))


def test_the_state_is_all_there_is():
    settings = {"transform": "sigmoid", "clip": 0.9}
    ours, theirs = shaping(**settings), shaping(**settings)
    ours.keep_reference([1, 2], torch.tensor([[1.0], [2.0]]))
    torch.rand(3, generator=ours.draws)
    theirs.load_state_dict(ours.state_dict())
    ours.keep_reference([0], torch.tensor([[9.0]]))  # the copy does not follow
    assert theirs.unknown([0, 1, 2, 3]) == [0, 3]
    assert torch.equal(
        theirs(SCORES[:2], LENGTHS[:2], [1, 2]), ours(SCORES[:2], LENGTHS[:2], [1, 2])
    )
    assert torch.equal(torch.rand(3, generator=theirs.draws), torch.rand(3, generator=ours.draws))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"transform": "sigmoid", "clip": 1.0}, "never cuts a score of the sigmoid"),
        ({"length_limit": 5}, "no effect without length_penalty"),
        ({"clip": -1}, "greater than or equal to 0"),
        ({"reference_answers": 0}, "greater than or equal to 1"),
        ({"transform": "tanh"}, "'none', 'whiten' or 'sigmoid'"),
    ],
)
def test_settings_without_effect_are_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        ShapingSection(**settings)
