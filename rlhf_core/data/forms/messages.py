"""Texts and dialogues as people write them, turned into ours.

A message is `{"role", "content"}`, or `{"from", "value"}` as ShareGPT has it. Its content is text,
or a list of parts of which each is text. A dialogue is a list of messages, the same list as JSON or
Python text (as data sets look once they are written to CSV), one message, or the text format of
HH-RLHF. What a message has beside role and content is refused, since it would be lost.
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence, Set
from typing import Any

from rlhf_core.data.encoding import Message
from rlhf_core.data.forms.fields import is_filled, is_missing, shown
from rlhf_core.data.prepared import writable
from rlhf_core.data.vote_details import UnlikeError, quote

_ROLES: Mapping[str, str] = {
    **{"system": "system", "developer": "system"},
    **{"user": "user", "human": "user", "prompter": "user"},
    **{"assistant": "assistant", "gpt": "assistant"},
}
_TYPES: Mapping[type, str] = {
    **{bool: "a truth value", int: "a number", float: "a number"},
    **{str: "text", list: "a list", dict: "an object"},
}
_BESIDE = ("content", "value", "tool_calls", "function_call")  # what a message has beside its role
_TEXT_PARTS = ("text", "input_text", "output_text")
# A list of messages that was written as JSON or Python text begins so, also if it breaks off.
_BEGINS = re.compile(r"\s*\[\s*\{\s*(['\"])(?:role|from|content|value)\1\s*:")
_HAS_ROLE = re.compile(r"(['\"])(?:role|from)\1\s*:")
# A text in quotes, or the gap between two objects: numpy prints a list of them without commas.
_GAPS = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\}\s+(?=\{)""", re.S)
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def wrong_type(value: Any, wanted: str, where: str = "") -> UnlikeError:
    """The error for a value of another type."""
    found = _TYPES.get(type(value), f"of type {type(value).__name__}")
    entries = value.items() if isinstance(value, dict) else ()
    texts = [str(key) for key, entry in entries if isinstance(entry, str)]
    path = (
        f"; a dotted path in the fields reads a key of it, such as {shown(texts[0])}"
        if texts
        else ""
    )
    return UnlikeError("wrong type", f"{where}is {found}, not {wanted}{path}")


def required(value: Any, where: str = "") -> Any:
    """The value. Raises: UnlikeError when it is missing."""
    if is_missing(value):
        raise UnlikeError("missing", f"{where}is missing")
    return value


def text(value: Any, where: str = "") -> str:
    """A text that says something, and can be written. Raises: UnlikeError."""
    if not isinstance(required(value, where), str):
        raise wrong_type(value, "text", where)
    if not value or value.isspace():
        raise UnlikeError("empty text", f"{where}is empty")
    return checked(value, where)


def checked(value: str, where: str = "") -> str:
    """A text that can be written. Raises: UnlikeError."""
    if not writable(value):
        raise UnlikeError("broken text", f"{where}has half of a surrogate pair")
    return value


def unpacked(value: Any) -> Any:
    """Messages that were written as JSON or Python text, or one message alone, as a list.

    Any other value is returned as it is. Raises: UnlikeError for a text that begins as messages do
    and cannot be read.
    """
    if isinstance(value, dict) and _is_message(value):
        return [value]
    if not isinstance(value, str) or not _may_be_messages(value):
        return value
    found = parsed(value)
    if isinstance(found, dict):
        found = [found]
    if isinstance(found, list):
        return found if found and all(map(_is_message, found)) else value
    if _BEGINS.match(value):
        raise UnlikeError(
            "bad messages",
            "begins like messages in JSON or Python, but cannot be read as such; write it as JSON",
        )
    return value


def _may_be_messages(text: str) -> bool:
    return text.lstrip()[:1] in ("[", "{") and bool(_HAS_ROLE.search(text))


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and ("role" in value or "from" in value)
        and any(key in value for key in _BESIDE)
    )


