"""What the models say about responses, against a computation row by row without padding."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.encoding import left_pad, right_pad
from rlhf_core.rollout import (
    collect,
    in_pieces,
    response_logprobs,
    response_scores,
    response_values,
)
from rlhf_core.types import PromptBatch, Responses

PROMPTS = [[20, 30, 40, 50], [70, 80], [90], [100, 110, 120]]
SAID = [[21, 31, 0], [41, 51, 61, 71, 0], [0], [81, 91, 101, 111, 121]]  # the last never ends
WIDTH = max(map(len, SAID))


@pytest.fixture
def batch():
    tokens, mask = right_pad(SAID, 1)
    return left_pad(PROMPTS, 1, 99), Responses(
        tokens, mask, torch.tensor([True, True, True, False])
    )


def text(row):
    return torch.tensor([PROMPTS[row] + SAID[row]])


def rows_of(values):
    """Per-row lists of a (B, R) tensor -> the same with 0 where nothing was said."""
    return torch.stack([torch.cat([v, torch.zeros(WIDTH - len(v))]) for v in values])


@torch.no_grad()
def test_logprobs_are_those_of_each_row_alone(causal, batch):
    naive = []
    for row, said in enumerate(SAID):
        logprobs = (causal[0](text(row)).logits[0] / 0.7).log_softmax(-1)
        start = len(PROMPTS[row])
        naive.append(torch.stack([logprobs[start + i - 1, said[i]] for i in range(len(said))]))
    found = response_logprobs(causal[0], *batch, temperature=0.7)
    assert_close(found, rows_of(naive), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_value_of_a_token_is_that_of_the_state_in_which_it_was_chosen(scalar, batch):
    # V(s_t) sees the prompt and the tokens before t, and nothing of t: columns P - 1 .. P + R - 2.
    naive = []
    for row, said in enumerate(SAID):
        states = [torch.tensor([PROMPTS[row] + said[:t]]) for t in range(len(said))]
        values = [scalar.scores(s, torch.ones_like(s, dtype=torch.bool))[0] for s in states]
        naive.append(torch.stack(values))
    assert_close(response_values(scalar, *batch), rows_of(naive), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_score_is_that_of_the_text_alone(scalar, batch):
    texts = [text(row) for row in range(len(SAID))]
    alone = [scalar.scores(t, torch.ones_like(t, dtype=torch.bool))[0] for t in texts]
    assert_close(response_scores(scalar, *batch), torch.stack(alone), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_neither_padding_nor_neighbours_matter(causal, scalar, batch):
    prompts, responses = batch
    wider = PromptBatch(
        torch.cat([torch.full((4, 3), 33), prompts.input_ids], 1),
        torch.cat([torch.zeros(4, 3, dtype=torch.bool), prompts.mask], 1),
    )
    longer = Responses(
        torch.cat([responses.tokens, torch.full((4, 2), 44)], 1),
        torch.cat([responses.mask, torch.zeros(4, 2, dtype=torch.bool)], 1),
        responses.finished,
    )
    for measure in (
        lambda p, r: response_logprobs(causal[0], p, r, temperature=1.0)[:, :WIDTH],
        lambda p, r: response_values(scalar, p, r)[:, :WIDTH],
        lambda p, r: response_scores(scalar, p, r),
    ):
        assert_close(measure(wider, longer), measure(*batch), rtol=1e-5, atol=1e-5)


def test_pieces_are_the_whole(causal, batch):
    def measure(prompts, responses):
        return response_logprobs(causal[0], prompts, responses, temperature=1.0)

    whole = measure(*batch)
    assert whole.requires_grad
    for size in (1, 3, 99):
        pieces = in_pieces(measure, *batch, size)
        assert_close(pieces, whole.detach(), rtol=1e-5, atol=1e-5)
        assert not pieces.requires_grad


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_collect_puts_every_number_into_its_field(causal, scalar, batch, micro_batch_size):
    policy = causal[0]
    reward_model = type(scalar)(scalar.model, mean=-2.0, std=3.0)
    rollout = collect(
        *batch,
        policy=policy,
        reference=policy,
        critic=scalar,
        reward_model=reward_model,
        temperature=0.7,
        micro_batch_size=micro_batch_size,
    )
    close = {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad():
        assert_close(rollout.logprobs, response_logprobs(policy, *batch, temperature=0.7), **close)
        assert_close(rollout.values, response_values(scalar, *batch), **close)
        assert_close(rollout.scores, response_scores(reward_model, *batch), **close)
    assert (rollout.prompts, rollout.responses) == batch
    # The reference is the policy itself: not nearly the same, the same.
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)


def test_reference_is_measured_with_the_reference(causal, scalar, batch, request):
    other = request.getfixturevalue("gpt2" if "Llama" in type(causal[0]).__name__ else "llama")[0]
    models = {"critic": scalar, "reward_model": scalar, "temperature": 1.0, "micro_batch_size": 8}
    rollout = collect(*batch, policy=causal[0], reference=other, **models)
    with torch.no_grad():
        assert_close(rollout.ref_logprobs, response_logprobs(other, *batch, temperature=1.0))
    assert not torch.allclose(rollout.logprobs, rollout.ref_logprobs)


def test_rows_take_the_same_rows_of_every_field(causal, scalar, batch):
    models = {"policy": causal[0], "reference": causal[0], "critic": scalar, "reward_model": scalar}
    rollout = collect(*batch, **models, temperature=1.0, micro_batch_size=8)
    index = torch.tensor([3, 1])
    some = rollout.rows(index)
    for name in ("logprobs", "ref_logprobs", "values", "scores"):
        assert torch.equal(getattr(some, name), getattr(rollout, name)[index])
    for ours, whole in ((some.prompts, batch[0]), (some.responses, batch[1])):
        for name in vars(whole):
            assert torch.equal(getattr(ours, name), getattr(whole, name)[index])
