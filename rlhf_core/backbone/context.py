"""How long a text a model reads, and whether what a setting asks for fits."""

from transformers import PreTrainedModel

from rlhf_core.errors import ConfigError

SAMPLING_LENGTH = "sampling.max_prompt_length + max_new_tokens"  # the settings of `max_length`


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
