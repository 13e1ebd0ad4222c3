"""Sampling: the distribution that the update differentiates, whatever stands beside a row."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from rlhf_core.backbone import sampling
from rlhf_core.backbone.memory import continuation
from rlhf_core.backbone.networks import Policy, start_adapter
from rlhf_core.backbone.responses import lay_out, response_logprobs
from rlhf_core.backbone.sampling import (
    BLOCK,
    draw,
    respond,
    sample,
    sample_with_logprobs,
    uniforms,
)
from rlhf_core.data.encoding import left_pad
from rlhf_core.seeding import generator
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.types import PromptBatch

PROMPTS = [[20, 30, 40, 50, 60], [70, 80], [90, 100, 110]]
EOS, PAD = 0, 1
LARGEST = 1 - 2**-24  # the largest float32 below 1


@pytest.fixture(params=["gpt2", "llama", "mistral"])
def sharp(request):
    """A model whose next token depends strongly on all tokens that it looks back to."""
    model = request.getfixturevalue(request.param)[0]
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.3, generator=draws)
    return Policy(model)


@pytest.fixture
def chatty(sharp):
    """The same, with an end of sequence that has about one chance in ten everywhere."""
    model = sharp.model
    old = model.get_output_embeddings().weight
    head = torch.nn.Linear(*reversed(old.shape))
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits
        head.weight.copy_(old)[EOS] = 0
        head.bias.zero_()[EOS] = (logits.logsumexp(-1) - math.log(9)).mean()
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(head)
    return Policy(model)


def numbers(rows, tokens=12, seed=0):
    return uniforms(rows, tokens, torch.Generator().manual_seed(seed))


def write(policy, rows, draws, *, temperature=1.0, between=lambda: None):
    batch = rows if isinstance(rows, PromptBatch) else left_pad(rows, PAD, 99)
    ids = {"eos_token_id": EOS, "pad_token_id": PAD}
    options = {"temperature": temperature, "between": between}
    return batch, sample(policy, batch, draws, **ids, **options)


def said(responses):
    return [row[keep].tolist() for row, keep in zip(responses.tokens, responses.mask, strict=True)]


# --- one token out of a distribution ---


def chi_square(counts, expected):
    """Pearson's statistic, its mean k and its variance 2k; places expected less than 5 times are
    one class."""
    common = expected >= 5
    rare = expected[~common].sum(0, keepdim=True), counts[~common].sum(0, keepdim=True)
    expected, counts = (
        torch.cat([x[common], r]) if rare[0] >= 5 else x[common]
        for x, r in zip((expected, counts), rare, strict=True)
    )
    return ((counts - expected).square() / expected).sum().item(), len(expected) - 1


@pytest.mark.parametrize("size", [7, 40, BLOCK, 3 * BLOCK + 50])
def test_frequencies_are_the_softmax_over_the_temperature(size):
    temperature, n = 1.7, 40_000
    draws = torch.Generator().manual_seed(size)
    logits = 2 * torch.randn(size, generator=draws)
    found, _ = draw(logits.expand(n, -1), torch.rand(n, generator=draws), temperature)
    counts = torch.bincount(found, minlength=size).float()
    for tried, matches in ((temperature, True), (1.3, False)):
        statistic, k = chi_square(counts, n * (logits / tried).softmax(-1))
        assert (statistic < k + 5 * math.sqrt(2 * k)) == matches


@pytest.mark.parametrize("size", [2, 40, BLOCK, 50_257])
def test_token_is_where_the_distribution_function_passes_u(size):
    # Against the running sum of probabilities in float64.
    draws = torch.Generator().manual_seed(size)
    logits, u = 3 * torch.randn(100, size, generator=draws), torch.rand(100, generator=draws)
    found, logprobs = draw(logits, u, 0.8)
    found = found.unsqueeze(-1)
    probabilities = (logits.double() / 0.8).softmax(-1)
    after = probabilities.cumsum(-1).gather(1, found).squeeze(-1)
    before = after - probabilities.gather(1, found).squeeze(-1)
    assert (before - 1e-6 <= u).all()
    assert (u <= after + 1e-6).all()
    exact = probabilities.log().gather(1, found).squeeze(-1).float()
    assert_close(logprobs, exact, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("u", [0.0, 0.25, 0.5, 1 - 2**-10, LARGEST])
def test_impossible_token_is_never_drawn(u):
    # Whole blocks without weight at both ends and in the middle, and gaps within the others.
    logits = torch.full((4 * BLOCK + 9,), -math.inf)
    possible = torch.tensor([BLOCK + 3, BLOCK + 200, 3 * BLOCK, 3 * BLOCK + 17])
    logits[possible] = torch.tensor([1.0, -20.0, 3.0, 0.0])
    assert draw(logits.unsqueeze(0), torch.tensor([u]), 1.0)[0].item() in possible
    ends, _ = draw(logits.expand(2, -1), torch.tensor([0.0, LARGEST]), 1.0)
    assert ends[0] == possible[0]
    assert ends[1] == possible[-1]


@pytest.mark.parametrize("size", [3, BLOCK + 1, 20_000])
def test_every_u_finds_a_token_whatever_the_rounding(size):
    # The sum of all weights and the last of their running sums round differently, so that a u just
    # below 1 may lie behind the latter.
    logits = torch.randn(200, size, generator=torch.Generator().manual_seed(0))
    logits[:, -2:] = -math.inf
    found, _ = draw(logits, torch.full((200,), LARGEST), 1.0)
    assert (found < size - 2).all()
    reached = logits.double().softmax(-1).cumsum(-1).gather(1, found.unsqueeze(1))
    assert (reached > 1 - 1e-6).all()
    for weight in (0.0, 88.0, -1e4):
        flat = torch.full((1, size), weight)
        assert draw(flat, torch.tensor([0.0]), 1.0)[0].item() == 0
        last = draw(flat, torch.tensor([LARGEST]), 1.0)[0].item()
        assert size - 2 - size // 10_000 <= last < size


def test_temperature_0_is_the_likeliest_token():
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, 4.9, 4.9]])
    token, logprob = draw(logits, torch.tensor([LARGEST, 0.9]), 0)
    assert token.tolist() == [1, 0]
    assert logprob.tolist() == [0, 0]


def test_half_precision_logits_are_summed_in_float32():
    # bfloat16 stops counting at 256: a sum in it would never come near the last of 1,000 tokens.
    assert draw(torch.zeros(1, 1000).bfloat16(), torch.tensor([LARGEST]), 1.0)[0].item() == 999


# --- whole texts ---


def greedy(policy, plain):
    """Ours, after a look at that of plain transformers."""
    prompts = [[*prompt, last] for prompt in PROMPTS for last in range(30, 40)]
    batch, ours = write(policy, prompts, numbers(30), temperature=0)
    theirs = plain(policy.model).generate(
        batch.input_ids,
        attention_mask=batch.mask.long(),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    assert torch.equal(theirs[:, batch.input_ids.shape[1] :], ours.tokens)
    assert len(set(ours.tokens.flatten().tolist())) > 10  # not one token for ever
    return ours


def test_greedy_is_that_of_plain_transformers(sharp, plain):
    greedy(sharp, plain)


def test_greedy_rows_end_as_in_plain_transformers(chatty, plain):
    assert len(set(greedy(chatty, plain).mask.sum(-1).tolist())) > 2


def test_later_tokens_follow_their_whole_prefix(sharp, plain):
    # The likeliest pairs of tokens, against the chain rule on forward passes without a cache.
    temperature, n = 0.5, 20_000
    _, found = write(sharp, [PROMPTS[1]] * n, numbers(n, 2), temperature=temperature)
    eager = plain(sharp.model)
    with torch.no_grad():
        first = (eager(torch.tensor([PROMPTS[1]])).logits[0, -1] / temperature).softmax(-1)
        longer = torch.tensor([[*PROMPTS[1], token] for token in range(len(first))])
        second = (eager(longer).logits[:, -1] / temperature).softmax(-1)
    joint = first.unsqueeze(1) * second
    likeliest = joint.flatten().topk(10)
    pairs = found.tokens[:, 0] * len(first) + found.tokens[:, 1]
    for pair, probability in zip(likeliest.indices, likeliest.values, strict=True):
        if pair // len(first) == EOS:
            continue  # ended: what follows is padding
        deviation = (probability * (1 - probability) / n).sqrt()
        assert abs((pairs == pair).float().mean() - probability) < 5 * deviation


def test_a_row_ends_at_its_end_of_sequence(chatty):
    _, found = write(chatty, PROMPTS * 40, numbers(120))
    assert 0.1 < found.finished.float().mean() < 1  # both kinds are here
    assert found.tokens.shape == found.mask.shape == (120, 12)
    for tokens, mask, finished in zip(found.tokens, found.mask, found.finished, strict=True):
        text = tokens.tolist()
        length = text.index(EOS) + 1 if EOS in text else 12
        assert finished == (EOS in text)
        assert mask.tolist() == [True] * length + [False] * (12 - length)
        assert text[length:] == [PAD] * (12 - length)


def test_tensors_are_as_wide_as_the_longest_response(chatty):
    with torch.no_grad():
        chatty.model.get_output_embeddings().bias[EOS] = 1e4
    _, found = write(chatty, PROMPTS, numbers(3))
    assert found.tokens.tolist() == [[EOS]] * 3
    assert found.finished.all()


def test_rows_that_have_ended_are_computed_no_more(chatty):
    sizes = []
    handle = chatty.model.base_model.register_forward_pre_hook(
        lambda module, args, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    _, found = write(chatty, PROMPTS * 5, numbers(15))
    handle.remove()
    assert sizes == [int(found.mask[:, t].sum()) for t in range(found.mask.shape[1])]
    assert sizes[-1] < sizes[0]


def test_a_text_depends_on_its_prompt_and_its_numbers_alone(chatty):
    prompts, draws = PROMPTS * 5, numbers(15)
    together = said(write(chatty, prompts, draws)[1])
    assert len(set(map(len, together))) > 5  # rows leave at many different times
    alone = [
        said(write(chatty, [prompt], own.unsqueeze(0))[1])[0]
        for prompt, own in zip(prompts, draws, strict=True)
    ]
    assert together == alone
    order = torch.randperm(15, generator=torch.Generator().manual_seed(2)).tolist()
    assert said(write(chatty, [prompts[i] for i in order], draws[order])[1]) == [
        together[i] for i in order
    ]
    batch = left_pad(prompts, PAD, 99)
    wide = PromptBatch(
        torch.cat([torch.full((15, 4), 77), batch.input_ids], 1),
        torch.cat([torch.zeros(15, 4, dtype=torch.bool), batch.mask], 1),
    )
    assert said(write(chatty, wide, draws)[1]) == together


def test_logprobs_of_sampling_are_those_of_a_plain_forward_pass(chatty, plain):
    # Neither cache nor padding nor the order in which rows go on may change what a token is drawn
    # from; the rows end at different tokens.
    batch = left_pad(PROMPTS * 3, PAD, 99)
    found, sampled = sample_with_logprobs(
        chatty, batch, numbers(9), temperature=1.0, eos_token_id=EOS, pad_token_id=PAD
    )
    assert found.mask.sum(-1).unique().numel() > 3
    eager = plain(chatty.model)
    alone = torch.zeros(found.mask.shape)
    with torch.no_grad():
        for row, (prompt, text) in enumerate(zip(PROMPTS * 3, said(found), strict=True)):
            logprobs = eager(torch.tensor([prompt + text])).logits[0].log_softmax(-1)
            for t, token in enumerate(text):
                alone[row, t] = logprobs[len(prompt) + t - 1, token]
        ours = response_logprobs(chatty, lay_out(batch, found), temperature=1.0)
    assert_close(sampled, alone, rtol=1e-5, atol=1e-4)
    assert_close(ours, alone, rtol=1e-5, atol=1e-4)
    assert (sampled[~found.mask] == 0).all()


def test_between_is_called_before_each_token_and_may_stop(sharp):
    class Stop(BaseException):
        """As a signal would."""

    calls = []
    _, found = write(sharp, PROMPTS, numbers(3), between=lambda: calls.append(1))
    assert len(calls) == found.tokens.shape[1]

    def stop():
        raise Stop

    with pytest.raises(Stop):
        write(sharp, PROMPTS, numbers(3), between=stop)


# --- prompts in batches ---


def answers(policy, batch_size, seed=0):
    config = SamplingConfig(max_prompt_length=4, max_new_tokens=8, batch_size=batch_size)
    draws = torch.Generator().manual_seed(seed)
    return list(respond(policy, PROMPTS * 2, config, generator=draws))


def test_respond_takes_prompts_in_order_in_batches(chatty):
    batches = answers(chatty, 4)
    prompts = [
        row[keep].tolist()
        for b, _ in batches
        for row, keep in zip(b.input_ids, b.mask, strict=True)
    ]
    assert prompts == [[30, 40, 50, 60], [70, 80], [90, 100, 110]] * 2
    assert [len(r.tokens) for _, r in batches] == [4, 2]
    assert all(r.tokens.shape[1] <= 8 for _, r in batches)


def test_batch_size_changes_no_text(chatty):
    def texts(size, seed=0):
        return [text for _, responses in answers(chatty, size, seed) for text in said(responses)]

    assert texts(1) == texts(4) == texts(99)
    assert texts(1) != texts(1, seed=1)


def test_global_random_numbers_are_neither_read_nor_moved(chatty):
    one = said(answers(chatty, 9)[0][1])
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    try:
        before = torch.random.get_rng_state()
        assert said(answers(chatty, 9)[0][1]) == one
        assert torch.equal(torch.random.get_rng_state(), before)
    finally:
        torch.random.set_rng_state(state)


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


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [True, False])
def test_equal_prompts_are_read_once_and_answered_as_if_each_were_read(
    monkeypatch, precision, packed
):
    torch.manual_seed(0)
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96, "vocab_size": 300}
    policy = Policy(GPT2LMHeadModel(GPT2Config(**shape)).eval(), precision=precision)
    if not packed:
        policy.model.set_attn_implementation("sdpa")
    lengths = [40] * 4 + [31] * 4 + [40]  # the last equals the first, but not its neighbour
    texts = [list(range(10, 10 + n)) for n in lengths]
    prompts = left_pad(texts, 299, 40)
    read = []

    def called():
        settings = {"temperature": 1.0, "eos_token_id": list(range(0, 100)), "pad_token_id": 299}
        draws = uniforms(9, 12, generator(0, "draws"))
        hook = policy.model.base_model.register_forward_pre_hook(
            lambda _, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        found = sample(policy, prompts, draws, **settings)
        hook.remove()
        return found

    shared = called()
    assert read[:2] == [3, int((~torch.isin(shared.tokens[:, 0], torch.arange(100))).sum())]
    assert shared.mask.sum(-1).unique().numel() > 1  # some rows leave early
    monkeypatch.setattr(sampling, "SHARED", 10**9)
    read.clear()
    single = called()
    assert read[0] == 9
    for name in ("tokens", "mask", "finished"):
        assert torch.equal(getattr(shared, name), getattr(single, name))


def family(name):
    """A small model with one of the ways in which layers remember."""
    shape = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 96,
        "pad_token_id": 299,
    }
    torch.manual_seed(0)
    if name == "grouped queries":
        return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1)).eval()
    return MistralForCausalLM(
        MistralConfig(**shape, num_key_value_heads=2, sliding_window=16)
    ).eval()


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", ["grouped queries", "sliding window"])
def test_shared_prompts_change_no_bit_whatever_the_layers_remember(monkeypatch, name, adapted):
    policy = Policy(family(name))
    if adapted:
        start_adapter(policy, "policy", rank=4, alpha=8, seed=0)
        draws = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in policy.learnable().values():
                weight.normal_(0, 0.1, generator=draws)
    # Groups of several sizes, prompts of several lengths, as long as the context allows.
    groups = [(70, 5), (33, 1), (84, 8), (12, 3)]
    texts = [list(range(100, 100 + n)) for n, count in groups for _ in range(count)]
    prompts, draws = left_pad(texts, 299, 84), numbers(len(texts))
    ends = {"eos_token_id": list(range(0, 60)), "pad_token_id": 299}

    def called():
        return sample_with_logprobs(policy, prompts, draws, temperature=1.0, **ends)

    shared, of_shared = called()
    monkeypatch.setattr(sampling, "SHARED", 10**9)
    single, of_single = called()
    assert shared.mask.sum(-1).unique().numel() > 3
    assert torch.equal(shared.tokens, single.tokens)
    assert torch.equal(shared.mask, single.mask)
    assert torch.equal(of_shared, of_single)


def test_a_shared_prompt_needs_no_second_copy_of_what_the_layers_remember():
    body = Policy(family("grouped queries")).model.base_model
    memory = continuation(body, torch.ones(2, 40, dtype=torch.bool), 8)
    with torch.no_grad():
        memory.read(torch.arange(80).view(2, 40), torch.arange(40).expand(2, 40))
    memory.keep(torch.tensor([0, 0, 0, 1, 1]))
    buffers = [x for pair in memory._buffers.values() for x in pair]
    assert {x.shape for x in buffers} == {(5, 1, 48, 16)}
    places = [x.data_ptr() for x in buffers]
    kept = [x[:, :, :40].clone() for x in buffers]
    memory.keep(torch.tensor([0, 4, 2]))  # two texts have ended: one row moves, in place
    now = [x for pair in memory._buffers.values() for x in pair]
    assert [x.data_ptr() for x in now] == places
    for old, new in zip(kept, now, strict=True):
        assert torch.equal(new[:, :, :40], old[[0, 4, 2]])


@pytest.mark.parametrize("rows", [1, 4, 16, 40])
def test_logits_are_those_of_the_head(rows):
    policy = Policy(family("grouped queries"))
    hidden = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
    with torch.no_grad():
        found = policy.logits(hidden)
        exact = hidden.double() @ policy.model.lm_head.weight.double().T
    assert found.is_contiguous()
    assert_close(found, exact.float(), rtol=1e-5, atol=1e-6)
