"""Complete a tokenizer so that a policy can be trained with it, and find what ends a response."""

from collections.abc import Iterable

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.data.chat_tokens import end_of_turn
from rlhf_core.data.encoding import PAD_TOKEN, PLAIN_CHAT_TEMPLATE
from rlhf_core.errors import ModelError


def complete(tokenizer: PreTrainedTokenizerBase, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer with a separate pad token and a chat template.

    Raises: ModelError naming the source when it is damaged, has no vocabulary or no end-of-sequence
        token.
    """
    try:
        ids = tokenizer("a", add_special_tokens=False).input_ids
        tokenizer.decode(ids)
    except Exception as error:  # its files can say anything, and are believed
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the tokenizer of '{source}' is damaged ({reason}); get its files from where the "
            "model came from"
        ) from error
    if not ids:
        raise ModelError(
            f"the tokenizer of '{source}' has no vocabulary: its tokenizer.json is missing "
            "or empty; get that file from where the model came from"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of '{source}' has no end-of-sequence token, so no "
            "response could ever end; use a model whose tokenizer_config.json names an eos_token"
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # With pad = EOS, the end of a response would look like padding.
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_CHAT_TEMPLATE
    return tokenizer


def ending_ids(model: PreTrainedModel) -> list[int]:
    """The tokens that end a response of a policy, in order: those of its generation config, as in
    transformers, and that of its config."""
    settings = (model.generation_config, model.config)
    return sorted({n for each in settings for n in _ids(getattr(each, "eos_token_id", None))})


def answer_plainly(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Reduce a policy's generation config to what makes it answer as it does here.

    A response ends with any token that ended one before, with the tokenizer's end of sequence, or
    with the template's end of a turn. Penalties, filters and temperatures of the base model go:
    they are no part of the distribution that is trained and evaluated.
    """
    ends = sorted({*ending_ids(model), tokenizer.eos_token_id, end_of_turn(tokenizer)})
    bos = getattr(model.config, "bos_token_id", None)
    model.generation_config = GenerationConfig(
        bos_token_id=bos,
        eos_token_id=ends[0] if len(ends) == 1 else ends,
        pad_token_id=tokenizer.pad_token_id,
    )


def _ids(value: int | Iterable[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
