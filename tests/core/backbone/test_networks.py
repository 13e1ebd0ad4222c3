"""Policies and scalar models: what they say, against plain transformers on each text alone."""

import math
from functools import partial

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    T5Config,
    T5ForSequenceClassification,
)

from rlhf_core.backbone import networks
from rlhf_core.backbone.directory import load_policy, read_card, save_model, weights_digest
from rlhf_core.backbone.networks import ADAPTER, Policy, ScalarModel, load_as_adapter, start_adapter
from rlhf_core.backbone.packing import ATTENTION, pack, position_ids
from rlhf_core.backbone.precision import machine
from rlhf_core.backbone.sampling import sample
from rlhf_core.data.encoding import left_pad, right_pad
from rlhf_core.errors import ModelError, NumericsError
from rlhf_core.functional.logprobs import chunked_token_loss
from rlhf_core.settings.training import TrainingSection
from rlhf_core.training.learner import Learner
from rlhf_core.types import PromptBatch

TEXTS = [[20, 30, 40, 50, 60], [70, 80], [70, 80, 90, 100], [110, 120, 130]]
STARTS = torch.tensor([2, 1, 1, 3])  # nothing of the last text is predicted
TARGETS = 3 + 1 + 3
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def predictions(texts=TEXTS, starts=STARTS):
    packed = pack(texts, "cpu")
    return packed, *packed.predictions(starts)


def logprobs_alone(model, temperature=1.0):
    found = []
    for text, start in zip(TEXTS, STARTS, strict=True):
        logprobs = (model(torch.tensor([text])).logits[0] / temperature).log_softmax(-1)
        found += [logprobs[i - 1, text[i]] for i in range(start, len(text))]
    return torch.stack(found)


def scores_alone(model, mean=0.0, std=1.0, texts=TEXTS):
    """Of transformers' own sequence classifier, which reads the last token."""
    raw = torch.cat([model(torch.tensor([text])).logits[0] for text in texts])
    return (raw - mean) / std


