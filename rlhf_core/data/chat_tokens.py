"""Texts and messages as tokens. The one place where text becomes tokens, in training and serving.

An exported model carries a copy of this file, and runs where this package is not installed: of
`rlhf_core` it imports only the limits of templates, which are left out there.

A training text is `prompt tokens + response tokens + end`. Prompt and response are tokenised
separately, so that a policy is prompted with exactly the tokens it was trained on. Control tokens
are written by the chat template and by this module; one that is written out in a text stays text.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

try:
    from rlhf_core.data.templates import within_limits
except ImportError:  # in an exported model, whose template has passed them

    def within_limits(  # type: ignore[misc]
        template: str, messages: Any
    ) -> AbstractContextManager[None]:
        """Render without limits."""
        return nullcontext()


Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = str | list[Message]

# For tokenizers without a template: the plain dialogue format of the HH-RLHF data.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
    "{% else %}{{ '\\n\\nAssistant: ' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)

_DATED = re.compile(r"\{#- the date of the run: (\S+) #\}.*?\{% endmacro %\}\n", re.DOTALL)
_PROBE = "An answer."
_MARKS = "\U000f0000\U000f0001"  # with which transformers marks written control tokens


class TextError(ValueError):
    """A prompt or a response that cannot be encoded; the message says why."""


class _Traits(NamedTuple):
    """What is looked up for every text."""

    special: frozenset[int]  # tokens that no text may have
    end_of_turn: int


_known: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, _Traits]]" = WeakKeyDictionary()


class Fitted(NamedTuple):
    """A prompt and its responses as tokens, cut to a length."""

    prompt: list[int]
    responses: list[list[int]]
    cut: bool  # whether anything was cut
    lost: int  # tokens of responses that were cut off


def render_prompt(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text that a policy continues: a string as it is, messages through the chat template.

    Raises: TextError when the template rejects the messages.
    """
    if isinstance(prompt, str):
        return prompt
    return str(_apply(prompt, tokenizer, tokenize=False, add_generation_prompt=True))


def encode_prompt(
    prompt: Prompt, tokenizer: "PreTrainedTokenizerBase", max_length: int | None = None
) -> list[int]:
    """Prompt tokens, with one begin-of-sequence token if the tokenizer uses it.

    A prompt of more than `max_length` tokens is cut. A text keeps its beginning-of-sequence token
    and its end. Messages keep that token, the system message and the opening of the answer: whole
    turns are dropped first, from the oldest on, then the start of the last message, then the end of
    the system message.

    Raises: TextError when the template rejects the messages, or for a tokenizer that makes a
        control token of plain text.
    """
    ids = _encode_whole(prompt, tokenizer)
    return ids if max_length is None else _cut(ids, prompt, tokenizer, max_length)


def encode_response(
    response: str, tokenizer: "PreTrainedTokenizerBase", *, chat: bool = False, ended: bool = True
) -> list[int]:
    """Response tokens and, if it `ended`, what ends it.

    That is the template's end of a turn in a `chat`, and the end-of-sequence token after a text.

    Raises: TextError for a tokenizer that makes a control token of plain text.
    """
    if chat:
        response = _spaced(response, tokenizer)
    ids = _as_text(response, tokenizer)
    end = end_of_turn(tokenizer) if chat else tokenizer.eos_token_id
    return [*ids, end] if ended else ids


def fit(
    prompt: Prompt,
    responses: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    ended: bool = True,
) -> Fitted:
    """Responses to one prompt as tokens, each with the prompt at most `max_length` of them.

    A text that is too long is cut at the end of its response. If the prompt leaves the longest
    response less than half of `max_length`, the prompt is cut as well, and in the same way for
    every response.
    """
    chat = not isinstance(prompt, str)
    head = _encode_whole(prompt, tokenizer)
    tails = [encode_response(text, tokenizer, chat=chat) for text in responses]
    return _fit(prompt, head, tails, tokenizer, max_length, ended=ended)


def fit_all(
    rows: Sequence[tuple[Prompt, Sequence[str]]],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
) -> list[Fitted]:
    """As `fit` for each prompt and its responses, but the tokenizer gets all texts at once, which a
    fast one spreads over the cores."""
    try:
        heads = encode_prompts(tokenizer, [prompt for prompt, _ in rows])
        texts = [(text, not isinstance(prompt, str)) for prompt, found in rows for text in found]
        tails = iter(encode_responses(texts, tokenizer))
    except TextError:
        # One at a time, the first that is wrong is the one that is named.
        return [fit(prompt, responses, tokenizer, max_length) for prompt, responses in rows]
    return [
        _fit(prompt, head, [next(tails) for _ in responses], tokenizer, max_length, ended=True)
        for head, (prompt, responses) in zip(heads, rows, strict=True)
    ]


