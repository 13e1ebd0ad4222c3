"""Small models with random weights of many families, and what plain transformers computes for them.

`examine` compares a family with plain transformers, eager attention, one text at a time. Its rows
are the table in docs/models.md, which `docs/generate_families.py` writes and `test_families.py`
checks.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from rlhf_core.backbone.adapters import adapted_from, adapter_parameters
from rlhf_core.backbone.directory import save_model
from rlhf_core.backbone.networks import Policy, ScalarModel, start_adapter
from rlhf_core.backbone.packing import ATTENTION, pack, shared_states
from rlhf_core.backbone.sampling import sample
from rlhf_core.data.encoding import left_pad
from rlhf_core.errors import UserError

VOCABULARY, PAD, BEGIN, END = 300, 0, 1, 2
CLOSE = 1e-3  # nats, or the unit of a score; a wrong mask is off by 0.1 and more

# What makes a config small, where a family has the setting. Windows are shorter than the texts.
SMALL = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(["hidden_size", "d_model", "n_embd"], 64),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"], 96),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers", "n_layers"], 4),
    **dict.fromkeys(
        ["num_attention_heads", "n_head", "num_heads", "attention_heads", "n_heads"], 4
    ),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["max_position_embeddings", "n_positions"], 256),
    "head_dim": 16,
    "rotary_dim": 8,
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    "num_experts_per_tok": 2,
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 32),
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace"], 1),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "v_head_dim", "qk_nope_head_dim"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "index_topk"], 8),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], 16),
}
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}  # multi-head latent attention
_WINDOW = {"sliding_window": 8}
_MAMBA = {
    "mamba_d_state": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 128,
    "mamba_chunk_size": 8,
}

# Each family with the settings that `SMALL` does not make small, or that make a trait visible.
FAMILIES: dict[str, dict] = {
    "afmoe": _WINDOW,
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {**_WINDOW, "logit_scale": 0.25},
    "ctrl": {"dff": 96},
    "cwm": _WINDOW,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "diffllama": {},
    "doge": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {**_WINDOW, "sliding_window_pattern": 2},
    "falcon": {"alibi": False},
    "falcon_h1": _MAMBA,
    "flex_olmo": {},
    "gemma": {},
    "gemma2": _WINDOW,
    "gemma3": {
        "text_config": {**SMALL, **_WINDOW},
        "vision_config": {
            **dict.fromkeys(["hidden_size", "intermediate_size"], 32),
            **dict.fromkeys(["num_hidden_layers", "num_attention_heads"], 4),
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        **{"image_token_index": 3, "boi_token_index": 4, "eoi_token_index": 5},
    },
    "gemma3_text": _WINDOW,
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gpt_neox": {},
    "gpt_oss": _WINDOW,
    "gptj": {},
    "granite": {
        "logits_scaling": 4.0,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.5,
    },
    "granitemoe": {"logits_scaling": 4.0},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "jetmoe": {},
    "lfm2": {"full_attn_idxs": [1, 3]},
    "llama": {},
    "llama4_text": {"attention_chunk_size": 8, "intermediate_size_mlp": 96},
    "mamba": {},
    "minimax_m2": {},
    "ministral": _WINDOW,
    "ministral3": {},
    "mistral": _WINDOW,
    "mixtral": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": _WINDOW,
    "olmo_hybrid": {},
    "olmoe": {},
    "opt": {"word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {"use_sliding_window": True, **_WINDOW, "max_window_layers": 2},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_text": {"full_attention_interval": 2},
    "qwen3_moe": {},
    "qwen3_next": {"full_attention_interval": 2},
    "recurrent_gemma": {"attention_window_size": 8, "lru_width": 64},
    "rwkv": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": _WINDOW,
    "xglm": {},
}

_draws = torch.Generator().manual_seed(1)


def _ids(number: int) -> list[int]:
    return torch.randint(6, VOCABULARY, (number,), generator=_draws).tolist()


_PROMPT = _ids(12)
TEXTS = [_PROMPT + _ids(5), _PROMPT + _ids(14), _PROMPT + _ids(9), _ids(20)]
STARTS = torch.tensor([12, 12, 12, 6])
ANSWER = 8  # tokens that are sampled


class Row(NamedTuple):
    """What works for a family; text that starts with a word of `docs/models.md`."""

    family: str
    computed: str
    policy: str
    reward_model: str
    adapters: str


def build(family: str):
    """A small model of a family with weights large enough for every part to count."""
    options = FAMILIES[family]
    if "text_config" not in options:
        default = AutoConfig.for_model(family)
        read_only = {k for k in SMALL if isinstance(getattr(type(default), k, None), property)}
        known = {k: v for k, v in SMALL.items() if hasattr(default, k) and k not in read_only}
        options = known | options
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options)).eval()
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.fill_(1.0)
            elif parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    return model


def examine(family: str, tokenizer, folder: Path) -> Row:
    """Compare everything that a pipeline does with a family to plain transformers."""
    save_model(build(family), tokenizer, folder / "model", kind="policy", facts={"chat": False})
    try:
        policy, _ = Policy.load(folder / "model", "cpu")
    except UserError as error:
        return Row(family, "", f"refused: {_reason(error)}", "", "")
    attention = policy.model.config._attn_implementation
    computed = "packed" if attention == ATTENTION else f"padded, {attention}"
    return Row(
        family,
        computed,
        _policy(policy, folder / "model"),
        _reward_model(folder / "model", tokenizer, folder / "reward"),
        _adapters(policy, tokenizer, folder / "adapted"),
    )


@torch.no_grad()
def _policy(policy: Policy, folder: Path) -> str:
    plain = _plain(folder)
    _require(_logprobs(policy), _plain_logprobs(plain))
    rows = [TEXTS[0], TEXTS[3][:7]]
    said = sample(
        policy,
        left_pad(rows, PAD, 64),
        torch.zeros(2, ANSWER),
        temperature=0,
        eos_token_id=-1,
        pad_token_id=PAD,
    )
    for row, answer in zip(rows, said.tokens.tolist(), strict=True):
        text = list(row)
        for _ in range(ANSWER):
            logits = plain(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
            text.append(int(logits.argmax()))
        assert answer == text[len(row) :]
    return "yes"


@torch.no_grad()
def _reward_model(folder: Path, tokenizer, saved: Path) -> str:
    try:
        scalar = ScalarModel.from_policy(folder, torch.Generator().manual_seed(0))
    except UserError as error:
        return f"refused: {_reason(error)}"
    scores = scalar.scores(pack(TEXTS, "cpu"))
    scalar.save(tokenizer, saved, kind="reward")
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    if scalar.model.config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        plain = AutoModelForSequenceClassification.from_pretrained(saved, **options).eval()
        rows = [plain(input_ids=torch.tensor([t]), use_cache=False).logits[0] for t in TEXTS]
        _require(scores, torch.cat(rows))
        return "yes"
    plain_body = AutoModel.from_pretrained(saved, **options).eval()
    for body in (plain_body, _plain(folder).base_model):  # what is saved, and what it stands on
        last = [body(torch.tensor([t]), use_cache=False).last_hidden_state[0, -1] for t in TEXTS]
        _require(scores, torch.stack(last) @ scalar.head.weight[0])
    (head,) = (f["score.weight"] for f in map(load_file, saved.glob("*.safetensors")))
    assert torch.equal(head, scalar.head.weight)
    _require(ScalarModel.load(saved).scores(pack(TEXTS, "cpu")), scores)
    return "body and `score.weight`"


def _adapters(policy: Policy, tokenizer, folder: Path) -> str:
    """Adapters in the upper two blocks, and what lies below computed once."""
    start_adapter(policy, "lora", rank=2, alpha=4, seed=0, layers=2)
    learnt = adapter_parameters(policy.model, "lora")
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in learnt.values():
            parameter.normal_(0, 0.3, generator=draws)
        logprobs = _logprobs(policy)
        if depth := adapted_from(policy.model):
            packed = pack(TEXTS, "cpu")
            below = shared_states(policy.model.base_model, packed, depth)
            packed = replace(packed, shared=below)
            _require(policy(packed, *packed.predictions(STARTS)).logprobs, logprobs)
        policy.save(tokenizer, folder, {"chat": False})
        _require(logprobs, _plain_logprobs(_plain(folder)))
    return "without the experts" if _has_experts(policy) else "yes"


def _has_experts(policy: Policy) -> bool:
    return any("experts" in name for name, _ in policy.model.named_parameters())


def _logprobs(policy: Policy) -> torch.Tensor:
    packed = pack(TEXTS, "cpu")
    return policy(packed, *packed.predictions(STARTS)).logprobs


def _plain(folder: Path):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def _plain_logprobs(plain) -> torch.Tensor:
    found = []
    for text, start in zip(TEXTS, STARTS.tolist(), strict=True):
        logits = plain(input_ids=torch.tensor([text]), use_cache=False).logits[0]
        said = torch.tensor(text[start:]).unsqueeze(1)
        found.append(logits.log_softmax(-1)[start - 1 : -1].gather(1, said).squeeze(1))
    return torch.cat(found)


def _require(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=CLOSE)


def _reason(error: UserError) -> str:
    """The reason of a refusal, in the words of the table."""
    message = str(error)
    for part, reason in {
        "does more to its logits": "its logits are more than a linear head times a factor",
        "without its head": "its body cannot be called without its head",
        "classifier.weight is missing": "its classifier in transformers has no linear head `score`",
        "no attribute 'past_key_values'": "it has no cache of transformers' own kind",
    }.items():
        if part in message:
            return reason
    return message
