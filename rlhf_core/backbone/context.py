"""The longest text a model can read, and a check that the configured lengths fit."""

from transformers import PreTrainedModel

from rlhf_core.errors import ConfigError

SAMPLING_LENGTH = "sampling.max_prompt_length + max_new_tokens"  # the settings of `max_length`


def context_of(model: PreTrainedModel) -> int | None:
    """The longest text that the model can read (tokens); None when there is no limit."""
    return getattr(model.config, "max_position_embeddings", None)


def require_context(model: PreTrainedModel, tokens: int, setting: str) -> None:
    """Raise ConfigError naming the setting when texts of this length do not fit the context."""
    context = context_of(model)
    if context is not None and tokens > context:
        raise ConfigError(
            f"{setting} asks for texts of {tokens} tokens, but the model reads at most {context}; "
            f"lower {setting}, or take a model with a longer context"
        )