def encode_responses(
    responses: Sequence[tuple[str, bool]], tokenizer: "PreTrainedTokenizerBase"
) -> list[list[int]]:
    """As `encode_response` for each text and whether it is in a chat, but the tokenizer gets all
    texts at once.

    Raises: TextError as `encode_response` does.
    """
    texts = [_spaced(text, tokenizer) if chat else text for text, chat in responses]
    ends = {False: tokenizer.eos_token_id, True: end_of_turn(tokenizer)}
    found = _as_texts(texts, tokenizer)
    return [[*ids, ends[chat]] for ids, (_, chat) in zip(found, responses, strict=True)]


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], max_length: int | None = None
) -> list[list[int]]:
    """As `encode_prompt` for each prompt, but the tokenizer gets all texts at once.

    Raises: TextError as `encode_prompt` does.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    simple = _without_controls(tokenizer)
    chats = [p for p in prompts if not isinstance(p, str) and simple(p)]
    as_text = iter(_as_texts(texts, tokenizer))
    rendered = [render_prompt(chat, tokenizer) for chat in chats]
    as_chat = iter(_tokenised(rendered, tokenizer))
    begin, found = _begin(tokenizer), []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids = next(as_text)
        elif simple(prompt):
            ids = next(as_chat)
        else:
            ids = _encode_whole(prompt, tokenizer)
        ids = ids if ids[: len(begin)] == begin else [*begin, *ids]
        found.append(ids if max_length is None else _cut(ids, prompt, tokenizer, max_length))
    return found


def _fit(
    prompt: Prompt,
    head: list[int],
    tails: list[list[int]],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    ended: bool,
) -> Fitted:
    longest = max(map(len, tails))
    cut = len(head) + longest > max_length
    if cut:
        room = max_length - min(longest, max(max_length // 2, 1))
        head = _cut(head, prompt, tokenizer, room)
    # A response that did not end is cut like one that did, and leaves the place of its end empty.
    kept = [tail[: min(max_length - len(head), len(tail) - (not ended))] for tail in tails]
    lost = sum(len(tail) - (not ended) for tail in tails) - sum(map(len, kept))
    return Fitted(head, kept, cut, lost)


def decode(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text of response tokens, without what ended it and without special tokens."""
    if len(ids) and ids[-1] in (tokenizer.eos_token_id, end_of_turn(tokenizer)):
        ids = ids[:-1]
    # Spaces are part of what was written, so nothing is cleaned up.
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that ends an answer in a chat: the first control token that the template writes
    after an assistant's message, or else the end-of-sequence token."""
    return _traits(tokenizer).end_of_turn


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The control tokens: all special tokens, and added tokens that stand in the template."""
    template = str(tokenizer.chat_template)
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (token.content in template and not token.content.isspace())
    ]


def written_controls(tokenizer: "PreTrainedTokenizerBase") -> Callable[[Prompt], list[str]]:
    """A function that lists the control tokens written out in a text, or in messages."""
    longest_first = sorted(control_tokens(tokenizer), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def find(text: Prompt) -> list[str]:
        texts = [text] if isinstance(text, str) else [m["content"] for m in text]
        return [found for content in texts for found in pattern.findall(content)]

    return find


def asks_for_the_date(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template writes the date of the day."""
    return "strftime_now" in str(tokenizer.chat_template)


def set_date(tokenizer: "PreTrainedTokenizerBase", day: date) -> None:
    """Have the chat template write this day wherever it asks for today.

    The day becomes part of the template, so it is saved with the tokenizer.
    """
    if not asks_for_the_date(tokenizer):
        return
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        tokenizer.chat_template = {name: _dated(text, day) for name, text in templates.items()}
    else:
        tokenizer.chat_template = _dated(templates, day)