def teach(network, seed=3):
    """Move whatever the network learns."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.learnable().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draws)


@pytest.fixture
def biased(llama):
    """A head with a bias."""
    head = torch.nn.Linear(*reversed(llama[0].lm_head.weight.shape))
    llama[0].set_output_embeddings(head)
    return llama[0]


# --- a policy ---


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "biased"])
def test_logprobs_and_their_gradient_are_those_of_each_text_alone(
    request, plain, family, temperature
):
    model = request.getfixturevalue(family)
    model = model if family == "biased" else model[0]
    eager = plain(model)
    ours = Policy(model)(*predictions(), temperature=temperature).logprobs
    theirs = logprobs_alone(eager, temperature)
    assert ours.shape == (TARGETS,)
    assert_close(ours, theirs, **CLOSE)
    weights = torch.linspace(-1, 2, TARGETS)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    expected = {name: p.grad for name, p in eager.named_parameters()}
    scale = max(g.abs().max() for g in expected.values())
    for name, p in model.named_parameters():
        assert_close(p.grad / scale, expected[name] / scale, rtol=0, atol=2e-6, msg=name)


def test_loss_of_tokens_has_the_gradient_of_the_whole(causal, plain):
    # -Σ w·logp + Σ logp², token by token: a loss that needs to know which tokens it is given.
    weights = torch.linspace(-1, 2, TARGETS)
    out = Policy(causal[0])(
        *predictions(),
        token_loss=lambda logprobs, i: (logprobs.square() - weights[i] * logprobs).sum(),
        with_entropy=True,
    )
    eager = plain(causal[0])
    theirs = logprobs_alone(eager)
    loss = (theirs.square() - weights * theirs).sum()
    assert_close(out.loss, loss, **CLOSE)
    assert_close(out.logprobs, theirs, **CLOSE)
    out.loss.backward()
    loss.backward()
    expected = {name: p.grad for name, p in eager.named_parameters()}
    scale = max(g.abs().max() for g in expected.values())
    for name, p in causal[0].named_parameters():
        assert_close(p.grad / scale, expected[name] / scale, rtol=0, atol=2e-6, msg=name)


@torch.no_grad()
def test_entropy_is_that_of_plain_logits(causal, plain):
    zero = lambda logprobs, _: 0 * logprobs.sum()  # noqa: E731
    out = Policy(causal[0])(*predictions(), temperature=0.7, token_loss=zero, with_entropy=True)
    eager, found = plain(causal[0]), []
    for text, start in zip(TEXTS, STARTS, strict=True):
        p = (eager(torch.tensor([text])).logits[0, start - 1 : -1] / 0.7).softmax(-1)
        found.append(-(p * p.log()).sum(-1))
    assert_close(out.entropy, torch.cat(found), **CLOSE)


@torch.no_grad()
def test_more_tokens_than_a_chunk_are_the_tokens_one_by_one(causal):
    policy = Policy(causal[0])
    texts = [[20 + i % 7, *range(30, 60), 100 + i] for i in range(12)]
    starts = torch.ones(12, dtype=torch.long)
    together = policy(*predictions(texts, starts)).logprobs
    assert len(together) > 256
    alone = [policy(*predictions([text], starts[:1])).logprobs for text in texts]
    assert_close(together, torch.cat(alone), **CLOSE)


SIZE = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": ATTENTION}
SCALED = {
    "multiplied": lambda: CohereForCausalLM(
        CohereConfig(**SIZE, **HEADS, **IDS, logit_scale=0.0625, initializer_range=1.0)
    ),
    "divided": lambda: GraniteForCausalLM(
        GraniteConfig(**SIZE, **HEADS, **IDS, logits_scaling=8.0, initializer_range=1.0)
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("make", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_head_with_a_factor_gives_the_logprobs_and_samples_of_the_plain_model(
    make, temperature, plain
):
    policy = Policy(make().eval())
    texts = [[3, 4, 5, 6, 7], [3, 4, 9, 8], [30, 31, 32]]
    starts = torch.tensor([2, 2, 1])
    out = policy(*predictions(texts, starts), temperature=temperature)
    eager = plain(policy.model)
    expected = []
    for text, start in zip(texts, starts.tolist(), strict=True):
        logits = eager(torch.tensor([text])).logits[0, start - 1 : -1] / temperature
        expected.append(logits.log_softmax(-1).gather(1, torch.tensor(text[start:])[:, None])[:, 0])
    assert_close(out.logprobs, torch.cat(expected), **CLOSE)
    prompt = PromptBatch(torch.tensor([texts[0]]), torch.ones(1, 5, dtype=torch.bool))
    draws = torch.rand(1, 6, generator=torch.Generator().manual_seed(2))
    said = sample(
        policy, prompt, draws, temperature=temperature, eos_token_id=-1, pad_token_id=0
    ).tokens[0]
    row = list(texts[0])
    for u, token in zip(draws[0], said, strict=True):  # the inverse of the distribution function
        sums = (eager(torch.tensor([row])).logits[0, -1] / temperature).softmax(-1).cumsum(-1)
        assert int(token) == int((sums <= u).sum())
        row.append(int(token))


def test_head_that_is_more_than_linear_is_refused():
    capped = Gemma2ForCausalLM(
        Gemma2Config(
            **SIZE,
            **HEADS,
            **IDS,
            head_dim=8,
            attn_logit_softcapping=None,
            final_logit_softcapping=2.0,
            initializer_range=1.0,
        )
    )
    with pytest.raises(ModelError, match="does more to its logits than a linear head"):
        Policy(capped.eval())


@pytest.mark.parametrize("field", ["logprobs", "entropy"])
def test_head_that_says_something_else_than_the_formulas_is_a_broken_invariant(
    causal, monkeypatch, field
):
    def wrong(*inputs, **options):
        out = chunked_token_loss(*inputs, **options)
        return out._replace(**{field: getattr(out, field) + 0.01})

    Policy(causal[0])
    monkeypatch.setattr(networks, "chunked_token_loss", wrong)
    with pytest.raises(NumericsError, match="different log-probabilities or entropies"):
        Policy(causal[0])


def test_policy_comes_back_from_disk(causal, tmp_path):
    policy, tokenizer = Policy(causal[0]), causal[1]
    policy.save(tokenizer, tmp_path, {"step": 3, "chat": False})
    loaded, its_tokenizer = Policy.load(tmp_path, "cpu")
    assert read_card(tmp_path) == {
        "kind": "policy", "dtype": "float32", "step": 3, "chat": False
    }  # fmt: skip
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()
    state = policy.model.state_dict()
    assert all(torch.equal(state[name], w) for name, w in loaded.model.state_dict().items())
    with torch.no_grad():
        expected = policy(*predictions()).logprobs
        assert_close(loaded(*predictions()).logprobs, expected, rtol=1e-6, atol=1e-6)
        assert_close(logprobs_alone(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


# --- a scalar model ---


def test_new_head_is_drawn_small_and_without_bias(saved):
    # N(0, 1/(d + 1)) with d = 32: over 50 heads the standard error of the standard deviation is
    # 1/√(2·1600) of it, below 2 %. That of transformers' own head, 0.02, is nine times smaller.
    draws = torch.Generator().manual_seed(0)
    heads = [ScalarModel.from_policy(saved, draws).head for _ in range(50)]
    weights = torch.cat([head.weight for head in heads])
    assert all(head.bias is None and head.weight.shape == (1, 32) for head in heads)
    assert abs(weights.std().item() * math.sqrt(33) - 1) < 0.07
    assert abs(weights.mean().item()) < 4 / math.sqrt(33 * weights.numel())


def test_head_depends_on_its_generator_alone(saved):
    one, two, other = (
        ScalarModel.from_policy(saved, torch.Generator().manual_seed(seed)).head.weight
        for seed in (5, 5, 6)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_trunk_of_a_scalar_model_is_that_of_the_policy(causal, saved):
    scalar = ScalarModel.from_policy(saved, torch.Generator())
    trunk = causal[0].base_model.state_dict()
    assert all(torch.equal(trunk[n], w) for n, w in scalar.model.base_model.state_dict().items())


def pad_right(rows):
    return right_pad(rows, 1)


def pad_left(rows):
    batch = left_pad(rows, 1, 99)
    return batch.input_ids, batch.mask


@pytest.mark.parametrize("pad", [pad_left, pad_right])
@torch.no_grad()
def test_score_is_the_normalised_logit_of_plain_transformers(scalar, causal, tmp_path, pad):
    scalar.save(causal[1], tmp_path / "reward", kind="reward")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert (classifier.config.reward_mean, classifier.config.reward_std) == (0.3, 0.5)
    ours = ScalarModel.load(tmp_path / "reward").scores(pack(TEXTS, "cpu"))
    assert_close(ours, scores_alone(classifier, 0.3, 0.5), **CLOSE)
    ids, mask = pad(TEXTS)
    together = classifier(ids, attention_mask=mask.long(), position_ids=position_ids(mask)).logits
    assert_close(ours, (together[:, 0] - 0.3) / 0.5, **CLOSE)


@torch.no_grad()
def test_value_of_a_place_is_the_score_of_the_text_up_to_it(scalar):
    packed = pack(TEXTS, "cpu")
    values = scalar(packed, torch.arange(packed.input_ids.shape[1]))
    for rows, text in zip(packed.unpack_index, TEXTS, strict=True):
        prefixes = [text[: end + 1] for end in range(len(text))]
        scores = torch.cat([scalar.scores(pack([prefix], "cpu")) for prefix in prefixes])
        assert_close(values[rows[: len(text)]], scores, **CLOSE)


def test_scalar_model_comes_back_from_disk(scalar, causal, tmp_path):
    scalar.save(causal[1], tmp_path / "critic", kind="critic")
    assert read_card(tmp_path / "critic") == {
        "kind": "critic",
        "dtype": "float32",
        "reward_mean": 0.3,
        "reward_std": 0.5,
    }
    with torch.no_grad():
        loaded = ScalarModel.load(tmp_path / "critic").scores(pack(TEXTS, "cpu"))
        assert torch.equal(loaded, scalar.scores(pack(TEXTS, "cpu")))


@torch.no_grad()
def test_twin_says_the_same_until_one_of_them_learns(scalar):
    twin = scalar.with_own_head()
    before = scalar.scores(pack(TEXTS, "cpu"))
    assert torch.equal(twin.scores(pack(TEXTS, "cpu")), before)
    twin.head.weight *= 2
    assert torch.equal(scalar.scores(pack(TEXTS, "cpu")), before)
    assert not torch.allclose(twin.scores(pack(TEXTS, "cpu")), before)


def test_model_without_a_scalar_head_is_refused():
    size = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 9}
    t5 = T5ForSequenceClassification(T5Config(**size, decoder_start_token_id=0, eos_token_id=1))
    with pytest.raises(ModelError, match="use a decoder-only model"):
        ScalarModel(t5)


def test_policy_in_place_of_a_reward_model(saved):
    with pytest.raises(ModelError, match="kind 'policy', but reward or critic is needed"):
        ScalarModel.load(saved)


def test_reward_model_in_place_of_a_policy(scalar, causal, tmp_path):
    scalar.save(causal[1], tmp_path / "reward", kind="reward")
    for load in (load_policy, partial(Policy.load, device="cpu")):
        with pytest.raises(ModelError, match="kind 'reward', but policy is needed"):
            load(tmp_path / "reward")
    with pytest.raises(ModelError, match="kind 'reward', but policy is needed"):
        ScalarModel.from_policy(tmp_path / "reward", torch.Generator())


# --- adapters ---

LORA = {"rank": 2, "alpha": 8, "seed": 1}
# peft 0.19 reads a property that transformers 5.17 has renamed; we do not call this class ourselves
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@torch.no_grad()
def test_reference_with_adapters_off_is_the_base_to_the_bit(causal):
    policy, reference = Policy(causal[0]), Policy(causal[0])
    before = reference(*predictions()).logprobs
    start_adapter(policy, "policy", **LORA)
    assert torch.equal(policy(*predictions()).logprobs, before)  # and KL is 0 at step 0
    teach(policy)
    assert not torch.allclose(policy(*predictions()).logprobs, before, atol=1e-2)
    assert torch.equal(reference(*predictions()).logprobs, before)


@PEFT_WARNS
def test_saved_policy_has_the_logits_of_its_adapter_in_all_three_ways(causal, saved, tmp_path):
    policy = Policy(causal[0])
    start_adapter(policy, "policy", **LORA)
    teach(policy)
    policy.save(causal[1], tmp_path / "lora", {"chat": False}, base=saved)
    assert read_card(tmp_path / "lora")[ADAPTER] == weights_digest(saved)
    plain = AutoModelForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        expected = policy(*predictions()).logprobs
        merged, _ = Policy.load(tmp_path / "lora", "cpu")
        assert_close(merged(*predictions()).logprobs, expected, **CLOSE)
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "lora")
        assert_close(logprobs_alone(whole), expected, **CLOSE)
        peft = PeftModel.from_pretrained(plain, tmp_path / "lora" / ADAPTER)
        assert_close(logprobs_alone(peft), expected, **CLOSE)
        # Saving leaves the policy as it was, to go on learning.
        assert torch.equal(policy(*predictions()).logprobs, expected)


@pytest.fixture
def lora_reward(saved, causal, tmp_path):
    """A reward model that was trained as an adapter of the saved policy, and where it is."""
    reward = ScalarModel.from_policy(saved, torch.Generator().manual_seed(1))
    start_adapter(reward, "reward", **LORA)
    teach(reward)
    reward.mean, reward.std = -0.2, 1.5
    reward.save(causal[1], tmp_path / "reward", kind="reward", base=saved)
    return reward, tmp_path / "reward"


@torch.no_grad()
def test_reward_model_on_a_trunk_says_what_it_says_alone(lora_reward, saved, causal):
    reward, directory = lora_reward
    expected = reward.scores(pack(TEXTS, "cpu"))
    alone = ScalarModel.load(directory)
    assert_close(alone.scores(pack(TEXTS, "cpu")), expected, **CLOSE)
    classifier = AutoModelForSequenceClassification.from_pretrained(directory)
    assert_close(scores_alone(classifier, -0.2, 1.5), expected, **CLOSE)

    policy = Policy(causal[0])
    before = policy(*predictions()).logprobs
    found = load_as_adapter(directory, saved, policy.model, "reward", "float32")
    assert found.model is policy.model
    assert (found.mean, found.std) == (-0.2, 1.5)
    assert_close(found.scores(pack(TEXTS, "cpu")), expected, **CLOSE)
    assert torch.equal(policy(*predictions()).logprobs, before)


def test_reward_model_of_another_base_is_not_put_on_a_trunk(
    lora_reward, scalar, causal, tmp_path, saved
):
    teach(Policy(causal[0]))
    save_model(*causal, tmp_path / "other", kind="policy")
    assert (
        load_as_adapter(lora_reward[1], tmp_path / "other", causal[0], "reward", "float32") is None
    )
    scalar.save(causal[1], tmp_path / "whole", kind="reward")  # no adapter at all
    assert load_as_adapter(tmp_path / "whole", saved, causal[0], "reward", "float32") is None


def four_on_one_trunk(lora_reward, saved, model):
    policy = Policy(model)
    start_adapter(policy, "policy", **LORA)
    reward, critic = (
        load_as_adapter(lora_reward[1], saved, model, name, "float32")
        for name in ("reward", "critic")
    )
    return {"policy": policy, "reference": Policy(model), "reward": reward, "critic": critic}


def told(networks):
    with torch.no_grad():
        return {
            name: network(*predictions()).logprobs
            if isinstance(network, Policy)
            else network.scores(pack(TEXTS, "cpu"))
            for name, network in networks.items()
        }


@pytest.mark.parametrize("learning", ["policy", "critic"])
def test_what_one_network_of_a_trunk_learns_the_others_do_not(lora_reward, saved, causal, learning):
    networks = four_on_one_trunk(lora_reward, saved, causal[0])
    before = told(networks)
    learner = Learner(networks[learning], TrainingSection(learning_rate=0.1), 5)
    if learning == "policy":
        learner.backward(-learner(*predictions()).logprobs.sum(), "it")
    else:
        packed = pack(TEXTS, "cpu")
        learner.backward(learner(packed, packed.last()).square().sum(), "it")
    learner.step()
    after = told(networks)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {learning}


def network_of(kind, causal, saved, adapter):
    network = (
        Policy(causal[0])
        if kind == "policy"
        else ScalarModel.from_policy(saved, torch.Generator().manual_seed(0))
    )
    if adapter:
        start_adapter(network, "mine", **LORA)
        teach(network)  # B = 0 would leave A without a gradient
    return network


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("kind", ["policy", "scalar"])
def test_learnable_is_exactly_what_training_changes(causal, saved, kind, adapter):
    network = network_of(kind, causal, saved, adapter)
    learnable = network.learnable()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    learner = Learner(network, TrainingSection(learning_rate=0.1), 5)
    packed, positions, tokens = predictions()
    said = (
        learner(packed, positions, tokens).logprobs
        if kind == "policy"
        else learner(packed, positions)
    )
    learner.backward(said.square().sum(), "it")
    learner.step()
    changed = {id(p) for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {id(p) for p in learnable.values()}
    if adapter:
        heads = int(kind == "scalar")
        assert len([name for name in learnable if ".lora_" in name]) == len(learnable) - heads


# --- bfloat16 ---


@pytest.mark.parametrize("kind", ["policy", "scalar"])
def test_bfloat16_stays_close_and_keeps_its_weights_in_float32(causal, saved, kind):
    network = network_of(kind, causal, saved, adapter=False)
    packed, positions, tokens = predictions()

    def say():
        out = network(packed, positions, tokens) if kind == "policy" else network(packed, positions)
        return out.logprobs if kind == "policy" else out

    exact = say()
    network.precision = "bfloat16"
    rounded = say()
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert_close(rounded, exact, rtol=0.02, atol=0.02)  # bfloat16 keeps 8 bits
    rounded.sum().backward()
    for name, p in network.learnable().items():
        assert p.dtype == p.grad.dtype == torch.float32, name
        assert p.grad.isfinite().all()


@pytest.mark.parametrize("with_loss", [False, True])
def test_bfloat16_is_as_exact_as_plain_transformers_under_autocast(causal, plain, with_loss):
    eager = plain(causal[0])
    weights = torch.linspace(-1, 2, TARGETS)

    def ours(precision):
        loss = {"token_loss": lambda x, i: (weights[i] * x).sum()} if with_loss else {}
        causal[0].zero_grad()
        out = Policy(causal[0], precision=precision)(*predictions(), **loss)
        (out.loss if with_loss else (out.logprobs * weights).sum()).backward()
        return out.logprobs.detach(), {n: p.grad for n, p in causal[0].named_parameters()}

    exact, exact_gradient = ours("float32")
    found, gradient = ours("bfloat16")
    theirs = []
    for text, start in zip(TEXTS, STARTS, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            logits = eager(torch.tensor([text])).logits[0]
        assert logits.dtype == torch.bfloat16
        logprobs = logits.float().log_softmax(-1)
        theirs += [logprobs[i - 1, text[i]] for i in range(start, len(text))]
    theirs = torch.stack(theirs)
    (theirs * weights).sum().backward()
    expected = {n: p.grad for n, p in eager.named_parameters()}

    def apart(one, other):
        whole = [torch.cat([g[name].flatten() for name in exact_gradient]) for g in (one, other)]
        return ((whole[0] - whole[1]).norm() / whole[1].norm()).item()

    assert 0 < (found - exact).abs().max() < 0.02
    assert_close(found, theirs.detach(), rtol=0, atol=0.02)
    assert 0 < apart(gradient, exact_gradient) < 0.02
    assert apart(gradient, exact_gradient) < 1.5 * apart(expected, exact_gradient)
    assert {g.dtype for g in gradient.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("capabilities", "slow"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False}, True),
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": True}, False),
        ({"architecture": "x86_64", "amx_bf16": True}, False),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, False),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, True),
    ],
)
def test_bfloat16_on_a_cpu_without_it_is_said_once(causal, monkeypatch, caplog, capabilities, slow):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    for precision, times in (("float32", 0), ("bfloat16", int(slow))):
        machine.warn_if_slow.cache_clear()
        policy = Policy(causal[0], precision=precision)
        for _ in range(2):
            policy(*predictions())
        said = [record.message for record in caplog.records]
        assert len(said) == times
    machine.warn_if_slow.cache_clear()
    assert all("this CPU has no instructions for it" in line for line in said)


def test_precision_goes_with_the_network_into_loading(saved, scalar, causal, tmp_path):
    scalar.save(causal[1], tmp_path / "reward", kind="reward")
    assert Policy.load(saved, "cpu", "bfloat16")[0].precision == "bfloat16"
    assert ScalarModel.load(tmp_path / "reward", precision="bfloat16").precision == "bfloat16"
