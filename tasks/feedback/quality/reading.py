"""Votes from the store, as arrays: texts pass by and only their lengths stay."""

from array import array
from collections.abc import Iterable
from datetime import UTC, datetime

import numpy as np

from rlhf_core.agreement.machines import ALONE, AUDIT
from rlhf_core.agreement.votes import CHOICES, KINDS, UNKNOWN, Grouping, Ints, Votes
from rlhf_core.data.prepared import canonical_prompt
from tasks.feedback.store.content import digest
from tasks.feedback.store.judgments import CastVote
from tasks.feedback.store.tables import AUDITED, JUDGED

_SIDES = {"a": 0, "b": 1, "tie": 2}
_CHOICES = {name: code for code, name in enumerate(CHOICES)}
_ROUTES = {JUDGED: ALONE, AUDITED: AUDIT}
_KINDS = {name: code for code, name in enumerate(KINDS)}


class _Codes:
    """Numbers for names, in the order in which they come; what is empty is unknown."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}

    def __getitem__(self, name: str) -> int:
        return self.of.setdefault(name, len(self.of)) if name else UNKNOWN

    def names(self) -> tuple[str, ...]:
        return tuple(self.of)


def as_votes(stream: Iterable[CastVote]) -> Votes:
    """Read votes and skips into arrays, in the order of the stream."""
    pairs: dict[int, int] = {}
    people, reasons, prompts = _Codes(), _Codes(), _Codes()
    columns: dict[str, tuple[_Codes, array[int]]] = {}
    pair, who, why = array("q"), array("q"), array("q")
    choice, first, kind, gold = array("b"), array("b"), array("b"), array("b")
    seconds, at = array("d"), array("d")
    prompt, lengths, routes = array("q"), array("q"), array("b")
    for vote in stream:
        place = pairs.get(vote.pair)
        if place is None:
            place = pairs[vote.pair] = len(pairs)
            prompt.append(prompts[digest(canonical_prompt(vote.prompt))])
            lengths.extend((len(vote.response_a), len(vote.response_b)))
            routes.append(_ROUTES.get(vote.arm, 0))
            gold.append(_SIDES.get(vote.gold, UNKNOWN))
        for column, value in vote.kept.items():
            codes, values = columns.setdefault(column, (_Codes(), array("q")))
            values.extend([UNKNOWN] * (len(pair) - len(values)))  # votes that do not have it
            values.append(codes[str(value)])
        pair.append(place)
        who.append(people[vote.annotator or ""])
        why.append(reasons[vote.reason.strip()])
        choice.append(_CHOICES[vote.vote])
        first.append(_SIDES.get(vote.first, UNKNOWN))
        kind.append(_KINDS[vote.kind])
        seconds.append(np.nan if vote.seconds is None else vote.seconds)
        at.append(_moment(vote.time))
    groups = {
        column: Grouping(_filled(values, len(pair)), codes.names())
        for column, (codes, values) in columns.items()
    }
    return Votes(
        pair=_array(pair, np.int64),
        annotator=_array(who, np.int64),
        choice=_array(choice, np.int8),
        first=_array(first, np.int8),
        kind=_array(kind, np.int8),
        seconds=_array(seconds, np.float64),
        at=_array(at, np.float64),
        reason=_array(why, np.int64),
        prompt=_array(prompt, np.int64),
        characters=_array(lengths, np.int64).reshape(-1, 2),
        gold=_array(gold, np.int8),
        groups=groups,
        names=people.names(),
        reasons=reasons.names(),
        routes=_array(routes, np.int8),
    )


def _array(values: array, kind: type) -> np.ndarray:  # type: ignore[type-arg]
    return np.array(values, dtype=kind)


def _filled(values: "array[int]", count: int) -> Ints:
    found = np.full(count, UNKNOWN, dtype=np.int64)
    found[: len(values)] = values
    return found


def _moment(text: str) -> float:
    """Seconds since 1970 of an ISO time, in UTC unless it says otherwise; NaN if it is none."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return np.nan
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
