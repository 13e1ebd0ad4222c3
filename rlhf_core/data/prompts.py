"""A prompt as a value: text or chat messages, when two are the same, and what can be written.

It needs no other package, so that a server of the preference store starts without torch.
"""

import json
from typing import TypeAlias

# As in `chat_tokens`, which an exported model carries a copy of and so imports nothing.
Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = str | list[Message]


def canonical_prompt(prompt: Prompt) -> str:
    """A prompt as text: equal for equal prompts and for no others."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def prompt_key(prompt: Prompt) -> str:
    """A key that is equal for prompts that ask the same: runs of white space count as one space,
    and a single user message counts as its text."""
    if not isinstance(prompt, str):
        single = len(prompt) == 1 and prompt[0]["role"] == "user"
        prompt = prompt[0]["content"] if single else canonical_prompt(prompt)
    return " ".join(prompt.split())


def writable(text: str) -> bool:
    """Whether a text can be written: UTF-8 cannot encode half of a surrogate pair."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
