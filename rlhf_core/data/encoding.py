"""Encode text as tokens, in the same way in every stage. Knows tokenizers, but not models.

A training text is `prompt tokens + response tokens + end of sequence`. Prompt and response are
tokenised separately, so that a policy is prompted with exactly the tokens it was trained on.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_core.data.templates import within_limits
from rlhf_core.errors import DataError
from rlhf_core.types import PromptBatch

Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = str | list[Message]

PAD_TOKEN = "<|pad|>"

# For tokenizers without a template: the plain dialogue format of the HH-RLHF data.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
    "{% else %}{{ '\\n\\nAssistant: ' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)


def render_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that a policy continues: a string as it is, messages through the chat template.

    Raises: DataError when the template rejects the messages.
    """
    if isinstance(prompt, str):
        return prompt
    template = None if tokenizer.chat_template else PLAIN_CHAT_TEMPLATE
    try:
        with within_limits(str(tokenizer.chat_template or PLAIN_CHAT_TEMPLATE), prompt):
            rendered = tokenizer.apply_chat_template(
                prompt, chat_template=template, tokenize=False, add_generation_prompt=True
            )
    except Exception as error:  # a template is code of the model's, which may fail in any way
        start = "; ".join(f"{m['role']}: {m['content'][:40]}" for m in prompt[:3])
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(
            f"the model's chat template rejects the messages ({start} ...): {reason}; fix these "
            "rows, or leave them out"
        ) from error
    return str(rendered)


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Prompt tokens, with one begin-of-sequence token if the tokenizer uses it."""
    ids: list[int] = tokenizer(render_prompt(prompt, tokenizer), add_special_tokens=False).input_ids
    bos = tokenizer.bos_token_id
    uses_bos = bos is not None and tokenizer("").input_ids[:1] == [bos]
    return [bos, *ids] if uses_bos and ids[:1] != [bos] else ids


def encode_response(response: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Response tokens, ending with the end-of-sequence token."""
    ids: list[int] = tokenizer(response, add_special_tokens=False).input_ids
    return [*ids, tokenizer.eos_token_id]


def encode_pair(
    prompt: Prompt, response: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[int], int, bool]:
    """Tokens of prompt and response, at most `max_length` of them.

    A text that is too long is cut at the end of its response. If the prompt leaves the response
    less than half of `max_length`, the prompt is cut at its start as well.

    Returns: the tokens, how many of them belong to the prompt, and whether anything was cut.
    """
    if not isinstance(prompt, str) and tokenizer.chat_template in (None, PLAIN_CHAT_TEMPLATE):
        response = " " + response.lstrip()  # the plain template writes "Assistant: " and the text
    head, tail = encode_prompt(prompt, tokenizer), encode_response(response, tokenizer)
    if len(head) + len(tail) <= max_length:
        return head + tail, len(head), False
    tail = tail[: max(max_length - len(head), max_length // 2, 1)]
    head = head[max(len(head) + len(tail) - max_length, 0) :]
    return head + tail, len(head), True


def decode_responses(tokens: Tensor, mask: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """(B, R) tokens and their mask -> the texts, without special tokens."""
    rows = [row[keep].tolist() for row, keep in zip(tokens.cpu(), mask.cpu(), strict=True)]
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


def left_pad(rows: Sequence[Sequence[int]], pad_token_id: int, max_length: int) -> PromptBatch:
    """Prompts as one batch, padded on the left; longer ones keep their last `max_length` tokens."""
    kept = [row[-max_length:] for row in rows]
    width = max(map(len, kept))
    ids = [[pad_token_id] * (width - len(row)) + list(row) for row in kept]
    mask = [[False] * (width - len(row)) + [True] * len(row) for row in kept]
    return PromptBatch(torch.tensor(ids), torch.tensor(mask))


def right_pad(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Rows of unequal length -> (B, T) tensor padded on the right, and its (B, T) mask."""
    width = max(map(len, rows))
    ids = [list(row) + [fill] * (width - len(row)) for row in rows]
    mask = [[True] * len(row) + [False] * (width - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def same_tokens(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> bool:
    """Whether a token id means the same to both."""
    special = [(t.eos_token_id, t.pad_token_id) for t in (ours, theirs)]
    return special[0] == special[1] and ours.get_vocab() == theirs.get_vocab()


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_length: int
) -> PromptBatch:
    """Prompts as one batch, padded on the left."""
    rows = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    return left_pad(rows, tokenizer.pad_token_id, max_length)