def _dated(template: str, day: date) -> str:
    """A template in which a macro of the name of transformers' function writes one day."""
    template = _DATED.sub("", template, count=1)
    if "strftime_now" not in template:
        return template
    codes = re.findall("-?.", "-d-m-jaAbBcdDeFhHIjmMpSTuUVwWxXyY")  # %% comes last
    written = ["format | string"]
    for code in [*codes, "%"]:
        written.append(f"replace('%{code}', {day.strftime(f'%{code}')!r})")
    return (
        f"{{#- the date of the run: {day.isoformat()} #}}"
        f"{{% macro strftime_now(format) %}}{{{{ {' | '.join(written)} }}}}{{% endmacro %}}\n"
        f"{template}"
    )


def _apply(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", **options: Any
) -> Any:
    """What the chat template makes of messages.

    Raises: TextError when it rejects them.
    """
    template = None if tokenizer.chat_template else PLAIN_CHAT_TEMPLATE
    try:
        with within_limits(str(tokenizer.chat_template or PLAIN_CHAT_TEMPLATE), messages):
            return tokenizer.apply_chat_template(
                list(messages), chat_template=template, return_dict=False, **options
            )
    except Exception as error:  # a template is code of the model's, which may fail in any way
        start = "; ".join(f"{m['role']}: {m['content'][:40]}" for m in messages[:3])
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        if why.startswith("Can't sanitize"):
            raise TextError(
                f"the messages ({start} ...) have a control token written out, and this model's "
                f"tokenizer makes a token of it ({why})"
            ) from error
        raise TextError(
            f"the model's chat template rejects the messages ({start} ...): {why}"
        ) from error


def _encode_whole(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Prompt tokens, however many."""
    ids: list[int]
    if isinstance(prompt, str):
        ids = _as_text(prompt, tokenizer)
    elif any(mark in message["content"] for message in prompt for mark in _MARKS):
        raise TextError(
            "a message has one of the private-use characters U+F0000 and U+F0001, by which control "
            "tokens are told from text"
        )
    else:
        # Without written control tokens these are the tokens of the rendered text.
        ids = _apply(
            prompt,
            tokenizer,
            tokenize=True,
            add_generation_prompt=True,
            sanitize_control_tokens=True,
        )
    begin = _begin(tokenizer)
    return ids if ids[: len(begin)] == begin else [*begin, *ids]


def _as_text(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens of a text in which nothing is a special token."""
    ids: list[int] = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, verbose=False
    ).input_ids
    refuse_controls(ids, tokenizer)
    return ids


def _as_texts(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """The tokens of each text, in which nothing is a special token."""
    found = _tokenised(texts, tokenizer, split_special_tokens=True)
    special = _traits(tokenizer).special
    for ids in found:
        if not special.isdisjoint(ids):
            refuse_controls(ids, tokenizer)
    return found


def _tokenised(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", **options: Any
) -> list[list[int]]:
    if not texts:
        return []
    different = list(dict.fromkeys(texts))
    found = tokenizer(
        different,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
        **options,
    ).input_ids
    ids = dict(zip(different, found, strict=True))
    return [ids[text] for text in texts]


def _without_controls(tokenizer: "PreTrainedTokenizerBase") -> Callable[[Sequence[Message]], bool]:
    """Whether messages have nothing in them that could be taken for a control token."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    pattern = re.compile("|".join(map(re.escape, [*added, *_MARKS])))

    def holds(messages: Sequence[Message]) -> bool:
        return not any(pattern.search(value) for m in messages for value in m.values())

    return holds


def _spaced(response: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """An answer in a chat: the plain template writes "Assistant: " and the text."""
    plain = tokenizer.chat_template in (None, PLAIN_CHAT_TEMPLATE)
    return " " + response.lstrip() if plain else response


def refuse_controls(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise TextError when the tokens of a text have a special one, other than for the unknown."""
    forged = _traits(tokenizer).special.intersection(ids)
    if forged:
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(forged))))
        raise TextError(
            f"the text has {names} written out, and this model's tokenizer makes a control token "
            "of it, so it would not be read as text"
        )


