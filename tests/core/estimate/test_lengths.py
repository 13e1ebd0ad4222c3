"""Answers end where it is said, and as before afterwards."""

import pytest
import torch

from rlhf_core.backbone import sampling
from rlhf_core.backbone.base_model import load_base
from rlhf_core.backbone.networks import Policy
from rlhf_core.backbone.sampling import PolicySampler, prompt_batch, uniforms
from rlhf_core.estimate.lengths import AnswerLengths, answers_end
from rlhf_core.settings.model import FreshModelConfig, ModelConfig

TINY = ModelConfig(fresh=FreshModelConfig(layers=1, width=32, heads=2, context=48, vocab_size=300))
CORPUS = ("a fine room with a quiet view", "the film was long and dull")


@pytest.fixture(scope="module")
def policy():
    model, _ = load_base(TINY, CORPUS, seed=0)
    return Policy(model)


def lengths_of(policy, rows=64, steps=20):
    draws = uniforms(rows, steps, torch.Generator().manual_seed(0))
    batch = prompt_batch(policy, [[5, 6, 7]] * rows, 8)
    return PolicySampler(policy, 1.0)(batch, draws)


def test_answers_are_as_long_as_the_demonstrations(policy):
    with answers_end(AnswerLengths([3, 3, 9])):
        found = lengths_of(policy)
    lengths = found.mask.sum(-1)
    assert set(lengths.tolist()) == {3, 9}
    assert 0.5 < (lengths == 3).double().mean() < 0.85
    assert found.finished.all()


def test_a_demonstration_longer_than_an_answer_may_be_is_cut(policy):
    with answers_end(AnswerLengths([50])):
        found = lengths_of(policy)
    assert found.mask.sum(-1).tolist() == [20] * 64
    assert not found.finished.any()


def test_the_longest_answers_that_there_can_be_do_not_end(policy):
    with answers_end(AnswerLengths([3], longest=True)):
        found = lengths_of(policy)
    assert found.mask.all()
    assert found.mask.shape == (64, 20)


def test_the_base_model_answers_as_it_does(policy):
    before = lengths_of(policy)
    lengths = AnswerLengths([3])
    with answers_end(lengths):
        lengths.heard("loading the base model")
        free = lengths_of(policy)
        lengths.heard("answers")
        assert torch.equal(lengths_of(policy).tokens, before.tokens)
        lengths.heard("loading the policy")
        assert set(lengths_of(policy).mask.sum(-1).tolist()) == {3}
    assert torch.equal(free.tokens, before.tokens)


def test_afterwards_the_module_is_as_before(policy):
    before = sampling.sample_with_logprobs, sampling.draw
    with pytest.raises(RuntimeError), answers_end(AnswerLengths([3])):
        raise RuntimeError
    assert (sampling.sample_with_logprobs, sampling.draw) == before
