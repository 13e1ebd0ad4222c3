"""Model directories, which one stage writes and another reads.

A model directory is a plain Hugging Face directory (safetensors, tokenizer), so `transformers`
loads it without this package, plus `rlhf.json` with the kind, the normaliser and the origin.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_core.backbone.pretrained import load_weights, quiet, read_pretrained
from rlhf_core.backbone.tokens import answer_plainly, complete
from rlhf_core.data.encoding import same_tokens
from rlhf_core.digests import content_digest
from rlhf_core.errors import ConfigError, ModelError
from rlhf_core.reading import MIB, read_whole

ModelKind = Literal["policy", "reward", "critic", "trunk"]  # trunk: of an ensemble's members
CARD = "rlhf.json"
_SCALE = ("reward_mean", "reward_std")


def load_policy(
    directory: Path, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A saved policy and its tokenizer, dropout off.

    Raises: ModelError when the directory holds no policy.
    """
    require_kind(directory, "policy")
    model = load_weights(AutoModelForCausalLM, str(directory)).to(device)
    return model, load_saved_tokenizer(directory)


def load_saved_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory.

    Raises: ModelError when there is none.
    """
    return complete(read_pretrained(AutoTokenizer, str(directory)), str(directory))


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    kind: ModelKind,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a model directory; `facts` go into `rlhf.json` beside the kind.

    The generation config of a policy lists all that ends a response, and nothing else that would
    change how it answers.

    A policy has the fact `chat`: whether it was trained to answer messages or to continue texts.
    """
    if kind == "policy":
        answer_plainly(model, tokenizer)
    with quiet():
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _write_card(directory, {"kind": kind, "dtype": str(model.dtype).removeprefix("torch.")})
    add_facts(directory, facts or {})


def add_facts(directory: Path, facts: Mapping[str, Any]) -> None:
    """Add facts to the card of a model directory."""
    _write_card(directory, {**read_card(directory), **facts})


def weights_digest(directory: Path) -> str:
    """SHA-256 of the weights in a model directory, by which an adapter identifies its base."""
    return content_digest(sorted(directory.glob("*.safetensors")))


def read_card(directory: Path) -> dict[str, Any]:
    """The card of a model directory, from `rlhf.json`.

    Raises: ModelError when it cannot be read, or does not say of which kind the model is.
    """
    try:
        card = json.loads(read_whole(directory / CARD, MIB))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{directory} is not a model directory of this pipeline: {CARD} cannot be read "
            f"({error}); name a folder that a stage wrote"
        ) from error
    if not isinstance(card, dict) or not isinstance(card.get("kind"), str):
        raise ModelError(
            f"{directory} is not a model directory of this pipeline: {CARD} does not name the kind "
            "of the model; name a folder that a stage wrote"
        )
    return card


def require_kind(directory: Path, *kinds: ModelKind) -> dict[str, Any]:
    """The card of a model directory, after checking what the directory holds."""
    card = read_card(directory)
    if card.get("kind") not in kinds:
        raise ModelError(
            f"{directory} holds a model of kind '{card.get('kind')}', but {' or '.join(kinds)} is "
            "needed"
        )
    if "policy" not in kinds and not all(map(_is_scale, map(card.get, _SCALE))):
        raise ModelError(
            f"{directory / CARD} is damaged: {' and '.join(_SCALE)} are not the mean and the "
            "spread of rewards; fetch or train the model again"
        )
    return card


def _is_scale(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def require_same_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path, role: str) -> None:
    """Raise ConfigError when the model in a directory was trained with another tokenizer."""
    if not same_tokens(tokenizer, load_saved_tokenizer(directory)):
        raise ConfigError(
            f"the {role} and the SFT policy have different tokenizers, so it would read noise; use "
            f"a {role} that was trained from this SFT policy, or train one"
        )


def _write_card(directory: Path, card: Mapping[str, Any]) -> None:
    (directory / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
