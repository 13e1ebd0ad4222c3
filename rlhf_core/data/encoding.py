"""Encode text as tokens, in the same way in every stage. Knows tokenizers, but not models.

The work is done in `chat_tokens`, which serving shares; here its errors become those of the user,
and rows become batches.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_core.data import chat_tokens
from rlhf_core.data.chat_tokens import PLAIN_CHAT_TEMPLATE as PLAIN_CHAT_TEMPLATE
from rlhf_core.data.chat_tokens import Fitted, TextError, decode
from rlhf_core.data.chat_tokens import Message as Message
from rlhf_core.data.chat_tokens import Prompt as Prompt
from rlhf_core.errors import DataError
from rlhf_core.types import PromptBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD_TOKEN = "<|pad|>"
_PARALLEL = "TOKENIZERS_PARALLELISM"  # read by the package tokenizers at each call


def render_prompt(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text that a policy continues: a string as it is, messages through the chat template.

    Raises: DataError when the template rejects the messages.
    """
    with _for_the_user():
        return chat_tokens.render_prompt(prompt, tokenizer)


def encode_prompt(
    prompt: Prompt, tokenizer: "PreTrainedTokenizerBase", max_length: int | None = None
) -> list[int]:
    """Prompt tokens, at most `max_length` of them, with one begin-of-sequence token if the
    tokenizer uses it: see `chat_tokens.encode_prompt`.

    Raises: DataError when the template rejects the messages, or the tokenizer cannot keep control
        tokens apart from text.
    """
    with _for_the_user():
        return chat_tokens.encode_prompt(prompt, tokenizer, max_length)


def encode_response(
    response: str, tokenizer: "PreTrainedTokenizerBase", *, chat: bool = False, ended: bool = True
) -> list[int]:
    """Response tokens and, if it `ended`, what ends it: see `chat_tokens.encode_response`.

    Raises: DataError when the tokenizer cannot keep control tokens apart from text.
    """
    with _for_the_user():
        return chat_tokens.encode_response(response, tokenizer, chat=chat, ended=ended)


def encode_answers(
    prompt: Prompt,
    responses: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    ended: bool = True,
) -> Fitted:
    """Responses to one prompt, each with it at most `max_length` tokens: see `chat_tokens.fit`.

    Raises: DataError as `encode_prompt` and `encode_response` do.
    """
    with _for_the_user():
        return chat_tokens.fit(prompt, responses, tokenizer, max_length, ended=ended)


def encode_pair(
    prompt: Prompt, response: str, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> tuple[list[int], int, bool]:
    """Tokens of prompt and response, at most `max_length` of them.

    Returns: the tokens, how many of them belong to the prompt, and whether anything was cut.
    """
    found = encode_answers(prompt, [response], tokenizer, max_length)
    return found.prompt + found.responses[0], len(found.prompt), found.cut


def encode_all_answers(
    rows: Sequence[tuple[Prompt, Sequence[str]]],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
) -> list[Fitted]:
    """As `encode_answers` for many prompts with their responses, on all cores.

    Raises: DataError as `encode_prompt` and `encode_response` do.
    """
    with _for_the_user(), _on_all_cores():
        return chat_tokens.fit_all(rows, tokenizer, max_length)


def encode_all_prompts(
    prompts: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase", max_length: int | None = None
) -> list[list[int]]:
    """As `encode_prompt` for many prompts, on all cores.

    Raises: DataError as `encode_prompt` does.
    """
    with _for_the_user(), _on_all_cores():
        return chat_tokens.encode_prompts(tokenizer, prompts, max_length)


def encode_all_responses(
    responses: Sequence[tuple[str, bool]], tokenizer: "PreTrainedTokenizerBase"
) -> list[list[int]]:
    """As `encode_response` for many texts, each with whether it is in a chat, on all cores.

    Raises: DataError as `encode_response` does.
    """
    with _for_the_user(), _on_all_cores():
        return chat_tokens.encode_responses(responses, tokenizer)


def decode_responses(
    tokens: Tensor, mask: Tensor, tokenizer: "PreTrainedTokenizerBase"
) -> list[str]:
    """(B, R) tokens and their mask -> the texts, without special tokens."""
    rows = [row[keep].tolist() for row, keep in zip(tokens.cpu(), mask.cpu(), strict=True)]
    return [decode(row, tokenizer) for row in rows]


def left_pad(rows: Sequence[Sequence[int]], pad_token_id: int, max_length: int) -> PromptBatch:
    """Encoded prompts as one batch, padded on the left.

    They are cut by `encode_prompt`, which knows what a prompt needs; of a longer row only the last
    `max_length` tokens would be left.
    """
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


def same_tokens(ours: "PreTrainedTokenizerBase", theirs: "PreTrainedTokenizerBase") -> bool:
    """Whether a token id means the same to both."""
    special = [(t.eos_token_id, t.pad_token_id) for t in (ours, theirs)]
    return special[0] == special[1] and ours.get_vocab() == theirs.get_vocab()


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], max_length: int
) -> PromptBatch:
    """Prompts as one batch, padded on the left."""
    rows = [encode_prompt(prompt, tokenizer, max_length) for prompt in prompts]
    return left_pad(rows, tokenizer.pad_token_id, max_length)


@contextmanager
def _on_all_cores() -> Iterator[None]:
    """Let fast tokenizers use all cores. Not for good: their threads do not survive a fork."""
    before = os.environ.get(_PARALLEL)
    os.environ[_PARALLEL] = "true"
    try:
        yield
    finally:
        os.environ[_PARALLEL] = "false" if before is None else before


@contextmanager
def _for_the_user() -> Iterator[None]:
    """Make of a text that cannot be encoded an error that a user can fix."""
    try:
        yield
    except TextError as error:
        raise DataError(f"{error}; fix these rows, or leave them out") from error
