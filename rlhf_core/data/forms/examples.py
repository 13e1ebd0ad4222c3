"""What a row becomes: demonstrations, prompts, and preferences of votes, scores and ranks.

Each function takes a row and returns examples in the prepared columns. An example without an id has
that of its row.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeVar

from rlhf_core.data.encoding import Prompt
from rlhf_core.data.forms.rows import SkippedRowError, SourceRow
from rlhf_core.data.origins.counts import ORIGIN
from rlhf_core.data.prepared import canonical_prompt
from rlhf_core.data.sources import Row

Item = TypeVar("Item")
_NEIGHBOURS = 15  # later answers to the same prompt that an answer is compared with
_LOOKED_AT = 1000  # later answers that are looked at for them


def demonstration(row: SourceRow, field: str) -> list[Row]:
    """A prompt and its response; `field` has the response or the whole dialogue."""
    prompt, response = row.exchange(field)
    return [{"prompt": row.worded(prompt), "response": response}]


def prompt_alone(row: SourceRow) -> list[Row]:
    """A prompt."""
    return [{"prompt": row.worded(row.prompt())}]


def chosen_pair(row: SourceRow) -> list[Row]:
    """Chosen and rejected, as a vote for the chosen one."""
    return _chosen(row, *_sides(row, "chosen", "rejected"))


def implicit_pair(row: SourceRow) -> list[Row]:
    """Chosen and rejected as texts that begin with the prompt."""
    return _chosen(row, *row.halves("chosen", "rejected"))


def _chosen(row: SourceRow, prompt: Prompt, chosen: str, rejected: str) -> list[Row]:
    answers = {"prompt": row.worded(prompt), "response_a": chosen, "response_b": rejected}
    return [{**answers, **_known(row), "vote": "a", "margin": row.margin_of_chosen()}]


def voted_pair(row: SourceRow, field: str) -> list[Row]:
    """Two responses and their votes: one preference for each vote."""
    prompt, a, b = _sides(row, "response_a", "response_b")
    answers = {"prompt": row.worded(prompt), "response_a": a, "response_b": b}
    votes, source, anonymous = row.votes(field), row.source(), Counter[str]()
    margins = row.margins([one.vote for one in votes])
    preferences = []
    for (annotator, vote, details, said, entry), margin in zip(votes, margins, strict=True):
        anonymous[vote] += not annotator
        ballot = {"ballot": 0 if annotator else anonymous[vote], "said": said, "entry": entry}
        cast = {"vote": vote, "annotator": annotator, **row.cast(details)}
        preferences.append({**answers, "margin": margin, "source": source, **cast, **ballot})
    return preferences


def scored_pair(row: SourceRow, fields: Sequence[str]) -> list[Row]:
    """Two responses, of which the one with the higher score wins. With only one of the two scores,
    the other is 0."""
    prompt, a, b = _sides(row, "response_a", "response_b")
    score_a, score_b = (
        row.number(name, row.get(name)) if name in fields else 0.0
        for name in ("score_a", "score_b")
    )
    outcome = _compared(row, score_a, score_b)
    if not row.reading.score_margin:
        [outcome["margin"]] = row.margins([outcome["vote"]])
    answers = {"prompt": row.worded(prompt), "response_a": a, "response_b": b}
    return [{**answers, **_known(row), **outcome}]


def answers_compared(row: SourceRow, level: str) -> list[Row]:
    """Every two answers of a list that are `near`, by their `rank` or `score`."""
    prompt, known = row.worded(row.prompt()), _known(row)
    numbered = list(enumerate(row.answers(level), 1))
    return [
        {
            **{"id": f"{row.identity()}-{i}-{j}", "prompt": prompt},
            **{"response_a": one.text, "response_b": other.text},
            **{"entry_a": one.entry, "entry_b": other.entry},
            **known,
            **_compared(row, one.level, other.level),
        }
        for (i, one), (j, other) in near(numbered)
    ]


def near(items: Sequence[Item]) -> Iterator[tuple[Item, Item]]:
    """Every two items that are at most 15 apart: a long list has no pair for each two of it."""
    for i, one in enumerate(items):
        for other in items[i + 1 : i + 1 + _NEIGHBOURS]:
            yield one, other


def _compared(row: SourceRow, a: float, b: float) -> Row:
    vote = "a" if a > b else "b" if b > a else "tie"
    return {"vote": vote, "margin": abs(a - b) * row.reading.score_margin}


def _sides(row: SourceRow, first: str, second: str) -> tuple[Prompt, str, str]:
    prompt, one = row.exchange(first)
    same, other = row.exchange(second)
    if prompt != same:
        raise SkippedRowError("dialogues diverge before the last answer")
    return prompt, one, other


def _known(row: SourceRow) -> Row:
    return {"annotator": row.label("annotator"), "source": row.source(), **row.cast({})}


def rated(row: SourceRow) -> list[Row]:
    """One answer with its score, for `compare_rated`."""
    prompt, response = row.exchange("response")
    score, scale = row.number("score", row.get("score")), row.reading.score_margin
    answer = {"prompt": row.worded(prompt), "response": response}
    return [{**answer, **_known(row), "score": score, "scale": scale}]


def compare_rated(answers: list[Row]) -> tuple[list[Row], Mapping[str, int]]:
    """Every two answers to one prompt that one annotator rated differently, and how many answers
    are in no pair. An answer is compared with at most 15 of those that come later."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for answer in answers:
        groups[canonical_prompt(answer["prompt"]), answer["annotator"]].append(answer)
    pairs, alone = [], 0
    for group in groups.values():
        compared: set[int] = set()
        for i, one in enumerate(group):
            later = range(i + 1, min(len(group), i + 1 + _LOOKED_AT))
            unlike = (j for j in later if group[j]["score"] != one["score"])
            for j in islice(unlike, _NEIGHBOURS):
                compared |= {i, j}
                pairs.append(_rated_pair(one, group[j]))
        alone += len(group) - len(compared)
    reason = "no other answer to the prompt that is rated otherwise"
    return pairs, {reason: alone} if alone else {}


def of_both(one: Row, other: Row) -> Row:
    """Where a pair of two rows comes from, if they say that."""
    return {ORIGIN: one[ORIGIN].beside(other[ORIGIN])} if ORIGIN in one else {}


def _rated_pair(one: Row, other: Row) -> Row:
    lead = one["score"] - other["score"]
    return {
        **one,
        **{"id": f"{one['id']}+{other['id']}", "vote": "a" if lead > 0 else "b"},
        **{"response_a": one["response"], "response_b": other["response"]},
        **{"entry_a": one.get("values"), "entry_b": other.get("values")},
        "margin": abs(lead) * one["scale"],
        **of_both(one, other),
    }
