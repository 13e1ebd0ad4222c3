"""Answers that are kept for a judge who takes days come back to the last bit."""

import math

import pytest
import torch

from rlhf_core.errors import DataError
from rlhf_core.evaluation.answers import Answers
from rlhf_core.evaluation.kept import kept

ANSWERS = Answers(
    texts=["plain", "half a pair \ud800", 'quotes " and\nlines', ""],
    prompt=torch.tensor([0, 0, 1, 1]),
    tokens=torch.tensor([1.0, 2.0, 3.0, 0.0]),
    proxy=torch.tensor([1 / 3, -1e-30, 3.4e38, math.pi]),
    true=torch.tensor([0.1, math.inf, -math.inf, 5e-324], dtype=torch.float64),
    kl=None,
    sft_logprob=torch.tensor([-1.1, -2.2, -3.3, 0.0]),
    finished=torch.tensor([True, False, True, False]),
)


def test_every_bit_comes_back_and_nothing_is_sampled_again(tmp_path):
    asked = []

    def sample():
        asked.append(1)
        return ANSWERS

    first = kept(tmp_path / "answers", "milestone.2", sample)
    again = kept(tmp_path / "answers", "milestone.2", sample)
    assert len(asked) == 1
    assert first is ANSWERS
    assert again.texts == ANSWERS.texts
    assert again.kl is None
    for name in ("prompt", "tokens", "proxy", "true", "sft_logprob", "finished"):
        mine, theirs = getattr(again, name), getattr(ANSWERS, name)
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def test_without_a_folder_nothing_is_kept(tmp_path):
    assert kept(None, "sft", lambda: ANSWERS) is ANSWERS
    assert list(tmp_path.iterdir()) == []


def test_each_entrant_has_answers_of_its_own(tmp_path):
    kept(tmp_path, "sft", lambda: ANSWERS)
    other = kept(tmp_path, "policy", lambda: ANSWERS.pick(torch.tensor([1])))
    assert other.texts == ANSWERS.texts[1:2]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"texts": 1}', "null"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "sft.json").write_text(text)
    with pytest.raises(DataError, match=r"sft\.json are damaged .* remove the file"):
        kept(tmp_path, "sft", lambda: ANSWERS)
