"""Complete a tokenizer so that a policy can be trained with it."""

from transformers import PreTrainedTokenizerBase

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
