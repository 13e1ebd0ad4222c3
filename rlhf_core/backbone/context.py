"""The longest text a model can read, and a check that the configured lengths fit."""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from rlhf_core.errors import ConfigError

SAMPLING_LENGTH = "sampling.max_prompt_length + max_new_tokens"  # the settings of `max_length`


def context_of(model: PreTrainedModel) -> int | None:
    """The longest text that the model can read (tokens); None when there is no limit."""
    text = model.config.get_text_config(decoder=True)
    limits = [getattr(text, "max_position_embeddings", None), rope_limit(model.config)]
    return min((limit for limit in limits if limit), default=None)


def require_context(model: PreTrainedModel, tokens: int, setting: str) -> None:
    """Raise ConfigError naming the setting when texts of this length do not fit the context."""
    context = context_of(model)
    if context is not None and tokens > context:
        because = " (beyond that, its rope depends on the other texts)" * (
            context == rope_limit(model.config)
        )
        raise ConfigError(
            f"{setting} asks for texts of {tokens} tokens, but the model reads at most {context}"
            f"{because}; lower {setting}, or take a model with a longer context"
        )


def rope_limit(config: PreTrainedConfig) -> int | None:
    """The length beyond which rotary positions depend on the longest text computed together.

    None when they never do. The types longrope and dynamic choose their frequencies anew for a
    longer text, for all of its tokens, so that neither texts computed together nor keys that were
    computed earlier would be right.
    """
    text = config.get_text_config(decoder=True)
    limits = [
        rope.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or text.max_position_embeddings
        for rope in _ropes(getattr(text, "rope_parameters", None))
        if rope.get("rope_type") == "longrope" or "dynamic" in rope.get("rope_type", "")
    ]
    return min(limits, default=None)


def require_rope(config: PreTrainedConfig, tokens: int) -> None:
    """Raise ConfigError when texts of this length would change each other's positions."""
    limit = rope_limit(config)
    if limit is not None and tokens > limit:
        raise ConfigError(
            f"a text of {tokens} tokens is too long: beyond {limit} tokens the rope of "
            f"{config.model_type} depends on the longest text that is computed with it; lower the "
            "longest texts in the config (max_length, max_prompt_length + max_new_tokens)"
        )


def _ropes(parameters: Any) -> Iterator[dict[str, Any]]:
    """The rope parameters of a config: one set, or one for each type of layer."""
    if isinstance(parameters, dict):
        if "rope_type" in parameters:
            yield parameters
        for nested in parameters.values():
            yield from _ropes(nested)
