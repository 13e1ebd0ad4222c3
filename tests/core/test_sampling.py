"""Sampling: the distribution that the update differentiates, wherever the padding is."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.encoding import left_pad
from rlhf_core.rollout import response_logprobs, sequences
from rlhf_core.sampling import SamplingConfig, respond, sample
from rlhf_core.types import PromptBatch

PROMPTS = [[20, 30, 40, 50, 60], [70, 80], [90, 100, 110]]
EOS, PAD = 0, 1


def draw(model, rows, *, temperature=1.0, tokens=10, seed=0, width=99):
    batch = left_pad(rows, PAD, width)
    return batch, sample(
        model,
        batch,
        max_new_tokens=tokens,
        temperature=temperature,
        eos_token_id=EOS,
        pad_token_id=PAD,
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.fixture
def sharp(causal):
    """A model whose next token depends strongly on all tokens before it."""
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in causal[0].parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.3, generator=draws)
    return causal[0]


@pytest.fixture
def chatty(sharp):
    """The same, with an end of sequence that has about one chance in ten everywhere."""
    head = torch.nn.Linear(*reversed(sharp.get_output_embeddings().weight.shape))
    with torch.no_grad():
        logits = sharp(torch.tensor([PROMPTS[0]])).logits
        head.weight.copy_(sharp.get_output_embeddings().weight)[EOS] = 0
        head.bias.zero_()[EOS] = (logits.logsumexp(-1) - math.log(9)).mean()
    sharp.set_output_embeddings(head)
    return sharp


def test_greedy_is_that_of_plain_transformers(sharp):
    batch, ours = draw(sharp, PROMPTS, temperature=0.0)
    theirs = sharp.generate(
        batch.input_ids,
        attention_mask=batch.mask.long(),
        do_sample=False,
        max_new_tokens=10,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    assert torch.equal(theirs[:, batch.input_ids.shape[1] :], ours.tokens)
    assert len(set(ours.tokens.flatten().tolist())) > 10  # not one token for ever


def test_frequencies_are_the_softmax_over_the_temperature(sharp):
    # Pearson's χ² of 20,000 first tokens against softmax(z / T); tokens that are expected less than
    # 5 times are one class. Its mean is k and its variance 2k: +5 deviations by chance in 1e-6.
    temperature, n = 1.7, 20_000
    with torch.no_grad():
        logits = sharp(torch.tensor([PROMPTS[0]])).logits[0, -1]
    for tried, matches in ((temperature, True), (1.3, False)):
        _, found = draw(sharp, [PROMPTS[0]] * n, temperature=temperature, tokens=1)
        expected = n * (logits / tried).softmax(-1)
        counts = torch.bincount(found.tokens[:, 0], minlength=len(expected)).float()
        common = expected >= 5
        expected = torch.cat([expected[common], expected[~common].sum(0, keepdim=True)])
        counts = torch.cat([counts[common], counts[~common].sum(0, keepdim=True)])
        assert expected[-1] > 5
        statistic = ((counts - expected).square() / expected).sum().item()
        k = len(expected) - 1
        assert k > 20
        assert (statistic < k + 5 * math.sqrt(2 * k)) == matches


def test_later_tokens_follow_their_whole_prefix(sharp):
    # The likeliest pairs of tokens, against the chain rule on forward passes without a cache.
    temperature, n = 0.5, 20_000
    _, found = draw(sharp, [PROMPTS[1]] * n, temperature=temperature, tokens=2)
    with torch.no_grad():
        first = (sharp(torch.tensor([PROMPTS[1]])).logits[0, -1] / temperature).softmax(-1)
        longer = torch.tensor([[*PROMPTS[1], token] for token in range(len(first))])
        second = (sharp(longer).logits[:, -1] / temperature).softmax(-1)
    joint = first.unsqueeze(1) * second
    likeliest = joint.flatten().topk(10)
    pairs = found.tokens[:, 0] * len(first) + found.tokens[:, 1]
    for pair, probability in zip(likeliest.indices, likeliest.values, strict=True):
        if pair // len(first) == EOS:
            continue  # ended: what follows is padding
        deviation = (probability * (1 - probability) / n).sqrt()
        assert abs((pairs == pair).float().mean() - probability) < 5 * deviation


def test_a_row_ends_at_its_end_of_sequence(chatty):
    batch, found = draw(chatty, PROMPTS * 40, tokens=15)
    assert 0.1 < found.finished.float().mean() < 1  # both kinds are here
    assert found.tokens.shape == found.mask.shape == (120, 15)
    for tokens, mask, finished in zip(found.tokens, found.mask, found.finished, strict=True):
        said = tokens.tolist()
        length = said.index(EOS) + 1 if EOS in said else 15
        assert finished == (EOS in said)
        assert mask.tolist() == [True] * length + [False] * (15 - length)
        assert said[length:] == [PAD] * (15 - length)
    assert batch.input_ids.shape[0] == 120


def test_sampling_stops_when_every_row_has_ended(chatty):
    with torch.no_grad():
        chatty.get_output_embeddings().bias[EOS] = 1e4
    _, found = draw(chatty, PROMPTS, tokens=15)
    assert found.tokens.tolist() == [[EOS]] * 3
    assert found.finished.all()


def test_logits_of_sampling_are_those_of_the_forward_pass_of_the_update(chatty):
    # A model whose head reports what sampling saw: the cache must not change the distribution.
    seen = []
    head = chatty.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, out: seen.append(out[:, -1]))
    batch, found = draw(chatty, PROMPTS * 3, tokens=12)
    handle.remove()
    step = torch.stack(seen, 1).log_softmax(-1)
    sampled = step.gather(-1, found.tokens.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        full = response_logprobs(chatty, batch, found, temperature=1.0)
    assert_close(full, sampled.masked_fill(~found.mask, 0), rtol=1e-5, atol=1e-4)


def test_padding_of_the_prompt_changes_nothing(sharp):
    # Alone, beside longer prompts, and with more padding than the batch needs.
    alone, _ = draw(sharp, [PROMPTS[1]])
    wide = PromptBatch(
        torch.cat([torch.full((3, 4), 77), left_pad(PROMPTS, PAD, 99).input_ids], 1),
        torch.cat([torch.zeros(3, 4, dtype=torch.bool), left_pad(PROMPTS, PAD, 99).mask], 1),
    )
    beside, found = draw(sharp, PROMPTS)
    with torch.no_grad():
        logprobs = [
            response_logprobs(sharp, prompts, found.rows(rows), temperature=1.0)
            for prompts, rows in (
                (beside, torch.arange(3)),
                (wide, torch.arange(3)),
                (alone, torch.tensor([1])),
            )
        ]
    assert_close(logprobs[0], logprobs[1], rtol=1e-5, atol=1e-4)
    assert_close(logprobs[0][1:2], logprobs[2], rtol=1e-5, atol=1e-4)
    greedy = [draw(sharp, rows, temperature=0.0)[1] for rows in (PROMPTS, [PROMPTS[1]])]
    together, by_itself = (
        found.tokens[i][found.mask[i]] for found, i in zip(greedy, (1, 0), strict=True)
    )
    assert torch.equal(together, by_itself)


def test_same_generator_gives_the_same_samples(sharp):
    one, two, other = (draw(sharp, PROMPTS, seed=seed)[1].tokens for seed in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_global_random_numbers_are_neither_read_nor_moved(sharp):
    one = draw(sharp, PROMPTS)[1].tokens
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    try:
        assert torch.equal(draw(sharp, PROMPTS)[1].tokens, one)
    finally:
        torch.random.set_rng_state(state)


def test_respond_takes_prompts_in_order_in_batches(sharp):
    sharp.config.eos_token_id, sharp.config.pad_token_id = EOS, PAD
    config = SamplingConfig(max_prompt_length=3, max_new_tokens=4, batch_size=2)
    draws = torch.Generator().manual_seed(0)
    batches = list(respond(sharp, PROMPTS, config, generator=draws))
    prompts = [
        row[keep].tolist()
        for b, _ in batches
        for row, keep in zip(b.input_ids, b.mask, strict=True)
    ]
    assert prompts == [[40, 50, 60], [70, 80], [90, 100, 110]]
    assert [len(r.tokens) for _, r in batches] == [2, 1]
    assert all(r.tokens.shape[1] <= 4 for _, r in batches)


def test_temperature_of_the_config_is_used(sharp):
    def first(temperature):
        config = SamplingConfig(max_new_tokens=1, temperature=temperature, batch_size=500)
        draws = torch.Generator().manual_seed(0)
        ((_, found),) = respond(sharp, [PROMPTS[0]] * 500, config, generator=draws)
        return len(set(found.tokens.flatten().tolist()))

    assert first(1e-4) == 1
    assert first(0.5) < first(3.0)


def test_longest_text_is_prompt_and_response():
    assert SamplingConfig(max_prompt_length=5, max_new_tokens=7).max_length == 12


def test_sequences_put_the_response_behind_the_prompt(sharp):
    batch, found = draw(sharp, PROMPTS, tokens=3)
    tokens, mask = sequences(batch, found)
    assert torch.equal(tokens[:, -3:], found.tokens)
    assert torch.equal(tokens[:, :-3], batch.input_ids)
    assert torch.equal(mask, torch.cat([batch.mask, found.mask], 1))