def parsed(value: str) -> Any:
    """A list or object that was written as JSON or Python text; None if it is neither."""
    for read in (json.loads, _literal, lambda text: _literal(_with_commas(text))):
        try:
            found = read(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
        return found if isinstance(found, list | dict) else None
    return None


def _literal(text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in the user's text, such as \d
        return ast.literal_eval(text)


def _with_commas(value: str) -> str:
    return _GAPS.sub(lambda match: "}, " if match[0][0] == "}" else match[0], value)


def messages(value: Sequence[Any], ignored: Set[str] = frozenset()) -> list[Message]:
    """The messages of a list, without empty system messages.

    `ignored` are keys that a message may have beside its own, and which are left out.

    Raises: UnlikeError that names the message.
    """
    if not value:
        raise UnlikeError("empty text", "is an empty list of messages")
    found = [_message(entry, f"message {n} ", ignored) for n, entry in enumerate(value, 1)]
    kept = [message for message in found if message["content"]]
    if not kept:
        raise UnlikeError("empty text", "has only an empty system message")
    return kept


def _message(entry: Any, where: str, ignored: Set[str]) -> Message:
    keys = ("role", "content") if isinstance(entry, dict) and "role" in entry else ("from", "value")
    if not isinstance(entry, dict) or keys[0] not in entry:
        raise UnlikeError("bad messages", f"{where}is not an object with role and content")
    role = _ROLES.get(entry[keys[0]]) if isinstance(entry[keys[0]], str) else None
    if role is None:
        reason = (
            f"{where}has the role {quote(entry[keys[0]])}; it must be system, user or assistant"
        )
        raise UnlikeError("bad messages", reason)
    _require_no_more(entry, (*keys, *ignored), where)
    if keys[1] not in entry:
        raise UnlikeError("bad messages", f"{where}is not an object with role and content")
    content = _content(entry[keys[1]], where)
    if role == "system" and not is_filled(content):
        return {"role": role, "content": ""}
    return {"role": role, "content": text(content, where)}


def _require_no_more(entry: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    more = [key for key, value in entry.items() if key not in known and is_filled(value)]
    if not more:
        return
    if any(key in ("tool_calls", "function_call") for key in more):
        reason = f"{where}calls a tool ({shown(str(more[0]))}), which cannot be trained on"
    else:
        names = ", ".join(shown(str(key)) for key in more[:3])
        reason = f"{where}has {names} beside role and content, which would be lost"
    left_out = ", ".join(shown(str(key))[1:-1] for key in more[:3])
    raise UnlikeError(
        "more than text",
        f"{reason}; `ignore: [{left_out}]` among the table's settings leaves it out",
    )


def _content(value: Any, where: str) -> Any:
    """The text of a content that is given in parts; any other content as it is."""
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        return value
    texts = []
    for part in value:
        kind = part.get("type", "text")
        more = [k for k, v in part.items() if k not in ("type", "text") and is_filled(v)]
        if kind not in _TEXT_PARTS or more:
            other = more[0] if kind in _TEXT_PARTS else kind
            reason = f"{where}has a part of type {quote(other)}; only parts of text can be read"
            raise UnlikeError("more than text", reason)
        content = required(part.get("text"), f"{where}part of text ")
        if not isinstance(content, str):
            raise wrong_type(content, "text", f"{where}part of text ")
        texts.append(content)
    return "".join(texts)


def begins_a_dialogue(value: Any) -> bool:
    """Whether a text begins like a dialogue in the text format of HH-RLHF."""
    return isinstance(value, str) and value.lstrip().startswith(("Human:", "Assistant:"))


def turns(value: str, wanted: str = "") -> list[Message]:
    """The messages of a dialogue in the text format of HH-RLHF.

    An open turn of the assistant at the end, as a prompt has it, is left out if `wanted` is
    "prompt". Raises: UnlikeError.
    """
    before, *found = _TURN.split("\n\n" + value.lstrip())
    if before or not found:
        reason = "is not a dialogue (messages, or turns that begin with 'Human:'/'Assistant:')"
        raise UnlikeError("bad messages", f"{reason}, and the source has no prompt field")
    if wanted == "prompt" and found[-2] == "Assistant" and not found[-1].strip():
        found = found[:-2]
    entries = [
        {"role": _SPEAKERS[speaker], "content": content.strip()}
        for speaker, content in zip(found[::2], found[1::2], strict=True)
    ]
    return messages(entries)


def is_open_dialogue(value: str) -> bool:
    """Whether a text is a dialogue of HH-RLHF whose answer is still to come."""
    return begins_a_dialogue(value) and value.rstrip().endswith("\n\nAssistant:")


def question(context: list[Message]) -> list[Message]:
    """Messages that end with a user's. Raises: UnlikeError."""
    if not context or context[-1]["role"] != "user":
        raise UnlikeError("bad messages", "does not end with a user message to answer")
    return context
