"""What exports of labelling tools have in common: whose names for prompt and answers differ."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from rlhf_core.data.encoding import Prompt
from rlhf_core.data.forms.fields import listed
from rlhf_core.data.sources import Row, SourceRows
from rlhf_core.errors import DataError
from tasks.feedback.forms.options import ImportOptions

_PROMPTS = ("prompt", "question", "instruction", "query", "context", "input", "conversation")
_ANSWER = re.compile(
    r"(response|answer|reply|completion|generation|output|text|option)[-_ ]?([0-9]+|[a-z])",
    re.IGNORECASE,
)


class Adapted(NamedTuple):
    """A tool's export in rows that `data.preferences` reads."""

    source: SourceRows
    names: Mapping[str, str]  # of ours -> the rows'
    left_out: Counter[str]  # reason -> how many
    sides: bool = False  # the first answer was on the left, and shown first


def prompt_in(keys: Iterable[str]) -> str:
    """The key that has the prompt; empty if none is called so."""
    there = {key.lower(): key for key in keys}
    return next((there[name] for name in _PROMPTS if name in there), "")


def answers_in(keys: Iterable[str]) -> list[str]:
    """The keys that have the answers, in order: those that differ only by a number or letter."""
    groups: dict[str, list[tuple[int, str, str]]] = {}
    for key in keys:
        if found := _ANSWER.fullmatch(key):
            place = found[2].lower()
            number = int(place) if place.isdecimal() else 0
            groups.setdefault(found[1].lower(), []).append((number, place, key))
    best = max(groups.values(), key=len, default=[])
    return [key for _, _, key in sorted(best)] if len(best) > 1 else []


def compared_lists(source: SourceRows, options: ImportOptions) -> Adapted:
    """Rows with `responses`, `pair_order` (which two of them, from 1) and `preferences`, as rows of
    pairs. The prompt is a column that is called so, or `question`."""
    names = {"prompt": prompt_in(source.columns()) or "prompt", **options.fields}
    answers = {"response_a": "response_a", "response_b": "response_b"}

    def change(number: int, row: Row) -> Iterator[tuple[int, Row]]:
        lists = [row.get(name) for name in ("responses", "pair_order", "preferences")]
        texts, order, said = (found if isinstance(found, list) else [] for found in lists)
        beside = {
            name: value
            for name, value in row.items()
            if name not in ("responses", "pair_order", "preferences")
        }
        for place in range(max(len(order), len(said), 1)):
            both = order[place] if place < len(order) else None
            both = both if isinstance(both, list) and len(both) == 2 else [0, 0]
            pair = {
                name: texts[n - 1] if isinstance(n, int) and 1 <= n <= len(texts) else None
                for name, n in zip(answers, both, strict=True)
            }
            vote = said[place] if place < len(said) else None
            name = f"{row.get('id', number)}-{both[0]}-{both[1]}"
            yield number, {**beside, **pair, "id": name, "vote": vote}

    return Adapted(source.mapped(change), {**names, **answers}, Counter())


def places(
    source: SourceRows, options: ImportOptions, keys: list[str], prefix: str, answers: list[str]
) -> dict[str, str]:
    """Where prompt and the two answers are, as `fields` has it.

    Raises: DataError when they are neither mapped nor called as usual.
    """
    names = dict(options.fields)
    guessed = {"prompt": prompt_in(keys)}
    guessed |= dict(zip(("response_a", "response_b"), answers[:2], strict=False))
    for field in ("prompt", "response_a", "response_b"):
        if field in names:
            continue
        if not guessed.get(field) or (field != "prompt" and len(answers) > 2):
            raise DataError(
                f"{source.source} does not tell where '{field}' is; its fields are: "
                f"{listed([prefix + key for key in keys])}; name it as --fields "
                f"{field}={prefix}{keys[0] if keys else 'NAME'}"
            )
        names[field] = prefix + guessed[field]
    return names


def person(value: Any) -> str:
    """The number or pseudonym of a user, never the name or address that stands beside it."""
    if isinstance(value, dict):
        value = value.get("id", "")
    if isinstance(value, bool) or not isinstance(value, int | str):
        return ""
    return str(value)


def as_text(prompt: Prompt) -> str:
    """A prompt for a person to read: a single question as it is, a dialogue with who says what."""
    if isinstance(prompt, str):
        return prompt
    if is_question(prompt):
        return prompt[0]["content"]
    return "\n\n".join(f"{part['role'].capitalize()}: {part['content']}" for part in prompt)


def is_question(prompt: Prompt) -> bool:
    """Whether a prompt is a text, or a single message of a user, which is the same."""
    return isinstance(prompt, str) or (len(prompt) == 1 and prompt[0]["role"] == "user")