def _begin(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The begin-of-sequence token, if the tokenizer puts one before every text."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []


def _traits(tokenizer: "PreTrainedTokenizerBase") -> _Traits:
    """The traits of a tokenizer as it is now."""
    now = (str(tokenizer.chat_template), len(tokenizer), *tokenizer.special_tokens_map.values())
    found = _known.get(tokenizer)
    if found is None or found[0] != now:
        special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
        traits = _Traits(
            special=frozenset(special - {tokenizer.unk_token_id}),
            end_of_turn=_find_end_of_turn(tokenizer),
        )
        found = _known[tokenizer] = (now, traits)
    return found[1]


def _find_end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int:
    eos: int = tokenizer.eos_token_id
    question = [{"role": "user", "content": "A question?"}]
    try:
        text = _apply(
            [*question, {"role": "assistant", "content": _PROBE}], tokenizer, tokenize=False
        )
    except TextError:
        return eos
    _, answered, after = str(text).rpartition(_PROBE)
    if not answered:
        return eos
    named = set(control_tokens(tokenizer))
    ids = tokenizer(after, add_special_tokens=False).input_ids
    controls = (n for n in ids if tokenizer.convert_ids_to_tokens(n) in named)
    return next(controls, eos)


# --- cutting -------------------------------------------------------------------------------------


def _cut(
    ids: list[int], prompt: Prompt, tokenizer: "PreTrainedTokenizerBase", room: int
) -> list[int]:
    """The tokens of a prompt, cut to the room."""
    if len(ids) > room and not isinstance(prompt, str):
        ids = _fit_messages(prompt, tokenizer, room) or ids
    return _keep_end(ids, tokenizer, room)


def _keep_end(ids: list[int], tokenizer: "PreTrainedTokenizerBase", room: int) -> list[int]:
    """The last tokens, after a begin-of-sequence token if there was one and if both fit."""
    if len(ids) <= room:
        return ids
    begin = _begin(tokenizer)
    if ids[: len(begin)] != begin or len(begin) >= room:
        begin = []
    return [*begin, *ids[len(ids) - (room - len(begin)) :]]


def _fit_messages(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", room: int
) -> list[int] | None:
    """The tokens of messages of which some are cut; None if the template rejects what is left."""
    first = next((n for n, m in enumerate(messages) if m["role"] != "system"), len(messages))
    system, rest = list(messages[:first]), list(messages[first:])
    starts = [n for n, m in enumerate(rest) if n and m["role"] == "user"]
    for start in starts:
        ids = _try([*system, *rest[start:]], tokenizer)
        if ids is not None and len(ids) <= room:
            return ids
    if not rest:
        return None
    last = rest[starts[-1] :] if starts else rest

    def encoded(head: list[Message], start: int) -> list[int] | None:
        tail = {**last[-1], "content": last[-1]["content"][start:]}
        return _try([*head, *last[:-1], tail], tokenizer)

    def fits(head: list[Message], start: int) -> bool:
        ids = encoded(head, start)
        return ids is not None and len(ids) <= room

    places = _token_starts(last[-1]["content"], tokenizer)
    # The last message keeps an eighth of the room, whatever the system message takes.
    least = places[max(len(places) - 1 - max(room // 8, 1), 0)]
    while system and not fits(system, least):
        system = _shorter(system, tokenizer, lambda head: fits(head, least))
    tokens = _last(range(len(places)), lambda n: fits(system, places[len(places) - 1 - n]))
    return encoded(system, least if tokens is None else places[len(places) - 1 - tokens])


def _shorter(
    system: list[Message],
    tokenizer: "PreTrainedTokenizerBase",
    fits: Callable[[list[Message]], bool],
) -> list[Message]:
    """System messages without the end of the last, or without all of it if no start of it fits."""
    last = system[-1]
    ends = _token_starts(last["content"], tokenizer)

    def cut(n: int) -> list[Message]:
        return [*system[:-1], {**last, "content": last["content"][: ends[n]]}]

    kept = _last(range(1, len(ends)), lambda n: fits(cut(n)))
    return system[:-1] if kept is None else cut(kept)


def _last(numbers: Sequence[int], holds: Callable[[int], bool]) -> int | None:
    """The last of some numbers for which a condition holds that holds for the first ones only."""
    low, high = 0, len(numbers)
    while low < high:
        middle = (low + high) // 2
        if holds(numbers[middle]):
            low = middle + 1
        else:
            high = middle
    return numbers[low - 1] if low else None


def _token_starts(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The places in a text where a token starts, and its end; every place where none are known."""
    if not tokenizer.is_fast:
        return list(range(len(text) + 1))
    spans = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )["offset_mapping"]
    return sorted({start for start, _ in spans} | {0, len(text)})


def _try(messages: list[Message], tokenizer: "PreTrainedTokenizerBase") -> list[int] | None:
    try:
        return _encode_whole(messages, tokenizer)
    except TextError:
        return None
