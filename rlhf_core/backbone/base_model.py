"""The model that fine-tuning starts from: a pretrained one, or a small fresh one."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf_core.backbone.directory import load_saved_tokenizer, read_card
from rlhf_core.backbone.packing import ATTENTION
from rlhf_core.backbone.pretrained import load_weights, read_pretrained, with_one_kernel_gelu
from rlhf_core.backbone.tokens import answer_plainly, complete
from rlhf_core.data.encoding import PAD_TOKEN
from rlhf_core.errors import ModelError
from rlhf_core.settings.model import FreshModelConfig, ModelConfig

BASE = "base"  # the entry of a card for what a model was fine-tuned from
LONGEST_WORD = 1_000  # characters; a word is what the pre-tokenizer does not split
_ENDLESS = re.compile(rf"\S{{{LONGEST_WORD},}}|\s{{{LONGEST_WORD},}}")


def load_base(
    config: ModelConfig, corpus: Iterable[str], seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to fine-tune, in float32, and its tokenizer.

    `corpus` trains the tokenizer of a fresh model and is not read otherwise.

    Raises: ModelError when the source cannot be found, reached or read.
    """
    tokenizer = load_tokenizer(config, corpus)
    return base_for(config, tokenizer, seed), tokenizer


def base_for(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The model to fine-tune, in float32, for a tokenizer that `load_tokenizer` made.

    Raises: ModelError when the source cannot be found, reached or read.
    """
    if not config.source:
        with torch.random.fork_rng(devices=[]):  # leave the caller's random state unchanged
            torch.manual_seed(seed)
            return _fresh_model(config.fresh, len(tokenizer), **_ends(tokenizer))
    model = load_weights(AutoModelForCausalLM, config.source, config.revision)
    _make_room(model, len(tokenizer))
    # If the model came with pad = EOS, the EOS embedding would get no gradient.
    model.get_input_embeddings().padding_idx = None
    answer_plainly(model, tokenizer)
    for settings in (model.config, model.config.get_text_config(decoder=True)):
        settings.pad_token_id = tokenizer.pad_token_id
        settings.eos_token_id = tokenizer.eos_token_id
    return model


def base_facts(config: ModelConfig, seed: int) -> dict[str, Any]:
    """What the card of a fine-tuned model says of its base, for `base_of`."""
    return {BASE: {"model": config.model_dump(mode="json"), "seed": seed}}


def base_of(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that a fine-tuned one started from, and the tokenizer that both use.

    Raises: ModelError when its card does not say which model that was, or it cannot be loaded.
    """
    facts: Any = read_card(directory).get(BASE)
    try:
        config, seed = ModelConfig.model_validate(facts["model"]), int(facts["seed"])
    except (TypeError, KeyError, ValueError, ValidationError) as error:
        raise ModelError(
            "the SFT policy does not say which model it started from; it was trained by an older "
            "version"
        ) from error
    tokenizer = load_saved_tokenizer(directory)
    return base_for(config, tokenizer, seed), tokenizer


def outline(config: ModelConfig, vocabulary: int) -> PreTrainedModel:
    """The model to fine-tune without its weights, on the device meta: for counting parameters.

    Only the config of a hub model is fetched. `vocabulary` is the size of the tokenizer.

    Raises: ModelError when the source cannot be found, reached or built.
    """
    with torch.device("meta"):
        if not config.source:
            return _fresh_model(config.fresh, vocabulary)
        found = read_pretrained(AutoConfig, config.source, config.revision)
        try:
            model = AutoModelForCausalLM.from_config(found)
        except (ValueError, ImportError) as error:
            raise ModelError(
                f"the model '{config.source}' cannot be built ({str(error).splitlines()[0]}); take "
                "a decoder-only model that transformers supports without extra code"
            ) from error
        _make_room(model, vocabulary)
        return cast(PreTrainedModel, model)


def load_tokenizer(config: ModelConfig, corpus: Iterable[str]) -> PreTrainedTokenizerBase:
    """The tokenizer, with an end-of-sequence token, a separate pad token and a chat template.

    Raises: ModelError when the source cannot be found or has no end-of-sequence token.
    """
    if config.source:
        tokenizer = read_pretrained(AutoTokenizer, config.source, config.revision)
    else:
        tokenizer = _train_tokenizer(config.fresh, corpus)
    return complete(tokenizer, config.source)


def _ends(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}


def _fresh_model(config: FreshModelConfig, vocabulary: int, **token_ids: int) -> PreTrainedModel:
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=config.context,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            **{"bos_token_id": None, "eos_token_id": None, **token_ids},
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation=ATTENTION,
        )
    )
    return with_one_kernel_gelu(model).eval()


def _train_tokenizer(config: FreshModelConfig, corpus: Iterable[str]) -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=["<|end|>", PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = _without_endless_words(corpus, tokenizer.pre_tokenizer)
    tokenizer.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token=PAD_TOKEN
    )


def _without_endless_words(
    corpus: Iterable[str], splitter: pre_tokenizers.PreTokenizer
) -> Iterator[str]:
    """The corpus, in which a word of more than `LONGEST_WORD` characters is several.

    Training takes time quadratic in the length of a word, and a text without spaces may be one.
    """
    for text in corpus:
        if not _ENDLESS.search(text):
            yield text
            continue
        for _, (start, end) in splitter.pre_tokenize_str(text):
            for begin in range(start, end, LONGEST_WORD):
                yield text[begin : min(begin + LONGEST_WORD, end)]


def _make_room(model: PreTrainedModel, vocab_size: int) -> None:
    """Grow the embeddings for added tokens, each new row the mean of the old ones.

    A random row would give logits near 0 where those of GPT-2 are below -30, so every sample would
    be the pad token.
    """
    old = model.get_input_embeddings().weight.shape[0]
    if vocab_size <= old:
        return
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[old:] = layer.weight[:old].mean(0)
